"""Tensor: a torch tensor with a recorded history.

A tracked tensor *is* a `torch.Tensor`: the result of an ordinary torch operation, with its class
changed to `Tensor` and a reference (`_node`) to the recorded call that made it. For torch it never
requires grad, so torch builds no graph in any mode; the `requires_grad`, `grad_fn` and `is_leaf`
that a script reads are the mirror's own.

Torch passes every operation on such a tensor to `__torch_function__`, which looks it up among the
rules (see `nnmirror.rules`): it is recorded, passed through, or refused.

.. include:: refused.md
"""

import copy
import functools
import os
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.reduction import ForkingPickler
from types import FunctionType, GetSetDescriptorType
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Self,
    SupportsIndex,
    TypeGuard,
    TypeVar,
    overload,
)

import torch
from torch.utils.hooks import RemovableHandle

from . import _state, _torch
from ._state import here as _here
from ._torch import DisableTorchFunctionSubclass
from ._types import Args, Hook, Kwargs, TorchFunction
from ._upcalls import upcall
from .exact.mode import is_exact
from .fast.signature import MORE, LeafSignature, Made
from .grad_mode import (
    _override,
    in_inference_mode,
    is_grad_enabled,
    is_only_computed,
    outside_inference_mode,
)

if TYPE_CHECKING:
    from . import views as _views
    from .fast.leaves import HeldSignature
    from .node import Edge, Node
    from .operation import Operation

R = TypeVar("R")
S = TypeVar("S", bound=torch.Tensor)


def _suffixed(text: str, suffix: str) -> str:
    """`tensor(...)` with another `, name=value`, wrapped like PyTorch's."""
    text = text[:-1]
    last_line = len(text) - text.rfind("\n") + 1
    if last_line + len(suffix) + 2 > _torch.PRINT_OPTS.linewidth:
        return f"{text},\n       {suffix})"
    return f"{text}, {suffix})"


_USUAL = (torch.float32, torch.float64)
# Torch's own `.grad` and `.data`. A tracked tensor has its gradient in `_gradient`, which is
# several times faster to read and write. Call these within DisableTorchFunctionSubclass.
C_grad: GetSetDescriptorType = _torch.TensorBase.grad
_C_data: GetSetDescriptorType = _torch.TensorBase.data
# The same for attributes that a tracked tensor overrides.
C_device: Callable[[torch.Tensor], torch.device] = _torch.TensorBase.device.__get__
C_dim: Callable[[torch.Tensor], int] = _torch.TensorBase.dim
C_dtype: Callable[[torch.Tensor], torch.dtype] = _torch.TensorBase.dtype.__get__
C_offset: Callable[[torch.Tensor], int] = _torch.TensorBase.storage_offset
C_shape: Callable[[torch.Tensor], torch.Size] = _torch.TensorBase.shape.__get__
C_stride: Callable[[torch.Tensor], tuple[int, ...]] = _torch.TensorBase.stride
_C_detach: Callable[[torch.Tensor], torch.Tensor] = _torch.TensorBase.detach


def no_complex(name: str) -> NotImplementedError:
    """The error for an operation on complex numbers that needs a gradient.

    The gradient of a complex number involves its conjugate, which the rules do not take.
    """
    return NotImplementedError(
        f"nnmirror: gradients of complex numbers are not mirrored, and {name} takes or makes a"
        " complex tensor that needs a gradient. What to do: call it under"
        " torch.no_grad(), or on .detach(), if no gradient should flow; compute with the real"
        " and the imaginary part as two real tensors; write an nnmirror.Function with real"
        " arguments and results and complex numbers inside; or train"
        " nnmirror.to_torch(model), as PyTorch does"
    )


def bare(name: str) -> str:
    """A node's name without the C++ namespace that a few of PyTorch's have."""
    return name.removeprefix("torch::autograd::")


def add_hook(hooks: OrderedDict[int, Hook], fn: Hook) -> RemovableHandle:
    handle = torch.utils.hooks.RemovableHandle(hooks)
    hooks[handle.id] = fn
    return handle


def reshaping(function: TorchFunction) -> TorchFunction:
    """Wraps `function`, which gives its first argument, a tensor, another shape or other memory."""

    def change(tensor: Any, *args: object, **kwargs: object) -> Any:
        try:
            return function(tensor, *args, **kwargs)
        finally:  # it may have been done in part
            forget_layout(tensor)

    return change


def forget_layout(tensor: Any) -> None:
    """It may have another shape or other memory now."""
    for name in ("_plain", "_transposed", "_repeated", "_signature"):
        vars(tensor).pop(name, None)
    if getattr(tensor, "_node", None) is not None:
        tensor._node.signature = None  # it says what the layout was


_set_data = reshaping(_C_data.__set__)


def _is_laid_out_as(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        tensor.shape == C_shape(other)
        and tensor.dtype is C_dtype(other)
        and tensor.layout is torch.strided is other.layout
        and tensor.stride() == other.stride()
        and tensor.device == C_device(other)
    )


class _kept(Generic[R]):
    """As functools.cached_property, without its lock: computing it twice gives the same."""

    def __init__(self, make: "Callable[[Any], R]") -> None:
        self.make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tensor: None, owner: type) -> "_kept[R]": ...

    @overload
    def __get__(self, tensor: torch.Tensor, owner: type | None = None) -> R: ...

    def __get__(self, tensor: torch.Tensor | None, owner: type | None = None) -> "R | _kept[R]":
        if tensor is None:
            return self
        made = vars(tensor)[self.name] = self.make(tensor)
        return made


