"""Attaching an exact form to a rule."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ..operation import Operation

F = TypeVar("F", bound=type[Operation])


class Attached(NamedTuple):
    """A rule that has an exact form."""

    rule: type[Operation]
    layers: tuple[str, ...]  # the names in `nnmirror` of the layers that record it
    units: float  # how far off the plain formula may be, see `exact_of`


ATTACHED: list[Attached] = []


def exact_of(rule: type[Operation], *layers: str, units: float) -> Callable[[F], F]:
    """Record the decorated subclass of `rule` instead of it in exact mode.

    If its gradients are rules too (see rules/gradient.py), it has `is_recordable = True`: gradients
    of gradients then have PyTorch's bits as well.

    `layers` are the modules that record the rule. `units` bounds the difference of the plain
    formula from the exact one: |a - b| <= units eps max|b|, eps that of the dtype.
    """

    def attach(variant: F) -> F:
        if not issubclass(variant, rule):
            raise TypeError(f"{variant.__name__} is no {rule.__name__}")
        variant.__name__ = rule.__name__  # its node bears the same name
        if "public" in vars(rule):  # what tensor subclasses are dispatched with
            variant.public = staticmethod(rule.public)
        rule.exact = variant
        ATTACHED.append(Attached(rule, layers, units))
        return variant

    return attach
