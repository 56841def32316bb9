"""One pass from the top down."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm.evaluations import ErrorForces, Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer


@dataclass(frozen=True)
class Sweep(Relaxer):
    """One top-down Gauss-Seidel pass with unit steps: x_l - rho(a_l) = -lambda delta_l, exactly, at any lambda.

    Each layer, from the output down, moves to where its own force vanishes while everything below is still at the free
    point; with unit steps that is the displacement with which the signal *first arrives* there, and its product with
    the layer's prediction is backprop's gradient, with no limit taken. Read as an equilibrium it would not be: the
    states below have moved since. Hence its own update, "first-arrival".

    Source:
        Song et al. 2020 (zero-divergence inference learning); Salvatori et al. 2022 for any graph.
    """

    update: ClassVar[str] = "first-arrival"
    needs_error_coordinates: ClassVar[bool] = True

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        forces = landscape.evaluate(ErrorForces(), landscape.no_errors, strength)
        local_error = forces.gradients
        for k, gradient in enumerate(local_error):  # one layer at a time: nothing is held twice
            local_error[k] = -gradient
            del gradient
        settled = torch.zeros_like(forces.internal)
        energies = [strength * forces.loss.detach()]
        no_errors = list(landscape.no_errors)
        return Relaxation(no_errors, "errors", "converged", 1, settled, energies, local_error=local_error)
