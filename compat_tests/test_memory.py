"""Long runs: nothing is left behind, and no garbage collector is needed."""

import gc
import weakref

import torch

from nnmirror import nn, optim


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        h = self.first(x)
        return self.second(torch.cat([h, x])[: len(x)].relu() + h)


def test_no_cycles_are_made():
    """Everything a step makes is freed by counting references alone."""
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
            model.backward(torch.ones(4, 1)) if model(x) is not None else None
        node, weight = weakref.ref(loss.grad_fn), weakref.ref(model.first)
        del loss, model, criterion, optimizer
        assert node() is None
        assert weight() is None
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_walked_graph_holds_no_activations():
    x = torch.randn(4, 3)
    hidden = nn.Linear(3, 3)(x)
    alias = weakref.ref(hidden)
    out = hidden.tanh().sum()
    del hidden
    out.backward()
    assert alias() is None
