"""A Sequential computed in one fused call behaves exactly as if each layer were called.

Each test runs with `fast.enabled` on and off, on PyTorch and on the mirror.
"""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch

import nnmirror

from .parity import cpu_only, exact_only, parity, same


@pytest.fixture(params=[True, False], ids=["as one", "each layer"], autouse=True)
def mode(request, monkeypatch):
    monkeypatch.setattr(nnmirror.fast, "enabled", request.param)
    monkeypatch.setattr(nnmirror.fast, "after", 1)
    return request.param


NETS = {
    "relu": lambda nn: [nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)],
    "ends in tanh": lambda nn: [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Tanh()],
    "begins with tanh": lambda nn: [nn.Tanh(), nn.Linear(3, 2)],
    "begins with leaky": lambda nn: [nn.LeakyReLU(0.2), nn.Linear(3, 2), nn.LeakyReLU(-0.5)],
    "leaky": lambda nn: [nn.Linear(3, 5), nn.LeakyReLU(0.1), nn.Linear(5, 2), nn.LeakyReLU(0)],
    "leaky below zero": lambda nn: [nn.Linear(3, 5), nn.LeakyReLU(-0.3), nn.Linear(5, 2)],
    "in place": lambda nn: [nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2), nn.LeakyReLU(inplace=True)],
    "in place at first": lambda nn: [nn.ReLU(inplace=True), nn.Linear(3, 2)],
    "two activations": lambda nn: [nn.Linear(3, 5), nn.Tanh(), nn.ReLU(), nn.Tanh(), nn.Linear(5, 2)],
    "linear only": lambda nn: [nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)],
    "no bias": lambda nn: [nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)],
    "one layer": lambda nn: [nn.Linear(3, 2)],
    "activations only": lambda nn: [nn.Tanh(), nn.ReLU()],
    "single features": lambda nn: [nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 2)],
    "nested": lambda nn: [nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Sequential(nn.Sequential(nn.Linear(4, 2)))],
    "shared layer": lambda nn: _shared(nn),
    "tied weights": lambda nn: _tied(nn),
    "double": lambda nn: [nn.Linear(3, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 2, dtype=torch.float64)],
    "bfloat16": lambda nn: [nn.Linear(3, 4, dtype=torch.bfloat16), nn.Tanh(), nn.Linear(4, 2, dtype=torch.bfloat16)],
    "with identity": lambda nn: [nn.Linear(3, 4), nn.Identity(), nn.ReLU(), nn.Linear(4, 2)],
    "empty inside": lambda nn: [nn.Linear(3, 4), nn.Sequential(), nn.ReLU(), nn.Linear(4, 2)],
    "sigmoid": lambda nn: [nn.Sigmoid(), nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2), nn.Sigmoid()],
    "ends in place": lambda nn: [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.ReLU(inplace=True)],
    "elu and silu": lambda nn: [nn.Linear(3, 5), nn.ELU(0.7), nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 2)],
    "called ones": lambda nn: [nn.Hardtanh(-0.5, 0.4), nn.Linear(3, 5), nn.CELU(2.0), nn.LogSigmoid(), nn.Linear(5, 8), nn.ReLU6(), nn.Linear(8, 2), nn.Hardswish()],
    "called at the end": lambda nn: [nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2), nn.ELU()],
    "dropout": lambda nn: [nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.4), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2), nn.Dropout(0.1)],
    "dropout in place": lambda nn: [nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4, inplace=True), nn.ReLU(inplace=True), nn.Linear(5, 2)],
    "in place on a linear": lambda nn: [nn.Linear(3, 5), nn.Linear(5, 5), nn.ELU(inplace=True), nn.ReLU(), nn.Linear(5, 2)],
    "batch norm": lambda nn: [nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.LeakyReLU(), nn.Linear(4, 2)],
    "softmax": lambda nn: [nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2), nn.Softmax(-1)],
    "begins with another": lambda nn: [nn.SiLU(), nn.Linear(3, 5), nn.LeakyReLU(0.3, inplace=True), nn.Linear(5, 2), nn.Tanh()],
    "a user's": lambda nn: [nn.Linear(3, 5), nn.ReLU(), _own(nn, lambda x: x * 2), nn.Linear(5, 2), nn.Sigmoid()],
    "a user's in place": lambda nn: [nn.Linear(3, 5), nn.Tanh(), _own(nn, lambda x: x.mul_(2)), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)],
    "a user's transposes": lambda nn: [nn.Linear(3, 4), nn.ReLU(), _own(nn, lambda x: x.t()), nn.Tanh(), nn.Linear(4, 2)],
    "a user's detaches": lambda nn: [nn.Linear(3, 5), nn.ReLU(), _own(nn, lambda x: x.detach()), nn.Linear(5, 2), nn.Tanh()],
    "nested others": lambda nn: [nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 4)), nn.Sequential(nn.Tanh()), nn.Linear(4, 2)],
    "tied over another": lambda nn: _tied(nn, nn.Hardtanh()),
    "shared over another": lambda nn: _shared(nn, nn.Hardtanh()),
    "none inside": lambda nn: [nn.Linear(3, 4), nn.ReLU(), None],
}  # fmt: skip


def _own(nn, function):
    class Own(nn.Module):
        def forward(self, x):
            return function(x)

    return Own()


