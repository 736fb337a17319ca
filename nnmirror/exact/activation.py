"""The activations as PyTorch's kernels round them.

float16 and bfloat16 are computed in float32. Where a kernel treats numbers that fill whole vector
registers differently from the remaining ones, there is a formula for each (see
`nnmirror/rules/kernel.py`).
"""

import math
from collections.abc import Callable

import torch

from .._torch import is_torch_function_enabled
from ..rules import activation as rules
from ..rules.gradient import gradient
from ..rules.kernel import (
    alone,
    by_path,
    by_sign,
    laid_out_as,
    scalar_exp,
    scalar_path,
    vector_exp,
    vectorized_path,
    widened,
)
from ..rules.pointwise import number
from ..rules.prelu import PreluKernel as Prelu
from ..rules.registry import Gradients, Needs, unplaced
from .attach import exact_of

T = torch.Tensor


@exact_of(rules.Elu, "ELU", units=2)
class Elu(rules.Elu):
    """The kernel's own exp."""

    @staticmethod
    def d_input(g: T, input: T, alpha: float, scale: float, input_scale: float) -> T:
        return _elu_grad(g, input, alpha, scale, input_scale)


def _elu_second(h: T, g: T, x: T, *how: float) -> T:
    return rules.elu_second(_elu_grad, h, g, x, *how)


@gradient("EluBackward", second=_elu_second)
def _elu_grad(g: T, input: T, alpha: float, scale: float, input_scale: float) -> T:
    dtype, shape = g.dtype, g.shape
    wide = widened(g, input)
    below, s = _below((alpha, scale, input_scale), wide[1])

    def vectorized(g: T, x: T) -> T:
        z = x if input_scale == 1 else x * number(input_scale, x)
        # No tensor operation computes the kernel's exp of numbers above 0, which occur only
        # with a negative input_scale.
        e = vector_exp(z) if input_scale > 0 else torch.where(z > 0, torch.exp(z), vector_exp(z))
        return by_sign(x, s(g), below(g) * e)  # below for a NaN too

    def scalar(g: T, x: T) -> T:
        z = (x * number(input_scale, x)).masked_fill(x > 0, 0)
        return torch.where(x <= 0, below(g) * scalar_exp(z), s(g))

    dx = by_path(vectorized, scalar, wide, (g, input))
    return laid_out_as(dx.to(dtype).view(shape), g)


def _below(how: tuple[float, float, float], like: T) -> tuple[Callable[[T], T], Callable[[T], T]]:
    """The factors of g below 0 and above: (g i (a s)) and (g s).

    None where that is 1, as it nearly always is.
    """
    a, s, i = how
    plain = a == s == i == 1
    of, by, into = number(a, like), number(s, like), number(i, like)

    def below(g: T) -> T:
        return g if plain else g * into * (of * by)

    def above(g: T) -> T:
        return g if s == 1 else g * by

    return below, above


@exact_of(rules.Selu, "SELU", units=2)
class Selu(rules.Selu):
    """`Elu`"""

    is_recordable = True
    d_input = staticmethod(Elu.d_input)


@exact_of(rules.Celu, "CELU", units=2)
class Celu(rules.Celu):
    """`Elu`"""

    @staticmethod
    def d_input(g: T, input: T, alpha: float) -> T:
        return Elu.d_input(g, input, *rules.celu_as_elu(alpha))


@exact_of(rules.EluInplace, "ELU", "SELU", units=2)
class EluInplace(rules.EluInplace):
    """The order of the products."""

    @staticmethod
    def d_input(g: T, result: T, alpha: float, scale: float, input_scale: float) -> T:  # type: ignore[override]
        rules.refuse_negative_slope(alpha)
        return _elu_grad_of_result(g, result, alpha, scale, input_scale)


@gradient("EluBackward", second=rules.elu_second_of_result)
def _elu_grad_of_result(g: T, result: T, alpha: float, scale: float, input_scale: float) -> T:
    dtype, shape = g.dtype, g.shape
    wide = widened(g, result)
    a, s, i = (number(v, wide[1]) for v in (alpha, scale, input_scale))

    def vectorized(g: T, y: T) -> T:
        return torch.where(y > 0, g * s, g * i * (y + a * s))

    def scalar(g: T, y: T) -> T:
        return torch.where(y <= 0, g * i * (y + a * s), g * s)

    dx = by_path(vectorized, scalar, wide, (g, result))
    return laid_out_as(dx.to(dtype).view(shape), g)


@exact_of(rules.CeluInplace, "CELU", units=2)
class CeluInplace(rules.CeluInplace):
    """`EluInplace`"""

    @staticmethod
    def d_input(g: T, result: T, alpha: float) -> T:  # type: ignore[override]
        return EluInplace.d_input(g, result, *rules.celu_as_elu(alpha))


