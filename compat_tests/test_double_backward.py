"""Gradients of gradients with `create_graph=True`: the same as PyTorch's, or refused.

Physics-informed nets, gradient penalties and meta-learning would otherwise be trained towards
something else, without an error.
"""

import contextlib
import functools
import itertools
import warnings
from itertools import pairwise

import pytest
import torch

import nnmirror
from nnmirror.node import Node
from nnmirror.tape import tensors_in

from .parity import bound_at_once, parity, same_bits
from .test_every_op import OPS, at_most, mapped, refused, with_leaves

# Second derivatives that PyTorch rounds differently: by how many units (eps times the largest
# number of the result) at most, and why.
CLOSE: dict[str, tuple[float, str]] = {
    "nn.functional.gelu": (4, "its kernel's erf and tanh are no tensor operations"),
    "nn.functional.softplus": (2, "its kernel's exp of positive numbers is no tensor operation"),
    "nn.functional.group_norm": (64, "PyTorch adds what goes to mean and variance at once"),
    **{
        f"nn.functional.{name}": (16, "its kernel adds place by place, the rule by matrices")
        for name in (
            "upsample_bilinear",
            *[f"interpolate {mode}" for mode in ("linear", "bilinear", "bicubic", "trilinear")],
        )
    },
    **{
        f"nn.functional.conv{turned}{n}d": (64, "oneDNN adds the gradients up in its own order")
        for turned in ("", "_transpose")
        for n in (1, 2, 3)
    },
    "nn.functional.pairwise_distance": (0, "the sign of a zero: the gradient of sgn is none there"),
}
# The first derivative has PyTorch's bits in exact mode only; the second follows from its inputs.
EXACT = {
    "nn.functional.layer_norm",
    "nn.functional.batch_norm",
    "nn.functional.scaled_dot_product_attention",
}
DTYPES = {torch.float64: 8, torch.float32: 4}


def twice(nn, function, args, kwargs):
    """The gradients of a call, which of them require grad, and the gradients of these.

    The gradients of the results require grad too, as they would if a later function gave them.
    """
    torch.manual_seed(0)
    args, kwargs, leaves = with_leaves(nn, args, kwargs)
    try:
        made = [t for t in tensors_in(function(*args, **kwargs)) if t.requires_grad]
        given = [nn.Parameter(_numbers(0.5, 1.5, t)) for t in made]
        if not made:
            return None, [], [], []
        first = torch.autograd.grad(made, leaves, given, create_graph=True, allow_unused=True)
        asked = [g is not None and g.requires_grad for g in first]
        further = [g for g, asks in zip(first, asked, strict=True) if asks]
        second = []
        if further:
            starts = [_numbers(-1, 1, g) for g in further]
            second = torch.autograd.grad(further, leaves + given, starts, allow_unused=True)
    except Exception as e:
        return e, [], [], []
    return None, [g if g is None else g.detach() for g in first], asked, second


def _numbers(low, high, like):
    return torch.linspace(low, high, like.numel(), dtype=like.dtype).reshape(like.shape)


def compare(name, function, args, kwargs):
    """With the generic walk, and with a walk bound at once, which is compared with it."""
    expected = twice(torch.nn, function, args, kwargs)
    alike(name, expected, twice(nnmirror, function, args, kwargs))
    with bound_at_once():
        alike(name, expected, twice(nnmirror, function, args, kwargs))


def alike(name, expected, actual):
    if refused(actual[0]):
        return
    if expected[0] is not None:  # PyTorch has no second derivative, or a wrong argument
        assert actual[0] is not None or "not implemented" in str(expected[0]), expected[0]
        return
    assert actual[0] is None, repr(actual[0])
    assert expected[2] == actual[2], f"{name}: requires grad {expected[2]} | {actual[2]}"
    for e, a in zip([*expected[1], *expected[3]], [*actual[1], *actual[3]], strict=True):
        if e is None or a is None:
            assert e is a, f"{name}: {e} | {a}"
        elif name not in CLOSE:
            assert same_bits(e, a), f"{name}: {e} | {a}"
        else:
            within(name, e, a)


