"""Rules written as formulas, in the manner of PyTorch's derivatives.yaml.

    class Tanh(Rule):
        def forward(input):         return torch.tanh(input)
        def d_input(g, result):     return g * (1 - result * result)

`forward` computes the result from plain tensors and other arguments. For each argument that may
require grad, `d_<argument>` returns its gradient. The names of its parameters say what it needs:

- `g`, the gradient of the result;
- `result`, or the name of an argument of `forward`: such a tensor is saved, if it is needed;
- `<argument>_shape`: the shape of an argument, for which nothing is saved;
- `how`: the result of the rule's function `how(*args)`, which may depend on the arguments' layout.

If gradients share work, `gradients(needs, g, ...)` returns all of them, with None where `needs` is
False.

With several results `forward` returns a tuple, and the names are `g0`, `g1` ... or `gs` for all of
their gradients, and `result0`, `result1` ... A result without a gradient gets zeros, or None if the
rule has `materialize_grads = False`.

Intermediate values that a gradient needs are returned by forward after its results, and named in
`keeps`:

    class Max(Rule):
        keeps = ("index",)
        def forward(input, dim):                   return *torch.max(input, dim), index
        def d_input(g, input_shape, dim, index):   ...

Each is a tensor or None: a mask or indices, through which no gradient goes. A float tensor computed
from the arguments (a mean) is also named in `derived`, because gradients of gradients depend on it;
random numbers are also named in `drawn`. For values that depend only on the arguments' layout, use
`how`.

The last argument of `forward` may be `*<argument>`: its name then means the tuple of all of them,
and `<argument>_shape` the tuple of their shapes.

`refuse(needs, *args)`, if defined, raises for a call whose gradient the rule does not have.

`saved_memory(*args)`, if defined, names the arguments that are saved with their present memory, as
PyTorch does where it saves a view: a later assignment to their `.data` does not reach them. With
`overwrites = True` an operation in place leaves nothing of its first argument, whose gradient is
then zero.

`choose(*args)`, if defined, returns the function that computes all later calls with the same
signature (see fast/signature.py); `choose_for_any_size(*args)` the one for all signatures of a
family.
"""

import copy
import dis
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from types import (
    BuiltinFunctionType,
    FunctionType,
    MethodDescriptorType,
    UnionType,
    WrapperDescriptorType,
)
from typing import (
    TYPE_CHECKING,
    Any,
    NoReturn,
    Protocol,
    TypeAlias,
    Union,
    get_args,
    get_origin,
)

import torch

from ._types import Args, TorchFunction
from .fast.signature import Unsigned, of_tensor, of_value

if TYPE_CHECKING:
    import nnmirror.node

    from .fast.source import Environment
    from .node import Node
    from .operation import Operation

T = torch.Tensor
# Returns one gradient, or one for each argument.
Gradient: TypeAlias = Callable[..., T | None]
Gradients: TypeAlias = Callable[..., Sequence[T | None]]
# Returns the gradients of all arguments; the second argument is `g` or `gs`.
Back: TypeAlias = Callable[["nnmirror.node.Node", Any], tuple[T | None, ...]]

RESULT = -1  # the place of a result; ~n for the n-th of several
_MOST_PLANS = 256  # stored for one rule
_G = re.compile(r"g(\d+)")
_RESULT_NAME = re.compile(r"result(\d*)")


