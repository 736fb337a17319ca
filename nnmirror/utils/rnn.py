"""Sequences of different lengths as one tensor, as `torch.nn.utils.rnn`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch

from .. import _torch
from .._missing import missing
from ..grad_mode import is_grad_enabled

__all__ = ["pad_sequence", "unpad_sequence"]


def pad_sequence(
    sequences: torch.Tensor | list[torch.Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: Literal["left", "right"] = "right",
) -> torch.Tensor:
    """One tensor of sequences (L_i, *), padded to the longest: (L, B, *), or (B, L, *) with
    `batch_first`. The gradient of each is its part of the result's.

    Raises as PyTorch's, RuntimeError for instance if the other dimensions differ.
    """
    if not isinstance(sequences, Iterable):
        raise RuntimeError(
            "pad_sequence: Expected iterable for input sequences, but got arg of type:"
            f" {type(sequences)}"
        )
    parts = tuple(sequences)
    plain = [part.detach() if isinstance(part, torch.Tensor) else part for part in parts]
    padded: torch.Tensor = _torch.pad_sequence(plain, batch_first, padding_value, padding_side)
    if is_grad_enabled() and any(part.requires_grad for part in parts):
        longest = padded.shape[1 if batch_first else 0]
        for i, part in enumerate(parts):
            start = 0 if padding_side == "right" else longest - len(part)
            rows = slice(start, start + len(part))
            padded[(i, rows) if batch_first else (rows, i)] = part
    return padded


def unpad_sequence(
    padded_sequences: torch.Tensor, lengths: torch.Tensor, batch_first: bool = False
) -> list[torch.Tensor]:
    """The sequences of these lengths in a padded tensor, which without `batch_first` is transposed
    in place, as by PyTorch."""
    if not batch_first:
        padded_sequences.transpose_(0, 1)
    places = torch.arange(padded_sequences.shape[1], device=lengths.device)
    pairs = zip(padded_sequences, lengths, strict=True)
    return [sequence[places < length] for sequence, length in pairs]


if not TYPE_CHECKING:  # a type checker reports such a name itself
    __getattr__ = missing(__name__, __all__)
