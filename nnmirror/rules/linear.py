"""The product with a weight, and a bias: Linear."""

import functools
from typing import NamedTuple, cast

import torch

from .._torch import DisableTorchFunctionSubclass, is_torch_function_enabled
from .._types import TorchFunction
from ..fast.signature import CallInfo
from ..fast.signing import sign_call, signature_at
from ..formula import Plan
from ..node import EXPOSED, JUST_BEFORE, RECORDED, Node
from ..parameter import Parameter
from ..running import put_in_front
from ..tape import record
from ..tensor import C_dim
from .arithmetic import Add
from .matmul import from_left, from_right, matmul, rows_of_one_matrix
from .registry import Rule, handle, unplaced
from .shape import TRule

__all__ = ["linear"]

T = torch.Tensor


class Linear(Rule):
    """Y = X W^T + b:  db = sum of the rows of G,  dX = G W,  dW = G^T X

    X is (*, in), W is (out, in), b is (out); leading dimensions are treated as rows. Saved: X if W
    needs a gradient, and W. As in PyTorch, which saves views, a later assignment to `W.data` does
    not change what was saved; nor does one to `X.data`, if X does not have two dimensions.
    """

    input_place = 1
    tuple_places = (1,)
    public = staticmethod(torch._C._nn.linear)

    @staticmethod
    def as_called(bias: T | None, input: T, weight: T) -> tuple[T | None, ...]:
        return input, weight, bias

    @staticmethod
    def known_as(label: str) -> dict[str, str]:
        """In PyTorch it is addmm, or mm, to whose result a bias is added."""
        if label in ("AddmmBackward0", "ViewBackward0"):
            return {"input": "mat1", "weight": "mat2", "bias": "self"}
        return {"input": "self", "weight": "mat2", "bias": ""}

    saved_via = {"weight": "AsStrided"}
    # W is kept whether or not X needs a gradient (it is there anyway), so that
    # Module.backward can give the gradient for an input that does not require one.
    always_saved = ("weight",)

    @staticmethod
    def saved_memory(bias: T | None, input: T, weight: T) -> tuple[str, ...]:
        return ("weight",) if C_dim(input) == 2 else ("input", "weight")

    @staticmethod
    def infer(bias: T | None, input: T, weight: T) -> T:
        if (
            type(weight) is Parameter
            and type(bias) is Parameter
            and type(input) is T
            and input.dim() == 2
            and not weight._has_moved
            and weight._transposed is not None
        ):
            return torch.addmm(bias._plain, input, weight._transposed)  # what torch does, sooner
        if type(weight) is Parameter:
            weight._has_moved = False
        with DisableTorchFunctionSubclass():
            return torch._C._nn.linear(input, weight, bias)

    @staticmethod
    def forward(bias: T | None, input: T, weight: T) -> T:
        return _linear(bias, input, weight)

    @classmethod
    def choose(cls, bias: T | None, input: T, weight: T) -> TorchFunction | None:
        if not _is_usual(bias, input, weight):
            return None
        return _addmm_of(input.shape[0]) if input.dim() == 2 else _of_rows

    @classmethod
    def choose_for_any_size(cls, bias: T | None, input: T, weight: T) -> TorchFunction | None:
        return _of_rows if input.dim() == 2 and _is_usual(bias, input, weight) else None

    @staticmethod
    def how(bias: T | None, input: T, weight: T) -> "_Rows":
        return _Rows.of(bias, input, weight)

    @staticmethod
    def copied(bias: T | None, input: T, weight: T) -> tuple[str, ...]:
        """X, where its leading dimensions cannot be viewed as rows."""
        if input.dim() < 3 or not (_trains(weight) or rows_of_one_matrix(input)):
            return ()
        x = input.detach()
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        apart = rows.untyped_storage()._cdata != x.untyped_storage()._cdata
        return ("input",) if apart else ()

    @classmethod
    def label_of(cls, bias: T | None, input: T, weight: T) -> str:
        return _Rows.of(bias, input, weight).label

    @staticmethod
    def d_bias(g: T, how: "_Rows") -> T:
        rows = how.rows(g)
        if how.bias_shape != rows.shape[1:]:
            return g  # a bias that was broadcast: the walk sums
        if how.label == "AddBackward0":
            return g.sum_to_size(how.bias_shape)
        return rows.sum(0)

    @staticmethod
    def d_input(g: T, weight: T, how: "_Rows") -> T:
        if how.batched:
            return _batched_input_grad(g, weight)
        rows = how.rows(g)
        # Stored by columns if X is.
        dx = weight.t().mm(rows.t()).t() if how.by_columns else rows.mm(weight)
        return dx if how.input_shape is None else dx.view(how.input_shape)

    @staticmethod
    def d_weight(g: T, input: T, how: "_Rows") -> T:
        rows, x = how.rows(g), how.rows(input)
        # Stored as W is.
        return rows.t().mm(x) if how.weight_by_rows else x.t().mm(rows).t()


