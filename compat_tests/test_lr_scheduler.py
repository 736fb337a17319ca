"""Learning rates over time: a user would train at another rate than with PyTorch."""

import copy
import io
import pickle

import pytest
import torch

import nnmirror

from .parity import parity


def optimizer(nn, optim, groups=1, **options):
    params = [nn.Parameter(torch.ones(2)) for _ in range(groups)]
    options = {"lr": 0.1, "momentum": 0.9, **options}
    return optim.SGD([{"params": [p], "lr": options["lr"] * (i + 1)} for i, p in enumerate(params)], **options)  # fmt: skip


def halved(t):
    return 0.5**t


class Power:
    """A function with a state of its own."""

    def __init__(self, base):
        self.base = base

    def __call__(self, t):
        return self.base**t


SCHEDULERS = {
    "StepLR": lambda s, o: s.StepLR(o, 3, 0.7),
    "MultiStepLR": lambda s, o: s.MultiStepLR(o, [2, 5, 5, 11], 0.3),
    "ExponentialLR": lambda s, o: s.ExponentialLR(o, 0.93),
    "LambdaLR": lambda s, o: s.LambdaLR(o, lambda t: 0.95**t),
    "LambdaLR function": lambda s, o: s.LambdaLR(o, [halved] * len(o.param_groups)),
    "LambdaLR object": lambda s, o: s.LambdaLR(o, Power(0.9)),
    "MultiplicativeLR": lambda s, o: s.MultiplicativeLR(o, lambda t: 1 - 1 / (t + 7)),
    "ConstantLR": lambda s, o: s.ConstantLR(o),
    "ConstantLR 0.2 9": lambda s, o: s.ConstantLR(o, 0.2, 9),
    "LinearLR": lambda s, o: s.LinearLR(o),
    "LinearLR 0.1 0.7 17": lambda s, o: s.LinearLR(o, 0.1, 0.7, 17),
    "PolynomialLR": lambda s, o: s.PolynomialLR(o),
    "PolynomialLR 23 2.5": lambda s, o: s.PolynomialLR(o, 23, 2.5),
    "CosineAnnealingLR": lambda s, o: s.CosineAnnealingLR(o, 13),
    "CosineAnnealingLR 7 0.01": lambda s, o: s.CosineAnnealingLR(o, 7, 0.01),
    "CosineAnnealingWarmRestarts": lambda s, o: s.CosineAnnealingWarmRestarts(o, 5),
    "CosineAnnealingWarmRestarts 3 2": lambda s, o: s.CosineAnnealingWarmRestarts(o, 3, 2, 0.001),
    "OneCycleLR": lambda s, o: s.OneCycleLR(o, 0.4, 60),
    "OneCycleLR linear": lambda s, o: s.OneCycleLR(
        o, [0.4] * len(o.param_groups), epochs=6, steps_per_epoch=10, anneal_strategy="linear",
        pct_start=0.4, base_momentum=0.7, div_factor=10.0),
    "OneCycleLR three": lambda s, o: s.OneCycleLR(o, 0.4, 60, three_phase=True, cycle_momentum=False),
    "CyclicLR": lambda s, o: s.CyclicLR(o, 0.01, 0.3, 7),
    "CyclicLR triangular2": lambda s, o: s.CyclicLR(o, 0.01, 0.3, 7, 4, mode="triangular2"),
    "CyclicLR exp_range": lambda s, o: s.CyclicLR(o, 0.01, 0.3, 7, mode="exp_range", gamma=0.97),
    "CyclicLR scale_fn": lambda s, o: s.CyclicLR(
        o, [0.01] * len(o.param_groups), 0.3, 7, scale_fn=Power(0.9), cycle_momentum=False),
    "SequentialLR": lambda s, o: s.SequentialLR(
        o, [s.ConstantLR(o, 0.1, 5), s.ExponentialLR(o, 0.9), s.CosineAnnealingLR(o, 10)], [4, 12]),
    "SequentialLR nested": lambda s, o: s.SequentialLR(
        o, [s.SequentialLR(o, [s.StepLR(o, 2), s.ConstantLR(o, 0.5, 3)], [5]),
            s.LinearLR(o, 0.1, total_iters=3)], [9]),
    "ChainedScheduler": lambda s, o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 4), s.ExponentialLR(o, 0.9)], o),
}  # fmt: skip
SIMPLE = [n for n in SCHEDULERS if not n.startswith(("Sequential", "Chained"))]


