"""Errors relaxed while predictions stay at the forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import FrozenForces, Landscape
from lightning_ebm.evaluations.descent_step import moved
from lightning_ebm.questions import Arrival
from lightning_ebm.relaxers.base import Relaxation, Relaxer, Status, checked_tol, force_norm


@dataclass(frozen=True)
class FixedPrediction(Relaxer):
    """e_l <- e_l - lr (e_l + 1/Pi_l [lambda dL/dx_l - sum_k J_k' Pi_k e_k]), everything at x_bar, from e = 0.

    The dynamics of predictive coding with predictions, Jacobians and presynaptic activities frozen at the forward pass.
    Linear, local, one hop a step; its fixed point is Pi e = -lambda delta at any lambda, so that the update is
    backprop's exactly. With ``lr=1`` it is there after as many steps as there are layers.

    Args:
        max_steps: how many steps, or how many at most.
        lr: step size, in (0, 2).
        tol: relative residual at which to stop; 0 takes exactly `max_steps`.

    Raises:
        ConfigurationError: an argument out of range.

    Source:
        Millidge, Tschantz, Buckley 2022 (arXiv 2006.04182); Rosenbaum 2022.
    """

    update: ClassVar[str] = "fixed-prediction"
    needs_error_coordinates: ClassVar[bool] = True

    max_steps: int = 100
    lr: float = 1.0
    tol: float = 1e-6

    def __post_init__(self) -> None:
        between = "a step size between 0 and 2; the map has curvature 1, and from 2 on it diverges"
        checked.keep(
            self,
            max_steps=checked.count(self, "max_steps", self.max_steps),
            tol=checked_tol(self, self.tol),
            lr=checked.number(self, "lr", self.lr, between, above=0, below=2),
        )

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        errors = [error.clone() for error in landscape.no_errors]
        questions = landscape.questions
        energies, norms, steps = [], [], 0
        arrival = Arrival(questions, errors[0].device)
        while True:
            forces = landscape.evaluate(FrozenForces(), errors, strength)
            energies.append(forces.total(strength))
            norms.append(force_norm(landscape, forces.gradients))
            size = landscape.norms(errors)
            # Not against the first force: it may be the smallest, and grow on its way down.
            settled = norms[-1] <= max(self.tol, 4 * landscape.rounding) * size.maximum(norms[0])
            last = steps == self.max_steps
            if (self.tol and arrival.look(settled, steps, last)) or last:
                break
            steps += 1
            ahead = moved(errors, forces.gradients, self.lr)
            stays = questions.rarely and self.tol  # where all have settled, until somebody asks
            errors = (
                [torch.where(arrival.over > 0, x, y) for x, y in zip(errors, ahead, strict=True)] if stays else ahead
            )
        residual = norms[-1] / norms[0].clamp_min(torch.finfo(norms[0].dtype).tiny)
        status: Status = "fixed"
        if self.tol:
            steps, status = arrival.steps, "converged" if arrival.arrived else "max_steps"
            del energies[steps + 1 :]
        point = list(landscape.no_errors)
        return Relaxation(point, "errors", status, steps, residual, energies, local_error=errors)
