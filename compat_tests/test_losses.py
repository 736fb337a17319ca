"""The loss functions and their arguments. A user would get other bits, forward or backward."""

import math

import pytest
import torch

import nnmirror

from .parity import cpu_only, parity
from .test_layers import DTYPES

REDUCTIONS = ["none", "mean", "sum"]
SIZES = [(), (0,), (5,), (64,), (1003,), (7, 3), (4, 0), (3, 5, 2), (40000, 2)]


def compared(nn, loss, x, *more):
    """The loss, its node's name, and the gradients of all inputs that require one."""
    leaves = [x.detach().requires_grad_(), *more]
    y = loss(*leaves)
    name = y.grad_fn.name()
    y.backward(torch.randn(y.shape).to(y.dtype))
    return name, y, leaves


def sized(nn, name, reduction):
    return {
        "l1": lambda: nn.L1Loss(reduction=reduction),
        "smooth_l1": lambda: nn.SmoothL1Loss(reduction=reduction),
        "smooth_l1 0.7": lambda: nn.SmoothL1Loss(reduction=reduction, beta=0.7),
        "smooth_l1 0": lambda: nn.SmoothL1Loss(reduction=reduction, beta=0.0),
        "huber": lambda: nn.HuberLoss(reduction=reduction),
        "huber 0.7": lambda: nn.HuberLoss(reduction, 0.7),
    }[name]()


DISTANCES = ["l1", "smooth_l1", "smooth_l1 0.7", "smooth_l1 0", "huber", "huber 0.7"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", DISTANCES)
@parity
def test_distance(nn, optim, name, shape, dtype, reduction):
    target = torch.randn(shape).to(dtype).requires_grad_()
    return compared(nn, sized(nn, name, reduction), (2 * torch.randn(shape)).to(dtype), target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", DISTANCES)
@parity
def test_distance_of_odd_input(nn, optim, name, reduction):
    loss = sized(nn, name, reduction)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 0.7, -0.7, 1.0])
    t = torch.randn(40, 60)
    return (
        compared(nn, loss, special, torch.zeros(8)),
        compared(nn, loss, special.repeat(9), torch.zeros(72)),
        compared(nn, loss, torch.randn(60, 40).t(), t),
        compared(nn, loss, torch.randn(60, 40)[::2, ::2], torch.randn(20, 30).t()),
        compared(nn, loss, torch.randn(40, 60), torch.randn(60).requires_grad_()),
        compared(nn, loss, torch.randn(3), torch.randn(4, 3, dtype=torch.float64).requires_grad_()),
    )


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["smooth_l1_loss", "huber_loss"])
@pytest.mark.parametrize("trained", ["input", "target", "both"])
@parity
def test_distance_of_two_dtypes(nn, optim, name, dtype, other, trained):
    """smooth_l1_loss accepts input and target of two dtypes; huber_loss raises in backward."""
    x, t = torch.randn(19).to(dtype), torch.randn(19).to(other)
    x.requires_grad_(trained != "target")
    t.requires_grad_(trained != "input")
    loss = getattr(nn.functional, name)(x, t)
    loss.backward()
    return loss, x, t


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", DISTANCES)
@parity
def test_distance_of_odd_layout(nn, optim, name, reduction):
    """Inputs that are not contiguous: the kernels' gradient is, and that decides how they round."""
    results = []
    for x, t in (
        (torch.randn(7, 65).t(), torch.randn(65, 1).expand(65, 7)),
        (torch.randn(7, 65).t(), torch.randn(7, 65).t()),
        (torch.randn(2, 2, 3).permute(1, 2, 0), torch.randn(2, 1, 1)),
        (torch.randn(9, 40, 5).permute(2, 1, 0), torch.randn(40, 1)),
    ):
        leaf = t.detach().requires_grad_()
        results.append(compared(nn, sized(nn, name, reduction), x, leaf))
    return results


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["l1_loss", "huber_loss"])
@parity
@cpu_only("under a default device PyTorch's own l1_loss forgets its weight")
def test_distance_weighted(nn, optim, name, reduction):
    loss = getattr(nn.functional, name)
    x, w = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3, requires_grad=True)
    y = loss(x, torch.randn(4, 3), reduction=reduction, weight=w)
    y.sum().backward()
    return y, x, w


