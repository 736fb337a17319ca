"""Pooling, in any number of dimensions.

Max pooling: y is x at one position of each window, so dx = g, added at these positions. Average
pooling: y is the sum of x over each window divided by n, so dx = g / n, added over each window.
Overlapping windows are added sequentially, in the order of PyTorch's kernels. Pooling in one
dimension is pooling in two, of which the first has size 1, as in PyTorch.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeAlias, TypeVar, overload

import torch

from .._torch import DisableTorchFunctionSubclass
from .._types import Size, TorchFunction
from ..grad_mode import is_grad_enabled
from ..tape import record
from .arithmetic import Pow
from .elementwise import Abs
from .gradient import applied
from .kernel import add_rows, has_planes, planes_first, planes_last
from .reduction import Mean
from .registry import RULES, Rule, handle, unplaced
from .shape import squeeze, unsqueeze
from .sizes import expanded, ntuple

T = torch.Tensor
Sizes = Sequence[int]
C = TypeVar("C", bound=TorchFunction)
P = ParamSpec("P")
R = TypeVar("R")
_Index: TypeAlias = tuple[int | slice | EllipsisType, ...]


def as_laid_out(dx: T, x: T) -> T:
    """dx in the memory format of x: channels last, or not."""
    for dim, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and not x.is_contiguous() and x.is_contiguous(memory_format=last):
            return dx.contiguous(memory_format=last)
    return dx


# -- max pooling ---------------------------------------------------------------------------


class _PutBackward(Rule):
    """dx = g, added at the positions of y:  g gets h at these positions"""

    @staticmethod
    def forward(grad: T, input: T, indices: T, n: int, name: str) -> T:
        shape, size = input.shape, input.shape[-n:].numel()
        dx = torch.zeros(*shape[:-n], size, dtype=grad.dtype, device=grad.device)
        g, places = grad.flatten(-n), indices.flatten(-n)
        if g.dtype.itemsize > 2:
            dx.scatter_add_(-1, places, g)
        elif g.numel():  # each sum is rounded
            first = torch.arange(0, dx.numel(), size, device=g.device).view(*shape[:-n], 1)
            add_rows(dx.view(-1), (places + first).reshape(-1), g.reshape(-1))
        return as_laid_out(dx.view(shape), input)

    @classmethod
    def label_of(cls, grad: T, input: T, indices: T, n: int, name: str) -> str:
        return f"{name}BackwardBackward0"

    @staticmethod
    def d_grad(g: T, indices: T, n: int) -> T:
        return picked(g, indices, n)

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)


_put = applied(_PutBackward)


def picked(g: T, indices: T, n: int) -> T:
    """g at `indices` in its last n dimensions."""
    if not indices.numel():
        return torch.zeros_like(g).reshape(-1)[:0].reshape(indices.shape)
    lead = indices.shape[:-n]
    found = g.contiguous().view(*lead, -1).gather(-1, indices.reshape(*lead, -1))
    return found.view(indices.shape)


def _largest(
    name: str, function: TorchFunction, n: int, called: TorchFunction | None = None, **more: object
) -> tuple[type[Rule], ...]:
    """Two rules of a function that returns maxima and indices: with the maxima only, the usual
    case, and with both. `called` raises the errors for arguments of other types."""

    def forward(input: T, *settings: object) -> tuple[T, T]:
        try:
            return function(input, *settings)  # type: ignore[no-any-return]
        except TypeError:
            raise unplaced(called or function, (input, *settings), {}) from None

    def infer(input: T, *settings: object) -> T:
        return function(input, *settings)[0]  # type: ignore[no-any-return]

    def d_input(g: T, input: T, indices: T) -> T:
        return _put(g, input, indices, n, name)

    def forward_of_both(input: T, *settings: object) -> tuple[T, T]:
        y, indices = forward(input, *settings)
        return y, as_laid_out(indices.contiguous(), input)

    def d_of_both(g0: T, input: T, result1: T) -> T:
        return _put(g0, input, result1, n, name)

    about = "y = the maximum of x in each window:  dx = g, added there.  Saved: the indices."
    body = {"__doc__": about, "__module__": __name__, "forward": staticmethod(forward), **more}
    of_both = {"forward": staticmethod(forward_of_both), "public": None}
    of_first = {"keeps": ("indices",), "infer": staticmethod(infer), "public": None}
    return (
        type(name, (Rule,), {**body, **of_first, "d_input": staticmethod(d_input)}),
        type(name, (Rule,), {**body, **of_both, "d_input": staticmethod(d_of_both)}),
    )


_nn: Any = torch._C._nn


def _max_pool2d(input: T, *settings: object) -> tuple[T, T]:
    if has_planes(input):
        with contextlib.suppress(RuntimeError, TypeError):  # else the error names the input's sizes
            found = _nn.max_pool2d_with_indices(planes_last(input), *settings)
            y, indices = [planes_first(t, *input.shape[:2]) for t in found]
            return y, indices
    return _nn.max_pool2d_with_indices(input, *settings)  # type: ignore[no-any-return]


def _avg_pool2d(input: T, *settings: object) -> T:
    if has_planes(input):
        with contextlib.suppress(RuntimeError, TypeError):
            means = _nn.avg_pool2d(planes_last(input), *settings)
            return planes_first(means, *input.shape[:2])
    return _nn.avg_pool2d(input, *settings)  # type: ignore[no-any-return]


MAX = {
    2: _largest("MaxPool2DWithIndices", _max_pool2d, 2, torch.max_pool2d),
    3: _largest("MaxPool3DWithIndices", _nn.max_pool3d_with_indices, 3, torch.max_pool3d),
}
ADAPTIVE_MAX = {
    n: _largest(f"AdaptiveMaxPool{n}D", getattr(_nn, f"adaptive_max_pool{n}d"), n) for n in (2, 3)
}
_FRACTIONAL = {
    n: _largest(
        f"FractionalMaxPool{n}D", getattr(_nn, f"fractional_max_pool{n}d"), n, uncounted=(3,)
    )
    for n in (2, 3)
}


def _unpooling(n: int) -> type[Rule]:
    function = getattr(_nn, f"max_unpool{n}d")

    def forward(input: T, indices: T, *settings: object) -> T:
        return function(input, indices, *settings)  # type: ignore[no-any-return]

    def d_input(g: T, indices: T) -> T:
        return picked(g, indices, n)

    body = {
        "__doc__": "y = zeros, with x put at the indices:  dx = g there.  Saved: the indices.",
        "__module__": __name__,
        "forward": staticmethod(forward),
        "d_input": staticmethod(d_input),
        "uncounted": (1,),
        "infer": staticmethod(function),
        "public": staticmethod(function),
    }
    return type(f"MaxUnpool{n}D", (Rule,), body)


_UNPOOL = {n: _unpooling(n) for n in (2, 3)}


# -- average pooling -----------------------------------------------------------------------


def _spread(t: T, input: T, kernel: Sizes, stride: Sizes, padding: Sizes) -> T:
    """dx with t added over each window: windows of one size, at equal distances."""
    n, shape = len(kernel), input.shape
    lead, places, sizes = shape[:-n], t.shape[-n:], shape[-n:]
    if not any(padding) and all(
        k == s and k * o == size
        for k, s, o, size in zip(kernel, stride, places, sizes, strict=True)
    ):  # side by side
        split = [d for o in places for d in (o, 1)]
        wide = [d for o, k in zip(places, kernel, strict=True) for d in (o, k)]
        spread = t.reshape(*lead, *split).expand(*lead, *wide)
        return as_laid_out(spread.reshape(shape), input)
    reach = [
        max(s * (o - 1) + k, size + p)
        for s, o, k, size, p in zip(stride, places, kernel, sizes, padding, strict=True)
    ]
    reach = [max(r, size + p) for r, size, p in zip(reach, sizes, padding, strict=True)]
    dx = torch.zeros(*lead, *reach, dtype=t.dtype, device=t.device)
    # An element is at the end of the first window that contains it.
    for offset in itertools.product(*[range(k - 1, -1, -1) for k in kernel]):
        along = zip(offset, stride, places, strict=True)
        where: _Index = (..., *[slice(a, a + s * (o - 1) + 1, s) for a, s, o in along])
        dx[where].add_(t)
    for dim, (p, size) in enumerate(zip(padding, sizes, strict=True), start=len(lead)):
        dx = dx.narrow(dim, p, size)
    return as_laid_out(dx.contiguous(), input)


# The arguments of AvgPool after the input.
_Averages: TypeAlias = tuple[Size, Size, Size, bool, bool, int | None]


class _Mean:
    """The arguments of AvgPool, with one number per dimension."""

    def __init__(self, n: int, settings: _Averages) -> None:
        kernel, stride, padding, _, count_include_pad, divisor_override = settings
        self.kernel = expanded(kernel, n)
        self.stride = expanded(stride, n) if stride else self.kernel
        self.padding = expanded(padding, n)
        self.counts_padding, self.divisor = count_include_pad, divisor_override

    def divided(self, g: T, sizes: Sizes) -> T:
        """g over the number of elements in each window."""
        if self.divisor is not None:
            return g / self.divisor
        n = len(self.kernel)
        counts: list[list[int]] = []
        every = zip(self.kernel, self.stride, self.padding, sizes, g.shape[-n:], strict=True)
        for k, s, p, size, places in every:
            starts = [i * s - p for i in range(places)]
            ends = [min(start + k, size + p) for start in starts]
            if not self.counts_padding:
                starts, ends = [max(a, 0) for a in starts], [min(b, size) for b in ends]
            counts.append([b - a for a, b in zip(starts, ends, strict=True)])
        if all(len(set(c)) == 1 for c in counts):
            divisor = 1
            for c in counts:
                divisor *= c[0]
            return g / divisor
        number = torch.ones((), dtype=g.dtype, device=g.device)
        for c in counts:
            number = number.unsqueeze(-1) * torch.tensor(c, dtype=g.dtype, device=g.device)
        return g / number


class _AvgPoolBackward(Rule):
    """dx = g / n, added over each window:  g gets the means of h"""

    @staticmethod
    def forward(grad: T, input: T, n: int, settings: _Averages) -> T:
        if not grad.numel():
            return torch.zeros_like(input)
        mean = _Mean(n, settings)
        t = mean.divided(grad, input.shape[-n:]).add_(0.0)  # no zero is negative
        return _spread(t, input, mean.kernel, mean.stride, mean.padding)

    @classmethod
    def label_of(cls, grad: T, input: T, n: int, settings: _Averages) -> str:
        return f"AvgPool{n}DBackwardBackward0"

    @staticmethod
    def d_grad(g: T, n: int, settings: _Averages) -> T:
        return getattr(_nn, f"avg_pool{n}d")(g, *settings)  # type: ignore[no-any-return]

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)


_avg_grad = applied(_AvgPoolBackward)


_AVERAGED: dict[int, TorchFunction] = {2: _avg_pool2d, 3: _nn.avg_pool3d}


def _averaging(n: int) -> type[Rule]:
    function = _AVERAGED[n]

    def forward(input: T, *settings: object) -> T:
        return function(input, *settings)  # type: ignore[no-any-return]

    def d_input(g: T, input: T, settings: tuple[object, ...]) -> T:
        return _avg_grad(g, input, n, settings)

    body = {
        "__doc__": "y = the sum of x over each window / n:  dx = g / n, added over each window.",
        "__module__": __name__,
        "forward": staticmethod(forward),
        "d_input": staticmethod(d_input),
        "infer": staticmethod(function),
        "public": staticmethod(getattr(_nn, f"avg_pool{n}d")),
    }
    return type(f"AvgPool{n}D", (Rule,), body)


AVG = {n: _averaging(n) for n in (2, 3)}


class _AdaptiveAvgPoolBackward(Rule):
    """dx = g / n, added over each window:  g gets the means of h"""

    @staticmethod
    def forward(grad: T, input: T, n: int) -> T:
        sizes, places = input.shape[-n:], grad.shape[-n:]
        if not grad.numel():
            return torch.zeros_like(input)
        if all(size % o == 0 for size, o in zip(sizes, places, strict=True)):
            kernel = [size // o for size, o in zip(sizes, places, strict=True)]
            t = grad
            for k in kernel:
                t = t / k
            return _spread(t.add_(0.0), input, kernel, kernel, [0] * n)
        windows = [
            [(i * size // o, -(-(i + 1) * size // o)) for i in range(o)]
            for size, o in zip(sizes, places, strict=True)
        ]
        t = grad
        for dim, of_dim in enumerate(windows):
            lengths = torch.tensor([b - a for a, b in of_dim], dtype=t.dtype, device=t.device)
            t = t / lengths.view(-1, *[1] * (n - 1 - dim))
        dx = torch.zeros(input.shape, dtype=grad.dtype, device=grad.device)
        for place in itertools.product(*map(range, places)):
            where: _Index = (..., *[slice(*windows[dim][i]) for dim, i in enumerate(place)])
            at: _Index = (..., *place)
            dx[where].add_(t[at].reshape(*t.shape[:-n], *[1] * n))
        return as_laid_out(dx, input)

    @classmethod
    def label_of(cls, grad: T, input: T, n: int) -> str:
        return f"AdaptiveAvgPool{n}DBackwardBackward0"

    @staticmethod
    def d_grad(g: T, grad_shape: torch.Size, n: int) -> T:
        return record(ADAPTIVE_AVG[n], (g, tuple(grad_shape[-n:])))[0]  # type: ignore[no-any-return]

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)


_adaptive_avg_grad = applied(_AdaptiveAvgPoolBackward)


def _adaptive_averaging(n: int) -> type[Rule]:
    function = getattr(torch, f"_adaptive_avg_pool{n}d")

    def forward(input: T, output_size: Sizes) -> T:
        return function(input, output_size)  # type: ignore[no-any-return]

    def d_input(g: T, input: T) -> T:
        return _adaptive_avg_grad(g, input, n)

    body = {
        "__doc__": "y = the mean of x over each window, one for each element of y:  dx = g / n.",
        "__module__": __name__,
        "forward": staticmethod(forward),
        "d_input": staticmethod(d_input),
        "infer": staticmethod(function),
        "public": staticmethod(getattr(_nn, f"adaptive_avg_pool{n}d")),
    }
    return type(f"AdaptiveAvgPool{n}D", (Rule,), body)


ADAPTIVE_AVG = {n: _adaptive_averaging(n) for n in (2, 3)}


# -- arguments -----------------------------------------------------------------------------


def _along(value: object, first: int) -> tuple[object, ...]:
    """An argument of one dimension as one of two."""
    if isinstance(value, tuple | list):
        return (first, *value) if len(value) else ()
    return first, value


def _is_recorded(input: object) -> bool:
    return isinstance(input, T) and input.requires_grad and is_grad_enabled()


def _answers(*called: TorchFunction) -> Callable[[C], C]:
    """Record calls of the torch function with the decorated one, if recording is on."""

    def register(function: C) -> C:
        for func in called:

            @functools.wraps(function)
            def call(*args: object, _func: TorchFunction = func, **kwargs: object) -> Any:
                input = args[0] if args else kwargs.get("input")
                if not _is_recorded(input):
                    with DisableTorchFunctionSubclass():
                        return _func(*args, **kwargs)
                try:
                    return function(*args, **kwargs)
                except TypeError:
                    raise unplaced(_func, args, kwargs) from None

            handle(func, call)
        return function

    return register


def _as_given(stride: Size | None) -> Size:
    return () if stride is None else stride


def _in_two(
    rule_: type[Rule],
    input: T,
    called: TorchFunction,
    args: tuple[object, ...],
    how: tuple[object, ...],
) -> Any:
    """Pool in one dimension as in two."""
    if input.dim() not in (2, 3):
        raise unplaced(called, args, {})
    try:
        found = record(rule_, (unsqueeze(input, -2), *how))[0]
    except RuntimeError:
        unplaced(called, args, {})  # raises the error of the function in one dimension
        raise
    if isinstance(found, tuple | list):
        return tuple([squeeze(t, -2) if t.is_floating_point() else t.squeeze(-2) for t in found])
    return squeeze(found, -2)


def _max_pool(n: int, both: bool) -> TorchFunction:
    def call(
        input: T,
        kernel_size: Size,
        stride: Size | None = (),
        padding: Size = 0,
        dilation: Size = 1,
        ceil_mode: bool = False,
    ) -> T | tuple[T, T]:
        how = kernel_size, _as_given(stride), padding, dilation
        if n == 1:
            called = torch.max_pool1d_with_indices if both else torch.max_pool1d
            args = input, *how, ceil_mode
            two = [_along(v, first) for v, first in zip(how, (1, 1, 0, 1), strict=True)]
            return _in_two(MAX[2][both], input, called, args, (*two, ceil_mode))
        return record(MAX[n][both], (input, *how, ceil_mode))[0]

    return call


_answers(torch.max_pool1d)(_max_pool(1, False))
_answers(torch.max_pool1d_with_indices)(_max_pool(1, True))
for _n, _without in ((2, torch.max_pool2d), (3, torch.max_pool3d)):
    _answers(_without)(_max_pool(_n, False))
    _answers(getattr(_nn, f"max_pool{_n}d_with_indices"))(_max_pool(_n, True))


@_answers(torch.adaptive_max_pool1d)
def _adaptive_max_pool1d(input: T, output_size: Size) -> tuple[T, T]:
    size = _along(output_size, 1)
    return _in_two(
        ADAPTIVE_MAX[2][1], input, torch.adaptive_max_pool1d, (input, output_size), (size,)
    )


def _adaptive_max_pool(n: int) -> TorchFunction:
    def call(input: T, output_size: Size) -> tuple[T, T]:
        return record(ADAPTIVE_MAX[n][1], (input, output_size))[0]

    return call


def _fractional_max_pool(n: int) -> TorchFunction:
    def call(input: T, kernel_size: Size, output_size: Size, random_samples: T) -> tuple[T, T]:
        return record(_FRACTIONAL[n][1], (input, kernel_size, output_size, random_samples))[0]

    return call


def _max_unpool(n: int) -> TorchFunction:
    def call(input: T, indices: T, *how: object, **named: object) -> T:
        for name in ("output_size", "stride", "padding"):
            how += (named.pop(name),) if name in named else ()
        if named:
            raise TypeError
        return record(_UNPOOL[n], (input, indices, *how))[0]

    return call


def _avg_pool(n: int) -> TorchFunction:
    def call(
        input: T,
        kernel_size: Size,
        stride: Size | None = (),
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> T:
        how = ceil_mode, count_include_pad, divisor_override
        return record(AVG[n], (input, kernel_size, _as_given(stride), padding, *how))[0]

    return call


@_answers(torch.avg_pool1d)
def _avg_pool1d(
    input: T,
    kernel_size: Size,
    stride: Size | None = (),
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> T:
    given = kernel_size, _as_given(stride), padding
    args = input, *given, ceil_mode, count_include_pad
    two = [_along(v, first) for v, first in zip(given, (1, 1, 0), strict=True)]
    how = *two, ceil_mode, count_include_pad, None
    return _in_two(AVG[2], input, torch.avg_pool1d, args, how)


def _adaptive_avg_pool(n: int) -> TorchFunction:
    def call(input: T, output_size: Size) -> T:
        sizes = expanded(output_size, n)
        is_one = all(type(s) is int and s == 1 for s in sizes)
        if is_one and input.dim() in (n + 1, n + 2) and input.numel():
            return record(Mean, (input, list(range(-1, -n - 1, -1)), True))[0]
        if any(type(s) is int and s < 0 for s in sizes):
            raise unplaced(getattr(_nn, f"adaptive_avg_pool{n}d"), (input, output_size), {})
        return record(ADAPTIVE_AVG[n], (input, output_size))[0]

    return call


@_answers(torch.adaptive_avg_pool1d)
def _adaptive_avg_pool1d(input: T, output_size: Size) -> T:
    if input.dim() not in (2, 3):
        raise unplaced(torch.adaptive_avg_pool1d, (input, output_size), {})
    pooled = _adaptive_avg_pool(2)(unsqueeze(input, -2), _along(output_size, 1))
    return squeeze(pooled, -2)


for _n in (2, 3):
    _answers(getattr(_nn, f"adaptive_max_pool{_n}d"))(_adaptive_max_pool(_n))
    _answers(getattr(_nn, f"fractional_max_pool{_n}d"))(_fractional_max_pool(_n))
    _answers(getattr(_nn, f"max_unpool{_n}d"))(_max_unpool(_n))
    _answers(getattr(_nn, f"avg_pool{_n}d"))(_avg_pool(_n))
    _answers(getattr(_nn, f"adaptive_avg_pool{_n}d"))(_adaptive_avg_pool(_n))
    _answers(getattr(torch, f"_adaptive_avg_pool{_n}d"))(
        lambda input, output_size, n=_n: record(ADAPTIVE_AVG[n], (input, output_size))[0]
    )


# -- the functions of torch.nn.functional --------------------------------------------------

FUNCTIONS: dict[str, TorchFunction] = {}

# For each dimension, or one for all; None is the size of the input.
_OutputSize: TypeAlias = int | Sequence[int | None]
_Ratio: TypeAlias = float | Sequence[float]

if TYPE_CHECKING:

    class _MaxPool(Protocol):
        @overload
        def __call__(
            self,
            input: T,
            kernel_size: Size,
            stride: Size | None = None,
            padding: Size = 0,
            dilation: Size = 1,
            ceil_mode: bool = False,
            return_indices: Literal[False] = False,
        ) -> T: ...
        @overload
        def __call__(
            self,
            input: T,
            kernel_size: Size,
            stride: Size | None,
            padding: Size,
            dilation: Size,
            ceil_mode: bool,
            return_indices: Literal[True],
            /,
        ) -> tuple[T, T]: ...
        @overload
        def __call__(
            self,
            input: T,
            kernel_size: Size,
            stride: Size | None = None,
            padding: Size = 0,
            dilation: Size = 1,
            ceil_mode: bool = False,
            *,
            return_indices: Literal[True],
        ) -> tuple[T, T]: ...

    class _AvgPool1d(Protocol):
        def __call__(
            self,
            input: T,
            kernel_size: Size,
            stride: Size | None = None,
            padding: Size = 0,
            ceil_mode: bool = False,
            count_include_pad: bool = True,
        ) -> T: ...

    class _AvgPool(Protocol):
        def __call__(
            self,
            input: T,
            kernel_size: Size,
            stride: Size | None = None,
            padding: Size = 0,
            ceil_mode: bool = False,
            count_include_pad: bool = True,
            divisor_override: int | None = None,
        ) -> T: ...

    class _AdaptiveAvgPool(Protocol):
        def __call__(self, input: T, output_size: _OutputSize) -> T: ...

    class _AdaptiveMaxPool(Protocol):
        @overload
        def __call__(
            self, input: T, output_size: _OutputSize, return_indices: Literal[False] = False
        ) -> T: ...
        @overload
        def __call__(
            self, input: T, output_size: _OutputSize, return_indices: Literal[True]
        ) -> tuple[T, T]: ...

    class _LPPool(Protocol):
        def __call__(
            self,
            input: T,
            norm_type: float,
            kernel_size: Size,
            stride: Size | None = None,
            ceil_mode: bool = False,
        ) -> T: ...

    class _MaxUnpool(Protocol):
        def __call__(
            self,
            input: T,
            indices: T,
            kernel_size: Size,
            stride: Size | None = None,
            padding: Size = 0,
            output_size: Sizes | None = None,
        ) -> T: ...

    class _FractionalMaxPool(Protocol):
        @overload
        def __call__(
            self,
            input: T,
            kernel_size: Size,
            output_size: Size | None = None,
            output_ratio: _Ratio | None = None,
            return_indices: Literal[False] = False,
            _random_samples: T | None = None,
        ) -> T: ...
        @overload
        def __call__(
            self,
            input: T,
            kernel_size: Size,
            output_size: Size | None,
            output_ratio: _Ratio | None,
            return_indices: Literal[True],
            /,
            _random_samples: T | None = None,
        ) -> tuple[T, T]: ...
        @overload
        def __call__(
            self,
            input: T,
            kernel_size: Size,
            output_size: Size | None = None,
            output_ratio: _Ratio | None = None,
            *,
            return_indices: Literal[True],
            _random_samples: T | None = None,
        ) -> tuple[T, T]: ...


def _public(
    doc: str, numbers: Sequence[int] = (1, 2, 3)
) -> Callable[[Callable[[int], C]], dict[int, C]]:
    """A function of torch.nn.functional, for each number of dimensions."""

    def register(make: Callable[[int], C]) -> dict[int, C]:
        made = {n: make(n) for n in numbers}
        for n, function in made.items():
            name = make.__name__.replace("Nd", f"{n}d")
            function.__name__ = function.__qualname__ = name
            function.__doc__, function.__module__ = doc, "nnmirror.functional"
            FUNCTIONS[name] = function
        return made

    return register


def _of_torch(called: TorchFunction, function: Callable[P, R]) -> Callable[P, R]:
    """The function, with the errors of one of torch's own for invalid arguments."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            raise unplaced(called, args, kwargs) from None

    return call


