"""A torch.nn module becomes a mirrored one where the two libraries meet.

A model that a library builds consists of torch.nn modules. It becomes mirrored when

- it is made a part of a mirrored module: `self.backbone = resnet18()`, `nn.Sequential(*layers)`;
- a mirrored module is made a part of it: `model.fc = nn.Linear(512, 10)`;
- a script that `python -m nnmirror` runs calls it, or accesses its modules (see runner).

It stays the same object, and so does every module and parameter in it, so that existing references
(an optimiser, a list of layers, the library itself) remain valid. Only their classes are exchanged:
a library's own class for its twin (see bridge), a layer for the mirrored layer of the same name,
`torch.nn.Parameter` for `nnmirror.Parameter`. Hooks of modules are kept. Either everything is
exchanged or, if a layer is not mirrored, nothing; a TypeError then names each such layer with its
path. Graphs that torch's autograd recorded before still bring their gradients to the parameters.

The twin of a library's class is not a subclass of it, but `isinstance(model, ResNet)` stays true
everywhere except inside torch; so does `isinstance(layer, torch.nn.BatchNorm2d)`, which a library
may use to find the layers that its `train` freezes.

A module to which a mirrored one is assigned while its own `__init__` runs is not converted: a class
derived from a library's base class (`LightningModule`, `Metric`) must stay what that library
expects.
"""

import sys
import threading
import types
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

from ._upcalls import implements
from .bridge import AModule, Bridge, origin_of
from .grad_mode import no_grad_at_all, outside_inference_mode
from .modules import module as _module
from .modules.module import Module
from .parameter import Parameter

kept: set[str] = set()
"""The libraries (top packages) whose modules stay PyTorch's."""


@implements(_module)
def become_mirrored(model: "torch.nn.Module") -> list[str]:
    """Make the torch.nn module `model` a mirrored one, in place.

    Returns the reasons against it, each with a path; if there are any, nothing was changed.
    """
    library = type(model).__module__.partition(".")[0]
    if library in kept:
        return [f"{torch.typename(model)}: {library} is kept PyTorch's (--keep {library})"]
    with _one_at_a_time:
        conversion = _InPlace()
        conversion.plan(model)
        if not conversion.problems:
            conversion.commit()
    return conversion.problems


_one_at_a_time = threading.RLock()


@implements(_module)
def class_that_was(module: Module) -> type | None:
    """The class, a library's or torch.nn's, of a module that was made mirrored in place."""
    if "_became_mirrored" not in module.__dict__:
        return None
    cls = type(module)
    return origin_of(cls) or getattr(sys.modules["torch.nn"], cls.__name__, None)


class _InPlace(Bridge):
    """A conversion that keeps the objects and changes their classes."""

    keeps_hooks = True

    def __init__(self) -> None:
        super().__init__(to_mirror=True, copy=False)
        self.modules: dict[int, tuple[AModule, type, dict[str, object]]] = {}
        self.parameters: list[torch.Tensor] = []

    def plan(self, model: "torch.nn.Module") -> None:
        self._module(model, "")

    def _begin(self, module: AModule, cls: type) -> tuple[object, dict[str, object]]:
        state: dict[str, object] = {}
        self.modules[id(module)] = module, cls, state
        return module, state

    def _method(self, module: Any, name: str) -> Any:
        return types.MethodType(getattr(self.modules[id(module)][1], name), module)

    def _new_parameter(self, param: torch.Tensor) -> torch.Tensor:
        if type(param) is not Parameter:
            self.parameters.append(param)
        return param

    def commit(self) -> None:
        """Exchange the classes of all modules, or of none if one cannot be exchanged."""
        before: list[tuple[AModule, type]] = []
        try:
            for module, cls, _ in self.modules.values():
                was = type(module)
                _set_class(module, cls)
                before.append((module, was))
        except TypeError as e:
            self.problems.append(f"{torch.typename(module)}: {e}")
            for changed, was in before:
                _set_class(changed, was)
            return
        for module, _, state in self.modules.values():
            own = module.__dict__
            # The registries stay the same objects, since there may be references to them.
            own.update({k: v for k, v in state.items() if k not in _module.REGISTRIES})
            own["_became_mirrored"] = True
        for param in self.parameters:
            _become_mirrored_parameter(param)


_set_class = object.__dict__["__class__"].__set__


def _become_mirrored_parameter(param: Any) -> None:
    grad, requires_grad = param.grad, param.requires_grad
    if requires_grad and param._use_count() > 1:
        _deliver_from_torchs_graph(param)
    param.grad = None
    param.requires_grad_(False)  # torch must not record it any more
    param.__class__ = Parameter
    param._requires_grad = requires_grad
    param.grad = grad


def _deliver_from_torchs_graph(param: torch.Tensor) -> None:
    """Add the gradients from graphs that torch recorded with the parameter, which torch no longer
    does.

    Its AccumulateGrad lives as long as such a graph.
    """
    with outside_inference_mode(), torch.enable_grad():
        accumulate: Any = param.view_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    ours = TensorWeakRef(param)

    def deliver(grads: Sequence[torch.Tensor | None]) -> None:
        leaf = ours()
        grad = grads[0]
        if leaf is None or grad is None or not leaf.requires_grad:
            return
        if grad.requires_grad:
            raise RuntimeError(
                "nnmirror: a module became mirrored after its forward, which torch recorded; the"
                " gradient of that gradient (create_graph=True) would be lost. Call the module"
                " again, and take the gradients of what it gives then"
            )
        with no_grad_at_all():
            if leaf.grad is None:
                leaf.grad = grad.clone()
            else:
                leaf.grad.add_(grad)  # in place, as in PyTorch: others may hold it

    accumulate.register_prehook(deliver)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@implements(_module)
def is_being_made(module: object, frame: FrameType) -> bool:
    """Is one of the calling functions the `__init__` of this module?"""
    for caller in _frames(frame):
        code = caller.f_code
        if code.co_name == "__init__" and code.co_argcount:
            given = caller.f_locals.get(code.co_varnames[0])
            if given is module:
                return True
    return False
