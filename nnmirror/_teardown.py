"""What happens to objects when the interpreter exits."""

import atexit
from typing import TypeVar

C = TypeVar("C", bound=type)


def not_at_exit(cls: C) -> C:
    """A class decorator: `__del__` is not called when the interpreter exits.

    It would run while modules are torn down, where a debugger that still traces it prints an error.
    """
    atexit.register(delattr, cls, "__del__")
    return cls
