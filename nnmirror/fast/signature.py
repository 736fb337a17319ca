"""Signatures: how a tracked tensor was computed, as interned objects.

The signature of a recorded call contains everything that its backward may depend on except the
numbers in the tensors: the function, the signatures of its inputs, its other arguments, and the
layout of plain tensors. So two graphs whose last nodes have the same signature have the same
operations in their backward, if nodes are also shared in the same way (which a bound walk checks,
see `writer.py`).

In a loop, such as a recurrence, the same call comes again and again. From the third time on, of an
input only the layout counts, so that the further steps have the same signatures. There, a graph
has the same operations only if all its nodes have the same signatures, which it checks too.

Where the size of a batch varies, the signatures that differ by nothing but that size form a family
(`Family`): a call on a member is recorded by the same generated function for all sizes. There may
be several sizes, such as the numbers of nodes and of edges of a graph.

A signature holds no tensor. Each is stored with the signature of its first tracked input, up to
that of a leaf, which is stored with the leaf: when a model is freed, so are its signatures.
"""

import itertools
import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from .._teardown import not_at_exit

if TYPE_CHECKING:
    import nnmirror.node

    from ..formula import Plan
    from ..origin import Origin
    from .bound import BoundPart, BoundWalk
    from .call import GeneratedCall
    from .ends import WalkToEnds
    from .keyed import Walks
    from .memory import Memory
    from .replay import Replay
    from .sized import OfAnySize

_serials = itertools.count()
_MOST = 64  # at most, signatures stored with one signature
# Of them for one function, before its calls may be treated as different each time: if they differ
# by a size, by a number, and otherwise.
_MOST_BY_SIZE, _MOST_BY_NUMBER, _MOST_OF_ONE = 8, 16, 32
_MOST_AGAIN = 24  # sizes, if most of them have come again
# A result is deep in a loop if on one path to it the same call came more often than this, or if
# more calls than this lie behind it.
_REPEATS, _CALLS = 2, 100
_MOST_SEGMENTS = 8  # that end with one call
_MOST_LAYOUTS = 64  # of results deep in a loop
_MORE = 8  # times as many signatures are stored for these
_MOST_MEMBERS = 1024  # members of a family; then it begins anew
_MOST_DROPPED = 256  # calls of one function, before others get no signature
_MOST_BEHIND = 1 << 13  # signatures behind one leaf, some seven kilobytes each with their walks
_BYTES = 7000  # of a signature, with its walks
_MOST_WEIGHT_OF_ONE = 512  # of a freed leaf whose signature is kept
MANY_WALKS = 32  # bound behind one leaf
_MOST_APART = 48  # calls on members of a family that are none of another family

# How the calls of a function on one tensor differ each time: by numbers, which become operands; by
# the dimensions of tensors, or integers, whose signatures then form a family; or by more, so that
# they get no signature any more.
NUMBERS, SIZES, MORE = "numbers", "sizes", "more"

# Of a call for which a function is written. With more, as in torch.cat of a whole episode, it takes
# as long to compile as a hundred calls, and the next episode has another length.
MOST_ARGUMENTS = 32

# The keys of walks from a loss (see WalksFrom).
LOSS, TAPPED = "loss", "tapped"

# In a key, before the layout of a tensor that torch itself tracks, and of a frozen parameter, which
# has aliases that rules use.
THEIRS, FROZEN = object(), object()

Sizes: TypeAlias = tuple[int, ...]
# The layout of a tensor.
Layout: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
# Shape, dtype and device of a result.
Meta: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]
# A recorded call: the result, and the node.
Made: TypeAlias = tuple[Any, "nnmirror.node.Node"]

# A generated function, the signature or signatures that it is given, whether exact mode may ask for
# another one, and for a composed function what decides when it is written again (composed.py).
Kept: TypeAlias = tuple[Any, ...]

NO_CALLS: dict[object, Kept] = {}


