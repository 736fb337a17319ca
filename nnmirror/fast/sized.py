"""Bound walks for any size: where the size of a batch varies, one for all.

The walks of two members of a family of signatures (see signature.py) have the same source except
for numbers: sizes, and what is computed from them, such as the 2 / n of a mean. So the walk is
recorded for two sizes. If each difference is a multiple of the size, or a quotient by it, the
source gets these values from the size instead. Like each bound walk it is compared with the generic
one before it is used, for two further sizes.

A value that fits at two sizes need not fit at others: a third of the rows is a multiple of 1 / 3
only if it comes out even; the rows of two parts may be as many as 20 for a while; and a rule may
choose otherwise from some size on. So such a walk is used only for sizes that the recorded ones
determine (`Values.cover`): between them, in steps that they are apart, and where a polynomial of
second degree that is the same for all of them is the same too; and only if each result in the graph
has the shape that it is expected to have (`SizedWalk.has_shapes`). For others it is recorded again,
and if nothing else differs, they are included.
"""

import itertools
import math
import re
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import torch

from ..constants import constant
from ..node import Node
from ..running import dependencies
from . import bound as _bound
from . import source
from . import writer as _writer
from .memory import Memory
from .shorter import Unbindable
from .signature import Sizes
from .source import is_same

_COMPARED = 2  # with the generic walk, for so many sizes
_AT_ONCE = 12  # sizes that are recorded at once; then after ever more walks that none is for
_MOST_APART = 4  # of them, that fit none of the walks
_MOST_REPEATED = 8  # walks for a size that was recorded, and fits none of the others
_MOST_KNOWN = 1024  # whose values are kept
_LARGEST_DENOMINATOR = 1 << 16

_NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w.])")


class _Multiple(NamedTuple):
    """`factor` times a size, as an int or a float."""

    place: int
    factor: int
    kind: type

    def of(self, sizes: Sizes) -> float:
        return self.kind(self.factor * sizes[self.place])  # type: ignore[no-any-return]


class _Quotient(NamedTuple):
    """`above` / (`below` times a size, minus `less`), as for a mean or an unbiased variance."""

    place: int
    above: int
    below: int
    less: int = 0

    def of(self, sizes: Sizes) -> float:
        return self.above / (self.below * sizes[self.place] - self.less)


class _Constant(NamedTuple):
    """A number as a tensor without dimensions."""

    number: _Multiple | _Quotient
    like: torch.Tensor

    def of(self, sizes: Sizes) -> torch.Tensor:
        return constant(float(self.number.of(sizes)), self.like.dtype, self.like.device)


class _Several(NamedTuple):
    """A tuple or list of which some items depend on the sizes."""

    kind: type
    items: list[object]

    def of(self, sizes: Sizes) -> Any:
        return self.kind([_at(item, sizes) for item in self.items])


_OfSizes: TypeAlias = _Multiple | _Quotient | _Constant | _Several


def _at(value: object, sizes: Sizes) -> object:
    """The value for these sizes."""
    return value.of(sizes) if isinstance(value, _OfSizes) else value


def _with_products(sizes: Sizes) -> Sizes:
    """The sizes, and the products of two."""
    pairs = itertools.combinations_with_replacement(sizes, 2)
    return *sizes, *[one * other for one, other in pairs]


def _fitted(one: Any, sizes: Sizes, other: Any, other_sizes: Sizes) -> object:
    """What is `one` for `sizes` and `other` for `other_sizes`. Raises Unbindable if that is not
    known."""
    if is_same(one, other):
        return other
    kind = type(one)
    if kind is not type(other):
        raise Unbindable
    if kind in (torch.Size, tuple, list) and len(one) == len(other):
        items = [_fitted(a, sizes, b, other_sizes) for a, b in zip(one, other, strict=True)]
        return _Several(kind, items)
    number = one
    if kind is torch.Tensor and not one.dim() and one.is_floating_point():
        number = one.item()
    found: list[_OfSizes] = [
        _Constant(guess, one) if kind is torch.Tensor else guess
        for place, size in enumerate(sizes)
        for guess in _guesses(number, place, size)
    ]
    found = [
        guess
        for guess in found
        if is_same(guess.of(sizes), one) and is_same(guess.of(other_sizes), other)
    ]
    if len({_place_of(guess) for guess in found}) != 1:  # it may be either
        raise Unbindable
    return found[0]


