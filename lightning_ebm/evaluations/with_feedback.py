"""Questions about a network in which slopes go back through other operators than the transposed weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_ebm.evaluations.base import Result
from lightning_ebm.evaluations.of_another import OfAnother
from lightning_ebm.evaluations.of_tensors import TensorsEvaluation

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


@dataclass(frozen=True)
class WithFeedback(OfAnother[Result]):
    """Another question, about forces in which B_k takes the place of each weight W_k that a slope goes back through.

    Energies, predictions and losses are what they were. The force that a layer sends to its parents, J' g with
    J = rho' W, becomes (rho' B)' g.

    Args:
        what: the question. The point is its own, then the operators, in the order of `Landscape.weight_products`.
        operators: how many.
    """

    operators: int

    def moving(self, point: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.what.moving(point[: len(point) - self.operators])

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Result:
        count = len(point) - self.operators
        return self.what.at(network.with_feedback(point[count:]), point[:count], strength)


@dataclass(frozen=True)
class Weights(TensorsEvaluation):
    """The weights that states are multiplied by, one a product, as the operations take them; whatever the point."""

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        return network.weights()

    def cost(self, layers: int) -> float:
        return 0.0


def behind(point: Sequence[Tensor], none: Sequence[Tensor], more: Sequence[Any]) -> list[Tensor]:
    """A point with more tensors behind it, which is not taken for the forward pass alone where it is there."""
    at_rest = bool(point) and point[0] is none[0]  # tensors of one number
    return [*([error.contiguous() for error in point] if at_rest else point), *more]
