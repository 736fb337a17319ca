"""torch.linalg, cdist and multivariate normals. A user would get other bits or wrong gradients."""

import itertools
import warnings

import pytest
import torch

import nnmirror

from .parity import parity
from .test_operations import both_ways

DTYPES = [torch.float32, torch.float64]


def driven(nn, function, *values):
    """As `both_ways`, without the gradients' strides, which mean nothing for sizes 0 and 1."""
    outcomes = both_ways(nn, function, *values)
    return [o if isinstance(o, str) else (*o[:2], [p.grad for p in o[2]]) for o in outcomes]


BATCHES = [(), (3,), (2, 3)]
FUNCTIONS = {  # a: diagonally dominant, p: positive definite, b: right-hand side
    "solve": lambda a, p, b: torch.linalg.solve(a, b),
    "solve right": lambda a, p, b: torch.linalg.solve(a, b.mT, left=False),
    "solve a vector": lambda a, p, b: torch.linalg.solve(a, b[..., 0]),
    "solve_ex": lambda a, p, b: torch.linalg.solve_ex(a, b),
    "inv": lambda a, p, b: (torch.linalg.inv(a), a.inverse(), torch.inverse(p)),
    "inv_ex": lambda a, p, b: torch.linalg.inv_ex(a)[0],
    "det": lambda a, p, b: (torch.linalg.det(a), p.det()),
    "logdet": lambda a, p, b: (torch.logdet(p), a.logdet()),
    "slogdet": lambda a, p, b: (*torch.linalg.slogdet(a), *p.slogdet()),
    "cholesky": lambda a, p, b: torch.linalg.cholesky(p),
    "cholesky upper": lambda a, p, b: torch.linalg.cholesky(p, upper=True),
    "cholesky_ex": lambda a, p, b: torch.linalg.cholesky_ex(p, check_errors=True)[0],
    "cholesky of old": lambda a, p, b: (torch.cholesky(p), p.cholesky(True)),
    "cholesky_solve": lambda a, p, b: torch.cholesky_solve(b, a),
    "cholesky_solve upper": lambda a, p, b: b.cholesky_solve(a, True),
    "cholesky_inverse": lambda a, p, b: torch.cholesky_inverse(a),
    "cholesky_inverse upper": lambda a, p, b: a.cholesky_inverse(True),
    "triangular": lambda a, p, b: torch.linalg.solve_triangular(a, b, upper=False),
    "triangular upper": lambda a, p, b: torch.linalg.solve_triangular(a, b, upper=True),
    "triangular right": lambda a, p, b: torch.linalg.solve_triangular(
        a, b.mT, upper=True, left=False
    ),
    "triangular of ones": lambda a, p, b: torch.linalg.solve_triangular(
        a, b, upper=False, unitriangular=True
    ),
}


