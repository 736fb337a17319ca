"""The tape: a record of the calls and their arguments.

A differentiable operation is a `Function` with a `forward` and a `backward`. Each call on a tensor
that requires grad makes a `Node`: the function, its saved tensors, and an edge for every input, to
the node that made the input or, for a leaf, to the input itself. `nnmirror.walk` follows these
edges.

Everything here runs with `DisableTorchFunctionSubclass` entered once per call, so that
tracked tensors behave as plain ones inside a forward, a backward and the walk.
"""

import functools
import inspect
import itertools
import numbers
import operator
import re
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

import torch

from . import _state, _torch, formula
from . import tensor as _tensor
from ._state import here as _here
from ._state import sequence as _sequence
from ._torch import (
    DisableTorchFunctionSubclass,
    EnableTorchFunction,
    is_any_autocast_enabled,
)
from ._types import Args, Hook, Kwargs, TorchFunction
from ._upcalls import implements, upcall
from .exact import mode as _exact
from .fast import call
from .fast.signature import (
    MOST_ARGUMENTS,
    NO_CALLS,
    Alike,
    Kept,
    Made,
    Signature,
    Unsigned,
    numbers_apart,
    of_tensor,
    of_value,
)
from .grad_mode import _override, in_inference_mode, is_grad_enabled
from .origin import of_this_call
from .tensor import C_device, C_dtype, add_hook, bare, no_complex

if TYPE_CHECKING:
    import nnmirror.beyond
    import nnmirror.fast.recorder
    import nnmirror.fast.tapped
    import nnmirror.modules.segment
    import nnmirror.parameter

    from . import views as _views

R = TypeVar("R")

SEEN = "seen"
TAPPED = "tapped"
_version_of = operator.attrgetter("_version")

# In place of n: a tensor that torch made, for a gradient that does not continue in torch's graph.
NO_FURTHER = -1


class _Mapping(threading.local):
    # The running calls of `nnmirror.func.vmap` in this thread: how many, and the arguments that the
    # latest has passed to the function.
    depth: int = 0
    items: Sequence[object] = ()


mapping = _Mapping()
_torch_grad_mode = torch.is_grad_enabled
in_transform = _torch.peek_interpreter_stack  # None outside torch.func's transforms
_is_wrapped = _torch.is_functorch_wrapped_tensor
forward_mode = _torch.forward_mode
_MANY = (tuple, list)  # isinstance is several times slower with tuple | list

_FREED = (
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


class Node:
    """One recorded call: the `grad_fn` of its outputs, and the `ctx` of a rule.

    For the rule: `save_for_backward`, `saved_tensors`, `needs_input_grad`. For users of a
    `grad_fn`, as in PyTorch: `name`, `next_functions`, `register_hook`, `register_prehook`,
    `metadata`, and the attributes that a user's Function sets on its `ctx`.
    """

    # Specific to each call. Slots, as every call sets them.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_given",
        "_saved",
        "_versions",
        "began",
        "caller",
        "function",
        "like",
        "sequence",
        "signature",
        "targets",
    )

    _given: Args  # the value of `given`; unset if there are none
    # If a layer recorded the call: its dict of parameters, which is no other module's and, unlike
    # the layer, does not refer to the node. Unset otherwise.
    caller: "dict[str, nnmirror.parameter.Parameter | None]"
    began: int  # if the layer recorded several: the number before the first
    function: "type[Function]"
    sequence: int
    signature: Signature | None  # how its result was computed; None if that has no signature
    # What provides `places`, `needs_input_grad`, `outputs`, `plan`, `label` and `indices`: the
    # signature, or another object; None if the node has its own.
    like: Alike | None
    # For each argument of forward, where its gradient goes (see `edges`).
    targets: "tuple[Target | None, ...]"
    _saved: Sequence[torch.Tensor | None] | None
    _versions: Sequence[int | None]

    _places: Sequence[int] = ()
    _needs_input_grad: tuple[bool, ...] = ()
    _outputs: Sequence[tuple[torch.Size, torch.dtype, torch.device]] = ()
    _plan: "formula.Plan | None" = None
    _label: str = ""
    _indices: "Sequence[int] | None" = None
    _signature: None = None  # as for a leaf, for code that treats this as one
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
    seen_by: "Callable[[], Node | None] | None" = None
    # True: it has, or had, one of these four. SEEN: it is like PyTorch's node, unlike its signature
    # (see `as_seen`).
    is_watched: bool | str = False
    # If there are any, `is_watched` is TAPPED (see fast/tapped.py).
    taps: "tuple[nnmirror.fast.tapped.Tap, ...]" = ()
    # Hooks, absent until one is registered.
    tensor_hooks: "dict[int, OrderedDict[int, Hook]] | None" = None
    retained: "dict[int, weakref.ref[_tensor.Tensor]] | None" = None
    prehooks: "OrderedDict[int, Hook] | None" = None
    posthooks: "OrderedDict[int, Hook] | None" = None

    def __init__(self, function: "type[Function]") -> None:
        self.function = function
        self.signature = self.like = None
        self.targets = self._saved = self._versions = ()
        self.sequence = -1

    def copied(self) -> "Node":
        """Another node of the same call."""
        made = Node(self.function)
        made.signature, made.like, made.targets = self.signature, self.like, self.targets
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

    # -- shared by calls with the same signature -----------------------------------------

    @property
    def places(self) -> Sequence[int]:
        """Which arguments are tensors."""
        like = self.like
        return self._places if like is None else like.places

    @places.setter
    def places(self, value: Sequence[int]) -> None:
        self._on_its_own()
        self._places = value

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        like = self.like
        return self._needs_input_grad if like is None else like.needs

    @needs_input_grad.setter
    def needs_input_grad(self, value: tuple[bool, ...]) -> None:
        self._on_its_own()
        self._needs_input_grad = value

    @property
    def outputs(self) -> Sequence[tuple[torch.Size, torch.dtype, torch.device]]:
        like = self.like
        return self._outputs if like is None else like.outputs

    @outputs.setter
    def outputs(self, value: Sequence[tuple[torch.Size, torch.dtype, torch.device]]) -> None:
        self._on_its_own()
        self._outputs = value

    @property
    def plan(self) -> "formula.Plan | None":
        """For a rule written as formulas: what this call needs."""
        like = self.like
        return self._plan if like is None else like.plan

    @plan.setter
    def plan(self, value: "formula.Plan | None") -> None:
        self._on_its_own()
        self._plan = value

    @property
    def label(self) -> str:
        """Set by a forward whose name depends on its inputs, as in PyTorch."""
        like = self.like
        return self._label if like is None else like.label

    @label.setter
    def label(self, value: str) -> None:
        self._on_its_own()
        self._label = value

    @property
    def indices(self) -> "Sequence[int] | None":
        """For each argument, which output of its target it was; None if each was the first."""
        like = self.like
        return self._indices if like is None else like.indices

    @indices.setter
    def indices(self, value: "Sequence[int] | None") -> None:
        self._on_its_own()
        self._indices = value

    def _on_its_own(self) -> None:
        """Copy the shared fields, so that they can be changed."""
        like = self.like
        if like is not None:
            self.like = None
            self._places, self._needs_input_grad = like.places, like.needs
            self._outputs, self._plan, self._label = like.outputs, like.plan, like.label
            self._indices = like.indices

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

    # -- for the Function ------------------------------------------------------------

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
            raise RuntimeError(_FREED)
        tensor = self._saved[index]
        if tensor is not None and tensor._version != self._versions[index]:
            if isinstance(tensor, _tensor.Tensor) and tensor._view_of is not None:
                edge_of(tensor)  # one of several views has its own error
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
            raise RuntimeError(_FREED)
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

    def as_seen(self) -> "Node":
        """The node as PyTorch's would be."""
        if self.segment is not None:
            self.segment.expand(self)
        if self.function.looked_at is not None:
            self.function.looked_at(self)
        return self

    def shown(self) -> "Node":
        """The same, for users of the node."""
        self.as_seen()
        self.__class__ = Shown
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
        self.is_watched = True
        if self.posthooks is None:
            self.posthooks = OrderedDict()
        return add_hook(self.posthooks, fn)

    def register_prehook(self, fn: Hook) -> torch.utils.hooks.RemovableHandle:
        """`fn(grad_outputs)` runs before this node; may return new grad_outputs."""
        self.is_watched = True
        if self.prehooks is None:
            self.prehooks = OrderedDict()
        return add_hook(self.prehooks, fn)

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
        """Call the Function's backward; one gradient per edge."""
        if self.materialize_grads and (len(grads) > 1 or grads[0] is None):
            grads = [
                torch.zeros(m[0], dtype=m[1], device=m[2]) if g is None and m is not None else g
                for g, m in zip(grads, self.outputs, strict=True)
            ]
        if self.attributes is None:
            return self.completed(self.function.backward(self, *grads))
        with users_code(self.creates_graph):
            results = self.completed(_users_backward(self, grads))
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
                maker, index = made_by[0].as_seen().name(), made_by[1]
        elif hasattr(tensor, "_alias_of_output"):
            maker = self.name()
        maker = _short(maker or "")
        made = f", which is output {index} of {maker}," if maker else ""
        kind = torch.Tensor.type(tensor)
        kind = _TYPE_NAMES.get(kind, kind)
        return (
            "one of the variables needed for gradient computation has been modified by an"
            f" inplace operation: [{kind} {shape}]{made} is at version"
            f" {tensor._version}; expected version {expected} instead." + _ANOMALY
        )


