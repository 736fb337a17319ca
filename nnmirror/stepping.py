"""The backward, step by step: `nnmirror.steps`, and `backward` in plain mode.

A short form of the walk in walk.py, which also handles bound walks and `inputs=`. The order is the
same, and so are the bits.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter, itemgetter
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from . import _state, _torch, beyond, documented
from . import tensor as _tensor
from . import walk as _walk
from ._torch import DisableTorchFunctionSubclass
from ._upcalls import implements
from .gradients import _roots, expect_tracked, make_grads
from .node import NO_FURTHER, Edge, Node
from .parameter import Parameter
from .tensor import bare

if TYPE_CHECKING:
    from .explaining.explanation import Place
    from .explaining.naming import Names
    from .modules.module import Module

T = torch.Tensor
_recorded_at, _target = attrgetter("sequence"), itemgetter(0)
# A step of a `node`: the `gradients` of its results, and `results`, those of its inputs.
Taking = SimpleNamespace
_HOOKS = {"_leaf_hooks", "_post_accumulate_hooks", "_accumulate_hooks", "_reached_hooks"}
_OURS = {Node, _tensor.Tensor, Parameter}


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
    walk = Walk(_roots([tensor]), retain_graph)
    walk.is_prompt = True
    return _steps(walk, grads, modules, sys._getframe(1))


def _steps(
    walk: "Walk", grads: Sequence[T], modules: "Sequence[Module]", frame: FrameType | None
) -> "Iterator[Step]":
    from .explaining.naming import Names, variables_of

    with walk:
        walk.start(grads)
        walk.look_ahead()
        order = sorted(walk.order, key=_recorded_at, reverse=True)
        names = Names(order, {}, modules, variables_of(frame))
    del frame
    step = Step(walk, walk.go_back(), names)
    while step.advance():
        yield (step := step.following)


@implements(_tensor)
def backward_plainly(
    tensors: Sequence[T], gradients: Sequence[T | None], retain_graph: bool
) -> None:
    """`backward` in plain mode."""
    mode = torch.is_grad_enabled()
    _torch.set_grad_enabled(False)
    try:
        with DisableTorchFunctionSubclass():
            walk = _started(tensors, gradients, retain_graph)
            try:
                deque(walk.go_back(), maxlen=0)
            except BaseException:
                walk.finish()  # if it raised: as far as it got
                raise
    finally:
        _torch.set_grad_enabled(mode)


def _started(tensors: Sequence[T], gradients: Sequence[T | None], retain_graph: bool) -> "Walk":
    own: Any = vars(tensors[0])
    node, view = own.get("_node"), own.get("_view_of")
    usual = node and not (view or node.segment or tensors[0].dim() or len(tensors) > 1)
    if usual and gradients[0] is None and len(node.outputs) == 1:  # the usual case, in few lines
        walk = Walk([(node, 0)], retain_graph)
        walk.waiting[node] = [torch.ones_like(tensors[0])]
        return walk
    grads = make_grads(tensors, gradients)
    walk = Walk(_roots(tensors), retain_graph)
    walk.start(grads)
    return walk


# What a walk replaces while it is the current one: dispatch, grad mode, and the outer walk.
_Outer: TypeAlias = tuple[
    AbstractContextManager[None],
    bool,
    tuple[list[Callable[[], None]] | None, int, _walk.LeadsTo | None, bool],
]


class Walk:
    """A walk from `edges`. Within it as a context manager, it is the current walk for hooks."""

    waiting: dict[Node, list[T | None]]  # the nodes to run, and their gradients so far
    leaves: "dict[int, _Leaf]"  # the leaves that may get more
    is_prompt: bool  # whether it accumulates each leaf as soon as it is complete, or at the end
    counts: dict[int, int] | None = None  # how many gradients each gets, if known
    order: Sequence[Node] = ()
    to_torch: list[tuple[T, T]]  # the gradients with which torch's engine continues
    arrivals: dict[int, list[tuple[int | None, T]]]  # what arrived at torch's tensors
    changed: set[int]  # by id, torch's tensors that have changed
    callbacks: list[Callable[[], None]]
    outer: "list[_Outer]"

    def __init__(self, edges: Sequence[Edge], retain_graph: bool) -> None:
        self.edges, self.retain_graph, self.is_prompt = edges, retain_graph, False
        self.waiting, self.leaves, self.to_torch, self.changed = {}, {}, [], set()
        self.arrivals = {}
        self.callbacks, self.outer, self.number = [], [], next(_walk._walk_numbers)
        if _state.taps:
            self.look_ahead()  # which makes hooks of them

    def start(self, grads: Sequence[T]) -> None:
        for edge, grad in zip(self.edges, grads, strict=True):
            self.bring(edge, grad)

    def go_back(self) -> Iterator[Taking]:
        """Run the backward, and yield each step before it is run."""
        while self.waiting:
            node = max(self.waiting, key=_recorded_at)  # its users were recorded later
            taking = Taking(node=node, gradients=self.waiting.pop(node), results=None)
            if node.is_watched is True:
                self.run_hooks(taking)
            yield taking
            grads, formulas = taking.gradients, node.function.formulas
            usual = _OURS.issuperset(map(type, map(_target, filter(None, node.edges))))
            if usual and formulas and node.is_watched is not True and grads[0] is not None:
                taking.results = formulas.back_plainly(node, grads)
            else:
                taking.results = self.asked(node, grads)
            self.pass_on(taking)
        self.finish()
        if self.to_torch:
            beyond.accumulate(self.to_torch, self.retain_graph, self.arrivals)
        with self:
            for callback in self.callbacks:  # they may queue more
                callback()

    def run_hooks(self, taking: Taking) -> None:
        """Run the hooks that may change the gradients of the results, before these are shown."""
        node, slots = taking.node, taking.gradients
        self.finish()
        with self:
            if node.tensor_hooks is not None or node.retained is not None:
                _walk._run_output_hooks(node, slots)
            if node.prehooks and self.left_to_torch(node) is None:
                taking.gradients = _walk._run_prehooks(node.prehooks, slots)

    def left_to_torch(self, node: Node) -> T | None:
        """The result, if it is torch's and its engine calls the hooks."""
        tensor = None if node.theirs is None else node.theirs()
        return tensor if tensor is not None and beyond.is_hooked(tensor) else None

    def asked(self, node: Node, slots: list[T | None]) -> list[T | None]:
        """The gradients from a node that calls user code, or that has missing or torch's own
        parts."""
        for target, _ in filter(None, node.edges):
            if _tensor.is_torchs(target) and beyond.catch_up(node, target):
                self.changed.add(id(target))
        self.finish()
        with self:
            if (tensor := self.left_to_torch(node)) is not None:
                if slots[0] is not None:
                    self.to_torch.append((tensor, slots[0]))
                return [None] * len(node.edges)
            # A user's Function is called even then: it may return zeros.
            if node.attributes is None and all(g is None for g in slots):
                results: list[T | None] = [None] * len(node.edges)
            else:
                results = _walk.validated(node, node.run(slots))
            if node.posthooks:
                results = _walk._run_posthooks(node.posthooks, node.inputs, results, slots)
        return results

    def pass_on(self, taking: Taking) -> None:
        """Pass the gradients from a node to its inputs."""
        node = taking.node
        taking.results = results = _walk.validated(node, taking.results or ())
        if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
            _walk._refuse_nan(node, results)
        if not self.retain_graph:
            node.free()
        for edge, grad in zip(node.edges, results, strict=True):
            if edge is not None:
                if _state.leaf_hooks_exist:
                    _walk._refuse_swapped(node, edge[0])
                self.bring(edge, grad, node.sequence)
        if self.is_prompt:
            self.finish()

    def bring(self, edge: Edge, grad: T | None, came_from: int | None = None) -> None:
        """Add one gradient, or None, at the target of `edge`, from the call of this number."""
        target, index = edge
        if isinstance(target, Node):
            if target not in self.waiting:
                if target.segment is not None:
                    target.segment.expand(target)
                self.waiting[target] = [None] * len(target.outputs)
            slots = self.waiting[target]
        elif grad is not None and id(target) in self.changed:
            raise NotImplementedError(beyond.CHANGED)
        elif index != NO_FURTHER:
            # The leaf that was complete last is the last.
            leaf = self.leaves[id(target)] = self.leaves.pop(id(target), _Leaf(target))
            leaf.came += 1
            if not _HOOKS.isdisjoint(vars(target)):  # it may read the others
                self.is_prompt = True
            slots = leaf.slots
            if grad is not None and _tensor.is_torchs(target):
                self.arrivals.setdefault(id(target), []).append((came_from, grad))
        else:
            return
        held = slots[index]
        slots[index] = held if grad is None else grad if held is None else held + grad

    def look_ahead(self) -> dict[int, int]:
        """How many gradients each node and leaf gets in total."""
        counts = self.counts
        if counts is None:
            counts, self.order, changed = _walk.dependencies(self.edges)
            if _state.taps:
                _walk.untap(self.order)
            self.counts = counts
            self.changed |= changed
        return counts

    def finish(self) -> None:
        """Add to the `.grad` of each leaf that is complete."""
        counts = self.look_ahead()
        complete = [leaf for key, leaf in self.leaves.items() if leaf.came == counts[key]]
        with self:
            for leaf in complete:
                tensor, (grad,) = leaf.tensor, leaf.slots
                del self.leaves[id(tensor)]
                goes_on = _tensor.is_torchs(tensor) and (
                    beyond.goes_on(tensor) or beyond.meet_results(self.order)
                )
                if grad is None or not goes_on:
                    _walk._finish_leaf(tensor, grad, False)
                else:
                    self.to_torch.append((tensor, grad))
                _walk._run_reached_hooks(tensor)

    def leads_to(self, target: object) -> bool:
        return id(target) in self.look_ahead()

    def __enter__(self) -> None:
        walks = _walk._walks
        disabled, mode = DisableTorchFunctionSubclass(), torch.is_grad_enabled()
        before = walks.callbacks, walks.number, walks.leads_to, walks.creates_graph
        self.outer.append((disabled, mode, before))
        walks.callbacks, walks.number = self.callbacks, self.number
        walks.leads_to, walks.creates_graph = self.leads_to, False
        _torch.set_grad_enabled(False)
        disabled.__enter__()

    def __exit__(self, *exc: Any) -> None:
        walks = _walk._walks
        disabled, mode, before = self.outer.pop()
        disabled.__exit__(*exc)
        _torch.set_grad_enabled(mode)
        walks.callbacks, walks.number, walks.leads_to, walks.creates_graph = before


