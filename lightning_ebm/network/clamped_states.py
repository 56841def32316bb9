"""A network some of whose units are held: the one wrapper that every relaxer of it meets."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ebm.evaluations import Around, Evaluation, HeldStates, Landscape, Slope
from lightning_ebm.evaluations.base import Result
from lightning_ebm.relaxers import Relaxation


class Hold(NamedTuple):
    """What a layer's units are held at.

    Attributes:
        value: in the shape of the state.
        units: True where a unit is held, in the same shape; None holds all of them.
    """

    value: Tensor
    units: Tensor | None = None

    def put(self, state: Tensor) -> Tensor:
        """The state with its held units at their values."""
        return self.value if self.units is None else torch.where(self.units, self.value, state)

    def still(self, gradient: Tensor) -> Tensor:
        """The gradient without that of held units."""
        return torch.zeros_like(gradient) if self.units is None else gradient.masked_fill(self.units, 0.0)


class ClampedStates(Around):
    """`Landscape` of the units that are not held: those held feel no force and answer with themselves.

    In error coordinates the errors of the free units move, see `HeldErrorForces`.

    Args:
        landscape: whose.
        held: by the index of a layer, what is held there.
    """

    def __init__(self, landscape: Landscape, held: Mapping[int, Hold]) -> None:
        super().__init__(landscape)
        self._held = dict(held)
        self._which = tuple((k, hold.units is not None) for k, hold in self._held.items())

    @property
    def unwatched(self) -> Landscape:
        return ClampedStates(self.inner.unwatched, self._held)

    def put(self, states: Sequence[Tensor]) -> list[Tensor]:
        """States with held units at their values."""
        return [self._held[k].put(x) if k in self._held else x for k, x in enumerate(states)]

    def is_held(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Of each unit, whether it is held."""
        every = [(self._held.get(k), x) for k, x in enumerate(states)]
        return [
            torch.full_like(x, hold is not None, dtype=torch.bool) if hold is None or hold.units is None else hold.units
            for hold, x in every
        ]

    def answer(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        if what.coordinates == "errors":
            slope = self.inner.evaluate(what.where_held(self._which), self._at(point), strength)
            return what.with_slope(slope, self._still)
        found = self.inner.evaluate(what, point, strength)
        found = what.with_states(found, lambda k, state: self._held[k].put(state) if k in self._held else state)
        return what.with_slope(found, self._still)

    def in_states(self, found: Relaxation) -> Relaxation:
        """The same end of a phase, written in states."""
        if found.coordinates == "states":
            return found
        return found.in_states(lambda errors: self.inner.evaluate(HeldStates(self._which), self._at(errors), 0.0))

    def feasible(self, states: list[Tensor]) -> list[Tensor]:
        """See `Landscape.feasible`. A held unit may lie where its activation never would."""
        return self.put(self.inner.feasible(states))

    def _at(self, errors: Sequence[Tensor]) -> list[Tensor]:
        """The point of `HeldErrorForces`."""
        given = [t for hold in self._held.values() for t in hold if t is not None]
        rest = errors[0] is self.no_errors[0]  # tensors of one number, which the network takes for the forward pass
        return [*([error.contiguous() for error in errors] if rest else errors), *given]

    def _still(self, slope: Slope) -> Slope:
        gradients = [self._held[k].still(g) if k in self._held else g for k, g in enumerate(slope.gradients)]
        return slope.with_gradients(gradients)
