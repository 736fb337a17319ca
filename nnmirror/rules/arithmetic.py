"""Elementwise arithmetic with broadcasting, and clamp.

`g` is the gradient of the result. Where an operand was broadcast, the walk sums its
gradient back to the operand's shape, so no rule here needs to.
"""

from typing import Any

import torch

from .._versions import SINCE_2_14
from ..tape import Node, number, record
from .registry import Rule, answered, composite, inplace, rule, unplaced
from .shape import to

T = torch.Tensor


_NUMBERS = (int, float, bool)
_ONE = 1  # the default, which takes a while to say


def scaled(g: T, factor: Any) -> T:
    """g * factor, left alone for a factor of one as PyTorch leaves it."""
    return g if type(factor) in _NUMBERS and factor == 1 else g * factor


@inplace(T.add_, T.__iadd__)
@rule(torch.add, T.add, T.__add__, T.__radd__)
class Add(Rule):
    """z = x + alpha y:  dx = g,  dy = alpha g"""

    counted = (0, 1)

    @staticmethod
    def forward(input: T, other: Any, alpha: Any = 1) -> T:
        return torch.add(input, other) if alpha is _ONE else torch.add(input, other, alpha=alpha)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @staticmethod
    def d_other(g: T, alpha: Any) -> T:
        return scaled(g, alpha)


@inplace(T.sub_, T.__isub__, T.subtract_)
@rule(torch.sub, T.sub, T.__sub__, torch.subtract, T.subtract)
class Sub(Rule):
    """z = x - alpha y:  dx = g,  dy = -alpha g"""

    counted = (0, 1)

    @staticmethod
    def forward(input: T, other: Any, alpha: Any = 1) -> T:
        return torch.sub(input, other) if alpha is _ONE else torch.sub(input, other, alpha=alpha)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @staticmethod
    def d_other(g: T, alpha: Any) -> T:
        return scaled(-g, alpha)


