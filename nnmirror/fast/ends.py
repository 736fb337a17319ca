"""Bound walks to given ends: `nnmirror.grad` without `create_graph`, as straight-line Python.

Only the nodes on the way to the ends run, and each computes only the gradients that lead there: not
those of the weights, if an input's gradient is asked for.
"""

from collections.abc import Callable, Sequence

import torch

from .. import _torch, fast
from .. import tape as _tape
from .. import tensor as _tensor
from .. import walk as _walk
from .._upcalls import implements
from . import bound as _bound
from . import source
from .binding import ToEnds, has_missed, key_of, quietly, same_bits, walk_for
from .shorter import Unbindable

T = torch.Tensor


class WalkToEnds(ToEnds):
    """`run(n0, g, retain_graph, ends)`: the gradients for the `ends`; None if the graph is a
    different one."""

    def __init__(self, root: _tape.Node, ends: Sequence[_tape.Edge], grad: T) -> None:
        writer = _Writer(root, ends)
        writer.go_back(grad)
        self.source = writer.source()
        self.compiled = source.Compiled(self.source, "backward", "walk", writer.environment)
        self.run = self.compiled.function
        self.trusted = False
        self.first = root.sequence  # of the graph that it was recorded from


@implements(_walk)
def walk_to_ends(
    edges: Sequence[_tape.Edge],
    grads: Sequence[T],
    only: Sequence[_tape.Edge],
    retain_graph: bool,
    generic: Callable[[], list[T | None]],
) -> list[T | None] | None:
    """The gradients for `only` by a bound walk; None if the generic one has to run.

    `generic()` runs that, and keeps the graph.
    """
    if len(edges) != 1 or torch.is_anomaly_enabled() or _torch.is_shown():
        return None
    (node, _), grad = edges[0], grads[0]
    if not isinstance(node, _tape.Node) or len(node.outputs) != 1 or type(grad) is not T:
        return None
    sign, key = node.signature, key_of(grad, only)
    if sign is None or key is None:
        return None
    if sign.to_ends is None:
        sign.to_ends = {}
    found = walk_for(sign.to_ends, key, sign, lambda: WalkToEnds(node, only, grad))
    if found is None:
        return None
    if not found.trusted:
        if node.sequence == found.first and fast.after > 1:
            return None  # on the numbers that it was recorded with, a comparison proves less
        results = found.run(node, grad, True, only)
        if results is not None:
            with quietly():
                expected = generic()
            found.trusted = all(map(same_bits, results, expected))
            if not found.trusted:
                sign.to_ends[key] = False
                if fast.after == 1:
                    raise AssertionError(f"nnmirror: a bound walk has other bits:\n{found.source}")
                return None
    results = found.run(node, grad, retain_graph, only) if found.trusted else None
    if results is None:
        has_missed(sign.to_ends, key, sign, found)
        return None
    found.misses = 0
    return results  # type: ignore[no-any-return]


def _is_torchs(target: object) -> bool:
    return isinstance(target, T) and _tensor.is_torchs(target)


