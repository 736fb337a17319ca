"""Hooks: their order, what they are given, and what their return value replaces."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import nnmirror

from .parity import parity


def module_hooks(nn):
    """The module in which PyTorch keeps the hooks for all modules."""
    return nn.modules.module


class Maker:
    @staticmethod
    def net(nn):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

            def forward(self, x, scale=1.0, fail=False):
                if fail:
                    raise ValueError("forward failed")
                return self.second(torch.tanh(self.first(x))) * scale

        return Net()


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        return tuple(plain(v) for v in value)
    return value


def result_of(net, *args, **kwargs):
    x = torch.randn(4, 3, requires_grad=True)
    y = net(x, *args, **kwargs)
    y.sum().backward()
    return y, x, dict(net.named_parameters())


@parity
def test_forward_hooks(nn, optim):
    net, log = Maker.net(nn), []
    net.register_forward_pre_hook(lambda m, args: log.append(("pre 1", plain(args))))
    net.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    net.register_forward_pre_hook(lambda m, args: log.append(("pre 0", plain(args))), prepend=True)
    net.register_forward_pre_hook(lambda m, args: args[0] + 1)
    net.register_forward_hook(lambda m, args, out: log.append(("hook", plain(args), plain(out))))
    net.register_forward_hook(lambda m, args, out: out * 3)
    net.first.register_forward_hook(lambda m, args, out: torch.relu(out))
    net.register_forward_hook(lambda m, args, out: log.append(("first", plain(out))), prepend=True)
    return result_of(net), log


@parity
def test_forward_hooks_with_kwargs(nn, optim):
    net, log = Maker.net(nn), []

    def pre(m, args, kwargs):
        log.append((plain(args), plain(kwargs)))
        return (args[0] * 2,), {"scale": kwargs["scale"] + 1}

    def post(m, args, kwargs, out):
        log.append((plain(kwargs), plain(out)))
        return out + kwargs["scale"]

    net.register_forward_pre_hook(pre, with_kwargs=True)
    net.register_forward_hook(post, with_kwargs=True)
    net.register_forward_pre_hook(lambda m, args: None)
    return result_of(net, scale=2.0), log


@parity
def test_wrong_return_of_a_pre_hook_with_kwargs(nn, optim):
    net = nn.Linear(3, 3)
    net.register_forward_pre_hook(lambda m, args, kwargs: 5, with_kwargs=True)
    return net(torch.ones(3))


@pytest.mark.parametrize("prepend", [True, False])
@parity
def test_always_called(nn, optim, prepend):
    net, log = Maker.net(nn), []

    def broken(m, args, out):
        log.append("broken")
        raise RuntimeError("broken hook")

    net.register_forward_hook(lambda m, args, out: log.append(("always", out)), always_call=True)
    net.register_forward_hook(lambda m, args, out: log.append("never"))
    net.register_forward_hook(broken, always_call=True, prepend=prepend)
    net.register_forward_hook(
        lambda m, args, kwargs, out: log.append(("kwargs", kwargs)),
        always_call=True,
        with_kwargs=True,
    )
    for fail in (True, False):
        try:
            net(torch.ones(4, 3), fail=fail)
        except Exception as e:
            log.append((type(e).__name__, str(e)))
    return [plain(entry) for entry in log]


@parity
def test_handles(nn, optim):
    net, log = nn.Linear(3, 3), []
    handles = [
        net.register_forward_hook(lambda *a: log.append("f"), with_kwargs=True, always_call=True),
        net.register_forward_pre_hook(lambda *a: log.append("p"), with_kwargs=True),
        net.register_full_backward_hook(lambda *a: log.append("b")),
        net.register_full_backward_pre_hook(lambda *a: log.append("bp")),
    ]
    net(torch.ones(1, 3)).sum().backward()
    with handles[0]:
        net(torch.ones(1, 3))
    for handle in handles:
        handle.remove()
        handle.remove()
    net(torch.ones(1, 3)).sum().backward()
    registries = [k for k in sorted(vars(net)) if k.endswith(("hooks", "kwargs", "called"))]
    return log, [(k, len(getattr(net, k))) for k in registries]


@parity
def test_full_backward_hooks(nn, optim):
    net, log = Maker.net(nn), []
    for name, m in net.named_modules():
        m.register_full_backward_hook(
            lambda m, gi, go, name=name: log.append(("full", name, plain(gi), plain(go)))
        )
        m.register_full_backward_pre_hook(
            lambda m, go, name=name: log.append(("pre", name, plain(go)))
        )
    net.first.register_full_backward_hook(
        lambda m, gi, go: log.append(("before", plain(gi))), prepend=True
    )
    net.first.register_full_backward_pre_hook(
        lambda m, go: log.append(("before", plain(go))), prepend=True
    )
    return result_of(net), log


@parity
def test_full_backward_hooks_replace(nn, optim):
    net, log = Maker.net(nn), []
    net.second.register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))
    net.second.register_full_backward_pre_hook(lambda m, go: (go[0] + 1,))
    net.second.register_full_backward_hook(lambda m, gi, go: (gi[0] * 10,))
    net.second.register_full_backward_hook(lambda m, gi, go: log.append((plain(gi), plain(go))))
    net.first.register_full_backward_hook(lambda m, gi, go: gi[0] * 0.5)
    return result_of(net), log


@parity
def test_full_backward_hook_without_grad_for_the_input(nn, optim):
    net, log = nn.Linear(3, 2), []
    net.register_full_backward_hook(lambda m, gi, go: log.append((gi, plain(go))))
    net(torch.ones(4, 3)).sum().backward()
    with torch.no_grad():
        net(torch.ones(4, 3))
    net.requires_grad_(False)
    net(torch.ones(4, 3))
    return log, net.weight.grad


@parity
def test_full_backward_hooks_with_many_inputs_and_outputs(nn, optim):
    class Many(nn.Module):
        def forward(self, a, number, b, c):
            return nn.functional.tanh(a) * b, nn.functional.relu(c), a.detach()

    net, log = Many(), []
    net.register_full_backward_hook(lambda m, gi, go: log.append((plain(gi), plain(go))))
    make = nn.LeakyReLU(1.0)
    a, b, c = (make(torch.randn(3, requires_grad=True)) for _ in range(3))
    for used in (lambda o: o[0].sum(), lambda o: (o[0] * o[1]).sum(), lambda o: o[1].sum()):
        out = net(a.detach().requires_grad_(), 5, b, c)
        used(out).backward(retain_graph=True)
    return log, [type(o).__name__ == "Tensor" for o in out], len(out)


HOOK_ERRORS = {
    "too many grad_inputs": lambda m: m.register_full_backward_hook(lambda m, gi, go: (gi[0], gi[0])),
    "too many grad_outputs": lambda m: m.register_full_backward_pre_hook(lambda m, go: (go[0], go[0])),
    "both kinds": lambda m: (m.register_backward_hook(print), m.register_full_backward_hook(print)),
    "both kinds reversed": lambda m: (m.register_full_backward_hook(print), m.register_backward_hook(print)),
    "raises": lambda m: m.register_full_backward_hook(lambda m, gi, go: 1 / 0),
    "pre raises": lambda m: m.register_forward_pre_hook(lambda m, args: 1 / 0),
    "in place on the input": lambda m: m.register_forward_pre_hook(lambda m, args: args[0].mul_(2)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOOK_ERRORS)
@parity
def test_hook_errors(nn, optim, name):
    m = nn.Linear(3, 3)
    HOOK_ERRORS[name](m)
    m(torch.ones(1, 3, requires_grad=True)).sum().backward()


@parity
def test_output_that_no_hook_can_stand_at(nn, optim):
    class AsDict(nn.Module):
        def forward(self, x):
            return {"y": nn.functional.tanh(x)}

    m, log = AsDict(), []
    m.register_full_backward_hook(lambda *a: log.append(1))
    x = torch.ones(3, requires_grad=True)
    m(x)["y"].sum().backward()
    return log, x.grad


@parity
def test_legacy_backward_hook(nn, optim):
    """The hook is at the last recorded call: LeakyReLU is one call on both backends."""
    m, log = nn.LeakyReLU(0.5), []
    m.register_backward_hook(lambda m, gi, go: log.append((type(m).__name__, plain(go))))
    m.register_backward_hook(lambda m, gi, go: (gi[0] * 2, *gi[1:]))
    x = torch.randn(3, requires_grad=True)
    m(nn.functional.tanh(x)).sum().backward()
    return log, x.grad


RETURNS = {
    "too few": lambda g: g[:-1],
    "too many": lambda g: g + g,
    "another shape": lambda g: (g[0][:1],),
    "no tensor": lambda g: (3,),
    "no tuple": lambda g: g[0] * 2,
    "a list": lambda g: [g[0] * 2],
    "another dtype": lambda g: (g[0].double(),),
    "nothing": lambda g: (None,),
    "the double": lambda g: (g[0] * 2,),
}


@pytest.mark.parametrize("kind", ["legacy", "node", "node before"])
@pytest.mark.parametrize("name", RETURNS)
@parity
def test_what_a_hook_at_a_node_may_return(nn, optim, name, kind):
    m, x = nn.Tanh(), torch.randn(3, requires_grad=True)
    if kind == "legacy":
        m.register_backward_hook(lambda m, gi, go: RETURNS[name](gi))
    y = m(nn.functional.relu(x))
    if kind == "node":
        y.grad_fn.register_hook(lambda gi, go: RETURNS[name](gi))
    if kind == "node before":
        y.grad_fn.register_prehook(RETURNS[name])
    y.sum().backward()
    return x


@parity
def test_legacy_backward_hook_warns(nn, optim):
    class Two(nn.Module):
        def forward(self, x):
            return nn.functional.tanh(x), nn.functional.relu(x)

    class Wrapped(nn.Module):
        def forward(self, x):
            return [nn.functional.tanh(x)]

    class Deep(nn.Module):
        def forward(self, x):
            return nn.functional.tanh(nn.functional.relu(x))

    x = torch.ones(3, requires_grad=True)
    for m in (Two(), Wrapped(), Deep()):
        m.register_backward_hook(lambda *a: None)
        m(nn.functional.leaky_relu(x))


@parity
def test_hooks_for_all_modules(nn, optim):
    where, net, log = module_hooks(nn), Maker.net(nn), []
    handles = [
        where.register_module_forward_pre_hook(lambda m, a: log.append(("pre", type(m).__name__))),
        where.register_module_forward_hook(lambda m, a, o: log.append(("post", plain(o)))),
        where.register_module_forward_hook(
            lambda m, a, k, o: log.append(("kwargs", sorted(k))), with_kwargs=True, always_call=True
        ),
        where.register_module_full_backward_pre_hook(lambda m, go: log.append(("bp", plain(go)))),
        where.register_module_full_backward_hook(lambda m, gi, go: log.append(("b", plain(gi)))),
        net.first.register_forward_hook(lambda m, a, o: log.append("own")),
    ]
    try:
        out = result_of(net, scale=2.0)
        with pytest.raises(RuntimeError, match="Cannot use both"):
            where.register_module_backward_hook(print)
    finally:
        for handle in handles:
            handle.remove()
    return out, log, result_of(net)


@parity
def test_registration_hooks(nn, optim):
    where, log = module_hooks(nn), []
    handles = [
        where.register_module_parameter_registration_hook(
            lambda m, name, p: log.append(("parameter", name))
        ),
        where.register_module_module_registration_hook(
            lambda m, name, sub: log.append(("module", name))
        ),
        where.register_module_buffer_registration_hook(
            lambda m, name, b: torch.zeros(3) if name == "b" else None
        ),
    ]
    try:
        net = nn.Sequential(nn.Linear(1, 1))
        net.register_buffer("b", torch.ones(2))
        net.add_module("x", nn.Tanh())
        net.x = nn.ReLU()
    finally:
        for handle in handles:
            handle.remove()
    return log, net.b


@parity
def test_hooks_are_copied_and_pickled(nn, optim):
    m = nn.Linear(2, 2)
    m.register_forward_hook(triple)
    return copy.deepcopy(m)(torch.ones(1, 2)), pickle.loads(pickle.dumps(m))(torch.ones(1, 2))


def triple(module, args, out):
    return out * 3


@parity
def test_hooks_in_a_sequential(nn, optim):
    net, log = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)), []
    net[1].register_forward_hook(lambda m, a, o: log.append(plain(o)))
    net[2].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    net[0].register_full_backward_hook(lambda m, gi, go: log.append(plain(go)))
    net.register_full_backward_hook(lambda m, gi, go: log.append(plain(gi)))
    return result_of(net), log


@parity
def test_hook_that_keeps_activations(nn, optim):
    net, kept = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), {}
    for name, m in net.named_children():
        m.register_forward_hook(lambda m, a, o, name=name: kept.update({name: o}))
    y = net(torch.randn(2, 3))
    for activation in kept.values():
        activation.retain_grad()
    y.sum().backward()
    return [(k, v, v.grad) for k, v in kept.items()]


def test_hooks_by_hand():
    """Module.backward starts at the output that the forward hooks returned."""
    nn = nnmirror
    net = nn.Linear(3, 2)
    net.register_forward_hook(lambda m, a, o: o * 2)
    x = torch.randn(4, 3, requires_grad=True)
    net(x)
    dx = net.backward(torch.ones(4, 2))
    assert torch.equal(dx, 2 * torch.ones(4, 2) @ net.weight.detach())
    seen = []
    other = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    other[0].register_full_backward_hook(lambda m, gi, go: seen.append(go))
    y = other(x)
    other.backward(torch.ones(4, 2))
    assert len(seen) == 1
    assert y.shape == (4, 2)
    other[0](x)
    with pytest.raises(RuntimeError, match="keep its output"):
        other[0].backward(torch.ones(4, 2))


def test_a_module_with_hooks_is_freed_without_the_collector():
    gc.collect()
    gc.disable()
    try:
        net = nnmirror.Sequential(nnmirror.Linear(2, 2), nnmirror.Tanh())
        net[0].register_full_backward_hook(lambda m, gi, go: None)
        net(torch.ones(1, 2, requires_grad=True)).sum().backward()
        alive = weakref.ref(net[0])
        del net
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@parity
def test_legacy_hook_of_a_linear(nn, optim, tracked, bias, frozen):
    """PyTorch's node has the transposed weight as its input; the hook gets the gradient of that."""

    def hook(module, grads, _):
        seen.extend(grads)
        return tuple(None if g is None else g * 2 for g in grads)

    seen, layer = [], nn.Linear(3, 2, bias=bias)
    if frozen == "weight" or (frozen and bias):
        getattr(layer, frozen).requires_grad_(False)
    layer.register_backward_hook(hook)
    x = nn.Parameter(torch.randn(4, 3)) if tracked else torch.randn(4, 3)
    loss = layer(x).tanh().sum()
    if loss.requires_grad:
        loss.backward()
    return [None if g is None else (g, g.stride()) for g in seen], dict(layer.named_parameters()), x