def matrices(batch, n, dtype):
    a = torch.randn(*batch, n, n, dtype=dtype) + 4 * torch.eye(n, dtype=dtype)
    return a, a @ a.mT + torch.eye(n, dtype=dtype), torch.randn(*batch, n, 3, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", FUNCTIONS)
@parity
def test_linear_systems(nn, optim, name, batch, dtype):
    """Same bits for row-major and column-major matrices, single and batched."""
    function = FUNCTIONS[name]
    results = []
    for n in (1, 4, 9, 33):
        values = matrices(batch, n, dtype)
        results.append(driven(nn, function, *values))
        by_columns = [v.mT.contiguous().mT for v in values]
        leaves = [nn.Parameter(v) for v in by_columns]
        made = function(*leaves)
        made = made if isinstance(made, tuple) else (made,)
        sum((z * z).sum() for z in made if z.requires_grad).backward()
        results.append((made, [p.grad for p in leaves] if n == 1 else leaves))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upper", [True, False])
@parity
def test_one_matrix_for_a_batch(nn, optim, upper, dtype):
    a = matrices((), 9, dtype)[0]
    results = []
    for batch in BATCHES:
        b = torch.randn(*batch, 9, 5, dtype=dtype)
        results += [
            both_ways(nn, lambda a, b: torch.linalg.solve_triangular(a, b, upper=upper), a, b),
            both_ways(nn, lambda a, b: torch.cholesky_solve(b, a, upper), a, b),
            both_ways(nn, lambda b: torch.linalg.solve_triangular(a, b, upper=upper), b),
        ]
    return results


@parity
def test_singular_matrices(nn, optim):
    ones = nn.Parameter(torch.ones(2, 3, 3))
    torch.linalg.det(ones).sum().backward()
    torch.linalg.det(nn.Parameter(torch.zeros(0, 0))).backward()
    return ones


def error_of_gradients(function, *values):
    """The greatest difference between the gradients and central differences in float64."""
    leaves = [nnmirror.Parameter(v.clone()) for v in values]
    made = function(*leaves)
    g = torch.randn(made.shape, dtype=torch.float64)
    made.backward(g)
    worst, h = 0.0, 1e-6
    for k, value in enumerate(values):
        for i in range(value.numel()):
            step = torch.zeros(value.numel(), dtype=torch.float64)
            step[i] = h
            up, down = (
                function(*values[:k], value + s * step.view(value.shape), *values[k + 1 :])
                for s in (1, -1)
            )
            slope = (g * (up - down)).sum() / (2 * h)
            grad = leaves[k].grad  # None for an input that the function does not use
            worst = max(worst, abs((0 if grad is None else grad.reshape(-1)[i]) - slope.item()))
    return worst


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n != "cholesky_ex"])
def test_gradients_of_linear_systems_by_finite_differences(name):
    """The gradients against central differences in float64, independently of PyTorch."""

    def function(a, p, b):
        if name.startswith("cholesky_"):  # reads one triangle, but PyTorch's gradient fills both
            a = a.triu() if "upper" in name else a.tril()
        made = FUNCTIONS[name](a, (p + p.mT) / 2, b)  # cholesky reads one triangle alone
        return (
            sum(z.sum() for z in made if z.is_floating_point())
            if type(made) is tuple
            else (made if isinstance(made, torch.Tensor) else made[-1 if "slog" in name else 0])
        )

    torch.manual_seed(0)
    assert error_of_gradients(function, *matrices((), 3, torch.float64)) < 1e-6


# -- distances -------------------------------------------------------------------------------


@pytest.mark.parametrize(("upper", "transpose", "unit"), itertools.product([True, False], repeat=3))
@parity
def test_triangular_solve(nn, optim, upper, transpose, unit):
    x, A = nn.Parameter(torch.rand(2, 3, 2)), nn.Parameter(torch.rand(2, 3, 3) + torch.eye(3))
    given = A, upper, transpose, unit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        for both in (False, True, False, True):
            solution, copied = torch.triangular_solve(x * 1, *given)
            (solution.square().sum() + both * (copied.sin() * copied.detach()).sum()).backward()
        (g,) = torch.autograd.grad(x.triangular_solve(*given)[0].exp().sum(), x, create_graph=True)
    g.square().sum().backward()
    return solution, copied, x.grad, A.grad


PAIRS = [((3, 5), (4, 5)), ((2, 3, 17), (4, 17)), ((3, 1, 6, 20), (2, 5, 20)), ((30, 4), (7, 4)),
         ((2, 30, 4), (31, 4)), ((26, 33), (3, 33)), ((30, 0), (3, 0)), ((0, 3), (40, 3))]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, float("inf")])
@pytest.mark.parametrize("shapes", PAIRS)
@parity
def test_cdist(nn, optim, shapes, p, dtype):
    x, y = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [
        driven(nn, lambda x, y: torch.cdist(x, y, p), x, y),
        driven(nn, lambda x: torch.cdist(x, x, p), x),
    ]


@pytest.mark.parametrize("mode", ["use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"])
@parity
def test_cdist_by_a_product_or_not(nn, optim, mode):
    x, y = torch.randn(30, 5), torch.randn(2, 5)
    return both_ways(nn, lambda x, y: torch.cdist(x, y, compute_mode=mode), x, y)


@pytest.mark.parametrize("rows", [4, 30])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, float("inf")])
def test_gradients_of_cdist_by_finite_differences(p, rows):
    torch.manual_seed(0)
    x, y = (torch.randn(n, 3, dtype=torch.float64) for n in (rows, 3))
    assert error_of_gradients(lambda x, y: torch.cdist(x, y, p), x, y) < 1e-7


# -- multivariate normal distributions -------------------------------------------------------


