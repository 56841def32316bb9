"""Questions about a network whose layers count more or less than its energy says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_ebm.energies.scaled import scaled
from lightning_ebm.evaluations.base import Coordinates, Evaluation, Result
from lightning_ebm.evaluations.slope import Slope

if TYPE_CHECKING:
    from lightning_ebm.network import Network


@dataclass(frozen=True)
class WithPrecisions(Evaluation[Result]):
    """Another question, under the energy sum_l c_l e_l: of predictive coding with the precisions c_l Pi_l.

    Args:
        what: the question.
        factors: c_l, one a layer.
    """

    what: Evaluation[Result]
    factors: tuple[float, ...]

    @property
    def coordinates(self) -> Coordinates:  # type: ignore[override]  # its own, not its class's
        return self.what.coordinates

    def moving(self, point: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.what.moving(point)

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Result:
        factors = {(key.name, key.call): factor for key, factor in zip(network.keys, self.factors, strict=True)}
        return self.what.at(network.with_energy(scaled(network.energy, factors)), point, strength)

    def cost(self, layers: int) -> float:
        return self.what.cost(layers)

    def flat(self, found: Result) -> list[Tensor]:
        return self.what.flat(found)

    def built(self, tensors: list[Tensor], layers: int) -> Result:
        return self.what.built(tensors, layers)

    def slope(self, found: Result) -> Slope | None:
        return self.what.slope(found)

    def with_slope(self, found: Result, change: Callable[[Slope], Slope]) -> Result:
        return self.what.with_slope(found, change)

    def with_states(self, found: Result, put: Callable[[int, Tensor], Tensor]) -> Result:
        return self.what.with_states(found, put)
