"""Dropout, norm layers, Embedding and PReLU: a user would get other bits, buffers or masks."""

import copy

import pytest
import torch

import nnmirror

from .parity import off_by, parity, trained
from .test_layers import DTYPES, SPECIAL, driven

# -- Dropout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (5, 3), (0, 3), (2, 5, 3), (64, 33)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0, 1])
@parity
def test_dropout(nn, optim, p, shape, dtype):
    """The same mask from the same seed; `parity` compares the generator's state too."""
    layer, x = nn.Dropout(p), torch.randn(shape).to(dtype)
    if p == 0 or not x.numel():
        x.requires_grad_()
        y = layer(x)
        return y is x, layer.eval()(x) is x
    return driven(layer, x), driven(layer, x)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@parity
def test_dropout_in_place(nn, optim, p):
    layer, x = nn.Dropout(p, inplace=True), torch.randn(4, 5, requires_grad=True)
    net = nn.Sequential(nn.LeakyReLU(1.0), layer)
    hidden = nn.functional.leaky_relu(x, 1.0)
    y = layer(hidden)
    y.sum().backward()
    return driven(net, x), y is hidden, hidden, x, repr(net), driven(net.eval(), x)


@parity
def test_dropout_saves_its_mask_alone(nn, optim):
    x = torch.randn(4, 5, requires_grad=True)
    h = nn.functional.leaky_relu(x, 1.0)
    y = nn.functional.dropout(h)
    z = nn.functional.dropout(y)
    h.mul_(2)
    z.sum().backward()
    return y, z, x, y.grad_fn.next_functions[1], len(y.grad_fn.next_functions)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
@parity
def test_dropout_draws_in_the_order_of_memory(nn, optim, order):
    x = torch.randn(4, 5, 6).permute(*order)
    results = [driven(nn.Dropout(), x), driven(nn.Dropout(), x[:, ::2])]
    results.append(driven(nn.Dropout(), x[:1].expand(3, *x.shape[1:])))
    return results, [r[2].stride() for r in results]


@parity
def test_dropout_special_values(nn, optim):
    x = torch.tensor(SPECIAL)
    return [driven(nn.Dropout(p), x) for p in (0.5, 1.0)]


@parity
def test_dropout_without_gradients(nn, optim):
    layer, x = nn.Dropout(0.4), torch.randn(6, requires_grad=True)
    with torch.no_grad():
        y = layer(x)
        z = nn.functional.dropout(x, inplace=True)
    return y, z is x, layer(torch.ones(6)), nn.functional.dropout(torch.ones(6, dtype=torch.double))


@parity
def test_dropout_in_training_and_evaluation(nn, optim):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(inplace=True),
        nn.Linear(8, 2),
    )  # fmt: skip
    x, t = torch.randn(5, 3), torch.randn(5, 2)
    results = [trained(nn, optim, net, x, t), net.eval()(x), trained(nn, optim, net, x, t)]
    return results, net.train()(x), repr(net), net.state_dict()


@pytest.mark.parametrize("name", ["dropout", "dropout_"])
@parity
def test_dropout_of_torch(nn, optim, name):
    x = torch.randn(4, 3, requires_grad=True)
    h = nn.functional.leaky_relu(x, 1.0)
    f = getattr(torch, name)
    results = [f(h, 0.5, True), f(h, p=0.5, train=False), torch.nn.functional.dropout(h, 0.2)]
    sum(r.sum() for r in results).backward()
    return results, x, results[1] is h


def test_dropout_driven_by_hand():
    """forward and backward called directly, on an input that requires no grad and on a tuple."""
    layer = nnmirror.Dropout(0.5)
    x = torch.randn(4, 6)
    torch.manual_seed(0)
    y = layer.forward(x)
    dx = layer.backward(torch.ones(4, 6))
    assert torch.equal(y, x * dx)
    torch.manual_seed(0)
    assert torch.equal(torch.stack(layer.forward(tuple(x))), y)
    assert torch.equal(torch.stack(layer.backward(tuple(torch.ones(4, 6)))), dx)
    layer.eval()
    assert layer.forward(x) is x
    assert torch.equal(layer.backward(dx), dx)


DROPOUT_ERRORS = {
    "p too large": lambda nn: nn.Dropout(1.5),
    "p below zero": lambda nn: nn.Dropout(-0.1),
    "p changed": lambda nn: _with(nn.Dropout(), p=2)(torch.ones(3)),
    "p of a function": lambda nn: nn.functional.dropout(torch.ones(3), p=-1),
    "p not a number": lambda nn: nn.Dropout("0.5"),
    "p of torch.dropout": lambda nn: torch.dropout(nn.Parameter(torch.ones(3)), -1.0, True),
    "integers": lambda nn: nn.Dropout()(torch.arange(3)),
    "complex": lambda nn: nn.Dropout()(torch.ones(3, dtype=torch.complex64)),
    "list": lambda nn: nn.Dropout()([1.0]),
    "none": lambda nn: nn.functional.dropout(None),
    "none in place": lambda nn: nn.functional.dropout(None, inplace=True),
    "in place on a leaf": lambda nn: nn.Dropout(inplace=True)(torch.ones(3, requires_grad=True)),
    "in place on a parameter": lambda nn: nn.Dropout(inplace=True)(nn.Parameter(torch.ones(3))),
}