def _is_usual(bias: T | None, input: T, weight: T) -> bool:
    """Can the product be computed with the aliases that weight and bias have?"""
    return (
        type(weight) is Parameter
        and type(bias) is Parameter
        and weight._transposed is not None
        and input.dim() > 0
        and input.is_contiguous()
        and bias.shape == weight.shape[:1]
        and input.dtype is weight.dtype is bias.dtype
    )


@functools.lru_cache(maxsize=256)
def _addmm_of(rows: int) -> TorchFunction:
    """The product for so many rows; repeated beforehand, the bias is added sooner."""
    addmm: TorchFunction = torch.addmm  # of a weight that has a transpose (see `choose`)

    def product(bias: Parameter, input: T, weight: Parameter) -> T:
        if weight._has_moved:  # a transpose does not pay for one product
            weight._has_moved = False
            return torch._C._nn.linear(input, weight, bias)
        repeated = bias._repeated
        if repeated is None or repeated[0] != rows:
            repeated = bias._repeat_for(rows)
        return addmm(repeated[1], input, weight._transposed)

    return product


def _of_rows(bias: Parameter, input: T, weight: Parameter) -> T:
    return _torchs_linear(input, weight._plain, bias._plain)  # plain aliases are faster for torch


_torchs_linear = torch._C._nn.linear


def _linear(bias: T | None, input: T, weight: T) -> T:
    tensors = isinstance(input, T) and isinstance(weight, T)
    if not tensors or not (bias is None or isinstance(bias, T)) or C_dim(input) == 0:
        raise unplaced(torch._C._nn.linear, (input, weight, bias), {})
    if C_dim(weight) != 2:
        if C_dim(weight) == 1 and (bias is None or input.dim() != 2):
            raise _VectorWeight
        raise unplaced(torch._C._nn.linear, (input, weight, bias), {})
    if bias is not None and C_dim(input) == 2:
        return torch._C._nn.linear(input, weight, bias)  # addmm(b, X, W^T)
    if bias is not None and bias.dim() == 1 and input.is_contiguous():
        return torch._C._nn.linear(input, weight, bias)  # addmm of the rows, viewed
    shape = input.shape
    if len(shape) > 2 and _trains(weight):
        # As torch.matmul with a weight that requires grad; for torch, W does not.
        rows = input.reshape(shape[:-1].numel(), shape[-1])
        y = rows.mm(weight.t()).view(*shape[:-1], weight.shape[0])
    else:
        y = torch.matmul(input, weight.t())
    return y if bias is None else y.add_(bias)


def _trains(weight: T) -> bool:
    return bool(weight.requires_grad)


