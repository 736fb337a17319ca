"""Plain mode: no generated code, for debuggers.

Calls and graphs that repeat usually run as generated source (see `nnmirror.fast`). In plain mode
each call runs the rule's `forward`, and each step of the backward the rule's gradients, so that
breakpoints there are hit. The bits are the same.
"""

import os
import threading

from . import _state
from ._torch import NoParamDecoratorContextManager


class _Here(threading.local):
    """Per thread."""

    is_plain: bool = os.environ.get("NNMIRROR_PLAIN", "") not in ("", "0")


here = _Here()
_state.plain = int(here.is_plain)  # the number of threads and contexts: at 0 no thread has to check
_counting = threading.Lock()


class plain(NoParamDecoratorContextManager):
    """Run the rules themselves in this thread, not code generated from them.

    A context manager and a decorator. NNMIRROR_PLAIN=1 in the environment turns it on for the whole
    process. The layers of a Sequential are called one by one, and optimisers update one parameter
    after another. A breakpoint in a rule is hit at each call (`forward` of
    `nnmirror.functional.Linear`, `d_input` of `nnmirror.functional.Tanh`), and a debugger that
    steps into `loss.backward()` soon reaches a formula:

        loss = criterion(model(x), target)
        breakpoint()             # (Pdb) b nnmirror.functional.Tanh.d_input
        loss.backward()          # (Pdb) c

    Each recorded call keeps its result, its module and its line in the script, which
    `nnmirror.explain` shows. Outputs, gradients and trained weights have the same bits.
    """

    def __enter__(self) -> None:
        self._before = here.is_plain
        here.is_plain = True
        with _counting:
            _state.plain += 1

    def __exit__(self, *exc: object) -> None:
        here.is_plain = self._before
        with _counting:
            _state.plain -= 1
