"""Gradients of gradients through in-place changes, of tensors and of views of them.

If the values before the change are lost, the second derivative silently lacks a term.
"""

import pytest
import torch
import torch.nn.functional as F

import nnmirror

from .parity import same_bits
from .test_double_backward import twice

MASK = torch.tensor([[True, False, True, False]] * 3)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@case
def product(x, w):
    y = x * 1
    y.mul_(w)
    return y


@case
def assignment(x, w):
    y = x.clone()
    y[:, 0] = w[0, 0] * w[:, 1]
    return y * y


@case
def product_with_a_column(x, w):
    y = x * x
    y[:, 0].mul_(w[:, 0])
    return y


@case
def functions_whose_result_is_saved(x, w):
    y = x * w
    y[0].tanh_()
    y = y + x
    y.t()[1:].sigmoid_()
    y = y * w
    y[1].exp_()
    y = y + x
    y[1:, 1].sqrt_()
    y = y + x
    y[2].reciprocal_()
    return y


@case
def functions_of_what_was_there(x, w):
    y = x * w
    y[0].sin_()
    y[1].square_()
    y[2].abs_()
    y[:, 1].pow_(3)
    y.clamp_(-0.5, 2.5)
    return y * x


@case
def view_of_a_view(x, w):
    y = x * w
    y.view(-1)[::2].mul_(w.reshape(-1)[::2])
    return y


@case
def view_made_before(x, w):
    y = x * w
    v = y[0]
    y.mul_(x)
    return v * w[1]


@case
def two_views(x, w):
    y = x * w
    a, b = y[:2], y[2]
    a.mul_(w[:2])
    b.mul_(x[0])
    return y


@case
def plain_buffer(x, w):
    z = torch.zeros(3, 4, dtype=x.dtype)
    z[0] = x[0] * w[0]
    z[1] = x[1] * w[1]
    z[2, :2] = w[0, :2]
    return z * z


@case
def masks_and_indices(x, w):
    y = x * w
    y[MASK] = w[MASK] * x[MASK]
    y[torch.tensor([0, 2])] = w[:2] * w[1:]
    y[0:2].masked_fill_(MASK[:1], w[0, 0])
    y.scatter_(1, torch.tensor([[0], [1], [2]]), w[:, :1] * x[:, :1])
    y.index_add_(0, torch.tensor([0, 2]), x[:2] * w[:2], alpha=2)
    return y * x


@case
def memory_read_twice(x, w):
    y = (x * w).contiguous()
    return torch.sin(y.as_strided((3, 3), (1, 1))) * y[0, :3]


@case
def windows(x, w):
    return (x * w).unfold(1, 2, 1).sin()


@case
def quotient_and_products(x, w):
    y = x * w
    y[1].addcmul_(x[0], w[0])
    y[:, 1].add_(w[:, 2], alpha=2)
    y[1:].copy_(x[1:] * w[:2])
    y[0].sub_(y[1])
    return y


@case
def overwritten(x, w):
    y = x * w
    y.zero_()
    y.add_(x * x)
    z = x * w
    z.fill_(w[0, 0])
    z[0, 0] = x[0, 0] * x[0, 1]
    return y * w + z * x


@case
def transposed(x, w):
    y = x.t() * w.t()
    y[0] = x[:, 1] * x[:, 2]
    y.transpose_(0, 1)
    y[1].mul_(x[0])
    return y


@case
def activations(x, w):
    y = x * w
    F.relu(y, inplace=True)
    y = y + x - 2
    F.leaky_relu_(y[1:])
    return y * w


@case
def item_by_item(x, w):
    y = torch.stack([x, w])
    y[0] = x * w
    y[1, 2] *= x[0] * x[1]
    return y * y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_changes_in_place(name, dtype):
    torch.manual_seed(0)
    x, w = (torch.rand(3, 4, dtype=dtype).add_(0.5).requires_grad_() for _ in range(2))
    for args in ((x, w), (x.detach(), w), (x, w.detach())):
        expected = twice(torch.nn, CASES[name], args, {})
        actual = twice(nnmirror, CASES[name], args, {})
        assert expected[0] is None
        assert actual[0] is None, repr(actual[0])
        assert expected[2] == actual[2]
        for e, a in zip([*expected[1], *expected[3]], [*actual[1], *actual[3]], strict=True):
            assert (e is a) if e is None or a is None else same_bits(e, a)
