"""The tape: a record of the calls and their arguments.

A differentiable operation is a `Function` with a `forward` and a `backward`. Each call on a tensor
that requires grad makes a `Node`: the function, its saved tensors, and an edge for every input, to
the node that made the input or, for a leaf, to the input itself. `nnmirror.walk` follows these
edges.

Everything here runs with `DisableTorchFunctionSubclass` entered once per call, so that
tracked tensors behave as plain ones inside a forward, a backward and the walk.
"""

import functools
import numbers
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from . import _state, _torch, formula
from . import tensor as _tensor
from ._state import here as _here
from ._state import sequence as _sequence
from ._torch import DisableTorchFunctionSubclass, is_any_autocast_enabled
from ._types import Args, Kwargs
from ._upcalls import implements, upcall
from .exact import mode as _exact
from .fast import call
from .fast.signature import (
    MORE,
    MOST_ARGUMENTS,
    NO_CALLS,
    NUMBERS,
    SIZES,
    THEIRS,
    Behind,
    Family,
    Kept,
    Made,
    Signature,
    Sizes,
    Unsigned,
    integers_in,
    layout_for_any_size,
    names_size,
    numbers_apart,
    of_tensor,
    of_value,
    of_value_for_any_size,
)
from .function import Function
from .grad_mode import _override, in_inference_mode, is_grad_enabled
from .moments import note_moment
from .node import Edge, Node, OfComplex, Unrecorded
from .origin import of_this_call
from .tensor import no_complex

if TYPE_CHECKING:
    from . import views as _views

R = TypeVar("R")


class _Mapping(threading.local):
    # The running calls of `nnmirror.func.vmap` in this thread: how many, and the arguments that the
    # latest has passed to the function.
    depth: int = 0
    items: Sequence[object] = ()


mapping = _Mapping()

_torch_grad_mode = torch.is_grad_enabled
in_transform = _torch.peek_interpreter_stack  # None outside torch.func's transforms
_is_wrapped = _torch.is_functorch_wrapped_tensor
forward_mode = _torch.forward_mode
_MANY = (tuple, list)  # isinstance is several times slower with tuple | list


@upcall("nnmirror.double_backward")
def run_recorded(
    node: Node, grads: Sequence[torch.Tensor | None], needs: tuple[bool, ...]
) -> Sequence[torch.Tensor | None]:
    """`node.run` for these gradients, recorded."""
    raise NotImplementedError


@upcall("nnmirror.beyond")
def taken_over(tensor: torch.Tensor, may_be: bool = True) -> "_tensor.Tensor | None":
    """A result of torch's own as one of the mirror's; None if that is impossible, or not
    `may_be`."""
    raise NotImplementedError


@upcall("nnmirror.beyond")
def edge_to(tensor: torch.Tensor) -> Edge:
    """The edge for the gradient of a result of torch's own."""
    raise NotImplementedError


@upcall("nnmirror.double_backward")
def needing(node: Node, needs: tuple[bool, ...]) -> Node:
    """The node as its backward sees it where only some of the gradients are asked for."""
    raise NotImplementedError


class _Noting(threading.local):
    """Functions to call with the result of each recorded call of this thread (see watch.py)."""

    notes: tuple[Callable[[object], None], ...] = ()


noting = _Noting()


def noted(call: Callable[..., R], *args: object) -> R:
    """`call(*args)`, which records; its result is noted, what it calls itself is not."""
    notes, noting.notes = noting.notes, ()
    try:
        found = call(*args)
    finally:
        noting.notes = notes
    for note in notes if is_grad_enabled() else ():
        note(found)
    return found


@implements(_tensor)
def record(
    function: type[Function],
    args: Args,
    inplace: Callable[[], torch.Tensor] | None = None,
    asks: bool = True,
    for_layer: bool = False,
) -> tuple[Any, Node | None]:
    """Run `function.forward` on `args`; return its output and its node.

    The node is None with grad mode off. If no input requires grad, the output stays an untracked
    tensor; `for_layer`, the node still has the saved tensors, for `Module.backward`.

    `inplace`, if given, performs the operation on the first argument, which becomes the
    output, after `forward` has computed (and saved) what its backward needs.

    With `asks`, a call with a tensor subclass among `args` is dispatched to it (see
    `nnmirror.overrides`).
    """
    if _state.taps and noting.notes:
        return noted(record, function, args, inplace, asks)
    if function.exact is not None:
        function = _exact.chosen(function)
    mode = _override.mode if _state.own_grad_mode else None  # is_grad_enabled, without the call
    if not (_torch_grad_mode() if mode is None else mode) or in_inference_mode():
        if len(args) > function.first_number:
            function.check_numbers(args)  # type: ignore[attr-defined]
        result = function.result
        if result is not None and inplace is None and not (_torch_grad_mode() or _state.plain):
            plain = True
            for arg in args:
                kind = type(arg)
                if kind not in ORDINARY:
                    break  # it may define dispatch
                plain = plain and kind is torch.Tensor
            else:
                if plain:
                    return result(*args), None
                with DisableTorchFunctionSubclass():
                    return result(*args), None
        return _unrecorded(function, args, inplace, asks), None
    is_signed = True
    if inplace is None and not _state.plain:
        for arg in args:
            kind = type(arg)
            if kind is _tensor.Tensor:
                made = arg._node
                sign = None if made is None else made.signature
                if sign is not None and not sign.is_plain:
                    sign = sign.output(arg._output_nr)
            elif kind in _tensor.LEAVES:
                made, sign = None, arg._signature
                if sign is None:
                    continue  # it is frozen, or gets a signature
            else:
                continue
            if sign is not None:  # the first one stores the calls that were made with it
                written = sign.calls.get(function)
                if written is not None:
                    met = written[0](written[1], arg, made, args)
                    if met is not None:
                        return met  # type: ignore[no-any-return]
                is_signed = sign.varying.get(function) is not MORE
            else:
                is_signed = made is None
            if not is_signed:
                known = function.recorders.get(tuple(map(type, args)))
                if known is not None:
                    met = known[0](args)
                    if met is not None:
                        return met
            break
        else:
            if need_no_gradient(args):
                if is_any_autocast_enabled():
                    raise RuntimeError(AUTOCAST)
                if not for_layer and function.result is not None:
                    with DisableTorchFunctionSubclass():
                        return function.result(*args), None
                met = _of_its_kind(function, args)
                if met is not None:
                    return met
    elif not _state.plain:
        known = function.recorders_in_place.get(tuple(map(type, args)))
        if known is not None:
            met = known[0](args, inplace)
            if met is not None:
                return met
    if len(args) > function.first_number:
        function.check_numbers(args)  # type: ignore[attr-defined]
    disabled = DisableTorchFunctionSubclass()
    with disabled:
        if is_any_autocast_enabled():
            raise RuntimeError(AUTOCAST)
        if in_transform() is not None:
            refuse_transform(function, args)
            return _by_torch(function, args, inplace), None
        if _state.plain and (_here.is_plain or _here.noted is not None):
            out, node = _record(function, args, inplace, asks, disabled)
            if _here.noted is not None:
                _here.noted.append((function, args, out, node))
            return out, with_origin(node, out) if _here.is_plain else node
        if forward_mode["_current_level"] < 0:
            if inplace is not None:
                met = _changed_before(function, args, inplace)
            else:
                met = (_met_before if is_signed else _of_its_kind)(function, args)
            if met is not None:
                return met  # type: ignore[no-any-return]
        return _record(function, args, inplace, asks, disabled)


