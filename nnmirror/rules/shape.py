"""Operations that move elements without changing them.

A view shares memory with its input (`is_view`); its gradient is the view undone.
"""

import contextlib
import itertools
import numbers
import operator
from collections.abc import Callable, Iterator, Sequence
from types import EllipsisType
from typing import Any

import torch

from .. import _torch
from .. import tensor as _tensor
from .._torch import DisableTorchFunctionSubclass, is_torch_function_enabled
from .._types import IndexLike, Size, TorchFunction
from .._upcalls import implements
from ..formula import as_now
from ..tape import record
from ..tensor import AT, C_shape, no_complex, reshaping
from ..views import AsStrided
from .gradient import applied
from .registry import (
    Rule,
    answered,
    composite,
    inplace,
    name_of,
    plain_values,
    refusal,
    rule,
    unplaced,
)

T = torch.Tensor


_MANY = (tuple, list)  # isinstance is several times slower with tuple | list


def _sizes(size: tuple[Any, ...]) -> Sequence[int]:
    """x.view(2, 3) and x.view((2, 3)) are the same."""
    return size[0] if len(size) == 1 and isinstance(size[0], _MANY) else size


class View(Rule):
    """z = x viewed with another shape:  dx = g viewed with the shape of x"""

    is_view = True

    @staticmethod
    def forward(input: T, *size: int) -> T:
        return T.view(input, *size)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size) -> T:
        return g.reshape(input_shape)


@composite(T.view, directly=True, repeats=True)
def view(input: T, *size: int | Sequence[int] | torch.dtype, **kwargs: Any) -> T:
    if "dtype" in kwargs or (size and isinstance(size[0], torch.dtype)):
        dtype = kwargs.get("dtype", size[0] if size else None)
        if dtype is not input.dtype:
            raise refusal(T.view, "for another dtype")
        size = (tuple(input.shape),)
    if "size" in kwargs:
        size = (kwargs["size"],)
    return record(View, (input, *size))[0]


@composite(T.view_as, directly=True)
def view_as(input: T, other: T) -> T:
    if type(input) is T and not input.requires_grad:  # only the other one is tracked
        with DisableTorchFunctionSubclass():
            return input.view(other.shape)
    return record(View, (input, tuple(other.shape)))[0]


class Reshape(Rule):
    """z = x copied into a shape that a view cannot have:  dx = g with the shape of x"""

    @staticmethod
    def forward(input: T, shape: torch.Size) -> T:
        return input.reshape(shape)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size) -> T:
        return g.reshape(input_shape)

    @classmethod
    def node_name(cls) -> str:
        return "UnsafeViewBackward0"


class UnsafeView(Rule):
    """z = x with another shape, for an x not used elsewhere:  dx = g with the shape of x"""

    @staticmethod
    def forward(input: T, size: Sequence[int]) -> T:
        return T.view(input, size)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size) -> T:
        return g.reshape(input_shape)


def unsafe_view(input: T, size: Sequence[int]) -> T:
    return record(UnsafeView, (input, size))[0]


class Clone(Rule):
    """z = a copy of x:  dx = g"""

    @staticmethod
    def forward(input: T, memory_format: torch.memory_format = torch.preserve_format) -> T:
        return torch.clone(input, memory_format=memory_format)

    @staticmethod
    def d_input(g: T) -> T:
        return g


rule(torch.clone, T.clone)(Clone)


@composite(T.contiguous, directly=True)
def contiguous(input: T, memory_format: torch.memory_format = torch.contiguous_format) -> T:
    if input.is_contiguous(memory_format=memory_format):
        return input
    return record(Clone, (input, memory_format))[0]


@composite(torch.reshape, T.reshape, directly=True, repeats=True)
def reshape(input: T, *shape: int | Sequence[int], **kwargs: Any) -> T:
    size = kwargs["shape"] if "shape" in kwargs else _sizes(shape)
    with DisableTorchFunctionSubclass():
        is_view = input.layout is torch.strided and input.is_contiguous()
    if is_view and isinstance(size, _MANY) and all([type(n) is int for n in size]):
        return record(View, (input, tuple(size)))[0]
    with DisableTorchFunctionSubclass():
        shown = input.detach().reshape(size)  # PyTorch's errors; -1 worked out
        target = shown.shape
        is_view = shown._is_view()
    if is_view:
        return record(View, (input, tuple(target)))[0]
    return record(Reshape, (input, target))[0]


@composite(T.reshape_as)
def reshape_as(input: T, other: T) -> T:
    return reshape(input, tuple(other.shape))


@composite(torch.flatten, T.flatten, directly=True, repeats=True)
def flatten(input: T, start_dim: int = 0, end_dim: int = -1) -> T:
    with DisableTorchFunctionSubclass():
        target = input.detach().flatten(start_dim, end_dim).shape
        if target == C_shape(input):
            return input
    return reshape(input, tuple(target))


@composite(torch.ravel, T.ravel, repeats=True)
def ravel(input: T) -> T:
    return reshape(contiguous(input), (-1,))


@composite(torch.unflatten, T.unflatten, repeats=True)
def unflatten(input: T, dim: int, sizes: Sequence[int]) -> T:
    return record(View, (input, tuple(input.detach().unflatten(dim, sizes).shape)))[0]


