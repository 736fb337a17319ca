"""nn.utils: clipping gradients, flattening parameters, spectral norm, pruning."""

import itertools

import pytest
import torch
import torch.nn.utils.prune

from .parity import parity


def net_with_grads(nn, scale=10.0):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net[2].bias.requires_grad_(False)
    (net(torch.randn(5, 3)) * scale).pow(2).sum().backward()
    return net


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm", [2.0, 1, float("inf"), 0.5])
@pytest.mark.parametrize("bound", [1.0, 1e6])
@parity
def test_clip_grad_norm_(nn, optim, bound, norm, foreach):
    net = net_with_grads(nn)
    total = nn.utils.clip_grad_norm_(net.parameters(), bound, norm, foreach=foreach)
    return total, dict(net.named_parameters())


@pytest.mark.parametrize("foreach", [None, True, False])
@parity
def test_clip_grad_value_(nn, optim, foreach):
    net = net_with_grads(nn)
    nn.utils.clip_grad_value_(net.parameters(), 0.5, foreach=foreach)
    nn.utils.clip_grad_value_(net[0].weight, 0.1)
    return dict(net.named_parameters())


@parity
def test_norm_alone(nn, optim):
    net = net_with_grads(nn)
    total = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    nn.utils.clip_grads_with_norm_(net.parameters(), 1.0, total * 2)
    return (
        total,
        nn.utils.get_total_norm(torch.ones(3)),
        nn.utils.get_total_norm([]),
        dict(net.named_parameters()),
    )


@parity
def test_clipping_edges(nn, optim):
    log = []
    for action in (
        lambda: nn.utils.clip_grad_norm_((p for p in []), 1.0),
        lambda: nn.utils.clip_grad_norm_([], 1.0),
        lambda: nn.utils.clip_grad_norm_(nn.Linear(1, 1).parameters(), 1.0),
        lambda: nn.utils.clip_grad_norm_(net_with_grads(nn, float("inf")).parameters(), 1.0),
        lambda: nn.utils.clip_grad_norm_(
            net_with_grads(nn, float("inf")).parameters(), 1.0, error_if_nonfinite=True
        ),
        lambda: nn.utils.clip_grad_norm(net_with_grads(nn)[0].weight, 1.0),
        lambda: nn.utils.clip_grad_norm_(3, 1.0),
        lambda: nn.utils.clip_grad_norm_(net_with_grads(nn).parameters(), "a"),
    ):
        try:
            log.append(action())
        except Exception as e:
            log.append((type(e).__name__, str(e)))
    return log


@parity
def test_vectors(nn, optim):
    net = net_with_grads(nn)
    net.zero_grad()
    vector = nn.utils.parameters_to_vector(net.parameters())
    vector.pow(2).sum().backward()
    grads = [p.grad for p in net.parameters()]
    nn.utils.vector_to_parameters(torch.arange(vector.numel()).float(), net.parameters())
    try:
        nn.utils.vector_to_parameters([1.0], net.parameters())
    except TypeError as e:
        return vector, grads, dict(net.named_parameters()), str(e)


@parity
def test_skip_init(nn, optim):
    layer = nn.utils.skip_init(nn.Linear, 3, 4, bias=False, dtype=torch.float64)
    log = []
    for args in ((nn.Tanh,), (torch.Tensor,)):
        try:
            nn.utils.skip_init(*args)
        except RuntimeError as e:
            log.append(str(e))
    return layer.weight.shape, layer.weight.dtype, layer.weight.device, repr(layer), log


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "ConvTranspose2d"])
@parity
def test_spectral_norm(nn, optim, kind):
    """The rows of the matrix are the outputs, which a transposed convolution has second."""
    more, shape = ((), (2, 3)) if kind == "Linear" else ((2,), (2, 3, 4, 4))
    layer = nn.utils.spectral_norm(getattr(nn, kind)(3, 5, *more, dtype=torch.float64))
    opt = optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        opt.zero_grad()
        layer(torch.randn(shape, dtype=torch.float64)).pow(2).sum().backward()
        opt.step()
    state = layer.state_dict()
    x = torch.ones(shape, dtype=torch.float64)
    return state, layer.eval()(x), nn.utils.remove_spectral_norm(layer).state_dict()


@parity
def test_prune(nn, optim):
    conv = nn.Conv2d(2, 3, 2)
    nn.utils.prune.l1_unstructured(conv, "weight", amount=0.5)
    conv(torch.ones(1, 2, 2, 2)).sum().backward()
    return dict(conv.named_parameters()), dict(conv.named_buffers())


@pytest.mark.parametrize(
    ("batch_first", "side"), itertools.product([True, False], ["right", "left"])
)
@parity
def test_padded_sequences(nn, optim, batch_first, side):
    w = nn.Parameter(torch.randn(3, 2))
    for _ in range(4):
        parts = [w * 2, (w * 3)[:2], torch.ones(4, 2), (w * 1)[:0], w]
        padded = nn.utils.rnn.pad_sequence(parts, batch_first, 0.5, side)
        (padded.square() * torch.arange(padded.numel()).view(padded.shape)).sum().backward()
        again = nn.utils.rnn.pad_sequence(parts, batch_first) * 1
        lengths = torch.tensor([3, 2, 4, 0, 3])
        found = nn.utils.rnn.unpad_sequence(again, lengths, batch_first)
        sum(part.sum() for part in found).backward()
    return padded, padded.stride(), padded.grad_fn.name(), found, w.grad


NOT_SEQUENCES = {
    "a number": lambda rnn, w: rnn.pad_sequence(3),
    "none": lambda rnn, w: rnn.pad_sequence([]),
    "other widths": lambda rnn, w: rnn.pad_sequence([w, torch.ones(2, 3)]),
    "no tensor": lambda rnn, w: rnn.pad_sequence([w, 3]),
    "side": lambda rnn, w: rnn.pad_sequence([w], padding_side="top"),
}


@pytest.mark.parametrize("name", NOT_SEQUENCES)
@parity
def test_what_cannot_be_padded(nn, optim, name):
    return NOT_SEQUENCES[name](nn.utils.rnn, nn.Parameter(torch.ones(3, 2)))
