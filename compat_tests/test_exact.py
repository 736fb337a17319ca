"""Exact mode: a user who asks for PyTorch's bits gets them, and no one else pays for them."""

import threading

import pytest
import torch

import nnmirror
from nnmirror import fast
from nnmirror.exact.table import ATTACHED, table
from nnmirror.rules import activation

from . import calls, test_activations
from .parity import noted_forms, same_bits, units_apart

pytestmark = pytest.mark.by_default


@pytest.fixture
def marked(monkeypatch):
    """Silu with an exact form that can be recognised: it doubles the gradient."""

    class Silu(activation.Silu):
        @staticmethod
        def d_input(g, input):
            return activation.Silu.d_input(g, input) * 2

    monkeypatch.setattr(activation.Silu, "exact", Silu)
    return Silu


def slope(x, layer):
    x.grad = None
    layer(x).sum().backward()
    return x.grad.clone()


def test_the_mode():
    assert not nnmirror.is_exact()
    with nnmirror.exact():
        assert nnmirror.is_exact()
        nnmirror.set_exact(False)
        assert nnmirror.is_exact()
    assert not nnmirror.is_exact()

    @nnmirror.exact()
    def asked():
        return nnmirror.is_exact()

    assert asked()
    nnmirror.set_exact(True)
    assert nnmirror.is_exact()


def test_the_mode_belongs_to_the_thread():
    found = []
    with nnmirror.exact():
        thread = threading.Thread(target=lambda: found.append(nnmirror.is_exact()))
        thread.start()
        thread.join()
    assert found == [False]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_forward_decides(marked, enabled, monkeypatch):
    """Layers alone and in a Sequential, called repeatedly, so that walks are bound in between."""
    monkeypatch.setattr(fast, "enabled", enabled)
    x = nnmirror.Parameter(torch.randn(8))
    nets = [nnmirror.SiLU(), nnmirror.Sequential(nnmirror.Identity(), nnmirror.SiLU())]
    silu = torch.nn.functional.silu
    nets += [nnmirror.functional.silu, silu, lambda x: silu(x * 1)]
    for net in nets:
        plain = slope(x, net)
        for i in range(12):
            if i % 3:
                with nnmirror.exact():
                    assert torch.equal(slope(x, net), 2 * plain)
            else:
                assert torch.equal(slope(x, net), plain)
        with nnmirror.exact():
            loss = net(x).sum()
        x.grad = None
        loss.backward()
        assert torch.equal(x.grad, 2 * plain)


def test_the_node_has_the_same_name(marked):
    x = torch.randn(8)
    with nnmirror.exact():
        y = nnmirror.SiLU()(nnmirror.Parameter(x))
    assert y.grad_fn.name() == "SiluBackward0"
    assert y.grad_fn.function is marked


