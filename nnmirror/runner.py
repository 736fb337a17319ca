"""Run a script written for PyTorch with the mirror in place of `torch.nn` and `torch.optim`.

An import statement calls `__import__`, which Python looks up in the `__builtins__` of the importing
module. So the script, and every module loaded from its directory, run with a copy of the builtins
whose `__import__` returns a `View` of `torch`, `torch.nn`, `torch.optim` and `torch.autograd`. All
other code (torch itself, installed packages) has the normal builtins, and sees PyTorch.
"""

import builtins
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ._missing import StandIns
from ._types import TorchFunction
from .adopt import become_mirrored, kept
from .function import Function, InplaceFunction
from .optim import Optimizer

ADVICE = (
    "What to do: build it from mirrored modules and tensor operations; write it as a"
    " torch.autograd.Function with its own backward; or open an issue that asks for it."
)

# The modules in which every name is the mirror's or refused, and the mirror's module for each.
_MIRRORED = {"torch.nn": "nnmirror", "torch.optim": "nnmirror.optim"}
_AS_THEY_ARE = {"torch.nn.utils.prune"}  # work on mirrored modules


class NotMirrored(AttributeError):
    """A script uses a name of PyTorch's that the mirror lacks."""


# -- what a script sees ------------------------------------------------------------------


_own: Callable[[ModuleType], dict[str, Any]] = vars(ModuleType)["__dict__"].__get__


class View(ModuleType):
    """A module of PyTorch as a script sees it: the same names, looked up in the mirror."""

    def __init__(self, real: ModuleType) -> None:
        super().__init__(real.__name__, real.__doc__)
        own = _own(self)
        for name in ("__file__", "__package__", "__spec__"):
            own[name] = getattr(real, name, None)
        own["__real__"] = real

    def __getattr__(self, name: str) -> Any:
        if name == "__all__" and root_of(self.__name__):
            value = star(self.__real__)
        else:
            value = answer(self.__real__, name)
        if callable(value) or isinstance(value, ModuleType):
            _own(self)[name] = value  # cached; other values may change
        return value

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """All names, as a script may go through `torch.optim.__dict__`."""
        if root_of(self.__name__):
            for name in vars(self.__real__):
                with contextlib.suppress(NotMirrored):
                    getattr(self, name)
        return _own(self)

    def __setattr__(self, name: str, value: object) -> None:
        _own(self)[name] = value
        if not root_of(self.__name__):  # otherwise PyTorch's own code would see the mirror
            setattr(self.__real__, name, value)
        if self.__real__ is builtins:
            BUILTINS[name] = value

    def __delattr__(self, name: str) -> None:
        _own(self).pop(name, None)
        if not root_of(self.__name__):
            delattr(self.__real__, name)
        if self.__real__ is builtins:
            BUILTINS.pop(name, None)

    def __dir__(self) -> list[str]:
        return dir(self.__real__)

    def __repr__(self) -> str:
        return repr(self.__real__)


_views: dict[str, View] = {}


def root_of(module: str) -> str | None:
    """The mirror's package for the module of this name, if it has one."""
    return _MIRRORED.get(".".join(module.split(".")[:2]))


def seen(value: object) -> Any:
    """What a script gets for `value`: a View, if it is a module that has one."""
    if not isinstance(value, ModuleType) or isinstance(value, View):
        return value
    name = value.__name__
    if not (root_of(name) or name in ("torch", *_SUBSTITUTES) or value is builtins):
        return value
    if name not in _views:
        _views[name] = View(value)
    return _views[name]


def answer(module: ModuleType, name: str) -> Any:
    """What a script gets for `module.name`; NotMirrored if the mirror lacks it."""
    value = getattr(module, name)  # PyTorch's own error where it has no such name
    if isinstance(value, ModuleType):
        return seen(value)
    home = module.__name__
    root = root_of(home)
    if root is None:
        return _SUBSTITUTES.get(home, {}).get(name, value)
    if name.startswith("__"):
        return value
    package = ".".join(home.split(".")[:2])
    places = [sys.modules.get(root + home.removeprefix(package))]
    if getattr(sys.modules[package], name, None) is value:
        places.append(sys.modules[root])  # in another file of the mirror, with the same public name
    for place in places:
        found = None if place is None else vars(place).get(name)
        if found is not None and not isinstance(found, ModuleType):
            return found
    if _is_bystander(value) or _is_optimiser(value) or home in _AS_THEY_ARE:
        return value
    if _STAND_INS.can_be_for(value):
        return _STAND_INS.of(value)
    raise NotMirrored(_why(f"{home}.{name}"))


def _why(name: str) -> str:
    return f"{_where()} uses {name}, which is not mirrored. {ADVICE}"


