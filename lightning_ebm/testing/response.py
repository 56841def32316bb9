"""Whether an energy's best response is the minimum that it is said to be."""

import torch

from lightning_ebm.energies.base import best_response, has_best_response
from lightning_ebm.network.network import Network
from lightning_ebm.testing.problem import Problem


def check_response(network: Network, problem: Problem) -> None:
    """argmin_x e(x, a) - <pull, x> has no slope in x, but for those that the domain of x holds against."""
    energy = network.energy
    if not has_best_response(energy):
        return
    for view in network.views(network.at_states(network.free)):
        pull = 0.1 * problem.drawn(*view.prediction.shape)
        state = best_response(energy, pull, view).detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(energy.layer_energy(state, view).sum(), state)
        left = float(energy.tangent(slope - pull, state.detach(), view).abs().max())
        assert left < 1e-6, (
            f"{type(energy).__name__}.best_response of layer {view.name!r} is no minimum of layer_energy less the pull:"
            f" a slope of {left:.2g} is left where it leads."
        )
