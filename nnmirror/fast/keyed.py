"""The bound walks of one signature: by the layout of the given gradient, and by what they go to.

Of each there may be several, for graphs that differ by something that the signature does not say,
such as the length of a loop.
"""

from collections.abc import Callable, Sequence
from typing import Generic, Literal, TypeAlias, TypeVar

import torch

from .. import fast
from .. import tensor as _tensor
from ..exact import mode as exact
from ..node import Edge, Node, Target
from .bound import Bound
from .due import (
    MOST_BOUND,
    PATIENCE,
    is_due,
    may_bind_another,
    note_bound,
    note_calls,
    waiting,
)
from .shorter import Unbindable
from .signature import Signature, Unsigned, of_tensor
from .trial import quietly
from .writer import ChangedSince

_MOST_KEYS = 64
_MOST_CANDIDATES = 4

W = TypeVar("W", bound=Bound)
R = TypeVar("R")


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
        return of_tensor(grad), exact.is_exact(), *[_end_key(target) for target, _ in ends]
    except Unsigned:
        return None


def _end_key(target: Target) -> object:
    if isinstance(target, Node):
        return None if target.signature is None else target.signature.own_serial
    if isinstance(target, _tensor.Tensor):
        return None if target._signature is None else target._signature.serial
    return of_tensor(target)


def first_that_fits(
    walks: Walks[W],
    key: object,
    node: Node,
    write: Callable[[Node], W],
    run: Callable[[W], R | None],
) -> R | None:
    """What `run` returns for the first of the walks for `key` that fits the graph behind `node`;
    None if it does for none."""
    tried = walks_for(walks, key, node, write)
    for bound in tried:
        found = run(bound)
        if found is not None:
            bound.misses = 0
            return found
    have_missed(tried, walks, key, node, write)
    return None


def walks_for(walks: Walks[W], key: object, node: Node, write: Callable[[Node], W]) -> Sequence[W]:
    """The walks for `key`; `write(node)` makes the first when it has occurred a few times."""
    sign = _signature_of(node)
    found = walks.get(key, 0)
    if found is False:
        return ()
    if not isinstance(found, int):
        if sign.is_deep:
            _note_calls(walks, sign, node)
        return found.walks
    _note_calls(walks, sign, node)
    if key not in walks and len(walks) >= _MOST_KEYS:
        walks.pop(next(iter(walks)), None)
    walks[key] = found + 1
    if not is_due(sign, found + 1):
        return ()
    written = _written(node, write)
    if written is None or (written is False and may_bind_another(sign)):
        walks[key] = waiting(sign)
        return ()
    if written is False:
        walks[key] = False
        return ()
    candidates = walks[key] = Candidates(written)
    return candidates.walks if fast.after == 1 else ()


def _note_calls(walks: Walks[W], sign: Signature, node: Node) -> None:
    if walks is sign.walks.from_given:  # of others, a long one is bound as a whole at any time
        note_calls(sign, node)


def _written(node: Node, write: Callable[[Node], W]) -> W | Literal[False] | None:
    """A walk; False if it cannot be bound, None if it cannot be now."""
    try:
        with quietly():
            written = write(node)
    except (ChangedSince, RuntimeError):  # an error comes when its node's turn does
        return None
    except Unbindable:
        return False
    note_bound(_signature_of(node))
    return written


def have_missed(
    tried: Sequence[W],
    walks: Walks[W],
    key: object,
    node: Node,
    write: Callable[[Node], W],
    most: int = _MOST_CANDIDATES,
) -> None:
    """None of those that were `tried` fits. If that goes on, another is bound: soon while they are
    fewer than `most`, as short loops have one for each length, and an output may be differentiated
    for each of several inputs in turn. One that is not trusted yet gives way, as its graph may not
    come again.
    """
    candidates, sign = walks.get(key), _signature_of(node)
    if not isinstance(candidates, Candidates):
        return
    if any([not bound.trusted and bound.first == node.sequence for bound in tried]):
        return  # recorded from this very graph: it waits for another to be compared on
    candidates.misses += 1
    for bound in candidates.walks:
        bound.misses += 1
    latest, times = candidates.walks[0], sign.walks.rebound
    has_room = latest.trusted and len(candidates.walks) < most
    if has_room:
        patience = fast.after
    else:
        is_only = len(candidates.walks) == 1 and not latest.trusted
        patience = (fast.after if is_only else PATIENCE) << times
    if candidates.misses < patience or times >= MOST_BOUND:
        return
    if latest.trusted and not (has_room or sign.is_deep):
        return
    written = _written(node, write)
    candidates.misses = 0 if written else -PATIENCE << times
    if not (written and has_room):
        sign.walks.rebound += 1
    if written:
        known = [bound for bound in candidates.walks if bound.trusted]
        if len(known) >= most:
            known.remove(max(known, key=lambda bound: bound.misses))
        candidates.walks = [written, *known]


def _signature_of(node: Node) -> Signature:
    assert node.signature is not None
    return node.signature
