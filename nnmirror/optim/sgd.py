"""Stochastic gradient descent."""

import itertools
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._torch import DisableTorchFunctionSubclass
from ..grad_mode import users_code
from ..parameter import Parameter
from ..twins import warn_if_elsewhere
from .flat import FLOATS, SMALL, operand, storages
from .optimizer import Optimizer, Options, ParamsT, StateDict, evaluate, with_grads
from .stepwise import (
    check_fused,
    check_fused_options,
    decayed,
    foreach_is_chosen,
    to_scalar,
)

__all__ = ["SGD"]


class SGD(Optimizer):
    """Gradient descent, with momentum (Polyak, 1964) or Nesterov's (Sutskever et al., 2013).

    For each parameter p with gradient g:

        g = -g                              with maximize
        g = g + weight_decay p
        b = momentum b + (1 - dampening) g  with momentum; b = g at the first step
        g = g + momentum b                  with nesterov, else g = b
        p = p - lr g

    Saved in `state`: momentum_buffer, b. `foreach` and `fused` choose torch's kernels of
    the same names, as in PyTorch, and with them their rounding. With `differentiable` the step is
    recorded: the parameters, which need not be leaves, then depend on their gradients, and on `lr`
    and `weight_decay` if these are tensors that require grad.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if momentum < 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if weight_decay < 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)
        if fused:
            check_fused_options(differentiable, foreach)
        if foreach and differentiable:
            raise NotImplementedError(
                "nnmirror: SGD with differentiable=True and foreach=True is not mirrored; leave"
                " foreach out, the numbers are the same"
            )

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", False)

    def step(self, closure=None):  # type: (Any) -> Any
        """Update the parameters; `closure`, if given, computes the loss anew first."""
        loss = None if closure is None else evaluate(closure)
        if self.defaults["differentiable"]:
            with users_code(True):
                for group in self.param_groups:
                    self._step_group(group)
            return loss
        with DisableTorchFunctionSubclass():
            for group in self.param_groups:
                if not _step_plainly(group):
                    with torch.no_grad():
                        self._step_group(group)
        return loss

    def _step_group(self, group: Options) -> None:
        momentum = group["momentum"]
        params, grads = with_grads(group["params"])
        buffers = []
        if momentum != 0:
            buffers = [self.state[param].get("momentum_buffer") for param in params]
        if not params:
            warn_if_elsewhere(group["params"])
            return
        if group["fused"]:
            _fused(params, grads, buffers, group)
        elif foreach_is_chosen(group, params):
            _foreach(params, grads, buffers, group)
        else:
            _as_usual(params, grads, buffers, group)
        if momentum != 0:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer


def _step_plainly(group: Options) -> bool:
    """p = p - lr g for the mirror's own parameters, without further options; else False."""
    lr = group["lr"]
    if (
        group["momentum"] != 0
        or group["weight_decay"] != 0
        or group["maximize"]
        or group["foreach"]
        or group["fused"]
        or type(lr) is not float
    ):
        return False
    params = group["params"]
    if set(map(type, params)) != _OURS:  # torch's own may require grad for torch
        return False
    params, grads = with_grads(params)
    if not params:
        return False
    with _BelowAutograd():  # a gradient may require grad for torch
        _torch.foreach_add_([*map(_plain, params)], grads, alpha=-lr)
    return True


_OURS = {Parameter}
_BelowAutograd: Any = _torch.AutoDispatchBelowAutograd

_plain = attrgetter("_plain")


def _as_usual(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: Options
) -> None:
    """As `_one_by_one`, but small parameters by fewer calls where that cannot change the result."""
    is_small = [p.numel() <= SMALL for p in params]
    if (
        group["momentum"] == 0
        or group["differentiable"]
        or type(group["lr"]) is not float
        or type(group["momentum"]) is not float
        or not any(is_small)
        or not _fit(params, grads, buffers)
        or not _are_apart([*params, *grads, *[b for b in buffers if b is not None]])
    ):
        _one_by_one(params, grads, buffers, group)
    elif all(is_small):
        _foreach(params, grads, buffers, group)
    else:
        for chosen, update in ((is_small, _foreach), ([not x for x in is_small], _one_by_one)):
            p, g, b = ([*itertools.compress(of, chosen)] for of in (params, grads, buffers))
            update(p, g, b, group)
            new = iter(b)
            buffers[:] = [next(new) if c else old for c, old in zip(chosen, buffers, strict=True)]


def _fit(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> bool:
    """Have they the same shapes? Else an update raises, with the parameters before it updated."""
    return all(
        p.shape == g.shape and (b is None or (isinstance(b, Tensor) and b.shape == p.shape))
        for p, g, b in zip(params, grads, buffers, strict=True)
    )


def _are_apart(tensors: list[Tensor]) -> bool:
    """Are they usual tensors of one kind, each in memory of its own?"""
    first = tensors[0]
    return (
        {(t.layout, t.dtype, t.is_cpu) for t in tensors} == {(torch.strided, first.dtype, True)}
        and first.dtype in FLOATS
        and len(storages(tensors)) == len(tensors)
    )


def _one_by_one(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: Options
) -> None:
    lr, weight_decay, momentum = to_scalar(group["lr"]), group["weight_decay"], group["momentum"]
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if group["maximize"]:
            grad = -grad
        if weight_decay != 0:
            grad = decayed(grad, param, weight_decay)
        if momentum != 0:
            if buffers[i] is None:
                buffers[i] = grad.detach().clone()
            else:
                buffers[i].mul_(momentum).add_(grad, alpha=1 - group["dampening"])
            grad = grad.add(buffers[i], alpha=momentum) if group["nesterov"] else buffers[i]
        if isinstance(lr, Tensor) and lr.requires_grad:
            param.addcmul_(grad, lr, value=-1)
        else:
            param.add_(grad, alpha=-lr)


def _foreach(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: Options
) -> None:
    lr, weight_decay, momentum = to_scalar(group["lr"]), group["weight_decay"], group["momentum"]
    if group["maximize"]:
        grads = list(_torch.foreach_neg(grads))
    if weight_decay != 0:
        grads = list(_torch.foreach_add(grads, params, alpha=weight_decay))
    if momentum != 0:
        known = [(b, g) for b, g in zip(buffers, grads, strict=True) if b is not None]
        if known:
            bufs = [b for b, _ in known]
            _torch.foreach_mul_(bufs, momentum if group["foreach"] else operand(momentum, bufs[0]))
            _torch.foreach_add_(bufs, [g for _, g in known], alpha=1 - group["dampening"])
        for i, grad in enumerate(grads):
            if buffers[i] is None:
                buffers[i] = grad.clone()
        if group["nesterov"]:
            if group["foreach"]:  # into .grad, as in PyTorch
                _torch.foreach_add_(grads, buffers, alpha=momentum)
            else:
                grads = list(_torch.foreach_add(grads, buffers, alpha=momentum))
        else:
            grads = buffers
    _torch.foreach_add_(params, grads, alpha=-lr)


def _fused(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: Options
) -> None:
    for param in params:
        check_fused(param)
    first = bool(buffers) and all(b is None for b in buffers)
    if first:
        buffers[:] = [torch.empty_like(g) for g in grads]
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, param in enumerate(params):
        by_kind.setdefault((param.device, param.dtype), []).append(i)
    for places in by_kind.values():
        _torch.fused_sgd_(
            [params[i] for i in places],
            [grads[i] for i in places],
            [buffers[i] for i in places] if buffers else [],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=first,
        )
