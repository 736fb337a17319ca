"""Operations that pick elements out: extremes, sorting, gathering."""

from typing import Any

import torch

from ..tape import record
from . import shape
from .elementwise import Maximum, Minimum
from .reduction import unsqueezed
from .registry import Recorded, Rule, answered, composite, rule

T = torch.Tensor


class _Picked(Rule):
    """(z, index) = elements of x picked along dim:  dx = zeros, with g put at index"""

    @staticmethod
    def keep(ctx: Any, input: T, dim: int, keepdim: bool, picked: Any) -> tuple[T, T]:
        values, indices = picked
        ctx.shape, ctx.dim, ctx.keepdim = input.shape, dim, keepdim
        ctx.save_for_backward(indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, g: T, _: Any) -> tuple[Any, ...]:
        index, dim = ctx.saved(0), ctx.dim
        if not ctx.keepdim and len(ctx.shape):
            g, index = g.unsqueeze(dim), index.unsqueeze(dim)
        dx = torch.zeros(ctx.shape, dtype=g.dtype, device=g.device)
        return (dx.scatter_(dim, index, g), *[None] * (len(ctx.edges) - 1))


class _Extreme(Rule):
    """z = the extreme element:  dx = g, shared evenly between the elements equal to it"""

    @staticmethod
    def keep(ctx: Any, input: T, z: T) -> T:
        ctx.save_for_backward(input, z)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> T:
        x, z = ctx.saved_tensors
        mask = x.isnan() if z.isnan() else x == z
        return torch.zeros_like(x).masked_fill_(mask, g / mask.sum())


def _along(name: str, function: Any) -> type[Rule]:
    """The Rule of a function that returns (values, indices) along a dimension."""

    def forward(ctx: Any, input: T, dim: int = -1, keepdim: bool = False) -> tuple[T, T]:
        return _Picked.keep(ctx, input, dim, keepdim, function(input, dim, keepdim))

    return type(name, (_Picked,), {"__doc__": _Picked.__doc__, "forward": staticmethod(forward)})


