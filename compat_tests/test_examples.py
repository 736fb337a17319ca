"""The examples: a few of their iterations, with the same bits on both backends."""

import argparse
import ast
import importlib
import json
import math
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nnmirror

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def report(monkeypatch):
    """examples/report.py, which imports disk.py beside it; neither needs matplotlib here."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("report")


def small(report, **changed):
    return report.Settings(**{"epochs": 2, "points": 40, **changed})


@pytest.mark.parametrize("init", ["[0, 1]", "default"])
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("step", ["SGD", "GD"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_the_report_runs_alike_on_both(report, activation, step, tanh, init):
    """Otherwise the table would compare two different trainings."""
    settings = small(report, activation=activation, step=step, tanh=tanh, init=init)
    runs = {name: report.train(settings, name) for name in report.BACKENDS}
    assert len(runs["torch"].losses) == 1 + 2 * 10
    assert report.same_bits(runs) == "yes"


@pytest.mark.parametrize("changed", [{"momentum": 0.9}, {"reduction": "sum"}, {"lr": 0.05}])
def test_the_puzzle_runs_alike_on_both(report, changed):
    settings = small(report, init="default", **changed)
    runs = {name: report.train(settings, name, every=10) for name in report.BACKENDS}
    assert len(runs["torch"].losses) == 1 + 2
    assert report.same_bits(runs) == "yes"


def test_different_bits_are_reported(report):
    runs = {
        name: report.train(small(report, seed=seed), name)
        for seed, name in enumerate(report.BACKENDS)
    }
    assert report.same_bits(runs) == "NO"
    assert report.same_bits({"torch": runs["torch"]}) == "not compared"


def test_gd_is_sgd_on_the_summed_loss(report):
    """As puzzle.md says of the report's GD. Close, not the same bits: SGD's step rounds once."""
    by_gd = report.train(small(report, init="default", step="GD"), "nnmirror")
    by_sgd = report.train(small(report, init="default", reduction="sum"), "nnmirror")
    torch.testing.assert_close(by_gd.losses, by_sgd.losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["torch", "nnmirror"])
def test_a_saturated_tanh_never_moves(report, name):
    """Weights in [0, 1] drive the output to 1, where the gradient of tanh is 0 in float32."""
    losses = report.train(small(report, tanh=True), name).losses
    assert set(losses) == {losses[0]}
    assert not math.isnan(losses[0][0])


@pytest.mark.parametrize("name", ["torch", "nnmirror"])
def test_looking_inside(report, name):
    rows = report.inside(small(report, tanh=True), name, (0, 3))
    assert [row[0] for row in rows] == ["0", "3"]
    assert rows[0][-1] == "0, 0, 0, 0"
    assert rows == report.inside(small(report, tanh=True), "torch", (0, 3))


def test_the_lesson(monkeypatch, capsys):
    """Each cell is run as in a notebook, which shows the value of its last line."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cells = json.loads((EXAMPLES / "lesson.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    names, shown = {}, []
    for cell in code:
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), cell["id"], "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
            shown += [value._repr_html_()] if hasattr(value, "_repr_html_") else []
    assert [page.count("<iframe") for page in shown] == [1, 1, 0]
    said = capsys.readouterr().out
    assert "weight the same bits: True" in said
    assert "the gradient of output[1] with respect to x[1] is wrong" in said
    assert "the same losses: True" in said


def commands():
    return sorted(p.stem for p in EXAMPLES.glob("*.py") if "__main__" in p.read_text())


