"""Batch normalisation, rounded as PyTorch's CPU kernels round it.

The backward sums in one of three orders, by the memory layout of x and g: row by row (channels
last), plane by plane (contiguous), or element by element. On another device than the CPU the plain
formula is used.
"""

from collections.abc import Sequence

import torch

from .._types import IndexLike
from ..rules import batchnorm
from .attach import exact_of
from .normalization import row_sum, rows_added, rows_fused, rows_in_turn

T = torch.Tensor


def _memory_format(x: T, g: T) -> torch.memory_format | None:
    """The one in which both are dense."""
    formats = [torch.contiguous_format]
    if x.dim() in (4, 5):
        formats.append(torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    for format in formats:
        if all(t.is_contiguous(memory_format=format) for t in (x, g)):
            return format
    return None


_LAYERS = [f"{kind}Norm{n}d" for kind in ("Batch", "Instance") for n in (1, 2, 3)]


@exact_of(batchnorm.NativeBatchNorm, *_LAYERS, units=128)
class NativeBatchNorm(batchnorm.NativeBatchNorm):
    """The gradients are those of the rule; their sums in the kernel's order."""

    is_recordable = False

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
        x, w = input, weight
        if not x.is_cpu:
            plain = batchnorm.NativeBatchNorm.gradients
            return plain(needs, g, x, w, running_mean, running_var, training, eps, mean, r)
        if not training:
            assert running_mean is not None
            assert running_var is not None
            mean = running_mean
            r = (running_var.double() + eps).rsqrt()
        layout, values = _memory_format(x, g), x
        if layout is torch.contiguous_format and x.dim() > 3:
            g, values = g.flatten(2), x.flatten(2)
        # 16 bits are widened except where the kernel's scalar path rounds each step.
        dtype = x.dtype
        wide = torch.float32 if dtype.itemsize == 2 and layout is not None else dtype
        by = (-1, *[1] * (values.dim() - 2))
        if layout is None:
            r = r.to(mean.dtype)
        else:
            g, mean, r = g.to(wide), mean.to(wide), r.to(wide)
            w = None if w is None else w.to(wide)
        n = x.numel() // x.shape[1]
        centred = values - mean.view(by)
        sum_g, d, fused = _sums(g, centred, layout, n, dtype)
        dx = dw = db = None
        if needs[0]:
            dx = g
            if training:
                k = d.to(wide) * r * r
                count = torch.tensor(n, dtype=k.dtype, device=k.device)
                k = (k / count).to(wide).view(by)
                rest = g - (sum_g / count.to(sum_g.dtype)).to(wide).view(by)
                dx = rest - (centred * k).to(wide)
                if fused is not None:
                    dx[fused] = torch.addcmul(rest, centred, -k)[fused]
            dx = dx * r.view(by)
            if w is not None:
                dx = dx * w.view(by)
            dense = layout or torch.preserve_format
            dx = torch.empty_like(x, memory_format=dense).copy_(dx.reshape(x.shape))
        if needs[1]:
            dw = d * r
        if needs[2]:
            db = sum_g
        return dx, dw, db


def _sums(
    g: T, centred: T, layout: torch.memory_format | None, n: int, dtype: torch.dtype
) -> tuple[T, T, IndexLike]:
    """sum of g and sum of g (x - mean), per channel.

    And for which elements of dx the kernel subtracts (x - mean) k from the rest without rounding it
    first.
    """
    channels = g.shape[1]
    narrow, lanes = dtype.itemsize == 2, 32 // dtype.itemsize
    total = torch.float32 if narrow else torch.float64
    if layout is None:
        around = [0, *range(2, g.dim())]
        # In the memory order of x.
        dims = sorted(around, key=centred.stride, reverse=True)
        products = (centred * g).permute(*dims, 1).reshape(n, channels)
        kept = torch.float32 if dtype is torch.float16 else dtype
        return g.sum(around, dtype=kept), rows_in_turn(products.to(total)), None
    planes = layout is torch.contiguous_format and n > len(g)
    if planes and not narrow:
        x_rows, g_rows = (t.reshape(-1, n // len(g)) for t in (centred, g))
        sums = row_sum(g_rows, None, False, False), row_sum(x_rows, g_rows, False, False)
        sum_g, d = (rows_in_turn(s.view(len(g), channels).to(total)) for s in sums)
        return sum_g, d, ...
    if planes:
        sum_g, d = _narrow_planes(g, centred, dtype is torch.float16)
        last = g.shape[-1]
        fused = last if dtype is torch.float16 else last - last % lanes
        return sum_g, d, (..., slice(fused))
    rows = [t.movedim(1, -1).reshape(n, channels) for t in (g, centred)]
    sum_g = rows_added(rows[0], g.dtype, None, total)
    d = rows_added(rows[0], g.dtype, rows[1], total)
    # In float32 and float64 the channels that fill a register, in bfloat16 the rest.
    end = channels - channels % lanes
    part = {torch.float16: slice(None), torch.bfloat16: slice(end, None)}.get(dtype, slice(end))
    return sum_g, d, (slice(None), part)


def _narrow_planes(g: T, centred: T, half: bool) -> tuple[T, T]:
    """The two sums where the kernel converts from 16 bits.

    All registers of all planes are added to one register, and the remaining elements to one number.
    """
    batch, channels, size = g.shape
    end = size - size % 16

    def registers(t: T) -> T:
        parts = t[..., :end].reshape(batch, channels, end // 8, 8)
        return parts.transpose(1, 2).reshape(-1, channels * 8)

    def rest(t: T) -> T:
        return t[..., end:].transpose(1, 2).reshape(-1, channels)

    def added(low: T, lanes: T) -> T:
        return low + rows_in_turn(lanes.view(channels, 8).t())

    sum_g = added(rows_in_turn(rest(g)), rows_in_turn(registers(g)))
    low = rest(centred), rest(g)
    d = added(
        rows_fused(*low, g.dtype) if half else rows_in_turn(low[0] * low[1]),
        rows_fused(registers(centred), registers(g), g.dtype),
    )
    return sum_g, d
