"""Operations that write values into a tensor: assignment, filling, scattering.

The gradient of overwritten elements is zero; that of the values is g at their places.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .._torch import DisableTorchFunctionSubclass
from .._types import IndexLike, Number, TorchFunction
from ..tape import record
from ..tensor import Tensor
from ..views import AsStrided, assigned, check_inplace
from . import shape
from .arithmetic import zero
from .registry import Rule, answered, composite, inplace, refusal, rule, unplaced

T = torch.Tensor


@inplace(T.copy_)
class Copy(Rule):
    """x becomes y:  dx = 0,  dy = g"""

    overwrites = True

    @staticmethod
    def forward(input: T, src: T, non_blocking: bool = False) -> T:
        return input

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)

    @staticmethod
    def d_src(g: T) -> T:
        return g

    @classmethod
    def node_name(cls) -> str:
        return "torch::autograd::CopyBackwards"


class _Overwritten(Rule):
    """x becomes something that does not depend on it:  dx = 0"""

    overwrites = True

    @staticmethod
    def forward(input: T) -> T:
        return input

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)


def _overwritten(method: TorchFunction, name: str) -> None:
    made = type(name, (_Overwritten,), {"__doc__": _Overwritten.__doc__})

    def call(input: T, *args: object, **kwargs: object) -> T:
        return record(made, (input,), inplace=lambda: method(input, *args, **kwargs))[0]

    composite(method, getattr(torch, method.__name__, method))(call)


for _name in ("zero_", "uniform_", "normal_", "exponential_", "cauchy_", "log_normal_"):
    _overwritten(getattr(T, _name), "".join(p.capitalize() for p in _name.split("_")))


@inplace(T.fill_, torch.fill_)
@rule(torch.fill)
class Fill(Rule):
    """Every element of x becomes v:  dx = 0,  dv = sum of g"""

    overwrites = True
    in_place = {"FillBackward0": "FillBackward2", "FillBackward1": "FillBackward3"}

    @staticmethod
    def forward(input: T, value: T | Number) -> T:
        return torch.fill(input, value)

    @classmethod
    def label_of(cls, input: T, value: T | Number) -> str:
        return f"FillBackward{int(isinstance(value, T))}"

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)

    @staticmethod
    def d_value(g: T) -> T:
        return g.sum()


@composite(T.fill_diagonal_)
def fill_diagonal_(input: T, fill_value: Number, wrap: bool = False) -> T:
    """Every element of the diagonal becomes a number; with `wrap`, of those below, too, in a matrix
    with more rows."""
    torch.empty_like(input.detach()).fill_diagonal_(fill_value, wrap)  # has PyTorch's errors
    rows, columns = input.shape[:2]
    steps, offset, length = sum(input.stride()), input.storage_offset(), min(rows, columns)
    places = [(length, offset)]
    if wrap and input.dim() == 2 and rows > columns + 1:
        below = -(-input.numel() // (columns + 1)) - length
        places.append((below, offset + input.stride(0) * (columns + 1)))
    for length, offset in places:
        view = record(AsStrided, (input, (length,), (steps,), offset))[0]
        record(Fill, (view, fill_value), inplace=partial(view.fill_, fill_value))
    return input


@inplace(T.masked_fill_)
@rule(torch.masked_fill, T.masked_fill)
class MaskedFill(Rule):
    """z = v where the mask holds, else x:  dx = g elsewhere, else 0,  dv = sum of g there"""

    uncounted = (1,)

    @staticmethod
    def forward(input: T, mask: T, value: T | Number) -> T:
        return torch.masked_fill(input, mask, value)

    @classmethod
    def label_of(cls, input: T, mask: T, value: T | Number) -> str:
        return f"MaskedFillBackward{int(isinstance(value, T))}"

    @staticmethod
    def d_input(g: T, mask: T) -> T:
        return g.masked_fill(mask, 0)

    @staticmethod
    def d_value(g: T, mask: T) -> T:
        return g.masked_select(mask).sum()


@inplace(T.masked_scatter_)
@rule(torch.masked_scatter, T.masked_scatter)
class MaskedScatter(Rule):
    """z = the next element of s where the mask holds, else x:  dx = g elsewhere,  ds = g there"""

    uncounted = (1,)

    @staticmethod
    def forward(input: T, mask: T, source: T) -> T:
        return torch.masked_scatter(input, mask, source)

    @staticmethod
    def d_input(g: T, mask: T) -> T:
        return g.masked_fill(mask, 0)

    @staticmethod
    def d_source(g: T, mask: T, source_shape: torch.Size) -> T:
        taken = g.masked_select(mask)
        ds = torch.zeros(source_shape, dtype=g.dtype, device=g.device)
        ds.view(-1)[: len(taken)] = taken[: ds.numel()]
        return ds


class IndexPut(Rule):
    """z = x with z[indices] = v, or += v:  dx = g, zero where overwritten,  dv = g[indices]"""

    counted = (0, 1)
    dynamic_grad_shape = True
    public = staticmethod(torch.index_put)

    @staticmethod
    def as_called(input: T, values: T, accumulate: bool, *indices: T | None) -> tuple[object, ...]:
        return input, indices, values, accumulate

    @staticmethod
    def forward(input: T, values: T, accumulate: bool, *indices: T | None) -> T:
        if not any(i is None for i in indices):
            return torch.index_put(input, indices, values, accumulate)
        z = input.clone()
        z[_all_of(indices)] = values
        return z

    @staticmethod
    def d_input(g: T, accumulate: bool, indices: tuple[T | None, ...]) -> T:
        if accumulate:
            return g
        dx = g.clone()
        if not any(i is None for i in indices):
            return dx.index_put_(indices, zero(g))
        dx[_all_of(indices)] = 0
        return dx

    @staticmethod
    def d_values(g: T, indices: tuple[T | None, ...]) -> T:
        return g[_all_of(indices)]


@answered(torch.index_put, T.index_put)
def index_put(input: T, indices: Sequence[T | None], values: T, accumulate: bool = False) -> T:
    if not isinstance(indices, list | tuple):
        raise unplaced(torch.index_put, (input, indices, values, accumulate), {})
    return record(IndexPut, (input, values, accumulate, *indices))[0]


@answered(T.index_put_, torch.index_put_)
def index_put_(input: T, indices: Sequence[T | None], values: T, accumulate: bool = False) -> T:
    if not isinstance(indices, list | tuple):
        raise unplaced(T.index_put_, (input, indices, values, accumulate), {})
    return record(
        IndexPut,
        (input, values, accumulate, *indices),
        inplace=lambda: T.index_put_(input, indices, values, accumulate),
    )[0]


def _all_of(indices: Sequence[T | None]) -> tuple[T | slice, ...]:
    return tuple(slice(None) if i is None else i for i in indices)


def _split(index: IndexLike, input: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """x[index] as x[basic][advanced]: first the part that makes a view, then masks and index
    tensors."""
    parts: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, range):
            part = list(part)
        if isinstance(part, list | tuple | bool) or type(part).__module__ == "numpy":
            empty = isinstance(part, list | tuple) and not part
            part = torch.as_tensor(part, device=input.device, dtype=torch.long if empty else None)
        if isinstance(part, T) and part.dtype is torch.uint8:
            part = part.bool()
        parts.append(part)

    def used(part: object) -> int:
        """The number of dimensions of x that this part of the index covers."""
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
            # A mask without dimensions covers none: it indexes a new one.
            basic += [slice(None)] * used(part) if used(part) else [None]
            advanced.append(part if used(part) else part.reshape(1))
    return tuple(basic), tuple(advanced)


def _changes_nothing(basic: tuple[object, ...]) -> bool:
    return all(isinstance(p, slice) and p == slice(None) for p in basic)


@composite(T.__setitem__)
def setitem(input: T, index: IndexLike, value: Any) -> None:
    """x[index] = v: a copy into the view x[index], or an index_put_ with masks and indices."""
    if index is False:
        return  # as in PyTorch: an empty selection
    if not isinstance(value, T):
        if not isinstance(value, bool | int | float | complex):
            raise unplaced(T.__setitem__, (input, index, value), {})
        value = torch.tensor(value, dtype=input.dtype, device=input.device)
    if type(input) in (Tensor, T) and torch.is_grad_enabled() and assigned(input, index, value):
        return
    if isinstance(index, T) and _are_rows(input, index, value):
        put_rows = partial(T.index_put_, input, (index,), value)
        record(IndexPut, (input, value, False, index), inplace=put_rows)
        return
    try:
        target = input.detach()[index].shape
    except (IndexError, TypeError, ValueError) as error:
        if input.is_leaf and isinstance(error, IndexError) and isinstance(index, T):
            check_inplace(input)  # PyTorch checks this first
        with DisableTorchFunctionSubclass(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # already raised above
            copy = input.detach().clone()
            copy[index] = copy if value is input else value.detach()  # PyTorch's own error
        raise
    if isinstance(index, list) and any(
        part is None or part is Ellipsis or isinstance(part, list | tuple | slice | T)
        for part in index
    ):
        index = tuple(index)  # a list with more than numbers, as in PyTorch (with a warning)
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

    record(IndexPut, (view, value, False, *indices), inplace=put)


def _are_rows(input: T, index: T, value: T) -> bool:
    """Is the index one mask or one index tensor, and has the value a row for each that it selects?

    For a mask torch finds out when it sets them. A single row might be for any number of them.
    """
    if type(index) is not T or index.requires_grad:
        return False
    with DisableTorchFunctionSubclass():
        sizes, of_value, n = input.shape, value.shape, index.dim()
        if n == 0 or value.dtype is not input.dtype or value.device != input.device:
            return False
        if index.dtype is torch.bool:
            covers = index.shape == sizes[:n]
            return covers and of_value[:1] != (1,) and of_value[1:] == sizes[n:] and bool(of_value)
        return index.dtype is torch.int64 and len(sizes) > 0 and of_value == index.shape + sizes[1:]


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
    def forward(input: T, dim: int, index: T, value: T | Number) -> T:
        return torch.index_fill(input, dim, index, value)

    @classmethod
    def label_of(cls, input: T, dim: int, index: T, value: T | Number) -> str:
        return f"IndexFillBackward{int(isinstance(value, T))}"

    @staticmethod
    def d_input(g: T, dim: int, index: T) -> T:
        return g.index_fill(dim, index, 0)

    @staticmethod
    def d_value(g: T, dim: int, index: T) -> T:
        return g.index_select(dim, index.unique(sorted=False)).sum()


@inplace(T.index_copy_)
@rule(torch.index_copy, T.index_copy)
class IndexCopy(Rule):
    """z = x with s at `index` along dim:  dx = g, zero there,  ds = g there"""

    uncounted = (2,)

    @staticmethod
    def forward(input: T, dim: int, index: T, source: T) -> T:
        return torch.index_copy(input, dim, index, source)

    @staticmethod
    def d_input(g: T, dim: int, index: T) -> T:
        return g.index_fill(dim, index, 0)

    @staticmethod
    def d_source(g: T, dim: int, index: T, source: T) -> T:
        return g.index_select(dim, index).expand(source.shape)


@inplace(T.index_add_)
@rule(torch.index_add, T.index_add)
class IndexAdd(Rule):
    """z = x with alpha s added at `index` along dim:  dx = g,  ds = alpha g there"""

    uncounted = (2,)

    @staticmethod
    def forward(input: T, dim: int, index: T, source: T, alpha: Number = 1) -> T:
        return torch.index_add(input, dim, index, source, alpha=alpha)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @staticmethod
    def d_source(g: T, dim: int, index: T, source: T, alpha: Number) -> T:
        return g.index_select(dim, index).expand(source.shape) * alpha


@inplace(T.scatter_add_)
@rule(torch.scatter_add, T.scatter_add)
class ScatterAdd(Rule):
    """z = x with s added at `index` along dim, element by element:  dx = g,  ds = g there"""

    uncounted = (2,)

    @staticmethod
    def forward(input: T, dim: int, index: T, src: T) -> T:
        return torch.scatter_add(input, dim, index, src)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @staticmethod
    def d_src(g: T, dim: int, index: T) -> T:
        return g.gather(dim, index)


class Scatter(Rule):
    """z = x with s put at `index` along dim:  dx = g, zero there,  ds = g there"""

    uncounted = (2,)

    @staticmethod
    def forward(input: T, dim: int, index: T, src: T | Number) -> T:
        return torch.scatter(input, dim, index, src)

    @classmethod
    def label_of(cls, input: T, dim: int, index: T, src: T | Number) -> str:
        return f"ScatterBackward{int(not isinstance(src, T))}"

    @staticmethod
    def d_input(g: T, dim: int, index: T) -> T:
        return g.scatter(dim, index, 0)

    @staticmethod
    def d_src(g: T, dim: int, index: T) -> T:
        return g.gather(dim, index)


@composite(torch.scatter, T.scatter)
def scatter(input: T, dim: int, index: T, src: T | None = None, **kwargs: object) -> T:
    return record(Scatter, (input, dim, index, _source(torch.scatter, src, kwargs)))[0]


_scatter_: TorchFunction = T.scatter_


@composite(T.scatter_)
def scatter_(input: T, dim: int, index: T, src: T | None = None, **kwargs: object) -> T:
    source = _source(T.scatter_, src, kwargs)
    return record(
        Scatter,
        (input, dim, index, source),
        inplace=lambda: _scatter_(input, dim, index, source),
    )[0]


def _source(func: TorchFunction, src: T | None, kwargs: dict[str, Any]) -> T | Number:
    if src is None and set(kwargs) == {"value"}:
        return kwargs["value"]
    if kwargs or src is None:
        raise refusal(func, "with these arguments")
    return src


@inplace(T.put_)
@rule(torch.put, T.put)
class Put(Rule):
    """z = x, laid out in a row, with s put at `index`:  dx = g, zero there,  ds = g there

    With `accumulate`, s is added and dx = g.
    """

    uncounted = (1,)

    @staticmethod
    def forward(input: T, index: T, source: T, accumulate: bool = False) -> T:
        return torch.put(input, index, source, accumulate)

    @staticmethod
    def d_input(g: T, index: T, source_shape: torch.Size, accumulate: bool) -> T:
        return g if accumulate else g.put(index, g.new_zeros(source_shape))

    @staticmethod
    def d_source(g: T, index: T, source: T) -> T:
        return g.take(index).reshape(source.shape)


class _Reduced(Rule):
    """z = x and what of s is put at the same place, reduced to one:

    sum:  dx = g,  ds = g there;  mean:  both divided by the number of reduced elements;  amax,
    amin:  g shared evenly between those equal to z;  prod:  g times the product of the others. If x
    is not included, dx = 0 where something was written.  Saved: x, s, index and z, all of them as
    in PyTorch, so that none may be changed.
    """

    uncounted = (2,)

    # How several values are reduced to one: by elements of `index`, or by slices.
    place: Callable[..., T]
    taken: Callable[[T, int, T], T]
    added: Callable[[T, int, T, T], T]
    cleared: Callable[[T, int, T], T]

    @classmethod
    def forward(
        cls, input: T, dim: int, index: T, src: T, reduce: str, include_self: bool = True
    ) -> T:
        return cls.place(input, dim, index, src, reduce, include_self=include_self)

    @classmethod
    def gradients(
        cls,
        needs: Sequence[bool],
        g: T,
        input: T,
        dim: int,
        index: T,
        src: T,
        reduce: str,
        include_self: bool,
        result: T,
    ) -> tuple[T | None, ...]:
        if reduce == "sum":
            dx, ds = g, cls.taken(g, dim, index) if needs[3] else None
        elif reduce == "mean":
            dx, ds = cls.of_mean(g, dim, index, src, include_self)
        elif reduce == "prod":
            dx, ds = cls.of_product(g, input, dim, index, src, include_self, result)
        else:
            dx, ds = cls.of_extreme(g, input, dim, index, src, result)
        if not include_self:
            dx = cls.cleared(dx, dim, index)
        return dx if needs[0] else None, None, None, ds if needs[3] else None

    # dx, as if x was included, and ds:

    @classmethod
    def of_mean(cls, g: T, dim: int, index: T, src: T, include_self: bool) -> tuple[T, T]:
        count = torch.ones_like(g) if include_self else torch.zeros_like(g)
        count = cls.added(count, dim, index, torch.ones_like(src))
        count.masked_fill_(count == 0, 1)
        return g / count, cls.taken(g, dim, index) / cls.taken(count, dim, index)

    @classmethod
    def of_product(
        cls, g: T, x: T, dim: int, index: T, src: T, include_self: bool, z: T
    ) -> tuple[T, T]:
        others = x.masked_fill(x == 0, 1)
        product = cls.place(others, dim, index, src, "prod", include_self=include_self)
        dx = g * product / others
        zero = src == 0
        zeros = cls.added(torch.zeros_like(x), dim, index, zero.to(x.dtype))
        alone = zero & (cls.taken(zeros, dim, index) == 1)
        without = src.masked_fill(alone, 1)
        product = cls.place(x, dim, index, without, "prod", include_self=include_self)
        ds = cls.taken(g * z, dim, index) / src.masked_fill(zero, 1)
        return dx, torch.where(alone, cls.taken(g * product, dim, index), ds)

    @classmethod
    def of_extreme(cls, g: T, x: T, dim: int, index: T, src: T, z: T) -> tuple[T, T]:
        x_is, src_is = x == z, src == cls.taken(z, dim, index)
        share = g / cls.added(x_is.to(x.dtype), dim, index, src_is.to(x.dtype))
        return x_is * share, src_is * cls.taken(share, dim, index)


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
