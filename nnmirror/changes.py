"""Counts the changes to what the fast paths take for given.

`count[0]` goes up whenever a module's hooks, parameters or children, a parameter's
`requires_grad`, its `data` or its shape are changed, anywhere. A fast path that has looked
everything over need not look again while the count stands still.

Counted are the ways in which a script makes a change: assignment, methods, the methods of a
registry. What is written past them, into `vars(module)` or by `dict.__setitem__`, is not seen.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

count = [0]


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a change."""

    def change(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:  # it may be done in part
            count[0] += 1

    return change


def reshaping(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which gives its first argument, a tensor, another shape or other memory."""

    def change(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(tensor, *args, **kwargs)
        finally:
            vars(tensor).pop("_plain", None)
            vars(tensor).pop("_transposed", None)
            vars(tensor).pop("_signature", None)
            count[0] += 1

    return change


class Registry(dict[Any, Any]):
    """A module's parameters or children by name: a dict that counts its changes."""

    def __reduce__(self) -> Any:
        return dict, (), None, None, iter(self.items())  # a file holds what PyTorch's would


class HookRegistry(OrderedDict[Any, Any]):
    """A module's hooks by number: an OrderedDict that counts its changes."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())

    def __repr__(self) -> str:
        return repr(OrderedDict(self))


_CHANGES = (
    "__setitem__",
    "__delitem__",
    "__ior__",
    "clear",
    "pop",
    "popitem",
    "setdefault",
    "update",
)
for _cls, _base in ((Registry, dict), (HookRegistry, OrderedDict)):
    for _name in _CHANGES:
        setattr(_cls, _name, counted(getattr(_base, _name)))


def counting(registry: Any) -> Any:
    """A plain registry as one that counts; any other as it is."""
    kinds: dict[type, type] = {dict: Registry, OrderedDict: HookRegistry}
    kind = kinds.get(type(registry))
    return registry if kind is None else kind(registry)
