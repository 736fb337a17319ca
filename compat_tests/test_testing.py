"""nnmirror.testing: wrong results and gradients fail with a helpful message, right ones pass.

The other tests rely on it: an error that it missed, they would miss too.
"""

import warnings

import pytest
import torch

import nnmirror
from nnmirror import testing
from nnmirror.testing import GradcheckError, Tolerance, assert_parity, assert_same, gradcheck


class Cube(nnmirror.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class TwoThirds(Cube):
    @staticmethod
    def backward(ctx, g):
        return Cube.backward(ctx, g) * 2 / 3


class OneElement(Cube):
    @staticmethod
    def backward(ctx, g):
        found = Cube.backward(ctx, g).clone()
        found[1] += 0.5
        return found


class WithoutG(Cube):
    @staticmethod
    def backward(ctx, g):
        return Cube.backward(ctx, torch.ones_like(g))


class Lost(Cube):
    @staticmethod
    def backward(ctx, g):
        return None


class Shape(Cube):
    @staticmethod
    def backward(ctx, g):
        return Cube.backward(ctx, g)[:1]


class Random(Cube):
    @staticmethod
    def backward(ctx, g):
        return Cube.backward(ctx, g) * (1 + 1e-9 * torch.rand_like(g))


class ChangesG(Cube):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g.mul_(3 * x**2)


class ChangesSaved(Cube):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return x.square_().mul_(3) * g


class ChangesInput(Cube):
    @staticmethod
    def forward(ctx, x):
        result = Cube.forward(ctx, x.clone())
        x.add_(1)
        return result


class Raises(Cube):
    @staticmethod
    def backward(ctx, g):
        raise KeyError("no such thing")


class SinglePrecision(Cube):
    @staticmethod
    def forward(ctx, x):
        return Cube.forward(ctx, x).float()


def x():
    return torch.tensor([1.0, 2.0], requires_grad=True)


WRONG = {
    TwoThirds: r"""the gradient of output\[1\] with respect to x\[1\] is wrong:
  expected 12 \(central differences\), found 8 \(the backward\), off by 4
  x: 2 of 4 entries of the Jacobian differ; found is 0\.667 times expected in all of them""",
    OneElement: r"gradient of output\[0\] with respect to x\[1\] is wrong:\n  expected 0 .*found 0\.5 ",
    WithoutG: r"respect to x\[1\] is wrong:\n  expected 0 \(central differences\), found 12 ",
    Lost: r"no gradient \(None\) for x: of output\[1\] with respect to x\[1\]\n  expected 12 ",
    Shape: r"backward of output raised .* got \[1\] but expected shape compatible with \[2\]",
    Random: r"backward of output differs from run to run: the gradient of x\[\d\] was .*, then",
    ChangesG: "backward of output changes in place the gradient that it is given",
    ChangesSaved: r"backward of output changes x in place: x\[0\] was 1, and is 3; let it compute",
    ChangesInput: r"forward of func changes x in place: x\[0\] was 1, and is 2; give it a copy",
    Raises: "backward of output raised KeyError: 'no such thing'",
    SinglePrecision: "output is of torch.float32, though all that func was given is of torch.fl",
}


@pytest.mark.parametrize("fast_mode", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_gradcheck_finds_a_wrong_backward(wrong, fast_mode):
    with pytest.raises(GradcheckError, match=WRONG[wrong]):
        gradcheck(wrong, x(), fast_mode=fast_mode)
    assert gradcheck(wrong, x(), fast_mode=fast_mode, raise_exception=False) is False
    assert gradcheck(Cube, x(), fast_mode=fast_mode) is True


def test_gradcheck_of_a_loss_whose_backward_ignores_its_gradient():
    """The Jacobian of a scalar uses a gradient of 1; gradcheck tries another gradient as well."""
    with pytest.raises(GradcheckError, match=r"is not linear .* of x should be 4\.\d+, found 3\."):
        gradcheck(WithoutG, torch.tensor(1.0, requires_grad=True))


def test_gradcheck_of_what_lost_its_graph():
    with pytest.raises(GradcheckError, match=r"output does not require grad.*\n  expected 2 "):
        gradcheck(lambda x: x.detach() * 2, x())
    assert gradcheck(lambda x: (x * 2, x.detach()), x()), "as by mark_non_differentiable"
    assert gradcheck(lambda x: (x * 0).detach(), x())


def test_gradcheck_says_that_it_was_asked_at_a_kink():
    with pytest.raises(GradcheckError, match="a kink or a jump: the slope on the left is 0, on"):
        gradcheck(torch.relu, torch.zeros(1, requires_grad=True))


class Scaled(nnmirror.Module):
    """A user-defined layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nnmirror.Parameter(torch.tensor([1.0, 2.0]))
        self.bias = nnmirror.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, input):
        return self.function.apply(input * self.weight) + self.bias


def test_gradcheck_of_a_module_names_the_parameter():
    with pytest.raises(GradcheckError) as found:
        gradcheck(Scaled(TwoThirds), torch.tensor([1.0, 1.0], requires_grad=True))
    assert str(found.value).splitlines() == [
        "the gradient of output[1] with respect to input[1] is wrong:",
        "  expected 24 (central differences), found 16 (the backward), off by 8",
        "  input: 2 of 4 entries of the Jacobian differ; found is 0.667 times expected in all of them",
        "  weight: 2 of 4 entries of the Jacobian differ; found is 0.667 times expected in all of them",
        "  right: bias",
    ]
    assert gradcheck(Scaled(Cube), torch.tensor([1.0, 1.0]))


def test_gradcheck_changes_nothing():
    net = nnmirror.Sequential(
        nnmirror.Linear(3, 4), nnmirror.BatchNorm1d(4), nnmirror.ReLU(True), nnmirror.Dropout(0.3)
    )
    net(torch.randn(4, 3)).sum().backward()
    given = torch.randn(4, 3, requires_grad=True)
    before = {n: t.clone() for n, t in [*net.state_dict().items(), ("given", given.detach())]}
    grads = [p.grad.clone() for p in net.parameters()]
    generator = torch.get_rng_state()
    assert gradcheck(net, given)
    assert gradcheck(net, (given,), fast_mode=True)
    assert_same({**net.state_dict(), "given": given.detach()}, before)
    assert_same([p.grad for p in net.parameters()], grads)
    assert given.grad is None
    assert torch.equal(torch.get_rng_state(), generator)


def test_gradcheck_of_several_inputs_and_outputs():
    def function(pair, *, factor=2.0):
        return {"sum": pair[0] + pair[1], "product": [pair[0] * pair[1] * factor]}

    given = [torch.randn(2, requires_grad=True), torch.randn(2, requires_grad=True)]
    assert gradcheck(function, (given,))
    with pytest.raises(GradcheckError, match=r"output\['b'\]\[1\] with respect to p\[1\]\[1\] is"):
        gradcheck(lambda p: {"a": Cube.apply(p[0]), "b": TwoThirds.apply(p[1])}, ([x(), x()],))
    targets = (torch.randn(3, 4, requires_grad=True), torch.tensor([0, 2, 3]))
    assert gradcheck(nnmirror.CrossEntropyLoss(), targets)


def test_gradcheck_refuses_what_it_cannot_check():
    for given in (torch.ones(2), (), (torch.ones(2), 3)):
        with pytest.raises(ValueError) as theirs:
            torch.autograd.gradcheck(torch.sin, given if given != () else (torch.ones(1),))
        with pytest.raises(ValueError) as ours:
            gradcheck(torch.sin, given)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(ValueError, match="complex inputs"):
        gradcheck(torch.sin, torch.ones(1, dtype=torch.complex64, requires_grad=True))
    with pytest.raises(ValueError, match="no floating-point tensor"):
        gradcheck(lambda x: x.argmax(), x())


# -- assert_parity -----------------------------------------------------------------------


def test_parity_of_equal_functions():
    given = torch.randn(4, 3, requires_grad=True)
    for name, args in {"Linear": (3, 2), "BatchNorm1d": (3,), "LayerNorm": (3,)}.items():
        ours, theirs = (getattr(library, name)(*args) for library in (nnmirror, torch.nn))
        ours.load_state_dict(theirs.state_dict())
        assert_parity(ours, theirs, given)
        assert all(p.grad is None for p in [given, *ours.parameters(), *theirs.parameters()])
    for name in ("Tanh", "Dropout", "MSELoss"):
        args = (given, torch.zeros(4, 3)) if name == "MSELoss" else (given,)
        ours, theirs = (getattr(library, name)() for library in (nnmirror, torch.nn))
        assert_parity(ours, theirs, *args)
    assert_parity(nnmirror.ReLU(inplace=True), torch.nn.ReLU(inplace=True), given)
    assert_parity(Cube, lambda x: x**3, given, rtol=1e-6)
    assert_parity(nnmirror.functional.tanh, torch.tanh, given)
    assert_parity(torch.softmax, torch.softmax, given, kwargs={"dim": 1})
    assert_parity(nnmirror.functional.one_hot, torch.nn.functional.one_hot, torch.tensor([0, 2]))


def cube(x):
    return x**3


@pytest.mark.parametrize("wrong", [TwoThirds, OneElement, WithoutG, Lost, Shape, ChangesInput])
def test_parity_finds_a_wrong_function(wrong):
    messages = {
        TwoThirds: r"gradient of x differs in 2 of 2 elements \(allowed: not a bit\)\n.*at \[0\]: ",
        OneElement: r"gradient of x differs in 1 of 2 elements .*\n.* at \[1\]: .* off by 0\.5 ",
        WithoutG: "gradient of x differs in 2 of 2",
        Lost: "gradient of x: expected a tensor, found None",
        Shape: r"got \[1\] but expected shape compatible with \[2\]",
        ChangesInput: r"x after the call differs in 2 of 2.*\n.*expected 1\.0, found 2\.0, off by 1",
    }
    error = RuntimeError if wrong is Shape else AssertionError
    with pytest.raises(error, match=messages[wrong]):
        assert_parity(wrong, cube, x())


def test_parity_finds_a_loss_whose_backward_ignores_its_gradient():
    with pytest.raises(AssertionError, match=r"gradient of x from -?\d\.\d+ \* output differs"):
        assert_parity(WithoutG, Cube.apply, torch.tensor(1.0, requires_grad=True))


class TheirScaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.bias = torch.nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, input):
        return (input * self.weight) ** 3 + self.bias


def test_parity_of_a_module_names_the_parameter():
    given = torch.tensor([1.0, 1.0])
    assert_parity(Scaled(Cube), TheirScaled(), given)
    with pytest.raises(AssertionError, match="gradient of weight differs in 2 of 2 elements"):
        assert_parity(Scaled(TwoThirds), TheirScaled(), given)


def test_parity_of_the_state():
    given = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(AssertionError, match=r"before the call, state_dict\['weight'\]") as found:
        assert_parity(nnmirror.Linear(3, 2), torch.nn.Linear(3, 2), given)
    assert "ours.load_state_dict(theirs.state_dict())" in found.value.__notes__[0]
    with pytest.raises(AssertionError, match=r"after the call, state_dict\['running_mean'\] diff"):
        assert_parity(nnmirror.BatchNorm1d(3), torch.nn.BatchNorm1d(3, momentum=0.2), given)
    frozen = nnmirror.LayerNorm(3)
    frozen.bias.requires_grad = False
    with pytest.raises(AssertionError, match=r"requires_grad\['bias'\]: expected True, found F"):
        assert_parity(frozen, torch.nn.LayerNorm(3), given)
    with pytest.raises(AssertionError, match="other random numbers were drawn"):
        assert_parity(lambda x: x * 1, lambda x: x * torch.rand(1).sign(), given)
    with pytest.raises(AssertionError, match="output differs"):
        assert_parity(nnmirror.Dropout(0.5), torch.nn.Dropout(0.2), given)


def test_parity_of_errors_and_warnings():
    given = torch.randn(4, 3, requires_grad=True)
    ours, theirs = (library.MSELoss(reduction="all") for library in (nnmirror, torch.nn))
    assert_parity(ours, theirs, given, given, raises=ValueError)
    # A mistake in the test itself would otherwise pass it.
    with pytest.raises(AssertionError, match=r"both raised ValueError\(.*say raises=ValueError"):
        assert_parity(ours, theirs, given, given)
    with pytest.raises(AssertionError, match=r"both raised ValueError\("):
        assert_parity(ours, theirs, given, given, raises=TypeError)
    with pytest.raises(AssertionError, match=r"expected ValueError, but neither raised one"):
        assert_parity(nnmirror.Tanh(), torch.tanh, given, raises=ValueError)
    with pytest.raises(AssertionError, match=r"expected ValueError.*, but none was raised"):
        assert_parity(nnmirror.MSELoss(), theirs, given, given)
    with pytest.raises(ValueError, match="all is not a valid value") as found:
        assert_parity(ours, torch.nn.MSELoss(), given, given)
    assert "no error was expected" in found.value.__notes__[0]
    with pytest.raises(AssertionError, match=r"expected ValueError.*found RuntimeError"):
        assert_parity(lambda x: x @ x, lambda x: theirs(x, x), given)
    with pytest.raises(AssertionError, match=r"warnings: expected \[\('UserWarning', 'slow'\)\], "):
        assert_parity(lambda x: x * 2, warning_of_it, given)


def warning_of_it(x):
    warnings.warn("slow")
    return x * 2


def test_parity_refuses_what_it_cannot_compare():
    given = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"no input requires grad.*check_backward=False"):
        assert_parity(nnmirror.Tanh(), torch.nn.Tanh(), given)
    assert_parity(nnmirror.Tanh(), torch.nn.Tanh(), given, check_backward=False)
    assert_parity(nnmirror.Tanh(), torch.tanh, given.requires_grad_())
    with pytest.raises(TypeError, match="Linear is a module with parameters, cube is none"):
        assert_parity(nnmirror.Linear(3, 2), cube, given)
    with pytest.raises(ValueError, match="rtol and atol, or units; not both"):
        assert_parity(nnmirror.Tanh(), torch.nn.Tanh(), given, rtol=1.0, units=2)


@pytest.mark.by_default
def test_parity_by_default_is_within_some_units_and_says_so():
    given = torch.randn(4, 3, requires_grad=True)
    ours, theirs = nnmirror.LayerNorm(3), torch.nn.LayerNorm(3)
    with pytest.raises(AssertionError, match="gradient of input differs in") as found:
        assert_parity(ours, theirs, given)
    assert "nnmirror.exact" in found.value.__notes__[0]
    assert_parity(ours, theirs, given, units=64)
    assert_parity(ours, theirs, given, rtol=1e-3, atol=1e-5)
    with nnmirror.exact():
        assert_parity(ours, theirs, given)


# -- assert_same ---------------------------------------------------------------------------


def test_the_message_says_where_and_by_how_much():
    expected = torch.tensor([[1.0, 0.1], [float("nan"), 4.0]])
    actual = torch.tensor([[1.0, 0.1 + 1e-8], [float("nan"), -4.0]])
    with pytest.raises(AssertionError) as found:
        assert_same({"a": [actual]}, {"a": [expected]}, "made")
    assert str(found.value).splitlines() == [
        "made['a'][0] differs in 2 of 4 elements (allowed: not a bit)",
        "  the first: at [0, 1]: expected 0.1, found 0.10000001, off by 7.45e-09 (0.016 units in the"
        " last place)",
        "  the furthest off: at [1, 1]: expected 4.0, found -4.0, off by 8 (1.7e+07 units in the last"
        " place)",
    ]


NAN, INF, ZERO = float("nan"), float("inf"), 0.0
SOME = [{"rtol": 1e-3}, {"atol": 1e-3}, {"units": 1e3}]


@pytest.mark.parametrize(
    ("expected", "actual", "enough", "too_little"),
    [
        (0.0, -0.0, SOME, []),
        (1.0, 1.00001, SOME, [{"rtol": 1e-6}, {"atol": 1e-6}, {"units": 2}]),
        (0.0, 1e-6, [{"atol": 1e-5}, {"units": 20}], [{"rtol": 1.0}, {"units": 5}]),
        (NAN, 0.0, [], SOME),
        (0.0, NAN, [], SOME),
        (INF, 3e38, [], SOME),
        (3e38, INF, [], SOME),
        (INF, -INF, [], SOME),
        (1.7e38, -1.7e38, [], SOME),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_a_difference_is_one_unless_it_is_allowed(expected, actual, enough, too_little, dtype):
    e, a = (torch.tensor([1.0, value], dtype=dtype) for value in (expected, actual))
    assert_same(e.clone(), e)
    with pytest.raises(AssertionError, match=r"differs in 1 of 2 elements.*\n  at \[1\]: expected"):
        assert_same(a, e)
    scale = 2**29 if dtype is torch.float64 else 1  # units in the last place of float64
    for allowed in enough:
        units = {"units": allowed["units"] * scale} if "units" in allowed else {}
        assert_same(a, e, tolerance=Tolerance(**allowed | units))
    for allowed in too_little:
        with pytest.raises(AssertionError):
            assert_same(a, e, tolerance=Tolerance(**allowed))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.ones(2), torch.ones(2, 1)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), torch.ones(2, requires_grad=True)),
        (torch.ones(2), None),
        (None, torch.ones(2)),
        (torch.ones(()), 1.0),
        (1.0, torch.ones(())),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        ([1.0], [1.0, 2.0]),
        ([1.0], (1.0,)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 2}),
        (ZERO, -ZERO),
        (1.0, 1.5),
        (1, 1.5),
        (1.0, 1),
        (1, True),
        ("a", "b"),
        (3, "b"),
    ],
)
def test_what_is_not_the_same(actual, expected):
    with pytest.raises(AssertionError):
        assert_same(actual, expected)
    if actual is not ZERO:
        with pytest.raises(AssertionError):
            assert_same([actual], [expected], tolerance=Tolerance(units=1e-3))


def test_a_gradient_is_compared_with_its_tensor():
    pair = [torch.ones(2, requires_grad=True) for _ in range(2)]
    pair[0].grad = torch.ones(2)
    for ours, theirs in (pair, pair[::-1]):
        with pytest.raises(AssertionError, match=r"p\.grad: expected"):
            assert_same(ours, theirs, "p")
    pair[1].grad = torch.ones(2) * 2
    with pytest.raises(AssertionError, match=r"p\.grad differs in 2 of 2"):
        assert_same(*pair, "p")


def test_names_of_the_two_libraries_are_the_same_in_a_text():
    assert_same("nnmirror.Linear(2, 3)", "torch.nn.Linear(2, 3)")
    assert_same(f"at {object()!r}", f"at {object()!r}")
    assert testing.normal("nnmirror.optim.SGD") == testing.normal("torch.optim.SGD")
