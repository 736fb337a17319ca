"""Which layers have PyTorch's bits in exact mode alone.

All others have them always.
"""

from . import activation, batchnorm, normalization, softmax  # noqa: F401
from .attach import ATTACHED

# Each module of exact forms is imported here, which attaches them.

__all__ = ["ATTACHED"]
