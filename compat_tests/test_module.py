"""Module: registration, attributes, traversal, moving, printing, copying."""

import copy
import io
import itertools
import pickle
from collections import OrderedDict, namedtuple

import pytest
import torch

import nnmirror

from .parity import parity, same


class Holder:
    """Makes the same net on either backend."""

    @staticmethod
    def net(nn):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(2, 2)
                self.register_buffer("count", torch.zeros(1))
                self.register_buffer("scratch", torch.ones(2), persistent=False)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = Block()
                self.again = self.block
                self.tied = nn.Linear(2, 2, bias=False)
                self.tied.weight = self.block.linear.weight
                self.scale = nn.Parameter(torch.ones(2))
                self.nothing = None
                self.register_parameter("no_param", None)
                self.register_buffer("no_buffer", None)
                self.register_module("no_module", None)
                self.seq = nn.Sequential(nn.Tanh(), Block())
                self.plain = 5

            def forward(self, x):
                return self.seq[0](self.block.linear(x)) * self.scale

        return Net()


def names(pairs):
    return [(name, getattr(value, "shape", type(value).__name__)) for name, value in pairs]


TRAVERSALS = {
    "parameters": lambda m: [p.shape for p in m.parameters()],
    "parameters here": lambda m: [p.shape for p in m.parameters(recurse=False)],
    "named": lambda m: names(m.named_parameters()),
    "named prefix": lambda m: names(m.named_parameters(prefix="a.b")),
    "named here": lambda m: names(m.named_parameters("x", False)),
    "named twice": lambda m: names(m.named_parameters(remove_duplicate=False)),
    "buffers": lambda m: [b.shape for b in m.buffers()],
    "named buffers": lambda m: names(m.named_buffers(prefix="p", remove_duplicate=False)),
    "buffers here": lambda m: names(m.named_buffers(recurse=False)),
    "modules": lambda m: [type(x).__name__ for x in m.modules()],
    "modules twice": lambda m: [type(x).__name__ for x in m.modules(remove_duplicate=False)],
    "named modules": lambda m: names(m.named_modules()),
    "named modules prefix": lambda m: names(m.named_modules(prefix="q", remove_duplicate=False)),
    "named modules memo": lambda m: names(m.named_modules(memo={m.block})),
    "children": lambda m: [type(x).__name__ for x in m.children()],
    "named children": lambda m: names(m.named_children()),
    "state_dict": lambda m: list(m.state_dict()),
    "dir": lambda m: [
        n for n in dir(m) if not n.startswith("_") and n not in ("param", "backward")
    ],
    "repr": lambda m: repr(m),
    "vars": lambda m: sorted(k for k in vars(m)),
}


@pytest.mark.parametrize("name", TRAVERSALS)
@parity
def test_traversal(nn, optim, name):
    return TRAVERSALS[name](Holder.net(nn))


@pytest.mark.parametrize("part", ["whole", "below"])
@pytest.mark.parametrize("name", ["named_parameters", "named_modules", "_named_members"])
@parity
def test_parameters_by_overridden_names(nn, optim, name, part):
    """`parameters()` consists of what the module's own `named_parameters` or `named_modules` give."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1))
            self.same = self.first

    def fewer(self, *args, **kwargs):
        return itertools.islice(getattr(nn.Module, name)(self, *args, **kwargs), 2)

    net = Net()
    changed = Net if part == "whole" else nn.Sequential
    other = type("Other", (changed,), {name: fewer})
    if part == "whole":
        net.__class__ = other
    else:
        net.second = other(nn.Linear(3, 1))
    return [p.shape for p in net.parameters()]


@pytest.mark.parametrize("part", ["whole", "below"])
@pytest.mark.parametrize("name", ["named_parameters", "named_modules", "_named_members"])
@parity
def test_parameters_by_names_set_on_a_module(nn, optim, name, part):
    """A method that was exchanged on the module itself counts too."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1)))
    changed = net if part == "whole" else net[1]
    usual = getattr(changed, name)
    setattr(changed, name, lambda *args, **kwargs: itertools.islice(usual(*args, **kwargs), 2))
    return [p.shape for p in net.parameters()]


CHANGES = {
    "a module exchanged": lambda net: net.__setitem__(1, Holder.net(net.kind)),
    "a module added": lambda net: net.append(net.kind.ReLU()),
    "a module deleted": lambda net: net.__delitem__(0),
    "a parameter added": lambda net: net[0].register_parameter("extra", None),
}


@pytest.mark.parametrize("change", CHANGES)
@parity
def test_a_net_that_changes_while_its_parameters_are_taken(nn, optim, change):
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net.kind = nn
    shapes = []
    for p in net.parameters():
        if not shapes:
            CHANGES[change](net)
        shapes.append(p.shape)
    return shapes