def _public_name(theirs: type) -> str:
    package = ".".join(theirs.__module__.split(".")[:2])
    if vars(sys.modules[package]).get(theirs.__name__) is theirs:
        return f"{package}.{theirs.__name__}"
    return f"{theirs.__module__}.{theirs.__qualname__}"


_STAND_INS = StandIns(_why, _public_name)


def _is_optimiser(value: object) -> bool:
    """Is it an optimiser of PyTorch? They work on mirrored parameters."""
    return isinstance(value, type) and issubclass(value, Optimizer)


def _is_bystander(value: object) -> bool:
    """Is it something that computes nothing: a constant, a type hint, a class of torch or of
    another library?"""
    if not callable(value):
        return True
    home = getattr(value, "__module__", None) or "torch"
    if isinstance(value, type):
        return not any(root_of(c.__module__) for c in value.__mro__)
    return home.partition(".")[0] != "torch"


def star(module: ModuleType) -> list[str]:
    """The names that `from module import *` imports: the mirrored ones."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
    return [name for name in names if support(module, name) is not None]


NAMED_ONLY = "named only"  # a class that cannot be instantiated


def support(module: ModuleType, name: str) -> str | None:
    """Is `module.name` "mirrored", or NAMED_ONLY? None if not even that."""
    try:
        found = answer(module, name)
    except NotMirrored:
        return None
    return NAMED_ONLY if isinstance(found, type) and found in StandIns.made else "mirrored"


def _where() -> str:
    """The script's current line."""
    frame = sys._getframe(1)
    here = {__name__, StandIns.__module__}
    while frame.f_back is not None and frame.f_globals.get("__name__") in here:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _import_module(name: str, package: str | None = None) -> ModuleType:
    """`importlib.import_module`"""
    return seen(importlib.import_module(name, package))


# Modules in which a few names are replaced.
# (torch.autograd.backward and grad dispatch to tracked tensors, and need no replacement.)
_SUBSTITUTES: dict[str, dict[str, object]] = {
    "torch.autograd": {"Function": Function},
    "torch.autograd.function": {"Function": Function, "InplaceFunction": InplaceFunction},
    "importlib": {"import_module": _import_module},
}


def _import(  # type: ignore[no-untyped-def]
    name, globals=None, locals=None, fromlist=(), level=0
):
    """`__import__` for a script and its modules."""
    module = seen(builtins.__import__(name, globals, locals, fromlist, level))
    if isinstance(module, View):
        # Python looks these names up next. If the module did not have one, Python would look in
        # sys.modules, and find PyTorch's.
        for wanted in fromlist or ():
            try:
                getattr(module, wanted)
            except NotMirrored as e:
                raise ImportError(str(e)) from None
            except AttributeError:
                pass  # Python's own error follows
    return module


BUILTINS: dict[str, object] = {}
"""The `__builtins__` of a script and its modules; filled by `install`."""


# -- what libraries build ----------------------------------------------------------------

# The methods by which a script uses a model. Other uses (moving it, passing its parameters to an
# optimiser) do not show whether the script calls it.
_ENTRIES = (
    *("__call__", "__getattr__", "apply"),
    *("modules", "named_modules", "children", "named_children"),
)
_left = WeakIdKeyDictionary()  # the modules left to PyTorch


def _entry(theirs: TorchFunction) -> TorchFunction:
    """A method of torch.nn.Module's that makes the module mirrored when the script calls it."""
    name = theirs.__name__ if theirs.__name__ in _ENTRIES else "__call__"

    @functools.wraps(theirs)
    def entered(self: "torch.nn.Module", *args: object, **kwargs: object) -> Any:
        if sys._getframe(1).f_builtins is BUILTINS and self not in _left:
            if _is_a_librarys_model(self) and _became_mirrored(self):
                return getattr(type(self), name)(self, *args, **kwargs)
            _left[self] = True
        return theirs(self, *args, **kwargs)

    entered._nnmirror_replaces = theirs  # type: ignore[attr-defined]
    return entered


def _is_a_librarys_model(module: "torch.nn.Module") -> bool:
    """Does it have parameters, and a class that is not the script's own (for a library to
    drive)?"""
    cls = type(module)
    home = cls.__module__
    if vars(sys.modules.get(home, torch)).get("__builtins__") is BUILTINS:
        return False
    return home.partition(".")[0] not in kept and next(module.parameters(), None) is not None


def _became_mirrored(module: "torch.nn.Module") -> bool:
    problems = become_mirrored(module)
    if problems:
        print(
            f"nnmirror: {_where()}: {torch.typename(module)} is left to PyTorch, which trains"
            " it:\n  " + "\n  ".join(problems),
            file=sys.stderr,
        )
    return not problems


