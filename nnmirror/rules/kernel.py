"""How PyTorch's CPU kernels iterate over the elements of a tensor.

A kernel has a vectorized path, for elements that fill two vector registers, and a scalar path, for
the remaining ones at the end of a row. Where the two round differently (each has its own `exp`, and
fuses other multiplications with additions), a rule passes `by_path` a formula for each.

On other devices there is only the scalar path, with the device's own `exp`: the second formula is
used for all elements.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.overrides import handle_torch_function

from .. import _torch
from ..accumulate import is_dense
from ..constants import constant, read_only
from ..grad_mode import outside_inference_mode

T = torch.Tensor

GRAIN = 32768  # kernels use one thread for fewer elements than this


def register_bytes() -> int:
    return 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


def lanes(x: T) -> int:
    """How many elements of x fit a vector register, as PyTorch uses it here."""
    return register_bytes() // x.dtype.itemsize


def in_turn(x: T, n: int) -> T:
    """The sum of the first n along the last dimension, computed sequentially."""
    total = x[..., 0]
    if n < 5 or total.numel() > 1000:
        for i in range(1, n):
            total = total + x[..., i]
        return total
    # A single call that adds one slice after the other: faster for few elements.
    rest = x[..., 1:n].movedim(-1, 0)
    every = torch.zeros(n - 1, dtype=torch.int64, device=x.device)
    return add_rows(total.clone().unsqueeze(0), every, rest)[0]


def lane_sum(x: T, narrow: bool, times: T | None = None) -> T:
    """The sum of x (or of x times another) along its last dimension, added up lane by lane.

    Elements that do not fill a register are added last, to the first lanes. In float32 their
    product is not rounded separately if the kernel runs in one thread, or over one row: the
    compiler makes a separate loop for that case.
    """
    n, width = x.shape[-1], lanes(x)
    if narrow:
        width *= 2  # a register of 16-bit numbers fills two of 32-bit ones
    terms = x if times is None else x * times
    half = width // 2 if narrow else width
    if n <= half and n < width:
        return in_turn(terms, n)
    total, end = terms[..., :width], max(n - n % width, width)
    for start in range(width, end, width):
        total = total + terms[..., start : start + width]
    rest = n - end
    if rest > 0:
        low = total[..., :rest]
        many = torch.get_num_threads() > 1 and x.numel() > n
        if times is None or many or narrow or x.dtype is torch.float64:
            low = low + terms[..., end:]
        else:
            low = torch.addcmul(low, x[..., end:], times[..., end:])
        total = torch.cat([low, total[..., rest:]], -1)
    if narrow:
        low, high = total[..., :half], total[..., half:]
        rest = high.shape[-1]
        total = torch.cat([low[..., :rest] + high, low[..., rest:]], -1)
    plainly = torch.backends.cpu.get_cpu_capability() == "DEFAULT" or x.dtype is torch.float64
    if plainly or n < width:
        return in_turn(total, half)
    while half > 1:
        half //= 2
        total = total[..., :half] + total[..., half : 2 * half]
    return total[..., 0]


def add_rows(to: T, places: T, rows: T) -> T:
    """Add each row to the row of `to` at its index, sequentially.

    `index_add_` uses several threads to sort even a few rows, and starting the threads takes longer
    than the sum. `index_put_` adds in one thread up to 32,768 elements, and with more in several
    threads, in no fixed order.
    """
    if rows.numel() < GRAIN or not rows.is_cpu:
        return to.index_put_((places,), rows, accumulate=True)
    if rows.dtype.itemsize == 2:  # with an alpha it rounds each step, as `index_put_` does
        return to.index_add_(0, places, -rows, alpha=-1)
    return to.index_add_(0, places, rows.contiguous())  # ten times as fast as from expanded rows


def transposed(t: T, rows: int) -> T:
    """The transpose of what is in memory a matrix with that many rows; `as_strided` shapes it.

    This operation alone moves many numbers at a time: copying `t.t()` takes five times as long.
    """
    n = t.numel()
    return torch.native_channel_shuffle(t.as_strided((1, n, 1, 1), (n, 1, n, n)), rows)


def has_planes(x: T) -> bool:
    """Are these contiguous planes, of enough elements for a pool of `planes_last` to be faster?

    Its kernel takes the elements of a plane one by one, but many channels together. With the two
    transposes that takes a third to a tenth of the time, and has the same result.
    """
    return (
        x.numel() >= 8192
        and x.dim() == 4
        and x.is_cpu
        and x.is_contiguous()
        and not x.is_contiguous(memory_format=torch.channels_last)
        and x.dtype.itemsize > 2
    )


def planes_last(x: T) -> T:
    """All planes of x as the channels of one sample, in the memory format channels_last."""
    batch, channels, height, width = x.shape
    n = batch * channels
    return transposed(x, n).as_strided((1, n, height, width), (x.numel(), 1, width * n, n))


def planes_first(t: T, batch: int, channels: int) -> T:
    """The inverse of `planes_last`, for what a pool has computed."""
    if not t.is_floating_point():  # the places of maxima
        t = t.to(torch.int32).view(torch.float32)
        return planes_first(t, batch, channels).view(torch.int32).to(torch.int64)
    _, _, height, width = t.shape
    n = height * width
    return transposed(t, n).as_strided(
        (batch, channels, height, width), (channels * n, n, width, 1)
    )


# masked_fill and where branch for each element, which the processor has to predict. For many
# elements, selecting by bit operations on integers is many times faster.
_FLOATS = (torch.float32, torch.float64)
FEW = 4096


def chosen_by_bits(*tensors: T) -> bool:
    """Are there enough elements to select by bit operations, and are all tensors contiguous?"""
    first = tensors[0]
    return (
        first.numel() >= FEW
        and first.is_cpu
        and first.dtype in _FLOATS
        and all(
            t.dtype is first.dtype and t.shape == first.shape and t.is_contiguous() for t in tensors
        )
    )


def memory_format(x: T) -> torch.memory_format:
    """The memory format that the strides suggest, even if x does not fill its memory."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats or x.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        size, step = x.shape[d], x.stride(d)
        if size == 0 or step < least or (d == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = step * max(size, 1)
    return formats[x.dim()]


def laid_out_as(dx: T, g: T) -> T:
    """dx in the memory layout of g, as the kernel returns it.

    A later sum over dx follows its memory order.
    """
    if (g.is_contiguous() and dx.is_contiguous()) or dx.stride() == g.stride() or not is_dense(g):
        return dx
    return torch.empty_like(g).copy_(dx)


def one_call(function: Callable[..., T]) -> Callable[..., T]:
    """For a mode, such as one that records a walk, `function` is one call, as a function of torch
    is; the calls that it consists of are not seen.
    """

    @functools.wraps(function)
    def call(*args: object) -> T:
        if _torch.is_torch_function_mode_enabled():
            return handle_torch_function(call, (), *args)  # type: ignore[no-any-return]
        return function(*args)

    return call


def where_positive(g: T, y: T) -> T:
    """g where y > 0 or is NaN, else 0; y is not below 0.

    For many elements, the bits of g times 1, or times 0 where y is 0 or -0.
    """
    if y.numel() < SOME or not y.is_cpu:
        zero = constant(0.0, g.dtype, g.device)
        mask = torch.le(y, zero)
        return g.masked_fill(mask, zero)
    positive = integers(y.abs()).clamp_(max=1)  # a NaN counts as positive, whatever its sign
    return positive.mul_(integers(g)).view(g.dtype)


def integers(x: T) -> T:
    """The same memory as integers of the same width."""
    return x.view(_INTEGERS[x.dtype.itemsize])


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
SOME = 1024  # elements: for fewer, branching costs less than further calls


def is_flat(g: T) -> bool:
    """Can it be viewed as one dimension? An expanded scalar, such as the gradient of a sum, can."""
    return g.is_contiguous() or not any(g.stride())


def by_sign(x: T, positive: T, other: T) -> T:
    """`positive` where x > 0, else `other`, whose memory may be overwritten."""
    zero = constant(0.0, x.dtype, x.device)
    if not chosen_by_bits(x, positive, other):
        return torch.where(torch.gt(x, zero), positive, other)
    # other, with the bits flipped in which they differ where x > 0.
    differ = torch.bitwise_xor(integers(positive), integers(other))
    chosen = torch.gt(x, zero, out=torch.empty_like(x, dtype=differ.dtype)).neg_()
    integers(other).bitwise_xor_(differ.bitwise_and_(chosen))
    return other


_log_sigmoid = torch.ops.aten.log_sigmoid_forward.default


def vector_exp(x: T) -> T:
    """exp(-|x|) as vectorized kernels round it; torch.exp rounds differently."""
    if not x.is_cpu:
        return torch.exp(-x.abs())
    if _goes_to_one_thread(x, above=1) and x.dtype in _SLEEF and _sleef_is_known(x.dtype):
        return _sleef_exp(x)
    return _log_sigmoid(x)[1]  # it uses every thread, even for two elements


class _Sleef(NamedTuple):
    """exp(d) = 2^q exp(s), s = d - q log(2), as in the library SLEEF, for one dtype."""

    most: float  # of |d|: above, the exp is 0
    mantissa: int  # its bits; to add 3 / 2 of their unit rounds to an integer, the last bits
    spare: int  # 2^spare prevents underflow until the final rounding
    log: tuple[float, float]  # log(2), in two parts
    polynomial: tuple[float, ...]  # of s, from the highest power down to s^3, or s^2


_SLEEF = {
    torch.float32: _Sleef(
        105.0,
        23,
        64,
        (0.693145751953125, 1.428606765330187e-06),
        (
            0.00019852761761285365,
            0.0013930435525432515,
            0.0083333607763051987,
            0.041666485369205475,
            0.16666667163372040,
            0.5,
        ),
    ),
    torch.float64: _Sleef(
        1000.0,
        52,
        600,
        (0.6931471805596629565116, 0.2823529056303157712259e-12),
        (
            0.2081276378237164457e-8,
            0.2511210703042288022e-7,
            0.2755762628169491192e-6,
            0.2755723402025388239e-5,
            0.2480158687479686264e-4,
            0.1984126989855865850e-3,
            0.1388888888914497797e-2,
            0.8333333333314938210e-2,
            0.4166666666666602598e-1,
            0.1666666666666669072,
        ),
    ),
}


def _sleef_exp(x: T) -> T:
    """exp(-|x|), by operations that use one thread for few elements."""
    how = _SLEEF[x.dtype]

    def number(value: float) -> T:
        return constant(value, x.dtype, x.device)

    d = torch.clamp(x.abs(), max=number(how.most)).neg_()
    to_integer = number(1.5 * 2.0**how.mantissa + how.spare)
    shifted = (d * number(1 / math.log(2))).add_(to_integer)
    q = shifted - to_integer
    s = torch.addcmul(d, q, number(-how.log[0]))
    torch.addcmul(s, q, number(-how.log[1]), out=s)
    z = (_horner if x.dtype is torch.float32 else _estrin)(s, [*map(number, how.polynomial)])
    integers(z).add_(integers(shifted) << how.mantissa)
    return torch.addcmul(d - d, z, number(2.0**-how.spare))  # d - d: NaN where x is NaN


def _horner(s: T, polynomial: list[T]) -> T:
    """exp(s) by Horner's scheme."""
    z, *others = polynomial
    for coefficient in others:
        z = torch.addcmul(coefficient, z, s)
    return constant(1.0, s.dtype, s.device) + torch.addcmul(s, s * s, z)


def _estrin(s: T, polynomial: list[T]) -> T:
    """exp(s) by Estrin's scheme: pairs of powers, pairs of pairs, and so on."""
    terms, power = polynomial[::-1], s
    while len(terms) > 1:
        odd = terms[len(terms) // 2 * 2 :]
        pairs = zip(terms[::2], terms[1::2], strict=False)
        terms, power = [torch.addcmul(a, power, b) for a, b in pairs] + odd, power * power
    (z,) = terms
    for coefficient in (0.5, 1.0, 1.0):
        z = torch.addcmul(constant(coefficient, s.dtype, s.device), z, s)
    return z


@functools.cache
def _sleef_is_known(dtype: torch.dtype) -> bool:
    """Does this PyTorch use the exp of `_sleef_exp` on this machine?"""
    # Without modes: this one-time check must not be part of a walk that is being recorded.
    with _torch.DisableTorchFunction(), outside_inference_mode(), torch.no_grad():
        n = torch.arange(10000.0, dtype=dtype, device="cpu")
        far = n * (_SLEEF[dtype].most / 10000)
        every = torch.cat([far, torch.sin(n), torch.exp(-0.01 * n)])
        return torch.equal(_sleef_exp(every), _log_sigmoid(every)[1])


_ALONE = 2048  # elements: up to here one thread computes a function of the vector library


def _goes_to_one_thread(x: T, above: int) -> bool:
    """Does an addition of these use one thread, while other kernels use several?"""
    return above < x.numel() < GRAIN and x.is_cpu and torch.get_num_threads() > 1


def alone(function: Callable[..., T], x: T) -> T:
    """function(x), a root, exp, log or tanh, in one thread where an addition would use one.

    torch uses several threads for them from 2,049 elements on, and starting those takes time.
    """
    if not _goes_to_one_thread(x, above=_ALONE) or not x.is_contiguous():
        return function(x)
    result = torch.empty_like(x)
    for part, to in zip(*[t.view(-1).split(_ALONE) for t in (x, result)], strict=True):
        function(part, out=to)
    return result


def scalar_exp(x: T) -> T:
    """exp(x) as the C library rounds it, which PyTorch uses for complex numbers."""
    if not x.is_cpu:
        return torch.exp(x)
    return alone(torch.exp, torch.complex(x, torch.zeros_like(x))).real


def widened(*tensors: T) -> tuple[T, ...]:
    """In float32 or higher precision, and with at least one dimension."""
    wide = [t.float() if t.dtype.itemsize == 2 else t for t in tensors]
    return tuple([t if t.dim() else t.reshape(1) for t in wide])


def vectorized_path(function: Callable[[T], T], x: T) -> T:
    """function(x), an elementwise kernel, with all of x on its vectorized path."""
    if not x.is_cpu:
        return function(x)
    flat = x.reshape(-1)
    block = 2 * register_bytes() // x.dtype.itemsize
    if len(flat) % block == 0 and len(flat) < GRAIN:
        return function(flat).view(x.shape)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % block)])
    if torch.get_num_threads() == 1 or len(padded) < GRAIN:
        return function(padded)[: len(flat)].view(x.shape)
    parts = [function(part) for part in padded.split(GRAIN - GRAIN % block - block)]
    return torch.cat(parts)[: len(flat)].view(x.shape)


