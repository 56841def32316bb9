"""Each layer to its best response, all at once or every other one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.relaxers.base import Landscape, Relaxation, Relaxer, Status, as_complex, checked_steps, force_norm
from lightning_ebm.relaxers.forces import total_energy


@dataclass(frozen=True)
class FixedPoint(Relaxer):
    """x_l <- (1 - damping) argmin_x [e_l(x, a_l) - <pull_l, x>] + damping x_l, until nothing moves.

    For the Hopfield energy that is x_l <- rho(a_l + W_{l+1}' x_{l+1} - lambda dL/dx_l), for predictive coding
    x_l <- rho(a_l) + pull_l / Pi_l. "synchronous": all layers from the states of before. "odd-even": the layers at odd
    depth (the first hidden one is 1), then those at even depth from what the odd ones have become; both once a step, in
    two passes. In a chain each half then lowers the energy exactly, and nothing oscillates between neighbours.

    With ``tol=0`` exactly `max_steps` steps; with ``tol > 0`` until every sample's residual |x - response| is below
    `tol` of what it started with, or below rounding. A step count that ends with a residual larger than the first is
    reported as "max_steps": what was found is no equilibrium.

    Args:
        max_steps: how many steps, or how many at most.
        order: "odd-even" or "synchronous".
        tol: relative residual at which a sample has settled.
        damping: how much of the old state stays, from 0 to below 1.

    Raises:
        ConfigurationError: an argument out of range; (in use) an energy that has no best response.
        RelaxationDivergedError: (in use) states ran away.

    Source:
        Scellier et al. 2023 for the layered asynchronous map; Ernoult et al. 2019 for the synchronous one.
    """

    complex_states: ClassVar[bool] = True

    max_steps: int = 20
    order: Literal["odd-even", "synchronous"] = "odd-even"
    tol: float = 0.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        checked_steps(self, self.max_steps, self.tol)
        if self.order not in ("odd-even", "synchronous"):
            raise ConfigurationError(f'FixedPoint(order={self.order!r}): expected "odd-even" or "synchronous".')
        if not 0 <= self.damping < 1:
            raise ConfigurationError(
                f"FixedPoint(damping={self.damping!r}): expected 0 <= damping < 1; at 1 no state would ever move."
            )

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: complex) -> Relaxation:
        point = as_complex(start, strength)
        even = [k for k, depth in enumerate(landscape.depths) if depth % 2 == 0]
        energies: list[Tensor] = []
        norms: list[Tensor] = []
        steps = 0
        while True:
            forces = landscape.responses(point, strength)
            energies.append(total_energy(forces, strength))
            norms.append(force_norm(landscape, forces.gradients))
            if not bool(torch.isfinite(norms[-1]).all()) or bool(norms[-1].max() > 1e6 * norms[0].max().clamp_min(1)):
                raise _ran_away(self, landscape, strength, steps, forces.gradients)
            settled = norms[-1] <= (self.tol * norms[0]).maximum(rounding_of(landscape, point))
            if steps == self.max_steps or (self.tol and bool(settled.all())):
                break
            steps += 1
            if self.order == "synchronous" or not even:
                point = self._moved(point, forces.gradients, range(len(point)))
            else:
                odd = [k for k in range(len(point)) if k not in even]
                point = self._moved(point, forces.gradients, odd)
                point = self._moved(point, landscape.responses(point, strength, even).gradients, even)
        residual = norms[-1] / norms[0].clamp_min(torch.finfo(norms[0].dtype).tiny)
        grew = bool(norms[-1].norm() > norms[0].norm()) and not bool(settled.all())
        status: Status = "fixed" if not self.tol else "converged" if bool(settled.all()) else "max_steps"
        return Relaxation(point, "states", "max_steps" if grew else status, steps, residual, energies)

    def _moved(self, point: list[Tensor], gradients: list[Tensor], layers: Sequence[int]) -> list[Tensor]:
        moved = list(point)
        for k in layers:
            moved[k] = point[k].sub(gradients[k], alpha=1 - self.damping)
        return moved


def rounding_of(landscape: Landscape, point: Sequence[Tensor]) -> Tensor:
    """The residual of states that are one rounding error away from their response, ``(B,)``."""
    size = landscape.per_sample([x.abs().square() for x in point]).sqrt()
    return 4 * max(landscape.rounding, torch.finfo(size.dtype).eps) * size


def _ran_away(
    owner: Relaxer, landscape: Landscape, strength: complex, steps: int, gradients: list[Tensor]
) -> RelaxationDivergedError:
    sizes = [float(gradient.norm()) for gradient in gradients]
    worst = landscape.names[max(range(len(sizes)), key=lambda k: sizes[k] if sizes[k] == sizes[k] else float("inf"))]
    return RelaxationDivergedError(
        f"{type(owner).__name__} ran away at nudge {strength:g} after {steps} steps, layer {worst!r} furthest: with"
        " unbounded activations the states only settle while the feedback loop's gain is below 1, and an update read"
        " here would be noise. Use smaller weights, bounded activations, damping=0.5, a smaller nudge, or"
        " ebm.GradientDescent with a small step."
    )