# The function called for a torch function on a tracked tensor, filled by nnmirror.rules.
RULES: dict[object, TorchFunction] = {}
# Those of them that do nothing but compute a result: with grad mode off, torch's own is called.
COMPUTED: set[object] = set()


def _refuse_torch_function_objects() -> None:
    """Are we inside the forward of a torch.autograd.Function?

    It turns grad mode off and never dispatches to a tensor subclass, so its result would lose the
    gradient. Unlike under no_grad(), forward-mode gradients are off too; otherwise that is only so
    in inference mode.
    """
    if _torch.is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        return
    raise NotImplementedError(
        "nnmirror: a torch.autograd.Function was given a tensor that the mirror tracks; its"
        " result would lose the gradient. Derive it from nnmirror.Function (the two are"
        " written alike), or call .detach() on the tensor. This is also how"
        " torch.utils.checkpoint works with use_reentrant=True: use False. And it is how"
        " Dirichlet and Beta of torch.distributions draw in rsample(): for the same distribution,"
        " by other draws, divide Gamma(concentration, 1).rsample() by its sum."
    )


def _is_multi_grad_hook(hook: object) -> TypeGuard[FunctionType]:
    """Is it the hook that torch.autograd.graph.register_multi_grad_hook puts on each tensor?"""
    return getattr(getattr(hook, "__code__", None), "co_filename", "").endswith(_GRAPH_FILE)


_GRAPH_FILE = os.path.join("torch", "autograd", "graph.py")

_GET, _SET = torch.Tensor.__getitem__, torch.Tensor.__setitem__
_MATMUL = torch.Tensor.__matmul__
_OF_TENSORS = {torch.Tensor}
AT = "at"  # stands for an index tensor in an index
_BASIC = {int, slice, type(None), type(Ellipsis)}  # in an index: these make a view


def _is_asked() -> bool:
    """Would torch call `Tensor.__torch_function__`, without any special case there?"""
    return _torchs_grad_mode() and _is_function_enabled() and not _is_function_mode_enabled()


def _called_by_torch(func: TorchFunction, tensor: object, args: Args, kwargs: Kwargs) -> Any:
    """`func(tensor, *args, **kwargs)`, a method that is not recorded, or not here: torch dispatches
    it, unless that would lead to a mere computation."""
    if (
        type(tensor) in UNASKED
        and not _torchs_grad_mode()
        and func in COMPUTED
        and UNASKED.issuperset(map(type, args))
        and not kwargs
        and is_only_computed()
        and _is_function_enabled()
        and not _is_function_mode_enabled()
    ):
        _refuse_torch_function_objects()
        with DisableTorchFunctionSubclass():
            return func(tensor, *args)
    return func(tensor, *args, **kwargs)


_torchs_grad_mode = torch.is_grad_enabled
_is_function_enabled = _torch.is_torch_function_enabled
_is_function_mode_enabled = _torch.is_torch_function_mode_enabled


def _met(function: Any, given: Args) -> Made | None:
    """As `record` with torch's grad mode on, with fewer checks, if there was such a call before;
    else None."""
    first = given[0]
    kind = type(first)
    node = None
    if kind is Tensor:
        node = first._node
        if node is None:
            return None
        sign = node.signature
        if sign is not None and not sign.is_single:
            sign = sign.output(first._output_nr)
    elif kind in LEAVES:
        sign = first._signature or signature_of_leaf(first)
        if sign is None:
            return None
    else:
        return None
    # With torch's grad mode on: is the mirror's on too, and no mode active in which it is not
    # enough to record?
    if _state.plain or _state.taps or in_inference_mode():
        return None
    if _state.own_grad_mode and _override.mode is not None:
        return None
    if sign is not None:
        written = sign.calls.get(function)
        if written is not None:
            if written[2] and is_exact():  # another function then
                return None
            return written[0](written[1], first, node, given)
        if sign.varying.get(function) is not MORE:
            return None
    if function.exact is not None:
        return None
    known = function.recorders.get(tuple(map(type, given)))
    return None if known is None else known[0](given)


# The rest of PyTorch's error for a leaf, or a view of one, that is changed in place.
CHANGED_LEAF = " leaf Variable that requires grad is being used in an in-place operation."

_HAS_VIEWS = (
    "nnmirror: views of this tensor that were made while it did not require grad do not follow it."
    " A gradient that PyTorch would pass on from them to the tensor is missing: make them again."
)
_ONLY_OF_LEAVES = "you can only change requires_grad flags of leaf variables."

LEAVES: set[type] = set()  # the classes of leaves, which may have a signature

# Types of arguments that have no dispatch, other than tracked tensors. None is left to torch, which
# knows where it is allowed.
UNASKED: set[type] = {torch.Tensor, bool, float, int, torch.device, torch.dtype}


