"""pdb in plain mode: `s` steps from the script straight into the formulas.

pdb stops at every line of Python that is run. Between `loss.backward()` and the first formula there
are about 70 of them. In plain mode it stops only in the user's code, in the formulas (`forward`,
`d_input` and the like of a rule; the update of an optimiser) and in the helpers that a formula
calls, and skips the rest of this package and of torch. It still stops at every breakpoint, and `b`
accepts the short name of a rule: `b Tanh.d_input`. In a formula it shows the rule and its gradient:

    > .../nnmirror/rules/activation.py(76)Tanh.d_input()  dx = g (1 - y^2)
"""

import inspect
import pdb
import sys
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType
from typing import Any, Literal

from . import documented
from ._state import here
from .formula import Formulas
from .rules import Rule

_HOMES = ("nnmirror.exact", "nnmirror.functional", "nnmirror.optim", "nnmirror.rules")
_FORMULAS = {"backward", "forward", "gradients"}  # and `d_<argument>`
_UPDATES = {"_foreach", "_many", "_one", "_one_by_one", "_step_plainly"}
_BETWEEN = "nnmirror.rules.gradient"  # wrappers between a formula and one that it calls
_FOUND = "that function"  # in place of a name: no expression that pdb could evaluate
_LIBRARIES = {*sys.stdlib_module_names, ""}  # "" is generated code


class ShortWay(pdb.Pdb):
    """A pdb that in plain mode skips code for which `is_shown` is false."""

    leave: Callable[[], None] | None = None
    function: Any  # the one to set a breakpoint in

    def stop_here(self, frame: FrameType) -> bool:
        if not super().stop_here(frame):
            return False
        return not here.is_plain or frame is self.stopframe or is_shown(frame)

    def set_return(self, frame: FrameType) -> None:
        """Run until `frame` returns or, if it is returning, to the next caller that is shown."""
        super().set_return(frame)
        outer = self.stopframe
        while here.is_plain and outer is not None and not is_shown(outer):
            outer = outer.f_back
        self.stopframe = outer
        if outer is not None and outer.f_trace is None:
            outer.f_trace = self.trace_dispatch

    def set_continue(self) -> None:
        super().set_continue()
        if not self.breaks:  # it will not stop again
            self._leave()

    def set_quit(self) -> None:
        super().set_quit()
        self._leave()

    def _leave(self) -> None:
        leave, self.leave = self.leave, None
        if leave is not None:
            leave()

    def format_stack_entry(self, frame_lineno: tuple[FrameType, int], lprefix: str = ": ") -> str:
        """With the name of the rule and its formula."""
        frame, text = frame_lineno[0], super().format_stack_entry(frame_lineno, lprefix)
        if not (_is_ours(frame) and _is_formula(frame)):
            return text
        code, formula = frame.f_code, _formula_of(frame)
        text = text.replace(f"){code.co_name}(", f"){code.co_qualname}(", 1)
        head, line, rest = text.partition(lprefix)
        return f"{head}  {formula}{line}{rest}" if formula else text

    def do_break(self, arg: str, temporary: bool | Literal[0, 1] = False) -> bool | None:
        """Set a breakpoint in a function itself, not in a wrapper of the package around it."""
        name, comma, condition = arg.partition(",")
        try:
            frame: Any = self.curframe
            found = eval(name, frame.f_globals, frame.f_locals)
        except Exception:  # pdb reports it itself
            found = None
        self.function = _as_written(found)
        if self.function is not None:
            arg = f"{_FOUND}{comma}{condition}"
        return super().do_break(arg, temporary)

    do_b = do_break

    def lineinfo(self, identifier: str) -> tuple[None, None, None] | tuple[str, str, int]:
        """The place of a function that is not a name in the frame."""
        found = identifier == _FOUND
        function = self.function if found else _function_of_rule(identifier)
        if function is None:
            return super().lineinfo(identifier)
        code = function.__code__
        return code.co_name, code.co_filename, code.co_firstlineno


