"""nnmirror stands in for a part of `torch.nn`, with every backward written by hand.

    import nnmirror as nn            # in place of: import torch.nn as nn

Same signatures, same initial weights, same outputs, gradients and trained weights, bit
for bit; no autograd runs.
"""

import sys
from typing import Any

from . import functional, init, modules, optim
from .grad_mode import enable_grad, is_grad_enabled, no_grad, set_grad_enabled
from .modules import LeakyReLU, Linear, Module, MSELoss, ReLU, Sequential, Tanh
from .tape import Function, grad
from .tensor import Buffer, Parameter, Tensor

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "Function",
    "LeakyReLU",
    "Linear",
    "MSELoss",
    "Module",
    "Parameter",
    "ReLU",
    "Sequential",
    "Tanh",
    "Tensor",
    "enable_grad",
    "functional",
    "grad",
    "init",
    "is_grad_enabled",
    "modules",
    "nn",
    "no_grad",
    "optim",
    "set_grad_enabled",
]

# `from nnmirror import nn, optim`: the names of torch.nn are this package's own.
nn = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise AttributeError(
        f"nnmirror has no {name!r}: it is not mirrored (or no name of torch.nn). What to do:"
        " build it from the mirrored modules and tensor operations; write it as an"
        " nnmirror.Function with its own backward; or open an issue that asks for it. Mirrored"
        f" are {', '.join(sorted(modules.__all__))}."
    )
