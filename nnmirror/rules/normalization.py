"""Layer normalisation.

    y = (x - mean) r w + b,  r = 1 / sqrt(var + eps), per row:

    db = sum of g,  dw = sum of g z,  z = (x - mean) r,  over the rows
    dx = r (g w - mean(g w) - z mean(g w z)), the means over each row

The forward is PyTorch's kernel. float16 and bfloat16 are computed in float32, as it does. In exact
mode the sums are added up in its order, too (see `nnmirror.exact.normalization`).
"""

from collections.abc import Sequence

import torch

from ..tape import record
from .registry import Rule, composite, stands_for, unplaced

T = torch.Tensor

# Elements: of a larger piece an operation finds in the cache nothing that the one before it wrote.
_PIECE = 1 << 18
_MOST_PIECES = 32


def rows_at_once(x: T) -> int:
    """How many rows of x to process at a time, so that intermediates stay in the cache."""
    numbers = max(_PIECE * torch.get_num_threads(), x.numel() // _MOST_PIECES)
    return max(1, numbers * len(x) // x.numel())


def like(gradient: T | None, tensor: T | None) -> T | None:
    """The gradient in the shape and dtype of its tensor."""
    if gradient is None or tensor is None:
        return None
    if gradient.dtype is not tensor.dtype:
        gradient = gradient.to(tensor.dtype)
    return gradient if gradient.shape == tensor.shape else gradient.reshape(tensor.shape)


def added(total: T | None, part: T) -> T:
    """The sum of the parts so far."""
    return part if total is None else total.add_(part)


@stands_for(torch.layer_norm)
class NativeLayerNorm(Rule):
    """y = (x - mean) r w + b over the last dimensions; the gradients are above.

    Saved: x, w, b, and mean and r of each row.
    """

    infer = staticmethod(torch.layer_norm)
    keeps = derived = ("mean", "r")
    counted = (0, 2, 3)  # PyTorch's node has a place for a weight that is not there

    @staticmethod
    def forward(
        input: T, normalized_shape: Sequence[int], weight: T | None, bias: T | None, eps: float
    ) -> tuple[T, T, T]:
        args = input, normalized_shape, weight, bias, eps
        try:
            return torch.native_layer_norm(*args)
        except (RuntimeError, TypeError):
            raise unplaced(torch.layer_norm, args, {}) from None

    @staticmethod
    def gradients(
        needs: Sequence[bool], g: T, input: T, weight: T | None, bias: T | None, mean: T, r: T
    ) -> tuple[T | None, ...]:
        if not input.numel():
            dx, dw, db = (None if t is None else torch.zeros_like(t) for t in (input, weight, bias))
            return dx, None, dw, db
        rows: tuple[T, ...] = g, input, mean, r
        if input.dim() != 2 or len(mean) != len(input):
            rows = tuple([t.reshape(mean.numel(), -1) for t in rows])
        if input.dtype.itemsize == 2:
            rows = tuple([t.float() for t in rows])
        g, x, mean, r = rows
        g, x = g.contiguous(), x.contiguous()
        w = weight if weight is None or weight.dim() == 1 else weight.reshape(-1)
        size = rows_at_once(x)
        if len(x) <= size:
            dx, dw, db = _of_rows(needs, g, x, w, mean, r)
        else:
            dx, z, gz = torch.empty_like(x), torch.empty_like(x[:size]), torch.empty_like(x[:size])
            dw = db = None
            pieces = [t.split(size) for t in (g, x, mean, r, dx)]
            for g, x, mean, r, to in zip(*pieces, strict=True):
                n = len(x)
                _, dw_part, db_part = _of_rows(needs, g, x, w, mean, r, to, z[:n], gz[:n])
                dw = None if dw_part is None else added(dw, dw_part)
                db = None if db_part is None else added(db, db_part)
        return like(dx, input), None, like(dw, weight), like(db, bias)


def _of_rows(
    needs: Sequence[bool],
    g: T,
    x: T,
    w: T | None,
    mean: T,
    r: T,
    dx: T | None = None,
    z: T | None = None,
    gz: T | None = None,
) -> tuple[T | None, T | None, T | None]:
    """dx, dw and db of some rows. The last three arguments are memory to compute in."""
    need_x, _, need_w, need_b, _ = needs
    db = g.sum(0) if need_b else None
    if not (need_x or need_w):
        return None, None, db
    z = torch.sub(x, mean, out=z).mul_(r)
    gz = torch.mul(g, z, out=gz)
    dw = gz.sum(0) if need_w else None
    if not need_x:
        return None, dw, db
    if w is not None:
        g = dx = torch.mul(g, w, out=dx)
        gz.mul_(w)
    per_number = -1 / x.shape[1]
    sum_g, sum_gz = g.sum(1, keepdim=True), gz.sum(1, keepdim=True)
    dx = torch.addcmul(g, z, sum_gz, value=per_number, out=dx)
    return dx.add_(sum_g, alpha=per_number).mul_(r), dw, db


@composite(torch.layer_norm)
def layer_norm(
    input: T,
    normalized_shape: Sequence[int],
    weight: T | None = None,
    bias: T | None = None,
    eps: float = 1e-05,
    cudnn_enable: bool = True,
) -> T:
    return record(NativeLayerNorm, (input, normalized_shape, weight, bias, eps))[0]