def _shared(nn, *between):
    layer = nn.Linear(3, 3)
    return [layer, nn.ReLU(), *between, layer, nn.Tanh(), layer]


def _tied(nn, *between):
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    return [a, nn.Tanh(), *between, b, nn.Tanh()]


def made(nn, name):
    net = nn.Sequential()
    for i, layer in enumerate(NETS[name](nn)):
        net.add_module(str(i), layer)
    return net, next((p.dtype for p in net.parameters()), torch.float32)


@pytest.mark.parametrize("batch", [4, 1, 0, None, "leading", "transposed", "row of a column"])
@pytest.mark.parametrize("input_grad", [False, True, "tracked"])
@pytest.mark.parametrize("name", NETS)
@parity
def test_outputs_and_gradients(nn, optim, name, input_grad, batch):
    net, dtype = made(nn, name)
    shapes = {None: (3,), "leading": (2, 3, 3), "transposed": (3, 4), "row of a column": (3, 1)}
    x = torch.randn(shapes.get(batch, (batch, 3))).to(dtype)
    leaf = x
    if input_grad == "tracked":
        leaf = nn.Parameter(x)
        x = nn.functional.leaky_relu(leaf, 1.0)
    elif input_grad:
        leaf = x.requires_grad_()
    if batch in ("transposed", "row of a column"):
        x = x.t()
    seen = []
    if name == "in place at first" and input_grad is True:
        pytest.skip("in place into torch's own graph: refused")
    for _ in range(2):  # the second backward accumulates
        out = net(x * 1 if name == "in place at first" else x)
        if out.requires_grad:
            out.backward(torch.randn(out.shape).to(dtype))
        seen += [out, out._version]
    with torch.no_grad():
        seen.append(net(x * 1 if name == "in place at first" else x))
    return seen, leaf, dict(net.named_parameters())


def graph_of(name):
    torch.manual_seed(0)
    net, dtype = made(nnmirror, name)

    def names(node):
        return (
            node
            and (
                node.name(),
                node.needs_input_grad,
                node.outputs,
                [names(n) for n, _ in node.next_functions],
            )
            if isinstance(node, nnmirror.node.Node)
            else repr(type(node))
        )

    try:
        out = net(torch.randn(4, 3).to(dtype) * 1)
        if not out.requires_grad:
            return None
        loss = out.sum()
        below = names(loss.grad_fn)
        text = repr(out)
        loss.backward()
    except (RuntimeError, TypeError) as e:
        return str(e)
    return below, text, {k: p.grad for k, p in net.named_parameters()}


@pytest.mark.parametrize("name", NETS)
def test_graph_that_a_user_sees(name, monkeypatch):
    monkeypatch.setattr(nnmirror.fast, "enabled", True)
    fast = graph_of(name)
    monkeypatch.setattr(nnmirror.fast, "enabled", False)
    same(graph_of(name), fast, name)


@pytest.mark.parametrize("trained", range(5))
@parity
def test_frozen_layers(nn, optim, trained):
    net, _ = made(nn, "relu")
    for i, p in enumerate(net.parameters()):
        p.requires_grad_(i == trained)
    x = torch.randn(4, 3)
    out = net(x)
    x.add_(1)  # allowed if the first layer's weight requires no grad
    out.sum().backward()
    return out, dict(net.named_parameters())


def _replace(nn, net):
    net[2].weight = nn.Parameter(torch.ones(4, 5))


def _data(nn, net):
    net[2].weight.data = torch.ones(4, 5)


def _data_transposed(nn, net):
    net[0].weight.data = torch.randn(3, 5).t()
    net.zero_grad()  # PyTorch warns once of a .grad with other strides


def _freeze(nn, net):
    net[0].requires_grad_(False)


def _swap(nn, net):
    net[1] = nn.Tanh()


def _append(nn, net):
    net.append(nn.Tanh())


def _hook(nn, net):
    net[1].register_forward_hook(lambda m, a, o: o * 2)


def _unhook(nn, net):
    net[1].register_forward_hook(lambda m, a, o: o * 2).remove()


def _backward_hook(nn, net):
    net[2].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))


def _parameter_hook(nn, net):
    net[2].weight.register_hook(lambda g: g * 2)


def _patched(nn, net):
    net[1].forward = lambda x: x * 3


def _slope(nn, net):
    net[3] = nn.LeakyReLU(0.1)
    net(torch.ones(2, 3))
    net[3].negative_slope = 0.7


def _dict(nn, net):
    net[2]._parameters["weight"] = nn.Parameter(torch.ones(4, 5))


def _double(nn, net):
    net.double().float()


def _no_bias(nn, net):
    net[0].bias = None


def _global_hook(nn, net):
    net.handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: o * 1)


def _hooks_replaced(nn, net):
    net[1]._forward_hooks = type(net[1]._forward_hooks)()
    net[1].register_forward_hook(lambda m, a, o: o * 2)


def _swapped(nn, net):
    torch.utils.swap_tensors(net[2].weight, nn.Parameter(torch.ones(4, 5)))


def _resized(nn, net):
    with torch.no_grad():
        net[2].bias.set_(torch.ones(4))


def _share_memory(nn, net):
    net.share_memory()


