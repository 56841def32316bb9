"""States and forces of a bounded size."""

import math
from typing import Any

from lightning_ebm import checked
from lightning_ebm.evaluations import Landscape
from lightning_ebm.relaxers.base import Relaxer
from lightning_ebm.relaxers.device import Change, Device, refuse_errors
from lightning_ebm.relaxers.wrapper import Wrapper


class Saturated(Wrapper):
    """Another relaxer, on a device whose states and forces end at a largest size: clamp(x, -r, r) after every step.

    Args:
        relaxer: moves the states.
        states: the largest state; infinite leaves them.
        forces: the largest force; infinite leaves them.

    Raises:
        ConfigurationError: a bound that is not positive; `states` around a relaxer of errors.
    """

    def __init__(self, relaxer: Relaxer, states: float = math.inf, forces: float = math.inf) -> None:
        super().__init__(relaxer)
        self.states, self.forces = self._bound("states", states), self._bound("forces", forces)
        if math.isfinite(self.states):
            refuse_errors(self, relaxer)

    def _bound(self, name: str, value: Any) -> float:
        if isinstance(value, float) and value == math.inf:
            return value
        return checked.number(self, name, value, "a positive number, or math.inf", above=0)

    def __repr__(self) -> str:
        return f"Saturated({self.relaxer!r}, states={self.states}, forces={self.forces})"

    def in_front(self, landscape: Landscape) -> Landscape:
        states, forces = self._clamp(self.states), self._clamp(self.forces)
        return landscape if states is None and forces is None else Device(landscape, states, forces)

    def _clamp(self, most: float) -> Change | None:
        return (lambda x: x.clamp(-most, most)) if math.isfinite(most) else None
