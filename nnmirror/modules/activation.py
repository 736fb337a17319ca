"""The activations: the functions of `nnmirror.functional` as modules."""

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..init import constant_
from ..operation import Operation
from ..overrides import dim_of, is_subclass
from ..parameter import Parameter
from ..rules import activation as rules
from ..rules import elementwise
from ..rules import softmax as softmax_rules
from ..rules.prelu import PreluKernel, weight_for
from .layer import Layer
from .module import keeps_call, records_once

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "SELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "PReLU",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softmax2d",
    "Softmin",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]


class Tanh(Layer):
    """y = tanh(x), elementwise.  dx = g (1 - y^2).  Saved: y."""

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.Tanh, input)


class ReLU(Layer):
    """y = max(x, 0), elementwise.  dx = g where y > 0, else 0.  Saved: y.

    With `inplace=True` y takes the memory of x.
    """

    __constants__ = ["inplace"]
    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.ReluInplace if self.inplace else rules.Relu, input)

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

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        function = rules.LeakyReluInplace if self.inplace else rules.LeakyRelu
        return self._run(function, input, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}{', inplace=True' if self.inplace else ''}"


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x)), elementwise.  dx = g (1 - y) y.  Saved: y."""

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(elementwise.Sigmoid, input)


class ELU(Layer):
    """y = x where x > 0, else a (exp(x) - 1).  dx = g where x > 0, else g a exp(x).  Saved: x.

    a is `alpha`. With `inplace=True` y takes the memory of x, and is saved.
    """

    __constants__ = ["alpha", "inplace"]
    alpha: float
    inplace: bool

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.inplace = inplace

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.EluInplace if self.inplace else rules.Elu, input, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}{', inplace=True' if self.inplace else ''}"


class SiLU(Layer):
    """y = x z with z = sigmoid(x).  dx = g z (1 + x (1 - z)).  Saved: x."""

    __constants__ = ["inplace"]
    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.SiluInplace if self.inplace else rules.Silu, input)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class GLU(Layer):
    """y = a s, s = sigmoid(b), a and b the halves of x along `dim`.  Saved: x.

    da = g s,  db = g a (1 - s) s.
    """

    __constants__ = ["dim"]
    dim: int

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        if is_subclass(input):
            return self._run_whole(F.glu, input, self.dim)  # type: ignore[no-any-return]
        if isinstance(input, Tensor) and input.dim() == 0:
            return F.glu(input)  # PyTorch's error
        return self._run(rules.Glu, input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class GELU(Layer):
    """y = x P(x), P the distribution function of the normal law or, with `approximate="tanh"`,
    an approximation of it.  Saved: x.  Both slopes: `nnmirror.rules.activation.Gelu`.
    """

    __constants__ = ["approximate"]
    approximate: str

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.Gelu, input, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Softplus(Layer):
    """y = log(1 + exp(b x)) / b, x where b x > t.  dx = g e / (e + 1), e = exp(b x).  Saved: x.

    b is `beta`, t is `threshold`, beyond which dx = g.
    """

    __constants__ = ["beta", "threshold"]
    beta: float
    threshold: float

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__()
        self.beta = beta
        self.threshold = threshold

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.Softplus, input, self.beta, self.threshold)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, threshold={self.threshold}"


class Hardtanh(Layer):
    """y = x clipped to [a, b].  dx = g where a < x < b, else 0.  Saved: x.

    a is `min_val`, b is `max_val`. With `inplace=True` y takes the memory of x, and is saved.
    """

    __constants__ = ["min_val", "max_val", "inplace"]
    min_val: float
    max_val: float
    inplace: bool

    def __init__(
        self,
        min_val: float = -1.0,
        max_val: float = 1.0,
        inplace: bool = False,
        min_value: float | None = None,
        max_value: float | None = None,
    ) -> None:
        super().__init__()
        if min_value is not None:
            min_val = self._renamed("min", min_value)
        if max_value is not None:
            max_val = self._renamed("max", max_value)
        self.min_val = min_val
        self.max_val = max_val
        self.inplace = inplace
        if self.max_val <= self.min_val:
            raise AssertionError(
                f"max_val ({self.max_val}) must be greater than min_val ({self.min_val})"
            )

    @staticmethod
    def _renamed(which: str, value: float) -> float:
        warnings.warn(
            f"keyword argument `{which}_value` is deprecated and renamed to `{which}_val`",
            FutureWarning,
            stacklevel=3,
        )
        return value

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        if self.min_val > self.max_val:
            raise ValueError("min_val cannot be greater than max_val")
        function = rules.HardtanhInplace if self.inplace else rules.Hardtanh
        return self._run(function, input, self.min_val, self.max_val)

    def extra_repr(self) -> str:
        inplace = ", inplace=True" if self.inplace else ""
        return f"min_val={self.min_val}, max_val={self.max_val}{inplace}"


class ReLU6(Hardtanh):
    """y = x clipped to [0, 6].  dx = g where 0 < x < 6, else 0.  Saved: x."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(0.0, 6.0, inplace)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class _AlongDim(Layer):
    """What Softmax and LogSoftmax share; in PyTorch neither is a subclass of the other."""

    __constants__ = ["dim"]
    dim: int | None
    _function: type[Operation]
    _name: str

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "dim"):
            self.dim = None

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        dim = softmax_rules.implicit_dim(self._name, input, 5) if self.dim is None else self.dim
        return self._run(self._function, input, dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Softmax(_AlongDim):
    """y = exp(x) / s, s the sum of exp(x) along `dim`.  dx = (g - sum of g y) y.  Saved: y."""

    _function = softmax_rules.Softmax
    _name = "softmax"


class Softmax2d(Layer):
    """`Softmax` over the channels at each place of (N, C, H, W) or (C, H, W)."""

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        if type(input) is tuple:
            return self._run_on_tuple(softmax_rules.Softmax, (input, -3))
        dim = dim_of(input)
        if dim not in (3, 4):
            raise ValueError(f"Softmax2d: expected input to be 3D or 4D, got {dim}D instead")
        if is_subclass(input):
            return self._run_whole(F.softmax, input, -3)  # type: ignore[no-any-return]
        return self._run(softmax_rules.Softmax, input, -3)


class LogSoftmax(_AlongDim):
    """y = x - log s, s the sum of exp(x) along `dim`.  dx = g - exp(y) sum of g.  Saved: y."""

    _function = softmax_rules.LogSoftmax
    _name = "log_softmax"


class Softmin(Layer):
    """y = softmax(-x) along `dim`.  dx = (sum of g y - g) y.  Saved: y."""

    __constants__ = ["dim"]
    dim: int | None

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "dim"):
            self.dim = None

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        dim = softmax_rules.implicit_dim("softmin", input, 5) if self.dim is None else self.dim
        return self._run_several(lambda x: F.softmin(x, dim), (input,))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class LogSigmoid(Layer):
    """y = log(1 / (1 + exp(-x))).  dx = g / (1 + exp(x)).  Saved: x and exp(-|x|)."""

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.LogSigmoid, input)


