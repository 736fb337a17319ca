"""nnmirror.watch records what hooks on PyTorch's model would record, and changes no result."""

import contextlib
import copy
import gc
import json
import pickle
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import nnmirror
from nnmirror import functional as F
from nnmirror import nn
from nnmirror.watch import Record

from . import test_sequential
from .parity import parity, same, trained

EVERY_HOOK = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooks_of(model):
    """All hooks on the modules and the parameters of a model."""
    on_modules = [h for m in model.modules() for name in EVERY_HOOK for h in getattr(m, name)]
    return on_modules + [p._leaf_hooks for p in model.parameters() if p._leaf_hooks is not None]


def sequential(lib):
    return lib.Sequential(
        lib.Linear(3, 5),
        lib.ReLU(inplace=True),
        lib.Sequential(lib.Linear(5, 4, bias=False), lib.LeakyReLU(0.1, inplace=True)),
        lib.Linear(4, 2),
        lib.Tanh(),
    )


def plain(lib):
    return lib.Sequential(lib.Linear(3, 6), lib.ReLU(), lib.Linear(6, 2), lib.Tanh())


def shared(lib):
    layer = lib.Linear(3, 3)
    return lib.Sequential(layer, lib.ReLU(), layer, lib.Tanh(), layer, lib.Linear(3, 2))


def tied(lib):
    net = lib.Sequential(lib.Linear(3, 3), lib.Tanh(), lib.Linear(3, 3), lib.Linear(3, 2))
    net[2].weight = net[0].weight
    return net


def frozen(lib):
    net = plain(lib)
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return net


