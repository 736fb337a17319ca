"""How long a training step takes: PyTorch, the mirror, and the same operations called bare.

    python examples/benchmark.py                 # prints the table; writes benchmark.json, .png
    python examples/benchmark.py --quick         # a rough table in a minute
    python examples/benchmark.py --compile       # with torch.compile beside it

Beside them, NumPy by hand and, where it is installed, JAX's jitted step (in as many threads as
it likes): the same arithmetic with another rounding.

All contenders of a row run in turn, a few steps each, many times over; a ratio is taken within
each turn, and what is shown is the median of the ratios and their quartiles. So a machine that is
slow for a while is slow for all. "Machine busy" is beside two processes that count for ever. The
mirror and the bare operations must end with PyTorch's weights, to the bit, or there is no row.
Each row, and each peak of memory, is of a process of its own.
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.optim
from tqdm import tqdm, trange

import nnmirror
import nnmirror.optim

LR = 1e-3
# name: the sizes of the layers, the batch, steps in a turn, turns.
NETS = {
    "2-25-25-25-1": ((2, 25, 25, 25, 1), 4, 100, 40),
    "64-64-64-8": ((64, 64, 64, 8), 32, 100, 30),
    "784-512-512-10": ((784, 512, 512, 10), 64, 5, 20),
    "784-2048-2048-10": ((784, 2048, 2048, 10), 256, 2, 10),
    "1024-4096-4096-10": ((1024, 4096, 4096, 10), 1024, 1, 5),
}
SMALL = "2-25-25-25-1"
BACKENDS: dict[str, Any] = {
    "torch": (torch.nn, torch.optim),
    "nnmirror": (nnmirror, nnmirror.optim),
}
Steps = tuple[Callable[[], Any], Callable[[], Any], Callable[[], list[Any]]]


def sequential(nn: Any, sizes: tuple[int, ...]) -> Any:
    layers: list[Any] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def wired(nn: Any, sizes: tuple[int, ...]) -> Any:
    """The same sizes with a forward of one's own and operations between the layers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pairs = itertools.pairwise(sizes)
            self.first, *middle, self.last = (nn.Linear(a, b) for a, b in pairs)
            self.middle = nn.ModuleList(middle)

        def forward(self, x: Any) -> Any:
            h = torch.relu(self.first(x))
            for layer in self.middle:
                h = h + torch.tanh(layer(h)) * 0.5
            return self.last(h)

    return Net()


def hooked(nn: Any, sizes: tuple[int, ...]) -> Any:
    net = sequential(nn, sizes)
    net[1].register_forward_hook(lambda module, args, out: None)
    return net


def between(*kinds: Any) -> Any:
    """A net with these layers after each Linear but the last: names, or functions of a size."""

    def make(nn: Any, sizes: tuple[int, ...]) -> Any:
        layers: list[Any] = []
        for a, b in itertools.pairwise(sizes):
            layers.append(nn.Linear(a, b))
            layers += [getattr(nn, k)() if isinstance(k, str) else k(nn, b) for k in kinds]
        return nn.Sequential(*layers[: -len(kinds)])

    return make


class Recipe(NamedTuple):
    """What is trained: the net, its loss and its optimiser."""

    make: Any = sequential
    loss: str = "MSELoss"
    optimizer: str = "SGD"


# What small nets are trained with besides; each is 64-64-64-8, batch 32.
RECIPES = {
    "ReLU, SGD": Recipe(),
    "ReLU, Adam": Recipe(optimizer="Adam"),
    "Tanh, AdamW": Recipe(between("Tanh"), optimizer="AdamW"),
    "ReLU, RMSprop": Recipe(optimizer="RMSprop"),
    "ReLU, CrossEntropyLoss, SGD": Recipe(loss="CrossEntropyLoss"),
    "ReLU, CrossEntropyLoss, Adam": Recipe(loss="CrossEntropyLoss", optimizer="Adam"),
    "ReLU, BCEWithLogitsLoss, Adam": Recipe(loss="BCEWithLogitsLoss", optimizer="Adam"),
    "ReLU, SmoothL1Loss, Adam": Recipe(loss="SmoothL1Loss", optimizer="Adam"),
    "ELU, Adam": Recipe(between("ELU"), optimizer="Adam"),
    "SiLU, Adam": Recipe(between("SiLU"), optimizer="Adam"),
    "ReLU, Dropout, Adam": Recipe(between("ReLU", "Dropout"), optimizer="Adam"),
    "LayerNorm, ReLU, Adam": Recipe(
        between(lambda nn, size: nn.LayerNorm(size), "ReLU"), optimizer="Adam"
    ),
    "BatchNorm1d, ReLU, Adam": Recipe(
        between(lambda nn, size: nn.BatchNorm1d(size), "ReLU"), optimizer="Adam"
    ),
    "a Module of one's own, Adam": Recipe(wired, optimizer="Adam"),
}


