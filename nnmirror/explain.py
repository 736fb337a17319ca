"""`nnmirror.explain`: the backward of a graph, written out.

Its modules are imported by the first call, which keeps `import nnmirror` fast.
"""

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .explaining.explanation import Explanation
    from .modules.module import Module


def explain(
    tensor: torch.Tensor, *modules: "Module", gradient: torch.Tensor | None = None
) -> "Explanation":
    """The backward of the graph of `tensor`, as a Python function in the names of your script.

        loss = criterion(net(x), y)
        e = nnmirror.explain(loss)
        print(e)                # the function
        e.save("backward.py")   # a file that runs by itself, with torch alone
        e.html("net.html")      # a page to step through
        e.operations            # the operations, in the order of the backward

    Each operation has a few lines, with its formula, the shapes, and the line of the script. The
    backward is run once and its torch calls are written down. The function is then run, and must
    give the same gradients, bit for bit. `gradient` is the gradient to start from, as for
    `tensor.backward`. If a backward branches on the numbers in a tensor, or belongs to an
    `nnmirror.Function`, the calls are those for these numbers.

    Leaves and modules have the names that they have in `modules`, or else in the modules that are
    alive; the caller's variables name the other tensors. Where it is not certain which module or
    line made a call, because several made calls of the same kind, none is given. Within
    `nnmirror.plain()` it always is.

    The graph, each `.grad` and the state of the random generators are left unchanged, and no hook
    is called.

    RuntimeError, as PyTorch's, if `tensor` does not require grad, if it is not a scalar and
    `gradient` is not given, or if its graph was freed. TypeError if it is not the mirror's.
    NotImplementedError if a hook could change a gradient: use `nnmirror.steps`, which calls hooks.
    If the input comes from torch's own graph, the function ends at that input.
    """
    from .explaining import explainer

    return explainer.explained(tensor, modules, gradient, sys._getframe(1))
