"""Instance normalisation, and its lazy forms."""

import warnings
from typing import Any

from torch import Tensor

from .. import functional as F
from ..rules.shape import squeeze, unsqueeze
from .batchnorm import _LazyNormBase, _NormBase
from .module import keeps_call

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]


class _InstanceNorm(_NormBase):
    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ) -> None:
        how = {"device": device, "dtype": dtype, "bias": bias}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **how)

    def _get_no_batch_dim(self) -> int:
        return self._dims[0]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, object],
        prefix: str,
        local_metadata: dict[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if local_metadata.get("version") is None and not self.track_running_stats:
            # State saved when running statistics were tracked by default.
            keys = [f"{prefix}{n}" for n in ("running_mean", "running_var")]
            keys = [key for key in keys if key in state_dict]
            if keys:
                names, klass = " and ".join([f'"{k}"' for k in keys]), self.__class__.__name__
                error_msgs.append(
                    f"Unexpected running stats buffer(s) {names} for {klass} with"
                    " track_running_stats=False. If state_dict is a checkpoint saved before 0.4.0,"
                    f" this may be expected because {klass} does not track running stats by default"
                    " since 0.4.0. Please remove these keys from state_dict. If the running stats"
                    f" are actually needed, instead set track_running_stats=True in {klass} to"
                    f" enable them. See the documentation of {klass} for details."
                )
            for key in keys:
                state_dict.pop(key)
        more = strict, missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)

    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run_several(self._normalised, (input,))  # type: ignore[no-any-return]

    def _normalised(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        no_batch = self._get_no_batch_dim()
        place = input.dim() - no_batch
        size = input.size(place)
        if size != self.num_features:
            if self.affine:
                raise ValueError(
                    f"expected input's size at dim={place} to match num_features"
                    f" ({self.num_features}), but got: {size}."
                )
            warnings.warn(
                f"input's size at dim={place} does not match num_features. You can silence this"
                " warning by not passing in num_features, which is not used because affine=False",
                stacklevel=4,
            )
        if input.dim() == no_batch:
            return squeeze(self._apply_instance_norm(unsqueeze(input, 0)), 0)
        return self._apply_instance_norm(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        stats = self.running_mean, self.running_var
        weights: tuple[Any, Any] = (self.weight, self.bias)
        of_input = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        return F.instance_norm(input, *stats, *weights, of_input, momentum, self.eps)


class InstanceNorm1d(_InstanceNorm):
    """y = (x - mean) r w + b, r = 1 / sqrt(var + eps), per image and channel: (N, C, L) or (C, L).

    mean and var are those of each channel of each image, in evaluation mode too, unless
    `track_running_stats=True`. w and b exist only with `affine=True`. dx as for `BatchNorm1d` with
    one image of N C channels (Ulyanov et al., 2016).
    """

    _dims = (2, 3)


class InstanceNorm2d(_InstanceNorm):
    """`InstanceNorm1d` for (N, C, H, W) or (C, H, W)."""

    _dims = (3, 4)


class InstanceNorm3d(_InstanceNorm):
    """`InstanceNorm1d` for (N, C, D, H, W) or (C, D, H, W)."""

    _dims = (4, 5)


class LazyInstanceNorm1d(_LazyNormBase, _InstanceNorm):
    """An `InstanceNorm1d` with `num_features` from the first input."""

    cls_to_become = InstanceNorm1d
    _dims = InstanceNorm1d._dims


class LazyInstanceNorm2d(_LazyNormBase, _InstanceNorm):
    """An `InstanceNorm2d` with `num_features` from the first input."""

    cls_to_become = InstanceNorm2d
    _dims = InstanceNorm2d._dims


class LazyInstanceNorm3d(_LazyNormBase, _InstanceNorm):
    """An `InstanceNorm3d` with `num_features` from the first input."""

    cls_to_become = InstanceNorm3d
    _dims = InstanceNorm3d._dims
