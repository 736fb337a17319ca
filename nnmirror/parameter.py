"""Parameter and Buffer: the tensors that a module registers when they are assigned."""

from typing import Any

import torch

from . import _torch
from ._torch import DisableTorchFunctionSubclass
from .tape import LEAVES, ORDINARY
from .tensor import UNASKED, Tensor, rebuild


class Parameter(Tensor):
    """A leaf that requires grad: `Module` registers it when it is assigned.

    As `torch.nn.Parameter`, it shares the memory of `data`.
    """

    _is_param = True  # what isinstance(p, torch.nn.Parameter) asks

    def __new__(cls, data=None, requires_grad=True):
        # type: (torch.Tensor | None, bool) -> Parameter
        if data is None:
            data = torch.empty(0)
        data = data.detach()
        with DisableTorchFunctionSubclass():
            if not isinstance(requires_grad, bool):
                torch.Tensor._make_subclass(cls, data, requires_grad)  # PyTorch's error
            if requires_grad and not (data.is_floating_point() or data.is_complex()):
                raise RuntimeError(
                    "Only Tensors of floating point and complex dtype can require gradients"
                )
            self = torch.Tensor._make_subclass(cls, data, False)
        self._requires_grad = bool(requires_grad)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "Parameter containing:\n" + super().__repr__()

    def __format__(self, format_spec: str) -> str:
        return object.__format__(self, format_spec)  # PyTorch formats a Parameter no other way

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parameter":
        if id(self) in memo:
            return memo[id(self)]
        result = self._rebuilt(self.detach().clone(memory_format=torch.preserve_format))
        memo[id(self)] = result
        return result


class _BufferMeta(_torch.TensorMeta):
    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, torch.Tensor) and getattr(instance, "_is_buffer", False)


class Buffer(torch.Tensor, metaclass=_BufferMeta):
    """A tensor that a module registers as a buffer when it is assigned, as `torch.nn.Buffer`.

    As there, what is made is a plain tensor, marked.
    """

    persistent: bool

    def __new__(cls, data=None, *, persistent=True):
        # type: (torch.Tensor | None, bool) -> Buffer
        if data is None:
            data = torch.empty(0)
        marked: Any = data.detach().requires_grad_(data.requires_grad)
        marked.persistent = persistent
        marked._is_buffer = True
        return marked


ORDINARY.add(Parameter)
LEAVES.add(Parameter)
UNASKED.add(Parameter)

# A file that holds parameters (a list of them; state_dicts hold plain tensors) loads with
# torch.load's weights_only, as one of PyTorch's parameters does.
torch.serialization.add_safe_globals([rebuild, Parameter])
