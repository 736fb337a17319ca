"""Adam, AdamW, RMSprop, Adagrad: the same trained weights, state and errors as torch.optim's.

And SignSGD, which PyTorch lacks, against its formula.
"""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

import nnmirror

from .parity import both, parity, same, same_outcome

NAMES = ["Adam", "AdamW", "RMSprop", "Adagrad"]
FUSED = ["Adam", "AdamW", "Adagrad"]

# Options of each optimiser; test_grid combines them with the common ones.
ADAM = {
    "plain": {},
    "betas": {"betas": (0.5, 0.7)},
    "betas of 0": {"betas": (0.0, 0.0)},
    "eps": {"eps": 0.1},
    "decay": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
    "all": {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3, "amsgrad": True, "lr": 0.1},
}
OWN = {
    "Adam": ADAM | {"decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True}},
    "AdamW": ADAM | {"no decay": {"weight_decay": 0}},
    "RMSprop": {
        "plain": {},
        "alpha": {"alpha": 0.5, "eps": 1e-3},
        "decay": {"weight_decay": 0.1},
        "momentum": {"momentum": 0.9},
        "centered": {"centered": True, "weight_decay": 0.1},
        "all": {"alpha": 0.9, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
    },
    "Adagrad": {
        "plain": {},
        "lr decay": {"lr_decay": 0.1},
        "decay": {"weight_decay": 0.1},
        "start": {"initial_accumulator_value": 0.5, "eps": 1e-3},
        "all": {"lr_decay": 0.5, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
    },
}
COMMON = {
    "": {},
    "maximize": {"maximize": True},
    "lr 0": {"lr": 0.0},
    "lr of an int": {"lr": 1},
    "tensor lr": {"lr": torch.tensor(0.05)},
    "tensor lr of one element": {"lr": torch.tensor([0.05])},
    "double lr": {"lr": torch.tensor(0.05, dtype=torch.float64)},
}
KERNELS = {
    "default": {},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "fused": {"fused": True},
}
GRID = [
    (name, own, common, kernel)
    for name in NAMES
    for own, common, kernel in itertools.product(OWN[name], COMMON, KERNELS)
    if kernel != "fused" or name in FUSED
]


def small(nn, dtype=torch.float32):
    return nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.Tanh(), nn.Linear(4, 2, dtype=dtype))


def steps(nn, model, optimizer, number=4, dtype=torch.float32):
    x, target = torch.randn(5, 3).to(dtype), torch.randn(5, 2).to(dtype)
    losses = []
    for _ in range(number):
        optimizer.zero_grad()
        loss = nn.MSELoss()(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses


def kept(optimizer):
    """The state of each parameter."""
    return [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]]


@pytest.mark.parametrize(("name", "own", "common", "kernel"), GRID)
@parity
def test_grid(nn, optim, name, own, common, kernel):
    net = small(nn)
    options = {**OWN[name][own], **COMMON[common], **KERNELS[kernel]}
    optimizer = getattr(optim, name)(net.parameters(), **options)
    losses = steps(nn, net, optimizer)
    return losses, dict(net.named_parameters()), optimizer.state_dict(), repr(optimizer)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@parity
def test_dtypes(nn, optim, name, dtype, kernel):
    net = small(nn, dtype)
    if kernel == "fused" and name not in FUSED:
        kernel = "default"
    optimizer = getattr(optim, name)(net.parameters(), weight_decay=0.1, **KERNELS[kernel])
    losses = steps(nn, net, optimizer, dtype=dtype)
    return losses, dict(net.named_parameters()), optimizer.state_dict()


@pytest.mark.parametrize("name", NAMES)
@parity
def test_two_dtypes_in_one_group(nn, optim, name):
    results = []
    for kernel in KERNELS.values():
        if "fused" in kernel and name not in FUSED:
            continue
        params = [nn.Parameter(torch.randn(3, dtype=d)) for d in (torch.float32, torch.float64)]
        optimizer = getattr(optim, name)(params, lr=0.1, **kernel)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p.detach())
            optimizer.step()
        results.append((params, optimizer.state_dict()))
    return results


BETAS = {
    "numbers": lambda: (0.9, 0.999),
    "tensors": lambda: (torch.tensor(0.9), torch.tensor(0.999)),
    "of one element": lambda: (torch.tensor([0.9]), torch.tensor([0.999])),
    "double": lambda: (torch.tensor(0.9).double(), torch.tensor(0.999).double()),
    "mixed": lambda: (torch.tensor(0.9), 0.999),
    "two elements": lambda: (torch.tensor([0.9, 0.9]), torch.tensor(0.9)),
    "ints": lambda: (0, 0),
    "three": lambda: (0.9, 0.99, 0.999),
    "one": lambda: (0.9,),
    "a list": lambda: [0.9, 0.99],
    "too large": lambda: (0.9, 1.0),
    "negative": lambda: (-0.1, 0.9),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@parity
def test_betas(nn, optim, name, lr, betas, kernel):
    net = small(nn)
    options = {"betas": BETAS[betas](), "amsgrad": True, **KERNELS[kernel]}
    optimizer = getattr(optim, name)(net.parameters(), lr=lr, **options)
    losses = steps(nn, net, optimizer)
    return losses, dict(net.named_parameters()), optimizer.state_dict()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
@parity
def test_other_options_as_tensors(nn, optim, name, kernel):
    if kernel == "fused" and name not in FUSED:
        return None
    net = small(nn)
    options = {"eps": torch.tensor(1e-3), "weight_decay": torch.tensor(0.1), **KERNELS[kernel]}
    optimizer = getattr(optim, name)(net.parameters(), **options)
    steps(nn, net, optimizer)
    return dict(net.named_parameters()), optimizer.state_dict()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
@parity
def test_groups_late_gradients_and_frozen_parameters(nn, optim, name, kernel):
    if kernel == "fused" and name not in FUSED:
        return None
    net, extra = small(nn), nn.Linear(3, 2)
    net[0].bias.requires_grad_(False)
    optimizer = getattr(optim, name)(
        [
            {"params": net[0].parameters(), "lr": 0.5},
            {"params": net[2].parameters(), "weight_decay": 0.9},
        ],
        lr=0.1,
        **KERNELS[kernel],
    )
    optimizer.add_param_group({"params": extra.weight, "eps": 0.1, "maximize": True})
    x = torch.randn(5, 3)
    for step in range(5):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        out = net(x) + (extra(x) if step > 1 else 0)
        out.pow(2).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # a step without gradients changes nothing
    return dict(net.named_parameters()), extra.weight, optimizer.state_dict(), repr(optimizer)


SHAPES = [(), (0,), (1,), (7,), (8,), (33,), (3, 5), (16, 16), (2, 3, 4), (129, 65), (300, 300)]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
@parity
def test_shapes_layouts_and_many_steps(nn, optim, name, shape, dtype, kernel):
    if kernel == "fused" and name not in FUSED:
        return None
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(2)]
    if len(shape) > 1:
        params.append(nn.Parameter(torch.randn(shape, dtype=dtype).transpose(0, 1)))
    optimizer = getattr(optim, name)(params, lr=0.02, weight_decay=0.01, **KERNELS[kernel])
    for step in range(8):
        for p in params:
            p.grad = torch.randn(shape, dtype=dtype).reshape(p.shape) * 10.0 ** (step % 5 - 3)
        optimizer.step()
    strides = [{k: v.stride() for k, v in state.items()} for state in kept(optimizer)]
    return params, optimizer.state_dict(), strides


@pytest.mark.parametrize("shared", ["nothing", "a parameter", "a gradient"])
@pytest.mark.parametrize("name", NAMES)
@parity
def test_large_parameters_beside_small_ones(nn, optim, name, shared):
    """Parameters that share memory see each other's updates, in one call or one by one."""
    memory = torch.randn(40000)
    large = nn.Parameter(torch.randn(200, 200))
    params = [nn.Parameter(torch.randn(4, 3)), large, nn.Parameter(torch.randn(7))]
    if shared == "a parameter":
        params = [nn.Parameter(memory), *params, nn.Parameter(memory[:5])]
    optimizer = getattr(optim, name)(params, lr=0.02, weight_decay=0.3)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape)
        if shared == "a gradient":
            params[2].grad = large.detach()[0, :7]
        optimizer.step()
    return params, optimizer.state_dict()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
