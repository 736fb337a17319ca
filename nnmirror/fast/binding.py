"""Walks from a loss, or from a result with a given gradient, by bound walks.

A walk that has occurred a few times (`due.py`) is bound (`bound.py`), run once beside the generic
one (`trial.py`), and used from then on if it gave the same bits.
"""

from collections.abc import Sequence
from functools import partial

import torch

from .. import _torch, beyond, fast
from .. import gradients as _gradients
from .. import tensor as _tensor
from .._torch import DisableTorchFunctionSubclass
from .._upcalls import implements
from ..accumulate import accumulate, accumulating, add_to_grad
from ..constants import constant
from ..node import Node, Target
from ..running import GraphTask, dependencies
from ..walk import unrecorded
from . import bound as _bound
from .due import OFTEN, PATIENCE, has_many, note_bound
from .keyed import first_that_fits, have_missed, key_of, walks_for
from .shorter import Unbindable
from .signature import LOSS, Family, Signature, Sizes
from .sized import OfAnySize
from .trial import is_right, quietly
from .writer import ChangedSince, Writer

_MOST_LENGTHS = 16  # of a loop, for which there are walks from one loss


@implements(_gradients)
@unrecorded
def walk_bound(loss: torch.Tensor, retain_graph: bool) -> bool:
    """Run the backward from a loss by a bound walk; False if there is none for this graph."""
    node = loss._node if isinstance(loss, _tensor.Tensor) and loss._view_of is None else None
    sign = None if node is None else node.signature
    if node is None or sign is None or len(node.outputs) > 1:
        return False
    walks = sign.walks.from_given
    if walks.get(LOSS) is False or is_observed():
        return False
    with DisableTorchFunctionSubclass():
        family = sign.of_family()
        if family is not None and family.sized is not False:
            return _has_run_for_any_size(family, sign.sizes, node, retain_graph)
        tried = walks_for(walks, LOSS, node, bind_loss)
        for bound in tried:
            is_trusted = bound.trusted or is_right(
                bound, node, bound.start, partial(_distrust, node, sign)
            )
            if is_trusted and _has_run(bound, node, bound.start, retain_graph):
                bound.misses = 0
                return True
        most = _MOST_LENGTHS if sign.is_deep else 1
        have_missed(tried, walks, LOSS, node, bind_loss, most)
    return False


def _has_run_for_any_size(family: Family, sizes: Sizes, node: Node, retain_graph: bool) -> bool:
    """Run the walk from a loss by the one that its family has for any sizes; False if there
    is none for this graph. Recorded for these sizes, if the family has none for them yet."""
    start = start_of_loss(node)
    if start is None:
        family.sized = False
        return False
    if family.sized is None:
        family.sized = OfAnySize(OFTEN if has_many(family) else fast.after - 1)
    found = family.sized
    if found is False:  # another thread has found out
        return False
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
            note_bound(family)
        if has_many(family):  # as in `is_due`
            found.waits += 4 * found.recorded
    except (ChangedSince, RuntimeError):
        found.waits = PATIENCE
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
        walks = sign.walks.from_given

        def run(bound: _bound.BoundWalk) -> bool | None:
            is_trusted = bound.trusted or is_right(
                bound, target, grad, partial(walks.__setitem__, key, False)
            )
            return (is_trusted and _has_run(bound, target, grad, retain_graph)) or None

        write = partial(_bound.bind, grad=grad, varies=True)
        return first_that_fits(walks, key, target, write, run) is not None


def is_observed() -> bool:
    """Has each operation to run by itself, for anomaly mode or another mode of torch's?"""
    return torch.is_anomaly_enabled() or _torch.is_shown()


def _has_run(bound: _bound.BoundWalk, node: Node, grad: torch.Tensor, retain_graph: bool) -> bool:
    """Run it, and add what it finds to each leaf's `.grad`; False if the graph is another one."""
    with _torch.AutoDispatchBelowAutograd():  # spares torch a check at each call
        found = bound.run(node, grad, retain_graph, accumulate)
    if found is None:
        return False
    hand_over(bound, node, found, retain_graph)
    return True


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
        with (going := GraphTask([(node, 0)])):
            beyond.accumulate(to_torch, retain_graph, arrivals)
            going.call_back()


def _distrust(node: Node, sign: Signature) -> None:
    """Bind neither the walk from `node` nor parts of it."""
    sign.walks.decline()
    for other in dependencies([(node, 0)], expanding=False).order:
        if other.signature is not None:
            other.signature.walks.parts = False


def bind_loss(node: Node, kind: type[Writer] = Writer) -> _bound.BoundWalk:
    """The bound walk from a loss, written by a `kind` of writer. Raises as `bind` does."""
    start = start_of_loss(node)
    if start is None:
        raise Unbindable
    return _bound.bind(node, start, kind=kind)


def start_of_loss(node: Node) -> torch.Tensor | None:
    """The gradient that the walk from a loss starts with; None if it is no loss."""
    shape, dtype, device = node.outputs[0]
    is_loss = not len(shape) and dtype.is_floating_point
    return constant(1.0, dtype, device) if is_loss else None