@parity
@cpu_only("under a default device PyTorch's own l1_loss forgets its weight")
def test_distance_with_a_weight_of_another_size(nn, optim):
    return nn.functional.l1_loss(grad(3), torch.rand(3), weight=torch.rand(2))


@pytest.mark.parametrize("weighted", [False, True, "broadcast"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
@parity
def test_bce(nn, optim, shape, dtype, reduction, weighted):
    weight = torch.rand(shape).to(dtype) if weighted else None
    if weighted == "broadcast" and len(shape) > 1:
        weight = weight[0]
    target = torch.rand(shape).to(dtype).requires_grad_()
    loss = nn.BCELoss(weight, reduction=reduction)
    return compared(nn, loss, torch.rand(shape).to(dtype), target), dict(loss.state_dict())


@pytest.mark.parametrize("weighted", [(), ("weight",), ("pos_weight",), ("weight", "pos_weight")])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
@parity
def test_bce_with_logits(nn, optim, shape, dtype, reduction, weighted):
    weights = {name: (3 * torch.rand(shape[-1:])).to(dtype) for name in weighted}
    target = torch.rand(shape).to(dtype).requires_grad_()
    loss = nn.BCEWithLogitsLoss(**weights, reduction=reduction)
    return compared(nn, loss, (3 * torch.randn(shape)).to(dtype), target), dict(loss.state_dict())


@parity
def test_bce_at_the_ends(nn, optim):
    """Probabilities 0 and 1, where BCELoss clamps the logarithm; logits beyond exp's range."""
    x, t = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    far = torch.tensor([-1e4, 1e4, 90.0, float("inf"), float("nan")])
    return (
        compared(nn, nn.BCELoss(), x, t),
        compared(nn, nn.BCELoss(), x, t.clone().requires_grad_()),
        compared(nn, nn.BCEWithLogitsLoss(), far, t.clone().requires_grad_()),
        compared(nn, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), far, t),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@parity
def test_bce_near_one(nn, optim, dtype):
    """Probabilities so near 1 that the backward clamps its divisor x (1 - x)."""
    x = (1 - torch.rand(64, dtype=torch.float64) * 1e-11).to(dtype)
    return compared(nn, nn.BCELoss(), x, torch.rand(64).to(dtype))


CLASSES = [(3,), (1, 3), (5, 3), (64, 10), (0, 3), (4, 3, 2), (4, 3, 0), (2, 3, 4, 5), (2, 3, 4, 1, 2)]  # fmt: skip


def classes(shape, ignored=None):
    t = torch.randint(
        0, shape[0 if len(shape) == 1 else 1], (shape[:1] + shape[2:]) if len(shape) > 1 else ()
    )
    if ignored is not None and t.numel() > 1:
        t.view(-1)[::2] = ignored
    return t


@pytest.mark.parametrize("ignored", [None, -100, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", CLASSES)
@parity
def test_nll(nn, optim, shape, reduction, weighted, ignored):
    weight = torch.rand(shape[0 if len(shape) == 1 else 1]) if weighted else None
    more = {} if ignored is None else {"ignore_index": ignored}
    loss = nn.NLLLoss(weight, reduction=reduction, **more)
    return compared(nn, loss, torch.randn(shape), classes(shape, ignored))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignored", [None, -100, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", CLASSES)
@parity
def test_cross_entropy(nn, optim, shape, reduction, weighted, ignored, smoothing):
    weight = torch.rand(shape[0 if len(shape) == 1 else 1]) if weighted else None
    more = {} if ignored is None else {"ignore_index": ignored}
    loss = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=smoothing, **more)
    return compared(nn, loss, torch.randn(shape), classes(shape, ignored)), dict(loss.state_dict())


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 2), (32, 3), (33, 10), (7, 40), (2000, 17)])
@parity
def test_cross_entropy_of_a_net(nn, optim, shape, dtype, reduction, ignored):
    """Logits from a layer, with class targets: one node records what is two nodes in PyTorch."""
    layer = nn.Linear(6, shape[1], dtype=dtype)
    loss = nn.CrossEntropyLoss(reduction=reduction)
    x, t = torch.randn(shape[0], 6, dtype=dtype), torch.randint(shape[1], shape[:1])
    if ignored != "none":
        t[:: 2 if ignored == "some" else 1] = -100
    grads = []
    for scale in (1, 30):
        value = loss(layer(x) * scale, t)
        value.backward()
        grads += [value, layer.weight.grad.clone(), layer.bias.grad.clone()]
    return grads