def own_modules(lib):
    class Block(lib.Module):
        def __init__(self):
            super().__init__()
            self.inner = lib.Sequential(lib.Linear(3, 3), lib.ReLU(inplace=True), lib.Linear(3, 3))
            self.scale = lib.Parameter(torch.full((3,), 0.7))

        def forward(self, x, times=1):
            for _ in range(times):
                x = x + self.scale * torch.tanh(self.inner(x))
            return x

    class Net(lib.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Block(), lib.Linear(3, 2)
            self.shift = lib.Parameter(torch.ones(2))
            self.unused = lib.Parameter(torch.ones(2))

        def forward(self, x):
            x = self.block(self.block(x), times=2)
            return self.head(x) + self.shift

    return Net()


def not_layers(lib):
    return lib.Sequential(lib.Identity(), lib.Unflatten(1, (3, 1)), lib.Flatten(), plain(lib))


NETS = [sequential, plain, shared, tied, frozen, own_modules, not_layers]


def by_name(f):
    return f.__name__


@contextlib.contextmanager
def torch_hooks(model):
    """Records of a torch.nn model by hooks: what `watch` records of each call of a layer."""
    seen, handles, waiting, names = [], [], {}, dict(model.named_modules())

    def norm(t):
        return torch.linalg.vector_norm(t.detach()).item()

    def hook_parameter(p):
        def hook(grad):
            for record, name in waiting.pop(p, []):
                record["params"][name] = norm(grad)

        handles.append(p.register_hook(hook))

    for p in model.parameters():
        if p.requires_grad:
            hook_parameter(p)

    def after(name, module, args, out):
        if isinstance(module, torch.nn.Sequential):
            return
        record = {"layer": name, "shape": tuple(out.shape), "norm": norm(out), "grad": None}
        record["params"] = {}
        seen.append(record)

        def hook(grad):
            record["grad"] = norm(grad)
            for key, p in module._parameters.items():
                if p is not None and p.requires_grad:
                    record["params"][key] = None
                    waiting.setdefault(p, []).append((record, key))

        if out.requires_grad:
            out.register_hook(hook)

    for name, module in names.items():
        handles.append(
            module.register_forward_hook(lambda m, a, o, name=name: after(name, m, a, o))
        )
    yield seen
    for handle in handles:
        handle.remove()


def fields(record):
    return {
        "layer": record.layer,
        "shape": record.shape,
        "norm": record.norm,
        "grad": record.grad,
        "params": record.params,
    }


@pytest.mark.parametrize("make", NETS, ids=by_name)
def test_norms_are_those_that_hooks_on_pytorchs_model_see(make):
    found = []
    for lib, optim in ((torch.nn, torch.optim), (nn, nnmirror.optim)):
        torch.manual_seed(0)
        model = make(lib)
        x, t = torch.randn(4, 3), torch.randn(4, 2)
        with torch_hooks(model) if lib is torch.nn else nnmirror.watch(model) as w:
            # The last batch is smaller, as in an epoch.
            for n in (4, 4, 3):
                trained(lib, optim, model, x[:n], t[:n], steps=1)
        layers = w if lib is torch.nn else [r for r in w.records if r.operation is None]
        found.append(layers if lib is torch.nn else [fields(r) for r in layers])
    same(*found, "records")
    if make is not frozen:
        assert all(r["grad"] is not None for r in found[1] if r["params"])


@pytest.mark.parametrize("make", NETS, ids=by_name)
def test_records_are_the_same_however_the_backward_is_run(make, monkeypatch):
    """A bound backward gives the records of a generic one, also where hooks prevent binding."""

    def recorded(enabled):
        monkeypatch.setattr(nnmirror.fast, "enabled", enabled)
        torch.manual_seed(0)
        model, seen = make(nn), []
        first = next(p for p in model.parameters() if p.requires_grad)
        x, t = torch.randn(4, 3), torch.randn(4, 2)
        with nnmirror.watch(model, values=True) as w, nnmirror.watch(model, operations=False) as v:
            for step in range(16):
                out = model(x)
                loss = nn.MSELoss()(out, t)
                if step == 7:
                    out.register_hook(lambda g: g * 2)
                if step == 8:
                    handle = first.register_hook(lambda g: seen.append(g.clone()))
                if step == 9:
                    handle.remove()
                if step == 10:
                    nnmirror.grad(loss, first, retain_graph=True)
                if step in (5, 11):
                    loss.backward(retain_graph=True)
                if step == 12:
                    str(out.grad_fn)
                if step == 13:
                    first.requires_grad_(make is frozen)
                (loss if step < 14 else loss * 2).backward()
        assert [p._leaf_hooks for p in model.parameters() if p._leaf_hooks] == []
        return w.to_dict(), v.to_dict(), seen, dict(model.named_parameters())

    same(recorded(True), recorded(False), "records")


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("make", NETS, ids=by_name)
@parity
def test_watched_training_has_the_same_bits(nn, optim, make, momentum):
    model = make(nn)
    x, t = torch.randn(5, 3), torch.randn(5, 2)
    off = contextlib.nullcontext()
    with off if nn is torch.nn else nnmirror.watch(model):
        inside = trained(nn, optim, model, x, t, steps=3, momentum=momentum)
    return inside, trained(nn, optim, model, x, t, steps=2)


@pytest.mark.parametrize("input_grad", [False, True])
@pytest.mark.parametrize("name", test_sequential.NETS)
@parity
def test_watched_gradients_have_the_same_bits(nn, optim, name, input_grad):
    net, dtype = test_sequential.made(nn, name)
    x = torch.randn(4, 3).to(dtype)
    leaf = nn.Parameter(x) if input_grad else x
    seen = []
    off = contextlib.nullcontext()
    with off if nn is torch.nn else nnmirror.watch(net) as w:
        for _ in range(2):
            out = net(leaf * 1)
            if out.requires_grad:
                out.backward(torch.randn(out.shape).to(dtype))
            seen.append(out)
    assert off or not out.requires_grad or all(r.grad is not None for r in w.records[-1:])
    return seen, leaf, dict(net.named_parameters())


@pytest.mark.parametrize("make", NETS, ids=by_name)
def test_by_hand_gives_the_records_of_the_tape(make):
    """model.backward gives the records of loss.backward, except for shared, tied, frozen layers."""
    found, by_hand = [], []
    for hand, watched in ((True, False), (True, True), (False, True)):
        torch.manual_seed(0)
        model, criterion = make(nn), nn.MSELoss()
        x, t = torch.randn(4, 3), torch.randn(4, 2)
        with nnmirror.watch(model) if watched else contextlib.nullcontext() as w:
            for _ in range(2):
                loss = criterion(model(x), t)
                if hand:
                    by_hand.append(model.backward(criterion.backward()))
                else:
                    loss.backward()
        if hand:
            by_hand += [p.grad for p in model.parameters()]
        if watched:
            found.insert(0, [fields(r) for r in w.records])
    half = len(by_hand) // 2
    same(by_hand[:half], by_hand[half:], "gradients with and without")
    if make is shared:
        for record in (*found[0], *found[1]):
            assert all(record["params"].values())
            record["params"] = list(record["params"])
    if make in (frozen, not_layers):  # by hand, gradients are computed that the tape leaves out
        for tape, hand in zip(*found, strict=True):
            if tape["grad"] is None:
                assert hand.pop("grad") > 0
                tape.pop("grad")
    if make is tied:
        assert found[1][0]["params"]["weight"] != found[0][0]["params"]["weight"]
        for record in (*found[0], *found[1]):
            record["params"].pop("weight", None)
    same(*found, "records")


def test_a_bound_walk_that_differs_is_not_used(monkeypatch):
    """Each comparison fails, so that the generic walk does all the work."""
    monkeypatch.setattr(nnmirror.fast.trial, "same_layout_and_bits", lambda *_: False)
    monkeypatch.setattr(nnmirror.fast, "after", 3)
    torch.manual_seed(0)
    model, x, t = plain(nn), torch.randn(4, 3), torch.randn(4, 2)
    with nnmirror.watch(model) as w:
        for _ in range(8):
            nn.MSELoss()(model(x), t).backward()
    assert len({r.grad for r in w.records if r.layer == "3"}) == 1


LAYERS_WITHOUT_WEIGHTS_THAT_TRAIN = {
    "Dropout": lambda: nn.Dropout(),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "LayerNorm": lambda: nn.LayerNorm(4).requires_grad_(False),
    "BatchNorm2d": lambda: nn.BatchNorm2d(3).requires_grad_(False),
    "Softmax": lambda: nn.Softmax(1),
}


@pytest.mark.parametrize("name", LAYERS_WITHOUT_WEIGHTS_THAT_TRAIN)
def test_by_hand_through_layers_that_do_not_train(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYERS_WITHOUT_WEIGHTS_THAT_TRAIN[name]()

        def forward(self, x):
            return self.layer(x)

    model = Net()
    x, found = torch.randn(2, 3, 4, 4), []
    for watched in (False, True, True):
        torch.manual_seed(0)
        with nnmirror.watch(model) if watched else contextlib.nullcontext():
            found.append(model.layer.backward(torch.ones_like(model(x))))
    same(found[0], found[1], "unwatched and watched")
    same(found[0], found[2], "unwatched and watched")


def test_by_hand_without_the_tape():
    """The records of training without requires_grad, by model.forward and model.backward."""
    found = []
    for hand in (False, True):
        torch.manual_seed(0)
        model, criterion = plain(nn), nn.MSELoss()
        x, t = torch.randn(4, 3), torch.randn(4, 2)
        with nnmirror.watch(model) as w:
            for _ in range(3):
                model.zero_grad()
                if hand:
                    model.requires_grad_(False)
                    criterion.forward(model.forward(x), t)
                    model.backward(criterion.backward())
                else:
                    criterion(model(x), t).backward()
        found.append([(r.step, r.layer, r.norm, r.grad) for r in w.records])
    same(*found, "records")
    assert [len(step) for step in w.steps] == [4, 4, 4]


def dead_net():
    """After the ReLU, unit 0 is always zero, units 1 and 2 are alive, and unit 3 gets no gradient,
    since its weight in the next layer is zero."""
    net = nn.Sequential(
        nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 4), nn.LeakyReLU(), nn.Linear(4, 1)
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [1.0], [-1.0], [1.0]]))
        net[0].bias.copy_(torch.tensor([-9.0, 0.0, 0.0, 9.0]))
        net[2].weight.copy_(torch.eye(4))
        net[2].weight[3, 3] = 0
        net[2].bias.fill_(-0.5)
        net[2].bias[3] = -1
        net[4].weight.fill_(1)
    return net


