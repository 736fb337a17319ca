"""An explanation as a page: one file, with the net from its input to the loss and back.

The rows of the net are plain HTML, written here, so that they appear without JavaScript and in
print. What a click shows is stored as data in the page, and displayed by the script in `page.html`.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

import torch

from .._torch import DisableTorchFunction

if TYPE_CHECKING:
    from .explanation import Explanation, Input, Leaf, Operation

_SMALL = 400  # numbers of a tensor that are shown one by one
_MOST = 60_000  # of all tensors together, so that the page of a large net stays a small file
# Arguments that do not count as inputs of the net, although they get no gradient.
_OF_A_LAYER = ("weight", "bias", "running_mean", "running_var")
_LANE = 12  # pixels between neighbouring lines of the graph


def page(explanation: Explanation) -> str:
    """The text of the page."""
    with DisableTorchFunction(), torch.no_grad():
        return _Page(explanation).text()


def in_a_notebook(explanation: Explanation) -> str:
    """The page within a cell's output."""
    text = html.escape(page(explanation))
    return (
        f'<iframe srcdoc="{text}" title="the backward, step by step" loading="lazy"'
        ' style="width: 100%; height: 680px; border: 1px solid #8884; border-radius: 6px">'
        "</iframe>"
    )


@dataclass
class _Row:
    """A row of the net: an operation, or an input tensor."""

    label: str
    operation: Operation | None = None
    given: Input | None = None  # inputs that get no gradient
    leaf: Leaf | None = None  # inputs that get one
    sources: list[int] = field(default_factory=list)  # the rows of its inputs

    @property
    def value(self) -> torch.Tensor | None:
        """Of an input tensor."""
        if self.leaf is not None:
            return self.leaf.value
        return None if self.given is None else self.given.value

    @property
    def gradient(self) -> torch.Tensor | None:
        if self.operation is not None:
            return self.operation.gradient
        return None if self.leaf is None else self.leaf.gradient