def within(name, expected, actual):
    units = CLOSE[name][0]
    assert expected.shape == actual.shape
    assert expected.dtype == actual.dtype
    finite = expected.isfinite()
    assert torch.equal(finite, actual.isfinite())
    assert same_bits(expected[~finite], actual[~finite])
    if finite.any():
        most = units * torch.finfo(expected.dtype).eps * expected[finite].abs().max()
        assert (expected - actual)[finite].abs().max() <= most, f"{name}: {expected} | {actual}"


@pytest.mark.parametrize("name", [n for n in OPS if OPS[n].supports_gradgrad])
def test_every_operation_of_pytorchs_table(name):
    op = OPS[name]
    for dtype, most in DTYPES.items():
        if dtype not in op.supported_dtypes("cpu"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sample in at_most(most, op.sample_inputs("cpu", dtype, requires_grad=True)):
                args, kwargs = (sample.input, *sample.args), sample.kwargs
                tensors = list(tensors_in([args, kwargs]))
                if any(t.layout is not torch.strided or t.is_complex() for t in tensors):
                    continue
                with nnmirror.exact() if name in EXACT else contextlib.nullcontext():
                    compare(name, op.op, args, kwargs)


def small_samples(op):
    """Calls of an operation on few numbers: the leaves, and a function that calls it with them."""
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        given = [sample.input, *sample.args], sample.kwargs
        tensors = list(tensors_in(given))
        leaves = [t for t in tensors if t.requires_grad]
        if any(t.layout is not torch.strided or t.is_complex() for t in tensors):
            continue
        if leaves and sum(t.numel() for t in leaves) <= 60:
            yield leaves, functools.partial(called, op, sample, given, leaves)


def called(op, sample, given, leaves, *values):
    of = {id(leaf): value for leaf, value in zip(leaves, values, strict=True)}
    args, kwargs = (mapped(some, lambda t: of.get(id(t), t)) for some in given)
    torch.manual_seed(0)
    out = op.gradcheck_wrapper(op.op, *args, **kwargs)  # makes a matrix symmetric, for example
    if sample.output_process_fn_grad is not None:  # keeps what is unique of a decomposition
        out = sample.output_process_fn_grad(out)
    return tuple(t for t in tensors_in(out) if t.requires_grad)


def gradgradcheck_fails(nn, leaves, function):
    """The error that gradgradcheck raises, or None."""
    torch.manual_seed(1)
    try:
        torch.autograd.gradgradcheck(
            function, [nn.Parameter(t.detach().clone()) for t in leaves], fast_mode=True
        )
    except Exception as e:
        return e
    return None


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, o in OPS.items()
        if o.supports_gradgrad and torch.float64 in o.supported_dtypes("cpu")
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_gradgradcheck(name):
    """Finite differences: a check that does not depend on PyTorch.

    Where they fail, at a kink or in 16 bits, they fail for PyTorch's own function too.
    """
    for leaves, function in itertools.islice(small_samples(OPS[name]), 2):
        error = gradgradcheck_fails(nnmirror, leaves, function)
        if error is not None and not refused(error):
            assert gradgradcheck_fails(torch.nn, leaves, function) is not None, error


def tanh_net(nn, *sizes):
    layers = [[nn.Linear(a, b, dtype=torch.float64), nn.Tanh()] for a, b in pairwise(sizes)]
    return nn.Sequential(*[m for pair in layers for m in pair][:-1])


def derivative(y, x):
    return torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)[0]


