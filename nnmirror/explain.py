"""`nnmirror.explain`: the backward of a graph, written out.

What it takes is imported when it is called, so that `import nnmirror` does not wait for it.
"""

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .explanation import Explanation
    from .modules.module import Module


def explain(
    tensor: torch.Tensor, *modules: "Module", gradient: torch.Tensor | None = None
) -> "Explanation":
    """The backward of the graph behind `tensor`, as a Python function in the reader's names."""
    from . import explaining

    return explaining.explained(tensor, modules, gradient, sys._getframe(1))