def _with(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("name", DROPOUT_ERRORS)
@parity
def test_dropout_errors(nn, optim, name):
    return DROPOUT_ERRORS[name](nn)


@parity
def test_dropout_backward_twice(nn, optim):
    x = torch.randn(4, requires_grad=True)
    y = nn.functional.dropout(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    y.sum().backward()


# -- LayerNorm -------------------------------------------------------------------------------

AFFINE = {
    "plain": {"elementwise_affine": False},
    "no bias": {"bias": False},
    "affine": {},
}


def drawn(module, dtype=None):
    """The module with random parameters: ones and zeros would hide an error."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
    return module if dtype is None else module.to(dtype)


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "normalized"),
    [((3,), 3), ((1, 3), 3), ((5, 3), (3,)), ((2, 5, 3), 3), ((2, 5, 3), [5, 3]), ((2, 5, 3), (2, 5, 3)),
     ((0, 3), 3), ((3, 0), 0), ((2, 0, 3), 3), ((4, 1), 1), ((70, 33), 33), ((64, 256), 256)],
)  # fmt: skip
@parity
def test_layer_norm(nn, optim, shape, normalized, dtype, affine):
    layer = drawn(nn.LayerNorm(normalized, **AFFINE[affine]), dtype)
    name, _, y, x, weights = driven(layer, (torch.randn(shape) + 0.3).to(dtype))
    return name, y, x, weights, repr(layer), y.stride()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 4, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 47, 100])
@parity
def test_layer_norm_of_every_width(nn, optim, n, dtype, mixed):
    """The kernels sum whole vector registers and the remainder in different orders."""
    layer = drawn(nn.LayerNorm(n))
    if not (mixed and dtype.itemsize == 2):
        layer.to(dtype)
    return driven(layer, (torch.randn(41, n) - 0.2).to(dtype))[2:]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 101])
@parity
def test_layer_norm_on_several_threads(nn, optim, m, threads):
    """In the kernel, each thread sums its own rows for the weight's gradient."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return driven(drawn(nn.LayerNorm(24)), torch.randn(m, 24))
    finally:
        torch.set_num_threads(before)


@parity
def test_layer_norm_non_contiguous(nn, optim):
    x = torch.randn(4, 5, 6)
    results = [driven(drawn(nn.LayerNorm(s.shape[-1])), s) for s in (x.mT, x[::2], x[..., ::2])]
    layer, t = drawn(nn.LayerNorm(6)), torch.randn(6, 4, requires_grad=True)
    layer(t.t()).t().backward(torch.randn(6, 4))
    return results, t, [r[3].grad.stride() for r in results], dict(layer.named_parameters())


@pytest.mark.parametrize("eps", [1e-5, 0.0, 1.0])
@parity
def test_layer_norm_special_values(nn, optim, eps):
    x = torch.tensor(
        [SPECIAL, [1.0] * 9, [0.0] * 9, [1e20] * 4 + [-1e20] * 5, SPECIAL[3:] + [2.0] * 3]
    )
    return [driven(drawn(nn.LayerNorm(9, eps=eps)), row) for row in [x, *x]]


@pytest.mark.parametrize(
    "frozen", ["weight", "bias", "weight bias", "input", "input weight", "all"]
)
@parity
def test_layer_norm_frozen(nn, optim, frozen):
    layer = drawn(nn.LayerNorm(4))
    for name, p in layer.named_parameters():
        p.requires_grad_(name not in frozen and frozen != "all")
    x = torch.randn(3, 4, requires_grad="input" not in frozen and frozen != "all")
    y = layer(x)
    if y.requires_grad:
        y.backward(torch.randn(3, 4))
    return y, x, dict(layer.named_parameters())


@parity
def test_layer_norm_trains(nn, optim):
    net = nn.Sequential(
        nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2), nn.LayerNorm([2], bias=False)
    )
    results = trained(nn, optim, net, torch.randn(5, 3), torch.randn(5, 2), momentum=0.9)
    with torch.no_grad():
        y = net(torch.randn(2, 3))
    return results, y, repr(net), net.state_dict(), net.eval()(torch.randn(2, 3))


@parity
def test_layer_norm_used_twice(nn, optim):
    layer, x = drawn(nn.LayerNorm(4)), torch.randn(3, 4, requires_grad=True)
    layer(nn.functional.tanh(layer(x))).sum().backward()
    return x, dict(layer.named_parameters())


@pytest.mark.parametrize("changed", ["input", "weight", "bias"])
@parity
def test_layer_norm_changed_before_backward(nn, optim, changed):
    layer, x = nn.LayerNorm(4), torch.randn(3, 4, requires_grad=True)
    h = nn.functional.tanh(x)
    y = layer(h)
    with torch.no_grad():
        {"input": h, "weight": layer.weight, "bias": layer.bias}[changed].add_(1)
    y.sum().backward()


@parity
def test_layer_norm_of_torch(nn, optim):
    x = torch.randn(3, 4, requires_grad=True)
    w = nn.Parameter(torch.randn(4))
    h = nn.functional.tanh(x)
    results = [
        torch.layer_norm(h, (4,)), torch.layer_norm(h, [4], weight=w, eps=0.1),
        torch.nn.functional.layer_norm(h, (4,), w, w), nn.functional.layer_norm(torch.ones(2, 4), (4,), bias=w),
    ]  # fmt: skip
    sum((r * r).sum() for r in results).backward()
    return results, x, w, len(results[0].grad_fn.next_functions)


LAYER_NORM_ERRORS = {
    "wrong width": lambda nn: nn.LayerNorm(3)(torch.ones(2, 4)),
    "wrong shape": lambda nn: nn.LayerNorm((2, 3))(torch.ones(3, 3)),
    "too few dimensions": lambda nn: nn.LayerNorm((2, 3))(torch.ones(3)),
    "no shape": lambda nn: nn.LayerNorm(())(torch.ones(3)),
    "shape of floats": lambda nn: nn.LayerNorm(2.0),
    "negative": lambda nn: nn.LayerNorm(-2),
    "double into float": lambda nn: nn.LayerNorm(3)(torch.ones(2, 3).double()),
    "float into double": lambda nn: nn.LayerNorm(3).double()(torch.ones(2, 3)),
    "integers": lambda nn: nn.LayerNorm(3)(torch.ones(2, 3, dtype=torch.long)),
    "list": lambda nn: nn.LayerNorm(1)([1.0]),
    "none": lambda nn: nn.functional.layer_norm(None, (3,)),
    "shape of strings": lambda nn: nn.functional.layer_norm(torch.ones(3), "3"),
    "weight of another shape": lambda nn: nn.functional.layer_norm(torch.ones(3), (3,), torch.ones(2)),
    "bias of another shape": lambda nn: nn.functional.layer_norm(torch.ones(3), (3,), None, torch.ones(2)),
    "weight no tensor": lambda nn: nn.functional.layer_norm(torch.ones(3), (3,), 2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYER_NORM_ERRORS)
@parity
def test_layer_norm_errors(nn, optim, name):
    return LAYER_NORM_ERRORS[name](nn)


def finite_difference(function, tensors, at, g, h=1e-6):
    """The gradient of sum(g function()) for one of `tensors`, by finite differences."""
    t, out = tensors[at], torch.empty_like(tensors[at])
    for i in range(t.numel()):
        ends = []
        for step in (h, -h):
            kept = t.view(-1)[i].item()
            t.view(-1)[i] = kept + step
            ends.append((function() * g).sum().item())
            t.view(-1)[i] = kept
        out.view(-1)[i] = (ends[0] - ends[1]) / (2 * h)
    return out


def assert_gradients(module, x):
    """Compare the gradients with finite differences, independently of PyTorch."""
    leaves = [x, *(p.detach() for p in module.parameters())]
    tracked = nnmirror.Parameter(x)
    y = module(tracked)
    g = torch.randn(y.shape, dtype=y.dtype)
    y.backward(g)
    with torch.no_grad():
        for i, grad in enumerate([tracked.grad, *(p.grad for p in module.parameters())]):
            expected = finite_difference(lambda: module(x), leaves, i, g)
            assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-7), (grad, expected)


@pytest.mark.parametrize("affine", AFFINE)
def test_layer_norm_by_finite_differences(affine):
    torch.manual_seed(0)
    layer = drawn(nnmirror.LayerNorm((2, 3), eps=0.1, **AFFINE[affine]), torch.float64)
    assert_gradients(layer, torch.randn(4, 2, 3, dtype=torch.float64))


def test_layer_norm_driven_by_hand():
    layer, x = drawn(nnmirror.LayerNorm(4)), torch.randn(5, 4)
    y = layer.forward(x)
    dx = layer.backward(torch.ones(5, 4))
    assert torch.equal(torch.stack(layer.forward(tuple(x))), y)
    assert torch.equal(torch.stack(layer.backward(tuple(torch.ones(5, 4)))), dx)


# -- BatchNorm1d -----------------------------------------------------------------------------

STATS = {
    "plain": {},
    "momentum 0.5": {"momentum": 0.5},
    "average": {"momentum": None},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "untracked": {"track_running_stats": False},
    "eps": {"eps": 0.1},
}


@pytest.mark.parametrize("kind", STATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1),
        (5, 3),
        (40, 19),
        (2, 3, 1),
        (1, 3, 2),
        (5, 3, 4),
        (3, 4, 33),
        (0, 3),
        (0, 3, 2),
        (2, 3, 0),
    ],
)
@parity
def test_batch_norm(nn, optim, shape, dtype, kind):
    """Training, then evaluation with the running statistics; the buffers after each."""
    layer = drawn(nn.BatchNorm1d(shape[1], **STATS[kind]), dtype)
    results = []
    for mode in (True, True, False):
        layer.train(mode)
        x = (2 * torch.randn(shape) + 0.3).to(dtype)
        name, _, y, x, _ = driven(layer, x)
        results += [name, y, x, y.stride(), {n: b.clone() for n, b in layer.named_buffers()}]
    return results, dict(layer.named_parameters()), repr(layer)


