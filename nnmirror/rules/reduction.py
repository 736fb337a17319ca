"""Sums, means and other reductions."""

from collections.abc import Sequence
from typing import Any

import torch

from .._torch import is_torch_function_enabled
from .._types import Dims, Number, TorchFunction
from ..tape import record
from .registry import Rule, composite, inplace, refusal, rule, unplaced

T = torch.Tensor


def _dims(dim: Dims, ndim: int) -> list[int]:
    """The reduced dimensions, counted from the front, in order; all of them for none given."""
    given = [dim] if isinstance(dim, int) else [] if dim is None else list(dim)
    return sorted(d % ndim for d in given) if given and ndim else list(range(ndim))


def unsqueezed(g: T, shape: Sequence[int], dim: Dims, keepdim: bool) -> T:
    """g with the dimensions that a reduction over `dim` removed."""
    if not keepdim and len(shape):
        for d in _dims(dim, len(shape)):
            g = g.unsqueeze(d)
    return g


def expand_back(g: T, shape: Sequence[int], dim: Dims, keepdim: bool) -> T:
    """The gradient of a sum over `dim`: g repeated along it, without copying."""
    return unsqueezed(g, shape, dim, keepdim).expand(shape)


@rule(torch.sum, T.sum)
class Sum(Rule):
    """z = sum of x, over `dim` or all:  dx = g, repeated"""

    @staticmethod
    def forward(
        input: T, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None
    ) -> T:
        given = (input,) if dim is None and not keepdim else (input, dim, keepdim)
        return torch.sum(*given) if dtype is None else torch.sum(*given, dtype=dtype)

    @classmethod
    def label_of(
        cls, input: T, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None
    ) -> str:
        return "" if dim is None and not keepdim else "SumBackward1"

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, dim: Dims, keepdim: bool) -> T:
        return g.expand(input_shape) if dim is None else expand_back(g, input_shape, dim, keepdim)


@composite(T.sum_to_size, repeats=True)
def sum_to_size(input: T, *size: Any) -> T:
    """The sum over the dimensions that broadcasting from `size` would make or repeat."""
    sizes = size[0] if len(size) == 1 and isinstance(size[0], tuple | list) else size
    if not size or not all(isinstance(n, int) for n in sizes):
        raise unplaced(T.sum_to_size, (input, *size), {})
    shape = torch.Size(sizes)
    torch.Tensor.sum_to_size(input.detach(), shape)  # PyTorch's error
    lead = input.dim() - len(shape)
    over = [d for d in range(input.dim()) if d < lead or shape[d - lead] == 1 != input.shape[d]]
    if over:
        input = record(Sum, (input, over, True))[0]
    return input.view(shape) if lead else input


@rule(torch.mean, T.mean)
class Mean(Rule):
    """z = sum of x / n, over `dim` or all:  dx = g / n, repeated"""

    @staticmethod
    def forward(
        input: T, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None
    ) -> T:
        given = (input,) if dim is None and not keepdim else (input, dim, keepdim)
        return torch.mean(*given) if dtype is None else torch.mean(*given, dtype=dtype)

    @classmethod
    def label_of(
        cls, input: T, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None
    ) -> str:
        return "" if dim is None and not keepdim else "MeanBackward1"

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, dim: Dims, keepdim: bool) -> T:
        if dim is None:
            return g.expand(input_shape) / input_shape.numel()
        return expand_back(g, input_shape, dim, keepdim) / _count(input_shape, dim)


def _count(shape: Sequence[int], dim: Dims) -> int:
    """How many elements are reduced to one."""
    n = 1
    for d in _dims(dim, len(shape)) if len(shape) else ():
        n *= shape[d]
    return n


def _of_one_dtype(func: TorchFunction, x: T, dtype: torch.dtype | None) -> None:
    """PyTorch rounds these gradients differently where the result has another dtype."""
    if dtype is not None and dtype is not x.dtype:
        raise refusal(func, "for another dtype")


def var_grad(g: T, x: T, dim: Dims, correction: float, keepdim: bool) -> T:
    if dim == ():  # PyTorch's gradient counts one element here, for any number of reduced ones
        freedom = 1 - correction
        return (2.0 / freedom if freedom else float("inf")) * g * (x - x.mean())
    freedom = _count(x.shape, dim) - correction
    g = unsqueezed(g, x.shape, dim, keepdim)
    if dim is None or not len(x.shape):
        if freedom <= 0:
            nan, inf = (
                torch.tensor(v, dtype=x.dtype, device=x.device)
                for v in (float("nan"), float("inf"))
            )
            return g * torch.where(x == x.mean(), nan, inf)
        return (2.0 / freedom) * g * (x - x.mean())
    scale = 2.0 / freedom if freedom else float("inf")
    return scale * g * (x - x.mean(dim, keepdim=True))


