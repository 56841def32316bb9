"""The tensors in what functions are given and return, and in batches."""

import copy
import dataclasses
import operator
from collections import UserList, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType, NoneType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

_NUMBERS = frozenset({int, float, bool, complex, str, bytes, NoneType})
_NO_PART = (nn.Module, Dataset, DataLoader, Iterator, type, FunctionType, MethodType, ModuleType)
"""What a batch may lead to, and does not hold."""


def opened(tree: Any, within: tuple[Any, ...] = ()) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of what a function is given or returns, and how to put others in their place.

    Lists, tuples, mappings, what else torch takes for a tree, dataclasses and packed sequences are opened, within each
    other.

    Args:
        tree: what is opened.
        within: the dataclasses that it is a part of; one that holds what holds it is a leaf there.
    """
    if isinstance(tree, Tensor):
        return [tree], _only
    if isinstance(tree, PackedSequence):  # which older releases of torch take for a leaf
        parts, together = opened(tuple(tree), within)
        return parts, lambda others: type(tree)(*together(others))
    if _is_dataclass(tree):
        names = [field.name for field in dataclasses.fields(tree) if hasattr(tree, field.name)]
        parts, together = opened([getattr(tree, name) for name in names], (*within, tree))
        return parts, lambda others: _with_fields(tree, names, together(others))

    def is_opened(part: Any) -> bool:
        return isinstance(part, PackedSequence) or (_is_dataclass(part) and not any(part is one for one in within))

    leaves, structure = pytree.tree_flatten(tree, is_leaf=is_opened)
    held = [opened(leaf, within) if is_opened(leaf) else ([leaf], _only) for leaf in leaves]

    def rebuilt(others: list[Any]) -> Any:
        rest = iter(others)
        return pytree.tree_unflatten([again([next(rest) for _ in parts]) for parts, again in held], structure)

    return [leaf for parts, _ in held for leaf in parts], rebuilt


_only: Callable[[list[Any]], Any] = operator.itemgetter(0)


def _is_dataclass(part: Any) -> bool:
    return dataclasses.is_dataclass(part) and not isinstance(part, type)


def _with_fields(held: Any, names: Sequence[str], values: Sequence[Any]) -> Any:
    """A copy of a dataclass with other values in its fields, though it be frozen."""
    again = copy.copy(held)
    put = setattr if isinstance(held, dict) else object.__setattr__  # one that is a dict keeps its items by itself
    for name, value in zip(names, values, strict=True):
        put(again, name, value)
    return again


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors among the leaves, see `opened`."""
    return [leaf for leaf in opened(tree)[0] if isinstance(leaf, Tensor)]


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
    """One thing, or a list or tuple of several, as several; of lists within, all that they hold."""
    if not isinstance(given, list | tuple):
        return (given,)
    nested = any(isinstance(one, list | tuple) for one in given)
    return [leaf for one in given for leaf in listed(one)] if nested else given


def all_of(tensors: Any) -> list[Tensor]:
    """What autograd is called with: one tensor, or any number of them."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def largest(tensor: Tensor) -> float:
    """The absolute value of its largest element; 0 if it has none."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
