"""Optimizer: parameter groups, state and hooks, as `torch.optim.Optimizer`."""

import abc
import dataclasses
import functools
import itertools
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from operator import attrgetter
from types import NoneType
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from .._types import Args, Kwargs
from ..accumulate import grad_of
from ..modules.hooks import add
from ..modules.module import clear_grad
from ..parameter import Parameter

__all__ = ["Optimizer", "ParamsT"]

_P = ParamSpec("_P")
R = TypeVar("R")
Options: TypeAlias = dict[str, Any]  # of a group
StateDict: TypeAlias = dict[str, Any]
_DictHook: TypeAlias = Callable[["Optimizer", StateDict], StateDict | None]
ParamsT: TypeAlias = Iterable[torch.Tensor] | Iterable[Options] | Iterable[tuple[str, torch.Tensor]]

_HOOK_REGISTRIES = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


@dataclasses.dataclass(slots=True)
class KeptState:
    """The state of an optimiser, by parameter.

    As long as it was not read, nobody else has its tensors, and a step need not check that they are
    as it left them. A wrapper that takes over the attributes of an optimiser shares this object.
    """

    by_param: defaultdict[torch.Tensor, Any]
    was_read: bool = False


class Optimizer(metaclass=abc.ABCMeta):  # for those of torch.optim, which are no subclasses
    """Base class of the optimisers: `params` in groups, each with its options.

    `params` is an iterable of tensors, of `(name, tensor)` pairs, or of dicts with such an iterable
    under "params" and options for that group.

    Those of `torch.optim` count as its instances: they work on mirrored parameters.
    """

    OptimizerPreHook: TypeAlias = Callable[[Self, Args, Kwargs], tuple[Args, Kwargs] | None]  # type: ignore[misc]
    OptimizerPostHook: TypeAlias = Callable[[Self, Args, Kwargs], None]  # type: ignore[misc]

    _optimizer_step_pre_hooks: OrderedDict[int, OptimizerPreHook]
    _optimizer_step_post_hooks: OrderedDict[int, OptimizerPostHook]
    _optimizer_state_dict_pre_hooks: OrderedDict[int, Callable[["Optimizer"], None]]
    _optimizer_state_dict_post_hooks: OrderedDict[int, _DictHook]
    _optimizer_load_state_dict_pre_hooks: OrderedDict[int, _DictHook]
    _optimizer_load_state_dict_post_hooks: OrderedDict[int, Callable[["Optimizer"], None]]

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        # Recognized by name, as torch.optim is not imported.
        theirs = cls is Optimizer and any(
            (base.__module__, base.__name__) == ("torch.optim.optimizer", "Optimizer")
            for base in other.__mro__
        )
        return True if theirs else NotImplemented

    def __init__(self, params: ParamsT, defaults: Options) -> None:
        self.defaults = defaults
        for name in _HOOK_REGISTRIES:
            setattr(self, name, OrderedDict())
        self._patch_step_function()
        if isinstance(params, torch.Tensor):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Tensors or dicts,"
                f" but got {torch.typename(params)}"
            )
        self._kept_state = KeptState(defaultdict(dict))
        self.param_groups: list[Options] = []
        groups: list[Any] = list(params)
        if not groups:
            raise ValueError("optimizer got an empty parameter list")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """What is kept for each parameter, by parameter."""
        self._take_state_in()
        try:
            kept = self._kept_state
        except AttributeError:
            name = type(self).__name__
            raise AttributeError(f"'{name}' object has no attribute 'state'") from None
        kept.was_read = True
        return kept.by_param

    @state.setter
    def state(self, state: defaultdict[torch.Tensor, Any]) -> None:
        self._kept_state = KeptState(state, was_read=True)

    def _take_state_in(self) -> None:
        """A state that was put into `__dict__`, as the `__setstate__` of a subclass may do."""
        if "state" in self.__dict__:
            self.state = self.__dict__.pop("state")

    # -- groups ------------------------------------------------------------------------------

    def add_param_group(self, param_group: Options) -> None:
        """Add a group: {"params": ..., and options that differ from the defaults}."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params = param_group["params"]
        if isinstance(params, torch.Tensor):
            params = [params]
        elif isinstance(params, set):
            raise TypeError(
                "optimizer parameters need to be organized in ordered collections, but the"
                " ordering of tensors in sets will change between runs. Please use a list instead."
            )
        params = list(params)
        names = [p[0] for p in params if isinstance(p, tuple)]
        param_group["params"] = params = [p[1] if isinstance(p, tuple) else p for p in params]
        if names:
            if len(names) != len(params):
                raise ValueError(
                    "all optimizer params should be with/without names. Some param names are"
                    " missing"
                )
            param_group["param_names"] = names
        for param in params:
            if not isinstance(param, torch.Tensor):
                raise TypeError(
                    "optimizer can only optimize Tensors, but one of the params is "
                    + torch.typename(param)
                )
            if not self.defaults.get("differentiable", None) and not (
                param.is_leaf or param.retains_grad
            ):
                raise ValueError("can't optimize a non-leaf Tensor")
        for name, default in self.defaults.items():
            param_group.setdefault(name, default)
        ids = {id(p) for p in params}
        if len(ids) != len(params):
            warnings.warn(
                "optimizer contains a parameter group with duplicate parameters; in future, this"
                " will cause an error; see github.com/pytorch/pytorch/issues/40967 for more"
                " information",
                stacklevel=3,
            )
        for group in self.param_groups:
            if ("param_names" in param_group) != ("param_names" in group):
                kind = "with names" if "param_names" in param_group else "without names"
                raise ValueError(
                    "all optimizer param groups should be with/without names. cannot add param"
                    f" group {kind} to the optimizer"
                )
            if not ids.isdisjoint(id(p) for p in group["params"]):
                raise ValueError("some parameters appear in more than one parameter group")
        self.param_groups.append(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the parameters' gradients to None, or to zero."""
        for group in self.param_groups:
            for param in group["params"]:
                if set_to_none and type(param) is Parameter:
                    param._gradient = None
                else:
                    clear_grad(param, set_to_none)

    # -- stepping ----------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters; `closure`, if given, computes the loss anew first."""
        raise NotImplementedError

    def _patch_step_function(self) -> None:
        """Make the class's `step` call the step hooks, whichever subclass defines it.

        Wrappers that do not call `Optimizer.__init__` call this.
        """
        cls = type(self)
        if not getattr(cls.step, "hooked", None):
            cls.step = self.profile_hook_step(cls.step)  # type: ignore[method-assign]
            cls.step.hooked = True  # type: ignore[attr-defined]

    @staticmethod
    def profile_hook_step(func: Callable[_P, R]) -> Callable[_P, R]:
        """`func`, a `step`, with the step hooks before and after it."""

        @functools.wraps(func)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> R:
            self: Any = args[0]
            pre_hooks = self._optimizer_step_pre_hooks
            for pre_hook in tuple(pre_hooks.values()) if pre_hooks else ():
                result = pre_hook(self, args, kwargs)
                if result is None:
                    continue
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise RuntimeError(
                        f"{func} must return None or a tuple of (new_args, new_kwargs), but got"
                        f" {result}."
                    )
                args, kwargs = result
            out = func(*args, **kwargs)
            post_hooks = self._optimizer_step_post_hooks
            for post_hook in tuple(post_hooks.values()) if post_hooks else ():
                post_hook(self, args, kwargs)
            return out

        return wrapper

    # -- hooks -------------------------------------------------------------------------------

    def register_step_pre_hook(self, hook: OptimizerPreHook) -> RemovableHandle:
        """`hook(optimizer, args, kwargs)` runs before step; may return new arguments."""
        return add(self._optimizer_step_pre_hooks, hook)

    def register_step_post_hook(self, hook: OptimizerPostHook) -> RemovableHandle:
        """`hook(optimizer, args, kwargs)` runs after step."""
        return add(self._optimizer_step_post_hooks, hook)

    def register_state_dict_pre_hook(
        self, hook: Callable[["Optimizer"], None], prepend: bool = False
    ) -> RemovableHandle:
        """`hook(optimizer)` runs before state_dict."""
        return add(self._optimizer_state_dict_pre_hooks, hook, prepend)

    def register_state_dict_post_hook(
        self,
        hook: _DictHook,
        prepend: bool = False,
    ) -> RemovableHandle:
        """`hook(optimizer, state_dict)` runs after state_dict; may return another."""
        return add(self._optimizer_state_dict_post_hooks, hook, prepend)

    def register_load_state_dict_pre_hook(
        self,
        hook: _DictHook,
        prepend: bool = False,
    ) -> RemovableHandle:
        """`hook(optimizer, state_dict)` runs before load_state_dict; may return another."""
        return add(self._optimizer_load_state_dict_pre_hooks, hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Callable[["Optimizer"], None], prepend: bool = False
    ) -> RemovableHandle:
        """`hook(optimizer)` runs after load_state_dict."""
        return add(self._optimizer_load_state_dict_post_hooks, hook, prepend)

    # -- state -------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """The state and the groups, with parameters as indices; torch.optim can load it too."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        numbers: dict[int, int] = {}
        groups = []
        start = 0
        for group in self.param_groups:
            # A parameter that is twice in a group has its later index there.
            numbers = {id(p): i for i, p in enumerate(group["params"], start)} | numbers
            packed = {k: v for k, v in group.items() if k != "params"}
            packed["params"] = [numbers[id(p)] for p in group["params"]]
            start += len(packed["params"])
            groups.append(packed)
        state = {
            numbers[id(k)] if isinstance(k, torch.Tensor) else k: v for k, v in self.state.items()
        }
        result: StateDict = {"state": state, "param_groups": groups}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, result)
            if replaced is not None:
                result = replaced
        return result

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state_dict of this optimiser or of its torch.optim original.

        State tensors are cast to the dtype and device of their parameters.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        saved = deepcopy(state_dict["param_groups"])
        groups = self.param_groups
        if len(groups) != len(saved):
            raise ValueError("loaded state dict has a different number of parameter groups")
        if any(len(g["params"]) != len(s["params"]) for g, s in zip(groups, saved, strict=True)):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of"
                " optimizer's group"
            )
        params: dict[object, torch.Tensor] = {}
        options: dict[object, Options] = {}
        for group, new in zip(groups, saved, strict=True):
            for number, param in zip(new["params"], group["params"], strict=True):
                params[number] = param
                options.setdefault(number, new)
        state: defaultdict[object, object] = defaultdict(dict)
        for key, value in state_dict["state"].items():
            if key in params:
                state[params[key]] = _cast(value, params[key], options[key])
            else:
                state[key] = value
        for group, new in zip(groups, saved, strict=True):
            new["params"] = group["params"]
            if "param_names" in group and "param_names" not in new:
                new["param_names"] = group["param_names"]
        self.__setstate__({"state": state, "param_groups": saved})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> StateDict:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "param_groups": self.param_groups,
        }

    def __setstate__(self, state: StateDict) -> None:
        state = dict(state)
        if "state" in state:
            self.state = state.pop("state")
        self.__dict__.update(state)
        for name in _HOOK_REGISTRIES:
            self.__dict__.setdefault(name, OrderedDict())
        self._patch_step_function()
        self.defaults.setdefault("differentiable", False)

    def __repr__(self) -> str:
        text = type(self).__name__ + " ("
        for i, group in enumerate(self.param_groups):
            text += f"\nParameter Group {i}\n"
            for key in sorted(group):
                if key != "params":
                    text += f"    {key}: {group[key]}\n"
        return text + ")"


