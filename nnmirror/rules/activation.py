"""The activations, each a rule and the function of `nnmirror.functional` that records it.

`g` is the gradient of the result, `h` that of the gradient dx, and ddx the gradient that x gets
from it: the second derivative, multiplied in PyTorch's order. Where PyTorch's kernels round
differently, or differ from each other, `nnmirror/exact/activation.py` follows them. Of two operands
the second is computed first, as in PyTorch's C++ code, because third derivatives are summed in that
order.
"""

import ctypes
import inspect
import math
from typing import Any

import torch

from .._torch import is_torch_function_enabled
from .._types import Number, TorchFunction
from ..constants import constant
from ..fast.composed import generated
from ..overrides import overridable
from ..tape import record
from .arithmetic import Div, Sub, zero
from .elementwise import Abs, Sigmoid, sigmoid_grad
from .gradient import gradient
from .kernel import laid_out_as, where_positive
from .pointwise import (
    above,
    between,
    differs,
    exp,
    kept,
    leaky,
    number,
    selected,
    times_slope,
    widened,
)
from .registry import Rule, composite, rule, unplaced

__all__ = [
    "celu",
    "celu_",
    "elu",
    "elu_",
    "gelu",
    "glu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "hardtanh_",
    "leaky_relu",
    "leaky_relu_",
    "logsigmoid",
    "mish",
    "relu",
    "relu6",
    "relu_",
    "selu",
    "selu_",
    "sigmoid",
    "silu",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "threshold",
    "threshold_",
]

T = torch.Tensor


@rule(torch.tanh, T.tanh)
class Tanh(Rule):
    """y = tanh(x):  dx = g (1 - y^2).  Saved: y."""

    infer: TorchFunction = staticmethod(torch.tanh)

    @staticmethod
    def forward(input: T) -> T:
        return torch.tanh(input)

    @staticmethod
    def d_input(g: T, result: T) -> T:
        return _tanh_grad(g, result)


@gradient("TanhBackward", second=lambda h, g, y: h * (-2 * y * g))
def _tanh_grad(g: T, y: T) -> T:
    """g (1 - y y): one fused multiply-add, then the product, as PyTorch's kernel."""
    if y.dtype is torch.bfloat16 or y.dtype is torch.float16:
        wide = y.float()  # the kernel computes these in float32 and rounds once
        one = constant(1.0, wide.dtype, wide.device)
        return laid_out_as((torch.addcmul(one, wide, wide, value=-1) * g.float()).to(y.dtype), g)
    slope = torch.addcmul(constant(1.0, y.dtype, y.device), y, y, value=-1)
    return laid_out_as(slope * g, g)


@rule(T.tanh_, torch.tanh_)
class TanhInplace(Tanh):
    """`Tanh` into the memory of its input."""

    is_inplace = True
    infer = staticmethod(torch.tanh_)

    @classmethod
    def node_name(cls) -> str:
        return "TanhBackward0"

    @staticmethod
    def forward(input: T) -> T:
        return torch.tanh_(input)


def tanh(input: T) -> T:
    """The hyperbolic tangent of each element; see `nnmirror.rules.activation.Tanh`."""
    if not isinstance(input, T):
        return input.tanh()
    return record(Tanh, (input,))[0]


@rule(torch.relu, T.relu)
class Relu(Rule):
    """y = max(x, 0):  dx = g where y > 0, else 0 (0 at 0; a NaN lets g through).  Saved: y."""

    infer = staticmethod(torch.relu)

    @staticmethod
    def forward(input: T) -> T:
        return torch.relu(input)

    @staticmethod
    def d_input(g: T, result: T) -> T:
        return _relu_grad(g, result)

    @classmethod
    def node_name(cls) -> str:
        return "ReluBackward0"


@gradient("ThresholdBackward")
def _relu_grad(g: T, y: T) -> T:
    """g where y > 0, else 0, with the strides of y."""
    return laid_out_as(where_positive(g, y), y)


@rule(T.relu_, torch.relu_)
class ReluInplace(Relu):
    """`Relu` into the memory of its input."""

    is_inplace = True
    infer = staticmethod(torch.relu_)

    @staticmethod
    def forward(input: T) -> T:
        return torch.relu_(input)


def relu(input: T, inplace: bool = False) -> T:
    """The positive part of each element; see `nnmirror.rules.activation.Relu`."""
    return record(ReluInplace if inplace else Relu, (input,))[0]


def relu_(input: T) -> T:
    """`relu(input, inplace=True)`"""
    return record(ReluInplace, (input,))[0]


