"""What a module answers when asked for a name that PyTorch has and the mirror lacks."""

from collections.abc import Callable, Iterable
from typing import Any


def missing(module: str, mirrored: Iterable[str]) -> Callable[[str], Any]:
    """A module's `__getattr__`."""

    def getattr_(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        raise AttributeError(
            f"{module}.{name} is not mirrored. What to do: build it from mirrored modules and"
            " tensor operations; write it as an nnmirror.Function with its own backward; or open"
            f" an issue that asks for it. Mirrored here: {', '.join(sorted(mirrored))}."
        )

    return getattr_
