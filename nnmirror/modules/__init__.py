"""The modules, in the files that hold them in PyTorch."""

from typing import TYPE_CHECKING

from .activation import *
from .batchnorm import *
from .channelshuffle import *
from .container import *
from .conv import *
from .distance import *
from .dropout import *
from .flatten import *
from .fold import *
from .instancenorm import *
from .linear import *
from .loss import *
from .module import Module as Module
from .normalization import *
from .padding import *
from .pixelshuffle import *
from .pooling import *
from .sparse import *
from .upsampling import *

if not TYPE_CHECKING:  # a type checker takes what the imports above export
    __all__ = [name for name, value in vars().items() if isinstance(value, type)]
