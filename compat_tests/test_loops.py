"""Unrolled loops: recurrences, integrators and rollouts, of any number of steps, with PyTorch's bits.

All steps of a loop share signatures, and so bound walks (see fast/README.md). Each test compares
PyTorch with three settings of the mirror, as in test_fast.py.
"""

import gc
import linecache
import random
import weakref

import pytest
import torch

import nnmirror
from nnmirror import fast
from nnmirror.fast import leaves

from .parity import parity

LENGTHS = [5, 12, 30, 30, 30, 45, 12, 60, 33, 30, 2, 47]


@pytest.fixture(params=["bound at once", "bound when hot", "off"], autouse=True)
def mode(request, monkeypatch):
    monkeypatch.setattr(fast, "enabled", request.param != "off")
    monkeypatch.setattr(fast, "after", 1 if request.param == "bound at once" else 3)
    return request.param


def recurrence(nn, net, x, steps):
    h = torch.zeros(x.shape[0], 6)
    out = []
    for _ in range(steps):
        h = torch.tanh(net.inp(x) + net.hidden(h))
        out.append(net.out(h))
    return torch.stack(out).mean()


def gates(nn, net, x, steps):
    """The gates are outputs of one `chunk`, each with a number of its own."""
    h = torch.zeros(x.shape[0], 6)
    for _ in range(steps):
        r, z = net.gates(h).chunk(2, 1)
        n = torch.tanh(net.inp(x) + torch.sigmoid(r) * h)
        z = torch.sigmoid(z)
        h = (1 - z) * n + z * h
    return net.out(h).sum()


def integrator(nn, net, x, steps):
    y, size = net.inp(x), 0.1
    for _ in range(steps):
        k1 = torch.tanh(net.hidden(y))
        k2 = torch.tanh(net.hidden(y + size / 2 * k1))
        y = y + size / 2 * (k1 + k2)
    return y.pow(2).mean()


def rollout(nn, net, x, steps):
    cost, state = 0.0, net.inp(x)
    for k in range(steps):
        u = net.policy(state)
        state = state @ net.a.t() + u
        cost = cost + state.pow(2).sum(1).mean() * 0.99**k
    return cost


def changes(nn, net, x, steps):
    """Steps that are alike in the shapes of all their results, and differ otherwise."""
    h = net.inp(x)
    for k in range(steps):
        layer = net.hidden if k % 7 else net.other
        h = torch.tanh(layer(h)) if k % 5 else torch.sigmoid(layer(h)) + h.detach()
        if k % 11 == 3:
            h = h.clone()
            h[:, 0] = h[:, 1] * 2
        first, second = h.split(3, 1)
        h = torch.cat([second, first] if k % 3 else [first, first], 1)
        if k % 13 == 4:
            h.mul_(0.9)
    return net.out(h).sum()


def kept(nn, net, x, steps):
    """Results of all steps are used again at the end, and one twice."""
    h, held = net.inp(x), []
    for _ in range(steps):
        h = torch.relu(net.hidden(h)) + 0.1 * h
        held.append(h)
    last = torch.stack(held[-3:]).sum(0) * held[len(held) // 2]
    return (last + held[0]).mean()


LOOPS = [recurrence, gates, integrator, rollout, changes, kept]


def net_of(nn):
    net = nn.Module()
    net.inp, net.hidden, net.other = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)
    net.gates, net.out = nn.Linear(6, 12), nn.Linear(6, 1)
    net.policy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    net.a = nn.Parameter(torch.randn(6, 6) * 0.3)
    return net


def train(nn, optim, loop, lengths, between=lambda i, net: None):
    net = net_of(nn)
    optimizer = optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for i, steps in enumerate(lengths):
        between(i, net)
        optimizer.zero_grad()
        loss = loop(nn, net, torch.randn(4, 3), steps)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [(p, p.grad) for p in net.parameters()]


@pytest.mark.parametrize("loop", LOOPS)
@parity
def test_a_loop_of_varying_length(nn, optim, loop):
    return train(nn, optim, loop, LENGTHS)


def _frozen(i, net):
    net.hidden.weight.requires_grad_(i % 4 != 3)


def _exchanged(i, net):
    with torch.no_grad():
        for p in net.parameters():
            p.data = p.data * 0.9


def _replaced(i, net):
    if i % 3 == 2:
        net.hidden.bias = type(net.hidden.bias)(torch.full((6,), 0.1 * i))


@pytest.mark.parametrize("between", [_frozen, _exchanged, _replaced])
@pytest.mark.parametrize("loop", [recurrence, integrator])
@parity
def test_a_net_that_changes_between_two_runs(nn, optim, loop, between):
    return train(nn, optim, loop, [25] * 10, between)


