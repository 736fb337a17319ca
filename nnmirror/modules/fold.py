"""Fold and Unfold."""

from torch import Tensor

from .. import functional as F
from .layer import Layer
from .module import keeps_call
from .utils import _size_any_t

__all__ = ["Fold", "Unfold"]


class Fold(Layer):
    """Sum columns (N, C K K, L) or (C K K, L) into images (N, C, *output_size).  dx = g there.

    The reverse of `Unfold` with the same arguments: each column is added at its window.
    """

    __constants__ = ["output_size", "kernel_size", "dilation", "padding", "stride"]

    def __init__(
        self,
        output_size: _size_any_t,
        kernel_size: _size_any_t,
        dilation: _size_any_t = 1,
        padding: _size_any_t = 0,
        stride: _size_any_t = 1,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.padding = padding
        self.stride = stride

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        how = self.output_size, self.kernel_size, self.dilation, self.padding, self.stride
        return self._run_several(lambda x: F.fold(x, *how), (input,))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, kernel_size={self.kernel_size},"
            f" dilation={self.dilation}, padding={self.padding}, stride={self.stride}"
        )


class Unfold(Layer):
    """Images (N, C, H, W) or (C, H, W) to columns (N, C K K, L).  dx = g, added at each window.

    A column holds the elements in one of the L windows of a convolution with these arguments.
    """

    __constants__ = ["kernel_size", "dilation", "padding", "stride"]

    def __init__(
        self,
        kernel_size: _size_any_t,
        dilation: _size_any_t = 1,
        padding: _size_any_t = 0,
        stride: _size_any_t = 1,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.padding = padding
        self.stride = stride

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        how = self.kernel_size, self.dilation, self.padding, self.stride
        return self._run_several(lambda x: F.unfold(x, *how), (input,))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, padding={self.padding},"
            f" stride={self.stride}"
        )
