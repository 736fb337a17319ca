"""Generated functions for repeated calls: only the necessary checks, the operation, and its node.

`tape.record` finds the signature of a call by inspecting each argument. When a signature occurs
again, a function is written that checks whether the arguments belong to this signature, computes,
and makes the node. From then on it is tried first; for a call with other arguments it returns None.

The source contains nothing specific to one call: calls with the same kinds of arguments share it.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard

import torch

from .. import formula
from .._types import Args
from .._upcalls import upcall
from ..constants import operand
from ..moments import note_moment
from ..tensor import Tensor, is_torchs
from . import source
from .signature import (
    Family,
    Made,
    Signature,
    Sizes,
    Unsigned,
    names_size,
    of_tensor,
    of_value,
    strides_by_rows,
)
from .source import Unwritable

if TYPE_CHECKING:
    import nnmirror.node
    import nnmirror.operation

    from ..node import Edge

# (the signature, or that of each call; the first argument that has one; the node that made it, if
# any; all arguments); what `record` returns, or None.
GeneratedCall: TypeAlias = Callable[[Any, object, object, Args], Made | None]


# What every generated function of a call asks before it computes.
GUARDS = (
    "if autocast() or transform() is not None: return None",
    "if forward_mode['_current_level'] >= 0: return None",
    "if dispatch_mode['_is_in_torch_dispatch_mode']: return None",
)


class CallToWrite(NamedTuple):
    """A recorded call; without a signature, one that needs no gradient."""

    function: "type[nnmirror.operation.Operation]"
    found: Signature | None
    args: Args
    edges: Sequence["nnmirror.node.Edge | None"]
    out: object = None
    node: "nnmirror.node.Node | None" = None
    sizes: Sizes = ()  # of the member of the family `found`


def text_of(
    calls: Sequence[CallToWrite],
    args: Args,
    edges: "Sequence[Edge | None]",
    numbers_vary: bool = False,
    sizes: Sizes = (),
) -> "CallSource | None":
    """The source of a function that makes `calls` for arguments like `args`, whose edges are
    `edges`; None if the calls cannot be written.

    That is one call with these arguments, or several, of which the last gives the result and the
    other results are not exposed. If `numbers_vary`, any other number may be given in place of one
    that is not an integer; if there are `sizes`, the calls are those of families, and arguments may
    have any.
    """
    try:
        text = CallSource(args, edges, numbers_vary, sizes)
    except Unsigned:
        return None
    if calls[0].args is not args:
        text.ask_which_are_one()
    if len(calls) > 1:
        text.lines.insert(
            0, f"{', '.join([f'found{k}' for k in range(len(calls) - 1)])}, found = found"
        )
    try:
        for k, call in enumerate(calls):
            text.add(call, "" if k == len(calls) - 1 else str(k))
    except Unwritable:
        return None
    text.lines.append("return out, node")
    return text


class CallSource:
    """The source of a call: a0, a1 ... are its arguments, n0, n1 ... the nodes that made them."""

    def __init__(
        self,
        args: Args,
        edges: "Sequence[Edge | None]",
        numbers_vary: bool = False,
        sizes: Sizes = (),
    ) -> None:
        self.names = [f"a{i}" for i in range(len(args))]
        self.numbers_vary, self.sizes = numbers_vary, sizes
        self.known: set[int] = set()  # which of the sizes, named size0, size1 ..., have been read
        self.args = args
        self.environment: source.Environment = {}
        self.targets = [""] * len(args)
        # What is asked first, and asks no tracked tensor anything of torch: where several functions
        # are tried, most calls that are not for this one end here.
        self.first_lines: list[str] = []
        self.lines: list[str] = []
        self.has_first = False
        self.given = edges
        # Leaves among the arguments: their plain aliases are faster for torch.
        self.leaves = {
            name
            for name, arg, edge in zip(self.names, args, edges, strict=True)
            if edge is not None and edge[0] is arg and isinstance(arg, Tensor)
        }
        # Is torch given a tracked tensor?
        self.asks_tracked = any(
            name not in self.leaves and isinstance(arg, Tensor)
            for name, arg in zip(self.names, args, strict=True)
        )
        self.made_by: dict[int, str] = {}  # the nodes of the calls so far, by their names
        self.bases: dict[str, str] = {}  # of several calls: the base of each view
        self.kept_by_own: set[str] = set()  # results that their own nodes save
        # Tensors by their names: the arguments, and the results of the calls so far.
        self.words = {id(a): n for a, n in zip(args, self.names, strict=True) if _is_tensor(a)}
        if sizes:
            self.find_sizes(edges)
        asks_torch = [
            is_torchs(edge[0]) if edge is not None else isinstance(arg, Tensor)
            for arg, edge in zip(args, edges, strict=True)
        ]
        # In the order in which they are asked.
        for i in sorted(range(len(args)), key=asks_torch.__getitem__):
            arg, edge = args[i], edges[i]
            conditions = self.asked(i, arg, edge)
            if conditions:
                lines = self.lines if asks_torch[i] else self.first_lines
                lines.append(f"if {' or '.join(conditions)}: return None")
            elif edge is None:
                self.asked_at_length(i, arg)
            if edge is not None and is_torchs(edge[0]) and type(arg) is torch.Tensor:
                self.lines += [f"x{i} = a{i}", f"a{i} = x{i}.detach()"]
            if asks_torch[i] and edge is not None:
                self.lines.append("note_moment()")

    def asked(self, i: int, arg: Any, edge: tuple[Any, int] | None) -> list[str]:
        """The conditions under which argument `i` does not match the signature."""
        a, n = f"a{i}", f"n{i}"
        if edge is None:
            self.targets[i] = "None,"
            return self.asked_of_plain(a, i, arg)
        target, index = edge
        if is_torchs(target):
            self.targets[i] = f"x{i},"
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
            self.targets[i] = f"{a},"
            if is_first:
                return [f"{a} is not first"]
            return [
                f"type({a}) is not {self.constant('kind', i, type(arg))}",
                f"(sign := {a}._signature or signature_of_leaf({a})) is None",
                f"sign.serial != {self.constant('serial', i, arg._signature.serial)}",
            ]
        self.targets[i] = f"{n},"
        sign = target.signature
        conditions = []
        if is_first:
            self.first_lines += [f"if {a} is not first: return None", f"{n} = made"]
        else:
            conditions = [
                f"(type({a}) is not Tensor and ({a} := standing_for({a})) is None)",
                f"({n} := {a}._node) is None",
                f"(sign := {n}.signature) is None",
            ]
            if not (sign.sizes and self.sizes):
                conditions.append(f"sign.serial != {self.constant('serial', i, sign.serial)}")
            else:
                serial = self.constant("serial", i, sign.family_serial)
                conditions.append(f"sign.family_serial != {serial}")
                for k, size in enumerate(sign.sizes):
                    conditions.append(self.asked_of_size(f"sign.sizes[{k}]", size))
        if not sign.is_single:
            conditions.append(f"{a}._output_nr != {index}")
            self.lines.append(
                f"if (view := {a}._view_of) is not None and view[1] != {a}._version: return None"
            )
        return conditions

    def asked_of_plain(self, a: str, i: int, arg: object) -> list[str]:
        """The same for an argument without a gradient."""
        kind = type(arg)
        if isinstance(arg, torch.Tensor):
            conditions = [f"type({a}) is not {self.constant('kind', i, kind)}"]
            if issubclass(kind, Tensor):
                conditions.append(f"{a}._node is not None or {a}._requires_grad")
            else:
                if arg.is_floating_point() or arg.is_complex():  # others cannot require grad
                    conditions.append(f"{a}.requires_grad")
                layout = "strided"
                if arg.layout is not torch.strided:
                    layout = self.constant("layout", i, arg.layout)
                conditions.append(f"{a}.layout is not {layout}")
            return [*conditions, *self.of_layout(a, i, arg)]
        if arg is None or kind is bool:
            return [f"{a} is not {arg}"]
        if kind in _SINGLETONS:
            return [f"{a} is not {self.constant('value', i, arg)}"]
        if kind is float and self.numbers_vary:
            return [f"type({a}) is not float"]
        if names_size(arg, self.sizes):
            return self.asked_of_numbers(a, i, arg)
        if kind is str or (kind in (int, float) and arg):
            value = self.constant("value", i, arg)
            return [f"type({a}) is not {kind.__name__} or {a} != {value}"]
        return []

    def of_layout(self, a: str, i: int, arg: torch.Tensor) -> list[str]:
        """The conditions under which a tensor has another layout."""
        shape, stride, dtype, device = of_tensor(arg)
        of_shape = [f"{a}.shape != {self.constant('shape', i, shape)}"]
        of_stride = f"{a}.stride() != {self.constant('stride', i, stride)}"
        if names_size(shape, self.sizes):
            words, read = [], []
            for dim, n in enumerate(shape):
                if n not in self.sizes:
                    words.append(self.constant(f"dim{dim}_", i, n))
                    continue
                words.append(self.size_name(n))
                if self.sizes.index(n) not in self.known:
                    read.append(self.asked_of_size(f"{a}.shape[{dim}]", n))
            of_shape = [f"{a}.dim() != {len(shape)}", *read] if read else []
            of_shape.append(f"{a}.shape != ({', '.join(words)},)")
            if stride == strides_by_rows(shape):
                by_rows = [" * ".join(words[dim + 1 :]) or "1" for dim in range(len(shape))]
                of_stride = f"{a}.stride() != ({', '.join(by_rows)},)"
        return [
            *of_shape,
            of_stride,
            f"{a}.dtype is not {self.constant('dtype', i, dtype)}",
            f"not {a}.is_cpu"  # faster than making a device to compare
            if arg.is_cpu
            else f"{a}.device != {self.constant('device', i, device)}",
        ]

    def size_name(self, size: int) -> str:
        return f"size{self.sizes.index(size)}"

    def asked_of_size(self, found: str, size: int) -> str:
        """The condition under which what is `found` is not this size. One that has not been read
        yet differs from all others."""
        place, known = self.sizes.index(size), sorted(self.known)
        if place in known:
            return f"{found} != size{place}"
        self.known.add(place)
        is_other = f" or size{place} in ({' '.join(f'size{k},' for k in known)})" if known else ""
        return f"(size{place} := {found}) < 2{is_other}"

    def asked_of_numbers(self, a: str, i: int, arg: Any) -> list[str]:
        """The same for an integer that is one of the sizes, or a tuple that contains some."""
        kind = self.constant("kind", i, type(arg))
        if type(arg) is int:
            return [f"type({a}) is not {kind}", self.asked_of_size(a, arg)]
        if {*map(type, arg)} != {int}:
            raise Unsigned
        kinds = self.constant("kinds", i, (int,) * len(arg))
        read = [
            self.asked_of_size(f"{a}[{k}]", item)
            for k, item in enumerate(arg)
            if item in self.sizes and self.sizes.index(item) not in self.known
        ]
        words = [self.size_name(item) if item in self.sizes else repr(item) for item in arg]
        return [
            f"type({a}) is not {kind} or tuple(map(type, {a})) != {kinds}",
            *read,
            f"{a} != ({', '.join(words)},)",
        ]

    def find_sizes(self, edges: "Sequence[Edge | None]") -> None:
        """Write where the sizes of the first tensor with a signature are read."""
        first: Any = next((edge[0] for edge in edges if edge is not None), None)
        sign = None if isinstance(first, torch.Tensor) or first is None else first.signature
        if sign is not None and sign.sizes:
            names = [self.size_name(size) for size in sign.sizes]
            self.first_lines.append(f"{', '.join(names)}, = made.signature.sizes")
            self.known = {self.sizes.index(size) for size in sign.sizes}

    def asked_at_length(self, i: int, arg: object) -> None:
        """The same for one that is compared item by item."""
        a, value = f"a{i}", self.constant("value", i, of_value(arg))
        if type(arg) is not tuple or {*map(type, arg)} != {int}:
            self.first_lines.append(f"if not is_alike({a}, {value}): return None")
            return
        given = self.constant("given", i, arg)  # sizes: a layer has the same tuple each time
        kinds = self.constant("kinds", i, (int,) * len(arg))
        self.first_lines.append(
            f"if {a} is not {given} and (type({a}) is not tuple"
            f" or tuple(map(type, {a})) != {kinds} or {a} != {given}): return None"
        )

    def ask_which_are_one(self) -> None:
        """The same for arguments that are one tensor, which `word` cannot tell apart."""
        for name, arg in zip(self.names, self.args, strict=True):
            if _is_tensor(arg) and self.words[id(arg)] != name:
                self.first_lines.append(f"if {name} is not {self.words[id(arg)]}: return None")

    def constant(self, kind: str, i: int, value: object) -> str:
        """The name of a constant of this signature."""
        name = f"{kind}{i}"
        self.environment[name] = value
        return name

    def add(self, call: CallToWrite, number: str) -> None:
        """Write a call; `number` distinguishes its names from those of the last call."""
        if call.found is None:
            self.compute(call, number)
        else:
            _OneCall(self, call, call.found, number).write()

    def track(self, out: str, node: str, *more: str) -> None:
        """Make a result tracked. `more` has further attributes: set in one statement, they all take
        half the time of the first assignment."""
        attributes = ", ".join([f"'_node': {node}", *more])
        self.lines += [f"{out}.__dict__ = {{{attributes}}}", f"{out}.__class__ = Tensor"]

    def compute(self, call: CallToWrite, number: str) -> None:
        """Write a call that needs no gradient."""
        if not number:
            raise Unwritable
        words = [self.word(a) for a in call.args]
        self.environment[f"compute{number}"] = call.function.result
        self.lines.append(f"out{number} = compute{number}({', '.join(words)})")
        self.words[id(call.out)] = f"out{number}"

    def alias(self, word: str) -> str:
        """The plain alias of a leaf, with the same version; another argument itself."""
        return f"{word}._plain" if word in self.leaves else word

    def word(self, value: object) -> str:
        """The source of an argument of one of several calls."""
        if value is None or type(value) in _LITERALS:
            return repr(value)
        if not _is_tensor(value):
            self.environment[name := f"v{len(self.environment)}"] = formula.as_now(value)
            return name
        if id(value) not in self.words:
            raise Unwritable
        return self.words[id(value)]

    def target(self, edge: "Edge | None") -> str:
        """The source of what an edge of one of several calls leads to."""
        if edge is None:
            return "None,"
        if id(edge[0]) in self.made_by:
            return f"{self.made_by[id(edge[0])]},"
        for given, text in zip(self.given, self.targets, strict=True):
            if given is not None and given[0] is edge[0]:
                return text
        raise Unwritable

    def made(self) -> GeneratedCall:
        return _compiled(self.source()).function(**self.environment)  # type: ignore[no-any-return]

    def source(self) -> str:
        lines = ["def make(", *[f"    {name}," for name in self.environment], "):"]
        lines += [
            "    def call(found, first, made, args):",
            f"        try: {' '.join(f'{name},' for name in self.names)} = args",
            "        except ValueError: return None",
            *[f"        {line}" for line in self.first_lines],
            *[f"        {line}" for line in GUARDS],
        ]
        if self.asks_tracked:
            lines += ["        with disabled():", *[f"            {line}" for line in self.lines]]
        else:
            lines += [f"        {line}" for line in self.lines]
        lines += ["    return call\n"]
        return "\n".join(lines)


class _OneCall:
    """Writes one call with the signature `found` into a source."""

    def __init__(self, text: CallSource, call: CallToWrite, found: Signature, number: str) -> None:
        plan = found.plan
        if plan is None or plan.copied or (plan.is_open and not text.numbers_vary):
            raise Unwritable
        self.of_more = plan if type(plan) is formula.PlanOfMore else None
        self.several = self.of_more is not None and self.of_more.formulas.several
        if [bool(number), self.several, found.checks_shape].count(True) > 1:
            raise Unwritable
        self.text, self.call, self.found, self.plan = text, call, found, plan
        self.function, self.number = call.function, number
        self.is_whole = call.args is text.args
        self.words = text.names if self.is_whole else [text.word(a) for a in call.args]
        self.base = ""  # of a view
        if call.function.is_view:
            if _leads_to_torch(call.edges[0]):
                raise Unwritable
            self.base = text.bases.get(self.words[0], self.words[0])
        # What forward returns besides its result.
        count = 0 if self.of_more is None else len(call.function.keeps)
        self.kept = [f"k{number}_{i}" for i in range(count)]
        self.out, self.node = f"out{number}", f"node{number}"
        self.sign = f"sign{number}" if text.sizes else f"found{number}"

    def line(self, *lines: str) -> None:
        self.text.lines += lines

    def write(self) -> None:
        if self.text.sizes:
            self.find_member()
        is_builtin = self.compute_result()
        self.make_node(*self.saved(is_builtin))
        if self.number:
            self.text.words[id(self.call.out)] = self.out
            self.text.made_by[id(self.call.node)] = self.node
            if self.base:
                self.text.bases[self.out] = self.base
        elif self.several:
            self.track_results()
        else:
            self.track_result()

    def find_member(self) -> None:
        """The signature for these sizes, or else the plan of its first call."""
        if not isinstance(self.found, Family):
            raise Unwritable
        number = self.number
        given = "args" if self.is_whole else f"({' '.join(f'{word},' for word in self.words)})"
        self.line(
            f"{self.sign} = found{number}.members.get({self.sizes()})",
            f"if {self.sign} is None and (plan{number} :="
            f" plan_of_size(found{number}, function{number}, {given})) is None: return None",
        )

    def sizes(self) -> str:
        return f"({' '.join(f'{self.text.size_name(size)},' for size in self.call.sizes)})"

    def compute_result(self) -> bool:
        """The call of forward, or of torch's own function, which it says."""
        call, function, text, number = self.call, self.function, self.text, self.number
        compute: Any = self.plan.compute
        given = [
            self.operand(word, call.args[i], f"c{number}_{i}") if i in function.operands else word
            for i, word in enumerate(self.words)
        ]
        if function.operator is not None and _has_defaults(function, call.args):
            compute, given = function.operator, given[:2]
        if isinstance(compute, formula.C_FUNCTIONS) and not function.is_view:
            given = [text.alias(word) for word in given]
        elif text.leaves:
            text.asks_tracked = True
        text.environment |= {f"compute{number}": compute, f"function{number}": function}
        is_cut = self.several and self.kept
        results = ", ".join([f"*{self.out}" if is_cut else self.out, *self.kept])
        self.line(f"{results} = compute{number}({', '.join(given)})")
        if is_cut:
            self.line(f"{self.out} = tuple({self.out})")
        if self.several and text.sizes:  # pieces of a length, of which there may be more
            self.line(f"if len({self.out}) != {len(self.found.outputs)}: return None")
        if self.of_more is not None:  # `Formulas.parts` has an error for one that is not an integer
            for i in self.of_more.formulas.underived:
                kept = self.kept[i]
                self.line(f"if {kept} is not None and {kept}.is_floating_point(): return None")
        if text.sizes:
            self.line(
                f"if {self.sign} is None and ({self.sign} := found{number}.new_member("
                f"{self.sizes()}, outputs_of({self.out}), plan{number})) is None: return None"
            )
        return inspect.isbuiltin(compute)

    def operand(self, word: str, value: object, name: str) -> str:
        """The source of an operand: a number as a tensor, if possible, which is faster."""
        like = self.call.args[0]
        if type(value) not in _NUMBERS or not _is_tensor(like) or self.text.numbers_vary:
            return word
        if names_size(value, self.text.sizes):
            return word
        self.text.environment[name] = operand(value, like)
        return name

    def saved(self, is_builtin: bool) -> tuple[list[str], list[str]]:
        """The source of what is saved, and of its versions."""
        plan, result = self.plan, self.out
        if self.several:
            self.name_results({~place for place in plan.saves if place < 0})
        elif formula.RESULT in plan.saves and self.number:
            self.text.kept_by_own.add(self.out)
        elif formula.RESULT in plan.saves:
            self.line("result = out.detach()")  # itself, it would keep itself alive
            result = "result"
        saved = [
            self.saved_argument(i) if place >= 0 else f"r{~place}" if self.several else result
            for i, place in enumerate(plan.saves)
        ]
        versions = [
            "0" if name == result and is_builtin else f"{self.text.alias(name)}._version"
            for name in saved
        ]
        if self.of_more is not None:
            more = [self.kept[i] for i in self.of_more.kept]
            saved += more
            versions += [f"0 if {name} is None else {name}._version" for name in more]
        if not saved and plan.saves_number:
            saved = versions = ["None"]
        return saved, versions

    def saved_argument(self, i: int) -> str:
        """The name of a saved argument, or of its saved alias."""
        place = self.plan.saves[i]
        word, arg = self.words[place], self.call.args[place]
        if i not in self.plan.memory:
            return word
        # One of inference mode would not be noticed in its alias. No such leaf has a signature.
        if i in self.plan.read_memory and getattr(arg, "_signature", None) is None:
            self.line(f"if {word}.is_inference(): return None")
        is_given = word.startswith("a") and hasattr(type(arg), "_plain")
        self.line(f"s{word} = {word}.{'_plain' if is_given else 'detach()'}")
        return f"s{word}"

    def name_results(self, saved: set[int]) -> None:
        """Name those of several results that are saved, a float one as an alias."""
        for i in sorted(saved):
            meta = self.found.outputs[i]
            if meta is None:
                raise Unwritable
            if meta[1].is_floating_point:
                self.line(f"r{i} = out[{i}].detach()", f"r{i}._alias_of_output = {i}")
            else:
                self.line(f"r{i} = out[{i}]")

    def make_node(self, saved: list[str], versions: list[str]) -> None:
        text, node, number = self.text, self.node, self.number
        targets = text.targets if self.is_whole else [text.target(e) for e in self.call.edges]
        self.line(
            f"{node} = new_node(Node)",
            f"{node}.function = function{number}",
            f"{node}.signature = {node}.call_info = {self.sign}",
            f"{node}.targets = ({' '.join(targets)})",
        )
        if saved:
            self.line(
                f"{node}._saved = ({' '.join(f'{name},' for name in saved)})",
                "try:",
                *[f"    {line}" for line in _versions_of(node, versions)],
                "except RuntimeError:  # one of inference mode",
                f"    {node}.save_for_backward(*{node}._saved)",
            )
        else:
            self.line(f"{node}._saved = {node}._versions = ()")
        if self.plan.is_open:
            text.environment["given"] = self.plan.given
            self.line(f"{node}.given = given(args)")
        if self.found.checks_shape:
            shape = f"{self.sign}.outputs[0][0]"
            if not text.sizes:
                text.environment["shape"], shape = self.found.outputs[0][0], "shape"
            self.line(f"if out.shape != {shape}: unlike(node, out)")
        if self.of_more is not None and not self.function.materialize_grads:
            self.line(f"{node}.materialize_grads = False")
        self.line(f"{node}.sequence = next(sequence)")

    def track_result(self) -> None:
        """Make the result tracked; a view of its base, if it is one."""
        text, base = self.text, self.base
        if not base:
            text.track("out", "node")
            return
        if base.startswith("out"):  # the result of another of the calls, which is exposed now
            if base in text.kept_by_own:
                raise Unwritable  # it would keep itself alive
            text.track(base, base.replace("out", "node"))
        elif not isinstance(text.args[int(base[1:])], Tensor):
            text.track("out", "node")
            self.line(f"out._view_of = view_of(node, out, {base}, False)")
            return
        self.line(f"view = {base}._view_of")  # the rest is as `view_from(base, out)`
        own = f"({base}, out._version, 'default')"
        view = f"{own} if view is None else (view[0], out._version, view[2])"
        text.track("out", "node", f"'_view_of': {view}")

    def track_results(self) -> None:
        """Make the float results of a call with several tracked; views of the base, if they are."""
        text, base = self.text, self.base
        if base and not (base.startswith("a") and isinstance(text.args[int(base[1:])], Tensor)):
            raise Unwritable
        if base:
            self.line(f"root = {base} if (view := {base}._view_of) is None else view[0]")
        view = ["'_view_of': (root, result._version, 'multi_output')"] if base else []
        for i, meta in enumerate(self.found.outputs):
            if meta is not None and meta[1].is_floating_point:
                self.line(f"result = out[{i}]")
                text.track("result", "node", *([f"'_output_nr': {i}"] if i else []), *view)
        self.line("if type(out) is not list: out = tuple(out)")


