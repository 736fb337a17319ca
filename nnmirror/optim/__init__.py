"""Optimisers, as `torch.optim`."""

from .._missing import missing
from .optimizer import Optimizer
from .sgd import SGD

__all__ = ["SGD", "Optimizer"]

__getattr__ = missing(__name__, __all__)