@parity
def test_graph_of_cross_entropy(nn, optim):
    """grad_fn, next_functions and node hooks show PyTorch's two nodes."""
    layer, t = nn.Linear(6, 3), torch.randint(3, (5,))
    seen = []

    def scored():
        return layer(torch.randn(5, 6))

    scores = scored()
    scores.register_hook(lambda g: seen.append(g.clone()))
    scores.retain_grad()
    value = nn.functional.cross_entropy(scores, t)
    node = value.grad_fn
    before = node.next_functions[0][0]
    node.register_prehook(lambda grads: seen.append(grads))
    before.register_hook(lambda gi, go: seen.extend((gi, go)))
    names = node.name(), before.name(), before.next_functions[0][0].name()
    value.backward(torch.tensor(0.3), retain_graph=True)
    value.backward()
    again = nn.CrossEntropyLoss()(scored(), t)
    again.backward(retain_graph=True)
    again.backward()
    by_hand = scored()
    grads = torch.autograd.grad(nn.CrossEntropyLoss()(by_hand, t), by_hand)
    return names, seen, scores.grad, grads, layer.weight.grad


@parity
def test_cross_entropy_backward_twice(nn, optim):
    value = nn.CrossEntropyLoss()(nn.Linear(6, 3)(torch.randn(5, 6)), torch.randint(3, (5,)))
    value.backward()
    value.backward()


@parity
def test_classes_changed_before_backward(nn, optim):
    t = torch.randint(3, (5,))
    value = nn.CrossEntropyLoss()(nn.Linear(6, 3)(torch.randn(5, 6)), t)
    t.zero_()
    value.backward()


@parity
def test_class_out_of_range(nn, optim):
    return nn.CrossEntropyLoss()(nn.Linear(6, 3)(torch.randn(2, 6)), torch.tensor([0, 3]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", CLASSES)
@parity
def test_cross_entropy_of_probabilities(nn, optim, shape, reduction, weighted, smoothing):
    weight = torch.rand(shape[0 if len(shape) == 1 else 1]) if weighted else None
    loss = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=smoothing)
    return compared(nn, loss, torch.randn(shape), torch.rand(shape, requires_grad=True))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(2,), (5, 3), (3, 3), (2, 3, 4)])
@pytest.mark.parametrize("name", ["NLLLoss", "CrossEntropyLoss"])
@parity
def test_classes_as_bytes(nn, optim, name, shape, weighted):
    """Class targets of dtype torch.uint8 are accepted, but not for images: an error there."""
    weight = torch.rand(shape[0 if len(shape) == 1 else 1]) if weighted else None
    t = classes(shape).to(torch.uint8)
    return compared(nn, getattr(nn, name)(weight), torch.randn(shape), t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@parity
def test_cross_entropy_dtypes(nn, optim, dtype, smoothing):
    loss = nn.CrossEntropyLoss(torch.rand(10).to(dtype), label_smoothing=smoothing)
    t = torch.randint(0, 10, (33,))
    far = torch.tensor([[1e4, -1e4], [float("inf"), 0.0]]).to(dtype)
    return (
        compared(nn, loss, torch.randn(33, 10).to(dtype), t),
        compared(nn, loss, torch.randn(10, 33).to(dtype).t(), t),
        compared(
            nn,
            loss,
            torch.randn(33, 10, 4).to(dtype).transpose(0, 2),
            torch.randint(0, 10, (4, 33)),
        ),
        compared(nn, nn.CrossEntropyLoss(), far, torch.tensor([1, 1])),
    )


@parity
def test_classifier_trains(nn, optim):
    """A small classifier trained with each loss ends with the same weights."""
    x, t = torch.randn(32, 2), torch.randint(0, 3, (32,))
    hot = torch.nn.functional.one_hot(t, 3).float()
    losses = {
        "cross entropy": lambda y: nn.CrossEntropyLoss(label_smoothing=0.05)(y, t),
        "nll": lambda y: nn.NLLLoss()(nn.LogSoftmax(1)(y), t),
        "bce": lambda y: nn.BCELoss()(nn.Sigmoid()(y), hot),
        "bce logits": lambda y: nn.BCEWithLogitsLoss()(y, hot),
        "l1": lambda y: nn.L1Loss()(y, hot),
        "smooth": lambda y: nn.SmoothL1Loss()(y, hot),
        "huber": lambda y: nn.HuberLoss()(y, hot),
    }
    results = []
    for loss in losses.values():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(2, 25), nn.ReLU(), nn.Linear(25, 3))
        optimizer = optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            value = loss(net(x))
            value.backward()
            optimizer.step()
        results.append((value, dict(net.named_parameters())))
    return results


