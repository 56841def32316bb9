"""Two nudged phases of opposite sign."""

from dataclasses import dataclass

from lightning_ebm import checked
from lightning_ebm.nudges.base import Nudge, Phase, checked_strength


@dataclass(frozen=True)
class Centered(Nudge):
    """Phases {+l: 1/2l, -l: -1/2l}: [dE/dtheta(x_l) - dE/dtheta(x_-l)] / 2l.

    Off the true gradient by O(l^2). The trap: the negative phase has an equilibrium only while
    l * lambda_max(S d2L) < 1 (S the response of the output); beyond, it diverges and the relaxer says so.

    Args:
        strength: l, per sample.

    Raises:
        ConfigurationError: the strength is 0 or not finite.

    Source:
        Laborieux et al. 2021.
    """

    strength: float = 0.01

    def __post_init__(self) -> None:
        checked.keep(self, strength=checked_strength(self, self.strength))

    def phases(self) -> tuple[Phase, ...]:
        half = 1 / (2 * self.strength)
        return Phase(self.strength, half), Phase(-self.strength, -half)
