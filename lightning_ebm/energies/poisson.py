"""Layers whose states are counts or rates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm.energies.base import Energy, LayerView


@dataclass(frozen=True)
class Poisson(Energy):
    """`I = sum_l x_l log(x_l / mu_l) - x_l + mu_l`, per unit, for rates mu > 0, as softplus and exp give.

    For a held x that is the negative log-likelihood of counts x at rates mu less what only x says. The best response is
    mu exp(pull). Free states stay at or above 0 by projection.
    """

    divergence: ClassVar[bool] = True
    rests_at_prediction: ClassVar[bool] = True
    reads_drive: ClassVar[bool] = False

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        return torch.xlogy(state, state) - state * layer.prediction.log() - state + layer.prediction

    def best_response(self, pull: Tensor, layer: LayerView) -> Tensor:
        return layer.prediction * pull.exp()

    def feasible(self, state: Tensor, layer: LayerView) -> Tensor:
        return state.clamp_min(torch.finfo(state.dtype).tiny)
