"""What makes the tape fast, and changes no bit: signatures, and walks bound to them.

A training loop makes the same graph again and again. Each recorded call carries the interned
`Signature` of how it came about (`signature.py`). A call whose signature comes again is written out
as a function (`call.py`), so that less has to be asked of the next one. When the same signature has
been walked back over a few times (`binding.py`), the walk is recorded once, as a straight-line
Python function (`bound.py`), which then runs in place of the generic walk.
`nnmirror.fast.enabled = False` turns the latter off.
"""

enabled = True
after = 3  # how often a walk comes before it is bound; 1 is for tests: a difference then raises
