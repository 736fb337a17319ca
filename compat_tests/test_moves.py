"""Moves half-way through training: a user who moves a model, or loads its optimiser's state on
another device or in another dtype, would continue with state of the wrong device or dtype."""

import copy

import pytest
import torch

from .parity import parity

OPTIMISERS = {
    "SGD": lambda optim, ps: optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "SGD plain": lambda optim, ps: optim.SGD(ps, lr=0.1),
    "Adam": lambda optim, ps: optim.Adam(ps, lr=0.1, amsgrad=True),
    "Adam fused": lambda optim, ps: optim.Adam(ps, lr=0.1, fused=True),
    "Adam foreach": lambda optim, ps: optim.Adam(ps, lr=0.1, foreach=True),
    "AdamW": lambda optim, ps: optim.AdamW(ps, lr=0.1),
    "RMSprop": lambda optim, ps: optim.RMSprop(ps, lr=0.1, momentum=0.9, centered=True),
    "Adagrad": lambda optim, ps: optim.Adagrad(ps, lr=0.1),
    "Adagrad fused": lambda optim, ps: optim.Adagrad(ps, lr=0.1, fused=True),
}
DTYPES = [torch.float64, torch.bfloat16, torch.float16]


def net(nn, **like):
    return nn.Sequential(nn.Linear(3, 8, **like), nn.Tanh(), nn.Linear(8, 2, **like))


def go_on(nn, model, optimizer, x, t, steps=2):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def kinds(optimizer):
    """The dtype, device and shape of each state tensor, which a move may change."""
    return [
        [(k, v.dtype, v.device, v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)]
        for state in optimizer.state.values()
    ]


def everything(model, optimizer):
    return copy.deepcopy(dict(model.named_parameters())), optimizer.state_dict()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMISERS)
@parity
def test_a_model_cast_while_it_trains(nn, optim, name, dtype):
    """The parameters stay the same objects, and the optimiser's state keeps its old dtype: some
    optimisers continue with two dtypes, some raise."""
    model, x, t = net(nn), torch.randn(5, 3), torch.randn(5, 2)
    optimizer = OPTIMISERS[name](optim, model.parameters())
    log, ids = [go_on(nn, model, optimizer, x, t)], [id(p) for p in model.parameters()]
    log.append(model.to(dtype) is model)
    log.append([id(p) for p in model.parameters()] == ids)
    log.append([(p.grad.dtype, p.is_leaf, p.requires_grad) for p in model.parameters()])
    log.append(kinds(optimizer))
    try:
        log.append(go_on(nn, model, optimizer, x.to(dtype), t.to(dtype)))
    except RuntimeError as e:
        return log, str(e).splitlines()[0]
    return log, everything(model, optimizer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMISERS)
@parity
def test_state_loaded_beside_parameters_of_another_dtype(nn, optim, name, dtype):
    """load_state_dict casts state to the dtype of its parameter, except the step counter."""
    model, x, t = net(nn), torch.randn(5, 3), torch.randn(5, 2)
    optimizer = OPTIMISERS[name](optim, model.parameters())
    go_on(nn, model, optimizer, x, t)
    saved = copy.deepcopy(optimizer.state_dict())
    model.to(dtype)
    optimizer.load_state_dict(saved)
    log = [kinds(optimizer), go_on(nn, model, optimizer, x.to(dtype), t.to(dtype))]
    log.append(copy.deepcopy(everything(model, optimizer)))
    other = net(nn, dtype=torch.float64)  # and back to a wider dtype
    other.load_state_dict(model.state_dict())
    optimizer = OPTIMISERS[name](optim, other.parameters())
    optimizer.load_state_dict(log[-1][1])
    log += [kinds(optimizer), go_on(nn, other, optimizer, x.double(), t.double())]
    return log, everything(other, optimizer), saved


@pytest.mark.parametrize("name", OPTIMISERS)
@parity
def test_training_goes_on_elsewhere(nn, optim, name):
    """A model and its saved optimiser state move from the CPU to the test's device and back."""
    here = torch.empty(0).device
    model = net(nn, device="cpu")
    x, t = torch.randn(5, 3, device="cpu"), torch.randn(5, 2, device="cpu")
    optimizer = OPTIMISERS[name](optim, model.parameters())
    log = [go_on(nn, model, optimizer, x, t)]
    for place in (here, torch.device("cpu")):
        saved = copy.deepcopy(optimizer.state_dict())
        model.to(place)
        log.append([(p.device, p.grad.device) for p in model.parameters()])
        log.append(kinds(optimizer))  # the state has not moved with the model
        optimizer.load_state_dict(saved)
        log.append(kinds(optimizer))
        log.append(go_on(nn, model, optimizer, x.to(place), t.to(place)))
        log.append(copy.deepcopy(everything(model, optimizer)))
    return log


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad"])
@parity
def test_state_on_a_device_without_memory(nn, optim, name, options):
    """Onto which device each state is loaded, seen on the meta device (no GPU needed)."""
    try:
        optimizer = getattr(optim, name)(net(nn, device="cpu").parameters(), **options)
    except TypeError as e:  # not all optimisers have both options
        return str(e).split(".")[-1]
    for group in optimizer.param_groups:
        group["capturable"] = group["fused"] = None  # neither runs on the CPU for all of them
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    saved, far = optimizer.state_dict(), net(nn, device="meta")
    for group in saved["param_groups"]:
        group.update(options)
    optimizer = getattr(optim, name)(far.parameters(), **options)
    optimizer.load_state_dict(saved)
    moved = kinds(optimizer)
    optimizer = getattr(optim, name)(net(nn, device="cpu").double().parameters(), **options)
    optimizer.load_state_dict(saved)
    return moved, kinds(optimizer), optimizer.state_dict()


@pytest.mark.parametrize("name", OPTIMISERS)
@parity
def test_another_default_device(nn, optim, name):
    """The default device does not affect tensors that backward or a step makes internally."""
    like = {"device": torch.empty(0).device}
    model, x = net(nn, **like), torch.randn(5, 3, **like)
    model.extend([nn.Softmax(1), nn.SiLU(), nn.ELU(), nn.CELU(0.3), nn.BatchNorm1d(2, **like)])
    t = torch.randn(5, 2, **like)
    if name.startswith(("RMSprop", "Adagrad")):  # they create their step counter here
        optimizer = OPTIMISERS[name](optim, model.parameters())
        go_on(nn, model, optimizer, x, t)
    with torch.device("meta"):
        if not name.startswith(("RMSprop", "Adagrad")):
            optimizer = OPTIMISERS[name](optim, model.parameters())
        losses = go_on(nn, model, optimizer, x, t, steps=3)
        y = (x + 2).abs() ** x.abs()
        y = y.logit(0.2) + torch.var_mean(y, 0)[0] + y.std(0) + y.xlogy(y)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return losses, y, norm, everything(model, optimizer)


@parity
def test_a_default_device_for_a_new_model(nn, optim):
    with torch.device("meta"):
        model = net(nn)
        optimizer = optim.Adam(model.parameters())
        model(torch.ones(2, 3)).sum().backward()
        shapes = [(p.shape, p.device, p.grad.device) for p in model.parameters()]
    return shapes, kinds(optimizer), repr(model)
