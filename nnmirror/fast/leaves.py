"""The signatures of leaves: of each its own, until it is freed.

Training many nets of one structure one after another, as in a sweep, cross-validation or Reptile,
would take each a few dozen steps to get its generated functions and bound walks. These are stored
with the signatures of its leaves. So when a leaf is freed, its signature is retired, and a new leaf
of the same layout gets it.
"""

import collections
import threading
import weakref
from typing import TypeAlias

import torch

from .. import tensor as _tensor
from .._teardown import not_at_exit
from .._torch import DisableTorchFunctionSubclass
from .._upcalls import implements
from .signature import Layout, Signature, Unsigned, of_tensor

# The type of a leaf, and its layout.
_Kind: TypeAlias = tuple[type[torch.Tensor], Layout]

_MOST_KINDS = 1024  # of leaves that have been freed
_MOST_LEAVES, _MOST_SIGNATURES = 256, 2048  # that are retired, and all signatures behind them


@not_at_exit
class LeafSignature:
    """The signature that a leaf has while it has this layout, and if it gets it again. Only the
    leaf refers to this object, so that both are freed at the same time."""

    __slots__ = ("__weakref__", "kind", "outlived", "signature")

    def __init__(self, kind: _Kind, signature: Signature) -> None:
        self.kind, self.signature = kind, signature
        self.outlived = False  # by a leaf that it was of: graphs with this signature may exist

    def __del__(self) -> None:
        if not self.outlived:  # called in any thread, at any time
            sign = self.signature if self.kind in _retired.known else None
            _retired.freed.append((self.kind, sign, weakref.ref(self)))


class _Retired:
    """Signatures of freed leaves, for the next ones.

    No graph refers to a freed leaf, so its signature means the same for another one. Only those of
    kinds that have been freed before are kept: nets of which each has another shape leave nothing.
    """

    def __init__(self) -> None:
        # Since the latest `take`; the last is dead, unless a finalizer has saved it and its leaf.
        self.freed: collections.deque[
            tuple[_Kind, Signature | None, weakref.ref[LeafSignature]]
        ] = collections.deque(maxlen=_MOST_LEAVES)
        self.known: dict[_Kind, None] = {}  # of which leaves have been freed
        self.kept: dict[int, tuple[_Kind, Signature]] = {}  # by their serials, the latest last
        self.by_kind: dict[_Kind, list[int]] = {}  # the serials
        self.behind = 0  # signatures behind these
        self.sorting = threading.Lock()

    def take(self, kind: _Kind) -> Signature | None:
        """The oldest one of this kind, if there is one.

        A net uses its leaves for the first time in the order in which the net before used its own,
        so each of them gets the signature of the one in its place.
        """
        if not self.sorting.acquire(blocking=False):  # by another thread, or in a signal handler
            return None
        try:
            self._sort()
            serials = self.by_kind.get(kind)
            return self._drop(min(serials)) if serials else None
        finally:
            self.sorting.release()

    def _sort(self) -> None:
        while self.freed:
            kind, sign, of_leaf = self.freed.popleft()
            self.known.pop(kind, None)
            self.known[kind] = None
            if sign is not None and of_leaf() is None and sign.is_worth_keeping():
                sign.release_memory()
                self.kept[sign.serial] = kind, sign
                self.by_kind.setdefault(kind, []).append(sign.serial)
                self.behind += sign.behind
            while len(self.kept) > _MOST_LEAVES or self.behind > _MOST_SIGNATURES:
                self._drop(next(iter(self.kept)))
            if len(self.known) > _MOST_KINDS:
                del self.known[next(iter(self.known))]

    def _drop(self, serial: int) -> Signature:
        kind, sign = self.kept.pop(serial)
        serials = self.by_kind[kind]
        serials.remove(serial)
        if not serials:
            del self.by_kind[kind]
        self.behind -= sign.behind
        return sign


_retired = _Retired()


@implements(_tensor)
def signature_of_leaf(leaf: "_tensor.Tensor") -> Signature | None:
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
        if held is not None:
            held.outlived = True
        held = LeafSignature(kind, _retired.take(kind) or Signature())
        leaf._signature_by_layout = held
    leaf._signature = held.signature
    return held.signature