def shown(group):
    return {k: v for k, v in group.items() if k != "params"}


def followed(opt, scheduler, steps=50):
    """The rates, and the momentum, that each step gives."""
    rates = []
    for _ in range(steps):
        opt.step()
        scheduler.step()
        rates.append((scheduler.get_last_lr(), [shown(g) for g in opt.param_groups]))
    return rates


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", SCHEDULERS)
@parity
def test_rates(nn, optim, name, groups):
    opt = optimizer(nn, optim, groups)
    scheduler = SCHEDULERS[name](optim.lr_scheduler, opt)
    first = [shown(g) for g in opt.param_groups]
    return first, followed(opt, scheduler), shown_state(scheduler)


def shown_state(scheduler):
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value if isinstance(value, int | float | list | tuple | str | torch.Tensor) else str(type(value))  # fmt: skip

    return plain(scheduler.state_dict())


@pytest.mark.parametrize("name", SIMPLE)
@parity
def test_rate_that_is_a_tensor(nn, optim, name):
    opt = optimizer(nn, optim, lr=torch.tensor(0.1))
    held = opt.param_groups[0]["lr"]
    scheduler = SCHEDULERS[name](optim.lr_scheduler, opt)
    return followed(opt, scheduler, 20), held, held is opt.param_groups[0]["lr"]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("way", ["torch to mirror", "mirror to torch"])
def test_state_dict_goes_both_ways(name, way):
    """Training begun with one library goes on with the other."""
    ours, theirs = (nnmirror, nnmirror.optim), (torch.nn, torch.optim)
    one, two = (theirs, ours) if way == "torch to mirror" else (ours, theirs)

    def made(backend):
        opt = optimizer(*backend)
        return opt, SCHEDULERS[name](backend[1].lr_scheduler, opt)

    opt, scheduler = made(one)
    followed(opt, scheduler, 7)
    saved = copy.deepcopy((opt.state_dict(), scheduler.state_dict()))
    go_on, later = made(two)
    go_on.load_state_dict(saved[0])
    later.load_state_dict(saved[1])
    assert followed(go_on, later, 20) == followed(opt, scheduler, 20)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if "Lambda" not in n and "Multiplic" not in n])  # fmt: skip
@parity
def test_state_dict_can_be_saved(nn, optim, name):
    opt = optimizer(nn, optim)
    scheduler = SCHEDULERS[name](optim.lr_scheduler, opt)
    followed(opt, scheduler, 3)
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    buffer.seek(0)
    return sorted(torch.load(buffer, weights_only=False))


@pytest.mark.parametrize("name", SIMPLE)
@parity
def test_resumed_with_last_epoch(nn, optim, name):
    opt = optimizer(nn, optim)
    followed(opt, SCHEDULERS[name](optim.lr_scheduler, opt), 6)
    again = optimizer(nn, optim)
    again.load_state_dict(opt.state_dict())
    s = optim.lr_scheduler
    made = {
        "StepLR": lambda: s.StepLR(again, 3, 0.7, last_epoch=6),
        "ExponentialLR": lambda: s.ExponentialLR(again, 0.93, last_epoch=6),
        "CosineAnnealingLR": lambda: s.CosineAnnealingLR(again, 13, last_epoch=6),
        "OneCycleLR": lambda: s.OneCycleLR(again, 0.4, 60, last_epoch=6),
        "CyclicLR": lambda: s.CyclicLR(again, 0.01, 0.3, 7, last_epoch=6),
        "PolynomialLR": lambda: s.PolynomialLR(again, last_epoch=6),
        "LinearLR": lambda: s.LinearLR(again, last_epoch=6),
    }.get(name)
    return made and followed(again, made(), 10)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("cooldown", [0, 2])
