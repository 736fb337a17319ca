"""Interpolation of images to another size.

Each mode is linear and separable:

    y = x with W_d along each dimension d of places:  dx = g with W_d^T along each

Row i of W_d (in, out) has the contributions of element i to each element of the result: PyTorch's
forward of the i-th unit vector. For the nearest element each column has a single 1, and the
gradients of the copies of an element are added sequentially, with the bits of PyTorch's kernel. The
other modes are matrix products, whose order of summation differs from the kernels'. float16 and
bfloat16 are computed in float32.

PyTorch's kernels do not always agree which element is the nearest. Those for small images or with
the channels last round to float32 in float64 too, and ignore a scale factor if the result has the
same or twice the size (2.3 makes 6 of 3 elements). So does the backward, whichever kernel ran
forward. Here the backward takes the elements that the forward took.
"""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import _torch
from .._types import TorchFunction
from ..constants import read_only
from ..grad_mode import outside_inference_mode
from ..tape import record
from .gradient import applied
from .kernel import has_planes, memory_format, planes_first, planes_last
from .registry import Rule, composite

T = torch.Tensor
_Sizes = Sequence[int] | None
_Scales = Sequence[float] | None


class _Kind(NamedTuple):
    """A mode of interpolation, for a number of dimensions."""

    func: TorchFunction  # PyTorch's
    label: str
    takes_corners: bool  # whether it has an argument align_corners
    along: str  # the mode that W_d is computed with, for the fewest dimensions

    def call(self, input: T, size: _Sizes, corners: bool | None, scales: _Scales) -> T:
        how = (corners,) if self.takes_corners else ()
        if size is None or scales is None:
            return self.func(input, size, *how, scales)  # type: ignore[no-any-return]
        return self.func(input, size, *how, *scales)  # type: ignore[no-any-return]


_nn = torch._C._nn
KINDS = {
    "nearest1d": _Kind(_nn.upsample_nearest1d, "UpsampleNearest1D", False, "nearest1d"),
    "nearest2d": _Kind(_nn.upsample_nearest2d, "UpsampleNearest2D", False, "nearest1d"),
    "nearest3d": _Kind(_nn.upsample_nearest3d, "UpsampleNearest3D", False, "nearest1d"),
    "exact1d": _Kind(_torch.upsample_nearest_exact1d, "UpsampleNearestExact1D", False, "exact1d"),
    "exact2d": _Kind(_torch.upsample_nearest_exact2d, "UpsampleNearestExact2D", False, "exact1d"),
    "exact3d": _Kind(_torch.upsample_nearest_exact3d, "UpsampleNearestExact3D", False, "exact1d"),
    "linear1d": _Kind(_nn.upsample_linear1d, "UpsampleLinear1D", True, "linear1d"),
    "linear2d": _Kind(_nn.upsample_bilinear2d, "UpsampleBilinear2D", True, "linear1d"),
    "linear3d": _Kind(_nn.upsample_trilinear3d, "UpsampleTrilinear3D", True, "linear1d"),
    "cubic2d": _Kind(_nn.upsample_bicubic2d, "UpsampleBicubic2D", True, "cubic2d"),
    "linear2d_aa": _Kind(
        _torch.upsample_bilinear2d_aa, "UpsampleBilinear2DAa", True, "linear2d_aa"
    ),
    "cubic2d_aa": _Kind(_torch.upsample_bicubic2d_aa, "UpsampleBicubic2DAa", True, "cubic2d_aa"),
    "lanczos2d_aa": _Kind(
        _torch.upsample_lanczos2d_aa, "UpsampleLanczos2DAa", True, "lanczos2d_aa"
    ),
}


class Upsample(Rule):
    """y = x with W_d along each dimension d of places:  dx = g with W_d^T along each

    The positions follow from `scale_factors`, if given, else from the sizes.
    """

    public = None  # a subclass gets the public function

    @staticmethod
    def forward(
        input: T, kind: str, size: _Sizes, align_corners: bool | None, scale_factors: _Scales
    ) -> T:
        if (
            KINDS[kind].along in _NEAREST
            and has_planes(input)
            and _agree(input, size, scale_factors)
        ):
            with contextlib.suppress(RuntimeError, TypeError):  # else the error names its sizes
                y = KINDS[kind].call(planes_last(input), size, align_corners, scale_factors)
                return planes_first(y, *input.shape[:2])
        return KINDS[kind].call(input, size, align_corners, scale_factors)

    @classmethod
    def label_of(cls, input: T, kind: str, *how: object) -> str:
        return KINDS[kind].label + "Backward0"

    @staticmethod
    def how(
        input: T, kind: str, size: _Sizes, align_corners: bool | None, scale_factors: _Scales
    ) -> bool:
        """Does the kernel that rounds to float32 and ignores some factors find the elements?"""
        if KINDS[kind].along not in _NEAREST or _agree(input, size, scale_factors):
            return False  # then the others find the same
        if input.dim() == 4 and sum(_places(input, size, scale_factors)) <= 128:
            return True
        format = _CHANNELS_LAST.get(input.dim())
        return (
            format is not None and input.shape[1] > 3 and input.is_contiguous(memory_format=format)
        )

    @staticmethod
    def d_input(
        g: T,
        input_shape: torch.Size,
        kind: str,
        align_corners: bool | None,
        scale_factors: _Scales,
        how: bool,
    ) -> T:
        return upsample_grad(g, input_shape, kind, align_corners, scale_factors, how)