@parity
def test_hooks_where_no_gradient_comes(nn, optim):
    """Hooks get None: a convolution's gradient for its weight does not depend on the weight."""
    conv, pre, log = nn.Conv1d(1, 1, 2), nn.Linear(4, 4), []
    w = conv.weight
    scaled = w * 2
    scaled.register_hook(lambda g: log.append(("between", g is None)))
    scaled.grad_fn.register_prehook(lambda gs: log.append(("before", gs[0] is None)))
    w.register_hook(lambda g: log.append(("leaf", g is None)))
    w.register_post_accumulate_grad_hook(lambda p: log.append(("after", p.grad is None)))
    y = torch.nn.functional.conv1d(pre(torch.randn(1, 1, 4)), scaled)
    (slope,) = torch.autograd.grad(y.sum(), scaled, create_graph=True)
    found = torch.autograd.grad(slope.sum(), [w, pre.weight], retain_graph=True, allow_unused=True)
    slope.sum().backward()
    w.register_hook(lambda g: torch.ones_like(w))
    with_ones = torch.autograd.grad(conv(y.detach()).sum(), w, create_graph=True)
    return log, found, w.grad, pre.weight.grad, with_ones


@parity
def test_a_view_changed_in_place_gets_the_gradient_of_what_was_saved(nn, optim):
    """`tanh_` saves the view after the change; hooks of the view get gradients of gradients."""
    w, log = nn.Linear(3, 3).weight, []
    a = w * 1
    view = torch.tanh_(a.t())
    view.register_hook(lambda g: log.append(g.detach()))
    view.retain_grad()
    (slope,) = torch.autograd.grad(a.square().sum(), w, create_graph=True)
    slope.square().sum().backward()
    return log, view.grad, w.grad


