"""The free equilibrium to first order: where states go under a vanishing nudge.

Uses second derivatives of the network, which the rest of the library never asks for.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_ebm.energies.base import best_response, has_best_response, is_quadratic
from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import ErrorForces

if TYPE_CHECKING:
    from lightning_ebm.network.network import Network
    from lightning_ebm.program.interpreter import Pass


def forces_with_graph(network: "Network", seen: "Pass") -> list[Tensor]:
    """dI/dx at a pass, as a function of states and parameters that can be differentiated again."""
    with torch.enable_grad():
        internal = network.internal(seen).sum()
        force = torch.autograd.grad(internal, seen.states, create_graph=True, allow_unused=True)
        return [_or_zeros(f, x) for f, x in zip(force, seen.states, strict=True)]


def linear_response(
    network: "Network", states: Sequence[Tensor], tol: float | None = None, max_steps: int = 1000
) -> list[Tensor]:
    """dx/dlambda = -H^-1 dL/dx, with H = d2I/dx2 at the free equilibrium.

    Of a quadratic energy at the forward pass H = A' Pi A, with A = de/dx = 1 - J and J what states do to predictions:
    de/dlambda = -1/Pi dL/de, and dx = de + J dx comes to an end after as many rounds as there are layers.

    Of others by conjugate gradients, written as dx = D q, (1 - C D) q = -dL/dx, where D is the slope of each layer's
    best response to a pull and C = D^-1 - H what layers exert on each other: so that units at a bound of their domain,
    which no small pull moves, have slope 0 instead of an infinite curvature. An energy without a best response has
    D = 1, C = 1 - H.

    Args:
        network: of the step.
        states: the free equilibrium.
        tol: residual relative to dL/dx; None is a little above rounding.
        max_steps: of the solver.

    Raises:
        RelaxationDivergedError: H is not positive definite, so the point is no minimum; or no solution was found.
    """
    if states is network.free and is_quadratic(network.energy):
        return _response_to_errors(network)
    slope = network.loss_slopes(states)
    near = _Linearized(network, states)
    tol = 50 * torch.finfo(slope[0].dtype).eps if tol is None else tol
    solution = [torch.zeros_like(x) for x in slope]
    residual = [-g for g in slope]
    start = _dot(residual, residual)
    if float(start) == 0.0:
        return solution
    direction, answer = residual, near.responses(residual)
    size = _dot(residual, answer)
    for _ in range(max_steps):
        if float(_dot(residual, residual)) <= tol**2 * float(start) or float(size) <= 0.0:
            break
        through = near.responses(direction)
        ahead = [d - c for d, c in zip(direction, near.coupled(through), strict=True)]
        curvature = _dot(through, ahead)
        _check_minimum(curvature)
        step = size / curvature
        solution = [x + step * d for x, d in zip(solution, direction, strict=True)]
        residual = [r - step * a for r, a in zip(residual, ahead, strict=True)]
        answer = near.responses(residual)
        before, size = size, _dot(residual, answer)
        direction = [r + (size / before) * d for r, d in zip(residual, direction, strict=True)]
    else:
        _check_solved(float((_dot(residual, residual) / start).sqrt()), tol, max_steps)
    return [x.detach() for x in near.responses(solution)]


def _response_to_errors(network: "Network") -> list[Tensor]:
    own = [-g for g in network.evaluate(ErrorForces(), network.no_errors, 1.0).gradients]
    with torch.enable_grad():
        seen = network.at_states(network.free)
        above = [k for k, layer in enumerate(seen.layers) if layer.prediction.requires_grad]
        weights = [torch.zeros_like(seen.layers[k].prediction, requires_grad=True) for k in above]
        predictions = [seen.layers[k].prediction for k in above]
        # v -> J' v is linear in v, and its slope in v, along dx, is J dx.
        back = _slopes(predictions, seen.states, weights, create_graph=True)
        below = [k for k, slope in enumerate(back) if slope is not None]
        slopes = [back[k] for k in below]
    moved = own
    for _ in range(max(network.depths) - 1):
        ahead = _slopes(slopes, weights, [moved[k] for k in below], retain_graph=True)
        moved = list(own)
        for k, slope in zip(above, ahead, strict=True):
            moved[k] = own[k] if slope is None else own[k] + slope
    return moved


def _slopes(outputs: Sequence[Any], inputs: Sequence[Tensor], along: Sequence[Tensor], **graph: bool) -> Sequence[Any]:
    return torch.autograd.grad(outputs, inputs, along, allow_unused=True, **graph) if outputs else [None] * len(inputs)


def _check_minimum(curvature: Tensor) -> None:
    if float(curvature) <= 0.0:
        raise RelaxationDivergedError(
            "The free equilibrium is no minimum of the energy: there is a direction in which it falls, so no"
            " small nudge has an equilibrium nearby and there is no gradient of one. Relax the free phase"
            " further, or use smaller weights or bounded activations."
        )


def _check_solved(left: float, tol: float, max_steps: int) -> None:
    if left > max(1e3 * tol, 1e-3):
        raise RelaxationDivergedError(
            f"The linear response at the free equilibrium was not found in {max_steps} steps (residual"
            f" {left:.2g}): the energy is nearly flat there, and its gradient is not to be trusted. Use smaller"
            " weights, or a finite nudge such as ebm.Centered(0.1)."
        )


class _Linearized:
    """Graphs of the layers' own slopes and best responses at one point.

    Args:
        network: of the step.
        states: the point.
    """

    def __init__(self, network: "Network", states: Sequence[Tensor]) -> None:
        with torch.enable_grad():
            seen = network.at_states(states)
        energy, leaves = network.energy, seen.states
        self._states = leaves
        self._coupling = forces_with_graph(network, seen)
        self._pulls: list[Tensor] = []
        self._responses: list[Tensor] = []
        if not has_best_response(energy):
            return
        with torch.enable_grad():
            for k, (view, x) in enumerate(zip(network.views(seen), leaves, strict=True)):
                constant = replace(view, drive=view.drive.detach(), prediction=view.prediction.detach())
                (own,) = torch.autograd.grad(energy.layer_energy(x, constant).sum(), x, create_graph=True)
                self._coupling[k] = self._coupling[k] - own
                pull = (-self._coupling[k]).detach().requires_grad_()
                self._pulls.append(pull)
                self._responses.append(best_response(energy, pull, constant))

    def responses(self, pull: list[Tensor]) -> list[Tensor]:
        """D pull: a symmetric operator, as the slope of a gradient is."""
        if not self._pulls:
            return pull
        found = torch.autograd.grad(self._responses, self._pulls, pull, retain_graph=True, allow_unused=True)
        return [_or_zeros(f, p) for f, p in zip(found, pull, strict=True)]

    def coupled(self, moved: list[Tensor]) -> list[Tensor]:
        """C dx."""
        found = torch.autograd.grad(self._coupling, self._states, moved, retain_graph=True, allow_unused=True)
        slopes = [_or_zeros(f, m) for f, m in zip(found, moved, strict=True)]
        return [-s if self._pulls else m - s for s, m in zip(slopes, moved, strict=True)]


def _or_zeros(found: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if found is None else found


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