# Where a gradient goes: (node, n) for its n-th output, (leaf, 0) for a leaf tensor.
Target: TypeAlias = Node | torch.Tensor
Edge: TypeAlias = tuple[Target, int]


class Shown(Node):
    """A node that was exposed to the user: it has more attributes than the tape needs.

    A class of its own, since Python finds the attributes of a class with `__getattr__` more slowly.
    """

    __slots__ = ()

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


class _Unrecorded(Node):
    """The ctx of a call with grad mode off: it saves nothing."""

    records = False

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        return


class _OfComplex(Node):
    """A call on complex numbers without a gradient, which `Module.backward` would need."""

    def run(self, grads: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        raise no_complex(self.function.__name__)


class FunctionCtx:
    """The `ctx` of a user's Function, as in PyTorch: its attributes are available in backward.

    In PyTorch it is the `grad_fn` of the Function's result. Here it is a new object for forward and
    for backward, with the same attributes, so that a user's names cannot collide with the tape's;
    the `grad_fn` shows the attributes too.
    """

    __slots__ = ("__dict__", "__node", "__weakref__", "dirty_tensors", "to_save")

    def __init__(self, node: Node) -> None:
        self.__node = node
        self.__dict__ = node.attributes  # type: ignore[assignment]
        self.to_save: tuple[torch.Tensor | None, ...] = ()
        self.dirty_tensors: tuple[torch.Tensor, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep `tensors` for backward, which fails if one is changed in place after forward.

        TypeError after forward for anything but a tensor or None.
        """
        self.to_save = tensors

    def save_for_forward(self, *tensors: torch.Tensor | None) -> None:
        """Does nothing: `jvp`, for which it keeps tensors, is not called."""
        for tensor in tensors:
            if not (isinstance(tensor, torch.Tensor) or tensor is None):
                raise AssertionError(
                    "save_for_forward expects all arguments to be tensors; you should "
                    "save non-tensors as attributes on ctx."
                )

    @property
    def saved_tensors(self) -> tuple[torch.Tensor, ...]:
        """The saved tensors. RuntimeError if they were freed, or changed in place since."""
        node = self.__node
        once = node.function.clear_saved_tensors_on_access
        if once and node._saved is None:
            raise RuntimeError(_READ_ONCE)
        found = node.saved_tensors
        if once:
            node._saved = None
        return found

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """For each argument of forward, whether it requires grad."""
        return self.__node.needs_input_grad

    def mark_dirty(self, *tensors: torch.Tensor) -> None:
        """Mark the inputs that forward changed in place."""
        self.dirty_tensors = tensors

    def mark_non_differentiable(self, *tensors: torch.Tensor) -> None:
        """Mark the outputs that get no gradient."""
        self.__node.non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Whether backward gets zeros (the default) or None for an output without a gradient."""
        self.__node.materialize_grads = value

    def name(self) -> str:
        return self.__node.name()

    @property
    def next_functions(self) -> "tuple[tuple[Node | AccumulateGrad | None, int], ...]":
        return self.__node.next_functions

    @property
    def metadata(self) -> dict[object, Any]:
        return self.__node.metadata

    def register_hook(self, fn: Hook) -> torch.utils.hooks.RemovableHandle:
        return self.__node.register_hook(fn)

    def register_prehook(self, fn: Hook) -> torch.utils.hooks.RemovableHandle:
        return self.__node.register_prehook(fn)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"'{self.name()}' object has no attribute '{name}'")

    def __repr__(self) -> str:
        return repr(self.__node)


_READ_ONCE = (
    "saved_tensors can only be accessed once when clear_saved_tensors_on_access=True is set on the"
    " autograd.Function. Either access saved_tensors only once, or set"
    " clear_saved_tensors_on_access=False."
)


class users_code:
    """Runs user code inside a walk or a forward: dispatch of tracked tensors is on again, and grad
    mode is off, or on in a recorded walk.

    It is torch's grad mode that is off, so that the code may turn it on with `torch.enable_grad()`.
    """

    __slots__ = ("asking", "mode", "own_mode", "torchs_mode")

    def __init__(self, mode: bool = False) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self.asking = EnableTorchFunction()
        self.asking.__enter__()
        self.torchs_mode, self.own_mode = torch.is_grad_enabled(), _override.mode
        _torch.set_grad_enabled(self.mode)
        _override.mode = None

    def __exit__(self, *exc: object) -> None:
        _override.mode = self.own_mode
        _torch.set_grad_enabled(self.torchs_mode)
        self.asking.__exit__(*exc)


# Where PyTorch's messages have another name for a tensor's type.
_TYPE_NAMES = {"torch.BFloat16Tensor": "CPUBFloat16Type", "torch.BoolTensor": "CPUBoolType"}


def _users_backward(node: Node, grads: Sequence[torch.Tensor | None]) -> Any:
    function = node.function
    backward: Any = function.backward
    if function.vjp is not Function.vjp:
        if backward is not Function.backward:
            raise RuntimeError(
                "Implementing both 'backward' and 'vjp' for a custom Function is not allowed. You"
                " should only implement one of them."
            )
        backward = function.vjp
    if function.boxed_grads_call:
        return backward(FunctionCtx(node), list(grads))
    return backward(FunctionCtx(node), *grads)


def _short(name: str) -> str:
    """A node's name in PyTorch's messages: Exp for ExpBackward0, Sum1 for SumBackward1."""
    return re.sub(r"Backward0?(\d*)$", r"\1", name)


class AccumulateGrad:
    """Represents a leaf in `next_functions`; its hooks are stored with the leaf."""

    def __init__(self, variable: torch.Tensor) -> None:
        self.variable = variable

    next_functions: tuple[()] = ()

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


# A recorder, and which arguments require grad in the calls that it takes.
Learned: TypeAlias = tuple["nnmirror.fast.recorder.Recorder", tuple[tuple[bool, ...], ...]]


class Function:
    """An operation with a hand-written backward, as `torch.autograd.Function`.

        class Square(nnmirror.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, g):
                (x,) = ctx.saved_tensors
                return g * 2 * x

        y = Square.apply(x)

    `backward` receives one gradient per output and returns one per input of `forward`
    (None for an input that is not a tensor). Inside both, grad mode is off; under
    `torch.enable_grad()` they build a separate graph, for `torch.autograd.grad`. In a backward with
    `create_graph=True`, grad mode is on in `backward`, and operations on the gradients and on saved
    inputs and outputs are recorded; any other saved tensor is a constant, as in PyTorch.
    `torch.autograd.function.once_differentiable` works as in PyTorch.

    `vjp` is another name for `backward`; `setup_context`, `clear_saved_tensors_on_access` and
    `boxed_grads_call` work as in PyTorch. `jvp`, `vmap` and `generate_vmap_rule` may be defined,
    but are not called.
    """

    # For a rule written as formulas, by the types of the arguments: the recorder for calls without
    # a signature, and which arguments require grad in these (see fast/recorder.py).
    recorders: dict[tuple[type, ...], Learned]
    recorders_in_place: dict[tuple[type, ...], Learned]
    formulas: "formula.Formulas | None" = None  # of a rule written as formulas (see formula.py)
    exact: "type[Function] | None" = None  # recorded instead in exact mode (see exact)
    # For such a form: its gradients can be recorded, instead of those of the plain rule.
    is_recordable: bool = False
    infer: TorchFunction | None = None  # the result of forward only, by torch's function
    result: TorchFunction | None = None  # `infer`, or what the formulas compute
    can_wait: bool = False  # its node can be made after the call, from arguments and result
    public: Any = None  # torch's function that it replaces, which tensor subclasses see
    has_context: bool = False  # it defines setup_context
    makes_new: bool = False  # its result is new, or one of the arguments
    is_rule: bool = False  # for an operation of PyTorch's own
    is_view: bool = False  # the output shares the first input's memory
    is_inplace: bool = False  # the first input is changed, and is the output
    overwrites: bool = False  # in place: the result does not depend on the first input's values
    reads_data: bool = False  # backward depends on the numbers in the arguments of forward
    uncounted: tuple[int, ...] = ()  # arguments that PyTorch's node has no place for (indices)
    counted: tuple[int, ...] = ()  # or those that it has one for, numbers among them
    operands: tuple[int, ...] = ()  # where `forward` takes a number also as a tensor
    # Computes `forward` of the first two arguments, if the others have their defaults.
    operator: TorchFunction | None = None
    counted_too: str = ""  # of a node with this other name
    named_by_types: bool = False  # label_of only asks for the types of arguments, or of a tuple's
    # Called with a node that is exposed to the user, to give it the form of PyTorch's. Also called
    # in a recorded walk, since it determines where gradients of gradients are summed.
    looked_at: "Callable[[Node], None] | None" = None
    # Of a rule written as formulas (see formula.py).
    keeps: tuple[str, ...] = ()  # values that forward returns after its results, for the gradients
    derived: tuple[str, ...] = ()  # of these: differentiable functions of the arguments
    drawn: tuple[str, ...] = ()  # of these: random numbers
    materialize_grads: bool = True  # a result without a gradient gets zeros, else None
    # known_as(label): PyTorch's names for its arguments, which determine the order of their
    # gradients, if they differ.
    known_as: "Callable[[str], dict[str, str]] | None" = None
    always_saved: tuple[str, ...] = ()  # saved even if no gradient needs it
    # copied(*args) names the arguments that are saved as copies, as by PyTorch's kernels that copy.
    copied: "Callable[..., tuple[str, ...]] | None" = None
    # saved_memory(*args) names the arguments that are saved with their present memory.
    saved_memory: "Callable[..., tuple[str, ...]] | None" = None
    saves_number: bool = False  # it saves a number, which is freed with the graph
    saved_via: dict[
        str, str
    ] = {}  # arguments of which PyTorch saves a view: the name of the view's node
    in_place: dict[str, str] = {}  # PyTorch's other name for the node of an in-place call
    input_place: int = 0  # the argument that is the input of the corresponding module
    tuple_places: tuple[int, ...] = (0,)  # those that are tuples if the module is given tuples
    first_number: int = sys.maxsize  # the first argument that has to be a number in PyTorch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.has_context = cls.setup_context is not Function.setup_context
        cls.exact = None  # a base class's exact form does not apply to this class
        formula.read(cls)
        cls.makes_new = cls.is_rule and not (cls.is_view or cls.is_inplace)

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "You must implement the forward function for custom autograd.Function."
        )

    @classmethod
    def choose(cls, *args: Any) -> TorchFunction | None:
        """The function for later calls whose arguments have the same layout; None for `forward`."""
        return None

    @classmethod
    def label_of(cls, *args: Any) -> str:
        """The name of its node, if that depends on the arguments."""
        return ""

    @staticmethod
    def as_called(*args: Any) -> Args:
        """The arguments of `forward` as `public` takes them."""
        return args

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save for `backward`, if `forward` takes no ctx; called after it."""
        raise NotImplementedError("setup_context is not implemented.")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients of the inputs, from those of the outputs: dx_j = sum g_i dy_i/dx_j."""
        raise NotImplementedError(
            "You must implement either the backward or vjp method for your custom"
            " autograd.Function to use it with backward mode AD."
        )

    vjp = backward
    clear_saved_tensors_on_access: bool = False  # ctx.saved_tensors may be read once, and frees
    boxed_grads_call: bool = False  # backward gets its gradients as one list
    generate_vmap_rule: bool = False

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        """PyTorch's rule for forward mode; the mirror does not use it."""
        raise NotImplementedError(
            "You must implement the jvp function for custom autograd.Function to use it with"
            " forward mode AD."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """PyTorch's rule for `torch.vmap`; the mirror does not use it."""
        raise NotImplementedError(
            "To use autograd.Function with vmap, you must either override the vmap staticmethod or"
            " set generate_vmap_rule=True."
        )

    def __init__(self, *args: object, **kwargs: object) -> None:
        warnings.warn(
            f"{self.__class__} should not be instantiated. Methods on autograd functions are all"
            " static, so you should invoke them on the class itself. Instantiating an autograd"
            " function will raise an error in a future version of PyTorch.",
            DeprecationWarning,
            stacklevel=2,
        )

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            "Legacy autograd function with non-static forward method is deprecated. Please use"
            " new-style autograd function with static forward method. (Example:"
            " https://pytorch.org/docs/stable/autograd.html#torch.autograd.Function)"
        )

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, recording it if grad mode is on and an argument requires grad."""
        if _state.taps and noting.notes:
            return _noted(_applied, cls, args, kwargs)
        return _applied(cls, args, kwargs)

    @staticmethod
    def saves_of(node: Node) -> Sequence[int] | None:
        """For a rule that is not written as formulas: the places of the arguments that it saves;
        None if unknown."""
        return None

    @staticmethod
    def origin(node: Node, place: int) -> Edge | None:
        """The edge of the saved argument at `place`."""
        return node.edges[place]

    @staticmethod
    def leading(place: int, saved: torch.Tensor) -> torch.Tensor:
        """The saved argument at `place` as the tensor whose edge is `origin`."""
        return saved

    @classmethod
    def node_name(cls) -> str:
        """A tensor's `grad_fn`."""
        return cls.__name__ + "Backward"


