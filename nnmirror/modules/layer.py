"""Layer: a module that is one operation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _state
from .._state import sequence as _sequence
from .._torch import DisableTorchFunctionSubclass
from .._types import TorchFunction
from ..grad_mode import is_grad_enabled
from ..operation import Operation
from ..overrides import is_subclass
from ..rules.shape import Stack, Unbind
from ..tape import in_transform_or_forward_mode, record
from ..tensor import Tensor
from .explicit import Each, OfComplex, Stacked, Traced, untracked, way_back
from .module import Module


class Layer(Module):
    """The base of the mirrored layers: `forward` runs one operation and keeps its node.

    The node is kept even if nothing requires grad, so that a single layer can be driven by hand:
    `y = layer.forward(x); dx = layer.backward(dy)`.

    Given a tuple of tensors, a layer returns a tuple. Tensors of the same shape are stacked to a
    batch, and computed with one call.
    """

    def _run(self, function: type[Operation], *args: object) -> Any:
        if type(args[function.input_place]) is tuple:
            return self._run_on_tuple(function, args)
        exact = function.exact
        can_wait = function.can_wait and (exact is None or exact.can_wait) and not _state.taps
        out, node = record(function, args, for_layer=not can_wait)
        own = self.__dict__
        if node is None:
            own["_call"] = untracked(function, args, out)
            return out
        own["_call"] = node
        node.caller = own["_parameters"]
        return out

    def _run_on_tuple(self, function: type[Operation], args: tuple[Any, ...]) -> tuple[Any, ...]:
        place = function.input_place
        items = args[place]
        tuples = function.tuple_places
        if not items:
            raise TypeError("nnmirror: a layer was given an empty tuple")
        for item in items:
            if not isinstance(item, torch.Tensor):
                raise TypeError(f"items of a tuple must be Tensor, not {type(item).__name__}")
        if any(type(args[i]) is not tuple or len(args[i]) != len(items) for i in tuples):
            raise TypeError("nnmirror: input and target must be tuples of one length")
        alike = len({(t.shape, t.dtype, t.device) for t in items}) == 1
        if len(tuples) == 1 and alike and not function.is_inplace:
            return self._run_stacked(
                items, lambda batch: self._run(function, *args[:place], batch, *args[place + 1 :])
            )
        # Different shapes, or an input and a target: item by item.
        outs, calls = [], []
        for i in range(len(items)):
            outs.append(
                self._run(function, *[a[i] if k in tuples else a for k, a in enumerate(args)])
            )
            calls.append(way_back(self._call))
        self.__dict__["_call"] = Each(calls)
        return tuple(outs)

    def _run_whole(self, function: TorchFunction, *inputs: Any) -> Any:
        """function(*inputs) for a tensor subclass: dispatched as a whole, not operation by
        operation."""
        out = function(*inputs)
        with DisableTorchFunctionSubclass():
            self.__dict__["_call"] = Traced(inputs, out) if is_grad_enabled() else None
        return out

    def _run_stacked(self, items: tuple[object, ...], run: Callable[[Any], Any]) -> tuple[Any, ...]:
        """One call on the items as a batch."""
        out = run(record(Stack, (0, *items))[0])
        self.__dict__["_call"] = Stacked(way_back(self._call), len(items))
        return tuple(record(Unbind, (out, 0))[0])

    def _run_several(
        self, function: TorchFunction, inputs: tuple[object, ...], others: tuple[object, ...] = ()
    ) -> Any:
        """function(*inputs, *others), perhaps several recorded calls, kept for `backward`.

        As with any layer, tuples are taken item by item, and `backward` gives a gradient for
        each of `inputs` whether or not it requires one; of `others` (targets) it gives none.
        """
        if type(inputs[0]) is tuple:
            count = len(inputs[0])
            if any(type(v) is not tuple or len(v) != count for v in (*inputs, *others)):
                raise TypeError("nnmirror: input and target must be tuples of one length")
            outs, calls = [], []
            for items in zip(*inputs, *others, strict=True):
                split = len(inputs)
                outs.append(self._run_several(function, items[:split], items[split:]))
                calls.append(way_back(self._call))
            self.__dict__["_call"] = Each(calls)
            return tuple(outs)
        if not is_grad_enabled() or in_transform_or_forward_mode():
            self.__dict__["_call"] = None
            return function(*inputs, *others)
        if any(map(is_subclass, (*inputs, *others))):
            return self._run_whole(function, *inputs, *others)
        tracked = all(type(x) is Tensor and x.requires_grad for x in inputs)  # nearly always
        given = inputs
        if not tracked:
            given_tensors = [x for x in (*inputs, *others) if isinstance(x, torch.Tensor)]
            is_complex = any(x.is_complex() for x in given_tensors)
            if is_complex and not any(x.requires_grad for x in given_tensors):
                self.__dict__["_call"] = OfComplex(type(self).__name__)
                return function(*inputs, *others)
            given = tuple(_leaf_of_its_own(x) for x in inputs)
        began = next(_sequence)
        out = function(*given, *others)
        own = self.__dict__
        own["_call"] = Traced(given, out, False, began)
        if type(out) is Tensor and out._node is not None:
            out._node.caller, out._node.began = own["_parameters"], began
        if tracked:
            return out
        apart = any(x is not y for x, y in zip(inputs, given, strict=True))
        tensors = (*inputs, *others, *self._weights()) if apart else ()
        if apart and not any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors):
            # The caller gets a result that does not require grad.
            return tuple([t.detach() for t in out]) if type(out) is tuple else out.detach()
        return out

    def _weights(self) -> list[torch.Tensor | None]:
        """Its parameters, except one given as a number, such as an `eps`."""
        numbers: Sequence[str] = getattr(type(self), "__constants__", ())
        return [p for name, p in self._parameters.items() if name not in numbers]


def _leaf_of_its_own(x: object) -> Any:
    """An alias that requires grad of an input that does not, for `Module.backward`; else itself."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return x if x.requires_grad or x.is_inference() else x.detach().requires_grad_()
