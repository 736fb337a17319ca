"""Recorders for calls without a signature: one function for all calls with the same kinds of
arguments.

A call whose shapes differ each time (a slice that grows, sequences of different lengths) has no
signature. All else that its node needs follows from the rule, from the types of the arguments, and
from which of them require grad. For these, a function is written as Python source: it checks the
arguments, computes, and makes the node.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from .. import formula
from .. import tape as _tape
from .. import tensor as _tensor
from .. import views as _views
from .._upcalls import implements
from . import source

# Records a call with these arguments; returns None, before anything is computed, if they do not
# fit.
Recorder: TypeAlias = Callable[[tuple[Any, ...]], "tuple[Any, _tape.Node] | None"]

_MOST = 64  # kept for one rule
_HOMES = ("builtins", "torch")  # for the types of arguments; a user's own types are not kept


@implements(_tape)
def learn(function: type[_tape.Function], args: tuple[Any, ...], needs: tuple[bool, ...]) -> None:
    """Write a recorder for calls like this one, if there was one before."""
    kinds = tuple(map(type, args))
    known = function.recorders.get(kinds)
    if known is None:
        if len(function.recorders) >= _MOST:
            function.recorders.clear()
        if all(map(_is_kept, kinds)):
            function.recorders[kinds] = _takes_none, ()
        return
    recorder, learned = known
    if needs not in learned:
        recorder = _written(function, args, needs, recorder) or recorder
        function.recorders[kinds] = recorder, (*learned, needs)


def _takes_none(args: tuple[Any, ...]) -> None:
    return None


def _is_kept(kind: type) -> bool:
    """Neither a tensor subclass, which has its own dispatch, nor a user's class."""
    sort = _tape.kind_of(kind)
    return kind.__module__ in _HOMES if sort is _tape.OTHER else sort is not _tape.SUBCLASS


