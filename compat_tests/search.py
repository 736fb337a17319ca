"""Search for programs on which PyTorch and the mirror differ.

    python -m compat_tests.search --examples 20000 --jobs 2

Hypothesis generates whole programs: a net of shared and branching modules, tensor operations
between them, views and in-place changes, frozen parameters, hooks, several losses, gradients with
which the program goes on computing, a few steps of an optimiser with a scheduler, and walks that
are bound at once or not at all. Each program runs on both backends; every value, gradient and
weight is compared bit by bit, and so is every error. An operation that the mirror refuses is left
out of the program on both sides. The programs tried are recorded in a file, from which an
interrupted search continues.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import multiprocessing
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import nnmirror
import nnmirror.optim

from .parity import bound_at_once, normal, same_bits


def put(a: Any, index: Any, value: Any) -> Any:
    a[index] = value
    return a


def filled(a: Any) -> Any:
    """A plain buffer, filled step by step from its own earlier entries."""
    series = torch.zeros(5, dtype=a.dtype)
    before = series[:2]
    for i in range(2, 5):
        series[i] = (series[i - 2 : i] * a.mean()).sum() + a.sum()
    return series + before.sum()


def written(a: Any) -> Any:
    """Each slice is computed from the slices before it."""
    d = torch.zeros_like(a)
    for k in range(len(a)):
        d[k] = (d[: k + 1] + a[: k + 1].flip(0)).sum(0)
    return d


UNARY = {
    "neg": lambda a: -a,
    "relu": lambda a: a.relu(),
    "tanh": lambda a: torch.tanh(a),
    "sigmoid": lambda a: a.sigmoid(),
    "exp": lambda a: (a * 0.1).exp(),
    "log": lambda a: (a * a + 1).log(),
    "sqrt": lambda a: (a * a).sqrt(),
    "abs": lambda a: a.abs(),
    "sin": lambda a: a.sin(),
    "square": lambda a: a**2,
    "cube": lambda a: a.pow(3),
    "reciprocal": lambda a: 1 / (a * a + 1),
    "add 1": lambda a: a + 1,
    "rsub": lambda a: 2 - a,
    "half": lambda a: a / 2,
    "scaled": lambda a: 0.3 * a,
    "clamp": lambda a: a.clamp(-0.5, 0.5),
    "clamp min": lambda a: a.clamp(min=0),
    "sum": lambda a: a.sum(),
    "sum 0": lambda a: a.sum(0),
    "sum last": lambda a: a.sum(-1, keepdim=True),
    "mean": lambda a: a.mean(),
    "mean last": lambda a: a.mean(dim=-1),
    "t": lambda a: a.t(),
    "mT": lambda a: a.mT,
    "transpose": lambda a: a.transpose(0, -1),
    "flatten": lambda a: a.flatten(),
    "reshape": lambda a: a.reshape(-1, a.shape[0]),
    "view": lambda a: a.view(-1),
    "unsqueeze": lambda a: a.unsqueeze(0),
    "unsqueeze last": lambda a: a.unsqueeze(-1),
    "squeeze": lambda a: a.squeeze(),
    "squeeze 0": lambda a: a.squeeze(0),
    "expand": lambda a: a.expand(2, *a.shape),
    "first": lambda a: a[0],
    "slice": lambda a: a[1:],
    "every other": lambda a: a[..., ::2],
    "fancy": lambda a: a[[0, -1, 0]],
    "mask": lambda a: a[a.detach() > 0],
    "new axis": lambda a: a[None, ..., None],
    "stack of parts": lambda a: torch.stack(list(a)),
    "contiguous": lambda a: a.contiguous(),
    "clone": lambda a: a.clone(),
    "double": lambda a: a.double(),
    "float": lambda a: a.float(),
    "detach": lambda a: a.detach(),
    "where": lambda a: torch.where(a > 0, a, a * 0.1),
    "add_": lambda a: a.add_(1),
    "mul_": lambda a: a.mul_(0.5),
    "relu_": lambda a: a.relu_(),
    "tanh_": lambda a: a.tanh_(),
    "clamp_": lambda a: a.clamp_(max=1),
    "sigmoid_": lambda a: a.sigmoid_(),
    "change detached": lambda a: a.detach().add_(0.25) * 0,
    "norm by hand": lambda a: (a * a).sum().sqrt(),
    "softmax": lambda a: a.softmax(-1),
    "softmax 0": lambda a: torch.softmax(a, 0),
    "log_softmax": lambda a: a.log_softmax(-1),
    "logsumexp": lambda a: a.logsumexp(-1),
    "max": lambda a: a.max(),
    "max dim": lambda a: a.max(-1).values,
    "min": lambda a: torch.min(a),
    "min dim": lambda a: a.min(0, keepdim=True)[0],
    "amax": lambda a: a.amax(-1),
    "median": lambda a: a.median(-1)[0],
    "sort": lambda a: a.sort(-1, descending=True)[0],
    "topk": lambda a: a.topk(2, -1)[0],
    "var": lambda a: a.var(-1),
    "var all": lambda a: a.var(unbiased=False),
    "std": lambda a: a.std(0),
    "norm": lambda a: a.norm(),
    "norm 1": lambda a: a.norm(1, dim=-1, keepdim=True),
    "norm 3": lambda a: a.norm(3, -1),
    "prod": lambda a: a.prod(),
    "prod dim": lambda a: a.prod(-1),
    "cumsum": lambda a: a.cumsum(0),
    "normalised": lambda a: (a - a.mean(-1, keepdim=True)) / (a.std(-1, keepdim=True) + 1e-5),
    "expm1": lambda a: (a * 0.1).expm1(),
    "log2": lambda a: (a * a + 1).log2(),
    "atan": lambda a: a.atan(),
    "erf": lambda a: a.erf(),
    "round": lambda a: a.round() + a,
    "frac": lambda a: a.frac(),
    "repeat": lambda a: a.repeat(2, *[1] * (a.dim() - 1)),
    "tile": lambda a: a.tile(2),
    "narrow": lambda a: a.narrow(0, 1, 1),
    "split": lambda a: a.split(2)[0] * 1,
    "chunk": lambda a: torch.cat(a.chunk(2, -1)[::-1], -1),
    "select": lambda a: a.select(-1, 1),
    "flip": lambda a: a.flip(0),
    "roll": lambda a: a.roll(1, -1),
    "tril": lambda a: a.tril(),
    "diagonal": lambda a: a.diagonal(),
    "permute": lambda a: a.permute(*range(a.dim() - 1, -1, -1)),
    "movedim": lambda a: a.movedim(0, -1),
    "index_select": lambda a: a.index_select(0, torch.tensor([0, 1, 0])),
    "gather": lambda a: a.gather(-1, torch.zeros(a.shape, dtype=torch.long)),
    "masked_select": lambda a: a.masked_select(a < 0),
    "masked_fill": lambda a: a.masked_fill(a < 0, 0.1),
    "vstack": lambda a: torch.vstack([a, a]),
    "hstack": lambda a: torch.hstack([a, a]),
    "unbound": lambda a: a.unbind(0)[-1],
    "split views": lambda a: a.split(2)[0],
    "row = 0": lambda a: put(a, 0, 0.5),
    "column = 1": lambda a: put(a, (..., 0), 1.0),
    "mask = 0": lambda a: put(a, a.detach() > 0.5, 0.0),
    "rows swapped": lambda a: put(a, [0, 1], a[[1, 0]]),
    "slice scaled": lambda a: put(a, slice(1, None), a[1:] * 0.5),
    "view add_": lambda a: a.view(-1).add_(0.5),
    "row mul_": lambda a: a[0].mul_(0.5),
    "t relu_": lambda a: torch.relu_(a.t()),
    "masked_fill_": lambda a: a.masked_fill_(a > 1, 1.0),
    "zero_ row": lambda a: a[-1].zero_(),
    "exp_ of a slice": lambda a: a[..., :1].exp_(),
    "unsqueeze_": lambda a: a.unsqueeze_(0),
    "elu": lambda a: F.elu(a, 0.7),
    "silu": lambda a: F.silu(a),
    "hardtanh": lambda a: F.hardtanh(a, -0.5, 0.7),
    "relu6": lambda a: F.relu6(a * 4),
    "elu_": lambda a: F.elu_(a, 0.7),
    "silu_": lambda a: F.silu(a, inplace=True),
    "hardtanh_": lambda a: F.hardtanh_(a),
    "dropout": lambda a: F.dropout(a, 0.3),
    "layer_norm": lambda a: F.layer_norm(a, a.shape[-1:]),
    "cross entropy": lambda a: F.cross_entropy(a, a.detach().argmax(-1)),
    "cross entropy smoothed": lambda a: F.cross_entropy(
        a, a.detach().argmin(-1), label_smoothing=0.1, reduction="sum"
    ),
    "nll": lambda a: F.nll_loss(a.log_softmax(-1), a.detach().argmin(-1), reduction="none"),
    "glu": lambda a: F.glu(torch.cat([a, a * 0.5], -1), -1),
    "gumbel": lambda a: F.gumbel_softmax(a, tau=0.7),
    # Only one small image: for batches in float32 oneDNN adds in an order of its own.
    "conv1d": lambda a: F.conv1d(a.reshape(1, 1, -1), a.detach().flatten()[:2].view(1, 1, 2)),
    "max_pool1d": lambda a: F.max_pool1d(a.reshape(1, -1), 2),
    "max_pool2d": lambda a: F.max_pool2d(a.unsqueeze(0), 2, 1, 1),
    "avg_pool1d": lambda a: F.avg_pool1d(a.reshape(1, -1), 2, 1, 1),
    "adaptive_avg_pool": lambda a: F.adaptive_avg_pool2d(a.unsqueeze(0), (2, 2)),
    "unfolded": lambda a: F.unfold(a.reshape(1, 1, -1, a.shape[-1]), (1, 2)),
    "take": lambda a: a.take(torch.tensor([1, 0, 1])),
    "aminmax": lambda a: torch.aminmax(a).max - a.aminmax(dim=-1).min,
    "float_power": lambda a: torch.float_power(a, 2),
    "meshgrid": lambda a: torch.meshgrid(a.flatten()[:2], a.flatten()[-2:], indexing="ij")[1],
    "covariance": lambda a: torch.linalg.cholesky(a @ a.mT + 3 * torch.eye(a.shape[-2])),
    "a slope that learns": lambda a: F.leaky_relu(a, a.sum()),
    "alpha that learns": lambda a: torch.add(a, a, alpha=a.mean()),
    "complex": lambda a: torch.complex(a, a).abs(),
    "series": lambda a: filled(a),
    "slices written": lambda a: written(a),
    "annealed": lambda a: a * float(a.detach().sum().round()),
    "reflected": lambda a: F.pad(a[None], (1, 1), "reflect"),
    "replicated": lambda a: F.pad(a[None], (0, 2), "replicate"),
    "circular": lambda a: F.pad(a[None], (1, 0), "circular"),
    "upsampled": lambda a: F.interpolate(a[None, None], scale_factor=2),
    "upsampled to a size": lambda a: F.interpolate(a[None], size=4, mode="nearest-exact"),
    # (PyTorch's backward of an empty image fails.)
    "pixels shuffled": lambda a: (
        F.pixel_shuffle(torch.stack([a, a * 2, a, -a], -3), 2) if a.numel() else a
    ),
    "pixels unshuffled": lambda a: F.pixel_unshuffle(torch.cat([a, a])[None], 2),
    "channels shuffled": lambda a: F.channel_shuffle(torch.stack([a, a * 2, a, -a])[None], 2),
    "channel dropout": lambda a: F.dropout2d(torch.stack([a, -a])[None], 0.3),
    "alpha dropout": lambda a: F.alpha_dropout(a, 0.3, True),
    "instance norm": lambda a: F.instance_norm(torch.stack([a, a * a])),
    "group norm": lambda a: F.group_norm(torch.stack([a, a * a, -a, a * 2], 1), 2),
    "softmax by hand": lambda a: a.exp() / a.exp().sum(-1, keepdim=True),
}
BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (b * b + 0.5),
    "add alpha": lambda a, b: torch.add(a, b, alpha=0.5),
    "pow": lambda a, b: (a * a + 0.1) ** b.clamp(-2, 2),
    "maximum": lambda a, b: torch.maximum(a, b),
    "minimum": lambda a, b: torch.minimum(a, b),
    "clamp between": lambda a, b: a.clamp(b, b + 1),
    "matmul": lambda a, b: a @ b,
    "matmul t": lambda a, b: a @ b.mT,
    "cat 0": lambda a, b: torch.cat([a, b]),
    "cat last": lambda a, b: torch.cat([a, b, a], -1),
    "stack": lambda a, b: torch.stack([a, b]),
    "where": lambda a, b: torch.where(a > b, a, b),
    "iadd": lambda a, b: a.add_(b),
    "imul": lambda a, b: a.mul_(b),
    "isub": lambda a, b: a.sub_(b, alpha=2),
    "lerp": lambda a, b: a.lerp(b, 0.3),
    "lerp between": lambda a, b: torch.lerp(a, b, a.sigmoid()),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, b * b + 1),
    "atan2": lambda a, b: torch.atan2(a, b),
    "remainder": lambda a, b: a.remainder(b * b + 0.5),
    "outer": lambda a, b: torch.outer(a.flatten(), b.flatten()),
    "einsum ij,kj->ik": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "einsum bij,bj->bi": lambda a, b: torch.einsum("bij,bj->bi", a, b),
    "addmm": lambda a, b: torch.addmm(a, b, a.mT @ a, alpha=0.5),
    "row = b": lambda a, b: put(a, 0, b * 1),
    "column = b": lambda a, b: put(a, (..., -1), b.sum()),
    "mask = b": lambda a, b: put(a, a.detach() > 0, b.mean().to(a.dtype)),
    "rows = b": lambda a, b: put(a, [-1, 0], b),
    "view imul": lambda a, b: a.view(-1).mul_(b.mean()),
    "copy_": lambda a, b: a.copy_(b),
    "copy_ into a slice": lambda a, b: a[1:].copy_(b),
    "index_add": lambda a, b: a.index_add(0, torch.zeros(len(b), dtype=torch.long), b),
    "index_put": lambda a, b: a.index_put((torch.tensor([0, 0]),), b, accumulate=True),
    "scatter_add": lambda a, b: a.scatter_add(0, torch.zeros(b.shape, dtype=torch.long), b),
    "into a buffer": lambda a, b: put(put(torch.zeros(3, *a.shape), 0, a), 2, b),
    "distance": lambda a, b: (a - b).norm(dim=-1),
    "cosine": lambda a, b: (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-6),
    "attention": lambda a, b: (a @ b.mT / 2).softmax(-1) @ b,
    "l1": lambda a, b: F.l1_loss(a, b),
    "smooth l1": lambda a, b: F.smooth_l1_loss(a, b, beta=0.7),
    "huber": lambda a, b: F.huber_loss(a, b, reduction="sum", delta=0.7),
    "bce": lambda a, b: F.binary_cross_entropy(a.sigmoid(), b.sigmoid()),
    "bce logits": lambda a, b: F.binary_cross_entropy_with_logits(a, b.sigmoid(), reduction="none"),
    "cross entropy of probabilities": lambda a, b: F.cross_entropy(a, b.softmax(-1)),
    "convolved": lambda a, b: F.conv1d(a.reshape(1, 1, -1), b.flatten()[:2].view(1, 1, -1)),
    "cdist": lambda a, b: torch.cdist(a, b),
    "inner": lambda a, b: torch.inner(a, b),
    "scatter_reduce": lambda a, b: a.scatter_reduce(
        0, torch.zeros(b.shape, dtype=torch.long), b, "amax"
    ),
    "einsum of three": lambda a, b: torch.einsum("ij,jk,lk->il", a, b.mT, a),
    "attention of torch": lambda a, b: F.scaled_dot_product_attention(a, b, b),
    "solved": lambda a, b: torch.linalg.solve_triangular(
        a.tril() + 2 * torch.eye(a.shape[-1]), b, upper=False
    ),
    "prelu": lambda a, b: F.prelu(a, b.flatten()[:1]),
    "cross entropy by hand": lambda a, b: -(a.log_softmax(-1) * b.softmax(-1).detach()).sum(-1),
}


def slope(y: Any, x: Any, start: Any = None) -> Any:
    """dy/dx, with a graph; None if y does not depend on x."""
    start = torch.ones_like(y) if start is None else start
    return torch.autograd.grad(y, x, start, create_graph=True, allow_unused=True)[0]


def again(y: Any, x: Any) -> Any:
    """The second derivative, or the first if there is no second one."""
    dy = slope(y, x)
    if dy is None or not dy.requires_grad:
        return dy
    ddy = slope(dy, x)
    return dy if ddy is None else ddy


def slopes(y: Any, params: Any) -> list[Any]:
    """The gradients of those parameters that y depends on, each with its parameter."""
    asked = [p for p in params if p.requires_grad]
    found = torch.autograd.grad(y.sum(), asked, create_graph=True, allow_unused=True)
    return [(p, g) for p, g in zip(asked, found, strict=True) if g is not None]


def penalty(y: Any, params: Any) -> Any:
    """The sum of the squared gradients of all weights."""
    squares = [(g * g).sum() for _, g in slopes(y, params)]
    return sum(squares[1:], squares[0]) if squares else None


def curved(y: Any, params: Any) -> Any:
    """The sum of the entries of the Hessian times the gradient."""
    found = [(p, g) for p, g in slopes(y, params) if g.requires_grad]
    if not found:
        return None
    weights, grads = zip(*found, strict=True)
    starts = [g.detach() for g in grads]
    products = torch.autograd.grad(grads, weights, starts, create_graph=True, allow_unused=True)
    numbers = [h.sum() for h in products if h is not None]
    return sum(numbers[1:], numbers[0]) if numbers else None


# Gradients with a graph, with which the program goes on computing.
GRADIENTS: dict[str, Any] = {
    "slope": lambda a, b, params: slope(a, b),
    "slope of a sum": lambda a, b, params: slope(a.sum(), b),
    "slope from what depends on it": lambda a, b, params: slope(a, b, a * 0.5),
    "slope by itself": lambda a, b, params: slope(a, a * 1 if a is b else b),
    "slope added": lambda a, b, params: b + slope(a, b) * 0.5,
    "slope of the slope": lambda a, b, params: again(a, b),
    "slope of norm one": lambda a, b, params: (slope(a, b).norm() - 1) ** 2,
    "slope of a square": lambda a, b, params: slope((a * a).sum(), b),
    "slopes of the weights": lambda a, b, params: penalty(a, params),
    "slopes of the weights of a square": lambda a, b, params: penalty(a * a, params),
    "curvature": lambda a, b, params: curved(a * a, params),
}
MODULES = [
    "linear",
    "linear no bias",
    "linear wide",
    "tanh",
    "relu",
    "relu_",
    "leaky",
    "net",
    "deep net",
    "two activations",
    "mixed net",
    "mse",
    "smooth net",
    "norm net",
    "batch norm",
    "layer norm",
    "prelu",
    "dropout",
    "embedding",
    "conv net",
]
INSTRUCTIONS = st.one_of(
    st.tuples(st.sampled_from(sorted(UNARY)), st.integers(0, 30), st.just(0)),
    st.tuples(st.sampled_from(sorted(BINARY)), st.integers(0, 30), st.integers(0, 30)),
    st.tuples(st.sampled_from(MODULES), st.integers(0, 30), st.integers(0, 30)),
)
WITH_GRADIENTS = st.one_of(
    INSTRUCTIONS,
    INSTRUCTIONS,
    st.tuples(st.sampled_from(sorted(GRADIENTS)), st.integers(0, 30), st.integers(0, 30)),
)
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"maximize": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Adagrad", {"lr_decay": 0.1}),
]
SHAPES = [(3,), (2, 3), (4, 3), (1, 3), (2, 2, 3), (3, 3), (0, 3), ()]
PROGRAMS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "shapes": st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.float64]),
        "leaf": st.booleans(),
        "frozen": st.sets(st.integers(0, 13), max_size=3),
        "body": st.one_of(
            st.lists(INSTRUCTIONS, min_size=1, max_size=12),
            st.lists(WITH_GRADIENTS, min_size=1, max_size=12),
        ),
        "losses": st.lists(st.integers(0, 30), min_size=1, max_size=3),
        "retain": st.booleans(),
        "twice": st.integers(0, 3).map(lambda n: n == 3),  # a backward through the gradients
        "hooks": st.booleans(),
        "retain_grad": st.booleans(),
        "steps": st.integers(1, 2),
        "optimizer": st.sampled_from(OPTIMIZERS),
        "schedule": st.booleans(),
        "bound": st.booleans(),
    }
)

REFUSED = "nnmirror"
NORMS = ("norm net", "batch norm", "layer norm", "layer_norm", "instance norm")
UNKNOWN = "is not implemented"  # PyTorch's message for a missing second derivative
ran: collections.Counter[str] = collections.Counter()
distinct: set[str] = set()


class Refused(Exception):
    """The mirror refused instruction `place`, or PyTorch has no second derivative there."""

    def __init__(self, place: Any) -> None:
        self.place = place


def message(error: Exception) -> str:
    """The message, without the part that names the tensor changed in place.

    Where several saved tensors were changed, or one several times, PyTorch names the first that its
    generated code unpacks, and the last operation on it. test_tape.py compares the whole message
    where there is one change.
    """
    said = re.sub(r"(modified by an inplace operation): .*", r"\1", normal(str(error)))
    # One of several changed tensors may be such a view; PyTorch may name another one first.
    said = re.sub(
        r"Output \d of \w+ is a view and its base .*",
        "one of the variables needed for gradient computation has been modified by an inplace"
        " operation",
        said,
    )
    # PyTorch itself gives either message for x[-1] of a 0-dim tensor.
    return said.replace(
        "select() cannot be applied to a 0-dim tensor.",
        "index -1 is out of bounds for dimension 0 with size 0",
    )


def modules_of(nn: Any, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "linear": nn.Linear(3, 3, dtype=dtype),
        "linear no bias": nn.Linear(3, 3, bias=False, dtype=dtype),
        "linear wide": nn.Linear(3, 4, dtype=dtype),
        "tanh": nn.Tanh(),
        "relu": nn.ReLU(),
        "relu_": nn.ReLU(inplace=True),
        "leaky": nn.LeakyReLU(0.2),
        "net": nn.Sequential(nn.Linear(3, 3, dtype=dtype), nn.Tanh(), nn.Linear(3, 3, dtype=dtype)),
        "deep net": nn.Sequential(
            nn.Linear(3, 4, dtype=dtype),
            nn.ReLU(inplace=True),
            nn.Sequential(nn.Linear(4, 4, bias=False, dtype=dtype), nn.LeakyReLU(0.1)),
            nn.Linear(4, 3, dtype=dtype),
            nn.Tanh(),
        ),
        "two activations": nn.Sequential(
            nn.LeakyReLU(0.3), nn.Tanh(), nn.Linear(3, 3, dtype=dtype)
        ),
        "mixed net": nn.Sequential(
            nn.Linear(3, 4, dtype=dtype),
            nn.Sigmoid(),
            nn.Hardtanh(-0.5, 0.6, inplace=True),
            nn.Linear(4, 4, dtype=dtype),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.LeakyReLU(0.1),
            nn.Linear(4, 3, dtype=dtype),
        ),
        "mse": nn.MSELoss(),
        "smooth net": nn.Sequential(
            nn.Linear(3, 4, dtype=dtype), nn.ELU(), nn.SiLU(), nn.Linear(4, 3, dtype=dtype),
            nn.Sigmoid(), nn.Hardtanh(-0.6, 0.6), nn.ReLU6(), nn.LogSoftmax(-1),
        ),
        "norm net": nn.Sequential(
            nn.Linear(3, 5, dtype=dtype), nn.BatchNorm1d(5, dtype=dtype), nn.ReLU(inplace=True),
            nn.Dropout(0.2), nn.LayerNorm(5, dtype=dtype), nn.Linear(5, 3, dtype=dtype),
            nn.Softmax(-1),
        ),
        "batch norm": nn.BatchNorm1d(3, dtype=dtype),
        "layer norm": nn.LayerNorm(3, dtype=dtype),
        "prelu": nn.PReLU(dtype=dtype),
        "dropout": nn.Dropout(0.4),
        "embedding": Looked(nn.Embedding(3, 3, padding_idx=1, dtype=dtype)),
        "conv net": Pictured(nn.Sequential(
            nn.Conv2d(1, 2, 2, padding=1, dtype=dtype), nn.ReLU(), nn.MaxPool2d(2, 1),
            nn.Conv2d(2, 2, (1, 2), dtype=dtype), nn.AvgPool2d((1, 2), 1),
            nn.ConvTranspose2d(2, 1, 2, dtype=dtype),
        )),
    }  # fmt: skip


class Pictured:
    """A net that gets the rows of a tensor as the rows of one image."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, a: Any) -> Any:
        return self.net(a.reshape(1, 1, -1, a.shape[-1]))

    def parameters(self) -> Any:
        return self.net.parameters()


