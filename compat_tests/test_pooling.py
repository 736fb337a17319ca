"""Pooling, fold and unfold: a user would get other bits, indices, derivatives or error messages."""

import pytest
import torch

import nnmirror

from .parity import cpu_only, parity
from .test_convolution import planes
from .test_layers import driven

F64 = torch.float64
SPECIAL = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0, 1.0, 2.0])
LAYERS = {
    "max": lambda nn, n: getattr(nn, f"MaxPool{n}d")(2),
    "max, all": lambda nn, n: getattr(nn, f"MaxPool{n}d")(3, 2, 1, 2 - (n == 3), ceil_mode=True),
    "max, overlapping": lambda nn, n: getattr(nn, f"MaxPool{n}d")(3, 1, 1),
    "average": lambda nn, n: getattr(nn, f"AvgPool{n}d")(2),
    "average, overlapping": lambda nn, n: getattr(nn, f"AvgPool{n}d")(3, 1, 1),
    "average, ceil": lambda nn, n: getattr(nn, f"AvgPool{n}d")(3, 2, 1, ceil_mode=True),
    "average, of what is there": lambda nn, n: getattr(nn, f"AvgPool{n}d")(
        3, 2, 1, ceil_mode=True, count_include_pad=False
    ),
    "average, apart": lambda nn, n: getattr(nn, f"AvgPool{n}d")(2, 3),
    "average, of one": lambda nn, n: getattr(nn, f"AvgPool{n}d")(1),
    "adaptive average": lambda nn, n: getattr(nn, f"AdaptiveAvgPool{n}d")(3),
    "adaptive average, one": lambda nn, n: getattr(nn, f"AdaptiveAvgPool{n}d")(1),
    "adaptive average, more": lambda nn, n: getattr(nn, f"AdaptiveAvgPool{n}d")(10),
    "adaptive max": lambda nn, n: getattr(nn, f"AdaptiveMaxPool{n}d")(4),
    "norm": lambda nn, n: getattr(nn, f"LPPool{n}d")(3, 2),
    "norm, strided": lambda nn, n: getattr(nn, f"LPPool{n}d")(2.0, 3, stride=2, ceil_mode=True),
    "largest": lambda nn, n: getattr(nn, f"LPPool{n}d")(float("inf"), 2),
    "least": lambda nn, n: getattr(nn, f"LPPool{n}d")(-float("inf"), 2),
    "random": lambda nn, n: getattr(nn, f"FractionalMaxPool{n}d")(2, output_ratio=0.5),
    "random, sizes": lambda nn, n: getattr(nn, f"FractionalMaxPool{n}d")(2, output_size=4),
}
CASES = [(name, n) for name in LAYERS for n in (1, 2, 3) if n > 1 or "random" not in name]


@pytest.mark.parametrize(("name", "n"), CASES)
@parity
def test_pools(nn, optim, name, n):
    layer = LAYERS[name](nn, n)
    results = [repr(layer), layer.state_dict(), driven(layer, planes(n, dtype=F64))]
    for dtype in (torch.float32, torch.bfloat16):
        if dtype is torch.float32 or (not ("average" in name and n == 3) and "norm" not in name):
            results.append(driven(layer, planes(n, dtype=dtype)))
    if "random" not in name or n == 2:
        results.append(driven(layer, planes(n)[0]))
    return results


@pytest.mark.parametrize(("name", "n"), CASES)
@parity
def test_second_derivatives(nn, optim, name, n):
    x = nn.Parameter(planes(n).abs() + 0.5)
    y = LAYERS[name](nn, n)(x)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    second = torch.autograd.grad((first * first).sum(), x, create_graph=True)
    third = torch.autograd.grad(second[0].sum(), x)
    # + 0.0 turns -0.0 into 0.0: the signs of zeros differ, as sgn has no gradient here.
    return [t + 0.0 for t in (first, *second, *third)]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.usefixtures("one_thread")  # with more, PyTorch's message may name another index
@parity
def test_max_pool_indices_and_max_unpool(nn, optim, n):
    pool = getattr(nn, f"MaxPool{n}d")(2, stride=2, return_indices=True)
    back = getattr(nn, f"MaxUnpool{n}d")(2, stride=2)
    x = nn.Parameter(planes(n))
    y, places = pool(x)
    z = back(y, places, output_size=x.size())
    z.pow(2).sum().backward()
    single = pool(x[0])
    adaptive = getattr(nn, f"AdaptiveMaxPool{n}d")(2, return_indices=True)(x)
    adaptive[0].sum().backward()
    plain = pool(planes(n))
    return y, places, z, z.grad_fn.name(), x, single, adaptive, plain, repr(back)


@pytest.mark.parametrize("n", [2, 3])
@parity
def test_divisor_and_sizes_of_each(nn, optim, n):
    other = getattr(nn, f"AvgPool{n}d")(3, 2, divisor_override=5)
    sizes = getattr(nn, f"AvgPool{n}d")((2, 3, 1)[:n], (1, 2, 3)[:n], (1, 1, 0)[:n])
    kept = getattr(nn, f"AdaptiveAvgPool{n}d")((None, 2, 3)[:n])
    largest = getattr(nn, f"AdaptiveMaxPool{n}d")((None, 2, 3)[:n])
    return [driven(layer, planes(n)) for layer in (other, sizes, kept, largest)]


