"""gradcheck: is the backward the derivative of the forward?"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._types import IndexLike
from ..bits import same_bits
from ..grad_mode import enable_grad
from ..parameter import Parameter
from .compare import Tolerance, named_tensors, place
from .outcome import generator_states, set_generator_states
from .subject import Subject, mapped, random_gradient

Named = dict[str, torch.Tensor]
Gradients = dict[str, torch.Tensor | None]  # by leaf


class GradcheckError(RuntimeError):
    """What `gradcheck` found."""


def gradcheck(
    func: Callable[..., object],
    inputs: torch.Tensor | Sequence[object] = (),
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    fast_mode: bool = False,
) -> bool:
    """Check a backward against central differences of its forward, (f(x + h) - f(x - h)) / 2h.

    As `torch.autograd.gradcheck`, for what the mirror differentiates: `func` is a module, an
    `nnmirror.Function` (its `apply` is called) or a function of tensors. The gradients are those
    of the inputs that require grad and of a module's parameters that do. Everything is computed in
    float64 on copies: module and inputs may be float32, and are not changed. Each call draws the
    same random numbers and starts from the same buffers, so that `Dropout` and `BatchNorm1d` can be
    checked in training mode.

    It fails if a gradient has other numbers or another shape; if it is None and should not be; if
    a second backward gives another gradient; if the backward is not linear in its incoming
    gradient; if a forward or backward changes its arguments in place. It checks first derivatives:
    for second ones use `torch.autograd.gradgradcheck`, with float64 tensors that the mirror tracks.
    At a kink, such as relu at 0, central differences are wrong: use other inputs.

        class Cube(nnmirror.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x**3

            @staticmethod
            def backward(ctx, g):
                (x,) = ctx.saved_tensors
                return 2 * x**2 * g  # wrong

        >>> gradcheck(Cube, torch.tensor([1.0, 2.0], requires_grad=True))
        GradcheckError: the gradient of output[1] with respect to x[1] is wrong:
          expected 12 (central differences), found 8 (the backward), off by 4
          x: 2 of 4 entries of the Jacobian differ; found is 0.667 times expected in all of them

    Args:
        func: a module, a Function or a function. It returns a tensor, or a tuple, list or dict of
            tensors.
        inputs: a tensor, or a tuple of the arguments of `func`.
        eps: the step h.
        atol, rtol: a gradient is right if |found - expected| <= atol + rtol |expected|.
        raise_exception: if False, return False instead of raising.
        nondet_tol: how much two runs of the backward may differ.
        fast_mode: compare along one random direction, at the cost of a few calls; only where that
            differs each element is computed, to say which is wrong.

    Returns:
        True if no error is found.

    Raises:
        GradcheckError: with the place and the kind of the error.
        ValueError: no input and no parameter requires grad, or one is complex.
    """
    check = _Check(func, inputs, eps, atol, rtol, nondet_tol)
    try:
        check.run(fast_mode)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    finally:
        set_generator_states(check.start, check.devices)
    return True


class _Check:
    """The function in float64 on copies, and the tensors that it is differentiated for."""

    def __init__(
        self, func: Any, inputs: object, eps: float, atol: float, rtol: float, nondet_tol: float
    ) -> None:
        inputs = inputs if isinstance(inputs, tuple | list) else (inputs,)
        self.subject = Subject(func)
        if self.subject.is_module:
            self.subject = Subject(copy.deepcopy(func).double())
        self.names = self.subject.input_names(len(inputs))
        self.inputs = mapped(tuple(inputs), _leaf)
        self.kept = self._named(self.inputs) | self.subject.parameters()
        self.leaves = {name: t for name, t in self.kept.items() if t.requires_grad}
        if not self.leaves:
            raise ValueError(
                "gradcheck expects at least one input tensor to require gradient, but none of them"
                " have requires_grad=True."
            )
        self.buffers = [(buffer, buffer.clone()) for buffer in self.subject.buffers().values()]
        self.devices = sorted({t.device.type for t in self.kept.values()} - {"cpu"})
        self.start = generator_states(self.devices)
        self.eps, self.atol, self.rtol, self.nondet_tol = eps, atol, rtol, nondet_tol

    def run(self, fast_mode: bool) -> None:
        with torch.enable_grad(), enable_grad():
            graph = self.graph()
            sums = {output: self.of_random_gradient(graph, output) for output in graph.outputs}
            if fast_mode and self.is_right_along_a_direction(graph, sums):
                return
            found = {output: self.jacobians(graph, output) for output in graph.outputs}
        self.compare(graph, found)
        for output in graph.outputs:
            self.compare_sums(graph, output, found[output], sums[output])

    # -- the forward ---------------------------------------------------------------------

    def call(self) -> tuple[Named, Named]:
        """The floating-point outputs, and the arguments of the function, by name."""
        set_generator_states(self.start, self.devices)
        for buffer, before in self.buffers:
            buffer.copy_(before)
        inputs = mapped(self.inputs, torch.clone)  # not leaves: changes in place show
        outputs = named_tensors(self.subject.call(*inputs), "output")
        return {name: o for name, o in outputs if o.is_floating_point()}, self._named(inputs)

    def graph(self) -> "_Graph":
        graph = _Graph()
        graph.watch(self.kept)
        outputs, given = self.call()
        for name, tensor in given.items():
            graph.watched[name] = tensor, graph.watched[name][1]
        graph.refuse_change("forward of func changes", "give it a copy, func(x.clone())")
        # Others are ignored, like outputs marked as non-differentiable.
        graph.outputs = {n: o for n, o in outputs.items() if o.requires_grad} or outputs
        if not outputs:
            raise ValueError("gradcheck: func returns no floating-point tensor")
        for name, output in graph.outputs.items():
            if output.dtype is not torch.float64:
                raise GradcheckError(
                    f"{name} is of {output.dtype}, though all that func was given is of"
                    " torch.float64: a forward has to compute in the dtype of its inputs"
                )
        graph.watch({f"its result {name}": o for name, o in graph.outputs.items()})
        return graph

    def values(self) -> Named:
        """Only the outputs, as flat plain tensors."""
        with torch.no_grad():
            return {name: o.detach().reshape(-1).clone() for name, o in self.call()[0].items()}

    def _named(self, inputs: Sequence[object]) -> Named:
        return {
            name: t
            for where, value in zip(self.names, inputs, strict=True)
            for name, t in named_tensors(value, where)
        }

    # -- gradients, by the backward ------------------------------------------------------

    def backward(self, graph: "_Graph", output: str, gradient: torch.Tensor) -> Gradients:
        """The gradient of each leaf, from this one of an output."""
        result = graph.outputs[output]
        if not result.requires_grad:
            return dict.fromkeys(self.leaves)
        handed = gradient.clone()
        for leaf in self.leaves.values():
            leaf.grad = None
        try:
            result.backward(handed, retain_graph=True)
        except Exception as e:
            raise GradcheckError(f"the backward of {output} raised {type(e).__name__}: {e}") from e
        if not same_bits(gradient, handed):
            raise GradcheckError(
                f"the backward of {output} changes in place the gradient that it is given, which"
                " others may read: let it compute a new tensor"
            )
        graph.refuse_change(f"backward of {output} changes", "let it compute a new tensor")
        grads: Gradients = {}
        for name, leaf in self.leaves.items():
            grads[name], leaf.grad = leaf.grad, None
        return grads

    def of_random_gradient(self, graph: "_Graph", output: str) -> Gradients:
        """The gradient of each leaf, from a random one of the output; two runs must agree."""
        gradient = random_gradient(graph.outputs[output])
        first, second = (self.backward(graph, output, gradient) for _ in range(2))
        for name in self.leaves:
            one, other = (_or_zeros(grads[name], self.leaves[name]) for grads in (first, second))
            differ = Tolerance(atol=self.nondet_tol).exceeded(one, other).reshape(-1)
            if differ.any():
                i = int((one - other).abs().reshape(-1).nan_to_num(nan=0.0).argmax())
                raise GradcheckError(
                    f"the backward of {output} differs from run to run: the gradient of"
                    f" {name}{place(i, one.shape)} was {_number(one, i)}, then {_number(other, i)}"
                    f" (nondet_tol={self.nondet_tol:g})"
                )
        return first

    def jacobians(self, graph: "_Graph", output: str) -> Gradients:
        """For each leaf, d output[j] / d leaf[i] in row j, column i; None where none came."""
        result = graph.outputs[output]
        rows: dict[str, list[torch.Tensor | None]] = {name: [] for name in self.leaves}
        for j in range(result.numel()):
            one = torch.zeros(result.numel(), dtype=result.dtype, device=result.device)
            one[j] = 1.0
            for name, grad in self.backward(graph, output, one.view(result.shape)).items():
                rows[name].append(grad)
        return {
            name: None
            if all(grad is None for grad in found)
            else torch.stack([_or_zeros(grad, self.leaves[name]).reshape(-1) for grad in found])
            for name, found in rows.items()
        }

    # -- gradients, by differences -------------------------------------------------------

    def differences(self, leaf: torch.Tensor) -> list[Named]:
        """For each element of the leaf, d output[j] / d leaf[i] of all outputs."""
        return [
            self.slopes(leaf, index, self.eps)
            for index in itertools.product(*map(range, leaf.shape))
        ]

    def slopes(self, leaf: torch.Tensor, index: IndexLike, step: float | torch.Tensor) -> Named:
        low, high = self.moved(leaf, index, -step), self.moved(leaf, index, step)
        return {name: (high[name] - low[name]) / (2 * self.eps) for name in high}

    def moved(self, leaf: torch.Tensor, index: IndexLike, step: float | torch.Tensor) -> Named:
        """The outputs with one element of the leaf, or with all, moved."""
        memory = leaf.detach()
        before = memory[index].clone()
        memory[index] = before + step
        try:
            return self.values()
        finally:
            memory[index] = before

    def is_right_along_a_direction(self, graph: "_Graph", sums: dict[str, Gradients]) -> bool:
        for name, leaf in self.leaves.items():
            direction = random_gradient(leaf)
            for output, slope in self.slopes(leaf, ..., self.eps * direction).items():
                if output in graph.outputs:
                    expected = slope @ random_gradient(graph.outputs[output]).reshape(-1)
                    found = (_or_zeros(sums[output][name], leaf) * direction).sum()
                    if self.differ(expected, found).any():
                        return False
        return True

    # -- comparing -----------------------------------------------------------------------

    def differ(self, expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        return ~torch.isclose(found, expected, self.rtol, self.atol, equal_nan=True)

    def compare(self, graph: "_Graph", jacobians: dict[str, Gradients]) -> None:
        """Describe the worst element of the first wrong pair, and count the wrong elements of
        all."""
        lines: list[str] = []
        right = []
        for name, leaf in self.leaves.items():
            columns = self.differences(leaf)
            is_right = True
            for output, result in graph.outputs.items():
                if not (columns and result.numel()):
                    continue
                expected = torch.stack([column[output] for column in columns], 1)
                found = jacobians[output][name]
                numbers = torch.zeros_like(expected) if found is None else found
                wrong = self.differ(expected, numbers)
                if wrong.any():
                    is_right = False
                    if not lines:
                        lines += self.describe(graph, output, name, expected, found)
                    of = f" from {output}" if len(graph.outputs) > 1 else ""
                    lines.append(f"{name}{of}: {_summary(expected, numbers, wrong)}")
            if is_right:
                right.append(name)
        if lines:
            raise GradcheckError(
                "\n  ".join([*lines, *[f"right: {', '.join(right)}"] * bool(right)])
            )

    def describe(
        self,
        graph: "_Graph",
        output: str,
        name: str,
        expected: torch.Tensor,
        found: torch.Tensor | None,
    ) -> list[str]:
        leaf, result = self.leaves[name], graph.outputs[output]
        numbers = torch.zeros_like(expected) if found is None else found
        off = torch.where(self.differ(expected, numbers), (numbers - expected).abs(), -1.0)
        worst = int(off.nan_to_num(nan=float("inf")).argmax())
        j, i = divmod(worst, leaf.numel())
        of = f"{output}{place(j, result.shape)} with respect to {name}{place(i, leaf.shape)}"
        wanted = f"expected {_number(expected, worst)} (central differences)"
        if not result.requires_grad:
            return [f"{output} does not require grad: there is no gradient of {of}:", wanted]
        if found is None:
            return [f"the backward gives no gradient (None) for {name}: of {of}", wanted]
        lines = [
            f"the gradient of {of} is wrong:",
            f"{wanted}, found {_number(numbers, worst)} (the backward),"
            f" off by {abs(numbers.reshape(-1)[worst] - expected.reshape(-1)[worst]).item():.3g}",
        ]
        index = tuple(torch.unravel_index(torch.tensor(i), leaf.shape))
        low, at, high = (self.moved(leaf, index, s)[output][j] for s in (-self.eps, 0.0, self.eps))
        left, right = (at - low) / self.eps, (high - at) / self.eps
        if self.differ(left, right).any():
            lines.append(
                f"there is a kink or a jump: the slope on the left is {left.item():.6g}, on the"
                f" right {right.item():.6g}; take other inputs"
            )
        return lines

    def compare_sums(
        self, graph: "_Graph", output: str, jacobians: Gradients, sums: Gradients
    ) -> None:
        """A backward is linear: for a random gradient it returns that combination of the rows."""
        gradient = random_gradient(graph.outputs[output]).reshape(-1)
        for name, leaf in self.leaves.items():
            rows = jacobians[name]
            found = _or_zeros(sums[name], leaf).reshape(-1)
            expected = torch.zeros_like(found) if rows is None else gradient @ rows
            wrong = self.differ(expected, found)
            if wrong.any():
                i = int(wrong.nonzero()[0])
                raise GradcheckError(
                    f"the backward of {output} is not linear in the gradient that it is given: of"
                    f" a random one the gradient of {name}{place(i, leaf.shape)} should be"
                    f" {_number(expected, i)}, found {_number(found, i)}. Is everything multiplied"
                    " by it, once?"
                )


class _Graph:
    """One call of the function, and the tensors that neither it nor a backward may change."""

    def __init__(self) -> None:
        self.outputs: Named = {}
        self.watched: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # with what it was

    def watch(self, tensors: Named) -> None:
        self.watched.update((name, (t, t.detach().clone())) for name, t in tensors.items())

    def refuse_change(self, who: str, way_on: str) -> None:
        for name, (now, before) in self.watched.items():
            if not same_bits(before, now):
                i = int((before != now).reshape(-1).nonzero()[0])
                raise GradcheckError(
                    f"the {who} {name} in place: {name}{place(i, now.shape)} was"
                    f" {_number(before, i)}, and is {_number(now.detach(), i)}; {way_on}"
                )


def _summary(expected: torch.Tensor, found: torch.Tensor, wrong: torch.Tensor) -> str:
    text = f"{int(wrong.sum())} of {wrong.numel()} entries of the Jacobian differ"
    ratios = (found / expected)[wrong]
    if ratios.isfinite().all() and (ratios[0] != 0) and (ratios / ratios[0] - 1).abs().max() < 1e-4:
        text += f"; found is {ratios[0].item():.3g} times expected in all of them"
    return text


def _or_zeros(grad: torch.Tensor | None, leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf.detach()) if grad is None else grad.detach()


def _number(tensor: torch.Tensor, flat: int) -> str:
    return f"{tensor.reshape(-1)[flat].item():.6g}"


def _leaf(given: torch.Tensor) -> torch.Tensor:
    if given.is_complex():
        raise ValueError("gradcheck: complex inputs, of which the mirror takes no gradients")
    copied = given.detach().clone()
    if copied.is_floating_point():
        copied = copied.double()
    return Parameter(copied) if given.requires_grad else copied
