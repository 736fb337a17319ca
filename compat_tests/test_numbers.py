"""A parameter where PyTorch takes a number: the same error, or the same gradient.

A slope, a margin, an `eps` or an `alpha=` that is a Parameter looks as if it were learned.
PyTorch raises a TypeError for most, since it could not give them a gradient; if nnmirror took
the value out of it, the parameter would silently not train. So every argument of every mirrored
module and function that is a number by its signature is given a Parameter here (and the result
of an operation, and a plain tensor that requires grad), and so is every number among the
arguments in PyTorch's table of operations (OpInfo).
"""

import functools
import inspect
import itertools

import numpy as np
import pytest
import torch

import nnmirror
from nnmirror.rules.registry import numbers_of
from nnmirror.tape import tensors_in

from .parity import both, parity, same_outcome
from .test_every_op import OPS, mapped, refused

X = torch.linspace(-2, 2.5, 12).reshape(4, 3)
FORMS = {
    "a parameter": lambda nn, value: nn.Parameter(torch.tensor(value)),
    "a result": lambda nn, value: nn.Parameter(torch.tensor(value)) * 1,
    "a tensor": lambda nn, value: torch.tensor(value, requires_grad=True),
}


# Values for the other required arguments.
OTHERS = {
    "dim": 1,
    "embedding_dim": 3,
    "in_features": 3,
    "normalized_shape": [3],
    "num_embeddings": 5,
    "num_features": 3,
    "out_features": 3,
    "pad": (1, 1),
    "running_mean": None,
    "running_var": None,
    "threshold": 0.1,
    "training": True,
    "unflattened_size": (3, 1),
    "value": 0.2,
}
VALUES = {
    "a": -0.5,
    "max_val": 1.5,
    "max_norm": 1.0,
    "mean": 0.0,
    "max_value": 1.5,
    "min_value": -1.0,
}


def numbers(function):
    """The function's arguments that are numbers by its signature, with a valid value each."""
    found = {}
    for name, p in inspect.signature(function).parameters.items():
        kind, default = str(p.annotation), p.default
        number = isinstance(default, int | float) and not isinstance(default, bool)
        several = "ist[" in kind or kind.startswith("collections.abc.Sequence[")
        if name != "var" and not several and (number or "int" in kind or "float" in kind):
            value = VALUES.get(name, default if number else OTHERS.get(name, 0.5))
            found[name] = float(value)
    return found


def tensors(nn, name, kind):
    """Valid arguments for the module or function of this name; the first is of this kind."""
    x = X.clone() if kind == "plain" else nn.functional.leaky_relu(nn.Parameter(X.clone()), 0.5)
    name = name.lower().replace("_", "").removesuffix("loss")
    signs = X.cos().sign()
    if name == "embedding":
        return [LABELS]
    if name == "unflatten":
        return [x.flatten()]
    if name in ("nll", "crossentropy"):
        return [x, LABELS]
    if name == "cosineembedding":
        return [x, X + 1, signs[:, 0]]
    if name in ("marginranking", "tripletmargin"):
        return [x, X + 1, signs]
    if name in ("hingeembedding", "softmargin", "multilabelsoftmargin"):
        return [x, signs]
    if name == "gaussiannll":
        return [x, X + 1, X.cos() + 2]
    if name in ("huber", "poissonnll", "cosinesimilarity", "pairwisedistance", "smoothl1"):
        return [x, X + 1]
    return [x]


LABELS = torch.tensor([0, 1, 2, 1])


def call(function, signature, args, number, given):
    """Call it with positional arguments up to `number`, as PyTorch's messages name positions."""
    args, kwargs, passed = list(args), {}, False
    for name, p in list(inspect.signature(signature).parameters.items())[len(args) :]:
        asked = name == number or name == "training" or p.default is inspect.Parameter.empty
        value = given if name == number else OTHERS.get(name) if asked else p.default
        if not passed and p.kind is not inspect.Parameter.KEYWORD_ONLY:
            args.append(value)
        elif asked and p.kind is not inspect.Parameter.VAR_KEYWORD:
            kwargs[name] = value
        passed = passed or name == number
    return function(*args, **kwargs)


def results_and_gradient(given, result):
    """The results, and the gradient that the number got from their backward."""
    made = list(tensors_in(result))
    for t in made:
        if t.requires_grad:
            t.sum().backward(retain_graph=True)
    return [t.detach() for t in made], [t.requires_grad for t in made], given.is_leaf and given.grad


