"""A backward that is itself recorded, for gradients of gradients (`create_graph=True`).

A rule's gradients are made of operations that have rules. So the walk with `create_graph=True`
calls them with tracked tensors in place of the saved ones, and the tape records the computation.
Each saved tensor is connected to its origin:

- an argument of the call: by the node's edge for it;
- a result: by the node itself;
- a mask or indices that the forward keeps: no gradient goes through it;
- a value that it keeps and that is `derived` from the arguments (a mean): the rule's `<name>_again`
  computes it again from the arguments, in operations that have rules.

A gradient that is not made of such operations (one that is written for speed, or follows a
kernel's rounding) is a rule of its own, with a forward and gradients: see rules/gradient.py.
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import tape as _tape
from . import tensor as _tensor
from ._torch import DisableTorchFunction, DisableTorchFunctionSubclass, EnableTorchFunction
from ._upcalls import implements
from .formula import Plan
from .node import Edge, Node
from .operation import Operation

T = torch.Tensor


@implements(_tape)
def run_recorded(
    node: Node, grads: Sequence[T | None], needs: tuple[bool, ...]
) -> Sequence[T | None]:
    """The gradients of a node's arguments that are needed, recorded.

    This is `node.run` for `create_graph=True`.
    """
    again = node.copied()
    again.creates_graph = True
    if node._saved:
        with DisableTorchFunctionSubclass():  # saved results have the node itself as their history
            again._saved, again._versions = _restored(node)
    if node.attributes is not None:
        recorded = again.run(grads)
        if again._saved is None:  # it may be read only once
            node.free()
        return recorded
    again.needs_input_grad = needs
    plain = _plain_form(node.function)
    if plain is not None:
        again.function, again.plan = plain, _plan_of(again, plain)
    with EnableTorchFunction():
        recorded = again.run(grads)
    _refuse_lost(node, grads, recorded)
    if plain is None:
        return recorded
    with torch.no_grad():  # the bits are those of the exact form
        exact = needing(node, needs).run([None if g is None else g.detach() for g in grads])
    for to, value in zip(recorded, exact, strict=True):
        if isinstance(to, _tensor.Tensor):
            _tensor._C_data.__set__(to, value)
    return recorded


def _refuse_lost(node: Node, grads: Sequence[T | None], results: Sequence[T | None]) -> None:
    """Raise if a gradient carries no history although it depends linearly on tensors that do."""
    if not any(g is not None and g.requires_grad for g in grads):
        return
    for result in results:
        if result is not None and type(result) is T:
            with DisableTorchFunction():  # not seen by what writes a replay, which looks itself
                is_lost = bool(result.count_nonzero())
            if is_lost:
                raise _no_second(node.function)


def _plain_form(function: type[Operation]) -> type[Operation] | None:
    """The rule of which `function` is the exact form: the same gradients, in operations that have
    rules."""
    base = function.__mro__[1]
    is_form = getattr(base, "exact", None) is function and not function.is_recordable
    return base if is_form else None


def _plan_of(node: Node, rule: type[Operation]) -> Plan:
    """The plan of a node, for the gradients of another rule with the same forward."""
    plan, formulas = node.plan, rule.formulas
    if plan is None or formulas is None:
        raise _no_second(rule)
    needed = formulas.needed_for(node.needs_input_grad)
    if not needed <= {*plan.names, *plan.given_names, *(plan.arguments or ()), "g", "gs"}:
        raise _no_second(rule)
    return plan.for_other()


@implements(_tape)
def needing(node: Node, needs: tuple[bool, ...]) -> Node:
    """The node as its backward sees it if only some of the gradients are needed."""
    if needs == node.needs_input_grad or node.attributes is not None:
        return node  # a user's Function sees all that require grad, as in PyTorch
    asked = node.copied()
    asked.needs_input_grad = needs
    return asked


def _restored(node: Node) -> tuple[Sequence[T | None], Sequence[int | None]]:
    """The saved tensors, connected to their origins; and their versions when saved."""
    saved, versions = list(node._saved or ()), list(node._versions)
    if node.attributes is not None:
        return [_of_user(node, tensor) for tensor in saved], versions
    plan, function = node.plan, node.function
    if plan is None:
        places = function.saves_of(node)
        if places is None:
            if any(isinstance(t, T) and t.is_floating_point() for t in saved):
                raise _no_second(function)
            return saved, versions
        names: Sequence[str] = ()
    else:
        places, names = plan.saves, plan.names
    as_result = (node.view_node and node.view_node()) or node
    for i, tensor in enumerate(saved):
        if tensor is None:
            continue
        if i < len(places):
            place = places[i]
            if place >= 0:
                saved[i] = tracked_alias(function.leading(place, tensor), node.edges[place])
            else:
                saved[i] = tracked_alias(tensor, (as_result, ~place))
    for i in range(len(places), len(saved)):
        if saved[i] is not None and names[i] in function.derived:
            value = node.saved(i)
            again = saved[i] = _derived(node, names[i], saved)
            if isinstance(again, _tensor.Tensor):
                with DisableTorchFunction():  # no part of what a replay records
                    has_bits = again.is_set_to(value)
                if not has_bits:
                    _tensor._C_data.__set__(again, value)  # with the bits of the forward
            versions[i] = again._version
    return saved, versions


def _of_user(node: Node, tensor: T | None) -> T | None:
    """What a user's Function saved, with its history."""
    if not isinstance(tensor, T):
        return tensor
    index = getattr(tensor, "_alias_of_output", None)
    if index is not None:
        return tracked_alias(tensor, (node, index))
    if isinstance(tensor, _tensor.Tensor) or not tensor.requires_grad:
        return tensor
    return tracked_alias(tensor, (tensor, 0))


