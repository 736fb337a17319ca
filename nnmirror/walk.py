"""The backward over the tape: the walk."""

import functools
import heapq
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch

from . import _state, _torch, beyond, fast
from . import tape as _tape
from . import tensor as _tensor
from ._state import here as _here
from ._torch import DisableTorchFunctionSubclass, EnableTorchFunction
from ._upcalls import upcall
from .accumulate import accumulate
from .grad_mode import _override, users_code
from .gradient_hooks import (
    finish_leaf,
    leaf_hooks,
    run_output_hooks,
    run_posthooks,
    run_prehooks,
    run_reached_hooks,
    run_tensor_hooks,
)
from .node import HOOKED, NO_FURTHER, Edge, Node, Target
from .running import GraphTask, dependencies, running
from .tensor import C_dtype, C_shape, bare

if TYPE_CHECKING:
    from .fast.bound import Left

_R = TypeVar("_R")
Slots: TypeAlias = list[torch.Tensor | None]  # the gradients of a node's results, or of its inputs
# What receives each leaf that was asked for and its gradient.
Receiver: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None], None]


def unrecorded(function: Callable[..., _R]) -> Callable[..., _R]:
    """`function`, a walk, with torch's grad mode off, as in a backward.

    Otherwise torch would record operations on a tensor that now requires grad for torch. With
    `create_graph=True` it is on, for the mirror; no tensor that torch tracks occurs there.
    """

    @functools.wraps(function)
    def call(*args: object, create_graph: bool = False, **kwargs: object) -> _R:
        mode, own_mode = torch.is_grad_enabled(), _override.mode
        try:  # an exception from a signal handler may come at once
            _torch.set_grad_enabled(create_graph)
            if create_graph:
                _override.mode, kwargs["create_graph"] = None, True
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
    give: Receiver | None = None,
) -> Slots:
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
    going = Walk(edges, retain_graph, only, stop, into, create_graph, give, binds)
    with DisableTorchFunctionSubclass(), going:
        for _ in going.go_back(grads):
            pass
    return going.found_at(only or stop or ())


class Stop(NamedTuple):
    """Where a walk has stopped."""

    node: Node  # whose step is run next
    gradients: Slots  # of its results, after their hooks
    results: Slots  # those of its inputs, once they are known


