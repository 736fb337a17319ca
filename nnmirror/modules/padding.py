"""The pads: `nnmirror.functional.pad` as modules.

`padding` is a number for all sides, or one for each: left, right, top, bottom, front, back. A
negative one crops.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as F
from ..overrides import dim_of, is_subclass
from ..rules import padding as rules
from .layer import Layer
from .module import keeps_call
from .utils import _ntuple, _size_2_t, _size_4_t, _size_6_t

__all__ = [
    "CircularPad1d",
    "CircularPad2d",
    "CircularPad3d",
    "ConstantPad1d",
    "ConstantPad2d",
    "ConstantPad3d",
    "ReflectionPad1d",
    "ReflectionPad2d",
    "ReflectionPad3d",
    "ReplicationPad1d",
    "ReplicationPad2d",
    "ReplicationPad3d",
    "ZeroPad1d",
    "ZeroPad2d",
    "ZeroPad3d",
]


class _PadNd(Layer):
    """dx = g summed over the places that an element was copied to; see `nnmirror.rules.padding`."""

    __constants__ = ["padding"]
    padding: Sequence[int]
    _mode = "constant"
    _sides: int  # twice the number of padded dimensions

    def __init__(self, padding: int | Sequence[int]) -> None:
        super().__init__()
        self.padding = _ntuple(self._sides)(padding)

    def _check_input_dim(self, input: Tensor) -> None:
        """Raise for an input with a wrong number of dimensions, where PyTorch's module checks
        it."""

    def _value(self) -> float | None:
        return None

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        if type(input) is tuple:
            return self._run_stacked(input, self.forward)  # type: ignore[return-value]
        self._check_input_dim(input)
        how = self.padding, self._mode, self._value()
        if is_subclass(input):
            return self._run_whole(F.pad, input, *how)  # type: ignore[no-any-return]
        if not isinstance(input, torch.Tensor):
            return F.pad(input, *how)  # PyTorch's error
        return self._run(*rules.recorded_as(input, *how))

    def extra_repr(self) -> str:
        return f"{self.padding}"


class _ConstantPadNd(_PadNd):
    __constants__ = ["padding", "value"]
    value: float

    def __init__(self, padding: int | Sequence[int], value: float) -> None:
        super().__init__(padding)
        self.value = value

    def _value(self) -> float | None:
        return self.value

    def extra_repr(self) -> str:
        return f"padding={self.padding}, value={self.value}"


class _CircularPadNd(_PadNd):
    _mode = "circular"

    def _check_input_dim(self, input: Tensor) -> None:
        n = self._sides // 2
        if dim_of(input) != n + 1 and dim_of(input) != n + 2:  # called twice, as by PyTorch
            raise ValueError(f"expected {n + 1}D or {n + 2}D input (got {input.dim()}D input)")


class _ReflectionPadNd(_PadNd):
    _mode = "reflect"


class _ReplicationPadNd(_PadNd):
    _mode = "replicate"


class ConstantPad1d(_ConstantPadNd):
    """Pad the last dimension with `value`."""

    _sides = 2

    def __init__(self, padding: _size_2_t, value: float) -> None:
        super().__init__(padding, value)


class ConstantPad2d(_ConstantPadNd):
    """Pad the last two dimensions with `value`."""

    _sides = 4

    def __init__(self, padding: _size_4_t, value: float) -> None:
        super().__init__(padding, value)


class ConstantPad3d(_ConstantPadNd):
    """Pad the last three dimensions with `value`."""

    _sides = 6

    def __init__(self, padding: _size_6_t, value: float) -> None:
        super().__init__(padding, value)


class ZeroPad1d(ConstantPad1d):
    """Pad the last dimension with zeros."""

    def __init__(self, padding: _size_2_t) -> None:
        super().__init__(padding, 0.0)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class ZeroPad2d(ConstantPad2d):
    """Pad the last two dimensions with zeros."""

    def __init__(self, padding: _size_4_t) -> None:
        super().__init__(padding, 0.0)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class ZeroPad3d(ConstantPad3d):
    """Pad the last three dimensions with zeros."""

    def __init__(self, padding: _size_6_t) -> None:
        super().__init__(padding, 0.0)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class ReflectionPad1d(_ReflectionPadNd):
    """Pad the last dimension by reflection."""

    _sides = 2

    def __init__(self, padding: _size_2_t) -> None:
        super().__init__(padding)


class ReflectionPad2d(_ReflectionPadNd):
    """Pad the last two dimensions by reflection."""

    _sides = 4

    def __init__(self, padding: _size_4_t) -> None:
        super().__init__(padding)


class ReflectionPad3d(_ReflectionPadNd):
    """Pad the last three dimensions by reflection."""

    _sides = 6

    def __init__(self, padding: _size_6_t) -> None:
        super().__init__(padding)


class ReplicationPad1d(_ReplicationPadNd):
    """Pad the last dimension by replicating the border."""

    _sides = 2

    def __init__(self, padding: _size_2_t) -> None:
        super().__init__(padding)


class ReplicationPad2d(_ReplicationPadNd):
    """Pad the last two dimensions by replicating the border."""

    _sides = 4

    def __init__(self, padding: _size_4_t) -> None:
        super().__init__(padding)


class ReplicationPad3d(_ReplicationPadNd):
    """Pad the last three dimensions by replicating the border."""

    _sides = 6

    def __init__(self, padding: _size_6_t) -> None:
        super().__init__(padding)


class CircularPad1d(_CircularPadNd):
    """Pad the last dimension circularly."""

    _sides = 2

    def __init__(self, padding: _size_2_t) -> None:
        super().__init__(padding)


class CircularPad2d(_CircularPadNd):
    """Pad the last two dimensions circularly."""

    _sides = 4

    def __init__(self, padding: _size_4_t) -> None:
        super().__init__(padding)


class CircularPad3d(_CircularPadNd):
    """Pad the last three dimensions circularly."""

    _sides = 6

    def __init__(self, padding: _size_6_t) -> None:
        super().__init__(padding)
