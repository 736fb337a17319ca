"""Functions that PyTorch composes of other operations: distances, and losses made of them.

Each consists of the same operations as PyTorch's, in the same order, and so has its rounding; the
backward is that of these operations. A number that PyTorch converts to a tensor before a
subtraction is rounded to the tensor's dtype here, too. Of two operands the second is
computed first, as in PyTorch's C++ code, because the order of the calls is the order in which
gradients are summed.
"""

import math
from collections.abc import Sequence

import torch

from .._torch import DisableTorchFunctionSubclass
from .._types import TorchFunction
from ..operation import Operation
from ..tape import record
from .arithmetic import Add, Div, Mul, Neg, Pow, Rsub, Sub
from .elementwise import Exp, Log, Rsqrt, Sqrt, WhereEqual, Xlogy
from .reduction import LinalgVectorNorm, Mean, Sum
from .registry import Rule, composed, unplaced
from .shape import broadcast_tensors, to

T = torch.Tensor

_EPSILON = torch.tensor(1e-12).item()  # a float32 in PyTorch


def as_function(function: type[Operation]) -> TorchFunction:
    """The function as it is recorded, also if an argument is in torch's own graph."""
    return lambda *args: record(function, args)[0]


add, sub, mul, div = (as_function(r) for r in (Add, Sub, Mul, Div))
neg, power, exp, log = (as_function(r) for r in (Neg, Pow, Exp, Log))
rsqrt, rsub, sqrt = (as_function(r) for r in (Rsqrt, Rsub, Sqrt))
summed, where_equal, xlogy = (as_function(r) for r in (Sum, WhereEqual, Xlogy))


def reduced(loss: T, reduction: int) -> T:
    """The loss, its mean or its sum, by PyTorch's number for it."""
    if reduction == 0:
        return loss
    return record(Mean if reduction == 1 else Sum, (loss,))[0]


def _rounded(value: float, like: T) -> float:
    """The number as a tensor of the dtype of `like` has it."""
    return torch.tensor(value, dtype=like.dtype).item()


def _detached(target: T) -> T:
    return target.detach() if target.requires_grad else target


def _are_tensors(func: TorchFunction, args: tuple[object, ...], count: int) -> None:
    """PyTorch's error unless the first `count` of the arguments are tensors."""
    if not all(isinstance(a, T) for a in args[:count]):
        raise unplaced(func, args, {})


# -- distances -------------------------------------------------------------------------------


class CloneAtLeast(Rule):
    """z = max(x, least), with the gradient of a copy of x:  dx = g

    As PyTorch's, which copies the length and then changes the copy without recording it.
    """

    @staticmethod
    def forward(input: T, least: float) -> T:
        return input.clone().clamp_min_(least)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @classmethod
    def node_name(cls) -> str:
        return "CloneBackward0"


@composed(torch.cosine_similarity, repeats=True)
def cosine_similarity(x1: T, x2: T, dim: int = 1, eps: float = 1e-8) -> T:
    """z = sum of (x / |x|) (y / |y|) along dim, the lengths at least eps

    Its gradient is that of the quotients, even where a length is below eps.
    """
    _are_tensors(torch.cosine_similarity, (x1, x2, dim, eps), 2)
    dtype = torch.result_type(x1, x2)
    if not dtype.is_floating_point:
        raise unplaced(torch.cosine_similarity, (x1, x2, dim, eps), {})
    x1, x2 = (x if x.is_floating_point() else x.to(dtype) for x in (x1, x2))
    if x1.shape != x2.shape:
        x1, x2 = broadcast_tensors(x1, x2)
    lengths = [record(LinalgVectorNorm, (x, 2, dim, True, None))[0] for x in (x1, x2)]
    sizes = [record(CloneAtLeast, (length, eps))[0] for length in lengths]
    other = div(x2, sizes[1])
    return (div(x1, sizes[0]) * other).sum(dim)


class Norm(LinalgVectorNorm):
    """As LinalgVectorNorm, under the name that it has in PyTorch's `pairwise_distance`."""

    @classmethod
    def node_name(cls) -> str:
        return "NormBackward1"


@composed(torch.pairwise_distance, repeats=True)
def pairwise_distance(x1: T, x2: T, p: float = 2, eps: float = 1e-6, keepdim: bool = False) -> T:
    """z = the p-norm of x - y + eps along the last dimension"""
    _are_tensors(torch.pairwise_distance, (x1, x2, p, eps, keepdim), 2)
    difference = sub(x1, x2) + eps
    return record(Norm, (difference, p, [difference.dim() - 1], keepdim, None))[0]


# -- losses of distances ---------------------------------------------------------------------


@composed(torch.cosine_embedding_loss)
def cosine_embedding_loss(
    input1: T, input2: T, target: T, margin: float = 0.0, reduction: int = 1
) -> T:
    """l = 1 - c where the target is 1, max(c - margin, 0) where it is -1; c = cos(x, y)"""
    args = input1, input2, target, margin, reduction
    _are_tensors(torch.cosine_embedding_loss, args, 3)
    along = target.dim()
    if along > 1 or input1.dim() != along + 1 or input2.dim() != along + 1:
        raise unplaced(torch.cosine_embedding_loss, args, {})
    product = summed(mul(input1, input2), along)
    sizes = [add(summed(mul(x, x), along), _EPSILON) for x in (input1, input2)]
    c = div(product, sqrt(mul(*sizes)))
    target = _detached(target)
    alike = where_equal(target, 1, rsub(c, 1), 0.0)
    other = where_equal(target, -1, (c - margin).clamp_min(0), 0.0)
    return reduced(alike + other, reduction)


