"""The modules, one file for each of PyTorch's."""

from .activation import LeakyReLU, ReLU, Tanh
from .container import Sequential
from .linear import Linear
from .loss import MSELoss
from .module import Module

__all__ = ["LeakyReLU", "Linear", "MSELoss", "Module", "ReLU", "Sequential", "Tanh"]
