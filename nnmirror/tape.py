"""The tape: a record of the calls and their arguments.

A differentiable `Operation` has a `forward` and a `backward`. Each call on a tensor that requires
grad makes a `Node`: the operation, its saved tensors, and an edge for every input, to the node that
made the input or, for a leaf, to the input itself. `nnmirror.walk` follows these edges.

Everything here runs with `DisableTorchFunctionSubclass` entered once per call, so that
tracked tensors behave as plain ones inside a forward, a backward and the walk.
"""

import functools
import numbers
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from . import _state, _torch, fast, formula
from . import tensor as _tensor
from ._state import here as _here
from ._state import sequence as _sequence
from ._torch import DisableTorchFunctionSubclass, is_any_autocast_enabled
from ._types import Args, Kwargs
from ._upcalls import implements, upcall
from .exact import mode as _exact
from .fast import call as _call
from .fast.signature import MORE, MOST_ARGUMENTS, Made, Signature, Sizes
from .fast.signing import (
    IN_PLACE,
    SignedCall,
    give_signature,
    keep_written,
    plan_of_size,
    signature_at,
    signed_call,
    with_others,
)
from .grad_mode import _override, in_inference_mode, is_grad_enabled
from .moments import note_moment
from .node import Edge, Node, OfComplex, Unrecorded
from .operation import Operation
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


class _Listeners(threading.local):
    """Functions to call with the result of each recorded call of this thread (see watch.py)."""

    functions: tuple[Callable[[object], None], ...] = ()


listeners = _Listeners()


def record_and_tell(call: Callable[..., R], *args: object) -> R:
    """`call(*args)`, which records; the listeners are told its result, but of no call within it."""
    functions, listeners.functions = listeners.functions, ()
    try:
        found = call(*args)
    finally:
        listeners.functions = functions
    for tell in functions if is_grad_enabled() else ():
        tell(found)
    return found


@implements(_tensor)
def record(
    function: type[Operation],
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
    if _state.taps and listeners.functions:
        return record_and_tell(record, function, args, inplace, asks, for_layer)
    if function.exact is not None:
        function = _exact.chosen(function)
    mode = _override.mode if _state.own_grad_mode else None  # is_grad_enabled, without the call
    if not (_torch_grad_mode() if mode is None else mode) or in_inference_mode():
        if len(args) > function.first_number:
            function.check_numbers(args)  # type: ignore[attr-defined]
        return _unrecorded(function, args, inplace, asks), None
    if inplace is None and not _state.plain:
        for arg in args:
            kind = type(arg)
            if kind is _tensor.Tensor:
                made = arg._node
                sign = arg._signature if made is None else made.signature
                if sign is not None and not sign.is_single:
                    sign = sign.output(arg._output_nr)
            elif kind in _tensor.LEAVES:
                made, sign = None, arg._signature
                if sign is None and arg._requires_grad:
                    sign = _tensor.signature_of_leaf(arg)
                if sign is None:
                    continue  # it is frozen
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
        args = _with_numbers(function, args)
        if _state.plain and (_here.is_plain or _here.calls is not None):
            out, node = _record(function, args, inplace, asks, disabled, anew=True)
            if _here.calls is not None:
                _here.calls.append((function, args, out, node))
            return out, with_origin(node, out) if _here.is_plain else node
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
    function: type[Operation],
    args: Args,
    inplace: Callable[[], torch.Tensor] | None,
    asks: bool,
) -> Any:
    """The result only, with grad mode off."""
    for arg in args:
        if type(arg) not in ORDINARY and asks and dispatch_kind(type(arg)) is SUBCLASS:
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


_SEVERAL = {list, tuple, Sequence}  # types of dimensions, which may be bools for PyTorch


def _with_numbers(function: type[Operation], args: Args) -> Args:
    """The arguments with Python numbers for NumPy's, in whose precision a rule would compute, and
    for tensors without dimensions in places that only take numbers."""
    for i, arg in enumerate(args):
        number: Any = arg
        if isinstance(arg, torch.Tensor):
            kinds = function.numbers_at.get(i)
            if kinds and not arg.dim() and not arg.requires_grad:
                if arg.dtype is torch.bool and bool not in kinds:
                    number = int(arg) if kinds & _SEVERAL else arg  # PyTorch's error
                elif float in kinds or not arg.is_floating_point():
                    number = arg.item()
        elif type(arg).__module__ == "numpy" and isinstance(arg, numbers.Real):
            number = operator.index(arg) if isinstance(arg, numbers.Integral) else float(arg)
        if number is not arg:
            args = (*args[:i], number, *args[i + 1 :])
    return args


