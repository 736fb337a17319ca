"""Signatures and bound walks: the same bits, whatever a training loop does between two steps.

Each parity test compares PyTorch with three settings of the mirror: every walk bound at its first
occurrence (and compared with the generic one), the default, and `fast.enabled` off.
"""

import contextlib
import enum
import gc
import itertools
import linecache
import operator
import random
import threading
import warnings
import weakref

import pytest
import torch

import nnmirror
from nnmirror import fast

from .parity import parity, same


@pytest.fixture(params=["bound at once", "bound when hot", "off"], autouse=True)
def mode(request, monkeypatch):
    monkeypatch.setattr(fast, "enabled", request.param != "off")
    monkeypatch.setattr(fast, "after", 1 if request.param == "bound at once" else 3)
    return request.param


def bound_walks():
    """The names of the sources of all bound walks."""
    return [name for name in linecache.cache if name.startswith("<nnmirror walk")]


class Wired:
    """A net wired by hand, with branches, scalars and a parameter of its own between its layers."""

    @staticmethod
    def of(nn):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.inp, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
                self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
                self.scale = nn.Parameter(torch.ones(8))

            def forward(self, x):
                h = nn.functional.relu(self.inp(x))
                for block in self.blocks:
                    h = h + self.scale * torch.tanh(block(h)) * 0.5
                return self.out(h).clamp(-2, 2)

        return Net()


def train(nn, optim, net, steps=8, between=lambda i, net, optimizer: None, loss=None, sizes=(5,)):
    """The result of a run: losses, weights and gradients."""
    optimizer = optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
    losses = []
    for i in range(steps):
        between(i, net, optimizer)
        n = sizes[i % len(sizes)]
        x, y = torch.randn(n, 3), torch.randn(n, 2)
        optimizer.zero_grad()
        out = net(x)
        cost = nn.functional.mse_loss(out, y) if loss is None else loss(nn, out, y, i)
        cost.backward()
        optimizer.step()
        losses.append(cost.detach())
    return losses, [(p.detach().clone(), p.grad) for p in net.parameters()]


@parity
def test_a_net_wired_by_hand(nn, optim):
    return train(nn, optim, Wired.of(nn))


@parity
def test_a_batch_that_varies(nn, optim):
    return train(nn, optim, Wired.of(nn), steps=16, sizes=(5, 1, 5, 3))


def _frozen(i, net, optimizer):
    net.inp.weight.requires_grad_(i % 4 != 3)


def _hooked(i, net, optimizer):
    if i == 4:
        net.handle = net.scale.register_hook(lambda g: g * 2)
    if i == 6:
        net.handle.remove()


def _module_hooked(i, net, optimizer):
    if i == 4:
        net.handle = net.blocks[0].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    if i == 6:
        net.handle.remove()


def _exchanged(i, net, optimizer):
    with torch.no_grad():
        for p in net.parameters():
            p.data = p.data * 0.9


def _transposed(i, net, optimizer):
    if i % 3 == 2:
        net.blocks[0].weight.data = net.blocks[0].weight.data.t()


def _loaded(i, net, optimizer):
    if i % 2:
        net.load_state_dict({k: v * 0.5 for k, v in net.state_dict().items()})


def _replaced(i, net, optimizer):
    if i == 4:
        net.scale = type(net.scale)(torch.full((8,), 0.3))


def _accumulated(i, net, optimizer):
    if i % 2:
        optimizer.zero_grad = lambda: None
    else:
        optimizer.__dict__.pop("zero_grad", None)


CHANGES = {
    "frozen": _frozen,
    "hooked": _hooked,
    "module hooked": _module_hooked,
    "data exchanged": _exchanged,
    "transposed": _transposed,
    "loaded": _loaded,
    "replaced": _replaced,
    "accumulated": _accumulated,
}


@parity
def test_layers_of_several_widths(nn, optim):
    """The gradients are large enough that layers of different widths share memory."""
    widths = 4, 300, 520, 1, 400
    layers = [nn.Linear(m, n) for m, n in itertools.pairwise(widths)]
    net = nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())])
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = net(torch.randn(256, 4)).square().mean()
        loss.backward()
        optimizer.step()
    return loss, [p.grad for p in net.parameters()]


@pytest.mark.parametrize("change", CHANGES)
@parity
def test_changes_between_steps(nn, optim, change):
    return train(nn, optim, Wired.of(nn), steps=12, between=CHANGES[change])


LOSSES = {
    # A schedule: another number in each step, among them zeros of both signs.
    "annealed": lambda nn, out, y, i: ((out - y) ** 2).mean() * (0.0, -0.0, 1.0, 0.5, 0.25, 0.1)[i % 6],
    # The same function of two tensors, and of one twice.
    "one or two": lambda nn, out, y, i: _one_or_two(out, y, i),
    "clamped by data": lambda nn, out, y, i: out.clamp(max=y.max()).pow(2).sum(),
    "by mask": lambda nn, out, y, i: out[y > 0].sum() + out.masked_fill(y > 0.5, 0.1).mean(),
    "by index": lambda nn, out, y, i: out.gather(1, (y[:, :1] > 0).long()).sum() + out[y[:, 0].argmax()].sum(),
    "largest": lambda nn, out, y, i: out.max(1).values.sum() + out.max(),
    "product": lambda nn, out, y, i: (out * (y > 0)).prod(1).sum(),
    "unbound": lambda nn, out, y, i: sum(a * (k + 1) for k, a in enumerate(out.unbind(1))).sum(),
    "log softmax": lambda nn, out, y, i: -torch.log_softmax(out, 1)[:, 0].mean(),
    "cross entropy": lambda nn, out, y, i: nn.functional.cross_entropy(out, (y[:, 0] > 0).long()),
    "smooth": lambda nn, out, y, i: nn.functional.smooth_l1_loss(out, y) + out.abs().sum() * 1e-2,
    "in place": lambda nn, out, y, i: (out * 2).add_(y).relu_().sum(),
    "on a view": lambda nn, out, y, i: _on_a_view(out, y),
    "dropout": lambda nn, out, y, i: nn.functional.dropout(out, 0.3).sum(),
    "detached": lambda nn, out, y, i: (out * out.detach().exp()).sum(),
    "in float64": lambda nn, out, y, i: (out.double() - y).pow(2).sum(),
    "a constant part": lambda nn, out, y, i: out.sum() * 0 + (out - out).sum(),
}  # fmt: skip


def _one_or_two(out, y, i):
    a = torch.tanh(out)
    b = a if i % 2 else torch.tanh(out)
    return (a * b).sum() + (b + a).mean()


def _on_a_view(out, y):
    z = out * 1
    z[:, 0] *= 2
    z[0] = y[0]
    return z.pow(2).sum()


@pytest.mark.parametrize("loss", LOSSES)
@parity
def test_losses_written_out(nn, optim, loss):
    return train(nn, optim, Wired.of(nn), steps=9, loss=LOSSES[loss])


def _scaled(out, y, weight):
    return weight * (out - y).pow(2).mean()


def _powered(out, y, weight):
    return ((out - y).abs() + 1).pow(1 + weight).mean()


def _clamped_more(out, y, weight):
    return (out.clamp(-weight, weight) / (weight + 0.5) - y).pow(2).mean()


def _from_a_number(out, y, weight):
    return (weight - out * (2 - weight)).sub(y, alpha=weight).square().mean()


SCHEDULED = [_scaled, _powered, _clamped_more, _from_a_number]


