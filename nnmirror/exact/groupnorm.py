"""Group normalisation, rounded as PyTorch's CPU kernel rounds it: float32 and float64, contiguous.

    db = sum of g over the places of each image and channel,  ds that of g x
    dw = sum over the images of (ds - mean db) r
    dx = r w g + p x + q,  p = (mean sum(db w) - sum(ds w)) r^3 / n,  q = -p mean - r sum(db w) / n

with the last sums over the channels of a group, of n elements. The places are summed by the lanes
of a register of 32 bytes; so are the channels, with fused multiply-adds. What does not fill a
register is added last: 16 bytes together, then one by one, fused again. The plain formula is used
for 16 bits, for channels last, and on another device than the CPU.
"""

import torch

from ..rules import groupnorm
from ..rules.kernel import in_turn
from ..rules.registry import Gradients, Needs
from .attach import exact_of
from .normalization import row_sum

T = torch.Tensor


@exact_of(groupnorm.NativeGroupNorm, "GroupNorm", units=64)
class NativeGroupNorm(groupnorm.NativeGroupNorm):
    """As in `nnmirror.rules.groupnorm`, computed as by PyTorch's kernel."""

    is_recordable = False

    @staticmethod
    def gradients(
        needs: Needs, g: T, input: T, num_groups: int, weight: T | None, mean: T, r: T
    ) -> Gradients:
        x, w = input, weight
        plainly = groupnorm.is_recorded() or x.dtype.itemsize == 2 or not x.is_cpu
        if plainly or not (x.is_contiguous() and x.numel()):
            plain = groupnorm.NativeGroupNorm.gradients
            return plain(needs, g, x, num_groups, w, mean, r)
        need_x, _, need_w, need_b, *_ = needs
        n, c = x.shape[:2]
        shape = n, num_groups, c // num_groups
        rows, g_rows = (t.reshape(n * c, -1) for t in (x, g))
        db, ds = row_sum(g_rows, None, False, False), _product_sum(g_rows, rows)
        db, ds = db.view(shape), ds.view(shape)
        of_bias = in_turn(db.movedim(0, -1), n).reshape(c) if need_b else None
        mean, r = mean.view(n, num_groups, 1), r.view(n, num_groups, 1)
        dx = dw = None
        if need_w:
            total = torch.zeros_like(ds[0])
            centred = torch.addcmul(ds, -db, mean.expand_as(db))
            for image, its_r in zip(centred, r.expand_as(ds), strict=True):
                total = torch.addcmul(total, image, its_r)
            dw = total.view(c)
        if need_x:
            scale = (r if w is None else r * w.view(shape[1:])).expand(shape).unsqueeze(3)
            ds, db = (_over_channels(t, w, num_groups) for t in (ds, db))
            share = torch.full_like(db, 1 / (rows.shape[1] * shape[2]))
            mean, r = mean.squeeze(2), r.squeeze(2)
            p = torch.addcmul(-ds, db, mean) * r * r * r * share
            q = torch.addcmul(-p * mean, -(db * r), share)
            x, g = (t.reshape(*shape, -1) for t in (x, g))
            dx = torch.addcmul(p.view(n, -1, 1, 1) * x, scale.expand_as(x), g)
            dx = (dx + q.view(n, -1, 1, 1)).view(input.shape)
            if dx.stride() != input.stride():  # one place: either memory format
                dx = torch.empty_like(input).copy_(dx)
        return dx, None, dw, of_bias, None


def _product_sum(x: T, times: T) -> T:
    """The sum of each row of x times that of another; in float32 the remainder is not fused."""
    lanes = 32 // x.dtype.itemsize
    rest = x.shape[1] % lanes
    if x.dtype is torch.float64 or x.shape[1] <= lanes or not rest:
        return row_sum(x, times, False, False)
    terms = x * times
    total = terms[:, :lanes]
    for part in terms[:, lanes:-rest].split(lanes, 1) if x.shape[1] - rest > lanes else ():
        total = total + part
    total = torch.cat([total[:, :rest] + terms[:, -rest:], total[:, rest:]], 1)
    return row_sum(total, None, False, False)


def _over_channels(values: T, weight: T | None, groups: int) -> T:
    """The sum over the channels of each group of values times the weight."""
    w = torch.ones_like(values) if weight is None else weight.view(groups, -1).expand_as(values)
    count, lanes = values.shape[2], 32 // values.dtype.itemsize
    end = count - count % lanes
    total = torch.zeros_like(values[..., 0])
    if end:
        of_lanes = torch.zeros_like(values[..., :lanes])
        for i in range(0, end, lanes):
            part = slice(i, i + lanes)
            of_lanes = torch.addcmul(of_lanes, values[..., part], w[..., part])
        total = in_turn(of_lanes, lanes)
    for i in range(end, count):
        v, by = values[..., i], w[..., i]
        in_register = i < count - count % (lanes // 2)
        total = total + v * by if in_register else torch.addcmul(total, v, by)
    return total
