"""User-defined Functions: what their authors may write, and how they behave in a net."""

import pytest
import torch

import nnmirror

from .parity import parity


def base_of(nn):
    return torch.autograd.Function if nn is torch.nn else nnmirror.Function


def module_of(nn):
    return torch.autograd if nn is torch.nn else nnmirror


@parity
def test_grad_mode_is_off_inside(nn, optim):
    seen = []
    inner, w = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    plain = torch.ones(2, requires_grad=True)

    class Looked(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            tried = (inner(x), inner(x.detach()), w * 2, plain * 2, x * 1)
            seen.append(
                (torch.is_grad_enabled(), x.requires_grad, [t.requires_grad for t in tried])
            )
            return x * w

        @staticmethod
        def backward(ctx, g):
            seen.append((torch.is_grad_enabled(), inner(g).requires_grad, (g * w).requires_grad))
            return g * w

    h = nn.Linear(3, 2)(torch.randn(4, 3))
    y = Looked.apply(h)
    y.sum().backward()
    leaf = torch.randn(4, 2, requires_grad=True)
    Looked.apply(leaf).sum().backward()
    return seen, y, leaf, w, plain, dict(inner.named_parameters())


OUTPUTS = {
    "module": lambda nn, x, inner, w: inner(x),
    "parameter": lambda nn, x, inner, w: x * w,
    "plain leaf": lambda nn, x, inner, w: x * torch.ones(2, requires_grad=True),
    "graph inside": lambda nn, x, inner, w: _tracked(lambda: inner(x)),
    "told to": lambda nn, x, inner, w: x.clone().requires_grad_(),
    "input": lambda nn, x, inner, w: x,
    "view": lambda nn, x, inner, w: x.view(-1),
    "list": lambda nn, x, inner, w: [x * 2, x * 3],
    "integers": lambda nn, x, inner, w: (x.argmax(0), x * 1, 3, None, "name"),
}


def _tracked(function):
    with torch.enable_grad():
        return function()


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("given", ["plain", "leaf", "parameter", "result"])
@pytest.mark.parametrize("output", OUTPUTS)
@parity
def test_a_result_requires_grad_if_an_argument_does(nn, optim, output, given, grad_mode):
    inner, w = nn.Linear(2, 2), nn.Parameter(torch.full((2,), 2.0))

    class Made(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            return OUTPUTS[output](nn, x, inner, w)

        @staticmethod
        def backward(ctx, *grads):
            return next(g for g in grads if g is not None and g.dtype is torch.float32).view(4, 2)

    x = torch.randn(4, 2)
    if given == "leaf":
        x.requires_grad_()
    elif given == "parameter":
        x = nn.Parameter(x)
    elif given == "result":
        x = nn.functional.tanh(nn.Parameter(x))
    if output == "view" and not grad_mode:
        pytest.skip("PyTorch lets a view that was made without grad mode require grad")
    with torch.set_grad_enabled(grad_mode):
        y = Made.apply(x)
        many = y if isinstance(y, tuple) else (y,)
        if output != "list":
            for t in many:
                if isinstance(t, torch.Tensor) and t.requires_grad and grad_mode:
                    t.sum().backward()
    return y, y is x, x.grad if x.is_leaf else None, w, dict(inner.named_parameters())


@parity
def test_what_mark_non_differentiable_leaves_alone(nn, optim):
    class Two(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            with torch.enable_grad():
                other = x * 2
            ctx.mark_non_differentiable(other)
            return x * 3, other

        @staticmethod
        def backward(ctx, g, other):
            return g * 3 + other

    x = nn.Parameter(torch.ones(3))
    y, other = Two.apply(x)
    y.sum().backward()
    return y, other, x


@pytest.mark.parametrize("how", ["kept", "made anew", "made anew, all of it"])
@parity
def test_graph_inside(nn, optim, how):
    """As in deep equilibrium nets, adjoint methods and checkpointing by hand."""
    inner, outer = nn.Linear(2, 2), nn.Linear(3, 2)

    def inside(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return x, torch.tanh(inner(x)) + x

    class Layer(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            if how == "kept":
                ctx.kept = inside(x)
                return ctx.kept[1].detach()
            ctx.save_for_backward(x)
            return torch.tanh(inner(x)) + x

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.kept if how == "kept" else inside(*ctx.saved_tensors)
            if how == "made anew, all of it":
                torch.autograd.backward(y, g)
                return x.grad
            return torch.autograd.grad(y, x, g)[0]

    Layer.apply(outer(torch.randn(4, 3))).sum().backward()
    return dict(inner.named_parameters()), dict(outer.named_parameters())


@parity
def test_graph_through_the_argument_itself(nn, optim):
    class Slope(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            with torch.enable_grad():
                y = torch.tanh(x)
            (ctx.slope,) = torch.autograd.grad(y.sum(), x)
            return y

        @staticmethod
        def backward(ctx, g):
            return g * ctx.slope

    found = []
    for x in (nn.Parameter(torch.randn(3)), torch.randn(3, requires_grad=True)):
        for given in (x, x * 2):
            Slope.apply(given).sum().backward()
        found.append(x)
    return found


@parity
def test_the_penalty_of_a_fixed_point(nn, optim):
    """A net is trained through a layer that solves a fixed-point equation with its own net."""
    inner, net = nn.Linear(3, 3), nn.Sequential(nn.Linear(2, 3), nn.Tanh())

    class Solve(base_of(nn)):
        @staticmethod
        def forward(ctx, x, *parameters):
            z = torch.zeros_like(x)
            for _ in range(5):
                z = torch.tanh(0.3 * inner(z) + x)
            ctx.save_for_backward(x, z)
            return z

        @staticmethod
        def backward(ctx, g):
            x, z = ctx.saved_tensors
            with torch.enable_grad():
                x, z = x.detach().requires_grad_(), z.detach()
                y = torch.tanh(0.3 * inner(z) + x)
            return torch.autograd.grad(y, (x, *inner.parameters()), g)

    optimizer = optim.SGD([*net.parameters(), *inner.parameters()], lr=0.1)
    x, t = torch.randn(4, 2), torch.randn(4, 3)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(Solve.apply(net(x), *inner.parameters()), t).backward()
        optimizer.step()
    return dict(inner.named_parameters()), dict(net.named_parameters())


# -- backward without a gradient ---------------------------------------------------------

NETS = {
    "Linear": lambda nn: nn.Linear(3, 2),
    "small net": lambda nn: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "one layer": lambda nn: nn.Sequential(nn.Linear(3, 4), nn.ELU()),
    "norm": lambda nn: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
    "ReLU first": lambda nn: nn.Sequential(nn.ReLU(), nn.Linear(3, 4), nn.Sigmoid()),
    "wide": lambda nn: nn.Sequential(nn.Linear(3, 3000), nn.ReLU(), nn.Linear(3000, 2)),
}


def stop_of(nn, nothing=None):
    class Stop(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return nothing

    return Stop.apply


@pytest.mark.parametrize("given", ["plain", "leaf", "parameter"])
@pytest.mark.parametrize("name", NETS)
@parity
def test_no_gradient_comes_back_to_a_net(nn, optim, name, given):
    net, stop = NETS[name](nn), stop_of(nn)
    x = torch.randn(5, 3)
    if given != "plain":
        x = nn.Parameter(x) if given == "parameter" else x.requires_grad_()
    stop(net(x)).sum().backward()
    stop_of(nn, (None,))(nn.functional.mse_loss(net(x), torch.ones(()))).backward()
    none = [p.grad for p in net.parameters()]
    (stop(net(x)).sum() + net(x).sum()).backward()  # the other path has a gradient
    stop(net(net(x) @ torch.ones(len(net(x)[0]), 3))).sum().backward(retain_graph=True)
    return none, x, dict(net.named_parameters())


@parity
def test_a_frozen_net_and_no_gradient(nn, optim):
    net, stop = NETS["small net"](nn), stop_of(nn)
    net[0].requires_grad_(False)
    w = nn.Parameter(torch.ones(2))
    (stop(net(torch.randn(5, 3))).sum() + stop(w * 3).sum() + stop(w).sum() + w[0]).backward()
    return w, dict(net.named_parameters())


@pytest.mark.parametrize("materialize", [True, False])
@parity
def test_backward_is_called_without_a_gradient_too(nn, optim, materialize):
    seen = []

    class Looked(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(materialize)
            return x * 2

        @staticmethod
        def backward(ctx, g):
            seen.append(g)
            return g

    p, x = nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True)
    for leaf in (p, x):
        stop_of(nn)(Looked.apply(leaf)).sum().backward()
        torch.autograd.grad(stop_of(nn)(Looked.apply(leaf)).sum(), leaf, allow_unused=True)
    return seen, p, x


# -- the arguments of apply, and ctx -----------------------------------------------------

CALLS = {
    "all": lambda f, x: f(x, 2.0),
    "default": lambda f, x: f(x),
    "keyword": lambda f, x: f(x, k=2.0),
    "keywords": lambda f, x: f(x=x, k=2.0),
    "other order": lambda f, x: f(k=2.0, x=x),
    "tensor as keyword": lambda f, x: f(x.detach(), k=x),
    "unknown": lambda f, x: f(x, scale=2.0),
    "twice": lambda f, x: f(x, 2.0, k=2.0),
    "too many": lambda f, x: f(x, 2.0, 3.0),
    "none": lambda f, x: f(),
    "the ctx": lambda f, x: f(x, ctx=2.0),
}


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("call", CALLS)
@parity
def test_arguments_of_apply(nn, optim, call, context):
    if context:

        class Scale(base_of(nn)):
            @staticmethod
            def forward(x, k=3.0):
                return x * k

            @staticmethod
            def setup_context(ctx, inputs, output):
                ctx.x, ctx.k = inputs

            @staticmethod
            def backward(ctx, g):
                return g * ctx.k, (g * ctx.x if ctx.needs_input_grad[1] else None)
    else:

        class Scale(base_of(nn)):
            @staticmethod
            def forward(ctx, x, k=3.0):
                ctx.x, ctx.k = x, k
                return x * k

            @staticmethod
            def backward(ctx, g):
                second = g * ctx.x if ctx.needs_input_grad[1:] == (True,) else None
                return g * ctx.k, second

    x = nn.Parameter(torch.randn(3))
    y = CALLS[call](Scale.apply, nn.functional.tanh(x))
    y.sum().backward()
    return y, y.grad_fn.needs_input_grad, y.grad_fn.k, x


@pytest.mark.parametrize("kwargs", [{"k": 2.0}, {"j": 2.0}, {"k": 1.0, "j": 2.0}])
@parity
def test_a_skipped_default_argument(nn, optim, kwargs):
    class Scale(base_of(nn)):
        @staticmethod
        def forward(ctx, x, j=1.0, k=3.0):
            return x * j * k

        @staticmethod
        def backward(ctx, g):
            return g, None, None

    x = nn.Parameter(torch.randn(3))
    Scale.apply(x, **kwargs).sum().backward()
    return x


@parity
def test_keyword_only_arguments(nn, optim):
    class Scale(base_of(nn)):
        @staticmethod
        def forward(x, *more, k=3.0):
            return x * k + sum(more)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

    return Scale.apply(nn.Parameter(torch.randn(3)))


@pytest.mark.parametrize("tracked", [True, False])
@parity
def test_saving_what_is_no_tensor(nn, optim, tracked):
    class Save(base_of(nn)):
        @staticmethod
        def forward(ctx, x, k):
            ctx.save_for_backward(x, None, k)
            return x * k

        @staticmethod
        def backward(ctx, g):
            return g

    return Save.apply(nn.Parameter(torch.ones(2)) if tracked else torch.ones(2), 3)


@parity
def test_changed_after_it_was_saved(nn, optim):
    """A change inside forward is allowed; only later changes of a saved tensor count."""

    class Grown(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.mark_dirty(x)
            return x.add_(1)

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].detach()

    x = nn.Parameter(torch.randn(3))
    Grown.apply(x * 2).sum().backward()
    return x


# Names that the mirror might use itself.
NAMES = [
    "attributes", "dirty", "edges", "epoch", "fits", "function", "into", "label", "node", "outputs",
    "places", "pool", "program", "run", "saved", "sequence", "tensors", "writes", "_saved",
]  # fmt: skip


@parity
def test_any_name_may_be_set_on_ctx(nn, optim):
    class Kept(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            for i, name in enumerate(NAMES):
                setattr(ctx, name, torch.full((3,), float(i)))
            ctx.save_for_backward(x)
            return x * 2, x * 3

        @staticmethod
        def backward(ctx, a, b):
            total = sum(getattr(ctx, name) for name in NAMES)
            ctx.saved_tensors  # noqa: B018
            return (a * 2 + b * 3) * total

    x = nn.Parameter(torch.randn(3))
    y, z = Kept.apply(nn.functional.tanh(x))
    y.sum().backward()
    return y, z, x, hasattr(y.grad_fn, "tensors"), hasattr(y.grad_fn, "absent")


@parity
def test_an_attribute_that_is_not_there(nn, optim):
    class Bare(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * ctx.absent

    Bare.apply(nn.Parameter(torch.ones(3))).sum().backward()


@pytest.mark.parametrize("grad_mode", [True, False])
@parity
def test_needs_input_grad(nn, optim, grad_mode):
    seen = []

    class Looked(base_of(nn)):
        @staticmethod
        def forward(ctx, a, b, k, c):
            seen.append(ctx.needs_input_grad)
            return a + b + c

        @staticmethod
        def backward(ctx, g):
            seen.append(ctx.needs_input_grad)
            return g, None, None, g

    with torch.set_grad_enabled(grad_mode):
        out = Looked.apply(
            nn.Parameter(torch.ones(3)), torch.ones(3), 3, torch.ones(3, requires_grad=True)
        )
    if grad_mode:
        out.sum().backward()
    return seen


RETURNS = {
    "a string": lambda g: ("no", None),
    "a list": lambda g: ([g], None),
    "for a number": lambda g: (g, g),
    "a number for a number": lambda g: (g, 3),
}


@pytest.mark.parametrize("returned", RETURNS)
@parity
def test_what_backward_may_not_return(nn, optim, returned):
    class Wrong(base_of(nn)):
        @staticmethod
        def forward(ctx, x, k):
            return x * k

        @staticmethod
        def backward(ctx, g):
            return RETURNS[returned](g)

    Wrong.apply(nn.Parameter(torch.ones(3)), 2).sum().backward()


@pytest.mark.parametrize("which", ["vjp", "both", "once", "boxed", "read once", "jvp", "vmap"])
@parity
def test_attributes_of_the_class(nn, optim, which):
    base = base_of(nn)

    class Square(base):
        boxed_grads_call = which == "boxed"
        clear_saved_tensors_on_access = which == "read once"
        generate_vmap_rule = which == "vmap"

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if which == "read once":
                ctx.saved_tensors  # noqa: B018
            return 2 * x * (g.pop() if which == "boxed" else g)

        if which == "once":
            backward = staticmethod(torch.autograd.function.once_differentiable(backward))
        if which in ("vjp", "both"):
            vjp = backward
        if which == "vjp":
            del backward
        if which == "jvp":
            jvp = staticmethod(lambda ctx, t: t)

    x = nn.Parameter(torch.randn(3))
    Square.apply(x).sum().backward()
    return x, base.generate_vmap_rule, base.clear_saved_tensors_on_access, base.boxed_grads_call


@parity
def test_not_to_be_instantiated(nn, optim):
    class Same(base_of(nn)):
        pass

    made = Same()
    for wrong in (lambda: made.jvp(None), lambda: made.vmap(None, None), lambda: made.vjp(None)):
        with pytest.raises(NotImplementedError):
            wrong()
    made(torch.ones(3))


# -- gradcheck ---------------------------------------------------------------------------


def _functions_to_check(nn):
    class Square(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    class Two(base_of(nn)):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x, x + 1

        @staticmethod
        def backward(ctx, a, b):
            return 2 * a * ctx.saved_tensors[0] + b

    class Unready(Two):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return Two.forward(ctx, x)

    class Wrong(Square):
        @staticmethod
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0]

    class Constant(Square):
        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0] + (g == 0).all()

    return {
        "Square": Square.apply,
        "Two": Two.apply,
        "Unready": Unready.apply,
        "Wrong": Wrong.apply,
        "Constant": Constant.apply,
        "Linear": nn.Linear(3, 2, dtype=torch.float64),
        "net": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 1)).double(),
        "loss": lambda x: nn.functional.mse_loss(nn.functional.tanh(x), torch.ones_like(x)),
        "torch's own": torch.tanh,
    }


@pytest.mark.parametrize("how", [{}, {"check_batched_grad": True}, {"fast_mode": True}])
@pytest.mark.parametrize("name", _functions_to_check(torch.nn))
@parity
def test_gradcheck(nn, optim, name, how):
    function = _functions_to_check(nn)[name]
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    p = nn.Parameter(x.detach().clone())
    return [torch.autograd.gradcheck(function, (given,), **how) for given in (x, p)]


@parity
def test_gradcheck_of_parameters(nn, optim):
    layer = nn.Linear(3, 2, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    given = (x, layer.weight, layer.bias)
    return torch.autograd.gradcheck(nn.functional.linear, given, check_batched_grad=True)


@parity
def test_jacobian_by_batched_gradients(nn, optim):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, requires_grad=True)
    y = torch.tanh(net(x))
    found = torch.autograd.grad(y, [x, net[2].bias], torch.eye(2), is_grads_batched=True)
    return [g.shape for g in found], torch.autograd.grad(
        net(x).sum(), {"x": x, "b": net[0].bias}, torch.ones(3), is_grads_batched=True
    )["b"].shape


@parity
def test_a_batch_of_gradients_of_another_shape(nn, optim):
    w = nn.Parameter(torch.ones(2))
    torch.autograd.grad(torch.tanh(w), w, torch.eye(3), is_grads_batched=True)


# -- backward ----------------------------------------------------------------------------

STARTS = {
    "loss": lambda a, b, x: ((a.sum(),), {}),
    "alone": lambda a, b, x: (a.sum(), {}),
    "two": lambda a, b, x: ([a.sum(), b.sum()], {}),
    "gradients": lambda a, b, x: ([a, b], {"grad_tensors": [torch.ones(4, 2), torch.ones(4, 1)]}),
    "gradient": lambda a, b, x: (a, {"grad_tensors": torch.ones(4, 2)}),
    "one gradient": lambda a, b, x: ([a, b.sum()], {"grad_tensors": [torch.ones(4, 2), None]}),
    "beside torch's": lambda a, b, x: ([a.sum(), (x * 3).sum()], {}),
    "beside a leaf": lambda a, b, x: ([a.sum(), x], {"grad_tensors": [None, torch.ones(4, 3)]}),
    "inputs": lambda a, b, x: (a.sum(), {"inputs": [x]}),
    "input": lambda a, b, x: (a.sum(), {"inputs": x}),
    "inputs by name": lambda a, b, x: (a.sum(), {"inputs": {"x": x}}),
    "old name": lambda a, b, x: (a, {"grad_variables": torch.ones(4, 2)}),
    "both names": lambda a, b, x: (a, {"grad_variables": (), "grad_tensors": ()}),
    "no inputs": lambda a, b, x: (a.sum(), {"inputs": ()}),
    "an input without": lambda a, b, x: (a.sum(), {"inputs": torch.ones(3)}),
    "no scalar": lambda a, b, x: (a, {}),
    "one without a graph": lambda a, b, x: ([a.sum(), torch.ones(3)], {}),
    "too few": lambda a, b, x: ([a.sum(), b.sum()], {"grad_tensors": [None]}),
    "wrong shape": lambda a, b, x: (a, {"grad_tensors": torch.ones(2, 2)}),
    "a number": lambda a, b, x: (a.sum(), {"grad_tensors": [1.0]}),
}


@pytest.mark.parametrize("whose", ["torch.autograd", "own"])
@pytest.mark.parametrize("start", STARTS)
@parity
def test_backward_from_many(nn, optim, start, whose):
    first, second = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(4, 3, requires_grad=True)
    tensors, kwargs = STARTS[start](first(x), second(x * 1 if start == "two" else x), x)
    (torch.autograd if whose == "torch.autograd" else module_of(nn)).backward(tensors, **kwargs)
    return x, dict(first.named_parameters()), dict(second.named_parameters())


@parity
def test_backward_of_losses_that_share_a_net(nn, optim):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    h = net(torch.randn(5, 3))
    losses = [nn.functional.mse_loss(h, torch.zeros(5, 2)), h.abs().mean()]
    torch.autograd.backward(losses, retain_graph=True)
    torch.autograd.backward(losses[0])
    return dict(net.named_parameters())


@parity
def test_after_operations_that_torch_recorded(nn, optim):
    """For example, a tensor that a script scales before it calls a Function."""
    square = _functions_to_check(nn)["Square"]
    x = torch.randn(3, requires_grad=True)
    y = square(x * 2)
    y.sum().backward()
    return y, x


@pytest.mark.parametrize("as_view", [True, False])
@parity
def test_between_layers_that_train(nn, optim, as_view):
    """The calls around it are generated and bound; its backward may do something else each time."""
    count = 0

    class Sometimes(base_of(nn)):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.scale = scale
            return x.view_as(x) if as_view else x * scale

        @staticmethod
        def backward(ctx, g):
            nonlocal count
            count += 1
            if count % 4 == 0:
                return None, None
            return (g.t().contiguous().t() if count % 3 == 0 else -ctx.scale * g), None

    first, last = nn.Linear(3, 8), nn.Linear(8, 1)
    sgd = optim.SGD([*first.parameters(), *last.parameters()], lr=0.1)
    seen = []
    for step in range(16):
        h = torch.tanh(first(torch.randn(5 if step % 5 else 7, 3)))
        loss = (torch.tanh(last(Sometimes.apply(h, 0.5))) ** 2).mean()
        sgd.zero_grad()
        loss.backward()
        seen += [loss.detach(), first.weight.grad, last.weight.grad]
        sgd.step()
    return seen, count


@parity
def test_any_name_is_the_users(nn, optim):
    """The package's own names for an operation are not those of a user's class."""

    def mine(*args):
        return 3

    class Named(base_of(nn)):
        result, exact, can_wait, formulas, counted, infer = 3, True, "x", "E = mc2", 7, None
        is_view, is_inplace, public, keeps, operands = 1, 2, 3, 4, 5
        choose = as_called = saves_of = node_name = label_of = staticmethod(mine)

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x * Named.result

        @staticmethod
        def backward(ctx, g):
            return 2 * Named.choose() * ctx.saved_tensors[0] * g

    x = nn.Parameter(torch.arange(3.0))
    for _ in range(5):
        y = Named.apply(x * 1)
        y.sum().backward()
    names = Named.result, Named.exact, Named.can_wait, Named.formulas, Named.counted
    return y, x, y.grad_fn.name(), y.grad_fn.next_functions[0][0].name(), names
