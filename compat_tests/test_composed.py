"""Losses, distances, RMSNorm and padding: PyTorch's bits for every argument."""

import warnings

import pytest
import torch

import nnmirror

from .parity import parity, trained
from .test_layers import DTYPES

with warnings.catch_warnings():  # PyTorch gives this warning once per process
    warnings.simplefilter("ignore")
    torch.nn.functional.rms_norm(torch.ones(2), (2,), torch.ones(2).double())

REDUCTIONS = ["none", "mean", "sum"]
SIZES = [(), (5,), (64,), (7, 3), (4, 0), (3, 5, 2), (1003, 2)]


def signs(shape):
    return torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)


def grad(*shape):
    return torch.rand(*shape).requires_grad_()


# Name: the loss, and a function of x's shape that creates its other inputs.
LOSSES = {
    "kl": (lambda nn, r: nn.KLDivLoss(reduction=r), lambda s: [torch.rand(s)]),
    "kl log": (lambda nn, r: nn.KLDivLoss(reduction=r, log_target=True), lambda s: [torch.randn(s)]),
    "poisson": (lambda nn, r: nn.PoissonNLLLoss(reduction=r), lambda s: [torch.randn(s).abs() * 3]),
    "poisson full": (
        lambda nn, r: nn.PoissonNLLLoss(full=True, reduction=r), lambda s: [torch.randn(s).abs() * 3]),
    "poisson rate": (
        lambda nn, r: nn.PoissonNLLLoss(False, True, eps=1e-3, reduction=r), lambda s: [torch.randn(s).abs() * 3]),
    "gaussian": (lambda nn, r: nn.GaussianNLLLoss(reduction=r), lambda s: [torch.randn(s), torch.rand(s)]),
    "gaussian full": (
        lambda nn, r: nn.GaussianNLLLoss(full=True, eps=0.3, reduction=r),
        lambda s: [torch.randn(s), torch.rand(s)]),
    "hinge": (lambda nn, r: nn.HingeEmbeddingLoss(reduction=r), lambda s: [signs(s)]),
    "hinge 0.3": (lambda nn, r: nn.HingeEmbeddingLoss(0.3, reduction=r), lambda s: [signs(s)]),
    "soft margin": (lambda nn, r: nn.SoftMarginLoss(reduction=r), lambda s: [signs(s)]),
    "labels": (lambda nn, r: nn.MultiLabelSoftMarginLoss(reduction=r), lambda s: [torch.rand(s).round()]),
    "labels weighted": (
        lambda nn, r: nn.MultiLabelSoftMarginLoss(torch.tensor(0.7), reduction=r),
        lambda s: [torch.rand(s).round()]),
    "ranking": (lambda nn, r: nn.MarginRankingLoss(reduction=r), lambda s: [torch.randn(s), signs(s)]),
    "ranking 0.3": (lambda nn, r: nn.MarginRankingLoss(0.3, reduction=r), lambda s: [torch.randn(s), signs(s)]),
    "cosine": (lambda nn, r: nn.CosineEmbeddingLoss(reduction=r), lambda s: [torch.randn(s), signs(s[:-1])]),
    "cosine 0.3": (
        lambda nn, r: nn.CosineEmbeddingLoss(0.3, reduction=r), lambda s: [torch.randn(s), signs(s[:-1])]),
    "triplet": (
        lambda nn, r: nn.TripletMarginLoss(reduction=r), lambda s: [torch.randn(s), torch.randn(s)]),
    "triplet swap": (
        lambda nn, r: nn.TripletMarginLoss(0.3, 1, swap=True, reduction=r),
        lambda s: [torch.randn(s), torch.randn(s)]),
    "triplet 3": (
        lambda nn, r: nn.TripletMarginLoss(2.0, 3.0, eps=1e-3, reduction=r),
        lambda s: [torch.randn(s), torch.randn(s)]),
    "similarity": (lambda nn, r: nn.CosineSimilarity(-1), lambda s: [torch.randn(s)]),
    "similarity 0": (lambda nn, r: nn.CosineSimilarity(0, eps=1.5), lambda s: [torch.randn(s)]),
    "distance": (lambda nn, r: nn.PairwiseDistance(), lambda s: [torch.randn(s)]),
    "distance 1": (lambda nn, r: nn.PairwiseDistance(1, keepdim=True), lambda s: [torch.randn(s)]),
    "distance inf": (lambda nn, r: nn.PairwiseDistance(float("inf"), eps=0.1), lambda s: [torch.randn(s)]),
    "distance 0.5": (lambda nn, r: nn.PairwiseDistance(0.5), lambda s: [torch.randn(s)]),
}  # fmt: skip