def _versions_of(node: str, versions: Sequence[str]) -> list[str]:
    """The lines that keep these versions: most are 0, and then no tuple is made."""
    words = [v if v in ("0", "None") else f"version{i}" for i, v in enumerate(versions)]
    read = [w for w in words if w.startswith("version")]
    lines = [f"{w} = {v}" for w, v in zip(words, versions, strict=True) if w != v]
    made = f"({' '.join(f'{word},' for word in words)})"
    if read:
        zeros = "".join("0," if word in read else f"{word}," for word in words)
        made += f" if {' or '.join(read)} else ({zeros})"
    return [*lines, f"{node}._versions = {made}"]


_LITERALS = (bool, int, str)
_SINGLETONS = (torch.dtype, torch.layout, torch.memory_format)
_NUMBERS = (int, float)


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def _has_defaults(function: "type[nnmirror.operation.Operation]", args: Args) -> bool:
    """Are all but the first two arguments those that `forward` has by default?"""
    assert function.formulas is not None
    defaults = function.formulas.defaults
    return all(
        type(arg) is type(default) and arg == default
        for arg, default in zip(args[2:], defaults[2:], strict=False)
    )


def _leads_to_torch(edge: "Edge | None") -> bool:
    return edge is not None and is_torchs(edge[0])


def _is_alike(value: object, key: object) -> bool:
    try:
        return bool(of_value(value) == key)
    except Unsigned:
        return False


@functools.lru_cache(maxsize=512)
def _compiled(text: str) -> source.Compiled:
    return source.Compiled(text, "make", "call", _named())


@functools.cache
def _named() -> source.Environment:
    """What the sources name besides their own constants.

    As globals, these are shared by all generated functions, which takes less memory than cells.
    """
    return {
        "is_alike": _is_alike,
        "new_node": object.__new__,
        "note_moment": note_moment,
        "strided": torch.strided,
        "Tensor": Tensor,
        **named_in_calls(),
    }


@upcall("nnmirror.tape")
def named_in_calls() -> source.Environment:
    """What the tape adds to these."""
    raise NotImplementedError