@parity
@pytest.mark.parametrize("points", [7, 1000])
def test_physics_informed_net(nn, optim, points):
    """Several third derivatives are added at each weight; LBFGS would turn a different last bit
    into different first digits."""
    model, criterion = tanh_net(nn, 2, 20, 20, 1), nn.MSELoss()
    x = torch.rand(points, 2, dtype=torch.float64, requires_grad=True)
    given = torch.rand(points, 2, dtype=torch.float64)
    losses = []

    def closure():
        optimizer.zero_grad()
        u = model(x)
        du = derivative(u, x)
        left = du[:, 1:] - 0.1 * derivative(du[:, :1], x)[:, :1] + u * du[:, :1]
        loss = criterion(left, torch.zeros_like(left))
        loss = loss + criterion(model(given), torch.sin(given[:, :1]))
        loss.backward()
        losses.append(loss.detach())
        return loss

    optimizer = optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.step(closure)
    optimizer = optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    return losses, list(model.parameters()), x.grad


@parity
@pytest.mark.parametrize("bias", [True, False])
def test_a_graph_that_was_looked_at(nn, optim, bias):
    """Tools such as torchviz read next_functions, which must not change a second derivative."""
    layer = nn.Linear(3, 3, bias, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.grad_fn.next_functions[0][0]
    z = (layer(y.tanh()) ** 2).sum()
    dx = derivative(z, x)
    (dx**2).sum().backward()
    return dx, x.grad, list(layer.parameters())


@parity
def test_a_penalty_for_one_layer_after_another(nn, optim):
    """The second layer has another eps: what was kept for the first must not be used."""
    x, seen = torch.randn(5, 3, requires_grad=True), []
    for size in (1e-5, 1e-3):
        norm = nn.BatchNorm1d(3, eps=size)
        for _ in range(3):
            y = (norm(nn.functional.leaky_relu(x, 1.0)) ** 3).sum()
            (slope,) = torch.autograd.grad(y, norm.weight, create_graph=True)
            (slope**2).sum().backward()
            seen.append(norm.weight.grad.clone())
    return seen


def critic(nn):
    return nn.Sequential(
        nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1)
    )


@parity
def test_wgan_gradient_penalty(nn, optim):
    """The gradient of the critic between real and generated samples is to have norm one."""
    model, generator = critic(nn), nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
    optimizer = optim.Adam(model.parameters(), lr=1e-2, betas=(0.0, 0.9))
    generators = optim.Adam(generator.parameters(), lr=1e-2, betas=(0.0, 0.9))
    seen = []
    for _ in range(3):
        real, noise, share = torch.randn(8, 6), torch.randn(8, 3), torch.rand(8, 1)
        made = generator(noise).detach()
        mixed = (share * real + (1 - share) * made).requires_grad_()
        score = model(mixed)
        (slope,) = torch.autograd.grad(
            outputs=score,
            inputs=mixed,
            grad_outputs=torch.ones_like(score),
            create_graph=True,
            retain_graph=True,
            only_inputs=True,
        )
        penalty = ((slope.norm(2, dim=1) - 1) ** 2).mean()
        loss = model(made).mean() - model(real).mean() + 10 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        generators.zero_grad()
        fooled = -model(generator(noise)).mean()
        fooled.backward()
        generators.step()
        seen += [slope, penalty, loss, fooled]
    return seen, list(model.parameters()), list(generator.parameters())


@parity
def test_r1_penalty(nn, optim):
    """The squared gradient at real samples, in every other step (lazy regularisation)."""
    model = critic(nn)
    optimizer = optim.Adam(model.parameters(), lr=1e-2)
    seen = []
    for step in range(4):
        real = torch.randn(8, 6, requires_grad=step % 2 == 0)
        score = model(real)
        loss = nn.BCEWithLogitsLoss()(score, torch.ones_like(score))
        if step % 2 == 0:
            (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
            loss = loss + 5 * slope.square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seen.append(loss)
    return seen, list(model.parameters())


@parity
def test_newton_cg(nn, optim):
    """Newton steps by conjugate gradients, which use Hessian-vector products only."""
    model = tanh_net(nn, 3, 5, 1)
    params = list(model.parameters())
    x, target = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    losses, steps = [], []
    for _ in range(2):
        loss = (model(x) - target).square().mean()
        grads = torch.autograd.grad(loss, params, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in grads])

        def product(v, flat=flat):
            found = torch.autograd.grad(flat, params, v, retain_graph=True)
            return torch.cat([g.reshape(-1) for g in found]) + 1e-1 * v

        rest = -flat.detach()
        step, way = torch.zeros_like(rest), rest.clone()
        for _ in range(5):
            along = product(way)
            if way.dot(along) <= 0:
                break
            size = rest.dot(rest) / way.dot(along)
            step = step + size * way
            before, rest = rest, rest - size * along
            way = rest + rest.dot(rest) / before.dot(before) * way
        with torch.no_grad():
            for p, s in zip(params, step.split([p.numel() for p in params]), strict=True):
                p += s.view_as(p)
        losses.append(loss)
        steps.append(step)
    return losses, steps, params


