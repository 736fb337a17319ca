"""Identity, Linear and LazyLinear."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _state, init
from .._torch import is_any_autocast_enabled
from ..grad_mode import is_only_computed
from ..parameter import Parameter, UninitializedParameter
from ..rules import linear as rules
from ..tape import record
from .explicit import Gradient, untracked
from .layer import Layer
from .lazy import LazyModuleMixin
from .module import keeps_call, records_once

__all__ = ["Identity", "LazyLinear", "Linear"]


class Identity(Layer):
    """y = x, for any constructor arguments.  dx = g."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        self.__dict__["_call"] = passed_on
        return input


def passed_on(gradient: Gradient) -> Gradient:
    return gradient


class Linear(Layer):
    """Y = X W^T + b, X of shape (..., in_features), Y of shape (..., out_features).

    dX = G W,  dW = G^T X,  db = sum of the rows of G.  Saved: X and W.

    `weight` (out_features, in_features) and `bias` (out_features) are drawn from
    U(-k, k) with k = 1 / sqrt(in_features), as by PyTorch.
    """

    __constants__ = ["in_features", "out_features"]
    in_features: int
    out_features: int
    weight: Tensor

    def __init__(  # type: ignore[no-untyped-def]
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = Parameter(
            torch.empty((out_features, in_features), device=device, dtype=dtype)
        )
        if bias:
            self.bias = Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        # U(-k, k), reached as PyTorch reaches it, so that the same seed gives the same bits.
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in = init._calculate_fan_in_and_fan_out(self.weight)[0]
            bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
            init.uniform_(self.bias, -bound, bound)

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        own, layer = self._parameters, self.__dict__
        if type(self) is Linear and "bias" in own and "weight" in own:  # faster than __getattr__
            bias, weight = own["bias"], own["weight"]
            # Not `_run`, which does the same, but for a tuple or where a Sequential notes its
            # layers' calls.
            if type(input) is not tuple and "_run" not in layer:
                args = bias, input, weight
                if type(input) is torch.Tensor and type(weight) is type(bias) is Parameter:
                    # As in `record`, with fewer checks.
                    if is_only_computed():
                        layer["_call"] = None
                        return _infer(bias, input, weight)
                    if not (
                        weight._requires_grad
                        or bias._requires_grad
                        or input.requires_grad
                        or weight._node
                        or bias._node
                        or _state.plain
                        or _state.taps
                        or is_any_autocast_enabled()
                    ):
                        out = _infer(bias, input, weight)
                        layer["_call"] = untracked(rules.Linear, args, out)
                        return out
                out, node = record(rules.Linear, args, for_layer=bool(_state.taps))
                if node is None:
                    layer["_call"] = untracked(rules.Linear, args, out)
                    return out  # type: ignore[no-any-return]
                layer["_call"] = node
                node.caller = own
                return out  # type: ignore[no-any-return]
            return self._run(rules.Linear, bias, input, weight)
        of_class = self.weight  # first, as in PyTorch: a class may compute them
        return self._run(rules.Linear, self.bias, input, of_class)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}"
        )


_infer = rules.Linear.infer


class LazyLinear(LazyModuleMixin, Linear):
    """A `Linear` with `in_features` from the first input."""

    cls_to_become = Linear

    def __init__(  # type: ignore[no-untyped-def]
        self, out_features: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__(0, 0, False)
        self.weight = UninitializedParameter(device=device, dtype=dtype)
        self.out_features = out_features
        if bias:
            self.bias = UninitializedParameter(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw weight and bias anew; nothing before the first call."""
        if not self.has_uninitialized_params() and self.in_features != 0:
            super().reset_parameters()

    def initialize_parameters(self, input) -> None:  # type: ignore[override, no-untyped-def]
        """Give weight and bias the shapes that follow from the last dimension of the input."""
        width = input.shape[-1]
        own: Any = (self.weight, self.bias)
        if self.has_uninitialized_params():
            with torch.no_grad():
                self.in_features = width
                own[0].materialize((self.out_features, width))
                if own[1] is not None:
                    own[1].materialize((self.out_features,))
                self.reset_parameters()
        if self.in_features == 0:  # a state was loaded before
            if width != self.weight.shape[-1]:
                raise AssertionError(
                    f"The in_features inferred from input: {width} is not equal to in_features"
                    f" from self.weight: {self.weight.shape[-1]}"
                )
            self.in_features = width