@pytest.mark.parametrize("loss", SCHEDULED)
@parity
def test_a_number_that_follows_a_schedule(nn, optim, loss):
    numbers = [0.9**i for i in range(40)] + [0.5] * 4 + [0.0, -0.0, 1.0, 1.0, float("inf")]
    steps = len(numbers)
    return train(
        nn, optim, Wired.of(nn), steps, loss=lambda nn, out, y, i: loss(out, y, numbers[i])
    )


def test_a_walk_with_a_number_that_varies_is_bound(mode, after_collection):
    if mode != "bound when hot":
        pytest.skip("the number is to vary for a while first")
    net, before = Wired.of(nnmirror), len(bound_walks())
    for i in range(60):
        loss = 1.5**-i * net(torch.ones(4, 3)).mean()
        loss.backward()
    assert loss.grad_fn.signature.walks.bound.trusted
    assert len(bound_walks()) < before + 40


def _changed_in_place(out, y):
    z = out * y
    z -= torch.log(1 + out.pow(2))
    return z.sum(1, keepdim=True).mul_(0.5).mean()


def _of_a_result(out, y):
    return torch.exp_(out * 0.5).add_(y).square_().mean()


def _of_a_view(out, y):
    z = out * 1
    z[0].mul_(2)
    return (z.view(-1).add_(1) + z.view(-1)).pow(2).mean()


def _of_a_plain_tensor(out, y):
    total = torch.zeros_like(y)
    total += out
    total += out * y
    return total.square().mean()


def _also_out_of_place(out, y):
    z = out + y
    both = z - y
    z -= y
    return (both * z).sum()


def _by_results(out, y):
    z, scale = out * 1.0, torch.tanh(out)
    z *= scale
    z /= 2 + scale[:1]
    return z.neg_().sigmoid_().mean()


CHANGED = [
    *(_changed_in_place, _of_a_result, _of_a_view, _of_a_plain_tensor, _also_out_of_place),
    _by_results,
]


@pytest.mark.parametrize("loss", CHANGED)
@parity
def test_changes_in_place(nn, optim, loss):
    return train(nn, optim, Wired.of(nn), loss=lambda nn, out, y, i: loss(out, y))


@parity
def test_changes_in_place_by_parameters(nn, optim):
    weight, x = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(3, 6))
    frozen = nn.Parameter(torch.randn(6), requires_grad=False)
    results = []
    for i in range(8):
        frozen.requires_grad_(i == 4)
        y = torch.sin(x)
        y *= weight
        y -= frozen
        y /= 2.5
        y += weight * 0.9**i
        names = [n and n.name() for n, _ in y.grad_fn.next_functions]
        y.square().mean().backward()
        results.append((y.detach(), names, x.grad.clone(), weight.grad.clone(), frozen.grad))
    return results


@parity
def test_a_change_in_place_of_what_was_saved_raises_each_time(nn, optim):
    w, messages = nn.Parameter(torch.linspace(-1, 1, 6)), []
    for i in range(8):
        y = torch.exp(w)
        kept = y.register_hook(lambda g: messages.append(g.clone())) if i == 5 else None
        z = y * 2.0 if i % 2 else y.log()
        y *= torch.tanh(w)
        try:
            (y + z).sum().backward()
        except RuntimeError as error:
            messages.append(str(error))
        if kept is not None:
            kept.remove()
    return messages, w.grad


