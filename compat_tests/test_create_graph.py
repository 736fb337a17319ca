"""`create_graph=True` as scripts use it: gradients of gradients, of nets and of Functions.

A gradient that has lost its graph has the same values as one that has not. So each test computes a
second gradient from the first one and compares that.
"""

import functools
import inspect
import math

import pytest
import torch
from torch.autograd import functional as AF
from torch.autograd.function import once_differentiable
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

import nnmirror
import nnmirror.optim

from .parity import bound_at_once, exactly, outcome, parity, same_outcome, within
from .test_function import base_of, module_of

X = torch.linspace(-1, 1, 12).reshape(4, 3)
WARNING = "ignore:Using backward\\(\\) with create_graph"


def near(units):
    """Like `parity`, but sums of three or more terms may be added in another order.

    In PyTorch the gradients of a weight are added at the transpose that each Linear made of it, and
    those of all transposes at the weight; here all of them are added at the weight. `units` are of
    the largest number in the result.
    """

    def make(function):
        @functools.wraps(function)
        def test(**params):
            expected = outcome(function, torch.nn, torch.optim, **params)
            for exact in (True, False):
                with exactly(exact), within(units, expected.value):
                    for bound in (False, True):
                        with bound_at_once() if bound else exactly(exact):
                            actual = outcome(function, nnmirror, nnmirror.optim, **params)
                        same_outcome(expected, actual)

        test.__signature__ = inspect.Signature(
            [*inspect.signature(function).parameters.values()][2:]
        )
        del test.__wrapped__
        return test

    return make


def net(nn, dtype=None, out=1):
    return nn.Sequential(nn.Linear(3, 5, dtype=dtype), nn.Tanh(), nn.Linear(5, out, dtype=dtype))


def wired(nn, dtype=None):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 5, dtype=dtype)
            self.b = nn.Linear(5, 5, dtype=dtype)
            self.c = nn.Linear(5, 1, dtype=dtype)

        def forward(self, x):
            return self.c(torch.sigmoid(self.b(torch.tanh(self.a(x)))))

    return Net()


def leaf(x=X):
    return x.clone().requires_grad_()


def grads(model):
    return [p.grad for p in model.parameters()]


def recorded(grad):
    """What a script can see of a gradient's graph."""
    return grad if grad is None else (grad.requires_grad, grad.grad_fn and grad.grad_fn.name())


def squares(tensors):
    return sum(t.square().sum() for t in tensors)


def further(tensors, model, *others):
    """The gradients of a loss that is computed from `tensors`, themselves gradients."""
    return torch.autograd.grad(
        squares(tensors), [*others, *model.parameters()], allow_unused=True, retain_graph=True
    )


# -- backward ------------------------------------------------------------------------------


@parity
def test_backward(nn, optim):
    model = net(nn)
    model(X).square().mean().backward(create_graph=True)
    kept = grads(model)
    second = further(kept, model)
    return [g.detach() for g in kept], [recorded(g) for g in kept], second


@near(4)
def test_backward_of_a_gradient(nn, optim):
    model = wired(nn)
    model(X).square().mean().backward(create_graph=True)
    squares(grads(model)).backward()
    return [g.detach() for g in grads(model)], [recorded(g) for g in grads(model)]


@pytest.mark.parametrize("bias", [True, False])
@parity
def test_backward_of_a_product_with_the_hessian(nn, optim, bias):
    """Each weight gets several gradients, which must be added in PyTorch's order."""
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        layers = [nn.Linear(3, 3, bias=bias) for _ in range(3)]
        model = nn.Sequential(*layers, nn.Tanh())
        weights = list(model.parameters())
        loss = model(torch.randn(4, 3)).square().sum()
        first = torch.autograd.grad(loss, weights, create_graph=True)
        start = [g.detach() for g in first]
        second = torch.autograd.grad(first, weights, start, create_graph=True)
        sum(h.sum() for h in second).backward()
        found.append(grads(model))
    return found


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
@near(4)
def test_backward_of_a_gradient_of_other_than_two_dimensions(nn, optim, shape):
    model = wired(nn)
    model(X.reshape(-1)[: math.prod(shape)].view(shape)).square().mean().backward(create_graph=True)
    squares(grads(model)).backward()
    return [g.detach() for g in grads(model)]


@near(4)
def test_backward_adds_to_a_gradient_with_history(nn, optim):
    model = net(nn)
    seen = []
    for k in range(3):
        (model(X) * (k + 1)).square().mean().backward(create_graph=True)
        seen.append([(recorded(g), g.detach().clone()) for g in grads(model)])
    return seen, further(grads(model), model)


