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


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3), (32, 64), (100, 33), (4096, 256), (3, 300000)])
@pytest.mark.parametrize("name", LAYERS)
def test_accuracy(name, shape, dtype, offset):
    """The shapes (4096, 256) and (3, 300000) are computed in pieces."""
    torch.manual_seed(0)
    x, g = (torch.randn(shape) + offset).to(dtype), torch.randn(shape).to(dtype)
    truth = gradients(torch.nn, LAYERS[name], x.double(), g.double())
    theirs = gradients(torch.nn, LAYERS[name], x, g)
    ours = gradients(nnmirror, LAYERS[name], x, g)
    for exact, their, our in zip(truth, theirs, ours, strict=True):
        assert our.dtype is dtype
        assert our.shape == exact.shape
        error, allowed = ((t.double() - exact).abs().max() for t in (our, their))
        few = 1e-12 if dtype is torch.float64 else 4 * torch.finfo(dtype).eps
        assert error <= 2 * allowed + few * exact.abs().max()