def _record(
    function: type[Operation],
    args: Args,
    inplace: Callable[[], torch.Tensor] | None,
    asks: bool,
    disabled: AbstractContextManager[None],
    anew: bool = False,
) -> tuple[Any, Node | None]:
    """`record` for any call, after the check whether to record.

    If there was such a call, it is made again by what is known of that one, unless `anew`.
    """
    change = None
    changes_input = function.is_inplace or inplace is not None
    if changes_input and any([isinstance(a, torch.Tensor) and a.requires_grad for a in args]):
        if is_update_of_leaf(args[0], args[1:]):
            plain = Node(function)
            plain.needs_input_grad = (False,) * len(args)
            return (inplace() if inplace else function.forward(plain, *args)), None
        change = check_inplace(args[0])
    edges: list[Edge | None] = []
    signs: list[Signature | None] = []  # of what the edges lead to
    of_complex = False
    given = args  # with torch's tensors themselves
    for i, arg in enumerate(given):
        edge: Edge | None = None
        sign: Signature | None = None
        kind = dispatch_kind(type(arg))
        if kind is SUBCLASS:
            if asks:
                disabled.__exit__(None, None, None)  # to dispatch to it, unless that is disabled
                return answered(function, given, inplace)
            kind = MIRRORED if isinstance(arg, _tensor.Tensor) else TORCH
            anew = True
        if kind is MIRRORED:
            edge, sign = _edge_and_signature(arg)
        elif kind is TORCH and arg.requires_grad:
            over = None if arg.is_leaf else taken_over(arg, i > 0 or not changes_input)
            if over is not None:
                return record(function, (*given[:i], over, *given[i + 1 :]), inplace, asks)
            note_moment()
            edge = (arg, 0)
            # The tape computes on a detached alias: no torch graph is built.
            args = (*args[:i], arg.detach(), *args[i + 1 :])
        # No result is complex, so complex tensors only enter here.
        may_be_complex = kind is TORCH or (kind is MIRRORED and arg._node is None)
        if may_be_complex and arg.is_complex():
            of_complex = of_complex or edge is not None or function.is_rule
        edges.append(edge)
        signs.append(sign)
    needs = tuple([edge is not None for edge in edges])
    tracked = True in needs
    if forward_mode["_current_level"] >= 0:
        refuse_tangents(function, args)
        if not tracked:
            return _by_torch(function, args, inplace), None
        anew = True
    call: SignedCall | None = None
    # The history of an in-place change follows from its arguments, unless they share memory.
    if tracked and not changes_input:
        call = signed_call(function, args, edges, signs)
    elif tracked and change is not None and change.base is None and not change.views:
        call = signed_call(function, args, edges, signs, IN_PLACE)
    if not (anew or of_complex):
        met = None
        if inplace is not None:
            if call is not None:
                met = _changed_again(function, args, edges, call, inplace)
        elif call is not None:
            met = _made_again(function, args, edges, signs, call)
        elif tracked:
            met = _of_its_kind(function, given)
        if met is not None:
            return met
    if of_complex and tracked:
        refuse_complex(function, args, inplace)
    node = OfComplex(function) if of_complex else Node(function)
    node.places = [i for i, arg in enumerate(args) if dispatch_kind(type(arg)) is not OTHER]
    node.needs_input_grad, node.edges = needs, edges
    return _recorded_anew(node, args, inplace, change, call)


def _edge_and_signature(tensor: "_tensor.Tensor") -> tuple[Edge | None, Signature | None]:
    """Where the gradient of a mirrored tensor goes, and the signature of that."""
    if tensor._node is not None:
        view = tensor._view_of
        if view is not None and view[1] != tensor._version:
            regenerate_grad_fn(tensor)
        edge: Edge = (tensor._node, tensor._output_nr)
        return edge, signature_at(edge)
    if not tensor._requires_grad:
        return None, None
    leaf = tensor._stands_for
    if leaf is None:
        return (tensor, 0), signature_at((tensor, 0))
    if _tensor.is_torchs(leaf):  # otherwise one that had other memory at that time
        note_moment()
    return (leaf, 0), None


def refuse_complex(
    function: type[Operation], args: Args, inplace: Callable[[], torch.Tensor] | None
) -> NoReturn:
    """Raise for complex numbers, after PyTorch's own error, if it has one."""
    if inplace is None:
        function.forward(Unrecorded(function), *args)
    elif not args[0].is_complex():
        inplace()
    raise no_complex(function.__name__)


