"""Handwritten digits by a small convolutional net, and a picture of what it sees.

    python examples/digits_cnn.py --backend nnmirror
    python examples/digits_cnn.py --backend torch
    python examples/digits_cnn.py --plot digits_cnn.png   # filters, activations, gradients

The pictures are those of digits.py, 8 x 8 pixels, scaled to [0, 1]. Two convolutions of 3 x 3, each
with ReLU and max pooling, then one linear layer: 8 x 8, 4 x 4, 2 x 2, 10. Cross entropy, SGD with
momentum in shuffled batches of 32, under a cosine schedule.
"""

import argparse
import signal
import sys
from typing import Any

import torch
from digits import accuracy, epochs
from disk import backend
from pinn import extra
from torch.utils.data import TensorDataset

T = torch.Tensor


def images(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test pictures, (N, 1, 8, 8)."""
    x, y = extra("sklearn.datasets").load_digits(return_X_y=True)
    split = extra("sklearn.model_selection").train_test_split
    x, test_x, y, test_y = split(x / 16, y, test_size=0.25, stratify=y, random_state=seed)
    train, test = (
        TensorDataset(torch.from_numpy(pixels).float().view(-1, 1, 8, 8), torch.from_numpy(labels))
        for pixels, labels in ((x, y), (test_x, test_y))
    )
    return train, test


def build(nn: Any, channels: int) -> Any:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * channels, 10),
    )


def train(args: argparse.Namespace, say: Any = print) -> tuple[Any, TensorDataset, float]:
    """The trained net, the test pictures, and the seconds of training."""
    nn, optim = backend(args.backend)
    pictures, test = images(args.seed)
    torch.manual_seed(args.seed)
    model = build(nn, args.channels)
    seconds = 0.0
    bar = extra("tqdm").tqdm(
        epochs(args, nn, optim, model, pictures),
        total=args.epochs,
        disable=not sys.stderr.isatty(),
    )
    for epoch, loss, seconds in bar:  # noqa: B007
        bar.set_postfix(loss=loss)
        if epoch % max(1, args.epochs // 5) == 0 or epoch == args.epochs:
            with bar.external_write_mode():
                say(
                    f"epoch {epoch:3d}   loss {loss:.6f}"
                    f"   right: train {accuracy(model, pictures):6.2%}"
                    f"  test {accuracy(model, test):6.2%}"
                )
    return model, test, seconds


def seen(model: Any, nn: Any, x: T, y: T) -> tuple[list[T], T]:
    """What each convolution makes of a picture, after ReLU; and the loss's gradient for it."""
    x = x.clone().requires_grad_()
    activations, h = [], x
    for layer in model:
        h = layer(h)
        if type(layer).__name__ == "ReLU":
            activations.append(h.detach()[0])
    nn.CrossEntropyLoss()(h, y).backward()
    assert x.grad is not None
    return activations, x.grad[0, 0]


def draw(path: str, model: Any, nn: Any, test: TensorDataset) -> None:
    """A row for each of three digits: the picture, what is made of it, the gradient."""
    plt = extra("matplotlib.pyplot")
    filters = model[0].weight.detach()[:, 0]
    pictures, labels = test.tensors
    rows = [int((labels == digit).nonzero()[0]) for digit in (3, 6, 8)]
    figure = plt.figure(figsize=(11, 10), layout="constrained")
    top, *below = figure.subfigures(1 + len(rows), 1, height_ratios=[1, *[2] * len(rows)])

    def show(ax: Any, values: T, title: str = "", *, signed: bool) -> None:
        high = float(values.abs().max()) or 1.0
        how = {"cmap": "RdBu_r", "vmin": -high} if signed else {"cmap": "gray_r", "vmin": 0.0}
        ax.imshow(values.numpy(), vmax=high, **how)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=9)

    top.suptitle("The filters of the first convolution (red: positive, blue: negative)")
    for ax, weights in zip(top.subplots(1, len(filters)), filters, strict=True):
        show(ax, weights, signed=True)
    for part, row in zip(below, rows, strict=True):
        x, y = pictures[row : row + 1], labels[row : row + 1]
        (first, second), gradient = seen(model, nn, x, y)
        picture, maps, further, arriving = part.subfigures(1, 4, width_ratios=[1, 2, 2, 1])
        show(picture.subplots(), x[0, 0], f"a {int(y)}", signed=False)
        for where, values, title in (
            (maps, first, "after the first ReLU"),
            (further, second, "after the second ReLU"),
        ):
            where.suptitle(title, fontsize=9)
            axes = where.subplots(-(-len(values) // 4), 4, squeeze=False).flat
            for ax, one in zip(axes, values, strict=False):
                show(ax, one, signed=False)
        show(arriving.subplots(), gradient, "gradient at the input", signed=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", choices=["nnmirror", "torch"], default="nnmirror", help="the library"
    )
    parser.add_argument("--epochs", type=int, default=15, help="number of epochs")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--batch", type=int, default=32, help="pictures per batch")
    parser.add_argument("--channels", type=int, default=8, help="channels of the first convolution")
    parser.add_argument("--seed", type=int, default=0, help="seed for split, weights and batches")
    parser.add_argument(
        "--plot", metavar="FILE", help="save the picture of what the net sees as FILE"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # the net is small
    model, test, seconds = train(args)
    print(f"{args.backend}: {seconds:.2f} s of training", file=sys.stderr)
    if args.plot:
        draw(args.plot, model, backend(args.backend)[0], test)
        print(f"drawn: {args.plot}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
    main()
