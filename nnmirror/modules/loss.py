"""The losses: the functions of `nnmirror.functional` as modules."""

import functools
from collections.abc import Callable

from torch import Tensor

from .. import functional as F
from .._state import sequence as _sequence
from ..fast.composed import met_before
from ..rules.loss import MseLoss
from ..tensor import Tensor as Tracked
from .explicit import Traced
from .layer import Layer
from .module import keeps_call

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MSELoss",
    "MarginRankingLoss",
    "MultiLabelSoftMarginLoss",
    "NLLLoss",
    "PoissonNLLLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "TripletMarginLoss",
]


class _Loss(Layer):
    reduction: str

    def __init__(self, size_average=None, reduce=None, reduction: str = "mean") -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        if size_average is not None or reduce is not None:
            self.reduction = F.legacy_reduction(size_average, reduce, 3)
        else:
            self.reduction = reduction

    def _compare(
        self, function: Callable[..., Tensor], input: Tensor, target: Tensor, *options: object
    ) -> Tensor:
        """function(input, target, *options), kept for `backward`."""
        began = next(_sequence)
        met = met_before(function, (input, target, *options))
        if met is not None:
            out, node = met
            own = self.__dict__
            node.caller, node.began = own["_parameters"], began
            end = input._node, input._output_nr  # type: ignore[attr-defined]
            own["_call"] = Traced.between(node, end, began)
            return out  # type: ignore[no-any-return]
        compared = functools.partial(_with_options, function, options)
        return self._run_several(compared, (input,), (target,))  # type: ignore[no-any-return]

    def _tensor(self, name: str) -> Tensor | None:
        """The buffer of this name, faster than as an attribute."""
        buffers = self._buffers
        return buffers[name] if name in buffers else getattr(self, name)  # type: ignore[no-any-return]


def _with_options(
    function: Callable[..., Tensor], options: tuple[object, ...], input: Tensor, target: Tensor
) -> Tensor:
    return function(input, target, *options)


class MSELoss(_Loss):
    """l = (x - t)^2, its mean, or its sum, by `reduction`.

    dx = (x - t) (2 / n) g, with n the number of elements for the mean, else one;
    dt = -dx where the target requires grad.  Saved: x and t.
    """

    __constants__ = ["reduction"]

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if type(input) is Tracked and type(target) is Tensor and input._node is not None:
            given = input, target, None, None, self.reduction  # nearly always such tensors
            met = met_before(F.mse_loss, given)
            out = F.mse_loss(*given) if met is None else met[0]
            own = self.__dict__
            own["_call"] = node = getattr(out, "_node", None) if met is None else met[1]
            if node is not None:
                node.caller = own["_parameters"]
            return out  # type: ignore[no-any-return]
        if F.warn_if_sizes_differ(input, target, 3):
            compared = functools.partial(F.mse_of_broadcast, reduction=self.reduction)
            return self._run_several(compared, (input,), (target,))  # type: ignore[no-any-return]
        return self._run(MseLoss, input, target, F.checked_reduction(self.reduction, 3))


class L1Loss(_Loss):
    """l = |x - t|, its mean, or its sum, by `reduction`.  dx = g sign(x - t) / n,  dt = -dx."""

    __constants__ = ["reduction"]

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self._compare(F.l1_loss, input, target, None, None, self.reduction)


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
        options = None, None, self.reduction, self.beta
        return self._compare(F.smooth_l1_loss, input, target, *options)


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
        return self._compare(F.huber_loss, input, target, self.reduction, self.delta)


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
        options = self._tensor("weight"), None, None, self.reduction
        return self._compare(F.binary_cross_entropy, input, target, *options)


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
        weight, pos_weight = self._tensor("weight"), self._tensor("pos_weight")
        options = weight, None, None, self.reduction, pos_weight
        return self._compare(F.binary_cross_entropy_with_logits, input, target, *options)


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
        options = self._tensor("weight"), None, self.ignore_index, None, self.reduction
        return self._compare(F.nll_loss, input, target, *options)


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
        weight, reduction = self._tensor("weight"), self.reduction
        options = weight, None, self.ignore_index, None, reduction, self.label_smoothing
        return self._compare(F.cross_entropy, input, target, *options)


