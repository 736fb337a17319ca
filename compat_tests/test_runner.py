"""`python -m nnmirror`: an unmodified script uses nnmirror, and the libraries it imports do not."""

import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nnmirror
from nnmirror import _options, check, report
from nnmirror.__main__ import main

HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts"


def write(directory, **files):
    for name, text in files.items():
        path = directory / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def python(*args, cwd, path=()):
    paths = [str(HERE.parent), *map(str, path), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def mirrored(tmp_path, monkeypatch, capsys):
    """Calls the main function of `python -m nnmirror` in `tmp_path`, without starting a process."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        try:
            status = main(list(args))
        except SystemExit as e:
            status = e.code or 0
        said = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=said.out, stderr=said.err)

    return run


def test_help_and_version_come_at_once(tmp_path, mirrored):
    """--help, --version and usage errors do not import torch, which takes seconds."""
    for args in ([], ["--help"], ["--version"], ["--chekc", "script.py"], ["--check"]):
        done = python("-X", "importtime", "-m", "nnmirror", *args, cwd=tmp_path)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        loaded = re.findall(r"\| +([\w.]+)$", done.stderr, re.M)
        assert "argparse" in loaded
        assert "torch" not in loaded
        again = mirrored(*args)
        assert (done.returncode, done.stdout) == (again.returncode, again.stdout)
        assert lines == again.stderr.splitlines()
        assert done.returncode == (2 if args[:1] in (["--chekc"], ["--check"]) else 0)
    assert mirrored("--version").stdout == f"nnmirror {nnmirror.__version__}\n"
    assert mirrored().stdout == mirrored("--help").stdout
    assert "python -m nnmirror --check script.py" in mirrored("--help").stdout
    assert all(action.help for action in _options.parser()._actions)


@pytest.mark.parametrize(
    "name",
    [
        "two_layers",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("polynomial", "moons")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("autoencoder", "actor_critic")),
    ],
)
def test_scripts_as_people_write_them(name, mirrored):
    """--check finds that typical scripts print and save the same bits on both libraries."""
    script = SCRIPTS / f"{name}.py"
    unknown = [use.name for use in report.uses(report.read(str(script))) if not use.mirrored]
    if unknown:
        pytest.skip(f"not mirrored yet: {', '.join(unknown)}")
    done = mirrored("--check", str(script))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Both ran in exact mode. By default some" in done.stdout
    assert done.stdout.endswith("identical\n")
    assert "printed: identical (0 bytes)" not in done.stdout
    assert done.stdout.count("saved ") == {"actor_critic": 0}.get(name, 1)


IMAGES = sorted(path.stem for path in (SCRIPTS / "images").glob("*.py") if path.stem != "all")


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_scripts_with_images_and_series(half, tmp_path, monkeypatch):
    """Scripts with convolutions, pooling, norms and the like print the same on both libraries.

    They print rounded numbers: gradients of a convolution's weight differ in the last place.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more are slow on a busy machine
    script = str(SCRIPTS / "images" / "all.py")
    done = python("-m", "nnmirror", "--check", script, *IMAGES[half::2], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nnmirror | == ") == len(IMAGES[half::2]) == 10


def test_every_spelling_of_the_import(tmp_path):
    write(
        tmp_path,
        script="""
            import importlib, sys
            import torch
            import torch.nn
            import torch.nn as nn
            import torch.nn.functional as F
            import torch.optim as optim
            from torch import nn as nn2, optim as optim2
            from torch.nn import functional as F2, Linear
            from torch.nn.modules.linear import Linear as deep
            from torch.nn.parameter import Parameter
            from torch.nn.utils import clip_grad_norm_, spectral_norm, prune
            from torch.nn.utils.prune import l1_unstructured
            from torch.autograd.function import Function, InplaceFunction
            from torch.optim import SGD
            import helper, pkg.inner
            lazily = {}
            exec("import torch; found = torch.nn.Linear", lazily)
            def in_a_function():
                from torch.nn import Linear
                return Linear
            linears = [torch.nn.Linear, nn.Linear, nn2.Linear, Linear, deep, helper.nn.Linear,
                       pkg.inner.torch.nn.Linear, lazily["found"], in_a_function(),
                       importlib.import_module("torch.nn").Linear, __import__("torch").nn.Linear,
                       nn.modules.Linear, F.torch.nn.Linear]
            print({c.__module__ for c in linears})
            print({f.__module__ for f in (F.relu, F2.relu, nn.functional.relu, torch.nn.functional.relu)})
            print({c.__module__ for c in (SGD, optim.SGD, optim2.SGD, torch.optim.SGD)})
            print(Parameter is nn.Parameter, clip_grad_norm_.__module__)
            print(spectral_norm.__module__, l1_unstructured is nn.utils.prune.l1_unstructured)
            print({f.__module__ for f in (torch.autograd.Function, Function, InplaceFunction)})
            # Names of the mirror's own are not PyTorch's.
            print(hasattr(nn, "enable_grad"), hasattr(nn, "Linear"), nn.__name__, "Conv2d" in dir(nn))
            """,
        helper="from torch import nn",
        pkg__in____init__="from . import inner",
        pkg__in__inner="import torch.nn.functional, torch",
    )
    done = python("-m", "nnmirror", "script.py", cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "{'nnmirror.modules.linear'}",
        "{'nnmirror.functional'}",
        "{'nnmirror.optim.sgd'}",
        "True nnmirror.utils.clip_grad",
        "nnmirror.utils.spectral_norm True",
        "{'nnmirror.function'}",
        "False True torch.nn True",
    ], done.stderr


@pytest.mark.slow
def test_what_a_module_has_by_its_dict(tmp_path):
    """As a library finds all optimisers that there are."""
    write(
        tmp_path,
        script="""
            import torch
            from torch.optim.optimizer import Optimizer
            found = {n: c for n, c in vars(torch.optim).items() if isinstance(c, type)}
            print(issubclass(found["SGD"], Optimizer), found["SGD"].__module__, "LBFGS" in found)
            print(torch.nn.__dict__["Linear"].__module__, "StepLR" in vars(torch.optim.lr_scheduler))
            """,
    )
    done = python("-m", "nnmirror", "script.py", cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "True nnmirror.optim.sgd True",
        "nnmirror.modules.linear True",
    ], done.stderr
    assert not done.stderr


def test_only_the_scripts_own_code_sees_the_mirror(tmp_path):
    """Installed libraries keep using PyTorch, even if installed below the script's directory."""
    write(
        tmp_path,
        script="""
            import library, beside, torch
            print(library.nn.Linear.__module__, beside.nn.Linear.__module__)
            import torch.utils.data.dataloader as d
            print(d.torch is torch, d.torch.nn.Linear.__module__)
            print(isinstance(torch.nn.Linear(1, 1)(torch.ones(1)), torch.Tensor))
            torch.a_new_name = 1   # what a script sets in torch is set there
            print(d.torch.a_new_name)
            """,
        beside="from torch import nn",
        env__in__lib__in____in__="",
    )
    installed = tmp_path / "env" / "site-packages"
    write(installed, library="import torch.nn as nn")
    done = python("-m", "nnmirror", "script.py", cwd=tmp_path, path=[installed])
    assert done.stdout.splitlines() == [
        "torch.nn.modules.linear nnmirror.modules.linear",
        "False torch.nn.modules.linear",
        "True",
        "1",
    ], done.stderr


AS_PYTHON = """
    import pickle, sys, torch
    from torch.autograd import Function

    class Square(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x
        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * 2 * x

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
        def forward(self, x):
            return Square.apply(self.layer(x))

    def fail():
        import failing

    if __name__ == "__main__":
        torch.manual_seed(0)
        print(sys.argv, sys.path[0], __file__, __spec__ and __spec__.name, __package__)
        net = pickle.loads(pickle.dumps(Net()))
        loss = net(torch.ones(3, 2)).sum()
        torch.autograd.backward(loss, retain_graph=True)
        print(type(net), net.layer.weight.grad, torch.autograd.grad(loss, list(net.parameters())))
        w = torch.ones(2, requires_grad=True)   # a tensor of torch's own
        torch.autograd.backward((w * 3).sum())
        print(w.grad)
        if sys.argv[1] == "exit":
            sys.exit(7)
        fail()
    """


def test_a_library_as_a_part_of_the_script(tmp_path):
    """One that wraps the model in a module of its own, and has a Function of its own."""
    write(
        tmp_path,
        lib__in__solver="""
            import torch
            class Doubled(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x): return x * 2
                @staticmethod
                def backward(ctx, g): return g * 2
            class Wrapped(torch.nn.Module):
                def __init__(self, f):
                    super().__init__()
                    self.f = f
                def forward(self, x): return Doubled.apply(self.f(x))
            def solve(f, x): return Wrapped(f)(x)
            """,
        script="""
            import torch
            from torch import nn
            from solver import solve
            torch.manual_seed(0)
            net = nn.Linear(2, 1)
            solve(net, torch.ones(3, 2)).sum().backward()
            print(type(net).__module__, net.weight.grad.tolist())
            """,
    )
    (tmp_path / "own").mkdir()
    (tmp_path / "script.py").rename(tmp_path / "own" / "script.py")

    def run(*args):
        return python(
            "-m", "nnmirror", *args, "own/script.py", cwd=tmp_path, path=[tmp_path / "lib"]
        )

    assert "cannot assign" in run().stderr
    done = run("--mirror", "solver")
    assert done.stdout == "nnmirror.modules.linear [[6.0, 6.0]]\n", done.stderr
    assert "torch.nn.modules.linear [[6.0, 6.0]]" in run("--check", "--mirror=solver").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [["sub/script.py", "exit"], ["sub/script.py", "--x", "-m"], ["-m", "sub.script", "fail"]],
)
def test_runs_as_python_itself_runs_it(args, tmp_path):
    """Output, arguments, paths, exit status and traceback are the same without `-m nnmirror`."""
    write(tmp_path, sub__in__script=AS_PYTHON, sub__in__failing="1 / 0", failing="1 / 0")
    expected = python(*args, cwd=tmp_path)
    actual = python("-m", "nnmirror", *args, cwd=tmp_path)
    assert actual.stdout == expected.stdout, actual.stderr
    assert actual.returncode == expected.returncode == (7 if "exit" in args else 1)
    runpy = "".join(  # the traceback without runpy's own lines
        line for line in expected.stderr.splitlines(True) if "<frozen runpy>" not in line
    )
    assert actual.stderr == runpy


def test_a_name_that_is_not_mirrored_stops_the_script_there(tmp_path):
    write(
        tmp_path,
        script="""
            from torch import nn
            try:
                from torch.nn.utils import weight_norm
            except ImportError as e:
                print(e)
            try:
                import torch.nn.parallel as p
                p.DataParallel(nn.Linear(1, 1))
            except NotImplementedError as e:
                print(e)
            nn.RNN(1, 1, 1)
            """,
    )
    done = python("-m", "nnmirror", "script.py", cwd=tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert {text.split()[1] for text in said[:3]} == {
        f"script.py:{n}" for n in (4, 9, 12)
    }  # reported before the script runs, whether or not the line is reached
    for line, name, text in zip(
        (4, 9, 12),
        ("utils.weight_norm", "DataParallel", "RNN"),
        [*done.stdout.splitlines(), said[-1]],
        strict=True,
    ):
        assert f"script.py:{line} uses torch.nn.{name}, which is not mirrored. What to" in text


def test_report(tmp_path, monkeypatch):
    write(
        tmp_path,
        script="""
            import torch, helper
            import torch.nn as nn
            from torch.optim import SGD as sgd, SparseAdam
            from torch.nn import GRU, RNN
            from torch.optim.swa_utils import AveragedModel, update_bn
            from torch.nn import *
            layers = torch.nn
            class Net(nn.Module):
                def forward(self, x):
                    isinstance(self, (nn.Linear, nn.LSTM)), RNN(1, 1, 1)
                    return layers.functional.relu(x) + Linear(2, 1)(x) + unrelated.LSTM
            opt = sgd
            """,
        helper="""
            import torch.nn.functional as F
            F.grid_sample
            torch.manual_seed(1)
            """,
    )
    monkeypatch.chdir(tmp_path)
    sources = report.read("script.py")
    assert report.render(report.uses(sources)).splitlines() == [
        "script.py",
        "  torch.optim.SGD                      mirrored      line 4, 13",
        "  torch.optim.SparseAdam               mirrored      line 4",
        "  torch.nn.GRU                         named only    line 5",
        "  torch.nn.RNN                         named only    line 5",
        "  torch.optim.swa_utils.AveragedModel  mirrored      line 6",
        "  torch.optim.swa_utils.update_bn      mirrored      line 6",
        "  torch.nn.Module                      mirrored      line 9",
        "  torch.nn.LSTM                        named only    line 11",
        "  torch.nn.Linear                      mirrored      line 11, 12",
        "  torch.nn.RNN                         NOT MIRRORED  line 11",
        "  torch.nn.functional.relu             mirrored      line 12",
        "helper.py",
        "  torch.nn.functional.grid_sample      NOT MIRRORED  line 3",
        "9 of 11 names are mirrored",
    ]
    assert [source.seeds for source in sources] == [[], [4]]


REFUSED = """
    import torch, torchmetrics
    from torch import nn
    from torch.utils.checkpoint import checkpoint
    import library
    class Net(nn.Module):
        pass
    class Measured(torchmetrics.Metric):   # a torch.nn.Module
        def __init__(self):
            super().__init__()
            self.net = Net()
    class Plain(torchmetrics.Metric):
        def update(self, x):
            return nn.functional.relu(x)
    net = nn.Sequential(nn.Linear(2, 1))
    def not_reached(loss, x):
        torch.func.grad(net)(x)
        nn.Embedding(2, 1, sparse=True)
        checkpoint(net, x, use_reentrant=True)
        checkpoint(net, x, use_reentrant=False)
        big = library.model()
        big.head[0] = nn.Linear(2, 1)
    print("ran")
    """


@pytest.mark.slow
def test_report_names_the_calls_that_are_refused(tmp_path, monkeypatch, mirrored):
    """A call that would be refused is listed, and the exit status is 1."""
    pytest.importorskip("torchmetrics")
    write(tmp_path, script=REFUSED)
    installed = tmp_path / "env" / "site-packages"
    write(installed, library="def model():\n    1 / 0")
    monkeypatch.syspath_prepend(installed)
    done = mirrored("--report", "script.py")
    sys.modules.pop("library")
    assert done.returncode == 1
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines() if "REFUSED" in line]
    assert [(name, text.partition(":")[0]) for name, _, text in lines] == [
        ("sparse=True", "line 18"),
        ("use_reentrant=True", "line 19"),
        ("torch.func.grad", "line 17"),
        ("torchmetrics.Metric", "line 8"),
    ]
    assert done.stdout.endswith("; 4 calls are refused\n")
    assert re.search(r"library\.model +at run time +line 22: a torch.nn.Module that", done.stdout)
    done = python("-m", "nnmirror", "script.py", cwd=tmp_path, path=[installed])
    assert done.stdout == "ran\n", done.stderr
    told = [line.split()[1:4] for line in done.stderr.splitlines()]
    assert told == [
        ["script.py:18", "uses", "sparse=True,"],
        ["script.py:19", "uses", "use_reentrant=True,"],
        ["script.py:17", "uses", "torch.func.grad,"],
    ]


@pytest.mark.parametrize("name", sorted(report._REFUSED_NAMES))
def test_what_the_report_calls_refused_is_there(name):
    value = torch
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    assert callable(value)


LAYERS = """
    import torch
    from torch import nn, optim
    from torch.nn.modules.conv import _ConvNd
    torch.manual_seed(0)

    class Blur(nn.Bilinear):
        pass

    def init(m):
        if isinstance(m, (nn.Linear, nn.Bilinear, _ConvNd)):
            nn.init.ones_(m.weight)
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.zeros_(m.weight)
        elif isinstance(m, (nn.DataParallel, nn.modules.loss._Loss)):
            print("never")

    LAYERS = {"linear": nn.Linear, "other": nn.Bilinear, "lstm": nn.LSTM}
    net = nn.Sequential(LAYERS["linear"](2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    net.apply(init)
    x = torch.randn(5, 2)
    for name in ("LBFGS", "Adamax", "NAdam", "RAdam", "Adadelta", "Rprop", "ASGD"):
        opt = getattr(optim, name)(net.parameters(), lr=0.1)
        def closure():
            opt.zero_grad()
            loss = net(x).pow(2).mean()
            loss.backward()
            return loss
        schedule = optim.lr_scheduler.ExponentialLR(opt, 0.9)
        print(name, isinstance(opt, optim.Optimizer), opt.step(closure).item())
        schedule.step()
    print(net.state_dict(), issubclass(Blur, nn.Module))
    """


@pytest.mark.slow
def test_layers_that_are_asked_about_and_every_optimiser(tmp_path, capsys):
    write(tmp_path, script=LAYERS, other=LAYERS.rstrip() + "\n    Blur(1, 1, 1)")
    exec(textwrap.dedent(LAYERS), {"__name__": "__main__"})
    expected = capsys.readouterr().out
    actual = python("-m", "nnmirror", "script.py", cwd=tmp_path)
    assert actual.stderr.splitlines() == [  # not for names used only in isinstance
        f"nnmirror: script.py:{line} uses torch.nn.{name}, which is not mirrored; the script will"
        " stop if it makes one"
        for line, name in ((7, "Bilinear"), (18, "LSTM"))
    ]
    assert actual.stdout == expected
    done = python("-m", "nnmirror", "other.py", cwd=tmp_path)
    assert done.stdout == expected
    assert "other.py:33 uses torch.nn.Bilinear, which is not mirrored. What to" in done.stderr


@pytest.mark.slow
def test_check_shows_what_comes_and_where_both_fail(tmp_path, mirrored):
    """--check shows output as it comes, with the script's own paths, and where both runs fail."""
    write(
        tmp_path,
        script="""
            import sys, torch
            # The place of what fails.
            print("from", __file__)

            if sys.argv[1] == "fail":
                torch.nn.Linear
                raise ValueError("alike")
            """,
    )
    here = os.path.realpath(tmp_path)
    done = mirrored("--check", "--report", "script.py", "fail")
    said = re.sub(r"\d+\.\d s", "0 s", done.stdout).splitlines()
    assert (done.returncode, said) == (
        0,
        [
            "script.py",
            "  torch.nn.Linear  mirrored      line 7",
            "1 of 1 names are mirrored",
            f"torch    | from {here}/script.py",
            "torch:    0 s, exit status 1",
            f"nnmirror | from {here}/script.py",
            "nnmirror: 0 s, exit status 1",
            "seed: the script sets none; both runs were seeded with 0",
            "both fail: alike",
            f"printed: identical ({len(here) + 16} bytes)",
            "identical",
        ],
    )
    assert done.stderr.count(f'File "{here}/script.py", line 8') == 2


@pytest.mark.slow
def test_check_says_why_the_runs_fail(tmp_path, mirrored):
    write(
        tmp_path,
        script="""
            import sys, torch
            name = torch.nn.Linear.__module__
            if sys.argv[1] == "both":
                raise ValueError(name)
            torch.nn.Linear(2, 1)(torch.ones(2 + (name[0] == "n")))
            """,
    )
    here = os.path.realpath(tmp_path)
    done = mirrored("--check", "script.py", "both")
    assert done.returncode == 1
    assert done.stdout.splitlines()[3:8] == [
        "both fail, with different errors",
        "  PyTorch:  ValueError: torch.nn.modules.linear",
        f"            at {here}/script.py:5",
        "  nnmirror: ValueError: nnmirror.modules.linear",
        f"            at {here}/script.py:5",
    ]
    done = mirrored("--check", "script.py", "one")
    assert done.returncode == 1
    assert done.stdout.splitlines()[3:6] == [
        "exit status: PyTorch 0, nnmirror 1",
        "  nnmirror: RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3 and 2x1)",
        f"            at {here}/script.py:6",  # not the line of the package that raised
    ]


@pytest.mark.slow
@pytest.mark.parametrize("reached", ["all", "the first"])
def test_ctrl_c_ends_a_check_without_a_traceback(tmp_path, reached):
    """Output up to Ctrl-C is shown, and no process or temporary copy is left."""
    write(
        tmp_path,
        script="""
            import os, time
            print("started", os.getpid())
            time.sleep(60)
            """,
    )
    work = tmp_path / "work"
    work.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "nnmirror", "--check", "../script.py"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        started = process.stdout.readline()
        assert started.startswith("torch    | started ")
        if reached == "all":  # as a terminal does at Ctrl-C
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "interrupted\n")
    assert process.returncode == 130
    assert sorted(os.listdir(tmp_path)) == ["script.py", "work"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.split()[-1]), 0)