class Plan:
    """The plan of a call: what to compute and save, for one pattern of tensors and of gradients
    needed.

    Other arguments of a gradient, numbers and shapes, are stored in the node; or in the plan, if
    they are the same in all calls with this plan (`fixed`).
    """

    __slots__ = (
        "arguments",
        "backs",
        "compute",
        "copied",
        "given",
        "given_as",
        "given_names",
        "is_open",
        "label",
        "memory",
        "names",
        "of_other",
        "read_memory",
        "saves",
        "saves_number",
    )

    def __init__(self) -> None:
        self.compute: TorchFunction = _nothing
        self.saves: tuple[int, ...] = ()  # places among the arguments, or of results
        self.names: tuple[str, ...] = ()  # of the saved tensors
        # Other arguments of the gradients: values and shapes.
        self.given: Callable[[Args], Args] | None = None
        self.given_names: tuple[str, ...] = ()
        self.is_open = False  # these may differ from call to call
        self.given_as: tuple[str, ...] = ()  # the same as source, which reads them from `args`
        self.arguments: dict[str, object] | None = None  # their values, if they are always the same
        self.memory: tuple[int, ...] = ()  # of the saved: with their present memory
        self.copied: tuple[int, ...] = ()  # of the saved: as copies
        self.read_memory: tuple[int, ...] = ()  # of `memory`: those that a gradient uses
        self.saves_number = False
        self.label = ""
        self.backs: dict[tuple[bool, ...], Back] = {}  # by the gradients needed
        self.of_other: Plan | None = None  # the plans for the gradients of another rule

    def place_saved(self, index: int) -> int | None:
        """The place of the argument, or of the result, that was saved at `index`; None if
        neither."""
        return self.saves[index] if index < len(self.saves) else None  # then `keeps`

    def fixed(self, given: Sequence[object], label: str) -> "Plan":
        """This plan for calls with these arguments, and with this name for their nodes."""
        if self.arguments is not None or not (given or label):
            return self
        plan = copy.copy(self)
        plan.arguments = dict(zip(self.given_names, given, strict=True))
        plan.label, plan.backs, plan.is_open = label, {}, False
        plan.of_other = None  # without these arguments
        return plan

    def for_other(self) -> "Plan":
        """This plan for the gradients of another rule that saves the same."""
        if self.of_other is None:
            self.of_other = copy.copy(self)
            self.of_other.backs = {}
        return self.of_other

    def labelled(self, label: str) -> "Plan":
        """This plan for calls whose nodes have this name."""
        if not label:
            return self
        plan = copy.copy(self)
        plan.label = label
        return plan

    def keep(self, node: "Node", args: Args, out: Any, apart: bool = False) -> Any:
        """Save with `node` what its backward needs; returns the result.

        With `apart`, an alias of the result is saved, as it would keep itself alive.
        """
        saves = self.saves
        if saves:
            saved = []
            for i in saves:
                saved.append(args[i] if i >= 0 else out.detach() if apart else out)
            for i in self.copied:
                saved[i] = saved[i].detach().contiguous()
            self.refuse_inference(node, args)
            for i in self.memory:
                plain = getattr(saved[i], "_plain", None)
                saved[i] = saved[i].detach() if plain is None else plain
            node.save_for_backward(*saved)
        elif self.saves_number:
            node.save_for_backward(None)
        return out

    def refuse_inference(self, node: "Node", args: Args) -> None:
        """Raise for a tensor of inference mode that would be saved: its alias would not be
        noticed."""
        for i in self.read_memory:
            if args[self.saves[i]].is_inference():
                node.refuse_inference()


class PlanOfMore(Plan):
    """The plan of a rule whose forward returns more than one result."""

    __slots__ = ("formulas", "kept")

    def __init__(self, formulas: "Formulas", kept: tuple[int, ...]) -> None:
        super().__init__()
        self.formulas = formulas
        self.kept = kept  # of values in `keeps`, which are saved last

    def keep(self, node: "Node", args: Args, out: Any, apart: bool = False) -> Any:
        results, kept = self.formulas.parts(out)
        as_saved = [r.detach() for r in results] if apart and RESULT in self.saves else results
        saved = [args[i] if i >= 0 else as_saved[~i] for i in self.saves]
        saved += [kept[i] for i in self.kept]
        if saved:
            node.save_for_backward(*saved)
        return results if self.formulas.several else results[0]


def _nothing(*args: object) -> NoReturn:
    raise NotImplementedError


def as_now(value: Any) -> Any:
    """An argument as it is now, for a gradient: a list or a NumPy array as a copy; in these, in a
    tuple or a slice, the number of a tensor without dimensions."""
    kind = type(value)
    if kind is slice:
        return slice(as_now(value.start), as_now(value.stop), as_now(value.step))
    if kind is list or kind is tuple:
        return kind(map(as_now, value))
    if kind.__module__ == "numpy" and hasattr(value, "copy"):
        return value.copy()
    return _number(value)


def _number(value: Any) -> Any:
    is_number = isinstance(value, T) and not value.dim() and not value.requires_grad
    number = value.item() if is_number else value
    return int(number) if is_number and type(number) is bool else number


