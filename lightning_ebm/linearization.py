"""The free equilibrium to first order: where states go under a vanishing nudge, and what the update makes of it.

Uses second derivatives of the network, which the rest of the library never asks for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ebm.energies.base import best_response, has_best_response
from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.network import Network


class Linearization:
    """dI/dx as a function of states and parameters near one point.

    Args:
        network: of the step.
        states: the free equilibrium.
    """

    def __init__(self, network: Network, states: Sequence[Tensor]) -> None:
        self._network = network
        self._states = list(states)
        with torch.enable_grad():
            self._seen = seen = network.at_states(states)
            force = torch.autograd.grad(network.internal(seen).sum(), seen.states, create_graph=True, allow_unused=True)
            self._force = [_or_zeros(f, x) for f, x in zip(force, seen.states, strict=True)]

    def cross_derivative(self, displacement: Sequence[Tensor]) -> Tensor:
        """<dx, dI/dx(x_bar, theta)>, whose gradient with respect to theta is (d2I/dtheta dx) dx."""
        with torch.enable_grad():
            terms = [(d * f).sum() for d, f in zip(displacement, self._force, strict=True)]
            return torch.stack(terms).sum()

    def loss(self) -> Tensor:
        """L at the free equilibrium, summed over the batch, as a function of the parameters it depends on directly."""
        return self._network.loss(self._seen)

    def response(self, tol: float | None = None, max_steps: int = 1000) -> list[Tensor]:
        """dx/dlambda = -H^-1 dL/dx, with H = d2I/dx2 at the free equilibrium, by conjugate gradients.

        Written as dx = D q, (1 - C D) q = -dL/dx, where D is the slope of each layer's best response to a pull and
        C = D^-1 - H what layers exert on each other: so that units at a bound of their domain, which no small pull
        moves, have slope 0 instead of an infinite curvature. An energy without a best response has D = 1, C = 1 - H.

        Args:
            tol: residual relative to dL/dx; None is a little above rounding.
            max_steps: of the solver.

        Raises:
            RelaxationDivergedError: H is not positive definite, so the point is no minimum; or no solution was found.
        """
        slope = self._network.loss_slopes(self._states)
        self._open()
        eps = torch.finfo(slope[0].dtype).eps
        tol = 50 * eps if tol is None else tol
        solution = [torch.zeros_like(x) for x in slope]
        residual = [-g for g in slope]
        start = _dot(residual, residual)
        if float(start) == 0.0:
            return solution
        direction, answer = residual, self._answered(residual)
        size = _dot(residual, answer)
        for _ in range(max_steps):
            if float(_dot(residual, residual)) <= tol**2 * float(start) or float(size) <= 0.0:
                break
            through = self._answered(direction)
            ahead = [d - c for d, c in zip(direction, self._coupled(through), strict=True)]
            curvature = _dot(through, ahead)
            if float(curvature) <= 0.0:
                raise RelaxationDivergedError(
                    "The free equilibrium is no minimum of the energy: there is a direction in which it falls, so no"
                    " small nudge has an equilibrium nearby and there is no gradient of one. Relax the free phase"
                    " further, or use smaller weights or bounded activations."
                )
            step = size / curvature
            solution = [x + step * d for x, d in zip(solution, direction, strict=True)]
            residual = [r - step * a for r, a in zip(residual, ahead, strict=True)]
            answer = self._answered(residual)
            before, size = size, _dot(residual, answer)
            direction = [r + (size / before) * d for r, d in zip(residual, direction, strict=True)]
        else:
            left = float((_dot(residual, residual) / start).sqrt())
            if left > max(1e3 * tol, 1e-3):
                raise RelaxationDivergedError(
                    f"The linear response at the free equilibrium was not found in {max_steps} steps (residual"
                    f" {left:.2g}): the energy is nearly flat there, and its gradient is not to be trusted. Use smaller"
                    " weights, or a finite nudge such as ebm.Centered(0.1)."
                )
        return [x.detach() for x in self._answered(solution)]

    def _open(self) -> None:
        """Graphs of the layers' own slopes and best responses."""
        network, seen = self._network, self._seen
        energy, leaves = network.energy, seen.states
        with torch.enable_grad():
            self._coupling = list(self._force)
            self._pulls: list[Tensor] = []
            self._responses: list[Tensor] = []
            if not has_best_response(energy):
                return
            for k, (view, x) in enumerate(zip(network.views(seen), leaves, strict=True)):
                constant = type(view)(
                    view.name, view.call, view.drive.detach(), view.prediction.detach(), view.activation, view.above
                )
                (own,) = torch.autograd.grad(energy.layer_energy(x, constant).sum(), x, create_graph=True)
                self._coupling[k] = self._force[k] - own
                pull = (-self._coupling[k]).detach().requires_grad_()
                self._pulls.append(pull)
                self._responses.append(best_response(energy, pull, constant))

    def _answered(self, pull: list[Tensor]) -> list[Tensor]:
        """D pull: a symmetric operator, as the slope of a gradient is."""
        if not self._pulls:
            return pull
        found = torch.autograd.grad(self._responses, self._pulls, pull, retain_graph=True, allow_unused=True)
        return [_or_zeros(f, p) for f, p in zip(found, pull, strict=True)]

    def _coupled(self, moved: list[Tensor]) -> list[Tensor]:
        """C dx."""
        found = torch.autograd.grad(self._coupling, self._seen.states, moved, retain_graph=True, allow_unused=True)
        slopes = [_or_zeros(f, m) for f, m in zip(found, moved, strict=True)]
        return [-s if self._pulls else m - s for s, m in zip(slopes, moved, strict=True)]


def _or_zeros(found: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if found is None else found


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
