"""Bad input raises the same exception, with the same message, as in PyTorch.

Each public entry is called with good arguments, one of which at a time is replaced by each value of
BAD. Where PyTorch accepts such a value, the results are compared.
"""

import pytest
import torch

import nnmirror

from .parity import normal, outcome, same

BAD = {
    "None": lambda: None,
    "a string": lambda: "a",
    "a list": lambda: [1.0, 2.0],
    "minus one": lambda: -1,
    "zero": lambda: 0,
    "a float": lambda: 2.5,
    "nan": lambda: float("nan"),
    "true": lambda: True,
    "an object": lambda: object,
    "another shape": lambda: torch.ones(2, 5),
    "a vector": lambda: torch.ones(7),
    "a number": lambda: torch.tensor(2.0),
    "empty": lambda: torch.empty(0),
    "integers": lambda: torch.ones(2, 3, dtype=torch.long),
    "float64": lambda: torch.ones(2, 3, dtype=torch.float64),
    "bool": lambda: torch.ones(2, 3, dtype=torch.bool),
    "complex": lambda: torch.ones(2, 3, dtype=torch.complex64),
    "on another device": lambda: torch.ones(2, 3, device="meta"),
}
X = torch.linspace(-1, 1, 6).reshape(2, 3)


def net(nn):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh())


def tracked(nn):
    return nn.functional.leaky_relu(nn.Parameter(X.clone()), 1.0)


def scheduled(name):
    """An entry that constructs a scheduler, runs six steps and returns its state."""

    def entry(nn, optim):
        optimizer = optim.SGD(net(nn).parameters(), lr=0.1, momentum=0.9)

        def steps(*arguments):
            schedule = getattr(optim.lr_scheduler, name)(optimizer, *arguments)
            for i in range(6):
                optimizer.step()
                schedule.step(*[i] * (name == "ReduceLROnPlateau"))
            return schedule.state_dict(), repr(optimizer)

        return steps, list(SCHEDULES[name])

    return entry


SCHEDULES = {
    "StepLR": [2, 0.5],
    "MultiStepLR": [[2, 3], 0.5],
    "ConstantLR": [0.5, 3],
    "LinearLR": [0.5, 0.7, 4],
    "ExponentialLR": [0.9],
    "PolynomialLR": [4, 2.0],
    "CosineAnnealingLR": [4, 0.01],
    "CosineAnnealingWarmRestarts": [2, 2, 0.01],
    "LambdaLR": [lambda t: 0.9**t],
    "MultiplicativeLR": [lambda t: 0.9],
    "CyclicLR": [0.01, 0.1, 2, 2, "exp_range", 0.9, None, "cycle", True, 0.8, 0.9],
    "OneCycleLR": [0.1, 8, None, None, 0.3, "cos", True, 0.8, 0.9, 25.0, 1e4, False],
    "ReduceLROnPlateau": ["min", 0.5, 1, 1e-4, "rel", 1, 0, 1e-8],
}


