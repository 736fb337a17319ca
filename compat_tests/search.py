"""A search for programs that PyTorch and the mirror do not run alike.

    python -m compat_tests.search --examples 20000

Hypothesis makes up whole programs: a net of shared and branching modules, tensor operations
between them, views and in-place changes, frozen parameters, hooks, several losses, a few
steps of an optimiser. Each runs on both backends; every value, gradient and weight is
compared bit by bit, and so is every error. What the mirror refuses (it says so) is left out
of the program on both sides. Programs that differed are kept by Hypothesis and tried first
the next time.
"""

import argparse
import collections
import re
import warnings
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import nnmirror
import nnmirror.optim

from .parity import normal, same_bits

UNARY = {
    "neg": lambda a: -a,
    "relu": lambda a: a.relu(),
    "tanh": lambda a: torch.tanh(a),
    "sigmoid": lambda a: a.sigmoid(),
    "exp": lambda a: (a * 0.1).exp(),
    "log": lambda a: (a * a + 1).log(),
    "sqrt": lambda a: (a * a).sqrt(),
    "abs": lambda a: a.abs(),
    "sin": lambda a: a.sin(),
    "square": lambda a: a**2,
    "cube": lambda a: a.pow(3),
    "reciprocal": lambda a: 1 / (a * a + 1),
    "add 1": lambda a: a + 1,
    "rsub": lambda a: 2 - a,
    "half": lambda a: a / 2,
    "scaled": lambda a: 0.3 * a,
    "clamp": lambda a: a.clamp(-0.5, 0.5),
    "clamp min": lambda a: a.clamp(min=0),
    "sum": lambda a: a.sum(),
    "sum 0": lambda a: a.sum(0),
    "sum last": lambda a: a.sum(-1, keepdim=True),
    "mean": lambda a: a.mean(),
    "mean last": lambda a: a.mean(dim=-1),
    "t": lambda a: a.t(),
    "mT": lambda a: a.mT,
    "transpose": lambda a: a.transpose(0, -1),
    "flatten": lambda a: a.flatten(),
    "reshape": lambda a: a.reshape(-1, a.shape[0]),
    "view": lambda a: a.view(-1),
    "unsqueeze": lambda a: a.unsqueeze(0),
    "unsqueeze last": lambda a: a.unsqueeze(-1),
    "squeeze": lambda a: a.squeeze(),
    "squeeze 0": lambda a: a.squeeze(0),
    "expand": lambda a: a.expand(2, *a.shape),
    "first": lambda a: a[0],
    "slice": lambda a: a[1:],
    "every other": lambda a: a[..., ::2],
    "fancy": lambda a: a[[0, -1, 0]],
    "mask": lambda a: a[a.detach() > 0],
    "new axis": lambda a: a[None, ..., None],
    # Times one: PyTorch forbids even an unrecorded change of the base of such views, which
    # the mirror, whose gradients stay right, has no reason to.
    "unbind": lambda a: a.unbind(0)[-1] * 1,
    "stack of parts": lambda a: torch.stack(list(a)),
    "contiguous": lambda a: a.contiguous(),
    "clone": lambda a: a.clone(),
    "double": lambda a: a.double(),
    "float": lambda a: a.float(),
    "detach": lambda a: a.detach(),
    "where": lambda a: torch.where(a > 0, a, a * 0.1),
    "add_": lambda a: a.add_(1),
    "mul_": lambda a: a.mul_(0.5),
    "relu_": lambda a: a.relu_(),
    "tanh_": lambda a: a.tanh_(),
    "clamp_": lambda a: a.clamp_(max=1),
    "sigmoid_": lambda a: a.sigmoid_(),
    "change detached": lambda a: a.detach().add_(0.25) * 0,
    "norm by hand": lambda a: (a * a).sum().sqrt(),
    "softmax by hand": lambda a: a.exp() / a.exp().sum(-1, keepdim=True),
}
BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b * b + 0.5),
    "add alpha": lambda a, b: torch.add(a, b, alpha=0.5),
    "pow": lambda a, b: (a * a + 0.1) ** b.clamp(-2, 2),
    "maximum": lambda a, b: torch.maximum(a, b),
    "minimum": lambda a, b: torch.minimum(a, b),
    "clamp between": lambda a, b: a.clamp(b, b + 1),
    "matmul": lambda a, b: a @ b,
    "matmul t": lambda a, b: a @ b.mT,
    "cat 0": lambda a, b: torch.cat([a, b]),
    "cat last": lambda a, b: torch.cat([a, b, a], -1),
    "stack": lambda a, b: torch.stack([a, b]),
    "where": lambda a, b: torch.where(a > b, a, b),
    "iadd": lambda a, b: a.add_(b),
    "imul": lambda a, b: a.mul_(b),
    "isub": lambda a, b: a.sub_(b, alpha=2),
}
MODULES = [
    "linear",
    "linear no bias",
    "linear wide",
    "tanh",
    "relu",
    "relu_",
    "leaky",
    "net",
    "mse",
]
INSTRUCTIONS = st.one_of(
    st.tuples(st.sampled_from(sorted(UNARY)), st.integers(0, 30), st.just(0)),
    st.tuples(st.sampled_from(sorted(BINARY)), st.integers(0, 30), st.integers(0, 30)),
    st.tuples(st.sampled_from(MODULES), st.integers(0, 30), st.integers(0, 30)),
)
SHAPES = [(3,), (2, 3), (4, 3), (1, 3), (2, 2, 3), (3, 3), (0, 3), ()]
PROGRAMS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "shapes": st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.float64]),
        "leaf": st.booleans(),
        "frozen": st.sets(st.integers(0, 5), max_size=2),
        "body": st.lists(INSTRUCTIONS, min_size=1, max_size=12),
        "losses": st.lists(st.integers(0, 30), min_size=1, max_size=3),
        "retain": st.booleans(),
        "hooks": st.booleans(),
        "retain_grad": st.booleans(),
        "steps": st.integers(1, 2),
        "sgd": st.sampled_from(
            [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}]
        ),
    }
)

