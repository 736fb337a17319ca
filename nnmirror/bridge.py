"""from_torch and to_torch: a whole model of one library as a model of the other.

A layer of one library becomes the layer of the same name of the other. A module of your own class
becomes an instance of a twin of that class: the same name and methods, with the other library's
classes as bases. No code of the model is run, and the original is unchanged: parameters and buffers
share their memory or are copied, and every other attribute is kept.

.. include:: libraries.md
"""

import copy as _copy
import copyreg
import types
import weakref
from collections import OrderedDict
from typing import Any, TypeAlias

import torch

from . import functional, modules, parameter, twins
from ._upcalls import implements
from .modules import module as _module
from .modules.module import Module
from .parameter import Parameter

AModule: TypeAlias = "Module | torch.nn.Module"


def from_torch(model: "torch.nn.Module", copy: bool = False) -> Module:
    """Convert a torch.nn `model` to a mirrored one.

    The two share their weights, so that training one also trains the other, until `.to` or
    `.data =` gives one of them new memory; with `copy=True` each has its own. Names, train or eval
    mode, `requires_grad`, `.grad`, buffers, dtypes, devices, shared parameters and modules, and
    your own attributes are kept. Modules, parameters and functions of torch.nn.functional in
    attributes that are lists, tuples or dicts are converted as well.

    The methods of your own classes are kept as they are, and so are the global names in them:
    PyTorch's `F.relu` is recorded when it is given a tracked tensor, or refused if it has no rule;
    `nn.Linear(...)` called in a forward makes PyTorch's layer; `super(Net, self)` in a method that
    is called later raises a TypeError (`super()` does not).

    TypeError if modules cannot be converted: layers that are not mirrored, and modules or
    parameters with hooks, which would be lost. It names all of them, with the reason.
    """
    return Bridge(to_mirror=True, copy=copy).model(model)


def to_torch(model: Module, copy: bool = False) -> "torch.nn.Module":
    """Convert a mirrored `model` to one of torch.nn; otherwise as `from_torch`.

    For what needs PyTorch's own modules: `torch.jit.trace`, `torch.export`, ONNX, or a gradient
    that the mirror refuses. A backward of the converted model adds to the `.grad` of `model` too,
    so that an optimiser of `model.parameters()` can use it. The reverse does not hold: after a
    backward of `model`, use an optimiser of `model.parameters()`.
    """
    return Bridge(to_mirror=False, copy=copy).model(model)


_ORIGIN = "_bridged_from"  # in the namespace of a twin: the class it was made from
_twins: "weakref.WeakKeyDictionary[type, weakref.ref[type]]" = weakref.WeakKeyDictionary()


