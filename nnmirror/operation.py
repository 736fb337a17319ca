"""Operation, what a node is of: a forward and a backward, and what is known of them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from . import formula
from ._types import Args, TorchFunction
from .node import Node

if TYPE_CHECKING:
    import nnmirror.fast.recorder


# A recorder, and which arguments require grad in the calls that it takes.
Learned: TypeAlias = tuple["nnmirror.fast.recorder.Recorder", tuple[tuple[bool, ...], ...]]


class Operation:
    """An operation with a hand-written backward; a `Rule` is one of PyTorch's.

    `forward` and `backward` get the node first. A user writes a `Function` instead.
    """

    # For a rule written as formulas, by the types of the arguments: the recorder for calls without
    # a signature, and which arguments require grad in these (see fast/recorder.py).
    recorders: dict[tuple[type, ...], Learned]
    recorders_in_place: dict[tuple[type, ...], Learned]
    formulas: "formula.Formulas | None" = None  # of a rule written as formulas (see formula.py)
    exact: "type[Operation] | None" = None  # recorded instead in exact mode (see exact)
    # For such a form: its gradients can be recorded, instead of those of the plain rule.
    is_recordable: bool = True
    infer: TorchFunction | None = None  # the result of forward only, by torch's function
    result: TorchFunction | None = None  # `infer`, or what the formulas compute
    can_wait: bool = False  # its node can be made after the call, from arguments and result
    public: Any = None  # torch's function that it replaces, which tensor subclasses see
    is_rule: bool = False  # for an operation of PyTorch's own
    is_view: bool = False  # the output shares the first input's memory
    is_inplace: bool = False  # the first input is changed, and is the output
    overwrites: bool = False  # in place: the result does not depend on the first input's values
    dynamic_output_shape: bool = False  # with a mask, the shape of its result depends on that
    dynamic_grad_shape: bool = False  # or that of a gradient, before it is summed to the input's
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
        cls.exact = None  # a base class's exact form does not apply to this class
        formula.read(cls)

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        """The results, from the node and the arguments."""
        raise NotImplementedError

    @staticmethod
    def backward(node: Any, *grads: Any) -> Any:
        """The gradients of the arguments, from those of the results: dx_j = sum g_i dy_i/dx_j."""
        raise NotImplementedError

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
