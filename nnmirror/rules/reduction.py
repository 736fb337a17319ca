"""Sums and means."""

from typing import Any

import torch

from ..tape import Node
from .registry import Rule, rule

T = torch.Tensor


def _dims(dim: Any, ndim: int) -> list[int]:
    """The reduced dimensions, counted from the front, in order; all of them for none given."""
    given = [dim] if isinstance(dim, int) else list(dim)
    return sorted(d % ndim for d in given) if given and ndim else list(range(ndim))


def expand_back(g: T, shape: Any, dim: Any, keepdim: bool) -> T:
    """The gradient of a sum over `dim`: g repeated along it, without copying."""
    if not keepdim and len(shape):
        for d in _dims(dim, len(shape)):
            g = g.unsqueeze(d)
    return g.expand(shape)


@rule(torch.sum, T.sum)
class Sum(Rule):
    """z = sum of x, over `dim` or all:  dx = g, repeated"""

    @staticmethod
    def forward(ctx: Any, input: T, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> T:
        ctx.shape, ctx.dim, ctx.keepdim = input.shape, dim, keepdim
        if dim is None and not keepdim:
            return torch.sum(input, dtype=dtype)
        ctx.label = "SumBackward1"
        return torch.sum(input, dim, keepdim, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        if ctx.dim is None:
            return g.expand(ctx.shape), None, None, None
        return expand_back(g, ctx.shape, ctx.dim, ctx.keepdim), None, None, None


@rule(torch.mean, T.mean)
class Mean(Rule):
    """z = sum of x / n, over `dim` or all:  dx = g / n, repeated"""

    @staticmethod
    def forward(ctx: Any, input: T, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> T:
        ctx.shape, ctx.dim, ctx.keepdim = input.shape, dim, keepdim
        if dim is None and not keepdim:
            return torch.mean(input, dtype=dtype)
        ctx.label = "MeanBackward1"
        return torch.mean(input, dim, keepdim, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        shape = ctx.shape
        if ctx.dim is None:
            return g.expand(shape) / shape.numel(), None, None, None
        n = 1
        for d in _dims(ctx.dim, len(shape)) if len(shape) else ():
            n *= shape[d]
        return expand_back(g, shape, ctx.dim, ctx.keepdim) / n, None, None, None


__all__ = ["Mean", "Node", "Sum", "expand_back"]
