"""Batches of many sizes: one bound walk for all, with the bits of PyTorch for each.

As in `test_fast.py`, each program runs in three settings of the mirror.
"""

import gc
import weakref

import pytest
import torch

import nnmirror
from nnmirror import fast

from .parity import parity
from .test_fast import Wired, bound_walks, mode  # noqa: F401


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


def _frozen(i, net):
    net.inp.weight.requires_grad_(i % 7 != 5)


def _hooked(i, net):
    if i == 30:
        net.handle = net.inp.weight.register_hook(lambda g: g * 2)
    if i == 40:
        net.handle.remove()


def _exchanged(i, net):
    for p in net.parameters():
        p.data = p.data * 0.99


def _evaluated(i, net):
    with torch.no_grad():
        net(torch.randn(3 + i % 11, 3))


BETWEEN = [_frozen, _hooked, _exchanged, _evaluated]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda between: between.__name__.strip("_"))
@parity
def test_changes_between_steps(nn, optim, between):
    return train(nn, optim, wired, between=between)


@parity
def test_sizes_that_are_also_widths(nn, optim):
    """A size may be that of a layer, of a constant or of a number by chance."""
    torch.manual_seed(0)
    weights, found = torch.rand(8), []
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    for n in [5, 6, 7, 9, 10, 11, 12, 13, 14, 8, 2, 3, 8, 4, 17, 8, 30, 2, 8]:
        x = torch.randn(n, 8)
        out = net(x) * weights + (weights[:, None] if n == 8 else 0.0)
        loss = out.topk(2, 1).values.sum() / 8 + out.chunk(2)[0].mean() + out.sum(1)[:2].prod()
        net.zero_grad()
        (loss * (n / 10)).backward()
        found.append([p.grad.clone() for p in net.parameters()])
    return found


@parity
def test_two_batches_of_different_sizes(nn, optim):
    torch.manual_seed(0)
    net, found = nn.Linear(3, 4), []
    for i, n in enumerate(sizes(60)):
        one, other = net(torch.randn(n, 3)), net(torch.randn(i % 9 + 1, 3)).tanh()
        net.zero_grad()
        ((one[:, None] - other[None]).pow(2).sum(2).min(1).values.mean() + other.mean()).backward()
        found.append([p.grad.clone() for p in net.parameters()])
    return found


