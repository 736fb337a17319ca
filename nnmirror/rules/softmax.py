"""Softmax and its logarithm.

    y = softmax(x):      dx = (g - s) y,       s = sum of g y along dim
    l = log_softmax(x):  dx = g - exp(l) s,    s = sum of g along dim

float16 and bfloat16 are computed in float32, as PyTorch's kernels do. In exact mode s is summed and
rounded as by PyTorch, too (see `nnmirror.exact.softmax`).
"""

import warnings

import torch

from .._torch import DisableTorchFunctionSubclass
from .._types import Dims, TorchFunction
from ..fast.composed import generated
from ..overrides import overridable
from ..tape import record
from . import shape
from .arithmetic import Add, Div, Neg
from .gradient import gradient
from .registry import Rule, composite, unplaced

__all__ = ["gumbel_softmax", "log_softmax", "softmax", "softmin"]

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


@composite(T.softmax, repeats=True)
def softmax_method(
    input: T, dim: Dims = None, dtype: torch.dtype | None = None, axis: int | None = None
) -> T:
    dim = axis if dim is None else dim
    return record(Softmax, (input if dtype is None else shape.to(input, dtype), dim))[0]


@composite(T.log_softmax, repeats=True)
def log_softmax_method(
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


_as_function(torch.softmax, softmax_method)
_as_function(torch.special.softmax, softmax_method)
_as_function(torch.log_softmax, log_softmax_method)
_as_function(torch.special.log_softmax, log_softmax_method)


def softmax(
    input: T, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> T:
    """exp(x) over its sum along dim, in `dtype` if given; see `nnmirror.rules.softmax.Softmax`."""
    if dim is None:
        dim = implicit_dim("softmax", input, _stacklevel)
    if not isinstance(input, T):
        return input.softmax(dim)
    return softmax_method(input, dim, dtype)


def log_softmax(
    input: T, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> T:
    """The logarithm of the softmax along dim; see `nnmirror.rules.softmax.LogSoftmax`."""
    if dim is None:
        dim = implicit_dim("log_softmax", input, _stacklevel)
    if not isinstance(input, T):
        return input.log_softmax(dim)
    return log_softmax_method(input, dim, dtype)


@generated
def softmin(
    input: T, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> T:
    """`softmax` of -x"""
    if dim is None:
        dim = implicit_dim("softmin", input, _stacklevel + 1)
    return softmax_method(record(Neg, (input,))[0], dim, dtype)


@overridable
def gumbel_softmax(
    logits: T, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> T:
    """softmax((x + n) / tau) along dim, n drawn from Gumbel's law

    With `hard`, one where that is the largest and zero elsewhere, with the same gradient.
    Jang et al., 2016 (arXiv:1611.01144).
    """
    if eps != 1e-10:
        warnings.warn("`eps` parameter is deprecated and has no effect.", stacklevel=3)
    with DisableTorchFunctionSubclass(), torch.no_grad():
        drawn = torch.empty_like(logits, memory_format=torch.legacy_contiguous_format)
        drawn = -drawn.detach().exponential_().log()
    noisy = record(Div, (record(Add, (logits, drawn))[0], tau))[0]
    soft = softmax_method(noisy, dim)
    if not hard:
        return soft
    with DisableTorchFunctionSubclass(), torch.no_grad():
        plain = soft.detach()
        one_hot = torch.zeros_like(plain, memory_format=torch.legacy_contiguous_format)
        one_hot = one_hot.scatter_(dim, plain.max(dim, keepdim=True)[1], 1.0) - plain
    return record(Add, (one_hot, soft))[0]


def implicit_dim(name: str, input: T, stacklevel: int) -> int:
    warnings.warn(
        f"Implicit dimension choice for {name} has been deprecated. Change the call to include"
        " dim=X as an argument.",
        stacklevel=stacklevel,
    )
    return 0 if input.dim() in (0, 1, 3) else 1
