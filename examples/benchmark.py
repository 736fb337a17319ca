"""How long a training step takes: PyTorch's time over the mirror's, for what people train.

    python examples/benchmark.py                          # all rows; writes benchmark.json, .png
    python examples/benchmark.py --list                   # the groups and their rows
    python examples/benchmark.py --only train --quick     # one group, roughly: a minute or two
    python examples/benchmark.py --only DQN PPO           # the rows that are called so
    python examples/benchmark.py --only plain --compile   # with torch.compile beside it

The rows are in the directory rows. Both libraries (contenders) run in turn, some steps each, many
times over; a ratio is taken within each turn, and what is shown is the median of the ratios and
their quartiles. So a machine that is slow for a while
is slow for both. One thread, but for the group "threads". Each row is measured in a process of its
own, and so is each peak of memory; with `--quick`, the variants of a row share a process.

"Bits" says whether a few steps on both libraries gave the same bits: what the step returned, the
weights, buffers and gradients. "exact mode": only within `nnmirror.exact()`, as by default the
layer follows the plain formula (in brackets: how much that differs). "DIFFER": in exact mode too.
A difference is relative to the largest number of the tensor; it means nothing for a Linear's bias
before BatchNorm1d, whose gradient is zero up to rounding, but which Adam moves all the same.

The plain nets are also compared with the same tensor operations called directly, without layers
(same bits as PyTorch; no Python code can be faster), with NumPy by hand, and with JAX's jitted step
if it is installed.
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.optim
from rows import again, floors, loops, nets, sizes, tutorials, updates  # noqa: F401  (they have rows)
from rows.nets import GROUPS, Row
from tqdm import tqdm

import nnmirror
import nnmirror.optim

BACKENDS: dict[str, Any] = {
    "torch": (torch.nn, torch.optim),
    "nnmirror": (nnmirror, nnmirror.optim),
}
Times = dict[str, dict[str, Any]]  # of each contender


def in_threads(rows: list[Row]) -> list[Row]:
    """Some of the rows once more: in two threads, and two threads on a machine that is busy."""
    steps = [r for r in rows if r.group in ("plain", "large") and r.variant == "step"]
    others = [r for r in rows if r.name.startswith(("branches", "SAC", "DQN", "LeNet,", "ResNet"))]
    two = [replace(r, group="threads", threads=2) for r in [*steps, *others]]
    small = [r for r in two if r.name.startswith(("2-25", "branches", "DQN"))]
    return [*two, *(replace(r, name=f"{r.name}; machine busy", busy=2) for r in small)]


ROWS = sorted([*nets.ROWS, *in_threads(nets.ROWS)], key=lambda r: list(GROUPS).index(r.group))


LONG = {"(16384, 256)", "1024-4096-4096-10, batch 1024"}  # left out by --quick


def chosen(only: list[str], quick: bool) -> list[int]:
    """The indices of the selected rows: by group, or by a part of the name."""

    def asked(r: Row) -> bool:
        whole = f"{r.name}, {r.variant}"
        return any(r.group == part if part in GROUPS else part in whole for part in only)

    found = [i for i, r in enumerate(ROWS) if not only or asked(r)]
    if not found:
        raise SystemExit(f"no such row: {' '.join(only)}; --list shows them")
    return [i for i in found if not (quick and {ROWS[i].name, ROWS[i].variant} & LONG)]


# The same bits?


def tensors(value: Any) -> list[torch.Tensor]:
    """What a step returned, or what it trains, as copies."""
    if isinstance(value, tuple):
        return [t for part in value for t in tensors(part)]
    if isinstance(value, torch.Tensor):
        both = [value, value.grad] if value.is_leaf and value.grad is not None else [value]
        return [t.detach().clone().as_subclass(torch.Tensor) for t in both]
    return [t for named in (value.parameters(), value.buffers()) for p in named for t in tensors(p)]


def outcome(row: Row, backend: str, steps: int = 6) -> list[torch.Tensor]:
    """What each of the first steps returned, then all weights, buffers and gradients."""
    torch.manual_seed(0)
    step, *trained = row.build(*BACKENDS[backend])
    torch.manual_seed(1)
    returned = [t for _ in range(steps) for t in tensors(step())]
    return [*returned, *(t for part in trained for t in tensors(part))]


def difference(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float | None:
    """The largest, relative to the largest number of the tensor; None if all bits are the same."""
    assert [t.shape for t in expected] == [t.shape for t in found]
    pairs = zip(expected, found, strict=True)
    others = [(e - f).abs().max() / e.abs().max() for e, f in pairs if not torch.equal(e, f)]
    return torch.stack(others).max().item() if others else None


def bits(row: Row) -> str:
    expected = outcome(row, "torch")
    by = difference(expected, outcome(row, "nnmirror"))
    if by is None:
        return "same"
    with nnmirror.exact():
        by_exact = difference(expected, outcome(row, "nnmirror"))
    return f"exact mode ({by:.0e})" if by_exact is None else f"DIFFER by {by_exact:.0e}"


# How long?


def contenders(row: Row, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The step of each; beside a plain net, what else there is to compare with."""
    made = {}
    for name, backend in BACKENDS.items():
        torch.manual_seed(0)
        made[name] = row.build(*backend)[0]
    if row.function is not nets.plain:
        return made
    net, what = row.arguments[0]
    beside = {"bare": floors.bare, "numpy": floors.by_numpy}
    if importlib.util.find_spec("jax"):
        beside["jax"] = floors.by_jax
    if args.compile:
        beside["compile"] = floors.compiled
    for name, make in beside.items():
        torch.manual_seed(0)
        step, forward, weights = make(*nets.NETS[net])
        made[name] = step if what == "step" else forward
        if name == "bare" and what == "step":
            for _ in range(6):
                step()
            last = outcome(row, "torch")[6:]  # each weight, then its gradient
            assert all(map(torch.equal, last[::2], weights())), "the bare operations' bits"
    return made


