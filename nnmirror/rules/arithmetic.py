"""Elementwise arithmetic with broadcasting, and clamp.

`g` is the gradient of the result. Where an operand was broadcast, the walk sums its
gradient back to the operand's shape, so no rule here needs to.
"""

import numbers

import torch

from .._torch import DisableTorchFunctionSubclass, is_torch_function_enabled
from .._types import Number, TorchFunction
from .._versions import SINCE_2_14
from ..constants import constant, number
from ..tape import OTHER, dispatch_kind, record
from .registry import (
    Gradients,
    Needs,
    Rule,
    answered,
    composite,
    has_gradient,
    inplace,
    plain_values,
    rule,
    unplaced,
)
from .shape import to

T = torch.Tensor


_NUMBERS = (int, float, bool)
_ONE = 1  # the default alpha: passing a number takes time


def scaled(g: T, factor: T | Number) -> T:
    """g * factor, or g itself for a factor of one, as in PyTorch."""
    return g if type(factor) in _NUMBERS and factor == 1 else g * factor


def zero(g: T) -> T:
    return constant(0.0, g.dtype, g.device)


def shared(needs: Needs, g: T, equal: T, x_loses: T, y_loses: T) -> Gradients:
    """The larger (or smaller) of x and y gets g, and each gets half of it where both are equal."""
    halved = torch.where(equal, g / 2, g)
    return (
        halved.masked_fill(x_loses, 0) if needs[0] else None,
        halved.masked_fill(y_loses, 0) if needs[1] else None,
    )


@inplace(T.add_, T.__iadd__)
@rule(torch.add, T.add, T.__add__, T.__radd__)
class Add(Rule):
    """z = x + alpha y:  dx = g,  dy = alpha g"""

    counted = (0, 1)
    operands = (1,)
    operator = torch.add

    @staticmethod
    def forward(input: T, other: T | Number, alpha: Number = 1) -> T:
        return torch.add(input, other) if alpha is _ONE else torch.add(input, other, alpha=alpha)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @staticmethod
    def d_other(g: T, alpha: Number) -> T:
        return scaled(g, alpha)


@inplace(T.sub_, T.__isub__, T.subtract_)
@rule(torch.sub, T.sub, T.__sub__, torch.subtract, T.subtract)
class Sub(Rule):
    """z = x - alpha y:  dx = g,  dy = -alpha g"""

    counted = (0, 1)
    operands = (1,)
    operator = torch.sub

    @staticmethod
    def forward(input: T, other: T | Number, alpha: Number = 1) -> T:
        return torch.sub(input, other) if alpha is _ONE else torch.sub(input, other, alpha=alpha)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @staticmethod
    def d_other(g: T, alpha: Number) -> T:
        return scaled(-g, alpha)


class Rsub(Rule):
    """z = other - x:  dx = -g"""

    operator = torch.rsub

    @staticmethod
    def forward(input: T, other: T | Number, alpha: Number = 1) -> T:
        return torch.rsub(input, other, alpha=alpha)

    @classmethod
    def label_of(cls, input: T, other: T | Number, alpha: Number = 1) -> str:
        return "RsubBackward0" if isinstance(other, T) else "RsubBackward1"

    @staticmethod
    def d_input(g: T, alpha: Number) -> T:
        return scaled(-g, alpha)

    @staticmethod
    def d_other(g: T) -> T:
        return g


rule(torch.rsub, T.__rsub__)(Rsub)


@inplace(T.mul_, T.__imul__, T.multiply_)
@rule(torch.mul, T.mul, T.__mul__, T.__rmul__, torch.multiply, T.multiply)
class Mul(Rule):
    """z = x y:  dx = g y,  dy = g x"""

    counted = (0, 1)
    operands = (1,)
    operator = torch.mul
    saves_number = True  # PyTorch saves a number as a tensor, and frees it

    @staticmethod
    def forward(input: T, other: T | Number) -> T:
        return torch.mul(input, number(other, input) if type(other) is float else other)

    @staticmethod
    def d_input(g: T, other: T | Number) -> T:
        return torch.mul(g, number(other, g) if type(other) is float else other)

    @staticmethod
    def d_other(g: T, input: T) -> T:
        return g * input