LOOKUPS = {
    "submodule": lambda m: m.get_submodule("seq.1.linear"),
    "self": lambda m: m.get_submodule(""),
    "submodule missing": lambda m: m.get_submodule("seq.7"),
    "submodule of a parameter": lambda m: m.get_submodule("scale.x"),
    "submodule not a module": lambda m: m.get_submodule("plain"),
    "parameter": lambda m: m.get_parameter("block.linear.weight"),
    "parameter here": lambda m: m.get_parameter("scale"),
    "parameter missing": lambda m: m.get_parameter("block.nope"),
    "parameter is a buffer": lambda m: m.get_parameter("block.count"),
    "parameter is none": lambda m: m.get_parameter("no_param"),
    "buffer": lambda m: m.get_buffer("block.count"),
    "buffer missing": lambda m: m.get_buffer("block.nope"),
    "buffer is a parameter": lambda m: m.get_buffer("scale"),
    "attribute missing": lambda m: m.nothing_here,
    "attribute none": lambda m: m.no_param,
}


@pytest.mark.parametrize("name", LOOKUPS)
@parity
def test_lookup(nn, optim, name):
    found = LOOKUPS[name](Holder.net(nn))
    return found if isinstance(found, torch.Tensor) else repr(found)


@parity
def test_set_submodule(nn, optim):
    net, log = Holder.net(nn), []
    for args in (
        ("seq.0", nn.ReLU()),
        ("seq.9", nn.ReLU()),
        ("seq.8", nn.ReLU(), True),
        ("", nn.ReLU()),
        ("block", 3),
        ("plain", nn.ReLU()),
        ("missing.deep", nn.ReLU()),
        ("new", nn.Tanh()),
        (".odd", nn.Tanh()),
    ):
        try:
            net.set_submodule(*args)
        except Exception as e:
            log.append((type(e).__name__, str(e)))
    return log, repr(net)


def _net_before_init(nn, action):
    class Early(nn.Module):
        def __init__(self):
            action(self)

    return Early()


REFUSALS = {
    "parameter before init": lambda nn: _net_before_init(
        nn, lambda m: setattr(m, "w", nn.Parameter(torch.ones(1)))
    ),
    "module before init": lambda nn: _net_before_init(nn, lambda m: setattr(m, "w", nn.Tanh())),
    "buffer before init": lambda nn: _net_before_init(
        nn, lambda m: m.register_buffer("b", torch.ones(1))
    ),
    "register before init": lambda nn: _net_before_init(
        nn, lambda m: m.register_parameter("b", None)
    ),
    "plain before init": lambda nn: _net_before_init(nn, lambda m: setattr(m, "w", 3)) and None,
    "read before init": lambda nn: _net_before_init(nn, lambda m: m.weight),
    "delete before init": lambda nn: _net_before_init(nn, lambda m: delattr(m, "weight")),
    "call before init": lambda nn: _net_before_init(nn, lambda m: m(1)),
    "buffer name": lambda nn: nn.Module().register_buffer(1, None),
    "buffer dot": lambda nn: nn.Module().register_buffer("a.b", None),
    "buffer empty": lambda nn: nn.Module().register_buffer("", None),
    "buffer exists": lambda nn: nn.Linear(1, 1).register_buffer("weight", None),
    "buffer not a tensor": lambda nn: nn.Module().register_buffer("a", [1]),
    "parameter name": lambda nn: nn.Module().register_parameter(1, None),
    "parameter dot": lambda nn: nn.Module().register_parameter("a.b", None),
    "parameter empty": lambda nn: nn.Module().register_parameter("", None),
    "parameter exists": lambda nn: nn.Linear(1, 1).register_parameter("forward", None),
    "parameter plain tensor": lambda nn: nn.Module().register_parameter("a", torch.ones(1)),
    "parameter non-leaf": lambda nn: nn.Module().register_parameter("a", _non_leaf(nn)),
    "module name": lambda nn: nn.Module().add_module(1, nn.Tanh()),
    "module dot": lambda nn: nn.Module().add_module("a.b", nn.Tanh()),
    "module empty": lambda nn: nn.Module().add_module("", nn.Tanh()),
    "module exists": lambda nn: nn.Linear(1, 1).add_module("weight", nn.Tanh()),
    "module not a module": lambda nn: nn.Module().add_module("a", torch.ones(1)),
    "module a class": lambda nn: nn.Sequential(nn.Tanh),
    "assign tensor to parameter": lambda nn: setattr(nn.Linear(1, 1), "weight", torch.ones(1, 1)),
    "assign number to parameter": lambda nn: setattr(nn.Linear(1, 1), "weight", 1.0),
    "assign number to module": lambda nn: setattr(nn.Sequential(nn.Tanh()), "0", 1.0),
    "assign number to buffer": lambda nn: setattr(Holder.net(nn).block, "count", 1.0),
    "unknown argument": lambda nn: nn.Module(a=1),
    "unknown position": lambda nn: nn.Module(1),
    "train not a bool": lambda nn: nn.Module().train("yes"),
    "delete missing": lambda nn: delattr(nn.Linear(1, 1), "nope"),
    "to integers": lambda nn: nn.Linear(1, 1).to(torch.int32),
    "to nothing": lambda nn: nn.Linear(1, 1).to("nowhere"),
    "meta to cpu": lambda nn: nn.Linear(1, 1, device="meta").to("cpu"),
    "extra state": lambda nn: nn.Module().get_extra_state(),
    "set extra state": lambda nn: nn.Module().set_extra_state(1),
    "xpu": lambda nn: nn.Linear(1, 1).xpu(),
    "ipu": lambda nn: nn.Linear(1, 1).ipu(),
    "mtia": lambda nn: nn.Linear(1, 1).mtia(),
    "cuda": lambda nn: nn.Linear(1, 1).cuda() if not torch.cuda.is_available() else None,
}