def data(sizes: tuple[int, ...], batch: int, classes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, sizes[0], generator=generator)
    if classes:
        return x, torch.randint(sizes[-1], (batch,), generator=generator)
    return x, torch.randn(batch, sizes[-1], generator=generator)


def script(
    backend: str, recipe: Recipe, sizes: tuple[int, ...], batch: int, compiled: bool
) -> Steps:
    """The training script as anyone writes it: a step, a forward, the weights."""
    nn, optim = BACKENDS[backend]
    torch.manual_seed(0)
    model = recipe.make(nn, sizes)
    run = torch.compile(model) if compiled else model
    criterion = getattr(nn, recipe.loss)()
    optimizer = getattr(optim, recipe.optimizer)(model.parameters(), lr=LR)
    x, t = data(sizes, batch, recipe.loss == "CrossEntropyLoss")

    def step() -> None:
        optimizer.zero_grad()
        loss = criterion(run(x), t)
        loss.backward()
        optimizer.step()

    def forward() -> None:
        with torch.no_grad():
            run(x)

    return step, forward, lambda: [p.detach() for p in model.parameters()]


def bare(sizes: tuple[int, ...], batch: int) -> Steps:
    """The floor: the same tensor operations, into buffers that are there, and nothing else."""
    torch.manual_seed(0)
    linears = [m for m in sequential(torch.nn, sizes) if isinstance(m, torch.nn.Linear)]
    ws, bs = ([getattr(m, n).detach() for m in linears] for n in ("weight", "bias"))
    wts = [w.t() for w in ws]
    x, t = data(sizes, batch, False)
    hs = [x, *[torch.empty(batch, n) for n in sizes[1:]]]
    gs = [torch.empty_like(h) for h in hs]
    gts = [g.t() for g in gs]
    # Many numbers are sooner chosen from by their bits than by a mask.
    by_bits = [h.numel() >= 4096 for h in hs]
    masks = [
        torch.empty(h.shape, dtype=torch.int32 if b else torch.bool)
        for h, b in zip(hs, by_bits, strict=True)
    ]
    ints = [g.view(torch.int32) for g in gs]
    dws, dbs = [torch.empty_like(w) for w in ws], [torch.empty_like(b) for b in bs]
    params, grads = [*ws, *bs], [*dws, *dbs]
    squared, n = torch.empty_like(t), torch.tensor(float(t.numel()))
    scale, zero, last = torch.tensor(2.0 / t.numel()), torch.zeros(()), len(ws) - 1

    def forward() -> None:
        for i in range(last + 1):
            torch.addmm(bs[i], hs[i], wts[i], out=hs[i + 1])
            if i < last:
                torch.relu_(hs[i + 1])

    def step() -> None:
        forward()
        torch.sub(hs[-1], t, out=gs[-1])
        torch.mul(gs[-1], gs[-1], out=squared).sum().div_(n)
        gs[-1].mul_(scale)
        for i in range(last, -1, -1):
            torch.sum(gs[i + 1], 0, out=dbs[i])
            if i:
                torch.mm(gs[i + 1], ws[i], out=gs[i])
            torch.mm(gts[i + 1], hs[i], out=dws[i])
            if i:
                torch.le(hs[i], zero, out=masks[i])
                if by_bits[i]:
                    ints[i].bitwise_and_(masks[i].sub_(1))
                else:
                    gs[i].masked_fill_(masks[i], 0)
        torch._foreach_add_(params, grads, alpha=-LR)

    return step, forward, lambda: [p for pair in zip(ws, bs, strict=True) for p in pair]