@upcall("nnmirror.double_backward")
def run_recorded(
    node: Node, grads: Sequence[torch.Tensor | None], needs: tuple[bool, ...]
) -> Sequence[torch.Tensor | None]:
    """`node.run` for these gradients, recorded."""
    raise NotImplementedError


@upcall("nnmirror.beyond")
def taken_over(tensor: torch.Tensor, may_be: bool = True) -> "_tensor.Tensor | None":
    """A result of torch's own as one of the mirror's; None if that is impossible, or not
    `may_be`."""
    raise NotImplementedError


@upcall("nnmirror.beyond")
def edge_to(tensor: torch.Tensor) -> Edge:
    """The edge for the gradient of a result of torch's own."""
    raise NotImplementedError


@upcall("nnmirror.double_backward")
def needing(node: Node, needs: tuple[bool, ...]) -> Node:
    """The node as its backward sees it where only some of the gradients are asked for."""
    raise NotImplementedError


class _Noting(threading.local):
    """Functions to call with the result of each recorded call of this thread (see watch.py)."""

    notes: tuple[Callable[[object], None], ...] = ()


noting = _Noting()


def _noted(call: Callable[..., R], *args: object) -> R:
    """`call(*args)`, which records; its result is noted, what it calls itself is not."""
    notes, noting.notes = noting.notes, ()
    try:
        found = call(*args)
    finally:
        noting.notes = notes
    for note in notes if is_grad_enabled() else ():
        note(found)
    return found


