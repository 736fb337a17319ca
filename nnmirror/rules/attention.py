"""Attention: y = softmax(c q k^T) v, by operations that have rules or, block by block, like the
kernel that PyTorch uses on the CPU.
"""

import math
from collections.abc import Mapping

import torch

from .. import _torch
from .._torch import DisableTorchFunctionSubclass, is_torch_function_enabled
from .._types import TorchFunction
from ..tape import record
from . import shape
from .arithmetic import Add, Mul
from .dropout import dropout
from .kernel import lane_sum, vector_exp, widened
from .matmul import matmul
from .registry import Gradients, Needs, Rule, answered, plain_values, unplaced
from .softmax import Softmax

T = torch.Tensor


_choice: TorchFunction = _torch.fused_sdp_choice


class SafeSoftmax(Softmax):
    """y = softmax(x) along dim, 0 where all of x is minus infinity:  dx = (g - sum of g y) y"""

    public = staticmethod(_torch.safe_softmax)

    @staticmethod
    def forward(input: T, dim: int) -> T:
        return _torch.safe_softmax(input, dim)


class ScaledDotProductFlashAttentionForCpu(Rule):
    """y = p v, p = softmax(c q k^T + mask):  dv = p^T g,  dq = c s k,  dk = c s^T q

    with s = p (g v^T - r), r = the sum of g y along the last dimension. Saved: q, k, v, the mask,
    y, and l, the logarithm of the sum that each row of p was divided by. p is computed again, as
    exp(c q k^T + mask - l), in blocks of rows and columns. In a recorded backward it is computed as
    a whole, and without l (PyTorch has no gradient of this gradient).

    Dao et al., 2022 (arXiv:2205.14135), algorithm 4.
    """

    keeps = derived = ("logsum",)

    @staticmethod
    def forward(
        query: T, key: T, value: T, attn_mask: T | None, is_causal: bool, scale: float | None
    ) -> tuple[T, T]:
        return _torch.scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )

    @staticmethod
    def logsum_again(logsum: T) -> T:
        return logsum  # not used by a recorded gradient

    @staticmethod
    def gradients(
        needs: Needs,
        g: T,
        query: T,
        key: T,
        value: T,
        attn_mask: T | None,
        is_causal: bool,
        scale: float | None,
        result: T,
        logsum: T,
    ) -> Gradients:
        q, k, v, mask, y = query, key, value, attn_mask, result
        c = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if is_torch_function_enabled():
            return _with_whole(g, q, k, v, mask, is_causal, c, y)
        dtype, narrow = q.dtype, q.dtype.itemsize == 2
        q, k, v, y, g = widened(q, k, v, y, _heads_last(g))
        length, keys = q.shape[2], k.shape[2]
        rows = min(length, 32 if length < 192 else 64 if length < 768 else 256)
        columns = min(keys, 512)
        if mask is not None:
            mask = mask.expand(*q.shape[:3], keys)
        dq, dk, dv = (_heads_last(torch.zeros_like(t)) for t in (q, k, v))
        shared = q.shape[1] // k.shape[1]  # the number of heads of q per head of k and v
        for first in range(shared):
            of = slice(first, None, shared)
            for m in range(0, length, rows):
                at = of, slice(m, m + rows)
                qm, gm, lm = q[:, *at], g[:, *at], logsum[:, *at].unsqueeze(-1)
                r = lane_sum(gm * y[:, *at], narrow).unsqueeze(-1)
                seen = min(m + qm.shape[2], keys) if is_causal else keys
                for n in range(0, seen, columns):
                    to = slice(n, n + columns)
                    kn, vn = k[:, :, to], v[:, :, to]
                    p = _products(None, qm, kn.mT, c)
                    if mask is not None:
                        p = p + mask[:, *at, to]
                    p = p - lm
                    p = torch.where(p > 0, p.exp(), vector_exp(p))
                    if is_causal and seen - n <= columns:
                        p = p.tril(m - n)
                    s = p * (_products(None, gm, vn.mT) - r)
                    if narrow:
                        p, s = p.to(dtype).float(), s.to(dtype).float()
                    _products(dv[:, :, to], p.mT, gm)
                    _products(dq[:, *at], s, kn, c)
                    _products(dk[:, :, to], s.mT, qm, c)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _with_whole(
    g: T, q: T, k: T, v: T, mask: T | None, is_causal: bool, c: float, y: T
) -> Gradients:
    """dq, dk and dv in operations that have rules."""
    dtype = q.dtype
    q, k, v, y, g = widened(q, k, v, y, g)
    heads, shared = k.shape[:2], q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q @ k.mT * c
    if mask is not None:
        scores = scores + mask
    if is_causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(unseen, -math.inf)
    p = record(SafeSoftmax, (scores, -1))[0]
    s = p * (g @ v.mT - (g * y).sum(-1, True)) * c
    dq, dk, dv = s @ k, s.mT @ q, p.mT @ g
    if shared > 1:
        dk, dv = (t.view(*heads, shared, *t.shape[2:]).sum(2) for t in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _heads_last(x: T) -> T:
    """With the memory layout (batch, length, heads, size), the order in which the kernel
    iterates."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _products(to: T | None, a: T, b: T, factor: float = 1.0) -> T:
    """factor a b for each matrix, added to `to` if there is one.

    For matrices this small, torch.bmm has a loop of its own, which rounds differently. The rounding
    of a product with a single row or column depends on the memory layout of the matrices.
    """
    batch, heads, m, n = *a.shape[:-1], b.shape[-1]
    total: T = a.new_empty(batch, heads, m, n) if to is None else to
    beta = int(to is not None)
    if m * a.shape[-1] * n < 400:
        for i in range(batch):
            for j in range(heads):
                total[i, j].addmm_(a[i, j], b[i, j], beta=beta, alpha=factor)
    elif min(m, a.shape[-1], n) == 1:
        for i in range(batch):
            total[i].baddbmm_(a[i], b[i], beta=beta, alpha=factor)
    else:
        flat = total.flatten(0, 1)  # a copy, if they are not adjacent in memory
        flat.baddbmm_(_in_a_row(a), _in_a_row(b), beta=beta, alpha=factor)
        if flat.data_ptr() != total.data_ptr():
            total.copy_(flat.view(total.shape))
    return total


def _in_a_row(x: T) -> T:
    """All matrices of a batch, adjacent in memory, each row-major or column-major as it was."""
    return x.flatten(0, 1) if x.stride(-1) == 1 else x.mT.flatten(0, 1).mT


@answered(torch._C._nn.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: T,
    key: T,
    value: T,
    attn_mask: T | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> T:
    """y = softmax(c q k^T + mask) v, c = `scale` or 1 / sqrt(the size of a head)

    Shapes: q (..., l, e), k (..., s, e), v (..., s, n), the mask (..., l, s); y is (..., l, n). The
    mask is added, or is True where q attends to k; `is_causal` masks later positions. With
    `enable_gqa` several heads of q share one of k and v. `ScaledDotProductFlashAttentionForCpu` is
    used whenever PyTorch uses that kernel.

    Vaswani et al., 2017 (arXiv:1706.03762).
    """
    args = query, key, value, attn_mask, dropout_p, is_causal
    more = {"scale": scale, "enable_gqa": enable_gqa}
    tensors = [query, key, value]
    is_valid = all(isinstance(t, T) and t.dim() > 1 and t.is_floating_point() for t in tensors)
    if not is_valid or len({(t.dtype, t.device) for t in tensors}) > 1:
        raise _unplaced(args, more)
    if attn_mask is not None:
        kind = attn_mask.dtype if isinstance(attn_mask, T) else None
        if kind not in (torch.bool, torch.float32, query.dtype):
            raise _unplaced(args, more)
        if kind is torch.bool:
            attn_mask = _added(attn_mask, query)
    if any(0 in t.shape for t in tensors):
        # As in PyTorch, without further checks: zeros, and gradients of zero.
        zeros = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        total = (query.sum() + key.sum()) + value.sum()
        return record(Add, (zeros, record(Mul, (total, 0))[0]))[0]
    if not query.is_cpu or (attn_mask is not None and attn_mask.requires_grad):
        flash = False
    else:
        with DisableTorchFunctionSubclass(), torch.no_grad():
            plain = plain_values((query, key, value, attn_mask))
            flash = _choice(*plain, dropout_p, is_causal, **more) != 0
    if flash:
        function: type[Rule] = ScaledDotProductFlashAttentionForCpu
        return record(function, (query, key, value, attn_mask, is_causal, scale))[0]
    if (is_causal and attn_mask is not None) or dropout_p > 1:
        raise _unplaced(args, more)
    dtype = query.dtype
    if dtype.itemsize == 2 and not _torch.get_math_sdp_allow_fp16_bf16_reduction():
        query, key, value = (shape.to(t, torch.float32) for t in tensors)
    c = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(c))
    query = record(Mul, (query, math.copysign(root, c)))[0]
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        attn_mask = _added(seen.tril(), query)
    if enable_gqa:
        heads = query.shape[-3]
        if any(heads % t.shape[-3] for t in (key, value)):
            raise _unplaced(args, more)
        key, value = (
            t if t.shape[-3] == heads else t.repeat_interleave(heads // t.shape[-3], -3)
            for t in (key, value)
        )
    p = matmul(query, record(Mul, (shape.transpose(key, -2, -1), root))[0])
    if attn_mask is not None:
        p = record(Add, (p, attn_mask))[0]
    p = record(SafeSoftmax, (p, -1))[0]
    if dropout_p > 0:
        p = dropout(p, dropout_p, True, False)
    y = matmul(p, value)
    return y if y.dtype is dtype else shape.to(y, dtype)


def _added(seen: T, like: T) -> T:
    """What to add to a row that attends only to these: 0 there, minus infinity elsewhere."""
    zero, never = (like.new_full((), x) for x in (0.0, -math.inf))
    with DisableTorchFunctionSubclass():
        return torch.where(seen, zero.detach(), never.detach())


def _unplaced(args: tuple[object, ...], more: Mapping[str, object]) -> Exception:
    return unplaced(torch._C._nn.scaled_dot_product_attention, args, more)