def tracked_alias(tensor: T, edge: Edge | None) -> T:
    """`tensor` as a tracked one, whose gradient goes to `edge`."""
    if edge is None or not tensor.is_floating_point():
        return tensor if type(tensor) is T and not tensor.requires_grad else tensor.detach()
    target, index = edge
    if isinstance(target, Node):
        return alias_of(tensor, target, index)
    own = isinstance(target, _tensor.Tensor)
    if own and (target is tensor or vars(target).get("_plain") is tensor):
        return target
    alias: Any = tensor.detach()
    alias.__class__ = _tensor.Tensor
    alias._stands_for, alias._requires_grad = target, True
    return alias  # type: ignore[no-any-return]


def alias_of(tensor: T, node: Node, index: int) -> _tensor.Tensor:
    """`tensor` as output `index` of `node`."""
    alias: Any = tensor.detach()
    alias.__class__ = _tensor.Tensor
    alias._node, alias._output_nr = node, index
    return alias  # type: ignore[no-any-return]


def _derived(node: Node, name: str, saved: Sequence[object]) -> T:
    """A value that the forward derived from the arguments, computed again from them."""
    function, plan = node.function, node.plan
    again = getattr(function, f"{name}_again", None)
    if again is None or plan is None:
        raise _no_second(function)
    known = dict(zip(plan.names, saved, strict=True))
    known.update(plan.arguments or dict(zip(plan.given_names, node.given, strict=True)))
    names = again.__code__.co_varnames[: again.__code__.co_argcount]
    if any(n not in known for n in names):
        raise _no_second(function)
    with EnableTorchFunction():
        return again(*[known[n] for n in names])  # type: ignore[no-any-return]


def _no_second(function: type[Operation]) -> NotImplementedError:
    return NotImplementedError(
        f"nnmirror: a gradient of the gradient of {function.__name__} is not mirrored, and"
        " create_graph=True asks for it. Compute this loss with nnmirror.to_torch(model): it has"
        " the same weights, and what its backward adds to a gradient is added to the model's"
    )
