"""Questions about a network whose layers count more or less than its energy says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_ebm.energies.scaled import scaled
from lightning_ebm.evaluations.base import Result
from lightning_ebm.evaluations.of_another import OfAnother

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class WithPrecisions(OfAnother[Result]):
    """Another question, under the energy sum_l c_l e_l: of predictive coding with the precisions c_l Pi_l.

    Args:
        what: the question.
        factors: c_l, one a layer.
    """

    factors: tuple[float, ...]

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Result:
        factors = {(key.name, key.call): factor for key, factor in zip(network.keys, self.factors, strict=True)}
        return self.what.at(network.with_energy(scaled(network.energy, factors)), point, strength)
