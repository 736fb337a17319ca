"""Function, an operation with a hand-written backward, and the `ctx` that a user's one gets."""

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from . import node as _node
from ._types import Args, Hook, Kwargs
from ._upcalls import implements, upcall
from .node import AccumulateGrad, Node
from .operation import Operation


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

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "You must implement the forward function for custom autograd.Function."
        )

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
        return applied(cls, args, kwargs)


@upcall("nnmirror.custom_function")
def applied(function: type[Function], args: Args, kwargs: Kwargs) -> Any:
    """The output of a user's Function, recorded if grad mode is on and an argument requires
    grad."""
    raise NotImplementedError


class CustomOperation(Operation):
    """The operation of a user's Function, in whose class any name is the user's."""

    function: type[Function]


def operation_of(function: type[Function]) -> type[CustomOperation]:
    """The operation that the nodes of its calls have."""
    found = vars(function).get("_nnmirror_operation")
    if found is None:
        about = {"function": function, "__doc__": function.__doc__}
        about |= {name: getattr(function, name) for name in ("__module__", "__qualname__")}
        found = type(function.__name__, (CustomOperation,), about)
        function._nnmirror_operation = found  # type: ignore[attr-defined]
    return found


@implements(_node)
def users_backward(node: Node, grads: Sequence[torch.Tensor | None]) -> Any:
    function = node.function.function  # type: ignore[attr-defined]
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


class InplaceFunction(Function):
    """`torch.autograd.function.InplaceFunction`, an older name for Function: nets with binary
    weights derive from it."""


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
        once = node.function.function.clear_saved_tensors_on_access  # type: ignore[attr-defined]
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
