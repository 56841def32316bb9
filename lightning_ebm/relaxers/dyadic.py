"""Pairs of states that carry activity in their mean and the error in their difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import DyadicStates, Energy, Landscape
from lightning_ebm.questions import Arrival
from lightning_ebm.relaxers.base import Relaxation, Relaxer, Status, checked_tol, force_norm
from lightning_ebm.relaxers.fixed_point import rounding_of


@dataclass(frozen=True)
class Dyadic(Relaxer):
    """z_l^+- = rho(a_l(z_bar) +- 1/2 W_{l+1}' (z^+ - z^-)_{l+1}), z_bar = (z^+ + z^-) / 2, until the means settle.

    Both phases of a centered nudge at once: the output is pulled by +-lambda/2. Each round is one pass at the means and
    one way down; where rho is linear between the pair (ReLU away from its kink), the first round is exact already. The
    update contrasts the energies of the two halves at the drives of their mean, -(z^+ - z^-) da/dtheta. Energies are
    those of the means at the start and the end: no round needs them.

    Args:
        max_steps: how many rounds, or how many at most.
        tol: stop when the means move by less than this fraction of the pairs' distance, or by rounding alone; 0 takes
            exactly `max_steps`.

    Raises:
        ConfigurationError: an argument out of range.

    Source:
        Hoier, Staudt, Zach, ICML 2023; Hoier and Zach, ICML 2024 (arXiv 2402.08573), with alpha = 1/2.
    """

    update: ClassVar[str] = "dyadic"

    max_steps: int = 30
    tol: float = 1e-6

    def __post_init__(self) -> None:
        checked.keep(
            self,
            max_steps=checked.count(self, "max_steps", self.max_steps),
            tol=checked_tol(self, self.tol),
        )

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        mean = list(start)
        del start  # nobody else may have to hold it
        energies: list[Tensor] = []
        steps = 0
        arrival = Arrival(landscape.questions, mean[0].device)
        while True:
            ahead, behind, forces = landscape.evaluate(DyadicStates(energies=not steps), mean, strength)
            if not steps:
                energies.append(forces.total(strength))
            norm = force_norm(landscape, forces.gradients)
            apart = force_norm(landscape, (p - q for p, q in zip(ahead, behind, strict=True)))
            settled = norm <= (self.tol * apart).maximum(rounding_of(landscape, mean))
            last = steps == self.max_steps
            if (self.tol and arrival.look(settled, steps, last)) or last:
                break
            steps += 1
            # Samples that have settled stay where their drives were read; at first only if all have.
            stay = settled if self.tol and steps > 1 else settled & (arrival.over > 0)
            masks = landscape.spread(stay, mean)
            del ahead, behind  # as large as the means, each: not held through the next round
            for k, (mask, gradient) in enumerate(zip(masks, forces.gradients, strict=True)):
                mean[k] = torch.where(mask, mean[k], mean[k] - gradient)
            del forces, gradient, masks, mask
        del forces
        if steps:
            # Whoever watches has seen it with the pairs.
            energies.append(landscape.unwatched.evaluate(Energy(), mean, strength))
        residual = norm / apart.clamp_min(torch.finfo(norm.dtype).tiny)
        status: Status = "fixed"
        if self.tol:
            steps, status = arrival.steps, "converged" if arrival.arrived else "max_steps"
        return Relaxation(mean, "states", status, max(steps, 1), residual, energies, dyadic_states=(ahead, behind))
