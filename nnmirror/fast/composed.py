"""Functions that record several calls, such as a loss: generated as one function.

`cross_entropy` checks its arguments and records two calls. Which ones follows from the signature of
its input, the layouts of the other tensors, and its options. So when it was called with the same
ones a few times, its calls are written as one function (see `call.py`). From then on that is tried
first; for other arguments it returns None.
"""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from .. import _state, fast, tape
from .._state import here
from .._torch import DisableTorchFunctionSubclass
from .._types import Args, TorchFunction
from ..node import Edge
from ..overrides import asked_as_a_whole
from ..tensor import LEAVES, Tensor, edge_of, is_torchs
from . import call as _call
from .leaves import signature_of_leaf
from .signature import Made, Signature, Sizes
from .signing import keep_written, one_of
from .source import is_same

C = TypeVar("C", bound=TorchFunction)
R = TypeVar("R")
T = torch.Tensor

_MOST = 4  # functions written for one signature, in turn


def generated(function: C) -> C:
    """Have the calls that `function` records generated as one function, once they repeat.

    For a function that does nothing besides, and whose calls do not depend on the numbers in
    tensors. Tensor subclasses are asked about it as a whole (see `overridable`).
    """

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        what = with_keywords[(*kwargs,)] if kwargs else call
        given = (*args, *kwargs.values()) if kwargs else args
        met = met_before(what, given)
        if met is not None:
            return met[0]
        answer = asked_as_a_whole(call, function, args, kwargs)
        if answer is not None:
            return answer[0]
        return _run_or_write(what, given, functools.partial(function, *args, **kwargs))

    with_keywords = _WithKeywords(call)
    return call  # type: ignore[return-value]


def remembered(function: C) -> C:
    """The same for a torch function: tensor subclasses are asked about each call that it
    records.

    A method of a tracked tensor looks for the generated function itself (see
    `tensor.answer_directly`).
    """

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        what = with_keywords[(*kwargs,)] if kwargs else call
        given = (*args, *kwargs.values()) if kwargs else args
        try:
            met = met_before(what, given)
        except RuntimeError:  # as of a view of what has other strides now
            met = None
        if met is not None:
            return met[0]
        return _run_or_write(what, given, functools.partial(function, *args, **kwargs), True)

    with_keywords = call.with_keywords = _WithKeywords(call)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


class _Called:
    """Stands for a function called with certain keywords in the keys of signatures.

    It has the attributes of an `Operation` that are asked for before a call is recorded.
    """

    exact = None  # no other function in exact mode
    recorders: Mapping[object, object] = {}


class _WithKeywords(dict[tuple[str, ...], object]):
    """What stands for a function by the keywords of the call; without any, the function itself."""

    def __init__(self, function: Any) -> None:
        function.exact, function.recorders = _Called.exact, _Called.recorders
        self[()] = function

    def __missing__(self, keywords: tuple[str, ...]) -> _Called:
        made = self[keywords] = _Called()
        return made


def met_before(what: object, given: Args) -> Made | None:
    """The result of a `generated` function and its node, if it was called with such arguments a few
    times before; else None."""
    sign, first, made = _first_signed(given)
    if sign is None or (kept := sign.calls.get(what)) is None or not tape.records_normally():
        return None
    return kept[0](kept[1], first, made, given)  # type: ignore[no-any-return]


def _first_signed(given: Args) -> tuple[Signature | None, object, object]:
    """The first argument that requires grad: its signature, if it has one, the argument, and the
    node that made it, if any."""
    for value in given:
        kind = type(value)
        if kind is Tensor:
            node = value._node
            if node is None:
                break
            sign = node.signature
            if sign is not None and not sign.is_single:
                sign = sign.output(value._output_nr)
            return sign, value, node
        if kind in LEAVES and value._requires_grad:
            return value._signature or signature_of_leaf(value), value, None
    return None, None, None


