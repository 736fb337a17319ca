"""When a walk is bound, and when the bound walk is used.

A walk that has occurred a few times is bound (`bound.py`), run once beside the generic one, and
used from then on if it gave the same bits. This applies to the whole walk from a loss, and to the
walk from any node that the generic walk reaches.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic, Literal, TypeAlias, TypeVar

import torch

from .. import _torch, beyond, fast
from .. import gradients as _gradients
from .. import tensor as _tensor
from .. import walk as _walk
from .._torch import DisableTorchFunctionSubclass
from .._upcalls import implements
from ..accumulate import accumulate, accumulating, add_to_grad
from ..bits import same_layout_and_bits
from ..constants import constant
from ..exact import mode as exact
from ..node import Edge, Node, Target
from ..running import Progress, dependencies
from ..walk import unrecorded, walk
from . import bound as _bound
from . import writer as _writer
from .shorter import Unbindable
from .signature import MANY_WALKS, Family, Signature, Sizes, Unsigned, of_tensor
from .sized import OfAnySize


@implements(_gradients)
@unrecorded
def walk_bound(loss: torch.Tensor, retain_graph: bool) -> bool:
    """Run the backward from a loss by a bound walk; False if there is none for this graph."""
    node = loss._node if isinstance(loss, _tensor.Tensor) and loss._view_of is None else None
    sign = None if node is None else node.signature
    if node is None or sign is None or len(node.outputs) > 1 or sign.walks.bound is False:
        return False
    if is_observed():
        return False
    with DisableTorchFunctionSubclass():
        if sign.is_deep or not sign.walks.bound:
            _note_calls(sign, node)
        family = sign.of_family()
        if family is not None and family.sized is not False:
            return _has_run_for_any_size(family, sign.sizes, node, retain_graph)
        bound = sign.walks.bound or _first_bound(node, sign)
        if not bound:
            return False
        for tried in (bound, *bound.others):
            is_trusted = tried.trusted or is_right(
                tried, node, tried.start, partial(_distrust, node, sign)
            )
            if is_trusted and _has_run(tried, node, tried.start, retain_graph):
                tried.uses += 1
                return True
            if sign.walks.bound is False:
                return False
        if sign.is_deep:
            bound.misses += 1
            _bind_another(bound, node, sign)
    return False


def _has_run_for_any_size(family: Family, sizes: Sizes, node: Node, retain_graph: bool) -> bool:
    """Run the walk from a loss by the one that its family has for any sizes; False if there
    is none for this graph. Recorded for these sizes, if the family has none for them yet."""
    start = start_of_loss(node)
    if start is None:
        family.sized = False
        return False
    if family.sized is None:
        family.sized = OfAnySize(_OFTEN if _has_many(family) else fast.after - 1)
    found: OfAnySize = family.sized
    walk = found.walk_for(sizes, node)
    if walk is not None:
        if not walk.trusted:
            try:
                if is_right(walk, node, walk.start, lambda: setattr(family, "sized", False)):
                    walk.trusted = walk.note_right(sizes)
            except RuntimeError:  # as for other shapes
                family.sized = False
        return walk.trusted and _has_run(walk, node, walk.start, retain_graph)
    if found.waits > 0:
        found.waits -= 1
        return False
    try:
        with quietly():
            known = len(found.walks)
            if not found.record(sizes, node, start):
                family.sized = False
        if len(found.walks) > known:
            _note_bound(family)
        if _has_many(family):  # as in `_is_due`
            found.waits += 4 * found.recorded
    except (_writer.ChangedSince, RuntimeError):
        found.waits = _PATIENCE
    except Unbindable:
        family.sized = False
    return False


@implements(_gradients)
@unrecorded
def walk_from(target: Target, grad: torch.Tensor, retain_graph: bool) -> bool:
    """Run the backward from a result with the gradient `grad` by a bound walk; False if there is
    none for this graph."""
    if not isinstance(target, Node) or target.theirs is not None or len(target.outputs) != 1:
        return False
    if type(grad) is not torch.Tensor:
        return False
    sign, key = target.signature, key_of(grad, ())
    if sign is None or key is None or is_observed():
        return False
    with DisableTorchFunctionSubclass():
        walks: Walks[_bound.BoundWalk] = sign.walks.from_given
        write = partial(_bound_from, target, grad)
        for bound in walks_for(walks, key, sign, write):
            is_trusted = bound.trusted or is_right(
                bound, target, grad, partial(walks.__setitem__, key, False)
            )
            if is_trusted and _has_run(bound, target, grad, retain_graph):
                bound.misses = 0
                return True
        have_missed(walks, key, sign, write)
    return False


def is_observed() -> bool:
    """Has each operation to run by itself, for anomaly mode or another mode of torch's?"""
    return torch.is_anomaly_enabled() or _torch.is_shown()