@rule(torch.unsqueeze, T.unsqueeze)
class Unsqueeze(Rule):
    """z = x with a new dimension of size one:  dx = g without it"""

    is_view = True
    in_place = {"UnsqueezeBackward0": "UnsqueezeBackward1"}

    @staticmethod
    def forward(input: T, dim: int) -> T:
        return torch.unsqueeze(input, dim)

    @staticmethod
    def d_input(g: T, dim: int) -> T:
        return g.squeeze(dim)


def unsqueeze(input: T, dim: int) -> T:
    return record(Unsqueeze, (input, dim))[0]


@rule(torch.squeeze, T.squeeze)
class Squeeze(Rule):
    """z = x without (these) dimensions of size one:  dx = g with them"""

    is_view = True
    in_place = {f"SqueezeBackward{i}": f"SqueezeBackward{i + 3}" for i in range(3)}

    @staticmethod
    def forward(input: T, dim: int | Sequence[int] | None = None) -> T:
        return torch.squeeze(input) if dim is None else torch.squeeze(input, dim)  # type: ignore[arg-type]

    @classmethod
    def label_of(cls, input: T, dim: int | Sequence[int] | None = None) -> str:
        if dim is None:
            return ""
        return "SqueezeBackward1" if isinstance(dim, int) else "SqueezeBackward2"

    @staticmethod
    def d_input(g: T, input_shape: torch.Size) -> T:
        return g.reshape(input_shape)


def squeeze(input: T, dim: int) -> T:
    return record(Squeeze, (input, dim))[0]


def squeeze_product(input: T, dim: int) -> T:
    """The squeeze at the end of a vector-matrix product, with PyTorch's name."""
    out, node = record(Squeeze, (input, dim))
    if out.requires_grad:
        node.label = "SqueezeBackward4"  # type: ignore[union-attr]
        out._view_of = None  # no other tensor shares the product's memory
    return out


@rule(torch.transpose, T.transpose, torch.swapaxes, T.swapaxes, torch.swapdims, T.swapdims)
class Transpose(Rule):
    """z = x with two dimensions exchanged:  dx = g with them exchanged"""

    is_view = True
    in_place = {"TransposeBackward0": "TransposeBackward1"}

    @staticmethod
    def forward(input: T, dim0: int, dim1: int) -> T:
        return torch.transpose(input, dim0, dim1)

    @staticmethod
    def d_input(g: T, dim0: int, dim1: int) -> T:
        return g.transpose(dim0, dim1)


def transpose(input: T, dim0: int, dim1: int) -> T:
    return record(Transpose, (input, dim0, dim1))[0]


@composite(T.mT.__get__, T.mH.__get__, torch.adjoint, T.adjoint, repeats=True)  # type: ignore[attr-defined]
def mT(input: T) -> T:
    if input.dim() == 0:
        return input
    if input.dim() == 1:
        raise unplaced(T.mT.__get__, (input,), {})  # type: ignore[attr-defined]
    return transpose(input, -2, -1)


@composite(T.H.__get__, repeats=True)  # type: ignore[attr-defined]
def H(input: T) -> T:
    shown = input.detach().H  # PyTorch's errors
    return transpose(input, 0, 1) if shown.dim() == 2 else input


def _of_real(*funcs: TorchFunction) -> None:
    """Functions that return a real tensor itself."""

    def answer(func: TorchFunction) -> None:
        @composite(func)
        def itself(input: T) -> T:
            if not input.is_complex():
                return input
            if input.requires_grad:
                raise no_complex(name_of(func))
            with DisableTorchFunctionSubclass():
                return func(input)  # type: ignore[no-any-return]

    for func in funcs:
        answer(func)


_of_real(torch.real, T.real.__get__, torch.conj, T.conj)  # type: ignore[attr-defined]
_of_real(torch.resolve_conj, T.resolve_conj, torch.resolve_neg, T.resolve_neg)


@rule(torch.t, T.t)
class TRule(Rule):
    """Z = X^T:  dX = G^T"""

    is_view = True
    in_place = {"TBackward0": "TBackward1"}

    @staticmethod
    def forward(input: T) -> T:
        return torch.t(input)

    @staticmethod
    def d_input(g: T) -> T:
        return g.t()

    @classmethod
    def node_name(cls) -> str:
        return "TBackward0"


def t(input: T) -> T:
    return record(TRule, (input,))[0]


def _seen_otherwise(function: type[Rule], *methods: TorchFunction) -> None:
    """The in-place form: the tensor itself gets the other shape."""
    for method in methods:

        def call(input: T, *args: object, _method: TorchFunction = method) -> T:
            if input._is_view():
                raise refusal(_method, "for a view")
            return record(function, (input, *args), inplace=lambda: _method(input, *args))[0]

        composite(method)(reshaping(call))


_seen_otherwise(Unsqueeze, T.unsqueeze_)
_seen_otherwise(Squeeze, T.squeeze_)
_seen_otherwise(Transpose, T.transpose_, T.swapaxes_, T.swapdims_)
_seen_otherwise(TRule, T.t_)


