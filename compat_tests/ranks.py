"""Run tests in several processes, joined by torch.distributed over gloo.

A test module defines its scenarios, functions of `(nn, optim)`. Each process runs every scenario on
both libraries, in a process group of its own, and reports the differences. Starting processes takes
longer than the scenarios, so the same processes run all of them.
"""

import datetime
import faulthandler
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import nnmirror
from compat_tests.parity import outcome, same_outcome

LIMIT = 240.0  # seconds, after which a process that hangs ends: ten times what it needs


def start(directory, world, *args):
    """Run this file in `world` processes; return their exit codes and their output."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",  # the loopback device, so that no host name is needed
        "OMP_NUM_THREADS": "1",
    }
    logs = [Path(directory, f"log{rank}") for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), str(world), str(directory), *args],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + LIMIT
    try:
        for process in processes:
            process.wait(max(0.1, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [log.read_text() for log in logs]


def differences(directory, world, module):
    """For each scenario of `module`, the difference that each rank found ("" for none)."""
    codes, written = start(directory, world, module)
    assert not any(codes), written
    found = [json.loads(Path(directory, f"found{rank}").read_text()) for rank in range(world)]
    return {name: [of_rank[name] for of_rank in found] for name in found[0]}


def join_group(directory, name, rank, world):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/{name}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=20),
    )


def compare(directory, rank, world, name, scenario):
    outcomes = []
    for i, (nn, optim) in enumerate(((torch.nn, torch.optim), (nnmirror, nnmirror.optim))):
        join_group(directory, f"{name}{i}", rank, world)
        outcomes.append(outcome(scenario, nn, optim))
        dist.destroy_process_group()
    try:
        same_outcome(*outcomes)
    except Exception:
        return f"{traceback.format_exc()}\n{[o.error for o in outcomes]}"
    return ""


def main():
    faulthandler.dump_traceback_later(LIMIT - 5, exit=True)  # one that hangs says where
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    directory, name = sys.argv[3:5]
    module = importlib.import_module(name)
    if len(sys.argv) > 5:  # the name of a function of the rank
        join_group(directory, "group", rank, world)
        getattr(module, sys.argv[5])(rank)
        return
    scenarios = module.SCENARIOS
    found = {n: compare(directory, rank, world, n, s) for n, s in scenarios.items()}
    Path(directory, f"found{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
