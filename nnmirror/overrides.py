"""Tensor subclasses: calls are dispatched to their `__torch_function__`, as by PyTorch's functions.

    class Named(torch.Tensor): ...

    y = nnmirror.Linear(3, 2)(x.as_subclass(Named)) # a Named, tracked or not

A mirrored function that is given such a tensor calls its `__torch_function__`, which by default
calls the function and converts the result to the subclass. If the result is tracked, its class also
has to be `Tensor`: a class derived from both is used (`tracked_class`).

`__torch_function__` may call the function with dispatch disabled, when nothing is recorded. So it
gets a `Called` instead of the function, which compares equal to it and is always recorded.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, TypeVar

import torch
import torch.overrides

from . import _torch, tape
from . import tensor as _tensor
from ._torch import DisableTorchFunctionSubclass, EnableTorchFunction
from ._types import TorchFunction
from ._upcalls import implements
from .grad_mode import is_grad_enabled
from .node import Node
from .operation import Operation
from .tape import ORDINARY, SUBCLASS, TORCH, dispatch_kind, record, tensors_in
from .tensor import RULES, Tensor

C = TypeVar("C", bound=TorchFunction)


class _Asked(threading.local):
    already: bool = False  # for a function whose operations are being called


_asked = _Asked()


def _is_asked() -> bool:
    return not _asked.already and _torch.is_torch_function_enabled()


def is_subclass(value: object) -> bool:
    """Is it a tensor of a class with a `__torch_function__` that is to be called?"""
    return dispatch_kind(type(value)) is SUBCLASS and _is_asked()


def dim_of(input: torch.Tensor) -> int:
    """`input.dim()`, which PyTorch's modules dispatch to a subclass."""
    if is_subclass(input):
        return input.dim()
    with DisableTorchFunctionSubclass():
        return input.dim()


class Called:
    """Stands for a function when a `__torch_function__` is called."""

    def __init__(self, func: TorchFunction, run: TorchFunction) -> None:
        self.func, self.run = func, run
        functools.update_wrapper(self, func)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)

    def __eq__(self, other: object) -> bool:
        return other is self or bool(other == self.func)

    def __hash__(self) -> int:
        return hash(self.func)

    def __repr__(self) -> str:
        return repr(self.func)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        before, _asked.already = _asked.already, True
        try:
            with DisableTorchFunctionSubclass():
                tensors = tensors_in((args, kwargs)) if is_grad_enabled() else ()
                if not any(t.requires_grad for t in tensors):
                    return self.run(*args, **kwargs)
            with EnableTorchFunction():  # it records the operations that it consists of
                return self.run(*args, **kwargs)
        finally:
            _asked.already = before


@implements(tape)
def answered(
    function: type[Operation], args: tuple[object, ...], inplace: Callable[[], Any] | None
) -> tuple[Any, Node | None]:
    """`record(function, args, inplace)` if there is a tensor subclass among the arguments."""
    func = function.public if "public" in vars(function) else function.infer
    if func is None or inplace is not None or not _is_asked():  # torch dispatches in place
        return record(function, args, inplace, asks=False)
    given = function.as_called(*args)
    node = None

    def run(*now: object, **kwargs: object) -> Any:
        nonlocal node
        same = len(now) == len(given) and all(map(is_, now, given))
        if same and not kwargs:
            out, node = record(function, args, asks=False)
            return out
        # The subclass has replaced the arguments.
        return RULES[func](*now, **kwargs)

    asked = [a for a in args if dispatch_kind(type(a)) is SUBCLASS]
    return _ask(Called(func, run), asked, given, {}), node


def _ask(
    called: Called, tensors: list[object], args: tuple[object, ...], kwargs: dict[str, object]
) -> Any:
    """As `torch.overrides.handle_torch_function`; modes see the single operations in either
    case."""
    asked = _torch.get_overloaded_args(tensors)  # the most derived first
    types = tuple(map(type, asked))
    for tensor in asked:
        result = tensor.__torch_function__(called, types, args, kwargs)
        if result is not NotImplemented:
            return result
    raise TypeError(
        f"no implementation found for '{called.__module__}.{called.__name__}' on types that"
        f" implement __torch_function__: {list(types)}"
    )


