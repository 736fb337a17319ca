"""What a function does: what it returns, raises, warns of, and draws of the random generators."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .compare import BITWISE, Tolerance, assert_same, normal


@dataclass
class Outcome:
    """What one run of a function did."""

    value: Any  # what it returned; None if it raised
    error: Exception | None
    warnings: list[tuple[str, str]]  # the class's name and the message
    generators: list[torch.Tensor]  # the states of the random generators after it


def outcome(function: Callable[[], Any], devices: Iterable[str] = ()) -> Outcome:
    """Call `function()` and note what it does, its exceptions too.

    Of the random generators, that of the CPU is noted and those of `devices`. PyTorch's warnings
    that come once in a process come each time.
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
    # How PyTorch goes about it, which depends on what was called in the process before.
    said = [(kind, text) for kind, text in said if "implemented the batching rule" not in text]
    return Outcome(value, error, said, generator_states(devices))


def assert_same_outcome(
    actual: Outcome, expected: Outcome, tolerance: Tolerance = BITWISE, where: str = "result"
) -> None:
    """Assert that two runs did the same.

    Values as `assert_same` compares them; exceptions by type and message; the warnings; and the
    random generators. An exception that was not expected is raised again as it is.
    """
    assert_same_error(actual, expected)
    if actual.warnings != expected.warnings:
        raise AssertionError(f"warnings: expected {expected.warnings}, found {actual.warnings}")
    assert_same(actual.value, expected.value, where, tolerance)
    for e, a in zip(expected.generators, actual.generators, strict=True):
        if not torch.equal(e, a):
            raise AssertionError("other random numbers were drawn: the generators' states differ")


def assert_same_error(actual: Outcome, expected: Outcome) -> None:
    """Both raised exceptions of one type with one message, or neither any."""
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
    """Put back what `generator_states` gave for the same devices."""
    torch.set_rng_state(states[0])
    others = [device for device in devices if device != "cpu"]
    for device, state in zip(others, states[1:], strict=True):
        _of(device).set_rng_state(state)


def _of(device: str) -> Any:
    return getattr(torch, torch.device(device).type)
