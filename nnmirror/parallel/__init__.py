"""Training in several processes, as `torch.nn.parallel`."""

from .._missing import missing
from .distributed import DistributedDataParallel

__all__ = ["DistributedDataParallel"]

__getattr__ = missing(__name__, __all__)