def overridable(function: C) -> C:
    """Dispatch the decorated function as a whole, not operation by operation."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        answer = asked_as_a_whole(call, function, args, kwargs)
        return function(*args, **kwargs) if answer is None else answer[0]

    return call  # type: ignore[return-value]


def asked_as_a_whole(
    call: TorchFunction, function: TorchFunction, args: tuple[object, ...], kwargs: dict[str, Any]
) -> tuple[Any] | None:
    """The result of dispatching `call` to a subclass among the arguments of `function`; None if
    there is none."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        if type(value) not in ORDINARY and is_subclass(value):
            kinds = {SUBCLASS, TORCH}
            asked = [t for t in (*args, *kwargs.values()) if dispatch_kind(type(t)) in kinds]
            called = Called(call, functools.partial(_unasked, function))
            return (_ask(called, asked, args, kwargs),)
    return None


def _dispatched(func: TorchFunction, *args: object, **kwargs: object) -> Any:
    return Tensor.__torch_function__(func, (), args, kwargs)


def _unasked(function: TorchFunction, *args: object, **kwargs: object) -> Any:
    """Call it; torch would dispatch each of its operations to a subclass."""
    if not _torch.is_torch_function_enabled():
        return function(*args, **kwargs)
    with DisableTorchFunctionSubclass():
        args = tuple(map(_plain, args))
        kwargs = {name: _plain(value) for name, value in kwargs.items()}
    return function(*args, **kwargs)


def _plain(value: Any) -> Any:
    if dispatch_kind(type(value)) is SUBCLASS and not value.requires_grad:
        return value.detach()
    return value


class _OfSubclass(Tensor):
    """Mixin of a tracked tensor of a subclass: its results are of the subclass too."""

    _of: type[torch.Tensor]  # the subclass

    @classmethod
    def __torch_function__(
        cls,
        func: TorchFunction,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in torch.overrides.get_default_nowrap_functions():
            return result
        with DisableTorchFunctionSubclass():
            return cls._converted(result, args)

    def __reduce_ex__(self, protocol: object) -> str | tuple[object, ...]:
        return self.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    @classmethod
    def _converted(cls, result: object, args: tuple[object, ...]) -> Any:
        if type(result) is torch.Tensor:
            return result.as_subclass(cls._of)
        if type(result) is Tensor and not any(result is a for a in args):
            result.__class__ = cls
        elif isinstance(result, tuple | list):
            return type(result)([cls._converted(r, args) for r in result])  # type: ignore[call-arg]
        return result


@implements(tape)
@functools.lru_cache(maxsize=256)
def tracked_class(cls: type[torch.Tensor]) -> type[Tensor]:
    """The class of tracked tensors that are of the subclass `cls`."""
    if issubclass(cls, _OfSubclass):
        return cls
    if dispatch_kind(cls) is not SUBCLASS:
        return Tensor

    def asked(
        own: object,
        func: TorchFunction,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _asked.already:
            return Tensor.__torch_function__(func, types, args, kwargs)
        if not isinstance(func, Called):
            func = Called(func, functools.partial(_dispatched, func))
        types = tuple([t for t in types if dispatch_kind(t) is SUBCLASS])
        return super(made, own).__torch_function__(func, types, args, kwargs)

    body = {"__torch_function__": classmethod(asked), "_of": cls, "__module__": cls.__module__}
    metaclass: Any = type(cls)
    made = metaclass(cls.__name__, (cls, _OfSubclass), body)
    made.__qualname__ = cls.__qualname__
    return made  # type: ignore[no-any-return]


class _Alias(Operation):
    """z = x, in the same memory:  dx = g"""

    is_rule = is_view = True

    @staticmethod
    def forward(ctx: Node, input: torch.Tensor) -> torch.Tensor:
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Node, g: torch.Tensor) -> torch.Tensor:
        return g

    @classmethod
    def node_name(cls) -> str:
        return "AliasBackward0"


@implements(_tensor)
def as_subclass(tensor: Tensor, cls: type[torch.Tensor]) -> Any:
    """`tensor.as_subclass(cls)` of a tensor that requires grad."""
    made = tracked_class(cls)
    if made is Tensor or not is_grad_enabled():
        return _tensor.dispatch(torch.Tensor.as_subclass, (tensor, cls), {})
    out = record(_Alias, (tensor,), asks=False)[0]
    out.__class__ = made
    return out
