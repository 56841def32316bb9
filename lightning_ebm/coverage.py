"""What is checked once of every program: that the energy reaches what backprop would train."""

import logging

from torch import Tensor

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.program.reduction import sums_over_batch
from lightning_ebm.program.wiring import reached_parameters
from lightning_ebm.recorded import Recorded
from lightning_ebm.setup import Setup

log = logging.getLogger(__name__)


def check_coverage(setup: Setup, recorded: Recorded, update: Tensor, batch_size: int) -> None:
    """Once for every program: each parameter that backprop would reach must be reached by the update.

    Raises:
        ConfigurationError: one would silently stay as it is.
    """
    known = recorded.known
    if known.covered:
        return
    if setup.loss_reduction == "mean" and batch_size > 1 and sums_over_batch(recorded.program, batch_size):
        log.warning(
            'The loss sums over the %d samples of the batch, while loss_reduction="mean": the nudge is then %d'
            ' times as strong as the algorithm says, and so is its bias. Say loss_reduction="sum", or take the'
            " mean. (Said once for every program of the module.)",
            batch_size,
            batch_size,
        )
    missing = known.plan.reached - reached_parameters(setup.module, update)
    if missing:
        raise ConfigurationError(
            f"Backprop would train {', '.join(sorted(missing))}, and no term of the energy"
            f" {setup.algorithm.energy!r} depends on them: they would silently stay as they are. An energy must"
            " depend on the drive or the prediction of every layer; change the energy, leave the layer out of"
            " layers=[...], or set requires_grad=False on what is meant to stay."
        )
    known.covered = True
