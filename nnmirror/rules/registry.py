"""How a torch operation on a tracked tensor is handled.

An operation that reaches `Tensor.__torch_function__` is one of

- recorded: there is a `Rule` for it (`@rule`) or a plain function composed of
  recorded operations (`@composite`), as PyTorch itself composes it;
- passed through: no input requires grad, or grad mode is off, or its result carries no
  gradient (a comparison, an index, a shape, a number);
- refused: anything else. No gradient is ever silently lost.
"""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, TypeAlias, TypeVar

import torch

from .. import _torch
from .. import tensor as _tensor
from .._torch import DisableTorchFunctionSubclass
from .._types import TorchFunction
from .._upcalls import implements
from ..fast.composed import remembered
from ..grad_mode import is_grad_enabled
from ..gradients import backward, grad
from ..operation import Operation
from ..tape import (
    OTHER,
    dispatch_kind,
    is_left_to_torch,
    is_update_of_leaf,
    no_complex,
    no_transform,
    record,
    tensors_in,
)
from .passive import PASSIVE, RESHAPING, UNRECORDED_SETTERS

C = TypeVar("C", bound=TorchFunction)
F = TypeVar("F", bound=type[Operation])
# For formulas that share work: which gradients are needed, and the gradients.
Needs: TypeAlias = tuple[bool, ...]
Gradients: TypeAlias = tuple[torch.Tensor | None, ...]

# torch function -> its replacement. Filled by the decorators below.
RULES = _tensor.RULES
# The same by module and name, for functions that torch.nn.functional and torch.autograd define in
# Python, so that these need not be imported.
NAMED: dict[tuple[str, str], TorchFunction] = {
    ("torch.autograd", "backward"): backward,
    ("torch.autograd", "grad"): grad,
}


class Rule(Operation):
    """The operation of one of PyTorch's; its node has PyTorch's name."""

    is_rule = True
    aten_name: str = ""  # PyTorch's name for it in errors, if that is not `public`'s
    func: TorchFunction | None = None  # PyTorch's operation, with the arguments of `forward`
    rest: tuple[object, ...] = ()  # and this one
    numbers: tuple[int, ...] = ()  # which arguments of it are numbers

    @classmethod
    def node_name(cls) -> str:
        return cls.__name__ + "Backward0"

    @classmethod
    def check_numbers(cls, args: tuple[object, ...]) -> None:
        """PyTorch's error if a tensor that requires grad is given as a number."""
        for i in cls.numbers:
            if i < len(args) and has_gradient(args[i]):
                assert cls.func is not None
                raise unplaced(cls.func, args + cls.rest, {})


def has_gradient(value: Any) -> bool:
    return dispatch_kind(type(value)) is not OTHER and value.requires_grad


