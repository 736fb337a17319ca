"""Batch normalisation.

    y = (x - mean) r w + b,  r = 1 / sqrt(var + eps), per channel; in training mean and var are
    those of the batch, of n elements per channel, in evaluation the running ones:

    db = sum of g,  d = sum of g (x - mean),  dw = d r
    dx = (g - sum(g) / n - (x - mean) d r^2 / n) r w in training, g r w in evaluation

The forward is PyTorch's kernel. float16 and bfloat16 are computed in float32. In exact mode the
backward rounds as PyTorch's kernels do (see `nnmirror.exact.batchnorm`).
"""

from collections.abc import Sequence
from typing import Any

import torch

from .. import _torch
from .._torch import DisableTorchFunctionSubclass
from ..tape import record
from .arithmetic import Add, Mul
from .normalization import rows_at_once
from .registry import Rule, composite, stands_for, unplaced
from .shape import Clone, select

T = torch.Tensor


def _infer(*args: Any) -> T:
    return torch.batch_norm(*args, torch.backends.cudnn.enabled)  # type: ignore[call-arg]


@stands_for(torch.batch_norm, True)
class NativeBatchNorm(Rule):
    """y = (x - mean) r w + b, per channel; the gradients are above.

    Saved: x, w, the running mean and variance, and mean and r of the batch.
    """

    infer = staticmethod(_infer)
    keeps = derived = ("mean", "r")
    counted = (0, 1, 2)  # PyTorch's node has a place for a weight that is not there

    @staticmethod
    def forward(
        input: T,
        weight: T | None,
        bias: T | None,
        running_mean: T | None,
        running_var: T | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> tuple[T, T, T]:
        args = input, weight, bias, running_mean, running_var, training, momentum, eps
        cudnn = torch.backends.cudnn.enabled
        try:
            return _torch.batch_norm_impl_index(*args, cudnn)[:3]
        except TypeError:
            raise unplaced(torch.batch_norm, (*args, cudnn), {}) from None

    @staticmethod
    def gradients(
        needs: Sequence[bool],
        g: T,
        input: T,
        weight: T | None,
        running_mean: T | None,
        running_var: T | None,
        training: bool,
        eps: float,
        mean: T,
        r: T,
    ) -> tuple[T | None, ...]:
        need_x, need_w, need_b, *_ = needs
        x, w = input, weight
        if not training:
            assert running_mean is not None
            assert running_var is not None
            mean, r = running_mean, running_var
        if x.dtype.itemsize == 2:
            g, x, mean, r = g.float(), x.float(), mean.float(), r.float()
            w = None if w is None else w.float()
        if not training:
            r = torch.rsqrt(r + eps)
        scale, dims = r if w is None else r * w, [0, *range(2, x.dim())]
        if not training and not need_w:
            dx = g * _by_channel(scale, x) if need_x else None
            return dx, None, g.sum(dims) if need_b else None
        mean, size = _by_channel(mean, x), rows_at_once(x)
        in_one = len(x) <= size
        if in_one:
            centred = x - mean
            dx = centred * g
            sum_g, d = g.sum(dims), dx.sum(dims)
        else:
            centred, dx = torch.empty_like(x[:size]), torch.empty_like(x)
            sum_g, d = torch.zeros_like(r), torch.zeros_like(r)
            for part, g_part in zip(x.split(size), g.split(size), strict=True):
                product = torch.sub(part, mean, out=centred[: len(part)]).mul_(g_part)
                sum_g.add_(g_part.sum(dims))
                d.add_(product.sum(dims))
        dw = d * r
        if not need_x:
            return None, dw, sum_g
        scale = _by_channel(scale, x)
        if not training:
            return torch.mul(g, scale, out=dx), dw, sum_g
        of_g, slope = _by_channel(sum_g, x), _by_channel(dw * r, x)
        per_number = -x.shape[1] / x.numel()

        def to_x(g: T, centred: T, dx: T) -> T:
            torch.addcmul(g, centred, slope, value=per_number, out=dx)
            return dx.add_(of_g, alpha=per_number).mul_(scale)

        if in_one:
            return to_x(g, centred, dx), dw, sum_g
        for part, g_part, to in zip(x.split(size), g.split(size), dx.split(size), strict=True):
            to_x(g_part, torch.sub(part, mean, out=centred[: len(part)]), to)
        return dx, dw, sum_g


def _by_channel(values: T, x: T) -> T:
    """One value for each channel of x, as an operand for x."""
    return values if x.dim() == 2 else values.view(-1, *[1] * (x.dim() - 2))


@composite(torch.batch_norm)
def batch_norm(
    input: T,
    weight: T | None,
    bias: T | None,
    running_mean: T | None,
    running_var: T | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> T:
    args = input, weight, bias, running_mean, running_var, training, momentum, eps
    if isinstance(input, T) and input.numel() == 0:
        return _of_nothing(*args)
    return record(NativeBatchNorm, args)[0]


def _of_nothing(input: T, weight: T | None, bias: T | None, *how: Any) -> T:
    """An empty batch: other nodes, gradients of zeros, and the running statistics stay."""
    with DisableTorchFunctionSubclass(), torch.no_grad():
        _infer(input, weight, bias, *how)  # raises PyTorch's errors
    y = record(Clone, (input,))[0]
    if weight is not None:
        y = record(Mul, (y, select(weight, 0, 0)))[0]
    return y if bias is None else record(Add, (y, select(bias, 0, 0)))[0]
