"""Batches of many sizes: one bound walk for all, with the bits of PyTorch for each.

As in `test_fast.py`, each program runs in three settings of the mirror.
"""

import pytest
import torch

from .parity import parity
from .test_fast import Wired, mode  # noqa: F401


def wired(nn):
    return Wired.of(nn)


def sequential(nn):
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def normed(nn):
    norms = nn.LayerNorm(8), nn.BatchNorm1d(8)
    return nn.Sequential(nn.Linear(3, 8), norms[0], nn.SiLU(), norms[1], nn.Linear(8, 2))


def dropped(nn):
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.ELU(), nn.Linear(8, 2))


def grown(nn):
    """Dimensions that come before the size, or multiply it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.out = nn.Linear(3, 8), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.inp(x)).view(-1, 4)  # 2 n rows
            h = h + h.mean(0) - h.t().sum(1) / len(h)
            return self.out(h).view(len(x), 2, 2).sum(1)

    return Net()


def attentive(nn):
    """Every row looks at all others."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x):
            weights = (self.q(x) @ self.k(x).t() / 2).softmax(1)
            return weights @ self.v(x)

    return Net()


def split(nn):
    """Several results of one call, and parts of them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.out = nn.Linear(3, 8), nn.Linear(4, 2)

        def forward(self, x):
            a, b = self.inp(x).chunk(2, 1)
            best, _ = b.max(1, keepdim=True)
            return self.out(torch.cat([a[:, :2] * b.sigmoid()[:, 1:3], a[:, 2:]], 1)) - best

    return Net()


def recurrent(nn):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.back, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = x.new_zeros(len(x), 8)
            for _ in range(4):
                h = torch.tanh(self.inp(x) + self.back(h))
            return self.out(h)

    return Net()


NETS = [wired, sequential, normed, dropped, grown, attentive, split, recurrent]


def mse(nn, out, y, i):
    return nn.functional.mse_loss(out, y)


def cross_entropy(nn, out, y, i):
    return nn.functional.cross_entropy(out, (y[:, 0] > 0).long())


def policy_gradient(nn, out, y, i):
    chosen = (y[:, :1] > 0).long()
    return -(nn.functional.log_softmax(out, 1).gather(1, chosen).squeeze(1) * y[:, 1]).mean()


def by_hand(nn, out, y, i):
    return ((out - y) ** 2).sum() / len(y) + 0.1 * out.abs().sum(1).max()


def clipped(nn, out, y, i):
    ratio = (out[:, 0] - y[:, 0]).exp()
    return -torch.min(ratio * y[:, 1], ratio.clamp(0.8, 1.2) * y[:, 1]).mean()


def normalised(nn, out, y, i):
    return ((out - out.mean(0)) / (out.std(0) + 0.1) * y).mean() + out.var()


def with_a_schedule(nn, out, y, i):
    return nn.functional.smooth_l1_loss(out, y, reduction="sum") * (1 - i / 100) / y.shape[0]


def masked(nn, out, y, i):
    return out[y > 0].sum() / out.numel() + out.norm()


def of_two_parts(nn, out, y, i):
    half = len(y) // 2
    return nn.functional.mse_loss(out[:half], y[:half]) + out[half:].logsumexp(0).sum()


LOSSES = [
    mse,
    cross_entropy,
    policy_gradient,
    by_hand,
    clipped,
    normalised,
    with_a_schedule,
    masked,
    of_two_parts,
]


def sizes(count, most=40, seed=0):
    """Sizes in any order, most of them more than once; the smallest and the largest come late."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randint(2, most, (count,), generator=draw).tolist()
    return [*found, 1, most * 3, 2, 1, most * 3, *found[:9]]


def train(nn, optim, make, loss=mse, count=70, between=lambda i, net: None, most=40):
    net = make(nn)
    optimizer = optim.SGD(net.parameters(), lr=0.05)
    found = []
    for i, n in enumerate(sizes(count, most)):
        between(i, net)
        if n == 1 and make is normed:
            continue  # BatchNorm1d needs more
        x, y = torch.randn(n, 3), torch.randn(n, 2)
        optimizer.zero_grad()
        cost = loss(nn, net(x), y, i)
        cost.backward()
        found.append([cost.detach(), *[p.grad.clone() for p in net.parameters()]])
        optimizer.step()
    return found, [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("make", NETS, ids=lambda make: make.__name__)
@parity
def test_nets(nn, optim, make):
    return train(nn, optim, make)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("make", [wired, sequential], ids=lambda make: make.__name__)
@parity
def test_losses(nn, optim, make, loss):
    return train(nn, optim, make, loss)
