"""What `nnmirror.explain` returns: the backward of a graph by operations, and its source.

The operations are in the order of the backward, the loss first. Each knows the origin of its
inputs, so that the graph can be drawn from them; and the lines of the source that are its backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .._types import StrPath
from ..fast.source import Compiled


@dataclass(frozen=True)
class Place:
    """Where a call was made."""

    filename: str
    line: int
    text: str  # the source line, stripped; "" if it is not available
    function: str  # the function that it is in

    def __str__(self) -> str:
        return f"{self.filename.rpartition('/')[2]}:{self.line}"


@dataclass(frozen=True)
class Result:
    """One result of an operation.

    `value` is None if it has not been kept and cannot be computed again from what has been.
    `gradient` is its gradient; None if the loss does not depend on it.
    """

    name: str  # in the source, such as "fc1"; that of its gradient is "d_fc1"
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: torch.Tensor | None
    gradient: torch.Tensor | None


@dataclass(frozen=True)
class Input:
    """One argument of an operation that is a tensor.

    It is result `output` of operation `operation`, or the leaf `leaf`; if both are None, it gets no
    gradient. `gradient` is the contribution of this operation, before those of other uses are
    added.
    """

    name: str  # of the argument, as the rule has it: "input", "weight"
    operation: int | None
    output: int
    leaf: str | None  # a key of `Explanation.leaves`
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    value: torch.Tensor | None
    gradient: torch.Tensor | None


@dataclass(frozen=True)
class Leaf:
    """A tensor that gets a gradient and is not the result of an operation: a parameter or an
    input."""

    name: str  # as in `named_parameters`: "fc1.weight"
    identifier: str  # in the source: "fc1_weight"
    is_parameter: bool
    value: torch.Tensor
    gradient: torch.Tensor | None


@dataclass(frozen=True)
class Operation:
    """One operation of the graph: what was called, and its backward."""

    index: int  # in `Explanation.operations`
    node: str  # as PyTorch names it: "TanhBackward0"
    # The module that called it, as in `named_modules`: "fc2", "net.2"; "" for a call in the
    # outermost module, or outside of any.
    module: str
    module_class: str  # "Linear"; "" if no module is known
    computes: str  # its formula, as its rule documents it: "y = tanh(x)"
    formula: str  # those of the gradients: "dx = g (1 - y^2)"
    results: tuple[Result, ...]
    inputs: tuple[Input, ...]
    saved: dict[str, torch.Tensor] = field(default_factory=dict)  # with the rule's names
    arguments: dict[str, object] = field(default_factory=dict)  # others than tensors: "dim"
    place: Place | None = None  # where it was called; None if that is not known for certain
    source: str = ""  # its lines of the source
    line: int = 0  # the first of them, counted from 1

    @property
    def gradient(self) -> torch.Tensor | None:
        """The gradient of its (first) result."""
        return self.results[0].gradient


class Explanation:
    """The backward of one graph.

    `operations` are in the order of the backward, `leaves` by name. `source` is the Python function
    that computes the gradients, which `print` shows. The values are copies, so that later training
    steps do not change them.
    """

    def __init__(
        self,
        operations: list[Operation],
        leaves: dict[str, Leaf],
        source: str,
        values: dict[str, torch.Tensor],
        compiled: Compiled,
    ) -> None:
        self.operations = operations
        self.leaves = leaves
        self.source = source
        self.values = values  # the arguments of the function, by name
        self._compiled = compiled

    @property
    def backward(self) -> Callable[..., dict[str, torch.Tensor]]:
        """The function. `e.backward(**e.values)` gives the gradients; a debugger steps into it."""
        return self._compiled.function  # type: ignore[no-any-return]

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of the leaves, by their names."""
        return {n: leaf.gradient for n, leaf in self.leaves.items() if leaf.gradient is not None}

    def save(self, path: StrPath) -> None:
        """Write a Python file that needs torch alone.

        It has the function and its arguments (`values()`). Run as a script, it prints the
        gradients, which have the same bits.
        """
        from . import standalone

        standalone.save(self.source, self.values, path)

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"<Explanation: {len(self.operations)} operations, {len(self.leaves)} leaves>"

    def html(self, path: StrPath) -> None:
        """Write an HTML page: the net from its input to the loss and back.

        The arrow keys step through it. Each operation has its formulas, shapes, norms and saved
        tensors; a click shows the values of small ones. It is one file, which loads no other.
        """
        from .page import page

        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(page(self))

    def _repr_html_(self) -> str:
        from .page import in_a_notebook

        return in_a_notebook(self)