class Softsign(Layer):
    """y = x / (1 + |x|).  dx = g / (1 + |x|) - g x / (1 + |x|)^2 sign(x)."""

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run_several(F.softsign, (input,))


class Tanhshrink(Layer):
    """y = x - tanh(x).  dx = g - g (1 - tanh(x)^2)."""

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run_several(F.tanhshrink, (input,))


class SELU(Layer):
    """y = s x where x > 0, else s a (exp(x) - 1).  dx = g s where x > 0, else g s a exp(x).

    a = 1.6733 and s = 1.0507 keep mean 0 and variance 1 (Klambauer et al., 2017).  Saved: x.
    With `inplace=True` y takes the memory of x, and is saved.
    """

    __constants__ = ["inplace"]
    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor | tuple):
            return F.selu(input, self.inplace)
        function = rules.EluInplace if self.inplace else rules.Selu
        return self._run(function, input, rules.SELU_ALPHA, rules.SELU_SCALE)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class CELU(Layer):
    """y = x where x > 0, else a (exp(x / a) - 1).  dx = g where x > 0, else g exp(x / a).

    a is `alpha` (Barron, 2017).  Saved: x. With `inplace=True` y takes the memory of x, and is
    saved.
    """

    __constants__ = ["alpha", "inplace"]
    alpha: float
    inplace: bool

    def __init__(self, alpha: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.inplace = inplace

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.CeluInplace if self.inplace else rules.Celu, input, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}{', inplace=True' if self.inplace else ''}"


