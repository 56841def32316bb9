"""An update before every single step of the relaxer."""

from collections.abc import Sequence
from typing import ClassVar

from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import is_divergence
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges import Nudge
from lightning_ebm.nudges.base import table_of, without_draw
from lightning_ebm.relaxers import Relaxer
from lightning_ebm.relaxers.base import check_single_steps
from lightning_ebm.updates.base import End
from lightning_ebm.updates.contrast import Contrast


class Incremental(Contrast):
    """`1/lambda dE/dtheta(x_t)` before each step t of the relaxer, an optimizer step with each.

    States and parameters move at once, from the gradient of one energy: incremental expectation maximization, with no
    claim to be backprop's direction. Where parameters must stay (`Learner.backward`), it is the contrast of phases.

    Source:
        Salvatori et al., ICLR 2024 (arXiv 2212.00720).
    """

    name: ClassVar[str] = "incremental"
    incremental: ClassVar[bool] = True
    needs_forward_pass: ClassVar[bool] = True
    reads_held_output: ClassVar[bool] = False

    def check(self, energy: Energy, nudge: Nudge, relaxer: Relaxer) -> None:
        super().check(energy, nudge, relaxer)
        if not (is_divergence(energy) and pulls_once(nudge) and relaxer.steps_one_by_one):
            raise ConfigurationError(
                'update="incremental" moves parameters with every step of one nudged phase: it needs a divergence'
                " energy such as ebm.PredictiveCoding(), an ebm.OneSided(...) nudge and a relaxer with a number of"
                " steps, ebm.GradientDescent(lr, max_steps) or ebm.StateOptimizer(..., max_steps=...)."
            )
        check_single_steps(relaxer)

    def part(self, before: End, after: End) -> Sequence[End]:
        return [before]


def pulls_once(nudge: Nudge) -> bool:
    """Whether there is one nudged phase, at a real strength, in which the output is free."""
    nudged = [phase for phase in table_of(without_draw(nudge)) if phase.is_nudged]
    return len(nudged) == 1 and not nudged[0].held and not nudged[0].is_complex
