"""A step down the forces, and what is left of them: one question each, so that each runs in one piece."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

from lightning_ebm.evaluations.base import Coordinates, Evaluation
from lightning_ebm.evaluations.error_forces import ErrorForces
from lightning_ebm.evaluations.forces import Forces
from lightning_ebm.evaluations.of_slope import SlopeEvaluation

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network


def forces_in(coordinates: Coordinates) -> SlopeEvaluation:
    """The forces of states, or of errors."""
    return Forces() if coordinates == "states" else ErrorForces()


def moved(point: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> list[Tensor]:
    """x - lr g, a step of descent."""
    return [x.sub(gradient, alpha=lr) for x, gradient in zip(point, gradients, strict=True)]


class Left(NamedTuple):
    """What a point has left.

    Attributes:
        energy: of the batch, a scalar.
        norm: |dE/dx| of each sample, ``(B,)``; None where it was not asked for.
        point: the next point; empty where no step was asked for.
    """

    energy: Tensor
    norm: Tensor | None
    point: list[Tensor]


@dataclass(frozen=True)
class DescentStep(Evaluation[Left]):
    """`x - lr dE/dx`, the nearest feasible point to it, and the energy at x.

    Args:
        coordinates: of the point.
        lr: step size; 0 takes no step.
        measures: whether |dE/dx| is asked for as well.
    """

    composed: ClassVar[bool] = True

    coordinates: Coordinates = "states"
    lr: float = 0.0
    measures: bool = True

    @property
    def takes_point(self) -> bool:
        return bool(self.lr)

    def at(self, network: "Network", point: Sequence[Tensor], strength: complex) -> Left:
        slope = network.evaluate(forces_in(self.coordinates), point, strength)
        energy = slope.total(strength)
        norm = network.norms(slope.gradients) if self.measures else None
        if not self.lr:
            return Left(energy, norm, [])
        ahead = moved(point, slope.gradients, self.lr)
        del slope  # as large as the states: not held through what follows
        return Left(energy, norm, network.feasible(ahead) if self.coordinates == "states" else ahead)

    def cost(self, layers: int) -> float:
        return forces_in(self.coordinates).cost(layers)

    def flat(self, found: Left) -> list[Tensor]:
        return [found.energy, *([] if found.norm is None else [found.norm]), *found.point]

    def built(self, tensors: list[Tensor], layers: int) -> Left:
        energy, *rest = tensors
        norm = rest.pop(0) if self.measures else None
        return Left(energy, norm, rest)