def _written(
    function: type[_tape.Function], args: tuple[Any, ...], needs: tuple[bool, ...], other: Recorder
) -> Recorder | None:
    """The recorder for arguments of these types, of which those in `needs` require grad.

    It passes arguments of these types that do not fit to `other`.
    """
    formulas = function.formulas
    first = args[0] if args else None
    if formulas is None or formulas.several or function.is_inplace:
        return None
    if function.is_view and not isinstance(first, _tensor.Tensor):
        return None
    names = [f"a{i}" for i in range(len(args))]
    environment: dict[str, Any] = {
        "Node": _tape.Node,
        "Tensor": _tensor.Tensor,
        "finished": _tape.finished,
        "needs": needs,
        "new": object.__new__,
        "other": other,
        "outputs": _outputs,
        "remember": _remember,
        "places": tuple([i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]),
        "plain": torch.Tensor,
        "rule": function,
        "sequence": _tape._sequence,
        "view_from": _views.view_from,
    }
    taken = {
        *environment,
        *names,
        "alias",
        "args",
        "changed",
        "dtype",
        "meta",
        "node",
        "out",
        "plan",
        "record",
    }
    lines: list[str] = []
    edges: list[str] = []
    for name, arg, need in zip(names, args, needs, strict=True):
        edge = "None"
        if isinstance(arg, _tensor.Tensor):
            if need and arg._node is not None:
                lines += [
                    f"if ({name}_node := {name}._node) is None: return other(args)",
                    f"if ({name}_view := {name}._view_of) is not None"
                    f" and {name}_view[1] != {name}._version: return other(args)",
                ]
                edge = f"({name}_node, {name}._output_nr)"
            else:
                edge = f"({name}, 0)" if need else "None"
                asked = "not " if need else ""
                lines.append(
                    f"if {name}._node is not None or {asked}{name}._requires_grad"
                    f" or {name}._stands_for is not None or {name}.is_complex(): return other(args)"
                )
        elif isinstance(arg, torch.Tensor):
            if need:
                return None
            lines.append(f"if {name}.requires_grad or {name}.is_complex(): return other(args)")
        edges.append(edge)

    def called(function: Any, *before: str) -> str:
        word = source.name_of(function, environment, taken)
        return f"{word}({', '.join([*before, *names])})"

    lines.append(f"out = {called(formulas.compute)}")
    if formulas.refuse is not None:
        lines.append(called(formulas.refuse, "needs"))
    lines += [
        "node = new(Node)",
        "node.function, node._places, node._needs_input_grad = rule, places, needs",
        "node.signature = node.like = None",
        f"node.edges = {_tuple(edges)}",
    ]
    if formulas.by_layout:
        environment["plan_for"] = formulas.plan
        lines += [
            "node._plan = plan = plan_for(args, needs)",
            "if plan.label: node._label = plan.label",
        ]
        plan = None
    else:
        plan = environment["plan"] = formulas.plan_by_kinds(args, needs)
        lines.append("node._plan = plan")
        if plan.given is not None:
            environment["how"], environment["defaults"] = formulas.how, formulas.defaults
            lines.append(f"node.given = {_tuple(plan.given_as)}")
        if formulas.labels:
            lines.append(f"node._label = {called(function.label_of)}")
    if formulas.has_more and not function.materialize_grads:
        lines.append("node.materialize_grads = False")
    if function.saved_memory:
        lines.append("plan.refuse_inference(node, args)")
    if plan is None or type(plan) is not formula.Plan or plan.copied or plan.memory:
        lines.append("node._saved = node._versions = ()")
        lines.append("out = plan.keep_apart(node, args, out)")
    elif plan.saves:
        if formula.RESULT in plan.saves:
            lines.append("alias = out.detach()")
        saved = ["alias" if i < 0 else names[i] for i in plan.saves]
        environment["zeros"] = (0,) * len(saved)
        versions = [f"{name}._version" for name in saved]
        lines += [
            f"node._saved = {_tuple(saved)}",
            "try:",
            f"    changed = {' or '.join(versions)}",
            f"    node._versions = {_tuple(versions)} if changed else zeros",
            "except RuntimeError:  # one of inference mode",
            "    node.save_for_backward(*node._saved)",
        ]
    elif plan.saves_number:
        lines.append("node._saved = node._versions = (None,)")
    else:
        lines.append("node._saved = node._versions = ()")
    handed_on = [f"out is {n}" for n, a in zip(names, args, strict=True) if type(a) is torch.Tensor]
    lines.append(f"if {' or '.join(['type(out) is not plain', *handed_on])}:")
    lines += [
        "    return finished(node, out, args)",
        "dtype = out.dtype",
        "if not dtype.is_floating_point: return finished(node, out, args)",
        "meta = out.shape, dtype, out.device",
        "node._outputs = outputs.get(meta) or remember(meta)",
        "node.sequence = next(sequence)",
        "out.__class__ = Tensor",
        "out._node = node",
    ]
    if function.is_view:
        lines.append("out._view_of = view_from(a0, out)")
    lines.append("return out, node")
    head = f"{_tuple(names)} = args" if names else "pass"
    text = "\n    ".join(["def record(args):", head, *lines]) + "\n"
    compiled = source.Compiled(text, "record", f"recorder of {function.__name__}", environment)
    environment["compiled"] = compiled  # so that the source lives as long as the function
    return compiled.function


# Shared by all nodes whose results have the same layout, so that the garbage collector has fewer
# objects to visit.
_outputs: dict[Any, tuple[Any, ...]] = {}


def _remember(meta: Any) -> tuple[Any, ...]:
    if len(_outputs) >= _MOST_OUTPUTS:
        _outputs.clear()
    return _outputs.setdefault(meta, (meta,))


_MOST_OUTPUTS = 4096


def _tuple(words: Sequence[str]) -> str:
    return f"({', '.join(words)}{',' if len(words) == 1 else ''})"