def answer_directly(
    func: TorchFunction,
    found: TorchFunction,
    takes_any: bool = False,
    only_generated: bool = False,
) -> None:
    """Handle calls of this method of a tracked tensor without torch's dispatch.

    `found` is the function that dispatch would find: a `Recorded`, or a composition of recorded
    operations. If torch would dispatch to another class, or not at all, torch's method is called as
    usual; also if `found` `takes_any` arguments, for which torch has its own errors. With
    `only_generated`, torch is asked until there is a generated function for these arguments.
    """
    names = [n for n in (func.__name__, *_OPERATORS) if getattr(torch.Tensor, n, None) is func]
    names = [n for n in names if n not in vars(Tensor) and (n in _OPERATORS or n[0] != "_")]
    if not names:
        return
    if type(found) is Recorded:
        method = _recorded_directly(func, found)
    else:
        method = _composed_directly(func, found, takes_any, only_generated)
    method.__doc__ = method.__doc__ or f"As `torch.Tensor.{names[0]}`."
    for name in names:
        direct = method
        if type(found) is Recorded and name in _OF_OPERANDS:
            direct = _of_operands(func, found.function, name in _OF_ONE)
        setattr(Tensor, name, _reflected(direct, name) if name in _REFLECTED else direct)


def _reflected(of_number: TorchFunction, name: str) -> TorchFunction:
    """A reflected operator, which Python calls first if a tensor of torch's own is on the left.

    That tensor is the one that torch would dispatch from.
    """
    straight: TorchFunction = getattr(torch.Tensor, _REFLECTED[name])

    @functools.wraps(of_number)
    def method(self: object, other: object) -> Any:
        if type(other) is not torch.Tensor:
            return of_number(self, other)
        if type(self) in UNASKED and _is_asked():
            try:
                return RULES[straight](other, self)
            except TypeError:
                pass  # as in torch's error
        return straight(other, self)

    return method


def _recorded_directly(func: TorchFunction, found: "Recorded") -> TorchFunction:
    """`func` as a method of a tracked tensor, recorded by `found`."""
    function = found.function
    most = found.most

    @functools.wraps(func)
    def method(self: object, *args: object, **kwargs: object) -> Any:
        if (
            type(self) not in UNASKED
            or not (_torchs_grad_mode() and _is_function_enabled())  # as `_is_asked`
            or _is_function_mode_enabled()
        ):
            return _called_by_torch(func, self, args, kwargs)
        try:
            given = (self, *args)
            if kwargs:
                behind = found.behind.get((len(given), *kwargs))
                if behind is not None:  # such keywords were placed before
                    given = (*given, *[kwargs.get(name, default) for name, default in behind])
            met = None if kwargs and behind is None else _met(function, given)
            if met is not None:
                return met[0]
            for arg in (*args, *kwargs.values()) if kwargs else args:
                if type(arg) not in UNASKED:
                    return func(self, *args, **kwargs)
            if kwargs and behind is None:
                given = found.placed(given, kwargs)
            if len(given) <= most:
                return record(function, given)[0]
            return found(*given)
        except TypeError:
            pass  # as in torch's error
        return func(self, *args, **kwargs)

    return method


def _of_operands(func: TorchFunction, function: "type[Operation]", of_one: bool) -> TorchFunction:
    """The same for an operator, which is usually called with its operands only."""
    operator: TorchFunction
    if of_one:

        def operator(self: object, *more: object, **named: object) -> Any:
            if type(self) in UNASKED and _is_asked() and not (more or named):
                return (_met(function, (self,)) or record(function, (self,)))[0]
            return _called_by_torch(func, self, more, named)

    else:

        def operator(
            self: object, other: object = _NOT_GIVEN, *more: object, **named: object
        ) -> Any:
            if other is _NOT_GIVEN:  # called by name
                return func(self, **named)
            if more or named:
                return func(self, other, *more, **named)
            if (
                type(self) in UNASKED
                and _torchs_grad_mode()  # as `_is_asked`
                and _is_function_enabled()
                and not _is_function_mode_enabled()
            ):
                try:
                    met = _met(function, (self, other))
                    if met is not None:
                        return met[0]
                    if type(other) in UNASKED:
                        return record(function, (self, other))[0]
                except TypeError:
                    pass  # as in torch's error
            return _called_by_torch(func, self, (other,), {})

    return functools.wraps(func)(operator)


_NOT_GIVEN = object()


def _composed_directly(
    func: TorchFunction, found: TorchFunction, takes_any: bool, only_generated: bool
) -> TorchFunction:
    """The same for `found` that is composed of recorded operations."""
    with_keywords = getattr(found, "with_keywords", None)  # if it may have a generated function

    @functools.wraps(func)
    def method(self: object, *args: object, **kwargs: object) -> Any:
        if type(self) in UNASKED and _is_asked():
            if with_keywords is not None:
                given = (self, *args, *kwargs.values())
                try:
                    met = _met(with_keywords[(*kwargs,)], given)
                except RuntimeError:  # as of a view of what has other strides now
                    met = None
                if met is not None:
                    return met[0]
            if not only_generated and (not takes_any or (args and not kwargs)):
                given = (*args, *kwargs.values()) if kwargs else args
                for arg in given:
                    if type(arg) not in UNASKED:
                        break
                else:
                    try:
                        return found(self, *args, **kwargs)
                    except TypeError:
                        pass  # as in torch's error
        return _called_by_torch(func, self, args, kwargs)

    return method


_FLAGS = (None, False, True)
_REFLECTED = {
    "__radd__": "__add__",
    "__rmul__": "__mul__",
    "__rsub__": "__sub__",
    "__rtruediv__": "__truediv__",
}
_OF_ONE = {"__neg__"}
_OF_OPERANDS = {"__add__", "__matmul__", "__mul__", "__sub__", "__truediv__", *_OF_ONE, *_REFLECTED}
_OPERATORS = (
    *("__add__", "__ge__", "__gt__", "__le__", "__lt__", "__matmul__", "__mul__", "__neg__"),
    *("__pow__", "__sub__", "__truediv__", "__iadd__", "__imul__", "__isub__", "__itruediv__"),
    *_REFLECTED,
)