def by_numpy(sizes: tuple[int, ...], batch: int) -> Steps:
    """By hand in NumPy: the same arithmetic, not the same rounding."""
    torch.manual_seed(0)
    linears = [m for m in sequential(torch.nn, sizes) if isinstance(m, torch.nn.Linear)]
    ws, bs = ([getattr(m, n).detach().numpy().copy() for m in linears] for n in ("weight", "bias"))
    x, t = (part.numpy() for part in data(sizes, batch, False))
    last = len(ws) - 1

    def forward() -> list[Any]:
        hs = [x]
        for i in range(last + 1):
            h = hs[i] @ ws[i].T
            h += bs[i]
            hs.append(np.maximum(h, 0, out=h) if i < last else h)
        return hs

    def step() -> None:
        hs = forward()
        g = hs[-1] - t
        (g * g).mean()
        g *= np.float32(2.0 / t.size)
        for i in range(last, -1, -1):
            db, dw = g.sum(0), g.T @ hs[i]
            if i:
                g = g @ ws[i]
                g[hs[i] <= 0] = 0
            ws[i] -= np.float32(LR) * dw
            bs[i] -= np.float32(LR) * db

    return step, forward, lambda: []


def by_jax(sizes: tuple[int, ...], batch: int) -> Steps:
    """The step as one function that JAX compiles."""
    import jax
    from jax import numpy as jnp

    torch.manual_seed(0)
    linears = [m for m in sequential(torch.nn, sizes) if isinstance(m, torch.nn.Linear)]
    params = [tuple(jnp.asarray(p.detach().numpy()) for p in m.parameters()) for m in linears]
    x, t = (jnp.asarray(part.numpy()) for part in data(sizes, batch, False))

    def run(params: Any, h: Any) -> Any:
        *inner, (w, b) = params
        for weight, bias in inner:
            h = jnp.maximum(h @ weight.T + bias, 0)
        return h @ w.T + b

    def update(params: Any, x: Any, t: Any) -> Any:
        grads = jax.grad(lambda p: jnp.mean((run(p, x) - t) ** 2))(params)
        return jax.tree.map(lambda p, g: p - LR * g, params, grads)

    jitted, forward = jax.jit(update), jax.jit(run)

    def step() -> None:
        nonlocal params
        params = jax.block_until_ready(jitted(params, x, t))

    return step, lambda: jax.block_until_ready(forward(params, x)), lambda: []


def timed(action: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - start) / times * 1e6


def rested(action: Callable[[], Any], times: int) -> float:
    """The same, once the threads of the one before, which wait for work for a while, sleep."""
    time.sleep(0.05)
    action()
    return timed(action, times)


def compared(contenders: dict[str, Callable[[], Any]], times: int, turns: int) -> dict[str, Any]:
    """Microseconds of each contender, and how many times faster than PyTorch each is."""
    for action in contenders.values():
        timed(action, max(2, times // 2))
    gc.collect()
    gc.freeze()  # what building the contenders left is not gone over in everybody's turn
    rounds = [{k: rested(f, times) for k, f in contenders.items()} for _ in range(turns)]
    found = {}
    for name in contenders:
        ratios = sorted(r["torch"] / r[name] for r in rounds)
        found[name] = {
            "us": statistics.median(r[name] for r in rounds),
            "ratio": statistics.median(ratios),
            "quartiles": (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]),
        }
    return found


@contextlib.contextmanager
def others(count: int) -> Iterator[None]:
    """So many other processes beside, each with as much to do as there is time."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def row(
    label: str, recipe: Recipe, net: str, threads: int, busy: int, args: argparse.Namespace
) -> list[Any]:
    """The step and the forward of one net, on every contender, beside `busy` other processes."""
    sizes, batch, times, turns = NETS[net]
    if args.quick:
        turns = max(3, turns // 4)
    if busy:  # to wake a thread may take a hundred times as long
        times, turns = max(1, times // 20), max(3, turns // 4)
    torch.set_num_threads(threads)
    made = {name: script(name, recipe, sizes, batch, False) for name in BACKENDS}
    if recipe == Recipe():
        made["bare"] = bare(sizes, batch)
        made["numpy"] = by_numpy(sizes, batch)
        if importlib.util.find_spec("jax"):
            made["jax"] = by_jax(sizes, batch)
    if args.compile:
        made["compile"] = script("torch", recipe, sizes, batch, True)
    weights = {}
    for name, again in (
        ("torch", lambda: script("torch", recipe, sizes, batch, False)),
        ("nnmirror", lambda: script("nnmirror", recipe, sizes, batch, False)),
        ("bare", lambda: bare(sizes, batch)),
    ):
        if name in made:
            step, _, weights_now = again()
            for _ in range(3):
                step()
            weights[name] = weights_now()
            pairs = zip(weights["torch"], weights[name], strict=True)
            assert all(torch.equal(e, a) for e, a in pairs), f"{name} has other bits"
    rows = []
    for what, place in (("step", 0), ("forward", 1)):
        with others(busy):
            found = compared({k: made[k][place] for k in made}, times, turns)
        rows.append({"net": label, "batch": batch, "threads": threads, "what": what, **found})
    return rows


def row_alone(index: int, args: argparse.Namespace) -> list[Any]:
    """A row measured in a process of its own, as a script has one net."""
    flags = [flag for flag in ("--quick", "--compile") if getattr(args, flag[2:])]
    command = [sys.executable, __file__, "--row", str(index), *flags]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def peak(backend: str, net: str) -> float:
    """Megabytes that a few steps need at most, beyond what importing and building take."""
    command = [sys.executable, __file__, "--peak", backend, net]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(backend: str, net: str) -> None:
    torch.set_num_threads(1)
    sizes, batch, _, _ = NETS[net]
    step, _, _ = script(backend, Recipe(), sizes, batch, False)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(4):
        step()
    print(resident("VmHWM") - before)


def resident(name: str) -> float:
    """Megabytes of memory, now (VmRSS) or at most (VmHWM), as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) / 1024


