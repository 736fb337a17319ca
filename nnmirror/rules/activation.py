"""The activations that are smooth or bounded: ELU, SiLU, GELU, Hardtanh.

`g` is the gradient of the result. float16 and bfloat16 are computed in float32, as PyTorch's
kernels do.
"""

import math
from typing import Any

import torch

from ..tape import constant, record
from .kernel import (
    alone,
    by_itself,
    by_registers,
    by_sign,
    each_way,
    laid_out_as,
    scalar_exp,
    vector_exp,
    widened,
)
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
            # The kernel's own exp of numbers above 0, which come of a scale below 0 alone, is
            # none that a tensor operation computes.
            e = vector_exp(z) if ctx.how[2] > 0 else torch.where(z > 0, torch.exp(z), vector_exp(z))
            return by_sign(x, s(g), below(g) * e)  # below for a NaN too

        def by_one(g: T, x: T) -> T:
            z = (x * number(ctx.how[2], x)).masked_fill(x > 0, 0)
            return torch.where(x <= 0, below(g) * scalar_exp(z), s(g))

        dx = each_way(by_registers, by_one, wide, (g, saved))
        return laid_out_as(dx.to(dtype).view(shape), g), None, None, None


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
        return laid_out_as(dx.to(dtype).view(shape), g), None, None, None


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

    infer: Any = staticmethod(lambda x, how="none": torch._C._nn.gelu(x, approximate=how))
    public: Any = staticmethod(torch._C._nn.gelu)

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
    t = alone(torch.tanh, b * torch.addcmul(x, c, square * x))
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
        return laid_out_as(g.masked_fill(lost.view(g.shape), 0), g), None, None


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


SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


class Selu(Elu):
    """y = s x where x > 0, else s a (exp(x) - 1):  dx = g s where x > 0, else g s a exp(x)

    `Elu` with the a and s that keep mean 0 and variance 1.  Saved: x.  Klambauer et al., 2017
    (arXiv:1706.02515).
    """

    public: Any = staticmethod(torch.selu)

    @staticmethod
    def as_called(input: Any, alpha: float, scale: float) -> tuple[Any, ...]:
        return (input,)

    @classmethod
    def node_name(cls) -> str:
        return "EluBackward0"


@composite(torch.selu)
def selu(input: T) -> T:
    if not isinstance(input, T):
        raise unplaced(torch.selu, (input,), {})
    return record(Selu, (input, SELU_ALPHA, SELU_SCALE))[0]


@composite(torch.selu_)
def selu_(input: T) -> T:
    if not isinstance(input, T):
        raise unplaced(torch.selu_, (input,), {})
    return record(EluInplace, (input, SELU_ALPHA, SELU_SCALE))[0]


@rule(torch.celu)
class Celu(Rule):
    """y = x where x > 0, else a (exp(x / a) - 1):  dx = g where x > 0, else g exp(x / a)

    Saved: x.  Barron, 2017 (arXiv:1704.07483).
    """

    infer: Any = staticmethod(torch.celu)

    @staticmethod
    def forward(ctx: Any, input: T, alpha: Any = 1.0) -> T:
        y = torch.celu(input, alpha)
        ctx.how = _celu_as_elu(alpha)
        ctx.save_for_backward(input)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        return Elu.backward(ctx, g)[:2]


@rule(torch.celu_)
class CeluInplace(Celu):
    """`Celu` into the memory of its input.  Saved: y;  dx = g where y > 0, else g (y + a) / a"""

    is_inplace = True
    infer: Any = staticmethod(torch.celu_)

    @classmethod
    def node_name(cls) -> str:
        return "CeluBackward1"

    @staticmethod
    def forward(ctx: Any, input: T, alpha: Any = 1.0) -> T:
        y = torch.celu_(input, alpha)
        ctx.how = _celu_as_elu(alpha)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        return EluInplace.backward(ctx, g)[:2]


def _celu_as_elu(alpha: float) -> tuple[float, float, float]:
    """The parameters of `Elu` that make it this; the divisor is rounded to a float32 first."""
    return alpha, 1, 1.0 / torch.tensor(alpha, dtype=torch.float32, device="cpu").item()


