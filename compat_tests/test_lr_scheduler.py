"""Learning rate schedulers: the same rates to the last bit, and the same saved state."""

import copy
import gc
import io
import math
import pickle
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nnmirror

from .parity import both, parity, same, same_outcome

# A scheduler inside two others steps first and warns; other tests compare the warning.
NESTED = pytest.mark.filterwarnings("ignore:Detected call")
LIBRARIES = {"torch": (torch.nn, torch.optim), "nnmirror": (nnmirror, nnmirror.optim)}


class Decay:
    """A callable object: its attributes are saved in the scheduler's state_dict."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, epoch):
        return self.rate**epoch


# name: makes the scheduler, from the lr_scheduler module `s` and the optimiser `o`
FORMULAS = {
    "StepLR": lambda s, o, **k: s.StepLR(o, 7, **k),
    "StepLR every step": lambda s, o, **k: s.StepLR(o, 1, 0.93, **k),
    "MultiStepLR": lambda s, o, **k: s.MultiStepLR(o, [3, 8, 8, 30], gamma=0.3, **k),
    "MultiStepLR from 0": lambda s, o, **k: s.MultiStepLR(o, (0, 1, 5), **k),
    "MultiStepLR of none": lambda s, o, **k: s.MultiStepLR(o, [], **k),
    "ExponentialLR": lambda s, o, **k: s.ExponentialLR(o, 0.97, **k),
    "ExponentialLR up": lambda s, o, **k: s.ExponentialLR(o, gamma=1.1, **k),
    "LambdaLR": lambda s, o, **k: s.LambdaLR(o, lambda t: 0.95**t / (1 + t), **k),
    "LambdaLR object": lambda s, o, **k: s.LambdaLR(o, Decay(0.9), **k),
    "MultiplicativeLR": lambda s, o, **k: s.MultiplicativeLR(o, lambda t: 0.9 + 0.1 / t, **k),
    "MultiplicativeLR object": lambda s, o, **k: s.MultiplicativeLR(o, Decay(0.999), **k),
    "ConstantLR": lambda s, o, **k: s.ConstantLR(o, **k),
    "ConstantLR long": lambda s, o, **k: s.ConstantLR(o, 0.7, total_iters=20, **k),
    "ConstantLR none": lambda s, o, **k: s.ConstantLR(o, 0.7, total_iters=0, **k),
    "LinearLR": lambda s, o, **k: s.LinearLR(o, **k),
    "LinearLR down": lambda s, o, **k: s.LinearLR(o, 1.0, 0.1, 40, **k),
    "LinearLR to nothing": lambda s, o, **k: s.LinearLR(o, 0.3, 0, 9, **k),
    "PolynomialLR": lambda s, o, **k: s.PolynomialLR(o, **k),
    "PolynomialLR square": lambda s, o, **k: s.PolynomialLR(o, 33, power=2.0, **k),
    "PolynomialLR root": lambda s, o, **k: s.PolynomialLR(o, 50, 0.5, **k),
    "CosineAnnealingLR": lambda s, o, **k: s.CosineAnnealingLR(o, 50, **k),
    "CosineAnnealingLR past its end": lambda s, o, **k: s.CosineAnnealingLR(o, 7, 1e-3, **k),
    "CosineAnnealingLR of one": lambda s, o, **k: s.CosineAnnealingLR(o, 1, eta_min=1, **k),
    "WarmRestarts": lambda s, o, **k: s.CosineAnnealingWarmRestarts(o, 9, **k),
    "WarmRestarts longer": lambda s, o, **k: s.CosineAnnealingWarmRestarts(o, 3, 2, 1e-3, **k),
    "OneCycleLR": lambda s, o, **k: s.OneCycleLR(o, 0.4, total_steps=60, **k),
    "OneCycleLR linear": lambda s, o, **k: s.OneCycleLR(
        o, 0.4, epochs=6, steps_per_epoch=11, anneal_strategy="linear", pct_start=0.21, **k),
    "OneCycleLR three": lambda s, o, **k: s.OneCycleLR(
        o, 0.4, 64, three_phase=True, div_factor=7, final_div_factor=3, max_momentum=0.7, **k),
    "OneCycleLR late": lambda s, o, **k: s.OneCycleLR(
        o, 0.4, 64, pct_start=0.8, three_phase=True, cycle_momentum=False, **k),
    "CyclicLR": lambda s, o, **k: s.CyclicLR(o, 0.01, 0.1, 7, **k),
    "CyclicLR sawtooth": lambda s, o, **k: s.CyclicLR(
        o, 0.01, 0.1, 3, 11, mode="triangular2", base_momentum=0.1, **k),
    "CyclicLR exp": lambda s, o, **k: s.CyclicLR(
        o, 0.01, 0.1, 8, mode="exp_range", gamma=0.99, cycle_momentum=False, **k),
    "CyclicLR own": lambda s, o, **k: s.CyclicLR(
        o, 0.01, 0.1, 5, scale_fn=lambda c: 0.5 * (1 + math.sin(c)), **k),
    "CyclicLR object": lambda s, o, **k: s.CyclicLR(
        o, 0.01, 0.1, 5, scale_fn=Decay(0.98), scale_mode="iterations", **k),
}  # fmt: skip
OTHERS = {
    "Sequential": lambda s, o: s.SequentialLR(
        o, [s.LinearLR(o, 0.1, total_iters=5), s.CosineAnnealingLR(o, 40)], milestones=[5]),
    "Sequential of three": lambda s, o: s.SequentialLR(
        o,
        [s.ConstantLR(o, 0.1), s.ExponentialLR(o, 0.9), s.CosineAnnealingWarmRestarts(o, 4, 2)],
        [4, 17]),
    "Sequential from the second": lambda s, o: s.SequentialLR(
        o, [s.ConstantLR(o, 0.1), s.StepLR(o, 3)], [0]),
    "Sequential of Sequential": lambda s, o: s.SequentialLR(
        o,
        [s.SequentialLR(o, [s.ConstantLR(o), s.StepLR(o, 3, 0.5)], [3]), s.LambdaLR(o, Decay(0.9))],
        [13]),
    "Sequential of one": lambda s, o: s.SequentialLR(o, [s.PolynomialLR(o, 20)], []),
    "Sequential later": lambda s, o: s.SequentialLR(
        o, [s.ConstantLR(o), s.StepLR(o, 3, 0.5)], [6], last_epoch=2),
    "Chained": lambda s, o: s.ChainedScheduler(
        [s.ConstantLR(o, 0.1, 9), s.ExponentialLR(o, 0.9), s.StepLR(o, 4, 0.7)]),
    "Chained cosines": lambda s, o: s.ChainedScheduler(
        (s.CosineAnnealingLR(o, 20), s.MultiplicativeLR(o, lambda t: 0.99)), optimizer=o),
    "Chained Sequential": lambda s, o: s.ChainedScheduler([
        s.SequentialLR(o, [s.LinearLR(o), s.ExponentialLR(o, 0.9)], [6]), s.StepLR(o, 5)]),
    "Plateau": lambda s, o: s.ReduceLROnPlateau(o),
    "Plateau hasty": lambda s, o: s.ReduceLROnPlateau(o, "min", 0.5, 1, cooldown=3, min_lr=1e-3),
    "Plateau max": lambda s, o: s.ReduceLROnPlateau(o, "max", patience=2, threshold=0.1, eps=1e-3),
    "Plateau abs": lambda s, o: s.ReduceLROnPlateau(
        o, threshold_mode="abs", threshold=0.05, factor=0.9, patience=0),
    "Plateau max abs": lambda s, o: s.ReduceLROnPlateau(
        o, "max", threshold_mode="abs", threshold=0.3, patience=3),
    "SWALR": lambda s, o: swa(s).SWALR(o, 0.01),
    "SWALR linear": lambda s, o: swa(s).SWALR(o, 0.05, 7, "linear"),
    "SWALR at once": lambda s, o: swa(s).SWALR(o, 0.5, anneal_epochs=0),
    "SWALR after others": lambda s, o: s.SequentialLR(
        o, [s.ExponentialLR(o, 0.9), swa(s).SWALR(o, 0.02, anneal_epochs=4)], [5]),
}  # fmt: skip


def swa(schedulers):
    """The `swa_utils` module beside this `lr_scheduler` module."""
    return sys.modules[schedulers.__name__.replace("lr_scheduler", "swa_utils")]


SCHEDULES = {**FORMULAS, **OTHERS}

# Optimisers of one parameter group or two, with learning rates of several types.
OPTIMISERS = {
    "SGD": lambda optim, ps: optim.SGD(ps, lr=0.3, momentum=0.9),
    "SGD of groups": lambda optim, ps: optim.SGD(
        [{"params": ps[:1], "lr": 0.1}, {"params": ps[1:], "momentum": 0.5}], lr=0.7, momentum=0.9),
    "lr 1": lambda optim, ps: optim.SGD(ps, lr=1),
    "tensor lr": lambda optim, ps: optim.SGD(ps, lr=torch.tensor(0.3), momentum=0.9),
    "double lr": lambda optim, ps: optim.SGD(ps, lr=torch.tensor(0.3, dtype=torch.float64)),
    "lr of one element": lambda optim, ps: optim.SGD(
        [{"params": ps[:1], "lr": torch.tensor([0.1])}, {"params": ps[1:]}], lr=0.5),
}  # fmt: skip


def parameters(nn):
    return list(nn.Linear(2, 2).parameters())


def options(optimizer):
    """A copy of the groups' options with their types, without the parameters."""
    return [
        {k: (type(v).__name__, copy.deepcopy(v)) for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


def advance(schedule, i):
    if type(schedule).__name__ == "ReduceLROnPlateau":
        schedule.step(1 / (1 + i) + 0.3 * math.sin(i))
    else:
        schedule.step()


def go_on(optimizer, schedule, steps, start=0):
    """The groups' options and get_last_lr() after each of some steps."""
    log = [options(optimizer)]
    for i in range(start, start + steps):
        optimizer.step()
        advance(schedule, i)
        log.append((options(optimizer), copy.deepcopy(schedule.get_last_lr())))
    return log


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("name", SCHEDULES)
@parity
def test_rates(nn, optim, name, kind):
    optimizer = OPTIMISERS[kind](optim, parameters(nn))
    schedule = SCHEDULES[name](optim.lr_scheduler, optimizer)
    return go_on(optimizer, schedule, 60), schedule.state_dict()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("schedule", ["OneCycleLR", "OneCycleLR three", "CyclicLR", "CyclicLR own"])
def test_momentum_is_beta1_of_adam(schedule, name):
    """Cyclic schedulers set beta1 of torch.optim's Adam; without a momentum they raise an error."""

    def rates(nn, optim):
        optimizer = getattr(torch.optim, name)(parameters(nn), lr=0.1)
        return go_on(optimizer, SCHEDULES[schedule](optim.lr_scheduler, optimizer), 60)

    same_outcome(*both(rates))


@parity
def test_arguments_for_each_group(nn, optim):
    s, log = optim.lr_scheduler, []
    for make in (
        lambda o: s.LambdaLR(o, [lambda t: 0.9**t, Decay(0.8)]),
        lambda o: s.MultiplicativeLR(o, (lambda t: 0.9, Decay(0.8))),
        lambda o: s.OneCycleLR(o, [0.1, torch.tensor(0.3)], 20, base_momentum=[0.1, 0.2]),
        lambda o: s.CyclicLR(o, [0.1, 0.2], (0.3, torch.tensor(0.5)), 4, max_momentum=[0.9, 0.8]),
        lambda o: s.ReduceLROnPlateau(o, min_lr=[0.05, 0.6], patience=1),
    ):
        optimizer = OPTIMISERS["SGD of groups"](optim, parameters(nn))
        schedule = make(optimizer)
        log.append((go_on(optimizer, schedule, 20), schedule.state_dict()))
    return log


@pytest.mark.slow
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_rates_of_any_arguments(data):
    """Random arguments show rounding, which depends on the order of each formula's operations."""
    number = st.floats(1e-3, 1.0)
    count = st.integers(1, 30)
    a, b, lr = data.draw(number), data.draw(number), data.draw(number)
    n, m = data.draw(count), data.draw(count)
    name = data.draw(st.sampled_from(sorted(ANY)))
    given_epochs = data.draw(st.lists(st.integers(0, 60), max_size=5))

    def rates(nn, optim):
        optimizer = optim.SGD(parameters(nn), lr=lr, momentum=0.9)
        schedule = ANY[name](optim.lr_scheduler, optimizer, a, b, n, m)
        log = go_on(optimizer, schedule, 40)
        for epoch in given_epochs:
            schedule.step(epoch)
            log.append(schedule.get_last_lr())
            log.append(go_on(optimizer, schedule, 3))
        return log, schedule.state_dict()

    same_outcome(*both(rates))


ANY = {
    "StepLR": lambda s, o, a, b, n, m: s.StepLR(o, n, a),
    "MultiStepLR": lambda s, o, a, b, n, m: s.MultiStepLR(o, sorted([n, m]), a),
    "ExponentialLR": lambda s, o, a, b, n, m: s.ExponentialLR(o, a),
    "ConstantLR": lambda s, o, a, b, n, m: s.ConstantLR(o, a, n),
    "LinearLR": lambda s, o, a, b, n, m: s.LinearLR(o, a, b, n),
    "PolynomialLR": lambda s, o, a, b, n, m: s.PolynomialLR(o, n, a * 3),
    "CosineAnnealingLR": lambda s, o, a, b, n, m: s.CosineAnnealingLR(o, n, a),
    "WarmRestarts": lambda s, o, a, b, n, m: s.CosineAnnealingWarmRestarts(o, n, m, a),
    "OneCycleLR": lambda s, o, a, b, n, m: s.OneCycleLR(
        o, a, 120, pct_start=b, three_phase=n % 2 == 0, anneal_strategy=["cos", "linear"][m % 2]),
    "CyclicLR": lambda s, o, a, b, n, m: s.CyclicLR(
        o, a, b, n, m, ["triangular", "triangular2", "exp_range"][n % 3], gamma=b, max_momentum=a),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
@parity
def test_a_given_epoch(nn, optim, name):
    """`step(epoch)`, deprecated, sets the rate of that epoch and warns."""
    optimizer = OPTIMISERS["SGD of groups"](optim, parameters(nn))
    schedule = FORMULAS[name](optim.lr_scheduler, optimizer)
    log = []
    for epoch in (0, 1, 2, 3, None, 20, None, 5, 7, 7, 55, None):
        optimizer.step()
        schedule.step(epoch)
        log.append((options(optimizer), schedule.last_epoch))
    schedule.step(-1)
    return log, options(optimizer)


@parity
def test_an_epoch_and_a_fraction_of_it(nn, optim):
    log = []
    for mult in (1, 2, 3):
        optimizer = optim.SGD(parameters(nn), lr=0.1)
        schedule = optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4, mult)
        for i in range(70):
            schedule.step(i / 3)
            log.append((schedule.get_last_lr(), schedule.T_cur, schedule.T_i, schedule.last_epoch))
        log.append(go_on(optimizer, schedule, 9))
    return log


@parity
def test_plateau_with_an_epoch_and_odd_metrics(nn, optim):
    optimizer = OPTIMISERS["SGD of groups"](optim, parameters(nn))
    schedule = optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, cooldown=2)
    log = []
    for metric in (1, torch.tensor(0.9), float("nan"), math.inf, torch.ones(1), 0.9, 0.9, 2, -1):
        schedule.step(metric)
        log.append((schedule.get_last_lr(), schedule.best, schedule.in_cooldown))
    schedule.step(3.0, epoch=40)
    schedule.step(3.0, 20)
    return log, schedule.state_dict()


@pytest.mark.parametrize("eps", [0.24, 0.25, 0.26])
@parity
def test_plateau_makes_no_small_reduction(nn, optim, eps):
    optimizer = optim.SGD(parameters(nn), lr=0.5)
    schedule = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, eps=eps)
    schedule.step(1.0)
    schedule.step(1.0)
    return schedule.get_last_lr()