@pytest.mark.parametrize("hand", [False, True])
def test_dead_units(hand):
    net = dead_net()
    x = torch.tensor([[1.0], [2.0], [-3.0]])
    with nnmirror.watch(net) as w:
        y = net(x)
        if hand:
            net.backward(torch.ones(3, 1))
        else:
            y.sum().backward()
    linear, relu, _, leaky, _ = w.records
    assert (relu.dead, relu.dead_grad) == (1 / 4, 2 / 4)
    # Units 0 and 3 are -0.5 and -1 for every sample; their gradients are small, but not zero.
    assert (leaky.dead, leaky.dead_grad) == (2 / 4, 0.0)
    assert (linear.dead, linear.dead_grad) == (None, None)


def test_a_saturated_tanh_passes_nothing_back():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    with torch.no_grad():
        net[0].weight.fill_(0)
        net[0].bias.copy_(torch.tensor([0.5, 20.0, -20.0]))
    with nnmirror.watch(net) as w:
        net(torch.randn(4, 2)).sum().backward()
    linear, tanh = w.records
    assert tanh.dead is None, "an output below zero says nothing of a Tanh"
    assert tanh.dead_grad == 2 / 3
    assert linear.grad == 1 - torch.tanh(torch.tensor(0.5)).item() ** 2 or linear.grad > 0


def test_units_are_the_features_of_the_last_dimension():
    relu = nn.ReLU()
    with nnmirror.watch(relu) as w:
        for shape in [(2, 2, 3), (3,), (), (0, 3), (3, 0)]:
            x = -torch.ones(shape, requires_grad=True)
            relu(nn.Parameter(x.detach()))
    assert [r.dead for r in w.records] == [1.0, 1.0, None, None, None]
    with nnmirror.watch(relu) as w:
        relu(torch.tensor([[[1.0, -1, -1, float("nan")]], [[-1, -1, -1, -1]]]))
    assert w.records[0].dead == 2 / 4


def test_the_norm_is_that_of_the_output_at_its_time():
    """The norm of a layer's output is taken before an in-place ReLU changes the output."""
    x, found = torch.randn(4, 3), []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 1))
        with nnmirror.watch(net) as w:
            net(x).sum().backward()
        found.append([fields(r) for r in w.records])
    same(*found, "records")
    assert found[0][0]["norm"] > found[0][1]["norm"]


# -- steps -----------------------------------------------------------------------------------


def test_records_of_a_step():
    torch.manual_seed(0)
    net = shared(nn)
    with nnmirror.watch(net) as w:
        for _ in range(2):
            net(torch.randn(4, 3)).sum().backward()
    assert [[(r.step, r.layer, r.call) for r in step] for step in w.steps] == [
        [(i, "0", 0), (i, "1", 0), (i, "0", 1), (i, "3", 0), (i, "0", 2), (i, "5", 0)]
        for i in (0, 1)
    ]
    assert w.records == w.steps[0] + w.steps[1]
    first = w.records[0]
    assert (first.module, first.inputs, first.shape) == ("Linear", ((4, 3),), (4, 3))
    assert first.params == w.records[2].params, "the whole gradient of the shared weight"
    assert isinstance(first, Record)
    again = json.loads(json.dumps(w.to_dict()))
    assert again[0]["backwards"][0]["params"] == first.params


