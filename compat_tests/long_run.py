"""A long training run with the garbage collector off: memory must stay as it is.

    python -m compat_tests.long_run --steps 100000

A net with hooks, in-place layers, views changed in place, a forward under no_grad and the
explicit backward; what it prints should be flat, and no cycle should be left at the end.
"""

import argparse
import gc
import weakref
from pathlib import Path

import torch

from nnmirror import nn, optim

from .test_memory import Net


def resident() -> float:
    """Megabytes of memory held by this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    model, criterion = Net(), nn.MSELoss()
    optimizer = optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(steps + 1):
        x, t = torch.randn(4, 3), torch.randn(4, 1)
        optimizer.zero_grad()
        loss = criterion(model(x), t)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % (steps // 10 or 1) == 0:
            with torch.no_grad():
                model(x)
            print(f"step {step:7d}  {resident():7.1f} MB", flush=True)
    alive = weakref.ref(model.first)
    del model, optimizer, loss, criterion
    print("model freed without the collector:", alive() is None)
    print("objects left in cycles:", gc.collect())


if __name__ == "__main__":
    main()
