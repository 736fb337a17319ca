"""Operations whose floating-point result carries no gradient in PyTorch either.

Any operation without a rule whose result has no floating-point tensor passes through as well
(comparisons, argmax, shapes, numbers); only the others are listed here.
"""

from typing import Any

import torch

from .._types import TorchFunction

T = torch.Tensor
_data: Any = T.data  # of the class, these are descriptors
_base: Any = T._base
_volatile: Any = T.volatile  # type: ignore[attr-defined]

PASSIVE: set[TorchFunction] = {
    T.detach,
    torch.detach,
    _data.__get__,
    _base.__get__,
    T.size,
    T.item,
    T.tolist,
    torch.empty_like,
    torch.full_like,
    torch.ones_like,
    torch.rand_like,
    torch.randint_like,
    torch.randn_like,
    torch.zeros_like,
    T.new_empty,
    T.new_empty_strided,
    T.new_full,
    T.new_ones,
    T.new_tensor,
    T.new_zeros,
    T.new,
}

# Attributes that may be set on a tensor that requires grad; PyTorch records none of them.
UNRECORDED_SETTERS: set[TorchFunction] = {
    _data.__set__,
    _volatile.__set__,
    T.share_memory_,
}

# Operations that give a tensor another shape or other memory, and have no rule.
RESHAPING: set[TorchFunction] = {
    _data.__set__,
    T.resize_,
    T.resize_as_,
    torch.resize_as_,
    T.as_strided_,
    torch.as_strided_,
}
