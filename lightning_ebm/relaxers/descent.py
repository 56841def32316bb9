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
from lightning_ebm.relaxers.base import Landscape, Relaxation, Status, force_norm
from lightning_ebm.relaxers.forces import Forces

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
    """

    def total(forces: Forces) -> Tensor:
        return (forces.internal.sum() + strength * forces.loss).detach()

    evaluate = landscape.forces if coordinates == "states" else landscape.error_forces
    point = list(start)
    forces = evaluate(point, strength)
    gradients, energy = forces.gradients, total(forces)
    del forces
    energies, falls, whole_fall = [energy], [], torch.zeros_like(energy)
    first = norm = force_norm(landscape, gradients)
    # Force of a state that is one rounding error away from its prediction; 0 in error coordinates, which start at 0.
    rounding = 4 * torch.finfo(first.dtype).eps * landscape.per_sample(x.square() for x in start).sqrt()
    settled_at = (max(tol, 4 * landscape.rounding) * first).maximum(rounding)
    least_fall = max((tol / 10) ** 2, 4 * landscape.rounding)
    active = norm > settled_at
    stalled, ran_away = torch.zeros_like(active), ~torch.isfinite(first)
    step_size, overshoots = torch.full_like(first, lr), torch.zeros_like(first)
    steps = 0
    while steps < max_steps and bool(active.any()):
        steps += 1
        reach = torch.where(active, step_size, 0)
        trial = [
            torch.addcmul(x, s, g) for x, s, g in zip(point, landscape.spread(-reach, point), gradients, strict=True)
        ]
        if coordinates == "states":
            trial = landscape.feasible(trial)
        elif point[0] is not start[0]:  # not held through the evaluation: back from the trial it is as far as there
            point = []
        forces = evaluate(trial, strength)
        reached = total(forces)

        slope = -reach * norm.square()
        # One layer at a time: the step itself, as large as all states, is not held through the evaluation.
        if coordinates == "states":
            ahead = zip(forces.gradients, point, trial, strict=True)
            slope_ahead = landscape.per_sample(g * (y - x) for g, x, y in ahead)
        else:
            slope_ahead = -reach * landscape.per_sample(map(torch.mul, forces.gradients, gradients))
        curvature = (slope_ahead - slope) / (reach * norm).square()
        overshot = active & ~(slope_ahead <= 0.9 * slope.abs())  # nan counts
        noise = 16 * landscape.rounding * (forces.internal.sum() + (strength * forces.loss).abs())
        # On a smooth energy the second try is kept; at a kink the curvature met doubles with every halving.
        overshoots = torch.where(overshot, overshoots + 1, torch.where(active, 0, overshoots))
        rose = not bool(reached <= energy + noise.maximum(least_fall * (energies[0] - energy)))
        if rose and not bool(overshot.any()):
            overshot = active  # over a hump the forces do not tell whose energy it was: all are more careful
        kept = torch.zeros_like(active) if rose else active & ~overshot

        if not rose and not bool(overshot.any()):
            # These very tensors: the network still holds their pass.
            point, gradients, energy = trial, forces.gradients, reached
        else:  # a mixture that was never evaluated: the energy of before still bounds its own
            if point and not rose:
                masks = landscape.spread(~overshot, point)
                point = [torch.where(m, new, old) for m, new, old in zip(masks, trial, point, strict=True)]
            elif not point:
                back = landscape.spread(torch.where(kept, 0, reach), trial)
                point = [torch.addcmul(y, s, g) for y, s, g in zip(trial, back, gradients, strict=True)]
            if not rose:
                for k, m in enumerate(landscape.spread(~overshot, point)):
                    gradients[k] = torch.where(m, forces.gradients[k], gradients[k])
        if not rose:
            norm = force_norm(landscape, gradients)
        del forces, trial  # as large as the states: not held through the next evaluation
        energies.append(energy)
        ran_away |= ~(norm <= 1e3 * first)  # nan counts
        active = active & (norm > settled_at) & ~ran_away
        if not bool(active.any()):  # nothing is left to choose a step for, which takes longer than to take it
            break

        newton = torch.where(curvature > 0, 1 / curvature, math.inf)
        shorter = torch.where(curvature > 0, newton.clamp_max(0.5 * step_size), 0.1 * step_size)
        longer = newton.minimum(4 * step_size).clamp_max(longest)
        step_size = torch.where(overshot, shorter, torch.where(kept, longer, step_size))

        travelled = landscape.per_sample((x - x0).square() for x, x0 in zip(point, start, strict=True)).sqrt()
        short = step_size * norm / travelled.clamp_min(torch.finfo(norm.dtype).tiny)
        stuck = (overshoots > 2) & (short <= tol) | (short <= 1e-3 * tol)
        if bool(kept.any()):  # steps that all went too far say nothing about what shorter ones would gain
            falls.append(torch.where(kept, -0.5 * (slope + slope_ahead), 0).sum())
            whole_fall = whole_fall + falls[-1]
            if len(falls) > _PATIENCE and bool(sum(falls[-_PATIENCE:]) <= least_fall * whole_fall):
                stuck = active
        stalled |= active & stuck
        active = active & ~stuck

    residual = norm / first.clamp_min(torch.finfo(first.dtype).tiny)
    if strength < 0:  # at a positive nudge the energy is bounded below, and a kink may push harder than the start did
        ran_away |= active & ~(residual <= 10)
    if bool(ran_away.any()):
        raise _ran_away(landscape, strength, steps, gradients, residual, int(ran_away.sum()))
    status: Status = "max_steps" if bool(active.any()) else "stalled" if bool(stalled.any()) else "converged"
    return Relaxation(point, coordinates, status, steps, residual, energies)


def _ran_away(
    landscape: Landscape, strength: float, steps: int, gradients: list[Tensor], residual: Tensor, samples: int
) -> RelaxationDivergedError:
    sizes = [float(gradient.norm()) for gradient in gradients]
    worst = landscape.names[max(range(len(sizes)), key=lambda k: sizes[k])]
    return RelaxationDivergedError(
        f"At nudge {strength:g} the energy has no minimum that {samples} of {landscape.batch_size} samples could reach:"
        f" after {steps} steps their force is up to {float(residual.max()):.3g} times what it started with, and layer"
        f" {worst!r} ran furthest. An update read there would be noise. A negative nudge has a minimum only while"
        " |lambda| times the curvature of the loss, as the states feel it, is below 1: take a smaller nudge, such as"
        " ebm.Centered(0.01), or a one-sided positive one."
    )
