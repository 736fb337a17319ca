"""Layer normalisation.

    y = (x - mean) r w + b,  r = 1 / sqrt(var + eps), per row:

    db = sum of g,  dw = sum of g z,  z = (x - mean) r,  over the rows
    dx = r (g w - mean(g w) - z mean(g w z)), the means over each row

The forward is PyTorch's kernel. float16 and bfloat16 are computed in float32, as it does. In exact
mode the sums have its order, too (see `nnmirror.exact.normalization`). The backward is a rule with
gradients of its own, in PyTorch's order: layer_norm_double_backward.
"""

from collections.abc import Callable, Sequence

import torch

from ..tape import record
from .gradient import applied
from .registry import Gradients, Needs, Rule, composite, stands_for, unplaced

T = torch.Tensor

# Elements: a larger piece would leave the cache between two operations.
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


class MeanOf(Rule):
    """The mean of x, as a kernel has computed it:  dx = g / n

    `shape` is its shape for broadcasting with x.
    """

    @staticmethod
    def forward(input: T, mean: T, shape: Sequence[int]) -> T:
        return mean

    @staticmethod
    def d_input(g: T, input_shape: torch.Size, shape: Sequence[int]) -> T:
        share = g.numel() / max(1, input_shape.numel())
        return (g * share).reshape(shape).expand(input_shape)


class InverseStdOf(Rule):
    """r = 1 / sqrt(var + eps) of x, as a kernel has computed it:  dx = -g r^3 (x - mean) / n"""

    @staticmethod
    def forward(input: T, mean: T, r: T, shape: Sequence[int]) -> T:
        return r

    @staticmethod
    def gradients(
        needs: Needs, g: T, input: T, mean: T, shape: Sequence[int], result: T
    ) -> Gradients:
        # The mean gets no gradient: the sum of x - mean is zero.
        slope = result * result * result * g * (-g.numel() / max(1, input.numel()))
        return (input - mean.reshape(shape)) * slope.reshape(shape), None


class Second:
    """Shared by the second derivatives of the normalisations, in PyTorch's order.

    c = x - mean, r is the inverse deviation, and `total` sums over n numbers.
    """

    def __init__(self, c: T, r: T, n: int, total: Callable[[T], T]) -> None:
        self.c, self.r, self.n, self.total = c, r, n, total
        self.r2, self.r3 = r.pow(2), r.pow(3)
        self.cr3 = c * self.r3

    def first(self, g: T, w: T) -> T:
        """w r / n (n g - sum g - c r^2 sum(g c)): the first derivative for g"""
        n, total = self.n, self.total
        inner = self.c * self.r2 * total(g * self.c)
        return w * self.r / n * (n * g - total(g) - inner)

    def of_input(self, h: T, p: T, sum_p: T, sum_pc: T) -> T:
        """The gradient of x for h and p, the gradient times the part of w within the sums."""
        n, r3 = self.n, self.r3
        sum_h, sum_hc = self.total(h), self.total(h * self.c)
        inner = sum_h * sum_p / n - self.total(h * p)
        inner = inner + self.r2 * sum_pc * sum_hc * (3.0 / n)
        dx = self.cr3 * inner / n + sum_hc * r3 / n * (sum_p / n - p)
        return dx + sum_pc * r3 / n * (sum_h / n - h)