def test_no_grad_makes_no_step():
    net = plain(nn)
    with nnmirror.watch(net) as w:
        for no_grad in (torch.no_grad, nnmirror.no_grad, torch.inference_mode):
            with no_grad():
                net(torch.randn(4, 3))
        net(torch.randn(4, 3)).sum().backward()
    assert len(w.steps) == 1


def test_a_step_without_backward_has_no_gradients():
    net = plain(nn)
    with nnmirror.watch(net) as w:
        net(torch.randn(4, 3))
        net(torch.randn(4, 3)).sum().backward()
    assert [r.grad is None for r in w.records] == [True] * 4 + [False] * 4
    assert w.records[0].params == {}
    assert w.records[0].dead_grad is None


def test_several_backwards_through_one_step():
    torch.manual_seed(0)
    net, x = plain(nn), torch.randn(4, 3)
    with nnmirror.watch(net) as w:
        y = net(x)
        y.sum().backward(retain_graph=True)
        y.sum().backward(retain_graph=True)
        (y * 3).sum().backward()
    (step,) = w.steps
    for record in step:
        one, two, three = record.backwards
        assert one == two
        assert three.grad == pytest.approx(3 * one.grad)
        assert record.grad == three.grad
        for name, norm in one.params.items():
            assert three.params[name] == pytest.approx(3 * norm)


def test_gradients_go_to_the_steps_they_came_through():
    torch.manual_seed(0)
    net = plain(nn)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    alone = []
    for x in (a, b):
        with nnmirror.watch(net) as w:
            net(x).sum().backward()
        alone.append([fields(r) for r in w.records])
    with nnmirror.watch(net) as w:
        one, two = net(a).sum(), net(b).sum()
        one.backward()  # not the latest call
        two.backward()
    same(alone, [[fields(r) for r in step] for step in w.steps], "one by one")
    net.zero_grad()
    with nnmirror.watch(net) as w:
        (net(a).sum() + net(b).sum()).backward()
    same(w.steps[0][0].params, w.steps[1][0].params, "the weight has one gradient")
    assert w.steps[0][0].params["weight"] == torch.linalg.vector_norm(net[0].weight.grad).item()


def test_a_parameter_not_reached_this_time():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(3)) for _ in range(2))

        def forward(self, x, both):
            return x * self.a * self.b if both else x * self.a

    net = Net()
    with nnmirror.watch(net) as w:
        for both in (False, True, False):
            net(torch.ones(3), both).sum().backward()
    root3 = torch.linalg.vector_norm(torch.ones(3)).item()
    assert [r.operation for r in w.steps[1]] == ["mul", None]
    assert [step[-1].params for step in w.steps] == [
        {"a": root3, "b": None},
        {"a": root3, "b": root3},
        {"a": root3, "b": None},
    ]


def test_parameters_frozen_thawed_and_replaced_inside():
    net = plain(nn)
    with nnmirror.watch(net) as w:
        net[0].weight.requires_grad_(False)
        net(torch.randn(4, 3)).sum().backward()
        net[0].weight.requires_grad_(True)
        net[0].bias = nn.Parameter(torch.zeros(6))
        net(torch.randn(4, 3)).sum().backward()
    assert [list(step[0].params) for step in w.steps] == [["bias"], ["weight", "bias"]]
    assert all(n > 0 for step in w.steps for n in step[0].params.values())
    assert hooks_of(net) == []


def test_several_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            y = self.layer(x)
            return y * 2, {"there": y + 1, "index": y.argmax(0)}

    net = Two()
    with nnmirror.watch(net) as w:
        y, more = net(torch.randn(3, 2))
        (y.sum() + (more["there"] * 3).sum()).backward()
    assert [(r.layer, r.output) for r in w.records] == [("layer", None), ("", 0), ("", 1)]
    assert [r.grad for r in w.records[1:]] == pytest.approx([6**0.5, 54**0.5])


@pytest.mark.parametrize("hand", [False, True])
def test_tuples_as_batches(hand):
    net = plain(nn)
    with nnmirror.watch(net) as w:
        ys = net((torch.randn(3), torch.randn(3)))
        if hand:
            net.backward((torch.ones(2), torch.ones(2)))
        else:
            sum(y.sum() for y in ys).backward()
    assert [(r.layer, r.output) for r in w.records] == [
        (str(i), k) for i in range(4) for k in (0, 1)
    ]
    assert [r.grad for r in w.records[-2:]] == pytest.approx([2**0.5] * 2)
    assert all(r.grad is not None and r.formula for r in w.records)


# -- on and off ------------------------------------------------------------------------------


def is_fused(net, x):
    """Whether the net, after repeated calls, is computed in one fused call."""
    for _ in range(20):
        y = net(x)
    return y._node.segment is not None


def test_hooks_are_gone_afterwards_and_the_fast_path_is_on_again():
    torch.manual_seed(0)
    net = plain(nn)
    x = torch.randn(4, 3)
    net(x)
    with nnmirror.watch(net) as w:
        y = net(x)
        assert hooks_of(net)
        assert y._node.segment is None, "watched, the layers are called one by one"
        y.sum().backward(retain_graph=True)
    assert hooks_of(net) == []
    assert not y.grad_fn.tensor_hooks[0]
    assert is_fused(net, x)
    y.sum().backward()
    assert len(w.records[0].backwards) == 1, "what happens outside is not recorded"
    with w:  # entered again, it continues
        net(x)
    assert len(w.steps) == 2
    assert hooks_of(net) == []


