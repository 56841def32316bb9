"""The tensors in what functions are given and return."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in lists, tuples, mappings, what else torch takes for a tree, and dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])
    return found


def listed(given: Any) -> Sequence[Any]:
    """One thing, or a list or tuple of several, as several."""
    return given if isinstance(given, list | tuple) else (given,)


def all_of(tensors: Any) -> list[Tensor]:
    """What autograd is called with: one tensor, or any number of them."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
