"""`grad` for given inputs, and `backward` with a given gradient, again and again: Langevin steps,
attacks, plans by gradient, a critic's gradient for an actor.

Each test compares PyTorch with three settings of the mirror, as in test_fast.py.
"""

import weakref

import pytest
import torch

import nnmirror
from nnmirror import fast

from .parity import parity


@pytest.fixture(params=["bound at once", "bound when hot", "off"], autouse=True)
def mode(request, monkeypatch):
    monkeypatch.setattr(fast, "enabled", request.param != "off")
    monkeypatch.setattr(fast, "after", 1 if request.param == "bound at once" else 3)
    return request.param


def grad_of(nn):
    return torch.autograd.grad if nn is torch.nn else nnmirror.grad


def net_of(nn):
    net = nn.Module()
    net.a, net.b = nn.Linear(3, 6), nn.Linear(6, 6)
    net.c = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    return net


def energy(net, x):
    h = torch.tanh(net.a(x))
    first, second = net.b(h).chunk(2, 1)
    return net.c(torch.cat([second, first * 2], 1)) + h.pow(2).sum(1, keepdim=True)


@parity
def test_steps_of_an_input(nn, optim):
    """Of torch's own, as a script makes it."""
    net, x = net_of(nn), torch.randn(4, 3)
    for _ in range(12):
        x = x.detach().requires_grad_()
        (g,) = grad_of(nn)(energy(net, x).sum(), x)
        x = x - 0.1 * g
    return x


@parity
def test_steps_of_a_parameter(nn, optim):
    net, x = net_of(nn), nn.Parameter(torch.randn(4, 3))
    for _ in range(12):
        (g,) = grad_of(nn)(energy(net, x).sum(), x)
        with torch.no_grad():
            x -= 0.1 * g
    return x


ENDS = {
    "weight": lambda net, x, h: [net.b.weight],
    "weights": lambda net, x, h: [net.a.weight, net.c[0].bias, net.a.bias],
    "input and weight": lambda net, x, h: [x, net.c[2].weight],
    "hidden": lambda net, x, h: [h],
    "hidden and what it is made of": lambda net, x, h: [h, x, h],
}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("retain_graph", [False, True])
@parity
def test_gradients_for(nn, optim, ends, retain_graph):
    net, found = net_of(nn), []
    for i in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        h = torch.tanh(net.a(x))
        out = net.c(torch.relu(net.b(h)))
        given = ENDS[ends](net, x, h)
        found.append(grad_of(nn)(out, given, torch.full_like(out, 0.5 + i), retain_graph))
        if retain_graph:
            found.append(grad_of(nn)(out.sum(), given))
    return found


@parity
def test_different_ends_in_turn(nn, optim):
    net, found = net_of(nn), []
    for i in range(24):
        x = nn.Parameter(torch.randn(4, 3))
        ends = [[x], [net.a.weight], [net.b.bias], [net.a.weight, x]][i % 4]
        found.append(grad_of(nn)(energy(net, x).mean(), ends))
    return found


def derivatives(nn, net, x, t):
    """u_t, u_x and u_xx, as for Burgers' equation."""
    u = net(torch.cat([x, t], 1))
    ones = torch.ones_like(u)
    u_t = grad_of(nn)(u, t, ones, create_graph=True)[0]
    u_x = grad_of(nn)(u, x, ones, create_graph=True)[0]
    return u, u_t, u_x, grad_of(nn)(u_x, x, ones, create_graph=True)[0]


def of_two(nn):
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))


@parity
def test_derivatives_for_two_inputs_of_one_shape(nn, optim):
    """Which of them is meant differs between the calls, and in which order they come."""
    net, found = of_two(nn), []
    inputs = [torch.randn(5, 1).requires_grad_() for _ in range(2)]
    for i in range(12):
        u, u_t, u_x, u_xx = derivatives(nn, net, *(inputs if i % 3 else inputs[::-1]))
        (u_t + u * u_x - 0.1 * u_xx).pow(2).mean().backward()
        found.append((u_t.detach(), u_x.detach(), u_xx.detach(), net[0].weight.grad.clone()))
        found.append([grad_of(nn)(net(torch.cat(inputs, 1)).sum(), x) for x in inputs])
    return found


@parity
def test_derivatives_of_one_of_several_outputs(nn, optim):
    """The others of `split` have no gradient, as in a Hamiltonian net."""
    net, found = net_of(nn), []
    for i in range(8):
        x = torch.randn(4, 3).requires_grad_()
        pieces = net.b(torch.tanh(net.a(x))).split(2, 1)
        g = grad_of(nn)(pieces[i % 2].sum(), x, create_graph=True)[0]
        (g - 1).pow(2).mean().backward()
        found.append((g.detach(), net.a.weight.grad.clone()))
        found.append(grad_of(nn)(net.b(net.a(x)).split(2, 1)[1].sum(), [x, net.a.weight]))
    return found