def set_trace(
    frame: FrameType,
    header: str | None,
    options: dict[str, Any],
    leave: Callable[[], None] | None,
) -> None:
    """Start a debugger in `frame`, which calls `leave` when it is left."""
    debugger = ShortWay()
    debugger.leave = leave
    if header is not None:
        debugger.message(header)
    debugger.set_trace(frame, **options)


def take_over(ours: Callable[..., None]) -> None:
    """Make the pdb that traces this thread a `ShortWay`, and those that are started later.

    For these `pdb.set_trace`, which `breakpoint()` calls, is replaced by `ours`, unless another
    package has replaced it.
    """
    stepping = getattr(sys.gettrace(), "__self__", None)
    if isinstance(stepping, pdb.Pdb) and not isinstance(stepping, ShortWay):
        kind = type(stepping)
        stepping.__class__ = type(kind.__name__, (ShortWay, kind), {})
    if pdb.set_trace.__module__ == "pdb":
        _pdbs[:] = [pdb.set_trace]
        pdb.set_trace = ours


def give_back(ours: object) -> None:
    if pdb.set_trace is ours:
        pdb.set_trace = _pdbs.pop()


_pdbs: list[Callable[..., None]] = []


def is_shown(frame: FrameType) -> bool:
    """Whether it is the user's code, a formula, or a helper that a formula calls."""
    at: FrameType | None = frame
    if not _is_ours(frame):
        while at is not None and _is_librarys(at):
            at = at.f_back
        return at is None or not _is_ours(at)
    if _module_of(frame) == _BETWEEN:
        return False
    while at is not None and _module_of(at).startswith(_HOMES):
        if _is_formula(at):
            return True
        at = at.f_back
    return False


def _module_of(frame: FrameType) -> str:
    return frame.f_globals.get("__name__") or ""


def _is_ours(frame: FrameType) -> bool:
    """Whether it is code of this package or of torch."""
    return _module_of(frame).partition(".")[0] in ("nnmirror", "torch")


def _is_librarys(frame: FrameType) -> bool:
    """Whether it is code of Python's standard library."""
    name = _module_of(frame)
    return name.partition(".")[0] in _LIBRARIES or name.startswith("namedtuple_")


def _is_formula(frame: FrameType) -> bool:
    module, name = _module_of(frame), frame.f_code.co_name
    if module.startswith("nnmirror.optim"):
        return name in _UPDATES
    in_home = module != _BETWEEN and module.startswith(_HOMES)
    return in_home and (name in _FORMULAS or name.startswith("d_"))


def _formula_of(frame: FrameType) -> str:
    """The formula of the rule whose method the frame runs; "" if it is no rule's."""
    rule: Any = sys.modules.get(_module_of(frame))
    for name in frame.f_code.co_qualname.split(".")[:-1]:
        rule = getattr(rule, name, None)
    if not hasattr(rule, "is_rule"):
        return ""
    is_value = frame.f_code.co_name == "forward"
    return documented.value(rule) if is_value else documented.gradients(rule)


def _as_written(function: Any) -> Any:
    """The function inside a wrapper: a rule's recorded forward, a module's kept call; else None."""
    if getattr(function, "__func__", None) is Formulas.call:
        return function.__self__.forward
    function = getattr(function, "__func__", function)
    module = getattr(function, "__globals__", {}).get("__name__", "")
    is_around = hasattr(function, "__wrapped__") and module.startswith("nnmirror.")
    return inspect.unwrap(function) if is_around else None


def _function_of_rule(identifier: str) -> FunctionType | None:
    """`Tanh.d_input`, or `nnmirror.rules.activation.Tanh.d_input`; None if there is none."""
    home, _, called = identifier.rpartition(".")
    home, _, name = home.rpartition(".")
    found = [rule for rule in _derived(Rule) if rule.__name__ == name and hasattr(rule, called)]
    # The exact form of a rule has the same name.
    found.sort(key=lambda rule: (rule.__module__ != home, "exact" in rule.__module__))
    function = getattr(found[0], called) if found else None
    function = _as_written(function) or function
    return function if hasattr(function, "__code__") else None


def _derived(cls: type[Rule]) -> Iterator[type[Rule]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _derived(sub)
