"""Operations on values, and straight-line Python for them."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_ebm.capture.values import Value, values_in


@dataclass
class Op:
    """One operation to carry out. Results that nobody needs are None."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Value | None]
    single: bool
    level: int

    def reads(self) -> set[Value]:
        """The values among the arguments."""
        return set(values_in((self.args, tuple(self.kwargs.values()))))


class Names:
    """Names of values and constants in the code."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {"inf": math.inf, "nan": math.nan}
        self._of: dict[Any, str] = {}
        self._count = itertools.count()

    def of(self, value: Value) -> str:
        if value not in self._of:
            self._of[value] = f"v{next(self._count)}"
        return self._of[value]

    def constant(self, thing: Any) -> str:
        if thing is None or type(thing) in (bool, int, float, str):
            return repr(thing)
        key = (id(thing), "constant")
        if key not in self._of:
            self._of[key] = f"c{next(self._count)}"
            self.constants[self._of[key]] = thing
        return self._of[key]

    def written(self, arg: Any) -> str:
        if type(arg) is Value:
            return self.of(arg)
        if type(arg) is tuple:
            return f"[{', '.join(self.written(a) for a in arg)}]"
        return self.constant(arg)


def source(
    name: str,
    ops: Sequence[Op],
    arguments: list[list[Value]],
    results: list[list[Value]],
    names: Names,
    taken: int | None = None,
) -> str:
    """A function of tuples that returns tuples; what is not needed any more is let go as soon as it is not.

    Args:
        name: of the function.
        ops: what it does.
        arguments: what it is given.
        results: what it returns.
        names: of values and constants.
        taken: the position of an argument that is a list, and is emptied: what it held is let go like the rest.
    """
    parameters = [f"a{k}" for k in range(len(arguments))]
    lines = [f"def {name}({', '.join(parameters)}):"]
    inside = {v for op in ops for v in (*op.reads(), *op.results) if v is not None} | {v for r in results for v in r}
    for parameter, values in zip(parameters, arguments, strict=True):
        if values:
            lines.append(f"({', '.join(names.of(v) if v in inside else '_' for v in values)},) = {parameter}")
    if taken is not None:
        lines.append(f"{parameters[taken]}.clear()")
    own = {v for op in ops for v in op.results if v is not None}.union(() if taken is None else arguments[taken])
    last: dict[Value, int] = {}
    for index, op in enumerate(ops):
        last.update(dict.fromkeys(op.reads() & own, index))
    kept = {v for r in results for v in r}
    for index, op in enumerate(ops):
        written = [names.written(a) for a in op.args] + [f"{k}={names.written(a)}" for k, a in op.kwargs.items()]
        targets = [names.of(v) if v is not None and (v in kept or v in last) else "_" for v in op.results]
        left = targets[0] if op.single else f"{', '.join(targets)}, *_"
        lines.append(f"{left} = {names.constant(fastest(op.func))}({', '.join(written)})")
        dead = [names.of(v) for v in op.reads() if last.get(v) == index and v not in kept]
        if dead:
            lines.append(f"del {', '.join(dead)}")
    tuples = [f"({', '.join(names.of(v) for v in r)}{',' if r else ''})" for r in results]
    lines.append(f"return {tuples[0] if len(tuples) == 1 else ', '.join(tuples)}")
    return "\n    ".join(lines) + "\n"


_DIRECT = {
    "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "mm", "addmm", "tanh", "relu", "neg", "sigmoid",
}  # fmt: skip


def fastest(func: Any) -> Callable[..., Any]:
    """The same function by the shorter way through Python, where there is one."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.name.startswith("aten::"):
        return func  # type: ignore[no-any-return]
    name = schema.name.removeprefix("aten::")
    full = f"{name}.{schema.overload_name}" if schema.overload_name else name
    return getattr(torch, name) if full in _DIRECT else func  # type: ignore[no-any-return]


def renamed(arg: Any, names: Mapping[Value, Value]) -> Any:
    """The argument with other values in place of some."""
    if type(arg) is Value:
        return names.get(arg, arg)
    return tuple(renamed(a, names) for a in arg) if type(arg) is tuple else arg


def repeated_key(func: Any, args: tuple[Any, ...], kwargs: tuple[Any, ...] = ()) -> Any:
    """What operations that are the same have in common; None where that cannot be told."""
    try:
        key = func, args, kwargs, _types(args)
        hash(key)
    except TypeError:
        return None
    return key


def _types(arg: Any) -> Any:
    """1, 1.0 and True are equal and not the same."""
    return tuple(_types(a) for a in arg) if type(arg) is tuple else type(arg)