class Walk(GraphTask):
    """A run of the generic walk. `walk` says what the arguments are; with `stops`, it stops before
    each node."""

    node: Node | None = None  # the one that runs
    # With `only`: which of that node's gradients are on the way to what is asked for.
    needs: tuple[bool, ...] | None = None
    meets_results = False  # Does it meet results of torch's own graph?
    reaches: set[int] | None = None  # with `only`: the ids of the nodes on the way to it

    def __init__(
        self,
        edges: Sequence[Edge],
        retain_graph: bool,
        only: Sequence[Edge] | None = None,
        stop: Sequence[Edge] | None = None,
        into: bool = False,
        create_graph: bool = False,
        give: Receiver | None = None,
        binds: bool = False,
        stops: bool = False,
    ) -> None:
        super().__init__(edges, create_graph)
        self.retain_graph, self.only, self.stop = retain_graph, only, stop
        self.into, self.give, self.stops = into, give, stops
        captured = only or stop or ()
        # Do all gradients go to leaves, and nothing else happen with them?
        self.is_simple = not (captured or create_graph or torch.is_anomaly_enabled())
        self.runs = self.is_simple and not stops  # does a step need no more than `Node.run`?
        self.binds = binds and self.is_simple and not _torch.is_shown()
        self.add = _add_recorded if create_graph else operator.add
        self.hooked = _state.leaf_hooks_exist
        self.order: list[Node] = []  # what it runs, if that is known
        self.changed: set[int] = set()  # by id, torch's tensors that have changed
        self.wanted = {(id(t), n) for t, n in captured}
        self.found: dict[tuple[int, int], torch.Tensor | None] = {}
        # Leaves where gradients of bound parts have been added, to a tensor of its own.
        self.sums: set[int] = set()
        # The gradients with which torch's engine continues, and what has arrived at its tensors.
        self.to_torch: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.arrivals: dict[int, list[tuple[int | None, torch.Tensor]]] = {}
        # Torch's tensors among the requested ones, by the slot of their gradient. Each once: the
        # gradient of one that is requested twice must not be added twice.
        self.theirs: dict[tuple[int, int], torch.Tensor] = {}
        self.further: set[int] = set()  # torch's tensors whose graph reaches them
        # Gradients that end at a requested tensor, by its slot.
        self.beside: dict[tuple[int, int], torch.Tensor] = {}
        if not self.binds or self.hooked or _state.taps:
            self.counts = self.look_ahead()
        if _state.taps:
            untap(self.order)
        if only is not None:
            self.ask_for(only)
        self.slots_of = {id(tensor): slot for slot, tensor in self.theirs.items()}

    def look_ahead(self) -> dict[int, int]:
        """Look at the graph before anything is computed."""
        ahead = dependencies(self.edges, not self.binds, self.creates_graph)
        self.order += ahead.order
        self.changed |= ahead.changed
        self.meets_results = ahead.meets_results
        return ahead.counts

    def ask_for(self, only: Sequence[Edge]) -> None:
        """Find the way to what is asked for."""
        self.theirs = theirs_among(only)
        ways = {id(t) for t, _ in only}
        beyond.ask_for(only, [*self.theirs.values()], self.order)
        if self.theirs:
            self.further = _leading_on(self.edges, self.order, only)
            # Where torch's graph leads from a tensor that was changed is unknown.
            ways |= self.further | self.changed | {id(t) for t in self.theirs.values()}
        self.reaches = way_to(ways, self.order)

    def leads_to(self, target: Target) -> bool | None:
        is_leaf = not isinstance(target, Node)
        if is_leaf and self.only is not None and not self.into and (id(target), 0) in self.wanted:
            return None
        is_on_way = self.reaches is None or id(target) in self.reaches
        return is_on_way and super().leads_to(target)

    def put_in_front(self, node: Node, target: object) -> None:
        super().put_in_front(node, target)
        if self.reaches is not None and id(target) in self.reaches:
            self.reaches.add(id(node))

    # -- the loop ------------------------------------------------------------------------

    def go_back(self, grads: Sequence[torch.Tensor], keeps: bool = False) -> Iterator[Stop]:
        """Run the walk. If it `stops`, each node is yielded before its step; if it `keeps` them,
        with its gradients."""
        ready, asks = self.ready, not self.is_simple  # at each node, for more than its step
        try:
            for (target, index), grad in zip(self.edges, grads, strict=True):
                self.arrive(target, index, grad, is_root=True)
            while ready:
                node = self.node = heapq.heappop(ready)[1]
                slots = self.arrived.pop(id(node))
                if self.counts is None:
                    runs_users_code = node.node_state is HOOKED or node.attributes is not None
                    if runs_users_code or self.held > _MOST_HELD:
                        self.count()
                if self.binds and self.has_run_part(node, slots):
                    continue
                if not self.order and _meets_torch(node):
                    self.look_ahead()
                special = node.segment is not None or node.theirs is not None
                if (special or asks or node.node_state is HOOKED) and not self.goes_on(node, slots):
                    continue
                found: Slots = []
                if self.stops:
                    yield Stop(node, slots, found)
                    self.catch_up(node)
                results = self.step(node, slots)
                if keeps:
                    found += results
                else:
                    slots.clear()  # so that a leaf may keep the gradient that arrives there
                self.pass_on(node, results)
            self.node = None
        finally:
            if self.counts is None:
                self.count()  # after an error, too: the leaves that are complete get their gradient
        self.go_on_in_torch()
        self.call_back()

    def has_run_part(self, node: Node, slots: Slots) -> bool:
        """Run a bound part from `node`, if there is one."""
        if len(slots) != 1 or slots[0] is None or node.node_state is HOOKED:
            return False
        sign = node.signature
        if sign is None or sign.walks.parts is False:
            return False
        part = bound_part(node, slots[0], self, self.retain_graph)
        if part is None:
            return False
        slots.clear()
        self.arrive_from_part(*part)
        return True

    def goes_on(self, node: Node, slots: Slots) -> bool:
        """Run the hooks of the results of `node`, which may replace the gradients in `slots`, and
        note those that were asked for. Does the walk go on from there?"""
        if node.segment is not None:
            node.segment.expand(node)
        if self.stop is not None and all(g is None for g in slots):
            return self.pass_over(node)
        reaches = self.reaches
        if reaches is not None:
            self.needs = tuple([t is not None and id(t) in reaches for t in node.targets])
        is_passed = self.needs is not None and True in self.needs
        is_early = is_passed and node.theirs is None
        if is_early:  # in PyTorch's engine, its hooks run later then
            self.capture(node, slots)
        if node.tensor_hooks is not None or node.retained is not None:
            run_output_hooks(node, slots)
        if node.theirs is not None and beyond.is_hooked(tensor := node.theirs()):
            if slots[0] is not None:
                self.to_torch.append((tensor, slots[0]))  # its engine calls the hooks
                if not self.retain_graph:
                    node.theirs.hooked = None  # no other walk comes here
            return self.pass_over(node)
        if not is_early:
            self.capture(node, slots)
        if self.stop is not None and all(g is None for g in slots):
            return self.pass_over(node)
        if reaches is not None and not is_passed:
            return False
        if node.prehooks:
            slots[:] = run_prehooks(node.prehooks, slots)
        return True

    def capture(self, node: Node, slots: Slots) -> None:
        """Note the gradients of its results that were asked for."""
        for i in range(len(slots)) if self.wanted else ():
            if (id(node), i) in self.wanted:
                self.found[id(node), i] = slots[i]
                if self.stop is not None:
                    slots[i] = None

    def pass_over(self, node: Node) -> bool:
        """What lies behind where the walk stops is left as it is; others may lead there too."""
        for edge in node.edges:
            if edge is not None:
                self.arrive(edge[0], edge[1], None)
        return False

    def step(self, node: Node, slots: Slots) -> Slots:
        """The gradients of the inputs of `node`."""
        results: Slots
        if node.attributes is None and slots[0] is None and all(g is None for g in slots):
            # A user's Function is called even then: it may return zeros.
            results = [None] * len(node.targets)
        else:
            results = validate_outputs(
                node, node.run(slots) if self.runs else self.run(node, slots)
            )
            if not self.is_simple and torch.is_anomaly_enabled():
                _refuse_nan(node, results)
        if node.posthooks:
            results = run_posthooks(node.posthooks, node.inputs, results, slots)
        return results

    def run(self, node: Node, slots: Slots) -> Sequence[torch.Tensor | None]:
        """Run its formulas."""
        if self.creates_graph:
            return _tape.run_recorded(node, slots, self.needs or node.needs_input_grad)
        if self.needs is not None:
            return _tape.needing(node, self.needs).run(slots)
        formulas = node.function.formulas
        if self.stops and formulas is not None and node.attributes is None:
            return formulas.back_plainly(node, slots)
        return node.run(slots)

    def catch_up(self, node: Node) -> None:
        """Account for what was changed while the walk stopped."""
        for target in node.targets:
            if target is not None and _tensor.is_torchs(target) and beyond.catch_up(node, target):
                self.changed.add(id(target))

    # -- how gradients arrive ------------------------------------------------------------

    def pass_on(self, node: Node, results: Slots) -> None:
        """The gradients of the inputs of `node` arrive there. The list is emptied."""
        if not self.retain_graph:
            node.free()
        results.reverse()
        indices, reaches, hooked = node.indices, self.reaches, self.hooked
        arrive = self.arrive
        for place, target in enumerate(node.targets):
            if target is None:
                results.pop()
                continue
            if hooked and (reaches is None or id(target) in reaches):
                _refuse_swapped(node, target)
            arrive(target, 0 if indices is None else indices[place], results.pop())

    def arrive(
        self, target: Any, index: int, grad: torch.Tensor | None, is_root: bool = False
    ) -> None:
        """One gradient (or None) arrives at `target`, a node or a leaf.

        Hooks of a tensor where the walk starts are called even if the walk ends there, as in
        PyTorch.
        """
        key, reaches = id(target), self.reaches
        if reaches is not None and key not in reaches and not is_root:
            return
        if index == NO_FURTHER:
            slot = self.slots_of.get(key)
            if slot is not None and grad is not None:
                _add_at(self.beside, slot, grad, self.add)
            return
        is_node = isinstance(target, Node)
        if self.changed and key in self.changed and grad is not None:
            raise NotImplementedError(beyond.CHANGED)
        slots = self.arrived.get(key)
        if slots is None:
            if is_node:
                slots = self.arrived[key] = [None] * len(target.call_info.outputs)
                if reaches is None or key in reaches:
                    heapq.heappush(self.ready, (-target.sequence, target))
                    slots[index] = grad
                    return
            else:
                slots = self.arrived[key] = [None]
                self.leaves[key] = target
                if grad is not None:
                    self.held += grad.nbytes
        if grad is not None:
            if not is_node and _tensor.is_torchs(target):
                if not self.order:
                    self.look_ahead()
                if self.meets_results:
                    came_from = None if self.node is None else self.node.sequence
                    self.arrivals.setdefault(key, []).append((came_from, grad))
            held = slots[index]
            slots[index] = grad if held is None else self.add(held, grad)
            grad = None  # from here on, only the slot refers to it
        if is_node and (reaches is None or key in reaches):
            return
        if self.counts is None:
            self.came.append(((target, 0),))
        else:
            self.counts[key] -= 1
            if not self.counts[key]:
                if is_node:  # where the walk starts, and nothing else leads
                    heapq.heappush(self.ready, (-target.sequence, target))
                else:
                    self.complete(key)

    def arrive_from_part(self, targets: Sequence[Edge], grads: list[torch.Tensor]) -> None:
        """The gradients of a bound part arrive at `targets`; the first one is the last of `grads`.

        As `arrive`, with fewer checks where others have arrived, as at the weights that an unrolled
        loop uses in each step.
        """
        if self.counts is not None:
            for target, index in targets:
                self.arrive(target, index, grads.pop())
            return
        arrived, sums = self.arrived, self.sums
        held: list[torch.Tensor] = []
        more: list[torch.Tensor] = []
        for target, index in targets:
            key = id(target)
            slots = arrived.get(key)
            if slots is None or index or slots[0] is None:
                self.arrive(target, index, grads.pop())
            elif key in sums:
                held.append(slots[0])
                more.append(grads.pop())
            else:
                slots[0] = slots[0] + grads.pop()
                if slots[0].is_cpu:  # elsewhere, these are added in no particular order
                    sums.add(key)
        if held:
            _torch.foreach_add_(held, more)
        self.came.append(targets)

    def count(self) -> None:
        """From now on, complete each leaf as soon as that is possible."""
        self.counts = counts = self.ahead(self.node)
        for key in self.leaves_in_order():
            if key not in counts:
                self.complete(key)

    def complete(self, key: int) -> None:
        """All gradients of a leaf have arrived."""
        target, slots = self.leaves.pop(key), self.arrived.pop(key)
        unshared = sys.getrefcount(slots[0]) <= 2  # the slot, and the call's argument
        is_ours = isinstance(target, _tensor.Tensor)
        if self.is_simple and is_ours:  # what is usual, with fewer checks
            finish_leaf(target, slots[0], unshared)
            if self.hooked:
                run_reached_hooks(target)
            return
        if self.stop is not None and slots[0] is None:
            return
        chosen = (key, 0) in self.wanted
        theirs_hooked = chosen and not is_ours and beyond.is_hooked(target)
        if (key in self.further or theirs_hooked) and slots[0] is not None:
            # Torch's engine reports what arrives there, too.
            self.to_torch.append((target, slots[0]))
        elif chosen and not (self.into and is_ours):
            slots[0] = run_tensor_hooks(leaf_hooks(target), slots[0])
            if self.give is None:
                self.found[key, 0] = slots[0]
            else:
                self.give(target, slots[0])
        elif self.reaches is None or chosen:
            if not self.order and not is_ours:
                self.look_ahead()
            # Torch's engine continues from a tensor with a graph or a hook; and from a leaf that
            # may get more through such a graph, as torch sums all of them before adding to `.grad`.
            goes_on = not is_ours and (self.meets_results or beyond.goes_on(target))
            if slots[0] is None or not goes_on:
                finish_leaf(target, slots[0], unshared)
            else:
                self.to_torch.append((target, slots[0]))
            run_reached_hooks(target)
        else:
            run_tensor_hooks(leaf_hooks(target), slots[0])

    # -- the end -------------------------------------------------------------------------

    def go_on_in_torch(self) -> None:
        """Torch's engine continues, in one run, so that it sums in its own order."""
        to_torch, retain_graph = self.to_torch, self.retain_graph
        if not to_torch:
            pass
        elif self.give is not None:
            for tensor, grad in to_torch:
                self.give(tensor, grad)
        elif self.only is not None:
            through_torch(
                self.found, to_torch, self.theirs, retain_graph, self.creates_graph, self.arrivals
            )
        elif self.creates_graph:
            ends = beyond.behind([tensor for tensor, _ in to_torch])[0]
            tensors, starts, order = beyond.onward(to_torch, self.arrivals)
            more = beyond.go_back(tensors, starts, ends, retain_graph, True, order=order)
            for leaf, one in zip(ends, more, strict=True):
                if one is not None:
                    accumulate(leaf, one, False, True)
                    for hook in tuple((leaf._post_accumulate_grad_hooks or {}).values()):
                        with users_code(True):
                            hook(leaf)
        else:
            beyond.accumulate(to_torch, retain_graph, self.arrivals)
        for slot, grad in self.beside.items():
            _add_at(self.found, slot, grad, self.add)

    def found_at(self, ends: Sequence[Edge]) -> Slots:
        """The gradients that were asked for."""
        return [self.found.get((id(t), n)) for t, n in ends]


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


def way_to(ends: set[int], order: Sequence[Node]) -> set[int]:
    """The ids of `ends`, and of the nodes on the way to them."""
    reaches = set(ends)
    for node in sorted(order, key=_sequence_of):
        if any(id(target) in reaches for target in node.targets):
            reaches.add(id(node))
    return reaches


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
    if not torch.is_anomaly_check_nan_enabled():
        return
    for place, index in enumerate(node.inputs):
        grad = results[index]
        if grad is not None and grad.isnan().any():
            name = bare(node.name())
            raise RuntimeError(f"Function '{name}' returned nan values in its {place}th output.")


def validate_outputs(
    node: Node, results: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
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
                shape, dtype, _ = target.call_info.outputs[index]
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
        if grad.requires_grad and not running.creates_graph:
            grad = grad.detach()
        checked.append(grad)
    return checked


def _fitted(grad: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if running.creates_graph:
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


@upcall("nnmirror.fast.tapped")
def untap(nodes: Iterable[Node]) -> None:
    """Replace the taps on `nodes` by hooks."""
    raise NotImplementedError


@upcall("nnmirror.fast.parts")
def bound_part(
    node: Node, grad: torch.Tensor, progress: GraphTask, retain_graph: bool
) -> "Left | None":
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