class _UpsampleBackward(Rule):
    """dx = g with W_d^T along each dimension d of places:  g gets h, interpolated as x was"""

    @staticmethod
    def forward(
        grad: T,
        shape: torch.Size,
        kind: str,
        align_corners: bool | None,
        scale_factors: _Scales,
        rounded: bool,
    ) -> T:
        g = grad
        if not g.numel():
            return torch.zeros(shape, dtype=g.dtype, device=g.device)
        scales: Sequence[float | None] = scale_factors or [None] * (len(shape) - 2)
        along, format, places = KINDS[kind].along, memory_format(g), g.shape[2:]
        wide = g.float() if g.dtype.itemsize == 2 else g
        how = [
            (along, n, m, align_corners, scale)
            for n, m, scale in zip(shape[2:], places, scales, strict=True)
        ]
        if along in _NEAREST:
            sources = [_sources(along, n, m, s, wide.dtype, rounded) for _, n, m, _, s in how]
            dx = _added(wide.contiguous(memory_format=format), shape, sources)
        else:
            dx = wide
            for dim, h in enumerate(how, start=2):
                w = _matrix(*h, wide.dtype).to(g.device)
                if dim == g.dim() - 1:
                    dx = dx @ w.t()
                else:
                    dx = (w @ dx.movedim(dim, -2)).movedim(-2, dim)
        return dx.to(g.dtype).contiguous(memory_format=format)

    @classmethod
    def label_of(cls, grad: T, shape: torch.Size, kind: str, *how: object) -> str:
        return KINDS[kind].label + "BackwardBackward0"

    @staticmethod
    def d_grad(
        g: T,
        grad_shape: torch.Size,
        kind: str,
        align_corners: bool | None,
        scale_factors: _Scales,
        rounded: bool,
    ) -> T:
        size = tuple(grad_shape[2:])
        if Upsample.how(g, kind, size, align_corners, scale_factors) is rounded:
            return upsample(g, kind, size, align_corners, scale_factors)
        scales: Sequence[float | None] = scale_factors or [None] * len(size)
        for dim, (m, scale) in enumerate(zip(size, scales, strict=True), start=2):
            dtype = torch.float64 if g.dtype is torch.float64 else torch.float32
            taken = _taken(KINDS[kind].along, g.shape[dim], m, scale, dtype, rounded)
            g = g.index_select(dim, taken.to(g.device))
        return g


upsample_grad = applied(_UpsampleBackward)


def upsample(
    input: T, kind: str, size: _Sizes, align_corners: bool | None, scale_factors: _Scales
) -> T:
    """x of (N, C, ...) at another size, `size` or the old one times `scale_factors`."""
    return record(Upsample, (input, kind, size, align_corners, scale_factors))[0]  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=128)
def _matrix(
    kind: str, n: int, m: int, corners: bool | None, scale: float | None, dtype: torch.dtype
) -> T:
    """W, of shape (n, m): the contribution of each of n elements to each of m results."""
    with outside_inference_mode(), torch.no_grad():
        units = torch.eye(n, dtype=dtype, device="cpu")
        if kind == "linear1d":
            w: T = KINDS[kind].func(units.view(1, n, n), [m], corners, scale)
        else:  # two dimensions, of which the first is unchanged
            w = KINDS[kind].func(units.view(1, 1, n, n), [n, m], corners, None, scale)
        return read_only(w.view(n, m))


_NEAREST = ("nearest1d", "exact1d")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _places(x: T, size: _Sizes, scales: _Scales) -> list[int]:
    """The sizes of the result."""
    if size is not None:
        return list(size)
    assert scales is not None
    return [int(n * s) for n, s in zip(x.shape[2:], scales, strict=False)]


def _agree(x: T, size: _Sizes, scales: _Scales) -> bool:
    """Do all of PyTorch's kernels take the same elements as the nearest?"""
    if x.dtype is torch.float64:
        return False
    if scales is None:
        return True
    sizes = zip(x.shape[2:], _places(x, size, scales), scales, strict=False)
    return all(s is None or m not in (n, 2 * n) or n * s == m for n, m, s in sizes)