@parity
def test_sobolev_training(nn, optim):
    """The net is fitted to the target's values and its first and second derivatives."""
    model, criterion = tanh_net(nn, 1, 10, 10, 1), nn.SmoothL1Loss()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(3):
        x = torch.linspace(-1, 1, 30, dtype=torch.float64).unsqueeze(1).requires_grad_()
        y = model(x)
        dy = derivative(y, x)
        ddy = derivative(dy, x)
        with torch.no_grad():
            values, slopes = torch.sin(3 * x), 3 * torch.cos(3 * x)
        loss = criterion(y, values) + criterion(dy, slopes) + 0.1 * criterion(ddy, -9 * values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses, list(model.parameters())


def nodes_behind(results):
    """All nodes of the graph that leads to these results."""
    found, stack = {}, [t._node for t in tensors_in(results) if getattr(t, "_node", None)]
    while stack:
        node = stack.pop()
        if isinstance(node, Node) and id(node) not in found:
            found[id(node)] = node.as_exposed()
            stack += [edge[0] for edge in node.edges if edge is not None]
    return found.values()


def has_origin(node, index):
    """Whether it is known how the tensor saved at `index` was computed; floats only."""
    tensor = node._saved[index]
    if not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
        return True
    rule, plan = node.function, node.plan
    if plan is None:
        return rule.saves_of(node) is not None and index < len(rule.saves_of(node))
    if index < len(plan.saves):
        return True
    name = plan.names[index]
    return name in rule.derived and hasattr(rule, f"{name}_again")


@pytest.mark.slow
def test_what_a_rule_saves_has_an_origin():
    """A saved float tensor of unknown origin would be a constant in a second derivative."""
    seen, unknown = set(), set()
    for op in [op for op in OPS.values() if op.supports_gradgrad]:
        dtype = torch.float64 if torch.float64 in op.supported_dtypes("cpu") else torch.float32
        for sample in at_most(2, op.sample_inputs("cpu", dtype, requires_grad=True)):
            args, kwargs = (sample.input, *sample.args), sample.kwargs
            if any(t.layout is not torch.strided for t in tensors_in([args, kwargs])):
                continue

            def leaf(t):
                return nnmirror.Parameter(t.detach().clone()) if t.requires_grad else t.clone()

            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made = op.op(*mapped(list(args), leaf), **mapped(kwargs, leaf))
            except Exception:  # refusals of either backend are tested elsewhere
                continue
            for node in nodes_behind(made):
                saved = range(len(node._saved or ()))
                seen.add(node.function.__name__)
                unknown |= {node.function.__name__ for i in saved if not has_origin(node, i)}
    assert len(seen) > 150
    assert not unknown


@pytest.mark.parametrize("zeros", [0, 1, 2, 3])
@parity
def test_a_product_with_zeros(nn, optim, zeros):
    """With two of them the gradient is zero, but its derivative is not."""
    x = torch.tensor([0.0] * zeros + [1.5, -2.0, 3.0]).requires_grad_()
    (g,) = torch.autograd.grad((x * 1).prod(), x, create_graph=True)
    (h,) = torch.autograd.grad((g * torch.arange(1.0, 4 + zeros)).sum(), x, create_graph=True)
    return g, h, *torch.autograd.grad((h**2).sum(), x)