@pytest.mark.parametrize("name", commands())
def test_the_command_line(name, monkeypatch):
    """Every option has a help text, and Ctrl-C ends the process without a traceback."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before, seen = signal.getsignal(signal.SIGINT), []

    def parse_args(parser):
        seen.extend([parser, signal.getsignal(signal.SIGINT)])
        parser.exit()

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    try:
        with pytest.raises(SystemExit):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    parser, on_ctrl_c = seen
    assert [a.dest for a in parser._actions if not a.help] == []
    assert parser.description
    assert on_ctrl_c is signal.SIG_DFL


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("digits")


def briefly(**changed):
    settings = {"epochs": 2, "lr": 0.05, "batch": 32, "width": 16, "seed": 0, "repeats": 1}
    return argparse.Namespace(**{**settings, **changed})


def test_digits_are_learnt_alike_on_both(digits):
    """Otherwise the accuracy in examples/README.md would be that of one library only."""
    said = {name: [] for name in ("torch", "nnmirror")}
    runs = {name: digits.train(briefly(), name, say=lines.append) for name, lines in said.items()}
    assert said["torch"] == said["nnmirror"]
    assert len(said["torch"]) == len(runs["torch"]["losses"]) == 2
    assert runs["torch"]["losses"] == runs["nnmirror"]["losses"]
    assert torch.equal(runs["torch"]["weights"], runs["nnmirror"]["weights"])
    assert runs["torch"]["accuracy"] == runs["nnmirror"]["accuracy"] > 0.9


def test_digits_reports_whether_the_bits_are_the_same(digits, monkeypatch, capsys):
    assert digits.compare(briefly(epochs=1))
    said = capsys.readouterr().out
    assert said.endswith("to the last bit: yes\n")
    assert len(said.splitlines()) == 3
    honest = digits.train

    def seeded_otherwise(args, name, say):
        return honest(briefly(epochs=1, seed=len(name)), name, say)

    monkeypatch.setattr(digits, "train", seeded_otherwise)
    assert not digits.compare(briefly(epochs=1))
    assert capsys.readouterr().out.endswith("to the last bit: NO\n")


@pytest.mark.slow
def test_a_convolutional_net_is_trained_alike_on_both(digits, tmp_path):
    """Close, not the same bits: the gradients of convolutions may differ in the last bits."""
    pytest.importorskip("matplotlib")
    module = importlib.import_module("digits_cnn")
    weights, losses = {}, {}
    for name in ("torch", "nnmirror"):
        said = []
        args = argparse.Namespace(backend=name, epochs=1, lr=0.05, batch=32, channels=4, seed=0)
        model, test, _ = module.train(args, say=said.append)
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
        losses[name] = float(said[0].split()[3])
        nn = torch.nn if name == "torch" else nnmirror
        module.draw(str(tmp_path / f"{name}.png"), model, nn, test)
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert weights["torch"].allclose(weights["nnmirror"], atol=1e-4)
    assert abs(losses["torch"] - losses["nnmirror"]) < 1e-5


@pytest.mark.slow
def test_a_physics_informed_net_is_trained_alike_on_both(tmp_path):
    """Otherwise the numbers in examples/README.md would be those of one library only."""
    pytest.importorskip("matplotlib")
    said = {}
    for name in ("torch", "nnmirror"):
        command = [sys.executable, str(EXAMPLES / "pinn.py"), "--backend", name, "--quick"]
        command += ["--quiet", "--points", "100", "--plot", f"{name}.png"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        said[name] = ran.stdout.splitlines()
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert said["torch"] == said["nnmirror"]
    assert len(said["torch"]) == 5 + 2 + 1
    first, last = (float(said["torch"][i].split()[3]) for i in (0, -2))
    assert last < first


with pytest.MonkeyPatch.context() as _patched:
    _patched.syspath_prepend(str(EXAMPLES))
    benchmark = importlib.import_module("benchmark")
# The large rows take long and would not show more.
ROWS = [
    row
    for row in benchmark.ROWS
    if row.group not in ("large", "threads")
    and row.variant not in ("batch 2048", "(4096, 256)", "(16384, 256)")
]
# Their gradients do not always have the same bits: see nnmirror/exact/README.md.
NEARLY = "GELU", "Softplus", "Mish", "LeNet", "ResNet"


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.group}: {r.name} {r.variant}")
def test_a_step_of_the_benchmark_is_the_same_on_both(row):
    """Otherwise the benchmark would compare two different trainings."""
    said = benchmark.bits(row)
    if any(name in f"{row.name} {row.variant}" for name in NEARLY):
        assert said == "same" or float(said.rsplit(" ", 1)[1]) < 1e-5
    else:
        assert said == "same" or said.startswith("exact mode")


def test_the_benchmark_reports_different_bits():
    def otherwise(nn, optim):
        net = nn.Linear(2, 2)
        x = torch.ones(1, 2) if nn is torch.nn else torch.ones(1, 2) * 1.5
        return lambda: net(x).sum(), net

    said = benchmark.bits(benchmark.Row("plain", "of two minds", "", otherwise))
    assert said.startswith("DIFFER by ")


@pytest.mark.slow
def test_the_benchmark_measures_the_rows_asked_for(tmp_path):
    command = [sys.executable, str(EXAMPLES / "benchmark.py"), "--quick", "--out", "found"]
    command += ["--only", "one pointwise operation", "one observation"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.count("| same |") == 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 2
    for row in found:
        low, high = row["times"]["nnmirror"]["quartiles"]
        assert 0 < low <= row["times"]["nnmirror"]["ratio"] <= high
    chosen = benchmark.chosen(["norms", "DQN"], quick=False)
    assert {benchmark.ROWS[i].group for i in chosen} == {"norms", "rl", "threads"}
    with pytest.raises(SystemExit, match="no such row: LSTM"):
        benchmark.chosen(["LSTM"], quick=True)


@pytest.mark.slow
def test_a_row_that_fails_is_shown_as_failed(monkeypatch):
    args = argparse.Namespace(quick=True, compile=False, cpu_time=False)
    monkeypatch.setattr(benchmark, "ROWS", [*benchmark.ROWS, benchmark.ROWS[0]])
    found, left = benchmark.measured([len(benchmark.ROWS) - 1] * 2, args)
    assert found["failed"] == left["failed"] == "IndexError: list index out of range"
    failed = {"index": 0, "failed": "ValueError: lost"}
    assert "| failed | ValueError: lost |" in benchmark.table("plain", [failed])
