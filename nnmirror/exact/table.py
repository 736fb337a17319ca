"""Which layers have PyTorch's bits in exact mode alone.

All others have them always.
"""

from .attach import ATTACHED

# Here each module of exact forms is imported, which attaches them.

__all__ = ["ATTACHED"]
