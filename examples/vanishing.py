"""Watch gradients vanish: the disk experiment's net with other activations and initial weights.

    python examples/vanishing.py

The course report's 2-25-25-25-1 net, trained in batches of 4 as in `disk.py`: with a Tanh after
every Linear, with a ReLU after every Linear, and with LeakyReLU (and a Tanh at the end, as there);
weights and biases drawn from U(0, 1), as in the report, or as PyTorch draws them. For each it
prints the table of the first and the last step of an epoch, and the number of steps in which the
first layer got no gradient at all. The picture shows the norm of the gradient of each Linear's
output over the steps.
"""

import argparse
import signal
import sys
from typing import Any

import torch
from disk import build, disk, extras

import nnmirror
from nnmirror import nn, optim


def throughout(activation: Any) -> nn.Sequential:
    """The net with one activation after every Linear, the last as well."""
    layers: list[Any] = []
    for inputs, outputs in ((2, 25), (25, 25), (25, 25), (25, 1)):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers)


NETS = {
    "Tanh": lambda: throughout(nn.Tanh),
    "ReLU": lambda: throughout(nn.ReLU),
    "LeakyReLU": lambda: build(nn, "leaky_relu"),
}
INITS = {"U(0, 1)": nn.init.uniform_, "PyTorch's": None}


def run(net: str, init: str, args: argparse.Namespace) -> Any:
    """Train one variant for an epoch and return what was seen."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    x, target = disk(args.points, generator)
    x = (x - x.mean(0)) / x.std(0)
    model = NETS[net]()
    draw_anew = INITS[init]
    for p in model.parameters() if draw_anew is not None else ():
        draw_anew(p)
    criterion = nn.MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=args.lr)
    with nnmirror.watch(model) as watched:
        for batch in torch.randperm(len(x), generator=generator).split(4):
            loss = criterion(model(x[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watched


def draw(plt: Any, seen: dict[tuple[str, str], Any], path: str) -> None:
    """A panel for each variant: the norms over the steps, zeros at the lower edge."""
    floor, ceiling = 1e-12, 1e9
    figure, panels = plt.subplots(
        len(INITS), len(NETS), figsize=(11, 6.5), sharex=True, sharey=True, layout="constrained"
    )
    for (init, net), axes in zip(seen, panels.flat, strict=True):
        layers: dict[str, list[float]] = {}
        for record in seen[init, net].records:
            if record.module == "Linear":
                layers.setdefault(record.layer, []).append(record.grad)
        for i, norms in enumerate(layers.values()):
            lowest = floor / 4**i  # side by side, so that they do not cover one another
            kept = [min(max(norm, lowest), ceiling) for norm in norms]
            axes.plot(kept, linewidth=0.9, label=f"Linear {i + 1}")
        axes.set(title=f"{net}, weights: {init}", yscale="log", ylim=(floor / 4**4, ceiling))
        axes.set_yticks([1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, floor / 4**1.5])
        axes.set_yticklabels(["1e-9", "1e-6", "0.001", "1", "1000", "1e6", "< 1e-12"])
        axes.minorticks_off()
        axes.axhline(floor * 2, color="grey", linewidth=0.5, linestyle=":")
    figure.supxlabel("step")
    figure.supylabel("norm of the gradient (of the output of each Linear)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=4)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument(
        "--points", type=int, default=1000, help="number of points; a quarter as many steps"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for points and weights")
    parser.add_argument("--plot", default="vanishing.png", help="path of the picture")
    args = parser.parse_args()
    plt, _ = extras()
    plt.switch_backend("Agg")
    seen = {(init, net): run(net, init, args) for init in INITS for net in NETS}
    for (init, net), watched in seen.items():
        none = sum(step[0].grad == 0 for step in watched.steps)
        print(f"== {net}, weights and biases from {init}\n{watched.table(0, -1)}")
        print(f"steps in which no gradient came to layer 0: {none} of {len(watched.steps)}\n")
    draw(plt, seen, args.plot)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
    main()
