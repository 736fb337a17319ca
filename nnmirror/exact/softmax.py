"""Softmax and its logarithm, rounded as PyTorch's CPU kernels round them.

Along the last dimension these keep one partial sum for each lane of a vector register; along any
other they add row after row, as fused multiply-adds, which is what `torch.addcmul` does. Measured
with every instruction set that PyTorch can be set to use; on another device than the CPU the plain
formula is used.
"""

import torch

from ..rules import attention, softmax
from ..rules.gradient import gradient
from ..rules.kernel import in_turn, lane_sum, lanes, scalar_exp, vector_exp, widened
from .attach import exact_of

T = torch.Tensor


@exact_of(softmax.Softmax, "Softmax", "Softmax2d", "Softmin", units=8)
class Softmax(softmax.Softmax):
    """dx = (g - sum of g y) y"""

    @staticmethod
    def d_input(g: T, result: T, dim: int) -> T:
        return softmax_grad(g, result, dim)


@gradient("SoftmaxBackwardData", second=softmax.softmax_second)
def softmax_grad(g: T, result: T, dim: int) -> T:
    if not result.is_cpu or not result.numel():
        return softmax.Softmax.d_input(g, result, dim)
    wide, y = widened(g.contiguous(), result)
    dim = dim % y.dim()  # not in place: it may be a tensor
    if dim == y.dim() - 1:
        s = lane_sum(wide, g.dtype.itemsize == 2, y)
    else:
        s = torch.zeros_like(wide.select(dim, 0))
        for i in range(wide.shape[dim]):
            s = torch.addcmul(s, wide.select(dim, i), y.select(dim, i))
    return ((wide - s.unsqueeze(dim)) * y).to(g.dtype).reshape(result.shape)


@exact_of(attention.SafeSoftmax, "scaled_dot_product_attention", units=8)
class SafeSoftmax(attention.SafeSoftmax):
    """dx = (g - sum of g y) y"""

    is_recordable = True
    d_input = Softmax.d_input


@exact_of(softmax.LogSoftmax, "LogSoftmax", "CrossEntropyLoss", units=16)
class LogSoftmax(softmax.LogSoftmax):
    """dx = g - exp(l) sum of g"""

    @staticmethod
    def d_input(g: T, result: T, dim: int) -> T:
        return log_softmax_grad(g, result, dim)


@gradient(
    "LogSoftmaxBackwardData",
    second=softmax.log_softmax_second,
    of_grad=softmax.log_softmax_of_grad,
)
def log_softmax_grad(g: T, result: T, dim: int) -> T:
    if not result.is_cpu or not result.numel():
        return softmax.LogSoftmax.d_input(g, result, dim)
    narrow = g.dtype.itemsize == 2
    wide, y = widened(g.contiguous(), result)
    dim = dim % y.dim()  # not in place: it may be a tensor
    if dim == y.dim() - 1:
        s, e = lane_sum(wide, narrow), vector_exp(y)
    else:
        s = in_turn(wide.movedim(dim, -1), wide.shape[dim])
        # The vectorized exp for whole registers of the dimensions after dim.
        inner = y.flatten(dim + 1)
        whole = inner.shape[-1] - inner.shape[-1] % (lanes(y) * (1 + narrow))
        e = torch.cat([vector_exp(inner[..., :whole]), scalar_exp(inner[..., whole:])], -1)
        e = e.reshape(y.shape)
    dx = torch.addcmul(wide, e, s.unsqueeze(dim).expand_as(wide), value=-1)
    return dx.to(g.dtype).reshape(result.shape)
