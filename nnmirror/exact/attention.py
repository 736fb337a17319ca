"""Attention, rounded as the kernel that PyTorch uses on the CPU rounds it: block by block."""

import torch

from ..rules import attention
from ..rules.kernel import lane_sum, vector_exp, widened
from ..rules.registry import Gradients
from .attach import exact_of

T = torch.Tensor


@exact_of(attention.ScaledDotProductFlashAttentionForCpu, "scaled_dot_product_attention", units=256)
class ScaledDotProductFlashAttentionForCpu(attention.ScaledDotProductFlashAttentionForCpu):
    """The gradients of the rule, in the kernel's blocks of rows and columns."""

    is_recordable = False

    @staticmethod
    def in_blocks(
        g: T, q: T, k: T, v: T, mask: T | None, is_causal: bool, c: float, y: T, logsum: T
    ) -> Gradients:
        dtype, narrow = q.dtype, q.dtype.itemsize == 2
        q, k, v, y, g = widened(q, k, v, y, attention.heads_last(g))
        length, keys = q.shape[2], k.shape[2]
        rows = min(length, 32 if length < 192 else 64 if length < 768 else 256)
        columns = min(keys, 512)
        if mask is not None:
            mask = mask.expand(*q.shape[:3], keys)
        dq, dk, dv = (attention.heads_last(torch.zeros_like(t)) for t in (q, k, v))
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
