"""Run a function of `(nn, optim)` on PyTorch and on the mirror, and compare what it does.

    @parity
    def test_linear(nn, optim):
        torch.manual_seed(0)
        return nn.Linear(2, 3).weight

Compared are the value returned (tensors bit by bit), the warnings given, the exception
raised (type and message) and the state of the random generators afterwards. pytest
parameters of the test are passed on to the function.

Where a rule with an exact form was used (see nnmirror/exact), that was in exact mode. The same is
then run by default too, and compared within the units in the last place that the rules used
allow. What repeats is bound and generated at once in another run.

A test is run on every device there is: the CPU, and a GPU where PyTorch finds one. The function
need not know: what it makes without naming a device is made on that one, as inside
`with torch.device(...)`. NNMIRROR_DEVICES=cuda,cpu names others.
"""

import collections
import contextlib
import copy
import functools
import inspect
import os
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
    """Of a test, below `parity`: it asks for something that only the CPU has."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.cpu_only = why  # type: ignore[attr-defined]
        return function

    return mark


def exact_only(why: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a test, below `parity`: what it asks for is so in exact mode alone."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.exact_only = why  # type: ignore[attr-defined]
        return function

    return mark


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    """What is made without naming a device is made on this one."""
    if device == CPU:  # it is anyway, and without a mode that sees every call
        yield
    else:
        with torch.device(device):
            yield


def outcome(
    function: Callable[..., Any], nn: Any, optim: Any, device: str = CPU, /, **params: Any
) -> Outcome:
    """What `function` returns, raises and warns of on one backend."""
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
    """Every walk is bound the first time it comes, and compared with the generic one; what repeats
    is generated the first time."""
    after, fast.after = fast.after, 1
    try:
        yield
    finally:
        fast.after = after


@contextlib.contextmanager
def exactly(wanted: bool) -> Iterator[None]:
    """Exact mode in the whole process, or not."""
    before = nnmirror.is_exact()
    nnmirror.set_exact(wanted)
    try:
        yield
    finally:
        nnmirror.set_exact(before)


@contextlib.contextmanager
def noted_forms() -> Iterator[collections.Counter[Any]]:
    """How often each rule that has an exact form is called."""
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
    units = getattr(function, "off_by", 0)
    nearly = within(units, expected.value) if units else contextlib.nullcontext()
    with exactly(True), noted_forms() as calls:
        actual = outcome(function, nnmirror, nnmirror.optim, device, **params)
    with nearly:
        same_outcome(expected, actual)
        if any(isinstance(p, Path) for p in params.values()):
            return  # a test with files of its own, which another run would find
        # What is generated for default mode alone has the same bits where no exact form was used.
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


def off_by(units: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of a test, below `parity`: something in it differs by so many units in exact mode too."""

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


_allowed: list[Tolerance] = [Tolerance()]  # not by a bit


def same_outcome(expected: Outcome, actual: Outcome) -> None:
    """Assert that two backends did the same, within what is allowed."""
    assert_same_outcome(actual, expected, _allowed[0])


def same(expected: Any, actual: Any, where: str) -> None:
    """Assert that two results are alike all through, within what is allowed."""
    assert_same(actual, expected, where, _allowed[0])


@contextlib.contextmanager
def within(units: float, result: Any = None) -> Iterator[None]:
    """Tensors are the same if they differ by at most so many units in the last place.

    In that of the largest number in `result`, or in them.
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
