"""The outcome of a function: its result, exception, warnings and random draws."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from .compare import BITWISE, Tolerance, assert_same, normal


@dataclass
class Outcome:
    """The outcome of one run of a function."""

    value: object  # its result; None if it raised
    error: Exception | None
    warnings: list[tuple[str, str]]  # the class's name and the message
    generators: list[torch.Tensor]  # the states of the random generators after it


def outcome(function: Callable[[], object], devices: Iterable[str] = ()) -> Outcome:
    """Call `function()` and return its outcome, including an exception.

    It includes the states of the random generators of the CPU and of `devices`. PyTorch's warnings
    that appear once per process are given each time.
    """
    value, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)
        try:
            value = function()
        except Exception as e:
            error = e
        finally:
            torch.set_warn_always(always)
    said = [(w.category.__name__, normal(str(w.message))) for w in caught]
    # Warnings about PyTorch's implementation, which depend on earlier calls in the process.
    said = [(kind, text) for kind, text in said if "implemented the batching rule" not in text]
    return Outcome(value, error, said, generator_states(devices))


def assert_same_outcome(
    actual: Outcome, expected: Outcome, tolerance: Tolerance = BITWISE, where: str = "result"
) -> None:
    """Assert that two runs had the same outcome.

    It compares values as `assert_same` does, exceptions by type and message, warnings, and the
    random generators. An unexpected exception is raised again.
    """
    assert_same_error(actual, expected)
    if actual.warnings != expected.warnings:
        raise AssertionError(f"warnings: expected {expected.warnings}, found {actual.warnings}")
    assert_same(actual.value, expected.value, where, tolerance)
    for e, a in zip(expected.generators, actual.generators, strict=True):
        if not torch.equal(e, a):
            raise AssertionError("other random numbers were drawn: the generators' states differ")


def assert_same_error(actual: Outcome, expected: Outcome) -> None:
    """Both raised exceptions of the same type with the same message, or neither did."""
    if expected.error is None:
        if actual.error is not None:
            actual.error.add_note("This was raised where no error was expected.")
            raise actual.error
        return
    wanted = f"expected {expected.error!r}"
    if actual.error is None:
        raise AssertionError(f"error: {wanted}, but none was raised")
    same_type = type(actual.error) is type(expected.error)
    if not same_type or normal(str(actual.error)) != normal(str(expected.error)):
        raise AssertionError(f"error: {wanted}, found {actual.error!r}") from actual.error


def generator_states(devices: Iterable[str] = ()) -> list[torch.Tensor]:
    """The states of the CPU's random generator, and of those of other devices."""
    return [
        torch.get_rng_state(),
        *(_of(device).get_rng_state() for device in devices if device != "cpu"),
    ]


def set_generator_states(states: Sequence[torch.Tensor], devices: Iterable[str] = ()) -> None:
    """Restore what `generator_states` returned for the same devices."""
    torch.set_rng_state(states[0])
    others = [device for device in devices if device != "cpu"]
    for device, state in zip(others, states[1:], strict=True):
        _of(device).set_rng_state(state)


def _of(device: str) -> ModuleType:
    return getattr(torch, torch.device(device).type)