def _cast(value: object, param: torch.Tensor, options: Options, key: object = None) -> object:
    """A copy of a saved state value, its tensors on the parameter's device and dtype."""
    if isinstance(value, torch.Tensor):
        if key == "step":  # a counter: float32 if a kernel reads it, else unchanged
            if options.get("capturable") or options.get("fused"):
                return value.to(dtype=torch.float32, device=param.device)
            return value
        if param.is_floating_point():
            return value.to(dtype=param.dtype, device=param.device)
        return value.to(device=param.device)
    if isinstance(value, dict):
        return {k: _cast(v, param, options, k) for k, v in value.items()}
    if isinstance(value, Iterable):
        return type(value)(_cast(v, param, options) for v in value)  # type: ignore[call-arg]
    return value


def with_grads(
    params: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Those of the parameters that have a gradient, and the gradients."""
    grads: list[Any]  # with None for those without
    try:
        grads = [*map(_gradient, params)]
    except AttributeError:  # of a tensor of torch's own
        grads = [*map(grad_of, params)]
    if NoneType in map(type, grads):
        has_grad = [grad is not None for grad in grads]
        params, grads = [[*itertools.compress(of, has_grad)] for of in (params, grads)]
    return params, grads


_gradient = attrgetter("_gradient")


def evaluate(closure: Callable[[], R] | None) -> R | None:
    """The loss from `closure`, with grad mode on even if `step` is called with it off."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
