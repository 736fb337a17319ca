"""The tests hold bits against PyTorch's, so they run in exact mode unless they say otherwise."""

import fcntl
import gc
import json
import os

# The workers of pytest-xdist share the cores, and each has PyTorch's default number of threads.
# Threads that wait for work must not keep a core busy meanwhile: half of the suite's time. It is
# read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import nnmirror

# So many cases of one test are enough to see that it passes; the others are `slow`.
FEW = 6

# A seed for a device that is not there waits for it in a list, with the stack of the call as text:
# most of the time of torch.manual_seed.
for _device in (torch.cuda, torch.xpu, torch.mtia):
    if not _device.is_available():
        _device.manual_seed_all = lambda seed: None


@pytest.hookimpl(tryfirst=True)  # before some are left out by their marks
def pytest_collection_modifyitems(items):
    """Mark all but FEW cases of each test as slow: `-m "not slow"` runs some of every test."""
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        # Spread so that no period of the parameters is met: by the golden section.
        few = {int(i * 0.6180339887 % 1 * len(cases)) for i in range(FEW)}
        for i, item in enumerate(cases):
            if len(cases) > FEW and i not in few:
                item.add_marker("slow")


def pytest_collection_finish():
    """What is there before the tests stays: no gc.collect() need go over it once more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def exact_mode(request, monkeypatch):
    """Exact mode for each test, and the processes it starts, but for one marked `by_default`."""
    wanted = request.node.get_closest_marker("by_default") is None
    monkeypatch.setenv("NNMIRROR_EXACT", str(int(wanted)))
    nnmirror.set_exact(wanted)
    yield
    nnmirror.set_exact(False)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, compute)`: what `compute()` gives, as JSON has it, computed by one of all the
    processes that the tests run in."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent

    def shared(name, compute):
        file = directory / f"{name}.json"
        with open(directory / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                file.write_text(json.dumps(compute()))
        return json.loads(file.read_text())

    return shared


@pytest.fixture
def one_thread():
    """For bits that PyTorch's kernel has with one thread: with several it adds up otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
