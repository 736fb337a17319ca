"""Distances between each row of one matrix and each row of another."""

import math
from collections.abc import Sequence

import torch

from .. import _torch
from .._torch import is_torch_function_enabled
from ..tape import record
from . import shape
from .registry import Rule, answered, unplaced

T = torch.Tensor


class Cdist(Rule):
    """d_ij = |x_i - y_j| in the p-norm:  dx_i = the sum over j of g_ij s(x_i - y_j)

    With u = x_i - y_j:  s(u) = u / d for p = 2, sign(u) for p = 1, sign(u) (|u| / d)^(p-1) for
    others; for p = infinity sign(u) where |u| is the largest. It is 0 where d = 0. dy is the same
    for the transposed distances.
    """

    @staticmethod
    def forward(x1: T, x2: T, p: float) -> T:
        return torch.cdist(x1, x2, p, compute_mode=_NO_MM)

    @staticmethod
    def d_x1(g: T, x1: T, x2: T, result: T, p: float) -> T:
        return _rows_grad(g, x1, x2, result, p)

    @staticmethod
    def d_x2(g: T, x1: T, x2: T, result: T, p: float) -> T:
        return _rows_grad(g.mT, x2, x1, result.mT, p)


def _rows_grad(g: T, x: T, y: T, d: T, p: float) -> T:
    """dx, with the batch of g."""
    if p == 0 or not y.shape[-2]:
        return no_grad_of(g, x)
    d = d.masked_fill(d == 0, _INFINITY)  # which u is divided by
    x, g, d = x.unsqueeze(-2), g.unsqueeze(-1), d.unsqueeze(-1)
    # So many rows of y at once that what is computed stays in the cache.
    count = max(1, _NUMBERS * y.shape[-2] // max(1, g.numel() * y.shape[-1]))
    total: T | None = None
    for j in range(0, y.shape[-2], count):
        rows = slice(j, j + count)
        slopes = _slope(x - y[..., None, rows, :], d[..., rows, :], p)
        part = (g[..., rows, :] * slopes).sum(-2)
        total = part if total is None else total + part
    assert total is not None
    return total


_NUMBERS, _INFINITY = 1 << 16, float("inf")


def no_grad_of(g: T, x: T) -> T:
    """The gradient of distances that do not depend on x."""
    zeros = torch.zeros((*g.shape[:-1], x.shape[-1]), dtype=g.dtype, device=g.device)
    # Recorded, it depends on x.
    return zeros + x.narrow(-1, 0, 0).sum(-1, True) if is_torch_function_enabled() else zeros


def _slope(u: T, d: T, p: float) -> T:
    """s(u), see above."""
    if p == 2:
        return u / d
    if p == 1:
        return u.sign()
    if p == _INFINITY:
        return u.sign() * (u.abs() == d)
    power = (u.abs() / d) ** (p - 1)
    return u.sign() * (power.masked_fill(u == 0, 0) if p < 1 else power)


class EuclideanDist(Rule):
    """d_ij = sqrt(|x_i|^2 - 2 x_i . y_j + |y_j|^2), by one product of matrices

    With r = g / d (0 where d = 0):  dx_i = x_i sum_j r_ij - sum_j r_ij y_j,  and dy likewise.
    """

    @staticmethod
    def forward(x1: T, x2: T) -> T:
        return _torch.euclidean_dist(x1, x2)

    @staticmethod
    def gradients(
        needs: Sequence[bool], g: T, x1: T, x2: T, result: T
    ) -> tuple[T | None, T | None]:
        r = (g / result).masked_fill_(result == 0, 0)
        dx1 = dx2 = None
        # The products first, as in PyTorch's C++ code: the order matters when it is recorded.
        if needs[0]:
            product = r @ x2
            dx1 = x1 * r.sum(-1, True) - product
        if needs[1]:
            product = r.mT @ x1
            dx2 = x2 * r.sum(-2).unsqueeze(-1) - product
        return dx1, dx2


_USE_MM, _NO_MM = "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"
_USE_MM_IF_MANY = f"{_USE_MM}_if_necessary"
_MODES = (_USE_MM, _NO_MM, _USE_MM_IF_MANY)


@answered(torch.cdist)
def cdist(x1: T, x2: T, p: float = 2.0, compute_mode: str = _USE_MM_IF_MANY) -> T:
    """The distances; for p = 2 and more than 25 rows, or if asked for, by a matrix product."""
    args = x1, x2, p, compute_mode
    if compute_mode not in _MODES or not all(isinstance(x, T) and x.dim() > 1 for x in (x1, x2)):
        raise unplaced(torch.cdist, args, {})
    rows, columns, width = x1.shape[-2], x2.shape[-2], x1.shape[-1]
    try:
        batch = shape.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    except RuntimeError:
        raise unplaced(torch.cdist, args, {}) from None
    by_product = compute_mode == _USE_MM or (
        compute_mode == _USE_MM_IF_MANY and max(rows, columns) > 25
    )
    count = math.prod(batch)
    if p != 2 or not by_product or not (count and rows and columns and width):
        return record(Cdist, (x1, x2, p))[0]
    if width != x2.shape[-1]:
        raise unplaced(torch.cdist, args, {})
    if count != 1:
        x1, x2 = (
            shape.view(
                shape.contiguous(shape.expand(x, (*batch, *x.shape[-2:]))), (-1, *x.shape[-2:])
            )
            for x in (x1, x2)
        )
    return shape.view(record(EuclideanDist, (x1, x2))[0], (*batch, rows, columns))
