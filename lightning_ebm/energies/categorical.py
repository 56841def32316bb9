"""Layers whose states are probabilities of several outcomes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_ebm import checked
from lightning_ebm.energies.base import Energy, LayerView
from lightning_ebm.errors import ConfigurationError


@dataclass(frozen=True)
class Categorical(Energy):
    """`I = sum_l KL(x_l || mu_l) = sum_c x_c log(x_c / mu_c)` for probabilities along one dimension, as of a softmax.

    For a held one-hot x that is the cross-entropy. With nn.Softmax it is computed from the drive; other activations
    must give positive numbers that sum to 1. The best response is softmax(log mu + pull). Free states are kept on the
    simplex, and forces tangent to it.

    Args:
        dim: of the classes, counted as the state has it, samples included.

    Raises:
        ConfigurationError: (in use) a softmax along another dimension.
    """

    divergence: ClassVar[bool] = True
    rests_at_prediction: ClassVar[bool] = True

    dim: int = 1

    def __post_init__(self) -> None:
        checked.keep(self, dim=checked.count(self, "dim", self.dim, least=-64, most=64))

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        return torch.xlogy(state, state) - state * self._log_prediction(layer) - state + layer.prediction

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        return torch.softmax(self._log_prediction(layer) + pull, self.dim)

    def feasible(self, state: Tensor, layer: LayerView) -> Tensor:
        excess = (1 - state.sum(self.dim, keepdim=True)) / state.shape[self.dim]
        inside = (state + excess).clamp_min(torch.finfo(state.dtype).eps)
        return inside / inside.sum(self.dim, keepdim=True)

    def tangent(self, gradient: Tensor, state: Tensor, layer: LayerView) -> Tensor:
        return gradient - gradient.mean(self.dim, keepdim=True)

    def _log_prediction(self, layer: LayerView) -> Tensor:
        if not isinstance(layer.activation, nn.Softmax):
            return layer.prediction.log()
        along = layer.activation.dim
        if along is None or along % layer.drive.ndim != self.dim % layer.drive.ndim:
            raise ConfigurationError(
                f"Categorical(dim={self.dim}): the softmax of layer {layer.name!r} is along dimension {along}. Give"
                f" Categorical(dim={along}), so that probabilities of the same outcomes are compared."
            )
        return torch.log_softmax(layer.drive, self.dim)