@upcall("nnmirror.rules.registry")
def dispatch(func: TorchFunction, args: Args, kwargs: Kwargs) -> Any:
    """Handles a call of a torch function that is not in RULES."""
    raise NotImplementedError


@upcall("nnmirror.rules.registry")
def check_numbers(func: TorchFunction, args: Args, kwargs: Kwargs) -> None:
    """PyTorch's error if a tensor that requires grad is given as a number, or with `out`."""
    raise NotImplementedError


@upcall("nnmirror.rules.registry")
def computed_into(func: TorchFunction, args: Args, kwargs: Kwargs) -> Any:
    """The result of `func` with the argument `out`, if nothing requires grad; else None."""
    raise NotImplementedError


@upcall("nnmirror.rules.registry")
class Recorded:
    """Most of RULES: records a call of `function`."""

    function: "type[Operation]"
    most: int  # the number of positional arguments
    behind: dict[tuple[int | str, ...], list[tuple[str, object]]]  # see rules/registry.py

    def placed(self, args: Args, kwargs: Kwargs) -> Args:
        """The arguments of a call by position, with those given by name in their places."""
        raise NotImplementedError

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError


@upcall("nnmirror.tape")
def record(function: type, args: Args) -> "tuple[Any, Node | None]":
    """Run the forward of `function`; its output, and the node."""
    raise NotImplementedError


@upcall("nnmirror.tape")
def edge_of(tensor: torch.Tensor) -> "Edge":
    """The edge of `tensor`."""
    raise NotImplementedError


@upcall("nnmirror.fast.leaves")
def signature_of_leaf(leaf: "Tensor") -> "LeafSignature | None":
    """Give a leaf its signature, if it can have one."""
    raise NotImplementedError


@upcall("nnmirror.constants")
def bound(value: R, like: torch.Tensor) -> R | torch.Tensor:
    """`value` for a comparison with `like`: a number perhaps as a tensor, which is faster."""
    raise NotImplementedError


@upcall("nnmirror.gradients")
def backward(
    tensors: torch.Tensor,
    grad_tensors: torch.Tensor | None,
    retain_graph: bool | None,
    create_graph: bool,
    *,
    inputs: torch.Tensor | Sequence[torch.Tensor] | None,
) -> None:
    """Run the backward from `tensors`."""
    raise NotImplementedError


@upcall("nnmirror.stepping")
def backward_plainly(
    tensors: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    retain_graph: bool,
) -> None:
    """The same in plain mode."""
    raise NotImplementedError


@upcall("nnmirror.rules.shape")
class Basic:
    """The rule of x[index] with integers, slices, None and `...`."""


@upcall("nnmirror.rules.shape")
class Index:
    """The rule of x[index] with masks or index tensors."""


@upcall("nnmirror.views")
def assigned(x: "Tensor", index: Any, value: torch.Tensor | float) -> bool:
    """x[index] = value in the most frequent case, with fewer checks; False in any other."""
    raise NotImplementedError


@upcall("nnmirror.running")
def in_this_walk(hook: FunctionType) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """A hook of torch.autograd.graph.register_multi_grad_hook that uses the mirror's walk."""
    raise NotImplementedError


@upcall("nnmirror.overrides")
def as_subclass(tensor: "Tensor", cls: type[S]) -> S:
    """`tensor.as_subclass(cls)` of a tensor that requires grad."""
    raise NotImplementedError


def move(tensor: "Tensor", value: torch.Tensor) -> None:
    """`tensor.data = value`, where only the memory changes, not the layout."""
    own = vars(tensor)
    plain = own.get("_plain")
    moves = plain is None or not plain.is_set_to(value)  # else as after p.data -= ...
    try:
        _C_data.__set__(tensor, value)
    finally:
        if moves:
            own.pop("_plain", None)
            own.pop("_transposed", None)
            own.pop("_repeated", None)
            tensor._has_moved = True


