"""Batch normalisation.

    y = (x - mean) r w + b,  r = 1 / sqrt(var + eps), per channel; in training mean and var are
    those of the batch, of n elements per channel, in evaluation the running ones:

    db = sum of g,  d = sum of g (x - mean),  dw = d r
    dx = (g - sum(g) / n - (x - mean) d r^2 / n) r w in training, g r w in evaluation

The forward is PyTorch's kernel. float16 and bfloat16 are computed in float32. In exact mode the
backward rounds as PyTorch's kernels do (see `nnmirror.exact.batchnorm`). The backward is a rule
with gradients of its own, in PyTorch's order: batchnorm_double_backward.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import _torch
from .._torch import DisableTorchFunctionSubclass
from ..fast.composed import generated
from ..tape import mapping, record
from .arithmetic import Add, Mul
from .gradient import applied
from .normalization import InverseStdOf, MeanOf, Second, added_to
from .registry import Gradients, Needs, Rule, composed, composite, stands_for, unplaced
from .shape import Clone, contiguous, repeat, select, view

T = torch.Tensor


def _infer(
    input: T,
    weight: T | None,
    bias: T | None,
    running_mean: T | None,
    running_var: T | None,
    training: bool,
    momentum: float,
    eps: float,
) -> T:
    if mapping.depth:
        _refuse_shared_statistics(running_mean, training)
    mean, var, cudnn = running_mean, running_var, torch.backends.cudnn.enabled
    return torch.batch_norm(input, weight, bias, mean, var, training, momentum, eps, cudnn)


class NativeBatchNormBackward(Rule):
    """dx, dw and db, as above. In evaluation `mean` and `r` are the running mean and variance.

    Its gradients for h, that of dx, hw and hb, with c = x - mean, sums over each channel:

        g gets w r / n (n h - sum h - c r^2 sum(h c)) + hw c r + hb
        w gets the sum of h r / n (n g - sum g - c r^2 sum(g c))
        x gets w (c r^3 / n (sum h sum g / n - sum(g h) + 3 / n r^2 sum(g c) sum(h c))
                  + r^3 / n (sum(h c) (sum g / n - g) + sum(g c) (sum h / n - h)))
               + hw (g r - r / n sum g - c r^3 / n sum(g c))

    and in evaluation  h r w + hw c r + hb,  the sum of h g r,  and  hw r g.
    """

    materialize_grads = False

    @staticmethod
    def forward(
        grad: T,
        input: T,
        weight: T | None,
        mean: T,
        r: T,
        training: bool,
        eps: float,
        needs: Needs,
    ) -> tuple[T | None, ...]:
        need_x, need_w, need_b = needs
        g, x, w = grad, input, weight
        if x.dtype.itemsize == 2:
            g, x, mean, r = g.float(), x.float(), mean.float(), r.float()
            w = None if w is None else w.float()
        if not training:
            r = torch.rsqrt(r + eps)
        scale, dims = r if w is None else r * w, [0, *range(2, x.dim())]
        if not training and not need_w:
            dx = g * _by_channel(scale, x) if need_x else None
            return dx, None, g.sum(dims) if need_b else None
        pieces, sum_g, d = _sums(x, g, _by_channel(mean, x), dims)
        dw = d * r
        grads = dw if need_w else None, sum_g if need_b else None
        if not need_x:
            return None, *grads
        dx = pieces.whole
        if not training:
            return torch.mul(g, _by_channel(scale, x), out=dx), *grads
        per_number = -x.shape[1] / x.numel()
        slope, shift = _by_channel(dw * r, x), None
        if dx.stride(1) == 1 and x.numel() >= _MANY:
            shift = _by_channel(sum_g * scale * per_number, x)
        of_g, scale = _by_channel(sum_g, x), _by_channel(scale, x)
        # With channels last, shift and scale have one number for each in the inner loop: one pass.
        for g_part, to in pieces.parts:
            torch.addcmul(g_part, to, slope, value=per_number, out=to)
            if shift is None:
                to.add_(of_g, alpha=per_number).mul_(scale)
            else:
                torch.addcmul(shift, to, scale, out=to)
        return dx, *grads

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
        training: bool,
        eps: float,
    ) -> Gradients:
        h, hw, hb = g0, g1, g2
        g, x = grad, input
        n = x.numel() // x.shape[1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        if training:
            mean, r = mean.to(x.dtype), r.to(x.dtype)
        else:
            r = r.add(eps).pow(-0.5)
        mean, r = mean.view(shape), r.view(shape)
        w = x.new_ones(()) if weight is None else weight.view(shape)
        c = x - mean
        dg = dx = dw = None
        if hw is not None:
            hw = hw.view(shape)
        if hb is not None:
            hb = hb.view(shape)
        if not training:
            if h is not None:
                dg = h * r * w
                if weight is not None and needs[2]:
                    dw = _channel_sum(h * g * r, False)
            if hw is not None:
                dg = added_to(dg, hw * c * r)
                dx = hw * r * g
        else:
            second = Second(c, r, n, _channel_sum)
            sum_gc, sum_g = _channel_sum(g * c), _channel_sum(g)
            if h is not None:
                if needs[1]:
                    dx = w * second.of_input(h, g, sum_g, sum_gc)
                if weight is not None and needs[2]:
                    dw = _channel_sum(h * second.first(g, x.new_ones(())), False)
                dg = second.first(h, w)
            if hw is not None:
                dx = added_to(dx, hw * (g * r + r * sum_g / -n + second.cr3 * sum_gc / -n))
                dg = added_to(dg, hw * c * r)
        if hb is not None:
            dg = added_to(dg, hb)
        return None if dg is None else dg.expand(x.shape), dx, dw


# Elements of a piece, at most: in float32 the product of one takes less than a megabyte, which a
# bound walk keeps, and from one operation to the next a piece stays in the processor's caches.
_PIECE = (1 << 18) - 1
_MOST_PIECES = 32
# Elements: one operation less on so many is worth another on the channels, and PyTorch has several
# threads for them.
_MANY = 1 << 15


class _Pieces(NamedTuple):
    """x - mean, and images of g with those of x - mean."""

    whole: T
    parts: Sequence[tuple[T, T]]


def _sums(x: T, g: T, mean: T, dims: list[int]) -> tuple[_Pieces, T, T]:
    """x - mean in pieces, and the sums of g and of g (x - mean) over `dims`."""
    count = 1
    if x.numel() > _PIECE:
        count = min(-(-len(x) // max(1, _PIECE * len(x) // x.numel())), _MOST_PIECES)
    if count == 1:
        centred = _centred(x, mean)
        return _Pieces(centred, [(g, centred)]), _sum(g, dims), _sum(centred * g, dims)
    at_once = -(-len(x) // count)
    layout = torch.contiguous_format if x.is_contiguous() else torch.preserve_format
    centred = torch.empty_like(x, memory_format=layout)
    product: T | None = None
    sums: list[T] = []
    products: list[T] = []
    split = [t.unsafe_split(at_once) for t in (x, g, centred)]
    for x_part, g_part, to in zip(*split, strict=True):
        torch.sub(x_part, mean, out=to)
        if product is None:
            product = torch.empty_like(to)
        elif len(to) < at_once:
            product = product.narrow(0, 0, len(to))
        torch.mul(to, g_part, out=product)
        sums.append(_of_images(g_part, dims))
        products.append(_of_images(product, dims))
    sum_g, d = torch.cat(sums).sum(0), torch.cat(products).sum(0)
    return _Pieces(centred, [*zip(*split[1:], strict=True)]), sum_g, d


def _sum(t: T, dims: list[int]) -> T:
    return t.sum(dims) if len(dims) == 1 or t.numel() < _MANY else _of_images(t, dims).sum(0)


def _of_images(t: T, dims: list[int]) -> T:
    """The sums over `dims`, except the first one: of several threads, each sums the images that it
    has computed, which are in its processor's cache."""
    return t.sum(0, keepdim=True) if len(dims) == 1 else t.sum(dims[1:])


