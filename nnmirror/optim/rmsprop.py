"""RMSprop."""

from torch import Tensor

from .. import _torch
from .flat import Lists, Tensors, operand, sqrt_plus
from .optimizer import ParamsT, StateDict
from .stepwise import (
    Group,
    StepwiseOptimizer,
    as_real,
    check_capturable,
    count,
    refuse_negative,
    to_scalar,
)

__all__ = ["RMSprop"]


class RMSprop(StepwiseOptimizer):
    """RMSprop (Hinton, 2012, lecture 6e), centered as of Graves (2013, arXiv:1308.0850).

    For each parameter p with gradient g:

        g = -g                              with maximize
        g = g + weight_decay p
        v = alpha v + (1 - alpha) g^2
        a = alpha a + (1 - alpha) g         with centered
        d = sqrt(v) + eps                   with centered, sqrt(v - a^2) + eps
        b = momentum b + g / d              with momentum
        p = p - lr b                        without momentum, p - lr g / d

    Saved in `state`: step; square_avg, v; momentum_buffer, b; grad_avg, a. `foreach` chooses
    torch's kernels of the same name, as in PyTorch. With `differentiable` the step is recorded:
    the parameters, which need not be leaves, then depend on their gradients. Sparse gradients are
    refused.
    """

    _no_sparse = "RMSprop does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        refuse_negative(
            ("learning rate", lr),
            ("epsilon value", eps),
            ("momentum value", momentum),
            ("weight_decay value", weight_decay),
            ("alpha value", alpha),
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("momentum", 0)
            group.setdefault("centered", False)
            group.setdefault("foreach", None)
            group.setdefault("maximize", False)
            group.setdefault("differentiable", False)
            group.setdefault("capturable", False)
            self._steps_to_tensors(group)

    def _kept(self, group: Group) -> tuple[str, ...]:
        names: tuple[str, ...] = ("step", "square_avg")
        if group["momentum"] > 0:
            names += ("momentum_buffer",)
        if group["centered"]:
            names += ("grad_avg",)
        return names

    def _check(self, group: Group, lists: Lists) -> None:
        if group["capturable"]:
            check_capturable(lists)

    def _one(
        self,
        group: Group,
        param: Tensor,
        grad: Tensor,
        step: Tensor,
        square_avg: Tensor,
        momentum_buffer: Tensor | None = None,
        grad_avg: Tensor | None = None,
    ) -> None:
        lr, alpha = to_scalar(group["lr"]), group["alpha"]
        if group["maximize"]:
            grad = -grad
        step += operand(1.0, step)
        if group["weight_decay"] != 0:
            grad = grad.add(param, alpha=group["weight_decay"])
        if param.is_complex():
            param, grad, square_avg, momentum_buffer, grad_avg = as_real(
                param, grad, square_avg, momentum_buffer, grad_avg
            )
        square_avg.mul_(operand(alpha, square_avg)).addcmul_(grad, grad, value=1 - alpha)
        if grad_avg is not None:
            grad_avg.lerp_(grad, 1 - alpha)
            square_avg = square_avg.addcmul(grad_avg, grad_avg, value=-1)
        denom = sqrt_plus(square_avg, group["eps"], group["differentiable"])
        if momentum_buffer is not None:
            momentum = operand(group["momentum"], momentum_buffer)
            momentum_buffer.mul_(momentum).addcdiv_(grad, denom)
            param.add_(momentum_buffer, alpha=-lr)
        else:
            param.addcdiv_(grad, denom, value=-lr)

    _recorded = _one

    def _many(
        self,
        group: Group,
        params: Tensors,
        grads: Tensors,
        step: Tensors,
        square_avg: Tensors,
        momentum_buffer: Tensors | None = None,
        grad_avg: Tensors | None = None,
    ) -> None:
        lr, alpha = to_scalar(group["lr"]), group["alpha"]
        lr_of_graph = group["capturable"] and isinstance(lr, Tensor)  # not to be made a number
        if group["maximize"]:
            grads = _torch.foreach_neg(grads)
        count(step)
        if group["weight_decay"] != 0:
            grads = _torch.foreach_add(grads, params, alpha=group["weight_decay"])
        _torch.foreach_mul_(square_avg, alpha)
        _torch.foreach_addcmul_(square_avg, grads, grads, value=1 - alpha)
        if grad_avg is not None:
            _torch.foreach_lerp_(grad_avg, grads, 1 - alpha)
            denom = _torch.foreach_addcmul(square_avg, grad_avg, grad_avg, value=-1)
            _torch.foreach_sqrt_(denom)
        else:
            denom = _torch.foreach_sqrt(square_avg)
        _torch.foreach_add_(denom, group["eps"])
        if momentum_buffer is not None:
            _torch.foreach_mul_(momentum_buffer, group["momentum"])
            _torch.foreach_addcdiv_(momentum_buffer, grads, denom)
            if lr_of_graph:
                _torch.foreach_add_(params, _torch.foreach_mul(momentum_buffer, -lr))
            else:
                _torch.foreach_add_(params, momentum_buffer, alpha=-lr)
        elif lr_of_graph:
            _torch.foreach_div_(denom, -lr)
            _torch.foreach_addcdiv_(params, grads, denom)
        else:
            _torch.foreach_addcdiv_(params, grads, denom, value=-lr)
