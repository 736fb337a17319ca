"""The hooks of modules: their registries, and the call that fires them.

Order, arguments and what a return value replaces are PyTorch's. Backward hooks are attached to two
boundaries, recorded calls that return their inputs unchanged: one before forward, whose gradients
are the module's grad_input, and one after it, for grad_output.
"""

import functools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from .._versions import SINCE_2_14
from ..grad_mode import is_grad_enabled
from ..node import Node
from ..operation import Operation
from ..tape import record
from .explicit import Traced

if TYPE_CHECKING:
    from . import module as _module

V = TypeVar("V")
Grads: TypeAlias = tuple[torch.Tensor | None, ...]
Hook: TypeAlias = Callable[..., Any]
Registry: TypeAlias = dict[int, Hook]

# Hooks common to all modules.
_global_buffer_registration_hooks: Registry = OrderedDict()
_global_module_registration_hooks: Registry = OrderedDict()
_global_parameter_registration_hooks: Registry = OrderedDict()
_global_backward_pre_hooks: Registry = OrderedDict()
_global_backward_hooks: Registry = OrderedDict()
_global_is_full_backward_hook: bool | None = None  # None until the first is registered
_global_forward_pre_hooks: Registry = OrderedDict()
_global_forward_hooks: Registry = OrderedDict()
_global_forward_hooks_always_called: dict[int, bool] = OrderedDict()
_global_forward_hooks_with_kwargs: dict[int, bool] = OrderedDict()


MIXED = (
    "Cannot use both regular backward hooks and full backward hooks {}. Please use only one of"
    " them."
)


def add(
    registry: Registry,
    hook: Hook,
    prepend: bool = False,
    flags: dict[str, tuple[dict[int, bool], bool]] | None = None,
) -> RemovableHandle:
    """Register `hook`, and its id in the registry of each flag that is set."""
    registries = [flag for flag, _ in flags.values()] if flags else None
    handle = RemovableHandle(registry, extra_dict=registries)
    registry[handle.id] = hook
    for flag, value in flags.values() if flags else ():
        if value:
            flag[handle.id] = True
    if prepend:
        registry.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    return handle


def registered(registry: Registry, module: "_module.Module", name: str, value: V) -> V:
    """`value` after the registration hooks."""
    for hook in registry.values():
        result = hook(module, name, value)
        if result is not None:
            value = result
    return value


def register_module_buffer_registration_hook(hook: Callable[..., None]) -> RemovableHandle:
    """`hook(module, name, buffer)` runs when any module registers a buffer."""
    return add(_global_buffer_registration_hooks, hook)


def register_module_module_registration_hook(hook: Callable[..., None]) -> RemovableHandle:
    """`hook(module, name, submodule)` runs when any module registers a child."""
    return add(_global_module_registration_hooks, hook)


def register_module_parameter_registration_hook(hook: Callable[..., None]) -> RemovableHandle:
    """`hook(module, name, param)` runs when any module registers a parameter."""
    return add(_global_parameter_registration_hooks, hook)


def register_module_forward_pre_hook(hook: Callable[..., None]) -> RemovableHandle:
    """A forward pre-hook for all modules."""
    return add(_global_forward_pre_hooks, hook)


def register_module_forward_hook(
    hook: Callable[..., None], *, with_kwargs: bool = False, always_call: bool = False
) -> RemovableHandle:
    """A forward hook for all modules."""
    return add(
        _global_forward_hooks,
        hook,
        flags={
            "with_kwargs": (_global_forward_hooks_with_kwargs, with_kwargs),
            "always_call": (_global_forward_hooks_always_called, always_call),
        },
    )


def _add_global_backward(hook: Hook, full: bool) -> RemovableHandle:
    global _global_is_full_backward_hook
    if _global_is_full_backward_hook is (not full):
        raise RuntimeError(MIXED.format("as a global Module hook"))
    _global_is_full_backward_hook = full
    return add(_global_backward_hooks, hook)


def register_module_backward_hook(hook: Hook) -> RemovableHandle:
    """Deprecated: a legacy backward hook for all modules."""
    return _add_global_backward(hook, False)


