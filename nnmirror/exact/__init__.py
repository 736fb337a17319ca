"""What only follows a kernel's order of rounding, apart from the rules.

A rule in `nnmirror.rules` is the plain formula. Where PyTorch's kernel rounds otherwise, and to
follow it costs time, a subclass of the rule with the kernel's bits stands in a module here,
attached to it by `exact_of` (`attach.py`). It is recorded in the rule's place in exact mode
(`mode.py`). `table.py` lists what is attached.
"""