@parity
def test_nan_and_infinite_gradients(nn, optim, name, kernel):
    if kernel == "fused" and name not in FUSED:
        return None
    p = nn.Parameter(torch.ones(7))
    optimizer = getattr(optim, name)([p], lr=0.1, **KERNELS[kernel])
    for _ in range(3):
        p.grad = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 1e30])
        optimizer.step()
    return p, optimizer.state_dict()


@pytest.mark.parametrize("own", ["one after the other", "overlapping", "one gradient", "twice"])
@pytest.mark.parametrize("name", NAMES)
@parity
def test_parameters_that_share_memory(nn, optim, name, own):
    """Parameters that share memory are stepped in order, each seeing the updates before it."""
    whole = torch.randn(8)
    params = [nn.Parameter(whole[:6]), nn.Parameter(whole[2:])]
    if own == "one after the other":
        params = [nn.Parameter(whole[:4]), nn.Parameter(whole[4:])]
    elif own == "twice":
        params = [params[0], params[0]]
    optimizer = getattr(optim, name)(params, lr=0.1, weight_decay=0.3)
    for _ in range(3):
        if own == "one gradient":
            params[0].grad = params[1].detach()  # shares memory with the second parameter
            params[1].grad = params[0].detach()
        else:
            for p in params:
                p.grad = torch.randn(p.shape)
        optimizer.step()
    return whole, params, optimizer.state_dict()


def _hold(optim, net, optimizer, held):
    held += [v for s in optimizer.state.values() for v in s.values()]
    return optimizer


def _load(optim, net, optimizer, held):
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    held.append(saved["state"])  # later steps may update these tensors
    return optimizer


def _load_and_forget(optim, net, optimizer, held):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def _exchange(optim, net, optimizer, held):
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone()
    held.append(state)
    return optimizer


def _one_state(optim, net, optimizer, held):
    state = optimizer.state[net[0].weight]
    for name, value in state.items():
        state[name] = value * 2 if name != "step" else value + 3
    return optimizer


def _drop(optim, net, optimizer, held):
    optimizer.state.pop(net[0].weight)
    return optimizer


def _clear(optim, net, optimizer, held):
    optimizer.state.clear()
    return optimizer


