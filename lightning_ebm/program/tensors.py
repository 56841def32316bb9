"""The tensors in what functions are given and return, and in batches."""

import dataclasses
from collections import UserList, deque
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType, NoneType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

_NUMBERS = frozenset({int, float, bool, complex, str, bytes, NoneType})
_NO_PART = (nn.Module, Dataset, DataLoader, Iterator, type, FunctionType, MethodType, ModuleType)
"""What a batch may lead to, and does not hold."""


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in lists, tuples, mappings, what else torch takes for a tree, and dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, tuple):  # such as PackedSequence: older releases of torch take it for a leaf
            found += tensors_in(tuple(leaf))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])
    return found


def of_batch(batch: Any, where: str = "batch", within: tuple[Any, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch and how to get at them, in lists, mappings and objects within each other.

    Args:
        batch: what a step is given.
        where: its name.
        within: what it is a part of, for objects that hold what holds them.
    """
    if isinstance(batch, Tensor):
        yield where, batch
    elif type(batch) not in _NUMBERS and not any(batch is other for other in within):
        for name, value in _parts(batch):
            yield from of_batch(value, f"{where}{name}", (*within, batch))


def _parts(held: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(held, list | tuple | deque | UserList):
        return ((f"[{index}]", value) for index, value in enumerate(held))
    if isinstance(held, dict | Mapping):
        return ((f"[{name!r}]", value) for name, value in held.items())
    if isinstance(held, _NO_PART):
        return iter(())
    slots = [field.name for field in dataclasses.fields(held)] if dataclasses.is_dataclass(held) else ()
    names = dict.fromkeys([*slots, *getattr(held, "__dict__", {})])
    return ((f".{name}", getattr(held, name, None)) for name in names)


def listed(given: Any) -> Sequence[Any]:
    """One thing, or a list or tuple of several, as several."""
    return given if isinstance(given, list | tuple) else (given,)


def all_of(tensors: Any) -> list[Tensor]:
    """What autograd is called with: one tensor, or any number of them."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
