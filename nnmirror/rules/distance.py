"""Distances between each row of one matrix and each row of another."""

from collections.abc import Sequence

import torch

from .. import _torch
from .._torch import is_torch_function_enabled
from ..tape import record
from . import shape
from .kernel import vectorized_path
from .registry import Rule, answered, unplaced

T = torch.Tensor


class Cdist(Rule):
    """d_ij = |x_i - y_j| in the p-norm:  dx_i = the sum over j of g_ij times the slope in x_i

    With u = x_i - y_j, that slope is u / d for p = 2, sign(u) for p = 1, u |u|^(p-2) / d^(p-1) for
    others, sign(u) where |u| is the largest for p = infinity; 0 where d = 0. The kernel sums over j
    sequentially, and so does this; dy is the same for the transposed distances.
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
    total = torch.zeros((*g.shape[:-1], x.shape[-1]), dtype=g.dtype, device=g.device)
    if p == 0 or not y.shape[-2]:
        # Recorded, it depends on x.
        return total + x.narrow(-1, 0, 0).sum(-1, True) if is_torch_function_enabled() else total
    for j in range(y.shape[-2]):
        gj, dj = g[..., j, None], d[..., j, None]
        total += _slope(x - y[..., j : j + 1, :], gj, dj, p)
    return total


def _slope(u: T, g: T, d: T, p: float) -> T:
    """g times the slope of d = |u|, rounded in the order of the kernel."""
    if p == 1:
        return g * u.sign()
    if p == float("inf"):
        least = (u.abs() - d).abs().ceil().clamp(max=1)
        return g * u.sign() * (1 - least)
    if p == 2:
        slope = g * u / d
    elif p < 2:
        slope = u.sign() * _power(u.abs(), p - 1) * g / _power(d, p - 1)
        if p < 1:
            slope = slope.masked_fill(u == 0, 0)
    else:
        slope = u * _power(u.abs(), p - 2) * g / _power(d, p - 1)
    return slope.masked_fill(d == 0, 0)


def _power(x: T, p: float) -> T:
    """x^p as in the kernel: vectorized, and with p as a tensor, as torch.pow has special cases."""
    return vectorized_path(lambda part: torch.pow(part, torch.full_like(part, p)), x)


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
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    except RuntimeError:
        raise unplaced(torch.cdist, args, {}) from None
    by_product = compute_mode == _USE_MM or (
        compute_mode == _USE_MM_IF_MANY and max(rows, columns) > 25
    )
    count = batch.numel()
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