def _non_leaf(nn):
    p = nn.Parameter(torch.ones(1))
    y = nn.functional.tanh(p)
    y.__class__ = type("Odd", (type(p),), {}) if nn is torch.nn else y.__class__
    return y if nn is torch.nn else _as_parameter(y)


def _as_parameter(y):
    y.__class__ = nnmirror.Parameter
    return y


@pytest.mark.parametrize("name", REFUSALS)
@parity
def test_refusals(nn, optim, name):
    REFUSALS[name](nn)


@parity
def test_attributes(nn, optim):
    """Assigning moves a name between parameters, buffers, modules and plain attributes."""
    m, log = nn.Module(), []

    def note():
        log.append([sorted(d) for d in (m._parameters, m._buffers, m._modules)])
        log.append(sorted(m._non_persistent_buffers_set) + ["x" in vars(m)])

    m.x = 1
    note()
    m.x = nn.Parameter(torch.ones(1))
    note()
    m.x = None
    note()
    del m.x
    m.register_buffer("x", torch.ones(2), persistent=False)
    note()
    m.x = torch.zeros(3)
    m.x = None
    note()
    m.x = nn.Tanh()
    note()
    m.x = None
    note()
    del m.x
    m.x = nn.Buffer(torch.ones(1), persistent=False)
    note()
    m.y = nn.Buffer(torch.ones(1))
    m.y = nn.Buffer(torch.ones(1), persistent=False)
    note()
    m.x = nn.Parameter(torch.ones(1))
    note()
    del m.x
    m.x = torch.ones(1)
    note()
    return log, list(m.state_dict())


@parity
def test_property_and_call_super_init(nn, optim):
    class Mixin:
        def __init__(self, tag=None):
            self.tag = tag

    class Both(nn.Module, Mixin):
        call_super_init = True

        @property
        def width(self):
            return self.missing

    m = Both(tag=4)
    log = [m.tag]
    try:
        m.width  # noqa: B018
    except AttributeError as e:
        log.append(str(e))
    return log


@parity
def test_modes_and_apply(nn, optim):
    net, seen = Holder.net(nn), []
    net.apply(lambda m: seen.append(type(m).__name__))
    net.eval()
    modes = [m.training for m in net.modules()]
    returned = net.train(True) is net and net.requires_grad_(False) is net
    frozen = [p.requires_grad for p in net.parameters()]
    net.requires_grad_()
    net(torch.ones(1, 2)).sum().backward()
    net.zero_grad(set_to_none=False)
    zeros = [p.grad for p in net.parameters()]
    net.zero_grad()
    return seen, modes, returned, frozen, zeros, [p.grad for p in net.parameters()]


