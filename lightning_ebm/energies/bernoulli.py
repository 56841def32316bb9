"""Layers whose states are probabilities of two outcomes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ebm.energies.base import Energy, LayerView


@dataclass(frozen=True)
class Bernoulli(Energy):
    """`I = sum_l KL(x_l || mu_l) = x log(x / mu) + (1 - x) log((1 - x) / (1 - mu))`, per unit, for mu in (0, 1).

    For a held x that is the binary cross-entropy of mu less the entropy of x, which nothing moves: the negative
    log-likelihood of data in [0, 1], as of pixels. With a sigmoid it is computed from the drive, where nothing rounds
    to 0 or 1, and is the Fenchel-Young gap; other activations, such as a clamped linear map, must stay inside (0, 1).
    The best response is sigmoid(logit(mu) + pull).

    The trap: of states that are not held, x stays within [0, 1] by projection.
    """

    divergence: ClassVar[bool] = True
    rests_at_prediction: ClassVar[bool] = True

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        a = logit_of(layer)
        return torch.xlogy(state, state) + torch.xlogy(1 - state, 1 - state) + F.softplus(a) - state * a

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        return torch.sigmoid(logit_of(layer) + pull)

    def feasible(self, state: Tensor, layer: LayerView) -> Tensor:
        tiny = torch.finfo(state.dtype).eps
        return state.clamp(tiny, 1 - tiny)


def logit_of(layer: LayerView) -> Tensor:
    """log(mu / (1 - mu)), the drive itself where the activation is a sigmoid."""
    return layer.drive if isinstance(layer.activation, nn.Sigmoid) else torch.logit(layer.prediction)
