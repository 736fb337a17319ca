"""Gradient clipping: bounds on the norm or on each element, in place."""

import types
import typing
import warnings
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor

from .. import _torch
from .._torch import DisableTorchFunctionSubclass
from ..accumulate import grad_of
from ..grad_mode import no_grad_at_all
from ..optim.stepwise import foreach_devices

_tensor_or_tensors: TypeAlias = torch.Tensor | typing.Iterable[torch.Tensor]
_device, _dtype, _gradient = attrgetter("device"), attrgetter("dtype"), attrgetter("_gradient")


def _groups(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors grouped by device and dtype, as torch's foreach kernels need them."""
    if len({*map(_device, tensors)}) == len({*map(_dtype, tensors)}) == 1:  # nearly always
        return [tensors]
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def _foreach(group: list[Tensor], foreach: bool | None) -> bool:
    """Whether to use foreach kernels, as in PyTorch: if chosen, or on devices where they are
    faster."""
    device = group[0].device.type
    supported = device == "cpu" or device in foreach_devices()
    if foreach and not supported:
        raise RuntimeError(
            f"foreach=True was passed, but can't use the foreach API on {device} tensors"
        )
    return supported if foreach is None else bool(foreach)


def _grads(parameters: list[Tensor]) -> list[Tensor]:
    try:
        grads = [*map(_gradient, parameters)]
    except AttributeError:  # not all are the mirror's
        with DisableTorchFunctionSubclass():
            grads = [grad_of(p) if isinstance(p, Tensor) else p.grad for p in parameters]
    return [g for g in grads if g is not None]


def _listed(parameters: _tensor_or_tensors) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _total_norm(
    tensors: list[Tensor],
    groups: list[list[Tensor]],
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
) -> Tensor:
    norm_type = float(norm_type)
    if not tensors:
        return torch.tensor(0.0)
    norms: list[Tensor] = []
    for group in groups:
        if _foreach(group, foreach):
            norms.extend(_torch.foreach_norm(group, norm_type))
        else:
            norms.extend(torch.linalg.vector_norm(g, norm_type) for g in group)
    if len(groups) > 1:
        norms = [n.to(tensors[0].device) for n in norms]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and torch.logical_or(total.isnan(), total.isinf()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite,"
            " so it cannot be clipped. To disable this error and scale the gradients by the"
            " non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    return total


def _scale(
    groups: list[list[Tensor]], max_norm: float, total_norm: Tensor, foreach: bool | None
) -> None:
    max_norm = float(max_norm)
    if not groups:
        return
    scale = total_norm + 1e-6
    if isinstance(scale, Tensor):  # the same as a number divided by a tensor
        scale = scale.reciprocal_().mul_(max_norm).clamp_(max=1.0)
    else:
        scale = torch.clamp(max_norm / scale, max=1.0)  # PyTorch's error
    for group in groups:
        on_device = scale.to(group[0].device)
        if _foreach(group, foreach):
            _torch.foreach_mul_(group, on_device)
        else:
            for grad in group:
                grad.mul_(on_device)


@no_grad_at_all
def get_total_norm(
    tensors: _tensor_or_tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """The norm of all tensors as one vector: the norm of their norms."""
    tensors = _listed(tensors)
    return _total_norm(tensors, _groups(tensors), norm_type, error_if_nonfinite, foreach)


@no_grad_at_all
def clip_grads_with_norm_(
    parameters: _tensor_or_tensors,
    max_norm: float,
    total_norm: torch.Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients by max_norm / total_norm where that is less than one."""
    _scale(_groups(_grads(_listed(parameters))), max_norm, total_norm, foreach)


@no_grad_at_all
def clip_grad_norm_(
    parameters: _tensor_or_tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Bound the norm of all gradients together (Pascanu et al., 2013); returns the norm before."""
    listed = _listed(parameters)
    if isinstance(parameters, types.GeneratorType) and not listed:
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3
        )
    grads = _grads(listed)
    groups = _groups(grads)
    total = _total_norm(grads, groups, norm_type, error_if_nonfinite, foreach)
    _scale(groups, max_norm, total, foreach)
    return total


def clip_grad_norm(
    parameters: _tensor_or_tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Deprecated name of `clip_grad_norm_`."""
    warnings.warn(
        "`torch.nn.utils.clip_grad_norm` is now deprecated in favor of"
        " `torch.nn.utils.clip_grad_norm_`.",
        FutureWarning,
        stacklevel=2,
    )
    return clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


@no_grad_at_all
def clip_grad_value_(
    parameters: _tensor_or_tensors, clip_value: float, foreach: bool | None = None
) -> None:
    """Bound each element of the gradients to [-clip_value, clip_value]."""
    clip_value = float(clip_value)
    grads = _grads(_listed(parameters))
    if not grads:
        _torch.group_tensors_by_device_and_dtype([[]], False)  # PyTorch's error
    for group in _groups(grads):
        if _foreach(group, foreach):
            _torch.foreach_clamp_min_(group, -clip_value)
            _torch.foreach_clamp_max_(group, clip_value)
        else:
            for grad in group:
                grad.clamp_(min=-clip_value, max=clip_value)
