"""Driving a net by hand: what `Module.backward` goes back over.

Each forward leaves a `Call` with its module: called with the gradient of the output, it
adds to the parameters' `.grad` and returns the gradient for the input. A layer's is its
one recorded call, a Sequential's the chain of its children's, and any other module's the
piece of tape between its inputs and its output.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch._C import DisableTorchFunctionSubclass

from .. import tape, walk

Call: TypeAlias = Callable[[Any], Any]


class Recorded:
    """The call of one layer: its node, whether or not anything required grad."""

    def __init__(self, node: tape.Node) -> None:
        self.node = node

    def __call__(self, gradient: Any = None) -> Any:
        node = self.node
        place = node.function.input_place
        with DisableTorchFunctionSubclass():
            started = walk.start_grad(node.outputs[0], gradient, 0)
            needs = node.needs_input_grad
            node.needs_input_grad = (*needs[:place], True, *needs[place + 1 :])
            try:
                grads = list(node.run([started]))
            finally:
                node.needs_input_grad = needs
            node.free()
        wanted, grads[place] = grads[place], None
        on = [
            (edge, grad)
            for edge, grad in zip(node.edges, grads, strict=True)
            if edge is not None and grad is not None
        ]
        if on:
            walk.walk([edge for edge, _ in on], [grad for _, grad in on])
        return wanted


class Each:
    """The calls of one layer on the items of a tuple."""

    def __init__(self, calls: Sequence[Call | None]) -> None:
        self.calls = calls

    def __call__(self, gradients: Any = None) -> tuple[Any, ...]:
        gradients = _as_many(gradients, len(self.calls))
        return tuple(_made(call)(g) for call, g in zip(self.calls, gradients, strict=True))


class Stacked:
    """The call of one layer on the items of a tuple stacked to a batch."""

    def __init__(self, call: Call | None, items: int) -> None:
        self.call = call
        self.items = items

    def __call__(self, gradients: Any = None) -> tuple[Any, ...]:
        gradients = _as_many(gradients, self.items)
        with DisableTorchFunctionSubclass():
            batch = torch.stack(gradients)
        return tuple(_made(self.call)(batch).unbind(0))


class Chain:
    """The calls of a Sequential's modules, in the order in which they were made."""

    def __init__(self, calls: Sequence[Call | None]) -> None:
        self.calls = calls

    def __call__(self, gradient: Any = None) -> Any:
        for call in reversed(self.calls):
            gradient = _made(call)(gradient)
        return gradient


class Traced:
    """The tape between the inputs of a module's forward and what it returned."""

    def __init__(self, inputs: tuple[Any, ...], output: Any) -> None:
        self.inputs = inputs
        self.output = output

    def __call__(self, gradient: Any = None) -> Any:
        outputs = self.output if isinstance(self.output, tuple) else (self.output,)
        gradients = _as_many(gradient, len(outputs)) if len(outputs) > 1 else (gradient,)
        if isinstance(self.output, tuple) and isinstance(gradient, tuple):
            gradients = gradient
        places = [
            i for i, x in enumerate(self.inputs) if isinstance(x, torch.Tensor) and x.requires_grad
        ]
        found = walk.backward_to(outputs, gradients, [self.inputs[i] for i in places])
        grads: list[Any] = [None] * len(self.inputs)
        for place, grad in zip(places, found, strict=True):
            grads[place] = grad
        return grads[0] if len(grads) == 1 else tuple(grads)


def _made(call: Call | None) -> Call:
    if call is None:
        raise RuntimeError(
            "nnmirror: backward() reached a module whose forward was not recorded (grad mode was"
            " off, or it defines neither forward nor backward)"
        )
    return call


def _as_many(gradients: Any, count: int) -> tuple[Any, ...]:
    if gradients is None:
        return (None,) * count
    if not isinstance(gradients, tuple) or len(gradients) != count:
        got = f"{len(gradients)}" if isinstance(gradients, tuple) else type(gradients).__name__
        raise RuntimeError(
            f"nnmirror: the forward returned a tuple of {count} tensors, so backward() takes a"
            f" tuple of {count} gradients, but got {got}"
        )
    return gradients
