"""What the process remembers: flags and counters.

They are read as `_state.name`, and set likewise. What is kept elsewhere, where it belongs:

- Of each thread: the modes that `with` has set (`_override` in grad_mode.py and exact/mode.py,
  `here` in plain.py), the walk that goes on (`_walks` in walk.py), the calls of `vmap` that do
  (`mapping` in tape.py), the subclass that is asked (`_asked` in overrides.py).
- `nnmirror.fast.enabled` and `nnmirror.fast.after`: whether walks are bound, and when.
- Hooks common to all modules: `_global_...` in modules/hooks.py.
- Held weakly: the counterparts in torch of parameters (twins.py) and of classes (bridge.py).
- What `python -m nnmirror` and the notebook extension put in the place of torch's modules, in
  runner.py and notebook.py.
- Filled when the package is imported, and not changed after: RULES in tensor.py, NAMED in
  rules/registry.py, the exact forms (exact/attach.py), `_homes` in _upcalls.py.
- Caches, which could be emptied at any time: of numbers as tensors (tape.py), of what follows from
  a class or from an operation's declaration (`functools.cache`, of a bounded size or by a bounded
  key), of rules' plans (formula.py) and recorders (fast/recorder.py). Signatures, and the walks
  bound to them, are kept by the leaves that they start from.
"""

import itertools
import os

# Numbers what is recorded, in the order of the calls: the walk goes by it.
sequence = itertools.count()
# Had any leaf a hook, or was it swapped? While none had, the walk need not ask each.
leaf_hooks_exist = False
# Exact mode, where no `with exact()` says otherwise (see exact/mode.py).
exact_mode = os.environ.get("NNMIRROR_EXACT", "") not in ("", "0")

# How often plain mode is on, in any thread (see plain.py): while it is not, none need ask.
plain = 0

# Warnings that PyTorch gives once: were they given?
warned_of_numbers = False  # that a tensor with a gradient was made a number
warned_of_cycle = False  # between a leaf and a gradient that is recorded
warned_of_strides = False  # that a gradient is laid out otherwise than its bucket
