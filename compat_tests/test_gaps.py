"""Functions of PyTorch that lose a gradient: those that nnmirror/refused.md lists, and no other.

A few functions do not dispatch to a tensor subclass, so the mirror cannot refuse them: the gradient
of a tracked tensor is lost. Users must find them in that list, and a function that PyTorch adds or
fixes is noticed here. So all public functions are called with tracked tensors, and compared with
PyTorch.
"""

import inspect
import re
import types
import warnings
from pathlib import Path

import pytest
import torch

import nnmirror
from nnmirror.tape import tensors_in

from .parity import parity

TEXT = (Path(__file__).parent.parent / "nnmirror" / "refused.md").read_text()
GAPS = TEXT[TEXT.index("One gap cannot") : TEXT.index("## What is not called")]
SPACES = {
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.masked": torch.masked,
    "torch.nested": torch.nested,
    "torch.sparse": torch.sparse,
}
# Functions that change PyTorch's state, start or end something, or take no tensors.
NOT_CALLED = re.compile(
    r"^(_|set_|get_|use_|is_|save|load|compile|hub|seed|manual|init|import|from_file|fork|wait|cond|"
    r"while|share|parse|sym_|autocast|thread|prepare|backward|register|retain|requires|profiler)"
)


def functions(space):
    """The functions of a namespace; in `torch` itself also its tensor classes."""
    for name in dir(SPACES[space]):
        function = getattr(SPACES[space], name)
        wanted = callable(function) and not isinstance(function, types.ModuleType)
        if inspect.isclass(function):
            wanted = space == "torch" and re.fullmatch(r"(Float|Double|)Tensor", name)
        if wanted and not NOT_CALLED.match(name):
            yield name, function


PLACES = [[0, 1], [1, 0]]
STARTS, COLUMNS = [0, 1, 2], [0, 1]


def guesses(nn):
    """Functions that create arguments; most functions take some. `t` is tracked, `x` is not."""

    def t(*shape):
        return nn.functional.leaky_relu(nn.Parameter(torch.rand(shape) * 0.8 + 0.1), 1.0)

    def x(*shape):
        return torch.rand(shape) * 0.8 + 0.1

    index, sparse = torch.tensor([1, 0]), x(2, 2).to_sparse()
    return [
        lambda: (t(2, 2),),
        lambda: (t(2),),
        lambda: (t(),),
        lambda: ([t(2), t(2)],),
        lambda: ([t(), t()],),
        lambda: (t(2, 2), torch.float64),
        lambda: (t(2, 2), t(2, 2)),
        lambda: (x(2, 2), t(2, 2)),
        lambda: (x(2, 2), x(2, 2), t(2, 2)),
        lambda: (x(2), t(2)),
        lambda: (x(2, 2), t(2, 2), t(2, 2)),
        lambda: (t(2, 2), 1),
        lambda: (t(2, 2), 0, 1),
        lambda: (t(2, 2), 0, index),
        lambda: (1, t(2)),
        lambda: (t(2, 2), (0, 1)),
        lambda: ("ij,jk->ik", t(2, 2), t(2, 2)),
        lambda: (PLACES, t(2)),
        lambda: (PLACES, t(2), (2, 2)),
        lambda: (STARTS, COLUMNS, t(2)),
        lambda: (STARTS, COLUMNS, t(2), (2, 2)),
        lambda: (STARTS, COLUMNS, t(2, 1, 1)),
        lambda: (STARTS, COLUMNS, t(2, 1, 1), (2, 2)),
        lambda: (sparse, t(2, 2)),
        lambda: (x(2, 2), sparse, t(2, 2)),
        lambda: (t(2, 2), index[:1], (2, 2)),
        lambda: (t(2, 2), x(2, 2) > 0.5),
    ]


KEYWORDS = [{}, {"dtype": torch.float64}, {"copy": True}, {"layout": torch.sparse_csr}]


