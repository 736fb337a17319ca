"""Upsample, and its forms for images."""

from typing import Any

from torch import Tensor

from .. import functional as F
from .layer import Layer
from .module import keeps_call
from .utils import _ratio_2_t, _ratio_any_t, _size_2_t, _size_any_t

__all__ = ["Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"]


class Upsample(Layer):
    """Resize images (N, C, ...) to `size`, or by `scale_factor`.

    y is x multiplied by a matrix W_d along each spatial dimension d:  dx is g multiplied by W_d^T.
    `mode` is "nearest", "linear", "bilinear", "bicubic" or "trilinear"; with `align_corners=True`
    the corner elements of both are at the same place.
    """

    __constants__ = [
        "size",
        "scale_factor",
        "mode",
        "align_corners",
        "name",
        "recompute_scale_factor",
    ]
    name: str
    size: _size_any_t | None
    scale_factor: _ratio_any_t | None
    mode: str
    align_corners: bool | None
    recompute_scale_factor: bool | None

    def __init__(
        self,
        size: _size_any_t | None = None,
        scale_factor: _ratio_any_t | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.size = size
        if isinstance(scale_factor, tuple):
            self.scale_factor = tuple([float(factor) for factor in scale_factor])
        else:
            self.scale_factor = float(scale_factor) if scale_factor else None
        self.mode = mode
        self.align_corners = align_corners
        self.recompute_scale_factor = recompute_scale_factor

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run_several(self._interpolated, (input,))  # type: ignore[no-any-return]

    def _interpolated(self, input: Tensor) -> Tensor:
        size, scale, again = self.size, self.scale_factor, self.recompute_scale_factor
        return F.interpolate(input, size, scale, self.mode, self.align_corners, again)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state.setdefault("recompute_scale_factor", True)
        super().__setstate__(state)

    def extra_repr(self) -> str:
        by = "size" if self.scale_factor is None else "scale_factor"
        return f"{by}={getattr(self, by)!r}, mode={self.mode!r}"


class UpsamplingNearest2d(Upsample):
    """`Upsample` of (N, C, H, W) with `mode="nearest"`."""

    def __init__(
        self, size: _size_2_t | None = None, scale_factor: _ratio_2_t | None = None
    ) -> None:
        super().__init__(size, scale_factor, mode="nearest")


class UpsamplingBilinear2d(Upsample):
    """`Upsample` of (N, C, H, W) with `mode="bilinear"` and `align_corners=True`."""

    def __init__(
        self, size: _size_2_t | None = None, scale_factor: _ratio_2_t | None = None
    ) -> None:
        super().__init__(size, scale_factor, mode="bilinear", align_corners=True)
