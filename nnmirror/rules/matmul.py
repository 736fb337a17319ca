"""Matrix products. `torch.matmul` is split into them as in PyTorch."""

from collections.abc import Iterable, Sequence

import torch

from .._torch import DisableTorchFunctionSubclass
from .._types import Number
from ..tape import record
from ..tensor import C_dim
from . import shape
from .arithmetic import Mul, scaled
from .reduction import Sum
from .registry import Rule, answered, composite, inplace, plain_values, rule, unplaced

T = torch.Tensor


def column_major(x: T, other: T) -> bool:
    """Is the matrix x column-major? Its gradient is then computed column-major too, as in
    PyTorch, unless it is multiplied with a sparse one."""
    is_dense = x.layout is torch.strided is other.layout
    return is_dense and x.stride() == (1, x.shape[0])


def from_left(g: T, b: T, by_columns: bool) -> T:
    """dA = G B^T of Z = A B"""
    return b.mm(g.t()).t() if by_columns else g.mm(b.t())


def from_right(g: T, a: T, by_columns: bool) -> T:
    """dB = A^T G of Z = A B"""
    return g.t().mm(a).t() if by_columns else a.t().mm(g)


@rule(torch.mm, T.mm)
class Mm(Rule):
    """Z = A B:  dA = G B^T,  dB = A^T G"""

    @staticmethod
    def forward(input: T, mat2: T) -> T:
        return torch.mm(input, mat2)

    @staticmethod
    def how(input: T, mat2: T) -> tuple[bool, bool]:
        return column_major(input, mat2), column_major(mat2, input)

    @staticmethod
    def d_input(g: T, mat2: T, how: tuple[bool, bool]) -> T:
        return from_left(g, mat2, how[0])

    @staticmethod
    def d_mat2(g: T, input: T, how: tuple[bool, bool]) -> T:
        return from_right(g, input, how[1])


@rule(torch.bmm, T.bmm)
class Bmm(Rule):
    """Z_i = A_i B_i:  dA_i = G_i B_i^T,  dB_i = A_i^T G_i"""

    @staticmethod
    def forward(input: T, mat2: T) -> T:
        return torch.bmm(input, mat2)

    @staticmethod
    def d_input(g: T, mat2: T) -> T:
        return g.bmm(mat2.transpose(1, 2))

    @staticmethod
    def d_mat2(g: T, input: T) -> T:
        return input.transpose(1, 2).bmm(g)


@rule(torch.mv, T.mv)
class Mv(Rule):
    """z = A v:  dA = g v^T,  dv = A^T g"""

    @staticmethod
    def forward(input: T, vec: T) -> T:
        return torch.mv(input, vec)

    @staticmethod
    def d_input(g: T, vec: T) -> T:
        return g.outer(vec)

    @staticmethod
    def d_vec(g: T, input: T) -> T:
        return input.t().mv(g)


@rule(torch.dot, T.dot)
class Dot(Rule):
    """z = sum_i u_i v_i:  du = g v,  dv = g u"""

    @staticmethod
    def forward(input: T, tensor: T) -> T:
        return torch.dot(input, tensor)

    @staticmethod
    def d_input(g: T, tensor: T) -> T:
        return g * tensor

    @staticmethod
    def d_tensor(g: T, input: T) -> T:
        return g * input


@inplace(T.addmm_)
@rule(torch.addmm, T.addmm)
class Addmm(Rule):
    """Z = b X + a A B:  dX = b G,  dA = a G B^T,  dB = a A^T G"""

    @staticmethod
    def forward(input: T, mat1: T, mat2: T, beta: Number = 1, alpha: Number = 1) -> T:
        return torch.addmm(input, mat1, mat2, beta=beta, alpha=alpha)

    @staticmethod
    def how(input: T, mat1: T, mat2: T, beta: Number = 1, alpha: Number = 1) -> tuple[bool, bool]:
        return column_major(mat1, mat2), column_major(mat2, mat1)

    @staticmethod
    def d_input(g: T, beta: Number) -> T:
        return scaled(g, beta)

    @staticmethod
    def d_mat1(g: T, mat2: T, alpha: Number, how: tuple[bool, bool]) -> T:
        return scaled(from_left(g, mat2, how[0]), alpha)

    @staticmethod
    def d_mat2(g: T, mat1: T, alpha: Number, how: tuple[bool, bool]) -> T:
        return scaled(from_right(g, mat1, how[1]), alpha)


@inplace(T.baddbmm_)
@rule(torch.baddbmm, T.baddbmm)
class Baddbmm(Rule):
    """Z_i = b X_i + a A_i B_i:  dX = b G,  dA_i = a G_i B_i^T,  dB_i = a A_i^T G_i"""

    @staticmethod
    def forward(input: T, batch1: T, batch2: T, beta: Number = 1, alpha: Number = 1) -> T:
        return torch.baddbmm(input, batch1, batch2, beta=beta, alpha=alpha)

    @staticmethod
    def d_input(g: T, beta: Number) -> T:
        return scaled(g, beta)

    @staticmethod
    def d_batch1(g: T, batch2: T, alpha: Number) -> T:
        return scaled(g.bmm(batch2.transpose(1, 2)), alpha)

    @staticmethod
    def d_batch2(g: T, batch1: T, alpha: Number) -> T:
        return scaled(batch1.transpose(1, 2).bmm(g), alpha)