def compared(loss, x, *others):
    """The loss, its node, and the gradients of all inputs that require grad."""
    y = loss(x, *others)
    name = y.grad_fn.name() if y.requires_grad else None
    printed = repr(y)
    if y.requires_grad:
        y.backward(torch.randn(y.shape).to(y.dtype))
    return name, printed, y, x, others, repr(loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", LOSSES)
@parity
def test_loss(nn, optim, name, shape, dtype, reduction):
    """With a gradient for x alone, then for all inputs that can have one."""
    make, others = LOSSES[name]
    results = []
    for more in (False, True):
        loss = make(nn, reduction)
        given = [t.to(dtype).requires_grad_(more and name != "soft margin") for t in others(shape)]
        x = torch.randn(shape).to(dtype)
        x = (x.abs() if "rate" in name else x).requires_grad_()
        results.append(compared(loss, x, *given))
    return results


@pytest.mark.parametrize("name", LOSSES)
@parity
def test_loss_of_unusual_input(nn, optim, name):
    """Broadcast and transposed inputs, other dtypes, integers, and special values such as NaN."""
    make, others = LOSSES[name]
    results = []
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 1e-40, -90.0, 90.0]
    for x in (
        torch.tensor(special).requires_grad_(),
        torch.tensor([special] * 7).requires_grad_(),
        torch.randn(6, 4).t().requires_grad_(),
        torch.randn(4, 6, dtype=torch.float64).requires_grad_(),
        torch.zeros(4, 6).requires_grad_(),
    ):
        try:
            given = [t.t() if t.dim() == 2 else t for t in others(x.shape)]
            given = given if x.shape == given[0].shape else others(x.shape)
            results.append(compared(make(nn, "mean"), x, *given))
        except (RuntimeError, ValueError) as e:
            results.append(str(e))
    try:
        results.append(compared(make(nn, "sum"), grad(4, 6), *[t.int() for t in others((4, 6))]))
        results.append(compared(make(nn, "sum"), grad(4, 6), *others((1, 6))))
    except (RuntimeError, ValueError) as e:
        results.append(str(e))
    return results


@pytest.mark.parametrize("name", LOSSES)
@parity
def test_one_tensor_twice(nn, optim, name):
    """The gradients of a tensor that is passed twice are added in PyTorch's order."""
    make, others = LOSSES[name]
    if name == "soft margin":
        return None
    x = torch.rand(5, 4).requires_grad_()
    rest = [x if t.shape == x.shape else t for t in others((5, 4))]
    return compared(make(nn, "mean"), x, *rest)


@parity
def test_batchmean_and_old_arguments(nn, optim):
    x, t = grad(4, 3), torch.rand(4, 3)
    losses = [
        nn.KLDivLoss(reduction="batchmean")(x, t),
        nn.KLDivLoss(reduction="batchmean")(x[0, 0], t[0, 0]),
        nn.KLDivLoss(size_average=False)(x, t),
        nn.PoissonNLLLoss(reduce=False)(x, t).sum(),
        nn.HingeEmbeddingLoss(size_average=False)(x, t),
        nn.MarginRankingLoss(reduce=False)(x, t, t).sum(),
        nn.TripletMarginLoss(size_average=True)(x, t, t),
        nn.SoftMarginLoss(size_average=False)(x, t),
        nn.functional.kl_div(x, t, size_average=False),
        nn.functional.multilabel_soft_margin_loss(x, t, torch.rand(3), reduce=True),
    ]
    sum(losses).backward()
    return losses, x


@parity
def test_variances(nn, optim):
    """One variance for each element, for each row, or for all."""
    x, t = grad(4, 3), torch.rand(4, 3)
    losses = []
    for var in (grad(4, 3), grad(4), grad(4, 1), torch.zeros(4, 3), 0.5, 0.0):
        losses.append(nn.GaussianNLLLoss()(x, t, var))
        losses[-1].backward()
        losses.append(var)
    return losses, x


