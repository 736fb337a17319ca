"""Operations on small tensors run in one thread wherever PyTorch's do.

An operation that starts a parallel section waits for every thread of the pool. On a busy machine
that takes milliseconds, however small the tensors are: a training that takes seconds in PyTorch
would take minutes. So each scenario, a function of `(nn, optim)` that returns what to run, runs
in a process with two threads, and the test counts how often the second thread was woken (it
sleeps as soon as it has no work).
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import nnmirror
import nnmirror.optim

TASKS = Path("/proc/self/task")
TIMES = 10
SCENARIOS = {}


def scenario(**named):
    """Register `function(nn, optim, given)` as a scenario for each named value of `given`."""

    def keep(function):
        for name, given in named.items():
            key = f"{function.__name__}: {name}"
            SCENARIOS[key] = functools.partial(function, given=given)
        return function

    return keep


def stepped(nn, optimizer, *nets):
    """Optimiser steps of nets of these sizes, each after a backward that is not counted."""
    made = []
    for sizes in nets:
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        net = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())])
        made.append((net, optimizer(net.parameters()), torch.randn(4, sizes[0])))

    def backward():
        for net, optimizer, x in made:
            optimizer.zero_grad()
            net(x).pow(2).mean().backward()

    def steps():
        for _, optimizer, _ in made:
            optimizer.step()

    return backward, steps


@scenario(
    sgd=lambda optim, p: optim.SGD(p, lr=0.1),
    momentum=lambda optim, p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    nesterov=lambda optim, p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    sgd_foreach=lambda optim, p: optim.SGD(p, lr=0.1, foreach=True),
    adam=lambda optim, p: optim.Adam(p),
    amsgrad=lambda optim, p: optim.Adam(p, amsgrad=True),
    adamw=lambda optim, p: optim.AdamW(p),
    adam_foreach=lambda optim, p: optim.Adam(p, foreach=True),
    rmsprop=lambda optim, p: optim.RMSprop(p),
    centered=lambda optim, p: optim.RMSprop(p, centered=True, momentum=0.9),
    adagrad=lambda optim, p: optim.Adagrad(p),
)
def a_step(nn, optim, given):
    """The second net has 5,248 parameters: a square root of so many would be parallel."""
    sizes = (2, 25, 25, 1), (40, 40, 40, 40, 8)
    return stepped(nn, functools.partial(given, optim), *sizes)


@scenario(momentum={"momentum": 0.9}, nesterov={"momentum": 0.9, "nesterov": True})
def a_step_of_more(nn, optim, given):
    """Each parameter is too small to be parallel, but all 40,950 elements together are not."""
    return stepped(nn, lambda p: optim.SGD(p, lr=0.1, **given), (90,) * 6)


SHAPES = (4, 25), (32, 64), (64, 64), (100, 150)


def forward_and_backward(nn, make):
    """Forward and backward of the function `make(shape)`, for each shape."""
    parts = [(nn.Parameter(torch.randn(shape)), make(shape)) for shape in SHAPES]

    def action():
        for x, function in parts:
            x.grad = None
            function(x).sum().backward()

    return lambda: None, action


@scenario(
    relu=lambda nn: nn.ReLU(),
    leaky_relu=lambda nn: nn.LeakyReLU(),
    elu=lambda nn: nn.ELU(),
    elu_of_doubles=lambda nn: lambda x: nn.functional.elu(x.double()),
    selu=lambda nn: nn.SELU(),
    celu=lambda nn: nn.CELU(),
    silu=lambda nn: nn.SiLU(),
    mish=lambda nn: nn.Mish(),
    softplus=lambda nn: nn.Softplus(),
    sigmoid=lambda nn: nn.Sigmoid(),
    hardtanh=lambda nn: nn.Hardtanh(),
    hardswish=lambda nn: nn.Hardswish(),
    gelu=lambda nn: nn.GELU("tanh"),
    log_softmax=lambda nn: nn.LogSoftmax(0),
    softmax=lambda nn: nn.Softmax(0),
    dropout=lambda nn: nn.Dropout(),
    rms_norm=lambda nn: lambda x: nn.functional.rms_norm(x, x.shape[-1:]),
)
def a_layer(nn, optim, given):
    return forward_and_backward(nn, lambda shape: given(nn))


@scenario(
    layer_norm=lambda nn, width: nn.LayerNorm(width),
    batch_norm=lambda nn, width: nn.BatchNorm1d(width),
)
def backward_of_a_norm(nn, optim, given):
    """The forward kernels wake threads in both libraries, and so do PyTorch's backward kernels."""
    parts = [(given(nn, shape[1]), torch.randn(shape)) for shape in SHAPES]
    losses = []

    def forward():
        losses[:] = [layer(x).pow(2).sum() for layer, x in parts]

    def backward():
        for loss in losses:
            loss.backward()

    return forward, backward