@parity
def test_a_layer_is_called_in_several_ways_in_turn(nn, optim):
    """As a critic is: on an action from the data, and on one that was computed."""
    actor, critic = nn.Linear(3, 2), nn.Linear(5, 4)
    optimizer = optim.SGD([*actor.parameters(), *critic.parameters()], lr=0.1)
    results = []
    for i in range(8):
        x, action = torch.randn(4, 3), torch.randn(4, 2)
        computed = actor(x)
        both = [critic(torch.cat([x, a], 1)) for a in (action, computed, computed.detach())]
        if i == 5:
            critic.bias.data = critic.bias.data + 1
        both.append(critic(torch.cat([x, computed], 1)[: 2 + i % 2]))
        loss = torch.min(both[0], both[1]).mean() * 0.9**i + (both[2] * both[3][:1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results.append((loss.detach(), *(p.grad for p in (*actor.parameters(), critic.bias))))
    return results


@parity
def test_two_losses_over_one_trunk(nn, optim):
    net = Wired.of(nn)
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    for i in range(8):
        optimizer.zero_grad()
        out = net(torch.randn(4, 3))
        if i % 2:
            out[:, 0].sum().backward(retain_graph=True)
            out[:, 1].pow(2).sum().backward()
        else:
            out.pow(2).sum().backward(retain_graph=True)
            out.pow(2).sum().backward()
        optimizer.step()
    return [(p.detach(), p.grad) for p in net.parameters()]


@parity
def test_a_second_backward_raises(nn, optim):
    net = Wired.of(nn)
    for _ in range(5):
        loss = net(torch.ones(4, 3)).sum()
        loss.backward()
    loss.backward()


@parity
def test_what_was_saved_is_changed(nn, optim):
    net = Wired.of(nn)
    for _ in range(5):
        h = torch.tanh(net.inp(torch.ones(4, 3)))
        net.out(h).sum().backward()
    h = torch.tanh(net.inp(torch.ones(4, 3)))
    loss = net.out(h).sum()
    with torch.no_grad():
        h.mul_(2)
    loss.backward()


@parity
def test_a_weight_is_changed_before_backward(nn, optim):
    net = Wired.of(nn)
    for _ in range(5):
        net(torch.ones(4, 3)).sum().backward()
    loss = net(torch.ones(4, 3)).sum()
    with torch.no_grad():
        net.out.weight.mul_(2)
    loss.backward()


@parity
def test_gradients_kept_by_the_script(nn, optim):
    """A .grad that a script keeps does not change when the next one is computed."""
    net, kept = Wired.of(nn), []
    for i in range(6):
        net.zero_grad()
        net(torch.full((4, 3), float(i))).sum().backward()
        kept.append([p.grad for p in net.parameters()])
    return kept


@parity
def test_retained_gradients_and_hooks_on_what_is_between(nn, optim):
    net, seen = Wired.of(nn), []
    for i in range(8):
        h = nn.functional.relu(net.inp(torch.randn(4, 3)))
        if i == 5:
            h.retain_grad()
            h.register_hook(lambda g: seen.append(g) or g * 2)
        net.out(h).pow(2).sum().backward()
        if i == 5:
            seen.append(h.grad)
    return seen, [p.grad for p in net.parameters()]


@parity
def test_a_graph_whose_next_functions_are_read(nn, optim):
    """next_functions shows the transposed weight of a Linear, whose node is then walked too."""
    net, names = Wired.of(nn), []
    for i in range(8):
        h = nn.functional.linear(net.inp(torch.randn(4, 3)), net.blocks[0].weight * 2)
        cost = torch.tanh(h).sum()
        if i in (0, 5):
            node = cost.grad_fn
            while node.next_functions:
                names.append([n and n.name() for n, _ in node.next_functions])
                node = node.next_functions[0][0]
        cost.backward()
    return names, [p.grad for p in net.parameters()]


@parity
def test_the_same_module_twice(nn, optim):
    layer = nn.Linear(3, 3)
    for _ in range(6):
        x = torch.randn(4, 3)
        y = torch.tanh(layer(torch.tanh(layer(x)))) + layer(x)
        y.pow(2).sum().backward()
    return layer.weight.grad, layer.bias.grad


@parity
def test_an_episode_of_varying_length(nn, optim):
    """The losses of single steps are summed: no graph occurs twice."""
    net = Wired.of(nn)
    optimizer = optim.SGD(net.parameters(), lr=0.01)
    for length in (3, 5, 4, 3, 6, 3, 3, 5):
        loss = 0.0
        for _ in range(length):
            loss = loss - torch.log_softmax(net(torch.randn(1, 3)), 1)[0, 1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [(p.detach(), p.grad) for p in net.parameters()]


def test_a_walk_is_bound_and_can_be_read(mode, after_collection):
    before = set(bound_walks())
    net = Wired.of(nnmirror)
    for _ in range(5):
        net(torch.randn(4, 3)).pow(2).mean().backward()
    made = [name for name in bound_walks() if name not in before]
    if mode == "off":
        assert not made
    else:
        text = "".join(linecache.getlines(made[-1]))
        assert "# TanhBackward0" in text
        assert "addcmul(" in text


@pytest.mark.by_default
@pytest.mark.parametrize(
    ("layer", "in_pieces"),
    [("ReLU", False), ("LeakyReLU", False), ("ELU", True), ("SiLU", True)],
)
def test_layers_of_many_numbers_are_bound(mode, layer, in_pieces, after_collection):
    """A rule that computes large tensors in pieces is one call in the bound walk."""
    net = nnmirror.Sequential(
        nnmirror.Linear(2, 512), getattr(nnmirror, layer)(), nnmirror.Linear(512, 1)
    )
    x, before = torch.randn(600, 2), set(bound_walks())
    for _ in range(10):
        net(x).square().mean().backward()
    made = [name for name in bound_walks() if name not in before]
    assert bool(made) == (mode != "off")
    assert not made or in_pieces == ("in_pieces(" in "".join(linecache.getlines(made[-1])))


def test_a_long_loss_that_is_no_loop_is_bound(mode):
    """As of a physics-informed net with several terms: more calls than are bound of a loop at
    once."""
    net = nnmirror.Sequential(nnmirror.Linear(3, 4), nnmirror.Tanh(), nnmirror.Linear(4, 1))
    for _ in range(40):
        x = torch.linspace(-1, 1, 6).view(2, 3)
        terms = [sum((net(x + k) * k).sin().mean() for k in range(n, n + 12)) for n in (1, 20)]
        terms += [(term.exp() - 1).square() for term in terms]
        loss = (terms[0] + terms[1]) * terms[2] + terms[3]
        loss.backward()
    bound = loss.grad_fn.signature.walks.bound
    assert (bound is not None and bound.trusted) == (mode != "off")


# Those that take only an input.
EACH = sorted({*nnmirror.rules.activation.__all__} - {"threshold", "threshold_"})


@pytest.mark.by_default
@pytest.mark.parametrize("name", EACH)
def test_a_net_with_each_activation_is_bound(mode, name):
    """An activation is as fast as the others as soon as it is there."""
    function = getattr(nnmirror.functional, name)
    first, last = nnmirror.Linear(3, 8), nnmirror.Linear(4 if name == "glu" else 8, 2)
    for _ in range(8):
        loss = last(function(first(torch.randn(5, 3)))).square().mean()
        loss.backward()
    bound = loss.grad_fn.signature.walks.bound
    assert (bound is not None and bound.trusted) == (mode != "off")


def test_a_walk_with_other_bits_is_not_used(mode, monkeypatch):
    """A rule that computes something else the second time costs speed, but no wrong bits."""
    if mode != "bound when hot":
        pytest.skip("about the comparison")
    times = iter(range(1000))

    class Odd(nnmirror.rules.Rule):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g * float(next(times))

    w = nnmirror.Parameter(torch.ones(3))
    for i in range(12):
        w.grad = None
        before = next(times)
        nnmirror.tape.record(Odd, (w,))[0].sum().backward()
        if i > 5:
            assert w.grad.tolist() == [float(before + 1)] * 3


def test_models_are_freed_with_their_signatures(after_collection):
    """Nets of different shapes leave nothing behind and need no garbage collector."""
    gc.collect()
    gc.disable()
    try:
        walks, alive = len(bound_walks()), []
        for i in range(30):
            net = nnmirror.Linear(3, i + 2)
            for _ in range(5):
                torch.tanh(net(torch.ones(2, 3))).pow(2).sum().backward()
            alive.append(weakref.ref(net.weight._signature))
            del net
        assert not any(ref() for ref in alive)
        assert len(bound_walks()) == walks
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("change", ["parameter", "layer", "batch size"])
def test_a_net_is_bound_again_after_many_changes(mode, change):
    """More than the calls of one kind that are told apart before they count as always different."""
    net = Wired.of(nnmirror)
    for i in range(24):
        if change == "parameter":
            net.scale = nnmirror.Parameter(torch.ones(8))
        elif change == "layer":
            net.blocks[0] = nnmirror.Linear(8, 8)
        for _ in range(5):
            loss = net(torch.randn(i + 1 if change == "batch size" else 5, 3)).pow(2).mean()
            loss.backward()
    if mode == "bound when hot":
        assert loss.grad_fn.signature.walks.bound.trusted


def test_signatures_are_bounded():
    """A number that differs in every step leaves no more than a few signatures."""
    w = nnmirror.Parameter(torch.ones(3))
    for i in range(1000):
        (w * (0.1 + i)).sum().backward()
    assert len(w._signature.next) <= 64


def test_several_threads_train_at_once():
    """Nets that share nothing but their structure, and one net that all of them read."""
    torch.manual_seed(0)
    trunk = nnmirror.Linear(3, 8).requires_grad_(False)
    nets = [Wired.of(nnmirror) for _ in range(4)]

    def run(net, scale, results):
        x = torch.full((4, 3), scale)
        grads = []
        for _ in range(20):
            net.zero_grad()
            (net(x).pow(2).sum() + net.out(trunk(x)).sum()).backward()
            grads.append([p.grad for p in net.parameters() if p.grad is not None])
        results[scale] = grads

    expected, found = {}, {}
    for i, net in enumerate(nets):
        run(net, 0.1 * i, expected)
    threads = [
        threading.Thread(target=run, args=(net, 0.1 * i, found)) for i, net in enumerate(nets)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(expected, dict(sorted(found.items())), "gradients")


@parity
def test_calls_with_other_arguments_each_time(nn, optim):
    """A recorded call is only reused for the same arguments and the same memory layout."""
    w = nn.Parameter(torch.linspace(-2, 2, 12).view(3, 4))
    found = []
    for i in range(10):
        x = w * 2
        if i == 7:
            x.data = x.detach().t().contiguous().t()  # reshape has to copy this
        bounds = [0.1 * (i % 2), torch.tensor(i / 4)]
        y = x.reshape(12 // (1 + i % 2), -1).clamp(bounds[0], 3)
        z = x.clamp(min=bounds[1], max=2.0) + x.reshape(-1, 2).view(3, 4) - 1
        mask = (z > 0) & (z - 1 <= 1e-6) | (z == 2.0)
        (y.sum() + (z * z).sum()).backward()
        found += [y.detach(), z.detach(), mask]
    return found, w.grad


@parity
def test_results_that_were_given_data_of_another_shape(nn, optim):
    w = nn.Parameter(torch.linspace(-2, 2, 12).view(3, 2, 2))
    found = []
    for i in range(10):
        x = w * 2
        if i > 5:
            x.data = [x.detach() / 2, torch.rand(2, 3, 2), torch.rand(2, 6, 1)][i % 3]
        y = x.clamp(-1, 1)
        found += [y.flatten(1).detach(), y.reshape(2, -1).detach(), x.flatten().detach()]
        if i < 7:
            y.sum().backward()
    return found, w.grad


# -- walks bound in parts -------------------------------------------------------------------


class Heads:
    """Two heads on one trunk, such as an actor and a critic."""

    @staticmethod
    def of(nn, sequential):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(3, 8)
                self.trunk = nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.ReLU())
                self.actor, self.critic = nn.Linear(8, 4), nn.Linear(8, 1)

            def forward(self, x):
                h = self.first(x)
                if sequential:
                    h = self.trunk(h)
                else:
                    h = nn.functional.relu(self.trunk[1](torch.tanh(h)))
                return self.actor(h), self.critic(h)

        return Net()


def episode(nn, optim, net, length, how):
    """The loss of an episode of single steps."""
    terms, values = [], []
    for k in range(length):
        scores, value = net(torch.randn(1, 3))
        terms.append(-torch.log_softmax(scores, 1)[0, k % 4] * (0.5 + k % 3))
        values.append(nn.functional.smooth_l1_loss(value, torch.full((1, 1), 0.3)))
    if how == "one after the other":
        loss = 0.0
        for term, value in zip(terms, values, strict=True):
            loss = loss + term + value
        return loss
    if how == "stacked":
        return torch.stack(terms).sum() + torch.stack(values).sum()
    return sum(terms) / length + sum(values)


@pytest.mark.parametrize("how", ["one after the other", "stacked", "summed"])
@pytest.mark.parametrize("sequential", [True, False])
@parity
def test_episodes_of_any_length(nn, optim, sequential, how):
    """The same steps are repeated, in graphs that never occur twice as a whole."""
    net = Heads.of(nn, sequential)
    optimizer = optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for i in range(14):
        loss = episode(nn, optim, net, 2 + (5 * i) % 7, how)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [(p.detach(), p.grad) for p in net.parameters()]


@parity
def test_episodes_of_observations_without_a_batch(nn, optim):
    """One of the heads is used twice in each step, so one part of the graph gives two gradients."""
    net = Heads.of(nn, sequential=False)
    losses = []
    for i in range(9):
        terms = []
        for _ in range(2 + (3 * i) % 5):
            scores, value = net(torch.randn(3))
            terms += [torch.log_softmax(scores, -1)[1] * 0.5, net.critic(value.expand(8)).sum()]
        loss = torch.stack(terms).sum()
        loss.backward()
        losses.append(loss.detach())
    return losses, [p.grad for p in net.parameters()]


def _without_a_head(i, k, score, value):
    return (score, None) if k % 3 == i % 3 else (score, value)


def _one_alone(i, k, score, value):
    return (None, value) if i % 2 and k % 2 else (score, value)


def _used_twice(i, k, score, value):
    return score * (value if k == i % 4 else 1.0), value


def _one_gradient(i, k, score, value):
    return score + value, value if i % 2 else score


def _looked_at(i, k, score, value):
    if k == 1 and i > 6:
        value.register_hook(lambda g: g * 3)
    if k == 2 and i % 4 == 3:
        score.retain_grad()
    return score, value


def _held_back(i, k, score, value):
    return score - value.detach(), value


@pytest.mark.parametrize(
    "change",
    [_without_a_head, _one_alone, _used_twice, _one_gradient, _looked_at, _held_back],
)
@parity
def test_steps_with_two_heads(nn, optim, change):
    """The gradients of both heads arrive together in most steps, but not in all."""
    net, found = Heads.of(nn, False), []
    for i in range(12):
        terms, values = [], []
        for k in range(1 + (4 * i) % 5):
            scores, value = net(torch.randn(1, 3))
            score, value = change(i, k, torch.log_softmax(scores, 1)[0, k % 4], value.squeeze())
            terms += [score] if score is not None else []
            values += [value] if value is not None else []
        loss = sum(terms) * 0.5
        loss = loss + torch.stack(values).exp().mean() if values else loss
        loss.backward()  # adds to the gradients of earlier episodes
        found.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
    return found


@pytest.mark.parametrize("last_first", [True, False])
@parity
def test_several_episodes_at_once(nn, optim, last_first):
    """Several graphs exist at once; one is walked twice, another has a changed weight."""
    net, found = Heads.of(nn, False), []
    for i in range(6):
        losses = [episode(nn, optim, net, 1 + (i + k) % 4, "stacked") for k in range(3)]
        losses[i % 3].backward(retain_graph=True)
        for loss in reversed(losses) if last_first else losses:
            loss.backward()
        found.append([p.grad.clone() for p in net.parameters()])
        net.zero_grad()
    said = [attempt(losses[0].backward)]
    loss = episode(nn, optim, net, 3, "stacked")
    with torch.no_grad():
        net.critic.weight.mul_(2)
    return found, [*said, attempt(loss.backward)], [p.grad for p in net.parameters()]


def test_a_part_with_two_entries_is_bound(mode, after_collection):
    """The two heads of a step and their trunk are bound as one part."""
    net, before = Heads.of(nnmirror, False), set(bound_walks())
    for i in range(12):
        episode(nnmirror, None, net, 3 + i % 5, "stacked").backward()
    text = "".join("".join(linecache.getlines(n)) for n in bound_walks() if n not in before)
    assert ("= more[0]" in text) == (mode == "bound when hot")  # else the whole walk, or none


@pytest.mark.parametrize("sequential", [True, False])
@parity
def test_two_heads_over_one_trunk(nn, optim, sequential):
    """Part of the graph already has a gradient from elsewhere, or is walked twice."""
    net = Heads.of(nn, sequential)
    found = []
    for i in range(12):
        scores, value = net(torch.randn(5, 3))
        kept = torch.tanh(scores) * value
        if i % 3 == 0:
            kept.sum().backward(retain_graph=True)
            value.mean().backward()
        elif i % 3 == 1:
            (kept.mean() + (scores * scores).sum() + value.exp().sum()).backward()
        else:
            handle = net.first.weight.register_hook(lambda g: g * 2)
            again = torch.tanh(net(torch.randn(5, 3))[0])
            (again.sum() + kept.sum()).backward()
            handle.remove()
        found.append([p.grad.clone() for p in net.parameters()])
        net.zero_grad()
    return found


@parity
def test_losses_summed_in_a_plain_tensor(nn, optim):
    """Made anew in each step, and written to from graphs that repeat."""
    net = Heads.of(nn, True)
    optimizer, found = optim.SGD(net.parameters(), lr=0.1), []
    for i in range(10):
        total, means = torch.zeros(()), torch.ones(4)
        for _ in range(2):
            scores, value = net(torch.randn(5, 3))
            total += (scores * scores).mean()
            means *= scores.mean(0)
        total -= value.mean()
        means.copy_(means * 2 if i % 4 else scores[0])
        optimizer.zero_grad()
        (total + means.sum()).backward()
        optimizer.step()
        found += [total, means, total._version]
    return found, [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("sequential", [True, False])
@parity
def test_from_a_given_gradient(nn, optim, sequential):
    net = Heads.of(nn, sequential)
    given = [torch.randn(5, 4), torch.ones(1, 1).expand(5, 4), torch.randn(4, 5).t()]
    found = []
    for i in range(15):
        scores, value = net(torch.randn(5, 3))
        g = given[i % 3]
        before = g.clone()
        if i % 2:
            scores.backward(g)
        else:
            torch.autograd.backward([scores, value], [g, torch.ones(5, 1)])
        found.append(
            (
                torch.equal(g, before),
                [p.grad.clone() for p in net.parameters() if p.grad is not None],
            )
        )
        net.zero_grad()
    return found


@parity
def test_what_a_bound_walk_used_cannot_be_walked_again(nn, optim):
    net = Heads.of(nn, True)
    for _ in range(6):
        scores, _ = net(torch.randn(2, 3))
        scores.backward(torch.ones(2, 4))
    return attempt(lambda: scores.backward(torch.ones(2, 4)))


@parity
def test_changes_after_the_forward_are_reported(nn, optim):
    net, said = Heads.of(nn, True), []
    for i in range(8):
        x = torch.randn(2, 3)
        scores, _ = net(x)
        if i == 5:
            with torch.no_grad():
                net.trunk[1].weight.mul_(2)
        elif i == 6:
            x.mul_(2)
        elif i == 7:
            with torch.no_grad():
                scores.mul_(2)  # which no node saved
        said.append(attempt(lambda scores=scores: scores.backward(torch.ones(2, 4))))
    return said, [p.grad for p in net.parameters()]


def attempt(action):
    try:
        return action()
    except (RuntimeError, ValueError) as error:
        return str(error)


def _exchange(p, q):
    p.data, q.data = q.data, p.data


MOVED = {
    "not": lambda p, q: None,
    "data": lambda p, q: setattr(p, "data", torch.arange(3.0)),
    "data of another shape": lambda p, q: setattr(p, "data", torch.rand(2, 3)),
    "data of another layout": lambda p, q: setattr(p, "data", torch.rand(6)[::2]),
    "data of another dtype": lambda p, q: setattr(p, "data", torch.rand(3).double()),
    "data exchanged": _exchange,
    "data in place": lambda p, q: p.data.mul_(2),
    "in place": lambda p, q: torch.no_grad()(p.add_)(1),
    "set_": lambda p, q: torch.no_grad()(p.set_)(torch.arange(5.0)[1:4]),
    "swapped": lambda p, q: torch.utils.swap_tensors(p, q),
    "frozen": lambda p, q: p.requires_grad_(False),
    "a hook": lambda p, q: p.register_hook(lambda g: g * 3),
}


@pytest.mark.parametrize("name", MOVED)
@parity
def test_repeated_call_on_a_parameter_that_is_changed(nn, optim, name):
    """What is computed, and what is reported of a change between a call and its backward."""
    p, q = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
    calls = [torch.exp, torch.Tensor.sin, lambda p: p * p, lambda p: p * 2, lambda p: p[:2]]
    found = []

    def walk(results):
        for y in results:
            said = attempt(lambda: y.sum().backward()) if y.requires_grad else "frozen"  # noqa: B023
            found.extend([y.detach().clone(), said, p.grad is None or p.grad.clone()])
            p.grad = None

    for i in range(10):
        before = [call(p) for call in calls]
        if "another" in name or name == "swapped":  # then it may not have a graph
            walk(before)
            before.clear()
        if i == 6:
            MOVED[name](p, q)
        walk(before + [call(p) for call in calls])
    return found


@parity
@pytest.mark.parametrize("shared", ["by a view", "by several views"])
def test_a_gradient_that_two_branches_share(nn, optim, shared):
    """The mask is empty at first, so it has no effect on the gradients when the walk is bound."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 6)
    found = []
    for i in range(8):
        layer.zero_grad()
        h = layer(torch.randn(3, 4))
        mask = torch.rand(3, 6) > 0.5 if i > 5 else torch.zeros(3, 6, dtype=torch.bool)
        if shared == "by a view":
            a = torch.tanh(h)
            b = h.sin().reshape(6, 3).masked_fill(mask.reshape(6, 3), 0.0).view(3, 6)
        else:
            b = h.cos().masked_fill(mask, 0.0)
            a = torch.stack([row.tanh() for row in h.unbind(0)])
        torch.sigmoid(a + b).sum().backward()
        found.append(layer.weight.grad.clone())
    return found


@parity
@pytest.mark.parametrize("function", ["clamp", "lerp", "weighted loss"])
def test_one_tensor_in_two_places_and_later_two(nn, optim, function):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    call = {
        "clamp": lambda y, a, b: torch.clamp(y, a, b),
        "lerp": lambda y, a, b: torch.lerp(a, b, y),
        "weighted loss": nn.functional.binary_cross_entropy_with_logits,
    }[function]
    found = []
    for i in range(8):
        layer.zero_grad()
        a = torch.rand(3, 4)
        call(layer(torch.randn(3, 4)), a, a if i < 5 else torch.rand(3, 4)).sum().backward()
        found.append(layer.weight.grad.clone())
    return found


@parity
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_mode_of_the_script_keeps_of_a_net(nn, optim, grad):
    """A TorchFunctionMode collects activations, none of which may be overwritten afterwards."""

    class Collect(torch.overrides.TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.kept = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            # The functions of this name, in the mirror and in PyTorch, return the activations.
            if getattr(func, "__name__", "") in ("tanh", "relu", "sigmoid"):
                self.kept += [args[0], out]
            return out

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid()
    )
    kept = []
    for i in range(10):
        with Collect() if i > 5 else contextlib.nullcontext() as mode, torch.set_grad_enabled(grad):
            net(torch.randn(2, 3))
        kept += [t.detach() for t in mode.kept] if mode is not None else []
    return kept


@parity
def test_swapped_operands(nn, optim):
    """A repeated `y * plain` is not used for `plain * y`."""
    w, plain = nn.Parameter(torch.ones(3)), torch.arange(3.0)
    y = w * 1
    made = [y * plain for _ in range(5)]
    made += [plain * y for _ in range(5)]
    sum(made).sum().backward()
    return made, w.grad


# -- calls of varying shape ------------------------------------------------------------------

LENGTHS = [*range(1, 25), 3, 24, 7]  # more than there are signatures for


@parity
def test_a_loop_that_writes_into_slices(nn, optim):
    """A fractional derivative: each step sums one term more than the last."""
    u = nn.Parameter(torch.randn(24))
    weights = torch.rand(24)
    optimizer = optim.SGD([u], lr=0.1)
    for _ in range(3):
        d = torch.zeros(24)
        v = torch.tanh(u)
        for k in range(24):
            d[k] = weights[: k + 1] @ v[: k + 1].flip(0)
        d[3:7] = v[:4]
        d[::5] = v.sum()
        optimizer.zero_grad()
        (d * d).sum().backward()
        optimizer.step()
    return d, d.grad_fn.name(), u, u.grad


@parity
def test_a_matrix_filled_by_rows_and_columns(nn, optim):
    """As hooks see it, the gradient of a row or column has PyTorch's strides."""
    p = nn.Parameter(torch.randn(5, 6))
    seen = []
    for _ in range(3):
        full, q = torch.zeros(5, 6), p * 2
        for k in range(5):
            row = q[k] * k
            row.register_hook(lambda g: seen.append((g.clone(), g.stride())))
            full[k] = row
        for k in range(6):
            column = q[:, k : k + 1].exp()
            column.register_hook(lambda g: seen.append((g.clone(), g.stride())))
            full[:, k : k + 1] = column
        (full * torch.arange(30.0).view(5, 6)).sum().backward()
    return seen, p.grad


OPERATIONS = {
    "slices": lambda nn, x, n: x[1:] * 2 - x[:-1],
    "tuples": lambda nn, x, n: x[..., 1] + x[:, None, 2].sum(1),
    "integers": lambda nn, x, n: x[n - 1] * x[-1],
    "matrices": lambda nn, x, n: x @ x.t() @ x,
    "matrices by columns": lambda nn, x, n: torch.mm(x.t(), x.t().contiguous().t()),
    "vectors": lambda nn, x, n: x.t() @ torch.arange(float(n)) + x[0] @ x.t()[:, :3].mean(1),
    "softmax": lambda nn, x, n: torch.log(torch.softmax(x, 0)) + nn.functional.log_softmax(x, 1),
    "reductions": lambda nn, x, n: (
        x.sum() + x.mean(0, keepdim=True) + x.sum(1).pow(2).mean() + x.amax()
    ),
    "numbers": lambda nn, x, n: (2 - x) / n + x * n + x**2 + 2.0**x,
    "none": lambda nn, x, n: torch.clamp(x, min=None, max=0.5).squeeze().flip(0),
    "several": lambda nn, x, n: torch.cat([*x.unbind(1), x.max(1)[0]]),
    "cat": lambda nn, x, n: torch.cat([x, x.detach(), -x]).view(-1).tanh(),
    "masks": lambda nn, x, n: torch.where(x > 0, x, x.exp()) + x.masked_fill(x < 0, 1.0),
    "indices": lambda nn, x, n: x[torch.arange(n) // 2] * x.gather(1, torch.zeros(n, 1).long()),
    "in place": lambda nn, x, n: (x * 1).mul_(2).add_(x),
    "loss": lambda nn, x, n: nn.functional.mse_loss(x, x.detach() + 1, reduction="none"),
    "classes": lambda nn, x, n: nn.functional.cross_entropy(x, torch.arange(n) % 4),
    "linear": lambda nn, x, n: nn.functional.linear(x, x[:1], x[0, :1]),
    "batches": lambda nn, x, n: nn.functional.linear(x[None].expand(2, n, 4), x[:2].detach(), None),
    "silu": lambda nn, x, n: nn.functional.silu(x),
    "layer norm": lambda nn, x, n: nn.functional.layer_norm(x, (4,)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@parity
def test_operations_on_sequences_of_varying_length(nn, optim, name):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(24, 4))
    labels = []
    for n in LENGTHS:
        y = OPERATIONS[name](nn, torch.sigmoid(w[:n]), n)
        labels.append(y.grad_fn.name())
        (y * torch.arange(float(y.numel())).view(y.shape)).sum().backward()
    return labels, w.grad


@parity
def test_layers_on_sequences_of_varying_length(nn, optim):
    torch.manual_seed(0)
    layer, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    weight, frozen = nn.Parameter(torch.randn(24, 4)), nn.Parameter(torch.randn(4, 4))
    results = []
    for i, n in enumerate(LENGTHS):
        frozen.requires_grad_(i % 3 == 0)  # the same kinds of arguments, but others require grad
        layer.bias.requires_grad_(i % 2 == 0)
        h = torch.relu(layer(weight[:n])) @ frozen
        h = norm(h) * layer.weight[0] + (torch.randn(n, 4) if i % 4 else h.detach())
        h.sum().backward()
        results.append(h.detach())
    return results, [p.grad for p in (*layer.parameters(), weight, frozen)]


def _changed(nn, v):
    y = torch.exp(v)
    y.mul_(2)
    return y


def _base_changed(nn, v):
    base = v * 1
    piece = base[1:]
    base[0] = 5.0
    base.mul_(2)
    return piece * piece


def _view_changed(nn, v):
    base = v * 1
    kept = base * base
    base[1:].add_(1)
    return kept


def _of_inference(nn, v):
    with torch.inference_mode():
        other = torch.ones(len(v))
    return v * other


def _twice(nn, v):
    y = v * v
    y.sum().backward()
    return y


REFUSED = {
    "result changed": _changed,
    "base changed": _base_changed,
    "view changed": _view_changed,
    "inference": _of_inference,
    "twice": _twice,
    "shapes": lambda nn, v: v + torch.ones(len(v) + 1),
    "types": lambda nn, v: torch.dot(v, v.double()),
}


@pytest.mark.parametrize("name", REFUSED)
@parity
def test_errors_on_sequences_of_varying_length(nn, optim, name):
    w = nn.Parameter(torch.rand(24))
    said = []
    for n in LENGTHS[1:]:
        torch.exp(w[:n]).mul(2).sum().backward()  # the same calls without an error
        (w[:n] * torch.ones(n)).sum().backward()
        try:
            REFUSED[name](nn, w[:n] * 2).sum().backward()
        except RuntimeError as error:
            said.append(str(error))
    return said, w.grad


@parity
def test_a_frozen_parameter_that_was_given_a_gradient(nn, optim):
    """After `copy_` the parameter's gradient goes to the tensor that was copied into it."""
    w = nn.Parameter(torch.randn(4))
    results = []
    for n in LENGTHS[:20]:
        frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
        if n % 2:
            frozen.copy_(w * 3)
        (w.exp()[: n % 4 + 1].sum() * frozen).sum().backward()
        results.append(frozen.requires_grad)
    return results, w.grad


@parity
def test_hooks_on_calls_of_varying_shape(nn, optim):
    w = nn.Parameter(torch.randn(24))
    seen = []
    for n in LENGTHS:
        y = torch.tanh(w[:n])
        z = y.flip(0) * y
        y.retain_grad()
        z.register_hook(lambda g: seen.append(g.clone()) or g * 2)
        z.grad_fn.register_hook(lambda gx, gy: seen.append([g.clone() for g in (*gx, *gy)]))
        z.sum().backward(retain_graph=True)
        z.sum().backward()
        seen.append(y.grad)
    return seen, w.grad


@parity
def test_a_tensor_saved_twice_and_later_two_tensors(nn, optim):
    """A walk may compute something once for a tensor saved twice, not for two equal tensors."""
    w = nn.Parameter(torch.rand(3, 4))
    v = nn.Parameter(torch.rand(4, 4))
    one, found = torch.rand(3, 4), []
    for step in range(10):
        other = one if step < 5 or step == 8 else torch.rand(3, 4)
        w.grad = v.grad = None
        h = torch.tanh(w) @ v.t()
        loss = (h * one).sum() + (h * other).sum() + (torch.tanh(h) * torch.tanh(h.clone())).sum()
        (slope,) = torch.autograd.grad(loss, w, create_graph=True)
        ((slope * one).sum() * 2 + (slope * other).pow(2).sum()).backward()
        found += [slope, w.grad, v.grad, w.grad.is_contiguous(), v.grad._is_view()]
        if step == 8:
            (slope,) = torch.autograd.grad((torch.tanh(w) @ v.t()).sum(), w, create_graph=True)
            with torch.no_grad():
                v.mul_(2)
            try:
                slope.sum().backward()
            except RuntimeError as error:
                found.append(type(error))
    return found


@parity
def test_calls_whose_arguments_are_others_in_turn(nn, optim):
    """The latest call of its kind is tried first; the others must be found as well."""
    torch.manual_seed(0)
    v, w = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    frozen = nn.Parameter(torch.randn(3, 4), requires_grad=False)
    h = torch.tanh(v)
    others = [h, v, w, frozen, torch.randn(3, 4), torch.randn(3, 1), torch.randn(3, 4).double()]
    others += [2, 2.0, -0.0, w[:, :1], h.t().exp().t(), torch.randn(4, 3).t()]
    results = []
    for _ in range(4):
        for other in others:
            y = h * other
            results.append(
                (y, y.grad_fn.name(), [n and n.name() for n, _ in y.grad_fn.next_functions])
            )
            (y.sum() + (other * h).sum() + (h / w - other).sum()).backward(retain_graph=True)
    return results, v.grad, w.grad


@parity
def test_an_operand_that_comes_to_carry_a_gradient(nn, optim):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4))
    results = []
    frozen = [nn.Parameter(torch.ones(4), requires_grad=False), torch.ones(4)]
    for other in frozen:
        for i in range(8):
            if i == 6:
                other.copy_(w * 3)
            y = torch.exp(w) * other
            y.sum().backward()
            results.append((y, other.requires_grad, w.grad.clone()))
            if i == 4:
                other.add_(1)
    return results


@parity
def test_a_call_that_came_before_saves_a_tensor_of_inference_mode(nn, optim):
    w = nn.Parameter(torch.randn(4))
    with torch.inference_mode():
        made_there = torch.ones(4)
    return [attempt(lambda x=x: (w * x).detach()) for x in [*torch.ones(5, 4), made_there]]


@parity
def test_saved_by_a_call_that_came_before_and_changed_since(nn, optim):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4))
    said = []
    for i in range(6):
        x, other = w * 2, torch.ones(4)
        y = torch.exp(x * other)
        (y if i == 3 else other if i == 4 else x).add_(1)
        try:
            y.sum().backward()
        except RuntimeError as error:
            said.append(str(error))
    return said, w.grad


@parity
def test_products_with_weights_in_other_memory(nn, optim):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    results = []
    for i in range(12):
        if i % 3:
            net.weight.data = torch.randn(2, 3) if i % 2 else torch.randn(3, 2).t()
            net.bias.data = net.bias.data - 1
        y = net(x)
        with torch.no_grad():
            results.append(net(x))
        if i % 4 == 1:
            net.weight.data = torch.randn(2, 3)  # the graph keeps the weight that was used
        y.square().sum().backward()
        results.append((y, net.weight.grad, net.bias.grad))
        net.zero_grad()
    return results


TARGETS = {
    "CrossEntropyLoss": lambda n: torch.randint(2, (n,)),
    "NLLLoss": lambda n: torch.randint(2, (n,)),
    "SmoothL1Loss": lambda n: torch.randn(n, 2),
    "BCEWithLogitsLoss": lambda n: torch.rand(n, 2),
}


@pytest.mark.parametrize("name", TARGETS)
@parity
def test_a_loss_called_again_with_other_arguments(nn, optim, name):
    """As a module and as a function, with other batches, options and targets in between."""
    net, criterion = Wired.of(nn), getattr(nn, name)()
    function = {"SmoothL1Loss": "smooth_l1_loss", "CrossEntropyLoss": "cross_entropy"}.get(name)
    found, names = [], []
    for i in range(18):
        n = 3 if i in (6, 15) else 5
        criterion.reduction = "sum" if i in (9, 10) else "mean"
        if i == 12:
            criterion.weight = torch.rand(2) if name != "SmoothL1Loss" else None
        out, target = net(torch.randn(n, 3)), TARGETS[name](n)
        loss = criterion(out, target)
        if function is not None and i % 2:
            loss = loss + getattr(nn.functional, function)(out, target, reduction="sum")
        net.zero_grad()
        loss.backward()
        found.append([loss.detach(), *[p.grad.clone() for p in net.parameters()]])
        if i == 8:
            names = [loss.grad_fn.name(), loss.grad_fn.next_functions[0][0].name()]
    return found, names, attempt(lambda: criterion(net(torch.randn(5, 3)), TARGETS[name](4)))


@parity
def test_the_second_derivative_of_a_loss_called_again(nn, optim):
    net, criterion, found = nn.Linear(3, 4).double(), nn.CrossEntropyLoss(), []
    for _ in range(6):
        x, target = torch.randn(5, 3).double(), torch.randint(4, (5,))
        loss = criterion(net(x), target)
        (first,) = torch.autograd.grad(loss, net.weight, create_graph=True)
        found += torch.autograd.grad(first.pow(2).sum(), [*net.parameters()])
    return found


def test_what_a_loss_saved_may_not_be_changed():
    net, criterion = nnmirror.Linear(3, 4), nnmirror.CrossEntropyLoss()
    for i in range(6):
        target = torch.randint(4, (5,))
        loss = criterion(net(torch.randn(5, 3)), target)
        if i < 5:
            loss.backward()
    target.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@parity
def test_operators_with_something_else_on_the_left(nn, optim):
    layer, found = nn.Linear(3, 4), []
    lefts = [2, 0.5, True, torch.randn(5, 4), torch.randn(5, 4, requires_grad=True), torch.ones(4)]
    for _ in range(4):
        y = layer(torch.ones(5, 3))
        for op in (operator.add, operator.mul, operator.sub, operator.truediv):
            for left in lefts:
                z = op(left, y)
                found += [z.detach(), z.grad_fn.name(), len(z.grad_fn.next_functions)]
                found += torch.autograd.grad(z.sum(), layer.weight, retain_graph=True)
        found += [(y**2).detach(), (y**2).grad_fn.name()]
    with torch.no_grad():
        found += [3 - y, torch.ones(4) / y]
    return found, attempt(lambda: torch.ones(3) - y)


@parity
def test_repeated_second_derivatives_of_a_power(nn, optim):
    """A kernel may compute a mask in several steps, so the version of its result may be any."""
    w, found = nn.Parameter(torch.tensor(1.0)), []
    for _ in range(6):
        a = torch.tensor([1.0, 2.0, 0.3], requires_grad=True)
        y = a * w
        (first,) = torch.autograd.grad(
            ((y * y + 0.1) ** y.clamp(-2, 2)).sum(), a, create_graph=True
        )
        (second,) = torch.autograd.grad(first.sum(), a, create_graph=True)
        second.sum().backward()
        found += [first.detach(), second.detach(), a.grad]
    return found


@parity
def test_a_loss_called_again_with_another_tensor_in_place_of_a_repeated_one(nn, optim):
    """Code generated for `l1_loss(y, y)`, or for a weight that is the target, is not used for two.

    Cross-entropy has an exact form, so the test is run in default mode too, where code for losses
    is generated.
    """
    F, net, found = nn.functional, nn.Linear(3, 2), []
    x, other, t, w = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 2), torch.rand(5, 2)
    for i in range(9):
        net.zero_grad()
        y, z = net(x), net(other)
        loss = F.l1_loss(y, y if i < 7 else z)
        loss = loss + F.binary_cross_entropy_with_logits(y, t, t if i < 7 else w, pos_weight=t)
        loss = loss + F.cross_entropy(y, t, (t if i < 7 else w)[0])
        loss.backward()
        found.append([loss.detach(), *[p.grad.clone() for p in net.parameters()]])
    return found


class Reduction(enum.StrEnum):
    SUM = "sum"


@parity
def test_a_loss_called_again_warns_again_and_takes_options_of_any_class(nn, optim):
    F, net = nn.functional, nn.Linear(3, 2)
    x, t = torch.randn(5, 3), torch.rand(5, 2)
    found, given = [], []
    for _ in range(7):
        with warnings.catch_warnings(record=True) as log:
            warnings.simplefilter("always")
            out = net(x)
            found += [F.l1_loss(out, t, size_average=False), F.kl_div(out, t)]
            found += [
                F.cross_entropy(out, t, reduce=True),
                F.mse_loss(out, t, reduction=Reduction.SUM),
            ]
        given += [str(w.message) for w in log]
    return found, given


@parity
def test_an_input_of_inference_mode_is_refused_again(nn, optim):
    with torch.inference_mode():
        x, unmade = torch.randn(2, 4, 3), nn.Linear(3, 2).requires_grad_(False)
    layer, net, found = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.Tanh()), []
    for i in range(5):
        for run in (layer, net):
            given = x if i in (1, 4) else torch.randn(2, 4, 3)
            found.append(attempt(lambda g=given, run=run: run(g).sum()))
        used = unmade if i in (1, 4) else layer
        found.append(attempt(lambda f=used: f(torch.ones(4, 3, requires_grad=True)).sum()))
    return found


@pytest.mark.parametrize(
    "pool",
    [
        lambda nn: nn.MaxPool1d(2),
        lambda nn: nn.AvgPool1d(2),
        lambda nn: nn.AdaptiveAvgPool1d(2),
        lambda nn: nn.AdaptiveMaxPool1d(2),
        lambda nn: nn.LPPool1d(2, 2),
    ],
)
@parity
def test_a_run_of_layers_with_a_pool_that_records_several_calls(nn, optim, pool):
    net, found = nn.Sequential(nn.Linear(10, 8), pool(nn), nn.Tanh()), []
    for _ in range(6):
        net.zero_grad()
        y = net(torch.randn(2, 2, 10))
        y.sum().backward()
        found.append([y.detach(), *[p.grad.clone() for p in net.parameters()]])
    return found


COMPOSED = {
    "vector @ matrix": lambda h: h[0] @ torch.ones(6, 3),
    "matrix @ vector": lambda h: h @ torch.ones(6),
    "rows @ matrix": lambda h: h.view(1, 2, 6) @ torch.ones(6, 3),
    "batches": lambda h: h.view(2, 1, 6) @ torch.ones(2, 6, 3),
    "split": lambda h: h.split(2, 1)[1],
    "chunk": lambda h: torch.chunk(h, 3, dim=1)[2],
    "unbind": lambda h: h.unbind(1)[3],
    "narrow": lambda h: h.narrow(1, 1, 2),
    "select": lambda h: h.select(1, 2),
    "movedim": lambda h: h.movedim(0, 1),
    "T": lambda h: h.T,
    "kron": lambda h: torch.kron(h, h),
    "diff": lambda h: h.diff(),
    "outer": lambda h: torch.outer(h[0], h[1]),
    "einsum of a plain one": lambda h: torch.einsum("bi,io->bo", h, torch.ones(6, 2)),
    "einsum": lambda h: torch.einsum("bi,bi->b", h, h),
    "max": lambda h: h.max(1)[0],
    "topk": lambda h: h.topk(2)[0],
    "sort": lambda h: h.sort(descending=True)[0],
    "index": lambda h: h[torch.tensor([0, 1, 1]), torch.tensor([1, 2, 2])],
    "index and slice": lambda h: h[:, torch.tensor([1, 2, 2])],
    "mask": lambda h: h[h > 0],
    "clamp": lambda h: h.clamp(min=-0.5),
}


@pytest.mark.parametrize("name", COMPOSED)
@parity
def test_repeated_calls_of_a_composition(nn, optim, name):
    """Each time: results, gradients, the names in the graph, views of it changed in place."""
    layer, found = nn.Linear(4, 6), []
    for i in range(8):
        z = COMPOSED[name](layer(torch.randn(2, 4)) * 1.5)
        nodes = [z.grad_fn]
        for node in nodes:
            found.append(node.name().removeprefix("torch::autograd::"))
            nodes += [n for n, _ in node.next_functions if n is not None and n not in nodes]
        if i % 2 and name not in ("split", "chunk", "unbind"):  # PyTorch refuses these
            z.mul_(2)
        (z * z).sum().backward()
        found += [z.detach(), layer.weight.grad.clone()]
    return found


SPARSE = {
    "coo": lambda a: a.to_sparse(),
    "csr": lambda a: a.to_sparse_csr(),
    "csc": lambda a: a.to_sparse_csc(),
}


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.filterwarnings("ignore:Sparse")
@parity
def test_a_sparse_adjacency(nn, optim, layout):
    """A graph convolution. The adjacency differs from step to step, as between batches."""
    net, found = nn.Linear(3, 8), []
    optimizer = optim.SGD(net.parameters(), lr=0.01)
    for _ in range(8):
        dense = torch.rand(40, 40)
        adjacency, x = SPARSE[layout](dense * (dense > 0.7)), torch.randn(40, 3)
        loss = (adjacency @ net(x)).square().mean()
        loss = loss + (net(x).t() @ adjacency).square().mean()
        loss = loss + torch.addmm(net.bias, adjacency, net(x).t().contiguous().t()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found += [loss.detach(), net.weight.grad]
    return found, list(net.parameters())


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_walk_with_a_sparse_adjacency_is_bound(mode):
    net, adjacency = nnmirror.Linear(3, 4), torch.eye(5).to_sparse()
    for _ in range(6):
        loss = (adjacency @ net(torch.ones(5, 3))).square().mean()
        loss.backward()
    bound = loss.grad_fn.signature.walks.bound
    assert (bound is not None and bound.trusted) == (mode != "off")


def test_a_warning_comes_as_often_as_pytorchs(mode):
    """Once for each place, in a loop too."""
    counts = []
    for nn in (torch.nn, nnmirror):
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        net[0].register_full_backward_hook(lambda *given: None)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("default")
            for _ in range(40):
                net(torch.randn(2, 3)).square().mean().backward()
        counts.append(len(given))
    assert counts == [1, 1]


def test_graphs_that_hardly_come_again_are_left_to_the_generic_walk(mode, after_collection):
    """As where each expert gets the rows that a router chose: to bind each one costs more."""
    if mode == "bound at once":
        pytest.skip("every walk is bound then")
    experts = [nnmirror.Linear(2, 2) for _ in range(3)]
    before, numbers = set(bound_walks()), random.Random(0)
    made = []
    for _ in range(1200):
        rows = [numbers.randint(1, 8) for _ in experts]
        loss = sum(e(torch.ones(n, 2)).square().sum() for e, n in zip(experts, rows, strict=True))
        loss.backward()
        made.append(len([name for name in bound_walks() if name not in before]))
    assert made[-1] - made[600] <= made[600] / 2  # of 512 different graphs


def test_other_threads_may_change_the_warnings(mode):
    """A walk is bound without warnings, which another thread may reset meanwhile."""
    done = threading.Event()

    def reset():
        while not done.is_set():
            warnings.resetwarnings()

    with warnings.catch_warnings():
        thread = threading.Thread(target=reset)
        thread.start()
        try:
            for i in range(40):
                net = nnmirror.Linear(3, i + 1)
                for _ in range(4):
                    net(torch.ones(2, 3)).square().mean().backward()
        finally:
            done.set()
            thread.join()


@parity
def test_strides_of_a_dimension_of_length_one(nn, optim):
    """They choose the kernel of a product of matrices, and with it the last bits."""
    coefficients, base = nn.Parameter(torch.randn(3, 1, 6)), nn.Parameter(torch.randn(3, 1))
    scale = nn.Parameter(torch.ones(3, 1))
    found = []
    for _ in range(12):
        x, target = torch.randn(100, 3), torch.randn(100, 1)
        splines = torch.rand(100, 3, 6) * (torch.rand(100, 3, 6) > 0.4) * x[:, :, None]
        y = torch.einsum("ijk,jlk->ijl", splines, coefficients)
        z = base[None] * x.sigmoid()[:, :, None] + scale[None] * y
        deviation = torch.std(z.clone().permute(0, 2, 1), dim=0)
        parts = deviation / (deviation.sum(1, keepdim=True) + 1)
        loss = torch.mean((z.sum(1) - target) ** 2) + 0.001 * (deviation.sum() + parts.sum())
        coefficients.grad = None
        loss.backward()
        found.append(coefficients.grad)
    return found, [g.stride() for g in found]


SECOND = {
    "var_mean": lambda x: torch.var_mean(x)[1],
    "std_mean": lambda x: torch.std_mean(x)[1],
    "aminmax": lambda x: x.aminmax()[1],
    "slogdet": lambda x: torch.linalg.slogdet(x + 3 * torch.eye(3))[1],
}


@pytest.mark.parametrize("name", SECOND)
@parity
def test_backward_from_the_second_result_of_a_call(nn, optim, name):
    w, found = nn.Parameter(torch.rand(3, 3)), []
    for _ in range(6):
        w.grad = None
        SECOND[name](w * 2).backward()
        found.append(w.grad)
    return found
