from nnmirror.functional import *
