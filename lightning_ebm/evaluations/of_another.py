"""What evaluations have in common that ask another one, of a network that is seen otherwise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_ebm.evaluations.base import Coordinates, Evaluation, Result
from lightning_ebm.evaluations.slope import Slope


@dataclass(frozen=True)
class OfAnother(Evaluation[Result]):
    """Another question, whose result is the result; a subclass writes `at`.

    Args:
        what: the question.
    """

    what: Evaluation[Result]

    @property
    def coordinates(self) -> Coordinates:  # type: ignore[override]  # its own, not its class's
        return self.what.coordinates

    @property
    def looks(self) -> bool:
        return self.what.looks

    @property
    def watched(self) -> "OfAnother[Result]":
        return replace(self, what=self.what.watched)

    def moving(self, point: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.what.moving(point)

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
