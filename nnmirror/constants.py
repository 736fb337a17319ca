"""Numbers as tensors: operations are faster with a tensor than with a number."""

import functools
from typing import TypeVar

import torch

from . import tensor as _tensor
from ._upcalls import implements
from .grad_mode import outside_inference_mode
from .tensor import C_device, C_dtype

R = TypeVar("R")

_tensors_of_numbers: dict[tuple[float, torch.dtype, torch.device], torch.Tensor | None] = {}


def number(value: R, like: torch.Tensor) -> R | torch.Tensor:
    """A number as an operand for `like`: from the third time on as a tensor, which is faster.

    The number itself if a tensor would round differently, or is not the same (minus zero).
    """
    return value if type(value) is not float or value == 0 else bound(value, like)


@implements(_tensor)
def bound(value: R, like: torch.Tensor) -> R | torch.Tensor:
    key = _constant_of(value, like)
    if key is None:
        return value
    found = _tensors_of_numbers.get(key)
    if found is None:
        if len(_tensors_of_numbers) >= 1024:
            _tensors_of_numbers.clear()
        # A number that occurs once, such as that of a schedule, is not worth a tensor.
        _tensors_of_numbers[key] = constant(*key) if key in _tensors_of_numbers else None
        return value
    return found


def operand(value: R, like: torch.Tensor) -> R | torch.Tensor:
    """A number as an operand for `like`: as a tensor, if that gives the same bits."""
    key = _constant_of(value, like)
    return constant(*key) if key is not None and value else value


def _constant_of(
    value: object, like: torch.Tensor
) -> tuple[float, torch.dtype, torch.device] | None:
    """The arguments of `constant` for a number next to `like`; None if it has other bits there."""
    if type(value) is int and -(1 << 24) <= value <= 1 << 24:
        value = float(value)
    # PyTorch has an error for a number beyond the dtype's.
    if type(value) is not float or not -_MOST < value < _MOST:
        return None
    dtype = C_dtype(like)
    return (value, dtype, C_device(like)) if dtype in _WIDE else None


_MOST = torch.finfo(torch.float32).max
_WIDE = (torch.float32, torch.float64)


@functools.lru_cache(maxsize=4096)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number as a read-only tensor: operations are faster with a tensor than with a number.

    Minus zero gives zero: it equals zero, so both are one entry of the cache.
    """
    with outside_inference_mode():
        return read_only(torch.tensor(value or 0.0, dtype=dtype, device=device))


def read_only(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, marked as one that nobody changes: what is recorded may refer to it."""
    tensor._is_constant = True  # type: ignore[attr-defined]
    return tensor