class _Page:
    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation
        self.numbers = 0  # so far
        self.tensors: list[dict[str, object]] = []
        self.places: dict[Hashable, int] = {}  # the index of a tensor, by its memory
        self.kept: list[torch.Tensor] = []  # so that the memory is not reused
        self.values = self._values()
        self.row_of: dict[int, int] = {}  # by the index of an operation
        self.given: set[Hashable] = set()  # the memory of tensors that have a row but no gradient
        self.rows = self._rows()

    def _values(self) -> dict[tuple[int, int], torch.Tensor]:
        """The results that still exist because some operation has saved them."""
        found: dict[tuple[int, int], torch.Tensor] = {}
        for operation in self.explanation.operations:
            for k, result in enumerate(operation.results):
                if result.value is not None:
                    found[operation.index, k] = result.value
            saved = operation.saved.get("result")
            if saved is not None and len(operation.results) == 1:
                found.setdefault((operation.index, 0), saved)
            for given in operation.inputs:
                if given.operation is not None and given.value is not None:
                    found.setdefault((given.operation, given.output), given.value)
        return found

    def _rows(self) -> list[_Row]:
        """The rows in the order of the forward; an input other than a parameter is before its first
        use."""
        names = {_place(t): name for name, t in self.explanation.values.items()}
        rows: list[_Row] = []
        of_tensor: dict[Hashable, int] = {}
        for operation in reversed(self.explanation.operations):
            sources = set()
            for given in operation.inputs:
                if given.operation is not None:
                    sources.add(self.row_of[given.operation])
                    continue
                leaf = self.explanation.leaves.get(given.leaf or "")
                if leaf is None:
                    key = _place(given.value)
                    is_first = not self.row_of and given.name not in _OF_A_LAYER
                    comes_in = key is not None and (is_first or key in of_tensor)
                else:
                    key, comes_in = given.leaf, not leaf.is_parameter
                if not comes_in:
                    continue
                if key not in of_tensor:
                    of_tensor[key] = len(rows)
                    label = names.get(key, given.name) if leaf is None else leaf.name
                    rows.append(_Row(label, None, None if leaf else given, leaf))
                sources.add(of_tensor[key])
            self.row_of[operation.index] = len(rows)
            rows.append(_Row(_label(operation), operation, sources=sorted(sources)))
        self.given = {_place(row.value) for row in rows if row.given is not None}
        return rows

    # -- tensors -------------------------------------------------------------------------

    def tensor(self, t: torch.Tensor | None) -> int | None:
        """The number of a tensor in the page's data."""
        if t is None:
            return None
        key = (_place(t), t.dtype)
        if key not in self.places:
            self.places[key] = len(self.tensors)
            self.kept.append(t)
            self.tensors.append(self._described(t))
        return self.places[key]

    def _described(self, t: torch.Tensor) -> dict[str, object]:
        made: dict[str, object] = {"shape": _shape(t.shape), "dtype": str(t.dtype)[6:]}
        wide = t.double() if not t.is_complex() else t.abs().double()
        if t.numel():
            made |= {
                "norm": number(norm(t)),
                "min": number(wide.min().item()),
                "max": number(wide.max().item()),
                "zeros": int((wide == 0).sum()),
                "count": t.numel(),
            }
        if 0 < t.numel() <= _SMALL and self.numbers + t.numel() <= _MOST and not t.is_complex():
            self.numbers += t.numel()
            columns = t.shape[-1] if t.dim() else 1
            made["rows"] = [[_json(v) for v in row] for row in t.reshape(-1, columns).tolist()]
        return made

    def _norm(self, t: torch.Tensor | None) -> str:
        """Its norm, as shown in a row."""
        if t is None or not t.numel():
            return ""
        return number(norm(t))

    # -- the page ------------------------------------------------------------------------

    def text(self) -> str:
        operations = self.explanation.operations
        name = operations[0].results[0].name if operations else "a tensor without operations"
        parts = {
            "TITLE": html.escape(name),
            "SUMMARY": self._summary(),
            "ROWS": "\n".join(self._rows_written()),
            "CODE": self._code(),
            "DATA": self._data(),
        }
        template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        pieces = template.split("<!--:")  # each begins with `NAME-->`
        return pieces[0] + "".join(
            parts[name] + rest for name, rest in (piece.split("-->", 1) for piece in pieces[1:])
        )

    def _summary(self) -> str:
        operations, leaves = self.explanation.operations, self.explanation.leaves.values()
        said = []
        value = self.values.get((0, 0))
        if value is not None and value.numel() == 1:
            said.append(f"value <b>{number(float(value.item()))}</b>")
        said.append(_many(len(operations), "operation"))
        parameters = [leaf for leaf in leaves if leaf.is_parameter]
        count = sum(leaf.value.numel() for leaf in parameters)
        said.append(f"{_many(len(parameters), 'parameter')} of {_many(count, 'number')}")
        return " &middot; ".join(said)

    def _code(self) -> str:
        source = self.explanation.source
        if not source:
            return ""
        lines = "".join(
            f'<span id="line{i}">{html.escape(line)}\n</span>'
            for i, line in enumerate(source.splitlines(), 1)
        )
        return (
            '<section id="code" aria-label="the backward as a Python function">'
            f'<h2>The backward as a Python function</h2><pre tabindex="0">{lines}</pre></section>'
        )

    def _rows_written(self) -> Iterator[str]:
        lanes, width = _lanes(self.rows)
        norms = [self._gradient_norm(row) for row in self.rows]
        proper = [math.log10(n) for n in norms if n is not None and 0 < n < math.inf]
        low, high = (min(proper), max(proper)) if proper else (0.0, 0.0)
        yield (
            f'<li class="row heads"><span class="lanes" style="width: {width}px"></span>'
            '<span class="f-ink">forward &darr;</span>'
            '<span class="b-ink">backward &uarr;</span></li>'
        )
        for i, (row, lane, size) in enumerate(zip(self.rows, lanes, norms, strict=True)):
            share = None
            if size is not None:
                # On a logarithmic scale, an empty bar for the smallest norm would look like zero.
                share = 0.0 if size == 0 else 1.0
                if 0 < size < math.inf and high > low:
                    share = 0.08 + 0.92 * (math.log10(size) - low) / (high - low)
            lines = f'<div class="lanes" style="width: {width}px" aria-hidden="true">{lane}</div>'
            forward, backward = self._forward(i, row), self._backward(i, row, share)
            yield f'<li class="row" id="row{i}">{lines}{forward}{backward}</li>'

    def _gradient_norm(self, row: _Row) -> float | None:
        return norm(row.gradient) if row.gradient is not None and row.gradient.numel() else None

    def _forward(self, i: int, row: _Row) -> str:
        operation = row.operation
        if operation is None:
            shape = "" if row.value is None else _shape(row.value.shape)
            said = _line(row.label, "input", shape, "|x|", self._norm(row.value))
        else:
            module = "" if row.label.startswith(operation.module) else operation.module
            place = str(operation.place) if operation.place else ""
            kind = " ".join(filter(None, (module, operation.module_class, place)))
            shapes = [_shape(result.shape) for result in operation.results]
            shape = ", ".join(shapes[:3]) + (" ..." if shapes[3:] else "")
            size = self._norm(self.values.get((operation.index, 0)))
            chips = [
                _chip(_named(given), given.leaf or "", _shape(given.shape or ()), "")
                for given in operation.inputs
                if self._is_beside(given)
            ]
            said = _line(row.label, kind, shape, "|y|", size, operation.computes, chips)
        return f'<button class="cell f" data-row="{i}" data-phase="f">{said}</button>'

    def _is_beside(self, given: Input) -> bool:
        """Is it shown in the row of its operation instead of a row of its own?"""
        if given.operation is not None or given.value is None:
            return False
        leaf = self.explanation.leaves.get(given.leaf or "")
        if leaf is not None:
            return leaf.is_parameter
        return _place(given.value) not in self.given

    def _backward(self, i: int, row: _Row, share: float | None) -> str:
        if share is None:
            said = "no gradient is asked for" if row.operation is None else "no gradient comes here"
            return f'<span class="cell b none">{said}</span>'
        chips = []
        formula = ""
        if row.operation is not None:
            formula = row.operation.formula
            chips = [
                _chip(f"d {_named(given)}", given.leaf or "", "", self._norm(given.gradient))
                for given in row.operation.inputs
                if given.gradient is not None
            ]
        bar = f'<span class="bar"><i style="width: {100 * share:.0f}%"></i></span>'
        of = "|dy|" if row.operation else "|dx|"
        said = _line("", "", "", of, self._norm(row.gradient), formula, chips, bar)
        return f'<button class="cell b" data-row="{i}" data-phase="b">{said}</button>'

    # -- what a click shows --------------------------------------------------------------

    def _data(self) -> str:
        rows = [self._row(row) for row in self.rows]
        leaves = [
            {
                "name": leaf.name,
                "parameter": leaf.is_parameter,
                "value": self.tensor(leaf.value),
                "gradient": self.tensor(leaf.gradient),
            }
            for leaf in self.explanation.leaves.values()
        ]
        data = {"rows": rows, "leaves": leaves, "tensors": self.tensors}
        # Inside a script, `</script>` and `<!--` would end it.
        return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")

    def _row(self, row: _Row) -> dict[str, object]:
        operation = row.operation
        if operation is None:
            value, gradient = self.tensor(row.value), self.tensor(row.gradient)
            return {"label": row.label, "value": value, "gradient": gradient, "sources": []}
        made: dict[str, object] = {
            "label": row.label,
            "node": operation.node,
            "module": operation.module,
            "class": operation.module_class,
            "computes": operation.computes,
            "formula": operation.formula,
            "source": operation.source,
            "line": operation.line,
            "sources": row.sources,
            "inputs": [
                {
                    "name": given.name,
                    "row": None if given.operation is None else self.row_of[given.operation],
                    "output": given.output,
                    "leaf": given.leaf,
                    "shape": "" if given.shape is None else _shape(given.shape),
                    "value": self.tensor(self._value_of(given)),
                    "gradient": self.tensor(given.gradient),
                }
                for given in operation.inputs
            ],
            "results": [
                {
                    "name": result.name,
                    "shape": _shape(result.shape),
                    "value": self.tensor(self.values.get((operation.index, k))),
                    "gradient": self.tensor(result.gradient),
                }
                for k, result in enumerate(operation.results)
            ],
            "saved": [{"name": n, "value": self.tensor(t)} for n, t in operation.saved.items()],
            "arguments": [
                {"name": name, "value": repr(_plain(value))}
                for name, value in operation.arguments.items()
                if _is_plain(value)
            ],
        }
        if operation.place is not None:
            place = operation.place
            made["place"] = {"at": str(place), "text": place.text, "in": place.function}
        return made

    def _value_of(self, given: Input) -> torch.Tensor | None:
        if given.operation is None:
            return given.value
        return self.values.get((given.operation, given.output))


