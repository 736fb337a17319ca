"""Attention: from the plain formula and from the blockwise kernel."""

import pytest
import torch

import nnmirror

from .parity import cpu_only, parity

DTYPES = [torch.float32, torch.float64]
# Shapes of q, k and v: one block, several blocks, a remainder of a vector register, one key.
SHAPES = {
    "small": ((2, 3, 4, 8),) * 3,
    "longer keys": ((2, 2, 10, 16), (2, 2, 17, 16), (2, 2, 17, 16)),
    "two blocks": ((1, 2, 33, 20),) * 3,
    "larger blocks": ((1, 2, 200, 16),) * 3,
    "blocks of keys": ((1, 2, 64, 20), (1, 2, 700, 20), (1, 2, 700, 20)),
    "one key": ((2, 3, 40, 7), (2, 3, 1, 7), (2, 3, 1, 7)),
    "without heads": ((5, 8), (6, 8), (6, 8)),
    "one head": ((3, 5, 8), (3, 6, 8), (3, 6, 4)),
    "other values": ((2, 2, 5, 16), (2, 2, 5, 16), (2, 2, 5, 12)),
    "many batches": ((2, 2, 3, 4, 6),) * 3,
}
MASKS = {
    "none": lambda *size: None,
    "some": lambda *size: torch.rand(size[-2:]) > 0.3,
    "a row of none": lambda *size: torch.cat([torch.zeros(1, size[-1]), torch.rand(size[-2] - 1, size[-1])]) > 0.3,
    "added": lambda *size: torch.randn(size[-2:]),
    "added to all rows": lambda *size: torch.randn(1, size[-1]),
    "for each": lambda *size: torch.randn(size),
}  # fmt: skip


def attended(nn, shapes, dtype, heads_last, attend):
    """The output, its node and the gradients; `heads_last` stores the heads after the length."""

    def leaf(shape):
        x = torch.randn(shape, dtype=dtype)
        if heads_last and len(shape) > 2:
            x = x.transpose(-3, -2).contiguous().transpose(-3, -2)
        return nn.Parameter(x)

    leaves = [leaf(shape) for shape in shapes]
    y = attend(*leaves)
    y.backward(torch.randn(y.shape, dtype=dtype))
    return y, y.grad_fn.name(), [p.grad for p in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
@parity
def test_attention(nn, optim, shape, mask, dropout_p, heads_last, dtype):
    q, k, _ = shapes = SHAPES[shape]
    mask = MASKS[mask](*q[:-1], k[-2])
    mask = mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)
    return attended(
        nn,
        shapes,
        dtype,
        heads_last,
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p),
    )


WAYS = {
    "causal": {"is_causal": True},
    "causal, dropped": {"is_causal": True, "dropout_p": 0.2},
    "scaled": {"scale": 0.3},
    "scaled, dropped": {"scale": -0.3, "dropout_p": 0.2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@parity
def test_ways(nn, optim, shape, way, dtype):
    def attend(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, **WAYS[way])

    return attended(nn, SHAPES[shape], dtype, False, attend)


@pytest.mark.parametrize("way", ["causal", "masked", "shared keys"])
@parity
def test_long_sequences(nn, optim, way):
    """So long that the weights are computed for some rows at a time."""
    heads = 2 if way == "shared keys" else 1
    shapes = (1, heads, 1100, 8), (1, 1, 1000, 8), (1, 1, 1000, 8)
    mask = torch.rand(1100, 1000) > 0.3 if way == "masked" else None

    def attend(q, k, v):
        return nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=way == "causal", enable_gqa=heads > 1
        )

    return attended(nn, shapes, torch.float32, False, attend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("is_causal", [False, True])
@parity
def test_heads_that_share_keys(nn, optim, is_causal, dropout_p, dtype):
    def attend(q, k, v):
        return nn.functional.scaled_dot_product_attention(
            q, k, v, None, dropout_p, is_causal, enable_gqa=True
        )

    small = (2, 6, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)
    large = (2, 6, 50, 16), (2, 3, 50, 16), (2, 3, 50, 16)
    return [attended(nn, shapes, dtype, False, attend) for shapes in (small, large)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@parity
def test_shared_and_frozen_arguments(nn, optim, dropout_p):
    F, x = nn.functional, nn.Parameter(torch.randn(2, 3, 9, 8))
    others = [torch.randn(2, 3, 9, 8) for _ in range(2)]
    mask = nn.Parameter(torch.randn(9, 9))
    results = []
    for args in ((x, x, x), (x, *others), (others[0], x, others[1]), (*others, x), (x, x, x, mask)):
        y = F.scaled_dot_product_attention(*args, dropout_p=dropout_p)
        y.backward(torch.randn(y.shape))
        results += [y, x.grad.clone(), None if mask.grad is None else mask.grad.clone()]
    return results


@parity
def test_sdpa_kernel_chooses_the_formula(nn, optim):
    """torch.nn.attention.sdpa_kernel chooses the kernel whose bits are mirrored."""
    x = nn.Parameter(torch.randn(1, 2, 40, 16))
    results = []
    for kind in (torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        with torch.nn.attention.sdpa_kernel(kind):
            y = nn.functional.scaled_dot_product_attention(x, x, x)
        y.backward(torch.randn(y.shape))
        results += [y, y.grad_fn.name(), x.grad.clone()]
    return results


@parity
def test_a_block_of_a_transformer_trains(nn, optim):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.LayerNorm(16), nn.Linear(16, 48)
            self.out, self.gated = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 32), nn.GLU())

        def forward(self, x):
            heads = self.mix(self.norm(x)).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(x.shape))
            return x + self.gated(x)

    model, losses = Block(), []
    optimizer, x = optim.AdamW(model.parameters(), lr=1e-2), torch.randn(3, 12, 16)
    for _ in range(4):
        loss = (model(x) - x.flip(1)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("way", [*WAYS, "masked"])
def test_gradients_by_finite_differences(way):
    """Central differences in float64: a check that does not depend on PyTorch."""
    torch.manual_seed(0)
    values = [torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3)]
    more = WAYS.get(way, {"attn_mask": torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]]).bool()})
    g, h = torch.randn(1, 2, 3, 4, dtype=torch.float64), 1e-6

    def of(*args):
        torch.manual_seed(1)
        return nnmirror.functional.scaled_dot_product_attention(*args, **more)

    leaves = [nnmirror.Parameter(v.clone()) for v in values]
    of(*leaves).backward(g)
    for k, value in enumerate(values):
        for i in range(value.numel()):
            step = torch.zeros(value.numel(), dtype=torch.float64)
            step[i] = h
            up, down = (
                of(*values[:k], value + s * step.view(value.shape), *values[k + 1 :])
                for s in (1, -1)
            )
            slope = (g * (up - down)).sum() / (2 * h)
            assert abs(leaves[k].grad.reshape(-1)[i] - slope) < 1e-8


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 33, 20), (4, 4, 64, 32), (1, 2, 200, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_near(dtype, shape, is_causal):
    """The same outputs. PyTorch's kernel computes 32-bit products of 16-bit numbers in the
    backward, which no tensor operation does: gradients differ by about a unit in the last place of
    the largest."""
    most = 0.01 if dtype is torch.bfloat16 else 0.002
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype) for _ in range(4)]
    outputs, grads = [], []
    for nn in (torch.nn, nnmirror):
        leaves = [nn.Parameter(v) for v in values[:3]]
        y = nn.functional.scaled_dot_product_attention(*leaves, is_causal=is_causal)
        y.backward(values[3])
        outputs.append(y.detach().as_subclass(torch.Tensor))
        grads.append([p.grad.float() for p in leaves])
    assert torch.equal(*outputs)
    for expected, actual in zip(*grads, strict=True):
        off = (expected - actual).abs()
        assert off.max() <= most * expected.abs().max()
        assert (off > 0).float().mean() <= 0.45


