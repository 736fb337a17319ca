"""Grad mode, and the guarantee that torch's own nn, autograd and optim are not used."""

import subprocess
import sys
import threading

import pytest
import torch

import nnmirror
from nnmirror import nn, optim

from .parity import parity, same, trained


@parity
def test_no_grad(nn, optim):
    net, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), torch.randn(2, 3)
    x.requires_grad_()
    with torch.no_grad():
        inside = net(x)
    with torch.inference_mode():
        inference = net(x.detach()).clone()

    @torch.no_grad()
    def decorated():
        return net(x)

    return inside, inference.requires_grad, decorated(), net(x), x


@parity
def test_inference_tensor_cannot_be_saved(nn, optim):
    with torch.inference_mode():
        x = torch.randn(2, 3)
    return nn.Linear(3, 3)(x)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@parity
def test_what_needs_no_gradient(nn, optim, mode):
    """Metrics, targets and frozen parts of a model, each twice as the second call may be a
    generated function."""
    F, x, c = nn.functional, torch.randn(4, 6), torch.randint(6, (4,))
    image = torch.randn(2, 3, 4, 4)
    frozen = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 6)
    )
    frozen.requires_grad_(False)
    found = []
    with mode():
        for _ in range(2):
            found += [
                *(F.softmax(x, 1), F.log_softmax(x, dim=-1), F.gelu(x), F.elu(x, alpha=0.5)),
                *(F.one_hot(c, 6), F.pad(x, (1, 2)), F.pad(image, (1, 1, 1, 1), mode="reflect")),
                *(F.cross_entropy(x, c), F.cross_entropy(x, c, label_smoothing=0.1)),
                *(F.nll_loss(x, c, reduction="none"), F.mse_loss(x, x * 2, reduction="sum")),
                *(F.cosine_similarity(x, x.flip(0), dim=1), F.layer_norm(x, (6,))),
                *(F.avg_pool2d(image, 2), F.max_pool2d(image, 2), F.interpolate(image, size=3)),
                *(F.normalize(x), F.linear(x, frozen[4].weight[:, :6], frozen[4].bias)),
                *(F.batch_norm(image, torch.zeros(3), torch.ones(3), training=True),),
                *(nn.Flatten()(image), nn.Unflatten(1, (2, 3))(x), nn.Softmax(1)(x)),
                *(nn.CrossEntropyLoss()(x, c), nn.MSELoss()(x, x + 1), nn.GLU()(x)),
                frozen(image),
            ]
    return found, [t.requires_grad for t in found], [t.grad_fn for t in found]


INTO = {
    "mm": lambda h, m: torch.mm(m, m, out=torch.empty(3, 3)),
    "matmul": lambda h, m: torch.matmul(m, h, out=torch.empty(3)),
    "linear": lambda h, m: torch._C._nn.linear(h, m, h, out=torch.empty(3)),
    "cat": lambda h, m: torch.cat([h, m[0]], out=torch.empty(6)),
    "stack": lambda h, m: torch.stack([h, h], out=torch.empty(2, 3)),
    "clamp": lambda h, m: torch.clamp(m, 0, 1, out=torch.empty(3, 3)),
    "sum": lambda h, m: torch.sum(m, 0, out=torch.empty(3)),
    "sort": lambda h, m: torch.sort(h, out=(torch.empty(3), torch.empty(3, dtype=torch.int64))),
    "max": lambda h, m: torch.max(m, 0, out=(torch.empty(3), torch.empty(3, dtype=torch.int64))),
    "argmax": lambda h, m: torch.argmax(h, out=torch.empty((), dtype=torch.int64)),
    "svdvals": lambda h, m: torch.linalg.svdvals(m, out=torch.empty(3)),
    "the input": lambda h, m: torch.exp(h, out=h),
    "a weight": lambda h, m: torch.exp(torch.zeros(3, 3), out=m),
    "a longer result": lambda h, m: torch.exp(torch.zeros(5, 3), out=h),
}


@pytest.mark.parametrize("name", INTO)
@parity
def test_out_where_nothing_is_recorded(nn, optim, name):
    """A result written into preallocated memory, as in a control loop: under no_grad, and of frozen
    weights."""
    m = nn.Linear(3, 3).weight
    found = []
    for _ in range(2):
        h = m[0] * 2
        with torch.no_grad():
            found.append(INTO[name](h, m))
    frozen = nn.Parameter(torch.rand(3, 3), requires_grad=False)
    found.append(INTO[name](frozen[0], frozen))
    loss = (torch.nn.functional.linear(torch.randn(2, 3), m) ** 2).sum()
    loss.backward()
    return found, m, loss, m.grad