@parity
def test_plateau(nn, optim, mode, threshold_mode, cooldown):
    opt = optimizer(nn, optim, 2)
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(
        opt, mode, 0.5, 2, 1e-2, threshold_mode, cooldown, [0.01, 0.02]
    )
    metrics = torch.cat([torch.linspace(1, 0.5, 5), torch.full((20,), 0.5), torch.rand(25)])
    rates = []
    for metric in metrics:
        scheduler.step(metric)
        rates.append((scheduler.get_last_lr(), scheduler.num_bad_epochs, scheduler.in_cooldown))
    return rates, scheduler.state_dict()


@pytest.mark.parametrize("name", SIMPLE)
@parity
def test_deprecated_epoch(nn, optim, name):
    opt = optimizer(nn, optim)
    scheduler = SCHEDULERS[name](optim.lr_scheduler, opt)
    rates = []
    for epoch in (3, 10, 4, 0):
        opt.step()
        scheduler.step(epoch)
        rates.append(scheduler.get_last_lr())
    return rates


@parity
def test_fraction_of_an_epoch(nn, optim):
    opt = optimizer(nn, optim)
    scheduler = optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 2, 2)
    rates = []
    for i in range(40):
        scheduler.step(i / 4)
        rates.append((scheduler.get_last_lr(), scheduler.T_cur, scheduler.T_i))
    return rates


@parity
def test_a_net_under_a_schedule(nn, optim):
    net = nn.Sequential(nn.Linear(2, 25), nn.ReLU(), nn.Linear(25, 1))
    opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=30)
    x, t = torch.randn(8, 2), torch.randn(8, 1)
    for _ in range(30):
        opt.zero_grad()
        nn.MSELoss()(net(x), t).backward()
        opt.step()
        scheduler.step()
    return dict(net.named_parameters()), opt.state_dict()["param_groups"]


