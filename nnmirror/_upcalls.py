"""Calls from a lower module to a higher one, without circular imports.

Modules import only modules below them:

    grad_mode, exact.mode, fast.signature < tensor < formula, constants, node < operation <
    function, fast.call < fast.leaves < fast.signing < tape < custom_function, views, overrides,
    double_backward < fast.composed, fast.recorder, beyond < accumulate, running < gradient_hooks <
    walk < gradients, stepping, fast.writer < fast.bound < fast.due, fast.trial < fast.keyed,
    fast.parts < fast.binding < fast.tapped, fast.ends < fast.replay, rules < functional, func <
    modules < optim, parallel, utils, bridge < adopt

A lower module sometimes has to call a higher one: `Tensor.backward` runs a walk. It then declares
the function, under `upcall`, which names the module that has it:

    @upcall("nnmirror.gradients")
    def backward(...) -> None:
        raise NotImplementedError

and that module, which imports the lower one anyway, supplies it:

    @implements(tensor)
    def backward(...) -> None: ...

From then on the lower module finds that function under the name, like any other of its globals, so
that a call costs nothing extra. It must be called by this name in the module that declares it, and
not be imported from there. A class is declared in the same way.

After `import nnmirror` all are in place.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_homes: dict[tuple[str, str], str] = {}  # of (the module that declares it, its name): who has it


def upcall(home: str) -> Callable[[F], F]:
    """Declare a function or class that the higher module `home` defines."""

    def declare(function: F) -> F:
        _homes[function.__module__, function.__name__] = home
        return function

    return declare


def implements(lower: ModuleType) -> Callable[[F], F]:
    """Make the decorated function the one that `lower` declares."""

    def put(function: F) -> F:
        if _homes.get((lower.__name__, function.__name__)) != function.__module__:
            raise RuntimeError(
                f"{lower.__name__} declares no {function.__name__} of {function.__module__}"
            )
        setattr(lower, function.__name__, function)
        return function

    return put
