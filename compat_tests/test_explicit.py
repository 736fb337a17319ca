"""The explicit style: forward, then backward by hand, layer by layer."""

import weakref

import pytest
import torch

import nnmirror
from nnmirror import nn

from .parity import same, units_apart


def net(lib):
    torch.manual_seed(0)
    return lib.Sequential(
        lib.Linear(2, 5),
        lib.ReLU(),
        lib.Linear(5, 5),
        lib.LeakyReLU(),
        lib.Linear(5, 1),
        lib.Tanh(),
    )


def reference(x, t, steps=1):
    """PyTorch's loss, the gradient of the input and those of the parameters."""
    model, criterion = net(torch.nn), torch.nn.MSELoss()
    x = x.clone().requires_grad_()
    for _ in range(steps):
        loss = criterion(model(x), t)
        loss.backward()
    return loss.detach(), x.grad, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("call", ["forward", "__call__"])
def test_the_whole_net_by_hand(call):
    x, t = torch.randn(4, 2), torch.randn(4, 1)
    model, criterion = net(nn), nn.MSELoss()
    loss = getattr(criterion, call)(getattr(model, call)(x), t)
    dx = model.backward(criterion.backward())
    expected = reference(x, t)
    same(expected, (loss.detach(), dx, [g for _, g in model.param()]), "by hand")
    assert [p for p, _ in model.param()] == list(model.parameters())


def test_one_layer_by_hand_without_anything_that_requires_grad():
    """A layer returns the gradient of its input, whether it is tracked or not."""
    for name, args in [("Tanh", ()), ("ReLU", ()), ("LeakyReLU", (0.2,)), ("Linear", (3, 2))]:
        for shape in [(4, 3), (3,), (2, 4, 3)]:
            torch.manual_seed(0)
            mine = getattr(nn, name)(*args).requires_grad_(False)
            torch.manual_seed(0)
            theirs = getattr(torch.nn, name)(*args)
            x = torch.randn(shape)
            y = mine.forward(x)
            g = torch.randn(y.shape)
            assert not y.requires_grad
            leaf = x.clone().requires_grad_()
            theirs(leaf).backward(g)
            same(leaf.grad, mine.backward(g), name)
            assert all(p.grad is None for p in mine.parameters())


def test_a_frozen_layer_by_hand_uses_what_its_forward_was_given():
    """What happens to its input or weights after the forward changes no gradient silently."""
    g = torch.randn(4, 3)
    for name in ("Tanh", "ReLU"):
        layer, x = getattr(nn, name)(), torch.randn(4, 3)
        leaf = x.clone().requires_grad_()
        getattr(torch.nn, name)()(leaf).backward(g)
        y = layer(x)
        x.mul_(2)  # the result is what it needs
        same(leaf.grad, layer.backward(g), name)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            layer.backward(g)
        layer(torch.randn(4, 3)).zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            layer.backward(g)
        assert y.grad_fn is None
    linear = nn.Linear(3, 3).requires_grad_(False)
    weight, x = linear.weight.detach().clone(), torch.randn(4, 3)
    for change in (lambda: linear(x).zero_(), lambda: setattr(linear.weight, "data", x[:3] * 0)):
        linear(x)
        change()
        same(g.mm(weight), linear.backward(g), "of the weight as it was")
        linear.weight.data = weight.clone()
    linear(x)
    linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        linear.backward(g)