def need_no_gradient(args: Args, is_off: bool = False) -> bool:
    """Are these tensors that do not require grad, of no subclass, and values that contain none?

    If grad mode `is_off`, no tensor requires grad.
    """
    for arg in args:
        kind = type(arg)
        if kind is torch.Tensor:
            if not is_off and arg.requires_grad:
                return False
        elif kind is _tensor.Tensor or kind in _tensor.LEAVES:
            if not is_off and (arg._node is not None or arg._requires_grad):
                return False
        elif kind not in _PLAIN and not (kind is tuple and _PLAIN.issuperset(map(type, arg))):
            return False
    return True


_PLAIN = {bool, float, int, str, type(None)}


def _unrecorded(
    function: type[Function],
    args: Args,
    inplace: Callable[[], torch.Tensor] | None,
    asks: bool,
) -> Any:
    """The result only, with grad mode off."""
    for arg in args:
        if type(arg) not in ORDINARY and asks and kind_of(type(arg)) is SUBCLASS:
            return answered(function, args, inplace)[0]
    result = function.result
    with DisableTorchFunctionSubclass():
        if inplace is not None:
            return inplace()
        if result is not None and not _torch_grad_mode() and not _here.is_plain:
            return result(*args)
        if forward_mode["_current_level"] >= 0:
            refuse_tangents(function, args)
        node = Unrecorded(function)
        node.needs_input_grad = (False,) * len(args)
        if not torch.is_grad_enabled():
            return function.forward(node, *args)
        with torch.no_grad():  # an input may belong to torch's own autograd
            return function.forward(node, *args)


