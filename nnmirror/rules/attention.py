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
from .kernel import alone, widened
from .matmul import matmul
from .registry import Gradients, Needs, Rule, answered, unplaced
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
    """y = p v, p = softmax(c q k^T + mask):  dv = p^T g,  dq = s k,  dk = s^T q

    with s = c p (g v^T - r), r = the sum of g y along the last dimension. Saved: q, k, v, the mask,
    y, and l, the logarithm of the sum that each row of p was divided by. p is computed again, as
    exp(c q k^T + mask - l), a block of rows at a time if there are many. In a recorded backward it
    is computed as a whole, and without l (PyTorch has no gradient of this gradient).

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

    @classmethod
    def gradients(
        cls,
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
        return cls.in_blocks(g, q, k, v, mask, is_causal, c, y, logsum)

    @staticmethod
    def in_blocks(
        g: T, q: T, k: T, v: T, mask: T | None, is_causal: bool, c: float, y: T, logsum: T
    ) -> Gradients:
        """dq, dk and dv, with the heads after the length in memory."""
        dtype = q.dtype
        q, k, v, y, g = widened(q, k, v, y, g)
        batch, heads, length, keys = *q.shape[:3], k.shape[2]
        shared = heads // k.shape[1]  # the number of heads of q per head of k and v
        if shared > 1:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        r = (g * y).sum(-1, True).flatten(0, 1)
        # The copies, if they are some, are made in memory that a bound walk keeps.
        q, k, v, g = (t.contiguous().flatten(0, 1) for t in (q, k, v, g))
        logsum = logsum.flatten(0, 1).unsqueeze(-1)
        rows = min(length, max(1, _MOST // (len(q) * keys)))
        every: list[T] = []
        dk = dv = None
        for m in range(0, length, rows):
            to = min(m + rows, length)
            seen = min(to, keys) if is_causal else keys
            qm, gm, lm, rm = (_rows(t, m, to) for t in (q, g, logsum, r))
            kn, vn = (_rows(t, 0, seen) for t in (k, v))
            p = torch.baddbmm(lm, qm, kn.mT, beta=-1, alpha=c)
            if mask is not None:
                masked = mask.expand(batch, heads, length, keys)[:, :, m:to, :seen]
                p.view(masked.shape).add_(masked)
            p = alone(torch.exp, p)
            if is_causal:
                p.tril_(m)
            s = torch.baddbmm(rm, gm, vn.mT, beta=-c, alpha=c).mul_(p)
            every.append(s.bmm(kn))
            if rows == length and seen == keys:
                dk, dv = s.mT.bmm(qm), p.mT.bmm(gm)
                continue
            if dk is None or dv is None:
                dk, dv = torch.zeros_like(k), torch.zeros_like(v)
            dk[:, :seen].baddbmm_(s.mT, qm)
            dv[:, :seen].baddbmm_(p.mT, gm)
        dq = every[0] if len(every) == 1 else torch.cat(every, 1)
        assert dk is not None
        assert dv is not None
        dq = dq.view(batch, heads, *dq.shape[1:])
        dk, dv = (t.view(batch, heads // shared, shared, *t.shape[1:]) for t in (dk, dv))
        dk, dv = (t.squeeze(2) if shared == 1 else t.sum(2) for t in (dk, dv))
        return tuple([heads_last(t).to(dtype) for t in (dq, dk, dv)])


def _rows(x: T, start: int, end: int) -> T:
    """These rows of each matrix."""
    return x if end - start == x.shape[1] else x[:, start:end]


_MOST = 2**20  # elements of a block of p: as many rows of it as that allows


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


def heads_last(x: T) -> T:
    """With the memory layout (batch, length, heads, size), the order in which the kernel
    iterates."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


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
    with DisableTorchFunctionSubclass():
        is_valid = all(isinstance(t, T) and t.dim() > 1 and t.is_floating_point() for t in tensors)
        if is_valid:
            dtype, device = query.dtype, query.device
            is_valid = all(t.dtype is dtype and t.device == device for t in (key, value))
            is_empty = any(0 in t.shape for t in tensors)
    if not is_valid:
        raise _unplaced(args, more)
    if attn_mask is not None:
        kind = attn_mask.dtype if isinstance(attn_mask, T) else None
        if kind not in (torch.bool, torch.float32, dtype):
            raise _unplaced(args, more)
        if kind is torch.bool:
            attn_mask = _added(attn_mask, query)
    if is_empty:
        # As in PyTorch, without further checks: zeros, and gradients of zero.
        zeros = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        total = (query.sum() + key.sum()) + value.sum()
        return record(Add, (zeros, record(Mul, (total, 0))[0]))[0]
    if device.type != "cpu" or (attn_mask is not None and attn_mask.requires_grad):
        flash = False
    else:
        with DisableTorchFunctionSubclass():
            flash = _choice(query, key, value, attn_mask, dropout_p, is_causal, **more) != 0
    if flash:
        function: type[Rule] = ScaledDotProductFlashAttentionForCpu
        return record(function, (query, key, value, attn_mask, is_causal, scale))[0]
    if (is_causal and attn_mask is not None) or dropout_p > 1:
        raise _unplaced(args, more)
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
