"""Which version of PyTorch is installed, where its behaviour differs from that in setup.cfg."""

import torch

SINCE_2_14 = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 14)
