"""Convolution, in any number of dimensions and transposed too: one rule for all.

    y[n, o] = sum over c of x[n, c] * w[o, c] + b[o]

where * slides w over x. With k and l for places in the kernel and in y, s the stride, p the padding
and d the dilation,

    y[n, o, l] = sum over c, k of w[o, c, k] x[n, c, s l + d k - p] + b[o]

so that  dx = g * w transposed,  dw[o, c, k] = sum over n, l of g[n, o, l] x[n, c, s l + d k - p],
and db = the sum of g over n and l. dx is a transposed convolution. The dx of a transposed
convolution is a convolution, and in its dw x and g are exchanged. Dumoulin and Visin, 2016
(arXiv:1603.07285).

dx has PyTorch's bits, except for some shapes of strided convolutions in float32. dw has them where
PyTorch itself multiplies matrices (float64; float32 for single small images). Where oneDNN computes
it, no tensor operation sums in the same order: dw and db differ by some units in the last place
(nnmirror/exact/README.md says by how many).
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeAlias

import torch

from .. import _torch
from .._types import TorchFunction
from ..tape import record
from .gradient import applied
from .kernel import transposed
from .padding import ConstantPadNd
from .registry import Gradients, Needs, Rule, handle, rule, unplaced
from .shape import squeeze, unsqueeze
from .sizes import expanded, expanded_integer

T = torch.Tensor
Sizes: TypeAlias = tuple[int, ...] | list[int]
P = ParamSpec("P")

_CALLED: dict[bool, tuple[TorchFunction, ...]] = {
    False: (torch.conv1d, torch.conv2d, torch.conv3d),
    True: (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}


class ConvolutionBackward(Rule):
    """dx, dw and db, as above.

    Its gradients for h, that of dx, hw that of dw and hb that of db, as PyTorch takes them:

        g gets h * w + x * hw + hb,  x gets g * hw transposed,  and w what dw is of h in place of x
    """

    materialize_grads = False

    @staticmethod
    def forward(
        grad: T,
        input: T,
        weight: T,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        transposed: bool,
        output_padding: Sizes,
        groups: int,
        needs: Needs,
    ) -> tuple[T | None, ...]:
        g, x, w = grad, input, weight
        if not (g.numel() and x.numel() and w.numel()):
            of_b = g.new_empty(g.shape[1:2])
            every = zip((x, w, of_b), needs, strict=True)
            return tuple([torch.zeros_like(t) if need else None for t, need in every])
        how = stride, padding, dilation, transposed, output_padding, groups
        backend = _torch.select_conv_backend(x, w, None, *how)
        layout = _torch.conv_determine_backend_memory_format(x, w, backend)
        g = g.contiguous(memory_format=layout)
        native = backend in _NATIVE
        dx = dw = db = None
        if needs[0]:
            dx = input_grad(g, x.shape, w, *how)
        if needs[1]:
            small, large = (x, g) if transposed else (g, x)
            kernel = stride, padding, dilation, w.shape[2:]
            many = small.shape[1] >= _MANY and len(small) <= _FEW
            # 16 bits would be rounded once for each sample.
            of_one = w.shape[2:].numel() == 1 and not any(padding) and w.dtype.itemsize > 2
            if of_one and not native and groups == 1:
                dw = _of_one_element(small, large, stride)
                if layout is torch.contiguous_format:
                    dw = dw.view(w.shape)
                else:
                    dw = dw.view(len(w), *w.shape[2:], -1).movedim(-1, 1)
            elif not (native or many) and groups == 1:
                dw = _exchanged(small, large, *kernel)
            elif native or groups == 1:
                dw = _by_samples(small, large, *kernel, groups, backend)
            elif groups == small.shape[1] == large.shape[1]:
                dw = _by_channels(small, large, *kernel)
            else:
                dw = _by_groups(small, large, *kernel, groups)
        if needs[2]:
            dims = [0, *range(2, g.dim())]
            alone = backend == _torch.ConvBackend.Slow2d and groups == g.shape[1]
            parts = g.chunk(groups, 1) if alone else (g,)
            sums = [part.contiguous().sum(dims) for part in parts]
            db = sums[0] if len(sums) == 1 else torch.cat(sums)
        return dx, dw, db

    @staticmethod
    def gradients(
        needs: Needs,
        g0: T | None,
        g1: T | None,
        g2: T | None,
        grad: T,
        input: T,
        weight: T,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        transposed: bool,
        output_padding: Sizes,
        groups: int,
    ) -> Gradients:
        h, hw, hb = g0, g1, g2
        how = stride, padding, dilation, transposed, output_padding, groups
        dg = dx = dw = None
        terms = []
        if input.numel():
            if h is not None:
                terms.append(torch.convolution(h, weight, None, *how))
            if hw is not None:
                terms.append(torch.convolution(input, hw, None, *how))
        if hb is not None:
            terms.append(hb.contiguous().view(1, -1, *[1] * (grad.dim() - 2)).expand(grad.shape))
        if terms:
            dg = terms[0]
            for term in terms[1:]:
                dg = dg + term
        if needs[2] and h is not None and input.numel():
            small, large = (h, grad) if transposed else (grad, h)
            parts = zip(small.chunk(groups, 1), large.chunk(groups, 1), strict=True)
            shape = weight.shape[2:]
            pieces = [_exchange(a, b, stride, padding, dilation) for a, b in parts]
            dw = pieces[0] if groups == 1 else torch.cat(pieces, 1)
            dw = dw.transpose(0, 1)
            dw = _cut(dw, shape)
        if needs[1] and hw is not None:
            dx = input_grad(grad, input.shape, hw, *how)
        return dg, dx, dw


convolution_grad = applied(ConvolutionBackward)


def input_grad(
    g: T,
    shape: torch.Size,
    w: T,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
) -> T:
    """dx, for an x of this shape."""
    n = w.dim() - 2
    if transposed:
        dx = torch.convolution(g, w, None, stride, padding, dilation, False, [0] * n, groups)
        return _cut(dx, shape[2:])
    # The kernel may not reach the last elements of x.
    beyond = [
        shape[i + 2]
        - (stride[i] * (g.shape[i + 2] - 1) + dilation[i] * (w.shape[i + 2] - 1) + 1)
        + 2 * padding[i]
        for i in range(n)
    ]
    return torch.convolution(g, w, None, stride, padding, dilation, True, beyond, groups)


def _cut(t: T, sizes: torch.Size) -> T:
    """t without the last places beyond these sizes, to which the kernel did not reach."""
    for i, size in enumerate(sizes, start=2):
        if t.shape[i] > size:
            t = t.narrow(i, 0, size)
    return t


def _exchange(g: T, x: T, stride: Sizes, padding: Sizes, dilation: Sizes) -> T:
    """g * x with batch and channels, and stride and dilation, exchanged: dw with its first two
    dimensions exchanged, and elements beyond the kernel."""
    zeros = [0] * len(stride)
    x, g = x.transpose(0, 1), g.transpose(0, 1)
    return torch.convolution(x, g, None, dilation, padding, stride, False, zeros, 1)


def _exchanged(g: T, x: T, stride: Sizes, padding: Sizes, dilation: Sizes, kernel: torch.Size) -> T:
    """dw as convolutions of x and g, of as many samples at a time as stay in a cache."""
    most, zeros = max(1, _AT_ONCE // g.shape[1:].numel()), [0] * len(stride)
    pairs: Iterable[tuple[T, T]] = [(x, g)]
    if most < len(x):
        if most > 16:
            most -= most % 16  # oneDNN takes 16 together
        pairs = zip(x.split(most), g.split(most), strict=True)
    dw = None
    for a, b in pairs:
        a, b = _samples_last(a), _samples_last(b)
        piece = torch.convolution(a, b, None, dilation, padding, stride, False, zeros, 1)
        dw = piece if dw is None else dw.add_(piece)
    assert dw is not None
    dw = _cut(dw, kernel)
    channels, out, *_ = dw.shape
    if dw.movedim(1, -1).is_contiguous():
        return transposed(dw, dw.numel() // out).view(out, channels, *kernel)
    dw = dw.transpose(0, 1)
    return dw.reshape(-1).view(dw.shape)


_AT_ONCE = 2**18  # elements of g
_MANY, _FEW = 128, 4  # channels and samples for which single products of matrices are faster


def _of_one_element(g: T, x: T, stride: Sizes) -> T:
    """dw where the kernel has one element and there is no padding: the sum over the samples of a
    product of matrices."""
    if x.shape[2:] != g.shape[2:]:
        steps = [s * step for s, step in zip(stride, x.stride()[2:], strict=True)]
        x = x.as_strided((*x.shape[:2], *g.shape[2:]), (*x.stride()[:2], *steps))
    rows, columns = g.reshape(*g.shape[:2], -1), x.reshape(*x.shape[:2], -1).transpose(1, 2)
    shape = g.shape[1], x.shape[1]
    if len(g) * shape[0] * shape[1] <= _SMALL:
        return rows.bmm(columns).sum(0)
    return torch.addbmm(g.new_zeros(shape), rows, columns)


_SMALL = 1 << 16  # elements of all products: one call and a sum are faster than to accumulate


def _samples_last(t: T) -> T:
    """t with its first two dimensions exchanged, and the samples one beside the other in memory:
    channels last, which oneDNN need not reorder."""
    t = t.contiguous()
    batch, channels, *places = t.shape
    if batch == 1:
        return t.transpose(0, 1)
    steps = [batch]
    for size in reversed(places):
        steps.insert(0, size * steps[0])
    return transposed(t, batch).as_strided((channels, batch, *places), (steps[0], 1, *steps[1:]))


def _patches(
    x: T, stride: Sizes, padding: Sizes, dilation: Sizes, kernel: torch.Size, places: torch.Size
) -> T:
    """The elements of x under the kernel, at each position: (batch, channels, *kernel,
    *positions)."""
    if any(padding):
        x = torch.constant_pad_nd(x, [p for p in reversed(padding) for _ in range(2)])
    first, channels, *steps = x.stride()
    return x.as_strided(
        (*x.shape[:2], *kernel, *places),
        (
            first,
            channels,
            *[d * step for d, step in zip(dilation, steps, strict=True)],
            *[s * step for s, step in zip(stride, steps, strict=True)],
        ),
    )


def _by_channels(
    g: T, x: T, stride: Sizes, padding: Sizes, dilation: Sizes, kernel: torch.Size
) -> T:
    """dw where each channel is a group: the sum over the batch of a convolution of each channel of
    each sample with its gradient."""
    batch, channels = len(x), x.shape[1]
    every, zeros = batch * channels, [0] * len(stride)
    x = x.reshape(1, every, *x.shape[2:])
    g = g.reshape(every, 1, *g.shape[2:])
    dw = torch.convolution(x, g, None, dilation, padding, stride, False, zeros, every)
    dw = _cut(dw, kernel)
    return dw.reshape(batch, -1).sum(0).view(channels, 1, *kernel)


def _by_groups(
    g: T, x: T, stride: Sizes, padding: Sizes, dilation: Sizes, kernel: torch.Size, groups: int
) -> T:
    """dw as the sum over the batch of matrix products, one for each group."""
    patches = _patches(x, stride, padding, dilation, kernel, g.shape[2:])
    batch, out, length = len(g), g.shape[1], g.shape[2:].numel()
    columns = patches.reshape(batch * groups, -1, length)
    rows = g.reshape(batch * groups, out // groups, length)
    products = rows.bmm(columns.transpose(1, 2))
    return products.view(batch, -1).sum(0).view(out, -1, *kernel)


def _by_samples(
    g: T,
    x: T,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    kernel: torch.Size,
    groups: int,
    backend: object,
) -> T:
    """dw as PyTorch's own kernels compute it: for each group, the matrix product of each sample is
    accumulated."""
    every = []
    for rows, part in zip(g.chunk(groups, 1), x.chunk(groups, 1), strict=True):
        patches = _patches(part.contiguous(), stride, padding, dilation, kernel, g.shape[2:])
        rows = rows.contiguous().flatten(2)
        height = part.shape[1] * kernel.numel()
        dw = g.new_zeros(rows.shape[1], height)
        if backend in _OF_ALL_PATCHES:
            columns = patches.contiguous().view(len(x), height, -1)
            if backend == _torch.ConvBackend.Slow3d and rows.shape[1] == 1:
                dw = dw.view(height, 1)  # a matrix product, not one with a vector
                for row, column in zip(rows, columns, strict=True):
                    dw.addmm_(column, row.t())
                dw = dw.t()
            else:
                for row, column in zip(rows, columns, strict=True):
                    dw.addmm_(row, column.t())
        else:
            held = g.new_empty(patches.shape[1:])
            column = held.view(height, -1)
            for row, patch in zip(rows, patches, strict=True):
                held.copy_(patch)
                dw.addmm_(row, column.t())
        every.append(dw)
    dw = every[0] if groups == 1 else torch.cat(every)
    return dw.reshape(g.shape[1], -1, *kernel)


# PyTorch's kernels that multiply matrices: two arrange the patches of all samples first.
_OF_ALL_PATCHES = {_torch.ConvBackend.Slow2d, _torch.ConvBackend.Slow3d}
_NATIVE = _OF_ALL_PATCHES | {
    _torch.ConvBackend.SlowDilated2d,
    _torch.ConvBackend.SlowDilated3d,
    _torch.ConvBackend.SlowTranspose2d,
    _torch.ConvBackend.SlowTranspose3d,
    _torch.ConvBackend.NnpackSpatial,
}


@rule(torch.convolution)
class Convolution(Rule):
    """y = x * w + b, where * slides w over x, or the transposed one:

        dx = g * w, transposed if y is not,  dw = x * g, summed over the images,
        db = sum of g over images and places

    Saved: x and w.
    """

    counted = (0, 1, 2)

    @staticmethod
    def forward(
        input: T,
        weight: T,
        bias: T | None,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        transposed: bool,
        output_padding: Sizes,
        groups: int,
    ) -> T:
        how = stride, padding, dilation, transposed, output_padding, groups
        try:
            return torch.convolution(input, weight, bias, *how)
        except (RuntimeError, TypeError) as error:
            failed = error
        # PyTorch's error, or its result for complex numbers.
        called = _CALLED[transposed][weight.dim() - 3]
        more = (output_padding, groups, dilation) if transposed else (dilation, groups)
        y: T = called(input, weight, bias, stride, padding, *more)
        if y.is_complex():
            return y
        raise failed

    infer = forward

    @staticmethod
    def gradients(
        needs: Sequence[bool],
        g: T,
        input: T,
        weight: T,
        stride: Sizes,
        padding: Sizes,
        dilation: Sizes,
        transposed: bool,
        output_padding: Sizes,
        groups: int,
    ) -> Gradients:
        n = weight.dim() - 2
        if not len(stride) == len(padding) == len(dilation) == len(output_padding) == n:
            stride, padding = expanded(stride, n), expanded(padding, n)
            dilation, output_padding = expanded(dilation, n), expanded(output_padding, n)
        how = stride, padding, dilation, transposed, output_padding, groups
        return convolution_grad(g, input, weight, *how, needs[:3])  # type: ignore[return-value]


def convolved(
    n: int,
    transposed: bool,
    args: tuple[object, ...],
    input: T,
    weight: T,
    bias: T | None,
    stride: object,
    padding: object,
    dilation: object,
    output_padding: object,
    groups: int,
) -> T:
    """A convolution in n dimensions, of a batch or a single sample; `args` are the original
    arguments, for PyTorch's errors."""
    how = expanded_integer(stride, n), expanded_integer(padding, n), expanded_integer(dilation, n)
    more = expanded_integer(output_padding, n)
    fits = isinstance(input, T) and isinstance(weight, T) and type(groups) is int
    if fits and isinstance(padding, str) and not transposed and how[0] and how[2]:
        input, padding = _padded(n, args, input, weight, how[0], padding, how[2])
        how = how[0], padding, how[2]
    if not fits or None in how or more is None or weight.dim() != n + 2:
        raise unplaced(_CALLED[transposed][n - 1], args, {})
    if not (bias is None or (isinstance(bias, T) and bias.dtype is input.dtype)):
        raise unplaced(_CALLED[transposed][n - 1], args, {})
    if input.dim() not in (n + 1, n + 2):
        raise unplaced(_CALLED[transposed][n - 1], args, {})
    if input.dim() == n + 2:
        return record(Convolution, (input, weight, bias, *how, transposed, more, groups))[0]  # type: ignore[no-any-return]
    single = unsqueeze(input, 0)
    y = record(Convolution, (single, weight, bias, *how, transposed, more, groups))[0]
    return squeeze(y, 0)


