"""assert_parity: does a layer, loss or function behave like another one?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..exact.mode import is_exact
from ..exact.table import ATTACHED
from ..parameter import Parameter
from .compare import Tolerance, assert_same, named_tensors
from .outcome import (
    Outcome,
    assert_same_error,
    assert_same_outcome,
    generator_states,
    outcome,
    set_generator_states,
)
from .subject import Subject, mapped, random_gradient


def assert_parity(
    ours: Callable[..., object],
    theirs: Callable[..., object],
    *inputs: object,
    kwargs: Mapping[str, object] | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
    units: float | None = None,
    check_backward: bool = True,
    raises: type[Exception] | None = None,
) -> None:
    """Assert that `ours` behaves like `theirs`, usually PyTorch's: by default to the last bit.

    Each is a module, a Function (its `apply` is called) or a function; a module can be compared
    with a function if neither has parameters. Both are called with the same inputs and the same
    random numbers. Modules must have the same weights before
    (`ours.load_state_dict(theirs.state_dict())`). It compares, in this order:

    - the state: parameters by name, buffers and the `state_dict`, before the call and after it;
    - the exception, by type and message, and the warnings;
    - the outputs, and the inputs after the call, which may be changed in place;
    - the gradients of the inputs that require grad and of the parameters, from each output that
      requires grad: for a random gradient of that output, and for 1 too if it is a scalar;
    - the random numbers drawn.

    Inputs are tensors, or lists, tuples and dicts of them, and are left unchanged. Both get copies
    that are not leaves, like the results of a layer before them; those for `ours` are tracked by
    the mirror. No `.grad` is changed.

        ours, theirs = nnmirror.LayerNorm(3), torch.nn.LayerNorm(3)
        x = torch.randn(4, 3, requires_grad=True)
        with nnmirror.exact():
            assert_parity(ours, theirs, x)
        assert_parity(ours, theirs, x, units=64)

    Args:
        ours: the module or function to check.
        theirs: the one to compare it with.
        inputs: the arguments of both.
        kwargs: keyword arguments of the call.
        rtol, atol: |ours - theirs| <= atol + rtol |theirs| is enough.
        units: or this many units in the last place of the largest number compared.
        check_backward: False for functions without a gradient.
        raises: the type of the exception that both must raise. Without it, both must return.

    Raises:
        AssertionError: it names the output, gradient or state that differs, the element, the
        expected and the found value, and the difference. ValueError: no input and no parameter
        requires grad, so that no gradient can be compared.
    """
    mine, other = Subject(ours), Subject(theirs)
    _refuse_uncomparable(mine, other)
    tolerance = Tolerance(rtol, atol, units)
    names = mine.input_names(len(inputs))
    have_state = mine.is_module and other.is_module
    given = _Given(inputs, kwargs or {}, names, have_state, check_backward)
    try:
        for name, value in given.state(other, "before the call").items():
            assert_same(given.state(mine, "before the call")[name], value, name)
    except AssertionError as e:
        e.add_note("To give both the same weights: ours.load_state_dict(theirs.state_dict())")
        raise
    devices = _devices(other, given)
    start = generator_states(devices)
    expected = _run(other, given, _plain_leaf, devices)
    set_generator_states(start, devices)
    actual = _run(mine, given, _tracked_leaf, devices)
    if check_backward and expected.outcome.error is None and not given.has_target(mine):
        raise ValueError(
            "assert_parity: no input requires grad, and no parameter: make the inputs with"
            " requires_grad=True, or say check_backward=False"
        )
    if units is not None:
        tolerance = tolerance.scaled_to(expected.parts)
    try:
        _assert_same_run(actual, expected, tolerance)
    except AssertionError as e:
        if tolerance.is_bitwise and not is_exact() and _is_rounding(actual, expected):
            e.add_note(
                "This may be rounding: some layers have PyTorch's bits in exact mode alone. See"
                " nnmirror.exact, or allow for some units."
            )
        raise
    _assert_raised(expected.outcome.error, raises)


def _assert_raised(error: Exception | None, raises: type[Exception] | None) -> None:
    """Both raised this error, or neither did: is that what the test is about?"""
    if error is not None and (raises is None or not isinstance(error, raises)):
        raise AssertionError(
            f"both raised {error!r}, so that no output was compared; if they should,"
            f" say raises={type(error).__name__}"
        ) from error
    if error is None and raises is not None:
        raise AssertionError(f"error: expected {raises.__name__}, but neither raised one")


@dataclass(frozen=True)
class _Given:
    """The arguments of both."""

    inputs: tuple[object, ...]
    kwargs: Mapping[str, object]
    names: list[str]  # of the inputs
    have_state: bool  # whether both are modules
    check_backward: bool

    def tensors(self) -> list[torch.Tensor]:
        return [t for _, t in named_tensors([self.inputs, self.kwargs], "")]

    def has_target(self, subject: Subject) -> bool:
        """Is there something to differentiate? For integer outputs there need not be."""
        tensors = self.tensors()
        return (
            bool(subject.parameters())
            or any(t.requires_grad for t in tensors)
            or not any(t.is_floating_point() for t in tensors)
        )

    def state(self, subject: Subject, when: str) -> dict[str, object]:
        """A copy of a module's state; nothing, unless both are modules."""
        if not self.have_state:
            return {}
        module = subject.module
        state = {
            "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
            "state_dict": module.state_dict(),
            "buffers": dict(module.named_buffers()),
        }
        copies = mapped(state, lambda t: t.detach().clone())
        return {f"{when}, {name}": value for name, value in copies.items()}


