"""PReLU: the slope below zero is a weight."""

import torch

from .. import _torch
from ..fast.composed import generated
from ..tape import record
from .gradient import applied
from .kernel import SOME
from .pointwise import above, selected
from .registry import Gradients, Needs, Rule, composite, unplaced
from .shape import reshape

__all__ = ["prelu"]

T = torch.Tensor


class PreluKernelBackward(Rule):
    """dx = g where x > 0, else w g;  dw = 0 there, else x g

    For h and hw, the gradients of dx and dw: where x >= 0 g gets h, and elsewhere g gets
    w h + x hw, x gets g hw and w gets g h.
    """

    materialize_grads = False

    @staticmethod
    def forward(grad: T, input: T, weight: T, needs: Needs) -> tuple[T | None, T | None]:
        g, dx, dw = grad, None, None
        if needs[0]:
            if g.dtype.itemsize == 2 or not input.is_cpu or g.numel() < SOME:
                dx = torch.where(input > 0, g, weight * g)
            else:
                dx = selected(above(input, 0), 1, weight).mul_(g)
        if needs[1]:
            dw = input.clamp(max=0).mul_(g)
        return dx, dw

    @staticmethod
    def gradients(
        needs: Needs, g0: T | None, g1: T | None, grad: T, input: T, weight: T
    ) -> Gradients:
        h, hw = g0, g1
        above, zero = input >= 0, grad.new_zeros(())
        if h is not None:
            below = h * weight if hw is None else h * weight + hw * input
            dg = torch.where(above, h, below)
        elif hw is not None:
            dg = torch.where(above, zero, hw * input)
        else:
            return None, None, None
        dx = torch.zeros_like(input) if hw is None else torch.where(above, zero, grad * hw)
        dw = torch.zeros_like(input) if h is None else torch.where(above, zero, grad * h)
        return dg, dx, dw


prelu_grad = applied(PreluKernelBackward)


class PreluKernel(Rule):
    """y = x where x > 0, else w x:  dx = g there, else w g;  dw = 0 there, else x g, summed.

    w has the dimensions of x, and is broadcast.  Saved: x and w.
    """

    infer = staticmethod(_torch.prelu_kernel)

    @staticmethod
    def forward(input: T, weight: T) -> T:
        return _torch.prelu_kernel(input, weight)

    @staticmethod
    def gradients(needs: Needs, g: T, input: T, weight: T) -> Gradients:
        return prelu_grad(g, input, weight, needs)  # type: ignore[return-value]


def weight_for(input: T, weight: T) -> T:
    """The weight, one for all or one per channel, with the dimensions of the input."""
    if not isinstance(input, T) or not isinstance(weight, T):
        raise unplaced(torch.prelu, (input, weight), {})
    shape, sizes = input.shape, weight.shape
    dims, channels = len(shape), shape[1] if len(shape) > 1 else 1
    number = sizes[0] if sizes else 1
    is_valid = number == 1 or (dims > 0 and number == channels)
    if not is_valid or len(sizes) > 1 or input.dtype is not weight.dtype:
        raise unplaced(torch.prelu, (input, weight), {})
    if dims == len(sizes):
        return weight
    return reshape(weight, (1, number, *(1,) * (dims - 2)) if dims > 1 else (1,) * dims)


@composite(torch.prelu, T.prelu)
def _prelu(input: T, weight: T) -> T:
    return record(PreluKernel, (input, weight_for(input, weight)))[0]


@generated
def prelu(input: T, weight: T) -> T:
    """x where x > 0, else w x, one w for all or one per channel.

    See `nnmirror.rules.prelu.PreluKernel`.
    """
    return _prelu(input, weight)
