"""from_torch and to_torch: a model of one library continues as a model of the other."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

import nnmirror
from nnmirror import from_torch, to_torch

from .parity import parity, same, same_bits, trained


def models(nn):
    """A model of user-defined classes, with attributes that a conversion may easily lose."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.scale

        @property
        def scale(self):
            return self.factors["out"]

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first = nn.Linear(width, width)
            self.act = nn.ReLU()
            self.register_buffer("shift", torch.full((width,), 0.25))
            self.register_buffer("unsaved", torch.ones(1), persistent=False)

        def forward(self, x):
            return self.act(self.first(x)) + self.shift * self.unsaved

    class Wide(Block):
        def forward(self, x):
            return super().forward(x).clamp(max=2.0)

        def extra_repr(self):
            return f"wide, {super().extra_repr()!r}"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Wide(3)
            self.again = self.block
            self.tied = nn.Linear(3, 3)
            self.tied.weight = self.block.first.weight
            self.scale = nn.Parameter(torch.tensor([0.5]))
            self.middle = nn.ModuleList([nn.Tanh(), nn.Identity()])
            self.out = Scaled(3, 2)
            self.out.factors = {"out": 3.0}
            self.head = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(2, 1, bias=False))
            self.order = [self.block, self.tied]  # modules in a plain list
            self.activation = nn.functional.tanh
            self.run = self._run
            self.nothing = None
            self.register_parameter("absent", None)

        def _run(self, x):
            for layer in self.order:
                x = layer(x)
            return self.activation(x)

        def forward(self, x):
            x = self.run(x) + self.again(x)
            for layer in self.middle:
                x = layer(x) * self.scale
            return self.head(self.out(torch.sin(x)))

    torch.manual_seed(0)
    net = Net()
    net.block.eval()
    net.out.bias.requires_grad_(False)
    return net


def into(nn, other, model, **kw):
    return (from_torch if nn is torch.nn else to_torch)(model, **kw)


BOTH = pytest.mark.parametrize(
    ("nn", "other"), [(torch.nn, nnmirror), (nnmirror, torch.nn)], ids=["from_torch", "to_torch"]
)
OPTIM = {torch.nn: torch.optim, nnmirror: nnmirror.optim}
SHARED = pytest.mark.parametrize("copied", [False, True], ids=["shared", "copied"])


def described(model):
    return (
        repr(model),
        [(name, type(m).__name__, m.training) for name, m in model.named_modules()],
        {name: (p, p.requires_grad) for name, p in model.named_parameters()},
        dict(model.named_buffers()),
        dict(model.state_dict()),
    )


@SHARED
@BOTH
def test_the_same_model_of_the_other_library(nn, other, copied):
    model = models(nn)
    before = copy.deepcopy(described(model))
    new = into(nn, other, model, copy=copied)
    same(before, described(model), "the original")  # unchanged
    same(before, described(new), "converted")
    for module in new.modules():
        assert isinstance(module, other.Module)
        assert not isinstance(module, nn.Module)
    for parameter in new.parameters():
        assert type(parameter) is other.Parameter
    assert new.tied.weight is new.block.first.weight
    assert new.again is new.block is new.order[0]
    assert new.run.__self__ is new
    assert new.activation is other.functional.tanh
    assert new.absent is None
    x = torch.randn(5, 3)
    same(model(x).detach(), new(x).detach(), "output")


@SHARED
@BOTH
def test_training_the_converted_model(nn, other, copied):
    """Training gives the same bits; the original changes if and only if weights are shared."""
    x, target = torch.randn(8, 3), torch.randn(8, 1)
    expected = trained(nn, OPTIM[nn], models(nn), x, target, momentum=0.9)
    model = models(nn)
    weights = copy.deepcopy(dict(model.state_dict()))
    new = into(nn, other, model, copy=copied)
    actual = trained(other, OPTIM[other], new, x, target, momentum=0.9)
    same(expected, actual, "training")
    if copied:
        same(weights, dict(model.state_dict()), "the original")
    else:
        same(dict(new.state_dict()), dict(model.state_dict()), "the original")
    new.block.shift.add_(1)
    assert torch.equal(new.block.shift, model.block.shift) is not copied


@SHARED
@BOTH
def test_round_trip(nn, other, copied):
    model = models(nn)
    back = into(other, nn, into(nn, other, model, copy=copied), copy=copied)
    assert type(back) is type(model)
    assert type(back.out) is type(model.out)
    same(described(model), described(back), "round trip")
    for name, parameter in back.named_parameters():
        shared = parameter.data_ptr() == model.get_parameter(name).data_ptr()
        assert shared is not copied
    assert type(into(nn, other, model)) is type(into(nn, other, model)), "one twin of a class"