# name: (the callable, its good arguments), created anew for each call.
ENTRIES = {
    "Linear": lambda nn, optim: (nn.Linear, [3, 4, True]),
    "Linear()": lambda nn, optim: (nn.Linear(3, 4), [X]),
    "Linear() tracked": lambda nn, optim: (nn.Linear(3, 4), [tracked(nn)]),
    "LeakyReLU": lambda nn, optim: (nn.LeakyReLU, [0.1, False]),
    "LeakyReLU()": lambda nn, optim: (nn.LeakyReLU(), [tracked(nn)]),
    "ReLU()": lambda nn, optim: (nn.ReLU(), [tracked(nn)]),
    "ReLU(inplace)()": lambda nn, optim: (nn.ReLU(inplace=True), [tracked(nn)]),
    "Tanh()": lambda nn, optim: (nn.Tanh(), [tracked(nn)]),
    "Identity()": lambda nn, optim: (nn.Identity(), [tracked(nn)]),
    "Flatten": lambda nn, optim: (nn.Flatten, [0, -1]),
    "Flatten()": lambda nn, optim: (nn.Flatten(), [tracked(nn)]),
    "Unflatten": lambda nn, optim: (nn.Unflatten, [1, (3, 1)]),
    "Unflatten()": lambda nn, optim: (nn.Unflatten(1, (3, 1)), [tracked(nn)]),
    "MSELoss": lambda nn, optim: (nn.MSELoss, [None, None, "mean"]),
    "MSELoss()": lambda nn, optim: (nn.MSELoss(), [tracked(nn), X]),
    "MSELoss(sum)()": lambda nn, optim: (nn.MSELoss(reduction="sum"), [X, tracked(nn)]),
    "Sequential": lambda nn, optim: (nn.Sequential, [nn.Tanh(), nn.ReLU()]),
    "Sequential()": lambda nn, optim: (net(nn), [X]),
    "Sequential[]": lambda nn, optim: (net(nn).__getitem__, [0]),
    "Sequential.append": lambda nn, optim: (net(nn).append, [nn.Tanh()]),
    "Sequential.insert": lambda nn, optim: (net(nn).insert, [0, nn.Tanh()]),
    "ModuleList": lambda nn, optim: (nn.ModuleList, [[nn.Tanh()]]),
    "ModuleDict": lambda nn, optim: (nn.ModuleDict, [{"a": nn.Tanh()}]),
    "ParameterList": lambda nn, optim: (nn.ParameterList, [[X]]),
    "Parameter": lambda nn, optim: (nn.Parameter, [X, True]),
    "Buffer": lambda nn, optim: (nn.Buffer, [X]),
    "functional.linear": lambda nn, optim: (
        nn.functional.linear, [tracked(nn), torch.ones(4, 3), torch.ones(4)]),
    "functional.relu": lambda nn, optim: (nn.functional.relu, [tracked(nn), False]),
    "functional.leaky_relu": lambda nn, optim: (nn.functional.leaky_relu, [tracked(nn), 0.1]),
    "functional.tanh": lambda nn, optim: (nn.functional.tanh, [tracked(nn)]),
    "functional.sigmoid": lambda nn, optim: (nn.functional.sigmoid, [tracked(nn)]),
    "functional.softmax": lambda nn, optim: (nn.functional.softmax, [tracked(nn), 1]),
    "functional.log_softmax": lambda nn, optim: (nn.functional.log_softmax, [tracked(nn), 1]),
    "functional.softplus": lambda nn, optim: (nn.functional.softplus, [tracked(nn), 1, 20]),
    "functional.mse_loss": lambda nn, optim: (nn.functional.mse_loss, [tracked(nn), X]),
    "SGD": lambda nn, optim: (
        lambda *a: optim.SGD(*a).defaults, [list(net(nn).parameters()), 0.1, 0.9, 0, 0.1]),
    "SGD of groups": lambda nn, optim: (
        lambda p, lr: optim.SGD([{"params": p, "lr": lr}]).defaults,
        [list(net(nn).parameters()), 0.1]),
    "SGD.add_param_group": lambda nn, optim: (
        optim.SGD(net(nn).parameters(), lr=0.1).add_param_group, [{"params": [nn.Parameter(X)]}]),
    "SGD.load_state_dict": lambda nn, optim: (
        optim.SGD(net(nn).parameters(), lr=0.1).load_state_dict,
        [optim.SGD(net(nn).parameters(), lr=0.2).state_dict()]),
    **{name: scheduled(name) for name in SCHEDULES},
    "load_state_dict": lambda nn, optim: (net(nn).load_state_dict, [net(nn).state_dict(), True]),
    "load of one": lambda nn, optim: (
        lambda w: net(nn).load_state_dict({**net(nn).state_dict(), "0.weight": w}), [torch.ones(3, 3)]),
    "register_parameter": lambda nn, optim: (net(nn).register_parameter, ["p", nn.Parameter(X)]),
    "register_buffer": lambda nn, optim: (net(nn).register_buffer, ["b", X, True]),
    "register_module": lambda nn, optim: (net(nn).register_module, ["m", nn.Tanh()]),
    "setattr weight": lambda nn, optim: (
        lambda v: setattr(nn.Linear(3, 3), "weight", v), [nn.Parameter(torch.ones(3, 3))]),
    "setattr module": lambda nn, optim: (lambda v: setattr(net(nn), "0", v), [nn.Tanh()]),
    "get_submodule": lambda nn, optim: (net(nn).get_submodule, ["0"]),
    "get_parameter": lambda nn, optim: (net(nn).get_parameter, ["0.weight"]),
    "to": lambda nn, optim: (lambda v: str(net(nn).to(v)), [torch.float64]),
    "apply": lambda nn, optim: (lambda v: str(net(nn).apply(v)), [lambda m: None]),
    "requires_grad_": lambda nn, optim: (lambda v: str(net(nn).requires_grad_(v)), [False]),
    "train": lambda nn, optim: (lambda v: str(net(nn).train(v)), [False]),
    "init.uniform_": lambda nn, optim: (nn.init.uniform_, [nn.Parameter(X.clone()), 0.0, 1.0]),
    "init.normal_": lambda nn, optim: (nn.init.normal_, [nn.Parameter(X.clone()), 0.0, 1.0]),
    "init.kaiming_uniform_": lambda nn, optim: (nn.init.kaiming_uniform_, [nn.Parameter(X.clone()), 0.1]),
    "init.xavier_uniform_": lambda nn, optim: (nn.init.xavier_uniform_, [nn.Parameter(X.clone()), 1.0]),
    "init.calculate_gain": lambda nn, optim: (nn.init.calculate_gain, ["leaky_relu", 0.1]),
    "clip_grad_norm_": lambda nn, optim: (
        nn.utils.clip_grad_norm_, [list(net(nn).parameters()), 1.0, 2.0]),
    "clip_grad_value_": lambda nn, optim: (
        nn.utils.clip_grad_value_, [list(net(nn).parameters()), 1.0]),
    "parameters_to_vector": lambda nn, optim: (
        nn.utils.parameters_to_vector, [list(net(nn).parameters())]),
    "vector_to_parameters": lambda nn, optim: (
        nn.utils.vector_to_parameters, [torch.ones(12), list(net(nn).parameters())]),
    "backward": lambda nn, optim: (tracked(nn).backward, [X]),
    "backward retain": lambda nn, optim: (tracked(nn).sum().backward, [None, True]),
    "tensor.register_hook": lambda nn, optim: (
        lambda h: tracked(nn).register_hook(h) and None, [lambda g: None]),
    "grad": lambda nn, optim: (
        lambda v: setattr(nn.Parameter(X.clone()), "grad", v), [torch.ones(2, 3)]),
    "+": lambda nn, optim: (lambda v: tracked(nn) + v, [X]),
    "*": lambda nn, optim: (lambda v: tracked(nn) * v, [X]),
    "/": lambda nn, optim: (lambda v: tracked(nn) / v, [X]),
    "**": lambda nn, optim: (lambda v: tracked(nn) ** v, [2]),
    "@": lambda nn, optim: (lambda v: tracked(nn) @ v, [X.t()]),
    "add_": lambda nn, optim: (lambda v: tracked(nn).add_(v), [X]),
    "[]": lambda nn, optim: (lambda v: tracked(nn)[v], [0]),
    "[]=": lambda nn, optim: (lambda i, v: tracked(nn).__setitem__(i, v), [0, X[0]]),
    "sum": lambda nn, optim: (lambda d, k: tracked(nn).sum(d, k), [0, True]),
    "mean": lambda nn, optim: (lambda d: tracked(nn).mean(d), [0]),
    "max": lambda nn, optim: (lambda d, k: tracked(nn).max(d, k)[0], [0, True]),
    "var": lambda nn, optim: (lambda d: tracked(nn).var(d), [0]),
    "norm": lambda nn, optim: (lambda p, d: tracked(nn).norm(p, d), [2, 0]),
    "softmax": lambda nn, optim: (lambda d: tracked(nn).softmax(d), [0]),
    "cumsum": lambda nn, optim: (lambda d: tracked(nn).cumsum(d), [0]),
    "prod": lambda nn, optim: (lambda d: tracked(nn).prod(d), [0]),
    "view": lambda nn, optim: (lambda *s: tracked(nn).view(*s), [3, 2]),
    "reshape": lambda nn, optim: (lambda *s: tracked(nn).reshape(*s), [3, 2]),
    "flatten": lambda nn, optim: (lambda a, b: tracked(nn).flatten(a, b), [0, 1]),
    "transpose": lambda nn, optim: (lambda a, b: tracked(nn).transpose(a, b), [0, 1]),
    "permute": lambda nn, optim: (lambda *d: tracked(nn).permute(*d), [1, 0]),
    "squeeze": lambda nn, optim: (lambda d: tracked(nn).squeeze(d), [0]),
    "unsqueeze": lambda nn, optim: (lambda d: tracked(nn).unsqueeze(d), [0]),
    "expand": lambda nn, optim: (lambda *s: tracked(nn).expand(*s), [2, 2, 3]),
    "repeat": lambda nn, optim: (lambda *s: tracked(nn).repeat(*s), [2, 2]),
    "split": lambda nn, optim: (lambda n, d: tracked(nn).split(n, d), [1, 0]),
    "chunk": lambda nn, optim: (lambda n, d: tracked(nn).chunk(n, d), [2, 0]),
    "narrow": lambda nn, optim: (lambda *a: tracked(nn).narrow(*a), [0, 0, 1]),
    "select": lambda nn, optim: (lambda *a: tracked(nn).select(*a), [0, 1]),
    "gather": lambda nn, optim: (lambda *a: tracked(nn).gather(*a), [0, torch.zeros(1, 3).long()]),
    "index_select": lambda nn, optim: (
        lambda *a: tracked(nn).index_select(*a), [0, torch.tensor([0])]),
    "masked_fill": lambda nn, optim: (lambda *a: tracked(nn).masked_fill(*a), [X > 0, 1.0]),
    "where": lambda nn, optim: (lambda *a: torch.where(*a), [X > 0, tracked(nn), X]),
    "clamp": lambda nn, optim: (lambda *a: tracked(nn).clamp(*a), [0, 1]),
    "cat": lambda nn, optim: (lambda t, d: torch.cat([tracked(nn), t], d), [X, 0]),
    "stack": lambda nn, optim: (lambda t, d: torch.stack([tracked(nn), t], d), [X, 0]),
    "topk": lambda nn, optim: (lambda *a: tracked(nn).topk(*a)[0], [1, 0]),
    "lerp": lambda nn, optim: (lambda *a: tracked(nn).lerp(*a), [X, 0.5]),
    "einsum": lambda nn, optim: (lambda e, t: torch.einsum(e, tracked(nn), t), ["ij,kj->ik", X]),
    "to dtype": lambda nn, optim: (lambda v: tracked(nn).to(v), [torch.float64]),
}  # fmt: skip


