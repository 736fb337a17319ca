"""nn.init: the same random numbers from the same seed, and the same generator state afterwards."""

import pytest
import torch

from .parity import parity

T = torch.empty
CALLS = {
    "uniform_": [(), (-1.0, 2.0)],
    "normal_": [(), (1.0, 0.1)],
    "trunc_normal_": [
        (),
        (0.0, 1.0, -1.0, 0.5),
        (0.0, 1.0, 2.0, 3.0),
        (0.0, 1.0, 0.1, 0.2),
        (5.0,),
    ],
    "constant_": [(0.3,)],
    "ones_": [()],
    "zeros_": [()],
    "eye_": [()],
    "dirac_": [(), (2,)],
    "xavier_uniform_": [(), (2.0,)],
    "xavier_normal_": [(), (0.5,)],
    "kaiming_uniform_": [(), (0.1, "fan_out", "relu"), (0, "fan_in", "tanh"), (0, "FAN_IN")],
    "kaiming_normal_": [(), (0.1, "fan_out", "relu"), (0, "middle"), (0, "fan_in", "swish")],
    "orthogonal_": [(), (2.0,)],
    "sparse_": [(0.3,), (0.5, 1.0)],
}
SHAPES = [(), (3,), (4, 3), (3, 4), (4, 2, 3), (4, 4, 3, 3), (2, 2, 3, 3, 3), (0, 3), (3, 0)]
CASES = [(name, args) for name, calls in CALLS.items() for args in calls]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "args"), CASES)
@parity
def test_draws(nn, optim, name, args, shape):
    tensor = torch.zeros(shape)
    try:
        result = getattr(nn.init, name)(tensor, *args)
    except Exception as e:
        return type(e).__name__, str(e), tensor
    return result is tensor, tensor


@pytest.mark.parametrize(("name", "args"), CASES)
@parity
def test_parameters(nn, optim, name, args):
    """A parameter is initialised in place, though it requires grad and grad mode is on."""
    param = nn.Parameter(torch.zeros(4, 4, 3) if name == "dirac_" else torch.zeros(4, 4).double())
    try:
        result = getattr(nn.init, name)(param, *args)
    except Exception as e:
        return type(e).__name__, str(e)
    return result is param, param, param._version > 0


@parity
def test_generator(nn, optim):
    generator = torch.Generator().manual_seed(5)
    values = [
        nn.init.uniform_(torch.empty(3), generator=generator),
        nn.init.kaiming_normal_(torch.empty(3, 3), generator=generator),
        nn.init.trunc_normal_(torch.empty(3, 3), generator=generator),
        nn.init.orthogonal_(torch.empty(3, 3), generator=generator),
        nn.init.sparse_(torch.empty(3, 3), 0.5, generator=generator),
        nn.init.xavier_uniform_(tensor=torch.empty(3, 3), generator=generator),
    ]
    return values, generator.get_state()


@pytest.mark.parametrize(
    "gain",
    [("linear",), ("sigmoid",), ("tanh",), ("relu",), ("selu",), ("leaky_relu",),
     ("leaky_relu", 0.3), ("leaky_relu", 2), ("leaky_relu", True), ("leaky_relu", "a"),
     ("conv2d",), ("nothing",)],
)  # fmt: skip
@parity
def test_gain(nn, optim, gain):
    return float(nn.init.calculate_gain(*gain))


@pytest.mark.parametrize("name", [n for n in torch.nn.init.__all__ if n + "_" in CALLS])
@parity
def test_deprecated_names(nn, optim, name):
    args = CALLS[name + "_"][-1 if name == "sparse" else 0]
    shape = (4, 4, 3) if name == "dirac" else (4, 4)
    return getattr(nn.init, name)(torch.zeros(shape), *args), getattr(nn.init, name).__name__


@parity
def test_module_initialised_by_apply(nn, optim):
    def start(m):
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight, gain=nn.init.calculate_gain("relu"))
            nn.init.zeros_(m.bias)

    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).apply(start)
    net(torch.ones(1, 3)).sum().backward()
    return dict(net.named_parameters())
