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

T = torch.Tensor


def _signed(number: int) -> int:
    """A dimension, which torch's nodes show without its sign."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _dims(dims: Sequence[int]) -> list[int]:
    return [*map(_signed, dims)]


def _along(dim: int, index: object) -> tuple[object, ...]:
    return (*[slice(None)] * dim, index)


def _sliced(n: Any, x: Sequence[T], _: object) -> Any:
    part = slice(n._saved_start, n._saved_end, n._saved_step)
    return shape.getitem(x[0], _along(_signed(n._saved_dim) % x[0].dim(), part))


def _selected(n: Any, x: Sequence[T], _: object) -> Any:
    dim = _signed(n._saved_dim) % x[0].dim()
    return shape.getitem(x[0], _along(dim, _signed(n._saved_index)))


def _of_one(function: Any, *more: str) -> Recording:
    """A call on one input, with these attributes of the node as further arguments."""

    def call(n: Any, x: Sequence[T], _: object) -> Any:
        return record(function, (x[0], *[getattr(n, name) for name in more]))[0]

    return call


def _of_two(function: Any, *more: str) -> Recording:
    def call(n: Any, x: Sequence[T], _: object) -> Any:
        return record(function, (x[0], x[1], *[getattr(n, name) for name in more]))[0]

    return call


def _product(n: Any, x: Sequence[T], _: object) -> Any:
    sizes, strides = n._saved_self_sym_sizes, n._saved_self_sym_strides
    if strides and tuple(strides) != (sizes[1], 1):
        return None  # PyTorch's gradient has another layout then
    return record(matmul.Mm, (x[0], x[1]))[0]


def _joined(n: Any, x: Sequence[T], like: Any) -> Any:
    dim, parts = _signed(n._saved_dim), list(x)
    unknown = [i for i, (behind, _) in enumerate(n.next_functions) if behind is None]
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
_TAKEN: dict[str, Taken] = {
    "AddBackward0": Taken(_of_two(arithmetic.Add, "_saved_alpha"), ("", "")),
    "SubBackward0": Taken(_of_two(arithmetic.Sub, "_saved_alpha"), ("", "")),
    "RsubBackward1": Taken(lambda n, x, _: record(arithmetic.Rsub, (x[0], 0.0, n._saved_alpha))[0]),
    "MulBackward0": Taken(_of_two(arithmetic.Mul), _BOTH),
    "DivBackward0": Taken(_of_two(arithmetic.Div), _BOTH),
    "NegBackward0": Taken(_of_one(arithmetic.Neg)),
    "ReciprocalBackward0": Taken(_of_one(arithmetic.Reciprocal), result="_saved_result"),
    "PowBackward0": Taken(_of_one(arithmetic.Pow, "_saved_exponent"), _SELF),
    "AbsBackward0": Taken(_of_one(elementwise.Abs), _SELF),
    "SinBackward0": Taken(_of_one(elementwise.Sin), _SELF),
    "CosBackward0": Taken(_of_one(elementwise.Cos), _SELF),
    "LogBackward0": Taken(_of_one(elementwise.Log), _SELF),
    "ExpBackward0": Taken(_of_one(elementwise.Exp), result="_saved_result"),
    "SqrtBackward0": Taken(_of_one(elementwise.Sqrt), result="_saved_result"),
    "SigmoidBackward0": Taken(_of_one(elementwise.Sigmoid), result="_saved_result"),
    "TanhBackward0": Taken(_of_one(Tanh), result="_saved_result"),
    "MmBackward0": Taken(_product, ("_saved_self", "_saved_mat2")),
    "CatBackward0": Taken(_joined),
    "StackBackward0": Taken(lambda n, x, _: record(shape.Stack, (_signed(n._saved_dim), *x))[0]),
    "SliceBackward0": Taken(_sliced),
    "SelectBackward0": Taken(_selected),
    "UnsqueezeBackward0": Taken(
        lambda n, x, _: record(shape.Unsqueeze, (x[0], _signed(n._saved_dim)))[0]
    ),
    "SqueezeBackward1": Taken(
        lambda n, x, _: record(shape.Squeeze, (x[0], _signed(n._saved_dim)))[0]
    ),
    "ViewBackward0": Taken(lambda _, x, like: record(shape.View, (x[0], tuple(like.shape)))[0]),
    "ReshapeAliasBackward0": Taken(
        lambda _, x, like: record(shape.View, (x[0], tuple(like.shape)))[0]
    ),
    "ToCopyBackward0": Taken(lambda _, x, like: record(shape.ToCopy, (x[0], like.dtype))[0]),
    "TBackward0": Taken(_of_one(shape.TRule)),
    "TransposeBackward0": Taken(
        lambda n, x, _: record(
            shape.Transpose, (x[0], _signed(n._saved_dim0), _signed(n._saved_dim1))
        )[0]
    ),
    "PermuteBackward0": Taken(
        lambda n, x, _: record(shape.Permute, (x[0], tuple(_dims(n._saved_dims))))[0]
    ),
    "ExpandBackward0": Taken(lambda _, x, like: record(shape.Expand, (x[0], tuple(like.shape)))[0]),
    "CloneBackward0": Taken(_of_one(shape.Clone)),
    "SumBackward0": Taken(_of_one(reduction.Sum)),
    "SumBackward1": Taken(
        lambda n, x, _: record(reduction.Sum, (x[0], _dims(n._saved_dim), n._saved_keepdim))[0]
    ),
    "MeanBackward0": Taken(_of_one(reduction.Mean)),
    "MeanBackward1": Taken(
        lambda n, x, _: record(reduction.Mean, (x[0], _dims(n._saved_dim), n._saved_keepdim))[0]
    ),
    "UnbindBackward0": Taken(
        lambda n, x, _: record(shape.Unbind, (x[0], _signed(n._saved_dim)))[0]
    ),
    "SplitBackward0": Taken(
        lambda n, x, _: record(shape.Split, (x[0], n._saved_split_size, _signed(n._saved_dim)))[0]
    ),
}


@implements(_beyond)
def taking(made_by: Any) -> Taken | None:
    return _TAKEN.get(type(made_by).__name__)