class _Leaf:
    """A leaf and its gradient so far."""

    def __init__(self, tensor: T) -> None:
        self.tensor = tensor
        self.slots: list[T | None] = [None]
        self.came = 0


class Step:
    """One operation of the backward, before it is run."""

    following: "Step"

    def __init__(
        self, walk: Walk, going: Iterator[Taking], names: "Names", taking: Taking | None = None
    ) -> None:
        self._walk, self._going, self._names = walk, going, names
        self._taking: Any = taking
        self._is_taken = False

    def advance(self) -> bool:
        """Run it, and prepare the next one; False if there is none."""
        if not self._is_taken:
            self._is_taken = True
            with self._walk:
                taking = next(self._going, None)
            if taking is not None:
                self.following = Step(self._walk, self._going, self._names, taking)
        return hasattr(self, "following")

    def take(self) -> dict[str, T]:
        """Run it now, not when the loop continues; returns `input_gradients`."""
        self.advance()
        return self.input_gradients or {}

    @property
    def node(self) -> str:
        """The operation, as PyTorch names it: "TanhBackward0"."""
        return bare(self._taking.node.name())

    @property
    def module(self) -> str:
        """The module that called it, as in `named_modules`; "" for the outermost, or none."""
        return self._names.module_of(self._taking.node)[0]

    @property
    def module_class(self) -> str:
        """The name of the module's class; "" if no module is known."""
        return self._names.module_of(self._taking.node)[1]

    @property
    def name(self) -> str:
        """The name of its (first) result, as in `nnmirror.explain`."""
        return self._names.labels[id(self._taking.node)][0]

    @property
    def computes(self) -> str:
        """The formula of the forward: "y = tanh(x)"."""
        return documented.value(self._taking.node.function)

    @property
    def formula(self) -> str:
        """The formulas of its gradients: "dx = g (1 - y^2)"."""
        return documented.gradients(self._taking.node.function)

    @property
    def place(self) -> "Place | None":
        """Where it was called, if that is certain."""
        from .explaining.naming import place_of

        return place_of(self._taking.node)

    @property
    def gradients(self) -> tuple[T | None, ...]:
        """The gradients of its results, after their hooks; None for a result without one."""
        return tuple(self._taking.gradients)

    @property
    def gradient(self) -> T | None:
        """The gradient of its (first) result, after its hooks."""
        return self._taking.gradients[0]  # type: ignore[no-any-return]

    @property
    def input_gradients(self) -> dict[str, T] | None:
        """The gradients of its inputs, by the rule's names; None before it is run."""
        taking = self._taking
        if taking.results is None:
            return None
        from .explaining.naming import argument_name

        return {
            argument_name(taking.node, place): grad
            for place, grad in enumerate(taking.results)
            if grad is not None
        }

    def __repr__(self) -> str:
        where = f"{self.module}: " if self.module else ""
        return f"<Step {where}{self.node}, {self.formula}>"