@scenario(
    mse=lambda nn: nn.MSELoss(),
    l1=lambda nn: nn.L1Loss(),
    smooth_l1=lambda nn: nn.SmoothL1Loss(),
    huber=lambda nn: nn.HuberLoss(),
    bce_with_logits=lambda nn: nn.BCEWithLogitsLoss(),
    kl_div=lambda nn: nn.KLDivLoss(reduction="sum"),
)
def a_loss(nn, optim, given):
    return forward_and_backward(
        nn, lambda shape: functools.partial(given(nn), target=torch.rand(shape).softmax(1))
    )


@scenario(
    plain={},
    padding={"padding_idx": 1},
    by_frequency={"scale_grad_by_freq": True},
)
def an_embedding(nn, optim, given):
    layer = nn.Embedding(50, 16, **given)
    words = [torch.randint(50, (n, 7)) for n in (2, 32, 250)]

    def action():
        for indices in words:
            layer.weight.grad = None
            layer(indices).pow(2).sum().backward()

    return lambda: None, action


@scenario(
    norm=lambda nn, params: nn.utils.clip_grad_norm_(params, 1.0),
    value=lambda nn, params: nn.utils.clip_grad_value_(params, 1.0),
)
def clipping(nn, optim, given):
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]

    def forget():
        for p in params:
            p.grad = torch.randn(p.shape)

    return forget, lambda: given(nn, params)


def woken():
    """How often threads other than this one have gone to sleep, so how often they were woken."""
    status = [
        (task / "status").read_text()
        for task in TASKS.iterdir()
        if int(task.name) != threading.get_native_id()
    ]
    return sum(int(s.split("\nvoluntary_ctxt_switches:")[1].split()[0]) for s in status)


def times_woken(before, action):
    for _ in range(8):  # warm-up: after it, everything is bound and cached
        before()
        action()
    total = 0
    for _ in range(TIMES):
        before()
        start = woken()
        action()
        total += woken() - start
    return total


def main():
    libraries = (torch.nn, torch.optim), (nnmirror.nn, nnmirror.optim)
    many = torch.ones(2**20)
    found = {"many numbers": [times_woken(lambda: None, lambda: many.add_(1))] * 2}
    for name, function in SCENARIOS.items():
        found[name] = []
        for nn, optim in libraries:
            torch.manual_seed(0)
            found[name].append(times_woken(*function(nn, optim)))
    print(json.dumps(found))


def found():
    """For each scenario, how often another thread was woken, by PyTorch and by nnmirror."""
    run = subprocess.run(
        [sys.executable, "-m", __name__],
        cwd=Path(__file__).parent.parent,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",  # a thread without work sleeps, which is counted
            "GOMP_SPINCOUNT": "0",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_thread_is_woken_where_pytorch_wakes_none(once, name):
    """Waking threads for small tensors would make training take minutes on a busy machine."""
    if not TASKS.exists():
        pytest.skip("threads are looked at through /proc, which is Linux's")
    times = once("threads", found)
    if not times["many numbers"][0]:
        pytest.skip("this PyTorch runs in one thread")
    by_pytorch, by_mirror = times[name]
    # A parallel section wakes a thread at each call; now and then one wakes by itself.
    if by_pytorch < TIMES / 2:
        assert by_mirror < TIMES / 2
    else:
        assert by_mirror <= 2 * by_pytorch, "far more often than PyTorch wakes one"


if __name__ == "__main__":
    main()