@near(4)
def test_backward_with_and_without(nn, optim):
    model = net(nn)
    seen = []
    for create_graph in (False, True, False, True):
        model(X).square().sum().backward(create_graph=create_graph)
        seen.append([(recorded(g), g.detach().clone()) for g in grads(model)])
    return seen, further(grads(model), model)


@parity
def test_backward_for_inputs(nn, optim):
    model, x = net(nn), leaf()
    model(x).square().sum().backward(create_graph=True, inputs=[model[0].weight, x])
    return (
        [recorded(g) for g in grads(model)],
        recorded(x.grad),
        x.grad.detach(),
        further([x.grad, model[0].weight.grad], model, x),
    )


@pytest.mark.parametrize("retained", [True, False])
@pytest.mark.parametrize("create_graph", [True, False])
@near(4)
def test_backward_for_a_hidden_activation(nn, optim, create_graph, retained):
    model, x = net(nn), leaf()
    h = model[0](x)
    if retained:
        h.retain_grad()
    loss = model[2](model[1](h)).square().sum()
    loss.backward(create_graph=create_graph, inputs=[h], retain_graph=True)
    seen = h.retains_grad, recorded(h.grad), h.grad.detach().clone(), grads(model), x.grad
    loss.backward(create_graph=create_graph)
    after = recorded(h.grad), h.grad.detach()
    return seen, after, further([h.grad], model, x) if create_graph else None


@pytest.mark.parametrize("retain_graph", [True, False])
@parity
def test_retain_graph_overrides_the_default(nn, optim, retain_graph):
    model = net(nn)
    loss = model(X).square().sum()
    loss.backward(create_graph=True, retain_graph=retain_graph)
    loss.backward()
    return [g.detach() for g in grads(model)]


@pytest.mark.parametrize("set_to_none", [True, False])
@parity
def test_zero_grad_drops_the_graph(nn, optim, set_to_none):
    model = net(nn)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for zero_grad in (optimizer.zero_grad, model.zero_grad):
        model(X).square().sum().backward(create_graph=True)
        kept = grads(model)
        zero_grad(set_to_none=set_to_none)
        seen.append(([recorded(g) for g in grads(model)], [g.requires_grad for g in kept]))
    return seen, grads(model)


OPTIMIZERS = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD, a loop": ("SGD", {"lr": 0.1, "momentum": 0.9, "foreach": False}),
    "Adam": ("Adam", {"lr": 0.01}),
    "Adam, amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "Adam, a loop": ("Adam", {"lr": 0.01, "foreach": False}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "RMSprop": ("RMSprop", {"lr": 0.01}),
    "Adagrad": ("Adagrad", {"lr": 0.01}),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
@parity
def test_optimizers_step_with_it(nn, optim, case):
    """A gradient penalty, as in a WGAN."""
    name, arguments = OPTIMIZERS[case]
    model = net(nn)
    optimizer = getattr(optim, name)(model.parameters(), **arguments)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        x = leaf()
        y = model(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        loss = y.square().mean() + (g.norm(2, dim=1) - 1).square().mean()
        loss.backward(create_graph=True)
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.detach() for p in model.parameters()], [recorded(g) for g in grads(model)]


@parity
def test_gradients_are_clipped_in_place(nn, optim):
    model = net(nn)
    model(X).square().sum().backward(create_graph=True)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return (
        norm.requires_grad,
        [recorded(g) for g in grads(model)],
        [g.detach() for g in grads(model)],
    )


@near(4)
def test_gradients_with_a_graph_accumulate(nn, optim):
    model = net(nn)
    for i in range(3):
        x = leaf(X + i)
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().mean().backward(create_graph=True)
    return [g.detach() for g in grads(model)], further(grads(model), model)


@near(4)
def test_gradients_to_start_from_may_require_grad(nn, optim):
    found = []
    for given in (leaf(X[:, :1]), nn.Parameter(X[:, :1].clone()), nn.Parameter(X[:, :1]) * 3):
        model = net(nn)
        model(X).backward(given, create_graph=True)
        found.append([recorded(g) for g in grads(model)])
        found.append(torch.autograd.grad(squares(grads(model)), given))
    return found


# -- grad ----------------------------------------------------------------------------------