def _label(operation: Operation) -> str:
    """Its name in the source, or that of its module if the name is derived from it."""
    if not operation.results:
        return operation.node
    name = operation.results[0].name
    if len(operation.results) > 1:
        name = name.removesuffix("_0")
    named = re.fullmatch(rf"_?{re.sub(r'[^0-9A-Za-z_]', '_', operation.module)}(?:_(\d+))?", name)
    if not (operation.module and named):
        return name
    return operation.module + (f" #{named[1]}" if named[1] else "")


# -- rows ----------------------------------------------------------------------------------


def _line(
    label: str,
    kind: str,
    shape: str,
    of: str,
    size: str,
    formula: str = "",
    chips: Sequence[str] = (),
    bar: str = "",
) -> str:
    """A cell: a title line, then the formula, then chips."""
    said = "".join(
        f'<{tag} class="{name}">{html.escape(text)}</{tag}>'
        for tag, name, text in (
            ("b", "label", label),
            ("span", "kind", kind),
            ("span", "shape", shape),
        )
        if text
    )
    if size:
        said += f'<span class="norm">{of} {size}</span>'
    made = f'<span class="line">{said}{bar}</span>'
    if formula:
        made += f'<code class="formula">{html.escape(formula)}</code>'
    if chips:
        made += f'<span class="chips">{"".join(chips)}</span>'
    return made


