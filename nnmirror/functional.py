"""The functions of `torch.nn.functional`.

Each checks its arguments as PyTorch does, and records the rules of which it consists; the gradients
are in `nnmirror.rules`. The functions of the activations, of softmax and of Linear stand there too,
beside their rules.
"""

import functools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import torch

from ._missing import missing
from ._torch import DisableTorchFunctionSubclass
from ._types import Size, TorchFunction
from .fast.composed import generated, warn
from .overrides import overridable
from .rules import RULES
from .rules import activation as _activation
from .rules import attention as _attention
from .rules import batchnorm as _batchnorm
from .rules import composed as _composed
from .rules import convolution as _convolution
from .rules import dropout as _dropout
from .rules import embedding as _embedding
from .rules import fold as _fold
from .rules import groupnorm as _groupnorm
from .rules import linear as _linear_rules
from .rules import loss as _loss
from .rules import normalization as _normalization
from .rules import padding as _padding
from .rules import pooling as _pooling
from .rules import prelu as _prelu
from .rules import reduction as _reduction
from .rules import softmax as _softmax
from .rules import upsampling as _upsampling
from .rules.activation import *  # noqa: F403
from .rules.arithmetic import Div, Mul, Neg, Pow, Rsub, Sub
from .rules.linear import *  # noqa: F403
from .rules.prelu import *  # noqa: F403
from .rules.rearrange import ChannelShuffle, PixelShuffle, PixelUnshuffle
from .rules.reduction import Mean, Sum
from .rules.registry import NAMED, check_numbers, unplaced
from .rules.shape import Clone, broadcast_shapes, broadcast_tensors, expand, squeeze, unsqueeze
from .rules.softmax import *  # noqa: F403
from .tape import record
from .tensor import Tensor

T = torch.Tensor
C = TypeVar("C", bound=TorchFunction)
P = ParamSpec("P")
# By what to enlarge, in all dimensions or in each.
_Factor: TypeAlias = float | Sequence[float]
__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "alpha_dropout",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "channel_shuffle",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cross_entropy",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "embedding",
    "feature_alpha_dropout",
    "fold",
    "fractional_max_pool2d",
    "fractional_max_pool3d",
    "gaussian_nll_loss",
    "group_norm",
    "hinge_embedding_loss",
    "huber_loss",
    "instance_norm",
    "interpolate",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "local_response_norm",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "margin_ranking_loss",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "mse_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "normalize",
    "one_hot",
    "pad",
    "pairwise_distance",
    "pixel_shuffle",
    "pixel_unshuffle",
    "poisson_nll_loss",
    "rms_norm",
    "scaled_dot_product_attention",
    "smooth_l1_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "unfold",
    "upsample",
    "upsample_bilinear",
    "upsample_nearest",
]


def _described_by(function: Callable[P, T], answer: TorchFunction) -> Callable[P, T]:
    return functools.wraps(function)(answer)


scaled_dot_product_attention = overridable(
    _described_by(
        _attention.scaled_dot_product_attention,
        RULES[torch._C._nn.scaled_dot_product_attention],
    )
)


def check_probability(p: float) -> None:
    """PyTorch's error for a number that is not a probability."""
    if p < 0 or p > 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


@overridable
def dropout(input: T, p: float = 0.5, training: bool = True, inplace: bool = False) -> T:
    """Each element is 0 with probability p, else x / (1 - p).

    See `nnmirror.rules.dropout.Dropout`.
    """
    check_probability(p)
    return _dropped(_dropout.dropout, input, p, training, inplace)


def _dropped(
    function: TorchFunction,
    input: T,
    p: float,
    training: bool,
    inplace: bool,
    features: bool = False,
) -> T:
    inplace = bool(inplace)
    func = _dropout.KINDS[function, features, inplace]
    if not isinstance(input, T):
        raise unplaced(func, (input, p, training), {})
    p = _dropout.checked(input, p, training, func)
    return function(input, p, training, inplace, features)  # type: ignore[no-any-return]


def _features_dropped(input: T, p: float, training: bool, inplace: bool, batched: bool) -> T:
    if not batched:
        input = input.unsqueeze_(0) if inplace else unsqueeze(input, 0)
    y = _dropped(_dropout.dropout, input, p, training, inplace, features=True)
    if batched:
        return y
    return y.squeeze_(0) if inplace else squeeze(y, 0)


@overridable
def dropout1d(input: T, p: float = 0.5, training: bool = True, inplace: bool = False) -> T:
    """Each channel of (N, C, L) or (C, L) is 0 with probability p, else x / (1 - p)."""
    check_probability(p)
    dim = input.dim()
    if dim not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {dim}D input. {_channels_of(1)}"
        )
    return _features_dropped(input, p, training, inplace, batched=dim == 3)


