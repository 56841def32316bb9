"""Questions about a network whose predictions are shifted, as multipliers of the constraint x = mu shift them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_ebm.evaluations.base import Result
from lightning_ebm.evaluations.of_another import OfAnother
from lightning_ebm.evaluations.of_tensors import TensorsEvaluation

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class WithOffsets(OfAnother[Result]):
    """Another question, in states, of the network in which every layer predicts mu_l - m_l.

    The quadratic energy there, 1/2 Pi |x - mu + m|^2, is 1/2 Pi |e|^2 + Pi m' e but for a constant: that of an
    augmented Lagrangian with the multipliers Pi m.

    Args:
        what: the question. The point is its own, then m, one tensor a layer.
    """

    def moving(self, point: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.what.moving(point[: len(point) // 2])

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Result:
        count = len(network.names)
        return self.what.at(network.with_offsets(point[count:]), point[:count], strength)


@dataclass(frozen=True)
class PredictionErrors(TensorsEvaluation):
    """`x_l - mu_l` of all layers."""

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        layers = network.at_states(point).layers
        return [(x - call.prediction).detach() for x, call in zip(point, layers, strict=True)]

    def cost(self, layers: int) -> float:
        return 0.5
