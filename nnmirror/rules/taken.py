"""Calls that torch's own autograd has recorded, recorded as calls of the mirror.

What a script computes from torch's leaves before it calls a net (the scaled coordinates of a
physics-informed net, an input and its perturbation) is torch's graph. If it consists of the calls
below, the mirror records them anew (see `nnmirror.beyond`): then no engine of torch's has to run in
each backward, and the whole is one graph.

The results are known and the inputs mostly gone, so a call is made on tensors of the same shapes;
what its gradient needs is what torch's node has saved.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .. import beyond as _beyond
from .._upcalls import implements
from ..beyond import Recording, Taken
from ..fast.signature import Unsigned, of_tensor
from ..node import Node
from ..tape import record
from ..tensor import Tensor
from . import arithmetic, elementwise, matmul, reduction, shape
from .activation import Tanh
from .registry import Rule

T = torch.Tensor


def _value(node: Any, name: str) -> Any:
    """An attribute of torch's node. Dimensions are shown without their sign."""
    value = getattr(node, name)
    if type(value) is tuple:
        return tuple([_signed(n) for n in value])
    return _signed(value) if type(value) is int else value


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _call(function: type[Rule], *more: str) -> Recording:
    """A call on the inputs, with these attributes of the node as further arguments."""

    def call(node: Any, x: Sequence[T], _: object) -> Any:
        return record(function, (*x, *[_value(node, name) for name in more]))[0]

    return call


def _to_shape(function: type[Rule]) -> Recording:
    """A call with the shape of the result as a further argument."""
    return lambda _, x, like: record(function, (*x, tuple(like.shape)))[0]


def _indexed(node: Any, x: T, index: object) -> Any:
    dim = _value(node, "_saved_dim") % x.dim()
    return shape.getitem(x, (*[slice(None)] * dim, index))


def _sliced(node: Any, x: Sequence[T], _: object) -> Any:
    return _indexed(node, x[0], slice(node._saved_start, node._saved_end, node._saved_step))


def _selected(node: Any, x: Sequence[T], _: object) -> Any:
    return _indexed(node, x[0], _value(node, "_saved_index"))


def _product(node: Any, x: Sequence[T], _: object) -> Any:
    sizes, strides = node._saved_self_sym_sizes, node._saved_self_sym_strides
    if strides and tuple(strides) != (sizes[1], 1):
        return None  # PyTorch's gradient has another layout then
    return record(matmul.Mm, (x[0], x[1]))[0]


def _joined(made_by: Any, x: Sequence[T], like: Any) -> Any:
    dim, parts = _value(made_by, "_saved_dim"), list(x)
    unknown = [i for i, (behind, _) in enumerate(made_by.next_functions) if behind is None]
    if len(unknown) > 1:
        return None
    for i in unknown:  # torch does not keep what needs no gradient, but its shape follows
        sizes = [*like.shape]
        sizes[dim] -= sum(part.shape[dim] for j, part in enumerate(parts) if j != i)
        parts[i] = parts[i].new_empty(()).expand(sizes)
    if any(isinstance(part, Tensor) for part in parts):
        return record(shape.Cat, (dim, *parts))[0]
    try:  # of leaves: as an earlier one, if there was one, which is faster
        key = dim, *[(part.requires_grad, of_tensor(part)) for part in parts]
    except Unsigned:
        return record(shape.Cat, (dim, *parts))[0]
    known = _cats.get(key)
    if known is None:
        result, node = record(shape.Cat, (dim, *parts))
        if node is not None and node.signature is not None and not node._saved:
            if len(_cats) >= _MOST_CATS:
                _cats.clear()
            _cats[key] = node.copied()
            _cats[key].edges = ()
        return result
    again = known.copied()
    again.edges = None, *[(part, 0) if part.requires_grad else None for part in parts]
    return again


_cats: dict[tuple[object, ...], Node] = {}  # without edges, by the layouts
_MOST_CATS = 64

_SELF, _BOTH = ("_saved_self",), ("_saved_self", "_saved_other")
_RESULT = "_saved_result"
_TAKEN: dict[str, Taken] = {
    "AddBackward0": Taken(_call(arithmetic.Add, "_saved_alpha")),
    "SubBackward0": Taken(_call(arithmetic.Sub, "_saved_alpha")),
    "RsubBackward1": Taken(
        # From which number it is subtracted does not matter.
        lambda node, x, _: record(arithmetic.Rsub, (x[0], 0.0, node._saved_alpha))[0]
    ),
    "MulBackward0": Taken(_call(arithmetic.Mul), _BOTH),
    "DivBackward0": Taken(_call(arithmetic.Div), _BOTH),
    "NegBackward0": Taken(_call(arithmetic.Neg)),
    "ReciprocalBackward0": Taken(_call(arithmetic.Reciprocal), result=_RESULT),
    "PowBackward0": Taken(_call(arithmetic.Pow, "_saved_exponent"), _SELF),
    "AbsBackward0": Taken(_call(elementwise.Abs), _SELF),
    "SinBackward0": Taken(_call(elementwise.Sin), _SELF),
    "CosBackward0": Taken(_call(elementwise.Cos), _SELF),
    "LogBackward0": Taken(_call(elementwise.Log), _SELF),
    "ExpBackward0": Taken(_call(elementwise.Exp), result=_RESULT),
    "SqrtBackward0": Taken(_call(elementwise.Sqrt), result=_RESULT),
    "SigmoidBackward0": Taken(_call(elementwise.Sigmoid), result=_RESULT),
    "TanhBackward0": Taken(_call(Tanh), result=_RESULT),
    "MmBackward0": Taken(_product, ("_saved_self", "_saved_mat2")),
    "CatBackward0": Taken(_joined),
    "StackBackward0": Taken(
        lambda node, x, _: record(shape.Stack, (_value(node, "_saved_dim"), *x))[0]
    ),
    "SliceBackward0": Taken(_sliced),
    "SelectBackward0": Taken(_selected),
    "UnsqueezeBackward0": Taken(_call(shape.Unsqueeze, "_saved_dim")),
    "SqueezeBackward1": Taken(_call(shape.Squeeze, "_saved_dim")),
    "ViewBackward0": Taken(_to_shape(shape.View)),
    "ReshapeAliasBackward0": Taken(_to_shape(shape.View)),
    "ExpandBackward0": Taken(_to_shape(shape.Expand)),
    "ToCopyBackward0": Taken(lambda _, x, like: record(shape.ToCopy, (x[0], like.dtype))[0]),
    "TBackward0": Taken(_call(shape.TRule)),
    "TransposeBackward0": Taken(_call(shape.Transpose, "_saved_dim0", "_saved_dim1")),
    "PermuteBackward0": Taken(_call(shape.Permute, "_saved_dims")),
    "CloneBackward0": Taken(_call(shape.Clone)),
    "SumBackward0": Taken(_call(reduction.Sum)),
    "SumBackward1": Taken(_call(reduction.Sum, "_saved_dim", "_saved_keepdim")),
    "MeanBackward0": Taken(_call(reduction.Mean)),
    "MeanBackward1": Taken(_call(reduction.Mean, "_saved_dim", "_saved_keepdim")),
    "UnbindBackward0": Taken(_call(shape.Unbind, "_saved_dim")),
    "SplitBackward0": Taken(_call(shape.Split, "_saved_split_size", "_saved_dim")),
}


@implements(_beyond)
def taking(made_by: Any) -> Taken | None:
    return _TAKEN.get(type(made_by).__name__)