class _Rows(NamedTuple):
    """The layout of the arguments that Linear's gradients depend on."""

    label: str
    bias_shape: torch.Size | None
    input_shape: torch.Size | None  # unless it has two dimensions
    batched: bool  # a product for each batch item, as in torch.matmul with some strides
    by_columns: bool
    weight_by_rows: bool

    @classmethod
    def of(cls, bias: T | None, input: T, weight: T) -> "_Rows":
        shape = input.shape
        flat = len(shape) == 2 and bias is not None
        batched, rows = False, input
        if flat:
            label = "AddmmBackward0"
        elif bias is not None and bias.dim() == 1 and input.is_contiguous():
            label = "ViewBackward0"
            rows = input.view(shape[:-1].numel(), shape[-1])
        else:
            names = {1: "SqueezeBackward4", 2: "MmBackward0"}
            label = names.get(len(shape), "UnsafeViewBackward0")
            label = label if bias is None else "AddBackward0"
            if len(shape) > 2 and _trains(weight):
                rows = input.reshape(shape[:-1].numel(), shape[-1])
            else:
                batched = len(shape) > 2 and not rows_of_one_matrix(input)
        by_columns = rows.dim() == 2 and rows.stride() == (1, rows.shape[0])
        by_rows = weight.stride() == (weight.shape[1], 1)
        bias_shape, viewed = None if bias is None else bias.shape, len(shape) != 2
        return cls(label, bias_shape, shape if viewed else None, batched, by_columns, by_rows)

    def rows(self, x: T) -> T:
        """x, with its leading dimensions as rows."""
        if self.input_shape is None:
            return x
        return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _with_transpose(node: Node) -> None:
    """Make W^T an input of the matrix product, and record the transpose of W.

    PyTorch records the two separately, as `grad_fn` shows. In gradients of gradients, W^T may get
    several gradients, whose sum is passed on to W.
    """
    if node.label not in ("AddmmBackward0", "MmBackward0"):
        return
    bias, input, weight = node.edges
    node.function = _LinearOfTransposed
    _with_plan_for_other(node)
    if node.taps:
        node.mark_hooked()
    elif node.node_state is RECORDED:
        node.node_state = EXPOSED
    if weight is None:
        return
    sign = signature_at(weight)
    made = Node(TRule, None if sign is None else sign.next.get(TRule))
    made.edges = (weight,)
    if made.signature is None:
        target, index = weight
        shape, dtype, device = (
            target.outputs[index]
            if isinstance(target, Node)
            else (target.shape, target.dtype, target.device)
        )
        made.places, made.needs_input_grad = (0,), (True,)
        made.plan = TRule.formulas.plan((), made.needs_input_grad)  # type: ignore[union-attr]
        made.outputs = ((torch.Size(shape[::-1]), dtype, device),)
        if sign is not None:
            sign_call(made, sign)
    made.sequence = node.sequence - JUST_BEFORE  # type: ignore[assignment]
    node.edges = (bias, input, (made, 0))
    put_in_front(made, weight[0])


def _with_plan_for_other(node: Node) -> None:
    """Its gradients are those of `_LinearOfTransposed`, which saves the same."""
    info = node.call_info
    if info.exposed is None:
        plan = cast(Plan, info.plan).for_other()
        info.exposed = CallInfo(info.places, info.needs, info.outputs, plan, info.label)
        info.exposed.indices = info.indices
    node.call_info = info.exposed


class _LinearOfTransposed(Linear):
    # With a gradient for W^T. Its docstring is Linear's, as it replaces Linear.
    on_exposed = None

    @staticmethod
    def leading(place: int, saved: T) -> T:
        return saved.t() if place == 2 else saved

    @staticmethod
    def d_input(g: T, weight: T, how: "_Rows") -> T:
        if not is_torch_function_enabled():
            return Linear.d_input(g, weight, how)
        return from_left(g, weight, how.by_columns)  # W^T, in a recorded walk

    @staticmethod
    def d_weight(g: T, input: T, how: "_Rows") -> T:
        return from_right(g, input, how.weight_by_rows)

    @classmethod
    def node_name(cls) -> str:
        return "LinearBackward0"


Linear.on_exposed = staticmethod(_with_transpose)


def _batched_input_grad(g: T, w: T) -> T:
    """dX = G W for each matrix of the batch."""
    *batch, n, out = g.shape
    count = torch.Size(batch).numel()
    dx = g.reshape(count, n, out).bmm(w.expand(count, *w.shape))
    return dx.view(*batch, n, w.shape[1])


def linear(input: T, weight: T, bias: T | None = None) -> T:
    """`input @ weight.T + bias`; see `nnmirror.rules.linear.Linear` for shapes and gradients."""
    try:
        return record(Linear, (bias, input, weight))[0]
    except _VectorWeight:
        product = matmul(input, weight)
        return product if bias is None else record(Add, (product, bias))[0]


class _VectorWeight(Exception):
    """The weight is a vector: y = x . w + b is another operation."""


handle(torch._C._nn.linear, linear)