class Looked:
    """An embedding of the index of the largest entry in each row."""

    def __init__(self, embedding: Any) -> None:
        self.embedding = embedding

    def __call__(self, a: Any) -> Any:
        return self.embedding(a.detach().argmax(-1) % 3)

    def parameters(self) -> Any:
        return self.embedding.parameters()


def run(nn: Any, optim: Any, program: dict[str, Any], skip: frozenset[Any]) -> list[Any]:
    """Run the program; return a log of tensors and errors. Raises Refused if the mirror refuses."""
    torch.manual_seed(program["seed"])
    log: list[Any] = []

    def attempt(place: Any, action: Any) -> Any:
        if place in skip:
            return None
        try:
            return action()
        except Exception as e:
            if REFUSED in str(e) or (UNKNOWN in str(e) and "derivative" in str(e)):
                raise Refused(place) from None
            log.append((type(e).__name__, message(e)))
            return None

    dtype = program["dtype"]
    recorded = [name for name, _, _ in program["body"] if name in GRADIENTS]
    # How many further gradients may be computed from a gradient, before the last.
    further = program["twice"] + len(recorded) + recorded.count("slope of the slope")
    further += recorded.count("curvature")
    again_back = further > 0
    modules = modules_of(nn, dtype)
    params = [p for m in modules.values() for p in m.parameters()]
    came: list[list[bool]] = [[] for _ in params]
    for i in program["frozen"]:
        params[i].requires_grad_(False)
    if program["hooks"]:
        modules["tanh"].register_forward_hook(lambda m, a, o: o * 2)
        modules["net"][1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
        modules["mixed net"][3].register_forward_hook(lambda m, a, o: o + 1)
        modules["linear"].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
        params[0].register_hook(lambda g: g * 2) if params[0].requires_grad else None
        if again_back:  # hooks are called with None if there is no gradient
            for i, p in enumerate(params):
                if p.requires_grad:
                    p.register_hook(lambda g, i=i: came[i].append(g is None))
    name, options = program["optimizer"]
    optimizer = getattr(optim, name)([p for p in params if p.requires_grad], lr=0.05, **options)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.7) if program["schedule"] else None
    for step in range(program["steps"]):
        # Inputs come out of a module, as activations do; some have a leaf before it.
        leaves = [torch.randn(s, dtype=dtype) for s in program["shapes"]]
        if program["leaf"]:
            leaves = [x.requires_grad_() for x in leaves]
        pool = [nn.functional.leaky_relu(x, 1.0) for x in leaves]
        for place, (name, i, j) in enumerate(program["body"]):
            a, b = pool[i % len(pool)], pool[j % len(pool)]

            def act(name: str = name, a: Any = a, b: Any = b) -> Any:
                if further > 1 and name in NORMS:
                    return None  # PyTorch's third derivative takes mean and deviation as constant
                if further > 1 and name == "conv net" and dtype is torch.float32:
                    return None  # its third derivative differs (nnmirror/exact/README.md)
                if further and name == "group norm":
                    return None  # its second derivative differs (see there too)
                if name in UNARY:
                    return UNARY[name](a)
                if name in BINARY:
                    return BINARY[name](a, b)
                if name in GRADIENTS:
                    return GRADIENTS[name](a, b, params)
                if a.dim() == 0 and name != "mse":
                    a = a * 1  # a stale view that is also 0-dim: either error may come first
                if again_back and a.dim() != 2 and re.search("linear|net|two", name):
                    # PyTorch records a reshape and a product, and adds gradients of
                    # gradients at each; the mirror records one node. The last bit may differ.
                    a = a.reshape(-1, a.shape[-1])
                if (
                    name in ("linear", "linear wide", "net", "two activations")
                    and program["retain_grad"]
                ):
                    # PyTorch returns some of these outputs (of other than two dimensions) as views
                    # of a hidden tensor; a gradient retained at one is lost when part of it is
                    # changed in place.
                    return modules[name](a) * 1
                if again_back and name == "embedding" and not a.numel():
                    return None  # PyTorch's second derivative fails at a reshape
                return modules[name](a, b) if name == "mse" else modules[name](a)

            result = attempt(place, act)
            if result is not None:
                ran[name] += 1
                pool.append(result)
                log.append((result.requires_grad, result.detach().clone()))
        kept = []
        for place, tensor in enumerate(pool):
            # Reading an attribute of a view may raise if its base was changed.
            def keep(tensor: Any = tensor) -> bool:
                # Read first: until then PyTorch takes a view whose base was changed for a leaf.
                if not tensor.requires_grad or tensor.grad_fn is None:
                    return False
                if program["retain_grad"]:
                    tensor.retain_grad()
                return True

            if attempt(("keep", step, place), keep):
                kept.append(tensor)
        optimizer.zero_grad()
        for n, i in enumerate(program["losses"] if kept else ()):
            target = kept[-1 - i % len(kept)]

            def back(target: Any = target) -> None:
                loss = target if target.numel() == 1 else target.sum()
                if program["twice"]:
                    loss.backward(torch.ones_like(loss), create_graph=True)
                elif program["bound"] and loss.dim() == 0:
                    loss.backward(retain_graph=program["retain"])
                else:
                    loss.backward(torch.ones_like(loss), retain_graph=program["retain"])

            before = len(log)
            attempt(("loss", step, n), back)
            if len(log) > before:
                # A backward that fails half-way has filled some .grad. Which ones depends on how
                # many nodes an operation is recorded as.
                return log
        if program["twice"]:
            given = [p.grad for p in params if p.grad is not None and p.grad.requires_grad]
            log.append(len(given))

            def back_again(given: Any = given) -> None:
                sum((g * g).sum() for g in given).backward()

            before = len(log)
            if given:
                attempt(("twice", step), back_again)
            if len(log) > before:
                return log
        grads = [p.grad for p in params]
        if program["retain_grad"]:
            grads += [t.grad for t in kept if t.retains_grad]
        log.append(
            [None if g is None else g.detach().clone() for g in [*grads, *(x.grad for x in leaves)]]
        )
        attempt(("step", step), optimizer.step)
        if schedule is not None:
            schedule.step()
        log.append([p.detach().clone() for p in params])
    log.append(came)
    return log


