"""Rows of a table, by index."""

from collections.abc import Sequence

import torch

from ..tape import record
from .kernel import add_rows
from .registry import Rule, composite, unplaced

T = torch.Tensor


class Embedding(Rule):
    """y = the rows of W at `indices`:  dW = for each row, the sum of its g.

    The row `padding_idx` gets none. With `scale_grad_by_freq` each g is divided by the number of
    times that its row occurs.  Saved: the indices.
    """

    uncounted = (1,)
    input_place = 1
    tuple_places = (1,)
    infer = staticmethod(torch.embedding)

    @staticmethod
    def forward(
        weight: T, indices: T, padding_idx: int, scale_grad_by_freq: bool, sparse: bool
    ) -> T:
        how = padding_idx, scale_grad_by_freq
        if not isinstance(weight, T) or not isinstance(indices, T):
            raise unplaced(torch.embedding, (weight, indices, *how, sparse), {})
        return torch.embedding(weight, indices, *how)

    @staticmethod
    def refuse(
        needs: Sequence[bool], weight: T, indices: T, padding_idx: int, by_freq: bool, sparse: bool
    ) -> None:
        if sparse and needs[0]:
            raise NotImplementedError(
                "nnmirror: embedding with sparse=True gives a sparse gradient, which is not"
                " mirrored; use sparse=False, which trains the same rows"
            )

    @staticmethod
    def d_weight(
        g: T, weight_shape: torch.Size, indices: T, padding_idx: int, scale_grad_by_freq: bool
    ) -> T:
        dw = g.new_zeros(weight_shape)
        indices = indices.reshape(-1)
        rows = g.reshape(len(indices), weight_shape[1])
        if not scale_grad_by_freq:
            add_rows(dw, indices, rows)
        else:  # PyTorch adds a multiple of each g by a fused multiply-add
            counts = torch.bincount(indices, minlength=weight_shape[0])[indices]
            for count in counts.unique().tolist():
                these = (counts == count).nonzero().view(-1)
                named, its = indices.index_select(0, these), rows.index_select(0, these)
                if count == 1:
                    add_rows(dw, named, its)
                else:
                    dw.index_add_(0, named, its, alpha=1.0 / count)
        if padding_idx >= 0:
            dw[padding_idx] = 0
        return dw


@composite(torch.embedding)
def embedding(
    weight: T,
    indices: T,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> T:
    return record(Embedding, (weight, indices, padding_idx, scale_grad_by_freq, sparse))[0]
