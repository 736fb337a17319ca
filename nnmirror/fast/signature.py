"""Signatures: how a tracked tensor came about, interned.

The signature of a recorded call says all that its backward may depend on, but for the numbers
in the tensors: the function, the signatures of its inputs, its other arguments, and the layout
of plain tensors. So two graphs whose last nodes have one signature go back by the same
operations, if they also share their nodes in the same way (`bound.py` looks).

A signature holds no tensor. Each is kept by the signature of its first tracked input, up to
that of a leaf, which is kept by the leaf: with a model go the signatures that it made.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

_serials = itertools.count()
_MOST = 64  # that one signature keeps of those that follow it
_MOST_OF_ONE = 16  # of them by one function, before its calls are taken to differ each time


NO_CALLS: dict[Any, Any] = {}


class Signature:
    """Of a recorded call, or of a leaf."""

    __slots__ = (
        "__weakref__",
        "bound",
        "calls",
        "checks_shape",
        "is_plain",
        "label",
        "makes_new",
        "needs",
        "next",
        "origin",
        "outputs",
        "parts",
        "places",
        "plan",
        "replays",
        "seen",
        "serial",
        "siblings",
        "varying",
        "visits",
        "walks",
        "written",
    )

    # Of a call, what each node of it has alike:
    label: str
    plan: Any
    places: Sequence[int]
    needs: tuple[bool, ...]
    outputs: Sequence[Any]
    makes_new: bool  # its result is new, or a view

    def __init__(self) -> None:
        # What stands for this one in the keys of others: they would make cycles.
        self.serial = next(_serials)
        # Of the calls on what this signature stands for, by function and other arguments.
        self.next: dict[Any, Signature] = {}
        self.siblings: dict[int, Signature] | None = None  # of its further outputs
        # Functions that are called otherwise each time: their numbers no longer count (True), or
        # that was not all that differs, and their calls are no longer signed (False).
        self.varying: dict[Any, bool] = {}
        # Of these the latest of each function, as it is tried first: written out (see call.py), and
        # its signature.
        self.calls: dict[Any, Any] = NO_CALLS
        self.written: Any = None  # this call, written out; False if it cannot be
        self.walks = 0  # how often a walk began here
        self.visits = 0  # how often the generic walk came here
        # Parts of a walk from here, by the strides of the gradient; False if there can be none.
        self.parts: Any = None
        # Of a call: what its nodes have alike once they are as PyTorch's (see `Node.as_seen`).
        self.seen: Signature | None = None
        self.replays: Any = None  # recorded walks from here (see replay.py), by the gradient
        self.bound: Any = None  # the walk from here (see bound.py); False if there can be none
        self.is_plain = True  # it has one output, which is no view
        self.origin: Any = None  # the first such call: its sequence, and where it was made
        self.checks_shape = False  # the shape of the result depends on the data

    def output(self, index: int) -> "Signature":
        """The signature of output `index` of a call with several."""
        if index == 0:
            return self
        if self.siblings is None:
            self.siblings = {}
        if index not in self.siblings:
            self.siblings[index] = Signature()
        return self.siblings[index]

    def follow(self, function: Any, key: Any, made: "Signature") -> None:
        """Keep `made` as what comes of the call `key` of `function`.

        A function may be called otherwise each time. If that is by a number that follows a
        schedule, the number is taken for an operand, which may differ (see `numbers_apart`). If
        it is by a slice that grows, it makes no graph twice: its calls are not signed any more.
        """
        of_one = [k for k in self.next if k is function or (type(k) is tuple and k[0] is function)]
        if len(of_one) >= _MOST_OF_ONE:
            self.varying[function] = function not in self.varying
            self.calls.pop(function, None)
            for k in of_one:
                del self.next[k]
            return
        if len(self.next) >= _MOST:
            self.next.clear()
        self.next[key] = made


_CONSTANTS = (str, torch.dtype, torch.device, torch.memory_format, torch.layout)


class Unsigned(Exception):
    """An argument that no signature can stand for."""


def of_tensor(tensor: torch.Tensor) -> Any:
    """What stands for a tensor that carries no gradient: its layout."""
    try:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    except RuntimeError:  # a sparse one
        raise Unsigned from None


def numbers_apart(key: Sequence[Any]) -> list[Any] | None:
    """A key of a call whose numbers are operands, from that of a call; None if it has no number."""
    apart = [_NUMBER if type(part) is tuple and part[0] is float else part for part in key]
    return apart if _NUMBER in apart else None


_NUMBER = float, "any"


def of_value(value: Any) -> Any:
    """What stands for an argument that is no tensor."""
    kind = type(value)
    if kind is float:
        # Zeros differ by their sign; a NaN is never found again.
        return (kind, value) if value else (kind, repr(value))
    if value is None or kind is str or kind in _CONSTANTS:
        return value
    if kind is int or kind is bool:
        return kind, value
    if kind is torch.Size:
        return value
    if kind is tuple or kind is list:
        return kind, tuple([of_value(v) for v in value])
    if kind is slice:
        return kind, of_value(value.start), of_value(value.stop), of_value(value.step)
    if value is Ellipsis:
        return value
    raise Unsigned