def _watch_libraries(on: bool) -> None:
    base = sys.modules["torch.nn"].Module  # type: ignore[attr-defined]
    for name in _ENTRIES:
        method = getattr(base, name)
        replaced = getattr(method, "_nnmirror_replaces", None)
        if on and replaced is None:
            setattr(base, name, _entry(method))
        elif not on and replaced is not None:
            setattr(base, name, replaced)


# -- which code is the script's --------------------------------------------------------


class _Loader(SourceFileLoader):
    """Loads a module of the script's."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__dict__["__builtins__"] = BUILTINS
        return module


as_scripts: set[str] = set()
"""Libraries that run as a part of the script (`--mirror`)."""


class Finder:
    """Finds the modules in the script's directory, to be loaded by `_Loader`.

    Packages installed below it (in a virtual environment there) do not count.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(os.path.realpath(directory))

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in ("nnmirror", "torch"):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        is_own = name.partition(".")[0] in as_scripts
        if not (is_own or is_users(spec.loader.path, self.directory)):
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def is_users(file: str, directory: Path) -> bool:
    """Is this file one of the script's own, given the script's directory?"""
    real = Path(os.path.realpath(file))
    if not real.is_relative_to(directory) or real.is_relative_to(_STDLIB):
        return False
    return not {"site-packages", "dist-packages"}.intersection(real.relative_to(directory).parts)


_STDLIB = os.path.realpath(sysconfig.get_path("stdlib"))


def install(directory: str) -> Finder:
    """From now on, modules in `directory` see the mirror."""
    BUILTINS.update(vars(builtins))
    BUILTINS["__import__"] = _import
    finder = Finder(directory)
    place = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
    sys.meta_path.insert(place, finder)  # type: ignore[arg-type]
    _watch_libraries(True)
    return finder


def uninstall(finder: Finder) -> None:
    """Later imports are PyTorch's again."""
    sys.meta_path.remove(finder)  # type: ignore[arg-type]
    _watch_libraries(False)


# -- running -----------------------------------------------------------------------------


def run_script(path: str, args: Sequence[str], mirror: bool = True) -> None:
    """`python path args...`; on PyTorch if not `mirror`, else the same."""
    full = os.path.abspath(path)
    try:
        with io.open_code(full) as file:
            source = file.read()
    except OSError as e:
        why = f"[Errno {e.errno}] {e.strerror}"
        print(f"{sys.executable}: can't open file {full!r}: {why}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:] = [path, *args]
    _prepare(os.path.dirname(os.path.realpath(path)), mirror)
    _run(
        lambda: compile(source, full, "exec", dont_inherit=True),
        __file__=full,
        __cached__=None,
        __loader__=SourceFileLoader("__main__", full),
        __package__=None,
        __spec__=None,
        __builtins__=BUILTINS if mirror else builtins,
    )


def run_module(name: str, args: Sequence[str], mirror: bool = True) -> None:
    """`python -m name args...`; on PyTorch if not `mirror`, else the same."""
    sys.argv[:] = ["-m", *args]
    _prepare(os.getcwd(), mirror)  # before the packages around it are imported
    spec, loader = _spec_to_run(name)
    sys.argv[0] = loader.path
    _run(
        lambda: loader.get_code(spec.name),
        __file__=loader.path,
        __cached__=spec.cached,
        __loader__=loader,
        __package__=spec.parent,
        __spec__=spec,
        __builtins__=BUILTINS if mirror else builtins,
    )


def _spec_to_run(name: str) -> tuple[ModuleSpec, SourceFileLoader]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{name}.".startswith(f"{e.name}."):
            raise  # it exists, but something that it imports does not
        spec = None
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        print(f"{sys.executable}: No module named {name}", file=sys.stderr)
        sys.exit(1)
    return spec, spec.loader


def _prepare(directory: str, mirror: bool) -> None:
    if not sys.flags.safe_path:
        sys.path[0] = directory  # `python -m nnmirror` has replaced it
    if mirror:
        install(directory)


def _run(code: Callable[[], Any], **attributes: object) -> None:
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update(attributes)
    hook = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        trace = _without_the_runner(trace)
        hook(kind, error.with_traceback(trace), trace)

    sys.excepthook = excepthook
    exec(code(), main.__dict__)


def _without_the_runner(trace: TracebackType | None) -> TracebackType | None:
    """A traceback of the script's own frames, as Python prints it."""
    while trace is not None and trace.tb_frame.f_globals is not globals():
        trace = trace.tb_next  # the frames of the runner
    first = trace
    while first is not None and first.tb_frame.f_globals is globals():
        first = first.tb_next
    last = first
    while last is not None:
        following = last.tb_next
        while following is not None and following.tb_frame.f_globals is globals():
            following = following.tb_next
        last.tb_next = following
        last = following
    return first


def seed_all(seed: int) -> None:
    """Seed the random generators that a script may use."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)  # type: ignore[attr-defined]
