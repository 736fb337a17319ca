"""Torch's own graph in front of a mirrored layer.

A script may compute with tensors that require grad for torch before it calls a mirrored module:
`net(torch.cat([x, t], 1))`. The backward of that part is run by torch's engine, starting from the
gradient that the mirror's walk computes. With `create_graph=True` it is recorded as one call of
`TorchGraph`, whose gradient is again computed by torch's engine.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import add, itemgetter
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch

from . import tape as _tape
from . import tensor as _tensor
from ._state import sequence as _sequence
from ._torch import EnableTorchFunction, engine
from ._types import TorchFunction
from ._upcalls import implements, upcall
from .double_backward import alias_of, tracked_alias
from .fast.shorter import memory_of
from .formula import Plan
from .moments import note_moment, number_of_torchs, torchs_number
from .node import NO_FURTHER, Edge, Node
from .operation import Operation

T = torch.Tensor


# Records the call of torch's node (the first argument) on these inputs; the last argument is the
# metadata of its result. Returns the result, or the node; None if it cannot.
Recording: TypeAlias = Callable[[Any, Sequence[T], Any], Any]


class Taken(NamedTuple):
    """How the call of a node of torch's is recorded as one of the mirror's: the attributes of the
    node with its saved inputs and its saved result, "" where it does not save them."""

    call: Recording
    inputs: tuple[str, ...] = ()
    result: str = ""


@upcall("nnmirror.rules.taken")
def taking(made_by: Any) -> Taken | None:
    """How the call of this node is recorded anew; None if that is not known."""
    raise NotImplementedError


class _Result(NamedTuple):
    """What is known about a result of torch's own that the mirror was given."""

    tensor: "weakref.ref[T]"
    made_by: int  # the number of torch's node that made it; it changes with an in-place change
    since: int  # calls recorded later have an edge to that node
    over: _tensor.Tensor | None  # the mirrored tensor that stands for it


_results: dict[int, _Result] = {}  # by id; an attribute of the tensors would end up in a checkpoint


def _known(tensor: T) -> _Result | None:
    """What is known about a result, as of its last use."""
    found = _results.get(id(tensor))
    return found if found is not None and found.tensor() is tensor else None


def _number_of(tensor: T) -> int:
    made_by = tensor.grad_fn
    return -1 if made_by is None else made_by._sequence_nr()


@implements(_tape)
def taken_over(tensor: T, may_be: bool = True) -> _tensor.Tensor | None:
    """A result of torch's own as one of the mirror's; None if that is impossible, or not `may_be`.

    It is possible if torch.cat made it of leaves, like the input of physics-informed nets: torch's
    graph then has no other tensor that could have a hook. Or if it was made of leaves by several
    calls that can be recorded anew (`taking`), a gradient of a gradient went through such calls
    before, and no tensor in between has a hook. The walk looks for hooks that are registered later.
    (A hook on torch's own nodes is not seen.)
    """
    known = _known(tensor)
    if (
        known is not None
        and known.made_by == _number_of(tensor)
        and (known.over is None or tensor.is_set_to(known.over))
    ):
        return known.over if may_be else None
    return _meet(tensor, _made_over(tensor) if may_be else None).over


def _meet(tensor: T, over: _tensor.Tensor | None = None) -> _Result:
    """Remember which node of torch makes a result now.

    If nothing stands for it, gradients come to the tensor itself, so that nothing may stand for its
    node from now on.
    """
    if over is None and tensor.grad_fn is not None:
        made_by: Any = tensor.grad_fn
        made_by.metadata[_LEFT] = True
        if _wanted:
            _leave_parts(tensor)
    key = id(tensor)
    found = _results[key] = _Result(
        weakref.ref(tensor, functools.partial(_forget, _results, key)),
        _number_of(tensor),
        next(_sequence),
        over,
    )
    return found


def _forget(known: dict[int, _Result], key: int, ref: object) -> None:
    known.pop(key, None)  # given, as at exit the module's globals are gone