class Permute(Rule):
    """z = x with its dimensions in another order:  dx = g with the order undone"""

    is_view = True

    @staticmethod
    def forward(input: T, dims: Sequence[int]) -> T:
        return torch.permute(input, dims)  # type: ignore[arg-type]

    @staticmethod
    def d_input(g: T, dims: Sequence[int]) -> T:
        order = [d % g.dim() for d in dims]
        return g.permute(sorted(range(len(order)), key=order.__getitem__))


@composite(torch.permute, T.permute, directly=True, repeats=True)
def permute(input: T, *dims: int | Sequence[int], **kwargs: object) -> T:
    return record(Permute, (input, kwargs["dims"] if "dims" in kwargs else _sizes(dims)))[0]


@composite(T.T.__get__, repeats=True)  # type: ignore[attr-defined]
def numpy_T(input: T) -> T:
    input.detach().T  # noqa: B018  PyTorch's warning for other than two dimensions
    return record(Permute, (input, tuple(range(input.dim() - 1, -1, -1))))[0]


class Expand(Rule):
    """z = x repeated along new or single dimensions:  dx = g summed over them"""

    is_view = True

    @staticmethod
    def forward(input: T, size: Sequence[int]) -> T:
        return T.expand(input, size)  # type: ignore[arg-type]

    @staticmethod
    def d_input(g: T, input_shape: torch.Size) -> T:
        return g.sum_to_size(input_shape)


def expand(input: T, size: Sequence[int]) -> T:
    return record(Expand, (input, tuple(size)))[0]


@composite(T.expand, directly=True, repeats=True)
def expand_method(input: T, *size: int | Sequence[int], **kwargs: Any) -> T:
    return expand(input, kwargs["size"] if "size" in kwargs else _sizes(size))


@composite(T.expand_as, directly=True)
def expand_as(input: T, other: T) -> T:
    return expand(input, other.shape)


@composite(torch.broadcast_to, T.broadcast_to, repeats=True)
def broadcast_to(input: T, size: Sequence[int]) -> T:
    return expand(input, size)


def broadcast_shapes(*shapes: Sequence[int]) -> Sequence[int]:
    """As `torch.broadcast_shapes`, which takes a hundred microseconds, as it allows for symbols."""
    sizes: list[int] = []
    for every in itertools.zip_longest(*map(reversed, shapes), fillvalue=1):
        others = {*every} - {1}
        if len(others) > 1:
            torch.broadcast_shapes(*shapes)  # type: ignore[arg-type]  # raises PyTorch's error
        sizes.append(others.pop() if others else 1)
    return sizes[::-1]


@composite(torch.broadcast_tensors)
def broadcast_tensors(*tensors: T) -> tuple[T, ...]:
    if len(tensors) == 1 and isinstance(tensors[0], list | tuple):
        tensors = tuple(tensors[0])
    with DisableTorchFunctionSubclass():
        try:
            shapes = [*map(C_shape, tensors)]
        except TypeError:  # not a tensor: PyTorch's error follows
            shapes = []
        if shapes and shapes.count(shapes[0]) == len(shapes):
            return tensors
        # Tensors that torch tracks are detached; those that the mirror tracks have no torch graph.
        plain = [t.detach() if type(t) is T and t.requires_grad else t for t in tensors]
        made = _torch.broadcast_tensors(plain)
        shape = made[0].shape
        # Itself, or a view of it; None for one that has to be recorded.
        found: list[T | None] = [
            t if own == shape else None if _may_carry(t) else view
            for t, own, view in zip(tensors, shapes, made, strict=True)
        ]
    return tuple(
        [expand(t, shape) if f is None else f for f, t in zip(found, tensors, strict=True)]
    )


def _may_carry(tensor: T) -> bool:
    """Can it carry a gradient, or does it define dispatch?"""
    return isinstance(tensor, T) and (type(tensor) is not T or tensor.requires_grad)


_meshgrid_of_list: TorchFunction = _torch.meshgrid


@answered(torch.meshgrid, _meshgrid_of_list)
def meshgrid(*tensors: T, indexing: str | None = None) -> Sequence[T]:
    """Each tensor along a dimension of its own, repeated along those of the others"""
    if len(tensors) == 1 and isinstance(tensors[0], list | tuple):
        tensors = tuple(tensors[0])
    with DisableTorchFunctionSubclass():
        plain = plain_values(tensors)
        shown = torch.meshgrid(plain, **({} if indexing is None else {"indexing": indexing}))
    swap = indexing == "xy" and len(tensors) > 1
    order = [1, 0, *range(2, len(tensors))] if swap else list(range(len(tensors)))
    size = [tensors[i].numel() for i in order]
    grids: list[T] = list(shown)
    for at, i in enumerate(order):
        along = [1] * len(tensors)
        along[at] = -1
        grids[i] = expand(record(View, (tensors[i], along))[0], size)
    return tuple(grids)


_BY_INDEX: dict[type, str] = {
    int: "SelectBackward0",
    slice: "SliceBackward0",
    type(None): "UnsqueezeBackward0",
}