def _over_all(name: str, function: Any) -> type[Rule]:
    def forward(ctx: Any, input: T) -> T:
        return _Extreme.keep(ctx, input, function(input))

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

    def call(input: T, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            return record(over_all, (input,))[0]
        other = args[0] if args else kwargs.get("other")
        if two is not None and isinstance(other, T):
            return Recorded(two, function)(input, *args, **kwargs)
        return result(placed(input, *args, **kwargs))

    composite(function, getattr(T, name))(call)


_extremes("max", Maximum)
_extremes("min", Minimum)
_extremes("median", None)


class Sort(_Picked):
    """(z, index) = x in order along dim:  dx = zeros, with g put at index"""

    @staticmethod
    def forward(ctx: Any, input: T, dim: int, descending: bool, stable: bool) -> Any:
        found = torch.sort(input, dim=dim, descending=descending, stable=stable)
        return _Picked.keep(ctx, input, dim, True, found)


@composite(torch.sort, T.sort)
def sort(
    input: T, dim: Any = -1, descending: bool = False, *, stable: bool = False, axis: Any = None
) -> Any:
    dim = dim if axis is None else axis
    return torch.return_types.sort(record(Sort, (input, dim, descending, stable))[0])


class Topk(_Picked):
    """(z, index) = the k largest of x along dim:  dx = zeros, with g put at index"""

    @staticmethod
    def forward(ctx: Any, input: T, k: int, dim: int, largest: bool, sorted: bool) -> Any:
        found = torch.topk(input, k, dim, largest, sorted)
        return _Picked.keep(ctx, input, dim, True, found)


@composite(torch.topk, T.topk)
def topk(input: T, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return torch.return_types.topk(record(Topk, (input, k, dim, largest, sorted))[0])


class _Amount(Rule):
    """z = the extreme of x over dim:  dx = g, shared evenly between those equal to it"""

    @staticmethod
    def keep(ctx: Any, input: T, dim: Any, keepdim: bool, z: T) -> T:
        ctx.dim, ctx.keepdim = dim, keepdim
        ctx.save_for_backward(input, z)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        x, z = ctx.saved_tensors
        g = unsqueezed(g, x.shape, ctx.dim, ctx.keepdim)
        mask = x == unsqueezed(z, x.shape, ctx.dim, ctx.keepdim)
        return g * mask / mask.sum(ctx.dim, keepdim=True), None, None


@rule(torch.amax, T.amax)
class Amax(_Amount):
    @staticmethod
    def forward(ctx: Any, input: T, dim: Any = (), keepdim: bool = False) -> T:
        return _Amount.keep(ctx, input, dim, keepdim, torch.amax(input, dim, keepdim))


@rule(torch.amin, T.amin)
class Amin(_Amount):
    @staticmethod
    def forward(ctx: Any, input: T, dim: Any = (), keepdim: bool = False) -> T:
        return _Amount.keep(ctx, input, dim, keepdim, torch.amin(input, dim, keepdim))


class Aminmax(Rule):
    """(a, b) = the least and the largest of x over dim:  dx = the gradients of both, added

    each shared evenly between the elements equal to it.
    """

    @staticmethod
    def forward(ctx: Any, input: T, dim: int | None, keepdim: bool) -> tuple[T, T]:
        low, high = torch.aminmax(input, dim=dim, keepdim=keepdim)
        ctx.how = dim, keepdim
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, low, high)
        return low, high

    @staticmethod
    def backward(ctx: Any, *grads: T | None) -> tuple[Any, ...]:
        x, *extremes = ctx.saved_tensors
        dim, keepdim = ctx.how
        dx = None
        for g, z in zip(grads, extremes, strict=True):
            if g is None:
                continue
            # Without a dim every one was reduced, whatever `keepdim` says.
            g, z = (unsqueezed(t, x.shape, dim, keepdim) for t in (g, z))
            mask = x == z
            share = g / mask.sum(() if dim is None else dim, keepdim=True) * mask
            dx = share if dx is None else dx + share
        return dx, None, None


@answered(torch.aminmax, T.aminmax)
def aminmax(input: T, *, dim: int | None = None, keepdim: bool = False) -> Any:
    return torch.return_types.aminmax(record(Aminmax, (input, dim, keepdim))[0])


@rule(torch.take, T.take)
class Take(Rule):
    """z = the elements of x, laid out in a row, at `index`:  dx = zeros, with g added there"""

    uncounted = (1,)

    @staticmethod
    def forward(ctx: Any, input: T, index: T) -> T:
        z = torch.take(input, index)
        ctx.save_for_backward(index, input)  # x only as PyTorch does: it may not be changed
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[T, None]:
        index, x = ctx.saved_tensors
        return torch.zeros_like(x).put_(index, g, accumulate=True), None


@rule(torch.gather, T.gather)
class Gather(Rule):
    """z = x[index] along dim, element by element:  dx = zeros, with g added at index"""

    uncounted = (2,)

    @staticmethod
    def forward(ctx: Any, input: T, dim: int, index: T, sparse_grad: bool = False) -> T:
        if sparse_grad:
            raise NotImplementedError("nnmirror: gather(sparse_grad=True) is not mirrored")
        ctx.shape, ctx.dim = input.shape, dim
        z = torch.gather(input, dim, index)
        ctx.save_for_backward(index, input)  # x only as PyTorch does: it may not be changed
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        index, _ = ctx.saved_tensors
        dx = torch.zeros(ctx.shape, dtype=g.dtype, device=g.device)
        return dx.scatter_add_(ctx.dim, index, g), None, None, None


@composite(torch.take_along_dim, T.take_along_dim)
def take_along_dim(input: T, indices: T, dim: int | None = None) -> T:
    if dim is None:
        return record(Gather, (shape.reshape(input, (-1,)), 0, indices.reshape(-1)))[0]
    sizes = list(
        torch.broadcast_shapes(
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
    def forward(ctx: Any, input: T, dim: int, index: T) -> T:
        ctx.shape, ctx.dim = input.shape, dim
        ctx.save_for_backward(index)
        return torch.index_select(input, dim, index)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        dx = torch.zeros(ctx.shape, dtype=g.dtype, device=g.device)
        return dx.index_add_(ctx.dim, ctx.saved(0), g), None, None


@rule(torch.masked_select, T.masked_select)
class MaskedSelect(Rule):
    """z = the elements of x where the mask holds:  dx = zeros, with g put there"""

    uncounted = (1,)

    @staticmethod
    def forward(ctx: Any, input: T, mask: T) -> T:
        ctx.shape = torch.broadcast_shapes(input.shape, mask.shape)
        ctx.save_for_backward(mask, input)  # x only as PyTorch does: it may not be changed
        return torch.masked_select(input, mask)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        mask, _ = ctx.saved_tensors
        dx = torch.zeros(ctx.shape, dtype=g.dtype, device=g.device)
        return dx.masked_scatter_(mask, g), None


class _Cumulative(Rule):
    """(z, index) = the extreme of x_1 ... x_i along dim:  dx = zeros, with g added at index"""

    function: Any

    @staticmethod
    def forward(ctx: Any, input: T, dim: int) -> tuple[T, T]:
        values, indices = ctx.function.function(input, dim)
        ctx.shape, ctx.dim = input.shape, dim
        ctx.save_for_backward(indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, g: T, _: Any) -> tuple[Any, ...]:
        if g.numel() == 0:
            return g, None
        dx = torch.zeros(ctx.shape, dtype=g.dtype, device=g.device)
        return dx.scatter_add_(ctx.dim, ctx.saved(0), g), None


class Cummax(_Cumulative):
    """(z, index) = the largest of x_1 ... x_i along dim:  dx = zeros, with g added at index"""

    function = staticmethod(torch.cummax)


class Cummin(_Cumulative):
    """(z, index) = the least of x_1 ... x_i along dim:  dx = zeros, with g added at index"""

    function = staticmethod(torch.cummin)


@composite(torch.cummax, T.cummax)
def cummax(input: T, dim: int) -> Any:
    return torch.return_types.cummax(record(Cummax, (input, dim))[0])


@composite(torch.cummin, T.cummin)
def cummin(input: T, dim: int) -> Any:
    return torch.return_types.cummin(record(Cummin, (input, dim))[0])


class Kthvalue(_Picked):
    """(z, index) = the k-th smallest of x along dim:  dx = zeros, with g put at index"""

    @staticmethod
    def forward(ctx: Any, input: T, k: int, dim: int, keepdim: bool) -> Any:
        found = torch.kthvalue(input, k, dim, keepdim)
        return _Picked.keep(ctx, input, dim, keepdim, found)


@composite(torch.kthvalue, T.kthvalue)
def kthvalue(input: T, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    return torch.return_types.kthvalue(record(Kthvalue, (input, k, dim, keepdim))[0])
