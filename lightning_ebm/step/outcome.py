"""How the last step of a learner went, and what is said once of steps that did not end at an equilibrium."""

import logging
from collections.abc import Sequence

from torch import Tensor

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.step.divergence import Policy
from lightning_ebm.step.report import PhaseReport, Report, cut_off, report_of
from lightning_ebm.step.unsettled import Unsettled

log = logging.getLogger(__name__)

_UNSETTLED = {
    "max_steps": (
        "The states were still moving when max_steps was reached: after %d steps the force was up to %.2g of what it"
        " started with%s, and the update was read there. %s (Said once; the report tells it for every step.)"
    ),
    "stalled": (
        "The states stalled: after %d steps no step lowered the energy any more, with a force of up to %.2g of what it"
        " started with%s, and the update was read there. No kink is there to explain it, so this is no equilibrium:"
        " %s (Said once; the report tells it for every step.)"
    ),
}
"""What is said once of each status: the steps taken, the largest residual, what was left to gain if known, a remedy."""

_STAYED = (
    "The states have not moved: none of %d steps lowered the energy, so that layers whose errors come through states"
    " learn nothing from this batch. Slopes change within the smallest step that was tried, as behind norms of very"
    " small activations, or the loss is not finite beside the forward pass, as log(x) of a state at 0. Take a much"
    ' smaller nudge, a larger max_steps, the exact rule "zero-divergence", or states elsewhere, layers=[...]. (Said'
    " once; the report tells it for every step.)"
)
"""What is said in their place where no step was taken at all."""

_STALLED = "take a smaller nudge, double precision, or a larger tol."
"""The remedy of what stalled."""


def further(algorithm: Algorithm, nudged: bool = True) -> str:
    """What to do where states were still moving.

    Args:
        algorithm: by which.
        nudged: whether in a nudged phase.
    """
    if algorithm.rests_at_forward:
        return "Raise max_steps or tol, take a smaller nudge, or smaller steps if it has grown."
    weaker = "a smaller nudge, " if nudged else ""
    return (
        f"Raise max_steps or tol, or take {weaker}weaker feedback, energy=ebm.Hopfield(feedback=0.3), or fewer layers."
    )


class Outcome:
    """Keeps what a report is made of until somebody asks for it.

    Args:
        algorithm: of the learner.
        policy: what is done with batches that cannot relax.
        unsettled: looks at sweeps that were cut off, and has its own words for them.
    """

    def __init__(self, algorithm: Algorithm, policy: Policy, unsettled: Unsettled) -> None:
        self._algorithm = algorithm
        self._policy = policy
        self._unsettled = unsettled
        self._last: tuple[Sequence[str], Sequence[PhaseReport], Tensor, str] | None = None
        self._warned: set[str] = set()

    def report(self) -> Report:
        """In plain numbers.

        Raises:
            ConfigurationError: there has been no step.
        """
        if self._last is None:
            raise ConfigurationError("There is no report before the first backward() or gradients().")
        return report_of(self._algorithm, *self._last, self._policy.counts)

    def remember(self, names: Sequence[str], phases: Sequence[PhaseReport], loss: Tensor, runs_as: str) -> None:
        """A step is over; says it once when the states ended elsewhere than at an equilibrium."""
        self._last = (names, phases, loss, runs_as)
        for status, text in _UNSETTLED.items():
            explained = status == "max_steps" and self._unsettled.told is not None
            for phase in phases:
                if phase.status != status or status in self._warned or explained:
                    continue
                worst, left = phase.ended
                if status == "stalled" or cut_off(status, left):
                    self._warned.add(status)
                    self._warn(phase, text, worst, left)

    def _warn(self, phase: PhaseReport, text: str, worst: float, left: float | None) -> None:
        if phase.stayed(worst):
            log.warning(_STAYED, phase.steps)
            return
        share = "" if left is None else f", some {100 * left:.2g} % of the energy gained was still to gain"
        remedy = _STALLED if phase.status == "stalled" else further(self._algorithm, phase.nudge != 0)
        log.warning(text, phase.steps, worst, share, remedy)

    def gave_up(self, error: RelaxationDivergedError, loss: Tensor) -> None:
        """Counts a batch that cannot relax, and says so the first time."""
        self._policy.count()
        self._last = ([], [], loss, "plain")
        if "diverged" not in self._warned:
            self._warned.add("diverged")
            what = "is skipped" if self._policy.fallback is None else f"is taken by {self._policy.on_divergence!r}"
            log.warning("A batch that cannot relax %s: %s (Said once; the report counts them.)", what, error)