@implements(_tensor)
def record(
    function: type[Function],
    args: Args,
    inplace: Callable[[], torch.Tensor] | None = None,
    asks: bool = True,
    for_layer: bool = False,
) -> tuple[Any, Node | None]:
    """Run `function.forward` on `args`; return its output and its node.

    The node is None with grad mode off. If no input requires grad, the output stays an untracked
    tensor; `for_layer`, the node still has the saved tensors, for `Module.backward`.

    `inplace`, if given, performs the operation on the first argument, which becomes the
    output, after `forward` has computed (and saved) what its backward needs.

    With `asks`, a call with a tensor subclass among `args` is dispatched to it (see
    `nnmirror.overrides`).
    """
    if _state.taps and noting.notes:
        return _noted(record, function, args, inplace, asks)
    if function.exact is not None:
        function = _exact.chosen(function)
    mode = _override.mode if _state.own_grad_mode else None  # is_grad_enabled, without the call
    if not (_torch_grad_mode() if mode is None else mode) or in_inference_mode():
        if len(args) > function.first_number:
            function.check_numbers(args)  # type: ignore[attr-defined]
        result = function.result
        if result is not None and inplace is None and not (_torch_grad_mode() or _state.plain):
            plain = True
            for arg in args:
                kind = type(arg)
                if kind not in ORDINARY:
                    break  # it may define dispatch
                plain = plain and kind is torch.Tensor
            else:
                if plain:
                    return result(*args), None
                with DisableTorchFunctionSubclass():
                    return result(*args), None
        return _unrecorded(function, args, inplace, asks), None
    is_signed = True
    if inplace is None and not _state.plain:
        for arg in args:
            kind = type(arg)
            if kind is _tensor.Tensor:
                made = arg._node
                sign = None if made is None else made.signature
                if sign is not None and not sign.is_plain:
                    sign = sign.output(arg._output_nr)
            elif kind in _tensor.LEAVES:
                made, sign = None, arg._signature
                if sign is None:
                    continue  # it is frozen, or gets a signature
            else:
                continue
            if sign is not None:  # the first one stores the calls that were made with it
                written = sign.calls.get(function)
                if written is not None:
                    met = written[0](written[1], arg, made, args)
                    if met is not None:
                        return met  # type: ignore[no-any-return]
                is_signed = sign.varying.get(function) is not False
            else:
                is_signed = made is None
            if not is_signed:
                known = function.recorders.get(tuple(map(type, args)))
                if known is not None:
                    met = known[0](args)
                    if met is not None:
                        return met
            break
        else:
            if need_no_gradient(args):
                if is_any_autocast_enabled():
                    raise RuntimeError(_AUTOCAST)
                if not for_layer and function.result is not None:
                    with DisableTorchFunctionSubclass():
                        return function.result(*args), None
                met = _of_its_kind(function, args)
                if met is not None:
                    return met
    elif not _state.plain:
        known = function.recorders_in_place.get(tuple(map(type, args)))
        if known is not None:
            met = known[0](args, inplace)
            if met is not None:
                return met
    if len(args) > function.first_number:
        function.check_numbers(args)  # type: ignore[attr-defined]
    disabled = DisableTorchFunctionSubclass()
    with disabled:
        if is_any_autocast_enabled():
            raise RuntimeError(_AUTOCAST)
        if in_transform() is not None:
            _refuse_transform(function, args)
            return _by_torch(function, args, inplace), None
        if _state.plain and (_here.is_plain or _here.noted is not None):
            out, node = _record(function, args, inplace, asks, disabled)
            if _here.noted is not None:
                _here.noted.append((function, args, out, node))
            return out, _with_origin(node, out) if _here.is_plain else node
        if forward_mode["_current_level"] < 0:
            if inplace is not None:
                met = _changed_before(function, args, inplace)
            else:
                met = (_met_before if is_signed else _of_its_kind)(function, args)
            if met is not None:
                return met  # type: ignore[no-any-return]
        return _record(function, args, inplace, asks, disabled)


def need_no_gradient(args: Args, is_off: bool = False) -> bool:
    """Are these tensors that do not require grad, of no subclass, and values that contain none?

    If grad mode `is_off`, no tensor requires grad.
    """
    for arg in args:
        kind = type(arg)
        if kind is torch.Tensor:
            if not is_off and arg.requires_grad:
                return False
        elif kind is _tensor.Tensor or kind in _tensor.LEAVES:
            if not is_off and (arg._node is not None or arg._requires_grad):
                return False
        elif kind not in _PLAIN and not (kind is tuple and _PLAIN.issuperset(map(type, arg))):
            return False
    return True


_PLAIN = {bool, float, int, str, type(None)}


def _unrecorded(
    function: type[Function],
    args: Args,
    inplace: Callable[[], torch.Tensor] | None,
    asks: bool,
) -> Any:
    """The result only, with grad mode off."""
    for arg in args:
        if type(arg) not in ORDINARY and asks and kind_of(type(arg)) is SUBCLASS:
            return answered(function, args, inplace)[0]
    result = function.result
    with DisableTorchFunctionSubclass():
        if inplace is not None:
            return inplace()
        if result is not None and not _torch_grad_mode() and not _here.is_plain:
            return result(*args)
        if forward_mode["_current_level"] >= 0:
            _refuse_tangents(function, args)
        node = _Unrecorded(function)
        node.needs_input_grad = (False,) * len(args)
        if not torch.is_grad_enabled():
            return function.forward(node, *args)
        with torch.no_grad():  # an input may belong to torch's own autograd
            return function.forward(node, *args)


def _record(
    function: type[Function],
    args: Args,
    inplace: Callable[[], torch.Tensor] | None,
    asks: bool,
    disabled: AbstractContextManager[None],
) -> tuple[Any, Node | None]:
    """`record` for any call, after the check whether to record."""
    change = None
    changes_input = function.is_inplace or inplace is not None
    if changes_input and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
        if is_plain_update(args[0], args[1:]):
            plain = Node(function)
            plain.needs_input_grad = (False,) * len(args)
            return (inplace() if inplace else function.forward(plain, *args)), None
        change = change_of(args[0])
    edges: list[Edge | None] = []
    key: list[object] = []
    first: Signature | None = None
    tracked = of_complex = False
    # The history of an in-place change follows from its arguments, unless they share memory.
    signed = not changes_input or (change is not None and change.base is None and not change.views)
    if inplace is not None:
        key.append(IN_PLACE)
    for i, arg in enumerate(args):
        edge: Edge | None = None
        theirs = False  # tracked by torch, whose engine continues there
        kind = kind_of(type(arg))
        if kind is SUBCLASS:
            if asks:
                disabled.__exit__(None, None, None)  # to dispatch to it, unless that is disabled
                return answered(function, args, inplace)
            kind = MIRRORED if isinstance(arg, _tensor.Tensor) else TORCH
        if kind is MIRRORED:
            made = arg._node
            if made is not None:
                view = arg._view_of
                if view is not None and view[1] != arg._version:
                    renew(arg)
                    made = arg._node
                index = arg._output_nr
                edge = (made, index)
                sign = made.signature
                if index and sign is not None:
                    sign = sign.output(index)
            else:  # no result is complex, so complex tensors only enter here
                if arg._requires_grad:
                    leaf = arg._stands_for
                    if leaf is None:
                        edge = (arg, 0)
                        sign = arg._signature or _signature_of_leaf(arg)
                    else:  # torch's own, as below, or one that had other memory at that time
                        edge, sign = (leaf, 0), None
                        theirs = not isinstance(leaf, _tensor.Tensor)
                if arg.is_complex():
                    of_complex = of_complex or edge is not None or function.is_rule
            if edge is not None:
                tracked = True
                if theirs:
                    pass
                elif sign is None:
                    signed = False
                elif first is not None:
                    key.append(sign.serial)
                else:
                    first = sign
                    if key:
                        key.append(HERE)
        elif kind is TORCH:
            if arg.requires_grad:
                over = None if arg.is_leaf else taken_over(arg, not changes_input)
                if over is not None:
                    return record(function, (*args[:i], over, *args[i + 1 :]), None, asks)
                edge = (arg, 0)
                tracked = theirs = True
                # The tape computes on a detached alias: no torch graph is built.
                args = (*args[:i], arg.detach(), *args[i + 1 :])
            if arg.is_complex():
                of_complex = of_complex or edge is not None or function.is_rule
        elif type(arg).__module__ == "numpy" and isinstance(arg, numbers.Real):
            # Torch takes it as a Python number. A rule would compute in its precision.
            number = operator.index(arg) if isinstance(arg, numbers.Integral) else float(arg)
            return record(function, (*args[:i], number, *args[i + 1 :]), inplace, asks)
        if signed and (edge is None or theirs):
            try:
                if theirs:
                    key.append(THEIRS)
                key.append(of_value(arg) if kind is OTHER else of_tensor(arg))
            except Unsigned:
                signed = False
        edges.append(edge)
    if forward_mode["_current_level"] >= 0:
        _refuse_tangents(function, args)
        if not tracked:
            return _by_torch(function, args, inplace), None
    node = _OfComplex(function) if of_complex else Node(function)
    node.places = [i for i, arg in enumerate(args) if kind_of(type(arg)) is not OTHER]
    needs = node.needs_input_grad = tuple([edge is not None for edge in edges])
    numbers_vary = False
    if first is None and signed and THEIRS in key:
        first = OF_TORCH
    if first is None:
        signed = False
    elif function in first.varying:
        apart = numbers_apart(key) if first.varying[function] else None
        if apart is None or not (function.formulas and function.formulas.takes_any_number):
            signed = first.varying[function] = False
        else:
            key, numbers_vary = apart, True
    if of_complex and tracked:  # after PyTorch's own error, if it has one
        if inplace is None:
            function.forward(node, *args)
        elif not args[0].is_complex():
            inplace()
        raise no_complex(function.__name__)
    if inplace is None:
        out = function.forward(node, *args)
        if (
            type(out) is torch.Tensor
            and function.makes_new
            and not (node.non_differentiable or node.dirty or _among(out, args))
        ):  # the same as below, for a new tensor
            dtype = out.dtype
            node.edges = edges
            node.outputs = ((out.shape, dtype, out.device),)
            if tracked and dtype.is_floating_point:
                node.sequence = next(_sequence)
                if signed:
                    _sign(node, key, first, args, out, True, numbers_vary)
                elif function.formulas is not None:
                    learn(function, args, needs)
                if node._saved:
                    _save_apart(node, out)
                out.__class__ = _tensor.Tensor
                out._node = node  # type: ignore[attr-defined]
            elif tracked and dtype.is_complex:
                raise no_complex(function.__name__)
            elif not tracked and function.formulas is not None:
                learn(function, args, needs)
            return out, node
    else:
        # If the first argument is saved, it is saved before the change; if the result is saved, it
        # is the changed tensor, which may not be changed again.
        try:
            result = function.forward(node, args[0].clone(), *args[1:])
        except (RuntimeError, TypeError):
            inplace()  # raises the in-place operation's own error
            raise
        out = inplace()
        node.dirty = (out,)
        node.label = function.in_place.get(node.name(), node.label)
        if node._saved and _among(result, node._saved):
            node.save_for_backward(*[out if t is result else t for t in node._saved])
    node.edges = edges
    if isinstance(out, _MANY):
        if tracked:
            node.sequence = next(_sequence)
            made = [_track(node, i, o, args, True, change) for i, o in enumerate(out)]
            out = made if isinstance(out, list) else tuple(made)
        node.outputs = [meta_of(o) for o in out]
    else:
        if tracked:
            node.sequence = next(_sequence)
            out = _track(node, 0, out, args, False, change)
        node.outputs = (meta_of(out),)
    if signed and tracked:
        makes_new = function.is_rule and function.is_view and inplace is None
        makes_new = makes_new and type(out) is _tensor.Tensor
        _sign(node, key, first, args, out, makes_new, numbers_vary)
    elif (
        function.formulas is not None
        and not function.is_inplace
        and (tracked or inplace is None)  # nothing is recorded of a change of a plain tensor
    ):
        learn(function, args, needs, inplace is not None)
    if node.dirty or node.non_differentiable:
        # What was marked is an output, which leads to the node: kept, it would be a cycle.
        node.dirty = node.non_differentiable = ()
    return out, node


