"""Shared by Adam, RMSprop, Adagrad and SignSGD: how a group of parameters is updated.

An optimiser defines which tensors it keeps for a parameter, and how a step changes them: one
parameter at a time (`_one`), or many with torch's foreach (`_many`) or fused kernels. Small
parameters on the CPU are updated as one flat tensor (`flat.py`).
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .. import _torch
from .._torch import DisableTorchFunctionSubclass
from .._types import TorchFunction
from ..grad_mode import users_code
from ..twins import warn_if_elsewhere
from ..walk import unrecorded
from .flat import (
    Lists,
    Tensors,
    is_plain_parameter,
    lists_of,
    put_in_line,
    step_again,
    step_as_one,
    step_in_turn,
)
from .optimizer import Optimizer, Options, evaluate, with_grads

Group = Options
N = TypeVar("N", float, Tensor, float | Tensor)


def _with_private(*devices: str) -> list[str]:
    return [*devices, _torch.get_privateuse1_backend_name()]  # which may be renamed any time


def foreach_devices() -> list[str]:
    """The devices that foreach kernels are made for."""
    return _with_private("cuda", "xpu", "mtia")


def _fused_devices() -> list[str]:
    return _with_private("mps", "cuda", "xpu", "hpu", "cpu", "mtia")


def _capturable_devices() -> list[str]:
    return _with_private("cuda", "xpu", "hpu")


class StepwiseOptimizer(Optimizer):
    """An optimiser whose state for a parameter is created at its first gradient."""

    _no_sparse: ClassVar[str | None] = None  # the error for a sparse gradient
    _counts_on: str | None = None  # device of a counter that no kernel reads; None: the default

    def step(self, closure=None):  # type: (Callable[[], Any] | None) -> Any
        """Update the parameters; `closure`, if given, computes the loss anew first."""
        loss = evaluate(closure)
        self._take_state_in()
        if self.defaults.get("differentiable"):
            with users_code(True):
                for place, group in enumerate(self.param_groups):
                    self._step_group(group, place)
        else:
            self._step_groups()
        return loss

    @unrecorded
    def _step_groups(self) -> None:
        with DisableTorchFunctionSubclass():
            for place, group in enumerate(self.param_groups):
                if not step_again(self, place, self._kept(group), self._one):
                    self._step_group(group, place)

    # -- what a subclass defines -------------------------------------------------------------

    def _kept(self, group: Group) -> tuple[str, ...]:
        """Names of the tensors kept for each parameter of the group."""
        raise NotImplementedError

    def _begin(self, param: Tensor, group: Group) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        return {
            name: counter(param, group, device=self._counts_on)
            if name == "step"
            else torch.zeros_like(param, memory_format=torch.preserve_format)
            for name in self._kept(group)
        }

    def _begin_all(self, group: Group, place: int, params: list[Tensor]) -> None:
        """Create the state of those of the parameters that have none."""
        new = []
        for param in params:
            state = self._kept_state.by_param[param]
            if not state:
                if group.get("fused"):
                    check_fused(param)
                state.update(self._begin(param, group))
                new.append(state)
        put_in_line(self, place, new)

    def _check(self, group: Group, lists: Lists) -> None:
        """Raise if the options of the group do not work with its parameters."""

    def _by_foreach(self, group: Group, params: list[Tensor]) -> bool:
        """Whether to step the parameters with foreach kernels."""
        return foreach_is_chosen(group, params)

    # A step, given the group, the parameters, their gradients, and the state by name:
    _one: ClassVar[Callable[..., None]]  # of one parameter
    _many: ClassVar[Callable[..., None]]  # of several of one dtype and device, by foreach
    _fused: ClassVar[Callable[..., None]]  # the same by a fused kernel
    _recorded: ClassVar[Callable[..., None]]  # of one, in operations that are recorded

    # -- the step ----------------------------------------------------------------------------

    def _step_group(self, group: Group, place: int) -> None:
        names = self._kept(group)
        params, grads = with_grads(group["params"])
        if not params:
            warn_if_elsewhere(group["params"])
            return
        if self._no_sparse and any(grad.is_sparse for grad in grads):
            raise RuntimeError(self._no_sparse)
        lists = lists_of(self, names, params, grads)
        if lists is None:
            self._begin_all(group, place, params)
            lists = lists_of(self, names, params, grads)
            assert lists is not None
        if not all(isinstance(step, Tensor) for step in lists.get("step", ())):
            raise RuntimeError(
                "API has changed, `state_steps` argument must contain a list of singleton tensors"
            )
        self._check(group, lists)
        if group.get("fused"):
            self._step_fused(group, lists, **self._scaling())
            return
        if "fused" in group and any(x is not None for x in self._scaling().values()):
            raise AssertionError("Expected grad_scale and found_inf to be None")
        if group.get("differentiable"):
            if group["foreach"]:
                raise AssertionError("_foreach ops don't support autograd")
            for one in zip(*lists.values(), strict=True):
                self._recorded(group, *one[:2], **dict(zip(names, one[2:], strict=True)))
            return
        if self._by_foreach(group, lists["params"]):
            for part in by_kind(lists):
                self._many(group, **_all_real(part))
            return
        step_in_turn(group, step_as_one(self, place, lists, self._one), self._one)

    def _scaling(self) -> dict[str, Tensor | None]:
        """Attributes that a GradScaler sets."""
        return {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}

    def _step_fused(
        self, group: Group, lists: Lists, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        # Set by a GradScaler for the kernel, which unscales, and skips the step if inf was found.
        for part in by_kind(lists):
            device = part["params"][0].device
            scaling = {
                "grad_scale": None if grad_scale is None else grad_scale.to(device),
                "found_inf": None if found_inf is None else found_inf.to(device),
            }
            _torch.foreach_add_(part["step"], 1)
            self._fused(group, **part, **scaling)
            if found_inf is not None:
                _torch.foreach_sub_(part["step"], [found_inf.to(device)] * len(part["step"]))

    def _steps_to_tensors(self, group: Group) -> None:
        """The counters of a state saved by an old PyTorch, which were numbers."""
        for param in group["params"]:
            state = self._kept_state.by_param.get(param, {})
            if len(state) != 0 and not isinstance(state["step"], Tensor):
                state["step"] = counter(param, group, float(state["step"]))


def counter(param: Tensor, group: Group, start: float = 0.0, device: str | None = None) -> Tensor:
    """A step counter: on the parameter's device if a kernel reads it there, else on `device`.

    If that is None, on the default device, as in PyTorch.
    """
    with_param = group.get("capturable") or group.get("fused")
    double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    return torch.tensor(
        start,
        dtype=torch.float64 if double else torch.float32,
        device=param.device if with_param else device,
    )


def count(steps: Tensors) -> None:
    """Increment the step counters of many parameters."""
    _torch.foreach_add_(steps, torch.tensor(1.0, device="cpu") if steps[0].is_cpu else 1)


def to_scalar(x: N) -> N:
    """An option that is a tensor of one element, without dimensions; a number unchanged."""
    return x.squeeze() if isinstance(x, Tensor) and x.dim() != 0 else x


def refuse_negative(*options: tuple[str, float | Tensor]) -> None:
    """Raise for an option below zero; the options are pairs of the name in the message and the
    value."""
    for name, value in options:
        if not 0.0 <= value:  # noqa: SIM300  # in PyTorch's order: a TypeError quotes it
            raise ValueError(f"Invalid {name}: {value}")


def decayed(grad: Tensor, param: Tensor, decay: float | Tensor) -> Tensor:
    """The gradient with that of the weight decay, in a step that may be recorded."""
    if isinstance(decay, Tensor) and decay.requires_grad:
        return grad.addcmul_(param.clone(), decay)  # into .grad, as in PyTorch
    return grad.add(param, alpha=decay)  # type: ignore[arg-type]


def check_fused_options(differentiable: bool, foreach: bool | None) -> None:
    """PyTorch's errors for `fused` with these options."""
    if differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_fused(param: Tensor) -> None:
    """Raise for a parameter that no fused kernel accepts."""
    if not param.is_floating_point() or param.device.type not in _fused_devices():
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported"
            f" devices: {_fused_devices()} but {param.dtype} and {param.device.type}"
        )