@parity
def test_several_walks_from_one_graph(nn, optim):
    """With retained graphs, given gradients, gradients of inputs and of gradients."""
    torch.manual_seed(0)
    net, found = wired(nn), []
    for n in sizes(40):
        x = torch.randn(n, 3, requires_grad=True)
        out = net(x)
        loss = out.pow(2).mean()
        net.zero_grad()
        loss.backward(retain_graph=True)
        (g,) = torch.autograd.grad(loss, x, retain_graph=True)
        out.backward(torch.ones_like(out), retain_graph=True)
        (h,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        h.pow(2).sum().backward()
        found.append([loss.detach(), g, h.detach(), x.grad, *[p.grad for p in net.parameters()]])
        found[-1] = [t.clone() for t in found[-1]]
    return found


@parity
def test_prediction(nn, optim):
    torch.manual_seed(0)
    net = sequential(nn).eval()
    with torch.no_grad():
        return [net(torch.randn(n, 3)) for n in [*sizes(60), 0, 0, 0]]


@parity
def test_embedded_words(nn, optim):
    torch.manual_seed(0)
    words, net, found = nn.Embedding(20, 4), nn.Linear(4, 2), []
    for n in sizes(60):
        loss = net(words(torch.randint(20, (n, 3))).mean(1)).logsumexp(1).mean()
        loss.backward()
        found += [words.weight.grad.clone(), net.weight.grad.clone()]
    return found


def test_one_walk_is_bound_for_all(mode, after_collection):  # noqa: F811
    """Otherwise each size would be recorded: some milliseconds."""
    torch.manual_seed(0)
    net = wired(nnmirror)
    before = len(bound_walks())
    for n in range(2, 102):
        nnmirror.functional.mse_loss(net(torch.randn(n, 3)), torch.randn(n, 2)).backward()
    made = len(bound_walks()) - before
    if mode == "bound when hot":
        assert 0 < made < 12


def test_models_are_freed_with_the_walks_for_any_size(after_collection):
    gc.disable()
    try:
        net = wired(nnmirror)
        for n in sizes(60):
            nnmirror.functional.mse_loss(net(torch.randn(n, 3)), torch.randn(n, 2)).backward()
        gone = weakref.ref(net.inp.weight)
        before = len(bound_walks())
        del net
        assert gone() is None
        assert len(bound_walks()) < before or not fast.enabled
    finally:
        gc.enable()


def _graphs(count):
    """Numbers of nodes, edges and graphs; equal or proportional by chance."""
    draw = torch.Generator().manual_seed(1)
    for i in range(count):
        n, m = torch.randint(2, 30, (2,), generator=draw).tolist()
        yield (n, 2 * n if i < 12 else n if i % 9 == 0 else m, 3)


@parity
def test_graphs_of_nodes_and_edges(nn, optim):
    torch.manual_seed(0)
    inp, out, found = nn.Linear(3, 8), nn.Linear(8, 2), []
    for n, m, k in _graphs(90):
        source, target = torch.randint(n, (2, m))
        h = nn.functional.relu(inp(torch.randn(n, 3)))
        messages = h[source] * torch.rand(m, 1)
        h = h + torch.zeros(n, 8).index_add(0, target, messages) / m
        pooled = torch.zeros(k, 8).index_add(0, torch.randint(k, (n,)), h)
        loss = nn.functional.cross_entropy(out(pooled), torch.randint(2, (k,)))
        loss = loss + messages.pow(2).mean() + h.var()
        inp.zero_grad(), out.zero_grad()
        loss.backward()
        found.append([p.grad.clone() for p in (*inp.parameters(), *out.parameters())])
    return found


@parity
def test_sentences_of_several_lengths(nn, optim):
    torch.manual_seed(0)
    words, net, found = nn.Embedding(20, 6), nn.Linear(6, 4), []
    for n, length, _ in _graphs(90):
        tokens = torch.randint(20, (n, length))
        mask = (tokens > 3).float().unsqueeze(2)
        h = net(words(tokens)).tanh() * mask
        mean = h.sum(1) / mask.sum(1).clamp(min=1)
        loss = (mean @ mean.t()).logsumexp(1).mean() + h.flatten(0, 1).pow(2).mean()
        words.zero_grad(), net.zero_grad()
        loss.backward()
        found.append([words.weight.grad.clone(), net.weight.grad.clone(), loss.detach()])
    return found


@parity
def test_integers_that_vary(nn, optim):
    """The k of topk, a shape that is written out, a number of steps; sometimes not two or more."""
    torch.manual_seed(0)
    net, scale, found = nn.Linear(3, 4), nn.Parameter(torch.zeros(1)), []
    for n, m, _ in _graphs(90):
        out = net(torch.randn(n, 3))
        k = min(n, m) // 3
        best = out.flatten().topk(max(k, 1)).values
        spread = scale.exp().expand(n, 4)
        loss = best.mean() + (out * spread).view(2, n * 2).sum(1).prod() + out.narrow(0, 0, k).sum()
        net.zero_grad()
        scale.grad = None
        (loss + out.roll(k, 0).mul(out).mean()).backward()
        found.append([net.weight.grad.clone(), scale.grad.clone()])
    return found


@parity
def test_numbers_of_pieces(nn, optim):
    torch.manual_seed(0)
    net, found = nn.Linear(3, 4), []
    for n in sizes(60):
        pieces = [*net(torch.randn(n, 3)).split(4), *net(torch.randn(n, 3)).unbind(0)]
        net.zero_grad()
        torch.stack([p.pow(2).mean() for p in pieces]).prod().backward()
        found.append(net.weight.grad.clone())
    return found


@parity
def test_shapes_that_follow_from_data(nn, optim):
    """Of as many rows for a long time, and then of others."""
    torch.manual_seed(0)
    net, found = nn.Linear(3, 4), []
    for i, n in enumerate(sizes(80)):
        rows = torch.arange(n) < (3 if i < 50 else n // 2)
        out = net(torch.randn(n, 3))[rows]
        net.zero_grad()
        (out.var() + out.pow(2).mean()).backward()
        found.append(net.weight.grad.clone())
    return found


@parity
def test_parts_of_a_batch_that_come_out_even_at_first(nn, optim):
    torch.manual_seed(0)
    net, found = nn.Linear(3, 4), []
    for n in [3 * n for n in sizes(40)] + sizes(40):
        out = net(torch.randn(n, 3))[::3]
        net.zero_grad()
        (out.var(unbiased=False) + out.mean()).backward()
        found.append(net.weight.grad.clone())
    return found


@parity
def test_prediction_from_inputs_of_several_shapes(nn, optim):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        return [net(torch.randn(n, 1, m, n + 3)) for n, m, _ in _graphs(40) if m > 3]


# Of a pair of sizes: what they were for a long time. Afterwards they are any.
RELATIONS = {
    "of one sum": lambda n: (n, 20 - n),
    "of one product": lambda n: (n, 360 // n),
    "apart by one": lambda n: (n, n + 1),
    "in order": lambda n: (n, n + 1 + n * 7 % 5),
    "twice": lambda n: (n, 2 * n),
}


def joined(nn, one, other):
    return torch.cat([one, other]).var(unbiased=False) + torch.cat([one, other]).pow(2).mean()


def diagonal(nn, one, other):
    return (one @ other.t()).diagonal().mean()


def pairs(nn, one, other):
    return (one[:, None] - other[None]).pow(2).mean() + (one @ other.t()).sum() / len(one)


@pytest.mark.parametrize("loss", [joined, diagonal, pairs], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("relation", RELATIONS)
@parity
def test_sizes_that_were_related(nn, optim, relation, loss):
    torch.manual_seed(0)
    net, found = nn.Linear(3, 4), []
    some = [2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 18]
    steps = [RELATIONS[relation](some[i * i % 11]) for i in range(60)]
    for n, m in [*steps, (8, 8), (9, 7), (7, 9), (12, 4), (3, 16), (2, 18), (16, 2), (5, 6)]:
        cost = loss(nn, net(torch.randn(n, 3)), net(torch.randn(m, 3)))
        net.zero_grad()
        cost.backward()
        found.append([cost.detach(), net.weight.grad.clone()])
    return found


@parity
def test_batches_of_odd_sizes_at_first(nn, optim):
    """Every other row of these is half of n - 1."""
    torch.manual_seed(0)
    net, found = nn.Linear(3, 2), []
    for n in [2 * n + 1 for n in sizes(50, 20)] + [8, 12, 10, 30, 9, 16]:
        out = net(torch.randn(n, 3))
        net.zero_grad()
        (out[1::2].var(unbiased=False) + out.mean()).backward()
        found.append(net.weight.grad.clone())
    return found


@parity
def test_numbers_of_windows(nn, optim):
    """One window for a long time, then two: the number follows from two sizes."""
    torch.manual_seed(0)
    net, found = nn.Linear(3, 2), []
    some = [2 * n for n in sizes(50, 12)]
    steps = [(n + n * i % (n - 1 or 1), n) for i, n in enumerate(some)]
    for n, k in [*steps, *[(2 * k + 1, k) for k in (4, 6, 8, 10, 5, 7)]]:
        out = net(torch.randn(n, 3))
        net.zero_grad()
        out.unfold(0, k, k).pow(2).mean().backward()
        found.append(net.weight.grad.clone())
    return found


@pytest.mark.parametrize("fewer", [True, False])
@parity
def test_the_smaller_of_two_lengths(nn, optim, fewer):
    torch.manual_seed(0)
    net, found = nn.Linear(3, 2), []
    for i, n in enumerate([*sizes(60, 20), 21, 13, 28, 16, 9, 30]):
        is_fewer = fewer if i < 60 else not fewer
        one = net(torch.randn(n, 3)).repeat(2, 1)
        m = 2 * n + 1 + i % 9 if is_fewer else max(2 * n - 1 - i % 9, 1)
        other = net(torch.randn(m, 3))
        net.zero_grad()
        ((one @ other.t()).diagonal().mean() + (one @ other.t()).diagonal(1).sum()).backward()
        found.append(net.weight.grad.clone())
    return found
