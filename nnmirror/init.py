"""Initial values for tensors, as `torch.nn.init`: the same draws from the same generator.

Each function fills the tensor it is given, in place and unrecorded, and returns it.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from ._torch import DisableTorchFunctionSubclass
from .grad_mode import no_grad_at_all
from .rules.registry import has_gradient
from .tensor import Tensor as Tracked

__all__ = [
    "calculate_gain",
    "constant",
    "constant_",
    "dirac",
    "dirac_",
    "eye",
    "eye_",
    "kaiming_normal",
    "kaiming_normal_",
    "kaiming_uniform",
    "kaiming_uniform_",
    "normal",
    "normal_",
    "ones_",
    "orthogonal",
    "orthogonal_",
    "sparse",
    "sparse_",
    "trunc_normal_",
    "uniform",
    "uniform_",
    "xavier_normal",
    "xavier_normal_",
    "xavier_uniform",
    "xavier_uniform_",
    "zeros_",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LINEAR = (
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
_Nonlinearity = Literal[
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "selu",
]
_FanMode = Literal["fan_in", "fan_out"]


def _unrecorded(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run `function` without recording by torch or by the mirror."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        how = (*args[1:], *(value for name, value in kwargs.items() if name != "tensor"))
        if any(map(has_gradient, how)):
            return _with_a_gradient(function, args, kwargs)  # type: ignore[no-any-return]
        with DisableTorchFunctionSubclass(), no_grad_at_all():
            return function(*args, **kwargs)

    return call


def _with_a_gradient(
    function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """For arguments that are tensors which require grad: the operations raise their errors."""
    tensor, how = (args[0], args[1:]) if args else (kwargs.pop("tensor"), ())
    with DisableTorchFunctionSubclass():
        asked = torch.Tensor._make_subclass(Tracked, tensor.detach())
    with no_grad_at_all():
        function(asked, *how, **kwargs)
    return tensor


def calculate_gain(nonlinearity: _Nonlinearity, param: int | float | None = None) -> float:
    """The factor that keeps the variance through `nonlinearity` (He et al., 2015)."""
    if nonlinearity in (*_LINEAR, "sigmoid"):
        return 1
    if nonlinearity == "tanh":
        return 5.0 / 3
    if nonlinearity == "relu":
        return math.sqrt(2.0)
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        if isinstance(slope, bool) or not isinstance(slope, int | float):
            raise ValueError(f"negative_slope {param} not a valid number")
        return math.sqrt(2.0 / (1 + slope**2))
    if nonlinearity == "selu":
        return 3.0 / 4
    raise ValueError(f"Unsupported nonlinearity {nonlinearity}")


@_unrecorded
def uniform_(
    tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from U(a, b)."""
    return tensor.uniform_(a, b, generator=generator)


@_unrecorded
def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from N(mean, std^2)."""
    return tensor.normal_(mean, std, generator=generator)


@_unrecorded
def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws from N(mean, std^2) conditioned on [a, b], by rejection.

    Where at least 0.3 of the normal distribution lies inside, normal draws are repeated
    until all do; elsewhere uniform draws are accepted with the (scaled) normal density.
    """
    if tensor.is_meta:
        return tensor
    if mean < a - 2 * std or mean > b + 2 * std:
        warnings.warn(
            "mean is more than 2 std from [a, b] in nn.init.trunc_normal_. The distribution of"
            " values may be incorrect.",
            stacklevel=3,
        )

    def cumulative(x: float) -> float:
        return (1.0 + math.erf(x / math.sqrt(2.0))) / 2.0

    if cumulative((b - mean) / std) - cumulative((a - mean) / std) > 0.3:
        low = tensor.new_tensor(a, device="cpu").item()
        high = tensor.new_tensor(b, device="cpu").item()
        drawn = tensor.normal_(mean, std, generator=generator)
        while (outside := (drawn < low) | (drawn > high)).any():
            again = torch.empty_like(drawn).normal_(mean, std, generator=generator)
            drawn = torch.where(outside, again, drawn)
        return tensor if drawn is tensor else tensor.copy_(drawn)

    log_peak = -0.5 * ((max(a, min(mean, b)) - mean) / std) ** 2
    candidates, chance = torch.empty_like(tensor), torch.empty_like(tensor)

    def rejected() -> Tensor:
        candidates.sub_(mean).div_(std).pow_(2).mul_(-0.5).sub_(log_peak)
        return chance.uniform_(generator=generator).log_().gt(candidates)

    candidates.copy_(tensor.uniform_(a, b, generator=generator))
    pending = rejected()
    drawn = tensor
    while pending.any():
        drawn = torch.where(pending, candidates.uniform_(a, b, generator=generator), drawn)
        pending = torch.where(pending, rejected(), pending)
    return tensor if drawn is tensor else tensor.copy_(drawn)


@_unrecorded
def constant_(tensor: Tensor, val: float) -> Tensor:
    """Fills with `val`."""
    return tensor.fill_(val)


@_unrecorded
def ones_(tensor: Tensor) -> Tensor:
    """Fills with one."""
    return tensor.fill_(1.0)


@_unrecorded
def zeros_(tensor: Tensor) -> Tensor:
    """Fills with zero."""
    return tensor.zero_()


@_unrecorded
def eye_(tensor: Tensor) -> Tensor:
    """Makes a matrix the identity."""
    if tensor.ndimension() != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    torch.eye(*tensor.shape, out=tensor)
    return tensor


