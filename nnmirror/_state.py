"""State of the process: flags and counters.

They are read and set as `_state.name`. State that is kept elsewhere:

- Per thread: the modes that `with` has set (`_override` in grad_mode.py and exact/mode.py,
  `here` below), the running walk (`running` in running.py), the running calls of `vmap`
  (`mapping` in tape.py), the subclass that is being dispatched to (`_asked` in overrides.py), the
  running transforms of `torch.func` (`_running` in transforms.py), torch's latest number
  (`_latest` in moments.py, beside the moments of all threads).
- `nnmirror.fast.enabled` and `nnmirror.fast.after`: whether walks are bound, and after how many
  repetitions.
- Hooks common to all modules: `_global_...` in modules/hooks.py.
- Held weakly: the counterparts in torch of parameters (twins.py) and of classes (bridge.py), and
  the nodes that stand for torch's own, in the metadata of these (beyond.py).
- Which calls of torch's own are to be recorded anew (`_wanted` in beyond.py).
- What the import replaces in torch: functions that make tensors (rules/constructors.py),
  `torch.func`'s transforms (transforms.py), and `register_hook` and `retain_grad` of a tensor,
  which note the hooks of torch's own results (beyond.py).
- What `python -m nnmirror` and the notebook extension substitute for torch's modules, in runner.py
  and notebook.py.
- Filled when the package is imported, and not changed afterwards: RULES in tensor.py, NAMED in
  rules/registry.py, the exact forms (exact/attach.py), `_homes` in _upcalls.py.
- Caches, which may be emptied at any time: of numbers as tensors (constants.py), of facts about a
  class or an operation (`functools.cache`, of a bounded size or by a bounded key), of rules' plans
  (formula.py) and recorders (fast/recorder.py). Signatures, and the walks bound to them, are stored
  with the leaves that they start from.
"""

import itertools
import os
import threading
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import nnmirror._types
    import nnmirror.node
    import nnmirror.operation

# Numbers the recorded calls in their order, which the walk follows.
sequence = itertools.count()
# Has any leaf ever had a hook, or been swapped? If not, the walk need not check each one.
leaf_hooks_exist = False
# Has the mirror's own grad mode ever been set? If not, no call need ask for it.
own_grad_mode = False
# The number of the watch that was turned on last, 0 if none is on: then no node has a tap.
taps = 0
# Exact mode, where no `with exact()` says otherwise (see exact/mode.py).
exact_mode = os.environ.get("NNMIRROR_EXACT", "") not in ("", "0")
# Has any thread ever been within `exact()`?
own_exact_mode = False


# A call: function, arguments, result, node.
RecordedCall: TypeAlias = (
    "tuple[type[nnmirror.operation.Operation] | None, nnmirror._types.Args, object,"
    " nnmirror.node.Node | None]"
)


class _Here(threading.local):
    """State of the thread."""

    # Plain mode (see plain.py): whether it is on, and how many contexts have turned it on.
    is_plain = os.environ.get("NNMIRROR_PLAIN", "") not in ("", "0")
    depth = int(is_plain)
    # The list that recorded calls are added to, for fast/composed.py.
    calls: "list[RecordedCall] | None" = None


here = _Here()
# The number of such contexts over all threads, and of threads that list their calls: at 0 no thread
# has to check.
plain = here.depth
counting = threading.Lock()  # held while that changes

# Warnings that PyTorch gives only once: have they been given?
warned_of_numbers = False  # a tensor with a gradient was converted to a number
warned_of_cycle = False  # a reference cycle between a leaf and a recorded gradient
warned_of_strides = False  # a gradient has other strides than its bucket
