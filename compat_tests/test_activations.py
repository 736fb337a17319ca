"""Activations: the same bits as PyTorch's, or gradients within the stated distance of them."""

import inspect
import math

import pytest
import torch

import nnmirror

from .parity import exact_only, parity, trained
from .test_layers import DTYPES, SHAPES, SPECIAL, after_identity, driven

# PyTorch's kernels compute exp, erf or tanh in a way that no tensor operation does. Each line has
# the share of gradients that may differ, and by how many times eps g, measured for a million.
NEARLY = {
    "softplus": (lambda nn: nn.Softplus(), 0.02, 2),
    "softplus 2 3": (lambda nn: nn.Softplus(2, 3), 0.02, 2),
    "gelu": (lambda nn: nn.GELU(), 0.8, 8),
    "gelu tanh": (lambda nn: nn.GELU("tanh"), 0.3, 24),
    "mish": (lambda nn: nn.Mish(), 0.03, 16),
    "mish inplace": (lambda nn: after_identity(nn, nn.Mish(inplace=True)), 0.03, 16),
}
# Tested with PReLU's weight, with images, or with the layers of test_layers.py.
ELSEWHERE = {"LeakyReLU", "PReLU", "ReLU", "Softmax2d", "Tanh"}


def every_activation():
    """Each that needs no arguments and has PyTorch's bits, as it is and in place."""
    for kind in nnmirror.modules.activation.__all__:
        name, takes = kind.lower(), inspect.signature(getattr(torch.nn, kind)).parameters
        needs = [
            p for p in takes.values() if p.default is p.empty and not p.kind.name.startswith("VAR")
        ]
        if needs or name in NEARLY or kind in ELSEWHERE:
            continue
        yield name, lambda nn, kind=kind: getattr(nn, kind)()
        if "inplace" in takes:
            yield f"{name} inplace", lambda nn, kind=kind: after_identity(nn, getattr(nn, kind)(inplace=True))  # fmt: skip


