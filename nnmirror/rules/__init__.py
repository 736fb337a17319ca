"""Backward rules of the tensor operations that stand between modules."""

from . import arithmetic, assign, elementwise, matmul, reduction, selection, shape, softmax
from .registry import RULES, Rule, composite, inplace, refusal, rule

__all__ = [
    "RULES",
    "Rule",
    "arithmetic",
    "assign",
    "composite",
    "elementwise",
    "inplace",
    "matmul",
    "reduction",
    "refusal",
    "rule",
    "selection",
    "shape",
    "softmax",
]
