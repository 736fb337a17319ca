"""Handwritten digits: scikit-learn's data and scaling, PyTorch's data loader, either library's net.

    python examples/digits.py --backend nnmirror
    python examples/digits.py --backend torch      # the same digits, with NNMIRROR_EXACT=1
    python examples/digits.py --backend both       # in turn, several times: same bits? how fast?

1,797 pictures of 8 x 8 pixels, which come with scikit-learn; a quarter of them is kept for testing.
The net is 64-64-64-10, trained by SGD with momentum on the cross entropy in shuffled batches of 32,
under a cosine schedule.
"""

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from disk import backend
from torch.utils.data import DataLoader, TensorDataset


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test pictures, each pixel scaled by its mean and deviation in training."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        from sklearn.preprocessing import StandardScaler
    except ImportError as e:
        sys.exit(
            f"{e.name} is missing; this example needs: pip install '.[examples]' in the checkout"
        )
    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x, y, test_size=0.25, stratify=y, random_state=seed)
    scaler = StandardScaler().fit(x)
    train, test = (
        TensorDataset(torch.from_numpy(scaler.transform(pixels)).float(), torch.from_numpy(label))
        for pixels, label in ((x, y), (test_x, test_y))
    )
    return train, test


def build(nn: Any, width: int) -> Any:
    return nn.Sequential(
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def accuracy(model: Any, pictures: TensorDataset) -> float:
    x, y = pictures.tensors
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return right


def epochs(
    args: argparse.Namespace, nn: Any, optim: Any, model: Any, pictures: TensorDataset
) -> Iterator[tuple[int, float, float]]:
    """Train the model. After each epoch: its number, its mean loss, the seconds of training."""
    generator = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(pictures, args.batch, shuffle=True, generator=generator)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    seconds = 0.0
    for epoch in range(1, args.epochs + 1):
        start, total = time.perf_counter(), 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        schedule.step()
        seconds += time.perf_counter() - start
        yield epoch, total / len(pictures), seconds


def train(args: argparse.Namespace, name: str, say: Any = print) -> dict[str, Any]:
    """Train on one backend, and report with `say`."""
    nn, optim = backend(name)
    pictures, test = digits(args.seed)
    torch.manual_seed(args.seed)
    model = build(nn, args.width)
    losses, seconds = [], 0.0
    for epoch, loss, seconds in epochs(args, nn, optim, model, pictures):  # noqa: B007
        losses.append(loss)
        if epoch % max(1, args.epochs // 5) == 0 or epoch == args.epochs:
            say(
                f"epoch {epoch:3d}   loss {loss:.10f}"
                f"   right: train {accuracy(model, pictures):6.2%}"
                f"  test {accuracy(model, test):6.2%}"
            )
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {
        "model": model,
        "losses": losses,
        "weights": weights.as_subclass(torch.Tensor),
        "accuracy": accuracy(model, test),
        "seconds": seconds,
    }


def compare(args: argparse.Namespace) -> bool:
    """Both backends in turn: whether all runs ended in the same bits, and their times."""
    runs: dict[str, list[dict[str, Any]]] = {"torch": [], "nnmirror": []}
    for _ in range(args.repeats):
        for name, done in runs.items():
            done.append(train(args, name, say=lambda line: None))
    for name, done in runs.items():
        times = [run["seconds"] for run in done]
        print(
            f"{name:8}  right in the test {done[0]['accuracy']:.2%}   training"
            f" {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
        )
    first = runs["torch"][0]
    same = all(
        torch.equal(run["weights"], first["weights"]) and run["losses"] == first["losses"]
        for done in runs.values()
        for run in done
    )
    print(f"the same losses and weights, to the last bit: {'yes' if same else 'NO'}")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend",
        choices=["nnmirror", "torch", "both"],
        default="nnmirror",
        help="the library that trains, or both in turn, compared",
    )
    parser.add_argument("--epochs", type=int, default=25, help="number of epochs")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    parser.add_argument("--batch", type=int, default=32, help="pictures per batch")
    parser.add_argument("--width", type=int, default=64, help="units in each hidden layer")
    parser.add_argument("--seed", type=int, default=0, help="seed for split, weights and batches")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of each backend, with --backend both"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # the net is small
    if args.backend == "both":
        sys.exit(0 if compare(args) else 1)
    result = train(args, args.backend)
    print(f"sum of all weights {result['weights'].double().sum().item()!r}")
    print(f"{args.backend}: {result['seconds']:.2f} s of training", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
    main()
