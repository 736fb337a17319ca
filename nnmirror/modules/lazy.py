"""Lazy modules: the shapes of their parameters follow from the first input.

net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(1))
net(x)  # from now on Linear(in_features=x.shape[-1], ...) and Linear(8, 1)
"""

import itertools
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..parameter import is_lazy

if TYPE_CHECKING:
    from .module import Module as _Mixed
    from .module import StateDict
else:
    _Mixed = object


class LazyModuleMixin(_Mixed):
    """The mixin of a module whose parameters are made at its first call.

    Its parameters are `UninitializedParameter`s until `initialize_parameters(*inputs)` gives them
    a shape; then the module becomes one of `cls_to_become`.
    """

    cls_to_become: type | None = None

    def __init__(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        self._load_hook = self._register_load_state_dict_pre_hook(self._lazy_load_hook)
        self._initialize_hook = self.register_forward_pre_hook(
            self._infer_parameters, with_kwargs=True
        )

    def _save_to_state_dict(self, destination: "StateDict", prefix: str, keep_vars: bool) -> None:
        for name, value in self._local_state().items():
            kept = keep_vars or is_lazy(value)
            destination[prefix + name] = value if kept else value.detach()

    def _lazy_load_hook(self, state_dict: "StateDict", prefix: str, *more: object) -> None:
        """Before a state is loaded: give uninitialized parameters the shapes in the state."""
        for name, param in itertools.chain(self._parameters.items(), self._buffers.items()):
            given = state_dict.get(prefix + name)
            if given is not None and is_lazy(param) and not is_lazy(given):
                with torch.no_grad():
                    param.materialize(given.shape)

    def initialize_parameters(self, *args, **kwargs) -> Any:  # type: ignore[no-untyped-def]
        """Give the parameters the shapes that follow from the inputs of a call."""
        raise NotImplementedError(
            f"initialize_parameters is not implemented for {self.__class__.__name__}"
        )

    def has_uninitialized_params(self):  # type: ignore[no-untyped-def]
        """Are there parameters or buffers without a shape?"""
        return any(map(is_lazy, (*self._parameters.values(), *self._buffers.values())))

    def _infer_parameters(
        self,
        module: Any,
        args: tuple[object, ...],
        kwargs: dict[str, object] | None = None,
    ) -> None:
        """Before its first call."""
        module.initialize_parameters(*args, **(kwargs or {}))
        if module.has_uninitialized_params():
            raise RuntimeError(f"module {self._get_name()} has not been fully initialized")
        module._initialize_hook.remove()
        module._load_hook.remove()
        del module._initialize_hook
        del module._load_hook
        if module.cls_to_become is not None:
            module.__class__ = module.cls_to_become

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "Modules with uninitialized parameters can't be used with `DataParallel`. "
            "Run a dummy forward pass to correctly initialize the modules"
        )
