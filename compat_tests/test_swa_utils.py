"""`optim.swa_utils`: averages of weights, which are what is evaluated and deployed."""

import copy

import pytest
import torch

import nnmirror

from .parity import parity


def swa_of(optim):
    return torch.optim.swa_utils if optim is torch.optim else nnmirror.optim.swa_utils


def net(nn):
    return nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def trained(nn, optim, model, average, steps=5):
    """Steps of SGD, each of which goes into the average."""
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.randn(6, 3)), torch.randn(6, 2)).backward()
        optimizer.step()
        average.update_parameters(model)
    return average


KINDS = {
    "mean": lambda swa: {},
    "mean of buffers too": lambda swa: {"use_buffers": True},
    "ema": lambda swa: {"multi_avg_fn": swa.get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "ema, buffers copied": lambda swa: {"multi_avg_fn": swa.get_ema_multi_avg_fn()},
    "mean of many": lambda swa: {"multi_avg_fn": swa.get_swa_multi_avg_fn(), "use_buffers": True},
    "ema one by one": lambda swa: {"avg_fn": swa.get_ema_avg_fn(0.8)},
    "mean one by one": lambda swa: {"avg_fn": swa.get_swa_avg_fn(), "use_buffers": True},
    "of one's own": lambda swa: {"avg_fn": lambda a, w, n: torch.maximum(a, w) / (n + 1)},
    "on a device": lambda swa: {"device": "cpu"},
}


@pytest.mark.parametrize("kind", KINDS)
@parity
def test_averages(nn, optim, kind):
    model, swa = net(nn), swa_of(optim)
    average = trained(nn, optim, model, swa.AveragedModel(model, **KINDS[kind](swa)))
    average.eval()
    with torch.no_grad():
        out = average(torch.randn(4, 3))
    keys = [*average.state_dict()], [name for name, _ in average.named_parameters()]
    return out, dict(average.state_dict()), keys, dict(model.state_dict())


@parity
def test_parameters_of_two_dtypes(nn, optim):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double())
    swa = swa_of(optim)
    average = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update_parameters(model)
    return dict(average.state_dict())


@parity
def test_the_average_goes_on_training_and_is_saved(nn, optim):
    model, swa = net(nn), swa_of(optim)
    average = trained(nn, optim, model, swa.AveragedModel(model))
    again = swa.AveragedModel(net(nn))
    again.load_state_dict(average.state_dict())
    again = copy.deepcopy(again)
    trained(nn, optim, again, swa.AveragedModel(again), steps=2)
    average.update_parameters(again.module)
    return dict(again.state_dict()), dict(average.state_dict())


@parity
def test_update_bn(nn, optim):
    swa = swa_of(optim)
    model = net(nn)
    model.eval()
    model[1].momentum = 0.3
    found = []
    for batches in (
        [torch.randn(6, 3) for _ in range(3)],
        [(torch.randn(6, 3), torch.zeros(6)), [torch.randn(4, 3)]],
    ):
        swa.update_bn(batches, model, device=torch.device("cpu"))
        found.append(copy.deepcopy(model.state_dict()))
    swa.update_bn(None, nn.Linear(2, 2))  # without batch norm it looks at no batch
    return found, model.training, model[1].momentum


WRONG = {
    "both": lambda swa, model: swa.AveragedModel(model, avg_fn=max, multi_avg_fn=max),
    "decay": lambda swa, model: swa.get_ema_avg_fn(1.5),
    "decay of many": lambda swa, model: swa.get_ema_multi_avg_fn(-0.1),
    "other shapes": lambda swa, model: swa.AveragedModel(model).update_parameters(model[:2]),
}


@pytest.mark.parametrize("case", WRONG)
@parity
def test_wrong_use(nn, optim, case):
    WRONG[case](swa_of(optim), net(nn))


@parity
def test_an_average_with_a_parameter_of_its_own(nn, optim):
    class Scaled(swa_of(optim).AveragedModel):
        def __init__(self, model):
            super().__init__(model)
            self.scale = nn.Parameter(torch.ones(1))

    Scaled(net(nn)).update_parameters(nn.Linear(2, 2))


@parity
def test_integers_are_averaged_too(nn, optim):
    swa = swa_of(optim)
    average, weight = torch.tensor([4, 8]), torch.tensor([8, 9])
    swa.get_ema_multi_avg_fn(0.25)([average], [weight], 1)
    return average
