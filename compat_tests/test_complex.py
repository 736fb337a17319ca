"""Complex numbers: their gradients are refused, and everything else works.

`test_every_op.py` tests each operation; this file tests the other ways to a complex gradient.
"""

import warnings

import pytest
import torch

import nnmirror
from nnmirror import nn

from .parity import parity

REFUSAL = "gradients of complex numbers are not mirrored"
C = torch.complex64


def real():
    """A real tensor that requires grad."""
    torch.manual_seed(0)
    return nn.Linear(2, 2)(torch.ones(3, 2))


def data():
    return torch.ones(3, 2, dtype=C)


def put(change, view=False):
    """Change a plain complex tensor in place, by a real tensor that requires grad."""
    buffer = torch.zeros(4, 2, dtype=C)
    change(buffer[1:] if view else buffer[1:].clone())


class FFT(nnmirror.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.fft.fft(x)

    @staticmethod
    def backward(ctx, g):
        return g.real


def hooked(model):
    model.register_full_backward_hook(lambda *_: None)
    return model


def exchanged():
    y = real()
    y.data = data()
    return y.tanh()


def converted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex modules are a new feature
        return nn.Linear(2, 2).to(C)(data())


def retyped():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model(torch.ones(3, 2))
    for p in model.parameters():
        p.data = p.data.to(C)
    return model(data())


def by_hand(module, *inputs):
    module(*inputs)
    return module.backward(torch.ones(()))


def frozen():
    layer = nn.Linear(2, 1, dtype=C).requires_grad_(False)
    return layer.backward(torch.ones_like(layer(data())))


REFUSED = {
    "Linear": lambda: nn.Linear(2, 1, dtype=C)(data()),
    "Sequential": lambda: nn.Sequential(nn.Linear(2, 2, dtype=C), nn.Tanh())(data()),
    "Embedding": lambda: nn.Embedding(3, 2, dtype=C)(torch.tensor([1])),
    "Module.to": converted,
    "data of a parameter": retyped,
    "data of a result": exchanged,
    "hooks": lambda: hooked(nn.Linear(2, 1, dtype=C))(data()),
    "torch's leaf": lambda: nn.Tanh()(data().requires_grad_()),
    "torch's graph": lambda: nn.Sequential(nn.Tanh(), nn.Tanh())(data().requires_grad_() * 1),
    "to": lambda: real().to(C),
    "a number": lambda: real() * 1j,
    "a number on the left": lambda: 1j - real(),
    "sum of another dtype": lambda: real().sum(dtype=C),
    "torch.complex": lambda: torch.complex(real(), real()),
    "view_as_complex": lambda: torch.view_as_complex(real()),
    "view_as_real": lambda: torch.view_as_real(nn.Parameter(data())),
    "real": lambda: nn.Parameter(data()).real,
    "H": lambda: nn.Parameter(data()).H,
    "fft": lambda: torch.fft.fft(real()),
    "cat": lambda: torch.cat([real(), data()]),
    "where": lambda: torch.where(torch.ones(3, 2) > 0, real(), data()),
    "loss": lambda: nn.L1Loss()(real(), data()),
    "target": lambda: nn.functional.l1_loss(data(), real()),
    "in place": lambda: put(lambda z: z.add_(real())),
    "in place on a view": lambda: put(lambda z: z.mul_(real()), view=True),
    "copy_": lambda: put(lambda z: z.copy_(real())),
    "an item": lambda: put(lambda z: z.__setitem__(0, real()[0])),
    "a Function's result": lambda: FFT.apply(real()),
    "parameters_to_vector": lambda: nn.utils.parameters_to_vector([nn.Parameter(data())]),
    "backward of a layer": lambda: by_hand(nn.Tanh(), torch.tensor(1j)),
    "backward of a frozen layer": frozen,
    "backward of a composed layer": lambda: by_hand(nn.Softsign(), torch.tensor(1j)),
    "backward of a loss": lambda: by_hand(nn.L1Loss(), data(), data()),
    "backward of a loss of real numbers": lambda: by_hand(nn.L1Loss(), torch.ones(3, 2), data()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    """Otherwise the weights would be updated with a wrong gradient."""
    with pytest.raises(NotImplementedError, match=REFUSAL):
        REFUSED[name]()


def test_a_refused_call_changes_nothing():
    z = torch.zeros(3, 2, dtype=C)
    with pytest.raises(NotImplementedError, match=REFUSAL):
        z.add_(real())
    assert not z.any()
    assert not z.requires_grad


@parity
def test_without_gradient(nn, optim):
    model = nn.Sequential(nn.Linear(2, 3, dtype=C), nn.Tanh(), nn.Linear(3, 1, dtype=C))
    with torch.no_grad():
        evaluated = model(torch.ones(3, 2, dtype=C))
    model.requires_grad_(False)
    loss = nn.L1Loss()(torch.ones(3, 2), torch.ones(3, 2, dtype=C))
    return evaluated, model(torch.ones(3, 2, dtype=C)), loss


@parity
def test_functions_without_gradient_of_a_complex_parameter(nn, optim):
    p = nn.Parameter(torch.tensor([1j, 2.0]))
    return p.isnan(), p == p, p.is_complex(), p.dtype, p.detach().abs()


@parity
def test_a_complex_gradient_set_by_the_script(nn, optim):
    """Clipping and SGD use a complex `.grad` that the script has set."""
    p = nn.Parameter(torch.tensor([1j, 2.0]))
    p.grad = torch.tensor([3.0, 4j])
    norm = nn.utils.clip_grad_norm_([p], 1.0)
    optim.SGD([p], lr=0.1).step()
    return norm, p, p.grad


def test_a_real_function_may_use_complex_numbers():
    """A Function of real numbers may compute with complex numbers inside."""

    class Power(nnmirror.Function):
        @staticmethod
        def forward(ctx, x):
            z = torch.fft.fft(x)
            ctx.save_for_backward(z)
            return z.real**2 + z.imag**2

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            return 2 * (torch.fft.ifft(z * g) * z.shape[-1]).real

    x = torch.randn(5, dtype=torch.float64)
    ours, theirs = nn.Parameter(x), torch.nn.Parameter(x)
    Power.apply(ours).sum().backward()
    torch.fft.fft(theirs).abs().pow(2).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad)


def test_to_torch_trains_it():
    """PyTorch's autograd trains the mirrored complex weights."""
    model, x = nn.Linear(2, 1, dtype=C), torch.randn(3, 2, dtype=C)
    plain, theirs = torch.nn.Linear(2, 1, dtype=C), nnmirror.to_torch(model)
    plain.load_state_dict(model.state_dict())
    for m in (plain, theirs):
        m(x).abs().pow(2).sum().backward()
        torch.optim.SGD(m.parameters(), lr=0.1).step()
    assert torch.equal(model.weight.detach(), plain.weight)


@parity
def test_a_function_that_returns_a_complex_gradient_of_a_real_number(nn, optim):
    base = torch.autograd.Function if nn is torch.nn else nnmirror.Function

    class Turned(base):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, g):
            return g * 1j

    Turned.apply(nn.Parameter(torch.ones(2))).sum().backward()


@parity
def test_a_hooked_module_is_given_its_inputs(nn, optim):
    """Inputs that require no grad outside the module require none inside, complex or not."""

    class Scale(nn.Module):
        def forward(self, x, factor, z):
            given.append((x.requires_grad, factor.requires_grad, z.requires_grad))
            return x * factor * z.abs()

    given, model = [], Scale()
    model.register_full_backward_hook(lambda module, grads, _: given.append(grads[0]))
    x = nn.Parameter(torch.randn(3))
    model(x, torch.randn(3), torch.randn(3, dtype=torch.complex64)).sum().backward()
    return given, x.grad