MOVES = {
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.double().float(),
    "type": lambda m: m.type(torch.float64),
    "type string": lambda m: m.type("torch.DoubleTensor"),
    "cpu": lambda m: m.cpu(),
    "to dtype": lambda m: m.to(torch.float64),
    "to device": lambda m: m.to("cpu"),
    "to device and dtype": lambda m: m.to("cpu", torch.float64, True),
    "to keywords": lambda m: m.to(device="cpu", dtype=torch.float16),
    "to tensor": lambda m: m.to(torch.ones(1, dtype=torch.float64)),
    "to other": lambda m: m.to(other=torch.ones(1, dtype=torch.float64)),
    "to memory format": lambda m: m.to(memory_format=torch.channels_last),
    "to complex": lambda m: m.to(torch.complex64),
    "meta": lambda m: m.to("meta"),
    "share": lambda m: m.share_memory(),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "to_empty here": lambda m: m.to_empty(device="meta", recurse=False),
}


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("name", MOVES)
@parity
def test_moves(nn, optim, name, with_grad):
    net = Holder.net(nn)
    if with_grad:
        net(torch.ones(1, 2)).sum().backward()
    before = dict(net.named_parameters())
    ids = {n: id(p) for n, p in before.items()}
    moved = MOVES[name](net)
    after = dict(net.named_parameters())
    return (
        moved is net,
        {n: id(p) == ids.get(n) for n, p in after.items()},  # the tied one is two now
        [(n, p.dtype, p.device, p.requires_grad, p.is_leaf) for n, p in after.items()],
        [(n, b.dtype, b.device) for n, b in net.named_buffers()],
        [p.grad is None or (p.grad.dtype, p.grad.device) for p in after.values()],
        [p.is_shared() for p in after.values()],
        list(after.values()) if name not in ("meta", "to_empty", "to_empty here") else None,
        net.tied.weight is net.block.linear.weight,
    )


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("swap", [False, True])
@parity
def test_conversion_policies(nn, optim, overwrite, swap):
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        m = nn.Linear(2, 2)
        m(torch.ones(1, 2)).sum().backward()
        weight = m.weight
        m.double()
        return weight is m.weight, m.weight, m.bias
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.__future__.set_swap_module_params_on_conversion(False)


@parity
def test_trains_after_a_move(nn, optim):
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    net.double()
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(4, 2, dtype=torch.float64)).pow(2).sum().backward()
        optimizer.step()
    net.float()
    net(torch.ones(4, 2)).sum().backward()
    return dict(net.named_parameters())


@parity
def test_copies_and_pickles(nn, optim):
    net = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.ReLU(), c=nn.LeakyReLU(0.3)))
    net(torch.ones(1, 2)).sum().backward()
    net.extra = {"list": [1, 2]}
    copied, revived = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    shallow = copy.copy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(3, 2)
    results = [m(x) for m in (copied, revived, shallow, loaded)]
    return (
        results,
        [dict(m.named_parameters()) for m in (copied, revived, loaded)],
        repr(loaded),
        copied.extra,
        shallow.a is net.a,
        copied.a.weight is net.a.weight,
        loaded.a.weight.requires_grad,
    )


@parity
def test_calling(nn, optim):
    Pair = namedtuple("Pair", "left right")

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x, *more, kind="tuple", **others):
            y = self.inner(x)
            return {
                "tuple": (y, x),
                "dict": {"y": y},
                "pair": Pair(y, x),
                "none": None,
                "list": [y],
            }[kind]

    m, x = Many(), torch.ones(1, 2)
    results = [m(x, kind=k) for k in ("tuple", "dict", "list", "none")]
    pair = m(x=x, kind="pair", unused=3)
    pair.left.sum().backward()
    return results, type(pair).__name__, pair.left, dict(m.named_parameters())


@parity
def test_bad_calls(nn, optim):
    errors = []
    for call in (
        lambda: nn.Linear(1, 1)(),
        lambda: nn.Linear(1, 1)(torch.ones(1), torch.ones(1)),
        lambda: nn.Sequential(nn.Tanh())(torch.ones(1), 3),
        lambda: nn.Sequential(nn.Tanh())(x=torch.ones(1)),
        lambda: nn.ModuleList([nn.Tanh()])(torch.ones(1)),
        lambda: nn.ModuleDict({"a": nn.Tanh()})(torch.ones(1)),
        lambda: nn.ParameterList([torch.ones(1)])(),
        lambda: nn.ParameterDict({"a": torch.ones(1)})(3),
    ):
        try:
            call()
        except Exception as e:
            errors.append((type(e).__name__, str(e)))
    return errors


@parity
def test_monkey_patched_forward(nn, optim):
    m = nn.Linear(2, 2)
    m.forward = lambda x: x * 3
    return m(torch.ones(2))


def test_compile_is_refused():
    with pytest.raises(NotImplementedError, match="compile"):
        nnmirror.Linear(1, 1).compile()
    with pytest.raises(NotImplementedError, match=r"torch\.jit cannot script"):
        torch.jit.script(nnmirror.Linear(1, 1))


def test_a_torch_module_inside_that_cannot_be_mirrored_is_refused():
    """Otherwise its parameters would silently be missing from parameters()."""
    m = nnmirror.Module()
    theirs = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Bilinear(1, 1, 1))
    for take in (lambda: setattr(m, "two", theirs), lambda: nnmirror.Sequential(theirs)):
        with pytest.raises(
            TypeError, match=r"(?s)torch\.nn module inside a mirrored.* 1: .*Bilinear"
        ):
            take()
        assert type(theirs[0]) is torch.nn.Linear
    with pytest.raises(TypeError, match="not a Module subclass"):
        nnmirror.Sequential(3)


