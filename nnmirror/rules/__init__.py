"""Backward rules of the tensor operations.

`python -c "from nnmirror.rules import recorded; print(*recorded())"` names them all.

.. include:: README.md
"""

from . import (
    activation,
    arithmetic,
    assign,
    attention,
    batchnorm,
    composed,
    constructors,
    convolution,
    distance,
    dropout,
    elementwise,
    embedding,
    fold,
    groupnorm,
    linalg,
    linear,
    loss,
    matmul,
    normalization,
    padding,
    pooling,
    prelu,
    random,
    rearrange,
    reduction,
    selection,
    shape,
    softmax,
    taken,  # noqa: F401
    undefined,
    upsampling,
)
from .registry import RULES, Rule, composite, inplace, name_of, refusal, rule


def recorded() -> list[str]:
    """The operations with a rule, by name, from the table of rules.

    `name(_)` is also there in place, as `name_`; operators are listed as they are written.
    """
    written = {name_of(func).rsplit(".", 1)[-1] for func in RULES}
    plain = {name for name in written if not name.startswith("__")}
    both = {name for name in plain if name + "_" in plain}
    names = [f"{name}(_)" for name in both] + [
        name for name in plain - both if name.removesuffix("_") not in both
    ]
    operators = [sign for name, sign in OPERATORS.items() if f"__{name}__" in written]
    return operators + sorted(set(names))


OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "mod": "%", "pow": "**", "matmul": "@",
    "iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/=", "imod": "%=", "ipow": "**=",
    "getitem": "x[i]", "setitem": "x[i] = y",
}  # fmt: skip

__all__ = [
    "RULES",
    "Rule",
    "activation",
    "arithmetic",
    "assign",
    "attention",
    "batchnorm",
    "composed",
    "composite",
    "constructors",
    "convolution",
    "distance",
    "dropout",
    "elementwise",
    "embedding",
    "fold",
    "groupnorm",
    "inplace",
    "linalg",
    "linear",
    "loss",
    "matmul",
    "normalization",
    "padding",
    "pooling",
    "prelu",
    "random",
    "rearrange",
    "recorded",
    "reduction",
    "refusal",
    "rule",
    "selection",
    "shape",
    "softmax",
    "undefined",
    "upsampling",
]