class Bridge:
    """One conversion: the new object for each module, parameter and buffer."""

    keeps_hooks = False  # of modules: they would be lost

    def __init__(self, to_mirror: bool, copy: bool) -> None:
        import torch.nn as torch_nn  # only if the caller of this class asks for it

        self.torch_nn = torch_nn
        self.copy = copy
        self.to_mirror = to_mirror
        self.source: type[AModule] = torch_nn.Module if to_mirror else Module
        self.target: type[AModule] = Module if to_mirror else torch_nn.Module
        # With the originals, so that no id is reused.
        self.done: dict[int, tuple[object, Any]] = {}
        self.copied: dict[int, object] = {}  # deepcopy's memo
        self.problems: list[str] = []

    def model(self, model: object) -> Any:
        if not isinstance(model, self.source):
            wanted = "torch.nn.Module" if self.to_mirror else "nnmirror.Module"
            raise TypeError(f"nnmirror: a {wanted} was expected, but got {torch.typename(model)}")
        new = self._module(model, "")
        if self.problems:
            raise TypeError(
                "nnmirror: the model cannot be converted; nothing was changed:\n  "
                + "\n  ".join(self.problems)
            )
        return new

    def _problem(self, path: str, value: object, why: str) -> None:
        self.problems.append(f"{path or '(the model)'}: {torch.typename(value)}: {why}")

    # -- modules ---------------------------------------------------------------------------

    def _module(self, module: AModule, path: str) -> Any:
        if id(module) in self.done:
            return self.done[id(module)][1]
        # By type: the `__class__` of a model that became mirrored in place is torch.nn's too.
        if issubclass(type(module), self.target):  # assigned into it
            return self._plain(module)
        cls = self._class(type(module), path, module)
        new, state = self._begin(module, cls or self.target)
        self.done[id(module)] = module, new
        if "_initialize_hook" in module.__dict__:
            why = "a lazy module, whose parameters have no shape yet; call the model once first"
            self._problem(path, module, why)
            return new
        hooks = [name for name in _module._HOOK_REGISTRIES if module.__dict__.get(name)]
        if hooks and not self.keeps_hooks:
            self._problem(path, module, f"it has hooks ({', '.join(hooks)}); remove them first")
        prefix = f"{path}." if path else ""
        for name, value in module.__dict__.items():
            if name in _module._HOOK_REGISTRIES:
                state[name] = value if self.keeps_hooks else OrderedDict()
            elif name == "_parameters":
                state[name] = {k: self._parameter(v, prefix + k) for k, v in value.items()}
            elif name == "_buffers":
                state[name] = {k: self._plain(v) for k, v in value.items()}
            elif name == "_modules":
                state[name] = {
                    k: None if v is None else self._module(v, prefix + k) for k, v in value.items()
                }
            elif name not in _LEFT_OUT:
                state[name] = self._attribute(value, prefix + name)
        return new

    def _begin(self, module: AModule, cls: type) -> tuple[object, dict[str, object]]:
        """The new object for `module`, of the class `cls`, and the attributes to be filled."""
        new: object = object.__new__(cls)
        return new, new.__dict__

    def _method(self, new: Any, name: str) -> Any:
        """A method of the new object of a module."""
        return getattr(new, name)

    def _attribute(self, value: Any, path: str) -> Any:
        """Any other attribute, with the modules and parameters in it converted."""
        if issubclass(type(value), self.source):
            return self._module(value, path)
        if _module.is_parameter(value):
            return self._parameter(value, path)
        if type(value) in (list, tuple):
            items = [self._attribute(v, f"{path}[{i}]") for i, v in enumerate(value)]
            if self.copy or any(a is not b for a, b in zip(items, value, strict=True)):
                return type(value)(items)
            return value
        if type(value) in (dict, OrderedDict):
            held = {k: self._attribute(v, f"{path}[{k!r}]") for k, v in value.items()}
            if self.copy or any(held[k] is not v for k, v in value.items()):
                return type(value)(held)
            return value
        if isinstance(value, types.MethodType) and issubclass(type(value.__self__), self.source):
            owner: Any = value.__self__
            new = self._module(owner, path)
            name = value.__name__
            own = getattr(type(owner), name, None) is value.__func__
            return self._method(new, name) if own else types.MethodType(value.__func__, new)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._plain(value)

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """A function of one library's `nn.functional`, as the other's."""
        ours, theirs = vars(functional), vars(self.torch_nn.functional)
        source, target = (theirs, ours) if self.to_mirror else (ours, theirs)
        name = value.__name__
        if source.get(name) is value and name in functional.__all__:
            return target[name]
        return value

    # -- parameters and buffers --------------------------------------------------------------

    def _parameter(self, param: torch.Tensor | None, path: str) -> torch.Tensor | None:
        if param is None:
            return None
        if id(param) in self.done:
            return self.done[id(param)][1]
        if type(param) not in (Parameter, self.torch_nn.Parameter):
            self._problem(path, param, "a parameter of a class of its own")
            return None
        if _hooks_on(param):
            self._problem(path, param, "the parameter has hooks; remove them first")
        new = self._new_parameter(param)
        self.done[id(param)] = param, new
        return new

    def _new_parameter(self, param: torch.Tensor) -> torch.Tensor:
        kind = Parameter if self.to_mirror else self.torch_nn.Parameter
        new = kind(self._data(param), requires_grad=param.requires_grad)
        if param.grad is not None:
            new.grad = self._data(param.grad)
        for name, value in vars(param).items():
            if not name.startswith("_"):
                setattr(new, name, value)
        if not self.copy:
            theirs, ours = (param, new) if self.to_mirror else (new, param)
            twins.pair(theirs, ours)
            if not self.to_mirror:
                twins.share_gradient(theirs, ours)
        return new

    def _plain(self, value: object) -> Any:
        """A buffer or another value that is neither module nor parameter: itself, or with `copy` a
        copy."""
        return _copy.deepcopy(value, self.copied) if self.copy else value

    def _data(self, tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.detach()
        return data.clone(memory_format=torch.preserve_format) if self.copy else data

    # -- classes -----------------------------------------------------------------------------

    def _class(self, cls: type, path: str, module: object) -> type | None:
        """The class of the other library for `cls`; None, with the reason recorded, if there is
        none."""
        if not issubclass(cls, self.source):
            return cls  # a second base
        if cls is self.source:
            return self.target
        if _ORIGIN in cls.__dict__:
            return cls.__dict__[_ORIGIN]
        if cls.__module__.partition(".")[0] in ("torch", "nnmirror"):
            found = self._namesake(cls)
            if found is None:
                inherited = "" if cls is type(module) else f"its base {torch.typename(cls)} "
                self._problem(path, module, f"{inherited}is not mirrored".strip())
            return found
        twin = _twins.get(cls)
        made = twin() if twin is not None else None
        if made is None:
            bases = [self._class(base, path, module) for base in cls.__bases__]
            if None in bases:
                return None
            made = self._twin(cls, tuple(bases), path)
            _twins[cls] = weakref.ref(made)
        return made

    def _namesake(self, cls: type) -> type | None:
        ours, theirs = {**vars(modules), **vars(parameter)}, vars(self.torch_nn)
        source, target = (theirs, ours) if self.to_mirror else (ours, theirs)
        return target.get(cls.__name__) if source.get(cls.__name__) is cls else None

    def _twin(self, cls: type, bases: tuple[type | None, ...], path: str) -> type:
        """A class like `cls` with other bases, with `super()` in its methods adapted."""
        cell = types.CellType()
        namespace: dict[str, object] = {_ORIGIN: cls}
        for name, value in cls.__dict__.items():
            if issubclass(type(value), self.source):
                self._problem(path, value, f"a module that the class holds, as {name}")
            if name in _A_CLASS_OF_ITS_OWN or isinstance(value, types.MemberDescriptorType):
                continue
            if isinstance(value, types.FunctionType):
                value = self._function(_unwrapped(value))
            namespace[name] = _with_class(value, cls, cell)
        metaclass = {"metaclass": type(cls)}
        twin = types.new_class(cls.__name__, bases, metaclass, lambda made: made.update(namespace))
        cell.cell_contents = twin
        return twin


# The records of calls, and that it became mirrored in place (see adopt).
_LEFT_OUT = ("_call", "_runs", "_became_mirrored")
_A_CLASS_OF_ITS_OWN = ("__dict__", "__weakref__", "_abc_impl")  # each class makes its own


def origin_of(cls: type) -> type | None:
    """The class of which `cls` is the twin."""
    return cls.__dict__.get(_ORIGIN)


_NEW = vars(copyreg)["__newobj__"]


@implements(_module)
def reduced(module: Module, made: str | tuple[object, ...]) -> str | tuple[object, ...]:
    """What `module` is pickled as, given the default for an object of its class.

    A twin class has no importable name, so it is made again from the original class when it is
    loaded.
    """
    cls = type(module)
    origin = origin_of(cls)
    as_usual = origin is None and "_became_mirrored" not in module.__dict__
    if as_usual or type(made) is not tuple or made[0] is not _NEW:
        return made
    return (_made_again, (origin or cls,), *made[2:])


def _made_again(cls: type) -> object:
    """An empty object of the class or, if that is torch.nn's, of its twin."""
    bridge = Bridge(to_mirror=True, copy=False)
    found = bridge._class(cls, "", None) if issubclass(cls, bridge.source) else cls
    if found is None:
        raise TypeError("nnmirror: it cannot be made again:\n  " + "\n  ".join(bridge.problems))
    return object.__new__(found)


def _hooks_on(param: torch.Tensor) -> bool:
    if isinstance(param, Parameter):
        of_its_node = any(param._accumulate_hooks or ())
        return of_its_node or bool(param._leaf_hooks or param._post_accumulate_hooks)
    hooks = (param._backward_hooks or {}), (param._post_accumulate_grad_hooks or {})
    return not all(twins.is_sharing(hook) for held in hooks for hook in held.values())


def _unwrapped(value: types.FunctionType) -> types.FunctionType:
    """A forward as its author wrote it: a mirrored class wraps its own to record calls."""
    if value.__globals__ is vars(_module):
        return getattr(value, "__wrapped__", value)
    return value


def _with_class(value: object, old: type, cell: types.CellType) -> Any:
    """The contents of a class, with `cell` wherever a function's `super()` refers to `old`."""
    if isinstance(value, staticmethod | classmethod):
        return type(value)(_with_class(value.__func__, old, cell))
    if isinstance(value, property):
        get, put, delete = (_with_class(f, old, cell) for f in (value.fget, value.fset, value.fdel))
        return type(value)(get, put, delete, value.__doc__)
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return value
    cells = []
    for held in value.__closure__:
        try:
            content = held.cell_contents
        except ValueError:  # empty yet
            cells.append(held)
            continue
        new = cell if content is old else _with_class(content, old, cell)
        if new is content:
            cells.append(held)
        else:
            cells.append(cell if content is old else types.CellType(new))
    if all(a is b for a, b in zip(cells, value.__closure__, strict=True)):
        return value
    made = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = value.__kwdefaults__
    made.__qualname__ = value.__qualname__
    made.__module__ = value.__module__
    made.__annotations__ = value.__annotations__
    made.__doc__ = value.__doc__
    made.__dict__.update(value.__dict__)
    return made
