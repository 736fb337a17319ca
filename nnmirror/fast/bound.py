"""A walk bound: recorded once, and run from then on as straight-line Python.

`bind` goes over the nodes behind a loss in the order of the generic walk, with a
`TorchFunctionMode` that notes each torch call. The notes become the source of a function, in
`linecache`, so that a debugger steps through it and a traceback shows it. It is given the last
node, follows the edges to the others, and finds in them what they saved: it holds no tensor but
constants, so it may run in several threads at once, and keeps no model alive.

A node whose backward looks at the numbers in a tensor, or that was written by a user, becomes one
call of the generic step.

The function first asks whether the graph is as it was when it was bound: the same nodes reached in
the same ways, nothing saved that was changed or freed since, no hook, every parameter as it was
when it was used. If not, it returns None, and the generic walk goes.
"""

import itertools
import keyword
import linecache
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from .. import tape as _tape
from .. import walk as _walk

_MOST_NODES = 128  # of a walk that is bound
_numbers = itertools.count()
_LARGE = 1 << 16  # bytes: from here on memory is given back as soon as it may be
_TAKEN = {"backward", "e", "g", "give", "of", "retain_graph", "step"}  # names in the source

# Questions about a tensor whose answers follow from its layout.
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
_LITERALS = (bool, int, float, str, type(None))


class Unbindable(Exception):
    """The notes cannot follow what was done."""


class ChangedSince(Exception):
    """The graph is no longer as it was when it was recorded."""


class Bound:
    """The walk from one node, bound: `run(node, g, retain_graph, give)`.

    Returns (leaf, its gradient, whether nobody else holds that) for each leaf in the order of the
    generic walk; None if the graph is another than the one that was bound. Large gradients go to
    `give(leaf, gradient, ...)` as soon as they are there instead.
    """

    def __init__(self, source: str, environment: dict[str, Any]) -> None:
        self.source = source
        self.trusted = False  # it was compared with the generic walk
        self.filename = f"<nnmirror walk {next(_numbers)}>"
        lines = source.splitlines(keepends=True)
        linecache.cache[self.filename] = len(source), None, lines, self.filename
        exec(compile(source, self.filename, "exec"), environment)
        self.run: Callable[..., Any] = environment.pop("backward")  # else it would hold itself

    def __del__(self) -> None:
        linecache.cache.pop(self.filename, None)


def bind(root: _tape.Node, grad: torch.Tensor) -> Bound | None:
    """The walk from `root` with the gradient `grad`, bound; None if it cannot be.

    Raises ChangedSince if it cannot be now.
    """
    try:
        writer = _Writer(root)
        writer.go_back(grad)
        return Bound(writer.source(grad), writer.environment)
    except Unbindable:
        return None