@implements(_tensor)
class Basic(Rule):
    """z = x[index] of integers, slices, None and ...:  dx = zeros, with g put at index"""

    is_view = True
    named_by_types = True

    @staticmethod
    def forward(input: T, index: IndexLike) -> T:
        return T.__getitem__(input, index)

    @classmethod
    def label_of(cls, input: T, index: IndexLike) -> str:
        last = index[-1] if type(index) is tuple and index else index
        return _BY_INDEX.get(type(last)) or "AliasBackward0"

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, index: IndexLike) -> T:
        return _put_at(g, input_shape, index)


class SliceBackward(Rule):
    """Z = zeros of a shape, with X put at index:  dX = G[index]"""

    @staticmethod
    def forward(grad: T, input_shape: torch.Size, index: IndexLike) -> T:
        dx = grad.new_zeros(input_shape)
        dx[index].copy_(grad)
        return dx

    @staticmethod
    def d_grad(g: T, index: IndexLike) -> T:
        return g[index]


_put_at = applied(SliceBackward)


@implements(_tensor)
class Index(Rule):
    """z = x[index] with masks or index tensors:  dx = zeros, with g added at index

    `parts` are the tensors of the index, which may not be changed until the backward; `pattern` is
    the index with `AT` in place of each, None if there is nothing else. An element that is selected
    several times gets several gradients. If there is more, such as a slice, the same index gives
    the place of each in the flattened x, and g is added there.
    """

    counted = (0,)
    dynamic_output_shape = True

    @staticmethod
    def as_called(input: T, pattern: IndexLike, *parts: T) -> tuple[object, ...]:
        return input, _index_of(pattern, parts)

    @staticmethod
    def forward(input: T, pattern: IndexLike, *parts: T) -> T:
        return input[_index_of(pattern, parts)]

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, pattern: IndexLike, parts: tuple[T, ...]) -> T:
        dx = torch.zeros(input_shape, dtype=g.dtype, device=g.device)
        if pattern is None:
            return dx.index_put_(parts, g, accumulate=True)
        places = torch.arange(dx.numel(), device=g.device).view(input_shape)
        places = places[_index_of(pattern, parts)].reshape(-1)
        dx.view(-1).index_put_((places,), g.reshape(-1), accumulate=True)
        return dx


def _index_of(pattern: IndexLike, parts: Sequence[T]) -> Any:
    if pattern is None:
        return parts[0] if len(parts) == 1 else tuple(parts)
    left = iter(parts)
    index = tuple(next(left) if p is AT else p for p in pattern)  # type: ignore[union-attr]
    return index[0] if len(index) == 1 and not isinstance(index[0], tuple) else index


def is_basic(index: IndexLike) -> bool:
    if isinstance(index, T):
        kind = index.dtype
        return index.dim() == 0 and not (
            kind.is_floating_point or kind.is_complex or kind in (torch.bool, torch.uint8)
        )
    return (
        index is None
        or index is Ellipsis
        or (isinstance(index, int | slice) and not isinstance(index, bool))
    )


def _without_numpy(index: Any) -> Any:
    """The index with NumPy's integers as Python's, which make a view; a list of tensors or slices
    as a tuple, as torch reads it."""
    if isinstance(index, list) and any(isinstance(p, T | slice | EllipsisType) for p in index):
        index = tuple(index)
    if isinstance(index, tuple):
        return tuple([_without_numpy(p) if type(p).__module__ == "numpy" else p for p in index])
    is_integer = isinstance(index, numbers.Integral) and not isinstance(index, int)
    if is_integer or (getattr(index, "shape", None) == () and not isinstance(index, T)):
        with contextlib.suppress(TypeError):  # of what is no integer
            return operator.index(index)
    return index


def _as_index(part: Any, is_one_of_several: bool = False) -> Any:
    """A copy of the numbers in a sequence or a NumPy array, as a tensor.

    Lists in a list are numbers in one part of a tuple; by themselves they are the parts.
    """
    is_one: object
    if isinstance(part, list) and is_one_of_several and {*map(type, part)} == {list}:
        inner = [_as_index(p, True) for p in part]
        is_one = all(isinstance(p, T) for p in inner)
    elif isinstance(part, list | range):
        is_one = part and {*map(type, part)} in ({int}, {bool})
    else:
        kind = getattr(getattr(part, "dtype", None), "kind", None)  # of NumPy's
        is_one = kind in ("i", "b") and part.ndim
    return torch.tensor(part) if is_one else part


@composite(T.__getitem__)
def getitem(input: T, index: IndexLike) -> T:
    index = _without_numpy(index)
    is_tuple = isinstance(index, tuple)
    parts = tuple([_as_index(part, is_tuple) for part in (index if is_tuple else (index,))])  # type: ignore[union-attr]
    if all(is_basic(p) for p in parts):
        if any(isinstance(p, T) for p in parts):  # their values now, not later
            index = tuple(int(p) if isinstance(p, T) else p for p in parts)
        return record(Basic, (input, index))[0]
    tensors = [p for p in parts if isinstance(p, T)]
    pattern: IndexLike = None
    # A mask without dimensions adds one to the result, which `index_put_` does not do.
    if len(tensors) < len(parts) or not all(p.dim() for p in tensors):
        pattern = tuple(AT if isinstance(p, T) else p for p in parts)
    return record(Index, (input, pattern, *tensors))[0]