CHANGES = [_swapped, _resized, _share_memory, _replace, _data, _data_transposed, _freeze, _swap, _append, _hook, _unhook, _backward_hook,
           _parameter_hook, _patched, _slope, _dict, _double, _no_bias, _global_hook, _hooks_replaced]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@parity
def test_net_changed_between_calls(nn, optim, change):
    net, _ = made(nn, "relu")
    x, outs = torch.randn(4, 3), []
    for step in range(3):
        if step == 1:
            change(nn, net)
        out = net(x)
        out.pow(2).sum().backward()
        outs.append(out)
    if hasattr(net, "handle"):
        net.handle.remove()
    return outs, dict(net.named_parameters())


@pytest.mark.parametrize(
    "what", ["first weight", "weight", "bias", "input", "output", "nothing", "frozen", "trained"]
)
@pytest.mark.parametrize("name", ["relu", "ends in tanh", "begins with tanh"])
@parity
def test_change_between_forward_and_backward(nn, optim, name, what):
    net, _ = made(nn, name)
    x = torch.randn(4, 3)
    if what == "trained":
        net[-1 if name != "ends in tanh" else -2].requires_grad_(False)
    out = net(x)
    if what in ("frozen", "trained"):
        for p in list(net.parameters())[-2:]:
            p.requires_grad_(what == "trained")
        if not out.requires_grad:
            return None
    with torch.no_grad():
        if what == "input":
            x.add_(1)
        elif what == "output":
            out.detach().add_(1)
        elif what not in ("nothing", "frozen", "trained"):
            layer = net[
                0
                if what == "first weight" and name != "begins with tanh"
                else -2
                if name == "ends in tanh"
                else -1
            ]
            (layer.bias if what == "bias" else layer.weight).add_(1)
    out.sum().backward()
    return dict(net.named_parameters())


@parity
def test_second_backward(nn, optim):
    net, _ = made(nn, "relu")
    loss = net(torch.randn(4, 3)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    seen = copy.deepcopy(dict(net.named_parameters()))
    loss.backward()
    return seen


@parity
def test_gradients_for_chosen_tensors(nn, optim):
    take = torch.autograd.grad if nn is torch.nn else nnmirror.grad
    net, _ = made(nn, "relu")
    x = torch.randn(4, 3, requires_grad=True)
    found = take(net(x).sum(), [net[2].weight, x])
    net(x).sum().backward(inputs=[net[0].bias])
    return found, x, dict(net.named_parameters())


@parity
def test_hooks_on_leaves_and_output_run_in_order(nn, optim):
    net, _ = made(nn, "relu")
    x, seen = nn.Parameter(torch.randn(4, 3)), []
    x.register_hook(lambda g: seen.append(("x", g.clone())))
    for name, p in net.named_parameters():
        p.register_hook(lambda g, name=name: seen.append((name, g.clone())))
    out = net(x)
    out.register_hook(lambda g: g * 2)
    out.retain_grad()
    (out * out).sum().backward()
    return seen, out.grad, x


@parity
def test_two_calls_and_a_shared_trunk_in_one_loss(nn, optim):
    trunk, head = made(nn, "relu")[0], nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    h = trunk(torch.randn(4, 3))
    again = trunk(head(h))
    (h.sum() + again.pow(2).sum() + head(h).sum() + trunk(torch.randn(2, 3)).mean()).backward()
    return dict(trunk.named_parameters()), dict(head.named_parameters())


@pytest.mark.parametrize("calls", [1, 2, 3, 5])
@parity
def test_one_net_called_several_times_in_a_loss(nn, optim, calls):
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    sgd, outs = optim.SGD(net.parameters(), lr=0.1), []
    for _ in range(4):
        sgd.zero_grad()
        h = torch.randn(4, 3)
        for _ in range(calls):
            h = net(h)
        nn.MSELoss()(h, torch.ones(4, 3)).backward()
        sgd.step()
        outs.append(h)
    return outs, dict(net.named_parameters())


@parity
def test_optimiser_steps(nn, optim):
    net, _ = made(nn, "ends in tanh")
    sgd, x, losses = optim.SGD(net.parameters(), lr=0.1), torch.randn(8, 3), []
    for _ in range(10):
        sgd.zero_grad()
        loss = nn.MSELoss()(net(x), torch.ones(8, 2))
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses, dict(net.named_parameters())


@parity
def test_references_are_left_alone_by_later_steps(nn, optim):
    net, _ = made(nn, "relu")
    sgd, held = optim.SGD(net.parameters(), lr=0.1), []
    for step in range(6):
        sgd.zero_grad()
        x = torch.randn((4, 7, 4, 2, 7, 4)[step], 3, requires_grad=step % 2 == 0)
        out, other = net(x), net(x)
        with torch.no_grad():
            held.append(net(x))
        loss = nn.MSELoss()(out, torch.ones(out.shape))
        loss.backward(retain_graph=step == 3)
        if step == 3:
            net(x).sum().backward()
            loss.backward()
        held += [x, out, loss, [p.grad for p in net.parameters()]]
        if step > 2:
            other.sum().backward()
            held.append(other)
        sgd.step()
    return held, dict(net.named_parameters())


def _set(g, value):
    torch.Tensor.set_(g, value)


# Operations on a .grad that must not affect the gradients of later steps.
DONE = {
    "require": lambda g: g.requires_grad_(),
    "unsqueeze": lambda g: g.unsqueeze_(0),
    "transpose": lambda g: g.t_(),
    "resize": lambda g: g.resize_(0),
    "grow": lambda g: g.resize_(64).zero_(),
    "exchange": lambda g: setattr(g, "data", g.data * 2),
    "set": lambda g: _set(g, torch.ones(g.shape)),
    "mark": lambda g: setattr(g, "tag", 1),
    "another class": lambda g: setattr(g, "__class__", type("Sub", (torch.Tensor,), {})),
    "fill its storage": lambda g: g.untyped_storage().fill_(0),
    "empty its storage": lambda g: g.untyped_storage().resize_(0),
    "add a sparse one": lambda g: g.add_(torch.ones(g.shape).to_sparse()),
    "add in place": lambda g: g.add_(1),
}


@pytest.mark.parametrize("done", DONE)
@pytest.mark.parametrize("which", [0, 1, 3, 6])
@parity
def test_changing_one_gradient_changes_no_other(nn, optim, done, which):
    """Changing one .grad changes no other gradient, and the next step's gradient is new."""
    net = nn.Sequential(
        nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)
    )  # fmt: skip
    sgd, seen, params = optim.SGD(net.parameters(), lr=0.1), [], list(net.parameters())
    for step in range(6):
        nn.MSELoss()(net(torch.randn(4, 3)), torch.ones(4, 2)).backward()
        g = params[which].grad
        seen += [g.storage_offset(), g.untyped_storage().nbytes(), g.requires_grad, g.shape]
        seen += [type(g).__name__, hasattr(g, "tag"), [p.grad.clone() for p in params]]
        if step in (2, 3):
            DONE[done](g)
            seen += [p.grad.clone() for p in params if p is not params[which]]
        else:
            sgd.step()
        sgd.zero_grad()
    return seen, dict(net.named_parameters())


