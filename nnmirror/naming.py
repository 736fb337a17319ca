"""The reader's names of what a graph consists of: its parameters, modules and operations."""

import gc
import re
from collections.abc import Sequence
from typing import Any

import torch

from . import tape as _tape
from .modules.explicit import Traced
from .modules.module import Module


def identifier(name: str) -> str:
    """`name` as Python takes it: fc2_weight for fc2.weight, _0_weight for 0.weight."""
    made = re.sub(r"\W", "_", name)
    return made if made.isidentifier() else f"_{made}"


class Names:
    """Of one graph. The modules are those given; else those alive that made it."""

    def __init__(
        self,
        order: Sequence[_tape.Node],
        stands_for: dict[int, _tape.Node],
        modules: Sequence[Module],
    ) -> None:
        roots = list(modules) or _roots()
        self.leaf_names: dict[int, str] = {}
        self.modules: dict[int, tuple[str, str]] = {}  # of a node: the module's name, its class
        self.labels: dict[int, str] = {}
        used: set[str] = set()
        nodes = {id(node) for node in order}
        leaves = {
            id(e[0])
            for node in order
            for e in node.edges
            if e is not None and type(e[0]) is not _tape.Node
        }
        for root in roots:
            for name, p in root.named_parameters():
                if id(p) in leaves:
                    self.leaf_names.setdefault(id(p), name)
            for name, module in root.named_modules():
                call = module.__dict__.get("_call")
                if isinstance(call, _tape.Node) and id(call) in nodes:
                    self.modules[id(call)] = name, type(module).__name__
                elif isinstance(call, Traced):
                    pass
        owner: dict[int, tuple[str, str]] = {}
        for root in roots:
            for name, module in root.named_modules():
                for p in module._parameters.values():
                    owner.setdefault(id(p), (name, type(module).__name__))
        for node in order:
            for e in node.edges:
                if e is not None and id(e[0]) in owner and id(node) not in self.modules:
                    self.modules[id(node)] = owner[id(e[0])]
        for node in reversed(order):
            module = self.modules.get(id(node), ("", ""))[0]
            stem = identifier(module) if module else _stem(node)
            label, n = stem, 1
            while label in used:
                n += 1
                label = f"{stem}_{n}"
            used.add(label)
            self.labels[id(node)] = label

    def of_leaf(self, leaf: torch.Tensor) -> str:
        name = self.leaf_names.get(id(leaf))
        if name is None:
            name = self.leaf_names[id(leaf)] = f"leaf{len(self.leaf_names)}"
        return name

    def is_parameter(self, leaf: Any) -> bool:
        return type(leaf).__name__ == "Parameter"

    def of_node(self, node: _tape.Node) -> tuple[str, str]:
        return self.modules.get(id(node), ("", ""))

    def label(self, node: _tape.Node) -> str:
        return self.labels[id(node)]


def _stem(node: _tape.Node) -> str:
    name = _tape.bare(node.name())
    return identifier(re.sub(r"Backward\d*$", "", name)).lower()


def _roots() -> list[Module]:
    """The modules alive that are part of no other."""
    found = [m for m in gc.get_objects() if issubclass(type(m), Module)]
    inner = {id(child) for m in found for child in m.__dict__.get("_modules", {}).values()}
    return [m for m in found if id(m) not in inner]
