"""Generated functions for repeated calls: only the necessary checks, the operation, and its node.

`tape.record` finds the signature of a call by inspecting each argument. When a signature occurs
again, a function is written that checks whether the arguments belong to this signature, computes,
and makes the node. From then on it is tried first; for a call with other arguments it returns None.

The source contains nothing specific to one call: calls with the same kinds of arguments share it.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from .. import formula
from ..tensor import Tensor, is_torchs
from . import source
from .signature import Signature, Unsigned, of_tensor, of_value

# (the signature, the first argument that has one, all arguments); what `record` returns, or None.
Written: TypeAlias = Callable[[Signature, Any, tuple[Any, ...]], Any]


def write(
    function: Any,
    found: Signature,
    args: tuple[Any, ...],
    edges: Sequence[Any],
    parts: Mapping[str, Any],
) -> Written | bool:
    """The function for calls of `function` with the signature `found`, like this one; False if such
    calls cannot be written.

    `parts` has the names that the source uses from the tape.
    """
    plan = found.plan
    if plan is None or plan.copied or plan.is_open:
        return False
    kept: list[str] = []  # what forward returns in addition to its result
    if type(plan) is formula.PlanOfMore:
        if plan.formulas.several or plan.formulas.underived:
            return False
        kept = [f"k{i}" for i in range(len(function.keeps))]
    if function.is_view and edges[0] is not None and is_torchs(edges[0][0]):
        return False
    text = _Text(args, edges)
    saved = [text.saved(place, i in plan.memory) for i, place in enumerate(plan.saves)]
    new = {"compute": plan.compute, "function": function, **parts}
    text.lines.append(f"{', '.join(['out', *kept])} = compute({', '.join(text.names)})")
    if formula.RESULT in plan.saves:
        text.lines.append("result = out.detach()")  # saved itself, it would keep itself alive
    versions = [
        "0" if name == "result" and inspect.isbuiltin(plan.compute) else f"{name}._version"
        for name in saved
    ]
    if kept:
        more = [kept[i] for i in plan.kept]
        saved += more
        versions += [f"0 if {name} is None else {name}._version" for name in more]
    if not saved and plan.saves_number:
        saved = versions = ["None"]
    text.lines += [
        "node = new_node(Node)",
        "node.function = function",
        "node.signature = node.like = found",
        f"node.edges = ({' '.join(text.edges)})",
        f"node._saved = ({' '.join(f'{name},' for name in saved)})",
        "try:",
        f"    node._versions = ({' '.join(f'{version},' for version in versions)})",
        "except RuntimeError:  # one of inference mode",
        "    node.save_for_backward(*node._saved)",
    ]
    if found.checks_shape:
        new["shape"] = found.outputs[0][0]
        text.lines.append("if out.shape != shape: unlike(node, out)")
    text.lines += [
        "node.sequence = next(sequence)",
        "out.__class__ = Tensor",
        "out._node = node",
    ]
    if function.is_view:
        of = (
            "view_from(a0, out)" if isinstance(args[0], Tensor) else "view_of(node, out, a0, False)"
        )
        text.lines.append(f"out._view_of = {of}")
    text.lines.append("return out, node")
    return text.made({**text.environment, **new})


class _Text:
    """The source of a call: a0, a1 ... are its arguments, n0, n1 ... the nodes that made them."""

    def __init__(self, args: tuple[Any, ...], edges: Sequence[Any]) -> None:
        self.names = [f"a{i}" for i in range(len(args))]
        self.args = args
        self.environment: dict[str, Any] = {}
        self.edges: list[str] = []
        self.lines = [f"{' '.join(f'{name},' for name in self.names)} = args"]
        self.has_first = False
        for i, (arg, edge) in enumerate(zip(args, edges, strict=True)):
            conditions = self.asked(i, arg, edge)
            if conditions:
                self.lines.append(f"if {' or '.join(conditions)}: return None")
            elif edge is None:
                self.asked_at_length(i, arg)
            if edge is not None and is_torchs(edge[0]) and type(arg) is torch.Tensor:
                self.lines += [f"x{i} = a{i}", f"a{i} = x{i}.detach()"]

    def asked(self, i: int, arg: Any, edge: Any) -> list[str]:
        """The conditions under which argument `i` does not match the signature."""
        a, n = f"a{i}", f"n{i}"
        if edge is None:
            self.edges.append("None,")
            return self.asked_of_plain(a, i, arg)
        target, index = edge
        if is_torchs(target):
            self.edges.append(f"(x{i}, 0),")
            if isinstance(arg, Tensor):  # an alias of a tensor of torch's
                theirs = [
                    f"type({a}) is not Tensor",
                    f"{a}._node is not None",
                    f"(x{i} := {a}._stands_for) is None",
                    f"isinstance(x{i}, Tensor)",
                ]
            else:
                theirs = [
                    f"type({a}) is not {self.constant('kind', i, torch.Tensor)}",
                    f"not {a}.requires_grad",
                    f"not {a}.is_leaf and taken_over({a}) is not None",
                    f"{a}.layout is not strided",
                ]
            return [*theirs, *self.of_layout(a, i, arg)]
        is_first, self.has_first = not self.has_first, True
        if target is arg:
            self.edges.append(f"({a}, 0),")
            if is_first:
                return [f"{a} is not first"]
            return [
                f"type({a}) is not {self.constant('kind', i, type(arg))}",
                f"(sign := {a}._signature) is None",
                f"sign.serial != {self.constant('serial', i, arg._signature.serial)}",
            ]
        self.edges.append(f"({n}, {index}),")
        sign = target.signature
        conditions = []
        if is_first:
            self.lines += [f"if {a} is not first: return None", f"{n} = {a}._node"]
        else:
            conditions = [
                f"type({a}) is not Tensor",
                f"({n} := {a}._node) is None",
                f"(sign := {n}.signature) is None",
                f"sign.serial != {self.constant('serial', i, sign.serial)}",
            ]
        if not sign.is_plain:
            conditions += [
                f"{a}._output_nr != {index}",
                f"((view := {a}._view_of) is not None and view[1] != {a}._version)",
            ]
        return conditions

    def asked_of_plain(self, a: str, i: int, arg: Any) -> list[str]:
        """The same for an argument without a gradient."""
        kind = type(arg)
        if isinstance(arg, torch.Tensor):
            conditions = [f"type({a}) is not {self.constant('kind', i, kind)}"]
            if issubclass(kind, Tensor):
                conditions.append(f"{a}._node is not None or {a}._requires_grad")
            else:
                conditions.append(f"{a}.requires_grad or {a}.layout is not strided")
            return [*conditions, *self.of_layout(a, i, arg)]
        if arg is None or kind is bool:
            return [f"{a} is not {arg}"]
        if kind is str or (kind in (int, float) and arg):
            value = self.constant("value", i, arg)
            return [f"type({a}) is not {kind.__name__} or {a} != {value}"]
        return []

    def of_layout(self, a: str, i: int, arg: torch.Tensor) -> list[str]:
        """The conditions under which a tensor has another layout."""
        shape, stride, dtype, device = of_tensor(arg)
        return [
            f"{a}.shape != {self.constant('shape', i, shape)}",
            f"{a}.stride() != {self.constant('stride', i, stride)}",
            f"{a}.dtype is not {self.constant('dtype', i, dtype)}",
            f"{a}.device != {self.constant('device', i, device)}",
        ]

    def asked_at_length(self, i: int, arg: Any) -> None:
        """The same for one that is compared item by item."""
        value = self.constant("value", i, of_value(arg))
        self.lines.append(f"if not is_alike(a{i}, {value}): return None")

    def constant(self, kind: str, i: int, value: Any) -> str:
        """The name of a constant of this signature."""
        name = f"{kind}{i}"
        self.environment[name] = value
        return name

    def saved(self, place: int, in_memory: bool) -> str:
        """The name of the saved alias of an argument, or of the result."""
        if place < 0:
            return "result"
        if not in_memory:
            return f"a{place}"
        plain = "_plain" if hasattr(type(self.args[place]), "_plain") else "detach()"
        self.lines.append(f"s{place} = a{place}.{plain}")
        return f"s{place}"

    def made(self, environment: dict[str, Any]) -> Written:
        lines = ["def make(", *[f"    {name}," for name in environment], "):"]
        lines += [
            "    def call(found, first, args):",
            f"        if len(args) != {len(self.args)}: return None",
            "        if autocast() or transform() is not None: return None",
            "        if forward_mode['_current_level'] >= 0: return None",
            "        with disabled():",
        ]
        lines += [f"            {line}" for line in self.lines]
        lines += ["    return call\n"]
        return _compiled("\n".join(lines)).function(**environment)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=512)
def _compiled(text: str) -> source.Compiled:
    environment = {
        "is_alike": _is_alike,
        "new_node": object.__new__,
        "strided": torch.strided,
        "Tensor": Tensor,
    }
    return source.Compiled(text, "make", "call", environment)


def _is_alike(value: Any, key: Any) -> bool:
    try:
        return bool(of_value(value) == key)
    except Unsigned:
        return False