ACTIVATIONS = {
    **dict(every_activation()),
    "softmax": lambda nn: nn.Softmax(dim=-1),
    "softmax 0": lambda nn: nn.Softmax(dim=0),
    "softmax None": lambda nn: nn.Softmax(),
    "logsoftmax": lambda nn: nn.LogSoftmax(dim=-1),
    "logsoftmax None": lambda nn: nn.LogSoftmax(),
    "softmin": lambda nn: nn.Softmin(dim=-1),
    "softmin None": lambda nn: nn.Softmin(),
    "elu 0.3": lambda nn: nn.ELU(0.3),
    "elu -0.7": lambda nn: nn.ELU(-0.7),
    "elu inplace": lambda nn: after_identity(nn, nn.ELU(0.3, inplace=True)),
    "elu inplace negative": lambda nn: after_identity(nn, nn.ELU(-0.3, inplace=True)),
    "hardtanh -0.3 0.7": lambda nn: nn.Hardtanh(-0.3, 0.7),
    "celu 0.3": lambda nn: nn.CELU(0.3),
    "celu inplace": lambda nn: after_identity(nn, nn.CELU(0.7, inplace=True)),
    "softshrink 0.3": lambda nn: nn.Softshrink(0.3),
    "threshold": lambda nn: nn.Threshold(0.1, 20),
    "threshold inplace": lambda nn: after_identity(nn, nn.Threshold(-0.3, -2.0, inplace=True)),
}
# Lengths that fill one or two vector registers, leave a remainder, or use several threads.
LONG = [(31,), (32,), (33,), (65,), (7, 9), (70001,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), *SHAPES, *LONG])
@pytest.mark.parametrize("name", ACTIVATIONS)
@parity
def test_activation(nn, optim, name, shape, dtype):
    return driven(ACTIVATIONS[name](nn), (3 * torch.randn(shape)).to(dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
@parity
@exact_only("a NaN goes one way or the other; test_exact.py has it by default")
def test_activation_special_values(nn, optim, name):
    x = torch.tensor(SPECIAL + [6.0, 5.999999, -0.3, 0.7, 90.0, -90.0, 1e30])
    return driven(ACTIVATIONS[name](nn), x), driven(ACTIVATIONS[name](nn), x.repeat(9))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@parity
@exact_only("a NaN goes one way or the other; test_exact.py has it by default")
def test_activation_of_nan(nn, optim, name, dtype):
    """Whether the gradient passes a NaN: PyTorch's vectorised and scalar loops differ in this."""
    x = torch.full((107,), float("nan"), dtype=dtype)
    tall = torch.full((60, 2), float("nan"), dtype=dtype)[:, 0]
    return [driven(ACTIVATIONS[name](nn), t) for t in (x, x[:3], x[0], tall)]


@pytest.mark.parametrize("name", ACTIVATIONS)
@parity
def test_activation_non_contiguous(nn, optim, name):
    """PyTorch's kernels use other loops for non-contiguous memory, which round differently."""
    results = []
    for x in (
        torch.randn(60, 40).t()[::2],
        torch.randn(60, 40).t(),
        torch.randn(60, 80)[:, :70],
        torch.randn(6, 1, 40).expand(6, 3, 40),
        torch.randn(6, 40, 3).permute(2, 0, 1),
    ):
        module = ACTIVATIONS[name](nn)
        results.append(driven(module, x))
        x = x.detach().requires_grad_()
        module(x).sum().backward()
        results.append(x.grad)
        y = ACTIVATIONS[name](nn)(x)
        y.backward(torch.randn(y.shape[::-1]).permute(*reversed(range(y.dim()))))
        results.append(x.grad)
    return results


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("name", [*ACTIVATIONS, "relu", "leaky", "tanh"])
@parity
def test_activation_with_a_column_major_gradient(nn, optim, name):
    """The gradient is passed on in this layout, which decides the order of later sums."""
    more = {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "tanh": nn.Tanh}
    net = nn.Sequential(nn.Linear(5, 8), more[name]() if name in more else ACTIVATIONS[name](nn))
    for _ in range(3):
        (net(torch.randn(32, 5)).t() - torch.randn(8, 32)).pow(2).mean().backward()
    return net[0].weight.grad, net[0].bias.grad


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("name", [*ACTIVATIONS, *NEARLY, "relu", "leaky", "tanh"])
@parity
def test_layout_of_a_gradient(nn, optim, name):
    """The gradient has the strides of x or of the incoming gradient, as in PyTorch."""
    more = {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "tanh": nn.Tanh}
    make = more[name] if name in more else lambda: (ACTIVATIONS.get(name) or NEARLY[name][0])(nn)
    seen = []
    width = 10 if name == "glu" else 5  # which halves it
    for x in (torch.randn(6, width), torch.randn(width, 6).t()):
        for g in (torch.randn(6, 5), torch.randn(5, 6).t()):
            z = nn.Parameter(x) * 1
            z.register_hook(lambda g: seen.append(g.stride()))
            make()(z).backward(g)
    return seen


@pytest.mark.parametrize("alpha", [-1.0, -0.3, -2.5])
def test_celu_with_negative_alpha(alpha):
    """Close, not the same bits: PyTorch's kernel has its own exp for positive numbers."""
    found = []
    for nn in (torch.nn, nnmirror):
        x = nn.Parameter(torch.linspace(-3, 3, 75))
        nn.CELU(alpha)(x).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
@parity
def test_activation_trains(nn, optim, name):
    if name == "elu inplace negative":
        return None
    net = nn.Sequential(nn.Linear(3, 25), ACTIVATIONS[name](nn), nn.Linear(25, 2))
    return trained(nn, optim, net, torch.randn(5, 3), torch.randn(5, 2)), repr(net)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), *SHAPES, *LONG])
@pytest.mark.parametrize("name", NEARLY)
def test_activation_nearly(name, shape, dtype):
    """Close, not the same bits: see NEARLY. In 16 bits most differences are rounded away."""
    make, share, units = NEARLY[name]
    torch.manual_seed(0)
    x, g = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    outputs, grads = [], []
    for nn in (torch.nn, nnmirror):
        leaf = x.clone().requires_grad_()
        y = make(nn)(leaf)
        y.backward(g)
        outputs.append(y.detach().as_subclass(torch.Tensor))
        grads.append(leaf.grad)
    assert torch.equal(*outputs)
    off = (grads[0] - grads[1]).abs().double()
    worst = (off / (g.abs().double() + 1e-6)).max() if off.numel() else torch.tensor(0.0)
    assert worst.item() <= units * torch.finfo(dtype).eps
    if x.numel() >= 1000:
        assert (off > 0).double().mean().item() <= share


