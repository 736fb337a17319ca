"""Nets of one structure one after another: the next one has at once what was written for the last.

A sweep, cross-validation, or Reptile makes a net for a few dozen steps, and then another. Without
this, most of its time would be spent on writing and comparing the same code again. But the code was
written for other parameters, and has to give these theirs.
"""

import copy
import gc
import threading

import pytest
import torch

import nnmirror
from compat_tests.parity import parity
from nnmirror import fast
from nnmirror.fast import leaves, signature


def net_of(nn, width=8, tied=False):
    layers = [nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, width)]
    if tied:
        layers[2].weight = layers[1].weight
    return nn.ModuleList([*layers, nn.Linear(width, 1)])


def run(nn, net, x):
    for layer in net[:-1]:
        x = torch.tanh(layer(x)) + 0.5
    return net[-1](x).square().mean()


def trained(nn, optim, net, steps=6):
    sgd = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for i in range(steps):
        sgd.zero_grad()
        run(nn, net, torch.linspace(-1, 1 + i, 12).view(4, 3)).backward()
        sgd.step()
    return [p.detach().clone() for p in net.parameters()]


@parity
def test_a_sweep(nn, optim):
    return [trained(nn, optim, net_of(nn, 4 + i % 3)) for i in range(12)]


@parity
def test_tied_and_other_weights_in_turn(nn, optim):
    return [trained(nn, optim, net_of(nn, tied=i % 3 == 1)) for i in range(12)]


@parity
def test_frozen_layers_in_turn(nn, optim):
    found = []
    for i in range(12):
        net = net_of(nn)
        net[i % 4].requires_grad_(False)
        found.append(trained(nn, optim, net))
    return found


@parity
def test_one_of_the_parameters_lives_on(nn, optim):
    """In the next nets, or by itself."""
    found, kept = [], []
    for i in range(12):
        net = net_of(nn)
        if kept and i % 2:
            net[2].weight = kept[-1]
        found.append(trained(nn, optim, net))
        if i % 3 == 0:
            kept.append(net[1].weight)
        (run(nn, net, torch.ones(4, 3)) + sum((w * w).sum() for w in kept)).backward()
        found.append([w.grad.clone() for w in (*net.parameters(), *kept)])
    return found


@parity
def test_two_nets_of_one_structure_at_a_time(nn, optim):
    found, nets = [], [net_of(nn), net_of(nn)]
    for i in range(12):
        nets[i % 2] = net_of(nn)
        for _ in range(4):
            x = torch.ones(4, 3)
            loss = run(nn, nets[0], x) * run(nn, nets[1], x)
            for net in nets:
                net.zero_grad()
            loss.backward()
            found.append([p.grad.clone() for net in nets for p in net.parameters()])
    return found


@parity
def test_a_parameter_that_is_new_in_each_step(nn, optim):
    found, w = [], torch.linspace(-1, 1, 6).view(3, 2)
    for _ in range(12):
        p = nn.Parameter(w)
        torch.tanh(torch.ones(4, 3) @ p).square().sum().backward()
        found.append(p.grad)
        w = p.detach() - 0.1 * p.grad
    return found