def _copy(optim, net, optimizer, held):
    held.append(optimizer.state_dict()["state"])
    other = type(optimizer)(net.parameters(), lr=0.3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def _more(optim, net, optimizer, held):
    optimizer.add_param_group({"params": [net.extra], "lr": 0.5})
    return optimizer


def _within(optim, net, optimizer, held):
    optimizer.param_groups[0]["params"].append(net.extra)
    return optimizer


def _data(optim, net, optimizer, held):
    net[0].weight.data = torch.ones(4, 3)
    net[2].weight.data.mul_(2)
    return optimizer


def _half(optim, net, optimizer, held):
    net[2].requires_grad_(False)
    return optimizer


def _tensor_lr(optim, net, optimizer, held):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    return optimizer


MEANWHILE = [_hold, _load, _load_and_forget, _exchange, _one_state, _drop, _clear, _copy, _more,
             _within, _data, _half, _tensor_lr]  # fmt: skip


@pytest.mark.parametrize("change", MEANWHILE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [2, 2**15 + 1])
@pytest.mark.parametrize("name", [*NAMES, "SGD"])
@parity
def test_optimiser_changed_between_steps(nn, optim, name, size, change):
    """References to state tensors stay current, and replaced tensors are used by later steps."""
    net, held = small(nn), []
    net.extra = nn.Parameter(torch.ones(2))
    net.other = nn.Parameter(torch.ones(size))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(optim, name)(
        [*net[0].parameters(), net.other, *net[2].parameters()], lr=0.1, **options
    )
    for step in range(7):
        if step in (2, 4):
            try:
                optimizer = change(optim, net, optimizer, held)
            except (ValueError, KeyError) as e:
                held.append(str(e))
        optimizer.zero_grad()
        loss = nn.MSELoss()(net(torch.randn(5, 3)), torch.ones(5, 2)) + net.extra.sum()
        (loss + net.other.square().sum()).backward()
        optimizer.step()
        for p in net.parameters():
            held.append(p._version if change is not _data else 0)
    return held, kept(optimizer), dict(net.named_parameters())


def _named(optimizer, net):
    return [v for k, v in optimizer.state[net[0].weight].items() if k != "step"]


def _seen_through_an_array(optim, net, optimizer, held):
    held += [torch.from_numpy(v.numpy()) for v in _named(optimizer, net)]
    held += [v.data for v in _named(optimizer, net)]


def _set_data(optim, net, optimizer, held):
    for v in _named(optimizer, net):
        v.data = torch.ones(4, 3)


def _doubled_data(optim, net, optimizer, held):
    for v in _named(optimizer, net):
        v.data = v.data.double()


def _shared(optim, net, optimizer, held):
    for v in optimizer.state[net[0].weight].values():
        v.share_memory_()
        held.append(v)


def _all_tied(optim, net, optimizer, held):
    net.other.data = net.other.data.clone()
    net[0].weight.data = net.other.data[:12].view(4, 3)  # a view of the large parameter, if it is


def _large_changed(optim, net, optimizer, held):
    net.other.data = net.other.data.double()
    net.other.grad = net.other.grad.double()


def _large_from_small(optim, net, optimizer, held):
    net.other.grad = net[2].bias.data.sum().expand(net.other.shape)
    net[2].bias.grad = net.other.data[:2]


def _tied(optim, net, optimizer, held):
    net[2].weight.data = net[0].weight.data[:2, :2].t()[:2].clone()
    net[2].bias.data = net[0].bias.data[:2]  # a view of the other bias


def _doubled(optim, net, optimizer, held):
    net[0].weight.grad = None
    net[0].weight.data = net[0].weight.data.double()
    net[0].weight.grad = torch.ones(4, 3, dtype=torch.float64)


def _aliased(optim, net, optimizer, held):
    net[0].bias.grad = net[0].bias.data


def _sparse(optim, net, optimizer, held):
    if not isinstance(optimizer, (optim.Adam, optim.AdamW, optim.RMSprop)):
        for p in net[0].parameters():
            p.grad = torch.ones(p.shape).to_sparse()


def _storage(optim, net, optimizer, held):
    for v in _named(optimizer, net):
        held.append((v.storage_offset(), v.untyped_storage().nbytes()))
        v.untyped_storage().fill_(0)


BEFORE_A_STEP = [_seen_through_an_array, _set_data, _doubled_data, _shared, _all_tied,
                 _large_changed, _large_from_small, _tied, _doubled, _aliased, _sparse, _storage]  # fmt: skip


@pytest.mark.parametrize("change", BEFORE_A_STEP, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [20, 2**15 + 1])
@pytest.mark.parametrize("name", [*NAMES, "SGD"])
@parity
def test_memory_changed_between_steps(nn, optim, name, size, change):
    """The memory of parameters and state may be viewed, replaced and shared between steps."""
    net, held = small(nn), []
    net.other = nn.Parameter(torch.ones(size))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(optim, name)(net.parameters(), lr=0.1, **options)
    try:
        for step in range(6):
            for i, p in enumerate(net.parameters()):
                p.grad = torch.full(p.shape, 0.1 * (step + i), dtype=p.dtype)
            if step == 3:
                change(optim, net, optimizer, held)
            optimizer.step()
    except (RuntimeError, TypeError) as e:
        held.append(type(e).__name__)
    state = [[*s.values()] for s in optimizer.state.values()]
    shared = [v.is_shared() for s in state for v in s if isinstance(v, torch.Tensor)]
    return held, state, shared, dict(net.named_parameters())


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}])
@parity
def test_gradients_that_require_grad(nn, optim, options):
    net = small(nn)
    sgd, a = optim.SGD(net.parameters(), lr=0.1, **options), torch.ones((), requires_grad=True)
    for _ in range(3):
        for p in net.parameters():
            p.grad = a * torch.ones(p.shape)
        sgd.step()
        sgd.zero_grad()
        nn.MSELoss()(net(torch.randn(5, 3)), torch.ones(5, 2)).backward()
        sgd.step()
    return dict(net.named_parameters())


