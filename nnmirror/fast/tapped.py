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
from .binding import bind_loss, hand_over, is_observed
from .keyed import first_that_fits
from .shorter import Unbindable
from .signature import TAPPED
from .trial import is_right


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


class TappedWriter(_writer.Writer):
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
    if node is None or sign is None or len(node.outputs) > 1 or is_observed():
        return False
    walks = sign.walks.from_given

    def run(bound: _bound.BoundWalk) -> Sequence[_bound.Found] | None:
        if not bound.trusted:
            distrust = partial(walks.__setitem__, TAPPED, False)
            with _only_trying():
                if not is_right(bound, node, bound.start, distrust):
                    return None
        found: Sequence[_bound.Found] | None = bound.run(node, bound.start, retain_graph, _told)
        if found is not None:
            for leaf, grad, _ in found:
                _tell(leaf, grad)
            hand_over(bound, node, found, retain_graph)
        return found

    with DisableTorchFunctionSubclass():
        return first_that_fits(walks, TAPPED, node, _bind, run) is not None


def _bind(node: Node) -> _bound.BoundWalk:
    try:
        return bind_loss(node, TappedWriter)
    except Unbindable:
        raise _writer.ChangedSince from None  # with other taps, perhaps


def _told(leaf: torch.Tensor, grad: torch.Tensor, own: bool | str) -> None:
    _tell(leaf, grad)
    accumulate(leaf, grad, own)


def _tell(leaf: torch.Tensor, grad: torch.Tensor) -> None:
    for listen in listeners:
        listen(leaf, grad)


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