@composed(torch.hinge_embedding_loss)
def hinge_embedding_loss(input: T, target: T, margin: float = 1.0, reduction: int = 1) -> T:
    """l = x where the target is 1, max(margin - x, 0) where it is -1"""
    _are_tensors(torch.hinge_embedding_loss, (input, target, margin, reduction), 2)
    target = _detached(target)
    far = where_equal(target, 1, 0.0, rsub(input, _rounded(margin, input)).clamp_min(0))
    near = where_equal(target, -1, 0.0, input)
    return reduced(far + near, reduction)


@composed(torch.margin_ranking_loss)
def margin_ranking_loss(
    input1: T, input2: T, target: T, margin: float = 0.0, reduction: int = 1
) -> T:
    """l = max(-t (x - y) + margin, 0)"""
    _are_tensors(torch.margin_ranking_loss, (input1, input2, target, margin, reduction), 3)
    difference = sub(input1, input2)
    return reduced((mul(neg(target), difference) + margin).clamp_min(0), reduction)


@composed(torch.triplet_margin_loss)
def triplet_margin_loss(
    anchor: T,
    positive: T,
    negative: T,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = 1,
) -> T:
    """l = max(margin + |a - p| - |a - n|, 0), with `swap` the lesser of |a - n| and |p - n|

    Balntas et al., 2016 (doi:10.5244/C.30.119), section 2.
    """
    args = anchor, positive, negative, margin, p, eps, swap, reduction
    _are_tensors(torch.triplet_margin_loss, args, 3)
    if not anchor.dim() == positive.dim() == negative.dim():
        raise unplaced(torch.triplet_margin_loss, args, {})
    near = pairwise_distance(anchor, positive, p, eps)
    far = pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = torch.minimum(far, pairwise_distance(positive, negative, p, eps))
    return reduced((near + margin - far).clamp_min(0), reduction)


# -- losses of likelihoods -------------------------------------------------------------------


@composed(torch.kl_div)
def kl_div(input: T, target: T, reduction: int = 1, *, log_target: bool = False) -> T:
    """l = t log t - t x, for x = log of a probability; with `log_target`, exp(t) (t - x)

    dx = -g t (-g exp(t)).  Kullback and Leibler, 1951 (doi:10.1214/aoms/1177729694).
    """
    tensors = isinstance(input, T) and isinstance(target, T) and isinstance(log_target, bool)
    if not (tensors and input.is_floating_point() and target.is_floating_point()):
        raise unplaced(torch.kl_div, (input, target, reduction), {"log_target": log_target})
    if log_target:
        difference = sub(target, input)
        return reduced(mul(exp(target), difference), reduction)
    product = mul(target, input)
    return reduced(sub(xlogy(target, target), product), reduction)


@composed(torch.poisson_nll_loss)
def poisson_nll_loss(
    input: T, target: T, log_input: bool, full: bool, eps: float, reduction: int
) -> T:
    """l = exp(x) - t x, for x the log of the rate; else x - t log(x + eps), x the rate

    With `full`, and where t > 1, Stirling's t log t - t + log(2 pi t) / 2 is added.
    """
    args = input, target, log_input, full, eps, reduction
    _are_tensors(torch.poisson_nll_loss, args, 2)
    if log_input:
        product = mul(target, input)
        loss = sub(exp(input), product)
    else:
        loss = sub(input, mul(target, log(add(input, eps))))
    if full:
        half = log(mul(target, 2 * math.pi)) * 0.5
        product = mul(target, log(target))
        loss = loss + (sub(product, target) + half).masked_fill(target <= 1, 0)
    return reduced(loss, reduction)


# -- a normalisation -------------------------------------------------------------------------


@composed(torch.rms_norm, repeats=True)
def rms_norm(
    input: T, normalized_shape: Sequence[int], weight: T | None = None, eps: float | None = None
) -> T:
    """y = x r w, r = 1 / sqrt(mean of x^2 + eps) over the last dimensions

    dw = sum of g x r,  dx = r g w - x r^3 / n (sum of g w x).  16 bits are computed in 32.
    Zhang and Sennrich, 2019 (arXiv:1910.07467).
    """
    shape = tuple(normalized_shape)
    with DisableTorchFunctionSubclass():
        dtype, dim = input.dtype, input.dim()
        is_valid = len(shape) > 0 and tuple(input.shape[-len(shape) :]) == shape
        is_valid = is_valid and dtype.is_floating_point
        if weight is not None:
            is_valid = is_valid and tuple(weight.shape) == shape and weight.dtype is dtype
        if not is_valid:
            with torch.no_grad():
                torch.rms_norm(input, normalized_shape, weight, eps)  # PyTorch's errors, warnings
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    x = input if wide is dtype else to(input, wide)
    eps = torch.finfo(wide).eps if eps is None else eps
    over = list(range(dim - len(shape), dim))
    y = mul(x, rsqrt(add(record(Mean, (power(x, 2), over, True))[0], eps)))
    if weight is not None:
        y = mul(y, weight)
    return y if wide is dtype else to(y, dtype)