def in_format(x, channels_last):
    """x, contiguous or in the channels_last memory format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if channels_last else x


IMAGES = [(2, 3, 4, 5), (4, 9, 3, 3), (1, 2, 6, 7), (5, 3, 1, 1), (0, 3, 2, 2), (2, 3, 2, 3, 4), (3, 17, 1, 2, 9)]  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES)
@parity
def test_batch_norm_of_images(nn, optim, shape, dtype, channels_last):
    """Training, then evaluation with the running statistics; strides and buffers of both."""
    results = []
    for kind in ("plain", "average", "not affine", "untracked"):
        layer = getattr(nn, f"BatchNorm{len(shape) - 2}d")(shape[1], **STATS[kind])
        drawn(layer, dtype)
        for mode in (True, False):
            layer.train(mode)
            x = in_format((2 * torch.randn(shape) + 0.3).to(dtype), channels_last)
            name, _, y, x, _ = driven(layer, x)
            results += [name, y, x, y.stride(), {n: b.clone() for n, b in layer.named_buffers()}]
        results += [dict(layer.named_parameters()), repr(layer)]
    return results


@pytest.mark.parametrize("shape", [(16, 32, 16, 16), (3, 2, 96, 96), (2, 70, 5, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
@parity
def test_batch_norm_of_many_images(nn, optim, shape, channels_last):
    layer = drawn(nn.BatchNorm2d(shape[1]))
    x = in_format(torch.randn(shape), channels_last).requires_grad_()
    y = layer(x)
    y.backward(in_format(torch.randn(shape), channels_last))
    z = layer.eval()(x)
    z.backward(torch.randn(shape))  # contiguous, whatever x is
    return y, z, x, dict(layer.named_parameters())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100])
@parity
def test_batch_norm_of_every_width(nn, optim, n, dtype, mixed):
    """n channels or length n, contiguous and not: each case has a kernel with its own sum order."""
    results = []
    for shape in [(21, n), (6, 4, n), (3, n, 5)]:
        layer = drawn(nn.BatchNorm1d(shape[1]))
        if not (mixed and dtype.itemsize == 2):
            layer.to(dtype)
        x = (torch.randn(shape) - 0.2).to(dtype)
        turned = torch.empty(shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1]).copy_(x)
        for mode in (True, False):
            layer.train(mode)
            results += [driven(layer, x)[2:4], driven(layer, turned)[2:4]]
            y = layer(x.requires_grad_())
            y.sum().backward()  # an expanded gradient, all strides 0
            results.append(x)
        results.append(dict(layer.named_parameters()))
    return results


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 9), (3, 9), (8, 9), (101, 24), (7, 5, 33)])
@parity
def test_batch_norm_on_several_threads(nn, optim, shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return driven(drawn(nn.BatchNorm1d(shape[1])), torch.randn(shape))
    finally:
        torch.set_num_threads(before)


@parity
def test_batch_norm_special_values(nn, optim):
    x = torch.tensor([SPECIAL, [1.0] * 9, [0.0] * 9, [1e20] * 9]).t()
    layer = drawn(nn.BatchNorm1d(4))
    first = driven(layer, x)[1:]
    return (
        first,
        driven(nn.BatchNorm1d(3), x[3:7, 1:])[1:],
        layer.running_var,
        driven(layer.eval(), x)[1:],
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "frozen", ["weight", "bias", "weight bias", "input", "input weight", "all"]
)
@parity
def test_batch_norm_frozen(nn, optim, frozen, training):
    layer = drawn(nn.BatchNorm1d(4)).train(training)
    for name, p in layer.named_parameters():
        p.requires_grad_(name not in frozen and frozen != "all")
    x = torch.randn(3, 4, requires_grad="input" not in frozen and frozen != "all")
    y = layer(x)
    if y.requires_grad:
        y.backward(torch.randn(3, 4))
    return y, x, dict(layer.named_parameters()), layer.state_dict()


@pytest.mark.parametrize("momentum", [0.1, None])
@parity
def test_batch_norm_trains(nn, optim, momentum):
    net = nn.Sequential(
        nn.Linear(3, 8),
        nn.BatchNorm1d(8, momentum=momentum),
        nn.ReLU(),
        nn.Linear(8, 2),
        nn.BatchNorm1d(2, affine=False),
    )
    results = trained(nn, optim, net, torch.randn(5, 3), torch.randn(5, 2), momentum=0.9)
    with torch.no_grad():
        y = net(torch.randn(3, 3))
    z = net.eval()(torch.randn(1, 3))
    again = trained(nn, optim, net, torch.randn(5, 3), torch.randn(5, 2))
    return results, y, z, again, repr(net), net.state_dict(), net.state_dict()._metadata["1"]


@parity
def test_batch_norm_used_twice(nn, optim):
    layer, x = drawn(nn.BatchNorm1d(4)), torch.randn(3, 4, requires_grad=True)
    layer(nn.functional.tanh(layer(x))).sum().backward()
    return x, dict(layer.named_parameters()), layer.state_dict()


@parity
def test_batch_norm_resets(nn, optim):
    layer = drawn(nn.BatchNorm1d(2))
    layer(torch.randn(3, 2))
    layer.reset_running_stats()
    stats = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    return stats, layer.state_dict(), nn.BatchNorm1d(2, track_running_stats=False).state_dict()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changed", ["input", "weight", "bias", "running_mean", "running_var"])
@parity
def test_batch_norm_changed_before_backward(nn, optim, changed, training):
    layer, x = nn.BatchNorm1d(4).train(training), torch.randn(3, 4, requires_grad=True)
    h = nn.functional.tanh(x)
    y = layer(h)
    with torch.no_grad():
        (h if changed == "input" else getattr(layer, changed)).add_(1)
    y.sum().backward()
    return x


@parity
def test_batch_norm_of_torch(nn, optim):
    """torch.batch_norm and the functional form, on tracked tensors, also with 4 dimensions."""
    x, w = torch.randn(3, 4, requires_grad=True), nn.Parameter(torch.randn(4))
    h = nn.functional.tanh(x)
    mean, var = torch.zeros(4), torch.ones(4)
    image = h.view(3, 4, 1, 1).expand(3, 4, 2, 3)
    results = [
        torch.batch_norm(h, w, None, mean, var, True, 0.2, 1e-3, True),
        torch.nn.functional.batch_norm(h, mean, var, w, w),
        nn.functional.batch_norm(h, None, None, training=True),
        nn.functional.batch_norm(image.contiguous(), mean, var, w, training=True),
        nn.functional.batch_norm(image.contiguous(memory_format=torch.channels_last), mean, var, w, w, True),
        nn.functional.batch_norm(image, mean, var, w, w, True),
    ]  # fmt: skip
    for r in results:
        r.backward(
            torch.randn(r.shape).contiguous(memory_format=torch.preserve_format), retain_graph=True
        )
    return results, x, w, mean, var, [len(r.grad_fn.next_functions) for r in results]


BATCH_NORM_ERRORS = {
    "one value": lambda nn: nn.BatchNorm1d(3)(torch.ones(1, 3)),
    "one value 3d": lambda nn: nn.BatchNorm1d(3)(torch.ones(1, 3, 1)),
    "one value untracked": lambda nn: nn.BatchNorm1d(3, track_running_stats=False).eval()(torch.ones(1, 3)),
    "4d": lambda nn: nn.BatchNorm1d(3)(torch.ones(2, 3, 1, 1)),
    "1d": lambda nn: nn.BatchNorm1d(3)(torch.ones(3)),
    "wrong channels": lambda nn: nn.BatchNorm1d(3)(torch.ones(2, 4)),
    "wrong channels not affine": lambda nn: nn.BatchNorm1d(3, affine=False)(torch.ones(2, 4)),
    "wrong channels of nothing": lambda nn: nn.BatchNorm1d(3)(torch.ones(0, 4)),
    "no channels": lambda nn: nn.BatchNorm1d(0)(torch.ones(2, 0)),
    "double into float": lambda nn: nn.BatchNorm1d(3)(torch.ones(2, 3).double()),
    "integers": lambda nn: nn.BatchNorm1d(3)(torch.ones(2, 3, dtype=torch.long)),
    "eps zero": lambda nn: nn.BatchNorm1d(3, eps=0.0)(torch.ones(2, 3)),
    "eps below zero": lambda nn: nn.BatchNorm1d(3, eps=-1.0).eval()(torch.ones(2, 3)),
    "list": lambda nn: nn.BatchNorm1d(1)([1.0]),
    "none": lambda nn: nn.functional.batch_norm(None, None, None),
    "no statistics": lambda nn: nn.functional.batch_norm(torch.ones(2, 3), None, None),
    "weight no tensor": lambda nn: nn.functional.batch_norm(torch.ones(2, 3), None, None, 1.0, training=True),
    "negative": lambda nn: nn.BatchNorm1d(-1),
    "2d of 3d": lambda nn: nn.BatchNorm2d(3)(torch.ones(2, 3, 4)),
    "2d of 5d": lambda nn: nn.LazyBatchNorm2d()(torch.ones(2, 3, 4, 4, 4)),
    "3d of 4d": lambda nn: nn.BatchNorm3d(3)(torch.ones(2, 3, 4, 4)),
    "2d one value": lambda nn: nn.BatchNorm2d(3)(torch.ones(1, 3, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCH_NORM_ERRORS)
@parity
def test_batch_norm_errors(nn, optim, name):
    return BATCH_NORM_ERRORS[name](nn)


def test_batch_norm_state_loads_in_both_libraries():
    """Also an old state_dict without `num_batches_tracked`."""
    theirs, mine = torch.nn.BatchNorm1d(3), nnmirror.BatchNorm1d(3)
    theirs(torch.randn(4, 3))
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(mine(x), theirs(x))
    theirs.load_state_dict(mine.state_dict())
    assert theirs.num_batches_tracked == 2
    for layer in (theirs, mine):
        old = {n: t for n, t in layer.state_dict().items() if n != "num_batches_tracked"}
        fresh = type(layer)(3)
        fresh.load_state_dict(dict(old))
        assert torch.equal(fresh.running_mean, layer.running_mean)
        assert fresh.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4)])
def test_batch_norm_by_finite_differences(shape, training):
    torch.manual_seed(0)
    layer = drawn(nnmirror.BatchNorm1d(shape[1], eps=0.1), torch.float64)
    layer(torch.randn(shape, dtype=torch.float64))
    assert_gradients(layer.train(training), torch.randn(shape, dtype=torch.float64))


def test_batch_norm_driven_by_hand():
    layer, x = drawn(nnmirror.BatchNorm1d(4)), torch.randn(5, 4)
    y = layer.forward(x)
    dx = layer.backward(torch.ones(5, 4))
    assert torch.equal(torch.stack(layer.forward(tuple(x))), y)
    assert torch.equal(torch.stack(layer.backward(tuple(torch.ones(5, 4)))), dx)


# -- Embedding -------------------------------------------------------------------------------

LOOKUPS = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "padding first": {"padding_idx": 0},
    "padding from the end": {"padding_idx": -1},
    "by frequency": {"scale_grad_by_freq": True},
    "by frequency, padding": {"scale_grad_by_freq": True, "padding_idx": 2},
    "max norm": {"max_norm": 0.7},
    "max norm 1": {"max_norm": 1.0, "norm_type": 1.0},
}


def looked_up(nn, layer, index):
    y = layer(index)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return y, y.grad_fn.name(), len(y.grad_fn.next_functions), layer.weight


@pytest.mark.parametrize("kind", LOOKUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (4,), (60,), (3, 0), (5, 7), (2, 3, 4)])
@parity
def test_embedding(nn, optim, shape, dtype, kind):
    results = []
    for n, d in [(7, 5), (40, 33), (4, 1), (3, 0)]:
        layer = nn.Embedding(n, d, dtype=dtype, **LOOKUPS[kind])
        results += [layer.weight.clone(), repr(layer)]
        for index in (
            torch.randint(0, n, shape),
            torch.randint(0, n, shape, dtype=torch.int32).transpose(0, -1),
        ):
            results += looked_up(nn, layer, index) if index.dim() != 3 else [layer(index)]
    return results


@parity
def test_embedding_trains(nn, optim):
    net = nn.Sequential(
        nn.Embedding(10, 4, padding_idx=3, max_norm=1.5), nn.Flatten(), nn.Linear(12, 2)
    )
    x, t = torch.randint(0, 10, (6, 3)), torch.randn(6, 2)
    results = trained(nn, optim, net, x, t, momentum=0.9)
    with torch.no_grad():
        y = net(x)
    return results, y, net.state_dict(), repr(net)


@pytest.mark.parametrize("freeze", [True, False])
@parity
def test_embedding_from_pretrained(nn, optim, freeze):
    table = torch.randn(4, 3)
    layer = nn.Embedding.from_pretrained(table, freeze=freeze, padding_idx=2)
    y = layer(torch.tensor([1, 2, 1]))
    if not freeze:
        y.sum().backward()
    table.zero_()
    return y, layer.weight, layer.padding_idx, repr(layer)


@parity
def test_embedding_used_twice_and_tied(nn, optim):
    layer, out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    out.weight = layer.weight
    index = torch.tensor([[1, 5, 5]])
    (out(layer(index) + layer(index.flip(1))) ** 2).mean().backward()
    return layer.weight


@parity
def test_embedding_indices_changed_before_backward(nn, optim):
    layer, index = nn.Embedding(6, 4), torch.tensor([1, 2])
    y = layer(index)
    index.add_(1)
    y.sum().backward()


@parity
def test_embedding_max_norm_changes_the_table(nn, optim):
    """A lookup renormalises rows in place: backward raises if a saved tensor was changed by it."""
    layer = nn.Embedding(4, 3, max_norm=1.0)
    with torch.no_grad():
        layer.weight.mul_(10)
    before = layer.weight.clone()
    scores = layer.weight.clone() @ layer.weight.t()
    y = layer(torch.tensor([0, 0, 2]))
    layer(torch.tensor([3]))
    return before, layer.weight.clone(), y, (scores.sum() + y.sum()).backward()


@parity
def test_embedding_of_torch(nn, optim):
    w, index = nn.Parameter(torch.randn(4, 3)), torch.tensor([[0, 2], [2, 3]])
    hidden = nn.functional.tanh(w)
    results = [
        torch.embedding(hidden, index), torch.embedding(w, index, padding_idx=2, scale_grad_by_freq=True),
        torch.nn.functional.embedding(index, w, padding_idx=-1), nn.functional.embedding(index, hidden, max_norm=0.5),
        nn.functional.embedding(index, torch.ones(4, 3)),
    ]  # fmt: skip
    sum((r * r).sum() for r in results[:-2]).backward(retain_graph=True)
    results[-2].sum().backward()
    return results, w, hidden


EMBEDDING_ERRORS = {
    "too large": lambda nn: nn.Embedding(3, 2)(torch.tensor([0, 3])),
    "below zero": lambda nn: nn.Embedding(3, 2)(torch.tensor([-1])),
    "too large, max norm": lambda nn: nn.Embedding(3, 2, max_norm=1.0)(torch.tensor([5])),
    "floats": lambda nn: nn.Embedding(3, 2)(torch.ones(2)),
    "bool": lambda nn: nn.Embedding(3, 2)(torch.tensor([True])),
    "list": lambda nn: nn.Embedding(3, 2)([1, 2]),
    "none": lambda nn: nn.Embedding(3, 2)(None),
    "padding outside": lambda nn: nn.Embedding(3, 2, padding_idx=3),
    "padding far below": lambda nn: nn.Embedding(3, 2, padding_idx=-4),
    "padding of a function": lambda nn: nn.functional.embedding(torch.tensor([1]), torch.ones(3, 2), -7),
    "weight of another shape": lambda nn: nn.Embedding(3, 2, _weight=torch.ones(2, 3)),
    "pretrained vector": lambda nn: nn.Embedding.from_pretrained(torch.ones(3)),
    "weight vector": lambda nn: nn.functional.embedding(torch.tensor([1]), torch.ones(3)),
    "negative": lambda nn: nn.Embedding(-3, 2),
    "weight no tensor": lambda nn: nn.functional.embedding(torch.tensor([1]), [1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", EMBEDDING_ERRORS)
@parity
def test_embedding_errors(nn, optim, name):
    return EMBEDDING_ERRORS[name](nn)


def test_embedding_refuses_sparse_gradients():
    """`sparse=True` raises only where a gradient is needed: a frozen table works."""
    layer, index = nnmirror.Embedding(4, 2, sparse=True), torch.tensor([1])
    with pytest.raises(NotImplementedError, match="sparse=False"):
        layer(index)
    with torch.no_grad():
        assert torch.equal(layer(index)[0], layer.weight[1])
    assert not layer.requires_grad_(False)(index).requires_grad


def test_embedding_driven_by_hand():
    net = nnmirror.Sequential(nnmirror.Embedding(5, 3), nnmirror.Tanh())
    y = net.forward(torch.tensor([1, 4, 1]))
    assert net.backward(torch.ones(3, 3)) is None
    slopes = 1 - y.detach() ** 2
    assert torch.allclose(net[0].weight.grad[1], slopes[0] + slopes[2])


# -- PReLU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(), (3,), (1, 3), (5, 3), (0, 3), (4, 3, 5), (2, 3, 4, 5), (64, 3), (200, 3, 7)]
)
@pytest.mark.parametrize("number", [1, 3])
@parity
def test_prelu(nn, optim, number, shape, dtype):
    """Three slopes for an input without three channels are an error, as in PyTorch."""
    layer = nn.PReLU(number, init=0.1)
    with torch.no_grad():
        layer.weight += torch.arange(number)
    name, _, y, x, weights = driven(layer.to(dtype), torch.randn(shape).to(dtype))
    return (
        name,
        y,
        x,
        weights,
        y.stride(),
        [n and n[0].name() for n in y.grad_fn.next_functions],
        repr(layer),
    )


@parity
def test_prelu_special_values(nn, optim):
    x = torch.tensor(SPECIAL)
    return [
        driven(nn.PReLU(init=slope), x) for slope in (0.25, 0.0, -1.0, float("inf"), float("nan"))
    ]


@parity
def test_prelu_non_contiguous(nn, optim):
    x = torch.randn(6, 4, 5)
    return [
        driven(nn.PReLU(s.shape[1]), s)
        for s in (x.mT, x[::2, ::2], x.transpose(0, 1), x[:, :1].expand(6, 3, 5))
    ]


@pytest.mark.parametrize("frozen", ["weight", "input", "input weight"])
@parity
def test_prelu_frozen(nn, optim, frozen):
    layer, x = nn.PReLU(3), torch.randn(4, 3, requires_grad="input" not in frozen)
    layer.weight.requires_grad_("weight" not in frozen)
    y = layer(x)
    if y.requires_grad:
        y.sum().backward()
    return y, x, layer.weight


@parity
def test_prelu_trains(nn, optim):
    shared = nn.PReLU()
    net = nn.Sequential(
        nn.Linear(3, 4), nn.PReLU(4, init=0.5), nn.Linear(4, 4), shared, nn.Linear(4, 2), shared
    )
    results = trained(nn, optim, net, torch.randn(5, 3), torch.randn(5, 2), weight_decay=0.1)
    with torch.no_grad():
        y = net(torch.randn(2, 3))
    return results, y, net.state_dict(), repr(net)


@pytest.mark.parametrize("changed", ["input", "weight"])
@parity
def test_prelu_changed_before_backward(nn, optim, changed):
    layer, x = nn.PReLU(), torch.randn(3, 4, requires_grad=True)
    h = nn.functional.tanh(x)
    y = layer(h)
    with torch.no_grad():
        {"input": h, "weight": layer.weight}[changed].add_(1)
    y.sum().backward()


@parity
def test_prelu_of_torch(nn, optim):
    x, w = torch.randn(4, 3, requires_grad=True), nn.Parameter(torch.randn(3))
    h = nn.functional.tanh(x)
    results = [
        torch.prelu(h, w),
        h.prelu(w[:1]),
        nn.functional.prelu(x, w),
        torch.nn.functional.prelu(h, w),
    ]
    sum((r * r).sum() for r in results).backward()
    return results, x, w


PRELU_ERRORS = {
    "wrong channels": lambda nn: nn.PReLU(3)(torch.ones(2, 4)),
    "vector": lambda nn: nn.PReLU(3)(torch.ones(3)),
    "scalar": lambda nn: nn.PReLU(3)(torch.tensor(1.0)),
    "double into float": lambda nn: nn.PReLU()(torch.ones(3).double()),
    "integers": lambda nn: nn.PReLU()(torch.arange(3)),
    "list": lambda nn: nn.PReLU()([1.0]),
    "none": lambda nn: nn.functional.prelu(torch.ones(3), None),
    "weight of two dimensions": lambda nn: nn.functional.prelu(torch.ones(3, 2), torch.ones(1, 2)),
    "negative": lambda nn: nn.PReLU(-1),
}


@pytest.mark.parametrize("name", PRELU_ERRORS)
@parity
def test_prelu_errors(nn, optim, name):
    return PRELU_ERRORS[name](nn)


def test_prelu_driven_by_hand():
    layer, x = nnmirror.PReLU(3), torch.randn(5, 3)
    y = layer.forward(x)
    dx = layer.backward(torch.ones(5, 3))
    assert torch.equal(dx, torch.where(x > 0, 1.0, 0.25))
    assert torch.allclose(layer.weight.grad, x.clamp(max=0).sum(0))
    assert torch.equal(y, torch.where(x > 0, x, 0.25 * x))


def test_embedding_and_prelu_by_finite_differences():
    torch.manual_seed(0)
    layer = nnmirror.PReLU(3, init=0.3, dtype=torch.float64)
    assert_gradients(layer, torch.randn(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 5), (127, 16), (128, 33), (600, 64), (2000, 12)])
@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm1d"])
@parity
def test_norms_of_many_rows(nn, optim, name, shape, dtype, threads):
    """With many rows, exact mode computes the sums over rows as matrix products."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer = drawn(getattr(nn, name)(shape[1]), dtype)
        return driven(layer, torch.randn(shape).to(dtype))[2:]
    finally:
        torch.set_num_threads(before)