@pytest.mark.parametrize("between", ["ReLU", "Tanh", "LeakyReLU", "SiLU", "Dropout", "LayerNorm"])
def test_a_frozen_sequential_by_hand_again_and_again(between):
    """After a few calls it runs as one function; each layer can still be asked."""
    args = {"Dropout": (0.5,), "LayerNorm": (5,)}.get(between, ())
    made = []
    for library in (torch.nn, nn):
        torch.manual_seed(0)
        layers = library.Linear(3, 5), getattr(library, between)(*args), library.Linear(5, 2)
        made.append(library.Sequential(*layers).requires_grad_(False))
    theirs, mine = made
    for i in range(12):
        x, g = torch.randn(4, 3), torch.randn(4, 2)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(i)
        expected = theirs(leaf)
        torch.manual_seed(i)
        y = mine(x)
        assert torch.equal(y, expected)
        assert not y.requires_grad
        expected.backward(g)
        if i % 3 == 0:
            same(leaf.grad, mine.backward(g), between)
        elif i % 3 == 1:
            for layer in reversed(mine):
                g = layer.backward(g)
            same(leaf.grad, g, between)
        else:
            mine[2].weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                mine.backward(g)
            theirs[2].weight.copy_(mine[2].weight)
        if i == 8:  # the weights as they were count
            torch.manual_seed(i)
            mine(x)
            mine[0].weight.data = torch.zeros(5, 3)
            same(leaf.grad * 2, mine.backward(g), between)
            theirs[0].weight.zero_()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_with_a_backward_of_its_own_in_a_sequential(frozen):
    class Doubled(nn.Linear):
        def backward(self, gradient=None):
            return super().backward(gradient) * 2

    model = nn.Sequential(Doubled(3, 3), nn.Tanh(), nn.Tanh()).requires_grad_(not frozen)
    x, g = torch.randn(4, 3), torch.randn(4, 3)
    model(x)
    expected = model.backward(g)
    for _ in range(8):
        model(x)
        same(expected, model.backward(g), "again")


def test_a_frozen_sequential_keeps_nothing_of_an_earlier_batch():
    model = nn.Sequential(nn.SiLU(), nn.Linear(3, 3)).requires_grad_(False)
    small = torch.randn(1, 3)
    for x in [small] * 6 + [torch.randn(50, 3)] * 6:
        model(x)
    given = weakref.ref(x)
    del x
    with torch.no_grad():
        model(small)
    assert given() is None