@parity
def test_a_frozen_trunk_under_a_head_that_trains(nn, optim):
    trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), nn.LeakyReLU())
    head = nn.Linear(4, 1)
    sgd = optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.1)
    losses = []
    for step in range(12):
        trunk.requires_grad_(step % 4 == 3)  # thawed now and then
        loss = (head(trunk(torch.randn(5, 3))) ** 2).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses += [loss.detach(), *[p.grad is None for p in trunk.parameters()]]
    return losses, [*trunk.parameters(), *head.parameters()]


def run(lib, opt):
    torch.manual_seed(0)
    net = lib.Sequential(lib.Linear(2, 5), lib.ReLU(), lib.Linear(5, 1), lib.Tanh())
    return trained(lib, opt, net, torch.randn(4, 2), torch.randn(4, 1), steps=5, momentum=0.9)


def test_torchs_autograd_off_and_the_mirrors_on():
    expected = run(torch.nn, torch.optim)
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    nnmirror.set_grad_enabled(True)
    try:
        same([x.detach() for x in expected[0]], [x.detach() for x in run(nn, optim)[0]], "losses")
        same(list(expected[1].values()), list(run(nn, optim)[1].values()), "weights")
        # An optimiser of torch's own may change the leaves as well.
        same(list(expected[1].values()), list(run(nn, torch.optim)[1].values()), "torch.optim")
    finally:
        torch.set_grad_enabled(before)
        nnmirror.set_grad_enabled(None)


def test_the_mirrors_own_modes():
    p = nn.Parameter(torch.ones(3))
    assert nnmirror.is_grad_enabled()
    with nnmirror.no_grad():
        assert not nnmirror.is_grad_enabled()
        assert torch.is_grad_enabled()
        assert not nn.functional.tanh(p).requires_grad
        p.add_(1)
        with nnmirror.enable_grad():
            assert nn.functional.tanh(p).requires_grad
    with torch.no_grad(), nnmirror.enable_grad():
        assert nn.functional.tanh(p).requires_grad
    with nnmirror.set_grad_enabled(False):
        assert not nnmirror.is_grad_enabled()
    assert nnmirror.is_grad_enabled()

    @nnmirror.no_grad()
    def off():
        return nnmirror.is_grad_enabled()

    @nnmirror.set_grad_enabled(False)
    def also_off():
        return nnmirror.is_grad_enabled()

    assert nnmirror.is_grad_enabled(), "decorating changes nothing outside the function"
    assert off() is False
    assert also_off() is False
    assert nnmirror.is_grad_enabled()


# Calls on a parameter p and on h, computed from it.
REPEATED = {
    "function of a parameter": lambda p, h: torch.exp(p),
    "function of a result": lambda p, h: torch.exp(h),
    "function with keywords": lambda p, h: torch.sum(h, dim=0, keepdim=True),
    "method": lambda p, h: h.sum(-1, keepdim=True),
    "method of a parameter": lambda p, h: p.tanh(),
    "operator": lambda p, h: h * p - 1,
    "part": lambda p, h: h[1:],
    "assignment": lambda p, h: assigned(h),
}


def assigned(value):
    z = torch.zeros(3, 2)
    z[1] = value[0]
    return z


