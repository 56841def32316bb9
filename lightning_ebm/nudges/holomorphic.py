"""Nudges around a circle in the complex plane."""

import cmath
import math
from dataclasses import dataclass

from lightning_ebm import checked
from lightning_ebm.nudges.base import Nudge, Phase, checked_strength


@dataclass(frozen=True)
class Holomorphic(Nudge):
    """Phases at the N roots l e^(2 pi i k/N): 1/(N l) Re sum_k e^(-2 pi i k/N) dE/dtheta(x_k).

    Cauchy's formula for the slope at 0, by the trapezoid rule: off the true gradient by O((l/R)^N), with R the distance
    to the nearest nudge at which the equilibrium ceases to be analytic. N = 2 is `Centered`. The states are complex
    where the nudge is, so the network and the loss must be analytic functions of them (tanh, sigmoid, linear maps; no
    ReLU, no hard sigmoid): one that is not is refused by name. Conjugate nudges have conjugate equilibria, so only
    N//2 + 1 phases are run. `Learner.report` records the contour: each of its points is a phase there, with its complex
    strength, its energies and its residuals.

    Args:
        strength: l > 0, the radius, per sample.
        points: N >= 2.

    Raises:
        ConfigurationError: the strength is 0 or not finite; fewer than two points.
        UnsupportedModuleError: (in use) a layer or the loss is not analytic.

    Source:
        Laborieux and Zenke, NeurIPS 2022.
    """

    strength: float = 0.1
    points: int = 4

    def __post_init__(self) -> None:
        checked.keep(self, strength=checked_strength(self, self.strength))
        why = "; 2 is ebm.Centered, one point alone gives no slope, and every two more cost a relaxation"
        checked.keep(self, points=checked.count(self, "points", self.points, least=2, most=1024, why=why))

    def phases(self) -> tuple[Phase, ...]:
        real, others = [], []
        for k in range(self.points // 2 + 1):
            root = 1j if 4 * k == self.points else cmath.exp(2j * math.pi * k / self.points)
            weight = 1 / (self.points * self.strength * root)
            if k == 0 or 2 * k == self.points:  # on the real axis, where real arithmetic is exact and cheaper
                real.append(Phase(self.strength * round(root.real), weight.real))
            else:
                others.append(Phase(self.strength * root, 2 * weight))
        return (*real, *others)  # real ones one after the other: they can be relaxed together
