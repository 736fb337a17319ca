"""Adam, and AMSGrad."""

import torch
from torch import Tensor

from .. import _torch
from .._versions import SINCE_2_14
from .flat import Lists, Tensors, operand, sqrt
from .optimizer import ParamsT, StateDict
from .stepwise import (
    Group,
    StepwiseOptimizer,
    as_real,
    check_capturable,
    check_fused_options,
    count,
    decayed,
    refuse_negative,
    to_scalar,
)

__all__ = ["Adam"]


class Adam(StepwiseOptimizer):
    """Adam (Kingma and Ba, 2014, arXiv:1412.6980): steps of about lr at any scale of g.

    For each parameter p with gradient g, at its step number t:

        g = -g                            with maximize
        g = g + weight_decay p            or, with decoupled_weight_decay (AdamW),
        p = (1 - lr weight_decay) p
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        w = v; with amsgrad (Reddi et al., 2018), the greatest v so far
        p = p - lr / (1 - beta1^t) m / (sqrt(w) / sqrt(1 - beta2^t) + eps)

    Saved in `state`: step, t; exp_avg, m; exp_avg_sq, v; max_exp_avg_sq, w with amsgrad.
    `foreach` and `fused` choose torch's kernels of the same names, as in PyTorch, and with
    them their rounding. With `differentiable` the step is recorded: the parameters, which need not
    be leaves, then depend on their gradients, and on options that are tensors which require grad.
    Sparse gradients are refused.
    """

    _no_sparse = "Adam does not support sparse gradients, please consider SparseAdam instead"
    _counts_on = "cpu"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        only_numbers = foreach and not capturable
        if isinstance(lr, Tensor):
            if only_numbers:
                raise ValueError(_NO_TENSOR.format("lr"))
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        refuse_negative(("learning rate", lr), ("epsilon value", eps))
        for i in (0, 1):
            if not 0.0 <= betas[i] < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")
        refuse_negative(("weight_decay value", weight_decay))
        if not any(all(isinstance(betas[i], kind) for i in (0, 1)) for kind in (float, Tensor)):
            raise ValueError("betas must be either both floats or both Tensors")
        for i in (0, 1):
            beta = betas[i]
            if isinstance(beta, Tensor):
                if only_numbers:
                    raise ValueError(_NO_TENSOR.format(f"betas[{i}]"))
                if beta.numel() != 1:
                    raise ValueError(f"Tensor betas[{i}] must be 1-element")
        defaults = {
            "lr": lr,
            # A third one is an error at the first step, and ignored since PyTorch 2.14.
            "betas": tuple(map(to_scalar, betas[:2] if SINCE_2_14 else betas)),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)
        if fused:
            check_fused_options(differentiable, foreach)
            self._step_supports_amp_scaling = True

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("capturable", False)
            group.setdefault("differentiable", False)
            group.setdefault("decoupled_weight_decay", False)
            group.setdefault("fused", None)
            self._steps_to_tensors(group)

    def _kept(self, group: Group) -> tuple[str, ...]:
        names = ("step", "exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def _by_foreach(self, group: Group, params: list[Tensor]) -> bool:
        if group["foreach"] is None and not group["capturable"] and isinstance(group["lr"], Tensor):
            return False  # not chosen explicitly, and it would be refused
        return super()._by_foreach(group, params)

    def _check(self, group: Group, lists: Lists) -> None:
        if group["fused"]:
            return
        foreach, capturable = self._by_foreach(group, lists["params"]), group["capturable"]
        if foreach and not capturable:
            if isinstance(group["lr"], Tensor):
                raise RuntimeError(_NO_TENSOR.format("lr"))
            beta1, beta2 = group["betas"]
            for name, beta in (("beta1", beta1), ("beta2", beta2)):
                if isinstance(beta, Tensor):
                    raise ValueError(_NO_TENSOR.format(name))
        if capturable:
            check_capturable(lists, xla=not foreach)

    def _one(
        self,
        group: Group,
        param: Tensor,
        grad: Tensor,
        step: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None = None,
    ) -> None:
        lr, eps = to_scalar(group["lr"]), group["eps"]
        beta1, beta2 = map(to_scalar, group["betas"])
        grad = _begun(group, param, grad, step, lr)
        if param.is_complex():
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq = as_real(
                param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq
            )
        if isinstance(beta1, Tensor):  # lerp_ takes no weight of another dtype
            weight = 1 - beta1.to(device=param.device, dtype=param.dtype)
        else:
            weight = 1 - beta1
        exp_avg.lerp_(grad, weight)
        exp_avg_sq.mul_(operand(beta2, exp_avg_sq)).addcmul_(grad, grad, value=1 - beta2)
        if max_exp_avg_sq is not None:
            exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
        denom = sqrt(exp_avg_sq)
        if group["capturable"]:
            minus_size = (lr / (1 - beta1**step)).neg()
            denom.div_((1 - beta2**step).sqrt() * minus_size).add_(eps / minus_size)
            param.addcdiv_(exp_avg, denom)
        else:
            t = step.item()
            denom.div_((1 - beta2**t) ** 0.5).add_(operand(eps, denom))
            param.addcdiv_(exp_avg, denom, value=-(lr / (1 - beta1**t)))

    def _recorded(
        self,
        group: Group,
        param: Tensor,
        grad: Tensor,
        step: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None = None,
    ) -> None:
        """`_one`, with `differentiable`: saved tensors are not changed later."""
        if step.requires_grad:
            raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
        lr, eps = to_scalar(group["lr"]), group["eps"]
        beta1, beta2 = map(to_scalar, group["betas"])
        grad = _begun(group, param, grad, step, lr)
        weight: float | Tensor = beta1
        if isinstance(beta1, Tensor):
            weight = beta1.to(device=param.device, dtype=param.dtype)
        exp_avg.lerp_(grad, 1 - weight)
        if isinstance(beta2, Tensor) and beta2.requires_grad:
            exp_avg_sq.lerp_(torch.square(grad), weight=1 - beta2)
        else:
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

        def correction(beta: float | Tensor) -> Tensor:
            t = step.clone() if isinstance(beta, Tensor) and beta.requires_grad else step
            return 1 - beta**t

        correction1, correction2 = correction(beta1), correction(beta2)
        minus_size = (lr / correction1).neg()
        root = correction2.sqrt()
        if max_exp_avg_sq is not None:
            max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq.clone(), exp_avg_sq))
            exp_avg_sq = max_exp_avg_sq
        denom = (exp_avg_sq.sqrt() / (root * minus_size)).add_(eps / minus_size)
        param.addcdiv_(exp_avg.clone(), denom)

    def _many(
        self,
        group: Group,
        params: Tensors,
        grads: Tensors,
        step: Tensors,
        exp_avg: Tensors,
        exp_avg_sq: Tensors,
        max_exp_avg_sq: Tensors | None = None,
    ) -> None:
        lr, eps, decay = to_scalar(group["lr"]), group["eps"], group["weight_decay"]
        beta1, beta2 = map(to_scalar, group["betas"])
        if group["maximize"]:
            grads = _torch.foreach_neg(grads)
        count(step)
        if decay != 0:
            if group["decoupled_weight_decay"]:
                _torch.foreach_mul_(params, 1 - lr * decay)
            else:
                grads = _torch.foreach_add(grads, params, alpha=decay)
        on_device = isinstance(beta1, Tensor) and not beta1.is_cpu
        _torch.foreach_lerp_(
            exp_avg, grads, 1 - (beta1.to(params[0].device) if on_device else beta1)
        )
        _torch.foreach_mul_(exp_avg_sq, beta2)
        if isinstance(beta2, Tensor):  # addcmul's value is a number
            scaled = _torch.foreach_mul(grads, 1 - beta2)
            _torch.foreach_addcmul_(exp_avg_sq, scaled, grads, 1.0)
        else:
            _torch.foreach_addcmul_(exp_avg_sq, grads, grads, 1 - beta2)
        if max_exp_avg_sq is not None:
            _torch.foreach_maximum_(max_exp_avg_sq, exp_avg_sq)
            exp_avg_sq = max_exp_avg_sq
        denom = _torch.foreach_sqrt(exp_avg_sq)
        if group["capturable"]:
            minus_size = _torch.foreach_pow(beta1, step)  # becomes 1 / ((beta1^t - 1) / lr)
            _torch.foreach_sub_(minus_size, 1)
            _torch.foreach_div_(minus_size, lr)
            _torch.foreach_reciprocal_(minus_size)
            root = _torch.foreach_pow(beta2, step)  # becomes sqrt(1 - beta2^t)
            _torch.foreach_sub_(root, 1)
            _torch.foreach_neg_(root)
            _torch.foreach_sqrt_(root)
            _torch.foreach_div_(denom, root)
            _torch.foreach_add_(denom, eps)
            _torch.foreach_div_(denom, minus_size)
            _torch.foreach_addcdiv_(params, exp_avg, denom)
        else:
            ts = [t.item() for t in step]
            _torch.foreach_div_(denom, [(1 - beta2**t) ** 0.5 for t in ts])
            _torch.foreach_add_(denom, eps)
            sizes = [-(lr / (1 - beta1**t)) for t in ts]
            _torch.foreach_addcdiv_(params, exp_avg, denom, sizes)

    def _fused(
        self,
        group: Group,
        params: Tensors,
        grads: Tensors,
        step: Tensors,
        exp_avg: Tensors,
        exp_avg_sq: Tensors,
        max_exp_avg_sq: Tensors = (),
        **scaling: Tensor | None,
    ) -> None:
        beta1, beta2 = map(to_scalar, group["betas"])
        decoupled = group["decoupled_weight_decay"]
        (_torch.fused_adamw_ if decoupled else _torch.fused_adam_)(
            params,
            grads,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            step,
            amsgrad=group["amsgrad"],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            **scaling,
        )


_NO_TENSOR = "{} as a Tensor is not supported for capturable=False and foreach=True"


def _begun(group: Group, param: Tensor, grad: Tensor, step: Tensor, lr: float | Tensor) -> Tensor:
    """Count the step and decay the weights; the gradient to use."""
    decay = group["weight_decay"]
    if group["maximize"]:
        grad = -grad
    step += operand(1.0, step)
    if decay != 0:
        if group["decoupled_weight_decay"]:
            param.mul_(1 - lr * decay)
        elif group["differentiable"]:
            grad = decayed(grad, param, decay)
        else:
            grad = grad.add(param, alpha=decay)
    return grad
