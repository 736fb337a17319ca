"""Operations that pick elements out: extremes, sorting, gathering."""

from collections.abc import Callable
from typing import Any

import torch

from .._types import Dims, TorchFunction
from ..tape import record
from . import shape
from .elementwise import Maximum, Minimum
from .reduction import unsqueezed
from .registry import Recorded, Rule, answered, composite, rule

T = torch.Tensor


class _Picked(Rule):
    """(z, index) = elements of x picked along dim:  dx = zeros, with g put at index"""

    @staticmethod
    def d_input(g0: T, input_shape: torch.Size, dim: int, keepdim: bool, result1: T) -> T:
        index = result1
        if not keepdim and len(input_shape):
            g0, index = g0.unsqueeze(dim), index.unsqueeze(dim)
        return _put(g0, input_shape, dim, index)


class _Ordered(Rule):
    """`_Picked` of several along dim, which stays."""

    @staticmethod
    def d_input(g0: T, input_shape: torch.Size, dim: int, result1: T) -> T:
        return _put(g0, input_shape, dim, result1)


def _put(g: T, shape: torch.Size, dim: int, index: T) -> T:
    return torch.zeros(shape, dtype=g.dtype, device=g.device).scatter_(dim, index, g)


class _Extreme(Rule):
    """z = the extreme element:  dx = g, shared evenly between the elements equal to it"""

    @staticmethod
    def d_input(g: T, input: T, result: T) -> T:
        mask = (input == result).logical_or_(input.isnan())  # with a NaN, that is the extreme
        return torch.zeros_like(input).masked_fill_(mask, g / mask.sum())


def _along(name: str, function: TorchFunction) -> type[Rule]:
    """The Rule of a function that returns (values, indices) along a dimension."""

    def forward(input: T, dim: int = -1, keepdim: bool = False) -> tuple[T, T]:
        return function(input, dim, keepdim)  # type: ignore[no-any-return]

    return type(name, (_Picked,), {"__doc__": _Picked.__doc__, "forward": staticmethod(forward)})


def _over_all(name: str, function: TorchFunction) -> type[Rule]:
    def forward(input: T) -> T:
        return function(input)  # type: ignore[no-any-return]

    return type(
        name,
        (_Extreme,),
        {
            "__doc__": _Extreme.__doc__,
            "forward": staticmethod(forward),
            "node_name": classmethod(lambda cls: name + "Backward1"),
        },
    )


def _extremes(name: str, two: type[Rule] | None) -> None:
    """max, min and median: over all, along a dimension, and of two tensors."""
    function = getattr(torch, name)
    result = getattr(torch.return_types, name)
    along = _along(name.capitalize(), function)
    over_all = _over_all(name.capitalize(), function)
    placed = Recorded(along, function)
    of_two = None if two is None else Recorded(two, function)

    def call(input: T, *args: object, **kwargs: object) -> Any:
        if not args and not kwargs:
            return record(over_all, (input,))[0]
        other = args[0] if args else kwargs.get("other")
        if of_two is not None and isinstance(other, T):
            return of_two(input, *args, **kwargs)
        return result(placed(input, *args, **kwargs))

    composite(function, getattr(T, name))(call)


_extremes("max", Maximum)
_extremes("min", Minimum)
_extremes("median", None)


class Sort(_Ordered):
    """(z, index) = x in order along dim:  dx = zeros, with g put at index"""

    @staticmethod
    def forward(input: T, dim: int, descending: bool, stable: bool) -> tuple[T, T]:
        return torch.sort(input, dim=dim, descending=descending, stable=stable)


@composite(torch.sort, T.sort, directly=True)
def sort(
    input: T,
    dim: Dims = -1,
    descending: bool = False,
    *,
    stable: bool = False,
    axis: int | None = None,
) -> torch.return_types.sort:
    dim = dim if axis is None else axis
    return torch.return_types.sort(record(Sort, (input, dim, descending, stable))[0])


