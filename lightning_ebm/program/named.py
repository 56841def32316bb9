"""What functions, hooks and custom autograd Functions are called, and where they were written."""

from functools import partial
from typing import Any, NamedTuple


class Named(NamedTuple):
    """The name of a callable.

    Attributes:
        module: where it was written; empty where it does not say.
        name: with the class that it is in.
    """

    module: str
    name: str


def named(func: Any) -> Named:
    """The name of a function or a method; of a partial one, of the whole; of `Function.apply`, of the class."""
    func = func.func if isinstance(func, partial) else func
    owner = getattr(func, "__self__", None)
    func = owner if isinstance(owner, type) else func
    return Named(str(getattr(func, "__module__", "")), str(getattr(func, "__qualname__", repr(func))))
