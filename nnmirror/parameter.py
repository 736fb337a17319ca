"""Parameter and Buffer: the tensors that a module registers when they are assigned."""

from typing import Any, NoReturn, TypeGuard

import torch

from . import _torch
from ._torch import DisableTorchFunctionSubclass
from ._types import TorchFunction
from .tape import ORDINARY
from .tensor import LEAVES, UNASKED, Tensor, rebuild


class Parameter(Tensor):
    """A leaf that requires grad: `Module` registers it when it is assigned.

    As `torch.nn.Parameter`, it shares the memory of `data`.
    """

    _is_param = True  # isinstance(p, torch.nn.Parameter) reads this

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
            if requires_grad and data.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    "Setting requires_grad=True on inference tensor outside InferenceMode is not"
                    " allowed."
                )
            self = torch.Tensor._make_subclass(cls, data, False)
        self._requires_grad = bool(requires_grad)
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return "Parameter containing:\n" + super().__repr__()

    def __format__(self, format_spec: str) -> str:
        return object.__format__(self, format_spec)  # as PyTorch formats a Parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parameter":
        if id(self) in memo:
            return memo[id(self)]
        result = self._rebuilt(self.detach().clone(memory_format=torch.preserve_format))
        memo[id(self)] = result
        return result


class _BufferMeta(_torch.TensorMeta):
    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, torch.Tensor) and getattr(instance, "_is_buffer", False)


class Buffer(torch.Tensor, metaclass=_BufferMeta):
    """A tensor that a module registers as a buffer when it is assigned, as `torch.nn.Buffer`.

    As in PyTorch, the result is a plain tensor with a mark.
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


class UninitializedTensorMixin:
    """A tensor whose shape is not known yet; `materialize` turns it into an ordinary one."""

    cls_to_become: type

    _allowed_methods = [
        torch.Tensor.__hash__,
        torch.Tensor.size,
        torch.Tensor.copy_,
        torch.Tensor.is_complex,
        torch.Tensor.is_floating_point,
        torch.Tensor.half,
        torch.Tensor.float,
        torch.Tensor.double,
        torch.Tensor.char,
        torch.Tensor.short,
        torch.Tensor.int,
        torch.Tensor.long,
        torch.Tensor.cuda,
        torch.Tensor.cpu,
        torch.Tensor.to,
        torch.Tensor.get_device,
        _torch.has_compatible_shallow_copy_type,
    ]

    def materialize(self: Any, shape, device=None, dtype=None) -> None:  # type: ignore[no-untyped-def]
        """Allocate memory of this shape, with the given device and dtype or its own."""
        data = self.data
        self.data = torch.empty(
            shape,
            device=data.device if device is None else device,
            dtype=data.dtype if dtype is None else dtype,
        )
        self.__class__ = self.cls_to_become

    @property
    def shape(self) -> NoReturn:
        """Not known yet: raises RuntimeError."""
        raise RuntimeError(
            "Can't access the shape of an uninitialized parameter or buffer. This error usually"
            " happens in `load_state_dict` when trying to load an uninitialized parameter into an"
            " initialized one. Call `forward` to initialize the parameters before accessing their"
            " attributes."
        )

    def share_memory_(self) -> NoReturn:
        """Not possible yet: raises RuntimeError."""
        raise RuntimeError(
            "Can't share memory on an uninitialized parameter or buffer. Call `forward` to"
            " initialize the parameters before calling `module.share_memory()`."
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"<{type(self).__name__}>"

    def __reduce_ex__(self: Any, proto: object) -> tuple[type, tuple[bool]]:
        return type(self), (self.requires_grad,)

    @classmethod
    def __torch_function__(
        cls,
        func: TorchFunction,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        # A property of a tensor is read by a "method-wrapper".
        if func in cls._allowed_methods or type(func).__name__ == "method-wrapper":
            with DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
                is_tensor = isinstance(result, torch.Tensor)
                return torch.Tensor.as_subclass(result, cls) if is_tensor else result  # type: ignore[type-var]
        raise ValueError(
            f"Attempted to use an uninitialized parameter in {func}. This error happens when you"
            " are using a `LazyModule` or explicitly manipulating"
            f" `torch.nn.parameter.{cls.__name__}` objects. When using LazyModules Call `forward`"
            " with a dummy batch to initialize the parameters before calling torch functions"
        )


def is_lazy(param: object) -> TypeGuard[UninitializedTensorMixin]:
    """Is it an UninitializedParameter or UninitializedBuffer?"""
    return isinstance(param, UninitializedTensorMixin)


class UninitializedParameter(UninitializedTensorMixin, Parameter):  # type: ignore[misc, override]
    """A Parameter whose shape is not known yet, such as that of a lazy module before its first
    call.

    It can be moved, cast and copied, and becomes a Parameter by `materialize(shape)`; anything else
    raises PyTorch's error.
    """

    cls_to_become = Parameter

    def __new__(  # type: ignore[no-untyped-def]
        cls, requires_grad=True, device=None, dtype=None
    ) -> "UninitializedParameter":
        return Parameter.__new__(  # type: ignore[return-value]
            cls, torch.empty(0, device=device, dtype=dtype), requires_grad
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "UninitializedParameter":
        if id(self) not in memo:
            data = self.data
            memo[id(self)] = type(self)(self.requires_grad, data.device, data.dtype)
        return memo[id(self)]  # type: ignore[no-any-return]


class UninitializedBuffer(UninitializedTensorMixin, torch.Tensor):  # type: ignore[misc, override]
    """A Buffer whose shape is not known yet; otherwise as UninitializedParameter."""

    cls_to_become = torch.Tensor
    persistent: bool

    def __new__(  # type: ignore[no-untyped-def]
        cls, requires_grad=False, device=None, dtype=None, persistent=True
    ) -> "UninitializedBuffer":
        data = torch.empty(0, device=device, dtype=dtype)
        made: Any = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.persistent = persistent
        made._is_buffer = True
        return made  # type: ignore[no-any-return]


ORDINARY.add(Parameter)
LEAVES.add(Parameter)
UNASKED.add(Parameter)

# torch.load with weights_only loads a file that has parameters in it, as it does for PyTorch's
# parameters.
torch.serialization.add_safe_globals([rebuild, Parameter])
