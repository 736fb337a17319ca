"""Bound walks to given ends: `nnmirror.grad` without `create_graph`, as straight-line Python.

Only the nodes on the way to the ends run, and each computes only the gradients that lead there: not
those of the weights, if an input's gradient is asked for. Where torch's own graph passes a gradient
on to an end, its engine continues from there.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from .. import beyond
from .. import tape as _tape
from .. import tensor as _tensor
from .. import walk as _walk
from .._upcalls import implements
from ..bits import same_layout_and_bits
from ..node import Edge, Node, Target
from ..running import GraphTask
from ..tensor import bare
from . import writer as _writer
from .binding import is_observed
from .bound import Bound
from .keyed import first_that_fits, key_of
from .roots import start_of
from .shorter import Unbindable, memory_of
from .trial import may_be_used

T = torch.Tensor


class WalkToEnds(Bound):
    """`run(n0, g, retain_graph, ends)`: the gradients for the `ends`, and those of torch's tensors
    from which torch's engine continues; None if the graph is a different one."""

    def __init__(self, root: Node, ends: Sequence[Edge], grad: T) -> None:
        writer = EndsWriter(root, ends)
        writer.go_back(grad)
        super().__init__(writer.source(), writer.environment, root)


@implements(_walk)
def walk_to_ends(
    edges: Sequence[Edge],
    grads: Sequence[T],
    only: Sequence[Edge],
    retain_graph: bool,
    generic: Callable[..., list[T | None]],
) -> list[T | None] | None:
    """The gradients for `only` by a bound walk; None if the generic one has to run.

    `generic(give=...)` runs that (see `walk`), and keeps the graph.
    """
    start = None if is_observed() else start_of(edges, grads)
    if start is None:
        return None
    node, grad = start
    sign, key = node.signature, key_of(grad, only)
    if sign is None or key is None:
        return None
    walks = sign.walks.to_ends

    def run(bound: WalkToEnds) -> tuple[list[T | None], Sequence[tuple[T, T]]] | None:
        is_trusted = bound.trusted or may_be_used(
            bound,
            node,
            functools.partial(_has_same_bits, bound, node, grad, only, generic),
            functools.partial(walks.__setitem__, key, False),
        )
        return bound.run(node, grad, retain_graph, only) if is_trusted else None

    write = functools.partial(WalkToEnds, ends=only, grad=grad)
    found = first_that_fits(walks, key, node, write, run)
    if found is None:
        return None
    grads_of_ends, to_torch = found
    if not to_torch:
        return grads_of_ends
    arrived: dict[tuple[int, int], T | None] = {**_by_slot(only, grads_of_ends)}
    with (going := GraphTask(edges)):
        theirs = _walk.theirs_among(only)
        _walk.through_torch(arrived, to_torch, theirs, retain_graph)
        going.call_back()
    return [arrived.get((id(target), index)) for target, index in only]


def _has_same_bits(
    walk: WalkToEnds,
    node: Node,
    grad: T,
    only: Sequence[Edge],
    generic: Callable[..., list[T | None]],
) -> bool | None:
    """Has the walk the bits of the generic one? None if it does not fit."""
    run = walk.run(node, grad, True, only)
    if run is None:
        return None
    given: dict[tuple[int, int], T | None] = {}
    more = generic(give=lambda leaf, g: given.setdefault((id(leaf), 0), g))
    expected = _by_slot(only, more) | {k: g for k, g in given.items() if g is not None}
    results = _by_slot(only, *run)
    return results.keys() == expected.keys() and all(
        same_layout_and_bits(result, expected[slot]) for slot, result in results.items()
    )


def _by_slot(
    ends: Sequence[Edge], grads: Sequence[T | None], to_torch: Sequence[tuple[T, T]] = ()
) -> dict[tuple[int, int], T]:
    """The gradients that arrive, by their slots."""
    found = {(id(t), n): g for (t, n), g in zip(ends, grads, strict=True) if g is not None}
    return found | {(id(tensor), 0): g for tensor, g in to_torch}


class WriterToEnds(_writer.Writer):
    """Writes the source of a walk from `root` to the `ends`."""

    declines = staticmethod(beyond.is_unusual)

    def __init__(self, root: Node, ends: Sequence[Edge]) -> None:
        self.ends = ends
        # The ids of the ends, of the nodes on the way to them, and of their layers.
        self.reaches = {id(target) for target, _ in ends}
        super().__init__(root)
        self.start_varies = True
        self.found_at: dict[tuple[int, int], T] = {}

    def go_back(self, grad: T) -> None:
        """Walk from the root, as far as it leads to an end, and write the torch calls."""
        self.start = grad
        self.known[id(grad)] = "g"
        self.alive.append(grad)
        self.shared.add(memory_of(grad))
        self.reaches = _walk.way_to(self.reaches, self.order)  # with the layers of segments
        inside = {id(node) for node in self.order}
        wanted = {
            (id(self.last_layer(target)), index): (id(target), index) for target, index in self.ends
        }
        slots: dict[int, _writer.Slots] = {id(self.last_layer(self.whole[0])): [grad]}
        for node in self.order:
            given = slots.pop(id(node), None)
            if given is None:
                continue
            for i, g in enumerate(given):
                if g is not None and (id(node), i) in wanted:
                    self.found_at[wanted[id(node), i]] = g
            needs = tuple([id(target) in self.reaches for target in node.targets])
            if True not in needs:
                continue
            if not self.is_straight(node):
                raise Unbindable
            self.lines.append(f"# {bare(node.name())}")
            results = self.run_for(node, given, needs)
            for edge, needed, result in zip(node.edges, needs, results, strict=True):
                if edge is None or not needed or result is None:
                    continue
                target, index = edge
                to = self.last_layer(target)
                if isinstance(to, Node) and id(to) in inside:
                    held = slots.setdefault(id(to), [None] * len(to.outputs))
                    held[index] = self.added(held[index], result)
                else:
                    known = self.found_at.get((id(target), index))
                    self.found_at[id(target), index] = self.added(known, result)

    def run_for(self, node: Node, given: _writer.Slots, needs: tuple[bool, ...]) -> _writer.Slots:
        """Run the step of `node` for the gradients of these arguments, and write its calls."""
        raise NotImplementedError

    def last_layer(self, target: Target) -> Target:
        """The layer that gets the gradient of a segment."""
        layers = self.layers.get(id(target))
        return target if layers is None else layers[-1]