# PyTorch reads uninitialised memory here, without an error.
UNDEFINED = {("add_", "on another device"), ("[]=", "on another device"),
             ("index_select", "on another device")}  # fmt: skip


def call(nn, optim, entry, place, bad):
    function, arguments = ENTRIES[entry](nn, optim)
    arguments[place] = BAD[bad]()
    return shown(function(*arguments))


def shown(value):
    """Tensors are compared by value, meta tensors by device and shape, all else by its str()."""
    if isinstance(value, torch.Tensor):
        return (str(value.device), str(value.shape)) if value.is_meta else value
    if isinstance(value, tuple | list):
        return [shown(v) for v in value]
    return str(value)


def places(entry):
    return range(len(ENTRIES[entry](nnmirror, nnmirror.optim)[1]))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("entry", ENTRIES)
def test_same_outcome_for_a_bad_argument(entry, bad):
    if (entry, bad) in UNDEFINED:
        pytest.skip("PyTorch reads unwritten memory")
    for place in places(entry):
        expected = outcome(call, torch.nn, torch.optim, entry=entry, place=place, bad=bad)
        actual = outcome(call, nnmirror, nnmirror.optim, entry=entry, place=place, bad=bad)
        said = f"argument {place}: PyTorch {expected.error!r}, the mirror {actual.error!r}"
        if expected.error is None and isinstance(actual.error, NotImplementedError):
            assert "nnmirror" in str(actual.error)
            continue
        assert type(expected.error) is type(actual.error), said
        assert normal(str(expected.error)) == normal(str(actual.error)), said
        if expected.error is None:
            same(expected.value, actual.value, f"argument {place}")
