"""Seeing gradients: what went through each layer of a model, forward and back.

    with nnmirror.watch(model) as w:
        for x, t in batches:
            loss = criterion(model(x), t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(w.table())
    w.plot("gradients.png")

It stands beside the model: hooks on its modules, on what they return and on their parameters,
which are there inside the `with` and nowhere else. They compute numbers at once and keep nothing
else, and they change nothing: the training has the same bits.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import functional as F
from . import tape, tensor
from ._torch import DisableTorchFunctionSubclass
from .grad_mode import is_grad_enabled
from .modules.explicit import Each, NodeCall, Stacked, Traced, way_back
from .modules.layer import Layer
from .modules.module import Module
from .rules import Rule

_RELU_LIKE = (F.Relu, F.LeakyRelu)
_WIDTH = 100  # of the table


@dataclass
class Backward:
    """What one backward brought to one call of a layer."""

    grad: float  # the norm of the gradient of the output
    # The norm of the gradient of each parameter of the layer's own that is trained, None if none
    # came. By `loss.backward()` it is the whole gradient, over all calls of the layer; driven by
    # hand, each call brings its own.
    params: dict[str, float | None] = field(default_factory=dict)
    dead: float | None = None  # see `Record`


@dataclass
class Record:
    """One tensor that one call of a layer returned.

    A unit is a feature of the last dimension, and what lies along the others are the samples
    (a vector is one sample). The shares of dead units are

    - `dead`: of those whose output is <= 0 for every sample, after a ReLU or LeakyReLU. Such a
      ReLU passes nothing on for the batch, such a LeakyReLU a small slope;
    - `Backward.dead`: of those for which the gradient that the layer passes back, that of its
      input, is exactly zero for every sample. For any operation on one tensor that keeps its
      shape: a Tanh so far out that 1 - y^2 rounds to zero has such units as well.

    They are None where this cannot be asked: another layer, no sample, an input without gradient.
    """

    step: int
    layer: str  # its name in the model, "" for the model itself
    call: int  # the how-manieth of this layer's calls in the step, from 0
    output: int | None  # which tensor of several that the call returned
    module: str  # the name of its class
    formula: str  # the gradients, as the Function that was recorded documents them
    inputs: tuple[tuple[int, ...], ...]  # the shapes
    shape: tuple[int, ...]
    norm: float  # of the output, as it was when the layer returned it
    dead: float | None = None
    backwards: list[Backward] = field(default_factory=list)  # one for each that came by

    @property
    def grad(self) -> float | None:
        """The norm of the gradient of the output, in the last backward; None without one."""
        return self.backwards[-1].grad if self.backwards else None

    @property
    def params(self) -> dict[str, float | None]:
        """The norms of the parameters' gradients, in the last backward."""
        return self.backwards[-1].params if self.backwards else {}

    @property
    def dead_grad(self) -> float | None:
        """The share of units that passed no gradient back, in the last backward."""
        return self.backwards[-1].dead if self.backwards else None


def watch(model: Module) -> "Watch":
    """Record the norms of activations and gradients of every layer of `model`, inside a `with`.

    What is in a record: see `Record`; how they make steps: see `Watch`.
    """
    return Watch(model)


