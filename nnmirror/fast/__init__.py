"""What makes the tape fast, and changes no bit: signatures, and walks bound to them.

A training loop makes the same graph again and again. Each recorded call carries the interned
`Signature` of how it came about (`signature.py`); when the same signature has been walked back
over a few times (`binding.py`), the walk is recorded once, as a straight-line Python function
(`bound.py`), which then runs in place of the generic walk. `nnmirror.fast.enabled = False` turns
that off.
"""

enabled = True
after = 3  # how often a walk comes before it is bound; 1 is for tests: a difference then raises
