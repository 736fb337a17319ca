"""Convolutions: outputs, gradients, initial weights and error messages as in PyTorch.

In float64 PyTorch multiplies matrices itself, and the gradients have its bits. In float32 oneDNN
adds in an order of its own (see nnmirror/rules/convolution.py): the gradients of weight and bias
are close.
"""

import pytest
import torch

import nnmirror

from .parity import cpu_only, parity
from .test_create_graph import near
from .test_layers import driven

NEAR = 64  # units in the last place of the largest number
F64 = torch.float64
WAYS = {
    "plain": {},
    "one by one": {"kernel_size": 1},
    "strided": {"stride": 2, "padding": 1},
    "beyond the kernel": {"stride": 3},
    "dilated": {"dilation": 2, "padding": 2},
    "all": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "kernel_size": 2},
    "by channel": {"groups": 4, "padding": 1},
    "without bias": {"bias": False},
    "each its own": {"kernel_size": (3, 2, 1), "stride": (1, 2, 3), "padding": (0, 1, 0)},
    "lists of one": {"stride": [2], "padding": [1], "dilation": [1]},
    "same": {"padding": "same", "dilation": 2},
    "same, even": {"padding": "same", "kernel_size": 2},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": "same", "padding_mode": "replicate"},
    "circular": {"padding": (2, 1, 0), "padding_mode": "circular"},
}
TRANSPOSED = {
    **{name: how for name, how in WAYS.items() if not isinstance(how.get("padding"), str)},
    "output_padding": {"stride": 2, "output_padding": 1},
    "more of it": {"stride": 3, "output_padding": (2, 1, 0), "groups": 2},
}
for _name in ("reflect", "circular", "dilated"):  # PyTorch adds dilated ones in another order
    del TRANSPOSED[_name]


def made(nn, kind, n, how, dtype=F64):
    how = {"kernel_size": 3, **how}
    how = {key: v[:n] if isinstance(v, tuple) else v for key, v in how.items()}
    return getattr(nn, f"{kind}{n}d")(4, 8, dtype=dtype, **how)


def planes(n, batch=2, dtype=F64, channels=4):
    return torch.randn(batch, channels, *(9, 7, 6)[:n], dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("one_thread")
@parity
def test_convolutions(nn, optim, way, n):
    layer = made(nn, "Conv", n, WAYS[way])
    return driven(layer, planes(n)), driven(layer, planes(n)[0]), repr(layer), layer.state_dict()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("way", TRANSPOSED)
@pytest.mark.usefixtures("one_thread")
@parity
def test_transposed(nn, optim, way, n):
    layer = made(nn, "ConvTranspose", n, TRANSPOSED[way])
    return driven(layer, planes(n)), driven(layer, planes(n)[0]), repr(layer), layer.state_dict()


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@near(NEAR)
def test_other_dtypes(nn, optim, dtype, kind):
    results = []
    for batch, way in ((3, "plain"), (3, "all"), (3, "by channel"), (17, "strided"), (1, "plain")):
        layer = made(nn, kind, 2, WAYS[way], dtype)
        results.append(driven(layer, planes(2, batch, dtype)))
    results += [driven(made(nn, kind, n, {}, dtype), planes(n, 2, dtype)) for n in (1, 3)]
    return results


@parity
def test_single_small_images_in_float32(nn, optim):
    """For these PyTorch does not use oneDNN, so every bit is the same."""
    layers = nn.Conv2d(4, 8, 3), nn.Conv1d(4, 8, 2, padding=1), nn.ConvTranspose2d(4, 8, 3)
    return [driven(m, torch.randn(1, 4, *(8, 7)[: m.weight.dim() - 2])) for m in layers]


@pytest.mark.parametrize("threads", [1, 2])
@near(NEAR)
def test_sizes(nn, optim, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for size, made in (
            ((32, 1, 28, 28), nn.Conv2d(1, 6, 5)),
            ((32, 6, 12, 12), nn.Conv2d(6, 16, 5)),
            ((4, 32, 16, 16), nn.Conv2d(32, 32, 3, padding=1)),
            ((8, 16, 64), nn.Conv1d(16, 16, 5, dilation=2)),
            ((37, 2, 60, 60), nn.Conv2d(2, 4, 3, stride=2, padding=1)),
            ((37, 2, 30, 30), nn.Conv2d(2, 16, 3)),
            ((8, 16, 7, 7), nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)),
            ((16, 24, 12, 12), nn.Conv2d(24, 40, 1)),
            ((16, 48, 13, 13), nn.Conv2d(48, 96, 1, stride=2)),
            ((16, 8, 9), nn.Conv1d(8, 16, 1, stride=4)),
            ((8, 16, 7, 7), nn.ConvTranspose2d(16, 8, 1, stride=2, output_padding=1)),
            ((4, 8, 3, 5, 6), nn.Conv3d(8, 16, 1, stride=(1, 2, 3))),
        ):
            results.append(driven(made, torch.randn(size)))
        layer = nn.Conv2d(16, 24, 1, stride=2).to(memory_format=torch.channels_last)
        x = torch.randn(16, 16, 10, 10).to(memory_format=torch.channels_last)
        results.append(driven(layer, x))
        return results
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("way", ["plain", "strided", "all", "by channel", "each its own"])
@pytest.mark.parametrize("n", [1, 2])
@parity
def test_second_and_third_derivatives(nn, optim, n, way, kind):
    layer, x = made(nn, kind, n, WAYS[way]), nn.Parameter(planes(n))
    leaves = [x, *layer.parameters()]
    y = layer(x)
    first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
    names = [g.grad_fn.name() for g in first]
    second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves, create_graph=True)
    third = torch.autograd.grad(second[0].sum(), leaves[1], allow_unused=True)
    return y, first, names, second, third