def _record(
    function: type[Function],
    args: Args,
    inplace: Callable[[], torch.Tensor] | None,
    asks: bool,
    disabled: AbstractContextManager[None],
) -> tuple[Any, Node | None]:
    """`record` for any call, after the check whether to record."""
    change = None
    changes_input = function.is_inplace or inplace is not None
    if changes_input and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
        if is_plain_update(args[0], args[1:]):
            plain = Node(function)
            plain.needs_input_grad = (False,) * len(args)
            return (inplace() if inplace else function.forward(plain, *args)), None
        change = change_of(args[0])
    edges: list[Edge | None] = []
    key: list[object] = []
    first: Signature | None = None
    tracked = of_complex = False
    # The history of an in-place change follows from its arguments, unless they share memory.
    signed = not changes_input or (change is not None and change.base is None and not change.views)
    if inplace is not None:
        key.append(IN_PLACE)
    given = args  # with torch's tensors themselves
    for i, arg in enumerate(given):
        edge: Edge | None = None
        theirs = False  # tracked by torch, whose engine continues there
        kind = kind_of(type(arg))
        if kind is SUBCLASS:
            if asks:
                disabled.__exit__(None, None, None)  # to dispatch to it, unless that is disabled
                return answered(function, args, inplace)
            kind = MIRRORED if isinstance(arg, _tensor.Tensor) else TORCH
        if kind is MIRRORED:
            made = arg._node
            if made is not None:
                view = arg._view_of
                if view is not None and view[1] != arg._version:
                    renew(arg)
                    made = arg._node
                index = arg._output_nr
                edge = (made, index)
                sign = made.signature
                if index and sign is not None:
                    sign = sign.output(index)
            else:  # no result is complex, so complex tensors only enter here
                if arg._requires_grad:
                    leaf = arg._stands_for
                    if leaf is None:
                        edge = (arg, 0)
                        sign = arg._signature or signature_of_leaf(arg)
                    else:  # torch's own, or one that had other memory at that time
                        edge, sign = (leaf, 0), None
                        theirs = not isinstance(leaf, _tensor.Tensor)
                        if theirs:
                            note_moment()
                if arg.is_complex():
                    of_complex = of_complex or edge is not None or function.is_rule
            if edge is not None:
                tracked = True
                if theirs:
                    pass
                elif sign is None:
                    signed = False
                elif first is not None:
                    key.append(sign.serial)
                else:
                    first = sign
                    if key:
                        key.append(HERE)
        elif kind is TORCH:
            if arg.requires_grad:
                over = None if arg.is_leaf else taken_over(arg, not changes_input)
                if over is not None:
                    return record(function, (*given[:i], over, *given[i + 1 :]), None, asks)
                note_moment()
                edge = (arg, 0)
                tracked = theirs = True
                # The tape computes on a detached alias: no torch graph is built.
                args = (*args[:i], arg.detach(), *args[i + 1 :])
            if arg.is_complex():
                of_complex = of_complex or edge is not None or function.is_rule
        elif type(arg).__module__ == "numpy" and isinstance(arg, numbers.Real):
            # Torch takes it as a Python number. A rule would compute in its precision.
            number = operator.index(arg) if isinstance(arg, numbers.Integral) else float(arg)
            return record(function, (*given[:i], number, *given[i + 1 :]), inplace, asks)
        if signed and (edge is None or theirs):
            try:
                if theirs:
                    key.append(THEIRS)
                key.append(of_value(arg) if kind is OTHER else of_tensor(arg))
            except Unsigned:
                signed = False
        edges.append(edge)
    if forward_mode["_current_level"] >= 0:
        refuse_tangents(function, args)
        if not tracked:
            return _by_torch(function, args, inplace), None
    node = OfComplex(function) if of_complex else Node(function)
    node.places = [i for i, arg in enumerate(args) if kind_of(type(arg)) is not OTHER]
    needs = node.needs_input_grad = tuple([edge is not None for edge in edges])
    numbers_vary = False
    if first is None and signed and THEIRS in key:
        first = OF_TORCH
    if first is None:
        signed = False
    elif (how := first.varying.get(function)) is not None and how is not SIZES:
        apart = numbers_apart(key) if how is NUMBERS else None
        if apart is None or not (function.formulas and function.formulas.takes_any_number):
            signed, first.varying[function] = False, MORE
        else:
            key, numbers_vary = apart, True
    if of_complex and tracked:  # after PyTorch's own error, if it has one
        if inplace is None:
            function.forward(node, *args)
        elif not args[0].is_complex():
            inplace()
        raise no_complex(function.__name__)
    if inplace is None:
        out = function.forward(node, *args)
        if (
            type(out) is torch.Tensor
            and function.makes_new
            and not (node.non_differentiable or node.dirty or among(out, args))
        ):  # what comes further below, in fewer steps for one new tensor
            dtype = out.dtype
            node.edges = edges
            node.outputs = ((out.shape, dtype, out.device),)
            if tracked and dtype.is_floating_point:
                node.sequence = next(_sequence)
                if signed:
                    give_signature(node, key, first, args, out, True, numbers_vary)
                elif function.formulas is not None:
                    learn(function, args, needs)
                if node._saved:
                    _save_apart(node, out)
                out.__class__ = _tensor.Tensor
                out._node = node  # type: ignore[attr-defined]
            elif tracked and dtype.is_complex:
                raise no_complex(function.__name__)
            elif not tracked and function.formulas is not None:
                learn(function, args, needs)
            return out, node
    else:
        # If the first argument is saved, it is saved before the change; if the result is saved, it
        # is the changed tensor, which may not be changed again.
        try:
            result = function.forward(node, args[0].clone(), *args[1:])
        except (RuntimeError, TypeError):
            inplace()  # raises the in-place operation's own error
            raise
        out = inplace()
        node.dirty = (out,)
        node.label = function.in_place.get(node.name(), node.label)
        if node._saved and among(result, node._saved):
            node.save_for_backward(*[out if t is result else t for t in node._saved])
    node.edges = edges
    if isinstance(out, _MANY):
        if tracked:
            node.sequence = next(_sequence)
            made = [track(node, i, o, args, True, change) for i, o in enumerate(out)]
            out = made if isinstance(out, list) else tuple(made)
        node.outputs = [meta_of(o) for o in out]
    else:
        if tracked:
            node.sequence = next(_sequence)
            out = track(node, 0, out, args, False, change)
        node.outputs = (meta_of(out),)
    if signed and tracked:
        makes_new = function.is_rule and function.is_view and inplace is None
        makes_new = makes_new and type(out) is _tensor.Tensor
        give_signature(node, key, first, args, out, makes_new, numbers_vary)
    elif (
        function.formulas is not None
        and not function.is_inplace
        and (tracked or inplace is None)  # nothing is recorded of a change of a plain tensor
    ):
        learn(function, args, needs, inplace is not None)
    if node.dirty or node.non_differentiable:
        # What was marked is an output, which leads to the node: kept, it would be a cycle.
        node.dirty = node.non_differentiable = ()
    return out, node


def with_origin(node: Node | None, out: object) -> Node | None:
    """Store with `node` the place of its call and its result, for `nnmirror.explain`."""
    if node is not None and any(node.needs_input_grad):
        node.origin = of_this_call()  # type: ignore[attr-defined]
        outs = out if isinstance(out, _MANY) else (out,)
        node.returned = [  # type: ignore[attr-defined]
            (o.detach(), 0 if o.is_inference() else o._version)
            if isinstance(o, torch.Tensor)
            else None
            for o in outs
        ]
    return node


AUTOCAST = (
    "nnmirror: torch.autocast is not mirrored; convert the model and its input with .to(dtype)"
    " instead"
)


def is_usual() -> bool:
    """Is grad mode on, and exact mode and plain mode off?"""
    mode = _override.mode if _state.own_grad_mode else None
    if not (_torch_grad_mode() if mode is None else mode) or _state.plain or in_inference_mode():
        return False
    mode = _exact._override.mode if _state.own_exact_mode else None  # as in `is_exact`
    return not (_state.exact_mode if mode is None else mode)


