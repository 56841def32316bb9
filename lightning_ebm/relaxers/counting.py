"""What relaxations cost: the passes through the network that they ask for, counted from outside."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_ebm.relaxers.base import Landscape
from lightning_ebm.relaxers.forces import Forces

_REDUCTION = 0.1
"""Passes that a sum over all states costs, with the arithmetic around it: measured .08 to .25 on MLPs."""


class TooDear(Exception):  # not an error: the end of a trial that has lost already
    pass


class Counting:
    """A `Landscape` that passes every question on, and counts what the answers cost.

    Args:
        landscape: the one that knows.
        limit: from where on it refuses.
    """

    def __init__(self, landscape: Landscape, limit: float) -> None:
        self._landscape = landscape
        self._limit = limit
        self.cost = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._landscape, name)

    def forces(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.forces`."""
        self._spend(1.5)
        return self._landscape.forces(states, strength)

    def error_forces(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.error_forces`."""
        self._spend(1.0)
        return self._landscape.error_forces(errors, strength)

    def responses(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.responses`."""
        self._spend(1.5)
        return self._landscape.responses(states, strength)

    def answers(self, states: Sequence[Tensor], strength: complex, layers: Sequence[int]) -> list[Tensor]:
        """See `Landscape.answers`."""
        self._spend(len(layers) / len(states))
        return self._landscape.answers(states, strength, layers)

    def energy_of(self, states: Sequence[Tensor], strength: complex) -> Tensor:
        """See `Landscape.energy_of`."""
        self._spend(0.5)
        return self._landscape.energy_of(states, strength)

    def per_sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """See `Landscape.per_sample`."""
        self._spend(_REDUCTION)
        return self._landscape.per_sample(tensors)

    def norms(self, tensors: Iterable[Tensor]) -> Tensor:
        """See `Landscape.norms`."""
        self._spend(_REDUCTION)
        return self._landscape.norms(tensors)

    def products(self, left: Sequence[Tensor], right: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """See `Landscape.products`."""
        self._spend(_REDUCTION * len(layers) / len(self._landscape.names))
        return self._landscape.products(left, right, layers)

    def _spend(self, cost: float) -> None:
        self.cost += cost
        if self.cost > self._limit:
            raise TooDear
