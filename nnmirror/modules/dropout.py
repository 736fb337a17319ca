"""Dropout."""

from typing import Any

from torch import Tensor

from .. import functional as F
from ..operation import Operation
from ..overrides import is_subclass
from ..rules import dropout as rules
from .layer import Layer
from .linear import passed_on
from .module import keeps_call, records_once

__all__ = ["AlphaDropout", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"]


class _DropoutNd(Layer):
    __constants__ = ["p", "inplace"]
    p: float
    inplace: bool

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        F.check_probability(p)
        self.p = p
        self.inplace = inplace

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class Dropout(_DropoutNd):
    """y = x m in training, m = 0 with probability `p`, else 1 / (1 - p); y = x in evaluation.

    dx = g m.  Saved: m, drawn anew by each call (Hinton et al., 2012). With `inplace=True` y
    takes the memory of x.
    """

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        F.check_probability(self.p)
        function: type[Operation] = rules.DropoutInplace if self.inplace else rules.Dropout
        return self._run(function, input, self.p)

    @records_once
    def _run(self, function: type[Operation], *args: Any) -> Any:
        input, p = args
        if type(input) is tuple:
            return self._run_on_tuple(function, args)
        if not isinstance(input, Tensor):
            return F.dropout(input, self.p, self.training, self.inplace)
        func = rules.KINDS[rules.dropout, False, bool(self.inplace)]
        p = rules.checked(input, p, self.training, func)
        if is_subclass(input):
            return self._run_whole(F.dropout, input, self.p, self.training, self.inplace)
        if not rules.drops(input, p, self.training):
            self.__dict__["_call"] = passed_on
            return input
        if self.inplace:
            with rules.drawn_anyway(input, p):
                return super()._run(function, input, p)
        if rules.draws_at_once(input, p):
            function = rules.NativeDropout
        return super()._run(function, input, p)


class _OfFunction(_DropoutNd):
    """A dropout that is a function of `nnmirror.functional`."""

    def _dropped(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        self.__dict__["_call"] = None
        if isinstance(input, Tensor) and not is_subclass(input):
            if not rules.drops(input, self.p, self.training):
                self.__dict__["_call"] = passed_on
                return self._dropped(input)
            if self._is_inplace():  # cannot be driven by hand: the input has been overwritten
                return self._dropped(input)
        elif not isinstance(input, Tensor | tuple):
            return self._dropped(input)  # PyTorch's error
        return self._run_several(self._dropped, (input,))  # type: ignore[no-any-return]

    def _is_inplace(self) -> bool:
        return self.inplace


class Dropout1d(_OfFunction):
    """y = x m in training, m one for each channel of (N, C, L) or (C, L):  dx = g m.

    m = 0 with probability `p`, else 1 / (1 - p); y = x in evaluation (Tompson et al., 2015).
    """

    def _dropped(self, input: Tensor) -> Tensor:
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(_OfFunction):
    """`Dropout1d` for the channels of (N, C, H, W)."""

    def _dropped(self, input: Tensor) -> Tensor:
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(_OfFunction):
    """`Dropout1d` for the channels of (N, C, D, H, W) or (C, D, H, W)."""

    def _dropped(self, input: Tensor) -> Tensor:
        return F.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(_OfFunction):
    """y = x m + b in training, for nets of SELU: mean and variance stay.  dx = g m.

    m = 0 with probability `p`, and b is such that y is then the limit of SELU far below 0, scaled
    and shifted like all others: `nnmirror.rules.dropout.alpha_dropout`. y = x in evaluation. Not in
    place, whatever `inplace` says, as PyTorch's (Klambauer et al., 2017).
    """

    def _dropped(self, input: Tensor) -> Tensor:
        return F.alpha_dropout(input, self.p, self.training)

    def _is_inplace(self) -> bool:
        return False


class FeatureAlphaDropout(_OfFunction):
    """`AlphaDropout` of whole channels of (N, C, ...)."""

    def _dropped(self, input: Tensor) -> Tensor:
        return F.feature_alpha_dropout(input, self.p, self.training)

    def _is_inplace(self) -> bool:
        return False
