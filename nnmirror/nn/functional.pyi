from nnmirror.functional import *
from nnmirror.rules.activation import *
from nnmirror.rules.linear import *
from nnmirror.rules.prelu import *
from nnmirror.rules.softmax import *