@inplace(T.div_, T.__itruediv__, T.divide_, T.true_divide_)
@rule(torch.div, T.div, T.__truediv__, torch.divide, T.divide, torch.true_divide, T.true_divide)
class Div(Rule):
    """z = x / y:  dx = g / y,  dy = -g ((x / y) / y).  With rounding, both are zero."""

    counted = (0, 1)
    operands = (1,)
    operator = torch.div
    counted_too = "DivBackward2"
    saves_number = True

    @staticmethod
    def forward(input: T, other: T | Number, rounding_mode: str | None = None) -> T:
        if rounding_mode is not None:
            return torch.div(input, other, rounding_mode=rounding_mode)
        return torch.div(input, other)

    @classmethod
    def label_of(cls, input: T, other: T | Number, rounding_mode: str | None = None) -> str:
        return "" if rounding_mode is None else "DivBackward2"

    @staticmethod
    def d_input(g: T, other: T | Number, rounding_mode: str | None) -> T:
        return g / other if rounding_mode is None else torch.zeros_like(g)

    @staticmethod
    def d_other(g: T, input: T, other: T | Number, rounding_mode: str | None) -> T:
        if rounding_mode is not None:
            return torch.zeros_like(g)
        slope = (input / other) / other  # first, as in PyTorch's C++ code
        return -g * slope


@inplace(T.reciprocal_, torch.reciprocal_)
@rule(torch.reciprocal, T.reciprocal)
class Reciprocal(Rule):
    """z = 1 / x:  dx = -g (z z)"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.reciprocal(input)

    @staticmethod
    def d_input(g: T, result: T) -> T:
        return -g * (result * result)


@composite(T.__rdiv__, T.__rtruediv__, directly=True)
def rdiv(input: T, other: T | Number) -> T:
    """other / x, which PyTorch computes as (1 / x) * other"""
    if not isinstance(other, T | numbers.Number) and not hasattr(other, "__torch_function__"):
        return record(Reciprocal, (input,))[0] * other  # as its class defines
    return record(Mul, (record(Reciprocal, (input,))[0], other))[0]


@inplace(T.neg_, T.negative_)
@rule(torch.neg, T.neg, T.__neg__, torch.negative, T.negative)
class Neg(Rule):
    """z = -x:  dx = -g"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.neg(input)

    @staticmethod
    def d_input(g: T) -> T:
        return -g


@composite(T.__pos__, torch.positive, T.positive)
def positive(input: T) -> T:
    return input


_pow: TorchFunction = torch.pow


@inplace(T.pow_, T.__ipow__)
@rule(torch.pow, T.pow, T.__pow__)
class Pow(Rule):
    """z = x ** p:  dx = g (p x^(p-1)), 0 where p = 0;  dp = g (z log x), 0 where x = 0 <= p"""

    @staticmethod
    def forward(input: T | Number, exponent: T | Number) -> T:
        return _pow(input, exponent)

    @classmethod
    def label_of(cls, input: T | Number, exponent: T | Number) -> str:
        if not isinstance(exponent, T):
            return "PowBackward0"
        return "PowBackward1" if isinstance(input, T) else "PowBackward2"

    @staticmethod
    def d_input(g: T, input: T, exponent: T | Number) -> T:
        x, p = input, exponent
        if isinstance(p, T):
            return torch.where(p == 0.0, zero(g), g * (p * x.pow(p - 1)))
        if p == 0:
            return torch.zeros_like(x)
        if p == 2 and not is_torch_function_enabled():  # recorded, it has a gradient of zeros
            return g * (p * x)
        return g * (p * x.pow(p - 1))

    @staticmethod
    def d_exponent(g: T, input: T | Number, exponent: T, result: T) -> T:
        x, p, z = input, exponent, result
        if isinstance(x, T):
            still = torch.logical_and(x == 0, p >= 0)
            x = x if x.dtype is z.dtype else to(x, z.dtype)
            return g * torch.where(still, zero(g), z * x.log())
        slope = z * torch.log(torch.tensor(x, dtype=torch.float64, device="cpu")).item()
        return g * (torch.where(p >= 0, zero(slope), slope) if x == 0 else slope)


@composite(T.__rpow__)
def rpow(input: T, other: T | Number) -> T:
    return record(Pow, (other, input))[0]


