"""The squared prediction error of predictive coding."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_ebm.energies.base import LayerView, QuadraticEnergy
from lightning_ebm.energies.learned_precision import LearnedPrecision
from lightning_ebm.errors import ConfigurationError

Precision = float | Tensor


@dataclass(frozen=True)
class PredictiveCoding(QuadraticEnergy):
    """I = sum_l 1/2 Pi_l |x_l - rho(a_l)|^2, per sample.

    Its free equilibrium is the forward pass. As the nudge goes to 0 the update is backprop's whatever the precision:
    Pi_l (x_l - rho(a_l)) -> -lambda delta_l, so compare Pi * error with delta, never the bare error.

    Args:
        precision: Pi > 0, the inverse variance: one number for every layer; a tensor that broadcasts against the units
            of every layer; or ``{layer name: number or tensor}``, layers not named having 1; or a `LearnedPrecision`.

    Raises:
        ConfigurationError: a precision is not positive and finite, or names a layer that there is not.

    Source:
        Rao and Ballard 1999; Whittington and Bogacz 2017; Millidge et al. 2023 (arXiv 2206.02629).
    """

    reads_drive: ClassVar[bool] = False

    precision: Precision | Mapping[str, Precision] | LearnedPrecision = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.precision, LearnedPrecision):
            return
        given = self.precision.values() if isinstance(self.precision, Mapping) else [self.precision]
        for value in given:
            tensor = torch.as_tensor(value)
            if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
                raise ConfigurationError(
                    f"PredictiveCoding(precision={value!r}): a precision is an inverse variance and must be a"
                    " positive finite number; with any other the energy has no minimum. Try precision=1.0."
                )

    def layer_precision(self, layer: LayerView) -> Precision:
        if isinstance(self.precision, LearnedPrecision):
            return self.precision.of(layer.name, layer.prediction)
        value = self.precision.get(layer.name, 1.0) if isinstance(self.precision, Mapping) else self.precision
        return value.detach().to(layer.prediction) if isinstance(value, Tensor) else value

    def check_layers(self, names: Collection[str]) -> None:
        if not isinstance(self.precision, Mapping):
            return
        for name in self.precision:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1) or list(names)[:3]
                raise ConfigurationError(
                    f"PredictiveCoding(precision={{{name!r}: ...}}): no layer of that name carries a state, so this"
                    f" precision would be used nowhere. Nearest: {close}; ebm.summary lists the layers."
                )

    def observe(self, errors: Callable[[], Mapping[str, Tensor]]) -> None:
        if isinstance(self.precision, LearnedPrecision):
            for name, error in errors().items():
                self.precision.observe(name, error)

    def state_dict(self) -> dict[str, Any]:
        """What is learned beside the parameters: the precisions."""
        return self.precision.state_dict() if isinstance(self.precision, LearnedPrecision) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        if isinstance(self.precision, LearnedPrecision):
            self.precision.load_state_dict(state)