def test_a_mirrored_module_inside_a_torch_one_is_refused():
    """PyTorch would keep it as a plain attribute, and an optimiser would miss its parameters."""

    class Net(torch.nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body
            self.head = torch.nn.Linear(2, 1)

    model = nnmirror.Linear(2, 2)
    for take in (Net, torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel):
        with pytest.raises(TypeError, match=r"one of torch\.nn would be left out .*to_torch\(mod"):
            take(model)
    for take in (torch.nn.Sequential, lambda m: torch.nn.ModuleDict({"m": m})):
        with pytest.raises(TypeError, match=r"one of torch\.nn would be left out .*to_torch\(mod"):
            take(model)
        assert take(nnmirror.to_torch(model))
    net = Net(nnmirror.to_torch(model))
    assert [n for n, _ in net.named_parameters()][:2] == ["body.weight", "body.bias"]
    net.bodies = [model]  # a plain list is not registered, as in PyTorch


@parity
def test_the_class_of_a_module(nn, optim):
    """`__class__` can be read and assigned, as libraries do that patch a model."""

    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    m = nn.Linear(2, 2)
    before = m.__class__ is nn.Linear, isinstance(m, Twice), isinstance(m, int)
    m.__class__ = Twice
    with pytest.raises(TypeError):
        m.__class__ = 3
    return before, type(m) is m.__class__ is Twice, m(torch.ones(1, 2)), repr(m)


def test_a_torch_parameter_inside_is_trained():
    class Net(nnmirror.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))
            self.linear = nnmirror.Linear(2, 2)

        def forward(self, x):
            return self.linear(x) * self.scale

    net = Net()
    assert [n for n, _ in net.named_parameters()] == ["scale", "linear.weight", "linear.bias"]
    y = net(torch.ones(1, 2))
    y.sum().backward()
    same(y.detach().sum() / 2, net.scale.grad, "gradient")


# -- containers --------------------------------------------------------------------------


def _sequential(nn, n=3):
    return nn.Sequential(*[nn.Linear(i + 1, i + 2) for i in range(n)])


def _layers(nn, *widths):
    return [nn.Linear(w, w) for w in widths]


SEQUENTIAL = {
    "index": lambda nn, s: (s[0], s[-1]),
    "slice": lambda nn, s: s[1:],
    "slice step": lambda nn, s: s[::2],
    "index out of range": lambda nn, s: s[3],
    "index negative out of range": lambda nn, s: s[-4],
    "index type": lambda nn, s: s["0"],
    "set": lambda nn, s: s.__setitem__(1, nn.Tanh()),
    "set negative": lambda nn, s: s.__setitem__(-1, nn.Tanh()),
    "set out of range": lambda nn, s: s.__setitem__(5, nn.Tanh()),
    "set no module": lambda nn, s: s.__setitem__(0, 5),
    "delete": lambda nn, s: s.__delitem__(0),
    "delete negative": lambda nn, s: s.__delitem__(-1),
    "delete slice": lambda nn, s: s.__delitem__(slice(0, 2)),
    "delete out of range": lambda nn, s: s.__delitem__(9),
    "len": lambda nn, s: len(s),
    "iter": lambda nn, s: list(s),
    "append": lambda nn, s: s.append(nn.Tanh()).append(nn.ReLU()),
    "append no module": lambda nn, s: s.append(3),
    "extend": lambda nn, s: s.extend([nn.Tanh(), nn.ReLU()]),
    "extend sequential": lambda nn, s: s.extend(nn.Sequential(nn.Tanh())),
    "insert": lambda nn, s: s.insert(1, nn.Tanh()),
    "insert at the end": lambda nn, s: s.insert(3, nn.Tanh()),
    "insert negative": lambda nn, s: s.insert(-1, nn.Tanh()),
    "insert out of range": lambda nn, s: s.insert(4, nn.Tanh()),
    "insert no module": lambda nn, s: s.insert(0, 3),
    "pop": lambda nn, s: (s.pop(1), len(s)),
    "pop slice": lambda nn, s: (s.pop(slice(1)), len(s)),
    "pop out of range": lambda nn, s: s.pop(7),
    "add": lambda nn, s: s + nn.Sequential(nn.Tanh()),
    "add no sequential": lambda nn, s: s + [nn.Tanh()],
    "iadd": lambda nn, s: s.__iadd__(nn.Sequential(nn.Tanh())),
    "iadd no sequential": lambda nn, s: s.__iadd__([nn.Tanh()]),
    "mul": lambda nn, s: s * 2,
    "rmul": lambda nn, s: 2 * s,
    "mul zero": lambda nn, s: s * 0,
    "mul float": lambda nn, s: s * 1.5,
    "imul": lambda nn, s: s.__imul__(2),
    "imul zero": lambda nn, s: s.__imul__(0),
    "imul float": lambda nn, s: s.__imul__(0.5),
    "imul shares": lambda nn, s: s.__imul__(2)[0] is s[3],
    "ordered dict": lambda nn, s: nn.Sequential(OrderedDict(a=s[0], b=s[1])),
    "plain dict": lambda nn, s: nn.Sequential({"a": s[0]}),
    "ordered dict slice": lambda nn, s: nn.Sequential(OrderedDict(a=s[0], b=s[1]))[:1],
    "ordered dict delete": lambda nn, s: nn.Sequential(OrderedDict(a=s[0], b=s[1])).__delitem__(0),
    "ordered dict attribute": lambda nn, s: nn.Sequential(OrderedDict(a=s[0], b=s[1])).b,
    "ordered dict insert": lambda nn, s: nn.Sequential(OrderedDict(a=s[0], b=s[1])).insert(0, s[2]),
    "add_module": lambda nn, s: s.add_module("x", nn.Tanh()),
    "attribute": lambda nn, s: getattr(s, "0"),
    "empty": lambda nn, s: (nn.Sequential(), nn.Sequential()(torch.ones(1))),
    "subclass slice": lambda nn, s: type("Mine", (nn.Sequential,), {})(*s)[:2],
    "contains": lambda nn, s: s[0] in s,
    "dir": lambda nn, s: [d for d in dir(s) if d.isdigit()],
    "reversed": lambda nn, s: list(reversed(s)),
}


