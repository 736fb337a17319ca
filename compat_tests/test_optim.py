"""SGD: the same trained weights, the same saved state, the same errors."""

import abc
import collections
import copy
import io
import pickle

import pytest
import torch

import nnmirror

from .parity import parity, same, trained

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"weight_decay": 0.01},
    "maximize": {"maximize": True, "lr": 0.01},
    "all": {"momentum": 0.5, "dampening": 0.1, "weight_decay": 0.1, "maximize": True, "lr": 0.01},
    "nesterov decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "tensor lr": {"lr": torch.tensor(0.05), "momentum": 0.9},
    "tensor lr of one element": {"lr": torch.tensor([0.05])},
    "double lr": {"lr": torch.tensor(0.05, dtype=torch.float64)},
    "tensor decay": {"weight_decay": torch.tensor(0.05)},
    "lr 0": {"lr": 0.0},
    "default lr": {},
}
KERNELS = {
    "default": {},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
}


def small(nn, dtype=torch.float32):
    return nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Tanh(), nn.Linear(4, 2, dtype=dtype))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", OPTIONS)
@parity
def test_options(nn, optim, name, kernel):
    options = {**OPTIONS[name], **KERNELS[kernel]}
    return trained(nn, optim, small(nn), torch.randn(5, 3), torch.randn(5, 2), steps=4, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@parity
def test_dtypes(nn, optim, dtype, kernel):
    options = {"momentum": 0.9, "weight_decay": 0.1, **KERNELS[kernel]}
    x, t = torch.randn(5, 3).to(dtype), torch.randn(5, 2).to(dtype)
    return trained(nn, optim, small(nn, dtype), x, t, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@parity
def test_groups_late_gradients_and_frozen_parameters(nn, optim, kernel):
    net, extra = small(nn), nn.Linear(3, 2)
    net[0].bias.requires_grad_(False)
    optimizer = optim.SGD(
        [
            {"params": net[0].parameters(), "lr": 0.5},
            {"params": net[2].parameters(), "momentum": 0.9},
        ],
        lr=0.1,
        weight_decay=0.01,
        **KERNELS[kernel],
    )
    optimizer.add_param_group({"params": extra.weight, "nesterov": True, "momentum": 0.5})
    x = torch.randn(5, 3)
    for step in range(4):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        out = net(x) + (extra(x) if step > 1 else 0)
        out.pow(2).mean().backward()
        optimizer.step()
    return dict(net.named_parameters()), extra.weight, optimizer.state_dict(), repr(optimizer)


@parity
def test_closure(nn, optim):
    net, x = small(nn), torch.randn(5, 3)
    optimizer = optim.SGD(net.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = net(x).pow(2).sum()
        loss.backward()
        return loss

    with torch.no_grad():  # step enables grad mode for the closure
        return optimizer.step(closure), optimizer.step(closure), dict(net.named_parameters())


@parity
def test_state_dict(nn, optim):
    net = small(nn)
    optimizer = optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    again = optim.SGD(net.named_parameters(), lr=0.7)
    again.load_state_dict(optimizer.state_dict())
    revived = pickle.loads(pickle.dumps(optimizer))
    copied = copy.deepcopy(optimizer)
    return (
        optimizer.state_dict(),
        again.state_dict(),
        revived.state_dict(),
        copied.state_dict(),
        optimizer.defaults,
        [type(k).__name__ for k in optimizer.state],
        sorted(optimizer.param_groups[0]),
    )


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_training_resumed_in_the_other_library(direction):
    """Training half in one library and half in the other gives the weights of a single run."""
    x, t = torch.randn(5, 3), torch.randn(5, 2)
    libraries = [(torch.nn, torch.optim), (nnmirror, nnmirror.optim)]
    if direction == "to torch":
        libraries.reverse()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}

    def some_steps(model, optimizer, lib):
        for _ in range(3):
            optimizer.zero_grad()
            lib.MSELoss()(model(x), t).backward()
            optimizer.step()

    torch.manual_seed(0)
    whole = small(torch.nn)
    optimizer = torch.optim.SGD(whole.parameters(), **options)
    some_steps(whole, optimizer, torch.nn)
    some_steps(whole, optimizer, torch.nn)

    (first, first_optim), (second, second_optim) = libraries
    torch.manual_seed(0)
    half = small(first)
    optimizer = first_optim.SGD(half.parameters(), **options)
    some_steps(half, optimizer, first)
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    rest = small(second)
    rest.load_state_dict(saved["model"])
    optimizer = second_optim.SGD(rest.parameters(), lr=9.0)
    optimizer.load_state_dict(saved["optimizer"])
    some_steps(rest, optimizer, second)
    same(dict(whole.state_dict()), dict(rest.state_dict()), "weights")


TORCH_OPTIMISERS = [
    name
    for name in dir(torch.optim)
    if isinstance(getattr(torch.optim, name), type) and name not in ("Optimizer", "SparseAdam")
]


@pytest.mark.parametrize("name", TORCH_OPTIMISERS)
def test_torchs_own_optimisers_on_mirrored_parameters(name):
    results = []
    for lib in (torch.nn, nnmirror):
        torch.manual_seed(0)
        model = small(lib)
        if name == "Muon":  # takes matrices only
            params = [p for p in model.parameters() if p.dim() == 2]
        else:
            params = model.parameters()
        optimizer = getattr(torch.optim, name)(params, lr=0.01)
        x, t = torch.randn(5, 3), torch.randn(5, 2)

        def closure(model=model, optimizer=optimizer, lib=lib, x=x, t=t):
            optimizer.zero_grad()
            loss = lib.MSELoss()(model(x), t)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        results.append(dict(model.named_parameters()))
    same(*results, name)


@parity
def test_hooks(nn, optim):
    net, log = small(nn), []
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: log.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: log.append("post"))
    optimizer.register_state_dict_pre_hook(lambda o: log.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "note": 1})
    optimizer.register_state_dict_post_hook(lambda o, d: log.append(sorted(d)), prepend=True)
    optimizer.register_load_state_dict_pre_hook(lambda o, d: log.append(sorted(d)))
    optimizer.register_load_state_dict_post_hook(lambda o: log.append("loaded")).remove()
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return log


