"""Convolutions in one, two and three dimensions, and transposed ones."""

import math
from typing import Any, Literal, Union

import torch
from torch import Tensor
from torch.types import Device

from .. import functional as F
from .. import init
from .._torch import DisableTorchFunctionSubclass
from .._types import TorchFunction
from ..grad_mode import no_grad_at_all
from ..operation import Operation
from ..overrides import is_subclass
from ..parameter import Parameter, UninitializedParameter
from ..rules.convolution import Convolution
from .layer import Layer
from .lazy import LazyModuleMixin
from .module import records_once
from .utils import _ntuple, _size_1_t, _size_2_t, _size_3_t, _size_any_t

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
]

_Mode = Literal["zeros", "reflect", "replicate", "circular"]
_MODES = {"zeros", "reflect", "replicate", "circular"}


class _ConvNd(Layer):
    """The base of all convolutions: arguments, weight and bias.

    `weight` (out_channels, in_channels / groups, *kernel_size), for a transposed one
    (in_channels, out_channels / groups, *kernel_size), and `bias` (out_channels) are drawn from
    U(-k, k) with k = 1 / sqrt(in_channels / groups times the size of the kernel), as by PyTorch.
    """

    __constants__ = [
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "output_padding",
        "in_channels",
        "out_channels",
        "kernel_size",
    ]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: _Mode
    weight: Tensor
    bias: Tensor | None
    _function: TorchFunction

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        padding: str | tuple[int, ...],
        dilation: tuple[int, ...],
        transposed: bool,
        output_padding: tuple[int, ...],
        groups: int,
        bias: bool,
        padding_mode: _Mode,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups <= 0:
            raise ValueError("groups must be a positive integer")
        if in_channels % groups != 0:
            raise ValueError("in_channels must be divisible by groups")
        if out_channels % groups != 0:
            raise ValueError("out_channels must be divisible by groups")
        if isinstance(padding, str):
            known = {"same", "valid"}
            if padding not in known:
                raise ValueError(f"Invalid padding string {padding!r}, should be one of {known}")
            if padding == "same" and any(s != 1 for s in stride):
                raise ValueError("padding='same' is not supported for strided convolutions")
        if padding_mode not in _MODES:
            raise ValueError(
                f"padding_mode must be one of {_MODES}, but got padding_mode='{padding_mode}'"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.transposed = transposed
        self.output_padding = output_padding
        self.groups = groups
        self.padding_mode = padding_mode
        # What `F.pad` takes, the last dimension first.
        if isinstance(padding, str):
            total = [
                d * (k - 1) if padding == "same" else 0
                for d, k in zip(dilation, kernel_size, strict=False)
            ]
            sides = [(t // 2, t - t // 2) for t in total]
            sides += [(0, 0)] * (len(kernel_size) - len(total))
        else:
            sides = [(p, p) for p in padding]
        twice = [side for pair in reversed(sides) for side in pair]
        self._reversed_padding_repeated_twice = twice if isinstance(padding, str) else tuple(twice)

        channels = (
            (in_channels, out_channels // groups)
            if transposed
            else (out_channels, in_channels // groups)
        )
        size = (*channels, *kernel_size)
        self.weight = Parameter(torch.empty(size, device=device, dtype=dtype))
        if bias:
            self.bias = Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        # U(-k, k), reached as PyTorch reaches it, so that the same seed gives the same bits.
        weight = self.weight
        if weight.is_contiguous():
            init.kaiming_uniform_(weight, a=math.sqrt(5))
        else:  # the numbers are drawn in the order of memory
            drawn = torch.empty_like(weight.detach(), memory_format=torch.contiguous_format)
            init.kaiming_uniform_(drawn, a=math.sqrt(5))
            with no_grad_at_all():
                weight.copy_(drawn)
        if self.bias is not None:
            fan_in = init._calculate_fan_in_and_fan_out(weight)[0]
            bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
            init.uniform_(self.bias, -bound, bound)

    def extra_repr(self):  # type: ignore[no-untyped-def]
        said = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        said += f", stride={self.stride}"
        if self.padding != (0,) * len(self.padding):
            said += f", padding={self.padding}"
        if self.dilation != (1,) * len(self.dilation):
            said += f", dilation={self.dilation}"
        if self.output_padding != (0,) * len(self.output_padding):
            said += f", output_padding={self.output_padding}"
        if self.groups != 1:
            said += f", groups={self.groups}"
        if self.bias is None:
            said += ", bias=False"
        if self.padding_mode != "zeros":
            said += f", padding_mode={self.padding_mode}"
        return said

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "padding_mode"):
            self.padding_mode = "zeros"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `forward` does with this weight and bias; a subclass may override it, or call it
        with others."""
        padding = self.padding
        if self.padding_mode != "zeros":
            twice = self._reversed_padding_repeated_twice
            input = F.pad(input, twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        function = type(self)._function
        return function(input, weight, bias, self.stride, padding, self.dilation, self.groups)  # type: ignore[no-any-return]

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        plain = self.padding_mode == "zeros" and type(self.padding) is tuple
        if not plain or type(self)._conv_forward is not _ConvNd._conv_forward:
            return self._run_apart(input)
        how = self.stride, self.padding, self.dilation, False, self.output_padding, self.groups
        weight: Tensor | None
        bias: Tensor | None
        own = self._parameters
        if "weight" in own and "bias" in own:  # faster than __getattr__
            weight, bias = own["weight"], own["bias"]
        else:
            weight, bias = self.weight, self.bias
        return self._run(Convolution, input, weight, bias, *how)  # type: ignore[no-any-return]

    @records_once
    def _run(self, function: type[Operation], *args: object) -> Any:
        input = args[0]
        if isinstance(input, Tensor) and not is_subclass(input):
            with DisableTorchFunctionSubclass():
                is_batch = input.dim() == len(self.kernel_size) + 2
            if is_batch:
                return super()._run(function, *args)
        elif type(input) is tuple and all(
            isinstance(x, Tensor) and x.dim() == len(self.kernel_size) + 1 for x in input
        ):
            return self._run_on_tuple(function, args)
        return self._run_apart(input)

    def _run_apart(self, input: Any, *more: list[int] | None) -> Any:
        """For a call that is not a single recorded operation on a batch."""

        def run(x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight, self.bias, *more)

        if isinstance(input, Tensor | tuple):
            return self._run_several(run, (input,))
        return run(input)


class Conv1d(_ConvNd):
    """y[n, o] = sum over c of x[n, c] * w[o, c] + b[o], with * the cross-correlation.

    x is (N, in_channels, L) or (in_channels, L), y (N, out_channels, M) or (out_channels, M),
    M = (L + 2 padding - dilation (kernel_size - 1) - 1) / stride + 1, rounded down. With `groups`
    each group of output channels is computed from one group of input channels. `padding="same"`
    keeps the length, "valid" pads nothing; `padding_mode` is "zeros", "reflect", "replicate" or
    "circular".

    dx = g * w transposed,  dw[o, c, k] = sum over n, l of g[n, o, l] x[n, c, s l + d k - p],
    db = sum of g.  Saved: x and w.  More: `nnmirror/rules/convolution.py`.
    """

    _function = staticmethod(F.conv1d)

    def __init__(  # type: ignore[no-untyped-def]
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: Union[str, _size_1_t] = 0,  # noqa: UP007
        dilation: _size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            _ntuple(1)(kernel_size),
            _ntuple(1)(stride),
            padding if isinstance(padding, str) else _ntuple(1)(padding),
            _ntuple(1)(dilation),
            False,
            (0,),
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )


class Conv2d(_ConvNd):
    """y[n, o] = sum over c of x[n, c] * w[o, c] + b[o], with * the cross-correlation.

    x is (N, in_channels, H, W) or (in_channels, H, W), y the same with out_channels; sizes and
    arguments are those of `Conv1d`, each argument one number for both dimensions or two.

    dx = g * w transposed,  dw[o, c, k] = sum over n, l of g[n, o, l] x[n, c, s l + d k - p],
    db = sum of g.  Saved: x and w.  More: `nnmirror/rules/convolution.py`.
    """

    _function = staticmethod(F.conv2d)

    def __init__(  # type: ignore[no-untyped-def]
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: Union[str, _size_2_t] = 0,  # noqa: UP007
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            _ntuple(2)(kernel_size),
            _ntuple(2)(stride),
            padding if isinstance(padding, str) else _ntuple(2)(padding),
            _ntuple(2)(dilation),
            False,
            (0, 0),
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )


class Conv3d(_ConvNd):
    """y[n, o] = sum over c of x[n, c] * w[o, c] + b[o], with * the cross-correlation.

    x is (N, in_channels, D, H, W) or (in_channels, D, H, W), y the same with out_channels; sizes
    and arguments are those of `Conv1d`, each argument one number for all dimensions or three.

    dx = g * w transposed,  dw[o, c, k] = sum over n, l of g[n, o, l] x[n, c, s l + d k - p],
    db = sum of g.  Saved: x and w.  More: `nnmirror/rules/convolution.py`.
    """

    _function = staticmethod(F.conv3d)

    def __init__(  # type: ignore[no-untyped-def]
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: Union[str, _size_3_t] = 0,  # noqa: UP007
        dilation: _size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            _ntuple(3)(kernel_size),
            _ntuple(3)(stride),
            padding if isinstance(padding, str) else _ntuple(3)(padding),
            _ntuple(3)(dilation),
            False,
            (0, 0, 0),
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )


class _ConvTransposeNd(_ConvNd):
    def __init__(
        self,
        n: int,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_any_t,
        stride: _size_any_t,
        padding: _size_any_t,
        output_padding: _size_any_t,
        groups: int,
        bias: bool,
        dilation: _size_any_t,
        padding_mode: _Mode,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(
                f'Only "zeros" padding mode is supported for {self.__class__.__name__}'
            )
        super().__init__(
            in_channels,
            out_channels,
            _ntuple(n)(kernel_size),
            _ntuple(n)(stride),
            _ntuple(n)(padding),
            _ntuple(n)(dilation),
            True,
            _ntuple(n)(output_padding),
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )

    def _output_padding(
        self,
        input: Tensor,
        output_size: list[int] | None,
        stride: list[int],
        padding: list[int],
        kernel_size: list[int],
        num_spatial_dims: int,
        dilation: list[int] | None = None,
    ) -> list[int]:
        if output_size is None:
            return _ntuple(1)(self.output_padding)  # type: ignore[return-value]
        others = 2 if input.dim() == num_spatial_dims + 2 else 1
        if len(output_size) == others + num_spatial_dims:
            output_size = output_size[others:]
        if len(output_size) != num_spatial_dims:
            raise ValueError(
                f"ConvTranspose{num_spatial_dims}D: for {input.dim()}D input, output_size must have"
                f" {num_spatial_dims} or {others + num_spatial_dims} elements (got"
                f" {len(output_size)})"
            )
        dilation = [1] * num_spatial_dims if dilation is None else dilation
        least = [
            (input.size(d + others) - 1) * stride[d]
            - 2 * padding[d]
            + dilation[d] * (kernel_size[d] - 1)
            + 1
            for d in range(num_spatial_dims)
        ]
        most = [size + s - 1 for size, s in zip(least, stride, strict=False)]
        for i, size in enumerate(output_size):
            if size < least[i] or size > most[i]:
                raise ValueError(
                    f"requested an output size of {output_size}, but valid sizes range from"
                    f" {least} to {most} (for an input of {input.size()[2:]})"
                )
        return [output_size[d] - least[d] for d in range(num_spatial_dims)]

    def _conv_forward(  # type: ignore[override]
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(
                f"Only `zeros` padding mode is supported for ConvTranspose{len(self.kernel_size)}d"
            )
        if not isinstance(self.padding, tuple):
            raise AssertionError("self.padding must be a tuple")
        stride, padding, dilation = list(self.stride), list(self.padding), list(self.dilation)
        kernel_size, n = list(self.kernel_size), len(self.kernel_size)
        more = self._output_padding(input, output_size, stride, padding, kernel_size, n, dilation)
        how = self.stride, self.padding, more, self.groups, self.dilation
        return type(self)._function(input, weight, bias, *how)  # type: ignore[no-any-return]

    @records_once
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        plain = output_size is None and self.padding_mode == "zeros"
        if not plain or type(self.padding) is not tuple:
            return self._run_apart(input, output_size)
        how = self.stride, self.padding, self.dilation, True, self.output_padding, self.groups
        return self._run(Convolution, input, self.weight, self.bias, *how)  # type: ignore[no-any-return]


class ConvTranspose1d(_ConvTransposeNd):
    """Transposed convolution: y[n, o, stride l + k] sums x[n, c, l] w[c, o, k] over c, l and k.

    x is (N, in_channels, L) or (in_channels, L), y (N, out_channels, M) or (out_channels, M),
    M = (L - 1) stride - 2 padding + dilation (kernel_size - 1) + output_padding + 1. A convolution
    with a stride gives the same L for several M: `output_padding`, or `output_size` in `forward`,
    selects one.

    dx = g * w,  dw as for a convolution, with x and g exchanged,  db = sum of g.
    Saved: x and w.  More: `nnmirror/rules/convolution.py`.
    """

    _function = staticmethod(F.conv_transpose1d)

    def __init__(  # type: ignore[no-untyped-def]
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: _size_1_t = 0,
        output_padding: _size_1_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_1_t = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            1,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )


class ConvTranspose2d(_ConvTransposeNd):
    """Transposed convolution: y[n, o, stride l + k] sums x[n, c, l] w[c, o, k] over c, l and k.

    x is (N, in_channels, H, W) or (in_channels, H, W), y the same with out_channels; sizes and
    arguments are those of `ConvTranspose1d`, each one number for both dimensions or two.

    dx = g * w,  dw as for a convolution, with x and g exchanged,  db = sum of g.
    Saved: x and w.  More: `nnmirror/rules/convolution.py`.
    """

    _function = staticmethod(F.conv_transpose2d)

    def __init__(  # type: ignore[no-untyped-def]
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t = 0,
        output_padding: _size_2_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_2_t = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            2,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )


class ConvTranspose3d(_ConvTransposeNd):
    """Transposed convolution: y[n, o, stride l + k] sums x[n, c, l] w[c, o, k] over c, l and k.

    x is (N, in_channels, D, H, W) or (in_channels, D, H, W), y the same with out_channels; sizes
    and arguments are those of `ConvTranspose1d`, each one number for all dimensions or three.

    dx = g * w,  dw as for a convolution, with x and g exchanged,  db = sum of g.
    Saved: x and w.  More: `nnmirror/rules/convolution.py`.
    """

    _function = staticmethod(F.conv_transpose3d)

    def __init__(  # type: ignore[no-untyped-def]
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: _size_3_t = 0,
        output_padding: _size_3_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_3_t = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            3,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )


class _LazyConvXdMixin(LazyModuleMixin):
    """Takes the number of channels from the first input."""

    in_channels: int
    out_channels: int
    groups: int
    transposed: bool
    kernel_size: tuple[int, ...]

    def _uninitialized(
        self: Any, out_channels: int, bias: bool, device: Device, dtype: torch.dtype | None
    ) -> None:
        self.weight = UninitializedParameter(device=device, dtype=dtype)
        self.out_channels = out_channels
        if bias:
            self.bias = UninitializedParameter(device=device, dtype=dtype)

    def reset_parameters(self: Any) -> None:
        """Draw weight and bias anew; nothing before the first call."""
        if not self.has_uninitialized_params() and self.in_channels != 0:
            super().reset_parameters()  # type: ignore[misc]

    def initialize_parameters(self: Any, input: Tensor, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """Give weight and bias the shapes that follow from the channels of the input."""
        if not self.has_uninitialized_params():
            return
        self.in_channels = self._get_in_channels(input)
        if self.in_channels % self.groups != 0:
            raise ValueError("in_channels must be divisible by groups")
        channels = self.in_channels, self.out_channels
        first, second = channels if self.transposed else channels[::-1]
        self.weight.materialize((first, second // self.groups, *self.kernel_size))
        if self.bias is not None:
            self.bias.materialize((self.out_channels,))
        self.reset_parameters()

    def _get_in_channels(self, input: Tensor) -> int:
        single = self._get_num_spatial_dims() + 1
        if input.dim() not in (single, single + 1):
            raise RuntimeError(
                f"Expected {single}D (unbatched) or {single + 1}D (batched) input to"
                f" {self.__class__.__name__}, but got input of size: {input.shape}"
            )
        return input.shape[1] if input.dim() == single + 1 else input.shape[0]

    def _get_num_spatial_dims(self) -> int:
        return len(self.kernel_size)


class LazyConv1d(_LazyConvXdMixin, Conv1d):  # type: ignore[misc]
    """A `Conv1d` with `in_channels` from the first input."""

    cls_to_become = Conv1d

    def __init__(  # type: ignore[no-untyped-def]
        self,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: _size_1_t = 0,
        dilation: _size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        how = stride, padding, dilation, groups, False, padding_mode, device, dtype
        super().__init__(0, 0, kernel_size, *how)
        self._uninitialized(out_channels, bias, device, dtype)


class LazyConv2d(_LazyConvXdMixin, Conv2d):  # type: ignore[misc]
    """A `Conv2d` with `in_channels` from the first input."""

    cls_to_become = Conv2d

    def __init__(  # type: ignore[no-untyped-def]
        self,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        how = stride, padding, dilation, groups, False, padding_mode, device, dtype
        super().__init__(0, 0, kernel_size, *how)
        self._uninitialized(out_channels, bias, device, dtype)


class LazyConv3d(_LazyConvXdMixin, Conv3d):  # type: ignore[misc]
    """A `Conv3d` with `in_channels` from the first input."""

    cls_to_become = Conv3d

    def __init__(  # type: ignore[no-untyped-def]
        self,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: _size_3_t = 0,
        dilation: _size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        how = stride, padding, dilation, groups, False, padding_mode, device, dtype
        super().__init__(0, 0, kernel_size, *how)
        self._uninitialized(out_channels, bias, device, dtype)


class LazyConvTranspose1d(_LazyConvXdMixin, ConvTranspose1d):  # type: ignore[misc]
    """A `ConvTranspose1d` with `in_channels` from the first input."""

    cls_to_become = ConvTranspose1d

    def __init__(  # type: ignore[no-untyped-def]
        self,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: _size_1_t = 0,
        output_padding: _size_1_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_1_t = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        how = stride, padding, output_padding, groups, False, dilation, padding_mode
        super().__init__(0, 0, kernel_size, *how, device, dtype)
        self._uninitialized(out_channels, bias, device, dtype)


class LazyConvTranspose2d(_LazyConvXdMixin, ConvTranspose2d):  # type: ignore[misc]
    """A `ConvTranspose2d` with `in_channels` from the first input."""

    cls_to_become = ConvTranspose2d

    def __init__(  # type: ignore[no-untyped-def]
        self,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t = 0,
        output_padding: _size_2_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        how = stride, padding, output_padding, groups, False, dilation, padding_mode
        super().__init__(0, 0, kernel_size, *how, device, dtype)
        self._uninitialized(out_channels, bias, device, dtype)


class LazyConvTranspose3d(_LazyConvXdMixin, ConvTranspose3d):  # type: ignore[misc]
    """A `ConvTranspose3d` with `in_channels` from the first input."""

    cls_to_become = ConvTranspose3d

    def __init__(  # type: ignore[no-untyped-def]
        self,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: _size_3_t = 0,
        output_padding: _size_3_t = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _size_3_t = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device=None,
        dtype=None,
    ) -> None:
        how = stride, padding, output_padding, groups, False, dilation, padding_mode
        super().__init__(0, 0, kernel_size, *how, device, dtype)
        self._uninitialized(out_channels, bias, device, dtype)
