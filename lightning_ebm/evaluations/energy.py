"""The energy alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_ebm.evaluations.base import Evaluation
from lightning_ebm.evaluations.slope import Slope

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class Energy(Evaluation[Tensor]):
    """`I + lambda L` of the batch, a scalar, its real part where the nudge is complex."""

    @property
    def looks(self) -> bool:
        return True

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Tensor:
        seen = network.at_states(point)
        with torch.no_grad():
            return Slope(network.internal(seen), network.loss(seen), []).total(strength)

    def cost(self, layers: int) -> float:
        return 0.5

    def flat(self, found: Tensor) -> list[Tensor]:
        return [found]

    def built(self, tensors: list[Tensor], layers: int) -> Tensor:
        return tensors[0]