FUNCTIONAL = {
    f"{name}({number})": (name, number, value)
    for name in nnmirror.nn.functional.__all__
    for number, value in numbers(getattr(nnmirror.nn.functional, name)).items()
    if number != "_stacklevel"
}
MODULES = {
    f"{name}({number})": (name, number, value)
    for name in sorted(nnmirror.nn.__all__)
    if inspect.isclass(cls := getattr(nnmirror.nn, name)) and issubclass(cls, nnmirror.nn.Module)
    for number, value in numbers(cls).items()
}
INIT = {
    f"{name}({number})": (name, number, value)
    for name in nnmirror.nn.init.__all__
    for number, value in numbers(getattr(nnmirror.nn.init, name)).items()
}


@pytest.mark.parametrize("kind", ["tracked", "plain"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", FUNCTIONAL)
@parity
def test_a_number_of_a_function(nn, optim, case, form, kind):
    name, number, value = FUNCTIONAL[case]
    function, given = getattr(nn.functional, name), FORMS[form](nn, value)
    mirrored = getattr(nnmirror.nn.functional, name)
    args = tensors(nn, name, kind)
    if name == "embedding":
        args.append(nn.Parameter(torch.ones(5, 3)))
    return results_and_gradient(given, call(function, mirrored, args, number, given))


@pytest.mark.parametrize("kind", ["tracked", "plain"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", MODULES)
@parity
def test_a_number_of_a_module(nn, optim, case, form, kind):
    name, number, value = MODULES[case]
    given = FORMS[form](nn, value)
    module = call(getattr(nn, name), getattr(nnmirror.nn, name), [], number, given)
    args = tensors(nn, name, kind)
    if len(args) == 1:
        module = nn.Sequential(nn.Identity(), module, nn.Tanh())
    return results_and_gradient(given, module(*args))


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", INIT)
@parity
def test_a_number_of_an_initialisation(nn, optim, case, form, grad_mode):
    name, number, value = INIT[case]
    given = FORMS[form](nn, value)
    with torch.set_grad_enabled(grad_mode):
        function = getattr(nn.init, name)
        if name == "calculate_gain":
            return function("leaky_relu", given)
        weight = nn.Parameter(X.clone())
        call(function, getattr(nnmirror.nn.init, name), [weight], number, given)
        return weight


def samples_with_one_number(op):
    """Sample calls of an operation from PyTorch's OpInfo table, each with one number chosen.

    `where` is the number's position or keyword.
    """
    seen = set()
    for sample in itertools.islice(op.sample_inputs("cpu", torch.float32, requires_grad=True), 30):
        first, args, kwargs = sample.input, (sample.input, *sample.args), dict(sample.kwargs)
        if not (isinstance(first, torch.Tensor) and first.requires_grad):
            continue
        if any(t.layout is not torch.strided for t in tensors_in([args, kwargs])):
            continue
        given = dict(enumerate(args)) | kwargs
        if len(args) == 1:  # also numbers with a default
            given = {name: 0.5 for name in numbers_of(op.op)[1]} | given
        for where, value in given.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            kind = where, len(args), tuple(kwargs)
            if number and kind not in seen:
                seen.add(kind)
                for function in {op.op, op.get_method(), op.get_inplace()} - {None}:
                    yield {
                        "function": function,
                        "args": args,
                        "kwargs": kwargs,
                        "where": where,
                        "value": float(value),
                    }


def given_as_number(nn, optim, function, args, kwargs, where, value, form):
    def leaf(t):
        return nn.Parameter(t.detach().clone()) if t.requires_grad else t.clone()

    number = FORMS[form](nn, value)
    args, kwargs = mapped(list(args), leaf), mapped(kwargs, leaf)
    args[0] = nn.functional.leaky_relu(args[0], 1.0)
    (args if isinstance(where, int) else kwargs)[where] = number
    return results_and_gradient(number, function(*args, **kwargs))


@pytest.mark.parametrize("name", OPS)
def test_a_number_of_an_operation(name):
    for how in samples_with_one_number(OPS[name]):
        for form in FORMS:
            expected, actual = both(functools.partial(given_as_number, **how, form=form))
            if refused(actual.error):
                continue
            if expected.error is not None and actual.error is not None:
                expected.warnings = actual.warnings  # from converting the tensor to a number
            same_outcome(expected, actual)


@parity
def test_a_slope_exchanged_for_a_parameter(nn, optim):
    net = nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(), nn.Linear(3, 3), nn.ELU())
    for _ in range(3):
        net(X).sum().backward()
    said = []
    for name, i in (("alpha", 3), ("negative_slope", 1)):
        setattr(net[i], name, nn.Parameter(torch.tensor(0.5)))
        try:
            net(X)
        except TypeError as error:
            said.append(str(error))
        setattr(net[i], name, None)
        delattr(net[i], name)
        setattr(net[i], name, 0.5)
        net(X).sum().backward()
    return said, net[0].weight.grad


@parity
def test_a_learned_slope_without_grad_mode(nn, optim):
    with torch.no_grad():
        return nn.functional.leaky_relu(X, nn.Parameter(torch.tensor(0.2)))


@parity
def test_a_number_that_is_a_tensor_without_a_gradient(nn, optim):
    x, slope = nn.Parameter(X.clone()), torch.tensor(0.25)
    y = nn.functional.leaky_relu(x, slope) + nn.functional.elu(x, slope)
    y = y + nn.LeakyReLU(slope)(x) + nn.Sequential(nn.Softplus(slope), nn.Tanh())(x)
    torch.add(y, x, alpha=slope).sum().backward()
    return y, x


@parity
def test_minus_zero_as_a_number_changes_no_other_zero(nn, optim):
    # Numbers are kept as tensors, and -0.0 equals 0.0: it must not become the zero of other calls.
    nnmirror.constants.constant.cache_clear()
    x = nn.Parameter(torch.linspace(-1, 1, 6))
    nn.functional.threshold(x, -0.0, 1.0).sum().backward()
    said = [x * 1 > -0.0 for _ in range(4)]
    x.grad = None
    nn.functional.relu(x * 1).sum().backward()
    return said, x.grad, x.grad.signbit()


NUMPY_NUMBERS = {
    "pow": lambda x, number: x ** number(0.1),
    "lerp": lambda x, number: torch.lerp(x, x * 2, number(0.1)),
    "mul": lambda x, number: x * number(0.1),
    "clamp": lambda x, number: x.clamp(min=number(1.4)),
    "addcmul": lambda x, number: torch.addcmul(x, x, x, value=number(0.1)),
    "leaky_relu": lambda x, number: torch.nn.functional.leaky_relu(-x, number(0.1)),
}


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", NUMPY_NUMBERS)
@parity
def test_numpy_scalar_counts_as_a_python_number(nn, optim, name, number):
    """The gradient is not computed in the precision of the scalar."""
    x = nn.Parameter(torch.tensor([1.3, 2.0]))
    y = NUMPY_NUMBERS[name](x, number)
    y.sum().backward()
    return y, x.grad


@parity
def test_power_of_a_base_without_dimensions_in_another_dtype(nn, optim):
    p = nn.Parameter(torch.tensor([1.3, 2.0], dtype=torch.float64))
    (torch.tensor(0.1) ** p).sum().backward()
    return p.grad


GIVEN = {
    "p of a tensor": {"p": torch.tensor(0.5)},
    "p of a tensor of one dimension": {"p": torch.tensor([0.5])},
    "p of numpy": {"p": np.float32(0.5)},
    "p of a bool": {"p": True},
    "training of an int": {"training": 1},
    "training of a tensor": {"training": torch.tensor(True)},
    "inplace of None": {"inplace": None},
    "inplace of a word": {"inplace": "yes"},
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", ["dropout", "dropout2d", "alpha_dropout", "feature_alpha_dropout"])
@parity
def test_what_a_dropout_is_given(nn, optim, name, given):
    """A probability that is a tensor draws what the number draws."""
    x = nn.Parameter(torch.ones(2, 3, 4, 5))
    return getattr(nn.functional, name)(x, **{"training": True, **GIVEN[given]})


@parity
def test_a_layer_whose_probability_is_a_tensor(nn, optim):
    layers = [getattr(nn, name)(torch.tensor(0.5)) for name in ("Dropout", "Dropout2d")]
    return [layer(torch.ones(2, 3, 4, 5)) for layer in layers]