def compared(
    made: dict[str, Callable[[], Any]], quick: bool, clock: Callable[[], float], threads: bool
) -> Times:
    """Microseconds of each contender, and how many times as fast as PyTorch each is."""

    def timed(action: Callable[[], Any], times: int) -> float:
        if threads:  # the previous contender's threads spin for a while before they sleep
            time.sleep(0.05)
            action()
        start = clock()
        for _ in range(times):
            action()
        return (clock() - start) / times

    # All are called equally often: some rows' steps differ, as an episode is of any length.
    for action in made.values():
        timed(action, 5)
    once = {name: timed(action, 3) for name, action in made.items()}["torch"]
    # To wake a thread may take a hundred times as long as the step: more turns, of fewer steps.
    turn, most = (0.002, 100) if threads else (0.02, 40)
    if quick:
        turn, most = turn / 4, most // 4
    # The first step of a turn finds the other contender's data in the caches.
    times = max(4 if once < 0.02 else 1, int(turn / once))
    for action in made.values():
        timed(action, times)
    gc.collect()
    gc.freeze()  # objects made by building the contenders are not visited by each collection
    end = time.perf_counter() + (1 if quick else 10)
    rounds: list[dict[str, float]] = []
    while len(rounds) < 5 or (time.perf_counter() < end and len(rounds) < most):
        rounds.append({name: timed(f, times) for name, f in made.items()})
    found = {}
    for name in made:
        ratios = sorted(r["torch"] / r[name] for r in rounds)
        found[name] = {
            "us": statistics.median(r[name] for r in rounds) * 1e6,
            "ratio": statistics.median(ratios),
            "quartiles": (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]),
        }
    return found


@contextlib.contextmanager
def beside(count: int) -> Iterator[None]:
    """Other processes that keep the processor busy."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(index: int, args: argparse.Namespace) -> None:
    """Prints what was measured of a row: in the process that is the row's."""
    row = ROWS[index]
    torch.set_num_threads(row.threads)
    found: dict[str, Any] = {"index": index, "name": row.name, "variant": row.variant}
    found["bits"] = bits(row)
    made = contenders(row, args)
    one = row.threads == 1 and "jax" not in made
    clock = time.thread_time if one and args.cpu_time else time.perf_counter
    with beside(row.busy):
        found["times"] = compared(made, args.quick, clock, not one)
    print(json.dumps(found), flush=True)


def measured(indices: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows measured in another process; one that fails says why."""
    flags = [f"--{name.replace('_', '-')}" for name in ("quick", "compile", "cpu_time")
             if getattr(args, name)]  # fmt: skip
    command = [sys.executable, __file__, *flags, "--measure", *map(str, indices)]
    # NumPy's matrix products use this number, not torch.set_num_threads.
    env = {**os.environ, "OMP_NUM_THREADS": str(ROWS[indices[0]].threads)}
    ran = subprocess.run(command, capture_output=True, text=True, env=env)
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    for r in found:
        if ROWS[r["index"]].group == "large" and r["variant"] == "step":
            r["memory"] = peaks(r["index"])
    if ran.returncode:
        why = ran.stderr.strip().splitlines()[-1:] or [f"exit status {ran.returncode}"]
        failed, *left = indices[len(found) :]
        found.append({"index": failed, "failed": why[0]})
        found += measured(left, args) if left else []
    return found


def resident(name: str) -> float:
    """Megabytes of memory, now (VmRSS) or at most (VmHWM), as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) / 1024


