"""When a walk is bound, and when another one in place of one that does not fit."""

from .. import fast
from ..node import Node
from .bound import Bound
from .signature import MANY_WALKS, Signature

PATIENCE = 16  # misses, or walks, before another try; twice as many after each
MOST_BOUND = 8  # of one signature, one after another
OFTEN = 12  # after MANY_WALKS, one is bound when it has come so often


def note_calls(sign: Signature, node: Node) -> None:
    """Count how often in turn as many calls were recorded between two walks."""
    walks = sign.walks
    between = node.sequence - walks.walked
    walks.steady = walks.steady + 1 if between == walks.between else 0
    walks.between, walks.walked = between, node.sequence


def is_due(sign: Signature, times: int) -> bool:
    """Has a walk from `sign` occurred so often that it is bound?

    To bind it takes as long as some ten walks. Where shapes depend on the data, so that hundreds of
    different graphs start from one leaf, most of them are too rare to gain by it.
    """
    if times < fast.after or fast.after == 1:
        return times >= fast.after
    return times >= OFTEN or not has_many(sign)


def has_many(sign: Signature) -> bool:
    """Were many walks bound already that began behind the same leaf?"""
    leaf = sign.leaf()
    return leaf is not None and leaf.walks_bound >= MANY_WALKS and fast.after > 1


def note_bound(sign: Signature) -> None:
    leaf = sign.leaf()
    if leaf is not None:
        leaf.walks_bound += 1


def may_bind_another(sign: Signature) -> bool:
    """Is it worth trying another graph with the same last call?"""
    return sign.is_deep and sign.walks.rebound < MOST_BOUND


def waiting(sign: Signature) -> int:
    """From where to count until binding is tried again: each time from twice as far."""
    waits = -PATIENCE << sign.walks.rebound
    sign.walks.rebound = min(sign.walks.rebound + 1, MOST_BOUND)
    return waits


def is_out_of_date(bound: Bound, sign: Signature) -> bool:
    """Has it not fitted so often in turn that another is to be bound? Each time twice as often: a
    number that differs each time, such as one of a schedule, becomes an operand after a while."""
    patience = PATIENCE if bound.trusted else fast.after
    return sign.walks.rebound < MOST_BOUND and bound.misses >= patience << sign.walks.rebound
