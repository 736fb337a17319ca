"""The running walk of a thread, and how far it has come."""

import itertools
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from . import _torch, beyond
from . import tensor as _tensor
from . import views as _views
from ._upcalls import implements
from .node import NO_FURTHER, AccumulateGrad, Edge, Node, Target


class _Running(threading.local):
    walk: "GraphTask | None" = None  # the innermost one in this thread
    creates_graph: bool = False  # whether it is recorded itself


running = _Running()
_numbers = itertools.count()


class GraphTask:
    """The progress of a walk, as PyTorch's GraphTask. Within it, as a context manager, it is the
    running walk for hooks."""

    def __init__(self, edges: Sequence[Edge], creates_graph: bool = False) -> None:
        self.edges = edges
        self.creates_graph = creates_graph
        self.number = next(_numbers)
        self.callbacks: list[Callable[[], None]] = []  # for its end
        self._outer: list[tuple[GraphTask | None, bool]] = []
        # The nodes that a gradient has reached, a heap: the one recorded last is the first.
        self.ready: list[tuple[float, Node]] = []
        # By id, the gradients that have arrived at these nodes, and at leaves.
        self.arrived: dict[int, list[torch.Tensor | None]] = {}
        self.leaves: dict[int, torch.Tensor] = {}  # those of them that are leaves
        # While these are not counted: their gradients in order, and those of bound parts with all
        # targets.
        self.came: list[Sequence[Edge]] = []
        # By id, how many gradients still come; None: not counted yet.
        self.counts: dict[int, int] | None = None
        self.held = 0  # bytes of gradients at leaves, while these are not counted
        self._reach: set[int] | None = None  # the ids of all that it reaches, if that was asked

    def __enter__(self) -> None:
        self._outer.append((running.walk, running.creates_graph))
        running.walk, running.creates_graph = self, self.creates_graph

    def __exit__(self, *exc: object) -> None:
        running.walk, running.creates_graph = self._outer.pop()

    def call_back(self) -> None:
        """Call what was queued for the end of the walk."""
        for callback in self.callbacks:  # they may queue more
            callback()

    def ahead(self, node: Node | None = None) -> dict[int, int]:
        """By id, how many more gradients come to each node and leaf, if `node` is the next."""
        waiting = [(waiting, 0) for _, waiting in self.ready]
        if node is not None:
            waiting.append((node, 0))
        counts = dependencies(waiting, expanding=False).counts
        for target, _ in waiting:
            counts[id(target)] -= 1
        return counts

    def leaves_in_order(self) -> list[int]:
        """The ids of the leaves; the one that got a gradient last is the last."""
        found: dict[int, None] = {}
        for targets in reversed(self.came):
            for target, _ in reversed(targets):
                if id(target) in self.leaves:
                    found[id(target)] = None
            if len(found) == len(self.leaves):
                break
        self.came.clear()
        return [*reversed(found)]

    def leads_to(self, target: Target) -> bool | None:
        """Does the walk reach this node or leaf? None for a leaf whose gradient was requested."""
        if self._reach is None:
            self._reach = {*dependencies(self.edges, expanding=False).counts}
        return id(target) in self._reach

    def put_in_front(self, node: Node, target: object) -> None:
        """`node`, which leads to `target`, was made when the graph was exposed."""
        if self._reach is not None:
            self._reach.add(id(node))


class Ahead(NamedTuple):
    """What a walk will reach."""

    counts: dict[int, int]  # how many gradients each node and leaf will get, by its id
    order: list[Node]  # the nodes that will run
    changed: set[int]  # the ids of torch's tensors that have changed since a node was recorded
    meets_results: bool  # are there results among torch's tensors?


def dependencies(edges: Iterable[Edge], expanding: bool = True, as_exposed: bool = False) -> Ahead:
    """Look at the graph in front of a walk from `edges`.

    With `expanding`, nodes that stand for several are replaced by these; with `as_exposed`, each
    gets the form of PyTorch's node.
    """
    changed: set[int] = set()
    counts: dict[int, int] = {}
    order: list[Node] = []
    meets_results = False
    for target, _ in edges:
        if isinstance(target, Node):
            if id(target) not in counts:
                order.append(target)
        elif _tensor.is_torchs(target) and not target.is_leaf:
            meets_results = True  # the walk starts at one, beside others
        counts[id(target)] = counts.get(id(target), 0) + 1
    for node in order:  # the list grows during the loop
        if as_exposed:
            node.as_exposed()
        elif expanding and node.segment is not None:
            node.segment.expand(node)
        indices = node.indices
        for place, to in enumerate(node.targets):
            if to is None or (indices is not None and indices[place] == NO_FURTHER):
                continue
            key = id(to)
            known = counts.get(key)
            if isinstance(to, Node):
                if known is None:
                    order.append(to)
            elif not isinstance(to, _tensor.Tensor):
                meets_results = meets_results or not to.is_leaf
                if beyond.catch_up(node, to):
                    changed.add(key)
            counts[key] = 1 if known is None else known + 1
    return Ahead(counts, order, changed, meets_results)


@implements(_views)
def put_in_front(node: Node, target: object) -> None:
    """Tell a running walk about `node`, which was made when the graph was exposed, and leads to
    `target`.

    That may happen in a hook, for example one that prints a tensor.
    """
    if running.walk is not None:
        running.walk.put_in_front(node, target)


# -- what hooks ask about the running walk -------------------------------------------------


def queue_callback(callback: Callable[[], None]) -> None:
    """Call `callback()` when the present walk ends without an error.

    For hooks with work to do when all gradients have been computed; PyTorch's engine has the same
    under the same name.
    """
    if running.walk is None:
        raise RuntimeError("Final callbacks can only be installed during backward pass.")
    running.walk.callbacks.append(callback)


class _TorchInAWalk:
    """`torch` and `torch._C`, with two functions about PyTorch's engine replaced."""

    def __init__(self, real: types.ModuleType, **own: object) -> None:
        self.__dict__.update(own, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _number() -> int:
    """As `torch._C._current_graph_task_id`."""
    return -1 if running.walk is None else running.walk.number


def _will_execute(node: Node | AccumulateGrad) -> bool:
    """As `torch._C._will_engine_execute_node`."""
    target = node.variable if isinstance(node, AccumulateGrad) else node
    found = False if running.walk is None else running.walk.leads_to(target)
    if found is None:
        raise RuntimeError(
            "A leaf node was passed to _will_engine_execute_node but we are currently running"
            " autograd.grad(). This is currently not supported."
        )
    return found


_in_a_walk = _TorchInAWalk(
    torch,
    _C=_TorchInAWalk(
        _torch.C,
        _current_graph_task_id=_number,
        _will_engine_execute_node=_will_execute,
    ),
)


@implements(_tensor)
def in_this_walk(hook: types.FunctionType) -> Callable[[torch.Tensor], object]:
    """A hook of `torch.autograd.graph.register_multi_grad_hook`, for this walk.

    Its code is PyTorch's own. It asks which walk is running, and which nodes that reaches.
    """
    seen = {**hook.__globals__, "torch": _in_a_walk}
    made = types.FunctionType(
        hook.__code__, seen, hook.__name__, hook.__defaults__, hook.__closure__
    )
    made.__dict__.update(hook.__dict__)
    return made