class CallInfo:
    """What a node knows of its call apart from the tensors. Nodes of calls of one kind share it,
    whether or not these have a signature."""

    __slots__ = ("exposed", "indices", "is_shared", "label", "needs", "outputs", "places", "plan")

    indices: Sequence[int] | None  # for each argument, which output of its target it was; None: 0
    label: str
    plan: "Plan | None"
    places: Sequence[int]
    needs: tuple[bool, ...]
    outputs: Sequence[Any]  # the `Meta` of each; None in place of what is no tensor
    exposed: "CallInfo | None"  # the same when they are like PyTorch's (see `Node.as_exposed`)

    def __init__(
        self,
        places: Sequence[int] = (),
        needs: tuple[bool, ...] = (),
        outputs: Sequence[Any] = (),
        plan: "Plan | None" = None,
        label: str = "",
        is_shared: bool = True,
    ) -> None:
        self.places, self.needs, self.outputs = places, needs, outputs
        self.plan, self.label, self.is_shared = plan, label, is_shared
        self.exposed = self.indices = None

    def copied(self) -> "CallInfo":
        """The same for one node, to be changed."""
        made = CallInfo(self.places, self.needs, self.outputs, self.plan, self.label, False)
        made.indices = self.indices
        return made


class WalksFrom:
    """What is known of the walks from results with one signature."""

    __slots__ = (
        "between",
        "from_given",
        "parts",
        "rebound",
        "replays",
        "steady",
        "to_ends",
        "visits",
        "walked",
    )

    def __init__(self) -> None:
        # The number of the latest one's call, how many calls came between it and the one before,
        # and how often in turn as many did.
        self.walked = self.between = self.steady = 0
        self.rebound = 0  # how often others were bound, as those before did not fit
        # Bound walks with a given gradient (see binding.py), and to given ends (see ends.py), and
        # recorded walks (see replay.py); each by the gradient. The walk from a loss, whose gradient
        # is always one, is among the first, under LOSS, and under TAPPED that with taps.
        self.from_given: Walks[BoundWalk] = {}
        self.to_ends: Walks[WalkToEnds] = {}
        self.replays: Walks[Replay] = {}
        # Bound parts of other walks, by the strides of the gradient; False if there can be none.
        self.parts: dict[tuple[int, ...], list[BoundPart]] | Literal[False] | None = None
        self.visits = 0  # how often the generic walk came here

    @property
    def bound(self) -> "BoundWalk | None":
        """The latest bound walk from a loss."""
        found = self.from_given.get(LOSS, 0)
        return None if isinstance(found, int) else found.walks[0]

    def decline(self) -> None:
        """Bind neither the walk from a loss nor parts of one."""
        self.from_given[LOSS] = self.parts = False


class _ByLayout:
    """What results of one layout, deep in a loop, have in common as inputs."""

    def __init__(self) -> None:
        self.serial = next(_serials)
        self.next: dict[object, Signature] = {}
        self.varying: dict[object, str] = {}
        self.calls: dict[object, Kept] = {}