def _kinds_in(annotation: object) -> set[object]:
    """The types that an annotation names."""
    if isinstance(annotation, UnionType) or get_origin(annotation) is Union:
        return set[object]().union(*map(_kinds_in, get_args(annotation)))
    if get_origin(annotation) is not None:
        return {get_origin(annotation)}.union(*map(_kinds_in, get_args(annotation)))
    return {annotation}


# Types of arguments that cannot be changed.
_UNCHANGED = {bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device, T}
_UNCHANGED |= {torch.memory_format, torch.layout, torch.Generator}


class Formulas:
    """The formulas of one rule."""

    def __init__(self, function: "type[Operation]", raw_forward: "_Method") -> None:
        self.function = function
        self.raw_forward = raw_forward  # as defined in its class
        self.forward: TorchFunction = raw_forward.__get__(None, function)
        self.infer = function.infer if "forward" in vars(function) else None
        self.parameters = list(inspect.signature(self.forward).parameters.values())
        self.rest = ""  # the name of the `*` argument
        if self.parameters and self.parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL:
            self.rest = self.parameters[-1].name
        self.kinds = [_kinds_in(p.annotation) for p in self.parameters]
        self.names = [p.name for p in self.parameters if p.name != self.rest]
        self.defaults = [p.default for p in self.parameters if p.name != self.rest]
        self.joint: Gradients | None = getattr(function, "gradients", None)
        self.joint_needs = [] if self.joint is None else _names(self.joint)[1:]
        self.single: list[Gradient | None] = [
            getattr(function, f"d_{name}", None) for name in self.names
        ]
        # Where a tensor without dimensions stands for its number.
        self.numbers_at = {
            place: kinds
            for place, (kinds, gradient) in enumerate(zip(self.kinds, self.single, strict=False))
            if gradient is None and kinds & {int, float} and T not in kinds
        }
        self.needed_by = [[] if f is None else _names(f) for f in self.single]
        self.named = {*self.joint_needs, *function.always_saved}.union(*self.needed_by)
        self._check_names()
        self.several = any(n == "gs" or _G.fullmatch(n) for n in self.named)
        self.has_more = self.several or bool(function.keeps)
        # Of the values in `keeps`, the places of those that are not in `derived`.
        known = (*function.derived, *function.drawn)
        self.underived = [i for i, n in enumerate(function.keeps) if n not in known]
        # Whether the plan itself depends on the layout of the tensors.
        asked = function.copied is not None or function.saved_memory is not None
        self.by_layout = asked or _overrides(function, "choose")
        self.labels = _overrides(function, "label_of")
        self.refuse = getattr(function, "refuse", None)
        # Whether calls that differ only by numbers can share a signature.
        self.takes_any_number = not self.by_layout and self.refuse is None
        self.how = getattr(function, "how", None)
        self.plans: dict[object, Plan] = {}
        self.compiled: dict[str, Callable[..., Any]] = {}  # functions by their source

    @functools.cached_property
    def compute(self) -> TorchFunction:
        """Torch's function with the same arguments, if forward only calls that; else forward."""
        if not self.function.keeps:
            if inspect.isbuiltin(self.infer):
                return self.infer
            called = _only_called_by(self.forward)
            if called is not None:
                return called
        return self.forward

    @functools.cached_property
    def result(self) -> TorchFunction:
        """The result of forward, without the values in `keeps`."""
        if self.has_more:
            return lambda *args: self.results(self.forward(*args))
        return self.compute

    @functools.cached_property
    def by_hand(self) -> tuple[bool, ...]:
        """Which arguments the gradient of a layer's input needs if nothing requires grad; and last,
        whether it needs the result."""
        place = self.function.input_place
        needs = tuple([i == place for i in range(len(self.names))])
        needed = self.needed_for(needs).union(self.function.always_saved)
        return *[n in needed for n in self.names], any(map(_RESULT_NAME.fullmatch, needed))

    def _check_names(self) -> None:
        known = {"g", "gs", "how", *self.names, *self.function.keeps}
        known.update([f"{name}_shape" for name in self.names])
        known.update((self.rest, f"{self.rest}_shape") if self.rest else ())
        for name in self.named - known:
            if not (_G.fullmatch(name) or _RESULT_NAME.fullmatch(name)):
                raise TypeError(f"{self.function.__name__} needs {name}, which it does not save")

    def call(self, node: "Node", *args: object) -> Any:
        """Call `forward`, and save with `node`."""
        out = self.forward(*args)
        if not node.records:
            return self.results(out) if self.has_more else out
        return self.keep(node, args, out)

    def keep(self, node: "Node", args: Args, out: Any) -> Any:
        """Save with `node` what the backward of a call needs that returned `out`; its results."""
        if self.refuse is not None:
            self.refuse(node.needs_input_grad, *args)
        if self.by_layout:
            plan = node.plan = self._plan_by_layout(args, node.needs_input_grad)
            if plan.label:
                node.label = plan.label
        else:
            plan = node.plan = self.plan_by_kinds(args, node.needs_input_grad)
            if plan.given is not None:
                node.given = plan.given(args)
            if self.labels:
                node.label = self.function.label_of(*args)
        if self.has_more and not self.function.materialize_grads:
            node.materialize_grads = False
        out = plan.keep(node, args, out)
        if self.function.is_inplace:
            node.mark_dirty(out)
        return out

    def parts(self, out: Any) -> tuple[Sequence[T], Sequence[T | None]]:
        """The values returned by forward: the results, and those in `keeps`."""
        count = len(self.function.keeps)
        if not count:
            return out, ()
        kept = out[-count:]
        for i in self.underived:
            if kept[i] is not None and kept[i].is_floating_point():
                raise TypeError(
                    f"{self.function.__name__} keeps {self.function.keeps[i]}, a float tensor, and"
                    " does not say that it is derived from the arguments"
                )
        return out[:-count], kept

    def results(self, out: Any) -> Any:
        """The results of forward, without those in `keeps`."""
        results = self.parts(out)[0]
        return results if self.several else results[0]

    def plan(self, args: Args, needs: tuple[bool, ...]) -> Plan:
        """The plan for calls with these arguments."""
        if self.by_layout:
            return self._plan_by_layout(args, needs)
        plan = self.plan_by_kinds(args, needs)
        given = () if plan.given is None else plan.given(args)
        return plan.fixed(given, self.function.label_of(*args))

    def plan_for_any_size(self, args: Args, needs: tuple[bool, ...]) -> tuple[Plan | None, bool]:
        """The plan for calls that differ from this one by sizes (see `Family`), which computes for
        any; and whether it is that of each, or only saves the same."""
        plan = self.plan(args, needs)
        if plan.copied:
            return None, False
        if not self.by_layout:
            # Shapes and what `how` says of them are other ones.
            values = [re.fullmatch(r"as_now\(args\[\d+\]\)|\w+\[\d+\]", g) for g in plan.given_as]
            return plan, all(values)
        plan = copy.copy(plan)
        compute = self.function.choose_for_any_size(*args)
        plan.compute = compute or self.compute
        return plan, compute is not None

    def plan_by_kinds(self, args: Args, needs: tuple[bool, ...]) -> Plan:
        """The plan for arguments among which the same ones are tensors."""
        key = needs, *[isinstance(a, torch.Tensor) for a in args]
        return self.plans.get(key) or self._new_plan(args, needs, key)

    def _plan_by_layout(self, args: Args, needs: tuple[bool, ...]) -> Plan:
        """The plan for arguments with this layout."""
        try:
            key = (
                needs,
                *[
                    (type(a), of_tensor(a)) if isinstance(a, torch.Tensor) else of_value(a)
                    for a in args
                ],
            )
        except Unsigned:
            return self._new_plan(args, needs)
        return self.plans.get(key) or self._new_plan(args, needs, key)

    def _new_plan(self, args: Args, needs: tuple[bool, ...], key: object = None) -> Plan:
        plan = self._planned(args, needs)
        if key is not None:
            if len(self.plans) >= _MOST_PLANS:
                self.plans.clear()
            self.plans[key] = plan
        return plan

    def _planned(self, args: Args, needs: tuple[bool, ...]) -> Plan:
        function = self.function
        asked = any(needs)
        if not asked:  # a layer driven by hand still returns the gradient of its input
            place = function.input_place
            needs = (*needs[:place], True, *needs[place + 1 :])
        elif self.joint is None:
            self._check_needs(needs)
        used = self.needed_for(needs)
        if self.has_more:
            kept = tuple([i for i, name in enumerate(function.keeps) if name in used])
            plan: Plan = PlanOfMore(self, kept)
        else:
            plan = Plan()
        in_memory = () if function.saved_memory is None else function.saved_memory(*args)
        read = used.intersection(in_memory) if asked else ()
        used.update(function.always_saved)
        saves: list[int] = []
        saved_names: list[str] = []
        given: dict[str, str] = {}
        count = len(self.names)
        for place, name in enumerate(self.names):
            is_tensor = place < len(args) and isinstance(args[place], torch.Tensor)
            if name in used and is_tensor:
                saves.append(place)
                saved_names.append(name)
            elif name in used:
                given[name] = self.value_of(place) if place < len(args) else f"defaults[{place}]"
            if f"{name}_shape" in used:
                given[f"{name}_shape"] = f"args[{place}].shape" if is_tensor else "None"
        if self.rest in used:
            for place, value in enumerate(args[count:], start=count):
                name = f"{self.rest}_{place - count}"
                if isinstance(value, torch.Tensor):
                    saves.append(place)
                    saved_names.append(name)
                else:
                    given[name] = self.value_of(place)
        if self.rest and f"{self.rest}_shape" in used:
            given[f"{self.rest}_shape"] = f"tuple([a.shape for a in args[{count}:]])"
        for name in sorted(used):
            which = _RESULT_NAME.fullmatch(name)
            if which is not None and name not in self.names:
                saves.append(~int(which[1] or 0))
                saved_names.append(name)
        if isinstance(plan, PlanOfMore):
            saved_names += [function.keeps[i] for i in plan.kept]
        plan.saves = tuple(saves)
        plan.names = tuple(saved_names)
        if "how" in used:
            given["how"] = "how(*args)"
        if given:
            plan.given_names, plan.given_as = tuple(given), tuple(given.values())
            source = f"    def given(args): return ({', '.join(given.values())},)"
            make = self._compiled(f"def make(how, defaults, as_now):\n{source}\n    return given")
            plan.given = make(self.how, self.defaults, as_now)
        if function.copied is not None:
            copied = function.copied(*args)
            plan.copied = tuple([i for i, n in enumerate(saved_names) if n in copied])
        in_place = [i for i, n in enumerate(saved_names) if n in in_memory]
        plan.memory = tuple([i for i in in_place if i not in plan.copied])
        plan.read_memory = tuple([i for i in plan.memory if saved_names[i] in read])
        plan.saves_number = function.saves_number and not saves
        plan.compute = self.compute
        if not self.by_layout:
            plan.is_open = plan.given is not None
            return plan
        plan.compute = function.choose(*args) or self.compute
        plan.label = function.label_of(*args)
        values = () if plan.given is None else plan.given(args)
        plan.arguments = dict(zip(plan.given_names, values, strict=True))
        return plan

    def value_of(self, place: int) -> str:
        """The source of the argument at `place`, which may be a list that is changed later."""
        kinds = self.kinds[min(place, len(self.kinds) - 1)]
        return f"args[{place}]" if kinds <= _UNCHANGED else f"as_now(args[{place}])"

    def needed_for(self, needs: tuple[bool, ...]) -> set[str]:
        """The arguments of these gradients, by name."""
        if self.joint is not None:
            return set(self.joint_needs)
        named = zip(needs, self.needed_by, strict=False)
        return {name for need, names in named if need for name in names}

    def _in_order(self, plan: Plan, needs: tuple[bool, ...]) -> list[int]:
        """The places of the arguments in the order in which PyTorch computes their gradients.

        That is the order of their names in PyTorch's generated code. In a recorded backward it
        determines the order in which later gradients are summed.
        """
        names = [*self.names, *[self.rest] * (len(needs) - len(self.names))]
        known_as = {"input": "self"}
        if self.function.known_as is not None:
            known_as |= self.function.known_as(plan.label)
        return sorted(range(len(needs)), key=lambda i: known_as.get(names[i], names[i]))

    def _gradient(self, place: int) -> Gradient | None:
        """The function for the gradient of an argument."""
        return self.single[place] if place < len(self.single) else None

    def _check_needs(self, needs: tuple[bool, ...]) -> None:
        """PyTorch's error if an argument requires a gradient for which there is no formula."""
        rule = self.function
        for i, need in enumerate(needs):
            if need and self._gradient(i) is None:
                in_aten = getattr(rule, "aten_name", "")
                called = in_aten or getattr(rule.public, "__name__", rule.__name__)
                name = self.names[i] if i < len(self.names) else self.rest
                raise RuntimeError(
                    f"The function '{called}' is not differentiable with respect to argument"
                    f" '{name}'. This input cannot have requires_grad True."
                )

    def back(self, node: "Node", g: T | Sequence[T | None]) -> tuple[T | None, ...]:
        """The gradients of all arguments."""
        plan: Any  # the node has one, as its rule has formulas
        info = node.call_info
        plan, needs = info.plan, info.needs
        back = plan.backs.get(needs)
        if back is None:
            back = plan.backs[needs] = self._written(plan, needs)
        return back(node, g)  # type: ignore[no-any-return]

    def back_from_several(self, node: "Node", *gs: T | None) -> tuple[T | None, ...]:
        """The same for several results."""
        return self.back(node, gs)

    def back_plainly(self, node: "Node", grads: Sequence[T | None]) -> list[T | None]:
        """The gradients of all arguments, from those of the results: `back`, to step through.

        Each formula is called with the arguments that its parameters name.
        """
        plan: Any = node.plan  # as in `back`
        needs = node.needs_input_grad
        saved = node.unchanged(self)
        given: dict[str, object] = dict(zip(plan.names, saved, strict=False))
        given.update(zip(plan.given_names, node.given, strict=False))
        given.update(plan.arguments or ())
        given["g"] = grads[0]
        if self.several or self.rest:
            given.update(self._given_of_many(node, grads, given))
        if self.joint is not None:
            found = self.joint(needs, *map(given.get, self.joint_needs))
            return [*found, *[None] * (len(needs) - len(found))]
        results: list[T | None] = [None] * len(needs)
        for place in itertools.compress(range(len(needs)), needs):
            d_argument: Any = self.single[place]
            results[place] = d_argument(*map(given.get, self.needed_by[place]))
        return results

    def _given_of_many(
        self, node: "Node", grads: Sequence[T | None], given: dict[str, object]
    ) -> Iterator[tuple[str, object]]:
        """The arguments of a formula with several results, or any number of arguments."""
        if node.materialize_grads and any(g is None for g in grads):
            grads = [
                torch.zeros(m[0], dtype=m[1], device=m[2]) if g is None else g
                for g, m in zip(grads, node.outputs, strict=True)
            ]
        yield "gs", tuple(grads)
        for i, g in enumerate(grads):
            yield f"g{i}", g
        count = len(node.needs_input_grad) - len(self.names)
        yield self.rest, tuple([given.get(f"{self.rest}_{i}") for i in range(count)])

    def _written(self, plan: Plan, needs: tuple[bool, ...]) -> Back:
        """`back` for these needs, as a function without lookups."""
        environment: Environment = {}
        lines: list[str] = []
        fetched: set[str] = set()
        in_rest = len(needs) - len(self.names)

        def saved(name: str) -> str:
            if name not in plan.names:
                if plan.arguments is None:
                    return f"node._given[{plan.given_names.index(name)}]"
                environment[f"its_{name}"] = plan.arguments[name]
                return f"its_{name}"
            if name not in fetched:
                fetched.add(name)
                i = plan.names.index(name)
                same = f"_saved[{i}]._version == node._versions[{i}]"
                if name in self.function.keeps:  # which may be None
                    same = f"_saved[{i}] is not None and {same}"
                or_error = f"node.saved({i}, {self.function.saved_via.get(name)!r})"
                lines.append(
                    f"{name} = _saved[{i}] if _saved is not None and {same} else {or_error}"
                )
            return name

        def word(name: str) -> str:
            if name in ("g", "gs"):
                return name
            if (which := _G.fullmatch(name)) is not None:
                return f"gs[{which[1]}]"
            if name == self.rest:
                return f"({''.join([saved(f'{name}_{i}') + ', ' for i in range(in_rest)])})"
            return saved(name)

        if plan.names:
            lines.append("_saved = node._saved")
        elif plan.saves_number:
            lines.append("node.saved(0)")  # it is freed with the graph
        if self.joint is not None:
            more = (False,) * -in_rest  # missing ones
            environment["gradients"], environment["needs"] = self.joint, needs + more
            words = ["needs", *[word(n) for n in self.joint_needs]]
            pad = f", *[None] * ({len(needs)} - len(found))" if len(needs) > 1 else ""
            lines += [f"found = gradients({', '.join(words)})", f"return (*found{pad},)"]
        else:
            grads = ["None"] * len(needs)
            for i in self._in_order(plan, needs):
                function = self._gradient(i) if needs[i] else None
                if function is None:
                    continue
                environment[f"d_{self.names[i]}"] = function
                words = [word(n) for n in self.needed_by[i]]
                lines.append(f"dx{i} = {'d_' + self.names[i]}({', '.join(words)})")
                grads[i] = f"dx{i}"
            lines.append(f"return ({', '.join(grads)},)")
        given = "gs" if self.several else "g"
        source = "\n        ".join([f"    def back(node, {given}):", *lines])
        source = f"def make({', '.join(environment)}):\n{source}\n    return back"
        return self._compiled(source)(**environment)  # type: ignore[no-any-return]

    def _compiled(self, source: str) -> Callable[..., Any]:
        """The function that `source` defines."""
        function = self.compiled.get(source)
        if function is None:
            made: Environment = {}
            exec(compile(source, f"<gradients of {self.function.__name__}>", "exec"), made)
            function = made.pop("make")  # no cycle
            if len(self.compiled) >= _MOST_PLANS:
                self.compiled.clear()
            self.compiled[source] = function
        return function


