"""Backward rules of the tensor operations that stand between modules."""

from . import arithmetic, elementwise, matmul, reduction, shape
from .registry import RULES, Rule, composite, inplace, refusal, rule

__all__ = [
    "RULES",
    "Rule",
    "arithmetic",
    "composite",
    "elementwise",
    "inplace",
    "matmul",
    "reduction",
    "refusal",
    "rule",
    "shape",
]
