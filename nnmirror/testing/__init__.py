"""Checks for a layer, loss or `nnmirror.Function` of your own, in the manner of `torch.testing`.

- `assert_parity(ours, theirs, *inputs)`: does it behave like PyTorch's? Compares outputs,
  gradients, state, warnings and errors, to the bit or within a tolerance.
- `gradcheck(func, inputs)`: is its backward the derivative of its forward? By central differences
  in float64, independent of PyTorch's autograd.
- `assert_same(actual, expected)`, `outcome(function)`: the building blocks of these two.

    import torch
    import nnmirror
    from nnmirror.testing import assert_parity, gradcheck

    class Square(nnmirror.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * 2 * x

    x = torch.randn(4, 3, requires_grad=True)
    gradcheck(Square, x)
    assert_parity(Square, torch.square, x)

The package's own tests use them (`compat_tests/parity.py`). Nothing of `torch.nn` is imported here:
you pass what to compare with.
"""

from ..bits import same_bits
from .compare import Tolerance, assert_same, units_apart
from .gradients import GradcheckError, gradcheck
from .outcome import Outcome, assert_same_outcome, normal, outcome
from .parity import assert_parity

__all__ = [
    "GradcheckError",
    "Outcome",
    "Tolerance",
    "assert_parity",
    "assert_same",
    "assert_same_outcome",
    "gradcheck",
    "normal",
    "outcome",
    "same_bits",
    "units_apart",
]
