"""What a module answers when asked for a name that PyTorch has and the mirror lacks."""

import dis
import sys
from collections.abc import Callable, Iterable
from typing import Any

_WAYS = (
    "build it from mirrored modules and tensor operations; write it as an nnmirror.Function with"
    " its own backward"
)
_IMPORT_FROM = dis.opmap["IMPORT_FROM"]


def missing(module: str, mirrored: Iterable[str], ways: str = _WAYS) -> Callable[[str], Any]:
    """A module's `__getattr__`; `ways` says what to do in place of a name that is not here."""

    def getattr_(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        why = (
            f"{module}.{name} is not mirrored. What to do: {ways}; or open an issue that asks for"
            f" it. Mirrored here: {', '.join(sorted(mirrored))}."
        )
        if _is_import(sys._getframe(1)):
            raise ImportError(why, name=module)
        raise AttributeError(why)

    return getattr_


def _is_import(frame: Any) -> bool:
    """Is this frame at a `from module import name`?

    That takes an AttributeError for an answer, and says no more than that it cannot import the
    name. Everyone else (getattr, hasattr, inspect) is to have an AttributeError.
    """
    place: int = frame.f_lasti
    return bool(place >= 0 and frame.f_code.co_code[place] == _IMPORT_FROM)
