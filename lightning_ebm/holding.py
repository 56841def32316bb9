"""A network some of whose states are held."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ebm.network import Network
from lightning_ebm.relaxers import Forces


class Holding:
    """`Landscape` of the other states: those held feel no force and answer with themselves.

    Args:
        network: whose.
        layers: indices of the states to hold where they are.
    """

    def __init__(self, network: Network, layers: Sequence[int]) -> None:
        self._network = network
        self._layers = frozenset(layers)

    @property
    def unwatched(self) -> "Holding":
        """See `Recording.unwatched`."""
        network = getattr(self._network, "unwatched", self._network)
        return self if network is self._network else Holding(network, tuple(self._layers))

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def forces(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.forces`."""
        return self._still(self._network.forces(states, strength))

    def responses(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.responses`."""
        return self._still(self._network.responses(states, strength))

    def answers(self, states: Sequence[Tensor], strength: complex, layers: Sequence[int]) -> list[Tensor]:
        """See `Landscape.answers`."""
        free = [k for k in layers if k not in self._layers]
        found = dict(zip(free, self._network.answers(states, strength, free), strict=True)) if free else {}
        return [found.get(k, states[k]) for k in layers]

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """See `Landscape.feasible`. A held state may lie where its activation never would."""
        inside = self._network.feasible(states)
        return [x if k in self._layers else y for k, (x, y) in enumerate(zip(states, inside, strict=True))]

    def _still(self, forces: Forces) -> Forces:
        gradients = [torch.zeros_like(g) if k in self._layers else g for k, g in enumerate(forces.gradients)]
        return forces.with_gradients(gradients)
