"""The losses: the functions of `nnmirror.functional` as modules."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import functional as F
from ..grad_mode import is_grad_enabled
from .explicit import Each, Recorded, Traced
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

    def _compare(self, function: Callable[[Any, Any], Any], input: Any, target: Any) -> Any:
        """function(input, target), several recorded calls maybe, kept for `backward`.

        As with any layer, tuples are compared item by item, and `backward` gives a gradient
        whether or not the input requires one.
        """
        if type(input) is tuple:
            if type(target) is not tuple or len(target) != len(input):
                raise TypeError("nnmirror: input and target must be tuples of one length")
            losses, calls = [], []
            for pair in zip(input, target, strict=True):
                losses.append(self._compare(function, *pair))
                calls.append(self._call)
            self.__dict__["_call"] = Each(calls)
            return tuple(losses)
        apart = (
            is_grad_enabled()
            and isinstance(input, Tensor)
            and input.is_floating_point()
            and not input.requires_grad
            and not input.is_inference()
        )
        x = input.detach().requires_grad_() if apart else input
        loss = function(x, target)
        self.__dict__["_call"] = Traced((x,), loss) if is_grad_enabled() else None
        return loss.detach() if apart and not target.requires_grad else loss


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
        usual = F.usual_mse_loss(input, target) if self.reduction == "mean" else None
        if usual is not None:
            self.__dict__["_call"] = Recorded(usual[1])
            return usual[0]
        F.warn_if_sizes_differ(input, target)
        return self._run(F.MseLoss, input, target, F.checked_reduction(self.reduction))


class L1Loss(_Loss):
    """l = |x - t|, its mean, or its sum, by `reduction`.  dx = g sign(x - t) / n,  dt = -dx."""

    __constants__ = ["reduction"]

    def __init__(self, size_average=None, reduce=None, reduction: str = "mean") -> None:  # type: ignore[no-untyped-def]
        super().__init__(size_average, reduce, reduction)

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.l1_loss(x, t, reduction=self.reduction)

        return self._compare(loss, input, target)


class SmoothL1Loss(_Loss):
    """l = d^2 / (2 b) where |d| < b, else |d| - b / 2, with d = x - t and b `beta`.

    dx = g d / (b n) where |d| < b, else g sign(d) / n;  dt = -dx.  Saved: x and t.
    """

    __constants__ = ["reduction"]

    def __init__(  # type: ignore[no-untyped-def]
        self, size_average=None, reduce=None, reduction: str = "mean", beta: float = 1.0
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.beta = beta

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.smooth_l1_loss(x, t, reduction=self.reduction, beta=self.beta)

        return self._compare(loss, input, target)


class HuberLoss(_Loss):
    """l = d^2 / 2 where |d| < a, else a (|d| - a / 2), with d = x - t and a `delta`.

    dx = g d / n where |d| < a, else g a sign(d) / n;  dt = -dx.  Saved: x and t.
    """

    __constants__ = ["reduction", "delta"]

    def __init__(self, reduction: str = "mean", delta: float = 1.0) -> None:
        if not isinstance(delta, float | int):
            raise TypeError(f"delta must be a float or int, got: {type(delta)}")
        super().__init__(reduction=reduction)
        self.delta = delta

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.huber_loss(x, t, reduction=self.reduction, delta=self.delta)

        return self._compare(loss, input, target)


class _WeightedLoss(_Loss):
    weight: Tensor | None

    def __init__(  # type: ignore[no-untyped-def]
        self,
        weight: Tensor | None = None,
        size_average=None,
        reduce=None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.register_buffer("weight", weight)


class BCELoss(_WeightedLoss):
    """l = -w (t log x + (1 - t) log(1 - x)), its mean, or its sum, for probabilities x.

    dx = g (x - t) / (x (1 - x)) w / n.  Saved: x, t and w.
    """

    __constants__ = ["reduction"]

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.binary_cross_entropy(x, t, weight=self.weight, reduction=self.reduction)

        return self._compare(loss, input, target)


class BCEWithLogitsLoss(_Loss):
    """`BCELoss` of s = sigmoid(x), positive targets weighted by p, `pos_weight`.

    dx = g ((p t + 1 - t) s - p t) w / n.  Saved: x, t, w and p.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(  # type: ignore[no-untyped-def]
        self,
        weight: Tensor | None = None,
        size_average=None,
        reduce=None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(
                x, t, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
            )

        return self._compare(loss, input, target)


class NLLLoss(_WeightedLoss):
    """l = -w_c x_c with c the class t of each row, its mean weighted by w, or its sum.

    dx_c = -g w_c / n, with n the sum of all w_c for the mean, and 0 for the other classes.
    Rows whose class is `ignore_index` count for nothing.  Saved: x, t and w.
    """

    __constants__ = ["ignore_index", "reduction"]
    ignore_index: int

    def __init__(  # type: ignore[no-untyped-def]
        self,
        weight: Tensor | None = None,
        size_average=None,
        ignore_index: int = -100,
        reduce=None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        self.ignore_index = ignore_index

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.nll_loss(
                x, t, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction
            )

        return self._compare(loss, input, target)


class CrossEntropyLoss(_WeightedLoss):
    """`NLLLoss` of log_softmax(x); the target holds classes, or probabilities.

    dx = g (softmax(x) - p) / n, with p the target's probabilities: by two recorded calls,
    the log_softmax and the loss, as in PyTorch. With `label_smoothing` e, p has a share e
    spread over all classes (Szegedy et al., 2016).
    """

    __constants__ = ["ignore_index", "reduction", "label_smoothing"]
    ignore_index: int
    label_smoothing: float

    def __init__(  # type: ignore[no-untyped-def]
        self,
        weight: Tensor | None = None,
        size_average=None,
        ignore_index: int = -100,
        reduce=None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(
                x,
                t,
                weight=self.weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                label_smoothing=self.label_smoothing,
            )

        return self._compare(loss, input, target)