@parity
def test_a_scheduler_of_ones_own(nn, optim):
    class Sawtooth(optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            return [base * (1 - self.last_epoch % 4 / 4) for base in self.base_lrs]

    opt = optimizer(nn, optim, 2)
    return followed(opt, Sawtooth(opt), 9)


@parity
def test_warnings(nn, optim):
    """Of the wrong order, of a step overridden, of get_lr called for the present rate."""
    s = optim.lr_scheduler
    opt = optimizer(nn, optim)
    scheduler = s.StepLR(opt, 2)
    scheduler.step()
    scheduler.step()
    scheduler.get_lr()
    replaced = optimizer(nn, optim)
    scheduler = s.StepLR(replaced, 2)
    replaced.step = lambda: None
    scheduler.step()


def bare(optim, s, opt):
    s.LRScheduler(opt)


ERRORS = {
    "no optimizer": lambda nn, optim, s, o: s.StepLR(3, 2),
    "no optimizer, cycle": lambda nn, optim, s, o: s.OneCycleLR(3, 2, 5),
    "no optimizer, plateau": lambda nn, optim, s, o: s.ReduceLROnPlateau("sgd"),
    "not resumed": lambda nn, optim, s, o: s.StepLR(o, 2, last_epoch=3),
    "base": lambda nn, optim, s, o: bare(optim, s, o),
    "lambdas": lambda nn, optim, s, o: s.LambdaLR(o, [halved, halved]),
    "not callable": lambda nn, optim, s, o: s.MultiplicativeLR(o, 0.5),
    "constant factor": lambda nn, optim, s, o: s.ConstantLR(o, 2.0),
    "linear start": lambda nn, optim, s, o: s.LinearLR(o, 0.0),
    "linear end": lambda nn, optim, s, o: s.LinearLR(o, 0.5, 2.0),
    "restarts T_0": lambda nn, optim, s, o: s.CosineAnnealingWarmRestarts(o, 0),
    "restarts T_mult": lambda nn, optim, s, o: s.CosineAnnealingWarmRestarts(o, 2, 1.5),
    "restarts eta": lambda nn, optim, s, o: s.CosineAnnealingWarmRestarts(o, 2, 1, "0"),
    "restarts epoch": lambda nn, optim, s, o: s.CosineAnnealingWarmRestarts(o, 2).step(-1),
    "cycle steps": lambda nn, optim, s, o: s.OneCycleLR(o, 0.1, 0),
    "cycle no steps": lambda nn, optim, s, o: s.OneCycleLR(o, 0.1),
    "cycle epochs": lambda nn, optim, s, o: s.OneCycleLR(o, 0.1, epochs=1.5, steps_per_epoch=2),
    "cycle steps per epoch": lambda nn, optim, s, o: s.OneCycleLR(o, 0.1, epochs=1, steps_per_epoch=-2),
    "cycle pct": lambda nn, optim, s, o: s.OneCycleLR(o, 0.1, 10, pct_start=2),
    "cycle strategy": lambda nn, optim, s, o: s.OneCycleLR(o, 0.1, 10, anneal_strategy="sin"),
    "cycle groups": lambda nn, optim, s, o: s.OneCycleLR(o, [0.1, 0.2], 10),
    "cycle over": lambda nn, optim, s, o: followed(o, s.OneCycleLR(o, 0.1, 5), 7),
    "cyclic mode": lambda nn, optim, s, o: s.CyclicLR(o, 0.1, 0.2, mode="square"),
    "sequence empty": lambda nn, optim, s, o: s.SequentialLR(o, [], []),
    "sequence milestones": lambda nn, optim, s, o: s.SequentialLR(o, [s.StepLR(o, 2)], [3]),
    "sequence of plateau": lambda nn, optim, s, o: s.SequentialLR(o, [s.ReduceLROnPlateau(o)], []),
    "sequence of others": lambda nn, optim, s, o: s.SequentialLR(o, [3], []),
    "sequence of two": lambda nn, optim, s, o: s.SequentialLR(
        o, [s.StepLR(optimizer(nn, optim), 2)], []),
    "chain empty": lambda nn, optim, s, o: s.ChainedScheduler([]),
    "chain of plateau": lambda nn, optim, s, o: s.ChainedScheduler([s.ReduceLROnPlateau(o)]),
    "plateau factor": lambda nn, optim, s, o: s.ReduceLROnPlateau(o, factor=1.0),
    "plateau mode": lambda nn, optim, s, o: s.ReduceLROnPlateau(o, "best"),
    "plateau threshold": lambda nn, optim, s, o: s.ReduceLROnPlateau(o, threshold_mode="both"),
    "plateau min_lr": lambda nn, optim, s, o: s.ReduceLROnPlateau(o, min_lr=[1, 2]),
    "plateau metric": lambda nn, optim, s, o: s.ReduceLROnPlateau(o).step("low"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_bad_input(nn, optim, name):
    """A user reads PyTorch's exception and message, not ours."""
    value = ERRORS[name](nn, optim, optim.lr_scheduler, optimizer(nn, optim))
    return value if isinstance(value, list) else None


def test_spellings_of_the_import():
    from nnmirror.nn import optim as _  # noqa: F401

    import nnmirror.optim.lr_scheduler as module
    from nnmirror import optim
    from nnmirror.optim import lr_scheduler
    from nnmirror.optim.lr_scheduler import StepLR

    assert module is lr_scheduler is optim.lr_scheduler
    assert StepLR is optim.lr_scheduler.StepLR
    with pytest.raises(AttributeError, match=r"SwaLR.*not mirrored"):
        lr_scheduler.SwaLR  # noqa: B018


def test_an_optimizer_is_not_kept_alive():
    """The note that `step` was called must not tie the optimiser to itself."""
    import gc
    import weakref

    opt = optimizer(nnmirror, nnmirror.optim)
    scheduler = nnmirror.optim.lr_scheduler.StepLR(opt, 2)
    seen = weakref.ref(opt)
    gc.disable()
    try:
        del opt, scheduler
        assert seen() is None
    finally:
        gc.enable()


def test_a_pickled_optimizer_goes_on():
    opt = optimizer(nnmirror, nnmirror.optim)
    nnmirror.optim.lr_scheduler.StepLR(opt, 2)
    again = pickle.loads(pickle.dumps(opt))
    again.step()
    assert again.param_groups[0]["initial_lr"] == 0.1


def test_a_mirrored_scheduler_takes_an_optimizer_of_pytorch():
    opt = optimizer(torch.nn, torch.optim)
    scheduler = nnmirror.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    opt.step()
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.05
