"""PReLU: the slope below zero is a weight."""

import torch

from .. import _torch
from ..tape import record
from .kernel import SOME
from .pointwise import above
from .registry import Rule, composite, unplaced
from .shape import reshape

T = torch.Tensor


class PreluKernel(Rule):
    """y = x where x > 0, else w x:  dx = g there, else w g;  dw = 0 there, else x g, summed.

    w has the dimensions of x, and is broadcast.  Saved: x and w.
    """

    infer = staticmethod(_torch.prelu_kernel)
    always_saved = ("weight",)  # for the gradient of an input that does not require one

    @staticmethod
    def forward(input: T, weight: T) -> T:
        return _torch.prelu_kernel(input, weight)

    @staticmethod
    def d_input(g: T, input: T, weight: T) -> T:
        if g.dtype.itemsize == 2 or not input.is_cpu or g.numel() < SOME:
            return torch.where(input > 0, g, weight * g)
        positive = above(input, 0)
        return positive.addcmul_(1 - positive, weight).mul_(g)

    @staticmethod
    def d_weight(g: T, input: T) -> T:
        return input.clamp(max=0).mul_(g)


def weight_for(input: T, weight: T) -> T:
    """The weight, one for all or one per channel, with the dimensions of the input."""
    if not isinstance(input, T) or not isinstance(weight, T):
        raise unplaced(torch.prelu, (input, weight), {})
    shape = input.shape
    channels = shape[1] if len(shape) > 1 else 1
    is_valid = weight.numel() == 1 or (len(shape) > 0 and weight.numel() == channels)
    if not is_valid or weight.dim() > 1 or input.dtype is not weight.dtype:
        raise unplaced(torch.prelu, (input, weight), {})
    if len(shape) == weight.dim():
        return weight
    return reshape(weight, tuple(weight.numel() if i == 1 else 1 for i in range(len(shape))))


@composite(torch.prelu, T.prelu)
def prelu(input: T, weight: T) -> T:
    """x where x > 0, else w x, one w for all or one per channel; see `rules.prelu.PreluKernel`."""
    return record(PreluKernel, (input, weight_for(input, weight)))[0]