class Cat(Rule):
    """z = the inputs side by side along dim:  each dx = its part of g"""

    @staticmethod
    def forward(dim: int, *tensors: T) -> T:
        return torch.cat(tensors, dim)

    @staticmethod
    def gradients(
        needs: Sequence[bool], g: T, dim: int, tensors_shape: Sequence[torch.Size]
    ) -> list[T | None]:
        # An empty one-dimensional tensor can be joined with any others, and gets no part.
        sizes = [0 if tuple(shape) == (0,) else shape[dim] for shape in tensors_shape]
        grads: list[T | None] = [None]
        if not is_torch_function_enabled():  # the same at once
            parts: Sequence[T] = g.split(sizes, dim)
        else:  # as in PyTorch, for gradients of gradients
            starts = itertools.accumulate((0, *sizes[:-1]))
            parts = [g.narrow(dim, *part) for part in zip(starts, sizes, strict=True)]
        for needed, shape, part in zip(needs[1:], tensors_shape, parts, strict=True):
            own = g.new_zeros(0) if tuple(shape) == (0,) else part
            grads.append(own if needed else None)
        return grads


def _sequence(tensors: Sequence[T], func: TorchFunction) -> list[T]:
    if isinstance(tensors, T):
        func(tensors.detach())  # raises PyTorch's error
    return list(tensors)


@composite(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[T], dim: int = 0, **kwargs: Any) -> T:
    dim = kwargs.pop("axis", dim)
    _no_out(torch.cat, kwargs)
    return record(Cat, (dim, *_sequence(tensors, torch.cat)))[0]


class Stack(Rule):
    """z = the inputs side by side along a new dim:  each dx = its slice of g"""

    @staticmethod
    def forward(dim: int, *tensors: T) -> T:
        return torch.stack(tensors, dim)

    @staticmethod
    def gradients(needs: Sequence[bool], g: T, dim: int) -> tuple[T | None, ...]:
        return (None, *g.unbind(dim))


@composite(torch.stack)
def stack(tensors: Sequence[T], dim: int = 0, **kwargs: Any) -> T:
    dim = kwargs.pop("axis", dim)
    _no_out(torch.stack, kwargs)
    return record(Stack, (dim, *_sequence(tensors, torch.stack)))[0]


def _no_out(func: TorchFunction, kwargs: dict[str, object]) -> None:
    if kwargs.get("out") is not None:
        raise unplaced(func, (), kwargs)
    if set(kwargs) - {"out"}:
        func([], **kwargs)  # raises PyTorch's error


@rule(torch.unbind, T.unbind)
class Unbind(Rule):
    """z_i = x[i] along dim:  dx = the g_i stacked"""

    is_view = True

    @staticmethod
    def forward(input: T, dim: int = 0) -> tuple[T, ...]:
        return torch.unbind(input, dim)

    @staticmethod
    def d_input(gs: tuple[T, ...], dim: int) -> T:
        return torch.stack(gs, dim)


@composite(T.__iter__)
def iterate(input: T) -> Iterator[T]:
    if input.dim() == 0:
        raise TypeError("iteration over a 0-d tensor")
    return iter(record(Unbind, (input, 0))[0])


class _Parts(Rule):
    """z_i = pieces of x along dim:  dx = the g_i side by side"""

    is_view = True

    @staticmethod
    def d_input(gs: tuple[T, ...], dim: int) -> T:
        return torch.cat(gs, dim)


class Split(_Parts):
    @staticmethod
    def forward(input: T, size: int, dim: int) -> tuple[T, ...]:
        return torch.Tensor.split(input, size, dim)


class SplitWithSizes(_Parts):
    @staticmethod
    def forward(input: T, sizes: Sequence[int], dim: int) -> tuple[T, ...]:
        return torch.split_with_sizes(input, sizes, dim)


@composite(torch.split, T.split, repeats=True)
def split(
    input: T, split_size_or_sections: int | Sequence[int], dim: int = 0, **kwargs: object
) -> tuple[T, ...]:
    if isinstance(split_size_or_sections, T):
        with contextlib.suppress(ValueError):
            split_size_or_sections = int(split_size_or_sections)
    kind = Split if isinstance(split_size_or_sections, int) else SplitWithSizes
    return record(kind, (input, split_size_or_sections, dim))[0]


@composite(torch.split_with_sizes, T.split_with_sizes, repeats=True)
def split_with_sizes(input: T, split_sizes: Sequence[int], dim: int = 0) -> tuple[T, ...]:
    return record(SplitWithSizes, (input, split_sizes, dim))[0]