# The first raises; of the others the kernel rounds 1 / alpha to a float32.
NOT_EXACT = {"elu inplace negative", "celu 0.3", "celu inplace"}


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("name", [n for n in (*ACTIVATIONS, *NEARLY) if n not in NOT_EXACT])
def test_activation_gradient_by_finite_differences(name):
    """Central differences in float64: a check that does not depend on PyTorch."""
    make = (ACTIVATIONS.get(name) or NEARLY[name][0])(nnmirror)
    x = torch.linspace(-4, 4, 80, dtype=torch.float64) + 0.003
    leaf = nnmirror.Parameter(x)
    y = make(leaf)
    g = torch.rand(y.shape, dtype=torch.float64)
    y.backward(g)
    h = 1e-6
    with torch.no_grad():
        steps = torch.eye(80, dtype=torch.float64) * h
        changes = torch.stack([make(x + step) - make(x - step) for step in steps])
    assert (leaf.grad - changes @ g / (2 * h)).abs().max() < 1e-8


@parity
def test_functional_activations(nn, optim):
    F = nn.functional
    x = torch.randn(4, 30, requires_grad=True)
    y = F.elu(F.silu(F.hardtanh(F.relu6(x * 4) - 2, -1, 1.5)), 0.5) + F.sigmoid(x)
    z = F.elu_(F.hardtanh_(y * 1.0, -0.5, 0.5), 0.2)
    (F.silu(z * 1, inplace=True) + F.softmax(y, 1) + F.log_softmax(y, 0)).sum().backward()
    y = F.selu(F.celu(x, 0.5)) + F.logsigmoid(x) + F.softsign(x) + F.tanhshrink(x) + F.softmin(x, 0)
    y = y + F.hardsigmoid(x) * F.hardswish(x) + F.hardshrink(x) + F.softshrink(x, 0.2)
    y = F.threshold_(F.celu_(F.selu_(y * 1) * 1, 0.3) * 1, 0.1, 0.2) + F.threshold(
        y * 1, 0.1, 2.0, True
    )
    y = F.hardswish(F.hardsigmoid(y * 1, inplace=True) * 1, inplace=True)
    (F.selu(y * 1, inplace=True) + F.celu(y * 1, 2.0, inplace=True)).sum().backward()
    return y, z, x


@parity
def test_torch_functions_on_tracked_tensors(nn, optim):
    """torch.nn.functional works on a mirrored net's output as in a script written for PyTorch."""
    F = torch.nn.functional
    x = nn.Linear(3, 30)(torch.randn(4, 3))
    y = F.selu(F.celu(x, 0.5)) + F.logsigmoid(x) + F.softsign(x) + F.tanhshrink(x) + F.softmin(x, 0)
    y = y + F.hardsigmoid(x) * F.hardswish(x) + F.hardshrink(x) + F.softshrink(x, 0.2)
    y = F.threshold_(F.celu_(F.selu_(y * 1) * 1, 0.3) * 1, 0.1, 0.2) + F.threshold(
        y * 1, 0.1, 2.0, True
    )
    y = F.rms_norm(y, (30,)) + F.normalize(y) + F.pad(y, (1, -1)) + F.cosine_similarity(x, y, 0)
    y.sum().backward()
    return y, x


@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("name", [n for n in (*ACTIVATIONS, *NEARLY) if "inplace" not in n])
def test_explicit_style(name):
    """`layer.backward(g)` by hand gives the same gradient as the recorded call."""
    layer = (ACTIVATIONS.get(name) or NEARLY[name][0])(nnmirror)
    x = torch.randn(4, 6)
    g = torch.randn(layer.forward(x).shape)
    dx = layer.backward(g)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(g)
    assert torch.equal(dx, leaf.grad)


