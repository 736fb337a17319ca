"""Flatten and Unflatten."""

import torch
from torch import Tensor

from ..overrides import is_subclass
from ..rules.shape import Reshape, View
from .layer import Layer
from .linear import passed_on
from .module import keeps_call

__all__ = ["Flatten", "Unflatten"]


class _Reshaping(Layer):
    """dx = g with the shape of x."""

    def _target(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        if type(input) is tuple:
            return self._run_stacked(input, self.forward)  # type: ignore[return-value]
        if is_subclass(input):
            return self._run_whole(self._target, input)  # type: ignore[no-any-return]
        plain = input.detach() if isinstance(input, Tensor) else input
        shown = self._target(plain)
        if shown.shape == input.shape:
            self.__dict__["_call"] = passed_on
            return input
        return self._run(View if shown._is_view() else Reshape, input, tuple(shown.shape))


class Flatten(_Reshaping):
    """y = x with the dimensions from `start_dim` to `end_dim` made one.  dx = g, shaped back."""

    __constants__ = ["end_dim", "start_dim"]
    start_dim: int
    end_dim: int

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def _target(self, input: Tensor) -> Tensor:
        return input.flatten(self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Unflatten(_Reshaping):
    """y = x with dimension `dim` shaped to `unflattened_size`.  dx = g, shaped back."""

    __constants__ = ["dim", "unflattened_size"]
    dim: int
    unflattened_size: torch.Size | list[int] | tuple[int, ...]

    def __init__(
        self, dim: int, unflattened_size: torch.Size | list[int] | tuple[int, ...]
    ) -> None:
        super().__init__()
        if not isinstance(unflattened_size, tuple | list):
            raise TypeError(
                "unflattened_size must be a tuple of ints, but found type"
                f" {type(unflattened_size).__name__}"
            )
        for place, size in enumerate(unflattened_size):
            if not isinstance(size, int):
                raise TypeError(
                    "unflattened_size must be tuple of ints, but found element of type"
                    f" {type(size).__name__} at pos {place}"
                )
        self.dim = dim
        self.unflattened_size = unflattened_size

    def _target(self, input: Tensor) -> Tensor:
        return input.unflatten(self.dim, self.unflattened_size)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, unflattened_size={self.unflattened_size}"