class _Notes(TorchFunctionMode):
    """Notes the torch calls that are made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.reads_data = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if any(True for _ in _tape.tensors_in(out)):
            if not (func is torch.Tensor.contiguous and out is args[0]):
                self.calls.append((func, args, kwargs, out))
        elif name == "__get__":
            self.reads_data = self.reads_data or not isinstance(out, _ANSWERS)
        elif name not in _QUESTIONS:
            self.reads_data = True
        return out


class _Writer:
    """Writes the source of the walk from `root`.

    In it n0, n1 ... are the nodes in the order of the walk, s0, s1 ... what they saved, w0, w1 ...
    the leaves, t0, t1 ... what is computed.
    """

    def __init__(self, root: _tape.Node) -> None:
        self.order = _walk.dependencies([(root, 0)])[1]
        self.order.sort(key=lambda node: -node.sequence)
        folded = any(node.folded is not None for node in self.order)  # it goes back by itself
        if len(self.order) > _MOST_NODES or folded:
            raise Unbindable
        if any(node.is_watched or node.signature is None for node in self.order):
            raise ChangedSince
        self.names = {id(node): f"n{i}" for i, node in enumerate(self.order)}
        self.environment: dict[str, Any] = {}
        self.constants: dict[int, str] = {}
        self.lines: list[str] = []
        self.known: dict[int, str] = {}  # of the tensors that the walk has made: their names
        self.alive: list[Any] = []  # so that no id is given twice
        self.shared: set[int] = set()  # memory that others may hold
        self.arrivals: dict[int, tuple[Any, torch.Tensor]] = {}  # leaves and their gradients
        self.given: set[int] = set()  # leaves whose gradient does not wait for the end
        self.freed: set[int] = set()  # nodes that are freed on the way
        self.temporaries = itertools.count()

    # -- going back ----------------------------------------------------------------------

    def go_back(self, grad: torch.Tensor) -> None:
        """Go back from the root, as the generic walk does, and write what is called."""
        self.known[id(grad)] = "g"
        self.alive.append(grad)
        self.shared.add(_memory(grad))
        slots: dict[int, list[Any]] = {id(self.order[0]): [grad]}
        waiting: dict[int, int] = {}
        for node in self.order:
            for edge in node.edges:
                if edge is not None:
                    waiting[id(edge[0])] = waiting.get(id(edge[0]), 0) + 1
        for node in self.order:
            given = slots.pop(id(node), None)
            if given is None or all(g is None for g in given):
                raise Unbindable  # part of the graph gets no gradient
            self.lines.append(f"# {_tape.bare(node.name())}")
            rule = node.function
            try:
                if not rule.is_rule or rule.reads_data:
                    raise Unbindable
                results = self.inline(node, given)
            except Unbindable:
                results = self.step(node, given)
            for edge, result in zip(node.edges, results, strict=True):
                if edge is None:
                    continue
                if result is None:
                    raise Unbindable
                target, index = edge
                if type(target) is _tape.Node:
                    to = slots.setdefault(id(target), [None] * len(target.outputs))
                    to[index] = self.added(to[index], result)
                else:
                    held = self.arrivals.get(id(target))
                    total = self.added(held and held[1], result)
                    self.arrivals[id(target)] = target, total
                    waiting[id(target)] -= 1
                    if not waiting[id(target)] and _bytes(total) >= _LARGE:
                        self.given.add(id(target))
                        self.lines.append(_Give(target, total))  # type: ignore[arg-type]
            if sum(_bytes(t) for t in node._saved or () if t is not None) >= _LARGE:
                name = self.names[id(node)]
                self.freed.add(id(node))
                self.lines += [f"s{name[1:]} = None", f"if not retain_graph: {name}._saved = None"]

    def inline(self, node: _tape.Node, slots: list[Any]) -> list[Any]:
        """Take the step of `node`, and write what it calls."""
        name = self.names[id(node)]
        mine: dict[int, str] = {}
        for i, tensor in enumerate(node._saved or ()):
            if tensor is not None:
                mine[id(tensor)] = f"s{name[1:]}[{i}]"
        for attribute, value in vars(node).items():
            if isinstance(value, torch.Tensor):
                mine[id(value)] = f"{name}.{attribute}"
        with _Notes() as notes:
            results = _walk.validated(node, node.run(slots))
        if notes.reads_data:
            raise Unbindable
        before = len(self.lines), dict(self.known)
        try:
            for func, args, kwargs, out in notes.calls:
                self.alive += [args, kwargs, out]
                words = [self.word(a, mine) for a in args]
                words += [f"{key}={self.word(value, mine)}" for key, value in kwargs.items()]
                call = f"{self.function(func)}({', '.join(words)})"
                self.assign(out, call, mine)
            for result in results:
                if result is not None and id(result) not in self.known:
                    self.known[id(result)] = self.word(result, mine)
                    self.alive.append(result)
        except Unbindable:
            del self.lines[before[0] :]
            self.known = before[1]
            raise
        return results

    def step(self, node: _tape.Node, slots: list[Any]) -> list[Any]:
        """Take the step of `node`, and write it as one call."""
        results = _walk.validated(node, node.run(slots))
        name = f"t{next(self.temporaries)}"
        given = ", ".join("None" if g is None else self.known[id(g)] for g in slots)
        self.environment["step"] = step
        self.lines.append(f"{name} = step({self.names[id(node)]}, [{given}])")
        for i, result in enumerate(results):
            if result is not None:
                self.known[id(result)] = f"{name}[{i}]"
        self.alive += results
        if not node.function.is_rule:  # its author may keep what it was given, or returned
            self.shared |= {_memory(t) for t in [*slots, *results] if t is not None}
        return results

    def added(self, held: torch.Tensor | None, grad: torch.Tensor) -> torch.Tensor:
        """One more gradient for the same place."""
        if held is None:
            return grad
        total = held + grad
        call = f"{self.function(torch.add)}({self.known[id(held)]}, {self.known[id(grad)]})"
        self.assign(total, call, {})
        return total

    # -- words ---------------------------------------------------------------------------

    def assign(self, out: Any, call: str, mine: dict[int, str]) -> None:
        """Write that `call` gives `out`."""
        self.alive.append(out)
        if isinstance(out, torch.Tensor):
            if id(out) in self.known or id(out) in mine:  # changed in place, or handed on
                self.lines.append(call)
                return
            name = self.known[id(out)] = f"t{next(self.temporaries)}"
        else:
            name = f"t{next(self.temporaries)}"
            for i, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    self.known[id(item)] = f"{name}[{i}]"
                else:
                    raise Unbindable
        self.lines.append(f"{name} = {call}")

    def word(self, value: Any, mine: dict[int, str]) -> str:
        """The source for an argument of a noted call."""
        if isinstance(value, torch.Tensor):
            name = self.known.get(id(value)) or mine.get(id(value))
            if name is None:
                if not hasattr(value, "_is_constant"):
                    raise Unbindable  # where it came from is not known
                name = self.constant(value)
            return name
        if not any(True for _ in _tape.tensors_in(value)) and not isinstance(value, slice):
            return self.constant(value)
        if type(value) is tuple or type(value) is list:
            inner = ", ".join([self.word(v, mine) for v in value])
            return f"[{inner}]" if type(value) is list else f"({inner},)"
        raise Unbindable

    def constant(self, value: Any) -> str:
        """The source for what is the same in every walk."""
        if type(value) in _LITERALS and repr(value) not in ("nan", "inf", "-inf"):
            return repr(value)
        name = self.constants.get(id(value))
        if name is None:
            name = self.constants[id(value)] = f"c{len(self.environment)}"
            self.environment[name] = value
            self.alive.append(value)
        return name

    def function(self, func: Any) -> str:
        """The name of a torch function."""
        name = getattr(func, "__name__", "").partition(".")[0]
        if name.startswith("__"):  # else what changes in place keeps its underscore
            name = name.strip("_")
        if name == "get":
            name = func.__self__.__name__
        if not name.isidentifier():
            name = "function"
        if keyword.iskeyword(name) or name in _TAKEN:
            name += "_"
        if self.environment.setdefault(name, func) is not func:
            name = self.constants.setdefault(id(func), f"{name}_{len(self.environment)}")
            self.environment[name] = func
        self.alive.append(func)
        return name

    # -- the whole -----------------------------------------------------------------------

    def source(self, grad: torch.Tensor) -> str:
        lines = ["def backward(n0, g, retain_graph, give):"]
        conditions: list[str] = []
        leaves: dict[int, str] = {}
        fetched = {id(self.order[0])}
        for node in self.order:  # each has a name by then
            # One that somebody looks at may lead elsewhere since.
            lines.append(f"if {self.names[id(node)]}.is_watched: return None")
            lines.append(f"e = {self.names[id(node)]}.edges")
            for i, edge in enumerate(node.edges):
                if edge is None:
                    continue
                target = edge[0]
                if type(target) is _tape.Node:
                    name = self.names[id(target)]
                    if id(target) in fetched:
                        lines.append(f"if e[{i}][0] is not {name}: return None")
                    else:
                        fetched.add(id(target))
                        lines.append(f"{name} = e[{i}][0]")
                elif id(target) not in leaves:
                    if target._signature is None:
                        raise ChangedSince
                    name = leaves[id(target)] = f"w{len(leaves)}"
                    lines.append(f"{name} = e[{i}][0]")
                    conditions.append(f"(of := {name}._signature) is None")
                    conditions.append(f"of.serial != {target._signature.serial}")
        free: list[str] = []
        for node in self.order:
            name = self.names[id(node)]
            if node._saved:
                saved = f"s{name[1:]}"
                lines.append(f"{saved} = {name}._saved")
                if id(node) not in self.freed:
                    free.append(f"{name}._saved = None")
                conditions.append(f"{saved} is None")
                conditions += [
                    f"{saved}[{i}]._version != {name}._versions[{i}]"
                    for i, tensor in enumerate(node._saved)
                    if tensor is not None
                ]
        # Gradients are added up in the order in which the calls were recorded.
        for before, after in itertools.pairwise(self.order):
            conditions.append(
                f"{self.names[id(before)]}.sequence < {self.names[id(after)]}.sequence"
            )
        # Two calls of one signature may have been one.
        alike: dict[Any, list[str]] = {}
        for node in self.order:
            alike.setdefault(node.signature, []).append(self.names[id(node)])
        for names in alike.values():
            conditions += [f"{a} is {b}" for a, b in itertools.combinations(names, 2)]
        lines.append("if (")
        lines += [f"    {'or ' if i else ''}{c}" for i, c in enumerate(conditions)]
        lines.append("): return None")
        given = [
            f"give({leaves[id(line.leaf)]}, {self.known[id(line.grad)]},"
            f" {self.is_own(line.leaf, line.grad)})"
            if isinstance(line, _Give)
            else line
            for line in self.lines
        ]
        lines += self.dropped(given)
        if free:
            lines.append("if not retain_graph:")
            lines += [f"    {line}" for line in free]
        found = [
            f"({leaves[id(leaf)]}, {self.known[id(g)]}, {self.is_own(leaf, g)}),"
            for leaf, g in self.arrivals.values()
            if id(leaf) not in self.given
        ]
        lines.append(f"return ({' '.join(found)})")
        return "\n    ".join(lines) + "\n"

    def dropped(self, lines: list[str]) -> list[str]:
        """`lines`, with large tensors let go of after the last that needs them."""
        large = {
            name.partition("[")[0]
            for t in self.alive
            if isinstance(t, torch.Tensor) and _bytes(t) >= _LARGE
            if (name := self.known.get(id(t), "")).startswith("t")
        }
        at_end = {
            self.known[id(g)].partition("[")[0]
            for key, (_, g) in self.arrivals.items()
            if key not in self.given
        }
        last: dict[int, list[str]] = {}
        for name in sorted(large - at_end):
            word = re.compile(rf"\b{name}\b")
            places = [i for i, line in enumerate(lines) if word.search(line)]
            if places:
                last.setdefault(places[-1], []).append(f"{name} = None")
        return [text for i, line in enumerate(lines) for text in (line, *last.get(i, ()))]

    def is_own(self, leaf: torch.Tensor, grad: torch.Tensor) -> bool:
        """May `grad` become the leaf's `.grad` itself? It fits, and nobody else holds it."""
        memory = _memory(grad)
        saved = {_memory(t) for node in self.order for t in node._saved or () if t is not None}
        holders = [g for _, g in self.arrivals.values() if _memory(g) == memory]
        return (
            len(holders) == 1
            and memory not in saved
            and memory not in self.shared
            and not grad._is_view()
            and (grad.is_contiguous() if leaf.is_contiguous() else grad.stride() == leaf.stride())
            and grad.shape == leaf.shape
            and grad.dtype is leaf.dtype
        )


class _Give(NamedTuple):
    """In place of a line: hand a leaf its gradient."""

    leaf: torch.Tensor
    grad: torch.Tensor


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def step(node: _tape.Node, slots: list[Any]) -> list[Any]:
    """The generic step of a node inside a bound walk."""
    return _walk.validated(node, node.run(slots))