def graph(node):
    """The names of a node and of all nodes behind it."""
    return node.name(), [n if n is None else graph(n) for n, _ in node.next_functions]


GRAPHS = {
    "Sequential": lambda nn, x: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))(x),
    "Linear": lambda nn, x: nn.Linear(3, 2)(nn.Linear(3, 3, bias=False)(x)),
    "weight of an operation": lambda nn, x: torch.nn.functional.linear(x, x * 2),
    "numbers": lambda nn, x: ((x * 2 + 1) / 3 - 4) % 5,
    "numbers on the left": lambda nn, x: 1 - 2 / (3 + 4 * x),
    "rounded": lambda nn, x: torch.div(x, 2, rounding_mode="floor"),
    "in place": lambda nn, x: (x * 1).mul_(2).add_(1),
    "where": lambda nn, x: torch.where(x > 0, x, 0.0),
    "gather": lambda nn, x: x.gather(1, torch.zeros(4, 1, dtype=torch.long)),
    "masked_fill": lambda nn, x: x.masked_fill(x > 0, 1.0),
    "scatter": lambda nn, x: x.scatter(1, torch.zeros(4, 1, dtype=torch.long), x[:, :1]),
    "take": lambda nn, x: x.take(torch.tensor([1])),
    "put": lambda nn, x: x.put(torch.tensor([1]), torch.ones(1)),
    "index_reduce": lambda nn, x: x.index_reduce(0, torch.tensor([0]), x[:1], "mean"),
    "index_add": lambda nn, x: x.index_add(0, torch.tensor([0]), x[:1]),
    "Embedding": lambda nn, x: nn.Embedding(4, 3)(torch.tensor([1])) * x,
    "NLLLoss": lambda nn, x: nn.NLLLoss(torch.ones(3))(x, torch.tensor([0, 1, 2, 0])),
    "CrossEntropyLoss": lambda nn, x: nn.CrossEntropyLoss()(x, torch.tensor([0, 1, 2, 0])),
    "SoftMarginLoss": lambda nn, x: nn.SoftMarginLoss()(x, torch.ones(4, 3)),
    "BCEWithLogitsLoss": lambda nn, x: nn.BCEWithLogitsLoss()(x, torch.ones(4, 3)),
    "MSELoss": lambda nn, x: nn.MSELoss()(x, torch.ones(4, 3)),
    "KLDivLoss": lambda nn, x: nn.KLDivLoss(reduction="batchmean")(x, torch.ones(4, 3)),
    "GaussianNLLLoss": lambda nn, x: nn.GaussianNLLLoss()(x, torch.ones(4, 3), torch.ones(4, 3)),
}