def difference(expected: Any, actual: Any, where: str = "log") -> str | None:
    """The first difference between two logs, or None."""
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        alike = expected.shape == actual.shape and expected.dtype == actual.dtype
        return None if alike and same_bits(expected, actual) else f"{where}: {expected} | {actual}"
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        for i, (e, a) in enumerate(zip(expected, actual, strict=False)):
            found = difference(e, a, f"{where}[{i}]")
            if found:
                return found
        return None if len(expected) == len(actual) else f"{where}: lengths differ"
    return None if expected == actual else f"{where}: {expected!r} | {actual!r}"


def check(program: dict[str, Any]) -> int:
    """Run the program on both backends; return how many instructions the mirror refused."""
    skip: frozenset[Any] = frozenset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while True:
            try:
                with bound_at_once() if program["bound"] else contextlib.nullcontext():
                    actual = run(nnmirror, nnmirror.optim, program, skip)
                expected = run(torch.nn, torch.optim, program, skip)
                break
            except Refused as refused:
                if refused.place in skip:
                    raise
                skip |= {refused.place}
    found = difference(expected, actual)
    assert found is None, found
    return len(skip)


def search(examples: int, derandomize: bool = False, seed: int = 0) -> tuple[int, int]:
    """Run so many programs; return how many ran and how many instructions were refused."""
    counted = [0, 0]

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )
    @given(PROGRAMS)
    def body(program: dict[str, Any]) -> None:
        counted[1] += check(program)
        counted[0] += 1
        distinct.add(hashlib.blake2b(repr(program).encode(), digest_size=8).hexdigest())

    body()
    return counted[0], counted[1]


