"""Recorders for calls without a signature: one function for all calls with the same kinds of
arguments.

A call whose shapes differ each time (a slice that grows, sequences of different lengths) has no
signature, nor has an in-place change of a view. All else that its node needs follows from the rule,
from the types of the arguments, and from which of them require grad. For these, a function is
written as Python source: it checks the arguments, computes, and makes the node. So are calls that
need no gradient at all, whose node serves a layer's `backward`.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .. import formula
from .. import tape as _tape
from .. import tensor as _tensor
from .. import views as _views
from .._types import Args
from .._upcalls import implements
from ..operation import Operation
from . import source
from .call import GUARDS
from .signature import MORE, MOST_ARGUMENTS, CallInfo, Made

# Records a call with these arguments (an in-place change is passed as `change`); returns None,
# before anything is computed, if they do not fit.
Recorder: TypeAlias = Callable[..., Made | None]

_MOST = 64  # at most, recorders of one rule
_HOMES = ("builtins", "torch")  # for the types of arguments; a user's own types are not kept


@implements(_tape)
def learn(
    function: type[Operation],
    args: Args,
    needs: tuple[bool, ...],
    in_place: bool = False,
) -> None:
    """Write a recorder for calls like this one, if there was one before."""
    if len(args) > MOST_ARGUMENTS:
        return
    recorders = function.recorders_in_place if in_place else function.recorders
    kinds = tuple(map(type, args))
    known = recorders.get(kinds)
    if known is None:
        if len(recorders) >= _MOST:
            recorders.clear()
        if all(map(_is_kept, kinds)):
            recorders[kinds] = _takes_none, ()
        return
    recorder, learned = known
    if needs not in learned:
        text = RecorderSource(function, args, needs, recorder, in_place)
        recorders[kinds] = text.written() or recorder, (*learned, needs)


def _takes_none(*args: object) -> None:
    return None


def _is_kept(kind: type) -> bool:
    """Neither a tensor subclass, which has its own dispatch, nor a user's class."""
    sort = _tape.dispatch_kind(kind)
    return kind.__module__ in _HOMES if sort is _tape.OTHER else sort is not _tape.SUBCLASS


class _Infos(dict[tuple[Any, ...], CallInfo]):
    """The `call_info` of nodes, by the layout of their results, and by their label or plan.

    It is shared, so that the garbage collector has fewer objects to visit.
    """

    def __init__(
        self, places: tuple[int, ...], needs: tuple[bool, ...], plan: formula.Plan | None
    ) -> None:
        self.places, self.needs, self.plan = places, needs, plan

    def __missing__(self, key: tuple[Any, ...]) -> CallInfo:
        if len(self) >= _MOST_LAYOUTS:
            self.clear()
        shape, dtype, device, more = key
        if device is True:  # it is_cpu, which is faster to ask
            device = _CPU
        plan, label = (more, more.label) if self.plan is None else (self.plan, more)
        outputs = ((shape, dtype, device),)
        made = self[key] = CallInfo(self.places, self.needs, outputs, plan, label)
        return made


_MOST_LAYOUTS = 2048
_CPU = torch.device("cpu")


