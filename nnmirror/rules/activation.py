"""The activations that are smooth or bounded: ELU, SiLU, GELU, Hardtanh.

`g` is the gradient of the result. float16 and bfloat16 are computed in float32, as PyTorch's
kernels do.
"""

import math
from typing import Any

import torch

from ..tape import constant, record
from .kernel import by_itself, by_registers, each_way, scalar_exp, vector_exp, widened
from .registry import Rule, composite, rule, unplaced

T = torch.Tensor


def number(value: float, like: T) -> T:
    """`value` in the dtype of `like`: kernels round their parameters first."""
    return constant(float(value), like.dtype, like.device)


@rule(torch._C._nn.elu)
class Elu(Rule):
    """y = x where x > 0, else a (exp(x) - 1):  dx = g where x > 0, else g a exp(x)

    With a scale s and an input_scale i, which only PyTorch's own SELU and CELU use:
    y = s x, else s a (exp(i x) - 1).  Saved: x.  Clevert et al., 2016 (arXiv:1511.07289).
    """

    infer: Any = staticmethod(torch._C._nn.elu)

    @staticmethod
    def forward(ctx: Any, input: T, alpha: Any = 1.0, scale: Any = 1, input_scale: Any = 1) -> T:
        y = torch._C._nn.elu(input, alpha, scale, input_scale)
        ctx.how = alpha, scale, input_scale
        ctx.save_for_backward(input)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        saved, dtype, shape = ctx.saved(0), g.dtype, g.shape
        wide = widened(g, saved)
        below, s = _below(ctx.how, wide[1])

        def by_registers(g: T, x: T) -> T:
            z = x if ctx.how[2] == 1 else x * number(ctx.how[2], x)
            return torch.where(x > 0, s(g), below(g) * vector_exp(z))  # below for a NaN too

        def by_one(g: T, x: T) -> T:
            z = (x * number(ctx.how[2], x)).masked_fill(x > 0, 0)
            return torch.where(x <= 0, below(g) * scalar_exp(z), s(g))

        dx = each_way(by_registers, by_one, wide, (g, saved))
        return dx.to(dtype).view(shape), None, None, None


def _below(how: tuple[Any, Any, Any], like: T) -> tuple[Any, Any]:
    """What g is multiplied with in the branch below 0, and in the other: (g i (a s)) and (g s).

    Nothing, where that is 1, as it nearly always is.
    """
    a, s, i = how
    plain = a == s == i == 1
    of, by, into = number(a, like), number(s, like), number(i, like)

    def below(g: T) -> T:
        return g if plain else g * into * (of * by)

    def above(g: T) -> T:
        return g if s == 1 else g * by

    return below, above


@rule(torch._C._nn.elu_)
class EluInplace(Elu):
    """`Elu` into the memory of its input.  Saved: y;  dx = g where y > 0, else g (y + a)"""

    is_inplace = True
    infer: Any = staticmethod(torch._C._nn.elu_)

    @classmethod
    def node_name(cls) -> str:
        return "EluBackward1"

    @staticmethod
    def forward(ctx: Any, input: T, alpha: Any = 1.0, scale: Any = 1, input_scale: Any = 1) -> T:
        ctx.how = alpha, scale, input_scale
        y: T = torch._C._nn.elu_(input, alpha, scale, input_scale)  # type: ignore[call-arg]
        ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        if ctx.how[0] < 0:
            raise RuntimeError(
                "In-place elu backward calculation is triggered with a negative slope which is"
                " not supported. This is caused by calling in-place forward function with a"
                " negative slope, please call out-of-place version instead."
            )
        saved, dtype, shape = ctx.saved(0), g.dtype, g.shape
        wide = widened(g, saved)
        a, s, i = (number(v, wide[1]) for v in ctx.how)

        def by_registers(g: T, y: T) -> T:
            return torch.where(y > 0, g * s, g * i * (y + a * s))

        def by_one(g: T, y: T) -> T:
            return torch.where(y <= 0, g * i * (y + a * s), g * s)

        dx = each_way(by_registers, by_one, wide, (g, saved))
        return dx.to(dtype).view(shape), None, None, None