@pytest.mark.parametrize("draw", ["log_prob", "rsample", "entropy", "kl"])
@pytest.mark.parametrize("by", ["covariance_matrix", "scale_tril", "precision_matrix"])
@pytest.mark.parametrize("batch", [(), (4,)])
@parity
def test_multivariate_normal(nn, optim, batch, by, draw):
    root = nn.Parameter(torch.randn(*batch, 3, 3) * 0.3)
    mean = nn.Parameter(torch.randn(*batch, 3))
    if by == "scale_tril":
        given = root.tril(-1) + torch.diag_embed(root.diagonal(0, -2, -1).exp())
    else:
        given = root @ root.mT + torch.eye(3)
    law = torch.distributions.MultivariateNormal(mean, **{by: given})
    made = {
        "log_prob": lambda: law.log_prob(torch.randn(5, *batch, 3)),
        "rsample": lambda: law.rsample((5,)),
        "entropy": law.entropy,
        "kl": lambda: torch.distributions.kl_divergence(
            law, torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
        ),
    }[draw]()
    (made * made).sum().backward()
    return made, mean, root


@pytest.mark.parametrize("draw", ["log_prob", "rsample"])
@parity
def test_low_rank_normal(nn, optim, draw):
    mean, factor, diagonal = (nn.Parameter(torch.rand(s) + 0.5) for s in ((3,), (3, 2), (3,)))
    law = torch.distributions.LowRankMultivariateNormal(mean, factor, diagonal)
    made = law.log_prob(torch.randn(5, 3)) if draw == "log_prob" else law.rsample((5,))
    (made * made).sum().backward()
    return made, mean, factor, diagonal


@parity
def test_a_full_covariance_is_learnt(nn, optim):
    """A net that outputs a mean and a Cholesky factor, trained by maximum likelihood."""
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 9))
    optimizer, x = optim.Adam(net.parameters(), lr=1e-2), torch.randn(20, 4)
    target, losses = torch.randn(20, 3), []
    rows, columns = torch.tril_indices(3, 3)
    for _ in range(5):
        out = net(x)
        factor = torch.zeros(20, 3, 3).index_put(
            (torch.arange(20)[:, None], rows, columns), out[:, 3:]
        )
        factor = factor.tril(-1) + torch.diag_embed(factor.diagonal(0, -2, -1).exp())
        law = torch.distributions.MultivariateNormal(out[:, :3], scale_tril=factor)
        loss = -law.log_prob(target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses, dict(net.named_parameters())


E = torch.eye
WRONG = {
    "not positive": lambda x: torch.linalg.cholesky(-x),
    "not positive, one of a batch": lambda x: torch.linalg.cholesky(torch.stack([x, -x])),
    "not square": lambda x: torch.linalg.cholesky(x[:2]),
    "cholesky_ex check": lambda x: torch.linalg.cholesky_ex(-x, check_errors=True),
    "cholesky of old": lambda x: torch.cholesky(-x),
    "singular": lambda x: torch.linalg.solve(x * 0, x),
    "inverse of a singular": lambda x: torch.inverse(x * 0),
    "solve sizes": lambda x: torch.linalg.solve(x, torch.ones(4)),
    "det of a vector": lambda x: torch.det(x[0]),
    "triangular without upper": lambda x: torch.linalg.solve_triangular(x, x),
    "triangular sizes": lambda x: torch.linalg.solve_triangular(x, E(4), upper=True),
    "cdist sizes": lambda x: torch.cdist(x, E(4)),
    "cdist of a vector": lambda x: torch.cdist(x[0], x),
    "cdist p": lambda x: torch.cdist(x, x, -1.0),
    "cdist mode": lambda x: torch.cdist(x, x, compute_mode="fast"),
    "cdist batches": lambda x: torch.cdist(x.expand(2, 3, 3), x.expand(3, 3, 3)),
}


@pytest.mark.parametrize("name", WRONG)
@parity
def test_wrong_arguments(nn, optim, name):
    return WRONG[name](nn.Parameter(E(3)))


def test_a_second_derivative_of_the_determinant_of_a_singular_matrix_is_refused_by_name():
    """PyTorch computes it from singular values; the LU factors saved here would not give it."""
    a = nnmirror.Parameter(torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="determinant of a matrix that is singular"):
        torch.autograd.grad(torch.linalg.det(a), a, create_graph=True)


@pytest.mark.parametrize(("p", "size"), [(8.0, 1e-3), (16.0, 1e-2), (30.0, 0.1), (12.0, 300)])
def test_gradients_of_cdist_where_powers_are_small_or_large(p, size):
    """PyTorch's kernel loses some of them in float32."""
    torch.manual_seed(0)
    points = [torch.randn(n, 3) * size for n in (6, 4)]
    x, y = map(nnmirror.Parameter, points)
    torch.cdist(x, y, p).sum().backward()
    wide = [t.double().requires_grad_() for t in points]
    torch.cdist(*wide, p).sum().backward()
    for actual, expected in zip((x.grad, y.grad), (t.grad for t in wide), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
