"""The contrast within pairs of states."""

from typing import ClassVar

from lightning_ebm.nudges import Nudge, Phase
from lightning_ebm.nudges.base import table_of
from lightning_ebm.updates.left_at_layers import LeftAtLayers


class DyadicContrast(LeftAtLayers):
    """`1/lambda sum_l d[e_l(z_l^+, a_l) - e_l(z_l^-, a_l)]/dtheta + dL/dtheta`, the drives from the means of the pairs.

    Both ends of the nudge's table are relaxed at once, at the distance between its strengths. `ebm.Dyadic` leaves the
    pairs z_l^+-.

    Source:
        Hoier, Staudt, Zach, ICML 2023; Hoier and Zach, ICML 2024 (arXiv 2402.08573).
    """

    name: ClassVar[str] = "dyadic"

    def phases(self, nudge: Nudge) -> tuple[Phase, ...]:
        strengths = [phase.strength.real for phase in table_of(nudge)]
        if not strengths:
            return ()
        span = max(strengths) - min(strengths)
        return (Phase(span, 1 / span),)
