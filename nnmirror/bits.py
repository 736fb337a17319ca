"""Are two tensors equal to the last bit?"""

import torch

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    """Equal, zeros of the same sign, and NaN where the other is NaN."""
    if expected.is_complex() and actual.is_complex():
        return same_bits(torch.view_as_real(expected), torch.view_as_real(actual))
    if not (expected.is_floating_point() and expected.dtype is actual.dtype):
        return torch.equal(expected, actual)
    if expected.shape != actual.shape:
        return False
    e, a = expected.detach(), actual.detach()
    integer = None if e.is_neg() or a.is_neg() else _INTEGERS.get(e.element_size())
    if integer is not None and torch.equal(e.view(integer), a.view(integer)):
        return True  # the usual case; a NaN may have other bits
    if not e.dim():
        return not differing_bits(e, a).any()
    pieces = (e.numel() >> 16) + 1  # as this takes new memory
    return not any(
        differing_bits(*piece).any() for piece in zip(e.chunk(pieces), a.chunk(pieces), strict=True)
    )


def differing_bits(e: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Where they differ; all NaNs are alike."""
    nans = e.isnan(), a.isnan()
    differ = (e != a) | (e.signbit() != a.signbit())
    return torch.where(nans[0] | nans[1], nans[0] != nans[1], differ)


def same_layout_and_bits(expected: torch.Tensor, actual: torch.Tensor | None) -> bool:
    """The same, and the same shape, strides and dtype."""
    if expected.is_meta:
        return True
    return (
        actual is not None
        and expected.shape == actual.shape
        and expected.stride() == actual.stride()
        and expected.dtype is actual.dtype
        and same_bits(expected, actual)
    )