def std_grad(g: T, x: T, z: T, dim: Dims, correction: float, keepdim: bool) -> T:
    return var_grad((g / (z * 2)).masked_fill(z == 0, 0), x, dim, correction, keepdim)


class Var(Rule):
    """z = sum of (x - mean)^2 / (n - c) over dim:  dx = 2 / (n - c) g (x - mean)"""

    @staticmethod
    def forward(input: T, dim: Dims, correction: Number, keepdim: bool) -> T:
        return torch.var(input, dim, correction=correction, keepdim=keepdim)

    @staticmethod
    def d_input(g: T, input: T, dim: Dims, correction: Number, keepdim: bool) -> T:
        return var_grad(g, input, dim, correction, keepdim)


class Std(Rule):
    """z = sqrt(var(x)):  dx = the gradient of var for g / (2 z), which is 0 where z is 0"""

    @staticmethod
    def forward(input: T, dim: Dims, correction: Number, keepdim: bool) -> T:
        return torch.std(input, dim, correction=correction, keepdim=keepdim)

    @staticmethod
    def d_input(g: T, input: T, result: T, dim: Dims, correction: Number, keepdim: bool) -> T:
        return std_grad(g, input, result, dim, correction, keepdim)


def _spread(function: type[Rule], *funcs: TorchFunction) -> None:
    """The ways to call var and std: with `unbiased` or with `correction`."""

    def call(input: T, *args: object, **kwargs: Any) -> T:
        func, given = funcs[0], dict(kwargs)
        places = list(args)
        if "axis" in given:
            given["dim"] = given.pop("axis")
        if "keepdims" in given:
            given["keepdim"] = given.pop("keepdims")
        if places and isinstance(places[0], bool):
            given["unbiased"] = places.pop(0)
        elif places:
            given["dim"] = places.pop(0)
            for name in ("unbiased", "keepdim"):
                if places:
                    given[name] = places.pop(0)
        unbiased = given.pop("unbiased", None)
        correction = given.pop("correction", None)
        if places or set(given) - {"dim", "keepdim"} or None not in (unbiased, correction):
            raise unplaced(func, (input, *args), kwargs)
        if correction is None:
            correction = 1 if unbiased is None else int(unbiased)
        dim = given.get("dim")
        dim = () if dim == [] else dim
        return record(function, (input, dim, correction, given.get("keepdim", False)))[0]

    composite(*funcs, repeats=True)(call)


_spread(Var, torch.var, T.var)
_spread(Std, torch.std, T.std)


class LinalgVectorNorm(Rule):
    """z = (sum of |x|^p)^(1/p) over dim:  dx = g sign(x) (|x| / z)^(p - 1), and 0 where z is 0"""

    @staticmethod
    def forward(input: T, ord: Number, dim: Dims, keepdim: bool, dtype: torch.dtype | None) -> T:
        return torch.linalg.vector_norm(input, ord, dim, keepdim, dtype=dtype)

    @staticmethod
    def d_input(g: T, input: T, result: T, ord: Number, dim: Dims, keepdim: bool) -> T | None:
        return norm_grad(g, input, result, float(ord), dim, keepdim)


def norm_grad(g: T, x: T, z: T, p: float, dim: Dims, keepdim: bool) -> T | None:
    """The gradient of z, the p-norm of x over dim."""
    g, z = (unsqueezed(t, x.shape, dim, keepdim) for t in (g, z))
    if p == 0:
        return None  # PyTorch gives none either
    elif p == 1:
        dx = x.sgn() * g
    elif p == 2:
        dx = g * (x / z).masked_fill(z == 0, 0)
    elif p in (float("inf"), float("-inf")):
        size = x.abs()
        largest = (size == z).logical_or(size.isnan())
        count = largest.sum(_dims(dim, x.dim()) if x.dim() else (), keepdim=True)
        dx = x.sgn() * (g / count * largest)
    elif p < 1:
        powers = x.sgn() * x.abs().pow(p - 1).masked_fill(x == 0, 0)
        dx = powers * g * z.pow(1 - p)
    elif p < 2:
        powers = x.sgn() * x.abs().pow(p - 1)
        dx = powers * (g / z.pow(p - 1)).masked_fill(z == 0, 0)
    else:
        powers = x * x.abs().pow(p - 2)
        dx = powers * (g / z.pow(p - 1)).masked_fill(z == 0, 0)
    return dx


