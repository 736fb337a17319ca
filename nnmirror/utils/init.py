"""Modules without the cost of their initial values."""

import inspect
from typing import Any, TypeVar

from ..modules.module import Module

M = TypeVar("M", bound=Module)


def skip_init(module_cls, *args, **kwargs):  # type: (type[M], *Any, **Any) -> M
    """`module_cls(*args, **kwargs)` with uninitialised parameters and buffers."""
    if not issubclass(module_cls, Module):
        raise RuntimeError(f"Expected a Module; got {module_cls}")
    if "device" not in inspect.signature(module_cls).parameters:
        raise RuntimeError("Module must support a 'device' arg to skip initialization")
    device: Any = kwargs.pop("device", "cpu")
    return module_cls(*args, **{**kwargs, "device": "meta"}).to_empty(device=device)
