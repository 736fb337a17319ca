"""Rules written as formulas, in the manner of PyTorch's derivatives.yaml.

    class Tanh(Rule):
        def forward(input):         return torch.tanh(input)
        def d_input(g, result):     return g * (1 - result * result)

`forward` computes the result from plain tensors and other arguments. For each argument that may
require grad, `d_<argument>` gives its gradient. The names of its parameters say what it needs:

- `g`, the gradient of the result;
- `result`, or the name of an argument of `forward`: a tensor so named is saved, if it is needed;
- `<argument>_shape`: the shape of an argument, for which nothing is saved.

- `how`: what the rule's function `how(*args)` says of the arguments' layout.

Where gradients share work, `gradients(needs, g, ...)` gives all of them, None for those whose
place in `needs` is False.

`choose(*args)`, if there is one, returns the callable that computes all later calls of the same
signature (see fast/signature.py).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .fast.signature import Unsigned, of_tensor, of_value

RESULT = -1
_ONLY_RESULT = (RESULT,)
_NEW = (0,)
_MOST_PLANS = 256  # kept for one rule


class Plan:
    """What is computed and saved for one pattern of needs and arguments."""

    __slots__ = (
        "arguments",
        "backs",
        "compute",
        "label",
        "memory",
        "names",
        "needs_memory",
        "saves",
        "saves_number",
    )

    def __init__(self) -> None:
        self.compute: Callable[..., Any] = _nothing
        self.saves: tuple[int, ...] = ()  # places among the arguments, or RESULT
        self.names: tuple[str, ...] = ()  # of what is saved
        self.arguments: dict[str, Any] = {}  # those that are no tensors
        self.memory: tuple[int, ...] = ()  # of the saved: kept in the memory that they have now
        self.needs_memory = False  # a gradient does, and it is not only kept
        self.saves_number = False
        self.label = ""
        self.backs: dict[tuple[bool, ...], Callable[..., Any]] = {}  # by the gradients needed

    def keep(self, node: Any, args: tuple[Any, ...], out: Any) -> None:
        """Save with `node` what its backward needs."""
        if self.saves:
            saved = [args[i] if i >= 0 else out for i in self.saves]
            for i in self.memory:
                if self.needs_memory and saved[i].is_inference():
                    node.refuse_inference()  # the alias would go unnoticed
                saved[i] = saved[i].detach()
            node.save_for_backward(*saved)
        elif self.saves_number:
            node.save_for_backward(None)

    def keep_apart(self, node: Any, args: tuple[Any, ...], out: Any) -> None:
        """The same for a new result, saved as an alias: it would keep itself alive."""
        saves = self.saves
        if saves == _ONLY_RESULT:
            node._saved, node._versions = (out.detach(),), _NEW
        elif saves:
            saved = []
            for i in saves:
                saved.append(args[i] if i >= 0 else out.detach())
            for i in self.memory:
                plain = getattr(saved[i], "_plain", None)
                saved[i] = saved[i].detach() if plain is None else plain
            try:
                versions = []
                for tensor in saved:
                    versions.append(tensor._version)
                node._saved, node._versions = saved, versions
            except RuntimeError:  # one of inference mode
                node.save_for_backward(*saved)
        elif self.saves_number:
            node._saved = node._versions = (None,)


def _nothing(*args: Any) -> Any:
    raise NotImplementedError


class Formulas:
    """The formulas of one rule."""

    def __init__(self, function: Any, forward: Callable[..., Any]) -> None:
        self.function = function
        self.forward = forward
        self.parameters = list(inspect.signature(forward).parameters.values())
        parameters = self.parameters
        self.names = [p.name for p in parameters]
        self.defaults = [p.default for p in parameters]
        self.joint = getattr(function, "gradients", None)
        self.joint_needs = [] if self.joint is None else _names(self.joint)[1:]
        self.single = [getattr(function, f"d_{name}", None) for name in self.names]
        self.needed_by = [[] if f is None else _names(f) for f in self.single]
        self.plans: dict[Any, Plan] = {}

    def call(self, node: Any, *args: Any) -> Any:
        """`forward`, and what is saved of it with `node`."""
        out = self.forward(*args)
        if not node.records:
            return out
        plan = node.plan = self.plan(args, node.needs_input_grad)
        if plan.label:
            node.label = plan.label
        if self.function.is_inplace:
            node.mark_dirty(out)
        plan.keep(node, args, out)
        return out

    def plan(self, args: tuple[Any, ...], needs: tuple[bool, ...]) -> Plan:
        """The plan for these arguments, made when they come first."""
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
        plan = self.plans.get(key)
        if plan is None:
            plan = self._new_plan(args, needs)
            if len(self.plans) >= _MOST_PLANS:
                self.plans.clear()
            self.plans[key] = plan
        return plan

    def _new_plan(self, args: tuple[Any, ...], needs: tuple[bool, ...]) -> Plan:
        plan, function = Plan(), self.function
        asked = any(needs)
        if not asked:  # a layer driven by hand gives the gradient for its input all the same
            place = function.input_place
            needs = (*needs[:place], True, *needs[place + 1 :])
        used: set[str] = set()
        if self.joint is not None:
            used.update(self.joint_needs)
        else:
            for need, names in zip(needs, self.needed_by, strict=False):
                used.update(names if need else ())
        plan.needs_memory = asked and not used.isdisjoint(function.saved_memory)
        used.update(function.always_saved)
        saves, saved_names = [], []
        values = [*args, *self.defaults[len(args) :]]
        for place, (name, value) in enumerate(zip(self.names, values, strict=False)):
            if name in used:
                if isinstance(value, torch.Tensor):
                    saves.append(place)
                    saved_names.append(name)
                else:
                    plan.arguments[name] = value
        if "result" in used:
            saves.append(RESULT)
            saved_names.append("result")
        if "how" in used:
            plan.arguments["how"] = function.how(*args)
        plan.saves, plan.names = tuple(saves), tuple(saved_names)
        plan.memory = tuple([i for i, n in enumerate(saved_names) if n in function.saved_memory])
        plan.saves_number = function.saves_number and not saves
        plan.label = function.label_of(*args)
        plan.compute = function.choose(*args) or self.forward
        return plan

    def back(self, node: Any, g: Any) -> tuple[Any, ...]:
        """The gradients of all arguments."""
        plan, needs = node.plan, node.needs_input_grad
        back = plan.backs.get(needs)
        if back is None:
            back = plan.backs[needs] = self._written(plan, needs)
        return back(node, g)  # type: ignore[no-any-return]

    def _written(self, plan: Plan, needs: tuple[bool, ...]) -> Callable[..., Any]:
        """`back` for these needs, as a function with nothing to look up."""
        environment: dict[str, Any] = {"shape_of": _shape_of}
        lines: list[str] = []
        fetched: set[str] = set()

        def word(name: str) -> str:
            if name == "g":
                return "g"
            if name in plan.names:
                if name not in fetched:
                    fetched.add(name)
                    i = plan.names.index(name)
                    via = self.function.saved_via.get(name)
                    lines.append(
                        f"{name} = s[{i}]"
                        f" if s is not None and s[{i}]._version == node._versions[{i}]"
                        f" else node.saved({i}, {via!r})"
                    )
                return name
            if name in plan.arguments:
                environment[f"its_{name}"] = plan.arguments[name]
                return f"its_{name}"
            if name.endswith("_shape"):
                return f"shape_of(node.edges[{self.names.index(name[: -len('_shape')])}])"
            raise TypeError(f"{self.function.__name__} needs {name}, which it does not save")

        if plan.saves:
            lines.append("s = node._saved")
        elif plan.saves_number:
            lines.append("node.saved(0)")  # which is freed with the graph
        if self.joint is not None:
            environment["gradients"], environment["needs"] = self.joint, needs
            words = ["needs", *[word(n) for n in self.joint_needs]]
            more = f", *[None] * ({len(needs)} - len(found))" if len(needs) > 1 else ""
            lines += [f"found = gradients({', '.join(words)})", f"return (*found{more},)"]
        else:
            grads = []
            for i, need in enumerate(needs):
                if not need:
                    grads.append("None")
                    continue
                function = environment[f"d_{self.names[i]}"] = self.single[i]
                words = [word(n) for n in self.needed_by[i]]
                lines.append(f"dx{i} = {'d_' + self.names[i]}({', '.join(words)})")
                grads.append(f"dx{i}")
                assert function is not None
            lines.append(f"return ({', '.join(grads)},)")
        exec("def back(node, g):\n    " + "\n    ".join(lines), environment)
        return environment.pop("back")  # type: ignore[no-any-return]


def _shape_of(edge: Any) -> Any:
    """The shape of the argument that an edge leads to."""
    target, index = edge
    return target.shape if isinstance(target, torch.Tensor) else target.outputs[index][0]


def _names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def read(function: Any) -> None:
    """Set `function.formulas`, if it is written as formulas, and what `record` calls."""
    own = vars(function)
    forward = own.get("forward")
    if forward is None and function.formulas is not None and "backward" not in own:
        forward = function.formulas.forward
    names = [] if forward is None else _names(forward)
    gives = any(name.startswith("d_") or name == "gradients" for name in dir(function))
    if not gives or forward is None or names[:1] == ["ctx"]:
        function.formulas = None
        return
    forward = getattr(forward, "__func__", forward)  # of a staticmethod
    formulas = function.formulas = Formulas(function, forward)
    function.forward = staticmethod(formulas.call)
    function.backward = staticmethod(formulas.back)