def _made_over(tensor: T) -> _tensor.Tensor | None:
    known = _stand_in(tensor.grad_fn)
    if known is not None:  # met behind another call; all gradients have to come to one place
        if len(known.outputs) == 1:
            _stands_for(known, tensor)
        return alias_of(tensor, known, tensor.output_nr)
    if is_hooked(tensor) or len(tensor.grad_fn._input_metadata) != 1:  # type: ignore[union-attr]
        return None
    node = _taken(tensor.grad_fn, tensor._is_view())
    if node is None or node.outputs[0][0] != tensor.shape:
        return None
    made = alias_of(tensor, node, 0)
    node.theirs = _Theirs(tensor, made)
    return made


def _taken(last: Any, is_view: bool) -> Node | None:
    """The mirror's node for this node of torch's, with all that lies between it and leaves; None if
    one of them cannot be recorded anew. A view is left alone, unless something stands for what it
    is computed from."""
    if not (_wanted or _is_cat(last)):
        return None  # what is usual, without a look at what lies behind
    order = _before(last)
    if order is None or (is_view and not any(map(_stand_in, order))):
        return None
    if _wanted and not _is_joined(order):
        is_left = any(_LEFT in made_by.metadata for made_by in order)
        is_wanted = _calls_like(order) in _wanted or any(map(_stand_in, order))
        if is_left or not is_wanted:
            for made_by in order:  # torch's engine passes on all gradients that come to these
                made_by.metadata[_LEFT] = True
            return None
    elif not _is_joined(order):
        return None
    note_moment()
    nodes: list[Node] = []  # until one behind refers to them
    try:
        for made_by in order:
            if _stand_in(made_by) is not None:
                continue
            node = _recorded_again(made_by)
            if node is None:
                return None
            node.sequence = number_of_torchs(made_by._sequence_nr())  # type: ignore[assignment]
            made_by.metadata[_NODE] = weakref.ref(node)
            nodes.append(node)
    except (IndexError, RuntimeError, TypeError):  # what was saved has changed, or was freed
        return None
    return _stand_in(last)


def _before(last: Any) -> list[Any] | None:
    """The nodes of torch's from leaves to this one, in order; None if one of them cannot be
    recorded anew."""
    order: dict[Any, None] = {}
    stack: list[Any] = [last]
    while stack:
        made_by = stack.pop()
        if made_by in order:
            continue
        if len(order) >= _MOST_TAKEN or taking(made_by) is None:
            return None
        order[made_by] = None
        for behind, _ in made_by.next_functions:
            if behind is not None and not _is_accumulator(behind):
                stack.append(behind)
    return sorted(order, key=lambda made_by: made_by._sequence_nr())


def _is_accumulator(node: Any) -> bool:
    """Is it the AccumulateGrad of a leaf? (A user's Function may have a `variable` too.)"""
    return type(node).__name__ == "AccumulateGrad"


def _is_joined(order: Sequence[Any]) -> bool:
    """Did torch.cat join leaves? There is no tensor in between then."""
    return len(order) == 1 and _is_cat(order[0])


def _is_cat(node: Any) -> bool:
    return type(node).__name__ == "CatBackward0"


def _calls_like(order: Sequence[Any]) -> object:
    """What is the same in each step of a training."""
    return tuple([(type(made_by), made_by._input_metadata[0].dtype) for made_by in order])


def _want(tensors: Sequence[T]) -> None:
    """A gradient of a gradient goes through torch's graph of these: calls like those are to be
    recorded anew from now on."""
    for tensor in tensors:
        order = None if tensor.grad_fn is None else _before(tensor.grad_fn)
        if order is not None and len(_wanted) < _MOST_WANTED:
            _wanted.add(_calls_like(order))


