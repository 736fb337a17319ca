"""A short way for `pdb` in plain mode: `s` goes from the script to the formulas.

By itself pdb stops at each line of Python that it comes through, of which there are some 65 between
`loss.backward()` and the first formula. In plain mode it stops in the user's code, in the formulas
(`forward`, `d_input` and the like of a rule; the update of an optimiser) and in what they call of
their kind, and goes past all else of this package and of torch. It still stops at each breakpoint,
for which `b` takes the short name of a rule, as `b Tanh.d_input`. At a formula it says whose it is:

    > .../nnmirror/functional.py(461)Tanh.d_input()  dx = g (1 - y^2)
"""

import inspect
import pdb
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from . import documented
from ._state import here
from .formula import Formulas
from .rules import Rule

_HOMES = ("nnmirror.exact", "nnmirror.functional", "nnmirror.optim", "nnmirror.rules")
_FORMULAS = {"backward", "forward", "gradients"}  # and `d_<argument>`
_UPDATES = {"_foreach", "_many", "_one", "_one_by_one", "_step_plainly"}
_BETWEEN = "nnmirror.rules.gradient"  # a formula, and another that it calls
_FOUND = "that function"  # stands for it: not to be looked up in the frame
_LIBRARIES = {*sys.stdlib_module_names, "", "builtins"}  # or of generated code


class ShortWay(pdb.Pdb):
    """A pdb that goes the short way in plain mode."""

    leave: Callable[[], None] | None = None
    function: Any  # that a breakpoint is to be put in

    def stop_here(self, frame: FrameType) -> bool:
        if not super().stop_here(frame):
            return False
        return not here.is_plain or frame is self.stopframe or is_shown(frame)

    def set_return(self, frame: FrameType) -> None:
        """Run until `frame` returns; if it does so now, to what called it and is shown."""
        super().set_return(frame)
        outer = self.stopframe
        while here.is_plain and outer is not None and not is_shown(outer):
            outer = outer.f_back
        self.stopframe = outer
        if outer is not None and outer.f_trace is None:
            outer.f_trace = self.trace_dispatch

    def set_continue(self) -> None:
        super().set_continue()
        if not self.breaks:  # nor will it stop again
            self._leave()

    def set_quit(self) -> None:
        super().set_quit()
        self._leave()

    def _leave(self) -> None:
        leave, self.leave = self.leave, None
        if leave is not None:
            leave()

    def format_stack_entry(self, frame_lineno: tuple[FrameType, int], lprefix: str = ": ") -> str:
        """With the name of the rule, and its formula."""
        frame, text = frame_lineno[0], super().format_stack_entry(frame_lineno, lprefix)
        if not (_is_ours(frame) and _is_formula(frame)):
            return text
        code, formula = frame.f_code, _formula_of(frame)
        text = text.replace(f"){code.co_name}(", f"){code.co_qualname}(", 1)
        head, line, rest = text.partition(lprefix)
        return f"{head}  {formula}{line}{rest}" if formula else text

    def do_break(self, arg: str, temporary: Any = False) -> Any:
        """Where a function was written, not what the package has put around it."""
        name, comma, condition = arg.partition(",")
        try:
            frame: Any = self.curframe
            found: Any = eval(name, frame.f_globals, frame.f_locals)
        except Exception:  # pdb says so itself
            found = None
        self.function = _as_written(found)
        if self.function is not None:
            arg = f"{_FOUND}{comma}{condition}"
        return super().do_break(arg, temporary)

    do_b = do_break

    def lineinfo(self, identifier: str) -> Any:
        """Where a function is that no name in the frame leads to."""
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


def take_over(ours: Any) -> None:
    """Have a pdb that steps through this thread go the short way, and any that is started.

    That is, `ours` becomes `pdb.set_trace`, which `breakpoint()` calls; unless it is another's.
    """
    stepping: Any = getattr(sys.gettrace(), "__self__", None)
    if isinstance(stepping, pdb.Pdb) and not isinstance(stepping, ShortWay):
        kind: Any = type(stepping)
        stepping.__class__ = type(kind.__name__, (ShortWay, kind), {})
    if pdb.set_trace.__module__ == "pdb":
        _pdbs[:] = [pdb.set_trace]
        pdb.set_trace = ours


def give_back(ours: Any) -> None:
    if pdb.set_trace is ours:
        pdb.set_trace = _pdbs.pop()


_pdbs: list[Any] = []


def is_shown(frame: FrameType) -> bool:
    """Is it of the user's code, or a formula, or called by one?"""
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
    """Is it of this package, or of torch?"""
    return _module_of(frame).partition(".")[0] in ("nnmirror", "torch")


def _is_librarys(frame: FrameType) -> bool:
    """Is it of Python's own library?"""
    name = _module_of(frame)
    return name.partition(".")[0] in _LIBRARIES or name.startswith("namedtuple_")


def _is_formula(frame: FrameType) -> bool:
    module, name = _module_of(frame), frame.f_code.co_name
    if module.startswith("nnmirror.optim"):
        return name in _UPDATES
    in_home = module != _BETWEEN and module.startswith(_HOMES)
    return in_home and (name in _FORMULAS or name.startswith("d_"))


def _formula_of(frame: FrameType) -> str:
    """As the rule documents it, of which the frame runs a method; "" if that is none."""
    rule: Any = sys.modules.get(_module_of(frame))
    for name in frame.f_code.co_qualname.split(".")[:-1]:
        rule = getattr(rule, name, None)
    if not hasattr(rule, "is_rule"):
        return ""
    is_value = frame.f_code.co_name == "forward"
    return documented.value(rule) if is_value else documented.gradients(rule)


def _as_written(function: Any) -> Any:
    """The forward behind what records it, or behind what keeps a module's call; None if neither."""
    if getattr(function, "__func__", None) is Formulas.call:
        return function.__self__.forward
    function = getattr(function, "__func__", function)
    module = getattr(function, "__globals__", {}).get("__name__", "")
    is_around = hasattr(function, "__wrapped__") and module.startswith("nnmirror.")
    return inspect.unwrap(function) if is_around else None


def _function_of_rule(identifier: str) -> Any:
    """`Tanh.d_input`, or `nnmirror.functional.Tanh.d_input`; None if there is none."""
    home, _, called = identifier.rpartition(".")
    home, _, name = home.rpartition(".")
    found = [rule for rule in _derived(Rule) if rule.__name__ == name and hasattr(rule, called)]
    # The exact form of a rule has the name of the rule.
    found.sort(key=lambda rule: (rule.__module__ != home, "exact" in rule.__module__))
    function = getattr(found[0], called) if found else None
    function = _as_written(function) or function
    return function if hasattr(function, "__code__") else None


def _derived(cls: Any) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _derived(sub)
