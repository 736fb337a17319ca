"""Writes the source of a bound walk.

A `Writer` runs the nodes of a graph in the order of the generic walk, under a `TorchFunctionMode`
that records each torch call. The recorded calls become the source of a function. The function gets
the last node, follows the edges to the others, and reads the saved tensors from them.

A node whose backward depends on the numbers in a tensor becomes one call of the generic step. A
user's Function is left to the generic walk; what lies before and behind it is bound in parts.

The function first checks that the graph is like the one that was recorded: the same nodes connected
in the same way, no saved tensor changed or freed, no hook, and no parameter replaced since its use.
If not, it returns None, and the generic walk runs.
"""

import heapq
import itertools
import re
from collections.abc import Container, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from .. import beyond
from .. import tape as _tape
from .. import tensor as _tensor
from .. import walk as _walk
from .._types import Args, Kwargs, TorchFunction
from ..node import EXPOSED, HOOKED, NO_FURTHER, RECORDED, TAPPED, Node, NodeState, Target
from ..running import GraphTask, dependencies
from ..tensor import bare
from ..walk import Slots
from . import source
from .memory import Memory, is_alike, twin
from .shorter import (
    LARGE,
    WORDS,
    Given,
    TorchCall,
    Unbindable,
    cheaper,
    memory_of,
    shorter,
    size_of,
    without_repeated,
)
from .signature import MASKS, of_tensor

# At most, calls: the source of more takes seconds to compile. A grouped convolution in float64 has
# some for each group of each image.
_MOST_CALLS = 8000
_MOST = 32  # nodes of a part: short parts recur in graphs of any length
# With more inputs, a node is in no part: it joins the losses of an episode, and the next episode
# has another length.
_WIDE = 8
# Bytes: memory of this size or more is not kept from one walk to the next. Smaller memory is: what
# the C library gives back to the system costs a page fault for each 4 KB when it is used again,
# which for a megabyte takes as long as ten operations on it.
_TOO_LARGE = 1 << 20
_TAKEN = {
    "backward",
    "e",
    "g",
    "give",
    "give_back",
    "has_changed",
    "is_unusual",
    "memory",
    "more",
    "of",
    "passed",
    "passing",
    "slots",
    "retain_graph",
    "EXPOSED",
    "HOOKED",
    "RECORDED",
    "TAPPED",
    "step",
    "take",
}  # names in the source

# Functions of a tensor that depend on its layout only.
_QUESTIONS = {
    "dim",
    "element_size",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "nelement",
    "numel",
    "size",
    "storage_offset",
    "stride",
    "__len__",
    "_is_view",
    "is_inference",
    "is_set_to",
}
_ANSWERS = (bool, int, str, torch.Size, torch.dtype, torch.device, torch.layout, type(None))
_ALIKE = {"add", "bmm", "div", "mm", "mul", "sub"}  # as functions and as methods
_LITERALS = (bool, int, float, str, type(None))


class ChangedSince(Exception):
    """The graph has changed since it was recorded."""


