"""Every operation of PyTorch on a tensor that requires grad: the same bits, or refused.

An operation that silently lost its gradient would train a net as if the layers before it were
frozen.

PyTorch's own table of operations has sample arguments for about 700 of them; each is called as a
function, as a method and in place. The other functions of `torch`, `torch.Tensor`,
`torch.nn.functional`, `torch.linalg`, `torch.fft` and `torch.special` are called with guessed
arguments.
"""

import inspect
import itertools
import warnings

import pytest
import torch
from torch.testing._internal import common_utils
from torch.testing._internal.common_methods_invocations import op_db

import nnmirror
from nnmirror.tape import tensors_in

from .parity import normal, same_bits, units_apart

# Gradients that PyTorch rounds differently: by how much at most (relative; above 1: in units in the
# last place of the largest), and why.
CLOSE = {
    "nn.functional.softplus": (5e-7, "its kernel's exp of positive numbers is no tensor operation"),
    "nn.functional.mish": (5e-4, "its kernel's exp, log1p and tanh are no tensor operations"),
    "nn.functional.gelu": (5e-4, "its kernel's erf and tanh are no tensor operations"),
    **{
        f"nn.functional.{name}": (16, "its kernel adds place by place, the rule by matrices")
        for name in (
            "upsample_bilinear",
            *[f"interpolate {mode}" for mode in ("linear", "bilinear", "bicubic", "trilinear")],
        )
    },
    **{
        f"nn.functional.conv{turned}{n}d": (64, "oneDNN adds the gradients up in its own order")
        for turned in ("", "_transpose")
        for n in (1, 2, 3)
    },
    "nn.functional.group_norm": (64, "in several threads its kernel adds in another order"),
}
DTYPES = {torch.float32: 25, torch.float64: 5, torch.bfloat16: 5, torch.float16: 5}
# For each set of samples PyTorch searches the stack for a TestCase, of which there is none here;
# that takes longer than most tests.
common_utils.extract_test_fn = lambda: None
OPS = {f"{op.name} {op.variant_test_name}".strip(): op for op in op_db if op.supports_autograd}


def at_most(most, samples):
    """At most so many samples; the others are not generated."""
    return list(itertools.islice(samples, most))


def mapped(value, change):
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return value


def with_leaves(nn, args, kwargs):
    """Copies of the arguments, those that require grad as parameters, and these parameters."""
    leaves = []

    def leaf(t):
        if not t.requires_grad:
            return t.clone()
        leaves.append(nn.Parameter(t.detach().clone()))
        return leaves[-1]

    return mapped(list(args), leaf), mapped(kwargs, leaf), leaves


def attempt(nn, function, args, kwargs, inplace=False):
    """The outcome of a call: its error, or its results, which require grad, and the gradients."""
    torch.manual_seed(0)
    args, kwargs, leaves = with_leaves(nn, args, kwargs)
    if inplace:  # on the result of an operation, as a leaf may not be changed in place
        args[0] = nn.functional.leaky_relu(args[0], 1.0)
    try:
        made = [t for t in tensors_in(function(*args, **kwargs)) if t.layout is torch.strided]
        for t in made:
            if t.requires_grad:
                t.backward(torch.ones_like(t) * 0.7 + t.detach() * 0.1, retain_graph=True)
    except Exception as e:
        return e, None, None, None
    return (
        None,
        [t.detach() for t in made],
        [t.requires_grad for t in made],
        [p.grad for p in leaves],
    )


def alike(expected, actual, tolerance=0.0):
    if expected is None or actual is None:
        return expected is actual
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if tolerance > 1:
        return units_apart(expected, actual) <= tolerance
    if tolerance:
        return torch.allclose(expected, actual, rtol=tolerance, atol=0, equal_nan=True)
    return same_bits(expected, actual)


def refused(error):
    return error is not None and "nnmirror" in str(error)


def compare(name, function, args, kwargs, inplace=False, tolerance=0.0):
    """Call it on both backends and compare. True if the mirror refused."""
    expected = attempt(torch.nn, function, args, kwargs, inplace)
    actual = attempt(nnmirror, function, args, kwargs, inplace)
    if refused(actual[0]):
        return True
    if expected[0] is not None or actual[0] is not None:
        assert type(expected[0]) is type(actual[0]), f"{expected[0]!r} | {actual[0]!r}"
        assert normal(str(expected[0])) == normal(str(actual[0]))
        return False
    assert expected[2] == actual[2], f"{name}: requires grad {expected[2]} | {actual[2]}"
    for e, a in zip(expected[1], actual[1], strict=True):
        assert alike(e, a), f"{name}: {e} | {a}"
    for e, a in zip(expected[3], actual[3], strict=True):
        assert alike(e, a, tolerance), f"{name}, gradient: {e} | {a}"
    return False


