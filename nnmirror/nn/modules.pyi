from nnmirror.modules import *
