"""torch's operations with arguments that PyTorch's OpInfo table does not sample, such as inf."""

import warnings

import numpy as np
import pytest
import torch

import nnmirror

from .parity import parity
from .test_layers import DTYPES, SPECIAL


def both_ways(nn, function, *values):
    """Results, node names and gradients, for contiguous and for transposed inputs."""
    outcomes = []
    for turned in (False, True):
        leaves = [nn.Parameter(v.t() if turned and v.dim() == 2 else v) for v in values]
        try:
            made = function(*leaves)
            made = made if isinstance(made, tuple) else (made,)
            names = [z.grad_fn.name() for z in made if z.requires_grad]
            total = sum(
                (z * torch.randn(z.shape).to(z.dtype)).sum() for z in made if z.requires_grad
            )
            total.backward()
        except (RuntimeError, IndexError, ValueError) as e:
            outcomes.append(str(e).split("\n")[0])
            continue
        outcomes.append((names, made, leaves))
    return outcomes


# Pointwise functions, called within their domain and at its ends.
POINTWISE = {
    "real": torch.real,
    "conj": lambda x: x.conj() + x.resolve_conj(),
    "resolve_neg": torch.resolve_neg,
    **{name: getattr(torch, name) for name in (
        "lgamma", "digamma", "erf", "erfc", "erfinv", "asinh", "acosh", "atanh", "logit", "sinc",
        "deg2rad", "rad2deg", "nan_to_num",
    )},
    "polygamma": lambda x: torch.polygamma(2, x),
    "logit 0.3": lambda x: torch.logit(x, 0.3),
    "logit 0": lambda x: torch.logit(x, eps=0.0),
    "nan_to_num 1": lambda x: x.nan_to_num(1.0, 2.0, neginf=-2.0),
    "xlogy": lambda x: torch.xlogy(x, x),
    "xlogy 2": lambda x: torch.xlogy(2.0, x) + torch.xlogy(x, 2.0),
    "xlogy 0": lambda x: torch.xlogy(0.0, x) + torch.xlogy(x, 0.0),
    "logaddexp": lambda x: torch.logaddexp(x, x * 2) + torch.logaddexp2(x, -x),
    "hypot": lambda x: torch.hypot(x, x * 0.5),
    "fmax": lambda x: torch.fmax(x, x.flip(0)) + torch.fmin(x, x * 0.5),
    "special": lambda x: torch.special.expit(x) + torch.special.exp2(x) + torch.special.expm1(x)
    + torch.special.log1p(x.abs()) + torch.special.gammaln(x.abs() + 1) + torch.special.erfc(x)
    + torch.special.sinc(x) + torch.special.psi(x.abs() + 1) + torch.special.erf(x),
    "in place": lambda x: (x * 1).lgamma_() + (x * 1).sinc_() + (x * 1).nan_to_num_() + (x * 1).erfc_()
    + (x * 1).logit_(0.2) + (x * 1).xlogy_(x) + (x * 1).hypot_(x) + (x * 1).deg2rad_(),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POINTWISE)
@parity
def test_pointwise(nn, optim, name, dtype):
    function = POINTWISE[name]
    special = torch.tensor([*SPECIAL, 0.5, -0.5, 0.3, 0.7, 2.0, -2.0, 3.0, 1e-3]).to(dtype)
    return [
        both_ways(nn, function, x.to(dtype))
        for x in (
            torch.rand(4, 9),
            3 * torch.randn(7, 5),
            special,
            special.repeat(9),
            torch.rand(()),
        )
    ]


NOT_DIFFERENTIABLE = {  # not differentiable in PyTorch either
    "x // y": lambda x, y: x // y,
    "x // 0.5": lambda x, y: x // 0.5,
    "5 // x": lambda x, y: 5 // x,
    "5 % x": lambda x, y: 5 % x,
    "torch.remainder(5, x)": lambda x, y: torch.remainder(5, x),
    "torch.floor_divide(x, y)": torch.floor_divide,
}


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
@parity
def test_a_result_without_a_derivative_raises_in_backward_only(nn, optim, name):
    """Forward works with grad mode on, as in `grid[(x // 0.1).long()]`; backward raises."""
    x, y = (
        nn.Parameter(torch.tensor([1.5, -2.0, 0.7])),
        nn.Parameter(torch.tensor([0.4, 0.3, -0.2])),
    )
    z = NOT_DIFFERENTIABLE[name](x, y)
    outcome = [z, (z.detach() + 1).long(), z.requires_grad]
    try:
        z.sum().backward()
    except RuntimeError as e:
        outcome.append(str(e))
    return outcome, x.grad, y.grad


