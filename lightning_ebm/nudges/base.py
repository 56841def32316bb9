"""A nudge is a table of phases."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

from lightning_ebm.errors import ConfigurationError


class Phase(NamedTuple):
    """One row of the table: relax on I + strength * loss, and count the result with this weight.

    Attributes:
        strength: lambda, the weight of the loss, per sample; 0 is the free phase.
        weight: what this phase's dE/dtheta is multiplied by in the update.
    """

    strength: float
    weight: float


class Nudge(ABC):
    """The update is sum_p weight_p * dE/dtheta(x_p), with x_p the state relaxed at strength_p and then held fixed.

    The weights of a table sum to 0 and weight * strength sums to 1, so that a finite difference in lambda results,
    and whatever part of the loss depends on the parameters directly keeps its own gradient.
    """

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The table, one row for each strength, the strongest first."""


def checked_strength(owner: object, strength: float) -> float:
    """`strength`, if a phase can be divided by it."""
    name = type(owner).__name__
    if not math.isfinite(strength) or strength == 0:
        raise ConfigurationError(
            f"{name}({strength!r}): the update divides by the nudge, which must be a finite number other than 0;"
            " at 0 nothing pulls the states and every update would be 0/0. Try 1e-3; for an exact gradient without"
            ' a small number take the algorithm "zero-divergence".'
        )
    return float(strength)
