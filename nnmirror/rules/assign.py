"""Operations that put values into a tensor: assignment, filling, scattering.

The gradient of what was overwritten is zero there; that of the values is g at their places.
"""

import warnings
from typing import Any

import torch
from torch._C import DisableTorchFunctionSubclass

from ..tape import record, records_plainly
from ..tensor import Tensor
from ..views import assigned, change_of
from . import shape
from .registry import Rule, composite, inplace, refusal, rule, unplaced

T = torch.Tensor


@inplace(T.copy_)
class Copy(Rule):
    """x becomes y:  dx = 0,  dy = g"""

    @staticmethod
    def forward(ctx: Any, input: T, src: T, non_blocking: bool = False) -> T:
        return input

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        return torch.zeros_like(g) if ctx.needs_input_grad[0] else None, g, None

    @classmethod
    def node_name(cls) -> str:
        return "torch::autograd::CopyBackwards"


class _Overwritten(Rule):
    """x becomes something that does not depend on it:  dx = 0"""

    @staticmethod
    def forward(ctx: Any, input: T, *how: Any) -> T:
        return input

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        return (torch.zeros_like(g), *[None] * (len(ctx.edges) - 1))


def _overwritten(method: Any, name: str) -> None:
    made = type(name, (_Overwritten,), {"__doc__": _Overwritten.__doc__})

    def call(input: T, *args: Any, **kwargs: Any) -> T:
        return record(made, (input,), inplace=lambda: method(input, *args, **kwargs))[0]

    composite(method, getattr(torch, method.__name__, method))(call)


for _name in ("zero_", "uniform_", "normal_", "exponential_", "cauchy_", "log_normal_"):
    _overwritten(getattr(T, _name), "".join(p.capitalize() for p in _name.split("_")))


@inplace(T.fill_, torch.fill_)
@rule(torch.fill)
class Fill(Rule):
    """Every element of x becomes v:  dx = 0,  dv = sum of g"""

    in_place = {"FillBackward0": "FillBackward2", "FillBackward1": "FillBackward3"}

    @staticmethod
    def forward(ctx: Any, input: T, value: Any) -> T:
        ctx.label = f"FillBackward{int(isinstance(value, T))}"
        return torch.fill(input, value)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[T, T | None]:
        return torch.zeros_like(g), g.sum() if ctx.needs_input_grad[1] else None


@inplace(T.masked_fill_)
@rule(torch.masked_fill, T.masked_fill)
class MaskedFill(Rule):
    """z = v where the mask holds, else x:  dx = g elsewhere, else 0,  dv = sum of g there"""

    uncounted = (1,)

    @staticmethod
    def forward(ctx: Any, input: T, mask: T, value: Any) -> T:
        ctx.label = f"MaskedFillBackward{int(isinstance(value, T))}"
        ctx.save_for_backward(mask)
        return torch.masked_fill(input, mask, value)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[T | None, None, T | None]:
        mask = ctx.saved(0)
        return (
            g.masked_fill(mask, 0) if ctx.needs_input_grad[0] else None,
            None,
            g.masked_select(mask).sum() if ctx.needs_input_grad[2] else None,
        )


@inplace(T.masked_scatter_)
@rule(torch.masked_scatter, T.masked_scatter)
class MaskedScatter(Rule):
    """z = the next element of s where the mask holds, else x:  dx = g elsewhere,  ds = g there"""

    uncounted = (1,)

    @staticmethod
    def forward(ctx: Any, input: T, mask: T, source: T) -> T:
        ctx.save_for_backward(mask)
        ctx.shape = source.shape
        return torch.masked_scatter(input, mask, source)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[T | None, None, T | None]:
        mask, ds = ctx.saved(0), None
        if ctx.needs_input_grad[2]:
            taken = g.masked_select(mask)
            ds = torch.zeros(ctx.shape, dtype=g.dtype, device=g.device)
            ds.view(-1)[: len(taken)] = taken[: ds.numel()]
        return g.masked_fill(mask, 0) if ctx.needs_input_grad[0] else None, None, ds


@inplace(T.index_put_, torch.index_put_)
@rule(torch.index_put, T.index_put)
class IndexPut(Rule):
    """z = x with z[indices] = v, or += v:  dx = g, zero where overwritten,  dv = g[indices]"""

    @staticmethod
    def forward(ctx: Any, input: T, indices: Any, values: T, accumulate: bool = False) -> T:
        ctx.indices, ctx.accumulate = tuple(indices), accumulate
        ctx.save_for_backward(*[i for i in indices if i is not None])
        if not any(i is None for i in ctx.indices):
            return torch.index_put(input, indices, values, accumulate)
        z = input.clone()
        z[_all_of(ctx.indices)] = values
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        ctx.saved_tensors  # noqa: B018  indices changed since are refused
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g
            if not ctx.accumulate:
                dx = g.clone()
                dx[_all_of(ctx.indices)] = 0
        dv = g[_all_of(ctx.indices)] if ctx.needs_input_grad[2] else None
        return dx, None, dv, None


