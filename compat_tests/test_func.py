"""`torch.func.functional_call` of mirrored modules, and `nnmirror.func` beside `torch.func`.

Per-sample gradients, Hessians and MAML: the transforms have the same names and give the same
numbers, and gradients go back to the same parameters.
"""

import warnings
from unittest import mock

import pytest
import torch

import nnmirror

from .parity import parity
from .test_create_graph import X, leaf, near, net

Y = torch.linspace(0, 1, 4).reshape(4, 1)
D = torch.float64


def func_of(nn):
    return torch.func if nn is torch.nn else nnmirror.func


def loss_of(nn, model):
    def loss(params, x, y):
        return nn.functional.mse_loss(func_of(nn).functional_call(model, params, (x,)), y)

    return loss


def detached(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def gradients(model):
    return [p.grad for p in model.parameters()]


def squared(tensors):
    return sum(t.square().sum() for t in tensors)


# -- functional_call -----------------------------------------------------------------------


class Tied:
    @staticmethod
    def of(nn):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
                self.b.weight = self.a.weight

            def forward(self, x, scale=1.0):
                return self.b(torch.tanh(self.a(x))) * scale

        return Net()


CALLS = {
    "all": lambda call, m: call(m, {k: v * 2 for k, v in m.named_parameters()}, (X,)),
    "one of torch's": lambda call, m: call(m, {"a.bias": torch.ones(3)}, X),
    "a leaf of torch's": lambda call, m: call(m, {"a.bias": leaf(torch.ones(3))}, X),
    "by name": lambda call, m: call(m, {"a.bias": torch.ones(3)}, X, {"scale": 3.0}),
    "several dicts": lambda call, m: call(
        m, ({"a.bias": torch.ones(3)}, {"b.bias": torch.ones(3)}), X
    ),
    "tied": lambda call, m: call(m, {"a.weight": torch.eye(3)}, X),
    "not tied": lambda call, m: call(m, {"a.weight": torch.eye(3)}, X, tie_weights=False),
    "tied otherwise": lambda call, m: call(
        m, {"a.weight": torch.eye(3), "b.weight": torch.ones(3, 3)}, X
    ),
    "strict": lambda call, m: call(m, {"a.weight": X, "c": X}, X, strict=True),
    "unknown": lambda call, m: (call(m, {"c": torch.ones(3)}, X), hasattr(m, "c")),
    "repeated": lambda call, m: call(m, ({"a.bias": X}, {"a.bias": X}), X),
    "no tensor": lambda call, m: call(m, {"a.bias": 3}, X),
    "another shape": lambda call, m: call(m, {"a.bias": torch.ones(2)}, X),
    "no dict": lambda call, m: call(m, 3, X),
}


@pytest.mark.parametrize("home", ["torch", "nnmirror"])
@pytest.mark.parametrize("case", CALLS)
@parity
def test_functional_call(nn, optim, case, home):
    model = Tied.of(nn)
    before = [id(p) for p in model.parameters()]
    call = torch.func.functional_call if home == "torch" else func_of(nn).functional_call
    error = found = None
    try:
        found = CALLS[case](call, model)
    except (TypeError, ValueError, RuntimeError) as e:
        error = type(e), str(e)
    out = found[0] if isinstance(found, tuple) else found
    if out is not None:
        out.square().sum().backward()
    same = before == [id(p) for p in model.parameters()]
    return found, error, same, gradients(model), out is not None and model(X)


@parity
def test_buffers_change_in_what_was_given(nn, optim):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    y = torch.func.functional_call(model, (dict(model.named_parameters()), buffers), X)
    return y, buffers, dict(model.named_buffers())


@near(8)
def test_maml(nn, optim):
    """Inner steps with `create_graph=True`, and an outer step through them."""
    model = net(nn)
    optimizer, loss, losses = optim.SGD(model.parameters(), lr=0.1), loss_of(nn, model), []
    for _ in range(3):
        optimizer.zero_grad()
        total = 0
        for task in range(2):
            params = dict(model.named_parameters())
            for _ in range(2):
                inner = loss(params, X + task, Y)
                found = torch.autograd.grad(inner, list(params.values()), create_graph=True)
                params = {
                    name: p - 0.1 * g for (name, p), g in zip(params.items(), found, strict=True)
                }
            total = total + loss(params, X - task, Y * task)
        total.backward()
        optimizer.step()
        losses.append(total.detach())
    return losses, [p.detach() for p in model.parameters()]


# -- gradients -----------------------------------------------------------------------------


@parity
def test_grad(nn, optim):
    model, func = net(nn), func_of(nn)
    loss, params = loss_of(nn, model), detached(model)
    return (
        func.grad(loss)(params, X, Y),
        func.grad_and_value(loss)(params, X, Y),
        func.grad(loss, argnums=(1, -1))(params, X, Y),
        func.grad(lambda x, k=1: (x * k).sum())(X, k=3),
        func.grad(lambda x: torch.tensor(3.0))(X),
    )


@near(4)
def test_grad_leads_to_parameters(nn, optim):
    model = net(nn)
    found = func_of(nn).grad(loss_of(nn, model))(dict(model.named_parameters()), X, Y)
    squared(found.values()).backward()
    return {name: (g.detach(), g.requires_grad) for name, g in found.items()}, gradients(model)


FUNCTIONS = {
    "a model": lambda model: lambda x: model(x).sum(),
    "a model beside": lambda model: lambda x: x.square().sum() + model(x.detach()).sum(),
    "a frozen model": lambda model: model.requires_grad_(False) and (lambda x: model(x).sum()),
    "no model": lambda model: lambda x: x.pow(3).sum(),
}


@pytest.mark.parametrize("given", ["plain", "torch's leaf", "parameter"])
@pytest.mark.parametrize("no_grad", [True, False])
@pytest.mark.parametrize("case", FUNCTIONS)
@parity
def test_gradients_of_tensors_outside_the_function(nn, optim, case, no_grad, given):
    model = net(nn)
    function = FUNCTIONS[case](model)
    x = {"plain": X, "torch's leaf": leaf(), "parameter": nn.Parameter(X.clone())}[given]
    with torch.set_grad_enabled(not no_grad):
        g, value = func_of(nn).grad_and_value(function)(x)
    if g.requires_grad:
        g.square().sum().backward()
    return (
        g.detach(),
        g.requires_grad,
        value.detach(),
        value.requires_grad,
        x.grad,
        gradients(model),
    )


@parity
def test_nested(nn, optim):
    func, x = func_of(nn), torch.tensor(0.3)

    def function(x):
        return torch.sin(x) * torch.exp(x)

    found = []
    for _ in range(4):
        found.append(function(x))
        function = func.grad(function)
    return (
        found,
        func.grad(lambda x: x * func.grad(lambda y: x * y * y)(torch.tensor(3.0)))(x),
        func.grad(lambda x: x * func.grad(lambda y: x + y)(torch.tensor(1.0)))(x),
        func.grad(lambda x: func.grad(lambda y: y * x.detach())(x) * x)(x),
    )


@parity
def test_aux(nn, optim):
    func = func_of(nn)

    def function(x):
        return (x**2).sum(), {"more": x * 3}

    return (
        func.grad(function, has_aux=True)(X),
        func.grad_and_value(function, has_aux=True)(X),
        func.vjp(function, X, has_aux=True)[::2],
        func.jacrev(function, has_aux=True)(X),
    )


# -- products, Jacobians -------------------------------------------------------------------


@parity
def test_vjp(nn, optim):
    model, func = net(nn), func_of(nn)
    y, pull_back = func.vjp(model, X)
    both, pull_both = func.vjp(lambda a, b: (a * b, {"s": a + b}), X, X + 1)
    found = pull_back(torch.ones(4, 1)), pull_back(Y), pull_both((X, {"s": X}))
    ours = nn.Parameter(Y.clone())
    (g,) = pull_back(ours)
    return y, both, found, torch.autograd.grad(g.square().sum(), ours)


@near(4)
def test_jvp(nn, optim):
    model, func = net(nn, D), func_of(nn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch.jit in PyTorch's forward mode
        y, along = func.jvp(model, (X.to(D),), (torch.ones(4, 3, dtype=D),))
        rest = func.jvp(lambda a, b: ((a * b).sin(), a.sum(), b.detach()), (X, X + 1), (X, X * 2))
        product = func.jvp(
            func.grad(lambda x: model(x).square().sum()), (X.to(D),), (torch.ones(4, 3, dtype=D),)
        )
    found = y.detach(), along.detach(), rest, [t.detach() for t in product]
    squared([along, product[1]]).backward()
    return found, gradients(model)


OUTSIDE = {
    "grad": lambda f, w, t: f.grad(lambda x, w: (x * w).pow(2).sum())(torch.ones(3), w),
    "grad of torch's": lambda f, w, t: f.grad(lambda x: (x * w).pow(3).sum())(leaf(w) * 2),
    "vjp": lambda f, w, t: f.vjp(lambda x: x * w * w, torch.ones(3))[1](torch.ones(3))[0],
    "vjp's value": lambda f, w, t: f.vjp(lambda x: x * w * w, torch.ones(3))[0],
    "cotangent": lambda f, w, t: f.vjp(torch.sin, torch.ones(3))[1](t)[0],
    "jvp": lambda f, w, t: f.jvp(lambda x: (x * w).sin(), (torch.ones(3),), (t,))[1],
    "jvp, linear": lambda f, w, t: f.jvp(lambda x: x * w, (torch.ones(3),), (torch.ones(3),))[1],
    "jacrev": lambda f, w, t: f.jacrev(lambda x: (x * w).sin())(torch.ones(3)),
    "hessian": lambda f, w, t: f.hessian(lambda x: (x * w).sin().sum())(torch.ones(3)),
    "vmap": lambda f, w, t: f.vmap(lambda x, w: (x * w).sum(), (0, None))(torch.ones(4, 3), w),
    "vmap of torch's": lambda f, w, t: f.vmap(lambda r: (r * w[0]).sum())(leaf(X) * 2),
    "grad of grad": lambda f, w, t: f.grad(
        lambda x: f.grad(lambda y: (x * y * w).pow(2).sum())(x).pow(2).sum()
    )(torch.ones(3)),
    "grad of a walk": lambda f, w, t: f.grad(
        lambda x: torch.autograd.grad((x * w).pow(3).sum(), x, create_graph=True)[0].pow(2).sum()
    )(torch.ones(3)),
}


@pytest.mark.parametrize("case", OUTSIDE)
@near(4)
def test_results_have_a_graph_to_outside_tensors(nn, optim, case):
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    t = nn.Parameter(torch.tensor([0.5, 0.5, 1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = OUTSIDE[case](func_of(nn), w, t)
    found.square().sum().backward()
    return found.detach(), w.grad, t.grad


@near(4)
def test_jacobians(nn, optim):
    model, func, x = net(nn, D), func_of(nn), X.to(D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (
            func.jacrev(model)(x),
            func.jacrev(model, chunk_size=1)(x),
            func.jacfwd(model)(x),
            func.jacrev(lambda a, b: (a * b, {"k": a.sum()}), argnums=(0, 1))(x, x + 1),
            func.vmap(func.jacrev(model))(x),
        )


@near(16)
def test_jacobian_for_parameters(nn, optim):
    model, func = net(nn), func_of(nn)
    params = dict(model.named_parameters())
    found = func.jacrev(lambda p, x: func.functional_call(model, p, (x,)))(params, X)
    squared(found.values()).backward()
    return {name: j.detach() for name, j in found.items()}, gradients(model)


@near(16)
def test_hessian(nn, optim):
    """Also the Hessian at each point, as a differential equation needs it."""
    model, func, x = net(nn, D), func_of(nn), X.to(D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = func.hessian(lambda x: model(x).square().sum())(x)
        two = func.hessian(lambda a, b: (a**2 * b).sum(), argnums=(0, 1))(x, x + 1)
        each = func.vmap(func.hessian(lambda x: model(x).squeeze(0)))(x)
    each.square().sum().backward()
    return whole.detach(), two, each.detach(), gradients(model)


# -- vmap ----------------------------------------------------------------------------------


@parity
def test_gradients_of_each_sample(nn, optim):
    model, func = net(nn), func_of(nn)
    return func.vmap(func.grad(loss_of(nn, model)), in_dims=(None, 0, 0))(detached(model), X, Y)


@parity
def test_dimensions(nn, optim):
    vmap = func_of(nn).vmap
    return (
        vmap(lambda a, b: (a * b, a.sum()), in_dims=(1, None), out_dims=(-1, 0))(X, X[:, 0]),
        vmap(vmap(lambda a: a * a))(X),
        vmap(lambda a: (a, 3), out_dims=(0, None))(X),
        vmap(lambda d, k: d["a"] * d["b"] + k, in_dims=({"a": 0, "b": None}, None))(
            {"a": X, "b": torch.ones(3)}, 2.0
        ),
        vmap(lambda x, k=1: x * k, chunk_size=2)(X, k=3),
    )


@near(4)
def test_vmap_of_what_is_trained(nn, optim):
    model, func, x = net(nn), func_of(nn), leaf()
    y = func.vmap(model)(x)
    y.square().sum().backward()
    return y.detach(), y.requires_grad, x.grad, gradients(model)


@near(4)
def test_an_ensemble(nn, optim):
    models, func = [net(nn) for _ in range(3)], func_of(nn)
    params, buffers = func.stack_module_state(models)

    def call(params, buffers, x):
        return func.functional_call(models[0], (params, buffers), (x,))

    optimizer = optim.SGD(params.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        func.vmap(call, in_dims=(0, 0, None))(params, buffers, X).square().sum().backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


@parity
def test_batch_norm_of_each(nn, optim):
    layers, func = [nn.BatchNorm1d(3) for _ in range(3)], func_of(nn)
    params, buffers = func.stack_module_state(layers)
    y = func.vmap(
        lambda p, b, x: func.functional_call(layers[0], (p, b), (x,)), in_dims=(0, 0, None)
    )(params, buffers, X)
    return y.detach(), buffers, [dict(layer.named_buffers()) for layer in layers]


@pytest.mark.parametrize("no_grad", [True, False])
@parity
def test_batch_norm_of_all(nn, optim, no_grad):
    """Each sample would change the running statistics of all."""
    layer = nn.BatchNorm1d(3)
    with torch.set_grad_enabled(not no_grad):
        return func_of(nn).vmap(layer)(torch.stack([X, X + 1]))


@pytest.mark.parametrize("randomness", ["error", "same", "no"])
@parity
def test_randomness(nn, optim, randomness):
    return func_of(nn).vmap(lambda a: a + torch.randn(3), randomness=randomness)(X)


def test_different_random_numbers_for_each_sample():
    y = nnmirror.func.vmap(lambda a: torch.randn(3), randomness="different")(X)
    assert y.shape == (4, 3)
    assert y.unique().numel() == 12


WRONG = {
    "argnums": lambda f: f.grad(torch.sum, argnums=2)(X),
    "argnums twice": lambda f: f.grad(torch.sum, argnums=(0, 0))(X),
    "no argnums": lambda f: f.grad(torch.sum, argnums=())(X),
    "no scalar": lambda f: f.grad(lambda x: x)(X),
    "no tensor": lambda f: f.grad(lambda x: 3)(X),
    "a number given": lambda f: f.grad(lambda x: x)(3.0),
    "integers": lambda f: f.grad(lambda x: x.sum())(torch.arange(3)),
    "no aux": lambda f: f.grad(lambda x: x.sum(), has_aux=True)(X),
    "vjp of integers": lambda f: f.vjp(lambda x: x.argmax(), X),
    "vjp of nothing": lambda f: f.vjp(lambda x: (), X),
    "vjp, another structure": lambda f: f.vjp(lambda x: (x, x * 2), X)[1](X),
    "jvp, a list": lambda f: f.jvp(torch.sin, [X], [X]),
    "jvp, another structure": lambda f: f.jvp(torch.sin, (X,), (X, X)),
    "jvp, strict": lambda f: f.jvp(lambda x: torch.ones(3), (X,), (X,), strict=True),
    "jacrev, chunk": lambda f: f.jacrev(torch.sin, chunk_size=0),
    "vmap of a number": lambda f: f.vmap(lambda x: 3)(X),
    "vmap of nothing": lambda f: f.vmap(lambda: X)(),
    "vmap, sizes": lambda f: f.vmap(torch.add)(X, Y[:2]),
    "vmap, a dimension": lambda f: f.vmap(torch.sin, in_dims=3)(X),
    "vmap, no dimension": lambda f: f.vmap(torch.sin, in_dims=None)(X),
    "vmap, no batch": lambda f: f.vmap(torch.add, in_dims=(None, None))(X, X),
    "vmap, in_dims": lambda f: f.vmap(torch.add, in_dims=(0, 0, 0))(X, X),
    "vmap, over a number": lambda f: f.vmap(torch.mul)(X, 3.0),
    "vmap, out_dims": lambda f: f.vmap(lambda x: (x, x), out_dims=(0, 0, 0))(X),
    "vmap, out_dims none": lambda f: f.vmap(lambda x: (x, x * 2), out_dims=(0, None))(X),
    "vmap, out_dims words": lambda f: f.vmap(torch.sin, out_dims="a")(X),
    "vmap, chunk": lambda f: f.vmap(torch.sin, chunk_size=0),
    "no models": lambda f: f.stack_module_state([]),
}


@pytest.mark.parametrize("case", WRONG)
@parity
def test_wrong_use(nn, optim, case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        WRONG[case](func_of(nn))


REFUSED = {
    "a shared argument that changes": (
        lambda vmap: vmap(lambda x, b: b.add_(1), in_dims=(0, None))(X, torch.zeros(3)),
        "changed an argument that all of them share in place.*Change a copy",
    ),
    "no items": (
        lambda vmap: vmap(torch.sin)(X[:0]),
        "over an empty batch.*with the empty batch itself",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, said = REFUSED[case]
    with pytest.raises(NotImplementedError, match=said):
        call(nnmirror.func.vmap)


def test_what_is_not_mirrored_names_an_alternative():
    with pytest.raises(AttributeError, match=r"nnmirror\.func\.linearize is not mirrored.*jvp"):
        _ = nnmirror.func.linearize
    assert not hasattr(nnmirror.func, "functionalize")


def total(model):
    return lambda params, x: torch.func.functional_call(model, params, (x,)).square().sum()


SEEN = {
    "grad": lambda f, m, x: f.grad(lambda h: (h**4).sum())(m(x)),
    "grad_and_value": lambda f, m, x: f.grad_and_value(lambda h: (h**4).sum())(m(x))[1],
    "grad of parameters": lambda f, m, x: f.grad(total(m))(dict(m.named_parameters()), x),
    "per-sample gradients": lambda f, m, x: f.vmap(f.grad(total(m)), in_dims=(None, 0))(
        dict(m.named_parameters()), x[:, None]
    ),
    "jacrev": lambda f, m, x: f.jacrev(m)(x),
    "jacobian of a method": lambda f, m, x: f.jacrev(m.forward)(x),
    "jacobian for each sample": lambda f, m, x: f.vmap(f.jacrev(m))(x),
    "jacfwd": lambda f, m, x: f.jacfwd(m, argnums=(0,))(x),
    "hessian": lambda f, m, x: f.hessian(lambda p: (m(x) * p).sum() ** 2)(m(x)[:1]),
    "vjp": lambda f, m, x: f.vjp(m, x)[1](Y),
    "vjp with aux": lambda f, m, x: f.vjp(lambda h: (h**2, h), m(x), has_aux=True)[2],
    "jvp": lambda f, m, x: f.jvp(m, (x,), (torch.ones_like(x),)),
    "torch.vmap": lambda f, m, x: torch.vmap(m)(x),
    "vmap of an inner grad": lambda f, m, x: f.vmap(lambda h: f.grad(torch.sum)(h**2))(m(x)),
}


@pytest.mark.parametrize("case", SEEN)
@near(4)
def test_transforms_of_torch_see_what_is_passed_to_them(nn, optim, case):
    """`from torch.func import grad` need not change with the import of nn."""
    model = net(nn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch.jit, at the first use in the process
        found = torch.utils._pytree.tree_leaves(SEEN[case](torch.func, model, X))
    squared(found).backward()
    return [t.detach() for t in found], [t.requires_grad for t in found], gradients(model)


@parity
def test_transforms_of_torch_without_gradients(nn, optim):
    """They are PyTorch's own then, on the whole batch at once."""
    model, calls = net(nn), []
    model.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        found, calls_of_vmap = torch.vmap(model)(X), len(calls)
        jacobians = torch.func.vmap(torch.func.jacrev(model))(X)
    model.requires_grad_(False)
    return found, jacobians, torch.func.jacrev(model)(X), calls_of_vmap


HIDDEN = {
    "grad": lambda f, m: f.grad(lambda x: m(x).sum())(X),
    "vjp": lambda f, m: f.vjp(lambda x: m(x), X)[1](Y),
    "jacrev": lambda f, m: f.jacrev(lambda x: m(x))(X),
    "vmap": lambda f, m: f.vmap(lambda x: m(x))(X),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_transforms_of_torch_are_refused_and_name_the_mirrors(case):
    """Of a function that refers to the model, which they cannot see."""
    model = net(nnmirror)
    with pytest.raises(NotImplementedError, match=r"same name from nnmirror\.func"):
        HIDDEN[case](torch.func, model)
    HIDDEN[case](nnmirror.func, model)


@near(4)  # vmap is a loop here
def test_transforms_of_torch_within_one_another(nn, optim):
    """The inner one refers to what the outer one differentiates."""
    w = nn.Parameter(torch.randn(3))
    f = torch.func

    def total(a):
        return f.vmap(lambda row: (a * row).sum() ** 2)(X).sum()

    g = f.grad(total)(w)
    g.square().sum().backward()
    return g.detach(), w.grad


def test_transforms_of_torch_take_any_callable():
    double = mock.Mock(side_effect=lambda x: x * 2)  # it seems to have every attribute
    assert torch.equal(torch.vmap(double)(X), X * 2)
    assert torch.func.grad(func=torch.sum, argnums=0)(X[0]).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_torch_compile_of_transforms():
    compiled = torch.compile(
        lambda x: torch.vmap(lambda row: row.square().sum())(x), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(X), X.square().sum(1))


def test_linearize_is_refused():
    model = net(nnmirror)
    for call in (
        lambda: torch.func.linearize(model, X),
        lambda: torch.func.linearize(sum, model(X)),
    ):
        with pytest.raises(NotImplementedError, match="linearize has no backward rule"):
            call()
    assert torch.func.linearize(torch.sin, X)[1](X).shape == X.shape
