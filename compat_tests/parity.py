"""Run a function of `(nn, optim)` on PyTorch and on the mirror, and compare what it does.

    @parity
    def test_linear(nn, optim):
        torch.manual_seed(0)
        return nn.Linear(2, 3).weight

Compared are the value returned (tensors bit by bit), the warnings given, the exception
raised (type and message) and the state of the random generator afterwards. pytest
parameters of the test are passed on to the function.
"""

import copy
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import nnmirror
import nnmirror.optim


@dataclass
class Outcome:
    value: Any
    error: BaseException | None
    warnings: list[tuple[str, str]]
    generator: torch.Tensor


def outcome(function: Callable[..., Any], nn: Any, optim: Any, **params: Any) -> Outcome:
    """What `function` returns, raises and warns of on one backend."""
    torch.manual_seed(0)
    value, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = function(nn, optim, **copy.deepcopy(params))
        except Exception as e:
            error = e
    said = [(w.category.__name__, normal(str(w.message))) for w in caught]
    return Outcome(value, error, said, torch.get_rng_state())


def both(function: Callable[..., Any], **params: Any) -> tuple[Outcome, Outcome]:
    expected = outcome(function, torch.nn, torch.optim, **params)
    actual = outcome(function, nnmirror, nnmirror.optim, **params)
    return expected, actual


def parity(function: Callable[..., Any]) -> Callable[..., None]:
    """Make a test of `function`: it must do the same on both backends."""

    @functools.wraps(function)
    def test(**params: Any) -> None:
        expected, actual = both(function, **params)
        same_outcome(expected, actual)

    names = list(inspect.signature(function).parameters.values())[2:]
    test.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    del test.__wrapped__  # type: ignore[attr-defined]
    return test


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
    assert torch.equal(expected.generator, actual.generator), "random generators differ"


def normal(message: str) -> str:
    """A message without what may differ: addresses, package names, where C++ warned from."""
    message = re.sub(r" \(Triggered internally at .*\)", "", message, flags=re.S)
    message = re.sub(r"0x[0-9a-f]+", "0x", message)
    message = re.sub(r"\btorch\.nn\.parameter\.|\bnnmirror\.parameter\.", "", message)
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
    elif isinstance(expected, float):
        assert repr(expected) == repr(actual), where
    else:
        assert expected == actual, f"{where}: {expected!r} and {actual!r}"


def same_tensor(expected: torch.Tensor, actual: torch.Tensor, where: str) -> None:
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
        e, a = getattr(expected, name), getattr(actual, name)
        assert e == a, f"{where}.{name}: {e} and {a}"
    e, a = expected.detach(), actual.detach()
    assert same_bits(e, a), f"{where} differs by up to {(e - a).abs().max()}:\n{e}\n{a}"
    if expected.is_leaf and (expected.grad is not None or actual.grad is not None):
        assert expected.grad is not None, f"{where}: only the mirror's has .grad"
        assert actual.grad is not None, f"{where}: only PyTorch's has .grad"
        same_tensor(expected.grad, actual.grad, f"{where}.grad")
        assert expected.grad.stride() == actual.grad.stride(), f"{where}.grad strides"


def same_bits(e: torch.Tensor, a: torch.Tensor) -> bool:
    """Equal, zeros of the same sign, and NaN where the other is NaN."""
    if not (e.is_floating_point() or e.is_complex()):
        return torch.equal(e, a)
    if e.is_complex():
        return same_bits(torch.view_as_real(e), torch.view_as_real(a))
    nan = e.isnan()
    if not torch.equal(nan, a.isnan()):
        return False
    zero = torch.zeros((), dtype=e.dtype)
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