def measure_peak(backend: str, index: int) -> None:
    """Prints the megabytes that some steps need at most, beyond importing and building."""
    torch.set_num_threads(1)
    step = ROWS[index].build(*BACKENDS[backend])[0]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(6):
        step()
    print(resident("VmHWM") - before)


def peaks(index: int) -> dict[str, float]:
    found = {}
    for backend in BACKENDS:
        command = [sys.executable, __file__, "--peak", backend, str(index)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        found[backend] = float(ran.stdout)
    return found


# What is shown.


def table(group: str, results: list[dict[str, Any]]) -> str:
    """The rows of one group, as a table for examples/README.md."""
    every = dict.fromkeys(name for r in results for name in r.get("times", ()))
    others = [name for name in every if name not in BACKENDS]
    memory = any("memory" in r for r in results)
    head = ["what", "variant", "PyTorch us", "nnmirror us", "times as fast (quartiles)", "bits"]
    head += [f"{name}, times PyTorch" for name in others]
    head += ["peak memory, MB: PyTorch", "nnmirror"] if memory else []
    lines = ["", f"{group}: {GROUPS[group]}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for r in results:
        row = ROWS[r["index"]]
        cells = [row.name, row.variant]
        if "failed" in r:
            cells += ["", "", "failed", r["failed"].replace("|", "/")]
        else:
            times = r["times"]
            low, high = times["nnmirror"]["quartiles"]
            each = [times[name]["us"] for name in BACKENDS]
            cells += [f"{us:,.0f}" if us >= 10 else f"{us:.1f}" for us in each]
            cells += [f"**{times['nnmirror']['ratio']:.2f}** ({low:.2f} to {high:.2f})", r["bits"]]
            cells += [f"{times[name]['ratio']:.2f}" if name in times else "" for name in others]
            cells += [f"{mb:.0f}" for mb in r.get("memory", {}).values()]
        cells += [""] * (len(head) - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: list[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no picture, as matplotlib is missing", file=sys.stderr)
        return
    pyplot.switch_backend("Agg")
    results = [r for r in results if "times" in r]
    rows = [ROWS[r["index"]] for r in results]
    figure, axes = pyplot.subplots(figsize=(10, 0.2 * len(rows) + 1.5), layout="constrained")
    for place, (r, row) in enumerate(zip(results, rows, strict=True)):
        times, color = r["times"], f"C{list(GROUPS).index(row.group)}"
        axes.barh(place, times["nnmirror"]["ratio"], color=color)
        if "bare" in times:
            axes.plot(times["bare"]["ratio"], place, "k|", markersize=8)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{r.name} {r.variant}" for r in rows], fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("times as fast as PyTorch eager (|: the operations called bare)")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="GROUP",
        help="groups to measure, or parts of names of rows",
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer turns, and without the largest nets"
    )
    parser.add_argument("--list", action="store_true", help="list the groups and their rows")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure CPU time instead of elapsed time (one thread only), for a busy machine",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmark"),
        help="path of the table and the picture, without the file extension",
    )
    parser.add_argument("--measure", nargs="+", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return measure_peak(args.peak[0], int(args.peak[1]))
    if args.measure:
        for index in args.measure:
            measure(index, args)
        return None
    todo = chosen(args.only, args.quick)
    if args.list:
        for group, indices in itertools.groupby(todo, key=lambda i: ROWS[i].group):
            print(f"{group}: {GROUPS[group]}")
            for name, same in itertools.groupby(indices, key=lambda i: ROWS[i].name):
                print(f"    {name}  {', '.join(ROWS[i].variant for i in same)}")
        return None
    results: list[dict[str, Any]] = []
    progress = tqdm(total=len(todo), desc="rows")
    for group, places in itertools.groupby(todo, key=lambda i: ROWS[i].group):
        by_process = itertools.groupby(places, key=lambda i: ROWS[i].name if args.quick else i)
        jobs, found = [list(together) for _, together in by_process], []
        for job in jobs:
            found += measured(job, args)
            progress.update(len(job))
        progress.clear()
        print(table(group, found), flush=True)
        results += found
        args.out.with_suffix(".json").write_text(json.dumps(results, indent=1))
    progress.close()
    picture(results, args.out.with_suffix(".png"))
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
    main()