ERRORS = {
    "hardtanh bounds": lambda nn: nn.Hardtanh(1.0, -1.0),
    "hardtanh equal bounds": lambda nn: nn.Hardtanh(1.0, 1.0),
    "hardtanh functional bounds": lambda nn: nn.functional.hardtanh(torch.ones(2), 1.0, -1.0),
    "hardtanh old names": lambda nn: repr(nn.Hardtanh(min_value=-2.0, max_value=3.0)),
    "gelu approximate": lambda nn: nn.GELU("exact")(torch.ones(2, requires_grad=True)),
    "gelu positional": lambda nn: nn.functional.gelu(torch.ones(2), "tanh"),
    "softmax dim": lambda nn: nn.Softmax(3)(torch.ones(2, 2, requires_grad=True)),
    "softmax of integers": lambda nn: nn.Softmax(0)(torch.arange(3)),
    "elu of integers": lambda nn: nn.ELU()(torch.arange(3)),
    "silu of integers": lambda nn: nn.SiLU()(torch.arange(3)),
    "mish of integers": lambda nn: nn.Mish()(torch.arange(3)),
    "mish of a list": lambda nn: nn.Mish()([1.0]),
    "changed since, mish": lambda nn: changed(nn, nn.Mish()),
    "gelu of integers": lambda nn: nn.GELU()(torch.arange(3)),
    "hardtanh of integers": lambda nn: nn.Hardtanh()(torch.arange(3) - 1),
    "relu6 of bool": lambda nn: nn.ReLU6()(torch.tensor([True])),
    "sigmoid of integers": lambda nn: nn.Sigmoid()(torch.arange(3)),
    "softplus of integers": lambda nn: nn.Softplus()(torch.arange(3)),
    "elu of a list": lambda nn: nn.ELU()([1.0]),
    "celu of integers": lambda nn: nn.CELU()(torch.arange(3)),
    "celu 0": lambda nn: nn.CELU(0.0)(torch.ones(2, requires_grad=True)),
    "selu of integers": lambda nn: nn.SELU()(torch.arange(3)),
    "hardswish of integers": lambda nn: nn.Hardswish()(torch.arange(3)),
    "hardsigmoid of integers": lambda nn: nn.Hardsigmoid()(torch.arange(3)),
    "softshrink below 0": lambda nn: nn.Softshrink(-1.0)(torch.ones(2, requires_grad=True)),
    "hardshrink of integers": lambda nn: nn.Hardshrink()(torch.arange(3)),
    "threshold of integers": lambda nn: nn.Threshold(1, 7)(torch.arange(3)),
    "softsign of integers": lambda nn: nn.Softsign()(torch.arange(3)),
    "logsigmoid of integers": lambda nn: nn.LogSigmoid()(torch.arange(3)),
    "logsigmoid of a list": lambda nn: nn.functional.logsigmoid([1.0]),
    "softmin dim": lambda nn: nn.Softmin(3)(torch.ones(2, 2, requires_grad=True)),
    "selu of a list": lambda nn: nn.SELU()([1.0]),
    "softsign of a list": lambda nn: nn.Softsign()([1.0]),
    "hardswish of a list": lambda nn: nn.Hardswish()([1.0]),
    "inplace on a leaf": lambda nn: nn.SiLU(inplace=True)(torch.ones(2, requires_grad=True)),
    "changed since": lambda nn: changed(nn, nn.SiLU()),
    "changed since, gelu": lambda nn: changed(nn, nn.GELU()),
    "changed since, elu": lambda nn: changed(nn, nn.ELU()),
}


def changed(nn, layer):
    h = nn.Linear(2, 2)(torch.ones(1, 2))
    y = layer(h)
    with torch.no_grad():
        h.add_(1)
    y.sum().backward()


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_bad_input(nn, optim, name):
    """A user gets PyTorch's exception and message."""
    return ERRORS[name](nn)


def test_gelu_is_the_normal_distribution():
    x = torch.tensor([0.5], dtype=torch.float64)
    expected = 0.5 * 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
    assert abs(nnmirror.GELU()(x).item() - expected) < 1e-15
