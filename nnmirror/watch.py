"""Norms of activations and gradients of each layer of a model, in training.

    with nnmirror.watch(model) as w:
        for x, t in batches:
            loss = criterion(model(x), t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(w.table())
    w.plot("gradients.png")

It uses hooks on the modules and taps on the recorded calls (see `nnmirror.fast.tapped`), which are
removed at the end of the `with`. They compute norms immediately, keep no tensor (unless
`values=True`), and change nothing: the training has the same bits.
"""

import functools
import itertools
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
from torch.utils.hooks import RemovableHandle

from . import _state, tape, tensor
from ._state import sequence as _sequence
from ._torch import (
    DisableTorchFunction,
    DisableTorchFunctionSubclass,
)
from ._types import StrPath
from .documented import gradients, gradients_in
from .fast import tapped
from .grad_mode import is_grad_enabled
from .modules.container import ModuleDict, ModuleList, Sequential
from .modules.explicit import Call, Each, Gradient, NodeCall, Stacked, Traced, way_back
from .modules.layer import Layer
from .modules.module import Module
from .node import RECORDED, TAPPED, Edge, Node
from .operation import Operation
from .rules.activation import LeakyRelu, Relu
from .tensor import C_dtype, C_shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_numbers = itertools.count(1)
_HALF = (torch.float16, torch.bfloat16)
_vector_norm = torch.linalg.vector_norm
_RELU_LIKE = (Relu, LeakyRelu)
# What takes a hook, or what is in place of one, away.
_Handle: TypeAlias = "RemovableHandle | _Tap"


@dataclass
class Backward:
    """The gradients of one backward at one call of a layer."""

    grad: float  # the norm of the gradient of the output
    # The norm of the gradient of each of the layer's own trainable parameters, None without one.
    # With `loss.backward()` it is the whole gradient, over all calls of the layer; driven by hand,
    # each call has its own.
    params: dict[str, float | None] = field(default_factory=dict)
    dead: float | None = None  # see `Record`
    # With `values=True`: the gradients themselves.
    value: torch.Tensor | None = None
    param_values: dict[str, torch.Tensor | None] = field(default_factory=dict)


@dataclass
class Record:
    """One tensor that one call of a layer, or an operation between layers, returned.

    A unit is a feature of the last dimension; the other dimensions are samples (a vector is one
    sample). There are two shares of dead units:

    - `dead`, after a ReLU or LeakyReLU: the share of units whose output is <= 0 for every sample.
      Such a ReLU has no gradient for the whole batch, such a LeakyReLU only its small slope;
    - `Backward.dead`, for an operation on one tensor that keeps its shape: the share of units whose
      input gradient is exactly zero for every sample. A saturated Tanh, whose 1 - y^2 rounds to
      zero, has such units too.

    They are None if they are not defined: for other layers, without samples, or if the input does
    not require grad.
    """

    step: int
    # Its name in the model, "" for the model itself; for an operation, the name of the module whose
    # forward calls it.
    layer: str
    call: int  # the index of this call among the layer's calls in the step
    output: int | None  # which one of several tensors that the call returned
    module: str  # the name of the layer's class
    formula: str  # the gradients, as the operation that was recorded documents them
    inputs: tuple[tuple[int, ...], ...]  # the shapes
    shape: tuple[int, ...]
    norm: float  # of the output, as it was when the layer returned it
    dead: float | None = None
    backwards: list[Backward] = field(default_factory=list)  # one for each backward
    operation: str | None = None  # the name of an operation between layers: "add", "tanh"
    value: torch.Tensor | None = None  # the output, with `values=True`

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


