"""Descent whose step sizes, precisions and nudge change from layer to layer and from step to step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import Forces, Landscape
from lightning_ebm.evaluations.base import Evaluation
from lightning_ebm.evaluations.slope import Slope
from lightning_ebm.evaluations.with_precisions import WithPrecisions
from lightning_ebm.relaxers.base import Relaxation, Relaxer, force_norm

LayerSchedule = Callable[[int, int, int], float]
"""From the step t = 0, 1, ..., the depth l = 1, 2, ... of a layer, and the depth of the deepest."""

Schedule = Callable[[int], float]
"""From the step t."""


@dataclass(frozen=True)
class ScheduledDescent(Relaxer):
    """x_l <- x_l - lr_l(t) dE_t/dx_l with E_t = sum_l c_l(t) e_l + lambda n(t) L, for t = 0 .. max_steps - 1.

    Settings are numbers, or functions: lr and the factor c of a layer's energy (of its precision, in predictive coding)
    of step, depth and the depth of the deepest, ``precision=lambda step, depth, deepest: ...``; the share n of the
    nudge of the step, ``nudge=lambda step: min(1.0, (step + 1) / 10)``. `spiking` and `decaying`, of
    ``lightning_ebm.relaxers``, are for precisions.

    The update is read where the states end, under the energy itself: what a schedule did on the way leads elsewhere,
    and counts no further. With numbers of 1 it is `GradientDescent`.

    The trap: a step is stable below 2 over the largest curvature of E_t, which grows with c; a force that has grown to
    ten times the first at the end is an error.

    Args:
        max_steps: how many steps.
        lr: step sizes.
        precision: factors c > 0 of layers' energies.
        nudge: shares n of the strength.

    Raises:
        ConfigurationError: an argument of the wrong kind; (in use) a schedule that gives no positive number.
        RelaxationDivergedError: (in use) states ran away.
    """

    max_steps: int = 20
    lr: float | LayerSchedule = 0.1
    precision: float | LayerSchedule = 1.0
    nudge: float | Schedule = 1.0

    def __post_init__(self) -> None:
        checked.keep(self, max_steps=checked.count(self, "max_steps", self.max_steps))
        three = "a positive number, or a function of step, depth and the depth of the deepest layer that gives one"
        self._check("lr", three, (0, 1, 1))
        self._check("precision", three, (0, 1, 1))
        self._check("nudge", "a number, or a function of the step that gives one", (0,))

    def _check(self, name: str, wanted: str, at: tuple[int, ...]) -> None:
        """Keeps a number as a float, and tries a function out."""
        value: Any = getattr(self, name)
        if not callable(value) or isinstance(value, type):
            above = -math.inf if name == "nudge" else 0.0
            checked.keep(self, **{name: checked.number(self, name, value, wanted, above=above)})
            return
        try:
            found = value(*at)
        except TypeError:
            checked.refuse(self, name, value, wanted)
        self._number(name, found)

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        deepest = max(landscape.depths)
        point, energies = list(start), []
        first = force_norm(landscape, landscape.evaluate(Forces(), point, strength).gradients)
        for step in range(self.max_steps):
            rates, factors = (
                [self._of(name, step, depth, deepest) for depth in landscape.depths] for name in ("lr", "precision")
            )
            share = self.nudge(step) if callable(self.nudge) else self.nudge
            what: Evaluation[Slope] = Forces()
            if any(factor != 1 for factor in factors):
                what = WithPrecisions(what, tuple(factors))
            slope = landscape.evaluate(what, point, strength * self._number("nudge", share))
            energies.append(slope.total(strength))
            ahead = [x.sub(g, alpha=lr) for x, g, lr in zip(point, slope.gradients, rates, strict=True)]
            point = landscape.feasible(ahead)
        slope = landscape.evaluate(Forces(), point, strength)
        energies.append(slope.total(strength))
        norm = force_norm(landscape, slope.gradients)
        residual = norm / first.clamp_min(torch.finfo(first.dtype).tiny)
        growth = float(norm.norm() / first.norm().clamp_min(torch.finfo(first.dtype).tiny))
        if not (growth <= 10 or float(norm.norm()) <= landscape.rounding):  # nan is neither
            raise RelaxationDivergedError(
                f"ScheduledDescent ran away at nudge {strength:g}: after {self.max_steps} steps the force has grown to"
                f" {growth:.3g} times its start. A step is stable below 2 over the largest curvature, which grows with"
                " the factors of precisions: take smaller steps, where precisions are large above all."
            )
        return Relaxation(point, "states", "fixed", self.max_steps, residual, energies)

    def _of(self, name: str, step: int, depth: int, deepest: int) -> float:
        value: Any = getattr(self, name)
        return self._number(name, value(step, depth, deepest)) if callable(value) else float(value)

    def _number(self, name: str, value: Any) -> float:
        wanted = "a schedule that gives finite numbers, positive ones for step sizes and precisions"
        least = 0.0 if name != "nudge" else -math.inf
        found = checked.number(self, name, value, wanted, least=least)
        if name == "precision" and not found:
            checked.refuse(self, name, value, wanted)
        return found


def spiking(height: float, held: bool = False) -> LayerSchedule:
    """A precision of `height` at the first step at which a layer has an error to be weighed, else 1.

    A signal from the loss moves the deepest layer at the step 0, and a layer k below it at the step k; its error is
    there one step later. At height = 1 / lr the error of a layer goes on whole: what first moves a layer is -lr lambda
    dL/dx_l, as far as at the deepest one, where steps without spikes have lost a factor of lr at each.

    Args:
        height: of the spike.
        held: whether the deepest state is held at a target, so that its error is there at the step 0.
    """

    def schedule(step: int, depth: int, deepest: int) -> float:
        return height if step == deepest - depth + (not held) else 1.0

    return schedule


def decaying(height: float, rate: float) -> LayerSchedule:
    """A precision of 1 + (height - 1) exp(-rate t): large at first, 1 in the end."""

    def schedule(step: int, depth: int, deepest: int) -> float:
        return 1 + (height - 1) * math.exp(-rate * step)

    return schedule