@pytest.mark.parametrize("name", REPEATED)
def test_modes_are_asked_for_in_each_repeated_call(name):
    """However often a call came before in the usual mode."""
    p = nn.Parameter(torch.rand(2, 2))
    call, h = REPEATED[name], p * 2
    for _ in range(6):
        assert call(p, h).requires_grad
    with pytest.raises(RuntimeError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        call(p, h)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.vmap(lambda x: call(p, h) * x)(torch.ones(2))
    for mode in (torch.no_grad, torch.inference_mode, nnmirror.no_grad):
        with mode():
            assert not call(p, h).requires_grad
    with torch.no_grad(), nnmirror.enable_grad():
        assert call(p, h).requires_grad
    seen = []
    with nnmirror.no_grad():
        thread = threading.Thread(target=lambda: seen.append(call(p, h).requires_grad))
        thread.start()
        thread.join()
    with nnmirror.plain():
        assert call(p, h).grad_fn is not None
    assert seen == [True]
    assert call(p, h).requires_grad


def test_mode_belongs_to_the_thread():
    seen = []
    with nnmirror.no_grad():
        thread = threading.Thread(target=lambda: seen.append(nnmirror.is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_no_torch_graph_is_built():
    """Not even for inputs that require grad, with torch's grad mode on."""
    x = torch.randn(4, 3, requires_grad=True)
    layer = nn.Linear(3, 2)
    y = nn.functional.mse_loss(nn.functional.tanh(layer(x)) * 2, torch.zeros(4, 2))
    for tensor in (y, layer.weight):
        with torch._C.DisableTorchFunctionSubclass():
            assert torch._C.TensorBase.grad_fn.__get__(tensor) is None
            assert torch._C.TensorBase.requires_grad.__get__(tensor) is False


BLOCKED = """
import sys, types, torch

x, t = torch.randn(4, 2, requires_grad=True), torch.randn(4, 1)

class Blocked(types.ModuleType):
    def __getattr__(self, name):
        # torch itself goes on using them; the package may not.
        frame = sys._getframe(1)
        who = frame.f_globals.get("__name__", "")
        if who.startswith("nnmirror") or who == "__main__":
            raise AssertionError(f"{who} uses {self.__name__}.{name}")
        return getattr(self.real, name)

for name in [n for n in sys.modules if n.split(".")[:2] in (
        ["torch", "nn"], ["torch", "autograd"], ["torch", "optim"])]:
    blocked = Blocked(name)
    blocked.__dict__["real"] = sys.modules[name]
    sys.modules[name] = blocked
for name in ("nn", "autograd", "optim"):
    setattr(torch, name, sys.modules["torch." + name])

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] in (["torch", "nn"], ["torch", "autograd"], ["torch", "optim"]):
            raise AssertionError("imports " + name)
sys.meta_path.insert(0, Finder())

import nnmirror as nn
from nnmirror import optim

for off in (False, True):
    torch.set_grad_enabled(not off)
    nn.set_grad_enabled(True)
    net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 1), nn.Tanh(), nn.LeakyReLU())
    opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = optim.lr_scheduler.OneCycleLR(opt, 0.1, 5)
    for _ in range(5):
        opt.zero_grad()
        y = net(x) * 2 + 1
        loss = nn.MSELoss()(y.view(-1), t.view(-1))
        loss.backward()
        opt.step()
        schedule.step()
        nn.MSELoss()(net(x), t)
        repr(loss)
assert "nnmirror.testing" not in sys.modules, "it would make the import slower"
torch.set_grad_enabled(True)
nn.testing.gradcheck(nn.Linear(2, 1), x)
nn.testing.assert_parity(nn.Tanh(), torch.tanh, x)
print("trained", x.grad is not None)
"""


def test_trains_with_torch_nn_autograd_and_optim_blocked():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert done.stdout == "trained True\n", done.stderr


def test_no_backward_kernel_is_called():
    """Every backward uses ordinary operations: no aten::*_backward, no autograd engine."""
    x, t = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.LeakyReLU(), nn.Linear(5, 2), nn.Tanh())
    with torch.profiler.profile() as profile:
        loss = nn.MSELoss()((net(x) * 2).clamp(min=-0.5).view(4, 2), t)
        loss.backward()
        with pytest.raises(RuntimeError):
            loss.backward()
    names = {event.name for event in profile.events()}
    assert "aten::addmm" in names
    assert not [n for n in names if "ackward" in n or n.startswith("autograd::")], names


def test_autocast_is_refused():
    """The backward would have to undo casts that autocast hides."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="autocast is not mirrored"):
            nn.Linear(3, 2)(torch.ones(4, 3))
        x = torch.ones(2, 3, 3)
        for call in (
            nn.Linear(3, 2).requires_grad_(False),
            nn.Conv1d(3, 2, 1).requires_grad_(False),
            nn.functional.gelu,
            lambda x: nn.functional.l1_loss(x, x),
            lambda x: nn.functional.cosine_similarity(x, x),
        ):
            with pytest.raises(RuntimeError, match="autocast is not mirrored"):
                call(x)
        with torch.no_grad():
            assert nn.Linear(3, 2)(torch.ones(4, 3)).dtype is torch.bfloat16


def made_in_inference_mode(nn):
    with torch.inference_mode():
        return {
            "Linear": nn.Linear(3, 3),
            "Sequential": nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
            "LayerNorm": nn.LayerNorm(3),
            "BatchNorm1d": nn.BatchNorm1d(3),
            "frozen": nn.Linear(3, 3).requires_grad_(False),
        }


@pytest.mark.parametrize("name", made_in_inference_mode(torch.nn))
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
@parity
def test_module_made_in_inference_mode(nn, optim, name, inner, dims):
    """A weight made in inference mode cannot be saved for a backward that needs it.

    Of a Linear called with plain data PyTorch trains the bias only; the mirror trains the weight
    too.
    """
    model, x = made_in_inference_mode(nn)[name], torch.randn(4, 2, 3)[(0,) * (3 - dims)]
    x = nn.Parameter(x) * 1 if inner else x
    out = model(x)
    out.sum().backward()
    return out.detach(), x.grad if x.is_leaf else None


@parity
def test_weights_of_inference_mode_exchanged(nn, optim):
    model = made_in_inference_mode(nn)["Sequential"]
    for module in model:
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(p.clone()))
    model(torch.randn(4, 3)).sum().backward()
    return dict(model.named_parameters())


@parity
def test_grad_mode_inside_inference_mode(nn, optim):
    """Nothing is recorded in inference mode, even with grad mode on."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2))
    x, target = torch.randn(4, 3), torch.randn(4, 2)
    with torch.inference_mode(), torch.enable_grad():
        y = net(x)
        losses = nn.MSELoss()(y, target), nn.CrossEntropyLoss()(y, torch.tensor([0, 1, 1, 0]))
        made = [y, *losses, net[0].weight * 2, net[0](x), torch.cat([y, y])]
        return [(t.requires_grad, t.is_inference()) for t in made], [t.clone() for t in made]


@parity
def test_asking_for_a_gradient_of_an_inference_tensor(nn, optim):
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(2))
        p.requires_grad_(False)
        p.requires_grad_(True)
    p.requires_grad_(False)
    p.requires_grad_(True)


@pytest.mark.parametrize("way", ["Parameter", "assign"])
@parity
def test_a_parameter_from_an_inference_tensor(nn, optim, way):
    with torch.inference_mode():
        weight = torch.ones(1, 1)
    assert not nn.Parameter(weight, requires_grad=False).requires_grad
    if way == "Parameter":
        return nn.Parameter(weight)
    return nn.Linear(1, 1, bias=False).load_state_dict({"weight": weight}, assign=True)


SETTERS = {
    "_apply": lambda net, set_mode: net._apply(lambda t: (set_mode(), t)[1]),
    "clip_grad_norm_": lambda net, set_mode: nnmirror.utils.clip_grad_norm_(
        (p for p in net.parameters() if set_mode() or True), 1.0
    ),
}


@pytest.mark.parametrize("call", SETTERS)
@pytest.mark.parametrize("own", [None, True, False])
def test_a_mode_set_within_a_call_ends_with_it(call, own):
    """As torch's does: a user's function may set the mirror's own mode."""
    net = nn.Linear(2, 2)
    with nnmirror.set_grad_enabled(own):
        before = nnmirror.is_grad_enabled()
        SETTERS[call](net, lambda: nnmirror.set_grad_enabled(not before) and None)
        assert nnmirror.is_grad_enabled() == before


def test_an_interrupt_inside_a_walk_leaves_torchs_autograd_on():
    """Ctrl-C where a bound walk makes its buffers: modes of torch's must not stay changed."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    w = torch.randn(8, 3, requires_grad=True)  # torch's own

    def step():
        net(torch.randn(4, 3)).pow(2).mean().backward()

    def interrupted(where):
        def profile(frame, event, arg):
            if event == "c_return" and where(frame, arg):
                raise KeyboardInterrupt

        try:
            sys.setprofile(profile)
            step()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False

    for _ in range(20):
        step()
    taken = ("take", "pop", "append")
    assert interrupted(
        lambda frame, called: (
            frame.f_code.co_filename.startswith("<nnmirror walk") and called.__name__ not in taken
        )
    )
    interrupted(
        lambda frame, called: (
            called.__name__ == "__enter__" and frame.f_back.f_code.co_name == "new"
        )
    )
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert (w * 2).requires_grad
    for seen in (False, True):
        net.zero_grad()
        if seen:
            interrupted(lambda frame, called: called.__name__ == "_set_grad_enabled")
            assert torch.is_grad_enabled()
        step()
        assert all(p.grad is not None for p in net.parameters())