@functools.lru_cache(maxsize=128)
def _taken(kind: str, n: int, m: int, scale: float | None, dtype: torch.dtype, rounded: bool) -> T:
    """Which of n elements is taken for each of m results, by one of the two kernels."""
    with outside_inference_mode(), torch.no_grad():
        if rounded:  # with channels last it always runs
            x = torch.arange(n, dtype=torch.float32, device="cpu").view(1, n, 1, 1)
            x = x.repeat(1, 1, 1, 4).permute(0, 3, 1, 2)
            y = KINDS[kind.replace("1d", "2d")].func(x, [m, 1], scale, None)[0, 0]
        else:
            x = torch.arange(n, dtype=dtype, device="cpu").view(1, 1, n)
            y = KINDS[kind].func(x, [m], scale)
        return read_only(y.reshape(m).long())


@functools.lru_cache(maxsize=128)
def _sources(
    kind: str, n: int, m: int, scale: float | None, dtype: torch.dtype, rounded: bool
) -> tuple[int, T | None]:
    """For the nearest element: the largest number of copies of an element, and the places of all
    copies.

    The places have the shape (most, n), with m where an element has fewer copies; or are None if
    each has the same number, side by side.
    """
    with outside_inference_mode(), torch.no_grad():
        counts = _taken(kind, n, m, scale, dtype, rounded).bincount(minlength=n)
        most = int(counts.max())
        if most * n == m and bool((counts == most).all()):
            return most, None
        starts = counts.cumsum(0) - counts
        order = torch.arange(most, device="cpu").view(-1, 1)
        return most, read_only(torch.where(order < counts, starts + order, m))


_MOST_STEPS = 16


def _added(g: T, shape: torch.Size, sources: list[tuple[int, T | None]]) -> T:
    """For each element, the sum of the gradients of its copies, added sequentially."""
    if all(places is None for _, places in sources):
        return _sums_of_blocks(g, [most for most, _ in sources])
    steps = [range(most) for most, _ in sources]
    if torch.Size([len(s) for s in steps]).numel() > _MOST_STEPS:
        return _added_at_once(torch.zeros(shape, dtype=g.dtype, device=g.device), g, sources)
    dx = None
    padded = {}
    for offsets in itertools.product(*steps):
        part = g
        for dim, (offset, (most, places)) in enumerate(zip(offsets, sources, strict=True), start=2):
            if places is None:
                part = part[(slice(None),) * dim + (slice(offset, None, most),)]
                continue
            key = offsets[: dim - 1]
            if key not in padded:
                zero = part.new_zeros(()).expand(*part.shape[:dim], 1, *part.shape[dim + 1 :])
                chosen = places[offset].to(g.device)
                padded[key] = torch.cat([part, zero], dim).index_select(dim, chosen)
            part = padded[key]
        dx = part + 0 if dx is None else dx.add_(part)
    assert dx is not None
    return dx


def _sums_of_blocks(g: T, size: list[int]) -> T:
    """The sums of adjacent blocks: means with the divisor 1, which are added in this order too."""
    how = size, size, 0, False, True, 1
    if len(size) == 3:
        return _nn.avg_pool3d(g, *how)  # type: ignore[no-any-return]
    if len(size) == 1:
        return _sums_of_blocks(g.unsqueeze(-2), [1, *size]).squeeze(-2)
    if has_planes(g):
        return planes_first(_nn.avg_pool2d(planes_last(g), *how), *g.shape[:2])
    return _nn.avg_pool2d(g, *how)  # type: ignore[no-any-return]


def _added_at_once(dx: T, g: T, sources: list[tuple[int, T | None]]) -> T:
    count = dx[0, 0].numel()
    to = torch.zeros((), dtype=torch.int64, device="cpu")
    for n, m, (most, places) in zip(dx.shape[2:], g.shape[2:], sources, strict=True):
        of = torch.arange(n, device="cpu")
        if places is None:
            of = of.repeat_interleave(most)
        else:
            counts = (places < m).sum(0)
            of = of.repeat_interleave(counts)
        to = (to.unsqueeze(-1) * n + of).reshape(*to.shape, m)
    images = torch.arange(dx.shape[0] * dx.shape[1], device="cpu").view(-1, 1) * count
    to = (images + to.reshape(1, -1)).reshape(-1).to(g.device)
    return dx.view(-1).index_add_(0, to, g.reshape(-1)).view(dx.shape)


def _by_name(kind: str, func: TorchFunction) -> None:
    takes_corners = KINDS[kind].takes_corners

    def call(input: T, output_size: _Sizes = None, *how: object, **named: Any) -> T:
        names = ["align_corners"] * takes_corners
        rest = dict(zip([*names, "scale_factors"], how, strict=False), **named)
        scales = rest.pop("scale_factors", None)
        corners = rest.pop("align_corners", None)
        if rest or len(how) > 1 + takes_corners or not (scales is None or output_size is None):
            scales = [*how[takes_corners:], *rest.values()]
        return upsample(input, kind, output_size, corners, scales)

    composite(func)(call)


for _kind, _of in KINDS.items():
    _by_name(_kind, _of.func)