def _channel_sum(x: T, keepdim: bool = True) -> T:
    """The sum over all dimensions except the channels, one after another."""
    x = x.sum(0, keepdim)
    for dim in range(x.dim() - 1, int(keepdim), -1):
        x = x.sum(dim, keepdim)
    return x


batch_norm_grad = applied(NativeBatchNormBackward)


@stands_for(torch.batch_norm, True)
class NativeBatchNorm(Rule):
    """y = (x - mean) r w + b, per channel:  db = sum of g,  d = sum of g (x - mean),  dw = d r,
    dx = (g - sum(g) / n - (x - mean) d r^2 / n) r w in training, g r w in evaluation

    Saved: x, w, the running mean and variance, and mean and r of the batch.
    """

    infer = staticmethod(_infer)
    keeps = derived = ("mean", "r")
    counted = (0, 1, 2)  # PyTorch's node has a place for a missing weight

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
        if mapping.depth:
            _refuse_shared_statistics(running_mean, training)
        cudnn = torch.backends.cudnn.enabled
        try:
            return _torch.batch_norm_impl_index(*args, cudnn)[:3]
        except TypeError:
            raise unplaced(torch.batch_norm, (*args, cudnn), {}) from None

    @staticmethod
    def mean_again(input: T, training: bool, mean: T) -> T:
        if not training:
            return mean
        return record(MeanOf, (input, mean, _as_operand(mean, input)))[0]  # type: ignore[no-any-return]

    @staticmethod
    def r_again(input: T, training: bool, mean: T, r: T) -> T:
        if not training:
            return r
        return record(InverseStdOf, (input, mean, r, _as_operand(r, input)))[0]  # type: ignore[no-any-return]

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
        if not training:
            assert running_mean is not None
            assert running_var is not None
            mean, r = running_mean, running_var
        return batch_norm_grad(g, input, weight, mean, r, training, eps, needs[:3])  # type: ignore[return-value]