@near(8)
def test_of_parameters(nn, optim):
    model = wired(nn)
    loss = model(X).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    by_name = module_of(nn).grad(loss, dict(model.named_parameters()), create_graph=True)
    second = further(first, model)
    return [g.detach() for g in first], second, further(by_name.values(), model), list(by_name)


@near(4)
def test_of_activations(nn, optim):
    model = wired(nn)
    h = model.a(X)
    z = torch.tanh(h)
    loss = model.c(torch.sigmoid(model.b(z))).square().sum()
    first = torch.autograd.grad(loss, [h, z], create_graph=True)
    return [recorded(g) for g in first], first, further(first, model, h, z)


@pytest.mark.parametrize("given", ["torch's", "a parameter"])
@near(8)
def test_any_order_for_an_input(nn, optim, given):
    model = wired(nn, torch.float64)
    x = leaf(X.double()) if given == "torch's" else nn.Parameter(X.double())
    u, found = model(x), []
    for _ in range(4):
        (u,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        found.append((recorded(u), u.detach(), further([u], model, x)))
    return found


@near(4)
def test_grad_outputs_may_require_grad(nn, optim):
    model, x = net(nn), nn.Parameter(X.clone())
    theirs, ours = leaf(torch.ones(4, 1)), nn.Parameter(torch.full((4, 1), 2.0))
    found = []
    for given in (theirs, ours, ours * 3):
        (g,) = torch.autograd.grad(model(x), x, given, create_graph=True)
        found += [recorded(g), g.detach(), further([g], model, x, theirs, ours)]
    return found


UNUSED = {
    "an error": {},
    "None": {"allow_unused": True},
    "zeros": {"materialize_grads": True},
}


@pytest.mark.parametrize("unused", UNUSED)
@pytest.mark.parametrize("create_graph", [True, False])
@parity
def test_what_was_not_used(nn, optim, unused, create_graph):
    model, other, x = net(nn), nn.Parameter(torch.ones(2)), leaf()
    return torch.autograd.grad(
        model(x).square().sum(), [x, other], create_graph=create_graph, **UNUSED[unused]
    )


@pytest.mark.parametrize("unused", UNUSED)
@parity
def test_a_constant_gradient(nn, optim, unused):
    model, x = nn.Linear(3, 1), leaf()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    second = torch.autograd.grad(g.sum(), [x, *model.parameters()], **UNUSED[unused])
    return recorded(g), second


@near(4)
def test_a_batch_of_gradients_to_start_from(nn, optim):
    model, x = net(nn), leaf()
    starts = torch.eye(4).reshape(4, 4, 1)
    (g,) = torch.autograd.grad(model(x), x, starts, create_graph=True, is_grads_batched=True)
    return g.detach(), g.requires_grad, further([g], model, x)


@parity
def test_grad_mode_may_be_off(nn, optim):
    model, x = net(nn), leaf()
    loss = model(x).square().sum()
    with torch.no_grad():
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        loss.backward(create_graph=True)
    return g, [recorded(p) for p in grads(model)], further([g], model, x)


@near(4)
def test_a_layer_used_more_than_once(nn, optim):
    layer = nn.Linear(3, 3)
    model, x = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer), leaf()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    g.square().sum().backward()
    return layer.weight.grad, layer.bias.grad, x.grad


@pytest.mark.parametrize("frozen", ["a layer", "all", "a layer, after the forward"])
@parity
def test_frozen_parameters(nn, optim, frozen):
    model, x = net(nn), leaf()
    if "after" not in frozen:
        (model if frozen == "all" else model[0]).requires_grad_(False)
    loss = model(x).square().sum()
    model[0].requires_grad_(False)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    g.square().sum().backward()
    return grads(model), x.grad


@parity
def test_dtypes_may_be_mixed(nn, optim):
    first, second, x = nn.Linear(3, 4), nn.Linear(4, 1, dtype=torch.float64), leaf()
    y = second(torch.tanh(first(x)).double())
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    g.square().sum().backward()
    return recorded(g), grads(first), grads(second), x.grad


@pytest.mark.parametrize("looked", [True, False])
@near(4)
def test_a_graph_that_was_looked_at(nn, optim, looked):
    model, x = net(nn), leaf()
    y = model(x)
    if looked:
        assert y.grad_fn.next_functions
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return g, further([g], model, x)


@parity
def test_a_result_that_was_saved_leads_to_all_arguments(nn, optim):
    """Both arguments get a second gradient if the first was computed for one of them only."""
    base, power = nn.Parameter(torch.tensor([1.5, 2.0])), nn.Parameter(torch.tensor([2.0, 3.0]))
    (g,) = torch.autograd.grad((base**power).sum(), power, create_graph=True)
    g.sum().backward()
    return base.grad, power.grad