@pytest.mark.parametrize("name", OPS)
def test_every_operation_of_pytorchs_table(name):
    op = OPS[name]
    tolerance = CLOSE.get(name, CLOSE.get(op.name, (0.0, "")))[0]
    for dtype, most in DTYPES.items():
        if dtype not in op.supported_dtypes("cpu"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sample in at_most(most, op.sample_inputs("cpu", dtype, requires_grad=True)):
                args, kwargs = (sample.input, *sample.args), sample.kwargs
                if any(t.layout is not torch.strided for t in tensors_in([args, kwargs])):
                    continue
                for function in {op.op, op.get_method()} - {None}:
                    compare(name, function, args, kwargs, tolerance=tolerance)
                change, first = op.get_inplace(), sample.input
                if change is not None and isinstance(first, torch.Tensor) and first.requires_grad:
                    compare(name, change, args, kwargs, inplace=True, tolerance=tolerance)


def of_complex(op):
    """Complex arguments that all require grad, and one real one among complex ones that do not."""
    for sample in at_most(5, op.sample_inputs("cpu", torch.complex64, requires_grad=True)):
        given = [sample.input, *sample.args], sample.kwargs
        if any(t.layout is not torch.strided for t in tensors_in(given)):
            continue
        yield given
        several = [t for t in tensors_in(given) if t.is_complex()]
        for chosen in several if len(several) > 1 else ():

            def one_real(t, chosen=chosen):
                return t.detach().real.clone().requires_grad_() if t is chosen else t.detach()

            yield mapped(given, one_real)


@pytest.mark.parametrize(
    "name", [name for name, op in OPS.items() if torch.complex64 in op.supported_dtypes("cpu")]
)
def test_complex_numbers(name):
    """A complex gradient takes the conjugate, which a rule for real numbers would leave out."""
    op = OPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for args, kwargs in of_complex(op):
            for function in {op.op, op.get_method()} - {None}:
                compare(name, function, args, kwargs)
            change, first = op.get_inplace(), args[0]
            if change is None or not isinstance(first, torch.Tensor):
                continue
            if not (first.is_complex() and first.requires_grad):  # a leaf may not be changed
                compare(name, change, args, kwargs, inplace=first.requires_grad)


def guesses(x):
    """Lists of arguments, of which most functions take one."""
    other = x.detach().clone().requires_grad_()
    index = torch.tensor([1, 0])
    return [
        (x,), (x, other), (x, 1), (x, 0, 1), (x, 2.0), (x, (1, 0)), (x, other, other), ([x, other],),
        (x, 0, index), (x, x.detach() > 0), (x, x.detach() > 0, 1.0), (x, 0, 0, 1), (x, torch.float64),
        (x[0], other[0]), (x, other[0]), (x, index), (x, 0, index, other),
    ]  # fmt: skip


def untried():
    """Functions that can be given a tracked tensor and are not in PyTorch's table."""
    tried = {id(f) for op in op_db for f in (op.op, op.get_method(), op.get_inplace())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spaces = torch.overrides.get_overridable_functions()
    for space, functions in spaces.items():
        for function in functions:
            named = torch.overrides.resolve_name(function)
            if id(function) not in tried and named and not inspect.isclass(function):
                place = getattr(space, "__name__", type(space).__name__)
                yield f"{place}: {named}", function


UNTRIED = dict(untried())
# These functions pass a gradient on or read attributes: test_tape.py tests them.
PROTOCOL = (
    "backward",
    "register",
    "requires_grad",
    "retain",
    "grad",
    "__get__",
    "_backward",
    "is_leaf",
)


@pytest.mark.parametrize("name", UNTRIED)
def test_no_other_function_loses_a_gradient(name):
    function = UNTRIED[name]
    if any(word in name for word in PROTOCOL):
        pytest.skip("about gradients themselves")
    for k in range(len(guesses(torch.ones(2, 2, requires_grad=True)))):
        results = []
        for nn in (torch.nn, nnmirror):
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x = nn.functional.leaky_relu(nn.Parameter(torch.rand(2, 2) * 0.8 + 0.1), 1.0)
                try:
                    made = function(*guesses(x)[k])
                    if made is NotImplemented:
                        raise TypeError("NotImplemented")
                    results.append([t.requires_grad for t in tensors_in(made)])
                except Exception as e:
                    # The frames of its traceback would keep alive what PyTorch undoes when they are
                    # freed: repr() turns torch.func off meanwhile.
                    results.append(e.with_traceback(None))
        expected, actual = results
        if isinstance(expected, Exception) or isinstance(actual, Exception):
            continue
        assert expected == actual, f"{name} of argument list {k}: requires_grad"
