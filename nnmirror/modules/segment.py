"""Consecutive layers called as one function, whose intermediate results are not exposed.

A Sequential calls its layers one by one until an input of the same layout has occurred a few times.
Then the calls that its layers record are written as a straight-line function, which computes the
same on plain tensors and records one node. Where the shape of the input keeps changing, the layers
are called one by one if they record, as generated calls take any size (see `signature.Family`);
otherwise one function takes any. The bound walk (`bound.py`) uses that node directly. For the
generic walk, and when a `grad_fn` is accessed, the layers' own nodes are made from the saved
tensors: the result is the same as that of calling the layers one by one.

A segment only has layers whose forward is one recorded call (`records_once`). At each call the
function checks that they have not changed: no hook, the same parameters, the same settings.
"""

from collections.abc import Mapping, Sequence
from operator import is_
from types import EllipsisType
from typing import Any, TypeAlias

import torch

from .. import _torch, fast, formula, tape
from .._state import sequence as _sequence
from .._torch import DisableTorchFunctionSubclass, is_any_autocast_enabled
from .._types import TorchFunction
from ..exact import mode as exact
from ..fast import source
from ..fast.leaves import signature_of_leaf
from ..fast.signature import THEIRS, CallInfo, LeafSignature, Signature, of_tensor, strides_by_rows
from ..fast.source import Unwritable
from ..grad_mode import is_grad_enabled
from ..moments import note_moment
from ..node import Edge, Node
from ..operation import Operation
from ..running import put_in_front
from ..tensor import Tensor, bare
from .explicit import Chain, Gradient, NodeCall, Untracked
from .layer import Layer
from .module import CALL_HOOKS, GLOBAL_HOOKS

# The target of a gradient, None for no gradient, or ... for the layer before.
_Edge: TypeAlias = Edge | EllipsisType | None
# What a layer records: the function and its arguments.
_Recorded: TypeAlias = tuple[type[Operation], tuple[object, ...]]
# An input of one layout, or the signature of the call that made it.
_Key: TypeAlias = tuple[object, ...]

_new_node = object.__new__
_MOST = 32  # at most, layouts of the input for which a run has segments
_MOST_SHAPES = 8  # of the input, before no more segments are written for one shape
_MOST_WAITING = 1024  # kinds of inputs whose calls are counted
_MOST_OF_ONE = 3  # segments for one layout: parameters may be frozen in turns


class Segment(Operation):
    """Stands for the calls of several layers until their own nodes are needed."""

    is_rule = True


class Inner:
    """What the node of one layer of a segment consists of."""

    def __init__(self, node: Node, params: set[int]) -> None:
        plan = node.plan
        if not isinstance(node, Node) or plan is None or node.dirty or len(node.outputs) != 1:
            raise Unwritable
        self.function, self.signature, self.given = node.function, node.signature, node.given
        self.needs, self.outputs = node.needs_input_grad, node.outputs
        self.plan = plan.fixed(node.given, node.label)
        self.call_info = CallInfo(node.places, self.needs, self.outputs, self.plan, node.label)
        self.caller: Any = getattr(node, "caller", None)
        self.edges: list[_Edge] = []
        for edge in node.edges:
            if edge is None or id(edge[0]) in params:
                self.edges.append(edge)
            else:
                self.edges.append(...)

    def into(
        self,
        node: Node,
        sequence: float,
        before: Edge | None,
        saved: Sequence[torch.Tensor | None] | None,
        versions: Sequence[int],
    ) -> None:
        """Make `node` that of the layer; `before` is the edge of its input."""
        node.function, node.given, node.caller = self.function, self.given, self.caller
        node.signature, node.call_info = self.signature, self.call_info
        node.edges = [before if edge is ... else edge for edge in self.edges]
        node.sequence = sequence  # type: ignore[assignment]
        node._saved, node._versions = saved, versions