class Signature(CallInfo):
    """The signature of a recorded call.

    At most `depth` calls lie on one path behind it; `repeats` says how often each of them does.
    `leaf` is the signature of the leaf that stores it.
    """

    __slots__ = (
        "__weakref__",
        "_walks",
        "again",
        "calls",
        "checks_shape",
        "depth",
        "dropped",
        "family",
        "family_serial",
        "generated",
        "is_by_layout",
        "is_deep",
        "is_single",
        "leaf",
        "makes_new",
        "makes_several",
        "next",
        "origin",
        "own_serial",
        "repeats",
        "segments",
        "serial",
        "siblings",
        "sizes",
        "varied",
        "varying",
    )

    makes_new: bool  # for a call: whether its result is new or a view
    makes_several: bool  # for a call of a rule: whether it has several results

    def __init__(
        self,
        leaf: "weakref.ref[LeafSignature]",
        depth: int = 0,
        shared: _ByLayout | None = None,
    ) -> None:
        super().__init__()
        self.leaf = leaf
        self.depth = depth
        self.repeats: dict[object, int] = {}
        self.is_deep = False  # in a loop
        self.own_serial = next(_serials)
        # Stands for this one in the keys of others, as a reference to it would make a cycle.
        self.serial = self.own_serial
        # The signatures of calls on a tensor with this signature, by function and other arguments.
        self.next: dict[object, Signature] = {}
        self.siblings: dict[int, Signature] | None = None  # of its further outputs
        self.varying: dict[object, str] = {}  # functions whose calls differ each time: how
        self.dropped: dict[object, int] = {}  # how many of their calls were, as there were too many
        self.varied: dict[object, Varied] = {}  # if by sizes: which
        # The latest calls of each function, which are tried first: a generated function (see
        # call.py) and its signature, or several in turn (see `keep_written` in signing.py).
        self.calls: dict[object, Kept] = NO_CALLS
        self.is_by_layout = shared is not None  # deep in a loop, with one result that is no view
        if shared is not None:
            self.serial, self.next = shared.serial, shared.next
            self.varying, self.calls = shared.varying, shared.calls
        self.again = 0  # how often there was such a call after the first
        # This call's generated function; False if there is none.
        self.generated: GeneratedCall | Literal[False] | None = None
        self.segments: dict[object, Signature] = {}  # which end with this call
        self._walks: WalksFrom | None = None
        self.is_single = True  # it has one output, which is not a view
        # Of the first such call: its sequence number and its place.
        self.origin: tuple[int, Origin] | None = None
        self.checks_shape = False  # the shape of the result depends on the data
        # Of a member of a family: that, what stands for it in the keys of others, and the sizes.
        self.family: weakref.ref[Family] | None = None
        self.family_serial: int | None = None
        self.sizes: Sizes = ()

    @property
    def walks(self) -> "WalksFrom":
        """The walks from such results."""
        found = self._walks
        if found is None:
            found = self._walks = WalksFrom()
        return found

    def output(self, index: int) -> "Signature":
        """The signature of output `index` of a call with several."""
        if index == 0:
            return self
        if self.siblings is None:
            self.siblings = {}
        if index not in self.siblings:
            self.siblings[index] = self._sibling(index)
        return self.siblings[index]

    def _sibling(self, index: int) -> "Signature":
        made = Signature(self.leaf, self.depth)
        made.repeats, made.is_deep = self.repeats, self.is_deep
        family = self.of_family()
        if family is not None:
            of_output = family.output(index)
            assert isinstance(of_output, Family)
            of_output.admit(made, self.sizes)
        return made

    def segment(self, key: object) -> "Signature":
        """The signature of a segment that ends with this call (see modules/segment.py)."""
        found = self.segments.get(key)
        if found is None:
            found = Signature(self.leaf, self.depth)
            found.repeats, found.is_deep = self.repeats, self.is_deep
            if len(self.segments) >= _MOST_SEGMENTS:
                self.segments.clear()
            self.segments[key] = found
            leaf = self.leaf()
            if leaf is not None:
                leaf.has_segments, leaf.behind = True, leaf.behind + 1
        return found

    def of_family(self) -> "Family | None":
        """The family that it is a member of, if any."""
        return None if self.family is None else self.family()

    def made(
        self,
        function: object,
        inputs: "Sequence[Signature]",
        frozen: tuple[object, ...],
        layout: Layout | None,
    ) -> "Signature":
        """A new signature for a call on tensors with the signatures `inputs`, the first of them
        this one, and on these `frozen` weights, that has one result, no view, with this layout;
        None for any other result."""
        depth, repeats, is_deep = self.of_next(function, inputs, frozen)
        leaf = self.leaf()
        if not is_deep or layout is None or leaf is None:
            made = Signature(self.leaf, depth)
            made.is_deep, made.repeats = is_deep, {} if is_deep else repeats
            return made
        if leaf.by_layout is None:
            leaf.by_layout = {}
        shared = leaf.by_layout.get(layout)
        if shared is None:
            if len(leaf.by_layout) >= _MOST_LAYOUTS:
                dropped = leaf.by_layout.pop(next(iter(leaf.by_layout)))
                dropped.next.clear()
                dropped.calls.clear()
            shared = leaf.by_layout[layout] = _ByLayout()
        made = Signature(self.leaf, depth, shared)
        made.is_deep = True
        return made

    def of_next(
        self, function: object, inputs: "Sequence[Signature]", frozen: tuple[object, ...]
    ) -> tuple[int, dict[object, int], bool]:
        """Of such a call: the depth, the repeats, and whether it is deep in a loop."""
        depth = 1 + max([given.depth for given in inputs], default=self.depth)
        repeats = _repeats_of(function, inputs, frozen)
        is_deep = (
            any([given.is_deep for given in inputs])
            or depth > _CALLS
            or max(repeats.values(), default=0) > _REPEATS
        )
        return depth, repeats, is_deep

    def follow(self, function: object, key: object, made: "Signature") -> None:
        """Store `made` as the signature of the call `key` of `function`.

        The calls of a function may differ each time. If they differ in the size of a batch, their
        signatures form a family. If they differ in a number, such as one that follows a schedule,
        the number is treated as an operand (see `numbers_apart`). If they differ in a slice that
        grows, no graph occurs twice, and its calls get no signature any more. If most of them have
        come again, as with a few sizes or new parameters, they all have signatures, and the oldest
        are dropped.
        """
        more = _MORE if self.is_by_layout else 1  # calls of all steps, and of all layers in them
        of_one = [k for k in self.next if k is function or (type(k) is tuple and k[0] is function)]
        if len(of_one) >= more * _MOST_BY_SIZE and self.varying.get(function) is not SIZES:
            how = self._judged(function, of_one, key, more)
            if how is not None:
                self.varying[function] = how
                self.calls.pop(function, None)
                for k in of_one:
                    del self.next[k]
                return
        if len(self.next) >= more * _MOST:
            oldest = of_one[0] if len(of_one) > more * _MOST // 2 else next(iter(self.next))
            del self.next[oldest]
            self.dropped[function] = self.dropped.get(function, 0) + 1
            if self.dropped[function] >= more * _MOST_DROPPED:
                self.varying[function] = MORE
                self.calls.pop(function, None)
                return
        self.next[key] = made
        leaf = self.leaf()
        if leaf is not None:
            leaf.behind += 1
            if leaf.behind > _MOST_BEHIND:
                leaf.forget()

    def _judged(
        self, function: object, of_one: Sequence[object], key: object, more: int
    ) -> str | None:
        """How these calls of one function differ, if they do each time."""
        again = sum(self.next[k].again > 0 for k in of_one)
        is_rare = 2 * again < len(of_one)
        known = self.varying.get(function)
        # Without the signatures of further inputs: if these differ, it is for another reason.
        apart = {_without_signatures(k) for k in (*of_one, key) if type(k) is tuple}
        if known is None and not any([THEIRS in parts for parts in apart]):
            varied = _differ_by_size(apart)
            if any(varied) and (is_rare or len(apart) > _MOST_AGAIN or isinstance(self, Family)):
                self.varied = {**self.varied, function: varied}
                return SIZES
        by_number = type(key) is tuple and numbers_apart(key) is not None
        most = _MOST_BY_NUMBER if by_number else _MOST_OF_ONE
        if len(apart) <= more * most or not is_rare:
            return None
        return NUMBERS if known is None else MORE