@pytest.mark.parametrize("name", GRAPHS)
@parity
def test_reading_next_functions(nn, optim, name):
    """A hook at the last node gets as many gradients as in PyTorch; reading changes none."""
    seen, x = [], nn.Parameter(torch.randn(4, 3))
    out = GRAPHS[name](nn, x)
    names = graph(out.grad_fn)
    out.grad_fn.register_hook(lambda grads, _: seen.append(len(grads)))
    out.sum().backward()
    return names, seen, x


@parity
def test_reading_next_functions_between_two_backwards(nn, optim):
    """Two backwards over one graph, which is read in between; a weight is used twice."""
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    out = layer(layer(x).relu())
    loss = out.pow(2).mean()
    loss.backward(retain_graph=True)
    names = graph(loss.grad_fn)
    loss.backward()
    return names, dict(layer.named_parameters())


@parity
def test_hooks_on_several_tensors(nn, optim):
    """`register_multi_grad_hook` waits for those tensors that this backward reaches."""
    net, apart = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), nn.Linear(2, 2)
    weight, log = net[0].weight, []
    graph = torch.autograd.graph
    y = net(torch.randn(4, 2))
    z = y.tanh()
    every = [*net.parameters(), *apart.parameters()]
    handles = [
        graph.register_multi_grad_hook(every, lambda gs: log.append(["every", *gs])),
        graph.register_multi_grad_hook((y, z), lambda gs: log.append(["y, z", *gs])),
        graph.register_multi_grad_hook(
            (y, z, weight), lambda g: log.append(["any", g]), mode="any"
        ),
    ]
    z.sum().backward(retain_graph=True)
    z.sum().backward(inputs=[weight, net[2].bias], retain_graph=True)
    y.sum().backward(retain_graph=True)
    log.append(torch.autograd.grad(z.sum(), y, retain_graph=True))
    for handle in handles:
        handle.remove()
    z.sum().backward(retain_graph=True)
    handles = [graph.register_multi_grad_hook([weight], lambda gs: log.append(["one", *gs]))]
    try:
        torch.autograd.grad(z.sum(), weight, retain_graph=True)
    except RuntimeError as e:  # autograd.grad does not support it
        log.append(str(e))
    return log, parameters_of(net)