class Form:
    """The layers that the node of a segment stands for, for one layout of the input.

    Each node has a reference to it. It refers to the parameters, but not to the layers.
    """

    def __init__(self, inner: list[Inner], visible: list[tuple[int, int]]) -> None:
        self.inner = inner
        # If the layers are frozen, and so is what comes before, the node is only for
        # `Module.backward`.
        self.is_tracked = any(True in made.needs for made in inner)
        if self.is_tracked and not all(True in made.needs for made in inner):
            raise Unwritable
        # Which of the saved tensors a user can change: (layer, place).
        self.visible = visible
        # Where its gradients go, in the order of the walk: ... for that of the input.
        targets: list[Any] = []
        for made in reversed(inner):
            for edge in made.edges:
                if edge is not None and (edge is not ... or made is inner[0]):
                    targets.append(edge if edge is ... else edge[0])
        self.targets = tuple(targets)
        signs = [made.signature for made in inner]
        key = tuple([sign and sign.own_serial for sign in signs]), tuple(visible)
        last = None if None in signs else signs[-1]
        sign: Signature = LeafSignature(len(inner)) if last is None else last.segment(key)
        self.signature = sign
        sign.needs, sign.places = (True,) * len(targets), range(len(targets))
        sign.outputs, sign.plan, sign.label = inner[-1].outputs, None, ""

    def nodes(self, node: Node, last: Node | None = None) -> list[Node]:
        """The layers' own nodes, from the tensors saved with `node`; `last` becomes the last
        one."""
        every = node._saved
        of_input = (t for t, of in zip(node.targets, self.targets, strict=True) if of is ...)
        target = next(of_input, None)
        before = None if target is None else (target, 0)
        sequence, count = node.sequence, len(self.inner)
        made: list[Node] = []
        for k, layer in enumerate(self.inner):
            saved: Any = None if every is None else every[k]
            versions = [0 if t is None else t._version for t in saved or ()]
            if saved:
                for (of, i), version in zip(self.visible, node._versions, strict=True):
                    if of == k:
                        versions[i] = version
            at = sequence - (count - 1 - k) / count
            new = last if k == count - 1 and last is not None else Node(layer.function)
            layer.into(new, at, before, saved, versions)
            made.append(new)
            before = new, 0
        return made

    def expand(self, node: Node) -> None:
        """Turn the node of a segment into that of its last layer, with edges to the others."""
        node.segment = node.signature = None
        node.before = self.nodes(node, node)[:-1]
        for made in node.before:
            put_in_front(made, made)


def nodes(node: Node) -> list[Node]:
    """The layers' own nodes, in the order of the layers."""
    if node.segment is not None:
        node.segment.expand(node)
    return [*node.before, node]


