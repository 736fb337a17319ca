"""Compare two results: tensors to the bit, or within a tolerance."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..bits import differing_bits, same_bits


@dataclass(frozen=True)
class Tolerance:
    """How much numbers may differ: `Tolerance()` means that all bits must be equal.

    With `rtol` or `atol`, as `torch.testing.assert_close`: |actual - expected| <= atol + rtol
    |expected|, NaN equal to NaN. With `units`, by this many units in the last place of the largest
    number in the expected tensor. Integers, booleans and strings may never differ.
    """

    rtol: float = 0.0
    atol: float = 0.0
    units: float | None = None
    # The unit is at least that of this eps and this number: see `scaled_to`.
    eps: float = 0.0
    largest: float = 0.0

    def __post_init__(self) -> None:
        if self.units is not None and (self.rtol or self.atol):
            raise ValueError("give rtol and atol, or units; not both")

    @property
    def is_bitwise(self) -> bool:
        """Is no difference allowed at all? Of zero, the sign counts too."""
        return self.units is None and not (self.rtol or self.atol)

    def scaled_to(self, result: object) -> "Tolerance":
        """The same, with a unit no smaller than that of the largest number in `result`.

        A gradient may be zero except for rounding, such as that of a bias before a normalisation,
        and then has no scale of its own. And kernels round to the coarsest dtype.
        """
        tensors = [t for _, t in named_tensors(result, "")]
        grads = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        floats = [t.detach() for t in [*tensors, *grads] if t.is_floating_point()]
        return dataclasses.replace(
            self,
            eps=max([torch.finfo(t.dtype).eps for t in floats], default=0.0),
            largest=max([_largest(t) for t in floats], default=0.0),
        )

    def exceeded(self, expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
        """Where two floating-point tensors of one shape and dtype differ by more than this."""
        if self.is_bitwise:
            return differing_bits(expected, actual)
        distance = _distance(expected, actual)
        if self.units is not None:
            return distance / _unit(expected, self.eps, self.largest) > self.units
        allowed = self.atol + self.rtol * expected.double().abs()
        # Equal infinities have distance 0.
        return ~(distance <= allowed.nan_to_num(nan=0.0, posinf=0.0))

    def __str__(self) -> str:
        if self.units is not None:
            return f"allowed: {self.units:g} units in the last place"
        if self.is_bitwise:
            return "allowed: not a bit"
        return f"allowed: {self.atol:g} + {self.rtol:g} |expected|"


BITWISE = Tolerance()


def assert_same(
    actual: Any, expected: object, where: str = "result", tolerance: Tolerance = BITWISE
) -> None:
    """Assert that two results are equal, by default to the last bit.

    Tensors, and lists, tuples and mappings of them: shape, dtype, device, `requires_grad`,
    `is_leaf`, numbers, and the `.grad` of a leaf. In strings the names of the two libraries count
    as equal. `where` is the name of the result in the message of the AssertionError, which gives
    the first place that differs, the expected and the found value, and the difference:

        >>> assert_same(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), "output")
        AssertionError: output differs in 1 of 2 elements (allowed: not a bit)
          at [1]: expected 2.5, found 2.0, off by 0.5 (2.1e+06 units in the last place)
    """
    if isinstance(expected, torch.Tensor):
        if not isinstance(actual, torch.Tensor):
            raise _unlike(where, "a tensor", actual)
        _assert_same_tensor(actual, expected, where, tolerance)
    elif isinstance(expected, Mapping):
        if not isinstance(actual, Mapping):
            raise _unlike(where, "a mapping", actual)
        if list(expected) != list(actual):
            raise _unlike(f"{where}: the keys", repr(list(expected)), list(actual))
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}[{key!r}]", tolerance)
    elif isinstance(expected, list | tuple):
        if type(expected).__name__ != type(actual).__name__:
            raise _unlike(where, f"a {type(expected).__name__}", actual)
        if len(expected) != len(actual):
            raise _unlike(f"{where}: the number of items", str(len(expected)), len(actual))
        for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
            assert_same(a, e, f"{where}[{i}]", tolerance)
    elif isinstance(expected, float) and type(actual) is float and not tolerance.is_bitwise:
        _assert_same_tensor(torch.tensor(actual), torch.tensor(expected), where, tolerance)
    else:
        if isinstance(expected, str):
            alike = isinstance(actual, str) and normal(actual) == normal(expected)
        elif isinstance(expected, float):
            alike = repr(expected) == repr(actual)
        elif isinstance(expected, int | complex):
            alike = type(expected) is type(actual) and expected == actual
        else:
            alike = not isinstance(actual, torch.Tensor) and bool(expected == actual)
        if not alike:
            raise _unlike(where, repr(expected), actual)


def normal(message: str) -> str:
    """A message without parts that may differ: addresses, package names, C++ source locations."""
    message = re.sub(r" \(Triggered internally at .*\)", "", message, flags=re.S)
    message = re.sub(r"0x[0-9a-f]+", "0x", message)
    message = re.sub(r"\btorch\.nn\.parameter\.|\bnnmirror\.parameter\.", "", message)
    message = message.replace("nnmirror.tensor.Tensor", "torch.Tensor")
    return re.sub(r"\btorch\.(nn|optim)\b|\bnnmirror(\.optim)?\b", "nnmirror", message).strip()


def units_apart(
    expected: torch.Tensor, actual: torch.Tensor, eps: float = 0.0, largest: float = 0.0
) -> float:
    """The largest |expected - actual|, in units in the last place.

    A unit is eps times the largest |expected| or `largest`, whichever is more, with the eps of the
    dtype or the one given. It is infinite where one is infinite or NaN and the other is not.
    """
    distance = _distance(expected, actual)
    if not distance.numel():
        return 0.0
    return (distance.max() / _unit(expected, eps, largest)).item()


def named_tensors(value: object, where: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in `value`, each with its name: "output", "output[1]", "output['loss']"."""
    if isinstance(value, torch.Tensor):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from named_tensors(item, f"{where}[{i}]")