_wanted: set[object] = set()
_MOST_WANTED = 256
_MOST_TAKEN = 32
# In the metadata of torch's nodes: the mirror's node that stands for it; and whether torch's engine
# passes on all gradients that come to it.
_NODE, _LEFT = "nnmirror: node", "nnmirror: left to torch"
# And whether torch's engine passes a gradient to one of several results that a node stands for.
_PASSED_BY = "nnmirror: passed by"


def _leave_parts(tensor: T) -> None:
    """Torch's engine will compute gradients for what is behind this tensor. Those of one of several
    results, such as those of unbind, would not be added to others that come to it."""
    nodes: set[Any] = behind([tensor])[1]
    for made_by in nodes:
        if len(made_by._input_metadata) > 1:
            made_by.metadata[_LEFT if _stand_in(made_by) is None else _PASSED_BY] = True


def check_input(tensor: T) -> None:
    """Refuse a gradient for one of several results, of which torch's engine would keep a part."""
    made_by: Any = tensor.grad_fn
    if made_by is not None and _PASSED_BY in made_by.metadata:
        raise NotImplementedError(_PART)


_PART = (
    "nnmirror: a gradient for one of several results of torch's own, such as those of unbind, is"
    " not mirrored if both a net and an operation that is left to torch's engine use it; take that"
    " for the result times one, `x * 1`"
)


def _stand_in(made_by: Any) -> Node | None:
    """The mirror's node that stands for this one of torch's, if there is one."""
    known = made_by.metadata.get(_NODE)
    return None if known is None else known()


def _recorded_again(made_by: Any) -> Node | None:
    """The call of torch's node as one of the mirror's, on tensors of the same shapes; None if it
    would save numbers that torch has not saved."""
    how = taking(made_by)
    assert how is not None
    like = made_by._input_metadata[0]
    saved = [getattr(made_by, name) if name else None for name in how.inputs]
    inputs: list[T] = []
    unknown: set[int] = set()  # memory with other numbers than torch's call had
    for i, (behind, index) in enumerate(made_by.next_functions):
        value = saved[i] if i < len(saved) else None
        if behind is None:
            if value is None:
                value = torch.empty((), dtype=like.dtype, device=like.device).expand(like.shape)
                unknown.add(memory_of(value))
            # Torch has saved the tensor itself, which may be given other data.
            inputs.append(value.detach() if value.requires_grad else value)
            continue
        of = behind._input_metadata[index]
        if of.dtype is not like.dtype and len(made_by.next_functions) > 1:
            return None  # one of several was converted
        if _is_accumulator(behind):
            leaf = behind.variable
            if isinstance(leaf, _tensor.Tensor) or not leaf.requires_grad:
                return None
            if (leaf.shape, leaf.dtype) != (tuple(of.shape), of.dtype):  # it has changed since
                return None
            inputs.append(leaf)
            continue
        node = _stand_in(behind)
        assert node is not None
        is_saved = value is not None
        if value is None:
            value = torch.empty(of.shape, dtype=of.dtype, device=of.device)
            unknown.add(memory_of(value))
        alias = alias_of(value, node, index)
        if is_saved and node.theirs is None and len(node.outputs) == 1:
            node.theirs = _Theirs(value, alias)  # it may be given other data, as above
        inputs.append(alias)
    made: Any = how.call(made_by, inputs, like)
    if isinstance(made, Node):
        return made
    results = made if isinstance(made, tuple) else (made,)
    made_node = getattr(results[0], "_node", None)
    if made_node is None or len(results) != len(made_by._input_metadata):
        return None
    for result, of in zip(results, made_by._input_metadata, strict=True):
        if result.shape != tuple(of.shape) or result.dtype is not of.dtype:
            return None
    if unknown:
        unknown.update(map(memory_of, results))
    return made_node if _saves_what_torch_saved(made_node, made_by, how.result, unknown) else None


