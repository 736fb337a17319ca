"""Driving a net by hand: the calls that `Module.backward` differentiates.

Each forward stores a `Call` in its module. Called with the gradient of the output, it accumulates
the parameters' `.grad` and returns the gradient of the input. For a layer it is the one recorded
call, for a Sequential the chain of its children's calls, and for any other module the part of the
graph between its inputs and its output.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from .. import tape, walk
from .._torch import DisableTorchFunctionSubclass
from ..exact.mode import chosen
from ..fast.signature import of_tensor
from ..grad_mode import is_grad_enabled
from ..gradients import between, start_grad
from ..node import FREED, Edge, Node
from ..operation import Operation
from ..parameter import Parameter
from ..tensor import Tensor, no_complex

# Of a module's output or input: a tensor, a tuple for a tuple, or None.
Gradient: TypeAlias = "torch.Tensor | tuple[Gradient, ...] | None"
Call: TypeAlias = Callable[[Gradient], Gradient]
# An edge, or the same with a weak reference to its target.
_Held: TypeAlias = tuple[Any, int]


class NodeCall:
    """The call of one layer: its node, whether or not anything required grad."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __call__(self, gradient: Gradient = None) -> Gradient:
        node = self.node
        if node._saved is None:
            raise RuntimeError(FREED)
        place = node.function.input_place
        with DisableTorchFunctionSubclass():
            started = start_grad(node.outputs[0], gradient, 0)
            needs = node.needs_input_grad
            node.needs_input_grad = (*needs[:place], True, *needs[place + 1 :])
            try:
                results = node.run([started])
            finally:
                node.needs_input_grad = needs
            node.free()
            wanted, grads = results[place], walk.validate_outputs(node, results)
        grads[place] = None
        on = [
            (edge, grad)
            for edge, grad in zip(node.edges, grads, strict=True)
            if edge is not None and grad is not None
        ]
        if on:
            walk.walk([edge for edge, _ in on], [grad for _, grad in on])
        return wanted


class Untracked:
    """The same where nothing required grad: the node is made when it is needed.

    For a rule whose node saves nothing but arguments and the result (see `Operation.can_wait`).
    """

    def __init__(self, function: type[Operation], args: tuple[object, ...], out: object) -> None:
        needed = function.formulas.by_hand  # type: ignore[union-attr]
        with DisableTorchFunctionSubclass():
            result = out if needed[-1] else None
            if isinstance(result, torch.Tensor):
                result = result.detach()  # what is assigned to its `.data` later is not used
            values: list[Any] = [*args, result]
            for i, value in enumerate(args[: len(needed) - 1]):
                if type(value) is Parameter:  # what is assigned to `.data` later is not used
                    values[i] = value._plain
                elif not isinstance(value, torch.Tensor):
                    continue
                elif not needed[i] and value.layout is torch.strided:
                    values[i] = _Layout(of_tensor(value))  # it is not kept alive
                elif function.saved_memory is not None:
                    values[i] = value.detach()
            self.function, self.outputs = function, (tape.meta_of(out),)
            self.values = values  # by place; the result comes last, as in a plan
            try:
                self.versions = [v._version if isinstance(v, torch.Tensor) else 0 for v in values]
            except RuntimeError:  # one of inference mode
                self.versions = []
        self.node: Node | None = None

    def made(self) -> Node:
        """The node that `record` would have made."""
        if not self.versions:
            raise RuntimeError(FREED)
        *args, out = [v.made() if type(v) is _Layout else v for v in self.values]
        if any(isinstance(a, torch.Tensor) and a.is_complex() for a in args):
            raise no_complex(self.function.__name__)
        node = Node(self.function)
        node.places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        node.edges = (None,) * len(args)
        node.needs_input_grad = (False,) * len(args)
        node.outputs = self.outputs
        formulas = self.function.formulas
        assert formulas is not None
        formulas.keep(node, tuple(args), out)
        plan = node.plan
        assert plan is not None
        for i in plan.copied:
            place = plan.saves[i]
            given, expected = self.values[place], self.versions[place]
            if given._version != expected:
                raise RuntimeError(node._modified(given, expected, None, None))
        if plan.saves:
            node._versions = [
                0 if i in plan.copied else self.versions[place]
                for i, place in enumerate(plan.saves)
            ]
        return node

    def __call__(self, gradient: Gradient = None) -> Gradient:
        with DisableTorchFunctionSubclass():
            if self.node is None:
                self.node = self.made()
                self.values = []
        return NodeCall(self.node)(gradient)


def untracked(function: type[Operation], args: tuple[object, ...], out: object) -> Untracked | None:
    """The call of a layer that got no node from `record`; None if grad mode is off, and inside a
    transform."""
    if not is_grad_enabled() or tape.in_transform_or_forward_mode():
        return None
    return Untracked(chosen(function), args, out)


class _Layout(NamedTuple):
    """The layout of a tensor, in its place."""

    key: tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]

    def made(self) -> torch.Tensor:
        shape, stride, dtype, _ = self.key
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def way_back(call: Node | Call | None) -> Call | None:
    """The `Call` that a forward stored in its module; a layer stores only its node."""
    return NodeCall(call) if isinstance(call, Node) else call


