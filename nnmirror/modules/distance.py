"""CosineSimilarity and PairwiseDistance."""

from torch import Tensor

from .. import functional as F
from .layer import Layer
from .module import keeps_call

__all__ = ["CosineSimilarity", "PairwiseDistance"]


class CosineSimilarity(Layer):
    """y = sum of (x1 / |x1|) (x2 / |x2|) along `dim`, the lengths `eps` at least.

    By hand, `backward` gives a gradient for each of the two.
    """

    __constants__ = ["dim", "eps"]
    dim: int
    eps: float

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    @keeps_call
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        def similarity(x: Tensor, y: Tensor) -> Tensor:
            return F.cosine_similarity(x, y, self.dim, self.eps)

        return self._run_several(similarity, (x1, x2))


class PairwiseDistance(Layer):
    """y = (sum of |x1 - x2 + eps|^p)^(1/p) along the last dimension, which `keepdim` keeps.

    dx1 = g sign(d) (|d| / y)^(p - 1), d = x1 - x2 + eps, and dx2 = -dx1. By hand, `backward`
    gives both.
    """

    __constants__ = ["norm", "eps", "keepdim"]
    norm: float
    eps: float
    keepdim: bool

    def __init__(self, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> None:
        super().__init__()
        self.norm = p
        self.eps = eps
        self.keepdim = keepdim

    @keeps_call
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        def distance(x: Tensor, y: Tensor) -> Tensor:
            return F.pairwise_distance(x, y, self.norm, self.eps, self.keepdim)

        return self._run_several(distance, (x1, x2))