class EndsWriter(WriterToEnds):
    """Writes a walk that computes the gradients on the way to the ends, and no others."""

    def chosen(self, nodes: list[Node]) -> list[Node]:
        targets: dict[int, T] = {
            id(t): t for node in nodes for t in node.targets if _tensor.is_torchs(t)
        }
        passing = beyond.passing([*targets.values()], self.ends)
        # Torch's tensors from which its engine continues.
        self.passed = {
            id(t): t for t, passes in zip(targets.values(), passing, strict=True) if passes
        }
        self.reaches = _walk.way_to(self.reaches | self.passed.keys(), nodes)
        # An end itself need not run.
        self.runs = {id(n) for n in nodes if any(id(t) in self.reaches for t in n.targets)}
        if id(nodes[0]) not in self.runs:
            raise Unbindable
        # Deep in a loop, the signatures do not say whether another branch leads to an end; torch's
        # own graph might do so from anywhere; and a saved tensor of torch's may have new data:
        # `fetch` asks.
        sign = nodes[0].signature
        met = {id(t) for node in nodes for t in node.targets} | {id(node) for node in nodes}
        # Two results of one signature may be one tensor in the next graph.
        on_the_way = {node.signature for node in nodes if id(node) in self.reaches}
        self.follows_all = (
            sign is None
            or sign.is_deep
            or not all(id(target) in met for target, _ in self.ends)
            or any(n.signature in on_the_way for n in nodes if id(n) not in self.reaches)
            or bool(targets)
            or any(node.theirs is not None for node in nodes)
        )
        return [node for node in nodes if self.follows_all or self.is_run(node)]

    def follows(self, target: Target) -> bool:
        return self.follows_all or id(target) in self.reaches

    def is_run(self, node: Node) -> bool:
        return id(node) in self.runs

    def run_for(self, node: Node, given: _writer.Slots, needs: tuple[bool, ...]) -> _writer.Slots:
        return self.inline(self.needing(node, needs), given)

    def needing(self, node: Node, needs: tuple[bool, ...]) -> Node:
        """The node of a step that computes these gradients only."""
        asked = _tape.needing(node, needs)
        if asked is not node:
            self.alive.append(asked)
            self.saved_as[id(asked)] = self.saved_as[id(node)]
            if id(node) in self.names:
                self.names[id(asked)] = self.names[id(node)]
        return asked

    def source(self) -> str:
        # Where torch's engine continues, it also tells what has arrived.
        slots: list[Edge] = [edge for edge in self.ends if not self.is_left_to_torch(*edge)]
        slots += [(tensor, 0) for tensor in self.passed.values()]
        self.results = [
            (t, i, self.found_at[id(t), i]) for t, i in slots if (id(t), i) in self.found_at
        ]
        lines = ["def backward(n0, g, retain_graph, ends):"]
        conditions: list[str] = []
        outside: dict[int, str] = {}
        leaves = self.fetch(lines, conditions, outside)
        self.ask_what_passes(leaves, self.passed, conditions)
        free = self.fetch_saved(lines, conditions, leaves)
        lines.append(f"{''.join([f'(end{i}, index{i}), ' for i in range(len(self.ends))])}= ends")
        places = {**self.names, **leaves, **outside}
        for i, (target, index) in enumerate(self.ends):
            if id(target) in places:
                conditions.append(f"end{i} is not {places[id(target)]} or index{i} != {index}")
            elif self.is_left_to_torch(target, index):
                conditions += [f"end{i} is {to}" for to in leaves.values() if to.startswith("v")]
            elif not self.follows_all:
                raise Unbindable
            else:  # nothing leads there
                conditions += [f"end{i} is {place}" for place in places.values()]
        lines += self.body(conditions, free, leaves)
        words = {(id(t), i): self.known[id(grad)] for t, i, grad in self.results}
        found = [
            "None" if self.is_left_to_torch(t, i) else words.get((id(t), i), "None")
            for t, i in self.ends
        ]
        passed = [f"({leaves[key]}, {words[key, 0]})," for key in self.passed]
        lines.append(f"return [{', '.join(found)}], ({' '.join(passed)})")
        return "\n    ".join(lines) + "\n"

    def is_left_to_torch(self, end: Target, index: int) -> bool:
        """Does torch's engine give the gradient of this end? It does if it continues from there, or
        if only torch's graph leads there."""
        if id(end) in self.passed:
            return True
        return (
            bool(self.passed) and (id(end), index) not in self.found_at and _tensor.is_torchs(end)
        )