def _run_or_write(
    what: object, given: Args, function: Callable[[], R], all_used: bool = False
) -> R:
    """`function()`, which records, and is written if it was called in this way a few times.

    Only if each tensor without dimensions among `given` is an operand of what it records, as
    otherwise its number is; with `all_used`, if each tensor is one: its shape may be.
    """
    sign = _first_signed(given)[0]
    if sign is None or not tape.records_normally():
        return function()
    stored_with = sign.of_family() or sign
    kept = stored_with.calls.get(what)
    if kept is None:
        kept = _nothing, None, True, itertools.count(1), _MOST, None
        keep_written(stored_with, what, kept)
    written, signs, _, misses, left, before = kept
    if next(misses) < fast.after or not left:
        return function()
    with listing_calls() as recorded:
        out = function()
    operands = {id(a) for _, operands, *_ in recorded for a in operands}
    others = [a for a in given if isinstance(a, torch.Tensor) and id(a) not in operands]
    if any(all_used or not a.dim() for a in others):
        recorded.clear()
    text, of_calls = _written(recorded, given, out, sign.sizes)
    found: tuple[_call.GeneratedCall, object] = written, signs
    sample = None
    if text is not None:
        # What takes any sizes has to be the same for two.
        if sign.sizes:
            sample = sign.sizes, text.source(), text.environment
        is_other = before is not None and sample is not None and before[0] != sample[0]
        if sample is None or (is_other and is_same(before[1:], sample[1:])):
            found = text.made(), of_calls
            if written is not _nothing:  # the others are for other arguments
                known = signs if written is one_of else ((written, signs),)
                found = one_of, (found, *known)
    keep_written(stored_with, what, (*found, True, itertools.count(1), left - 1, sample))
    return out


@contextlib.contextmanager
def listing_calls() -> Iterator[list[_state.RecordedCall]]:
    """List the calls that this thread records."""
    with _state.counting:
        _state.plain += 1  # so that `record` looks
    here.calls = []
    try:
        yield here.calls
    finally:
        here.calls = None
        with _state.counting:
            _state.plain -= 1


def warn(message: str, stacklevel: int) -> None:
    """`warnings.warn` in a `generated` function, which then is not generated: the next call like it
    has to warn too."""
    if here.calls is not None:
        here.calls.append((None, (), None, None))
    warnings.warn(message, stacklevel=stacklevel + 1)


def _nothing(found: object, first: object, made: object, args: Args) -> None:
    """In place of a generated function."""


def _written(
    recorded: list[_state.RecordedCall], given: Args, out: object, sizes: Sizes
) -> tuple[_call.CallSource | None, object]:
    """A function that makes the recorded calls, as text, and their signatures; their families, if
    there are `sizes`."""
    nothing = None, None
    if not recorded or type(out) not in (Tensor, tuple) or recorded[-1][2] is not out:
        return nothing
    calls: list[_call.CallToWrite] = []
    for function, args, result, node in recorded:
        sign: Signature | None = None if node is None else node.signature
        if node is None or function is None or function.is_inplace:
            return nothing
        is_computed = function.result is not None and not any(node.edges) and type(result) is T
        if not is_computed and (sign is None or not (sign.makes_new or sign.makes_several)):
            return nothing
        if sign is not None and node.label != sign.label:  # set after the call was recorded
            return nothing
        of_call = () if sign is None else sign.sizes
        if sizes and sign is not None:
            if not {*of_call} <= {*sizes}:
                return nothing
            sign = sign.of_family()
        calls.append(_call.CallToWrite(function, sign, args, node.edges, result, node, of_call))
    edges: list[Edge | None] = []
    with DisableTorchFunctionSubclass():
        for value in given:
            is_tensor = isinstance(value, torch.Tensor) and value.requires_grad
            edges.append(edge_of(value) if is_tensor else None)
        if any(e is not None and is_torchs(e[0]) for e in edges):
            return nothing
        text = _call.text_of(calls, given, edges, sizes=sizes)
    signs = tuple([c.found for c in calls])
    return text, signs if len(signs) > 1 else signs[0]