def _as_operand(values: T, x: T) -> tuple[int, ...]:
    """The shape in which one value for each channel is an operand for x."""
    return 1, len(values), *[1] * (x.dim() - 2)


def _by_channel(values: T, x: T) -> T:
    """One value for each channel of x, as an operand for x."""
    return values if x.dim() == 2 else values.view(-1, *[1] * (x.dim() - 2))


def _centred(x: T, mean: T) -> T:
    if x.dim() < 4 or not x.is_contiguous():
        return x - mean
    # Images of one element fit both memory formats; the kernel treats them as contiguous.
    return torch.sub(x, mean, out=torch.empty_like(x, memory_format=torch.contiguous_format))


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


def _refuse_shared_statistics(running_mean: T | None, training: bool) -> None:
    """PyTorch's error if each item of a vmap would change the shared statistics."""
    if training and not any(running_mean is t for t in (None, *mapping.items)):
        raise RuntimeError(
            "Batch norm got a batched tensor as input while the running_mean or running_var, which"
            " will be updated in place, were not batched.\nIf you are using a module and do not"
            " need eval mode, please set `track_running_stats` to be False.If you are using a"
            " prebuilt module and do not need eval mode, please see the functorch website for"
            " resources on how to patch your module to work with vmap"
        )


def _of_nothing(input: T, weight: T | None, bias: T | None, *how: Any) -> T:
    """An empty batch: other nodes, gradients of zero, and unchanged running statistics."""
    with DisableTorchFunctionSubclass(), torch.no_grad():
        _infer(input, weight, bias, *how)  # raises PyTorch's errors
    y = record(Clone, (input,))[0]
    if weight is not None:
        y = record(Mul, (y, select(weight, 0, 0)))[0]
    return y if bias is None else record(Add, (y, select(bias, 0, 0)))[0]


@composed(torch.instance_norm)
def instance_norm(
    input: T,
    weight: T | None,
    bias: T | None,
    running_mean: T | None,
    running_var: T | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> T:
    """Batch normalisation of one image, whose channels are those of all images.

    With `use_input_stats`, each image updates the running statistics separately, and they become
    the mean of the results.
    """
    if not isinstance(input, T):
        args = input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps
        raise unplaced(torch.instance_norm, (*args, cudnn_enabled), {})
    if not use_input_stats and (running_mean is None or running_var is None):
        raise RuntimeError(
            "Expected running_mean and running_var to be defined when use_input_stats is false"
        )
    how = use_input_stats, momentum, eps, cudnn_enabled
    if running_mean is None and running_var is None:
        return _as_one_image_only(input, weight, bias, None, None, *how)
    n, c, *_ = input.shape
    stats = _repeated(running_mean, n), _repeated(running_var, n)
    y = _as_one_image(input, weight, bias, *stats, *how)
    with DisableTorchFunctionSubclass(), torch.no_grad():
        for kept, each in zip((running_mean, running_var), stats, strict=True):
            if use_input_stats and kept is not None and each is not None:
                kept.copy_(each.view(n, c).mean(0))
    return y


def _as_one_image(input: T, weight: T | None, bias: T | None, *how: Any) -> T:
    """`batch_norm` of the channels of all images as those of one."""
    n, c, *places = input.shape
    x = view(contiguous(input), 1, n * c, *places)
    y = batch_norm(x, _repeated(weight, n), _repeated(bias, n), *how)
    return view(y, input.shape)


def _repeated(values: T | None, times: int) -> T | None:
    return None if values is None else repeat(values, times)


_as_one_image_only = generated(_as_one_image)  # it changes no statistics
