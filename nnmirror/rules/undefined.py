"""An undefined gradient in a backward, as `torch.autograd.gradcheck` uses it.

To see what a backward does without a gradient, gradcheck calls
`torch._C._functions.UndefinedGrad()(y)`, which is y again, and whose backward returns nothing.
That is written in C++ and does not dispatch to tensor subclasses: the result of a mirrored tensor
would have no `grad_fn`, and gradcheck would report every correct backward as wrong. So it is
replaced by one that handles mirrored tensors, and passes all others to PyTorch's.
"""

import torch

from .. import _torch
from ..tape import record
from ..tensor import Tensor
from .registry import Rule

T = torch.Tensor

_PyTorchs = _torch.functions.UndefinedGrad


class Undefined(Rule):
    """z = x:  dx = nothing, whatever g"""

    @staticmethod
    def forward(x: T) -> T:
        return x.clone()

    @staticmethod
    def d_x(g: T) -> None:
        return None

    @classmethod
    def node_name(cls) -> str:
        return "UndefinedGradBackward"


class UndefinedGrad:
    """`torch._C._functions.UndefinedGrad` for the mirror's tensors too."""

    def __call__(self, *tensors: T) -> T | tuple[T, ...]:
        if len(tensors) == 1 and isinstance(tensors[0], Tensor) and tensors[0].requires_grad:
            return record(Undefined, tensors)[0]
        return _PyTorchs()(*tensors)


_torch.functions.UndefinedGrad = UndefinedGrad
