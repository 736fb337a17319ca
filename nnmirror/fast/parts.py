"""Bound parts of a walk: where a graph never repeats as a whole, the generic walk runs those parts
of it that do."""

from functools import partial

import torch

from .. import fast
from .. import walk as _walk
from .._upcalls import implements
from ..bits import same_layout_and_bits
from ..node import Node
from ..running import GraphTask
from . import bound as _bound
from .due import OFTEN, has_many, is_out_of_date, note_bound, waiting
from .signature import Signature
from .trial import may_be_used, quietly
from .writer import ChangedSince

_VISITS = 8  # of a node, before a part is bound from it: a loop has more of them in one walk


@implements(_walk)
def bound_part(
    node: Node, grad: torch.Tensor, progress: GraphTask, retain_graph: bool
) -> _bound.Left | None:
    """The bound part of the walk from `node`, see `BoundPart`; None if there is none."""
    sign = node.signature
    assert sign is not None
    key = grad.stride() if grad.dim() else ()
    walks = sign.walks
    parts = walks.parts.get(key) if walks.parts else None
    if parts is None:
        walks.visits += 1
        if walks.visits < _VISITS and fast.after > 1:
            return None
        if sign.sizes and walks.visits < _VISITS * OFTEN and has_many(sign):
            return None  # as in `is_due`
        parts = _bind_part(sign, key, node, grad, progress, is_short=False)
        note_bound(sign)
        if parts is None or fast.after > 1:
            return None
    for part in parts:
        if part.trusted or _is_right_part(part, sign, node, grad, progress):
            if part.more:
                found = part.walk(node, grad, retain_graph, progress)
            else:
                ready = progress.ready
                until = -ready[0][0] if ready else -1
                found = part.run(node, grad, retain_graph, until, ())
            if found is not None:
                part.misses = 0
                return found
        if walks.parts is False:
            return None
        part.misses += 1
    if len(parts) == 1 and part.loop_steps > 1 and part.trusted:
        # Perhaps the loop had another number of steps. The last ones are run one by one.
        part.loop_steps = 1  # once
        _bind_part(sign, key, node, grad, progress, is_short=True)
    elif is_out_of_date(part, sign):  # other calls lie behind it now
        all_parts = walks.parts
        if all_parts:
            all_parts.pop(key, None)
        walks.visits = 0
        walks.rebound += 1
    return None


def _bind_part(
    sign: Signature,
    key: tuple[int, ...],
    node: Node,
    grad: torch.Tensor,
    progress: GraphTask,
    is_short: bool,
) -> list[_bound.BoundPart] | None:
    """The bound parts from `node`, with a new one; None if there can be none, or not now."""
    try:
        with quietly():
            part = _bound.bind_part(node, grad, progress, is_short)
    except (ChangedSince, RuntimeError):  # an error comes when its node's turn does
        sign.walks.visits = waiting(sign)
        return None
    if part is None:
        if not is_short:
            sign.walks.parts = False
        return None
    all_parts = sign.walks.parts  # other threads may set it
    if all_parts is False:
        return None
    if all_parts is None or len(all_parts) >= _MOST_PARTS:
        all_parts = sign.walks.parts = {}
    parts: list[_bound.BoundPart] = all_parts.setdefault(key, [])
    parts.append(part)
    return parts


def _is_right_part(
    part: _bound.BoundPart,
    sign: Signature,
    node: Node,
    grad: torch.Tensor,
    progress: GraphTask,
) -> bool:
    """Does it fit here, and has it the bits of the generic walk? If it has others, no part from
    here is ever used."""

    def has_same_bits() -> bool | None:
        found = part.walk(node, grad, True, progress, trying=True)
        if found is None:
            return None
        targets, left = found  # the last gradient first
        alike: list[bool] = []

        def compare(target: object, index: int, other: torch.Tensor) -> None:
            to, at = targets[len(alike)] if left else (None, 0)
            alike.append(to is target and at == index and same_layout_and_bits(left.pop(), other))

        _bound.by_steps(part, node, grad, progress, compare)
        return all(alike) and not left

    return may_be_used(part, node, has_same_bits, partial(setattr, sign.walks, "parts", False))


_MOST_PARTS = 4  # one for each strides of the gradient
