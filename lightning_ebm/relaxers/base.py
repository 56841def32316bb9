"""The waist of the library: the network as a function of its states, and what a relaxer gives back.

Letters: ``B`` samples; a list over layers holds one tensor a state, each ``(B, ...)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError

Status = Literal["converged", "stalled", "max_steps", "fixed"]


class Forces(NamedTuple):
    """The energies of a point and their slope.

    Attributes:
        internal: I_b, energy of each sample, ``(B,)``.
        loss: L summed over the batch, a scalar (a user's loss comes as one number, not per sample).
        gradients: dE/dx_l with E = sum_b I_b + lambda L, one tensor a layer. In error coordinates the gradient in the
            metric of the precision, e_l + 1/Pi_l * lambda dL/de_l, whose unit step is the fixed-point map.
    """

    internal: Tensor
    loss: Tensor
    gradients: list[Tensor]


class Landscape(Protocol):
    """All a relaxer may know of the network."""

    names: Sequence[str]
    batch_size: int
    rounding: float
    """Relative rounding of the network's arithmetic, coarser than that of the states under mixed precision."""
    no_errors: Sequence[Tensor]
    """e = 0, where descent on errors starts; the network knows these very tensors and runs no pass for them."""

    def forces(self, states: Sequence[Tensor], strength: float) -> Forces:
        """E and dE/dx at the given states, loss weighted by `strength`."""

    def error_forces(self, errors: Sequence[Tensor], strength: float) -> Forces:
        """The same at x_l = rho(a_l) + e_l, as a function of the errors e."""

    def per_sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sums each tensor over all but the batch, then over the list: ``(B,)``."""

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """`per_sample` of |t|^2: ``(B,)``."""

    def spread(self, values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """One number a sample ``(B,)`` shaped to multiply each tensor of the list."""


@dataclass
class Relaxation:
    """Where a relaxation ended and how it went.

    Attributes:
        point: states x_l, or errors e_l, one tensor a layer.
        coordinates: which of the two `point` holds; "arrival" for the displacement with which the signal first arrives
            at each layer, to be read with everything else still at the free equilibrium.
        status: "converged" (every sample within tolerance), "stalled" (the energy falls no further though forces
            remain, as at the kinks of ReLU), "max_steps" (still moving when the count was up) or "fixed" (a number of
            steps was asked for and taken).
        steps: steps taken by the slowest sample.
        residual: |force| at the end over |force| at the start, per sample, ``(B,)``; 0 where nothing pulled.
        energies: total energy I + lambda L of the batch, a list of scalars: at the start and after each step. Where
            only some samples took a step, the value before it, which bounds theirs.
    """

    point: list[Tensor]
    coordinates: Literal["states", "errors", "arrival"]
    status: Status
    steps: int
    residual: Tensor
    energies: list[Tensor] = field(default_factory=list)


class Relaxer(ABC):
    """Moves states from the free point `start` towards equilibrium of I + strength * loss."""

    update: ClassVar[Literal["contrast", "first-arrival"]] = "contrast"
    """How its result is meant to be read; see `Algorithm.update`."""

    needs_error_coordinates: ClassVar[bool] = False
    """Whether the energy must be a quadratic of errors, see `QuadraticEnergy`."""

    @abstractmethod
    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        """Relaxes. Must raise `RelaxationDivergedError` rather than return states that ran away."""


def checked_steps(owner: object, max_steps: int, tol: float) -> None:
    """Refuses counts and tolerances that cannot be meant."""
    name = type(owner).__name__
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ConfigurationError(f"{name}(max_steps={max_steps!r}): expected a whole number of at least 1.")
    if not 0 <= tol < 1:
        raise ConfigurationError(
            f"{name}(tol={tol!r}): the tolerance is a fraction of the force that started the relaxation; expected"
            " 0 <= tol < 1, where 0 means exactly max_steps steps."
        )


def force_norm(landscape: Landscape, gradients: Sequence[Tensor]) -> Tensor:
    """|dE/dx| of each sample, ``(B,)``."""
    return landscape.squares(gradients).sqrt()


def fixed_steps(
    owner: Relaxer,
    landscape: Landscape,
    coordinates: Literal["states", "errors"],
    move: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    start: Sequence[Tensor],
    strength: float,
    max_steps: int,
    descends: bool = True,
) -> Relaxation:
    """Exactly `max_steps` moves, and a refusal to return a runaway.

    The forces at the final point are evaluated too: an update read there must not come from a last step that left the
    basin, and the network keeps that pass for the update.

    Args:
        owner: in whose name to complain.
        landscape: the network.
        coordinates: what `start` and `move` are written in.
        move: the next point from a point and the gradient there.
        start: where to begin.
        strength: lambda.
        max_steps: how many moves.
        descends: whether each move follows the force, so that at a positive nudge a rise of the energy proves that a
            step was too large. Adaptive optimizers may climb without that: a rise is said, only growing forces raise.
    """
    evaluate = landscape.forces if coordinates == "states" else landscape.error_forces
    point, previous, energies = list(start), None, torch.empty(0)
    for step in range(max_steps + 1):
        forces = evaluate(point, strength)
        energy = (forces.internal.sum() + strength * forces.loss).detach()
        if step == 0:
            first = force_norm(landscape, forces.gradients)
            energies = energy.new_empty(max_steps + 1)  # at once: many small tensors would scatter the large ones
        energies[step] = energy
        if step < max_steps:
            previous = (point, forces.gradients)
            point = move(point, forces.gradients)
    assert previous is not None
    last = force_norm(landscape, forces.gradients)
    tiny = torch.finfo(first.dtype).tiny
    # Force of the whole batch, so that one sample at rest from the start does not divide by nothing.
    growth = last.norm() / first.norm().clamp_min(tiny)
    # At a negative nudge the energy may fall without bound, and only the growing force tells.
    room = max(1e-4, 16 * landscape.rounding) * energies[0].abs()
    rose = strength > 0 and bool(energies[-1] > energies[0] + room)
    finite = bool(torch.isfinite(energies).all()) and bool(torch.isfinite(last).all())
    if not finite or (rose and descends) or bool(growth > 10):
        raise diverged(landscape, owner, previous, (point, forces.gradients), strength, energies, float(growth))
    status: Status = "max_steps" if rose else "fixed"
    return Relaxation(point, coordinates, status, max_steps, last / first.clamp_min(tiny), list(energies))


def diverged(
    landscape: Landscape,
    owner: Relaxer,
    before: tuple[list[Tensor], list[Tensor]],
    after: tuple[list[Tensor], list[Tensor]],
    strength: float,
    energies: Tensor,
    growth: float,
) -> RelaxationDivergedError:
    """The error that names the layer that ran furthest, and the step size its curvature would have allowed."""
    (point_0, gradient_0), (point_1, gradient_1) = before, after
    norms = [float(gradient.norm()) for gradient in gradient_1]
    worst = max(range(len(norms)), key=lambda k: norms[k] if norms[k] == norms[k] else float("inf"))
    moved = sum(float((b - a).square().sum()) for a, b in zip(point_0, point_1, strict=True))
    turned = sum(
        float(((h - g) * (b - a)).sum()) for a, b, g, h in zip(point_0, point_1, gradient_0, gradient_1, strict=True)
    )
    curvature = turned / moved if moved else 0.0
    hint = (
        f"below {2 / curvature:.2g} (2 / {curvature:.3g}, the curvature met here)" if 0 < curvature < 1e30 else "lower"
    )
    return RelaxationDivergedError(
        f"{type(owner).__name__} diverged at nudge {strength:g}: the force grew to {growth:.3g} times its start, the"
        f" energy went from {float(energies[0]):.4g} to {float(energies[-1]):.4g}; layer {landscape.names[worst]!r} ran"
        " furthest. A step larger than 2 / (largest curvature of the energy) grows every time, and weights that grow in"
        f" training raise the curvature: an update read here would be noise. Take a learning rate of the states {hint},"
        " a smaller nudge, or a relaxer that chooses its own step: ebm.ErrorCoordinates(max_steps=64, tol=1e-3)."
    )
