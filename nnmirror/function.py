"""Function, an operation with a hand-written backward, and the `ctx` that a user's one gets."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch

from . import formula
from . import node as _node
from ._types import Args, Hook, Kwargs, TorchFunction
from ._upcalls import implements, upcall
from .node import AccumulateGrad, Node

if TYPE_CHECKING:
    import nnmirror.fast.recorder


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
    is_recordable: bool = True
    infer: TorchFunction | None = None  # the result of forward only, by torch's function
    result: TorchFunction | None = None  # `infer`, or what the formulas compute
    can_wait: bool = False  # its node can be made after the call, from arguments and result
    public: Any = None  # torch's function that it replaces, which tensor subclasses see
    has_context: bool = False  # it defines setup_context
    is_rule: bool = False  # for an operation of PyTorch's own
    is_view: bool = False  # the output shares the first input's memory
    is_inplace: bool = False  # the first input is changed, and is the output
    overwrites: bool = False  # in place: the result does not depend on the first input's values
    dynamic_output_shape: bool = False  # with a mask, the shape of its result depends on that
    uncounted: tuple[int, ...] = ()  # arguments that PyTorch's node has no place for (indices)
    counted: tuple[int, ...] = ()  # or those that it has one for, numbers among them
    counted_too: str = ""  # the node's other name for which `counted` holds too
    operands: tuple[int, ...] = ()  # where `forward` takes a number also as a tensor
    # Computes `forward` of the first two arguments, if the others have their defaults.
    operator: TorchFunction | None = None
    named_by_types: bool = False  # label_of only asks for the types of arguments, or of a tuple's
    # Called with a node that is exposed to the user, to give it the form of PyTorch's. Also called
    # in a recorded walk, since it determines where gradients of gradients are summed.
    on_exposed: "Callable[[Node], None] | None" = None
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
    # For those for which a tensor without dimensions stands for its number: of which types.
    numbers_at: Mapping[int, set[object]] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.has_context = cls.setup_context is not Function.setup_context
        cls.exact = None  # a base class's exact form does not apply to this class
        formula.read(cls)

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
    def choose_for_any_size(cls, *args: Any) -> TorchFunction | None:
        """The function for later calls whose arguments have other sizes, in any dimension or as an
        integer; None for `forward`, and then each size has a plan of its own."""
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
        return applied(cls, args, kwargs)

    @staticmethod
    def saves_of(node: Node) -> Sequence[int] | None:
        """For a rule that is not written as formulas: the places of the arguments that it saves;
        None if unknown."""
        return None

    @staticmethod
    def leading(place: int, saved: torch.Tensor) -> torch.Tensor:
        """The saved argument at `place` as the tensor that its edge leads from."""
        return saved

    @classmethod
    def node_name(cls) -> str:
        """A tensor's `grad_fn`."""
        return cls.__name__ + "Backward"


@upcall("nnmirror.custom_function")
def applied(function: type[Function], args: Args, kwargs: Kwargs) -> Any:
    """The output of a user's Function, recorded if grad mode is on and an argument requires
    grad."""
    raise NotImplementedError


@implements(_node)
def users_backward(node: Node, grads: Sequence[torch.Tensor | None]) -> Any:
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