@exact_of(rules.Silu, "SiLU", units=2)
class Silu(rules.Silu):
    """g z (1 + x (1 - z)), the last sum and product in one rounding."""

    @staticmethod
    def d_input(g: T, input: T) -> T:
        if is_torch_function_enabled():
            return rules.Silu.d_input(g, input)
        dtype, shape = g.dtype, g.shape
        operands = g, input
        g, x = widened(g, input)
        z = by_path(
            lambda x: vectorized_path(torch.sigmoid, x),
            lambda x: scalar_path(torch.sigmoid, x),
            (x,),
            operands,
        )
        return (g * z * torch.addcmul(number(1, x), x, 1 - z)).to(dtype).view(shape)


@exact_of(rules.Gelu, "GELU", units=24)
class Gelu(rules.Gelu):
    """Not always the same bits: PyTorch's kernels have an erf and a tanh of their own, which no
    tensor operation computes. The gradient can be off by a few units in the last place."""

    @staticmethod
    def d_input(g: T, input: T, approximate: str) -> T:
        return _gelu_grad(g, input, approximate)


@gradient("GeluBackward", second=rules.gelu_second)
def _gelu_grad(g: T, input: T, approximate: str) -> T:
    dtype, shape = g.dtype, g.shape
    g, x = widened(g, input)
    slope = (_gelu_slope_tanh if approximate == "tanh" else _gelu_slope)(x)
    return (g * slope).to(dtype).view(shape)


def _gelu_slope(x: T) -> T:
    below = 0.5 * (1 + torch.erf(x * number(math.sqrt(0.5), x)))
    density = vector_exp(x * x * 0.5) * number(1 / math.sqrt(2 * math.pi), x)
    return torch.addcmul(below, x, density)


def _gelu_slope_tanh(x: T) -> T:
    one, b, c = (
        number(1, x),
        number(math.sqrt(2) * (2 / math.sqrt(math.pi)) / 2, x),
        number(0.044715, x),
    )
    square = x * x
    t = alone(torch.tanh, b * torch.addcmul(x, c, square * x))
    inner = b * torch.addcmul(one, 3 * c, square)
    return torch.addcmul(0.5 * (1 + t), 0.5 * x * torch.addcmul(one, t, t, value=-1), inner)


@exact_of(rules.Hardtanh, "Hardtanh", "ReLU6", units=0)
class Hardtanh(rules.Hardtanh):
    """A NaN is on neither side: g is 0 there on the vectorized path, and g on the scalar path."""

    @staticmethod
    def d_input(g: T, input: T, min_val: float, max_val: float) -> T:
        return _hardtanh_grad(g, input, min_val, max_val)


@gradient("HardtanhBackward")
def _hardtanh_grad(g: T, input: T, min_val: float, max_val: float) -> T:
    (x,) = widened(input)
    low, high = number(min_val, x), number(max_val, x)
    lost = by_path(
        lambda x: ~((x > low) & (x < high)),
        lambda x: (x <= low) | (x >= high),
        (x,),
        (g, input),
        short=True,
    )
    return laid_out_as(g.masked_fill(lost.view(g.shape), 0), g)


@exact_of(rules.LogSigmoid, "LogSigmoid", "MultiLabelSoftMarginLoss", units=2)
class LogSigmoid(rules.LogSigmoid):
    """y = -log(1 + exp(-x)):  dx = g (1 - z) where x < 0, else g z,  z = e / (1 + e), e = exp(-|x|)

    Saved: x and e.
    """

    is_recordable = True
    keeps = derived = ("e",)

    @staticmethod
    def forward(input: T) -> tuple[T, T]:  # type: ignore[override]
        if not isinstance(input, T):
            raise unplaced(torch._C._nn.log_sigmoid, (input,), {})
        return torch.ops.aten.log_sigmoid_forward(input)  # type: ignore[no-any-return]

    @staticmethod
    def e_again(input: T) -> T:
        """As it was: PyTorch sends no gradient through it."""
        return torch.ops.aten.log_sigmoid_forward(input.detach())[1]  # type: ignore[no-any-return]

    @staticmethod
    def d_input(g: T, input: T, e: T) -> T:  # type: ignore[override]
        return _log_sigmoid_grad(g, input, e)


@gradient("LogSigmoidBackward", second=rules.log_sigmoid_second)
def _log_sigmoid_grad(g: T, input: T, e: T) -> T:
    dtype, shape = g.dtype, g.shape
    wide, x, e = widened(g, input, e)
    if not x.is_cpu:
        e = torch.exp(-x.abs())  # only the CPU's kernel keeps it
    share = e / (1 + e)
    dx = torch.where(x < 0, 1 - share, share) * wide
    return laid_out_as(dx.to(dtype).view(shape), g)


@exact_of(rules.Hardswish, "Hardswish", units=1)
class Hardswish(rules.Hardswish):
    """g (x / 3 + 1/2) in this order. On the scalar path a NaN counts as above 3."""

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return _hardswish_grad(g, input)


