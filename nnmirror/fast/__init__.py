"""Faster execution with the same bits: signatures, and generated source for repeated graphs.

.. include:: README.md
"""

enabled = True
after = 3  # how often a walk must occur before it is bound; with 1, for tests, a difference raises