def _with_origin(node: Node | None, out: object) -> Node | None:
    """Store with `node` the place of its call and its result, for `nnmirror.explain`."""
    if node is not None and any(node.needs_input_grad):
        node.origin = of_this_call()  # type: ignore[attr-defined]
        outs = out if isinstance(out, _MANY) else (out,)
        node.returned = [  # type: ignore[attr-defined]
            (o.detach(), 0 if o.is_inference() else o._version)
            if isinstance(o, torch.Tensor)
            else None
            for o in outs
        ]
    return node


_AUTOCAST = (
    "nnmirror: torch.autocast is not mirrored; convert the model and its input with .to(dtype)"
    " instead"
)


def is_usual() -> bool:
    """Is grad mode on, and exact mode and plain mode off?"""
    mode = _override.mode
    if not (_torch_grad_mode() if mode is None else mode) or _state.plain or in_inference_mode():
        return False
    mode = _exact._override.mode  # as in `is_exact`
    return not (_state.exact_mode if mode is None else mode)


def _met_before(function: type[Function], args: Args) -> tuple[Any, Node | None] | None:
    """`record` for a call whose signature or kind is known; None for any other."""
    _Tensor = _tensor.Tensor
    edges: list[Edge | None] = []
    key: list[object] = []  # as in `_sign`: the part after the first tracked tensor
    first = first_arg = first_made = None
    for arg in args:
        kind = type(arg)
        if kind is _Tensor:
            node = arg._node
            if node is None:
                leaf = arg._stands_for
                if leaf is None or isinstance(leaf, _tensor.Tensor):
                    return None
                edges.append((leaf, 0))
                key += (THEIRS, (arg.shape, arg.stride(), arg.dtype, arg.device))
                continue
            sign = node.signature
            if sign is None:
                return _of_its_kind(function, args)
            index = 0
            if not sign.is_plain:
                view = arg._view_of
                if view is not None and view[1] != arg._version:
                    return None
                index = arg._output_nr
                if index:
                    sign = sign.output(index)
            edges.append((node, index))
            if first is not None:
                key.append(sign.serial)
            elif sign.varying.get(function) is False:
                return _of_its_kind(function, args)
            else:
                first, first_arg, first_made = sign, arg, node
                if key:
                    key.append(HERE)
        elif kind_of(kind) is MIRRORED:  # a parameter
            sign = arg._signature
            if sign is not None:
                edges.append((arg, 0))
                if first is not None:
                    key.append(sign.serial)
                elif sign.varying.get(function) is False:
                    return _of_its_kind(function, args)
                else:
                    first, first_arg = sign, arg
                    if key:
                        key.append(HERE)
            elif arg._requires_grad or arg._node is not None:
                return None
            else:
                edges.append(None)
                key.append(of_tensor(arg))
        elif kind is torch.Tensor:
            if arg.layout is not torch.strided:
                return None
            if arg.requires_grad:
                i = len(edges)
                over = None if arg.is_leaf else taken_over(arg)
                if over is not None:
                    return record(function, (*args[:i], over, *args[i + 1 :]))
                edges.append((arg, 0))
                key.append(THEIRS)
                args = (*args[:i], arg.detach(), *args[i + 1 :])
            else:
                edges.append(None)
            key.append((arg.shape, arg.stride(), arg.dtype, arg.device))
        elif arg is None or kind is str:
            edges.append(None)
            key.append(arg)
        elif kind is float or kind is int or kind is bool:
            edges.append(None)
            key.append((kind, arg) if arg else of_value(arg))
        else:
            try:
                key.append(of_value(arg))
            except Unsigned:
                return None
            edges.append(None)
    if first is None:
        if THEIRS not in key:
            return None
        first = OF_TORCH
    found = first.next.get((function, *key) if key else function)
    numbers_vary = found is None and function in first.varying
    if numbers_vary:
        apart = numbers_apart(key)
        found = None if apart is None else first.next.get((function, *apart))
    if found is None:
        return None
    found.came_again = True
    if not (found.makes_new or found.makes_several):
        return None
    if found.written is None and first is not OF_TORCH and len(args) <= MOST_ARGUMENTS:
        noted = call.Noted(function, found, args, edges)
        found.written = call.write([noted], args, edges, numbers_vary)
    if found.written:
        before = first.calls.get(function)
        kept = () if before is None else before[1] if before[0] is _one_of else (before[:2],)
        kept = ((found.written, found), *[one for one in kept if one[1] is not found])[:_MOST_TRIED]
        written: Kept = (_one_of, kept) if len(kept) > 1 else kept[0]
        keep_written(first, function, (*written, function.exact is not None))
        met = found.written(found, first_arg, first_made, args)
        if met is not None:
            return met
    return _once_more(function, args, found, edges) if found.makes_new else None


_MOST_TRIED = 3  # a layer that is called in several ways: on data, and on what was computed


def _one_of(
    kept: Sequence[tuple[call.Written, Signature]], first: object, made: object, args: Args
) -> Made | None:
    """The call by the first of several generated functions that takes these arguments."""
    for written, found in kept:
        met = written(found, first, made, args)
        if met is not None:
            return met
    return None


def keep_written(first: Signature, what: object, written: Kept) -> None:
    """Have a generated function tried first for calls of `what` on a tensor with the signature
    `first`: (the function, the signature that it is given, whether exact mode replaces it, ...).
    For `_one_of`, in place of the signature, several such functions and signatures."""
    if first.calls is NO_CALLS:
        first.calls = {}
    first.calls[what] = written


@implements(call)
def named_in_calls() -> dict[str, object]:
    """What the source of generated calls names."""
    return {
        "autocast": is_any_autocast_enabled,
        "disabled": DisableTorchFunctionSubclass,
        "dispatch_mode": _torch.dispatch_mode,
        "forward_mode": forward_mode,
        "Node": Node,
        "sequence": _sequence,
        "standing_for": _standing_for,
        "taken_over": taken_over,
        "transform": in_transform,
        "unlike": unlike,
        "view_of": view_of,
    }


