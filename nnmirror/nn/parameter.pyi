from nnmirror.parameter import *
