from nnmirror.utils import *
