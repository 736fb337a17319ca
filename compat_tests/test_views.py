"""In-place changes through views, and assignment: a buffer filled step by step trains right."""

import pytest
import torch

import nnmirror

from .parity import parity

MASK = torch.tensor([True, False, True, False])

# What is done to h, the (4, 3) result of an operation; y is (3,), s a number, both with gradient.
CHANGES = {
    "row": lambda h, y, s: h.__setitem__(0, y),
    "row of a number": lambda h, y, s: h.__setitem__(1, s),
    "constant": lambda h, y, s: h.__setitem__((slice(1, 3), 0), 2.5),
    "everything": lambda h, y, s: h.__setitem__(Ellipsis, y),
    "everything constant": lambda h, y, s: h.__setitem__(slice(None), 0),
    "column": lambda h, y, s: h.__setitem__((slice(None), 1), y[:1]),
    "new axis": lambda h, y, s: h.__setitem__((None, 2), y),
    "leading ones": lambda h, y, s: h.__setitem__(0, y[None, None]),
    "mask": lambda h, y, s: h.__setitem__(h > 0, 0),
    "mask of a number": lambda h, y, s: h.__setitem__(h > 0, s),
    "row mask": lambda h, y, s: h.__setitem__(MASK, y),
    "index list": lambda h, y, s: h.__setitem__([0, 2], y),
    "index tensors": lambda h, y, s: h.__setitem__((torch.tensor([0, 3]), torch.tensor([1, 2])), s),
    "row and list": lambda h, y, s: h.__setitem__((2, [0, 1]), y[1:]),
    "slice and list": lambda h, y, s: h.__setitem__((slice(1, None), [2, 0]), y[:2]),
    "list after slice": lambda h, y, s: h.__setitem__((slice(None), torch.tensor([2])), y[:1]),
    "numpy index": lambda h, y, s: h.__setitem__(MASK.numpy(), 1.0),
    "true": lambda h, y, s: h.__setitem__(True, y),
    "other dtype": lambda h, y, s: h.__setitem__(0, y.double()),
    "nested list": lambda h, y, s: h.__setitem__([[0, 1], [1, 0]], 3.0),
    "range": lambda h, y, s: h.__setitem__(range(2), y),
    "nothing": lambda h, y, s: h.__setitem__([], y),
    "false": lambda h, y, s: h.__setitem__(False, y),
    "augmented": lambda h, y, s: h[0].__iadd__(y),
    "view": lambda h, y, s: h.view(-1)[2:6].mul_(s),
    "two views": lambda h, y, s: (h[0].add_(y), h[1:].t()[1].mul_(2)),
    "view twice": lambda h, y, s: h[0].mul_(2).add_(y),
    "relu_ on a view": lambda h, y, s: torch.relu_(h[1:]),
    "transposed": lambda h, y, s: h.t().copy_(y[:, None]),
    "narrowed": lambda h, y, s: h.narrow(1, 1, 2).zero_(),
    "diagonal": lambda h, y, s: h.diagonal().add_(y),
    "masked_fill_": lambda h, y, s: h.masked_fill_(h < 0, s),
    "masked_fill_ on a view": lambda h, y, s: h[1].masked_fill_(h[1] < 0, 0.5),
    "index_add_": lambda h, y, s: h.index_add_(0, torch.tensor([1, 1]), torch.stack([y, y * 2])),
    "scatter_ on a view": lambda h, y, s: h[:2].scatter_(1, torch.tensor([[0], [2]]), y[:2, None]),
    "fill_": lambda h, y, s: h[0].fill_(s),
    "copy_": lambda h, y, s: h.copy_(y),
    "unsqueeze_": lambda h, y, s: h.unsqueeze_(0),
    "t_": lambda h, y, s: h.t_(),
    "uniform_": lambda h, y, s: h[2].uniform_(),
    "in place after a saved use": lambda h, y, s: (h * h, h[0].mul_(2)),
    "unbind": lambda h, y, s: h.unbind()[0].mul_(2),
    "split": lambda h, y, s: h.split(2)[1].mul_(2),
    "expanded": lambda h, y, s: h[:1].expand(4, 3).mul_(2),
    "no_grad view": lambda h, y, s: _changed_in_grad_mode(h, y),
    "under no_grad": lambda h, y, s: _changed_under_no_grad(h, y),
    "wrong shape": lambda h, y, s: h.__setitem__(0, y[:2]),
    "index too large": lambda h, y, s: h.__setitem__(5, y),
    "index not an index": lambda h, y, s: h.__setitem__("a", y),
    "mask of a wrong shape": lambda h, y, s: h.__setitem__(MASK[:3], y),
    "value not a number": lambda h, y, s: h.__setitem__(0, "a"),
}  # fmt: skip


def _changed_in_grad_mode(h, y):
    """By a number, such a view would change unseen: it is a plain tensor for the mirror."""
    with torch.no_grad():
        view = h[0]
    view.mul_(y)