def shown(value):
    if isinstance(value, tuple | list):
        return type(value)(shown(v) for v in value)
    return value if isinstance(value, int | str | bool | torch.Tensor) else repr(value)


@pytest.mark.parametrize("name", SEQUENTIAL)
@parity
def test_sequential(nn, optim, name):
    s = _sequential(nn)
    try:
        return shown(SEQUENTIAL[name](nn, s)), repr(s), list(s.state_dict())
    except Exception as e:
        return type(e).__name__, str(e), repr(s), list(s.state_dict())


LISTS = {
    "make": lambda nn: nn.ModuleList(_layers(nn, 1, 2)),
    "make from generator": lambda nn: nn.ModuleList(nn.Tanh() for _ in range(3)),
    "repr runs": lambda nn: nn.ModuleList(_layers(nn, 1, 1, 2, 1, 1, 1)),
    "repr nested": lambda nn: nn.ModuleList([nn.Sequential(nn.Tanh()), nn.Sequential(nn.Tanh())]),
    "empty": lambda nn: nn.ModuleList(),
    "index": lambda nn: nn.ModuleList(_layers(nn, 1, 2))[-1],
    "slice": lambda nn: nn.ModuleList(_layers(nn, 1, 2, 3))[1:],
    "out of range": lambda nn: nn.ModuleList()[0],
    "set": lambda nn: nn.ModuleList(_layers(nn, 1, 2)).__setitem__(-2, nn.Tanh()),
    "delete": lambda nn: _changed(nn.ModuleList(_layers(nn, 1, 2, 3)), lambda m: m.__delitem__(0)),
    "delete slice": lambda nn: _changed(nn.ModuleList(_layers(nn, 1, 2, 3)), lambda m: m.__delitem__(slice(1, 3))),
    "insert": lambda nn: _changed(nn.ModuleList(_layers(nn, 1, 2)), lambda m: m.insert(0, nn.Tanh())),
    "insert negative": lambda nn: _changed(nn.ModuleList(_layers(nn, 1, 2)), lambda m: m.insert(-1, nn.Tanh())),
    "append": lambda nn: nn.ModuleList().append(nn.Tanh()),
    "append none": lambda nn: nn.ModuleList().append(None),
    "append wrong": lambda nn: nn.ModuleList().append(3),
    "extend": lambda nn: nn.ModuleList().extend([nn.Tanh()]),
    "extend wrong": lambda nn: nn.ModuleList().extend(3),
    "iadd": lambda nn: nn.ModuleList().__iadd__([nn.Tanh()]),
    "add": lambda nn: nn.ModuleList(_layers(nn, 1)) + nn.ModuleList(_layers(nn, 2)),
    "pop": lambda nn: nn.ModuleList(_layers(nn, 1, 2)).pop(0),
    "len": lambda nn: len(nn.ModuleList(_layers(nn, 1, 2))),
    "iterate": lambda nn: list(nn.ModuleList(_layers(nn, 1, 2))),
    "dict": lambda nn: nn.ModuleDict({"b": nn.Tanh(), "a": nn.ReLU()}),
    "dict pairs": lambda nn: nn.ModuleDict([("b", nn.Tanh()), ["a", nn.ReLU()]]),
    "dict wrong": lambda nn: nn.ModuleDict(3),
    "dict wrong pair": lambda nn: nn.ModuleDict([("b", nn.Tanh(), 3)]),
    "dict wrong element": lambda nn: nn.ModuleDict([3]),
    "dict from dict": lambda nn: nn.ModuleDict(nn.ModuleDict({"x": nn.Tanh()})),
    "dict name taken": lambda nn: nn.ModuleDict({"keys": nn.Tanh()}),
    "dict get": lambda nn: nn.ModuleDict({"x": nn.Tanh()})["x"],
    "dict missing": lambda nn: nn.ModuleDict()["x"],
    "dict delete": lambda nn: _changed(nn.ModuleDict({"x": nn.Tanh(), "y": nn.ReLU()}), lambda m: m.__delitem__("x")),
    "dict clear": lambda nn: _changed(nn.ModuleDict({"x": nn.Tanh()}), lambda m: m.clear()),
    "dict pop": lambda nn: nn.ModuleDict({"x": nn.Tanh()}).pop("x"),
    "dict keys": lambda nn: [list(f()) for f in (lambda m=nn.ModuleDict({"x": nn.Tanh()}): m.keys(),)],
    "dict items": lambda nn: [list(i) for i in nn.ModuleDict({"x": nn.Tanh()}).items()],
    "dict values": lambda nn: list(nn.ModuleDict({"x": nn.Tanh()}).values()),
    "dict contains": lambda nn: "x" in nn.ModuleDict({"x": nn.Tanh()}),
    "dict none": lambda nn: nn.ModuleDict({"x": None}),
    "dict update": lambda nn: _changed(nn.ModuleDict({"x": nn.Tanh()}), lambda m: m.update({"x": nn.ReLU(), "z": nn.Tanh()})),
    "plist": lambda nn: nn.ParameterList([torch.ones(2, 3), nn.Parameter(torch.ones(1)), 3, "s"]),
    "plist slice": lambda nn: nn.ParameterList([torch.ones(2), torch.ones(1)])[1:],
    "plist index": lambda nn: nn.ParameterList([torch.ones(2), torch.ones(1)])[-1],
    "plist out of range": lambda nn: nn.ParameterList([torch.ones(2)])[1],
    "plist set": lambda nn: _changed(nn.ParameterList([torch.ones(2)]), lambda m: m.__setitem__(0, torch.zeros(3))),
    "plist append": lambda nn: nn.ParameterList().append(torch.ones(1)),
    "plist extend wrong": lambda nn: nn.ParameterList().extend(torch.ones(1)),
    "plist extend number": lambda nn: nn.ParameterList(3),
    "plist iadd": lambda nn: nn.ParameterList().__iadd__([torch.ones(1)]),
    "plist iterate": lambda nn: list(nn.ParameterList([torch.ones(2)])),
    "plist empty": lambda nn: nn.ParameterList(),
    "plist double": lambda nn: nn.ParameterList([torch.ones(2).double()]).half(),
    "pdict": lambda nn: nn.ParameterDict({"b": torch.ones(2), "a": nn.Parameter(torch.ones(1)), "c": 3}),
    "pdict ordered": lambda nn: nn.ParameterDict(OrderedDict(b=torch.ones(2), a=torch.ones(1))),
    "pdict pairs": lambda nn: nn.ParameterDict([("b", torch.ones(2))]),
    "pdict wrong": lambda nn: nn.ParameterDict(3),
    "pdict wrong pair": lambda nn: nn.ParameterDict([(1, 2, 3)]),
    "pdict wrong element": lambda nn: nn.ParameterDict([3]),
    "pdict key": lambda nn: nn.ParameterDict({3: torch.ones(1)}),
    "pdict missing": lambda nn: nn.ParameterDict()["x"],
    "pdict copy": lambda nn: nn.ParameterDict({"x": torch.ones(1)}).copy(),
    "pdict or": lambda nn: nn.ParameterDict({"x": torch.ones(1)}) | nn.ParameterDict({"y": torch.ones(2)}),
    "pdict ior": lambda nn: nn.ParameterDict({"x": torch.ones(1)}).__ior__(nn.ParameterDict({"x": torch.ones(2)})),
    "pdict pop": lambda nn: _changed(nn.ParameterDict({"x": torch.ones(1), "y": torch.ones(2)}), lambda m: m.pop("x")),
    "pdict popitem": lambda nn: _changed(nn.ParameterDict({"x": torch.ones(1), "y": torch.ones(2)}), lambda m: m.popitem()),
    "pdict popitem empty": lambda nn: nn.ParameterDict().popitem(),
    "pdict clear": lambda nn: _changed(nn.ParameterDict({"x": torch.ones(1)}), lambda m: m.clear()),
    "pdict get": lambda nn: nn.ParameterDict({"x": torch.ones(1)}).get("z", 5),
    "pdict setdefault": lambda nn: _changed(nn.ParameterDict(), lambda m: m.setdefault("k", torch.ones(2))),
    "pdict fromkeys": lambda nn: nn.ParameterDict().fromkeys(["a", "b"], torch.ones(1)),
    "pdict reversed": lambda nn: list(reversed(nn.ParameterDict({"x": torch.ones(1), "y": torch.ones(2)}))),
    "pdict items": lambda nn: [list(p) for p in nn.ParameterDict({"x": torch.ones(1)}).items()],
    "pdict values": lambda nn: list(nn.ParameterDict({"x": torch.ones(1)}).values()),
    "pdict keys": lambda nn: list(nn.ParameterDict({"x": torch.ones(1)}).keys()),
}  # fmt: skip