def test_other_hooks_stay():
    net, log = plain(nn), []
    net[0].register_forward_hook(lambda m, a, o: log.append("forward"))
    net[0].weight.register_hook(lambda g: log.append("weight"))
    with nnmirror.watch(net):
        net(torch.randn(4, 3)).sum().backward()
    net(torch.randn(4, 3)).sum().backward()
    assert log == ["forward", "weight"] * 2


def test_by_hand_across_the_end():
    net, again = plain(nn), plain(nn)
    again.load_state_dict(net.state_dict())
    x, g = torch.randn(4, 3), torch.randn(4, 2)
    with nnmirror.watch(net) as w:
        net(x)
    again(x)
    same(again.backward(g), net.backward(g), "dx")
    assert all(r.grad is None for r in w.records)


def test_an_exception_inside():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, fail=False):
            x = self.a(x)
            if fail:
                raise ValueError("forward failed")
            return self.b(x)

    net, x = Net(), torch.randn(4, 3)
    w = nnmirror.watch(net)
    with contextlib.suppress(ValueError), w:
        net(x)
        net(x, fail=True)
    assert hooks_of(net) == []
    assert [[r.layer for r in step] for step in w.steps] == [["a", "b"], ["a"]]
    with nnmirror.watch(net) as w:
        with pytest.raises(ValueError, match="forward failed"):
            net(x, fail=True)
        with pytest.raises(RuntimeError):
            net(torch.randn(4, 7))
        net(x).sum().backward()
        net(x).sum().backward()
    assert [[r.layer for r in step] for step in w.steps] == [["a"], ["a", "b"], ["a", "b"]]
    assert w.steps[0][0].grad is None


def test_two_watches_at_once():
    found = []
    for several in (False, True):
        torch.manual_seed(0)
        net, x = own_modules(nn), torch.randn(4, 3)
        with nnmirror.watch(net) as w:
            for hand in (False, True):
                if not several:
                    y = net(x)
                    net.backward(torch.ones(4, 2)) if hand else y.sum().backward()
                    continue
                with nnmirror.watch(net) as other, nnmirror.watch(net.block) as part:
                    y = net(x)
                    net.backward(torch.ones(4, 2)) if hand else y.sum().backward()
                same(
                    [fields(r) for r in w.steps[-1]],
                    [fields(r) for r in other.records],
                    "the other",
                )
                assert len(part.steps) == 2, "the block was called twice"
                whole = [r.grad for r in w.steps[-1] if r.layer.startswith("block")]
                same(whole, [r.grad for r in part.records], "the part")
        found.append(w.to_dict())
        assert hooks_of(net) == []
    same(*found, "with and without others")


def test_a_backward_that_is_refused_is_not_recorded():
    net = plain(nn)
    with nnmirror.watch(net) as w:
        net(torch.randn(4, 3))
        for wrong in (torch.ones(4, 3), None, "gradient"):
            with pytest.raises((RuntimeError, AttributeError)):
                net.backward(wrong)
        net.backward(torch.ones(4, 2))
        with pytest.raises(RuntimeError, match="second time"):
            net.backward(torch.ones(4, 2))
    assert [len(r.backwards) for r in w.records] == [1] * 4


@pytest.mark.parametrize("hand", [False, True])
def test_beside_hooks_that_change_things(hand):
    """Records are of a layer's own output and its gradient, whatever other hooks make of them."""
    torch.manual_seed(0)
    net, x = plain(nn), torch.randn(4, 3)
    expected = torch.linalg.vector_norm(net[0](x).detach()).item()
    net[0].register_forward_hook(lambda m, a, o: o * 0)
    if not hand:
        net[2].register_full_backward_hook(lambda m, gi, go: (gi[0] + 1,))
    with nnmirror.watch(net) as w:
        net[0].register_forward_hook(lambda m, a, o: o + 1)
        y = net(x)
        net.backward(torch.ones(4, 2)) if hand else y.sum().backward()
    (step,) = w.steps
    assert step[0].norm == expected
    assert step[0].grad == 0.0
    assert step[1].norm == pytest.approx(24**0.5)
    upstream = (1 - y.detach() ** 2) @ net[2].weight.detach() + (0 if hand else 1)
    assert step[1].grad == pytest.approx(upstream.norm().item())
    for record in (step[0], step[2]):
        for name, norm in record.params.items():
            grad = getattr(net[int(record.layer)], name).grad
            assert norm == torch.linalg.vector_norm(grad).item()


def test_errors():
    with pytest.raises(TypeError, match=r"watch takes an nnmirror.Module, not torch\.nn"):
        nnmirror.watch(torch.nn.Linear(2, 2))
    net = plain(nn)
    with nnmirror.watch(net) as w, pytest.raises(RuntimeError, match="is active already"), w:
        pass
    del net
    gc.collect()
    with pytest.raises(RuntimeError, match="has no model any more"), w:
        pass


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_copied_inside_is_not_watched(how):
    """A deep copy or a pickle of a watched model, as of the best model so far, has no hooks."""
    net, x = plain(nn), torch.randn(4, 3)
    with nnmirror.watch(net) as w:
        net(x).sum().backward()
        other = how(net)
        other(x).sum().backward()
    assert len(w.steps) == 1
    assert hooks_of(other) == []
    assert is_fused(other, x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))

    def forward(self, x):
        return x + self.inner(x)