def scalar_path(function: Callable[[T], T], x: T) -> T:
    """function(x), an elementwise kernel, with all of x on its scalar path."""
    if not x.is_cpu:
        return function(x)
    spaced = torch.stack([x, x], -1)[..., 0]
    return function(spaced).contiguous()


def by_path(
    vectorized: Callable[..., T],
    scalar: Callable[..., T],
    tensors: Sequence[T],
    operands: Sequence[T],
    short: bool = False,
) -> T:
    """An elementwise function of `tensors`, by the formula of the vectorized or the scalar path.

    `operands` are those of PyTorch's kernel, with its result if no operand has the same layout; all
    have one shape.
    """
    first = tensors[0]
    n = first.numel()
    if not first.is_cpu:
        return scalar(*tensors)
    constants = 0
    for operand in operands:
        if not operand.is_contiguous():
            constants += 1 if n > 1 and not any(operand.stride()) else 2
    if constants < 2 and n < GRAIN:  # nearly always: one loop, with the scalar path at its end
        left = n % _block(operands[0], short)
        if not left:
            return vectorized(*tensors)
        if left == n:
            return scalar(*tensors)
        flat = [t.reshape(-1) for t in tensors]
        start = n - left
        head, rest = [t[:start] for t in flat], [t[start:] for t in flat]
        return torch.cat([vectorized(*head), scalar(*rest)]).view(first.shape)
    alone = on_scalar_path(*operands, short=short).view(first.shape)
    return torch.where(alone, scalar(*tensors), vectorized(*tensors))