@pytest.mark.parametrize("to_none", [True, False])
@parity
def test_training_by_pytorchs_backward_with_a_mirrored_optimiser(nn, optim, to_none):
    """The twin's backward adds its gradients to those of the mirrored parameters.

    Here gradients of gradients, alternating with losses whose backward the mirror computes.
    """
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    model[0].bias.requires_grad_(False)
    twin = to_torch(model) if nn is nnmirror else model
    sgd = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, losses = torch.randn(6, 2, requires_grad=True), []
    for step in range(8):
        sgd.zero_grad(set_to_none=to_none)
        if step == 3:  # frozen when the twin was made
            for m in (model, twin):
                m[0].bias.requires_grad_(True)
        u = twin(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        losses.append(slope.pow(2).mean() + u.pow(2).mean())
        losses[-1].backward(create_graph=step == 6)
        if step % 3 == 0:
            model(x.detach()).pow(2).mean().backward()
        if step % 3 == 1:
            twin(x.detach()).pow(2).mean().backward()
        if step == 4:
            twin.zero_grad(set_to_none=to_none)
            twin(x.detach()).mean().backward()
        if step == 5:
            model.zero_grad(set_to_none=to_none)
            model(x.detach()).mean().backward()
            twin(x.detach()).mean().backward()
        sgd.step()
        for p in model.parameters():
            losses.append(None if p.grad is None else p.grad.detach().clone())
    return [None if t is None else t.detach() for t in losses], dict(model.named_parameters())


def test_a_twin_that_no_longer_shares_its_weights_has_gradients_of_its_own():
    model = nnmirror.Linear(2, 1)
    apart = [to_torch(model, copy=True), copy.deepcopy(to_torch(model)), to_torch(model).double()]
    for twin in apart:
        twin(torch.ones(1, 2, dtype=twin.weight.dtype)).sum().backward()
        assert twin.weight.grad is not None
    assert model.weight.grad is None
    assert isinstance(from_torch(to_torch(model)), nnmirror.Linear)  # the hooks are the bridge's


TWINS = {
    "to_torch, trained": lambda: (model := nnmirror.Linear(2, 1), to_torch(model)),
    "from_torch, trained": lambda: ((model := torch.nn.Linear(2, 1)), from_torch(model))[::-1],
}


@pytest.mark.parametrize("optim", [torch.optim, nnmirror.optim], ids=["torch", "nnmirror"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("twins", TWINS)
def test_an_optimiser_of_the_untrained_twin_warns(twins, name, optim):
    """Without the warning the optimiser would change nothing, in silence."""
    trained, other = TWINS[twins]()
    wrong = getattr(optim, name)(other.parameters(), lr=0.1)
    wrong.step()  # no gradients anywhere: no warning
    trained(torch.ones(1, 2)).sum().backward()
    with pytest.warns(UserWarning, match=r"none of its parameters has a \.grad; but their twins"):
        wrong.step()
    right = getattr(optim, name)(trained.parameters(), lr=0.1)
    right.step()
    trained.zero_grad()
    wrong.step()


@BOTH
def test_gradients_dtypes_and_layouts(nn, other):
    layer = nn.Linear(3, 2).double()
    layer.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64).t())
    layer.weight.tag = "mine"
    layer(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    new = into(nn, other, layer, copy=True)
    same(layer.weight, new.weight, "weight")
    assert new.weight.stride() == layer.weight.stride()
    assert new.weight.tag == "mine"
    assert new.weight.grad.data_ptr() != layer.weight.grad.data_ptr()
    meta = into(nn, other, nn.Linear(3, 2, device="meta"))
    assert meta.weight.is_meta


def test_pytorch_functions_in_a_forward():
    """Global names such as F.relu stay PyTorch's functions: recorded, or refused by name."""

    class Known(torch.nn.Linear):
        def forward(self, x):
            return F.relu(super().forward(x))

    class Unknown(torch.nn.Linear):
        def forward(self, x):
            log_probs = super().forward(x).log_softmax(-1)
            return F.ctc_loss(log_probs, torch.tensor([1]), (2,), (1,))

    model, x = Known(3, 4), torch.randn(2, 3)
    new = from_torch(model, copy=True)
    for m in (model, new):
        m(x).sum().backward()
    same(dict(model.named_parameters()), dict(new.named_parameters()), "F.relu")
    with pytest.raises(NotImplementedError, match="ctc_loss has no backward rule"):
        from_torch(Unknown(3, 4))(x)


def test_errors_name_what_cannot_be_converted():
    class Mine(torch.nn.Bilinear):
        pass

    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2),
        torch.nn.ModuleDict({"two": torch.nn.Bilinear(1, 1, 1), "mine": Mine(1, 1, 1)}),
        torch.nn.Tanh(),
        torch.nn.DataParallel(torch.nn.Linear(1, 1)),
    )
    model[2].register_forward_hook(lambda *args: None)
    model[0].weight.register_hook(lambda grad: None)
    with pytest.raises(TypeError) as caught:
        from_torch(model)
    assert str(caught.value).splitlines()[1:] == [
        f"  0.weight: {torch.typename(model[0].weight)}: the parameter has hooks; remove them first",
        "  1.two: torch.nn.modules.linear.Bilinear: is not mirrored",
        f"  1.mine: {torch.typename(model[1]['mine'])}: its base torch.nn.modules.linear.Bilinear"
        " is not mirrored",
        "  2: torch.nn.modules.activation.Tanh: it has hooks (_forward_hooks); remove them first",
        "  3: torch.nn.parallel.data_parallel.DataParallel: is not mirrored",
    ]
    mirrored = nnmirror.Sequential(nnmirror.Tanh())
    mirrored[0].register_full_backward_hook(lambda *args: None)
    with pytest.raises(TypeError, match=r"0: nnmirror.*it has hooks \(_backward_hooks\)"):
        to_torch(mirrored)
    for convert, wrong in ((from_torch, nnmirror.Tanh()), (to_torch, torch.nn.Tanh())):
        with pytest.raises(TypeError, match="was expected, but got"):
            convert(wrong)