@dataclass
class _Run:
    """The outcome of one; its parts by name, in order."""

    parts: dict[str, object] = field(default_factory=dict)
    outcome: Outcome = None  # type: ignore[assignment]  # of it all


def _run(
    subject: Subject,
    given: _Given,
    make_leaf: Callable[[torch.Tensor], torch.Tensor],
    devices: list[str],
) -> _Run:
    run = _Run()
    parameters = subject.parameters()
    before = {name: p.grad for name, p in parameters.items()}
    run.outcome = outcome(lambda: _call(subject, given, make_leaf, run.parts), devices)
    for name, parameter in parameters.items():
        parameter.grad = before[name]
    return run


def _call(
    subject: Subject,
    given: _Given,
    make_leaf: Callable[[torch.Tensor], torch.Tensor],
    parts: dict[str, object],
) -> None:
    leaves, kwleaves = mapped((given.inputs, dict(given.kwargs)), make_leaf)
    inputs, kwargs = mapped((leaves, kwleaves), torch.clone)
    output = subject.call(*inputs, **kwargs)
    named = [*zip(given.names, inputs, strict=True), *kwargs.items()]
    parts["output"] = output
    for name, value in named:
        parts[f"{name} after the call"] = value
    parts.update(given.state(subject, "after the call"))
    if not given.check_backward:
        return
    targets = {
        name: leaf
        for where, value in [*zip(given.names, leaves, strict=True), *kwleaves.items()]
        for name, leaf in named_tensors(value, where)
        if leaf.requires_grad
    } | subject.parameters()
    outputs = [(name, o) for name, o in named_tensors(output, "output") if o.requires_grad]
    for leaf in targets.values():
        leaf.grad = None
    for place, out in outputs:
        of = f" from {place}" if len(outputs) > 1 else ""
        drawn = random_gradient(out)
        gradients: list[tuple[str, torch.Tensor | None]] = [(of, drawn)]
        if not out.dim():
            gradients = [(of, None), (f" from {drawn.item():.3g} * {place}", drawn)]
        for suffix, gradient in gradients:
            out.backward(gradient, retain_graph=True)
            for name, leaf in targets.items():
                parts[f"gradient of {name}{suffix}"] = leaf.grad
                leaf.grad = None
    parts.update(given.state(subject, "after the backward"))


def _plain_leaf(given: torch.Tensor) -> torch.Tensor:
    return given.detach().clone().requires_grad_(given.requires_grad)


def _tracked_leaf(given: torch.Tensor) -> torch.Tensor:
    copy = given.detach().clone()
    return Parameter(copy) if given.requires_grad else copy


def _refuse_uncomparable(ours: Subject, theirs: Subject) -> None:
    for one, other in ((ours, theirs), (theirs, ours)):
        if one.is_module and not other.is_module and one.parameters():
            raise TypeError(
                f"assert_parity: {one.name} is a module with parameters, {other.name} is none: of"
                " what should the gradients be compared? Give two modules, or two functions that"
                " take the parameters as inputs"
            )


def _devices(subject: Subject, given: _Given) -> list[str]:
    """The devices other than the CPU whose random generators may be used."""
    tensors = [*given.tensors(), *subject.parameters().values(), *subject.buffers().values()]
    return sorted({t.device.type for t in tensors} - {"cpu"})


def _assert_same_run(actual: _Run, expected: _Run, tolerance: Tolerance) -> None:
    assert_same_error(actual.outcome, expected.outcome)
    for name, value in expected.parts.items():
        if name not in actual.parts:
            raise AssertionError(f"{name}: there is none; the error came before")
        assert_same(actual.parts[name], value, name, tolerance)
    assert_same_outcome(actual.outcome, expected.outcome)


def _is_rounding(actual: _Run, expected: _Run) -> bool:
    """Is the difference within the bounds of the layers that have an exact form?"""
    most = Tolerance(units=max(attached.units for attached in ATTACHED))
    try:
        _assert_same_run(actual, expected, most.scaled_to(expected.parts))
    except AssertionError:
        return False
    return True
