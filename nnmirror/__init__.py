"""`torch.nn` with every backward written by hand.

    from nnmirror import nn, optim    # in place of: from torch import nn, optim

The same signatures, initial weights, outputs, gradients and trained weights, bit for bit; no
autograd runs. `nn` is this package itself, so `import nnmirror as nn` works as well.

Pages to begin with:

- Each layer has its formula and its gradient with its class, such as `nnmirror.LayerNorm`. The code
  is in its rule: `nnmirror.rules` has them all, and says how to add one.
- `nnmirror.exact`: where bits differ, and exact mode.
- `nnmirror.tensor`: what is refused, and what to do instead.
- `nnmirror.explain`: the backward of your own net as a Python function, or as a page;
  `nnmirror.stepping`: the same step by step; `nnmirror.plain`: in a debugger.
- `nnmirror.watch`: the norms of gradients and activations in training.
- `nnmirror.testing`: checks for layers, losses and Functions of your own.
- `nnmirror.bridge`: scripts, models and libraries of PyTorch.
- `nnmirror.optim`, `nnmirror.parallel`: optimisers; training in several processes.
- `nnmirror.node`, `nnmirror.tape`, `nnmirror.walk`: a recorded call, how it is recorded, and the
  backward over these; `nnmirror.double_backward`: gradients of gradients; `nnmirror.func`: the
  transforms of `torch.func`.
- `nnmirror.fast`: generated code for graphs that repeat.

.. include:: mirrored.md
"""

import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if getattr(sys, "argv", [])[:1] == ["-m"]:  # while Python looks for the module to run
    from ._options import answer_at_once

    answer_at_once()  # before torch is imported, which takes seconds

from . import adopt as _adopt  # noqa: F401  a library's module becomes mirrored where it is assigned
from . import custom_function as _custom_function  # noqa: F401  calls of a user's Function
from . import func, functional, init, modules, optim, parallel, parameter, utils
from . import transforms as _transforms  # noqa: F401  torch.func transforms what is tracked
from ._missing import missing
from .bridge import from_torch, to_torch
from .exact import table as _table  # noqa: F401  it attaches the exact forms to the rules
from .exact.mode import exact, is_exact, set_exact
from .explain import explain
from .fast import binding as _binding  # noqa: F401  walks from a loss are bound
from .fast import ends as _ends  # noqa: F401  walks to given inputs
from .fast import parts as _parts  # noqa: F401  and parts of walks
from .fast import recorder as _recorder  # noqa: F401  calls of varying shape
from .fast import replay as _replay  # noqa: F401  walks with create_graph
from .fast import tapped as _tapped  # noqa: F401  walks of a watched graph
from .function import Function
from .grad_mode import enable_grad, is_grad_enabled, no_grad, set_grad_enabled
from .gradients import backward, grad
from .modules import *  # noqa: F403  all modules, as in torch.nn
from .parameter import Buffer, Parameter, UninitializedBuffer, UninitializedParameter
from .plain import plain, set_trace
from .stepping import steps
from .tensor import Tensor
from .watch import watch

__all__ = [
    "Buffer",
    "Function",
    "Parameter",
    "Tensor",
    "UninitializedBuffer",
    "UninitializedParameter",
    "backward",
    "enable_grad",
    "exact",
    "explain",
    "from_torch",
    "func",
    "functional",
    "grad",
    "init",
    "is_exact",
    "is_grad_enabled",
    "modules",
    "nn",
    "no_grad",
    "optim",
    "parallel",
    "parameter",
    "plain",
    "set_exact",
    "set_grad_enabled",
    "set_trace",
    "steps",
    "testing",
    "to_torch",
    "utils",
    "watch",
]

# `from nnmirror import nn, optim` and `import nnmirror.nn.functional as F`: the names of
# torch.nn are this package's own, and each module is there once, whichever way it is named.
if TYPE_CHECKING:
    from . import nn as nn  # the stubs of those names
    from . import testing as testing
else:
    __all__ += modules.__all__
    nn = sys.modules[__name__]
    for _name in [name for name in sys.modules if name.startswith(f"{__name__}.")]:
        sys.modules[f"{__name__}.nn" + _name.removeprefix(__name__)] = sys.modules[_name]
    sys.modules[f"{__name__}.nn"] = nn
    # A name that is not mirrored; a type checker reports it itself.
    __getattr__ = missing(__name__, modules.__all__, later=("testing",))


def load_ipython_extension(ipython: object) -> None:
    """`%load_ext nnmirror`: later cells see the mirror where they import torch."""
    from . import notebook

    notebook.load(ipython)


def unload_ipython_extension(ipython: object) -> None:
    """`%unload_ext nnmirror`: later imports are PyTorch's again."""
    from . import notebook

    notebook.unload(ipython)
