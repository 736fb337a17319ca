"""The plain layers, as `fused.py` runs them: Linear, ReLU, LeakyReLU, Tanh, Sigmoid.

Each says in plain tensor operations what `nnmirror.functional` says for one call, forward
and back, and for a `Program` as calls that are bound to their memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import functional as F
from ..exact import mode as exact
from ..rules import activation as rules
from ..rules.kernel import all_bits, bits, chosen_by_bits, laid_out_as, where_positive
from ..rules.pointwise import leaky
from ..rules.softmax import Softplus
from ..tape import Function, Node, constant
from . import activation, linear
from .module import COUNTED

T = torch.Tensor
Calls = list[Callable[[], Any]]


class Op:
    """One layer: what it does, to what. It must not hold the module, which leads to it."""

    function: type[Function]
    w: T  # of a Linear: its weight
    is_linear = False
    saves_input = False  # for its backward, or else its output
    saves_node = False  # for its backward: a ctx, with what it saved
    slope = 0.0

    def __init__(self, layer: Any) -> None:
        self.own = layer._parameters
        self.weight: Any = None
        self.bias: Any = None

    def run(self, h: T) -> T:
        """The output."""
        raise NotImplementedError

    def record(self, h: T) -> tuple[Any, T]:
        """What is kept for the backward, and the output."""
        y = self.run(h)
        return h if self.saves_input else y, y


class LinearOp(Op):
    """Y = X W^T + b"""

    function = F.Linear
    is_linear = saves_input = True

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.weight, self.bias = self.own["weight"], self.own["bias"]
        self.w = self.weight._plain
        self.wt = self.w.t()
        self.b = None if self.bias is None else self.bias._plain

    def run(self, h: T) -> T:
        return torch.mm(h, self.wt) if self.b is None else torch.addmm(self.b, h, self.wt)


class ActivationOp(Op):
    """An activation.

    After a Linear its input is seen by nobody, and it is computed in that memory (`hidden`).
    """

    in_place_function: type[Function]  # of the layer with inplace=True
    in_place: Callable[..., T]  # as torch has it

    def __init__(self, layer: Any, after_linear: bool) -> None:
        super().__init__(layer)
        if getattr(layer, "inplace", False):
            self.function = self.in_place_function
        self.write_over(after_linear)

    def write_over(self, hidden: bool) -> None:
        """Compute it in the memory of its input, if that is `hidden`."""
        self.run = type(self).in_place if hidden else self.function.infer  # type: ignore[method-assign, assignment]

    def back(self, kept: T, g: T, ours: bool) -> T:
        """dx, from what was kept and `g`, which may be written over if it is `ours`."""
        raise NotImplementedError

    # The same in two parts, as calls bound to their memory. What needs only the output is
    # elementwise, so that it may be computed for several layers at once.

    def room(self, y: T) -> T:
        """Memory for what of the output is needed."""
        return torch.zeros_like(y)

    def prepares(self, y: T, into: T) -> Calls:
        """Compute it."""
        raise NotImplementedError

    def calls_back(self, y: T, g: T, prepared: T) -> Calls:
        """dx into the memory of g."""
        raise NotImplementedError


class _BySign(ActivationOp):
    """What is needed of the output is where it is positive: a mask, of bits for many numbers."""

    def room(self, y: T) -> T:
        if chosen_by_bits(y):
            return torch.zeros_like(bits(y))
        return torch.zeros_like(y, dtype=torch.bool)


class ReluOp(_BySign):
    """dx = g where y > 0, else 0"""

    function, in_place_function = F.Relu, F.ReluInplace
    in_place = staticmethod(torch.relu_)

    def back(self, kept: T, g: T, ours: bool) -> T:
        return laid_out_as(where_positive(g, kept, ours), kept)

    def prepares(self, y: T, into: T) -> Calls:
        zero = constant(0.0, y.dtype, y.device)
        calls: Calls = [functools.partial(torch.le, y, zero, out=into)]
        if into.dtype is not torch.bool:
            calls.append(functools.partial(into.add_, all_bits(into.dtype)))
        return calls

    def calls_back(self, y: T, g: T, prepared: T) -> Calls:
        if prepared.dtype is torch.bool:
            return [functools.partial(g.masked_fill_, prepared, constant(0.0, g.dtype, g.device))]
        return [functools.partial(bits(g).bitwise_and_, prepared)]


class LeakyOp(_BySign):
    """dx = g where y > 0, else s g"""

    function, in_place_function = F.LeakyRelu, F.LeakyReluInplace

    def __init__(self, layer: Any, after_linear: bool) -> None:
        self.slope = layer.negative_slope
        super().__init__(layer, after_linear)

    def write_over(self, hidden: bool) -> None:
        # The gradient looks at signs, which a slope below zero turns round.
        hidden = hidden and not self.slope < 0
        self.saves_input = not hidden
        run: Any = torch._C._nn.leaky_relu_ if hidden else self.function.infer
        self.run = functools.partial(run, negative_slope=self.slope)  # type: ignore[method-assign]

    def back(self, kept: T, g: T, ours: bool) -> T:
        return leaky(g, kept, self.slope)

    def prepares(self, y: T, into: T) -> Calls:
        zero = constant(0.0, y.dtype, y.device)
        calls: Calls = [functools.partial(torch.gt, y, zero, out=into)]
        if into.dtype is not torch.bool:
            calls.append(functools.partial(into.neg_))
        return calls

    def calls_back(self, y: T, g: T, prepared: T) -> Calls:
        slope, scaled = constant(self.slope, g.dtype, g.device), torch.empty_like(g)
        calls: Calls = [functools.partial(torch.mul, g, slope, out=scaled)]
        if prepared.dtype is torch.bool:
            return [*calls, functools.partial(torch.where, prepared, g, scaled, out=g)]
        differ = torch.empty_like(prepared)  # as `by_sign`
        return [
            *calls,
            functools.partial(torch.bitwise_xor, bits(g), bits(scaled), out=differ),
            functools.partial(differ.bitwise_and_, prepared),
            functools.partial(torch.bitwise_xor, bits(scaled), differ, out=bits(g)),
        ]


class TanhOp(ActivationOp):
    """dx = g (1 - y^2)"""

    function = F.Tanh
    in_place = staticmethod(torch.tanh_)

    def back(self, kept: T, g: T, ours: bool) -> T:
        one = constant(1.0, kept.dtype, kept.device)
        return laid_out_as(torch.addcmul(one, kept, kept, value=-1).mul_(g), g)

    def prepares(self, y: T, into: T) -> Calls:
        one = constant(1.0, y.dtype, y.device)
        return [functools.partial(torch.addcmul, one, y, y, value=-1, out=into)]

    def calls_back(self, y: T, g: T, prepared: T) -> Calls:
        return [functools.partial(g.mul_, prepared)]


class SigmoidOp(ActivationOp):
    """dx = (1 - y) g y"""

    function = F.Sigmoid
    in_place = staticmethod(torch.sigmoid_)

    def back(self, kept: T, g: T, ours: bool) -> T:
        one = constant(1.0, kept.dtype, kept.device)
        return laid_out_as(torch.sub(one, kept).mul_(g).mul_(kept), g)

    def prepares(self, y: T, into: T) -> Calls:
        return [functools.partial(torch.sub, constant(1.0, y.dtype, y.device), y, out=into)]

    def calls_back(self, y: T, g: T, prepared: T) -> Calls:
        return [functools.partial(g.mul_, prepared), functools.partial(g.mul_, y)]


class CalledOp(Op):
    """Any other activation: a call of its Function, which has a ctx to itself."""

    saves_node = True

    def __init__(self, layer: Any, after_linear: bool) -> None:
        super().__init__(layer)
        self.function, names = _CALLED[type(layer)]
        self.args = tuple([getattr(layer, name) for name in names])
        self.plans: dict[Any, Any] = {}  # of its formulas, by function and shape

    def run(self, h: T) -> T:
        infer = exact.chosen(self.function).infer
        if infer is not None:
            return infer(h, *self.args)  # type: ignore[no-any-return]
        return self.record(h)[1]

    def record(self, h: T) -> tuple[Node, T]:
        function = exact.chosen(self.function)
        node = Node(function)
        node.places, node.needs_input_grad = (0,), (True, *[False] * len(self.args))
        formulas = function.formulas
        if formulas is None:
            return node, function.forward(node, h, *self.args)
        args = (h, *self.args)
        plan = self.plans.get((function, h.shape))
        if plan is None:
            if len(self.plans) >= _PLANS_MOST:
                self.plans.clear()
            plan = self.plans[function, h.shape] = formulas.plan(args, node.needs_input_grad)
        node.plan = plan
        out = plan.compute(*args)
        plan.keep_apart(node, args, out)
        return node, out

    def back(self, kept: Any, g: T, ours: bool) -> T:
        dx = kept.function.backward(kept, g)
        return dx[0] if type(dx) is tuple else dx  # type: ignore[no-any-return]


_PLANS_MOST = 16  # of one layer

# Of each such layer: its Function, and the attributes that are the other arguments.
_CALLED: dict[type, tuple[type[Function], tuple[str, ...]]] = {
    activation.ELU: (rules.Elu, ("alpha",)),
    activation.CELU: (rules.Celu, ("alpha",)),
    activation.SiLU: (rules.Silu, ()),
    activation.GELU: (rules.Gelu, ("approximate",)),
    activation.Mish: (rules.Mish, ()),
    activation.Hardtanh: (rules.Hardtanh, ("min_val", "max_val")),
    activation.ReLU6: (rules.Hardtanh, ("min_val", "max_val")),
    activation.Hardsigmoid: (rules.Hardsigmoid, ()),
    activation.Hardswish: (rules.Hardswish, ()),
    activation.LogSigmoid: (rules.LogSigmoid, ()),
    activation.Softplus: (Softplus, ("beta", "threshold")),
}
_ACTIVATIONS: dict[type, type[ActivationOp]] = {
    activation.ReLU: ReluOp,
    activation.LeakyReLU: LeakyOp,
    activation.Tanh: TanhOp,
    activation.Sigmoid: SigmoidOp,
}
IN_PLACE = {activation.ReLU, activation.LeakyReLU}  # those that may have inplace=True
PLAIN = {linear.Linear, *_ACTIVATIONS, *_CALLED}
# What is looked at when a layer is made an Op: to set one of these is a change.
SETTINGS = ("inplace", "negative_slope", *{name for _, names in _CALLED.values() for name in names})
COUNTED.update(SETTINGS)


def op_of(layer: Any, after_linear: bool) -> Op:
    """`layer`, of a type in PLAIN, as an Op."""
    if type(layer) is linear.Linear:
        return LinearOp(layer)
    kind: Any = CalledOp if type(layer) in _CALLED else _ACTIVATIONS[type(layer)]
    return kind(layer, after_linear)  # type: ignore[no-any-return]
