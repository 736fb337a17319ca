"""Second and higher derivatives of activations, softmax and losses, as in PyTorch.

The residual of a differential equation and a gradient penalty depend on them: with SiLU layers, on
SiLU's second and third derivatives.
"""

import pytest
import torch

import nnmirror

from .parity import cpu_only, exactly, parity

# Functions of a tensor x, on either backend.
ACTIVATIONS = {
    "elu": lambda F, x: F.elu(x, 0.7),
    "selu": lambda F, x: F.selu(x),
    "celu": lambda F, x: F.celu(x, 0.7),
    "silu": lambda F, x: F.silu(x),
    "mish": lambda F, x: F.mish(x),
    "glu": lambda F, x: F.glu(x),
    "glu of columns": lambda F, x: F.glu(x, 0),
    "hardtanh": lambda F, x: F.hardtanh(x, -0.5, 1.0),
    "relu6": lambda F, x: F.relu6(x),
    "hardshrink": lambda F, x: F.hardshrink(x),
    "softshrink": lambda F, x: F.softshrink(x),
    "threshold": lambda F, x: F.threshold(x, 0.1, 0.2),
    "hardswish": lambda F, x: F.hardswish(x * 2),
    "logsigmoid": lambda F, x: F.logsigmoid(x),
    "softsign": lambda F, x: F.softsign(x),
    "tanhshrink": lambda F, x: F.tanhshrink(x),
    "sinc": lambda F, x: torch.sinc(x),
    "logit": lambda F, x: torch.logit(x.sigmoid() * 0.9),
    "logit clipped": lambda F, x: torch.logit(x, 0.1),
    "softmax": lambda F, x: F.softmax(x, -1),
    "softmax of columns": lambda F, x: F.softmax(x, 0),
    "log_softmax": lambda F, x: F.log_softmax(x, -1),
    "log_softmax of columns": lambda F, x: F.log_softmax(x, 0),
    "softmin": lambda F, x: F.softmin(x, -1),
    "softmax in float64": lambda F, x: F.softmax(x, -1, dtype=torch.float64),
}
IN_PLACE = {
    "elu": lambda F, x: F.elu_(x, 0.7),
    "selu": lambda F, x: F.selu_(x),
    "celu": lambda F, x: F.celu_(x, 0.7),
    "silu": lambda F, x: F.silu(x, inplace=True),
    "mish": lambda F, x: F.mish(x, inplace=True),
    "hardtanh": lambda F, x: F.hardtanh_(x, -0.5, 1.0),
    "relu6": lambda F, x: F.relu6(x, inplace=True),
    "threshold": lambda F, x: F.threshold_(x, 0.1, 0.2),
    "hardswish": lambda F, x: F.hardswish(x, inplace=True),
    "logit": lambda F, x: x.logit_(0.1),
}
# No tensor operation computes erf, tanh and exp as these kernels do: the results differ by at most
# these units (eps times the largest number), in exact mode too.
CLOSE = {
    "gelu": (lambda F, x: F.gelu(x), 4),
    "gelu tanh": (lambda F, x: F.gelu(x, approximate="tanh"), 24),
    "softplus": (lambda F, x: F.softplus(x, 1.5), 4),
}
SIZES = [(4, 6), (50, 100), (600, 500)]  # small, of SOME elements, of MANY (rules/kernel.py)


def derivatives(nn, function, x, order):
    """Derivatives of weighted sums: of the function, then of each derivative in turn.

    They are with respect to x and to the weights of the first sum, which are a parameter too. The
    weights are random.
    """
    x = nn.Parameter(x)
    y = function(nn.functional, x)
    generator = torch.Generator(y.device).manual_seed(1)
    weights = [torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)]
    weights[0] = nn.Parameter(weights[0])
    found = []
    for i in range(order):
        asked = [x] if i == 0 else [x, weights[0]]
        grads = torch.autograd.grad(y, asked, weights[i], create_graph=True, allow_unused=True)
        found += [None if g is None else g.detach() for g in grads]
        y = grads[0]
        if y is None or not y.requires_grad:
            break
        more = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
        weights.append(more)
    return found


@parity
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(nn, optim, name, size):
    order = 4 if size == SIZES[0] else 2
    x = torch.randn(size)
    return [derivatives(nn, ACTIVATIONS[name], x.to(d), order) for d in DTYPES]


