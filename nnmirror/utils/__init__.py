"""Helpers for modules and their gradients, as `torch.nn.utils`."""

from typing import TYPE_CHECKING

from .._missing import missing
from . import rnn
from .clip_grad import (
    clip_grad_norm,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from .convert_parameters import parameters_to_vector, vector_to_parameters
from .init import skip_init
from .spectral_norm import remove_spectral_norm, spectral_norm

__all__ = [
    "clip_grad_norm",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "parameters_to_vector",
    "remove_spectral_norm",
    "rnn",
    "skip_init",
    "spectral_norm",
    "vector_to_parameters",
]

if not TYPE_CHECKING:  # a type checker reports such a name itself
    __getattr__ = missing(__name__, __all__, later=["prune"])
