"""Image layers and functions without weights: a user would get other bits, draws or shapes."""

import warnings

import pytest
import torch

import nnmirror

from .parity import off_by, parity, trained
from .test_layers import DTYPES, driven
from .test_norm_layers import in_format

PADS = {1: (2, 1), 2: (1, 2, 0, 3), 3: (1, 2, 0, 1, 1, 0)}
SHAPES = {1: (2, 3, 4), 2: (2, 3, 4, 5), 3: (2, 2, 3, 4, 5)}
# Name: how the layer is made, and the input shapes.
LAYERS = {
    **{
        f"{kind}Pad{n}d": (
            lambda nn, name=f"{kind}Pad{n}d", pad=PADS[n], more=more: getattr(nn, name)(pad, *more),
            [SHAPES[n], SHAPES[n][1:], (0, *SHAPES[n][1:])],
        )
        for kind, more in [("Constant", (0.5,)), ("Zero", ()), ("Reflection", ()), ("Replication", ()), ("Circular", ())]
        for n in (1, 2, 3)
    },
    "pad that cuts off": (lambda nn: nn.ConstantPad2d((-1, 2, 0, -1), 3), [(2, 3, 4, 5)]),
    "pad by one number": (lambda nn: nn.ReflectionPad2d(1), [(2, 3, 4, 5)]),
    "PixelShuffle": (lambda nn: nn.PixelShuffle(2), [(2, 8, 3, 2), (4, 2, 2), (1, 2, 4, 1, 2)]),
    "PixelUnshuffle": (lambda nn: nn.PixelUnshuffle(3), [(2, 1, 3, 6), (2, 3, 3), (0, 1, 3, 3)]),
    "LocalResponseNorm": (lambda nn: nn.LocalResponseNorm(3, 0.5, 0.8, 1.5), [(2, 5, 3, 4), (2, 5, 3), (0, 5, 3), (2, 4, 2, 3, 2)]),
    "LocalResponseNorm of two": (lambda nn: nn.LocalResponseNorm(2), [(2, 5, 3, 4), (1, 1, 3)]),
    "ChannelShuffle": (lambda nn: nn.ChannelShuffle(3), [(2, 6, 3, 2), (2, 3, 4), (1, 12, 1, 2, 2)]),
    "Softmax2d": (lambda nn: nn.Softmax2d(), [(2, 5, 3, 4), (5, 3, 4), (0, 2, 3, 3)]),
    "Dropout1d": (lambda nn: nn.Dropout1d(0.4), [(4, 5, 3), (5, 3), (0, 5, 3)]),
    "Dropout2d": (lambda nn: nn.Dropout2d(0.4), [(4, 5, 3, 2), (4, 5, 3), (4, 5), (0, 5, 3, 2)]),
    "Dropout2d of all": (lambda nn: nn.Dropout2d(1.0), [(4, 5, 3, 2)]),
    "Dropout2d of none": (lambda nn: nn.Dropout2d(0.0), [(4, 5, 3, 2)]),
    "Dropout3d": (lambda nn: nn.Dropout3d(), [(4, 5, 3, 2, 1), (4, 5, 3, 2), (4, 5, 3)]),
    "AlphaDropout": (lambda nn: nn.AlphaDropout(0.3), [(4, 5, 3), (7,), (), (0, 3)]),
    "AlphaDropout of all": (lambda nn: nn.AlphaDropout(1, inplace=True), [(4, 5)]),
    "FeatureAlphaDropout": (lambda nn: nn.FeatureAlphaDropout(0.3), [(4, 5, 3), (4, 5), (4, 5, 2, 2)]),
}  # fmt: skip


def steps(nn, layer, shape, dtype, channels_last=False):
    """Output, gradient and strides, in training and in evaluation mode."""
    results = [repr(layer)]
    for mode in (True, False):
        layer.train(mode)
        x = torch.randn(shape).to(dtype)
        x = in_format(x, channels_last).requires_grad_()
        h = nn.functional.leaky_relu(x, 1.0)
        y = layer(h)
        y.backward(torch.randn(y.shape).to(dtype))
        fn = y.grad_fn
        if "CopySlices" not in fn.name():  # its next_functions come in another order
            results.append(fn.next_functions[0][0].name())
        results += [fn.name(), y is h, y, x, y.stride()]
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
@parity
def test_layer(nn, optim, name, dtype):
    make, shapes = LAYERS[name]
    return [steps(nn, make(nn), shape, dtype) for shape in shapes]