def _changed(module, change):
    result = change(module)
    return [result, module, list(module.state_dict())]


@pytest.mark.parametrize("name", LISTS)
@parity
def test_containers(nn, optim, name):
    return shown(LISTS[name](nn))


@pytest.mark.parametrize(
    "container", ["ModuleList", "ModuleDict", "ParameterList", "ParameterDict"]
)
@parity
def test_containers_train(nn, optim, container):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            if container == "ModuleList":
                self.parts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
            elif container == "ModuleDict":
                self.parts = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
            elif container == "ParameterList":
                self.parts = nn.ParameterList([torch.randn(2, 2) for _ in range(2)])
            else:
                self.parts = nn.ParameterDict({"v": torch.randn(2, 2), "w": torch.randn(2, 2)})

        def forward(self, x):
            parts = self.parts.values() if "Dict" in container else self.parts
            for part in parts:
                x = part(x) if "Module" in container else torch.relu(x @ part)
            return x

    net = Net()
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(3, 2)).pow(2).sum().backward()
        optimizer.step()
    return dict(net.named_parameters()), repr(net)


SMALL = {
    "identity": lambda nn: (nn.Identity(3, unused=4), torch.randn(2, 3)),
    "flatten": lambda nn: (nn.Flatten(), torch.randn(2, 3, 4)),
    "flatten 0": lambda nn: (nn.Flatten(0), torch.randn(2, 3)),
    "flatten part": lambda nn: (nn.Flatten(1, 2), torch.randn(2, 3, 4, 5)),
    "flatten strided": lambda nn: (nn.Flatten(), torch.randn(4, 3, 2).transpose(0, 2)),
    "flatten nothing": lambda nn: (nn.Flatten(), torch.randn(2, 3)),
    "flatten wrong": lambda nn: (nn.Flatten(2, 1), torch.randn(2, 3, 4)),
    "flatten out of range": lambda nn: (nn.Flatten(5), torch.randn(2, 3, 4)),
    "unflatten": lambda nn: (nn.Unflatten(1, (2, 3)), torch.randn(2, 6)),
    "unflatten list": lambda nn: (nn.Unflatten(-1, [3, -1]), torch.randn(2, 6)),
    "unflatten wrong size": lambda nn: (nn.Unflatten(1, (2, 4)), torch.randn(2, 6)),
    "unflatten wrong type": lambda nn: (nn.Unflatten(1, 2), torch.randn(2, 6)),
    "unflatten wrong item": lambda nn: (nn.Unflatten(1, (2, "a")), torch.randn(2, 6)),
}