class Hardsigmoid(Layer):
    """y = x / 6 + 1/2 clipped to [0, 1].  dx = g / 6 where -3 < x < 3, else 0.  Saved: x.

    With `inplace=True` y takes the memory of x.
    """

    __constants__ = ["inplace"]
    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.HardsigmoidInplace if self.inplace else rules.Hardsigmoid, input)


class Hardswish(Layer):
    """y = x times x / 6 + 1/2 clipped to [0, 1].  dx = g (x / 3 + 1/2) where -3 < x < 3, 0 below,
    g above (Howard et al., 2019).  Saved: x.

    With `inplace=True` y takes the memory of x.
    """

    __constants__ = ["inplace"]
    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.HardswishInplace if self.inplace else rules.Hardswish, input)


class Mish(Layer):
    """y = x t, t = tanh(log(1 + exp(x))).  dx = g (t + x s (1 - t^2)), s = sigmoid(x).  Saved: x.

    With `inplace=True` y takes the memory of x (Misra, 2019).
    """

    __constants__ = ["inplace"]
    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(rules.MishInplace if self.inplace else rules.Mish, input)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class Threshold(Layer):
    """y = x where x > t, else v.  dx = g where x > t, else 0.  Saved: x.

    t is `threshold`, v is `value`. With `inplace=True` y takes the memory of x.
    """

    __constants__ = ["threshold", "value", "inplace"]
    threshold: float
    value: float
    inplace: bool

    def __init__(self, threshold: float, value: float, inplace: bool = False) -> None:
        super().__init__()
        self.threshold = threshold
        self.value = value
        self.inplace = inplace

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        function = rules.ThresholdInplace if self.inplace else rules.Threshold
        return self._run(function, input, self.threshold, self.value)

    def extra_repr(self) -> str:
        inplace = ", inplace=True" if self.inplace else ""
        return f"threshold={self.threshold}, value={self.value}{inplace}"


class _Shrink(Layer):
    """What Hardshrink and Softshrink share."""

    __constants__ = ["lambd"]
    lambd: float
    _function: type[Operation]

    def __init__(self, lambd: float = 0.5) -> None:
        super().__init__()
        self.lambd = lambd

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(self._function, input, self.lambd)

    def extra_repr(self) -> str:
        return str(self.lambd)


class Hardshrink(_Shrink):
    """y = x where |x| > l, else 0.  dx = g there, else 0.  l is `lambd`.  Saved: x."""

    _function = rules.Hardshrink


class Softshrink(_Shrink):
    """y = x - l sign(x) where |x| > l, else 0.  dx = g there, else 0.  l is `lambd`.  Saved: x."""

    _function = rules.Softshrink


class PReLU(Layer):
    """y = x where x > 0, else w x.  dx = g there, else w g;  dw = sum of x g where x <= 0.

    Saved: x and w (He et al., 2015).  `weight` is `init`, one number for all or, with
    `num_parameters` of them, one for each channel (dimension 1).
    """

    __constants__ = ["num_parameters"]
    num_parameters: int

    def __init__(  # type: ignore[no-untyped-def]
        self, num_parameters: int = 1, init: float = 0.25, device=None, dtype=None
    ) -> None:
        self.num_parameters = num_parameters
        super().__init__()
        self.init = init
        self.weight = Parameter(torch.empty(num_parameters, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to `init`."""
        constant_(self.weight, self.init)

    @records_once
    def forward(self, input: Tensor) -> Tensor:
        return self._run(PreluKernel, input)

    def _run(self, function: type[Operation], *args: Any) -> Any:
        (input,) = args
        if type(input) is tuple:
            return self._run_on_tuple(function, args)
        if is_subclass(input):
            return self._run_whole(F.prelu, input, self.weight)
        return super()._run(function, input, weight_for(input, self.weight))

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}"
