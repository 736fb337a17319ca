"""Module: the base class, as `torch.nn.Module`.

Registration, traversal, state and hooks follow PyTorch's, including the names of the private
registries, which scripts and libraries use. The mirror adds `backward` and `param`, for driving a
net layer by layer.
"""

import functools
import inspect
import os
import sys
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from types import FrameType
from typing import (
    TYPE_CHECKING,
    Any,
    NoReturn,
    Optional,
    Self,
    TypeAlias,
    TypeGuard,
    TypeVar,
    Union,
    overload,
)

import torch
from torch import Tensor, device, dtype
from torch.types import Device
from torch.utils.hooks import RemovableHandle

from .. import _torch, tape
from .._state import sequence as _sequence
from .._torch import DisableTorchFunctionSubclass
from .._types import TorchFunction
from .._upcalls import upcall
from ..grad_mode import no_grad_at_all
from ..node import Node
from ..parameter import Buffer, Parameter, is_lazy
from ..tensor import C_shape
from ..walk import unrecorded
from . import hooks
from .explicit import Call, Gradient, Traced, way_back
from .hooks import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_buffer_registration_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_module_registration_hooks,
    _global_parameter_registration_hooks,
    register_module_backward_hook,
    register_module_buffer_registration_hook,
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = [
    "Module",
    "register_module_backward_hook",
    "register_module_buffer_registration_hook",
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
    "register_module_module_registration_hook",
    "register_module_parameter_registration_hook",
]

T = TypeVar("T", bound="Module")
F = TypeVar("F", bound=TorchFunction)
V = TypeVar("V")
_grad_t = tuple[Tensor, ...] | Tensor
_EXTRA_STATE = "_extra_state"
# Tensors by path, and extra state of any kind.
StateDict: TypeAlias = dict[str, Any]


# The registries of global hooks, and the names of a module's own registries.
GLOBAL_HOOKS = (
    _global_backward_pre_hooks,
    _global_backward_hooks,
    _global_forward_pre_hooks,
    _global_forward_hooks,
)
CALL_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")


class _IncompatibleKeys(namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])):
    """What `load_state_dict` returns."""

    __slots__ = ()

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return super().__repr__()

    __str__ = __repr__


def is_parameter(value: object) -> bool:
    # A torch.nn.Parameter in a mirrored module counts as a parameter too, and gets its gradient.
    return isinstance(value, Parameter) or (
        type(value).__module__ == "torch.nn.parameter" and (type(value).__name__ == "Parameter")
    )


def _is_torch_module(value: object) -> bool:
    return any(
        c.__name__ == "Module" and c.__module__ == "torch.nn.modules.module"
        for c in type(value).__mro__
    )


@upcall("nnmirror.adopt")
def become_mirrored(model: "torch.nn.Module") -> list[str]:
    """Make a torch.nn module a mirrored one, in place; or return the reasons against it."""
    raise NotImplementedError


@upcall("nnmirror.adopt")
def class_that_was(module: "Module") -> type | None:
    """The library's class of a module that was made mirrored in place."""
    raise NotImplementedError


@upcall("nnmirror.bridge")
def reduced(module: "Module", made: str | tuple[object, ...]) -> str | tuple[object, ...]:
    """What `module` is pickled as, given what any object of its class would be."""
    raise NotImplementedError


@upcall("nnmirror.adopt")
def is_being_made(module: object, frame: FrameType) -> bool:
    """Is one of the calling functions the `__init__` of this module?"""
    raise NotImplementedError


def _as_mirrored(value: Any, name: str) -> Any:
    """The torch.nn module `value`, about to be assigned, as a mirrored one."""
    problems = become_mirrored(value)
    if problems:
        raise TypeError(
            f"nnmirror: cannot assign '{torch.typename(value)}' as '{name}': a torch.nn module"
            " inside a mirrored one becomes mirrored as well, and this one cannot; nothing was"
            " changed:\n  " + "\n  ".join(problems) + "\nExchange what is named there, or take the"
            " outer one as nnmirror.to_torch(module)"
        )
    return value


def indent(text: str) -> str:
    first, *rest = text.split("\n")
    return "\n".join([first, *("  " + line if line.strip() else "" for line in rest)])


def _unimplemented(self, *input: Any) -> None:  # type: ignore[no-untyped-def]
    raise NotImplementedError(
        f'Module [{type(self).__name__}] is missing the required "forward" function'
    )


_unimplemented.__name__ = "_forward_unimplemented"


class _Untraceable:
    """Raises when torch.compile looks for its own mark on a mirrored module.

    torch.compile first compares this attribute of whatever it is given.
    """

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise NotImplementedError(
            "nnmirror: torch.compile cannot trace the mirror's tape; run the module as it is,"
            " or compile nnmirror.to_torch(module)"
        )


_TO_TORCH = "nnmirror.to_torch(module), which has the same weights"
_LEFT_OUT = (
    "a mirrored module inside one of torch.nn would be left out of parameters() and state_dict()."
    f" Take the outer one from nnmirror too, or give it {_TO_TORCH}"
)
# Functions that check whether their argument is a torch.nn.Module: name, file, and the error.
_ASKERS = {
    name: (os.path.join("torch", *file.split("/")), said)
    for name, file, said in (
        ("__init__", "nn/modules/container.py", _LEFT_OUT),
        ("_trace_impl", "jit/_trace.py", f"torch.jit.trace takes {_TO_TORCH}"),
        ("trace_module", "jit/_trace.py", f"torch.jit.trace_module takes {_TO_TORCH}"),
        ("trace", "fx/_symbolic_trace.py", f"torch.fx takes {_TO_TORCH}"),
        ("export", "export/__init__.py", f"torch.export.export takes {_TO_TORCH}"),
        (
            "update_bn",
            "optim/swa_utils.py",
            f"torch.optim.swa_utils.update_bn would update nothing; give it {_TO_TORCH}",
        ),
    )
}


_TAKERS = ("__setattr__", "add_module")  # methods of torch.nn.Module that register a module


