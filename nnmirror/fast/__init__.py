"""What makes the tape fast, and changes no bit: signatures, and source for what comes again.

.. include:: README.md
"""

enabled = True
after = 3  # how often a walk comes before it is bound; 1 is for tests: a difference then raises