@parity
def test_hooks_where_a_gradient_is_accumulated(nn, optim):
    """On the AccumulateGrad node of a leaf, as used to step each parameter during backward."""
    layer, log = nn.Linear(3, 2), []
    weight, x = layer.weight, torch.randn(4, 3)
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]

    def before(grads):
        log.append(["before", *grads])
        return tuple(g * 2 for g in grads)

    handles = [
        node.register_hook(
            lambda inputs, outputs: log.append(
                ["after", inputs, *(g.clone() for g in (*outputs, weight.grad))]
            )
        ),
        node.register_prehook(before),
    ]
    weight.register_hook(lambda g: log.append(["tensor", g]))
    weight.register_post_accumulate_grad_hook(lambda p: log.append(["post", p.grad.clone()]))
    layer(x).sum().backward()
    layer(x).sum().backward(inputs=[weight])
    log.append(torch.autograd.grad(layer(x).sum(), weight))
    handles[0].remove()
    layer(x).sum().backward()
    handles[1].remove()
    node.register_hook(lambda *grads: (grads[1][0],))
    try:
        layer(x).sum().backward()
    except RuntimeError as e:
        log.append(str(e))
    return log, parameters_of(layer)


@parity
def test_gradient_edges(nn, optim):
    """A GradientEdge in place of a tensor, as the start or the end of a backward."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    weight, log = net[0].weight, []
    y = net(torch.randn(4, 2))
    z, ones = y.tanh(), torch.ones(4, 1)
    edge = torch.autograd.graph.get_gradient_edge
    backward = nnmirror.backward if nn is nnmirror else torch.autograd.backward
    for call in (
        lambda: torch.autograd.grad(z.sum(), edge(y), retain_graph=True),
        lambda: torch.autograd.grad(z.sum(), (edge(y), weight), retain_graph=True),
        lambda: torch.autograd.grad(z.sum(), edge(weight), retain_graph=True),
        lambda: torch.autograd.grad(edge(y), weight, ones, retain_graph=True),
        lambda: torch.autograd.grad(edge(y), weight, retain_graph=True),
        lambda: torch.autograd.grad(edge(y), weight, torch.ones(3), retain_graph=True),
        lambda: backward(edge(z), ones, retain_graph=True),
        lambda: backward((edge(z), edge(y)), (ones, ones * 2), retain_graph=True),
        lambda: z.sum().backward(inputs=edge(weight), retain_graph=True),
    ):
        try:
            log.append(call())
        except RuntimeError as e:
            log.append(str(e))
        log.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
    return log


def test_what_pytorchs_engine_does_not_ask_about_is_named():
    loss = nnmirror.Linear(2, 1)(torch.ones(1, 2)).tanh()
    edge = torch.autograd.graph.get_gradient_edge(loss)
    with pytest.raises(NotImplementedError, match=r"GradientEdge; call nnmirror\.backward"):
        torch.autograd.backward(edge)
    nnmirror.backward(edge, retain_graph=True)
    assert not hasattr(loss.grad_fn, "_saved_result")
    with pytest.raises(AttributeError, match=r"_saved_result'; what .* saved is in saved_tensors"):
        loss.grad_fn._saved_result  # noqa: B018
    assert torch.equal(loss.grad_fn.saved_tensors[0], loss.detach())


def parameters_of(module):
    return dict(module.named_parameters())


@parity
def test_a_hook_prints_a_tensor_further_back(nn, optim):
    """Printing a grad_fn gives its node PyTorch's form, in the middle of the walk."""
    torch.manual_seed(0)
    fc, out = nn.Linear(2, 3), nn.Linear(3, 1)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    shown = []
    for ask in (lambda loss: loss.backward(), lambda loss: torch.autograd.grad(loss, fc.weight)):
        for step in range(6):
            h = net(fc(torch.ones(4, 2)))
            t = h.tanh()
            if step > 3:
                t.register_hook(lambda g, h=h: shown.append(repr(h).partition("grad_fn")[2]))
            asked = ask(out(t).sum())
    return shown, asked, [p.grad for p in (*fc.parameters(), *net.parameters())]