class Run:
    """Consecutive layers that record one call each."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        # The node of the latest call, for `Module.backward` of a layer.
        self.last: list[Node | None] = [None]
        self.one_by_one = NOT_RECORDED  # instead, if they were called one by one
        self.calls = [PartCall(self.last, i) for i in range(len(layers))]
        self.kept: dict[_Key, list[GeneratedSegment]] = {}
        self.waits: dict[_Key, int] = {}  # the number of calls until a segment is written
        self.patience: dict[_Key, int] = {}
        self.layouts: set[_Key] = set()  # of inputs for which there were segments
        # The shapes of inputs, by the rest of their layout.
        self.shapes: dict[_Key, set[torch.Size]] = {}
        self.samples: dict[_Key, tuple[torch.Size, GeneratedSegment]] = {}  # not in use yet
        self.again = _MOST  # how often a segment is written at once for such an input

    def __call__(self, x: Any) -> Any:
        """The output; NotImplemented if the layers have to be called one by one."""
        self.last[0] = None  # what an earlier call has saved is not kept until the next of its kind
        if type(x) is not torch.Tensor and type(x) is not Tensor:
            return NotImplemented
        with DisableTorchFunctionSubclass():
            if (
                is_any_autocast_enabled()
                or tape.in_transform() is not None
                or _torch.is_shown()
                or tape.forward_mode["_current_level"] >= 0
                or x.layout is not torch.strided
            ):
                return NotImplemented
            edge: Edge | None = None
            plain, over = x, None
            if not is_grad_enabled():
                if x.requires_grad and torch.is_grad_enabled():
                    return NotImplemented  # torch itself would record
                key: _Key = None, x.shape, x.stride(), x.dtype, x.device
            elif type(x) is Tensor or (
                x.requires_grad and not x.is_leaf and (over := tape.taken_over(x)) is not None
            ):
                x = plain = x if over is None else over
                node = x._node
                sign = None if node is None else node.signature
                if node is None or sign is None or not sign.is_single or sign.sizes:
                    return NotImplemented
                edge = node, 0
                key = sign.serial, exact.is_exact()
            else:
                key = exact.is_exact(), x.shape, x.stride(), x.dtype, x.device
                if x.requires_grad:  # for torch
                    note_moment()
                    key, edge, plain = (THEIRS, *key), (x, 0), x.detach()
            kept = self.kept.get(key)
            if kept is None and key[0] is None:
                kept = self.kept.get(_for_any_shape(key))
            for written in kept or ():
                made = _new_node(Node)
                try:
                    out = written.function(plain, made)
                except RuntimeError:  # inference mode: the layers raise
                    return NotImplemented
                if out is None:
                    continue
                form = written.form
                if form is None:
                    return out
                made.function, made.segment = Segment, form
                made.signature = made.call_info = form.signature
                made.targets = form.targets
                if edge is not None:
                    made.targets = tuple([edge[0] if t is ... else t for t in form.targets])
                made.sequence = next(_sequence)
                self.last[0] = made
                if form.is_tracked:
                    out.__class__ = Tensor
                    out._node = made
                return out
            return self._meet(key, x)

    def call(self) -> "Chain | WholeCall":
        """The latest call, for `Module.backward`."""
        if not is_grad_enabled():
            return NOT_RECORDED
        if self.last[0] is None:  # they were called one by one
            return self.one_by_one
        return WholeCall(self.last[0])

    def _meet(self, key: _Key, x: torch.Tensor) -> Any:
        """There is no segment for such an input: write one, if it occurs repeatedly."""
        layout = x.shape, x.stride(), x.dtype, x.device
        takes_any = False
        if len(key) == len(layout) + 1:  # a plain input
            of_any = _for_any_shape(key)
            shapes = self.shapes.setdefault(of_any, set())
            if len(shapes) < _MOST_SHAPES:
                shapes.add(x.shape)
            elif key[0] is not None:
                return NotImplemented
            else:
                key, takes_any = of_any, True
        left = self.waits.get(key)
        if left is None:
            # Before the walk is bound, as that of another graph would be bound for nothing.
            left = 0 if self._has_been_written() else max(fast.after - 2, 0)
            # The signature of an input changes when the layers before get their segment.
            if layout in self.layouts and self.again:
                left, self.again = 0, self.again - 1
        if left > 0 or x.is_inference():
            if len(self.waits) >= _MOST_WAITING:
                self.waits.clear()
                self.patience.clear()
            self.waits[key] = left - 1
            return NotImplemented
        # Wait for more calls each time that it is repeated: layers that keep changing are better
        # called one by one.
        self.waits[key] = self.patience[key] = 2 * self.patience.get(key, 8)
        with _torch.EnableTorchFunction():
            out, noted = self._watched(x)
        try:
            calls = [LayerCall(*call) for call in noted]
            written = GeneratedSegment(calls, self.calls, key[0] is not None, takes_any)
        except Unwritable:
            return out
        if takes_any:  # its source has to be the same for two shapes
            shape, before = self.samples.get(key, (None, written))
            if shape == x.shape:
                return out
            if before is written or not written.is_like(before):
                self.samples = {key: (x.shape, written)}
                if before is written:
                    self.waits[key] = 0
                return out
        written.compile()
        if len(self.kept) >= _MOST:
            oldest = [*self.kept][0]  # noqa: RUF015  another thread may change it meanwhile
            self.kept.pop(oldest, None)
        self.kept[key] = [written, *self.kept.get(key, ())][:_MOST_OF_ONE]
        self.layouts.add(layout)
        return out

    def _has_been_written(self) -> bool:
        """Was a segment written for layers whose parameters had the signatures of these?"""
        for layer in self.layers:
            for param in layer._parameters.values():
                if isinstance(param, Tensor) and param._requires_grad:
                    sign = param._signature or signature_of_leaf(param)
                    return sign is not None and sign.has_segments
        return False

    def _watched(
        self, x: object
    ) -> tuple[object, list[tuple[Layer, list[_Recorded], object, object]]]:
        """Call the layers one by one, and keep what each records."""
        noted: list[tuple[Layer, list[_Recorded], object, object]] = []
        way_back = []
        for layer in self.layers:
            calls: list[_Recorded] = []

            def run(
                function: type[Operation],
                *args: object,
                layer: Layer = layer,
                calls: list[_Recorded] = calls,
            ) -> Any:
                calls.append((function, args))
                return type(layer)._run(layer, function, *args)

            layer.__dict__["_run"] = run
            try:
                out = layer(x)
            finally:
                layer.__dict__.pop("_run", None)
            noted.append((layer, calls, x, out))
            way_back.append(layer._call_for_chain())
            x = out
        self.last[0], self.one_by_one = None, Chain(way_back)
        return x, noted


class GeneratedSegment:
    """The calls of a run of layers, as one function of the input and a node.

    It saves with the node what each layer saves, and returns the output; None if a layer has
    changed. It holds no tensors except the parameters.
    """

    def __init__(
        self, calls: "list[LayerCall]", parts: "list[PartCall]", records: bool, takes_any: bool
    ) -> None:
        self.text = SegmentSource(calls)
        for call in calls:
            if call.passes_on:
                self.text.left_by(call, call.layer._call)
        calls = [call for call in calls if not call.passes_on]
        if not calls:
            raise Unwritable
        if not records:
            self.form: Form | None = None
            self._infer(calls, takes_any)
        else:
            params = {id(p) for call in calls for p in call.params.values() if p is not None}
            inner = [Inner(call.node(), params) for call in calls]
            self.form = Form(inner, self._record(calls, inner, parts))

    def compile(self) -> None:
        self.compiled = self.text.compiled()
        self.function = self.compiled.function

    def is_like(self, other: "GeneratedSegment") -> bool:
        """Is the source the same?"""
        mine, others = self.text, other.text
        names = others.environment
        return (
            mine.lines == others.lines
            and mine.guards == others.guards
            and all(source.is_same(mine.environment.get(name), names[name]) for name in names)
        )

    def _infer(self, calls: "list[LayerCall]", takes_any: bool) -> None:
        for k, call in enumerate(calls):
            function = call.function
            choose = function.choose_for_any_size if takes_any else function.choose
            compute = choose(*call.args) or function.infer
            if compute is None or (function.is_inplace and k == 0):
                raise Unwritable
            if 0 < k < len(calls) - 1:
                compute = _in_place(compute) or compute
            self.text.call("h", compute, call)
            self.text.left_by(call, None)

    def _record(
        self, calls: "list[LayerCall]", inner: list[Inner], parts: "list[PartCall]"
    ) -> list[tuple[int, int]]:
        """Write the part that records; returns which of the saved tensors a user can change."""
        text = self.text
        text.lines.append("version = h._version")
        visible: list[tuple[int, int]] = []
        versions: list[str] = []
        for k, (call, made) in enumerate(zip(calls, inner, strict=True)):
            plan, last = made.plan, k == len(calls) - 1
            text.lines.append(f"# {bare(made.call_info.label or made.function.node_name())}")
            before: list[str] = []  # saved before the call, ...
            after: list[str] = []  # ... and after it
            for i, place in enumerate(plan.saves):
                if place >= 0:
                    if after:
                        raise Unwritable
                    word = text.word(call, call.args[place])
                    if i in plan.memory and (k == 0 or word != "h"):
                        before.append("h.detach()" if word == "h" else f"{word}._plain")
                    else:
                        before.append(word)
                    if word != "h" or k == 0:
                        visible.append((k, i))
                        versions.append("version" if word == "h" else f"{word}._version")
                elif last:  # saved itself, it would keep itself alive
                    after.append("h.detach()")
                    visible.append((k, i))
                    versions.append("0")
                else:
                    after.append("h")
            hidden = k > 0 and formula.RESULT not in inner[k - 1].plan.saves
            compute = plan.compute
            if call.function.is_inplace:
                if not hidden:
                    raise Unwritable
            elif hidden and not last and "h" not in before:
                compute = _in_place(compute) or compute
            if before:
                text.lines.append(f"s{k} = ({', '.join(before)},)")
            if isinstance(plan, formula.PlanOfMore):
                text.call("h, *k", compute, call)
                after += [f"k[{i}]" for i in plan.kept]
            else:
                text.call("h", compute, call)
            if plan.saves_number:
                after.append("None")
            if after or not before:
                kept = f"({', '.join(after)},)" if after else "()"
                text.lines.append(f"s{k} {'+' if before else ''}= {kept}")
        text.lines.append(f"node._saved = [{', '.join(f's{k}' for k in range(len(calls)))}]")
        text.lines.append(f"node._versions = ({' '.join(f'{v},' for v in versions)})")
        for call, part in zip(calls, parts, strict=False):
            text.left_by(call, part)
        return visible


def _in_place(compute: object) -> TorchFunction | None:
    """Torch's function that computes the same into the memory of its argument, if it has one."""
    name = getattr(compute, "__name__", "")
    for home in (torch, torch._C._nn):
        if getattr(home, name, None) is compute:
            return getattr(home, f"{name}_", None)
    return None


