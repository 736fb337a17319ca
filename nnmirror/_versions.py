"""Which PyTorch is beside us, where it matters: what differs from the version in setup.cfg."""

import torch

SINCE_2_14 = tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 14)
