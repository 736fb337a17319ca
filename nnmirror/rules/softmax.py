"""Softmax and its logarithm.

    y = softmax(x):      dx = (g - s) y,       s = sum of g y along dim
    l = log_softmax(x):  dx = g - exp(l) s,    s = sum of g along dim

float16 and bfloat16 are computed in float32, as PyTorch's kernels do. In exact mode s is summed and
rounded as by PyTorch, too (see `nnmirror.exact.softmax`).
"""

import torch

from .._types import Dims, TorchFunction
from ..tape import record
from . import shape
from .gradient import gradient
from .registry import Rule, composite, unplaced

T = torch.Tensor


class Softmax(Rule):
    """y = exp(x) / sum of exp(x) along dim:  dx = (g - sum of g y) y.  Saved: y.

    For h, the gradient of dx, y gets g h - (sum of y g) h - g (sum of y h).
    """

    public: TorchFunction = staticmethod(T.softmax)

    @staticmethod
    def forward(input: T, dim: int) -> T:
        return T.softmax(input, dim)

    @staticmethod
    def d_input(g: T, result: T, dim: int) -> T:
        return _softmax_grad(g, result, dim)


def softmax_second(h: T, g: T, y: T, dim: int) -> T:
    of_h = g * (y * h).sum(
        dim, True
    )  # first, as in PyTorch's C++ code: third derivatives are summed in this order
    of_g = (y * g).sum(dim, True) * h
    return g * h - of_g - of_h


@gradient("SoftmaxBackwardData", second=softmax_second)
def _softmax_grad(g: T, y: T, dim: int) -> T:
    if y.dtype.itemsize == 2:
        return _softmax_grad(g.float(), y.float(), dim).to(y.dtype)
    dx = y * g
    return torch.sub(g, dx.sum(dim, keepdim=True), out=dx).mul_(y)


class LogSoftmax(Rule):
    """l = x - log of the sum of exp(x) along dim:  dx = g - exp(l) sum of g.  Saved: l.

    For h, the gradient of dx, g gets h - sum of h exp(l), and l gets -(sum of g) exp(l) h.
    """

    public = staticmethod(T.log_softmax)

    @staticmethod
    def forward(input: T, dim: int) -> T:
        return T.log_softmax(input, dim)

    @staticmethod
    def d_input(g: T, result: T, dim: int) -> T:
        return _log_softmax_grad(g, result, dim)


def log_softmax_of_grad(h: T, y: T, dim: int) -> T:
    return h - (h * y.exp()).sum(dim, True)


def log_softmax_second(h: T, g: T, y: T, dim: int) -> T:
    return -g.sum(dim, True) * y.exp() * h


@gradient("LogSoftmaxBackwardData", second=log_softmax_second, of_grad=log_softmax_of_grad)
def _log_softmax_grad(g: T, y: T, dim: int) -> T:
    if y.dtype.itemsize == 2:
        return _log_softmax_grad(g.float(), y.float(), dim).to(y.dtype)
    dx = y.exp()
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
    """torch.softmax(x, dim): like the method, but its errors count the arguments differently."""

    def call(input: T, *args: object, **kwargs: object) -> T:
        try:
            return method(input, *args, **kwargs)
        except TypeError:
            raise unplaced(func, (input, *args), kwargs) from None

    composite(func)(call)


_as_function(torch.softmax, softmax)
_as_function(torch.special.softmax, softmax)
_as_function(torch.log_softmax, log_softmax)
_as_function(torch.special.log_softmax, log_softmax)