@parity
def test_views_and_changes_in_place(nn, optim):
    w = nn.Parameter(torch.arange(6.0) + 1)
    y = w * w
    z = y * 1
    z[2:4] = (w * w * w)[:2]
    z.mul_(w)
    y = (z[:3] * w[3:] * z.reshape(2, 3)).sum()
    (g,) = torch.autograd.grad(y, w, create_graph=True)
    return g, torch.autograd.grad(g.square().sum(), w)


@near(4)
def test_gradients_of_two_losses(nn, optim):
    model = wired(nn)
    parameters = list(model.parameters())
    a = torch.autograd.grad(model(X).square().mean(), parameters, create_graph=True)
    b = torch.autograd.grad(model(X + 1).sum(), parameters, create_graph=True)
    dot = sum((p * q).sum() for p, q in zip(a, b, strict=True))
    return dot.detach(), torch.autograd.grad(dot, parameters, allow_unused=True)


@parity
def test_hessian_times_a_vector(nn, optim):
    model = wired(nn, torch.float64)
    parameters = list(model.parameters())
    v = [torch.ones_like(p) for p in parameters]
    loss = model(X.double()).square().mean()
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.autograd.grad(first, parameters, v)


NORMS = {
    "layer_norm": lambda h: (1, lambda F: F.layer_norm(h, (5,))),
    "batch_norm": lambda h: (0, lambda F: F.batch_norm(h, None, None, training=True)),
}


@pytest.mark.parametrize("name", NORMS)
def test_third_derivatives_of_norms(name):
    """Compared with the formula: PyTorch takes mean and variance as constants in them."""

    def orders(of):
        x = nnmirror.Parameter(torch.randn(3, 5, dtype=torch.float64))
        h = torch.sin(x)
        dim, kernel = NORMS[name](h)
        if of == "formula":
            c = h - h.mean(dim, keepdim=True)
            y = c / (c.square().mean(dim, keepdim=True) + 1e-5).sqrt()
        else:
            y = kernel(nnmirror.functional)
        s, found = (y**3).sum(), []
        for _ in range(4):
            (g,) = torch.autograd.grad(s, x, create_graph=True)
            found.append(g.detach())
            s = (g * g).sum()
        return found

    torch.manual_seed(0)
    expected = orders("formula")
    torch.manual_seed(0)
    for e, a in zip(expected, orders("kernel"), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12 * e.abs().max().item())


# -- hooks ---------------------------------------------------------------------------------


@parity
def test_hooks_run_in_the_second_walk_too(nn, optim):
    model, x, seen = net(nn), leaf(), []
    model[0].weight.register_hook(lambda g: g * 2)
    model[1].register_full_backward_hook(lambda m, gi, go: seen.append((gi[0].detach(), go[0])))
    h = model[0](x)
    h.retain_grad()
    (g,) = torch.autograd.grad(model[2](model[1](h)).square().sum(), x, create_graph=True)
    seen.append(h.grad)
    g.retain_grad()
    g.register_hook(lambda g: g * 3)
    g.square().sum().backward()
    seen = [[t.detach() for t in s] if isinstance(s, tuple) else s for s in seen]
    return seen, h.grad, g.grad, grads(model), x.grad


@near(4)
def test_tensor_hooks_compute_with_it(nn, optim):
    model, x, seen = net(nn), leaf(), []

    def hook(g):
        seen.append((g.requires_grad, torch.is_grad_enabled()))
        return g * g * model[2].weight.sum()

    h = model[0](x)
    h.register_hook(hook)
    model[0].weight.register_hook(hook)
    loss = model[2](model[1](h)).square().sum()
    (g,) = torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
    loss.backward(create_graph=True)
    return seen, g, further([g, model[0].weight.grad], model, x)


@parity
def test_a_hook_may_detach(nn, optim):
    model, x = net(nn), leaf()
    h = model[0](x)
    h.register_hook(lambda g: g.detach() * 3)
    (g,) = torch.autograd.grad(model[2](model[1](h)).square().sum(), x, create_graph=True)
    return recorded(g), g, further([g], model, x)


