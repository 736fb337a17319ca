"""What makes the tape fast, and changes no bit: signatures, and source for what comes again.

A training loop makes the same graph again and again. Each recorded call carries the interned
`Signature` of how it came about (`signature.py`). What comes again is written out as a Python
function (`source.py`):

- A call whose signature comes again (`call.py`), so that less has to be asked of the next one; and
  one that has no signature, as its shapes differ each time (`recorder.py`).
- A walk from the same signature, when it has come a few times (`binding.py`): it is recorded once,
  as a straight-line function (`bound.py`, and `shorter.py`, which leaves out what it can), that
  then runs in place of the generic walk. Likewise a walk with `create_graph=True`, with the nodes
  that it records (`replay.py`).

`nnmirror.fast.enabled = False` turns the walks off.
"""

enabled = True
after = 3  # how often a walk comes before it is bound; 1 is for tests: a difference then raises