@gradient("HardswishBackward", second=rules.hardswish_second)
def _hardswish_grad(g: T, input: T) -> T:
    wide, x = widened(g, input)
    middle = wide * (x / 3 + 0.5)
    dx = torch.where(x >= 3, wide, middle).masked_fill(x <= -3, 0).to(g.dtype).view(g.shape)
    dx = by_path(
        lambda dx, g, x: dx,
        lambda dx, g, x: torch.where(x.isnan(), g, dx),
        (dx, g, input),
        (g, input),
    )
    return laid_out_as(dx, g)


@exact_of(rules.Mish, "Mish", units=20)
class Mish(rules.Mish):
    """Not always the same bits: PyTorch's kernel has an exp of positive numbers, a log1p and a tanh
    of its own, which no tensor operation computes. The gradient can be off by a few units in the
    last place."""

    @staticmethod
    def d_input(g: T, input: T) -> T:
        if is_torch_function_enabled():
            return rules.Mish.d_input(g, input)
        wide, x = widened(g, input)
        s = vectorized_path(torch.sigmoid, x)
        e = torch.where(x <= 0, vector_exp(x), alone(torch.exp, x))
        t = alone(torch.tanh, alone(torch.log1p, e))
        dx = wide * torch.addcmul(t, x * s, torch.addcmul(number(1, x), t, t, value=-1))
        return laid_out_as(dx.to(g.dtype).view(g.shape), g)


@exact_of(rules.Softplus, "Softplus", units=4)
class Softplus(rules.Softplus):
    """g e / (e + 1). Not always the same bits: where b x > 0 the kernel rounds exp differently from
    any tensor operation, and about one gradient in thirty differs in its last place."""

    @staticmethod
    def d_input(g: T, input: T, beta: float, threshold: float) -> T:
        return _softplus_grad(g, input, beta, threshold)


@gradient("SoftplusBackward", second=rules.softplus_second)
def _softplus_grad(g: T, input: T, beta: float, threshold: float) -> T:
    wide, x = widened(g, input)
    x = x * beta
    e = torch.where(x < 0, vector_exp(x), alone(torch.exp, x))
    dx = torch.where(x > threshold, wide, wide * e / (e + 1.0))
    return laid_out_as(dx.to(g.dtype).reshape(g.shape), g)


@exact_of(rules.Hardshrink, "Hardshrink", units=0)
class Hardshrink(rules.Hardshrink):
    """A NaN is on neither side: g is 0 there on the vectorized path, and g on the scalar path."""

    @staticmethod
    def d_input(g: T, input: T, lambd: float) -> T:
        return _hardshrink_grad(g, input, lambd)


def _shrink_grad(g: T, input: T, lambd: float) -> T:
    bound = number(lambd, input)
    lost = by_path(
        lambda x: ~((x < -bound) | (x > bound)),
        lambda x: (x >= -bound) & (x <= bound),
        (input,),
        (g, input),
        short=True,
    )
    return laid_out_as(g.masked_fill(lost, 0), g)


_hardshrink_grad = gradient("HardshrinkBackward")(_shrink_grad)
_softshrink_grad = gradient("SoftshrinkBackward")(_shrink_grad)


@exact_of(rules.Softshrink, "Softshrink", units=0)
class Softshrink(rules.Softshrink):
    """`Hardshrink`"""

    @staticmethod
    def d_input(g: T, input: T, lambd: float) -> T:
        return _softshrink_grad(g, input, lambd)


@exact_of(Prelu, "PReLU", units=2)
class PreluKernel(Prelu):
    """dw is 0 where x > 0, even if g is negative or infinite."""

    is_recordable = False

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, weight: T) -> Gradients:
        dx, _ = Prelu.gradients((needs[0], False), g, input, weight)
        return dx, (input * g).masked_fill_(input > 0, 0) if needs[1] else None


# Into the memory of the input: the same from a copy of it.


@exact_of(rules.SiluInplace, "SiLU", units=2)
class SiluInplace(rules.SiluInplace):  # type: ignore[misc, valid-type]
    is_recordable = True
    d_input = staticmethod(Silu.d_input)


@exact_of(rules.HardtanhInplace, "Hardtanh", "ReLU6", units=0)
class HardtanhInplace(rules.HardtanhInplace):  # type: ignore[misc, valid-type]
    is_recordable = True
    d_input = staticmethod(Hardtanh.d_input)


@exact_of(rules.HardswishInplace, "Hardswish", units=1)
class HardswishInplace(rules.HardswishInplace):  # type: ignore[misc, valid-type]
    is_recordable = True
    d_input = staticmethod(Hardswish.d_input)


@exact_of(rules.MishInplace, "Mish", units=20)
class MishInplace(rules.MishInplace):  # type: ignore[misc, valid-type]
    is_recordable = True
    d_input = staticmethod(Mish.d_input)
