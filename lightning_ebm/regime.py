"""Where on the way from backprop to equilibrium an update is read.

A relaxation that has hardly begun has displaced every layer along backprop's error and nothing else (Song et al. 2020:
first arrival is exact at any nudge). One that has ended has moved the activities that the update is computed from. The
same rule, the same name, two different updates: this file says which of them a setting trains with.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies.base import is_quadratic
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.evaluations import Landscape
from lightning_ebm.instruments.verdict import (
    BACKPROP,
    BETWEEN,
    EQUILIBRIUM,
    NEITHER,
    SAME,
    LayerRegime,
    Reach,
    Regime,
    effective_steps,
)
from lightning_ebm.learner import Learner
from lightning_ebm.metrics import moments, read
from lightning_ebm.nudges.base import without_draw
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.layers import Output
from lightning_ebm.purity import untouched
from lightning_ebm.reference import Settled
from lightning_ebm.relaxers import Relaxation, Relaxer
from lightning_ebm.relaxers.descend import descend
from lightning_ebm.step.closure import Closure
from lightning_ebm.step.step import Step
from lightning_ebm.updates.base import label

__all__ = [
    "BACKPROP", "BETWEEN", "EQUILIBRIUM", "NEITHER", "SAME", "LayerRegime", "Onward", "Regime", "effective_steps", "of",
    "of_step",
]  # fmt: skip

_UNKNOWN: Reach = "signal"


def of(
    module: nn.Module,
    closure: Closure,
    algorithm: str | Algorithm,
    *,
    layers: Layers = None,
    output: Output = "auto",
    loss_reduction: Literal["mean", "sum"] = "mean",
    equilibrium: Relaxer | None = None,
) -> Regime:
    """The regime that an algorithm would train in, measured on one batch. Leaves no trace.

    Args:
        module: the user's module, at the weights of interest: regimes change while training.
        closure: returns the loss of the batch.
        algorithm: a preset's name or an `Algorithm`.
        layers: as in `Learner`.
        output: as in `Learner`.
        loss_reduction: as in `Learner`.
        equilibrium: what finds the equilibrium to compare with; None goes on from where the algorithm stopped.

    Raises:
        ConfigurationError: the control, "backprop", which relaxes nothing; incremental updates and holomorphic nudges.
        RelaxationDivergedError: there is no equilibrium to be found from here.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> x, y = torch.linspace(-1, 1, 20).reshape(5, 4), torch.ones(5, 1)
        >>> of(net, lambda: (net(x) - y).square().mean(), "error-pc").relaxed < 0.9
        True
    """
    learner = Learner(module, algorithm, layers=layers, output=output, loss_reduction=loss_reduction)
    with untouched(module), torch.enable_grad():
        step = learner.begin(closure)
        if learner.algorithm.rule.relaxes:
            step.examine()
        return of_step(step, learner.algorithm, equilibrium)


def of_step(step: Step, algorithm: Algorithm, equilibrium: Relaxer | None = None) -> Regime:
    """The regime of a training step, while its batch is still there; see `of`."""
    plan = step.plan
    if plan is None:
        raise ConfigurationError(
            'The algorithm "backprop" relaxes nothing: its regime is backprop. Measure the one you mean to train with.'
        )
    if not _measurable(algorithm):
        raise ConfigurationError(
            f"The regime of update={label(algorithm.rule)!r} under {algorithm.nudge!r} is not defined: its parameters"
            " move with the states, or its states are complex. Measure the same energy and relaxer with"
            ' ebm.OneSided(...) and update="auto".'
        )
    # Looking on must not draw the training's next sign.
    algorithm = dataclasses.replace(algorithm, nudge=without_draw(algorithm.nudge))
    true = step.true_gradients()
    stopped, at_stop = step.again(algorithm)
    assert at_stop.network is not None
    ends = {
        end.strength.real: at_stop.network.errors_at(end.found)
        for end in at_stop.phases
        if end.found.local_error is None
    }
    settled, at_equilibrium = step.again(_relaxed_further(algorithm, equilibrium, ends))
    assert at_equilibrium.network is not None
    found, long = _nudged(at_stop), _nudged(at_equilibrium)
    layers = []
    for k, row in enumerate(plan.rows):
        ratio, reach = math.nan, _UNKNOWN
        if found is not None and long is not None:
            error = at_stop.network.errors_at(found)[k]
            ratio = _ratio(error, at_equilibrium.network.errors_at(long)[k])
            reach = _reach(error, found, k, at_stop.network.free[k])
        layers.append(_layer(str(row.key), row.parameters, stopped, settled, true, ratio, reach))
    if plan.loss_parameters:
        layers.append(_layer("readout", plan.loss_parameters, stopped, settled, true, math.nan, "read-out"))
    regime = Regime(
        relaxed=math.nan if found is None or long is None else _relaxed(found, long),
        layers=tuple(layers),
        steps=0 if found is None else found.steps,
        settled=long is None or long.status in ("converged", "kink"),
        effective_steps=None if found is None else _effective_steps(found),
    )
    at_stop.release()
    at_equilibrium.release()
    return regime


def _measurable(algorithm: Algorithm) -> bool:
    return not algorithm.rule.incremental and not algorithm.nudge.complex_states


class Onward(Relaxer):
    """Descent on the errors from where another relaxation stopped, until nothing moves.

    From there and not from the start: at kinks and far from linear there are several equilibria, and the one to compare
    with is the one that the relaxation was on its way to. The energy never rises, so no relaxed fraction exceeds 1.

    Args:
        ends: errors at the end of the phase of each strength; phases without start from zero.
    """

    needs_error_coordinates: ClassVar[bool] = True

    def __init__(self, ends: Mapping[float, list[Tensor]]) -> None:
        self.ends = ends

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        errors = self.ends.get(strength, list(landscape.no_errors))
        return descend(landscape, "errors", errors, strength, lr=0.1, max_steps=1000, tol=1e-6, longest=1.0)


def _relaxed_further(
    algorithm: Algorithm, equilibrium: Relaxer | None, ends: Mapping[float, list[Tensor]]
) -> Algorithm:
    """The same energy and nudge, relaxed until nothing moves."""
    settled = Settled(algorithm.energy)
    if equilibrium is None:
        moved_freely = not (algorithm.nudge.needs_output_state or algorithm.nudge.linear_response)
        free = is_quadratic(algorithm.energy) and moved_freely
        equilibrium = Onward(ends) if free else settled
    return Algorithm(algorithm.energy, algorithm.nudge, equilibrium, settled, initial_state=algorithm.initial_state)


def _nudged(step: Step) -> Relaxation | None:
    """The end of the first phase but the free one; None where the nudge is infinitesimal and moves nothing."""
    return next((end.found for end in step.phases if end.weight.real > 0), None)


def _relaxed(stopped: Relaxation, settled: Relaxation) -> float:
    if stopped.local_error is not None or stopped.dyadic_states is not None:
        return math.nan  # what is read is no state on its way down the energy
    start, end, lowest = (float(e.real) for e in (stopped.energies[0], stopped.energies[-1], settled.energies[-1]))
    return (start - end) / (start - lowest) if start != lowest else math.nan


def _effective_steps(found: Relaxation) -> int | None:
    told = [float(energy.real) for energy in found.energies]
    return effective_steps(told) if len(told) == found.steps + 1 else None


def _reach(error: Tensor, found: Relaxation, layer: int, free: Tensor) -> Reach:
    if not bool(error.any()):
        return "none"
    if found.coordinates == "states":
        # Around 0 a float holds any error; what silent ReLU units hold there moves no weight, and is no signal.
        active = free != 0
        moved = (found.point[layer] - free)[active].double().norm()
        if bool(moved <= 4 * torch.finfo(free.dtype).eps * free[active].double().norm()) and bool(active.any()):
            return "rounding"
    return "signal"


def _ratio(error: Tensor, settled: Tensor) -> float:
    whole = float(settled.double().norm())
    return float(error.double().norm()) / whole if whole else math.nan


def _layer(
    name: str,
    parameters: Sequence[str],
    stopped: dict[str, Tensor],
    settled: dict[str, Tensor],
    true: dict[str, Tensor],
    error_ratio: float,
    reach: Reach,
) -> LayerRegime:
    g, settled_g, b = (
        {name: found[name] for name in parameters if name in found} for found in (stopped, settled, true)
    )
    if not (g or settled_g or b):
        return LayerRegime(name, (), 1.0, 1.0, 1.0, 1.0, error_ratio, reach, math.nan, 0.0)
    stop, at_equilibrium, between = (_angles(*pair) for pair in ((g, b), (settled_g, b), (g, settled_g)))
    dead = stop["norm_ratio"] == 0
    coincide = at_equilibrium["angle"] < 2 and stop["angle"] < 2
    whole = stop["angle"] + between["angle"]
    return LayerRegime(
        name,
        tuple(parameters),
        stop["cosine"],
        at_equilibrium["cosine"],
        stop["norm_ratio"],
        at_equilibrium["norm_ratio"],
        error_ratio,
        reach,
        math.nan if dead or coincide or not whole else stop["angle"] / whole,
        0.0 if dead else whole - at_equilibrium["angle"],
    )


def _angles(estimate: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    found = read(torch.stack(list(moments(estimate, reference).values())).sum(0))
    return {
        "cosine": float(found["cosine"]),
        "angle": float(found["angle_deg"]),
        "norm_ratio": float(found["norm_ratio"]),
    }
