"""The tests hold bits against PyTorch's, so they run in exact mode unless they say otherwise."""

import pytest

import nnmirror


@pytest.fixture(autouse=True)
def exact_mode(request, monkeypatch):
    """Exact mode for each test, and the processes it starts, but for one marked `by_default`."""
    wanted = request.node.get_closest_marker("by_default") is None
    monkeypatch.setenv("NNMIRROR_EXACT", str(int(wanted)))
    nnmirror.set_exact(wanted)
    yield
    nnmirror.set_exact(False)