@parity
def test_norms_with_reduced_matmul_precision(nn, optim):
    """set_float32_matmul_precision does not change the bits of norm layers."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return [driven(drawn(nn.LayerNorm(40)), torch.randn(300, 40))[2:] for _ in range(2)]
    finally:
        torch.set_float32_matmul_precision(before)


# -- GroupNorm and InstanceNorm --------------------------------------------------------------

# Units in the last place by which the gradients of group_norm may differ where there is no exact
# form: 16-bit dtypes, channels_last, second derivatives (nnmirror/exact/README.md).
GROUP_UNITS = 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 4), 2), ((2, 6, 5), 3), ((2, 4, 3, 5), 1), ((3, 6, 4, 4), 6), ((0, 4, 2, 2), 2), ((2, 4, 2, 3, 2), 2)],
)  # fmt: skip
@parity
@off_by(GROUP_UNITS)
def test_group_norm(nn, optim, shape, groups, dtype):
    results = []
    for how in ({}, {"bias": False}, {"affine": False}, {"eps": 0.1}):
        for channels_last in (False, True) if len(shape) > 3 else (False,):
            layer = drawn(nn.GroupNorm(groups, shape[1], **how), dtype)
            x = in_format((2 * torch.randn(shape) + 0.3).to(dtype), channels_last)
            name, _, y, x, weights = driven(layer, x)
            results += [name, y, x, y.stride(), weights, repr(layer)]
    return results


@parity
@off_by(GROUP_UNITS)
def test_group_norm_of_other_kinds(nn, optim):
    """16-bit input with float32 weights, non-contiguous input, frozen weights, many images."""
    layer, results = drawn(nn.GroupNorm(2, 4)), []
    for dtype in (torch.bfloat16, torch.float16):
        results.append(driven(layer, torch.randn(3, 4, 5).to(dtype))[2:4])
    x = torch.randn(3, 4, 5, 6)
    for part in (x.mT, x[..., ::2], in_format(x, True)[:, :, 1:]):
        y = driven(layer, part)
        results += [y[2:4], y[2].stride()]
    results.append(driven(drawn(nn.GroupNorm(4, 32)), torch.randn(16, 32, 16, 16))[2:])
    layer.weight.requires_grad_(False)
    results.append(driven(layer, x)[2:])
    layer.requires_grad_(False)
    return results, driven(layer, x)[2:], layer.eval()(x)


@parity
@off_by(GROUP_UNITS)
def test_group_norm_with_weights_that_are_columns(nn, optim):
    x, table = torch.randn(3, 4, 5, requires_grad=True), nn.Parameter(torch.randn(4, 2))
    y = torch.nn.functional.group_norm(x, 2, table[:, 0], table[:, 1])
    y.square().sum().backward()
    return y, x.grad, table.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [4, 10, 24, 44])
@pytest.mark.usefixtures("one_thread")
@parity
def test_group_norm_of_every_width(nn, optim, channels, dtype):
    """The kernel sums in vector registers: elements of a channel, then channels of a group."""
    results = []
    for places in [(7,), (8,), (25,), (4, 25)]:
        for how in ({}, {"affine": False}):
            layer = drawn(nn.GroupNorm(2, channels, **how), dtype)
            results.append(driven(layer, torch.randn(3, channels, *places).to(dtype))[2:])
    return results


@pytest.mark.parametrize("images", [0, 1, 7])
@parity
def test_instance_norm_leaves_its_statistics_in_evaluation(nn, optim, images):
    layer = nn.InstanceNorm1d(3, track_running_stats=True).eval()
    layer.running_mean.copy_(torch.randn(3))
    layer.running_var.copy_(torch.rand(3))
    y = layer(torch.randn(images, 3, 4))
    return y, [(b, b._version) for b in layer.buffers()]


@parity
def test_group_norm_of_no_images(nn, optim):
    layer = nn.GroupNorm(2, 4)
    x, g = (nn.Parameter(torch.zeros(0, 4, 3)) for _ in range(2))
    params = [x, *layer.parameters()]
    first = torch.autograd.grad(layer(x), params, g, create_graph=True)
    second = torch.autograd.grad(sum(t.sum() for t in first), [x, layer.weight, g])
    return [t.detach() for t in first], second


@pytest.mark.usefixtures("one_thread")
@parity
def test_group_norm_trains(nn, optim):
    net = nn.Sequential(
        nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(1, 4), nn.Flatten(), nn.Linear(16, 2)
    )
    results = trained(nn, optim, net, torch.randn(5, 4, 2, 2), torch.randn(5, 2), momentum=0.9)
    return results, net.state_dict(), repr(net)


@parity
@off_by(GROUP_UNITS)
def test_group_norm_second_derivatives(nn, optim):
    layer, x = drawn(nn.GroupNorm(2, 4)), torch.randn(3, 4, 2, 3, requires_grad=True)
    (dx,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
    (dx * dx).sum().backward()
    return dx, x, dict(layer.named_parameters())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["GroupNorm", "InstanceNorm2d"])
def test_group_and_instance_norm_by_finite_differences(name, affine):
    """The gradients against central differences in float64."""
    args = {"GroupNorm": (2, 4), "InstanceNorm2d": (4,)}[name]
    layer = drawn(getattr(nnmirror, name)(*args, affine=affine), torch.float64)
    x = nnmirror.Parameter(torch.randn(2, 4, 2, 3, dtype=torch.float64))
    assert_gradients(layer, x.detach())
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


INSTANCES = {
    "plain": {},
    "affine": {"affine": True},
    "tracked": {"affine": True, "track_running_stats": True},
    "average": {"track_running_stats": True, "momentum": None},
    "no bias": {"affine": True, "bias": False},
}


@pytest.mark.parametrize("kind", INSTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 4, 5), (4, 5), (2, 3, 4, 5), (3, 4, 3), (2, 3, 2, 2, 3), (3, 2, 2, 4)]
)
@parity
def test_instance_norm(nn, optim, shape, dtype, kind):
    n = {2: 1, 3: 1, 4: 2, 5: 3}[len(shape)]
    n = 3 if shape == (3, 2, 2, 4) else n
    channels = shape[len(shape) - n - 1]
    layer, results = drawn(getattr(nn, f"InstanceNorm{n}d")(channels, **INSTANCES[kind]), dtype), []
    for mode in (True, True, False):
        layer.train(mode)
        x = (2 * torch.randn(shape) + 0.3).to(dtype)
        if len(shape) > 3:
            x = in_format(x, mode)
        name, _, y, x, _ = driven(layer, x)
        results += [name, y, x, y.stride(), {k: b.clone() for k, b in layer.named_buffers()}]
    return results, dict(layer.named_parameters()), repr(layer)


@parity
def test_instance_norm_second_derivatives(nn, optim):
    layer, x = drawn(nn.InstanceNorm1d(3, affine=True)), torch.randn(2, 3, 5, requires_grad=True)
    (dx,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
    (dx * dx).sum().backward()
    return dx, x, dict(layer.named_parameters())


@parity
def test_instance_norm_trains(nn, optim):
    net = nn.Sequential(
        nn.LazyInstanceNorm2d(affine=True), nn.ReLU(), nn.InstanceNorm2d(3, track_running_stats=True),
        nn.Flatten(), nn.Linear(12, 2),
    )  # fmt: skip
    results = trained(nn, optim, net, torch.randn(5, 3, 2, 2), torch.randn(5, 2), momentum=0.9)
    return results, net.state_dict(), repr(net), net.eval()(torch.randn(2, 3, 2, 2))


@parity
def test_group_and_instance_norm_of_torch(nn, optim):
    """torch.instance_norm, torch.group_norm and their functional forms, on tracked tensors."""
    x, w = torch.randn(3, 4, 2, 3, requires_grad=True), nn.Parameter(torch.randn(4))
    h, mean, var = nn.functional.tanh(x), torch.zeros(4), torch.ones(4)
    results = [
        torch.instance_norm(h, w, None, mean, var, True, 0.3, 1e-3, True),
        torch.nn.functional.instance_norm(h, mean, var, w, w, False),
        nn.functional.instance_norm(h),
        torch.group_norm(h, 2, bias=None, weight=w).detach(),
        torch.nn.functional.group_norm(h, 4).detach(),
    ]
    sum((r * r).sum() for r in results).backward()
    return results, x, w, mean, var


GROUP_ERRORS = {
    "groups": lambda nn: nn.GroupNorm(3, 4),
    "no groups": lambda nn: nn.GroupNorm(0, 4),
    "groups of a function": lambda nn: nn.functional.group_norm(torch.ones(2, 4, 3), 3),
    "wrong channels": lambda nn: nn.GroupNorm(2, 4)(torch.ones(2, 6, 3)),
    "one value": lambda nn: nn.GroupNorm(1, 1)(torch.ones(1, 1)),
    "1d": lambda nn: nn.GroupNorm(1, 1)(torch.ones(1)),
    "none": lambda nn: nn.functional.group_norm(None, 1),
    "integers": lambda nn: nn.GroupNorm(2, 4)(torch.ones(2, 4, 3, dtype=torch.long)),
    "double into float": lambda nn: nn.GroupNorm(2, 4)(torch.ones(2, 4, 3).double()),
    "weight of another size": lambda nn: nn.functional.group_norm(torch.ones(2, 4, 3), 2, torch.ones(3)),
    "of a list": lambda nn: torch.group_norm([1.0], 2),
    "instance of another dimension": lambda nn: nn.InstanceNorm2d(3)(torch.ones(2, 3)),
    "instance of wrong channels": lambda nn: nn.InstanceNorm1d(3, affine=True)(torch.ones(2, 4, 5)),
    "instance of other channels": lambda nn: nn.InstanceNorm1d(3)(torch.ones(2, 4, 5)),
    "instance of one element": lambda nn: nn.InstanceNorm1d(3)(torch.ones(2, 3, 1)),
    "instance of nothing": lambda nn: nn.InstanceNorm1d(3, affine=True)(torch.ones(0, 3, 2)),
    "instance without statistics": lambda nn: nn.functional.instance_norm(torch.ones(2, 3, 2), use_input_stats=False),
    "instance of none": lambda nn: nn.functional.instance_norm(None),
    "old state": lambda nn: nn.InstanceNorm1d(3).load_state_dict({"running_mean": torch.ones(3), "running_var": torch.ones(3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUP_ERRORS)
@parity
def test_group_and_instance_norm_errors(nn, optim, name):
    return GROUP_ERRORS[name](nn)


def test_group_and_instance_norm_driven_by_hand():
    for layer in (drawn(nnmirror.GroupNorm(2, 4)), drawn(nnmirror.InstanceNorm1d(4, affine=True))):
        x, g = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
        leaf = nnmirror.Parameter(x)
        layer(leaf).backward(g)
        weight = layer.weight.grad
        layer.weight.grad = None
        layer.forward(x)
        assert torch.equal(layer.backward(g), leaf.grad)
        assert torch.equal(layer.weight.grad, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@parity
def test_batch_norm_of_two_rows(nn, optim, dtype):
    """The gradient cancels, so that each rounding shows; of channels that fill registers and not."""
    results = []
    for channels in (1, 17, 32, 33, 40):
        layer = nn.BatchNorm1d(channels).to(dtype)
        for _ in range(4):
            results += driven(layer, torch.randn(2, channels).to(dtype))[2:4]
    return results
