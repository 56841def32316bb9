"""Steps in which states and parameters move at once."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.relaxers import Relaxation, Relaxer
from lightning_ebm.relaxers.base import force_norm
from lightning_ebm.step.phases import Phases
from lightning_ebm.updates import End


def increments(phases: Phases, algorithm: Algorithm) -> Iterator[Sequence[End]]:
    """What is read with each single step of the relaxer; parameters may move before the next is asked for.

    The next states follow from the forces at the parameters of before: both move from one gradient.
    """
    network, relaxer, rule = phases.network, algorithm.relaxer, algorithm.rule
    network.questions.answered()
    landscape = relaxer.around(phases.landscape)
    nudged = next(phase for phase in rule.phases(algorithm.nudge) if phase.is_nudged)
    strength = nudged.strength.real
    point = list(network.equilibrium)
    move = relaxer.stepper(point)
    energies: list[Tensor] = []
    norms: list[Tensor] = []
    for taken in range(relaxer.steps_one_by_one):
        with torch.no_grad():
            slope = landscape.evaluate(relaxer.steps_by, point, strength)
            following = landscape.feasible(move(point, slope.gradients))
        energies.append(slope.total(strength))
        norms.append(force_norm(network, slope.gradients))
        sizes = torch.stack([norms[-1].norm(), norms[0].norm()])
        now, first = network.questions.ask(sizes)
        _check_bounded(relaxer, now, first, taken)
        residual = norms[-1] / norms[0].clamp_min(torch.finfo(norms[0].dtype).tiny)
        ends = [
            End(nudged, Relaxation(states, "states", "fixed", steps, residual, energies))
            for steps, states in ((taken, point), (taken + 1, following))
        ]
        yield rule.part(*ends)
        network.parameters_moved()
        point = following


def _check_bounded(relaxer: Relaxer, now: float, first: float, taken: int) -> None:
    if not math.isfinite(now) or now > 1e3 * first:
        raise RelaxationDivergedError(
            f"{relaxer!r} ran away at step {taken + 1} of an incremental update: the force grew to"
            f" {now / first if first else math.inf:.3g} times its start. States and weights move at once"
            " here; take a smaller step for either."
        )
