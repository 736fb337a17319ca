"""LayerNorm and RMSNorm."""

import numbers

import torch
from torch import Tensor

from .. import functional as F
from .. import init
from ..parameter import Parameter
from ..rules.normalization import NativeLayerNorm
from .layer import Layer
from .module import keeps_call, records_once

__all__ = ["GroupNorm", "LayerNorm", "LocalResponseNorm", "RMSNorm"]

_shape_t = int | list[int] | torch.Size


class LayerNorm(Layer):
    """y = (x - mean) r w + b, mean and r = 1 / sqrt(var + eps) over the last dimensions.

    db = sum of g over the rows,  dw = sum of g z,  z = (x - mean) r,
    dx = r (g w - mean(g w) - z mean(g w z)).  Saved: x, w, b, mean, r (Ba et al., 2016).

    `weight` (initialized to ones) and `bias` (zeros) have the shape `normalized_shape`; with
    `elementwise_affine=False` there are none.
    """

    __constants__ = ["normalized_shape", "eps", "elementwise_affine"]
    normalized_shape: tuple[int, ...]
    eps: float
    elementwise_affine: bool

    def __init__(  # type: ignore[no-untyped-def]
        self,
        normalized_shape: _shape_t,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if isinstance(normalized_shape, numbers.Integral):
            normalized_shape = (normalized_shape,)  # type: ignore[assignment]
        self.normalized_shape = tuple(normalized_shape)  # type: ignore[arg-type]
        self.eps = eps
        self.elementwise_affine = elementwise_affine

        def made() -> Parameter:
            return Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))

        self.register_parameter("weight", made() if elementwise_affine else None)
        self.register_parameter("bias", made() if elementwise_affine and bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one, the bias to zero."""
        if self.elementwise_affine:
            init.ones_(self.weight)  # type: ignore[arg-type]
            if self.bias is not None:
                init.zeros_(self.bias)  # type: ignore[arg-type]

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        args = (self.normalized_shape, self.weight, self.bias, self.eps)
        if not isinstance(input, (Tensor, tuple)):  # a union type takes several times as long
            return F.layer_norm(input, *args)
        return self._run(NativeLayerNorm, input, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps},"
            f" elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )


class GroupNorm(Layer):
    """y = (x - mean) r w + b, r = 1 / sqrt(var + eps), per image and group of channels.

    x is (N, C, ...); mean and var are over all elements of the C / `num_groups` channels of a
    group. db = sum of g,  dw = sum of g z,  z = (x - mean) r,
    dx = r (g w - mean(g w) - z mean(g w z)).  Saved: x, w, mean, r (Wu and He, 2018).

    `weight` (initialized to ones) and `bias` (zeros) have the shape (`num_channels`,); with
    `affine=False` there are none.
    """

    __constants__ = ["num_groups", "num_channels", "eps", "affine"]
    num_groups: int
    num_channels: int
    eps: float
    affine: bool

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_channels % num_groups != 0:
            raise ValueError(
                f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups})"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine

        def made() -> Parameter:
            return Parameter(torch.empty(num_channels, device=device, dtype=dtype))

        self.register_parameter("weight", made() if affine else None)
        self.register_parameter("bias", made() if affine and bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one, the bias to zero."""
        if self.affine:
            init.ones_(self.weight)  # type: ignore[arg-type]
            if self.bias is not None:
                init.zeros_(self.bias)  # type: ignore[arg-type]

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)  # type: ignore[arg-type]

        return self._run_several(norm, (input,))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine},"
            f" bias={self.bias is not None}"
        )


class LocalResponseNorm(Layer):
    """y = x / (k + alpha m)^beta, m the mean of x^2 over `size` neighbouring channels.

    x is (N, C, ...).  dx = g d^-beta - 2 alpha beta x M(g x d^(-beta - 1)),  d = k + alpha m, with
    M the mean over the channels that have this one as a neighbour. Saved: x, x^2 and the
    intermediate results computed from it (Krizhevsky et al., 2012).
    """

    __constants__ = ["size", "alpha", "beta", "k"]
    size: int
    alpha: float
    beta: float
    k: float

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            return F.local_response_norm(x, self.size, self.alpha, self.beta, self.k)

        return self._run_several(norm, (input,))  # type: ignore[no-any-return]

    def extra_repr(self):  # type: () -> str
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class RMSNorm(Layer):
    """y = x r w, r = 1 / sqrt(mean(x^2) + eps).  dw = sum of g x r, dx = r g w - x r^3 mean(g w x).

    Over the last dimensions (Zhang and Sennrich, 2019).

    `weight` (initialized to ones) has the shape `normalized_shape`; with
    `elementwise_affine=False` there is none. `eps` defaults to `torch.finfo(dtype).eps` of the
    dtype computed in: float32 for 16-bit inputs.
    """

    __constants__ = ["normalized_shape", "eps", "elementwise_affine"]
    normalized_shape: tuple[int, ...]
    eps: float | None
    elementwise_affine: bool

    def __init__(  # type: ignore[no-untyped-def]
        self,
        normalized_shape: _shape_t,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if isinstance(normalized_shape, numbers.Integral):
            normalized_shape = (normalized_shape,)  # type: ignore[assignment]
        self.normalized_shape = tuple(normalized_shape)  # type: ignore[arg-type]
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        weight = None
        if elementwise_affine:
            weight = Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        if self.elementwise_affine:
            init.ones_(self.weight)  # type: ignore[arg-type]

    @keeps_call
    def forward(self, x: Tensor) -> Tensor:
        def norm(x: Tensor) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)  # type: ignore[arg-type]

        return self._run_several(norm, (x,))

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        )
