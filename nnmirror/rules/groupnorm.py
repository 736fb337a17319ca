"""Group normalisation, over the channels of a group and all positions.

    y = (x - mean) r w + b,  r = 1 / sqrt(var + eps) per image and group, w and b per channel:

    db = sum of g,  dw = sum of g z,  z = (x - mean) r,  over images and places
    dx = r (g w - mean(g w) - z mean(g w z)), the means over each group

The forward is PyTorch's kernel. float16 and bfloat16 are computed in float32, as it does. PyTorch's
backward kernel sums in an order of its own; the formula here is as accurate. In a recorded walk
(`create_graph=True`) the gradient consists of the same operations as in PyTorch.
"""

import torch

from .._torch import is_torch_function_enabled as is_recorded  # which a walk is then
from ..tape import record
from .kernel import memory_format
from .normalization import InverseStdOf, MeanOf, like
from .registry import Gradients, Needs, Rule, composite, stands_for, unplaced
from .shape import contiguous

T = torch.Tensor


@stands_for(torch.group_norm)
class NativeGroupNorm(Rule):
    """y = (x - mean) r w + b over the channels of each group, r = 1 / sqrt(var + eps):

        db = sum of g,  dw = sum of g z,  z = (x - mean) r,
        dx = r (g w - mean(g w) - z mean(g w z))

    Saved: x, w, and mean and r of each group.
    """

    infer = staticmethod(torch.group_norm)
    keeps = derived = ("mean", "r")
    counted = (0, 2, 3)  # PyTorch's node has a place for a missing weight

    @staticmethod
    def forward(
        input: T, num_groups: int, weight: T | None = None, bias: T | None = None, eps: float = 1e-5
    ) -> tuple[T, T, T]:
        try:
            n, c, *places = input.shape
            size = torch.Size(places).numel()
            return torch.native_group_norm(input, weight, bias, n, c, size, num_groups, eps)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            raise unplaced(torch.group_norm, (input, num_groups, weight, bias, eps), {}) from None

    @staticmethod
    def mean_again(input: T, mean: T) -> T:
        rows = _of_groups(input, mean)
        return record(MeanOf, (rows, mean, (len(rows), 1)))[0]  # type: ignore[no-any-return]

    @staticmethod
    def r_again(input: T, mean: T, r: T) -> T:
        rows = _of_groups(input, r)
        return record(InverseStdOf, (rows, mean, r, (len(rows), 1)))[0]  # type: ignore[no-any-return]

    @staticmethod
    def gradients(
        needs: Needs,
        g: T,
        input: T,
        num_groups: int,
        weight: T | None,
        mean: T,
        r: T,
    ) -> Gradients:
        need_x, _, need_w, need_b, *_ = needs
        if is_recorded():
            return _recorded(need_x, need_w, need_b, g, input, num_groups, weight, mean, r)
        x, w = input, weight
        if x.dtype.itemsize == 2:
            x, g, mean, r = x.float(), g.float(), mean.float(), r.float()
            w = None if w is None else w.float()
        x, g = (t.unflatten(1, (num_groups, -1)) for t in (x, g))
        n, groups, channels, *places = x.shape
        dims = tuple(range(3, x.dim()))
        of_group, of_channel = [1] * (x.dim() - 2), (n, groups, channels, *[1] * len(dims))
        sum_g = g.sum(dims) if dims else g  # per image and channel
        db = None
        if need_b:
            db = sum_g.sum(0).reshape(-1).to((input if weight is None else weight).dtype)
        dx = dw = None
        if need_x or need_w:
            dx = x - mean.view(n, groups, *of_group)
            d = (g * dx).sum(dims) if dims else g * dx
            r = r.view(n, groups, 1)
            if need_w:
                dw = (d * r).sum(0).reshape(-1)
        if need_x:
            assert dx is not None
            share = -1.0 / max(1, channels * torch.Size(places).numel())
            scale = r
            if w is not None:
                w = w.view(groups, channels)
                sum_g, d, scale = sum_g * w, d * w, r * w
            slope = d.sum(2) * share * r.squeeze(2).pow(3)
            shift = sum_g.sum(2) * share * r.squeeze(2)
            dx.mul_(slope.view(n, groups, *of_group))
            dx.addcmul_(g, scale.expand(n, groups, channels).reshape(of_channel))
            dx = dx.add_(shift.view(n, groups, *of_group)).flatten(1, 2)
        return like(dx if need_x else None, input), None, like(dw, weight), db, None


def _of_groups(input: T, mean: T) -> T:
    """The elements of each mean, in a row."""
    return input.reshape(mean.numel(), input.numel() // max(1, mean.numel()))


def _recorded(
    need_x: bool,
    need_w: bool,
    need_b: bool,
    g: T,
    input: T,
    groups: int,
    weight: T | None,
    mean: T,
    r: T,
) -> Gradients:
    """The same as recorded operations, in PyTorch's order."""
    n, c = input.shape[:2]
    shape = n, groups, c // groups, input.shape[2:].numel()
    x, g = input.reshape(shape), g.reshape(shape)
    mean, r = mean.reshape(n, groups, 1, 1), r.reshape(n, groups, 1, 1)
    s = 1.0 / max(1, x.shape[2] * x.shape[3])
    ds, db = (g * x).sum(3).unsqueeze(-1), g.sum(3).unsqueeze(-1)
    dx = dw = None
    if need_x:
        a, p, q = r, ds, db
        if weight is not None:
            w = weight.reshape(1, groups, -1, 1)
            a, p, q = r * w, ds * w, db * w
        p, q = p.sum(2).unsqueeze(-2), q.sum(2).unsqueeze(-2)
        p = (q * mean - p) * (r * r * r) * s
        q = -p * mean - q * r * s
        dx = (a * g + p * x + q).reshape(input.shape)
    if need_w:
        dw = ((ds - db * mean) * r).sum(0).reshape(-1)
    return dx, None, dw, db.sum(0).reshape(-1) if need_b else None, None


@composite(torch.group_norm)
def group_norm(
    input: T,
    num_groups: int,
    weight: T | None = None,
    bias: T | None = None,
    eps: float = 1e-05,
    cudnn_enabled: bool = True,
) -> T:
    if isinstance(input, T):
        input = contiguous(input, memory_format(input))
    # The kernel reads these without their strides.
    weight, bias = (contiguous(t) if isinstance(t, T) else t for t in (weight, bias))
    return record(NativeGroupNorm, (input, num_groups, weight, bias, eps))[0]