@pytest.mark.parametrize(
    "name", [name for name, (_, shapes) in LAYERS.items() if len(shapes[0]) in (4, 5)]
)
@parity
def test_layer_of_channels_last(nn, optim, name):
    make, shapes = LAYERS[name]
    return [
        steps(nn, make(nn), shape, torch.float32, True) for shape in shapes if len(shape) in (4, 5)
    ]


@pytest.mark.parametrize("name", LAYERS)
@parity
def test_second_derivatives(nn, optim, name):
    make, (shape, *_) = LAYERS[name]
    layer = make(nn)
    x = torch.randn(shape, requires_grad=True)
    y = layer(nn.functional.tanh(x))
    (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    (dx * dx).sum().backward()
    return dx, x


@pytest.mark.parametrize("name", [n for n in LAYERS if "Dropout" not in n])
def test_first_and_second_derivatives_by_finite_differences(name):
    """First and second derivatives against central differences, independently of PyTorch."""
    make, (shape, *_) = LAYERS[name]
    layer, x = make(nnmirror), nnmirror.Parameter(torch.randn(shape, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_driven_by_hand(name):
    """`layer.backward(g)` gives the input's gradient, also for an input that requires no grad."""
    make, (shape, *_) = LAYERS[name]
    layer, x = make(nnmirror), torch.randn(shape)
    torch.manual_seed(0)
    y = layer.forward(x)
    assert not y.requires_grad
    g = torch.randn(y.shape)
    dx = layer.backward(g)
    leaf = nnmirror.Parameter(x)
    torch.manual_seed(0)
    layer(leaf).backward(g)
    assert torch.equal(dx, leaf.grad)
    if layer.eval().training is False and "ropout" in name:
        assert layer.forward(x) is x
        assert layer.backward(x) is x


@pytest.mark.parametrize(
    "kind", ["dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]
)
@pytest.mark.parametrize("batched", [True, False])
@parity
def test_dropout_in_place(nn, optim, kind, batched):
    n = int(kind[-2]) if kind.endswith("d") else 2
    shape = (3, 4, *[2] * n)[0 if batched else 1 :]
    x = torch.randn(shape, requires_grad=True)
    h = nn.functional.leaky_relu(x, 1.0)
    y = getattr(nn.functional, kind)(h, 0.4, True, inplace=True)
    (y * y).sum().backward()
    z = getattr(nn.functional, kind)(torch.ones(shape), 0.4, True, True)
    return y, x, h, y is h, y.grad_fn.name(), z


@pytest.mark.parametrize("n", [1, 2, 3])
@parity
def test_dropout_module_in_place(nn, optim, n):
    layer = getattr(nn, f"Dropout{n}d")(0.5, inplace=True)
    x = torch.randn((3, 4, *[2] * n), requires_grad=True)
    net = nn.Sequential(nn.LeakyReLU(), layer)
    y = net(x)
    y.sum().backward()
    plain = torch.ones(3, 4, *[2] * n)
    return y, x, layer(plain) is plain, plain, net.eval()(x), repr(net)


@parity
def test_functions_of_torch(nn, optim):
    x = torch.randn(2, 4, 4, 2, requires_grad=True)
    h = nn.functional.leaky_relu(x, 0.5)
    names = ["feature_dropout", "alpha_dropout", "feature_alpha_dropout"]
    results = [getattr(torch, name)(h, 0.5, True) for name in names]
    results += [getattr(torch, f"{name}_")(h * 1, 0.5, True) for name in names]
    results += [torch.pixel_shuffle(h, 2), torch.pixel_unshuffle(h, 2), torch.channel_shuffle(h, 2)]
    results += [
        torch.nn.functional.dropout2d(h),
        torch.nn.functional.pixel_shuffle(h, upscale_factor=1),
    ]
    results += [
        torch.nn.functional.alpha_dropout(h, 0.1, True),
        torch.nn.functional.channel_shuffle(h, groups=4),
    ]
    sum((r * r).sum() for r in results).backward()
    return results, x


@parity
def test_a_net_of_them_trains(nn, optim):
    net = nn.Sequential(
        nn.ReflectionPad2d(1), nn.PixelUnshuffle(2), nn.BatchNorm2d(8), nn.Dropout2d(0.2), nn.ChannelShuffle(2),
        nn.PixelShuffle(2), nn.CircularPad2d((1, 0, 0, 1)), nn.Softmax2d(), nn.AlphaDropout(0.1), nn.ZeroPad2d(-1),
        nn.Flatten(), nn.Linear(18, 3),
    )  # fmt: skip
    results = trained(nn, optim, net, torch.randn(4, 2, 2, 2), torch.randn(4, 3), momentum=0.9)
    return results, repr(net), net.state_dict(), net.eval()(torch.randn(2, 2, 2, 2))


# Name: mode, input shape, arguments, and the units in the last place by which gradients may differ.
INTERPOLATIONS = {
    **{
        f"{mode}, {way}": (mode, shape, how, units)
        for mode, shape, units in [
            ("nearest", (2, 3, 5), 0), ("nearest", (2, 3, 4, 5), 0), ("nearest", (2, 2, 3, 2, 4), 0),
            ("nearest-exact", (2, 3, 5), 0), ("nearest-exact", (2, 3, 4, 5), 0), ("nearest-exact", (2, 2, 3, 2, 4), 0),
            ("linear", (2, 3, 5), 16), ("bilinear", (2, 3, 4, 5), 16), ("trilinear", (2, 2, 3, 2, 4), 16), ("bicubic", (2, 3, 4, 5), 16),
        ]
        for way, how in {
            f"{len(shape) - 2}d twice": {"scale_factor": 2},
            f"{len(shape) - 2}d by a fraction": {"scale_factor": tuple([1.7, 0.6, 2.0][: len(shape) - 2])},
            f"{len(shape) - 2}d to a size": {"size": tuple([7, 3, 5][: len(shape) - 2])},
            f"{len(shape) - 2}d by five": {"scale_factor": 5.3, "recompute_scale_factor": True},
        }.items()
    },
    # PyTorch's kernels round the places to float32, and ignore a factor that gives the same or twice the size.
    "nearest, 2d by others": ("nearest", (2, 3, 3, 5), {"scale_factor": (2.3, 1.1)}, 0),
    "nearest, 2d rounded": ("nearest", (2, 4, 2, 14), {"size": (3, 46)}, 0),
    "nearest-exact, 2d rounded": ("nearest-exact", (2, 4, 2, 4), {"size": (3, 41)}, 0),
    "bilinear, smoothed": ("bilinear", (2, 3, 9, 8), {"size": (4, 11), "antialias": True}, 16),
    "bicubic, smoothed": ("bicubic", (2, 3, 9, 8), {"scale_factor": 0.4, "antialias": True}, 16),
    "lanczos, smoothed": ("lanczos", (2, 3, 9, 8), {"size": 5, "antialias": True}, 16),
    "area": ("area", (2, 3, 5, 4), {"size": (3, 7)}, 0),
    "area, by a factor": ("area", (2, 3, 6), {"scale_factor": 0.5}, 0),
    "area of volumes": ("area", (2, 3, 4, 2, 5), {"scale_factor": 1.5}, 0),
    "bilinear of nothing": ("bilinear", (0, 3, 2, 2), {"size": 3}, 0),
}  # fmt: skip


def interpolated(nn, name, dtype=torch.float32):
    """Results with and without align_corners, contiguous and channels_last."""
    mode, shape, how, _ = INTERPOLATIONS[name]
    results = []
    for corners in (None,) if mode.startswith(("nearest", "lanczos", "area")) else (None, True):
        for channels_last in (False, True) if len(shape) > 3 else (False,):
            x = in_format(torch.randn(shape).to(dtype), channels_last).requires_grad_()
            y = nn.functional.interpolate(x, mode=mode, align_corners=corners, **how)
            y.backward(in_format(torch.randn(y.shape).to(dtype), channels_last))
            results += [y, x, y.stride(), y.grad_fn.name()]
    return results


@pytest.mark.parametrize("name", [n for n, (*_, units) in INTERPOLATIONS.items() if not units])
@parity
def test_interpolate(nn, optim, name):
    return [interpolated(nn, name, dtype) for dtype in DTYPES]


@pytest.mark.parametrize("name", [n for n, (*_, units) in INTERPOLATIONS.items() if units])
@parity
@off_by(16)
def test_interpolate_nearly(nn, optim, name):
    kinds = DTYPES[:2] if "smoothed" in name else DTYPES
    return [interpolated(nn, name, dtype) for dtype in kinds]


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_gradients_of_interpolate_by_finite_differences(name):
    """The gradients of `interpolate` against central differences in float64."""
    mode, shape, how, _ = INTERPOLATIONS[name]
    x = nnmirror.Parameter(torch.randn(shape, dtype=torch.float64))

    def function(x):
        return nnmirror.functional.interpolate(x, mode=mode, **how)

    if x.numel():
        assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


# Where some of PyTorch's kernels take other elements than its backward does.
UNEVEN = [
    ((1, 2, 3), {"scale_factor": 2.3}), ((1, 4, 2, 2, 3), {"scale_factor": (1.3, 2.0, 2.3)}), ((1, 2, 2, 14), {"size": (140, 46)}),
    ((1, 2, 2, 5), {"scale_factor": (70.0, 1.1)}), ((1, 8, 32, 80), {"scale_factor": (2.0, 2.005)}), ((1, 8, 14, 80), {"size": (46, 150)}),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "how"), UNEVEN)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_gradient_goes_to_the_elements_that_were_taken(dtype, shape, how):
    """The outputs are PyTorch's, whichever kernel it uses, and both derivatives belong to them."""
    for channels_last in (False, True) if len(shape) > 3 else (False,):
        x = in_format(torch.randn(shape, dtype=dtype), channels_last)
        places = torch.empty_like(x).copy_(torch.arange(x[0, 0].numel()).view(shape[2:]))
        x, h = nnmirror.Parameter(x), torch.randn_like(x)
        y = nnmirror.functional.interpolate(x, **how)
        assert torch.equal(y.detach(), torch.nn.functional.interpolate(x.detach(), **how))
        taken = torch.nn.functional.interpolate(places, **how)[0, 0].long().flatten()
        g = nnmirror.Parameter(torch.randn(y.shape, dtype=dtype))
        (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
        expected = torch.zeros(shape, dtype=dtype).flatten(2)
        expected.index_add_(2, taken, g.detach().flatten(2))
        torch.testing.assert_close(dx.detach(), expected.view(shape))
        (dg,) = torch.autograd.grad(dx, g, h)
        assert torch.equal(dg.flatten(2), h.flatten(2)[:, :, taken])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "lanczos"])
def test_a_factor_that_leaves_a_size_as_it_is(mode):
    """PyTorch's forward does not smooth along it, but its backward does."""
    x = nnmirror.Parameter(torch.randn(1, 2, 6, 4, dtype=torch.float64))

    def function(x):
        return nnmirror.functional.interpolate(x, scale_factor=1.2, mode=mode, antialias=True)

    assert torch.autograd.gradcheck(function, (x,), fast_mode=True)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@parity
@off_by(64)
def test_interpolate_second_derivatives(nn, optim, mode):
    x = torch.randn(2, 2, 3, 4, requires_grad=True)
    y = nn.functional.interpolate(nn.functional.tanh(x), scale_factor=2, mode=mode)
    (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (dx * dx).sum().backward()
    return dx, x


@parity
@off_by(64)
def test_upsampling_modules(nn, optim):
    x = torch.randn(2, 3, 4, 4)
    layers = [
        nn.Upsample(scale_factor=2), nn.Upsample(size=(3, 7), mode="bilinear", align_corners=True), nn.Upsample(6, mode="bicubic"),
        nn.UpsamplingNearest2d(scale_factor=(2, 3)), nn.UpsamplingBilinear2d(size=7), nn.Upsample(scale_factor=1.5, recompute_scale_factor=True),
    ]  # fmt: skip
    net = nn.Sequential(nn.Upsample(scale_factor=2), nn.Flatten(), nn.Linear(192, 2))
    results = [driven(layer, x)[2:] for layer in layers]
    return results, repr(layers), trained(nn, optim, net, x, torch.randn(2, 2)), repr(net)


@parity
@off_by(64)
def test_interpolate_of_torch(nn, optim):
    """torch.nn.functional and torch._C._nn called on tracked tensors, and the deprecated names."""
    F = nn.functional
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    h = F.leaky_relu(x, 0.5)
    results = [
        torch.nn.functional.interpolate(h, scale_factor=2.0), torch.nn.functional.interpolate(h, 7, mode="bilinear"),
        F.upsample(h, scale_factor=2), F.upsample_nearest(h, 5), F.upsample_bilinear(h, scale_factor=2),
        torch._C._nn.upsample_nearest2d(h, None, [2.0, 2.0]), torch._C._nn.upsample_bilinear2d(h, [6, 6], False),
        torch._C._nn.upsample_bicubic2d(h, [6, 6], True, 1.5, 1.5), F.interpolate(h[0], size=6, mode="linear"),
    ]  # fmt: skip
    sum((r * r).sum() for r in results).backward()
    return results, x


IMAGE = torch.ones(1, 1, 3, 3)
INTERPOLATE_ERRORS = {
    "no size": lambda F: F.interpolate(IMAGE),
    "both": lambda F: F.interpolate(IMAGE, 3, 2.0),
    "sizes": lambda F: F.interpolate(IMAGE, size=(3,)),
    "factors": lambda F: F.interpolate(IMAGE, scale_factor=(3.0, 2.0, 1.0)),
    "float size": lambda F: F.interpolate(IMAGE, size=(3.0, 2.0)),
    "float number": lambda F: F.interpolate(IMAGE, size=3.5),
    "corners of nearest": lambda F: F.interpolate(IMAGE, 3, align_corners=True),
    "smooth nearest": lambda F: F.interpolate(IMAGE, 3, antialias=True),
    "2d": lambda F: F.interpolate(torch.ones(3, 3), 3),
    "linear of images": lambda F: F.interpolate(IMAGE, 3, mode="linear"),
    "bicubic of volumes": lambda F: F.interpolate(IMAGE[None], 3, mode="bicubic"),
    "trilinear of images": lambda F: F.interpolate(IMAGE, 3, mode="trilinear"),
    "mode": lambda F: F.interpolate(IMAGE, 3, mode="best"),
    "recomputed": lambda F: F.interpolate(IMAGE, 3, recompute_scale_factor=True),
    "lanczos": lambda F: F.interpolate(IMAGE, 3, mode="lanczos"),
    "to nothing": lambda F: F.interpolate(IMAGE, 0),
    "by nothing": lambda F: F.interpolate(IMAGE, scale_factor=0.1),
    "no channels": lambda F: F.interpolate(torch.ones(1, 0, 3, 3), 2),
    "integers": lambda F: F.interpolate(torch.ones(1, 1, 3, 3, dtype=torch.long), 2),
    "none": lambda F: F.interpolate(None, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERPOLATE_ERRORS)
@parity
def test_interpolate_errors(nn, optim, name):
    return INTERPOLATE_ERRORS[name](nn.functional)


ERRORS = {
    "pad too wide": lambda nn: nn.ReflectionPad2d(5)(torch.ones(1, 1, 3, 3)),
    "pad of too few": lambda nn: nn.ReplicationPad2d(1)(torch.ones(3)),
    "constant pad of too few": lambda nn: nn.ConstantPad2d(1, 0.0)(torch.ones(3)),
    "circular of another dimension": lambda nn: nn.CircularPad1d(1)(torch.ones(2, 2, 3, 3)),
    "circular too wide": lambda nn: nn.CircularPad1d(4)(torch.ones(2, 2, 3)),
    "pad below nothing": lambda nn: nn.ZeroPad1d(-3)(torch.ones(2, 2, 3)),
    "pad of strings": lambda nn: nn.ZeroPad1d("ab")(torch.ones(2, 2, 3)),
    "pad of a list": lambda nn: nn.ZeroPad2d(1)([1.0]),
    "pad of none": lambda nn: nn.ReflectionPad1d(1)(None),
    "shuffle of wrong channels": lambda nn: nn.PixelShuffle(2)(torch.ones(1, 3, 2, 2)),
    "shuffle of too few": lambda nn: nn.PixelShuffle(2)(torch.ones(4, 2)),
    "shuffle by zero": lambda nn: nn.PixelShuffle(0)(torch.ones(1, 4, 2, 2)),
    "shuffle by a float": lambda nn: nn.PixelShuffle(2.0)(torch.ones(1, 4, 2, 2)),
    "shuffle of a list": lambda nn: nn.PixelShuffle(2)([1.0]),
    "unshuffle of wrong sizes": lambda nn: nn.PixelUnshuffle(2)(torch.ones(1, 1, 3, 2)),
    "channels in wrong groups": lambda nn: nn.ChannelShuffle(2)(torch.ones(1, 3, 2, 2)),
    "channels of too few": lambda nn: nn.ChannelShuffle(2)(torch.ones(4, 2)),
    "response of too few": lambda nn: nn.LocalResponseNorm(2)(torch.ones(2, 3)),
    "softmax of another dimension": lambda nn: nn.Softmax2d()(torch.ones(2, 3)),
    "dropout1d of another dimension": lambda nn: nn.Dropout1d()(torch.ones(2, 3, 4, 5)),
    "dropout2d of a vector": lambda nn: nn.Dropout2d()(torch.ones(3)),
    "dropout2d in place on a leaf": lambda nn: nn.Dropout2d(inplace=True)(torch.ones(2, 3, 4, 5, requires_grad=True)),
    "dropout2d of integers": lambda nn: nn.Dropout2d()(torch.ones(2, 3, 4, 5, dtype=torch.long)),
    "probability": lambda nn: nn.AlphaDropout(1.5),
    "probability of a function": lambda nn: nn.functional.feature_alpha_dropout(torch.ones(2, 3), -1.0, True),
    "alpha dropout of none": lambda nn: nn.functional.alpha_dropout(None),
    "dropout2d of none": lambda nn: nn.functional.dropout2d(None),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_errors(nn, optim, name):
    return ERRORS[name](nn)
