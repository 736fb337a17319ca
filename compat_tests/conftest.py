"""The suite compares bits with PyTorch's, so tests run in exact mode unless marked `by_default`."""

import fcntl
import gc
import json
import os

# The workers of pytest-xdist share the cores, and each has PyTorch's default number of threads.
# Waiting threads must not keep a core busy: that took half of the suite's time. OpenMP reads the
# variable when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import nnmirror
from nnmirror import _state, beyond
from nnmirror.fast import leaves

# This many cases of a test suffice for a quick run; the others are marked `slow`.
FEW = 6

# A seed for a device that is not available is queued together with the call's stack trace as text,
# which takes most of the time of torch.manual_seed.
for _device in (torch.cuda, torch.xpu, torch.mtia):
    if not _device.is_available():
        _device.manual_seed_all = lambda seed: None


@pytest.hookimpl(tryfirst=True)  # before pytest deselects tests by their marks
def pytest_collection_modifyitems(items):
    """Mark all but FEW cases of each test as slow: `-m "not slow"` runs some of every test."""
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        # Spread by the golden ratio, so that the choice follows no period of the parameters.
        few = {int(i * 0.6180339887 % 1 * len(cases)) for i in range(FEW)}
        for i, item in enumerate(cases):
            if len(cases) > FEW and i not in few:
                item.add_marker("slow")


def pytest_collection_finish():
    """Freeze the objects that exist before the tests, so that gc.collect() does not scan them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def exact_mode(request, monkeypatch):
    """Exact mode for each test and the processes it starts, unless it is marked `by_default`."""
    wanted = request.node.get_closest_marker("by_default") is None
    monkeypatch.setenv("NNMIRROR_EXACT", str(int(wanted)))
    nnmirror.set_exact(wanted)
    yield
    nnmirror.set_exact(False)


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    """What other tests have done once, such as a hook on a leaf, must not decide how a walk runs."""
    monkeypatch.setattr(_state, "leaf_hooks_exist", False)
    monkeypatch.setattr(_state, "own_grad_mode", False)
    monkeypatch.setattr(_state, "own_exact_mode", False)
    monkeypatch.setattr(beyond, "_wanted", set())
    monkeypatch.setattr(leaves, "_retired", leaves._Retired())


@pytest.fixture
def after_collection(monkeypatch):
    """The nets of other tests are freed now, so that a net of this one takes over nothing."""
    gc.collect()
    monkeypatch.setattr(leaves, "_retired", leaves._Retired())


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, compute)`: the result of `compute()`, run by one worker and shared as JSON."""
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
    """One thread, for PyTorch's kernels that add in another order with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
