"""Stochastic weight averaging: the schedule of `torch.optim.swa_utils`.

The average itself is PyTorch's, of the same weights: `AveragedModel(nnmirror.to_torch(model))`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from .._missing import missing
from .lr_scheduler import LRScheduler, _per_group
from .optimizer import Optimizer

__all__ = ["SWALR"]


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
    __getattr__ = missing(
        __name__, __all__, "take it from torch.optim.swa_utils, for nnmirror.to_torch(model)"
    )