def require_grad(nn, function, k, keywords):
    """Whether each tensor that the call returns requires grad; None if it raises."""
    torch.manual_seed(0)
    try:
        return [made.requires_grad for made in tensors_in(function(*guesses(nn)[k](), **keywords))]
    except Exception:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_only_the_functions_in_the_text_lose_a_gradient(space):
    lost = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in functions(space):
            for k in range(len(guesses(nnmirror))):
                for keywords in KEYWORDS[: 4 if k in (0, 1, 19, 20) else 1]:
                    expected = require_grad(torch.nn, function, k, keywords)
                    actual = expected and require_grad(nnmirror, function, k, keywords)
                    if actual and any(e and not a for e, a in zip(expected, actual, strict=True)):
                        lost.add(f"{space}.{name}".replace("torch.Tensor.", "Tensor."))
    named = r"`(torch\.(?:\w+Tensor|Tensor|as\w+|sparse\w+)|Tensor\.new)\b"
    listed = set(re.findall(named, GAPS.partition("The rest drop")[2]))
    assert lost <= listed
    if space in ("torch", "torch.Tensor"):
        assert {name for name in listed if name.startswith("Tensor.") == (space != "torch")} <= lost


@pytest.mark.parametrize(
    ("listed", "call"),
    {
        "x.uniform_(0, w)": lambda w: torch.ones(2).uniform_(0, w),
        "torch.add(x, y, alpha=w)": lambda w: torch.add(torch.ones(2), torch.ones(2), alpha=w),
    }.items(),
)
def test_a_number_beside_plain_tensors_is_a_gap(listed, call):
    """PyTorch raises; the mirror does not see the call. If that changes, the list must too."""
    assert f"`{listed}`" in GAPS
    with pytest.raises(TypeError, match="must be"):
        call(torch.nn.Parameter(torch.tensor(2.0)))
    assert not call(nnmirror.Parameter(torch.tensor(2.0))).requires_grad


DATA = {
    "as_tensor": lambda w, h, n: torch.as_tensor(h),
    "as_tensor, converted": lambda w, h, n: torch.as_tensor(h, dtype=torch.float64),
    "as_tensor, integers": lambda w, h, n: torch.as_tensor(w, dtype=torch.int64),
    "as_tensor, by name": lambda w, h, n: torch.as_tensor(data=w, device="cpu"),
    "as_tensor, bad": lambda w, h, n: torch.as_tensor(h, dtype="float64"),
    "asarray": lambda w, h, n: torch.asarray(h),
    "asarray, copied": lambda w, h, n: torch.asarray(h, copy=True),
    "asarray, converted": lambda w, h, n: torch.asarray(h, dtype=torch.float64),
    "asarray, not copied": lambda w, h, n: torch.asarray(h, dtype=torch.float64, copy=False),
    "asarray, of a list": lambda w, h, n: torch.asarray([1, 2]),
    "full": lambda w, h, n: torch.full((2,), n),
    "full, a result": lambda w, h, n: torch.full((2,), fill_value=n * 2),
    "full_like": lambda w, h, n: torch.full_like(torch.ones(2), n),
    "full, a value": lambda w, h, n: torch.full((2,), n.detach()),
    "arange": lambda w, h, n: torch.arange(0, n),
    "scalar_tensor": lambda w, h, n: torch.scalar_tensor(n),
}


@pytest.mark.parametrize("call", DATA)
@parity
def test_tensors_made_of_data(nn, optim, call):
    """A parameter that is converted or copied keeps its gradient; as a number it raises."""
    w, n = nn.Parameter(torch.tensor([1.0, 3.0])), nn.Parameter(torch.tensor(2.0))
    made = DATA[call](w, w * 2, n)
    if made.requires_grad:
        made.pow(2).sum().backward()
    return made.detach(), made.requires_grad, w.grad


@pytest.mark.parametrize("layout", ["coo", "csr"])
@parity
def test_sparse_mm(nn, optim, layout):
    """As graph nets multiply with their adjacency matrix."""
    adjacency = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    adjacency = adjacency.to_sparse() if layout == "coo" else adjacency.to_sparse_csr()
    layer, found = nn.Linear(4, 2), []
    for _ in range(4):
        y = torch.sparse.mm(adjacency, layer(torch.randn(3, 4)))
        y.square().sum().backward()
        found += [y.detach(), y.grad_fn.name()]
    return found, layer.weight.grad


def test_a_sparse_tensor_of_a_parameter_is_refused():
    w = nnmirror.Parameter(torch.ones(2))
    with pytest.raises(NotImplementedError, match="index_put"):
        torch.sparse_coo_tensor([[0, 1], [1, 0]], w, (2, 2))
    with pytest.raises(RuntimeError, match="size"):  # PyTorch's own error comes first
        torch.sparse_coo_tensor([[0, 1], [1, 0]], w, (1, 1))
    with torch.no_grad():
        assert torch.sparse_coo_tensor([[0, 1], [1, 0]], w, (2, 2)).is_sparse
