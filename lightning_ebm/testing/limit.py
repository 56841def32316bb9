"""Whether an update tends to the true gradient, and how fast."""

import math
from typing import Any

from torch import Tensor

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import has_best_response, is_divergence
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.learner import Learner
from lightning_ebm.metrics import alignment
from lightning_ebm.network.network import Network
from lightning_ebm.nudges import Nudge, OneSided, Phase
from lightning_ebm.nudges.base import table_of, without_draw
from lightning_ebm.presets import algorithm as preset
from lightning_ebm.reference import Settled, backprop, equilibrium
from lightning_ebm.relaxers import FixedPoint, Relaxer
from lightning_ebm.testing.problem import Problem
from lightning_ebm.testing.response import check_response
from lightning_ebm.updates.base import label

_EXACT = 1e-9
"""Relative error below which there is none."""

_ROOM = 0.2
"""By how much a slope may fall short of its order."""


def check_limit(energy_or_algorithm: Energy | str | Algorithm) -> dict[str, float]:
    """Proves the theorem that the library rests on: with a vanishing nudge the update becomes the true gradient.

    On a tanh network 4-6-5-3 in float64 the nudge is halved twice, every phase being relaxed to rounding. The relative
    error of each layer's update must fall as `lambda^k`: k = 1 for one-sided tables, 2 for centered ones, in general
    one less than the first power k + 1 >= 2 with `sum_p weight_p strength_p^(k+1) != 0`. The true gradient is
    backprop's for divergence energies, whose free equilibrium is the forward pass; for others it is that of the loss at
    the free equilibrium, by implicit differentiation.

    Relaxers that end in states are replaced by sweeps (or descent, of energies without a best response) to 1e-13: what
    is proved is proved of energy, nudge and update. Others are taken as they are.

    Args:
        energy_or_algorithm: an energy, under a one-sided nudge; or an algorithm, whose nudge is scaled to a largest
            strength of 0.01 (of 0.2 where the order is above 2) and less.

    Returns:
        The slope of log error over log lambda, by layer, "readout" being what lies between the last state and the loss;
            infinite where the update is exact at a finite nudge.

    Raises:
        AssertionError: a slope falls short of its order by more than 0.2; names the layer and its errors. Or a best
            response, which the phases iterate, is not that of the energy.
        ConfigurationError: an incremental update, which moves parameters between the steps of its own relaxer.

    Source:
        Millidge et al., ICLR 2023 (arXiv 2206.02629); Scellier and Bengio 2017; Laborieux et al. 2021 (centered).

    Examples:
        >>> from lightning_ebm.energies import PredictiveCoding
        >>> {name: round(slope, 1) for name, slope in check_limit(PredictiveCoding()).items()}
        {'1': 1.0, '3': 1.0, 'readout': 1.0}
    """
    given = energy_or_algorithm
    chosen = Algorithm(given, OneSided(1.0), _settled(given)) if isinstance(given, Energy) else preset(given)
    if chosen.rule.incremental:
        raise ConfigurationError(
            f"check_limit: update={label(chosen.rule)!r} moves parameters between the steps of its own relaxer, so that"
            ' there is no limit in the nudge alone. With update="contrast" it is what it is where parameters stay.'
        )
    nudge = without_draw(chosen.nudge)
    order = 1 if nudge.linear_response else _order(nudge)
    strength = 0.01 if order <= 2 else 0.2
    problem = Problem()
    if chosen.rule.relaxes:
        check_response(_network(problem, _at(chosen, nudge, strength)), problem)
    true = backprop(problem.module, problem.loss)
    if not is_divergence(chosen.energy) and chosen.rule.relaxes:
        true = equilibrium(problem.module, problem.loss, chosen)
    found = [_by_layer(problem, _at(chosen, nudge, strength / 2**halvings), true) for halvings in range(3)]
    slopes = {}
    for layer in found[0]:
        errors = [one[layer] for one in found]
        slopes[layer] = math.inf if max(errors) < _EXACT else math.log2(errors[0] / errors[-1]) / 2
        assert slopes[layer] > order - _ROOM, (
            f"The update of layer {layer!r} is off the true gradient by {', '.join(f'{e:.2g}' for e in errors)} at"
            f" nudges of {strength:g}, a half and a quarter of that: it falls with a slope of {slopes[layer]:.2f},"
            f" where {order} is to be expected. Either an energy's promise is false (divergence, best_response), or"
            " what is read is not the gradient of the loss in any limit."
        )
    return slopes


def _network(problem: Problem, algorithm: Algorithm) -> Network:
    step = Learner(problem.module, algorithm, capture=False).begin(problem.loss, teaches=False)
    with step.first_pass():
        loss = problem.loss()
    step.surrogate(loss)
    assert step.network is not None
    return step.network


class _Scaled(Nudge):
    """A nudge with other strengths, and weights to match."""

    def __init__(self, nudge: Nudge, factor: float) -> None:
        self._nudge = nudge
        self._factor = factor

    def phases(self) -> tuple[Phase, ...]:
        return tuple(
            Phase(phase.strength * self._factor, phase.weight / self._factor, phase.held)
            for phase in table_of(self._nudge)
        )

    def held_output(self, free: Tensor, loss_slope: Tensor, strength: float, batch: Any) -> Tensor:
        return self._nudge.held_output(free, loss_slope, strength, batch)


def _order(nudge: Nudge) -> int:
    """The power of the nudge with which the error of a table's slope begins."""
    table = table_of(nudge)
    size = max(abs(phase.strength) for phase in table)
    for power in range(2, 2 + 2 * len(table)):
        moment = sum((phase.weight * phase.strength**power).real for phase in table)
        if abs(moment) > 1e-6 * size ** (power - 1):
            return power - 1
    return 2 * len(table)


def _settled(energy: Energy, analytic: bool = False) -> Relaxer:
    return FixedPoint(2000, tol=1e-13) if analytic and has_best_response(energy) else Settled(energy)


def _at(algorithm: Algorithm, nudge: Nudge, strength: float) -> Algorithm:
    """The algorithm at a strength, relaxed to rounding."""
    if not nudge.linear_response:
        nudge = _Scaled(nudge, strength / max(abs(phase.strength) for phase in table_of(nudge)))
    settled = _settled(algorithm.energy, nudge.complex_states)
    relaxer = settled if algorithm.relaxer.ends_in_states else algorithm.relaxer
    return Algorithm(algorithm.energy, nudge, relaxer, settled, algorithm.update, algorithm.initial_state)


def _by_layer(problem: Problem, algorithm: Algorithm, true: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of the parameters of each layer."""
    learner = Learner(problem.module, algorithm)
    found = learner.gradients(problem.loss)
    plan = learner.plan
    assert plan is not None or not algorithm.rule.relaxes
    if plan is None:
        return {"readout": alignment(found, true)["relative_error"]}
    layers = {str(row.key): row.parameters for row in plan.rows}
    if plan.loss_parameters:
        layers["readout"] = plan.loss_parameters
    return {
        layer: alignment({p: found[p] for p in names}, {p: true[p] for p in names})["relative_error"]
        for layer, names in layers.items()
    }