def mode_and_pads():
    for mode in ("constant", "reflect", "replicate", "circular"):
        yield mode, (5,), (2, 1)
        yield mode, (2, 5), (2, 1)
        yield mode, (2, 3, 5), (2, 1)
        yield mode, (2, 3, 5), (4, 4)
        yield mode, (2, 3, 5), (-1, 2)
        yield mode, (2, 3, 5), (-1, -2)
        yield mode, (2, 3, 5), (0, 0)
        yield mode, (2, 3, 5), (1, 0, 2, 1)
        yield mode, (2, 3, 5, 4), (1, 2, 3, 1)
        yield mode, (2, 3, 5, 4), (-1, 2, 3, -1)
        yield mode, (2, 3, 5, 4, 3), (1, 2, 1, 1, 2, 0)
        if mode in ("reflect", "replicate"):  # empty results of others differ in strides
            yield mode, (2, 0, 5), (1, 1)
        yield mode, (2, 3), (5, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "shape", "pads"), mode_and_pads())
@parity
def test_pad(nn, optim, mode, shape, pads, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = nn.functional.pad(x, pads, mode)
    y.backward(torch.randn(y.shape).to(dtype))
    turned = (
        torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape)))).requires_grad_()
    )
    z = nn.functional.pad(turned, pads, mode)
    z.backward(torch.randn(z.shape).to(dtype))
    return y.grad_fn.name(), y, x, z, turned


@parity
def test_pad_values(nn, optim):
    F = nn.functional
    x = grad(2, 3)
    y = F.pad(x, (1, 1), value=7.5).sum() + F.pad(x, [1, 0, 0, 2], "constant", -1).pow(2).sum()
    y.backward()
    return y, x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2, 1, 3.5, float("inf"), 0.5])
@parity
def test_normalize(nn, optim, p, dtype):
    F = nn.functional
    x = torch.randn(4, 5, 3).to(dtype).requires_grad_()
    y = F.normalize(x, p) * F.normalize(x, p, dim=-1, eps=3.0) + F.normalize(x * 0, p, (0, 1))
    y.backward(torch.randn(y.shape).to(dtype))
    return y, x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("shape", [(5,), (3,), (4, 3), (0, 3), (2, 4, 3), (1000, 3)])
@parity
def test_rms_norm(nn, optim, shape, eps, affine, dtype):
    layer = nn.RMSNorm(shape[-1], eps, affine, dtype=dtype)
    if affine:
        layer.weight.data.uniform_(-1, 1)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape).to(dtype))
    many = nn.RMSNorm(shape, eps, affine, dtype=dtype)(x.detach().requires_grad_())
    return y.grad_fn.name(), y, x, dict(layer.named_parameters()), repr(layer), many


@pytest.mark.parametrize("dtype", DTYPES)
@parity
def test_rms_norm_of_two_dtypes(nn, optim, dtype):
    x = torch.randn(4, 3).to(dtype).requires_grad_()
    layer = nn.RMSNorm(3)
    layer.weight.data.uniform_(-1, 1)
    y = layer(x)
    y.backward(torch.randn(4, 3).to(y.dtype))
    return y, x, layer.weight


@parity
def test_rms_norm_trains(nn, optim):
    net = nn.Sequential(nn.Linear(3, 25), nn.RMSNorm(25), nn.Linear(25, 2))
    return trained(nn, optim, net, torch.randn(5, 3), torch.randn(5, 2)), repr(net)


@parity
def test_one_hot(nn, optim):
    F = nn.functional
    t = torch.tensor([0, 2, 1])
    return F.one_hot(t), F.one_hot(t, 5), F.one_hot(t.view(1, 3), num_classes=4)


@parity
def test_functions_of_similarity(nn, optim):
    F = nn.functional
    x, y = grad(4, 1, 5), grad(3, 5)
    z = (
        F.cosine_similarity(x, y, dim=2, eps=0.1).sum()
        + F.pairwise_distance(x, y, 3, 0.1, True).sum()
    )
    z = (
        z
        + F.cosine_similarity(x, torch.ones(3, 5).int(), 2).sum()
        + F.cosine_similarity(x, x, -1).sum()
    )
    z.backward()
    return z, x, y


