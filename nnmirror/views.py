"""In-place changes seen through views.

A view shares its base's memory, so an in-place operation on it changes the base, and one on
the base changes the view. As in PyTorch:

- the operation on a view becomes a `CopySlices` on the base: its backward takes the view's part of
  the base's gradient, passes it to the operation's own backward and puts the result in its place;
- a view whose memory has changed since it was made loses its `grad_fn`; when it is next used, it
  gets a new one, as a part of the base in its present state (`AsStrided`).

The first operation that brings a gradient into a plain tensor turns it and its existing views into
tracked tensors. The views are plain torch tensors until then, and are searched for among all
objects, the youngest first.
"""

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from . import _state, _torch
from . import tape as _tape
from . import tensor as _tensor
from ._state import sequence as _sequence
from ._torch import DisableTorchFunctionSubclass
from ._types import IndexLike
from ._upcalls import implements, upcall
from .fast.signature import CallInfo
from .formula import RESULT
from .grad_mode import in_inference_mode
from .node import FREED, JUST_BEFORE, RECORDED, Edge, Node, short_name
from .operation import Operation
from .tensor import CHANGED_LEAF, C_device, C_dim, C_dtype, C_offset, C_shape, C_stride

T = torch.Tensor


# The record of a tracked view, as a plain tuple, which is fastest to make:
# - its base;
# - the version of the shared memory when its grad_fn was made; -1 if not used yet. After a change
#   of the view itself: the version then and the sequence number for its new grad_fn;
# - how it was made, in the words of PyTorch's CreationMeta: by an operation ("default"), by one
#   that returns several ("multi_output"), by a user's Function ("in_custom_function"), or from a
#   tensor in torch's own graph ("foreign"). Of a view made before its memory carried a gradient
#   also "no_grad" and "inference", the mode.
ViewOf: TypeAlias = tuple[torch.Tensor, "int | tuple[int, int]", str]


class Change(NamedTuple):
    """The tensors that an in-place operation changes besides its argument."""

    base: torch.Tensor | None  # the base of the argument
    views: Sequence[tuple[torch.Tensor, str]]  # plain views, tracked from now on; their kinds


_ITSELF = Change(None, ())


@implements(_tape)
def view_of(node: "Node", out: torch.Tensor, base: object, several: bool) -> ViewOf | None:
    """The view record of `out`, output of `node`, if it is a view of `base` or its base."""
    kind = "multi_output" if several else "default"
    if not node.function.is_rule:
        kind = "in_custom_function"
        base = out._base if out._is_view() else None
    elif not isinstance(base, _tensor.Tensor):
        kind = "foreign"
    if not isinstance(base, torch.Tensor):
        return None
    if isinstance(base, _tensor.Tensor):
        base, version, inherited = view_from(base, out)
        return base, version, inherited if kind == "default" else kind
    return base, out._version, kind


@implements(_tape)
def view_from(base: "_tensor.Tensor", out: torch.Tensor) -> ViewOf:
    """The same for the single view that an operation makes of `base`, a tracked tensor."""
    held = base._view_of
    if held is None:
        return base, out._version, "default"
    return held[0], out._version, held[2]


@implements(_tape)
def check_inplace(tensor: torch.Tensor) -> Change:
    """What a recorded in-place operation on `tensor` will change.

    Refuses what PyTorch refuses, and what the tape cannot follow.
    """
    base = None
    view = tensor._view_of if isinstance(tensor, _tensor.Tensor) else None
    if view is None and getattr(tensor, "_node", None) is not None:  # a result, and no view
        return _ITSELF
    if view is not None:
        base, version, kind = view
        if kind == "foreign":
            node = _tape.edge_of(tensor)[0]
            edge = node.edges[0] if isinstance(node, Node) else None
            leaf = None if edge is None else edge[0]
            if not isinstance(leaf, torch.Tensor) or not leaf.is_leaf:
                raise RuntimeError(_FOREIGN)
            raise RuntimeError("a view of a" + CHANGED_LEAF)
        if kind != "default":
            raise RuntimeError(_forbidden(tensor, kind, "is being"))
        if version == -1:
            raise RuntimeError("a" + CHANGED_LEAF)  # as in PyTorch for a view without a grad_fn
    elif not tensor.requires_grad and tensor._is_view():
        base = tensor._base
        if base is not None:
            if base.requires_grad and not isinstance(base, _tensor.Tensor):
                raise RuntimeError(_FOREIGN)
            kind = _creation_kind(tensor)
            if kind != "default" or base.requires_grad:
                kind = "no_grad" if kind == "default" else kind
                raise RuntimeError(_forbidden(tensor, kind, "is being"))
    if base is not None and base.requires_grad and base.is_leaf:
        raise RuntimeError("a view of a" + CHANGED_LEAF)
    if tensor.requires_grad:
        if not isinstance(tensor, _tensor.Tensor) and not tensor.is_leaf:
            raise RuntimeError(_FOREIGN)
        if tensor.is_leaf:
            raise RuntimeError("a" + CHANGED_LEAF)
    root = tensor if base is None else base
    if root.requires_grad:
        return Change(base, ())
    # Memory without a gradient is about to get one: all other tensors that share it have to be
    # updated. (`_storage_Use_Count` counts its own argument.)
    tensors = _torch.storage_Use_Count(root.untyped_storage()._cdata) - 1
    known = 1 if base is None else 2
    # Each view holds its base: if only those that are known hold it, all others are detached.
    if tensors == known or root._use_count() <= known:  # type: ignore[attr-defined]
        return Change(base, ())
    return Change(base, tuple(_plain_views(root, tensor, tensors)))


