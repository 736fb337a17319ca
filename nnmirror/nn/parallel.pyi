from nnmirror.parallel import *
