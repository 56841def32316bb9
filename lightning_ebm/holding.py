"""A network some of whose states are held."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ebm.evaluations import Around, Evaluation, Landscape, Slope
from lightning_ebm.evaluations.base import Result


class Holding(Around):
    """`Landscape` of the other states: those held feel no force and answer with themselves.

    Args:
        landscape: whose.
        layers: indices of the states to hold where they are.
    """

    def __init__(self, landscape: Landscape, layers: Sequence[int]) -> None:
        super().__init__(landscape)
        self._layers = frozenset(layers)

    @property
    def unwatched(self) -> Landscape:
        return Holding(self.inner.unwatched, tuple(self._layers))

    def answer(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        found = self.inner.evaluate(what, point, strength)
        found = what.with_states(found, lambda k, state: point[k] if k in self._layers else state)
        return what.with_slope(found, self._still)

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """See `Landscape.feasible`. A held state may lie where its activation never would."""
        inside = self.inner.feasible(states)
        return [x if k in self._layers else y for k, (x, y) in enumerate(zip(states, inside, strict=True))]

    def _still(self, slope: Slope) -> Slope:
        gradients = [torch.zeros_like(g) if k in self._layers else g for k, g in enumerate(slope.gradients)]
        return slope.with_gradients(gradients)
