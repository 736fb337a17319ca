"""The nodes of the graph: each is a recorded call, with its saved tensors and an edge for every
input.

An edge leads to the node that made the input or, for a leaf, to the input itself. A node is also
the `grad_fn` of the results of its call.
"""

import enum
import functools
import itertools
import operator
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, TypeAlias

import torch

from . import _state
from . import tensor as _tensor
from ._types import Args, Hook
from ._upcalls import upcall
from .fast.signature import CallInfo, Meta, Signature
from .grad_mode import is_grad_enabled, users_code
from .tensor import add_hook, bare, no_complex

if TYPE_CHECKING:
    import nnmirror.beyond
    import nnmirror.fast.tapped
    import nnmirror.modules.segment
    import nnmirror.parameter

    from . import formula
    from .operation import Operation


class NodeState(enum.Enum):
    """What a walk finds at a node, besides what its signature says."""

    RECORDED = enum.auto()  # nothing: it is as it was recorded
    EXPOSED = enum.auto()  # the edges of PyTorch's node, which it got when it was exposed
    TAPPED = enum.auto()  # taps (see fast/tapped.py)
    HOOKED = enum.auto()  # hooks or a retained gradient, now or earlier: only the generic walk runs


RECORDED, EXPOSED, TAPPED, HOOKED = NodeState

# By so much less is the number of a node that is put in front of another: numbers between two calls
# are left for the nodes expanded from one.
JUST_BEFORE = 2.0**-16

# In place of n: a tensor that torch made, for a gradient that does not continue in torch's graph.
NO_FURTHER = -1

_version_of = operator.attrgetter("_version")

FREED = (
    "Trying to backward through the graph a second time (or directly access saved tensors"
    " after they have already been freed). Saved intermediate values of the graph are freed"
    " when you call .backward() or autograd.grad(). Specify retain_graph=True if you need to"
    " backward through the graph a second time or if you need to access saved tensors after"
    " calling backward."
)
OF_INFERENCE = (
    "Inference tensors cannot be saved for backward. Please do not use Tensors created in"
    " inference mode in computation tracked by autograd. To work around this, you can make a"
    " clone to get a normal tensor and use it in autograd, or use `torch.no_grad()` instead of"
    " `torch.inference_mode()`."
)
_ANOMALY = (
    " Hint: enable anomaly detection to find the operation that failed to compute its"
    " gradient, with torch.autograd.set_detect_anomaly(True,"
    " check_nan=False)."
)


def _of_call(name: str, doc: str) -> Any:
    """The property of a node that its `call_info` has under this name. To set it, that is copied
    first if other nodes share it."""

    def assign(node: "Node", value: object) -> None:
        if node.call_info.is_shared:
            node.call_info = node.call_info.copied()
        setattr(node.call_info, name, value)

    return property(operator.attrgetter(f"call_info.{name}"), assign, doc=doc)


