"""Optimisers, as `torch.optim`.

Those that are not mirrored (`LBFGS`, `Adamax` and the rest) are PyTorch's own classes here: they
work on mirrored parameters as they are, to the same bits.
"""

from typing import TYPE_CHECKING

from .._missing import missing
from . import lr_scheduler as lr_scheduler
from . import swa_utils as swa_utils
from .adagrad import Adagrad
from .adam import Adam
from .adamw import AdamW
from .optimizer import Optimizer
from .rmsprop import RMSprop
from .sgd import SGD
from .signsgd import SignSGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Optimizer", "RMSprop", "SignSGD"]

if TYPE_CHECKING:
    from torch.optim import ASGD as ASGD
    from torch.optim import LBFGS as LBFGS
    from torch.optim import Adadelta as Adadelta
    from torch.optim import Adafactor as Adafactor
    from torch.optim import Adamax as Adamax
    from torch.optim import Muon as Muon
    from torch.optim import NAdam as NAdam
    from torch.optim import RAdam as RAdam
    from torch.optim import Rprop as Rprop
    from torch.optim import SparseAdam as SparseAdam
else:
    _missing = missing(__name__, __all__)

    def __getattr__(name):
        """Any other optimiser is PyTorch's own, which works on mirrored parameters."""
        import torch.optim as theirs  # imported only if one of its names is used

        value = vars(theirs).get(name)
        if isinstance(value, type) and issubclass(value, theirs.Optimizer):
            return value
        return _missing(name)