@composite(torch.chunk, T.chunk, repeats=True)
def chunk(input: T, chunks: int, dim: int = 0) -> tuple[T, ...]:
    plain = torch.chunk(input.detach(), chunks, dim)
    size = input.shape[dim]
    if size == 0:
        return record(SplitWithSizes, (input, [0] * len(plain), dim))[0]
    return record(Split, (input, -(-size // chunks), dim))[0]


@composite(torch.narrow, T.narrow, repeats=True)
def narrow(input: T, dim: int, start: int | T, length: int) -> T:
    torch.narrow(input.detach(), dim, plain_values(start), length)  # PyTorch's errors
    at, first = dim % input.dim(), int(start)
    if first < 0:
        first += input.shape[dim]
    return getitem(input, (*[slice(None)] * at, slice(first, first + length)))


@composite(torch.select, T.select, repeats=True)
def select(input: T, dim: int, index: int) -> T:
    torch.select(input.detach(), dim, index)  # PyTorch's errors
    return getitem(input, (*[slice(None)] * (dim % input.dim()), index))


rule(torch.as_strided, T.as_strided)(AsStrided)


class Repeat(Rule):
    """z = copies of x side by side:  dx = g summed over the copies"""

    @staticmethod
    def forward(input: T, repeats: Sequence[int]) -> T:
        return T.repeat(input, repeats)  # type: ignore[arg-type]

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, repeats: Sequence[int]) -> T:
        if 0 in repeats:
            return torch.zeros(input_shape, dtype=g.dtype, device=g.device)
        new = len(repeats) - len(input_shape)
        for _ in range(new):
            g = g.sum(0)
        sizes: list[int] = []
        copies = []
        for times, size in zip(repeats[new:], input_shape, strict=True):
            if times != 1:
                copies.append(len(sizes))
                sizes.append(times)
            sizes.append(size)
        g = g.reshape(sizes)
        return g.sum(copies) if copies else g


@composite(T.repeat, repeats=True)
def repeat(input: T, *repeats: int | Sequence[int], **kwargs: object) -> T:
    return record(Repeat, (input, kwargs["repeats"] if "repeats" in kwargs else _sizes(repeats)))[0]


@composite(torch.tile, T.tile, repeats=True)
def tile(input: T, *dims: int | Sequence[int], **kwargs: Any) -> T:
    sizes = tuple(kwargs["dims"] if "dims" in kwargs else _sizes(dims))
    return record(Repeat, (input, (1,) * (input.dim() - len(sizes)) + sizes))[0]


@rule(torch.roll, T.roll)
class Roll(Rule):
    """z = x rolled along dims:  dx = g rolled back"""

    @staticmethod
    def forward(input: T, shifts: Size, dims: Size = ()) -> T:
        return torch.roll(input, shifts, dims)

    @staticmethod
    def d_input(g: T, shifts: Size, dims: Size) -> T:
        return g.roll(-shifts if isinstance(shifts, int) else [-s for s in shifts], dims)


class Flip(Rule):
    """z = x reversed along dims:  dx = g reversed"""

    @staticmethod
    def forward(input: T, dims: tuple[int, ...]) -> T:
        return torch.flip(input, dims)

    @staticmethod
    def d_input(g: T, dims: tuple[int, ...]) -> T:
        return g.flip(dims)


@composite(torch.flip, T.flip, directly=True, repeats=True)
def flip(input: T, *dims: int | Sequence[int], **kwargs: object) -> T:
    return record(Flip, (input, kwargs["dims"] if "dims" in kwargs else _sizes(dims)))[0]


@composite(torch.fliplr, T.fliplr, repeats=True)
def fliplr(input: T) -> T:
    torch.fliplr(input.detach())
    return record(Flip, (input, (1,)))[0]


@composite(torch.flipud, T.flipud, repeats=True)
def flipud(input: T) -> T:
    torch.flipud(input.detach())
    return record(Flip, (input, (0,)))[0]


class _Triangle(Rule):
    function: Callable[[T, int], T]

    @classmethod
    def forward(cls, input: T, diagonal: int = 0) -> T:
        return cls.function(input, diagonal)

    @classmethod
    def d_input(cls, g: T, diagonal: int) -> T:
        return cls.function(g, diagonal)


@inplace(T.tril_)
@rule(torch.tril, T.tril)
class Tril(_Triangle):
    """z = x with zeros above the k-th diagonal:  dx = g with zeros there"""

    function = staticmethod(torch.tril)


@inplace(T.triu_)
@rule(torch.triu, T.triu)
class Triu(_Triangle):
    """z = x with zeros below the k-th diagonal:  dx = g with zeros there"""

    function = staticmethod(torch.triu)


@rule(torch.diagonal, T.diagonal)
class Diagonal(Rule):
    """z = a diagonal of x:  dx = zeros, with g on that diagonal"""

    is_view = True

    @staticmethod
    def forward(input: T, offset: int = 0, dim1: int = 0, dim2: int = 1) -> T:
        return torch.diagonal(input, offset, dim1, dim2)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, offset: int, dim1: int, dim2: int) -> T:
        dx = torch.zeros(input_shape, dtype=g.dtype, device=g.device)
        dx.diagonal(offset, dim1, dim2).copy_(g)
        return dx


_movedim: TorchFunction = torch.movedim


@composite(torch.movedim, T.movedim, torch.moveaxis, T.moveaxis, repeats=True)
def movedim(input: T, source: Size, destination: Size) -> T:
    _movedim(input.detach(), source, destination)  # PyTorch's errors
    source, destination = as_now(source), as_now(destination)
    n = input.dim()
    if n == 0:
        return getitem(input, ...)
    pairs = zip(
        *[[d % n for d in ([x] if isinstance(x, int) else x)] for x in (destination, source)],
        strict=True,
    )
    goes = dict(pairs)
    rest = iter([d for d in range(n) if d not in goes.values()])
    return permute(input, [goes[d] if d in goes else next(rest) for d in range(n)])


def _at_least(n: int) -> None:
    def one(x: T) -> T:
        if x.dim() == 0:
            return reshape(x, (1,) * n)
        if n > 1 and x.dim() == 1:
            x = unsqueeze(x, 0)
        return unsqueeze(x, -1) if n > 2 and x.dim() == 2 else x

    @composite(getattr(torch, f"atleast_{n}d"), getattr(_torch.VariableFunctions, f"atleast_{n}d"))
    def at_least(*tensors: T) -> T | tuple[T, ...]:
        if len(tensors) == 1 and isinstance(tensors[0], T):
            return one(tensors[0])
        if len(tensors) == 1:
            tensors = tuple(tensors[0])
        return tuple(one(x) for x in tensors)

    _AT_LEAST[n] = one


_AT_LEAST: dict[int, TorchFunction] = {}
for _n in (1, 2, 3):
    _at_least(_n)


@composite(torch.hstack)
def hstack(tensors: Sequence[T], **kwargs: object) -> T:
    _no_out(torch.hstack, kwargs)
    parts = [_AT_LEAST[1](x) for x in _sequence(tensors, torch.hstack)]
    return record(Cat, (0 if parts[0].dim() == 1 else 1, *parts))[0]


@composite(torch.vstack, torch.row_stack)
def vstack(tensors: Sequence[T], **kwargs: object) -> T:
    _no_out(torch.vstack, kwargs)
    return record(Cat, (0, *[_AT_LEAST[2](x) for x in _sequence(tensors, torch.vstack)]))[0]


@composite(torch.dstack)
def dstack(tensors: Sequence[T], **kwargs: object) -> T:
    _no_out(torch.dstack, kwargs)
    return record(Cat, (2, *[_AT_LEAST[3](x) for x in _sequence(tensors, torch.dstack)]))[0]


@composite(torch.column_stack)
def column_stack(tensors: Sequence[T], **kwargs: object) -> T:
    _no_out(torch.column_stack, kwargs)
    parts = _sequence(tensors, torch.column_stack)
    parts = [reshape(x, (x.numel(), 1)) if x.dim() <= 1 else x for x in parts]
    return hstack(parts)


class ToCopy(Rule):
    """z = x in another dtype or on another device:  dx = g converted back"""

    @staticmethod
    def forward(
        input: T,
        dtype: torch.dtype,
        device: torch.device | None = None,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> T:
        return T.to(input, device, dtype, copy=True, memory_format=memory_format)

    @staticmethod
    def how(input: T, *_: object) -> tuple[torch.dtype, torch.device]:
        return input.dtype, input.device

    @staticmethod
    def d_input(g: T, how: tuple[torch.dtype, torch.device]) -> T:
        dtype, device = how
        return g.to(device=device, dtype=dtype)


@composite(T.to, directly=True)
def to(input: T, *args: Any, **kwargs: Any) -> T:
    if len(args) == 1 and not kwargs:  # the usual cases, of which most change nothing
        (wanted,) = args
        if type(wanted) is torch.dtype:
            if wanted is input.dtype:
                return input
            if wanted.is_floating_point:
                return record(ToCopy, (input, wanted))[0]
        elif type(wanted) in (str, torch.device) and torch.device(wanted) == input.device:
            return input
    plain = input.detach()
    moved = plain.to(*plain_values(args), **plain_values(kwargs))
    if moved is plain:
        return input
    if not (moved.is_floating_point() or moved.is_complex()):
        return moved
    memory_format = kwargs.get("memory_format") or torch.preserve_format
    return record(ToCopy, (input, moved.dtype, moved.device, memory_format))[0]


def _caster(method: TorchFunction, dtype: torch.dtype) -> None:
    @composite(method, directly=True)
    def cast(input: T, memory_format: torch.memory_format = torch.preserve_format) -> T:
        if memory_format is torch.preserve_format:
            return to(input, dtype)
        return to(input, dtype, memory_format=memory_format)


for _method, _dtype in (
    (T.float, torch.float32),
    (T.double, torch.float64),
    (T.half, torch.float16),
    (T.bfloat16, torch.bfloat16),
):
    _caster(_method, _dtype)


@composite(T.type_as)
def type_as(input: T, other: T) -> T:
    return to(input, dtype=other.dtype, device=other.device)


@composite(T.type)
def type_(input: T, dtype: torch.dtype | str | None = None, non_blocking: bool = False) -> T | str:
    """`to` this dtype, or the dtype and device of this tensor type; without one, its name."""
    plain = input.detach()
    if dtype is None:
        return plain.type()
    cast = plain.type(dtype, non_blocking)
    if cast.dtype is input.dtype and cast.device == input.device:
        return input
    return to(input, cast.device, cast.dtype, non_blocking)


@composite(T.cpu, directly=True)
def cpu(input: T, memory_format: torch.memory_format = torch.preserve_format) -> T:
    if memory_format is torch.preserve_format and input.is_cpu:
        return input
    return to(input, "cpu", memory_format=memory_format)


@rule(torch.diag_embed, T.diag_embed)
class DiagEmbed(Rule):
    """z = zeros with x on a diagonal:  dx = that diagonal of g"""

    @staticmethod
    def forward(input: T, offset: int = 0, dim1: int = -2, dim2: int = -1) -> T:
        return torch.diag_embed(input, offset, dim1, dim2)

    @staticmethod
    def d_input(g: T, offset: int, dim1: int, dim2: int) -> T:
        return g.diagonal(offset, dim1, dim2)


class DiagonalCopy(Rule):
    """z = a diagonal of the matrix x, copied:  dx = zeros, with g on that diagonal"""

    @staticmethod
    def forward(input: T, diagonal: int) -> T:
        return torch.diag(input, diagonal)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, diagonal: int) -> T:
        dx = torch.zeros(input_shape, dtype=g.dtype, device=g.device)
        dx.diagonal(diagonal).copy_(g)
        return dx

    @classmethod
    def node_name(cls) -> str:
        return "DiagonalBackward0_copy"


@composite(torch.diag, T.diag, repeats=True)
def diag(input: T, diagonal: int = 0) -> T:
    if input.dim() == 1:
        return record(DiagEmbed, (input, diagonal))[0]
    return record(DiagonalCopy, (input, diagonal))[0]


@composite(torch.diagflat, T.diagflat, repeats=True)
def diagflat(input: T, offset: int = 0) -> T:
    return diag(reshape(contiguous(input), (-1,)), offset)


@rule(torch.trace, T.trace)
class Trace(Rule):
    """z = the sum of the diagonal of X:  dX = zeros, with g on the diagonal"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.trace(input)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size) -> T:
        dx = torch.zeros(input_shape, dtype=g.dtype, device=g.device)
        dx.diagonal().copy_(g.expand(min(input_shape)))
        return dx


@rule(T.unfold)
class Unfold(Rule):
    """z = windows of x along a dimension:  dx = g, added where windows overlap"""

    is_view = True

    @staticmethod
    def forward(input: T, dimension: int, size: int, step: int) -> T:
        return input.unfold(dimension, size, step)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, dimension: int, size: int, step: int) -> T:
        count = input_shape.numel()
        places = torch.arange(count, device=g.device).view(input_shape)
        places = places.unfold(dimension, size, step)
        dx = torch.zeros(count, dtype=g.dtype, device=g.device)
        dx.index_add_(0, places.reshape(-1), g.reshape(-1))
        return dx.view(input_shape)


@composite(torch.kron, T.kron, repeats=True)
def kron(input: T, other: T) -> T:
    """Each number of x times all of y, side by side."""
    n = max(input.dim(), other.dim())
    one = [1] * (n - input.dim()) + list(input.shape)
    two = [1] * (n - other.dim()) + list(other.shape)
    wide = [unsafe_view(input, [d for size in one for d in (size, 1)])]
    wide.append(unsafe_view(other, [d for size in two for d in (1, size)]))
    return unsafe_view(wide[0] * wide[1], [a * b for a, b in zip(one, two, strict=True)])


@composite(torch.repeat_interleave, T.repeat_interleave, repeats=True)
def repeat_interleave(
    input: T, repeats: int | T, dim: int | None = None, *, output_size: int | None = None
) -> T:
    torch.repeat_interleave(  # PyTorch's errors
        input.detach(), plain_values(repeats), dim, output_size=output_size
    )
    if dim is None:
        input, dim = flatten(input), 0
    if input.dim() == 0:
        raise refusal(torch.repeat_interleave, "for a number along a dimension")
    dim = operator.index(dim) % input.dim()
    if isinstance(repeats, T):
        each = repeats.reshape(1).expand(input.shape[dim]) if repeats.numel() == 1 else repeats
        index = torch.repeat_interleave(each, output_size=output_size)
        return torch.index_select(input, dim, index)
    wide = unsqueeze(input, dim + 1)
    sizes = [*input.shape[: dim + 1], repeats, *input.shape[dim + 1 :]]
    copied = record(Clone, (expand(wide, sizes), torch.contiguous_format))[0]
    return flatten(copied, dim, dim + 1)


@composite(torch.diff, T.diff, repeats=True)
def diff(
    input: T, n: int = 1, dim: int = -1, prepend: T | None = None, append: T | None = None
) -> T:
    """x_(i+1) - x_i along dim, n times over."""
    torch.diff(  # PyTorch's errors
        input.detach(), n, dim, prepend=plain_values(prepend), append=plain_values(append)
    )
    if n == 0:
        return record(AsItIs, (input,))[0]  # nothing to prepend or append
    if prepend is not None or append is not None:
        input = cat([t for t in (prepend, input, append) if t is not None], dim)
    for _ in range(min(n, input.shape[dim])):
        length = input.shape[dim] - 1
        earlier = narrow(input, dim, 0, length)  # first, as in PyTorch's C++ code
        input = torch.sub(narrow(input, dim, 1, length), earlier)
    return input


class AsItIs(Rule):
    """z = x, copied:  dx = g"""

    @staticmethod
    def forward(input: T) -> T:
        return torch.zeros_like(input).copy_(input)

    @staticmethod
    def d_input(g: T) -> T:
        return g

    @classmethod
    def node_name(cls) -> str:
        return "torch::autograd::CopyBackwards"
