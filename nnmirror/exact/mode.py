"""Exact mode: PyTorch's bits even where they take longer.

By default a layer whose kernel rounds in an order of its own computes the plain formula, and its
gradients differ by a few units in the last place. In exact mode they have PyTorch's bits.
"""

import threading
from typing import TYPE_CHECKING

from .. import _state
from .._torch import NoParamDecoratorContextManager

if TYPE_CHECKING:
    from ..operation import Operation


class _Override(threading.local):
    mode: bool | None = None  # None: as the process


_override = _Override()


def is_exact() -> bool:
    """True if exact mode is on in this thread."""
    mode = _override.mode if _state.own_exact_mode else None
    return _state.exact_mode if mode is None else mode


def set_exact(mode: bool) -> None:
    """Turn exact mode on or off for the process; a thread within `exact()` stays in exact mode.

    NNMIRROR_EXACT=1 in the environment turns it on from the start.
    """
    _state.exact_mode = bool(mode)


class exact(NoParamDecoratorContextManager):
    """Turn exact mode on in this thread: everything recorded within has PyTorch's bits.

    A context manager and a decorator. The mode of the forward counts: a backward uses the
    formulas that its forward recorded, wherever it is called.
    """

    def __enter__(self) -> None:
        self._before = _override.mode
        _state.own_exact_mode = True
        _override.mode = True

    def __exit__(self, *exc: object) -> None:
        _override.mode = self._before


def chosen(function: "type[Operation]") -> "type[Operation]":
    """The exact form of a function in exact mode, else the function itself."""
    found = function.exact if is_exact() else None
    return function if found is None else found