@parity
def test_module_hooks_compute_with_it(nn, optim):
    model, x, seen = net(nn), leaf(), []

    def before(module, grad_output):
        seen.append((grad_output[0].requires_grad, torch.is_grad_enabled()))
        return (grad_output[0] ** 2,)

    def after(module, grad_input, grad_output):
        seen.append((grad_input[0].requires_grad, torch.is_grad_enabled()))
        return (grad_input[0] * grad_output[0].sum(),)

    model[1].register_full_backward_pre_hook(before)
    model[1].register_full_backward_hook(after)
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return seen, g, further([g], model, x)


@parity
def test_node_hooks_compute_with_it(nn, optim):
    model, x, seen = net(nn), leaf(), []
    y = model(x)

    def before(grad_outputs):
        seen.append(grad_outputs[0].requires_grad)
        return (grad_outputs[0] ** 2,)

    def after(grad_inputs, grad_outputs):
        seen.append((grad_inputs[0].requires_grad, grad_outputs[0].requires_grad))
        return (grad_inputs[0] * grad_outputs[0],)

    y.grad_fn.register_prehook(before)
    y.grad_fn.next_functions[1][0].register_hook(after)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return seen, g, further([g], model, x)


@parity
def test_hooks_after_accumulation_see_it(nn, optim):
    model, seen, kept = net(nn), [], []

    def hook(p):
        seen.append((recorded(p.grad), torch.is_grad_enabled()))
        kept.append(p.grad.square())

    model[0].weight.register_post_accumulate_grad_hook(hook)
    model(X).square().sum().backward(create_graph=True)
    return seen, further(kept, model)


@near(4)
def test_retained_gradients_have_it(nn, optim):
    model, x = net(nn), leaf()
    h = model[0](x)
    h.retain_grad()
    seen = []
    for _ in range(2):
        model[2](model[1](h)).square().sum().backward(create_graph=True)
        seen.append(recorded(h.grad))
    return seen, h.grad.detach(), further([h.grad], model, x)


@parity
def test_hooks_of_several_tensors_see_it(nn, optim):
    model, kept = net(nn), []
    a = model[0](X)
    b = model[1](a)
    torch.autograd.graph.register_multi_grad_hook([a, b], kept.extend)
    model[2](b).square().sum().backward(create_graph=True)
    return further(kept, model)


# -- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["the loss first", "the gradient first", "twice", "before"])
@parity
def test_a_graph_that_was_freed(nn, optim, case):
    model, x = wired(nn), leaf()
    loss = model(x).square().sum()
    if case == "before":
        loss.backward()
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    if case == "the loss first":
        loss.backward()
        g.sum().backward()
    else:
        g.sum().backward()
        (loss if case == "the gradient first" else g.sum()).backward()


@pytest.mark.parametrize("changed", ["the result", "the gradient to start from"])
@parity
def test_what_was_saved_may_not_change(nn, optim, changed):
    model, x, start = nn.Linear(3, 1), leaf(), torch.ones(4, 1)
    h = model(x)
    y = torch.tanh(h)
    (g,) = torch.autograd.grad(y * y, x, start, create_graph=True)
    with torch.no_grad():
        (y if changed == "the result" else start).add_(1.0)
    g.sum().backward()


def test_a_weight_that_was_changed_between():
    """Not a parity test: PyTorch's message names another view of the weight."""
    for nn in (torch.nn, nnmirror):
        model, x = wired(nn), leaf()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with torch.no_grad():
            model.b.weight.add_(1.0)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 2"):
            g.sum().backward()


@pytest.mark.parametrize("whole", [True, False])
@parity
def test_checkpointed(nn, optim, whole):
    model, x = net(nn), leaf()
    if whole:
        y = checkpoint(model, x, use_reentrant=False)
    else:
        y = model[2](checkpoint(lambda x: torch.tanh(model[0](x)), x, use_reentrant=False))
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return g, further([g], model, x)


# -- torch.autograd.functional, gradcheck --------------------------------------------------

