"""Functions from generated source, which debuggers and tracebacks can show."""

import itertools
import keyword
import linecache
from collections.abc import Callable, Collection
from functools import lru_cache
from types import CodeType
from typing import Any, TypeAlias

import torch

from .._teardown import not_at_exit

# The names in a source, and what they stand for.
Environment: TypeAlias = dict[str, Any]

_source_numbers = itertools.count()


class Unwritable(Exception):
    """A call, or the layers' calls, cannot be written as a function."""


@not_at_exit
class Compiled:
    """A function compiled from source, which is in `linecache` as long as the function lives."""

    def __init__(self, source: str, name: str, kind: str, environment: Environment) -> None:
        self.source = source
        self.filename = f"<nnmirror {kind} {next(_source_numbers)}>"
        lines = source.splitlines(keepends=True)
        linecache.cache[self.filename] = len(source), None, lines, self.filename
        made: Environment = {}
        exec(_in_file(_code(source), self.filename), environment, made)
        self.function: Callable[..., Any] = made.pop(name)  # its globals do not refer to it
        environment.update(made)

    def __del__(self) -> None:
        linecache.cache.pop(self.filename, None)


@lru_cache(maxsize=128)
def _code(source: str) -> CodeType:
    """Compiled once for all models of one structure: compiling takes a quarter of binding."""
    return compile(source, "", "exec")


def _in_file(code: CodeType, filename: str) -> CodeType:
    """`code`, and that of the functions in it, as if it were compiled from this file."""
    inner = tuple(_in_file(c, filename) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_filename=filename, co_consts=inner)


def name_of(function: Any, environment: Environment, taken: Collection[str] = ()) -> str:
    """A readable name for `function` in the source, under which it is put into `environment`."""
    name = getattr(function, "__name__", "").partition(".")[0]
    if name.startswith("__"):  # so that in-place functions keep their underscore
        name = name.strip("_")
    if name == "get":
        name = function.__self__.__name__
    if name in ("forward", "infer"):  # of which rule
        name = "_".join(function.__qualname__.split(".")[-2:])
    if not name.isidentifier():
        name = "function"
    if keyword.iskeyword(name) or name in taken:
        name += "_"
    if environment.setdefault(name, function) is function:
        return name
    known = (key for key, value in environment.items() if value is function)
    name = next(known, f"{name}_{len(environment)}")
    environment[name] = function
    return name


def is_same(one: Any, other: Any) -> bool:
    """Are these two constants of a source equal?"""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)
