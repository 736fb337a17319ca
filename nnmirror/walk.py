"""The backward over the tape: the walk."""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from . import _state, _torch, beyond, fast
from . import tape as _tape
from . import tensor as _tensor
from . import views as _views
from ._state import here as _here
from ._torch import DisableTorchFunctionSubclass, EnableTorchFunction
from ._types import Hook
from ._upcalls import implements, upcall
from .accumulate import accumulate, retained
from .grad_mode import _override, users_code
from .node import NO_FURTHER, AccumulateGrad, Edge, Node, Target
from .tensor import C_dtype, C_shape, bare

if TYPE_CHECKING:
    from .fast.bound import Left

_R = TypeVar("_R")
# Does a walk reach this node or leaf?
LeadsTo: TypeAlias = Callable[[Target], bool | None]


class _Walks(threading.local):
    # The running walk in this thread: its final callbacks, a number, and whether it reaches a node
    # or a leaf (None: a leaf whose gradient was requested).
    callbacks: list[Callable[[], None]] | None = None
    number: int = -1
    leads_to: LeadsTo | None = None
    creates_graph: bool = False  # whether it is recorded itself
    # The local variables of the generic walk with these names; None in any other.
    known: tuple[Progress, set[int] | None] | None = None


_walk_numbers = itertools.count()
_walks = _Walks()


def queue_callback(callback: Callable[[], None]) -> None:
    """Call `callback()` when the present walk ends without an error.

    For hooks with work to do when all gradients have been computed; PyTorch's engine has the same
    under the same name.
    """
    if _walks.callbacks is None:
        raise RuntimeError("Final callbacks can only be installed during backward pass.")
    _walks.callbacks.append(callback)


@contextlib.contextmanager
def one_walk(leads_to: LeadsTo, create_graph: bool = False) -> Iterator[None]:
    """One walk: call its queued callbacks at the end."""
    outer = _walks.callbacks, _walks.number, _walks.leads_to, _walks.creates_graph
    known, _walks.known = _walks.known, None
    _walks.callbacks, _walks.number, _walks.leads_to = [], next(_walk_numbers), leads_to
    _walks.creates_graph = create_graph
    try:
        yield
        for callback in _walks.callbacks:  # they may queue more
            callback()
    finally:
        _walks.callbacks, _walks.number, _walks.leads_to, _walks.creates_graph = outer
        _walks.known = known


