"""Arguments that a script changes between the forward and the backward.

PyTorch reads numbers, lists and slices when the operation is called. The backward must not see
what a loop has written into them since.
"""

import numpy as np
import pytest
import torch

import nnmirror

from .parity import parity

NUMBERS = {
    "softmax": lambda y, t: y.softmax(t),
    "cumsum": lambda y, t: y.cumsum(t),
    "sum": lambda y, t: y.sum(t) + y.sum((t, 1 - t)),
    "std": lambda y, t: y.std(t),
    "logsumexp": lambda y, t: y.logsumexp(t),
    "amax": lambda y, t: y.amax(t),
    "norm": lambda y, t: y.norm(2, t),
    "cat": lambda y, t: torch.cat([y, 2 * y], t),
    "unbind": lambda y, t: y.unbind(t)[0],
    "transpose": lambda y, t: y.transpose(t, 1 - t) * torch.arange(8.0).view(2, 4),
    "gather": lambda y, t: y.gather(t, torch.zeros(2, 2, dtype=torch.long)),
    "index_select": lambda y, t: y.index_select(t, torch.tensor([1, 1])),
    "roll": lambda y, t: y.roll(t, 0) * torch.arange(8.0).view(4, 2),
    "roll of a list": lambda y, t: y.roll([t], [0]) * torch.arange(8.0).view(4, 2),
    "flip": lambda y, t: y.flip(t) * torch.arange(8.0).view(4, 2),
    "pad": lambda y, t: torch.constant_pad_nd(y, (t, 2 - t)),
    "tril": lambda y, t: y.tril(t),
    "movedim": lambda y, t: y.movedim(t, 1 - t) * torch.arange(8.0).view(2, 4),
    "alpha": lambda y, t: y.add(y.sin(), alpha=t),
    "value": lambda y, t: torch.addcmul(y, y, y, value=t),
    "slope": lambda y, t: (
        torch.nn.functional.leaky_relu(y, t)
        if type(y) is torch.Tensor
        else nnmirror.functional.leaky_relu(y, t)
    ),
    "slice": lambda y, t: y[t : t + 1] * 3,
    "slice to": lambda y, t: y[: t + 1, t] * 3,
    "narrow": lambda y, t: y.narrow(0, t, 2),
}


@parity
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_in_a_tensor(nn, optim, name):
    found = []
    net = nn.Linear(3, 2)
    for i in range(8):
        t = torch.tensor(i % 2)
        y = NUMBERS[name](net(torch.linspace(-1, 1, 12).view(4, 3) + i), t)
        t.add_(1)
        y.square().sum().backward()
        found += [y.detach(), net.weight.grad.clone(), t]
    return found


@parity
@pytest.mark.parametrize("name", ["sum", "std", "logsumexp", "amax", "roll", "flip"])
def test_a_bool_in_a_tensor_is_a_dimension(nn, optim, name):
    found = []
    net = nn.Linear(3, 2)
    for i in range(8):
        y = NUMBERS[name](net(torch.linspace(-1, 1, 12).view(4, 3)), torch.tensor(i % 2 == 0))
        y.square().sum().backward()
        found += [y.detach(), net.weight.grad.clone()]
    return found


@parity
@pytest.mark.parametrize("name", ["softmax", "cumsum", "unbind", "tril"])
def test_a_bool_in_a_tensor_is_no_single_dimension(nn, optim, name):
    y = nn.Linear(3, 2)(torch.ones(4, 3))
    for _ in range(4):
        with pytest.raises((TypeError, RuntimeError)):
            NUMBERS[name](y, torch.tensor(True))


@parity
def test_numpy_numbers_in_a_slice(nn, optim):
    p, found = nn.Parameter(torch.ones(6)), []
    for _ in range(6):
        a, b = np.array(0), np.array(2)
        y = (p * 1)[a:b]
        a += 2
        b += 2
        (y * torch.tensor([3.0, 5.0])).sum().backward()
        found.append(p.grad.clone())
    return found


@parity
def test_a_weight_that_is_a_tensor_is_saved(nn, optim):
    w, x = torch.tensor(0.3), nn.Linear(3, 2)(torch.ones(4, 3))
    loss = torch.lerp(x, 2 * x, w).square().sum()
    w.mul_(2)
    loss.backward()


LISTS = {
    "sum": (lambda y, a: y.sum(a), [0, 1], [1]),
    "mean": (lambda y, a: y.mean(a), [0], [1]),
    "var": (lambda y, a: y.var(a), [0], [0, 1]),
    "norm": (lambda y, a: torch.linalg.vector_norm(y, 2, a), [0], [1]),
    "amax": (lambda y, a: y.amax(a), [0], [1]),
    "logsumexp": (lambda y, a: y.logsumexp(a), [0], [0, 1]),
    "permute": (lambda y, a: y.permute(a), [1, 0], [0, 1]),
    "pad": (lambda y, a: torch.constant_pad_nd(y, a), [1, 0], [0, 1]),
    "flip": (lambda y, a: y.flip(a), [0], [1]),
    "roll": (lambda y, a: y.roll(a, [0]), [1], [2]),
    "repeat": (lambda y, a: y.repeat(a), [1, 2], [2, 1]),
    "index": (lambda y, a: y[a], [1, 2], [0, 0]),
    "index and slice": (lambda y, a: y[a, 1:], [1, 2], [0, 0]),
    "split": (lambda y, a: y.split(a)[1], [1, 3], [2, 2]),
    "view": (lambda y, a: y.view(a), [2, 4], [4, 2]),
}


@parity
@pytest.mark.parametrize("name", LISTS)
def test_a_list(nn, optim, name):
    function, first, then = LISTS[name]
    found = []
    net = nn.Linear(3, 2)
    for i in range(8):
        given = list(first)
        y = function(net(torch.linspace(-1, 1, 12).view(4, 3) + i), given)
        given[:] = then
        (y * torch.linspace(1, 2, y.numel()).view(y.shape)).sum().backward()
        found += [y.detach(), net.weight.grad.clone()]
    return found


@parity
def test_a_window_that_is_moved_on(nn, optim):
    net, at, found = nn.Linear(3, 2), torch.tensor(0), []
    for _ in range(8):
        at.zero_()
        y = net(torch.linspace(-1, 1, 24).view(8, 3))
        z, loss = y * 1, 0.0
        for k in range(4):
            loss = loss + (k + 1) * y[at : at + 2].square().sum()
            z[at : at + 2] = 2 * z[at : at + 2]
            at += 2
        (loss + z.square().sum()).backward()
        found.append(net.weight.grad.clone())
    return found
