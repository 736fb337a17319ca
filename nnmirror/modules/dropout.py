"""Dropout."""

from typing import Any

from torch import Tensor

from .. import functional as F
from ..overrides import is_subclass
from ..rules import dropout as rules
from ..tape import Function
from .layer import Layer
from .linear import passed_on
from .module import records_once


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
        function: type[Function] = rules.DropoutInplace if self.inplace else rules.Dropout
        may_be_native = self.training and not self.inplace and isinstance(input, Tensor)
        if may_be_native and rules.draws_at_once(input, self.p):
            function = rules.NativeDropout
        return self._run(function, input, self.p)

    @records_once
    def _run(self, function: type[Function], *args: Any) -> Any:
        input, p = args
        if type(input) is tuple:
            return self._run_on_tuple(function, args)
        if not isinstance(input, Tensor):
            return F.dropout(input, self.p, self.training, self.inplace)
        rules.check_number(input, p, self.training, self.inplace)
        if is_subclass(input):
            return self._run_whole(F.dropout, input, self.p, self.training, self.inplace)
        if not rules.drops(input, p, self.training):
            self.__dict__["_call"] = passed_on
            return input
        if self.inplace:
            with rules.drawn_anyway(input, p):
                return super()._run(function, input, p)
        if rules.draws_at_once(input, p):  # a batch made of a tuple's items
            function = rules.NativeDropout
        return super()._run(function, input, p)
