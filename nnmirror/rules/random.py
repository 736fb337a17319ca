"""Draws whose law depends on tensors. What is drawn does not change with them a little: dx = 0.

PyTorch gives that gradient of zeros as well; who wants one through a draw calls `rsample`.
"""

from typing import Any

import torch

from ..tape import record
from .registry import Rule, answered

T = torch.Tensor


class _Drawn(Rule):
    """z drawn by a law of these parameters:  0 for each"""

    @staticmethod
    def draw(*args: Any) -> T:
        raise NotImplementedError

    @staticmethod
    def forward(ctx: Any, *args: Any) -> T:
        ctx.shapes = [a.shape if isinstance(a, T) else None for a in args]
        z: T = ctx.function.draw(*args)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        return tuple(
            torch.zeros(size, dtype=g.dtype, device=g.device) if needed else None
            for size, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )


class Normal(_Drawn):
    """z drawn from the normal law of this mean and spread:  dmean = 0,  dstd = 0"""

    @staticmethod
    def draw(mean: Any, std: Any, generator: Any) -> T:
        return torch.normal(mean, std, generator=generator)

    @staticmethod
    def forward(ctx: Any, mean: Any, std: Any, generator: Any) -> T:
        which = isinstance(mean, T) + 2 * isinstance(std, T)
        ctx.label = f"NormalBackward{which}"
        return _Drawn.forward(ctx, mean, std, generator)


@answered(torch.normal)
def normal(mean: Any, std: Any = 1.0, *, generator: Any = None) -> T:
    return record(Normal, (mean, std, generator))[0]


class Poisson(_Drawn):
    """z drawn from the Poisson law of this rate:  dx = 0"""

    draw: Any = staticmethod(torch.poisson)


@answered(torch.poisson)
def poisson(input: T, generator: Any = None) -> T:
    return record(Poisson, (input, generator))[0]


class Bernoulli(Rule):
    """z = 1 with probability x, else 0:  dx = 0"""

    @staticmethod
    def forward(ctx: Any, input: T, generator: Any) -> T:
        return torch.bernoulli(input, generator=generator)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        return torch.zeros_like(g), None


class BernoulliP(Rule):
    """z = 1 with probability p, in the shape of x; PyTorch has no gradient of it."""

    @staticmethod
    def forward(ctx: Any, input: T, p: float, generator: Any) -> T:
        return torch.bernoulli(input, p, generator=generator)

    @staticmethod
    def backward(ctx: Any, g: T) -> Any:
        raise RuntimeError("derivative for aten::bernoulli is not implemented")

    @classmethod
    def node_name(cls) -> str:
        return "NotImplemented"


@answered(torch.bernoulli, T.bernoulli)
def bernoulli(input: T, p: float | None = None, *, generator: Any = None) -> T:
    if p is None:
        return record(Bernoulli, (input, generator))[0]
    return record(BernoulliP, (input, p, generator))[0]


class BernoulliInplace(Rule):
    """x becomes 1 with probability p, else 0:  dx = 0,  dp = 0"""

    @staticmethod
    def forward(ctx: Any, input: T, p: Any) -> T:
        ctx.label = f"BernoulliBackward{1 if isinstance(p, T) else 2}"
        ctx.save_for_backward(p if ctx.needs_input_grad[1] else None)
        return input

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        dp = torch.zeros_like(ctx.saved(0)) if ctx.needs_input_grad[1] else None
        return torch.zeros_like(g), dp


@answered(T.bernoulli_)
def bernoulli_(input: T, p: Any = 0.5, *, generator: Any = None) -> T:
    return record(
        BernoulliInplace, (input, p), inplace=lambda: T.bernoulli_(input, p, generator=generator)
    )[0]
