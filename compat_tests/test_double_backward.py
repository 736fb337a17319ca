"""Gradients of gradients, `create_graph=True`: PyTorch's, or refused.

Whoever trains by a gradient (physics-informed nets, gradient penalties, meta-learning) would else
train for something else, and nothing would say so.
"""

import contextlib
import warnings

import pytest
import torch

import nnmirror
from nnmirror.tape import tensors_in

from .parity import same_bits
from .test_every_op import OPS, mapped, refused

# Second derivatives that PyTorch rounds otherwise, by how many units (eps times the largest number
# of the result) at most, and why.
CLOSE: dict[str, tuple[float, str]] = {
    "nn.functional.gelu": (4, "its kernel's erf and tanh are no tensor operations"),
    "nn.functional.softplus": (2, "its kernel's exp of positive numbers is no tensor operation"),
    "nn.functional.pairwise_distance": (0, "the sign of a zero: the gradient of sgn is none there"),
}
# The first derivative has PyTorch's bits in exact mode alone; the second follows from the arguments.
EXACT = {"nn.functional.layer_norm", "nn.functional.batch_norm"}
# Not right yet.
TO_DO = {
    "nn.functional.scaled_dot_product_attention",
}
DTYPES = {torch.float64: 8, torch.float32: 8}


def twice(nn, function, args, kwargs):
    """The gradients of a call, which of them require grad, and the gradients of these.

    The gradients of the results require grad too, as those of any function further on would.
    """
    leaves = []

    def leaf(t):
        if not t.requires_grad:
            return t.clone()
        leaves.append(nn.Parameter(t.detach().clone()))
        return leaves[-1]

    torch.manual_seed(0)
    args, kwargs = mapped(list(args), leaf), mapped(kwargs, leaf)
    try:
        made = [t for t in tensors_in(function(*args, **kwargs)) if t.requires_grad]
        given = [nn.Parameter(_numbers(0.5, 1.5, t)) for t in made]
        if not made:
            return None, [], [], []
        first = torch.autograd.grad(made, leaves, given, create_graph=True, allow_unused=True)
        asked = [g is not None and g.requires_grad for g in first]
        further = [g for g, asks in zip(first, asked, strict=True) if asks]
        second = []
        if further:
            starts = [_numbers(-1, 1, g) for g in further]
            second = torch.autograd.grad(further, leaves + given, starts, allow_unused=True)
    except Exception as e:
        return e, [], [], []
    return None, [g if g is None else g.detach() for g in first], asked, second


def _numbers(low, high, like):
    return torch.linspace(low, high, like.numel(), dtype=like.dtype).reshape(like.shape)


def compare(name, function, args, kwargs):
    expected = twice(torch.nn, function, args, kwargs)
    actual = twice(nnmirror, function, args, kwargs)
    if refused(actual[0]):
        return
    if expected[0] is not None:  # PyTorch has no second derivative, or a wrong argument
        assert actual[0] is not None or "not implemented" in str(expected[0]), expected[0]
        return
    assert actual[0] is None, repr(actual[0])
    assert expected[2] == actual[2], f"{name}: requires grad {expected[2]} | {actual[2]}"
    for e, a in zip([*expected[1], *expected[3]], [*actual[1], *actual[3]], strict=True):
        if e is None or a is None:
            assert e is a, f"{name}: {e} | {a}"
        elif name not in CLOSE:
            assert same_bits(e, a), f"{name}: {e} | {a}"
        else:
            within(name, e, a)


def within(name, expected, actual):
    units = CLOSE[name][0]
    assert expected.shape == actual.shape
    assert expected.dtype == actual.dtype
    finite = expected.isfinite()
    assert torch.equal(finite, actual.isfinite())
    assert same_bits(expected[~finite], actual[~finite])
    if finite.any():
        most = units * torch.finfo(expected.dtype).eps * expected[finite].abs().max()
        assert (expected - actual)[finite].abs().max() <= most, f"{name}: {expected} | {actual}"


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].supports_gradgrad])
def test_every_operation_of_pytorchs_table(name, request):
    if name in TO_DO:
        request.applymarker(pytest.mark.xfail(strict=True))
    op = OPS[name]
    for dtype, most in DTYPES.items():
        if dtype not in op.supported_dtypes("cpu"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sample in list(op.sample_inputs("cpu", dtype, requires_grad=True))[:most]:
                args, kwargs = (sample.input, *sample.args), sample.kwargs
                tensors = list(tensors_in([args, kwargs]))
                if any(t.layout is not torch.strided or t.is_complex() for t in tensors):
                    continue
                with nnmirror.exact() if name in EXACT else contextlib.nullcontext():
                    compare(name, op.op, args, kwargs)
