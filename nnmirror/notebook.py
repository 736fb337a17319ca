"""`%load_ext nnmirror`: the cells after it see the mirror, as a script run by nnmirror does."""

import builtins
import os
import sys
from types import ModuleType
from typing import Any

from . import runner

_finders: list[runner.Finder] = []


def load(ipython: Any) -> None:
    """Give the cells, and modules in the notebook's directory, the mirror's imports."""
    if _finders:
        return
    _finders.append(runner.install(os.getcwd()))
    namespace = ipython.user_ns
    before = sorted(
        name
        for name, value in namespace.items()
        if not name.startswith("_")
        and isinstance(value, ModuleType)
        and runner.seen(value) is not value
    )
    if before:
        print(
            f"nnmirror: {', '.join(before)} imported before stay PyTorch's; import them again"
            " below",
            file=sys.stderr,
        )
    namespace["__builtins__"] = runner.BUILTINS


def unload(ipython: Any) -> None:
    """Later imports are PyTorch's again; what was imported stays."""
    while _finders:
        runner.uninstall(_finders.pop())
    ipython.user_ns["__builtins__"] = builtins