@composite(torch.linalg.vector_norm, repeats=True)
def vector_norm(
    x: T,
    ord: Number = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> T:
    _of_one_dtype(torch.linalg.vector_norm, x, dtype)
    return record(LinalgVectorNorm, (x, ord, dim, keepdim, dtype))[0]


@composite(torch.norm, T.norm, directly=True, repeats=True)
def norm(
    input: T,
    p: Number | str | None = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    out: T | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """The vector norm, as torch.norm computes every p but "nuc"."""
    matrix = p == "fro" and dim is not None and not isinstance(dim, int) and len(dim) > 2
    if out is not None or matrix or (isinstance(p, str) and p != "fro"):
        raise unplaced(torch.norm, (input, p, dim, keepdim, out, dtype), {})
    dim = [dim] if isinstance(dim, int) else dim
    ord = 2.0 if p is None or isinstance(p, str) else p
    return vector_norm(input, ord, dim, keepdim, dtype=dtype)


@rule(torch.logsumexp, T.logsumexp, torch.special.logsumexp)
class Logsumexp(Rule):
    """z = log of the sum of exp(x) over dim:  dx = g exp(x - z)"""

    @staticmethod
    def forward(input: T, dim: int | tuple[int, ...], keepdim: bool = False) -> T:
        return torch.logsumexp(input, dim, keepdim)

    @staticmethod
    def d_input(g: T, input: T, result: T, dim: Dims, keepdim: bool) -> T:
        g, z = (unsqueezed(t, input.shape, dim, keepdim) for t in (g, result))
        return g * (input - z).exp()


@rule(torch.prod, T.prod)
class Prod(Rule):
    """z = product of x over dim or all:  dx = g times the product of the others"""

    @staticmethod
    def forward(
        input: T, dim: int | None = None, keepdim: bool = False, dtype: torch.dtype | None = None
    ) -> T:
        _of_one_dtype(torch.prod, input, dtype)
        if dim is None:
            return torch.prod(input, dtype=dtype)
        return torch.prod(input, dim, keepdim, dtype=dtype)

    @classmethod
    def label_of(
        cls,
        input: T,
        dim: int | None = None,
        keepdim: bool = False,
        dtype: torch.dtype | None = None,
    ) -> str:
        return "" if dim is None else "ProdBackward1"

    @staticmethod
    def d_input(g: T, input: T, result: T, dim: int | None, keepdim: bool) -> T:
        x, z = input, result
        if x.dim() == 0:
            return g
        if dim is None:
            zeros = int((x == 0).sum())
            if zeros == 0:
                return g * (z / x)
            if zeros > 1 and not is_torch_function_enabled():  # recorded, it depends on x
                return torch.zeros_like(x)
            return _others(g, x.contiguous().view(-1), 0).view_as(x)
        g, z = (unsqueezed(t, x.shape, dim, keepdim) for t in (g, z))
        return _others(g, x, dim) if bool((x == 0).any()) else g * (z / x)


def _others(g: T, x: T, dim: int) -> T:
    """g times, for each element, the product of those before it and of those after it."""
    n = x.shape[dim]
    if n == 1:
        return g
    one = torch.ones_like(x.narrow(dim, 0, 1))
    before = torch.cat([one, x.narrow(dim, 0, n - 1)], dim).cumprod(dim)
    after = torch.cat([one, x.narrow(dim, 1, n - 1).flip(dim)], dim).cumprod(dim).flip(dim)
    return g * (before * after)


@inplace(T.cumsum_)
@rule(torch.cumsum, T.cumsum)
class Cumsum(Rule):
    """z_i = x_1 + ... + x_i along dim:  dx_i = g_i + ... + g_n"""

    @staticmethod
    def forward(input: T, dim: int, dtype: torch.dtype | None = None) -> T:
        _of_one_dtype(torch.cumsum, input, dtype)
        return torch.cumsum(input, dim, dtype=dtype)

    @staticmethod
    def d_input(g: T, dim: int) -> T:
        return g if g.numel() <= 1 or g.shape[dim] == 1 else _cumsum_back(g, dim)


@inplace(T.cumprod_)
@rule(torch.cumprod, T.cumprod)
class Cumprod(Rule):
    """z_i = x_1 ... x_i along dim:  dx_i = (g_i z_i + ... + g_n z_n) / x_i

    If some x is 0, that holds before the first 0; the 0 itself gets the same sum with 1 in its
    place, and the elements after it get 0.
    """

    @staticmethod
    def forward(input: T, dim: int, dtype: torch.dtype | None = None) -> T:
        _of_one_dtype(torch.cumprod, input, dtype)
        return torch.cumprod(input, dim, dtype=dtype)

    @staticmethod
    def d_input(g: T, input: T, result: T, dim: int) -> T:
        x, z = input, result
        if x.numel() <= 1 or x.shape[dim] == 1:
            return g
        w, zero = z * g, x == 0
        if not bool(zero.any()):
            return _cumsum_back(w, dim).div(x)
        if is_torch_function_enabled():  # recorded: below, x = 0 has no gradient
            return _term_by_term(g, x, dim)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        zeros = zero.cumsum(dim)
        before = zeros == 0
        head = _cumsum_back(w.masked_fill(~before, 0.0), dim).div_(x)
        dx.masked_scatter_(before, head.masked_select(before))
        after = zeros == 1
        first = after.max(dim, keepdim=True)[1]
        at_first = torch.zeros_like(after).scatter_(dim, first, True).logical_and_(after)
        after &= ~at_first
        products = x.masked_fill(~after, 1.0).cumprod(dim).mul_(g.masked_fill(zeros != 1, 0.0))
        leading = z.gather(dim, (first - 1).relu_()).masked_fill_(first == 0, 1.0)
        total = products.sum(dim, keepdim=True).mul_(leading)
        dx.masked_scatter_(at_first, total.expand_as(x).masked_select(at_first))
        return dx


def _term_by_term(g: T, x: T, dim: int) -> T:
    """dx_k = the sum of g_i times the product of x_1 ... x_i without x_k, over i >= k"""
    n, dx = x.shape[dim], []
    for k in range(n):
        others = torch.ones_like(x.narrow(dim, 0, 1))
        if k:
            others = x.narrow(dim, 0, k).prod(dim, True)
        if k + 1 < n:
            later = x.narrow(dim, k + 1, n - k - 1).cumprod(dim)
            others = torch.cat([others, others * later if k else later], dim)
        dx.append((g.narrow(dim, k, n - k) * others).sum(dim))
    return torch.stack(dx, dim)


def _cumsum_back(x: T, dim: int) -> T:
    """x_i + ... + x_n along dim"""
    return x.flip(dim).cumsum(dim).flip(dim)


@rule(torch.logcumsumexp, T.logcumsumexp)
class Logcumsumexp(Rule):
    """z_i = log(exp(x_1) + ... + exp(x_i)) along dim:  dx_i = sum of g_j exp(x_i - z_j), j >= i

    summed as logarithms, apart for the g_j above 0 and below.
    """

    @staticmethod
    def forward(input: T, dim: int) -> T:
        return torch.logcumsumexp(input, dim)

    @staticmethod
    def d_input(g: T, input: T, result: T, dim: int) -> T:
        if g.dim() == 0 or g.numel() == 0:
            return g
        least = torch.full_like(g, torch.finfo(g.dtype).min)
        size = g.abs().log()

        def part(chosen: T) -> T:
            logs = (torch.where(chosen, size, least) - result).flip(dim)
            return (logs.logcumsumexp(dim).flip(dim) + input).exp()

        return part(g > 0) - part(g < 0)


class VarMean(Rule):
    """(z, m) = (the variance, the mean) of x over dim:  dx = the gradients of both, added"""

    materialize_grads = False

    @staticmethod
    def forward(input: T, dim: Dims, correction: Number, keepdim: bool) -> tuple[T, T]:
        return torch.var_mean(input, dim, correction=correction, keepdim=keepdim)

    @staticmethod
    def d_input(
        g0: T | None, g1: T | None, input: T, dim: Dims, correction: Number, keepdim: bool
    ) -> T | None:
        dx = None if g0 is None else var_grad(g0, input, dim, correction, keepdim)
        return _with_mean(dx, g1, input, dim, keepdim)


class StdMean(Rule):
    """(z, m) = (the standard deviation, the mean) of x over dim:  dx = as `VarMean`"""

    materialize_grads = False

    @staticmethod
    def forward(input: T, dim: Dims, correction: Number, keepdim: bool) -> tuple[T, T]:
        return torch.std_mean(input, dim, correction=correction, keepdim=keepdim)

    @staticmethod
    def d_input(
        g0: T | None,
        g1: T | None,
        input: T,
        result0: T,
        dim: Dims,
        correction: Number,
        keepdim: bool,
    ) -> T | None:
        dx = None if g0 is None else std_grad(g0, input, result0, dim, correction, keepdim)
        return _with_mean(dx, g1, input, dim, keepdim)


def _with_mean(dx: T | None, g: T | None, x: T, dim: Dims, keepdim: bool) -> T | None:
    """dx, and the gradient of the mean for g."""
    if g is None:
        return dx
    over = None if dim == () else dim
    mean = expand_back(g, x.shape, over, keepdim) / _count(x.shape, over)
    return mean if dx is None else dx + mean


_spread(VarMean, torch.var_mean)
_spread(StdMean, torch.std_mean)


@rule(torch.nansum, T.nansum)
class Nansum(Rule):
    """z = sum of x without its NaNs, over dim or all:  dx = g, 0 at a NaN"""

    @staticmethod
    def forward(
        input: T, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None
    ) -> T:
        _of_one_dtype(torch.nansum, input, dtype)
        return torch.nansum(input, dim, keepdim, dtype=dtype)

    @staticmethod
    def d_input(g: T, input: T, dim: Dims, keepdim: bool) -> T:
        return expand_back(g, input.shape, dim, keepdim) * input.isnan().logical_not()


@composite(torch.nanmean, T.nanmean, repeats=True)
def nanmean(
    input: T, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> T:
    total = record(Nansum, (input, dim, keepdim, dtype))[0]
    return total / input.detach().isnan().logical_not().sum(() if dim is None else dim, keepdim)


@rule(torch.dist, T.dist)
class Dist(Rule):
    """z = |x - y| in the p-norm:  dx = g sign(d) (|d| / z)^(p - 1), d = x - y,  dy = -dx"""

    @staticmethod
    def forward(input: T, other: T, p: Number = 2) -> T:
        return torch.dist(input, other, p)

    @staticmethod
    def d_input(g: T, input: T, other: T, p: Number, result: T) -> T | None:
        return norm_grad(g, input - other, result, float(p), None, True)

    @staticmethod
    def d_other(g: T, input: T, other: T, p: Number, result: T) -> T | None:
        dx = norm_grad(g, input - other, result, float(p), None, True)
        return None if dx is None else -dx


@composite(torch.linalg.matrix_norm, repeats=True)
def matrix_norm(
    A: T,
    ord: Number | str = "fro",
    dim: tuple[int, ...] | list[int] = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> T:
    """The matrix norms that need no singular values."""
    if A.dim() < 2 or len(dim) != 2 or ord in (2, -2, "nuc") or dtype is not None:
        raise unplaced(torch.linalg.matrix_norm, (A, ord, dim, keepdim), {"dtype": dtype})
    first, second = (d % A.dim() for d in dim)
    if first == second:
        raise unplaced(torch.linalg.matrix_norm, (A, ord, dim, keepdim), {})
    if ord == "fro":
        return vector_norm(A, 2, list(dim), keepdim)
    if ord not in (1, -1, float("inf"), float("-inf")):
        raise unplaced(torch.linalg.matrix_norm, (A, ord, dim, keepdim), {})
    if abs(ord) == float("inf"):
        first, second = second, first
    sums = vector_norm(A, 1.0, [first], keepdim)
    if not keepdim and first < second:
        second -= 1
    return (torch.amax if ord > 0 else torch.amin)(sums, second, keepdim)


@composite(torch.linalg.norm, repeats=True)
def linalg_norm(
    A: T,
    ord: Number | str | None = None,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    out: T | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """The vector norm, or the matrix norm if there are two dimensions and an `ord`."""
    args, more = (A, ord, dim, keepdim), {"out": out, "dtype": dtype}
    dims = [dim] if isinstance(dim, int) else dim
    if out is not None or (dims is not None and len(dims) not in (1, 2)):
        raise unplaced(torch.linalg.norm, args, more)
    if ord is None:
        return vector_norm(A, 2, dims, keepdim, dtype=dtype)
    if dims is None and A.dim() not in (1, 2):
        raise unplaced(torch.linalg.norm, args, more)
    if (A.dim() if dims is None else len(dims)) == 2:
        return matrix_norm(A, ord, (-2, -1) if dims is None else dims, keepdim, dtype=dtype)
    if isinstance(ord, str):
        raise unplaced(torch.linalg.norm, args, more)
    return vector_norm(A, ord, dims, keepdim, dtype=dtype)
