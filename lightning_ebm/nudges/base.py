"""A nudge is a table of phases."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_ebm.errors import ConfigurationError


class Phase(NamedTuple):
    """One row of the table: relax on I + strength * loss, and count the result with this weight.

    Attributes:
        strength: lambda, the weight of the loss, per sample; 0 is the free phase; complex in holomorphic tables.
        weight: what this phase's dE/dtheta is multiplied by in the update, of which the real part counts.
        held: the output is held at o - strength dL/do (o the free output) instead, and the loss does not enter E.
    """

    strength: complex
    weight: complex
    held: bool = False


class Nudge(ABC):
    """The update is sum_p weight_p * dE/dtheta(x_p), with x_p the state relaxed at strength_p and then held fixed.

    The weights of a table sum to 0 and weight * strength sums to 1, so that a finite difference in lambda results,
    and whatever part of the loss depends on the parameters directly keeps its own gradient.
    """

    needs_output_state: ClassVar[bool] = False
    """Whether the output must be a state, because the nudge holds it."""

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The table of one batch, one row for each strength, the strongest first."""

    def held_output(self, free: Tensor, loss_slope: Tensor, strength: float, batch: Any) -> Tensor:
        """Where a held phase holds the output: o - strength dL/do, both ``(B, ...)``, L per sample."""
        return free - strength * loss_slope


def checked_strength(owner: object, strength: float) -> float:
    """`strength`, if a phase can be divided by it."""
    name = type(owner).__name__
    if not math.isfinite(strength) or strength == 0:
        raise ConfigurationError(
            f"{name}({strength!r}): the update divides by the nudge, which must be a finite number other than 0;"
            " at 0 nothing pulls the states and every update would be 0/0. Try 1e-3; for an exact gradient without"
            " a small number take ebm.Infinitesimal()."
        )
    return float(strength)
