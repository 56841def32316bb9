"""The energy that a relaxation begins at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_ebm.evaluations.base import Evaluation

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class EnergyAtRest(Evaluation[Tensor]):
    """`lambda L` of the batch at the forward pass, where a divergence energy I is 0: a scalar, without a pass."""

    coordinates = "errors"

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Tensor:
        return (strength * network.loss(network.at_errors(point))).detach()

    def cost(self, layers: int) -> float:
        return 0.0

    def flat(self, found: Tensor) -> list[Tensor]:
        return [found]

    def built(self, tensors: list[Tensor], layers: int) -> Tensor:
        return tensors[0]