@parity
def test_many_derivatives_in_one_graph(nn, optim):
    """Longer than a walk that is bound as a whole otherwise."""
    net = of_two(nn)
    grad, found = grad_of(nn), []
    for _ in range(6):
        z = torch.randn(3, 2).requires_grad_()
        for _ in range(14):
            z = z + 0.1 * grad(net(z.sin()).sum(), z, create_graph=True)[0]
        z.pow(2).mean().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    return found


@parity
def test_what_changes_between_two_calls(nn, optim):
    net, found = net_of(nn), []
    for i in range(20):
        x = nn.Parameter(torch.randn(4, 3))
        net.b.weight.requires_grad_(i % 5 != 4)
        if i == 9:
            handle = x.register_hook(lambda g: g * 2)
        loss = energy(net, x).mean()
        if i in (12, 13):
            loss.register_hook(lambda g: g * 3)
        if i == 15:
            net.a.weight.data = net.a.weight.data * 2
        found.append(grad_of(nn)(loss, x))
        if i == 9:
            handle.remove()
    return found, [p.grad for p in net.parameters()]


@parity
def test_a_saved_tensor_that_was_changed(nn, optim):
    net = net_of(nn)
    for i in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        h = torch.exp(net.a(x))
        loss = h.pow(2).sum()
        if i == 7:
            with torch.no_grad():
                h.mul_(2)
        grad_of(nn)(loss, x)


@parity
def test_a_graph_that_was_freed(nn, optim):
    net = net_of(nn)
    for i in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        loss = energy(net, x).sum()
        grad_of(nn)(loss, x)
        if i == 7:
            grad_of(nn)(loss, x)


@parity
def test_an_input_that_is_not_used(nn, optim):
    net, found = net_of(nn), []
    for i in range(8):
        x, other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.ones(2))
        loss = energy(net, x if i % 3 else x.detach()).sum()
        found.append(grad_of(nn)(loss, [x, other], allow_unused=True))
    return found


@parity
def test_an_input_that_is_used_in_some_steps_only(nn, optim):
    """Of two of one shape, in turn one, the other, both or none: the rest gets None."""
    a, b, w = (nn.Parameter(torch.randn(4, 3)) for _ in range(3))
    found = []
    for step in range(24):
        used = [t for t, is_used in ((a, step % 3 != 1), (b, step % 4 > 1)) if is_used]
        loss = sum((torch.tanh(t * w).sum() for t in used), w.sum())
        for ends in ([a, b], [b, w], [a, b, w]):
            found.append(grad_of(nn)(loss, ends, allow_unused=True, retain_graph=True))
    return found


@parity
def test_one_of_several_results(nn, optim):
    """The others get no gradient."""
    x = nn.Parameter(torch.randn(4, 6))
    found = []
    for _ in range(8):
        std, _ = torch.std_mean(x * 2, dim=1)
        found.append(grad_of(nn)(std.pow(2).sum(), x))
        found.append(grad_of(nn)((x * 2).split(2, 1)[1].exp().sum(), x))
        found.append(grad_of(nn)((x * 2).sort(1)[0][:, 1].sum(), x))
    return found


@parity
def test_the_rest_of_the_graph_is_kept(nn, optim):
    """A gradient for one branch frees that branch only."""
    net, found = net_of(nn), []
    for _ in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        shared = torch.tanh(net.a(x))
        left, right = net.c(torch.relu(net.b(shared))), torch.exp(shared).sum()
        found.append(grad_of(nn)(left.sum() + right, net.c[2].weight))
        found.append(grad_of(nn)(right, x))
    return found


@parity
def test_the_graph_behind_an_end_is_kept(nn, optim):
    net, found = net_of(nn), []
    for _ in range(8):
        x = nn.Parameter(torch.randn(4, 3))
        h = torch.tanh(net.a(x))
        (g,) = grad_of(nn)(net.c(torch.exp(h)).sum(), h)
        found.append(grad_of(nn)(h, x, g))
    return found


@parity
def test_an_end_with_a_hook_or_a_kept_gradient(nn, optim):
    net, found = net_of(nn), []
    for i in range(12):
        x = nn.Parameter(torch.randn(4, 3))
        h = torch.tanh(net.a(x))
        if i in (5, 9):
            h.register_hook(lambda g: found.append(g) or g * 2)
        if i in (6, 9):
            h.retain_grad()
        found.append(grad_of(nn)(net.c(torch.exp(h)).sum(), h))
        found.append(h.grad if i in (6, 9) else None)
    return found


@parity
def test_through_torchs_own_graph(nn, optim):
    """The input of the net is computed by torch, from the tensor that is asked for."""
    net, found = net_of(nn), []
    for i in range(8):
        x = torch.randn(4, 3, requires_grad=True)
        moved = x * 2 if i % 4 else x
        found += grad_of(nn)(energy(net, moved).sum() + moved.sum(), x)
    return found


