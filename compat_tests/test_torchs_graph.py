"""Torch's own graph in front of a mirrored net: `net(torch.cat([x, t], 1))`.

Physics-informed nets join their coordinates so, and ask for the gradient with respect to each.
What torch recorded there, its engine goes back over, to any order.
"""

import pytest
import torch

import nnmirror

from .parity import parity

# Torch's engine and the mirror's walk each add up what reaches them, and then both: sums of three
# terms and more are added in another order than by PyTorch alone.
UNITS = 8


def net_of(nn, dtype):
    return nn.Sequential(
        nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
    ).to(dtype)


def grad(outputs, inputs, **kwargs):
    return torch.autograd.grad(outputs.sum(), inputs, create_graph=True, **kwargs)


def joined(nn, dtype):
    net = net_of(nn, dtype)
    x, t = (torch.rand(5, 1, dtype=dtype, requires_grad=True) for _ in range(2))
    u = net(torch.cat([x, t], 1))
    ux, ut = grad(u, [x, t])
    (uxx,), (uxt,) = grad(ux, x), grad(ux, t)
    loss = ((ut - uxx + uxt * u) ** 2).mean()
    loss.backward()
    return [u, ux, ut, uxx, uxt, loss, x.grad, t.grad, *(p.grad for p in net.parameters())]


def columns_of_a_leaf(nn, dtype):
    net = net_of(nn, dtype)
    X = torch.rand(5, 2, dtype=dtype, requires_grad=True)
    x, t = X[:, :1], X[:, 1:]
    u = net(torch.cat([x, t], 1))
    ux, ut = grad(u, [x, t])
    (uxx,) = grad(ux, x)
    (of_all,) = grad(uxx.sum() + ux.pow(2).sum(), X)
    loss = ((ut - uxx) ** 2).mean() + of_all.pow(2).mean()
    loss.backward()
    return [u, ux, ut, uxx, of_all, loss, X.grad, *(p.grad for p in net.parameters())]


def learned_features(nn, dtype):
    net = net_of(nn, dtype)
    b = torch.rand(2, dtype=dtype, requires_grad=True)
    x = torch.rand(5, 1, dtype=dtype, requires_grad=True)
    u = net(torch.cat([torch.sin(b[0] * x), torch.cos(b[1] * x * x)], 1)) * x
    (ux,) = grad(u, x)
    (uxx,) = grad(ux, x)
    (uxxx,) = grad(uxx, x)
    loss = ((uxxx - uxx * u) ** 2).mean()
    loss.backward()
    return [u, ux, uxx, uxxx, loss, x.grad, b.grad, *(p.grad for p in net.parameters())]


def encoder_of_torchs(nn, dtype):
    encoder, net = torch.nn.Linear(3, 2).to(dtype), net_of(nn, dtype)
    x = torch.rand(5, 3, dtype=dtype, requires_grad=True)
    (ux,) = grad(net(torch.tanh(encoder(x))), x)
    ux.norm(dim=1).sub(1).pow(2).mean().backward()
    return [ux, *(p.grad for p in [*net.parameters(), *encoder.parameters()])]


def one_behind_the_other(nn, dtype):
    net = net_of(nn, dtype)
    x = torch.rand(5, 2, dtype=dtype, requires_grad=True)
    y = x * 2
    z = y.sin()
    u = (net(z) + net(y)).sum()
    first = torch.autograd.grad(u, [x, y, z], retain_graph=True)
    u.backward(create_graph=True)
    loss = x.grad.pow(2).sum() + sum(p.grad.pow(2).sum() for p in net.parameters())
    second = torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True)
    return [*first, x.grad, *(p.grad for p in net.parameters()), *second]


def inputs_of_backward(nn, dtype):
    net = net_of(nn, dtype)
    x, b = (torch.rand(5, 2, dtype=dtype, requires_grad=True) for _ in range(2))
    net(x * b).sum().backward(inputs=[x])
    return [x.grad, b.grad, *(p.grad for p in net.parameters())]


