"""What a module returns for a name that PyTorch has and the mirror lacks.

For a class it returns a stand-in of the same name, because scripts write `isinstance(m, (nn.Linear,
nn.LSTM))` or keep a table of layer classes; making an instance raises. Any other name raises when
it is looked up, because scripts use `hasattr` to find out whether a function exists.
"""

import dis
import importlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, TypeGuard

_WAYS = (
    "build it from mirrored modules and tensor operations; write it as an nnmirror.Function with"
    " its own backward"
)
_IMPORT_FROM = dis.opmap["IMPORT_FROM"]
_MOST_LISTED = 20  # names in a message


def missing(
    module: str, mirrored: Iterable[str], ways: str = _WAYS, later: Iterable[str] = ()
) -> Callable[[str], type | types.ModuleType]:
    """A module's `__getattr__`; `ways` says what to do instead of using a missing name.

    `later` are submodules that are imported on first use.
    """
    counterpart = _COUNTERPARTS.get(module, module.replace("nnmirror", "torch.nn", 1))

    def why(name: str) -> str:
        names = sorted(mirrored)
        listed = f"Mirrored here: {', '.join(names)}."
        if len(names) > _MOST_LISTED:
            listed = "nnmirror/mirrored.md lists what is mirrored."
        return (
            f"{module}.{name} is not mirrored. What to do: {ways}; or open an issue that asks for"
            f" it. {listed}"
        )

    stand_ins = StandIns(why, lambda theirs: theirs.__name__)

    def getattr_(name: str) -> type | types.ModuleType:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        if name in later:
            return importlib.import_module(f"{module}.{name}")
        # Look only at what torch has loaded already; import nothing.
        theirs = sys.modules.get(counterpart)
        value = None if theirs is None else vars(theirs).get(name)
        if stand_ins.can_be_for(value):
            return stand_ins.of(value)
        if theirs is not None and name not in vars(theirs) and "__getattr__" not in vars(theirs):
            # PyTorch does not have it either; Python suggests a name that is spelt alike.
            here = sys.modules[module]
            raise AttributeError(
                f"module {module!r} has no attribute {name!r}", name=name, obj=here
            )
        if _is_import(sys._getframe(1)):
            raise ImportError(why(name), name=module)
        raise AttributeError(why(name))

    return getattr_


_COUNTERPARTS = {
    "nnmirror.optim": "torch.optim",
    "nnmirror.optim.lr_scheduler": "torch.optim.lr_scheduler",
    "nnmirror.optim.swa_utils": "torch.optim.swa_utils",
}


def _is_import(frame: types.FrameType) -> bool:
    """Is this frame at a `from module import name`?

    Python replaces an AttributeError there by its own message, which only says that it cannot
    import the name. Everything else (getattr, hasattr, inspect) needs an AttributeError.
    """
    place = frame.f_lasti
    return place >= 0 and frame.f_code.co_code[place] == _IMPORT_FROM


# -- classes that are not mirrored ---------------------------------------------------------

_ROOTS = ("torch.nn", "torch.optim")


class StandIns:
    """Stand-ins for PyTorch's classes that are not mirrored.

    They work in isinstance and as base classes. `why(name)` is the error message when an instance
    of one, or of a class derived from it, is made, and when an attribute is used that only
    PyTorch's class has; `named(theirs)` is the name of PyTorch's class in that message.
    """

    made: set[type] = set()  # of all instances of this class

    def __init__(self, why: Callable[[str], str], named: Callable[[type], str]) -> None:
        self.why = why
        self.named = named
        self.known: dict[type, type] = {}

    @staticmethod
    def can_be_for(value: object) -> TypeGuard[type]:
        """Is `value` a class of PyTorch's of which no mirrored one is a subclass there?"""
        return (
            isinstance(value, type)
            and value.__module__.startswith(_ROOTS)
            and not any(namesake(c) for c in (value, *_derived_from(value)))
        )

    def of(self, theirs: type) -> type:
        """The stand-in for PyTorch's class `theirs`."""
        if theirs in self.known:
            return self.known[theirs]
        name = self.named(theirs)
        bases = tuple(
            namesake(base) or self.of(base)
            for base in theirs.__bases__
            if base.__module__.startswith(_ROOTS)
        )
        body: dict[str, object] = {
            key: _OnlyTheirs(self.why, f"{name}.{key}")
            for key in vars(theirs)
            if not (key.startswith("_") or any(hasattr(base, key) for base in bases))
        }

        def refuse(cls: type, *args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(f"nnmirror: {self.why(name)}")

        body["__new__"] = refuse
        body["__module__"] = theirs.__module__
        body["__qualname__"] = theirs.__qualname__
        body["__doc__"] = f"{theirs.__module__}.{theirs.__qualname__}, which is not mirrored."
        made = types.new_class(theirs.__name__, bases, {}, lambda new: new.update(body))
        self.made.add(made)
        self.known[theirs] = made
        return made


class _OnlyTheirs:
    """An attribute that PyTorch's class has."""

    def __init__(self, why: Callable[[str], str], name: str) -> None:
        self.why = why
        self.name = name

    def __get__(self, instance: object, owner: object) -> NoReturn:
        raise AttributeError(self.why(self.name))


def namesake(theirs: type) -> type | None:
    """The mirror's class with the name and module of PyTorch's `theirs`."""
    home = theirs.__module__
    if home.startswith("torch.optim"):
        places = [home.replace("torch.optim", "nnmirror.optim"), "nnmirror.optim"]
    elif home.startswith("torch.nn"):
        places = [home.replace("torch.nn", "nnmirror"), "nnmirror"]
    else:
        return None
    for place in places:
        found = vars(sys.modules[place]).get(theirs.__name__) if place in sys.modules else None
        if isinstance(found, type):
            return found
    return None


def _derived_from(cls: type) -> Iterator[type]:
    derived: type
    for derived in type.__subclasses__(cls):
        yield derived
        yield from _derived_from(derived)
