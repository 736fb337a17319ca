"""`torch.func`'s transforms of what the mirror tracks.

PyTorch unwraps the arguments of a transform without `__torch_function__`, so the gradient of a
tracked one would be silently lost. Importing nnmirror therefore replaces the transforms in
`torch.func` by functions of the same name. If an argument is tracked, or if the function is a
mirrored module that is trained, or a method of one, they call the transform of this name in
`nnmirror.func`; otherwise PyTorch's own. Of a function that only refers to such a module
(`lambda x: model(x)`) they do not know: it is refused when it meets the module.
"""

import functools
import threading
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch

from . import func as _mirrored
from . import tensor
from ._torch import tree_flatten
from ._types import TorchFunction
from .grad_mode import is_grad_enabled
from .modules.module import Module
from .rules.registry import refusal

R = TypeVar("R")
_TRANSFORMED = "_transformed"  # the attribute that has the function that was transformed


def _is_tracked(function: object, *values: object, differentiates: bool = True) -> bool:
    """Does the mirror track one of the values, or a parameter of the function?

    Without gradients, `vmap` is PyTorch's own; but gradients inside a transform are computed all
    the same.
    """
    if _running.depth:
        return True  # what is outside may be tracked by the mirror's transform around this one
    while isinstance(function, FunctionType) and _TRANSFORMED in vars(function):
        function, differentiates = (
            vars(function)[_TRANSFORMED],
            True,
        )  # `grad(f)` in `vmap(grad(f))`
    owner = function.__self__ if isinstance(function, MethodType) else function
    is_tracked = isinstance(owner, Module) and any(p.requires_grad for p in owner.parameters())
    if not is_tracked:
        tensors = tree_flatten(values)[0]
        is_tracked = any(isinstance(t, tensor.Tensor) and t.requires_grad for t in tensors)
    # In this order, as torch.compile cannot trace the question for the mode.
    return is_tracked and (differentiates or is_grad_enabled())


class _Running(threading.local):
    depth = 0  # transforms of the mirror that were called in place of torch's


_running = _Running()


def _run(transformed: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    _running.depth += 1
    try:
        return transformed(*args, **kwargs)
    finally:
        _running.depth -= 1


def _transform(theirs: TorchFunction, ours: TorchFunction) -> TorchFunction:
    """A transform that returns a function, such as `grad`."""
    differentiates = ours is not _mirrored.vmap

    @functools.wraps(theirs)
    def transform(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        transformed = theirs(func, *args, **kwargs)

        @functools.wraps(transformed, updated=())
        def call(*inputs: object, **named: object) -> Any:
            if _is_tracked(func, inputs, named, differentiates=differentiates):
                return _run(ours(func, *args, **kwargs), *inputs, **named)
            return transformed(*inputs, **named)

        vars(call)[_TRANSFORMED] = func
        return call

    return transform


def _transform_at_once(theirs: TorchFunction, ours: TorchFunction) -> TorchFunction:
    """A transform that is given the function's arguments, such as `vjp`."""

    @functools.wraps(theirs)
    def transform(func: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        if _is_tracked(func, args, kwargs):
            return _run(ours, func, *args, **kwargs)
        return theirs(func, *args, **kwargs)

    return transform


def _refuse(function: TorchFunction, *args: object) -> Any:
    raise refusal(function)


for _name in ("grad", "grad_and_value", "hessian", "jacfwd", "jacrev", "vmap"):
    setattr(torch.func, _name, _transform(getattr(torch.func, _name), getattr(_mirrored, _name)))
for _name in ("jvp", "vjp"):
    setattr(
        torch.func, _name, _transform_at_once(getattr(torch.func, _name), getattr(_mirrored, _name))
    )
torch.func.linearize = _transform_at_once(
    torch.func.linearize, functools.partial(_refuse, torch.func.linearize)
)
torch.vmap = torch.func.vmap