def _overrides(function: "type[Operation]", name: str) -> bool:
    """Does the rule, or a class between it and Operation, define `name`?"""
    return any(name in vars(cls) for cls in function.__mro__[:-2])


def _names(function: Callable[..., object]) -> list[str]:
    """The names of its parameters."""
    if type(function) is FunctionType and not vars(function):
        code = function.__code__
        if not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
            # The same, faster: it is called for hundreds of functions when the package is imported.
            return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    return list(inspect.signature(function).parameters)


class _Called:
    """Stands for a function of torch: returns how it is called."""

    def __init__(self, *path: str) -> None:
        self.path = path

    def __getattr__(self, name: str) -> "_Called":
        return _Called(*self.path, name)

    def __call__(
        self, *args: object, **kwargs: object
    ) -> tuple[tuple[str, ...], tuple[object, ...], dict[str, object]]:
        return self.path, args, kwargs


def _only_called_by(function: TorchFunction) -> TorchFunction | None:
    """Torch's function, if `function` does no more than call it with its own arguments."""
    code = getattr(function, "__code__", None)
    if code is None or function.__defaults__ or dis.findlabels(code.co_code):  # it has branches
        return None
    given = tuple([object() for _ in range(code.co_argcount)])
    stand_ins: Environment = {"torch": _Called("torch"), "T": _Called("torch", "Tensor")}
    try:
        path, args, kwargs = FunctionType(code, stand_ins)(*given)
    except Exception:  # it does something else
        return None
    if kwargs or args != given or type(path) is not tuple:
        return None
    found = functools.reduce(getattr, path[1:], torch)
    return found if isinstance(found, C_FUNCTIONS) else None