@parity
def test_graphs_that_agree_in_their_last_calls(nn, optim):
    """The losses of two loops in turn, and of one whose middle differs at random."""
    net = net_of(nn)
    draw = random.Random(0)
    for i in range(60):
        h = net.inp(torch.ones(4, 3))
        for k in range(12):
            layer = net.other if (k == 3 and i % 2) or draw.random() < 0.1 else net.hidden
            h = torch.tanh(layer(h))
        (h * 2).pow(2).mean().backward()
    return [p.grad for p in net.parameters()]


@parity
def test_hooks_and_kept_gradients_in_a_loop(nn, optim):
    net, seen = net_of(nn), []
    for i in range(8):
        h, states = net.inp(torch.ones(4, 3)), []
        for k in range(30):
            h = torch.tanh(net.hidden(h))
            states.append(h)
            if i % 2 and k == 17:
                h.register_hook(lambda g: seen.append(g.clone()) or g * 2)
        states[21].retain_grad()
        loss = h.sum()
        loss.backward(retain_graph=i % 3 == 0)
        if i % 3 == 0:
            loss.backward()
        seen.append(states[21].grad)
    return seen, [p.grad for p in net.parameters()]


@parity
def test_second_derivatives_of_a_loop(nn, optim):
    net = net_of(nn)
    grad = torch.autograd.grad if nn is torch.nn else nnmirror.grad
    found = []
    for steps in (6, 14, 14, 14, 14, 20, 14, 14):
        x = (
            torch.ones(4, 3, requires_grad=True)
            if nn is torch.nn
            else nn.Parameter(torch.ones(4, 3))
        )
        y = integrator(nn, net, x, steps)
        (dx,) = grad(y, x, create_graph=True)
        (dx.pow(2).sum() + y).backward()
        found.append(x.grad)
    return found, [p.grad for p in net.parameters()]


@parity
def test_a_branch_that_is_cut_at_first(nn, optim):
    """The input's gradient comes by one branch of a loop, later by both."""
    net, x, found = net_of(nn), nn.Parameter(torch.rand(4, 6)), []
    grad = torch.autograd.grad if nn is torch.nn else nnmirror.grad
    for i in range(16):
        s, h = net.hidden(x.detach() if i < 11 else x), net.hidden(x)
        for k in range(6):
            s = torch.tanh(net.hidden(s * (x if i > 13 and k == 4 else 0.5)))
            h = torch.tanh(net.hidden(h))
        found.append(grad((h * s).sum(), [x]))
    return found


def test_many_kinds_of_ends():
    """Each is bound once, and those of inputs that never come again are forgotten."""
    net = net_of(nnmirror)
    params = [p for p in net.parameters() if p.shape[0] == 6]
    before = {name for name in linecache.cache if name.startswith("<nnmirror walk")}
    for _ in range(20):
        loss = recurrence(nnmirror, net, torch.ones(4, 3), 2) + net.other(torch.ones(6)).sum()
        for p in params:
            nnmirror.grad(loss, p, retain_graph=True, allow_unused=True)
    after = {name for name in linecache.cache if name.startswith("<nnmirror walk")}
    assert len(after - before) <= len(params)
    for _ in range(200):
        x = nnmirror.Parameter(torch.ones(4, 3))
        nnmirror.grad((net.hidden.weight * 2).sum(), [net.hidden.weight, x], allow_unused=True)
    table = (net.hidden.weight * 2).sum().grad_fn.signature.walks.to_ends
    assert not table or len(table) <= 64


@parity
def test_inner_steps_of_meta_learning(nn, optim):
    """The weights' gradients, transposes among them, are used, changed and differentiated."""
    net = net_of(nn)
    params = [net.inp.weight, net.inp.bias, net.out.weight]
    grad = torch.autograd.grad if nn is torch.nn else nnmirror.grad
    F, seen = nn.functional, []

    def loss_of(weights, x):
        w, b, out = weights
        return F.mse_loss(F.linear(torch.tanh(F.linear(x, w, b)), out), x[:, :1])

    for i in range(8):
        x, weights = torch.randn(5, 3), params
        for _ in range(2):
            grads = grad(loss_of(weights, x), weights, create_graph=True)
            if i % 4 == 3:
                grads[0].mul_(0.5)
                grads[2][:, 0] = 1.0
            weights = [w - 0.1 * g for w, g in zip(weights, grads, strict=True)]
        loss_of(weights, x).backward()
        seen.append([g.detach().clone() for g in grads])
    return seen, [p.grad for p in params]