@rule(torch._C._nn.leaky_relu)
class LeakyRelu(Rule):
    """y = x where x > 0, else s x:  dx = g where x > 0, else s g.  Saved: x."""

    infer: TorchFunction = staticmethod(torch._C._nn.leaky_relu)

    @staticmethod
    def forward(input: T, negative_slope: float = 0.01) -> T:
        return torch._C._nn.leaky_relu(input, negative_slope)

    @staticmethod
    def d_input(g: T, input: T, negative_slope: float) -> T:
        return _leaky_grad(g, input, negative_slope)

    @classmethod
    def node_name(cls) -> str:
        return "LeakyReluBackward0"


@rule(torch._C._nn.leaky_relu_)
class LeakyReluInplace(LeakyRelu):
    """`LeakyRelu` into the memory of its input.  Saved: y, whose sign is that of x."""

    is_inplace = True
    infer = staticmethod(torch._C._nn.leaky_relu_)

    @classmethod
    def node_name(cls) -> str:
        return "LeakyReluBackward1"

    @staticmethod
    def forward(input: T, negative_slope: float = 0.01) -> T:
        return torch._C._nn.leaky_relu_(input, negative_slope)

    @staticmethod
    def d_input(g: T, result: T, negative_slope: float) -> T:  # type: ignore[override]
        if negative_slope < 0:
            raise RuntimeError(
                "In-place leakyReLu backward calculation is triggered with a negative slope"
                " which is not supported. This is caused by calling in-place forward function"
                " with a negative slope, please call out-of-place version instead. File an"
                " issue at https://github.com/pytorch/pytorch if you do require supporting"
                " in-place leakRelu backward calculation with negative slope"
            )
        return _leaky_grad(g, result, negative_slope)


_leaky_grad = gradient("LeakyReluBackward")(leaky)


def leaky_relu(input: T, negative_slope: float = 0.01, inplace: bool = False) -> T:
    """Each element, the negative ones times `negative_slope`.

    See `nnmirror.rules.activation.LeakyRelu`.
    """
    function = LeakyReluInplace if inplace else LeakyRelu
    return record(function, (input, negative_slope))[0]


def leaky_relu_(input: T, negative_slope: float = 0.01) -> T:
    """`leaky_relu(input, negative_slope, inplace=True)`"""
    return leaky_relu(input, negative_slope, True)


def sigmoid(input: T) -> T:
    """1 / (1 + exp(-x)) of each element; see `nnmirror.rules.elementwise.Sigmoid`."""
    if not isinstance(input, T):
        return input.sigmoid()
    return record(Sigmoid, (input,))[0]


@rule(torch._C._nn.elu)
class Elu(Rule):
    """y = x where x > 0, else a (exp(x) - 1):  dx = g where x > 0, else g a exp(x)

    With a scale s and an input_scale i, which only PyTorch's own SELU and CELU use:
    y = s x, else s a (exp(i x) - 1).  ddx = (h g i) dy/dx where x < 0, else 0.
    Saved: x.  Clevert et al., 2016 (arXiv:1511.07289).
    """

    infer: TorchFunction = staticmethod(torch._C._nn.elu)

    @staticmethod
    def forward(input: T, alpha: Number = 1.0, scale: Number = 1, input_scale: Number = 1) -> T:
        return torch._C._nn.elu(input, alpha, scale, input_scale)

    @staticmethod
    def d_input(g: T, input: T, alpha: float, scale: float, input_scale: float) -> T:
        return _elu_grad(g, input, alpha, scale, input_scale)


def elu_second(grad: TorchFunction, h: T, g: T, x: T, *how: float) -> T:
    """The second derivative of ELU, whose gradient is grad(g, x, *how)."""
    input_scale = how[-1]
    return grad(h * g * input_scale, x, *how) * (x < 0).to(h.dtype)


def _elu_second(h: T, g: T, x: T, *how: float) -> T:
    return elu_second(_elu_grad, h, g, x, *how)


@gradient("EluBackward", second=_elu_second)
def _elu_grad(g: T, x: T, alpha: float, scale: float, input_scale: float) -> T:
    return times_slope(g, _elu_slope, x, alpha * input_scale * scale, scale, input_scale)


def _elu_slope(x: T, below: float, over: float, rate: float) -> T:
    """`over` where x > 0, else `below` exp(rate x)"""
    e = x.clamp(max=0)
    e = exp(e, rate) if rate > 0 else e.mul_(number(rate, e)).exp_()
    if _alike(below, over, x):  # at 0 too, from either side
        return e if over == 1 else e.mul_(number(over, e))
    return selected(above(x, 0), over, e.mul_(number(below, e)))


def _alike(a: float, b: float, x: T) -> bool:
    """Do these round to the same number in the dtype of x?"""
    return math.isclose(a, b, rel_tol=torch.finfo(x.dtype).eps / 2)


