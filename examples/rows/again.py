"""Nets that are made anew: rows of the benchmark (see nets.py)."""

import copy
from typing import Any

import torch

from .nets import Built, fit, row, sequential, tanh


@row(
    "again",
    "a new net 8-32-32-1 by hand, batch 16, Adam, trained",
    {"5 steps": 5, "20 steps": 20, "100 steps": 100},
)
def sweep(nn: Any, optim: Any, steps: int) -> Built:
    """As in a search for hyperparameters, or cross-validation."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 1)

        def forward(self, x: Any) -> Any:
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    x, target, kept = torch.randn(16, 8), torch.randn(16, 1), nn.ModuleList([Net()])

    def step() -> Any:
        net = kept[0] = Net()
        optimizer = optim.Adam(net.parameters(), lr=1e-3)
        train, _ = fit(net, nn.MSELoss(), optimizer, iter([(x, target)] * steps))
        for _ in range(steps):
            loss = train()
        return loss

    return step, kept


@row("again", "Reptile: a copy of 1-64-64-1 with Tanh, batch 20, 5 inner steps of SGD")
def reptile(nn: Any, optim: Any) -> Built:
    net = sequential(nn, (1, 64, 64, 1), tanh)
    x = torch.linspace(-5, 5, 20).view(20, 1)

    def step() -> Any:
        learner = copy.deepcopy(net)
        optimizer = optim.SGD(learner.parameters(), lr=0.02)
        train, _ = fit(learner, nn.MSELoss(), optimizer, iter([(x, x.sin())] * 5))
        for _ in range(5):
            loss = train()
        with torch.no_grad():
            for p, q in zip(net.parameters(), learner.parameters(), strict=True):
                p += 0.1 * (q - p)
        return loss

    return step, net


@row("again", "8-64-4, whose last weight is a new Parameter in each step, batch 20")
def replaced(nn: Any, optim: Any) -> Built:
    net = sequential(nn, (8, 64, 4), tanh)
    x, target, criterion = torch.randn(20, 8), torch.randn(20, 4), nn.MSELoss()

    def step() -> Any:
        net[-1].weight = nn.Parameter(0.99 * net[-1].weight.detach())
        net.zero_grad()
        loss = criterion(net(x), target)
        loss.backward()
        return loss

    return step, net
