"""Adam with decoupled weight decay."""

from torch import Tensor

from .adam import Adam
from .optimizer import ParamsT, StateDict

__all__ = ["AdamW"]


class AdamW(Adam):
    """Adam whose weight decay is not part of the gradient (Loshchilov and Hutter, 2017,
    arXiv:1711.05101).

    For each parameter p, p = (1 - lr weight_decay) p, then Adam's step with no weight decay.
    The state is Adam's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # also after loading a state saved by Adam
            group["decoupled_weight_decay"] = True