def _block(x: T, short: bool) -> int:
    """How many elements fill the two registers that the vectorized path processes together."""
    return 2 * (32 if short else register_bytes()) // x.dtype.itemsize


def on_scalar_path(*operands: T, short: bool = False) -> T:
    """A mask of the elements on the scalar path of an elementwise kernel over `operands`.

    `short` for a kernel that is not compiled for registers of 64 bytes, on machines that have them.

    The kernel's loops are PyTorch's TensorIterator's: dimensions ordered by stride and merged
    where possible, the innermost vectorized if each operand is contiguous along it and at most one
    is constant. If rows are distributed over threads, the ends of the threads' parts are not taken
    into account.
    """
    shape = operands[0].shape
    if not operands[0].is_cpu:
        return torch.ones(shape, dtype=torch.bool, device=operands[0].device)
    order, sizes, strides = _loops(shape, [x.stride() for x in operands])
    is_shared = len(sizes) == 1 and sizes[0] >= GRAIN
    return _on_scalar_path(
        tuple(shape),
        tuple(order),
        tuple(sizes),
        tuple([s[0] for s in strides]),
        _block(operands[0], short),
        torch.get_num_threads() if is_shared else 1,
    )


@functools.lru_cache(maxsize=64)
def _on_scalar_path(
    shape: tuple[int, ...],
    order: tuple[int, ...],
    sizes: tuple[int, ...],
    steps: tuple[int, ...],
    block: int,
    threads: int,
) -> T:
    inner = sizes[0]
    with outside_inference_mode(), torch.no_grad():
        # A script's default device may differ.
        alone = torch.ones(inner, dtype=torch.bool, device="cpu")
        if all(s in (0, 1) for s in steps) and steps.count(0) <= 1:
            share = -(-inner // min(threads, -(-inner // GRAIN))) if threads > 1 else inner
            for start in range(0, inner, max(share, 1)):
                size = min(share, inner - start)
                alone[start : start + size - size % block] = False
        rows = alone.expand(*reversed(sizes[1:]), inner)
        # From the order of the loops, innermost last, back to that of the dimensions.
        back = [0] * len(order)
        for place, dim in enumerate(reversed(order)):
            back[dim] = place
        mask = rows.reshape([shape[d] for d in reversed(order)]).permute(back)
    # A recorded walk may run later, with another number of threads.
    return read_only(mask) if inner < GRAIN else mask


def _loops(
    shape: Sequence[int], strides: list[tuple[int, ...]]
) -> tuple[list[int], list[int], list[list[int]]]:
    """The dimensions, innermost first; the loops they are merged to; each operand's strides in
    these."""
    order = list(reversed(range(len(shape))))
    for i in range(1, len(order)):
        at = i
        for before in reversed(range(i)):
            swap = _swapped(order[before], order[at], shape, strides)
            if swap > 0:
                order[before], order[at] = order[at], order[before]
                at = before
            elif swap < 0:
                break
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for dim in order:
        size = shape[dim]
        if sizes and (
            size == 1
            or sizes[-1] == 1
            or all(sizes[-1] * mine[-1] == s[dim] for mine, s in zip(steps, strides, strict=True))
        ):
            if sizes[-1] == 1:
                for mine, s in zip(steps, strides, strict=True):
                    mine[-1] = s[dim]
            sizes[-1] *= size
        else:
            sizes.append(size)
            for mine, s in zip(steps, strides, strict=True):
                mine.append(s[dim])
    if not sizes:  # a number
        return order, [1], [[1] for _ in strides]
    return order, sizes, steps


def _swapped(inner: int, outer: int, shape: Sequence[int], strides: list[tuple[int, ...]]) -> int:
    """1 if the two dimensions have to be exchanged, -1 if not, 0 if it does not matter."""
    for s in strides:
        if s[inner] == 0 or s[outer] == 0:
            continue
        if s[inner] != s[outer]:
            return 1 if s[inner] > s[outer] else -1
        if shape[inner] > shape[outer]:
            return 1
    return 0