def _standing_for(value: object) -> "_tensor.Tensor | None":
    """What stands for a result of torch's own among the arguments of a call; None if nothing."""
    if type(value) is torch.Tensor and value.requires_grad and not value.is_leaf:
        with DisableTorchFunctionSubclass():
            return taken_over(value)
    return None


def _changed_before(
    function: type[Function], args: Args, inplace: Callable[[], torch.Tensor]
) -> Made | None:
    """`record` for an in-place change whose signature is known, of a result that is no view or of a
    plain tensor; None for any other."""
    changed: Any = args[0] if args else None
    sign: Signature | None = None
    edges: list[Edge | None]
    key: list[object]
    if type(changed) is _tensor.Tensor:
        made = changed._node
        if made is None:
            return None
        sign = made.signature
        if changed._view_of is not None or sign is None or not (sign.is_plain and sign.next):
            return None
        edges, key = [(made, 0)], [IN_PLACE, HERE]
    elif type(changed) is torch.Tensor and shares_nothing(changed):
        edges, key = [None], [IN_PLACE, of_tensor(changed)]
    else:
        return None
    for arg in args[1:]:
        edge: Edge | None = None
        kind = type(arg)
        if kind is torch.Tensor:
            if arg.requires_grad or arg.layout is not torch.strided:
                return None
            key.append(of_tensor(arg))
        elif kind_of(kind) is OTHER:
            try:
                key.append(of_value(arg))
            except Unsigned:
                return None
        elif kind_of(kind) is not MIRRORED:
            return None
        else:
            edge = (arg, 0) if arg._signature is not None else usual_edge(arg)
            if edge is not None:
                other = signature_at(edge)
                if other is None or arg is changed:
                    return None
                if sign is None:
                    sign = other
                    key.append(HERE)
                else:
                    key.append(other.serial)
            elif arg._requires_grad or arg._node is not None or kind not in _tensor.LEAVES:
                return None
            else:
                key.append(of_tensor(arg))
        edges.append(edge)
    found = None if sign is None else sign.next.get((function, *key))
    plan = None if found is None else found.plan
    if type(plan) is not formula.Plan or plan.is_open or plan.copied or plan.memory:
        return None
    formulas = function.formulas
    if formulas is None or formulas.refuse is not None:
        return None
    saved = [args[i] if i > 0 else changed for i in plan.saves]
    try:
        versions = [t._version for t in saved]
    except RuntimeError:  # one of inference mode
        return None
    before = changed.clone() if 0 in plan.saves else None  # its value before the change
    inplace()
    for i, place in enumerate(plan.saves):
        if place <= 0:
            saved[i] = before if place == 0 else changed.detach()
            versions[i] = saved[i]._version
    node = Node(function)
    node.signature = node.like = found
    node.edges = edges
    node._saved, node._versions = saved, versions
    if not saved and plan.saves_number:
        node._saved = node._versions = (None,)
    node.sequence = next(_sequence)
    changed.__class__ = _tensor.Tensor
    made_by(changed, node, 0)
    return changed, node


def shares_nothing(tensor: torch.Tensor) -> bool:
    """Is it a plain tensor without a gradient, whose memory no other tensor has?"""
    return (
        not (tensor.requires_grad or tensor._is_view() or tensor.is_inference())
        and tensor.layout is torch.strided
        and _torch.storage_Use_Count(tensor.untyped_storage()._cdata) == _OWN_USE
    )


_OWN_USE = 2  # of a tensor's memory: by itself, and by the argument of the count


def _of_its_kind(function: type[Function], args: Args) -> Made | None:
    """`record` for a call without a signature, if there were calls of its kind; else None."""
    known = function.recorders.get(tuple(map(type, args)))
    return None if known is None else known[0](args)


@upcall("nnmirror.fast.recorder")
def learn(
    function: type[Function], args: Args, needs: tuple[bool, ...], in_place: bool = False
) -> None:
    """Write a recorder for calls of this kind, which have no signature."""
    raise NotImplementedError


def finished(node: Node, out: Any, args: Args) -> Made:
    """The rest of `_record`, after `out` has been computed and its saved tensors chosen."""
    node.sequence = next(_sequence)
    out = _track(node, 0, out, args, False, None)
    node.outputs = (meta_of(out),)
    return out, node


def _once_more(
    function: type[Function], args: Args, found: Signature, edges: Sequence[Edge | None]
) -> Made:
    """`record` for a call with the signature `found`."""
    node = Node(function)
    node.signature = node.like = found
    node.edges = edges
    plan = found.plan
    if plan is None:
        node.like = None
        node.places, node.needs_input_grad = found.places, found.needs
        node.outputs, node.indices = found.outputs, found.indices
        out = function.forward(node, *args)
        if node._saved:
            _save_apart(node, out)
    else:
        if plan.is_open:
            node.given = plan.given(args)  # type: ignore[misc]
        out = plan.keep_apart(node, args, plan.compute(*args))
    if found.checks_shape and out.shape != found.outputs[0][0]:
        unlike(node, out)
    node.sequence = next(_sequence)
    out.__class__ = _tensor.Tensor
    out._node = node
    if function.is_view:
        base = args[0]
        ours = isinstance(base, _tensor.Tensor)
        out._view_of = view_from(base, out) if ours else view_of(node, out, base, False)
    return out, node


def unlike(node: Node, out: torch.Tensor) -> None:
    """The result has another shape than that of the other calls with the node's signature."""
    node.outputs = (meta_of(out),)
    node.signature = None


HERE = object()  # in a key, after the part before the first argument that has a signature
OF_TORCH = Signature()  # the first part if there are only such tensors
THEIRS = object()  # in a key, before the layout of a tensor that torch itself tracks
IN_PLACE = object()  # in a key: the first argument was changed


def _signature_of_leaf(leaf: "_tensor.Tensor") -> Signature | None:
    """A new signature; none for a leaf with hooks, which the generic walk handles, nor for one of
    inference mode, which may not be saved."""
    if leaf._leaf_hooks or leaf._post_accumulate_hooks or leaf._reached_hooks:
        return None
    if leaf.is_inference():
        return None
    try:
        layout = of_tensor(leaf)
    except Unsigned:
        return None
    held = leaf._signature_by_layout
    if held is None or held[0] != layout:  # else it was frozen for a while, or given other memory
        held = leaf._signature_by_layout = layout, Signature()
    leaf._signature = held[1]
    return held[1]


def signature_at(edge: Edge) -> Signature | None:
    """The signature of the target of an edge."""
    target, index = edge
    if isinstance(target, Node):
        sign = target.signature
        return sign.output(index) if index and sign is not None else sign
    if not isinstance(target, _tensor.Tensor):
        return None
    return target._signature or _signature_of_leaf(target)


def sign_call(node: Node, first: Signature) -> None:
    """Give `node`, a call on one tensor with the signature `first`, its signature."""
    _sign(node, [], first, (), None, makes_new=True, numbers_vary=False)


def _sign(
    node: Node,
    key: list[object],
    first: Any,
    args: Args,
    out: object,
    makes_new: bool,
    numbers_vary: bool,
) -> None:
    """Give `node` the signature of its call, with the result `out`, a new one if necessary.

    `key` represents all arguments except the first that has a signature, which stores it.
    """
    call = (node.function, *key) if key else node.function
    sign = first.next.get(call)
    if sign is None:
        is_plain = len(node.outputs) == 1 and not node.function.is_view
        inputs = [signature_at(edge) for edge in node.edges if edge is not None]
        layout = None
        if is_plain and isinstance(out, torch.Tensor) and out.layout is torch.strided:
            layout = of_tensor(out)
        sign = first.made(node.function, [s for s in inputs if s is not None], layout)
        sign.places, sign.needs = tuple(node.places), node.needs_input_grad
        sign.outputs, sign.makes_new, sign.plan = node.outputs, makes_new, node.plan
        sign.makes_several = node.function.is_rule and len(node.outputs) > 1 and not makes_new
        sign.label, sign.indices = node.label, node.indices
        sign.origin = node.sequence, of_this_call()
        if node.plan is not None:
            sign.plan = (
                node.plan.labelled(node.label)
                if numbers_vary
                else node.plan.fixed(node.given, node.label)
            )
        sign.checks_shape = node.function.reads_data or any(
            isinstance(a, torch.Tensor) and not a.is_floating_point() for a in args
        )
        sign.is_plain = is_plain
        first.follow(node.function, call, sign)
    elif sign.outputs != node.outputs:
        return
    node.signature = sign