CHUNK = 250


def one_chunk(number: int) -> dict[str, Any]:
    """Run the programs of one seed; return the results to be added to the account."""
    torch.set_num_threads(1)
    nnmirror.set_exact(True)
    ran.clear()
    distinct.clear()
    try:
        programs, refused = search(CHUNK, seed=number)
        failure = None
    except Exception as e:
        programs, refused, failure = 0, 0, "".join(traceback.format_exception(e)[-40:])
    return {
        "chunk": number,
        "programs": programs,
        "refused": refused,
        "ran": dict(ran),
        "distinct": sorted(distinct),
        "failure": failure,
    }


def code() -> str:
    """A hash of the package and of this file: an account is valid for one state of the code."""
    files = [*sorted(Path(nnmirror.__file__).parent.rglob("*.py")), Path(__file__)]
    return hashlib.blake2b(b"".join(f.read_bytes() for f in files), digest_size=8).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0, help=f"of the first {CHUNK} programs")
    parser.add_argument(
        "--account",
        type=Path,
        default=Path(".search.json"),
        help="where it is noted what has been tried; a run goes on from there",
    )
    args = parser.parse_args()
    account: dict[str, Any] = {"code": code(), "chunks": []}
    if args.account.exists():
        before = json.loads(args.account.read_text())
        if before["code"] == account["code"]:
            account = before
            print(f"going on after {sum(c['programs'] for c in account['chunks'])} programs")
        else:
            print("the code has changed since: starting anew")
    done = {c["chunk"] for c in account["chunks"] if not c["failure"]}
    account["chunks"] = [c for c in account["chunks"] if not c["failure"]]
    seeds = range(args.seed, args.seed - (-args.examples // CHUNK))
    todo = [n for n in seeds if n not in done]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for chunk in pool.imap_unordered(one_chunk, todo):
            account["chunks"].append(chunk)
            args.account.write_text(json.dumps(account))
            so_far = sum(c["programs"] for c in account["chunks"])
            print(f"{so_far} programs", "A DIFFERENCE" if chunk["failure"] else "", flush=True)
    chunks = account["chunks"]
    counts = sum((collections.Counter(c["ran"]) for c in chunks), collections.Counter())
    print("instructions run (both backends together):")
    for name, count in counts.most_common():
        print(f"  {name:20s} {count}")
    different = {h for c in chunks for h in c["distinct"]}
    print(
        f"{sum(c['programs'] for c in chunks)} programs, {len(different)} of them different;"
        f" {sum(c['refused'] for c in chunks)} of {counts.total() // 2} instructions refused"
    )
    failures = [c["failure"] for c in chunks if c["failure"]]
    for failure in failures:
        print(failure)
    print(f"{len(failures)} seeds found a difference" if failures else "no difference")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