@composite(torch.outer, T.outer, torch.ger, T.ger, repeats=True)
def outer(input: T, vec2: T) -> T:
    """u v^T, as PyTorch computes it: u as a column times v"""
    if input.dim() != 1 or vec2.dim() != 1:
        raise unplaced(torch.outer, (input, vec2), {})
    return record(Mul, (shape.reshape(input, (input.shape[0], 1)), vec2))[0]


@composite(torch.einsum, repeats=True)
def einsum(equation: str, *operands: T) -> T:
    """Sums of products of tensors, their dimensions named by letters, as PyTorch contracts them.

    All tensors get all letters as dimensions, the result's first; a missing letter has size one.
    They are multiplied in pairs, from the left or along the path of opt_einsum if that is
    installed; a letter that neither another tensor nor the result has is summed.
    """
    with DisableTorchFunctionSubclass(), torch.no_grad():
        torch.einsum(equation, *plain_values(operands))  # PyTorch's errors
    left, arrow, right = equation.replace(" ", "").partition("->")
    given = [_names(t, x.dim()) for t, x in zip(left.split(","), operands, strict=True)]
    dots = sorted({c for term in given for c in term if c < 0})
    letters = sorted({c for term in given for c in term if c >= 0})
    if not arrow:  # letters that occur once
        out = dots + [c for c in letters if sum(term.count(c) for term in given) == 1]
    else:
        out = _names(right, len(right) - 3 + len(dots))
    rest = [c for c in (*dots, *letters) if c not in out]
    laid = [_laid_out(x, t, out + rest) for x, t in zip(operands, given, strict=True)]
    summed = range(len(out), len(out) + len(rest))
    if len(laid) == 1:
        return record(Sum, (laid[0], list(summed)))[0] if rest else laid[0]
    path = _path(equation, operands)
    while len(laid) > 1:
        i, j = sorted(path.pop(0)) if path else (0, 1)
        second, first = laid.pop(j), laid.pop(i)
        needed = {d for d in summed for x in laid if x.shape[d] != 1}
        made = _product(first, second, [d for d in summed if d not in needed])
        laid.insert(0 if path is None else len(laid), made)
    return record(shape.View, (laid[0], tuple(laid[0].shape[: len(out)])))[0] if rest else laid[0]


def _names(term: str, dims: int) -> list[int]:
    """The letters of a tensor with this number of dimensions, as numbers in PyTorch's order.

    The dimensions that an ellipsis stands for are -1, the last, -2, and so on.
    """
    head, dots, tail = term.partition("...")
    hidden = range(len(head) + len(tail) - dims, 0) if dots else ()
    return [*map(ord, head), *hidden, *map(ord, tail)]


def _path(equation: str, operands: Sequence[T]) -> list[tuple[int, ...]] | None:
    """The order in which to contract more than two: that of opt_einsum, or None for left to
    right."""
    known = torch.backends.opt_einsum
    if len(operands) < 3 or not known.enabled or not known.is_available():
        return None
    found = known.get_opt_einsum().contract_path(
        equation, *plain_values(operands), optimize=known.strategy
    )
    return list(found[0])


def _laid_out(x: T, term: list[int], order: list[int]) -> T:
    """x with the dimensions `order`; a letter that occurs twice takes a diagonal."""
    seen: list[int] = []
    for c in term:
        if c in seen:
            at = seen.index(c)
            x = torch.movedim(torch.diagonal(x, 0, at, len(seen)), -1, at)
        else:
            seen.append(c)
    for c in order:
        if c not in seen:
            x = shape.unsqueeze(x, len(seen))
            seen.append(c)
    return shape.permute(x, [seen.index(c) for c in order])


def _product(a: T, b: T, rest: list[int]) -> T:
    """a b, broadcast, summed over `rest`, which get size one; as matrix products if possible."""
    alone = [[d for d in rest if x.shape[d] != 1 and y.shape[d] == 1] for x, y in ((a, b), (b, a))]
    a, b = (
        record(Sum, (x, dims, True))[0] if dims else x
        for x, dims in zip((a, b), alone, strict=True)
    )
    inner = [d for d in rest if a.shape[d] != 1 and b.shape[d] != 1]
    if not inner:
        return record(Mul, (a, b))[0]
    outer = [d for d in range(a.dim()) if d not in inner]
    batch = [d for d in outer if a.shape[d] != 1 and b.shape[d] != 1]
    rows = [d for d in outer if a.shape[d] != 1 and d not in batch]
    cols = [d for d in outer if d not in batch and d not in rows]
    if rows and cols and rows[0] > cols[-1]:
        # So that the product has the strides of the result.
        a, b, rows, cols = b, a, cols, rows
    n = [_prod(a.shape[d] for d in g) for g in (batch, rows, inner)]
    width = _prod(b.shape[d] for d in cols)
    left = shape.permute(a, [*batch, *rows, *inner, *cols])
    right = shape.permute(b, [*batch, *inner, *cols, *rows])
    z = record(Bmm, (shape.reshape(left, tuple(n)), shape.reshape(right, (n[0], n[2], width))))[0]
    made = [*batch, *rows, *inner, *cols]
    sizes = [1 if d in inner else a.shape[d] if a.shape[d] != 1 else b.shape[d] for d in made]
    return shape.permute(shape.view(z, sizes), [made.index(d) for d in range(a.dim())])


