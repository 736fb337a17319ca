"""The layers whose bits depend on exact mode.

All others have the same bits in both modes. Importing the modules of exact forms attaches them.
"""

from . import (  # noqa: F401
    activation,
    attention,
    batchnorm,
    distance,
    groupnorm,
    normalization,
    softmax,
)
from .attach import ATTACHED

__all__ = ["ATTACHED", "table"]


def table() -> dict[str, float]:
    """The layers that differ by default, and by how many units (see `exact_of`) at most."""
    found: dict[str, float] = {}
    for _, layers, units in ATTACHED:
        for layer in layers:
            found[layer] = max(found.get(layer, 0), units)
    return dict(sorted(found.items()))