@not_at_exit
class LeafSignature(Signature):
    """The signature of a leaf, which stores those of the calls that lie behind it; or one that no
    leaf stores."""

    __slots__ = ("behind", "by_layout", "constants", "has_segments", "memories", "walks_bound")

    def __init__(self, depth: int = 0) -> None:
        super().__init__(weakref.ref(self), depth)
        self.behind = 0  # how many signatures there are behind it
        self.walks_bound = 0  # how many walks that began there
        self.constants = 0  # the bytes of the constants of these walks
        self.memories: weakref.WeakSet[Memory] | None = None  # which they reuse
        self.has_segments = False  # some of the signatures behind it do
        # What results deep in a loop have in common, by their layout.
        self.by_layout: dict[Layout, _ByLayout] | None = None

    def is_worth_keeping(self) -> bool:
        """When the leaf is freed: were the graphs that began with it few?"""
        if self.dropped or MORE in self.varying.values() or self.walks_bound >= MANY_WALKS:
            return False
        return self.weight() <= _MOST_WEIGHT_OF_ONE

    def weight(self) -> int:
        """How much memory it takes with what lies behind it, in signatures."""
        return 1 + self.behind + self.constants // _BYTES

    def note_memory(self, memory: "Memory") -> None:
        """A walk that begins behind this leaf keeps `memory` for the next one."""
        if self.memories is None:
            self.memories = weakref.WeakSet()
        self.memories.add(memory)

    def release_memory(self) -> None:
        """Free what the walks behind this leaf keep."""
        for memory in self.memories or ():
            memory.spare.clear()

    def __del__(self) -> None:
        self.forget_by_layout()

    def forget_by_layout(self) -> None:
        # The signatures of a loop refer to each other.
        for shared in (self.by_layout or {}).values():
            shared.next.clear()
            shared.calls.clear()

    def forget(self) -> None:
        """Drop all signatures behind this leaf, and the walks bound to them: where the structure of
        a net is drawn anew in each step, nearly all are of the past."""
        self.next.clear()
        self.calls = NO_CALLS
        self.forget_by_layout()
        self.by_layout = None
        self.varying, self.varied, self.dropped = {}, {}, {}
        self.walks_bound = self.behind = self.constants = 0
        self.memories = None
        self.has_segments = False


