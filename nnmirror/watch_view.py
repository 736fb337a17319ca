"""The records of a watch as a text, a picture and HTML."""

from __future__ import annotations

import html as _html
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .watch import Backward, Record

Steps: TypeAlias = "Sequence[Sequence[Record]]"

_WIDTH = 100  # of the table
_NARROWEST = 24  # of its last column


def title(record: Record) -> str:
    """The name of a record: `0.weight_net #2`, `block: add()`."""
    name = record.layer or record.module
    name = name if len(name) <= 24 else f"...{name[-21:]}"
    if record.operation is not None:
        name = f"{name}: {record.operation}()" if record.layer else f"{record.operation}()"
    called = f" #{record.call + 1}" if record.call else ""
    return name + called + ("" if record.output is None else f"[{record.output}]")


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


# -- the table -----------------------------------------------------------------------------

_LAYERS = ("layer", "module", "shapes", "formula")
_NUMBERS = ("step", "layer", "|y|", "|dy|", "y <= 0", "dx = 0", "parameters' gradients")


def table(steps: Steps) -> str:
    """See `Watch.table`."""
    layers, rows = _layers(steps), _rows(steps)
    lines = [*_columns(_LAYERS, layers, "<<<<"), "", *_columns(_NUMBERS, rows, "><>>>><")]
    return "\n".join(lines)


def _layers(steps: Steps) -> list[tuple[str, ...]]:
    return list(
        dict.fromkeys(
            (
                title(r),
                r.module if r.operation is None else "",
                f"{', '.join(map(str, r.inputs))} -> {r.shape}",
                r.formula,
            )
            for step in steps
            for r in step
        )
    )


def _rows(steps: Steps) -> list[tuple[str, ...]]:
    """A row for each record, and one more for each further backward through it."""
    rows: list[tuple[str, ...]] = []
    for r in (r for step in steps for r in step):
        backwards: Sequence[Backward | None] = r.backwards or [None]
        for i, b in enumerate(backwards):
            grad = dead_grad = norms = ""
            if b is not None:
                norms = "  ".join(
                    f"{name} {'-' if n is None else number(n)}" for name, n in b.params.items()
                )
                grad, dead_grad = number(b.grad), percent(b.dead)
            norm, dead = ("", "") if i else (number(r.norm), percent(r.dead))
            rows.append((str(r.step), title(r), norm, grad, dead, dead_grad, norms))
    return rows


def _columns(head: tuple[str, ...], rows: list[tuple[str, ...]], sides: str) -> list[str]:
    """The last column is continued on the next line if it is too wide."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    before = sum(widths[:-1]) + 2 * (len(widths) - 1)
    lines = []
    for row in [head, *rows]:
        cells = [
            f"{cell:{side}{w}}" for cell, side, w in zip(row[:-1], sides, widths, strict=False)
        ]
        last = textwrap.wrap(row[-1], max(_NARROWEST, _WIDTH - before)) or [""]
        lines.append("  ".join([*cells, last[0]]).rstrip())
        lines += [" " * before + more for more in last[1:]]
    return lines


# -- the picture ---------------------------------------------------------------------------

Value: TypeAlias = "Callable[[Record], float | None]"


def _together(r: Record) -> float | None:
    """The norm of all its parameters' gradients as one."""
    came = [n for n in r.params.values() if n is not None]
    return math.hypot(*came) if came else None


_PANELS: tuple[tuple[str, Value, str], ...] = (
    ("norm of the output, |y|", lambda r: r.norm, "no outputs yet"),
    ("norm of its gradient, |dy|", lambda r: r.grad, "no backward yet"),
    ("norm of the parameters' gradients", _together, "no gradient of a parameter"),
    ("share of units with y <= 0", lambda r: r.dead, "no ReLU or LeakyReLU"),
    ("share of units with dx = 0", lambda r: r.dead_grad, "no layer of one input and its shape"),
)
_MARKERS = "os^Dv<>pPX*"
_STYLES = ("-", "--", "-.", ":")


