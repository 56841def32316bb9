"""Descent that chooses its step sample by sample, and stops sample by sample.

A user's loss arrives as one number for the whole batch, so a sample's own energy is never known; its own force is.
Everything below is therefore decided from forces: along a step d from force g to force g', the curvature is
<g' - g, d> / |d|^2, and the energy changes by (<g, d> + <g', d>) / 2 up to third order (the trapezoid rule).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.relaxers.base import Forces, Landscape, Status, force_norm


class Descent(NamedTuple):
    """Where the descent ended; fields as in `Relaxation`."""

    point: list[Tensor]
    status: Status
    steps: int
    residual: Tensor
    energies: list[Tensor]


def descend(
    landscape: Landscape,
    evaluate: Callable[[Sequence[Tensor], float], Forces],
    start: Sequence[Tensor],
    strength: float,
    lr: float,
    max_steps: int,
    tol: float,
    longest: float = math.inf,
) -> Descent:
    """Gradient descent with Barzilai-Borwein steps, each checked for overshoot and halved where it did.

    A step is kept for the samples whose energy it lowered; the others go back and try a shorter one. The next step of a
    sample is one over the curvature it just met (Barzilai and Borwein 1988, eq. 5), at most `longest`.

    A sample has settled when its force is below `tol` of the first, below rounding, or when even a step that is small
    against the way travelled lowers nothing: the minimum is then a kink, as of ReLU drives, where no force vanishes.
    """
    point = list(start)
    internal, loss, gradients = evaluate(point, strength)
    energies = [(internal.sum() + strength * loss).detach()]
    first = norm = force_norm(landscape, gradients)
    # Force of a state that is one rounding error away from its prediction; 0 in error coordinates, which start at 0.
    rounding = 4 * torch.finfo(first.dtype).eps * landscape.per_sample([x.square() for x in start]).sqrt()
    settled_at = (tol * first).maximum(rounding)
    active = norm > settled_at
    step_size = torch.full_like(first, lr)
    rejected = torch.zeros_like(first)
    ran_away = ~torch.isfinite(first)
    steps = 0
    while steps < max_steps and bool(active.any()):
        steps += 1
        reach = torch.where(active, step_size, 0)
        step = [-s * g for s, g in zip(landscape.spread(reach, gradients), gradients, strict=True)]
        trial = [x + d for x, d in zip(point, step, strict=True)]
        internal, loss, ahead = evaluate(trial, strength)
        energies.append((internal.sum() + strength * loss).detach())

        slope = -reach * norm.square()
        slope_ahead = landscape.per_sample([g * d for g, d in zip(ahead, step, strict=True)])
        length = (reach * norm).square()
        curvature = torch.where(active, (slope_ahead - slope) / length, 1)
        kept = (slope_ahead <= 0.9 * slope.abs()) | ~active  # a comparison with nan is False: such a step is not kept

        newton = torch.where(curvature > 0, 1 / curvature, math.inf)
        shorter = torch.where(curvature > 0, newton.clamp_max(0.5 * step_size), 0.1 * step_size)
        step_size = torch.where(kept, newton.minimum(4 * step_size).clamp_max(longest), shorter)
        if bool(kept.all()):
            point, gradients = trial, ahead  # the very tensors evaluated: the network still holds their pass
        else:
            masks = landscape.spread(kept, point)
            point = [torch.where(m, new, old) for m, new, old in zip(masks, trial, point, strict=True)]
            gradients = [torch.where(m, new, old) for m, new, old in zip(masks, ahead, gradients, strict=True)]
        norm = force_norm(landscape, gradients)
        travelled = landscape.per_sample([(x - x0).square() for x, x0 in zip(point, start, strict=True)]).sqrt()
        # On a smooth energy the second try is kept; at a kink the curvature met doubles with every halving.
        rejected = torch.where(kept, 0, rejected + 1)
        stuck = (rejected > 2) & (step_size * norm <= tol * travelled)
        ran_away |= ~(norm <= 1e3 * first)  # nan counts
        active &= (norm > settled_at) & ~stuck & ~ran_away

    residual = norm / first.clamp_min(torch.finfo(first.dtype).tiny)
    ran_away |= active & ~(residual <= 10)
    if bool(ran_away.any()) or not bool(torch.isfinite(norm).all()):
        sizes = [float(gradient.norm()) for gradient in gradients]
        worst = landscape.names[max(range(len(sizes)), key=lambda k: sizes[k])]
        raise RelaxationDivergedError(
            f"At nudge {strength:g} the energy has no minimum that {int(ran_away.sum())} of {landscape.batch_size}"
            f" samples could reach: after {steps} steps their force is up to {float(residual.max()):.3g} times what it"
            f" started with, and layer {worst!r} ran furthest. An update read there would be noise. A negative nudge has"
            " a minimum only while |lambda| times the curvature of the loss, as the states feel it, stays below 1: take a"
            " smaller nudge, such as ebm.Centered(0.01), or a one-sided positive one."
        )
    return Descent(point, "max_steps" if bool(active.any()) else "converged", steps, residual, energies)
