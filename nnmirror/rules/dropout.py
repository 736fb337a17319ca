"""Dropout: some elements become zero at random, the others grow, so that the mean stays.

PyTorch draws in two ways: on the CPU (and in place) it multiplies with a noise made beforehand,
elsewhere one kernel draws and multiplies, and gives other numbers for the same seed.
"""

import contextlib
from collections.abc import Iterator

import torch

from .. import _torch
from .._torch import DisableTorchFunctionSubclass
from .._types import TorchFunction
from ..tape import record
from .registry import Rule, check_numbers, composite, unplaced

T = torch.Tensor


class Dropout(Rule):
    """y = x m:  dx = g m.  Saved: m, which `noise` draws."""

    keeps = drawn = ("m",)
    counted = (0, 1)  # PyTorch's node has a place for the noise
    public = None  # a subclass is asked about what is called, and not about this part of it

    @staticmethod
    def infer(input: T, p: float) -> T:  # type: ignore[override]
        return input * noise(input, p)

    @staticmethod
    def forward(input: T, p: float) -> tuple[T, T]:
        m = noise(input, p)
        return input * m, m

    @staticmethod
    def d_input(g: T, m: T) -> T:
        return g * m

    @classmethod
    def node_name(cls) -> str:
        return "MulBackward0"


class DropoutInplace(Dropout):
    """`Dropout` into the memory of its input."""

    is_inplace = True
    public = None

    @staticmethod
    def infer(input: T, p: float) -> T:
        return input.mul_(noise(input, p))

    @staticmethod
    def forward(input: T, p: float) -> tuple[T, T]:
        m = noise(input, p)
        return input.mul_(m), m


class NativeDropout(Rule):
    """y = x m / (1 - p):  dx = g m / (1 - p).  Saved: m, zeros and ones, which the kernel draws."""

    keeps = ("m",)

    @staticmethod
    def forward(input: T, p: float) -> tuple[T, T]:
        return torch.native_dropout(input, p, True)

    @staticmethod
    def d_input(g: T, m: T, p: float) -> T:
        return g * m * (1.0 / (1.0 - p))


def check_number(input: T, p: float, training: bool, inplace: bool) -> None:
    """PyTorch's error for a probability that would need a gradient."""
    if type(p) is not float:
        check_numbers(torch.dropout_ if inplace else torch.dropout, (input, p, training), {})


def noise(input: T, p: float) -> T:
    """m: 0 with probability p, else 1 / (1 - p).

    Drawn as PyTorch draws it, in the order in which the input lies in memory.
    """
    if p == 1:
        return torch.zeros((), dtype=input.dtype, device=input.device)
    return torch.empty_like(input).bernoulli_(1 - p).div_(1 - p)


def drops(input: T, p: float, training: bool) -> bool:
    """Is anything drawn? Else y = x."""
    if not training or p == 0:
        return False
    with DisableTorchFunctionSubclass():
        return input.numel() > 0


@contextlib.contextmanager
def drawn_anyway(input: T, p: float) -> Iterator[None]:
    """For dropout in place: where that is refused, as of a leaf, PyTorch has drawn by then."""
    try:
        yield
    except RuntimeError:
        with DisableTorchFunctionSubclass(), torch.no_grad():
            noise(input, p)
        raise


def draws_at_once(input: T, p: float) -> bool:
    """Whether PyTorch has one kernel for this dropout where the tensor is, and uses it."""
    with DisableTorchFunctionSubclass():
        if input.is_cpu:
            return False
        return input.device.type in _AT_ONCE and 0 < p < 1 and input.numel() > 0


_AT_ONCE = {"cuda", "xpu", _torch.get_privateuse1_backend_name()}


def dropout(input: T, p: float, training: bool, inplace: bool) -> T:
    """y = x m, or x itself where nothing is to be dropped."""
    if training and not inplace and draws_at_once(input, p):
        return record(NativeDropout, (input, p))[0]
    if not drops(input, p, training):
        return input
    if inplace:
        with drawn_anyway(input, p):
            return record(DropoutInplace, (input, p))[0]
    return record(Dropout, (input, p))[0]


def _by_name(func: TorchFunction, inplace: bool) -> None:
    """torch.dropout and torch.dropout_, which have errors of their own."""

    def call(input: T, p: float, train: bool) -> T:
        if isinstance(input, T) and isinstance(p, int | float) and 0 <= p <= 1:
            return dropout(input, p, train, inplace)
        raise unplaced(func, (input, p, train), {})

    composite(func)(call)


_by_name(torch.dropout, False)
_by_name(torch.dropout_, True)
