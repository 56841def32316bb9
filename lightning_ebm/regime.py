"""Where on the way from backprop to equilibrium an update is read.

A relaxation that has hardly begun has displaced every layer along backprop's error and nothing else (Song et al. 2020:
first arrival is exact at any nudge). One that has ended has moved the activities that the update is computed from. The
same rule, the same name, two different updates: this file says which of them a setting trains with.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_ebm import notebook
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies.base import is_quadratic
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.evaluations import Landscape
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

Reach = Literal["signal", "rounding", "none", "read-out"]

BACKPROP, EQUILIBRIUM, BETWEEN, SAME = "backprop's direction", "equilibrium", "in between", "both: they coincide"
NEITHER = "neither: a direction of its own"


@dataclass(frozen=True)
class LayerRegime:
    """One layer; g its update where the relaxation stopped, g* at equilibrium, b backprop's gradient, all parameters of
    the layer's drive as one vector.

    Attributes:
        name: of the state; "readout" for what lies between the last states and the loss.
        parameters: names of those in its drive.
        cosine_stop: of g and b.
        cosine_equilibrium: of g* and b.
        norm_ratio_stop: |g| / |b|.
        norm_ratio_equilibrium: |g*| / |b|.
        error_ratio: |e_l| / |e_l*|, how much of its equilibrium error the layer has built up; nan for the read-out.
        reach: "signal"; "none", the error is exactly zero, as nothing has arrived; "rounding", the state has moved by
            no more than its own rounding (4 eps |x_l|, over units that are not at 0), so that an optimizer that
            normalizes its steps, as Adam, trains this layer on noise; "read-out".
        way: from 0, backprop's direction, to 1, equilibrium's: `angle(g, b) / (angle(g, b) + angle(g, g*))`; nan where
            the two directions coincide within two degrees, or g is dead.
        detour: `angle(g, b) + angle(g, g*) - angle(b, g*)`, degrees: 0 where g is on the arc from one to the other. It
            need not: both ends may be backprop's (a tiny nudge), and what is read on the way be another direction.
    """

    name: str
    parameters: tuple[str, ...]
    cosine_stop: float
    cosine_equilibrium: float
    norm_ratio_stop: float
    norm_ratio_equilibrium: float
    error_ratio: float
    reach: Reach
    way: float
    detour: float

    @property
    def verdict(self) -> str:
        """`reach`, `detour` and `way` in words."""
        if self.reach == "none":
            return "no signal"
        if self.reach == "rounding":
            return "rounding noise"
        return NEITHER if self.detour > _DETOUR else in_words(self.way)


@dataclass(frozen=True)
class Regime:
    """The regime of one step.

    Attributes:
        relaxed: (F_0 - F_T) / (F_0 - F*), energies of the batch at the start, where the relaxation stopped, and at
            equilibrium, in the first nudged phase.
        layers: one a layer, from the input up, the read-out last.
        steps: taken before stopping.
        settled: whether the relaxation that stands for equilibrium converged (or is at a kink).
    """

    relaxed: float
    layers: tuple[LayerRegime, ...]
    steps: int
    settled: bool

    @property
    def way(self) -> float:
        """Mean of the layers' `way`, those without one left out."""
        found = [layer.way for layer in self.layers if not math.isnan(layer.way) and layer.reach in _ALIVE]
        return sum(found) / len(found) if found else math.nan

    @property
    def verdict(self) -> str:
        """`way` in words, unless most layers are on none."""
        alive = [layer for layer in self.layers if layer.reach in _ALIVE]
        astray = sum(layer.verdict == NEITHER for layer in alive)
        return NEITHER if astray > len(alive) / 2 else in_words(self.way)

    @property
    def unreached(self) -> tuple[str, ...]:
        """Layers that are trained on nothing, or on rounding noise."""
        return tuple(layer.name for layer in self.layers if layer.reach not in _ALIVE)

    def __str__(self) -> str:
        lines = [
            f"{self.verdict}: relaxed {self.relaxed:.3f} of the way down in {self.steps} steps",
            f"{'layer':<24} {'cos stop':>9} {'cos eq.':>9} {'|g|/|b|':>9} {'at eq.':>9} {'error':>7}  regime",
        ]
        for layer in self.layers:
            error = "" if math.isnan(layer.error_ratio) else f"{layer.error_ratio:.3f}"
            lines.append(
                f"{layer.name:<24} {layer.cosine_stop:>9.4f} {layer.cosine_equilibrium:>9.4f}"
                f" {layer.norm_ratio_stop:>9.3g} {layer.norm_ratio_equilibrium:>9.3g} {error:>7}  {layer.verdict}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        headers = ("layer", "cosine, stop", "at equilibrium", "|g| / |b|", "at equilibrium", "regime")
        rows = [
            (
                layer.name,
                *(f"{value:.4f}" for value in (layer.cosine_stop, layer.cosine_equilibrium)),
                *(f"{value:.3g}" for value in (layer.norm_ratio_stop, layer.norm_ratio_equilibrium)),
                layer.verdict,
            )
            for layer in self.layers
        ]
        return notebook.table(str(self).partition("\n")[0], headers, rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and words, for `json.dumps`; nan as None."""
        found = asdict(self) | {"way": self.way, "verdict": self.verdict, "unreached": list(self.unreached)}
        found["layers"] = [asdict(layer) | {"verdict": layer.verdict} for layer in self.layers]
        plain: dict[str, Any] = _without_nan(found)
        return plain


_ALIVE = ("signal", "read-out")
_DETOUR = 20.0
_UNKNOWN: Reach = "signal"


def in_words(way: float) -> str:
    """Below a quarter of the way, above three quarters, in between; nan is where backprop and equilibrium coincide."""
    if math.isnan(way):
        return SAME
    return BACKPROP if way < 0.25 else EQUILIBRIUM if way > 0.75 else BETWEEN


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

    Example:
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
            'The algorithm "backprop" relaxes nothing: its regime is backprop. Measure the algorithm you mean to train'
            " with."
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


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
