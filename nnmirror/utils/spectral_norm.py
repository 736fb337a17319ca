"""Spectral normalisation of a weight."""

from typing import TypeVar

from ..modules.module import Module

T_module = TypeVar("T_module", bound=Module)


def spectral_norm(
    module: T_module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
) -> T_module:
    """The module, with its weight divided by the weight's largest singular value before each call:

        w = v / s,  s = a^T V b

    V is the parameter `name` + "_orig" as a matrix, with `dim` as rows: 1 for a transposed
    convolution, else 0. a and b are buffers; in training each call improves them by
    `n_power_iterations` steps of the power method (Miyato et al., 2018). Errors: as in PyTorch,
    whose own function works on mirrored modules. It does not know a mirrored transposed
    convolution, so that this one is to be used.
    """
    from torch.nn.utils import spectral_norm as theirs  # imported only if it is used

    from ..modules.conv import _ConvTransposeNd

    if dim is None:
        dim = int(isinstance(module, _ConvTransposeNd))
    return theirs(module, name, n_power_iterations, eps, dim)  # type: ignore[type-var]


def remove_spectral_norm(module: T_module, name: str = "weight") -> T_module:
    """The module, with the present weight as its parameter again."""
    from torch.nn.utils import remove_spectral_norm as theirs

    return theirs(module, name)  # type: ignore[type-var]