class Rsub(Rule):
    """z = other - x:  dx = -g"""

    @staticmethod
    def forward(ctx: Node, input: T, other: Any, alpha: Any = 1) -> T:
        ctx.alpha = alpha  # type: ignore[attr-defined]
        ctx.label = "RsubBackward0" if isinstance(other, T) else "RsubBackward1"
        return torch.rsub(input, other, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        return scaled(-g, ctx.alpha) if needs[0] else None, g if needs[1] else None, None


rule(torch.rsub, T.__rsub__)(Rsub)


@inplace(T.mul_, T.__imul__, T.multiply_)
@rule(torch.mul, T.mul, T.__mul__, T.__rmul__, torch.multiply, T.multiply)
class Mul(Rule):
    """z = x y:  dx = g y,  dy = g x"""

    counted = (0, 1)
    saves_number = True  # PyTorch saves a number as a tensor, and frees it

    @staticmethod
    def forward(input: T, other: Any) -> T:
        return torch.mul(input, other if isinstance(other, T) else number(other, input))

    @staticmethod
    def d_input(g: T, other: Any) -> T:
        return torch.mul(g, other if isinstance(other, T) else number(other, g))

    @staticmethod
    def d_other(g: T, input: T) -> T:
        return g * input


@inplace(T.div_, T.__itruediv__, T.divide_, T.true_divide_)
@rule(torch.div, T.div, T.__truediv__, torch.divide, T.divide, torch.true_divide, T.true_divide)
class Div(Rule):
    """z = x / y:  dx = g / y,  dy = -g ((x / y) / y).  With rounding, both are zero."""

    counted = (0, 1)
    counted_too = "DivBackward2"
    saves_number = True

    @staticmethod
    def forward(input: T, other: Any, rounding_mode: str | None = None) -> T:
        if rounding_mode is not None:
            return torch.div(input, other, rounding_mode=rounding_mode)
        return torch.div(input, other)

    @classmethod
    def label_of(cls, input: T, other: Any, rounding_mode: str | None = None) -> str:
        return "" if rounding_mode is None else "DivBackward2"

    @staticmethod
    def d_input(g: T, other: Any, rounding_mode: str | None) -> T:
        return g / other if rounding_mode is None else torch.zeros_like(g)

    @staticmethod
    def d_other(g: T, input: T, other: Any, rounding_mode: str | None) -> T:
        return -g * ((input / other) / other) if rounding_mode is None else torch.zeros_like(g)


@inplace(T.reciprocal_, torch.reciprocal_)
@rule(torch.reciprocal, T.reciprocal)
class Reciprocal(Rule):
    """z = 1 / x:  dx = -g (z z)"""

    @staticmethod
    def forward(ctx: Node, input: T) -> T:
        z = torch.reciprocal(input)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        (z,) = ctx.saved_tensors
        return -g * (z * z)


@composite(T.__rdiv__, T.__rtruediv__)
def rdiv(input: T, other: Any) -> T:
    """other / x, which PyTorch computes as (1 / x) * other"""
    return record(Mul, (record(Reciprocal, (input,))[0], other))[0]


@inplace(T.neg_, T.negative_)
@rule(torch.neg, T.neg, T.__neg__, torch.negative, T.negative)
class Neg(Rule):
    """z = -x:  dx = -g"""

    @staticmethod
    def forward(ctx: Node, input: T) -> T:
        return torch.neg(input)

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return -g


@composite(T.__pos__, torch.positive, T.positive)
def positive(input: T) -> T:
    return input


@inplace(T.pow_, T.__ipow__)
@rule(torch.pow, T.pow, T.__pow__)
class Pow(Rule):
    """z = x ** p:  dx = g (p x^(p-1)), 0 where p = 0;  dp = g (z log x), 0 where x = 0 <= p"""

    @staticmethod
    def forward(ctx: Node, input: Any, exponent: Any) -> T:
        z = torch.pow(input, exponent)
        ctx.input, ctx.exponent = input, exponent  # type: ignore[attr-defined]
        if not isinstance(exponent, T):
            ctx.label = "PowBackward0"
            ctx.save_for_backward(input)
            ctx.input = None  # type: ignore[attr-defined]
        elif not isinstance(input, T):
            ctx.label = "PowBackward2"
            ctx.save_for_backward(exponent, z)
            ctx.exponent = None  # type: ignore[attr-defined]
        else:
            ctx.label = "PowBackward1"
            ctx.save_for_backward(input, exponent, z)
            ctx.input = ctx.exponent = None  # type: ignore[attr-defined]
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        if ctx.exponent is not None:
            (x,) = ctx.saved_tensors
            p = ctx.exponent
            if p == 0:
                return torch.zeros_like(x), None
            return g * (p * x.pow(p - 1)), None
        if ctx.input is not None:
            p, z = ctx.saved_tensors
            base = ctx.input
            scale = z * torch.log(torch.tensor(base, dtype=torch.float64, device="cpu")).item()
            if base == 0:
                zero = torch.zeros((), dtype=scale.dtype, device=scale.device)
                scale = torch.where(p >= 0, zero, scale)
            return None, g * scale
        x, p, z = ctx.saved_tensors
        dx = dp = None
        zero = torch.zeros((), dtype=g.dtype, device=g.device)
        if ctx.needs_input_grad[0]:
            dx = torch.where(p == 0.0, zero, g * (p * x.pow(p - 1)))
        if ctx.needs_input_grad[1]:
            still = torch.logical_and(x == 0, p >= 0)
            dp = g * torch.where(still, zero, z * x.log())
        return dx, dp


@composite(T.__rpow__)
def rpow(input: T, other: Any) -> T:
    return record(Pow, (other, input))[0]


def _in_double(x: Any) -> Any:
    """A tensor or a number in double precision."""
    if isinstance(x, T):
        return to(x, torch.complex128 if x.is_complex() else torch.float64)
    return complex(x) if isinstance(x, complex) else float(x)


@answered(torch.float_power, T.float_power)
def float_power(input: Any, exponent: Any) -> T:
    """x ** p in double precision; see `Pow`"""
    numbers = [x for x in (input, exponent) if not isinstance(x, T)]
    if not all(isinstance(x, bool | int | float | complex) for x in numbers):
        raise unplaced(torch.float_power, (input, exponent), {})
    exponent = _in_double(exponent)  # first, as C++ has it
    return record(Pow, (_in_double(input), exponent))[0]


@answered(T.float_power_)
def float_power_(input: T, exponent: Any) -> T:
    if input.dtype.itemsize < 8:
        raise unplaced(T.float_power_, (input, exponent), {})
    return T.pow_(input, _in_double(exponent))


@composite(torch.square, T.square)
def square(input: T) -> T:
    return record(Pow, (input, 2))[0]


@composite(T.square_, torch.square_)
def square_(input: T) -> T:
    return record(Pow, (input, 2), inplace=lambda: T.square_(input))[0]


@inplace(T.clamp_, T.clip_)
@rule(torch.clamp, T.clamp, torch.clip, T.clip)
class Clamp(Rule):
    """z = min(max(x, lo), hi):  dx = g where lo <= x <= hi, else 0

    With tensors as bounds, dlo = g where x < lo < hi and dhi = g where x > hi or hi < lo.
    From PyTorch 2.14 on x gets nothing where it is at a bound that is a number, and half where
    it is at one of a tensor, which gets the other half: `_shared_at_ties`.
    """

    @staticmethod
    def forward(ctx: Node, input: T, min: Any = None, max: Any = None) -> T:
        bounds = isinstance(min, T) or isinstance(max, T)
        if bounds and not all(isinstance(b, T | None) for b in (min, max)):
            # A number beside a tensor: the tensor must be one number, without a gradient.
            z = torch.clamp(input, min, max)
            min, max = (b.item() if isinstance(b, T) else b for b in (min, max))
            ctx.label, ctx.bounds = "ClampBackward1", (min, max)  # type: ignore[attr-defined]
            ctx.save_for_backward(input)
            return z
        ctx.label = "ClampBackward0" if bounds else "ClampBackward1"
        ctx.bounds = None if bounds else (min, max)  # type: ignore[attr-defined]
        if bounds:
            ctx.save_for_backward(input, min, max)
        else:
            ctx.save_for_backward(input)
        return torch.clamp(input, min, max)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        zero = torch.zeros((), dtype=g.dtype, device=g.device)
        if ctx.bounds is not None:
            (x,) = ctx.saved_tensors
            lo, hi = ctx.bounds
            if SINCE_2_14:
                return torch.where(_within(x, lo, hi), g, zero), None, None
            if lo is not None and hi is not None:
                inside = (x >= lo).logical_and_(x <= hi)
            else:
                inside = x >= lo if lo is not None else x <= hi
            return torch.where(inside, g, zero), None, None
        x, lo, hi = ctx.saved_tensors
        needs = (*ctx.needs_input_grad, False)  # the last bound may not have been given
        if SINCE_2_14:
            grads = _shared_at_ties(g, x, lo, hi)
            return tuple(d if need else None for d, need in zip(grads, needs, strict=False))
        dx = dlo = dhi = None
        if needs[0]:
            if lo is not None and hi is not None:
                inside = torch.logical_and(x >= lo, x <= hi)
            else:
                inside = x >= lo if lo is not None else x <= hi
            dx = torch.where(inside, g, zero)
        if needs[1]:
            below = x < lo
            dlo = torch.where(below if hi is None else below.logical_and_(lo < hi), g, zero)
        if needs[2]:
            above = x > hi
            dhi = torch.where(above if lo is None else above.logical_or_(hi < lo), g, zero)
        return dx, dlo, dhi


@inplace(T.clamp_min_)
@rule(torch.clamp_min, T.clamp_min)
class ClampMin(Rule):
    """z = max(x, lo):  dx = g where x >= lo, else 0;  dlo = g where x < lo, else 0

    Where both are equal, from PyTorch 2.14 on, as `Clamp`.
    """

    @staticmethod
    def forward(ctx: Node, input: T, min: Any) -> T:
        return _clamp_one_side(ctx, input, min, torch.clamp_min)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        if SINCE_2_14:
            return _one_side_at_ties(ctx, g, True)
        return _one_side(ctx, g, torch.ge, torch.lt)


@inplace(T.clamp_max_)
@rule(torch.clamp_max, T.clamp_max)
class ClampMax(Rule):
    """z = min(x, hi):  dx = g where x <= hi, else 0;  dhi = g where x > hi, else 0

    Where both are equal, from PyTorch 2.14 on, as `Clamp`.
    """

    @staticmethod
    def forward(ctx: Node, input: T, max: Any) -> T:
        return _clamp_one_side(ctx, input, max, torch.clamp_max)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        if SINCE_2_14:
            return _one_side_at_ties(ctx, g, False)
        return _one_side(ctx, g, torch.le, torch.gt)


def _within(x: T, lo: Any, hi: Any) -> T:
    """Where x is between two numbers, and at neither."""
    if lo is None:
        return x < hi
    return x > lo if hi is None else (x > lo).logical_and_(x < hi)


def _shared_at_ties(g: T, x: T, lo: T | None, hi: T | None) -> tuple[T | None, T | None, T | None]:
    """dx, dlo and dhi of a clamp between tensors, half each where x is at a bound."""
    half, zero = g / 2, torch.zeros((), dtype=g.dtype, device=g.device)
    if lo is None or hi is None:
        bound: Any = hi if lo is None else lo
        x_lost, bound_lost = (x > bound, x < bound) if lo is None else (x < bound, x > bound)
        shared = torch.where(x == bound, half, g)
        db = shared.masked_fill(bound_lost, 0)
        dx = shared.masked_fill(x_lost, 0)
        return (dx, None, db) if lo is None else (dx, db, None)
    apart, at_lo, at_hi = lo < hi, x == lo, x == hi
    below, above, ordered = x < lo, x > hi, lo <= hi
    dx = torch.where((at_lo | at_hi) & apart, half, g).masked_fill(below | above, 0)
    dlo = torch.where(below & ordered, g, torch.where(at_lo & apart, half, zero))
    over = (hi < lo) | (above & ordered)
    return dx, dlo, torch.where(over, g, torch.where(at_hi & apart, half, zero))


def _one_side_at_ties(ctx: Any, g: T, below: bool) -> tuple[Any, Any]:
    x, bound = ctx.saved_tensors
    if bound is None:
        lo, hi = (ctx.bound, None) if below else (None, ctx.bound)
        zero = torch.zeros((), dtype=g.dtype, device=g.device)
        return torch.where(_within(x, lo, hi), g, zero), None
    dx, dlo, dhi = _shared_at_ties(g, x, *((bound, None) if below else (None, bound)))
    db, needs = dlo if below else dhi, ctx.needs_input_grad
    return dx if needs[0] else None, db if needs[1] else None


def _clamp_one_side(ctx: Any, input: T, bound: Any, clamp: Any) -> T:
    ctx.bound = None if isinstance(bound, T) else bound
    ctx.save_for_backward(input, bound if isinstance(bound, T) else None)
    if isinstance(bound, T):
        ctx.label = f"{ctx.function.__name__}Backward1"
    return clamp(input, bound)


def _one_side(ctx: Any, g: T, kept: Any, cut: Any) -> tuple[Any, Any]:
    x, bound = ctx.saved_tensors
    limit = ctx.bound if bound is None else bound
    zero = torch.zeros((), dtype=g.dtype, device=g.device)
    return (
        torch.where(kept(x, limit), g, zero) if ctx.needs_input_grad[0] else None,
        torch.where(cut(x, limit), g, zero) if ctx.needs_input_grad[1] else None,
    )