@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_gradients_by_finite_differences(n, kind):
    """Finite differences in float64: a check that does not depend on PyTorch."""
    torch.manual_seed(0)
    more = {"output_padding": 1} if kind == "conv_transpose" else {}

    def function(x, w, b):
        named = getattr(nnmirror.functional, f"{kind}{n}d")
        return named(x, w, b, stride=2, padding=1, groups=2, **more)

    x = nnmirror.Parameter(torch.randn(2, 2, *(3, 2, 2)[:n], dtype=F64))
    w = nnmirror.Parameter(torch.randn(2, 1, *(3, 2, 1)[:n], dtype=F64))
    b = nnmirror.Parameter(torch.randn(2, dtype=F64))
    assert torch.autograd.gradcheck(function, (x, w, b))
    assert torch.autograd.gradgradcheck(function, (x, w, b), fast_mode=True)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@near(NEAR)
def test_channels_last(nn, optim, dtype):
    """The output and its gradients have the memory format of the input or of the weight."""
    results = []
    for of_x, of_w in ((True, False), (False, True), (True, True)):
        layer = nn.Conv2d(4, 8, 3, dtype=dtype)
        layer = layer.to(memory_format=torch.channels_last) if of_w else layer
        x = planes(2, 3, dtype)
        x = x.to(memory_format=torch.channels_last) if of_x else x
        x.requires_grad_()
        h = nn.functional.leaky_relu(x, 1.0)
        y = layer(h)
        (dh,) = torch.autograd.grad(y.flatten(1).pow(2).sum(), h, retain_graph=True)
        y.flatten(1).pow(2).sum().backward()
        results.append((y, y.stride(), dh, dh.stride(), x.grad.stride(), layer.weight.grad))
    layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    layer.reset_parameters()
    return results, layer.weight


@parity
def test_output_size(nn, optim):
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, dtype=F64)
    x = planes(2, channels=2)
    results = [layer(x, output_size=size) for size in ([17, 14], [2, 3, 18, 13])]
    results.append(layer(x[0], output_size=[17, 14]))
    for size in ([19, 14], [17], [17, 14, 3]):
        with pytest.raises(ValueError) as error:
            layer(x, output_size=size)
        results.append(str(error.value))
    return results


