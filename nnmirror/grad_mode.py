"""Grad mode: whether the mirror records what it computes.

The mirror follows `torch.is_grad_enabled()`, so `with torch.no_grad():` means what it
always means. The three names below override that for the mirror alone, in the current
thread: a script may turn torch's own autograd off for the whole run with
`torch.set_grad_enabled(False)` and still train, under `nnmirror.set_grad_enabled(True)`.
"""

import contextlib
import threading
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from . import _state, _torch
from ._torch import (
    DecoratorContextManager,
    EnableTorchFunction,
    NoParamDecoratorContextManager,
)
from ._types import TorchFunction

F = TypeVar("F", bound=TorchFunction)


class _Override(threading.local):
    mode: bool | None = None  # None: ask torch


_override = _Override()


in_inference_mode = torch.is_inference_mode_enabled  # nothing is recorded in inference mode


def is_grad_enabled() -> bool:
    """True if an operation of the mirror is recorded when an input requires grad."""
    mode = _override.mode if _state.own_grad_mode else None
    return (torch.is_grad_enabled() if mode is None else mode) and not in_inference_mode()


def is_only_computed() -> bool:
    """Is grad mode off, for torch and the mirror, and plain mode too?"""
    if _torchs_mode() or _state.plain:
        return False
    return not _state.own_grad_mode or _override.mode is None


_torchs_mode = torch.is_grad_enabled


def outside_inference_mode() -> AbstractContextManager[object]:
    """What is made within and kept may be saved later, as it is no tensor of inference mode."""
    return _torch.InferenceMode(False) if in_inference_mode() else _UNCHANGED


_UNCHANGED = contextlib.nullcontext()


class no_grad(NoParamDecoratorContextManager):
    """As `torch.no_grad`, for the mirror alone: a context manager and a decorator."""

    _mode: bool | None = False

    def __enter__(self) -> None:
        self._before = _override.mode
        _state.own_grad_mode = True
        _override.mode = self._mode

    def __exit__(self, *exc: object) -> None:
        _override.mode = self._before


class enable_grad(no_grad):
    """As `torch.enable_grad`, for the mirror alone: a context manager and a decorator."""

    _mode = True


class set_grad_enabled(DecoratorContextManager):
    """As `torch.set_grad_enabled`, for the mirror alone.

    Takes effect when called; used in a `with` statement or as a decorator it also ends
    there. `mode=None` goes back to following torch.
    """

    def __init__(self, mode: bool | None) -> None:
        self._before = _override.mode
        self._mode = mode
        _state.own_grad_mode = True
        _override.mode = mode

    def __call__(self, orig_func: F) -> F:
        _override.mode = self._before  # a decorator changes nothing outside the call
        return super().__call__(orig_func)

    def __enter__(self) -> None:
        _override.mode = self._mode

    def __exit__(self, *exc: object) -> None:
        _override.mode = self._before

    def clone(self) -> "set_grad_enabled":
        """A new context manager for each call of a decorated function."""
        before = _override.mode
        copy = self.__class__(self._mode)
        _override.mode = before
        copy._before = before
        return copy


class no_grad_at_all(NoParamDecoratorContextManager):
    """As `torch.no_grad`, also if the mirror's own mode is on: what the package itself does."""

    def __enter__(self) -> None:
        self._torchs, self._own = torch.is_grad_enabled(), _override.mode
        _torch.set_grad_enabled(False)
        if self._own:  # otherwise it follows torch, or is off
            _override.mode = False

    def __exit__(self, *exc: object) -> None:
        if _state.own_grad_mode:  # what runs within may set it
            _override.mode = self._own
        _torch.set_grad_enabled(self._torchs)


class users_code:
    """Runs user code inside a walk or a forward: dispatch of tracked tensors is on again, and grad
    mode is off, or on in a recorded walk.

    It is torch's grad mode that is off, so that the code may turn it on with `torch.enable_grad()`.
    """

    __slots__ = ("asking", "mode", "own_mode", "torchs_mode")

    def __init__(self, mode: bool = False) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self.asking = EnableTorchFunction()
        self.asking.__enter__()
        self.torchs_mode, self.own_mode = torch.is_grad_enabled(), _override.mode
        _torch.set_grad_enabled(self.mode)
        _override.mode = None

    def __exit__(self, *exc: object) -> None:
        _override.mode = self.own_mode
        _torch.set_grad_enabled(self.torchs_mode)
        self.asking.__exit__(*exc)
