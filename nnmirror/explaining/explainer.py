"""How `nnmirror.explain` runs the backward of a graph and writes it down.

The steps are run and recorded like those of a walk that is bound (see `fast/writer.py`), and
written with the reader's names. The written function is then run, and must give the same gradients.
"""

import functools
import itertools
import re
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch

from .. import beyond, documented
from .. import tape as _tape
from .. import walk as _walk
from .._torch import DisableTorchFunctionSubclass
from .._types import Args, Kwargs, TorchFunction
from ..bits import same_layout_and_bits
from ..fast import source, writer
from ..fast.shorter import WORDS, TorchCall, without_unneeded
from ..gradients import expect_tracked, make_grads
from ..modules.module import Module
from ..node import NO_FURTHER, Edge, Node
from ..running import dependencies
from ..tensor import bare
from ..watch import Watch
from .explanation import Explanation, Input, Leaf, Operation, Result
from .naming import Names, argument_name, escaped, place_of, quoted, variables_of
from .standalone import literal, source_of

T = torch.Tensor
_WIDTH = 100


def explained(
    tensor: T, modules: Sequence[Module], gradient: T | None, frame: FrameType | None
) -> Explanation:
    """The explanation of the graph behind `tensor`; `frame` is the caller's."""
    expect_tracked("explain", tensor, modules)
    (grad,) = make_grads([tensor], [gradient])
    state = torch.get_rng_state()
    try:
        return _explained(tensor, grad, modules, variables_of(frame))
    finally:
        torch.set_rng_state(state)  # in case the backward of a user's Function draws


@_walk.unrecorded
def _explained(
    tensor: T, grad: T, modules: Sequence[Module], variables: Mapping[str, object]
) -> Explanation:
    with DisableTorchFunctionSubclass():
        root = _tape.edge_of(tensor)
        writer = ExplainingWriter(root, tensor, modules, variables)
        writer.start_with(grad)
        return writer.explanation()


