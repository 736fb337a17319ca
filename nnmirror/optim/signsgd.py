"""The sign of the gradient: signSGD, and Signum."""

from torch import Tensor

from .. import _torch
from .flat import Lists, Tensors
from .optimizer import ParamsT
from .stepwise import Group, StepwiseOptimizer, refuse_negative, to_scalar

__all__ = ["SignSGD"]


class SignSGD(StepwiseOptimizer):
    """signSGD and, with momentum, Signum (Bernstein et al., 2018, arXiv:1802.04434).

    PyTorch has none. For each parameter p with gradient g:

        g = -g                              with maximize
        b = momentum b + (1 - momentum) g   with momentum, from b = 0; else b = g
        p = (1 - lr weight_decay) p decoupled: the decay is not in the sign
        p = p - lr sign(b)

    Every element moves by lr, or not at all where b is 0: lr is an absolute length, far
    smaller than SGD's. Saved in `state`: momentum_buffer, b. `foreach` chooses torch's kernels
    of the same name; on a CPU the bits are the same. Sparse gradients and complex parameters
    are refused.
    """

    _no_sparse = "SignSGD does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        weight_decay: float | Tensor = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        refuse_negative(("learning rate", lr))
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        refuse_negative(("weight_decay value", weight_decay))
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _kept(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _check(self, group: Group, lists: Lists) -> None:
        if any(param.is_complex() for param in lists["params"]):
            raise RuntimeError("SignSGD does not support complex parameters")

    def _one(
        self, group: Group, param: Tensor, grad: Tensor, momentum_buffer: Tensor | None = None
    ) -> None:
        lr, momentum = to_scalar(group["lr"]), group["momentum"]
        if group["maximize"]:
            grad = -grad
        if momentum_buffer is not None:
            grad = momentum_buffer.mul_(momentum).add_(grad, alpha=1 - momentum)
        if group["weight_decay"] != 0:
            param.mul_(1 - lr * group["weight_decay"])
        param.add_(grad.sign(), alpha=-lr)

    def _many(
        self,
        group: Group,
        params: Tensors,
        grads: Tensors,
        momentum_buffer: Tensors | None = None,
    ) -> None:
        lr, momentum = to_scalar(group["lr"]), group["momentum"]
        if group["maximize"]:
            grads = _torch.foreach_neg(grads)
        if momentum_buffer is not None:
            _torch.foreach_mul_(momentum_buffer, momentum)
            _torch.foreach_add_(momentum_buffer, grads, alpha=1 - momentum)
            grads = momentum_buffer
        if group["weight_decay"] != 0:
            _torch.foreach_mul_(params, 1 - lr * group["weight_decay"])
        _torch.foreach_add_(params, _torch.foreach_sign(grads), alpha=-lr)