@parity
def test_torch_functions_on_tracked_tensors(nn, optim):
    """torch.nn.functional's losses can be called on a mirrored net's output."""
    F = torch.nn.functional
    y = nn.Linear(3, 4)(torch.randn(5, 3))
    t, p = torch.randint(0, 4, (5,)), torch.rand(5, 4)
    loss = F.cross_entropy(y, t) + F.nll_loss(F.log_softmax(y, 1), t) + F.l1_loss(y, p)
    loss = loss + F.binary_cross_entropy(torch.sigmoid(y), p) + F.smooth_l1_loss(y, p, beta=0.5)
    loss = loss + F.binary_cross_entropy_with_logits(y, p) + F.huber_loss(y, p, delta=0.5)
    loss = loss + F.elu(y).mean() + F.silu(y).mean() + F.hardtanh(y).mean() + F.relu6(y).mean()
    loss.backward()
    return loss


@parity
def test_output_of_inference_mode(nn, optim):
    """Losses of inference tensors work outside inference mode, and raise where grad is required."""
    model, x, t = nn.Linear(2, 3), torch.randn(4, 2), torch.randint(0, 3, (4,))
    with torch.inference_mode():
        y = model(x)
    p = torch.rand(4, 3)
    losses = [nn.CrossEntropyLoss()(y, t), nn.NLLLoss()(y, t)]
    losses += [loss()(y, p) for loss in (nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss)]
    losses += [
        nn.BCEWithLogitsLoss()(y, p),
        nn.functional.mse_loss(y, p),
        nn.ReLU()(y),
        nn.SiLU()(y),
    ]
    try:
        nn.MSELoss()(nn.Linear(2, 3)(x), y).backward()
    except RuntimeError as e:
        losses.append(str(e))
    return losses


def grad(*shape):
    return torch.rand(*shape).requires_grad_()