def _mm(a: T, b: T) -> T:
    return record(Mm, (a, b))[0]


def _should_fold(a: T, b: T) -> bool:
    """Are the batch dimensions of the larger operand to be folded into the rows of one matrix?"""
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
    """Can all dimensions except the last be viewed as one, without a copy?"""
    sizes, strides = x.shape, x.stride()
    return x.numel() == 0 or all(
        strides[i] == strides[i + 1] * sizes[i + 1] for i in range(x.dim() - 2)
    )


@composite(torch.matmul, T.matmul, T.__matmul__, repeats=True)
def matmul(input: T, other: T) -> T:
    """`input @ other` for any numbers of dimensions, by matrix products."""
    a, b = input, other
    with DisableTorchFunctionSubclass():
        try:
            n, m = C_dim(a), C_dim(b)
        except TypeError:  # PyTorch's own error follows
            raise TypeError("matmul of what is no tensor") from None
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
        # A batch of one is a single matrix for all: its gradient need not be expanded.
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
    # Batches of matrices: broadcast the batch dimensions, then one product for each.
    rows_a = a.shape[-2] if n > 1 else 1
    cols_b = b.shape[-1] if m > 1 else 1
    try:
        batch = shape.broadcast_shapes(a.shape[:-2], b.shape[:-2])
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


class SparseAddmm(Mm):
    """`Mm` by its other name, with a sparse matrix on the left, which needs no gradient."""


@composite(torch.sparse.mm)
def sparse_mm(mat1: T, mat2: T, *reduce: str) -> T:
    if reduce or mat1.requires_grad:
        raise unplaced(torch.sparse.mm, (mat1, mat2, *reduce), {})
    return record(SparseAddmm, (mat1, mat2))[0]  # type: ignore[no-any-return]


@composite(T.__rmatmul__)
def rmatmul(input: T, other: T) -> T:
    return matmul(other, input)


def _prod(sizes: Iterable[int]) -> int:
    n = 1
    for s in sizes:
        n *= s
    return n


@answered(torch.inner, T.inner, repeats=True)
def inner(input: T, other: T) -> T:
    """The sum of x y over the last dimension of both; of numbers, their product."""
    if not (isinstance(input, T) and isinstance(other, T)):
        raise unplaced(torch.inner, (input, other), {})
    if input.dim() == 0 or other.dim() == 0:
        return record(Mul, (input, other))[0]
    if input.shape[-1] != other.shape[-1]:
        raise unplaced(torch.inner, (input, other), {})
    return tensordot(input, other, ([-1], [-1]))


@composite(torch.tensordot, repeats=True)
def tensordot(a: T, b: T, dims: int | Sequence[Sequence[int]] | T = 2, out: T | None = None) -> T:
    """The product of two tensors, summed over pairs of dimensions: one matrix product."""
    with DisableTorchFunctionSubclass(), torch.no_grad():
        size = torch.tensordot(a, b, dims).shape  # PyTorch's errors
    if out is not None:
        raise unplaced(torch.tensordot, (a, b, dims), {"out": out})
    if isinstance(dims, T):
        dims = dims.tolist() if dims.numel() > 1 else int(dims.item())
    if isinstance(dims, int):
        dims = list(range(-dims, 0)), list(range(dims))
    ours, theirs = ([d] if isinstance(d, int) else list(d) for d in dims)
    ours, theirs = [d % a.dim() for d in ours], [d % b.dim() for d in theirs]
    count = 1
    for i, j in zip(ours, theirs, strict=True):
        if b.shape[j] == 1:
            a = a.sum(i, keepdim=True)
        elif a.shape[i] == 1:
            b = b.sum(j, keepdim=True)
        else:
            count *= a.shape[i]
    rows = [d for d in range(a.dim()) if d not in ours]
    columns = [d for d in range(b.dim()) if d not in theirs]
    a, b = shape.permute(a, (*rows, *ours)), shape.permute(b, (*theirs, *columns))
    if size.numel() == 1:  # with single numbers it is not a matrix product
        if a.is_contiguous() and b.is_contiguous():
            number = record(Dot, (shape.reshape(a, (-1,)), shape.reshape(b, (-1,))))[0]
        else:
            number = (a.squeeze() * b.squeeze()).sum()
        return shape.reshape(number, tuple(size))
    height, width = _prod(a.shape[: len(rows)]), _prod(b.shape[len(theirs) :])
    product = _mm(shape.reshape(a, (height, count)), shape.reshape(b, (count, width)))
    return shape.reshape(product, tuple(size))
