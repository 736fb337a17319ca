"""Run a function of `(nn, optim)` on PyTorch and on the mirror, and compare what it does.

    @parity
    def test_linear(nn, optim):
        torch.manual_seed(0)
        return nn.Linear(2, 3).weight

The returned value (tensors bit by bit), the warnings, the exception (type and message) and the
final state of the random generators are compared. pytest parameters of the test are passed on to
the function.

The comparison is done in exact mode. If a rule with an exact form was used (see nnmirror/exact),
the function is also run in default mode and compared within the units in the last place that the
rules allow. Further runs bind walks and generate code for repeated calls at the first occurrence.

A test runs on every available device: the CPU, and a GPU if PyTorch finds one. Tensors that the
function creates without naming a device are created on that one, as inside
`with torch.device(...)`. NNMIRROR_DEVICES=cuda,cpu names other devices.
"""

import collections
import contextlib
import copy
import functools
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

import nnmirror
import nnmirror.optim
from nnmirror import fast, testing
from nnmirror.exact import mode
from nnmirror.exact.table import ATTACHED
from nnmirror.testing import (  # noqa: F401  some for the tests that import them from here
    Outcome,
    Tolerance,
    assert_same,
    assert_same_outcome,
    normal,
    same_bits,
    units_apart,
)


def _devices() -> list[str]:
    named = os.environ.get("NNMIRROR_DEVICES")
    if named:
        return named.split(",")
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


CPU = "cpu"
DEVICES = _devices()


def cpu_only(why: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a test (below `parity`) that needs something which only the CPU has."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.cpu_only = why  # type: ignore[attr-defined]
        return function

    return mark


def exact_only(why: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a test (below `parity`) that holds in exact mode only."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.exact_only = why  # type: ignore[attr-defined]
        return function

    return mark


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    """Create tensors on this device where none is named."""
    if device == CPU:  # the default, without a mode that sees every call
        yield
    else:
        with torch.device(device):
            yield


def outcome(
    function: Callable[..., Any], nn: Any, optim: Any, device: str = CPU, /, **params: Any
) -> Outcome:
    """The value that `function` returns on one backend, its exception and its warnings."""
    torch.manual_seed(0)
    params = copy.deepcopy(params)
    if device != CPU:
        params = tree_map_only(torch.Tensor, lambda t: t.to(device), params)
    with default_device(device):
        return testing.outcome(lambda: function(nn, optim, **params), [device])


def both(
    function: Callable[..., Any], device: str = CPU, /, **params: Any
) -> tuple[Outcome, Outcome]:
    expected = outcome(function, torch.nn, torch.optim, device, **params)
    actual = outcome(function, nnmirror, nnmirror.optim, device, **params)
    return expected, actual


@contextlib.contextmanager
def bound_at_once() -> Iterator[None]:
    """Bind every walk at its first occurrence, and compare it with the generic one; also generate
    code for repeated calls then."""
    after, fast.after = fast.after, 1
    try:
        yield
    finally:
        fast.after = after


@contextlib.contextmanager
def exactly(wanted: bool) -> Iterator[None]:
    """Turn exact mode on or off in the whole process."""
    before = nnmirror.is_exact()
    nnmirror.set_exact(wanted)
    try:
        yield
    finally:
        nnmirror.set_exact(before)


@contextlib.contextmanager
def noted_forms() -> Iterator[collections.Counter[Any]]:
    """Count the calls of each rule that has an exact form."""
    calls: collections.Counter[Any] = collections.Counter()
    chosen = mode.chosen

    def noting(function: Any) -> Any:
        calls[function] += 1
        return chosen(function)

    mode.chosen = noting
    try:
        yield calls
    finally:
        mode.chosen = chosen


def compare(function: Callable[..., Any], device: str = CPU, /, **params: Any) -> None:
    """Assert that `function` does the same on both backends, on this device."""
    expected = outcome(function, torch.nn, torch.optim, device, **params)
    if isinstance(expected.error, _OF_A_TEST) and _is_raised_in_a_test(expected.error):
        raise expected.error  # nothing would be compared but this
    units = getattr(function, "off_by", 0)
    nearly = within(units, expected.value) if units else contextlib.nullcontext()
    with exactly(True), noted_forms() as calls:
        actual = outcome(function, nnmirror, nnmirror.optim, device, **params)
    with nearly:
        same_outcome(expected, actual)
        if any(isinstance(p, Path) for p in params.values()):
            return  # the test writes files, which another run would find
        # Some code is generated in default mode only: same bits if no exact form was used.
        with exactly(bool(calls)), bound_at_once():
            same_outcome(expected, outcome(function, nnmirror, nnmirror.optim, device, **params))
    if calls and not hasattr(function, "exact_only"):
        units += sum(a.units * calls[a.rule] for a in ATTACHED)
        with exactly(False), within(units, expected.value):
            same_outcome(expected, outcome(function, nnmirror, nnmirror.optim, device, **params))
            with bound_at_once():
                again = outcome(function, nnmirror, nnmirror.optim, device, **params)
            same_outcome(expected, again)
    if device != CPU and expected.error is not None:
        on_cpu = outcome(function, torch.nn, torch.optim, **params).error
        if type(on_cpu) is not type(expected.error):
            pytest.skip(f"after it, alike on both, PyTorch raises on {device} {expected.error!r}")


_OF_A_TEST = (AssertionError, ImportError, KeyError, NameError)  # mistakes in the test itself


def _is_raised_in_a_test(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).parent == Path(__file__).parent


def off_by(units: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a test (below `parity`) that may differ by so many units in exact mode too."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.off_by = units  # type: ignore[attr-defined]
        return function

    return mark


def parity(function: Callable[..., Any]) -> Callable[..., None]:
    """Make a test of `function`: it must do the same on both backends, on every device."""

    @functools.wraps(function)
    def test(on_device: str, **params: Any) -> None:
        compare(function, on_device, **params)

    names = list(inspect.signature(function).parameters.values())[2:]
    on_device = inspect.Parameter("on_device", inspect.Parameter.KEYWORD_ONLY)
    test.__signature__ = inspect.Signature([*names, on_device])  # type: ignore[attr-defined]
    del test.__wrapped__  # type: ignore[attr-defined]
    devices = [CPU] if hasattr(function, "cpu_only") else DEVICES
    return pytest.mark.parametrize("on_device", devices)(test)


_allowed: list[Tolerance] = [Tolerance()]  # none: every bit must be the same


def same_outcome(expected: Outcome, actual: Outcome) -> None:
    """Assert that two backends did the same, within the current tolerance."""
    assert_same_outcome(actual, expected, _allowed[0])


def same(expected: Any, actual: Any, where: str) -> None:
    """Assert that two results are equal in every part, within the current tolerance."""
    assert_same(actual, expected, where, _allowed[0])


@contextlib.contextmanager
def within(units: float, result: Any = None) -> Iterator[None]:
    """Let tensors differ by at most so many units in the last place.

    The unit is that of the largest number in `result`, or else in the tensors compared.
    """
    before, _allowed[0] = _allowed[0], Tolerance(units=units).scaled_to(result)
    try:
        yield
    finally:
        _allowed[0] = before


def trained(
    nn: Any, optim: Any, model: Any, x: Any, target: Any, steps: int = 3, **sgd: Any
) -> Any:
    """Losses, then weights and gradients, after some steps of SGD."""
    optimizer = optim.SGD(model.parameters(), **{"lr": 0.1, **sgd})
    criterion = nn.MSELoss()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses, dict(model.named_parameters())
