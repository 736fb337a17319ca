"""Linear systems: triangular ones, Cholesky's factor, inverses and determinants.

Matrices are the last two dimensions, those before them a batch. `A^T` below is that of each matrix.
"""

from typing import Any

import torch

from .. import _torch
from .._torch import is_torch_function_enabled
from ..tape import record
from . import shape
from .elementwise import Where
from .registry import Gradients, Needs, Rule, answered

T = torch.Tensor
_named: Any = torch.return_types


def _checked(info: T, name: str, A: T) -> None:
    """PyTorch's error if LAPACK reports a failure."""
    _torch.linalg_check_errors(info, name, is_matrix=A.dim() == 2)


def _unused(lu: T) -> T:
    """Not used by a recorded gradient, which computes from A."""
    return lu


# -- triangular systems ----------------------------------------------------------------------


class LinalgSolveTriangular(Rule):
    """X with A X = B, A triangular:  dB = Y with A^T Y = G,  dA = -Y X^T, its triangle only

    With `left=False` X A = B:  Y A^T = G,  dA = -X^T Y. A diagonal that counts as ones
    (`unitriangular`) gets no gradient.
    """

    @staticmethod
    def forward(A: T, B: T, upper: bool, left: bool, unitriangular: bool) -> T:
        return torch.linalg.solve_triangular(
            A, B, upper=upper, left=left, unitriangular=unitriangular
        )

    @staticmethod
    def gradients(
        needs: Needs, g: T, A: T, upper: bool, left: bool, unitriangular: bool, result: T
    ) -> Gradients:
        unit, x, da = unitriangular, result, None
        db = torch.linalg.solve_triangular(A.mH, g, upper=not upper, left=left, unitriangular=unit)
        if needs[0]:
            da = -(db @ x.mH) if left else -(x.mH @ db)
            da = da.triu(int(unit)) if upper else da.tril(-int(unit))
        return da, db if needs[1] else None