@rule(torch._C._nn.elu_)
class EluInplace(Elu):
    """`Elu` into the memory of its input:  dx = g where y > 0, else g (y + a)

    The gradient of y from h is h g i where y < 0, else 0.  Saved: y.
    """

    is_inplace = True
    infer = staticmethod(torch._C._nn.elu_)

    @classmethod
    def node_name(cls) -> str:
        return "EluBackward1"

    @staticmethod
    def forward(input: T, alpha: Number = 1.0, scale: Number = 1, input_scale: Number = 1) -> T:
        return torch._C._nn.elu_(input, alpha, scale, input_scale)  # type: ignore[call-arg]

    @staticmethod
    def d_input(g: T, result: T, alpha: float, scale: float, input_scale: float) -> T:  # type: ignore[override]
        refuse_negative_slope(alpha)
        return _elu_grad_of_result(g, result, alpha, scale, input_scale)


def elu_second_of_result(h: T, g: T, y: T, alpha: float, scale: float, input_scale: float) -> T:
    return h * g * input_scale * (y < 0).to(h.dtype)


@gradient("EluBackward", second=elu_second_of_result)
def _elu_grad_of_result(g: T, y: T, alpha: float, scale: float, input_scale: float) -> T:
    return times_slope(g, _elu_slope_of_result, y, alpha * scale, scale, input_scale)


def _elu_slope_of_result(y: T, most: float, over: float, rate: float) -> T:
    """`over` where y > 0, else rate (y + most)"""
    slope = y.clamp(max=0).add_(number(most, y))
    if rate != 1:
        slope.mul_(number(rate, y))
    return slope if _alike(most * rate, over, y) else selected(above(y, 0), over, slope)


def refuse_negative_slope(alpha: float) -> None:
    if alpha < 0:
        raise RuntimeError(
            "In-place elu backward calculation is triggered with a negative slope which is"
            " not supported. This is caused by calling in-place forward function with a"
            " negative slope, please call out-of-place version instead."
        )


def elu(input: T, alpha: float = 1.0, inplace: bool = False) -> T:
    """x where x > 0, else alpha (exp(x) - 1); see `nnmirror.rules.activation.Elu`."""
    return record(EluInplace if inplace else Elu, (input, alpha))[0]


def elu_(input: T, alpha: float = 1.0) -> T:
    """`elu(input, alpha, inplace=True)`"""
    return elu(input, alpha, True)


SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


class Selu(Elu):
    """y = s x where x > 0, else s a (exp(x) - 1):  dx = g s where x > 0, else g s a exp(x)

    `Elu` with the a and s that keep mean 0 and variance 1.  Saved: x.  Klambauer et al., 2017
    (arXiv:1706.02515).
    """

    public = staticmethod(torch.selu)

    @staticmethod
    def as_called(input: T, alpha: float, scale: float) -> tuple[T, ...]:
        return (input,)

    @classmethod
    def node_name(cls) -> str:
        return "EluBackward0"


@composite(torch.selu)
def _selu(input: T) -> T:
    if not isinstance(input, T):
        raise unplaced(torch.selu, (input,), {})
    return record(Selu, (input, SELU_ALPHA, SELU_SCALE))[0]


@composite(torch.selu_)
def _selu_(input: T) -> T:
    if not isinstance(input, T):
        raise unplaced(torch.selu_, (input,), {})
    return record(EluInplace, (input, SELU_ALPHA, SELU_SCALE))[0]


@generated
def selu(input: T, inplace: bool = False) -> T:
    """s x where x > 0, else s a (exp(x) - 1), a and s constants.

    See `nnmirror.rules.activation.Elu`.
    """
    return (_selu_ if inplace else _selu)(input)


@overridable
def selu_(input: T) -> T:
    """`selu(input, inplace=True)`"""
    return _selu_(input)


@rule(torch.celu)
class Celu(Rule):
    """y = x where x > 0, else a (exp(x / a) - 1):  dx = g where x > 0, else g exp(x / a)

    Saved: x.  Barron, 2017 (arXiv:1704.07483).
    """

    infer = staticmethod(torch.celu)

    @staticmethod
    def forward(input: T, alpha: Number = 1.0) -> T:
        return torch.celu(input, alpha)

    @staticmethod
    def d_input(g: T, input: T, alpha: float) -> T:
        return Elu.d_input(g, input, *celu_as_elu(alpha))


@rule(torch.celu_)
class CeluInplace(Celu):
    """`Celu` into the memory of its input.  Saved: y;  dx = g where y > 0, else g (y + a) / a"""

    is_inplace = True
    infer = staticmethod(torch.celu_)

    @classmethod
    def node_name(cls) -> str:
        return "CeluBackward1"

    @staticmethod
    def forward(input: T, alpha: Number = 1.0) -> T:
        return torch.celu_(input, alpha)

    @staticmethod
    def d_input(g: T, result: T, alpha: float) -> T:  # type: ignore[override]
        return EluInplace.d_input(g, result, *celu_as_elu(alpha))


