"""Parameters as one vector, and back."""

from collections.abc import Iterable

import torch

from .._torch import DisableTorchFunctionSubclass
from ..tensor import C_shape


def parameters_to_vector(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """All elements as one vector, whose gradient flows into the parameters."""
    parameters = list(parameters)
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
            pieces = vec.data.split_with_sizes([*sizes, vec.numel() - sum(sizes)])
            for param, piece in zip(parameters, pieces, strict=False):
                param.data = piece.view(C_shape(param))
            return
        for param, count in zip(parameters, sizes, strict=True):  # with PyTorch's errors
            param.data = vec[start : start + count].view(param.shape).data
            start += count


def _on_one_device(parameters: list[torch.Tensor]) -> None:
    if len({p.device for p in parameters}) > 1:
        raise TypeError(
            "Found two parameters on different devices, this is currently not supported."
        )
