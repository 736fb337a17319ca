"""Tanh, ReLU, LeakyReLU: the functions of `nnmirror.functional` as modules."""

from torch import Tensor

from .. import functional as F
from .layer import Layer
from .module import keeps_call


class Tanh(Layer):
    """y = tanh(x), elementwise.  dx = g (1 - y^2).  Saved: y."""

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run(F.Tanh, input)


class ReLU(Layer):
    """y = max(x, 0), elementwise.  dx = g where y > 0, else 0.  Saved: y.

    With `inplace=True` y takes the memory of x.
    """

    __constants__ = ["inplace"]
    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run(F.ReluInplace if self.inplace else F.Relu, input)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class LeakyReLU(Layer):
    """y = x where x > 0, else s x, elementwise.  dx = g where x > 0, else s g.  Saved: x.

    s is `negative_slope`. With `inplace=True` y takes the memory of x, and is saved.
    """

    __constants__ = ["inplace", "negative_slope"]
    inplace: bool
    negative_slope: float

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.inplace = inplace

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        function = F.LeakyReluInplace if self.inplace else F.LeakyRelu
        return self._run(function, input, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}{', inplace=True' if self.inplace else ''}"