class Family(Signature):
    """The signatures of calls that differ only by dimensions of tensors, their sizes.

    Each member has the signature's usual meaning for its sizes, which are different numbers, none
    less than two. They have in common the generated functions of the calls on them, which take any.
    """

    __slots__ = ("apart", "first_sizes", "has_one_plan", "members", "sized")

    def __init__(self, leaf: "weakref.ref[LeafSignature]", depth: int = 0) -> None:
        super().__init__(leaf, depth)
        self.calls = {}  # its own, as members refer to it
        self.members: dict[Sizes, Signature] = {}
        self.first_sizes: Sizes = ()  # what `outputs` are of
        self.has_one_plan = False  # which does not depend on the sizes
        # For each function: how many calls on members have signatures of their own.
        self.apart: dict[object, int] = {}
        # The walks from here for any sizes (see fast/sized.py); False if there can be none.
        self.sized: OfAnySize | Literal[False] | None = None

    def _sibling(self, index: int) -> "Family":
        return Family(self.leaf, self.depth)

    def admit(self, member: Signature, sizes: Sizes) -> None:
        """Make `member` the one of these sizes."""
        member.family, member.family_serial, member.sizes = weakref.ref(self), self.serial, sizes
        member.calls, member.varying = self.calls, self.varying

    def new_member(
        self, sizes: Sizes, outputs: Sequence[Meta | None], plan: "Plan | None"
    ) -> Signature | None:
        """The new member of these sizes; None if these are no results of it: there are more pieces,
        or the shape follows from the data."""
        if len(outputs) != len(self.outputs):
            return None
        if self.checks_shape and not all(
            map(self._has_shape_for, [sizes] * len(outputs), outputs, self.outputs)
        ):
            return None
        made = Signature(self.leaf, self.depth)
        made.repeats, made.is_deep = self.repeats, self.is_deep
        made.places, made.needs, made.label = self.places, self.needs, self.label
        made.indices, made.origin, made.is_single = self.indices, self.origin, self.is_single
        made.makes_new, made.makes_several = self.makes_new, self.makes_several
        made.checks_shape, made.outputs, made.plan = self.checks_shape, outputs, plan
        self.admit(made, sizes)
        if len(self.members) >= _MOST_MEMBERS:
            self.members.clear()
        self.members[sizes] = made
        return made

    def _has_shape_for(self, sizes: Sizes, result: Meta | None, first: Meta | None) -> bool:
        """Does each dimension of a result have the length of the first member's, or its size?"""
        if result is None or first is None or len(result[0]) != len(first[0]):
            return result is first
        pairs = [*zip(self.first_sizes, sizes, strict=True)]
        lengths = zip(first[0], result[0], strict=True)
        return all([one == other or (one, other) in pairs for one, other in lengths])

    def note_apart(self, function: object) -> None:
        """A call on a member has a signature of its own. Where that goes on, calls of the function
        differ by more than sizes."""
        self.apart[function] = self.apart.get(function, 0) + 1
        if self.apart[function] > _MOST_APART:
            self.varying[function] = MORE