ERRORS = {
    "bce sizes": lambda nn: nn.BCELoss()(torch.rand(3), torch.rand(4)),
    "bce range": lambda nn: nn.BCELoss()(torch.tensor([1.5]), torch.rand(1)),
    "bce target range": lambda nn: nn.BCELoss()(grad(1), torch.tensor([-1.0])),
    "bce integers": lambda nn: nn.BCELoss()(grad(3), torch.tensor([1, 0, 1])),
    "bce weight": lambda nn: nn.functional.binary_cross_entropy(grad(3), torch.rand(3), grad(3)),
    "bce weight size": lambda nn: nn.functional.binary_cross_entropy(grad(3), torch.rand(3), torch.rand(2)),
    "bce reduction": lambda nn: nn.BCELoss(reduction="average")(grad(3), torch.rand(3)),
    "logits sizes": lambda nn: nn.BCEWithLogitsLoss()(torch.rand(3), torch.rand(4)),
    "logits weight": lambda nn: nn.functional.binary_cross_entropy_with_logits(grad(3), torch.rand(3), grad(3)),
    "logits pos_weight": lambda nn: nn.functional.binary_cross_entropy_with_logits(
        grad(3), torch.rand(3), pos_weight=grad(3)),
    "nll batch": lambda nn: nn.NLLLoss()(grad(3, 4), torch.tensor([1, 2])),
    "nll class": lambda nn: nn.NLLLoss()(grad(2, 3), torch.tensor([1, 3])),
    "nll floats": lambda nn: nn.NLLLoss()(grad(2, 3), torch.rand(2)),
    "nll images": lambda nn: nn.NLLLoss()(grad(2, 3, 4), torch.ones(2, 5).long()),
    "nll images 4": lambda nn: nn.NLLLoss()(grad(2, 3, 4, 5), torch.ones(2, 5, 4).long()),
    "nll number": lambda nn: nn.NLLLoss()(torch.tensor(1.0, requires_grad=True), torch.tensor(1)),
    "nll weight": lambda nn: nn.NLLLoss(torch.rand(4))(grad(2, 3), torch.tensor([1, 2])),
    "nll weight grad": lambda nn: nn.functional.nll_loss(grad(2, 3), torch.tensor([1, 2]), grad(3)),
    "ce batch": lambda nn: nn.CrossEntropyLoss()(grad(3, 4), torch.tensor([1, 2])),
    "ce class": lambda nn: nn.CrossEntropyLoss()(grad(2, 3), torch.tensor([1, 3])),
    "ce negative class": lambda nn: nn.CrossEntropyLoss()(grad(2, 3), torch.tensor([1, -1])),
    "ce weight": lambda nn: nn.CrossEntropyLoss(torch.rand(4))(grad(2, 3), torch.tensor([1, 2])),
    "ce weight grad": lambda nn: nn.functional.cross_entropy(grad(2, 3), torch.tensor([1, 2]), grad(3)),
    "ce smoothing": lambda nn: nn.CrossEntropyLoss(label_smoothing=1.5)(grad(2, 3), torch.tensor([1, 2])),
    "ce smoothing < 0": lambda nn: nn.CrossEntropyLoss(label_smoothing=-0.1)(grad(2, 3), torch.tensor([1, 2])),
    "ce smoothing, class": lambda nn: nn.CrossEntropyLoss(label_smoothing=0.1)(grad(2, 3), torch.tensor([1, 3])),
    "ce of integers": lambda nn: nn.CrossEntropyLoss()(grad(2, 3), torch.ones(2, 3).long()),
    "ce ignored probabilities": lambda nn: nn.CrossEntropyLoss(ignore_index=1)(grad(2, 3), torch.rand(2, 3)),
    "ce number": lambda nn: nn.CrossEntropyLoss()(torch.tensor(1.0, requires_grad=True), torch.tensor(1)),
    "ce list": lambda nn: nn.CrossEntropyLoss()([[1.0, 2.0]], torch.tensor([1])),
    "ce reduction": lambda nn: nn.CrossEntropyLoss(reduction="average")(grad(2, 3), torch.tensor([1, 2])),
    "ce old reduction": lambda nn: nn.CrossEntropyLoss(reduction="elementwise_mean")(grad(2, 3), torch.tensor([1, 2])),
    "ce size_average": lambda nn: nn.CrossEntropyLoss(size_average=False)(grad(2, 3), torch.tensor([1, 2])),
    "l1 sizes": lambda nn: nn.L1Loss()(grad(3), torch.rand(4)),
    "l1 broadcast": lambda nn: nn.L1Loss()(grad(3), torch.rand(4, 3)),
    "smooth beta": lambda nn: nn.SmoothL1Loss(beta=-1.0)(grad(3), torch.rand(3)),
    "huber delta": lambda nn: nn.HuberLoss(delta=0.0)(grad(3), torch.rand(3)),
    "huber delta type": lambda nn: nn.HuberLoss(delta="1"),
    "huber weight": lambda nn: nn.functional.huber_loss(grad(3), torch.rand(3), weight=torch.rand(2)),
    "huber reduction": lambda nn: nn.functional.huber_loss(grad(3), torch.rand(3), "average", weight=torch.rand(3)),
    "changed since": lambda nn: changed(nn),
}  # fmt: skip