class NativeLayerNormBackward(Rule):
    """dx, dw and db, as above; mean and r depend on x.

    Its gradients for h, that of dx, hw and hb, with c = x - mean, n elements in a row, sums over
    rows and p = g w:

        g gets w r / n (n h - sum h - c r^2 sum(h c)) + hw c r + hb
        w gets the sum over the rows of g r / n (n h - sum h - c r^2 sum(h c))
        x gets c r^3 / n (sum h sum p / n - sum(h p) + 3 / n r^2 sum(p c) sum(h c))
               + r^3 / n (sum(h c) (sum p / n - p) + sum(p c) (sum h / n - h))
               + g hw r - r / n sum(g hw) - c r^3 / n sum(g hw c)
    """

    materialize_grads = False

    @staticmethod
    def forward(
        grad: T, input: T, weight: T | None, bias: T | None, mean: T, r: T, needs: Needs
    ) -> tuple[T | None, ...]:
        g = grad
        if not input.numel():
            dx, dw, db = (None if t is None else torch.zeros_like(t) for t in (input, weight, bias))
            return dx, dw, db
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
        return like(dx, input), like(dw, weight), like(db, bias)

    @staticmethod
    def gradients(
        needs: Needs,
        g0: T | None,
        g1: T | None,
        g2: T | None,
        grad: T,
        input: T,
        weight: T | None,
        mean: T,
        r: T,
    ) -> Gradients:
        h, hw, hb = g0, g1, g2
        if not input.numel():
            dw = None if h is None or weight is None else torch.zeros_like(weight)
            return torch.zeros_like(grad), torch.zeros_like(input), dw
        m = mean.numel()
        n = input.numel() // m
        g, x = grad.reshape(m, n), input.reshape(m, n)
        mean, r = (t.reshape(m, 1).to(x.dtype) for t in (mean, r))
        w = x.new_ones(1) if weight is None else weight.reshape(1, n)
        c = x - mean
        second = Second(c, r, n, lambda t: t.sum(1, True))
        dg = dx = dw = None
        if h is not None:
            h = h.reshape(m, n)
            if needs[1]:
                p = g * w
                sum_pc, sum_p = second.total(p * c), second.total(p)
                dx = second.of_input(h, p, sum_p, sum_pc)
            if weight is not None and needs[2]:
                dw = (g * second.first(h, x.new_ones(()))).sum(0).reshape(weight.shape)
            if needs[0]:
                dg = second.first(h, w)
        if hw is not None:
            hw = hw.reshape(1, n)
            if needs[1]:
                t0 = g * hw * r
                t1 = r * (g * hw).sum(1, True) / -n
                t2 = second.cr3 * (g * hw * c).sum(1, True) / -n
                dx = added_to(dx, t0 + t1 + t2)
            dg = added_to(dg, hw * c * r)
        if hb is not None:
            dg = added_to(dg, hb.reshape(1, n))
        if dg is not None:
            dg = dg.expand(m, n).reshape(input.shape)
        return dg, None if dx is None else dx.reshape(input.shape), dw


def added_to(total: T | None, part: T) -> T:
    """The sum of the terms so far."""
    return part if total is None else total + part


layer_norm_grad = applied(NativeLayerNormBackward)


@stands_for(torch.layer_norm)
class NativeLayerNorm(Rule):
    """y = (x - mean) r w + b over the last dimensions:  db = sum of g,  dw = sum of g z,
    dx = r (g w - mean(g w) - z mean(g w z)), z = (x - mean) r

    The sums go over the rows, the means over each row.

    Saved: x, w, b, and mean and r of each row.
    """

    infer = staticmethod(torch.layer_norm)
    keeps = derived = ("mean", "r")
    counted = (0, 2, 3)  # PyTorch's node has a place for a missing weight

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
    def mean_again(input: T, mean: T) -> T:
        return record(MeanOf, (input, mean, mean.shape))[0]  # type: ignore[no-any-return]

    @staticmethod
    def r_again(input: T, mean: T, r: T) -> T:
        return record(InverseStdOf, (input, mean, r, mean.shape))[0]  # type: ignore[no-any-return]

    @staticmethod
    def gradients(
        needs: Sequence[bool], g: T, input: T, weight: T | None, bias: T | None, mean: T, r: T
    ) -> tuple[T | None, ...]:
        need_x, _, need_w, need_b, _ = needs
        mask = need_x, need_w, need_b
        dx, dw, db = layer_norm_grad(g, input, weight, bias, mean, r, mask)
        return dx, None, dw, db


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
    """dx, dw and db of some rows. The last three arguments are buffers."""
    need_x, need_w, need_b = needs
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