def _repeats_of(
    function: object, inputs: Sequence[Signature], frozen: tuple[object, ...]
) -> dict[object, int]:
    """How often each call came on one path, at most, with that of `function` on `inputs`.

    A call is known by its function and its other inputs than the one on the path: the weights of a
    recurrence, frozen or not, the term that is added to a loss. One without others is not counted,
    as the layers of a net have the same activation without being a loop.
    """
    paths: dict[int, dict[object, int]] = {}
    for given in inputs:
        others = *[other.serial for other in inputs if other is not given], *frozen
        if not given.depth:
            continue
        if not others:
            return given.repeats  # the same object, as most calls have one input
        path = paths[given.own_serial] = dict(given.repeats)
        path[function, others] = path.get((function, others), 0) + 1
    repeats: dict[object, int] = {}
    for path in paths.values():
        for call, count in path.items():
            repeats[call] = max(count, repeats.get(call, 0))
    return repeats


_CONSTANTS = (str, torch.dtype, torch.device, torch.memory_format, torch.layout)
_OF_SLICES = {int, type(None)}


MASKS = (torch.bool, torch.uint8)  # in an index


class Unsigned(Exception):
    """An argument that cannot be part of a signature."""


def of_tensor(tensor: torch.Tensor) -> Layout:
    """The key of a tensor that carries no gradient: its layout."""
    try:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    except RuntimeError:  # a sparse one
        raise Unsigned from None


def numbers_apart(key: Sequence[object]) -> list[object] | None:
    """The key of a call with its numbers as operands; None if it has no number."""
    apart = [_NUMBER if type(part) is tuple and part[0] is float else part for part in key]
    return apart if _NUMBER in apart else None


_NUMBER = float, "any"


class Varied(NamedTuple):
    """The sizes by which calls differ: dimensions of tensors, and places among the integers."""

    dims: frozenset[int]
    numbers: frozenset[int]


class Behind(NamedTuple):
    """In a key: an input that is a member of a family, and the places of its sizes."""

    family_serial: int | None
    places: tuple[int, ...]


def layout_for_any_size(layout: Layout, sizes: Sizes) -> object:
    """The key of a tensor, where a dimension that is one of the `sizes` stands for any."""
    shape, stride, dtype, device = layout
    if not any([n in sizes for n in shape]):
        return layout
    dims = tuple([(SIZES, sizes.index(n)) if n in sizes else n for n in shape])
    return dims, None if stride == strides_by_rows(shape) else stride, dtype, device