class KLDivLoss(_Loss):
    """l = t (log t - x) for x = log of a probability; with `log_target`, exp(t) (t - x).

    dx = -g t / n (-g exp(t) / n), n the number of elements for "mean", of rows for "batchmean"
    (Kullback and Leibler, 1951).
    """

    __constants__ = ["reduction"]

    def __init__(  # type: ignore[no-untyped-def]
        self, size_average=None, reduce=None, reduction: str = "mean", log_target: bool = False
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.log_target = log_target

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options = None, None, self.reduction, self.log_target
        return self._compare(F.kl_div, input, target, *options)


class PoissonNLLLoss(_Loss):
    """l = exp(x) - t x, x the log of the rate; without `log_input`, x - t log(x + eps).

    dx = g (exp(x) - t) / n;  g (1 - t / (x + eps)) / n. `full` adds Stirling's approximation of
    log t! where t > 1.
    """

    __constants__ = ["log_input", "full", "eps", "reduction"]
    log_input: bool
    full: bool
    eps: float

    def __init__(  # type: ignore[no-untyped-def]
        self,
        log_input: bool = True,
        full: bool = False,
        size_average=None,
        eps: float = 1e-8,
        reduce=None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.log_input = log_input
        self.full = full
        self.eps = eps

    @keeps_call
    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        how = {"log_input": self.log_input, "full": self.full, "eps": self.eps}

        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.poisson_nll_loss(x, t, reduction=self.reduction, **how)  # type: ignore[arg-type]

        return self._compare(loss, log_input, target)


class GaussianNLLLoss(_Loss):
    """l = (log v + (x - t)^2 / v) / 2, v the variance, `eps` at least.

    dx = g (x - t) / v / n,  dv = g (1 / v - (x - t)^2 / v^2) / 2 / n. `full` adds log(2 pi) / 2.
    Nix and Weigend, 1994 (doi:10.1109/ICNN.1994.374138).
    """

    __constants__ = ["full", "eps", "reduction"]
    full: bool
    eps: float

    def __init__(self, *, full: bool = False, eps: float = 1e-6, reduction: str = "mean") -> None:
        super().__init__(None, None, reduction)
        self.full = full
        self.eps = eps

    @keeps_call
    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        def loss(x: Tensor, t: Tensor, v: Tensor | float) -> Tensor:
            return F.gaussian_nll_loss(
                x, t, v, full=self.full, eps=self.eps, reduction=self.reduction
            )

        return self._run_several(loss, (input,), (target, var))


class HingeEmbeddingLoss(_Loss):
    """l = x where the target is 1, max(m - x, 0) where it is -1, m the `margin`.

    dx = g / n where it is 1, -g / n where it is -1 and x < m.
    """

    __constants__ = ["margin", "reduction"]
    margin: float

    def __init__(  # type: ignore[no-untyped-def]
        self, margin: float = 1.0, size_average=None, reduce=None, reduction: str = "mean"
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.margin = margin

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.hinge_embedding_loss(x, t, margin=self.margin, reduction=self.reduction)

        return self._compare(loss, input, target)


class SoftMarginLoss(_Loss):
    """l = log(1 + exp(-t x)) for targets of 1 and -1.  dx = -g t z / (1 + z) / n, z = exp(-t x).

    Saved: x and t.
    """

    __constants__ = ["reduction"]

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.soft_margin_loss(x, t, reduction=self.reduction)

        return self._compare(loss, input, target)


class MultiLabelSoftMarginLoss(_WeightedLoss):
    """l = -w (t log s + (1 - t) log(1 - s)), s = sigmoid(x), its mean over the classes.

    dx = g w (s - t) / C / n, C the number of classes, which are the last dimension.
    """

    __constants__ = ["reduction"]

    @keeps_call
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            return F.multilabel_soft_margin_loss(x, t, weight=self.weight, reduction=self.reduction)

        return self._compare(loss, input, target)


class CosineEmbeddingLoss(_Loss):
    """l = 1 - c where the target is 1, max(c - m, 0) where it is -1; c = cos(x1, x2).

    m is the `margin`. By hand, `backward` gives a gradient for each of the two.
    """

    __constants__ = ["margin", "reduction"]
    margin: float

    def __init__(  # type: ignore[no-untyped-def]
        self, margin: float = 0.0, size_average=None, reduce=None, reduction: str = "mean"
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.margin = margin

    @keeps_call
    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
            return F.cosine_embedding_loss(x, y, t, margin=self.margin, reduction=self.reduction)

        return self._run_several(loss, (input1, input2), (target,))


class MarginRankingLoss(_Loss):
    """l = max(-t (x1 - x2) + m, 0), m the `margin`.  dx1 = -g t / n where l > 0,  dx2 = -dx1."""

    __constants__ = ["margin", "reduction"]
    margin: float

    def __init__(  # type: ignore[no-untyped-def]
        self, margin: float = 0.0, size_average=None, reduce=None, reduction: str = "mean"
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.margin = margin

    @keeps_call
    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        def loss(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
            return F.margin_ranking_loss(x, y, t, margin=self.margin, reduction=self.reduction)

        return self._run_several(loss, (input1, input2), (target,))


class TripletMarginLoss(_Loss):
    """l = max(m + |a - p| - |a - n|, 0), m the `margin`, in the norm of order `p`.

    With `swap`, the lesser of |a - n| and |p - n| (Balntas et al., 2016). By hand, `backward`
    gives a gradient for each of the three.
    """

    __constants__ = ["margin", "p", "eps", "swap", "reduction"]
    margin: float
    p: float
    eps: float
    swap: bool

    def __init__(  # type: ignore[no-untyped-def]
        self,
        margin: float = 1.0,
        p: float = 2.0,
        eps: float = 1e-6,
        swap: bool = False,
        size_average=None,
        reduce=None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        if margin <= 0:
            raise ValueError(
                f"TripletMarginLoss: expected margin to be greater than 0, got {margin} instead"
            )
        self.margin = margin
        self.p = p
        self.eps = eps
        self.swap = swap

    @keeps_call
    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        how = {"margin": self.margin, "p": self.p, "eps": self.eps, "swap": self.swap}

        def loss(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
            return F.triplet_margin_loss(a, p, n, reduction=self.reduction, **how)  # type: ignore[arg-type]

        return self._run_several(loss, (anchor, positive, negative))
