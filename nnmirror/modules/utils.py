"""Arguments that are one number for all dimensions, or one number per dimension."""

from typing import Union

from ..rules.sizes import ntuple as _ntuple

# As they are written in PyTorch's signatures.
_size_any_t = Union[int, tuple[int, ...]]  # noqa: UP007
_size_1_t = Union[int, tuple[int]]  # noqa: UP007
_size_2_t = Union[int, tuple[int, int]]  # noqa: UP007
_size_3_t = Union[int, tuple[int, int, int]]  # noqa: UP007
_size_4_t = Union[int, tuple[int, int, int, int]]  # noqa: UP007
_size_6_t = Union[int, tuple[int, int, int, int, int, int]]  # noqa: UP007
_ratio_any_t = Union[float, tuple[float, ...]]  # noqa: UP007
_ratio_2_t = Union[float, tuple[float, float]]  # noqa: UP007

_single = _ntuple(1)
_pair = _ntuple(2)
_triple = _ntuple(3)
_quadruple = _ntuple(4)
