"""What a record consists of: values, and the operations that computed them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CONSTANT, PHASE, STATE, SEED = range(4)
"""What a value depends on: batch and parameters alone; the nudge as well; the states; the scale of the update."""


class Value:
    """What one tensor holds at one moment: writing to the tensor makes another value. Values themselves hold no data.

    Attributes:
        node: what computed it; None for an input and for a tensor that came from outside.
        level: what it depends on.
        meta: what makes two tensors from outside interchangeable; None for all others.
        read: whether an operation has used it.
        stale: whether its memory was written to under another name.
        shape: of the tensor; None where none was seen.
        dtype: likewise.
    """

    __slots__ = ("dtype", "level", "meta", "node", "read", "shape", "stale")

    def __init__(self, node: "Node | None", level: int, outside: Tensor | None = None) -> None:
        self.node = node
        self.level = level
        self.meta = None if outside is None else _meta(outside)
        self.read = self.stale = False
        self.shape: torch.Size | None = None
        self.dtype: torch.dtype | None = None

    def like(self) -> "Value":
        """Another value, of a tensor of the same kind."""
        other = Value(None, self.level)
        other.shape, other.dtype = self.shape, self.dtype
        return other


class Node:
    """One operation; tensors among its arguments are values. `problem` says why it cannot be repeated elsewhere."""

    __slots__ = ("args", "func", "grad", "index", "kwargs", "level", "problem", "results")

    def __init__(self, func: Any, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.index = index
        self.args = args
        self.kwargs = kwargs
        self.grad = torch.is_grad_enabled()
        self.level = CONSTANT
        self.problem: str | None = None
        self.results: list[Value | None] = []

    def __str__(self) -> str:
        return f"{self.func}({', '.join('tensor' if type(a) is Value else str(a) for a in self.args)})"

    def values(self) -> Iterator[Value]:
        """The values it reads."""
        yield from values_in(self.args)
        if self.kwargs:
            yield from values_in(tuple(self.kwargs.values()))


def _meta(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def values_in(arg: Any) -> Iterator[Value]:
    """The values among arguments of an operation, in order."""
    if type(arg) is Value:
        yield arg
    elif type(arg) is tuple:
        for part in arg:
            yield from values_in(part)
