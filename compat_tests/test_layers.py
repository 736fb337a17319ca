"""Linear, activations and MSELoss. A user would get other bits, forward or backward."""

import pytest
import torch

from .parity import parity, trained

SHAPES = [(3,), (1, 3), (5, 3), (0, 3), (2, 5, 3), (2, 0, 3), (2, 1, 4, 3), (64, 3), (1000, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 1e-40, -1e30]


def after_identity(nn, module):
    """Put a layer before an in-place module, as a leaf must not be changed in place."""
    return nn.Sequential(nn.LeakyReLU(1.0), module)


ACTIVATIONS = {
    "tanh": lambda nn: nn.Tanh(),
    "relu": lambda nn: nn.ReLU(),
    "relu inplace": lambda nn: after_identity(nn, nn.ReLU(inplace=True)),
    "leaky": lambda nn: nn.LeakyReLU(),
    "leaky 0.3": lambda nn: nn.LeakyReLU(0.3),
    "leaky -0.5": lambda nn: nn.LeakyReLU(-0.5),
    "leaky inplace": lambda nn: after_identity(nn, nn.LeakyReLU(0.2, inplace=True)),
    "leaky inplace negative": lambda nn: after_identity(nn, nn.LeakyReLU(-0.2, inplace=True)),
}


def driven(module, x, *more):
    """Node name, repr, output, and the gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    y = module(x, *more)
    name = y.grad_fn.name()
    printed = repr(y)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return name, printed, y, x, dict(module.named_parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@parity
def test_linear(nn, optim, shape, dtype, bias):
    return driven(nn.Linear(3, 5, bias=bias, dtype=dtype), torch.randn(shape).to(dtype))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("m", [1, 3, 32, 257])
@pytest.mark.parametrize("batch", [1, 4, 33])
@parity
def test_linear_sizes(nn, optim, n, m, batch):
    return driven(nn.Linear(n, m), torch.randn(batch, n))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
@parity
def test_linear_non_contiguous(nn, optim, order, bias):
    x = torch.randn(4, 4, 4).permute(*order)
    return driven(nn.Linear(4, 3, bias=bias), x), driven(nn.Linear(4, 3, bias=bias), x[1])


@parity
def test_linear_transposed_weight(nn, optim):
    layer = nn.Linear(3, 5)
    layer.weight = nn.Parameter(torch.randn(3, 5).t())
    return driven(layer, torch.randn(4, 3)), layer.weight.grad.stride()


@pytest.mark.parametrize("frozen", ["weight", "bias", "input", "all"])
@parity
def test_linear_frozen(nn, optim, frozen):
    layer = nn.Linear(3, 2)
    if frozen in ("weight", "all"):
        layer.weight.requires_grad_(False)
    if frozen in ("bias", "all"):
        layer.bias.requires_grad = False
    x = torch.randn(4, 3, requires_grad=frozen not in ("input", "all"))
    y = layer(x)
    if y.requires_grad:
        y.sum().backward()
    return y, x, dict(layer.named_parameters())


CHANGED = {
    "a masked weight": lambda w, b: (w * 0.9, b),
    "a masked bias": lambda w, b: (w, b * 0.9),
    "both": lambda w, b: (w * 0.9, b * 0.9),
    "buffers": lambda w, b: (w.detach().clone(), b.detach().clone()),
}


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("changed", CHANGED)
@parity
def test_linear_with_a_plain_tensor_for_a_frozen_weight(nn, optim, changed, dims, frozen):
    """Pruning and quantisation: the same call with parameters, and with tensors made of them."""
    layer = nn.Linear(3, 8)
    for name in ("weight", "bias") if frozen == "both" else (frozen,):
        getattr(layer, name).requires_grad_(False)
    p, found = nn.Parameter(torch.randn(*(4, 2)[: dims - 1], 3)), []
    for step in range(12):
        weights = layer.weight, layer.bias
        y = nn.functional.linear(p * 1, *(CHANGED[changed](*weights) if step % 6 > 3 else weights))
        y.sum().backward()
        found.append(y.detach())
    return found, p.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 2, 4, 3)])
@parity
def test_linear_input_that_gets_other_data(nn, optim, shape, requires_grad):
    """After `x.data = ...` before backward, the gradients use the same values as PyTorch's."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))
    for _ in range(5):
        x = torch.randn(shape).requires_grad_(requires_grad)
        h = torch.tanh(net[0](x))
        loss = net(x).sum() + net[2](h).sum()
        x.data, h.data = torch.randn(shape), torch.randn(shape)
        loss.backward()
    return dict(net.named_parameters()), x.grad


@pytest.mark.parametrize("seed", range(5))
@parity
def test_same_seed_same_weights(nn, optim, seed):
    """The initial weights are the same; `parity` compares the generator's state too."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(2, 25), nn.ReLU(), nn.Linear(25, 25, bias=False), nn.Linear(25, 1)
    )
    net[0].reset_parameters()
    return dict(net.named_parameters()), nn.Linear(7, 4, dtype=torch.float64).weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), *SHAPES])
@pytest.mark.parametrize("name", ACTIVATIONS)
@parity
def test_activation(nn, optim, name, shape, dtype):
    return driven(ACTIVATIONS[name](nn), (3 * torch.randn(shape)).to(dtype))


@pytest.mark.parametrize("name", ACTIVATIONS)
@parity
def test_activation_special_values(nn, optim, name):
    return driven(ACTIVATIONS[name](nn), torch.tensor(SPECIAL))


@pytest.mark.parametrize("name", ACTIVATIONS)
@parity
def test_activation_non_contiguous(nn, optim, name):
    x = torch.randn(6, 4).t()[::2]
    return driven(ACTIVATIONS[name](nn), x), driven(ACTIVATIONS[name](nn), x.expand(3, 2, 6))


@pytest.mark.parametrize("name", ACTIVATIONS)
@parity
def test_activation_follows_a_layer(nn, optim, name):
    if name == "leaky inplace negative":
        return None
    net = nn.Sequential(nn.Linear(3, 4), ACTIVATIONS[name](nn), nn.Linear(4, 2))
    return trained(nn, optim, net, torch.randn(5, 3), torch.randn(5, 2)), repr(net)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), *SHAPES])
@parity
def test_mse_loss(nn, optim, shape, dtype, reduction):
    target = torch.randn(shape).to(dtype).requires_grad_()
    return driven(nn.MSELoss(reduction=reduction), torch.randn(shape).to(dtype), target), target


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "shapes", [((4, 3), (3,)), ((4, 3), (4, 1)), ((3,), (4, 3)), ((4, 1), (4,))]
)
@parity
def test_mse_loss_broadcasts_with_a_warning(nn, optim, shapes, reduction):
    target = torch.randn(shapes[1], requires_grad=True)
    return driven(nn.MSELoss(reduction=reduction), torch.randn(shapes[0]), target)[1:], target


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@parity
def test_mse_loss_deprecated_arguments(nn, optim, size_average, reduce):
    loss = nn.MSELoss(size_average, reduce)
    x, t = torch.randn(3), torch.randn(3)
    functional = nn.functional.mse_loss(x, t, size_average=size_average, reduce=reduce)
    return loss.reduction, driven(loss, x, t), functional


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@parity
def test_mse_loss_weighted(nn, optim, reduction):
    x, weight = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    y = nn.functional.mse_loss(
        nn.functional.tanh(x), torch.randn(4, 3), reduction=reduction, weight=weight
    )
    y.sum().backward()
    return y, x, weight


@parity
def test_mse_loss_mixed_dtypes(nn, optim):
    target = torch.randn(3, dtype=torch.float64, requires_grad=True)
    integers = torch.arange(3)
    return (
        driven(nn.MSELoss(), torch.randn(3), target),
        target,
        driven(nn.MSELoss(), torch.randn(3), integers),
    )


@parity
def test_special_values_through_a_net(nn, optim):
    x = torch.tensor(SPECIAL).unsqueeze(1)
    net = nn.Sequential(nn.Linear(1, 3), nn.LeakyReLU(), nn.Linear(3, 3), nn.Tanh())
    return driven(net, x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@parity
def test_linear_factory_arguments(nn, optim, device):
    layer = nn.Linear(2, 3, device=device, dtype=torch.float64)
    return layer.weight.device, layer.weight.dtype, layer.weight.shape, repr(layer)


@parity
def test_zero_features(nn, optim):
    return driven(nn.Linear(0, 3), torch.randn(4, 0)), driven(nn.Linear(3, 0), torch.randn(4, 3))


ERRORS = {
    "wrong width": lambda nn: nn.Linear(3, 2)(torch.randn(4, 4)),
    "wrong width 3d": lambda nn: nn.Linear(3, 2)(torch.randn(2, 4, 4)),
    "wrong width 1d": lambda nn: nn.Linear(3, 2)(torch.randn(4)),
    "scalar": lambda nn: nn.Linear(3, 2)(torch.tensor(1.0)),
    "double into float": lambda nn: nn.Linear(3, 2)(torch.randn(4, 3).double()),
    "integers": lambda nn: nn.Linear(3, 2)(torch.ones(4, 3, dtype=torch.long)),
    "negative size": lambda nn: nn.Linear(-1, 2),
    "size not a number": lambda nn: nn.Linear("3", 2),
    "integer dtype": lambda nn: nn.Linear(3, 2, dtype=torch.long),
    "bad reduction": lambda nn: nn.MSELoss(reduction="average")(torch.ones(2), torch.ones(2)),
    "old reduction": lambda nn: nn.MSELoss(reduction="elementwise_mean")(
        torch.ones(2), torch.ones(2)
    ),
    "sizes do not broadcast": lambda nn: nn.MSELoss()(torch.ones(2), torch.ones(3)),
    "tanh of integers": lambda nn: nn.Tanh()(torch.arange(3)),
    "relu of integers": lambda nn: nn.ReLU()(torch.arange(3) - 1),
    "relu of bool": lambda nn: nn.ReLU()(torch.tensor([True])),
    "leaky of integers": lambda nn: nn.LeakyReLU()(torch.arange(3) - 1),
    "too many arguments": lambda nn: nn.Tanh()(torch.ones(2), 1),
    "unknown argument": lambda nn: nn.Linear(2, 3, bia=True),
    "tanh takes none": lambda nn: nn.Tanh(3),
    "tanh takes no keyword": lambda nn: nn.Tanh(inplace=True),
    "inplace on a leaf": lambda nn: nn.ReLU(inplace=True)(torch.ones(2, requires_grad=True)),
    "inplace on a parameter": lambda nn: nn.ReLU(inplace=True)(nn.Parameter(torch.ones(2))),
    "no forward": lambda nn: nn.Module()(torch.ones(2)),
    "list": lambda nn: nn.Linear(2, 2)([1.0, 2.0]),
    "none": lambda nn: nn.Linear(2, 2)(None),
}


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_bad_input(nn, optim, name):
    """Bad input gives PyTorch's exception and message."""
    return ERRORS[name](nn)


@pytest.mark.parametrize("seen", ["expanded", "transposed"])
@parity
def test_linear_input_changed_in_place_afterwards(nn, optim, seen):
    """Where `linear` copies its input to make a matrix of it, the input may be changed in place."""
    layer, x = nn.Linear(3, 4), torch.randn(2, 3)
    given = {"expanded": x.expand(5, 2, 3), "transposed": x.expand(5, 2, 3).transpose(0, 1)}
    y = layer(given[seen])
    x.mul_(2)
    y.square().sum().backward()
    return layer.weight.grad


OF_A_CLASS = {
    "Linear": ((3, 4), (5, 3)),
    "Conv1d": ((3, 4, 3), (2, 3, 5)),
    "LayerNorm": ((4,), (5, 4)),
    "BatchNorm1d": ((4,), (5, 4)),
    "GroupNorm": ((2, 4), (5, 4)),
}


@pytest.mark.parametrize("name", OF_A_CLASS)
@parity
def test_weights_that_a_class_draws_when_they_are_read(nn, optim, name):
    """Read in another order, they would be other random numbers, as in a Bayesian net."""
    arguments, shape = OF_A_CLASS[name]

    class Drawn(getattr(nn, name)):
        def __getattr__(self, name):
            shape = self.__dict__.get("shapes", {}).get(name)
            return super().__getattr__(name) if shape is None else torch.randn(shape)

    layer = Drawn(*arguments)
    shapes = {name: p.shape for name, p in layer.named_parameters()}
    del layer.weight, layer.bias
    layer.shapes = shapes
    return layer(torch.ones(shape))
