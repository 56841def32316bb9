"""What a formula computes with, by which code that was made of it is told apart from code of other settings.

A formula of the user's own reads more than its object holds: attributes of its class, global names, what a closure
has caught. Code keeps the numbers that it was traced with, so that these are settings too.
"""

import dis
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_ebm.program.code import Key
from lightning_ebm.program.named import named

Read = Callable[[], Any]

_readers: "WeakKeyDictionary[type, list[Read]]" = WeakKeyDictionary()


def settings_of(part: object) -> Key | None:
    """Of an energy, an update or an evaluation; None if they cannot be told."""
    try:
        held = ((name, _told(value)) for name, value in vars(part).items())
        return (type(part), *held, *(_told(read(), looked_into=True) for read in _read_by(type(part))))
    except (TypeError, ValueError):  # also of a name in a closure that nothing has been given yet
        return None


def is_own(part: object) -> bool:
    """Whether it is of a class of the user's, which may read anything."""
    return bool(_read_by(type(part)))


def _told(value: Any, looked_into: bool = False) -> Any:
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, Mapping):
        return tuple((name, _told(held)) for name, held in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_told, value))
    if value is None or isinstance(value, int | float | complex | str | torch.dtype | BuiltinFunctionType):
        return value
    if looked_into and isinstance(value, FunctionType):
        return value
    # Attributes of the user's own modules and classes may be set at any time.
    if isinstance(value, FunctionType | ModuleType | type) and _is_of_a_library(value):
        return value
    raise TypeError


def _is_of_a_library(value: FunctionType | ModuleType | type) -> bool:
    root = _root(value.__name__ if isinstance(value, ModuleType) else named(value).module)
    return root in ("torch", "lightning_ebm") or root in sys.stdlib_module_names


def _read_by(kind: type) -> list[Read]:
    """Everything outside of its objects that a class of the user's reads; nothing for one of this library."""
    if kind not in _readers:
        found: dict[Any, Read] = {}
        for owner in kind.__mro__:
            if _is_ours(owner.__module__):
                continue
            found[owner] = lambda: None  # it is one of the user's, whatever it reads
            for name, value in vars(owner).items():
                if name.startswith(("__", "_abc_")):  # what Python and dataclasses make
                    continue
                if function := _function(value):
                    found |= _read_in(function, found)
                elif not hasattr(value, "__get__"):
                    found[owner, name] = partial(vars(owner).get, name)
        _readers[kind] = list(found.values())
    return _readers[kind]


def _is_ours(module: str) -> bool:
    return _root(module) in ("lightning_ebm", "builtins", "abc", "typing")


def _root(module: str) -> str:
    return module.partition(".")[0]


def _function(value: Any) -> FunctionType | None:
    """Of a method, a property, a static method or the like."""
    for name in ("fget", "func", "__func__"):
        value = getattr(value, name, None) or value
    return value if isinstance(value, FunctionType) and not _is_ours(named(value).module) else None


def _read_in(function: FunctionType, seen: Mapping[Any, Read]) -> dict[Any, Read]:
    """What a function reads, and the functions of the user's that it calls by name."""
    if function in seen:
        return {}
    found: dict[Any, Read] = {function: lambda: None}
    space = function.__globals__
    for name in dict.fromkeys(_globals_of(function.__code__)):
        if name in space:
            found[id(space), name] = partial(space.get, name)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        found[id(cell), name] = partial(getattr, cell, "cell_contents")
    for read in list(found.values()):
        called = read()
        if isinstance(called, FunctionType) and _root(named(called).module) not in ("torch", "lightning_ebm"):
            found |= _read_in(called, {**seen, **found})
    return found


def _globals_of(code: CodeType) -> Iterator[str]:
    """Global names that it loads, and that what is defined in it does."""
    yield from (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_of(inner)
