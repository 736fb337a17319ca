"""What a module answers when asked for a name that PyTorch has and the mirror lacks."""

from collections.abc import Callable, Iterable
from typing import Any

_WAYS = (
    "build it from mirrored modules and tensor operations; write it as an nnmirror.Function with"
    " its own backward"
)


def missing(module: str, mirrored: Iterable[str], ways: str = _WAYS) -> Callable[[str], Any]:
    """A module's `__getattr__`; `ways` says what to do in place of a name that is not here."""

    def getattr_(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise AttributeError(
            f"{module}.{name} is not mirrored. What to do: {ways}; or open an issue that asks for"
            f" it. Mirrored here: {', '.join(sorted(mirrored))}."
        )

    return getattr_
