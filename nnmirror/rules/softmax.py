"""Softmax, its logarithm and softplus.

    y = softmax(x):      dx = (g - s) y,       s = sum of g y along dim
    l = log_softmax(x):  dx = g - exp(l) s,    s = sum of g along dim

float16 and bfloat16 are computed in float32, as PyTorch's kernels do. In exact mode s is added up
and rounded as they do it, too (see `nnmirror.exact.softmax`).
"""

import math
from typing import Any

import torch

from .._types import Dims, TorchFunction
from ..tape import record
from . import shape
from .pointwise import above, number, selected, times_slope
from .registry import Rule, composite, rule, unplaced

T = torch.Tensor


class Softmax(Rule):
    """y = exp(x) / sum of exp(x) along dim:  dx = (g - sum of g y) y.  Saved: y."""

    public: TorchFunction = staticmethod(T.softmax)

    @staticmethod
    def forward(input: T, dim: int) -> T:
        return T.softmax(input, dim)

    @staticmethod
    def d_input(g: T, result: T, dim: int) -> T:
        if result.dtype.itemsize == 2:
            return Softmax.d_input(g.float(), result.float(), dim).to(result.dtype)
        dx = result * g
        return torch.sub(g, dx.sum(dim, keepdim=True), out=dx).mul_(result)


class LogSoftmax(Rule):
    """l = x - log of the sum of exp(x) along dim:  dx = g - exp(l) sum of g.  Saved: l."""

    public = staticmethod(T.log_softmax)

    @staticmethod
    def forward(input: T, dim: int) -> T:
        return T.log_softmax(input, dim)

    @staticmethod
    def d_input(g: T, result: T, dim: int) -> T:
        if result.dtype.itemsize == 2:
            return LogSoftmax.d_input(g.float(), result.float(), dim).to(result.dtype)
        dx = result.exp()
        return torch.addcmul(g, dx, g.sum(dim, keepdim=True), value=-1, out=dx)


@composite(T.softmax)
def softmax(
    input: T, dim: Dims = None, dtype: torch.dtype | None = None, axis: int | None = None
) -> T:
    dim = axis if dim is None else dim
    return record(Softmax, (input if dtype is None else shape.to(input, dtype), dim))[0]


@composite(T.log_softmax)
def log_softmax(
    input: T, dim: Dims = None, dtype: torch.dtype | None = None, axis: int | None = None
) -> T:
    dim = axis if dim is None else dim
    return record(LogSoftmax, (input if dtype is None else shape.to(input, dtype), dim))[0]


def _as_function(func: TorchFunction, method: TorchFunction) -> None:
    """torch.softmax(x, dim): as the method, but the errors count the arguments differently."""

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
    """z = log(1 + exp(b x)) / b, x where b x > t:  dx = g sigmoid(b x), g there.  Saved: x."""

    @staticmethod
    def forward(input: T, beta: float = 1.0, threshold: float = 20.0) -> T:
        return torch._C._nn.softplus(input, beta, threshold)

    @staticmethod
    def d_input(g: T, input: T, beta: float, threshold: float) -> T:
        return times_slope(g, _softplus_slope, input, beta, threshold)


def _softplus_slope(x: T, beta: float, threshold: float) -> T:
    x = x if beta == 1 else x * number(beta, x)
    s = torch.sigmoid(x)
    if threshold > 0 and math.exp(-threshold) < torch.finfo(x.dtype).eps / 4:
        return s  # 1 from there on anyway
    return selected(above(x, threshold), 1, s)