@parity
def test_a_requested_result_with_a_hook(nn, optim):
    """PyTorch gives its gradient before the hook, if something behind it is requested as well."""
    w = nn.Parameter(torch.ones(3))
    found = []
    for _ in range(5):
        y = w * 2
        y.register_hook(lambda g: g * 2)
        loss = (y * 3).sum()
        for asked in ([y], [y, w], [w, y], [w], [loss, y]):
            found += torch.autograd.grad(loss, asked, retain_graph=True)
    return found


def _called_one_by_one(w):
    """As lessons do: the gradient goes from node to node by hand."""
    t = w * torch.tensor([1.0, 2.0])
    y = t.exp().sum()
    by_sum = y.grad_fn(torch.tensor(1.0))
    by_exp = y.grad_fn.next_functions[0][0](by_sum)
    by_mul = t.grad_fn(by_exp)
    w.grad = None
    leaf = t.grad_fn.next_functions[0][0]
    return by_sum, by_exp, by_mul, [leaf(by_mul[0]), leaf(by_mul[0])], w.grad


def _called_with_grad_mode_off(w):
    with torch.no_grad():
        return _called_one_by_one(w)


def _freed(w):
    y = w.exp()
    y.sum().backward()
    return y.grad_fn(torch.ones(2))


CALLED = {
    "one by one": _called_one_by_one,
    "grad mode off": _called_with_grad_mode_off,
    "several outputs": lambda w: w.split(1)[0].grad_fn(torch.ones(1), None),
    "an output without a gradient": lambda w: w.max(0).values.grad_fn(torch.tensor(2.0)),
    "no gradient": lambda w: (w * w).grad_fn(None),
    "second derivative": lambda w: torch.autograd.grad((w**3).grad_fn(torch.ones(2)).sum(), w),
    "too many": lambda w: w.exp().grad_fn(torch.ones(2), torch.ones(2)),
    "a number": lambda w: w.exp().grad_fn(1.0),
    "freed": _freed,
}


