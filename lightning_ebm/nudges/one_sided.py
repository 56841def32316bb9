"""One nudged phase against the free one."""

from dataclasses import dataclass
from typing import Literal

from lightning_ebm import checked
from lightning_ebm.nudges.base import Nudge, Phase, checked_strength


@dataclass(frozen=True)
class OneSided(Nudge):
    """Phases {l: 1/l, 0: -1/l}: [dE/dtheta(x_l) - dE/dtheta(x_0)] / l.

    Off the true gradient by O(l). For a divergence energy the free phase contributes exactly nothing and is not run.

    The trap: a loss that is a mean over the N elements of a sample, 784 pixels or 256 tokens, pulls each of them with
    l / N only, so that l = 1 is nearly the limit of no nudge, and the update nearly backprop's. ``per="element"`` is a
    strength of l N: ``F.mse_loss(o, y)`` then is worth the sum |y - o|^2 of each sample, and half of it, at
    ``OneSided(0.5, per="element")``, is the classic 1/2 |y - o|^2.

    Args:
        strength: l; negative values push away from the target.
        per: "sample", or "element": l is multiplied by the number N of elements of a sample that the loss's mean runs
            over, read from the record of the step.

    Raises:
        ConfigurationError: the strength is 0 or not finite, or `per` is another word; (in use) the record does not tell
            N.
    """

    strength: float = 1.0
    per: Literal["sample", "element"] = "sample"

    def __post_init__(self) -> None:
        checked.keep(
            self,
            strength=checked_strength(self, self.strength),
            per=checked.choice(self, "per", self.per, ("sample", "element")),
        )

    def __repr__(self) -> str:
        return f"OneSided(strength={self.strength!r}" + (")" if self.per == "sample" else f", per={self.per!r})")

    def phases(self) -> tuple[Phase, ...]:
        return Phase(self.strength, 1 / self.strength), Phase(0.0, -1 / self.strength)
