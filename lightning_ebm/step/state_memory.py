"""The states in which samples were left at their last visit."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.program.tensors import of_batch


class StateMemory:
    """Free states by sample, to start the next free phase of the same sample from.

    A sample is recognized by what it is: a digest of its slice of every tensor in the batch. Samples that are augmented
    differently at every visit are never recognized, and start from the forward pass. Memory is one copy of the states
    for each sample seen, on the host, up to `most` bytes: beyond it the samples that were seen longest ago are let go.

    Args:
        most: how many bytes.
    """

    def __init__(self, most: int = 2**30) -> None:
        self._held: dict[str, list[Tensor]] = {}
        self._most = most
        self._bytes = 0

    def names(self, batch: Any, size: int) -> list[str]:
        """What each of the samples of a batch is recognized by."""
        tensors = [tensor for _, tensor in of_batch(batch) if tensor.ndim and tensor.shape[0] == size]
        # Of copies: what NumPy has may change unseen, so that the second run would be recorded as reading it anew.
        copies = [t.detach().to("cpu", copy=True).contiguous() for t in tensors]
        rows = [t.view(size, -1).view(torch.uint8).numpy() for t in copies]
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
            self._drop(name)
            self._held[name] = [state[i].clone() for state in host]
            self._bytes += _size(self._held[name])
        while self._bytes > self._most:
            self._drop(next(iter(self._held)))  # in the order of their last visits

    def _drop(self, name: str) -> None:
        self._bytes -= _size(self._held.pop(name, []))

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return dict(self._held)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._held = {name: list(held) for name, held in state.items()}
        self._bytes = sum(_size(held) for held in self._held.values())


def _size(states: Sequence[Tensor]) -> int:
    return sum(state.nbytes for state in states)
