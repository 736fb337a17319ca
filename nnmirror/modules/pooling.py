"""Pooling in one, two and three dimensions."""

from typing import Any, Optional, Union

from torch import Tensor

from .. import functional as F
from .._types import TorchFunction
from ..operation import Operation
from ..overrides import is_subclass
from ..rules import pooling as rules
from .layer import Layer
from .module import keeps_call, records_once
from .utils import (
    _ntuple,
    _ratio_2_t,
    _ratio_any_t,
    _single,
    _size_1_t,
    _size_2_t,
    _size_3_t,
    _size_any_t,
)

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "FractionalMaxPool2d",
    "FractionalMaxPool3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
]

# As they are written in PyTorch's signatures.
_size_any_opt_t = Union[int, None, tuple[int | None, ...]]  # noqa: UP007
_ratio_3_t = Union[float, tuple[float, float, float]]  # noqa: UP007


class _Pool(Layer):
    """The base of the pools: `_pooled` is the function of the input alone."""

    _function: TorchFunction
    _rule: type[Operation] | None = None  # if that is a single recorded call

    def _pooled(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _run(self, function: type[Operation] | None, *args: Any) -> Any:
        input = args[0]
        if function is not None and isinstance(input, Tensor) and not is_subclass(input):
            return super()._run(function, *args)
        if isinstance(input, Tensor | tuple):
            return self._run_several(self._pooled, (input,))
        return self._pooled(input)

    _run._records_once = True  # type: ignore[attr-defined]


class _MaxPoolNd(_Pool):
    __constants__ = ["kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"]
    return_indices: bool
    ceil_mode: bool

    def __init__(
        self,
        kernel_size: _size_any_t,
        stride: Optional[_size_any_t] = None,  # noqa: UP045
        padding: _size_any_t = 0,
        dilation: _size_any_t = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride if stride is not None else kernel_size
        self.padding = padding
        self.dilation = dilation
        self.return_indices = return_indices
        self.ceil_mode = ceil_mode

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding},"
            f" dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )

    def _pooled(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        how = self.kernel_size, self.stride, self.padding, self.dilation
        more = {"ceil_mode": self.ceil_mode, "return_indices": self.return_indices}
        return type(self)._function(input, *how, **more)

    @records_once
    def forward(self, input: Tensor):  # type: ignore[no-untyped-def]
        rule = (
            None if self.return_indices else rules.MAX.get(int(type(self)._function.__name__[-2]))
        )
        how = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        return self._run(None if rule is None else rule[0], input, *how)


class MaxPool1d(_MaxPoolNd):
    """y = the maximum of x in each window, x (N, C, L) or (C, L).  dx = g, added at the maximum.

    A window has `kernel_size` elements, `dilation` apart; windows start `stride` apart (default:
    `kernel_size`). x is padded with `padding` elements of -inf on both sides; with `ceil_mode` the
    last window may extend beyond them. `return_indices=True` also returns the positions of the
    maxima, for `MaxUnpool1d`.  Saved: the positions, and x.
    """

    _function = staticmethod(F.max_pool1d)


class MaxPool2d(_MaxPoolNd):
    """y = the maximum of x in each window, x (N, C, H, W) or (C, H, W).  dx = g, added there.

    The arguments are those of `MaxPool1d`, each one number for both dimensions or two.
    """

    _function = staticmethod(F.max_pool2d)
    _rule = rules.MAX[2][0]


class MaxPool3d(_MaxPoolNd):
    """y = the maximum of x in each window, x (N, C, D, H, W) or (C, D, H, W).  dx = g, added there.

    The arguments are those of `MaxPool1d`, each one number for all dimensions or three.
    """

    _function = staticmethod(F.max_pool3d)
    _rule = rules.MAX[3][0]


class _MaxUnpoolNd(Layer):
    _function: TorchFunction
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def _set(
        self, n: int, kernel_size: _size_any_t, stride: _size_any_t | None, padding: _size_any_t
    ) -> None:
        each = _ntuple(n)
        self.kernel_size = each(kernel_size)
        self.stride = each(stride if stride is not None else kernel_size)
        self.padding = each(padding)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"

    @keeps_call
    def forward(
        self, input: Tensor, indices: Tensor, output_size: list[int] | None = None
    ) -> Tensor:
        function, how = type(self)._function, (self.kernel_size, self.stride, self.padding)

        def unpooled(x: Tensor, indices: Tensor) -> Tensor:
            return function(x, indices, *how, output_size)  # type: ignore[no-any-return]

        return self._run_several(unpooled, (input,), (indices,))  # type: ignore[no-any-return]


class MaxUnpool1d(_MaxUnpoolNd):
    """y = x at the positions `indices`, 0 elsewhere.  dx = g there.  Saved: the indices.

    The reverse of `MaxPool1d` with the same arguments and `return_indices=True`. Several input
    sizes give the same pooled size: `output_size` in `forward` selects one.
    """

    _function = staticmethod(F.max_unpool1d)

    def __init__(
        self,
        kernel_size: _size_1_t,
        stride: Optional[_size_1_t] = None,  # noqa: UP045
        padding: _size_1_t = 0,
    ) -> None:
        super().__init__()
        self._set(1, kernel_size, stride, padding)


class MaxUnpool2d(_MaxUnpoolNd):
    """y = x at the positions `indices`, 0 elsewhere, as `MaxUnpool1d`."""

    _function = staticmethod(F.max_unpool2d)

    def __init__(
        self,
        kernel_size: _size_2_t,
        stride: Optional[_size_2_t] = None,  # noqa: UP045
        padding: _size_2_t = 0,
    ) -> None:
        super().__init__()
        self._set(2, kernel_size, stride, padding)


class MaxUnpool3d(_MaxUnpoolNd):
    """y = x at the positions `indices`, 0 elsewhere, as `MaxUnpool1d`."""

    _function = staticmethod(F.max_unpool3d)

    def __init__(
        self,
        kernel_size: _size_3_t,
        stride: Optional[_size_3_t] = None,  # noqa: UP045
        padding: _size_3_t = 0,
    ) -> None:
        super().__init__()
        self._set(3, kernel_size, stride, padding)


class _AvgPoolNd(_Pool):
    __constants__ = ["kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"]
    kernel_size: _size_any_t
    stride: _size_any_t
    padding: _size_any_t
    ceil_mode: bool
    count_include_pad: bool

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"

    def _how(self) -> tuple[object, ...]:
        return self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad

    def _pooled(self, input: Tensor) -> Tensor:
        return type(self)._function(input, *self._how())

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(self._rule, input, *self._how())  # type: ignore[no-any-return]


class AvgPool1d(_AvgPoolNd):
    """y = (sum of x in each window) / n, x (N, C, L) or (C, L).  dx = g / n, added in each window.

    The windows are those of `MaxPool1d` without dilation, and the padding is zero. n is the length
    of a window; with `count_include_pad=False` the padding in it is not counted.
    """

    _function = staticmethod(F.avg_pool1d)

    def __init__(
        self,
        kernel_size: _size_1_t,
        stride: _size_1_t = None,  # type: ignore[assignment]
        padding: _size_1_t = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        super().__init__()
        self.kernel_size = _single(kernel_size)
        self.stride = _single(stride if stride is not None else kernel_size)
        self.padding = _single(padding)
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad


class _AvgPoolOverridden(_AvgPoolNd):
    __constants__ = [*_AvgPoolNd.__constants__, "divisor_override"]
    divisor_override: int | None

    def _how(self) -> tuple[object, ...]:
        return *super()._how(), self.divisor_override

    def _set(
        self,
        kernel_size: _size_any_t,
        stride: _size_any_t | None,
        padding: _size_any_t,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> None:
        self.kernel_size = kernel_size
        self.stride = stride if stride is not None else kernel_size
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override


class AvgPool2d(_AvgPoolOverridden):
    """y = (sum of x in each window) / n, x (N, C, H, W) or (C, H, W).  dx = g / n, added over each.

    As `AvgPool1d`, each argument one number for both dimensions or two; `divisor_override`
    replaces n.
    """

    _function = staticmethod(F.avg_pool2d)
    _rule = rules.AVG[2]

    def __init__(
        self,
        kernel_size: _size_2_t,
        stride: Optional[_size_2_t] = None,  # noqa: UP045
        padding: _size_2_t = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        super().__init__()
        more = ceil_mode, count_include_pad, divisor_override
        self._set(kernel_size, stride, padding, *more)


class AvgPool3d(_AvgPoolOverridden):
    """y = (sum of x in each window) / n, x (N, C, D, H, W) or (C, D, H, W).  dx = g / n, added.

    As `AvgPool2d`, each argument one number for all dimensions or three.
    """

    _function = staticmethod(F.avg_pool3d)
    _rule = rules.AVG[3]

    def __init__(
        self,
        kernel_size: _size_3_t,
        stride: Optional[_size_3_t] = None,  # noqa: UP045
        padding: _size_3_t = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        super().__init__()
        more = ceil_mode, count_include_pad, divisor_override
        self._set(kernel_size, stride, padding, *more)

    def __setstate__(self, d):  # type: ignore[no-untyped-def]
        super().__setstate__(d)
        self.__dict__.setdefault("padding", 0)
        self.__dict__.setdefault("ceil_mode", False)
        self.__dict__.setdefault("count_include_pad", True)


class _FractionalMaxPoolNd(_Pool):
    __constants__ = ["kernel_size", "return_indices", "output_size", "output_ratio"]
    kernel_size: tuple[int, ...]
    return_indices: bool
    output_size: tuple[int, ...] | None
    output_ratio: tuple[float, ...] | None

    def _set(
        self,
        n: int,
        kernel_size: _size_any_t,
        size: _size_any_t | None,
        ratio: _ratio_any_t | None,
        return_indices: bool,
        samples: Tensor | None,
    ) -> None:
        each = _ntuple(n)
        self.kernel_size = each(kernel_size)
        self.return_indices = return_indices
        self.register_buffer("_random_samples", samples)
        self.output_size = each(size) if size is not None else None
        self.output_ratio = each(ratio) if ratio is not None else None
        if size is None and ratio is None:
            raise ValueError(
                f"FractionalMaxPool{n}d requires specifying either an output size, or a pooling"
                " ratio"
            )
        if size is not None and ratio is not None:
            raise ValueError("only one of output_size and output_ratio may be specified")
        if self.output_ratio is not None and not all(
            0 < self.output_ratio[i] < 1 for i in range(n)
        ):
            raise ValueError(f"output_ratio must be between 0 and 1 (got {ratio})")

    def _pooled(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        how = self.kernel_size, self.output_size, self.output_ratio, self.return_indices
        return type(self)._function(input, *how, _random_samples=self._random_samples)

    @keeps_call
    def forward(self, input: Tensor):  # type: ignore[no-untyped-def]
        return self._run(None, input)


class FractionalMaxPool2d(_FractionalMaxPoolNd):
    """y = the maximum of x in random windows (Graham, 2014).  dx = g, added at the maximum.

    There are `output_size` windows, or `output_ratio` times the size of x; each call draws new
    ones.  Saved: the positions, and x.
    """

    _function = staticmethod(F.fractional_max_pool2d)

    def __init__(  # type: ignore[no-untyped-def]
        self,
        kernel_size: _size_2_t,
        output_size: Optional[_size_2_t] = None,  # noqa: UP045
        output_ratio: Optional[_ratio_2_t] = None,  # noqa: UP045
        return_indices: bool = False,
        _random_samples=None,
    ) -> None:
        super().__init__()
        self._set(2, kernel_size, output_size, output_ratio, return_indices, _random_samples)


class FractionalMaxPool3d(_FractionalMaxPoolNd):
    """y = the maximum of x in random windows, as `FractionalMaxPool2d`."""

    _function = staticmethod(F.fractional_max_pool3d)

    def __init__(  # type: ignore[no-untyped-def]
        self,
        kernel_size: _size_3_t,
        output_size: Optional[_size_3_t] = None,  # noqa: UP045
        output_ratio: Optional[_ratio_3_t] = None,  # noqa: UP045
        return_indices: bool = False,
        _random_samples=None,
    ) -> None:
        super().__init__()
        sizes = kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size,)
        if all(isinstance(k, int) for k in sizes) and not all(k > 0 for k in sizes):
            raise ValueError(f"kernel_size must be greater than 0, but got {kernel_size}")
        self._set(3, kernel_size, output_size, output_ratio, return_indices, _random_samples)


class _LPPoolNd(_Pool):
    __constants__ = ["norm_type", "kernel_size", "stride", "ceil_mode"]
    norm_type: float
    ceil_mode: bool

    def __init__(
        self,
        norm_type: float,
        kernel_size: _size_any_t,
        stride: Optional[_size_any_t] = None,  # noqa: UP045
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.norm_type = norm_type
        self.kernel_size = kernel_size
        self.stride = stride
        self.ceil_mode = ceil_mode

    def extra_repr(self) -> str:
        return (
            f"norm_type={self.norm_type}, kernel_size={self.kernel_size}, stride={self.stride},"
            f" ceil_mode={self.ceil_mode}"
        )

    def _pooled(self, input: Tensor) -> Tensor:
        how = float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode
        return type(self)._function(input, *how)

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run(None, input)  # type: ignore[no-any-return]


class LPPool1d(_LPPoolNd):
    """y = (sum of x^p in each window)^(1/p), p = `norm_type`; for p = inf the maximum of |x|.

    The windows are those of `AvgPool1d`. It is composed of operations that have rules.
    """

    _function = staticmethod(F.lp_pool1d)


class LPPool2d(_LPPoolNd):
    """y = (sum of x^p in each window)^(1/p), as `LPPool1d`."""

    _function = staticmethod(F.lp_pool2d)


class LPPool3d(_LPPoolNd):
    """y = (sum of x^p in each window)^(1/p), as `LPPool1d`."""

    _function = staticmethod(F.lp_pool3d)


class _AdaptiveMaxPoolNd(_Pool):
    __constants__ = ["output_size", "return_indices"]
    return_indices: bool

    def __init__(self, output_size: _size_any_opt_t, return_indices: bool = False) -> None:
        super().__init__()
        self.output_size = output_size
        self.return_indices = return_indices

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"

    def _pooled(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return type(self)._function(input, self.output_size, self.return_indices)

    @keeps_call
    def forward(self, input: Tensor):  # type: ignore[no-untyped-def]
        return self._run(None, input)


class AdaptiveMaxPool1d(_AdaptiveMaxPoolNd):
    """y = the maximum of x in `output_size` windows.  dx = g, added at the maximum.

    Window i of o goes from i L / o, rounded down, to (i + 1) L / o, rounded up. With
    `return_indices=True` the positions are returned too.  Saved: the positions, and x.
    """

    _function = staticmethod(F.adaptive_max_pool1d)


class AdaptiveMaxPool2d(_AdaptiveMaxPoolNd):
    """y = the maximum of x in `output_size` windows, as `AdaptiveMaxPool1d`.

    None in `output_size` is the size of x.
    """

    _function = staticmethod(F.adaptive_max_pool2d)


class AdaptiveMaxPool3d(_AdaptiveMaxPoolNd):
    """y = the maximum of x in `output_size` windows, as `AdaptiveMaxPool2d`."""

    _function = staticmethod(F.adaptive_max_pool3d)


class _AdaptiveAvgPoolNd(_Pool):
    __constants__ = ["output_size"]

    def __init__(self, output_size: _size_any_opt_t) -> None:
        super().__init__()
        self.output_size = output_size

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"

    def _pooled(self, input: Tensor) -> Tensor:
        return type(self)._function(input, self.output_size)

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run(None, input)  # type: ignore[no-any-return]


class AdaptiveAvgPool1d(_AdaptiveAvgPoolNd):
    """y = the mean of x in `output_size` windows of n elements.  dx = g / n, added in each.

    The windows are those of `AdaptiveMaxPool1d`.
    """

    _function = staticmethod(F.adaptive_avg_pool1d)


class AdaptiveAvgPool2d(_AdaptiveAvgPoolNd):
    """y = the mean of x in `output_size` windows, as `AdaptiveAvgPool1d`.

    None in `output_size` is the size of x.
    """

    _function = staticmethod(F.adaptive_avg_pool2d)


class AdaptiveAvgPool3d(_AdaptiveAvgPoolNd):
    """y = the mean of x in `output_size` windows, as `AdaptiveAvgPool2d`."""

    _function = staticmethod(F.adaptive_avg_pool3d)
