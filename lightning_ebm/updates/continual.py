"""The contrast of phases in as many parts as the nudged phase has steps."""

from collections.abc import Sequence
from typing import ClassVar

from lightning_ebm.energies import Energy
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges import Nudge
from lightning_ebm.relaxers import Relaxer
from lightning_ebm.relaxers.base import check_single_steps
from lightning_ebm.updates.base import End
from lightning_ebm.updates.contrast import Contrast
from lightning_ebm.updates.incremental import pulls_once


class Continual(Contrast):
    """`1/beta [dE_beta/dtheta(x_t+1) - dE_beta/dtheta(x_t)]` after each step t, an optimizer step with each.

    The nudged phase begins at the free state x_0, where E without the nudge counts, so that at parameters that stay the
    parts sum to the contrast of phases, [dE_beta/dtheta(x_T) - dE_0/dtheta(x_0)] / beta, which is equilibrium
    propagation's. Parameters move with every part: the rule is local in time, and the sum is that of EP up to the
    learning rate. Where parameters must stay (`Learner.backward`), it is the contrast itself.

    The nudge is `OneSided`, and the relaxer takes a number of single steps: `FixedPoint(n, order="synchronous")` or
    `GradientDescent`. The relaxer of the presets for equilibrium propagation does not.

    The trap: an optimizer that rescales its steps, such as Adam, makes full steps of small parts; take `SGD`.

    Source:
        Ernoult et al. 2020, continual equilibrium propagation (arXiv 2005.04168).
    """

    name: ClassVar[str] = "continual"
    incremental: ClassVar[bool] = True
    needs_forward_pass: ClassVar[bool] = True
    reads_held_output: ClassVar[bool] = False

    def check(self, energy: Energy, nudge: Nudge, relaxer: Relaxer) -> None:
        super().check(energy, nudge, relaxer)
        if not (pulls_once(nudge) and relaxer.steps_one_by_one):
            raise ConfigurationError(
                'update="continual" moves parameters with every step of one nudged phase: it needs an ebm.OneSided(...)'
                ' nudge and a relaxer that takes a number of steps, ebm.FixedPoint(max_steps, order="synchronous") or'
                " ebm.GradientDescent(lr, max_steps)."
            )
        check_single_steps(relaxer)

    def part(self, before: End, after: End) -> Sequence[End]:
        weight = after.weight
        start = before.phase._replace(weight=-weight, strength=before.strength if before.found.steps else 0.0)
        return [after, before._replace(phase=start)]