class OfComplex:
    """The call of a layer on complex numbers, whose gradients are not mirrored."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, gradient: Gradient = None) -> Gradient:
        raise no_complex(self.name)


class Each:
    """The calls of one layer on the items of a tuple."""

    def __init__(self, calls: Sequence[Call | None]) -> None:
        self.calls = calls

    def __call__(self, gradients: Gradient = None) -> tuple[Gradient, ...]:
        gradients = _as_many(gradients, len(self.calls))
        return tuple(_made(call)(g) for call, g in zip(self.calls, gradients, strict=True))


class Stacked:
    """The call of one layer on the items of a tuple stacked to a batch."""

    def __init__(self, call: Call | None, items: int) -> None:
        self.call = call
        self.items = items

    def __call__(self, gradients: Gradient = None) -> tuple[Gradient, ...]:
        with DisableTorchFunctionSubclass():
            batch = torch.stack(_as_many(gradients, self.items))
        grads = _made(self.call)(batch)
        assert isinstance(grads, torch.Tensor)
        return tuple(grads.unbind(0))


class Chain:
    """The calls of a Sequential's modules, in the order in which they were made."""

    def __init__(self, calls: Sequence[Call | None]) -> None:
        self.calls = calls

    def __call__(self, gradient: Gradient = None) -> Gradient:
        for call in reversed(self.calls):
            gradient = _made(call)(gradient)
        return gradient


class Traced:
    """The part of the graph between the inputs of a module's forward and its outputs.

    With `weakly`, the reference to the graph is weak: for a graph whose hooks refer to the module,
    which must not keep it alive. Every call that the forward recorded has a number above `began`.
    """

    starts: Sequence[_Held | None]
    ends: Sequence[_Held | None]

    def __init__(
        self, inputs: tuple[object, ...], output: object, weakly: bool = False, began: int = -1
    ) -> None:
        self.weakly, self.began = weakly, began
        self.single = True
        if type(output) is Tensor and output._view_of is None and output._node and not weakly:
            self.starts = ((output._node, output._output_nr),)  # nearly always
        else:
            self.single = not isinstance(output, tuple)
            outputs = output if isinstance(output, tuple) else (output,)
            self.starts = [self._held(y) for y in outputs]
        if len(inputs) == 1 and type(inputs[0]) is torch.Tensor and not inputs[0].requires_grad:
            self.ends = _NOWHERE
        else:
            self.ends = [self._held(x) for x in inputs]

    @classmethod
    def between(cls, start: Node, end: Edge, began: int) -> "Traced":
        """The same for a module with one output, that of the node `start`, and one input, whose
        gradient goes to `end`."""
        made = cls.__new__(cls)
        made.weakly, made.single, made.began = False, True, began
        made.starts, made.ends = ((start, 0),), (end,)
        return made

    def _held(self, value: Any) -> _Held | None:
        # The common cases first.
        if type(value) is torch.Tensor and not value.requires_grad:
            return None
        edge = tape.usual_edge(value)
        if edge is not None and not self.weakly:
            return edge
        if not (isinstance(value, torch.Tensor) and value.requires_grad):
            return None
        target, index = tape.edge_of(value)
        return (weakref.ref(target) if self.weakly else target), index

    def _edge(self, held: _Held | None) -> Edge | None:
        if held is None:
            return None
        target = held[0]() if self.weakly else held[0]
        if target is None:
            raise RuntimeError(
                "nnmirror: the graph of this forward is gone; with full backward hooks on the"
                " module, keep its output until backward()"
            )
        return target, held[1]

    def __call__(self, gradient: Gradient = None) -> Gradient:
        gradients = (gradient,) if self.single else _as_many(gradient, len(self.starts))
        starts = [(self._edge(held), g) for held, g in zip(self.starts, gradients, strict=True)]
        ends = [self._edge(held) for held in self.ends]
        found = iter(
            between(
                [(edge, g) for edge, g in starts if edge is not None],
                [edge for edge in ends if edge is not None],
            )
        )
        grads = tuple(None if edge is None else next(found) for edge in ends)
        return grads[0] if len(grads) == 1 else grads


_NOWHERE = (None,)


def _made(call: Call | None) -> Call:
    if call is None:
        raise RuntimeError(
            "nnmirror: backward() reached a module whose forward was not recorded (grad mode was"
            " off, or it defines neither forward nor backward)"
        )
    return call


def _as_many(gradients: Gradient, count: int) -> tuple[Any, ...]:
    if gradients is None:
        return (None,) * count
    if not isinstance(gradients, tuple) or len(gradients) != count:
        got = f"{len(gradients)}" if isinstance(gradients, tuple) else type(gradients).__name__
        raise RuntimeError(
            f"nnmirror: the forward returned a tuple of {count} tensors, so backward() takes a"
            f" tuple of {count} gradients, but got {got}"
        )
    return gradients