@overridable
def dropout2d(input: T, p: float = 0.5, training: bool = True, inplace: bool = False) -> T:
    """Each channel of (N, C, H, W) is 0 with probability p, else x / (1 - p).

    So is each of (N, C, L), with a warning.
    """
    check_probability(p)
    dim = input.dim()
    if dim not in (3, 4):
        _warn_of_dimensions(2, dim)
    if dim == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout"
            " behavior is desired - input is interpreted as shape (N, C, L), where C is the channel"
            " dim. This behavior will change in a future release to interpret the input as one"
            " without a batch dimension, i.e. shape (C, H, W). To maintain the 1D channel-wise"
            " dropout behavior, please switch to using dropout1d instead.",
            stacklevel=3,
        )
    return _features_dropped(input, p, training, inplace, batched=True)


@overridable
def dropout3d(input: T, p: float = 0.5, training: bool = True, inplace: bool = False) -> T:
    """Each channel of (N, C, D, H, W) or (C, D, H, W) is 0 with probability p, else x / (1 - p)."""
    check_probability(p)
    dim = input.dim()
    if dim not in (4, 5):
        _warn_of_dimensions(3, dim)
    return _features_dropped(input, p, training, inplace, batched=dim == 5)


def _channels_of(n: int) -> str:
    of = "1 spatial dimension" if n == 1 else f"{n} spatial dimensions"
    return (
        f"Note that dropout{n}d exists to provide channel-wise dropout on inputs with {of}, a"
        f" channel dimension, and an optional batch dimension (i.e. {n + 1}D or {n + 2}D inputs)."
    )


def _warn_of_dimensions(n: int, dim: int) -> None:
    warnings.warn(
        f"dropout{n}d: Received a {dim}-D input to dropout{n}d, which is deprecated and will result"
        " in an error in a future release. To retain the behavior and silence this warning, please"
        f" use dropout instead. {_channels_of(n)}",
        stacklevel=4,
    )


@overridable
def alpha_dropout(input: T, p: float = 0.5, training: bool = False, inplace: bool = False) -> T:
    """Dropout that keeps mean and variance in front of SELU.

    See `nnmirror.rules.dropout.alpha_dropout`.
    """
    check_probability(p)
    return _dropped(_dropout.alpha_dropout, input, p, training, inplace)


@overridable
def feature_alpha_dropout(
    input: T, p: float = 0.5, training: bool = False, inplace: bool = False
) -> T:
    """`alpha_dropout` of whole channels (N, C, ...)."""
    check_probability(p)
    return _dropped(_dropout.alpha_dropout, input, p, training, inplace, features=True)


def pixel_shuffle(input: T, upscale_factor: int) -> T:
    """Channels become pixels, (*, C r^2, H, W) to (*, C, H r, W r).

    See `nnmirror.rules.rearrange`.
    """
    return record(PixelShuffle, (input, upscale_factor))[0]


def pixel_unshuffle(input: T, downscale_factor: int) -> T:
    """Pixels become channels, (*, C, H r, W r) to (*, C r^2, H, W).

    See `nnmirror.rules.rearrange`.
    """
    return record(PixelUnshuffle, (input, downscale_factor))[0]


def channel_shuffle(input: T, groups: int) -> T:
    """The channels of each group one after another in turn; see `nnmirror.rules.rearrange`."""
    return record(ChannelShuffle, (input, groups))[0]


def layer_norm(
    input: T,
    normalized_shape: list[int],
    weight: T | None = None,
    bias: T | None = None,
    eps: float = 1e-5,
) -> T:
    """Each row to mean 0 and variance 1; see `nnmirror.rules.normalization.NativeLayerNorm`."""
    if not isinstance(input, T):
        raise unplaced(torch.layer_norm, (input, normalized_shape, weight, bias, eps), {})
    return _normalization.layer_norm(input, normalized_shape, weight, bias, eps)


@generated
def rms_norm(
    input: T, normalized_shape: list[int], weight: T | None = None, eps: float | None = None
) -> T:
    """Each row over the root of its mean square; see `nnmirror.rules.composed.rms_norm`."""
    if not isinstance(input, T):
        raise unplaced(torch.rms_norm, (input, normalized_shape, weight, eps), {})
    return _composed.rms_norm(input, normalized_shape, weight, eps)


