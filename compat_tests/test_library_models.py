"""A library's models of torch.nn layers become mirrored where they are used, and train the same."""

import contextlib
import copy
import io
import pickle
import sys
import textwrap
import types
import warnings

import pytest
import torch

import nnmirror
from nnmirror import adopt, from_torch, runner

from .library import nets
from .parity import parity

# The gradient of a convolution's weight has PyTorch's bits in float64, see nnmirror/exact.
pytestmark = pytest.mark.usefixtures("doubles")
NETS = ["resnet", "vgg", "mobilenet_v2", "densenet", "unet"]


@pytest.fixture
def doubles():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, small convolutions are slow on a busy machine
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)


def made(name, **kwargs):
    torch.manual_seed(0)
    return getattr(nets, name)(**kwargs)


def trained(model, opt, steps=2, size=16):
    """The losses of some steps, then the state_dict and the output in evaluation mode."""
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = model(torch.randn(3, 3, size, size)).pow(2).mean()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        return losses, model.state_dict(), model(torch.randn(2, 3, size, size))


@pytest.mark.parametrize("name", NETS)
@parity
def test_from_torch(nn, optim, name):
    model = made(name)
    if nn is nnmirror:
        model = from_torch(model)
    return trained(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


@pytest.mark.parametrize("name", NETS)
@parity
def test_as_a_part_of_a_module(nn, optim, name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone
            self.act = nn.Tanh()

        def forward(self, x):
            return self.act(self.backbone(x))

    backbone = made(name)
    # PyTorch allows the optimiser to be made before the net. (SGD, not Adam: the gradient before a
    # norm layer is zero up to rounding, and Adam scales that rounding up.)
    early = optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    net = Net()
    if nn is nnmirror:
        assert all(isinstance(m, nnmirror.Module) for m in net.modules())
        assert all(type(p) is nnmirror.Parameter for p in net.parameters())
    return trained(net, early)


def new_head(nn, name, model):
    if name == "resnet":
        model.fc = nn.Linear(model.fc.in_features, 3)
    elif name == "densenet":
        model.classifier = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(model.classifier.in_features, 3)
        )
    elif name == "unet":
        model.classifier = nn.Conv2d(4, 1, 1)
    else:  # a layer inside a submodule: only that submodule becomes mirrored here
        last = len(model.classifier) - 1
        model.classifier[last] = nn.Linear(model.classifier[last].in_features, 3)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", NETS)
@parity
def test_a_new_head(nn, optim, name, frozen):
    model = made(name)
    if frozen:
        for p in model.parameters():
            p.requires_grad = False
    new_head(nn, name, model)
    if name == "unet":
        model.ups.insert(0, nn.Identity())
        del model.ups[0]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 2 or not frozen
    return trained(model, optim.SGD(trainable, lr=0.1, momentum=0.9)), len(trainable)


@parity
def test_layers_taken_out_of_a_model(nn, optim):
    model = made("vgg")
    net = nn.Sequential(*list(model.children())[:-1], nn.Flatten(), nn.Linear(32, 2))
    net[0].append(nn.Identity())
    return trained(net, optim.SGD(net.parameters(), lr=0.1)), repr(net)


@parity
def test_references_from_before_the_conversion_stay_valid(nn, optim):
    """References to modules, parameters, hooks and losses from before stay valid afterwards."""
    model = nets.Deep()
    seen, x = [], torch.randn(4, 3)
    handle = model.body.register_forward_hook(lambda m, args, y: seen.append(y.detach()) or y * 2)
    model.first.register_full_backward_hook(lambda m, grads, g: seen.append(g[0].detach()))
    held = [*model.modules()], [*model.parameters()], [model.scale]
    model(x).sum().backward()
    before = model(x).pow(2).sum()  # its backward runs after the conversion
    twice = before + 0
    model.first.bias.requires_grad_(False)
    model.head = nn.Linear(3, 1)
    kept = [*model.modules()][: len(held[0])], [*model.parameters()][: len(held[1])], [model.scale]
    for e, a in zip(held, kept, strict=True):
        assert all(one is other for one, other in zip(e, a, strict=True))
    assert isinstance(model, nets.Deep)
    twice.backward()
    loss = model.head(model(x)).pow(2).mean()
    loss.backward()
    handle.remove()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    opt = optim.Adam([p for p in model.parameters() if p.requires_grad])
    opt.step()
    twin = copy.deepcopy(model)
    return seen, loss.detach(), grads, twin(x).detach(), twin.state_dict(), model(x).detach()


def test_what_cannot_be_mirrored_is_named_with_its_path():
    class Net(nnmirror.Module):
        pass

    model, net = nets.Tagger(), Net()
    place = r"features\.2: torch\.nn\.modules\.linear\.Bilinear: is not mirrored"
    for take in (
        lambda: setattr(net, "model", model),
        lambda: net.add_module("model", model),
        lambda: nnmirror.Sequential(model),
        lambda: setattr(model, "head", nnmirror.Linear(4, 2)),
        lambda: model.add_module("other", nnmirror.Linear(4, 2)),
    ):
        with pytest.raises(TypeError, match=rf"(?s)nothing was changed:.*{place}.*to_torch\("):
            take()
    assert [type(m).__module__ for m in model.modules() if type(m).__name__ == "Linear"] == [
        "torch.nn.modules.linear"
    ] * 3
    assert type(model.body.weight) is torch.nn.Parameter
    model.features[2] = torch.nn.Tanh()
    model.head = nnmirror.Linear(4, 2)
    assert isinstance(model, nnmirror.Module)


def test_nothing_is_changed_where_a_class_cannot_be_exchanged():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), nets.Slotted(2, 2))
    with pytest.raises(TypeError, match=r"nothing was changed:\n.*nets\.Slotted: "):
        nnmirror.Sequential(model)
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError, match="module name can"):
        nnmirror.Sequential().add_module("a.b", layer)
    assert {type(m).__module__.partition(".")[0] for m in (*model, layer)} == {
        "torch",
        "compat_tests",
    }
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())


