"""The tests hold bits against PyTorch's, so they run in exact mode unless they say otherwise."""

import gc

import pytest
import torch

import nnmirror

# A seed for a device that is not there waits for it in a list, with the stack of the call as text:
# most of the time of torch.manual_seed.
for _device in (torch.cuda, torch.xpu, torch.mtia):
    if not _device.is_available():
        _device.manual_seed_all = lambda seed: None


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