PROGRAMS = [
    joined,
    columns_of_a_leaf,
    learned_features,
    encoder_of_torchs,
    one_behind_the_other,
    inputs_of_backward,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("program", PROGRAMS)
def test_gradients_beyond(program, dtype):
    made = []
    for nn in (torch.nn, nnmirror):
        torch.manual_seed(0)
        made.append(program(nn, dtype))
    for expected, actual in zip(*made, strict=True):
        if expected is None or actual is None:
            assert expected is actual
            continue
        most = UNITS * torch.finfo(dtype).eps * expected.abs().max()
        assert (expected - actual).abs().max() <= most


def test_what_nothing_leads_to():
    x, y = (torch.rand(2, 2, requires_grad=True) for _ in range(2))
    u = nnmirror.Linear(2, 1)(x.exp()).sum()
    assert torch.autograd.grad(u, [x, y], allow_unused=True, retain_graph=True)[1] is None
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(u, [x, y])


@parity
def test_the_joined_input_itself(nn, optim):
    """It is asked for, has hooks, retains its gradient, and is used by torch as well."""
    net = net_of(nn, torch.float64)
    x, t = (torch.rand(4, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    seen = []
    found = []
    for step in range(5):
        joined = torch.cat([x, t], -1)
        if step == 1:
            joined.register_hook(lambda g: g * 2)
        u = net(joined)
        if step >= 2:
            joined.retain_grad()
        if step == 3:
            joined.register_hook(lambda g: seen.append(g.detach().clone()))
        found += torch.autograd.grad(u.sum(), [joined, x], retain_graph=True)
        found += torch.autograd.grad(u.sum() + (joined**2).sum(), [joined, t], retain_graph=True)
        (slope,) = torch.autograd.grad(u.sum(), joined, create_graph=True)
        (slope[:, 0] ** 2).sum().backward()
        found.append(joined.grad if step >= 2 else None)
    return found, seen, x.grad, t.grad, [p.grad for p in net.parameters()]


@parity
def test_an_input_joined_of_what_changes(nn, optim):
    """Another leaf each time, one of no gradient among them, and one changed in place since."""
    net = net_of(nn, torch.float64)
    found = []
    for step in range(6):
        x = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
        t = torch.rand(3, 1, dtype=torch.float64, requires_grad=step % 2 == 0)
        joined = torch.cat([x, t], 1)
        u = net(joined)
        with torch.no_grad():
            x.add_(1)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        loss = (slope**2).sum() + u.sum()
        loss.backward()
        found += [u, slope, x.grad, t.grad]
        if step == 4:
            v = net(joined)
            with torch.no_grad():
                joined.mul_(2)
            v.sum().backward()  # its values were saved
    return found


@parity
def test_a_leaf_that_is_asked_for_twice(nn, optim):
    net = net_of(nn, torch.float64)
    x = torch.rand(5, 1, dtype=torch.float64, requires_grad=True)
    plain = grad(net(x * torch.ones(1, 2, dtype=torch.float64)), [x, x])
    x.register_hook(lambda g: g * 1.5)
    return *plain, *grad(net(torch.cat([x, x], 1)), [x, x])


@pytest.mark.parametrize("asks", [False, True])
def test_a_leaf_that_is_frozen_between(asks):
    def program(nn):
        torch.manual_seed(0)
        net = net_of(nn, torch.float64)
        X, y = (torch.rand(5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
        u = net(torch.sin(X) * y)
        (first,) = grad(u, X)
        y.requires_grad_(False)
        loss = u.sum() + first.pow(2).sum()
        if asks:
            (second,) = grad(loss, X)
            loss = loss + second.pow(2).sum()
        loss.backward()
        return first, X.grad, y.grad, *(p.grad for p in net.parameters())

    for expected, actual in zip(program(torch.nn), program(nnmirror), strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


def test_a_hook_on_a_leaf_whose_gradient_goes_on_through_torch():
    def program(nn, of):
        torch.manual_seed(0)
        net = net_of(nn, torch.float64)
        X = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
        x = of(X)
        x.register_hook(lambda g: g * 2)
        u = net(torch.sin(x))
        (first,) = grad(u, X)
        (u.sum() + first.pow(2).sum()).backward()
        return first, X.grad

    with pytest.raises(NotImplementedError, match=r"x \* 1"):
        program(nnmirror, lambda X: X)
    expected, actual = program(torch.nn, lambda X: X), program(nnmirror, lambda X: X * 1)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("change", ["mul_", "column", "data"])
def test_a_joined_input_that_is_changed_between_two_calls(change):
    def program(nn):
        torch.manual_seed(0)
        net = net_of(nn, torch.float64).requires_grad_(False)
        x, t = (torch.rand(5, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        joined = torch.cat([x, t], 1)
        before = net(joined)
        if change == "mul_":
            joined.mul_(2)
        elif change == "column":
            joined[:, 0] = x[:, 0] * 3
        else:
            joined.data = joined.data * 2
        after = net(joined)
        return after, *torch.autograd.grad(before.sum() + after.sum(), [x, t])

    torch.testing.assert_close(program(nnmirror), program(torch.nn), rtol=1e-13, atol=1e-15)
