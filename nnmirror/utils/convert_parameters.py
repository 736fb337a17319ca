"""Parameters as one vector, and back."""

from collections.abc import Iterable

import torch

from .._torch import DisableTorchFunctionSubclass
from ..parameter import Parameter
from ..tensor import C_device, C_dtype, C_shape, C_stride, move


def parameters_to_vector(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """All elements as one vector, whose gradient flows into the parameters."""
    parameters = list(parameters)
    with DisableTorchFunctionSubclass():
        _on_one_device(parameters)
    return torch.cat([param.view(-1) for param in parameters])


def vector_to_parameters(vec: torch.Tensor, parameters: Iterable[torch.Tensor]) -> None:
    """Make the parameters views of the pieces of `vec`."""
    if not isinstance(vec, torch.Tensor):
        raise TypeError(f"expected torch.Tensor, but got: {torch.typename(vec)}")
    parameters = list(parameters)
    start = 0
    with DisableTorchFunctionSubclass():  # nothing of it is recorded
        _on_one_device(parameters)
        sizes = [param.numel() for param in parameters]
        if vec.dim() == 1 and vec.is_contiguous() and vec.numel() >= sum(sizes):
            memory = vec.data
            for param, size in zip(parameters, sizes, strict=True):
                _make_view(param, memory, start, size)
                start += size
            return
        for param, count in zip(parameters, sizes, strict=True):  # with PyTorch's errors
            param.data = vec[start : start + count].view(param.shape).data
            start += count


def _make_view(param: torch.Tensor, memory: torch.Tensor, start: int, size: int) -> None:
    shape, strides = C_shape(param), C_stride(param)
    by_rows = (1,) if len(shape) == 1 else (shape[-1], 1) if len(shape) == 2 else None
    if (
        strides == by_rows
        and type(param) is Parameter
        and C_dtype(param) is memory.dtype
        and C_device(param) == memory.device
    ):
        move(param, memory.as_strided(shape, strides, memory.storage_offset() + start))
    else:
        param.data = memory[start : start + size].view(shape)


def _on_one_device(parameters: list[torch.Tensor]) -> None:
    if len({p.device for p in parameters}) > 1:
        raise TypeError(
            "Found two parameters on different devices, this is currently not supported."
        )
