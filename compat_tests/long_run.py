"""A long training run with the garbage collector off: the memory in use must not grow.

    python -m compat_tests.long_run --steps 100000
    python -m compat_tests.long_run --steps 20000 --pinn

The net has hooks, in-place layers, views changed in place and a forward under no_grad. With --pinn,
a physics-informed net is trained through second derivatives. The memory printed should stay flat,
and no reference cycle should be left at the end.
"""

import argparse
import gc
import weakref
from pathlib import Path

import torch

from nnmirror import nn, optim

from .test_memory import Net, residual_loss


def resident() -> float:
    """Megabytes of memory held by this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--pinn", action="store_true", help="gradients of gradients")
    args = parser.parse_args()
    steps = args.steps
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    model, criterion = Net(), nn.MSELoss()
    if args.pinn:
        model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh())
        model.append(nn.Linear(20, 1))
    optimizer = optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(steps + 1):
        x, t = torch.randn(4, 1 if args.pinn else 3), torch.randn(4, 1)
        optimizer.zero_grad()
        if args.pinn:
            loss = residual_loss(model, criterion, x.requires_grad_())
        else:
            loss = criterion(model(x), t)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % (steps // 10 or 1) == 0:
            with torch.no_grad():
                model(x)
            print(f"step {step:7d}  {resident():7.1f} MB", flush=True)
    alive = weakref.ref(next(iter(model.children())))
    del model, optimizer, loss, criterion
    print("model freed without the collector:", alive() is None)
    print("objects left in cycles:", gc.collect())


if __name__ == "__main__":
    main()
