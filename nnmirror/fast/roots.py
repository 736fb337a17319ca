"""Where a walk starts: one node, also for a backward from several results with given gradients.

`grad(outputs, inputs, grad_outputs)` of several outputs, as in a product with a Hessian, begins at
a node in front of them, whose backward gives each its gradient. So it has a signature like others.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .._state import sequence as _sequence
from ..constants import constant
from ..node import Edge, Node
from ..operation import Operation
from .signing import give_signature, signature_at, signed_call

T = torch.Tensor


class Roots(Operation):
    """(y1, v1), (y2, v2) ...:  dy1 = v1, dy2 = v2 ...  Saved: v1, v2 ..."""

    is_rule = True

    @staticmethod
    def backward(ctx: Node, g: T) -> tuple[T | None, ...]:  # type: ignore[override]
        gradients = ctx.saved_tensors
        return (*gradients, *[None] * len(gradients))


def start_of(edges: Sequence[Edge], grads: Sequence[T]) -> tuple[Node, T] | None:
    """The node that a walk from these edges starts at, and the gradient that it is given; None if
    there is no such node with a signature."""
    if any(type(grad) is not T for grad in grads):
        return None
    if len(edges) == 1:
        node = edges[0][0]
        if not isinstance(node, Node) or len(node.outputs) != 1:
            return None
        return node, grads[0]
    args: tuple[Any, ...] = (*[None] * len(edges), *grads)
    all_edges = [*edges, *[None] * len(grads)]
    signs = [None if edge is None else signature_at(edge) for edge in all_edges]
    call = signed_call(Roots, args, all_edges, signs)
    if call is None:
        return None
    root = Node(Roots)
    root.edges = all_edges
    root.places, root.needs_input_grad = [*range(len(edges))], (True,) * len(edges)
    root.save_for_backward(*grads)
    one = constant(1.0, grads[0].dtype, grads[0].device)
    root.outputs = ((one.shape, one.dtype, one.device),)
    root.sequence = next(_sequence)
    give_signature(root, call, args, None, makes_new=False)
    return root, one