@parity
def test_copies_for_a_few_steps_each(nn, optim):
    """As in Reptile."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    for i in range(12):
        learner = copy.deepcopy(net)
        sgd = optim.SGD(learner.parameters(), lr=0.1)
        for _ in range(4):
            sgd.zero_grad()
            learner(torch.full((4, 3), 0.1 * i)).square().mean().backward()
            sgd.step()
        with torch.no_grad():
            for p, q in zip(net.parameters(), learner.parameters(), strict=True):
                p += 0.5 * (q - p)
    return [p.detach() for p in net.parameters()]


@parity
def test_a_graph_recorded_before_its_parameter_got_another_layout(nn, optim):
    """Another parameter gets the old layout meanwhile: they are two, for all walks."""
    found = []
    for i in range(16):
        p = nn.Parameter(torch.arange(6.0).view(2, 3) + i)
        double = p * 2
        if i % 2:
            p.data = p.data.t().contiguous().t()
        q = nn.Parameter(torch.ones(2, 3)) if i % 4 > 1 else p
        (double * (q * 2)).sum().backward()
        found += [p.grad, q.grad]
    return found


@parity
def test_a_parameter_that_a_finalizer_saves(nn, optim):
    """It was in a cycle, which the garbage collector finalized; it is another one than the next."""
    saved, found = [], []

    class Keeper:
        def __init__(self):
            self.itself, self.weight = self, nn.Parameter(torch.ones(2, 3))

        def __del__(self):
            saved.append(self.weight)

    for _ in range(6):
        keeper = Keeper()
        (keeper.weight * 2).sum().backward()
        del keeper
        gc.collect()
        p, q = saved[-1], nn.Parameter(torch.full((2, 3), 3.0))
        p.grad = None
        for _ in range(4):
            ((p * 2) * (q * 2)).sum().backward()
        found += [p.grad, q.grad]
    return found


@parity
def test_gradients_of_gradients_in_a_sweep(nn, optim):
    found = []
    for _ in range(12):
        net = net_of(nn)
        for _ in range(3):
            x = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
            (g,) = torch.autograd.grad(run(nn, net, x), x, create_graph=True)
            net.zero_grad()
            g.square().sum().backward()
            found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    return found


@pytest.mark.parametrize("kind", ["by hand", "Sequential"])
def test_the_next_net_is_fast_from_the_start(monkeypatch, kind):
    monkeypatch.setattr(fast, "enabled", True)
    nn = nnmirror
    bound = []
    for _ in range(4):
        if kind == "by hand":
            net = net_of(nn)
        else:
            net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8))
        bound.append([])
        for _ in range(8):
            x = torch.ones(4, 3)
            loss = run(nn, net, x) if kind == "by hand" else net(x).square().mean()
            loss.backward()
            walk = loss.grad_fn.signature.walks.bound
            bound[-1].append(walk is not None and walk.trusted)
        del net, loss, walk
    assert not all(bound[0])
    assert all(bound[3])


@pytest.mark.parametrize("shapes", ["the same", "some", "all different"])
def test_little_is_left_behind(shapes):
    """However many nets come and go: a few signatures, for the next nets like these."""

    def count():
        alive = gc.get_objects()
        return (
            sum(type(o) is signature.Signature for o in alive),
            sum(type(o) is torch.Tensor and o.dim() > 0 for o in alive),
        )

    gc.collect()
    before, counts = count(), []
    for i in range(360):
        width = 8 if shapes == "the same" else i % 20 + 1 if shapes == "some" else i + 1
        net = net_of(nnmirror, width)
        for _ in range(4):
            run(nnmirror, net, torch.ones(4, 3)).backward()
        del net
        if i % 120 == 119:
            counts.append([now - then for now, then in zip(count(), before, strict=True)])
    signatures, tensors = zip(*counts, strict=True)
    assert max(signatures) < 500
    assert signatures[2] <= max(signatures[:2]) + 10
    assert tensors[2] <= max(tensors[:2]) + 10
    kept = sum(map(len, leaves._retired.kept.values()))
    assert kept <= (10 if shapes == "all different" else 200)


def test_the_memory_of_walks_is_freed_with_the_net():
    def count():
        alive = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return sum([o.numel() for o in alive if 2000 in o.shape and not o.is_meta])

    gc.collect()
    before = count()
    for i in range(3):
        net = nnmirror.Sequential(*[nnmirror.Linear(64, 64) for _ in range(30)])
        for _ in range(6):
            y = net(torch.ones(2000, 64))
            nnmirror.functional.mse_loss(y, torch.zeros(2000, 64)).backward()
        del net, y
        if i:  # what is kept is not of the first
            gc.collect()
            assert count() <= before


def test_in_several_threads():
    def run_all(found, seed):
        for i in range(10):
            net = net_of(nnmirror, 4 + (i + seed) % 3)
            with torch.no_grad():
                for k, p in enumerate(net.parameters()):
                    p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) + 0.01 * (k + seed))
            found.append(trained(nnmirror, nnmirror.optim, net))

    expected, found = [[], [], []], [[], [], []]
    for seed in range(3):
        run_all(expected[seed], seed)
    threads = [threading.Thread(target=run_all, args=(found[k], k)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, others in zip(found, expected, strict=True):
        for one, other in zip(mine, others, strict=True):
            assert all(map(torch.equal, one, other))