@parity
def test_a_library_finds_its_layers_by_their_class(nn, optim):
    torch.manual_seed(0)
    model = nets.Finetuned()
    nn.Sequential(model).train()
    assert [type(m) for m in model] == [nn.Linear, nn.BatchNorm1d, nn.Linear]
    model(torch.randn(5, 3)).sum().backward()
    assert [type(m) for m in model[1:]] == [nn.BatchNorm1d, nn.Linear]
    return [m.training for m in model], dict(model.named_buffers()), model[0].weight.grad


def test_to_torch_gives_back_what_became_mirrored():
    model = made("resnet").eval()
    nnmirror.Sequential(model)
    back = nnmirror.to_torch(model)
    assert [type(m) for m in back.modules()] == [type(m) for m in made("resnet").modules()]
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(back, x)(x), model(x))


@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
@parity
def test_a_model_is_pickled(nn, optim, protocol):
    model = made("unet")
    net = nn.Sequential(model, nn.Flatten())
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = pickle.loads(pickle.dumps(loaded, protocol))
    assert [type(m) for m in again.modules()] == [type(m) for m in net.modules()]
    return trained(again, optim.SGD(again.parameters(), lr=0.1))


@pytest.mark.parametrize("inference", [False, True])
@parity
def test_gradients_of_a_forward_before_are_added_to_those_there(nn, optim, inference):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    loss = model(torch.ones(4, 3)).pow(2).sum()
    loss.backward(retain_graph=True)
    held = model.weight.grad
    with torch.inference_mode(inference):
        nn.Sequential(model)
    loss.backward()
    return held, model.weight.grad, held is model.weight.grad