A = torch.tensor
ALONG = {  # functions along a dimension or of a matrix
    "cumprod": lambda x: x.cumprod(-1),
    "cumprod 0": lambda x: torch.cumprod(x, 0),
    "cumprod in place": lambda x: (x * 1).cumprod_(0),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 0),
    "cummax": lambda x: torch.cummax(x, 0),
    "cummin": lambda x: tuple(x.cummin(-1)),
    "kthvalue": lambda x: torch.kthvalue(x, 2, 0, keepdim=True),
    "var_mean": lambda x: torch.var_mean(x),
    "var_mean 0": lambda x: torch.var_mean(x, 0, unbiased=False),
    "var alone": lambda x: torch.var_mean(x, dim=-1, correction=0, keepdim=True)[0],
    "mean alone": lambda x: torch.var_mean(x, dim=0)[1],
    "std_mean": lambda x: torch.std_mean(x, -1),
    "std_mean of all": lambda x: torch.std_mean(x, unbiased=False),
    "nansum": lambda x: x.nansum() + x.nansum(0).sum() + torch.nansum(x, -1, True).sum(),
    "nanmean": lambda x: x.nanmean() + torch.nanmean(x, 0).sum(),
    "dist": lambda x: torch.dist(x, x * 0.5) + x.dist(x.flip(0), 1) + torch.dist(x, x, 3),
    "diag": lambda x: (x.diag(), x.diag(1), torch.diag(x, -1)),
    "diag of a row": lambda x: (torch.diag(x[0]), x[0].diag(1), torch.diagflat(x, -1)),
    "diag_embed": lambda x: (torch.diag_embed(x), x.diag_embed(1, 0, 2)),
    "trace": lambda x: x.trace() + torch.trace(x[:, :1]) + torch.trace(x[:1]),
    "unfold": lambda x: (x.unfold(0, 2, 1), x.unfold(-1, 3, 2), x.unfold(1, 1, 1)),
    "unfold changed": lambda x: (x * 1).unfold(0, 2, 2).mul_(2),
    "kron": lambda x: (torch.kron(x, x), x.kron(x[0]), torch.kron(x[0], torch.ones(2, 1, 2).to(x.dtype))),
    "repeat_interleave": lambda x: (
        x.repeat_interleave(2), torch.repeat_interleave(x, 3, 0), x.repeat_interleave(0, -1)),
    "repeat_interleave of tensors": lambda x: (
        x.repeat_interleave(A([1] * len(x)), 0), torch.repeat_interleave(x, A(2), dim=1),
        torch.repeat_interleave(x, A([0, 2] + [1] * (x.shape[1] - 2)), 1)),
    "diff": lambda x: (x.diff(), torch.diff(x, 2, 0), torch.diff(x, prepend=x[:, :1], append=x), x.diff(n=0)),
    "tensordot": lambda x: (
        torch.tensordot(x, x, 2), torch.tensordot(x, x, ([0], [0])), torch.tensordot(x, x, 0),
        torch.tensordot(x, x[:1], dims=([1], [1])), torch.tensordot(x.unsqueeze(0), x, [[2, 0], [1, 0]])),
    "norms": lambda x: tuple(
        torch.linalg.norm(x, ord) for ord in (None, "fro", 1, -1, float("inf"), float("-inf"))),
    "norms along": lambda x: tuple(
        torch.linalg.norm(x, ord, dim=0) for ord in (None, 0, 1, 2, 3, 0.5, float("inf"))),
    "norms of matrices": lambda x: (
        torch.linalg.matrix_norm(x.expand(3, *x.shape), 1), torch.linalg.matrix_norm(x, keepdim=True),
        torch.linalg.matrix_norm(x.unsqueeze(1), float("inf"), (2, 0)), torch.linalg.norm(x, 1, (1, 0), True)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALONG)