class LayerCall:
    """What one layer recorded."""

    def __init__(self, layer: Layer, calls: list[_Recorded], given: object, out: object) -> None:
        if len(calls) != 1 or calls[0][0] is None or not records_once(layer):
            raise Unwritable
        self.layer, self.given, self.out = layer, given, out
        self.function, self.args = calls[0]
        self.passes_on = out is given and not self.function.is_inplace
        if self.function.exact is not None:
            self.function = exact.chosen(self.function)
        formulas = self.function.formulas
        if formulas is None or formulas.several:
            raise Unwritable
        if any(isinstance(a, torch.Tensor) for a in self.args[len(formulas.names) :]):
            raise Unwritable  # one of any number of tensors
        self.params = dict(layer._parameters)

    def node(self) -> Node:
        """The node that the call recorded, or would have recorded if anything required grad."""
        node = self.layer._call
        if isinstance(node, Untracked) and type(self.out) is torch.Tensor:
            try:
                return node.made()
            except RuntimeError:  # for complex numbers, or weights of inference mode
                raise Unwritable from None
        if not isinstance(node, Node) or getattr(self.out, "_node", None) is not node:
            raise Unwritable
        return node  # type: ignore[return-value]


class SegmentSource:
    """The source of a segment, being written.

    In it h is the value passed from layer to layer, w0, w1 ... are the parameters, s0, s1 ... what
    the layers save, m0, m1 ... the `__dict__`s of the layers.
    """

    def __init__(self, calls: "list[LayerCall]") -> None:
        self.lines: list[str] = []
        self.environment: dict[str, object] = {}
        self.params: dict[int, str] = {}
        self.owned: dict[int, str] = {}
        self.guards: list[str] = []
        for hooks in GLOBAL_HOOKS:
            self.guards.append(self.constant(hooks, "hooks"))
        kinds: dict[type, str] = {type(call.layer): "" for call in calls}
        for kind in kinds:
            name = kinds[kind] = self.constant(kind, kind.__name__)
            for method in ("forward", "backward", "__call__"):
                now = self.constant(getattr(kind, method), f"{kind.__name__}_{method}")
                self.guards.append(f"{name}.{method} is not {now}")
        for call in calls:
            layer = call.layer
            if id(layer) in self.owned:
                continue
            at = len(self.owned)
            own = self.owned[id(layer)] = f"m{at}"
            self.environment[own], self.environment[f"layer{at}"] = layer.__dict__, layer
            self.guards.append(f"type(layer{at}) is not {kinds[type(layer)]}")
            self.guards += [f'{own}["{name}"]' for name in CALL_HOOKS]
            self.guards.append(f'"forward" in {own}')
            for name, param in call.params.items():
                word = "None" if param is None else self.param(param)
                self.guards.append(f'{own}["_parameters"]["{name}"] is not {word}')
            for name in ("training", *getattr(layer, "__constants__", ())):
                if name not in layer.__dict__:
                    continue
                value = self.constant(layer.__dict__[name], name)
                self.guards.append(f'{own}["{name}"] is not {value}')

    def param(self, param: Any) -> str:
        """The name of a parameter, and a check that it has not changed."""
        name = self.params.get(id(param))
        if name is None:
            name = self.params[id(param)] = f"w{len(self.params)}"
            self.environment[name] = param
            if tape.dispatch_kind(type(param)) is not tape.MIRRORED or param._node is not None:
                raise Unwritable
            if param._requires_grad:
                sign = param._signature or signature_of_leaf(param)
                if sign is None:
                    raise Unwritable  # it has hooks
                self.guards.append(f"{name}._signature is not {self.constant(sign, 'sign')}")
            else:
                self.environment["layout_of"] = of_tensor
                layout = self.constant(of_tensor(param), "layout")
                self.guards.append(
                    f"{name}._requires_grad or {name}._node or layout_of({name}._plain) != {layout}"
                )
        return name

    def word(self, call: LayerCall, arg: object) -> str:
        """The source for an argument of a call."""
        if arg is call.given:
            return "h"
        if arg is None:
            return "None"
        if any(arg is p for p in call.params.values()):
            return self.param(arg)
        if isinstance(arg, torch.Tensor):
            raise Unwritable
        return repr(arg) if type(arg) in (int, str, bool) else self.constant(arg, "value")

    def call(self, result: str, compute: object, call: LayerCall) -> None:
        words = ", ".join([self.word(call, arg) for arg in call.args])
        self.lines.append(f"{result} = {source.name_of(compute, self.environment)}({words})")

    def left_by(self, call: LayerCall, part: object) -> None:
        """The call that `Module.backward` of the layer uses."""
        value = "None" if part is None else self.constant(part, "call")
        self.lines.append(f'{self.owned[id(call.layer)]}["_call"] = {value}')

    def constant(self, value: object, name: str) -> str:
        """The name of a constant."""
        name = f"{name.strip('_')}_{len(self.environment)}"
        self.environment[name] = value
        return name

    def compiled(self) -> source.Compiled:
        text = "\n".join(
            [
                "def forward(h, node):",
                "    try:",
                "        if (",
                *[f"            {'or ' if i else ''}{g}" for i, g in enumerate(self.guards)],
                "        ): return None",
                "    except KeyError: return None",
                *[f"    {line}" for line in self.lines],
                "    return h\n",
            ]
        )
        return source.Compiled(text, "forward", "segment", self.environment)