def _plain_views(
    base: torch.Tensor, changed: torch.Tensor, tensors: int
) -> Iterator[tuple[torch.Tensor, str]]:
    """The plain views of `base` except `changed`, among the `tensors` that share its memory."""
    for view in _sharing(base, tensors):
        # The result of .detach() does not count as a view, as in PyTorch.
        if view is changed or not view._is_view() or view._base is not base:
            continue
        if isinstance(view, _tensor.Tensor) and view._view_of is not None:
            continue  # it has a record already
        if (
            type(view) not in (torch.Tensor, _tensor.Tensor)
            or view.dtype is not base.dtype  # the real part of a complex one
        ):
            raise RuntimeError(_SHARED)
        yield view, _creation_kind(view)


def _sharing(tensor: torch.Tensor, tensors: int) -> list[torch.Tensor]:
    """All `tensors` that share the memory of this one. Raises if one cannot be found.

    A new view is in the youngest generation of the garbage collector, which is quick to search.
    """
    memory = tensor.untyped_storage()._cdata
    found = {id(tensor): tensor}
    for generation in range(3):
        for thing in gc.get_objects(generation):
            if issubclass(type(thing), torch.Tensor) and _memory_of(thing) == memory:
                found[id(thing)] = thing
        if len(found) == tensors:
            return list(found.values())
    raise RuntimeError(_SHARED)