KINDS = {
    "a plain tensor": lambda nn: X[:2].clone(),
    "a leaf of torch's": lambda nn: leaf(X[:2]),
    "a parameter": lambda nn: nn.Parameter(X[:2].clone()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("name", ["jacobian", "hessian", "vjp", "jvp", "hvp", "vhp"])
@parity
def test_functional(nn, optim, name, create_graph, strict, kind):
    model, x = net(nn, out=2), KINDS[kind](nn)
    function, v = model, [torch.ones(2, 2 if name == "vjp" else 3)]
    if name in ("hessian", "hvp", "vhp"):

        def function(x):
            return model(x).square().sum()

    given = [x] if name in ("jacobian", "hessian") else [x, *v]
    return getattr(AF, name)(function, *given, create_graph=create_graph, strict=strict)


@pytest.mark.parametrize("vectorize", [True, False])
@near(4)
def test_gradients_of_functional_results(nn, optim, vectorize):
    model, x = net(nn, out=2), nn.Parameter(X[:2].clone())
    jacobian = AF.jacobian(model, x, create_graph=True, vectorize=vectorize)
    _, product = AF.hvp(lambda x: model(x).square().sum(), x, torch.ones(2, 3), create_graph=True)
    return jacobian.detach(), further([jacobian], model, x), further([product], model, x)


@pytest.mark.parametrize("name", ["jacobian", "hessian", "vjp", "jvp", "hvp", "vhp"])
@near(4)
def test_functional_of_two(nn, optim, name):
    """Operations on the inputs before the net are part of the derivative."""
    model = net(nn, out=2)

    def function(a, b):
        return model(a * 2) * model(a + b)

    def scalar(a, b):
        return function(a, b).sum()

    given, v = (X[:2], X[:2] + 1), (torch.ones(2, 3), X[2:])
    if name == "jacobian":
        return AF.jacobian(function, given)
    if name == "hessian":
        return AF.hessian(scalar, given), AF.hessian(scalar, given, vectorize=True)
    if name == "vjp":
        return AF.vjp(function, given, torch.ones(2, 2))
    return getattr(AF, name)(function if name == "jvp" else scalar, given, v)


def test_forward_mode_is_refused_by_name():
    model = net(nnmirror)
    with pytest.raises(NotImplementedError, match=r"forward mode .*nnmirror\.func\.jvp or jacfwd"):
        AF.jacobian(model, X, vectorize=True, strategy="forward-mode")
    found = nnmirror.func.jacfwd(model)(X)
    assert torch.equal(found, AF.jacobian(model, X))
    model.requires_grad_(False)
    AF.jacobian(model, X, vectorize=True, strategy="forward-mode")


@parity
def test_functional_where_nothing_depends(nn, optim):
    model = nn.Linear(3, 1)
    return AF.jacobian(lambda x: model(torch.ones(3)), X), AF.jacobian(
        lambda x: model(torch.ones(3)), X, strict=True
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fast_mode": True},
        {"check_batched_grad": True},
        {"check_undefined_grad": True},
        {"gen_non_contig_grad_outputs": True},
    ],
    ids=str,
)
@parity
def test_gradgradcheck(nn, optim, options):
    model, x = wired(nn, torch.float64), leaf(X[:2].double())
    given = [nn.Parameter(X[:2].double()), *model.parameters()]
    return (
        torch.autograd.gradgradcheck(model, x, **options),
        torch.autograd.gradgradcheck(lambda x, *_: model(x).square(), given, **options),
    )


# -- Functions of the user's own -----------------------------------------------------------

POINTS = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)


def points(nn):
    return nn.Parameter(POINTS.clone())


def orders(y, x, count=3):
    """The derivatives of y with respect to x, order by order, and whether each requires grad."""
    found = []
    for _ in range(count):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=True)
        if y is None:
            return [*found, None]
        found.append((y.detach().clone(), y.requires_grad))
        if not y.requires_grad:
            break
    return found


