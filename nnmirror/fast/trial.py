"""A bound walk is compared with the generic one before it is used."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch

from .. import fast
from ..bits import same_layout_and_bits
from ..node import Edge, Node
from ..walk import walk
from .bound import Bound, BoundWalk


def may_be_used(
    bound: Bound,
    node: Node,
    has_same_bits: Callable[[], bool | None],
    distrust: Callable[[], None],
) -> bool:
    """May a walk that is not trusted yet be used for the graph behind `node`, if it fits that?

    `has_same_bits()` runs it beside the generic walk; None if it does not fit this graph. If the
    bits differ, `distrust()` is called, so that it is never used.
    """
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
    bound: BoundWalk, node: Node, start: torch.Tensor, distrust: Callable[[], None]
) -> bool:
    """`may_be_used` for a walk to the leaves, that starts with the gradient `start`."""
    return may_be_used(bound, node, partial(_has_same_bits, bound, node, start), distrust)


def _has_same_bits(bound: BoundWalk, node: Node, start: torch.Tensor) -> bool | None:
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
