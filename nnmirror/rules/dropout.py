"""Dropout: random elements become zero, and the others are scaled to keep the mean.

Or whole features (N, C, ...) do. For alpha dropout, the elements become the limit of SELU far below
0, and all are scaled and shifted, to keep mean and variance.

PyTorch draws the elements in two ways: on the CPU (and in place) it multiplies by a noise tensor
drawn before; elsewhere one kernel draws and multiplies, with other numbers for the same seed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from .. import _torch
from .._torch import DisableTorchFunctionSubclass
from .._types import TorchFunction
from ..constants import number
from ..tape import record
from .arithmetic import Mul
from .registry import Rule, check_numbers, composite, unplaced

T = torch.Tensor


class Dropout(Rule):
    """y = x m:  dx = g m.  Saved: m, which `noise` draws, for each feature where `features`."""

    keeps = drawn = ("m",)
    counted = (0, 1)  # PyTorch's node has a place for the noise
    public = None  # a subclass gets the public function, not this part of it

    @staticmethod
    def infer(input: T, p: float, features: bool = False) -> T:  # type: ignore[override]
        return input * noise(input, p, features)

    @staticmethod
    def forward(input: T, p: float, features: bool = False) -> tuple[T, T]:
        m = noise(input, p, features)
        return torch.mul(input, m), m  # not `*`, which is a method of a tracked tensor

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
    def infer(input: T, p: float, features: bool = False) -> T:
        return input.mul_(noise(input, p, features))

    @staticmethod
    def forward(input: T, p: float, features: bool = False) -> tuple[T, T]:
        m = noise(input, p, features)
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


def checked(input: T, p: float, training: bool, func: TorchFunction) -> float:
    """The probability as a number, or PyTorch's error for it, or for `training`."""
    if type(p) is float and type(training) is bool:
        return p
    check_numbers(func, (input, p, training), {})
    with DisableTorchFunctionSubclass():
        func(torch.empty(0, 0), p, training)
    return float(p)  # a tensor would draw other random numbers


def noise(input: T, p: float, features: bool = False) -> T:
    """m: 0 with probability p, else 1 / (1 - p).

    Drawn as PyTorch draws it, in the memory order of the input.
    """
    if p == 1:
        return torch.zeros((), dtype=input.dtype, device=input.device)
    return _kept(input, p, features).div_(number(1 - p, input))


def _kept(input: T, p: float, features: bool) -> T:
    """1 for each element that is kept, or for each feature; 0 for the others."""
    if not features:
        return torch.empty_like(input).bernoulli_(1 - p)
    if input.dim() < 2:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    shape = *input.shape[:2], *[1] * (input.dim() - 2)
    return input.new_empty(shape).bernoulli_(1 - p)


def drops(input: T, p: float, training: bool) -> bool:
    """Are there random numbers to draw? If not, y = x."""
    if not training or p == 0:
        return False
    with DisableTorchFunctionSubclass():
        return input.numel() > 0


@contextlib.contextmanager
def drawn_anyway(input: T, p: float, features: bool = False) -> Iterator[None]:
    """For dropout in place: PyTorch draws even where the change is refused, as for a leaf."""
    try:
        yield
    except RuntimeError:
        with DisableTorchFunctionSubclass(), torch.no_grad():
            noise(input, p, features)
        raise


def draws_at_once(input: T, p: float) -> bool:
    """Whether PyTorch has a single kernel for this dropout on the tensor's device, and uses it."""
    with DisableTorchFunctionSubclass():
        if input.is_cpu:
            return False
        return input.device.type in _AT_ONCE and 0 < p < 1 and input.numel() > 0


_AT_ONCE = {"cuda", "xpu", _torch.get_privateuse1_backend_name()}


def dropout(input: T, p: float, training: bool, inplace: bool, features: bool = False) -> T:
    """y = x m, or x itself where nothing is to be dropped."""
    if training and not (inplace or features) and draws_at_once(input, p):
        return record(NativeDropout, (input, p))[0]
    if not drops(input, p, training):
        return input
    if inplace:
        with drawn_anyway(input, p, features):
            return record(DropoutInplace, (input, p, features))[0]
    return record(Dropout, (input, p, features))[0]


# The limit of SELU far below 0, negated.
_SELU_FLOOR = 1.7580993408473766


def alpha_dropout(input: T, p: float, training: bool, inplace: bool, features: bool = False) -> T:
    """y = x m + b, m = a and b = a s p where x is kept, else m = 0 and b = a s (p - 1):  dx = g m

    with s = 1.758, -s the least value of SELU, and a = 1 / sqrt((s^2 p + 1) (1 - p)).
    """
    if not drops(input, p, training):
        return input
    b = None
    with DisableTorchFunctionSubclass(), torch.no_grad():
        if p == 1:
            m = noise(input, p)
        else:
            m = _kept(input, p, features)
            s = _SELU_FLOOR
            a = 1.0 / math.sqrt((s * s * p + 1) * (1 - p))
            b = m.add(-1).mul_(s * a).add_(s * a * p)
            m.mul_(a)
    y: T = input.mul_(m) if inplace else record(Mul, (input, m))[0]
    return y if b is None else y.add_(b)


def _by_name(func: TorchFunction, function: Callable[..., T], *how: bool) -> None:
    """torch.dropout and the others, with their own errors."""

    def call(input: T, p: float, train: bool) -> T:
        if isinstance(input, T) and isinstance(p, int | float) and 0 <= p <= 1:
            return function(input, p, train, *how)
        raise unplaced(func, (input, p, train), {})

    composite(func)(call)


# By whether elements or features are dropped, and in place.
KINDS = {
    (dropout, False, False): torch.dropout,
    (dropout, False, True): torch.dropout_,
    (dropout, True, False): torch.feature_dropout,
    (dropout, True, True): torch.feature_dropout_,
    (alpha_dropout, False, False): torch.alpha_dropout,
    (alpha_dropout, False, True): torch.alpha_dropout_,
    (alpha_dropout, True, False): torch.feature_alpha_dropout,
    (alpha_dropout, True, True): torch.feature_alpha_dropout_,
}
for (_function, _features, _inplace), _func in KINDS.items():
    _by_name(_func, _function, _inplace, _features)