class _Writer(_bound.Writer):
    """Writes the source of the walk from `root` to the `ends`."""

    def __init__(self, root: _tape.Node, ends: Sequence[_tape.Edge]) -> None:
        self.ends = ends
        # The ids of the ends, of the nodes on the way to them, and of their layers.
        self.reaches = {id(target) for target, _ in ends}
        super().__init__(root)
        self.start_varies = True
        self.inside = {id(node) for node in self.order}
        self.found_at: dict[tuple[int, int], T] = {}

    def chosen(self, nodes: list[_tape.Node]) -> list[_tape.Node]:
        self.runs: set[int] = set()  # an end itself need not
        for node in reversed(nodes):
            if any(id(target) in self.reaches for target in node.targets):
                self.reaches.add(id(node))
                self.runs.add(id(node))
        if id(nodes[0]) not in self.runs:
            raise Unbindable
        # Deep in a loop, the signatures do not say whether another branch leads to an end; torch's
        # own graph might do so from anywhere; and a saved tensor of torch's may have new data:
        # `fetch` asks.
        sign = nodes[0].signature
        self.follows_all = (
            sign is None
            or sign.is_deep
            or any(node.theirs is not None or any(map(_is_torchs, node.targets)) for node in nodes)
        )
        return [node for node in nodes if self.follows_all or self.is_run(node)]

    def follows(self, target: _tape.Target) -> bool:
        return self.follows_all or id(target) in self.reaches

    def is_run(self, node: _tape.Node) -> bool:
        return id(node) in self.runs

    def go_back(self, grad: T) -> None:
        self.start = grad
        self.known[id(grad)] = "g"
        self.alive.append(grad)
        self.shared.add(_bound.memory_of(grad))
        for node in reversed(self.order):
            if any(id(target) in self.reaches for target in node.targets):
                self.reaches.add(id(node))
        wanted = {
            (id(self.last_layer(target)), index): (target, index) for target, index in self.ends
        }
        slots: dict[int, _bound.Slots] = {id(self.last_layer(self.whole[0])): [grad]}
        for node in self.order:
            given = slots.pop(id(node), None)
            if given is None:
                continue
            for i, g in enumerate(given):
                if (id(node), i) in wanted and g is not None:
                    target, index = wanted[id(node), i]
                    self.found_at[id(target), index] = g
            needs = tuple([id(target) in self.reaches for target in node.targets])
            if True not in needs:
                continue
            rule = node.function
            if not rule.is_rule or rule.reads_data or None in given:
                raise Unbindable
            self.lines.append(f"# {_tape.bare(node.name())}")
            results = self.inline(self.needing(node, needs), given)
            for edge, result in zip(node.edges, results, strict=True):
                if edge is None or id(edge[0]) not in self.reaches:
                    continue
                if result is None:
                    raise Unbindable
                target, index = edge
                to = self.last_layer(target)
                if id(to) in self.inside:
                    held = slots.setdefault(id(to), [None] * len(to.outputs))  # type: ignore[union-attr]
                    held[index] = self.added(held[index], result)
                else:
                    known = self.found_at.get((id(target), index))
                    self.found_at[id(target), index] = self.added(known, result)

    def last_layer(self, target: _tape.Target) -> _tape.Target:
        """The layer that gets the gradient of a segment."""
        layers = self.layers.get(id(target))
        return target if layers is None else layers[-1]

    def needing(self, node: _tape.Node, needs: tuple[bool, ...]) -> _tape.Node:
        """The node of a step that computes these gradients only."""
        asked = _tape.needing(node, needs)
        if asked is not node:
            self.alive.append(asked)
            self.saved_as[id(asked)] = self.saved_as[id(node)]
            if id(node) in self.names:
                self.names[id(asked)] = self.names[id(node)]
        return asked

    def source(self) -> str:
        for target, index in self.ends:
            if (id(target), index) not in self.found_at:
                raise Unbindable
        self.results = [(t, i, self.found_at[id(t), i]) for t, i in self.ends]
        lines = ["def backward(n0, g, retain_graph, ends):"]
        conditions: list[str] = []
        beyond: dict[int, str] = {}
        leaves = self.fetch(lines, conditions, beyond)
        free = self.fetch_saved(lines, conditions, leaves)
        lines.append(f"{''.join([f'(end{i}, index{i}), ' for i in range(len(self.ends))])}= ends")
        places = {**self.names, **leaves, **beyond}
        for i, (target, index) in enumerate(self.ends):
            conditions.append(f"end{i} is not {places[id(target)]} or index{i} != {index}")
        found = [self.known[id(grad)] for _, _, grad in self.results]
        lines += self.body(conditions, free, leaves)
        lines.append(f"return [{', '.join(found)}]")
        return "\n    ".join(lines) + "\n"
