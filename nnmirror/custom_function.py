"""Calls of a user's Function."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import _state
from . import function as _function
from . import tensor as _tensor
from ._state import here as _here
from ._state import sequence as _sequence
from ._torch import DisableTorchFunctionSubclass, is_any_autocast_enabled
from ._types import Args, Kwargs
from ._upcalls import implements
from .fast.signing import give_signature, signature_at, signed_call
from .function import Function, FunctionCtx, operation_of
from .grad_mode import is_grad_enabled, users_code
from .node import Node
from .tape import (
    AUTOCAST,
    among,
    edge_of,
    forward_mode,
    in_transform,
    is_differentiable,
    listeners,
    outputs_of,
    record_and_tell,
    refuse_tangents,
    refuse_transform,
    track,
    with_origin,
)
from .tensor import no_complex


def _sign_users_call(node: Node, args: Args, out: "_tensor.Tensor") -> None:
    """Give the call of a user's Function a signature, for the calls on its result.

    Its own backward may do something else each time, and is left to the generic walk.
    """
    signs = [None if edge is None else signature_at(edge) for edge in node.edges]
    if any(
        needs and sign is None for needs, sign in zip(node.needs_input_grad, signs, strict=True)
    ):
        return
    call = signed_call(node.function, args, node.edges, signs, out._view_of is None)
    if call is None:
        return
    give_signature(node, call, args, None, makes_new=False)
    if node.signature is not None:
        node.signature.walks.decline()
        node.signature.is_single = out._view_of is None


@implements(_function)
def applied(function: type[Function], args: Args, kwargs: Kwargs) -> Any:
    if _state.taps and listeners.functions:
        return record_and_tell(_applied, function, args, kwargs)
    return _applied(function, args, kwargs)


def _applied(function: type[Function], args: Args, kwargs: Kwargs) -> Any:
    """Run a user's Function; its output, recorded if grad mode is on and an argument requires
    grad."""
    operation = operation_of(function)
    has_context = function.setup_context is not Function.setup_context
    if has_context:
        args, kwargs = _with_defaults(function.forward, args, kwargs)
    if kwargs:
        args = _placed(function.forward, has_context, args, kwargs)
    recording = is_grad_enabled()
    if recording and is_any_autocast_enabled():
        raise RuntimeError(AUTOCAST)
    with DisableTorchFunctionSubclass():
        if recording and in_transform() is not None:
            refuse_transform(operation, args)
        if forward_mode["_current_level"] >= 0:
            refuse_tangents(operation, args)
        node = Node(operation)
        node.attributes = {}
        node.places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        edges = [
            edge_of(a) if isinstance(a, torch.Tensor) and a.requires_grad else None for a in args
        ]
        node.sequence = next(_sequence)  # after the inputs were met, before calls inside forward
        node.needs_input_grad = tuple([edge is not None for edge in edges])
        ctx = FunctionCtx(node)
        with users_code():
            if has_context:
                out = function.forward(*args)
                function.setup_context(ctx, args, out)
            else:
                out = function.forward(ctx, *args)
        node.dirty = ctx.dirty_tensors
        tracked = recording and any(node.needs_input_grad)
        if tracked:
            if any(e is not None and a.is_complex() for e, a in zip(edges, args, strict=True)):
                raise no_complex(function.__name__)
            node.edges = edges
            node.save_for_backward(*ctx.to_save)
        single = not isinstance(out, tuple)
        made = []
        for i, result in enumerate((out,) if single else out):
            if not (tracked and is_differentiable(result, node)):
                result = _without_gradient(result, args, node.dirty)
            else:
                if result.requires_grad and not among(result, node.dirty):
                    result = _apart(result, args)
                result = track(node, i, result, args, not single, None)
            made.append(result)
        node.outputs = outputs_of(made)
        if tracked and single and not node.dirty and type(made[0]) is _tensor.Tensor:
            _sign_users_call(node, args, made[0])
        # What was marked is an output, which leads to the node: kept, it would be a cycle.
        node.dirty = node.non_differentiable = ()
        if _state.plain and _here.is_plain:
            with_origin(node, made)
    return made[0] if single else tuple(made)


def _with_defaults(
    forward: Callable[..., object], args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """The arguments of a call of `forward`, in its order and with its defaults."""
    code = getattr(forward, "__code__", None)
    if not (kwargs or code is None or code.co_kwonlyargcount) and code.co_argcount == len(args):
        return args, kwargs  # all given, and inspecting the signature is slow
    bound = inspect.signature(forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args, bound.kwargs


def _placed(forward: Callable[..., object], has_context: bool, args: Args, kwargs: Kwargs) -> Args:
    """The arguments of forward by position, with those given by name in their places, as in
    PyTorch."""
    code = forward.__code__
    names = code.co_varnames[0 if has_context else 1 : code.co_argcount]
    for name in kwargs:
        if name not in names:
            raise TypeError(f"forward() got an unexpected keyword argument '{name}'")
        if name in names[: len(args)]:
            raise TypeError(f"forward() got multiple values for argument '{name}'")
    placed = list(args)
    while len(placed) < len(args) + len(kwargs):
        name = names[len(placed)]
        if name not in kwargs:
            raise TypeError(
                f"forward() missing required argument: '{name}' (position {len(placed)})"
            )
        placed.append(kwargs[name])
    return tuple(placed)


def _apart(out: torch.Tensor, inputs: Args) -> torch.Tensor:
    """An output that requires grad already, without its history: an input, or the result of a graph
    inside forward."""
    if not among(out, inputs):
        return out.detach()
    if isinstance(out, _tensor.Tensor):
        return out  # for torch it does not require grad
    return out.detach().view_as(out)


def _without_gradient(out: object, inputs: Args, dirty: tuple[torch.Tensor, ...]) -> object:
    """An output of a user's Function that gets no gradient: never an input itself, nor a result
    that requires grad because of a graph inside."""
    if not isinstance(out, torch.Tensor):
        return out
    if among(out, inputs):
        if out.requires_grad:
            return out.detach()
        with torch.no_grad():
            return out if among(out, dirty) else out.view_as(out)
    return out.detach() if out.requires_grad and not out._is_view() else out
