"""Layers for images that have no weights: a user would lose the bits, the draws or the shapes."""

import warnings

import pytest
import torch

import nnmirror

from .parity import parity, trained
from .test_layers import DTYPES
from .test_norm_layers import in_format

PADS = {1: (2, 1), 2: (1, 2, 0, 3), 3: (1, 2, 0, 1, 1, 0)}
SHAPES = {1: (2, 3, 4), 2: (2, 3, 4, 5), 3: (2, 2, 3, 4, 5)}
# Name: how it is made, and the shapes that it is called on.
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
    """Output, gradient and layouts, in training and in evaluation."""
    results = [repr(layer)]
    for mode in (True, False):
        layer.train(mode)
        x = torch.randn(shape).to(dtype)
        x = in_format(x, channels_last).requires_grad_()
        h = nn.functional.leaky_relu(x, 1.0)
        y = layer(h)
        y.backward(torch.randn(y.shape).to(dtype))
        fn = y.grad_fn
        if "CopySlices" not in fn.name():  # which goes on in another order
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
def test_slopes_and_their_slopes(name):
    """Central differences in float64: PyTorch is not the only witness."""
    make, (shape, *_) = LAYERS[name]
    layer, x = make(nnmirror), nnmirror.Parameter(torch.randn(shape, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_driven_by_hand(name):
    """The gradient of a layer on its own, also for an input that requires none."""
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
def test_by_torchs_names(nn, optim):
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
