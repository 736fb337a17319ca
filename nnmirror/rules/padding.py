"""Padding: with a constant, or with elements of the tensor itself.

A gradient goes to the element that an element of the result was copied from. Several are added
sequentially, in the order of PyTorch's kernels.
"""

from collections.abc import Sequence

import torch

from .._types import Number
from ..tape import record
from .gradient import applied
from .registry import Rule, composite, has_gradient, rule, unplaced

T = torch.Tensor


@rule(torch.constant_pad_nd)
class ConstantPadNd(Rule):
    """z = x between constants, or without its ends where padded by less than 0:

    dx = the part of g at x, and 0 at the ends that were cut off
    """

    @staticmethod
    def forward(input: T, pad: Sequence[int], value: Number = 0) -> T:
        if isinstance(value, complex):  # nn.pad takes no complex number
            return torch.constant_pad_nd(input, pad, value)
        return torch._C._nn.pad(input, pad, "constant", value)

    @staticmethod
    def d_input(g: T, pad: Sequence[int]) -> T:
        return torch.constant_pad_nd(g, [-n for n in pad], 0)


def _label(pad: Sequence[int], mode: str) -> str:
    kinds = {"reflect": "ReflectionPad", "replicate": "ReplicationPad"}
    return f"{kinds[mode]}{len(pad) // 2}DBackward"


class _OfItselfBackward(Rule):
    """dx = g, added at the elements it was copied from:  g gets h, padded like x"""

    @staticmethod
    def forward(grad: T, input: T, pad: Sequence[int], mode: str) -> T:
        g, shape, count = grad, input.shape, input.numel()
        places = torch.arange(count, dtype=torch.float64, device=g.device).view(shape)
        places = torch._C._nn.pad(places, pad, mode).long().reshape(-1)
        dx = torch.zeros(count, dtype=g.dtype, device=g.device)
        return dx.index_add_(0, places, g.reshape(-1)).view(shape)

    @classmethod
    def label_of(cls, grad: T, input: T, pad: Sequence[int], mode: str) -> str:
        return _label(pad, mode) + "Backward0"

    @staticmethod
    def d_grad(g: T, pad: Sequence[int], mode: str) -> T:
        return torch._C._nn.pad(g, pad, mode)

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)


of_itself_grad = applied(_OfItselfBackward)


class _OfItself(Rule):
    """z = x between elements of its own:  dx = g, added at the elements it was copied from"""

    @staticmethod
    def forward(input: T, pad: Sequence[int], mode: str) -> T:
        return torch._C._nn.pad(input, pad, mode)

    @classmethod
    def label_of(cls, input: T, pad: Sequence[int], mode: str) -> str:
        return _label(pad, mode) + "0"

    @staticmethod
    def d_input(g: T, input: T, pad: Sequence[int], mode: str) -> T:
        # PyTorch saves x for its shape, so it may not be changed.
        return of_itself_grad(g, input, pad, mode)


class _Circular(Rule):
    """z = x, extended by its other end:  dx = g, with copies added at the elements they came from

    PyTorch copies one side after the other into a new tensor, and a later side may copy from an
    earlier one; the backward undoes the copies in reverse.
    """

    @staticmethod
    def forward(input: T, pad: Sequence[int]) -> T:
        return torch._C._nn.pad(input, pad, "circular")

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, pad: Sequence[int]) -> T:
        last = len(input_shape) - 1
        sides = [(last - i, *pad[2 * i : 2 * i + 2]) for i in range(len(pad) // 2)]
        for dim, left, right in reversed(sides):
            size, kept = g.shape[dim], max(left, 0)
            if right > 0:
                g = _undone(g, dim, size - right, kept, right)
            if left > 0:
                g = _undone(g, dim, 0, size - left - max(right, 0), left)
        dx = torch.zeros(input_shape, dtype=g.dtype, device=g.device)
        part = dx
        for dim, left, right in sides:
            g = g[(slice(None),) * dim + (slice(max(left, 0), g.shape[dim] - max(right, 0)),)]
            part = part[
                (slice(None),) * dim + (slice(max(-left, 0), part.shape[dim] - max(-right, 0)),)
            ]
        part.copy_(g)
        return dx

    @classmethod
    def node_name(cls) -> str:
        return "torch::autograd::CopySlices"


def _undone(g: T, dim: int, to: int, start: int, length: int) -> T:
    """The gradient before `length` slices from `start` on along dim were copied to `to`."""
    kept, moved = g.clone(), torch.zeros_like(g)
    kept.narrow(dim, to, length).zero_()
    moved.narrow(dim, start, length).copy_(g.narrow(dim, to, length))
    return kept + moved


@composite(torch._C._nn.pad)
def pad(input: T, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> T:
    """x padded along its last dimensions; `pad` has two numbers for each, the last first."""
    function, *args = recorded_as(input, pad, mode, value)
    return record(function, tuple(args))[0]


def recorded_as(
    input: T, pad: Sequence[int], mode: str, value: float | None
) -> tuple[type[Rule], *tuple[object, ...]]:
    """The rule for a call of `pad`, and its arguments; or PyTorch's error."""
    if has_gradient(value) or (isinstance(pad, tuple | list) and any(map(has_gradient, pad))):
        raise unplaced(torch._C._nn.pad, (input, pad, mode, value), {})  # it takes numbers
    if mode == "constant" and isinstance(input, T):
        return ConstantPadNd, input, pad, 0 if value is None else value
    if mode not in _OF_ITSELF or not isinstance(input, T) or value:
        raise unplaced(torch._C._nn.pad, (input, pad, mode, value), {})
    if mode == "circular":
        return _Circular, input, pad
    return _OfItself, input, pad, mode


_OF_ITSELF = ("reflect", "replicate", "circular")
