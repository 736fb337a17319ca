"""What `nnmirror.nn` is, for type checkers: the package under another name."""

from nnmirror import *
from nnmirror.modules import *
