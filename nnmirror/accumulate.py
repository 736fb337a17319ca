"""The `.grad` of a leaf, and what a backward adds to it."""

import contextlib
import threading

import torch

from . import beyond
from . import tensor as _tensor
from ._torch import EnableTorchFunction
from .tensor import C_grad, C_shape

_NOT_OURS = object()


def grad_of(leaf: torch.Tensor) -> torch.Tensor | None:
    """Its gradient, without the public property."""
    grad = getattr(leaf, "_gradient", _NOT_OURS)
    return C_grad.__get__(leaf) if grad is _NOT_OURS else grad  # type: ignore[return-value]


def put_grad(leaf: torch.Tensor, grad: torch.Tensor | None) -> None:
    """Set this gradient, which is known to fit."""
    if isinstance(leaf, _tensor.Tensor):
        leaf._gradient = grad
    else:
        C_grad.__set__(leaf, grad)


# Walks of two threads may reach the same leaf at the same time; each reads its .grad and then adds
# to it.
accumulating = threading.RLock()


def accumulate(
    leaf: torch.Tensor, grad: torch.Tensor, may_keep: bool | str, create_graph: bool = False
) -> None:
    """Add `grad` to `leaf.grad`, like PyTorch's AccumulateGrad.

    The first gradient itself becomes `.grad` if nothing else refers to it (`may_keep`) and it has
    the leaf's layout; otherwise it is copied. Later ones are added in place.
    """
    with accumulating:
        add_to_grad(leaf, grad, may_keep, create_graph)


def add_to_grad(
    leaf: torch.Tensor, grad: torch.Tensor, may_keep: bool | str, create_graph: bool = False
) -> None:
    held = grad_of(leaf)
    if create_graph:
        with EnableTorchFunction():
            put_grad(leaf, _laid_out_as(leaf, grad) if held is None else held + grad)
        return
    if not isinstance(leaf, _tensor.Tensor) and beyond.may_have_accumulator(leaf):
        beyond.accumulate([(leaf, grad)], retain_graph=False)
        return
    if held is None:
        if (  # the usual case; the code below would do the same
            may_keep
            and type(grad) is torch.Tensor
            and (shape := grad.shape) == C_shape(leaf)
            and 0 not in shape  # contiguous for any strides
            and leaf.is_contiguous()
            and grad.is_contiguous()
            and not grad._is_view()
        ):
            put_grad(leaf, grad)
            return
    else:
        if held.layout is not torch.strided and grad.layout is torch.strided:
            put_grad(leaf, grad + held)
        else:
            held.add_(grad)
        return
    if leaf.is_contiguous() and leaf.numel():
        fits = grad.is_contiguous()
    else:
        fits = grad.stride() == leaf.stride()
    if not (may_keep and fits and grad.shape == leaf.shape):
        grad = _laid_out_as(leaf, grad)
    elif grad._is_view():  # a copy, as there may be other references
        grad = grad.clone()
    if type(grad) is not torch.Tensor:
        grad = grad.detach()
    put_grad(leaf, grad)


def retained(held: torch.Tensor | None, grad: torch.Tensor, create_graph: bool) -> torch.Tensor:
    """The `.grad` of a result that retains its gradient, which was `held`."""
    with EnableTorchFunction() if create_graph else contextlib.nullcontext():
        return grad.clone() if held is None else held + grad


def _laid_out_as(leaf: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """A copy of `grad` in the layout of the leaf."""
    layout = torch.preserve_format if is_dense(leaf) else torch.contiguous_format
    return torch.empty_like(leaf.detach(), memory_format=layout).copy_(grad)


def is_dense(tensor: torch.Tensor) -> bool:
    """Non-overlapping and dense, so that the strides describe its layout completely."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