def watch(model: Module, *, operations: bool = True, values: bool = False) -> "Watch":
    """Record the norms of activations and gradients of every layer of `model`, inside a `with`.

    `operations=False` leaves out the operations that a `forward` calls between layers.
    `values=True` also keeps copies of each output, its gradient and the parameters' gradients.
    `Record` says what is recorded, and `Watch` what a step is.

    It costs time: a watched model is called layer by layer, and for each result two norms are
    computed and a `Record` is made. Measured on one thread, a watched training step took 4.6 times
    as long as an unwatched one with a `Sequential` of 2-25-25-25-1 in batches of 4, 4.0 times with
    the same net wired by hand (2.3 times with `operations=False`), 1.3 times with 784-512-512-10 in
    batches of 64. In a long training, watch some steps: a watch can be entered again, and costs
    nothing outside.

        w = nnmirror.watch(model)
        for step, (x, t) in enumerate(batches):
            with w if step % 100 == 0 else contextlib.nullcontext():
                ...
    """
    return Watch(model, operations=operations, values=values)


class Watch:
    """The records of a model's steps: `steps`, a list of lists of `Record`.

    A step is a call of the model with grad mode on, and every backward through it: each adds a
    `Backward`, so two losses or `retain_graph=True` give two. Under `no_grad` nothing is recorded,
    so that an evaluation in between makes no step. Layers called outside a call of the model (by
    `model.forward(x)`, or one by one) together make a step, which ends with the first gradient or
    the next call of the model. If a forward raises, the layers called before it are recorded.

    Each call of a module makes a record, unless the module only returns what one of its modules
    returned, as a Sequential does. In a call of the model, so does each recorded operation that a
    `forward` calls between its layers, such as `F.relu(x)` or `x + y`; if the module returns its
    result, it is shown as that module's. The model may be trained by `loss.backward()` or by hand
    (`model.backward(dy)`); by hand, a module with a `backward` of its own is not recorded. Modules
    added inside the `with` are not seen, nor is a gradient that a parameter gets in a backward that
    does not go through its layer.

    Several watches can be active at once, and one can be entered again. A notebook shows the
    first and the last step, and the norms over the steps.
    """

    steps: list[list[Record]]

    def __init__(self, model: Module, *, operations: bool = True, values: bool = False) -> None:
        if not isinstance(model, Module):
            raise TypeError(f"nnmirror.watch takes an nnmirror.Module, not {torch.typename(model)}")
        self.steps = []
        self._with_operations, self._values = operations, values
        self._model = weakref.ref(model)
        self._on = False
        self._handles: list[RemovableHandle] = []  # of the hooks on modules
        # Of the hooks on tensors, each with a weak reference to its tensor.
        self._on_tensors: list[
            tuple[RemovableHandle, weakref.ref[torch.Tensor] | weakref.ref[Node]]
        ] = []
        self._on_params: dict[int, tuple[RemovableHandle, weakref.ref[torch.Tensor]]] = {}
        self._taps: list[_Tap] = []  # of the open step
        self._params: dict[int, weakref.ref[torch.Tensor]] = {}  # by id
        self._formulas: dict[type[Operation], str] = {}
        self._start()

    def _start(self) -> None:
        self._depth = 0  # the number of running calls of the model
        self._open: list[Record] | None = None  # the step that the next record belongs to
        self._calls: dict[str, int] = {}  # of each layer in it
        # For a parameter, whose gradient is complete after its layers': the records that get it.
        self._awaiting: dict[int, dict[int, tuple[Backward, str]]] = {}
        self._last: list[tuple[weakref.ref[torch.Tensor], int]] = []  # the last record's results
        self._operations: list[_Operation] = []  # of the open step
        self._shown = _Shown()

    def __enter__(self) -> "Watch":
        model = self._model()
        if self._on or model is None:
            why = "is active already" if self._on else "has no model any more: it was deleted"
            raise RuntimeError(f"nnmirror: this watch {why}")
        self._on = True
        self._start()
        _state.taps = next(_numbers)
        tapped.listeners.append(self._leaf_arrived)
        wired_by_hand = self._with_operations and not all(map(_has_layers_only, model.modules()))
        for name, module in model.named_modules():
            if name == "" or wired_by_hand:
                before = functools.partial(self._before, wired_by_hand)
                self._handles.append(
                    module.register_forward_pre_hook(_Hook(self, name, before), prepend=True)
                )
            self._handles.append(
                module.register_forward_hook(
                    _Hook(self, name, self._after),
                    prepend=True,  # what the layer returned, before other hooks change it
                    with_kwargs=True,
                    always_call=True,
                )
            )
        return self

    def __exit__(self, *exc: object) -> None:
        self._on = False
        self._listen(False)
        tapped.listeners.remove(self._leaf_arrived)
        if not tapped.listeners:
            _state.taps = 0
        for tap in self._taps:
            tap.remove()
        for handle in [*self._handles, *(handle for handle, _ in self._on_tensors)]:
            handle.remove()
        self._unhook_parameters()
        self._handles, self._on_tensors, self._taps = [], [], []
        self._params.clear()
        self._start()

    @property
    def records(self) -> list[Record]:
        """The records of all steps in one list."""
        return [record for step in self.steps for record in step]

    def to_dict(self) -> list[dict[str, Any]]:
        """The records as plain dicts: for `json.dump`, or a table library. Tensors are lists."""
        return [_plain(record) for record in self.records]

    # -- forward ---------------------------------------------------------------------------

    def _before(self, shows: bool, name: str, module: Module, args: object) -> None:
        if name == "":
            if self._depth == 0:
                self._open = None
                self._unhook_parameters()  # a call with hooked parameters has no signature
            self._depth += 1
        if not shows:
            return
        if name == "" and not self._shown.inside:
            self._listen(True)
            self._shown.latest = next(_sequence)
        self._shown.inside.append((name, module))

    def _after(
        self,
        name: str,
        module: Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        shown, records = self._shown, is_grad_enabled()
        with DisableTorchFunction():
            if shown.inside and shown.inside[-1] == (name, module):
                shown.inside.pop()
            if records:
                self._note_call(name, module, args, kwargs, output)
        if name == "":
            if not shown.inside:
                self._listen(False)
            self._depth = max(0, self._depth - 1)
            if self._depth == 0:
                self._open = None

    def _note_call(
        self,
        name: str,
        module: Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        outputs = [t for t in _tensors_in(output) if _has_gradients(C_dtype(t))]
        if not outputs or self._is_handed_on(module, outputs):
            return
        opened = self._opened()
        if self._operations:
            for out in outputs:
                self._drop_operation(out)
        call = self._called(name)
        params = self._parameters_of(module)
        inputs = _tensors_in(args[0] if len(args) == 1 and not kwargs else (args, kwargs))
        shapes = tuple([tuple(C_shape(t)) for t in inputs])
        driven = module.__dict__.get("_call")
        if not isinstance(driven, Node):
            driven = way_back(driven)
        records = []
        for i, out in enumerate(outputs):
            made = _made(out)
            node, formula = self._formula(module, driven, inputs, out, made)
            record = Record(
                len(self.steps) - 1,
                name,
                call,
                i if len(outputs) > 1 else None,
                type(module).__name__,
                formula,
                shapes,
                tuple(C_shape(out)),
                _norm(out),
            )
            self._follow(record, out, node, made, params)
            if made is not None and isinstance(made, Node):
                self._shown.latest = max(self._shown.latest, made.sequence)
            records.append(record)
        opened += records
        self._last = [(weakref.ref(t), _version(t)) for t in outputs]
        # A walk over the tape calls the hooks on the outputs. Other backwards do not.
        if driven is not None and not isinstance(_innermost(driven), Traced):
            module.__dict__["_call"] = _ByHand(self, driven, records, params)

    def _opened(self) -> list[Record]:
        """The step that the next record belongs to."""
        if self._open is None:
            self._open = []
            self.steps.append(self._open)
            self._calls.clear()
            self._awaiting.clear()
            self._operations.clear()
            self._on_tensors = [held for held in self._on_tensors if _stands(held[0])]
            self._taps = [tap for tap in self._taps if tap.node() is not None]
            self._unhook_parameters()
        return self._open

    def _called(self, title: str) -> int:
        """The number of its calls in the step so far."""
        call = self._calls.get(title, 0)
        self._calls[title] = call + 1
        return call

    def _follow(
        self,
        record: Record,
        out: torch.Tensor,
        node: Node | None,
        made: object,
        params: list[tuple[str, int]],
    ) -> "Sequence[_Handle]":
        """Put a tap or hooks on the node of a record's output, which `made` it.

        If that is `node`, the one call of the layer, its backward gives the input's gradient.
        """
        if self._values:
            record.value = _copy(out)
        if node is not None and issubclass(node.function, _RELU_LIKE):
            record.dead = _share(out <= 0)
        if made is None and not out.requires_grad:
            return []
        passes = node is not None and made is node and len(node.inputs) == 1
        if _takes_taps(made):
            tap = _Tap(self, record, params, passes, made)
            made.taps, made.node_state = (*made.taps, tap), TAPPED
            self._taps.append(tap)
            return [tap]
        self._hook_parameters(params)
        handles = [out.register_hook(functools.partial(self._arrived, record, params))]
        if passes and node is not None:
            handles.append(node.register_hook(functools.partial(self._passed_back, record)))
        self._on_tensors += [(handle, weakref.ref(out)) for handle in handles]
        return handles

    def _hook(self, tap: "_Tap", node: Node) -> list[RemovableHandle]:
        """Put hooks on `node` in place of a tap, before the other hooks."""
        self._hook_parameters(tap.params)
        if node.tensor_hooks is None:
            node.tensor_hooks = {}
        hooks = node.tensor_hooks.setdefault(0, OrderedDict())
        arrived = functools.partial(self._arrived, tap.record, tap.params)
        handles = [tensor.add_hook(hooks, arrived)]
        hooks.move_to_end(handles[0].id, last=False)
        node.mark_hooked()
        if tap.passes:
            handles.append(node.register_hook(functools.partial(self._passed_back, tap.record)))
            assert node.posthooks is not None
            node.posthooks.move_to_end(handles[1].id, last=False)
        self._on_tensors += [(handle, tap.node) for handle in handles]
        return handles

    # -- between the layers ----------------------------------------------------------------

    def _listen(self, listens: bool) -> None:
        """Have the tape call `_recorded` in this thread, or no longer."""
        others = tuple([one for one in tape.listeners.functions if one != self._recorded])
        tape.listeners.functions = (*others, self._recorded) if listens else others

    def _recorded(self, result: object) -> None:
        """Called with the result of each recorded call, in a call of the model."""
        shown = self._shown
        if not shown.inside or isinstance(shown.inside[-1][1], Layer):
            return
        out = next(tape.tensors_in(result), None)
        if not isinstance(out, tensor.Tensor):
            return
        node = out._node
        if node is not None and node.sequence > shown.latest:
            shown.latest = node.sequence
            with DisableTorchFunction():
                self._note_operation(out, node)

    def _note_operation(self, out: torch.Tensor, node: Node) -> None:
        name, module = self._shown.inside[-1]
        opened = self._opened()
        operation = _name_of(node)
        record = Record(
            step=len(self.steps) - 1,
            layer=name,
            call=self._called(f"{name} {operation}"),
            output=None,
            module=type(module).__name__,
            formula=self._documented(node.function),
            inputs=tuple(_shape_at(edge) for edge in node.edges if edge is not None),
            shape=tuple(out.shape),
            norm=_norm(out),
            operation=operation,
        )
        handles = self._follow(record, out, node, node, [])
        opened.append(record)
        self._operations.append(_Operation(weakref.ref(out), _version(out), record, handles))

    def _drop_operation(self, out: torch.Tensor) -> None:
        """What a module returns is shown as its own."""
        for i, found in enumerate(self._operations):
            if found.out() is not out or found.version != _version(out):
                continue
            del self._operations[i]
            record = found.record
            assert self._open is not None
            self._open[:] = [r for r in self._open if r is not record]
            self._calls[f"{record.layer} {record.operation}"] -= 1
            for handle in found.handles:
                handle.remove()
            return

    def _is_handed_on(self, module: Module, outputs: list[torch.Tensor]) -> bool:
        """Is this only the result of the previous call, from a module that computes nothing
        itself?"""
        if self._open is None or isinstance(module, Layer) or module._parameters:
            return False
        return [(id(t), _version(t)) for t in outputs] == [(id(r()), v) for r, v in self._last]

    def _parameters_of(self, module: Module) -> list[tuple[str, int]]:
        """The module's own trainable parameters: their names and ids."""
        found = []
        for name, p in module._parameters.items():
            if p is None or not p.requires_grad:
                continue
            key = id(p)
            held = self._params.get(key)
            if held is None or held() is not p:
                self._params[key] = weakref.ref(p)
            found.append((name, key))
        return found

    def _hook_parameters(self, params: list[tuple[str, int]]) -> None:
        """Put hooks on them, for a walk without taps."""
        for _, key in params if self._on else ():
            p = self._params[key]()
            if p is None or not p.requires_grad:
                continue
            if key not in self._on_params or not _stands(self._on_params[key][0]):
                handle = p.register_hook(functools.partial(self._parameter, key))
                self._on_params[key] = handle, self._params[key]

    def _unhook_parameters(self) -> None:
        for handle, held in self._on_params.values():
            handle.remove()
            leaf = held()
            if isinstance(leaf, tensor.Tensor) and not leaf._leaf_hooks:
                leaf._leaf_hooks = None  # as if there had been none: the walk checks
        self._on_params = {}

    def _formula(
        self,
        module: Module,
        driven: object,
        inputs: list[torch.Tensor],
        out: torch.Tensor,
        made: object,
    ) -> tuple[Node | None, str]:
        """The recorded call behind a module's output, and its formula."""
        node = _node_of(driven)
        if node is not None:
            return node, self._documented(node.function)
        whole = gradients_in(type(module).__doc__) if isinstance(module, Layer) else ""
        if not isinstance(made, Node) or any(t is out for t in inputs):
            return None, whole  # nothing recorded: the layer's docstring may say it
        node = made
        own = {id(p) for p in module._parameters.values()}
        own |= {id(tape.edge_of(t)[0]) for t in inputs}
        alone = all(edge is None or id(edge[0]) in own for edge in node.edges)
        formula = self._documented(node.function)
        if alone:
            return node, formula
        # For a layer with several calls, its docstring may have the formula of the whole.
        return node, whole or f"last of several: {formula}"

    def _documented(self, function: type[Operation]) -> str:
        found = self._formulas.get(function)
        if found is None:
            found = self._formulas[function] = gradients(function)
        return found

    # -- backward --------------------------------------------------------------------------

    def _arrived(self, record: Record, params: list[tuple[str, int]], grad: torch.Tensor) -> None:
        """Called with the gradient of a record's output."""
        with DisableTorchFunction(), torch.no_grad():
            self._note_gradient(record, params, grad)

    def _note_gradient(
        self, record: Record, params: list[tuple[str, int]], grad: torch.Tensor
    ) -> None:
        if self._depth == 0:
            self._open = None
        backward = Backward(_norm(grad), {name: None for name, _ in params})
        if self._values:
            backward.value = _copy(grad)
            backward.param_values = {name: None for name, _ in params}
        record.backwards.append(backward)
        for name, key in params:
            self._awaiting.setdefault(key, {})[id(record)] = backward, name

    def _passed_back(
        self, record: Record, grads: Sequence[torch.Tensor | None], _: object = None
    ) -> None:
        """Called when the layer has computed the gradient of its input."""
        grad = grads[0]
        if record.backwards and grad is not None and tuple(grad.shape) == record.shape:
            record.backwards[-1].dead = _share(grad == 0)

    def _leaf_arrived(self, leaf: object, grad: torch.Tensor) -> None:
        """Called with the gradient of any leaf in a walk with taps."""
        if id(leaf) in self._awaiting:
            self._note_parameter(id(leaf), grad)

    def _parameter(self, key: int, grad: torch.Tensor | None) -> None:
        """Called with the gradient of a parameter in any other walk; with None where a walk arrives
        there without one, as in second derivatives."""
        if grad is not None:
            with DisableTorchFunction(), torch.no_grad():
                self._note_parameter(key, grad)

    def _note_parameter(self, key: int, grad: torch.Tensor) -> None:
        norm = _norm(grad)
        value = _copy(grad) if self._values else None
        for backward, name in self._awaiting.pop(key, {}).values():
            backward.params[name] = norm
            if value is not None:
                backward.param_values[name] = value

    # -- reading ---------------------------------------------------------------------------

    def table(self, *steps: int) -> str:
        """The layers with their formulas, then a line for each layer and step.

        `steps` are indices into `self.steps`, as `table(0, 1, -1)`; without any, all. |y| and |dy|
        are the norms of the output and of its gradient, `y <= 0` and `dx = 0` the two shares of
        dead units (see `Record`). A second backward through a step has lines of its own.
        """
        from . import watch_view

        return watch_view.table([self.steps[i] for i in steps] if steps else self.steps)

    def plot(self, path: StrPath | None = None) -> "Figure":
        """Plot the norms and the shares of dead units of every layer over the steps.

        A single step is plotted over the layers. Zero, which has no logarithm, is at the lower end
        of an axis, inf and NaN at the upper end. Returns the matplotlib Figure, which a notebook
        shows; with a `path` it is saved there, too. ImportError without matplotlib.
        """
        from . import watch_view

        figure = watch_view.plot(self.steps)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def __repr__(self) -> str:
        model = self._model()
        of = "a model that is gone" if model is None else type(model).__name__
        state = "on" if self._on else "off"
        return f"<nnmirror.watch of {of}: {len(self.steps)} steps, {state}>"

    def _repr_html_(self) -> str:
        from . import watch_view

        return watch_view.html(self.steps)


class _Tap:
    """On the node of a record's output (see `nnmirror.fast.tapped`)."""

    __slots__ = ("handles", "node", "params", "passes", "record", "watch")

    def __init__(
        self,
        watch: Watch,
        record: Record,
        params: list[tuple[str, int]],
        passes: bool,
        node: Node,
    ) -> None:
        self.watch, self.record, self.params, self.passes = watch, record, params, passes
        self.node = weakref.ref(node)
        self.handles: list[RemovableHandle] = []  # of the hooks in place of it

    def arrived(self, grad: torch.Tensor) -> None:
        self.watch._note_gradient(self.record, self.params, grad)

    def passed(self, grad: torch.Tensor) -> None:
        if self.passes:
            self.watch._passed_back(self.record, (grad,))

    def hook(self, node: Node) -> None:
        if self.watch._on:
            self.handles = self.watch._hook(self, node)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        node = self.node()
        if node is not None and node.taps:
            node.taps = tuple([tap for tap in node.taps if tap is not self])
            if not node.taps and node.node_state is TAPPED:
                node.node_state = RECORDED


@dataclass
class _Operation:
    """A record of an operation, until the step is over."""

    out: weakref.ref[torch.Tensor]
    version: int
    record: Record
    handles: Sequence[_Handle]


class _Shown(threading.local):
    """The running call of the model in this thread."""

    def __init__(self) -> None:
        self.inside: list[tuple[str, Module]] = []  # the modules called, the innermost last
        self.latest = -1  # the latest node that was examined


def _has_layers_only(module: Module) -> bool:
    """Does its forward call only layers?"""
    known = isinstance(module, Layer) or type(module) in (Sequential, ModuleList, ModuleDict)
    return known and "forward" not in vars(module)


class _Hook:
    """A hook of the watch on a module. On a copy of the module it removes itself."""

    def __init__(self, watch: Watch | None = None, name: str = "", act: Any = None) -> None:
        self.watch, self.name, self.act = watch, name, act

    def __call__(self, module: Module, *args: object) -> None:
        if self.watch is not None:
            self.act(self.name, module, *args)
            return
        every: tuple[tuple[dict[int, Any], ...], ...] = (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ),
        )
        for hooks, *flags in every:
            for key in [key for key, hook in hooks.items() if hook is self]:
                for registry in (hooks, *flags):
                    registry.pop(key, None)

    def __reduce__(self) -> "tuple[type[_Hook], tuple[()]]":
        return _Hook, ()


class _ByHand:
    """The backward of a layer driven by hand: reports its gradients to the watch."""

    def __init__(
        self,
        watch: Watch,
        call: Node | Call,
        records: list[Record],
        params: list[tuple[str, int]],
    ) -> None:
        self.watch, self.call, self.records, self.params = watch, call, records, params

    def __call__(self, gradient: Gradient = None) -> Gradient:
        call = way_back(self.call)
        assert call is not None
        if not self.watch._on:
            return call(gradient)
        self.watch._hook_parameters(self.params)
        # If it is left out, it is 1 for a scalar.
        grads = list(tape.tensors_in(torch.ones(()) if gradient is None else gradient))
        seen = self.records if len(grads) == len(self.records) else []
        for record, grad in zip(seen, grads, strict=False):
            self.watch._arrived(record, self.params, grad)
        try:
            result: Any = call(gradient)
        except Exception:
            for record in seen:
                record.backwards.pop()
            raise
        node = _node_of(self.call)
        if len(seen) == 1 and node is not None and len(node.inputs) == 1:
            self.watch._passed_back(seen[0], (result,))
        return result


def _innermost(call: object) -> object:
    while isinstance(call, _ByHand):
        call = call.call
    return call


def _node_of(call: object) -> Node | None:
    """The node of the one recorded call that a layer is; None for other modules."""
    call = _innermost(call)
    if isinstance(call, Node):
        return call
    if isinstance(call, NodeCall):
        return call.node
    if isinstance(call, Stacked):
        return _node_of(call.call)
    return _node_of(call.calls[0]) if isinstance(call, Each) else None


def _tensors_in(value: object) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [*tape.tensors_in(value)]


def _has_gradients(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _made(out: torch.Tensor) -> object:
    """The node of a tensor, as it is in the graph; None if there is none."""
    if not isinstance(out, tensor.Tensor):
        return out.grad_fn
    if out._view_of is None and out._node is not None and out._node.segment is None:
        return out._node
    with DisableTorchFunctionSubclass():
        target = tape.edge_of(out)[0]
    if not isinstance(target, Node):
        return None
    return target if target.segment is None else target.as_exposed()


def _takes_taps(node: object) -> TypeGuard[Node]:
    """Whether a walk through it can be bound."""
    return (
        isinstance(node, Node)
        and node.node_state in (RECORDED, TAPPED)
        and node.signature is not None
        and node.function.is_rule
        and node.theirs is None
        and len(node.outputs) == 1
    )


def _stands(handle: RemovableHandle) -> bool:
    """Does the object of a hook still exist?"""
    return handle.hooks_dict_ref() is not None


def _version(t: torch.Tensor) -> int:
    try:
        return t._version
    except RuntimeError:  # of inference mode
        return 0


# -- numbers -------------------------------------------------------------------------------


def _norm(t: torch.Tensor) -> float:
    """The square root of the sum of squares; for half precision, in float32."""
    if C_dtype(t) in _HALF:
        return _vector_norm(t, dtype=torch.float32).item()
    return _vector_norm(t).item()


def _copy(t: torch.Tensor) -> torch.Tensor:
    with DisableTorchFunction(), torch.no_grad():
        return t.detach().clone()


def _share(flags: torch.Tensor) -> float | None:
    """Of the units, those for which the flag is set for every sample."""
    if flags.dim() == 0 or flags.numel() == 0:
        return None
    rows = flags if flags.dim() == 2 else flags.reshape(-1, flags.shape[-1])
    return rows.all(0).sum().item() / rows.shape[1]


# -- formulas ------------------------------------------------------------------------------


_RECORDED = re.compile(r"Backward\d*$")
_INSIDE_A_NAME = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def _name_of(node: Node) -> str:
    """What was called: `leaky_relu` of LeakyReluBackward0, the class of a user's Function."""
    if not node.function.is_rule:
        return node.function.__name__
    return _INSIDE_A_NAME.sub("_", _RECORDED.sub("", tensor.bare(node.name()))).lower()


def _shape_at(edge: Edge) -> tuple[int, ...]:
    """Of the tensor that an edge leads to."""
    target, index = edge
    return tuple(target.outputs[index][0] if isinstance(target, Node) else target.shape)


def _plain(value: object) -> Any:
    """A record as dicts, lists, strings and numbers."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Record | Backward):
        return {name: _plain(v) for name, v in vars(value).items()}
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value
