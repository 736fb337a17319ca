"""Formulas that reproduce the rounding of PyTorch's kernels, apart from the rules.

A rule in `nnmirror.rules` is the plain formula. Where PyTorch's kernel rounds differently, and
reproducing it costs time, a module here has a subclass of the rule with the kernel's bits,
attached to it by `exact_of` (`attach.py`). In exact mode it is recorded in place of the rule
(`mode.py`). `table.py` lists what is attached.

.. include:: README.md
"""
