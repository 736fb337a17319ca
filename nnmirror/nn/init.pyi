from nnmirror.init import *