@rule(torch._C._nn.log_sigmoid)
class LogSigmoid(Rule):
    """y = -log(1 + exp(-x)):  dx = g (1 - e / (1 + e)) where x < 0, else g e / (1 + e)

    with e = exp(-|x|).  Saved: x and e.
    """

    infer: Any = staticmethod(torch._C._nn.log_sigmoid)

    @staticmethod
    def forward(ctx: Any, input: T) -> T:
        if not isinstance(input, T):
            raise unplaced(torch._C._nn.log_sigmoid, (input,), {})
        y, e = torch.ops.aten.log_sigmoid_forward(input)
        ctx.save_for_backward(input, e)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        dtype, shape = g.dtype, g.shape
        wide, x, e = widened(g, *ctx.saved_tensors)
        if not x.is_cpu:
            e = torch.exp(-x.abs())  # only the CPU's kernel keeps it
        share = e / (1 + e)
        dx = torch.where(x < 0, 1 - share, share) * wide
        return laid_out_as(dx.to(dtype).view(shape), g)


class _OfInput(Rule):
    """An activation whose slope is a function of x, `slope(g, x, *parameters)`.  Saved: x."""

    function: Any
    by_x = False  # dx is laid out as x, else as g

    @staticmethod
    def forward(ctx: Any, input: T, *how: Any) -> T:
        y: T = ctx.function.function(input, *how)
        ctx.how = how
        ctx.save_for_backward(input)
        return y

    @staticmethod
    def slope(g: T, x: T, *how: Any) -> T:
        """dx, in float32 at least."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        dx = ctx.function.slope(*widened(g, ctx.saved(0)), *ctx.how)
        like = ctx.saved(0) if ctx.function.by_x else g
        dx = laid_out_as(dx.to(g.dtype).view(g.shape), like)
        return (dx, *[None] * (len(ctx.edges) - 1))


def _into(of: type[_OfInput], function: Any, number: int = 0) -> type[_OfInput]:
    """The same into the memory of its input.  Saved: a copy of x."""

    def forward(ctx: Any, input: T, *how: Any) -> T:
        ctx.how = how
        ctx.save_for_backward(input.clone())
        y = function(input, *how)
        ctx.mark_dirty(y)
        return y

    name = f"{of.__name__}Backward{number}"
    made = type(
        f"{of.__name__}Inplace",
        (of,),
        {
            "__doc__": _into.__doc__,
            "is_inplace": True,
            "infer": staticmethod(function),
            "forward": staticmethod(forward),
            "node_name": classmethod(lambda cls: name),
        },
    )
    rule(function)(made)
    return made


@rule(torch._C._nn.hardsigmoid)
class Hardsigmoid(_OfInput):
    """y = x / 6 + 1/2 clipped to [0, 1]:  dx = g / 6 where -3 < x < 3, else 0.  Saved: x."""

    function = infer = staticmethod(torch._C._nn.hardsigmoid)

    @staticmethod
    def slope(g: T, x: T) -> T:
        sixth = number(1 / 6, x.float()).to(x.dtype)  # a float32 in the kernel, whatever x is
        return (g * sixth).masked_fill(~((x > -3) & (x < 3)), 0)


HardsigmoidInplace = _into(Hardsigmoid, torch._C._nn.hardsigmoid_)


@rule(torch._C._nn.hardswish)
class Hardswish(_OfInput):
    """y = x hardsigmoid(x):  dx = g (x / 3 + 1/2) where -3 < x < 3, 0 below, g above.  Saved: x.

    Howard et al., 2019 (arXiv:1905.02244).
    """

    function = infer = staticmethod(torch._C._nn.hardswish)

    @staticmethod
    def slope(g: T, x: T) -> T:
        middle = g * (x / 3 + 0.5)
        return torch.where(x >= 3, g, middle).masked_fill(x <= -3, 0)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        x = ctx.saved(0)
        (dx,) = _OfInput.backward(ctx, g)
        # A NaN taken one by one counts as above 3.
        dx = each_way(
            lambda dx, g, x: dx,
            lambda dx, g, x: torch.where(x.isnan(), g, dx),
            (dx, g, x),
            (g, x),
        )
        return (laid_out_as(dx, g),)


HardswishInplace = _into(Hardswish, torch._C._nn.hardswish_)


@rule(torch._C._nn.mish)
class Mish(_OfInput):
    """y = x t, t = tanh(log(1 + exp(x))):  dx = g (t + x s (1 - t^2)), s = sigmoid(x).  Saved: x.

    Misra, 2019 (arXiv:1908.08681). PyTorch's kernel has an exp of positive numbers, a log1p and a
    tanh of its own, which no tensor operation computes: the gradient can be off by a few units in
    the last place (README, "What is mirrored").
    """

    function = infer = staticmethod(torch._C._nn.mish)

    @staticmethod
    def slope(g: T, x: T) -> T:
        s = by_registers(torch.sigmoid, x)
        e = torch.where(x <= 0, vector_exp(x), alone(torch.exp, x))
        t = alone(torch.tanh, alone(torch.log1p, e))
        return g * torch.addcmul(t, x * s, torch.addcmul(number(1, x), t, t, value=-1))


MishInplace = _into(Mish, torch._C._nn.mish_)


@rule(torch.threshold)
class Threshold(_OfInput):
    """y = x where x > t, else v:  dx = g where x > t, else 0.  Saved: x."""

    function = infer = staticmethod(torch.threshold)

    @staticmethod
    def forward(ctx: Any, input: T, threshold: Any, value: Any) -> T:
        return _OfInput.forward(ctx, input, threshold, value)

    @staticmethod
    def slope(g: T, x: T, threshold: Any, value: Any) -> T:
        return g.masked_fill(x <= number(threshold, x), 0)

    by_x = True  # as ReLU's


ThresholdInplace = _into(Threshold, torch.threshold_, 1)


@rule(torch.hardshrink, T.hardshrink)
class Hardshrink(Rule):
    """y = x where |x| > l, else 0:  dx = g there, else 0.  Saved: x."""

    function: Any = staticmethod(torch.hardshrink)
    infer: Any = function

    @staticmethod
    def forward(ctx: Any, input: T, lambd: Any = 0.5) -> T:
        y: T = ctx.function.function(input, lambd)
        ctx.bound = lambd
        ctx.save_for_backward(input)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        x = ctx.saved(0)
        bound = number(ctx.bound, x)
        # A NaN is on neither side: by registers it keeps g back, one by one it lets it through.
        lost = each_way(
            lambda x: ~((x < -bound) | (x > bound)),
            lambda x: (x >= -bound) & (x <= bound),
            (x,),
            (g, x),
            short=True,
        )
        return laid_out_as(g.masked_fill(lost, 0), g), None


@rule(torch._C._nn.softshrink)
class Softshrink(Hardshrink):
    """y = x - l sign(x) where |x| > l, else 0:  dx = g there, else 0.  Saved: x."""

    function = infer = staticmethod(torch._C._nn.softshrink)


@rule(torch._C._nn.glu)
class Glu(Rule):
    """y = a s, s = sigmoid(b), a and b the halves of x along dim:  da = g s,  db = g a (1 - s) s

    Saved: x.  Dauphin et al., 2017 (arXiv:1612.08083).
    """

    infer: Any = staticmethod(torch._C._nn.glu)

    @staticmethod
    def forward(ctx: Any, input: T, dim: int = -1) -> T:
        y = torch._C._nn.glu(input, dim)
        ctx.dim = dim
        ctx.save_for_backward(input)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[T, None]:
        x = ctx.saved(0)
        a, b = x.chunk(2, ctx.dim)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        da, db = dx.chunk(2, ctx.dim)
        s = torch.sigmoid(b, out=da)
        if g.dtype.itemsize == 2:  # the kernel computes this one in float32 and rounds once
            s_wide = s.float()
            db.copy_((1 - s_wide) * s_wide * a.float() * g.float())
        else:
            torch.mul((1 - s) * s * a, g, out=db)
        s.mul_(g)
        return dx, None