def _bound_from(node: Node, grad: torch.Tensor) -> _bound.BoundWalk:
    made = _bound.bind(node, grad, varies=True)
    if made is None:
        raise Unbindable
    return made


def _has_run(bound: _bound.BoundWalk, node: Node, grad: torch.Tensor, retain_graph: bool) -> bool:
    """Run it, and add what it finds to each leaf's `.grad`; False if the graph is another one."""
    with _torch.AutoDispatchBelowAutograd():  # spares torch a check at each call
        found = bound.run(node, grad, retain_graph, accumulate)
    if found is None:
        return False
    hand_over(bound, node, found, retain_graph)
    return True


def _first_bound(node: Node, sign: Signature) -> _bound.BoundWalk | None:
    """The walk from a loss, bound if the loss has occurred a few times."""
    sign.walks.count += 1
    if not _is_due(sign, sign.walks.count):
        return None
    with quietly():
        bound = _bind(node)
    if bound is None or (bound is False and _may_bind_another(sign)):
        sign.walks.count = _waiting(sign)
        return None
    sign.walks.bound = bound
    _note_bound(sign)
    return bound if bound and fast.after == 1 else None


def _note_calls(sign: Signature, node: Node) -> None:
    """Count how often in turn as many calls were recorded between two walks."""
    walks = sign.walks
    between = node.sequence - walks.walked
    walks.steady = walks.steady + 1 if between == walks.between else 0
    walks.between, walks.walked = between, node.sequence


def _is_due(sign: Signature, times: int) -> bool:
    """Has a walk from `sign` occurred so often that it is bound?

    To bind it takes as long as some ten walks. Where shapes depend on the data, so that hundreds of
    different graphs start from one leaf, most of them are too rare to gain by it.
    """
    if times < fast.after or fast.after == 1:
        return times >= fast.after
    return times >= _OFTEN or not _has_many(sign)


def _has_many(sign: Signature) -> bool:
    """Were many walks bound already that began behind the same leaf?"""
    leaf = sign.leaf()
    return leaf is not None and leaf.walks_bound >= MANY_WALKS and fast.after > 1


def _note_bound(sign: Signature) -> None:
    leaf = sign.leaf()
    if leaf is not None:
        leaf.walks_bound += 1


def _may_bind_another(sign: Signature) -> bool:
    """Is it worth trying another graph with the same last call?"""
    return sign.is_deep and sign.walks.rebound < _MOST_BOUND


def _waiting(sign: Signature) -> int:
    """From where to count until binding is tried again: each time from twice as far."""
    waits = -_PATIENCE << sign.walks.rebound
    sign.walks.rebound = min(sign.walks.rebound + 1, _MOST_BOUND)
    return waits


def _bind_another(bound: _bound.BoundWalk, node: Node, sign: Signature) -> None:
    """Neither `bound` nor one of its others fits this graph: if that goes on, bind another walk;
    soon while few are kept, as short loops have one for each length."""
    has_room = bound.trusted and len(bound.others) < _MOST_OTHERS
    if has_room:
        is_due = bound.misses >= fast.after and sign.walks.rebound < _MOST_BOUND
    elif bound.others:  # if it is not trusted yet, its own graph has to come again
        is_due = (
            bound.misses >= _PATIENCE << sign.walks.rebound and sign.walks.rebound < _MOST_BOUND
        )
    else:
        is_due = _is_out_of_date(bound, sign)
    if not is_due:
        return
    with quietly():
        another = _bind(node)
    if not another:
        bound.misses = -_PATIENCE << sign.walks.rebound
    if not (another and has_room):
        sign.walks.rebound += 1
    if another:
        others = [known for known in (bound, *bound.others) if known.trusted]
        others.sort(key=lambda known: -known.uses)
        bound.others = ()
        another.others = tuple(others[:_MOST_OTHERS])
        sign.walks.bound = another


def hand_over(
    bound: _bound.BoundWalk, node: Node, found: Sequence[_bound.Found], retain_graph: bool
) -> None:
    """Add what the bound walk from `node` has found to the `.grad` of each leaf.

    If torch's own graph lies behind one of its tensors, its engine continues from all of these.
    """
    to_torch: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    arrivals: dict[int, list[tuple[int | None, torch.Tensor]]] = {}
    if bound.meets_torch:
        theirs = [one for one in found if _tensor.is_torchs(one[0])]
        for leaf, grad, own in theirs:
            if isinstance(own, tuple):
                arrivals.setdefault(id(leaf), []).append((own[0], grad))
        goes_on = any(beyond.goes_on(leaf) for leaf, _, _ in theirs)
        if goes_on or arrivals:
            found = [one for one in found if not _tensor.is_torchs(one[0])]
            totals = {id(t): (t, None if arrivals else grad) for t, grad, _ in theirs}
            to_torch = [*totals.values()]
        if arrivals and not goes_on:  # some were results when the walk was bound
            summed = [(leaf, beyond.total(arrivals[id(leaf)]), False) for leaf, _ in to_torch]
            found, to_torch = [*found, *summed], []
    with accumulating:
        for leaf, grad, own in found:
            if own is True and leaf._gradient is None:
                leaf._gradient = grad
            elif own == "whole view" and getattr(leaf, "_gradient", 0) is None:
                leaf._gradient = grad.detach()  # with memory that nothing else refers to
            else:
                add_to_grad(leaf, grad, bool(own))
    if to_torch:
        with (going := Progress([(node, 0)])):
            beyond.accumulate(to_torch, retain_graph, arrivals)
            going.call_back()


