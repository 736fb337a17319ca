"""MSELoss."""

from torch import Tensor

from .. import functional as F
from .layer import Layer
from .module import keeps_call


class _Loss(Layer):
    reduction: str

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            self.reduction = F.legacy_reduction(size_average, reduce)
        else:
            self.reduction = reduction


class MSELoss(_Loss):
    """l = (x - t)^2, its mean, or its sum, by `reduction`.

    dx = (x - t) (2 / n) g, with n the number of elements for the mean, else one;
    dt = -dx where the target requires grad.  Saved: x and t.
    """

    __constants__ = ["reduction"]

    def __init__(self, size_average=None, reduce=None, reduction: str = "mean") -> None:  # type: ignore[no-untyped-def]
        super().__init__(size_average, reduce, reduction)

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        F.warn_if_sizes_differ(input, target)
        return self._run(F.MseLoss, input, target, F.checked_reduction(self.reduction))