class Node:
    """One recorded call: the `grad_fn` of its outputs, and the `ctx` of a rule.

    For the rule: `save_for_backward`, `saved_tensors`, `needs_input_grad`. For users of a
    `grad_fn`, as in PyTorch: `name`, `next_functions`, `register_hook`, `register_prehook`,
    `metadata`, a call with gradients of its outputs, and the attributes that a user's Function sets
    on its `ctx`.
    """

    # Specific to each call. Slots, as every call sets them.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_given",
        "_saved",
        "_versions",
        "began",
        "call_info",
        "caller",
        "function",
        "sequence",
        "signature",
        "targets",
    )

    _given: Args  # the value of `given`; unset if there are none
    # If a layer recorded the call: its dict of parameters, which is no other module's and, unlike
    # the layer, does not refer to the node. Unset otherwise.
    caller: "dict[str, nnmirror.parameter.Parameter | None]"
    began: int  # if the layer recorded several: the number before the first
    function: "type[Operation]"
    sequence: int
    signature: Signature | None  # how its result was computed; None if that has no signature
    call_info: CallInfo  # its signature, one shared by other calls of its kind, or its own
    # For each argument of forward, where its gradient goes (see `edges`).
    targets: "tuple[Target | None, ...]"
    _saved: Sequence[torch.Tensor | None] | None
    _versions: Sequence[int | None]

    places: Sequence[int] = _of_call("places", "Which arguments are tensors.")
    needs_input_grad: tuple[bool, ...] = _of_call("needs", "Which arguments require grad.")
    outputs: Sequence[Meta] = _of_call("outputs", "Shape, dtype and device of the results.")
    plan: "formula.Plan | None" = _of_call(
        "plan", "For a rule written as formulas: what this call needs."
    )
    label: str = _of_call("label", "The name, where that depends on the inputs, as in PyTorch.")
    indices: "Sequence[int] | None" = _of_call(
        "indices", "For each argument, which output of its target it was; None if all the first."
    )
    dirty: tuple[torch.Tensor, ...] = ()
    non_differentiable: tuple[torch.Tensor, ...] = ()
    materialize_grads: bool = True
    # The attributes of a user's Function's ctx; None for a rule.
    attributes: dict[str, object] | None = None
    # The layers of a node that stands for several (see modules/segment.py); when they have nodes of
    # their own, all but the last of these.
    segment: "nnmirror.modules.segment.Form | None" = None
    before: "list[Node]"
    creates_graph: bool = False  # while its backward is recorded itself
    records: bool = True
    # For a call that torch recorded: torch's tensor.
    theirs: "nnmirror.beyond._Theirs | None" = None
    # Of a change of a view in place: a weak reference to the node of the view as it was then.
    view_node: "Callable[[], Node | None] | None" = None
    node_state: NodeState = RECORDED
    # If there are any, `node_state` is TAPPED.
    taps: "tuple[nnmirror.fast.tapped.Tap, ...]" = ()
    # Hooks, absent until one is registered.
    tensor_hooks: "dict[int, OrderedDict[int, Hook]] | None" = None
    retained: "dict[int, weakref.ref[_tensor.Tensor]] | None" = None
    prehooks: "OrderedDict[int, Hook] | None" = None
    posthooks: "OrderedDict[int, Hook] | None" = None

    def __init__(self, function: "type[Operation]", sign: Signature | None = None) -> None:
        self.function, self.signature = function, sign
        self.call_info = CallInfo(is_shared=False) if sign is None else sign
        self.targets = self._saved = self._versions = ()
        self.sequence = -1

    def copied(self) -> "Node":
        """Another node of the same call."""
        made: Node = object.__new__(Node)
        made.function, made.signature, made.targets = self.function, self.signature, self.targets
        made.call_info = self.call_info if self.call_info.is_shared else self.call_info.copied()
        made._saved, made._versions = self._saved, self._versions
        made.sequence = self.sequence
        made.given = self.given
        vars(made).update(vars(self))
        return made

    @property
    def given(self) -> Args:
        """The arguments of the gradients of `plan` other than tensors, if they differ from call to
        call."""
        try:
            return self._given
        except AttributeError:
            return ()

    @given.setter
    def given(self, value: Args) -> None:
        self._given = value

    @property
    def edges(self) -> "Sequence[Edge | None]":
        """For each argument of forward, where its gradient goes.

        Kept in two parts, so that there are fewer objects: Python's garbage collector visits those
        of a long graph again and again.
        """
        indices = self.indices or itertools.repeat(0)
        return [None if t is None else (t, i) for t, i in zip(self.targets, indices, strict=False)]

    @edges.setter
    def edges(self, value: "Sequence[Edge | None]") -> None:
        self.targets = tuple([None if edge is None else edge[0] for edge in value])
        indices = [0 if edge is None else edge[1] for edge in value]
        found = tuple(indices) if any(indices) else None
        if found != self.indices:
            self.indices = found

    # -- for the operation -----------------------------------------------------------

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep `tensors` for backward, which fails if one is changed in place until then."""
        self._saved = tensors
        if len(tensors) == 1 and tensors[0] is None:
            self._versions = (None,)
            return
        try:
            self._versions = [0 if t is None else t._version for t in tensors]
        except AttributeError:
            for i, t in enumerate(tensors):
                if not (t is None or isinstance(t, torch.Tensor)):
                    raise TypeError(
                        "save_for_backward can only save variables, but argument"
                        f" {i} is of type {type(t).__name__}"
                    ) from None
            raise
        except RuntimeError:
            inference = any(t is not None and t.is_inference() for t in tensors)
            if inference and is_grad_enabled() and any(self.needs_input_grad):
                raise RuntimeError(OF_INFERENCE) from None
            self._saved = None  # no backward will follow

    def refuse_inference(self) -> None:
        """Raise for a tensor of inference mode that is to be saved."""
        raise RuntimeError(OF_INFERENCE)

    def saved(self, index: int, via: str | None = None) -> torch.Tensor:
        """The saved tensor at `index`, checked. A rule reads only those it needs.

        `via` names the operation PyTorch would have saved a transpose through, for the
        error message.
        """
        if self._saved is None:
            raise RuntimeError(FREED)
        tensor = self._saved[index]
        if tensor is not None and tensor._version != self._versions[index]:
            if isinstance(tensor, _tensor.Tensor) and tensor._view_of is not None:
                _tensor.edge_of(tensor)  # one of several views has its own error
            made_by: Edge | None = None
            if self.plan is not None and tensor.is_floating_point():  # otherwise it is a leaf
                place = self.plan.place_saved(index)
                if place is not None:
                    made_by = (self, ~place) if place < 0 else self.edges[place]
            raise RuntimeError(self._modified(tensor, self._versions[index], via, made_by))
        return tensor  # type: ignore[return-value]

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]:
        if self._saved is None:
            raise RuntimeError(FREED)
        return tuple(self.saved(i) for i in range(len(self._saved)))

    def unchanged(self, formulas: "formula.Formulas") -> Sequence[torch.Tensor | None]:
        """The saved tensors of a rule, with a check of those that its gradients need."""
        try:
            if [*map(_version_of, self._saved)] == [*self._versions]:  # type: ignore[arg-type]
                return self._saved  # type: ignore[return-value]
        except (AttributeError, TypeError):  # with None, or freed
            pass
        plan, needed = self.plan, formulas.needed_for(self.needs_input_grad)
        for i, name in enumerate(plan.names if plan is not None else ()):
            if name in needed or name.startswith(f"{formulas.rest}_"):
                self.saved(i, self.function.saved_via.get(name))
        if plan is not None and plan.saves_number:
            self.saved(0)  # it is freed with the graph
        return self._saved or ()

    def mark_dirty(self, *tensors: torch.Tensor) -> None:
        self.dirty = tensors

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        self.non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value

    # -- as a grad_fn ------------------------------------------------------------------

    def name(self) -> str:
        return self.label or self.function.node_name()

    @property
    def inputs(self) -> Sequence[int]:
        """The arguments for which PyTorch's node has a place."""
        function = self.function
        if function.counted and self.label in ("", function.counted_too):  # else another overload
            return function.counted
        return [i for i in self.places if i not in function.uncounted]

    def as_exposed(self) -> "Node":
        """The node as PyTorch's would be."""
        if self.segment is not None:
            self.segment.expand(self)
        if self.function.on_exposed is not None:
            self.function.on_exposed(self)
        return self

    def shown(self) -> "Node":
        """The same, for users of the node."""
        self.as_exposed()
        if not isinstance(self, Shown):
            self.__class__ = _shown_as(bare(self.name()), self.attributes is None)
        return self

    @property
    def next_functions(self) -> "tuple[tuple[Node | AccumulateGrad | None, int], ...]":
        for edge in self.edges:
            if edge is not None and isinstance(edge[0], Node):
                edge[0].shown()
        return tuple(
            (None, 0)
            if edge is None
            else (edge[0] if isinstance(edge[0], Node) else AccumulateGrad(edge[0]), edge[1])
            for edge in (self.edges[i] for i in self.inputs)
        )

    def register_hook(self, fn: Hook) -> torch.utils.hooks.RemovableHandle:
        """`fn(grad_inputs, grad_outputs)` runs after this node; may return new grad_inputs."""
        self.mark_hooked()
        if self.posthooks is None:
            self.posthooks = OrderedDict()
        return add_hook(self.posthooks, fn)

    def register_prehook(self, fn: Hook) -> torch.utils.hooks.RemovableHandle:
        """`fn(grad_outputs)` runs before this node; may return new grad_outputs."""
        self.mark_hooked()
        if self.prehooks is None:
            self.prehooks = OrderedDict()
        return add_hook(self.prehooks, fn)

    def mark_hooked(self) -> None:
        """From now on, only the generic walk runs here: it calls hooks and retains gradients."""
        self.node_state = HOOKED

    @property
    def metadata(self) -> dict[object, Any]:
        return self.__dict__.setdefault("_metadata", {})

    def __repr__(self) -> str:
        return f"<{bare(self.name())} object at {id(self):#x}>"

    @property
    def _input_metadata(self) -> NoReturn:
        """Refused: torch.autograd.backward reads this of a GradientEdge, and continues in C++."""
        raise NotImplementedError(
            "nnmirror: torch.autograd.backward does not ask the mirror about a GradientEdge; call"
            " nnmirror.backward, which takes it"
        )

    # -- for the walk ------------------------------------------------------------------

    def run(self, grads: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Call the backward of the operation; one gradient per edge."""
        if self.materialize_grads and (len(grads) > 1 or grads[0] is None):
            grads = [
                torch.zeros(m[0], dtype=m[1], device=m[2]) if g is None and m is not None else g
                for g, m in zip(grads, self.outputs, strict=True)
            ]
        if self.attributes is None:
            return self.completed(self.function.backward(self, *grads))
        with users_code(self.creates_graph):
            results = self.completed(users_backward(self, grads))
        for i, (edge, grad) in enumerate(zip(self.edges, results, strict=True)):
            if grad is not None and i not in self.places:
                raise RuntimeError(
                    f"function {self.name()} returned a gradient different than None at position"
                    f" {i + 1}, but the corresponding forward input was not a Variable"
                )
            if edge is not None and not (grad is None or isinstance(grad, torch.Tensor)):
                raise RuntimeError(f"expected Variable or None (got {type(grad).__name__})")
        return results

    def completed(self, results: Any) -> tuple[torch.Tensor | None, ...]:
        """The results of a backward, as one gradient per edge."""
        if not isinstance(results, tuple):
            results = (results,)
        if len(results) != len(self.targets):
            surplus = results[len(self.targets) :]  # PyTorch allows trailing Nones
            if not surplus or any(r is not None for r in surplus):
                raise RuntimeError(
                    f"function {self.name()} returned an incorrect number of gradients"
                    f" (expected {len(self.targets)}, got {len(results)})"
                )
            results = results[: len(self.targets)]
        return results

    def free(self) -> None:
        if self._saved:
            self._saved = None

    def _modified(
        self, tensor: torch.Tensor, expected: int | None, via: str | None, made_by: "Edge | None"
    ) -> str:
        shape = list(tensor.shape)
        maker, index = via, 0
        if via is not None:
            shape = shape[::-1]
        elif isinstance(tensor, _tensor.Tensor) and tensor._node is not None:
            maker, index = tensor.grad_fn.name(), tensor._output_nr  # type: ignore[union-attr]
        elif made_by is not None:
            if isinstance(made_by[0], Node):
                maker, index = made_by[0].as_exposed().name(), made_by[1]
        elif hasattr(tensor, "_alias_of_output"):
            maker = self.name()
        maker = short_name(maker or "")
        made = f", which is output {index} of {maker}," if maker else ""
        kind = torch.Tensor.type(tensor)
        kind = _TYPE_NAMES.get(kind, kind)
        return (
            "one of the variables needed for gradient computation has been modified by an"
            f" inplace operation: [{kind} {shape}]{made} is at version"
            f" {tensor._version}; expected version {expected} instead." + _ANOMALY
        )


@upcall("nnmirror.function")
def users_backward(node: Node, grads: Sequence[torch.Tensor | None]) -> Any:
    """The backward of a user's Function."""
    raise NotImplementedError


# Where a gradient goes: (node, n) for its n-th output, (leaf, 0) for a leaf tensor.
Target: TypeAlias = Node | torch.Tensor
Edge: TypeAlias = tuple[Target, int]


class Shown(Node):
    """A node that was exposed to the user: it has more attributes than the tape needs.

    A class of its own, since Python finds the attributes of a class with `__getattr__` more slowly.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"cannot pickle '{bare(self.name())}' object")

    def __getattr__(self, name: str) -> Any:
        try:
            return self.attributes[name]  # type: ignore[index]
        except (KeyError, TypeError):
            more = ""
            if name.startswith(("_saved_", "_raw_saved_")):
                more = (
                    "; what the mirror's rule saved is in saved_tensors, in an order of its own"
                    " (see the docstring of the module or rule)"
                )
            raise AttributeError(
                f"'{bare(self.name())}' object has no attribute '{name}'{more}"
            ) from None


class _OfRule(Shown):
    """The node of a rule, which can be called as in PyTorch."""

    __slots__ = ()

    def __call__(
        self, *grads: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...] | None:
        """The gradients of its inputs, a tuple unless there is one, for those of its outputs.

        With grad mode on they are recorded, as with `create_graph=True`. Hooks are not called.
        """
        places = [i for i, m in enumerate(self.outputs) if m is not None and m[1].is_floating_point]
        given: list[torch.Tensor | None] = [None] * len(self.outputs)
        for place, grad in zip(places, _as_variables(grads, len(places)), strict=True):
            given[place] = grad
        found: Sequence[torch.Tensor | None] = [None] * len(self.targets)
        if any(grad is not None for grad in grads):
            found = run_by_itself(self, given)
        results = tuple([found[i] for i in self.inputs])
        return results[0] if len(results) == 1 else results


def _as_variables(
    grads: Sequence[torch.Tensor | None], count: int
) -> Sequence[torch.Tensor | None]:
    """The arguments of a node that is called; PyTorch's errors for others."""
    if len(grads) != count:
        raise TypeError(f"expected {count} arguments, got {len(grads)} instead")
    for i, grad in enumerate(grads):
        if not (grad is None or isinstance(grad, torch.Tensor)):
            raise TypeError(f"argument {i} is not a Variable")
    return grads


@functools.lru_cache(maxsize=1024)
def _shown_as(name: str, is_of_rule: bool) -> type[Shown]:
    """The class of nodes with this name, which PyTorch's have too."""
    return type(name, (_OfRule if is_of_rule else Shown,), {"__slots__": ()})


@upcall("nnmirror.gradients")
def run_by_itself(
    node: Node, grads: Sequence[torch.Tensor | None]
) -> Sequence[torch.Tensor | None]:
    """The gradients of its arguments for those of its outputs, recorded if grad mode is on."""
    raise NotImplementedError


@upcall("nnmirror.gradients")
def accumulate_by_itself(leaf: torch.Tensor, grad: torch.Tensor | None) -> None:
    """Add `grad` to `leaf.grad`, and run its hooks after accumulation."""
    raise NotImplementedError


class Unrecorded(Node):
    """The ctx of a call with grad mode off: it saves nothing."""

    records = False

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        return


class OfComplex(Node):
    """A call on complex numbers without a gradient, which `Module.backward` would need."""

    def run(self, grads: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        raise no_complex(self.function.__name__)


# Where PyTorch's messages have another name for a tensor's type.
_TYPE_NAMES = {"torch.BFloat16Tensor": "CPUBFloat16Type", "torch.BoolTensor": "CPUBoolType"}


def short_name(name: str) -> str:
    """A node's name in PyTorch's messages: Exp for ExpBackward0, Sum1 for SumBackward1."""
    return re.sub(r"Backward0?(\d*)$", r"\1", name)


class AccumulateGrad:
    """Represents a leaf in `next_functions`; its hooks are stored with the leaf."""

    def __init__(self, variable: torch.Tensor) -> None:
        self.variable = variable

    next_functions: tuple[()] = ()

    def __call__(self, *grads: torch.Tensor | None) -> tuple[()]:
        """Add a gradient to the leaf's `.grad`. Only hooks after accumulation are called."""
        (grad,) = _as_variables(grads, 1)
        if self.variable.requires_grad:
            accumulate_by_itself(self.variable, grad)
        return ()

    def register_hook(self, fn: Hook) -> torch.utils.hooks.RemovableHandle:
        """`fn((), grad_outputs)` runs after the gradient has been added to `.grad`."""
        return add_hook(self._hooks()[1], fn)

    def register_prehook(self, fn: Hook) -> torch.utils.hooks.RemovableHandle:
        """`fn(grad_outputs)` runs before; may return new grad_outputs."""
        return add_hook(self._hooks()[0], fn)

    def _hooks(self) -> "tuple[OrderedDict[int, Hook], OrderedDict[int, Hook]]":
        leaf = self.variable
        if not isinstance(leaf, _tensor.Tensor):
            raise NotImplementedError(
                "nnmirror: a hook on the AccumulateGrad of a tensor of torch's own is not mirrored;"
                " use the tensor's register_hook or register_post_accumulate_grad_hook"
            )
        _state.leaf_hooks_exist = True
        leaf._signature = None  # the generic walk runs them
        if leaf._accumulate_hooks is None:
            leaf._accumulate_hooks = OrderedDict(), OrderedDict()
        return leaf._accumulate_hooks

    def name(self) -> str:
        return "torch::autograd::AccumulateGrad"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AccumulateGrad) and other.variable is self.variable

    def __hash__(self) -> int:
        return id(self.variable)

    def __repr__(self) -> str:
        return f"<AccumulateGrad object at {id(self.variable):#x}>"