# fmt: off
ERRORS = {
    "kl sizes": lambda nn: nn.KLDivLoss(reduction="sum")(grad(3), torch.rand(4)),
    "kl reduction": lambda nn: nn.KLDivLoss(reduction="average")(grad(3), torch.rand(3)),
    "kl list": lambda nn: nn.KLDivLoss(reduction="sum")([1.0], torch.rand(1)),
    "poisson reduction": lambda nn: nn.PoissonNLLLoss(reduction="average")(grad(3), torch.rand(3)),
    "poisson sizes": lambda nn: nn.PoissonNLLLoss()(grad(3), torch.rand(4)),
    "gaussian var": lambda nn: nn.GaussianNLLLoss()(grad(3), torch.rand(3), -torch.rand(3)),
    "gaussian number": lambda nn: nn.GaussianNLLLoss()(grad(3), torch.rand(3), -1.0),
    "gaussian var size": lambda nn: nn.GaussianNLLLoss()(grad(3, 2), torch.rand(3, 2), torch.rand(4, 2)),
    "gaussian var sizes": lambda nn: nn.GaussianNLLLoss()(grad(3, 2), torch.rand(3, 2), torch.rand(1, 1)),
    "gaussian reduction": lambda nn: nn.GaussianNLLLoss(reduction="average")(grad(3), torch.rand(3), torch.rand(3)),
    "hinge sizes": lambda nn: nn.HingeEmbeddingLoss()(grad(3), torch.rand(4)),
    "hinge reduction": lambda nn: nn.HingeEmbeddingLoss(reduction="average")(grad(3), torch.rand(3)),
    "ranking dims": lambda nn: nn.MarginRankingLoss()(grad(3), torch.rand(1, 3), torch.rand(3)),
    "ranking sizes": lambda nn: nn.MarginRankingLoss()(grad(3), torch.rand(4), torch.rand(3)),
    "cosine dims": lambda nn: nn.CosineEmbeddingLoss()(grad(3), grad(3), torch.ones(3)),
    "cosine number": lambda nn: nn.CosineEmbeddingLoss()(grad(3, 2), grad(3, 2), torch.tensor(1)),
    "cosine target": lambda nn: nn.CosineEmbeddingLoss()(grad(3, 2), grad(3, 2), torch.ones(3, 2)),
    "cosine sizes": lambda nn: nn.CosineEmbeddingLoss()(grad(3, 2), grad(3, 4), torch.ones(3)),
    "triplet dims": lambda nn: nn.TripletMarginLoss()(grad(3), grad(1, 3), grad(3)),
    "triplet sizes": lambda nn: nn.TripletMarginLoss()(grad(3), grad(4), grad(3)),
    "triplet margin": lambda nn: nn.TripletMarginLoss(0.0),
    "triplet margin below 0": lambda nn: nn.functional.triplet_margin_loss(grad(3), grad(3), grad(3), -1.0),
    "soft sizes": lambda nn: nn.SoftMarginLoss()(grad(3), torch.ones(4)),
    "soft target": lambda nn: nn.SoftMarginLoss()(grad(3), grad(3)),
    "soft list": lambda nn: nn.SoftMarginLoss()([1.0], torch.ones(1)),
    "labels reduction": lambda nn: nn.MultiLabelSoftMarginLoss(reduction="average")(grad(3), torch.rand(3)),
    "labels sizes": lambda nn: nn.MultiLabelSoftMarginLoss()(grad(3), torch.rand(4)),
    "similarity sizes": lambda nn: nn.CosineSimilarity()(grad(3, 2), grad(4, 2)),
    "similarity dim": lambda nn: nn.CosineSimilarity(3)(grad(3, 2), grad(3, 2)),
    "similarity integers": lambda nn: nn.CosineSimilarity(0)(torch.arange(3), torch.arange(3)),
    "similarity list": lambda nn: nn.CosineSimilarity(0)([1.0], grad(1)),
    "distance sizes": lambda nn: nn.PairwiseDistance()(grad(3, 2), grad(4, 2)),
    "distance list": lambda nn: nn.PairwiseDistance()([1.0], grad(1)),
    "rms shape": lambda nn: nn.RMSNorm(4)(grad(2, 3)),
    "rms of integers": lambda nn: nn.RMSNorm(3)(torch.arange(3)),
    "rms list": lambda nn: nn.RMSNorm(3)([1.0, 2.0, 3.0]),
    "pad mode": lambda nn: nn.functional.pad(grad(3), (1, 1), "mirror"),
    "pad odd": lambda nn: nn.functional.pad(grad(3), (1, 1, 1)),
    "pad many": lambda nn: nn.functional.pad(grad(3), (1, 1, 1, 1)),
    "pad value": lambda nn: nn.functional.pad(grad(2, 3), (1, 1), "reflect", 1.0),
    "pad reflect far": lambda nn: nn.functional.pad(grad(2, 3), (3, 1), "reflect"),
    "pad circular far": lambda nn: nn.functional.pad(grad(2, 2, 3), (4, 1), "circular"),
    "pad negative": lambda nn: nn.functional.pad(grad(3), (-2, -2)),
    "pad list": lambda nn: nn.functional.pad([1.0], (1, 1)),
    "normalize out": lambda nn: nn.functional.normalize(grad(2, 3), out=torch.empty(2, 3)),
    "normalize dim": lambda nn: nn.functional.normalize(grad(3)),
    "one_hot floats": lambda nn: nn.functional.one_hot(torch.rand(3)),
    "one_hot range": lambda nn: nn.functional.one_hot(torch.arange(3), 2),
    "one_hot below 0": lambda nn: nn.functional.one_hot(torch.tensor([-1])),
}
# fmt: on


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_bad_input(nn, optim, name):
    """A user gets PyTorch's exception and message."""
    return ERRORS[name](nn)


