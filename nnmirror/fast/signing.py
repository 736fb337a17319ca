"""How a recorded call gets its signature, and finds the one that it had before.

The signature of a call is stored with that of its first argument that has one, under a key that
represents the other arguments: the serials of their signatures, the layouts of plain tensors, and
all other values.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .. import formula
from .. import tensor as _tensor
from .._torch import DisableTorchFunctionSubclass
from .._types import Args
from ..node import Edge, Node
from ..operation import Operation
from ..origin import of_this_call
from . import call as _call
from .leaves import signature_of_leaf
from .signature import (
    FROZEN,
    MASKS,
    MORE,
    NO_CALLS,
    NUMBERS,
    SIZES,
    THEIRS,
    Behind,
    Family,
    Kept,
    LeafSignature,
    Made,
    Signature,
    Sizes,
    Unsigned,
    integers_in,
    layout_for_any_size,
    names_size,
    numbers_apart,
    of_tensor,
    of_value,
    of_value_for_any_size,
)

HERE = object()  # in a key, after the part before the first argument that has a signature
NO_SIGNED_INPUT = LeafSignature()  # stores the calls that have none but torch's own tensors
IN_PLACE = object()  # at the beginning of a key: the first argument is changed


def signature_at(edge: Edge) -> Signature | None:
    """The signature of the target of an edge."""
    target, index = edge
    if isinstance(target, Node):
        sign = target.signature
        return sign.output(index) if index and sign is not None else sign
    if not isinstance(target, _tensor.Tensor):
        return None
    return target._signature or signature_of_leaf(target)


class CallOfFamily(NamedTuple):
    """A call on members of families, for any sizes."""

    stored_with: Signature
    key: object
    sizes: Sizes
    numbers_vary: bool


class SignedCall(NamedTuple):
    """A call that has a signature, or gets one."""

    stored_with: Signature  # the first argument's, which stores it
    key: object  # under which it is stored
    numbers_vary: bool  # are numbers operands?
    of_family: CallOfFamily | None


def signed_call(
    function: type[Operation],
    args: Args,
    edges: Sequence[Edge | None],
    signs: Sequence[Signature | None],
    *more: object,
) -> SignedCall | None:
    """A call on tensors with the signatures `signs`; None if it gets none. Its key begins with
    `more`."""
    key = [*more]
    try:
        first = _add_to_key(key, args, edges, signs)
    except Unsigned:
        return None
    if first is None:
        if THEIRS not in key:
            return None
        first = NO_SIGNED_INPUT
    how = first.varying.get(function)
    if how is MORE:
        return None
    if how is NUMBERS:
        apart = numbers_apart(key)
        if apart is None or not (function.formulas and function.formulas.takes_any_number):
            first.varying[function] = MORE
            return None
        key = apart
    whole = (function, *key) if key else function
    of_family = None if more else _call_of_family(function, args, edges, signs)
    return SignedCall(first, whole, how is NUMBERS, of_family)


def _add_to_key(
    key: list[object],
    args: Args,
    edges: Sequence[Edge | None],
    signs: Sequence[Signature | None],
    sizes: Sizes = (),
) -> Signature | None:
    """Add the arguments to the key of a call, and return the first signature. With `sizes`, these
    stand for any."""
    first: Signature | None = None
    for arg, edge, sign in zip(args, edges, signs, strict=True):
        if sign is not None:
            if first is None:
                first = sign
                if key:
                    key.append(HERE)
            elif sizes and sign.sizes:
                places = tuple([sizes.index(size) for size in sign.sizes])
                key.append(Behind(sign.family_serial, places))
            else:
                key.append(sign.serial)
            continue
        if edge is not None:
            if not _tensor.is_torchs(edge[0]):
                raise Unsigned
            key.append(THEIRS)
        if isinstance(arg, torch.Tensor):
            if type(arg) in _tensor.LEAVES:
                key.append(FROZEN)
            layout = of_tensor(arg)
            key.append(layout_for_any_size(layout, sizes) if sizes else layout)
        else:
            key.append(of_value_for_any_size(arg, sizes) if sizes else of_value(arg))
    return first


def _call_of_family(
    function: type[Operation],
    args: Args,
    edges: Sequence[Edge | None],
    signs: Sequence[Signature | None],
) -> CallOfFamily | None:
    """The call as one of a family; None if it is none: its signature is for one size only."""
    formulas = function.formulas
    if formulas is None or function.is_inplace:
        return None
    of_results = [sign for sign in signs if sign is not None]
    if len(of_results) < len(edges) - [*edges].count(None) or not of_results:
        return None
    stored_with = of_results[0].of_family() or of_results[0]
    how = stored_with.varying.get(function)
    if how is MORE or (how is NUMBERS and not formulas.takes_any_number):
        return None
    found = [size for sign in of_results for size in sign.sizes]
    if how is SIZES:
        dims, numbers = stored_with.varied[function]
        for arg, sign in zip(args, signs, strict=True):
            if sign is None and isinstance(arg, torch.Tensor):
                found += [n for dim, n in enumerate(arg.shape) if n > 1 and dim in dims]
        if numbers:
            every = enumerate(integers_in(args))
            found += [n for place, n in every if n > 1 and place in numbers]
    sizes = tuple(dict.fromkeys(found))  # each once
    if not 0 < len(sizes) <= _MOST_SIZES_OF_ONE:
        return None
    key: list[object] = []
    try:
        _add_to_key(key, args, edges, signs, sizes)
    except Unsigned:
        return None
    if formulas.refuse is not None and any([names_size(arg, sizes) for arg in args]):
        return None  # it may refuse another number
    if how is NUMBERS and (apart := numbers_apart(key)) is not None:
        return CallOfFamily(stored_with, (function, *apart), sizes, True)
    return CallOfFamily(stored_with, (function, *key) if key else function, sizes, False)


def give_signature(node: Node, call: SignedCall, args: Args, out: object, makes_new: bool) -> None:
    """Give `node` the signature of its call, with the result `out`, a new one if necessary."""
    if call.of_family is not None and _give_member(node, call.of_family, args, out, makes_new):
        return
    first = call.stored_with
    sign = first.next.get(call.key)
    if sign is None:
        inputs, frozen = _inputs_of(node, args)
        layout = None
        if _is_single(node) and isinstance(out, torch.Tensor) and out.layout is torch.strided:
            layout = of_tensor(out)
        sign = first.made(node.function, inputs, frozen, layout)
        _describe(sign, node, args, makes_new)
        if node.plan is not None:
            sign.plan = (
                node.plan.labelled(node.label)
                if call.numbers_vary
                else node.plan.fixed(node.given, node.label)
            )
        first.follow(node.function, call.key, sign)
        family = first.of_family()
        if family is not None:
            family.note_apart(node.function)
    elif sign.outputs != node.outputs:
        return
    node.signature = sign


def sign_call(node: Node, first: Signature) -> None:
    """Give `node`, a call on one tensor with the signature `first`, its signature."""
    call = SignedCall(first, node.function, False, None)
    give_signature(node, call, (), None, makes_new=True)


def _inputs_of(node: Node, args: Args) -> tuple[list[Signature], tuple[int, ...]]:
    """The signatures of the inputs of a call, and which frozen weights are among them."""
    signs = [signature_at(edge) for edge in node.edges if edge is not None]
    weights = [arg for arg in args if type(arg) in _tensor.LEAVES]
    frozen = tuple([id(leaf) for leaf in weights if not leaf._requires_grad])
    return [sign for sign in signs if sign is not None], frozen


def _is_single(node: Node) -> bool:
    """Has the call one result, and no view?"""
    return len(node.outputs) == 1 and not node.function.is_view


def _describe(sign: Signature, node: Node, args: Args, makes_new: bool) -> None:
    """Set what `sign` says of calls like that of `node`."""
    sign.places, sign.needs = tuple(node.places), node.needs_input_grad
    sign.outputs, sign.makes_new, sign.plan = node.outputs, makes_new, node.plan
    sign.makes_several = node.function.is_rule and len(node.outputs) > 1 and not makes_new
    sign.label, sign.indices = node.label, node.indices
    sign.origin = node.sequence, of_this_call()
    sign.checks_shape = not node.function.is_rule or (
        node.function.dynamic_output_shape
        and any(isinstance(a, torch.Tensor) and a.dtype in MASKS for a in args)
    )
    sign.is_single = _is_single(node)


_MOST_SIZES_OF_ONE = 6  # of one member


def _give_member(
    node: Node, of_family: CallOfFamily, args: Args, out: object, makes_new: bool
) -> bool:
    """Give `node` the signature of its sizes, in a new family if necessary; is there one?"""
    stored_with, key, sizes, numbers_vary = of_family
    function = node.function
    family: Any = stored_with.next.get(key)
    if family is None:
        inputs, frozen = _inputs_of(node, args)
        families = [sign.of_family() or sign for sign in inputs]
        depth, repeats, is_deep = stored_with.of_next(function, families, frozen)
        plan: formula.Plan | None
        if numbers_vary and node.plan is not None:
            plan, has_one_plan = node.plan.labelled(node.label), True
        else:
            plan, has_one_plan = _formulas_of(function).plan_for_any_size(
                args, node.needs_input_grad
            )
            has_one_plan = has_one_plan and not any([names_size(arg, sizes) for arg in args])
        if is_deep or plan is None:
            return False
        family = Family(stored_with.leaf, depth)
        _describe(family, node, args, makes_new)
        family.repeats, family.plan, family.has_one_plan = repeats, plan, has_one_plan
        family.first_sizes = sizes
        stored_with.follow(function, key, family)
    member = family.members.get(sizes)
    if member is None:
        plan = plan_of_size(family, function, args)
        member = None if plan is None else family.new_member(sizes, node.outputs, plan)
        if member is None:
            return False
    elif member.outputs != node.outputs:
        return True  # without one
    node.signature = member
    return True


def _formulas_of(function: type[Operation]) -> formula.Formulas:
    assert function.formulas is not None
    return function.formulas


def plan_of_size(family: Family, function: type[Operation], args: Args) -> formula.Plan | None:
    """The plan of a call of the family; None if it saves something else than the others."""
    if family.has_one_plan:
        return family.plan
    with DisableTorchFunctionSubclass():
        plan = _formulas_of(function).plan(args, family.needs)
    known = family.plan
    assert known is not None
    if (plan.saves, plan.names, plan.memory, plan.copied, plan.label) != (
        known.saves,
        known.names,
        known.memory,
        known.copied,
        known.label,
    ):
        return None
    return plan


# -- the generated functions of calls -------------------------------------------------------

_MOST_TRIED = 8  # a layer that is called in several ways: on data, and on what was computed
_MOST_BY_VALUE = 64  # calls that differ by their other arguments, such as the indices of gates


def with_others(
    before: Kept | None, found: Signature, args: Args, varies: bool, of_any_number: bool
) -> Kept:
    """The generated function of `found`, with those of other calls of its function `before`, which
    may be `of_any_number` of tensors."""
    this: Kept = (found.generated, found)
    known = () if before is None else before[1] if before[0] is one_of else (before[:2],)
    others = [one for one in known if one[1] is not found]
    if not others:
        return this
    if of_any_number:  # such as the stack of an episode
        numbers = dict(others[0][1]) if others[0][0] is _by_number else {}
        same = numbers.get(len(args))
        numbers[len(args)] = with_others(same, found, args, varies, of_any_number=False)
        return (_by_number, numbers)
    if not varies and not any(isinstance(arg, torch.Tensor) for arg in args[1:]):
        table = next((dict(one[1]) for one in others if one[0] is _by_value), {})
        if len(table) >= _MOST_BY_VALUE:
            table.clear()
        table[_values_of(args)] = this
        this = (_by_value, table)
        others = [one for one in others if one[0] is not _by_value]
    kept = (this, *others)[:_MOST_TRIED]
    return (one_of, kept) if others else this


def _values_of(args: Args) -> object:
    """What distinguishes the arguments other than the first; none is a tensor."""
    return of_value(args[1]) if len(args) == 2 else tuple([of_value(arg) for arg in args[1:]])


def _by_value(
    table: Mapping[object, tuple[_call.GeneratedCall, Signature]],
    first: object,
    made: object,
    args: Args,
) -> Made | None:
    """The call by the generated function for these other arguments than the first."""
    try:
        kept = table.get(_values_of(args))
    except (Unsigned, TypeError):
        return None
    return None if kept is None else kept[0](kept[1], first, made, args)


def _by_number(numbers: Mapping[int, Kept], first: object, made: object, args: Args) -> Made | None:
    """The call by the generated function for this number of arguments."""
    kept = numbers.get(len(args))
    return None if kept is None else kept[0](kept[1], first, made, args)


def one_of(
    kept: Sequence[tuple[_call.GeneratedCall, Signature]], first: object, made: object, args: Args
) -> Made | None:
    """The call by the first of several generated functions that takes these arguments."""
    for written, found in kept:
        met = written(found, first, made, args)
        if met is not None:
            return met
    return None


def keep_written(first: Signature, what: object, written: Kept) -> None:
    """Have a generated function tried first for calls of `what` on a tensor with the signature
    `first`: (the function, the signature that it is given, whether exact mode replaces it, ...).
    For `one_of`, in place of the signature, several such functions and signatures."""
    family = first.of_family()
    if family is not None and first.calls is family.calls:
        first.calls = dict(first.calls)  # what is written for these sizes only
    elif first.calls is NO_CALLS:
        first.calls = {}
    first.calls[what] = written
