"""Functions of one number, and choices between two tensors.

`g` is the gradient of the result; a broadcast operand's is summed by the walk.
"""

from typing import Any

import torch

from ..tape import record
from .registry import Rule, composite, inplace, rule

T = torch.Tensor


@inplace(T.exp_, torch.exp_)
@rule(torch.exp, T.exp)
class Exp(Rule):
    """z = exp(x):  dx = g z"""

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        z = torch.exp(input)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return g * ctx.saved(0)


@inplace(T.log_, torch.log_)
@rule(torch.log, T.log)
class Log(Rule):
    """z = log(x):  dx = g / x"""

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        ctx.save_for_backward(input)
        return torch.log(input)

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return g / ctx.saved(0)


@inplace(T.log1p_, torch.log1p_)
@rule(torch.log1p, T.log1p)
class Log1P(Rule):
    """z = log(1 + x):  dx = g / (x + 1)"""

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        ctx.save_for_backward(input)
        return torch.log1p(input)

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return g / (ctx.saved(0) + 1)


@inplace(T.sqrt_, torch.sqrt_)
@rule(torch.sqrt, T.sqrt)
class Sqrt(Rule):
    """z = sqrt(x):  dx = g / (2 z)"""

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        z = torch.sqrt(input)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return g / (2 * ctx.saved(0))


@inplace(T.rsqrt_, torch.rsqrt_)
@rule(torch.rsqrt, T.rsqrt)
class Rsqrt(Rule):
    """z = 1 / sqrt(x):  dx = -g z^3 / 2"""

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        z = torch.rsqrt(input)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return -0.5 * g * ctx.saved(0).pow(3)


@inplace(T.abs_, T.absolute_, torch.abs_)
@rule(torch.abs, T.abs, T.__abs__, torch.absolute, T.absolute)
class Abs(Rule):
    """z = |x|:  dx = g sign(x) (0 at 0)"""

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        ctx.save_for_backward(input)
        return torch.abs(input)

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return g * ctx.saved(0).sgn()


@inplace(T.sin_, torch.sin_)
@rule(torch.sin, T.sin)
class Sin(Rule):
    """z = sin(x):  dx = g cos(x)"""

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        ctx.save_for_backward(input)
        return torch.sin(input)

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return g * ctx.saved(0).cos()


@inplace(T.cos_, torch.cos_)
@rule(torch.cos, T.cos)
class Cos(Rule):
    """z = cos(x):  dx = g (-sin(x))"""

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        ctx.save_for_backward(input)
        return torch.cos(input)

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return g * -ctx.saved(0).sin()


class _Flat(Rule):
    """A function that is constant between its steps:  dx = 0"""

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        return torch.zeros_like(g)


def _flat(name: str) -> None:
    function = getattr(torch, name)

    def forward(ctx: Any, input: T) -> T:
        return function(input)

    made = type(
        name.capitalize(),
        (_Flat,),
        {"__doc__": f"z = {name}(x):  dx = 0", "forward": staticmethod(forward)},
    )
    rule(function, getattr(T, name))(made)
    inplace(getattr(T, name + "_"))(made)


for _name in ("sign", "floor", "ceil", "trunc"):
    _flat(_name)


@inplace(T.sigmoid_, torch.sigmoid_)
@rule(torch.sigmoid, T.sigmoid)
class Sigmoid(Rule):
    """z = 1 / (1 + exp(-x)):  dx = g (1 - z) z"""

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        z = torch.sigmoid(input)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        z = ctx.saved(0)
        if z.dtype is torch.bfloat16:
            wide = z.float()  # the kernel computes this one in float32 and rounds once
            return (g.float() * (1 - wide) * wide).to(z.dtype)
        return g * (1 - z) * z


@rule(torch.maximum, T.maximum)
class Maximum(Rule):
    """z = max(x, y):  each gets g where it is the larger, half where both are equal"""

    @staticmethod
    def forward(ctx: Any, input: T, other: T) -> T:
        ctx.save_for_backward(input, other)
        return torch.maximum(input, other)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[T | None, T | None]:
        x, y = ctx.saved_tensors
        return _shared(ctx, g, x, y, x < y, x > y)


@rule(torch.minimum, T.minimum)
class Minimum(Rule):
    """z = min(x, y):  each gets g where it is the smaller, half where both are equal"""

    @staticmethod
    def forward(ctx: Any, input: T, other: T) -> T:
        ctx.save_for_backward(input, other)
        return torch.minimum(input, other)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[T | None, T | None]:
        x, y = ctx.saved_tensors
        return _shared(ctx, g, x, y, x > y, x < y)


def _shared(ctx: Any, g: T, x: T, y: T, x_loses: T, y_loses: T) -> tuple[T | None, T | None]:
    halved = torch.where(x == y, g / 2, g)
    return (
        halved.masked_fill(x_loses, 0) if ctx.needs_input_grad[0] else None,
        halved.masked_fill(y_loses, 0) if ctx.needs_input_grad[1] else None,
    )


@rule(torch.where)
class Where(Rule):
    """z = x where the condition holds, else y:  each gets g where it was chosen, else 0"""

    @staticmethod
    def forward(ctx: Any, condition: T, input: Any, other: Any) -> T:
        ctx.save_for_backward(condition)
        return torch.where(condition, input, other)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[None, T | None, T | None]:
        condition = ctx.saved(0)
        zero = torch.zeros((), dtype=g.dtype, device=g.device)
        return (
            None,
            torch.where(condition, g, zero) if ctx.needs_input_grad[1] else None,
            torch.where(condition, zero, g) if ctx.needs_input_grad[2] else None,
        )


@composite(T.where)
def where(input: T, condition: T, other: Any) -> T:
    """x.where(condition, y), which PyTorch also computes as torch.where(condition, x, y)"""
    return record(Where, (condition, input, other))[0]
