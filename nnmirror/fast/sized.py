"""Bound walks for any size: where the size of a batch varies, one for all.

The walks of two members of a family of signatures (see signature.py) have the same source except
for numbers: sizes, and what is computed from them, such as the 2 / n of a mean. So the walk is
recorded for two sizes. If each difference is a multiple of the size, or a quotient by it, the
source gets these values from the size instead. Like each bound walk it is compared with the generic
one before it is used, for two further sizes.

A rule may choose otherwise from some size on; then the sources differ by more. So such a walk is
used only for sizes between those that it was recorded for. For another one it is recorded again,
and if nothing else differs, that one is included.
"""

import math
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import torch

from ..constants import constant
from ..node import Node
from . import bound as _bound
from . import source
from .memory import Memory
from .shorter import Unbindable
from .source import is_same

_COMPARED = 2  # with the generic walk, for so many sizes
_AT_ONCE = 12  # sizes that are recorded at once; then after ever more walks that none is for
_MOST_APART = 4  # of them, that fit none of the walks
_MOST_REPEATED = 8  # walks for a size that was recorded, and fits none of the others
_MOST_SIZES = 1024  # whose values are kept
_LARGEST_DENOMINATOR = 1 << 16

_NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w.])")


class _Multiple(NamedTuple):
    """`factor` times the size."""

    factor: int

    def of(self, size: int) -> int:
        return self.factor * size


class _Quotient(NamedTuple):
    """`above` / (`below` times the size, minus `less`), as for a mean or an unbiased variance."""

    above: int
    below: int
    less: int = 0

    def of(self, size: int) -> float:
        return self.above / (self.below * size - self.less)


class _Constant(NamedTuple):
    """A number as a tensor without dimensions."""

    number: _Multiple | _Quotient
    like: torch.Tensor

    def of(self, size: int) -> torch.Tensor:
        return constant(float(self.number.of(size)), self.like.dtype, self.like.device)


class _Several(NamedTuple):
    """A tuple or list of which some items depend on the size."""

    kind: type
    items: list[object]

    def of(self, size: int) -> Any:
        return self.kind([_at(item, size) for item in self.items])


_OfSize: TypeAlias = _Multiple | _Quotient | _Constant | _Several


def _at(value: object, size: int) -> object:
    """The value for this size."""
    return value.of(size) if isinstance(value, _OfSize) else value