def _let_in(module: object, frame: FrameType) -> None:
    """A mirrored module is assigned to a torch.nn module: that becomes mirrored, or a TypeError.

    `frame` is that of torch's function, which then continues with the mirrored module.
    """
    outer, name = frame.f_locals["self"], frame.f_locals["name"]
    why = _LEFT_OUT
    if not is_being_made(outer, frame):
        problems = become_mirrored(outer)
        if not problems:
            return
        why = (
            "with it the module that takes it would become mirrored as well, and that one cannot;"
            " nothing was changed:\n  " + "\n  ".join(problems) + "\nExchange what is named there,"
            f" or give it {_TO_TORCH}"
        )
    raise TypeError(f"nnmirror: cannot assign '{torch.typename(module)}' as '{name}': {why}")


class _RefusedByTorchModules:
    """Must not be an attribute of a `torch.nn.Module`, which would silently not train it.

    A torch.nn.Module that a library has made becomes mirrored itself (see adopt); one that is being
    made, or cannot become mirrored, raises.

    PyTorch's modules store anything that is not a `torch.nn.Module` as a plain attribute, so its
    parameters would be missing in `parameters()`. They check with isinstance, which reads
    `__class__`; so do functions that accept only a `torch.nn.Module`, whose own error would be less
    helpful.
    """

    def _class(self) -> type:
        frame = sys._getframe(1)
        code = frame.f_code
        if code.co_name in _TAKERS and code.co_filename.endswith(_TORCH_MODULE_FILE):
            _let_in(self, frame)
            return sys.modules["torch.nn"].Module  # type: ignore[attr-defined,no-any-return]
        if code.co_filename.endswith(_FUNCTIONAL_CALL):
            return sys.modules["torch.nn"].Module  # type: ignore[attr-defined,no-any-return]
        asker = _ASKERS.get(code.co_name)
        if asker is not None and code.co_filename.endswith(asker[0]):
            raise TypeError(f"nnmirror: {asker[1]}")
        if not code.co_filename.startswith((_TORCH, _MIRROR)):
            return class_that_was(self) or type(self)  # type: ignore[arg-type]
        return type(self)

    def _set_class(self, cls: type) -> None:
        object.__dict__["__class__"].__set__(self, cls)

    if not TYPE_CHECKING:  # it knows what `__class__` is
        __class__ = property(_class, _set_class)
    del _class, _set_class


_PARAMETRIZE = os.path.join("torch", "nn", "utils", "parametrize.py")


def _is_asked_by(name: str, file: str) -> bool:
    """Is the caller of the calling function this function of PyTorch's?"""
    frame = sys._getframe(2).f_back
    code = None if frame is None else frame.f_code
    return code is not None and code.co_name == name and code.co_filename.endswith(file)


# The class that torch.func.functional_call uses to exchange a module's tensors. It requires a
# torch.nn.Module, but uses only attributes that the mirror's has too.
_FUNCTIONAL_CALL = os.path.join("torch", "nn", "utils", "_named_member_accessor.py")
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_MIRROR = os.path.join(os.path.dirname(tape.__file__), "")
_TORCH_MODULE_FILE = os.path.join("torch", "nn", "modules", "module.py")


