"""A given number of moves, and a refusal to return a runaway."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import Coordinates, DescentStep, Landscape
from lightning_ebm.evaluations.descent_step import Left, forces_in, moved
from lightning_ebm.relaxers.base import Relaxation, Relaxer, as_complex, force_norm
from lightning_ebm.relaxers.fixed_point import rounding_of

Move = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""The next point from a point and the gradient there."""


def fixed_steps(
    owner: Relaxer,
    landscape: Landscape,
    coordinates: Coordinates,
    move: Move | None,
    point: list[Tensor],
    strength: complex,
    max_steps: int,
    lr: float = 0.0,
) -> Relaxation:
    """Exactly `max_steps` moves, and a refusal to return a runaway.

    The forces at the final point are evaluated too: an update read there must not come from a last step that left the
    basin, and the network keeps that pass for the update.

    Args:
        owner: in whose name to complain.
        landscape: the network.
        coordinates: what `point` and `move` are written in.
        move: the next point from a point and the gradient there; None is descent by `lr`.
        point: where to begin; this list is moved along, so that nobody has to hold what is left behind.
        strength: lambda.
        max_steps: how many moves.
        lr: step size of a descent: then at a positive nudge a rise of the energy proves that a step was too large, and
            so does a force that grows along a curvature above 2 / lr. 0 is for adaptive optimizers, which may climb
            without that: a rise is said, only growing forces raise.
    """
    point[:] = as_complex(point, strength)
    norms: list[Tensor] = []  # of each sample
    for step in range(max_steps + 1):
        ended = step == max_steps
        # Forces are measured at the start and the end, and where they may prove that a step was too large.
        measured = ended or step == 0 or (lr > 0 and step > max_steps - 4)
        if ended or move is None:
            left = landscape.evaluate(DescentStep(coordinates, 0.0 if ended else lr, measured), point, strength)
        else:
            left = _moved_by(move, landscape, coordinates, point, strength, measured)
        if not ended:
            point[:] = left.point
        if left.norm is not None:
            norms.append(left.norm)
        if step == 0:  # one tensor: small ones between two large ones would leave memory in pieces
            energies = left.energy.new_empty(max_steps + 1)
            each = energies.unbind()
        each[step].copy_(left.energy)
        del left
    residual = norms[-1] / norms[0].clamp_min(torch.finfo(norms[0].dtype).tiny)
    found = Relaxation(list(point), coordinates, "fixed", max_steps, residual, each)

    def check(numbers: list[float]) -> None:
        here = list(found.point)
        if _rose(owner, landscape, coordinates, move, here, strength, max_steps, lr, norms[0].dtype, numbers):
            found.status = "max_steps"

    # Of the batch, so that one sample at rest from the start does not divide by nothing.
    sizes = torch.linalg.vector_norm(torch.stack(norms), dim=1)
    landscape.questions.later(torch.cat([energies, sizes]), check)  # all that is asked, at once
    return found


def _moved_by(
    move: Move,
    landscape: Landscape,
    coordinates: Coordinates,
    point: list[Tensor],
    strength: complex,
    measured: bool,
) -> Left:
    """The point after a move that is no descent."""
    slope = landscape.evaluate(forces_in(coordinates), point, strength)
    norm = force_norm(landscape, slope.gradients) if measured else None
    ahead = move(point, slope.gradients)
    return Left(slope.total(strength), norm, landscape.feasible(ahead) if coordinates == "states" else ahead)