def _all_of(indices: Any) -> tuple[Any, ...]:
    return tuple(slice(None) if i is None else i for i in indices)


def _split(index: Any, input: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """x[index] as x[basic][advanced]: first what makes a view, then masks and index tensors."""
    parts = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, range):
            part = list(part)
        if isinstance(part, list | tuple | bool) or type(part).__module__ == "numpy":
            empty = isinstance(part, list | tuple) and not part
            part = torch.as_tensor(part, device=input.device, dtype=torch.long if empty else None)
        if isinstance(part, T) and part.dtype is torch.uint8:
            part = part.bool()
        parts.append(part)

    def used(part: Any) -> int:
        """How many dimensions of x this part of the index is for."""
        if part is None or part is Ellipsis:
            return 0
        if isinstance(part, T) and part.dtype is torch.bool:
            return part.dim()
        return 1

    rest = input.dim() - sum(used(p) for p in parts)
    basic: list[Any] = []
    advanced: list[Any] = []
    for part in parts:
        if part is Ellipsis:
            basic += [slice(None)] * rest
            advanced += [slice(None)] * rest
        elif shape.is_basic(part):
            basic.append(int(part) if isinstance(part, T) else part)
            if part is None or isinstance(part, slice):
                advanced.append(slice(None))
        else:
            # A mask of no dimension takes none: it is put on a new one.
            basic += [slice(None)] * used(part) if used(part) else [None]
            advanced.append(part if used(part) else part.reshape(1))
    return tuple(basic), tuple(advanced)


def _changes_nothing(basic: tuple[Any, ...]) -> bool:
    return all(isinstance(p, slice) and p == slice(None) for p in basic)