@pytest.mark.parametrize("name", ["Linear", "ReLU", "Sigmoid", "Softmax"])
def test_a_frozen_layer_keeps_no_more_than_its_backward_needs(name):
    args = {"Linear": (3, 3), "Softmax": (1,)}.get(name, ())
    layer = getattr(nn, name)(*args).requires_grad_(False)
    x = torch.randn(4, 3, 2).transpose(1, 2).contiguous()
    given = weakref.ref(x)
    y = layer(x)
    del x
    assert given() is None
    assert layer.backward(torch.ones_like(y)).shape == (4, 2, 3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_criterion_by_hand(reduction):
    x, t = torch.randn(4, 3), torch.randn(4, 3)
    criterion = nn.MSELoss(reduction=reduction)
    criterion.forward(x, t)
    leaf = x.clone().requires_grad_()
    torch.nn.MSELoss(reduction=reduction)(leaf, t).sum().backward()
    g = torch.ones(4, 3) if reduction == "none" else None
    same(leaf.grad, criterion.backward(g), reduction)


@pytest.mark.parametrize("shape", [(1,), (2, 1), (2, 4)])
def test_a_bias_that_is_broadcast_by_hand(shape):
    """The gradient is summed to the shape of the bias, as in a recorded backward."""
    layer, bias = nn.Linear(3, 4), torch.zeros(shape)
    layer.bias = nn.Parameter(bias)
    layer.forward(torch.randn(2, 3))
    g = torch.randn(2, 4)
    layer.backward(g)
    assert torch.equal(layer.bias.grad, g.sum_to_size(shape))


def test_gradients_accumulate_by_hand():
    x, t = torch.randn(4, 2), torch.randn(4, 1)
    model, criterion = net(nn), nn.MSELoss()
    for _ in range(3):
        criterion(model(x), t)
        model.backward(criterion.backward())
    same(reference(x, t, steps=3)[2], [p.grad for p in model.parameters()], "accumulated")


def test_a_module_used_twice_in_a_sequential():
    x = torch.randn(4, 3)
    grads = []
    for lib in (torch.nn, nn):
        torch.manual_seed(0)
        shared = lib.Linear(3, 3)
        model = lib.Sequential(shared, lib.Tanh(), shared, lib.Sequential(lib.ReLU(), shared))
        leaf = x.clone().requires_grad_()
        y = model(leaf if lib is torch.nn else x)
        if lib is torch.nn:
            y.backward(torch.ones_like(y))
            grads.append([leaf.grad, shared.weight.grad, shared.bias.grad])
        else:
            grads.append([model.backward(torch.ones(4, 3)), shared.weight.grad, shared.bias.grad])
    same(*grads, "twice")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(self.inner(x)) + x


@pytest.mark.parametrize("call", ["forward", "__call__"])
def test_a_module_with_a_forward_of_its_own(call):
    """The module's backward walks the recorded graph between its input and output."""
    model = Residual()
    x = torch.randn(4, 3, requires_grad=True)
    g = torch.randn(4, 3)
    getattr(model, call)(x).backward(g)
    expected = [x.grad, model.inner.weight.grad, model.inner.bias.grad]
    x.grad = None
    model.zero_grad()
    getattr(model, call)(x)
    dx = model.backward(g)
    same(expected, [dx, model.inner.weight.grad, model.inner.bias.grad], "by hand")
    assert x.grad is None, "by hand, the gradient is returned and not kept"
    getattr(model, call)(x.detach())
    assert model.backward(g) is None  # an input that requires no grad is not in the graph


def test_inside_a_sequential():
    model = nn.Sequential(nn.Linear(2, 3), Residual(), nn.Tanh())
    x, g = torch.randn(4, 2), torch.randn(4, 3)
    leaf = x.clone().requires_grad_()
    model(leaf).backward(g)
    expected = [leaf.grad] + [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x)
    same(expected, [model.backward(g)] + [p.grad for p in model.parameters()], "by hand")


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_the_layer():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer, x = Doubled(3, 2), torch.randn(4, 3, requires_grad=True)
    layer(x)
    dx = layer.backward(torch.ones(4, 2))
    same(2 * torch.ones(4, 2) @ layer.weight.detach(), dx, "dx")


def test_a_module_that_brings_its_own_backward():
    class Scale(nn.Module):
        def forward(self, x):
            return x * 3

        def backward(self, g):
            return g * 3

    model = nn.Sequential(nn.Linear(2, 2), Scale())
    x = torch.randn(4, 2)
    model(x)
    same(torch.full((4, 2), 3.0) @ model[0].weight.detach(), model.backward(torch.ones(4, 2)), "dx")


def test_errors_by_hand():
    layer = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="needs a forward call before it"):
        layer.backward(torch.ones(4, 2))
    layer(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match=r"Mismatch in shape.*\[4, 3\].*\[4, 2\]"):
        layer.backward(torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        layer.backward()
    layer.backward(torch.ones(4, 2))
    with pytest.raises(RuntimeError, match="second time"):
        layer.backward(torch.ones(4, 2))
    with torch.no_grad():
        layer(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="needs a forward call before it"):
        layer.backward(torch.ones(4, 2))
    assert nn.ReLU().param() == []


# -- tuples ------------------------------------------------------------------------------


def test_a_tuple_equals_the_stacked_batch():
    batch, t = torch.randn(6, 2), torch.randn(6, 1)
    stacked, by_tuple = net(nn), net(nn)
    y = stacked(batch)
    ys = by_tuple(tuple(batch.unbind(0)))
    assert type(ys) is tuple
    same(y.detach(), torch.stack(ys).detach(), "outputs")
    g = torch.randn(6, 1)
    dx = stacked.backward(g)
    dxs = by_tuple.backward(tuple(g.unbind(0)))
    assert type(dxs) is tuple
    same(dx, torch.stack(dxs), "dx")
    same([p.grad for p in stacked.parameters()], [p.grad for p in by_tuple.parameters()], "dp")
    # The same calls are recorded.
    again = net(nn)
    ys = again(tuple(batch.unbind(0)))
    nn.MSELoss()(torch.stack(ys), t).backward()
    same(reference(batch, t)[2], [p.grad for p in again.parameters()], "tape")


def test_a_tuple_of_different_shapes_goes_item_by_item():
    layer = nn.Linear(3, 2)
    xs = (torch.randn(4, 3), torch.randn(3), torch.randn(2, 2, 3))
    ys = layer(xs)
    same([layer(x).detach() for x in xs], [y.detach() for y in ys], "outputs")
    ys = layer(xs)
    dxs = layer.backward(tuple(torch.ones_like(y) for y in ys))
    assert [d.shape for d in dxs] == [x.shape for x in xs]
    same(torch.full((2,), 9.0), layer.bias.grad, "db")


def test_a_loss_of_tuples_is_a_tuple_of_losses():
    xs, ts = tuple(torch.randn(3, 2).unbind(0)), tuple(torch.randn(3, 2).unbind(0))
    criterion = nn.MSELoss(reduction="sum")
    losses = criterion(xs, ts)
    expected = [torch.nn.MSELoss(reduction="sum")(x, t) for x, t in zip(xs, ts, strict=True)]
    same(expected, list(losses), "losses")
    grads = criterion.backward()
    same(2 * (torch.stack(xs) - torch.stack(ts)), torch.stack(grads), "dx")


def test_a_tuple_in_place_changes_its_items():
    xs = (torch.tensor([-1.0, 2.0]), torch.tensor([3.0, -4.0]))
    ys = nn.ReLU(inplace=True)(xs)
    same([torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])], list(xs), "changed")
    assert ys[0] is xs[0]


