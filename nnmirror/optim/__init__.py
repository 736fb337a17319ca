"""Optimisers, as `torch.optim`."""

from .._missing import missing
from . import lr_scheduler
from .optimizer import Optimizer
from .sgd import SGD

__all__ = ["SGD", "Optimizer", "lr_scheduler"]

__getattr__ = missing(__name__, __all__)