class Watch:
    """The records of a model's steps: `steps`, a list of lists of `Record`.

    A step is a call of the model with grad mode on, and every backward that goes through it,
    whenever it comes: one `Backward` for each, so two losses or `retain_graph=True` leave two.
    Under `no_grad` nothing is recorded, so that an evaluation in between makes no step. Layers
    called outside a call of the model (by `model.forward(x)`, or one by one) make a step
    together, which ends with the first gradient or the next call of the model. A forward that
    raises leaves the layers it came to.

    A record is made of each call of a layer: of every module, but one that only hands on what
    one of its modules returned, as a Sequential does. The model may be driven by the tape or
    by hand (`model.backward(dy)`), but for a module with a `backward` of its own, which by hand
    is passed by. Not seen are modules added inside the `with`, and a gradient that comes to a
    parameter in a backward that does not go through its layer.

    Several watches may be on at once; one may be entered again, and goes on.
    """

    steps: list[list[Record]]

    def __init__(self, model: Module) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"nnmirror.watch takes an nnmirror.Module, not {torch.typename(model)}")
        self.steps = []
        self._model = weakref.ref(model)
        self._on = False
        self._handles: list[Any] = []  # of the hooks on modules
        # Of the hooks on tensors, each with its tensor, weakly.
        self._on_tensors: list[tuple[Any, Any]] = []
        self._on_params: dict[int, tuple[Any, Any]] = {}
        self._start()

    def _start(self) -> None:
        self._depth = 0  # of the model's calls under way
        self._open: list[Record] | None = None  # the step that the next record belongs to
        self._calls: dict[str, int] = {}  # of each layer in it
        # For a parameter, whose gradient is complete after its layers': who is to have it.
        self._awaiting: dict[int, dict[int, tuple[Backward, str]]] = {}
        self._last: list[tuple[Any, int]] = []  # what the last record's call returned, weakly

    def __enter__(self) -> "Watch":
        model = self._model()
        if self._on or model is None:
            why = "is on already" if self._on else "has lost its model, which nobody else holds"
            raise RuntimeError(f"nnmirror: this watch {why}")
        self._on = True
        self._start()
        self._handles.append(
            model.register_forward_pre_hook(_Hook(self, "", self._before), prepend=True)
        )
        for name, module in model.named_modules():
            self._handles.append(
                module.register_forward_hook(
                    _Hook(self, name, self._after),
                    prepend=True,  # what the layer returned, before other hooks change it
                    with_kwargs=True,
                    always_call=True,
                )
            )
        return self

    def __exit__(self, *exc: Any) -> None:
        self._on = False
        for handle in self._handles:
            handle.remove()
        for handle, held in [*self._on_tensors, *self._on_params.values()]:
            handle.remove()
            leaf = held()
            if isinstance(leaf, tensor.Tensor) and not leaf._leaf_hooks:
                leaf._leaf_hooks = None  # as if none had been there: the walk asks
        self._handles, self._on_tensors, self._on_params = [], [], {}
        self._start()

    @property
    def records(self) -> list[Record]:
        """The records of all steps in one list."""
        return [record for step in self.steps for record in step]

    def to_dict(self) -> list[dict[str, Any]]:
        """The records as plain dicts: for `json.dump`, or a table library."""
        return [asdict(record) for record in self.records]

    # -- forward ---------------------------------------------------------------------------

    def _before(self, name: str, module: Any, args: Any) -> None:
        if self._depth == 0:
            self._open = None
        self._depth += 1

    def _after(self, name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if is_grad_enabled():
            with DisableTorchFunctionSubclass(), torch.no_grad():
                self._note_call(name, module, (args, kwargs), output)
        if name == "":
            self._depth = max(0, self._depth - 1)
            if self._depth == 0:
                self._open = None

    def _note_call(self, name: str, module: Any, given: Any, output: Any) -> None:
        outputs = [t for t in tape.tensors_in(output) if t.is_floating_point() or t.is_complex()]
        if not outputs or self._is_handed_on(module, outputs):
            return
        if self._open is None:
            self._open = []
            self.steps.append(self._open)
            self._calls.clear()
            self._awaiting.clear()
            self._on_tensors = [held for held in self._on_tensors if _stands(held[0])]
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        params = self._hooked_parameters(module)
        records = []
        for i, out in enumerate(outputs):
            node, formula = _formula(module, given, out)
            record = Record(
                step=len(self.steps) - 1,
                layer=name,
                call=call,
                output=i if len(outputs) > 1 else None,
                module=type(module).__name__,
                formula=formula,
                inputs=tuple(tuple(t.shape) for t in tape.tensors_in(given)),
                shape=tuple(out.shape),
                norm=_norm(out),
            )
            if node is not None and issubclass(node.function, _RELU_LIKE):
                record.dead = _share(out <= 0)
            records.append(record)
            if out.requires_grad:
                arrived = functools.partial(self._arrived, record, params)
                self._on_tensors.append((out.register_hook(arrived), weakref.ref(out)))
                grad_fn: Any = out.grad_fn
                if grad_fn is node and len(node.inputs) == 1:
                    passed = functools.partial(self._passed_back, record)
                    self._on_tensors.append((node.register_hook(passed), weakref.ref(out)))
        self._open += records
        self._last = [(weakref.ref(t), _version(t)) for t in outputs]
        driven = way_back(module.__dict__.get("_call"))
        # A walk over the tape comes by the hooks on the outputs. Other ways do not.
        if driven is not None and not isinstance(_innermost(driven), Traced):
            module.__dict__["_call"] = _ByHand(self, driven, records, params)

    def _is_handed_on(self, module: Any, outputs: list[Any]) -> bool:
        """Is this just what the call before returned, from a module that does nothing itself?"""
        if self._open is None or isinstance(module, Layer) or module._parameters:
            return False
        return [(id(t), _version(t)) for t in outputs] == [(id(r()), v) for r, v in self._last]

    def _hooked_parameters(self, module: Any) -> list[tuple[str, int]]:
        """The module's own parameters that are trained, each with a hook on it."""
        found = []
        for name, p in module._parameters.items():
            if p is None or not p.requires_grad:
                continue
            key = id(p)
            if key not in self._on_params or not _stands(self._on_params[key][0]):
                handle = p.register_hook(functools.partial(self._parameter, key))
                self._on_params[key] = handle, weakref.ref(p)
            found.append((name, key))
        return found

    # -- backward --------------------------------------------------------------------------

    def _arrived(self, record: Record, params: list[tuple[str, int]], grad: Any) -> None:
        """The gradient of a record's output is here."""
        if self._depth == 0:
            self._open = None
        backward = Backward(_norm(grad), {name: None for name, _ in params})
        record.backwards.append(backward)
        for name, key in params:
            self._awaiting.setdefault(key, {})[id(record)] = backward, name

    def _passed_back(self, record: Record, grads: Any, _: Any = None) -> None:
        """The layer has computed the gradient of its input."""
        grad = grads[0]
        if record.backwards and grad is not None and tuple(grad.shape) == record.shape:
            record.backwards[-1].dead = _share(grad == 0)

    def _parameter(self, key: int, grad: Any) -> None:
        norm = _norm(grad)
        for backward, name in self._awaiting.pop(key, {}).values():
            backward.params[name] = norm

    # -- reading ---------------------------------------------------------------------------

    def table(self, *steps: int) -> str:
        """The layers with their formulas, then a line for each layer and step.

        `steps` are indices into `self.steps`, as `table(0, 1, -1)`; without any, all. |y| and |dy|
        are the norms of the output and of its gradient, `y <= 0` and `dx = 0` the two shares of
        dead units (see `Record`). A second backward through a step has lines of its own.
        """
        chosen = [self.steps[i] for i in steps] if steps else self.steps
        records = [record for step in chosen for record in step]
        layers = {
            (
                _title(r),
                r.module,
                f"{', '.join(map(str, r.inputs))} -> {r.shape}",
                r.formula,
            ): None
            for r in records
        }
        lines = _columns(("layer", "module", "shapes", "formula"), list(layers), "<<<<")
        lines.append("")
        rows = []
        for r in records:
            for i, b in enumerate(r.backwards or [None]):  # type: ignore[list-item]
                first = (str(r.step), _title(r), _number(r.norm), _percent(r.dead))
                rest = ("", "", "")
                if b is not None:
                    norms = "  ".join(
                        f"{name} {'-' if n is None else _number(n)}" for name, n in b.params.items()
                    )
                    rest = (_number(b.grad), _percent(b.dead), norms)
                y, dead = first[2:] if i == 0 else ("", "")
                rows.append((*first[:2], y, rest[0], dead, *rest[1:]))
        lines += _columns(
            ("step", "layer", "|y|", "|dy|", "y <= 0", "dx = 0", "parameters' gradients"),
            rows,
            "><>>>><",
        )
        return "\n".join(lines)

    def plot(self, path: Any) -> None:
        """Draw the norms and the shares of dead units of every layer over the steps."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.lines import Line2D
        except ImportError as e:
            raise ImportError(
                "nnmirror: to plot, watch needs matplotlib: pip install 'nnmirror[examples]'"
            ) from e
        panels: list[tuple[str, Callable[[Record], float | None]]] = [
            ("norm of the activation", lambda r: r.norm),
            ("norm of its gradient", lambda r: r.grad),
            ("norm of the parameters' gradients", lambda r: _together(r.params)),
            ("share of units with y <= 0", lambda r: r.dead),
        ]
        layers: dict[str, list[Record]] = {}
        for record in self.records:
            layers.setdefault(_title(record), []).append(record)
        figure = Figure(figsize=(11, 7), layout="constrained")
        for axes, (title, value) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            seen: list[float] = []
            for i, records in enumerate(layers.values()):
                points = [(r.step, v) for r in records if (v := value(r)) is not None]
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.plot(xs, ys, color=f"C{i}", linewidth=1)
                seen += ys
            axes.set(title=title, xlabel="step")
            above = [v for v in seen if 0 < v < math.inf]
            if not title.startswith("norm"):
                axes.set_ylim(-0.02, 1.02)
            elif above:
                # A logarithm, with zero below: a gradient that is gone shows.
                axes.set_yscale("symlog", linthresh=min(above))
        lines = [Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(layers)]
        figure.legend(handles=lines, loc="outside right upper")
        figure.savefig(path, dpi=120)


class _Hook:
    """A hook of the watch's on a module. On a copy of the module it takes itself off."""

    def __init__(self, watch: Any = None, name: str = "", act: Any = None) -> None:
        self.watch, self.name, self.act = watch, name, act

    def __call__(self, module: Any, *args: Any) -> None:
        if self.watch is not None:
            self.act(self.name, module, *args)
            return
        for hooks, *flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ),
        ):
            for key in [key for key, hook in hooks.items() if hook is self]:
                for registry in (hooks, *flags):
                    registry.pop(key, None)

    def __reduce__(self) -> Any:
        return _Hook, ()


