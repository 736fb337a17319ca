"""Runs the hooks of leaves, results and nodes in a backward, and checks what they return."""

from collections.abc import Mapping, Sequence

import torch

from . import tensor as _tensor
from ._types import Hook
from .accumulate import accumulate, retained
from .grad_mode import users_code
from .node import Node
from .running import running


def finish_leaf(leaf: torch.Tensor, grad: torch.Tensor | None, unshared: bool) -> None:
    """Add the gradient of a leaf to its `.grad`; its hooks are called even without one."""
    hooks = leaf_hooks(leaf)
    if hooks:
        grad = run_tensor_hooks(hooks, grad)
        unshared = False
    before = after = None
    if isinstance(leaf, _tensor.Tensor) and leaf._accumulate_hooks is not None:
        before, after = leaf._accumulate_hooks
        unshared = False
    if before:
        (grad,) = run_prehooks(before, [grad])
    if grad is not None and leaf.requires_grad:  # otherwise it was frozen after the forward
        accumulate(leaf, grad, unshared, running.creates_graph)
    run_post_accumulate_hooks(leaf, running.creates_graph)
    if after:
        run_posthooks(after, (), [], (grad,))


def run_post_accumulate_hooks(leaf: torch.Tensor, creates_graph: bool) -> None:
    if not (isinstance(leaf, _tensor.Tensor) and leaf._post_accumulate_hooks):
        return
    returned = None
    for hook in tuple(leaf._post_accumulate_hooks.values()):
        with users_code(creates_graph):
            result = hook(leaf)
        if result is not None:
            returned = _replacement(hook, leaf, result)
    if returned is not None:
        raise RuntimeError("Tensor post accumulate grad hooks should return None.")


def run_reached_hooks(leaf: torch.Tensor) -> None:
    if isinstance(leaf, _tensor.Tensor) and leaf._reached_hooks:
        for hook in tuple(leaf._reached_hooks.values()):
            hook()


def leaf_hooks(leaf: torch.Tensor) -> dict[int, Hook] | None:
    return leaf._leaf_hooks if isinstance(leaf, _tensor.Tensor) else None


def run_tensor_hooks(
    hooks: dict[int, Hook] | None, grad: torch.Tensor | None
) -> torch.Tensor | None:
    """Call each hook with the gradient, None as by PyTorch; what it returns replaces it."""
    for hook in tuple(hooks.values()) if hooks else ():
        with users_code(running.creates_graph):
            result = hook(grad)
        if result is not None:
            grad = _replacement(hook, grad, result)
    return grad


def _hook_name(hook: object) -> str:
    return getattr(hook, "__name__", "unknown")


def _replacement(hook: object, grad: torch.Tensor | None, result: object) -> torch.Tensor | None:
    """The result of a hook, checked against `grad`."""
    if result is None or result is grad:
        return result
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"expected Variable, but hook returned '{type(result).__name__}'")
    if grad is not None:
        if result.dtype is not grad.dtype:
            raise RuntimeError(
                f"hook '{_hook_name(hook)}' has changed the type of value"
                f" (was {torch.Tensor.type(grad)} got {torch.Tensor.type(result)})"
            )
        if result.shape != grad.shape:
            raise RuntimeError(f"hook '{_hook_name(hook)}' has changed the size of value")
    return result.detach() if result.requires_grad and not running.creates_graph else result


def _replacements(
    hook: object, grads: tuple[torch.Tensor | None, ...], result: object
) -> tuple[torch.Tensor | None, ...]:
    """The result of a node's hook, checked against its gradients."""
    if not isinstance(result, tuple):
        raise TypeError(f"expected tuple, but hook returned '{type(result).__name__}'")
    if len(result) != len(grads):
        raise RuntimeError(
            f"hook '{_hook_name(hook)}' has returned an incorrect number of values"
            f" (got {len(result)}, but expected {len(grads)})"
        )
    return tuple(_replacement(hook, g, r) for g, r in zip(grads, result, strict=True))


def run_output_hooks(node: Node, slots: list[torch.Tensor | None]) -> None:
    for index, grad in enumerate(slots):
        if node.tensor_hooks is not None:
            grad = slots[index] = run_tensor_hooks(node.tensor_hooks.get(index), grad)
        if grad is not None and node.retained is not None and index in node.retained:
            tensor = node.retained[index]()
            if tensor is not None:
                tensor._gradient = retained(tensor._gradient, grad, running.creates_graph)


def run_prehooks(
    hooks: Mapping[int, Hook], slots: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    with users_code(running.creates_graph):
        for hook in tuple(hooks.values()):
            result = hook(tuple(slots))
            if result is not None:
                slots = list(_replacements(hook, tuple(slots), result))
    return slots


def run_posthooks(
    hooks: Mapping[int, Hook],
    places: Sequence[int],  # of the results that are shown
    results: list[torch.Tensor | None],
    slots: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    with users_code(running.creates_graph):
        for hook in tuple(hooks.values()):
            grads = tuple(results[i] for i in places)
            result = hook(grads, tuple(slots))
            if result is None:
                continue
            for place, grad in zip(places, _replacements(hook, grads, result), strict=True):
                results[place] = grad
    return results
