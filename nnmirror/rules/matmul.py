"""Matrix products. `torch.matmul` is taken apart into them as PyTorch takes it apart."""

from typing import Any

import torch

from ..tape import record
from . import shape
from .registry import Rule, composite, rule, unplaced

T = torch.Tensor


def column_major(x: T) -> bool:
    """Is the matrix x stored by columns? Its gradient is then computed so, as in PyTorch."""
    return x.stride() == (1, x.shape[0])


@rule(torch.mm, T.mm)
class Mm(Rule):
    """Z = A B:  dA = G B^T,  dB = A^T G"""

    @staticmethod
    def forward(ctx: Any, input: T, mat2: T) -> T:
        ctx.save_for_backward(input, mat2)
        return torch.mm(input, mat2)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        da = db = None
        if ctx.needs_input_grad[0]:
            b = ctx.saved(1)
            da = b.mm(g.t()).t() if column_major(ctx._saved[0]) else g.mm(b.t())
        if ctx.needs_input_grad[1]:
            a = ctx.saved(0)
            db = g.t().mm(a).t() if column_major(ctx._saved[1]) else a.t().mm(g)
        return da, db


@rule(torch.bmm, T.bmm)
class Bmm(Rule):
    """Z_i = A_i B_i:  dA_i = G_i B_i^T,  dB_i = A_i^T G_i"""

    @staticmethod
    def forward(ctx: Any, input: T, mat2: T) -> T:
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None, mat2 if ctx.needs_input_grad[0] else None
        )
        return torch.bmm(input, mat2)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        a, b = ctx.saved_tensors
        return (
            g.bmm(b.transpose(1, 2)) if ctx.needs_input_grad[0] else None,
            a.transpose(1, 2).bmm(g) if ctx.needs_input_grad[1] else None,
        )


@rule(torch.mv, T.mv)
class Mv(Rule):
    """z = A v:  dA = g v^T,  dv = A^T g"""

    @staticmethod
    def forward(ctx: Any, input: T, vec: T) -> T:
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None, vec if ctx.needs_input_grad[0] else None
        )
        return torch.mv(input, vec)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        a, v = ctx.saved_tensors
        return (
            g.ger(v) if ctx.needs_input_grad[0] else None,
            a.t().mv(g) if ctx.needs_input_grad[1] else None,
        )


@rule(torch.dot, T.dot)
class Dot(Rule):
    """z = sum_i u_i v_i:  du = g v,  dv = g u"""

    @staticmethod
    def forward(ctx: Any, input: T, tensor: T) -> T:
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None, tensor if ctx.needs_input_grad[0] else None
        )
        return torch.dot(input, tensor)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        u, v = ctx.saved_tensors
        return (
            g * v if ctx.needs_input_grad[0] else None,
            g * u if ctx.needs_input_grad[1] else None,
        )


def _mm(a: T, b: T) -> T:
    return record(Mm, (a, b))[0]


def _should_fold(a: T, b: T) -> bool:
    """Are the batch dimensions of the larger operand laid out as rows of one matrix?"""
    a_larger = a.dim() >= b.dim()
    large, small = (a.detach(), b) if a_larger else (b.detach().mT, a)
    if large.dim() < 3 or small.dim() > 2:
        return False
    if small.requires_grad:
        return True
    if a.dim() == 2:
        return False
    return rows_of_one_matrix(large)


def rows_of_one_matrix(x: T) -> bool:
    """Can all dimensions but the last be seen as one, without a copy?"""
    sizes, strides = x.shape, x.stride()
    return x.numel() == 0 or all(
        strides[i] == strides[i + 1] * sizes[i + 1] for i in range(x.dim() - 2)
    )


@composite(torch.matmul, T.matmul, T.__matmul__)
def matmul(input: T, other: T) -> T:
    """`input @ other` for any numbers of dimensions, as a product of matrices."""
    a, b = input, other
    n, m = a.dim(), b.dim()
    if n == 0 or m == 0:
        raise unplaced(torch.matmul, (input, other), {})
    if n == 1 and m == 1:
        return record(Dot, (a, b))[0]
    if n == 2 and m == 1:
        return record(Mv, (a, b))[0]
    if n == 1 and m == 2:
        return shape.squeeze_product(_mm(shape.unsqueeze(a, 0), b), 0)
    if n == 2 and m == 2:
        return _mm(a, b)
    if n == 3 and m == 3:
        # A batch of one is one matrix for all: its gradient need not be expanded.
        if a.shape[0] > 1 and b.shape[0] == 1 and b.requires_grad:
            return matmul(a, shape.squeeze(b, 0))
        if b.shape[0] > 1 and a.shape[0] == 1 and a.requires_grad:
            return matmul(shape.squeeze(a, 0), b)
    if _should_fold(a, b):
        if n >= m:
            large, small = a, b
        else:  # a b = (b^T a^T)^T
            large, small = shape.mT(b), shape.t(a) if n == 2 else a
        *rows, inner = large.shape
        folded = shape.reshape(large, (_prod(rows), inner))
        if small.dim() == 1:
            return shape.unsafe_view(record(Mv, (folded, small))[0], rows)
        out = shape.unsafe_view(_mm(folded, small), [*rows, small.shape[1]])
        return out if n >= m else shape.contiguous(shape.mT(out))
    # Batches of matrices: broadcast the batch dimensions, multiply them one by one.
    rows_a = a.shape[-2] if n > 1 else 1
    cols_b = b.shape[-1] if m > 1 else 1
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise unplaced(torch.matmul, (input, other), {}) from None
    a3 = a if n > 1 else shape.unsqueeze(a, 0)
    b3 = b if m > 1 else shape.unsqueeze(b, 1)
    a3 = shape.reshape(shape.expand(a3, [*batch, *a3.shape[-2:]]), (_prod(batch), *a3.shape[-2:]))
    b3 = shape.reshape(shape.expand(b3, [*batch, *b3.shape[-2:]]), (_prod(batch), *b3.shape[-2:]))
    sizes = [*batch]
    if n > 1:
        sizes.append(rows_a)
    if m > 1:
        sizes.append(cols_b)
    return shape.unsafe_view(record(Bmm, (a3, b3))[0], sizes)


@composite(T.__rmatmul__)
def rmatmul(input: T, other: T) -> T:
    return matmul(other, input)


def _prod(sizes: Any) -> int:
    n = 1
    for s in sizes:
        n *= s
    return n