def _fitted(one: Any, size: int, other: Any, other_size: int) -> object:
    """What is `one` for `size` and `other` for `other_size`. Raises Unbindable if that is not
    known."""
    if is_same(one, other):
        return other
    kind = type(one)
    if kind is not type(other):
        raise Unbindable
    if kind is int and one % size == 0 and one * other_size == other * size:
        return _Multiple(one // size)
    if kind is float:
        for quotient in _quotients(one, size):
            if quotient.of(size) == one and quotient.of(other_size) == other:
                return quotient
    if kind in (torch.Size, tuple, list) and len(one) == len(other):
        items = [_fitted(a, size, b, other_size) for a, b in zip(one, other, strict=True)]
        return _Several(kind, items)
    if kind is torch.Tensor and not one.dim() and one.is_floating_point():
        number = one.item()
        if not math.isfinite(number):
            raise Unbindable
        tried: list[_Multiple | _Quotient] = [_Multiple(int(number / size))]
        for of_size in [*tried, *_quotients(number, size)]:
            found = _Constant(of_size, one)
            if is_same(found.of(size), one) and is_same(found.of(other_size), other):
                return found
    raise Unbindable


def _quotients(number: float, size: int) -> list[_Quotient]:
    """What `number` may be for this size."""
    if not number or not math.isfinite(number):
        return []
    share = (Fraction(number) * size).limit_denominator(_LARGEST_DENOMINATOR)
    found = [_Quotient(share.numerator, share.denominator)]
    for above in 1, 2:
        below = round((above / number + 1) / size)
        found += [_Quotient(above, below, 1)] if below * size > 1 else []
    return found


class Sample:
    """A walk that was recorded for one size."""

    def __init__(self, size: int, text: str, environment: source.Environment) -> None:
        self.size, self.environment = size, dict(environment)
        parts = _NUMBER.split(text)
        self.between, self.numbers = parts[::2], [*map(_read, parts[1::2])]


def _read(number: str) -> int | float:
    return int(number) if number.isdigit() else float(number)


class Sizes:
    """The values that a walk gets from its size; None for a size that it was not recorded for."""

    def __init__(self, values: Sequence[_OfSize], sizes: tuple[int, int]) -> None:
        self.values = values
        self.known: dict[int, tuple[object, ...]] = {}
        self.least, self.most = min(sizes), max(sizes)
        self.step = math.gcd(*sizes) & -math.gcd(*sizes)  # the power of two that divides them

    def include(self, size: int) -> None:
        self.least, self.most = min(self.least, size), max(self.most, size)
        self.step = math.gcd(self.step, size)

    def cover(self, size: int) -> bool:
        return self.least <= size <= self.most and size % self.step == 0

    def __call__(self, size: int) -> tuple[object, ...] | None:
        found = self.known.get(size)
        if found is None and self.cover(size):
            if len(self.known) >= _MOST_SIZES:
                self.known.clear()
            found = self.known[size] = tuple([value.of(size) for value in self.values])
        return found


class _Writer(_bound.Writer):
    """Writes the source for one size."""

    def memory(self) -> Memory | None:
        return None  # for another size it is another one


class SizedWalk(_bound.BoundWalk):
    """A bound walk for any size that its `sizes` cover."""

    def __init__(self, one: Sample, other: Sample, writer: _Writer, root: Node) -> None:
        known = one.environment
        if one.between != other.between or known.keys() != other.environment.keys():
            raise Unbindable
        self.between, sizes = one.between, (one.size, other.size)
        self.numbers = [
            _fitted(a, one.size, b, other.size)
            for a, b in zip(one.numbers, other.numbers, strict=True)
        ]
        self.environment = {
            name: _fitted(known[name], one.size, value, other.size)
            for name, value in other.environment.items()
        }
        text = self.between[0]
        values: dict[str, _OfSize] = {}
        for number, after in zip(self.numbers, self.between[1:], strict=True):
            if isinstance(number, _OfSize):
                name = f"z{len(values)}"
                values[name] = number
                text += name + after
            else:
                text += repr(number) + after
        values.update({k: v for k, v in self.environment.items() if isinstance(v, _OfSize)})
        self.sizes = Sizes([*values.values()], sizes)
        head, _, rest = text.partition("\n")
        lines = [head, "    if (sized := of_size(n0.signature.size)) is None: return None"]
        if values:
            lines.append(f"    {', '.join(values)}, = sized")
        environment = {k: v for k, v in self.environment.items() if k not in values}
        super().__init__(
            writer, root, "\n".join([*lines, rest]), environment | {"of_size": self.sizes}
        )
        self.start = writer.start
        self.compared: set[int] = set()  # for these sizes with the generic walk

    def includes(self, sample: Sample) -> bool:
        """Is this walk the same for the size of `sample`? Then it is used for it."""
        size, environment = sample.size, sample.environment
        if sample.between != self.between or environment.keys() != self.environment.keys():
            return False
        known = [*self.numbers, *self.environment.values()]
        found = [*sample.numbers, *[environment[name] for name in self.environment]]
        if not all(is_same(_at(a, size), b) for a, b in zip(known, found, strict=True)):
            return False
        self.sizes.include(size)
        return True

    def is_right(self, size: int) -> bool:
        """It has had the bits of the generic walk for `size`: is that enough?"""
        self.compared.add(size)
        return len(self.compared) >= _COMPARED


class OfAnySize:
    """The walks from the members of one family."""

    def __init__(self, waits: int) -> None:
        self.walks: list[SizedWalk] = []
        self.apart: list[Sample] = []  # those that fit none of the walks
        self.waits = waits  # for how many more walks without one for their size
        self.recorded = self.repeated = 0
        self.recording = threading.Lock()

    def walk_for(self, size: int) -> SizedWalk | None:
        return next((walk for walk in self.walks if walk.sizes.cover(size)), None)

    def record(self, size: int, node: Node, start: torch.Tensor) -> bool:
        """Record the walk from `node`, if that may be worth it; False if there are no walks for any
        size.

        Raises Unbindable if it cannot be bound, ChangedSince if it cannot be now.
        """
        if not self.recording.acquire(blocking=False):
            return True
        try:
            return self._record(size, node, start)
        finally:
            self.recording.release()

    def _record(self, size: int, node: Node, start: torch.Tensor) -> bool:
        if any([sample.size == size for sample in self.apart]):  # it has to be another one
            self.repeated += 1
            return bool(self.walks) or self.repeated < _MOST_REPEATED
        writer = _Writer(node)
        writer.start_varies = True  # or what is computed from it has this size
        writer.go_back(start)
        sample = Sample(size, writer.source(), writer.environment)
        writer.put_off()
        self.recorded += 1
        self.waits = (1 << max(self.recorded - _AT_ONCE, 0)) - 1
        if not any([walk.includes(sample) for walk in self.walks]):
            for other in self.apart:
                if other.size == size:
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