def _in_double(x: T | Number | complex) -> T | Number | complex:
    """A tensor or a number in double precision."""
    if isinstance(x, T):
        return to(x, torch.complex128 if x.is_complex() else torch.float64)
    return complex(x) if isinstance(x, complex) else float(x)


@answered(torch.float_power, T.float_power)
def float_power(input: T | Number, exponent: T | Number) -> T:
    """x ** p in double precision; see `Pow`"""
    numbers = [x for x in (input, exponent) if not isinstance(x, T)]
    if not all(isinstance(x, bool | int | float | complex) for x in numbers):
        raise unplaced(torch.float_power, (input, exponent), {})
    power = _in_double(exponent)  # first, as in PyTorch's C++ code
    return record(Pow, (_in_double(input), power))[0]


@answered(T.float_power_)
def float_power_(input: T, exponent: T | Number) -> T:
    if input.dtype.itemsize < 8:
        raise unplaced(T.float_power_, (input, exponent), {})
    return T.pow_(input, _in_double(exponent))


@composite(torch.square, T.square, repeats=True)
def square(input: T) -> T:
    return record(Pow, (input, 2))[0]


@composite(T.square_, torch.square_)
def square_(input: T) -> T:
    return record(Pow, (input, 2), inplace=lambda: T.square_(input))[0]


class Clamp(Rule):
    """z = min(max(x, lo), hi), lo and hi numbers:  dx = g where lo <= x <= hi, else 0

    From PyTorch 2.14 on, dx is 0 where x is at a bound.
    """

    public = staticmethod(torch.clamp)

    @classmethod
    def node_name(cls) -> str:
        return "ClampBackward1"

    @staticmethod
    def forward(input: T, min: Number | None, max: Number | None) -> T:
        return torch.clamp(input, min, max)

    @staticmethod
    def d_input(g: T, input: T, min: Number | None, max: Number | None) -> T:
        if SINCE_2_14:
            return torch.where(_within(input, min, max), g, zero(g))
        return torch.where(_inside(input, min, max), g, zero(g))


class ClampTensor(Rule):
    """The same with tensors as bounds:  dx = g where lo <= x <= hi, else 0

    dlo = g where x < lo < hi, dhi = g where x > hi or hi < lo. From PyTorch 2.14 on, x and the
    bound get half of g each where they are equal: `_shared_at_ties`.
    """

    public = staticmethod(torch.clamp)

    @classmethod
    def node_name(cls) -> str:
        return "ClampBackward0"

    @staticmethod
    def forward(input: T, min: T | None, max: T | None) -> T:
        return torch.clamp(input, min, max)

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, min: T | None, max: T | None) -> Gradients:
        if SINCE_2_14:
            return _shared_at_ties(needs, g, input, min, max)
        x, lo, hi = input, min, max
        dx = dlo = dhi = None
        if needs[0]:
            dx = torch.where(_inside(x, lo, hi), g, zero(g))
        if needs[1] and lo is not None:
            below = x < lo
            dlo = torch.where(below if hi is None else below.logical_and_(lo < hi), g, zero(g))
        if needs[2] and hi is not None:
            above = x > hi
            dhi = torch.where(above if lo is None else above.logical_or_(hi < lo), g, zero(g))
        return dx, dlo, dhi


@answered(torch.clamp, T.clamp, torch.clip, T.clip, repeats=True)
def clamp(input: T, min: T | Number | None = None, max: T | Number | None = None) -> T:
    """`Clamp`, or `ClampTensor` where a bound is a tensor"""
    function, bounds = _bounded(input, min, max)
    return record(function, (input, *bounds))[0]


_clamp_: TorchFunction = T.clamp_


@answered(T.clamp_, T.clip_)
def clamp_(input: T, min: T | Number | None = None, max: T | Number | None = None) -> T:
    function, bounds = _bounded(input, min, max)
    return record(function, (input, *bounds), lambda: _clamp_(input, min, max))[0]


