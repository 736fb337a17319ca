"""How `nnmirror.explain` goes back over a graph, and makes the records of it."""

from collections.abc import Sequence

import torch

from . import tape as _tape
from . import walk as _walk
from ._torch import DisableTorchFunctionSubclass
from .explanation import Explanation, Input, Leaf, Operation, Result
from .modules.module import Module
from .naming import Names, identifier
from .watch import _documented as documented


def explained(
    tensor: torch.Tensor, modules: Sequence[Module], gradient: torch.Tensor | None
) -> Explanation:
    """The explanation of the graph behind `tensor`."""
    (grad,) = _walk.make_grads([tensor], [gradient])
    with DisableTorchFunctionSubclass(), torch.no_grad():
        return Explainer(tensor, modules).go_back(grad)


class Explainer:
    """Goes back over a graph as the generic walk does, and leaves it as it was."""

    def __init__(self, tensor: torch.Tensor, modules: Sequence[Module]) -> None:
        self.root = _tape.edge_of(tensor)
        self.order: list[_tape.Node] = []
        # In place of the node of a segment come those of its layers.
        self.stands_for: dict[int, _tape.Node] = {}
        for node in sorted(
            _walk.dependencies([self.root], expanding=False)[1], key=lambda node: -node.sequence
        ):
            if node.segment is None:
                self.order.append(node)
            else:
                layers = node.segment.nodes(node)
                self.stands_for[id(node)] = layers[-1]
                self.order += reversed(layers)
        self.index = {id(node): i for i, node in enumerate(self.order)}
        for key, node in self.stands_for.items():
            self.index[key] = self.index[id(node)]
        self.names = Names(self.order, self.stands_for, modules)
        self.leaves: dict[int, torch.Tensor] = {}
        self.leaf_grads: dict[int, torch.Tensor] = {}

    def go_back(self, grad: torch.Tensor) -> Explanation:
        slots: dict[int, list[torch.Tensor | None]] = {}
        self.arrive(slots, self.root, grad)
        operations = []
        for i, node in enumerate(self.order):
            given = slots.pop(i, [None] * len(node.outputs))
            if all(g is None for g in given):
                results: list[torch.Tensor | None] = [None] * len(node.edges)
            else:
                results = _walk.validated(node, node.run(list(given)))
            for edge, result in zip(node.edges, results, strict=True):
                if edge is not None and result is not None:
                    self.arrive(slots, edge, result)
                elif edge is not None and type(edge[0]) is not _tape.Node:
                    self.leaves.setdefault(id(edge[0]), edge[0])
            operations.append(self.operation(i, node, given, results))
        leaves = {}
        for key, leaf in self.leaves.items():
            name = self.names.of_leaf(leaf)
            leaves[name] = Leaf(
                name,
                identifier(name),
                self.names.is_parameter(leaf),
                leaf.detach(),
                self.leaf_grads.get(key),
            )
        return Explanation(operations, leaves)

    def arrive(
        self, slots: dict[int, list[torch.Tensor | None]], edge: _tape.Edge, grad: torch.Tensor
    ) -> None:
        target, index = edge
        if type(target) is not _tape.Node:
            self.leaves.setdefault(id(target), target)
            held = self.leaf_grads.get(id(target))
            self.leaf_grads[id(target)] = grad if held is None else held + grad
            return
        i = self.index[id(target)]
        to = slots.setdefault(i, [None] * len(self.order[i].outputs))
        held = to[index]
        to[index] = grad if held is None else held + grad

    def operation(
        self,
        i: int,
        node: _tape.Node,
        given: Sequence[torch.Tensor | None],
        results: Sequence[torch.Tensor | None],
    ) -> Operation:
        plan = node.plan
        module, kind = self.names.of_node(node)
        saved: dict[str, torch.Tensor] = {}
        for k, t in enumerate(node._saved or ()):
            if t is not None:
                name = plan.names[k] if plan is not None and k < len(plan.names) else f"saved{k}"
                saved[name] = t.detach()
        arguments = {}
        if plan is not None:
            arguments = dict(plan.arguments or zip(plan.given_names, node.given, strict=False))
        inputs = []
        for place, edge in enumerate(node.edges):
            if place not in node.places:
                continue
            inputs.append(self.input(node, place, edge, results[place], saved))
        label = self.names.label(node)
        outputs = [
            Result(
                label if len(node.outputs) == 1 else f"{label}_{k}",
                tuple(meta[0]),
                meta[1],
                None,
                g,
            )
            for k, (meta, g) in enumerate(zip(node.outputs, given, strict=True))
            if meta is not None
        ]
        return Operation(
            i,
            _tape.bare(node.name()),
            module,
            kind,
            documented(node.function),
            tuple(outputs),
            tuple(inputs),
            saved,
            arguments,
        )

    def input(
        self,
        node: _tape.Node,
        place: int,
        edge: _tape.Edge | None,
        gradient: torch.Tensor | None,
        saved: dict[str, torch.Tensor],
    ) -> Input:
        formulas = node.function.formulas
        name = f"input{place}"
        if formulas is not None:
            if place < len(formulas.names):
                name = formulas.names[place]
            else:
                name = f"{formulas.rest}_{place - len(formulas.names)}"
        value = saved.get(name)
        operation, output, leaf, meta = None, 0, None, None
        if value is not None:
            meta = value.shape, value.dtype
        if edge is not None:
            target, output = edge
            if type(target) is _tape.Node:
                operation = self.index[id(target)]
                meta = target.outputs[output][:2]
            else:
                leaf = self.names.of_leaf(target)
                value, meta = target.detach(), (target.shape, target.dtype)
        shape, dtype = (None, None) if meta is None else (tuple(meta[0]), meta[1])
        return Input(name, operation, output, leaf, shape, dtype, value, gradient)