@pytest.mark.parametrize("name", [*NAMES, "SGD"])
@parity
def test_other_parameters_have_a_gradient_at_each_step(nn, optim, name):
    heads = nn.ModuleList([nn.Linear(3, 2) for _ in range(3)])
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(optim, name)(heads.parameters(), lr=0.1, **options)
    for step in range(40):
        optimizer.zero_grad()
        heads[step % 3](torch.randn(4, 3)).pow(2).sum().backward()
        optimizer.step()
    return kept(optimizer), dict(heads.named_parameters())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_complex_parameters(name, kernel):
    """Complex parameters are stepped with gradients set by hand, as backward here is real only."""

    def run(nn, optim):
        results = []
        for own in OWN[name].values():
            for maximize in (False, True):
                p = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
                q = torch.randn(4, requires_grad=True)
                make = getattr(optim, name)
                optimizer = make([q, p], **own, maximize=maximize, **KERNELS[kernel])
                for _ in range(3):
                    p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
                    optimizer.step()
                results.append((p, q, optimizer.state_dict()))
        return results

    same_outcome(*both(run))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, {"maximize": True, "lr_decay": 0.1}, {"weight_decay": 1}])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradients(name, options, kernel):
    """Adagrad accepts sparse gradients; the other optimisers and the fused kernels raise."""
    with warnings.catch_warnings():  # PyTorch warns of sparse tensors once a process
        warnings.simplefilter("ignore")
        torch.sparse_coo_tensor([[0]], [1.0])
    same_outcome(*both(sparse_gradients, name=name, options=options, kernel=kernel))


def sparse_gradients(nn, optim, name, options, kernel):
    if name != "Adagrad":
        options = {}
    p, q = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(3))
    optimizer = getattr(optim, name)([p, q], lr=0.1, **options, **KERNELS[kernel])
    for _ in range(3):
        p.grad = torch.sparse_coo_tensor([[1, 3, 1]], torch.randn(3, 2), (4, 2))
        q.grad = torch.randn(3)
        optimizer.step()
    return p.detach(), q.detach(), optimizer.state_dict()


