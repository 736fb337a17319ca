"""`grad` for given inputs, again and again: Langevin steps, attacks, plans by gradient.

Each test compares PyTorch with three settings of the mirror, as in test_fast.py.
"""

import pytest
import torch

import nnmirror
from nnmirror import fast

from .parity import parity


@pytest.fixture(params=["bound at once", "bound when hot", "off"], autouse=True)
def mode(request, monkeypatch):
    monkeypatch.setattr(fast, "enabled", request.param != "off")
    monkeypatch.setattr(fast, "after", 1 if request.param == "bound at once" else 3)
    return request.param


def grad_of(nn):
    return torch.autograd.grad if nn is torch.nn else nnmirror.grad


def net_of(nn):
    net = nn.Module()
    net.a, net.b = nn.Linear(3, 6), nn.Linear(6, 6)
    net.c = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    return net


def energy(net, x):
    h = torch.tanh(net.a(x))
    first, second = net.b(h).chunk(2, 1)
    return net.c(torch.cat([second, first * 2], 1)) + h.pow(2).sum(1, keepdim=True)


@parity
def test_steps_of_an_input(nn, optim):
    """Of torch's own, as a script makes it."""
    net, x = net_of(nn), torch.randn(4, 3)
    for _ in range(12):
        x = x.detach().requires_grad_()
        (g,) = grad_of(nn)(energy(net, x).sum(), x)
        x = x - 0.1 * g
    return x


@parity
def test_steps_of_a_parameter(nn, optim):
    net, x = net_of(nn), nn.Parameter(torch.randn(4, 3))
    for _ in range(12):
        (g,) = grad_of(nn)(energy(net, x).sum(), x)
        with torch.no_grad():
            x -= 0.1 * g
    return x


ENDS = {
    "weight": lambda net, x, h: [net.b.weight],
    "weights": lambda net, x, h: [net.a.weight, net.c[0].bias, net.a.bias],
    "input and weight": lambda net, x, h: [x, net.c[2].weight],
    "hidden": lambda net, x, h: [h],
    "hidden and what it is made of": lambda net, x, h: [h, x, h],
}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("retain_graph", [False, True])
@parity
def test_gradients_for(nn, optim, ends, retain_graph):
    net, found = net_of(nn), []
    for i in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        h = torch.tanh(net.a(x))
        out = net.c(torch.relu(net.b(h)))
        given = ENDS[ends](net, x, h)
        found.append(grad_of(nn)(out, given, torch.full_like(out, 0.5 + i), retain_graph))
        if retain_graph:
            found.append(grad_of(nn)(out.sum(), given))
    return found


@parity
def test_different_ends_in_turn(nn, optim):
    net, found = net_of(nn), []
    for i in range(24):
        x = nn.Parameter(torch.randn(4, 3))
        ends = [[x], [net.a.weight], [net.b.bias], [net.a.weight, x]][i % 4]
        found.append(grad_of(nn)(energy(net, x).mean(), ends))
    return found


@parity
def test_what_changes_between_two_calls(nn, optim):
    net, found = net_of(nn), []
    for i in range(20):
        x = nn.Parameter(torch.randn(4, 3))
        net.b.weight.requires_grad_(i % 5 != 4)
        if i == 9:
            handle = x.register_hook(lambda g: g * 2)
        loss = energy(net, x).mean()
        if i in (12, 13):
            loss.register_hook(lambda g: g * 3)
        if i == 15:
            net.a.weight.data = net.a.weight.data * 2
        found.append(grad_of(nn)(loss, x))
        if i == 9:
            handle.remove()
    return found, [p.grad for p in net.parameters()]


@parity
def test_a_saved_tensor_that_was_changed(nn, optim):
    net = net_of(nn)
    for i in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        h = torch.exp(net.a(x))
        loss = h.pow(2).sum()
        if i == 7:
            with torch.no_grad():
                h.mul_(2)
        grad_of(nn)(loss, x)


@parity
def test_a_graph_that_was_freed(nn, optim):
    net = net_of(nn)
    for i in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        loss = energy(net, x).sum()
        grad_of(nn)(loss, x)
        if i == 7:
            grad_of(nn)(loss, x)


@parity
def test_an_input_that_is_not_used(nn, optim):
    net, found = net_of(nn), []
    for i in range(8):
        x, other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(2))
        loss = energy(net, x if i % 3 else x.detach()).sum()
        found.append(grad_of(nn)(loss, [x, other], allow_unused=True))
    return found


@parity
def test_the_rest_of_the_graph_is_kept(nn, optim):
    """A gradient for one branch frees that branch only."""
    net, found = net_of(nn), []
    for _ in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        shared = torch.tanh(net.a(x))
        left, right = net.c(torch.relu(net.b(shared))), torch.exp(shared).sum()
        found.append(grad_of(nn)(left.sum() + right, net.c[2].weight))
        found.append(grad_of(nn)(right, x))
    return found


@parity
def test_the_graph_behind_an_end_is_kept(nn, optim):
    net, found = net_of(nn), []
    for _ in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        h = torch.tanh(net.a(x))
        (g,) = grad_of(nn)(net.c(torch.exp(h)).sum(), h)
        found.append(grad_of(nn)(h, x, g))
    return found


@parity
def test_an_end_with_a_hook_or_a_kept_gradient(nn, optim):
    net, found = net_of(nn), []
    for i in range(12):
        x = nn.Parameter(torch.randn(4, 3))
        h = torch.tanh(net.a(x))
        if i in (5, 9):
            h.register_hook(lambda g: found.append(g) or g * 2)
        if i in (6, 9):
            h.retain_grad()
        found.append(grad_of(nn)(net.c(torch.exp(h)).sum(), h))
        found.append(h.grad if i in (6, 9) else None)
    return found


@parity
def test_through_torchs_own_graph(nn, optim):
    """The input of the net is computed by torch, from the tensor that is asked for."""
    net, found = net_of(nn), []
    for i in range(8):
        x = torch.randn(4, 3, requires_grad=True)
        moved = x * 2 if i % 4 else x
        found += grad_of(nn)(energy(net, moved).sum() + moved.sum(), x)
    return found