def _for_any_shape(key: _Key) -> _Key:
    """The key of inputs that differ from one with this key by the shape only."""
    is_exact, shape, stride, *rest = key
    return is_exact, len(shape), stride == strides_by_rows(shape), *rest  # type: ignore[arg-type]


class PartCall:
    """The call of one layer of a run, in case its `Module.backward` is used."""

    def __init__(self, last: list[Node | None], place: int) -> None:
        self.last, self.place = last, place

    def __call__(self, gradient: Gradient = None) -> Gradient:
        node = self.last[0]
        assert node is not None
        return NodeCall(nodes(node)[self.place])(gradient)


NOT_RECORDED = Chain([None])


class WholeCall:
    """The call of a run."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __call__(self, gradient: Gradient = None) -> Gradient:
        return Chain([NodeCall(node) for node in nodes(self.node)])(gradient)


def records_once(layer: Layer) -> bool:
    """Does the forward of this layer consist of one recorded call, which its backward
    differentiates?"""
    kind = type(layer)
    by_run = kind._run is Layer._run or getattr(kind._run, "_records_once", False)
    by_run = by_run and kind.backward is Layer.backward
    return by_run and getattr(kind.forward, "_records_once", False)


def is_part(layer: object) -> bool:
    """Can this be a layer of a run?"""
    return isinstance(layer, Layer) and records_once(layer) and not is_hooked(layer)


def is_hooked(layer: object) -> bool:
    """Does the module have hooks for its calls?"""
    own = getattr(layer, "__dict__", {})
    for name in CALL_HOOKS:  # noqa: SIM110  (asked at each call of a frozen Sequential)
        if own.get(name):
            return True
    return False


class Runs:
    """The runs of layers among the modules of a Sequential."""

    def __init__(self, modules: Mapping[str, object]) -> None:
        self.modules: list[Any] = [*modules.values()]
        self.hooked = [is_hooked(module) for module in self.modules]
        self.at: dict[int, Run] = {}  # by the index of the first layer
        start = 0
        for place, module in enumerate([*self.modules, None]):
            if not is_part(module):
                if place - start > 1:
                    self.at[start] = Run(self.modules[start:place])
                start = place + 1
        first = self.at.get(0)
        all_of_it = first is not None and len(first.layers) == len(self.modules)
        self.whole = first if all_of_it else None

    def stand(self, modules: Mapping[str, object]) -> bool:
        """Are the modules, and those of them that have hooks, unchanged?

        If all of them form one run, the run checks the hooks itself.
        """
        if not self.are(modules):
            return False
        return self.whole is not None or self.hooked == [*map(is_hooked, self.modules)]

    def are(self, modules: Mapping[str, object]) -> bool:
        """Are these still the modules?"""
        return len(modules) == len(self.modules) and all(map(is_, modules.values(), self.modules))
