"""Embedding."""

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .. import init
from ..operation import Operation
from ..overrides import is_subclass
from ..parameter import Parameter
from ..rules.embedding import Embedding as EmbeddingRule
from .layer import Layer
from .module import keeps_call

__all__ = ["Embedding"]


class Embedding(Layer):
    """y = the rows of the table at the indices in the input.

    dW = for each row, the sum of the gradients over its occurrences; the row `padding_idx`, zero at
    first, gets none, and with `scale_grad_by_freq` each sum is divided by the number of
    occurrences. With `max_norm` each forward first scales the rows it uses down to that norm.
    Saved: the input. `sparse=True` is refused where the table is trained.

    `weight` (num_embeddings, embedding_dim) is drawn from N(0, 1).
    """

    __constants__ = [
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    ]
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    weight: Tensor
    freeze: bool
    sparse: bool

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = F.counted_from_front(padding_idx, num_embeddings)
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        shape = num_embeddings, embedding_dim
        if _weight is None:
            data = torch.empty(shape, device=device, dtype=dtype)
            self.weight = Parameter(data, requires_grad=not _freeze)
            self.reset_parameters()
        else:
            if tuple(_weight.shape) != shape:
                raise AssertionError(
                    "Shape of weight does not match num_embeddings and embedding_dim"
                )
            self.weight = Parameter(_weight, requires_grad=not _freeze)
        self.sparse = sparse

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        init.normal_(self.weight)
        self._fill_padding_idx_with_zero()

    def _fill_padding_idx_with_zero(self) -> None:
        if self.padding_idx is not None:
            init.zeros_(self.weight.detach()[self.padding_idx])

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run(EmbeddingRule, None, input)

    def _run(self, function: type[Operation], *args: Any) -> Any:
        input = args[1]
        if type(input) is tuple:
            return self._run_on_tuple(function, args)
        if is_subclass(input):
            return self._run_whole(
                F.embedding,
                input,
                self.weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )
        input, padding_idx = F.looked_up(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type
        )
        how = padding_idx, self.scale_grad_by_freq, self.sparse
        return super()._run(function, self.weight, input, *how)

    def extra_repr(self) -> str:
        said = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            said += f", padding_idx={self.padding_idx}"
        if self.max_norm is not None:
            said += f", max_norm={self.max_norm}"
        if self.norm_type != 2:
            said += f", norm_type={self.norm_type}"
        if self.scale_grad_by_freq is not False:
            said += f", scale_grad_by_freq={self.scale_grad_by_freq}"
        return said + (", sparse=True" if self.sparse is not False else "")

    @classmethod
    def from_pretrained(
        cls,
        embeddings,
        freeze=True,
        padding_idx=None,
        max_norm=None,
        norm_type=2.0,
        scale_grad_by_freq=False,
        sparse=False,
    ):
        # type: (Tensor, bool, int | None, float | None, float, bool, bool) -> Embedding
        """A layer with this table, frozen or to be trained on."""
        if embeddings.dim() != 2:
            raise AssertionError("Embeddings parameter is expected to be 2-dimensional")
        rows, columns = embeddings.shape
        return cls(
            num_embeddings=rows,
            embedding_dim=columns,
            _weight=embeddings,
            _freeze=freeze,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
        )