def _met_before(function: type[Function], args: Args) -> tuple[Any, Node | None] | None:
    """`record` for a call whose signature or kind is known; None for any other."""
    _Tensor = _tensor.Tensor
    edges: list[Edge | None] = []
    key: list[object] = []  # as in `give_signature`: the part after the first tracked tensor
    first = first_arg = first_made = None
    given = args  # with torch's tensors themselves
    for arg in given:
        kind = type(arg)
        if kind is _Tensor:
            node = arg._node
            if node is None:
                leaf = arg._stands_for
                if leaf is None or isinstance(leaf, _tensor.Tensor):
                    return None
                edges.append((leaf, 0))
                key += (THEIRS, (arg.shape, arg.stride(), arg.dtype, arg.device))
                continue
            sign = node.signature
            if sign is None:
                return _of_its_kind(function, given)
            index = 0
            if not sign.is_plain:
                view = arg._view_of
                if view is not None and view[1] != arg._version:
                    return None
                index = arg._output_nr
                if index:
                    sign = sign.output(index)
            edges.append((node, index))
            if first is not None:
                key.append(sign.serial)
            elif sign.varying.get(function) is MORE:
                return _of_its_kind(function, given)
            else:
                first, first_arg, first_made = sign, arg, node
                if key:
                    key.append(HERE)
        elif kind_of(kind) is MIRRORED:  # a parameter
            sign = arg._signature
            if sign is not None:
                edges.append((arg, 0))
                if first is not None:
                    key.append(sign.serial)
                elif sign.varying.get(function) is MORE:
                    return _of_its_kind(function, given)
                else:
                    first, first_arg = sign, arg
                    if key:
                        key.append(HERE)
            elif arg._requires_grad or arg._node is not None:
                return None
            else:
                edges.append(None)
                key.append(of_tensor(arg))
        elif kind is torch.Tensor:
            if arg.layout is not torch.strided:
                return None
            if arg.requires_grad:
                i = len(edges)
                over = None if arg.is_leaf else taken_over(arg)
                if over is not None:
                    return record(function, (*given[:i], over, *given[i + 1 :]))
                note_moment()
                edges.append((arg, 0))
                key.append(THEIRS)
                args = (*args[:i], arg.detach(), *args[i + 1 :])
            else:
                edges.append(None)
            key.append((arg.shape, arg.stride(), arg.dtype, arg.device))
        elif arg is None or kind is str:
            edges.append(None)
            key.append(arg)
        elif kind is float or kind is int or kind is bool:
            edges.append(None)
            key.append((kind, arg) if arg else of_value(arg))
        else:
            try:
                key.append(of_value(arg))
            except Unsigned:
                return None
            edges.append(None)
    if first is None:
        if THEIRS not in key:
            return None
        first = OF_TORCH
    found = first.next.get((function, *key) if key else function)
    numbers_vary = found is None and first.varying.get(function) is NUMBERS
    if numbers_vary:
        apart = numbers_apart(key)
        found = None if apart is None else first.next.get((function, *apart))
    stored_with: Signature = first
    sizes: Sizes = ()
    if found is None and (of_family := _call_of_family(function, args, edges)) is not None:
        stored_with, call_of_any, sizes, numbers_vary = of_family
        found = stored_with.next.get(call_of_any)
    if found is None:
        return None
    found.came_again = True
    if not (found.makes_new or found.makes_several):
        return None
    if found.written is None and first is not OF_TORCH and len(args) <= MOST_ARGUMENTS:
        noted = call.Noted(function, found, args, edges, sizes=sizes)
        text = call.text_of([noted], args, edges, numbers_vary, sizes)
        found.written = False if text is None else text.made()
    if found.written:
        before = stored_with.calls.get(function)
        written = _with_others(before, found, args, numbers_vary or bool(sizes))
        keep_written(stored_with, function, (*written, function.exact is not None))
        met = found.written(found, first_arg, first_made, args)
        if met is not None:
            return met
    return _once_more(function, args, found, edges) if found.makes_new and not sizes else None


_MOST_TRIED = 8  # a layer that is called in several ways: on data, and on what was computed
_MOST_BY_VALUE = 64  # calls that differ by their other arguments, such as the indices of gates


def _with_others(before: Kept | None, found: Signature, args: Args, varies: bool) -> Kept:
    """The generated function of `found`, with those of other calls of its function `before`."""
    this: Kept = (found.written, found)
    known = () if before is None else before[1] if before[0] is _one_of else (before[:2],)
    others = [one for one in known if one[1] is not found]
    if not others:
        return this
    if not varies and not any(isinstance(arg, torch.Tensor) for arg in args[1:]):
        table = next((dict(one[1]) for one in others if one[0] is _by_value), {})
        if len(table) >= _MOST_BY_VALUE:
            table.clear()
        table[_values_of(args)] = this
        this = (_by_value, table)
        others = [one for one in others if one[0] is not _by_value]
    kept = (this, *others)[:_MOST_TRIED]
    return (_one_of, kept) if others else this


def _values_of(args: Args) -> object:
    """What distinguishes the arguments other than the first; none is a tensor."""
    return of_value(args[1]) if len(args) == 2 else tuple([of_value(arg) for arg in args[1:]])


def _by_value(
    table: Mapping[object, tuple[call.Written, Signature]], first: object, made: object, args: Args
) -> Made | None:
    """The call by the generated function for these other arguments than the first."""
    try:
        kept = table.get(_values_of(args))
    except (Unsigned, TypeError):
        return None
    return None if kept is None else kept[0](kept[1], first, made, args)


def _one_of(
    kept: Sequence[tuple[call.Written, Signature]], first: object, made: object, args: Args
) -> Made | None:
    """The call by the first of several generated functions that takes these arguments."""
    for written, found in kept:
        met = written(found, first, made, args)
        if met is not None:
            return met
    return None


def keep_written(first: Signature, what: object, written: Kept) -> None:
    """Have a generated function tried first for calls of `what` on a tensor with the signature
    `first`: (the function, the signature that it is given, whether exact mode replaces it, ...).
    For `_one_of`, in place of the signature, several such functions and signatures."""
    family = first.of_family()
    if family is not None and first.calls is family.calls:
        first.calls = dict(first.calls)  # what is written for these sizes only
    elif first.calls is NO_CALLS:
        first.calls = {}
    first.calls[what] = written


@implements(call)
def named_in_calls() -> dict[str, object]:
    """What the source of generated calls names."""
    return {
        "autocast": is_any_autocast_enabled,
        "disabled": DisableTorchFunctionSubclass,
        "dispatch_mode": _torch.dispatch_mode,
        "forward_mode": forward_mode,
        "Node": Node,
        "sequence": _sequence,
        "standing_for": _standing_for,
        "taken_over": taken_over,
        "transform": in_transform,
        "outputs_of": outputs_of,
        "plan_of_size": plan_of_size,
        "unlike": unlike,
        "view_of": view_of,
    }