def test_second_derivatives_of_a_forward_before_are_refused():
    model = torch.nn.Linear(3, 2)
    loss = model(torch.ones(4, 3)).pow(2).sum()
    nnmirror.Sequential(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of create_graph=True
        with pytest.raises(RuntimeError, match="became mirrored after its forward"):
            loss.backward(create_graph=True)


# -- under `python -m nnmirror` ----------------------------------------------------------------


def run(source, directory, mirrored):
    """What a script writes to stdout and stderr, run in this process as the runner runs it."""
    script = types.ModuleType("script")
    out, err = io.StringIO(), io.StringIO()
    finder = runner.install(str(directory)) if mirrored else None
    if mirrored:
        script.__dict__["__builtins__"] = runner.BUILTINS
    sys.modules["script"] = script
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = compile(textwrap.dedent(source), str(directory / "script.py"), "exec")
            with nnmirror.exact():
                exec(code, script.__dict__)
    finally:
        del sys.modules["script"]
        if finder is not None:
            runner.uninstall(finder)
    return out.getvalue(), err.getvalue()


SCRIPT = """
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    import torch.optim as optim
    from compat_tests.library import nets

    def train(name, model, params=None):
        optimizer = optim.SGD(params or model.parameters(), lr=0.1, momentum=0.9)
        for step in range(2):
            optimizer.zero_grad()
            out = model(torch.randn(3, 3, 16, 16))
            loss = F.cross_entropy(out.flatten(1), torch.arange(3) % 2)
            loss.backward()
            optimizer.step()
            print(name, step, loss.item())
        print(sum(p.abs().sum() for p in model.state_dict().values()).item())

    for name in NAMES:
        torch.manual_seed(0)
        make = getattr(nets, name)
        train(name, make())

        model = make()   # as they are, with another beginning, and one frozen part
        for m in model.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(m.weight)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.weight, 0.5)
            elif isinstance(m, (nets.BasicBlock, nets.DenseLayer)):
                print("block", type(m).__name__)
        next(model.children()).requires_grad_(False)
        train(name, model, [p for p in model.parameters() if p.requires_grad])

        model = make(num_classes=4)   # a new head
        if hasattr(model, "fc"):
            model.fc = nn.Linear(model.fc.in_features, 2)
        elif name == "unet":
            model.classifier = nn.Conv2d(4, 2, 1)
        elif isinstance(model.classifier, nn.Linear):
            model.classifier = nn.Linear(model.classifier.in_features, 2)
        else:
            model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, 2)
        train(name, model)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone = make()
                self.head = nn.LazyLinear(3)

            def forward(self, x):
                return self.head(F.relu(self.backbone(x)).flatten(1))

        net = Net()
        net(torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1))
        train(name, net)
        kinds = {type(m).__module__.partition(".")[0] for m in (*model.modules(), *net.modules())}
    print(isinstance(model, nn.Module))
    """


@pytest.mark.parametrize("name", NETS)
def test_models_that_a_script_takes_from_a_library(name, tmp_path):
    source = SCRIPT.replace("NAMES", repr([name]))
    expected, _ = run(source, tmp_path, mirrored=False)
    actual, said = run(source, tmp_path, mirrored=True)
    assert actual == expected
    assert said == ""
    assert isinstance(made(name).train(), torch.nn.Module), "the library itself is as it was"


def test_stderr_names_what_stays_pytorchs(tmp_path):
    """A model with a layer that has no mirror is left to PyTorch, and stderr names the layer."""
    source = """
        import torch
        from torch import nn
        from compat_tests.library import nets
        torch.manual_seed(0)
        model = nets.Tagger()
        for _ in range(2):
            loss = nn.MSELoss()(model(torch.ones(1, 4)), torch.zeros(1, 2))
            loss.backward()
        print(loss.item(), model.body.weight.grad)
        """
    expected, _ = run(source, tmp_path, mirrored=False)
    actual, said = run(source, tmp_path, mirrored=True)
    assert actual == expected
    assert said.splitlines() == [
        f"nnmirror: {tmp_path}/script.py:8: compat_tests.library.nets.Tagger is left to PyTorch,"
        " which trains it:",
        "  features.2: torch.nn.modules.linear.Bilinear: is not mirrored",
    ]
    with pytest.raises(TypeError, match=r"features\.2: .*Bilinear"):
        run(source.rstrip() + "\n        model.head = nn.Linear(4, 2)", tmp_path, mirrored=True)


def test_a_library_may_be_kept(tmp_path):
    source = """
        import torch
        from torch import nn
        from compat_tests.library import nets
        model = nets.Deep()
        print(type(model.first).__module__)
        nn.Sequential(model)
        """
    adopt.kept.add("compat_tests")  # --keep compat_tests
    try:
        with pytest.raises(TypeError, match="compat_tests is kept PyTorch's"):
            run(source, tmp_path, mirrored=True)
    finally:
        adopt.kept.clear()


def test_a_subclass_of_a_librarys_class_stays_pytorchs(tmp_path):
    """A script's subclass of a library's class stays PyTorch's; a library net in it is mirrored."""
    source = """
        import torch
        from torch import nn
        from compat_tests.library import nets

        class Driven(nets.Tagger):
            def __init__(self):
                super().__init__()
                self.features = None
                self.inner = nets.vgg()

            def forward(self, x):
                return self.inner.classifier(x)

        model = Driven()
        print(model(torch.ones(1, 32)).shape, [*model.children()][-1] is model.inner)
        print(type(model.body).__module__, type(model.inner).__mro__[1].__module__)
        try:
            class Refused(nets.VGG):
                def __init__(self):
                    super().__init__(None)
                    self.fc = nn.Linear(1, 1)
            Refused()
        except TypeError as e:
            print(e)
        """
    out, said = run(source, tmp_path, mirrored=True)
    lines = out.splitlines()
    assert lines[0] == "torch.Size([1, 10]) True"
    assert lines[1] == "torch.nn.modules.linear nnmirror.modules.module"
    assert "would be left out of parameters()" in lines[2]
    assert said == ""
