"""Bound walks: a walk is recorded once, and run from then on as straight-line Python.

`bind` has a `Writer` (writer.py) record the walk and write it as a function, which is in
`linecache`, so that a debugger steps through it and a traceback shows it. It holds no tensor except
constants, so it may run in several threads at the same time, and keeps no model alive.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .. import tensor as _tensor
from ..node import Edge, Node, Target
from ..running import GraphTask
from ..walk import Slots
from . import source
from .shorter import Unbindable
from .writer import ChangedSince, Writer, step

# Nodes: a longer walk is bound in parts, unless as many calls have come in so many steps in turn.
_LONG, _STEADY = 128, 4
_MOST_BYTES = 1 << 24  # of the leaves of a long walk that is bound as a whole

# A leaf, its gradient, and whether that may become its `.grad` (see `Writer.is_own`). The leaf is
# a tensor; one of the mirror's where the last is `True`. Where torch's engine adds the gradients of
# a leaf, each call's gradient comes by itself, and the last is the number of the call.
Found: TypeAlias = tuple[Any, torch.Tensor, bool | str | tuple[int]]
# Receives a gradient, and where it goes.
_Receiver: TypeAlias = Callable[[Target, int, torch.Tensor], None]
# Where the gradients go that leave a bound part, and these, the last first.
Left: TypeAlias = tuple[Sequence[Edge], list[torch.Tensor]]


class Bound:
    """A bound walk, a part of one, or a replay: the function `run`."""

    kind = "walk"  # in the name of its file

    def __init__(self, text: str, environment: source.Environment, root: Node) -> None:
        self.trusted = False  # it was compared with the generic walk
        self.misses = 0  # how often in turn it did not fit
        self.first = root.sequence  # of the graph that it was recorded from
        self.compiled = source.Compiled(text, "backward", self.kind, environment)
        self.source = text
        self.run = self.compiled.function
        leaf = None if root.signature is None else root.signature.leaf()
        if leaf is not None:
            constants = [c for c in environment.values() if isinstance(c, torch.Tensor)]
            leaf.constants += sum([c.untyped_storage().nbytes() for c in constants])


class BoundWalk(Bound):
    """The bound walk from a loss, or from a result with a given gradient:
    `run(node, g, retain_graph, give)`.

    Returns (leaf, its gradient, whether nothing else refers to that) for each leaf in the order of
    the generic walk; None if the graph is not like the one that was bound. Large gradients are
    instead passed to `give(leaf, gradient, ...)` as soon as they are computed.
    """

    start: torch.Tensor  # the gradient that it starts with, if that is always the same

    def __init__(
        self,
        writer: Writer,
        root: Node,
        text: str | None = None,
        environment: source.Environment | None = None,
    ) -> None:
        if text is None or environment is None:
            text, environment = writer.source(), writer.environment
        super().__init__(text, environment, root)
        if not writer.start_varies:
            self.start = writer.start
        # Some of the leaves are torch's own tensors.
        self.meets_torch = any(_tensor.is_torchs(leaf) for leaf, _ in writer.arrivals.values())


class BoundPart(Bound):
    """A bound part of the walk from one node: `run(node, g, retain_graph, floor, more)`.

    It consists of the nodes that the generic walk would run next and whose gradients all come from
    within the part, or have arrived already. If some have, as for two heads on one trunk, it has
    several entries: `more` has the further ones, each with the gradients that have arrived.
    `floor` is the sequence number of the latest other node that is waiting. Returns the targets of
    the gradients (leaves and other nodes) and the gradients, the last first; None if the graph is
    not like the one that was bound.
    """

    def __init__(self, writer: Writer, root: Node) -> None:
        super().__init__(writer.source(), writer.environment, root)
        self.more = len(writer.entries) - 1
        self.length = len(writer.whole)  # in nodes
        self.loop_steps = writer.loop_steps

    def walk(
        self,
        node: Node,
        grad: torch.Tensor,
        retain_graph: bool,
        progress: GraphTask,
        trying: bool = False,
    ) -> Left | None:
        """Call `run` where a generic walk has reached `node`; if `trying`, the walk then runs it
        too."""
        ready = progress.ready
        if len(ready) < self.more:
            return None
        taken = [heapq.heappop(ready) for _ in range(self.more)]
        more = [(entry, progress.arrived[id(entry)]) for _, entry in taken]
        found = self.run(node, grad, retain_graph, -ready[0][0] if ready else -1, more)
        for waiting in taken:
            if found is None or trying:
                heapq.heappush(ready, waiting)
            else:
                del progress.arrived[id(waiting[1])]
        return found


def bind_part(
    root: Node, grad: torch.Tensor, progress: GraphTask, is_short: bool
) -> BoundPart | None:
    """The bound part from `root`; None if it cannot be bound.

    In a loop, of a few steps, or of one if it is to be short. Raises ChangedSince if it cannot be
    now.
    """
    try:
        writer = Writer(root, progress, is_short)
        if not writer.order:
            return None
        writer.go_back(grad)
        part = BoundPart(writer, root)
        writer.put_off()
        return part
    except Unbindable:
        return None


def by_steps(
    part: BoundPart,
    root: Node,
    grad: torch.Tensor,
    progress: GraphTask,
    give: _Receiver,
) -> None:
    """Run the nodes of the part one by one, and call `give` with each gradient that leaves it."""
    _PartByNodes(root, progress, part.length, give).go_back(grad)


def bind(
    root: Node, grad: torch.Tensor, varies: bool = False, kind: type[Writer] = Writer
) -> BoundWalk:
    """The bound walk from `root` with the gradient `grad`, or, if that `varies`, with any of this
    layout.

    Raises Unbindable if it cannot be bound, and ChangedSince if it cannot be now.
    """
    writer = kind(root)
    if len(writer.order) > _LONG:
        if _bytes_of_leaves(writer.order) > _MOST_BYTES:
            raise Unbindable  # to record it, all gradients are held
        if root.signature.walks.steady < _STEADY:  # type: ignore[union-attr]
            raise ChangedSince  # perhaps it has another length in each step
    writer.start_varies = varies
    writer.go_back(grad)
    made = BoundWalk(writer, root)
    writer.put_off()
    return made


def _bytes_of_leaves(nodes: Sequence[Node]) -> int:
    targets = {id(target): target for node in nodes for target in node.targets}
    return sum(t.nbytes for t in targets.values() if isinstance(t, torch.Tensor))


class _PartByNodes(Writer):
    """Walks a part as a writer does, but writes nothing and keeps no gradient."""

    def __init__(self, root: Node, progress: GraphTask, length: int, give: _Receiver) -> None:
        self.length = length
        super().__init__(root, progress)
        self.give = give

    def leave(self, target: Target, index: int, grad: torch.Tensor) -> None:
        self.give(target, index, grad)

    def inline(self, node: Node, slots: Slots) -> Slots:
        return step(node, slots)

    step = inline

    def added(self, held: torch.Tensor | None, grad: torch.Tensor) -> torch.Tensor:
        return grad if held is None else held + grad