@_unrecorded
def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    """Makes a convolution kernel (3, 4 or 5 dimensions) pass its channels on unchanged."""
    if tensor.ndimension() not in (3, 4, 5):
        raise ValueError("Only tensors with 3, 4, or 5 dimensions are supported")
    sizes = tensor.size()
    if sizes[0] % groups != 0:
        raise ValueError("dim 0 must be divisible by groups")
    if tensor.is_meta:
        return tensor
    per_group = sizes[0] // groups
    centre = [size // 2 for size in sizes[2:]]
    tensor.zero_()
    for group in range(groups):
        for channel in range(min(per_group, sizes[1])):
            tensor[(group * per_group + channel, channel, *centre)] = 1
    return tensor


def _calculate_fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() < 2:
        raise ValueError(
            "Fan in and fan out can not be computed for tensor with fewer than 2 dimensions"
        )
    field = math.prod(tensor.shape[2:])
    return tensor.size(1) * field, tensor.size(0) * field


def _xavier_std(tensor: Tensor, gain: float) -> float:
    return gain * math.sqrt(2.0 / float(sum(_calculate_fan_in_and_fan_out(tensor))))


def xavier_uniform_(
    tensor: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from U(-a, a), a = gain sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    bound = math.sqrt(3.0) * _xavier_std(tensor, gain)
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(
    tensor: Tensor, gain: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from N(0, gain^2 2 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    return normal_(tensor, 0.0, _xavier_std(tensor, gain), generator)


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: _Nonlinearity) -> float | None:
    if 0 in tensor.shape:
        warnings.warn("Initializing zero-element tensors is a no-op", stacklevel=4)
        return None
    modes = ["fan_in", "fan_out"]
    if mode.lower() not in modes:
        raise ValueError(f"Mode {mode.lower()} not supported, please use one of {modes}")
    fan = _calculate_fan_in_and_fan_out(tensor)[modes.index(mode.lower())]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan)


@_unrecorded
def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0,
    mode: _FanMode = "fan_in",
    nonlinearity: _Nonlinearity = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws from U(-b, b), b = gain sqrt(3 / fan) (He et al., 2015)."""
    std = _kaiming_std(tensor, a, mode, nonlinearity)
    if std is None:
        return tensor
    bound = math.sqrt(3.0) * std
    return tensor.uniform_(-bound, bound, generator=generator)


@_unrecorded
def kaiming_normal_(
    tensor: Tensor,
    a: float = 0,
    mode: _FanMode = "fan_in",
    nonlinearity: _Nonlinearity = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws from N(0, gain^2 / fan) (He et al., 2015)."""
    std = _kaiming_std(tensor, a, mode, nonlinearity)
    return tensor if std is None else tensor.normal_(0, std, generator=generator)


@_unrecorded
def orthogonal_(
    tensor: Tensor, gain: float = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Makes the rows (or columns) of the flattened tensor orthonormal (Saxe et al., 2013)."""
    if tensor.ndimension() < 2:
        raise ValueError("Only tensors with 2 or more dimensions are supported")
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    rows = tensor.size(0)
    cols = tensor.numel() // rows
    flat = tensor.new_empty((rows, cols)).normal_(0, 1, generator=generator)
    if rows < cols:
        flat.t_()
    q, r = torch.linalg.qr(flat)
    q *= torch.diag(r, 0).sign()  # uniform over the orthogonal matrices (Mezzadri, 2007)
    if rows < cols:
        q.t_()
    tensor.view_as(q).copy_(q)
    return tensor.mul_(gain)


def sparse_(
    tensor: Tensor, sparsity: float, std: float = 0.01, generator: torch.Generator | None = None
) -> Tensor:
    """Draws a matrix from N(0, std^2), then zeroes a share of each column (Martens, 2010)."""
    if tensor.ndimension() != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    if tensor.is_meta:
        return tensor
    zeros = math.ceil(sparsity * tensor.shape[0])
    return _sparse(tensor, zeros, std, generator)


@_unrecorded
def _sparse(tensor: Tensor, zeros: int, std: float, generator: torch.Generator | None) -> Tensor:
    rows, cols = tensor.shape
    tensor.normal_(0, std, generator=generator)
    for col in range(cols):
        tensor[torch.randperm(rows)[:zeros], col] = 0
    return tensor


def _deprecated(function: Callable[_P, _R]) -> Callable[_P, _R]:
    new = function.__name__
    old = new[:-1]

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        warnings.warn(
            f"`nn.init.{old}` is now deprecated in favor of `nn.init.{new}`.",
            FutureWarning,
            stacklevel=2,
        )
        return function(*args, **kwargs)

    call.__name__, call.__doc__ = old, f"Deprecated name of `{new}`."
    return call


uniform = _deprecated(uniform_)
normal = _deprecated(normal_)
constant = _deprecated(constant_)
eye = _deprecated(eye_)
dirac = _deprecated(dirac_)
xavier_uniform = _deprecated(xavier_uniform_)
xavier_normal = _deprecated(xavier_normal_)
kaiming_uniform = _deprecated(kaiming_uniform_)
kaiming_normal = _deprecated(kaiming_normal_)
orthogonal = _deprecated(orthogonal_)
sparse = _deprecated(sparse_)
