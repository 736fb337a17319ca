"""Backward rules of the tensor operations that stand between modules."""

from . import arithmetic, matmul, reduction, shape
from .registry import RULES, Rule, composite, inplace, refusal, rule

__all__ = [
    "RULES",
    "Rule",
    "arithmetic",
    "composite",
    "inplace",
    "matmul",
    "reduction",
    "refusal",
    "rule",
    "shape",
]