REFUSED = "nnmirror"
ran: collections.Counter[str] = collections.Counter()


class Refused(Exception):
    """The mirror refused instruction `place`."""

    def __init__(self, place: Any) -> None:
        self.place = place


def message(error: Exception) -> str:
    """The message, without which tensor is said to have been changed in place.

    Where several saved tensors were changed, or one several times, PyTorch names the first
    that its generated code unpacks, and the last operation on it. test_tape.py compares the
    whole message where there is one change.
    """
    return re.sub(r"(modified by an inplace operation): .*", r"\1", normal(str(error)))


def modules_of(nn: Any, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "linear": nn.Linear(3, 3, dtype=dtype),
        "linear no bias": nn.Linear(3, 3, bias=False, dtype=dtype),
        "linear wide": nn.Linear(3, 4, dtype=dtype),
        "tanh": nn.Tanh(),
        "relu": nn.ReLU(),
        "relu_": nn.ReLU(inplace=True),
        "leaky": nn.LeakyReLU(0.2),
        "net": nn.Sequential(nn.Linear(3, 3, dtype=dtype), nn.Tanh(), nn.Linear(3, 3, dtype=dtype)),
        "mse": nn.MSELoss(),
    }


def run(nn: Any, optim: Any, program: dict[str, Any], skip: frozenset[Any]) -> list[Any]:
    """What happens, as a list of tensors and errors. Raises Refused where the mirror refuses."""
    torch.manual_seed(program["seed"])
    log: list[Any] = []

    def attempt(place: Any, action: Any) -> Any:
        if place in skip:
            return None
        try:
            return action()
        except Exception as e:
            if REFUSED in str(e):
                raise Refused(place) from None
            log.append((type(e).__name__, message(e)))
            return None

    dtype = program["dtype"]
    modules = modules_of(nn, dtype)
    params = [p for m in modules.values() for p in m.parameters()]
    for i in program["frozen"]:
        params[i].requires_grad_(False)
    if program["hooks"]:
        modules["tanh"].register_forward_hook(lambda m, a, o: o * 2)
        modules["net"][1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
        modules["linear"].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
        params[0].register_hook(lambda g: g * 2) if params[0].requires_grad else None
    optimizer = optim.SGD([p for p in params if p.requires_grad], lr=0.05, **program["sgd"])
    for step in range(program["steps"]):
        # Inputs come out of a module, as activations do, or are leaves of their own.
        leaves = [torch.randn(s, dtype=dtype) for s in program["shapes"]]
        if program["leaf"]:
            leaves = [x.requires_grad_() for x in leaves]
        pool = [nn.functional.leaky_relu(x, 1.0) for x in leaves]
        for place, (name, i, j) in enumerate(program["body"]):
            a, b = pool[i % len(pool)], pool[j % len(pool)]
            if name == "change detached" and program["retain_grad"]:
                # PyTorch redoes the grad_fn of a view after any change of its base, recorded
                # or not, and the gradient is then retained where nothing arrives.
                continue

            def act(name: str = name, a: Any = a, b: Any = b) -> Any:
                if name in UNARY:
                    return UNARY[name](a)
                if name in BINARY:
                    return BINARY[name](a, b)
                return modules[name](a, b) if name == "mse" else modules[name](a)

            result = attempt(place, act)
            if result is not None:
                ran[name] += 1
                pool.append(result)
                log.append((result.requires_grad, result.detach().clone()))
        kept = []
        for place, tensor in enumerate(pool):
            # A view whose base was changed may refuse to be asked anything.
            def keep(tensor: Any = tensor) -> bool:
                if tensor.requires_grad and program["retain_grad"]:
                    tensor.retain_grad()
                return tensor.requires_grad and tensor.grad_fn is not None

            if attempt(("keep", step, place), keep):
                kept.append(tensor)
        optimizer.zero_grad()
        for n, i in enumerate(program["losses"] if kept else ()):
            target = kept[-1 - i % len(kept)]

            def back(target: Any = target) -> None:
                loss = target if target.numel() == 1 else target.sum()
                loss.backward(torch.ones_like(loss), retain_graph=program["retain"])

            before = len(log)
            attempt(("loss", step, n), back)
            if len(log) > before:
                # A backward that fails half-way has filled some .grad: which, depends on
                # how many nodes an operation is recorded as.
                return log
        grads = [p.grad for p in params]
        if program["retain_grad"]:
            grads += [t.grad for t in kept if t.retains_grad]
        log.append(
            [None if g is None else g.detach().clone() for g in [*grads, *(x.grad for x in leaves)]]
        )
        attempt(("step", step), optimizer.step)
        log.append([p.detach().clone() for p in params])
    return log


def difference(expected: Any, actual: Any, where: str = "log") -> str | None:
    """Where two logs differ, or None."""
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        alike = expected.shape == actual.shape and expected.dtype == actual.dtype
        return None if alike and same_bits(expected, actual) else f"{where}: {expected} | {actual}"
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        for i, (e, a) in enumerate(zip(expected, actual, strict=False)):
            found = difference(e, a, f"{where}[{i}]")
            if found:
                return found
        return None if len(expected) == len(actual) else f"{where}: lengths differ"
    return None if expected == actual else f"{where}: {expected!r} | {actual!r}"


def check(program: dict[str, Any]) -> int:
    """Run on both backends; return how many instructions the mirror refused."""
    skip: frozenset[Any] = frozenset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            try:
                actual = run(nnmirror, nnmirror.optim, program, skip)
                break
            except Refused as refused:
                if refused.place in skip:
                    raise
                skip |= {refused.place}
        expected = run(torch.nn, torch.optim, program, skip)
    found = difference(expected, actual)
    assert found is None, found
    return len(skip)


def search(examples: int, derandomize: bool = False) -> tuple[int, int]:
    """Try so many programs; return how many ran and how many instructions were refused."""
    counted = [0, 0]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=derandomize,
        database=None if derandomize else settings.default.database,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    )
    @given(PROGRAMS)
    def body(program: dict[str, Any]) -> None:
        counted[1] += check(program)
        counted[0] += 1

    body()
    return counted[0], counted[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000)
    args = parser.parse_args()
    programs, refused = search(args.examples)
    print(f"{programs} programs, no difference; {refused} instructions refused by the mirror")
    print("instructions run (both backends together):")
    for name, count in ran.most_common():
        print(f"  {name:20s} {count}")


if __name__ == "__main__":
    main()
