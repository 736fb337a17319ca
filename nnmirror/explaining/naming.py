"""The reader's names for the parts of a graph: its leaves, modules and results.

A leaf has the name of the parameter in its module. A call of a layer knows the layer. For other
calls, the module is certain for the first one with its signature, and in plain mode (see
`origin.py`). Otherwise it follows from the latest call of each module, and from the module that
owns a parameter.

The modules are those that are alive and belong to the graph. A module or tensor held by a variable
of the caller has the name of that variable.
"""

import gc
import json
import keyword
import linecache
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch

from .. import tensor as _tensor
from ..fast import leaves
from ..modules.explicit import Each, NodeCall, Traced
from ..modules.module import Module
from ..modules.segment import PartCall, nodes
from ..node import Node
from ..operation import Operation
from ..origin import Origin
from ..tensor import bare
from .explanation import Place

_TEMPORARY = re.compile(r"t\d+")
_RESERVED = {"backward", "base64", "float", "packed", "slice", "torch", "values"}


def escaped(name: str) -> str:
    """`name` as it may stand in a comment."""
    return name if name.isprintable() else repr(name)[1:-1]


def quoted(name: str) -> str:
    """`name` as a string in Python."""
    return json.dumps(name, ensure_ascii=False) if name.isprintable() else repr(name)


def identifier(name: str, kind: str = "") -> str:
    """`name` as a Python identifier: fc2_weight for fc2.weight; linear_0_weight for 0.weight."""
    # Python normalizes identifiers, and does not allow every letter.
    made = unicodedata.normalize("NFKC", name)
    made = "".join([c if f"a{c}".isidentifier() else "_" for c in made])
    if made.isidentifier():
        return made
    return f"{identifier(kind.lower()) if kind else 'n'}_{made}"