ERRORS = {
    "lr": lambda optim, ps: optim.SGD(ps, lr=-1),
    "lr tensor": lambda optim, ps: optim.SGD(ps, lr=torch.ones(2)),
    "momentum": lambda optim, ps: optim.SGD(ps, momentum=-0.1),
    "weight decay": lambda optim, ps: optim.SGD(ps, weight_decay=-0.1),
    "nesterov": lambda optim, ps: optim.SGD(ps, nesterov=True),
    "nesterov dampening": lambda optim, ps: optim.SGD(ps, nesterov=True, momentum=0.1, dampening=1),
    "empty": lambda optim, ps: optim.SGD([], lr=0.1),
    "one tensor": lambda optim, ps: optim.SGD(ps[0], lr=0.1),
    "a set": lambda optim, ps: optim.SGD([{"params": set(ps)}], lr=0.1),
    "not tensors": lambda optim, ps: optim.SGD([1, 2], lr=0.1),
    "non-leaf": lambda optim, ps: optim.SGD([ps[0] * 2], lr=0.1),
    "twice": lambda optim, ps: optim.SGD([ps[0], ps[0]], lr=0.1),
    "in two groups": lambda optim, ps: optim.SGD([{"params": ps}, {"params": ps[:1]}], lr=0.1),
    "names missing": lambda optim, ps: optim.SGD([("a", ps[0]), ps[1]], lr=0.1),
    "group without names": lambda optim, ps: optim.SGD([("a", ps[0])]).add_param_group(
        {"params": ps[1:]}
    ),
    "no dict": lambda optim, ps: optim.SGD(ps).add_param_group(ps),
    "no params": lambda optim, ps: optim.SGD([{"lr": 1}]),
    "fused and foreach": lambda optim, ps: optim.SGD(ps, fused=True, foreach=True),
    "other groups": lambda optim, ps: optim.SGD(ps).load_state_dict(
        {"state": {}, "param_groups": []}
    ),
    "other sizes": lambda optim, ps: optim.SGD(ps).load_state_dict(optim.SGD(ps[:1]).state_dict()),
    "unknown argument": lambda optim, ps: optim.SGD(ps, momentun=0.9),
    "lr as a string": lambda optim, ps: optim.SGD(ps, lr="0.1"),
    "step of the base": lambda optim, ps: optim.Optimizer(ps, {}).step(),
}


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_errors(nn, optim, name):
    ERRORS[name](optim, list(nn.Linear(2, 3).parameters()))


@parity
def test_a_wrapper_of_another_optimiser(nn, optim):
    """As in libraries of optimisers: an abstract base, and no call of `Optimizer.__init__`."""

    class Base(abc.ABC, optim.Optimizer):
        @abc.abstractmethod
        def init_group(self): ...

    class Slow(Base):
        def __init__(self, inner):
            self._optimizer_step_pre_hooks = collections.OrderedDict()
            self._optimizer_step_post_hooks = collections.OrderedDict()
            self._patch_step_function()
            self.inner, self.param_groups = inner, inner.param_groups
            self.start = [p.detach().clone() for p in inner.param_groups[0]["params"]]

        def init_group(self): ...

        @torch.no_grad()
        def step(self, closure=None):
            self.inner.step(closure)
            for p, start in zip(self.param_groups[0]["params"], self.start, strict=True):
                p.lerp_(start, 0.5)

    net, calls = small(nn), []
    optimizer = Slow(optim.SGD(net.parameters(), 0.1))
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    for _ in range(3):
        net(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    return dict(net.named_parameters()), calls


@parity
def test_an_optimiser_of_your_own(nn, optim):
    class Sign(optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad.sign(), alpha=-group["lr"])

    net = small(nn)
    optimizer = Sign(net.parameters(), 0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return dict(net.named_parameters()), calls, repr(optimizer)


WRONG_STATE = {
    "a gradient": lambda p, state: setattr(p, "data", torch.ones(3, 3)),
    "a buffer": lambda p, state: state[p].update(momentum_buffer=torch.ones(2)),
    "no tensor": lambda p, state: state[p].update(momentum_buffer=1),
}


@pytest.mark.parametrize("name", WRONG_STATE)
@parity
def test_a_step_that_raises_has_updated_the_parameters_before(nn, optim, name):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(6):
        sgd.zero_grad()
        net(torch.randn(4, 3)).sum().backward()
        sgd.step()
    changed = net[2].weight
    WRONG_STATE[name](changed, sgd.state)
    if name == "a gradient":
        changed.grad = None
        changed.grad = torch.ones(3, 3)
    try:
        sgd.step()
    except (RuntimeError, AttributeError) as error:
        buffers = [sgd.state[p]["momentum_buffer"] for p in net.parameters()]
        return type(error), str(error), [*net.parameters()], buffers


@parity
def test_momentum_of_a_tensor(nn, optim):
    net = nn.Linear(3, 2)
    sgd = optim.SGD(net.parameters(), lr=0.01, momentum=torch.tensor([0.9]))
    for _ in range(4):
        net(torch.ones(4, 3)).sum().backward()
        sgd.step()
    return [*net.parameters()]