def _saves_what_torch_saved(node: Node, made_by: Any, result: str, unknown: set[int]) -> bool:
    """Let `node` save the result that torch's node has saved; is all else that it saves known?"""
    for i, tensor in enumerate(node._saved or ()):
        if result and node.plan is not None and node.plan.saves[i] < 0:
            known = getattr(made_by, result).detach()
            known._alias_of_output = 0
            node._saved = [*node._saved[:i], known, *node._saved[i + 1 :]]  # type: ignore[index]
            versions = node._versions or ()
            node._versions = [*versions[:i], known._version, *versions[i + 1 :]]
        elif tensor is not None and memory_of(tensor) in unknown:
            return False
    return True


def _stands_for(node: Node, tensor: T) -> "_Theirs":
    """`node` stands for a result of torch's own, of which something is asked."""
    if node.theirs is None:
        if len(node.outputs) > 1:
            raise NotImplementedError(_HOOKED_PART)
        node.theirs = _Theirs(tensor, alias_of(tensor, node, 0))
    return node.theirs


def _marking_hooks(method: TorchFunction) -> TorchFunction:
    """`method`, which registers a hook; of a result of torch's own, it is marked as hooked."""

    @functools.wraps(method)
    def register(tensor: T, *args: object, **kwargs: object) -> Any:
        made_by: Any = tensor.grad_fn if _tensor.is_torchs(tensor) else None
        if made_by is not None:
            node = _stand_in(made_by)
            if node is None:
                made_by.metadata[_LEFT] = True
            else:
                _stands_for(node, tensor).hooked = tensor
                node.mark_hooked()  # walks may have been bound without it
        return method(tensor, *args, **kwargs)

    return register


# A hook is stored with torch's node, where it cannot be seen.
for _name in ("register_hook", "retain_grad"):
    setattr(T, _name, _marking_hooks(getattr(T, _name)))


_HOOKED_PART = (
    "nnmirror: a hook on one of several results of torch's own, such as those of unbind, is not"
    " mirrored after a net has used them; register it before, or on the result times one, `x * 1`"
)


@implements(_tape)
def edge_to(tensor: T) -> Edge:
    """The edge for the gradient of a result of torch's own."""
    node = _stand_in(tensor.grad_fn)
    if node is not None:
        if len(node.outputs) == 1:
            _stands_for(node, tensor)
        return node, tensor.output_nr
    known = _known(tensor)
    if known is None or known.made_by != _number_of(tensor):
        known = _meet(tensor)
    return (tensor, 0) if known.over is None else (known.over._node, 0)  # type: ignore[return-value]


def catch_up(node: Node, tensor: T) -> bool:
    """Account for changes of torch's `tensor` since `node`, which has an edge to it, was recorded.

    PyTorch saves the tensor itself, so if its data was replaced, what is saved here gets the new
    data. Returns whether another node of torch makes it now, so that no gradient may go there.
    """
    if node.theirs is not None:
        node.theirs.catch_up()
    saved: Any = node._saved
    plan, edges = node.plan, node.edges
    if node.segment is not None and saved is not None:
        first = node.segment.inner[0]
        saved, plan = saved[0], first.plan
        edges = [(tensor, 0) if edge is ... else edge for edge in first.edges]
    for i in followed(plan, edges, tensor) if saved else ():
        if not tensor.is_set_to(saved[i]):
            _tensor._C_data.__set__(saved[i], tensor.detach())
    return has_changed(node, tensor)


def followed(plan: Plan | None, edges: Sequence[Edge | None], tensor: T) -> list[int]:
    """Which saved aliases of torch's `tensor` in a node have its present data."""
    if plan is None or tensor.layout is not torch.strided:
        return []
    edge_at = dict(enumerate(edges))
    return [
        i
        for i, place in enumerate(plan.saves)
        if i not in plan.memory and i not in plan.copied
        if (edge := edge_at.get(place)) is not None and edge[0] is tensor
    ]


def has_changed(node: Node, tensor: T) -> bool:
    """Was torch's `tensor` the result of another node of torch when `node` was recorded?"""
    known = _known(tensor)
    return known is not None and (
        known.since > node.sequence or known.made_by != _number_of(tensor)
    )