class Names:
    """The names of one graph.

    `order` has its nodes in the order of the walk, `layers` the nodes that the node of a segment
    stands for, by its id. `modules` take precedence; `variables` are the caller's.
    """

    def __init__(
        self,
        order: Sequence[Node],
        layers: Mapping[int, Sequence[Node]],
        modules: Sequence[Module],
        variables: Mapping[str, object],
    ) -> None:
        self.order, self.layers = order, layers
        self.taken = {*_RESERVED, *keyword.kwlist}
        self.nodes = {id(node) for node in order} | set(layers)
        self.leaves: dict[int, str] = {}
        self.identifiers: dict[str, str] = {}
        self.tensors: dict[int, str] = {}  # the caller's
        self.results: dict[tuple[int, int], str] = {}  # likewise, by the node and the output
        self.held: dict[int, str] = {}  # the caller's modules
        for name, value in variables.items():
            self._note_variable(name, value)
        self.owners: dict[int, list[tuple[str, str]]] = {}  # by the parameter
        self.modules: dict[int, tuple[str, str]] = {}  # name and class, by the module
        self.callers: dict[int, tuple[str, str]] = {}  # likewise, by its dict of parameters
        calls: list[tuple[Module, object]] = []
        for prefix, root in self._roots(modules):
            for name, module in root.named_modules():
                if id(module) in self.modules:
                    continue
                full = ".".join(filter(None, (prefix, name)))
                self.modules[id(module)] = full, type(module).__name__
                for own, p in module._parameters.items():
                    if p is not None:
                        self.leaves.setdefault(id(p), ".".join(filter(None, (full, own))))
                        self.owners.setdefault(id(p), []).append(self.modules[id(module)])
                calls.append((module, _call_of(module)))
                self.callers[id(module._parameters)] = self.modules[id(module)]
        self.of_nodes = self._modules_of_nodes(calls)
        self.labels = self._labels()

    def _note_variable(self, name: str, value: Any) -> None:
        if name.startswith("_") or not name.isidentifier():
            return
        kind = type(value)
        if issubclass(kind, Module):
            self.held.setdefault(id(value), name)
        elif issubclass(kind, torch.Tensor):
            self.tensors.setdefault(id(value), name)
            if issubclass(kind, _tensor.Tensor) and value._node is not None:
                self.results.setdefault((id(value._node), value._output_nr), name)

    # -- modules ---------------------------------------------------------------------------

    def _roots(self, given: Sequence[Module]) -> list[tuple[str, Module]]:
        """The outermost modules of the graph, and the prefixes of their names."""
        leaves = {
            id(e[0])
            for node in self.order
            for e in node.edges
            if e is not None and not isinstance(e[0], Node)
        }
        alive = [
            m for m in gc.get_objects() if issubclass(type(m), Module) and hasattr(m, "_modules")
        ]
        inner = {id(child) for m in alive for child in m._modules.values()}
        left: set[int] = set()
        owning: set[int] = set()
        for m in alive:
            if any(id(p) in leaves for p in m._parameters.values()):
                owning.add(id(m))
            made = _nodes_of(_call_of(m))
            if id(m) in owning or any(id(node) in self.nodes for node in made):
                left.add(id(m))
        asked = {id(m) for m in given}
        candidates: list[tuple[Module, set[int]]] = []
        for m in [*given, *alive]:
            if id(m) in asked or id(m) in self.held or id(m) not in inner:
                parts = {id(part) for part in m.modules()}
                if parts & left:
                    candidates.append((m, parts))

        def best(candidate: tuple[Module, set[int]]) -> tuple[bool, int, bool, int]:
            m, parts = candidate
            return id(m) in asked, len(parts & left), id(m) in self.held, -len(parts)

        chosen: list[tuple[Module, bool]] = []
        while candidates:
            m, parts = max(candidates, key=best)
            chosen.append((m, bool(parts & owning)))
            left -= parts
            candidates = [c for c in candidates if c[1] & left]
        alone = sum(owns for _, owns in chosen) == 1
        named: list[tuple[str, Module]] = []
        for m, owns in chosen:
            name = self.held.get(id(m)) or type(m).__name__.lower()
            name = "" if owns and alone and m._modules else name
            count = sum(name == other for other, _ in named)
            named.append((f"{name}{count + 1}" if count else name, m))
        return named

    def _modules_of_nodes(
        self, calls: Sequence[tuple[Module, object]]
    ) -> dict[int, tuple[str, str]]:
        found: dict[int, tuple[str, str]] = {}
        # The calls between the input and the output of a module belong to it; of nested modules,
        # the one with the fewest calls is the innermost.
        spans = [(m, self._span(call)) for m, call in calls if isinstance(call, Traced)]
        for m, span in sorted(spans, key=lambda pair: -len(pair[1])):
            found.update(dict.fromkeys(span, self.modules[id(m)]))
        for node in self.order:
            for e in node.edges:
                owners = [] if e is None else self.owners.get(id(e[0]), [])
                if len(owners) == 1:
                    found[id(node)] = owners[0]
        for m, call in calls:
            for node in _nodes_of(call, self.layers):
                found[id(node)] = self.modules[id(m)]
        for node in self.order:
            caller = self.callers.get(id(getattr(node, "caller", None)))
            if caller is not None:
                found.update(dict.fromkeys(_of_one_call(node), caller))
        for node in self.order:
            origin = origin_of(node)
            if origin is not None:
                module = None if origin.module is None else origin.module()
                found[id(node)] = self.modules.get(id(module), ("", ""))
        return found

    def _span(self, call: Traced) -> set[int]:
        """The nodes between the inputs and the outputs of a module's call."""
        starts = [call._edge(held) for held in call.starts]
        ends = [call._edge(held) for held in call.ends]
        stop = {id(e[0]) for e in ends if e is not None}
        found: set[int] = set()
        waiting = [e[0] for e in starts if e is not None]
        while waiting:
            node = waiting.pop()
            if not isinstance(node, Node) or id(node) in found or id(node) in stop:
                continue
            if node.sequence < call.began:
                continue  # recorded before, for an argument that is not among the starts
            if id(node) not in self.nodes:
                return set()  # an earlier call, or another graph
            found.add(id(node))
            found.update(map(id, self.layers.get(id(node), ())))
            waiting += [e[0] for e in node.edges if e is not None]
        return found

    def module_of(self, node: Node) -> tuple[str, str]:
        """The name of the module that recorded `node`, and its class."""
        return self.of_nodes.get(id(node), ("", ""))

    # -- results and leaves ------------------------------------------------------------------

    def unique(self, stem: str) -> str:
        """A name in the source, to which `d_` may be prefixed."""
        name, count = stem, 1
        while name in self.taken or f"d_{name}" in self.taken or _TEMPORARY.fullmatch(name):
            count += 1
            name = f"{stem}_{count}"
        self.taken.update((name, f"d_{name}"))
        return name

    def _labels(self) -> dict[int, list[str]]:
        """The names of the results of each node."""
        kinds: dict[tuple[str, str], set[type[Operation]]] = {}
        for node in self.order:
            kinds.setdefault(self.module_of(node), set()).add(node.function)
        stands_for = {id(inner[-1]): key for key, inner in self.layers.items()}
        made: dict[int, list[str]] = {}
        for node in reversed(self.order):
            module = self.module_of(node)
            stem = re.sub(r"(Backward\d*)?$", "", bare(node.name())).lower()
            stem = identifier(stem) if stem.isidentifier() else "operation"
            if module[0]:
                name = identifier(*module)
                stem = name if len(kinds[module]) == 1 else f"{name}_{stem}"
            several = len(node.outputs) > 1
            made[id(node)] = [
                self.unique(
                    self.results.get((id(node), i))
                    or self.results.get((stands_for.get(id(node), 0), i))
                    or (f"{stem}_{i}" if several else stem)
                )
                for i in range(len(node.outputs))
            ]
        return made

    def of_leaf(self, leaf: torch.Tensor) -> str:
        """As in `named_parameters`; else the caller's name for it."""
        name = self.leaves.get(id(leaf)) or self.tensors.get(id(leaf))
        if name is None:
            name = f"leaf{sum(known.startswith('leaf') for known in self.leaves.values()) + 1}"
        self.leaves[id(leaf)] = name
        if name not in self.identifiers:
            owners = self.owners.get(id(leaf))
            self.identifiers[name] = self.unique(identifier(name, owners[0][1] if owners else ""))
        return name