@functools.cache
def numbers_of(
    func: TorchFunction, integers: bool = False
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The arguments of `func` that are always numbers, never tensors: places and names.

    From PyTorch's own declarations. There it also accepts a tensor without a gradient, as the
    number in it, and raises for one that requires grad. Most integer arguments are left to PyTorch,
    as no tensor of integers requires grad.
    """
    kinds = _REALS | _INTEGERS if integers else _REALS
    numbers: set[int | str] = set()
    tensors: set[int | str] = set()
    for schema in _torch.jit_get_schemas_for_operator(f"aten::{getattr(func, '__name__', '')}"):
        types = [str(a.type) for a in schema.arguments]
        if not any("Tensor" in t for t in (*types, *(str(r.type) for r in schema.returns))):
            continue  # TorchScript's, for numbers only
        for i, (argument, type_) in enumerate(zip(schema.arguments, types, strict=True)):
            where: set[int | str] = {argument.name}
            if not argument.kwarg_only:
                where.add(i)
            if type_ in kinds:
                numbers |= where
            elif "Tensor" in type_:
                tensors |= where
    found = numbers - tensors
    places = sorted(where for where in found if isinstance(where, int))
    return tuple(places), tuple(where for where in found if isinstance(where, str))


_REALS = {"number", "float", "Optional[number]", "Optional[float]"}
_INTEGERS = {"int", "Optional[int]"}


@implements(_tensor)
def check_numbers(func: TorchFunction, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """PyTorch's error if a tensor that requires grad is given to `func` as a number, or with
    `out`."""
    if kwargs.get("out") is not None:
        raise unplaced(func, args, kwargs)
    places, names = numbers_of(func, integers=True)
    given = [args[i] for i in places if i < len(args)]
    if kwargs:
        given += [kwargs.get(name) for name in names]
    if any(map(has_gradient, given)):
        try:
            _as_pytorch(func, args, kwargs)
        except TypeError as error:
            raise error from None


# NumPy's names for two arguments, which PyTorch accepts as well.
_ALIASES = {"axis": "dim", "keepdims": "keepdim"}


@implements(_tensor)
class Recorded:
    """Calls a Rule with the arguments of a torch call, keywords put in their places."""

    def __init__(self, function: type[Operation], func: TorchFunction) -> None:
        self.function = function
        self.func = func
        if function.formulas is None:
            parameters = _parameters(function.forward)[1:]
        else:
            parameters = function.formulas.parameters
        self.variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.places = {p.name: i for i, p in enumerate(parameters)}
        self.defaults = [p.default for p in parameters]
        self.most = sys.maxsize if self.variadic else len(parameters)
        # For repeated calls with keywords, by the number of positional arguments and the keywords:
        # the remaining arguments, as keyword and default.
        self.behind: dict[tuple[int | str, ...], list[tuple[str, object]]] = {}

    def __call__(self, *args: object, **kwargs: object) -> Any:
        if kwargs or len(args) > self.most:
            args = self.placed(args, kwargs)
        return record(self.function, args)[0]

    def placed(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, ...]:
        key: tuple[int | str, ...] = (len(args), *kwargs)
        behind = self.behind.get(key)
        if behind is not None:
            return (*args, *[kwargs.get(name, default) for name, default in behind])
        values = [*args, *self.defaults[len(args) :]]
        names = [""] * len(values)
        for name, value in kwargs.items():
            if name == "out" and value is None:
                continue
            place = self.places.get(_ALIASES.get(name, name), -1)
            if place < len(args) or names[place] or self.variadic:
                raise unplaced(self.func, args, kwargs)
            names[place] = name
            values[place] = value
        if len(values) > self.most or any(v is inspect.Parameter.empty for v in values):
            raise unplaced(self.func, args, kwargs)
        if "out" not in kwargs and len(self.behind) < _MOST_KEYS:
            self.behind[key] = list(zip(names, self.defaults, strict=True))[len(args) :]
        return tuple(values)


def _parameters(function: TorchFunction) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


_MOST_KEYS = 64


def unplaced(
    func: TorchFunction, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Exception:
    """These arguments fit no rule: raise PyTorch's own error if it has one, else refuse."""
    if kwargs.get("out") is not None:
        return RuntimeError(
            f"{func.__name__}(): functions with out=... arguments don't support automatic"
            " differentiation, but one of the arguments requires grad."
        )
    _as_pytorch(func, args, kwargs)
    return refusal(func, "with these arguments")


def _as_pytorch(
    func: TorchFunction, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> None:
    """Call `func` as PyTorch would be called, for its errors: with copies that require grad."""
    with DisableTorchFunctionSubclass(), torch.no_grad():
        func(*_copied(args), **_copied(kwargs))


def _copied(value: object) -> Any:
    """The value with every tensor in it copied; copies require grad for torch if the originals
    do."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        data = torch.Tensor.detach(tensor).clone()
        if type(tensor) is torch.Tensor and not tensor.requires_grad:
            return data
        return torch.Tensor._make_subclass(type(tensor), data, tensor.requires_grad)  # type: ignore[no-any-return]

    return _mapped(value, copy)


def handle(func: TorchFunction, found: TorchFunction) -> None:
    """Have `found` called for the torch function `func` on tracked tensors."""
    RULES[func] = found
    if not _changes_argument(func, {}):
        _tensor.COMPUTED.add(func)


def rule(*funcs: TorchFunction) -> Callable[[F], F]:
    """Record each of the torch functions `funcs` as a call of the decorated Rule."""

    def register(function: F) -> F:
        if "public" not in vars(function):
            function.public = staticmethod(funcs[0])
        for func in funcs:
            recorded = Recorded(function, func)
            handle(func, recorded)
            _tensor.answer_directly(func, recorded)
        _declare_numbers(function, Recorded(function, funcs[0]))
        return function

    return register


def stands_for(func: TorchFunction, *rest: object) -> Callable[[F], F]:
    """The decorated Rule takes the arguments of `func`, and is recorded for it by a `composite`."""

    def register(function: F) -> F:
        function.rest = rest  # type: ignore[attr-defined]
        _declare_numbers(function, Recorded(function, func))
        return function

    return register


def composite(
    *funcs: TorchFunction, directly: bool = False, repeats: bool = False
) -> Callable[[C], C]:
    """Replace each of `funcs` by the decorated function, which consists of recorded operations.

    `directly`: methods among them are called without torch's dispatch, like those with a rule; so
    the function has to raise PyTorch's errors itself. Generated calls always are.

    `repeats`: what a call records follows from its arguments, but not from the numbers in tensors,
    and is generated once it repeats (see `nnmirror.fast.composed`).
    """

    def register(function: C) -> C:
        called = function
        takes_any = any(p.kind is p.VAR_POSITIONAL for p in _parameters(function))
        if numbers_of(funcs[0])[1]:

            @functools.wraps(function)
            def called(*args: object, **kwargs: object) -> Any:
                check_numbers(funcs[0], args, kwargs)
                return function(*args, **kwargs)

        if repeats:
            called = remembered(called)
        for func in funcs:
            handle(func, called)
            if directly or repeats:
                _tensor.answer_directly(func, called, takes_any, only_generated=not directly)
        return called  # type: ignore[no-any-return]

    return register


def composed(func: TorchFunction, repeats: bool = False) -> Callable[[C], C]:
    """`composite(func, repeats=repeats)` for a loss or a distance; inside PyTorch's transforms it
    is left to PyTorch."""

    def register(function: C) -> C:
        @composite(func, repeats=repeats)
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> Any:
            if is_left_to_torch(args, kwargs):
                with DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return register


def answered(*funcs: TorchFunction, repeats: bool = False) -> Callable[[C], C]:
    """As `composed`, for functions with the signature of the decorated one; other calls get
    PyTorch's own error. `repeats`: as for `composite`.
    """

    def register(function: C) -> C:
        names = inspect.signature(function).parameters

        def called(func: TorchFunction) -> TorchFunction:
            takes_numbers = bool(numbers_of(func)[1])

            def call(*args: object, **kwargs: object) -> Any:
                if is_left_to_torch(args, kwargs):
                    with DisableTorchFunctionSubclass():
                        return func(*args, **kwargs)
                if takes_numbers:
                    check_numbers(func, args, kwargs)
                if kwargs and not kwargs.keys() <= names.keys():
                    given = {_ALIASES.get(name, name): value for name, value in kwargs.items()}
                    if given.get("out") is None:
                        given.pop("out", None)
                    if not given.keys() <= names.keys() or len(given) < len(kwargs) - 1:
                        raise unplaced(func, args, kwargs)
                    kwargs = given
                try:
                    return function(*args, **kwargs)
                except TypeError:
                    try:
                        inspect.signature(function).bind(*args, **kwargs)
                    except TypeError:
                        raise unplaced(func, args, kwargs) from None
                    raise

            return call

        for func in funcs:
            found = remembered(called(func)) if repeats else called(func)
            handle(func, found)
            _tensor.answer_directly(func, found)
        return function

    return register


def inplace(*funcs: TorchFunction) -> Callable[[F], F]:
    """Record each of the in-place `funcs`: the decorated Rule saves, then torch changes the
    tensor."""

    def register(function: F) -> F:
        for func in funcs:
            placed = Recorded(function, func)

            def call(
                *args: object,
                _func: TorchFunction = func,
                _placed: Recorded = placed,
                **kwargs: object,
            ) -> Any:
                places = _placed.placed(args, kwargs) if kwargs else args
                change = functools.partial(_func, *args, **kwargs)
                return record(function, places, inplace=change)[0]

            handle(func, call)
            _tensor.answer_directly(func, call, takes_any=True)
        _declare_numbers(function, placed)
        return function

    return register


def _declare_numbers(function: Any, recorded: Recorded) -> None:
    """Set the arguments of a Rule that are checked for tensors given as numbers."""
    places, names = numbers_of(recorded.func)
    if not recorded.variadic:
        places = tuple({*places, *(recorded.places[n] for n in names if n in recorded.places)})
    if places and "numbers" not in vars(function):
        function.func, function.numbers = recorded.func, tuple(sorted(places))
        function.first_number = function.numbers[0]


def plain_values(value: object) -> Any:
    """The value with every tracked tensor in it detached."""
    return _mapped(value, torch.Tensor.detach)


def _mapped(value: object, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {name: _mapped(v, change) for name, v in value.items()}
    return value


def name_of(func: Any) -> str:
    """The name of `func` as a user would write it: torch.special.erf, Tensor.erf_, Tensor.mT."""
    if getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):
        return f"Tensor.{func.__self__.__name__}"
    return str(torch.overrides.resolve_name(func) or getattr(func, "__name__", func))


def refusal(func: TorchFunction, why: str = "") -> NotImplementedError:
    if func in _torch.of_forward_mode:
        return NotImplementedError(
            "nnmirror: torch's forward mode does not see the mirror's tape, and a tensor in it"
            " requires grad; its tangent would lose the gradient. Take nnmirror.func.jvp or jacfwd,"
            " or torch.autograd.functional.jvp (or strategy='reverse-mode'); or let nothing of the"
            " module require grad (module.requires_grad_(False))"
        )
    name = name_of(func)
    return NotImplementedError(
        f"nnmirror: {name} has no backward rule{' ' + why if why else ''}, and a tensor given"
        " to it requires grad; its result would lose the gradient. What to do: call"
        " .detach() on the tensor if no gradient should flow; write the operation as an"
        " nnmirror.Function with its backward; or open an issue that names"
        f" {name}."
    )


def _changes_argument(func: TorchFunction, kwargs: dict[str, object]) -> bool:
    name = getattr(func, "__name__", "")
    if kwargs.get("out") is not None or name in ("__set__", "__delete__", "__setitem__"):
        return True
    return (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name.endswith("__") and name in _INPLACE_OPERATORS
    )


_INPLACE_OPERATORS = {
    f"__i{name}__"
    for name in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    ]
}


_VMAP_MODULE = "torch._functorch.vmap"
_VMAP_FILE = os.path.join("torch", "_functorch", "vmap.py")


def _vmap_asks() -> bool:
    """Does the call come from torch.vmap, through modes or not?"""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in _BETWEEN:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.endswith(_VMAP_FILE)


_BETWEEN = {"__torch_function__", "_dim_directly", "answer", "dispatch"}


def _dim(tensor: torch.Tensor) -> int:
    # The one call by torch.vmap that reaches the tensor.
    if tensor.requires_grad and _vmap_asks():
        raise no_transform()
    return _C_dim(tensor)  # type: ignore[no-any-return]


_C_dim = torch.Tensor.dim
_tensor.ask_plainly(_C_dim, _dim)
_dim_of_any = _tensor.Tensor.dim


def _dim_directly(tensor: Any, *args: object, **kwargs: object) -> Any:
    """`_dim_of_any`, with fewer checks where vmap does not ask."""
    if (
        type(tensor) is _tensor.Tensor
        and torch.is_grad_enabled()
        and sys._getframe(1).f_globals.get("__name__") != _VMAP_MODULE
    ):
        with DisableTorchFunctionSubclass():
            return _C_dim(tensor, *args, **kwargs)
    return _dim_of_any(tensor, *args, **kwargs)


setattr(_tensor.Tensor, "dim", functools.wraps(_C_dim)(_dim_directly))  # noqa: B010


@implements(_tensor)
def dispatch(func: TorchFunction, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    """Pass through or refuse `func(*args, **kwargs)`, for which there is no rule."""
    named = _named.get(func)
    if named is not None:
        return named(*args, **kwargs)
    if kwargs or len(args) > 1:
        check_numbers(func, args, kwargs)
    if args and (func in RESHAPING or _bare_name(func) in _RESHAPING_NAMES):
        return _tensor.reshaping(lambda *args: _dispatch(func, args, kwargs))(*args)
    return _dispatch(func, args, kwargs)


@implements(_tensor)
def computed_into(func: TorchFunction, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    """The result of `func` with the argument `out`, if nothing requires grad; else None."""
    if is_grad_enabled() and any(t.requires_grad for t in tensors_in((args, kwargs))):
        return None
    with DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    for out in tensors_in(kwargs["out"]):
        if isinstance(out, _tensor.Tensor):
            _tensor.forget_layout(out)
    return result


def _bare_name(func: TorchFunction) -> str:
    """set_ of torch.Tensor.set_ and of torch.ops.aten.set_.source_Tensor."""
    return getattr(func, "__name__", "").partition(".")[0]


_RESHAPING_NAMES = {"as_strided_", "resize_", "resize_as_", "set_", "set_data"}


# The attributes that the mirror stores itself, read without the tensor's class.
_GRAD: Any = torch.Tensor.grad
_KEPT: dict[TorchFunction, TorchFunction] = {
    _GRAD.__get__: lambda t, *_: t.grad,
    _GRAD.__set__: lambda t, value: setattr(t, "grad", value),
    _GRAD.__delete__: lambda t: delattr(t, "grad"),
}


_named: dict[TorchFunction, TorchFunction] = {}  # those of NAMED that were called


def _dispatch(func: TorchFunction, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    if func in _KEPT:
        return _KEPT[func](*args)
    if func in PASSIVE:
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    module = getattr(func, "__module__", "") or ""
    named = NAMED.get((module, getattr(func, "__name__", "")))
    if named is not None:
        _named[func] = named
        return named(*args, **kwargs)
    if not is_grad_enabled() or not any(t.requires_grad for t in tensors_in((args, kwargs))):
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if module == "torch.nn.init":  # changes its argument under torch.no_grad
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in UNRECORDED_SETTERS:
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if _changes_argument(func, kwargs):
        first = args[0] if args else None
        if is_update_of_leaf(first, (args[1:], kwargs)):
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, _tensor.Tensor) and first.is_leaf and first.requires_grad:
            what = "a view of a" if func is torch.Tensor.__setitem__ else "a"
            raise RuntimeError(what + _tensor.CHANGED_LEAF)
        raise refusal(func)
    with DisableTorchFunctionSubclass(), torch.no_grad():
        result = func(*args, **kwargs)
        if any(t.is_floating_point() or t.is_complex() for t in tensors_in(result)):
            given = tensors_in((result, args, kwargs))
            is_complex = any(t.is_complex() for t in given)
            raise no_complex(name_of(func)) if is_complex else refusal(func)
    return result
