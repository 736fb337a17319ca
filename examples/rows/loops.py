"""Unrolled loops around a net: rows of the benchmark, each a training step (see nets.py)."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from .nets import Built, row, sequential, tanh


@row("loops", "recurrence 8-32-1 by hand, batch 16, 20 to 80 steps, Adam")
def recurrence(nn: Any, optim: Any) -> Built:
    class RNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.hidden, self.out = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 1)

        def forward(self, x: Any) -> Any:
            h, out = torch.zeros(x.shape[1], 32), []
            for x_t in x:
                h = torch.tanh(self.inp(x_t) + self.hidden(h))
                out.append(self.out(h))
            return torch.stack(out)

    net, criterion, lengths = RNN(), nn.MSELoss(), random.Random(0)
    optimizer = optim.Adam(net.parameters(), lr=1e-3)

    def step() -> Any:
        x = torch.randn(lengths.randint(20, 80), 16, 8)
        loss = criterion(net(x), x.cumsum(0)[..., :1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step, net


@row("loops", "gated recurrent unit 8-32-1 by hand, batch 16, 40 steps, Adam")
def gated(nn: Any, optim: Any) -> Built:
    class GRU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.hidden, self.out = nn.Linear(8, 96), nn.Linear(32, 96), nn.Linear(32, 1)

        def forward(self, x: Any) -> Any:
            h = torch.zeros(x.shape[1], 32)
            for x_t in x:
                i_r, i_z, i_n = self.inp(x_t).chunk(3, 1)
                h_r, h_z, h_n = self.hidden(h).chunk(3, 1)
                r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
                h = (1 - z) * torch.tanh(i_n + r * h_n) + z * h
            return self.out(h)

    net, criterion = GRU(), nn.MSELoss()
    optimizer = optim.Adam(net.parameters(), lr=1e-3)
    x, target = torch.randn(40, 16, 8), torch.randn(16, 1)

    def step() -> Any:
        loss = criterion(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step, net


@row("loops", "neural ODE 2-50-2, batch 16, 19 steps of Runge-Kutta, Adam")
def neural_ode(nn: Any, optim: Any) -> Built:
    f = sequential(nn, (2, 50, 2), tanh)
    optimizer = optim.Adam(f.parameters(), lr=1e-3)
    start, path = torch.randn(16, 2), torch.randn(20, 16, 2)
    h = 1 / 19

    def step() -> Any:
        y, found = start, [start]
        for _ in range(19):
            k1 = f(y)
            k2 = f(y + h / 2 * k1)
            k3 = f(y + h / 2 * k2)
            k4 = f(y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            found.append(y)
        loss = (torch.stack(found) - path).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step, f


@row("loops", "policy 4-32-1 in a linear system, batch 8, 40 steps, clipping, SGD")
def rollout(nn: Any, optim: Any) -> Built:
    policy = sequential(nn, (4, 32, 1), tanh)
    optimizer = optim.SGD(policy.parameters(), lr=1e-3)
    a, b = torch.eye(4) + 0.01 * torch.randn(4, 4), torch.randn(4, 1)

    def step() -> Any:
        x, cost = torch.randn(8, 4), 0.0
        for _ in range(40):
            u = torch.tanh(policy(x))
            x = x @ a.T + u @ b.T
            cost = cost + (x**2).sum(1).mean() + 0.1 * (u**2).mean()
        optimizer.zero_grad()
        cost.backward()  # type: ignore[attr-defined]
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        return cost

    return step, policy


@row("loops", "MAML 1-40-40-1, 4 tasks, one inner step, Adam")
def maml(nn: Any, optim: Any) -> Built:
    F = nn.functional
    net = sequential(nn, (1, 40, 40, 1), lambda nn, size: nn.ReLU())
    optimizer = optim.Adam(net.parameters(), lr=1e-3)

    def predicted(x: Any, weights: Sequence[Any]) -> Any:
        x = F.relu(F.linear(x, *weights[0:2]))
        x = F.relu(F.linear(x, *weights[2:4]))
        return F.linear(x, *weights[4:6])

    def step() -> Any:
        loss = 0.0
        for task in range(4):
            x, weights = torch.randn(10, 1), list(net.parameters())
            y = torch.sin(x + task)
            inner = F.mse_loss(predicted(x, weights), y)
            grads = torch.autograd.grad(inner, weights, create_graph=True)
            weights = [w - 0.01 * g for w, g in zip(weights, grads, strict=True)]
            loss = loss + F.mse_loss(predicted(x, weights), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[attr-defined]
        optimizer.step()
        return loss

    return step, net


@row("loops", "energy 2-64-64-1 with ReLU, batch 64, 10 Langevin steps, Adam")
def energy(nn: Any, optim: Any) -> Built:
    net = sequential(nn, (2, 64, 64, 1), lambda nn, size: nn.ReLU())
    optimizer = optim.Adam(net.parameters(), lr=1e-3)

    def step() -> Any:
        x = torch.randn(64, 2)
        for _ in range(10):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(net(x).sum(), x)
            x = x - 0.1 * slope + 0.01 * torch.randn_like(x)
        loss = net(torch.randn(64, 2)).mean() - net(x.detach()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step, net
