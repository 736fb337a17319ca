"""PyTorch's own functions for pruning, which work on mirrored modules."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn.utils.prune import *  # noqa: F403
else:
    import torch.nn.utils.prune as theirs

    def __getattr__(name: str) -> Any:
        return getattr(theirs, name)