def _standing_for(value: object) -> "_tensor.Tensor | None":
    """What stands for a result of torch's own among the arguments of a call; None if nothing."""
    if type(value) is torch.Tensor and value.requires_grad and not value.is_leaf:
        with DisableTorchFunctionSubclass():
            return taken_over(value)
    return None


def _changed_before(
    function: type[Function], args: Args, inplace: Callable[[], torch.Tensor]
) -> Made | None:
    """`record` for an in-place change whose signature is known, of a result that is no view or of a
    plain tensor; None for any other."""
    changed: Any = args[0] if args else None
    sign: Signature | None = None
    edges: list[Edge | None]
    key: list[object]
    if type(changed) is _tensor.Tensor:
        made = changed._node
        if made is None:
            return None
        sign = made.signature
        if changed._view_of is not None or sign is None or not (sign.is_plain and sign.next):
            return None
        edges, key = [(made, 0)], [IN_PLACE, HERE]
    elif type(changed) is torch.Tensor and shares_nothing(changed):
        edges, key = [None], [IN_PLACE, of_tensor(changed)]
    else:
        return None
    for arg in args[1:]:
        edge: Edge | None = None
        kind = type(arg)
        if kind is torch.Tensor:
            if arg.requires_grad or arg.layout is not torch.strided:
                return None
            key.append(of_tensor(arg))
        elif kind_of(kind) is OTHER:
            try:
                key.append(of_value(arg))
            except Unsigned:
                return None
        elif kind_of(kind) is not MIRRORED:
            return None
        else:
            edge = (arg, 0) if arg._signature is not None else usual_edge(arg)
            if edge is not None:
                other = signature_at(edge)
                if other is None or arg is changed:
                    return None
                if sign is None:
                    sign = other
                    key.append(HERE)
                else:
                    key.append(other.serial)
            elif arg._requires_grad or arg._node is not None or kind not in _tensor.LEAVES:
                return None
            else:
                key.append(of_tensor(arg))
        edges.append(edge)
    found = None if sign is None else sign.next.get((function, *key))
    plan = None if found is None else found.plan
    if type(plan) is not formula.Plan or plan.is_open or plan.copied or plan.memory:
        return None
    formulas = function.formulas
    if formulas is None or formulas.refuse is not None:
        return None
    saved = [args[i] if i > 0 else changed for i in plan.saves]
    try:
        versions = [t._version for t in saved]
    except RuntimeError:  # one of inference mode
        return None
    before = changed.clone() if 0 in plan.saves else None  # its value before the change
    inplace()
    for i, place in enumerate(plan.saves):
        if place <= 0:
            saved[i] = before if place == 0 else changed.detach()
            versions[i] = saved[i]._version
    node = Node(function)
    node.signature = node.like = found
    node.edges = edges
    node._saved, node._versions = saved, versions
    if not saved and plan.saves_number:
        node._saved = node._versions = (None,)
    node.sequence = next(_sequence)
    changed.__class__ = _tensor.Tensor
    made_by(changed, node, 0)
    return changed, node


def shares_nothing(tensor: torch.Tensor) -> bool:
    """Is it a plain tensor without a gradient, whose memory no other tensor has?"""
    return (
        not (tensor.requires_grad or tensor._is_view() or tensor.is_inference())
        and tensor.layout is torch.strided
        and _torch.storage_Use_Count(tensor.untyped_storage()._cdata) == _OWN_USE
    )


_OWN_USE = 2  # of a tensor's memory: by itself, and by the argument of the count


def _of_its_kind(function: type[Function], args: Args) -> Made | None:
    """`record` for a call without a signature, if there were calls of its kind; else None."""
    known = function.recorders.get(tuple(map(type, args)))
    return None if known is None else known[0](args)


@upcall("nnmirror.fast.recorder")
def learn(
    function: type[Function], args: Args, needs: tuple[bool, ...], in_place: bool = False
) -> None:
    """Write a recorder for calls of this kind, which have no signature."""
    raise NotImplementedError


def finished(node: Node, out: Any, args: Args) -> Made:
    """The rest of `_record`, after `out` has been computed and its saved tensors chosen."""
    node.sequence = next(_sequence)
    out = track(node, 0, out, args, False, None)
    node.outputs = (meta_of(out),)
    return out, node


def _once_more(
    function: type[Function], args: Args, found: Signature, edges: Sequence[Edge | None]
) -> Made:
    """`record` for a call with the signature `found`."""
    node = Node(function)
    node.signature = node.like = found
    node.edges = edges
    plan = found.plan
    if plan is None:
        node.like = None
        node.places, node.needs_input_grad = found.places, found.needs
        node.outputs, node.indices = found.outputs, found.indices
        out = function.forward(node, *args)
        if node._saved:
            _save_apart(node, out)
    else:
        if plan.is_open:
            node.given = plan.given(args)  # type: ignore[misc]
        out = plan.keep_apart(node, args, plan.compute(*args))
    if found.checks_shape and out.shape != found.outputs[0][0]:
        unlike(node, out)
    node.sequence = next(_sequence)
    out.__class__ = _tensor.Tensor
    out._node = node
    if function.is_view:
        base = args[0]
        ours = isinstance(base, _tensor.Tensor)
        out._view_of = view_from(base, out) if ours else view_of(node, out, base, False)
    return out, node


def unlike(node: Node, out: torch.Tensor) -> None:
    """The result has another shape than that of the other calls with the node's signature."""
    node.outputs = (meta_of(out),)
    node.signature = None


HERE = object()  # in a key, after the part before the first argument that has a signature
OF_TORCH = Signature()  # the first part if there are only such tensors
IN_PLACE = object()  # in a key: the first argument was changed