def table(rows: list[Any]) -> str:
    """The rows as a table for the README."""
    every = "torch", "nnmirror", "bare", "numpy", "jax", "compile"
    names = [n for n in every if any(n in r for r in rows)]
    head = [
        "net",
        "batch",
        "threads",
        "what",
        "torch us",
        "nnmirror us",
        "times as fast (quartiles)",
    ]
    head += [f"{n}, times torch" for n in names[2:]] + ["nnmirror / bare"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in rows:
        mirror = r["nnmirror"]
        low, high = mirror["quartiles"]
        cells = [r["net"], r["batch"], r["threads"], r["what"], f"{r['torch']['us']:.0f}"]
        cells += [f"{mirror['us']:.0f}", f"**{mirror['ratio']:.2f}** ({low:.2f} to {high:.2f})"]
        cells += [f"{r[n]['ratio']:.2f}" if n in r else "" for n in names[2:]]
        cells.append(f"{mirror['us'] / r['bare']['us']:.2f}" if "bare" in r else "")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def picture(rows: list[Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [f"{r['net']}\n{r['what']}, {r['threads']} thr." for r in rows]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.5))
    places = range(len(rows))
    axes.barh(
        list(places), [r["nnmirror"]["ratio"] for r in rows], color="tab:blue", label="nnmirror"
    )
    at = [(i, r["bare"]["ratio"]) for i, r in enumerate(rows) if "bare" in r]
    axes.plot([v for _, v in at], [i for i, _ in at], "k|", markersize=12, label="bare operations")
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(list(places), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as PyTorch eager")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="fewer turns, no net of 4096")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--out", type=Path, default=Path("benchmark"))
    parser.add_argument("--peak", nargs=2, metavar=("BACKEND", "NET"), help=argparse.SUPPRESS)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        measure_peak(*args.peak)
        return
    nets = [n for n in NETS if not (args.quick and "4096" in n)]
    todo = [(net, Recipe(), net, threads, 0) for net in nets for threads in (1, 2)]
    todo += [
        ("two threads, machine busy", Recipe(), SMALL, 2, 2),
        ("wired by hand", Recipe(wired), SMALL, 1, 0),
        ("with a hook", Recipe(hooked), SMALL, 1, 0),
    ]
    todo += [(name, recipe, "64-64-64-8", 1, 0) for name, recipe in RECIPES.items()]
    if args.row is not None:
        print(json.dumps(row(*todo[args.row], args)))
        return
    rows = [found for i in trange(len(todo), desc="rows") for found in row_alone(i, args)]
    memory = {n: {b: peak(b, n) for b in BACKENDS} for n in tqdm(nets[2:], desc="memory")}
    print(table(rows))
    for net, found in memory.items():
        both = ", ".join(f"{name} {found[name]:.0f} MB" for name in BACKENDS)
        print(f"peak memory, {net}: {both}")
    args.out.with_suffix(".json").write_text(json.dumps({"rows": rows, "memory": memory}, indent=1))
    picture(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
