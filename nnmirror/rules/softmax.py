"""Softmax, its logarithm and softplus, rounded as PyTorch's kernels round them.

    y = softmax(x):      dx = (g - s) y,       s = sum of g y along dim
    l = log_softmax(x):  dx = g - exp(l) s,    s = sum of g along dim

The formulas are two lines; what surrounds them is how the CPU kernels add s up and round.
Along the last dimension they keep one partial sum per lane of a vector register; along any
other they add row after row, as fused multiply-adds, which is what `torch.addcmul` does.
float16 and bfloat16 are computed in float32. Measured with every instruction set that
PyTorch can be told to use; on another device than the CPU the plain formula is used, and
may round otherwise.
"""

from typing import Any

import torch

from ..tape import record
from . import shape
from .kernel import alone, in_turn, laid_out_as, lanes, scalar_exp, vector_exp, widened
from .registry import Rule, composite, rule, unplaced

T = torch.Tensor


def lane_sum(x: T, narrow: bool, times: T | None = None) -> T:
    """The sum of x (or of x times another) along its last dimension, added up lane by lane.

    What does not fill a register is added last, to the first lanes. In float32 the product is
    then not rounded by itself where the kernel has one thread, or one row, to run over: the
    compiler makes another loop of that case.
    """
    n, width = x.shape[-1], lanes(x)
    if narrow:
        width *= 2  # a register of 16-bit numbers fills two of 32-bit ones
    terms = x if times is None else x * times
    half = width // 2 if narrow else width
    if n <= half and n < width:
        return in_turn(terms, n)
    total, end = terms[..., :width], max(n - n % width, width)
    for start in range(width, end, width):
        total = total + terms[..., start : start + width]
    rest = n - end
    if rest > 0:
        low = total[..., :rest]
        many = torch.get_num_threads() > 1 and x.numel() > n
        if times is None or many or narrow or x.dtype is torch.float64:
            low = low + terms[..., end:]
        else:
            low = torch.addcmul(low, x[..., end:], times[..., end:])
        total = torch.cat([low, total[..., rest:]], -1)
    if narrow:
        low, high = total[..., :half], total[..., half:]
        rest = high.shape[-1]
        total = torch.cat([low[..., :rest] + high, low[..., rest:]], -1)
    plainly = torch.backends.cpu.get_cpu_capability() == "DEFAULT" or x.dtype is torch.float64
    if plainly or n < width:
        return in_turn(total, half)
    while half > 1:
        half //= 2
        total = total[..., :half] + total[..., half : 2 * half]
    return total[..., 0]


class _AlongDim(Rule):
    """What the two have in common: y is saved, and dx is contiguous, whatever g is."""

    function: Any  # of torch.Tensor

    @staticmethod
    def plain(g: T, y: T, dim: int) -> T:
        """dx by the formula, however it rounds."""
        raise NotImplementedError

    @staticmethod
    def rounded(g: T, y: T, dim: int, narrow: bool) -> T:
        """dx as the CPU kernels round it; `narrow` where they convert from 16 bits."""
        raise NotImplementedError

    @staticmethod
    def forward(ctx: Any, input: T, dim: int) -> T:
        y = ctx.function.function(input, dim)
        ctx.dim = dim % input.dim() if input.dim() else 0
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[T, None]:
        y, dim, dtype = ctx.saved(0), ctx.dim, g.dtype
        if y.numel() == 0 or not y.is_cpu:
            dx = ctx.function.plain(*widened(g.contiguous(), y), dim)
            return dx.to(dtype).reshape(y.shape), None
        dx = ctx.function.rounded(*widened(g.contiguous(), y), dim, dtype.itemsize == 2)
        return dx.to(dtype).reshape(y.shape), None


class Softmax(_AlongDim):
    """y = exp(x) / sum of exp(x) along dim:  dx = (g - sum of g y) y"""

    function = public = staticmethod(T.softmax)

    @staticmethod
    def plain(g: T, y: T, dim: int) -> T:
        return (g - (g * y).sum(dim, keepdim=True)) * y

    @staticmethod
    def rounded(g: T, y: T, dim: int, narrow: bool) -> T:
        if dim == y.dim() - 1:
            s = lane_sum(g, narrow, y)
        else:
            s = torch.zeros_like(g.select(dim, 0))
            for i in range(g.shape[dim]):
                s = torch.addcmul(s, g.select(dim, i), y.select(dim, i))
        return (g - s.unsqueeze(dim)) * y


class LogSoftmax(_AlongDim):
    """l = x - log of the sum of exp(x) along dim:  dx = g - exp(l) sum of g"""

    function = public = staticmethod(T.log_softmax)

    @staticmethod
    def plain(g: T, y: T, dim: int) -> T:
        return g - y.exp() * g.sum(dim, keepdim=True)

    @staticmethod
    def rounded(g: T, y: T, dim: int, narrow: bool) -> T:
        if dim == y.dim() - 1:
            s, e = lane_sum(g, narrow), vector_exp(y)
        else:
            s = in_turn(g.movedim(dim, -1), g.shape[dim])
            # Whole registers of what lies behind dim go through the vectorised exp.
            inner = y.flatten(dim + 1)
            whole = inner.shape[-1] - inner.shape[-1] % (lanes(y) * (1 + narrow))
            e = torch.cat([vector_exp(inner[..., :whole]), scalar_exp(inner[..., whole:])], -1)
            e = e.reshape(y.shape)
        return torch.addcmul(g, e, s.unsqueeze(dim).expand_as(g), value=-1)


@composite(T.softmax)
def softmax(input: T, dim: Any = None, dtype: torch.dtype | None = None, axis: Any = None) -> T:
    dim = axis if dim is None else dim
    return record(Softmax, (input if dtype is None else shape.to(input, dtype), dim))[0]


@composite(T.log_softmax)
def log_softmax(input: T, dim: Any = None, dtype: torch.dtype | None = None, axis: Any = None) -> T:
    dim = axis if dim is None else dim
    return record(LogSoftmax, (input if dtype is None else shape.to(input, dtype), dim))[0]


def _as_function(func: Any, method: Any) -> None:
    """torch.softmax(x, dim): as the method, but its errors count the arguments otherwise."""

    def call(input: T, *args: Any, **kwargs: Any) -> T:
        try:
            return method(input, *args, **kwargs)
        except TypeError:
            raise unplaced(func, (input, *args), kwargs) from None

    composite(func)(call)


_as_function(torch.softmax, softmax)
_as_function(torch.special.softmax, softmax)
_as_function(torch.log_softmax, log_softmax)
_as_function(torch.special.log_softmax, log_softmax)


@rule(torch._C._nn.softplus)
class Softplus(Rule):
    """z = log(1 + e) / b, x where b x > t:  dx = g e / (e + 1), g there;  e = exp(b x)

    The one rule here that does not always give PyTorch's bits: where b x > 0 its kernel rounds
    exp otherwise than any tensor operation, and about one gradient in thirty is off in its
    last place.
    """

    @staticmethod
    def forward(ctx: Any, input: T, beta: float = 1.0, threshold: float = 20.0) -> T:
        z = torch._C._nn.softplus(input, beta, threshold)
        ctx.how = beta, threshold
        ctx.save_for_backward(input)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        beta, threshold = ctx.how
        dtype = g.dtype
        shape = g.shape
        wide, x = widened(g, ctx.saved(0))
        x = x * beta
        e = torch.where(x < 0, vector_exp(x), alone(torch.exp, x))
        dx = torch.where(x > threshold, wide, wide * e / (e + 1.0))
        return laid_out_as(dx.to(dtype).reshape(shape), g), None, None
