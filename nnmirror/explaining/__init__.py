"""What `nnmirror.explain` is made of.

`explainer.py` runs the backward of a graph and writes the function, `naming.py` finds the names for
it. `explanation.py` is what a user gets; `standalone.py` writes it as a script, and `page.py` as a
page.
"""