@pytest.mark.parametrize("name", SMALL)
@parity
def test_small_modules(nn, optim, name):
    module, x = SMALL[name](nn)
    net = nn.Sequential(nn.LeakyReLU(0.1), module)
    leaf = x.detach().requires_grad_()
    y = net(leaf)
    y.backward(torch.randn(y.shape))
    return y, y.grad_fn.name(), leaf, repr(module)


def test_small_modules_by_hand():
    nn = nnmirror
    x = torch.randn(4, 2, 3)
    model = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(6, 6), nn.Unflatten(1, (3, 2)))
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    model(x)
    same(leaf.grad, model.backward(torch.ones(4, 3, 2)), "dx")
    ys = model(tuple(x))
    assert len(ys) == 4
    assert ys[0].shape == (3, 2)
    dxs = model.backward(tuple(torch.ones(4, 3, 2)))
    same(leaf.grad, torch.stack(dxs), "dx of a tuple")


@pytest.mark.parametrize("used", [False, True])
@parity
def test_parameters_swapped_between_forward_and_backward(nn, optim, used):
    """After a swap of parameters, a graph of the old ones raises in backward; a new one works."""
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    loss = layer(x).sum()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    if used:
        layer(x.double()).sum().backward()
        return dict(layer.named_parameters())
    loss.backward()
