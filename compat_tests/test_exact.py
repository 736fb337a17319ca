"""Exact mode: a user who asks for PyTorch's bits gets them, and nobody else pays for them."""

import threading

import pytest
import torch

import nnmirror
from nnmirror.modules import fused
from nnmirror.rules import activation

pytestmark = pytest.mark.by_default


@pytest.fixture
def marked(monkeypatch):
    """Silu with an exact form that can be told from it: it doubles the gradient."""

    class Silu(activation.Silu):
        @staticmethod
        def backward(ctx, g):
            return activation.Silu.backward(ctx, g) * 2

    monkeypatch.setattr(activation.Silu, "exact", Silu)
    return Silu


def slope(x, layer):
    x.grad = None
    layer(x).sum().backward()
    return x.grad.clone()


def test_the_mode():
    assert not nnmirror.is_exact()
    with nnmirror.exact():
        assert nnmirror.is_exact()
        nnmirror.set_exact(False)
        assert nnmirror.is_exact()
    assert not nnmirror.is_exact()

    @nnmirror.exact()
    def asked():
        return nnmirror.is_exact()

    assert asked()
    nnmirror.set_exact(True)
    assert nnmirror.is_exact()


def test_the_mode_is_of_the_thread():
    found = []
    with nnmirror.exact():
        thread = threading.Thread(target=lambda: found.append(nnmirror.is_exact()))
        thread.start()
        thread.join()
    assert found == [False]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_forward_decides(marked, enabled, monkeypatch):
    """Layers alone and in a Sequential, again and again, so that walks are bound meanwhile."""
    monkeypatch.setattr(fused, "enabled", enabled)
    x = nnmirror.Parameter(torch.randn(8))
    nets = [nnmirror.SiLU(), nnmirror.Sequential(nnmirror.Identity(), nnmirror.SiLU())]
    nets.append(nnmirror.functional.silu)
    for net in nets:
        plain = slope(x, net)
        for i in range(12):
            if i % 3:
                with nnmirror.exact():
                    assert torch.equal(slope(x, net), 2 * plain)
            else:
                assert torch.equal(slope(x, net), plain)
        with nnmirror.exact():
            loss = net(x).sum()
        x.grad = None
        loss.backward()
        assert torch.equal(x.grad, 2 * plain)


def test_the_node_bears_the_same_name(marked):
    x = torch.randn(8)
    with nnmirror.exact():
        y = nnmirror.SiLU()(nnmirror.Parameter(x))
    assert y.grad_fn.name() == "SiluBackward0"
    assert y.grad_fn.function is marked