def test_tuple_errors():
    layer = nn.Linear(3, 2)
    layer((torch.randn(3), torch.randn(3)))
    with pytest.raises(RuntimeError, match="tuple of 2 gradients, but got 1"):
        layer.backward((torch.ones(2),))
    with pytest.raises(RuntimeError, match="tuple of 2 gradients, but got Tensor"):
        layer.backward(torch.ones(2, 2))
    with pytest.raises(TypeError, match="must be Tensor"):
        layer((torch.randn(3), 5))
    with pytest.raises(TypeError, match="empty tuple"):
        layer(())
    with pytest.raises(TypeError, match="tuples of one length"):
        nn.MSELoss()((torch.ones(1), torch.ones(1)), (torch.ones(1),))
    with pytest.raises(TypeError, match="tuples of one length"):
        nn.MSELoss()((torch.ones(1), torch.ones(1)), torch.ones(2, 1))


def test_gradient_descent_on_tuples_by_hand():
    """Gradient descent as in the report: parameters are updated by hand with `param()`."""
    torch.manual_seed(1)
    x, t = torch.randn(8, 2), torch.randn(8, 1)
    model, criterion = net(nn), nn.MSELoss()
    losses = []
    for _ in range(20):
        model.zero_grad()
        ys = model(tuple(x.unbind(0)))
        losses.append(sum(loss.item() for loss in criterion(ys, tuple(t.unbind(0)))))
        model.backward(criterion.backward())
        with nnmirror.no_grad():
            for p, g in model.param():
                p.sub_(0.01 * g)
    assert losses[-1] < losses[0] / 1.5


def test_full_backward_hook_of_a_child_driven_by_hand():
    """The hook gets the gradient of its module's input, and its return value replaces it."""
    torch.manual_seed(0)
    net = nnmirror.Sequential(nnmirror.Linear(2, 3), nnmirror.Tanh(), nnmirror.Linear(3, 1))
    seen = []

    def hook(module, grad_input, grad_output):
        seen.append(grad_input)
        return (grad_input[0] * 2,)

    net[2].register_full_backward_hook(hook)
    x, g = torch.randn(4, 2), torch.randn(4, 1)
    y = net(x)
    net.backward(g)
    by_hand = net[0].weight.grad
    net.zero_grad()
    y = net(x)
    y.backward(g)
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(by_hand, net[0].weight.grad)


OF_SEVERAL_CALLS = {
    "conv": (lambda nn: nn.Conv2d(3, 4, 3, padding="same", dilation=2), (2, 3, 6, 6)),
    "circular": (lambda nn: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6)),
    "group": (lambda nn: nn.GroupNorm(2, 4), (3, 4, 5)),
    "instance": (lambda nn: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "rms": (lambda nn: nn.RMSNorm(5), (3, 4, 5)),
    "upsample": (lambda nn: nn.Upsample(scale_factor=2), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("name", OF_SEVERAL_CALLS)
def test_a_first_layer_of_several_calls(name):
    """Its input is data, for which it gives a gradient by hand."""
    made, shape = OF_SEVERAL_CALLS[name]
    x = torch.randn(shape)
    expected, layer = made(torch.nn), made(nnmirror)
    layer.load_state_dict(expected.state_dict())
    y = layer(x)
    leaf = x.clone().requires_grad_()
    out = expected(leaf)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    assert torch.equal(y, out)
    most = 0 if name in ("group", "rms", "upsample") else 64  # as the README says
    assert units_apart(leaf.grad, layer.backward(gradient)) <= most
    for p, q in zip(layer.parameters(), expected.parameters(), strict=True):
        assert units_apart(q.grad, p.grad) <= most
