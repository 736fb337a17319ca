"""Functions that make a tensor from data without `__torch_function__`, such as `torch.as_tensor`.

PyTorch does not dispatch them to a tensor subclass, so the gradient of a tracked tensor would be
silently lost. Importing nnmirror therefore replaces them in `torch` by functions of the same name
that look for a tracked tensor among their arguments and otherwise call PyTorch's own.
"""

import functools
from typing import Any, NoReturn

import torch
from torch.types import Device

from .. import _torch
from .._types import TorchFunction
from ..grad_mode import is_grad_enabled
from ..tensor import Tensor
from .registry import refusal
from .shape import to

T = torch.Tensor


def _is_tracked(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and is_grad_enabled()


def _answered(function: TorchFunction, answer: TorchFunction) -> None:
    """Call `answer` instead of torch's `function` if an argument is tracked."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        for value in args:
            if _is_tracked(value):
                return answer(*args, **kwargs)
        for value in kwargs.values():
            if _is_tracked(value):
                return answer(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(torch, function.__name__, call)
    # torch.jit.script knows an operation by the identity of its function. PyTorch scripts some of
    # its own modules on import, such as torch.distributed.optim.
    operation = _torch.find_builtin(function)
    if operation is not None:
        _torch.register_builtin(call, operation)


def _theirs(value: Any) -> object:
    """A tracked tensor as one of torch's own that requires grad, for PyTorch's errors.

    These name its class.
    """
    if not _is_tracked(value):
        return value
    named = type(type(value).__name__, (torch.Tensor,), {})
    return value.detach().clone().as_subclass(named).requires_grad_()


def _call_theirs(
    function: TorchFunction, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """PyTorch's error for these arguments, if it has one."""
    with _torch.DisableTorchFunctionSubclass():
        function(*map(_theirs, args), **{name: _theirs(v) for name, v in kwargs.items()})


def as_tensor(data: T, dtype: torch.dtype | None = None, device: Device = None) -> T:
    """Itself, or converted: a recorded call."""
    return to(data, device=device or data.device, dtype=dtype or data.dtype)


def asarray(
    obj: T,
    *,
    dtype: torch.dtype | None = None,
    device: Device = None,
    copy: bool | None = None,
    requires_grad: bool | None = None,
) -> T:
    """Itself, converted or copied."""
    made = to(obj, device=device or obj.device, dtype=dtype or obj.dtype)
    if copy and made is obj:
        made = obj.clone()
    if requires_grad is False:
        return made.requires_grad_(False) if made is obj and obj.is_leaf else made.detach()
    return made


def _checked(
    function: TorchFunction, answer: TorchFunction, *args: object, **kwargs: object
) -> Any:
    """`answer`, after PyTorch's errors and warnings."""
    _call_theirs(function, args, kwargs)
    return answer(*args, **kwargs)


def _refuse(function: TorchFunction, *args: object, **kwargs: object) -> NoReturn:
    _call_theirs(function, args, kwargs)
    raise refusal(function, "(dense, torch.zeros(size).index_put(indices, values) trains)")


def _take_number(function: TorchFunction, *args: object, **kwargs: object) -> Any:
    _call_theirs(function, args, kwargs)
    return function(*args, **kwargs)


for _answer in (as_tensor, asarray):
    _made = getattr(torch, _answer.__name__)
    _answered(_made, functools.partial(_checked, _made, _answer))
for _name in ("coo", "csr", "csc", "bsr", "bsc", "compressed"):
    _sparse = getattr(torch, f"sparse_{_name}_tensor")
    _answered(_sparse, functools.partial(_refuse, _sparse))
for _name in ("arange", "full", "full_like", "scalar_tensor"):
    _made = getattr(torch, _name)
    _answered(_made, functools.partial(_take_number, _made))