class _ByHand:
    """The way back of a layer driven by hand: tells the watch what goes in and comes out."""

    def __init__(
        self, watch: Watch, call: Any, records: list[Record], params: list[tuple[str, int]]
    ) -> None:
        self.watch, self.call, self.records, self.params = watch, call, records, params

    def __call__(self, gradient: Any = None) -> Any:
        if not self.watch._on:
            return self.call(gradient)
        # Left out, it is one for a scalar.
        grads = list(tape.tensors_in(torch.ones(()) if gradient is None else gradient))
        seen = self.records if len(grads) == len(self.records) else []
        for record, grad in zip(seen, grads, strict=False):
            self.watch._arrived(record, self.params, grad)
        try:
            result = self.call(gradient)
        except Exception:
            for record in seen:
                record.backwards.pop()
            raise
        node = _node_of(self.call)
        if len(seen) == 1 and node is not None and len(node.inputs) == 1:
            self.watch._passed_back(seen[0], (result,))
        return result


def _innermost(call: Any) -> Any:
    while isinstance(call, _ByHand):
        call = call.call
    return call


def _node_of(call: Any) -> Any:
    """The node of the one recorded call that a layer is; None for other modules."""
    call = _innermost(call)
    if isinstance(call, NodeCall):
        return call.node
    if isinstance(call, Stacked):
        return _node_of(call.call)
    return _node_of(call.calls[0]) if isinstance(call, Each) else None