class Topk(_Ordered):
    """(z, index) = the k largest of x along dim:  dx = zeros, with g put at index"""

    @staticmethod
    def forward(input: T, k: int, dim: int, largest: bool, sorted: bool) -> tuple[T, T]:
        return torch.topk(input, k, dim, largest, sorted)


@composite(torch.topk, T.topk, directly=True)
def topk(
    input: T, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> torch.return_types.topk:
    return torch.return_types.topk(record(Topk, (input, k, dim, largest, sorted))[0])


class _Amount(Rule):
    """z = the extreme of x over dim:  dx = g, shared evenly between those equal to it"""

    @staticmethod
    def d_input(g: T, input: T, dim: Dims, keepdim: bool, result: T) -> T:
        g, z = (unsqueezed(t, input.shape, dim, keepdim) for t in (g, result))
        mask = input == z
        return g * mask / mask.sum(dim, keepdim=True)


@rule(torch.amax, T.amax)
class Amax(_Amount):
    @staticmethod
    def forward(input: T, dim: int | tuple[int, ...] = (), keepdim: bool = False) -> T:
        return torch.amax(input, dim, keepdim)


@rule(torch.amin, T.amin)
class Amin(_Amount):
    @staticmethod
    def forward(input: T, dim: int | tuple[int, ...] = (), keepdim: bool = False) -> T:
        return torch.amin(input, dim, keepdim)


class Aminmax(Rule):
    """(a, b) = the least and the largest of x over dim:  dx = the gradients of both, added

    each shared evenly between the elements equal to it.
    """

    materialize_grads = False

    @staticmethod
    def forward(input: T, dim: int | None, keepdim: bool) -> tuple[T, T]:
        return torch.aminmax(input, dim=dim, keepdim=keepdim)

    @staticmethod
    def d_input(
        gs: tuple[T | None, ...],
        input: T,
        dim: int | None,
        keepdim: bool,
        result0: T,
        result1: T,
    ) -> T | None:
        dx = None
        for g, z in zip(gs, (result0, result1), strict=True):
            if g is None:
                continue
            # Without a dim all were reduced, regardless of `keepdim`.
            g, z = (unsqueezed(t, input.shape, dim, keepdim) for t in (g, z))
            mask = input == z
            share = g / mask.sum(() if dim is None else dim, keepdim=True) * mask
            dx = share if dx is None else dx + share
        return dx


@answered(torch.aminmax, T.aminmax)
def aminmax(
    input: T, *, dim: int | None = None, keepdim: bool = False
) -> torch.return_types.aminmax:
    return torch.return_types.aminmax(record(Aminmax, (input, dim, keepdim))[0])


@rule(torch.take, T.take)
class Take(Rule):
    """z = the elements of x, flattened, at `index`:  dx = zeros, with g added there"""

    uncounted = (1,)

    @staticmethod
    def forward(input: T, index: T) -> T:
        return torch.take(input, index)

    @staticmethod
    def d_input(g: T, index: T, input: T) -> T:
        # PyTorch saves x for its shape: it may not be changed.
        return torch.zeros_like(input).put_(index, g, accumulate=True)


@rule(torch.gather, T.gather)
class Gather(Rule):
    """z = x[index] along dim, element by element:  dx = zeros, with g added at index"""

    uncounted = (2,)

    @staticmethod
    def forward(input: T, dim: int, index: T, sparse_grad: bool = False) -> T:
        if sparse_grad:
            raise NotImplementedError("nnmirror: gather(sparse_grad=True) is not mirrored")
        return torch.gather(input, dim, index)

    @staticmethod
    def d_input(g: T, dim: int, index: T, input: T) -> T:
        # PyTorch saves x for its shape: it may not be changed.
        dx = torch.zeros(input.shape, dtype=g.dtype, device=g.device)
        return dx.scatter_add_(dim, index, g)


@composite(torch.take_along_dim, T.take_along_dim)
def take_along_dim(input: T, indices: T, dim: int | None = None) -> T:
    if dim is None:
        return record(Gather, (shape.reshape(input, (-1,)), 0, indices.reshape(-1)))[0]
    sizes = list(
        shape.broadcast_shapes(
            [n for d, n in enumerate(input.shape) if d != dim % input.dim()],
            [n for d, n in enumerate(indices.shape) if d != dim % input.dim()],
        )
    )
    at = dim % input.dim()
    wide = [*sizes[:at], input.shape[at], *sizes[at:]]
    narrow = [*sizes[:at], indices.shape[at], *sizes[at:]]
    index = indices.expand(narrow)
    index = torch.where(index < 0, index + input.shape[at], index)
    return record(Gather, (shape.expand(input, wide), dim, index))[0]


@rule(torch.index_select, T.index_select)
class IndexSelect(Rule):
    """z = the slices of x at `index` along dim:  dx = zeros, with g added at index"""

    uncounted = (2,)

    @staticmethod
    def forward(input: T, dim: int, index: T) -> T:
        return torch.index_select(input, dim, index)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, dim: int, index: T) -> T:
        dx = torch.zeros(input_shape, dtype=g.dtype, device=g.device)
        return dx.index_add_(dim, index, g)