@parity
def test_empty_batches(nn, optim):
    results = []
    for n in (1, 2, 3):
        for kind in ("Conv", "ConvTranspose"):
            results.append(driven(made(nn, kind, n, {"groups": 2}), planes(n)[:0]))
    return results


@parity
def test_empty_output(nn, optim):
    """The output is empty: the padding removes all that the transposed convolution computes."""
    how = {"kernel_size": 2, "padding": (1, 0)}
    return driven(made(nn, "ConvTranspose", 2, how), planes(2)[:, :, :1])


@parity
def test_initial_weights_and_init_functions(nn, optim):
    layers = [
        made(nn, kind, n, {"groups": 2}) for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)
    ]
    gains = [nn.init.calculate_gain(f"conv{t}{n}d") for t in ("", "_transpose") for n in (1, 2, 3)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    fans = [nn.init._calculate_fan_in_and_fan_out(layer.weight) for layer in layers]
    drawn = [nn.init.xavier_uniform_(made(nn, "Conv", 2, {}).weight)]
    drawn.append(nn.init.dirac_(made(nn, "Conv", 2, {}).weight, 2))
    return [m.state_dict() for m in layers], gains, fans, drawn


@parity
def test_frozen_parts_and_shared_weights(nn, optim):
    layer, x = made(nn, "Conv", 2, {"padding": 1, "bias": False}), planes(2)
    tied = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=F64))
    y = nn.functional.conv2d(nn.functional.conv2d(x, tied, padding=1).relu(), tied)
    y.sum().backward()
    layer.weight.requires_grad_(False)
    z = driven(layer, x)
    bias = nn.Parameter(torch.randn(8, dtype=F64))
    only = nn.functional.conv2d(x, layer.weight, bias)
    only.sum().backward()
    return tied, z, bias, only.grad_fn.next_functions[0], len(only.grad_fn.next_functions)


@near(NEAR)
def test_a_small_net_trains(nn, optim):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
            self.second = nn.Conv2d(4, 4, 3, padding="same")
            self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
            self.out = nn.Linear(2 * 16 * 16, 3)

        def forward(self, x):
            h = self.first(x)
            h = torch.relu(h + self.second(h))
            return self.out(self.up(h).flatten(1))

    model, losses = Block(), []
    optimizer, x = optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.randn(6, 1, 8, 8)
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, repr(model)


@parity
def test_user_defined_subclasses(nn, optim):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
            return self._conv_forward(x, w, self.bias)

    class Twice(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight * 2, bias)

    return [driven(cls(4, 8, 3, dtype=F64), planes(2)) for cls in (Standardised, Twice)]


def test_backward_by_hand():
    """A backward by hand, also where nothing requires grad; a tuple of images is a batch."""
    torch.manual_seed(0)
    layer, x = nnmirror.Conv2d(4, 8, 3, padding=1, dtype=F64), planes(2)
    y = layer.forward(x)
    dx = layer.backward(torch.ones_like(y))
    leaf = nnmirror.Parameter(x)
    layer(leaf).sum().backward()
    assert torch.equal(leaf.grad, dx)
    assert torch.equal(torch.stack(layer.forward(tuple(x))), y)
    assert torch.equal(torch.stack(layer.backward(tuple(torch.ones_like(y)))), dx)
    assert torch.equal(torch.stack(layer.forward((x, x))), torch.stack([y, y]))
    single = layer.forward(x[0])
    assert torch.equal(layer.backward(torch.ones_like(single)), dx[0])


def test_conversion_round_trip():
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        torch.nn.ConvTranspose2d(4, 2, 2),
    )
    mine = nnmirror.from_torch(theirs)
    x = torch.randn(2, 1, 5, 5)
    assert torch.equal(mine(x), theirs(x))
    assert mine[0].weight.data_ptr() == theirs[0].weight.data_ptr()
    assert repr(nnmirror.to_torch(mine)) == repr(theirs) == repr(mine)


@parity
def test_complex_numbers_and_vmap(nn, optim):
    w = torch.randn(2, 3, 2, 2, dtype=torch.complex64)
    x = torch.randn(1, 3, 4, 4, dtype=torch.complex64)
    plain = torch.randn(5, 1, 3, 4, 4)
    batched = torch.func.vmap(lambda t: nn.functional.conv2d(t, w.real))(plain)
    return nn.functional.conv2d(x, w), batched