@composite(T.__setitem__)
def setitem(input: T, index: Any, value: Any) -> None:
    """x[index] = v: a copy into the view x[index], or an index_put_ with masks and indices."""
    if index is False:
        return  # as PyTorch: nothing is meant
    if not isinstance(value, T):
        if not isinstance(value, bool | int | float | complex):
            raise unplaced(T.__setitem__, (input, index, value), {})
        value = torch.tensor(value, dtype=input.dtype, device=input.device)
    if type(input) is Tensor and records_plainly():
        with DisableTorchFunctionSubclass():
            if assigned(input, index, value):
                return
    try:
        target = input.detach()[index].shape
    except (IndexError, TypeError, ValueError) as error:
        if input.is_leaf and isinstance(error, IndexError) and isinstance(index, T):
            change_of(input)  # PyTorch looks at this first
        with DisableTorchFunctionSubclass(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has been said
            copy = input.detach().clone()
            copy[index] = copy if value is input else value.detach()  # PyTorch's own error
        raise
    if isinstance(index, list) and any(
        part is None or part is Ellipsis or isinstance(part, list | tuple | slice | T)
        for part in index
    ):
        index = tuple(index)  # as PyTorch takes, with a warning, a list of more than numbers
    basic, advanced = _split(index, input)
    view = input if _changes_nothing(basic) else shape.getitem(input, basic)
    if all(isinstance(p, slice) for p in advanced):
        if value.dim() == 0 and target and value.is_cpu:
            record(Fill, (view, value), inplace=lambda: view.fill_(value))
            return
        value = _fitted(value, target)
        value.detach().expand(target)  # PyTorch's error for a wrong shape
        record(Copy, (view, value), inplace=lambda: T.copy_(view, value))
        return
    while advanced and isinstance(advanced[-1], slice):
        advanced = advanced[:-1]
    indices = [None if isinstance(p, slice) else p for p in advanced]
    value = _fitted(value, target)

    def put() -> T:
        view[_all_of(indices)] = value
        return view

    record(IndexPut, (view, indices, value), inplace=put)


def _fitted(value: T, target: torch.Size) -> T:
    """The value without its leading dimensions of size one, unless it fits as it is."""
    sizes = list(value.shape)
    if value.shape == target:
        return value
    while sizes and sizes[0] == 1:
        del sizes[0]
    return value if len(sizes) == value.dim() else shape.reshape(value, tuple(sizes))


@inplace(T.index_fill_)
@rule(torch.index_fill, T.index_fill)
class IndexFill(Rule):
    """z = x with v at `index` along dim:  dx = g, zero there,  dv = sum of g there"""

    uncounted = (2,)

    @staticmethod
    def forward(ctx: Any, input: T, dim: int, index: T, value: Any) -> T:
        ctx.dim = dim
        ctx.label = f"IndexFillBackward{int(isinstance(value, T))}"
        ctx.save_for_backward(index)
        return torch.index_fill(input, dim, index, value)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        index = ctx.saved(0)
        dv = None
        if ctx.needs_input_grad[3]:
            dv = g.index_select(ctx.dim, index.unique(sorted=False)).sum()
        dx = g.index_fill(ctx.dim, index, 0) if ctx.needs_input_grad[0] else None
        return dx, None, None, dv


@inplace(T.index_copy_)
@rule(torch.index_copy, T.index_copy)
class IndexCopy(Rule):
    """z = x with s at `index` along dim:  dx = g, zero there,  ds = g there"""

    uncounted = (2,)

    @staticmethod
    def forward(ctx: Any, input: T, dim: int, index: T, source: T) -> T:
        ctx.dim, ctx.shape = dim, source.shape
        ctx.save_for_backward(index, source if ctx.needs_input_grad[3] else None)
        return torch.index_copy(input, dim, index, source)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        (index, _), ds = ctx.saved_tensors, None
        if ctx.needs_input_grad[3]:
            ds = g.index_select(ctx.dim, index).expand(ctx.shape)
        dx = g.index_fill(ctx.dim, index, 0) if ctx.needs_input_grad[0] else None
        return dx, None, None, ds


@inplace(T.index_add_)
@rule(torch.index_add, T.index_add)
class IndexAdd(Rule):
    """z = x with alpha s added at `index` along dim:  dx = g,  ds = alpha g there"""

    uncounted = (2,)

    @staticmethod
    def forward(ctx: Any, input: T, dim: int, index: T, source: T, alpha: Any = 1) -> T:
        ctx.dim, ctx.shape, ctx.alpha = dim, source.shape, alpha
        ctx.save_for_backward(index, source if ctx.needs_input_grad[3] else None)
        return torch.index_add(input, dim, index, source, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        ds = None
        if ctx.needs_input_grad[3]:
            index, _ = ctx.saved_tensors
            ds = g.index_select(ctx.dim, index).expand(ctx.shape) * ctx.alpha
        return g, None, None, ds, None


@inplace(T.scatter_add_)
@rule(torch.scatter_add, T.scatter_add)
class ScatterAdd(Rule):
    """z = x with s added at `index` along dim, element by element:  dx = g,  ds = g there"""

    uncounted = (2,)

    @staticmethod
    def forward(ctx: Any, input: T, dim: int, index: T, src: T) -> T:
        ctx.dim = dim
        ctx.save_for_backward(index)
        return torch.scatter_add(input, dim, index, src)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        index = ctx.saved(0) if ctx.needs_input_grad[3] else None
        return g, None, None, None if index is None else g.gather(ctx.dim, index)


class Scatter(Rule):
    """z = x with s put at `index` along dim:  dx = g, zero there,  ds = g there"""

    uncounted = (2,)

    @staticmethod
    def forward(ctx: Any, input: T, dim: int, index: T, src: Any) -> T:
        ctx.dim = dim
        ctx.label = f"ScatterBackward{int(not isinstance(src, T))}"
        ctx.save_for_backward(index)
        return torch.scatter(input, dim, index, src)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        index = ctx.saved(0)
        return (
            g.scatter(ctx.dim, index, 0) if ctx.needs_input_grad[0] else None,
            None,
            None,
            g.gather(ctx.dim, index) if ctx.needs_input_grad[3] else None,
        )


@composite(torch.scatter, T.scatter)
def scatter(input: T, dim: int, index: T, src: Any = None, **kwargs: Any) -> T:
    return record(Scatter, (input, dim, index, _source(torch.scatter, src, kwargs)))[0]


@composite(T.scatter_)
def scatter_(input: T, dim: int, index: T, src: Any = None, **kwargs: Any) -> T:
    src = _source(T.scatter_, src, kwargs)
    return record(
        Scatter, (input, dim, index, src), inplace=lambda: T.scatter_(input, dim, index, src)
    )[0]


def _source(func: Any, src: Any, kwargs: dict[str, Any]) -> Any:
    if src is None and set(kwargs) == {"value"}:
        return kwargs["value"]
    if kwargs or src is None:
        raise refusal(func, "with these arguments")
    return src


@inplace(T.put_)
@rule(torch.put, T.put)
class Put(Rule):
    """z = x, laid out in a row, with s put at `index`:  dx = g, zero there,  ds = g there

    With `accumulate` s is added, and dx = g.
    """

    uncounted = (1,)

    @staticmethod
    def forward(ctx: Any, input: T, index: T, source: T, accumulate: bool = False) -> T:
        z = torch.put(input, index, source, accumulate)
        ctx.accumulate, ctx.shape = accumulate, source.shape
        ctx.save_for_backward(index, source if ctx.needs_input_grad[2] else None)
        return z

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        dx = ds = None
        index, _ = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            dx = g if ctx.accumulate else g.put(index, g.new_zeros(ctx.shape))
        if ctx.needs_input_grad[2]:
            ds = g.take(index).reshape(ctx.shape)
        return dx, None, ds, None


class _Reduced(Rule):
    """z = x and what of s is put at the same place, reduced to one:

    sum:  dx = g,  ds = g there;  mean:  both divided by how many were reduced;  amax, amin:  g
    shared evenly between those equal to z;  prod:  g times the product of the others. Where x is
    not included and something was put, dx = 0.
    """

    uncounted = (2,)

    # How many-to-one placing goes: by elements of `index`, or by slices.
    place: Any
    taken: Any
    added: Any

    @staticmethod
    def forward(
        ctx: Any, input: T, dim: int, index: T, src: T, reduce: str, include_self: bool = True
    ) -> T:
        z: T = ctx.function.place(input, dim, index, src, reduce, include_self=include_self)
        ctx.how = dim, reduce, include_self
        ctx.shape = input.shape
        if reduce == "sum":
            ctx.save_for_backward(index, None, src if ctx.needs_input_grad[3] else None, None)
        else:
            ctx.save_for_backward(index, input, src, None if reduce == "mean" else z)
        return z

    @classmethod
    def grads(
        cls, g: T, x: T, dim: int, index: T, src: T, z: T, reduce: str, include: bool
    ) -> tuple[T, T]:
        """dx, as if x was included, and ds."""
        taken, added = cls.taken, cls.added
        if reduce == "mean":
            count = torch.ones_like(g) if include else torch.zeros_like(g)
            count = added(count, dim, index, torch.ones_like(src))
            count.masked_fill_(count == 0, 1)
            return g / count, taken(g, dim, index) / taken(count, dim, index)
        if reduce == "prod":
            others = x.masked_fill(x == 0, 1)
            product = cls.place(others, dim, index, src, reduce, include_self=include)
            dx = g * product / others
            zero = src == 0
            zeros = taken(added(torch.zeros_like(x), dim, index, zero.to(x.dtype)), dim, index)
            alone = zero & (zeros == 1)
            without = src.masked_fill(alone, 1)
            product = cls.place(x, dim, index, without, reduce, include_self=include)
            ds = taken(g * z, dim, index) / src.masked_fill(zero, 1)
            return dx, torch.where(alone, taken(g * product, dim, index), ds)
        x_is, src_is = x == z, src == taken(z, dim, index)
        share = g / added(x_is.to(x.dtype), dim, index, src_is.to(x.dtype))
        return x_is * share, src_is * taken(share, dim, index)

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        dim, reduce, include = ctx.how
        index, x, src, z = ctx.saved_tensors
        needs = ctx.needs_input_grad
        function = ctx.function
        if reduce == "sum":
            dx, ds = g, function.taken(g, dim, index) if needs[3] else None
        else:
            dx, ds = function.grads(g, x, dim, index, src, z, reduce, include)
        if not include:
            dx = function.cleared(dx, dim, index)
        return dx if needs[0] else None, None, None, ds if needs[3] else None, None, None


@inplace(T.scatter_reduce_)
@rule(torch.scatter_reduce, T.scatter_reduce)
class ScatterReduce(_Reduced):
    __doc__ = _Reduced.__doc__

    place = staticmethod(torch.scatter_reduce)
    taken = staticmethod(torch.gather)
    added = staticmethod(torch.scatter_add)

    @staticmethod
    def cleared(dx: T, dim: int, index: T) -> T:
        return dx.scatter(dim, index, 0)


@inplace(T.index_reduce_)
@rule(torch.index_reduce, T.index_reduce)
class IndexReduce(_Reduced):
    __doc__ = _Reduced.__doc__

    place = staticmethod(torch.index_reduce)
    taken = staticmethod(torch.index_select)
    added = staticmethod(torch.index_add)

    @staticmethod
    def cleared(dx: T, dim: int, index: T) -> T:
        return dx.index_fill(dim, index, 0)