DTYPES = (torch.float32, torch.float64)


@parity
@pytest.mark.parametrize("size", SIZES[:2])
@pytest.mark.parametrize("name", IN_PLACE)
def test_activations_in_place(nn, optim, name, size):
    x = torch.randn(size)

    def changed(F, x):
        return IN_PLACE[name](F, x * 1.5)

    return [derivatives(nn, changed, x.to(d), 3) for d in DTYPES]


@parity
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_16_bits(nn, optim, name, dtype):
    return derivatives(nn, ACTIVATIONS[name], torch.randn(8, 6).to(dtype), 2)


@parity
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_another_layout(nn, optim, name):
    return derivatives(nn, ACTIVATIONS[name], torch.randn(6, 40).t(), 2)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CLOSE)
def test_activations_whose_kernels_cannot_be_followed(name, size, exact):
    function, units = CLOSE[name]
    for dtype in DTYPES:
        torch.manual_seed(0)
        x = torch.randn(size, dtype=dtype)
        expected = derivatives(torch.nn, function, x, 3)
        with exactly(exact):
            actual = derivatives(nnmirror, function, x, 3)
        for e, a in zip(expected, actual, strict=True):
            assert (e - a).abs().max() <= units * torch.finfo(dtype).eps * e.abs().max()


@parity
@cpu_only("its message names a kernel")
def test_hardsigmoid_has_no_second_derivative(nn, optim):
    (first,) = derivatives(nn, lambda F, x: F.hardsigmoid(x), torch.randn(8), 1)
    assert first.count_nonzero()
    return derivatives(nn, lambda F, x: F.hardsigmoid(x), torch.randn(8), 2)


@pytest.mark.by_default
def test_the_forward_decides_about_exact_mode():
    x = torch.randn(33)
    expected = torch.nn.functional.elu(y := torch.nn.Parameter(x))
    (expected,) = torch.autograd.grad(expected.sum(), y, create_graph=True)
    (expected,) = torch.autograd.grad(expected.pow(2).sum(), y)
    y = nnmirror.Parameter(x)
    with nnmirror.exact():
        actual = nnmirror.functional.elu(y)
    (actual,) = torch.autograd.grad(actual.sum(), y, create_graph=True)
    (actual,) = torch.autograd.grad(actual.pow(2).sum(), y)
    assert torch.equal(expected, actual)


# -- losses ------------------------------------------------------------------------------------

CLASSES = torch.tensor([0, 5, 2, 2, 4, 1, 3, 5])
SIGNS = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1])


def shares(x):
    """Numbers between 0 and 1 that depend on x."""
    return (x * 1.3 + 0.2).sigmoid()


def weights(x):
    return torch.linspace(0.3, 1.2, 6, dtype=x.dtype, device=x.device)


def classes(x):
    return CLASSES.to(x.device)


def signs(x):
    return SIGNS.to(x.device, x.dtype)


