"""The signatures of leaves: of each its own, until it is freed.

Training many nets of one structure one after another, as in a sweep, cross-validation or Reptile,
would take each a few dozen steps to get its generated functions and bound walks. These are stored
with the signatures of its leaves. So when a leaf is freed, its signature is retired, and a new leaf
of the same layout gets it.
"""

import collections
import operator
import threading
import weakref
from typing import TypeAlias

import torch

from .. import tensor as _tensor
from .._teardown import not_at_exit
from .._torch import DisableTorchFunctionSubclass
from .._upcalls import implements
from .signature import Layout, LeafSignature, Unsigned, of_tensor

# The type of a leaf, and its layout.
_Kind: TypeAlias = tuple[type[torch.Tensor], Layout]

_MOST_KINDS = 1024  # of leaves that have been freed
_MOST_LEAVES = 256  # that are retired
_MOST_WEIGHT = 2048  # of all signatures behind them: some 14 MB


@not_at_exit
class HeldSignature:
    """The signature that a leaf has while it has this layout, and if it gets it again. Only the
    leaf refers to this object, so that both are freed at the same time."""

    __slots__ = ("__weakref__", "kind", "outlived", "signature")

    def __init__(self, kind: _Kind, signature: LeafSignature) -> None:
        self.kind, self.signature = kind, signature
        self.outlived = False  # by a leaf that it was of: graphs with this signature may exist

    def __del__(self) -> None:
        if not self.outlived:  # called in any thread, at any time
            sign = self.signature if self.kind in _retired.known else None
            if sign is not None:
                sign.release_memory()
            _retired.freed.append((self.kind, sign, weakref.ref(self)))


class _Retired:
    """Signatures of freed leaves, for the next ones.

    No graph refers to a freed leaf, so its signature means the same for another one. Only those of
    kinds that have been freed before are kept: nets of which each has another shape leave nothing.
    """

    def __init__(self) -> None:
        # Since the latest `take`; the last is dead, unless a finalizer has saved it and its leaf.
        self.freed: collections.deque[
            tuple[_Kind, LeafSignature | None, weakref.ref[HeldSignature]]
        ] = collections.deque(maxlen=_MOST_LEAVES)
        self.known: dict[_Kind, None] = {}  # of which leaves have been freed
        self.kept: dict[_Kind, list[LeafSignature]] = {}  # the kind that was freed last is the last
        self.sorting = threading.Lock()
        self.is_used = True

    def take(self, kind: _Kind) -> LeafSignature | None:
        """The oldest one of this kind, if there is one.

        A net uses its leaves for the first time in the order in which the net before used its own,
        so each of them gets the signature of the one in its place.
        """
        if not self.is_used:
            return None
        if not self.sorting.acquire(blocking=False):  # by another thread, or in a signal handler
            return None
        try:
            if self.freed:
                self._sort()
            signs = self.kept.get(kind)
            if not signs:
                return None
            oldest = min(signs, key=_serial_of)
            signs.remove(oldest)
            return oldest
        finally:
            self.sorting.release()

    def _sort(self) -> None:
        while self.freed:
            kind, sign, of_leaf = self.freed.popleft()
            self.known.pop(kind, None)
            self.known[kind] = None
            if sign is not None and of_leaf() is None and sign.is_worth_keeping():
                self.kept[kind] = [*self.kept.pop(kind, ()), sign]
        while len(self.known) > _MOST_KINDS:
            del self.known[next(iter(self.known))]
        count = sum(map(len, self.kept.values()))
        weight = sum([sign.weight() for signs in self.kept.values() for sign in signs])
        while count > _MOST_LEAVES or weight > _MOST_WEIGHT:
            dropped = self.kept.pop(next(iter(self.kept)))
            count, weight = count - len(dropped), weight - sum([s.weight() for s in dropped])


_serial_of = operator.attrgetter("serial")
_retired = _Retired()


def keep_apart() -> None:
    """From now on, each new leaf has a new signature.

    For explanations: a signature knows where its first call was made, which is then one of the new
    net (see origin.py).
    """
    _retired.is_used = False


@implements(_tensor)
def signature_of_leaf(leaf: "_tensor.Tensor") -> LeafSignature | None:
    """Its signature: the one that it had, a retired one, or a new one.

    None for one that is frozen; for a leaf with hooks, which the generic walk handles; and for one
    of inference mode, which may not be saved.
    """
    if not leaf._requires_grad or leaf._node is not None:
        return None
    if leaf._leaf_hooks or leaf._post_accumulate_hooks or leaf._reached_hooks:
        return None
    if any(leaf._accumulate_hooks or ()):
        return None
    with DisableTorchFunctionSubclass():
        if leaf.is_inference():
            return None
        try:
            kind = type(leaf), of_tensor(leaf)
        except Unsigned:
            return None
    held = leaf._signature_by_layout
    if held is None or held.kind != kind:  # else it was frozen for a while, or given other memory
        own = vars(leaf)
        replaced = own.pop("_signature_by_layout", None)
        if replaced is not None:
            replaced.outlived = True
        made = HeldSignature(kind, _retired.take(kind) or LeafSignature())
        held = own.setdefault("_signature_by_layout", made)  # another thread may have set one
    leaf._signature = held.signature
    return held.signature