def layers():
    """Each mirrored module, constructed with as few arguments as possible."""
    for name in nnmirror.modules.__all__:
        if name.startswith("Lazy"):  # cannot be converted before its first call
            continue
        for args in ((), (2,), (2, 3), (2, 4), (0, (1, 2))):
            try:
                yield pytest.param(getattr(torch.nn, name)(*args), args, id=name)
            except (TypeError, ValueError):
                continue
            break


@pytest.mark.parametrize(("layer", "args"), list(layers()))
def test_every_module_has_the_attributes_of_its_namesake(layer, args):
    """A converted layer has the attributes that its own constructor sets."""
    made = getattr(nnmirror, type(layer).__name__)(*args)
    for new, like in ((from_torch(layer), made), (to_torch(made), layer)):
        assert type(new) is type(like)
        state, wanted = (
            {k: v for k, v in vars(m).items() if k not in ("_call", "_plan")} for m in (new, like)
        )
        assert set(state) == set(wanted)
        assert repr(new) == repr(like)


def test_unused_twin_classes_are_freed():
    def once():
        class Net(torch.nn.Linear):
            def forward(self, x):
                return super().forward(x)

        new = from_torch(Net(1, 1))
        assert type(from_torch(Net(1, 1))) is type(new)
        return weakref.ref(Net), weakref.ref(type(new))

    refs = once()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def trained_mirror():
    model = models(nnmirror)
    trained(nnmirror, nnmirror.optim, model, torch.randn(8, 3), torch.randn(8, 1))
    return model.eval()


def test_tools_that_need_modules_of_pytorch():
    model, x = trained_mirror(), torch.randn(5, 3)
    expected = model(x).detach()
    new = to_torch(model)
    traced = torch.jit.trace(new, (x,))
    assert same_bits(expected, traced(x).detach())
    exported = torch.export.export(new, (x,)).module()
    assert same_bits(expected, exported(x).detach())


def test_onnx(tmp_path):
    import onnxruntime

    model, x = trained_mirror(), torch.randn(5, 3)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(to_torch(model), (x,), path, dynamo=True, input_names=["x"])
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    # onnxruntime has kernels of its own: close, not the same bits.
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


def test_import_does_not_import_torch_nn():
    code = """
import sys, torch
class Finder:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[:2] != ["torch", "nn"], name
for name in [n for n in sys.modules if n.startswith("torch.nn")]:
    del sys.modules[name]
del torch.nn
sys.meta_path.insert(0, Finder())
import nnmirror
try:
    nnmirror.to_torch(nnmirror.Tanh())
except AssertionError as e:
    print("asked for", e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "asked for torch.nn\n", done.stderr
