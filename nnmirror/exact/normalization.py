"""Layer normalisation, rounded as PyTorch's CPU kernels round it.

    db = sum of the rows of g,  dw = sum of the rows of g (r x - r mean)
    dx = r g w + p x + q,  p = (mean sum(g w) - sum(g w x)) r^3 / n,  q = -p mean - r sum(g w) / n

Everything around the formulas reproduces the order of summation: each row by the lanes of a vector
register, the rows one after another, with fused multiply-adds, as `torch.addcmul` computes them. On
another device than the CPU the plain formula is used.
"""

import functools
import itertools
from collections.abc import Sequence

import torch

from .. import _torch
from ..grad_mode import outside_inference_mode
from ..rules import normalization
from ..rules.kernel import add_rows, in_turn
from .attach import exact_of

T = torch.Tensor


def row_sum(x: T, times: T | None, narrow: bool, mixed: bool) -> T:
    """The sum of each row of x, or of x times another.

    `narrow` if the kernel converts from 16 bits, `mixed` if the weight has 32 bits then. By lanes
    of 32 bytes on every machine; the remainder is added last, with fused multiply-adds. For input
    converted from 16 bits, all multiply-adds are fused.
    """
    terms = x if times is None else x * times
    if not x.is_cpu:
        return terms.sum(-1)
    n, lanes = x.shape[-1], 32 // x.dtype.itemsize
    width = lanes * (1 + narrow)  # a register of 16-bit numbers fills two of 32-bit ones

    def added_last(total: T, start: int) -> T:
        rest = n - start
        head = total[:, :rest]
        if times is None:
            head = head + terms[:, start:]
        else:
            head = torch.addcmul(head, x[:, start:], times[:, start:])
        return torch.cat([head, total[:, rest:]], 1)

    if n <= lanes and n < width:
        return in_turn(terms, n)
    if n < width:
        total = added_last(terms[:, :lanes], lanes)
    else:
        end = n - n % width
        if narrow and times is not None:
            parts = zip(x[:, :end].split(width, 1), times[:, :end].split(width, 1), strict=True)
            total = terms[:, :width]
            for a, b in itertools.islice(parts, 1, None):
                total = torch.addcmul(total, a, b)
        else:
            total, *others = terms[:, :end].split(width, 1)
            for part in others:
                total = total + part
        if n > end:
            total = added_last(total, end)
        if narrow:
            total = total[:, :lanes] + total[:, lanes:]
    no_shuffle = torch.backends.cpu.get_cpu_capability() == "DEFAULT" or x.dtype is torch.float64
    if no_shuffle or (n < width and not mixed):
        return in_turn(total, lanes)
    while lanes > 1:
        lanes //= 2
        low, high = total.split(lanes, 1)
        total = low + high
    return total[:, 0]