# Not smooth, or with a lower bound that PyTorch's gradient ignores.
UNLIKE = ("distance inf", "distance 0.5", "similarity 0")


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in UNLIKE])
def test_gradient_by_finite_differences(name):
    """Central differences in float64: a check that does not depend on PyTorch."""
    make, others = LOSSES[name]
    loss = make(nnmirror, "sum")
    torch.manual_seed(0)
    x = torch.rand(4, 3, dtype=torch.float64) + 0.1
    rest = [t.double() for t in others((4, 3))]
    leaf = nnmirror.Parameter(x)
    loss(leaf, *rest).sum().backward()
    h = 1e-6
    for i in range(x.numel()):
        step = torch.zeros(12, dtype=torch.float64)
        step[i] = h
        up, down = (loss(x + s * step.view(4, 3), *rest).sum() for s in (1, -1))
        assert abs(leaf.grad.view(-1)[i] - (up - down) / (2 * h)) < 1e-7


@pytest.mark.parametrize("name", LOSSES)
def test_explicit_style(name):
    """`loss.backward(g)` by hand gives the recorded call's gradients, for each input."""
    make, others = LOSSES[name]
    loss = make(nnmirror, "sum")
    x, rest = torch.rand(4, 3), others((4, 3))
    inputs = 1 + {"ranking": 1, "cosine": 1, "triplet": 2, "similarity": 1, "distance": 1}.get(
        name.split()[0], 0
    )
    out = loss.forward(x, *rest)
    g = torch.rand(out.shape)
    grads = loss.backward(g)
    assert not out.requires_grad
    leaves = [t.clone().requires_grad_() for t in (x, *rest)[:inputs]]
    loss(*leaves, *rest[inputs - 1 :]).backward(g)
    grads = grads if isinstance(grads, tuple) else (grads,)
    assert len(grads) == inputs
    assert all(torch.equal(a, leaf.grad) for a, leaf in zip(grads, leaves, strict=True))
    pair = loss.forward(*[(t, t) for t in (x, *rest)])
    assert torch.equal(pair[0], out.detach())


def test_layers_by_hand():
    model = nnmirror.Sequential(
        nnmirror.Linear(3, 4), nnmirror.RMSNorm(4), nnmirror.Softsign(), nnmirror.Tanhshrink()
    )
    x, g = torch.randn(5, 3), torch.randn(5, 4)
    model.forward(x)
    dx = model.backward(g)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    model(leaf).backward(g)
    assert torch.equal(dx, leaf.grad)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


@parity
def test_a_flag_that_is_no_bool(nn, optim):
    log_p = torch.log_softmax(nn.Parameter(torch.randn(2, 3)), 1)
    with pytest.raises(TypeError) as raised:
        nn.functional.kl_div(log_p, torch.rand(2, 3), log_target=1, reduction="sum")
    return str(raised.value)