class _Notes(writer.Notes):
    """Records assignments to a part of a tensor as well."""

    def __torch_function__(
        self, func: TorchFunction, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        if func is T.__setitem__:
            self.calls.append((func, args, {}, args[0]))
            return func(*args)
        out = super().__torch_function__(func, types, args, kwargs)
        if func is torch.mul:  # whose numbers are tensors from the third time on, as in number
            self.calls[-1] = func, tuple(map(_as_number, args)), kwargs or {}, out
        return out


def _as_number(value: object) -> object:
    """The number that a constant stands for."""
    if isinstance(value, T) and hasattr(value, "_is_constant") and not value.dim():
        return float(literal(value.item(), value.dtype))
    return value


class ExplainingWriter(writer.Writer):
    """Writes the source of the walk from `root` for a reader.

    It leaves the graph unchanged. A step that depends on the numbers in a tensor is written as it
    ran for these numbers.
    """

    def __init__(
        self,
        root: Edge,
        tensor: T,
        modules: Sequence[Module],
        variables: Mapping[str, object],
    ) -> None:
        self.is_part = False
        self.root, self.tensor = root, tensor
        ahead = dependencies([root], expanding=False)
        self.whole = ahead.order
        if ahead.changed:
            raise NotImplementedError(beyond.CHANGED)
        self.whole.sort(key=lambda node: -node.sequence)
        self.begin()
        self.index = {id(node): i for i, node in enumerate(self.order)}
        for key, inner in self.layers.items():
            self.index[key] = self.index[id(inner[-1])]
        for node in self.order:
            _refuse_hooks(node)
        self.reader = Names(self.order, self.layers, modules, variables)
        self.expected: dict[int, int] = {}  # how many gradients each place gets
        for target, output in [root, *(e for n in self.order for e in n.edges if e is not None)]:
            if output != NO_FURTHER:
                key = self.place(target, output)
                self.expected[key] = self.expected.get(key, 0) + 1
        self.came: dict[int, int] = {}  # and how many have arrived
        self.parts: dict[int, str] = {}  # the prefix of their names
        self.ends: dict[str, T] = {}  # the leaves, by their names
        self.totals: dict[int, T] = {}  # the gradients that have arrived, by place
        self.values: dict[str, T] = {}  # the arguments of the function, by name
        self.at: dict[Hashable, str] = {}  # these names, by the memory of the tensors
        self.renamed: dict[str, str] = {}  # intermediate results
        self.aliases: dict[tuple[int, str], str] = {}  # further names of a gradient
        self.numbers: dict[Hashable, str] = {}  # constant tensors without dimensions
        self.steps: list[_Step] = []
        self.copies: dict[Hashable, T] = {}  # by the memory of the tensors
        self.found_results: dict[tuple[int, int], T] = {}  # by the operation and the output
        for target, _ in [root, *(e for n in self.order for e in n.edges if e is not None)]:
            if not isinstance(target, Node):
                name = self.reader.of_leaf(target)
                self.ends[name] = target
                self.at.setdefault(_memory(target), self.reader.identifiers[name])

    def place(self, target: object, output: int) -> int:
        """The key of the place that a gradient goes to: a result, or a leaf."""
        if not isinstance(target, Node):
            return -id(target)
        return self.index[id(target)] * 4096 + output

    def name_at(self, target: Node | T, output: int) -> str:
        if not isinstance(target, Node):
            return self.reader.identifiers[self.reader.of_leaf(target)]
        return self.reader.labels[id(self.order[self.index[id(target)]])][output]

    # -- the walk ------------------------------------------------------------------------

    def start_with(self, grad: T) -> None:
        """Run the backward from the root with this gradient."""
        self.alive.append(grad)
        self.start = grad
        self.first = "d_" + self.name_at(*self.root)
        self.known[id(grad)] = self.first
        self.since = 0  # the first line of the step
        self.totals[self.place(*self.root)] = grad
        for node in self.order:
            slots: list[T | None] = []
            before = len(self.lines)
            for k in range(len(node.outputs)):
                slot = self.totals.get(self.place(node, k))
                slots.append(slot)
                if slot is not None:
                    self.use(slot, "d_" + self.reader.labels[id(node)][k])
            self.since = before
            step = _Step(node, slots, [None] * len(node.edges), before)
            if any(g is not None for g in slots) or node.attributes is not None:
                self.take(step)
            step.after = len(self.lines)
            self.steps.append(step)
        for name, leaf in self.ends.items():
            total = self.totals.get(self.place(leaf, 0))
            if total is not None:
                self.use(total, "d_" + self.reader.identifiers[name])

    def take(self, step: "_Step") -> None:
        """Run one step, and write its torch calls."""
        node = step.node
        saved = node._saved
        with _Notes() as notes:
            step.results = _walk.validate_outputs(node, node.run(list(step.slots)))
        if node._saved is not saved:  # it may be read only once
            node._saved = saved
        step.reads_data = notes.reads_data
        self.label = self.reader.labels[id(node)][0]
        self.write_step(notes, step.results, self.kept(node))
        for edge, result in zip(node.edges, step.results, strict=True):
            if edge is None or result is None or edge[1] == NO_FURTHER:
                continue
            key, name = self.place(*edge), "d_" + self.name_at(*edge)
            count = self.came[key] = self.came.get(key, 0) + 1
            several = self.expected[key] > 1
            self.call_it(result, self.name_of_part(name, key, count) if several else name)
            self.totals[key] = total = self.added(self.totals.get(key), result)
            if total is not result:
                self.call_it(total, name)

    def name_of_part(self, name: str, key: int, count: int) -> str:
        """The name of one of several gradients that are summed at a place."""
        if key not in self.parts:
            stem, numbers = name, range(1, self.expected[key] + 1)
            while any(f"{stem}_{i}" in self.reader.taken for i in numbers):
                stem += "_part"
            self.reader.taken.update(f"{stem}_{i}" for i in numbers)
            self.parts[key] = stem
        return f"{self.parts[key]}_{count}"

    def call_it(self, grad: T, name: str) -> None:
        """Give `grad` this name, as a second one if it has a name already."""
        word = self.known[id(grad)]
        if self.renamed.get(word, word) == name:
            return
        is_new = re.fullmatch(r"t\d+", word) and word not in self.renamed
        if is_new and not any(map(functools.partial(_changes, word), self.lines[self.since :])):
            self.renamed[word] = name
            return
        again = self.aliases[id(grad), name] = f"t{next(self.temporaries)}"
        self.renamed[again] = name
        self.lines.append(TorchCall(again, None, (), {}, [word], grad))
        if word not in self.renamed and WORDS.match(word):
            self.known[id(grad)] = again  # the other name is of this step only

    def use(self, grad: T, name: str) -> None:
        """Use this name for `grad` from here on."""
        if (id(grad), name) not in self.aliases:
            self.call_it(grad, name)
        self.known[id(grad)] = self.aliases.get((id(grad), name), self.known[id(grad)])

    # -- words ---------------------------------------------------------------------------

    def kept(self, node: Node) -> dict[int, str]:
        mine: dict[int, str] = {}
        for name, tensor, given in self.saved(node):
            mine[id(tensor)] = self.value(tensor, f"{self.label}_{name}", given)
        return mine

    def saved(self, node: Node) -> list[tuple[str, T, str]]:
        """The saved tensors of a node: the name of each in the rule, and the name of its value, if
        it has one."""
        found: list[tuple[str, T, str]] = []
        plan = node.plan
        for i, tensor in enumerate(node._saved or ()):
            if isinstance(tensor, Node):  # of an in-place change
                found += self.saved(tensor)
            if not isinstance(tensor, T):
                continue
            place = None if plan is None else plan.place_saved(i)
            name = plan.names[i] if plan is not None and i < len(plan.names) else f"saved_{i}"
            given = ""
            if place is not None and place < 0 and id(node) in self.index:
                given = self.name_at(node, ~place)
            elif place is not None and place >= 0:
                edge = node.edges[place] if place < len(node.edges) else None
                if edge is not None and (
                    not isinstance(edge[0], Node) or id(edge[0]) in self.index
                ):
                    given = self.name_at(*edge)
            found.append((name, tensor, given))
        for name, value in [*vars(node).items(), *(node.attributes or {}).items()]:
            if isinstance(value, T) and not hasattr(value, "_is_constant"):
                found.append((name.strip("_"), value, ""))
        return found

    def value(self, tensor: T, stem: str, given: str = "") -> str:
        """The name of an argument of the function; that of a leaf or a result is `given`."""
        key = _memory(tensor)
        name = self.at.get(key)
        if name is None:
            if not given or given in self.values:
                given = self.reader.unique(given or self.reader.tensors.get(id(tensor)) or stem)
            name = self.at[key] = given
        if name not in self.values:
            self.values[name] = tensor.detach()
        return name

    def word(self, value: Any, mine: dict[int, str]) -> str:
        if isinstance(value, T):
            name = mine.get(id(value)) or self.known.get(id(value))
            if name is None and hasattr(value, "_is_constant"):
                return self.number(value)
            return name or self.value(value, f"{self.label}_value")
        if type(value) in (tuple, list):
            inner = ", ".join([self.word(v, mine) for v in value])
            if type(value) is list:
                return f"[{inner}]"
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if type(value) is slice:
            return self.constant(value)
        return super().word(value, mine)

    def number(self, value: T) -> str:
        """The name of a number held as a tensor."""
        if value.numel() > 16:
            return self.value(value, "constant")
        literal = source_of(value)
        if literal not in self.numbers:
            stem = "c" if value.dim() else _NUMBERS.get(value.item(), "c")
            self.numbers[literal] = self.reader.unique(stem)
        return self.numbers[literal]

    def open(self, node: Node, index: int) -> object:
        return node.given[index]

    def constant(self, value: object) -> str:
        if isinstance(value, torch.Size):
            return self.constant(tuple(value))
        if isinstance(value, tuple | list):
            inner = ", ".join(map(self.constant, value))
            if isinstance(value, list):
                return f"[{inner}]"
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return repr(str(value))
        if value is Ellipsis:
            return "..."
        if isinstance(value, slice):
            return f"slice({value.start}, {value.stop}, {value.step})"
        return repr(value)  # a number, a string, None, torch.float32, torch.preserve_format

    # -- the whole -----------------------------------------------------------------------

    def explanation(self) -> Explanation:
        """The operations and the source, which is run to check it."""
        gradients = {
            name: total
            for name, leaf in self.ends.items()
            if (total := self.totals.get(self.place(leaf, 0))) is not None
        }
        needed = {self.known[id(g)].partition("[")[0] for g in gradients.values()}
        # Two leaves may share one gradient, under two names.
        names = [(id(g), "d_" + self.reader.identifiers[n]) for n, g in gradients.items()]
        needed |= {self.aliases[at] for at in names if at in self.aliases}
        kept = {id(line) for line in without_unneeded(self.lines, needed)}
        blocks: list[list[str]] = []
        marks = [*(step.before for step in self.steps), len(self.lines)]
        for i, (start, end) in enumerate(itertools.pairwise(marks)):
            lines = self.nested([line for line in self.lines[start:end] if id(line) in kept])
            blocks.append([*self.comment(self.steps[i]), *self.numbered(lines)])
        used = {name for block in blocks for line in block for name in re.findall(r"\w+", line)}
        given = {name: self.copy(value) for name, value in self.values.items() if name in used}
        text, first = self.text(blocks, given, list(gradients))
        given[self.first] = self.copy(self.start)
        self.find_results()
        backward = source.Compiled(text, "backward", "explanation", {})
        computed = backward.function(**given)
        for name, grad in gradients.items():
            if not same_layout_and_bits(computed[name], grad):
                raise RuntimeError(
                    f"nnmirror.explain: the source that was written gives {name} another gradient"
                    " than the walk; please open an issue that shows this:\n" + text
                )
        operations = [
            self.operation(i, step, blocks[i], first[i]) for i, step in enumerate(self.steps)
        ]
        leaves = {
            name: Leaf(
                name,
                self.reader.identifiers[name],
                id(leaf) in self.reader.owners,
                self.copy(leaf),
                gradients.get(name),
            )
            for name, leaf in self.ends.items()
        }
        return Explanation(operations, leaves, text, given, backward)

    def nested(self, calls: Sequence[Any]) -> list[str]:
        """The lines of a step. A value that is used once, and soon, is written where it is used."""
        uses: dict[str, int] = {}
        for call in calls:
            for name in (n for word in call.words for n in WORDS.findall(word)):
                uses[name] = uses.get(name, 0) + 1
        lines: list[str] = []
        waiting: dict[str, str] = {}  # calls that may be written into a later one
        for k, call in enumerate(calls):
            if call.changes() if call.func is not None else False:
                lines += [f"{name} = {text}" for name, text in waiting.items()]
                waiting = {}
            words = [
                waiting.pop(word)
                if word in waiting
                else WORDS.sub(lambda m: self.renamed.get(m[0], m[0]), word)
                for word in call.words
            ]
            text = words[0] if call.func is None else expression(call.func, call.args, words)
            name = self.renamed.get(call.name, call.name)
            if len(f"    {name} = {text}") > _WIDTH:
                for i, word in enumerate(call.words):
                    if word in uses and words[i] != word and word not in self.renamed:
                        lines.append(f"{word} = {words[i]}")
                        words[i] = word
                text = expression(call.func, call.args, words) if call.func else words[0]
            ahead = [n for later in calls[k + 1 :] for n in later.words]
            if name and name == call.name and uses.get(name) == 1 == ahead.count(name):
                user = next(later for later in calls[k + 1 :] if name in later.words)
                if user.func is not None and not user.changes() and len(text) < 60:
                    waiting[name] = text
                    continue
            for other in [n for n in waiting if n in WORDS.findall(text)]:
                lines.append(f"{other} = {waiting.pop(other)}")
            lines.append(f"{name} = {text}" if name else text)
        return lines

    def numbered(self, lines: list[str]) -> list[str]:
        """With intermediate results named t1, t2 ... in each step."""
        names: dict[str, str] = {}

        def rename(match: re.Match[str]) -> str:
            return names.setdefault(match[0], f"t{len(names) + 1}")

        return [WORDS.sub(rename, line) for line in lines]

    def comment(self, step: "_Step") -> list[str]:
        node = step.node
        module, kind = self.reader.module_of(node)
        where = f"{module} ({kind}): " if module else f"{kind}.forward: " if kind else ""
        lines = [f"# {escaped(where + bare(node.name()))}"]
        place = place_of(node)
        if place is not None:
            lines.append(f"# {escaped(str(place))}" + (f"  {place.text}" if place.text else ""))
        wrapped = textwrap.wrap(documented.gradients(node.function), _WIDTH - 10)
        lines += [f"# {'  ' if i else ''}{line}" for i, line in enumerate(wrapped)]
        shapes = ", ".join(f"{i.name} {i.shape}" for i in self.inputs(step) if i.shape is not None)
        results = ", ".join(str(tuple(meta[0])) for meta in node.outputs if meta is not None)
        lines.append(f"# {shapes} -> {results}")
        if step.reads_data:
            lines.append("# What follows depends on numbers in these tensors.")
        return lines

    def text(
        self, blocks: list[list[str]], given: dict[str, T], names: list[str]
    ) -> tuple[str, list[int]]:
        """The source, and at which of its lines each block begins."""
        lines = ["import torch", "", "", "def backward("]
        by_identifier = {self.reader.identifiers[name]: name for name in self.ends}
        width = max([len(name) for name in (*given, self.first)])
        for name, value in given.items():
            theirs = by_identifier.get(name, name)
            what = f"  {escaped(theirs)}" if theirs != name else ""
            lines.append(f"    {name + ',':{width + 1}}  # {tuple(value.shape)}{what}")
        start = self.start
        what = f"={source_of(start)}" if start.dim() == 0 else ""
        lines.append(f"    {self.first}{what},  # {tuple(start.shape)}  the gradient to start from")
        lines += ["):", f'    """The gradients of the leaves, from that of {self.first[2:]}."""']
        if self.numbers:
            lines += [f"    {name} = {literal}" for literal, name in self.numbers.items()] + [""]
        first = []
        for block in blocks:
            first.append(len(lines) + 1)
            lines += [f"    {line}" for line in block]
            lines.append("")
        lines.append("    return {")
        for name in names:
            leaf = self.ends[name]
            theirs = "" if leaf.is_leaf else "  # PyTorch's own graph goes on from here"
            lines.append(f"        {quoted(name)}: d_{self.reader.identifiers[name]},{theirs}")
        lines.append("    }")
        return "\n".join(lines) + "\n", first

    # -- records -------------------------------------------------------------------------

    def operation(self, i: int, step: "_Step", block: list[str], line: int) -> Operation:
        node = step.node
        module, kind = self.reader.module_of(node)
        saved = {name: self.copy(tensor) for name, tensor, _ in self.saved(node)}
        arguments: dict[str, object] = {}
        if node.plan is not None:
            given = node.plan.arguments or dict(
                zip(node.plan.given_names, node.given, strict=False)
            )
            arguments = {n: v for n, v in given.items() if n != "how" and not n.endswith("_shape")}
        values = [self.found_results.get((i, k)) for k in range(len(node.outputs))]
        results = tuple(
            Result(name, tuple(meta[0]), meta[1], value, grad)
            for name, meta, value, grad in zip(
                self.reader.labels[id(node)], node.outputs, values, step.slots, strict=True
            )
            if meta is not None
        )
        return Operation(
            index=i,
            node=bare(node.name()),
            module=module,
            module_class=kind,
            computes=documented.value(node.function),
            formula=documented.gradients(node.function),
            results=results,
            inputs=tuple(self.inputs(step)),
            saved=saved,
            arguments=arguments,
            place=place_of(node),
            source="\n".join(block),
            line=line,
        )

    def find_results(self) -> None:
        """Find the values of all results, as far as they have been kept.

        The others are computed again from known values.
        """
        for node in reversed(self.order):
            labels = self.reader.labels[id(node)]
            returned = vars(node).get("returned") or [None] * len(labels)
            values: list[T | None] = [
                None if held is None or held[0]._version != held[1] else held[0]
                for held in returned
            ]
            for k, name in enumerate(labels):
                if values[k] is None:
                    values[k] = self.values.get(name)
                if values[k] is None and self.root == (node, k):
                    values[k] = self.tensor.detach()
            if any(value is None for value in values):
                values = [*(self.again(node) or values)]
            for k, value in enumerate(values):
                if value is not None:
                    self.found_results[self.index[id(node)], k] = self.copy(value)

    def again(self, node: Node) -> Sequence[T] | None:
        """The results of a rule, computed from its arguments; None if these are not all known."""
        rule, formulas, plan = node.function, node.function.formulas, node.plan
        if formulas is None or plan is None or rule.is_inplace or rule.drawn or formulas.rest:
            return None
        known: dict[str, Any] = dict(zip(plan.given_names, node.given, strict=False))
        known.update(plan.arguments or ())
        known.update((name, tensor) for name, tensor, _ in self.saved(node))
        for place, edge in enumerate(node.edges):
            name = argument_name(node, place)
            if edge is None or name in known:
                continue
            if not isinstance(edge[0], Node):
                known[name] = edge[0].detach()
            elif (at := (self.index[id(edge[0])], edge[1])) in self.found_results:
                known[name] = self.found_results[at]
        given, meta = known.get("input"), node.outputs[0]
        if isinstance(given, T) and meta is not None and given.dtype is meta[1]:
            known.setdefault("dtype", None)  # none was given, or that of the input
        if not known.keys() >= set(formulas.names):
            return None
        try:
            out = formulas.forward(*[known[name] for name in formulas.names])
            out = formulas.results(out) if formulas.has_more else out
        except (RuntimeError, TypeError):
            return None
        outs = out if isinstance(out, tuple | list) else [out]
        shapes = [meta and meta[0] for meta in node.outputs]
        return outs if [getattr(o, "shape", None) for o in outs] == shapes else None

    def copy(self, tensor: T) -> T:
        """A copy, which later changes do not affect."""
        key = _memory(tensor)
        if key not in self.copies:
            self.copies[key] = _copy_of(tensor.detach())
        return self.copies[key]

    def inputs(self, step: "_Step") -> list[Input]:
        node = step.node
        saved = {name: tensor for name, tensor, _ in self.saved(node)}
        found = []
        for place, edge in enumerate(node.edges):
            if place not in node.places:
                continue
            name = argument_name(node, place)
            value: T | None = saved.get(name)
            operation, output, leaf = None, 0, None
            meta = None if value is None else (value.shape, value.dtype)
            if edge is not None:
                target, output = edge
                if isinstance(target, Node):
                    operation = self.index[id(target)]
                    meta = target.outputs[output][:2]
                    value = self.found_results.get((operation, output), value)
                else:
                    leaf, output = self.reader.of_leaf(target), 0
                    value, meta = target, (target.shape, target.dtype)
            shape, dtype = (None, None) if meta is None else (tuple(meta[0]), meta[1])
            value = None if value is None else self.copy(value)
            found.append(
                Input(name, operation, output, leaf, shape, dtype, value, step.results[place])
            )
        return found


def _changes(name: str, call: object) -> bool:
    """Does it change what has this name?"""
    if not isinstance(call, TorchCall) or call.func is None or not call.changes():
        return False
    return name in WORDS.findall(call.words[0]) or f"out={name}" in call.words


class _Step:
    """One step of the backward: the gradients it got, those it gave, and its lines of source."""

    def __init__(
        self, node: Node, slots: list[T | None], results: list[T | None], before: int
    ) -> None:
        self.node, self.slots, self.results = node, slots, results
        self.before = self.after = before
        self.reads_data = False


def _refuse_hooks(node: Node) -> None:
    """Raise for a hook that may change a gradient: it cannot be written into the function."""
    hooks = [*(node.prehooks or {}).values(), *(node.posthooks or {}).values()]
    for of_output in (node.tensor_hooks or {}).values():
        hooks += of_output.values()
    where = [f"{bare(node.name())}"] * len(hooks)
    if node.theirs is not None and beyond.is_hooked(node.theirs()):
        hooks.append(None)
        where.append("a tensor of torch's")
    for edge in node.edges:
        leaf = None if edge is None or isinstance(edge[0], Node) else edge[0]
        if leaf is None:
            continue
        its = [*(getattr(leaf, "_leaf_hooks", None) or {}).values()]
        its += (getattr(leaf, "_accumulate_hooks", None) or ({},))[0].values()
        hooks += its
        where += ["a leaf"] * len(its)
    for hook, at in zip(hooks, where, strict=True):
        if not isinstance(getattr(getattr(hook, "func", None), "__self__", None), Watch):
            name = getattr(hook, "__name__", None) or type(hook).__name__
            raise NotImplementedError(
                f"nnmirror.explain: the hook {name} on {at} may change a gradient, so the backward"
                " cannot be written without calling it. Take the hook off first (the handle's"
                " remove()); or use nnmirror.steps, which calls hooks as backward does"
            )


def _copy_of(tensor: T) -> T:
    """With the same strides."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return tensor.clone()
    reach = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in reach)
    memory = tensor.as_strided((extent,), (1,)).clone()
    return memory.as_strided(tensor.shape, tensor.stride())


def _memory(tensor: T) -> Hashable:
    """A key that is equal for tensors with the same numbers in the same memory."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "div": "/", "matmul": "@", "pow": "**",
    "and": "&", "or": "|", "xor": "^", "eq": "==", "ne": "!=", "gt": ">", "ge": ">=", "lt": "<",
    "le": "<=", "mod": "%", "floordiv": "//",
}  # fmt: skip
_AS_OPERATORS = {"add", "sub", "mul", "div", "matmul", "pow", "eq", "ne", "gt", "ge", "lt", "le"}
_NUMBERS = {0.0: "zero", 1.0: "one", 2.0: "two"}
_HOMES = {
    "torch": torch,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
    "torch.fft": torch.fft,
    "torch._C._nn": torch._C._nn,
}