def celu_as_elu(alpha: float) -> tuple[float, float, float]:
    """The parameters of `Elu` that make it this; the divisor is rounded to a float32 first."""
    return alpha, 1, 1.0 / ctypes.c_float(alpha).value


def celu(input: T, alpha: float = 1.0, inplace: bool = False) -> T:
    """x where x > 0, else alpha (exp(x / alpha) - 1); see `nnmirror.rules.activation.Celu`."""
    return record(CeluInplace if inplace else Celu, (input, alpha))[0]


def celu_(input: T, alpha: float = 1.0) -> T:
    """`celu(input, alpha, inplace=True)`"""
    return celu(input, alpha, True)


def _into(of: type[Rule], function: TorchFunction, number: int = 0) -> type[Rule]:
    """`of` into the memory of its input.  Saved: a copy of x."""
    parameters: Any = of.formulas.parameters  # type: ignore[union-attr]
    defaults = [p.default for p in parameters[1:]]
    names = [p.name for p in parameters[1:]]
    needed = [names.index(name) for name in [*inspect.signature(of.d_input).parameters][2:]]  # type: ignore[attr-defined]

    def forward(ctx: Any, input: T, *given: Any) -> T:
        every = *given, *defaults[len(given) :]
        ctx.parameters = [every[i] for i in needed]
        ctx.save_for_backward(input.clone())
        y: T = function(input, *given)
        ctx.mark_dirty(y)
        return y

    def backward(ctx: Any, g: T) -> tuple[T | None, ...]:
        dx = ctx.function.d_input(g, ctx.saved(0), *ctx.parameters)
        return (dx, *[None] * (len(ctx.edges) - 1))

    ctx = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([ctx, *parameters])  # type: ignore[attr-defined]
    name = f"{of.__name__}Backward{number}"
    made = type(
        f"{of.__name__}Inplace",
        (of,),
        {
            "__doc__": f"`{of.__name__}` into the memory of its input.  Saved: a copy of x.",
            "__module__": __name__,
            "is_inplace": True,
            "infer": staticmethod(function),
            "saves_of": staticmethod(lambda node: (0,)),
            "forward": staticmethod(forward),
            "backward": staticmethod(backward),
            "node_name": classmethod(lambda cls: name),
        },
    )
    return rule(function)(made)