def number(value: torch.Tensor) -> str:
    """The shortest decimal that gives this number in its dtype."""
    exact = value.item()
    if not value.dtype.is_floating_point or exact != exact or abs(exact) == float("inf"):
        return repr(exact)
    for digits in range(1, 18):
        shorter = float(f"{exact:.{digits}g}")
        if torch.tensor(shorter, dtype=value.dtype).item() == exact:
            return repr(shorter)
    return repr(exact)


def place(flat: int, shape: torch.Size) -> str:
    """The index of element number `flat` of a tensor of this shape: "[1, 2]"; "" of a number."""
    index: list[int] = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        index.insert(0, i)
    return str(index) if index else ""


# -- tensors -------------------------------------------------------------------------------


def _unlike(where: str, expected: str, found: object) -> AssertionError:
    """Called only if they differ: printing a tensor is slow."""
    return AssertionError(f"{where}: expected {expected}, found {found!r}")


def _assert_same_tensor(
    actual: torch.Tensor, expected: torch.Tensor, where: str, tolerance: Tolerance
) -> None:
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
        e, a = getattr(expected, name), getattr(actual, name)
        if e != a:
            raise AssertionError(f"{where}.{name}: expected {e}, found {a}")
    e, a = expected.detach(), actual.detach()
    rounded = e.is_floating_point() or e.is_complex()
    if tolerance.is_bitwise or not rounded:
        alike = same_bits(e, a)
    else:
        alike = not _exceeded(tolerance, e, a).any()
    if not alike:
        raise AssertionError(_difference(a, e, where, tolerance if rounded else BITWISE))
    if not expected.is_leaf:
        return
    grad, other = expected.grad, actual.grad
    if grad is None or other is None:
        if grad is not other:
            raise _unlike(f"{where}.grad", "None" if grad is None else "a tensor", other)
        return
    _assert_same_tensor(other, grad, f"{where}.grad", tolerance)
    if grad.stride() != other.stride():
        raise AssertionError(
            f"{where}.grad.stride(): expected {grad.stride()}, found {other.stride()}"
        )


def _exceeded(tolerance: Tolerance, e: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Where they differ by more; for a complex number, if one of its parts does."""
    if e.is_complex():
        return tolerance.exceeded(torch.view_as_real(e), torch.view_as_real(a)).any(-1)
    if e.is_floating_point():
        return tolerance.exceeded(e, a)
    return e != a


def _difference(a: torch.Tensor, e: torch.Tensor, where: str, tolerance: Tolerance) -> str:
    """The number of elements that differ, and the expected and found values at the first and the
    worst."""
    wrong = _exceeded(tolerance, e, a).reshape(-1)
    count = int(wrong.sum())
    of = f"in {count} of {wrong.numel()} elements" if e.dim() else f"({number(e)} expected)"
    lines = [f"{where} differs {of} ({tolerance})"]
    first = int(wrong.nonzero()[0])
    worst = first
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in (e, a)]
    unit = distance = None
    if parts[0].is_floating_point():
        distance = _distance(parts[0], parts[1])
        if e.is_complex():
            distance = distance.amax(-1)
        distance = distance.reshape(-1)
        unit = _unit(parts[0], tolerance.eps, tolerance.largest)
        worst = int(torch.where(wrong, distance, -1.0).argmax())
    for flat in dict.fromkeys([first, worst]):
        found, wanted = a.reshape(-1)[flat], e.reshape(-1)[flat]
        at = place(flat, e.shape)
        text = f"expected {number(wanted)}, found {number(found)}"
        if distance is not None and unit is not None:
            text += f", off by {_off(distance[flat].item(), unit)}"
        what = "" if first == worst else " the first:" if flat == first else " the furthest off:"
        lines.append(f" {what}{f' at {at}:' if at else ''} {text}")
    return "\n".join(lines)


def _off(distance: float, unit: float) -> str:
    if distance == 0:
        return "the sign of zero"
    if distance == float("inf"):
        return "more than any number"
    return f"{distance:.3g} ({distance / unit:.2g} units in the last place)"


def _distance(e: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """|e - a| in float64: infinite if one is infinite or NaN and the other is not the same."""
    if e.is_complex():
        e, a = torch.view_as_real(e), torch.view_as_real(a)
    distance = (e.double() - a.double()).abs()
    # Anything that is not a difference of two numbers is NaN or infinite already.
    alike = ~differing_bits(e, a)
    return torch.where(alike, 0.0, distance.nan_to_num(nan=float("inf"), posinf=float("inf")))


def _unit(e: torch.Tensor, eps: float, largest: float) -> float:
    if e.is_complex():
        e = torch.view_as_real(e)
    eps = max(eps, torch.finfo(e.dtype).eps)
    # Below the smallest normal number, the unit does not get smaller.
    return eps * max(_largest(e), largest, torch.finfo(torch.float32).tiny)


def _largest(x: torch.Tensor) -> float:
    """The largest |x|, except infinities and NaN."""
    x = x[x.isfinite()].double().abs()
    return x.max().item() if x.numel() else 0.0