def expression(func: Any, args: Sequence[object], words: list[str]) -> str:
    """A torch call as a person would write it."""
    name = getattr(func, "__name__", "")
    bare = name.strip("_")
    if name == "__get__":
        return f"{_atom(words[0])}.{func.__self__.__name__}"
    if name == "__getitem__":
        return f"{_atom(words[0])}[{_index(words[1])}]"
    if name == "__setitem__":
        return f"{words[0]}[{_index(words[1])}] = {words[2]}"
    dunder = name.startswith("__") and name.endswith("__")
    if dunder or name in _AS_OPERATORS:
        symbol = _OPERATORS.get(bare)
        if symbol and len(words) == 2 and not re.match(r"\w+=", words[1]):
            return _Operation(f"{_atom(words[0])} {symbol} {_atom(words[1])}")
        if dunder and bare[:1] == "r" and (symbol := _OPERATORS.get(bare[1:])):
            return _Operation(f"{_atom(words[1])} {symbol} {_atom(words[0])}")
        if dunder and bare[:1] == "i" and (symbol := _OPERATORS.get(bare[1:])):
            return f"{words[0]} {symbol}= {words[1]}"
    if name in ("neg", "__neg__") and len(words) == 1:
        return _Operation(f"-{_atom(words[0])}")
    method = getattr(T, name, None)
    if method is not None and method in (func,) and args and isinstance(args[0], T):
        return f"{_atom(words[0])}.{name}({', '.join(words[1:])})"
    home = next((h for h, m in _HOMES.items() if getattr(m, name, None) is func), None)
    if home is not None:
        full = f"{home}.{name}"
    elif type(func).__module__ == "torch._ops":
        full = f"torch.ops.{func}"
    else:
        full = torch.overrides.resolve_name(func) or f"torch.{name}"
    return f"{full}({', '.join(words)})"


class _Operation(str):
    """An expression that takes parentheses where it is part of another."""


def _atom(word: str) -> str:
    return f"({word})" if isinstance(word, _Operation) or word.startswith("-") else word


def _index(word: str) -> str:
    """slice(None, 3, None) as it is written in brackets."""

    def short(match: re.Match[str]) -> str:
        start, stop, step = ("" if part == "None" else part for part in match[1].split(", "))
        return f"{start}:{stop}" + (f":{step}" if step else "")

    if word.startswith("(") and word.endswith(")") and "(" not in word[1:].replace("slice(", ""):
        word = word[1:-1]
    return re.sub(r"slice\(([^()]*)\)", short, word)
