"""PixelShuffle and PixelUnshuffle."""

from torch import Tensor

from .. import functional as F
from .layer import Layer
from .module import records_once

__all__ = ["PixelShuffle", "PixelUnshuffle"]


class PixelShuffle(Layer):
    """(*, C r^2, H, W) to (*, C, H r, W r), r = `upscale_factor`:  dx = g, moved back.

    y[c, h r + i, w r + j] = x[(c r + i) r + j, h, w] (Shi et al., 2016).
    """

    __constants__ = ["upscale_factor"]
    upscale_factor: int

    def __init__(self, upscale_factor: int) -> None:
        super().__init__()
        self.upscale_factor = upscale_factor

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(F.PixelShuffle, input, self.upscale_factor)

    def extra_repr(self) -> str:
        return f"upscale_factor={self.upscale_factor}"


class PixelUnshuffle(Layer):
    """(*, C, H r, W r) to (*, C r^2, H, W), r = `downscale_factor`:  dx = g, moved back.

    The reverse of `PixelShuffle`.
    """

    __constants__ = ["downscale_factor"]
    downscale_factor: int

    def __init__(self, downscale_factor: int) -> None:
        super().__init__()
        self.downscale_factor = downscale_factor

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(F.PixelUnshuffle, input, self.downscale_factor)

    def extra_repr(self) -> str:
        return f"downscale_factor={self.downscale_factor}"
