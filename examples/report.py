"""The course report this package grew out of: each of its experiments and figures, run again.

    python examples/report.py                      # both backends; the table, report-*.png
    python examples/report.py --backend nnmirror   # one of them
    python examples/report.py --quick # a few iterations, to try it out
    python examples/report.py --puzzle             # why 0.25 here and 0.018 there: puzzle.png

The net, the data and the seeds are those of disk.py. A loss is that of all 1,000 training or
test points, taken after each step. Each run goes in a process of its own with one thread, and
on both backends; "same bits" says that every loss and every weight at the end is the same.
"""

import argparse
import hashlib
import itertools
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from disk import backend, build, extras, scaled

BACKENDS = ("torch", "nnmirror")
# What the report ends with: training and test loss, None where it gives one number.
REPORTED = {"2a": (0.25048, None), "2b": (3.32610, None), "3": (0.01765, 0.01646)}


@dataclass(frozen=True)
class Settings:
    """One training. As it stands: the report's own, with its ReLU."""

    activation: str = "relu"
    init: str = "[0, 1]"  # weights and biases uniform in [0, 1], or "default", PyTorch's
    tanh: bool = False  # after the last Linear
    step: str = "SGD"  # or "GD", the report's own over tuples of tensors
    reduction: str = "mean"
    lr: float = 1e-4
    momentum: float = 0.0
    epochs: int = 25
    batch: int = 4
    points: int = 1000
    seed: int = 0


@dataclass
class Run:
    losses: list[tuple[float, float]]  # training and test, before the first step and after each
    digest: str  # of all losses and of the weights at the end


def model_of(settings: Settings, nn: Any) -> Any:
    model = build(nn, settings.activation)
    if not settings.tanh:
        model = model[:-1]
    if settings.init == "[0, 1]":
        for p in model.parameters():
            nn.init.uniform_(p)
    return model