class Tensor(torch.Tensor):
    """A tensor that carries a gradient: what a mirrored module or operation returns."""

    _node: "Node | None" = None  # the recorded call that made it
    _output_nr: int = 0  # its index among that call's outputs
    _requires_grad: bool = False  # for leaves
    _gradient: torch.Tensor | None = None  # the value of `grad`
    _stands_for: torch.Tensor | None = None  # the leaf that its gradients go to, if it is an alias
    _signature: "LeafSignature | None" = None  # of a leaf with unchanged flags and layout
    _signature_by_layout: "HeldSignature | None" = None  # the previous one, for reuse
    _view_of: "_views.ViewOf | None" = None  # for views: the base, and its version then
    _leaf_hooks: OrderedDict[int, Hook] | None = None
    _post_accumulate_hooks: OrderedDict[int, Hook] | None = None
    # Hooks of its AccumulateGrad: before it runs, and after.
    _accumulate_hooks: tuple[OrderedDict[int, Hook], OrderedDict[int, Hook]] | None = None
    _reached_hooks: OrderedDict[int, Hook] | None = None  # the package's own
    _repeated: "tuple[int, torch.Tensor] | None" = None  # of a bias: see `_repeat_for`
    _has_moved: bool = False  # it was set to other memory, which has not been used yet
    _swapped: int | None = None  # calls recorded before the swap refer to the tensor that it was

    @classmethod
    def __torch_function__(
        cls,
        func: TorchFunction,
        types: Iterable[type],
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> Any:
        found = RULES.get(func)
        is_on = _torchs_grad_mode()
        if not is_on:
            _refuse_torch_function_objects()
        if kwargs and kwargs.get("out") is not None:
            written = computed_into(func, args, kwargs)
            if written is not None:
                return written
        elif not is_on and func in COMPUTED and UNASKED.issuperset(types) and is_only_computed():
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs) if kwargs else func(*args)
        if found is None:
            found = ASKED.get(func)
            if found is None:
                return dispatch(func, args, kwargs or {})
        try:
            if is_on and type(found) is Recorded:
                # What it would call, and first what that would call most often.
                given = found.placed(args, kwargs) if kwargs else args
                met = _met(found.function, given)
                return found(*given) if met is None else met[0]
            return found(*args, **kwargs) if kwargs else found(*args)
        except TypeError:
            if not all(issubclass(kind, torch.Tensor) for kind in types):
                return NotImplemented  # the function is for that of another class
            check_numbers(func, args, kwargs or {})  # the error names the original call
            raise

    # -- autograd's attributes -----------------------------------------------------------

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """True for a recorded result, and for a leaf that was set so."""
        return self._node is not None or self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise RuntimeError("requires_grad must be a bool")
        if self._node is not None and value:
            raise RuntimeError(_ONLY_OF_LEAVES)
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> "Tensor":
        """Set whether this leaf requires grad. RuntimeError for integers, and for False on a
        recorded result.
        """
        if not isinstance(requires_grad, bool):
            torch.empty(0).requires_grad_(requires_grad)  # PyTorch's error
        if self._node is not None and not requires_grad:
            raise RuntimeError(
                f"{_ONLY_OF_LEAVES} If you want to use a computed variable in a subgraph that"
                " doesn't require differentiation use var_no_grad = var.detach()."
            )
        if requires_grad and not (self.is_floating_point() or self.is_complex()):
            raise RuntimeError(
                "only Tensors of floating point and complex dtype can require gradients"
            )
        if requires_grad and self.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                "Setting requires_grad=True on inference tensor outside InferenceMode is not"
                " allowed."
            )
        if self._node is None and self._requires_grad is not requires_grad:
            self._requires_grad = requires_grad
            self._signature = None
            if requires_grad and self._use_count() > 1:  # type: ignore[attr-defined]
                warnings.warn(_HAS_VIEWS, stacklevel=2)  # which refer to it
            if requires_grad and self._signature_by_layout is not None:
                signature_of_leaf(self)  # again: critics are frozen for a part of each step
        return self

    @property
    def grad_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        """The dtype of its gradient, for a leaf. Setting another than its own is not mirrored."""
        if self._node is not None:
            raise RuntimeError("grad_dtype can only be accessed on leaf tensors.")
        return self.dtype

    @grad_dtype.setter
    def grad_dtype(self, dtype: torch.dtype | None) -> None:
        if self._node is not None:
            raise RuntimeError("grad_dtype can only be set on leaf tensors.")
        if dtype is not self.dtype:
            raise NotImplementedError(
                "nnmirror: a grad_dtype other than the tensor's own dtype is not mirrored; convert"
                " the gradient in a hook, or after the backward"
            )

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """True if it is not the result of a recorded call."""
        return self._node is None

    @property
    def grad_fn(self) -> "Node | None":  # type: ignore[override]
        """The recorded call that made it; None for a leaf."""
        if self._view_of is not None:
            with DisableTorchFunctionSubclass():
                edge_of(self)  # a view whose memory has changed gets a new one
        return None if self._node is None else self._node.shown()

    @property
    def output_nr(self) -> int:  # type: ignore[override]
        """Its index among the outputs of `grad_fn`."""
        return self._output_nr

    @property
    def retains_grad(self) -> bool:  # type: ignore[override]
        """True for a non-leaf after `retain_grad()`."""
        node = self._node
        return node is not None and bool(node.retained) and self._output_nr in node.retained  # type: ignore[operator]

    @property
    def grad(self) -> torch.Tensor | None:  # type: ignore[override]
        """The sum of the gradients of all backwards so far; None before the first."""
        if self._node is not None and not self.retains_grad:
            warnings.warn(
                "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed."
                " Its .grad attribute won't be populated during autograd.backward(). If you"
                " indeed want the .grad field to be populated for a non-leaf Tensor, use"
                " .retain_grad() on the non-leaf Tensor. If you access the non-leaf Tensor by"
                " mistake, make sure you access the leaf Tensor instead. See"
                " github.com/pytorch/pytorch/pull/30531 for more information.",
                stacklevel=2,
            )
        return self._gradient

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:
            with DisableTorchFunctionSubclass():  # torch's own attribute checks it
                C_grad.__set__(self, value)
                C_grad.__set__(self, None)
        self._gradient = value

    @grad.deleter
    def grad(self) -> None:
        self._gradient = None

    @property
    def _grad(self) -> torch.Tensor | None:
        return self.grad

    @_grad.setter
    def _grad(self, value: torch.Tensor | None) -> None:
        self.grad = value

    def retain_grad(self) -> None:
        """Fill `.grad` of this non-leaf in backward too."""
        if not self.requires_grad:
            raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
        node = self.grad_fn
        if node is None:
            return
        node.mark_hooked()
        if node.retained is None:
            node.retained = {}
        node.retained[self._output_nr] = weakref.ref(self)

    def backward(  # type: ignore[override]
        self,
        gradient: torch.Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Run the backward from this tensor, as `torch.Tensor.backward`."""
        if (
            _here.is_plain
            and gradient is inputs is None
            and not create_graph
            and retain_graph in _FLAGS
        ):
            backward_plainly((self,), (None,), bool(retain_graph))
            return
        backward(self, gradient, retain_graph, create_graph, inputs=inputs)

    def _is_swapped(self) -> None:
        """`torch.utils.swap_tensors` has exchanged it with another tensor."""
        _state.leaf_hooks_exist = True  # so that every walk checks
        self._swapped = next(_state.sequence)
        if self._signature_by_layout is not None:
            self._signature_by_layout.outlived = True

    def detach_(self) -> "Tensor":
        """Detach this tensor from its history, in place."""
        if self._view_of is not None:
            raise RuntimeError(
                "Can't detach views in-place; use detach() instead. If you are using"
                " DistributedDataParallel (DDP) for training, and gradient_as_bucket_view is"
                " set as True, gradients are views of DDP buckets, and hence detach_() cannot"
                " be called on these gradients. To fix this error, please refer to the"
                " Optimizer.zero_grad() function in torch/optim/optimizer.py as a solution."
            )
        self._node = None
        self._output_nr = 0
        self._requires_grad = False
        self._signature = None
        return self

    def set_(self, *args: Any, **kwargs: Any) -> "Tensor":  # type: ignore[override]
        """Refer to other memory, as `torch.Tensor.set_`; refused where it would be recorded."""
        if self.requires_grad and torch.is_grad_enabled():
            if self._node is None:
                raise RuntimeError("a" + CHANGED_LEAF)
            raise RuntimeError("derivative for set_ is not implemented")
        return reshaping(torch.Tensor.set_)(self, *args, **kwargs)  # not dispatched

    @_kept
    def _plain(self) -> torch.Tensor:
        """The same memory as a plain tensor, which is faster for torch."""
        with DisableTorchFunctionSubclass(), outside_inference_mode():
            return _C_detach(self)  # type: ignore[no-any-return]

    @_kept
    def _transposed(self) -> torch.Tensor | None:
        """The transpose of a plain matrix, for multiplying by it."""
        plain = self._plain
        usual = plain.dim() == 2 and plain.dtype in _USUAL and plain.is_contiguous()
        usual = usual and not plain.is_inference()
        if not (usual and plain.is_cpu):
            return None
        with outside_inference_mode():
            return plain.t()

    def _repeat_for(self, rows: int) -> tuple[int, torch.Tensor]:
        """The plain vector as so many rows of a matrix, a view; kept for the next call."""
        with outside_inference_mode():
            repeated = self._repeated = rows, self._plain.expand(rows, -1)
        return repeated  # another thread may have set another since

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The same memory, without history; assigning to it exchanges the memory."""
        with DisableTorchFunctionSubclass():
            return _C_data.__get__(self)  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        with DisableTorchFunctionSubclass():
            if self._node is not None:
                if value.is_complex():
                    raise no_complex("Tensor.data")
                if not _is_laid_out_as(value, self):
                    self._node.signature = None  # it says what the layout was
            plain = vars(self).get("_plain")
            if plain is None and self._signature is None:  # its layout is unknown
                _C_data.__set__(self, value)
                self._has_moved = True
            elif type(value) is not torch.Tensor or not _is_laid_out_as(
                value, self if plain is None else plain
            ):
                _set_data(self, value)
            else:
                move(self, value)

    def register_hook(self, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> RemovableHandle:
        """`hook(grad)` runs when the gradient for this tensor is complete; may replace it."""
        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        node = self.grad_fn
        if _is_multi_grad_hook(hook):
            hook = in_this_walk(hook)
        if node is None:
            _state.leaf_hooks_exist = True
            self._signature = None
            if self._leaf_hooks is None:
                self._leaf_hooks = OrderedDict()
            return add_hook(self._leaf_hooks, hook)
        node.mark_hooked()
        if node.tensor_hooks is None:
            node.tensor_hooks = {}
        return add_hook(node.tensor_hooks.setdefault(self._output_nr, OrderedDict()), hook)

    def register_post_accumulate_grad_hook(
        self, hook: Callable[[torch.Tensor], None]
    ) -> RemovableHandle:
        """`hook(leaf)` runs after the gradient has been added to this leaf's `.grad`."""
        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        if self._node is not None:
            raise RuntimeError(
                "post accumulate grad hooks cannot be registered on non-leaf tensors"
            )
        _state.leaf_hooks_exist = True
        self._signature = None
        if self._post_accumulate_hooks is None:
            self._post_accumulate_hooks = OrderedDict()
        return add_hook(self._post_accumulate_hooks, hook)

    def _register_reached_hook(self, hook: Callable[[], None]) -> RemovableHandle:
        """`hook()` runs in every walk that reaches this leaf, when it has arrived here.

        It runs after all other hooks, even without a gradient, like the hook that PyTorch's
        data-parallel reducer puts on the leaf's AccumulateGrad.
        """
        _state.leaf_hooks_exist = True
        self._signature = None
        if self._reached_hooks is None:
            self._reached_hooks = OrderedDict()
        return add_hook(self._reached_hooks, hook)

    # -- without __torch_function__ --------------------------------------------------------

    def __getitem__(self, index: Any) -> torch.Tensor:
        if type(self) is Tensor and _is_asked():
            parts = index if type(index) is tuple else (index,)
            kinds = {*map(type, parts)}
            if kinds <= _BASIC:
                given = (self, index)
                return (_met(Basic, given) or record(Basic, given))[0]
            tensors, pattern = parts, None
            if kinds != _OF_TENSORS:
                tensors = tuple([part for part in parts if type(part) is torch.Tensor])
                pattern = tuple([AT if type(part) is torch.Tensor else part for part in parts])
            # One without dimensions counts as an integer.
            if kinds - _BASIC == _OF_TENSORS and all(map(C_dim, tensors)):
                given = (self, pattern, *tensors)
                return (_met(Index, given) or record(Index, given))[0]
        return _GET(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if type(value) in UNASKED and type(self) is Tensor and _is_asked():
            if not assigned(self, index, value):
                RULES[_SET](self, index, value)
        else:
            _SET(self, index, value)

    def __rmatmul__(self, other: Any) -> Any:
        if type(other) is not torch.Tensor:
            return torch.Tensor.__rmatmul__(self, other)
        # Python tries the subclass's method first; otherwise the left operand would call torch.
        asked = type(self) in UNASKED and _is_asked()
        return (RULES[_MATMUL] if asked else _MATMUL)(other, self)

    # -- leaving the tape ------------------------------------------------------------------

    def numpy(self, *, force: bool = False) -> Any:
        """A NumPy array on the same memory. RuntimeError if it requires grad and grad mode is on,
        unless `force`."""
        needs_detach = self.requires_grad and not force and is_grad_enabled()
        if needs_detach and self.is_cpu:  # elsewhere PyTorch's TypeError
            raise RuntimeError(
                "Can't call numpy() on Tensor that requires grad."
                " Use tensor.detach().numpy() instead."
            )
        return self.detach().numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        if self.requires_grad:
            self.numpy()
        return self.detach().__array__(*args, **kwargs)

    def as_subclass(self, cls: type[S]) -> S:
        """The same memory as a `cls`; refused if the gradient would be lost."""
        if self.requires_grad:  # torch does not dispatch this one to __torch_function__
            return as_subclass(self, cls)
        return torch.Tensor.as_subclass(self, cls)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        return self.detach().__dlpack__(*args, **kwargs)

    def _to_number(self, kind: Callable[[torch.Tensor], R]) -> R:
        warn = not _state.warned_of_numbers or torch.is_warn_always_enabled()
        if kind is not int and warn and self.requires_grad and torch.is_grad_enabled():
            _state.warned_of_numbers = True  # once, as in PyTorch
            warnings.warn(
                "Converting a tensor with requires_grad=True to a scalar may lead to unexpected"
                " behavior.\nConsider using tensor.detach() first.",
                stacklevel=3,
            )
        return kind(self.detach())

    def __float__(self) -> float:
        return self._to_number(float)

    def __int__(self) -> int:
        return self._to_number(int)

    def __complex__(self) -> complex:
        return self._to_number(complex)

    # -- printing, copying, pickling -------------------------------------------------------

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        text = repr(self.detach())
        if self._node is not None:
            try:
                name = bare(self.grad_fn.name())  # type: ignore[union-attr]
            except RuntimeError:  # for a view that may no longer be used
                name = "Invalid"
            return _suffixed(text, f"grad_fn=<{name}>")
        return _suffixed(text, "requires_grad=True") if self._requires_grad else text

    def __format__(self, format_spec: str) -> str:
        if self.dim() == 0:
            return self.item().__format__(format_spec)
        return object.__format__(self, format_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if self._node is not None:
            raise RuntimeError(
                "Only Tensors created explicitly by the user (graph leaves) support the deepcopy"
                " protocol at the moment.  If you were attempting to deepcopy a module, this may"
                " be because of a torch.nn.utils.weight_norm usage, see"
                " https://github.com/pytorch/pytorch/pull/103001"
            )
        if id(self) in memo:
            return memo[id(self)]
        result = self._rebuilt(self.detach().clone(memory_format=torch.preserve_format))
        memo[id(self)] = result
        result.grad = copy.deepcopy(self.grad, memo)
        return result

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # A non-leaf is pickled as a leaf with its values, as in PyTorch: a plain torch tensor, so
        # that a checkpoint can be loaded without nnmirror.
        plain = self.detach()
        cls = type(self)
        # Attributes set by a user; the mirror's own have a default in the class.
        state = {name: value for name, value in vars(self).items() if not hasattr(cls, name)}
        if cls is Tensor:
            vars(plain).update(state)
            return plain.requires_grad_(self.requires_grad).__reduce_ex__(protocol)
        args = cls, plain, self.requires_grad
        return rebuild, (*args, state) if state else args

    def _rebuilt(self, data: torch.Tensor) -> Self:
        return rebuild(type(self), data, self._requires_grad)


UNASKED.add(Tensor)


def is_torchs(target: object) -> TypeGuard[torch.Tensor]:
    """Is it a plain torch tensor, not the mirror's?"""
    return isinstance(target, torch.Tensor) and not isinstance(target, Tensor)


Own = TypeVar("Own", bound=Tensor)


def rebuild(
    cls: type[Own],
    data: torch.Tensor,
    requires_grad: bool,
    state: dict[str, object] | None = None,
) -> Own:
    with DisableTorchFunctionSubclass():
        tensor = torch.Tensor._make_subclass(cls, data.detach(), False)
    tensor._requires_grad = requires_grad
    vars(tensor).update(state or {})
    return tensor


def _asked_plainly(ask: TorchFunction) -> TorchFunction:
    """Wraps `ask`, a query of a tensor that does not depend on its history."""

    @functools.wraps(ask)
    def answer(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            _refuse_torch_function_objects()
        with DisableTorchFunctionSubclass():
            return ask(*args, **kwargs)

    return answer


def _directly(ask: TorchFunction, plainly: TorchFunction) -> TorchFunction:
    """The same as a method, without `__torch_function__`."""

    @functools.wraps(ask)
    def answer(tensor: object, *args: object, **kwargs: object) -> Any:
        if not (_torch.is_torch_function_enabled() and type(tensor) in UNASKED):
            return ask(tensor, *args, **kwargs)  # torch dispatches, or not
        if not torch.is_grad_enabled():
            _refuse_torch_function_objects()
        with DisableTorchFunctionSubclass():
            return plainly(tensor, *args, **kwargs)

    return answer


def _attribute(name: str) -> property:
    """The same for an attribute."""
    ask: TorchFunction = getattr(torch.Tensor, name).__get__

    def answer(tensor: object) -> Any:
        if not (_torch.is_torch_function_enabled() and type(tensor) in UNASKED):
            return ask(tensor)
        if not torch.is_grad_enabled():
            _refuse_torch_function_objects()
        with DisableTorchFunctionSubclass():
            return ask(tensor)

    return property(answer, doc=f"As `torch.Tensor.{name}`.")


def _compared(compare: TorchFunction, otherwise: TorchFunction) -> TorchFunction:
    """The same for `compare`, a comparison with a tensor or a number, as a method.

    A number as a tensor takes half the time.
    """

    @functools.wraps(compare)
    def answer(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and not kwargs:
            tensor, other = args
            if type(tensor) in UNASKED and type(other) in UNASKED and _is_asked():
                with DisableTorchFunctionSubclass():
                    return compare(tensor, bound(other, tensor))
        return otherwise(*args, **kwargs)

    return answer


def ask_plainly(ask: TorchFunction, plainly: TorchFunction) -> None:
    """Replace `ask`, a method of torch.Tensor, by `plainly(ask)`."""
    ASKED[ask] = _asked_plainly(plainly)
    setattr(Tensor, ask.__name__, _directly(ask, plainly))


ASKED: dict[object, TorchFunction] = {torch.sym_float: float, torch.sym_int: int}
# The most frequent queries.
for _name in (
    *("__len__", "detach", "dim", "is_contiguous", "is_floating_point", "item", "ndimension"),
    *("numel", "size", "stride", "tolist"),
):
    _ask: TorchFunction = getattr(torch.Tensor, _name)
    setattr(Tensor, _name, _directly(_ask, _ask))
for _name in ("device", "dtype", "is_cuda", "ndim", "shape"):
    setattr(Tensor, _name, _attribute(_name))
# The same with fewer checks.
for _name in (
    *("_version", "device", "dtype", "is_cpu", "is_cuda", "itemsize", "layout", "ndim", "shape"),
):
    _get: TorchFunction = getattr(torch.Tensor, _name).__get__
    ASKED[_get] = _asked_plainly(_get)
for _name in (
    "data_ptr",
    "element_size",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "nelement",
    "numel",
    "storage_offset",
    "stride",
):
    ASKED[getattr(torch.Tensor, _name)] = _asked_plainly(getattr(torch.Tensor, _name))
for _name in ("empty_like", "ones_like", "rand_like", "randn_like", "zeros_like"):
    ASKED[getattr(torch, _name)] = _asked_plainly(getattr(torch, _name))
# Operations whose results are never floating point, and so have no gradient.
_COMPARISONS = {"eq", "ge", "gt", "le", "lt", "ne"}
_COMPARISONS |= {f"__{name}__" for name in _COMPARISONS}
for _name in (
    *("all", "any", "argmax", "argmin", "argsort", "count_nonzero", "equal", "isclose"),
    *("isfinite", "isinf", "isnan", "logical_and", "logical_not", "logical_or", "multinomial"),
    *("nonzero", "not_equal", *_COMPARISONS),
):
    for _home in (torch, torch.Tensor):
        if (_func := getattr(_home, _name, None)) is not None:
            ASKED.setdefault(_func, _asked_plainly(_func))
            COMPUTED.add(_func)
            answer_directly(_func, ASKED[_func])
            if _home is torch.Tensor and _name in _COMPARISONS:
                setattr(Tensor, _name, _compared(_func, getattr(Tensor, _name)))


def _between_processes(tensor: Tensor) -> Any:
    """For sending to another process, where the graph cannot follow: PyTorch raises as well."""
    if tensor._node is not None:
        raise RuntimeError(
            "Cowardly refusing to serialize non-leaf tensor which requires_grad, since autograd"
            " does not support crossing process boundaries.  If you just want to transfer the"
            " data, call detach() on the tensor before serializing (e.g., putting it on the queue)."
        )
    return tensor.__reduce_ex__(2)


ForkingPickler.register(Tensor, _between_processes)
