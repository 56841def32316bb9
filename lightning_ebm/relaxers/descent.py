"""Descent that chooses its step sample by sample, and stops sample by sample.

A user's loss arrives as one number for the whole batch, so a sample's own energy is never known; its own force is.
Everything below is therefore decided from forces: along a step d from force g to force g', the curvature is
<g' - g, d> / |d|^2, and the energy changes by (<g, d> + <g', d>) / 2 up to third order (the trapezoid rule).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import Landscape, Slope
from lightning_ebm.evaluations.descent_step import forces_in
from lightning_ebm.relaxers.base import Relaxation, Status, force_norm

_PATIENCE = 6
"""Steps over which the energy must still fall noticeably."""


def descend(
    landscape: Landscape,
    coordinates: Literal["states", "errors"],
    start: Sequence[Tensor],
    strength: float,
    lr: float,
    max_steps: int,
    tol: float,
    longest: float,
) -> Relaxation:
    """Gradient descent with Barzilai-Borwein steps, each checked for overshoot and shortened where it did.

    A step is kept for the samples whose force along it has not turned round, provided that the energy of the batch,
    the one that is known exactly, has not risen; the others stay and try a shorter one. The next step of a sample is
    one over the curvature it just met (Barzilai and Borwein 1988), at most `longest`.

    A sample has settled when its force is below `tol` of the first, or below rounding. At a kink, as drives through
    ReLU have, no force ever vanishes: there a sample is stalled when even a step that is small against the way it came
    lowers nothing, and the batch is when its energy falls, in several steps, by less than (tol/10)^2 of its whole fall.

    What is reported is measured at the end, of all samples at once. Samples that see each other (a loss across the
    batch, BatchNorm in training) are found out by a force that changes while its sample rests: from there on the batch
    relaxes as one, with one step size, and tolerance and residual are those of the mean square of the first forces.
    """

    def pooled(values: Tensor) -> Tensor:
        """Sums of each sample, or of the batch where it relaxes as one."""
        return values.sum().expand_as(values) if as_one else values

    def moving() -> Tensor:
        """Which samples are to take a step."""
        left = (norm > settled_at) & ~ran_away
        return left.any().expand_as(left) & ~stalled if as_one else left & ~stalled

    def total(forces: Slope) -> Tensor:
        return (forces.internal.sum() + strength * forces.loss).detach()

    def evaluate(point: Sequence[Tensor]) -> Slope:
        return landscape.evaluate(kind, point, strength)

    kind = forces_in(coordinates)
    point = list(start)
    forces = evaluate(point)
    gradients, energy = forces.gradients, total(forces)
    del forces
    energies, whole_fall = [energy], torch.zeros_like(energy)
    falls: list[Tensor] = []
    first = norm = force_norm(landscape, gradients)
    # Force of a state that is one rounding error away from its prediction; 0 in error coordinates, which start at 0.
    rounding = 4 * torch.finfo(first.dtype).eps * landscape.per_sample(x.square() for x in start).sqrt()
    settled_at = (max(tol, 4 * landscape.rounding) * first).maximum(rounding)
    least_fall = max((tol / 10) ** 2, 4 * landscape.rounding)
    stalled, ran_away = torch.zeros_like(norm, dtype=torch.bool), ~torch.isfinite(first)
    step_size, overshoots, rested_at = torch.full_like(first, lr), torch.zeros_like(first), norm
    steps, as_one = 0, False
    measured = True  # whether these are the forces at the point, and no mixture of those at two
    active = norm > settled_at
    while True:
        woken = ~active & _changed(norm, rested_at, settled_at)
        some_active, some_woken = torch.stack([active.any(), woken.any()]).tolist()  # asked of the device once
        ended = steps == max_steps or not some_active
        joining = some_woken and not as_one and not ended
        if (ended or joining) and not measured:
            forces = evaluate(point)
            gradients, energy, measured = forces.gradients, total(forces), True
            norm, energies[-1] = force_norm(landscape, gradients), energy
            del forces
        if ended:
            left = moving() | _changed(norm, rested_at, settled_at)
            if steps == max_steps or as_one or not bool(left.any()):
                break
            joining = True
        if joining:
            as_one = True
            first = first.square().mean().sqrt().expand_as(first)
            settled_at = (max(tol, 4 * landscape.rounding) * first).maximum(rounding)
            step_size = step_size.amin().expand_as(step_size)
            stalled, overshoots, falls = torch.zeros_like(stalled), torch.zeros_like(overshoots), []
            active = moving()
            continue
        steps += 1
        reach = torch.where(active, step_size, 0)
        trial = [
            torch.addcmul(x, s, g) for x, s, g in zip(point, landscape.spread(-reach, point), gradients, strict=True)
        ]
        if coordinates == "states":
            trial = landscape.feasible(trial)
        elif point[0] is not start[0]:  # not held through the evaluation: back from the trial it is as far as there
            point = []
        forces = evaluate(trial)
        reached = total(forces)

        slope = -reach * norm.square()
        # One layer at a time: the step itself, as large as all states, is not held through the evaluation.
        if coordinates == "states":
            ahead = zip(forces.gradients, point, trial, strict=True)
            slope_ahead = landscape.per_sample(g * (y - x) for g, x, y in ahead)
        else:
            slope_ahead = -reach * landscape.per_sample(map(torch.mul, forces.gradients, gradients))
        curvature = pooled(slope_ahead - slope) / pooled((reach * norm).square())
        overshot = active & ~(pooled(slope_ahead) <= 0.9 * pooled(slope).abs())  # nan counts
        noise = 16 * landscape.rounding * (forces.internal.sum() + (strength * forces.loss).abs())
        # On a smooth energy the second try is kept; at a kink the curvature met doubles with every halving.
        overshoots = torch.where(overshot, overshoots + 1, torch.where(active, 0, overshoots))
        rose = not bool(reached <= energy + noise.maximum(least_fall * (energies[0] - energy)))
        if rose and not bool(overshot.any()):
            overshot = active  # over a hump the forces do not tell whose energy it was: all are more careful
        kept = torch.zeros_like(active) if rose else active & ~overshot

        if not rose and not bool(overshot.any()):
            # These very tensors: the network still holds their pass.
            point, gradients, energy, measured = trial, forces.gradients, reached, True
        else:  # a mixture that was never evaluated: the energy of before still bounds its own
            if point and not rose:
                masks = landscape.spread(~overshot, point)
                point = [torch.where(m, new, old) for m, new, old in zip(masks, trial, point, strict=True)]
            elif not point:
                back = landscape.spread(torch.where(kept, 0, reach), trial)
                point = [torch.addcmul(y, s, g) for y, s, g in zip(trial, back, gradients, strict=True)]
            if not rose:
                measured = False
                for k, m in enumerate(landscape.spread(~overshot, point)):
                    gradients[k] = torch.where(m, forces.gradients[k], gradients[k])
        if not rose:
            norm = force_norm(landscape, gradients)
        del forces, trial  # as large as the states: not held through the next evaluation
        energies.append(energy)
        ran_away |= ~(pooled(norm.square()) <= 1e6 * pooled(first.square()))  # nan counts
        rested_at = torch.where(active, norm, rested_at)
        stepped, active = active, moving()
        if not bool(active.any()):  # nothing is left to choose a step for, which takes longer than to take it
            continue

        newton = torch.where(curvature > 0, 1 / curvature, math.inf)
        shorter = torch.where(curvature > 0, newton.clamp_max(0.5 * step_size), 0.1 * step_size)
        longer = newton.minimum(4 * step_size).clamp_max(longest)
        step_size = torch.where(overshot, shorter, torch.where(kept, longer, step_size))

        traveled = pooled(landscape.per_sample((x - x0).square() for x, x0 in zip(point, start, strict=True))).sqrt()
        short = step_size * pooled(norm.square()).sqrt() / traveled.clamp_min(torch.finfo(norm.dtype).tiny)
        stuck = (overshoots > 2) & (short <= tol) | (short <= 1e-3 * tol)
        if bool(kept.any()):  # steps that all went too far say nothing about what shorter ones would gain
            falls.append(torch.where(kept, -0.5 * (slope + slope_ahead), 0).sum())
            whole_fall = whole_fall + falls[-1]
            if len(falls) > _PATIENCE and bool(sum(falls[-_PATIENCE:]) <= least_fall * whole_fall):
                stuck = active
        stalled |= stepped & active & stuck
        active = moving()

    residual = norm / first.clamp_min(torch.finfo(first.dtype).tiny)
    if strength < 0:  # at a positive nudge the energy is bounded below, and a kink may push harder than the start did
        ran_away |= active & ~(residual <= 10)
    if bool(ran_away.any()):
        raise _ran_away(landscape, strength, steps, gradients, residual, int(ran_away.sum()))
    settled = norm <= settled_at
    status: Status = "max_steps" if bool(moving().any()) else "converged" if bool(settled.all()) else "stalled"
    return Relaxation(point, coordinates, status, steps, residual, energies)


def _changed(norm: Tensor, rested_at: Tensor, settled_at: Tensor) -> Tensor:
    """Which samples feel another force than the one at which they last took a step, by more than rounding."""
    return (norm - rested_at).abs() > settled_at + 1e-3 * rested_at


def _ran_away(
    landscape: Landscape, strength: float, steps: int, gradients: list[Tensor], residual: Tensor, samples: int
) -> RelaxationDivergedError:
    sizes = [float(gradient.norm()) for gradient in gradients]
    worst = landscape.names[max(range(len(sizes)), key=lambda k: sizes[k])]
    who = f"{samples} of {landscape.batch_size} samples"
    if strength >= 0:  # there is a minimum, and numbers that do not hold the way to it
        return RelaxationDivergedError(
            f"At nudge {strength:g} the states of {who} ran out of the range of {gradients[0].dtype} after {steps}"
            f" steps, those of layer {worst!r} furthest. An update read there would be noise. The weights have most"
            " likely grown too large: lower the learning rate of the parameters, or clip their gradients. If this is"
            " the first step, look for large values in the batch or in the initial weights."
        )
    return RelaxationDivergedError(
        f"At nudge {strength:g} the energy has no minimum that {who} could reach:"
        f" after {steps} steps their force is up to {float(residual.max()):.3g} times what it started with, and layer"
        f" {worst!r} ran furthest. An update read there would be noise. A negative nudge has a minimum only while"
        " |lambda| times the curvature of the loss, as the states feel it, is below 1: take a smaller nudge, such as"
        " ebm.Centered(0.01), or a one-sided positive one. That curvature grows with the weights: if earlier steps were"
        " fine, the learning rate of the parameters may be too large instead."
    )
