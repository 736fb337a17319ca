"""Averages of weights, as in `torch.optim.swa_utils`: stochastic weight averaging (SWA,
arXiv:1803.05407) and exponential moving averages (EMA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import _torch
from .._missing import missing
from ..modules.batchnorm import _BatchNorm
from ..modules.module import Module
from .lr_scheduler import LRScheduler, _per_group
from .optimizer import Optimizer
from .stepwise import foreach_devices

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

PARAM_LIST: TypeAlias = tuple[Tensor, ...] | list[Tensor]


def _check_decay(decay: float) -> None:
    if decay < 0.0 or decay > 1.0:
        raise ValueError(
            f"Invalid decay value {decay} provided. Please provide a value in [0,1] range."
        )


def _can_lerp(average: PARAM_LIST) -> bool:
    return average[0].is_floating_point() or average[0].is_complex()


def get_ema_multi_avg_fn(decay=0.999):  # type: ignore[no-untyped-def]
    """The exponential moving average, for many tensors: a <- a + (1 - decay) (w - a)."""
    _check_decay(decay)

    @torch.no_grad()
    def ema_update(average: PARAM_LIST, weights: PARAM_LIST, _: object) -> None:
        if _can_lerp(average):
            _torch.foreach_lerp_(average, weights, 1 - decay)
            return
        for a, w in zip(average, weights, strict=True):
            a.copy_(a * decay + w * (1 - decay))

    return ema_update


def get_swa_multi_avg_fn():  # type: ignore[no-untyped-def]
    """The mean of n + 1 weights, for many tensors: a <- a + (w - a) / (n + 1)."""

    @torch.no_grad()
    def swa_update(average: PARAM_LIST, weights: PARAM_LIST, n: Any) -> None:
        if _can_lerp(average):
            _torch.foreach_lerp_(average, weights, 1 / (n + 1))
            return
        for a, w in zip(average, weights, strict=True):
            if isinstance(n, Tensor):
                a.addcdiv_(w - a, n + 1)
            else:
                a.add_(w - a, alpha=1.0 / (n + 1))

    return swa_update


def get_ema_avg_fn(decay=0.999):  # type: ignore[no-untyped-def]
    """The exponential moving average of one tensor: decay a + (1 - decay) w."""
    _check_decay(decay)

    @torch.no_grad()
    def ema_update(average: Tensor, weight: Tensor, _: object) -> Tensor:
        return decay * average + (1 - decay) * weight

    return ema_update


def get_swa_avg_fn():  # type: ignore[no-untyped-def]
    """The mean of n + 1 weights, of one tensor: a + (w - a) / (n + 1)."""

    @torch.no_grad()
    def swa_update(average: Tensor, weight: Tensor, n: Tensor | int) -> Tensor:
        return average + (weight - average) / (n + 1)

    return swa_update


class AveragedModel(Module):
    """A copy of `model` whose parameters are averages of its parameters.

    `update_parameters(model)` takes the present parameters into the average: the first ones are
    copied, and of n + 1 it is their mean. Or `avg_fn(average, weight, n)` returns it for one
    tensor, or `multi_avg_fn(averages, weights, n)` makes it in place, for lists of tensors of one
    device and dtype. Buffers are copied; with `use_buffers` they are averaged too. The copy is on
    `device`, if that is given.
    """

    n_averaged: Tensor

    def __init__(  # type: ignore[no-untyped-def]
        self,
        model: Module,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[[PARAM_LIST, PARAM_LIST, Tensor | int], None] | None = None,
        use_buffers=False,
    ) -> None:
        super().__init__()
        if avg_fn is not None and multi_avg_fn is not None:
            raise AssertionError("Only one of avg_fn and multi_avg_fn should be provided")
        self.module = deepcopy(model)
        if device is not None:
            self.module = self.module.to(device)
        count = torch.tensor(0, dtype=torch.long, device=device)
        self.register_buffer("n_averaged", count)
        self.avg_fn = avg_fn
        self.multi_avg_fn = multi_avg_fn
        self.use_buffers = use_buffers

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """That of the copy."""
        return self.module(*args, **kwargs)

    def update_parameters(self, model: Module) -> None:
        """Take the parameters that `model` has now into the average."""
        averages: Iterable[Tensor] = self.parameters()
        weights: Iterable[Tensor] = model.parameters()
        if self.use_buffers:
            averages = chain(self.module.parameters(), self.module.buffers())
            weights = chain(weights, model.buffers())
        pairs = [
            (a.detach(), w.detach().to(a.device)) for a, w in zip(averages, weights, strict=False)
        ]
        if self.n_averaged == 0:
            for average, weight in pairs:
                average.copy_(weight)
        elif self.avg_fn is not None:
            for average, weight in pairs:
                count = self.n_averaged.to(average.device)
                average.copy_(self.avg_fn(average, weight, count))
        else:
            self._average_together(pairs)
        if not self.use_buffers:
            copies = zip(self.module.buffers(), model.buffers(), strict=True)
            for copy, buffer in copies:
                copy.detach().copy_(buffer.detach().to(copy.device))
        self.n_averaged += 1

    def _average_together(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Those of one device and dtype at a time."""
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for pair in pairs:
            groups.setdefault((pair[0].device, pair[0].dtype), []).append(pair)
        for (device, _), group in groups.items():
            averages, weights = map(list, zip(*group, strict=True))
            count = self.n_averaged.to(device)
            if self.multi_avg_fn is not None:
                self.multi_avg_fn(averages, weights, count)
            elif device.type in foreach_devices():
                get_swa_multi_avg_fn()(averages, weights, count)
            else:
                mean = get_swa_avg_fn()
                for average, weight in group:
                    average.copy_(mean(average, weight, count))


