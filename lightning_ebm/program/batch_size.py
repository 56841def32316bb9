"""How many samples a batch holds, as far as shapes tell."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_ebm.program.tensors import of_batch


def shapes_in(batch: Any, counts: Callable[[Tensor], bool] = lambda tensor: True) -> list[torch.Size]:
    """Those of all tensors in a batch, or in a call's arguments, that have a dimension and count: B is among them."""
    return [tensor.shape for _, tensor in of_batch(batch) if tensor.ndim > 0 and counts(tensor)]


def batch_size_among(
    batch: Sequence[torch.Size],
    states: Sequence[torch.Size],
    reduced: Collection[int] = (),
    declared: Collection[int] = (),
) -> tuple[int, int | None]:
    """The size that a layer with `batch_first` declares, then the one that most states have, then one the loss reduces.

    Then the most frequent, then the first; a smaller one that the loss reduces where it does not reduce that. A
    time-major batch (T, B, ...), nodes of several graphs, or a loose tensor beside the samples is not mistaken for the
    samples that way. An input of a single sample, without a dimension for them, has one. And another size that has as
    good a claim, if there is any, as the last dimension of all layers has where none is the first one of all. What
    there is none of, as edges of a graph or rows that a mask leaves, is not what samples are counted by.

    Args:
        batch: shapes of its tensors; candidates are their first dimensions, and the second ones of those with three.
        states: shapes.
        reduced: first dimensions of what the loss reduces to one number.
        declared: see `declared_size`.
    """
    shapes = batch or states or [torch.Size([1])]
    seconds = [shape[1] for shape in shapes if len(shape) > 1 and (len(shape) > 2 or shape[1] in declared)]
    first = [shape[0] for shape in shapes if len(shape)]
    found = [size for size in first + seconds if size] or [1]
    carried = {size: sum(size in shape[:2] for shape in states) for size in found}
    if not any(carried[size] or size in reduced for size in found) and all(len(shape) < 2 for shape in states):
        return 1, None

    def claim(size: int) -> tuple[bool, int, bool]:
        return size in declared, carried[size], size in reduced

    def fitness(size: int) -> tuple[bool, int, bool, int, int]:
        return *claim(size), found.count(size), -found.index(size)

    best = max(found, key=fitness)
    if best not in declared and best not in reduced:
        # What the layers have many of is pooled before the loss sees it, as nodes of a graph are.
        best = max((size for size in found if size in reduced and size < best), key=fitness, default=best)
    rivals = [other for other in found if other != best and claim(other) == claim(best) and carried[best]]
    if states and carried[best] < len(states) and best not in declared:
        # (features, samples), as in W @ x: every layer has them last.
        rivals += [s[1] for s in shapes if len(s) == 2 and all(len(x) == 2 and x[1] == s[1] for x in states)]
    return best, rivals[0] if rivals and batch else None


def declared_size(first: Any, batch_first: bool | None) -> int | None:
    """The number of samples in what a module is called with that says where they are: torch's `batch_first`."""
    if isinstance(first, PackedSequence):
        return int(first.batch_sizes[0])
    if batch_first is None or not isinstance(first, Tensor) or first.ndim != 3:
        return None
    return first.shape[0 if batch_first else 1]