class _TorchInAWalk:
    """`torch` and `torch._C`, with two functions about PyTorch's engine replaced."""

    def __init__(self, real: types.ModuleType, **own: object) -> None:
        self.__dict__.update(own, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _will_execute(node: Node | AccumulateGrad) -> bool:
    """As `torch._C._will_engine_execute_node`."""
    target = node.variable if isinstance(node, AccumulateGrad) else node
    found = False if _walks.leads_to is None else _walks.leads_to(target)
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
        _current_graph_task_id=lambda: _walks.number,
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


@implements(_views)
def put_in_front(node: Node, target: object) -> None:
    """Tell a running walk about `node`, which was made when the graph was exposed, and leads to
    `target`.

    That may happen in a hook, for example one that prints a tensor.
    """
    if _walks.known is None:
        return
    progress, reaches = _walks.known
    if progress.reach is not None:
        progress.reach.add(id(node))
    if reaches is not None and id(target) in reaches:
        reaches.add(id(node))


def unrecorded(function: Callable[..., _R]) -> Callable[..., _R]:
    """`function`, a walk, with torch's grad mode off, as in a backward.

    Otherwise torch would record operations on a tensor that now requires grad for torch. With
    `create_graph=True` it is on, for the mirror; no tensor that torch tracks occurs there.
    """

    @functools.wraps(function)
    def call(*args: object, create_graph: bool = False, **kwargs: object) -> _R:
        mode, own_mode = torch.is_grad_enabled(), _override.mode
        _torch.set_grad_enabled(create_graph)
        if create_graph:
            _override.mode, kwargs["create_graph"] = None, True
        try:
            return function(*args, **kwargs)
        finally:
            _override.mode = own_mode
            _torch.set_grad_enabled(mode)

    return call


@unrecorded
def walk(
    edges: Sequence[Edge],
    grads: Sequence[torch.Tensor],
    retain_graph: bool = False,
    only: Sequence[Edge] | None = None,
    stop: Sequence[Edge] | None = None,
    into: bool = False,
    create_graph: bool = False,
    replaying: bool = False,
    give: Callable[[torch.Tensor, torch.Tensor | None], None] | None = None,
) -> list[torch.Tensor | None]:
    """Run the backward from `edges` with `grads`.

    Gradients that arrive at leaves are added to their `.grad`. With `only`, nothing is accumulated,
    and the gradients that arrive at those edges are returned; with `into`, the leaves among them
    accumulate instead; with `give`, that is called with each such leaf and its gradient when it
    arrives, None is returned for it, and what torch's engine would pass on is given, too. With
    `stop`, they are returned and not passed on, while the other leaves accumulate.

    The order is PyTorch's: of the nodes whose gradients are complete, the one recorded last runs
    first, and gradients are summed in the order in which they arrive. So sums of three or more
    terms have the same bits. A call is recorded after those that made its inputs. So of the nodes
    that have been reached, the one recorded last is complete, and gradients need not be counted in
    advance to know that. At leaves they are counted only if somebody could notice when one is
    complete: a hook or a user's Function that runs meanwhile, or the memory of a large gradient.

    With `create_graph` the walk is recorded itself (see `double_backward`). It may be a replay of
    an earlier one (see `nnmirror.fast.replay`), which itself may run the generic walk: `replaying`.
    """
    captured = only or stop or ()
    binds = fast.enabled and not _here.is_plain
    if create_graph and only is not None and not into and binds and not replaying:
        with DisableTorchFunctionSubclass():
            again = functools.partial(
                walk, edges, grads, True, only, create_graph=True, replaying=True
            )
            replay = replayed(edges, grads, only, retain_graph, again)
        if replay is not None:
            return replay
    if only is not None and not (create_graph or into or give or replaying) and binds:
        with DisableTorchFunctionSubclass():
            again = functools.partial(walk, edges, grads, True, only, replaying=True)
            bound = None if _state.taps else walk_to_ends(edges, grads, only, retain_graph, again)
        if bound is not None:
            return bound
    simple = not (captured or create_graph or torch.is_anomaly_enabled())
    binding = simple and binds and not _torch.is_shown()
    add = _add_recorded if create_graph else operator.add
    hooked = _state.leaf_hooks_exist
    progress = Progress(edges)
    order: list[Node] = []
    changed: set[int] = set()
    meets_results = False  # of torch's own graph

    def look_ahead() -> dict[int, int]:
        """Look at the graph before anything is computed."""
        nonlocal meets_results
        counts, nodes, since = dependencies(edges, not binding, as_seen=create_graph)
        order.extend(nodes)
        changed.update(since)
        # Before the nodes of several layers are replaced by one for each.
        meets_results = beyond.meet_results(nodes)
        return counts

    if not binding or hooked or _state.taps:
        progress.counts = look_ahead()
    if _state.taps:
        untap(order)
    wanted = {(id(t), n) for t, n in captured}
    found: dict[tuple[int, int], torch.Tensor | None] = {}
    reaches: set[int] | None = None  # with `only`: the nodes on the way to it
    further: set[int] = set()  # torch's tensors whose graph reaches it
    # Torch's tensors among the requested ones, by the slot of their gradient. Each once: the
    # gradient of one that is requested twice must not be added twice.
    theirs: dict[tuple[int, int], torch.Tensor] = {}
    if only is not None:
        theirs = theirs_among(only)
        ways = {id(t) for t, _ in only}
        beyond.ask_for(only, [*theirs.values()], order)
        if theirs:
            further = _leading_on(edges, order, only)
            # Where torch's graph leads from a tensor that was changed is unknown.
            ways |= further | changed | {id(t) for t in theirs.values()}
        reaches = _way_to(ways, order)
    slots_of = {id(tensor): slot for slot, tensor in theirs.items()}
    buffers, ready, leaves = progress.arrived, progress.ready, progress.leaves
    sums: set[int] = set()  # where gradients of bound parts have been added, to a tensor of its own
    to_torch: list[tuple[torch.Tensor, torch.Tensor]] = []
    arrivals: dict[int, list[tuple[int | None, torch.Tensor]]] = {}  # at torch's tensors
    # Gradients that end at a requested tensor, by its slot.
    beside: dict[tuple[int, int], torch.Tensor] = {}

    def arrive(target: Any, index: int, grad: torch.Tensor | None, is_root: bool = False) -> None:
        """One gradient (or None) arrives at `target`, a node or a leaf.

        Hooks of a tensor where the walk starts are called even if the walk ends there, as in
        PyTorch.
        """
        key = id(target)
        if reaches is not None and key not in reaches and not is_root:
            return
        if index == NO_FURTHER:
            slot = slots_of.get(key)
            if slot is not None and grad is not None:
                _add_at(beside, slot, grad, add)
            return
        is_node = isinstance(target, Node)
        if changed and key in changed and grad is not None:
            raise NotImplementedError(beyond.CHANGED)
        slots = buffers.get(key)
        if slots is None:
            slots = buffers[key] = [None] * (len(target.outputs) if is_node else 1)
            if not is_node:
                leaves[key] = target
                if grad is not None:
                    progress.held += grad.nbytes
            elif reaches is None or key in reaches:
                heapq.heappush(ready, (-target.sequence, target))
        if grad is not None:
            if not is_node and _tensor.is_torchs(target):
                if not order:
                    look_ahead()
                if meets_results:
                    came_from = None if node is None else node.sequence
                    arrivals.setdefault(key, []).append((came_from, grad))
            held = slots[index]
            slots[index] = grad if held is None else add(held, grad)
            grad = None  # from here on, only the slot refers to it
        if is_node and (reaches is None or key in reaches):
            return
        if progress.counts is None:
            progress.came.append(((target, 0),))
        else:
            progress.counts[key] -= 1
            if not progress.counts[key]:
                if is_node:  # where the walk starts, and nothing else leads
                    heapq.heappush(ready, (-target.sequence, target))
                else:
                    complete(key)

    def complete(key: int) -> None:
        """All gradients of a leaf have arrived."""
        target, slots = leaves.pop(key), buffers.pop(key)
        if simple and isinstance(target, _tensor.Tensor):  # what is usual, with fewer checks
            unshared = sys.getrefcount(slots[0]) <= 2  # the slot, and the call's argument
            _finish_leaf(target, slots[0], unshared)
            if hooked:
                _run_reached_hooks(target)
            return
        if stop is not None and slots[0] is None:
            return
        chosen = (key, 0) in wanted
        theirs_hooked = chosen and _tensor.is_torchs(target) and beyond.is_hooked(target)
        if (key in further or theirs_hooked) and slots[0] is not None:
            to_torch.append((target, slots[0]))  # torch's engine reports what arrives there, too
        elif chosen and not (into and isinstance(target, _tensor.Tensor)):
            slots[0] = _run_tensor_hooks(_leaf_hooks(target), slots[0])
            if give is None:
                found[key, 0] = slots[0]
            else:
                give(target, slots[0])
        elif reaches is None or chosen:
            unshared = sys.getrefcount(slots[0]) <= 2  # the slot, and the call's argument
            if not order and _tensor.is_torchs(target):
                look_ahead()
            # Torch's engine continues from a tensor with a graph or a hook; and from a leaf that
            # may get more through such a graph, as torch sums all of them before adding to `.grad`.
            if (
                not _tensor.is_torchs(target)
                or slots[0] is None
                or not (meets_results or beyond.goes_on(target))
            ):
                _finish_leaf(target, slots[0], unshared)
            else:
                to_torch.append((target, slots[0]))
            _run_reached_hooks(target)
        else:
            _run_tensor_hooks(_leaf_hooks(target), slots[0])

    def pass_on(node: Node, grad: torch.Tensor | None) -> None:
        """The step of a rule's node with one gradient, without special cases.

        Nothing here refers to a gradient when it arrives at a leaf, which may then keep it.
        """
        results = node.function.backward(node, grad)
        targets, indices = node.targets, node.indices
        if type(results) is not tuple or len(results) != len(targets):
            results = node.completed(results)
        if node._saved and not retain_graph:
            node._saved = None
        left = list(results)
        left.reverse()
        results = grad = None
        for place, target in enumerate(targets):
            if target is None:
                left.pop()
                continue
            index = 0 if indices is None else indices[place]
            if hooked:
                _refuse_swapped(node, target)
            if not isinstance(target, Node):
                if left[-1] is not None:
                    left[-1] = _fitted(left[-1], C_shape(target), C_dtype(target))
                arrive(target, index, left.pop())
                continue
            like = target.like
            outputs = target._outputs if like is None else like.outputs  # as in the property
            grad = left.pop()
            if grad is not None:
                shape, dtype, _ = outputs[index]
                if grad.shape != shape or grad.dtype is not dtype:
                    grad = _fitted(grad, shape, dtype)
            key = id(target)
            if key in buffers:
                arrive(target, index, grad)
            else:
                slots = buffers[key] = [None] * len(outputs)
                slots[index] = grad
                heapq.heappush(ready, (-target.sequence, target))
            grad = None

    def arrive_from_part(targets: Sequence[Edge], grads: list[torch.Tensor]) -> None:
        """The gradients of a bound part arrive at `targets`; the first one is the last of `grads`.

        As `arrive`, with fewer checks where others have arrived, as at the weights that an unrolled
        loop uses in each step.
        """
        if progress.counts is not None:
            for target, index in targets:
                arrive(target, index, grads.pop())
            return
        held: list[torch.Tensor] = []
        more: list[torch.Tensor] = []
        for target, index in targets:
            key = id(target)
            slots = buffers.get(key)
            if slots is None or index or slots[0] is None:
                arrive(target, index, grads.pop())
            elif key in sums:
                held.append(slots[0])
                more.append(grads.pop())
            else:
                slots[0] = slots[0] + grads.pop()
                if slots[0].is_cpu:  # elsewhere, these are added in no particular order
                    sums.add(key)
        if held:
            _torch.foreach_add_(held, more)
        progress.came.append(targets)

    def pass_over(node: Node) -> None:
        """What lies behind where the walk stops is left as it is; others may lead there too."""
        for edge in node.edges:
            if edge is not None:
                arrive(edge[0], edge[1], None)

    def leads_to(target: Target) -> bool | None:
        is_leaf = not isinstance(target, Node)
        if is_leaf and only is not None and not into and (id(target), 0) in wanted:
            return None
        return (reaches is None or id(target) in reaches) and progress.leads_to(target)

    def count(node: Node | None) -> None:
        """From now on, with `node` the next, complete each leaf as soon as that is possible."""
        progress.counts = counts = progress.ahead(node)
        for key in progress.leaves_in_order():
            if key not in counts:
                complete(key)

    def run(node: Node, slots: list[torch.Tensor | None]) -> None:
        """The step of any node."""
        if node.segment is not None:
            node.segment.expand(node)
        if stop is not None and all(g is None for g in slots):
            pass_over(node)
            return
        if node.tensor_hooks is not None or node.retained is not None:
            _run_output_hooks(node, slots)
        if node.theirs is not None and beyond.is_hooked(tensor := node.theirs()):
            if slots[0] is not None:
                to_torch.append((tensor, slots[0]))  # its engine calls the hooks
            pass_over(node)
            return
        for i in range(len(slots)) if wanted else ():
            if (id(node), i) in wanted:
                found[id(node), i] = slots[i]
                if stop is not None:
                    slots[i] = None
        if stop is not None and all(g is None for g in slots):
            pass_over(node)
            return
        needs = None
        if reaches is not None:
            needs = tuple([t is not None and id(t) in reaches for t in node.targets])
            if True not in needs:
                return
        results = _step(node, slots, needs, create_graph)
        slots.clear()
        if not retain_graph:
            node.free()
        results.reverse()
        for edge in node.edges:
            if edge is None:
                results.pop()
                continue
            if hooked and (reaches is None or id(edge[0]) in reaches):
                _refuse_swapped(node, edge[0])
            arrive(edge[0], edge[1], results.pop())

    with DisableTorchFunctionSubclass(), one_walk(leads_to, create_graph):
        _walks.known = progress, reaches
        node = None
        try:
            for (target, index), grad in zip(edges, grads, strict=True):
                arrive(target, index, grad, is_root=True)
            while ready:
                node = heapq.heappop(ready)[1]
                slots = buffers.pop(id(node))
                if progress.counts is None:
                    runs_users_code = node.is_watched is True or node.attributes is not None
                    if runs_users_code or progress.held > _MOST_HELD:
                        count(node)
                is_simple = False
                if len(slots) == 1 and slots[0] is not None and node.is_watched is not True:
                    is_simple = simple
                    if binding and (sign := node.signature) and sign.parts is not False:
                        part = bound_part(node, slots[0], progress, retain_graph)
                        if part is not None:
                            slots = []
                            arrive_from_part(*part)
                            continue
                if not order and _meets_torch(node):
                    look_ahead()
                is_rule = node.function.is_rule and node.theirs is None
                if is_simple and is_rule and node.segment is None:
                    pass_on(node, slots.pop())
                else:
                    run(node, slots)
            node = None
        finally:
            if progress.counts is None:
                count(node)  # after an error, too: the leaves that are complete get their gradient
        if to_torch and give is not None:
            for tensor, grad in to_torch:
                give(tensor, grad)
        elif to_torch and only is not None:
            through_torch(found, to_torch, theirs, retain_graph, create_graph, arrivals)
        elif to_torch and create_graph:
            ends = beyond.behind([tensor for tensor, _ in to_torch])[0]
            onward = beyond.onward(to_torch, arrivals)
            more = beyond.go_back(
                onward.tensors, onward.grads, ends, retain_graph, create_graph, order=onward.order
            )
            for leaf, one in zip(ends, more, strict=True):
                if one is not None:
                    accumulate(leaf, one, False, create_graph)
                    for hook in tuple((leaf._post_accumulate_grad_hooks or {}).values()):
                        with users_code(create_graph):
                            hook(leaf)
        elif to_torch:
            # All in one run of torch's engine, so that it sums in its own order.
            beyond.accumulate(to_torch, retain_graph, arrivals)
        for slot, grad in beside.items():
            _add_at(found, slot, grad, add)
    return [found.get((id(t), n)) for t, n in captured]


# Bytes: so many of gradients may wait for the end of a walk.
_MOST_HELD = 1 << 20


def _meets_torch(node: Node) -> bool:
    """Has it an input of torch's graph?"""
    for target in node.targets:
        if isinstance(target, Node):
            if target.theirs is not None:
                return True
        elif target is not None and not isinstance(target, _tensor.Tensor):
            return True
    return False


def theirs_among(ends: Sequence[Edge]) -> dict[tuple[int, int], torch.Tensor]:
    """Torch's tensors among `ends`, by the slot of their gradient."""
    return {(id(t), n): end for t, n in ends if (end := beyond.theirs(t)) is not None}


def through_torch(
    found: dict[tuple[int, int], torch.Tensor | None],
    to_torch: Sequence[tuple[torch.Tensor, torch.Tensor]],
    theirs: Mapping[tuple[int, int], torch.Tensor],
    retain_graph: bool,
    create_graph: bool = False,
    arrivals: beyond.Arrivals | None = None,
) -> None:
    """Pass the gradients `to_torch` on through torch's graph, and add what arrives at `theirs`."""
    add = _add_recorded if create_graph else operator.add
    ends = [*theirs.values()]
    tensors, starts, order = beyond.onward(to_torch, arrivals or {})
    more = beyond.go_back(tensors, starts, ends, retain_graph, create_graph, order=order)
    for key, one in zip(theirs, more, strict=True):
        if one is not None:
            _add_at(found, key, one, add)


def _add_at(
    slots: dict[tuple[int, int], Any],
    slot: tuple[int, int],
    grad: torch.Tensor,
    add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """Add a gradient at this slot, or put it there if it is the first."""
    held = slots.get(slot)
    slots[slot] = grad if held is None else add(held, grad)


_sequence_of = operator.attrgetter("sequence")


def _way_to(ends: set[int], order: Sequence[Node]) -> set[int]:
    """The ids of `ends`, and of the nodes on the way to them."""
    reaches = set(ends)
    for node in sorted(order, key=_sequence_of):
        if any(id(target) in reaches for target in node.targets):
            reaches.add(id(node))
    return reaches


def _step(
    node: Node,
    slots: list[torch.Tensor | None],
    needs: tuple[bool, ...] | None,
    create_graph: bool,
) -> list[torch.Tensor | None]:
    """The step of any node with its hooks, for the gradients that are needed; all of them if
    `needs` is None.
    """
    if node.prehooks:
        slots = _run_prehooks(node.prehooks, slots)
    results: list[torch.Tensor | None]
    if node.attributes is None and all(g is None for g in slots):
        # A user's Function is called even then: it may return zeros.
        results = [None] * len(node.targets)
    else:
        if create_graph:
            returned = _tape.run_recorded(node, slots, needs or node.needs_input_grad)
        else:
            returned = (node if needs is None else _tape.needing(node, needs)).run(slots)
        results = validated(node, returned)
        if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
            _refuse_nan(node, results)
    if node.posthooks:
        results = _run_posthooks(node.posthooks, node.inputs, results, slots)
    return results


def _leading_on(edges: Sequence[Edge], order: Sequence[Node], ends: Sequence[Edge]) -> set[int]:
    """The ids of torch's tensors on the way, from which torch's graph reaches one of `ends`."""
    seen = {
        id(target): target
        for target, index in (*edges, *(e for n in order for e in n.edges if e is not None))
        if _tensor.is_torchs(target) and index != NO_FURTHER
    }
    passing = beyond.passing([*seen.values()], ends)
    found = {key for key, passes in zip(seen, passing, strict=True) if passes}
    # Torch's engine adds what it computes for an end to what has arrived there.
    return found | beyond.shared([*seen.values()])[0].keys() if found else found


def _refuse_swapped(node: Node, target: object) -> None:
    """Raise if `target` is a leaf that was swapped with another tensor since `node` was
    recorded."""
    swapped = target._swapped if isinstance(target, _tensor.Tensor) else None
    if swapped is not None and swapped > node.sequence:
        raise RuntimeError(_POISONED)


_POISONED = (
    "Trying to execute AccumulateGrad node that was poisoned by swap_tensors this can happen when"
    " you try to run backward on a tensor that was swapped. For a module m with"
    " `torch.__future__.set_swap_module_params_on_conversion(True)` you should not change the"
    " device or dtype of the module (e.g. `m.cpu()` or `m.half()`) between running forward and"
    " backward. To resolve this, please only change the device/dtype before running forward (or"
    " after both forward and backward)."
)


def _refuse_nan(node: Node, results: Sequence[torch.Tensor | None]) -> None:
    """The check of `torch.autograd.detect_anomaly`."""
    for place, index in enumerate(node.inputs):
        grad = results[index]
        if grad is not None and grad.isnan().any():
            name = bare(node.name())
            raise RuntimeError(f"Function '{name}' returned nan values in its {place}th output.")


def dependencies(
    edges: Iterable[Edge], expanding: bool = True, as_seen: bool = False
) -> tuple[dict[int, int], list[Node], set[int]]:
    """How many gradients each target will get, the nodes that will run, and the ids of torch's
    tensors that have changed since a node was recorded.

    With `expanding`, nodes that stand for several are replaced by these; with `as_seen`, each gets
    the form of PyTorch's node.
    """
    changed: set[int] = set()
    counts: dict[int, int] = {}
    order: list[Node] = []
    for target, _ in edges:
        if id(target) not in counts and isinstance(target, Node):
            order.append(target)
        counts[id(target)] = counts.get(id(target), 0) + 1
    for node in order:  # the list grows during the loop
        if as_seen:
            node.as_seen()
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
            elif not isinstance(to, _tensor.Tensor) and beyond.catch_up(node, to):
                changed.add(key)
            counts[key] = 1 if known is None else known + 1
    return counts, order, changed


def validated(node: Node, results: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Bring each gradient to its input's shape and dtype, as PyTorch's engine does.

    So a rule for a broadcasting operation returns a gradient with the broadcast shape, and the sum
    over the broadcast dimensions is computed here for all rules.
    """
    checked: list[torch.Tensor | None] = []
    trusted = node.function.is_rule
    indices = node.indices
    for i, target in enumerate(node.targets):
        grad = results[i]
        if target is None or grad is None:
            checked.append(None)
            continue
        index = 0 if indices is None else indices[i]
        if trusted:  # one of the package's own: it only broadcasts and promotes
            if isinstance(target, Node):
                shape, dtype, _ = target.outputs[index]
            else:
                shape, dtype = C_shape(target), C_dtype(target)
            if grad.shape != shape or grad.dtype is not dtype:
                grad = _fitted(grad, shape, dtype)
            checked.append(grad)
            continue
        if not isinstance(grad, torch.Tensor):
            raise TypeError(
                f"function {node.name()} returned a gradient at index {i} that is no tensor:"
                f" {torch.typename(grad)}"
            )
        shape, dtype, device = (
            target.outputs[index]
            if isinstance(target, Node)
            else (target.shape, target.dtype, target.device)
        )
        if grad.shape != shape:
            if not _expandable(shape, grad.shape):
                raise RuntimeError(
                    f"Function {node.name()} returned an invalid gradient at index {i} - got"
                    f" {list(grad.shape)} but expected shape compatible with {list(shape)}"
                )
            grad = _fitted(grad, shape, grad.dtype)
        if grad.dtype is not dtype:
            if grad.is_complex() != dtype.is_complex:
                raise RuntimeError(_OF_NUMBERS)
            grad = _fitted(grad, shape, dtype)
        if grad.device != device:
            if grad.dim() == 0:
                grad = grad.to(device)
            else:
                raise RuntimeError(
                    f"Function {node.name()} returned an invalid gradient at index {i} -"
                    f" expected device {device} but got {grad.device}"
                )
        if grad.requires_grad and not _walks.creates_graph:
            grad = grad.detach()
        checked.append(grad)
    return checked


def _fitted(grad: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if _walks.creates_graph:
        with EnableTorchFunction():
            return grad.sum_to_size(shape).to(dtype)
    if grad.shape != shape:
        grad = grad.sum_to_size(shape) if shape else grad.sum()  # the same, in less time
    return grad if grad.dtype is dtype else grad.to(dtype)


def _add_recorded(held: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    with EnableTorchFunction():
        return held + grad


_OF_NUMBERS = (
    "Expected isFloatingType(grad.scalar_type()) || (input_is_complex == grad_is_complex) to be"
    " true, but got false.  (Could this error message be improved?  If so, please report an"
    " enhancement request to PyTorch.)"
)


def _expandable(shape: Sequence[int], desired: Sequence[int]) -> bool:
    if len(shape) > len(desired):
        return False
    tail = desired[len(desired) - len(shape) :]
    return all(s == d or s == 1 for s, d in zip(shape, tail, strict=True))


def _finish_leaf(leaf: torch.Tensor, grad: torch.Tensor | None, unshared: bool) -> None:
    """Add the gradient of a leaf to its `.grad`; its hooks are called even without one."""
    hooks = _leaf_hooks(leaf)
    if hooks:
        grad = _run_tensor_hooks(hooks, grad)
        unshared = False
    before = after = None
    if isinstance(leaf, _tensor.Tensor) and leaf._accumulate_hooks is not None:
        before, after = leaf._accumulate_hooks
        unshared = False
    if before:
        (grad,) = _run_prehooks(before, [grad])
    if grad is not None and leaf.requires_grad:  # otherwise it was frozen after the forward
        accumulate(leaf, grad, unshared, _walks.creates_graph)
    if isinstance(leaf, _tensor.Tensor) and leaf._post_accumulate_hooks:
        returned = None
        for hook in tuple(leaf._post_accumulate_hooks.values()):
            with users_code(_walks.creates_graph):
                result = hook(leaf)
            if result is not None:
                returned = _replacement(hook, leaf, result)
        if returned is not None:
            raise RuntimeError("Tensor post accumulate grad hooks should return None.")
    if after:
        _run_posthooks(after, (), [], (grad,))


def _run_reached_hooks(leaf: torch.Tensor) -> None:
    if isinstance(leaf, _tensor.Tensor) and leaf._reached_hooks:
        for hook in tuple(leaf._reached_hooks.values()):
            hook()


def _leaf_hooks(leaf: torch.Tensor) -> dict[int, Hook] | None:
    return leaf._leaf_hooks if isinstance(leaf, _tensor.Tensor) else None


def _run_tensor_hooks(
    hooks: dict[int, Hook] | None, grad: torch.Tensor | None
) -> torch.Tensor | None:
    """Call each hook with the gradient, None as by PyTorch; what it returns replaces it."""
    for hook in tuple(hooks.values()) if hooks else ():
        with users_code(_walks.creates_graph):
            result = hook(grad)
        if result is not None:
            grad = _replacement(hook, grad, result)
    return grad


def _hook_name(hook: object) -> str:
    return getattr(hook, "__name__", "unknown")


def _replacement(hook: object, grad: torch.Tensor | None, result: object) -> torch.Tensor | None:
    """The result of a hook, checked against `grad`."""
    if result is None or result is grad:
        return result
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"expected Variable, but hook returned '{type(result).__name__}'")
    if grad is not None:
        if result.dtype is not grad.dtype:
            raise RuntimeError(
                f"hook '{_hook_name(hook)}' has changed the type of value"
                f" (was {torch.Tensor.type(grad)} got {torch.Tensor.type(result)})"
            )
        if result.shape != grad.shape:
            raise RuntimeError(f"hook '{_hook_name(hook)}' has changed the size of value")
    return result.detach() if result.requires_grad and not _walks.creates_graph else result


def _replacements(
    hook: object, grads: tuple[torch.Tensor | None, ...], result: object
) -> tuple[torch.Tensor | None, ...]:
    """The result of a node's hook, checked against its gradients."""
    if not isinstance(result, tuple):
        raise TypeError(f"expected tuple, but hook returned '{type(result).__name__}'")
    if len(result) != len(grads):
        raise RuntimeError(
            f"hook '{_hook_name(hook)}' has returned an incorrect number of values"
            f" (got {len(result)}, but expected {len(grads)})"
        )
    return tuple(_replacement(hook, g, r) for g, r in zip(grads, result, strict=True))


def _run_output_hooks(node: Node, slots: list[torch.Tensor | None]) -> None:
    for index, grad in enumerate(slots):
        if node.tensor_hooks is not None:
            grad = slots[index] = _run_tensor_hooks(node.tensor_hooks.get(index), grad)
        if grad is not None and node.retained is not None and index in node.retained:
            tensor = node.retained[index]()
            if tensor is not None:
                tensor._gradient = retained(tensor._gradient, grad, _walks.creates_graph)


def _run_prehooks(
    hooks: Mapping[int, Hook], slots: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    with users_code(_walks.creates_graph):
        for hook in tuple(hooks.values()):
            result = hook(tuple(slots))
            if result is not None:
                slots = list(_replacements(hook, tuple(slots), result))
    return slots


def _run_posthooks(
    hooks: Mapping[int, Hook],
    places: Sequence[int],  # of the results that are shown
    results: list[torch.Tensor | None],
    slots: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    with users_code(_walks.creates_graph):
        for hook in tuple(hooks.values()):
            grads = tuple(results[i] for i in places)
            result = hook(grads, tuple(slots))
            if result is None:
                continue
            for place, grad in zip(places, _replacements(hook, grads, result), strict=True):
                results[place] = grad
    return results


@upcall("nnmirror.fast.tapped")
def untap(nodes: Iterable[Node]) -> None:
    """Replace the taps on `nodes` by hooks."""
    raise NotImplementedError


class Progress:
    """The progress of a generic walk."""

    def __init__(self, edges: Sequence[Edge]) -> None:
        self.edges = edges
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
        self.reach: set[int] | None = None  # the ids of all that it reaches, if that was asked

    def ahead(self, node: Node | None = None) -> dict[int, int]:
        """By id, how many more gradients come to each node and leaf, if `node` is the next."""
        waiting = [(waiting, 0) for _, waiting in self.ready]
        if node is not None:
            waiting.append((node, 0))
        counts = dependencies(waiting, expanding=False)[0]
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

    def leads_to(self, target: Target) -> bool:
        """Does the walk reach it?"""
        if self.reach is None:
            self.reach = {*dependencies(self.edges, expanding=False)[0]}
        return id(target) in self.reach


@upcall("nnmirror.fast.binding")
def bound_part(
    node: Node, grad: torch.Tensor, progress: Progress, retain_graph: bool
) -> Left | None:
    """The bound part of the walk from `node`; None if there is none."""
    raise NotImplementedError


@upcall("nnmirror.fast.replay")
def replayed(
    edges: Sequence[Edge],
    grads: Sequence[torch.Tensor],
    only: Sequence[Edge],
    retain_graph: bool,
    generic: Callable[[], list[torch.Tensor | None]],
) -> list[torch.Tensor | None] | None:
    """The replay of a recorded walk; None if the generic one has to run."""
    raise NotImplementedError


@upcall("nnmirror.fast.ends")
def walk_to_ends(
    edges: Sequence[Edge],
    grads: Sequence[torch.Tensor],
    only: Sequence[Edge],
    retain_graph: bool,
    generic: Callable[..., list[torch.Tensor | None]],
) -> list[torch.Tensor | None] | None:
    """The gradients for `only` by a bound walk; None if the generic one has to run."""
    raise NotImplementedError
