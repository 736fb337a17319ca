"""When torch's own graph grew, in terms of the mirror's calls.

A tensor of torch's that is given to mirrored operations and to torch's own gets gradients from
both, and PyTorch adds them in the order in which the calls were recorded, the last first. The
mirror and torch number their calls independently. So when the mirror records a call on a tensor of
torch's graph, it notes the number that torch gives to its next call.
"""

import threading
from collections import deque

from ._state import sequence
from ._torch import next_sequence_nr

_MOST = 4096  # moments that are kept; before these, torch's calls count as later than the mirror's


# The mirror's number and torch's, of all threads: a backward may run in another one.
_moments: deque[tuple[int, int]] = deque(maxlen=_MOST)


class _Latest(threading.local):
    number = 0  # torch numbers the calls of each thread


_latest = _Latest()


def note_moment() -> None:
    """Note that the call that is recorded next comes after all of torch's so far."""
    number = next_sequence_nr()
    if number != _latest.number:
        _latest.number = number
        _moments.append((next(sequence), number))


def number_of_torchs(number: int) -> float:
    """The place of torch's call `number` among the mirror's: after those on tensors of torch's that
    were recorded before it."""
    moment, torchs = next(sequence), number + 1
    for i in range(1, len(_moments) + 1):
        found = _moments[-i]
        if found[1] <= number:
            break
        moment, torchs = found
    return moment - (torchs - number) / _APART


_APART = 1 << 24  # more than there are calls of torch's between two moments


def torchs_number(number: int | None) -> int:
    """The number that torch's next call had when the mirror's call `number` was recorded; now, if
    that is None."""
    if number is None:
        return next_sequence_nr()
    for i in range(1, len(_moments) + 1):  # by index, as other threads may append
        moment, torchs = _moments[-i]
        if moment < number:
            return torchs
    return 0