@rule(torch._C._nn.silu)
class Silu(Rule):
    """y = x z with z = sigmoid(x):  dx = g (z + y (1 - z)).  Saved: x.

    With create_graph it is recorded as separate operations, as in PyTorch: g z (1 + x (1 - z)).
    Hendrycks and Gimpel, 2016 (arXiv:1606.08415), who call it so; Swish elsewhere.
    """

    infer = staticmethod(torch._C._nn.silu)

    @staticmethod
    def forward(input: T) -> T:
        return torch._C._nn.silu(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        if is_torch_function_enabled():
            z = torch.sigmoid(input)
            slope = 1 + input * (1 - z)
            return g * z * slope
        return times_slope(g, _silu_slope, input)


def _silu_slope(x: T) -> T:
    z = torch.sigmoid(x)
    y = x * z
    return torch.lerp(y, number(1, x), z, out=z)  # y + z (1 - y)


SiluInplace = _into(Silu, torch._C._nn.silu_)


def silu(input: T, inplace: bool = False) -> T:
    """x sigmoid(x); see `nnmirror.rules.activation.Silu`."""
    return record(SiluInplace if inplace else Silu, (input,))[0]


class Gelu(Rule):
    """y = x P(x), P the distribution function of the normal law, p its density:

        none:  P(x) = (1 + erf(x / sqrt 2)) / 2,        dx = g (P(x) + x p(x))
        tanh:  y = x s,  s = (1 + tanh u) / 2 = sigmoid(2 u),  u = b (x + c x^3),
               b = sqrt(2 / pi),  c = 0.044715
               dx = g (s + s (1 - s) x 2 b (1 + 3 c x^2))

    ddx = (h g) (2 p - x^2 p);  tanh: with t = tanh u, f = x / 2, k = 1 - t^2, u' = du/dx,
    (h g) (2 (k u' / 2) + f u' k' + f k u''),  k' = (2 / cosh u) (-t / cosh u) u'.
    Saved: x.  Hendrycks and Gimpel, 2016 (arXiv:1606.08415).
    """

    infer = staticmethod(lambda x, how="none": torch._C._nn.gelu(x, approximate=how))
    public = staticmethod(torch._C._nn.gelu)

    @staticmethod
    def forward(input: T, approximate: str = "none") -> T:
        return torch._C._nn.gelu(input, approximate=approximate)

    @staticmethod
    def d_input(g: T, input: T, approximate: str) -> T:
        return _gelu_grad(g, input, approximate)


def gelu_second(h: T, g: T, x: T, approximate: str) -> T:
    if approximate != "tanh":
        square = x * x
        p = torch.exp(square * -0.5) * _ONE_OVER_ROOT_2_PI
        return h * g * (p * 2 - square * p)
    b, c = math.sqrt(2) * (2 / math.sqrt(math.pi)) * 0.5, 0.044715
    u = (x + x.pow(3) * c) * b
    t, cosh = torch.tanh(u), torch.cosh(u)
    sech = torch.ones_like(cosh.detach()) / cosh
    f, k = x * 0.5, 1 - t * t
    du = (x * (3 * c) * x + 1) * b
    first = k * 0.5 * du
    dk = -sech * t
    dk = sech * 2 * dk * du
    of_k, ddu = f * du * dk, x * (6 * c) * b
    of_u = f * k * ddu
    slope = first * 2 + of_k + of_u
    return h * g * slope


_ONE_OVER_ROOT_2_PI = 2 / math.sqrt(math.pi) * math.sqrt(0.5) * 0.5


@gradient("GeluBackward", second=gelu_second)
def _gelu_grad(g: T, x: T, approximate: str) -> T:
    return times_slope(g, _gelu_slope_tanh if approximate == "tanh" else _gelu_slope, x)


@composite(torch._C._nn.gelu)
def _gelu(*args: Any, **kwargs: Any) -> T:
    """`Gelu`; `approximate` is keyword-only."""
    if len(args) != 1 or kwargs.keys() - {"approximate"}:
        raise unplaced(torch._C._nn.gelu, args, kwargs)
    return record(Gelu, (args[0], kwargs.get("approximate", "none")))[0]


def _gelu_slope(x: T) -> T:
    t = x * number(math.sqrt(0.5), x)
    density = exp(t.square(), -1)  # times sqrt(2 pi)
    below = torch.add(number(0.5, x), t.erf_(), alpha=0.5, out=t)
    return below.addcmul_(density, x, value=1 / math.sqrt(2 * math.pi))


def _gelu_slope_tanh(x: T) -> T:
    b, c = 2 * math.sqrt(2 / math.pi), 0.044715
    square = x * x
    twice = torch.add(number(b, x), square, alpha=b * c).mul_(x)
    inner = torch.add(number(b, x), square, alpha=3 * b * c, out=square).mul_(x)
    s, rest = torch.sigmoid(twice), twice.neg_().sigmoid_()  # more accurate than 1 - s
    return inner.mul_(rest).mul_(s).add_(s)


def gelu(input: T, *, approximate: str = "none") -> T:
    """x times the probability that a normal number is below it.

    See `nnmirror.rules.activation.Gelu`.
    """
    return record(Gelu, (input, approximate))[0]


@rule(torch._C._nn.hardtanh)
class Hardtanh(Rule):
    """y = x clipped to [a, b]:  dx = g where a < x < b, else 0;  ddx = 0.  Saved: x."""

    infer = staticmethod(torch._C._nn.hardtanh)

    @staticmethod
    def forward(input: T, min_val: Number = -1, max_val: Number = 1) -> T:
        return torch._C._nn.hardtanh(input, min_val, max_val)

    @staticmethod
    def d_input(g: T, input: T, min_val: float, max_val: float) -> T:
        return _hardtanh_grad(g, input, min_val, max_val)


@gradient("HardtanhBackward")
def _hardtanh_grad(g: T, x: T, low: float, high: float) -> T:
    return laid_out_as(_kept_between(g, x, low, high), g)


def _kept_between(g: T, x: T, low: float, high: float) -> T:
    return kept(g, between(widened(x), low, high).to(g.dtype))


HardtanhInplace = _into(Hardtanh, torch._C._nn.hardtanh_)


def hardtanh(input: T, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> T:
    """Each element clipped to [min_val, max_val]; see `nnmirror.rules.activation.Hardtanh`."""
    if min_val > max_val:
        raise ValueError("min_val cannot be greater than max_val")
    return record(HardtanhInplace if inplace else Hardtanh, (input, min_val, max_val))[0]


def hardtanh_(input: T, min_val: float = -1.0, max_val: float = 1.0) -> T:
    """`hardtanh(input, min_val, max_val, inplace=True)`"""
    return hardtanh(input, min_val, max_val, True)


@generated
def relu6(input: T, inplace: bool = False) -> T:
    """Each element clipped to [0, 6]; see `nnmirror.rules.activation.Hardtanh`."""
    return record(HardtanhInplace if inplace else Hardtanh, (input, 0, 6))[0]


@rule(torch._C._nn.log_sigmoid)
class LogSigmoid(Rule):
    """y = -log(1 + exp(-x)):  dx = g sigmoid(-x);  ddx = (h g) (z - 1) z, z = sigmoid(x)

    Saved: x.
    """

    infer = staticmethod(torch._C._nn.log_sigmoid)

    @staticmethod
    def forward(input: T) -> T:
        if not isinstance(input, T):
            raise unplaced(torch._C._nn.log_sigmoid, (input,), {})
        return torch._C._nn.log_sigmoid(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return _log_sigmoid_grad(g, input)


def log_sigmoid_second(h: T, g: T, x: T, *rest: T) -> T:
    z = torch.sigmoid(x)
    return h * g * (z - 1) * z


@gradient("LogSigmoidBackward", second=log_sigmoid_second)
def _log_sigmoid_grad(g: T, x: T) -> T:
    return times_slope(g, _log_sigmoid_slope, x)


def _log_sigmoid_slope(x: T) -> T:
    return x.neg().sigmoid_()


def logsigmoid(input: T) -> T:
    """The logarithm of the sigmoid; see `nnmirror.rules.activation.LogSigmoid`."""
    return record(LogSigmoid, (input,))[0]


@rule(torch._C._nn.softplus)
class Softplus(Rule):
    """z = log(1 + exp(b x)) / b, x where b x > t:  dx = g sigmoid(b x), g there.  Saved: x.

    ddx = (h g) (1 - s) s b where b x < t, else 0;  s = sigmoid(b x).
    """

    @staticmethod
    def forward(input: T, beta: float = 1.0, threshold: float = 20.0) -> T:
        return torch._C._nn.softplus(input, beta, threshold)

    @staticmethod
    def d_input(g: T, input: T, beta: float, threshold: float) -> T:
        return _softplus_grad(g, input, beta, threshold)


def softplus_second(h: T, g: T, x: T, beta: float, threshold: float) -> T:
    x = x * beta
    return sigmoid_grad(h * g, torch.sigmoid(x)) * (x < threshold).to(h.dtype) * beta


@gradient("SoftplusBackward", second=softplus_second)
def _softplus_grad(g: T, x: T, beta: float, threshold: float) -> T:
    return times_slope(g, _softplus_slope, x, beta, threshold)


def _softplus_slope(x: T, beta: float, threshold: float) -> T:
    x = x if beta == 1 else x * number(beta, x)
    s = torch.sigmoid(x)
    if threshold > 0 and math.exp(-threshold) < torch.finfo(x.dtype).eps / 4:
        return s  # it is 1 from there on anyway
    return selected(above(x, threshold), 1, s)


def softplus(input: T, beta: float = 1, threshold: float = 20) -> T:
    """log(1 + exp(beta x)) / beta, x where beta x > threshold.

    See `nnmirror.rules.activation.Softplus`.
    """
    return record(Softplus, (input, beta, threshold))[0]


@rule(torch._C._nn.hardsigmoid)
class Hardsigmoid(Rule):
    """y = x / 6 + 1/2 clipped to [0, 1]:  dx = g / 6 where -3 < x < 3, else 0.  Saved: x.

    Its second derivative is zero, but raises an error, as in PyTorch.
    """

    infer = staticmethod(torch._C._nn.hardsigmoid)

    @staticmethod
    def forward(input: T) -> T:
        return torch._C._nn.hardsigmoid(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return _hardsigmoid_grad(g, input)


def _no_second(*args: T) -> T:
    raise RuntimeError("derivative for aten::hardsigmoid_backward is not implemented")


@gradient("HardsigmoidBackward", second=_no_second, of_grad=_no_second)
def _hardsigmoid_grad(g: T, x: T) -> T:
    return laid_out_as(_sixth_between(g, x), g)


def _sixth_between(g: T, x: T) -> T:
    dx = widened(kept(g, between(x, -3, 3)))
    return dx.mul_(_SIXTH).to(g.dtype)


_SIXTH = torch.tensor(
    1 / 6, dtype=torch.float32, device="cpu"
).item()  # in the kernel, whatever x is


HardsigmoidInplace = _into(Hardsigmoid, torch._C._nn.hardsigmoid_)


def hardsigmoid(input: T, inplace: bool = False) -> T:
    """x / 6 + 1/2 clipped to [0, 1]; see `nnmirror.rules.activation.Hardsigmoid`."""
    function = HardsigmoidInplace if inplace else Hardsigmoid
    return record(function, (input,))[0]


@rule(torch._C._nn.hardswish)
class Hardswish(Rule):
    """y = x hardsigmoid(x):  dx = g (x / 3 + 1/2) where -3 < x < 3, 0 below, g above

    ddx = h g / 3 where -3 < x < 3, else 0.  Saved: x.
    Howard et al., 2019 (arXiv:1905.02244).
    """

    infer = staticmethod(torch._C._nn.hardswish)

    @staticmethod
    def forward(input: T) -> T:
        return torch._C._nn.hardswish(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        return _hardswish_grad(g, input)


def hardswish_second(h: T, g: T, x: T) -> T:
    return torch.where((x > -3) & (x < 3), h * g / 3, zero(h))


@gradient("HardswishBackward", second=hardswish_second)
def _hardswish_grad(g: T, x: T) -> T:
    return times_slope(g, _hardswish_slope, x)


def _hardswish_slope(x: T) -> T:
    third = torch.threshold(x, -3, -1.5).div_(-3)  # -x / 3; 1/2 up to -3
    return torch.sub(number(0.5, x), torch.threshold_(third, -1, -0.5), out=third)


HardswishInplace = _into(Hardswish, torch._C._nn.hardswish_)


def hardswish(input: T, inplace: bool = False) -> T:
    """x times `hardsigmoid(x)`; see `nnmirror.rules.activation.Hardswish`."""
    function = HardswishInplace if inplace else Hardswish
    return record(function, (input,))[0]


@rule(torch._C._nn.mish)
class Mish(Rule):
    """y = x t, t = tanh(log(1 + exp(x))):  dx = g (t + x s (1 - t^2)), s = sigmoid(x).  Saved: x.

    With r = 1 - s, t = s (1 + r) / (1 + r^2). With create_graph it is recorded as separate
    operations, as in PyTorch. Misra, 2019 (arXiv:1908.08681).
    """

    infer = staticmethod(torch._C._nn.mish)

    @staticmethod
    def forward(input: T) -> T:
        return torch._C._nn.mish(input)

    @staticmethod
    def d_input(g: T, input: T) -> T:
        if is_torch_function_enabled():
            s, t = torch.sigmoid(input), input.exp().log1p().tanh()
            return g * (t + input * s * (1 - t * t))
        return times_slope(g, _mish_slope, input)


def _mish_slope(x: T) -> T:
    one = number(1, x)
    s = torch.sigmoid(x)
    r = one - s
    t = torch.addcmul(s, s, r).div_(torch.addcmul(one, r, r, out=r))
    return torch.addcmul(t, torch.addcmul(one, t, t, value=-1, out=r), s.mul_(x), out=t)


MishInplace = _into(Mish, torch._C._nn.mish_)


def mish(input: T, inplace: bool = False) -> T:
    """x tanh(log(1 + exp(x))); see `nnmirror.rules.activation.Mish`."""
    return record(MishInplace if inplace else Mish, (input,))[0]


@rule(torch.threshold)
class Threshold(Rule):
    """y = x where x > t, else v:  dx = g where x > t, or is NaN, else 0;  ddx = 0.  Saved: x."""

    infer = staticmethod(torch.threshold)

    @staticmethod
    def forward(input: T, threshold: Number, value: Number) -> T:
        return torch.threshold(input, threshold, value)

    @staticmethod
    def d_input(g: T, input: T, threshold: float) -> T:
        return _threshold_grad(g, input, threshold)


@gradient("ThresholdBackward")
def _threshold_grad(g: T, x: T, threshold: float) -> T:
    # With the strides of x, as for ReLU.
    return laid_out_as(_kept_above(g, x, threshold), x)


def _kept_above(g: T, x: T, threshold: float) -> T:
    x = widened(x)
    return kept(g, differs(x, x.clamp(max=threshold)).to(g.dtype))


ThresholdInplace = _into(Threshold, torch.threshold_, 1)


def threshold(input: T, threshold: float, value: float, inplace: bool = False) -> T:
    """x where x > threshold, else value; see `nnmirror.rules.activation.Threshold`."""
    function = ThresholdInplace if inplace else Threshold
    return record(function, (input, threshold, value))[0]


def threshold_(input: T, threshold: float, value: float) -> T:
    """`threshold(input, threshold, value, inplace=True)`"""
    return record(ThresholdInplace, (input, threshold, value))[0]


@rule(torch.hardshrink, T.hardshrink)
class Hardshrink(Rule):
    """y = x where |x| > l, else 0:  dx = g there, else 0;  ddx = 0.  Saved: x."""

    infer: TorchFunction = staticmethod(torch.hardshrink)

    @staticmethod
    def forward(input: T, lambd: Number = 0.5) -> T:
        return torch.hardshrink(input, lambd)

    @staticmethod
    def d_input(g: T, input: T, lambd: float) -> T:
        return _hardshrink_grad(g, input, lambd)


def _shrink_grad(g: T, x: T, bound: float) -> T:
    return laid_out_as(_kept_beyond(g, x, bound), g)


_hardshrink_grad = gradient("HardshrinkBackward")(_shrink_grad)
_softshrink_grad = gradient("SoftshrinkBackward")(_shrink_grad)


def _kept_beyond(g: T, x: T, bound: float) -> T:
    if bound < 0:  # no number is within
        return g.clone()
    return kept(g, differs(x, x.clamp(-bound, bound)))


def hardshrink(input: T, lambd: float = 0.5) -> T:
    """x where |x| > lambd, else 0; see `nnmirror.rules.activation.Hardshrink`."""
    return record(Hardshrink, (input, lambd))[0]


@rule(torch._C._nn.softshrink)
class Softshrink(Hardshrink):
    """y = x - l sign(x) where |x| > l, else 0:  dx = g there, else 0;  ddx = 0.  Saved: x."""

    infer = staticmethod(torch._C._nn.softshrink)

    @staticmethod
    def forward(input: T, lambd: Number = 0.5) -> T:
        return torch._C._nn.softshrink(input, lambd)

    @staticmethod
    def d_input(g: T, input: T, lambd: float) -> T:
        return _softshrink_grad(g, input, lambd)


def softshrink(input: T, lambd: float = 0.5) -> T:
    """x nearer to 0 by lambd, 0 within it; see `nnmirror.rules.activation.Softshrink`."""
    return record(Softshrink, (input, lambd))[0]


@generated
def softsign(input: T) -> T:
    """x / (|x| + 1):  dx = g / (|x| + 1) - g x / (|x| + 1)^2 sign(x)"""
    if not isinstance(input, T):
        return input / (input.abs() + 1)
    return record(Div, (input, record(Abs, (input,))[0] + 1))[0]


@generated
def tanhshrink(input: T) -> T:
    """x - tanh(x):  dx = g - g (1 - tanh(x)^2)"""
    if not isinstance(input, T):
        return input - input.tanh()
    return record(Sub, (input, record(Tanh, (input,))[0]))[0]


@rule(torch._C._nn.glu)
class Glu(Rule):
    """y = a s, s = sigmoid(b), a and b the halves of x along dim:  da = g s,  db = g a (1 - s) s

    With s1 = s (1 - s), and h = (u, v) that of (da, db), by h g gets u s + v a s1, and
    dda = v g s1,  ddb = v a g (s1 (1 - s) - s s1) + u g s1.
    Saved: x.  Dauphin et al., 2017 (arXiv:1612.08083).
    """

    infer = staticmethod(torch._C._nn.glu)

    @staticmethod
    def forward(input: T, dim: int = -1) -> T:
        return torch._C._nn.glu(input, dim)

    @staticmethod
    def d_input(g: T, input: T, dim: int) -> T:
        return _glu_grad(g, input, dim)


def _glu_of_grad(h: T, x: T, dim: int) -> T:
    one = torch.ones_like(x.detach().chunk(2, dim)[0])
    u, v = (h * _glu_grad(one, x, dim)).chunk(2, dim)
    return u + v


def _glu_second(h: T, g: T, x: T, dim: int) -> T:
    a, b = x.chunk(2, dim)
    s = torch.sigmoid(b)
    rest = 1 - s
    s1 = s * rest
    u, v = h.chunk(2, dim)
    va = v * a
    dda = v * g * s1
    second = s * s1
    second = s1 * rest - second
    of_u = u * g * s1
    return torch.cat([dda, va * g * second + of_u], dim)


@gradient("GluBackward", second=_glu_second, of_grad=_glu_of_grad)
def _glu_grad(g: T, x: T, dim: int) -> T:
    a, b = x.chunk(2, dim)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    da, db = dx.chunk(2, dim)
    s = torch.sigmoid(b, out=da)
    if g.dtype.itemsize == 2:  # the kernel computes this one in float32 and rounds once
        wide = s.float()
        db.copy_((1 - wide) * wide * a.float() * g.float())
    else:
        torch.mul((1 - s).mul_(s).mul_(a), g, out=db)
    s.mul_(g)
    return dx


@generated
def glu(input: T, dim: int = -1) -> T:
    """One half of x along dim times the sigmoid of the other.

    See `nnmirror.rules.activation.Glu`.
    """
    if input.dim() == 0:
        raise RuntimeError("glu does not support scalars because halving size must be even")
    return record(Glu, (input, dim))[0]
