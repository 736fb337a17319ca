"""In-place changes seen through views.

A view shares its base's memory, so an in-place operation on it changes the base, and one on
the base changes the view. As in PyTorch:

- the operation on a view becomes a `CopySlices` on the base: its backward cuts the view's
  part out of the gradient of the base, hands it to the operation's own backward and puts
  what that returns in its place;
- a view whose memory was changed since it was made forgets how it was made; when next asked,
  it is a piece cut out of the base as the base is now (`AsStrided`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import tape as _tape
from . import tensor as _tensor

T = torch.Tensor


class ViewOf(NamedTuple):
    """What a tracked view remembers."""

    base: torch.Tensor
    version: int  # of the shared memory, when its grad_fn was made
    # How it was made: by an operation ("plain"), by one that returns several ("several"), by
    # a user's Function ("custom"), or from a tensor in torch's own graph ("foreign").
    kind: str


def view_of(node: "_tape.Node", out: torch.Tensor, base: Any, several: bool) -> ViewOf | None:
    """What to remember of `out`, output of `node`, if it is a view of `base` or its base."""
    kind = "several" if several else "plain"
    if not node.function.is_rule:
        kind = "custom"
        base = out._base if out._is_view() else None
    elif not isinstance(base, _tensor.Tensor):
        kind = "foreign"
    if not isinstance(base, torch.Tensor):
        return None
    held = base._view_of if isinstance(base, _tensor.Tensor) else None
    if held is not None:
        return ViewOf(held.base, out._version, held.kind if kind == "plain" else kind)
    return ViewOf(base, out._version, kind)


def changed_base(tensor: torch.Tensor) -> torch.Tensor | None:
    """The base that a recorded in-place operation on `tensor` changes; None if it is none.

    Refuses what PyTorch refuses, and what the tape cannot follow.
    """
    base = None
    if isinstance(tensor, _tensor.Tensor) and tensor._view_of is not None:
        base, _, kind = tensor._view_of
        if kind == "foreign":
            leaf = _tape.edge_of(tensor)[0].edges[0][0]
            if not isinstance(leaf, torch.Tensor) or not leaf.is_leaf:
                raise RuntimeError(_FOREIGN)
            raise RuntimeError("a view of a" + _LEAF)
        if kind != "plain":
            raise RuntimeError(_forbidden(tensor, kind, "is being"))
    elif not tensor.requires_grad and tensor._is_view():
        base = tensor._base
        if base is not None and base.requires_grad:
            if not isinstance(base, _tensor.Tensor):
                raise RuntimeError(_FOREIGN)
            raise RuntimeError(_NO_GRAD.format("is being"))
    if base is not None and base.requires_grad and base.is_leaf:
        raise RuntimeError("a view of a" + _LEAF)
    if tensor.requires_grad:
        if not isinstance(tensor, _tensor.Tensor) and not tensor.is_leaf:
            raise RuntimeError(_FOREIGN)
        if tensor.is_leaf:
            raise RuntimeError("a" + _LEAF)
    root = tensor if base is None else base
    if not root.requires_grad:
        # Memory that carried no gradient is about to carry one, and whoever else sees it
        # would not know: nobody else may. (`_storage_Use_Count` counts its own argument.)
        known = 2 if base is None else 3
        if torch._C._storage_Use_Count(root.untyped_storage()._cdata) > known:
            raise RuntimeError(_SHARED)
    return base


def rebase(node: "_tape.Node", view: "_tensor.Tensor", base: torch.Tensor) -> None:
    """Record `node`, an in-place operation on `view`, as one on its base."""
    edge = _tape.edge_of(base) if base.requires_grad else None
    if not isinstance(base, _tensor.Tensor):
        base.__class__ = _tensor.Tensor
    node.edges = [edge, *node.edges[1:]]
    copy = _tape.Node(CopySlices)
    copy.places = node.places
    copy.edges = node.edges
    copy.needs_input_grad = (edge is not None, *node.needs_input_grad[1:])
    copy.sequence = next(_tape._sequence)
    copy.outputs = [_tape.meta_of(base)]
    copy._saved = (node,)  # type: ignore[assignment]
    offset = view.storage_offset() - base.storage_offset()
    copy.geometry = base.stride(), (view.shape, view.stride(), offset)  # type: ignore[attr-defined]
    _tape.made_by(base, copy, 0)  # type: ignore[arg-type]
    view._view_of = ViewOf(base, -1, "plain")
    renew(view)


def renew(view: "_tensor.Tensor") -> None:
    """Give a view whose memory has changed a grad_fn that starts from its base as it is now."""
    base, _, kind = view._view_of  # type: ignore[misc]
    if not base.requires_grad and view._node is None:
        return
    if kind not in ("plain", "foreign"):
        raise RuntimeError(_forbidden(view, kind, "its base or another view of its base has been"))
    if kind == "foreign":
        raise RuntimeError(_FOREIGN)
    node = _tape.Node(AsStrided)
    node.places = (0,)
    # A base that was detached since gets nothing, and nor does what it was made of.
    edge = _tape.edge_of(base) if base.requires_grad else None
    node.needs_input_grad = (edge is not None, False, False, False)
    node.edges = [edge, None, None, None]
    AsStrided.note(node, base, view.shape, view.stride(), view.storage_offset())
    node.sequence = next(_tape._sequence)
    node.outputs = [_tape.meta_of(view)]
    _tape.made_by(view, node, 0)
    view._view_of = ViewOf(base, view._version, kind)


class CopySlices(_tape.Function):
    """An in-place operation on a view, seen from the base."""

    is_rule = True

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        if ctx._saved is None:
            raise RuntimeError(_tape._FREED)
        strides, part_of = ctx.geometry
        whole = torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
        part = whole.as_strided(*part_of)
        grads = list(ctx._saved[0].run((part.clone(memory_format=torch.contiguous_format),)))
        if grads[0] is not None:
            part.copy_(grads[0])
            grads[0] = whole
        return tuple(grads)

    @classmethod
    def node_name(cls) -> str:
        return "torch::autograd::CopySlices"


class AsStrided(_tape.Function):
    """z = the elements of x's memory at offset + strides . i:  dx = zeros, g added there

    Where z has several elements in one place their gradients are added up.
    """

    is_rule = True
    is_view = True

    @staticmethod
    def forward(ctx: Any, input: T, size: Any, stride: Any, storage_offset: Any = None) -> T:
        z = torch.as_strided(input, size, stride, storage_offset)
        AsStrided.note(ctx, input, z.shape, z.stride(), z.storage_offset())
        return z

    @staticmethod
    def note(ctx: Any, base: T, size: Any, stride: Any, offset: Any) -> None:
        if overlaps(base.shape, base.stride()):
            raise RuntimeError(
                "nnmirror: as_strided of a tensor with several elements in one place (an expanded"
                " one) is not mirrored; clone it first"
            )
        ctx.base = base.shape, base.stride(), base.storage_offset()
        ctx.piece = size, stride, offset

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        shape, strides, base_offset = ctx.base
        size, stride, offset = ctx.piece
        if 0 in shape or 0 in size:
            return torch.zeros(shape, dtype=g.dtype, device=g.device), None, None, None
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
            max(_extent(shape, strides) + base_offset, _extent(size, stride) + offset),
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
    """How many elements of memory a tensor of this geometry reaches over."""
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


def overlaps(size: Sequence[int], stride: Sequence[int]) -> bool:
    """May two indices lead to one place in memory?"""
    reach = 0
    for s, n in sorted((s, n) for n, s in zip(size, stride, strict=True) if n > 1):
        if s <= reach:
            return True
        reach += (n - 1) * s
    return False


_LEAF = " leaf Variable that requires grad is being used in an in-place operation."
_FOREIGN = (
    "nnmirror: an in-place operation on a tensor that torch's own autograd made, or on a view"
    " of one, is not mirrored; use the out-of-place operation"
)
_SHARED = (
    "nnmirror: an in-place operation that brings a gradient into memory which other tensors"
    " see as well (views of it, or what it is a view of) is not mirrored; .clone() it first"
)
_NO_GRAD = (
    "A view was created in no_grad mode and {} modified inplace with grad mode enabled. Given"
    " that this use case is ambiguous and error-prone, it is forbidden. You can clarify your"
    " code by moving both the view and the inplace either both inside the no_grad block (if you"
    " don't want the inplace to be tracked) or both outside (if you want the inplace to be"
    " tracked)."
)
_REASONS = {
    "several": (
        " This view is the output of a function that returns multiple views. Such functions do"
        " not allow the output views to be modified inplace. You should replace the inplace"
        " operation by an out-of-place one."
    ),
    "custom": (
        " This view was created inside a custom Function (or because an input was returned"
        " as-is) and the autograd logic to handle view+inplace would override the custom"
        " backward associated with the custom Function, leading to incorrect gradients. This"
        " behavior is forbidden. You can fix this by cloning the output of the custom Function."
    ),
}


def _forbidden(view: "_tensor.Tensor", kind: str, who: str) -> str:
    node: Any = view._node
    return (
        f"Output {view._output_nr} of {_tape._short(node.name())} is a view and {who} modified"
        f" inplace.{_REASONS[kind]}"
    )
