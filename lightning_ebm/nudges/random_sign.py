"""One nudged phase whose sign is drawn for every batch."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_ebm import checked
from lightning_ebm.nudges.base import Nudge, Phase, checked_strength
from lightning_ebm.nudges.one_sided import OneSided


@dataclass(frozen=True)
class RandomSign(Nudge):
    """Phases {s l: s/l, 0: -s/l} with s = +1 or -1 for every batch: on average over batches the centered nudge.

    A single batch is off the true gradient by O(l), the mean over batches by O(l^2), at the cost of one nudged phase.
    The signs come from a generator of this object's own, seeded from torch's at first use, so that runs repeat and the
    user's random numbers stay what they were.

    Args:
        strength: l, per sample; its own sign is of no consequence.

    Raises:
        ConfigurationError: the strength is 0 or not finite.

    Source:
        Laborieux et al. 2021.
    """

    strength: float = 0.01
    _generator: random.Random = field(default_factory=random.Random, init=False, repr=False, compare=False)
    _seeded: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checked.keep(self, strength=checked_strength(self, self.strength))

    def phases(self) -> tuple[Phase, ...]:
        if not self._seeded:
            self._generator.seed(torch.initial_seed())
            self._seeded.append(True)
        signed = self.strength if self._generator.random() < 0.5 else -self.strength
        return Phase(signed, 1 / signed), Phase(0.0, -1 / signed)

    def deterministic(self) -> Nudge:
        return OneSided(self.strength)

    def state_dict(self) -> dict[str, Any]:
        """Where the sequence of signs stands."""
        return {"seeded": bool(self._seeded), "generator": self._generator.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the sequence from there."""
        version, internal, gauss = state["generator"]
        self._generator.setstate((version, tuple(internal), gauss))
        self._seeded[:] = [True] if state["seeded"] else []
