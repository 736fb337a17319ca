"""Tell points inside a disk from points outside: the course report's experiment.

    python examples/disk.py --backend nnmirror
    python examples/disk.py --backend torch        # prints the same digits
    torchrun --nproc-per-node 2 examples/disk.py   # two processes, each with half of every batch

1,000 training and 1,000 test points, uniform in the unit square, labelled 1 inside the disk
of area one half around its centre. The net is 2-25-25-25-1, trained by SGD on the squared
error in batches of 4. It prints losses and errors, and draws a picture of both.
"""

import argparse
import math
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist


def backend(name: str) -> tuple[ModuleType, ModuleType]:
    """The one difference between the two runs: which library is imported."""
    if name == "torch":
        import torch.nn as nn
        from torch import optim
    else:
        from nnmirror import nn, optim
    return nn, optim


def extras() -> tuple[Any, Any]:
    """matplotlib and tqdm, or a message that says how to install them."""
    try:
        import matplotlib.pyplot as plt
        from tqdm import tqdm
    except ImportError as e:
        sys.exit(
            f"{e.name} is missing; this example needs: pip install '.[examples]' in the checkout"
        )
    return plt, tqdm


def disk(points: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points uniform in the unit square, and whether each lies inside the disk."""
    x = torch.rand(points, 2, generator=generator)
    inside = (x - 0.5).pow(2).sum(1) < 1 / (2 * math.pi)
    return x, inside.float().unsqueeze(1)


def scaled(points: int, generator: torch.Generator) -> dict[str, Any]:
    """A training and a test set, both scaled by the training points' mean and deviation."""
    raw, target = disk(points, generator)
    test_raw, test_target = disk(points, generator)
    mean, std = raw.mean(0), raw.std(0)
    return {
        "x": (raw - mean) / std,
        "target": target,
        "test_x": (test_raw - mean) / std,
        "test_target": test_target,
        "points": raw,
        "scale": (mean, std),
    }


def build(nn: Any, activation: str) -> Any:
    middle = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}[activation]
    return nn.Sequential(
        nn.Linear(2, 25),
        middle(),
        nn.Linear(25, 25),
        middle(),
        nn.Linear(25, 25),
        middle(),
        nn.Linear(25, 1),
        nn.Tanh(),
    )


def evaluate(
    model: Any, criterion: Any, x: torch.Tensor, target: torch.Tensor
) -> tuple[float, float]:
    """The loss, and the share of points on the wrong side."""
    with torch.no_grad():
        output = model(x)
        wrong = ((output > 0.5) != (target > 0.5)).float().mean()
        return criterion(output, target).item(), wrong.item()


def train(args: argparse.Namespace, tqdm: Any) -> dict[str, Any]:
    nn, optim = backend(args.backend)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    data = scaled(args.points, generator)
    x, target = data["x"], data["target"]

    model = build(nn, args.activation)
    rank, processes = 0, int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:  # started by torchrun
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        model = nn.parallel.DistributedDataParallel(model)
    criterion = nn.MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=args.lr)

    train_losses, test_losses = [], []
    train_error = test_error = math.nan
    start = time.perf_counter()
    for epoch in tqdm(range(1, args.epochs + 1), unit="epoch", disable=args.quiet or rank > 0):
        for batch in torch.randperm(len(x), generator=generator).split(args.batch):
            share = batch[rank::processes]
            loss = criterion(model(x[share]), target[share])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        train_loss, train_error = evaluate(model, criterion, x, target)
        test_loss, test_error = evaluate(model, criterion, data["test_x"], data["test_target"])
        train_losses.append(train_loss)
        test_losses.append(test_loss)
        if rank == 0 and (epoch % max(1, args.epochs // 5) == 0 or epoch == args.epochs):
            tqdm.write(f"epoch {epoch:3d}   train {train_loss:.10f}  test {test_loss:.10f}")
    checksum = sum(p.detach().double().sum().item() for p in model.parameters())
    if rank == 0:
        print(f"on the wrong side   train {train_error:.1%}  test {test_error:.1%}")
        print(f"sum of all weights {checksum!r}")
        seconds = time.perf_counter() - start
        print(f"{args.backend}: {seconds:.1f} s", file=sys.stderr)
    if processes > 1:
        dist.destroy_process_group()
    return {"rank": rank, "model": model, "train": train_losses, "test": test_losses, **data}


def draw(plt: Any, result: dict[str, Any], path: str, title: str) -> None:
    """The loss curves, and the decision boundary of the net."""
    figure, (curves, plane) = plt.subplots(1, 2, figsize=(10, 4.2))
    epochs = range(1, len(result["train"]) + 1)
    curves.plot(epochs, result["train"], label="train")
    curves.plot(epochs, result["test"], label="test")
    curves.set(xlabel="epoch", ylabel="mean squared error", title=title, ylim=(0, None))
    curves.legend()

    side = torch.linspace(0, 1, 200)
    grid = torch.cartesian_prod(side, side)
    mean, std = result["scale"]
    with torch.no_grad():
        output = result["model"]((grid - mean) / std).view(200, 200).T.numpy()
    levels = torch.linspace(0, 1, 21).tolist()
    shades = plane.contourf(side, side, output, levels=levels, cmap="RdBu_r", extend="both")
    figure.colorbar(shades, ax=plane, ticks=levels[::4], label="output of the net")
    plane.contour(side, side, output, levels=[0.5], colors="black")
    circle = plt.Circle((0.5, 0.5), 1 / math.sqrt(2 * math.pi), fill=False, ls="--", color="white")
    plane.add_patch(circle)
    inside = result["target"].squeeze(1) > 0.5
    for mask, colour in ((inside, "darkred"), (~inside, "navy")):
        plane.scatter(
            *result["points"][mask].T.numpy(), s=8, color=colour, edgecolors="white", linewidths=0.3
        )
    plane.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    plane.set_title("boundary at 0.5 (black), the disk (dashed), the points", fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"picture: {path}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend",
        choices=["nnmirror", "torch"],
        default="nnmirror",
        help="the library that trains",
    )
    parser.add_argument(
        "--activation",
        choices=["relu", "leaky_relu"],
        default="relu",
        help="activation between the hidden layers",
    )
    parser.add_argument("--epochs", type=int, default=25, help="number of epochs")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--batch", type=int, default=4, help="points per batch")
    parser.add_argument(
        "--points", type=int, default=1000, help="number of training points, and of test points"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for points, weights and batches")
    parser.add_argument("--plot", help="path of the picture (default: disk-BACKEND.png)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    plt, tqdm = extras()
    plt.switch_backend("Agg")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % processes or args.points % processes:
        sys.exit(f"--batch and --points must be multiples of the {processes} processes")
    result = train(args, tqdm)
    if result["rank"] > 0:
        return
    title = f"{args.backend}, {args.activation}, lr {args.lr}"
    draw(plt, result, args.plot or f"disk-{args.backend}.png", title)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
    main()