@parity
def test_windows_drawn_before(nn, optim):
    samples = torch.rand(2, 4, 2, dtype=F64)
    layer = nn.FractionalMaxPool2d(2, output_size=(3, 4), _random_samples=samples)
    y, places = nn.functional.fractional_max_pool2d(planes(2), 2, 3, return_indices=True)
    return driven(layer, planes(2)), layer.state_dict(), y, places


@parity
def test_nan_and_signed_zeros(nn, optim):
    x = SPECIAL.repeat(2, 3, 2).view(2, 3, 4, 4)
    results = []
    for layer in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 1), nn.AdaptiveAvgPool2d(2)):
        leaf = nn.Parameter(x.clone())
        y = layer(leaf)
        y.backward(torch.full(y.shape, -0.0))
        results += [y, leaf.grad]
    return results


@pytest.mark.parametrize("how", [(2,), (3, 2, 1), (3, 1, 1, 1, True, True)])
@parity
def test_many_planes(nn, optim, how):
    """Many planes are pooled in another memory format; with ties, zeros of both signs and NaN."""
    x = torch.randn(8, 33, 13, 12).mul(2).round()
    x[0, :, :3] = SPECIAL.repeat(2)[:12]
    results = []
    for dtype in (torch.float32, F64):
        leaf = nn.Parameter(x.to(dtype))
        found = nn.MaxPool2d(*how[:4], return_indices=len(how) > 4)(leaf)
        y = found[0] if isinstance(found, tuple) else found
        y.backward(torch.randn(y.shape, dtype=dtype))
        results += [found, y.stride(), leaf.grad]
        with torch.no_grad():
            results.append(nn.functional.max_pool2d(leaf, *how[:4]))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@parity
def test_layers_of_many_planes(nn, optim, dtype):
    """Many planes are pooled as channels of one image in channels_last; results must not differ."""
    x = torch.randn(4, 6, 24, 20, dtype=dtype)
    x[0, 0, :2, :4] = SPECIAL.view(2, 4).to(dtype)
    results = []
    for layer in (
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, ceil_mode=True, return_indices=True),
        nn.AvgPool2d((3, 2), 1, (1, 0), count_include_pad=False),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=(3, 2), mode="nearest-exact"),
    ):
        leaf = nn.Parameter(x.clone())
        y = layer(leaf)
        y, *places = y if isinstance(y, tuple) else (y,)
        (dx,) = torch.autograd.grad(y, leaf, torch.randn_like(y), create_graph=True)
        results.append((y, y.stride(), dx, dx.stride(), [(p, p.stride()) for p in places]))
        with torch.no_grad():
            results.append(layer(x))
    return results


@pytest.mark.parametrize("name", ["MaxPool2d", "AvgPool2d"])
@parity
def test_a_window_larger_than_many_planes(nn, optim, name):
    return getattr(nn, name)(9)(nn.Parameter(torch.randn(40, 8, 6, 6)))


@parity
def test_channels_last(nn, optim):
    results = []
    for layer in (
        nn.MaxPool2d(3, 2),
        nn.AvgPool2d(3, 2),
        nn.AdaptiveAvgPool2d(3),
        nn.AvgPool2d(3, 3),
    ):
        h = nn.functional.leaky_relu(
            planes(2).to(memory_format=torch.channels_last).requires_grad_(), 1.0
        )
        y = layer(h)
        (dh,) = torch.autograd.grad(y.sum(), h)
        results.append((y, y.stride(), dh, dh.stride()))
    return results


@parity
def test_empty_batches(nn, optim):
    layers = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.MaxPool1d(2)
    return [driven(m, planes(2 - (m is layers[3]))[:0]) for m in layers]


