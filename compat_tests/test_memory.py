"""Long runs: memory does not grow, and is freed without the garbage collector."""

import gc
import os
import random
import subprocess
import sys
import weakref

import torch

from nnmirror import nn, optim
from nnmirror.fast import signature


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Sequential(
            nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)
        )
        self.second[1].register_full_backward_hook(lambda m, gi, go: None)
        self.second[2].register_forward_hook(lambda m, a, o: o * 2)

    def forward(self, x):
        h = self.first(x)
        h = torch.cat([h, x])[: len(x)].relu() + h
        buffer = torch.zeros(2, len(x), 3)
        buffer[0], buffer[1] = h, h * 2
        buffer[buffer > 1] = 1.0
        h = h * 1
        h[0].mul_(2)
        h = h.softmax(1) + buffer.max(0).values + h.var(1, keepdim=True)
        first, *rest = (h * 2).mul_(2).tanh_().unbind(1)
        return self.second(torch.stack([first, *rest], 1) + h[[0, 1, 2, 3]] @ x.t() @ x)


def test_no_cycles_are_made():
    """A training step makes no reference cycles, so everything is freed at once."""
    gc.collect()
    gc.disable()
    try:
        model, criterion = Net(), nn.MSELoss()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x, t = torch.randn(4, 3), torch.randn(4, 1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = criterion(model(x), t)
            loss.backward()
            optimizer.step()
            model(x)
            model.backward(torch.ones(4, 1))
        node, weight = weakref.ref(loss.grad_fn), weakref.ref(model.first)
        del loss, model, criterion, optimizer
        assert node() is None
        assert weight() is None
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_graph_holds_no_activations_after_backward():
    x = torch.randn(4, 3)
    hidden = nn.Linear(3, 3)(x)
    alias = weakref.ref(hidden)
    out = hidden.tanh().sum()
    del hidden
    out.backward()
    assert alias() is None


def residual_loss(model, criterion, x):
    """The loss of a physics-informed net for u' + u'' = 0."""
    u = model(x)
    (du,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    (ddu,) = torch.autograd.grad(du, x, torch.ones_like(du), create_graph=True)
    return criterion(du + ddu, torch.zeros_like(u))


def test_second_derivatives_leave_no_objects_behind():
    """Training on second derivatives makes no reference cycles, and objects do not accumulate."""
    gc.collect()
    gc.disable()
    try:
        layers = [nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)]
        model, criterion = nn.Sequential(*layers), nn.MSELoss()
        del layers
        optimizer = optim.Adam(model.parameters())
        x = torch.linspace(0, 1, 5).unsqueeze(1).requires_grad_()
        counts = []
        for step in range(120):
            optimizer.zero_grad()
            loss = residual_loss(model, criterion, x)
            loss.backward()
            optimizer.step()
            if step % 40 == 39:  # the first steps fill caches
                counts.append(len(gc.get_objects()))
        assert counts[1] == counts[2]
        node, weight = weakref.ref(loss.grad_fn), weakref.ref(model[0])
        del loss, model, criterion, optimizer
        assert node() is None
        assert weight() is None
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_an_unused_graph_of_a_gradient_is_freed():
    """With create_graph=True and no second backward, the last reference frees the graph."""
    x = torch.linspace(0, 1, 5).unsqueeze(1).requires_grad_()
    layer = nn.Linear(1, 3)
    gc.collect()
    gc.disable()
    try:
        (dx,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        node = weakref.ref(dx.grad_fn)
        del dx
        assert node() is None
        assert gc.collect() == 0
    finally:
        gc.enable()


_ACCUMULATES = """
import torch, nnmirror
torch.set_num_threads(1)
layers = [nnmirror.Linear(512, 512, bias=False) for _ in range(100)]  # a megabyte each
for layer in layers:
    layer.weight.grad = torch.zeros(512, 512)
held = []
for _ in range(40):
    h = torch.ones(2, 512)
    for layer in layers:
        h = torch.tanh(layer(h))
    h.sum().backward()
    with open("/proc/self/status") as status:  # getrusage starts at the memory of the parent
        held += [int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")]
print(held[-1] - held[0])
"""


def test_gradients_are_added_as_soon_as_they_are_complete():
    """Even where bound parts bring them, a backward needs no second set of gradients."""
    environment = dict(os.environ, NNMIRROR_EXACT="0")
    run = subprocess.run(
        [sys.executable, "-c", _ACCUMULATES], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 40


def test_signatures_of_structures_that_are_drawn_anew(monkeypatch):
    """As in a search for an architecture: each step another net, of the same parameters."""
    monkeypatch.setattr(signature, "_MOST_BEHIND", 200)

    def trained(nn, optim, look=lambda: None):
        torch.manual_seed(0)
        choose = random.Random(0)
        stages = [[nn.Linear(4, 4), nn.Tanh(), nn.ReLU(), nn.LeakyReLU()] for _ in range(6)]
        params = [p for stage in stages for p in stage[0].parameters()]
        sgd = optim.SGD(params, lr=0.01)
        for step in range(400):
            x = params[1] + torch.randn(3, 4)
            for stage in stages:
                x = x + choose.choice(stage)(x)
            sgd.zero_grad()
            x.tanh().square().mean().backward()
            sgd.step()
            if step in (200, 399):
                look()
        return [p.detach() for p in params]

    counts = []

    def look():
        gc.collect()
        counts.append(sum(type(o) is signature.Signature for o in gc.get_objects()))

    actual = trained(nn, optim, look)
    assert all(map(torch.equal, actual, trained(torch.nn, torch.optim)))
    assert counts[1] < counts[0] + 300
