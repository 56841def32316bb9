"""What is checked once of every program: that the energy reaches what backprop would train."""

import logging

from torch import Tensor

from lightning_ebm.energies.base import is_divergence
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges.base import without_draw
from lightning_ebm.program.autograd_graph import reached_parameters
from lightning_ebm.program.batch_sums import factor_at_end, sums_over_batch
from lightning_ebm.program.module_walk import clean
from lightning_ebm.step.recorded import Recorded
from lightning_ebm.step.setup import Setup

log = logging.getLogger(__name__)


def check_coverage(setup: Setup, recorded: Recorded, update: Tensor, batch_size: int) -> None:
    """Once for every program: each parameter that backprop would reach must be reached by the update.

    Raises:
        ConfigurationError: one would silently stay as it is.
    """
    known = recorded.known
    if known.covered:
        return
    told = setup.programs.told
    mean = setup.loss_reduction == "mean" and batch_size > 1 and "sum" not in told
    if mean and sums_over_batch(recorded.program, batch_size):
        told.add("sum")
        log.warning(
            'The loss sums over the %d samples of the batch, while loss_reduction="mean": the nudge is then %d'
            ' times as strong as the algorithm says, and so is its bias. Say loss_reduction="sum", or take the'
            " mean. (Said once.)",
            batch_size,
            batch_size,
        )
    _say_how_weak(setup, recorded, batch_size)
    _say_how_scaled(setup, recorded, batch_size)
    _say_what_has_no_slope(setup, recorded)
    _say_how_rounded(setup, recorded)
    live = {clean(name) for name, p in setup.module.named_parameters() if p.requires_grad}  # also after the pass
    missing = (known.plan.reached & live) - reached_parameters(setup.module, update)
    if missing:
        raise ConfigurationError(
            f"Backprop would train {', '.join(sorted(missing))}, and no term of the energy"
            f" {setup.algorithm.energy!r} depends on them: they would silently stay as they are. An energy must"
            " depend on the drive or the prediction of every layer; change the energy, leave the layer out of"
            " layers=[...], or set requires_grad=False on what is meant to stay."
        )
    known.covered = True


def _say_what_has_no_slope(setup: Setup, recorded: Recorded) -> None:
    """Once: where states rest by feedback, gradients that are no slopes send them where no energy has a minimum."""
    if is_divergence(setup.algorithm.energy) or "slope" in setup.programs.told:
        return
    if (what := recorded.not_a_slope()) is not None:
        setup.programs.told.add("slope")
        log.warning(
            "Between layers stands %s, which is not the slope of what it computes. States settle where the forces that"
            " it gives vanish, which is no minimum of %r, and the update is a gradient of nothing. Take a rule that"
            ' only sends errors back through it, such as "zero-divergence" or "pc-nudge". (Said once.)',
            what,
            setup.algorithm.energy,
        )


def _say_how_rounded(setup: Setup, recorded: Recorded) -> None:
    """Once: equilibria by feedback are found, and told apart, to no more digits than passes have."""
    rounding = recorded.program.rounding
    if is_divergence(setup.algorithm.energy) or rounding < _COARSE or "rounded" in setup.programs.told:
        return
    setup.programs.told.add("rounded")
    log.warning(
        "The passes by which states of %r settle are computed in numbers of 16 bits, to %.1g: relaxations end where"
        " rounding hides the forces that are left, and an update, the difference of two such equilibria, may point"
        ' elsewhere. Take precision="32-true"; a relaxer of a given number of sweeps, such as ebm.FixedPoint(60), for'
        " both phases loses less. (Said once.)",
        setup.algorithm.energy,
        rounding,
    )


def _say_how_weak(setup: Setup, recorded: Recorded, batch_size: int) -> None:
    """Once: a finite nudge of a mean over many elements is nearly none."""
    nudge, elements, strength = setup.algorithm.nudge, recorded.known.elements, _strongest(setup)
    if elements is None or nudge.per == "element" or "weak" in setup.programs.told:
        return
    per_sample = elements / (batch_size if setup.loss_reduction == "mean" else 1)
    if strength >= _MEANT and strength / per_sample <= _FELT:
        setup.programs.told.add("weak")
        log.warning(
            "The loss is a mean over %d elements of each sample, so that each feels a nudge of %g / %d = %.1g: the"
            " update will point where backprop's does. If a sum over the elements is meant, as in 1/2 |y - o|^2, say"
            ' ebm.OneSided(%g, per="element"). (Said once.)',
            per_sample,
            strength,
            per_sample,
            strength / per_sample,
            strength / 2,
        )


def _say_how_scaled(setup: Setup, recorded: Recorded, batch_size: int) -> None:
    """Once: a factor that is not the loss's own makes a nudge as much stronger or weaker."""
    strength = _strongest(setup)
    if not strength or setup.samples.loss_scale is not None or "scale" in setup.programs.told:
        return
    factor = factor_at_end(recorded.program, batch_size)
    if strength * max(factor, 1.0) >= _MEANT and not 1 / _SCALED < factor < _SCALED:
        setup.programs.told.add("scale")
        log.warning(
            "The loss is multiplied by %g after all else, and so is the nudge: %g pulls as %g would. If the factor is"
            " not the loss's own, but 1/N of accumulation by hand or that of a GradScaler, say so by scale=%g, or by a"
            " function that gives it: gradients keep it, and the nudge is without. (Said once.)",
            factor,
            strength,
            strength * factor,
            factor,
        )


def _strongest(setup: Setup) -> float:
    """Of the nudges that states move under; 0 where they do not, as a finite nudge may be exact there."""
    if not setup.algorithm.relaxer.ends_in_states:
        return 0.0
    phases = setup.algorithm.rule.phases(without_draw(setup.algorithm.nudge))
    return max((abs(phase.strength) for phase in phases if not phase.held), default=0.0)


_SCALED = 2.5
"""A factor of two, up or down, is mostly the loss's own, as in half of a square."""
_MEANT = 0.1
"""A weaker nudge was chosen for backprop's direction; one as strong, to leave it."""
_FELT = 1 / 64
"""At which an element no longer leaves it: the update is off by a few times as much."""
_COARSE = 1e-4
"""The rounding of float16 is ten times as large, that of bfloat16 eighty times; that of float32 a thousandth."""