def test_a_long_loop_is_bound_as_a_whole_if_its_length_comes_again(mode):
    """It takes a tenth of a second to write, for a loop of some hundred calls."""
    net = net_of(nnmirror)

    def longest(lengths):
        before = {name for name in linecache.cache if name.startswith("<nnmirror walk")}
        for steps in lengths:
            recurrence(nnmirror, net, torch.ones(4, 3), steps).backward()
        after = {name for name in linecache.cache if name.startswith("<nnmirror walk")}
        made = ["".join(linecache.getlines(name)) for name in after - before]
        return max((text.count("# AddmmBackward0") for text in made), default=0)

    assert longest([60, 70, 80] * 10) < 40
    assert (longest([90] * 40) >= 90) == (mode != "off")


def test_few_walks_are_bound_for_loops_of_many_lengths():
    """Each takes some milliseconds to write."""
    net = net_of(nnmirror)
    before = {name for name in linecache.cache if name.startswith("<nnmirror walk")}
    for steps in range(10, 90):
        recurrence(nnmirror, net, torch.ones(4, 3), steps).backward()
    after = {name for name in linecache.cache if name.startswith("<nnmirror walk")}
    assert len(after - before) <= (16 if fast.after > 1 else 48)


def test_a_net_in_a_loop_is_freed_with_its_signatures(monkeypatch):
    """Without a garbage collector, though the signatures of a loop refer to each other."""
    monkeypatch.setattr(leaves, "_MOST_KINDS", 0)  # none are kept for the next net
    gc.collect()
    gc.disable()
    try:
        alive = []
        for _ in range(5):
            net = net_of(nnmirror)
            for steps in (20, 40, 40, 30):
                loss = gates(nnmirror, net, torch.ones(4, 3), steps)
                loss.backward()
                alive.append(weakref.ref(loss.grad_fn.signature))
            alive.append(weakref.ref(net.hidden.weight))
            del net, loss
        assert not any(ref() for ref in alive)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_graph_outlives_its_net():
    net = net_of(nnmirror)
    expected = []
    for _ in range(5):
        net.zero_grad()
        weight = net.hidden.weight
        loss = recurrence(nnmirror, net, torch.ones(4, 3), 25)
        loss.backward(retain_graph=True)
        expected.append(weight.grad.clone())
    del net
    weight.grad = None
    loss.backward()
    assert torch.equal(weight.grad, expected[-1])


def attention(nn, w, x):
    q, k, v = (x @ w).view(2, 5, 3, 2, 2).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1)
    return (weights @ v).clamp(-0.5, 0.5)


@pytest.mark.by_default
def test_repeated_calls_without_exact_mode():
    """The functions that several calls become are generated in the default mode only."""
    start, inputs, grads = torch.randn(6, 12), torch.randn(8, 2, 5, 6), []
    for nn in (torch.nn, nnmirror):
        w = nn.Parameter(start.clone())
        for x in inputs:
            y = attention(nn, w, x)
            (y @ y.transpose(2, 3)).sum().backward()
        grads.append(w.grad)
    torch.testing.assert_close(grads[1], grads[0])


@parity
@pytest.mark.parametrize("meets", ["a hook of a step", "a user's Function", "an error"])
def test_what_is_complete_during_the_walk(nn, optim, meets):
    """Code that runs meanwhile finds the gradients of those leaves whose last one has come, and so
    does who catches an error."""
    torch.manual_seed(0)
    net, seen = net_of(nn), []
    late = nn.Parameter(torch.ones(6))
    leaves = [late, *net.parameters()]

    def look(*args):
        seen.append([None if p.grad is None else p.grad.clone() for p in leaves])

    class Looks(nn.Function if nn is nnmirror else torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            look()
            return g

    for steps in (6, 6, 6, 20, 20, 3, 20):
        h = net.inp(torch.ones(4, 3))
        for step in range(steps):
            h = torch.tanh(net.hidden(h)) * (late if step > 1 else 1.0)
            if step == 1 and meets == "a hook of a step":
                h.register_hook(look)
            elif step == 1 and meets == "a user's Function":
                h = Looks.apply(h)
            elif step == 1 and meets == "an error":
                held = h
        loss = net.out(h).sum()
        if meets == "an error":
            held.detach().mul_(2.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()
        look()
        if steps > 3:
            for p in leaves:
                p.grad = None
    return seen


@parity
def test_a_step_that_uses_an_earlier_one_twice(nn, optim):
    """Where a part of the walk ended, the same layout may come from its own last node."""

    def loss_of(steps, back):
        states = [torch.tanh(x @ p)]
        for _ in range(steps):
            held = states[max(0, len(states) - back)]
            states.append(torch.tanh(torch.sigmoid(states[-1] @ p) + held))
        return states[-1].pow(2).sum()

    torch.manual_seed(0)
    p, x = nn.Parameter(torch.randn(3, 3)), torch.randn(4, 3)
    found = []
    for repeat in range(20):
        loss_of(12 + repeat % 4, 3).backward()
    for retain in (True, False):
        p.grad = None
        loss_of(13, 1).backward(retain_graph=retain)
        found.append(p.grad.clone())
    return found
