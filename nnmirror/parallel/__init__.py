"""Training in several processes, as `torch.nn.parallel`.

.. include:: README.md
"""

from typing import TYPE_CHECKING

from .._missing import missing
from .distributed import DistributedDataParallel

__all__ = ["DistributedDataParallel"]

if not TYPE_CHECKING:  # a type checker reports such a name itself
    __getattr__ = missing(__name__, __all__)