@rule(torch._C._nn.silu)
class Silu(Rule):
    """y = x z with z = sigmoid(x):  dx = g z (1 + x (1 - z)).  Saved: x.

    Hendrycks and Gimpel, 2016 (arXiv:1606.08415), who call it so; Swish elsewhere.
    """

    infer: Any = staticmethod(torch._C._nn.silu)

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        y = torch._C._nn.silu(input)
        ctx.save_for_backward(input)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        saved, dtype, shape = ctx.saved(0), g.dtype, g.shape
        operands = g, saved
        g, x = widened(g, saved)
        z = each_way(
            lambda x: by_registers(torch.sigmoid, x),
            lambda x: by_itself(torch.sigmoid, x),
            (x,),
            operands,
        )
        # 1 + x (1 - z) is one fused multiply-add, as in the kernel.
        return (g * z * torch.addcmul(number(1, x), x, 1 - z)).to(dtype).view(shape)


@rule(torch._C._nn.silu_)
class SiluInplace(Silu):
    """`Silu` into the memory of its input.  Saved: a copy of x."""

    is_inplace = True
    infer: Any = staticmethod(torch._C._nn.silu_)

    @classmethod
    def node_name(cls) -> str:
        return "SiluBackward0"

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        ctx.save_for_backward(input.clone())
        y = torch._C._nn.silu_(input)
        ctx.mark_dirty(y)
        return y


class Gelu(Rule):
    """y = x P(x), P the distribution function of the normal law, p its density:

        none:  P(x) = (1 + erf(x / sqrt 2)) / 2,        dx = g (P(x) + x p(x))
        tanh:  y = x (1 + t) / 2,  t = tanh(b (x + c x^3)),  b = sqrt(2 / pi),  c = 0.044715
               dx = g ((1 + t) / 2 + x / 2 (1 - t^2) b (1 + 3 c x^2))

    Saved: x.  Hendrycks and Gimpel, 2016 (arXiv:1606.08415).

    PyTorch's kernels have an erf and a tanh of their own, which no tensor operation computes:
    the gradient can be off by a few units in the last place (README, "What is mirrored").
    """

    @staticmethod
    def forward(ctx: Any, input: T, approximate: str = "none") -> T:
        y = torch._C._nn.gelu(input, approximate=approximate)
        ctx.tanh = approximate == "tanh"
        ctx.save_for_backward(input)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        dtype, shape = g.dtype, g.shape
        g, x = widened(g, ctx.saved(0))
        slope = (_gelu_slope_tanh if ctx.tanh else _gelu_slope)(x)
        return (g * slope).to(dtype).view(shape), None


@composite(torch._C._nn.gelu)
def gelu(*args: Any, **kwargs: Any) -> T:
    """`Gelu`; what it approximates by is given by keyword alone."""
    if len(args) != 1 or kwargs.keys() - {"approximate"}:
        raise unplaced(torch._C._nn.gelu, args, kwargs)
    return record(Gelu, (args[0], kwargs.get("approximate", "none")))[0]


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
    t = torch.tanh(b * torch.addcmul(x, c, square * x))
    inner = b * torch.addcmul(one, 3 * c, square)
    return torch.addcmul(0.5 * (1 + t), 0.5 * x * torch.addcmul(one, t, t, value=-1), inner)


@rule(torch._C._nn.hardtanh)
class Hardtanh(Rule):
    """y = x clipped to [a, b]:  dx = g where a < x < b, else 0.  Saved: x."""

    infer: Any = staticmethod(torch._C._nn.hardtanh)

    @staticmethod
    def forward(ctx: Any, input: T, min_val: Any = -1, max_val: Any = 1) -> T:
        y = torch._C._nn.hardtanh(input, min_val, max_val)
        ctx.bounds = min_val, max_val
        ctx.save_for_backward(input)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        saved = ctx.saved(0)
        (x,) = widened(saved)
        low, high = (number(v, x) for v in ctx.bounds)
        # A NaN is on neither side: by registers it keeps g back, one by one it lets it through.
        lost = each_way(
            lambda x: ~((x > low) & (x < high)),
            lambda x: (x <= low) | (x >= high),
            (x,),
            (g, saved),
            short=True,
        )
        return g.masked_fill(lost.view(g.shape), 0), None, None


@rule(torch._C._nn.hardtanh_)
class HardtanhInplace(Hardtanh):
    """`Hardtanh` into the memory of its input.  Saved: a copy of x."""

    is_inplace = True
    infer: Any = staticmethod(torch._C._nn.hardtanh_)

    @classmethod
    def node_name(cls) -> str:
        return "HardtanhBackward0"

    @staticmethod
    def forward(ctx: Any, input: T, min_val: Any = -1, max_val: Any = 1) -> T:
        ctx.bounds = min_val, max_val
        ctx.save_for_backward(input.clone())
        y = torch._C._nn.hardtanh_(input, min_val, max_val)
        ctx.mark_dirty(y)
        return y