def origin_of(node: Node) -> Origin | None:
    """Where the call of `node` was made, if that is known for certain."""
    own: Origin | None = vars(node).get("origin")
    if own is None and node.signature is not None:
        first = node.signature.origin
        if first is not None and first[0] == node.sequence:
            own = first[1]
    return own


def variables_of(frame: FrameType | None) -> dict[str, object]:
    """The variables that the caller sees, and the attributes of its `self`."""
    if frame is None:
        return {}
    code, found = frame.f_code, dict(frame.f_locals)
    if code.co_argcount:
        own = getattr(found.get(code.co_varnames[0]), "__dict__", None)
        for name, value in own.items() if isinstance(own, dict) else ():
            found.setdefault(name, value)
    for name, value in frame.f_globals.items():
        found.setdefault(name, value)
    return found


def place_of(node: Node) -> Place | None:
    """Where the call of `node` was made, if that is known for certain."""
    leaves.keep_apart()
    origin = origin_of(node)
    line = None if origin is None else origin.line
    if origin is None or origin.code is None or line is None:
        return None
    filename = origin.code.co_filename
    return Place(filename, line, linecache.getline(filename, line).strip(), origin.code.co_qualname)


def argument_name(node: Node, place: int) -> str:
    """The name of an argument in the rule."""
    formulas = node.function.formulas
    if formulas is None:
        return f"input_{place}"
    count = len(formulas.names)
    return formulas.names[place] if place < count else f"{formulas.rest}_{place - count}"


def _of_one_call(last: Node) -> set[int]:
    """The nodes that a layer recorded in the call that ended with `last`."""
    found, waiting = {id(last)}, [last]
    began = getattr(last, "began", None)
    while waiting and began is not None:
        for target, _ in filter(None, waiting.pop().edges):
            is_new = id(target) not in found
            if isinstance(target, Node) and is_new and target.sequence > began:
                found.add(id(target))
                waiting.append(target)
    return found


def _call_of(module: Module) -> object:
    """What a module keeps from its latest call."""
    call: Any = module.__dict__.get("_call")
    while not isinstance(call, Node) and hasattr(call, "call"):
        call = call.call  # of a layer given a tuple; of one that is watched
    return call


def _nodes_of(call: object, layers: Mapping[int, Sequence[Node]] | None = None) -> Iterator[Node]:
    """The nodes that the latest call of a module made, as far as it is known to have made them.

    Without `layers`, all nodes that are related to it.
    """
    if isinstance(call, Node):
        yield call
    elif isinstance(call, NodeCall):
        yield call.node
    elif isinstance(call, Each):
        for one in call.calls:
            yield from _nodes_of(one, layers)
    elif isinstance(call, Traced) and layers is None:
        targets = (e[0] for e in map(call._edge, call.starts) if e is not None)
        yield from (target for target in targets if isinstance(target, Node))
    elif isinstance(call, PartCall) and (whole := call.last[0]) is not None:
        if whole.segment is None:
            yield nodes(whole)[call.place]
        elif layers is None:
            yield whole
        elif id(whole) in layers:
            yield layers[id(whole)][call.place]