WRONG = {
    "dimensions": lambda F, x, w: F.conv2d(x[0, 0], w),
    "too many": lambda F, x, w: F.conv1d(x, w),
    "channels": lambda F, x, w: F.conv2d(x[:, :1], w),
    "bias": lambda F, x, w: F.conv2d(x, w, x[0, 0, 0]),
    "bias dtype": lambda F, x, w: F.conv2d(x, w, torch.ones(8)),
    "dtypes": lambda F, x, w: F.conv2d(x.float(), w),
    "kernel too large": lambda F, x, w: F.conv2d(x[..., :2], w),
    "stride of zero": lambda F, x, w: F.conv2d(x, w, stride=0),
    "negative padding": lambda F, x, w: F.conv2d(x, w, padding=-1),
    "dilation of zero": lambda F, x, w: F.conv2d(x, w, dilation=0),
    "groups": lambda F, x, w: F.conv2d(x, w, groups=3),
    "groups of zero": lambda F, x, w: F.conv2d(x, w, groups=0),
    "three strides": lambda F, x, w: F.conv2d(x, w, None, [1, 1, 1]),
    "a float": lambda F, x, w: F.conv2d(x, w, stride=1.5),
    "a string": lambda F, x, w: F.conv2d(x, w, padding="some"),
    "same, strided": lambda F, x, w: F.conv2d(x, w, stride=2, padding="same"),
    "same, channels": lambda F, x, w: F.conv2d(x[:, :1], w[..., :2], padding="same"),
    "same, channels of one": lambda F, x, w: F.conv2d(x[0, :1], w[..., :2], padding="same"),
    "no weight": lambda F, x, w: F.conv2d(x),
    "a list": lambda F, x, w: F.conv2d([1.0], w),
    "unknown": lambda F, x, w: F.conv2d(x, w, strides=2),
    "integers": lambda F, x, w: F.conv2d(x.long(), w.long()),
    "output_padding": lambda F, x, w: F.conv_transpose2d(x, w.transpose(0, 1), output_padding=3),
    "transposed channels": lambda F, x, w: F.conv_transpose2d(x, w),
    "transposed same": lambda F, x, w: F.conv_transpose2d(x, w.transpose(0, 1), padding="same"),
}


@pytest.mark.parametrize("name", WRONG)
@parity
@cpu_only("the messages of other devices' kernels differ")
def test_wrong_arguments(nn, optim, name):
    x, w = nn.Parameter(planes(2)), nn.Parameter(torch.randn(8, 4, 3, 3, dtype=F64))
    return WRONG[name](nn.functional, x, w)


WRONG_LAYERS = {
    "groups": lambda nn: nn.Conv2d(4, 8, 3, groups=0),
    "in_channels": lambda nn: nn.Conv2d(5, 8, 3, groups=2),
    "out_channels": lambda nn: nn.Conv2d(4, 9, 3, groups=2),
    "padding": lambda nn: nn.Conv2d(4, 8, 3, padding="all").weight,
    "same, strided": lambda nn: nn.Conv2d(4, 8, 3, stride=2, padding="same"),
    "transposed mode": lambda nn: nn.ConvTranspose2d(4, 8, 3, padding_mode="reflect"),
    "dtype": lambda nn: nn.Conv2d(4, 8, 3)(planes(2)),
    "no tensor": lambda nn: nn.Conv2d(4, 8, 3)([1.0]),
    "reflect too far": lambda nn: nn.Conv1d(4, 8, 3, padding=9, padding_mode="reflect").double()(planes(1)),
    "dimensions": lambda nn: nn.Conv2d(4, 8, 3).double()(planes(3)),
    "missing": lambda nn: nn.Conv2d(4, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_LAYERS)
@parity
@cpu_only("the messages of other devices' kernels differ")
def test_wrong_layers(nn, optim, name):
    WRONG_LAYERS[name](nn)