def _recorded(name: str) -> TorchFunction:
    """The recording function for a torch function; its input may be a tensor of torch's own."""
    return RULES[getattr(torch, name, None) or getattr(_nn, name)]


@_public(
    "x at its largest under each window, `dilation` apart; with `return_indices` and the places, in"
    " the flattened last dimensions, too. See `nnmirror.rules.pooling`."
)
def max_poolNd(n: int) -> "_MaxPool":
    def call(
        input: T,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        called = _recorded(f"max_pool{n}d_with_indices" if return_indices else f"max_pool{n}d")
        stride = [] if stride is None else stride
        return called(input, kernel_size, stride, padding, dilation, ceil_mode)

    return call


@_public("The same with `return_indices`.")
def max_poolNd_with_indices(n: int) -> TorchFunction:
    def call(
        input: T,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> tuple[T, T]:
        return max_poolNd[n](input, kernel_size, stride, padding, dilation, ceil_mode, True)

    return call


_MEAN = (
    "The mean of x under each window, zeros around it counted or not. See `nnmirror.rules.pooling`."
)


@_public(_MEAN, numbers=(1,))
def avg_pool1d(n: int) -> "_AvgPool1d":
    def call(
        input: T,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> T:
        stride = [] if stride is None else stride
        how = padding, ceil_mode, count_include_pad
        return _recorded("avg_pool1d")(input, kernel_size, stride, *how)

    return _of_torch(torch.avg_pool1d, call)


@_public(_MEAN, numbers=(2, 3))
def avg_poolNd(n: int) -> "_AvgPool":
    def call(
        input: T,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> T:
        how = padding, ceil_mode, count_include_pad, divisor_override
        return _recorded(f"avg_pool{n}d")(
            input, kernel_size, [] if stride is None else stride, *how
        )

    return _of_torch(getattr(_nn, f"avg_pool{n}d"), call)


def _sizes_or(output_size: "_OutputSize", sizes: torch.Size) -> Size:
    """`output_size`, that of the input where it is None."""
    if isinstance(output_size, int):
        return output_size
    if len(sizes) <= len(output_size):
        raise ValueError(f"Input dimension should be at least {len(output_size) + 1}")
    own = sizes[-len(output_size) :]
    return [d if v is None else v for v, d in zip(output_size, own, strict=False)]


@_public("The mean of x under `output_size` windows that lie as evenly as they can.")
def adaptive_avg_poolNd(n: int) -> "_AdaptiveAvgPool":
    def call(input: T, output_size: _OutputSize) -> T:
        sizes = output_size if n == 1 else _sizes_or(output_size, input.size())
        return _recorded(f"adaptive_avg_pool{n}d")(input, sizes)

    return call


@_public("x at its largest under `output_size` windows that lie as evenly as they can.")
def adaptive_max_poolNd(n: int) -> "_AdaptiveMaxPool":
    def call(input: T, output_size: _OutputSize, return_indices: bool = False) -> Any:
        sizes = output_size if n == 1 else _sizes_or(output_size, input.size())
        if n > 1 and not return_indices and _is_recorded(input):
            return record(ADAPTIVE_MAX[n][0], (input, sizes))[0]
        found = _recorded(f"adaptive_max_pool{n}d")(input, sizes)
        return found if return_indices else found[0]

    return call


@_public("The same with `return_indices`.")
def adaptive_max_poolNd_with_indices(n: int) -> TorchFunction:
    def call(input: T, output_size: _OutputSize, return_indices: bool = False) -> tuple[T, T]:
        return adaptive_max_poolNd[n](input, output_size, True)

    return call


@_public("The p-norm of x under each window:  y = (sum of x^p)^(1/p)")
def lp_poolNd(n: int) -> "_LPPool":
    def call(
        input: T,
        norm_type: float,
        kernel_size: Size,
        stride: Size | None = None,
        ceil_mode: bool = False,
    ) -> T:
        sizes: tuple[Any, ...] = (kernel_size,) if n == 1 else expanded(kernel_size, n)
        if isinstance(norm_type, int | float) and abs(norm_type) == float("inf"):
            how = kernel_size, stride, 0, 1, ceil_mode
            largest = max_poolNd[n]
            if norm_type > 0:
                return largest(record(Abs, (input,))[0], *how)
            return -largest(-record(Abs, (input,))[0], *how)
        powers = record(Pow, (input, norm_type))[0]
        means = FUNCTIONS[f"avg_pool{n}d"](powers, kernel_size, stride, 0, ceil_mode)
        size = 1
        for k in reversed(sizes):
            size = k * size
        return (torch.sign(means) * torch.relu(torch.abs(means))).mul(size).pow(1.0 / norm_type)

    return call


@_public(
    "The inverse of max_pool: x at the places that `indices` name, 0 elsewhere. Where several sizes"
    " give one of x, `output_size` says which."
)
def max_unpoolNd(n: int) -> "_MaxUnpool":
    def call(
        input: T,
        indices: T,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        output_size: Sizes | None = None,
    ) -> T:
        each = ntuple(n)
        kernel, pads = each(kernel_size), each(padding)
        steps = kernel if stride is None else each(stride)
        sizes = _unpooled(input.size(), kernel, steps, pads, output_size)
        if n > 1:
            more = (steps, pads) if n == 3 else ()
            return _recorded(f"max_unpool{n}d")(input, indices, sizes, *more)
        sizes = [*sizes, 1]
        column = unsqueeze(input, -1), indices.unsqueeze(-1)
        return squeeze(_recorded("max_unpool2d")(*column, sizes), -1)

    return call


def _unpooled(
    shape: torch.Size, kernel: Sizes, stride: Sizes, padding: Sizes, output_size: Sizes | None
) -> Sizes:
    """The output sizes of unpooling, or PyTorch's error for an invalid `output_size`."""
    n = len(kernel)
    usual = [(shape[d - n] - 1) * stride[d] + kernel[d] - 2 * padding[d] for d in range(n)]
    if output_size is None:
        sizes: Sizes = usual
    else:
        sizes = output_size[2:] if len(output_size) == n + 2 else output_size
        if len(sizes) != n:
            raise ValueError(
                f"output_size should be a sequence containing {n} or {n + 2} elements, but it has a"
                f" length of '{len(sizes)}'"
            )
        for d in range(n):
            low, high = usual[d] - stride[d], usual[d] + stride[d]
            if not low < sizes[d] < high:
                raise ValueError(
                    f'invalid output_size "{sizes}" (dim {d} must be between {low} and {high})'
                )
    for d in range(n):
        if sizes[d] < 0:
            raise ValueError(
                "max_unpooling: output_size must contain non-negative spatial dimensions, but got"
                f" output_size[{d}]={sizes[d]}"
            )
    return sizes


@_public(
    "x at its largest under windows of about equal size that lie at random (Graham, 2014):"
    " `output_size` of them, or `output_ratio` times the size of x.",
    numbers=(2, 3),
)
def fractional_max_poolNd(n: int) -> "_FractionalMaxPool":
    def call(
        input: T,
        kernel_size: Size,
        output_size: Size | None = None,
        output_ratio: Any = None,
        return_indices: bool = False,
        _random_samples: T | None = None,
    ) -> Any:
        if output_size is None and output_ratio is None:
            raise ValueError(
                f"fractional_max_pool{n}d requires specifying either an output_size or an"
                " output_ratio"
            )
        if output_size is None:
            if n == 2 and len(output_ratio) > 2:
                raise ValueError(
                    "fractional_max_pool2d requires output_ratio to either be a single Int or tuple"
                    " of Ints."
                )
            ratios = ntuple(n)(output_ratio)
            output_size = [int(input.size(d - n) * ratios[d]) for d in range(n)]
        if _random_samples is None:
            batch = 1 if input.dim() == n + 1 else input.size(0)
            _random_samples = torch.rand(
                batch, input.size(-n - 1), n, dtype=input.dtype, device=input.device
            )
        found = _recorded(f"fractional_max_pool{n}d")(
            input, kernel_size, output_size, _random_samples
        )
        return found if return_indices else found[0]

    return call


@_public("The same with `return_indices`.", numbers=(2, 3))
def fractional_max_poolNd_with_indices(n: int) -> TorchFunction:
    def call(
        input: T,
        kernel_size: Size,
        output_size: Size | None = None,
        output_ratio: _Ratio | None = None,
        return_indices: bool = False,
        _random_samples: T | None = None,
    ) -> tuple[T, T]:
        return fractional_max_poolNd[n](
            input, kernel_size, output_size, output_ratio, True, _random_samples
        )

    return call