@pytest.mark.parametrize(
    "how", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "kernel_size": (2, 3)}]
)
@parity
def test_fold_and_unfold(nn, optim, how):
    how = {"kernel_size": 3, **how}
    unfold = nn.Unfold(**how)
    columns = unfold(planes(2))
    fold = nn.Fold((9, 7), **how)
    x = nn.Parameter(planes(2))
    (first,) = torch.autograd.grad(unfold(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    results = [driven(unfold, planes(2)), driven(unfold, planes(2)[0]), first, second]
    return results, driven(fold, columns), driven(fold, columns[0]), repr(unfold), repr(fold)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_finite_differences(n):
    """The gradients against central differences in float64, independently of PyTorch."""
    torch.manual_seed(0)
    x = nnmirror.Parameter(
        torch.randperm(2 * 60).double().view(1, 2, 5, 4, 3)[(..., *[0] * (3 - n))]
    )
    F = nnmirror.functional
    for name, args in (
        ("max_pool", (2, 1)),
        ("avg_pool", (2, 1, 1, True, False)),
        ("adaptive_avg_pool", (2,)),
        ("adaptive_max_pool", (2,)),
    ):
        function = getattr(F, f"{name}{n}d")
        assert torch.autograd.gradcheck(lambda x: function(x, *args), x)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: function(x, *args), x, fast_mode=True)  # noqa: B023


def test_driven_by_hand():
    """forward and backward called directly, on an input that requires no grad and on a tuple."""
    torch.manual_seed(0)
    x = planes(2)
    for layer in (
        nnmirror.MaxPool2d(2),
        nnmirror.AvgPool2d(2),
        nnmirror.AdaptiveAvgPool2d(1),
        nnmirror.LPPool2d(2, 2),
        nnmirror.Unfold(2),
    ):
        y = layer.forward(x)
        dx = layer.backward(torch.ones_like(y))
        leaf = nnmirror.Parameter(x)
        layer(leaf).sum().backward()
        assert torch.equal(leaf.grad, dx)
        both = layer.forward((x, x))
        assert torch.equal(both[1], y)
        assert torch.equal(layer.backward(tuple(torch.ones_like(y) for _ in both))[0], dx)


def test_converted_from_pytorch_and_back():
    theirs = torch.nn.Sequential(torch.nn.MaxPool2d(2), torch.nn.AvgPool2d(2), torch.nn.Unfold(1))
    mine = nnmirror.from_torch(theirs)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(mine(x), theirs(x))
    assert repr(nnmirror.to_torch(mine)) == repr(theirs) == repr(mine)


WRONG = {
    "dimensions": lambda nn, x: nn.functional.max_pool2d(x[0, 0], 2),
    "dimensions of one": lambda nn, x: nn.functional.max_pool1d(x, 2),
    "too short": lambda nn, x: nn.functional.max_pool1d(x[0, :, :1, 0], 2),
    "nothing of one": lambda nn, x: nn.functional.max_pool1d(x[0, :, :0, 0], 2),
    "padding": lambda nn, x: nn.functional.max_pool2d(x, 2, padding=2),
    "stride": lambda nn, x: nn.functional.max_pool2d(x, 2, 0),
    "kernel": lambda nn, x: nn.functional.max_pool2d(x, 99),
    "kernel of zero": lambda nn, x: nn.MaxPool2d(0)(x),
    "a string": lambda nn, x: nn.functional.max_pool2d(x, "a"),
    "a string of a layer": lambda nn, x: nn.MaxPool2d("a")(x),
    "three": lambda nn, x: nn.MaxPool2d((2, 2, 2))(x),
    "no tensor": lambda nn, x: nn.MaxPool2d(2)([1.0]),
    "no kernel": lambda nn, x: nn.functional.avg_pool2d(x),
    "average padding": lambda nn, x: nn.functional.avg_pool2d(x, 2, 2, 2),
    "average kernel": lambda nn, x: nn.AvgPool2d(99)(x),
    "average of dimensions": lambda nn, x: nn.AvgPool1d(2)(x),
    "divisor of zero": lambda nn, x: nn.AvgPool2d(2, divisor_override=0)(x),
    "adaptive": lambda nn, x: nn.AdaptiveAvgPool2d((2, 2, 2))(x),
    "adaptive negative": lambda nn, x: nn.AdaptiveAvgPool2d(-1)(x),
    "adaptive of dimensions": lambda nn, x: nn.AdaptiveAvgPool2d((2, 2))(x[0, 0]),
    "unpool size": lambda nn, x: nn.functional.max_unpool2d(x, x.long(), 2, output_size=(3, 3)),
    "unpool sizes": lambda nn, x: nn.functional.max_unpool2d(x, x.long(), 2, output_size=(3,)),
    "unpool places": lambda nn, x: nn.functional.max_unpool2d(x, x.long() + 10**6, 2),
    "random": lambda nn, x: nn.FractionalMaxPool2d(2),
    "random ratio": lambda nn, x: nn.FractionalMaxPool2d(2, output_ratio=1.5),
    "random both": lambda nn, x: nn.FractionalMaxPool3d(2, 2, 0.5),
    "unfold": lambda nn, x: nn.Unfold(99)(x),
    "unfold dimensions": lambda nn, x: nn.Unfold(2)(x[0, 0]),
    "fold": lambda nn, x: nn.Fold((5, 5), 2)(x[0]),
    "integers": lambda nn, x: nn.functional.avg_pool2d(x.long(), 2),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("one_thread")  # with more, PyTorch's message may name another index
@parity
@cpu_only("the messages of other devices' kernels differ")
def test_wrong_arguments(nn, optim, name):
    return WRONG[name](nn, nn.Parameter(planes(2)))


@pytest.mark.parametrize("bind", [False, True])
@parity
def test_a_small_classifier_trains(nn, optim, bind):
    """A small convolutional classifier trains the same, in float64 (convolution is exact there)."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).double()  # fmt: skip
    optimizer, losses = optim.Adam(model.parameters(), lr=0.01), []
    x = torch.randn(6, 1, 12, 12, dtype=F64)
    for _ in range(6 if bind else 2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, dict(model.named_parameters()), repr(model)