@implements(_walk)
def bound_part(
    node: Node, grad: torch.Tensor, progress: Progress, retain_graph: bool
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
        if sign.sizes and walks.visits < _VISITS * _OFTEN and _has_many(sign):
            return None  # as in `_is_due`
        parts = _bind_part(sign, key, node, grad, progress, is_short=False)
        _note_bound(sign)
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
    elif _is_out_of_date(part, sign):  # other calls lie behind it now
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
    progress: Progress,
    is_short: bool,
) -> list[_bound.BoundPart] | None:
    """The bound parts from `node`, with a new one; None if there can be none, or not now."""
    try:
        with quietly():
            part = _bound.bind_part(node, grad, progress, is_short)
    except (_writer.ChangedSince, RuntimeError):  # an error comes when its node's turn does
        sign.walks.visits = _waiting(sign)
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
    progress: Progress,
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


W = TypeVar("W", bound=_bound.Bound)


class Candidates(Generic[W]):
    """The walks from one signature with one key, which go to different inputs of one layout, say:
    one of them fits, or none."""

    def __init__(self, first: W) -> None:
        self.walks = [first]  # the latest first
        self.misses = 0  # how often none fitted, since the latest was bound


# The walks from one signature, by `key_of`: for those not bound yet, how often they occurred; False
# if they cannot be bound.
Walks: TypeAlias = dict[object, Candidates[W] | int]


def key_of(grad: torch.Tensor, ends: Sequence[Edge]) -> object:
    """What distinguishes walks from one signature; None if there is no such key."""
    try:
        return of_tensor(grad), exact.is_exact(), *[_kind_of(target) for target, _ in ends]
    except Unsigned:
        return None


def _kind_of(target: Target) -> object:
    if isinstance(target, Node):
        return None if target.signature is None else target.signature.own_serial
    if isinstance(target, _tensor.Tensor):
        return None if target._signature is None else target._signature.serial
    return of_tensor(target)


def walks_for(walks: Walks[W], key: object, sign: Signature, write: Callable[[], W]) -> Sequence[W]:
    """The walks for `key`; the first is written when it has occurred a few times."""
    found = walks.get(key, 0)
    if found is False:
        return ()
    if not isinstance(found, int):
        return found.walks
    if key not in walks and len(walks) >= _MOST_TO_ENDS:
        walks.pop(next(iter(walks)), None)
    walks[key] = found + 1
    if not _is_due(sign, found + 1):
        return ()
    written = _written(sign, write)
    if written is None:
        walks[key] = _waiting(sign)
        return ()
    if written is False:
        walks[key] = _waiting(sign) if _may_bind_another(sign) else False
        return ()
    candidates = walks[key] = Candidates(written)
    return candidates.walks if fast.after == 1 else ()


def _written(sign: Signature, write: Callable[[], W]) -> W | Literal[False] | None:
    """A walk; False if it cannot be bound, None if it cannot be now."""
    try:
        with quietly():
            written = write()
    except _writer.ChangedSince:
        return None
    except (Unbindable, RuntimeError, NotImplementedError):  # an error comes in its node's turn
        return False
    _note_bound(sign)
    return written


def have_missed(walks: Walks[W], key: object, sign: Signature, write: Callable[[], W]) -> None:
    """None of the walks for `key` fitted. If that goes on, another is bound: soon while they are
    few, as an output may be differentiated for each of several inputs in turn."""
    candidates = walks.get(key)
    if not isinstance(candidates, Candidates):
        return
    candidates.misses += 1
    for bound in candidates.walks:
        bound.misses += 1
    if len(candidates.walks) < _MOST_CANDIDATES:
        rarest = None
        is_due = candidates.misses >= fast.after
    else:
        rarest = max(candidates.walks, key=lambda bound: bound.misses)
        is_due = rarest.misses >= _PATIENCE << sign.walks.rebound and _may_bind_another(sign)
    if not is_due:
        return
    written = _written(sign, write)
    candidates.misses = 0 if written else -_PATIENCE << sign.walks.rebound
    if rarest is not None or not written:
        sign.walks.rebound = min(sign.walks.rebound + 1, _MOST_BOUND)
    if written:
        candidates.walks = [written, *[bound for bound in candidates.walks if bound is not rarest]]