@parity
def test_along_a_dimension(nn, optim, name, dtype):
    zeros = torch.randn(6, 5)
    zeros[1, 2] = zeros[3, 2] = zeros[0, 0] = zeros[5, 1] = zeros[2, 4] = 0
    special = A([[float("nan"), 1.0, -1.0], [float("inf"), 2.0, 0.0], [0.0, -0.0, float("nan")]])
    values = (torch.randn(6, 5), torch.randn(3, 70), zeros, torch.ones(2, 3), special)
    return [both_ways(nn, ALONG[name], x.to(dtype)) for x in values]


INDEX = A([[0, 3], [3, -1]])
SHAPED = {  # functions of operands of these shapes
    "meshgrid": (lambda x, y, z: torch.meshgrid(x, y, z, indexing="ij"), (3,), (4,), (2,)),
    "meshgrid xy": (lambda x, y: torch.meshgrid([x, y], indexing="xy"), (3,), (4,)),
    "meshgrid of one": (lambda x: torch.meshgrid(x, x), (3,)),
    "aminmax": (lambda x: torch.aminmax(x.round()), (5, 6)),
    "aminmax along": (lambda x: x.round().aminmax(dim=0, keepdim=True), (5, 6)),
    "aminmax, one of them": (lambda x: x.aminmax(dim=-1).max, (5, 6)),
    "inner": (lambda x, y: (torch.inner(x, y), y.inner(x)), (5, 6), (2, 3, 6)),
    "inner of vectors": (lambda x, y: torch.inner(x, y), (70,), (70,)),
    "inner of a number": (lambda x, y: x.sum().inner(y), (2,), (2, 3)),
    "float_power": (
        lambda x, y: (torch.float_power(x.abs(), y), x.float_power(3), torch.float_power(2, y)), (5, 6), (6,)),
    "float_power in place": (lambda x: x.double().mul(2).float_power_(3), (5, 6)),
    "take": (lambda x: (torch.take(x, INDEX), x.take(INDEX[0])), (5, 6)),
    "put": (lambda x, y: (x.put(INDEX[:1], y), x.put(INDEX[1:], y, accumulate=True)), (5, 6), (1, 2)),
    "put in place": (lambda x, y: (x * 1).put_(INDEX[0], y), (5, 6), (2,)),
    "type": (
        lambda x: [x.type(kind) for kind in (torch.float64, "torch.DoubleTensor", torch.HalfTensor)], (5, 6)),
    "type, nothing to do": (lambda x: (x.type(torch.float32) + 1, x.type("torch.FloatTensor") * 2), (5, 6)),
    "glu": (lambda x: (torch.nn.functional.glu(x, 0), torch.nn.functional.glu(x)), (6, 70)),
}  # fmt: skip


@parity
def test_the_type_of_a_tensor(nn, optim):
    x = nn.Parameter(torch.randn(3)) * 2
    whole = x.type(torch.int64)
    return x.type(), whole, whole.requires_grad, x.type(torch.float64).grad_fn.name()