def _bounded(
    input: T, min: T | Number | None, max: T | Number | None
) -> tuple[type[Rule], tuple[T | Number | None, T | Number | None]]:
    if dispatch_kind(type(min)) is OTHER and dispatch_kind(type(max)) is OTHER:
        return Clamp, (min, max)
    if isinstance(min, T | None) and isinstance(max, T | None):
        return ClampTensor, (min, max)
    # A tensor next to a number is converted to its number.
    if has_gradient(min) or has_gradient(max):
        raise unplaced(torch.clamp, (input, min, max), {})
    with DisableTorchFunctionSubclass(), torch.no_grad():
        torch.clamp(*plain_values((input, min, max)))  # PyTorch's errors
        return Clamp, (_number(min), _number(max))


def _number(bound: T | Number | None) -> Number | None:
    return bound.item() if isinstance(bound, T) else bound


@inplace(T.clamp_min_)
@rule(torch.clamp_min, T.clamp_min)
class ClampMin(Rule):
    """z = max(x, lo):  dx = g where x >= lo, else 0;  dlo = g where x < lo, else 0

    Where both are equal, from PyTorch 2.14 on, as `Clamp` and `ClampTensor`.
    """

    @staticmethod
    def forward(input: T, min: T | Number) -> T:
        return torch.clamp_min(input, min)

    @classmethod
    def label_of(cls, input: T, min: T | Number) -> str:
        return "ClampMinBackward1" if isinstance(min, T) else ""

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, min: T | Number) -> Gradients:
        x, bound = input, min
        if SINCE_2_14 and isinstance(bound, T):
            return shared(needs, g, x == bound, x < bound, x > bound)
        return (
            torch.where(x > bound if SINCE_2_14 else x >= bound, g, zero(g)) if needs[0] else None,
            torch.where(x < bound, g, zero(g)) if needs[1] else None,
        )


@inplace(T.clamp_max_)
@rule(torch.clamp_max, T.clamp_max)
class ClampMax(Rule):
    """z = min(x, hi):  dx = g where x <= hi, else 0;  dhi = g where x > hi, else 0

    Where both are equal, from PyTorch 2.14 on, as `Clamp` and `ClampTensor`.
    """

    @staticmethod
    def forward(input: T, max: T | Number) -> T:
        return torch.clamp_max(input, max)

    @classmethod
    def label_of(cls, input: T, max: T | Number) -> str:
        return "ClampMaxBackward1" if isinstance(max, T) else ""

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, max: T | Number) -> Gradients:
        x, bound = input, max
        if SINCE_2_14 and isinstance(bound, T):
            return shared(needs, g, x == bound, x > bound, x < bound)
        return (
            torch.where(x < bound if SINCE_2_14 else x <= bound, g, zero(g)) if needs[0] else None,
            torch.where(x > bound, g, zero(g)) if needs[1] else None,
        )


def _inside(x: T, lo: T | Number | None, hi: T | Number | None) -> T:
    """Where x is between the bounds, or at one."""
    if lo is None:
        assert hi is not None
        return x <= hi
    if hi is None:
        return x >= lo
    if not (isinstance(lo, T) or isinstance(hi, T)) and lo <= hi:
        return torch.eq(torch.clamp(x, lo, hi), x)
    return (x >= lo).logical_and_(x <= hi)


def _within(x: T, lo: T | Number | None, hi: T | Number | None) -> T:
    """Where x is between the bounds, and at neither."""
    if lo is None:
        assert hi is not None
        return x < hi
    return x > lo if hi is None else (x > lo).logical_and_(x < hi)


def _shared_at_ties(needs: Needs, g: T, x: T, lo: T | None, hi: T | None) -> Gradients:
    """dx, dlo and dhi of a clamp between tensors, half each where x is at a bound."""
    if hi is None:
        assert lo is not None
        return shared(needs, g, x == lo, x < lo, x > lo)
    if lo is None:
        dx, dhi = shared(needs[::2], g, x == hi, x > hi, x < hi)
        return dx, None, dhi
    half = g / 2
    apart, at_lo, at_hi = lo < hi, x == lo, x == hi
    below, above, ordered = x < lo, x > hi, lo <= hi
    over = (hi < lo) | (above & ordered)
    dx = torch.where((at_lo | at_hi) & apart, half, g).masked_fill(below | above, 0)
    dlo = torch.where(below & ordered, g, torch.where(at_lo & apart, half, zero(g)))
    dhi = torch.where(over, g, torch.where(at_hi & apart, half, zero(g)))
    return tuple([d if need else None for d, need in zip((dx, dlo, dhi), needs, strict=True)])
