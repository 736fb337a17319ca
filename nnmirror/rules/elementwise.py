"""Functions of one number, and choices between two tensors.

`g` is the gradient of the result; a broadcast operand's is summed by the walk.
"""

import functools
import math

import torch

from .. import _torch
from .._torch import is_torch_function_enabled
from .._types import Number, TorchFunction
from .._versions import SINCE_2_14
from ..constants import constant
from ..tape import record
from .arithmetic import shared, zero
from .gradient import gradient
from .kernel import laid_out_as, on_scalar_path
from .registry import Gradients, Needs, Rule, composite, inplace, rule

T = torch.Tensor


@inplace(T.exp_, torch.exp_)
@rule(torch.exp, T.exp)
class Exp(Rule):
    """z = exp(x):  dx = g z"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.exp(input)

    @staticmethod
    def d_input(g: T, result: T) -> T:
        return g * result


@inplace(T.log_, torch.log_)
@rule(torch.log, T.log)
class Log(Rule):
    """z = log(x):  dx = g / x"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.log(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return g / input


@inplace(T.log1p_, torch.log1p_)
@rule(torch.log1p, T.log1p, torch.special.log1p)
class Log1P(Rule):
    """z = log(1 + x):  dx = g / (x + 1)"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.log1p(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return g / (input + 1)


@inplace(T.sqrt_, torch.sqrt_)
@rule(torch.sqrt, T.sqrt)
class Sqrt(Rule):
    """z = sqrt(x):  dx = g / (2 z)"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.sqrt(input)

    @staticmethod
    def d_input(g: T, result: T) -> T:
        return g / (2 * result)


@inplace(T.rsqrt_, torch.rsqrt_)
@rule(torch.rsqrt, T.rsqrt)
class Rsqrt(Rule):
    """z = 1 / sqrt(x):  dx = -g z^3 / 2"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.rsqrt(input)

    @staticmethod
    def d_input(g: T, result: T) -> T:
        return -0.5 * g * result.pow(3)


@inplace(T.abs_, T.absolute_, torch.abs_)
@rule(torch.abs, T.abs, T.__abs__, torch.absolute, T.absolute)
class Abs(Rule):
    """z = |x|:  dx = g sign(x) (0 at 0)"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.abs(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return g * input.sgn()


@inplace(T.sin_, torch.sin_)
@rule(torch.sin, T.sin)
class Sin(Rule):
    """z = sin(x):  dx = g cos(x)"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.sin(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return g * input.cos()


@inplace(T.cos_, torch.cos_)
@rule(torch.cos, T.cos)
class Cos(Rule):
    """z = cos(x):  dx = g (-sin(x))"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.cos(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return g * -input.sin()


