"""Optimisers, as `torch.optim`."""

from typing import TYPE_CHECKING

from .._missing import missing
from . import lr_scheduler as lr_scheduler
from .adagrad import Adagrad
from .adam import Adam
from .adamw import AdamW
from .optimizer import Optimizer
from .rmsprop import RMSprop
from .sgd import SGD
from .signsgd import SignSGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Optimizer", "RMSprop", "SignSGD"]

if not TYPE_CHECKING:  # which then reports such a name itself
    __getattr__ = missing(
        __name__, __all__, "take it from torch.optim, which works on mirrored parameters"
    )
