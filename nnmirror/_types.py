"""Types of arguments that many of the package's functions take."""

import os
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any, TypeAlias

from torch import Tensor
from torch.types import Number

__all__ = [
    "Args",
    "Dims",
    "Hook",
    "IndexLike",
    "Kwargs",
    "Number",
    "Size",
    "StrPath",
    "TorchFunction",
]

# An argument `dim`; None for all dimensions.
Dims: TypeAlias = int | list[int] | tuple[int, ...] | None
# What `x[...]` may be indexed with: one of these, or a tuple of them.
_Part: TypeAlias = int | bool | slice | EllipsisType | Tensor | Sequence[Any] | None
IndexLike: TypeAlias = _Part | tuple[_Part, ...]
# One number, or one for each dimension.
Size: TypeAlias = int | tuple[int, ...] | list[int]
# The name of a file.
StrPath: TypeAlias = str | os.PathLike[str]
# The arguments of a call of any operation, or of user code.
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
# A function of the user, whose result is checked.
Hook: TypeAlias = Callable[..., object]
# One of PyTorch's functions, or a replacement for it.
TorchFunction: TypeAlias = Callable[..., Any]