def cube_of(nn, backward):
    """A Function that computes x^3, saves x and has this backward."""

    class Cube(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.x, ctx.y = x, x**3
            return ctx.y

    Cube.backward = staticmethod(backward)
    return Cube.apply


def _usual(ctx, g):
    (x,) = ctx.saved_tensors
    return g * 3 * x * x


def _without_grad_mode(ctx, g):
    (x,) = ctx.saved_tensors
    with torch.no_grad():
        slope = 3 * x * x
    return g * slope


def _with_a_number(ctx, g):
    return g * ctx.saved_tensors[0][0].item()


CUBES = {
    "saved input": _usual,
    "kept input": lambda ctx, g: g * 3 * ctx.x**2,
    "kept output": lambda ctx, g: g * 3 * ctx.y / ctx.x,
    "g detached": lambda ctx, g: g.detach() * 3 * ctx.saved_tensors[0] ** 2,
    "x detached": lambda ctx, g: g * 3 * ctx.saved_tensors[0].detach() ** 2,
    "no_grad inside": _without_grad_mode,
    "a number": _with_a_number,
    "straight through": lambda ctx, g: g,
    "not linear": lambda ctx, g: g * g * ctx.saved_tensors[0],
    "once_differentiable": once_differentiable(_usual),
}


@pytest.mark.parametrize("case", CUBES)
@near(4)
def test_a_function(nn, optim, case):
    cube, x = cube_of(nn, CUBES[case]), points(nn)
    return [
        orders(y, x, 1 if case == "once_differentiable" else 4)
        for y in (cube(x), cube(x) * x, cube(x * x) * x)
    ]


@parity
def test_a_function_of_a_leaf_of_torchs(nn, optim):
    x = leaf(POINTS)
    return orders(cube_of(nn, _usual)(x), x)


@parity
def test_grad_mode_is_on_in_a_backward_that_is_recorded(nn, optim):
    seen = []

    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        seen.append((torch.is_grad_enabled(), g.requires_grad, x.requires_grad))
        return g * 3 * x * x

    x = points(nn)
    return orders(cube_of(nn, backward)(x * 1), x), seen


@parity
def test_once_differentiable(nn, optim):
    x = points(nn)
    (g,) = torch.autograd.grad(
        cube_of(nn, once_differentiable(_usual))(x).sum(), x, create_graph=True
    )
    seen = recorded(g), g.detach()
    with pytest.raises(RuntimeError) as raised:
        g.sum().backward()
    return seen, str(raised.value)


@parity
def test_a_saved_output(nn, optim):
    class Both(base_of(nn)):
        @staticmethod
        def forward(ctx, x, z):
            y, w = x.exp(), x * z
            ctx.save_for_backward(y, w, x, z)
            return y, w

        @staticmethod
        def backward(ctx, g, h):
            y, w, x, _ = ctx.saved_tensors
            return g * y + h * w / x, h * x

    x, z = points(nn), points(nn)
    a, b = Both.apply(x * x, z * 2)
    return orders(a * b, x), orders(a * b, z)


@parity
def test_saved_in_setup_context(nn, optim):
    class Both(base_of(nn)):
        @staticmethod
        def forward(x, w):
            return x * w, x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs, *output)

        @staticmethod
        def backward(ctx, g, h):
            x, w, a, b = ctx.saved_tensors
            return g * w + 2 * h * x + 0 * a, g * x + 0 * b

    x, w = points(nn), points(nn)
    a, b = Both.apply(x, w)
    return orders(a * b, x), orders(a * b, w)


