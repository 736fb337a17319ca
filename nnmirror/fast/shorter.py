"""Simplify the recorded calls of a walk: the same numbers with fewer and cheaper calls.

Each simplification holds for every walk with the same signature. The comparison with the generic
walk that a bound walk must pass (see `trial.py`) uses the simplified calls.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch

from .. import tape as _tape
from .._types import Args, Kwargs, TorchFunction
from ..constants import constant
from .source import Environment

if TYPE_CHECKING:
    from .writer import Line

LARGE = 1 << 18  # bytes: memory of this size or more is freed as soon as possible
WORDS = re.compile(r"\bt\d+\b")
_WIDE = (torch.float32, torch.float64)
# Functions of a tensor and a number, which are faster with a tensor without dimensions.
_TAKE_NUMBERS = {"add", "div", "eq", "ge", "gt", "le", "lt", "mul", "ne", "sub"}
_OPERATORS: dict[TorchFunction, TorchFunction] = {
    torch.Tensor.__eq__: torch.eq,
    torch.Tensor.__ne__: torch.ne,
}


class TorchCall(NamedTuple):
    """A torch call, which becomes a line of source."""

    name: str  # of its result; empty if that has a name already
    func: Any  # None: the result is the only word
    args: Args
    kwargs: Kwargs
    words: list[str]
    out: Any

    def changes(self) -> bool:
        """Does it change an existing tensor?"""
        name = getattr(self.func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        return in_place or name == "__setitem__" or name.startswith("__i") or "out" in self.kwargs


def size_of(tensor: torch.Tensor) -> int:
    """In bytes."""
    return tensor.numel() * tensor.element_size()


def memory_of(tensor: object) -> int:
    """A key for the memory of a tensor; 0 for other values."""
    if not isinstance(tensor, torch.Tensor):
        return 0
    if tensor.layout is not torch.strided:
        return -id(tensor)  # it has several
    return tensor.untyped_storage()._cdata


def shorter(
    lines: "Sequence[Line]",
    fixed: Callable[[torch.Tensor], bool],
    kept: set[int],
    needed: set[str],
    environment: Environment,
) -> "list[Line]":
    """`lines` without what is unnecessary, or needs to be done only once for all walks.

    `fixed` says whether a tensor is the same in each walk, `kept` is the memory that each walk must
    have for itself, `needed` the names that are used elsewhere.
    """
    return without_unneeded(_without_fixed(lines, fixed, kept, environment), needed)


def without_repeated(
    lines: "Sequence[Line]", same: dict[str, str], kept: set[int], seen: set[str]
) -> "tuple[list[Line], list[str]]":
    """Without calls that an earlier call makes redundant, and without t(t(x)) of a saved tensor;
    and the conditions on the graph under which this does not hold.

    `same` gives the place where a tensor with several places was found first. `kept` is memory that
    may be referred to elsewhere, `seen` the names of tensors that are also used outside the walk.
    """
    holders: dict[int, int] = {}
    in_place: set[int] = set()
    for line in lines:
        if isinstance(line, TorchCall):
            memory = memory_of(line.out)
            holders[memory] = holders.get(memory, 0) + 1
            if line.changes():
                in_place.add(memory)
    guards: list[str] = []
    computed: dict[object, TorchCall] = {}
    transposed: dict[str, TorchCall] = {}  # saved by a node
    instead: dict[str, str] = {}
    objects: dict[int, object] = {}
    left: list[Line] = []
    for line in lines:
        if not isinstance(line, TorchCall):
            left.append(line)
            continue
        words = [WORDS.sub(lambda name: instead.get(name[0], name[0]), w) for w in line.words]
        line = line._replace(words=words, args=tuple([objects.get(id(a), a) for a in line.args]))
        name = getattr(line.func, "__name__", "")
        if name == "t" and line.name and len(words) == 1:
            inner = transposed.get(words[0])
            if inner is None:
                if words[0].startswith("s"):
                    transposed[line.name] = line
            elif line.name in seen:
                line = line._replace(func=None, words=inner.words, args=inner.args)
            else:
                instead[line.name], objects[id(line.out)] = inner.words[0], inner.args[0]
                continue
        elif (
            line.name
            and not line.changes()
            and isinstance(line.out, torch.Tensor)
            and line.name not in seen
            and (
                _is_view(line, in_place)
                or (
                    name in _ARITHMETIC
                    and memory_of(line.out) not in in_place | kept
                    and holders[memory_of(line.out)] == 1
                    and in_place.isdisjoint(map(memory_of, line.args))
                )
            )
        ):
            key = line.func, *[same.get(w, w) for w in words]
            first = computed.setdefault(key, line)
            if first is not line:
                pairs = zip(words, first.words, strict=True)
                for a, b in pairs:
                    guard = f"{a} is not {b} and not {a}.is_set_to({b})"
                    if a != b and guard not in guards:
                        guards.append(guard)
                instead[line.name], objects[id(line.out)] = first.name, first.out
                continue
        left.append(line)
    return left, guards


def _is_view(call: TorchCall, changed: set[int]) -> bool:
    """Is its result another shape of its first argument, the same each time it is called?"""
    if getattr(call.func, "__name__", "") not in _VIEWS or call.kwargs:
        return False
    memory = memory_of(call.out)
    return memory not in changed and memory == memory_of(call.args[0])


_VIEWS = {"expand", "reshape", "squeeze", "unsqueeze", "view"}
_ARITHMETIC = {"add", "addcmul", "div", "mul", "neg", "sub"}


def _without_fixed(
    lines: "Sequence[Line]",
    fixed: Callable[[torch.Tensor], bool],
    kept: set[int],
    environment: Environment,
) -> "list[Line]":
    """Without the calls whose result is the same in each walk; the result goes into
    `environment`."""
    changed = set(kept)
    for line in lines:
        if isinstance(line, TorchCall) and line.changes():
            changed.add(memory_of(line.out))
    known: set[int] = set()
    left: list[Line] = []
    for line in lines:
        if isinstance(line, TorchCall) and line.name and not line.changes():
            given = list(_tape.tensors_in((line.args, line.kwargs)))
            out = line.out
            if (
                given
                and isinstance(out, torch.Tensor)
                and all(id(t) in known or fixed(t) for t in given)
                and not any(type(a) is Given for a in line.args)
                and memory_of(out) not in changed
                and size_of(out) < LARGE
                and not (out.is_inference() or out.is_meta)
            ):
                known.add(id(out))
                environment[line.name] = out
                continue
        left.append(line)
    return left


def without_unneeded(lines: "Sequence[Line]", needed: set[str]) -> "list[Line]":
    """Without calls whose result is not used."""
    needed = set(needed)
    left: list[Line] = []
    for line in reversed(lines):
        if isinstance(line, TorchCall):
            if line.name not in needed and not line.changes():
                continue  # its result is not used, or is one of its arguments
            words: Sequence[str] = line.words
        else:
            words = [line] if isinstance(line, str) else []
        needed.update(name for text in words for name in WORDS.findall(text))
        left.append(line)
    return left[::-1]


def cheaper(call: TorchCall, word: Callable[[torch.Tensor], str]) -> TorchCall:
    """A call that gives the same bits; `word` gives the source of a constant."""
    func = _OPERATORS.get(call.func, call.func)
    call = call._replace(func=func)
    name, args = getattr(func, "__name__", ""), call.args
    first = args[0] if args else None
    usual = isinstance(first, torch.Tensor) and first.is_cpu and not call.kwargs
    if not usual:
        return call
    assert isinstance(first, torch.Tensor)
    if name in _TAKE_NUMBERS and len(args) == 2 and first.dtype in _WIDE:
        return _with_tensor(call, 1, first, word)
    if name == "masked_fill" and call.out.shape == first.shape and first.dtype in _WIDE:
        filled = _with_tensor(call, 2, first, word)
        if filled is not call:
            x, mask, value = filled.args
            of_x, of_mask, of_value = filled.words
            if not mask.stride() == first.stride() == call.out.stride():
                return call  # the result would have another layout
            return call._replace(
                func=torch.where, args=(mask, value, x), words=[of_mask, of_value, of_x]
            )
    if name == "sum_to_size" and len(args) == 2:
        return _as_sum(call)
    return call


def _with_tensor(
    call: TorchCall, place: int, like: torch.Tensor, word: Callable[[torch.Tensor], str]
) -> TorchCall:
    """The call with the number at `place` as a tensor without dimensions."""
    value = call.args[place]
    is_comparison = call.out.dtype is torch.bool
    if type(value) is int and abs(value) < 1 << 24:
        value = float(value)
    if type(value) is not float or (value == 0 and str(value) != "0.0" and not is_comparison):
        return call
    number = constant(value, like.dtype, like.device)
    args, words = [*call.args], [*call.words]
    args[place], words[place] = number, word(number)
    return call._replace(args=tuple(args), words=words)


def _as_sum(call: TorchCall) -> TorchCall:
    """x.sum_to_size(shape), which is this sum."""
    x, shape = call.args
    if not isinstance(shape, tuple) or call.out.shape == x.shape:
        return call
    leading = x.dim() - len(shape)
    dims = [*range(leading)]
    inner = [i for i in range(leading, x.dim()) if x.shape[i] != shape[i - leading]]
    if dims and inner:
        return call
    kwargs = {"keepdim": True} if inner else {}
    words = [call.words[0], str(dims + inner), *(["keepdim=True"] if inner else [])]
    return call._replace(func=torch.sum, args=(x, dims + inner), kwargs=kwargs, words=words)


class Given(float):
    """A number among a node's arguments that may differ in the next walk.

    It may be passed to torch calls. Anything else, such as arithmetic or a comparison, would be
    recorded as a constant, and raises.
    """

    place: str  # in the source


class Unbindable(Exception):
    """Something was done that the record of calls cannot show."""


def _unbindable(*args: object) -> NoReturn:
    raise Unbindable


for _name in vars(float).keys() - {"__new__", "__getattribute__", "__doc__"}:
    setattr(Given, _name, _unbindable)