def _place_of(found: _OfSizes) -> object:
    number = found.number if isinstance(found, _Constant) else found
    return number[0]


def _guesses(number: object, place: int, size: int) -> Iterator[_Multiple | _Quotient]:
    """What `number` may be."""
    if type(number) is int or (type(number) is float and number.is_integer()):
        if number % size == 0:
            yield _Multiple(place, int(number) // size, type(number))
    elif type(number) is float and math.isfinite(number):
        share = (Fraction(number) * size).limit_denominator(_LARGEST_DENOMINATOR)
        yield _Quotient(place, share.numerator, share.denominator)
        for above in 1, 2:
            below = round((above / number + 1) / size)
            if below * size > 1:
                yield _Quotient(place, above, below, 1)


def _shapes(root: Node) -> list[torch.Size]:
    """The shapes of all results in the graph behind `root`, the last first."""
    nodes = dependencies([(root, 0)], expanding=False).order
    nodes.sort(key=lambda node: -node.sequence)
    return [meta[0] for node in nodes for meta in node.outputs if meta is not None]


def _lengths(sizes: Sizes) -> list[int]:
    """The lengths that results often have; what is taken for one is checked before each use."""
    found = [size + more for size in sizes for more in (0, 1, -1, 2, -2, 3, -3)]
    found += [one + other for one, other in itertools.combinations(sizes, 2)]
    for size in sizes:
        found += [size // 2, -(-size // 2), size // 3, -(-size // 3), size // 4, -(-size // 4)]
    return found


class _Length(NamedTuple):
    """A place in `_lengths`, or a multiple of a size or of a product of two."""

    place: int
    factor: int


def _fitted_length(one: int, sizes: Sizes, other: int, other_sizes: Sizes) -> int | _Length:
    if one == other:
        return one
    for place, pair in enumerate(zip(_lengths(sizes), _lengths(other_sizes), strict=True)):
        if pair == (one, other):
            return _Length(place, 0)
    products = zip(_with_products(sizes), _with_products(other_sizes), strict=True)
    for place, (size, other_size) in enumerate(products):
        if one % size == 0 and one // size * other_size == other:
            return _Length(place, one // size)
    raise Unbindable


class Sample:
    """A walk that was recorded for these sizes."""

    def __init__(
        self,
        sizes: Sizes,
        shapes: list[torch.Size],
        text: str,
        environment: source.Environment,
    ) -> None:
        self.sizes, self.shapes, self.environment = sizes, shapes, dict(environment)
        parts = _NUMBER.split(text)
        self.between, self.numbers = parts[::2], [*map(_read, parts[1::2])]


def _read(number: str) -> int | float:
    return int(number) if number.isdigit() else float(number)


class _Span:
    """What can be reached from one point in steps that are given: whole ones, or any share."""

    def __init__(self, start: Sequence[int], whole: bool) -> None:
        self.start, self.whole = start, whole
        # By the first place where they are not zero; each step is a sum of multiples of these.
        self.rows: dict[int, list[Fraction]] = {}

    def _from_start(self, point: Sequence[int]) -> list[Fraction]:
        return [Fraction(n - m) for n, m in zip(point, self.start, strict=True)]

    def add(self, point: Sequence[int]) -> None:
        step = self._from_start(point)
        for place in range(len(step)):
            if not step[place]:
                continue
            row = self.rows.get(place)
            if row is None:
                self.rows[place] = step
                return
            while step[place]:  # to the greatest common divisor
                times = row[place] / step[place]
                times = Fraction(times.__floor__()) if self.whole else times
                rest = [r - times * s for r, s in zip(row, step, strict=True)]
                row, step = step, rest
            self.rows[place] = row

    def reaches(self, point: Sequence[int]) -> bool:
        step = self._from_start(point)
        for place in range(len(step)):
            if not step[place]:
                continue
            row = self.rows.get(place)
            times = None if row is None else step[place] / row[place]
            if row is None or times is None or (self.whole and times.denominator > 1):
                return False
            step = [s - times * r for s, r in zip(step, row, strict=True)]
        return True

    def is_everything(self) -> bool:
        return len(self.rows) == len(self.start) and (
            not self.whole or all(abs(row[place]) == 1 for place, row in self.rows.items())
        )


class Values:
    """The values that a walk gets from its sizes."""

    def __init__(self, values: Sequence[_OfSizes], one: Sizes, other: Sizes) -> None:
        self.values = values
        self.known: dict[Sizes, tuple[object, ...]] = {}
        self.recorded = {one}
        self.least = self.most = _derived(one)
        self.steps, self.shares = _Span(one, True), _Span(_with_products(one), False)
        self.include(other)

    def include(self, sizes: Sizes) -> None:
        self.recorded.add(sizes)
        self.least = tuple(map(min, self.least, _derived(sizes)))
        self.most = tuple(map(max, self.most, _derived(sizes)))
        self.steps.add(sizes)
        self.shares.add(_with_products(sizes))
        self.are_all = self.steps.is_everything() and self.shares.is_everything()

    def cover(self, sizes: Sizes) -> bool:
        """Do the recorded sizes determine what the walk is for these?"""
        every = zip(self.least, _derived(sizes), self.most, strict=True)
        if not all([least <= n <= most for least, n, most in every]):
            return False
        return self.are_all or (
            self.steps.reaches(sizes) and self.shares.reaches(_with_products(sizes))
        )

    def __call__(self, sizes: Sizes) -> tuple[object, ...]:
        found = self.known.get(sizes)
        if found is None:
            if len(self.known) >= _MOST_KNOWN:
                self.known.clear()
            every = _with_products(sizes)
            found = self.known[sizes] = tuple([value.of(every) for value in self.values])
        return found


def _derived(sizes: Sizes) -> Sizes:
    """The sizes, their products, sums and differences: a rule may choose by each of them."""
    pairs = [*itertools.combinations(sizes, 2)]
    sums = [one + other for one, other in pairs]
    return *_with_products(sizes), *sums, *[one - other for one, other in pairs]


class SizedWriter(_writer.Writer):
    """Writes the source for one member of a family."""

    def memory(self) -> Memory | None:
        return None  # for another one it has other sizes


class SizedWalk(_bound.BoundWalk):
    """A bound walk for the sizes that its `values` cover."""

    def __init__(self, one: Sample, other: Sample, writer: SizedWriter, root: Node) -> None:
        known = one.environment
        if one.between != other.between or known.keys() != other.environment.keys():
            raise Unbindable
        if [*map(len, one.shapes)] != [*map(len, other.shapes)]:
            raise Unbindable
        self.between = one.between
        self.shapes = [
            [_fitted_length(a, one.sizes, b, other.sizes) for a, b in zip(shape, like, strict=True)]
            for shape, like in zip(one.shapes, other.shapes, strict=True)
        ]
        sizes, other_sizes = _with_products(one.sizes), _with_products(other.sizes)
        self.numbers = [
            _fitted(a, sizes, b, other_sizes)
            for a, b in zip(one.numbers, other.numbers, strict=True)
        ]
        self.environment = {
            name: _fitted(known[name], sizes, value, other_sizes)
            for name, value in other.environment.items()
        }
        text = self.between[0]
        values: dict[str, _OfSizes] = {}
        for number, after in zip(self.numbers, self.between[1:], strict=True):
            if isinstance(number, _OfSizes):
                name = f"z{len(values)}"
                values[name] = number
                text += name + after
            else:
                text += repr(number) + after
        values.update({k: v for k, v in self.environment.items() if isinstance(v, _OfSizes)})
        self.values = Values([*values.values()], one.sizes, other.sizes)
        head, _, rest = text.partition("\n")
        lines = [head]
        if values:
            lines.append(f"    {', '.join(values)}, = of_sizes(n0.signature.sizes)")
        environment = {k: v for k, v in self.environment.items() if k not in values}
        super().__init__(
            writer, root, "\n".join([*lines, rest]), environment | {"of_sizes": self.values}
        )
        self.start = writer.start
        self.compared: set[Sizes] = set()  # for these with the generic walk
        self.fits = {one.sizes, other.sizes}  # what it may be used for, as far as that was asked

    def includes(self, sample: Sample) -> bool:
        """Is this walk the same for the sizes of `sample`? Then it is used for them."""
        sizes, environment = _with_products(sample.sizes), sample.environment
        if sample.between != self.between or environment.keys() != self.environment.keys():
            return False
        known = [*self.numbers, *self.environment.values()]
        found = [*sample.numbers, *[environment[name] for name in self.environment]]
        if not all(is_same(_at(a, sizes), b) for a, b in zip(known, found, strict=True)):
            return False
        if not self.has_shapes(sample.shapes, sample.sizes):
            return False
        self.values.include(sample.sizes)
        self.fits.add(sample.sizes)
        return True

    def has_shapes(self, shapes: Sequence[torch.Size], sizes: Sizes) -> bool:
        """Are these the shapes of all results, as expected for these sizes?"""
        if [*map(len, shapes)] != [*map(len, self.shapes)]:
            return False
        lengths, products = _lengths(sizes), _with_products(sizes)
        for shape, expected in zip(shapes, self.shapes, strict=True):
            for n, of in zip(shape, expected, strict=True):
                if type(of) is _Length:
                    of = of.factor * products[of.place] if of.factor else lengths[of.place]
                if n != of:
                    return False
        return True

    def is_for(self, sizes: Sizes, root: Node) -> bool:
        """Can it be used for the graph behind `root`, of these sizes?"""
        if sizes in self.fits:
            return True
        if not self.values.cover(sizes) or not self.has_shapes(_shapes(root), sizes):
            return False
        if len(self.fits) >= _MOST_KNOWN:
            self.fits.clear()
        self.fits.add(sizes)
        return True

    def note_right(self, sizes: Sizes) -> bool:
        """It has had the bits of the generic walk for `sizes`: is that enough?"""
        if sizes not in self.values.recorded:
            self.compared.add(sizes)
        return len(self.compared) >= _COMPARED


class OfAnySize:
    """The walks from the members of one family."""

    def __init__(self, waits: int) -> None:
        self.walks: list[SizedWalk] = []
        self.apart: list[Sample] = []  # those that fit none of the walks
        self.waits = waits  # for how many more walks without one for their size
        self.recorded = self.repeated = 0
        self.recording = threading.Lock()

    def walk_for(self, sizes: Sizes, root: Node) -> SizedWalk | None:
        return next((walk for walk in self.walks if walk.is_for(sizes, root)), None)

    def record(self, sizes: Sizes, node: Node, start: torch.Tensor) -> bool:
        """Record the walk from `node`, if that may be worth it; False if there can be none for any
        sizes.

        Raises Unbindable if it cannot be bound, ChangedSince if it cannot be now.
        """
        if not self.recording.acquire(blocking=False):
            return True
        try:
            return self._record(sizes, node, start)
        finally:
            self.recording.release()

    def _record(self, sizes: Sizes, node: Node, start: torch.Tensor) -> bool:
        if any([sample.sizes == sizes for sample in self.apart]):  # it has to be another one
            self.repeated += 1
            return bool(self.walks) or self.repeated < _MOST_REPEATED
        writer = SizedWriter(node)
        writer.start_varies = True  # or what is computed from it has this size
        writer.go_back(start)
        sample = Sample(sizes, _shapes(node), writer.source(), writer.environment)
        writer.put_off()
        self.recorded += 1
        self.waits = max(self.recorded - _AT_ONCE, 0)
        if not any([walk.includes(sample) for walk in self.walks]):
            for other in self.apart:
                if other.sizes == sizes:
                    continue
                try:
                    walk = SizedWalk(other, sample, writer, node)
                except Unbindable:
                    continue
                self.apart.remove(other)
                self.walks.append(walk)
                break
            else:
                self.apart.append(sample)
        if len(self.apart) < _MOST_APART:
            return True
        del self.apart[0]
        return bool(self.walks)