EQUATIONS = {
    "ij,jk,kl->il": ((2, 3), (3, 4), (4, 5)),
    "bi,ijk,bj->bk": ((2, 3), (3, 4, 5), (2, 4)),
    "bn,anm,bm->ba": ((2, 5), (3, 5, 4), (2, 4)),
    "ij,ij,ij->": ((3, 4),) * 3,
    "i,j,k->kji": ((2,), (3,), (4,)),
    "i,i,i,i->i": ((3,),) * 4,
    "ijkl,jm,kn,lo->imno": ((2, 3, 4, 5), (3, 2), (4, 3), (5, 2)),
    "abc,cd,def->abef": ((2, 3, 4), (4, 5), (5, 2, 3)),
    "ij,jk,kl": ((2, 3), (3, 4), (4, 5)),
    "...ij,...jk->...ik": ((2, 3, 4), (5, 1, 4, 3)),
    "ab...,b...->a...": ((2, 3, 4, 5), (3, 4, 5)),
    "a...b,...b,b->a...": ((2, 3, 4, 5), (4, 5), (5,)),
    "...,...": ((2, 3), (3,)),
    "...,i->i": ((2, 3), (4,)),
    "ii->i": ((4, 4),),
    "ii": ((4, 4),),
    "iij,j->i": ((3, 3, 4), (4,)),
    "iji->j": ((3, 4, 3),),
    "Ab,bC": ((2, 3), (3, 4)),
    "bhqd,bhkd->bhqk": ((2, 3, 4, 5), (2, 3, 6, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SHAPED)
@parity
def test_shaped(nn, optim, name, dtype):
    function, *shapes = SHAPED[name]
    return both_ways(nn, function, *[torch.randn(shape, dtype=dtype) for shape in shapes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("equation", EQUATIONS)
@parity
def test_einsum(nn, optim, equation, dtype):
    values = [torch.randn(shape, dtype=dtype) for shape in EQUATIONS[equation]]
    return both_ways(nn, lambda *given: torch.einsum(equation, *given), *values)


@parity
def test_einsum_with_lists_for_an_equation(nn, optim):
    x, y, z = [nn.Parameter(torch.randn(3, 3)) for _ in range(3)]
    made = torch.einsum(x, [0, 1], y, [1, 2], z, [2, 3], [0, 3])
    (made + torch.einsum(x, [..., 0, 1], y, [..., 1, 2])).sum().backward()
    return made, x, y, z


class Contractor:
    """Stands in for opt_einsum, from which PyTorch gets the order of contraction."""

    @staticmethod
    def contract_path(equation, *operands, optimize):
        return [(1, 2), (0, 1)], None


@parity
def test_einsum_contracts_in_the_order_of_opt_einsum(nn, optim):
    known, values = (
        torch.backends.opt_einsum,
        [torch.randn(3, 40), torch.randn(40, 50), torch.randn(50, 2)],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "_opt_einsum", Contractor)
        patch.setattr(known, "is_available", lambda: True)
        patch.setattr(known, "get_opt_einsum", lambda: Contractor)
        return both_ways(nn, lambda *given: torch.einsum("ij,jk,kl", *given), *values)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@parity
def test_a_mask_without_dimensions(nn, optim, shape):
    """It adds a dimension: `losses[losses > 0]` for one loss."""
    x = nn.Parameter(torch.randn(shape))
    parts = [(x * 2)[torch.tensor(b)] for b in (True, False)]
    sum(p.square().sum() for p in parts).backward()
    return parts, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
@parity
def test_scatter_reduce_and_index_reduce(nn, optim, reduce, include_self, dtype):
    """Also with zeros, a special case in the gradient of "prod", and ties for amax and amin."""
    more = {"reduce": reduce, "include_self": include_self}
    index = torch.randint(0, 4, (6, 5))

    def put(x, y):
        made = (
            x.scatter_reduce(0, index, y, **more),
            torch.scatter_reduce(x, 0, index[:, :3], y[:, :3], **more),
        )
        changed = (x * 1).scatter_reduce_(0, index, y.round(), **more)
        if reduce == "sum":
            return *made, changed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # index_reduce is in beta
            return *made, changed, x.index_reduce(0, index[:, 0], y, **more)

    x, y = torch.randn(4, 5, dtype=dtype), torch.randn(6, 5, dtype=dtype)
    x[x.abs() < 0.4] = 0
    y[y.abs() < 0.4] = 0
    return both_ways(nn, put, x, y), both_ways(nn, put, x.round(), y.round())


RANDOM = {
    "normal": lambda m, s: torch.normal(m, s.abs()),
    "normal of numbers": lambda m, s: torch.normal(m, 2.0) + torch.normal(1.0, s.abs()) + torch.normal(m),
    "bernoulli": lambda m, s: torch.bernoulli(m.sigmoid()) + s.sigmoid().bernoulli(),
    "bernoulli in place": lambda m, s: (m * 1).bernoulli_(0.3) + (m * 1).bernoulli_(s.sigmoid()) + (s * 1).bernoulli_(),
    "bernoulli of a number": lambda m, s: torch.bernoulli(m, 0.3),
    "poisson": lambda m, s: torch.poisson(s.abs()) + m * 0,
    "gumbel_softmax": lambda m, s: torch.nn.functional.gumbel_softmax(m, 0.7) * s,
    "gumbel_softmax hard": lambda m, s: torch.nn.functional.gumbel_softmax(m, hard=True, dim=0) * s,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RANDOM)
@parity
def test_random_operations(nn, optim, name, dtype):
    """The same random numbers from the same seed; gradients are zeros, not None, as in PyTorch."""
    return both_ways(
        nn, RANDOM[name], torch.randn(6, 70, dtype=dtype), torch.randn(6, 70, dtype=dtype)
    )


WRONG = {
    "normal out": lambda x: torch.normal(x, 1.0, out=torch.empty(3)),
    "normal spread": lambda x: torch.normal(x, -1.0),
    "bernoulli range": lambda x: torch.bernoulli(x + 5),
    "meshgrid of a matrix": lambda x: torch.meshgrid(x[None], x),
    "meshgrid indexing": lambda x: torch.meshgrid(x, x, indexing="ab"),
    "aminmax by position": lambda x: torch.aminmax(x, 0),
    "inner sizes": lambda x: torch.inner(x, x[:2]),
    "inner of a float": lambda x: torch.inner(x, 2.0),
    "float_power text": lambda x: torch.float_power(x, "2"),
    "float_power in place": lambda x: (x * 1).float_power_(2),
    "take range": lambda x: torch.take(x, A([7])),
    "take of floats": lambda x: torch.take(x, x),
    "put sizes": lambda x: x.put(A([1]), x),
    "scatter_reduce name": lambda x: x.scatter_reduce(0, A([0, 1]), x, "median"),
    "scatter_reduce missing": lambda x: torch.scatter_reduce(x, 0, A([0, 1])),
    "einsum sizes": lambda x: torch.einsum("i,i,i->", x, x[:2], x),
    "einsum names": lambda x: torch.einsum("i,j->k", x, x),
    "glu of a number": lambda x: torch.nn.functional.glu(x[0]),
    "glu odd": lambda x: torch.nn.functional.glu(x),
    "gumbel dim": lambda x: torch.nn.functional.gumbel_softmax(x, dim=3),
    "gumbel eps": lambda x: torch.nn.functional.gumbel_softmax(x, eps=1e-3),
}


@pytest.mark.parametrize("name", WRONG)
@parity
def test_wrong_arguments(nn, optim, name):
    return WRONG[name](nn.Parameter(torch.rand(3)))


def of_parameters(nn, *sizes):
    return [nn.Parameter(torch.rand(size) + 0.5) for size in sizes]


# Computed in torch.distributions by a torch.autograd.Function.
REFUSED = {("Beta", "rsample"), ("Dirichlet", "rsample")}


@pytest.mark.parametrize("draw", ["log_prob", "rsample", "entropy"])
@pytest.mark.parametrize("name", ["Gamma", "Beta", "Chi2", "Exponential", "Laplace", "Gumbel", "LogNormal",
                                  "StudentT", "Poisson", "Dirichlet", "Normal", "Uniform", "Cauchy", "HalfNormal",
                                  "Weibull", "Pareto", "Kumaraswamy", "NegativeBinomial", "VonMises", "Bernoulli",
                                  "Categorical", "FisherSnedecor", "InverseGamma", "ContinuousBernoulli",
                                  "LogisticNormal", "RelaxedBernoulli", "Multinomial", "Binomial", "Geometric"])  # fmt: skip
def test_distributions(name, draw):
    """With mirrored parameters: the same values and gradients, or an error naming the operation."""
    cls = getattr(torch.distributions, name)

    def run(nn):
        torch.manual_seed(0)
        if name in ("RelaxedBernoulli",):
            leaves = of_parameters(nn, (), (4,))
            made = cls(leaves[0], logits=leaves[1])
        elif name == "Uniform":
            leaves = of_parameters(nn, (4,), (4,))
            made = cls(leaves[0], leaves[1] + 1)
        elif name in ("Multinomial", "Binomial", "NegativeBinomial"):
            leaves = of_parameters(nn, (4,))
            made = cls(3, logits=leaves[0])
        elif "logits" in cls.arg_constraints:
            leaves = of_parameters(nn, (4,))
            made = cls(logits=leaves[0])
        else:
            leaves = of_parameters(nn, *[(4,)] * len(cls.arg_constraints))
            made = cls(*leaves)
        if draw == "log_prob":
            z = made.log_prob(made.sample())
        elif draw == "entropy":
            z = made.entropy()
        else:
            z = made.rsample((3,))
        if z.requires_grad:
            (z * torch.arange(1.0, z.numel() + 1).view(z.shape)).sum().backward()
        return z.detach(), [p.grad for p in leaves]

    outcomes = []
    for nn in (torch.nn, nnmirror):
        try:
            outcomes.append(run(nn))
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as e:
            outcomes.append(e)
    expected, actual = outcomes
    if isinstance(actual, Exception):
        assert isinstance(expected, Exception) or "nnmirror" in str(actual)
        assert (name, draw) in REFUSED or isinstance(expected, Exception), actual
        return
    assert (name, draw) not in REFUSED, "no longer refused"
    assert torch.equal(expected[0], actual[0])
    for e, a in zip(expected[1], actual[1], strict=True):
        assert (e is None and a is None) or torch.equal(e, a)


BY_NAME = {
    "with alpha": lambda x, y: x.__add__(y, alpha=2),
    "with a named operand": lambda x, y: x.__mul__(other=y),
    "without an operand": lambda x, y: x.__sub__(),
    "with two": lambda x, y: x.__truediv__(y, 2),
    "negated with an operand": lambda x, y: x.__neg__(y),
    "negated": lambda x, y: x.__neg__(),
}


@pytest.mark.parametrize("how", BY_NAME)
@parity
def test_an_operator_called_by_name(nn, optim, how):
    """As a subclass does with `super().__add__(other, alpha=2)`."""
    x, y = nn.Parameter(torch.randn(3)), torch.randn(3)
    found = BY_NAME[how](x, y)
    if found is NotImplemented:
        return "NotImplemented"
    found.sum().backward()
    return found, x.grad


WITH_NUMPY = {
    "itself": lambda x: torch.from_numpy(x.numpy().copy()),
    "an array": lambda x: torch.from_numpy(np.asarray(x)),
    "array / x": lambda x: np.ones(3, np.float32) / x,
    "array + x": lambda x: np.ones(3, np.float32) + x,
    "x - array": lambda x: x - np.ones(3, np.float32),
    "np.add": lambda x: np.add(x, torch.ones(3)),
}


@pytest.mark.parametrize("how", WITH_NUMPY)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.filterwarnings("ignore:__array_wrap__")
@parity
def test_numpy_with_what_requires_grad(nn, optim, how, mode):
    """PyTorch refuses it only in grad mode."""
    with mode():
        return WITH_NUMPY[how](nn.Parameter(torch.rand(3) + 1))


INDICES = [
    [[0, 1], [1, 0]], ([[0, 1], [1, 0]],), ([[0, 1]], 0), (slice(None), [[0, 1], [1, 2]]),
    ([0, 1], [1, 2]), [], ([],), [[0, 2]], ([[True, False, True]],), [True, False, True],
    (0, [1, 2]), ([1, 2], 0), range(2), (range(2), 1), (None, [0, 1]), (..., [0, 1]),
    ([0, 1], ...), (torch.tensor([0, 1]), [1, 2]), (torch.tensor(1), [1, 2]), ([0, -1],), [5],
    ([0, 5],), (1, torch.tensor([True, False, True, True])), ([[0], [1]], [[0, 1]]),
    [torch.tensor([0, 1])], (True,), True, ([0.5],), (torch.tensor([2, 0, 2]), slice(1, 3)),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_of_lists_tensors_and_slices(index):
    """What it selects, where its gradient goes, and its errors; again and again."""

    def run(nn):
        x = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        try:
            for _ in range(4):
                x.grad = None
                y = (x * 2)[index]
                (y * y).sum().backward()
        except (IndexError, RuntimeError, TypeError) as error:
            return type(error), str(error)
        return y.detach().tolist(), x.grad.tolist(), y.grad_fn.name()

    assert run(torch.nn) == run(nnmirror)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("how", ["index_put", "index_put_", "assignment"])
def test_one_row_for_each_that_a_mask_selects(how, accumulate):
    """Another number in each step: the gradient of the row is the sum over these."""
    if how == "assignment" and accumulate:
        pytest.skip("there is no such assignment")

    def run(nn):
        x, v = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.full((1, 3), 2.0))
        found = []
        for count in [1] * 9 + [3] * 9 + [0, 2, 1]:
            mask, z = torch.arange(4) < count, x * 1
            if how == "assignment":
                z[mask] = v * 3
            else:
                z = getattr(z, how)((mask,), v * 3, accumulate=accumulate)
            v.grad = x.grad = None
            z.square().sum().backward()
            found.append((v.grad.tolist(), x.grad.tolist()))
        return found

    assert run(torch.nn) == run(nnmirror)