def _recorded_anew(
    node: Node,
    args: Args,
    inplace: Callable[[], torch.Tensor] | None,
    change: "_views.Change | None",
    call: SignedCall | None,
) -> tuple[Any, Node]:
    """The result of the call of `node`, and the node. `change` describes what an in-place operation
    changes; `call` is None if the call gets no signature."""
    function, needs = node.function, node.needs_input_grad
    if inplace is None:
        out = function.forward(node, *args)
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
    is_new = inplace is None and type(out) is torch.Tensor
    is_new = is_new and (function.is_view or not (node.dirty or among(out, args)))
    if True in needs:
        node.sequence = next(_sequence)
        if isinstance(out, _MANY):
            made = [track(node, i, o, args, True, change) for i, o in enumerate(out)]
            out = made if isinstance(out, list) else tuple(made)
        else:
            out = track(node, 0, out, args, False, change)
    node.outputs = outputs_of(out)
    if call is not None:
        is_new = is_new and function.is_rule and not function.is_inplace
        give_signature(node, call, args, out, is_new and type(out) is _tensor.Tensor)
    elif (
        function.formulas is not None
        and not function.is_inplace
        and (True in needs or inplace is None)  # nothing is recorded of a change of a plain tensor
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


def records_normally() -> bool:
    """Is grad mode on, and exact mode and plain mode off?"""
    mode = _override.mode if _state.own_grad_mode else None
    if not (_torch_grad_mode() if mode is None else mode) or _state.plain or in_inference_mode():
        return False
    mode = _exact._override.mode if _state.own_exact_mode else None  # as in `is_exact`
    return not (_state.exact_mode if mode is None else mode)


@implements(_call)
def named_in_calls() -> dict[str, object]:
    """What the source of generated calls names."""
    return {
        "autocast": is_any_autocast_enabled,
        "disabled": DisableTorchFunctionSubclass,
        "dispatch_mode": _torch.dispatch_mode,
        "forward_mode": forward_mode,
        "Node": Node,
        "sequence": _sequence,
        "signature_of_leaf": _tensor.signature_of_leaf,
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


def _made_again(
    function: type[Operation],
    args: Args,
    edges: Sequence[Edge | None],
    signs: Sequence[Signature | None],
    call: SignedCall,
) -> Made | None:
    """The call, if one with this signature is known. For the next one, a function is generated."""
    stored_with, numbers_vary = call.stored_with, call.numbers_vary
    found = stored_with.next.get(call.key)
    sizes: Sizes = ()
    if found is None and call.of_family is not None:
        stored_with, key, sizes, numbers_vary = call.of_family
        found = stored_with.next.get(key)
    if found is None:
        return None
    found.again += 1
    if not (found.makes_new or found.makes_several):
        return None
    place = next((i for i, sign in enumerate(signs) if sign is not None), None)
    is_due = len(args) <= MOST_ARGUMENTS and (len(args) <= _FEW * found.again or fast.after == 1)
    if found.generated is None and place is not None and is_due:
        call_to_write = _call.CallToWrite(function, found, args, edges, sizes=sizes)
        text = _call.text_of([call_to_write], args, edges, numbers_vary, sizes)
        found.generated = False if text is None else text.made()
    if found.generated and place is not None:
        before = stored_with.calls.get(function)
        varies, formulas = numbers_vary or bool(sizes), function.formulas
        of_any_number = formulas is not None and bool(formulas.rest)
        written = with_others(before, found, args, varies, of_any_number)
        keep_written(stored_with, function, (*written, function.exact is not None))
        target = edges[place][0]  # type: ignore[index]
        made_by = target if isinstance(target, Node) else None
        met = found.generated(found, args[place], made_by, args)
        if met is not None:
            return met
    return _once_more(function, args, found, edges) if found.makes_new and not sizes else None


_FEW = 4  # arguments: for a call with more, a function is generated later, as it takes longer


def _changed_again(
    function: type[Operation],
    args: Args,
    edges: Sequence[Edge | None],
    call: SignedCall,
    inplace: Callable[[], torch.Tensor],
) -> Made | None:
    """The in-place change, if one with this signature is known."""
    found, formulas = call.stored_with.next.get(call.key), function.formulas
    plan = None if found is None else found.plan
    if type(plan) is not formula.Plan or plan.is_open or plan.copied or plan.memory:
        return None
    if formulas is None or formulas.refuse is not None:
        return None
    changed = args[0]
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
    node = Node(function, found)
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


def _of_its_kind(function: type[Operation], args: Args) -> Made | None:
    """`record` for a call without a signature, if there were calls of its kind; else None."""
    known = function.recorders.get(tuple(map(type, args)))
    return None if known is None else known[0](args)


@upcall("nnmirror.fast.recorder")
def learn(
    function: type[Operation], args: Args, needs: tuple[bool, ...], in_place: bool = False
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
    function: type[Operation], args: Args, found: Signature, edges: Sequence[Edge | None]
) -> Made:
    """`record` for a call with the signature `found` and no generated function, such as one of more
    than `MOST_ARGUMENTS` tensors."""
    node = Node(function, found)
    node.edges = edges
    plan = found.plan
    if plan is None:
        out = function.forward(node, *args)
        if node._saved:
            _save_apart(node, out)
    else:
        if plan.is_open:
            node.given = plan.given(args)  # type: ignore[misc]
        out = plan.keep(node, args, plan.compute(*args), apart=True)
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


def outputs_of(out: object) -> tuple[Any, ...]:
    """The `outputs` of the node of this result."""
    return tuple([meta_of(o) for o in out]) if isinstance(out, _MANY) else (meta_of(out),)


# The kind of an argument, by its type: isinstance is slow for tensor classes.
MIRRORED, TORCH, SUBCLASS, OTHER = "mirrored", "torch", "subclass", "other"
# The types of most arguments, which are not subclasses with dispatch.
ORDINARY = {torch.Tensor, _tensor.Tensor, bool, float, int, str, tuple, type(None)}


def _dispatch_kind(cls: type) -> str:
    if not issubclass(cls, torch.Tensor):
        return OTHER
    if issubclass(cls, _tensor.Tensor):
        return SUBCLASS if hasattr(cls, "_of") else MIRRORED
    asked = cls.__torch_function__ is not _torch.disabled_torch_function_impl
    return SUBCLASS if asked and cls is not torch.Tensor else TORCH


dispatch_kind: Callable[[type], str] = functools.lru_cache(maxsize=256)(_dispatch_kind)


@upcall("nnmirror.overrides")
def answered(
    function: type[Operation], args: Args, inplace: Callable[[], torch.Tensor] | None
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
def check_inplace(tensor: torch.Tensor) -> "_views.Change":
    """What a recorded in-place operation on `tensor` is about to change."""
    raise NotImplementedError


@upcall("nnmirror.views")
def regenerate_grad_fn(view: "_tensor.Tensor") -> None:
    """Give a view whose memory has changed a new grad_fn, based on its base's present one."""
    raise NotImplementedError


@upcall("nnmirror.views")
def rebase_history(node: Node, view: "_tensor.Tensor", base: torch.Tensor) -> None:
    """Record `node`, an in-place operation on `view`, as one on its base."""
    raise NotImplementedError


@upcall("nnmirror.views")
def track_views(base: torch.Tensor, views: Sequence[tuple[torch.Tensor, str]]) -> None:
    """Track plain views whose base has become tracked."""
    raise NotImplementedError


def is_update_of_leaf(changed: object, others: object) -> bool:
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
            regenerate_grad_fn(tensor)
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
        base, views = check_inplace(out) if change is None else change
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
            rebase_history(node, out, base)
        if views:
            track_views(out if base is None else base, views)
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


def refuse_transform(function: type[Operation], args: Args) -> None:
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


def refuse_tangents(function: type[Operation], args: Args) -> None:
    """Raises as PyTorch: a backward alone does not define forward mode."""
    if function.is_rule or all(_torch.unpack_dual(t, 0)[1] is None for t in tensors_in(args)):
        return
    raise NotImplementedError(
        "You must implement the jvp function for custom autograd.Function to use it with forward"
        " mode AD."
    )


def _by_torch(
    function: type[Operation], args: Args, inplace: Callable[[], torch.Tensor] | None
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
    if in_transform_or_forward_mode():
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


def in_transform_or_forward_mode() -> bool:
    """Is a transform of torch.func or forward mode active, so that PyTorch computes more than the
    result?"""
    return in_transform() is not None or forward_mode["_current_level"] >= 0


def made_by(tensor: "_tensor.Tensor", node: Node, index: int) -> None:
    """Make `tensor` output `index` of `node`, and move a retained gradient there."""
    old = tensor._node
    if old is not None and old.retained and tensor._output_nr in old.retained:
        node.retained = {index: old.retained.pop(tensor._output_nr)}
        node.mark_hooked()
    tensor._node = node
    tensor._output_nr = index