def register_module_full_backward_pre_hook(hook: Hook) -> RemovableHandle:
    """A full backward pre-hook for all modules."""
    return add(_global_backward_pre_hooks, hook)


def register_module_full_backward_hook(hook: Hook) -> RemovableHandle:
    """A full backward hook for all modules."""
    return _add_global_backward(hook, True)


class BoundHook:
    """A hook with the module it belongs to as its first argument, held weakly."""

    def __init__(self, hook: Hook, module: "_module.Module | None" = None) -> None:
        self.hook = hook
        functools.update_wrapper(self, hook)
        self.with_module = module is not None
        if module is not None:
            self.module: weakref.ref[_module.Module] = weakref.ref(module)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        if not self.with_module:
            return self.hook(*args, **kwargs)
        module = self.module()
        if module is None:
            raise RuntimeError("You are trying to call the hook of a dead Module!")
        return self.hook(module, *args, **kwargs)

    def __getstate__(self) -> dict[str, object]:
        state: dict[str, object] = {"hook": self.hook, "with_module": self.with_module}
        if self.with_module:
            state["module"] = self.module()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.hook = state["hook"]
        self.with_module = state["with_module"]
        if self.with_module:
            if state["module"] is None:
                raise RuntimeError("You are trying to revive the hook of a dead Module!")
            self.module = weakref.ref(state["module"])


# -- the call --------------------------------------------------------------------------


def call_with_hooks(
    module: "_module.Module", args: tuple[object, ...], kwargs: dict[str, object]
) -> Any:
    """`module.forward(*args, **kwargs)` with every hook around it."""
    state = _Call(module, args, kwargs)
    try:
        return state.run()
    except Exception:
        state.run_always_called()
        raise