@inplace(T.frac_, torch.frac_)
@rule(torch.frac, T.frac)
class Frac(Rule):
    """z = x - trunc(x):  dx = g"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.frac(input)

    @staticmethod
    def d_input(g: T) -> T:
        return g


def _flat(name: str) -> None:
    """Make the Rule of a function that is constant between its steps."""
    function = getattr(torch, name)

    def forward(input: T) -> T:
        return function(input)  # type: ignore[no-any-return]

    def d_input(g: T) -> T:
        return torch.zeros_like(g)

    made = type(
        name.capitalize(),
        (Rule,),
        {
            "__doc__": f"z = {name}(x):  dx = 0",
            "forward": staticmethod(forward),
            "d_input": staticmethod(d_input),
        },
    )
    rule(function, getattr(T, name))(made)
    inplace(getattr(T, name + "_"))(made)


for _name in ("sign", "sgn", "floor", "ceil", "trunc", "round"):
    _flat(_name)


@gradient("SigmoidBackward", second=lambda h, g, z: h * g * (-2 * z + 1))
def sigmoid_grad(g: T, z: T) -> T:
    """g (1 - z) z"""
    if z.dtype is torch.bfloat16:
        wide = z.float()  # the kernel computes this one in float32 and rounds once
        return laid_out_as((g.float() * (1 - wide) * wide).to(z.dtype), g)
    return laid_out_as(g * (1 - z) * z, g)


@inplace(T.sigmoid_, torch.sigmoid_)
@rule(torch.sigmoid, T.sigmoid, torch.special.expit)
class Sigmoid(Rule):
    """z = 1 / (1 + exp(-x)):  dx = g (1 - z) z"""

    infer = staticmethod(torch.sigmoid)

    @staticmethod
    def forward(input: T) -> T:
        return torch.sigmoid(input)

    @staticmethod
    def d_input(g: T, result: T) -> T:
        return sigmoid_grad(g, result)


@rule(torch.maximum, T.maximum)
class Maximum(Rule):
    """z = max(x, y):  each gets g where it is the larger, half where both are equal"""

    @staticmethod
    def forward(input: T, other: T) -> T:
        return torch.maximum(input, other)

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, other: T) -> Gradients:
        return shared(needs, g, input == other, input < other, input > other)


@rule(torch.minimum, T.minimum)
class Minimum(Rule):
    """z = min(x, y):  each gets g where it is the smaller, half where both are equal"""

    @staticmethod
    def forward(input: T, other: T) -> T:
        return torch.minimum(input, other)

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, other: T) -> Gradients:
        return shared(needs, g, input == other, input > other, input < other)


@rule(torch.where)
class Where(Rule):
    """z = x where the condition holds, else y:  each gets g where it was chosen, else 0"""

    counted = (1, 2)

    @staticmethod
    def forward(condition: T, input: T | Number, other: T | Number) -> T:
        return torch.where(condition, input, other)

    @staticmethod
    def d_input(g: T, condition: T) -> T:
        return torch.where(condition, g, zero(g))

    @staticmethod
    def d_other(g: T, condition: T) -> T:
        return torch.where(condition, zero(g), g)


class WhereEqual(Where):
    """`Where`, with the condition that the target is equal to a number."""

    keeps = ("condition",)
    counted = (2, 3)

    @staticmethod
    def forward(target: T, number: float, input: T | float, other: T | float) -> tuple[T, T]:  # type: ignore[override]
        condition = target == number
        return torch.where(condition, input, other), condition

    @classmethod
    def node_name(cls) -> str:
        return "WhereBackward0"


def _pointwise(
    name: str, slope: TorchFunction, doc: str, of_result: bool = False, also: tuple[str, ...] = ()
) -> None:
    """Make the Rule of a function of one number from its slope: `slope(g, x or z)` is dx.

    `also` are its other names, in torch.special ("special.gammaln") or in torch.
    """
    function = getattr(torch, name)

    def forward(input: T) -> T:
        return function(input)  # type: ignore[no-any-return]

    def of_input_slope(g: T, input: T) -> T:
        return slope(g, input)  # type: ignore[no-any-return]

    def of_result_slope(g: T, result: T) -> T:
        return slope(g, result)  # type: ignore[no-any-return]

    made = type(
        name.title(),  # Deg2Rad
        (Rule,),
        {
            "__doc__": doc,
            "forward": staticmethod(forward),
            "d_input": staticmethod(of_result_slope if of_result else of_input_slope),
        },
    )
    rule(function, getattr(T, name))(made)
    if name not in _NOT_IN_PLACE:
        inplace(getattr(T, name + "_"))(made)
    for other in also:
        place, _, plain = other.rpartition(".")
        rule(getattr(getattr(torch, place) if place else torch, plain))(made)
        if not place:
            rule(getattr(T, plain))(made)


_NOT_IN_PLACE = ("asinh", "acosh", "atanh")  # in PyTorch neither


_pointwise(
    "exp2", lambda g, z: g * z * math.log(2), "z = 2^x:  dx = g z log 2", True, ("special.exp2",)
)
_pointwise(
    "expm1", lambda g, z: g * (z + 1), "z = exp(x) - 1:  dx = g (z + 1)", True, ("special.expm1",)
)
_pointwise("log2", lambda g, x: g / (x * math.log(2)), "z = log x / log 2:  dx = g / (x log 2)")
# The logarithm of 10 as in PyTorch before 2.14, with another last digit.
_LOG_10 = math.log(10) if SINCE_2_14 else 2.3025850929940456
_pointwise("log10", lambda g, x: g / (x * _LOG_10), "z = log x / log 10:  dx = g / (x log 10)")
_pointwise("tan", lambda g, z: g * (1 + z.pow(2)), "z = tan(x):  dx = g (1 + z^2)", True)
_pointwise("sinh", lambda g, x: g * x.cosh(), "z = sinh(x):  dx = g cosh(x)")
_pointwise("cosh", lambda g, x: g * x.sinh(), "z = cosh(x):  dx = g sinh(x)")
_pointwise("asin", lambda g, x: g * (-x * x + 1).rsqrt(), "z = asin(x):  dx = g / sqrt(1 - x^2)")
_pointwise("acos", lambda g, x: g * -(-x * x + 1).rsqrt(), "z = acos(x):  dx = -g / sqrt(1 - x^2)")
_pointwise("atan", lambda g, x: g / (x * x + 1), "z = atan(x):  dx = g / (1 + x^2)")
_pointwise(
    "erf",
    lambda g, x: 2.0 / math.sqrt(math.pi) * torch.exp(-(x.pow(2))) * g,
    "z = erf(x):  dx = g 2 / sqrt(pi) exp(-x^2)",
    also=("special.erf",),
)
_pointwise(
    "erfc",
    lambda g, x: -2.0 / math.sqrt(math.pi) * torch.exp(-(x.pow(2))) * g,
    "z = 1 - erf(x):  dx = -g 2 / sqrt(pi) exp(-x^2)",
    also=("special.erfc",),
)
_pointwise(
    "erfinv",
    lambda g, x: 0.5 * math.sqrt(math.pi) * torch.exp(x.erfinv().pow(2)) * g,
    "z with erf(z) = x:  dx = g sqrt(pi) / 2 exp(z^2)",
    also=("special.erfinv",),
)
_pointwise(
    "asinh",
    lambda g, x: g * (x.pow(2) + 1).rsqrt(),
    "z = asinh(x):  dx = g / sqrt(x^2 + 1)",
    also=("arcsinh",),
)
_pointwise(
    "acosh",
    lambda g, x: g * (x * x - 1).rsqrt(),
    "z = acosh(x):  dx = g / sqrt(x^2 - 1)",
    also=("arccosh",),
)
_pointwise(
    "atanh",
    lambda g, x: g * 1 / (1 - x.pow(2)),
    "z = atanh(x):  dx = g / (1 - x^2)",
    also=("arctanh",),
)
_pointwise(
    "lgamma",
    lambda g, x: g * torch.digamma(x),
    "z = log |gamma(x)|:  dx = g digamma(x)",
    also=("special.gammaln",),
)
_pointwise(
    "digamma",
    lambda g, x: g * torch.polygamma(1, x),
    "z = the slope of log gamma at x:  dx = g polygamma(1, x)",
    also=("special.digamma", "special.psi"),
)
_pointwise("deg2rad", lambda g, x: g * (math.pi / 180), "z = x pi / 180:  dx = g pi / 180")
_pointwise("rad2deg", lambda g, x: g * (180 / math.pi), "z = x 180 / pi:  dx = g 180 / pi")


def _sinc_slope(g: T, x: T) -> T:
    turned, squared = x * math.pi, x * x * math.pi
    sine, cosine = turned.sin(), turned.cos()  # in the order of PyTorch's C++ code
    slope = g * ((turned * cosine - sine) / squared)
    return torch.where(squared == 0.0, zero(g), slope)


_pointwise(
    "sinc",
    _sinc_slope,
    "z = sin(pi x) / (pi x), 1 at 0:  dx = g (pi x cos(pi x) - sin(pi x)) / (pi x^2), 0 at 0",
    also=("special.sinc",),
)


@inplace(T.polygamma_)
class Polygamma(Rule):
    """z = the n-th derivative of digamma at x:  dx = g polygamma(n + 1, x)"""

    @staticmethod
    def forward(input: T, n: int) -> T:
        return torch.polygamma(n, input)

    @staticmethod
    def d_input(g: T, input: T, n: int) -> T:
        return g * torch.polygamma(n + 1, input)


rule(T.polygamma)(Polygamma)


@composite(torch.polygamma, torch.special.polygamma)
def polygamma(n: int, input: T) -> T:
    return record(Polygamma, (input, n))[0]


@inplace(T.nan_to_num_, torch.nan_to_num_)
@rule(torch.nan_to_num, T.nan_to_num)
class NanToNum(Rule):
    """z = x, with numbers for NaN and infinity:  dx = g where x is finite, else g times 0"""

    @staticmethod
    def forward(
        input: T,
        nan: float | None = None,
        posinf: Number | None = None,
        neginf: Number | None = None,
    ) -> T:
        return torch.nan_to_num(input, nan, posinf, neginf)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return g * torch.isfinite(input)


@functools.lru_cache(maxsize=64)
def _clipped(eps: float, dtype: torch.dtype) -> tuple[float, float]:
    """eps and 1 - eps as the kernel has them."""
    rounded = torch.tensor(eps, dtype=dtype, device="cpu")
    return rounded.item(), (1 - rounded).item()


@inplace(T.logit_, torch.logit_)
@rule(torch.logit, T.logit, torch.special.logit)
class Logit(Rule):
    """z = log(x / (1 - x)), x clipped to [e, 1 - e]:  dx = g / (x (1 - x)), 0 where clipped

    With create_graph it is recorded as separate operations, as in PyTorch.
    """

    @staticmethod
    def forward(input: T, eps: float | None = None) -> T:
        return torch.logit(input, eps)

    @staticmethod
    def d_input(g: T, input: T, eps: float | None) -> T:
        x = input
        low, high, outside = 0.0, 1.0, math.nan
        if is_torch_function_enabled():
            if eps is not None:
                low, high, outside = eps, 1.0 - eps, 0.0
            dx = g / (x * (1 - x))
            return torch.where((x >= low) & (x <= high), dx, constant(outside, x.dtype, x.device))
        if eps is not None:
            (low, high), outside = _clipped(eps, x.dtype), 0.0
        # On the kernel's scalar path -0 counts as 0, and a NaN stays NaN.
        alone = on_scalar_path(g, x)
        dx = torch.where(alone & (x == 0), g * float("inf"), g / (x * (1 - x)))
        dx = dx.masked_fill((x < low) | (x > high), outside)
        return dx if eps is None else dx.masked_fill(x.isnan() & ~alone, 0)


@rule(torch.logaddexp, T.logaddexp)
class Logaddexp(Rule):
    """z = log(exp(x) + exp(y)):  dx = g / (1 + exp(y - x)),  dy = g / (1 + exp(x - y))"""

    @staticmethod
    def forward(input: T, other: T) -> T:
        return torch.logaddexp(input, other)

    @staticmethod
    def d_input(g: T, input: T, other: T) -> T:
        return g / (1 + torch.exp(other - input))

    @staticmethod
    def d_other(g: T, input: T, other: T) -> T:
        return g / (1 + torch.exp(input - other))


@rule(torch.logaddexp2, T.logaddexp2)
class Logaddexp2(Rule):
    """z = log2(2^x + 2^y):  dx = g / (1 + 2^(y - x)),  dy = g / (1 + 2^(x - y))"""

    @staticmethod
    def forward(input: T, other: T) -> T:
        return torch.logaddexp2(input, other)

    @staticmethod
    def d_input(g: T, input: T, other: T) -> T:
        return g / (1 + torch.pow(2, other - input))

    @staticmethod
    def d_other(g: T, input: T, other: T) -> T:
        return g / (1 + torch.pow(2, input - other))


@inplace(T.hypot_)
@rule(torch.hypot, T.hypot)
class Hypot(Rule):
    """z = sqrt(x^2 + y^2):  dx = g x / z,  dy = g y / z"""

    @staticmethod
    def forward(input: T, other: T) -> T:
        return torch.hypot(input, other)

    @staticmethod
    def d_input(g: T, input: T, result: T) -> T:
        return g * input / result

    @staticmethod
    def d_other(g: T, other: T, result: T) -> T:
        return g * other / result


@rule(torch.fmax, T.fmax)
class Fmax(Rule):
    """z = max(x, y), ignoring a NaN if the other is a number:  g goes to x where x is z, else to y

    From PyTorch 2.14 on, as for `Maximum`.
    """

    @staticmethod
    def forward(input: T, other: T) -> T:
        return torch.fmax(input, other)

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, other: T) -> Gradients:
        if SINCE_2_14:
            return shared(needs, g, input == other, input < other, input > other)
        return _to_chosen(needs, g, (input >= other).logical_or_(other.isnan()))


@rule(torch.fmin, T.fmin)
class Fmin(Rule):
    """z = min(x, y), ignoring a NaN if the other is a number:  g goes to x where x is z, else to y

    From PyTorch 2.14 on, as for `Minimum`.
    """

    @staticmethod
    def forward(input: T, other: T) -> T:
        return torch.fmin(input, other)

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, other: T) -> Gradients:
        if SINCE_2_14:
            return shared(needs, g, input == other, input > other, input < other)
        return _to_chosen(needs, g, (input <= other).logical_or_(other.isnan()))


def _to_chosen(needs: Needs, g: T, first: T) -> Gradients:
    return (
        g.masked_fill(~first, 0) if needs[0] else None,
        g.masked_fill(first, 0) if needs[1] else None,
    )


class StandardGamma(Rule):
    """z drawn from the gamma distribution of shape x:  dx = g dz/dx at the same quantile

    Gamma.rsample and related distributions use it (Figurnov et al., 2018, arXiv:1805.08498). This
    is the only rule that calls a kernel made for a backward: dz/dx = -(dF/dx) / (dF/dz), F the
    distribution function, is a series that only the sampler's own kernel computes.
    """

    @staticmethod
    def forward(input: T, generator: torch.Generator | None = None) -> T:
        return _torch.standard_gamma(input, generator=generator)

    @staticmethod
    def d_input(g: T, input: T, result: T) -> T:
        return g * _torch.standard_gamma_grad(input, result)


rule(_torch.standard_gamma)(StandardGamma)


@inplace(T.atan2_, T.arctan2_)
@rule(torch.atan2, T.atan2, torch.arctan2, T.arctan2)
class Atan2(Rule):
    """z = the angle of (y, x):  dx = g x / (y^2 + x^2),  dy = -g y / (y^2 + x^2)"""

    @staticmethod
    def forward(input: T, other: T) -> T:
        return torch.atan2(input, other)

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, other: T) -> Gradients:
        y, x = input, other
        scale = (y * y + x * x).reciprocal()
        nowhere = (y == 0) & (x == 0)
        return (
            (g * x * scale).masked_fill(nowhere, 0) if needs[0] else None,
            (g * -y * scale).masked_fill(nowhere, 0) if needs[1] else None,
        )


class _Rest(Rule):
    """z = x - y q, with q = x / y rounded:  dx = g,  dy = -g q"""

    @classmethod
    def label_of(cls, input: T | Number, other: T | Number) -> str:
        return f"{cls.__name__}Backward{int(isinstance(other, T))}"

    @staticmethod
    def d_input(g: T) -> T:
        return g


@inplace(T.remainder_, T.__imod__)
@rule(torch.remainder, T.remainder, T.__mod__)
class Remainder(_Rest):
    """z = x - y floor(x / y):  dx = g,  dy = -g floor(x / y).

    As in PyTorch, there is no gradient where x is a number.
    """

    @classmethod
    def label_of(cls, input: T | Number, other: T | Number) -> str:
        return super().label_of(input, other) if isinstance(input, T) else "NotImplemented"

    @staticmethod
    def forward(input: T | Number, other: T | Number) -> T:
        return torch.remainder(input, other)  # type: ignore[arg-type]  # of two numbers it is never asked

    @staticmethod
    def d_other(g: T, input: T | Number, other: T) -> T:
        if not isinstance(input, T):
            raise RuntimeError("derivative for aten::remainder is not implemented")
        return -g * torch.div(input, other, rounding_mode="floor")


@composite(T.__rmod__)
def rmod(input: T, other: T | Number) -> T:
    return record(Remainder, (other, input))[0]


@inplace(T.floor_divide_, T.__ifloordiv__)
@rule(torch.floor_divide, T.floor_divide, T.__floordiv__)
class FloorDivide(Rule):
    """z = floor(x / y).  As in PyTorch, there is a result but no gradient."""

    @classmethod
    def label_of(cls, input: T | Number, other: T | Number) -> str:
        return "NotImplemented"

    @staticmethod
    def forward(input: T | Number, other: T | Number) -> T:
        return torch.floor_divide(input, other)

    @staticmethod
    def d_input(g: T) -> T:
        raise RuntimeError("derivative for aten::floor_divide is not implemented")

    d_other = d_input


@composite(T.__rfloordiv__)
def rfloordiv(input: T, other: T | Number) -> T:
    return record(FloorDivide, (other, input))[0]


@inplace(T.fmod_)
@rule(torch.fmod, T.fmod)
class Fmod(_Rest):
    """z = x - y trunc(x / y):  dx = g,  dy = -g trunc(x / y)"""

    @staticmethod
    def forward(input: T, other: T | Number) -> T:
        return torch.fmod(input, other)

    @staticmethod
    def d_other(g: T, input: T, other: T) -> T:
        return -g * torch.div(input, other, rounding_mode="trunc")


@inplace(T.lerp_)
@rule(torch.lerp, T.lerp)
class Lerp(Rule):
    """z = x + w (y - x):  dx = g (1 - w),  dy = g w,  dw = g (y - x)"""

    @staticmethod
    def forward(input: T, end: T, weight: T | Number) -> T:
        return torch.lerp(input, end, weight)

    @classmethod
    def label_of(cls, input: T, end: T, weight: T | Number) -> str:
        return f"LerpBackward{int(isinstance(weight, T))}"

    @staticmethod
    def d_input(g: T, weight: T | Number) -> T:
        return g * (1 - weight)

    @staticmethod
    def d_end(g: T, weight: T | Number) -> T:
        return g * weight

    @staticmethod
    def d_weight(g: T, input: T, end: T) -> T:
        return g * (end - input)


@inplace(T.addcmul_)
@rule(torch.addcmul, T.addcmul)
class Addcmul(Rule):
    """z = x + v a b:  dx = g,  da = g (b v),  db = g (a v)"""

    @staticmethod
    def forward(input: T, tensor1: T, tensor2: T, value: Number = 1) -> T:
        return torch.addcmul(input, tensor1, tensor2, value=value)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @staticmethod
    def d_tensor1(g: T, tensor2: T, value: Number) -> T:
        return g * (tensor2 * value)

    @staticmethod
    def d_tensor2(g: T, tensor1: T, value: Number) -> T:
        return g * (tensor1 * value)


@inplace(T.addcdiv_)
@rule(torch.addcdiv, T.addcdiv)
class Addcdiv(Rule):
    """z = x + v a / b:  dx = g,  da = g (v / b),  db = -g (v a / b^2)"""

    @staticmethod
    def forward(input: T, tensor1: T, tensor2: T, value: Number = 1) -> T:
        return torch.addcdiv(input, tensor1, tensor2, value=value)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @staticmethod
    def d_tensor1(g: T, tensor2: T, value: Number) -> T:
        b = tensor2
        return g * (torch.tensor(value, dtype=b.dtype, device=b.device) / b)

    @staticmethod
    def d_tensor2(g: T, tensor1: T, tensor2: T, value: Number) -> T:
        return -g * ((value * tensor1) / (tensor2 * tensor2))


_xlogy: TorchFunction = torch.xlogy


@inplace(T.xlogy_, torch.xlogy_)
@rule(torch.xlogy, T.xlogy, torch.special.xlogy)
class Xlogy(Rule):
    """z = x log y, 0 where x = 0:  dx = g log y, 0 where x = 0 >= y;  dy = g x / y"""

    @staticmethod
    def forward(input: T | Number, other: T | Number) -> T:
        return _xlogy(input, other)

    @classmethod
    def label_of(cls, input: T | Number, other: T | Number) -> str:
        if not isinstance(other, T):
            return "XlogyBackward2"
        return "XlogyBackward0" if isinstance(input, T) else "XlogyBackward1"

    @staticmethod
    def d_input(g: T, input: T, other: T | Number) -> T:
        dx = torch.xlogy(g, other)
        if isinstance(other, T):
            return dx.masked_fill((input == 0.0) & (other <= 0.0), 0.0)
        return dx.masked_fill(input == 0.0, 0.0) if other <= 0 else dx

    @staticmethod
    def d_other(g: T, input: T | Number, other: T) -> T:
        return g * input / other


@composite(T.where)
def where(input: T, condition: T, other: T | Number) -> T:
    """x.where(condition, y), which PyTorch also computes as torch.where(condition, x, y)"""
    return record(Where, (condition, input, other))[0]
