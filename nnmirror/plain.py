"""Plain mode: everything runs by the definitions that one reads.

Usually what comes again is written out as source, and runs in place of the rules (see `fast`). In
plain mode each call goes through the rule's `forward` and each step back through its gradients, so
that a breakpoint there stops. The bits are the same.
"""

import os
import threading

from . import _state
from ._torch import NoParamDecoratorContextManager


class _Here(threading.local):
    """Of this thread."""

    is_plain: bool = os.environ.get("NNMIRROR_PLAIN", "") not in ("", "0")


here = _Here()
_state.plain = int(here.is_plain)  # in how many threads and contexts: at 0 no thread need ask
_counting = threading.Lock()


class plain(NoParamDecoratorContextManager):
    """Within, this thread runs everything by the readable definitions.

    A context manager and a decorator. NNMIRROR_PLAIN=1 in the environment has the whole process in
    plain mode. No call and no walk is written out, the layers of a Sequential are called one by
    one, and optimisers step parameter by parameter. So a breakpoint in a rule stops
    (`forward` of `nnmirror.functional.Linear`, `d_input` of `nnmirror.functional.Tanh`), and a
    debugger that steps into `loss.backward()` soon comes to a formula.

    Each recorded call keeps its result, the module and the line of the script that made it, for
    `nnmirror.explain`. Outputs, gradients and trained weights have the same bits as otherwise.
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
