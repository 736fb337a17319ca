"""The formulas of an operation, as its docstring gives them.

Of `Tanh`, documented as "y = tanh(x):  dx = g (1 - y^2).  Saved: y.", the value is "y = tanh(x)"
and the gradients are "dx = g (1 - y^2)".
"""

import functools
import re
from collections.abc import Iterator

from .function import CustomOperation, Function
from .operation import Operation
from .rules import Rule

_BREAK = re.compile(r"\n\s*|\s{3,}")
_VALUE = re.compile(r"\w+ = ")
_GRADIENT = re.compile(r"\bd\w+ = ")
_SENTENCE = re.compile(r"\.\s")


def gradients(function: type[Operation]) -> str:
    """Those of an operation or of its base class; else the first line of its docstring."""
    classes = list(_classes(function))
    for cls in classes:
        found = gradients_in(cls.__doc__)
        if found:
            return found
    return next((c.__doc__.strip().split("\n")[0] for c in classes if c.__doc__), function.__name__)


def value(function: type[Operation]) -> str:
    """What it computes: "y = tanh(x)"; "" if the docstring does not say."""
    return next((found for cls in _classes(function) if (found := _halves(cls.__doc__)[0])), "")


def gradients_in(doc: str | None) -> str:
    """The part between the value and what is saved."""
    return _halves(doc)[1]


def _classes(function: type[Operation]) -> Iterator[type]:
    documented = function.function if issubclass(function, CustomOperation) else function
    for cls in documented.__mro__:
        if cls in (Rule, Function, Operation):
            return
        yield cls


def _joined(gap: re.Match[str]) -> str:
    return " " if "\n" in gap[0] else "  "


@functools.lru_cache(maxsize=1024)
def _halves(doc: str | None) -> tuple[str, str]:
    first, *others = (_BREAK.sub(_joined, part) for part in (doc or "").strip().split("\n\n"))
    first = first.partition(".  Saved: ")[0]
    for mark in (":  ", ".  "):
        head, found, tail = first.partition(mark)
        if found and head:
            return head.strip(), tail.strip().rstrip(".")
    # The gradients may have a paragraph of their own: up to the end of its first sentence.
    if others and _VALUE.match(first) and _GRADIENT.search(others[0]):
        return first.strip().rstrip(":"), _SENTENCE.split(others[0].strip())[0].rstrip(".")
    return "", ""
