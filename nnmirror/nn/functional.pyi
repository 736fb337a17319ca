from nnmirror.functional import *
from nnmirror.rules.activation import *
