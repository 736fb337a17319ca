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
allow.

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
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import nnmirror
import nnmirror.optim
from nnmirror import fast
from nnmirror.exact import mode
from nnmirror.exact.table import ATTACHED


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


@dataclass
class Outcome:
    value: Any
    error: BaseException | None
    warnings: list[tuple[str, str]]
    generators: list[torch.Tensor]


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    """What is made without naming a device is made on this one."""
    if device == CPU:  # it is anyway, and without a mode that sees every call
        yield
    else:
        with torch.device(device):
            yield


def generators(device: str) -> list[torch.Tensor]:
    """The states of the random generators that a test on the device may draw from."""
    states = [torch.get_rng_state()]
    if device != CPU:
        states.append(getattr(torch, torch.device(device).type).get_rng_state())
    return states


def outcome(
    function: Callable[..., Any], nn: Any, optim: Any, device: str = CPU, /, **params: Any
) -> Outcome:
    """What `function` returns, raises and warns of on one backend."""
    torch.manual_seed(0)
    value, error = None, None
    params = copy.deepcopy(params)
    if device != CPU:
        params = tree_map_only(torch.Tensor, lambda t: t.to(device), params)
    with warnings.catch_warnings(record=True) as caught, default_device(device):
        warnings.simplefilter("always")
        # What PyTorch says but once in a process, it says to each test.
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)
        try:
            value = function(nn, optim, **params)
        except Exception as e:
            error = e
        finally:
            torch.set_warn_always(always)
    said = [(w.category.__name__, normal(str(w.message))) for w in caught]
    # How PyTorch goes about it, which depends on what was called in the process before.
    said = [(kind, text) for kind, text in said if "implemented the batching rule" not in text]
    return Outcome(value, error, said, generators(device))


def both(
    function: Callable[..., Any], device: str = CPU, /, **params: Any
) -> tuple[Outcome, Outcome]:
    expected = outcome(function, torch.nn, torch.optim, device, **params)
    actual = outcome(function, nnmirror, nnmirror.optim, device, **params)
    return expected, actual


@contextlib.contextmanager
def bound_at_once() -> Iterator[None]:
    """Every walk is bound the first time it comes, and compared with the generic one."""
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
    with exactly(True), noted_forms() as calls:
        same_outcome(expected, outcome(function, nnmirror, nnmirror.optim, device, **params))
    if any(isinstance(p, Path) for p in params.values()):
        return  # a test with files of its own, which another run would find
    with exactly(True), bound_at_once():
        same_outcome(expected, outcome(function, nnmirror, nnmirror.optim, device, **params))
    if calls and not hasattr(function, "exact_only"):
        units = sum(a.units * calls[a.rule] for a in ATTACHED)
        with exactly(False), within(units, expected.value):
            same_outcome(expected, outcome(function, nnmirror, nnmirror.optim, device, **params))
            with bound_at_once():
                again = outcome(function, nnmirror, nnmirror.optim, device, **params)
            same_outcome(expected, again)
    if device != CPU and expected.error is not None:
        on_cpu = outcome(function, torch.nn, torch.optim, **params).error
        if type(on_cpu) is not type(expected.error):
            pytest.skip(f"after it, alike on both, PyTorch raises on {device} {expected.error!r}")


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


def same_outcome(expected: Outcome, actual: Outcome) -> None:
    if expected.error is None and actual.error is not None:
        raise actual.error
    if expected.error is not None:
        said = f"PyTorch raised {expected.error!r}"
        assert actual.error is not None, f"{said}, the mirror did not"
        assert type(actual.error) is type(expected.error), f"{said}, mirror: {actual.error!r}"
        assert normal(str(actual.error)) == normal(str(expected.error))
    assert actual.warnings == expected.warnings
    same(expected.value, actual.value, "result")
    for e, a in zip(expected.generators, actual.generators, strict=True):
        assert torch.equal(e, a), "random generators differ"


def normal(message: str) -> str:
    """A message without what may differ: addresses, package names, where C++ warned from."""
    message = re.sub(r" \(Triggered internally at .*\)", "", message, flags=re.S)
    message = re.sub(r"0x[0-9a-f]+", "0x", message)
    message = re.sub(r"\btorch\.nn\.parameter\.|\bnnmirror\.parameter\.", "", message)
    message = message.replace("nnmirror.tensor.Tensor", "torch.Tensor")
    return re.sub(r"\btorch\.(nn|optim)\b|\bnnmirror(\.optim)?\b", "nnmirror", message).strip()


