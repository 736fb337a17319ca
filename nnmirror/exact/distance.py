"""Distances, whose gradients PyTorch's kernel sums over the rows one after another."""

import torch

from ..rules import distance
from ..rules.kernel import vectorized_path
from .attach import exact_of

T = torch.Tensor


@exact_of(distance.Cdist, "cdist", units=16)
class Cdist(distance.Cdist):
    """As in `nnmirror.rules.distance`, computed as by PyTorch's kernel."""

    is_recordable = False

    @staticmethod
    def d_x1(g: T, x1: T, x2: T, result: T, p: float) -> T:
        return _rows_grad(g, x1, x2, result, p)

    @staticmethod
    def d_x2(g: T, x1: T, x2: T, result: T, p: float) -> T:
        return _rows_grad(g.mT, x2, x1, result.mT, p)


def _rows_grad(g: T, x: T, y: T, d: T, p: float) -> T:
    total = distance.no_grad_of(g, x)
    for j in range(y.shape[-2] if p else 0):
        gj, dj = g[..., j, None], d[..., j, None]
        total += _term(x - y[..., j : j + 1, :], gj, dj, p)
    return total


def _term(u: T, g: T, d: T, p: float) -> T:
    """g s(u), in the order of the kernel."""
    if p == 1:
        return g * u.sign()
    if p == float("inf"):
        least = (u.abs() - d).abs().ceil().clamp(max=1)
        return g * u.sign() * (1 - least)
    if p == 2:
        term = g * u / d
    elif p < 2:
        term = u.sign() * _power(u.abs(), p - 1) * g / _power(d, p - 1)
        if p < 1:
            term = term.masked_fill(u == 0, 0)
    else:
        term = u * _power(u.abs(), p - 2) * g / _power(d, p - 1)
    return term.masked_fill(d == 0, 0)


def _power(x: T, p: float) -> T:
    """x^p as in the kernel: vectorized, and with p as a tensor, as torch.pow has special cases."""
    return vectorized_path(lambda part: torch.pow(part, torch.full_like(part, p)), x)
