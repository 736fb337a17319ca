"""Third derivatives against finite differences of the second.

PyTorch is no reference here: its norms take the mean and the variance of a batch as constants
from the second derivative on.
"""

import pytest
import torch
import torch.nn.functional as F

import nnmirror


def weighted(t, start):
    """A weighted sum, with another weight for each element."""
    return (t * torch.linspace(start, 1, t.numel(), dtype=t.dtype).reshape(t.shape)).sum()


def of_second(function, leaves):
    """A scalar that depends on the second derivatives of all elements of the result."""
    y = function(*leaves)
    first = torch.autograd.grad(
        weighted(torch.sin(y) + y, -0.7), leaves, create_graph=True, allow_unused=True
    )
    number = sum(weighted(torch.sin(g) + g * g, -0.4) for g in first if g is not None)
    second = torch.autograd.grad(number, leaves, create_graph=True, allow_unused=True)
    return sum(weighted(g, 0.1) for g in second if g is not None)


def by_differences(function, values):
    found = []
    for t in values:
        grad = torch.empty_like(t)
        for i, value in enumerate(t.view(-1).tolist()):
            at = []
            for step in (1e-5, -1e-5):
                t.view(-1)[i] = value + step
                leaves = [v.clone().requires_grad_() for v in values]
                at.append(of_second(function, leaves).item())
            t.view(-1)[i] = value
            grad.view(-1)[i] = (at[0] - at[1]) / 2e-5
        found.append(grad)
    return found


MEAN, VAR = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.5, 1.5, 0.8])
ZERO = torch.tensor([1.0, 0.0, 1.0, 1.0])


def changed_in_place(x, w):
    y = x * w
    y[0].mul_(w[1])
    y = y * y
    y[:, 1].tanh_()
    return y


CASES = {
    "changed in place": (changed_in_place, (2, 3), (2, 3)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), (3, 4), (4,), (4,)),
    "layer_norm of a matrix": (lambda x: F.layer_norm(x, (3, 4)), (2, 3, 4)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), (3, 4), (4,)),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (5, 3), (3,), (3,)),
    "batch_norm of signals": (lambda x: F.batch_norm(x, None, None, None, None, True), (2, 3, 4)),
    "batch_norm in evaluation": (
        lambda x, w, b: F.batch_norm(x, MEAN.to(x.dtype), VAR.to(x.dtype), w, b, False),
        (5, 3),
        (3,),
        (3,),
    ),
    "prelu": (lambda x, w: F.prelu(x, w) ** 2, (2, 3), (3,)),
    "pad": (lambda x: F.pad(x, (2, 1), "reflect") ** 3 + F.pad(x, (2, 1), "replicate"), (2, 4)),
    "cumprod with a zero": (lambda x: torch.cumprod(x * ZERO.to(x.dtype), 0) * x, (4,)),
    "dist": (lambda x, y: torch.dist(x, y, 3), (2, 3), (3,)),
    "cosine_similarity": (lambda x, y: F.cosine_similarity(x, y, -1), (2, 3), (3,)),
    "normalize": (lambda x: F.normalize(x, dim=0), (3, 2)),
    "det": (torch.linalg.det, (3, 3)),
    "slogdet": (lambda a: torch.linalg.slogdet(a)[1], (2, 3, 3)),
    "solve": (torch.linalg.solve, (3, 3), (3, 2)),
    "solve from the right": (lambda a, b: torch.linalg.solve(a, b, left=False), (3, 3), (2, 3)),
    "inv": (torch.linalg.inv, (3, 3)),
    "cholesky": (lambda a: torch.linalg.cholesky(a @ a.mT + torch.eye(3)), (3, 3)),
    "lerp": (lambda x, y, w: torch.lerp(x, y, w) ** 2, (2, 3), (3,), (2, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_third_derivatives_are_those_of_the_second(case):
    function, *shapes = CASES[case]
    torch.manual_seed(0)
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    expected = by_differences(function, values)
    leaves = [nnmirror.Parameter(v) for v in values]
    actual = torch.autograd.grad(of_second(function, leaves), leaves, allow_unused=True)
    for e, a in zip(expected, actual, strict=True):
        a = torch.zeros_like(e) if a is None else a
        assert (e - a).abs().max() <= 1e-6 * max(1, e.abs().max())