class RecorderSource:
    """The source of the recorder for arguments of these types, of which those in `needs` require
    grad.

    It passes arguments of these types that do not fit to `other`. `in_place`: the recorded call
    changes its first argument.
    """

    def __init__(
        self,
        function: type[Operation],
        args: Args,
        needs: tuple[bool, ...],
        other: Recorder,
        in_place: bool,
    ) -> None:
        self.function, self.args, self.needs, self.in_place = function, args, needs, in_place
        self.names = [f"a{i}" for i in range(len(args))]
        self.places = tuple([i for i, a in enumerate(args) if isinstance(a, torch.Tensor)])
        self.has_one_label = function.named_by_types and tuple not in map(type, args)
        self.on = "return other(args, change)" if in_place else "return other(args)"
        self.environment: source.Environment = {
            **_tape.named_in_calls(),
            "Tensor": _tensor.Tensor,
            "device_of": _tensor.C_device,
            "dtype_of": _tensor.C_dtype,
            "finished": _tape.finished,
            "made_by": _tape.made_by,
            "meta_of": _tape.meta_of,
            "needs": needs,
            "places": self.places,
            "new": object.__new__,
            "other": other,
            "plain": torch.Tensor,
            "rebase_history_of": _views.rebase_history_of,
            "regenerate_grad_fn": _views.regenerate_grad_fn,
            "rule": function,
            "shape_of": _tensor.C_shape,
        }
        self.taken = {
            *self.environment,
            *self.names,
            *(
                "alias",
                "args",
                "base",
                "before",
                "change",
                "defaults",
                "dtype",
                "edge",
                "given",
                "how",
            ),
            *("in_place", "is_new", "kind", "label", "infos", "infos_of_part", "node", "out"),
            *("plan", "plan_for", "record", "sign", "version", "view", "zeros"),
        }

    def written(self) -> Recorder | None:
        """The recorder; None if there can be none."""
        function, formulas = self.function, self.function.formulas
        first = self.args[0] if self.args else None
        if formulas is None or formulas.several or function.is_inplace:
            return None
        if function.is_view and any(self.needs) and not isinstance(first, _tensor.Tensor):
            return None
        if any(
            need and not isinstance(arg, _tensor.Tensor)
            for arg, need in zip(self.args, self.needs, strict=True)
        ):
            return None
        lines = self.of_change(formulas) if self.in_place else self.of_call(formulas)
        if lines is None:
            return None
        names = self.names
        head = f"{_tuple(names)} = args" if names else "pass"
        text = "\n    ".join(
            [
                f"def record(args{', change' if self.in_place else ''}):",
                head,
                *GUARDS,
                "with disabled():",
                *[f"    {line}" for line in lines],
            ]
        )
        kind = f"recorder of {function.__name__}"
        compiled = source.Compiled(text + "\n", "record", kind, self.environment)
        self.environment["compiled"] = compiled  # its source is there as long as the function
        return compiled.function

    def called(self, function: Callable[..., object], *before: str) -> str:
        word = source.name_of(function, self.environment, self.taken)
        return f"{word}({', '.join([*before, *self.names])})"

    def asked(self, places: Sequence[int]) -> tuple[list[str], list[str]]:
        """The checks of the arguments, and the source of what their gradients go to."""
        lines: list[str] = []
        targets: list[str] = []
        for place in places:
            name, arg, need = self.names[place], self.args[place], self.needs[place]
            target = "None"
            if isinstance(arg, _tensor.Tensor):
                if need and arg._node is not None:
                    lines += [
                        f"if ({name}_node := {name}._node) is None: {self.on}",
                        f"if ({name}_view := {name}._view_of) is not None"
                        f" and {name}_view[1] != {name}._version: {self.on}",
                    ]
                    target = f"{name}_node"
                else:
                    target = name if need else "None"
                    asked = "not " if need else ""
                    lines.append(
                        f"if {name}._node is not None or {asked}{name}._requires_grad or"
                        f" {name}._stands_for is not None or {name}.is_complex(): {self.on}"
                    )
            elif isinstance(arg, torch.Tensor):
                lines.append(f"if {name}.requires_grad or {name}.is_complex(): {self.on}")
            targets.append(target)
        return lines, targets

    def indices(self, targets: Sequence[str]) -> list[str]:
        """The lines for the outputs that they are of, once the node has its `call_info`."""
        numbers = [
            f"a{i}._output_nr" if target.endswith("_node") else "0"
            for i, target in enumerate(targets)
        ]
        further = [number for number in numbers if number != "0"]
        if not further:
            return []
        return [f"if {' or '.join(further)}: node.indices = {_tuple(numbers)}"]

    def given(self, plan: formula.Plan, formulas: "formula.Formulas") -> str:
        """The source of the gradients' other arguments than tensors; "" if there are none."""
        if plan.given is None:
            return ""
        self.environment["how"], self.environment["defaults"] = formulas.how, formulas.defaults
        self.environment["as_now"] = formula.as_now
        words = list(plan.given_as)
        for i, arg in enumerate(self.args):
            if isinstance(arg, _tensor.Tensor):  # faster than a tracked tensor's own shape
                words = [f"shape_of(a{i})" if w == f"args[{i}].shape" else w for w in words]
        return _tuple(words)

    def of_call(self, formulas: "formula.Formulas") -> list[str]:
        """The lines for a call that returns a new tensor, or a view."""
        function, args, names = self.function, self.args, self.names
        lines, targets = self.asked(range(len(args)))
        lines.append(f"out = {self.called(formulas.compute)}")
        if formulas.refuse is not None:
            lines.append(self.called(formulas.refuse, "needs"))
        lines += [
            "node = new(Node)",
            "node.function = rule",
            "node.signature = None",
            f"node.targets = {_tuple(targets)}",
        ]
        plan: formula.Plan | None = None
        more = "''"
        if formulas.by_layout:
            self.environment["plan_for"] = formulas.plan
            lines.append("plan = plan_for(args, needs)")
            more = "plan"
        else:
            plan = self.environment["plan"] = formulas.plan_by_kinds(args, self.needs)
            given = self.given(plan, formulas)
            if given:
                lines.append(f"node._given = {given}")
            if self.has_one_label:
                more = repr(function.label_of(*args))
            elif formulas.labels:
                lines.append(f"label = {self.called(function.label_of)}")
                more = "label"
        self.environment["infos"] = _Infos(self.places, self.needs, plan)
        if formulas.has_more and not function.materialize_grads:
            lines.append("node.materialize_grads = False")
        if function.saved_memory is not None:
            lines.append("plan.refuse_inference(node, args)")
        kept_apart = type(plan) is not formula.Plan or plan.copied or plan.memory
        if kept_apart:
            lines += [
                f"node.call_info = infos[None, None, None, {more}]",
                "node._saved = node._versions = ()",
                "out = plan.keep(node, args, out, apart=True)",
            ]
        handed_on = [
            f"out is not {n}" for n, a in zip(names, args, strict=True) if type(a) is torch.Tensor
        ]
        is_new = ["type(out) is plain", *handed_on, "(dtype := out.dtype).is_floating_point"]
        lines += [
            f"if is_new := {' and '.join(is_new)}:",
            f"    node.call_info = infos[out.shape, dtype, out.is_cpu or out.device, {more}]",
            "else:",
            f"    node.call_info = infos[None, None, None, {more}]",
            *self.indices(targets),
        ]
        if plan is not None and not kept_apart:
            if formula.RESULT in plan.saves:
                lines.append("alias = out.detach()")
            lines += self.saved(plan, ["alias" if i < 0 else names[i] for i in plan.saves])
        if not any(self.needs):  # the node is for `Module.backward`
            return [*lines, "if not is_new: node.outputs = (meta_of(out),)", "return out, node"]
        lines += [
            "if not is_new: return finished(node, out, args)",
            "node.sequence = next(sequence)",
            "out.__class__ = Tensor",
            "out.__dict__ = {'_node': node}",
        ]
        if function.is_view:
            version = "a0_view[1]"  # that of the memory, as was asked above
            if not self.needs[0] or args[0]._node is None:
                lines.append("a0_view = a0._view_of")
                version = "out._version"
            lines += [
                "if a0_view is None:",
                "    out._view_of = (a0, out._version, 'default')",
                "else:",
                f"    out._view_of = (a0_view[0], {version}, a0_view[2])",
            ]
        lines.append("return out, node")
        return lines

    def saved(self, plan: formula.Plan, words: Sequence[str]) -> list[str]:
        """The lines that save these with the node."""
        if not words:
            nothing = "(None,)" if plan.saves_number else "()"
            return [f"node._saved = node._versions = {nothing}"]
        self.environment["zeros"] = (0,) * len(words)
        versions = [f"{word}._version" for word in words]
        return [
            f"node._saved = {_tuple(words)}",
            "try:",
            f"    node._versions = {_tuple(versions)} if {' or '.join(versions)} else zeros",
            "except RuntimeError:  # one of inference mode",
            "    node.save_for_backward(*node._saved)",
        ]

    def of_change(self, formulas: "formula.Formulas") -> list[str] | None:
        """The lines for an in-place change of a recorded result, or of a view of one."""
        function, args, needs = self.function, self.args, self.needs
        if formulas.by_layout or formulas.has_more or function.is_view or not needs[0]:
            return None
        plan = formulas.plan_by_kinds(args, needs)
        if type(plan) is not formula.Plan or plan.copied or plan.memory:
            return None
        lines, targets = self.asked(range(1, len(args)))
        self.environment["MORE"] = MORE
        targets.insert(0, "a0_node")
        lines += [
            f"if {name} is a0: {self.on}"
            for name, arg in zip(self.names[1:], args[1:], strict=True)
            if isinstance(arg, torch.Tensor)
        ]
        lines += [
            f"if (a0_node := a0._node) is None: {self.on}",
            "if (view := a0._view_of) is None:",
            "    base = None",
            "    if (sign := a0_node.signature) is not None"  # then this one gets one, too
            f" and sign.varying.get(rule) is not MORE: {self.on}",
            "else:",
            "    base, version, kind = view",
            "    if type(base) is not Tensor or base._node is None or version == -1"
            f" or kind != 'default': {self.on}",
        ]
        if not {0, formula.RESULT}.isdisjoint(plan.saves):  # these need the graph that made it
            lines += [
                "if view is not None and version != a0._version:",
                "    regenerate_grad_fn(a0)",
                "    a0_node = a0._node",
            ]
        saved, versions = [], []
        for place in plan.saves:
            if place == 0:  # its value before the change
                lines.append("before = a0.clone()")
                saved.append("before")
                versions.append("0")
            elif place < 0:
                saved.append("a0.detach()")
                versions.append("a0._version")
            else:
                name = self.names[place]
                lines += [
                    "try:",
                    f"    {name}_version = {name}._version",
                    "except RuntimeError:  # one of inference mode",
                    f"    {self.on}",
                ]
                saved.append(name)
                versions.append(f"{name}_version")
        given = self.given(plan, formulas)
        if given:
            lines.append(f"given = {given}")
        label = function.label_of(*args) if self.has_one_label else ""
        more = repr(function.in_place.get(label or function.node_name(), label))
        if formulas.labels and not self.has_one_label:
            self.environment["in_place"] = function.in_place
            lines += [
                f"label = {self.called(function.label_of)}",
                f"label = in_place.get(label or {function.node_name()!r}, label)",
            ]
            more = "label"
        if formulas.refuse is not None:
            lines.append(self.called(formulas.refuse, "needs"))
        of_part = (needs[0] and not function.overwrites, *needs[1:])
        self.environment["infos"] = _Infos(self.places, needs, plan)
        self.environment["infos_of_part"] = _Infos(self.places, of_part, plan)
        if not saved:
            saved = versions = ["None"] if plan.saves_number else []
        return [
            *lines,
            "change()",
            "node = new(Node)",
            "node.function = rule",
            "node.signature = None",
            f"node.targets = {_tuple(targets)}",
            *(["node._given = given"] if given else []),
            f"node._saved = {_tuple(saved)}",
            f"node._versions = {_tuple(versions)}",
            "node.call_info = (infos if base is None else infos_of_part)"
            f"[shape_of(a0), dtype_of(a0), device_of(a0), {more}]",
            *self.indices(targets),
            "node.sequence = next(sequence)",
            "if base is None:",
            "    made_by(a0, node, 0)",
            "else:",
            "    edge = base._node, base._output_nr",
            "    rebase_history_of(node, a0, base, edge, places, needs,"
            f" {formula.RESULT in plan.saves})",
            "return a0, node",
        ]


def _tuple(words: Sequence[str]) -> str:
    return f"({', '.join(words)}{',' if len(words) == 1 else ''})"