@rule(torch.masked_select, T.masked_select)
class MaskedSelect(Rule):
    """z = the elements of x where the mask holds:  dx = zeros, with g put there"""

    dynamic_output_shape = True
    uncounted = (1,)

    @staticmethod
    def forward(input: T, mask: T) -> T:
        return torch.masked_select(input, mask)

    @staticmethod
    def d_input(g: T, mask: T, input: T) -> T:
        # PyTorch saves x for its shape: it may not be changed.
        size = shape.broadcast_shapes(input.shape, mask.shape)
        return torch.zeros(size, dtype=g.dtype, device=g.device).masked_scatter_(mask, g)


class _Cumulative(Rule):
    """(z, index) = the extreme of x_1 ... x_i along dim:  dx = zeros, with g added at index"""

    function: Callable[[T, int], tuple[T, T]]

    @classmethod
    def forward(cls, input: T, dim: int) -> tuple[T, T]:
        return cls.function(input, dim)

    @staticmethod
    def d_input(g0: T, input_shape: torch.Size, dim: int, result1: T) -> T:
        if g0.numel() == 0:
            return g0
        dx = torch.zeros(input_shape, dtype=g0.dtype, device=g0.device)
        return dx.scatter_add_(dim, result1, g0)


class Cummax(_Cumulative):
    """(z, index) = the largest of x_1 ... x_i along dim:  dx = zeros, with g added at index"""

    function = staticmethod(torch.cummax)


class Cummin(_Cumulative):
    """(z, index) = the least of x_1 ... x_i along dim:  dx = zeros, with g added at index"""

    function = staticmethod(torch.cummin)


@composite(torch.cummax, T.cummax)
def cummax(input: T, dim: int) -> torch.return_types.cummax:
    return torch.return_types.cummax(record(Cummax, (input, dim))[0])


@composite(torch.cummin, T.cummin)
def cummin(input: T, dim: int) -> torch.return_types.cummin:
    return torch.return_types.cummin(record(Cummin, (input, dim))[0])


class Kthvalue(_Picked):
    """(z, index) = the k-th smallest of x along dim:  dx = zeros, with g put at index"""

    @staticmethod
    def forward(input: T, k: int, dim: int, keepdim: bool) -> tuple[T, T]:
        return torch.kthvalue(input, k, dim, keepdim)


@composite(torch.kthvalue, T.kthvalue)
def kthvalue(input: T, k: int, dim: int = -1, keepdim: bool = False) -> torch.return_types.kthvalue:
    return torch.return_types.kthvalue(record(Kthvalue, (input, k, dim, keepdim))[0])
