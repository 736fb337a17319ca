"""Building blocks for the gradients of pointwise operations.

Each operation on a large tensor is a pass over memory, and allocating new memory costs as much
again. So intermediates are overwritten, and large tensors are processed in pieces that stay in the
cache. `torch.where` and `masked_fill` branch for each element; if the processor cannot predict the
branches, that takes ten times as long as multiplying by 0 or 1.
"""

import functools
import math
from collections.abc import Callable

import torch

from ..constants import constant
from .kernel import GRAIN, SOME, by_sign, integers, is_flat, laid_out_as, one_call

T = torch.Tensor


def number(value: float, like: T) -> T:
    """`value` in the dtype of `like`: kernels round their parameters first."""
    return constant(float(value), like.dtype, like.device)


def widened(x: T) -> T:
    """x in float32 at least."""
    return x.float() if x.dtype.itemsize == 2 else x


def above(x: T, bound: float) -> T:
    """1 where x > bound, else 0, in the dtype of x."""
    return torch.gt(x, number(bound, x), out=torch.empty_like(x))


def between(x: T, low: float, high: float) -> T:
    """1 where low < x < high, else 0, in the dtype of x."""
    low, high = _next(low, x.dtype, 1), _next(high, x.dtype, -1)
    if not low <= high:
        return torch.zeros_like(x)
    clipped = x.clamp(low, high)
    return torch.eq(x, clipped, out=clipped)


@functools.lru_cache(maxsize=256)
def _next(value: float, dtype: torch.dtype, by: int) -> float:
    """The next number of the dtype above `value`, or below it."""
    toward = torch.tensor(by * math.inf, dtype=dtype, device="cpu")
    return torch.nextafter(torch.tensor(value, dtype=dtype, device="cpu"), toward).item()


def differs(x: T, other: T) -> T:
    """1 where x is not `other`, or is NaN, else 0; in the memory of `other`."""
    return torch.ne(x, other, out=other)


def kept(g: T, mask: T) -> T:
    """g where the mask is 1, 0 where it is 0; in the memory of the mask.

    As integers, so that it is 0 even where g is infinite, and not -0 where g is negative.
    """
    if g.numel() < SOME or not g.is_cpu:
        return g.masked_fill(mask == 0, 0)
    return integers(mask).clamp_(max=1).mul_(integers(g)).view(g.dtype)


def selected(mask: T, one: float, other: T) -> T:
    """`one` where the mask is 1, `other` where it is 0, both finite; in the memory of the mask."""
    return torch.lerp(other, number(one, mask), mask, out=mask)


def exp(x: T, rate: float = 1) -> T:
    """exp(rate x), which is no more than 1, into the memory of x.

    The error is less than a unit in the last place of 1; torch computes powers of 2 in a third of
    the time.
    """
    return x.mul_(number(rate * math.log2(math.e), x)).exp2_()


_MANY = 1 << 18  # elements: more are processed in pieces that stay in the cache


def times_slope(g: T, slope: Callable[..., T], x: T, *parameters: object) -> T:
    """g slope(x, *parameters), for a slope that is a new tensor.

    float16 and bfloat16 are computed in float32, as PyTorch's kernels do.
    """
    if x.numel() < _MANY or not (x.is_cpu and x.is_contiguous() and is_flat(g)):
        return laid_out_as(_times(g, x, slope, *parameters), g)
    return _times_in_pieces(g, x, slope, *parameters)


@one_call
def _times_in_pieces(g: T, x: T, slope: Callable[..., T], *parameters: object) -> T:
    result = torch.empty_like(x)
    size = GRAIN * torch.get_num_threads()
    pieces = [t.view(-1).split(size) for t in (g, x, result)]
    for some, of_x, to in zip(*pieces, strict=True):
        if to.dtype.itemsize == 2:
            to.copy_(_times(some, of_x, slope, *parameters))
        else:
            torch.mul(slope(of_x, *parameters), some, out=to)
    return result


def _times(g: T, x: T, slope: Callable[..., T], *parameters: object) -> T:
    if g.dtype.itemsize == 2:
        return slope(x.float(), *parameters).mul_(g).to(g.dtype)
    return slope(x, *parameters).mul_(g)


def leaky(g: T, x: T, slope: float) -> T:
    """g where x > 0, else g times the slope: the same bits either way."""
    large = x.numel() >= SOME and x.is_cpu and g.dtype.itemsize > 2 and 0 <= slope <= 1
    if large and is_flat(g) and x.is_contiguous():
        return _times(g, x, _leaky_slope, slope)
    return by_sign(x, g, g * slope)


def _leaky_slope(x: T, slope: float) -> T:
    return above(x, 0).clamp_(min=slope)