@pytest.mark.parametrize("name", CALLED)
@parity
def test_a_node_is_called(nn, optim, name):
    return CALLED[name](nn.Parameter(torch.tensor([0.5, -1.0])))


@parity
def test_the_class_of_a_node_has_its_name(nn, optim):
    """torchviz and the like print it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    names, todo = [], [nn.functional.mse_loss(model(torch.randn(2, 3)), torch.randn(2, 1)).grad_fn]
    while todo:
        node = todo.pop(0)
        names.append((type(node).__name__, node.name(), callable(node)))
        todo += [behind for behind, _ in node.next_functions if behind is not None]
    return names


def _accumulated(w, *grads):
    node = (w * 2).grad_fn.next_functions[0][0]
    calls = []
    w.register_post_accumulate_grad_hook(lambda leaf: calls.append(leaf.grad.clone()))
    return node(*grads), node(*grads), calls, w.grad


def _of_frozen(w):
    node = (w * 2).grad_fn.next_functions[0][0]
    w.requires_grad_(False)
    return node(torch.ones(2)), w.grad


ACCUMULATED = {
    "twice": lambda w: _accumulated(w, torch.ones(2)),
    "no gradient": lambda w: _accumulated(w, None),
    "too many": lambda w: _accumulated(w, torch.ones(2), None),
    "a number": lambda w: _accumulated(w, 1),
    "a frozen leaf": _of_frozen,
    "a copy of a node": lambda w: copy.deepcopy((w * 2).grad_fn),
    "a pickled node": lambda w: pickle.dumps((w * 2).grad_fn),
}


@pytest.mark.parametrize("name", ACCUMULATED)
@parity
def test_the_accumulation_of_a_leaf_is_called(nn, optim, name):
    return ACCUMULATED[name](nn.Parameter(torch.tensor([0.5, -1.0])))
