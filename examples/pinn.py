"""Solve the heat equation with a physics-informed net.

    python examples/pinn.py --backend nnmirror
    python examples/pinn.py --backend torch              # prints the same digits
    python examples/pinn.py --plot pinn.png              # and draws what the net has found

A rod of length 1 whose ends are held at 0 cools down: u_t = k u_xx, u(x, 0) = sin(pi x), which
is solved by u(x, t) = exp(-k pi^2 t) sin(pi x). The net 2-20-20-20-1 is never shown the
solution. Its loss is what is left of the equation at random points inside, plus the squared
error at the start and at both ends; so the loss is made of second derivatives of the net, and its
gradient of third ones. It is trained by Adam, then by LBFGS.
"""

import argparse
import importlib
import math
import signal
import sys
import time
from itertools import pairwise
from typing import Any

import torch
from disk import backend

T = torch.Tensor


def extra(name: str) -> Any:
    """A package that only the examples need, or a message that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        sys.exit(
            f"{e.name} is missing; this example needs: pip install '.[examples]' in the checkout"
        )


def build(nn: Any, width: int) -> Any:
    sizes = [2, width, width, width, 1]
    layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in pairwise(sizes)]
    return nn.Sequential(*[m for pair in layers for m in pair][:-1])


def exact(points: T, k: float) -> T:
    """The solution at rows of (x, t)."""
    x, t = points[:, :1], points[:, 1:]
    return torch.exp(-k * math.pi**2 * t) * torch.sin(math.pi * x)


def domain(points: int, generator: torch.Generator) -> tuple[T, T]:
    """Rows of (x, t): inside, and where the solution is given, at the start and at both ends."""
    inside = torch.rand(points, 2, generator=generator)
    edge = torch.rand(points // 10, generator=generator)
    start = torch.stack([edge, torch.zeros_like(edge)], 1)
    ends = torch.stack([torch.arange(len(edge)) % 2, edge], 1)  # x is 0 or 1
    return inside, torch.cat([start, ends])


def derivative(y: T, x: T) -> T:
    """dy/dx for each row of y, which depends on the same row of x alone; with a graph."""
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    return dx


def residual(model: Any, x: T, t: T, k: float) -> T:
    """u_t - k u_xx at places x and times t, columns that require grad."""
    u = model(torch.cat([x, t], 1))
    u_x, u_t = derivative(u, x), derivative(u, t)
    return u_t - k * derivative(u_x, x)


def relative_error(model: Any, k: float, side: int = 101) -> float:
    """||u - exact|| / ||exact|| on a grid."""
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, side)] * 2)
    with torch.no_grad():
        solution = exact(grid, k)
        return ((model(grid) - solution).norm() / solution.norm()).item()


def train(args: argparse.Namespace, tqdm: Any) -> dict[str, Any]:
    """The trained net, and the loss at each evaluation and the relative error now and then."""
    nn, optim = backend(args.backend)
    torch.manual_seed(args.seed)
    inside, given = domain(args.points, torch.Generator().manual_seed(args.seed))
    x, t = (column.clone().requires_grad_() for column in inside.split(1, 1))
    target = exact(given, args.k)
    model, criterion = build(nn, args.width), nn.MSELoss()
    zero = torch.zeros(args.points, 1)
    losses: list[float] = []
    errors: list[tuple[int, float]] = []

    def closure() -> T:
        optimizer.zero_grad()
        equation = criterion(residual(model, x, t, args.k), zero)
        loss = equation + criterion(model(given), target)
        loss.backward()
        losses.append(loss.item())
        return loss

    start = time.perf_counter()
    for name, epochs in (("Adam", args.epochs), ("LBFGS", args.lbfgs)):
        if name == "Adam":
            optimizer = optim.Adam(model.parameters(), lr=args.lr)
        else:  # up to 20 iterations per step; do not stop where there is little progress
            optimizer = optim.LBFGS(
                model.parameters(),
                history_size=50,
                tolerance_grad=0,
                tolerance_change=0,
                line_search_fn="strong_wolfe",
            )
        for epoch in tqdm(range(1, epochs + 1), desc=name, unit="step", disable=args.quiet):
            loss = optimizer.step(closure).item()
            if epoch % max(1, epochs // 5) == 0 or epoch == epochs:
                errors.append((len(losses), relative_error(model, args.k)))
                tqdm.write(
                    f"{name:5} {epoch:5d}   loss {loss:.12e}"
                    f"   relative L2 error {errors[-1][1]:.12e}"
                )
    seconds = time.perf_counter() - start
    checksum = sum(p.detach().sum().item() for p in model.parameters())
    print(f"sum of all weights {checksum!r}")
    print(f"{args.backend}: {seconds:.1f} s", file=sys.stderr)
    return {"model": model, "losses": losses, "errors": errors}


def draw(plt: Any, result: dict[str, Any], args: argparse.Namespace, side: int = 101) -> None:
    """The net's solution, the exact one, their difference, and the losses in training."""
    steps = torch.linspace(0, 1, side)
    grid = torch.cartesian_prod(steps, steps)
    with torch.no_grad():
        found = result["model"](grid)
    solution = exact(grid, args.k)
    panels = [
        (found, "the net's u", "viridis"),
        (solution, "the solution", "viridis"),
        (found - solution, "net - solution", "RdBu_r"),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for axis, (values, title, colours) in zip(axes.flat, panels, strict=False):
        most = max(panel.abs().max().item() for panel, _, c in panels if c == colours)
        low = -most if colours == "RdBu_r" else 0
        shades = axis.pcolormesh(
            steps,
            steps,
            values.view(side, side),
            cmap=colours,
            vmin=low,
            vmax=most,
            shading="gouraud",
        )
        bar = figure.colorbar(shades, ax=axis)
        bar.formatter.set_powerlimits((-2, 2))
        axis.set(title=title, xlabel="time t", ylabel="place x")
    curve = axes.flat[3]
    curve.semilogy(range(1, len(result["losses"]) + 1), result["losses"], label="loss")
    curve.semilogy(*zip(*result["errors"], strict=True), "o", label="relative L2 error")
    curve.axvline(args.epochs + 0.5, color="grey", ls="--", label="from Adam to LBFGS")
    curve.set(title=f"training ({args.backend})", xlabel="evaluations of the loss")
    curve.set_ylabel("loss; error relative to the solution")
    curve.legend()
    figure.savefig(args.plot, dpi=120)
    print(f"picture: {args.plot}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend",
        choices=["nnmirror", "torch"],
        default="nnmirror",
        help="the library that trains",
    )
    parser.add_argument("--epochs", type=int, default=2000, help="steps of Adam")
    parser.add_argument(
        "--lbfgs", type=int, default=25, help="steps of LBFGS after it, of 20 iterations"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of Adam")
    parser.add_argument(
        "--points", type=int, default=1000, help="points inside; a fifth as many on the boundary"
    )
    parser.add_argument("--width", type=int, default=20, help="units in each hidden layer")
    parser.add_argument("--k", type=float, default=0.1, help="thermal diffusivity of the rod")
    parser.add_argument("--seed", type=int, default=0, help="seed for points and weights")
    parser.add_argument("--plot", metavar="FILE", help="save a picture of the solution as FILE")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to try it out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.lbfgs = 20, 2
    tqdm = extra("tqdm").tqdm
    plt = extra("matplotlib.pyplot") if args.plot else None
    torch.set_num_threads(1)  # the net is small
    torch.set_default_dtype(torch.float64)  # second derivatives of single precision are coarse
    result = train(args, tqdm)
    if plt is not None:
        plt.switch_backend("Agg")
        draw(plt, result, args)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
    main()