def strides_by_rows(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor that is laid out by rows."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides[: len(shape)]))


def of_value_for_any_size(value: Any, sizes: Sizes) -> object:
    """The key of an argument that is not a tensor, where an integer that is one of the `sizes`
    stands for any."""
    kind = type(value)
    if kind is int and value in sizes:
        return SIZES, sizes.index(value)
    if kind in (tuple, torch.Size):
        return kind, tuple([of_value_for_any_size(v, sizes) for v in value])
    return of_value(value)


def names_size(value: Any, sizes: Sizes) -> bool:
    """Is it one of the sizes, or a tuple that contains one?"""
    if type(value) in (tuple, torch.Size):
        return any([names_size(v, sizes) for v in value])
    return type(value) is int and value in sizes


def _without_signatures(key: Sequence[object]) -> tuple[object, ...]:
    """The key of a call without those of tensors that carry a gradient, except their number."""
    return len(key), *[part for part in key if type(part) not in (int, Behind)]


def _differ_by_size(keys: Collection[Sequence[object]]) -> Varied:
    """The sizes by which most of these calls differ; none if they differ by more."""
    kinds: dict[object, list[Sequence[object]]] = {}
    for key in keys:
        kind = tuple([_without_sizes(part) for part in key])
        kinds.setdefault(kind, []).append(key)
    varied = Varied(frozenset(), frozenset())
    sized = [alike for alike in kinds.values() if len(alike) > 1]
    count = sum(map(len, sized))
    if count < _MOST_BY_SIZE or 4 * len(sized) > count:
        return varied
    dims: set[int] = set()
    numbers: set[int] = set()
    for alike in sized:
        for parts in zip(*alike, strict=True):
            if _is_layout(parts[0]):
                lengths = zip(*[part[0] for part in parts], strict=True)  # type: ignore[index]
                dims.update([d for d, every in enumerate(lengths) if len({*every}) > 1])
        every_number = zip(*[_numbers_in_key(key) for key in alike], strict=True)
        numbers.update([place for place, every in enumerate(every_number) if len({*every}) > 1])
    return Varied(frozenset(dims), frozenset(numbers))


def _without_sizes(part: Any) -> object:
    """A part of a key without its sizes."""
    if _is_layout(part):
        shape, stride, *others = part
        return len(shape), stride == strides_by_rows(shape) or stride, *others
    if type(part) is tuple and part[0] is int:
        return (int, SIZES) if part[1] > 1 else part
    if type(part) is tuple and part[0] in (tuple, torch.Size):
        return part[0], tuple([_without_sizes(item) for item in part[1]])
    return tuple([min(n, 2) for n in part]) if type(part) is torch.Size else part


def _numbers_in_key(key: Sequence[Any]) -> list[int]:
    """The integers among the arguments, in order (see `integers_in`)."""
    found: list[int] = []
    for part in key:
        if type(part) is torch.Size:
            found += part
        elif type(part) is tuple and part[0] in (int, SIZES):
            found.append(part[1])
        elif type(part) is tuple and part[0] in (tuple, torch.Size):
            found += _numbers_in_key(part[1])
    return found


def integers_in(args: Sequence[object]) -> list[int]:
    """The integers among arguments and in tuples of them."""
    found: list[int] = []
    for arg in args:
        if type(arg) is int:
            found.append(arg)
        elif type(arg) in (tuple, torch.Size):
            found += integers_in(arg)  # type: ignore[arg-type]
    return found


def _is_layout(part: object) -> bool:
    return type(part) is tuple and type(part[0]) is torch.Size


def of_value(value: Any) -> object:
    """The key of an argument that is not a tensor."""
    kind = type(value)
    if kind is float:
        # Zeros differ by sign; a NaN never compares equal.
        return (kind, value) if value else (kind, repr(value))
    if value is None or kind is str or kind in _CONSTANTS:
        return value
    if kind is int or kind is bool:
        return kind, value
    if kind is torch.Size:
        return value
    if kind is slice:
        start, stop, step = value.start, value.stop, value.step
        kinds = type(start), type(stop), type(step)
        if _OF_SLICES.issuperset(kinds):  # the usual case, without a call for each
            return kinds, start, stop, step
        return kind, of_value(start), of_value(stop), of_value(step)
    if kind is tuple or kind is list:
        return kind, tuple([of_value(v) for v in value])
    if value is Ellipsis:
        return value
    raise Unsigned