class Module(_RefusedByTorchModules):
    """Base class of all layers and nets, as `torch.nn.Module`.

    A subclass calls `super().__init__()`, assigns parameters and other modules as
    attributes, and defines `forward`. Then `module(x)`, and either `loss.backward()` or,
    layer by layer, `module.backward(dy)`.
    """

    dump_patches: bool = False
    _version: int = 1
    call_super_init: bool = False
    # The last call, which `backward` differentiates: set by each forward, not part of the state.
    _call: Node | Call | None = None
    _torchdynamo_orig_callable = _Untraceable()
    _torchdynamo_wrapper_id = _torchdynamo_orig_callable

    training: bool
    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, Tensor | None]
    _non_persistent_buffers_set: set[str]
    _backward_pre_hooks: dict[int, Callable]
    _backward_hooks: dict[int, Callable]
    _is_full_backward_hook: bool | None
    _forward_hooks: dict[int, Callable]
    _forward_hooks_with_kwargs: dict[int, bool]
    _forward_hooks_always_called: dict[int, bool]
    _forward_pre_hooks: dict[int, Callable]
    _forward_pre_hooks_with_kwargs: dict[int, bool]
    _state_dict_hooks: dict[int, Callable]
    _load_state_dict_pre_hooks: dict[int, Callable]
    _state_dict_pre_hooks: dict[int, Callable]
    _load_state_dict_post_hooks: dict[int, Callable]
    _modules: dict[str, Optional["Module"]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not self.call_super_init:
            name = type(self).__name__
            if kwargs:
                raise TypeError(
                    f"{name}.__init__() got an unexpected keyword argument '{next(iter(kwargs))}'"
                )
            if args:
                raise TypeError(
                    f"{name}.__init__() takes 1 positional argument but {len(args) + 1} were given"
                )
        # Without __setattr__, which needs the registries to exist.
        self.__dict__.update(
            training=True,
            _parameters={},
            _buffers={},
            _non_persistent_buffers_set=set(),
            _is_full_backward_hook=None,
            _modules={},
        )
        for name in _HOOK_REGISTRIES:
            self.__dict__[name] = OrderedDict()
        if self.call_super_init:
            super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward = cls.__dict__.get("forward")
        if inspect.isfunction(forward) and not getattr(forward, "_keeps_call", False):
            cls.forward = _keeping_call(forward)  # type: ignore[method-assign]

    forward: Callable[..., Any] = _unimplemented

    # -- the mirror's own: driving a module by hand --------------------------------------

    def backward(self, gradient: Gradient = None) -> Any:
        """The backward of the last `forward`: returns the gradient for the module's input.

        `gradient` is that of the output (a tensor, or a tuple for a tuple of outputs); it
        may be left out for a scalar. The parameters' `.grad` are accumulated.

        A mirrored layer, and a Sequential of them, always returns the gradient for its
        input. A module with a `forward` of its own returns it for those inputs that
        require grad, and None for the others, whose uses it cannot see.
        """
        call = way_back(self._call)
        if call is None or "forward" in self.__dict__:
            raise RuntimeError(
                f"nnmirror: {type(self).__name__}.backward() needs a forward call before it, made"
                " with grad mode on and through the class's own forward"
            )
        return call(gradient)

    def _call_for_chain(self) -> Call | None:
        """The backward of this module within a Sequential: its own `backward` if it defines one."""
        return way_back(self._call) if type(self).backward is Module.backward else self.backward

    def param(self) -> list[tuple[Parameter, Tensor | None]]:
        """Each parameter with its gradient (None where there is none yet)."""
        return [(p, p.grad) for p in self.parameters()]

    # -- registration ----------------------------------------------------------------------

    def _check_name(self, kind: str, registry: str, name: object) -> None:
        if registry not in self.__dict__:
            raise AttributeError(f"cannot assign {kind} before Module.__init__() call")
        if not isinstance(name, str):
            raise TypeError(f"{kind} name should be a string. Got {torch.typename(name)}")
        if "." in name:
            raise KeyError(f'{kind} name can\'t contain "."')
        if name == "":
            raise KeyError(f'{kind} name can\'t be empty string ""')
        if hasattr(self, name) and name not in self.__dict__[registry]:
            raise KeyError(f"attribute '{name}' already exists")

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a tensor that moves and is saved with the module but is not trained."""
        self._check_name("buffer", "_buffers", name)
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"cannot assign '{torch.typename(tensor)}' object to buffer '{name}' (torch Tensor"
                " or None required)"
            )
        self._buffers[name] = hooks.registered(
            _global_buffer_registration_hooks, self, name, tensor
        )
        if persistent:
            self._non_persistent_buffers_set.discard(name)
        else:
            self._non_persistent_buffers_set.add(name)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter under `name`."""
        self._check_name("parameter", "_parameters", name)
        if param is None:
            self._parameters[name] = None
            return
        if not is_parameter(param):
            raise TypeError(
                f"cannot assign '{torch.typename(param)}' object to parameter '{name}'"
                " (torch.nn.Parameter or None required)"
            )
        if param.grad_fn:
            raise ValueError(
                f"Cannot assign non-leaf Tensor to parameter '{name}'. Model parameters must be"
                f" created explicitly. To express '{name}' as a function of another Tensor,"
                " compute the value in the forward() method."
            )
        self._parameters[name] = hooks.registered(
            _global_parameter_registration_hooks, self, name, param
        )

    def add_module(self, name: str, module: Optional["Module"]) -> None:
        """Add a child module under `name`."""
        theirs = _is_torch_module(module)
        if not (theirs or isinstance(module, Module) or module is None):
            raise TypeError(f"{torch.typename(module)} is not a Module subclass")
        if not isinstance(name, str):
            raise TypeError(f"module name should be a string. Got {torch.typename(name)}")
        if hasattr(self, name) and name not in self._modules:
            raise KeyError(f"attribute '{name}' already exists")
        if "." in name:
            raise KeyError(f'module name can\'t contain ".", got: {name}')
        if name == "":
            raise KeyError('module name can\'t be empty string ""')
        if theirs:
            module = _as_mirrored(module, name)
        self._modules[name] = hooks.registered(
            _global_module_registration_hooks, self, name, module
        )

    def register_module(self, name: str, module: Optional["Module"]) -> None:
        """Another name of `add_module`."""
        self.add_module(name, module)

    # -- attributes ------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Union[Tensor, "Module"]:
        own = self.__dict__
        if "_modules" in own and name in (modules := own["_modules"]):
            return modules[name]  # type: ignore[no-any-return]
        if "_parameters" in own and name in (params := own["_parameters"]):
            return params[name]  # type: ignore[no-any-return]
        if "_buffers" in own and name in (buffers := own["_buffers"]):
            return buffers[name]  # type: ignore[no-any-return]
        if name == "parametrizations" and _is_asked_by("register_parametrization", _PARAMETRIZE):
            raise TypeError(f"nnmirror: torch.nn.utils.parametrize takes {_TO_TORCH}")
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value: Union[Tensor, "Module"]) -> None:
        own = self.__dict__
        params, modules, buffers = own.get("_parameters"), own.get("_modules"), own.get("_buffers")
        if is_parameter(value):
            if params is None:
                raise AttributeError("cannot assign parameters before Module.__init__() call")
            self._forget(name, "_buffers", "_modules")
            self.register_parameter(name, value)  # type: ignore[arg-type]
        elif params is not None and name in params:
            if value is not None:
                raise TypeError(
                    f"cannot assign '{torch.typename(value)}' as parameter '{name}'"
                    " (torch.nn.Parameter or None expected)"
                )
            self.register_parameter(name, value)
        elif isinstance(value, Module) or (
            not isinstance(value, torch.Tensor) and _is_torch_module(value)
        ):
            if modules is None:
                raise AttributeError("cannot assign module before Module.__init__() call")
            if not isinstance(value, Module):
                value = _as_mirrored(value, name)
            own.pop("_runs", None)  # it has a reference to the old one
            self._forget(name, "_parameters", "_buffers")
            modules[name] = hooks.registered(_global_module_registration_hooks, self, name, value)
        elif modules is not None and name in modules:
            own.pop("_runs", None)
            if value is not None:
                raise TypeError(
                    f"cannot assign '{torch.typename(value)}' as child module '{name}'"
                    " (torch.nn.Module or None expected)"
                )
            modules[name] = hooks.registered(_global_module_registration_hooks, self, name, value)
        elif isinstance(value, Buffer) or (buffers is not None and name in buffers):
            self._set_buffer(name, value)
        else:
            super().__setattr__(name, value)

    def _forget(self, name: str, *registries: str) -> None:
        """Remove `name` from the other registries."""
        for registry in (self.__dict__, *(self.__dict__[r] for r in registries)):
            registry.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def _set_buffer(self, name: str, value: object) -> None:
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"cannot assign '{torch.typename(value)}' as buffer '{name}' (torch.nn.Buffer,"
                " torch.Tensor or None expected)"
            )
        if isinstance(value, Buffer):
            persistent = value.persistent
        else:
            persistent = name not in self._non_persistent_buffers_set
        # A subclass may have a register_buffer without `persistent`.
        if "persistent" in inspect.signature(self.register_buffer).parameters:
            self.register_buffer(name, value, persistent)
        elif persistent:
            self.register_buffer(name, value)
        else:
            raise RuntimeError(
                "Registering a non-persistent buffer on a Module subclass that implements"
                " register_buffer() without the persistent argument is not allowed."
            )

    def __delattr__(self, name: str) -> None:
        for registry in (self._parameters, self._buffers, self._modules):
            if name in registry:
                self.__dict__.pop("_runs", None)
                del registry[name]
                if registry is self._buffers:
                    self._non_persistent_buffers_set.discard(name)
                return
        super().__delattr__(name)

    def __dir__(self) -> list[str]:
        names = [*dir(self.__class__), *self.__dict__]
        names += [*self._parameters, *self._modules, *self._buffers]
        return sorted(name for name in names if not name[0].isdigit())

    # -- looking things up -------------------------------------------------------------------

    def get_submodule(self, target: str) -> "Module":
        """The module at the dotted path `target`; self for an empty one."""
        module = self
        if target == "":
            return self
        for name in target.split("."):
            if not hasattr(module, name):
                raise AttributeError(f"{module._get_name()} has no attribute `{name}`")
            module = getattr(module, name)
            if not isinstance(module, Module):
                raise AttributeError(f"`{name}` is not an nn.Module")
        return module

    def set_submodule(self, target: str, module: "Module", strict: bool = False) -> None:
        """Put `module` at the dotted path `target`; with `strict`, only in place of another."""
        if target == "":
            raise ValueError("Cannot set the submodule without a target name!")
        if not isinstance(module, Module):
            raise ValueError(f"`module` is not an nn.Module, found {type(module)}")
        path, _, name = target.rpartition(".")
        parent = self.get_submodule(path) if "." in target else self
        if strict and not hasattr(parent, name):
            raise AttributeError(f"{parent._get_name()} has no attribute `{name}`")
        if hasattr(parent, name) and not isinstance(getattr(parent, name), Module):
            raise AttributeError(f"`{name}` is not an nn.Module")
        setattr(parent, name, module)

    def _get_member(self, target: str) -> tuple["Module", str, Any]:
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        if not hasattr(module, name):
            raise AttributeError(f"{module._get_name()} has no attribute `{name}`")
        return module, name, getattr(module, name)

    def get_parameter(self, target: str) -> Parameter:
        """The parameter at the dotted path `target`."""
        _, name, param = self._get_member(target)
        if not is_parameter(param):
            raise AttributeError(f"`{name}` is not an nn.Parameter")
        return param

    def get_buffer(self, target: str) -> Tensor:
        """The buffer at the dotted path `target`."""
        module, name, buffer = self._get_member(target)
        if name not in module._buffers:
            raise AttributeError(f"`{name}` is not a buffer")
        return buffer

    # -- traversal ---------------------------------------------------------------------------

    def named_modules(  # type: ignore[no-untyped-def]
        self, memo: set["Module"] | None = None, prefix: str = "", remove_duplicate: bool = True
    ):
        """This module and all below it, with their paths."""
        if memo is None:
            memo = set()
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                path = prefix + ("." if prefix else "") + name
                yield from module.named_modules(memo, path, remove_duplicate)

    def modules(self, remove_duplicate: bool = True) -> Iterator["Module"]:
        """This module and all below it."""
        for _, module in self.named_modules(remove_duplicate=remove_duplicate):
            yield module

    def named_children(self) -> Iterator[tuple[str, "Module"]]:
        """The modules directly below this one, with their names."""
        memo = set()
        for name, module in self._modules.items():
            if module is not None and module not in memo:
                memo.add(module)
                yield name, module

    def children(self) -> Iterator["Module"]:
        """The modules directly below this one."""
        for _, module in self.named_children():
            yield module

    def _named_members(
        self,
        get_members_fn: Callable[["Module"], Iterable[tuple[str, V | None]]],
        prefix: str = "",
        recurse: bool = True,
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, V]]:
        memo = set()
        modules = (
            self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)
            if recurse
            else [(prefix, self)]
        )
        for path, module in modules:
            for name, value in get_members_fn(module):
                if value is None or id(value) in memo:
                    continue
                if remove_duplicate:
                    memo.add(id(value))
                yield path + ("." if path else "") + name, value

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """The parameters, with their paths."""
        yield from self._named_members(
            lambda module: module._parameters.items(), prefix, recurse, remove_duplicate
        )

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """The parameters."""
        if not (recurse and _names_as_usual(self)):
            for _, param in self.named_parameters(recurse=recurse):
                yield param
            return
        seen = set()
        for module in _unnamed_modules(self):  # the same
            for value in module._parameters.values():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    yield value

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The buffers, with their paths."""
        yield from self._named_members(
            lambda module: module._buffers.items(), prefix, recurse, remove_duplicate
        )

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """The buffers."""
        for _, buffer in self.named_buffers(recurse=recurse):
            yield buffer

    # -- changing the whole tree -------------------------------------------------------------

    def apply(self, fn: Callable[["Module"], None]) -> Self:
        """Call `fn` on each module below this one, then on this one."""
        for module in self.children():
            module.apply(fn)
        fn(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Pass every parameter, gradient and buffer through `fn`.

        A parameter stays the same object, with new data, where torch allows it.
        """
        if recurse:
            for module in self.children():
                module._apply(fn)
        keep_identity = not torch.__future__.get_overwrite_module_params_on_conversion()
        swap = torch.__future__.get_swap_module_params_on_conversion()
        for key, param in self._parameters.items():
            if param is None:
                continue
            with no_grad_at_all():
                moved = fn(param)
                grad = param.grad
                moved_grad = None if grad is None else fn(grad)
            if swap:
                param.grad = None
                new = type(param)(moved, requires_grad=param.requires_grad)
                try:
                    torch.utils.swap_tensors(param, new)
                except Exception as e:
                    param.grad = grad
                    raise RuntimeError(f"_apply(): Couldn't swap {self._get_name()}.{key}") from e
                for one in (param, new):
                    if isinstance(one, Parameter):
                        one._is_swapped()
                param.grad = moved_grad
            elif keep_identity and _torch.has_compatible_shallow_copy_type(param, moved):
                param.data = moved
                if grad is not None and moved_grad is not None:
                    grad.data = moved_grad
            else:
                new = type(param)(moved, param.requires_grad)
                self._parameters[key] = new
                if grad is not None and moved_grad is not None:
                    new.grad = moved_grad.requires_grad_(grad.requires_grad)
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer)
        return self

    def cuda(self, device: int | device | None = None) -> Self:
        """Move parameters and buffers to a CUDA device."""
        return self._apply(lambda t: t.cuda(device))

    def ipu(self, device: int | device | None = None) -> Self:
        """Move parameters and buffers to an IPU."""
        return self._apply(lambda t: t.ipu(device))  # type: ignore[attr-defined]

    def xpu(self, device: int | device | None = None) -> Self:
        """Move parameters and buffers to an XPU."""
        return self._apply(lambda t: t.xpu(device))

    def mtia(self, device: int | device | None = None) -> Self:
        """Move parameters and buffers to an MTIA device."""
        return self._apply(lambda t: t.mtia(device))  # type: ignore[attr-defined]

    def cpu(self) -> Self:
        """Move parameters and buffers to the CPU."""
        return self._apply(lambda t: t.cpu())

    def type(self, dst_type: dtype | str) -> Self:
        """Cast parameters and buffers to `dst_type`."""
        return self._apply(lambda t: t.type(dst_type))

    def float(self) -> Self:
        """Cast floating-point parameters and buffers to float32."""
        return self._apply(lambda t: t.float() if t.is_floating_point() else t)

    def double(self) -> Self:
        """Cast floating-point parameters and buffers to float64."""
        return self._apply(lambda t: t.double() if t.is_floating_point() else t)

    def half(self) -> Self:
        """Cast floating-point parameters and buffers to float16."""
        return self._apply(lambda t: t.half() if t.is_floating_point() else t)

    def bfloat16(self) -> Self:
        """Cast floating-point parameters and buffers to bfloat16."""
        return self._apply(lambda t: t.bfloat16() if t.is_floating_point() else t)

    def to_empty(self, *, device: str | device | int | None, recurse: bool = True) -> Self:
        """Move parameters and buffers to `device` without their values."""
        return self._apply(lambda t: torch.empty_like(t, device=device), recurse=recurse)

    @overload
    def to(
        self,
        device: Device = ...,
        dtype: dtype | None = ...,
        non_blocking: bool = ...,
    ) -> Self: ...

    @overload
    def to(self, dtype: dtype, non_blocking: bool = ...) -> Self: ...

    @overload
    def to(self, tensor: Tensor, non_blocking: bool = ...) -> Self: ...

    @overload
    def to(self, *, memory_format: torch.memory_format) -> Self: ...
    def to(self, *args, **kwargs):  # type: (*Any, **Any) -> Self
        """Move and cast: `to(device, dtype, non_blocking)`, `to(dtype)`, `to(tensor)`, ..."""
        device, dtype, non_blocking, memory_format = _torch.parse_to(*args, **kwargs)
        if dtype is not None:
            if not (dtype.is_floating_point or dtype.is_complex):
                raise TypeError(
                    "nn.Module.to only accepts floating point or complex dtypes, but got desired"
                    f" dtype={dtype}"
                )
            if dtype.is_complex:
                warnings.warn(
                    "Complex modules are a new feature under active development whose design may"
                    " change, and some modules might not work as expected when using complex"
                    " tensors as parameters or buffers. Please file an issue at"
                    " https://github.com/pytorch/pytorch/issues/new?template=bug-report.yml if a"
                    " complex module does not work as expected.",
                    stacklevel=2,
                )

        def convert(t: Tensor) -> Tensor:
            cast = dtype if t.is_floating_point() or t.is_complex() else None
            try:
                if memory_format is not None and t.dim() in (4, 5):
                    return t.to(device, cast, non_blocking, memory_format=memory_format)
                return t.to(device, cast, non_blocking)
            except NotImplementedError as e:
                if str(e) != "Cannot copy out of meta tensor; no data!":
                    raise
                raise NotImplementedError(
                    f"{e} Please use torch.nn.Module.to_empty() instead of torch.nn.Module.to()"
                    " when moving module from meta to a different device."
                ) from None

        return self._apply(convert)

    def share_memory(self) -> Self:
        """Move parameters and buffers to shared memory."""
        return self._apply(lambda t: t.share_memory_())

    def train(self, mode: bool = True) -> Self:
        """Set training mode, here and below."""
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        self.training = mode
        for module in self.children():
            module.train(mode)
        return self

    def eval(self) -> Self:
        """Set evaluation mode, here and below."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze the parameters."""
        for p in self.parameters():
            p.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the parameters' gradients to None, or to zero."""
        for p in self.parameters():
            clear_grad(p, set_to_none)

    # -- calling -----------------------------------------------------------------------------

    def _call_impl(self, *args: object, **kwargs: object) -> Any:
        if (
            self._backward_hooks
            or self._backward_pre_hooks
            or self._forward_hooks
            or self._forward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
        ):
            return hooks.call_with_hooks(self, args, kwargs)
        if kwargs or len(args) != 1:
            return self.forward(*args, **kwargs)
        return self.forward(args[0])  # a call with one argument, which is faster

    __call__: Callable[..., Any] = _call_impl

    def __prepare_scriptable__(self) -> NoReturn:
        """Refused: torch.jit.script calls this first."""
        raise NotImplementedError(
            f"nnmirror: torch.jit cannot script a mirrored module; script {_TO_TORCH}"
        )

    def compile(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """Refused: torch.compile traces PyTorch's own modules, not the mirror's tape."""
        raise NotImplementedError(
            "nnmirror: Module.compile is not mirrored; torch.compile cannot trace the mirror's"
            " tape. Run the module as it is, or compile nnmirror.to_torch(module)"
        )

    # -- hooks -------------------------------------------------------------------------------

    def register_forward_pre_hook(
        self,
        hook: Callable[[T, tuple[Any, ...]], Any | None]
        | Callable[[T, tuple[Any, ...], dict[str, Any]], tuple[Any, dict[str, Any]] | None],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
    ) -> RemovableHandle:
        """`hook(module, args)` runs before forward; what it returns replaces the arguments."""
        return hooks.add(
            self._forward_pre_hooks,
            hook,
            prepend,
            {"with_kwargs": (self._forward_pre_hooks_with_kwargs, with_kwargs)},
        )

    def register_forward_hook(
        self,
        hook: Callable[[T, tuple[Any, ...], Any], Any | None]
        | Callable[[T, tuple[Any, ...], dict[str, Any], Any], Any | None],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """`hook(module, args, output)` runs after forward; what it returns replaces output."""
        return hooks.add(
            self._forward_hooks,
            hook,
            prepend,
            {
                "with_kwargs": (self._forward_hooks_with_kwargs, with_kwargs),
                "always_call": (self._forward_hooks_always_called, always_call),
            },
        )

    def register_full_backward_pre_hook(
        self,
        hook: Callable[["Module", _grad_t], _grad_t | None],
        prepend: bool = False,
    ) -> RemovableHandle:
        """`hook(module, grad_output)` runs before the module's backward; may replace it."""
        return hooks.add(self._backward_pre_hooks, hook, prepend)

    def register_full_backward_hook(
        self,
        hook: Callable[["Module", _grad_t, _grad_t], _grad_t | None],
        prepend: bool = False,
    ) -> RemovableHandle:
        """`hook(module, grad_input, grad_output)` runs after the module's backward."""
        if self._is_full_backward_hook is False:
            raise RuntimeError(hooks.MIXED.format("on a single Module"))
        self._is_full_backward_hook = True
        return hooks.add(self._backward_hooks, hook, prepend)

    def register_backward_hook(
        self, hook: Callable[["Module", _grad_t, _grad_t], _grad_t | None]
    ) -> RemovableHandle:
        """Deprecated: a hook on the last recorded call of forward; see the full hook."""
        if self._is_full_backward_hook is True:
            raise RuntimeError(hooks.MIXED.format("on a single Module"))
        self._is_full_backward_hook = False
        return hooks.add(self._backward_hooks, hook)

    # -- state -------------------------------------------------------------------------------

    def get_extra_state(self) -> Any:
        """What a subclass wants saved besides parameters and buffers."""
        raise RuntimeError(_NEVER_CALLED.format("get"))

    def set_extra_state(self, state: Any) -> None:
        """Restore the state returned by `get_extra_state`."""
        raise RuntimeError(_NEVER_CALLED.format("set"))

    def _register_state_dict_hook(self, hook: hooks.Hook) -> RemovableHandle:
        if getattr(hook, "_from_public_api", False):
            raise RuntimeError(
                "Cannot register the same function as the state dict post hook that was"
                " previously registered via register_state_dict_post_hook"
            )
        return hooks.add(self._state_dict_hooks, hook)

    def register_state_dict_post_hook(self, hook):  # type: (Any) -> RemovableHandle
        """`hook(module, state_dict, prefix, local_metadata)` runs after `state_dict`."""
        hook._from_public_api = True
        return hooks.add(self._state_dict_hooks, hook)

    def register_state_dict_pre_hook(self, hook):
        # type: (Callable[[T, str, bool], None]) -> RemovableHandle
        """`hook(module, prefix, keep_vars)` runs before `state_dict`."""
        return hooks.add(self._state_dict_pre_hooks, hook)

    def _register_load_state_dict_pre_hook(
        self, hook: hooks.Hook, with_module: bool = False
    ) -> RemovableHandle:
        bound = hooks.BoundHook(hook, self if with_module else None)
        return hooks.add(self._load_state_dict_pre_hooks, bound)

    def register_load_state_dict_pre_hook(self, hook):  # type: (Callable[..., None]) -> RemovableHandle
        """`hook(module, state_dict, prefix, ...)` runs before this module is loaded."""
        return self._register_load_state_dict_pre_hook(hook, with_module=True)

    def register_load_state_dict_post_hook(self, hook):
        # type: (Callable[[T, _IncompatibleKeys], None]) -> RemovableHandle
        """`hook(module, incompatible_keys)` runs after this module was loaded."""
        return hooks.add(self._load_state_dict_post_hooks, hook)

    def _local_state(self) -> dict[str, Tensor]:
        """This module's own parameters and persistent buffers."""
        found: dict[str, Tensor] = {k: p for k, p in self._parameters.items() if p is not None}
        return found | self._persistent_buffers()

    def _persistent_buffers(self) -> dict[str, Tensor]:
        """This module's own buffers that are part of its state."""
        if not self._buffers:
            return {}
        transient = self._non_persistent_buffers_set
        return {k: b for k, b in self._buffers.items() if b is not None and k not in transient}

    def _save_to_state_dict(self, destination: StateDict, prefix: str, keep_vars: bool) -> None:
        own = self._parameters
        if keep_vars or not tape.ORDINARY.issuperset(map(type, own.values())):
            for name, value in own.items():
                if value is not None:
                    destination[prefix + name] = value if keep_vars else value.detach()
        elif own:
            with DisableTorchFunctionSubclass():
                for name, value in own.items():
                    if value is not None:
                        destination[prefix + name] = Tensor.detach(value)
        for name, buffer in self._persistent_buffers().items():
            destination[prefix + name] = buffer if keep_vars else buffer.detach()
        if type(self).get_extra_state is not Module.get_extra_state:
            destination[prefix + _EXTRA_STATE] = self.get_extra_state()

    T_destination = TypeVar("T_destination", bound=dict[str, Any])

    @overload
    def state_dict(
        self, *, destination: T_destination, prefix: str = ..., keep_vars: bool = ...
    ) -> T_destination: ...

    @overload
    def state_dict(self, *, prefix: str = ..., keep_vars: bool = ...) -> StateDict: ...

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        # type: (*Any, Any, str, bool) -> Any
        """All parameters and persistent buffers by path: plain detached tensors."""
        if args:
            warnings.warn(
                "Positional args are being deprecated, use kwargs instead. Refer to"
                " https://pytorch.org/docs/main/generated/torch.nn.Module.html"
                "#torch.nn.Module.state_dict for details.",
                FutureWarning,
                stacklevel=2,
            )
            given = dict(zip(("destination", "prefix", "keep_vars"), args, strict=False))
            destination = given.get("destination") if destination is None else destination
            prefix = prefix or given.get("prefix", "")
            keep_vars = keep_vars or given.get("keep_vars", False)
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        metadata = {"version": self._version}
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] = metadata
        for hook in self._state_dict_pre_hooks.values():
            hook(self, prefix, keep_vars)
        self._save_to_state_dict(destination, prefix, keep_vars)
        for name, module in self._modules.items():
            if module is not None:
                module.state_dict(
                    destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars
                )
        for hook in self._state_dict_hooks.values():
            result = hook(self, destination, prefix, metadata)
            if result is None:
                continue
            if getattr(hook, "_from_public_api", False):
                raise RuntimeError("state_dict post-hook must return None")
            destination = result
        return destination

    def _load_from_state_dict(
        self,
        state_dict: StateDict,
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this module's own part; a subclass may override it, as in PyTorch."""
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        assign = local_metadata.get("assign_to_params_buffers", False)
        local_state = self._local_state()
        found = []
        for name, param in local_state.items():
            key = prefix + name
            if key in state_dict:
                found.append((name, param, key, state_dict[key]))
            elif strict:
                missing_keys.append(key)
        done = 0 if assign else _copy_plainly(found)
        for name, param, key, value in found[done:]:
            self._load_one(name, param, key, value, assign, error_msgs)
        extra = prefix + _EXTRA_STATE
        if type(self).set_extra_state is not Module.set_extra_state:
            if extra in state_dict:
                self.set_extra_state(state_dict[extra])
            elif strict:
                missing_keys.append(extra)
        elif strict and extra in state_dict:
            unexpected_keys.append(extra)
        if strict:
            for key in state_dict:
                if key.startswith(prefix) and key != extra:
                    name, dot, _ = key[len(prefix) :].partition(".")
                    if name not in (self._modules if dot else local_state):
                        unexpected_keys.append(key)

    def _load_one(
        self, name: str, param: Tensor, key: str, value: Any, assign: bool, errors: list[str]
    ) -> None:
        if not torch.overrides.is_tensor_like(value):
            errors.append(
                f'While copying the parameter named "{key}", expected torch.Tensor or Tensor-like'
                f" object from checkpoint but received {type(value)}"
            )
            return
        lazy = is_lazy(param)  # and so is the value, else a hook has given the parameter its shape
        if not lazy and len(param.shape) == 0 and len(value.shape) == 1 and value.shape[0] == 1:
            value = value[0]  # the format of PyTorch before 0.4
        if not lazy and value.shape != param.shape:
            errors.append(
                f"size mismatch for {key}: copying a param with shape {value.shape} from"
                f" checkpoint, the shape in current model is {param.shape}."
            )
            return
        if param.is_meta and not value.is_meta and not assign:
            warnings.warn(
                f"for {key}: copying from a non-meta parameter in the checkpoint to a meta"
                " parameter in the current model, which is a no-op. (Did you mean to pass"
                " `assign=True` to assign items in the state dictionary to their corresponding"
                " key in the module instead of copying them in place?)",
                stacklevel=2,
            )
        try:
            with no_grad_at_all():
                if not assign:
                    param.copy_(value)
                    return
                if is_parameter(param):
                    if isinstance(value, Parameter):
                        value.requires_grad_(param.requires_grad)
                    else:
                        value = Parameter(value, requires_grad=param.requires_grad)
                setattr(self, name, value)
        except Exception as e:
            errors.append(
                f'While copying the parameter named "{key}", whose dimensions in the model are'
                f" {param.size()} and whose dimensions in the checkpoint are {value.size()}, an"
                f" exception occurred : {e.args}."
            )

    def load_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ):
        """Copy (or with `assign`, take over) the tensors of `state_dict`.

        Returns the missing and unexpected keys; with `strict`, any are an error, reported
        together with those whose shapes do not fit.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")
        if isinstance(strict, bool) and not assign and _loaded_at_once(self, state_dict):
            return _IncompatibleKeys([], [])
        missing: list[str] = []
        unexpected: list[str] = []
        errors: list[str] = []
        metadata = getattr(state_dict, "_metadata", None)
        given = OrderedDict(state_dict)
        if metadata is not None:
            given._metadata = metadata  # type: ignore[attr-defined]

        def load(module: Module, local: StateDict, prefix: str) -> None:
            local_metadata = {} if metadata is None else metadata.get(prefix[:-1], {})
            if assign:
                local_metadata["assign_to_params_buffers"] = assign
            module._load_from_state_dict(
                local, prefix, local_metadata, True, missing, unexpected, errors
            )
            for name, child in module._modules.items():
                if child is not None:
                    path = f"{prefix}{name}."
                    load(child, {k: v for k, v in local.items() if k.startswith(path)}, path)
            for hook in module._load_state_dict_post_hooks.values():
                if hook(module, _IncompatibleKeys(missing, unexpected)) is not None:
                    raise AssertionError(
                        "Hooks registered with ``register_load_state_dict_post_hook`` are not"
                        " expected to return new values, if incompatible_keys need to be modified,"
                        " it should be done inplace."
                    )

        load(self, given, "")
        if strict:
            for keys, kind in ((unexpected, "Unexpected"), (missing, "Missing")):
                if keys:
                    quoted = ", ".join(f'"{k}"' for k in keys)
                    errors.insert(0, f"{kind} key(s) in state_dict: {quoted}. ")
        if errors:
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(self).__name__}:\n\t"
                + "\n\t".join(errors)
            )
        return _IncompatibleKeys(missing, unexpected)

    def __reduce_ex__(self, protocol: Any) -> str | tuple[object, ...]:
        # Other protocols use `__class__`, which is not always the type (see adopt).
        return reduced(self, super().__reduce_ex__(max(protocol, 2)))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_call", "_runs"):  # the record of the last call
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in _HOOK_REGISTRIES:  # missing in files of older versions
            self.__dict__.setdefault(name, OrderedDict())
        self.__dict__.setdefault("_non_persistent_buffers_set", set())
        self.__dict__.setdefault("_is_full_backward_hook", None)

    # -- printing ----------------------------------------------------------------------------

    def _get_name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        """The text in the parentheses when the module is printed."""
        return ""

    def __repr__(self) -> str:
        extra = self.extra_repr().split("\n") if self.extra_repr() else []
        children = [f"({name}): {indent(repr(m))}" for name, m in self._modules.items()]
        if len(extra) == 1 and not children:
            return f"{self._get_name()}({extra[0]})"
        if not (extra or children):
            return f"{self._get_name()}()"
        return f"{self._get_name()}(\n  " + "\n  ".join(extra + children) + "\n)"


REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOK_REGISTRIES = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_NEVER_CALLED = (
    "Reached a code path in Module.{}_extra_state() that should never be called. Please file an"
    " issue at https://github.com/pytorch/pytorch/issues/new?template=bug-report.yml to report"
    " this bug."
)


_NAMING = ("named_modules", "named_parameters", "_named_members")
_naming = attrgetter(*_NAMING)
_AS_DEFINED = _naming(Module)
# As they are here, whoever replaces them.
_named_modules = Module.named_modules
_load_from_state_dict, _set_extra_state = Module._load_from_state_dict, Module.set_extra_state


def _names_as_usual(module: Module) -> bool:
    """Does this module name its own parts as `Module` does?"""
    return _naming(type(module)) == _AS_DEFINED and module.__dict__.keys().isdisjoint(_NAMING)


def _unnamed_modules(top: Module) -> Iterator[Module]:
    """What `top.named_modules()` gives, without the names: lazily, and in the same order."""
    seen = {top}
    yield top
    levels = [iter(top._modules.items())]
    path = [""]
    while levels:
        for path[-1], module in levels[-1]:
            if module is None:
                continue
            if (
                type(module).named_modules is not _named_modules
                or "named_modules" in module.__dict__
            ):
                for _, found in module.named_modules(seen, ".".join(path), True):
                    yield found
            elif module not in seen:
                seen.add(module)
                yield module
                if module._modules:
                    levels.append(iter(module._modules.items()))
                    path.append("")
                    break
        else:
            levels.pop()
            path.pop()


@unrecorded
def _copy_plainly(found: list[tuple[str, Tensor, str, object]]) -> int:
    """`param.copy_(value)` for each `(name, param, key, value)`, as long as they are tensors of the
    same shape, without subclasses that define dispatch.

    Returns how many were copied: the next is of another kind, or failed.
    """
    with DisableTorchFunctionSubclass():
        for done, (_, param, _, value) in enumerate(found):
            if not _is_copied_plainly(value, param):
                return done
            try:
                torch.Tensor.copy_(param, value)
            except RuntimeError:
                return done
    return len(found)


def _is_copied_plainly(value: object, param: Tensor) -> TypeGuard[Tensor]:
    return (
        type(param) in tape.ORDINARY
        and type(value) in tape.ORDINARY
        and isinstance(value, Tensor)
        and C_shape(value) == C_shape(param)
        and not param.is_meta
    )


def _is_surely_copied(value: object, param: Tensor) -> bool:
    """Can copying it not fail either?"""
    return (
        _is_copied_plainly(value, param)
        and param.is_contiguous()
        and not (param.is_inference() or param.is_quantized)
        and value.layout is torch.strided
        and not (value.is_meta or value.is_quantized)
    )


@unrecorded
def _loaded_at_once(top: Module, state_dict: Mapping[str, Any]) -> bool:
    """Copy all of `state_dict`, if it has the names and shapes of `top`'s state, and no module has
    a hook or a method of its own for loading.

    Else False: it is for `_load_from_state_dict`, module by module, which also says what is wrong.
    """
    own: dict[str, Tensor] = {}
    if not _has_usual_state(top, "", own) or own.keys() != state_dict.keys():
        return False
    with DisableTorchFunctionSubclass():
        params, values = [*own.values()], [*map(state_dict.__getitem__, own)]
        # It must not fail half-way: the values may be other tensors of the state.
        if not all(map(_is_surely_copied, values, params)):
            return False
        try:
            for param, value in zip(params, values, strict=True):
                Tensor.copy_(param, value)
        except RuntimeError:
            return False
    return True


def _has_usual_state(module: Module, prefix: str, own: dict[str, Tensor]) -> bool:
    """Adds the state of `module` and of those below to `own`, by path; False if one of them has a
    say in how it is loaded."""
    kind = type(module)
    if (
        kind._load_from_state_dict is not _load_from_state_dict
        or kind.set_extra_state is not _set_extra_state
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or "_load_from_state_dict" in module.__dict__
    ):
        return False
    for name, value in module._local_state().items():
        own[prefix + name] = value
    return all(
        [
            _has_usual_state(child, f"{prefix}{name}.", own)
            for name, child in module._modules.items()
            if child is not None
        ]
    )


def clear_grad(param: Tensor, set_to_none: bool) -> None:
    """What `zero_grad` does to one parameter, in modules and in optimisers."""
    if set_to_none:
        param.grad = None
        return
    grad = param.grad
    if grad is None:
        return
    if grad.grad_fn is not None:
        grad.detach_()
    else:
        grad.requires_grad_(False)
    with torch.no_grad():
        grad.zero_()


def _keeping_call(forward: TorchFunction) -> TorchFunction:
    """Wraps a user's forward, to keep its arguments and result for `backward`."""

    @functools.wraps(forward)
    def call(self: Module, *args: object, **kwargs: object) -> Any:
        began = next(_sequence)
        if kwargs or len(args) != 1:
            out = forward(self, *args, **kwargs)
        else:
            out = forward(self, args[0])  # as in _call_impl
        recorded = tape.is_grad_enabled()
        self.__dict__["_call"] = Traced(args, out, False, began) if recorded else None
        return out

    return call


def keeps_call(forward: F) -> F:
    """Marks a forward that sets `_call` itself."""
    forward._keeps_call = True  # type: ignore[attr-defined]
    return forward


def records_once(forward: F) -> F:
    """Marks a forward that consists of a single `_run`."""
    forward._records_once = True  # type: ignore[attr-defined]
    return keeps_call(forward)
