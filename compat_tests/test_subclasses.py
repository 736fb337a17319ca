"""Tensor subclasses through mirrored layers: the result is of the subclass, as in PyTorch.

A user would silently lose names, units or a log that such a tensor carries.
"""

import io

import pytest
import torch

import nnmirror

from .calls import CALLS, call
from .parity import parity


class Plain(torch.Tensor):
    """A subclass without its own `__torch_function__`."""


class Logging(torch.Tensor):
    """A subclass whose `__torch_function__` logs the functions' names."""

    asked: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked.append(func.__name__.strip("_"))  # relu_ with inplace=True is logged as relu
        return super().__torch_function__(func, types, args, kwargs or {})


class Unwrapping(torch.Tensor):
    """A subclass that calls the function with dispatch disabled and wraps the result."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        own = isinstance(out, torch.Tensor) and func is not torch.Tensor.grad.__get__
        return out.as_subclass(Unwrapping) if own else out


KINDS = pytest.mark.parametrize("cls", [Plain, Logging, Unwrapping])


def shown(value, cls):
    """Whether the value is of the subclass, and the value as a plain tensor."""
    assert isinstance(value, torch.Tensor)
    return isinstance(value, cls), value.detach().as_subclass(torch.Tensor)


@KINDS
@pytest.mark.parametrize("mode", ["no_grad", "frozen", "training"])
@pytest.mark.parametrize(("kind", "name"), CALLS)
@parity
def test_result_is_of_the_subclass(nn, optim, kind, name, mode, cls):
    function, inputs = call(nn, kind, name)
    if mode == "frozen" and kind == "layer":
        function.requires_grad_(False)
    given = [inputs[0].as_subclass(cls), *inputs[1:]]
    Logging.asked.clear()
    with torch.set_grad_enabled(mode != "no_grad"):
        y = function(*given)
    asked = list(Logging.asked)
    found = [type(y) is cls or mode == "training", *shown(y, cls), asked, y.requires_grad]
    if mode == "training" and y.requires_grad:
        more = torch.tanh(y * 2)
        found.extend(shown(more, cls))
        more.sum().backward()
        found.extend(p.grad for p in function.parameters())
    return found


def net(nn):
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)
            self.scale = nn.Parameter(torch.rand(2))

        def forward(self, x):
            h = nn.functional.relu(self.norm(torch.tanh(self.first(x))), inplace=True)
            return nn.functional.softmin(self.last(h) * self.scale, dim=1)

    return ByHand()


NETS = {
    "sequential": lambda nn: nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2)
    ),
    "by hand": net,
}


@KINDS
@pytest.mark.parametrize("name", NETS)
@parity
def test_training(nn, optim, name, cls):
    torch.manual_seed(0)
    model = NETS[name](nn)
    sgd = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, grads = [], []
    for _ in range(3):
        x, t = torch.randn(4, 3).as_subclass(cls), torch.randn(4, 2)
        y = model(x)
        y.register_hook(lambda g: grads.append(g.detach().as_subclass(torch.Tensor).clone()))
        y.retain_grad()
        loss = nn.MSELoss()(y, t) + nn.functional.l1_loss(y, t)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(shown(loss, cls))
        grads.append(y.grad.as_subclass(torch.Tensor))
    return losses, grads, list(model.parameters())


@pytest.mark.parametrize("cls", [Plain, Logging])
@parity
def test_operations_beside_a_parameter(nn, optim, cls):
    p = nn.Parameter(torch.randn(4, 3))
    x = torch.randn(4, 3).as_subclass(cls)
    found = []
    for make in (
        lambda: x * p,
        lambda: p * x,
        lambda: torch.cat([x, p]).chunk(2)[1],
        lambda: x.clone().mul_(p),
        lambda: torch.where(x > 0, x, p).exp(),
        lambda: (p @ x.t()).mean(dim=0),
        lambda: torch.max(x * p, dim=1).values,
    ):
        y = make()
        found.append(y.detach().as_subclass(torch.Tensor))
        y.sum().backward()
    return found, p.grad


BESIDE_A_LEAF_OF_TORCHS = {
    "addmm": lambda p, x, b: torch.addmm(b, p, x),
    "linear": lambda p, x, b: torch.nn.functional.linear(p, x, b),
    "addcmul": lambda p, x, b: torch.addcmul(b, p, x),
    "lerp": lambda p, x, b: torch.lerp(b, p, x),
    "cat": lambda p, x, b: torch.cat([b[None], p, x]),
    "stack": lambda p, x, b: torch.stack([b, p[0], x[0]]),
    "in place": lambda p, x, b: (p * 1).addcmul_(b, x),
}


@pytest.mark.parametrize("name", BESIDE_A_LEAF_OF_TORCHS)
@pytest.mark.parametrize("cls", [Plain, Logging])
@parity
def test_operations_beside_a_leaf_of_torchs(nn, optim, cls, name):
    p, b = nn.Parameter(torch.randn(3, 3)), torch.randn(3, requires_grad=True)
    x = torch.randn(3, 3).as_subclass(cls)
    for leaf in (b, b * 2):
        BESIDE_A_LEAF_OF_TORCHS[name](p, x, leaf).sum().backward()
    return p.grad.as_subclass(torch.Tensor), b.grad.as_subclass(torch.Tensor)


@KINDS
@parity
def test_a_leaf_of_the_subclass_that_torch_differentiates(nn, optim, cls):
    x = torch.randn(4, 3).as_subclass(cls).requires_grad_()
    loss = nn.L1Loss()(x, torch.zeros(4, 3)) + nn.functional.mse_loss(x, torch.ones(4, 3))
    loss = loss + nn.Linear(3, 2)(x).sum()
    loss.backward()
    return shown(loss, cls), x.grad.as_subclass(torch.Tensor)


@parity
def test_a_table_of_functions(nn, optim):
    """`__torch_function__` is given torch's own functions, so a table keyed by them works."""
    table = {torch.tanh: lambda x: "tanh", torch._C._nn.linear: lambda x, *_: "linear"}

    class Handled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in table:
                return table[func](*args, **(kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(4, 3).as_subclass(Handled)
    return nn.Tanh()(x), nn.Linear(3, 2)(x), isinstance(nn.Sigmoid()(x), Handled)


@parity
def test_a_subclass_that_unwraps_its_arguments(nn, optim):
    """A subclass that holds a tensor and calls the function on that one."""

    class Holding(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            args = [a.held if isinstance(a, Holding) else a for a in args]
            return func(*args, **(kwargs or {}))

    x = torch.zeros(4, 3).as_subclass(Holding)
    x.held = torch.randn(4, 3)
    layer = nn.Linear(3, 3)
    y = nn.functional.l1_loss(nn.functional.silu(layer(x)), torch.ones(4, 3))
    y = y + layer(nn.functional.softmax(nn.LayerNorm(3)(x), dim=1)).sum()
    y = y + nn.functional.kl_div(x, torch.rand(4, 3), reduction="sum") + nn.MSELoss()(x, x.held)
    y.backward()
    return y, layer.weight.grad


@parity
def test_a_subclass_that_returns_not_implemented(nn, optim):
    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return NotImplemented

    return nn.functional.l1_loss(torch.zeros(3).as_subclass(Refusing), torch.zeros(3))


@KINDS
@parity
def test_with_dispatch_disabled(nn, optim, cls):
    x = torch.randn(4, 3).as_subclass(cls)
    with torch._C.DisableTorchFunctionSubclass():
        y = nn.functional.softsign(nn.functional.relu(x))
        z = nn.functional.l1_loss(x, torch.zeros(4, 3))
    return type(y), y, type(z), z


def test_driven_by_hand():
    """layer.backward(g) gives the same gradients for an input of any subclass."""
    grads = []
    for cls in (torch.Tensor, Plain, Logging):
        torch.manual_seed(0)
        layer = nnmirror.Linear(3, 2)
        layer.forward(torch.ones(4, 3).as_subclass(cls))
        dx = layer.backward(torch.ones(4, 2))
        grads.append((dx.as_subclass(torch.Tensor), layer.weight.grad))
    for dx, dw in grads[1:]:
        assert torch.equal(dx, grads[0][0])
        assert torch.equal(dw, grads[0][1])


@KINDS
@parity
def test_inside_a_mode(nn, optim, cls):
    """Inside a TorchFunctionMode, such as `with torch.device(...)`, results are the same."""
    with torch.device("cpu"):
        x = torch.randn(4, 3).as_subclass(cls)
        y = nn.functional.l1_loss(nn.Linear(3, 3)(x), x)
    y.backward()
    return shown(y, cls), y.requires_grad


@KINDS
@parity
def test_saved_and_loaded(nn, optim, cls):
    y = nn.Linear(3, 3)(torch.randn(4, 3).as_subclass(cls))
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    return type(loaded) is cls, loaded.as_subclass(torch.Tensor)


class Foreign:
    """No tensor, but it answers torch's functions itself."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func.__name__.strip("_")


BESIDE = {
    "at the left": lambda x, other: other + x,
    "at the right": lambda x, other: x * other,
    "subtracted from": lambda x, other: other - x,
    "divided": lambda x, other: other / x,
    "multiplied as a matrix": lambda x, other: other @ x,
    "a power": lambda x, other: other**x,
    "by name": lambda x, other: torch.add(x, other),
}


@pytest.mark.parametrize("how", BESIDE)
@parity
def test_what_answers_itself_beside_a_tracked_tensor(nn, optim, how):
    x = nn.Parameter(torch.randn(3, 3))
    return BESIDE[how](x, Foreign()), BESIDE[how](x * 1, Foreign())