@pytest.mark.parametrize("name", NAMES)
@parity
def test_closure(nn, optim, name):
    net, x = small(nn), torch.randn(5, 3)
    optimizer = getattr(optim, name)(net.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = net(x).pow(2).sum()
        loss.backward()
        return loss

    with torch.no_grad():  # step enables grad mode for the closure
        first = optimizer.step(closure)
    return first, optimizer.step(closure=closure), dict(net.named_parameters())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
@parity
def test_state_dict_copy_and_pickle(nn, optim, name, kernel):
    if kernel == "fused" and name not in FUSED:
        return None
    net = small(nn)
    options = KERNELS[kernel]
    optimizer = getattr(optim, name)(net.named_parameters(), lr=0.1, **options)
    steps(nn, net, optimizer, 2)
    again = getattr(optim, name)(net.named_parameters(), lr=0.7)
    again.load_state_dict(optimizer.state_dict())
    revived = pickle.loads(pickle.dumps(optimizer))
    both = copy.deepcopy((net, optimizer))
    steps(nn, *both)  # the copied optimiser steps the copied net
    return (
        optimizer.state_dict(),
        again.state_dict(),
        revived.state_dict(),
        repr(revived),
        both[1].state_dict(),
        dict(both[0].named_parameters()),
        dict(net.named_parameters()),
        optimizer.defaults,
        [type(k).__name__ for k in optimizer.state],
        [type(v).__name__ for state in kept(optimizer) for v in state.values()],
        list(optimizer.param_groups[0]),
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("direction", ["to torch", "from torch"])
@pytest.mark.parametrize("name", NAMES)
def test_training_resumed_in_the_other_library(name, direction, kernel):
    """Training half in one library and half in the other gives the weights of a single run."""
    if kernel == "fused" and name not in FUSED:
        kernel = "default"
    libraries = [(torch.nn, torch.optim), (nnmirror, nnmirror.optim)]
    if direction == "to torch":
        libraries.reverse()
    for own in OWN[name].values():
        options = {**own, **KERNELS[kernel]}
        torch.manual_seed(0)
        whole = small(torch.nn)
        optimizer = getattr(torch.optim, name)(whole.parameters(), **options)
        steps(torch.nn, whole, optimizer, 3)
        steps(torch.nn, whole, optimizer, 3)

        (first, first_optim), (second, second_optim) = libraries
        torch.manual_seed(0)
        half = small(first)
        optimizer = getattr(first_optim, name)(half.parameters(), **options)
        steps(first, half, optimizer, 3)
        file = io.BytesIO()
        torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        generator = torch.get_rng_state()
        rest = small(second)
        torch.set_rng_state(generator)
        rest.load_state_dict(saved["model"])
        optimizer = getattr(second_optim, name)(rest.parameters(), lr=9.0)
        optimizer.load_state_dict(saved["optimizer"])
        steps(second, rest, optimizer, 3)
        same(dict(whole.state_dict()), dict(rest.state_dict()), "weights")


@pytest.mark.parametrize("name", NAMES)
@parity
def test_a_state_saved_by_an_old_pytorch(nn, optim, name):
    """In an old state the step counters are numbers, and the groups lack newer options."""
    net = small(nn)
    optimizer = getattr(optim, name)(net.parameters(), lr=0.1)
    steps(nn, net, optimizer, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        state["step"] = 2
    for group in old["param_groups"]:
        for option in ("foreach", "maximize", "capturable", "differentiable", "fused", "amsgrad"):
            group.pop(option, None)
    optimizer = getattr(optim, name)(net.parameters())
    optimizer.load_state_dict(old)
    state = copy.deepcopy(optimizer.state_dict())
    steps(nn, net, optimizer, 2)
    return state, optimizer.state_dict(), dict(net.named_parameters()), repr(optimizer)


@parity
def test_a_state_of_adam_loaded_into_adamw_and_back(nn, optim):
    net, results = small(nn), []
    optimizer = optim.Adam(net.parameters(), lr=0.1, weight_decay=0.1)
    for cls in (optim.AdamW, optim.Adam, optim.AdamW):
        steps(nn, net, optimizer, 2)
        results.append((copy.deepcopy(optimizer.state_dict()), repr(optimizer)))
        state = optimizer.state_dict()
        optimizer = cls(net.parameters())
        optimizer.load_state_dict(state)
    return results, dict(net.named_parameters()), isinstance(optimizer, optim.Adam)


@pytest.mark.parametrize("change", [("amsgrad", True), ("momentum", 0.9), ("centered", True)])
@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
@parity
def test_an_option_changed_after_some_steps(nn, optim, name, change):
    """An option whose state was not kept from the first step raises PyTorch's KeyError."""
    net = small(nn)
    optimizer = getattr(optim, name)(net.parameters(), lr=0.1)
    steps(nn, net, optimizer, 2)
    optimizer.param_groups[0][change[0]] = change[1]
    before = [p.detach().clone() for p in net.parameters()]
    error = None
    try:
        steps(nn, net, optimizer, 2)
    except KeyError as e:
        error = str(e)
        assert all(map(torch.equal, before, net.parameters()))
    return error, dict(net.named_parameters())


@parity
def test_a_default_dtype_of_double(nn, optim):
    """Step counters have the default dtype, except those of the fused kernels."""
    torch.set_default_dtype(torch.float64)
    try:
        return [
            (steps(nn, net, o, 2, torch.float64), o.state_dict(), dict(net.named_parameters()))
            for name in FUSED
            for kernel in KERNELS.values()
            for net in [small(nn, torch.float64)]
            for o in [getattr(optim, name)(net.parameters(), **kernel)]
        ]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("inf", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
@parity
def test_grad_scaler(nn, optim, name, kernel, inf):
    """The fused kernels unscale gradients themselves; a step with an infinite one is skipped."""
    if kernel == "fused" and name not in FUSED:
        return None
    net, x = small(nn), torch.randn(5, 3)
    optimizer = getattr(optim, name)(net.parameters(), lr=0.1, **KERNELS[kernel])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    for step in range(4):
        optimizer.zero_grad()
        loss = net(x).pow(2).mean() * (float("inf") if inf and step == 2 else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return dict(net.named_parameters()), optimizer.state_dict(), scaler.get_scale()


@pytest.mark.parametrize("name", NAMES)
@parity
def test_a_gradient_scale_that_no_kernel_reads_is_refused(nn, optim, name):
    p = nn.Parameter(torch.ones(2))
    optimizer = getattr(optim, name)([p])
    optimizer.grad_scale = torch.tensor(2.0)
    p.grad = torch.ones(2)
    optimizer.step()
    return p


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
@parity
def test_capturable_needs_an_accelerator(nn, optim, name, lr, foreach):
    net = small(nn)
    optimizer = getattr(optim, name)(net.parameters(), lr=lr, capturable=True, foreach=foreach)
    steps(nn, net, optimizer)


@pytest.mark.parametrize("name", NAMES)
@parity
def test_hooks_and_a_class_of_your_own(nn, optim, name):
    class Counting(getattr(optim, name)):
        taken = 0

        def step(self, closure=None):
            self.taken += 1
            return super().step(closure)

    net, log = small(nn), []
    optimizer = Counting(net.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: log.append(("pre", args, kwargs)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: log.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "note": 1})
    optimizer.register_load_state_dict_post_hook(lambda o: log.append("loaded"))
    steps(nn, net, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    log = [x if isinstance(x, str) else (x[0], len(x[1]), x[2]) for x in log]
    return log, optimizer.taken, optimizer.state_dict(), repr(optimizer)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
@parity
def test_a_step_between_forward_and_backward_raises(nn, optim, name, kernel):
    """Backward raises, as the weights of the forward were changed in place."""
    if kernel == "fused" and name not in FUSED:
        return
    net = small(nn)
    optimizer = getattr(optim, name)(net.parameters(), **KERNELS[kernel])
    loss = net(torch.randn(5, 3)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    loss.backward()


@parity
def test_share_memory(nn, optim):
    optimizer = optim.Adagrad([nn.Parameter(torch.ones(2))])
    before = [state["sum"].is_shared() for state in kept(optimizer)]
    optimizer.share_memory()
    return before, [state["sum"].is_shared() for state in kept(optimizer)]


WRONG = {
    "Adam": ["lr", "eps", "weight_decay"],
    "AdamW": ["lr", "eps", "weight_decay"],
    "RMSprop": ["lr", "eps", "momentum", "weight_decay", "alpha"],
    "Adagrad": ["lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"],
}
VALUES = [-1, -0.5, float("nan"), "0.1", None, torch.ones(2), torch.tensor(-1.0), [0.1], 1j]


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, options in WRONG.items() for option in options]
)
@parity
def test_wrong_values(nn, optim, name, option):
    said = []
    for value in VALUES:
        try:
            getattr(optim, name)([nn.Parameter(torch.ones(2))], **{option: value})
        except Exception as e:
            said.append((type(e).__name__, str(e)))
        else:
            said.append(None)
    return said


ERRORS = {
    "empty": lambda make, ps: make([]),
    "one tensor": lambda make, ps: make(ps[0]),
    "non-leaf": lambda make, ps: make([ps[0] * 2]),
    "in two groups": lambda make, ps: make([{"params": ps}, {"params": ps[:1]}]),
    "fused and foreach": lambda make, ps: make(ps, fused=True, foreach=True),
    "unknown argument": lambda make, ps: make(ps, momentun=0.9),
    "too many arguments": lambda make, ps: make(ps, 0.1, *[0] * 12),
    "foreach and a tensor lr": lambda make, ps: make(ps, lr=torch.tensor(0.1), foreach=True),
    "another's state": lambda make, ps: make(ps).load_state_dict(make(ps[:1]).state_dict()),
    "fused integers": lambda make, ps: make([torch.ones(2).int()], fused=True).step(),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", NAMES)
@parity
def test_errors(nn, optim, name, error):
    ERRORS[error](getattr(optim, name), list(nn.Linear(2, 3).parameters()))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
@pytest.mark.parametrize("name", FUSED)
@parity
def test_fused_of_what_no_kernel_takes(nn, optim, name, dtype):
    p, q = torch.ones(2), torch.ones(2, dtype=dtype)
    said = []
    for order in ([p, q], [q, p]):
        optimizer = getattr(optim, name)(order, fused=True)
        for x in order:
            x.grad = torch.ones_like(x)
        try:
            optimizer.step()
        except Exception as e:
            said.append((type(e).__name__, str(e)))
    return said


@pytest.mark.parametrize("option", ["lr", "betas"])
@parity
def test_a_tensor_set_later_that_foreach_refuses(nn, optim, option):
    p = nn.Parameter(torch.ones(2))
    optimizer = optim.Adam([p], foreach=True)
    value = {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.9), torch.tensor(0.9))}[option]
    optimizer.param_groups[0][option] = value
    p.grad = torch.ones(2)
    optimizer.step()


RECORDED = {
    "SGD": ("SGD", {"lr": 0.01}),
    "SGD, momentum": ("SGD", {"lr": 0.01, "momentum": 0.9}),
    "SGD, nesterov": (
        "SGD",
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
    "SGD, lr": ("SGD", {"lr": [0.01]}),
    "SGD, decay": ("SGD", {"lr": [0.01], "weight_decay": [0.1], "momentum": 0.9}),
    "Adam": ("Adam", {"lr": 0.01}),
    "Adam, amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "Adam, amsgrad, once": ("Adam", {"lr": 0.01, "amsgrad": True, "steps": 1}),
    "Adam, lr": ("Adam", {"lr": [0.01], "weight_decay": [0.1], "maximize": True}),
    "Adam, betas": ("Adam", {"lr": 0.01, "betas": (0.9, 0.99)}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "AdamW, lr": ("AdamW", {"lr": [0.01], "weight_decay": 0.1}),
    "RMSprop": ("RMSprop", {"lr": 0.01}),
    "RMSprop, momentum": (
        "RMSprop",
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    ),
    "RMSprop, centered": ("RMSprop", {"lr": 0.01, "centered": True}),
    "RMSprop, centered, once": (
        "RMSprop",
        {"lr": torch.tensor(0.01), "centered": True, "momentum": 0.9, "steps": 1},
    ),
    "RMSprop, lr": ("RMSprop", {"lr": [0.01]}),
    "RMSprop, decay": ("RMSprop", {"weight_decay": [0.1]}),
    "Adagrad": ("Adagrad", {"lr": 0.01, "lr_decay": 0.1}),
    "Adagrad, decay": (
        "Adagrad",
        {"weight_decay": 0.1, "maximize": True, "initial_accumulator_value": 0.5, "eps": 0.01},
    ),
    "Adagrad, lr": ("Adagrad", {"lr": [0.01]}),
    "Adagrad, lr of a schedule": ("Adagrad", {"lr": torch.tensor([0.01]), "lr_decay": 0.1}),
}


@pytest.mark.parametrize("home", ["torch.optim", "the mirror's"])
@pytest.mark.parametrize("case", RECORDED)
@parity
def test_a_step_that_is_recorded(nn, optim, case, home):
    """Differentiable steps: the gradients of the initial parameter and of the options.

    After more than one step, some optimisers have changed a saved tensor in place, and raise.
    """
    name, options = RECORDED[case]
    steps = options.get("steps", 3)
    options = {option: value for option, value in options.items() if option != "steps"}
    if home == "torch.optim":
        optim = torch.optim

    def learned(value):
        return nn.Parameter(torch.tensor(value, dtype=torch.float64))

    start, scale, given = learned([0.1, 0.5, 1.0]), learned(0.3), {}
    for option, value in options.items():
        if isinstance(value, list):
            value = learned(value[0])
        elif isinstance(value, tuple):
            value = tuple(map(learned, value))
        given[option] = value
    p = start.clone()
    optimizer = getattr(optim, name)([p], differentiable=True, **given)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # p is no leaf
        for _ in range(steps):
            loss = ((x @ p) ** 2 * scale).sum()
            (p.grad,) = torch.autograd.grad(loss, p, create_graph=True)
            optimizer.step()
            seen.append(p.detach().clone())
    state = [
        {key: value.requires_grad for key, value in kept.items() if isinstance(value, torch.Tensor)}
        for kept in optimizer.state.values()
    ]
    asked = [start, scale, *[t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]]
    return seen, state, torch.autograd.grad((p**2).sum(), asked, allow_unused=True)


NOT_RECORDED = {
    "a leaf": ("SGD", {}),
    "fused SGD": ("SGD", {"fused": True}),
    "fused Adam": ("Adam", {"fused": True}),
    "fused Adagrad": ("Adagrad", {"fused": True}),
    "foreach": ("Adam", {"foreach": True}),
    "foreach RMSprop": ("RMSprop", {"foreach": True}),
    "foreach Adagrad": ("Adagrad", {"foreach": True}),
    "capturable RMSprop": ("RMSprop", {"capturable": True}),
}


@pytest.mark.parametrize("case", NOT_RECORDED)
@parity
def test_a_step_that_cannot_be_recorded(nn, optim, case):
    name, options = NOT_RECORDED[case]
    layer = nn.Linear(1, 1)
    optimizer = getattr(optim, name)(layer.parameters(), differentiable=True, **options)
    layer(torch.ones(1)).sum().backward()
    optimizer.step()


def test_differentiable_with_foreach_is_refused():
    with pytest.raises(NotImplementedError, match="leave foreach out"):
        nnmirror.optim.SGD([torch.ones(1)], differentiable=True, foreach=True)


# -- SignSGD ---------------------------------------------------------------------------------


def sign_steps(params, grads, lr=1e-3, momentum=0.0, weight_decay=0.0, maximize=False):
    """SignSGD by its formula: parameters and buffers after one step for each list of gradients."""
    params, buffers = list(params), [torch.zeros_like(p) for p in params]
    for step in grads:
        for i, grad in enumerate(step):
            g = -grad if maximize else grad
            if momentum:
                g = buffers[i] = buffers[i] * momentum + g * (1 - momentum)
            p = params[i] * (1 - lr * weight_decay) if weight_decay else params[i]
            params[i] = p - torch.sign(g) * lr
    return params, buffers


SIGN = {
    "plain": {},
    "lr": {"lr": 0.5},
    "momentum": {"momentum": 0.75},
    "decay": {"weight_decay": 0.5, "lr": 0.25},
    "maximize": {"maximize": True},
    "all": {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.5, "maximize": True},
}


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("options", SIGN.values(), ids=SIGN)
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_sign_is_the_formula(options, foreach, lr):
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5), torch.randn(())]
    if lr == "tensor":  # with a tensor lr, parameters are stepped one by one
        options = {**options, "lr": torch.tensor(options.get("lr", 1e-3))}
    grads = [[torch.randn_like(p) * p.abs().gt(0.3) for p in start] for _ in range(6)]
    expected, buffers = sign_steps(start, grads, **options)
    params = [nnmirror.Parameter(p.clone()) for p in start]
    optimizer = nnmirror.optim.SignSGD(params, foreach=foreach, **options)
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad
        optimizer.step()
    same(expected, [p.detach() for p in params], "parameters")
    if options.get("momentum"):
        same(buffers, [state["momentum_buffer"] for state in kept(optimizer)], "buffers")
    else:
        assert optimizer.state_dict()["state"] == {}


def test_sign_steps_by_lr_whatever_the_gradient():
    p = nnmirror.Parameter(torch.zeros(4))
    optimizer = nnmirror.optim.SignSGD([p], lr=torch.tensor(0.25))
    p.grad = torch.tensor([1e-30, -1e30, 0.0, float("inf")])
    optimizer.step()
    assert p.tolist() == [-0.25, 0.25, 0.0, -0.25]


def test_sign_trains_a_net_and_goes_on_after_saving():
    def run(stop):
        torch.manual_seed(0)
        net = small(nnmirror)
        x, target = torch.randn(5, 3), torch.randn(5, 2)
        make = lambda: nnmirror.optim.SignSGD(net.named_parameters(), lr=0.02, momentum=0.5)  # noqa: E731
        optimizer, losses = make(), []
        for step in range(60):
            if step == stop:
                state = pickle.loads(pickle.dumps(optimizer.state_dict()))
                optimizer = make()
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            loss = nnmirror.MSELoss()(net(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, dict(net.named_parameters())

    losses, weights = run(None)
    assert losses[-1] < losses[0] / 4
    same((losses, weights), run(30), "after saving")


def test_sign_groups_are_as_torchs():
    """SignSGD's groups and state are laid out as SGD's, so tools that read one read the other."""
    net = small(nnmirror)
    groups = [{"params": net[0].parameters(), "lr": 0.5}, {"params": net[2].parameters()}]
    optimizer = nnmirror.optim.SignSGD(groups, momentum=0.5)
    torch_groups = torch.optim.SGD(
        [{"params": [torch.zeros(1), torch.zeros(2)], "lr": 0.5}, {"params": [torch.zeros(3)]}],
        momentum=0.5,
    ).param_groups
    assert set(optimizer.param_groups[0]) <= set(torch_groups[0])
    steps(nnmirror, net, optimizer, 1)
    saved = optimizer.state_dict()
    assert [g["params"] for g in saved["param_groups"]] == [[0, 1], [2, 3]]
    assert [g["lr"] for g in saved["param_groups"]] == [0.5, 1e-3]
    assert {k: list(v) for k, v in saved["state"].items()} == {
        i: ["momentum_buffer"] for i in range(4)
    }
    assert repr(optimizer).startswith(
        "SignSGD (\nParameter Group 0\n    foreach: None\n    lr: 0.5\n"
    )


SIGN_ERRORS = {
    "lr": ({"lr": -1}, ValueError, "Invalid learning rate: -1"),
    "lr tensor": ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    "momentum": ({"momentum": -0.1}, ValueError, "Invalid momentum value: -0.1"),
    "momentum 1": ({"momentum": 1}, ValueError, "Invalid momentum value: 1"),
    "decay": ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
    "unknown": ({"nesterov": True}, TypeError, "unexpected keyword argument 'nesterov'"),
}


@pytest.mark.parametrize(("options", "error", "message"), SIGN_ERRORS.values(), ids=SIGN_ERRORS)
def test_sign_errors(options, error, message):
    with pytest.raises(error, match=message):
        nnmirror.optim.SignSGD([nnmirror.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sign_refuses(kind):
    p = torch.ones(3, dtype=torch.complex64 if kind == "complex" else torch.float32)
    p.grad = torch.ones_like(p)
    if kind == "sparse":
        p.grad = p.grad.to_sparse()
    with pytest.raises(RuntimeError, match=f"SignSGD does not support {kind}"):
        nnmirror.optim.SignSGD([p], momentum=0.5).step()
    assert torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("name", NAMES)
@parity
def test_state_read_through_a_wrapper(nn, optim, name):
    """A wrapper with the optimiser's attributes, as Lightning makes one, has its state."""
    net, held = small(nn), []
    optimizer = getattr(optim, name)(net.parameters(), lr=0.1)
    wrapper = type("Wrapper", (type(optimizer),), {"__init__": lambda self: None})()
    for step in range(6):
        for i, p in enumerate(net.parameters()):
            p.grad = torch.full(p.shape, 0.1 * (step + i))
        if step == 3:
            wrapper.__dict__.update(optimizer.__dict__)
            for value in _named(wrapper, net):
                value.data = torch.ones(4, 3)
        optimizer.step()
    held += [[*s.values()] for s in wrapper.state.values()]
    return held, dict(net.named_parameters())


@pytest.mark.parametrize("name", NAMES)
@parity
def test_a_wrapper_with_a_state_of_its_own(nn, optim, name):
    """It has copied the optimiser's attributes; then each of the two steps with its own state."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    optimizer = getattr(optim, name)(params, lr=0.1)
    wrapper = type("Wrapper", (type(optimizer),), {"__init__": lambda self: None})()
    steppers = [optimizer] * 3 + [wrapper] * 3 + [optimizer] * 3
    for step, stepper in enumerate(steppers):
        for i, p in enumerate(params):
            p.grad = torch.full(p.shape, 0.1 * (step + i))
        if step == 3:
            wrapper.__dict__.update(optimizer.__dict__)
            wrapper.state = getattr(optim, name)(params).state
        stepper.step()
    return params, [[*state.values()] for state in optimizer.state.values()]


@pytest.mark.parametrize("name", NAMES)
@parity
def test_setstate_that_only_updates_the_attributes(nn, optim, name):
    """As optimisers define it that were written for the first PyTorch."""

    def set_attributes(self, state):
        self.__dict__.update(state)

    own = type("Own", (getattr(optim, name),), {"__setstate__": set_attributes})
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    optimizer = own(params, lr=0.1)
    for step in range(6):
        for i, p in enumerate(params):
            p.grad = torch.full(p.shape, 0.1 * (step + i))
        if step == 1:
            saved = copy.deepcopy(optimizer.state_dict())
        if step == 3:
            optimizer.load_state_dict(saved)
        optimizer.step()
    return params, [[*state.values()] for state in optimizer.state.values()]


@parity
def test_state_of_an_optimiser_without_it(nn, optim):
    return type("Wrapper", (optim.Optimizer,), {"__init__": lambda self: None})().state


@pytest.mark.parametrize("name", NAMES)
@parity
def test_steps_that_became_numbers(nn, optim, name):
    p = nn.Parameter(torch.ones(3))
    optimizer = getattr(optim, name)([p])
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.state[p]["step"] = 5


@pytest.mark.parametrize("name", NAMES)
@parity
def test_a_large_parameter_that_gets_another_shape(nn, optim, name):
    """Its update fails; the parameters after it are unchanged."""
    params = [nn.Parameter(torch.ones(n)) for n in (3, 40000, 7, 2)]
    optimizer = getattr(optim, name)(params, lr=0.1)
    errors = []
    for step in range(5):
        if step == 3:
            params[1].data = torch.ones(5)
        for p in params:
            p.grad = torch.full(p.shape, 0.5 + step)
        try:
            optimizer.step()
        except RuntimeError as error:
            errors.append(str(error))
    return params, errors