def is_unusual(node: Node, tensor: T) -> bool:
    """Does torch's `tensor`, to which `node` has an edge, need its gradient for more than
    `.grad`?"""
    return is_hooked(tensor) or has_changed(node, tensor)


class _Theirs:
    """Torch's tensor that a node stands for; None if it is gone or has changed since."""

    def __init__(self, tensor: T, made: _tensor.Tensor) -> None:
        self.tensor, self.made_by = weakref.ref(tensor), _number_of(tensor)
        self.made = weakref.ref(made)  # the mirrored tensor that stood for it
        self.hooked: T | None = None  # itself, once it has a hook: that outlives it in PyTorch

    def __call__(self) -> T | None:
        tensor = self.tensor()
        if tensor is None or _number_of(tensor) == self.made_by:
            return tensor
        if tensor.is_leaf or is_hooked(tensor):  # did it have a hook before, or does it now?
            raise NotImplementedError(CHANGED)
        return None

    def catch_up(self) -> None:
        """As above: what was saved of it gets its present data."""
        tensor, made = self.tensor(), self.made()
        if tensor is not None and made is not None and not tensor.is_set_to(made):
            _tensor._C_data.__set__(made, tensor.detach())

    def is_unchanged(self) -> bool:
        """Is nothing special needed for it: no hook, no replaced data, no detach_()?"""
        tensor, made = self.tensor(), self.made()
        return tensor is None or not (
            is_hooked(tensor) or tensor.is_leaf or (made is not None and not tensor.is_set_to(made))
        )


CHANGED = (
    "nnmirror: no gradient can go back to a tensor of torch's own graph that was changed in place"
    " (or by detach_()) after a mirrored operation used it; change a clone of it instead"
)


def is_hooked(tensor: T | None) -> TypeGuard[T]:
    """Must something be done with its gradient on the way?"""
    return tensor is not None and bool(tensor._backward_hooks or tensor.retains_grad)


def may_have_accumulator(leaf: T) -> bool:
    """Is there an AccumulateGrad of torch's leaf, which may have hooks? It holds the leaf."""
    return leaf._use_count() > 1 and not leaf._backward_hooks  # type: ignore[attr-defined]


def behind(tensors: Iterable[T]) -> tuple[list[T], set[object]]:
    """The leaves in torch's graph behind `tensors`, and its nodes."""
    leaves: dict[int, T] = {}
    nodes: set[object] = set()
    stack: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is None:
            leaves[id(tensor)] = tensor
        stack.append(tensor.grad_fn)
    while stack:
        node = stack.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        stack += [n for n, _ in node.next_functions]
    return list(leaves.values()), nodes


# Of a tensor, by its id: the gradients that arrived there, each with the number of the mirror's
# call that it came from; None if the walk started there.
Arrivals: TypeAlias = Mapping[int, Sequence[tuple[int | None, T]]]


def total(parts: Sequence[tuple[int | None, T]]) -> T:
    """The sum of the gradients that arrived at a tensor."""
    return functools.reduce(add, [part for _, part in parts])


def shared(tensors: Sequence[T]) -> tuple[dict[int, int], list[Any]]:
    """How many gradients torch's graph passes from some of `tensors` to others, by the ids of
    these; and the nodes of torch behind them."""
    results = {(t.grad_fn, t.output_nr): id(t) for t in tensors if t.grad_fn is not None}
    ids = {id(t) for t in tensors}
    counts: dict[int, int] = {}
    nodes: set[Any] = behind([t for t in tensors if t.grad_fn is not None])[1]
    for node in nodes:
        for edge in node.next_functions:
            key = results.get(edge, id(getattr(edge[0], "variable", None)))
            if key in ids:
                counts[key] = counts.get(key, 0) + 1
    return counts, [node for node in nodes if not _is_accumulator(node)]


