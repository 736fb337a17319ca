"""The subject of a check: a module, a Function or a function, and the tensors that get
gradients."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .._torch import tree_flatten, tree_unflatten


class Subject:
    """A module of either library, a Function (its `apply`), or any function of tensors."""

    def __init__(self, subject: Any) -> None:
        is_function = isinstance(subject, type) and hasattr(subject, "apply")
        self.call: Callable[..., Any] = subject.apply if is_function else subject
        self.is_module = not is_function and hasattr(subject, "named_parameters")
        self.module: Any = subject if self.is_module else None
        self.name = getattr(subject, "__name__", type(subject).__name__)
        if is_function:
            self._forward = subject.forward
        else:
            self._forward = subject.forward if self.is_module else subject

    def parameters(self) -> dict[str, torch.Tensor]:
        """Those of a module that require grad, by name."""
        named = self.module.named_parameters() if self.is_module else ()
        return {name: p for name, p in named if p.requires_grad}

    def buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.module.named_buffers()) if self.is_module else {}

    def input_names(self, count: int) -> list[str]:
        """The names of its positional arguments; inputs[0] for those without a name."""
        try:
            parameters = inspect.signature(self._forward).parameters.values()
        except (TypeError, ValueError):  # a builtin
            parameters = {}.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [p.name for p in parameters if p.kind in kinds]
        if names[:1] == ["ctx"]:
            names = names[1:]
        taken = self.parameters()
        names = [name if name not in taken else "" for name in names[:count]]
        names += [""] * (count - len(names))
        return [name or f"inputs[{i}]" for i, name in enumerate(names)]


def mapped(value: object, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with each tensor in it replaced by `function` of it."""
    leaves, spec = tree_flatten(value)
    return tree_unflatten([function(x) if isinstance(x, torch.Tensor) else x for x in leaves], spec)


def random_gradient(output: torch.Tensor) -> torch.Tensor:
    """A gradient for `output`: the same random numbers each time, from a generator of its own."""
    numbers = torch.Generator().manual_seed(0)
    drawn = torch.randn(output.shape, generator=numbers, dtype=torch.float64, device="cpu")
    return drawn.to(output.device, output.dtype)
