"""The energy that a relaxation begins at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_ebm.evaluations.energy import Energy

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class EnergyAtRest(Energy):
    """`lambda L` of the batch at the forward pass, where a divergence energy I is 0: a scalar, without a pass."""

    coordinates = "errors"

    @property
    def looks(self) -> bool:
        return False

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Tensor:
        return (strength * network.loss(network.at_errors(point))).detach()

    def cost(self, layers: int) -> float:
        return 0.0
