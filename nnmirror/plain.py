"""Plain mode: no generated code, for debuggers.

Calls and graphs that repeat usually run as generated source (see `nnmirror.fast`). In plain mode
each call runs the rule's `forward`, and each step of the backward the rule's gradients, so that
breakpoints there are hit, and pdb's `s` steps from the script straight into the formulas (see
`nnmirror.debugger`). The bits are the same.
"""

import functools
import sys

from . import _state
from ._state import here
from ._torch import NoParamDecoratorContextManager


class plain(NoParamDecoratorContextManager):
    """Run the rules themselves in this thread, not code generated from them.

    A context manager and a decorator. NNMIRROR_PLAIN=1 in the environment turns it on for the whole
    process. The layers of a Sequential are called one by one, and optimisers update one parameter
    after another. pdb's `s` (step) goes from a line of the script straight to the first formula
    that the line runs:

        with nnmirror.plain():
            loss = criterion(model(x), target)
            breakpoint()
            loss.backward()

        (Pdb) s                  # to `d_input` of the loss
        (Pdb) r                  # to its end, which shows what it returns; s goes to the next one
        (Pdb) b Tanh.d_input     # or: a breakpoint by the name of the rule
        (Pdb) c

    This holds for the debugger that `breakpoint()` or `pdb.set_trace()` starts within plain mode,
    and for `python -m pdb script.py`. If `breakpoint()` has another meaning (by PYTHONBREAKPOINT,
    in a notebook, in pytest), call `nnmirror.set_trace()`.

    Each recorded call keeps its result, its module and its line in the script, which
    `nnmirror.explain` shows. Outputs, gradients and trained weights have the same bits.
    """

    def __enter__(self) -> None:
        _go(1)

    def __exit__(self, *exc: object) -> None:
        _go(-1)


def set_trace(*, header: str | None = None, **options: object) -> None:
    """Start pdb here, like `pdb.set_trace`, with plain mode on until pdb is left.

    `s` steps straight into the formulas (see `plain`). PYTHONBREAKPOINT=nnmirror.set_trace in the
    environment makes `breakpoint()` call it.
    """
    from . import debugger

    leave = None
    if not here.is_plain:
        _go(1)
        leave = functools.partial(_go, -1)
    debugger.set_trace(sys._getframe(1), header, options, leave)


def _go(deeper: int) -> None:
    """Enter a context in this thread, or leave one."""
    from . import debugger  # imported here, as a debugger would step through it later

    here.depth += deeper
    with _state.counting:
        _state.plain += deeper
        if _state.plain:
            debugger.take_over(set_trace)
        else:
            debugger.give_back(set_trace)
    here.is_plain = here.depth > 0  # last, so that a debugger skips the lines above


if here.is_plain:
    _go(0)