def plot(steps: Steps) -> Figure:
    """See `Watch.plot`."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(
            "nnmirror: to plot, watch needs matplotlib: pip install matplotlib"
        ) from e

    class Shown(Figure):
        """A figure that a notebook shows without pyplot."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=96)
            return file.getvalue()

    layers: dict[str, list[Record]] = {}
    for record in (record for step in steps for record in step):
        layers.setdefault(_label(record), []).append(record)
    if sum(map(bool, steps)) == 1:
        figure = Shown(figsize=(13, 8), layout="constrained")
        panels = figure.subplots(2, 3).flat
        for axes, (name, value, nothing) in zip(panels, _PANELS, strict=False):
            _draw_over_layers(axes, name, value, nothing, layers)
        panels[5].set_axis_off()
        figure.suptitle(f"step {next(iter(layers.values()))[0].step}, layer by layer")
        return figure
    # Room for the legend: columns of 20 names.
    columns = min(5, max(1, -(-len(layers) // 20)))
    width = columns * (0.8 + 0.075 * max(map(len, layers), default=0))
    height = 0.19 * (3 + len(layers) // columns)
    figure = Shown(figsize=(8.6 + max(4.3, width), max(8, 2 * height + 0.5)), layout="constrained")
    panels = figure.subplots(2, 3, width_ratios=[4.3, 4.3, max(4.3, width)]).flat
    looks: list[dict[str, Any]] = [
        {
            "color": color,
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _STYLES[0 if len(layers) <= 10 else i % len(_STYLES)],
        }
        for i, color in enumerate(_colors(matplotlib, len(layers)))
    ]
    for axes, (name, value, nothing) in zip(panels, _PANELS, strict=False):
        _draw_over_steps(axes, name, value, nothing, layers, looks)
    _draw_legend(panels[5], list(layers), looks, columns)
    return figure


def _label(record: Record) -> str:
    """Its title; if the name is a number, with the class."""
    found = title(record)
    is_number = record.layer.rpartition(".")[2].isdecimal() and record.operation is None
    return f"{found} {record.module}" if is_number else found


def _colors(matplotlib: Any, count: int) -> list[Any]:
    """Ten distinguishable colours; for more layers, a scale from the first to the last."""
    if count <= 10:
        return [f"C{i}" for i in range(count)]
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def _draw_over_steps(
    axes: Axes,
    name: str,
    value: Value,
    nothing: str,
    layers: dict[str, list[Record]],
    looks: list[dict[str, Any]],
) -> None:
    lines = [
        [(r.step, v) for r in records if (v := value(r)) is not None] for records in layers.values()
    ]
    place = _scale(axes, name, [v for points in lines for _, v in points], nothing)
    if not any(lines):
        axes.set_xticks([])
        return
    for i, (points, look) in enumerate(zip(lines, looks, strict=True)):
        # With many steps only some have a marker, at different places for each layer.
        every = max(1, len(points) // 12)
        axes.plot(
            [x for x, _ in points],
            [place(v) for _, v in points],
            **look,
            linewidth=1,
            markersize=4,
            markevery=(i * every // max(1, len(lines)), every),
        )
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _draw_over_layers(
    axes: Axes, name: str, value: Value, nothing: str, layers: dict[str, list[Record]]
) -> None:
    points = [(i, value(records[0])) for i, records in enumerate(layers.values())]
    there = [(x, v) for x, v in points if v is not None]
    place = _scale(axes, name, [v for _, v in there], nothing)
    axes.plot([x for x, _ in there], [place(v) for _, v in there], "o-", linewidth=1)
    every = -(-len(points) // 30)  # as many names as are legible
    axes.set_xticks(
        range(0, len(points), every), list(layers)[::every], rotation=90, fontsize="small"
    )
    axes.set(xlabel="layer", xlim=(-0.5, max(0.5, len(points) - 0.5)))


def _scale(axes: Axes, name: str, values: list[float], nothing: str) -> Callable[[float], float]:
    """Set the scale and the ticks of an axis; returns the function from value to position."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator, PercentFormatter

    axes.set_title(name, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.5)
    if not values:
        axes.text(0.5, 0.5, nothing, transform=axes.transAxes, ha="center", color="grey")
        axes.set_yticks([])
        return float
    if name.startswith("share"):
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        return float
    proper = [math.log10(v) for v in values if 0 < v < math.inf] or [0.0]
    low, high = math.floor(min(proper)), math.ceil(max(proper))
    every = max(1, -(-(high - low) // 5))
    ticks = {float(t): _power(1, t) for t in range(low, high + every, every)}
    if high - low <= 2:  # for few powers of ten, also 2 and 5
        for t in range(low, high + 1):
            ticks |= {t + math.log10(m): _power(m, t) for m in (1, 2, 5)}
        within = [t for t in ticks if min(proper) < t < max(proper)]
        within += [max(t for t in ticks if t <= min(proper))]
        within += [min((t for t in ticks if t >= max(proper)), default=max(ticks))]
        ticks = {t: ticks[t] for t in within}
    span = max(max(ticks) - min(ticks), 0.3)
    floor, ceiling = min(ticks) - 0.15 * span, max(ticks) + 0.15 * span
    for at, label, is_used in (
        (floor, "0", 0 in values),
        (ceiling, "inf, NaN", not all(map(math.isfinite, values))),
    ):
        if is_used:
            ticks[at] = label
            axes.axhline(at, color="grey", linewidth=0.5, linestyle=":")
    axes.yaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.yaxis.set_major_formatter(FixedFormatter(list(ticks.values())))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(ticks) - 0.03 * span, max(ticks) + 0.03 * span)

    def place(value: float) -> float:
        if not math.isfinite(value):
            return ceiling
        return math.log10(value) if value > 0 else floor

    return place


def _power(factor: int, exponent: int) -> str:
    """`0.02`, `50`, `2e7`"""
    if -4 < exponent < 4:
        return f"{factor * 10.0**exponent:g}"
    return f"{factor}e{exponent}"


def _draw_legend(axes: Axes, names: list[str], looks: list[dict[str, Any]], columns: int) -> None:
    from matplotlib.lines import Line2D

    axes.set_axis_off()
    lines = [
        Line2D([], [], **look, linewidth=1.5, markersize=5, label=name)
        for name, look in zip(names, looks, strict=True)
    ]
    legend = axes.legend(
        handles=lines,
        loc="upper left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0,
        ncols=columns,
        fontsize="small",
        frameon=False,
        title="layers, first to last",
        alignment="left",
        handlelength=3,
    )
    legend.set_in_layout(False)  # the last panel has room for it


# -- in a notebook -------------------------------------------------------------------------

_STYLE = """<style>
.nnmirror-watch {overflow-x: auto}
.nnmirror-watch table {border-collapse: collapse; font: 12px/1.5 system-ui, sans-serif}
.nnmirror-watch th, .nnmirror-watch td {padding: 3px 6px; text-align: right; border: 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); white-space: nowrap}
.nnmirror-watch .layer {text-align: left; white-space: normal; min-width: 21em;
  max-width: 36em}
.nnmirror-watch code {display: block; background: none; font-size: 11px; opacity: 0.75}
.nnmirror-watch .step {text-align: center}
</style>"""
_HEADS = ("|y|", "|dy|", "y &lt;= 0", "dx = 0", "|d params|")


def html(steps: Steps) -> str:
    """The first and the last step side by side, and a curve of each gradient in between."""
    steps = [step for step in steps if step]
    if not steps:
        return "<i>nnmirror.watch: no step yet</i>"
    histories: dict[str, list[float | None]] = {}
    for step in steps:
        for r in step:
            histories.setdefault(title(r), []).append(r.grad)
    several = len(steps) > 1
    ends = [{title(r): r for r in step} for step in ((steps[0], steps[-1]) if several else steps)]
    cells = [[_cells(end.get(name)) for end in ends] for name in histories]
    used = [i for i in range(len(_HEADS)) if any(end[i] for row in cells for end in row)]
    rows = []
    for name, row in zip(histories, cells, strict=True):
        latest = next((end[name] for end in reversed(ends) if name in end), None)
        line = [f'<td class="layer">{_described(name, latest)}</td>']
        if several:
            line.append(f"<td>{_sparkline(histories[name])}</td>")
        line += [f"<td>{end[i]}</td>" for end in row for i in used]
        rows.append(f"<tr>{''.join(line)}</tr>")
    over = "".join(
        f'<th class="step" colspan="{len(used)}">step {next(iter(end.values())).step}</th>'
        for end in ends
    )
    heads = "".join(f"<th>{_HEADS[i]}</th>" for i in used) * len(ends)
    return (
        f'{_STYLE}<div class="nnmirror-watch"><table>'
        f"<tr><th></th>{'<th>all steps</th>' if several else ''}{over}</tr>"
        f'<tr><th class="layer">layer</th>{"<th>|dy|</th>" if several else ""}{heads}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _described(name: str, r: Record | None) -> str:
    """The first cell of a layer's row: its name, shapes and formula."""
    if r is None:
        return f"<b>{_html.escape(name)}</b>"
    kind = r.module if r.operation is None else ""
    shapes = f"{', '.join(map(str, r.inputs))} -> {r.shape}"
    return (
        f"<b>{_html.escape(name)}</b> {_html.escape(kind)} {_html.escape(shapes)}"
        f"<code>{_html.escape(r.formula)}</code>"
    )


def _cells(r: Record | None) -> tuple[str, ...]:
    if r is None:
        return ("",) * len(_HEADS)
    params = _together(r)
    return (
        number(r.norm),
        "" if r.grad is None else number(r.grad),
        percent(r.dead),
        percent(r.dead_grad),
        "" if params is None else number(params),
    )


def _sparkline(values: list[float | None]) -> str:
    """A small curve of logarithms, with zero at the lower edge."""
    came = [v for v in values if v is not None]
    proper = [math.log10(v) for v in came if 0 < v < math.inf]
    if len(came) < 2:
        return ""
    low, high = (min(proper), max(proper)) if proper else (0.0, 0.0)
    span = max(high - low, 0.5)
    every = max(1, len(came) // 120)
    points = []
    for i in range(0, len(came), every):
        v = came[i]
        if not math.isfinite(v):
            y = 1.0
        else:
            y = 22.0 if v == 0 else 19 - 16 * (math.log10(v) - low) / span
        points.append(f"{118 * i / (len(came) - 1) + 1:.1f},{y:.1f}")
    return (
        '<svg width="120" height="24" role="img" aria-label="norm of the gradient over the steps">'
        f'<polyline points="{" ".join(points)}" fill="none" stroke="currentColor"/></svg>'
    )