@parity
def test_a_saved_intermediate_is_a_constant(nn, optim):
    class Twice(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            e = x.exp()
            ctx.save_for_backward(e)
            return e * 2

        @staticmethod
        def backward(ctx, g):
            (e,) = ctx.saved_tensors
            return g * 2 * e

    x = points(nn)
    return orders(Twice.apply(x), x), orders(Twice.apply(x) * x, x)


@parity
def test_a_backward_that_calls_a_function(nn, optim):
    class Slope(base_of(nn)):
        @staticmethod
        def forward(ctx, g, x):
            ctx.save_for_backward(g, x)
            return g * 3 * x * x

        @staticmethod
        def backward(ctx, h):
            g, x = ctx.saved_tensors
            return h * 3 * x * x, h * g * 6 * x

    x = points(nn)
    cube = cube_of(nn, lambda ctx, g: Slope.apply(g, ctx.saved_tensors[0]))
    return orders(cube(x) * x, x, 4)


@parity
def test_a_backward_that_calls_a_module(nn, optim):
    layer = nn.Linear(6, 6, dtype=torch.float64)
    x = points(nn)
    y = cube_of(nn, lambda ctx, g: g * torch.tanh(layer(ctx.saved_tensors[0])))(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return g.detach(), further([g], layer, x)


@parity
def test_needs_input_grad_of_a_function(nn, optim):
    seen = []

    class Product(base_of(nn)):
        @staticmethod
        def forward(ctx, x, w, n):
            ctx.save_for_backward(x, w)
            ctx.n = n
            return x * w * n

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            seen.append(ctx.needs_input_grad)
            need_x, need_w, _ = ctx.needs_input_grad
            return g * w * ctx.n if need_x else None, g * x * ctx.n if need_w else None, None

    x, w = points(nn), points(nn)
    return (
        orders(Product.apply(x, w, 2.0) ** 2, x),
        orders(Product.apply(x, w.detach(), 2.0) ** 2, x),
        orders(Product.apply(x.detach(), w, 2.0) ** 2, w),
        seen,
    )


@pytest.mark.parametrize("materialize", [True, False])
@parity
def test_a_result_without_a_gradient(nn, optim, materialize):
    seen = []

    class Powers(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(materialize)
            ctx.save_for_backward(x)
            return x * x, x**3

        @staticmethod
        def backward(ctx, g, h):
            (x,) = ctx.saved_tensors
            seen.append([t is not None and t.requires_grad for t in (g, h)])
            dx = 0
            dx = dx if g is None else dx + g * 2 * x
            return dx if h is None else dx + h * 3 * x * x

    x = points(nn)
    a, b = Powers.apply(x)
    return orders(a, x), orders(b * a, x), seen


@parity
def test_a_function_in_place(nn, optim):
    class Doubled(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            x.mul_(2)
            ctx.save_for_backward(x)
            return x

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return g * y

    x = points(nn)
    return orders(Doubled.apply(x * x) * x, x)


@parity
def test_saved_tensors_that_may_be_read_once(nn, optim):
    class Once(base_of(nn)):
        clear_saved_tensors_on_access = True

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        backward = staticmethod(_usual)

    x = points(nn)
    y = Once.apply(x).sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    second = torch.autograd.grad(g.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(y, x)
    return g, second, str(raised.value)


@parity
def test_what_a_function_saved_may_not_change(nn, optim):
    x = points(nn)
    z = x * 1
    (g,) = torch.autograd.grad(cube_of(nn, _usual)(z).sum(), x, create_graph=True)
    z.add_(1)
    g.sum().backward()


@parity
def test_gradgradcheck_of_a_function(nn, optim):
    right, wrong = cube_of(nn, _usual), cube_of(nn, CUBES["x detached"])
    torch.autograd.gradcheck(wrong, points(nn))
    with pytest.raises(GradcheckError):
        torch.autograd.gradgradcheck(wrong, points(nn))
    return torch.autograd.gradgradcheck(right, points(nn))


BEHIND = {
    "broadcast": lambda nn, x, w: x * w[:1] + w[0],
    "std": lambda nn, x, w: torch.std_mean(torch.sin(x), 1)[0],
    "normalize": lambda nn, x, w: nn.functional.normalize(torch.exp(x), dim=1),
    "cosine": lambda nn, x, w: torch.cosine_similarity(x, x.roll(1, 0) * w, dim=1),
    "stack": lambda nn, x, w: torch.stack([x[:, 0], x[:, 1] * w[0, 0]], 1).exp(),
    "chunk": lambda nn, x, w: torch.cat([t.sin() for t in (x * w).chunk(3, 1)][1:], 1),
    "softplus": lambda nn, x, w: nn.functional.softplus(x * w),
    "shrink": lambda nn, x, w: nn.functional.softshrink(x * w, 0.2).pow(3),
    "repeat": lambda nn, x, w: (x * w).repeat_interleave(2, 1).tanh(),
    "index": lambda nn, x, w: (x * w)[:, [0, 2, 0]].exp(),
}


@pytest.mark.parametrize("name", BEHIND)
@near(4)
def test_a_penalty_in_each_step(nn, optim, name):
    """What is recorded of a gradient is the same in each step; the weights differ."""
    w = nn.Parameter(torch.linspace(0.5, 1.5, 12).reshape(4, 3))
    sgd = optim.SGD([w], lr=0.01)
    losses = []
    for step in range(8):
        x = nn.Parameter(torch.sin(X + step))
        y = BEHIND[name](nn, x, w)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        loss = (dx.pow(2) + 0 * x).sum() + y.pow(2).sum()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append((loss, x.grad))
    return losses, w


@pytest.mark.parametrize("layer", ["LayerNorm", "BatchNorm1d", "GroupNorm", "Conv1d", "PReLU"])
def test_a_penalty_through_a_layer_in_each_step(layer):
    @near(64)
    def compare(nn, optim):
        torch.manual_seed(0)
        made = {
            "LayerNorm": lambda: nn.LayerNorm(6),
            "BatchNorm1d": lambda: nn.BatchNorm1d(6),
            "GroupNorm": lambda: nn.GroupNorm(2, 6),
            "Conv1d": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2)),
            "PReLU": lambda: nn.PReLU(),
        }
        net = nn.Sequential(nn.Linear(3, 6), made[layer](), nn.Tanh())
        sgd = optim.SGD(net.parameters(), lr=0.01)
        for step in range(8):
            x = torch.sin(X + step).requires_grad_()
            y = net(x).sum()
            (dx,) = torch.autograd.grad(y, x, create_graph=True)
            sgd.zero_grad()
            ((dx.norm(dim=1) - 1).pow(2).mean() + y).backward()
            sgd.step()
        return [p.detach() for p in net.parameters()]

    compare()
