"""The backward, step by step: `nnmirror.steps`, and `backward` in plain mode."""

import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter
from types import FrameType
from typing import TYPE_CHECKING

import torch

from . import _torch, documented
from . import tensor as _tensor
from ._torch import DisableTorchFunctionSubclass
from ._upcalls import implements
from .gradients import _roots, expect_tracked, make_grads
from .tensor import bare
from .walk import Stop, Walk

if TYPE_CHECKING:
    from .explaining.explanation import Place
    from .explaining.naming import Names
    from .modules.module import Module
    from .node import Edge

T = torch.Tensor


def steps(
    tensor: T, *modules: "Module", gradient: T | None = None, retain_graph: bool = False
) -> "Iterator[Step]":
    """Run `tensor.backward(gradient)`, stopping before each operation.

        for step in nnmirror.steps(loss):
            print(step.module, step.node, step.formula, step.gradient.norm())

    Yields a `Step` for each operation, in the order of the backward. The step is run when the loop
    continues, or by `step.take()`. At the end each leaf has the `.grad` that `backward` gives it,
    with the same bits, and hooks have been called. Modules have the names that they have in
    `modules`, or else in the modules that are alive.

    If the loop is left early, the remaining steps are not run. A leaf has its `.grad` if all of its
    gradients had arrived, and is unchanged otherwise. The saved tensors of the steps that were run
    are freed unless `retain_graph`, so that the graph cannot be used again.

    RuntimeError, as PyTorch's, if `tensor` does not require grad, if it is not a scalar and
    `gradient` is not given, or if its graph was freed. TypeError if it is not the mirror's.
    """
    expect_tracked("steps", tensor, modules)
    grads = make_grads([tensor], [gradient])
    return _steps(_roots([tensor]), grads, retain_graph, modules, sys._getframe(1))


def _steps(
    edges: "Sequence[Edge]",
    grads: Sequence[T],
    retain_graph: bool,
    modules: "Sequence[Module]",
    frame: FrameType | None,
) -> "Iterator[Step]":
    from .explaining.naming import Names, variables_of

    walk = Walk(edges, retain_graph, stops=True)
    order = sorted(walk.order, key=attrgetter("sequence"), reverse=True)
    names = Names(order, {}, modules, variables_of(frame))
    del frame
    step = Step(walk, walk.go_back(grads, keeps=True), names)
    while step.advance():
        yield (step := step.following)


@implements(_tensor)
def backward_plainly(
    tensors: Sequence[T], gradients: Sequence[T | None], retain_graph: bool
) -> None:
    """`backward` in plain mode."""
    grads = make_grads(tensors, gradients)
    walk = Walk(_roots(tensors), retain_graph, stops=True)
    with _running(walk):
        deque(walk.go_back(grads), maxlen=0)


@contextlib.contextmanager
def _running(walk: Walk) -> Iterator[None]:
    """`walk` goes on within it."""
    mode = torch.is_grad_enabled()
    _torch.set_grad_enabled(False)
    try:
        with DisableTorchFunctionSubclass(), walk:
            yield
    finally:
        _torch.set_grad_enabled(mode)


class Step:
    """One operation of the backward, before it is run."""

    following: "Step"

    def __init__(
        self, walk: Walk, stops: Iterator[Stop], names: "Names", stop: Stop | None = None
    ) -> None:
        self._walk, self._stops, self._names = walk, stops, names
        self._is_taken = False
        if stop is not None:
            self._node, self._gradients, self._results = stop

    def advance(self) -> bool:
        """Run it, and prepare the next one; False if there is none."""
        if not self._is_taken:
            self._is_taken = True
            with _running(self._walk):
                stop = next(self._stops, None)
            if stop is not None:
                self.following = Step(self._walk, self._stops, self._names, stop)
        return hasattr(self, "following")

    def take(self) -> dict[str, T]:
        """Run it now, not when the loop continues; returns `input_gradients`."""
        self.advance()
        return self.input_gradients or {}

    @property
    def node(self) -> str:
        """The operation, as PyTorch names it: "TanhBackward0"."""
        return bare(self._node.name())

    @property
    def module(self) -> str:
        """The module that called it, as in `named_modules`; "" for the outermost, or none."""
        return self._names.module_of(self._node)[0]

    @property
    def module_class(self) -> str:
        """The name of the module's class; "" if no module is known."""
        return self._names.module_of(self._node)[1]

    @property
    def name(self) -> str:
        """The name of its (first) result, as in `nnmirror.explain`."""
        return self._names.labels[id(self._node)][0]

    @property
    def computes(self) -> str:
        """The formula of the forward: "y = tanh(x)"."""
        return documented.value(self._node.function)

    @property
    def formula(self) -> str:
        """The formulas of its gradients: "dx = g (1 - y^2)"."""
        return documented.gradients(self._node.function)

    @property
    def place(self) -> "Place | None":
        """Where it was called, if that is certain."""
        from .explaining.naming import place_of

        return place_of(self._node)

    @property
    def gradients(self) -> tuple[T | None, ...]:
        """The gradients of its results, after their hooks; None for a result without one."""
        return tuple(self._gradients)

    @property
    def gradient(self) -> T | None:
        """The gradient of its (first) result, after its hooks."""
        return self._gradients[0]

    @property
    def input_gradients(self) -> dict[str, T] | None:
        """The gradients of its inputs, by the rule's names; None before it is run."""
        if not self._results:
            return None
        from .explaining.naming import argument_name

        return {
            argument_name(self._node, place): grad
            for place, grad in enumerate(self._results)
            if grad is not None
        }

    def __repr__(self) -> str:
        where = f"{self.module}: " if self.module else ""
        return f"<Step {where}{self.node}, {self.formula}>"
