"""Replays of walks with `create_graph=True`: what they compute and record, as straight-line Python.

The generic walk passes tracked tensors to the rules' gradients, and each operation on them goes
through torch's dispatch to the tape. For a graph that occurs again, the operations and the nodes
that they make are known, so they are written as source that computes and makes the nodes. These are
the same nodes, with the same signatures, as those of the generic walk.

The first replay runs beside the generic walk. It is used from then on if its gradients have the
same bits, and its nodes have the same functions, edges and saved tensors.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from .. import tape as _tape
from .. import tensor as _tensor
from .. import walk as _walk
from .._state import sequence as _sequence
from .._torch import DisableTorchFunction, EnableTorchFunction, is_torch_function_enabled
from .._types import Args, Kwargs, TorchFunction
from .._upcalls import implements
from ..bits import same_layout_and_bits
from ..node import RECORDED, Edge, Node, Target
from ..running import GraphTask, dependencies
from . import writer as _writer
from .binding import is_observed
from .bound import Bound
from .composed import listing_calls
from .ends import WriterToEnds
from .keyed import first_that_fits, key_of
from .roots import start_of
from .shorter import WORDS, TorchCall, Unbindable, cheaper, memory_of, without_repeated
from .trial import may_be_used

T = torch.Tensor
_DETACH = (T.detach, torch.detach)


class Replay(Bound):
    """`run(n0, g, ends)`: the gradients for the `ends`, recorded; None if the graph is a different
    one."""

    kind = "recorded walk"

    def __init__(self, root: Node, ends: Sequence[Edge], grad: T) -> None:
        with GraphTask((), creates_graph=True):
            writer = ReplayWriter(root, ends)
            writer.go_back(grad)
        super().__init__(writer.source(), writer.environment, root)


@implements(_walk)
def replayed(
    edges: Sequence[Edge],
    grads: Sequence[T],
    only: Sequence[Edge],
    retain_graph: bool,
    generic: Callable[[], list[T | None]],
) -> list[T | None] | None:
    """The replayed walk from `edges` with create_graph; None if the generic one has to run.

    `generic()` runs the generic walk.
    """
    start = None if not retain_graph or is_observed() else start_of(edges, grads)
    if start is None:
        return None
    node, grad = start
    if node.segment is not None:
        node.segment.expand(node)
    sign, key = node.signature, key_of(grad, only)
    if sign is None or key is None:
        return None
    walks = sign.walks.replays

    def run(replay: Replay) -> list[T | None] | None:
        def records_alike() -> bool | None:
            results = replay.run(node, grad, only)
            return None if results is None else all(map(_alike, generic(), results))

        is_trusted = replay.trusted or may_be_used(
            replay, node, records_alike, functools.partial(walks.__setitem__, key, False)
        )
        return replay.run(node, grad, only) if is_trusted else None

    write = functools.partial(Replay, ends=only, grad=grad)
    return first_that_fits(walks, key, node, write, run)


class _NotesOfParts(_writer.Notes):
    """Of a function that records several calls, these calls."""

    def __torch_function__(
        self, func: TorchFunction, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        found = _tensor.RULES.get(func)
        kwargs = kwargs or {}
        if (
            found is not None
            and type(found) is not _tensor.Recorded
            and not func.__name__.endswith("_")
            and is_torch_function_enabled()
            and any(isinstance(t, _tensor.Tensor) for t in _tape.tensors_in((args, kwargs)))
        ):
            with self:
                return found(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


class ReplayWriter(WriterToEnds):
    """Writes a walk with the calls that it records; m0, m1 ... are the nodes that it makes."""

    def __init__(self, root: Node, ends: Sequence[Edge]) -> None:
        dependencies([(root, 0)], as_exposed=True)
        super().__init__(root, ends)
        self.first = next(_sequence)
        self.fresh: dict[str, int] = {}  # names of tensors with own memory, and that
        self.changed: set[int] = set()  # memory that is changed in place

    def run_for(self, node: Node, given: _writer.Slots, needs: tuple[bool, ...]) -> _writer.Slots:
        mine: dict[int, str] = {}
        for i, tensor in enumerate(node._saved or ()):
            if isinstance(tensor, T):
                self.found(tensor, f"{self.saved_as[id(node)]}[{i}]", mine)
                for edge in node.edges:  # a leaf counts as the alias of it that was saved
                    leaf = None if edge is None else edge[0]
                    if isinstance(leaf, _tensor.Tensor) and vars(leaf).get("_plain") is tensor:
                        mine.setdefault(id(leaf), mine[id(tensor)])
        sign = node.signature
        if sign is not None and sign.plan is not None and sign.plan.is_open:
            raise Unbindable
        with _NotesOfParts() as notes, listing_calls():
            results = _walk.validate_outputs(node, _tape.run_recorded(node, given, needs))
        if any(g is not None and g.requires_grad for g in given):
            zeros = {id(call[-1]) for call in notes.calls if call[0] is torch.zeros_like}
            if any(type(result) is T and id(result) not in zeros for result in results):
                raise Unbindable  # without history: zero this time only, perhaps
        self.write(notes, mine)
        for result in results:
            if result is not None and id(result) not in self.known:
                self.known[id(result)] = self.word(result, mine)
                self.alive.append(result)
        self.known.update(mine)  # the saved tensors of the new nodes
        self.alive += [node._saved]
        return results

    def write(self, notes: _writer.Notes, mine: dict[int, str]) -> None:
        """Write the recorded calls."""
        if notes.reads_data:
            raise Unbindable
        for place, (func, args, kwargs, out) in enumerate(notes.calls):
            new: tuple[TorchFunction, Args, Kwargs] | None = None
            self.alive += [args, kwargs, out]
            if hasattr(out, "_is_constant"):
                continue
            if func in _DETACH:  # an alias, which is not needed
                self.known[id(out)] = self.word(args[0], mine)
                continue
            call = TorchCall("", func, args, kwargs, [], out)
            if call.changes():  # an intermediate result of a gradient, if it is one
                if WORDS.fullmatch(self.word(kwargs.get("out", args[0]), mine)) is None:
                    raise Unbindable
                new = _as_new(call) if self.is_alone(out) else None
                is_result = isinstance(out, _tensor.Tensor) and not any(
                    later[-1] is out for later in notes.calls[place + 1 :]
                )
                if new is None and "out" in kwargs and is_result:
                    raise Unbindable  # its node would be made before the change
                if new is None:
                    self.changed.add(memory_of(out))
                else:
                    func, args, kwargs = new
                    call = call._replace(func=func, args=args, kwargs=kwargs)
            words = [self.word(a, mine) for a in args]
            words += [f"{key}={self.word(value, mine)}" for key, value in kwargs.items()]
            if new is not None:
                del self.known[id(out)]  # its next call gives it a new name
            self.assign(cheaper(call._replace(words=words), self.constant), mine)
            given = {memory_of(t) for t in _tape.tensors_in((args, kwargs))}
            if isinstance(out, T) and (new is not None or memory_of(out) not in given):
                self.fresh[self.known[id(out)]] = memory_of(out)

    def is_alone(self, changed: T) -> bool:
        """Is this the only tensor that sees a change of its memory?"""
        memory = memory_of(changed)
        return not any(
            isinstance(tensor, T)
            and tensor is not changed
            and id(tensor) in self.known
            and memory_of(tensor) == memory
            for tensor in self.alive
        )

    def added(self, held: T | None, grad: T) -> T:
        if held is None:
            return grad
        with _NotesOfParts() as notes, EnableTorchFunction(), listing_calls():
            total = held + grad
        self.write(notes, {})
        return total

    def source(self) -> str:
        lines = ["def backward(n0, g, ends):"]
        conditions: list[str] = []
        leaves = self.fetch(lines, conditions, {}, expanding=True)
        self.ask_what_passes(leaves, (), conditions)
        self.fetch_saved(lines, conditions, leaves)
        lines.append(f"{''.join([f'(end{i}, index{i}), ' for i in range(len(self.ends))])}= ends")
        places = {**self.names, **leaves}
        for i, (target, index) in enumerate(self.ends):
            if id(target) not in places or (id(target), index) not in self.found_at:
                raise Unbindable
            conditions.append(f"end{i} is not {places[id(target)]} or index{i} != {index}")
        results = [self.found_at[id(target), index] for target, index in self.ends]
        made = self.new_nodes(results)
        outputs: dict[int, Node] = {}
        for node in made:
            places[id(node)] = f"m{len(outputs)}"
            outputs[id(node)] = node
        results_of = {
            id(t._node): t
            for t in _tape.tensors_in(self.alive)
            if isinstance(t, _tensor.Tensor) and id(t._node) in outputs
        }
        for node in made:
            out = results_of.get(id(node))
            if out is None or self.known.get(id(out)) is None:
                raise Unbindable
            self.alive.append(out)
        escaping = self.escaping_names(made, results, results_of)
        kept = {memory_of(r) for r in results}
        self.lines, guards = without_repeated(self.lines, self.same, kept, escaping)
        needed = self.needed(escaping)
        conditions += guards
        lines.append("if (")
        lines += [f"    {'or ' if i else ''}{c}" for i, c in enumerate(conditions)]
        lines.append("): return None")
        self.environment |= {
            "new": object.__new__,
            "Node": Node,
            "Tensor": _tensor.Tensor,
            "sequence": _sequence,
        }
        made_behind = self.lines_of(made, results_of)
        for i, line in enumerate(self.lines):
            if isinstance(line, str):
                lines.append(line)
            elif isinstance(line, TorchCall) and self.is_needed(line, needed):
                lines.append(self.said(line, None))
                for node in made_behind.get(i, ()):
                    lines += self.creation(node, places, results_of)
        for i, result in enumerate(results):
            word = self.known[id(result)]
            lines.append(f"r{i} = {word}")
            if isinstance(result, _tensor.Tensor) and result._node is not None:
                if id(result._node) not in outputs:
                    raise Unbindable
                lines += [f"r{i}.__class__ = Tensor", f"r{i}._node = {places[id(result._node)]}"]
                if result._output_nr:
                    lines.append(f"r{i}._output_nr = {result._output_nr}")
                if result._view_of is not None:
                    lines += self.base_of(result, i, places)
            elif word == "g":
                raise Unbindable
        lines.append(f"return [{', '.join([f'r{i}' for i in range(len(results))])}]")
        return "\n    ".join(lines) + "\n"

    def lines_of(
        self, made: Sequence[Node], results_of: dict[int, _tensor.Tensor]
    ) -> dict[int, list[Node]]:
        """Behind which line each node is made: when its result is complete, and what it saves and
        the nodes that it leads to are there."""
        defined: dict[str, int] = {}
        changed: dict[int, int] = {}
        for i, line in enumerate(self.lines):
            if isinstance(line, TorchCall):
                if line.name:
                    defined[line.name] = i
                if line.changes():
                    changed[memory_of(line.out)] = i
        behind: dict[int, int] = {}  # of a node
        found: dict[int, list[Node]] = {}
        for node in made:
            out = results_of[id(node)]
            words = [self.saved_word(node, i, results_of) for i in range(len(node._saved or ()))]
            names = WORDS.findall(" ".join([self.known[id(out)], *words]))
            if not names or not all(name in defined for name in names):
                raise Unbindable
            before = [behind[id(t)] for t in node.targets if id(t) in behind]
            at = max([*map(defined.__getitem__, names), changed.get(memory_of(out), 0), *before])
            behind[id(node)] = at
            found.setdefault(at, []).append(node)
        return found

    def base_of(self, result: _tensor.Tensor, i: int, places: dict[int, str]) -> list[str]:
        """The source that makes the i-th result a view of its base."""
        base, _, kind = result._view_of or (None, 0, "")
        if kind not in ("default", "multi_output") or not isinstance(base, _tensor.Tensor):
            raise Unbindable
        made_by, word = base._node, self.known.get(id(base))
        if word is None or made_by is None or id(made_by) not in places or base._output_nr:
            raise Unbindable
        self.environment["view_of"] = _tape.view_of
        return [
            f"{word}.__class__, {word}._node = Tensor, {places[id(made_by)]}",
            f"r{i}._view_of = view_of({places[id(result._node)]}, r{i}, {word},"
            f" {kind == 'multi_output'})",
        ]

    def new_nodes(self, results: Sequence[T]) -> list[Node]:
        """The nodes that the walk recorded, in order."""
        made: dict[int, Node] = {}
        stack = [r._node for r in results if isinstance(r, _tensor.Tensor)]
        while stack:
            node = stack.pop()
            if node is None or id(node) in made or id(node) in self.names:
                continue
            if node.sequence < self.first:
                continue  # of the graph, beside the walk
            if node.signature is None or node.signature.plan is None:
                raise Unbindable
            if node.node_state is not RECORDED or node.attributes is not None:
                raise Unbindable
            made[id(node)] = node
            stack += [e[0] for e in node.edges if e is not None and isinstance(e[0], Node)]
        return sorted(made.values(), key=lambda node: node.sequence)

    def creation(
        self, node: Node, places: dict[int, str], results_of: dict[int, _tensor.Tensor]
    ) -> list[str]:
        """The source that makes a node."""
        name = places[id(node)]
        targets = ["None" if t is None else self.place_of(t, places) for t in node.targets]
        words = [self.saved_word(node, i, results_of) for i in range(len(node._saved or ()))]
        versions = [self.version(word) for word in words]
        return [
            f"{name} = new(Node)",
            f"{name}.function = {self.constant(node.function)}",
            f"{name}.signature = {name}.call_info = {self.constant(node.signature)}",
            f"{name}.targets = ({''.join([f'{t}, ' for t in targets])})",
            f"{name}._saved = ({''.join([f'{w}, ' for w in words])})",
            f"{name}._versions = ({''.join([f'{v}, ' for v in versions])})",
            f"{name}.sequence = next(sequence)",
        ]

    def place_of(self, target: Target, places: dict[int, str]) -> str:
        """The source of what an edge leads to."""
        if id(target) in places:
            return places[id(target)]
        for node in self.whole:  # beside the walk
            for i, other in enumerate(node.targets):
                if other is target and id(node) in self.names:
                    return f"{self.names[id(node)]}.targets[{i}]"
        raise Unbindable

    def version(self, word: str) -> str:
        """The source for the version of a saved tensor."""
        if word == "None":
            return "None"
        is_new = self.fresh.get(word, 0) not in self.changed | {0}
        return "0" if is_new else f"{word}._version"

    def saved_word(self, node: Node, i: int, results_of: dict[int, _tensor.Tensor]) -> str:
        """Where the saved tensors of a new node are found."""
        tensor = (node._saved or ())[i]
        if tensor is None:
            return "None"
        plan = node.plan
        if plan is not None and i < len(plan.saves) and plan.saves[i] < 0:
            if len(node.outputs) > 1:
                raise Unbindable
            return f"{self.known[id(results_of[id(node)])]}.detach()"
        word = self.known.get(id(tensor))
        if word is None and hasattr(tensor, "_is_constant"):
            word = self.constant(tensor)
        if word is None:
            raise Unbindable
        return word

    def escaping_names(
        self,
        made: Sequence[Node],
        results: Sequence[T],
        results_of: dict[int, _tensor.Tensor],
    ) -> set[str]:
        """The names of tensors that are returned, or the base of one, or saved by a node."""
        words = {self.known[id(r)] for r in results}
        views = [r._view_of for r in results if isinstance(r, _tensor.Tensor)]
        words.update(self.known.get(id(view[0]), "") for view in views if view is not None)
        for node in made:
            words.add(self.known[id(results_of[id(node)])])
            words.update(
                self.saved_word(node, i, results_of) for i in range(len(node._saved or ()))
            )
        return {name for word in words for name in WORDS.findall(word)}

    def is_needed(self, line: TorchCall, names: set[str]) -> bool:
        """Is it used, or does it change something?"""
        return line.name in names or line.changes() or memory_of(line.out) in self.changed

    def needed(self, seen: set[str]) -> set[str]:
        """The names of computed tensors that are used."""
        names = set(seen)
        for line in reversed(self.lines):
            if isinstance(line, TorchCall) and self.is_needed(line, names):
                names.update(n for word in line.words for n in WORDS.findall(word))
        return names


def _as_new(call: TorchCall) -> tuple[TorchFunction, Args, Kwargs] | None:
    """The function, with its arguments, whose new result is what `call` makes of an existing
    tensor; None if there is none.

    A node that saves the result is then made behind the last change, as when it was recorded.
    """
    func, args, kwargs = call.func, call.args, call.kwargs
    name = getattr(func, "__name__", "")
    if "out" in kwargs:
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
    elif name in _HAVE_NEW_RESULTS:
        func = getattr(T, name[:-1])
    else:
        return None
    with DisableTorchFunction(), torch.no_grad():
        has_same_dtype = func(*args, **kwargs).dtype is call.out.dtype
    return (func, args, kwargs) if has_same_dtype else None


_HAVE_NEW_RESULTS = {
    *("abs_", "add_", "addcdiv_", "addcmul_", "clamp_", "clamp_max_", "clamp_min_", "div_", "exp_"),
    *("masked_fill_", "mul_", "neg_", "pow_", "reciprocal_", "sigmoid_", "sqrt_", "sub_", "tanh_"),
}


def _alike(expected: T | None, actual: T | None) -> bool:
    """Are these two results equal, including their recorded graphs?"""
    if expected is None or actual is None:
        return False
    return _same(expected, actual) and _same_graph(expected, actual)


def _same(a: T, b: T) -> bool:
    return (
        type(a) is type(b)
        and (a.shape, a.dtype) == (b.shape, b.dtype)
        and same_layout_and_bits(a.detach(), b.detach())
    )


def _same_graph(expected: T, actual: T) -> bool:
    """Do they come from equal nodes, with the same leaves and the same earlier nodes?"""
    seen: dict[int, object] = {}
    stack = [(getattr(expected, "_node", None), getattr(actual, "_node", None))]
    while stack:
        a, b = stack.pop()
        if a is b:
            continue
        if id(a) in seen:
            if seen[id(a)] is not b:
                return False
            continue
        seen[id(a)] = b
        if not isinstance(a, Node) or not isinstance(b, Node):
            return False
        # A signature may have been replaced by another one since, such as one of a family.
        if a.function is not b.function or (a.signature is None) != (b.signature is None):
            return False
        if (a.needs_input_grad, a.outputs) != (b.needs_input_grad, b.outputs):
            return False
        saved = list(zip(a._saved or (), b._saved or (), strict=True))
        for x, y in saved:
            if x is not y and (x is None or y is None or not _same(x.detach(), y.detach())):
                return False
        for e, f in zip(a.edges, b.edges, strict=True):
            if (e is None) != (f is None):
                return False
            if e is not None and f is not None:
                if e[1] != f[1]:
                    return False
                stack.append((e[0], f[0]))
    return True
