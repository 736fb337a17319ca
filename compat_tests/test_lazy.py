"""Lazy modules. A user would get wrong shapes from the first input, or other initial weights."""

import copy
import io

import pytest
import torch

import nnmirror

from .parity import parity, trained

LAZY = {
    "Linear": (lambda nn, **kw: nn.LazyLinear(3, **kw), (5, 4)),
    **{
        f"{kind}{n}d": (
            lambda nn, kind=kind, n=n, **kw: getattr(nn, f"Lazy{kind}{n}d")(4, 2, groups=2, **kw),
            (1, 2, *(3, 4, 5)[:n]),
        )
        for kind in ("Conv", "ConvTranspose")
        for n in (1, 2, 3)
    },
    "BatchNorm1d": (lambda nn, **kw: nn.LazyBatchNorm1d(**kw), (5, 4)),
    "BatchNorm2d": (lambda nn, **kw: nn.LazyBatchNorm2d(momentum=None, **kw), (5, 4, 2, 3)),
    "BatchNorm3d": (lambda nn, **kw: nn.LazyBatchNorm3d(eps=0.1, **kw), (5, 4, 2, 3, 2)),
    **{
        f"InstanceNorm{n}d": (
            lambda nn, bias, n=n, **kw: getattr(nn, f"LazyInstanceNorm{n}d")(affine=bias, **kw),
            (5, 4, 2, 3, 2)[: n + 2],
        )
        for n in (1, 2, 3)
    },
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAZY)
@parity
def test_becomes_the_module_at_its_first_call(nn, optim, name, bias):
    make, shape = LAZY[name]
    layer = make(nn, bias=bias, dtype=torch.float64)
    before = repr(layer), repr(layer.state_dict()), layer.has_uninitialized_params()
    net = nn.Sequential(layer, nn.Tanh())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = net(x)
    y.sum().backward()
    named = type(layer).__name__, repr(net), hasattr(layer, "_initialize_hook")
    return before, named, y, x, dict(net.named_parameters()), net.state_dict()


@parity
def test_a_net_of_them_trains(nn, optim):
    net = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2, False))
    net.double().float()
    torch.manual_seed(1)
    net(torch.randn(4, 3))
    results = trained(nn, optim, net, torch.randn(5, 3), torch.randn(5, 2), momentum=0.9)
    return results, repr(net), net.state_dict()


@parity
def test_moved_and_copied_before_its_first_call(nn, optim):
    layer = nn.LazyLinear(2)
    twin = copy.deepcopy(layer.double())
    parts = [
        repr(twin.weight),
        twin.weight.dtype,
        twin.weight.requires_grad,
        len(list(twin.parameters())),
    ]
    torch.manual_seed(2)
    return parts, twin(torch.randn(3, 4, dtype=torch.float64)), repr(layer), repr(twin)


@parity
def test_states_go_from_lazy_to_lazy_and_to_what_it_becomes(nn, optim):
    full = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    lazy, empty = (nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()) for _ in range(2))
    results = [empty.load_state_dict(lazy.state_dict()), repr(empty[0].weight)]
    results += [lazy.load_state_dict(full.state_dict()), repr(lazy)]
    return (
        results,
        lazy(torch.ones(2, 3) * torch.tensor([[1.0], [2.0]])),
        repr(lazy),
        lazy.state_dict(),
    )


ERRORS = {
    "shape": lambda nn: nn.LazyLinear(2).weight.shape,
    "operation": lambda nn: nn.LazyLinear(2).weight.detach(),
    "of a buffer": lambda nn: nn.LazyBatchNorm1d().running_mean + 1,
    "share memory": lambda nn: nn.LazyLinear(2).share_memory(),
    "into a full one": lambda nn: nn.Linear(1, 2).load_state_dict(nn.LazyLinear(2).state_dict()),
    "another width": lambda nn: _loaded(nn)(torch.ones(1, 5)),
    "parts by hand": lambda nn: nn.modules.lazy.LazyModuleMixin.initialize_parameters(nn.LazyLinear(2)),
}  # fmt: skip


def _loaded(nn):
    layer = nn.LazyLinear(2)
    layer.load_state_dict(nn.Linear(3, 2).state_dict())
    return layer


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_errors(nn, optim, name):
    return ERRORS[name](nn)


@parity
def test_uninitialized_by_hand(nn, optim):
    p = nn.UninitializedParameter(dtype=torch.float64)
    b = nn.UninitializedBuffer(persistent=False)
    before = (
        repr(p),
        repr(b),
        p.requires_grad,
        isinstance(p, nn.Parameter),
        isinstance(b, nn.Buffer),
    )
    p.materialize((2, 3))
    b.materialize((4,), dtype=torch.float16)
    with torch.no_grad():
        p.fill_(1.0)
    (p * 2).sum().backward()
    return before, p, b.dtype, b.shape, b.persistent, type(p).__name__, type(b).__name__


def test_saved_and_loaded_before_its_first_call():
    file = io.BytesIO()
    torch.save(nnmirror.LazyLinear(3), file)
    file.seek(0)
    layer = torch.load(file, weights_only=False)
    assert repr(layer.weight) == "<UninitializedParameter>"
    assert layer(torch.ones(2, 5)).shape == (2, 3)
    assert type(layer) is nnmirror.Linear


def test_bridged():
    """A lazy module is converted after its first call; before, an error says to call it once."""
    theirs = torch.nn.LazyLinear(3)
    x = torch.randn(2, 4)
    theirs(x)
    assert torch.equal(nnmirror.from_torch(theirs)(x), theirs(x))
    for bridge, lib in ((nnmirror.from_torch, torch.nn), (nnmirror.to_torch, nnmirror)):
        with pytest.raises(TypeError, match="call the model once first"):
            bridge(lib.LazyLinear(3))