def check_capturable(lists: Lists, xla: bool = True) -> None:
    """Raise for parameters whose step cannot be captured in a device graph."""
    devices = [*_capturable_devices(), *(["xla"] if xla else [])]
    for param, step in zip(lists["params"], lists["step"], strict=True):
        if param.device.type != step.device.type or param.device.type not in devices:
            raise AssertionError(
                "If capturable=True, params and state_steps must be on supported devices:"
                f" {devices}."
            )


def foreach_is_chosen(group: Group, params: list[Tensor]) -> bool:
    """Whether to use foreach kernels: as the option says, else by device."""
    if group["foreach"] is not None or group.get("fused") is not None:
        return bool(group["foreach"])
    if params[0].is_cpu:  # nearly always, and no such device
        return False
    devices = foreach_devices()
    return all(p.device.type in devices and is_plain_parameter(p) for p in params)


def by_kind(lists: Lists) -> Iterator[Lists]:
    """The lists, split by device and dtype of the parameters."""
    grouped: TorchFunction = _torch.group_tensors_by_device_and_dtype
    kinds = grouped(list(lists.values()), False)
    for parts, _ in kinds.values():
        yield dict(zip(lists, parts, strict=True))


def as_real(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Views of complex tensors as their real and imaginary parts; None stays None."""
    return tuple(None if t is None else torch.view_as_real(t) for t in tensors)


def _all_real(lists: Lists) -> Lists:
    if not lists["params"][0].is_complex():
        return lists
    return {name: ts if name == "step" else list(as_real(*ts)) for name, ts in lists.items()}
