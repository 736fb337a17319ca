"""Random draws whose distribution depends on tensors: dx = 0.

PyTorch gives zeros as well; for a gradient through a draw, use `rsample`.
"""

from typing import NoReturn

import torch

from .._types import Number, TorchFunction
from ..tape import record
from .registry import Rule, answered

T = torch.Tensor


def _zeros(g: T, shape: torch.Size) -> T:
    return torch.zeros(shape, dtype=g.dtype, device=g.device)


class Normal(Rule):
    """z drawn from the normal distribution N(mean, std^2):  dmean = 0,  dstd = 0"""

    @staticmethod
    def forward(mean: T | Number, std: T | Number, generator: torch.Generator | None) -> T:
        normal: TorchFunction = torch.normal
        return normal(mean, std, generator=generator)

    @classmethod
    def label_of(cls, mean: T | Number, std: T | Number, generator: torch.Generator | None) -> str:
        return f"NormalBackward{isinstance(mean, T) + 2 * isinstance(std, T)}"

    @staticmethod
    def d_mean(g: T, mean_shape: torch.Size) -> T:
        return _zeros(g, mean_shape)

    @staticmethod
    def d_std(g: T, std_shape: torch.Size) -> T:
        return _zeros(g, std_shape)


@answered(torch.normal)
def normal(
    mean: T | Number, std: T | Number = 1.0, *, generator: torch.Generator | None = None
) -> T:
    return record(Normal, (mean, std, generator))[0]


class Poisson(Rule):
    """z drawn from the Poisson distribution with this rate:  dx = 0"""

    @staticmethod
    def forward(input: T, generator: torch.Generator | None) -> T:
        return torch.poisson(input, generator)

    @staticmethod
    def d_input(g: T, input_shape: torch.Size) -> T:
        return _zeros(g, input_shape)


@answered(torch.poisson)
def poisson(input: T, generator: torch.Generator | None = None) -> T:
    return record(Poisson, (input, generator))[0]


class Bernoulli(Rule):
    """z = 1 with probability x, else 0:  dx = 0"""

    @staticmethod
    def forward(input: T, generator: torch.Generator | None) -> T:
        return torch.bernoulli(input, generator=generator)

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)


class BernoulliP(Rule):
    """z = 1 with probability p, in the shape of x; PyTorch has no gradient of it."""

    @staticmethod
    def forward(input: T, p: float, generator: torch.Generator | None) -> T:
        return torch.bernoulli(input, p, generator=generator)

    @staticmethod
    def d_input(g: T) -> NoReturn:
        raise RuntimeError("derivative for aten::bernoulli is not implemented")

    @classmethod
    def node_name(cls) -> str:
        return "NotImplemented"


@answered(torch.bernoulli, T.bernoulli)
def bernoulli(input: T, p: float | None = None, *, generator: torch.Generator | None = None) -> T:
    if p is None:
        return record(Bernoulli, (input, generator))[0]
    return record(BernoulliP, (input, p, generator))[0]


class BernoulliInplace(Rule):
    """x becomes 1 with probability p, else 0:  dx = 0,  dp = 0"""

    @staticmethod
    def forward(input: T, p: Number) -> T:
        return input

    @classmethod
    def label_of(cls, input: T, p: Number) -> str:
        return f"BernoulliBackward{1 if isinstance(p, T) else 2}"

    @staticmethod
    def d_input(g: T) -> T:
        return torch.zeros_like(g)

    @staticmethod
    def d_p(g: T, p: T) -> T:
        return torch.zeros_like(p)


@answered(T.bernoulli_)
def bernoulli_(input: T, p: Number = 0.5, *, generator: torch.Generator | None = None) -> T:
    return record(
        BernoulliInplace, (input, p), inplace=lambda: T.bernoulli_(input, p, generator=generator)
    )[0]
