"""Forward mode, vmap and torch.func over mirrored layers that train nothing.

Where no tensor of the mirror requires grad, nothing is recorded, and what PyTorch computes beside
the value must be kept: a tangent, a batch dimension, a gradient of torch.func. Otherwise a Jacobian
would silently be zero.
"""

import warnings

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch.func import grad, hessian, jacfwd, jvp, vjp, vmap

import nnmirror

from .calls import CALLS, call
from .parity import parity

EVERY = pytest.mark.parametrize(("kind", "name"), CALLS)
MODES = pytest.mark.parametrize("mode", ["no_grad", "frozen"])

with warnings.catch_warnings(), fw.dual_level():  # its first use warns of torch.jit
    warnings.simplefilter("ignore")
    fw.make_dual(torch.ones(1), torch.ones(1))


def prepared(nn, kind, name):
    function, inputs = call(nn, kind, name)
    if kind == "layer":
        function.requires_grad_(False)
    return function, inputs


def floats(inputs):
    return tuple(i for i, t in enumerate(inputs) if t.is_floating_point())


@EVERY
@MODES
@parity
def test_dual_numbers(nn, optim, kind, name, mode):
    function, inputs = prepared(nn, kind, name)
    torch.manual_seed(3)
    with fw.dual_level(), torch.set_grad_enabled(mode != "no_grad"):
        given = [
            fw.make_dual(t.clone(), torch.randn_like(t)) if t.is_floating_point() else t
            for t in inputs
        ]
        out = fw.unpack_dual(function(*given))
        again = fw.unpack_dual(function(*inputs))
    return out.primal, out.tangent, again.primal, again.tangent


def transformed(transform, function, inputs):
    """The result of a transform of this function; tangents and weights are random."""
    places = floats(inputs)
    torch.manual_seed(3)

    def of_floats(*given):
        given = iter([t.clone() for t in given])  # some functions work in place
        return function(*[next(given) if t.is_floating_point() else t for t in inputs])

    given = tuple(inputs[i] for i in places)
    each = tuple(range(len(given)))
    if transform == "vmap":
        return vmap(function, randomness="different")(
            *[t.expand(2, *t.shape).clone() for t in inputs]
        )
    if transform == "jvp":
        return jvp(of_floats, given, tuple(torch.randn_like(t) for t in given))
    if transform == "vjp":
        y, back = vjp(of_floats, *given)
        return y, back(torch.randn_like(y))
    if transform == "jacfwd":
        return jacfwd(of_floats, argnums=each, randomness="same")(*given)
    if transform == "grad":
        return grad(lambda *given: of_floats(*given).sum(), argnums=each)(*given)
    return hessian(lambda *given: of_floats(*given).sum(), argnums=each)(*given)


@EVERY
@MODES
@pytest.mark.parametrize("transform", ["vmap", "jvp", "vjp", "jacfwd", "grad", "hessian"])
@parity
def test_transforms(nn, optim, kind, name, transform, mode):
    function, inputs = prepared(nn, kind, name)
    with torch.set_grad_enabled(mode != "no_grad"):
        return transformed(transform, function, inputs)


def nets(nn):
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)

        def forward(self, x):
            return self.last(nn.functional.softmin(self.norm(torch.tanh(self.first(x))), dim=1))

    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)),
        nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Softsign(), nn.Linear(5, 2)),
        ByHand(),
    )


@MODES
@pytest.mark.parametrize("number", range(3))
@parity
def test_nets(nn, optim, number, mode):
    """Called repeatedly, so that code generated for plain tensors meets tensors of other kinds."""
    net = nets(nn)[number].requires_grad_(False)
    found = []
    with torch.set_grad_enabled(mode != "no_grad"):
        for _ in range(4):
            x, v = torch.randn(4, 3), torch.randn(4, 3)
            found.append(net(x))
            with fw.dual_level():
                found.append(tuple(fw.unpack_dual(net(fw.make_dual(x, v)))))
            found.append(jvp(net, (x,), (v,)))
            found.append(torch.func.vmap(jacfwd(lambda row: net(row[None])[0]))(x))
            found.append(grad(lambda x: nn.functional.l1_loss(net(x), v[:, :2]))(x))  # noqa: B023
    return found


@parity
def test_a_tensor_that_torch_differentiates_is_still_recorded(nn, optim):
    x = torch.randn(4, 3, requires_grad=True)
    with fw.dual_level():
        loss = nn.L1Loss()(x, torch.zeros(4, 3)) + nn.functional.mse_loss(x, torch.ones(4, 3))
        loss.backward()
    return x.grad


def test_what_requires_grad_outside_of_a_transform_is_refused():
    """vmap unwraps what it returns, which would lose its graph."""
    x = torch.randn(3, requires_grad=True)
    for target in (x, nnmirror.Parameter(x.detach())):
        with pytest.raises(NotImplementedError, match="transforms of torch"):
            vmap(lambda row: nnmirror.functional.mse_loss(row, target))(torch.randn(2, 3))  # noqa: B023


class _Doubled(nnmirror.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def test_a_function_of_your_own_is_not_differentiated_by_others():
    """torch.func would not call the Function's backward, and return a wrong gradient."""
    x = torch.ones(3)
    with pytest.raises(NotImplementedError, match="_Doubled"):
        grad(lambda x: _Doubled.apply(x).sum())(x)
    with fw.dual_level():
        assert torch.equal(_Doubled.apply(x), x * 2)
        for mode in (True, False):
            with (
                torch.set_grad_enabled(mode),
                pytest.raises(NotImplementedError, match="implement the jvp function"),
            ):
                _Doubled.apply(fw.make_dual(x, x))