class _Call:
    def __init__(
        self, module: "_module.Module", args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.result: Any = None
        self.called: set[int] = set()

    def run(self) -> Any:
        module = self.module
        self._run_pre_hooks()
        full, legacy = _backward_hooks(module)
        pre = [*_global_backward_pre_hooks.values(), *module._backward_pre_hooks.values()]
        boundary, given = None, self.args
        if full or pre:
            boundary = _Boundary(module, full, pre)
            self.args = boundary.before(self.args)
        made = self.result = module.forward(*self.args, **self.kwargs)
        for hook_id, hook in (
            *_global_forward_hooks.items(),
            *module._forward_hooks.items(),
        ):
            self.called.add(hook_id)
            self._run_forward_hook(hook_id, hook)
        if boundary is not None:
            if not isinstance(self.result, torch.Tensor | tuple):
                warnings.warn(
                    "For backward hooks to be called, module output should be a Tensor or a tuple"
                    f" of Tensors but received {type(self.result)}",
                    stacklevel=4,
                )
            self.result = boundary.after(self.result)
        if legacy:
            self._add_legacy_hooks(legacy)
        if self.result is not made or boundary is not None:
            # Module.backward has to start from what the caller sees.
            # A boundary's node refers to the module, which must not keep it alive.
            weakly = boundary is not None
            module.__dict__["_call"] = (
                Traced(given, self.result, weakly) if is_grad_enabled() else None
            )
        return self.result

    def _run_pre_hooks(self) -> None:
        module = self.module
        for hook_id, hook in (
            *_global_forward_pre_hooks.items(),
            *module._forward_pre_hooks.items(),
        ):
            if hook_id not in module._forward_pre_hooks_with_kwargs:
                result = hook(module, self.args)
                if result is not None:
                    self.args = result if isinstance(result, tuple) else (result,)
                continue
            result = hook(module, self.args, self.kwargs)
            if result is None:
                continue
            if not (isinstance(result, tuple) and len(result) == 2):
                raise RuntimeError(
                    "forward pre-hook must return None or a tuple of (new_args, new_kwargs), but"
                    f" got {result}."
                )
            self.args, self.kwargs = result

    def _run_forward_hook(self, hook_id: int, hook: Hook) -> None:
        module = self.module
        with_kwargs = (
            hook_id in module._forward_hooks_with_kwargs
            or hook_id in _global_forward_hooks_with_kwargs
        )
        args = (self.args, self.kwargs) if with_kwargs else (self.args,)
        result = hook(module, *args, self.result)
        if result is not None:
            self.result = result

    def run_always_called(self) -> None:
        """After an exception: the hooks with `always_call` that have not run."""
        module = self.module
        always = {
            **_global_forward_hooks_always_called,
            **module._forward_hooks_always_called,
        }
        for kind, registry in (
            ("global module", _global_forward_hooks),
            ("module", module._forward_hooks),
        ):
            for hook_id, hook in registry.items():
                if hook_id not in always or hook_id in self.called:
                    continue
                try:
                    self._run_forward_hook(hook_id, hook)
                except Exception as e:
                    warnings.warn(
                        f"{kind} forward hook with ``always_call=True`` raised an exception that"
                        f" was silenced as another error was raised in forward: {e}",
                        stacklevel=4,
                    )

    def _add_legacy_hooks(self, legacy: list[Hook]) -> None:
        found = self.result
        while not isinstance(found, torch.Tensor):
            if isinstance(found, dict):
                found = next(v for v in found.values() if isinstance(v, torch.Tensor))
            else:
                found = found[0]
        node: Any = found.grad_fn
        if node is None:
            return
        for hook in legacy:
            node.register_hook(BoundHook(hook, self.module))
        _warn_of_legacy_hook(self.args, self.result, node)


def _backward_hooks(module: "_module.Module") -> tuple[list[Hook], list[Hook]]:
    """The full and the legacy backward hooks for `module`."""
    full: list[Hook] = []
    legacy: list[Hook] = []
    if _global_is_full_backward_hook is not None:
        kind = full if _global_is_full_backward_hook else legacy
        kind.extend(_global_backward_hooks.values())
    if module._is_full_backward_hook is not None:
        kind = full if module._is_full_backward_hook else legacy
        kind.extend(module._backward_hooks.values())
    return full, legacy


class _BoundaryFunction(Operation):
    """Returns its inputs, and passes the gradients back: a node that hooks are attached to."""

    @staticmethod
    def forward(ctx: Node, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        passed = tuple([t.view_as(t) for t in tensors])
        needs = ctx.needs_input_grad
        ctx.mark_non_differentiable(*[t for t, n in zip(passed, needs, strict=True) if not n])
        return passed

    @staticmethod
    def backward(ctx: Node, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return grads

    @classmethod
    def node_name(cls) -> str:
        return "BackwardHookFunctionBackward"


class _Boundary:
    """The full backward hooks of one call of a module."""

    def __init__(self, module: "_module.Module", hooks: list[Hook], pre_hooks: list[Hook]) -> None:
        self.module = module
        self.hooks = hooks
        self.pre_hooks = pre_hooks
        self.grad_outputs: Grads | None = None
        self.inputs = self.outputs = 0  # the number of outputs
        self.input_places: list[int] | None = None
        self.output_places: list[int] | None = None

    def before(self, args: tuple[object, ...]) -> tuple[object, ...]:
        def stand_at(node: Node) -> None:
            node.register_hook(self._on_grad_input)

        args, self.input_places = _pass_through(args, stand_at)
        self.inputs = len(args)
        return args

    def after(self, result: Any) -> Any:
        def stand_at(node: Node) -> None:
            node.register_hook(self._on_grad_output)

        single = not isinstance(result, tuple)
        outputs, self.output_places = _pass_through((result,) if single else result, stand_at)
        self.outputs = len(outputs)
        return outputs[0] if single else outputs

    def _on_grad_input(self, grads: Grads, _: Grads) -> Grads | None:
        if self.grad_outputs is None:
            # The input got a gradient that did not pass through the output: do not call the hooks.
            return None
        grad_input = _spread(self.input_places, grads, self.inputs)
        for hook in self.hooks:
            result = hook(self.module, grad_input, self.grad_outputs)
            if result is None:
                continue
            if len(result) != len(grad_input):
                raise RuntimeError(
                    "Backward hook returned an invalid number of grad_input, got"
                    f" {len(result)}, but expected {len(grad_input)}"
                )
            grad_input = result
        self.grad_outputs = None
        return tuple(grad_input[i] for i in self.input_places or ())

    def _on_grad_output(self, _: Grads, grads: Grads) -> Grads:
        self.grad_outputs = _spread(self.output_places, grads, self.outputs)
        for hook in self.pre_hooks:
            result = hook(self.module, self.grad_outputs)
            if result is None:
                continue
            if len(result) != len(self.grad_outputs):
                raise RuntimeError(
                    "Backward pre hook returned an invalid number of grad_output, got"
                    f" {len(result)}, but expected {len(self.grad_outputs)}"
                )
            self.grad_outputs = result
        grad_outputs = self.grad_outputs
        if self.input_places is None and (self.hooks or not SINCE_2_14):
            self._fire_without_inputs()  # before 2.14, PyTorch warns even without a hook
        return tuple(grad_outputs[i] for i in self.output_places or ())

    def _fire_without_inputs(self) -> None:
        """Call the hooks without grad_input, as no input requires grad."""
        warnings.warn(
            "Full backward hook is firing when gradients are computed with respect to module"
            " outputs since no inputs require gradients. See"
            " https://docs.pytorch.org/docs/main/generated/torch.nn.Module.html"
            "#torch.nn.Module.register_full_backward_hook for more details.",
            stacklevel=5,
        )
        for hook in self.hooks:
            result = hook(self.module, (None,) * self.inputs, self.grad_outputs)
            if result is not None and not (
                isinstance(result, tuple) and all(r is None for r in result)
            ):
                raise RuntimeError(
                    "Backward hook for Modules where no input requires gradient should always"
                    " return None or None for all gradients."
                )
        self.grad_outputs = None


def _spread(places: list[int] | None, values: Grads, count: int) -> Grads:
    spread: list[torch.Tensor | None] = [None] * count
    for place, value in zip(places or (), values, strict=False):
        spread[place] = value
    return tuple(spread)


def _pass_through(
    args: tuple[Any, ...], stand_at: Callable[[Node], None]
) -> tuple[tuple[Any, ...], list[int] | None]:
    """Pass the tensors among `args` through a boundary; their places, if any was tracked."""
    places = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    if not (is_grad_enabled() and any(args[i].requires_grad for i in places)):
        return args, None
    passed = record(_BoundaryFunction, tuple([args[i] for i in places]))[0]
    stand_at(next(t.grad_fn for t in passed if t.requires_grad))
    new = list(args)
    for place, tensor in zip(places, passed, strict=True):
        new[place] = tensor
    return tuple(new) if type(args) is tuple else type(args)(*new), places


def _warn_of_legacy_hook(inputs: object, result: object, node: Node) -> None:
    """PyTorch's four warnings about what a legacy hook does not see."""
    start = "Using a non-full backward hook when "
    end = " is deprecated and will be removed in future versions. This hook will be missing some "
    full = " Please use register_full_backward_hook to get the documented behavior."
    results = (result,) if isinstance(result, torch.Tensor) else result
    given = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    message = None
    if not (isinstance(results, tuple) and all(isinstance(r, torch.Tensor) for r in results)):
        message = (
            "Using non-full backward hooks on a Module that does not return a single Tensor or a"
            f" tuple of Tensors{end}of the grad_output.{full}"
        )
    elif not (isinstance(given, tuple) and all(isinstance(i, torch.Tensor) for i in given)):
        message = (
            "Using non-full backward hooks on a Module that does not take as input a single Tensor"
            f" or a tuple of Tensors{end}of the grad_input.{full}"
        )
    else:
        made_by = {r.grad_fn for r in results if r.grad_fn is not None}
        if not made_by or (len(made_by) == 1 and node not in made_by):
            message = f"{start}outputs are nested in python data structure{end}grad_output."
        elif len(made_by) > 1:
            message = (
                f"{start}outputs are generated by different autograd Nodes{end}grad_output.{full}"
            )
        else:
            leading = {i.grad_fn for i in given if i.grad_fn is not None}
            if leading != {edge[0] for edge in node.next_functions}:
                message = (
                    f"{start}the forward contains multiple autograd Nodes{end}grad_input.{full}"
                )
    if message is not None:
        warnings.warn(message, FutureWarning, stacklevel=5)