def sgd(settings: Settings, name: str, model: Any) -> Callable[[Any, Any], None]:
    """A usual training step."""
    nn, optim = backend(name)
    criterion = nn.MSELoss(reduction=settings.reduction)
    optimizer = optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)

    def step(x: Any, target: Any) -> None:
        loss = criterion(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def gd(settings: Settings, name: str, model: Any) -> Callable[[Any, Any], None]:
    """A step of the report's GD: a tuple of points, a loss for each, their gradients added."""
    nn, _ = backend(name)
    criterion = nn.MSELoss()

    def by_hand(x: Any, target: Any) -> None:
        criterion(model(tuple(x)), tuple(target))
        model.zero_grad()
        model.backward(criterion.backward())
        for p, grad in model.param():
            p.data -= settings.lr * grad

    def by_autograd(x: Any, target: Any) -> None:
        losses = [criterion(y, t) for y, t in zip(model(x), target, strict=True)]
        model.zero_grad()
        sum(losses).backward()  # type: ignore[union-attr]
        for p in model.parameters():
            p.data -= settings.lr * p.grad

    return by_autograd if name == "torch" else by_hand


def digest(tensors: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def prepared(settings: Settings, name: str) -> tuple[dict[str, Any], Any, Iterator[Any]]:
    """The data, the net, and the batches of all epochs, as they come."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    data = scaled(settings.points, generator)
    model = model_of(settings, backend(name)[0])

    def batches() -> Iterator[Any]:
        for _ in range(settings.epochs):
            for batch in torch.randperm(settings.points, generator=generator).split(settings.batch):
                yield data["x"][batch], data["target"][batch]

    return data, model, batches()


def stepper(settings: Settings, name: str, model: Any) -> Callable[[Any, Any], None]:
    return (gd if settings.step == "GD" else sgd)(settings, name, model)


def train(settings: Settings, name: str, every: int = 1) -> Run:
    """Train on one backend; the losses after every `every`-th step."""
    data, model, batches = prepared(settings, name)
    both_x = torch.cat([data["x"], data["test_x"]])
    both_targets = torch.cat([data["target"], data["test_target"]])
    squares = backend(name)[0].MSELoss(reduction="none")

    def losses() -> Any:
        with torch.no_grad():
            # Numbers, not tensors: small tensors kept among large ones freed split the heap.
            return tuple(squares(model(both_x), both_targets).view(2, -1).mean(1).tolist())

    step = stepper(settings, name, model)
    found = [losses()]
    for steps, (x, target) in enumerate(batches, start=1):
        step(x, target)
        if steps % every == 0:
            found.append(losses())
    return Run(found, digest([torch.tensor(found), *model.parameters()]))


def trained(
    todo: Sequence[Settings], names: Sequence[str], jobs: int, every: int, bar: Any
) -> dict[Settings, dict[str, Run]]:
    """Each training on each backend, `jobs` at a time."""
    found: dict[Settings, dict[str, Run]] = {settings: {} for settings in todo}
    # Longest first, so that the processes finish at about the same time.
    order = sorted(found, key=lambda s: s.epochs, reverse=True)
    tasks = [(settings, name, every) for settings in order for name in names]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes inherit this
    with get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            runs = pool.imap_unordered(_trained, tasks)
            for (settings, name, _), run in bar(runs, total=len(tasks), unit="run"):
                found[settings][name] = run
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)  # leaving the `with` ends the processes
        finally:
            signal.signal(signal.SIGINT, before)
    return found


def _trained(task: tuple[Settings, str, int]) -> tuple[tuple[Settings, str, int], Run]:
    return task, train(*task)


def same_bits(runs: dict[str, Run]) -> str:
    if len(runs) < 2:
        return "not compared"
    return "yes" if len({run.digest for run in runs.values()}) == 1 else "NO"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def experiments() -> dict[str, list[Settings]]:
    """The report's figures: its own settings first, then other possible ones."""
    figures = {
        figure: [
            Settings(activation=activation, init=init, tanh=tanh, step=step)
            for tanh, step in ((False, "SGD"), (False, "GD"), (True, "SGD"))
            for init in ("[0, 1]", "default")
        ]
        for figure, activation in (("2a", "relu"), ("2b", "leaky_relu"))
    }
    figures["3"] = [
        Settings(init="default", tanh=tanh, epochs=100, **sgd)
        for tanh in (False, True)
        for sgd in ({}, {"lr": 1e-3, "momentum": 0.9})
    ]
    return figures


def said(settings: Settings) -> str:
    momentum = f", momentum {settings.momentum:g}" if settings.momentum else ""
    return f"{settings.step}, lr {settings.lr:g}{momentum}"


def results(figures: dict[str, list[Settings]], found: dict[Settings, dict[str, Run]]) -> str:
    rows = []
    for figure, runs in figures.items():
        for settings in runs:
            train, test = next(iter(found[settings].values())).losses[-1]
            reported = " / ".join(f"{loss:.5f}" for loss in REPORTED[figure] if loss is not None)
            end = "Tanh" if settings.tanh else "Linear"
            row = [figure, settings.activation, settings.init, end, said(settings), settings.epochs]
            rows.append([*row, f"{train:.5f}", f"{test:.5f}", reported, same_bits(found[settings])])
    head = ["figure", "net of", "init", "ends in", "trained by", "epochs"]
    return table([*head, "train", "test", "the report's", "same bits"], rows)


def draw(plt: Any, runs: dict[Settings, dict[str, Run]], title: str, path: str) -> None:
    """The report's pictures, a row for each run: all iterations, and the last 200."""
    size = (10, 2.2 * len(runs) + 0.4)
    figure, axes = plt.subplots(len(runs), 2, figsize=size, squeeze=False, layout="constrained")
    for row, (settings, found) in zip(axes, runs.items(), strict=True):
        losses = next(iter(found.values())).losses
        last = max(0, len(losses) - 200)
        for axis, start in zip(row, (0, last), strict=True):
            for place, name in enumerate(("train", "test")):
                curve = [pair[place] for pair in losses[start:]]
                axis.plot(range(start, len(losses)), curve, label=name, linewidth=1)
            # Where the loss falls from millions, a logarithm shows it.
            finite = [loss for loss, _ in losses[start:] if 0 < loss < float("inf")]
            if finite and max(finite) > 100 * min(finite):
                axis.set_yscale("log")
            if not finite:
                axis.text(0.5, 0.5, "not a number", ha="center", transform=axis.transAxes)
                axis.set(xticks=[], yticks=[])
            axis.tick_params(labelsize=7)
            if finite:
                axis.xaxis.get_major_locator().set_params(integer=True)
        end = ", Tanh" if settings.tanh else ""
        row[0].set_title(f"init {settings.init}{end}, {said(settings)}", fontsize=8)
        row[1].set_title("the last 200 iterations", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figure.supxlabel("iteration", fontsize=9)
    figure.supylabel("mean squared error", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"picture: {path}")


def report(args: argparse.Namespace) -> None:
    plt, tqdm = extras()
    plt.switch_backend("Agg")
    figures = experiments()
    if args.quick:
        figures = {k: [replace(s, epochs=2, points=200) for s in v] for k, v in figures.items()}
    todo = [settings for runs in figures.values() for settings in runs]
    found = trained(todo, args.backend, args.jobs, 1, tqdm)
    print(results(figures, found))
    for figure, runs in figures.items():
        title = f"Fig. {figure}: loss by iteration, {runs[0].activation}"
        draw(plt, {s: found[s] for s in runs}, title, f"report-{figure}.png")


# -- the puzzle --------------------------------------------------------------------------

# The settings of PyTorch's tutorial on training a classifier, whose batches are of 4 as well.
TUTORIAL = Settings(init="default", lr=1e-3, momentum=0.9, epochs=100)


def changes() -> dict[str, dict[str, Settings]]:
    """The tables of puzzle.md, each with its rows."""
    own = Settings()
    theirs = replace(own, init="default", epochs=100)
    way = {}
    for init in ("[0, 1]", "default"):
        for lr in (1e-4, 1e-3):
            for momentum in (0.0, 0.9):
                settings = replace(theirs, init=init, lr=lr, momentum=momentum)
                way[f"init {init}, {said(settings)}"] = settings
    leaky = replace(own, activation="leaky_relu")
    summed = replace(theirs, reduction="sum", momentum=0.9)
    return {
        "All ways from one to the other": way,
        "One other thing changed from the report's own": {
            "loss summed over the batch": replace(own, reduction="sum"),
            "lr 0.05": replace(own, lr=0.05),
            "lr 1e-5": replace(own, lr=1e-5),
            "a Tanh at the end": replace(own, tanh=True),
            "LeakyReLU": leaky,
            "LeakyReLU, lr 1e-5": replace(leaky, lr=1e-5),
            "LeakyReLU, lr 1e-6": replace(leaky, lr=1e-6),
        },
        "PyTorch's init, and what else it may have been": {
            "loss summed over the batch, lr 0.0001": replace(theirs, reduction="sum"),
            "the same, momentum 0.9": summed,
            "the same, a Tanh at the end": replace(summed, tanh=True),
            "lr 0.01": replace(theirs, lr=0.01),
            "lr 0.05": replace(theirs, lr=0.05),
            "lr 0.05, a Tanh at the end": replace(theirs, lr=0.05, tanh=True),
            "lr 0.001, momentum 0.9, a Tanh at the end": replace(TUTORIAL, tanh=True),
            "lr 0.001, momentum 0.9, LeakyReLU": replace(TUTORIAL, activation="leaky_relu"),
        },
    }


def spread(losses: Sequence[float]) -> str:
    """The median over the seeds, and the least and the greatest."""
    finite = [loss for loss in losses if loss == loss]
    if len(finite) < len(losses):
        lost = f"not a number in {len(losses) - len(finite)} of {len(losses)}"
        return lost + (f", else {min(finite):.3g} to {max(finite):.3g}" if finite else "")
    return f"{statistics.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


def inside(settings: Settings, name: str, marks: Sequence[int]) -> list[list[str]]:
    """The state of a net after some of its first steps, on the training points."""
    data, model, batches = prepared(settings, name)
    step, criterion = stepper(settings, name, model), backend(name)[0].MSELoss()
    rows = []
    for done, (x, target) in enumerate(itertools.islice(batches, max(marks) + 1)):
        if done in marks:
            hidden = [model[: 2 * k](data["x"]).detach() for k in (1, 2, 3)]
            model.zero_grad()
            y = model(data["x"])
            loss = criterion(y, data["target"])
            loss.backward()
            grads = [layer.weight.grad.norm().item() for layer in model if hasattr(layer, "weight")]
            row = [str(done), f"{loss.item():.3g}", f"{y.mean().item():.3g}"]
            row.append(", ".join(f"{h.abs().mean().item():.2g}" for h in hidden))
            row.append(", ".join(str((h > 0).any(0).sum().item()) for h in hidden))
            row.append(", ".join(f"{grad:.2g}" for grad in grads))
            rows.append(row)
        step(x, target)
    return rows


def look_inside(name: str) -> None:
    head = ["step", "loss", "mean output", "mean size of hidden 1, 2, 3", "alive, of 25 each"]
    for title, settings in {
        "ReLU": Settings(),
        "LeakyReLU": Settings(activation="leaky_relu"),
        "ReLU, a Tanh at the end": Settings(tanh=True),
        "ReLU, PyTorch's init": Settings(init="default"),
    }.items():
        rows = inside(settings, name, (0, 1, 2, 3, 4, 10, 100))
        print(f"\nInside, {title}\n\n{table([*head, 'norms of the gradients'], rows)}")


def draw_puzzle(plt: Any, drawn: dict[str, list[list[float]]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(10, 4.4), layout="constrained")
    for name, curves in drawn.items():
        epochs = range(len(curves[0]))
        middle = [statistics.median(losses) for losses in zip(*curves, strict=True)]
        # Some curves coincide: those with momentum are dashed and drawn above the others.
        dashed = {"linestyle": "--", "zorder": 3, "linewidth": 1.2}
        look: dict[str, Any] = dashed if "momentum" in name else {"linewidth": 2.6}
        (line,) = axis.plot(epochs, middle, label=name, **look)
        low, high = ([f(c) for c in zip(*curves, strict=True)] for f in (min, max))
        axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    for loss, text in ((0.25048, "the report's own net"), (0.01765, "the report's PyTorch")):
        axis.axhline(loss, color="grey", linewidth=0.8, linestyle=":")
        box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1}
        where = {"x": 99, "y": loss * 1.07, "ha": "right", "fontsize": 8, "zorder": 4}
        axis.text(s=f"{text}: {loss}", color="black", bbox=box, **where)
    axis.set(xlabel="epoch", ylabel="training loss", yscale="log", ylim=(0.01, 1), xlim=(0, 100))
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=90)
    print(f"picture: {path}")


def puzzle(args: argparse.Namespace) -> None:
    plt, tqdm = extras()
    plt.switch_backend("Agg")
    tables = changes()
    if args.quick:
        few: dict[str, Any] = {"epochs": 2, "points": 200}
        tables = {k: {n: replace(s, **few) for n, s in v.items()} for k, v in tables.items()}
    rows = [settings for group in tables.values() for settings in group.values()]
    seeds = range(args.seeds)
    todo = [replace(settings, seed=seed) for settings in rows for seed in seeds]
    found = trained(todo, args.backend, args.jobs, rows[0].points // rows[0].batch, tqdm)

    def runs(settings: Settings) -> list[dict[str, Run]]:
        return [found[replace(settings, seed=seed)] for seed in seeds]

    def curves(settings: Settings, which: int) -> list[list[float]]:
        """The training (0) or test (1) losses of each seed, epoch by epoch."""
        each = [next(iter(run.values())) for run in runs(settings)]
        return [[pair[which] for pair in run.losses] for run in each]

    for title, group in tables.items():
        epochs = next(iter(group.values())).epochs
        stops = [n for n in (25, 100) if n <= epochs] or [epochs]
        head = ["", *(f"{name}, {n} epochs" for n in stops for name in ("train", "test"))]
        cells = []
        for name, settings in group.items():
            losses = [spread([c[n] for c in curves(settings, k)]) for n in stops for k in (0, 1)]
            bits = sorted({same_bits(run) for run in runs(settings)})
            cells.append([name, *losses, " and ".join(bits)])
        print(f"\n{title}\n\n{table([*head, 'same bits'], cells)}")
    look_inside(args.backend[-1])
    way = next(iter(tables.values()))
    draw_puzzle(plt, {name: curves(settings, 0) for name, settings in way.items()}, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--backend", choices=BACKENDS, type=str, help="run on one backend (default: both, compared)"
    )
    parser.add_argument("--quick", action="store_true", help="a few iterations, to try it out")
    parser.add_argument(
        "--puzzle", action="store_true", help="make the tables of puzzle.md instead"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the puzzle's runs")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument(
        "--out", type=Path, default=Path("puzzle.png"), help="path of the puzzle's picture"
    )
    args = parser.parse_args()
    args.backend = [args.backend] if args.backend else list(BACKENDS)
    (puzzle if args.puzzle else report)(args)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
    main()
