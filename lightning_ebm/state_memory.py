"""The states in which samples were left at their last visit."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class StateMemory:
    """Free states by sample, to start the next free phase of the same sample from.

    A sample is recognized by what it is: a digest of its slice of every tensor in the batch. Samples that are augmented
    differently at every visit are never recognized, and start from the forward pass. Memory is one copy of the states
    for each sample seen, on the host.
    """

    def __init__(self) -> None:
        self._held: dict[str, list[Tensor]] = {}

    def names(self, batch: Any, size: int) -> list[str]:
        """What each of the samples of a batch is recognized by."""
        tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim and t.shape[0] == size]
        rows = [t.detach().cpu().contiguous().view(size, -1).view(torch.uint8).numpy() for t in tensors]
        return [hashlib.blake2b(b"|".join(row[i].tobytes() for row in rows)).hexdigest() for i in range(size)]

    def recall(self, names: Sequence[str], start: Sequence[Tensor]) -> list[Tensor]:
        """`start` with the samples that were seen before as they were left, ``(B, ...)`` each."""
        states = [state.clone() for state in start]
        for i, name in enumerate(names):
            for state, held in zip(states, self._held.get(name, []), strict=False):
                if held.shape == state.shape[1:]:
                    state[i] = held.to(state)
        return states

    def keep(self, names: Sequence[str], states: Sequence[Tensor]) -> None:
        """Notes where the samples are left."""
        host = [state.detach().cpu() for state in states]
        for i, name in enumerate(names):
            self._held[name] = [state[i].clone() for state in host]

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return dict(self._held)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._held = {name: list(held) for name, held in state.items()}
