"""ChannelShuffle."""

from torch import Tensor

from .. import functional as F
from .layer import Layer
from .module import records_once

__all__ = ["ChannelShuffle"]


class ChannelShuffle(Layer):
    """The C channels, in G = `groups`, with those of the groups in turn:  dx = g, moved back.

    y[:, i G + k] = x[:, k C / G + i] (Zhang et al., 2017).
    """

    __constants__ = ["groups"]
    groups: int

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(F.ChannelShuffle, input, self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
