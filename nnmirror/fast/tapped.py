"""The bound walk of a graph with taps, through which `nnmirror.watch` reads gradients.

With a hook in the graph, the generic walk runs. A tap on a node is also called in a bound walk,
with the gradient of the node's result, and with the gradient that its backward returns. It must not
change them. Such a walk is bound like any other (see binding.py), and stored beside that of the
same graph without taps. If it cannot run, the generic walk does, and each tap becomes a hook first.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch

from .. import _state, fast
from .. import gradients as _gradients
from .. import tensor as _tensor
from .. import walk as _walk
from .._torch import DisableTorchFunctionSubclass
from .._upcalls import implements
from ..accumulate import accumulate
from ..node import Node
from ..walk import unrecorded
from . import bound as _bound
from . import writer as _writer
from .binding import hand_over, is_observed, start_of_loss
from .shorter import Unbindable
from .signature import Signature
from .trial import is_right, quietly


class Tap(Protocol):
    """Put on a node with one result."""

    def arrived(self, grad: torch.Tensor) -> None:
        """Called with the complete gradient of the result."""

    def passed(self, grad: torch.Tensor) -> None:
        """Called with the gradient of the input, if there is only one."""

    def hook(self, node: Node) -> None:
        """Replace the tap by hooks that do the same, before the other hooks of `node`."""


# Called with a leaf and its gradient, for each leaf of a walk with taps.
listeners: list[Callable[[torch.Tensor, torch.Tensor], None]] = []


class _Trying(threading.local):
    is_on: bool = False  # in this thread, a walk is only run for comparison


_trying = _Trying()


def arrived(taps: Sequence[Tap], grad: torch.Tensor) -> None:
    if not _trying.is_on:
        for tap in taps:
            tap.arrived(grad)


def passed(taps: Sequence[Tap], grad: torch.Tensor) -> None:
    if not _trying.is_on:
        for tap in taps:
            tap.passed(grad)


class Writer(_writer.Writer):
    """Writes the walk with a call at each tap."""

    takes_taps = True

    def begin(self) -> None:
        if not any(node.taps for node in self.whole):
            raise Unbindable
        super().begin()

    def reached(self, node: Node, given: Sequence[torch.Tensor | None]) -> None:
        if node.taps:
            self.tell(arrived, node, given[0])

    def left(self, node: Node, results: Sequence[torch.Tensor | None]) -> None:
        if node.taps and len(node.inputs) == 1 and results[node.inputs[0]] is not None:
            self.tell(passed, node, results[node.inputs[0]])

    def tell(self, what: Callable[..., None], node: Node, grad: torch.Tensor | None) -> None:
        self.environment[what.__name__] = what
        name = self.known[id(grad)]
        self.used.add(name.partition("[")[0])
        self.lines.append(f"{what.__name__}({self.names[id(node)]}.taps, {name})")


@implements(_gradients)
@unrecorded
def walk_tapped(loss: torch.Tensor, retain_graph: bool) -> bool:
    """Run the backward from a loss by a bound walk with taps; False if there is none."""
    node = loss._node if isinstance(loss, _tensor.Tensor) and loss._view_of is None else None
    sign = None if node is None else node.signature
    if node is None or sign is None or len(node.outputs) > 1 or sign.walks.tapped == _state.taps:
        return False
    if is_observed():
        return False
    with DisableTorchFunctionSubclass():
        bound = _bound_for(node, sign)
        if bound is None:
            return False
        found = bound.run(node, bound.start, retain_graph, _told)
        if found is None:  # with other taps, perhaps: these may come again
            sign.walks.tap_walks += 1
            if sign.walks.tap_walks >= fast.after:
                sign.walks.tapped, sign.walks.tap_walks = None, 0
            return False
        for leaf, grad, _ in found:
            _tell(leaf, grad)
        hand_over(bound, node, found, retain_graph)
    return True


def _bound_for(node: Node, sign: Signature) -> _bound.BoundWalk | None:
    """The bound walk from a loss, compared with the generic one; None if there is none yet."""
    bound = sign.walks.tapped
    if not isinstance(bound, _bound.BoundWalk):
        sign.walks.tap_walks += 1
        if sign.walks.tap_walks < fast.after:
            return None
        sign.walks.tap_walks = 0
        try:
            with quietly():
                bound = sign.walks.tapped = _bind(node) or _state.taps  # none with these taps
        except (_writer.ChangedSince, RuntimeError):  # an error comes when its node's turn does
            return None
        if not isinstance(bound, _bound.BoundWalk):
            return None
    if not bound.trusted:
        with _only_trying():
            distrust = partial(setattr, sign.walks, "tapped", _state.taps)
            if not is_right(bound, node, bound.start, distrust):
                return None

    return bound


def _told(leaf: torch.Tensor, grad: torch.Tensor, own: bool | str) -> None:
    _tell(leaf, grad)
    accumulate(leaf, grad, own)


def _tell(leaf: torch.Tensor, grad: torch.Tensor) -> None:
    for listen in listeners:
        listen(leaf, grad)


def _bind(node: Node) -> _bound.BoundWalk | None:
    start = start_of_loss(node)
    return None if start is None else _bound.bind(node, start, kind=Writer)


@contextlib.contextmanager
def _only_trying() -> Iterator[None]:
    _trying.is_on = True
    try:
        yield
    finally:
        _trying.is_on = False


@implements(_walk)
def untap(nodes: Iterable[Node]) -> None:
    """Replace the taps on `nodes` by hooks."""
    if _trying.is_on:
        return
    for node in nodes:
        taps = node.taps
        if taps:
            node.taps = ()
            for tap in reversed(taps):
                tap.hook(node)