GRADIENTS = {
    "a new one": lambda y, i: torch.randn(y.shape),
    "a column, expanded": lambda y, i: torch.randn(y.shape[0], 1).expand(y.shape),
    "transposed": lambda y, i: torch.randn(y.shape[::-1]).t(),
    "of float64": lambda y, i: torch.randn(y.shape, dtype=torch.float64),
    "the result itself": lambda y, i: y,
    "with a history": lambda y, i: torch.randn(y.shape).requires_grad_() * 2,
    "of any layout": lambda y, i: torch.randn(y.shape[::-1]).t() if i % 3 else torch.randn(y.shape),
    "nothing": lambda y, i: torch.zeros(y.shape),
    "not a number": lambda y, i: torch.full(y.shape, float("nan")),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@parity
def test_backward_with_a_gradient(nn, optim, gradient):
    """As an actor gets it from its critic."""
    net, of_torch = net_of(nn), torch.randn(4, 3).requires_grad_()
    optimizer, found = optim.SGD(net.parameters(), lr=0.1), []
    for i in range(12):
        x = of_torch if i % 2 else torch.randn(4, 3)
        y = net.b(torch.relu(net.a(x)))
        optimizer.zero_grad()
        y.backward(GRADIENTS[gradient](y, i))
        found += [p.grad for p in (net.a.weight, net.a.bias, net.b.weight, net.b.bias)]
        optimizer.step()
    return found, of_torch.grad, list(net.parameters())


CHANGES_BEFORE_BACKWARD = {
    "a hook": lambda y, h: y.register_hook(lambda g: g * 2),
    "a hook between": lambda y, h: h.register_hook(lambda g: g * 2),
    "retained": lambda y, h: (y.retain_grad(), h.retain_grad()),
    "the result is changed": lambda y, h: y.mul_(2),
    "what was saved is changed": lambda y, h: h.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES_BEFORE_BACKWARD)
@parity
def test_changes_before_backward_with_a_gradient(nn, optim, change):
    net, found = net_of(nn), []
    for i in range(12):
        h = torch.tanh(net.a(torch.randn(4, 3)))
        y = net.b(h)
        if i % 4 > 1:
            CHANGES_BEFORE_BACKWARD[change](y, h)
        y.backward(torch.full(y.shape, 1.0 + i), retain_graph=i % 3 == 0)
        if i % 3 == 0:
            y.backward(torch.ones(y.shape))  # once more, added to the first
        else:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                y.backward(torch.ones(y.shape))
        found += [net.a.weight.grad.clone(), h.grad if h.retains_grad else None]
    return found


@parity
def test_gradients_of_a_gradient_are_not_changed_by_the_next(nn, optim):
    """A leaf may get the given gradient itself: it is copied, not shared."""
    w, found = nn.Parameter(torch.randn(4, 6)), []
    for _ in range(12):
        w.grad = None
        given = torch.randn(4, 6)
        (w + 1).backward(given)
        found.append(w.grad)
        given.zero_()
    return found


def test_a_gradient_of_another_shape_raises_each_time(mode):
    net = net_of(nnmirror.nn)
    for _ in range(6):
        y = net.b(net.a(torch.randn(4, 3)))
        y.backward(torch.ones(4, 6), retain_graph=True)
        for wrong in (torch.ones(6), torch.ones(4, 6, dtype=torch.complex64), "1"):
            with pytest.raises((RuntimeError, TypeError)):
                y.backward(wrong)


def test_a_walk_with_a_gradient_is_bound_and_keeps_none_alive(mode):
    net = net_of(nnmirror.nn)
    for _ in range(6):
        y, given = net.b(net.a(torch.randn(4, 3))), torch.randn(4, 6)
        kept, sign = weakref.ref(given), y._node.signature
        y.backward(given)
        del y, given
        assert kept() is None
    bound = [found for found in sign.walks.from_given.values() if not isinstance(found, int)]
    assert [len(found.walks) for found in bound] == [1] * (mode != "off")
    assert all(found.walks[0].trusted for found in bound)


@pytest.mark.parametrize("from_loss", [False, True])
@pytest.mark.parametrize("before", [False, True])
@parity
def test_a_hook_on_what_accumulates(nn, optim, from_loss, before):
    """On a weight's AccumulateGrad, as data parallelism does; for three steps, then removed."""
    net, log, found = net_of(nn), [], []
    for i in range(16):
        if i % 8 == 5:
            weight = net.a.weight
            adding = weight.expand_as(weight).grad_fn.next_functions[0][0]
            register = adding.register_prehook if before else adding.register_hook
            handle = register(lambda *grads: log.append(len(found)))
        y = net.b(torch.relu(net.a(torch.randn(4, 3))))
        if from_loss:
            y.sum().backward()
        else:
            y.backward(torch.ones(4, 6))
        found.append(net.a.weight.grad.clone())
        if i % 8 == 7:
            handle.remove()
    return found, log


@pytest.mark.parametrize("create_graph", [False, True])
@parity
def test_two_results_that_become_one(nn, optim, create_graph):
    """The gradient of the one, and then of both in one."""
    a, b, w = (nn.Parameter(torch.randn(3)) for _ in range(3))
    found = []
    for step in range(24):
        first = a * w
        second = a * w if step < 12 else first
        y = ((b * first) * second.tanh()).sum()
        for end in (first, second):
            g = grad_of(nn)(y, [b, end], create_graph=create_graph, retain_graph=True)
            found.append([t.detach() for t in g])
    return found