class Notes(TorchFunctionMode):
    """Records the torch calls within it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[TorchFunction, Args, Kwargs, Any]] = []
        self.reads_data = False

    def __torch_function__(
        self, func: TorchFunction, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if kwargs.get("out", ...) is None:
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        name = getattr(func, "__name__", "")
        if any(True for _ in _tape.tensors_in(out)):
            if not (func is torch.Tensor.contiguous and out is args[0]):
                self.calls.append((func, args, kwargs, out))
        elif name == "__get__":
            self.reads_data = self.reads_data or not isinstance(out, _ANSWERS)
        elif name not in _QUESTIONS:
            self.reads_data = True
        return out


class Writer:
    """Writes the source of the walk from `root`.

    In it n0, n1 ... are the nodes in the order of the walk, s0, s1 ... their saved tensors, w0, w1
    ... the leaves, t0, t1 ... computed tensors.
    """

    takes_taps = False  # see tapped.py
    # Of a node and torch's tensor that it leads to: when the walk cannot be used.
    declines: TorchFunction = staticmethod(beyond.has_changed)
    length: int | None = None  # of the part, in nodes, if that is given
    most_nodes = 1024  # longer walks from a loss are bound in parts

    def __init__(
        self, root: Node, progress: GraphTask | None = None, is_short: bool = False
    ) -> None:
        self.is_part, self.is_short = progress is not None, is_short
        self.start_varies = self.is_part  # the gradient that it starts with
        self.loop_steps = 1
        self.entries = [root]
        self.come: list[torch.Tensor] = []  # the gradients of the further entries of a part
        if progress is None:
            self.whole = dependencies([(root, 0)], expanding=False).order
            self.whole.sort(key=lambda node: -node.sequence)
            self.whole = self.chosen(self.whole)
        else:
            self.whole = self.part(root, progress)
        for node in self.whole:
            if node.node_state is HOOKED or node.signature is None:
                raise ChangedSince
            if node.taps and not self.takes_taps:
                raise ChangedSince
            if not node.function.is_rule:
                raise Unbindable  # a user's backward may return None, or keep what it was given
            if not self.is_part and node.indices and NO_FURTHER in node.indices:
                raise Unbindable
        self.begin()
        if len(self.order) > self.most_nodes:
            raise Unbindable

    def chosen(self, nodes: list[Node]) -> list[Node]:
        """Which of them run."""
        return nodes

    def follows(self, target: Target) -> bool:
        """Is this gradient of a node computed, if it needs one?"""
        return True

    def is_run(self, node: Node) -> bool:
        """Is its step run?"""
        return True

    def is_straight(self, node: Node) -> bool:
        """Does its step consist of the same calls each time, on tensors that have a memory?"""
        saved = [t for t in node._saved or () if t is not None]
        if node.function.dynamic_grad_shape and any(t.dtype in MASKS for t in saved):
            return False
        return all(t.layout is torch.strided for t in saved)

    def begin(self) -> None:
        """Name the nodes of `whole`."""
        self.names = {id(node): f"n{i}" for i, node in enumerate(self.whole)}
        self.named: set[int] = set()  # the layers of segments
        # The node of a segment is replaced by those of its layers.
        self.layers: dict[int, list[Node]] = {}
        self.saved_as: dict[int, str] = {}  # where the source finds the saved tensors of a node
        self.order: list[Node] = []
        for node in self.whole:
            saved = f"s{self.names[id(node)][1:]}"
            if node.segment is None:
                self.saved_as[id(node)] = saved
                self.order.append(node)
                continue
            layers = self.layers[id(node)] = node.segment.nodes(node)
            for k, layer in enumerate(layers):
                self.saved_as[id(layer)] = f"{saved}[{k}]"
                self.named.add(id(layer))
            self.order += reversed(layers)
        self.environment: source.Environment = {}
        self.constants: dict[int, str] = {}
        self.serials: dict[int, str] = {}
        self.lines: list[Line] = []
        self.known: dict[int, str] = {}  # the names of the tensors that the walk has made
        self.alive: list[object] = []  # so that no id is reused
        self.shared: set[int] = set()  # memory that is referred to elsewhere
        self.handed_on: set[int] = set()  # memory passed to or returned by generic steps
        # Leaves and their gradients.
        self.arrivals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.given: set[int] = set()  # leaves whose gradient is passed on before the end
        # Does torch's engine add gradients to those of its own tensors? Then which call each of
        # these came from, by a key of its own.
        torchs = [t for node in self.whole for t in node.targets if _tensor.is_torchs(t)]
        self.shares = beyond.is_shared(torchs)
        self.came_from: dict[int, Node] = {}
        self.freed: set[int] = set()  # nodes that are freed during the walk
        # Of a part: each gradient that leaves it, and where it goes.
        self.results: list[tuple[Target, int, torch.Tensor]] = []
        # A large result is computed into the memory of the first argument, by this method.
        self.changing: dict[str, TorchFunction | None] = {}
        self.twice: list[str] = []  # conditions: one node has the same tensor in two places
        self.first_place: dict[object, str] = {}  # where each saved tensor was found first
        self.same: dict[str, str] = {}  # for a second place: the first one
        self.temporaries = itertools.count()
        self.used: set[str] = set()  # the names that are used elsewhere than in calls of torch

    def part(self, root: Node, progress: GraphTask) -> list[Node]:
        """The nodes that the generic walk would run from `root` on, in its order.

        As far as their gradients come from one another or have arrived; with waiting nodes among
        them, as far as all are connected. In a loop, as many whole steps as fit; if it is to be
        short, one.
        """
        found: list[Node] = []
        steps: list[int] = []  # where the next one begins
        counts, arrived = progress.ahead(root), progress.arrived
        reached: dict[int, int] = {}
        waiting = [(-root.sequence, root), *progress.ready]
        entries = {id(node) for _, node in waiting}
        heapq.heapify(waiting)
        size = 0
        while waiting:
            node = heapq.heappop(waiting)[1]
            is_complete = reached.get(id(node), 0) == counts[id(node)]
            if not is_complete or node.node_state is HOOKED or node.signature is None:
                break
            if id(node) in entries and node is not root:
                come = arrived[id(node)]
                if len(come) != 1 or come[0] is None:
                    break
            if node.attributes is not None:  # a user's Function
                break
            if len(node.targets) > _WIDE or any(map(_tensor.is_torchs, node.targets)):
                break
            if found and node.signature is root.signature and node.signature.is_deep:
                steps.append(len(found))
            size += 1 if node.segment is None else len(node.segment.inner)
            if size > _MOST and found:
                break
            found.append(node)
            for edge in node.edges:
                if edge is None or not isinstance(edge[0], Node):
                    continue
                target = edge[0]
                if id(target) not in reached and id(target) not in entries:
                    heapq.heappush(waiting, (-target.sequence, target))
                reached[id(target)] = reached.get(id(target), 0) + 1
        if steps and self.length is None:
            del found[steps[0] if self.is_short else steps[-1] :]
        while not _hangs_together(found):
            found.pop()
        found = found[: self.length]
        self.loop_steps = sum(step < len(found) for step in steps) + 1
        self.entries = [node for node in found if id(node) in entries]
        # Several may have got the same gradient: each has a name of its own.
        self.come = [arrived[id(e)][0].detach() for e in self.entries[1:]]  # type: ignore[union-attr]
        return found

    # -- the walk ------------------------------------------------------------------------

    def go_back(self, grad: torch.Tensor) -> None:
        """Walk from the entries as the generic walk does, and write the torch calls."""
        self.start = grad
        slots: dict[int, Slots] = {}
        for i, (entry, start) in enumerate(zip(self.entries, [grad, *self.come], strict=True)):
            self.known[id(start)] = f"g{i or ''}"
            self.alive.append(start)
            self.shared.add(memory_of(start))
            slots[id(self.layers[id(entry)][-1] if id(entry) in self.layers else entry)] = [start]
        unreached: set[int] = set()  # by one of the calls
        waiting: dict[int, int] = {}
        for node in self.order:
            for edge in node.edges:
                if edge is not None and not isinstance(edge[0], Node):
                    waiting[id(edge[0])] = waiting.get(id(edge[0]), 0) + 1
        results: Slots | None
        for node in self.order:
            given = slots.pop(id(node), None)
            if given is None or all(g is None for g in given):
                if id(node) not in unreached:
                    raise Unbindable
                results = [None] * len(node.edges)
            else:
                results = self.results_of(node, given)
            if len(self.lines) > _MOST_CALLS:
                raise Unbindable
            results.reverse()
            for edge in node.edges:
                result = results.pop()
                if edge is None:
                    continue
                target, index = edge
                is_inside = id(target) in self.names or id(target) in self.named
                if result is None:  # the gradient of a norm's gradient for its bias
                    if self.is_part:
                        raise Unbindable
                    unreached.add(id(target))
                    if not is_inside:
                        waiting[id(target)] -= 1
                elif is_inside and isinstance(target, Node):
                    if id(target) in self.layers:
                        target = self.layers[id(target)][-1]
                    to = slots.setdefault(id(target), [None] * len(target.outputs))
                    to[index] = self.added(to[index], result)
                elif self.is_part:
                    self.leave(target, index, result)
                else:
                    assert isinstance(target, torch.Tensor)
                    if self.shares and _tensor.is_torchs(target):
                        key = -1 - len(self.came_from)
                        self.arrivals[key], self.came_from[key] = (target, result), node
                        continue
                    held = self.arrivals.pop(id(target), None)  # in the order of the last ones
                    total = self.added(held and held[1], result)
                    self.arrivals[id(target)] = target, total
                    waiting[id(target)] -= 1
                    is_ours = not _tensor.is_torchs(target)
                    if is_ours and not waiting[id(target)] and size_of(total) >= LARGE:
                        self.given.add(id(target))
                        self.lines.append(_Give(target, total))
            if sum(size_of(t) for t in node._saved or () if t is not None) >= LARGE:
                saved = self.saved_as[id(node)]
                self.freed.add(id(node))
                if id(node) in self.names:
                    name = self.names[id(node)]
                    self.lines += [f"{saved} = None", f"if not retain_graph: {name}._saved = None"]
                else:
                    self.lines.append(f"if not retain_graph: {saved} = None")
            given = results = result = None  # not kept while the next node runs
        # What gets no gradient at all would not be compared with the generic walk.
        if not unreached <= self.arrivals.keys() | self.given | {id(node) for node in self.order}:
            raise Unbindable

    def results_of(self, node: Node, given: Slots) -> Slots:
        """Run the step of `node`, and write it, as its torch calls if possible."""
        self.lines.append(f"# {bare(node.name())}")
        self.reached(node, given)
        try:
            if not self.is_straight(node):
                raise Unbindable
            results = self.inline(node, given)
        except Unbindable:
            results = self.step(node, given)
        self.left(node, results)
        return results

    def reached(self, node: Node, given: Sequence[torch.Tensor | None]) -> None:
        """Called when the gradients of the results of `node` are complete."""

    def left(self, node: Node, results: Sequence[torch.Tensor | None]) -> None:
        """Called with the gradients that it gives its inputs."""

    def leave(self, target: Target, index: int, grad: torch.Tensor) -> None:
        """Called with a gradient that leaves a part."""
        self.results.append((target, index, grad))

    def inline(self, node: Node, slots: Slots) -> Slots:
        """Run the step of `node`, and write its torch calls."""
        mine = self.kept(node)
        given = node.given
        sign = node.signature
        if sign is not None and sign.plan is not None and sign.plan.is_open:
            node.given = tuple([self.open(node, i) for i in range(len(given))])
        try:
            with Notes() as notes:
                results = step(node, slots)
        finally:
            node.given = given
        if notes.reads_data:
            raise Unbindable
        before = len(self.lines), dict(self.known)
        try:
            self.write_step(notes, results, mine)
        except Unbindable:
            del self.lines[before[0] :]
            self.known = before[1]
            raise
        return results

    def write_step(self, notes: Notes, results: Slots, mine: dict[int, str]) -> None:
        """Write the calls of one step; `mine` has the names of its node's saved tensors."""
        for func, args, kwargs, out in notes.calls:
            self.alive += [args, kwargs, out]
            if hasattr(out, "_is_constant"):
                continue  # made now by the node, which keeps it
            words = [self.word(a, mine) for a in args]
            words += [f"{key}={self.word(value, mine)}" for key, value in kwargs.items()]
            self.assign(TorchCall("", func, args, kwargs, words, out), mine)
        for result in results:
            if result is not None and id(result) not in self.known:
                self.known[id(result)] = self.word(result, mine)
                self.alive.append(result)

    def kept(self, node: Node) -> dict[int, str]:
        """Where the source finds the saved tensors of `node`, by their ids."""
        mine: dict[int, str] = {}
        for i, tensor in enumerate(node._saved or ()):
            if tensor is not None:
                self.found(tensor, f"{self.saved_as[id(node)]}[{i}]", mine)
        for attribute, value in vars(node).items() if id(node) in self.names else ():
            if isinstance(value, torch.Tensor):
                self.found(value, f"{self.names[id(node)]}.{attribute}", mine)
        return mine

    def open(self, node: Node, index: int) -> object:
        """An argument that a node keeps; a number becomes one that may differ."""
        value = node.given[index]
        if type(value) is not float:
            return value
        if id(node) not in self.names:
            raise Unbindable
        number = Given(value)
        number.place = f"{self.names[id(node)]}.given[{index}]"
        return number

    def found(self, tensor: torch.Tensor, place: str, mine: dict[int, str]) -> None:
        """A node keeps `tensor` in `place`, perhaps in a second place too, where the next graph may
        have another."""
        known = mine.setdefault(id(tensor), place)
        if known != place:
            self.twice.append(f"{known} is not {place}")
        elif size_of(tensor) < LARGE:  # it is not freed before the end of the walk
            at = memory_of(tensor), tensor.storage_offset(), of_tensor(tensor)
            self.same[place] = self.first_place.setdefault(at, place)

    def step(self, node: Node, slots: Slots) -> Slots:
        """Run the step of `node`, and write it as one call."""
        if id(node) not in self.names:
            raise Unbindable  # a layer of a segment has no node of its own
        results = step(node, slots)
        name = f"t{next(self.temporaries)}"
        given = ", ".join("None" if g is None else self.known[id(g)] for g in slots)
        self.environment["step"] = step
        self.lines.append(f"{name} = step({self.names[id(node)]}, [{given}])")
        for i, result in enumerate(results):
            if result is not None:
                self.known[id(result)] = f"{name}[{i}]"
        self.alive += results
        memories = {memory_of(t) for t in [*slots, *results] if t is not None}
        self.handed_on |= memories
        return results

    def added(self, held: torch.Tensor | None, grad: torch.Tensor) -> torch.Tensor:
        """Another gradient for the same place."""
        if held is None:
            return grad
        total = held + grad
        words = [self.known[id(held)], self.known[id(grad)]]
        self.assign(TorchCall("", torch.add, (held, grad), {}, words, total), {})
        return total

    # -- words ---------------------------------------------------------------------------

    def assign(self, call: "TorchCall", mine: dict[int, str]) -> None:
        """Write a call."""
        out = call.out
        self.alive.append(out)
        name = ""
        if not isinstance(out, torch.Tensor):
            name = f"t{next(self.temporaries)}"
            for i, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    self.known[id(item)] = f"{name}[{i}]"
                else:
                    raise Unbindable
        elif id(out) not in self.known and id(out) not in mine:  # otherwise changed or passed on
            name = self.known[id(out)] = f"t{next(self.temporaries)}"
        self.lines.append(call._replace(name=name))

    def word(self, value: object, mine: dict[int, str]) -> str:
        """The source for an argument of a recorded call."""
        if isinstance(value, torch.Tensor):
            name = mine.get(id(value)) or self.known.get(id(value))
            if name is None:
                if not hasattr(value, "_is_constant"):
                    raise Unbindable  # its origin is unknown
                name = self.constant(value)
            return name
        if type(value) is Given:
            return value.place
        if not any(True for _ in _tape.tensors_in(value)):
            return self.constant(value)
        if type(value) is tuple or type(value) is list:
            inner = ", ".join([self.word(v, mine) for v in value])
            return f"[{inner}]" if type(value) is list else f"({inner},)"
        raise Unbindable

    def constant(self, value: object) -> str:
        """The source for a constant of all walks."""
        if type(value) in _LITERALS and repr(value) not in ("nan", "inf", "-inf"):
            return repr(value)
        name = self.constants.get(id(value))
        if name is None:
            name = self.constants[id(value)] = f"c{len(self.environment)}"
            self.environment[name] = value
            self.alive.append(value)
        return name

    def serial(self, serial: int) -> str:
        """The name of a signature's serial number: without the number itself, the source is the
        same for all models of one structure."""
        name = self.serials.setdefault(serial, f"serial{len(self.serials)}")
        self.environment[name] = serial
        return name

    def function(self, func: TorchFunction) -> str:
        """The name of a torch function."""
        self.alive.append(func)
        return source.name_of(func, self.environment, _TAKEN)

    # -- the whole -----------------------------------------------------------------------

    def source(self) -> str:
        given = "floor, more" if self.is_part else "give"
        lines = [f"def backward(n0, g, retain_graph, {given}):"]
        conditions: list[str] = []
        ends: dict[int, str] = {}  # nodes beyond a part
        if self.is_part:
            last = self.whole[-1]
            last_name = self.names[id(last)]
            earlier = "" if last.segment is None else " - 1"
            # Otherwise one that waits runs before, or leads to one of these nodes.
            conditions.append(f"{last_name}.sequence{earlier} <= floor")
            self.ask_of_entries(lines, conditions)
        leaves = self.fetch(lines, conditions, ends)
        free = self.fetch_saved(lines, conditions, leaves)
        lines += self.body(conditions, free, leaves)
        if self.is_part:
            targets = [
                f"({leaves.get(id(target)) or ends[id(target)]}, {index})"
                for target, index, _ in self.results
            ]
            grads = [self.known[id(g)] for _, _, g in reversed(self.results)]
            lines.append(f"return ({', '.join(targets)},), [{', '.join(grads)}]")
            return "\n    ".join(lines) + "\n"
        found = [
            f"({leaves[id(leaf)]}, {self.known[id(g)]}, {self.kind(key, leaf, g)}),"
            for key, (leaf, g) in self.arrivals.items()
            if id(leaf) not in self.given
        ]
        lines.append(f"return ({' '.join(found)})")
        return "\n    ".join(lines) + "\n"

    def body(self, conditions: list[str], free: list[str], leaves: dict[int, str]) -> list[str]:
        """The source of the checks and of the calls."""
        self.lines, guards = self.shorter()
        lines = ["if ("]
        lines += [f"    {'or ' if i else ''}{c}" for i, c in enumerate([*conditions, *guards])]
        lines.append("): return None")
        memory = self.memory()
        if memory is not None:
            lines += ["memory = take()", f"{', '.join(memory.names)}, = memory"]
        text: list[str] = []
        for line in self.lines:
            if isinstance(line, _Give):
                leaf, grad_name = leaves[id(line.leaf)], self.known[id(line.grad)]
                text.append(f"give({leaf}, {grad_name}, {self.is_own(line.leaf, line.grad)})")
            elif isinstance(line, str):
                text.append(line)
            elif memory is None or line.name not in memory.views:
                text.append(self.said(line, memory))
        lines += self.dropped(text, memory)
        if memory is not None:
            lines.append("spare(memory)")
        if free:
            lines.append("if not retain_graph:")
            lines += [f"    {line}" for line in free]
        return lines

    def put_off(self) -> None:
        """Have the parts of it bound later, if at all: the generic walk reaches them again only if
        what was bound cannot be used."""
        for node in self.whole:
            if node.signature is not None:
                node.signature.walks.visits = 0

    def fetch(
        self,
        lines: list[str],
        conditions: list[str],
        ends: dict[int, str],
        expanding: bool = False,
    ) -> dict[int, str]:
        """Write how the nodes are found, and the checks of the graph; the leaves' names."""
        leaves: dict[int, str] = {}
        self.environment |= {state.name: state for state in NodeState}
        fetched = {id(node) for node in self.entries}
        last_name = self.names[id(self.whole[-1])]
        for i, node in enumerate(self.whole):  # each has a name by then
            name = self.names[id(node)]
            # One that was exposed to the user may have other edges since.
            more = ""
            if node.segment is not None:
                more = f" or {name}.segment is None"
            elif "before" in vars(node):  # it was a segment's, and is now its last layer's
                more = f" or {name}.segment is not None"
            if expanding:
                more = ""
                lines.append(f"if {name}.segment is not None: {name}.segment.expand({name})")
            state = RECORDED
            if node.taps:
                state, more = TAPPED, ""
            elif node.node_state is not RECORDED:  # otherwise it has another signature
                state, more = EXPOSED, ""
                if expanding:
                    lines.append(f"if {name}.node_state is RECORDED: {name}.as_exposed()")
            lines.append(f"if {name}.node_state is not {state.name}{more}: return None")
            if node.theirs is not None:
                lines.append(
                    f"if {name}.theirs is None or not {name}.theirs.is_unchanged(): return None"
                )
            lines.append(f"e = {name}.targets")
            follows = False
            for place, target in enumerate(node.targets):
                if target is None or not self.follows(target):
                    continue
                if isinstance(target, Node) and id(target) not in self.names:
                    if id(target) not in ends:
                        ends[id(target)] = f"x{len(ends)}"
                        lines.append(f"{ends[id(target)]} = e[{place}]")
                        if not self.is_part:  # it is an end, and its hooks would be run
                            if target.node_state is HOOKED:
                                raise ChangedSince
                            to = ends[id(target)]
                            lines.append(f"if {to}.node_state is HOOKED: return None")
                            continue
                        conditions.append(f"{ends[id(target)]}.sequence >= {last_name}.sequence")
                        conditions.append(f"{ends[id(target)]}.theirs is not None")
                    else:
                        lines.append(f"if e[{place}] is not {ends[id(target)]}: return None")
                elif isinstance(target, Node):
                    follows = follows or target is self.whole[i + 1]
                    to = self.names[id(target)]
                    if id(target) in fetched:
                        lines.append(f"if e[{place}] is not {to}: return None")
                    else:
                        fetched.add(id(target))
                        lines.append(f"{to} = e[{place}]")
                        self.ask_for_its_own(target, lines)
                elif not isinstance(target, _tensor.Tensor):
                    if id(target) in leaves:
                        to = leaves[id(target)]
                        lines.append(f"if e[{place}] is not {to}: return None")
                    else:
                        theirs = [to for to in leaves.values() if to.startswith("v")]
                        to = leaves[id(target)] = f"v{len(leaves)}"
                        lines.append(f"{to} = e[{place}]")
                        conditions += [f"{to} is {other}" for other in theirs]
                        if not self.is_part:
                            conditions.append(f"not {to}.requires_grad")
                    self.environment[self.declines.__name__] = self.declines
                    conditions.append(f"{self.declines.__name__}({name}, {to})")
                elif id(target) not in leaves:
                    if target._signature is None:
                        raise ChangedSince
                    to = leaves[id(target)] = f"w{len(leaves)}"
                    lines.append(f"{to} = e[{place}]")
                    conditions.append(f"(of := {to}._signature) is None")
                    conditions.append(f"of.serial != {self.serial(target._signature.serial)}")
            # Gradients are summed in the order in which the calls were recorded. And what are two
            # calls with one signature here may have been a single call.
            if i + 1 < len(self.whole) and not follows:
                before = self.names[id(self.whole[i + 1])]
                conditions.append(f"{name}.sequence <= {before}.sequence")
        names = [name for name in leaves.values() if name.startswith("v")]
        if len(names) > 1 and not self.came_from:
            if self.shares:
                raise Unbindable
            self.environment["is_shared"] = beyond.is_shared
            conditions.append(f"is_shared(({', '.join(names)}))")
        return leaves

    def ask_for_its_own(self, node: Node, lines: list[str]) -> None:
        """Write the check of a node deep in a loop: the nodes before it do not know of it."""
        sign = node.signature
        if sign is not None and sign.is_by_layout:
            lines.append(
                f"if (of := {self.names[id(node)]}.signature) is None or of.own_serial !="
                f" {self.serial(sign.own_serial)}: return None"
            )

    def ask_what_passes(
        self, leaves: dict[int, str], passing: Container[int], conditions: list[str]
    ) -> None:
        """Write the check of which of torch's tensors are computed from one of the `ends`."""
        theirs = {key: to for key, to in leaves.items() if to.startswith("v")}
        if theirs:
            flags = tuple([key in passing for key in theirs])
            self.environment["passing"] = beyond.passing
            conditions.append(f"passing(({', '.join(theirs.values())},), ends) != {flags}")

    def ask_of_entries(self, lines: list[str], conditions: list[str]) -> None:
        """Write how the further entries of a part are found, and their checks."""
        for i, entry in enumerate(self.entries[1:], start=1):
            name = self.names[id(entry)]
            assert entry.signature is not None
            lines += [
                f"{name}, slots = more[{i - 1}]",
                f"if (of := {name}.signature) is None or of.own_serial !="
                f" {self.serial(entry.signature.own_serial)} or slots[0] is None: return None",
                f"g{i} = slots[0]",
            ]
            if self.come[i - 1].dim():
                strides = self.constant(self.come[i - 1].stride())
                conditions.append(f"g{i}.stride() != {strides}")

    def fetch_saved(
        self, lines: list[str], conditions: list[str], leaves: dict[int, str]
    ) -> list[str]:
        """The same for their saved tensors; returns the lines that free them."""
        free: list[str] = []
        for node in self.whole:
            name = self.names[id(node)]
            if not node._saved or not self.is_run(node):
                continue
            saved = f"s{name[1:]}"
            lines.append(f"{saved} = {name}._saved")
            if id(node) not in self.freed:
                free.append(f"{name}._saved = None")
            conditions.append(f"{saved} is None")
            first = node if node.segment is None else self.layers[id(node)][0]
            for edge in first.edges:
                if edge is not None and _tensor.is_torchs(edge[0]) and id(edge[0]) in leaves:
                    conditions += [
                        f"not {leaves[id(edge[0])]}.is_set_to({self.saved_as[id(first)]}[{i}])"
                        for i in beyond.followed(first.plan, first.edges, edge[0])
                    ]
            if node.segment is None:
                conditions += [
                    f"{saved}[{i}]._version != {name}._versions[{i}]"
                    for i, tensor in enumerate(node._saved)
                    if tensor is not None
                ]
            else:
                conditions += [
                    f"{saved}[{k}][{i}]._version != {name}._versions[{place}]"
                    for place, (k, i) in enumerate(node.segment.visible)
                ]
        conditions += self.twice
        return free

    def taken(self) -> set[int]:
        """Memory that is, or will be, referred to elsewhere."""
        taken = self.shared | self.handed_on
        taken |= {memory_of(g) for _, g in self.arrivals.values()}
        taken |= {memory_of(g) for _, _, g in self.results}
        return taken | {memory_of(t) for n in self.order for t in n._saved or () if t is not None}

    def shorter(self) -> "tuple[list[Line], list[str]]":
        """The lines, without what need not be done in each walk; and the conditions under which
        they do not hold."""
        start, taken = self.start, self.taken()
        if not self.start_varies:
            taken -= {memory_of(start)} - {memory_of(g) for _, g in self.arrivals.values()}

        def fixed(tensor: torch.Tensor) -> bool:
            return hasattr(tensor, "_is_constant") and not (self.start_varies and tensor is start)

        needed = {
            self.known[id(g)].partition("[")[0]
            for g in [*(g for _, g in self.arrivals.values()), *(g for _, _, g in self.results)]
        } | self.used
        calls = [cheaper(c, self.constant) if isinstance(c, TorchCall) else c for c in self.lines]
        calls, guards = without_repeated(calls, self.same, taken, needed)
        return shorter(calls, fixed, taken, needed, self.environment), guards

    def said(self, call: "TorchCall", memory: Memory | None) -> str:
        """The source of a call."""
        name, func, words = call.name, call.func, call.words
        if func is None:
            return f"{name} = {words[0]}"
        if func.__name__ in _ALIKE:
            func = twin(func) or func
        if (changing := self.changing.get(name)) is not None:
            func = changing
        elif memory is not None and name in memory.in_place:
            func = memory.in_place[name]
            if func is torch.Tensor.zero_:
                words, name = [name], ""
            elif func is torch.Tensor.copy_:
                words, name = [name, words[0]], ""
        elif memory is not None and name in memory.writers:
            func, words, name = twin(func) or func, [*words, f"out={name}"], ""
        text = f"{self.function(func)}({', '.join(words)})"
        return f"{name} = {text}" if name else text

    def memory(self) -> Memory | None:
        """Memory that is kept for the tensors that nothing else refers to."""
        taken = self.taken()
        sharing: dict[int, set[int]] = {}  # the tensors in each memory
        for line in self.lines:
            for out in _tape.tensors_in(line.out) if isinstance(line, TorchCall) else ():
                sharing.setdefault(memory_of(out), set()).add(id(out))
        memory = Memory()
        last: dict[str, int] = {}  # the last use of each name
        until: dict[int, int] = {}  # and thereby of each memory
        holds = {
            name: memory_of(out)
            for line in self.lines
            if isinstance(line, TorchCall)
            for out in _tape.tensors_in(line.out)
            for name in WORDS.findall(self.known.get(id(out), ""))
        }
        for i, line in enumerate(self.lines):
            if isinstance(line, _Give):
                continue
            texts = line.words if isinstance(line, TorchCall) else [line]
            for word in [word for text in texts for word in WORDS.findall(text)]:
                last[word] = i
                if word in holds:
                    until[holds[word]] = i
        for i, line in enumerate(self.lines):
            if not isinstance(line, TorchCall) or not line.name:
                continue
            out = line.out
            if not isinstance(out, torch.Tensor) or not size_of(out) or out.is_meta:
                continue
            is_last = bool(line.words) and last.get(line.words[0]) == i
            first = line.args[0] if is_last else None
            if isinstance(first, torch.Tensor):  # otherwise a view of it is used later
                is_last = len(sharing.get(memory_of(first), ())) == 1
            if size_of(out) >= _TOO_LARGE:
                if is_last and is_alike(first, out) and memory_of(first) not in taken:
                    self.changing[line.name] = getattr(torch.Tensor, f"{line.func.__name__}_", None)
            elif memory_of(out) not in taken:
                memory.add(line, is_last, i, until.get(memory_of(out), i))
        if not memory.names:
            return None
        sign = self.whole[0].signature
        leaf = None if sign is None else sign.leaf()
        if leaf is not None:
            leaf.note_memory(memory)
        self.environment["take"], self.environment["spare"] = memory.take, memory.keep
        return memory

    def dropped(self, lines: list[str], memory: Memory | None) -> list[str]:
        """`lines`, with large tensors freed after their last use."""
        kept = set() if memory is None else {*memory.names}
        large = {
            name.partition("[")[0]
            for t in _tape.tensors_in(self.alive)
            if size_of(t) >= LARGE and (name := self.known.get(id(t), "")).startswith("t")
        }
        at_end = {
            self.known[id(g)].partition("[")[0]
            for key, (_, g) in self.arrivals.items()
            if key not in self.given
        } | {self.known[id(g)].partition("[")[0] for _, _, g in self.results}
        last: dict[int, list[str]] = {}
        for name in sorted(large - at_end - kept):
            word = re.compile(rf"\b{name}\b")
            places = [i for i, line in enumerate(lines) if word.search(line)]
            if places:
                last.setdefault(places[-1], []).append(f"{name} = None")
        return [text for i, line in enumerate(lines) for text in (line, *last.get(i, ()))]

    def kind(self, key: int, leaf: torch.Tensor, grad: torch.Tensor) -> str:
        """The source of the third item in `Found`."""
        node = self.came_from.get(key)
        if node is None:
            return self.is_own(leaf, grad)
        name = self.names.get(id(node)) or next(
            self.names[segment] for segment, layers in self.layers.items() if node in layers
        )
        return f"({name}.sequence,)"

    def is_own(self, leaf: torch.Tensor, grad: torch.Tensor) -> str:
        """May `grad` itself become the leaf's `.grad`? It fits, and nothing else refers to it.

        A view may not: it will be copied with its strides. `True` means that the leaf is one of the
        mirror's, too.
        """
        memory = memory_of(grad)
        saved = {memory_of(t) for node in self.order for t in node._saved or () if t is not None}
        holders = [g for _, g in self.arrivals.values() if memory_of(g) == memory]
        fits = (
            len(holders) == 1
            and memory not in saved
            and memory not in self.shared
            and (grad.is_contiguous() if leaf.is_contiguous() else grad.stride() == leaf.stride())
            and grad.shape == leaf.shape
            and grad.numel() > 0  # an empty one is contiguous whatever its strides
            and grad.dtype is leaf.dtype
        )
        if not (fits and grad._is_view()):
            return repr("of torch's" if fits and _tensor.is_torchs(leaf) else fits)
        is_whole = grad.untyped_storage().nbytes() == size_of(grad)
        return repr("whole view" if is_whole else "view")


def _hangs_together(nodes: Sequence[Node]) -> bool:
    """Are they all connected by edges?"""
    beside: dict[int, list[int]] = {id(node): [] for node in nodes}
    for node in nodes:
        for edge in node.edges:
            if edge is not None and id(edge[0]) in beside:
                beside[id(node)].append(id(edge[0]))
                beside[id(edge[0])].append(id(node))
    found = [id(node) for node in nodes[:1]]
    for key in found:  # the list grows during the loop
        found += [other for other in beside[key] if other not in found]
    return len(set(found)) == len(nodes)


class _Give(NamedTuple):
    """In place of a line: pass a leaf its gradient."""

    leaf: torch.Tensor
    grad: torch.Tensor


Line: TypeAlias = str | TorchCall | _Give  # of the source


def step(node: Node, slots: Slots) -> Slots:
    """The generic step of a node: its gradients, each with the shape and dtype of its input."""
    return _walk.validate_outputs(node, node.run(slots))