# The types of functions in C: torch.exp, Tensor.exp, Tensor.__getitem__.
C_FUNCTIONS = BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType


class _Method(Protocol):
    """A function, staticmethod or classmethod, as it is found in its class."""

    def __get__(self, instance: None, owner: type, /) -> TorchFunction: ...


def _forward_of(function: "type[Operation]") -> _Method | None:
    """The forward for the formulas of `function`, as defined in its class."""
    for cls in function.__mro__[:-2]:
        own = vars(cls)
        if own.get("formulas") is not None:
            return own["formulas"].raw_forward
        if "backward" in own:
            return None
        if "forward" in own:
            return own["forward"]
    return None


def read(function: Any) -> None:
    """Set `function.formulas`, if it is written as formulas, and the methods that `record`
    calls."""
    function.recorders, function.recorders_in_place = {}, {}
    function.result, function.can_wait = function.infer, False
    forward = _forward_of(function)
    gives = any(name.startswith("d_") or name == "gradients" for name in dir(function))
    if (
        not (function.is_rule and gives)
        or forward is None
        or _names(forward.__get__(None, function))[:1] == ["ctx"]
    ):
        function.formulas = None
        return
    formulas = function.formulas = Formulas(function, forward)
    function.result = function.infer or formulas.result
    function.numbers_at = formulas.numbers_at
    function.can_wait = not (formulas.has_more or function.is_inplace)
    function.forward = staticmethod(formulas.call)
    function.backward = staticmethod(
        formulas.back_from_several if formulas.several else formulas.back
    )