WRONG = {
    "sizes": lambda F, x: F(x, x[..., :2], x),
    "dtypes": lambda F, x: F(x, x.double(), x),
    "a vector": lambda F, x: F(x[0, 0, 0], x, x),
    "integers": lambda F, x: F(x.long(), x.long(), x),
    "mask dtype": lambda F, x: F(x, x, x, torch.ones(3, 3, dtype=torch.long)),
    "mask shape": lambda F, x: F(x, x, x, torch.ones(2, 3)),
    "mask and causal": lambda F, x: F(x, x, x, torch.ones(3, 3), 0.5, True),
    "dropout": lambda F, x: F(x, x, x, dropout_p=1.5),
    "groups": lambda F, x: F(x, x[:, :1].expand(1, 3, 3, 4), x, dropout_p=0.5, enable_gqa=True),
    "a list": lambda F, x: F([1.0], x, x),
    "unknown": lambda F, x: F(x, x, x, causal=True),
    "missing": lambda F, x: F(x, x),
}


@pytest.mark.parametrize("name", WRONG)
@parity
@cpu_only("the messages of other devices' kernels differ")
def test_wrong_arguments(nn, optim, name):
    x = nn.Parameter(torch.randn(1, 2, 3, 4))
    return WRONG[name](torch.nn.functional.scaled_dot_product_attention, x)


@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 3), (0, 1), (0, 4)),
        ((2, 3), (0, 1), (0, 4)),
        ((0, 3), (2, 3), (2, 4)),
        ((2, 3), (2, 3), (2, 0)),
        ((0, 2, 3), (0, 2, 3), (0, 2, 3)),
        ((2, 1, 0, 3), (2, 1, 4, 3), (2, 1, 4, 3)),
    ],
)
@parity
def test_empty_tensors(nn, optim, shapes):
    """PyTorch does not check whether the shapes of empty tensors match."""
    given = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    out = torch.nn.functional.scaled_dot_product_attention(*[p * 1 for p in given])
    out.sum().backward()
    return out.detach(), [p.grad for p in given]


@pytest.mark.parametrize("how", ["plain", "causal", "masked", "shared heads"])
def test_gradients_of_gradients_where_pytorch_has_none(how):
    """PyTorch's CPU kernel has no second derivative; the mirror has that of the formula."""
    torch.manual_seed(0)
    kwargs = {"is_causal": how == "causal"}
    heads = 2 if how == "shared heads" else 4
    kwargs["enable_gqa"] = heads == 2
    if how == "masked":
        kwargs["attn_mask"] = torch.tensor([[True, False, True]]).expand(5, 3)
    shapes = (2, 4, 5, 3), (2, heads, 5 if how == "causal" else 3, 3)
    q, k, v = (torch.randn(shapes[i > 0], dtype=torch.float64) for i in range(3))

    def formula(q, k, v):
        k, v = (t.repeat_interleave(4 // heads, 1) for t in (k, v))
        s = q @ k.mT / 3**0.5
        seen = kwargs.get("attn_mask")
        if how == "causal":
            seen = torch.ones(5, 5, dtype=torch.bool).tril()
        return torch.softmax(s if seen is None else s.masked_fill(~seen, -float("inf")), -1) @ v

    def second(function, leaves):
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    expected = second(formula, [t.clone().requires_grad_() for t in (q, k, v)])
    actual = second(
        lambda *x: nnmirror.functional.scaled_dot_product_attention(*x, **kwargs),
        [nnmirror.Parameter(t) for t in (q, k, v)],
    )
    for e, a in zip(expected, actual, strict=True):
        assert (e - a).abs().max() <= 1e-12 * e.abs().max()
