"""The training step of a Sequential of Linear and ReLU without any library of layers around it.

Each function takes the layers' sizes and the batch, and returns the step, the forward and the
weights: what benchmark.py shows beside PyTorch and the mirror. All start from PyTorch's weights.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

LR = 1e-3
Steps = tuple[Callable[[], Any], Callable[[], Any], Callable[[], list[torch.Tensor]]]


def start(sizes: tuple[int, ...], batch: int) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    """The Linears, the input and the target, as `nets.plain` makes them."""
    linears = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return linears, torch.randn(batch, sizes[0]), torch.randn(batch, sizes[-1])


def bare(sizes: tuple[int, ...], batch: int) -> Steps:
    """The same tensor operations into preallocated buffers, and nothing else: PyTorch's bits."""
    linears, x, t = start(sizes, batch)
    ws, bs = ([getattr(m, n).detach() for m in linears] for n in ("weight", "bias"))
    wts = [w.t() for w in ws]
    hs = [x, *[torch.empty(batch, n) for n in sizes[1:]]]
    gs = [torch.empty_like(h) for h in hs]
    gts = [g.t() for g in gs]
    # For many numbers, selecting by bit operations is faster than a mask.
    by_bits = [h.numel() >= 4096 for h in hs]
    masks = [
        torch.empty(h.shape, dtype=torch.int32 if b else torch.bool)
        for h, b in zip(hs, by_bits, strict=True)
    ]
    ints = [g.view(torch.int32) for g in gs]
    dws, dbs = [torch.empty_like(w) for w in ws], [torch.empty_like(b) for b in bs]
    params, grads = [*ws, *bs], [*dws, *dbs]
    squared, n = torch.empty_like(t), torch.tensor(float(t.numel()))
    scale, zero, last = torch.tensor(2.0 / t.numel()), torch.zeros(()), len(ws) - 1

    def forward() -> None:
        for i in range(last + 1):
            torch.addmm(bs[i], hs[i], wts[i], out=hs[i + 1])
            if i < last:
                torch.relu_(hs[i + 1])

    def step() -> None:
        forward()
        torch.sub(hs[-1], t, out=gs[-1])
        torch.mul(gs[-1], gs[-1], out=squared).sum().div_(n)
        gs[-1].mul_(scale)
        for i in range(last, -1, -1):
            torch.sum(gs[i + 1], 0, out=dbs[i])
            if i:
                torch.mm(gs[i + 1], ws[i], out=gs[i])
            torch.mm(gts[i + 1], hs[i], out=dws[i])
            if i:
                torch.le(hs[i], zero, out=masks[i])
                if by_bits[i]:
                    ints[i].bitwise_and_(masks[i].sub_(1))
                else:
                    gs[i].masked_fill_(masks[i], 0)
        torch._foreach_add_(params, grads, alpha=-LR)

    return step, forward, lambda: [p for pair in zip(ws, bs, strict=True) for p in pair]


def by_numpy(sizes: tuple[int, ...], batch: int) -> Steps:
    """By hand in NumPy: the same arithmetic, not the same rounding."""
    linears, *data = start(sizes, batch)
    ws, bs = ([getattr(m, n).detach().numpy().copy() for m in linears] for n in ("weight", "bias"))
    x, t = (part.numpy() for part in data)
    last = len(ws) - 1

    def forward() -> list[Any]:
        hs = [x]
        for i in range(last + 1):
            h = hs[i] @ ws[i].T
            h += bs[i]
            hs.append(np.maximum(h, 0, out=h) if i < last else h)
        return hs

    def step() -> None:
        hs = forward()
        g = hs[-1] - t
        (g * g).mean()
        g *= np.float32(2.0 / t.size)
        for i in range(last, -1, -1):
            db, dw = g.sum(0), g.T @ hs[i]
            if i:
                g = g @ ws[i]
                g[hs[i] <= 0] = 0
            ws[i] -= np.float32(LR) * dw
            bs[i] -= np.float32(LR) * db

    return step, forward, lambda: []


def by_jax(sizes: tuple[int, ...], batch: int) -> Steps:
    """The step as one function that JAX compiles, in as many threads as JAX chooses."""
    import jax
    from jax import numpy as jnp

    linears, *data = start(sizes, batch)
    params = [tuple(jnp.asarray(p.detach().numpy()) for p in m.parameters()) for m in linears]
    x, t = (jnp.asarray(part.numpy()) for part in data)

    def run(params: Any, h: Any) -> Any:
        *inner, (w, b) = params
        for weight, bias in inner:
            h = jnp.maximum(h @ weight.T + bias, 0)
        return h @ w.T + b

    def update(params: Any, x: Any, t: Any) -> Any:
        grads = jax.grad(lambda p: jnp.mean((run(p, x) - t) ** 2))(params)
        return jax.tree.map(lambda p, g: p - LR * g, params, grads)

    jitted, forward = jax.jit(update), jax.jit(run)

    def step() -> None:
        nonlocal params
        params = jax.block_until_ready(jitted(params, x, t))

    return step, lambda: jax.block_until_ready(forward(params, x)), lambda: []


def compiled(sizes: tuple[int, ...], batch: int) -> Steps:
    """PyTorch's own, the model by torch.compile."""
    linears, x, t = start(sizes, batch)
    layers = [layer for linear in linears for layer in (linear, torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers[:-1])
    run: Any = torch.compile(model)
    criterion, optimizer = torch.nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        criterion(run(x), t).backward()
        optimizer.step()

    def forward() -> None:
        with torch.no_grad():
            run(x)

    return step, forward, lambda: []