def _padded(
    n: int,
    args: tuple[object, ...],
    input: T,
    weight: T,
    stride: Sizes,
    padding: str,
    dilation: Sizes,
) -> tuple[T, tuple[int, ...] | None]:
    """The input and the numeric padding for "same" or "valid"; None for any other padding."""
    if padding == "valid":
        return input, (0,) * n
    if padding != "same" or any(s != 1 for s in stride) or weight.dim() != n + 2:
        return input, None
    totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    left = tuple([total // 2 for total in totals])
    if all(total % 2 == 0 for total in totals):
        return input, left
    # It warns; an error is that of the convolution, which names the sizes.
    with _torch.DisableTorchFunctionSubclass(), contextlib.suppress(RuntimeError):
        like = [t.new_empty(t.shape, device="meta") for t in (input.detach(), weight.detach())]
        _CALLED[False][n - 1](*like, None, stride, padding, dilation, args[6])
    more = [part for total in reversed(totals) for part in (0, total % 2)]
    return record(ConstantPadNd, (input, more))[0], left


if TYPE_CHECKING:

    class _Conv(Protocol):
        def __call__(
            self,
            input: T,
            weight: T,
            bias: T | None = None,
            stride: int | Sizes = 1,
            padding: int | Sizes | str = 0,
            dilation: int | Sizes = 1,
            groups: int = 1,
        ) -> T: ...

    class _ConvTranspose(Protocol):
        def __call__(
            self,
            input: T,
            weight: T,
            bias: T | None = None,
            stride: int | Sizes = 1,
            padding: int | Sizes = 0,
            output_padding: int | Sizes = 0,
            groups: int = 1,
            dilation: int | Sizes = 1,
        ) -> T: ...


def _conv(n: int) -> "_Conv":
    def call(
        input: T,
        weight: T,
        bias: T | None = None,
        stride: int | Sizes = 1,
        padding: int | Sizes | str = 0,
        dilation: int | Sizes = 1,
        groups: int = 1,
    ) -> T:
        args = input, weight, bias, stride, padding, dilation, groups
        how = stride, padding, dilation, 0, groups
        return convolved(n, False, args, input, weight, bias, *how)

    call.__doc__ = f"""x, of shape (N, C, *{n}) or (C, *{n}), with `weight`, (O, C / groups, *{n}),
    slid over it: (N, O, *{n}) or (O, *{n}); see `nnmirror.rules.convolution`."""
    return call


def _conv_transpose(n: int) -> "_ConvTranspose":
    def call(
        input: T,
        weight: T,
        bias: T | None = None,
        stride: int | Sizes = 1,
        padding: int | Sizes = 0,
        output_padding: int | Sizes = 0,
        groups: int = 1,
        dilation: int | Sizes = 1,
    ) -> T:
        args = input, weight, bias, stride, padding, output_padding, groups, dilation
        how = stride, padding, dilation, output_padding, groups
        return convolved(n, True, args, input, weight, bias, *how)

    call.__doc__ = f"""The gradient of a convolution for its input: x, of shape
    (N, C, *{n}) or (C, *{n}), and `weight`, (C, O / groups, *{n}), give (N, O, *{n}) or (O, *{n});
    see `nnmirror.rules.convolution`."""
    return call


def _answered(function: Callable[P, T], called: TorchFunction) -> Callable[P, T]:
    """The function for `called`: arguments that do not fit get PyTorch's error."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except TypeError:
            raise unplaced(called, args, kwargs) from None

    call.__name__ = call.__qualname__ = called.__name__
    call.__module__ = "nnmirror.functional"
    handle(called, call)
    return call


CONV = [_answered(_conv(n), called) for n, called in enumerate(_CALLED[False], start=1)]
CONV_TRANSPOSE = [
    _answered(_conv_transpose(n), called) for n, called in enumerate(_CALLED[True], start=1)
]