def _memory_of(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a sparse one, for example, has none
        return None


def _creation_kind(view: torch.Tensor) -> str:
    """How torch's own tensor became a view."""
    kind = _KINDS[_torch.get_creation_meta(view).name]
    if kind == "no_grad" and not torch.is_grad_enabled():
        return "default"  # torch's mode is always off, and the mirror's own on
    return kind


_KINDS = {
    "DEFAULT": "default",
    "MULTI_OUTPUT_NODE": "multi_output",
    "NO_GRAD_MODE": "no_grad",
    "INFERENCE_MODE": "inference",
    "IN_CUSTOM_FUNCTION": "in_custom_function",
}


@implements(_tape)
def track_views(base: torch.Tensor, views: Sequence[tuple[torch.Tensor, str]]) -> None:
    """Track plain views whose base has become tracked."""
    for view, kind in views:
        view.__class__ = _tensor.Tensor
        view._view_of = base, -1, kind  # type: ignore[attr-defined]
        _cut_out(view, base)  # type: ignore[arg-type]


@implements(_tape)
def rebase_history(node: "Node", view: "_tensor.Tensor", base: Any) -> None:
    """Record `node`, an in-place operation on `view`, as one on its base."""
    edge = _tape.edge_of(base) if base.requires_grad else None
    if not isinstance(base, _tensor.Tensor):
        base.__class__ = _tensor.Tensor
    needs, plan = node.needs_input_grad, node.plan
    if needs[0] and node.function.overwrites:
        node.needs_input_grad = (False, *needs[1:])
    needs = (edge is not None, *needs[1:])
    rebase_history_of(
        node, view, base, edge, node.places, needs, plan is None or RESULT in plan.saves
    )


def rebase_history_of(
    node: "Node",
    view: "_tensor.Tensor",
    base: "_tensor.Tensor",
    edge: "Edge | None",
    places: Sequence[int],
    needs: tuple[bool, ...],
    saves_result: bool,
) -> None:
    """The same, where `edge` leads to the base as it was, and `node` has these places and needs."""
    shape = C_shape(base)
    copy: Any = _new(Node)
    copy.function, copy.signature = CopySlices, None
    # Those of the node before, if they fit: nodes have them in common.
    outputs = () if edge is None or not isinstance(edge[0], Node) else edge[0].outputs
    if len(outputs) != 1 or outputs[0][0] != shape or outputs[0][1] is not C_dtype(base):
        outputs = (_tape.meta_of(base),)
    copy.call_info = CallInfo(places, needs, outputs)
    copy.edges = edge, *node.edges[1:]  # `node` keeps the origins of what it saved
    copy._saved, copy._versions = (node,), ()
    offset = C_offset(view) - C_offset(base)
    copy._given = C_stride(base), C_shape(view), C_stride(view), offset, None
    copy.sequence = next(_sequence)
    _tape.made_by(base, copy, 0)
    # As in PyTorch the view gets a new grad_fn. It is made when it is needed, or at once if the
    # view does not require grad yet, if its gradient is retained, or if `node` saved its result,
    # which leads to the view.
    view._view_of = base, (view._version, next(_sequence)), "default"
    if saves_result or view._node is None or view._node.node_state is not RECORDED:
        regenerate_grad_fn(view)
        if view._node is not None:
            node.view_node = weakref.ref(view._node)


@implements(_tape)
def regenerate_grad_fn(view: "_tensor.Tensor") -> None:
    """Give a view whose memory has changed a new grad_fn, based on its base's present one."""
    base, version, kind = view._view_of  # type: ignore[misc]
    if not base.requires_grad and view._node is None:
        return
    if kind not in ("default", "foreign"):
        raise RuntimeError(_forbidden(view, kind, "its base or another view of its base has been"))
    if kind == "foreign":
        raise RuntimeError(_FOREIGN)
    now = view._version
    number = None
    if type(version) is tuple and version[0] == now:
        number = version[1]
    _cut_out(view, base, number)
    view._view_of = base, now, kind


def _cut_out(view: "_tensor.Tensor", base: torch.Tensor, number: int | None = None) -> None:
    """Make `view` a part of `base` in its present state."""
    # A base that has been detached gets no gradient, and neither does its history.
    edge = _tape.edge_of(base) if base.requires_grad else None
    node = _new(Node)
    node.function, node.signature = AsStrided, None
    shape = C_shape(view)
    meta = shape, C_dtype(view), C_device(view)
    node.call_info = CallInfo(_ONE, _NEEDS_NONE if edge is None else _NEEDS_FIRST, (meta,))
    node.edges = edge, None, None, None
    node._saved = node._versions = ()
    AsStrided.note(node, base, shape, C_stride(view), C_offset(view))
    node.sequence = next(_sequence) if number is None else number
    _tape.made_by(view, node, 0)


_ONE = (0,)
_NEEDS_FIRST, _NEEDS_NONE = (True, False, False, False), (False,) * 4


class CopySlices(Operation):
    """An in-place operation on a view, seen from the base."""

    is_rule = True

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[T | None, ...]:
        if ctx._saved is None:
            raise RuntimeError(FREED)
        strides, size, stride, offset, assigned_at = ctx._given
        whole = _laid_out(g, strides)
        if assigned_at is not None:
            whole.add_(0)  # as if the part's gradient had arrived separately: -0 becomes 0
        part = whole.as_strided(size, stride, offset)
        node, g = ctx._saved[0], _copy_of(part)
        if ctx.creates_graph:
            dx, *grads = _tape.run_recorded(node, (g,), node.needs_input_grad)
        elif node.attributes is None:
            dx, *grads = node.function.backward(node, g)
        else:
            dx, *grads = node.run((g,))
        if ctx.edges[0] is None:
            return None, *grads
        if dx is None:
            part.zero_()
        elif dx is not g or ctx.creates_graph:  # otherwise it has g already
            part.copy_(dx)
        return whole, *grads

    @classmethod
    def node_name(cls) -> str:
        return "torch::autograd::CopySlices"


def _with_assignment(node: "Node") -> None:
    """Show the assignment at the end of `x[index] += v` as a node of its own, as in PyTorch."""
    *part_of, index = node.given
    if index is None:
        return
    change = node.copied()
    change.given = *part_of, None
    strides, size, stride, offset = part_of
    shape, dtype, device = node.outputs[0]
    view: Any = Node(AsStrided)
    view.call_info = CallInfo(_ONE, _NEEDS_FIRST, ((size, dtype, device),))
    view.edges = (change, 0), None, None, None
    view.given = shape, strides, 0, size, stride, offset
    change.sequence = node.sequence - 2 * JUST_BEFORE  # type: ignore[assignment]
    view.sequence = node.sequence - JUST_BEFORE
    node.function, node.given = SetItem, (index, False, strides)
    node.places, node.needs_input_grad = _BOTH, _NEEDS_BOTH
    node._saved = node._versions = None if node._saved is None else _NOTHING  # type: ignore[assignment]
    target = change.edges[0]
    node.edges = (change, 0), (view, 0)
    for made in (change, view):
        put_in_front(made, target and target[0])


CopySlices.on_exposed = staticmethod(_with_assignment)


@upcall("nnmirror.running")
def put_in_front(node: "Node", target: object) -> None:
    """Tell a running walk about `node`, which was made when the graph was exposed."""
    raise NotImplementedError


class SetItem(Operation):
    """x[index] = v, with integers and slices:  dx = g, zero in the part x[index],  dv = g there

    Records the assignment of a tensor to a part of x as one node.
    """

    is_rule = True

    @staticmethod
    def backward(ctx: Node, g: T) -> tuple[T | None, ...]:
        if ctx._saved is None:
            raise RuntimeError(FREED)
        index, fills, strides = ctx._given
        whole = _copy_of(g) if strides is None else _laid_out(g, strides)
        part = whole[index]
        dv = None
        if ctx.edges[1] is not None:
            dv = part.sum() if fills else _copy_of(part)
        if ctx.edges[0] is None:
            return None, dv
        part.zero_()
        return whole, dv

    @classmethod
    def node_name(cls) -> str:
        return CopySlices.node_name()


def _laid_out(x: T, strides: Sequence[int]) -> T:
    """A copy of x with these strides."""
    if x.stride() == strides and x.is_contiguous():
        return x.clone()
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _copy_of(x: T) -> T:
    """A contiguous copy; for a contiguous tensor, it is faster without the argument."""
    if x.is_contiguous() and 1 not in x.shape:  # a dimension of size one keeps any stride
        return x.clone()
    return x.clone(memory_format=torch.contiguous_format)


@implements(_tensor)
def assigned(x: Any, index: Any, value: Any) -> bool:
    """x[index] = value in the most frequent case, with fewer checks; False in any other.

    That is: x is a result, or a plain tensor that shares its memory with no other, but not a view;
    the index has integers and slices of integers; and the value is a number, or has x's dtype and
    the part's shape, or no dimension. Torch's grad mode is on.
    """
    if _tape._override.mode is False:
        return False
    made_by = None
    if isinstance(x, _tensor.Tensor):
        made_by = x._node
        if made_by is None or x._view_of is not None:
            return False
        if made_by.function is CopySlices and _ends_change(x, made_by, index, value):
            return True
    if _torch.is_any_autocast_enabled() or _tape.in_transform() is not None:
        return False
    if made_by is not None:
        place, outputs = x._output_nr, made_by.outputs
        meta = outputs[place]
    elif not _becomes_tracked(x, value):
        return False
    else:
        meta = x.shape, x.dtype, x.device
        outputs = (meta,)
    shape, dtype, _ = meta
    dims = len(shape) - 1 if type(index) is int else _dims_left(index, len(shape))
    edge: Edge | None = None
    fills = is_number = False
    with DisableTorchFunctionSubclass():
        if dims < 0 or C_dtype(x) is not dtype or C_shape(x) != shape:
            return False
        try:
            if type(value) is _tensor.Tensor:
                if value._node is not None:
                    edge = value._node, value._output_nr
                    if value._view_of is not None:
                        edge = _tape.edge_of(value)
                elif value._requires_grad:
                    edge = _tape.edge_of(value)
            elif not isinstance(value, T):
                is_number = True
            elif value.requires_grad:
                if not isinstance(value, _tensor.Tensor):
                    return False
                edge = _tape.edge_of(value)
            if is_number:
                _set_item(x, index, value)
            elif C_dtype(value) is not dtype:
                return False
            elif C_dim(value) == 0:
                fills = dims > 0
                if fills and not value.is_cpu:
                    return False
                _set_item(x, index, value)
            else:
                part = _get_item(x, index)
                if part.shape != C_shape(value):
                    return False
                part.copy_(value)
        except (IndexError, TypeError, ValueError, RuntimeError):
            return False
        strides = None if x.is_contiguous() else x.stride()
    node: Any = _new(Node)
    node.function, node.signature = SetItem, None
    node._saved = node._versions = _NOTHING
    node._given = index, fills, strides
    node.sequence = next(_sequence)
    if made_by is None:
        node.call_info, node.edges = CallInfo(_BOTH, _NEEDS_VALUE, outputs), (None, edge)
        x.__class__ = _tensor.Tensor
    else:
        needs = _NEEDS_X if edge is None else _NEEDS_BOTH
        info = made_by.call_info
        if made_by.function is not SetItem or info.needs is not needs or not info.is_shared:
            info = CallInfo(_BOTH, needs, outputs if len(outputs) == 1 else (meta,))
        node.call_info = info
        if place or (edge is not None and edge[1]):
            node.edges = (made_by, place), edge
        else:
            node.targets = made_by, None if edge is None else edge[0]
        if made_by.retained is not None:
            _tape.made_by(x, node, 0)
            return True
    x._node, x._output_nr = node, 0
    return True


def _becomes_tracked(x: torch.Tensor, value: object) -> bool:
    """Does assigning `value` bring a gradient into the plain tensor x, and into x alone?"""
    return (
        type(x) is T
        and isinstance(value, _tensor.Tensor)
        and value.requires_grad
        and not (_state.plain or _state.taps or in_inference_mode())
        and _tape.shares_nothing(x)
    )


def _ends_change(x: "_tensor.Tensor", made_by: "Node", index: IndexLike, value: object) -> bool:
    """Is it the end of `x[index] += v`, which assigns the part that was changed just now?

    Then x has these values already, and only the assignment is recorded (see `_with_assignment`).
    """
    if type(value) is not _tensor.Tensor or value._view_of is None:
        return False
    base, version, _ = value._view_of
    if base is not x or type(version) is not tuple or not isinstance(made_by, Node):
        return False
    if made_by.node_state is not RECORDED:
        return False
    if not made_by.sequence + 1 == version[1] == next(_sequence) - 1:
        return False
    strides, size, stride, offset, assigned_at = made_by.given
    if assigned_at is not None or not (type(index) is int or _dims_left(index, len(strides)) >= 0):
        return False
    with DisableTorchFunctionSubclass():
        try:
            part = _get_item(x, index)
        except (IndexError, TypeError, ValueError):
            return False
        is_same = part.storage_offset() - C_offset(x) == offset and part.stride() == stride
        if not (is_same and part.shape == size and x._version == version[0]):
            return False
        _torch.increment_version([x])
    made_by.given = strides, size, stride, offset, index
    return True


def _dims_left(index: object, dims: int) -> int:
    """The number of dimensions of a part, of `dims`; negative if it is the whole, or the index has
    other items than integers and slices."""
    cuts = False
    for i in index if type(index) is tuple else (index,):
        kind = type(i)
        if kind is int:
            dims -= 1
            cuts = True
        elif kind is slice and {type(i.start), type(i.stop), type(i.step)} <= _BOUNDS:
            cuts = cuts or i != _ALL
        else:
            return -1
    return dims if cuts else -1


_get_item, _set_item = T.__getitem__, T.__setitem__
_new = object.__new__
_BOUNDS = {int, type(None)}
_ALL = slice(None)
_BOTH = (0, 1)
_NEEDS_X, _NEEDS_VALUE, _NEEDS_BOTH = (True, False), (False, True), (True, True)
_NOTHING = (None,)  # saved, so that it can be freed


class AsStrided(Operation):
    """z = the elements of x's memory at offset + strides . i:  dx = zeros, g added there

    If several elements of z share a place in memory, their gradients are added.
    """

    is_rule = True
    is_view = True

    @staticmethod
    def forward(
        ctx: Node,
        input: T,
        size: Sequence[int],
        stride: Sequence[int],
        storage_offset: int | None = None,
    ) -> T:
        z = torch.as_strided(input, size, stride, storage_offset)
        AsStrided.note(ctx, input, z.shape, z.stride(), z.storage_offset())
        return z

    @staticmethod
    def note(
        ctx: Node,
        base: T,
        size: Sequence[int],
        stride: Sequence[int],
        offset: int | torch.SymInt,
    ) -> None:
        if not base.is_contiguous() and overlaps(base.shape, base.stride()):
            raise RuntimeError(
                "nnmirror: as_strided of a tensor with several elements in one place (an expanded"
                " one) is not mirrored; clone it first"
            )
        ctx.given = C_shape(base), C_stride(base), C_offset(base), size, stride, offset

    @staticmethod
    def backward(ctx: Node, g: T) -> tuple[T | None, ...]:
        shape, strides, base_offset, size, stride, offset = ctx.given
        if 0 in shape or 0 in size:
            return torch.zeros(shape, dtype=g.dtype, device=g.device), None, None, None
        inside = offset - base_offset
        reach = _extent(shape, strides)
        if inside >= 0 and inside + _extent(size, stride) <= reach and not overlaps(size, stride):
            dx = torch.empty_strided(shape, strides, dtype=g.dtype, device=g.device).zero_()
            dx.as_strided(size, stride, inside).copy_(g)
            return dx, None, None, None
        kept: list[tuple[int, int]] = []
        for d in range(len(size) - 1, -1, -1):
            if size[d] == 1:
                g = g.squeeze(d)
            elif stride[d] == 0:
                g = g.sum(d)
            else:
                kept.insert(0, (size[d], stride[d]))
        size, stride = [n for n, _ in kept], [s for _, s in kept]
        shared = min(base_offset, offset)
        base_offset, offset = base_offset - shared, offset - shared
        memory = torch.zeros(
            max(reach + base_offset, _extent(size, stride) + offset),
            dtype=g.dtype,
            device=g.device,
        )
        if overlaps(size, stride):
            places = torch.arange(len(memory), device=g.device).as_strided(size, stride, offset)
            memory.index_add_(0, places.reshape(-1), g.reshape(-1))
        else:
            memory.as_strided(size, stride, offset).copy_(g)
        return memory.as_strided(shape, strides, base_offset), None, None, None

    @classmethod
    def node_name(cls) -> str:
        return "AsStridedBackward0"


def _extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """The extent in memory, in elements, of a tensor with this geometry."""
    reach = 1
    for n, s in zip(size, stride, strict=True):
        reach += (n - 1) * s
    return reach


def overlaps(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Can two indices refer to the same place in memory?"""
    if len(size) < 2:
        return len(size) == 1 and stride[0] == 0 and size[0] > 1
    reach = 0
    for s, n in sorted((s, n) for n, s in zip(size, stride, strict=True) if n > 1):
        if s <= reach:
            return True
        reach += (n - 1) * s
    return False


_FOREIGN = (
    "nnmirror: an in-place operation on a tensor that torch's own autograd made, or on a view"
    " of one, is not mirrored; use the out-of-place operation"
)
_SHARED = (
    "nnmirror: an in-place operation that brings a gradient into memory that other tensors share"
    " (its views, or its base) is not mirrored if one of these has another dtype, is of a subclass"
    " of torch.Tensor, or cannot be found; .clone() it first"
)
_MODES = {
    "no_grad": (" no_grad mode", " with grad mode enabled"),
    "inference": (" inference mode", " in normal mode"),
}
_AMBIGUOUS = (
    " Given that this use case is ambiguous and error-prone, it is forbidden. You can clarify your"
    " code by moving both the view and the inplace either both inside the {0} block (if you"
    " don't want the inplace to be tracked) or both outside (if you want the inplace to be"
    " tracked)."
)
_REASONS = {
    "no_grad": _AMBIGUOUS.format("no_grad"),
    "inference": _AMBIGUOUS.format("inference_mode"),
    "multi_output": (
        " This view is the output of a function that returns multiple views. Such functions do"
        " not allow the output views to be modified inplace. You should replace the inplace"
        " operation by an out-of-place one."
    ),
    "in_custom_function": (
        " This view was created inside a custom Function (or because an input was returned"
        " as-is) and the autograd logic to handle view+inplace would override the custom"
        " backward associated with the custom Function, leading to incorrect gradients. This"
        " behavior is forbidden. You can fix this by cloning the output of the custom Function."
    ),
}


def _forbidden(view: torch.Tensor, kind: str, who: str) -> str:
    node = getattr(view, "_node", None)
    if node is None or node.function is AsStrided:  # made before its memory carried a gradient
        mode, now = _MODES.get(kind, _MODES["no_grad"])
        how = f"A view was created in{mode} and {who} modified inplace{now}."
    else:
        how = (
            f"Output {node and view._output_nr} of {short_name(node.name())} is a view and {who}"  # type: ignore[attr-defined]
            " modified inplace."
        )
    return how + _REASONS[kind]