def _sign_users_call(node: Node, args: Args, out: "_tensor.Tensor") -> None:
    """Give the call of a user's Function a signature, for the calls on its result.

    Its own backward may do something else each time, and is left to the generic walk.
    """
    key: list[object] = [out._view_of is None]
    first = None
    for arg, edge in zip(args, node.edges, strict=True):
        if edge is None:
            try:
                key.append(of_tensor(arg) if isinstance(arg, torch.Tensor) else of_value(arg))
            except Unsigned:
                return
            continue
        sign = signature_at(edge)
        if sign is None:
            return
        if first is None:
            first = sign
        key.append(sign.serial)
    if first is None:
        return
    _sign(node, key, first, args, None, makes_new=False, numbers_vary=False)
    if node.signature is not None:
        node.signature.parts = node.signature.bound = False
        node.signature.is_plain = out._view_of is None


# The kind of an argument, by its type: isinstance is slow for tensor classes.
MIRRORED, TORCH, SUBCLASS, OTHER = "mirrored", "torch", "subclass", "other"
# The types of most arguments, which are not subclasses with dispatch.
ORDINARY = {torch.Tensor, _tensor.Tensor, bool, float, int, str, tuple, type(None)}


def _kind_of(cls: type) -> str:
    if not issubclass(cls, torch.Tensor):
        return OTHER
    if issubclass(cls, _tensor.Tensor):
        return SUBCLASS if hasattr(cls, "_of") else MIRRORED
    asked = cls.__torch_function__ is not _torch.disabled_torch_function_impl
    return SUBCLASS if asked and cls is not torch.Tensor else TORCH


kind_of: Callable[[type], str] = functools.lru_cache(maxsize=256)(_kind_of)


@upcall("nnmirror.overrides")
def answered(
    function: type[Function], args: Args, inplace: Callable[[], torch.Tensor] | None
) -> tuple[Any, Node | None]:
    """Called by `record` if there is a tensor subclass among the arguments."""
    raise NotImplementedError


@upcall("nnmirror.overrides")
def tracked_class(cls: type[torch.Tensor]) -> "type[_tensor.Tensor]":
    """The class of tracked tensors of the subclass `cls`."""
    raise NotImplementedError


# In-place changes of views are recorded as operations of their own, in a higher module.


@upcall("nnmirror.views")
def view_of(node: Node, out: torch.Tensor, base: object, several: bool) -> "_views.ViewOf | None":
    """The view record of `out`, output of `node`, if it is a view of `base` or its base."""
    raise NotImplementedError


@upcall("nnmirror.views")
def view_from(base: "_tensor.Tensor", out: torch.Tensor) -> "_views.ViewOf":
    """The same for the single view that an operation makes of `base`, a tracked tensor."""
    raise NotImplementedError


@upcall("nnmirror.views")
def change_of(tensor: torch.Tensor) -> "_views.Change":
    """What a recorded in-place operation on `tensor` is about to change."""
    raise NotImplementedError


@upcall("nnmirror.views")
def renew(view: "_tensor.Tensor") -> None:
    """Give a view whose memory has changed a new grad_fn, based on its base's present one."""
    raise NotImplementedError


@upcall("nnmirror.views")
def rebase(node: Node, view: "_tensor.Tensor", base: torch.Tensor) -> None:
    """Record `node`, an in-place operation on `view`, as one on its base."""
    raise NotImplementedError


@upcall("nnmirror.views")
def tell(base: torch.Tensor, views: Sequence[tuple[torch.Tensor, str]]) -> None:
    """Track plain views whose base has become tracked."""
    raise NotImplementedError


def is_plain_update(changed: object, others: object) -> bool:
    """Is this an optimiser's update: a leaf changed by values without history?

    If torch's grad mode is off and the mirror's own is on, torch.optim's `with torch.no_grad()`
    cannot be distinguished from the script's own mode; but such a change could not be recorded
    anyway.
    """
    return (
        not torch.is_grad_enabled()
        and all(t.is_leaf for t in tensors_in(changed))
        and not any(t.requires_grad for t in tensors_in(others))
    )


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in an argument or a result: itself, or items of lists, tuples, dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _applied(function: type[Function], args: Args, kwargs: Kwargs) -> Any:
    """Run a user's Function; its output, recorded if grad mode is on and an argument requires
    grad."""
    if function.has_context:
        args, kwargs = _with_defaults(function.forward, args, kwargs)
    if kwargs:
        args = _placed(function, args, kwargs)
    recording = is_grad_enabled()
    if recording and is_any_autocast_enabled():
        raise RuntimeError(_AUTOCAST)
    with DisableTorchFunctionSubclass():
        if recording and in_transform() is not None:
            _refuse_transform(function, args)
        if forward_mode["_current_level"] >= 0:
            _refuse_tangents(function, args)
        node = Node(function)
        node.attributes = {}
        node.places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        edges = [
            edge_of(a) if isinstance(a, torch.Tensor) and a.requires_grad else None for a in args
        ]
        node.sequence = next(_sequence)  # after the inputs were met, before calls inside forward
        node.needs_input_grad = tuple([edge is not None for edge in edges])
        ctx = FunctionCtx(node)
        with users_code():
            if function.has_context:
                out = function.forward(*args)
                function.setup_context(ctx, args, out)
            else:
                out = function.forward(ctx, *args)
        node.dirty = ctx.dirty_tensors
        tracked = recording and any(node.needs_input_grad)
        if tracked:
            if any(e is not None and a.is_complex() for e, a in zip(edges, args, strict=True)):
                raise no_complex(function.__name__)
            node.edges = edges
            node.save_for_backward(*ctx.to_save)
        single = not isinstance(out, tuple)
        made = []
        for i, result in enumerate((out,) if single else out):
            if not (tracked and is_differentiable(result, node)):
                result = _without_gradient(result, args, node.dirty)
            else:
                if result.requires_grad and not _among(result, node.dirty):
                    result = _apart(result, args)
                result = _track(node, i, result, args, not single, None)
            made.append(result)
        node.outputs = [meta_of(o) for o in made]
        if tracked and single and not node.dirty and type(made[0]) is _tensor.Tensor:
            _sign_users_call(node, args, made[0])
        # What was marked is an output, which leads to the node: kept, it would be a cycle.
        node.dirty = node.non_differentiable = ()
        if _state.plain and _here.is_plain:
            _with_origin(node, made)
    return made[0] if single else tuple(made)


