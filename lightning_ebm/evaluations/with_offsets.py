"""Questions about a network whose predictions are shifted, as multipliers of the constraint x = mu shift them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_ebm.evaluations.base import Evaluation, Result
from lightning_ebm.evaluations.slope import Slope

if TYPE_CHECKING:
    from lightning_ebm.network import Network


@dataclass(frozen=True)
class WithOffsets(Evaluation[Result]):
    """Another question, in states, of the network in which every layer predicts mu_l - m_l.

    The quadratic energy there, 1/2 Pi |x - mu + m|^2, is 1/2 Pi |e|^2 + Pi m' e but for a constant: that of an
    augmented Lagrangian with the multipliers Pi m.

    Args:
        what: the question. The point is its own, then m, one tensor a layer.
    """

    what: Evaluation[Result]

    def moving(self, point: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.what.moving(point[: len(point) // 2])

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Result:
        count = len(network.names)
        return self.what.at(network.with_offsets(point[count:]), point[:count], strength)

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


@dataclass(frozen=True)
class PredictionErrors(Evaluation[list[Tensor]]):
    """`x_l - mu_l` of all layers."""

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        layers = network.at_states(point).layers
        return [(x - call.prediction).detach() for x, call in zip(point, layers, strict=True)]

    def cost(self, layers: int) -> float:
        return 0.5

    def flat(self, found: list[Tensor]) -> list[Tensor]:
        return found

    def built(self, tensors: list[Tensor], layers: int) -> list[Tensor]:
        return tensors
