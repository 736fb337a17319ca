"""Rows of a table, by number."""

from typing import Any

import torch

from ..tape import record
from .kernel import add_rows
from .registry import Rule, composite, unplaced

T = torch.Tensor


class Embedding(Rule):
    """y = the rows of W that `indices` name:  dW = for each row, the sum of its g.

    The row `padding_idx` gets none. By frequency, each g is divided by how often its row is
    named.  Saved: the indices.
    """

    uncounted = (1,)
    input_place = 1
    tuple_places = (1,)
    infer: Any = staticmethod(torch.embedding)

    @staticmethod
    def forward(
        ctx: Any, weight: T, indices: T, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
    ) -> T:
        how = padding_idx, scale_grad_by_freq
        if not isinstance(weight, T) or not isinstance(indices, T):
            raise unplaced(torch.embedding, (weight, indices, *how, sparse), {})
        y = torch.embedding(weight, indices, *how)
        if sparse and ctx.needs_input_grad[0]:
            raise NotImplementedError(
                "nnmirror: embedding with sparse=True gives a sparse gradient, which is not"
                " mirrored; use sparse=False, which trains the same rows"
            )
        ctx.how, ctx.shape = how, weight.shape
        ctx.save_for_backward(indices)
        return y

    @staticmethod
    def backward(ctx: Any, g: T) -> tuple[Any, ...]:
        (indices,), (padding_idx, by_frequency) = ctx.saved_tensors, ctx.how
        dw = g.new_zeros(ctx.shape)
        indices = indices.reshape(-1)
        rows = g.reshape(len(indices), ctx.shape[1])
        if not by_frequency:
            add_rows(dw, indices, rows)
        else:  # PyTorch adds a multiple of each g, without rounding the product by itself
            counts = torch.bincount(indices, minlength=ctx.shape[0])[indices]
            for count in counts.unique().tolist():
                these = (counts == count).nonzero().view(-1)
                named, its = indices.index_select(0, these), rows.index_select(0, these)
                if count == 1:
                    add_rows(dw, named, its)
                else:
                    dw.index_add_(0, named, its, alpha=1.0 / count)
        if padding_idx >= 0:
            dw[padding_idx] = 0
        return dw, *[None] * 4


@composite(torch.embedding)
def embedding(
    weight: T,
    indices: T,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> T:
    return record(Embedding, (weight, indices, padding_idx, scale_grad_by_freq, sparse))[0]