@torch.no_grad()
def update_bn(
    loader: Iterable[Any], model: Module, device: int | torch.device | None = None
) -> None:
    """Compute the running mean and variance of each batch norm anew, as means over all batches.

    Each batch is the input of `model`, or a list or tuple that begins with it; it is moved to
    `device`, if that is given.
    """
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    if not momenta:
        return
    was_training = model.training
    model.train()
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None
    for batch in loader:
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        model(inputs if device is None else inputs.to(device))
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    model.train(was_training)


class SWALR(LRScheduler):
    """From the present rate to `swa_lr` in `anneal_epochs` steps, then constant.

    After t of n steps the rate is a s + (1 - a) b, with s = `swa_lr`, b the rate it came from, and
    a = t/n ("linear") or (1 - cos(pi t/n)) / 2 ("cos").  b is computed again from the present rate
    at each step, so that other schedulers may run before.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self,
        optimizer: Optimizer,
        swa_lr: float,
        anneal_epochs=10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        last_epoch=-1,
    ) -> None:
        rates = _per_group("swa_lr", optimizer, swa_lr)
        for rate, group in zip(rates, optimizer.param_groups, strict=True):
            group["swa_lr"] = rate
        if anneal_strategy not in ["cos", "linear"]:
            raise ValueError(
                f"anneal_strategy must be one of 'cos' or 'linear', instead got {anneal_strategy}"
            )
        self._set_anneal_func(anneal_strategy)
        if not isinstance(anneal_epochs, int) or anneal_epochs < 0:
            raise ValueError(f"anneal_epochs must be equal or greater than 0, got {anneal_epochs}")
        self.anneal_epochs = anneal_epochs
        super().__init__(optimizer, last_epoch)

    @staticmethod
    def _linear_anneal(t: float) -> float:
        return t

    @staticmethod
    def _cosine_anneal(t: float) -> float:
        return (1 - math.cos(math.pi * t)) / 2

    def _set_anneal_func(self, anneal_strategy: str) -> None:
        self._anneal_strategy = anneal_strategy
        cosine = anneal_strategy == "cos"
        self.anneal_func = self._cosine_anneal if cosine else self._linear_anneal

    def get_lr(self):  # type: ignore[no-untyped-def]
        """The next rate of each group."""
        self._asked()
        step = self._step_count - 1
        if self.anneal_epochs == 0:
            step = max(1, step)
        steps = max(1, self.anneal_epochs)
        before = self.anneal_func(max(0, min(1, (step - 1) / steps)))
        now = self.anneal_func(max(0, min(1, step / steps)))
        rates = []
        for group in self.optimizer.param_groups:
            lr, swa_lr = group["lr"], group["swa_lr"]
            start = swa_lr if before == 1 else (lr - before * swa_lr) / (1 - before)
            rates.append(swa_lr * now + start * (1 - now))
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimiser and `anneal_func`."""
        left_out = ("optimizer", "anneal_func")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.__dict__.update(state_dict)
        self._set_anneal_func(self._anneal_strategy)


if not TYPE_CHECKING:  # a type checker reports such a name itself
    __getattr__ = missing(__name__, __all__, "it is no public name of torch.optim.swa_utils")