def same(expected: Any, actual: Any, where: str) -> None:
    """Assert that two results are alike all through, tensors to the last bit."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), f"{where}: {type(actual)} is no tensor"
        same_tensor(expected, actual, where)
    elif isinstance(expected, Mapping):
        assert list(expected) == list(actual), f"{where}: keys differ"
        for key in expected:
            same(expected[key], actual[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert type(expected).__name__ == type(actual).__name__, where
        assert len(expected) == len(actual), f"{where}: lengths differ"
        for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
            same(e, a, f"{where}[{i}]")
    elif isinstance(expected, str):
        assert normal(actual) == normal(expected), where
    elif isinstance(expected, float) and _allowed[0] and type(actual) is float:
        same_tensor(torch.tensor(expected), torch.tensor(actual), where)
    elif isinstance(expected, float):
        assert repr(expected) == repr(actual), where
    else:
        assert expected == actual, f"{where}: {expected!r} and {actual!r}"


def same_tensor(expected: torch.Tensor, actual: torch.Tensor, where: str) -> None:
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
        e, a = getattr(expected, name), getattr(actual, name)
        assert e == a, f"{where}.{name}: {e} and {a}"
    e, a = expected.detach(), actual.detach()
    allowed = _allowed[0]
    if allowed is not None and (e.is_floating_point() or e.is_complex()):
        off = units_apart(e, a, allowed.eps, allowed.largest)
        assert off <= allowed.units, f"{where} differs by {off}, not {allowed}:\n{e}\n{a}"
    else:
        assert same_bits(e, a), f"{where} differs by up to {(e - a).abs().max()}:\n{e}\n{a}"
    if expected.is_leaf and (expected.grad is not None or actual.grad is not None):
        assert expected.grad is not None, f"{where}: only the mirror's has .grad"
        assert actual.grad is not None, f"{where}: only PyTorch's has .grad"
        same_tensor(expected.grad, actual.grad, f"{where}.grad")
        assert expected.grad.stride() == actual.grad.stride(), f"{where}.grad strides"


@dataclass
class Allowed:
    """By how much tensors may differ."""

    units: float  # in the last place
    eps: float = 0.0  # of the coarsest dtype in the result: kernels round to it on the way
    # The largest number in the result. A gradient may be 0 but for rounding, such as that of a
    # bias in front of a normalisation, and has no scale of its own.
    largest: float = 0.0


_allowed: list[Allowed | None] = [None]  # None: not by a bit


@contextlib.contextmanager
def within(units: float, result: Any = None) -> Iterator[None]:
    """Tensors are the same if they differ by at most so many units in the last place.

    In that of the largest number in `result`, or in them.
    """
    allowed = Allowed(units)
    tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
    grads = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    floats = [t.detach() for t in [*tensors, *grads] if t.is_floating_point()]
    allowed.eps = max([torch.finfo(t.dtype).eps for t in floats], default=0.0)
    allowed.largest = max([_largest(t) for t in floats], default=0.0)
    before, _allowed[0] = _allowed[0], allowed
    try:
        yield
    finally:
        _allowed[0] = before


def _largest(x: torch.Tensor) -> float:
    """The largest |x|, but for those that are infinite or no number."""
    x = x[x.isfinite()].double().abs()
    return x.max().item() if x.numel() else 0.0


def units_apart(e: torch.Tensor, a: torch.Tensor, eps: float = 0.0, largest: float = 0.0) -> float:
    """The largest |e - a|, in units in the last place of the largest |e|, or of `largest`."""
    if e.is_complex():
        e, a = torch.view_as_real(e), torch.view_as_real(a)
    finite = e.isfinite()
    if not (torch.equal(finite, a.isfinite()) and same_bits(e[~finite], a[~finite])):
        return float("inf")
    if not finite.any():
        return 0.0
    eps = max(eps, torch.finfo(e.dtype).eps)
    # Below its smallest normal number a dtype has no more units.
    unit = eps * max(_largest(e), largest, torch.finfo(torch.float32).tiny)
    return _largest(e.double() - a.double()) / unit


def same_bits(e: torch.Tensor, a: torch.Tensor) -> bool:
    """Equal, zeros of the same sign, and NaN where the other is NaN."""
    if not (e.is_floating_point() or e.is_complex()):
        return torch.equal(e, a)
    if e.is_complex():
        return same_bits(torch.view_as_real(e), torch.view_as_real(a))
    nan = e.isnan()
    if not torch.equal(nan, a.isnan()):
        return False
    zero = torch.zeros((), dtype=e.dtype, device=e.device)
    e, a = torch.where(nan, zero, e), torch.where(nan, zero, a)
    return torch.equal(e, a) and torch.equal(e.signbit(), a.signbit())


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