@pytest.mark.slow
def test_check_finds_the_first_difference(tmp_path, mirrored):
    write(
        tmp_path,
        script="""
            import torch
            print("alike", torch.randn(1))
            name = torch.nn.Linear.__module__
            print(name)
            with open("log.txt", "a") as log:
                log.write("once\\n")   # a second run must not see the first one's
            torch.save({"weights": torch.arange(4.) + (name[0] == "t")}, "saved.pt")
            """,
    )
    done = mirrored("--check", "script.py")
    assert done.returncode == 1
    said = done.stdout.splitlines()
    assert said[-8:] == [
        "seed: the script sets none; both runs were seeded with 0",
        "printed: line 2 differs",
        "  PyTorch:  torch.nn.modules.linear",
        "  nnmirror: nnmirror.modules.linear",
        "saved log.txt: identical",
        "saved saved.pt: it['weights']: 4 of 4 elements differ, the first: 1.0 and 0.0;"
        " the furthest by 2.1e+06 units in the last place of the largest",
        "Both ran in exact mode. The gradients that differ even so: nnmirror/exact/README.md",
        "DIFFERENT",
    ]
    assert os.listdir(tmp_path) == ["script.py"]


def test_saved_models_are_compared_by_their_bits(tmp_path):
    def save(name, nn, change=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        if change:
            change(model)
        torch.save([model, dict(model.named_parameters())], tmp_path / name)
        return tmp_path / name

    theirs = save("torch", torch.nn)
    assert check.compare_files(theirs, save("same", nnmirror)) is None

    def smallest(model):
        with torch.no_grad():
            model[2].bias.detach().view(torch.int32).add_(1)

    assert "['bias']" in check.compare_files(theirs, save("bit", nnmirror, smallest))
    frozen = save("frozen", nnmirror, lambda model: model[0].requires_grad_(False))
    assert "True and False" in check.compare_files(theirs, frozen)
    other = save("other", nnmirror, lambda model: model.append(nnmirror.Tanh()))
    assert "keys differ" in check.compare_files(theirs, other)


def test_notebook_extension(tmp_path, monkeypatch, capsys):
    """Cells after %load_ext import nnmirror as torch.nn, cells after %unload_ext PyTorch's."""
    monkeypatch.chdir(tmp_path)
    shell = SimpleNamespace(user_ns={"torch": torch})
    exec("from torch import nn as before", shell.user_ns)
    nnmirror.load_ipython_extension(shell)
    assert "before, torch imported before" in capsys.readouterr().err
    try:
        exec("import torch\nfrom torch import nn\ndef f():\n  return torch.nn.ReLU", shell.user_ns)
        assert shell.user_ns["nn"].Linear is nnmirror.Linear
        assert shell.user_ns["f"]() is nnmirror.ReLU
        with pytest.raises(NotImplementedError, match=r"uses torch\.nn\.Bilinear, which is not"):
            exec("nn.Bilinear(1, 1, 1)", shell.user_ns)
    finally:
        nnmirror.unload_ipython_extension(shell)
    exec("from torch import nn", shell.user_ns)
    assert shell.user_ns["nn"] is torch.nn


def test_notebook_extension_in_ipython(tmp_path):
    pytest.importorskip("IPython")
    code = """
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        for cell in ("%load_ext nnmirror", "import torch", "linear = torch.nn.Linear"):
            shell.run_cell(cell).raise_error()
        print(shell.user_ns["linear"].__module__)
        """
    write(tmp_path, cells=code)
    done = python("cells.py", cwd=tmp_path)
    assert "nnmirror.modules.linear" in done.stdout, done.stderr


def test_pickled_objects_are_compared_by_what_they_hold(tmp_path):
    """--check compares pickled objects, not their bytes, which name the library and storages."""

    class Trainer:
        def __init__(self, nn, optim, bias):
            torch.manual_seed(0)
            self.itself = self
            self.model = nn.Linear(2, 3)
            self.optimizer = optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
            self.loss = self.model(torch.ones(1, 2)).sum()
            self.loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                self.model.bias.add_(bias)
            self.settings = Settings(lr=bias)

    class Settings(dict):
        pass

    for made in (Trainer, Settings):  # pickle looks classes up by module and name
        made.__qualname__ = made.__name__
        made.__module__ = __name__
        globals()[made.__name__] = made

    def save(name, nn, optim, bias=0.0):
        files = tmp_path / f"{name}.pt", tmp_path / f"{name}.pkl"
        trainer = Trainer(nn, optim, bias)
        torch.save(trainer, files[0])
        with open(files[1], "wb") as file:
            pickle.dump(trainer.model.weight.detach(), file)
            pickle.dump(trainer, file)
        return files

    theirs = save("torch", torch.nn, torch.optim)
    for e, a in zip(theirs, save("mirror", nnmirror, nnmirror.optim), strict=True):
        assert check.compare_files(e, a) is None
    for e, a in zip(theirs, save("other", nnmirror, nnmirror.optim, 1.0), strict=True):
        assert "['bias'][0]: 3 of 3 elements differ" in check.compare_files(e, a)
    (tmp_path / "one.txt").write_text("N.")
    (tmp_path / "other.txt").write_text("N. ")
    assert "byte 2" in check.compare_files(tmp_path / "one.txt", tmp_path / "other.txt")