def _stands(handle: Any) -> bool:
    """Is what a hook was put on still there?"""
    return handle.hooks_dict_ref() is not None


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version


# -- numbers -------------------------------------------------------------------------------


def _norm(t: torch.Tensor) -> float:
    """The square root of the sum of squares; of half precision, in float32."""
    with DisableTorchFunctionSubclass(), torch.no_grad():
        wide = torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else None
        return torch.linalg.vector_norm(t, dtype=wide).item()


def _share(flags: torch.Tensor) -> float | None:
    """Of the units, those for which the flag is set for every sample."""
    if flags.dim() == 0 or flags.numel() == 0:
        return None
    every = flags.reshape(-1, flags.shape[-1]).all(0)
    return int(every.sum()) / len(every)


def _together(norms: dict[str, float | None]) -> float | None:
    """The norm of all of them as one."""
    came = [n for n in norms.values() if n is not None]
    return math.hypot(*came) if came else None


# -- formulas ------------------------------------------------------------------------------


def _formula(module: Any, given: Any, out: Any) -> tuple[Any, str]:
    """The recorded call behind a module's output, and its formula."""
    node = _node_of(way_back(module.__dict__.get("_call")))
    if node is not None:
        return node, _documented(node.function)
    inputs = list(tape.tensors_in(given))
    node = out.grad_fn
    if not isinstance(node, tape.Node) or any(t is out for t in inputs):
        # Nothing was recorded; a layer, such as Identity, may say itself what it does.
        return None, _gradients(type(module).__doc__) if isinstance(module, Layer) else ""
    own = {id(p) for p in module._parameters.values()}
    own |= {id(tape.edge_of(t)[0]) for t in inputs}
    alone = all(edge is None or id(edge[0]) in own for edge in node.edges)
    formula = _documented(node.function)
    if alone:
        return node, formula
    # Of a layer made of several calls its docstring may say what they come to.
    whole = _gradients(type(module).__doc__) if isinstance(module, Layer) else ""
    return node, whole or f"last of several: {formula}"


def _documented(function: Any) -> str:
    """The gradients in the first line of a Function's docstring, or of what it is derived from."""
    classes = list(_classes(function))
    for cls in classes:
        found = _gradients(cls.__doc__)
        if found:
            return found
    return next((c.__doc__.strip().split("\n")[0] for c in classes if c.__doc__), function.__name__)


def _classes(function: Any) -> Iterator[type]:
    for cls in function.__mro__:
        if cls in (Rule, tape.Function):
            return
        yield cls


def _gradients(doc: str | None) -> str:
    """Of "y = tanh(x):  dx = g (1 - y^2).  Saved: y." the part in the middle."""
    line = (doc or "").strip().split("\n")[0].partition(".  Saved: ")[0]
    for mark in (":  ", ".  "):
        head, found, tail = line.partition(mark)
        if found and head:
            return tail.rstrip(".")
    return ""


# -- the table -----------------------------------------------------------------------------


def _title(record: Record) -> str:
    name = record.layer or record.module
    name = name if len(name) <= 24 else f"...{name[-21:]}"
    called = f" #{record.call + 1}" if record.call else ""
    return name + called + ("" if record.output is None else f"[{record.output}]")


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _columns(head: tuple[str, ...], rows: list[Any], sides: str) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths, strict=True)]
        line = "  ".join(cells).rstrip()
        lines.append(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}...")
    return lines
