"""Adagrad."""

import torch
from torch import Tensor

from .. import _torch
from .._torch import DisableTorchFunctionSubclass
from .flat import Lists, Tensors, operand, put_in_line, sqrt_plus
from .optimizer import ParamsT, StateDict
from .stepwise import (
    Group,
    StepwiseOptimizer,
    as_real,
    check_fused,
    check_fused_options,
    count,
    counter,
    refuse_negative,
    to_scalar,
)

__all__ = ["Adagrad"]


class Adagrad(StepwiseOptimizer):
    """Adagrad (Duchi et al., 2011, JMLR 12): a step is divided by the root of the summed g^2.

    For each parameter p with gradient g, at its step number t:

        g = -g                              with maximize
        g = g + weight_decay p
        s = s + g^2                         s = initial_accumulator_value before the first
        p = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)

    Saved in `state`, from the constructor on: step, t; sum, s. `foreach` and `fused` choose
    torch's kernels of the same names, as in PyTorch, and with them their rounding. With
    `differentiable` the step is recorded: the parameters, which need not be leaves, then depend on
    their gradients. For a sparse gradient, only the rows that it contains are updated.
    """

    _device_was_checked = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        refuse_negative(
            ("learning rate", lr),
            ("lr_decay value", lr_decay),
            ("weight_decay value", weight_decay),
            ("initial_accumulator_value value", initial_accumulator_value),
            ("epsilon value", eps),
        )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)
        if fused:
            check_fused_options(differentiable, foreach)
            self._step_supports_amp_scaling = True
        with DisableTorchFunctionSubclass():
            state = self._kept_state.by_param
            for place, group in enumerate(self.param_groups):
                for param in group["params"]:
                    state[param] = self._begin(param, group)
                put_in_line(self, place, [state[param] for param in group["params"]])

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("foreach", None)
            group.setdefault("maximize", False)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)
            self._steps_to_tensors(group)

    def share_memory(self) -> None:
        """Move the sums to shared memory."""
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["sum"].share_memory_()

    def _kept(self, group: Group) -> tuple[str, ...]:
        return ("step", "sum")

    def _begin(self, param: Tensor, group: Group) -> dict[str, Tensor]:
        start = self.defaults["initial_accumulator_value"]
        if param.is_complex():
            start = complex(start, start)
        full = torch.full_like(param, start, memory_format=torch.preserve_format)
        return {"step": counter(param, group), "sum": full}

    def _check(self, group: Group, lists: Lists) -> None:
        if not group["fused"]:
            return
        params, grads = lists["params"], lists["grads"]
        if not self._device_was_checked:
            check_fused(params[0])
            self._device_was_checked = True
        if any(p.is_complex() for p in params) or any(g.is_sparse for g in grads):
            raise RuntimeError("`fused` does not support sparse grad or complex param")

    def _one(self, group: Group, param: Tensor, grad: Tensor, step: Tensor, sum: Tensor) -> None:
        step += operand(1.0, step)
        if group["maximize"]:
            grad = -grad
        if group["weight_decay"] != 0:
            if grad.is_sparse:
                raise RuntimeError("weight_decay option is not compatible with sparse gradients")
            grad = grad.add(param, alpha=group["weight_decay"])
        size = to_scalar(group["lr"]) / (1 + (step.item() - 1) * group["lr_decay"])
        if grad.is_sparse:
            grad = grad.coalesce()  # duplicate entries are summed before squaring
            values = grad._values()
            sum.add_(_with_values(grad, values.pow(2)))
            denom = sum.sparse_mask(grad)._values().sqrt_().add_(group["eps"])
            param.add_(_with_values(grad, values / denom), alpha=-size)
            return
        if param.is_complex():
            param, grad, sum = as_real(param, grad, sum)
        sum.addcmul_(grad, grad, value=1)
        denom = sqrt_plus(sum, group["eps"], group["differentiable"])
        param.addcdiv_(grad, denom, value=-size)

    _recorded = _one

    def _many(
        self,
        group: Group,
        params: Tensors,
        grads: Tensors,
        step: Tensors,
        sum: Tensors,
    ) -> None:
        if any(grad.is_sparse for grad in grads):
            for one in zip(params, grads, step, sum, strict=True):
                self._one(group, *one)
            return
        lr, lr_decay = to_scalar(group["lr"]), group["lr_decay"]
        if group["maximize"]:
            grads = _torch.foreach_neg(grads)
        count(step)
        if group["weight_decay"] != 0:
            grads = _torch.foreach_add(grads, params, alpha=group["weight_decay"])
        minus_sizes = [-lr / (1 + (t.item() - 1) * lr_decay) for t in step]
        _torch.foreach_addcmul_(sum, grads, grads, value=1)
        denom = _torch.foreach_sqrt(sum)
        _torch.foreach_add_(denom, group["eps"])
        if group["maximize"] or group["weight_decay"] != 0:
            _torch.foreach_mul_(grads, minus_sizes)  # which rounds differently in half precision
        else:
            grads = _torch.foreach_mul(grads, minus_sizes)
        _torch.foreach_addcdiv_(params, grads, denom)

    def _fused(
        self,
        group: Group,
        params: Tensors,
        grads: Tensors,
        step: Tensors,
        sum: Tensors,
        **scaling: Tensor | None,
    ) -> None:
        _torch.fused_adagrad_(
            params,
            grads,
            sum,
            step,
            lr=group["lr"],
            lr_decay=group["lr_decay"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            **scaling,
        )


def _with_values(like: Tensor, values: Tensor) -> Tensor:
    """A sparse tensor with other values at the same indices."""
    return torch.sparse_coo_tensor(like._indices(), values, like.size())
