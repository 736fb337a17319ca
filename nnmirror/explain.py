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
    """The backward of the graph behind `tensor`, as a Python function in the reader's names.

        loss = criterion(net(x), y)
        e = nnmirror.explain(loss)
        print(e)                # the function
        e.save("backward.py")   # a file that runs by itself, with torch alone
        e.operations            # what it consists of, in the order of the walk back

    Each operation has a few lines, with its formula, the shapes, and where it was called. The walk
    is gone back over once, its torch calls are noted and written down, as for a walk that is bound;
    what comes out is run, and must give the same gradients, bit for bit. `gradient` is where it
    starts from, as for `tensor.backward`. A step that depends on the numbers in a tensor, or that
    is written by a user, is written as it was for these numbers.

    Leaves and modules have their names in `modules`, or else in the modules that are alive; the
    caller's variables name the rest. Of a layer without parameters that was called several times,
    the calls but the last are known only if they were the first of their kind. So is the line that
    made a call: another call of its kind may have come from another line, and then none is given.
    Within `nnmirror.plain()` all calls are known.

    Nothing is used up: the graph, each `.grad` and the random numbers stay as they are, and no hook
    is called. RuntimeError, as PyTorch's, if `tensor` requires no grad, if it is no scalar and has
    no `gradient`, or if its graph was freed. NotImplementedError for a hook that may change a
    gradient on the way; `nnmirror.steps` calls hooks. What lies in front of the mirrored graph and
    is PyTorch's own is not written: the gradients end there.
    """
    from . import explaining

    return explaining.explained(tensor, modules, gradient, sys._getframe(1))