# Arguments of those layers in the table that need some.
MADE_WITH = {
    **{f"{kind}Norm{n}d": (6,) for kind in ("Batch", "Instance") for n in (1, 2, 3)},
    "LayerNorm": (6,), "GroupNorm": (2, 6),
    "Softmax": (1,), "LogSoftmax": (1,), "Softmin": (1,),
}  # fmt: skip
LOSSES = {
    **dict.fromkeys(["CrossEntropyLoss", "NLLLoss"], torch.tensor([0, 5, 2, 1])),
    **dict.fromkeys(["BCELoss", "BCEWithLogitsLoss", "KLDivLoss", "PoissonNLLLoss"], torch.rand(4, 6)),
    **dict.fromkeys(["L1Loss", "MSELoss", "SmoothL1Loss", "HuberLoss"], torch.rand(4, 6)),
    **dict.fromkeys(["SoftMarginLoss", "MultiLabelSoftMarginLoss"], torch.ones(4, 6)),
    "HingeEmbeddingLoss": torch.ones(4, 6),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_in_the_table_are_those_with_an_exact_form(name):
    x = nnmirror.Parameter(torch.rand(4, 6)) * 0.9
    with noted_forms() as calls:
        getattr(nnmirror, name)()(x, LOSSES[name])
    named = {a.rule for a in ATTACHED if name in a.layers}
    assert set(calls) == named


LAYERS = [
    name
    for name in nnmirror.modules.__all__
    if isinstance(found := getattr(nnmirror, name), type)
    and issubclass(found, nnmirror.Module)
    and name in calls.LAYERS
    and not name.endswith(("Loss", "Similarity", "Distance"))
]


def input_shape(name, *first):
    """A shape with as many dimensions as the layer takes."""
    by_image = name.startswith("Instance")
    return *first, *[3] * (int(name[-2]) if by_image or name.endswith(("2d", "3d")) else 0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_layers_in_the_table_are_those_with_an_exact_form(name, inplace):
    layer, (x, *others) = calls.layer(nnmirror, name)
    if inplace:
        if not hasattr(layer, "inplace"):
            pytest.skip("never in place")
        layer.inplace = True
    if x.is_floating_point():
        x = nnmirror.Parameter(x) * 1
    with noted_forms() as noted:
        layer(x, *others)
    named = {a.rule for a in ATTACHED if name in a.layers}
    assert set(noted) <= named
    assert bool(noted) == bool(named) or inplace


# The largest difference in 60 draws of this size was 16.
SECOND = {"Softmax": 32, "Softmax2d": 32, "Softmin": 32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [n for n in LAYERS if n in table()])
def test_second_derivatives_by_default(name, dtype):
    """Second derivatives are as close to PyTorch's as first ones, except those of softmax."""
    width = 6 if "Norm" in name else 100
    shape = input_shape(name, 5000 // width, width)
    x, g, h = (torch.randn(shape, dtype=dtype) for _ in range(3))

    def second(nn):
        layer = getattr(nn, name)(*MADE_WITH.get(name, ())).to(dtype)
        leaves = [nn.Parameter(3 * x), nn.Parameter(g)]
        (dx,) = torch.autograd.grad(layer(leaves[0]), leaves[0], leaves[1], create_graph=True)
        return torch.autograd.grad(dx, leaves, h)

    for expected, actual in zip(second(torch.nn), second(nnmirror), strict=True):
        assert units_apart(expected, actual) <= SECOND.get(name, table()[name])


ACTIVATIONS = [*test_activations.ACTIVATIONS, *test_activations.NEARLY]
MIXED = [n for n in ACTIVATIONS if n.startswith(("softm", "logsoft", "glu"))]  # these mix elements
SPECIAL = [float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 0.5, -0.5, 0.3, -0.3]
SPECIAL += [0.7, 1e-40, -1e-40, 1e30, -1e30, 90.0, -90.0]


def gradient(nn, name, x, g):
    make = test_activations.ACTIVATIONS.get(name) or test_activations.NEARLY[name][0]
    x = x.clone().requires_grad_()
    make(nn)(x).backward(g)
    return x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", [1, 100])
@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if "negative" not in n and n not in MIXED])
def test_special_values_by_default(name, copies, dtype):
    """At infinities and on both sides of every kink: within a few units of PyTorch's gradients."""
    values = torch.tensor(SPECIAL)
    beside = [torch.nextafter(values, torch.tensor(to)) for to in (torch.inf, -torch.inf)]
    x = torch.cat([values, *beside]).to(dtype).repeat(copies)
    for g in (torch.randn(len(x)).to(dtype), torch.ones(1, dtype=dtype).expand(len(x))):
        e, a = gradient(torch.nn, name, x, g), gradient(nnmirror, name, x, g)
        assert torch.equal(e.isnan(), a.isnan())
        assert units_apart(e, a) <= 24


@pytest.mark.parametrize("size", [64, 5000])
@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if "negative" not in n and n not in MIXED])
def test_a_nan_by_default(name, size):
    """At a NaN the gradient is NaN, 0 or passed on, as in one of PyTorch's two loops."""
    x, g = torch.full((size,), torch.nan), torch.full((size,), 2.0)
    by_registers, alone = gradient(torch.nn, name, x, g), gradient(torch.nn, name, x[:1], g[:1])
    for found in gradient(nnmirror, name, x, g):
        assert same_bits(found, by_registers[0]) or same_bits(found, alone[0])
