"""Batch normalisation, and what instance normalisation shares with it."""

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from .. import init
from .._torch import DisableTorchFunctionSubclass
from ..operation import Operation
from ..overrides import dim_of, is_subclass
from ..parameter import Parameter, UninitializedBuffer, UninitializedParameter
from ..rules.batchnorm import NativeBatchNorm
from .layer import Layer
from .lazy import LazyModuleMixin
from .module import StateDict, keeps_call

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]


class _NormBase(Layer):
    """The parameters and buffers of a layer that normalises by channel."""

    _version = 2
    __constants__ = ["track_running_stats", "momentum", "eps", "num_features", "affine"]
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _dims: tuple[int, ...]  # how many the input may have

    def __init__(  # type: ignore[no-untyped-def]
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        like = {"device": device, "dtype": dtype}

        def made() -> Parameter:
            return Parameter(torch.empty(num_features, **like))

        self.register_parameter("weight", made() if affine else None)
        self.register_parameter("bias", made() if affine and bias else None)
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(num_features, **like))
            self.register_buffer("running_var", torch.ones(num_features, **like))
            count = torch.tensor(0, dtype=torch.long, device=device)
            self.register_buffer("num_batches_tracked", count)
        else:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                self.register_buffer(name, None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the running mean to zero, the running variance to one, the count to zero."""
        if self.track_running_stats:
            self.running_mean.zero_()  # type: ignore[union-attr]
            self.running_var.fill_(1)  # type: ignore[union-attr]
            self.num_batches_tracked.zero_()  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        """Set the weight to one, the bias to zero, and reset the running statistics."""
        self.reset_running_stats()
        if self.affine:
            init.ones_(self.weight)  # type: ignore[arg-type]
            if self.bias is not None:
                init.zeros_(self.bias)  # type: ignore[arg-type]

    def _check_input_dim(self, input: Tensor) -> None:
        dim = dim_of(input)
        if dim not in self._dims:
            allowed = " or ".join([f"{n}D" for n in self._dims])
            raise ValueError(f"expected {allowed} input (got {dim}D input)")

    def extra_repr(self):  # type: () -> str
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum},"
            f" affine={self.affine}, bias={self.bias is not None},"
            f" track_running_stats={self.track_running_stats}"
        )

    def _load_from_state_dict(
        self, state_dict: StateDict, prefix: str, local_metadata: dict[str, Any], *more: Any
    ) -> None:
        version = local_metadata.get("version")
        if (version is None or version < 2) and self.track_running_stats:
            # State saved before there was a count.
            count = self.num_batches_tracked
            if count is None or count.is_meta:
                count = torch.tensor(0, dtype=torch.long)
            state_dict.setdefault(f"{prefix}num_batches_tracked", count)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)


class _BatchNorm(_NormBase):
    @keeps_call
    def forward(self, input: Tensor) -> Tensor:
        return self._run(NativeBatchNorm, input)

    def _run(self, function: type[Operation], *args: Any) -> Any:
        (input,) = args
        if type(input) is tuple:
            return self._run_on_tuple(function, args)
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches so far
                momentum = 1.0 / float(self.num_batches_tracked)
        running = self.running_mean, self.running_var
        training = self.training or (running[0] is None and running[1] is None)
        if self.training and not self.track_running_stats:
            running = (None, None)
        weights: tuple[Any, Any] = (self.weight, self.bias)
        whole = is_subclass(input)
        if not whole:
            with DisableTorchFunctionSubclass():
                whole = input.numel() == 0
                if not whole:
                    F.check_batch(input, training, self.eps)
        if whole:
            how = (*running, *weights, training, momentum, self.eps)
            return self._run_whole(lambda x: F.batch_norm(x, *how), input)
        return super()._run(function, input, *weights, *running, training, momentum, self.eps)


class _LazyNormBase(LazyModuleMixin, _NormBase):
    """Takes `num_features` from the first input."""

    def __init__(  # type: ignore[no-untyped-def]
        self,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        device=None,
        dtype=None,
        *,
        bias=True,
    ) -> None:
        like = {"device": device, "dtype": dtype}
        super().__init__(0, eps, momentum, False, False, **like, bias=False)
        self.affine = affine
        self.track_running_stats = track_running_stats
        if affine:
            self.weight = UninitializedParameter(**like)
            if bias:
                self.bias = UninitializedParameter(**like)
        if track_running_stats:
            self.running_mean = UninitializedBuffer(**like)
            self.running_var = UninitializedBuffer(**like)
            self.num_batches_tracked = torch.tensor(0, dtype=torch.long, device=device)

    def reset_parameters(self) -> None:
        """As of the module that it becomes; nothing before the first call."""
        if not self.has_uninitialized_params() and self.num_features != 0:
            super().reset_parameters()

    def initialize_parameters(self, input) -> None:  # type: ignore[override, no-untyped-def]
        """Give weight, bias and running statistics the number of channels of the input."""
        if self.has_uninitialized_params():
            self.num_features = input.shape[1]
            own: tuple[Any, ...] = (self.weight, self.bias, self.running_mean, self.running_var)
            for tensor in own:
                if tensor is not None:
                    tensor.materialize((self.num_features,))
            self.reset_parameters()


class BatchNorm1d(_BatchNorm):
    """y = (x - mean) r w + b, r = 1 / sqrt(var + eps), per channel of (N, C) or (N, C, L).

    In training mode mean and var are those of the batch, and `running_mean` and `running_var` are
    updated with them by `momentum` (None: a cumulative average over all batches). In evaluation
    mode the running statistics are used, if they are tracked.

    db = sum of g,  dw = sum of g z,  z = (x - mean) r, dx = r w (g - mean(g) - z mean(g z)) in
    training mode, g r w in evaluation mode.  Saved: x, w, mean, r and the running statistics
    (Ioffe and Szegedy, 2015).
    """

    _dims = (2, 3)


class BatchNorm2d(_BatchNorm):
    """`BatchNorm1d` per channel of (N, C, H, W): the sums are over N, H and W."""

    _dims = (4,)


class BatchNorm3d(_BatchNorm):
    """`BatchNorm1d` per channel of (N, C, D, H, W): the sums are over N, D, H and W."""

    _dims = (5,)


class LazyBatchNorm1d(_LazyNormBase, _BatchNorm):
    """A `BatchNorm1d` with `num_features` from the first input."""

    cls_to_become = BatchNorm1d
    _dims = BatchNorm1d._dims


class LazyBatchNorm2d(_LazyNormBase, _BatchNorm):
    """A `BatchNorm2d` with `num_features` from the first input."""

    cls_to_become = BatchNorm2d
    _dims = BatchNorm2d._dims


class LazyBatchNorm3d(_LazyNormBase, _BatchNorm):
    """A `BatchNorm3d` with `num_features` from the first input."""

    cls_to_become = BatchNorm3d
    _dims = BatchNorm3d._dims
