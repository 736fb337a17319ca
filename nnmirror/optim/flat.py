"""Many small parameters stepped as one.

Each operation of an optimiser is elementwise, and on a small net takes longer to say than to
do. So the parameters of a group, their gradients and what is kept for them are laid side by
side, and a step is that of one tensor, with the same bits.
"""

import itertools
import sys
from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..parameter import Parameter

Lists = dict[str, list[Any]]

_SMALL = 2**18  # elements of all parameters: beyond, copying them costs more than it saves
_MOST_MADE = 16
_FLOATS = (torch.float32, torch.float64)
_plain = attrgetter("_plain")


def _plains(params: list[Any]) -> list[Tensor]:
    """The same memory as tensors of torch's own class, which it takes sooner."""
    return [*map(_plain, params)] if {*map(type, params)} == {Parameter} else params


def _apart(tensors: list[Tensor]) -> bool:
    """Does each have memory of its own?"""
    places = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    return all(a[1] <= b[0] for a, b in itertools.pairwise(places))


def _storages(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def _unheld(tensors: list[Tensor]) -> bool:
    """Does nobody hold these but a dict and this list?"""
    return all(sys.getrefcount(t) <= 4 for t in tensors)  # those two, t, and the argument


class Flat:
    """The parameters of a group, and what is kept for them, side by side.

    What the optimiser's state holds is exchanged for tensors in the same memory (`parts`).
    Where somebody holds a tensor of it, who would see it no longer change, it is copied at
    each step instead, as the parameters are. `step`, a counter for each parameter, is taken
    for one, as long as all are equal.
    """

    def __init__(self, lists: Lists) -> None:
        self.params = lists["params"]
        self.names = lists.keys() - {"params", "grads"}
        self.is_copied = not all(_unheld(lists[name]) for name in self.names)
        shapes = [p.shape for p in self.params]
        with torch.inference_mode(False), torch.no_grad():
            self.param, self.param_parts = _laid_out(self.params, shapes)
            self.grad, self.grad_parts = _laid_out(self.params, shapes)
            self.kept: dict[str, Tensor] = {}
            self.parts: Lists = {}
            for name in self.names:
                of = [torch.Size(())] * len(shapes) if name == "step" else shapes
                self.kept[name], self.parts[name] = _laid_out(lists[name], of)
        self.steps = self.kept.get("step")
        if self.steps is not None:
            self.kept["step"] = self.parts["step"][0]
        self.given = {
            name: lists[name] if self.is_copied else self.parts[name] for name in self.names
        }
        self.storages = _storages([*self.params, *(t for ts in self.given.values() for t in ts)])

    def is_of(self, lists: Lists) -> bool:
        """Are these the parameters and the kept tensors that it was made of?"""
        if lists.keys() - {"params", "grads"} != self.names:
            return False
        if not _same(lists["params"], self.params):
            return False
        return all(_same(lists[name], given) for name, given in self.given.items())

    def takes(self, grads: list[Tensor]) -> bool:
        """Are these plain gradients, with memory apart from all that a step changes?"""
        dtype = self.param.dtype
        return all(
            g.dtype is dtype and g.layout is torch.strided and g.is_cpu for g in grads
        ) and _storages(grads).isdisjoint(self.storages)

    def step(self, grads: list[Tensor], one: Callable[..., None]) -> bool:
        """Take a step: `one(param=..., grad=..., ...)` is that of one parameter.

        False if the counters are not the same.
        """
        copied = self.given if self.is_copied else {}
        for name, given in copied.items():
            torch._foreach_copy_(self.parts[name], given)
        if self.steps is not None and len({*self.steps.tolist()}) > 1:
            return False
        plains = _plains(self.params)
        torch._foreach_copy_(self.grad_parts, grads)
        torch._foreach_copy_(self.param_parts, plains)
        before = self.param._version
        one(param=self.param, grad=self.grad, **self.kept)
        if self.steps is not None:
            self.steps.fill_(self.kept["step"])
        for name, given in copied.items():
            torch._foreach_copy_(given, self.parts[name])
        torch._foreach_copy_(plains, self.param_parts)
        # Who saved a parameter for a backward is told of as many changes as there were.
        for _ in range(self.param._version - before - 1):
            torch._C._increment_version(plains)
        return True


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _laid_out(tensors: list[Tensor], shapes: list[torch.Size]) -> tuple[Tensor, list[Tensor]]:
    """A copy of the tensors in one piece, and its parts, no views of anything."""
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    parts = flat.split([shape.numel() for shape in shapes])
    return flat, [p.view(shape).detach() for p, shape in zip(parts, shapes, strict=True)]


def _can_be_flat(lists: Lists) -> bool:
    """Whether stepping these parameters as one is stepping one after the other, and quicker."""
    params, dtype = lists["params"], lists["params"][0].dtype
    if len(params) < 2 or dtype not in _FLOATS or sum(p.numel() for p in params) > _SMALL:
        return False
    if not all(is_usual(p) and p.is_cpu and p.dtype is dtype and p.is_contiguous() for p in params):
        return False
    kept: list[Tensor] = []
    for name in lists.keys() - {"params", "grads"}:
        kept += lists[name]
        for t, p in zip(lists[name], params, strict=True):
            if type(t) is not Tensor or not t.is_cpu or t.requires_grad or t.is_inference():
                return False
            if name == "step":
                if t.dim() != 0 or t.dtype is not lists[name][0].dtype:
                    return False
            elif t.shape != p.shape or t.dtype is not dtype or not t.is_contiguous():
                return False
    return _apart([*params, *kept])


def step_as_one(optimizer: Any, place: int, lists: Lists, one: Callable[..., None]) -> bool:
    """Step the group at `place` as one parameter, by `one`.

    False if its parameters are to be stepped one after the other.
    """
    if not _has_numbers(optimizer.param_groups[place]):
        return False
    flats: dict[int, tuple[Flat, int]] = optimizer.__dict__.setdefault("_flats", {})
    flat, made = flats.get(place, (None, 0))
    if flat is None or not flat.is_of(lists):
        # Where other parameters have a gradient at each step, it does not pay.
        if made == _MOST_MADE or not _can_be_flat(lists):
            return False
        flat = Flat(lists)
        flats[place] = flat, made + 1
        for name, given in flat.given.items():
            lists[name] = given
            for param, kept in zip(flat.params, given, strict=True):
                optimizer.state[param][name] = kept
    return flat.takes(lists["grads"]) and flat.step(lists["grads"], one)


def _has_numbers(group: dict[str, Any]) -> bool:
    """Are the options numbers, none of them a tensor?"""
    options = [*group.values(), *group.get("betas", ())]
    return {*map(type, options)}.isdisjoint(_TENSORS)


_TENSORS = {Tensor, Parameter}


def is_usual(param: Tensor) -> bool:
    """No subclass, the parameters of either library apart."""
    kind = type(param)
    return kind in (Tensor, Parameter) or kind.__module__ == "torch.nn.parameter"
