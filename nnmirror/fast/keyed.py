"""Bound walks of which one signature has several: by the layout of the given gradient, and by what
they go to."""

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
    waiting,
)
from .shorter import Unbindable
from .signature import Signature, Unsigned, of_tensor
from .trial import quietly
from .writer import ChangedSince

_MOST_TO_ENDS = 64
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
        return of_tensor(grad), exact.is_exact(), *[_kind_of(target) for target, _ in ends]
    except Unsigned:
        return None


def _kind_of(target: Target) -> object:
    if isinstance(target, Node):
        return None if target.signature is None else target.signature.own_serial
    if isinstance(target, _tensor.Tensor):
        return None if target._signature is None else target._signature.serial
    return of_tensor(target)


def first_that_fits(
    walks: Walks[W], key: object, node: Node, write: Callable[[], W], run: Callable[[W], R | None]
) -> R | None:
    """What `run` returns for the first of the walks for `key` that fits the graph behind `node`;
    None if it does for none. `write()` makes a walk for this graph, if the key has occurred a few
    times."""
    sign = node.signature
    assert sign is not None
    tried = _walks_for(walks, key, sign, write)
    for bound in tried:
        found = run(bound)
        if found is not None:
            bound.misses = 0
            return found
    # One that was recorded from this very graph waits for another to be compared on.
    if all([bound.trusted or bound.first != node.sequence for bound in tried]):
        _have_missed(walks, key, sign, write)
    return None


def _walks_for(
    walks: Walks[W], key: object, sign: Signature, write: Callable[[], W]
) -> Sequence[W]:
    """The walks for `key`; the first is written when it has occurred a few times."""
    found = walks.get(key, 0)
    if found is False:
        return ()
    if not isinstance(found, int):
        return found.walks
    if key not in walks and len(walks) >= _MOST_TO_ENDS:
        walks.pop(next(iter(walks)), None)
    walks[key] = found + 1
    if not is_due(sign, found + 1):
        return ()
    written = _written(sign, write)
    if written is None:
        walks[key] = waiting(sign)
        return ()
    if written is False:
        walks[key] = waiting(sign) if may_bind_another(sign) else False
        return ()
    candidates = walks[key] = Candidates(written)
    return candidates.walks if fast.after == 1 else ()


def _written(sign: Signature, write: Callable[[], W]) -> W | Literal[False] | None:
    """A walk; False if it cannot be bound, None if it cannot be now."""
    try:
        with quietly():
            written = write()
    except ChangedSince:
        return None
    except (Unbindable, RuntimeError, NotImplementedError):  # an error comes in its node's turn
        return False
    note_bound(sign)
    return written


def _have_missed(walks: Walks[W], key: object, sign: Signature, write: Callable[[], W]) -> None:
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
        may_bind = candidates.misses >= fast.after
    else:
        rarest = max(candidates.walks, key=lambda bound: bound.misses)
        may_bind = rarest.misses >= PATIENCE << sign.walks.rebound and may_bind_another(sign)
    if not may_bind:
        return
    written = _written(sign, write)
    candidates.misses = 0 if written else -PATIENCE << sign.walks.rebound
    if rarest is not None or not written:
        sign.walks.rebound = min(sign.walks.rebound + 1, MOST_BOUND)
    if written:
        candidates.walks = [written, *[bound for bound in candidates.walks if bound is not rarest]]