def _rose(
    owner: Relaxer,
    landscape: Landscape,
    coordinates: Coordinates,
    move: Move | None,
    point: list[Tensor],
    strength: complex,
    max_steps: int,
    lr: float,
    dtype: torch.dtype,
    numbers: Sequence[float],
) -> bool:
    """Refuses a runaway, given the energies and the forces of the batch; whether the energy rose."""

    def onwards(count: int) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Points and gradients from the last point on: only a suspect relaxation is looked at that closely."""
        kind, here = forces_in(coordinates), point
        found = [(here, landscape.evaluate(kind, here, strength).gradients)]
        while len(found) <= count:
            here = moved(*found[-1], lr) if move is None else move(*found[-1])
            here = landscape.feasible(here) if coordinates == "states" else here
            found.append((here, landscape.evaluate(kind, here, strength).gradients))
        return found

    before, after, force = numbers[0], numbers[max_steps], numbers[max_steps + 1 :]
    growth = force[-1] / max(force[0], torch.finfo(dtype).tiny)
    # At a negative nudge the energy may fall without bound, and only the growing force tells.
    room = max(1e-4, 16 * landscape.rounding) * abs(before) + 16 * landscape.rounding * landscape.batch_size
    rose = not isinstance(strength, complex) and strength >= 0 and after > before + room
    finite = all(map(math.isfinite, (before, after, force[-1])))
    # Where a batch pulls at nothing, as under a loss of zero, what states are rounded by is all the force there is.
    felt = growth <= 10 or coordinates == "errors" or force[-1] > 4 * float(rounding_of(landscape, point).norm())
    moving = felt and growth > landscape.rounding**0.5  # below, forces are rounding
    proves = lr > 0 and landscape.conservative  # that a step was too large
    growing = proves and max_steps > 2 and all(x < y for x, y in itertools.pairwise(force[-4:]))
    unstable = growing and moving and _unstable([gradients for _, gradients in onwards(2)], lr)
    if not finite or (rose and proves) or unstable or (felt and growth > 10):
        one, other = onwards(1) if finite else onwards(0) * 2
        raise diverged(landscape, owner, one, other, strength, (before, after), growth)
    return rose and landscape.conservative


def _unstable(gradients: list[list[Tensor]], lr: float) -> bool:
    """Whether a fixed step is past 2 / curvature, seen from three forces in a row.

    With g' = (1 - lr H) g the change v = g' - g lies along the stiffest directions, and <v, Hv> / |v|^2 is never above
    the largest curvature: beyond 2 / lr it proves divergence. At a kink it may be met without any, so the force must
    have grown in three steps on end before.
    """
    change, turned = 0.0, 0.0
    for first, second, third in zip(*gradients, strict=True):
        v = second - first
        change += float(v.abs().square().sum())
        turned += float((v.conj() * (third - second - v)).sum().real)
    return change > 0 and -turned / change > 2.0  # lr times the curvature


def diverged(
    landscape: Landscape,
    owner: Relaxer,
    before: tuple[list[Tensor], list[Tensor]],
    after: tuple[list[Tensor], list[Tensor]],
    strength: complex,
    energies: tuple[float, float],
    growth: float,
) -> RelaxationDivergedError:
    """The error that names the layer that ran furthest, and the step size its curvature would have allowed."""
    (point_0, gradient_0), (point_1, gradient_1) = before, after
    norms = [float(gradient.norm()) for gradient in gradient_1]
    worst = max(range(len(norms)), key=lambda k: norms[k] if norms[k] == norms[k] else float("inf"))
    moved = sum(float((b - a).abs().square().sum()) for a, b in zip(point_0, point_1, strict=True))
    turned = sum(
        float(((h - g) * (b - a).conj()).sum().real)
        for a, b, g, h in zip(point_0, point_1, gradient_0, gradient_1, strict=True)
    )
    curvature = turned / moved if moved else 0.0
    hint = (
        f"below {2 / curvature:.2g} (2 / {curvature:.3g}, the curvature met here)" if 0 < curvature < 1e30 else "lower"
    )
    grown = f"grew to {growth:.3g} times" if not growth < 1 else f"grows again, at {growth:.3g} of"
    force = f"the force {grown} its start"
    if not math.isfinite(growth):
        force = "the force outgrew what numbers hold"
    energy = "rose" if energies[1] > energies[0] else "went"
    return RelaxationDivergedError(
        f"{type(owner).__name__} diverged at nudge {strength:g}: {force}, and the"
        f" energy {energy} from {energies[0]:.4g} to {energies[1]:.4g}; layer {landscape.names[worst]!r} ran"
        " furthest. A step larger than 2 / (largest curvature of the energy) grows every time, and weights that grow in"
        f" training raise the curvature: an update read here would be noise. Take a learning rate of the states {hint},"
        " a smaller nudge, or a relaxer that chooses its own step: ebm.ErrorCoordinates(max_steps=64, tol=1e-3)."
    )
