"""Parameters of the two libraries that share memory, as the bridge makes them.

Their gradients: PyTorch's backward adds to the `.grad` of the mirrored parameter too, as the two
`.grad`s of a pair that `to_torch` made are the same tensor. The other direction would need a hook
on every mirrored parameter, which would slow each backward down; instead, an optimiser warns if its
parameters have no gradient, but their twins do.
"""

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

_twins = WeakTensorKeyDictionary()  # parameter -> its latest twin, weakly
_ELSEWHERE = (
    "nnmirror: an optimizer's step changes nothing, as none of its parameters has a .grad; but"
    " their twins, which nnmirror.from_torch or to_torch made on the same memory, have. Give the"
    " optimizer the parameters() of the model that is trained."
)


def pair(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Register two parameters that share memory."""
    _twins[theirs] = TensorWeakRef(ours)
    _twins[ours] = TensorWeakRef(theirs)
    _watch_torchs_optimisers()


def share_gradient(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """From now on PyTorch's backward adds to the gradient of both, as long as they share memory."""
    if not (theirs.is_floating_point() or theirs.is_complex()):
        return
    shared = SharedGradient(theirs, ours)
    requires_grad = theirs.requires_grad
    theirs.requires_grad_(True)  # a frozen one may be trained later
    theirs.register_hook(shared.before)
    theirs.register_post_accumulate_grad_hook(shared.after)
    theirs.requires_grad_(requires_grad)


def is_sharing(hook: object) -> bool:
    """Is it one of the hooks that `share_gradient` registers?"""
    return isinstance(getattr(hook, "__self__", None), SharedGradient)


def warn_if_elsewhere(params: Iterable[torch.Tensor]) -> None:
    """Given parameters without a gradient: warn if their twins have one."""
    if not _twins:
        return
    for param in params:
        twin = _twin(param)
        if twin is not None and twin.grad is not None:
            warnings.warn(_ELSEWHERE, stacklevel=2)
            return


def _twin(param: torch.Tensor) -> torch.Tensor | None:
    """The twin, as long as both share memory."""
    found = _twins.get(param)
    twin = None if found is None else found()
    return twin if twin is not None and _are_one(param, twin) else None


def _are_one(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype is other.dtype
        and one.shape == other.shape
        and one.device == other.device
        and one.data_ptr() == other.data_ptr()
    )


@functools.cache
def _watch_torchs_optimisers() -> None:
    """Make each optimiser warn before a step (once per process)."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(_before_a_step)


def _before_a_step(optimizer: "torch.optim.Optimizer", args: object, kwargs: object) -> None:
    for group in optimizer.param_groups:
        if all(p.grad is None for p in group["params"]):
            warn_if_elsewhere(group["params"])


class SharedGradient:
    """The hooks on PyTorch's parameter that keep its `.grad` and its twin's the same tensor.

    The shared `.grad` is marked, to detect which side has replaced it since.
    """

    def __init__(self, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        self.theirs = TensorWeakRef(theirs)
        self.ours = TensorWeakRef(ours)

    def _both(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        theirs, ours = self.theirs(), self.ours()
        if theirs is None or ours is None or not _are_one(theirs, ours):
            return None
        return theirs, ours

    def before(self, grad: torch.Tensor) -> None:
        """Before PyTorch adds to its `.grad`: make it the twin's."""
        both = self._both()
        if both is None:
            return
        theirs, ours = both
        held, mirrored = theirs.grad, ours.grad
        if mirrored is None:
            if _is_marked(held):  # zero_grad() on the mirror's side
                theirs.grad = None
        elif held is None:
            if _is_marked(mirrored):  # on PyTorch's
                ours.grad = None
            else:
                theirs.grad = mirrored
        elif not _are_one(held, mirrored):
            if _is_marked(held):
                theirs.grad = mirrored  # the mirror's backward has made a new one
            elif not _is_marked(mirrored):
                theirs.grad = held + mirrored

    def after(self, leaf: torch.Tensor) -> None:
        """After PyTorch has added to it."""
        both = self._both()
        if both is None:
            return
        theirs, ours = both
        grad: Any = theirs.grad
        grad._of_twins = True
        if grad.requires_grad:  # from a backward with create_graph=True
            grad = grad.detach()
            grad._of_twins = True
        ours.grad = grad


def _is_marked(grad: object) -> bool:
    return getattr(grad, "_of_twins", False)