def _with_defaults(
    forward: Callable[..., object], args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """The arguments of a call of `forward`, in its order and with its defaults."""
    code = getattr(forward, "__code__", None)
    if not (kwargs or code is None or code.co_kwonlyargcount) and code.co_argcount == len(args):
        return args, kwargs  # all given, and inspecting the signature is slow
    bound = inspect.signature(forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args, bound.kwargs


def _placed(function: type[Function], args: Args, kwargs: Kwargs) -> Args:
    """The arguments of forward by position, with those given by name in their places, as in
    PyTorch."""
    code = function.forward.__code__
    names = code.co_varnames[0 if function.has_context else 1 : code.co_argcount]
    for name in kwargs:
        if name not in names:
            raise TypeError(f"forward() got an unexpected keyword argument '{name}'")
        if name in names[: len(args)]:
            raise TypeError(f"forward() got multiple values for argument '{name}'")
    placed = list(args)
    while len(placed) < len(args) + len(kwargs):
        name = names[len(placed)]
        if name not in kwargs:
            raise TypeError(
                f"forward() missing required argument: '{name}' (position {len(placed)})"
            )
        placed.append(kwargs[name])
    return tuple(placed)


def _apart(out: torch.Tensor, inputs: Args) -> torch.Tensor:
    """An output that requires grad already, without its history: an input, or the result of a graph
    inside forward."""
    if not _among(out, inputs):
        return out.detach()
    if isinstance(out, _tensor.Tensor):
        return out  # for torch it does not require grad
    return out.detach().view_as(out)


def _without_gradient(out: object, inputs: Args, dirty: tuple[torch.Tensor, ...]) -> object:
    """An output of a user's Function that gets no gradient: never an input itself, nor a result
    that requires grad because of a graph inside."""
    if not isinstance(out, torch.Tensor):
        return out
    if _among(out, inputs):
        if out.requires_grad:
            return out.detach()
        with torch.no_grad():
            return out if _among(out, dirty) else out.view_as(out)
    return out.detach() if out.requires_grad and not out._is_view() else out


def meta_of(out: object) -> Any:
    return (out.shape, out.dtype, out.device) if isinstance(out, torch.Tensor) else None


@implements(_tensor)
def edge_of(tensor: torch.Tensor) -> Edge:
    if isinstance(tensor, _tensor.Tensor):
        view = tensor._view_of
        if view is not None and view[1] != tensor._version:
            renew(tensor)
        if tensor._node is not None:
            return tensor._node, tensor._output_nr
        if tensor._stands_for is not None:
            return tensor._stands_for, 0
    elif tensor.requires_grad and not tensor.is_leaf:
        return edge_to(tensor)
    return tensor, 0


def _among(tensor: torch.Tensor, tensors: Iterable[object]) -> bool:
    for other in tensors:  # noqa: SIM110  a generator costs more than the loop
        if tensor is other:
            return True
    return False


def is_differentiable(out: object, node: Node) -> bool:
    """Does this output of `node` get a gradient?"""
    return (
        isinstance(out, torch.Tensor)
        and (out.is_floating_point() or out.is_complex())
        and not (node.non_differentiable and _among(out, node.non_differentiable))
    )


def _track(
    node: Node, index: int, out: Any, args: Args, several: bool, change: "_views.Change | None"
) -> Any:
    """Make `out` a tracked tensor: output `index` of `node`.

    `change` describes what an in-place operation changes, if that was determined before it.
    """
    if not is_differentiable(out, node):
        return out
    if out.is_complex():
        raise no_complex(node.function.__name__)
    dirty = bool(node.dirty) and _among(out, node.dirty)
    if dirty:
        base, views = change_of(out) if change is None else change
    elif isinstance(out, _tensor.Tensor) or _among(out, args):
        out = out.view_as(out)  # forward returned an input: make a separate tensor
    if node._saved:
        _save_apart(node, out, index)
    if not isinstance(out, _tensor.Tensor):
        out.__class__ = tracked_class(type(out))
    if dirty:
        if base is None:
            made_by(out, node, index)
        else:
            rebase(node, out, base)
        if views:
            tell(out if base is None else base, views)
        return out
    made_by(out, node, index)
    if node.function.is_view or not node.function.is_rule:
        out._view_of = view_of(node, out, args[0] if args else None, several)
    return out


def _save_apart(node: Node, out: torch.Tensor, index: int = 0) -> None:
    """A saved output would keep itself alive: save an alias of it."""
    for kept in node._saved or ():
        if kept is out:
            alias = out.detach()
            alias._alias_of_output = index  # type: ignore[attr-defined]
            node._saved = [alias if t is out else t for t in node._saved or ()]


def usual_edge(tensor: torch.Tensor) -> Edge | None:
    """The edge of a result; None for a leaf, a plain tensor, and a view whose memory has
    changed."""
    if type(tensor) is not _tensor.Tensor:
        return None
    view = tensor._view_of
    if view is not None and view[1] != tensor._version:
        return None
    node = tensor._node
    return None if node is None else (node, tensor._output_nr)


def _refuse_transform(function: type[Function], args: Args) -> None:
    """Inside torch.vmap or torch.func.grad, PyTorch's own function is called, which they support.

    Its result is unwrapped when they return, and would lose its history: raises if one of `args`
    requires grad for the tape.
    """
    wrapped = False
    for t in tensors_in(args):
        wrapped = wrapped or (_is_wrapped(t) and t.requires_grad)
        if _is_tracked(t):
            raise no_transform()
    if wrapped and not function.is_rule:
        raise NotImplementedError(
            f"nnmirror: torch.func would differentiate the forward of {function.__name__}, and"
            " not call its backward; derive it from torch.autograd.Function for this"
        )


def no_transform() -> NotImplementedError:
    return NotImplementedError(
        "nnmirror: torch.vmap and the other transforms of torch.func do not see the mirror's tape,"
        " and a tensor used inside one requires grad; the result would lose the gradient. Take the"
        " transform of the same name from nnmirror.func; or let nothing of the module require grad"
        " (module.requires_grad_(False)); or transform nnmirror.to_torch(module), which has the"
        " same weights"
    )


def _refuse_tangents(function: type[Function], args: Args) -> None:
    """Raises as PyTorch: a backward alone does not define forward mode."""
    if function.is_rule or all(_torch.unpack_dual(t, 0)[1] is None for t in tensors_in(args)):
        return
    raise NotImplementedError(
        "You must implement the jvp function for custom autograd.Function to use it with forward"
        " mode AD."
    )


def _by_torch(
    function: type[Function], args: Args, inplace: Callable[[], torch.Tensor] | None
) -> Any:
    """The result only, by PyTorch's own function if it has one."""
    if inplace is not None:
        return inplace()
    if function.infer is not None:
        return function.infer(*args)
    node = _Unrecorded(function)
    node.needs_input_grad = (False,) * len(args)
    return function.forward(node, *args)


def is_left_to_torch(args: Args, kwargs: Kwargs | None = None) -> bool:
    """Is there nothing to record, so that PyTorch's own function has to be called, or may be?"""
    if is_seen_through():
        given = args, kwargs
        return not (is_grad_enabled() and any(map(_is_tracked, tensors_in(given))))
    if _state.plain or (is_grad_enabled() and is_any_autocast_enabled()):
        return False
    given = (*args, *kwargs.values()) if kwargs else args
    return need_no_gradient(given, is_off=not (is_grad_enabled() or _torch_grad_mode()))


def _is_tracked(t: torch.Tensor) -> bool:
    """Does it require grad outside of the transforms that wrap it?"""
    if not _is_wrapped(t):
        return t.requires_grad
    while _is_wrapped(t):
        t = _torch.get_unwrapped(t)
    return isinstance(t, _tensor.Tensor) and t.requires_grad


def is_seen_through() -> bool:
    """Is a transform of torch.func or forward mode active, so that PyTorch computes more than the
    result?"""
    return in_transform() is not None or forward_mode["_current_level"] >= 0


def made_by(tensor: "_tensor.Tensor", node: Node, index: int) -> None:
    """Make `tensor` output `index` of `node`, and move a retained gradient there."""
    old = tensor._node
    if old is not None and old.retained and tensor._output_nr in old.retained:
        node.retained = {index: old.retained.pop(tensor._output_nr)}
        node.is_watched = True
    tensor._node = node
    tensor._output_nr = index


_tensors_of_numbers: dict[tuple[float, torch.dtype, torch.device], torch.Tensor | None] = {}


def number(value: R, like: torch.Tensor) -> R | torch.Tensor:
    """A number as an operand for `like`: from the third time on as a tensor, which is faster.

    The number itself if a tensor would round differently, or is not the same (minus zero).
    """
    return value if type(value) is not float or value == 0 else bound(value, like)


@implements(_tensor)
def bound(value: R, like: torch.Tensor) -> R | torch.Tensor:
    key = _constant_of(value, like)
    if key is None:
        return value
    found = _tensors_of_numbers.get(key)
    if found is None:
        if len(_tensors_of_numbers) >= 1024:
            _tensors_of_numbers.clear()
        # A number that occurs once, such as that of a schedule, is not worth a tensor.
        _tensors_of_numbers[key] = constant(*key) if key in _tensors_of_numbers else None
        return value
    return found


@implements(call)
def operand(value: R, like: torch.Tensor) -> R | torch.Tensor:
    key = _constant_of(value, like)
    return constant(*key) if key is not None and value else value


def _constant_of(
    value: object, like: torch.Tensor
) -> tuple[float, torch.dtype, torch.device] | None:
    """The arguments of `constant` for a number next to `like`; None if it has other bits there."""
    if type(value) is int and -(1 << 24) <= value <= 1 << 24:
        value = float(value)
    # PyTorch has an error for a number beyond the dtype's.
    if type(value) is not float or not -_MOST < value < _MOST:
        return None
    dtype = C_dtype(like)
    return (value, dtype, C_device(like)) if dtype in _WIDE else None


_MOST = torch.finfo(torch.float32).max
_WIDE = (torch.float32, torch.float64)


@functools.lru_cache(maxsize=4096)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number as a read-only tensor: operations are faster with a tensor than with a number.

    Minus zero gives zero: it equals zero, so both are one entry of the cache.
    """
    with torch.inference_mode(False):
        made = torch.tensor(value or 0.0, dtype=dtype, device=device)
    made._is_constant = True  # type: ignore[attr-defined]
    return made