def _is_out_of_date(bound: _bound.Bound, sign: Signature) -> bool:
    """Has it not fitted so often in turn that another is to be bound? Each time twice as often: a
    number that differs each time, such as one of a schedule, becomes an operand after a while."""
    patience = _PATIENCE if bound.trusted else fast.after
    return sign.walks.rebound < _MOST_BOUND and bound.misses >= patience << sign.walks.rebound


_VISITS = 8  # of a node, before a part is bound from it: a loop has more of them in one walk
_PATIENCE = 16
_OFTEN = 12  # after MANY_WALKS, one is bound when it has come so often
_MOST_BOUND = 8  # of one signature, one after another
_MOST_OTHERS = 15  # that are kept beside the latest
_MOST_TO_ENDS = 64
_MOST_CANDIDATES = 4


def may_be_used(
    bound: _bound.Bound,
    node: Node,
    has_same_bits: Callable[[], bool | None],
    distrust: Callable[[], None],
) -> bool:
    """May it be used for the graph behind `node`? When it first fits one, it is compared.

    `has_same_bits()` runs it beside the generic walk; None if it does not fit this graph. If the
    bits differ, `distrust()` is called, so that it is never used.
    """
    if bound.trusted:
        return True
    if node.sequence == bound.first and fast.after > 1:
        return False  # on the numbers that it was recorded with, a comparison proves less
    with quietly():  # what is computed twice warns once
        found = has_same_bits()
    if found is None:
        return False
    bound.trusted = found
    if not found:
        distrust()
        if fast.after == 1:
            raise AssertionError(f"nnmirror: a bound walk has other bits:\n{bound.source}")
    return found


def is_right(
    bound: _bound.BoundWalk, node: Node, start: torch.Tensor, distrust: Callable[[], None]
) -> bool:
    """`may_be_used` for a walk to the leaves, that starts with the gradient `start`."""
    return may_be_used(bound, node, partial(_has_same_bits, bound, node, start), distrust)


def _has_same_bits(bound: _bound.BoundWalk, node: Node, start: torch.Tensor) -> bool | None:
    held: dict[int, torch.Tensor] = {}
    leaves: list[Edge] = []

    def keep(leaf: torch.Tensor, grad: torch.Tensor, own: object) -> None:
        if id(leaf) in held:  # each call's gradient comes by itself
            held[id(leaf)] = held[id(leaf)] + grad
            return
        held[id(leaf)] = grad
        leaves.append((leaf, 0))

    rest = bound.run(node, start, True, keep)
    if rest is None:
        return None
    for arrival in rest:
        keep(*arrival)
    rest = arrival = None
    alike: list[bool] = []

    def compare(leaf: object, other: torch.Tensor | None) -> None:
        alike.append(same_layout_and_bits(held.pop(id(leaf)), other))

    # Each gradient is compared when it comes, and both are dropped: two whole sets of them would
    # need twice the memory of a step.
    others = walk([(node, 0)], [start.detach()], True, only=leaves, give=compare)
    for (leaf, _), other in zip(leaves, others, strict=True):
        if id(leaf) in held:  # none has come
            compare(leaf, other)
    return all(alike)


def _distrust(node: Node, sign: Signature) -> None:
    """Bind neither the walk from `node` nor parts of it."""
    sign.walks.bound = False
    for other in dependencies([(node, 0)], expanding=False).order:
        if other.signature is not None:
            other.signature.walks.parts = False


def _bind(node: Node) -> _bound.BoundWalk | Literal[False] | None:
    """The bound walk from a loss; False if it cannot be bound, None if it cannot be now."""
    start = start_of_loss(node)
    try:
        return start is not None and (_bound.bind(node, start) or False)
    except (_writer.ChangedSince, RuntimeError):  # an error comes when its node's turn does
        return None


def start_of_loss(node: Node) -> torch.Tensor | None:
    """The gradient that the walk from a loss starts with; None if it is no loss."""
    shape, dtype, device = node.outputs[0]
    is_loss = not len(shape) and dtype.is_floating_point
    return constant(1.0, dtype, device) if is_loss else None


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without warnings, as the same is computed again afterwards.

    Unlike `warnings.catch_warnings`, this does not forget which warnings have been given.
    """
    filters: list[object] = warnings.filters  # type: ignore[assignment]
    filters.insert(0, _IGNORE)
    try:
        yield
    finally:
        for i, one in enumerate(filters):  # other threads may have others, or have reset them
            if one is _IGNORE:
                del filters[i]
                break


_IGNORE = ("ignore", None, Warning, None, 0)
