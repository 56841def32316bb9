"""One nudged phase against the free one."""

from dataclasses import dataclass

from lightning_ebm import checked
from lightning_ebm.nudges.base import Nudge, Phase, checked_strength


@dataclass(frozen=True)
class OneSided(Nudge):
    """Phases {l: 1/l, 0: -1/l}: [dE/dtheta(x_l) - dE/dtheta(x_0)] / l.

    Off the true gradient by O(l). For a divergence energy the free phase contributes exactly nothing and is not run.

    Args:
        strength: l, per sample; negative values push away from the target.

    Raises:
        ConfigurationError: the strength is 0 or not finite.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        checked.keep(self, strength=checked_strength(self, self.strength))

    def phases(self) -> tuple[Phase, ...]:
        return Phase(self.strength, 1 / self.strength), Phase(0.0, -1 / self.strength)