@parity
def test_a_gradient_lives_as_long_as_somebody_holds_it(nn, optim):
    net, _ = made(nn, "relu")
    alive = []
    for _ in range(4):
        nn.MSELoss()(net(torch.randn(4, 3)), torch.ones(4, 2)).backward()
        held = weakref.ref(net[0].weight.grad)
        net.zero_grad()
        alive.append(held() is None)
    return alive


@parity
def test_gradients_with_new_data_while_the_old_is_held(nn, optim):
    net, _ = made(nn, "relu")
    sgd, held, before = optim.SGD(net.parameters(), lr=0.1), [], []
    for _ in range(6):
        sgd.zero_grad()
        nn.MSELoss()(net(torch.randn(4, 3)), torch.ones(4, 2)).backward()
        for p in net.parameters():
            held.append(p.grad.data)
            before.append(p.grad.clone())
            p.grad.data = p.grad.data / 2
        sgd.step()
    return held, before, dict(net.named_parameters())


@parity
def test_a_weight_transposed_between_forward_and_backward(nn, optim):
    """The gradient is that of the forward's weight, and has the new weight's strides."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    seen = []
    for _ in range(4):
        net.zero_grad()
        loss = nn.MSELoss()(net(torch.randn(4, 4)), torch.ones(4, 4))
        net[2].weight.data = net[2].weight.data.t()
        loss.backward()
        seen += [[p.grad.clone() for p in net.parameters()], net[2].weight.grad.stride()]
    return seen


@pytest.mark.parametrize("times", [1, 4])
@parity
def test_a_weight_of_another_shape_between_forward_and_backward(nn, optim, times):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    for _ in range(times):
        net.zero_grad()
        loss = nn.MSELoss()(net(torch.randn(4, 4)), torch.ones(4, 4))
    net[2].weight.data = net[2].weight.data.view(16)
    with pytest.raises(RuntimeError):  # PyTorch's message is an internal one
        loss.backward()


@parity
def test_changes_that_the_version_counter_misses(nn, optim):
    """Changes through NumPy, which the version counter misses: backward reads the new values."""
    net, _ = made(nn, "relu")
    seen = []
    for change in ("target", "output", "input") * 3:
        net.zero_grad()
        x, target = torch.randn(4, 3), torch.zeros(4, 2)
        out = net(x)
        loss = nn.MSELoss()(out, target)
        changed = {"target": target, "output": out.detach(), "input": x}[change]
        changed.numpy(force=True)[:] = 0.5
        loss.backward()
        seen.append([p.grad.clone() for p in net.parameters()])
    return seen


@parity
def test_an_output_with_new_data(nn, optim):
    net, _ = made(nn, "relu")
    seen = []
    for _ in range(4):
        net.zero_grad()
        out = net(torch.randn(4, 3))
        out.data = out.data.double()
        loss = nn.MSELoss()(out, torch.ones(4, 2, dtype=torch.float64))
        loss.backward()
        seen += [loss.detach(), [p.grad.clone() for p in net.parameters()]]
    return seen


@parity
def test_an_input_that_requires_grad_after_the_forward(nn, optim):
    net, _ = made(nn, "relu")
    seen = []
    for _ in range(4):
        net.zero_grad()
        x = torch.randn(4, 3)
        loss = nn.MSELoss()(net(x), torch.ones(4, 2))
        x.requires_grad_()
        loss.backward()
        seen.append([(p.grad.clone(), p.grad.requires_grad) for p in net.parameters()])
    return seen, x.grad


@parity
def test_classes_changed_in_the_middle(nn, optim):
    """A patched method or a new __class__ of a layer, as mocks and adapters set, takes effect."""
    (net, _), x = made(nn, "relu"), torch.randn(4, 3)
    seen = [net(x) for _ in range(3)]
    before = nn.ReLU.forward
    nn.ReLU.forward = lambda self, x: before(self, x) * 2
    try:
        seen += [net(x), net(x)]
    finally:
        nn.ReLU.forward = before
    seen.append(net(x))
    net[0].__class__ = type(
        "Doubled", (nn.Linear,), {"forward": lambda m, x: nn.Linear.forward(m, x) * 2}
    )
    seen += [net(x), net(x)]
    net[0].__class__ = nn.Linear
    return [*seen, net(x)]


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [
        ("ELU", "alpha", 0.3),
        ("Hardtanh", "max_val", 0.2),
        ("LeakyReLU", "negative_slope", 0.9),
        ("SiLU", "inplace", True),
    ],
)
@parity
def test_settings_of_activations_changed_in_the_middle(nn, optim, layer, name, value):
    net = nn.Sequential(nn.Linear(3, 8), getattr(nn, layer)(), nn.Linear(8, 2))
    x = torch.randn(8, 3)
    seen = [net(x) for _ in range(3)]
    setattr(net[1], name, value)
    for _ in range(2):
        net.zero_grad()
        seen.append(net(x))
        seen[-1].sum().backward()
        seen.append([p.grad.clone() for p in net.parameters()])
    return seen


MANY = {
    "relu": lambda nn: nn.ReLU(),
    "leaky": lambda nn: nn.LeakyReLU(0.3),
    "leaky below zero": lambda nn: nn.LeakyReLU(-0.5),
    "elu": lambda nn: nn.ELU(0.7),
    "tanh": lambda nn: nn.Tanh(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MANY)
@parity
@exact_only("a NaN goes one way or the other in ELU; test_exact.py has it by default")
def test_many_numbers(nn, optim, name, dtype):
    """Large tensors are masked by bit operations: also right for NaN, infinities, signed zeros."""
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42, -1e-42])
    x, g = torch.randn(70, 96).to(dtype), torch.randn(70, 96).to(dtype)
    x[:7, :49] = special.repeat(7).to(dtype)
    g[:7, :49] = special.repeat_interleave(7).to(dtype)
    layer, seen = MANY[name](nn), []
    for each in (x, x.t().contiguous().t()):
        leaf = nn.Parameter(each.clone(memory_format=torch.preserve_format))
        layer(leaf).backward(g)
        seen.append(leaf)
    net = nn.Sequential(nn.Linear(8, 64), MANY[name](nn), nn.Linear(64, 96), MANY[name](nn)).to(
        dtype
    )
    rows = torch.randn(70, 8).to(dtype)
    for _ in range(4):
        net.zero_grad()
        nn.MSELoss()(net(rows), g.nan_to_num(0.0, 1.0, -1.0)).backward()
        seen.append([p.grad.clone() for p in net.parameters()])
        net.zero_grad()
        net(rows).backward(g)
        seen.append([p.grad.clone() for p in net.parameters()])
    return seen


@parity
def test_bounds_in_the_wrong_order_are_told(nn, optim):
    net, seen = nn.Sequential(nn.Linear(2, 3), nn.Hardtanh(), nn.Linear(3, 3), nn.ReLU6()), []
    x = torch.ones(1, 2)
    for layer, name, value in ((1, "min_val", 2.0), (3, "max_val", -1.0)):
        net(x)
        before = getattr(net[layer], name)
        setattr(net[layer], name, value)
        try:
            net(x)
        except ValueError as e:
            seen.append(str(e))
        setattr(net[layer], name, before)
    return seen, net(x)


@parity
def test_an_attribute_that_a_layer_does_not_have(nn, optim):
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.GELU())
    net[1].inplace = net[3].inplace = True
    return net(torch.ones(1, 2))


@cpu_only("the device that is named is another")
@parity
def test_a_default_device_that_the_net_is_not_on(nn, optim):
    net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    x, t = torch.ones(64, 3), torch.ones(64, 2)
    optimizers = [
        getattr(optim, name)(net.parameters(), lr=0.1) for name in ("SGD", "Adam", "RMSprop")
    ]
    with torch.device("meta"):
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
                nn.MSELoss()(net(x), t).backward()
                optimizer.step()
    return dict(net.named_parameters())


@parity
def test_a_parameter_that_answers_torch_itself(nn, optim):
    class Own(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.detach:
                return "mine"
            return super().__torch_function__(func, types, args, kwargs or {})

    own = Own(torch.ones(2))
    return own.detach(), torch.Tensor.detach(own), own.size(), len(own)


@parity
def test_hooks_of_a_parameter_frozen_in_between(nn, optim):
    layer, log = nn.Linear(3, 2), []
    layer.weight.register_hook(lambda g: log.append(g.clone()))
    layer.weight.register_post_accumulate_grad_hook(lambda p: log.append(p.grad))
    loss = layer(torch.ones(1, 3)).sum()
    layer.weight.requires_grad_(False)
    loss.backward()
    return log


@parity
def test_operations_are_counted_as_they_are(nn, optim):
    from torch.utils.flop_counter import FlopCounterMode

    (net, _), x = made(nn, "relu"), torch.randn(4, 3)
    seen = []
    for _ in range(4):
        with FlopCounterMode(display=False) as counter:
            net(x)
        seen.append(counter.get_total_flops())
    return seen


@parity
def test_anomaly_detection_says_where_the_nan_is(nn, optim):
    (net, _), x = made(nn, "relu"), torch.randn(4, 3)
    seen = []
    for start in (1.0, float("nan")):
        for _ in range(3):
            with warnings.catch_warnings(), torch.autograd.detect_anomaly():
                warnings.simplefilter("ignore")
                out = net(x)
                try:
                    (out * start).sum().backward()
                except RuntimeError as e:
                    seen.append(str(e))
    return seen


HOLDS = {
    "itself": lambda g: g,
    "a view": lambda g: g.view(-1),
    "an alias": lambda g: g.detach(),
    "its data": lambda g: g.data,
    "an array": lambda g: g.numpy(force=True),
    "a capsule": lambda g: torch.utils.dlpack.to_dlpack(g),
    "its storage": lambda g: g.untyped_storage(),
    "a part of it": lambda g: g[1:],
}


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("which", [0, 1, 3, 5])
@parity
def test_a_gradient_that_is_held_in_any_way_is_left_alone(nn, optim, hold, which):
    """The memory of gradients is reused, but not while a reference to it exists."""
    net = nn.Sequential(
        nn.Linear(3, 5),
        nn.ReLU(),
        nn.Linear(5, 5),
        nn.ReLU(),
        nn.Linear(5, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
    )
    sgd, held, before = optim.SGD(net.parameters(), lr=0.1), [], []
    for step in range(7):
        sgd.zero_grad()
        nn.MSELoss()(net(torch.randn(4, 3)), torch.ones(4, 2)).backward()
        if step % 2:
            before.append([p.grad for p in net.parameters()][which].clone())
            held.append(HOLDS[hold]([p.grad for p in net.parameters()][which]))
        sgd.step()
    if hold == "a capsule":
        held = [torch.utils.dlpack.from_dlpack(h) for h in held]
    elif hold == "its storage":
        held = [torch.empty(0).set_(h) for h in held]
    return before, [torch.as_tensor(h) for h in held], dict(net.named_parameters())


@parity
def test_gradients_are_like_any_tensor(nn, optim):
    net, _ = made(nn, "relu")
    seen = []
    for _ in range(4):
        net.zero_grad()
        nn.MSELoss()(net(torch.randn(4, 3)), torch.ones(4, 2)).backward()
        for p in net.parameters():
            g = p.grad
            seen += [g, g._base, g._is_view(), g.is_leaf, g.requires_grad, g.stride(), type(g)]
            g.mul_(2).add_(p.detach())
    return seen, dict(net.named_parameters())


@pytest.mark.parametrize("micro", [2, 3, 4])
@parity
def test_gradients_that_are_added_up_over_several_batches(nn, optim, micro):
    net, _ = made(nn, "relu")
    sgd = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        for _ in range(micro):
            (nn.MSELoss()(net(torch.randn(4, 3)), torch.ones(4, 2)) / micro).backward()
            nn.MSELoss()(net(torch.randn(4, 3)), torch.ones(4, 2)).backward()
        sgd.step()
        sgd.zero_grad(set_to_none=step % 2 == 0)
    return dict(net.named_parameters())


@parity
def test_two_losses_on_one_output(nn, optim):
    net, _ = made(nn, "relu")
    mse, seen = nn.MSELoss(), []
    for order in ((0, 1), (1, 0), (0, 0, 1), (1, 0, 1)):
        net.zero_grad()
        out = net(torch.randn(4, 3))
        losses = mse(out, torch.ones(4, 2)), mse(out, torch.zeros(4, 2))
        for i in order[:-1]:
            losses[i].backward(retain_graph=True)
        losses[order[-1]].backward()
        seen += [*losses, [p.grad.clone() for p in net.parameters()]]
        try:
            losses[0].backward()
        except RuntimeError as e:
            seen.append(str(e))
    both = net(torch.randn(4, 3))
    (mse(both, torch.ones(4, 2)) + mse(both, torch.zeros(4, 2)) * 2).backward()
    return seen, dict(net.named_parameters())


@parity
def test_layers_frozen_between_forward_and_backward(nn, optim):
    net, _ = made(nn, "relu")
    for _ in range(3):
        nn.MSELoss()(net(torch.randn(4, 3)), torch.ones(4, 2)).backward()
        net.zero_grad()
    loss = nn.MSELoss()(net(torch.randn(4, 3)), torch.ones(4, 2))
    net.requires_grad_(False)
    net[0].requires_grad_(True)
    loss.backward()
    return dict(net.named_parameters())


@parity
def test_a_graph_that_was_looked_at_keeps_what_it_saved(nn, optim):
    net, _ = made(nn, "relu")
    for _ in range(3):
        net(torch.randn(4, 3)).sum().backward()
    out = net(torch.randn(4, 3))
    out.register_hook(lambda g: g * 2)
    first = net(torch.randn(4, 3))
    first.sum().backward()
    for _ in range(3):
        net(torch.randn(4, 3)).sum().backward()
    out.sum().backward()
    return dict(net.named_parameters())


@parity
def test_layers_that_do_not_fit(nn, optim):
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(4, 2))
    for _ in range(2):
        try:
            net(torch.randn(4, 3))
        except RuntimeError as e:
            error = str(e)
    return error


def by_hand(name):
    """Results of `net.backward(g)`: the gradients of input and parameters, and errors."""
    torch.manual_seed(0)
    net, dtype = made(nnmirror, name)
    x = torch.randn(4, 3).to(dtype)
    found = []

    def attempt(action):
        try:
            found.append(action())
        except RuntimeError as e:
            found.append(str(e))

    g = torch.randn(net(x).shape).to(dtype)
    attempt(lambda: net.backward(g))
    attempt(lambda: net.backward(g))
    if name in BACK_ONLY_AS_A_WHOLE or isinstance(found[0], str):
        return found, {k: (p.detach(), p.grad) for k, p in net.named_parameters()}
    net(x)
    children = list(net)
    for child in reversed(children):
        attempt(
            lambda child=child: child.backward(
                g if not found or child is children[-1] else found[-1]
            )
        )
    net(x)
    children[0](x)
    attempt(lambda: net.backward(g))
    with torch.no_grad():
        net(x)
    attempt(lambda: net.backward(g))
    return found, {k: (p.detach(), p.grad) for k, p in net.named_parameters()}


# A layer's own backward covers its last call alone, so these nets are not compared layer by layer.
BACK_ONLY_AS_A_WHOLE = {"shared layer", "shared over another"}


@pytest.mark.parametrize("name", sorted(NETS.keys() - {"none inside"}))
def test_driven_by_hand(name, monkeypatch):
    monkeypatch.setattr(nnmirror.fast, "enabled", True)
    fast = by_hand(name)
    monkeypatch.setattr(nnmirror.fast, "enabled", False)
    same(by_hand(name), fast, name)


def _hooked(nn, net, seen):
    for i, layer in enumerate(net):
        layer.register_forward_hook(
            lambda m, a, o, i=i: seen.append((i, a[0].clone(), o.clone(), o._version))
        )


def _pre(nn, net, seen):
    net[-1].register_forward_pre_hook(lambda m, a: (a[0] * 2,))


def _replaces(nn, net, seen):
    net[2].register_forward_hook(lambda m, a, o: torch.tanh(o))


def _looks(nn, net, seen):
    def hook(m, a, o):
        seen.append(o.grad_fn.name())
        o.retain_grad()
        o.register_hook(lambda g: seen.append(g.clone()))

    net[2].register_forward_hook(hook)


def _back(nn, net, seen):
    for layer in list(net)[:3]:
        layer.register_full_backward_hook(
            lambda m, gi, go: seen.append([None if g is None else g.clone() for g in (*gi, *go)])
        )


def _back_pre(nn, net, seen):
    net[1].register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))


def _for_a_while(nn, net, seen):
    hook = lambda m, a, o: seen.append(o.clone())  # noqa: E731
    handles = [net[1].register_forward_hook(hook)]

    def move(m, a):
        handles.pop().remove()
        if len(seen) < 3:
            handles.append(net[len(seen)].register_forward_hook(hook))
        else:
            handles.append(net[0].register_forward_hook(hook))

    net.register_forward_pre_hook(move)


HOOKS = [_hooked, _pre, _replaces, _looks, _back, _back_pre, _for_a_while]
LONG = ["relu", "leaky", "in place", "two activations", "dropout", "batch norm", "a user's", "nested others",
        "softmax", "sigmoid"]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", LONG)
@parity
def test_hooks_on_some_layers(nn, optim, name, hook):
    net, _ = made(nn, name)
    sgd, seen, outs = optim.SGD(net.parameters(), lr=0.1), [], []
    hook(nn, net, seen)
    for step in range(5):
        x = torch.randn(4, 3, requires_grad=step % 2 == 1)
        sgd.zero_grad()
        out = net(x)
        out.pow(2).sum().backward()
        sgd.step()
        outs += [out, x]
    if hook is not _looks:
        with torch.no_grad():
            outs.append(net(x))
    return outs, seen, dict(net.named_parameters()), dict(net.named_buffers())


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_driven_by_hand_with_a_hook(name, place, monkeypatch):
    def driven():
        torch.manual_seed(0)
        net, _ = made(nnmirror, name)
        seen, found = [], []
        net[place].register_forward_hook(lambda m, a, o: seen.append(o.clone()))
        for _ in range(2):
            net(torch.randn(4, 3))
            found.append(net.backward(torch.randn(4, 2)))
            net(torch.randn(4, 3))
            dy = torch.randn(4, 2)
            for layer in reversed(list(net)):
                dy = layer.backward(dy)
            found.append(dy)
        return found, seen, {k: p.grad for k, p in net.named_parameters()}

    monkeypatch.setattr(nnmirror.fast, "enabled", True)
    fast = driven()
    monkeypatch.setattr(nnmirror.fast, "enabled", False)
    same(driven(), fast, name)


@pytest.mark.parametrize("by", ["hook", "module"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@parity
def test_net_changed_in_the_middle_of_a_call(nn, optim, change, by):
    outs, due = [], []

    def meddle(x):
        if due:
            due.pop()(nn, net)
        return x * 1

    net, _ = made(nn, "relu")
    if by == "hook":
        net.insert(0, nn.Sigmoid())
        net[0].register_forward_hook(lambda m, a, o: meddle(o))
    else:
        net.insert(0, _own(nn, meddle))
    numbered = net[1:]  # the layers without the inserted one, so that indices stay the same
    error = None
    try:
        for step in range(4):
            if step == 2:
                due.append(lambda nn, net: change(nn, numbered))
            out = net(torch.randn(4, 3))
            out.pow(2).sum().backward()
            outs.append(out)
    except RuntimeError as e:
        error = str(e)
    if hasattr(numbered, "handle"):
        numbered.handle.remove()
    return outs, error, dict(net.named_parameters())


@pytest.mark.parametrize("what", ["swap", "append", "delete", "hook", "mode"])
@parity
def test_layers_swapped_in_the_middle_of_a_call(nn, optim, what):
    net, _ = made(nn, "relu")
    outs, due = [], []

    def meddle(module, args, out):
        if not due:
            return
        due.pop()
        if what == "swap":
            net[3] = nn.Tanh()
        elif what == "append":
            net.append(nn.Tanh())
        elif what == "delete":
            del net[4]
        elif what == "hook":
            net[3].register_forward_hook(lambda m, a, o: o * 2)
        else:
            torch.set_grad_enabled(False)

    net[1].register_forward_hook(meddle)
    error = None
    try:
        for step in range(4):
            if step == 2:
                due.append(1)
            out = net(torch.randn(4, 3))
            outs.append(out)
            if out.requires_grad:
                out.pow(2).sum().backward()
    except RuntimeError as e:
        error = str(e)
    finally:
        torch.set_grad_enabled(True)
    return outs, error, dict(net.named_parameters())


@pytest.mark.parametrize("name", LONG)
def test_a_mixed_net_is_freed_at_once(name):
    gc.collect()
    gc.disable()
    try:
        net, _ = made(nnmirror, name)
        net.insert(2, nnmirror.Hardtanh())
        net[1].register_forward_hook(lambda m, a, o: None)
        for shape in ((4, 3), (4, 3), (2, 3)):
            out = net(torch.randn(shape))
            out.sum().backward()
        layers = [weakref.ref(m) for m in net.modules()]
        node = weakref.ref(out._node)
        assert not any("_plan" in m.__dict__ for m in copy.deepcopy(net).modules())
        del out, net
        assert node() is None
        assert not any(layer() for layer in layers)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["relu", "a user's", "nested"])
def test_driven_by_hand_after_a_layer_was_taken_out(name, monkeypatch):
    def driven():
        torch.manual_seed(0)
        net, _ = made(nnmirror, name)
        out = net(torch.randn(4, 3))
        taken = net.pop(-1)
        dx = taken.backward(torch.ones(out.shape))
        for layer in reversed(list(net)):
            dx = layer.backward(dx)
        return dx, {k: p.grad for k, p in (*net.named_parameters(), *taken.named_parameters())}

    monkeypatch.setattr(nnmirror.fast, "enabled", True)
    fast = driven()
    monkeypatch.setattr(nnmirror.fast, "enabled", False)
    same(driven(), fast, name)


@pytest.mark.parametrize("name", ["relu", "a user's", "dropout"])
def test_a_layer_taken_out_is_gone(name):
    net, _ = made(nnmirror, name)
    net(torch.randn(4, 3))
    layer = weakref.ref(net[2])
    net[2] = nnmirror.Identity()
    assert layer() is None
    last = weakref.ref(net[-1])
    del net[-1]
    assert last() is None


def test_a_net_that_has_run_is_copied_pickled_and_freed_as_before():
    gc.collect()
    gc.disable()
    try:
        net = nnmirror.Sequential(nnmirror.Linear(3, 4), nnmirror.ReLU(), nnmirror.Linear(4, 2))
        x = torch.randn(4, 3)
        out = net(x)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert set(other.__dict__) == set(nnmirror.Sequential().__dict__)
            assert torch.equal(other(x), out)
            other(x).sum().backward()
            assert net[0].weight.grad is None
        del other
        gc.collect()  # cycles left by pickle and copy
        node, layer = weakref.ref(out._node), weakref.ref(net[0])
        out.sum().backward()
        names = [n.name() for n, _ in net(x).grad_fn.next_functions]
        assert len(names) == 3
        del out, net
        assert node() is None
        assert layer() is None
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_one_net_run_by_several_threads():
    net = nnmirror.Sequential(nnmirror.Linear(3, 8), nnmirror.Tanh(), nnmirror.Linear(8, 1))
    x = torch.randn(5, 3)
    expected = net(x).detach()
    wrong = []

    def work():
        for _ in range(100):
            out = net(x)
            out.sum().backward()
            if not torch.equal(out, expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert torch.equal(net[2].bias.grad, torch.tensor([2000.0]))


@parity
def test_weight_given_another_shape_in_the_same_memory(nn, optim):
    """A weight's cached layout is invalid once the weight has another shape."""
    net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    x = torch.randn(5, 4)
    first = net(x).detach()
    net[0].weight.data = net[0].weight.data.view(4, 2)
    try:
        return first, net(x)
    except RuntimeError as e:
        return first, str(e)
