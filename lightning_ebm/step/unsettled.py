"""Whether sweeps that were cut off would have settled, found out by taking more of them."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import Evaluation, Landscape
from lightning_ebm.relaxers import Relaxation, Relaxer

log = logging.getLogger(__name__)

_WINDOW = 40
"""Sweeps between the two stretches that are compared."""

_STRETCH = 10
"""Sweeps whose lengths are averaged, as a cycle may be as long."""

_SETTLING = 0.97
"""A stretch shorter than this share of the one before settles, if slowly: at 0.9992 a sweep."""

_GROWING = 1.5
"""A stretch longer than this multiple of the one before is no cycle."""


class Motion(NamedTuple):
    """How further plain sweeps move what did not settle.

    Attributes:
        restless: which samples move as far as before, ``(B,)``.
        growth: by what factor their movement grows with each sweep, the median over them; 1 is a cycle.
        layer: the one that moves furthest for its size.
        sweeps: how many were taken.
    """

    restless: Tensor
    growth: float
    layer: str
    sweeps: int


def motion(landscape: Landscape, sweep: Evaluation[list[Tensor]], point: Sequence[Tensor], strength: float) -> Motion:
    """Two windows of sweeps from `point`; a sample is restless if it is in both, or runs away.

    A chain under a linear network has H = I - W, and its sweep in turns, which is Gauss and Seidel's, brings states
    nearer if and only if H is positive definite. Where it is not, the movement grows by the sweep's largest eigenvalue,
    whatever number of steps is allowed.

    Args:
        landscape: whose energy.
        sweep: of the relaxer, one step.
        point: where the relaxation was cut off, in states.
        strength: lambda.
    """
    states, taken = list(point), 0
    restless = torch.ones(landscape.batch_size, dtype=torch.bool, device=point[0].device)
    for _ in range(2):
        lengths, bound = [], torch.inf
        for _ in range(_WINDOW + 2 * _STRETCH):
            before, states = states, landscape.evaluate(sweep, states, strength)
            taken += 1
            moved = [y - x for x, y in zip(before, states, strict=True)]
            lengths.append(landscape.norms(moved))
            longest = float(lengths[-1].max())
            bound = min(bound, 1e6 * max(longest, 1.0))
            if not longest <= bound:  # nan is not
                break
        run = torch.stack(lengths)
        apart = len(run) - 2 * _STRETCH  # sweeps between the two stretches
        early, late = run[_STRETCH : 2 * _STRETCH].mean(0), run[-_STRETCH:].mean(0)
        if apart <= 0:  # it ran away before there were two
            apart, early, late = max(len(run) - 1, 1), run[0], run[-1]
        sizes = landscape.norms(states)
        rounding = 4 * max(landscape.rounding, torch.finfo(sizes.dtype).eps) * sizes
        restless = restless & ~((late <= _SETTLING * early) | (late <= rounding))
        if len(lengths) < _WINDOW + 2 * _STRETCH or not bool(restless.any()):
            break
    ratio = (late / early)[restless].nan_to_num(torch.inf, torch.inf)
    growth = float(ratio.median()) ** (1 / apart) if len(ratio) else 0.0
    shares = [float(step.norm() / state.norm().clamp_min(1e-30)) for step, state in zip(moved, states, strict=True)]
    worst = max(range(len(shares)), key=lambda k: shares[k] if shares[k] == shares[k] else torch.inf)
    return Motion(restless, growth, landscape.names[worst], taken)


class Unsettled:
    """Looks at sweeps that were cut off: the first time, the second, the fourth, the eighth.

    Attributes:
        told: what was said of the last; None where nothing was to be said.
    """

    def __init__(self) -> None:
        self.told: str | None = None
        self._times = 0
        self._apart: Unsettled | None = None

    @property
    def apart(self) -> "Unsettled":
        """For steps that are not taken, which have no say in when those that are taken are looked at."""
        self._apart = self._apart or Unsettled()
        return self._apart

    def look(
        self, landscape: Landscape, relaxer: Relaxer, found: Relaxation, strength: float, operations: Sequence[str]
    ) -> None:
        """Says so where more steps would not help.

        Args:
            landscape: whose energy.
            relaxer: that was cut off.
            found: where.
            strength: lambda.
            operations: of the recorded program, by their names.

        Raises:
            RelaxationDivergedError: the sweeps were to settle, and most samples of the batch have no equilibrium that
                they could reach.
        """
        sweep = relaxer.plain_sweep(landscape)
        if found.status != "max_steps" or sweep is None or found.coordinates != "states":
            return
        if self.told is not None and not relaxer.tol:  # it has been said, and no run is ended for it
            return
        self._times += 1
        if self._times & (self._times - 1):
            return
        seen = motion(landscape, sweep, found.point, strength)
        count = int(seen.restless.sum())
        if not count:
            return
        self.told = described(type(relaxer).__name__, found.steps, strength, seen, operations)
        if relaxer.tol and 2 * count > len(seen.restless):  # who asks for a number of sweeps is given them
            raise RelaxationDivergedError(self.told)
        log.warning("%s", self.told)


def described(relaxer: str, steps: int, strength: float, seen: Motion, operations: Sequence[str]) -> str:
    """What was seen, why, and the remedy."""
    count, whole = int(seen.restless.sum()), len(seen.restless)
    growing = seen.growth ** (_WINDOW) > _GROWING
    how = f"{seen.growth:.3g} times as far with every sweep" if growing else "as far with every sweep as before"
    text = (
        f"{relaxer} finds no equilibrium at nudge {strength:g}: after {steps} steps and {seen.sweeps} more, {count} of"
        f" {whole} samples still move, {how}, layer {seen.layer!r} most. More steps do not help, and an update read"
        " here is noise."
    )
    softmax = any("softmax" in name or "attention" in name for name in operations)
    maximum = any("max_pool" in name for name in operations)
    weaker = "a smaller nudge, " if strength else ""
    if softmax:
        text += (
            " The network has softmax attention, whose drives are no linear function of the states, so that states and"
            ' feedback chase each other. Take "predictive-coding" or "pc-nudge", whose free equilibrium is the forward'
            " pass of any network."
        )
    elif growing:
        text += (
            " The gain of the feedback loop is above 1, and no activation bounds it: the energy has no minimum. Take"
            f" {weaker}bounded activations (nn.Tanh, nn.Hardtanh(0, 1)), smaller weights, weaker feedback,"
            ' energy=ebm.Hopfield(feedback=0.1), or "predictive-coding", whose free equilibrium is the forward pass.'
        )
    elif maximum:
        text += (
            " The network has maximum pooling, which sends the feedback to another unit whenever its largest input"
            f" changes. Take {weaker}average pooling, ebm.FixedPoint(..., damping=0.5), or"
            ' "predictive-coding", whose free equilibrium is the forward pass.'
        )
    else:
        text += (
            f" The states go round a cycle. Take {weaker}ebm.FixedPoint(..., damping=0.5) in the order"
            ' "odd-even", smaller weights, or ebm.GradientDescent(lr, max_steps) with a small step.'
        )
    grew = "If states had settled before, the weights have grown: lower the learning rate of the parameters."
    return f"{text} {grew}"