@implements(_tensor)
def signature_of_leaf(leaf: "_tensor.Tensor") -> Signature | None:
    """A new signature, or the one that it had; none for a leaf with hooks, which the generic walk
    handles, nor for one of inference mode, which may not be saved."""
    if leaf._leaf_hooks or leaf._post_accumulate_hooks or leaf._reached_hooks:
        return None
    if any(leaf._accumulate_hooks or ()):
        return None
    if leaf.is_inference():
        return None
    try:
        layout = of_tensor(leaf)
    except Unsigned:
        return None
    held = leaf._signature_by_layout
    if held is None or held[0] != layout:  # else it was frozen for a while, or given other memory
        held = leaf._signature_by_layout = layout, Signature()
    leaf._signature = held[1]
    return held[1]


def signature_at(edge: Edge) -> Signature | None:
    """The signature of the target of an edge."""
    target, index = edge
    if isinstance(target, Node):
        sign = target.signature
        return sign.output(index) if index and sign is not None else sign
    if not isinstance(target, _tensor.Tensor):
        return None
    return target._signature or signature_of_leaf(target)


def sign_call(node: Node, first: Signature) -> None:
    """Give `node`, a call on one tensor with the signature `first`, its signature."""
    give_signature(node, [], first, (), None, makes_new=True, numbers_vary=False)


def give_signature(
    node: Node,
    key: list[object],
    first: Any,
    args: Args,
    out: object,
    makes_new: bool,
    numbers_vary: bool,
) -> None:
    """Give `node` the signature of its call, with the result `out`, a new one if necessary.

    `key` represents all arguments except the first that has a signature, which stores it.
    """
    if not (key and key[0] is IN_PLACE):
        of_family = _call_of_family(node.function, args, node.edges)
        if of_family is not None and _give_member(node, of_family, args, out, makes_new):
            return
    call = (node.function, *key) if key else node.function
    sign = first.next.get(call)
    if sign is None:
        is_plain = len(node.outputs) == 1 and not node.function.is_view
        inputs = [signature_at(edge) for edge in node.edges if edge is not None]
        layout = None
        if is_plain and isinstance(out, torch.Tensor) and out.layout is torch.strided:
            layout = of_tensor(out)
        weights = [arg for arg in args if type(arg) in _tensor.LEAVES]
        frozen = tuple([id(leaf) for leaf in weights if not leaf._requires_grad])
        sign = first.made(node.function, [s for s in inputs if s is not None], frozen, layout)
        _describe(sign, node, args, makes_new)
        if node.plan is not None:
            sign.plan = (
                node.plan.labelled(node.label)
                if numbers_vary
                else node.plan.fixed(node.given, node.label)
            )
        first.follow(node.function, call, sign)
        family = first.of_family()
        if family is not None:
            family.note_apart(node.function)
    elif sign.outputs != node.outputs:
        return
    node.signature = sign


def _describe(sign: Signature, node: Node, args: Args, makes_new: bool) -> None:
    """Set what `sign` says of calls like that of `node`."""
    sign.places, sign.needs = tuple(node.places), node.needs_input_grad
    sign.outputs, sign.makes_new, sign.plan = node.outputs, makes_new, node.plan
    sign.makes_several = node.function.is_rule and len(node.outputs) > 1 and not makes_new
    sign.label, sign.indices = node.label, node.indices
    sign.origin = node.sequence, of_this_call()
    sign.checks_shape = node.function.reads_data or any(
        isinstance(a, torch.Tensor) and not a.is_floating_point() for a in args
    )
    sign.is_plain = len(node.outputs) == 1 and not node.function.is_view


# The signature that stores a call, its key there, the sizes, and whether numbers are operands.
_CallOfFamily: TypeAlias = tuple[Signature, object, Sizes, bool]


def _call_of_family(
    function: type[Function], args: Args, edges: Sequence[Edge | None]
) -> _CallOfFamily | None:
    """The call as one of a family; None if it is none: its signature is for one size only."""
    formulas = function.formulas
    if formulas is None or function.is_inplace:
        return None
    signs = [None if edge is None else signature_at(edge) for edge in edges]
    of_results = [sign for sign in signs if sign is not None]
    if len(of_results) < len(edges) - [*edges].count(None) or not of_results:
        return None
    first = of_results[0]
    stored_with = first.of_family() or first
    how = stored_with.varying.get(function)
    if how is MORE or (how is NUMBERS and not formulas.takes_any_number):
        return None
    found = [size for sign in of_results for size in sign.sizes]
    if how is SIZES:
        dims, numbers = stored_with.varied[function]
        for arg, sign in zip(args, signs, strict=False):
            if sign is None and isinstance(arg, torch.Tensor):
                found += [n for dim, n in enumerate(arg.shape) if n > 1 and dim in dims]
        if numbers:
            every = enumerate(integers_in(args))
            found += [n for place, n in every if n > 1 and place in numbers]
    sizes = tuple(dict.fromkeys(found))  # each once
    if not 0 < len(sizes) <= _MOST_SIZES_OF_ONE:
        return None
    key: list[object] = []
    is_first = True
    try:
        for arg, sign in zip(args, signs, strict=False):
            if sign is not None:
                places = tuple([sizes.index(size) for size in sign.sizes])
                if sign is first and is_first:
                    is_first = False
                    if key:
                        key.append(HERE)
                elif places:
                    key.append(Behind(sign.family_serial, places))
                else:
                    key.append(sign.serial)
            elif isinstance(arg, torch.Tensor):
                key.append(layout_for_any_size(of_tensor(arg), sizes))
            else:
                key.append(of_value_for_any_size(arg, sizes))
    except Unsigned:
        return None
    if formulas.refuse is not None and any([names_size(arg, sizes) for arg in args]):
        return None  # it may refuse another number
    if how is NUMBERS and (apart := numbers_apart(key)) is not None:
        return stored_with, (function, *apart), sizes, True
    return stored_with, ((function, *key) if key else function), sizes, False


_MOST_SIZES_OF_ONE = 6  # of one member


