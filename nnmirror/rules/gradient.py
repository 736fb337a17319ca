"""Gradients that are rules themselves, with gradients of their own.

With `create_graph=True`, a rule's `d_<argument>` is differentiated again, by the rules of the
operations that it consists of. A gradient that is written for speed, or for a kernel's rounding,
does not consist of such operations; its gradients are given here, as in PyTorch's derivatives.yaml
for tanh_backward and the others.
"""

from collections.abc import Callable

import torch

from .._torch import is_torch_function_enabled
from ..tape import record
from .registry import Rule

T = torch.Tensor
Second = Callable[..., T]


def gradient(
    name: str, second: Second | None = None, of_grad: Second | None = None
) -> Callable[[Second], Second]:
    """Record the decorated dx(g, x, *parameters), linear in g, in a recorded walk.

    Its own gradients: for h, that of dx, g gets dx(h, x, *parameters), or, if dx is not an
    elementwise product, of_grad(h, x, *parameters); and x gets second(h, g, x, *parameters), or
    zeros without `second`, for a slope that is piecewise constant. `name` is that of its node in
    PyTorch, without the final Backward0.
    """

    def make(compute: Second) -> Second:
        def forward(grad: T, input: T, *parameters: object) -> T:
            return compute(grad, input, *parameters)

        def d_grad(g: T, input: T, parameters: tuple[object, ...]) -> T:
            return (of_grad or apply)(g, input, *parameters)

        def d_input(g: T, grad: T, input: T, parameters: tuple[object, ...]) -> T:
            assert second is not None
            return second(g, grad, input, *parameters)

        def zeros(g: T) -> T:
            return torch.zeros_like(g)

        made = type(
            name,
            (Rule,),
            {
                "__doc__": f"`{compute.__name__}`, with a gradient.",
                "__module__": compute.__module__,
                "forward": staticmethod(forward),
                "d_grad": staticmethod(d_grad),
                "d_input": staticmethod(zeros if second is None else d_input),
            },
        )
        apply = _applied(made, compute)
        return apply

    return make


def _applied(rule: type[Rule], compute: Callable[..., T]) -> Callable[..., T]:
    def apply(*args: object) -> T:
        if is_torch_function_enabled():  # it never is in a walk that is not recorded
            return record(rule, args)[0]  # type: ignore[no-any-return]
        return compute(*args)

    apply.__name__, apply.__doc__ = compute.__name__, compute.__doc__
    apply.__module__ = compute.__module__
    return apply


def applied(rule: type[Rule]) -> Callable[..., T]:
    """The function for the gradient `rule`: recorded in a recorded walk, else plain."""
    return _applied(rule, rule.formulas.forward)  # type: ignore[union-attr]
