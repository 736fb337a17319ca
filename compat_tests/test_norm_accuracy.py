"""Normalisations and softmax in default mode are about as accurate as PyTorch's kernels.

The reference is PyTorch in float64.
"""

import pytest
import torch

import nnmirror

pytestmark = pytest.mark.by_default

LAYERS = {
    "LayerNorm": lambda nn, n: nn.LayerNorm(n),
    "LayerNorm, plain": lambda nn, n: nn.LayerNorm(n, elementwise_affine=False),
    "LayerNorm, no bias": lambda nn, n: nn.LayerNorm(n, bias=False),
    "BatchNorm1d": lambda nn, n: nn.BatchNorm1d(n),
    "BatchNorm1d, plain": lambda nn, n: nn.BatchNorm1d(n, affine=False),
    "BatchNorm1d, in evaluation": lambda nn, n: nn.BatchNorm1d(n).eval(),
    "Softmax": lambda nn, n: nn.Softmax(dim=1),
    "Softmax, by columns": lambda nn, n: nn.Softmax(dim=0),
    "LogSoftmax": lambda nn, n: nn.LogSoftmax(dim=1),
    "LogSoftmax, by columns": lambda nn, n: nn.LogSoftmax(dim=0),
}


def gradients(nn, make, x, g):
    """The gradients of x and of the parameters."""
    torch.manual_seed(1)
    layer = make(nn, x.shape[1])
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    layer.to(x.dtype)
    x = x.clone().requires_grad_()
    z = x * 1 if nn is torch.nn else nnmirror.Parameter(x.detach()) * 1
    z.retain_grad()
    layer(z).backward(g)
    return [z.grad, *[p.grad for p in layer.parameters()]]


def assert_accurate(make, x, g):
    """The gradients are about as near to those in float64 as PyTorch's."""
    truth = gradients(torch.nn, make, x.double(), g.double())
    theirs = gradients(torch.nn, make, x, g)
    ours = gradients(nnmirror, make, x, g)
    for exact, their, our in zip(truth, theirs, ours, strict=True):
        assert our.dtype is x.dtype
        assert our.shape == exact.shape
        error, allowed = ((t.double() - exact).abs().max() for t in (our, their))
        few = 1e-12 if x.dtype is torch.float64 else 4 * torch.finfo(x.dtype).eps
        assert error <= 2 * allowed + few * exact.abs().max()


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3), (32, 64), (100, 33), (4096, 256), (3, 300000)])
@pytest.mark.parametrize("name", LAYERS)
def test_accuracy(name, shape, dtype, offset):
    """The shapes (4096, 256) and (3, 300000) are computed in pieces."""
    torch.manual_seed(0)
    x, g = (torch.randn(shape) + offset).to(dtype), torch.randn(shape).to(dtype)
    assert_accurate(LAYERS[name], x, g)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_accuracy_of_many_images(channels_last, training, offset):
    """Seven images are computed in pieces of two, and one."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, g = (torch.randn(7, 8, 120, 120).contiguous(memory_format=layout) for _ in range(2))
    x += offset

    def make(nn, n):
        return nn.BatchNorm2d(n).train(training)

    assert_accurate(make, x, g)