# Losses of x and of tensors that depend on x, with one of the three reductions.
LOSSES = {
    "mse": lambda F, x, r: F.mse_loss(x, x.sin(), reduction=r),
    "l1": lambda F, x, r: F.l1_loss(x * x, x.sin(), reduction=r),
    "smooth_l1": lambda F, x, r: F.smooth_l1_loss(x, x.sin() * 2, reduction=r, beta=0.7),
    "smooth_l1 of 0": lambda F, x, r: F.smooth_l1_loss(x * x, x.sin(), reduction=r, beta=0.0),
    "smooth_l1 broadcast": lambda F, x, r: F.smooth_l1_loss(x, x[:1].sin(), reduction=r),
    "huber": lambda F, x, r: F.huber_loss(x, x.sin() * 2, reduction=r, delta=0.7),
    "huber broadcast": lambda F, x, r: F.huber_loss(x[:1].sin(), x, reduction=r),
    "bce": lambda F, x, r: F.binary_cross_entropy(x.sigmoid(), shares(x), reduction=r),
    "bce weighted": lambda F, x, r: F.binary_cross_entropy(
        x.sigmoid(), shares(x), weights(x), reduction=r
    ),
    "bce at 0 and 1": lambda F, x, r: F.binary_cross_entropy(
        x.clamp(0, 1), shares(x).detach(), reduction=r
    ),
    "bce with logits": lambda F, x, r: F.binary_cross_entropy_with_logits(
        x, shares(x), reduction=r
    ),
    "bce with logits weighted": lambda F, x, r: F.binary_cross_entropy_with_logits(
        x, shares(x), weights(x), pos_weight=weights(x) * 2, reduction=r
    ),
    "soft_margin": lambda F, x, r: F.soft_margin_loss(x, signs(x)[:, None], reduction=r),
    "multilabel_soft_margin": lambda F, x, r: F.multilabel_soft_margin_loss(
        x, shares(x).detach(), weights(x), reduction=r
    ),
    "nll": lambda F, x, r: F.nll_loss(x.sin(), classes(x), weights(x), ignore_index=2, reduction=r),
    "nll of images": lambda F, x, r: F.nll_loss(
        x.sin().view(2, 6, 2, 2), classes(x).view(2, 2, 2), reduction=r
    ),
    "cross_entropy": lambda F, x, r: F.cross_entropy(x, classes(x), reduction=r),
    "cross_entropy of all arguments": lambda F, x, r: F.cross_entropy(
        x, classes(x), weights(x), ignore_index=2, label_smoothing=0.1, reduction=r
    ),
    "cross_entropy of probabilities": lambda F, x, r: F.cross_entropy(
        x, shares(x), weights(x), label_smoothing=0.1, reduction=r
    ),
    "cross_entropy of images": lambda F, x, r: F.cross_entropy(
        x.view(2, 6, 2, 2), classes(x).view(2, 2, 2), reduction=r
    ),
    "kl_div": lambda F, x, r: F.kl_div(x, shares(x), reduction=r),
    "kl_div of logarithms": lambda F, x, r: F.kl_div(x, x.sin(), reduction=r, log_target=True),
    "poisson_nll": lambda F, x, r: F.poisson_nll_loss(x, shares(x), full=True, reduction=r),
    "poisson_nll of rates": lambda F, x, r: F.poisson_nll_loss(
        shares(x), x * x, log_input=False, reduction=r
    ),
    "gaussian_nll": lambda F, x, r: F.gaussian_nll_loss(x, x.sin(), shares(x), reduction=r),
    "hinge_embedding": lambda F, x, r: F.hinge_embedding_loss(
        x.sin(), signs(x)[:, None], reduction=r
    ),
    "cosine_embedding": lambda F, x, r: F.cosine_embedding_loss(
        x, x.sin() + 1, signs(x), margin=0.1, reduction=r
    ),
    "margin_ranking": lambda F, x, r: F.margin_ranking_loss(
        x.sin(), x.exp(), signs(x)[:, None], margin=0.3, reduction=r
    ),
    "triplet_margin": lambda F, x, r: F.triplet_margin_loss(
        x, x.sin(), x.exp(), margin=4.0, swap=True, reduction=r
    ),
}


@parity
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(nn, optim, name, reduction):
    x = torch.randn(8, 6)
    return [derivatives(nn, lambda F, x: LOSSES[name](F, x, reduction), x.to(d), 3) for d in DTYPES]


@parity
@pytest.mark.parametrize("name", ["mse", "smooth_l1", "huber", "bce", "bce with logits"])
def test_losses_of_many_numbers(nn, optim, name):
    x = torch.randn(50_000, 6)
    return derivatives(nn, lambda F, x: LOSSES[name](F, x, "mean"), x, 2)


@pytest.mark.parametrize("shape", [(3,), (), (4, 1), (1, 3)])
@parity
def test_mse_broadcast(nn, optim, shape):
    """Expanded first, so that gradients of gradients are summed in PyTorch's order."""
    results = []
    for loss in (nn.functional.mse_loss, nn.MSELoss()):
        a, b = torch.randn(4, 3).requires_grad_(), torch.randn(shape).requires_grad_()
        with pytest.warns(UserWarning, match="target size"):
            value = loss(nn.functional.tanh(a), nn.functional.leaky_relu(b))
        first = torch.autograd.grad(value * value, [a, b], create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), [a, b])
        results += [value, *first, *second]
    return results


@parity
def test_cross_entropy_of_many_rows(nn, optim):
    x, classes = torch.randn(30_000, 10), torch.arange(30_000) % 10
    return derivatives(nn, lambda F, x: F.cross_entropy(x, classes.to(x.device)), x, 2)