def is_shared(tensors: Sequence[T]) -> bool:
    """Are their gradients to be added to those that torch computes for them from others?"""
    return not all(t.is_leaf for t in tensors) and bool(shared(tensors)[0])


class Order(NamedTuple):
    """The order in which torch's engine is to add gradients: its nodes, and aliases of tensors in
    the order of the mirror's calls. An alias comes after the nodes below its number."""

    nodes: Sequence[Any]
    aliases: Sequence[tuple[int, T]]


class Onward(NamedTuple):
    """Where torch's engine continues: the tensors, and their gradients.

    The engine adds the gradients of one tensor in the order of its calls, the last first. Those
    that came from the mirror's calls, if torch computes others for the same tensor, are given to
    aliases of it, which are to be numbered as these calls would be.
    """

    tensors: tuple[T, ...]
    grads: tuple[T, ...]
    order: Order | None = None


def onward(to_torch: Sequence[tuple[T, T | None]], arrivals: Arrivals) -> Onward:
    """Where torch's engine continues from, with these gradients; None for the sum of what has
    arrived."""
    counts: dict[int, int] = {}
    nodes: Sequence[Any] = ()
    to_torch = [(t, g) for t, g in to_torch if t.requires_grad]  # others were frozen meanwhile
    if not to_torch:
        return Onward((), ())
    if len(to_torch) > 1:
        counts, nodes = shared([tensor for tensor, _ in to_torch])
    roots: list[tuple[T, T]] = []
    aliases: list[tuple[int, int, T]] = []
    for tensor, grad in to_torch:
        parts = arrivals.get(id(tensor), ())
        more = counts.get(id(tensor), 0)
        if not parts or not more or len(parts) + more < 3:  # two are added in either order
            roots.append((tensor, total(parts) if grad is None else grad))
            continue
        with torch.enable_grad():
            for number, part in reversed(parts):  # of one call, the first argument's comes first
                alias = tensor.view_as(tensor)
                roots.append((alias, part))
                aliases.append((torchs_number(number), -1 if number is None else number, alias))
    aliases.sort(key=itemgetter(0, 1))
    tensors, grads = zip(*roots, strict=True)
    if not aliases:
        return Onward(tensors, grads)
    return Onward(tensors, grads, Order(nodes, [(number, alias) for number, _, alias in aliases]))


@contextlib.contextmanager
def _numbered(order: Order | None) -> Iterator[None]:
    """Number torch's calls so that the aliases are in between, for one run of its engine."""
    nodes, aliases = order or Order((), ())
    numbers = [(node, node._sequence_nr()) for node in nodes]
    room = len(aliases) + 1
    try:
        for node, number in numbers:
            node._set_sequence_nr((number + 1) * room)
        for i, (number, alias) in enumerate(aliases, start=1):
            made_by: Any = alias.grad_fn
            made_by._set_sequence_nr(number * room + i)
        yield
    finally:
        for node, number in numbers:
            node._set_sequence_nr(number)


