"""What `nnmirror.explain` is made of.

`explainer.py` goes back over a graph and writes the function, `naming.py` finds the reader's names
for it. `explanation.py` is what a user gets; `standalone.py` makes a file of it, and `page.py` a
page.
"""
