"""The tensors in what functions are given and return."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in lists, tuples, mappings and what else torch takes for a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def listed(given: Any) -> Sequence[Any]:
    """One thing, or a list or tuple of several, as several."""
    return given if isinstance(given, list | tuple) else (given,)


def all_of(tensors: Any) -> list[Tensor]:
    """What autograd is called with: one tensor, or any number of them."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