def goes_on(tensor: T) -> bool:
    """Does torch's engine do more with the gradient of its own tensor than store it?"""
    return bool(not tensor.is_leaf or tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def theirs(target: object) -> T | None:
    """The torch tensor that an edge refers to, or that its node stands for."""
    if isinstance(target, Node):
        return None if target.theirs is None else target.theirs()
    return target if _tensor.is_torchs(target) else None  # type: ignore[return-value]


def passing(targets: Sequence[T], ends: Sequence[Edge]) -> tuple[bool, ...]:
    """For each of torch's `targets`: does torch's graph pass its gradient on to one of `ends`?"""
    found = [end for target, _ in ends if (end := theirs(target)) is not None]
    return tuple([bool(found) and t.grad_fn is not None and leads_to(t, found) for t in targets])


def leads_to(tensor: T, ends: Sequence[T]) -> bool:
    """Does torch's graph of `tensor`, a result, reach one of `ends`?"""
    leaves = {id(end) for end in ends}
    made_by = {end.grad_fn for end in ends if end is not tensor and end.grad_fn is not None}
    seen: set[object] = set()
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in made_by or id(getattr(node, "variable", None)) in leaves:
            return True
        seen.add(node)
        stack += [n for n, _ in node.next_functions]
    return False


def go_back(
    tensors: Sequence[T],
    grads: Sequence[T],
    inputs: Sequence[T],
    retain_graph: bool,
    create_graph: bool,
    stands_for: dict[int, T] | None = None,
    order: Order | None = None,
) -> Sequence[T | None]:
    """The gradients of torch's `tensors` for torch's `inputs`, from `grads`; None where they are
    not connected. Recorded with `create_graph`.

    `stands_for` says which tracked tensors some of torch's leaves stand for; `order` is that
    of `Onward`.
    """
    asked = [x for x in inputs if x.requires_grad]
    if len(asked) < len(inputs):  # some were frozen in the meantime
        found: Sequence[T | None] = ()
        if asked:
            found = go_back(tensors, grads, asked, retain_graph, create_graph, stands_for, order)
        left = iter(found)
        return [next(left) if x.requires_grad else None for x in inputs]
    going = [(t, g) for t, g in zip(tensors, grads, strict=True) if t.requires_grad]
    if not going:
        return [None] * len(inputs)
    tensors, grads = zip(*going, strict=True)
    if not create_graph:
        return _gradients(tensors, grads, inputs, retain_graph, order=order)
    _want(tensors)
    retained = [t for t in tensors if t.retains_grad and not t._backward_hooks]
    retained = [t for t in retained if not any(t is x for x in inputs)]
    if retained:  # torch's engine would keep gradients without their history
        before = [t.grad for t in retained]
        asked = [*inputs, *retained]
        more = go_back(tensors, grads, asked, retain_graph, True, stands_for, order)
        with EnableTorchFunction():
            for t, held, g in zip(retained, before, more[len(inputs) :], strict=True):
                t.grad = g if held is None or g is None else held + g
        return more[: len(inputs)]
    stands_for = stands_for or {}
    ends = [leaf for leaf in behind(tensors)[0] if leaf.requires_grad]
    ends += [x for x in inputs if not x.is_leaf]
    of = _Piece(tuple(tensors), tuple(inputs), tuple(ends), order)
    args = of, *grads, *[stands_for.get(id(end), end) for end in ends]
    results, node = _tape.record(TorchGraph, args)
    # A result of torch among the inputs gets its gradient, and so do the leaves behind it.
    edges = list(node.edges)  # type: ignore[union-attr]
    for i, end in enumerate(ends, start=1 + len(grads)):
        if not end.is_leaf:
            edges[i] = end, NO_FURTHER
    node.edges = edges  # type: ignore[union-attr]
    return results  # type: ignore[no-any-return]


def ask_for(ends: Sequence[Edge], tensors: Sequence[T], nodes: Sequence[Node]) -> None:
    """Have each call of `TorchGraph` among `nodes` also give the gradients of those of torch's
    `tensors` that are within its piece of torch's graph.

    NotImplementedError if one of its results is among the `ends`, and another follows from it.
    """
    for target, _ in ends:
        if isinstance(target, Node) and target.function is TorchGraph:
            of: Any = target
            inputs = of.of.inputs
            if any(x.grad_fn and leads_to(x, inputs) for x in inputs):
                raise NotImplementedError(_SIDE_BY_SIDE)
    results = [t for t in tensors if not t.is_leaf]
    for node in nodes if results else ():
        if node.function is not TorchGraph:
            continue
        ctx: Any = node
        within = behind(ctx.of.tensors)[1]
        more = [t for t in results if t.grad_fn in within]
        more = [t for t in more if not any(t is end for end in ctx.of.ends)]
        if more:
            ctx.of = ctx.of._replace(ends=(*ctx.of.ends, *more))
            node.needs_input_grad += (True,) * len(more)
            node.edges = [*node.edges, *[(tensor, NO_FURTHER) for tensor in more]]


def _gradients(
    tensors: Sequence[T],
    grads: Sequence[T],
    inputs: Sequence[T],
    retain_graph: bool,
    create_graph: bool = False,
    order: Order | None = None,
) -> Sequence[T | None]:
    """As `torch.autograd.grad` of torch's tensors, which may not be used."""
    with _numbered(order), EnableTorchFunction():  # for hooks
        return engine.run_backward(
            tuple(tensors),
            tuple(grads),
            retain_graph,
            create_graph,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )


def accumulate(
    arrived: Sequence[tuple[T, T | None]], retain_graph: bool, arrivals: Arrivals | None = None
) -> None:
    """Continue the backward from torch's tensors, and add to the `.grad` of the leaves."""
    tensors, grads, order = onward(arrived, arrivals or {})
    if not tensors:
        return
    with _numbered(order), EnableTorchFunction():  # for hooks
        engine.run_backward(
            tensors, grads, retain_graph, False, (), allow_unreachable=True, accumulate_grad=True
        )


_HOOKED = (
    "nnmirror: a gradient of a gradient that torch computed is not mirrored for a tensor of torch's"
    " own that has a hook; remove the hook, or register it on the tensor times one, `x * 1`, and"
    " compute with that"
)
_SIDE_BY_SIDE = (
    "nnmirror: the gradient of a gradient that torch computed together with others, one of which"
    " follows from it within torch's graph, is not mirrored; ask for the gradients one by one"
)


class _Piece(NamedTuple):
    """A piece of torch's graph: its outputs, the inputs asked for, and its leaves."""

    tensors: tuple[T, ...]
    inputs: tuple[T, ...]
    ends: tuple[T, ...]
    order: Order | None = None


class TorchGraph(Operation):
    """Z = J^T G, J the Jacobian of what torch's own autograd recorded

    Its gradients are those of the operations of torch's engine.  Saved: the graph of these.
    """

    is_rule = True

    @staticmethod
    def forward(ctx: Any, of: _Piece, *args: T) -> tuple[T | None, ...]:
        ctx.materialize_grads = False
        given = [g.detach().requires_grad_() for g in args[: len(of.tensors)]]
        with torch.enable_grad():
            made = _gradients(of.tensors, given, of.inputs, True, True, of.order)
        ctx.of, ctx.given, ctx.made = of, given, made
        return tuple([None if z is None else z.detach() for z in made])

    @staticmethod
    def backward(ctx: Any, *grads: T | None) -> tuple[T | None, ...]:
        of, given = ctx.of, ctx.given
        pairs = [
            (z, h)
            for z, h in zip(ctx.made, grads, strict=True)
            if z is not None and h is not None and z.requires_grad
        ]
        inputs, needs = (*given, *of.ends), ctx.needs_input_grad[1:]
        if not pairs or True not in needs:
            return (None,) * (1 + len(inputs))
        stands_for = {
            id(t): tracked_alias(t.detach(), edge)
            for t, edge in zip(inputs, ctx.edges[1:], strict=True)
            if edge is not None and edge[0] is not t
        }
        left = iter(
            go_back(
                [z for z, _ in pairs],
                [h for _, h in pairs],
                [t for t, is_needed in zip(inputs, needs, strict=True) if is_needed],
                True,
                ctx.creates_graph,
                stands_for,
            )
        )
        found = [next(left) if is_needed else None for is_needed in needs]
        for end, grad in zip(of.ends, found[len(given) :], strict=True):
            if grad is not None and end._backward_hooks:
                # Its hooks have run for this part of the gradient; they must not run again for the
                # whole.
                raise NotImplementedError(_HOOKED)
        return None, *found

    @classmethod
    def node_name(cls) -> str:
        return "TorchGraph"