def changed(nn):
    h = nn.Linear(2, 2)(torch.ones(1, 2))
    loss = nn.NLLLoss()(h, torch.tensor([1]))
    with torch.no_grad():
        h.add_(1)
    loss.backward()


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_bad_input(nn, optim, name):
    """Bad input gives PyTorch's exception and message."""
    return ERRORS[name](nn)


@pytest.mark.parametrize(
    "name", ["BCEWithLogitsLoss", "SmoothL1Loss", "HuberLoss", "CrossEntropyLoss"]
)
def test_gradient_is_that_of_the_loss(name):
    """The gradient against central differences in float64, independently of PyTorch."""
    loss = getattr(nnmirror, name)()
    x = torch.randn(4, 3, dtype=torch.float64)
    t = torch.rand(4, 3, dtype=torch.float64)
    leaf = nnmirror.Parameter(x)
    loss(leaf, t).backward()
    h = 1e-6
    for i in range(x.numel()):
        step = torch.zeros(12, dtype=torch.float64)
        step[i] = h
        slope = (loss(x + step.view(4, 3), t) - loss(x - step.view(4, 3), t)) / (2 * h)
        assert abs(leaf.grad.view(-1)[i] - slope) < 1e-8


def test_explicit_style():
    """`model.backward(criterion.backward())` gives the gradients that `loss.backward()` gives."""
    t, p = torch.tensor([0, 2, 1]), torch.rand(3, 3)
    cases = {
        "CrossEntropyLoss": t, "NLLLoss": t, "L1Loss": p, "SmoothL1Loss": p, "HuberLoss": p,
        "BCEWithLogitsLoss": p,
    }  # fmt: skip
    for name, target in cases.items():
        model, criterion = nnmirror.Linear(2, 3), getattr(nnmirror, name)()
        x = torch.randn(3, 2)
        criterion.forward(model.forward(x), target)
        model.backward(criterion.backward())
        by_hand = model.weight.grad
        model.zero_grad()
        criterion(model(x), target).backward()
        assert torch.equal(by_hand, model.weight.grad), name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["MSELoss", "SmoothL1Loss", "HuberLoss", "BCEWithLogitsLoss"])
@parity
def test_losses_of_column_major_inputs(nn, optim, name, reduction):
    layer = nn.Linear(5, 8)
    target = torch.rand(8, 32)
    for each in (target, target.t().contiguous().t()):
        getattr(nn, name)(reduction=reduction)(layer(torch.randn(32, 5)).t(), each).backward()
    return layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [{}, {"weight"}, {"pos_weight"}, {"weight", "pos_weight"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@parity
def test_logits_and_targets_of_different_dtypes(nn, optim, dtype, weights, reduction):
    """Float64 targets, as labels from NumPy are, with logits of another dtype."""
    net, seen = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 40)).to(dtype), []
    options = {name: torch.rand(40).to(dtype) for name in sorted(weights)}
    for target in (torch.float64, torch.float32, torch.bfloat16):
        for _ in range(3):
            net.zero_grad()
            x = torch.randn(32, 5).to(dtype)
            loss = nn.BCEWithLogitsLoss(reduction=reduction, **options)
            loss(net(x), torch.rand(32, 40).to(target)).backward()
            nn.SoftMarginLoss(reduction=reduction)(
                net(x), torch.randn(32, 40).sign().to(target)
            ).backward()
            seen.append([p.grad.clone() for p in net.parameters()])
    return seen


@pytest.mark.parametrize("row", [[math.inf, 0.0, 1.0], [math.inf] * 3, [-math.inf] * 3])
@pytest.mark.parametrize("tracked", [False, True])
@parity
def test_sign_of_nan(nn, optim, row, tracked):
    """The NaN gradient of infinite logits has the same sign bit, which some tools print."""
    p = nn.Parameter(torch.tensor([row]))
    loss = nn.CrossEntropyLoss()(p * 1 if tracked else p, torch.tensor([1]))
    loss.backward()
    return loss.detach().signbit(), p.grad.signbit()
