"""Arguments that are one number for all dimensions, or one for each."""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, overload

from .._types import Size

if TYPE_CHECKING:

    class _Parse(Protocol):
        @overload
        def __call__(self, x: int | Iterable[int]) -> tuple[int, ...]: ...
        @overload
        def __call__(self, x: float | Iterable[float]) -> tuple[float, ...]: ...


def ntuple(n: int) -> "_Parse":
    """How PyTorch's modules read such an argument: n times the number, or what is iterable."""

    def parse(x: object) -> tuple[Any, ...]:
        return tuple(x) if isinstance(x, Iterable) else tuple(itertools.repeat(x, n))

    return parse


def expanded(value: Size, n: int) -> tuple[int, ...]:
    """How torch's functions read it: a list of one number, too, is for all n dimensions."""
    if isinstance(value, tuple | list):
        return tuple(value) * n if len(value) == 1 else tuple(value)
    return (value,) * n


def expanded_integer(value: object, n: int) -> tuple[int, ...] | None:
    """The same; None if torch would have an error."""
    if type(value) is int or isinstance(value, tuple | list):
        sizes = expanded(value, n)
        return sizes if len(sizes) == n else None
    return None