def _over_threads(m: int) -> list[slice]:
    """The rows of each of PyTorch's threads."""
    each = -(-m // min(torch.get_num_threads(), m))
    return [slice(start, start + each) for start in range(0, m, each)]


def rows_in_turn(rows: T) -> T:
    """The sum of the rows, one after another."""
    if not rows.is_cpu:
        return rows.sum(0)
    every = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    return add_rows(rows.new_zeros(1, rows.shape[1]), every, rows)[0]


def rows_fused(rows: T, times: T, dtype: torch.dtype) -> T:
    """The sum of the rows times those of another, each step rounded once, to `dtype`.

    Many rows are summed by matrix products, if those of this machine sum in that order. Else there
    is one call per row, which takes ten times as long as the kernel, or more.
    """
    if dtype is rows.dtype and len(rows):
        if len(rows) > _BLOCK // 2:
            how = rows.shape[1], dtype, torch.get_num_threads()
            width = _product_width(*how, torch.get_float32_matmul_precision())
            if width:
                return _by_products(rows, times, width)
        return _one_by_one(rows, times)
    total = rows.new_zeros(rows.shape[1])
    for row, other in zip(rows.unbind(), times.unbind(), strict=True):
        total = total.addcmul_(row, other).to(dtype).to(rows.dtype)
    return total


def _one_by_one(rows: T, times: T) -> T:
    total = rows.new_zeros(rows.shape[1])
    # Into one, each after the other.
    _torch.foreach_addcmul_([total] * len(rows), rows.unbind(), times.unbind())
    return total


# A matrix product processes this many rows, and the total so far, as one block.
_BLOCK = 127
_WIDTHS = (16, 12, 32, 24, 48)


def _by_products(rows: T, times: T, width: int) -> T:
    """The sum of the rows times those of another, from the diagonals of products of matrices.

    The columns are taken `width` at a time, which fills the registers of a matrix product: it then
    sums each element term by term, as fused multiply-adds, if there are not too many terms. So
    the rows are taken in blocks, and the total so far is the first row of the next, times 1.
    """
    n = rows.shape[1]
    groups, count = -(-n // width), -(-len(rows) // _BLOCK)

    def in_blocks(t: T, first: float) -> T:
        padded = t.new_zeros(count * _BLOCK, groups * width)
        padded[: len(t), :n] = t
        padded = padded.view(count, _BLOCK, -1)
        with_first = torch.cat([torch.full_like(padded[:, :1], first), padded], 1)
        return with_first.view(count, _BLOCK + 1, groups, width)

    left = in_blocks(rows, 0.0).permute(0, 2, 3, 1)
    right = in_blocks(times, 1.0).permute(0, 2, 1, 3)
    for i in range(count):
        total = torch.bmm(left[i], right[i]).diagonal(dim1=1, dim2=2)
        if i + 1 < count:
            left[i + 1, :, :, 0] = total
    return total.reshape(-1)[:n]


@functools.lru_cache(maxsize=1024)
def _product_width(n: int, dtype: torch.dtype, threads: int, precision: str) -> int:
    """The width for which `_by_products` has the bits of one call per row on this machine; 0 for
    none.

    `threads` and `precision` are PyTorch's settings, on which it may depend.
    """
    with _torch.DisableTorchFunction(), outside_inference_mode(), torch.no_grad():
        k = torch.arange(3 * _BLOCK * n, dtype=dtype, device="cpu").view(-1, n)
        rows, times = torch.sin(k * k), torch.cos(3 * k)
        expected = _one_by_one(rows, times)
        for width in _WIDTHS:
            if torch.equal(_by_products(rows, times, width), expected):
                return width
    return 0


def rows_added(g: T, dtype: torch.dtype, times: T | None, at_last: torch.dtype) -> T:
    """The sum of the rows of g, or of g times another, one row after another in each thread.

    Each step rounds once, to `dtype`. The sums of the threads are added in `at_last`.
    """
    if not g.is_cpu:
        return (g if times is None else g * times).sum(0)
    parts = []
    for part in _over_threads(len(g)):
        rows = g[part]
        if times is None and dtype is g.dtype:
            parts.append(rows_in_turn(rows))
            continue
        parts.append(
            rows_fused(rows, torch.ones_like(rows) if times is None else times[part], dtype)
        )
    if len(parts) == 1:
        return parts[0]
    return rows_in_turn(torch.stack(parts).to(at_last)).to(g.dtype)


@exact_of(normalization.NativeLayerNorm, "LayerNorm", units=1024)
class NativeLayerNorm(normalization.NativeLayerNorm):
    """y = (x - mean) r w + b over the last dimensions; the gradients are above."""

    is_recordable = False

    @staticmethod
    def gradients(
        needs: Sequence[bool], g: T, input: T, weight: T | None, bias: T | None, mean: T, r: T
    ) -> tuple[T | None, ...]:
        if not input.is_cpu or not input.numel():
            plain = normalization.NativeLayerNorm.gradients
            return plain(needs, g, input, weight, bias, mean, r)
        need_x, _, need_w, need_b, _ = needs
        x, w = input, weight
        dx = dw = db = None
        m, dtype = mean.numel(), x.dtype
        n, narrow = x.numel() // m, dtype.itemsize == 2
        g, rows = g.reshape(m, n), x.reshape(m, n)
        if narrow:
            g, rows, mean, r = (t.float() for t in (g, rows, mean, r))
        if bias is not None and need_b:
            db = rows_added(g, dtype, None, g.dtype).to(bias.dtype).reshape(bias.shape)
        mean, r = mean.reshape(m, 1), r.reshape(m, 1)
        if w is not None and need_w:
            normal = torch.addcmul((-r * mean).expand_as(rows), r, rows)
            dw = rows_added(g, dtype, normal, g.dtype).to(w.dtype).reshape(w.shape)
        if need_x:
            sums = functools.partial(row_sum, narrow=narrow, mixed=False)
            if w is None:
                gw, ds, dm = None, sums(g, rows), sums(g, None)
            elif w.dtype is dtype:
                w_row = w.reshape(1, n).to(g.dtype)
                gw = w_row.expand_as(g)
                # The rows of one below those of the other: each row is summed on its own.
                ds, dm = sums(torch.cat([g * rows, g]), w_row.expand(2 * m, n)).split(m)
            else:  # the kernel for a weight of higher precision than x multiplies in another order
                gw = w.reshape(1, n).expand_as(g)
                ds, dm = sums(g * gw, rows, mixed=True), sums(g * gw, None, mixed=True)
            ds, dm, scale = ds.unsqueeze(1), dm.unsqueeze(1), 1 / n
            p = torch.addcmul(-ds, dm, mean) * r * r * r * scale
            q = torch.addcmul(-(dm * r * scale), -p, mean)
            scaled = r * g if gw is None else r * g * gw
            dx = (torch.addcmul(scaled, p, rows) + q).to(dtype).reshape(x.shape)
        return dx, None, dw, db