def test_nothing_is_kept_alive():
    """A watch keeps no activation or model alive, and makes no reference cycles."""
    gc.collect()
    gc.disable()
    try:
        net, criterion = Residual(), nn.MSELoss()
        alive = []
        net.inner[0].register_forward_hook(lambda m, a, o: alive.append(weakref.ref(o)))
        with nnmirror.watch(net) as w:
            for hand in (False, True, False):
                loss = criterion(net(torch.randn(4, 3)), torch.randn(4, 3))
                net.backward(criterion.backward()) if hand else loss.backward()
                alive.append(weakref.ref(loss.grad_fn))
                del loss
                for module in (*net.modules(), criterion):
                    module.__dict__.pop("_call", None)  # a module always keeps its last call
                assert [r() for r in alive] == [None] * len(alive)
            gone = weakref.ref(net.inner[2])
            assert len(w._on_tensors) <= 2 * len(w.steps[-1]), "handles of the last step only"
        del net, module
        assert gone() is None
        assert gc.collect() == 0
        assert len(w.steps) == 3
    finally:
        gc.enable()


# -- what is shown ---------------------------------------------------------------------------


def test_formulas():
    class Cube(nnmirror.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return g * 3 * ctx.saved_tensors[0] ** 2

    class Documented(Cube):
        """y = x^3:  dx = 3 g x^2.  Saved: x."""

    def module(f):
        class Own(nn.Module):
            def forward(self, x):
                return f(x)

        return Own()

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    relu = "dx = g where y > 0, else 0 (0 at 0; a NaN lets g through)"
    linear = "db = sum of the rows of G,  dX = G W,  dW = G^T X"
    layers = {
        nn.Linear(3, 3): linear,
        nn.ReLU(inplace=True): relu,
        nn.ReLU(): relu,
        nn.LeakyReLU(): "dx = g where x > 0, else s g",
        nn.Linear(3, 3, bias=False): linear,
        nn.LeakyReLU(inplace=True): "dx = g where x > 0, else s g",
        nn.Tanh(): "dx = g (1 - y^2)",
        nn.Identity(): "dx = g",
        nn.Unflatten(1, (3, 1)): "dx = g viewed with the shape of x",
        nn.Flatten(): "dx = g viewed with the shape of x",
        nn.Flatten(1, 1): "dx = g, shaped back",
        module(torch.sin): "dx = g cos(x)",
        "sin(): between the layers of the next": "dx = g cos(x)",
        module(lambda x: torch.sin(x) + 1): "last of several: dx = g,  dy = alpha g",
        module(Documented.apply): "dx = 3 g x^2",
        module(Cube.apply): "Cube",
        Doubled(3, 3): "last of several: dx = g y,  dy = g x",
    }
    net = nn.Sequential(*[layer for layer in layers if not isinstance(layer, str)])
    with nnmirror.watch(net) as w:
        net(torch.randn(4, 3)).sum().backward()
    assert [r.formula for r in w.records] == list(layers.values())
    with nnmirror.watch(net[0]) as w:
        net[0].requires_grad_(False)
        net[0](torch.randn(4, 3))
    assert w.records[0].formula == linear
    assert w.records[0].layer == ""


def test_table():
    net = dead_net()
    with nnmirror.watch(net) as w:
        for _ in range(3):
            y = net(torch.tensor([[1.0], [2.0], [-3.0]]))
            y.sum().backward(retain_graph=True)
        y.sum().backward()
    assert w.table(0) == "\n".join(
        [
            "layer  module     shapes            formula",
            "0      Linear     (3, 1) -> (3, 4)  db = sum of the rows of G,  dX = G W,  dW = G^T X",
            "1      ReLU       (3, 4) -> (3, 4)  dx = g where y > 0, else 0 (0 at 0; a NaN lets g through)",
            "2      Linear     (3, 4) -> (3, 4)  db = sum of the rows of G,  dX = G W,  dW = G^T X",
            "3      LeakyReLU  (3, 4) -> (3, 4)  dx = g where x > 0, else s g",
            "4      Linear     (3, 4) -> (3, 1)  db = sum of the rows of G,  dX = G W,  dW = G^T X",
            "",
            "step  layer       |y|      |dy|  y <= 0  dx = 0  parameters' gradients",
            *_rows(w.steps[0]),
        ]
    )
    lines = w.table().split("\n")
    assert max(map(len, lines)) <= 100
    assert len(lines) == 5 + 3 + 4 * 5, "the second backward of the last step has its own"
    assert w.table(0, 2).split("\n") == lines[:13] + lines[18:]
    assert w.table(-1) == w.table(2)


def _rows(step):
    for r in step:
        dead = "" if r.dead is None else f"{r.dead:.0%}"
        none = "" if r.dead_grad is None else f"{r.dead_grad:.0%}"
        params = "  ".join(f"{name} {norm:.2e}" for name, norm in r.params.items())
        line = f"   {r.step}  {r.layer}      {r.norm:.2e}  {r.grad:.2e}  {dead:>6}  {none:>6}  {params}"
        yield line.rstrip()


def test_table_of_long_names_and_of_nothing():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for _ in range(12):
        inner = nn.ModuleDict({"some_long_name": inner})
    net = nn.Module()
    net.inner = inner
    for m in reversed(list(net.modules())[1:-3]):
        m.forward = lambda x, m=m: m["some_long_name"](x)
    net.forward = lambda x: net.inner(x)
    assert nnmirror.watch(net).table().split("\n") == [
        "layer  module  shapes  formula",
        "",
        "step  layer  |y|  |dy|  y <= 0  dx = 0  parameters' gradients",
    ]
    with nnmirror.watch(net) as w:
        net(torch.randn(3, 2)).sum().backward()
    assert len(w.records) == 2
    lines = w.table().split("\n")
    assert max(map(len, lines)) <= 100
    assert sum("some_long_name.0" in line for line in lines) == 2


def wide_net(blocks=6):
    """A net of user-defined modules, with more than 18 layers."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return x + torch.relu(self.inner(self.norm(x)))

    return nn.Sequential(nn.Linear(1, 4), *[Block() for _ in range(blocks)])


def seen(net, steps):
    with nnmirror.watch(net) as w:
        for scale in steps:
            (net(torch.tensor([[1.0], [-3.0]])) * scale).sum().backward()
    return w


@pytest.fixture
def strict(recwarn):
    """Fails if Matplotlib warns that it could not lay out the figure."""
    pytest.importorskip("matplotlib")
    yield
    assert not [w.message for w in recwarn if "layout" in str(w.message)]


def drawn(axes):
    return [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() != "None"]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.usefixtures("strict")
def test_plot(tmp_path):
    w = seen(dead_net(), (1.0, 0.0, float("inf")))
    assert w.steps[1][-1].grad == 0.0
    figure = w.plot(tmp_path / "seen.png")
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    output, grad, _, dead, dead_grad, legend = figure.axes
    assert [len(drawn(axes)) for axes in (output, grad, dead, dead_grad)] == [5, 5, 2, 2]
    assert {"0", "inf, NaN"} <= set(labels(grad.yaxis)), "what has no logarithm has a tick"
    assert not {"0", "inf, NaN"} & set(labels(output.yaxis))
    assert list(drawn(dead_grad)[0].get_ydata()) == [
        r.dead_grad for r in w.records if r.layer == "1"
    ]
    names = [text.get_text() for text in legend.get_legend().get_texts()]
    assert names == ["0 Linear", "1 ReLU", "2 Linear", "3 LeakyReLU", "4 Linear"]
    nnmirror.watch(dead_net()).plot(tmp_path / "nothing.png")


@pytest.mark.usefixtures("strict")
def test_plot_of_one_step_is_over_the_layers():
    w = seen(wide_net(), [1.0])
    figure = w.plot()
    (line,) = drawn(figure.axes[0])
    assert len(line.get_xdata()) == len(w.records)
    assert labels(figure.axes[0].xaxis)[:3] == ["0 Linear", "1.norm", "1.inner"]
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"


@pytest.mark.usefixtures("strict")
def test_plot_tells_many_layers_apart():
    w = seen(wide_net(), (1.0, 2.0))
    assert len(w.steps[0]) > 18
    figure = w.plot()
    looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in drawn(figure.axes[0])}
    assert len(looks) == len(w.steps[0])
    figure.canvas.draw()
    legend = figure.axes[5].get_legend().get_window_extent()
    assert legend.x1 <= figure.bbox.x1
    assert legend.y0 >= 0


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        nnmirror.watch(plain(nn)).plot("nowhere.png")


def test_in_a_notebook():
    net = nn.ModuleDict({"<b>": wide_net(1)})
    net.forward = lambda x: net["<b>"](x)
    assert "no step" in nnmirror.watch(net)._repr_html_()
    w = seen(net, (1.0, 0.0))
    shown = w._repr_html_()
    assert "&lt;b&gt;.1.inner" in shown
    assert "<b>.1" not in shown
    assert "step 0</th>" in shown
    assert "step 1</th>" in shown
    assert shown.count("<polyline") == len(w.steps[0])
    assert repr(w) == "<nnmirror.watch of ModuleDict: 2 steps, off>"
    assert seen(net, [1.0])._repr_html_().count("<tr>") == 2 + len(w.steps[0])


def test_a_long_formula_goes_on_in_the_next_line():
    formula = "dx = g, and that at such a length that no line of a table has room for all of it"

    class Long(nnmirror.Function):
        __doc__ = f"y = x:  {formula}."

        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g

    net = nn.Module()
    net.forward = lambda x: Long.apply(x)
    with nnmirror.watch(net) as w:
        net(torch.randn(3, 2, requires_grad=True))
    lines = w.table().split("\n")
    assert max(map(len, lines)) <= 100
    told = " ".join(line.split("  ")[-1].strip() for line in lines[1:3])
    assert told == w.records[0].formula == formula


# -- between the layers ------------------------------------------------------------------------


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        h = F.relu(self.first(x * 2))  # x * 2 is not recorded: nothing in it requires grad
        h = F.leaky_relu_(h + self.last(h))
        return (h.reshape(-1, 2, 2).transpose(1, 2) * 0.5).flatten(1) * self.scale


def test_operations_between_layers():
    torch.manual_seed(0)
    net, x = ByHand(), torch.randn(2, 3)
    with nnmirror.watch(net) as w:
        for _ in range(2):  # a first call, and a repeated one, which is recorded in another way
            y = net(x)
            y.retain_grad()
            y.sum().backward()
    assert [(r.layer, r.operation, r.call) for r in w.steps[0]] == [
        ("first", None, 0),
        ("", "relu", 0),
        ("last", None, 0),
        ("", "add", 0),
        ("", "leaky_relu", 0),
        ("", "view", 0),
        ("", "transpose", 0),
        ("", "mul", 0),
        ("", "unsafe_view", 0),
        ("", None, 0),
    ]
    _, relu, _, add, leaky = w.steps[0][:5]
    with torch.no_grad():
        h = torch.relu(net.first(x * 2))
        h2 = h + net.last(h)
        assert relu.norm == torch.linalg.vector_norm(h).item()
        assert add.norm == torch.linalg.vector_norm(h2).item(), "before it was changed in place"
        assert leaky.norm == torch.linalg.vector_norm(F.leaky_relu(h2)).item()
    assert relu.formula.startswith("dx = g where y > 0")
    assert relu.inputs == ((2, 4),)
    assert relu.dead is not None
    assert relu.dead_grad is not None
    assert w.steps[0][-1].grad == torch.linalg.vector_norm(y.grad).item()
    assert all(r.grad is not None for r in w.records)
    same(
        [(r.layer, r.operation, r.norm, r.grad) for r in w.steps[0]],
        [(r.layer, r.operation, r.norm, r.grad) for r in w.steps[1]],
        "the second step",
    )
    with nnmirror.watch(net, operations=False) as w:
        net(x).sum().backward()
    assert [r.layer for r in w.records] == ["first", "last", ""]


def test_operations_are_seen_in_the_call_of_the_model_alone():
    net, x = ByHand(), torch.randn(2, 3)
    with nnmirror.watch(net) as w:
        with contextlib.suppress(RuntimeError):
            net(torch.randn(2, 7))
        before = len(w.records)
        torch.relu(net.scale)
        assert torch.overrides._get_current_function_mode_stack() == []
        with torch.no_grad():
            net(x)
        assert len(w.records) == before
        net(x).sum().backward()
    assert len(w.steps[-1]) == 10


def test_an_interrupt_in_a_forward_leaves_no_hooks():
    """After Ctrl-C no mode or hook is left (`always_call` hooks do not run then, as in PyTorch)."""
    net = ByHand()
    net.last.forward = lambda x: signal.raise_signal(signal.SIGINT)
    # In a process that a shell has started in the background, SIGINT is ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), nnmirror.watch(net) as w:
            net(torch.randn(2, 3))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert hooks_of(net) == []
    assert [r.layer for r in w.records] == ["first", ""]


def test_values_on_request():
    torch.manual_seed(0)
    net, x = ByHand(), torch.randn(2, 3)
    with nnmirror.watch(net, values=True) as w:
        y = net(x)
        y.retain_grad()
        y.sum().backward()
    assert type(w.records[-1].value) is torch.Tensor
    same(w.records[-1].value, y.detach(), "y")
    (backward,) = w.records[-1].backwards
    same(backward.value, y.grad, "dy")
    same(backward.param_values, {"scale": net.scale.grad}, "d scale")
    for record in w.records:
        assert record.norm == torch.linalg.vector_norm(record.value).item()
        assert record.grad == torch.linalg.vector_norm(record.backwards[0].value).item()
    again = json.loads(json.dumps(w.to_dict()))
    assert again[-1]["value"] == y.tolist()
    with nnmirror.watch(net) as w:
        net(x)
    assert w.records[0].value is None


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    example = Path(__file__).parent.parent / "examples" / "vanishing.py"
    picture = tmp_path / "vanishing.png"
    command = [sys.executable, str(example), "--points", "8", "--plot", str(picture)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.count("of 2\n") == 6
    assert picture.exists()


def test_formula_of_a_layer_of_several_calls():
    """A layer of several operations shows its docstring's formula, not its last operation's."""
    model = nnmirror.Sequential(nnmirror.RMSNorm(3), nnmirror.Softsign(), nnmirror.SELU())
    with nnmirror.watch(model) as w:
        model(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert [r.formula for r in w.records] == [
        "dw = sum of g x r, dx = r g w - x r^3 mean(g w x)",
        "dx = g / (1 + |x|) - g x / (1 + |x|)^2 sign(x)",
        "dx = g s where x > 0, else g s a exp(x)",
    ]


def test_second_derivatives_that_do_not_depend_on_a_parameter():
    """The walk arrives at LayerNorm's bias without a gradient, and calls the hooks there."""
    torch.manual_seed(0)
    net = nnmirror.Sequential(nnmirror.Linear(8, 8), nnmirror.LayerNorm(8), nnmirror.Linear(8, 4))
    with nnmirror.exact(), nnmirror.watch(net[1]) as watched:
        for _ in range(3):
            x = torch.randn(5, 8, requires_grad=True)
            loss = nnmirror.functional.kl_div(net(x), torch.rand(5, 4), reduction="batchmean")
            g = nnmirror.grad(loss, [x], create_graph=True)[0]
            g.pow(2).sum().backward()
    assert len(watched.steps) == 3