def _changed_under_no_grad(h, y):
    view = h[1]
    with torch.no_grad():
        h[0] = y
        view.mul_(2)


@pytest.mark.parametrize("name", CHANGES)
@parity
def test_change_of_a_result(nn, optim, name):
    """The changed tensor, views of it made before and after, and every gradient."""
    x, y, s = (nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (3,), ()))
    h = nn.functional.leaky_relu(x, 1.0)
    before = h[1:, :2]
    CHANGES[name](h, nn.functional.tanh(y), nn.functional.tanh(s))
    after = h.sum(0)
    names = [t.grad_fn.name() for t in (h, before, after)]
    (h.sum() * 2 + (before * before).sum() + after[0]).backward()
    return names, h, before, after, x, y, s


# Of a plain tensor's view the mirror cannot know in which mode it was made, and records the change.
@pytest.mark.parametrize("name", sorted(set(CHANGES) - {"no_grad view"}))
@parity
def test_change_of_a_plain_tensor(nn, optim, name):
    """A buffer made by torch.zeros starts to carry a gradient."""
    y, s = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(()))
    buffer = torch.randn(4, 3)
    CHANGES[name](buffer, nn.functional.tanh(y), nn.functional.tanh(s))
    loss = (buffer * buffer).sum()
    if loss.requires_grad:
        loss.backward()
    return buffer, y, s


@pytest.mark.parametrize("name", CHANGES)
@parity
def test_change_of_a_leaf(nn, optim, name):
    x, y, s = (nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (3,), ()))
    CHANGES[name](x, nn.functional.tanh(y), nn.functional.tanh(s))
    return x


@parity
def test_recurrent_states_written_into_a_buffer(nn, optim):
    cell, states, h = nn.Linear(3, 3), torch.zeros(6, 2, 3), torch.zeros(2, 3)
    for t in range(6):
        h = nn.functional.tanh(cell(h) + t)
        states[t] = h
    states[2:4] *= 0.5
    states[states > 0.9] = 0.9
    (states * torch.randn(6, 2, 3)).sum().backward()
    return states, dict(cell.named_parameters())


@parity
def test_view_of_a_parameter_lives_through_steps(nn, optim):
    p = nn.Parameter(torch.randn(4, 3))
    row, sgd = p[0], optim.SGD([p], lr=0.1)
    seen = []
    for _ in range(3):
        sgd.zero_grad()
        (row * row).sum().backward()
        sgd.step()
        seen.append((row.grad_fn.name(), p.detach().clone(), p.grad.clone()))
    return seen


@parity
def test_retained_gradient_follows_the_tensor(nn, optim):
    x = nn.Parameter(torch.randn(4, 3))
    h = nn.functional.tanh(x)
    h.retain_grad()
    row = h[0]
    row.retain_grad()
    h.mul_(2)
    h[1] = 3.0
    h.sum().backward()
    return h.retains_grad, h.grad, row.retains_grad, row.grad, x


@parity
def test_view_of_a_base_that_was_detached(nn, optim):
    x = nn.Parameter(torch.randn(4, 3))
    h = nn.functional.tanh(x)
    row = h[0]
    h.mul_(3)
    h.detach_()
    row.sum().backward()
    return x.grad is None, h, row


@parity
def test_hook_on_a_changed_view(nn, optim):
    x = nn.Parameter(torch.randn(4, 3))
    h, seen = nn.functional.tanh(x), []
    row = h[0]
    h.mul_(2)
    assert row.grad_fn is not None  # PyTorch 2.13 itself crashes if not asked for it first
    row.register_hook(lambda g: seen.append(g.clone()))
    (row * 3).sum().backward()
    return seen, x


@parity
def test_second_backward_through_a_changed_view(nn, optim):
    h = nn.functional.tanh(nn.Parameter(torch.randn(4, 3)))
    h[0] = 1.0
    h.sum().backward()
    h.sum().backward()


@pytest.mark.parametrize("how", ["view", "base", "input handed on"])
@parity
def test_view_made_by_a_function_of_your_own(nn, optim, how):
    base = torch.autograd.Function if nn is torch.nn else nnmirror.Function

    class Seen(base):
        @staticmethod
        def forward(ctx, x):
            return x if how == "input handed on" else x.view(-1)

        @staticmethod
        def backward(ctx, g):
            return g.view(4, 3)

    h = nn.functional.tanh(nn.Parameter(torch.randn(4, 3)))
    view = Seen.apply(h)
    (h if how == "base" else view).mul_(2)
    view.sum().backward()


@parity
def test_expanded_view_of_a_changed_base(nn, optim):
    x = nn.Parameter(torch.randn(1, 3))
    h = nn.functional.tanh(x)
    wide, windows = h.expand(4, 3), h.as_strided((2, 2), (1, 1))
    h.mul_(3)
    (wide * torch.randn(4, 3)).sum().backward(retain_graph=True)
    (windows * torch.randn(2, 2)).sum().backward()
    return wide.grad_fn.name(), x