# -- resuming a run ------------------------------------------------------------------------------


def saved(*objects):
    """The objects' state_dicts, saved and loaded again."""
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@NESTED
@pytest.mark.parametrize("way", ["torch to nnmirror", "nnmirror to torch", "nnmirror to nnmirror"])
@pytest.mark.parametrize("kind", ["SGD", "tensor lr"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_training_resumed_in_the_other_library(name, kind, way):
    (first_nn, first), (second_nn, second) = (LIBRARIES[lib] for lib in way.split(" to "))
    optimizer = OPTIMISERS[kind](torch.optim, parameters(torch.nn))
    schedule = SCHEDULES[name](torch.optim.lr_scheduler, optimizer)
    go_on(optimizer, schedule, 23)
    whole = go_on(optimizer, schedule, 30, start=23)

    optimizer = OPTIMISERS[kind](first, parameters(first_nn))
    schedule = SCHEDULES[name](first.lr_scheduler, optimizer)
    go_on(optimizer, schedule, 23)
    of_optimizer, of_schedule = saved(optimizer, schedule)
    optimizer = OPTIMISERS[kind](second, parameters(second_nn))
    schedule = SCHEDULES[name](second.lr_scheduler, optimizer)
    optimizer.load_state_dict(of_optimizer)
    schedule.load_state_dict(of_schedule)
    same(whole, go_on(optimizer, schedule, 30, start=23), name)


@pytest.mark.parametrize("name", FORMULAS)
@parity
def test_resume_by_last_epoch(nn, optim, name):
    """`last_epoch` resumes from a loaded optimiser, whose groups hold initial_lr and the like."""
    ps = parameters(nn)
    optimizer = OPTIMISERS["SGD of groups"](optim, ps)
    schedule = FORMULAS[name](optim.lr_scheduler, optimizer)
    go_on(optimizer, schedule, 11)
    again = optim.SGD([{"params": ps[:1]}, {"params": ps[1:]}], lr=9.0)
    again.load_state_dict(optimizer.state_dict())
    schedule = FORMULAS[name](optim.lr_scheduler, again, last_epoch=10)
    return go_on(again, schedule, 20), schedule.state_dict()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("name", [n for n in SCHEDULES if "own" not in n])
@parity
def test_copies(nn, optim, name, copied):
    """A deep copy or an unpickled scheduler steps independently, with its own optimiser."""
    optimizer = OPTIMISERS["SGD"](optim, parameters(nn))
    schedule = SCHEDULES[name](optim.lr_scheduler, optimizer)
    go_on(optimizer, schedule, 5)
    twin = copied(schedule)
    log = go_on(twin.optimizer, twin, 9, start=5)
    return log, go_on(optimizer, schedule, 9, start=5), twin.state_dict()


@parity
def test_what_a_state_dict_holds(nn, optim):
    optimizer = optim.SGD(parameters(nn), lr=0.1)
    log = []
    for make in SCHEDULES.values():
        state = make(optim.lr_scheduler, optimizer).state_dict()
        state["note"] = "kept"
        log.append((pickle.loads(pickle.dumps(state)), "optimizer" in state))
        other = make(optim.lr_scheduler, optimizer)
        other.load_state_dict(state)
        log.append((sorted(state), other.note, sorted(other.state_dict().items(), key=str)))
    return log


@parity
def test_a_part_of_a_state_dict(nn, optim):
    """A state_dict written by hand with some of the attributes is loaded as in PyTorch."""
    s, log = optim.lr_scheduler, []
    for name, state in (
        ("CyclicLR", {"_scale_fn_custom": None, "mode": "exp_range", "last_epoch": 9}),
        ("CyclicLR object", {"_scale_fn_custom": {"rate": 0.5}, "max_lrs": [3.0]}),
        ("CosineAnnealingLR", {"_step_count": 0, "last_epoch": 4}),
        ("MultiStepLR", {"milestones": {12: 1}, "last_epoch": 10}),
        ("ExponentialLR", {"gamma": 2, "_last_lr": ["?"]}),
        ("LambdaLR object", {"lr_lambdas": [{"rate": 0.5}]}),
    ):
        optimizer = OPTIMISERS["SGD"](optim, parameters(nn))
        schedule = SCHEDULES[name](s, optimizer)
        schedule.load_state_dict(state)
        log.append((schedule.get_last_lr(), state, go_on(optimizer, schedule, 9)))
        log.append(schedule.state_dict())
    return log


# -- effects on the optimiser --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StepLR every step", "OneCycleLR", "Sequential", "Plateau hasty"])
@pytest.mark.parametrize("kind", OPTIMISERS)
@parity
def test_training_under_a_schedule(nn, optim, kind, name):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = OPTIMISERS[kind](optim, list(net.parameters()))
    schedule = SCHEDULES[name](optim.lr_scheduler, optimizer)
    x, t, losses = torch.randn(16, 3), torch.randn(16, 2), []
    for _ in range(50):
        optimizer.zero_grad()
        loss = nn.MSELoss()(net(x), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        schedule.step(*[loss] * (name == "Plateau hasty"))
    return losses, dict(net.named_parameters()), optimizer.state_dict(), repr(optimizer)


@parity
def test_a_tensor_stays_the_same_tensor(nn, optim):
    lr = torch.tensor(0.5)
    optimizer = optim.SGD(parameters(nn), lr=lr)
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    last = schedule.get_last_lr()
    optimizer.step()
    schedule.step()
    group = optimizer.param_groups[0]
    schedule.get_last_lr()[0].zero_()  # a copy
    group["initial_lr"].mul_(3)  # a copy too
    return group["lr"] is lr, lr, last, schedule.base_lrs, schedule.get_last_lr()


@parity
def test_tensors_given_to_a_schedule_are_copied(nn, optim):
    """Each group gets its own copy, and the user's tensors are not changed."""
    s, log = optim.lr_scheduler, []
    for make in (
        lambda o, low, high: s.CyclicLR(o, low, high, 3, max_momentum=high),
        lambda o, low, high: s.OneCycleLR(o, high, 20, base_momentum=low),
    ):
        for kind in ("SGD of groups", "tensor lr"):
            optimizer = OPTIMISERS[kind](optim, parameters(nn))
            low, high = torch.tensor(0.1), torch.tensor(0.7)
            schedule = make(optimizer, low, high)
            log.append(go_on(optimizer, schedule, 5))
            high.fill_(100.0)
            log.append((go_on(optimizer, schedule, 9), low, high))
    return log


@pytest.mark.parametrize("name", SCHEDULES)
@parity
def test_a_group_added_later(nn, optim, name):
    optimizer = OPTIMISERS["SGD"](optim, parameters(nn))
    schedule = SCHEDULES[name](optim.lr_scheduler, optimizer)
    go_on(optimizer, schedule, 2)
    optimizer.add_param_group({"params": parameters(nn), "lr": 0.2})
    log = []
    for i in range(20):
        try:
            log += go_on(optimizer, schedule, 1, start=i)
        except Exception as e:
            epoch = getattr(schedule, "last_epoch", None)  # a chain of schedules has none
            log.append((type(e).__name__, str(e), options(optimizer), epoch))
    return log


@parity
def test_plateau_of_a_group_added_later(nn, optim):
    optimizer = OPTIMISERS["SGD"](optim, parameters(nn))
    schedule = optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=[0.1], patience=0)
    optimizer.add_param_group({"params": parameters(nn)})
    schedule.step(1)
    schedule.step(2)


@parity
def test_two_schedules_of_one_optimiser(nn, optim):
    optimizer = OPTIMISERS["SGD of groups"](optim, parameters(nn))
    s = optim.lr_scheduler
    schedules = s.ExponentialLR(optimizer, 0.9), s.ReduceLROnPlateau(optimizer, patience=1)
    step = optimizer.step
    s.StepLR(optimizer, 3)  # starts from initial_lr, and does not wrap step again
    log = [optimizer.step is step, step.__name__, step._wrapped_by_lr_sched]
    for i in range(20):
        optimizer.step()
        for schedule in schedules:
            advance(schedule, i)
        log.append(options(optimizer))
    return log


@parity
def test_step_works_as_before_under_the_wrapper(nn, optim):
    """The scheduler's wrapper of `step` keeps closures, their value, hooks and pickling."""
    ps, log = parameters(nn), []
    optimizer = optim.SGD(ps, lr=0.1)
    optimizer.register_step_post_hook(lambda o, args, kwargs: log.append((len(args), list(kwargs))))
    schedule = optim.lr_scheduler.StepLR(optimizer, 2)

    def closure():
        loss = ps[0].pow(2).sum()
        loss.backward()
        return loss

    values = [optimizer.step(closure), optimizer.step(closure=closure), optimizer.step()]
    schedule.step()
    revived = pickle.loads(pickle.dumps(optimizer)).__dict__
    return values, ps, log, optimizer._opt_called, "step" in revived, "_opt_called" in revived


@NESTED
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_optimiser_is_freed_without_the_garbage_collector(name):
    """The scheduler's wrapper of `step` makes no reference cycle, so memory is freed at once."""

    def made():
        optimizer = nnmirror.optim.SGD(parameters(nnmirror), lr=0.1, momentum=0.9)
        schedule = SCHEDULES[name](nnmirror.optim.lr_scheduler, optimizer)
        go_on(optimizer, schedule, 3)
        return weakref.ref(optimizer), vars(optimizer).get("step")

    gc.collect()
    gc.disable()
    try:
        alive, step = made()
        assert alive() is None
    finally:
        gc.enable()
    if not name.startswith("Plateau"):  # which does not wrap step
        with pytest.raises(AttributeError, match="_opt_called"):
            step()


# -- warnings and errors -------------------------------------------------------------------------


@parity
def test_warned_of_a_schedule_stepped_first(nn, optim):
    optimizer = optim.SGD(parameters(nn), lr=0.1)
    schedule = optim.lr_scheduler.StepLR(optimizer, 1)
    schedule.step()
    optimizer.step()
    schedule.step()
    schedule.step()
    return optimizer.param_groups[0]["lr"]


@parity
def test_warned_of_a_step_replaced_later(nn, optim):
    optimizer = optim.SGD(parameters(nn), lr=0.1)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.step = lambda: None
    schedule.step()
    schedule.step()


@pytest.mark.parametrize("name", SCHEDULES)
@parity
def test_warned_of_get_lr(nn, optim, name):
    optimizer = optim.SGD(parameters(nn), lr=0.1, momentum=0.9)
    schedule = SCHEDULES[name](optim.lr_scheduler, optimizer)
    log = go_on(optimizer, schedule, 3)
    return log, schedule.get_lr(), options(optimizer), schedule.state_dict()


def test_warnings_point_at_the_script():
    optimizer = nnmirror.optim.SGD(parameters(nnmirror), lr=0.1)
    schedule = nnmirror.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step") as first:
        schedule.step()
    with pytest.warns(UserWarning, match="epoch parameter") as second:
        schedule.step(3)
    assert [w.filename for w in [*first, *second]] == [__file__] * 2


ERRORS = {
    "no optimiser": lambda s, o: s.StepLR(3, 1),
    "no optimiser, OneCycle": lambda s, o: s.OneCycleLR("a", 1, 1),
    "no optimiser, Cyclic": lambda s, o: s.CyclicLR(None, 1, 1),
    "no optimiser, Plateau": lambda s, o: s.ReduceLROnPlateau([]),
    "no optimiser, Lambda": lambda s, o: s.LambdaLR(3, lambda t: 1),
    "the class": lambda s, o: s.StepLR(type(o), 1),
    "the base": lambda s, o: s.LRScheduler(o),
    "the old base": lambda s, o: s._LRScheduler(o),
    "resume without initial_lr": lambda s, o: s.StepLR(o, 1, last_epoch=3),
    "no step size": lambda s, o: s.StepLR(o),
    "step size 0": lambda s, o: s.StepLR(o, 0).step(),
    "step size None": lambda s, o: s.StepLR(o, None).step(),
    "gamma None": lambda s, o: s.StepLR(o, 1, None).step(),
    "gamma a string": lambda s, o: s.ExponentialLR(o, "a").step(),
    "milestones a number": lambda s, o: s.MultiStepLR(o, 3),
    "gamma None at a milestone": lambda s, o: s.MultiStepLR(o, [1], None).step(),
    "lambdas": lambda s, o: s.LambdaLR(o, [lambda t: 1] * 2),
    "lambdas multiplied": lambda s, o: s.MultiplicativeLR(o, (lambda t: 1, 3)),
    "lambda 3": lambda s, o: s.LambdaLR(o, 3),
    "lambda 3 multiplied": lambda s, o: s.MultiplicativeLR(o, 3),
    "a builtin's state": lambda s, o: s.LambdaLR(o, math.sqrt).state_dict(),
    "constant factor": lambda s, o: s.ConstantLR(o, 1.5),
    "constant factor below 0": lambda s, o: s.ConstantLR(o, -0.1),
    "constant factor 0": lambda s, o: [c.step() for c in [s.ConstantLR(o, 0.0, 2)] * 3],
    "start factor": lambda s, o: s.LinearLR(o, 0),
    "start factor above 1": lambda s, o: s.LinearLR(o, 1.1),
    "end factor": lambda s, o: s.LinearLR(o, 0.1, 1.1),
    "end factor below 0": lambda s, o: s.LinearLR(o, 0.1, -1),
    "linear over 0": lambda s, o: s.LinearLR(o, total_iters=0).step(0),
    "polynomial over 0": lambda s, o: s.PolynomialLR(o, 0).step(0),
    "polynomial over a string": lambda s, o: s.PolynomialLR(o, "a").step(),
    "cosine over 0": lambda s, o: s.CosineAnnealingLR(o, 0).step(),
    "cosine to None": lambda s, o: s.CosineAnnealingLR(o, 3, None).step(),
    "T_0": lambda s, o: s.CosineAnnealingWarmRestarts(o, 0),
    "T_0 a float": lambda s, o: s.CosineAnnealingWarmRestarts(o, 2.5),
    "T_mult": lambda s, o: s.CosineAnnealingWarmRestarts(o, 2, 0),
    "T_mult a float": lambda s, o: s.CosineAnnealingWarmRestarts(o, 2, 1.5),
    "eta_min": lambda s, o: s.CosineAnnealingWarmRestarts(o, 2, 1, "a"),
    "restarts at -1": lambda s, o: s.CosineAnnealingWarmRestarts(o, 2).step(-1),
    "no steps": lambda s, o: s.OneCycleLR(o, 0.1),
    "epochs alone": lambda s, o: s.OneCycleLR(o, 0.1, epochs=3),
    "steps 0": lambda s, o: s.OneCycleLR(o, 0.1, 0),
    "steps a float": lambda s, o: s.OneCycleLR(o, 0.1, 2.5),
    "epochs -1": lambda s, o: s.OneCycleLR(o, 0.1, epochs=-1, steps_per_epoch=0),
    "steps per epoch": lambda s, o: s.OneCycleLR(o, 0.1, epochs=1, steps_per_epoch=2.0),
    "pct_start": lambda s, o: s.OneCycleLR(o, 0.1, 3, pct_start=1.5),
    "pct_start 1": lambda s, o: s.OneCycleLR(o, 0.1, 3, pct_start=1),
    "pct_start a string": lambda s, o: s.OneCycleLR(o, 0.1, 3, pct_start="a"),
    "strategy": lambda s, o: s.OneCycleLR(o, 0.1, 3, anneal_strategy="sin"),
    "strategy a list": lambda s, o: s.OneCycleLR(o, 0.1, 3, anneal_strategy=[]),
    "max_lr of two": lambda s, o: s.OneCycleLR(o, [0.1, 0.2], 3),
    "momentums of two": lambda s, o: s.OneCycleLR(o, 0.1, 3, base_momentum=[1], max_momentum=[]),
    "over the end": lambda s, o: [c.step() for c in [s.OneCycleLR(o, 0.1, 3)] * 4],
    "a rise of no steps": lambda s, o: s.OneCycleLR(o, 0.1, 10, pct_start=0.1),
    "cyclic base_lr of two": lambda s, o: s.CyclicLR(o, [0.1, 0.2], 1),
    "cyclic max_lr of two": lambda s, o: s.CyclicLR(o, 0.1, [0.1, 0.2]),
    "cyclic momentums": lambda s, o: s.CyclicLR(o, 0.1, 1, base_momentum=[], max_momentum=[1, 2]),
    "cyclic mode": lambda s, o: s.CyclicLR(o, 0.1, 1, mode="square"),
    "cyclic over 0": lambda s, o: s.CyclicLR(o, 0.1, 1, 0, 0),
    "cyclic rise of 0": lambda s, o: s.CyclicLR(o, 0.1, 1, 0, 3),
    "cyclic fall of 0": lambda s, o: [c.step() for c in [s.CyclicLR(o, 0.1, 1, 3, 0)] * 9],
    "cyclic size": lambda s, o: s.CyclicLR(o, 0.1, 1, "a"),
    "cyclic state loaded twice": lambda s, o: [
        s.CyclicLR(o, 0.1, 1).load_state_dict(d) for d in [s.CyclicLR(o, 0.1, 1).state_dict()] * 2],
    "factor": lambda s, o: s.ReduceLROnPlateau(o, factor=1.0),
    "factor before optimiser": lambda s, o: s.ReduceLROnPlateau(3, factor=1.0),
    "min_lrs": lambda s, o: s.ReduceLROnPlateau(o, min_lr=[0.1, 0.2]),
    "mode": lambda s, o: s.ReduceLROnPlateau(o, "least"),
    "mode 3": lambda s, o: s.ReduceLROnPlateau(o, 3),
    "mode a list": lambda s, o: s.ReduceLROnPlateau(o, []),
    "threshold mode": lambda s, o: s.ReduceLROnPlateau(o, threshold_mode="both"),
    "threshold": lambda s, o: s.ReduceLROnPlateau(o, threshold="a").step(1),
    "no metric": lambda s, o: s.ReduceLROnPlateau(o).step(),
    "a metric of two": lambda s, o: s.ReduceLROnPlateau(o).step(torch.ones(2)),
    "a metric in words": lambda s, o: s.ReduceLROnPlateau(o).step("good"),
    "get_lr of Plateau": lambda s, o: s.ReduceLROnPlateau(o).get_lr(),
    "mode loaded": lambda s, o: s.ReduceLROnPlateau(o).load_state_dict({"mode": "least"}),
    "sequence of none": lambda s, o: s.SequentialLR(o, [], []),
    "chain of none": lambda s, o: s.ChainedScheduler([]),
    "sequence of numbers": lambda s, o: s.SequentialLR(o, [s.StepLR(o, 1), 3], [1]),
    "chain of numbers": lambda s, o: s.ChainedScheduler([s.StepLR(o, 1), 3]),
    "chain of numbers first": lambda s, o: s.ChainedScheduler([3]),
    "chain of numbers, optimiser": lambda s, o: s.ChainedScheduler([3], o),
    "Plateau in sequence": lambda s, o: s.SequentialLR(o, [s.ReduceLROnPlateau(o)], []),
    "Plateau in chain": lambda s, o: s.ChainedScheduler([s.StepLR(o, 1), s.ReduceLROnPlateau(o)]),
    "another optimiser's": lambda s, o: s.SequentialLR(
        type(o)(o.param_groups[0]["params"], lr=0.1), [s.StepLR(o, 1)], []),
    "another optimiser's in chain": lambda s, o: s.ChainedScheduler(
        [s.StepLR(o, 1), s.StepLR(type(o)([torch.ones(1)], lr=2), 1)]),
    "milestones": lambda s, o: s.SequentialLR(o, [s.StepLR(o, 1)], [3]),
    "an epoch in sequence": lambda s, o: s.SequentialLR(o, [s.StepLR(o, 1)], []).step(3),
    "a chain in sequence": lambda s, o: [q.step() for q in [
        s.SequentialLR(o, [s.StepLR(o, 1), s.ChainedScheduler([s.StepLR(o, 1)])], [1])] * 2],
    "no lambdas in the state": lambda s, o: s.LambdaLR(o, Decay(1)).load_state_dict({"a": 1}),
    "more lambdas in the state": lambda s, o: s.LambdaLR(o, Decay(1)).load_state_dict(
        {"lr_lambdas": [{"rate": 2}] * 2}),
    "no schedules in the state": lambda s, o: s.ChainedScheduler([s.StepLR(o, 1)]).load_state_dict({}),
    "state of None": lambda s, o: s.StepLR(o, 1).load_state_dict(None),
    "unknown argument": lambda s, o: s.StepLR(o, 1, verbose=True),
    "a fraction in last_epoch": lambda s, o: s.StepLR(o, 1, last_epoch="a"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
@parity
def test_errors(nn, optim, name):
    """The same error, and the same options left in the optimiser."""
    optimizer = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    try:
        ERRORS[name](optim.lr_scheduler, optimizer)
    except Exception as e:
        return type(e).__name__, str(e), options(optimizer)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
@parity
def test_cyclic_schedulers_need_a_momentum(nn, optim, name):
    class Plain(optim.Optimizer):
        def step(self, closure=None):
            pass

    optimizer = Plain(parameters(nn), {"lr": 0.1})
    FORMULAS[name](optim.lr_scheduler, optimizer)


# -- user-defined schedulers ---------------------------------------------------------------------


@parity
def test_a_schedule_of_your_own(nn, optim):
    s = optim.lr_scheduler

    class Warmup(s.LRScheduler):
        def __init__(self, optimizer, steps, last_epoch=-1):
            self.steps = steps
            super().__init__(optimizer, last_epoch)

        def get_lr(self):
            if not self._get_lr_called_within_step:
                return "called from outside"
            return [lr * min(1, (self.last_epoch + 1) / self.steps) for lr in self.base_lrs]

    class Closed(Warmup):
        def _get_closed_form_lr(self):
            return [lr * self.last_epoch for lr in self.base_lrs]

    class Halved(s.StepLR):
        def get_lr(self):
            return [lr / 2 for lr in super().get_lr()]

    class Old(s._LRScheduler):
        def get_lr(self):
            return [0.5 for _ in self.base_lrs]

    class Short(s.LRScheduler):
        def get_lr(self):
            return self.base_lrs[:1]

    log = []
    for cls, args in ((Warmup, (7,)), (Closed, (7,)), (Halved, (3,)), (Old, ()), (Short, ())):
        optimizer = OPTIMISERS["SGD of groups"](optim, parameters(nn))
        try:
            schedule = cls(optimizer, *args)
            log += go_on(optimizer, schedule, 9)
            schedule.step(3)
            log.append((options(optimizer), schedule.get_lr(), schedule.state_dict()))
        except Exception as e:
            log.append((type(e).__name__, str(e), options(optimizer)))
    return log


@parity
def test_an_error_in_a_formula_of_your_own(nn, optim):
    """After an error in the user's function is caught, the scheduler can still be stepped."""
    optimizer = optim.SGD(parameters(nn), lr=0.1)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t - 2))
    log = []
    for i in range(5):
        try:
            log += go_on(optimizer, schedule, 1, start=i)
        except ZeroDivisionError as e:
            log.append(str(e))
        log.append(schedule.state_dict())
    return log


# -- the two libraries together ------------------------------------------------------------------


@NESTED
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_torchs_own_optimiser(name):
    results = []
    for lib in (torch.optim, nnmirror.optim):
        optimizer = OPTIMISERS["SGD of groups"](torch.optim, parameters(nnmirror))
        results.append(go_on(optimizer, SCHEDULES[name](lib.lr_scheduler, optimizer), 60))
    same(*results, name)


def test_torchs_own_schedule_refuses_a_mirrored_optimiser():
    """PyTorch's scheduler requires PyTorch's Optimizer class; the optimiser is not changed."""
    optimizer = nnmirror.optim.SGD(parameters(nnmirror), lr=0.1)
    before = options(optimizer)
    with pytest.raises(TypeError, match="SGD is not an Optimizer"):
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert options(optimizer) == before


def test_no_torch_optim_is_no_optimiser(monkeypatch):
    schedules = nnmirror.optim.lr_scheduler
    monkeypatch.delitem(sys.modules, "torch.optim")
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        schedules.StepLR(3, 1)
    schedules.StepLR(nnmirror.optim.SGD(parameters(nnmirror), lr=0.1), 1)


def test_spellings_of_the_import():
    from nnmirror.nn.optim.lr_scheduler import StepLR as through_nn

    import nnmirror.optim.lr_scheduler as named
    from nnmirror import optim
    from nnmirror.optim import lr_scheduler
    from nnmirror.optim.lr_scheduler import StepLR

    assert named is lr_scheduler is optim.lr_scheduler
    assert StepLR is optim.lr_scheduler.StepLR is through_nn
    assert sorted(lr_scheduler.__all__) == sorted(torch.optim.lr_scheduler.__all__)
    assert issubclass(lr_scheduler._LRScheduler, lr_scheduler.LRScheduler)