def _named(given: Input) -> str:
    """By the rule's name, unless it is a leaf with another name: `weight`, but `gate`."""
    leaf = given.leaf or given.name
    return given.name if leaf.rpartition(".")[2] == given.name else leaf


def _chip(name: str, leaf: str, shape: str, size: str) -> str:
    title = f' title="{html.escape(leaf)}"' if leaf and leaf != name else ""
    rest = " ".join(filter(None, (shape, size)))
    return f'<span class="chip"{title}>{html.escape(name)} <i>{html.escape(rest)}</i></span>'


def _lanes(rows: Sequence[_Row]) -> tuple[list[str], int]:
    """The lines between the rows: the piece of each row, and their total width.

    The rightmost lane connects a row with the next. A result that is used further down has a lane
    of its own, up to the last row that uses it.
    """
    takers: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        for source in row.sources:
            takers.setdefault(source, []).append(i)
    free: list[int] = []  # for each lane but the rightmost: from which row on it is free
    lane_of: dict[int, int] = {}  # of a row that has one
    for i in range(len(rows)):
        if (last := max(takers.get(i, [0]))) > i + 1:
            lane = next((k for k, row in enumerate(free) if row <= i), len(free))
            free[lane:] = [last, *free[lane + 1 :]]
            lane_of[i] = lane + 1
    step = min(_LANE, 150 // max(1, len(free)))
    right = step * len(free) + 12
    pieces = [[f'<i class="dot" style="left: {right}px"></i>'] for _ in rows]

    def vertical(at: int, lane: int, source: int, top: str, bottom: str) -> None:
        style = f"left: {right - step * lane}px; top: {top}; bottom: {bottom}"
        kind = "v" if lane else "v straight"
        pieces[at].append(f'<i class="{kind}" data-from="{source}" style="{style}"></i>')

    def across(at: int, lane: int, source: int, top: int) -> None:
        style = f"left: {right - step * lane}px; top: {top}px; width: {step * lane}px"
        pieces[at].append(f'<i class="h" data-from="{source}" style="{style}"></i>')

    for i, used in takers.items():
        if i + 1 in used:
            vertical(i, 0, i, "20px", "0")
            vertical(i + 1, 0, i, "0", "calc(100% - 20px)")
        if i not in lane_of:
            continue
        lane, last = lane_of[i], max(used)
        across(i, lane, i, 25)
        vertical(i, lane, i, "25px", "0")
        for at in range(i + 1, last):
            vertical(at, lane, i, "0", "0")
        vertical(last, lane, i, "0", "calc(100% - 15px)")
        for at in used:
            if at > i + 1:
                across(at, lane, i, 15)
    return ["".join(piece) for piece in pieces], right + 12


# -- numbers -------------------------------------------------------------------------------


def norm(t: torch.Tensor) -> float:
    """The square root of the sum of squares."""
    exact = torch.float64 if t.dtype in (torch.float32, torch.float64) else None
    wide = t if t.dtype.is_floating_point or t.is_complex() else t.double()
    if t.dtype in (torch.float16, torch.bfloat16):
        exact = torch.float32
    return torch.linalg.vector_norm(wide, dtype=exact).item()


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def _json(value: float) -> float | str:
    """A number as JSON has it, six digits; in words where JSON has none."""
    if isinstance(value, bool | int):
        return int(value)
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _shape(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def _place(t: torch.Tensor | None) -> Hashable:
    """The memory of a tensor: two tensors with the same key have the same numbers."""
    if t is None:
        return None
    return t.data_ptr(), tuple(t.shape), t.stride()


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _plain(value: object) -> object:
    """A `torch.Size` is written as the tuple that it is."""
    return tuple(value) if isinstance(value, tuple) else value
