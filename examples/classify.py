"""The disk as a question of two classes: each loss with each optimiser, on both backends.

    python examples/classify.py            # about two minutes on two cores

The net of examples/disk.py with two outputs, 2-25-25-25-2, one for each class. It prints the share
of test points on the wrong side after the last epoch, and whether both backends ended with the same
weights, to the last bit, and plots the losses over the epochs.
"""

import argparse
import signal
import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from disk import backend, disk, extras

# The activation after the last layer, and the target: the class, or one-hot.
LOSSES = {
    "CrossEntropyLoss": (lambda nn: [], False),
    "NLLLoss": (lambda nn: [nn.LogSoftmax(1)], False),
    "BCEWithLogitsLoss": (lambda nn: [], True),
    "BCELoss": (lambda nn: [nn.Sigmoid()], True),
    "MSELoss": (lambda nn: [nn.Tanh()], True),
    "L1Loss": (lambda nn: [nn.Tanh()], True),
    "SmoothL1Loss": (lambda nn: [nn.Tanh()], True),
    "HuberLoss": (lambda nn: [nn.Tanh()], True),
}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.05}),
    "momentum": ("SGD", {"lr": 0.01, "momentum": 0.9}),
    "Adam": ("Adam", {"lr": 0.003}),
    "AdamW": ("AdamW", {"lr": 0.003}),
    "RMSprop": ("RMSprop", {"lr": 0.001}),
    "Adagrad": ("Adagrad", {"lr": 0.02}),
    "SignSGD": ("SignSGD", {"lr": 0.0005}),  # the mirror's alone
    "Signum": ("SignSGD", {"lr": 0.0005, "momentum": 0.9}),
}


def train(
    nn: Any, optim: Any, loss: str, optimizer: str, args: argparse.Namespace
) -> tuple[list[float], float, torch.Tensor]:
    """The test loss after each epoch, the test error after the last, and all weights."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    x, target = disk(args.points, generator)
    test_x, test_target = disk(args.points, generator)
    mean, std = x.mean(0), x.std(0)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    layers, one_hot = LOSSES[loss]
    sizes = [2, 25, 25, 25, 2]
    hidden = [[nn.Linear(a, b), nn.ReLU()] for a, b in pairwise(sizes)]
    model = nn.Sequential(*[m for pair in hidden for m in pair][:-1], *layers(nn))
    criterion = getattr(nn, loss)()
    name, options = OPTIMIZERS[optimizer]
    chosen = getattr(optim, name)(model.parameters(), **options)

    def as_asked(labels: torch.Tensor) -> torch.Tensor:
        classes = labels.long().squeeze(1)
        return torch.eye(2)[classes] if one_hot else classes

    goal, test_goal = as_asked(target), as_asked(test_target)
    losses = []
    for _ in range(args.epochs):
        for batch in torch.randperm(len(x), generator=generator).split(args.batch):
            chosen.zero_grad()
            criterion(model(x[batch]), goal[batch]).backward()
            chosen.step()
        with torch.no_grad():
            output = model(test_x)
            losses.append(criterion(output, test_goal).item())
    wrong = (
        (output.argmax(1) != as_asked(test_target).argmax(1))
        if one_hot
        else (output.argmax(1) != test_goal)
    )
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return losses, wrong.float().mean().item(), weights.as_subclass(torch.Tensor)


def draw(plt: Any, curves: dict[str, dict[str, list[float]]], path: str) -> None:
    """One picture for each loss, one line for each optimiser."""
    columns = (len(curves) + 1) // 2
    figure, axes = plt.subplots(2, columns, figsize=(14, 6), squeeze=False, layout="constrained")
    for axis, (loss, by_optimizer) in zip(axes.flat, curves.items(), strict=False):
        for i, (optimizer, losses) in enumerate(by_optimizer.items()):
            look = "so^Dv<>p"[i % 8] + ("--" if i % 2 else "-")  # Adam and AdamW are much alike
            axis.plot(range(1, len(losses) + 1), losses, look, label=optimizer, markersize=3)
        axis.set(title=loss, xlabel="epoch", ylabel="test loss", yscale="log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    lines = axes.flat[0].get_lines()
    figure.legend(lines, [line.get_label() for line in lines], loc="outside right upper")
    figure.savefig(path, dpi=100)
    print(f"picture: {path}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="number of epochs of each training")
    parser.add_argument("--batch", type=int, default=10, help="points per batch")
    parser.add_argument(
        "--points", type=int, default=1000, help="number of training points, and of test points"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for points, weights and batches")
    parser.add_argument("--plot", default="classify.png", help="path of the picture")
    parser.add_argument("--quick", action="store_true", help="one epoch only, to try it out")
    args = parser.parse_args()
    if args.quick:
        args.epochs = 1
    plt, tqdm = extras()
    plt.switch_backend("Agg")
    torch.set_num_threads(1)  # the net is small
    backends: list[tuple[ModuleType, ModuleType]] = [backend("nnmirror"), backend("torch")]

    print(f"test error after {args.epochs} epochs; = where both backends have the same weights")
    print(f"{'':18}" + "".join(f"{name:>10}" for name in OPTIMIZERS))
    curves: dict[str, dict[str, list[float]]] = {}
    same = compared = 0
    for loss in tqdm(LOSSES, unit="loss"):
        cells = []
        for optimizer in OPTIMIZERS:
            runs = [
                train(nn, optim, loss, optimizer, args)
                for nn, optim in backends
                if hasattr(optim, OPTIMIZERS[optimizer][0])
            ]
            curves.setdefault(loss, {})[optimizer] = runs[0][0]
            mark = " "
            if len(runs) == 2:
                equal = torch.equal(runs[0][2], runs[1][2]) and runs[0][0] == runs[1][0]
                mark, same, compared = "=" if equal else "!", same + equal, compared + 1
            cells.append(f"{runs[0][1]:8.1%} {mark}")
        tqdm.write(f"{loss:18}" + "".join(cells))
    print(f"{same} of {compared} pairs of runs ended in the same bits")
    draw(plt, curves, args.plot)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
    main()