def _give_member(
    node: Node, of_family: _CallOfFamily, args: Args, out: object, makes_new: bool
) -> bool:
    """Give `node` the signature of its sizes, in a new family if necessary; is there one?"""
    stored_with, call, sizes, numbers_vary = of_family
    function = node.function
    family: Any = stored_with.next.get(call)
    if family is None:
        inputs = [signature_at(edge) for edge in node.edges if edge is not None]
        families = [sign.of_family() or sign for sign in inputs if sign is not None]
        weights = [arg for arg in args if type(arg) in _tensor.LEAVES]
        frozen = tuple([id(leaf) for leaf in weights if not leaf._requires_grad])
        depth, repeats, is_deep = stored_with.of_next(function, families, frozen)
        plan: formula.Plan | None
        if numbers_vary and node.plan is not None:
            plan, has_one_plan = node.plan.labelled(node.label), True
        else:
            plan, has_one_plan = _formulas_of(function).plan_for_any_size(
                args, node.needs_input_grad
            )
            has_one_plan = has_one_plan and not any([names_size(arg, sizes) for arg in args])
        if is_deep or plan is None:
            return False
        family = Family(stored_with.leaf, depth)
        _describe(family, node, args, makes_new)
        family.repeats, family.plan, family.has_one_plan = repeats, plan, has_one_plan
        family.first_sizes = sizes
        stored_with.follow(function, call, family)
    member = family.members.get(sizes)
    if member is None:
        plan = plan_of_size(family, function, args)
        member = None if plan is None else family.new_member(sizes, node.outputs, plan)
        if member is None:
            return False
    elif member.outputs != node.outputs:
        return True  # without one
    node.signature = member
    return True


def _formulas_of(function: type[Function]) -> formula.Formulas:
    assert function.formulas is not None
    return function.formulas


def plan_of_size(family: Family, function: type[Function], args: Args) -> formula.Plan | None:
    """The plan of a call of the family; None if it saves something else than the others."""
    if family.has_one_plan:
        return family.plan
    with DisableTorchFunctionSubclass():
        plan = _formulas_of(function).plan(args, family.needs)
    known = family.plan
    assert known is not None
    if (plan.saves, plan.names, plan.memory, plan.copied, plan.label) != (
        known.saves,
        known.names,
        known.memory,
        known.copied,
        known.label,
    ):
        return None
    return plan


def outputs_of(out: object) -> tuple[Any, ...]:
    """The `outputs` of the node of this result."""
    return tuple([meta_of(o) for o in out]) if isinstance(out, _MANY) else (meta_of(out),)


# The kind of an argument, by its type: isinstance is slow for tensor classes.
MIRRORED, TORCH, SUBCLASS, OTHER = "mirrored", "torch", "subclass", "other"
# The types of most arguments, which are not subclasses with dispatch.
ORDINARY = {torch.Tensor, _tensor.Tensor, bool, float, int, str, tuple, type(None)}


def _kind_of(cls: type) -> str:
    if not issubclass(cls, torch.Tensor):
        return OTHER
    if issubclass(cls, _tensor.Tensor):
        return SUBCLASS if hasattr(cls, "_of") else MIRRORED
    asked = cls.__torch_function__ is not _torch.disabled_torch_function_impl
    return SUBCLASS if asked and cls is not torch.Tensor else TORCH


kind_of: Callable[[type], str] = functools.lru_cache(maxsize=256)(_kind_of)


@upcall("nnmirror.overrides")
def answered(
    function: type[Function], args: Args, inplace: Callable[[], torch.Tensor] | None
) -> tuple[Any, Node | None]:
    """Called by `record` if there is a tensor subclass among the arguments."""
    raise NotImplementedError


@upcall("nnmirror.overrides")
def tracked_class(cls: type[torch.Tensor]) -> "type[_tensor.Tensor]":
    """The class of tracked tensors of the subclass `cls`."""
    raise NotImplementedError


@upcall("nnmirror.views")
def view_of(node: Node, out: torch.Tensor, base: object, several: bool) -> "_views.ViewOf | None":
    """The view record of `out`, output of `node`, if it is a view of `base` or its base."""
    raise NotImplementedError


@upcall("nnmirror.views")
def view_from(base: "_tensor.Tensor", out: torch.Tensor) -> "_views.ViewOf":
    """The same for the single view that an operation makes of `base`, a tracked tensor."""
    raise NotImplementedError


@upcall("nnmirror.views")
def change_of(tensor: torch.Tensor) -> "_views.Change":
    """What a recorded in-place operation on `tensor` is about to change."""
    raise NotImplementedError


@upcall("nnmirror.views")
def renew(view: "_tensor.Tensor") -> None:
    """Give a view whose memory has changed a new grad_fn, based on its base's present one."""
    raise NotImplementedError


@upcall("nnmirror.views")
def rebase(node: Node, view: "_tensor.Tensor", base: torch.Tensor) -> None:
    """Record `node`, an in-place operation on `view`, as one on its base."""
    raise NotImplementedError


@upcall("nnmirror.views")
def tell(base: torch.Tensor, views: Sequence[tuple[torch.Tensor, str]]) -> None:
    """Track plain views whose base has become tracked."""
    raise NotImplementedError


def is_plain_update(changed: object, others: object) -> bool:
    """Is this an optimiser's update: a leaf changed by values without history?

    If torch's grad mode is off and the mirror's own is on, torch.optim's `with torch.no_grad()`
    cannot be distinguished from the script's own mode; but such a change could not be recorded
    anyway.
    """
    return (
        not torch.is_grad_enabled()
        and all(t.is_leaf for t in tensors_in(changed))
        and not any(t.requires_grad for t in tensors_in(others))
    )


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in an argument or a result: itself, or items of lists, tuples, dicts."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    items = value.values() if isinstance(value, dict) else value
    for item in items if isinstance(value, _CONTAINERS) else ():  # type: ignore[attr-defined]
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, _CONTAINERS):
            yield from tensors_in(item)


_CONTAINERS = (list, tuple, dict)


def meta_of(out: object) -> Any:
    return (out.shape, out.dtype, out.device) if isinstance(out, torch.Tensor) else None