@answered(torch.linalg.solve_triangular)
def solve_triangular(
    A: T, B: T, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> T:
    return record(LinalgSolveTriangular, (A, B, upper, left, unitriangular))[0]


class TriangularSolve(Rule):
    """X with A X = B, A triangular, and A:  dB = Y with A^T Y = G,  dA = -Y X^T, its triangle only

    With `transpose` A^T X = B:  A Y = G,  dA = -X Y^T. To dA comes the gradient of the second
    result. `unitriangular` as above.
    """

    materialize_grads = False

    @staticmethod
    def forward(input: T, A: T, upper: bool, transpose: bool, unitriangular: bool) -> tuple[T, T]:
        return torch.triangular_solve(input, A, upper, transpose, unitriangular)

    @staticmethod
    def gradients(
        needs: Needs,
        g0: T | None,
        g1: T | None,
        A: T,
        upper: bool,
        transpose: bool,
        unitriangular: bool,
        result0: T,
    ) -> Gradients:
        x, unit, da, db = result0, unitriangular, None, None
        if g0 is not None:
            db = torch.triangular_solve(g0, A, upper, not transpose, unit)[0]
            if needs[1]:
                da = -(x @ db.mT) if transpose else -(db @ x.mH)
                da = da.triu(int(unit)) if upper else da.tril(-int(unit))
        if needs[1] and g1 is not None:
            da = (torch.zeros_like(A) if da is None else da) + g1
        return db if needs[0] else None, da


@answered(torch.triangular_solve, T.triangular_solve)
def triangular_solve(
    input: T, A: T, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[T, T]:
    return _named.triangular_solve(
        record(TriangularSolve, (input, A, upper, transpose, unitriangular))[0]
    )


# -- Cholesky's factor -----------------------------------------------------------------------


class LinalgCholeskyEx(Rule):
    """L, lower, with L L^T = A:  dA = L^-T P L^-1,  P = the symmetric part of L^T G

    that is, its lower triangle halved and mirrored. With `upper`, L^T is returned.
    Murray, 2016 (arXiv:1602.07527).
    """

    @staticmethod
    def forward(A: T, upper: bool) -> tuple[T, T]:
        return torch.linalg.cholesky_ex(A, upper=upper)

    @staticmethod
    def d_A(g0: T, result0: T, upper: bool) -> T:
        return cholesky_grad(g0, result0, upper)


def cholesky_grad(g: T, factor: T, upper: bool) -> T:
    """The gradient of the matrix that was factored."""
    if upper:
        factor, g = factor.mH, g.mH
    half = (factor.mH @ g).tril()
    symmetric = (half + half.tril(-1).mH) * 0.5
    right = torch.linalg.solve_triangular(factor.mH, symmetric, upper=True)
    return torch.linalg.solve_triangular(factor, right, upper=False, left=False)


@answered(torch.linalg.cholesky)
def cholesky(A: T, *, upper: bool = False) -> T:
    factor, info = record(LinalgCholeskyEx, (A, upper))[0]
    _checked(info, "linalg.cholesky", A)
    return factor


@answered(torch.linalg.cholesky_ex)
def cholesky_ex(A: T, *, upper: bool = False, check_errors: bool = False) -> tuple[T, T]:
    factor, info = record(LinalgCholeskyEx, (A, upper))[0]
    if check_errors:
        _checked(info, "linalg.cholesky_ex", A)
    return _named.linalg_cholesky_ex((factor, info))


class Cholesky(Rule):
    """The factor under its older name:  dA as `LinalgCholeskyEx`"""

    @staticmethod
    def forward(input: T, upper: bool) -> T:
        return torch.cholesky(input, upper)

    @staticmethod
    def d_input(g: T, result: T, upper: bool) -> T:
        return cholesky_grad(g, result, upper)


@answered(torch.cholesky, T.cholesky, repeats=True)
def old_cholesky(input: T, upper: bool = False) -> T:
    return record(Cholesky, (input, upper))[0]


def _from_right(a: T, b: T) -> T:
    """a b with one matrix b for the whole batch, as a single product, as in PyTorch if b requires
    grad."""
    if b.dim() > 2 or a.dim() < 3:
        return a @ b
    return a.reshape(-1, a.shape[-1]).mm(b).view(*a.shape[:-1], b.shape[-1])


def _from_left(a: T, b: T) -> T:
    """a b with one matrix a; see `_from_right`"""
    return a @ b if a.dim() > 2 or b.dim() < 3 else _from_right(b.mT, a.t()).mT.contiguous()


class CholeskySolve(Rule):
    """X with A X = B, A = L L^T:  dB = Y with A Y = G,  dL = -(Y X^T + X Y^T) L

    With `upper`, A = L^T L and dL = -L (Y X^T + X Y^T).
    """

    @staticmethod
    def forward(input: T, L: T, upper: bool) -> T:
        return torch.cholesky_solve(input, L, upper)

    @staticmethod
    def gradients(needs: Needs, g: T, L: T, upper: bool, result: T) -> Gradients:
        db, dl = torch.cholesky_solve(g, L, upper), None
        if needs[1]:
            product = db @ result.mH
            both = product + product.mH
            dl = -(_from_left(L, both) if upper else _from_right(both, L))
        return db if needs[0] else None, dl


@answered(torch.cholesky_solve, repeats=True)
def cholesky_solve(B: T, L: T, upper: bool = False) -> T:
    return record(CholeskySolve, (B, L, upper))[0]


@answered(T.cholesky_solve, repeats=True)
def cholesky_solve_method(self: T, input2: T, upper: bool = False) -> T:
    return record(CholeskySolve, (self, input2, upper))[0]


class CholeskyInverse(Rule):
    """Z = (L L^T)^-1:  dL = -Z (G + G^T) Z L;  with `upper`, Z = (L^T L)^-1:  -L Z (G + G^T) Z"""

    @staticmethod
    def forward(input: T, upper: bool) -> T:
        return torch.cholesky_inverse(input, upper)

    @staticmethod
    def d_input(g: T, input: T, result: T, upper: bool) -> T:
        inner = result @ ((g + g.mH) @ result)
        return -(input @ inner) if upper else -(inner @ input)


@answered(torch.cholesky_inverse)
def cholesky_inverse(L: T, upper: bool = False) -> T:
    return record(CholeskyInverse, (L, upper))[0]


@answered(T.cholesky_inverse)
def cholesky_inverse_method(self: T, upper: bool = False) -> T:
    return record(CholeskyInverse, (self, upper))[0]


# -- systems and inverses --------------------------------------------------------------------


class LinalgSolveEx(Rule):
    """X with A X = B:  dB = Y with A^T Y = G,  dA = -Y X^T

    With `left=False` X A = B:  Y A^T = G,  dA = -X^T Y. Saved: A = P L U as computed, A, and X. In
    a recorded backward Y is the solution of a different system, as in PyTorch.
    """

    keeps = ("lu", "pivots")
    derived = ("lu",)
    lu_again = staticmethod(_unused)

    @staticmethod
    def forward(A: T, B: T, left: bool) -> tuple[T, ...]:
        x, lu, pivots, info = _torch.linalg_solve_ex(A, B, left=left)
        return x, info, lu, pivots

    @staticmethod
    def gradients(
        needs: Needs,
        g0: T,
        A: T,
        B_shape: torch.Size,
        left: bool,
        result0: T,
        lu: T,
        pivots: T,
    ) -> Gradients:
        x, da = result0, None
        # PyTorch's own check: is B a batch of vectors, not of matrices?
        n = len(B_shape)
        vectors = n == 1 or (A.dim() - 1 == n and B_shape == A.shape[:-1])
        if vectors:
            g0, x = g0.unsqueeze(-1), x.unsqueeze(-1)
        if is_torch_function_enabled():
            db = torch.linalg.solve(A.mH, g0, left=left)
        else:
            db = torch.linalg.lu_solve(lu, pivots, g0, left=left, adjoint=True)
        if needs[0]:
            da = -(db @ x.mH) if left else -(x.mH @ db)
        if not needs[1]:
            return da, None
        return da, db.squeeze(-1) if vectors else db


@answered(torch.linalg.solve)
def solve(A: T, B: T, *, left: bool = True) -> T:
    x, info = record(LinalgSolveEx, (A, B, left))[0]
    _checked(info, "torch.linalg.solve", A)
    return x


@answered(torch.linalg.solve_ex)
def solve_ex(A: T, B: T, *, left: bool = True, check_errors: bool = False) -> tuple[T, T]:
    x, info = record(LinalgSolveEx, (A, B, left))[0]
    if check_errors:
        _checked(info, "torch.linalg.solve_ex", A)
    return _named.linalg_solve_ex((x, info))


class LinalgInvEx(Rule):
    """Z = A^-1:  dA = -Z^T G Z^T"""

    @staticmethod
    def forward(A: T) -> tuple[T, T]:
        return torch.linalg.inv_ex(A)

    @staticmethod
    def d_A(g0: T, result0: T) -> T:
        return -(result0.mH @ (g0 @ result0.mH))


def _inverse(A: T) -> T:
    z, info = record(LinalgInvEx, (A,))[0]
    _checked(info, "linalg.inv", A)
    return z


@answered(torch.linalg.inv)
def inv(A: T) -> T:
    return _inverse(A)


@answered(torch.inverse, T.inverse)
def inverse(input: T) -> T:
    return _inverse(input)


@answered(torch.linalg.inv_ex)
def inv_ex(A: T, *, check_errors: bool = False) -> tuple[T, T]:
    z, info = record(LinalgInvEx, (A,))[0]
    if check_errors:
        _checked(info, "linalg.inv_ex", A)
    return _named.linalg_inv_ex((z, info))


# -- determinants ----------------------------------------------------------------------------


def _diagonal_solved(numbers: T, A: T, lu: T, pivots: T, transposed: bool) -> T:
    """For each matrix, Z with A^T Z = n I, from A = P L U (or from that of A^T)."""
    right = torch.diag_embed(numbers.unsqueeze(-1).expand(pivots.shape)).mT
    if is_torch_function_enabled():  # in a recorded walk, as the factors have no gradient
        return torch.linalg.solve(A.mH, right)
    return torch.linalg.lu_solve(lu, pivots, right, adjoint=not transposed)


class LinalgDet(Rule):
    """z = det A:  dA = g z A^-T; where U has a zero on its diagonal, as if that were epsilon

    Of a single number, dA = g.
    """

    keeps = ("lu", "pivots")
    derived = ("lu",)
    lu_again = staticmethod(_unused)

    @staticmethod
    def forward(A: T) -> tuple[T, T, T]:
        return _torch.linalg_det(A)

    @staticmethod
    def how(A: T) -> bool:
        """Is it A^T that is decomposed?"""
        return A.is_contiguous()

    @staticmethod
    def d_A(g: T, A: T, result: T, lu: T, pivots: T, how: bool) -> T:
        if lu.numel() == 0:
            return lu.new_zeros(lu.shape)
        if lu.shape[-1] == 1:
            return g[..., None, None].expand(lu.shape)
        if is_torch_function_enabled():
            size = lu.diagonal(0, -2, -1).abs()
            if bool((size.amin(-1) <= 100 * torch.finfo(lu.dtype).eps * size.amax(-1)).any()):
                raise NotImplementedError(_SINGULAR)
        else:
            epsilon = torch.where(lu.diagonal(0, -2, -1) == 0, torch.finfo(lu.dtype).eps, 0.0)
            lu = lu + torch.diag_embed(epsilon.to(lu.dtype))
        return _diagonal_solved(g * result, A, lu, pivots, how)


_SINGULAR = (
    "nnmirror: a gradient of the gradient of the determinant of a matrix that is singular, or"
    " nearly, is not mirrored, and create_graph=True asks for it. Compute this loss with"
    " nnmirror.to_torch(model): it has the same weights, and what its backward adds to a gradient"
    " is added to the model's"
)


@answered(torch.linalg.det, repeats=True)
def linalg_det(A: T) -> T:
    return record(LinalgDet, (A,))[0]


@answered(torch.det, T.det, repeats=True)
def det(input: T) -> T:
    return record(LinalgDet, (input,))[0]


class LinalgSlogdet(Rule):
    """(s, l) = the sign of det A and log |det A|:  dA = g A^-T, g that of l"""

    keeps = ("lu", "pivots")
    derived = ("lu",)
    lu_again = staticmethod(_unused)
    materialize_grads = False

    @staticmethod
    def forward(A: T) -> tuple[T, T, T, T]:
        return _torch.linalg_slogdet(A)

    @staticmethod
    def how(A: T) -> bool:
        """Is it A^T that is decomposed?"""
        return A.is_contiguous()

    @staticmethod
    def d_A(g1: T | None, A: T, lu: T, pivots: T, how: bool) -> T | None:
        if g1 is None:
            return None
        if lu.numel() == 0 and not is_torch_function_enabled():
            return lu.new_zeros(lu.shape)
        return _diagonal_solved(g1, A, lu, pivots, how)


@answered(torch.linalg.slogdet)
def linalg_slogdet(A: T) -> tuple[T, T]:
    return _named.linalg_slogdet(record(LinalgSlogdet, (A,))[0])


@answered(torch.slogdet, T.slogdet)
def slogdet(input: T) -> tuple[T, T]:
    return _named.slogdet(record(LinalgSlogdet, (input,))[0])


@answered(torch.logdet, T.logdet)
def logdet(input: T) -> T:
    """log det A, NaN where det A < 0"""
    sign, size = record(LinalgSlogdet, (input,))[0]
    nan = shape.to(torch.full((), float("nan"), device=size.device), size.dtype)
    return record(Where, (sign.detach() == -1, nan, size))[0]