@generated
def normalize(
    input: T, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: T | None = None
) -> T:
    """Each row over its p-norm, which is eps at least:  y = x / max(|x|, eps)"""
    size = _reduction.norm(input, p, dim, True).clamp_min(eps).expand_as(input)
    if out is None:
        return record(Div, (input, size))[0]
    return torch.div(input, size, out=out)


@generated
def pad(input: T, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> T:
    """x between a constant ("constant"), its mirror image without its edge ("reflect"), its edge
    ("replicate") or its other end ("circular"); see `nnmirror.rules.padding`.

    `pad` has two numbers for each dimension, of the last one first. One below 0 cuts off.
    """
    return _padding.pad(input, pad, mode, value)


@overridable
def one_hot(tensor: T, num_classes: int = -1) -> T:
    """Integers as rows of zeros with a one; no gradient goes through."""
    with DisableTorchFunctionSubclass():
        return torch._C._nn.one_hot(tensor, num_classes)


@generated
def cosine_similarity(x1: T, x2: T, dim: int = 1, eps: float = 1e-8) -> T:
    """The cosine of the angle between rows; see `nnmirror.rules.composed.cosine_similarity`."""
    return _composed.cosine_similarity(x1, x2, dim, eps)


@generated
def pairwise_distance(x1: T, x2: T, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> T:
    """The p-norm of the difference of rows; see `nnmirror.rules.composed.pairwise_distance`."""
    return _composed.pairwise_distance(x1, x2, p, eps, keepdim)


@overridable
def batch_norm(
    input: T,
    running_mean: T | None,
    running_var: T | None,
    weight: T | None = None,
    bias: T | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> T:
    """Each channel to mean 0 and variance 1; see `nnmirror.rules.batchnorm.NativeBatchNorm`."""
    check_batch(input, training, eps)
    args = input, weight, bias, running_mean, running_var, training, momentum, eps
    if not isinstance(input, T):
        raise unplaced(torch.batch_norm, (*args, torch.backends.cudnn.enabled), {})
    return _batchnorm.batch_norm(*args, torch.backends.cudnn.enabled)


@overridable
def instance_norm(
    input: T,
    running_mean: T | None = None,
    running_var: T | None = None,
    weight: T | None = None,
    bias: T | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> T:
    """Each channel of each image to mean 0 and variance 1.

    See `nnmirror.rules.batchnorm.instance_norm`.
    """
    if use_input_stats and input.size()[2:].numel() == 1:
        raise ValueError(
            f"Expected more than 1 spatial element when training, got input size {input.size()}"
        )
    stats = running_mean, running_var, use_input_stats
    cudnn = torch.backends.cudnn.enabled
    return _batchnorm.instance_norm(input, weight, bias, *stats, momentum, eps, cudnn)


@generated
def group_norm(
    input: T,
    num_groups: int,
    weight: T | None = None,
    bias: T | None = None,
    eps: float = 1e-5,
) -> T:
    """Each group of channels of each image to mean 0 and variance 1.

    See `nnmirror.rules.groupnorm`.
    """
    if input.dim() < 2:
        raise RuntimeError(
            f"Expected at least 2 dimensions for input tensor but received {input.dim()}"
        )
    n, c, *places = input.size()
    if isinstance(num_groups, torch.Tensor):  # PyTorch's error
        return _groupnorm.group_norm(input, num_groups, weight, bias, eps)
    size = [n * c // num_groups, num_groups, *places]
    if size[0] * torch.Size(places).numel() == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {size}"
        )
    return _groupnorm.group_norm(input, num_groups, weight, bias, eps)


@generated
def local_response_norm(
    input: T, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> T:
    """y = x / (k + alpha m)^beta, m the mean of x^2 over `size` channels around, with 0 beyond

    (N, C, ...). Composed, as in PyTorch, of a pad, a pool and elementwise operations.
    """
    dim = input.dim()
    if dim < 3:
        raise ValueError(
            "Expected 3D or higher dimensionality                          input (got"
            f" {dim} dimensions)"
        )
    if input.numel() == 0:
        return input
    m = record(Mul, (input, input))[0]
    around = size // 2, (size - 1) // 2
    if dim == 3:
        m = pad(m.unsqueeze(1), [0, 0, *around])
        m = avg_pool2d(m, (size, 1), stride=1).squeeze(1)
    else:
        n, c, first, *_ = sizes = input.size()
        m = pad(m.view(n, 1, c, first, -1), [0, 0, 0, 0, *around])
        m = avg_pool3d(m, (size, 1, 1), stride=1).squeeze(1).view(sizes)
    return record(Div, (input, m.mul(alpha).add(k).pow(beta)))[0]


@generated
def interpolate(
    input: T,
    size: Size | None = None,
    scale_factor: _Factor | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> T:
    """Images (N, C, ...) at another size, or at the old one times `scale_factor`.

    By the nearest element ("nearest", "nearest-exact"), between neighbours ("linear", "bilinear",
    "trilinear", "bicubic"), or as the mean over an area ("area"); see `nnmirror.rules.upsampling`.
    """
    if mode in ("nearest", "area", "nearest-exact"):
        if align_corners is not None:
            raise ValueError(
                "align_corners option can only be set with the interpolating modes: linear |"
                " bilinear | bicubic | trilinear"
            )
    elif align_corners is None:
        align_corners = False
    dim = input.dim()
    sizes, scales = _interpolated_size(input, size, scale_factor)
    if recompute_scale_factor and size is not None:
        raise ValueError("recompute_scale_factor is not meaningful with an explicit size.")
    if scales is not None and (recompute_scale_factor or mode == "area"):
        sizes = [int(input.size(i + 2) * s) for i, s in enumerate(scales)]
        scales = None
    if antialias and not (mode in ("bilinear", "bicubic", "lanczos") and dim == 4):
        raise ValueError(
            "Anti-alias option is restricted to bilinear, bicubic, and lanczos modes and requires"
            " a 4-D tensor as input"
        )
    if mode == "area" and sizes is not None and dim in (3, 4, 5):
        return _mean_over_areas(input, sizes)
    if mode == "lanczos" and dim == 4:
        if align_corners:
            raise ValueError("Lanczos mode does not support align_corners=True")
        if not antialias:
            raise ValueError("Lanczos mode requires antialias=True")
    found = _INTERPOLATIONS.get((mode, dim))
    if found is not None:
        kind = f"{found}_aa" if antialias else found
        return _upsampling.upsample(input, kind, sizes, align_corners, scales)
    if mode in _LINEAR and dim in (3, 4, 5):
        raise NotImplementedError(f"Got {dim}D input, but {mode} mode needs {_LINEAR[mode]}D input")
    raise NotImplementedError(
        f"Input Error: Only 3D, 4D and 5D input Tensors supported (got {dim}D) for the modes:"
        " nearest | linear | bilinear | bicubic | trilinear | lanczos | area | nearest-exact (got"
        f" {mode})"
    )


_INTERPOLATIONS = {
    **{("nearest", n + 2): f"nearest{n}d" for n in (1, 2, 3)},
    **{("nearest-exact", n + 2): f"exact{n}d" for n in (1, 2, 3)},
    ("linear", 3): "linear1d",
    ("bilinear", 4): "linear2d",
    ("trilinear", 5): "linear3d",
    ("bicubic", 4): "cubic2d",
    ("lanczos", 4): "lanczos2d",
}
_LINEAR = {"linear": 3, "bilinear": 4, "trilinear": 5}


def _interpolated_size(
    input: T, size: Size | None, scale_factor: _Factor | None
) -> tuple[Sequence[int] | None, Sequence[float] | None]:
    """The sizes or the factors, one for each dimension; or PyTorch's error."""
    dim = input.dim() - 2
    if size is not None and scale_factor is not None:
        raise ValueError("only one of size or scale_factor should be defined")
    if size is None and scale_factor is None:
        raise ValueError("either size or scale_factor should be defined")
    given: Any = scale_factor if size is None else size
    if not isinstance(given, list | tuple):
        given = [given] * dim
    elif len(given) != dim:
        what = ("scale_factor", "scale_factor of shape", "(s1, s2, ...,sK)")
        if size is not None:
            what = ("output", "output size of", "(o1, o2, ...,oK)")
        in_format = "output size in" if size is not None else "scale_factor in"
        raise ValueError(
            f"Input and {what[0]} must have the same number of spatial dimensions, but got input"
            f" with spatial dimensions of {list(input.shape[2:])} and {what[1]} {given}. Please"
            f" provide input tensor in (N, C, d1, d2, ...,dK) format and {in_format} {what[2]}"
            " format."
        )
    elif size is not None and not all(isinstance(s, numbers.Integral) for s in given):
        raise TypeError(
            "expected size to be one of int or Tuple[int] or Tuple[int, int] or Tuple[int, int,"
            f" int], but got size with types {[type(s) for s in given]}"
        )
    return (None, given) if size is None else (given, None)


def _mean_over_areas(input: T, size: Sequence[int]) -> T:
    pools = adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d
    return pools[input.dim() - 3](input, size)


def upsample(
    input: T,
    size: Size | None = None,
    scale_factor: _Factor | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> T:
    """`interpolate`, with PyTorch's warning that it is called so now."""
    return _upsampled("upsample", input, size, scale_factor, mode, align_corners)


def upsample_nearest(input: T, size: Size | None = None, scale_factor: _Factor | None = None) -> T:
    """`interpolate` by the nearest element, with PyTorch's warning that it is called so now."""
    return _upsampled("upsample_nearest", input, size, scale_factor, "nearest", None)


def upsample_bilinear(input: T, size: Size | None = None, scale_factor: _Factor | None = None) -> T:
    """`interpolate(mode="bilinear", align_corners=True)`, with PyTorch's warning."""
    return _upsampled("upsample_bilinear", input, size, scale_factor, "bilinear", True)


def _upsampled(
    name: str,
    input: T,
    size: Size | None,
    scale: _Factor | None,
    mode: str,
    corners: bool | None,
) -> T:
    warnings.warn(
        f"`nn.functional.{name}` is deprecated. Use `nn.functional.interpolate` instead.",
        stacklevel=3,
    )
    return interpolate(input, size, scale, mode, corners)


def check_batch(input: T, training: bool, eps: float) -> None:
    """PyTorch's errors for a batch of one, and for a variance that could be zero."""
    if training:
        size = input.size()
        if math.prod((size[0], *size[2:])) == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {size}"
            )
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


@overridable
def embedding(
    input: T,
    weight: T,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> T:
    """The rows of `weight` that `input` names; see `nnmirror.rules.embedding.Embedding`."""
    input, place = looked_up(input, weight, padding_idx, max_norm, norm_type)
    return _embedding.embedding(weight, input, place, scale_grad_by_freq, sparse)


def looked_up(
    input: T, weight: T, padding_idx: int | None, max_norm: float | None, norm_type: float
) -> tuple[T, int]:
    """The input and padding_idx (-1 for none) of a lookup; `max_norm` changes the weight."""
    rows = 0 if padding_idx is None else weight.size(0)
    place = counted_from_front(padding_idx, rows)
    if max_norm is not None:
        check_numbers(torch.embedding_renorm_, (weight, input, max_norm, norm_type), {})
        with DisableTorchFunctionSubclass():
            input = input.contiguous()
            torch.embedding_renorm_(weight.detach(), input, max_norm, norm_type)
    return input, -1 if place is None else place


def counted_from_front(padding_idx: int | None, rows: int) -> int | None:
    """`padding_idx` without a sign, or PyTorch's error."""
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < max(rows, 1):
        raise AssertionError("Padding_idx must be within num_embeddings")
    return padding_idx + rows if padding_idx < 0 else padding_idx


conv1d, conv2d, conv3d = map(generated, _convolution.CONV)
conv_transpose1d, conv_transpose2d, conv_transpose3d = map(generated, _convolution.CONV_TRANSPOSE)


def _pools(of: dict[int, C]) -> list[C]:
    return [generated(function) for function in of.values()]


max_pool1d, max_pool2d, max_pool3d = _pools(_pooling.max_poolNd)
(avg_pool1d,) = _pools(_pooling.avg_pool1d)
avg_pool2d, avg_pool3d = _pools(_pooling.avg_poolNd)
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = _pools(_pooling.adaptive_avg_poolNd)
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = _pools(_pooling.adaptive_max_poolNd)
lp_pool1d, lp_pool2d, lp_pool3d = _pools(_pooling.lp_poolNd)
max_unpool1d, max_unpool2d, max_unpool3d = _pools(_pooling.max_unpoolNd)
fractional_max_pool2d, fractional_max_pool3d = map(  # at random: no two calls are the same
    overridable, _pooling.fractional_max_poolNd.values()
)


@generated
def unfold(
    input: T, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> T:
    """Pictures (N, C, H, W) to columns (N, C K K, L): what lies under each window, K by K; see
    `nnmirror.rules.fold.Im2Col`."""
    how = [_pair(v) for v in (kernel_size, dilation, padding, stride)]
    if not isinstance(input, T):
        raise unplaced(torch._C._nn.im2col, (input, *how), {})
    return _fold.im2col(input, *how)


@generated
def fold(
    input: T,
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> T:
    """Columns (N, C K K, L) added up to pictures (N, C, *output_size), each where its window lies;
    see `nnmirror.rules.fold.Col2Im`."""
    how = [_pair(v) for v in (output_size, kernel_size, dilation, padding, stride)]
    if not isinstance(input, T):
        raise unplaced(torch._C._nn.col2im, (input, *how), {})
    return _fold.col2im(input, *how)


def _pair(value: Size) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value, value)


_SIZES_DIFFER = (
    "Using a target size ({}) that is different to the input size ({}). This will likely lead"
    " to incorrect results due to broadcasting. Please ensure they have the same size."
)


@generated
def mse_loss(
    input: T,
    target: T,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: T | None = None,
) -> T:
    """The squared error, its mean or its sum. With `weight`, the weighted mean.

    See `nnmirror.rules.loss.MseLoss`.
    """
    differ = warn_if_sizes_differ(input, target)
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if weight is None:
        if differ:
            return mse_of_broadcast(input, target, reduction)
        return record(_loss.MseLoss, (input, target, checked_reduction(reduction)))[0]
    if differ:
        input, target = broadcast_tensors(input, target)
    if weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")
    error = record(Pow, (record(Sub, (input, target))[0], 2))[0]
    return _weighted_mean(error, weight, reduction)


def mse_of_broadcast(input: T, target: T, reduction: str) -> T:
    """`mse_loss` of two shapes: broadcast first, as in PyTorch, which sums gradients there."""
    number = checked_reduction(reduction)
    return record(_loss.MseLoss, (*broadcast_tensors(input, target), number))[0]


def _weighted_mean(error: T, weight: T, reduction: str) -> T:
    weighted = record(Mul, (error, weight))[0]
    if reduction == "none":
        return weighted
    total = record(Sum, (weighted,))[0]
    if reduction == "sum":
        return total
    if reduction == "mean":
        return record(Div, (total, record(Sum, (weight,))[0]))[0]
    raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")


def warn_if_sizes_differ(input: T, target: T, stacklevel: int = 4) -> bool:
    """Do input and target have the same shape? With PyTorch's warning if a loss broadcasts; for
    tuples, item by item."""
    if type(input) is tuple:
        for pair in zip(input, target, strict=False):
            warn_if_sizes_differ(*pair, stacklevel)
        return False
    if type(input) is Tensor and type(target) is T:
        node = input._node  # which has the shape, faster than `size`
        if node is not None and node.outputs[input._output_nr][0] == target.shape:
            return False
    with DisableTorchFunctionSubclass():  # a method of a tracked tensor is slow
        sizes = target.size(), input.size()
    if sizes[0] == sizes[1]:
        return False
    warn(_SIZES_DIFFER.format(*sizes), stacklevel=stacklevel)
    with DisableTorchFunctionSubclass():
        torch.broadcast_tensors(input, target)  # raises first
    return True


@generated
def l1_loss(
    input: T,
    target: T,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: T | None = None,
) -> T:
    """|x - t|, its mean or its sum:  dx = g sign(x - t) / n. With `weight`, the weighted mean."""
    differ = warn_if_sizes_differ(input, target)
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    size = input.size()
    if differ:
        input, target = broadcast_tensors(input, target)
    if weight is None:
        return _loss.absolute_error(input, target, checked_reduction(reduction))
    if weight.size() != size:
        raise ValueError("Weights and input must have the same size.")
    return _weighted_mean(_loss.absolute_error(input, target, "none"), weight, reduction)


@generated
def smooth_l1_loss(
    input: T,
    target: T,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> T:
    """Squared where |x - t| < beta, absolute beyond; see `nnmirror.rules.loss.SmoothL1Loss`."""
    differ = warn_if_sizes_differ(input, target)
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if differ:
        input, target = broadcast_tensors(input, target)
    if beta == 0.0:
        return _loss.absolute_error(input, target, checked_reduction(reduction))
    return record(_loss.SmoothL1Loss, (input, target, reduction_number(reduction), beta))[0]


@generated
def huber_loss(
    input: T,
    target: T,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: T | None = None,
) -> T:
    """Squared where |x - t| < delta, absolute beyond; see `nnmirror.rules.loss.HuberLoss`."""
    differ = warn_if_sizes_differ(input, target)
    size = input.size()
    if differ:
        input, target = broadcast_tensors(input, target)
    if weight is None:
        return record(_loss.HuberLoss, (input, target, reduction_number(reduction), delta))[0]
    if weight.size() != size:
        raise ValueError("Weights and input must have the same size.")
    error = record(_loss.HuberLoss, (input, target, 0, delta))[0]
    weighted = record(Mul, (error, weight))[0]
    if reduction == "none":
        return weighted
    if reduction in ("mean", "sum"):  # here PyTorch's mean is over the elements
        return record(Mean if reduction == "mean" else Sum, (weighted,))[0]
    raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")


@generated
def binary_cross_entropy(
    input: T,
    target: T,
    weight: T | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> T:
    """-log of the probability of the target; see `nnmirror.rules.loss.BinaryCrossEntropy`."""
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    number = reduction_number(reduction)
    if target.size() != input.size():
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size"
            f" ({input.size()}) is deprecated. Please ensure they have the same size."
        )
    if weight is not None:
        weight = expand(weight, broadcast_shapes(target.size(), weight.size()))
    return record(_loss.BinaryCrossEntropy, (input, target, weight, number))[0]


@generated
def binary_cross_entropy_with_logits(
    input: T,
    target: T,
    weight: T | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: T | None = None,
) -> T:
    """`binary_cross_entropy` of sigmoid(x).

    See `nnmirror.rules.loss.BinaryCrossEntropyWithLogits`.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    number = reduction_number(reduction)
    if not (target.size() == input.size()):
        raise ValueError(
            f"Target size ({target.size()}) must be the same as input size ({input.size()})"
        )
    args = input, target, weight, pos_weight, number
    return record(_loss.BinaryCrossEntropyWithLogits, args)[0]


@generated
def nll_loss(
    input: T,
    target: T,
    weight: T | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> T:
    """The negative log-likelihood of the classes in target; see `nnmirror.rules.loss.NllLoss`."""
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    return _loss.nll_loss_nd(input, target, weight, reduction_number(reduction), ignore_index)


@generated
def cross_entropy(
    input: T,
    target: T,
    weight: T | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> T:
    """`nll_loss` of log_softmax(x), for classes or probabilities as targets.

    dx = (softmax(x) - p) g / n, with p the target's probabilities: see
    `nnmirror.rules.loss.cross_entropy_loss`.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    number = reduction_number(reduction)
    return _loss.cross_entropy_loss(input, target, weight, number, ignore_index, label_smoothing)


@generated
def kl_div(
    input: T,
    target: T,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> T:
    """The divergence of exp(x) from the target; see `nnmirror.rules.composed.kl_div`.

    "batchmean" is the sum over the number of rows, "mean" that over the number of elements.
    """
    if size_average is not None or reduce is not None:
        number = reduction_number(legacy_reduction(size_average, reduce))
    else:
        if reduction == "mean":
            warn(
                "reduction: 'mean' divides the total loss by both the batch size and the support"
                " size.'batchmean' divides only by the batch size, and aligns with the KL div math"
                " definition.'mean' will be changed to behave the same as 'batchmean' in the next"
                " major release.",
                stacklevel=3,
            )
        number = reduction_number("sum" if reduction == "batchmean" else reduction)
    loss = _composed.kl_div(input, target, number, log_target=log_target)
    if reduction == "batchmean" and input.dim() != 0:
        loss = loss / input.size()[0]
    return loss


@generated
def poisson_nll_loss(
    input: T,
    target: T,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> T:
    """-log of the probability of counts; see `nnmirror.rules.composed.poisson_nll_loss`."""
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    if reduction not in _loss.REDUCTIONS:
        raise ValueError(reduction + " is not a valid value for reduction")
    number = reduction_number(reduction)
    return _composed.poisson_nll_loss(input, target, log_input, full, eps, number)


@overridable
def gaussian_nll_loss(
    input: T,
    target: T,
    var: T | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> T:
    """l = (log v + (x - t)^2 / v) / 2, v = `var`, eps at least (no gradient sees that)

    dx = g (x - t) / v,  dv = g (1 / v - (x - t)^2 / v^2) / 2. With `full`, log(2 pi) / 2 is
    added. `var` has the shape of x, or lacks the last dimension, or has one of size one.
    """
    if isinstance(var, float):
        if var < 0:
            raise ValueError("var has negative entry/entries")
        var = var * torch.ones_like(input)
    elif torch.any(var < 0):
        raise ValueError("var has negative entry/entries")
    sizes = list(input.size()), list(var.size())
    if sizes[0] != sizes[1]:
        if sizes[0][:-1] == sizes[1]:
            var = unsqueeze(var, -1)
        elif (
            len(sizes[0]) != len(sizes[1])
            or sum(v for x, v in zip(*sizes, strict=True) if x != v) != 1
        ):
            raise ValueError("var is of incorrect size")
    if reduction not in _loss.REDUCTIONS:
        raise ValueError(reduction + " is not valid")
    spread: T = record(Clone, (var,))[0]
    with DisableTorchFunctionSubclass(), torch.no_grad():
        spread.clamp_(min=eps)
    squared = record(Pow, (record(Sub, (input, target))[0], 2))[0]
    loss = 0.5 * (torch.log(spread) + squared / spread)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return _composed.reduced(loss, reduction_number(reduction))


@generated
def hinge_embedding_loss(
    input: T,
    target: T,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> T:
    """Distances: small where the target is 1.

    See `nnmirror.rules.composed.hinge_embedding_loss`.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    return _composed.hinge_embedding_loss(input, target, margin, reduction_number(reduction))


@generated
def margin_ranking_loss(
    input1: T,
    input2: T,
    target: T,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> T:
    """Which of two is to be the larger; see `nnmirror.rules.composed.margin_ranking_loss`."""
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    number = reduction_number(reduction)
    if input1.dim() != input2.dim() or input1.dim() != target.dim():
        raise RuntimeError(
            "margin_ranking_loss : All input tensors should have same dimension but got sizes:"
            f" input1: {input1.size()}, input2: {input2.size()}, target: {target.size()} "
        )
    return _composed.margin_ranking_loss(input1, input2, target, margin, number)


@generated
def cosine_embedding_loss(
    input1: T,
    input2: T,
    target: T,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> T:
    """Rows alike or not, by their cosine; see `nnmirror.rules.composed.cosine_embedding_loss`."""
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    number = reduction_number(reduction)
    return _composed.cosine_embedding_loss(input1, input2, target, margin, number)


@generated
def triplet_margin_loss(
    anchor: T,
    positive: T,
    negative: T,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> T:
    """One row nearer to the anchor than another.

    See `nnmirror.rules.composed.triplet_margin_loss`.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    number = reduction_number(reduction)
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")
    return _composed.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, number)


@generated
def soft_margin_loss(
    input: T,
    target: T,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> T:
    """log(1 + exp(-t x)), for targets of 1 and -1; see `nnmirror.rules.loss.SoftMarginLoss`."""
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    return record(_loss.SoftMarginLoss, (input, target, reduction_number(reduction)))[0]


@generated
def multilabel_soft_margin_loss(
    input: T,
    target: T,
    weight: T | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> T:
    """-(t log s + (1 - t) log(1 - s)) with s = sigmoid(x), averaged over the classes

    dx = g (s - t) w / C, C the number of classes, which are the last dimension.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    yes = record(Mul, (target, _activation.logsigmoid(input)))[0]
    no = record(
        Mul, (record(Rsub, (target, 1))[0], _activation.logsigmoid(record(Neg, (input,))[0]))
    )[0]
    loss = -(yes + no)
    if weight is not None:
        loss = record(Mul, (loss, weight))[0]
    along = input.dim() - 1
    loss = loss.sum(dim=along) / input.size(along)
    if reduction not in _loss.REDUCTIONS:
        raise ValueError(reduction + " is not valid")
    return _composed.reduced(loss, reduction_number(reduction))


def reduction_number(reduction: str) -> int:
    """The reduction as PyTorch's kernels number it, or PyTorch's error."""
    return _loss.REDUCTIONS.index(checked_reduction(reduction, 5))


def checked_reduction(reduction: str, stacklevel: int = 4) -> str:
    """`reduction` as "none", "mean" or "sum", or PyTorch's error."""
    if reduction in _loss.REDUCTIONS:
        return reduction
    if reduction == "elementwise_mean":
        warnings.warn(
            "reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.",
            stacklevel=stacklevel,
        )
        return "mean"
    raise ValueError(f"{reduction} is not a valid value for reduction")


def legacy_reduction(size_average: bool | None, reduce: bool | None, stacklevel: int = 4) -> str:
    """The reduction that the deprecated arguments `size_average` and `reduce` ask for."""
    if reduce is not None and not reduce:
        reduction = "none"
    else:
        reduction = "mean" if size_average is None or size_average else "sum"
    warn(
        "size_average and reduce args will be deprecated, please use"
        f" reduction='{reduction}' instead.",
        stacklevel=stacklevel,
    )
    return reduction


for _file in (_activation, _linear_rules, _prelu, _softmax):
    __all__ += _file.__all__
for _name in __all__:  # those of other files too, by the name that a user imports and pickles
    globals()[_name].__module__ = __name__

NAMED.update({("torch.nn.functional", name): globals()[name] for name in __all__})
NAMED["torch.nn.functional", "_threshold"] = _activation.threshold  # its name there
for _name, _function in _pooling.FUNCTIONS.items():  # not those with indices
    NAMED["torch.nn.functional", _name] = globals().get(_name, _function)

if not TYPE_CHECKING:  # a type checker reports such a name itself
    __getattr__ = missing(__name__, __all__)