@implements(_tensor)
def edge_of(tensor: torch.Tensor) -> Edge:
    if isinstance(tensor, _tensor.Tensor):
        view = tensor._view_of
        if view is not None and view[1] != tensor._version:
            renew(tensor)
        if tensor._node is not None:
            return tensor._node, tensor._output_nr
        if tensor._stands_for is not None:
            return tensor._stands_for, 0
    elif tensor.requires_grad and not tensor.is_leaf:
        return edge_to(tensor)
    return tensor, 0


def among(tensor: torch.Tensor, tensors: Iterable[object]) -> bool:
    for other in tensors:  # noqa: SIM110  a generator costs more than the loop
        if tensor is other:
            return True
    return False


def is_differentiable(out: object, node: Node) -> bool:
    """Does this output of `node` get a gradient?"""
    return (
        isinstance(out, torch.Tensor)
        and (out.is_floating_point() or out.is_complex())
        and not (node.non_differentiable and among(out, node.non_differentiable))
    )


def track(
    node: Node, index: int, out: Any, args: Args, several: bool, change: "_views.Change | None"
) -> Any:
    """Make `out` a tracked tensor: output `index` of `node`.

    `change` describes what an in-place operation changes, if that was determined before it.
    """
    if not is_differentiable(out, node):
        return out
    if out.is_complex():
        raise no_complex(node.function.__name__)
    dirty = bool(node.dirty) and among(out, node.dirty)
    if dirty:
        base, views = change_of(out) if change is None else change
    elif isinstance(out, _tensor.Tensor) or among(out, args):
        out = out.view_as(out)  # forward returned an input: make a separate tensor
    if node._saved:
        _save_apart(node, out, index)
    if not isinstance(out, _tensor.Tensor):
        out.__class__ = tracked_class(type(out))
    if dirty:
        if base is None:
            made_by(out, node, index)
        else:
            rebase(node, out, base)
        if views:
            tell(out if base is None else base, views)
        return out
    made_by(out, node, index)
    if node.function.is_view or not node.function.is_rule:
        out._view_of = view_of(node, out, args[0] if args else None, several)
    return out


def _save_apart(node: Node, out: torch.Tensor, index: int = 0) -> None:
    """A saved output would keep itself alive: save an alias of it."""
    for kept in node._saved or ():
        if kept is out:
            alias = out.detach()
            alias._alias_of_output = index  # type: ignore[attr-defined]
            node._saved = [alias if t is out else t for t in node._saved or ()]


def usual_edge(tensor: torch.Tensor) -> Edge | None:
    """The edge of a result; None for a leaf, a plain tensor, and a view whose memory has
    changed."""
    if type(tensor) is not _tensor.Tensor:
        return None
    view = tensor._view_of
    if view is not None and view[1] != tensor._version:
        return None
    node = tensor._node
    return None if node is None else (node, tensor._output_nr)


def refuse_transform(function: type[Function], args: Args) -> None:
    """Inside torch.vmap or torch.func.grad, PyTorch's own function is called, which they support.

    Its result is unwrapped when they return, and would lose its history: raises if one of `args`
    requires grad for the tape.
    """
    wrapped = False
    for t in tensors_in(args):
        wrapped = wrapped or (_is_wrapped(t) and t.requires_grad)
        if _is_tracked(t):
            raise no_transform()
    if wrapped and not function.is_rule:
        raise NotImplementedError(
            f"nnmirror: torch.func would differentiate the forward of {function.__name__}, and"
            " not call its backward; derive it from torch.autograd.Function for this"
        )


def no_transform() -> NotImplementedError:
    return NotImplementedError(
        "nnmirror: torch.vmap and the other transforms of torch.func do not see the mirror's tape,"
        " and a tensor used inside one requires grad; the result would lose the gradient. Take the"
        " transform of the same name from nnmirror.func; or let nothing of the module require grad"
        " (module.requires_grad_(False)); or transform nnmirror.to_torch(module), which has the"
        " same weights"
    )


def refuse_tangents(function: type[Function], args: Args) -> None:
    """Raises as PyTorch: a backward alone does not define forward mode."""
    if function.is_rule or all(_torch.unpack_dual(t, 0)[1] is None for t in tensors_in(args)):
        return
    raise NotImplementedError(
        "You must implement the jvp function for custom autograd.Function to use it with forward"
        " mode AD."
    )


def _by_torch(
    function: type[Function], args: Args, inplace: Callable[[], torch.Tensor] | None
) -> Any:
    """The result only, by PyTorch's own function if it has one."""
    if inplace is not None:
        return inplace()
    if function.infer is not None:
        return function.infer(*args)
    node = Unrecorded(function)
    node.needs_input_grad = (False,) * len(args)
    return function.forward(node, *args)


def is_left_to_torch(args: Args, kwargs: Kwargs | None = None) -> bool:
    """Is there nothing to record, so that PyTorch's own function has to be called, or may be?"""
    if is_seen_through():
        given = args, kwargs
        return not (is_grad_enabled() and any(map(_is_tracked, tensors_in(given))))
    if _state.plain or (is_grad_enabled() and is_any_autocast_enabled()):
        return False
    given = (*args, *kwargs.values()) if kwargs else args
    return need_no_gradient(given, is_off=not (is_grad_enabled() or _torch_grad_mode()))


def _is_tracked(t: torch.Tensor) -> bool:
    """Does it require grad outside of the transforms that wrap it?"""
    if not _is_wrapped(t):
        return t.requires_grad
    while _is_wrapped(t):
        t = _torch.get_unwrapped(t)
    return isinstance(t, _tensor.Tensor) and t.requires_grad


def is_seen_through() -> bool:
    """Is a transform of torch.func or forward mode active, so that PyTorch computes more than the
    result?"""
    return in_transform() is not None or forward_mode["_current_level"] >= 0


def made_by(tensor: "_tensor.Tensor", node: Node, index: int) -> None:
    """Make `tensor` output `index` of `node`, and move a retained gradient there."""
    old = tensor._node
    if old is not None and old.retained and tensor._output_nr in old.retained:
        node.retained = {index: old.retained.pop(tensor._output_nr)}
        node.is_watched = True
    tensor._node = node
    tensor._output_nr = index
