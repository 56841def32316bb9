"""The squared prediction error of predictive coding."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_ebm import checked
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
        given: Any = self.precision
        if isinstance(given, Mapping):
            for name in given:
                checked.instance(self, "precision", name, str, "a mapping from names of layers")
            given = {name: self._checked(value) for name, value in given.items()}
        elif not isinstance(given, LearnedPrecision):
            given = self._checked(given)
        checked.keep(self, precision=given)

    def _checked(self, value: Any) -> Precision:
        wanted = (
            "a number, or a tensor of them, or a mapping from names of layers to either. A precision is an inverse"
            " variance and must be positive and finite; with any other the energy has no minimum. Try precision=1.0"
        )
        if isinstance(value, Tensor) and value.ndim:
            real = value.is_floating_point() and value.numel() > 0 and not value.is_meta
            if not real or not bool((torch.isfinite(value) & (value > 0)).all()):
                checked.refuse(self, "precision", value, wanted)
            return value
        return checked.number(self, "precision", value, wanted, above=0)

    @property
    def _learned(self) -> LearnedPrecision | None:
        return self.precision if isinstance(self.precision, LearnedPrecision) else None

    @property
    def _named(self) -> Mapping[str, Precision]:
        """The given precisions by layer; under "" that of all layers."""
        given: Any = self.precision
        return given if isinstance(given, Mapping) else {"": given}

    @property
    def learns(self) -> bool:
        return self._learned is not None

    def layer_precision(self, layer: LayerView) -> Precision:
        if self._learned is not None:
            return self._learned.of(layer.name, layer.prediction)
        named = self._named
        value = named[""] if "" in named else named.get(layer.name, 1.0)
        if not isinstance(value, Tensor):
            return value
        pairs = zip(reversed(value.shape), reversed(layer.prediction.shape), strict=False)
        if value.ndim > layer.prediction.ndim or any(own not in (1, units) for own, units in pairs):
            units = tuple(layer.prediction.shape)
            wanted = f"a tensor that broadcasts to {units}, the state of layer {layer.name!r}; name others by a mapping"
            checked.refuse(self, "precision", value, f"{wanted}, not one of shape {tuple(value.shape)}")
        return value.detach().to(layer.prediction)

    def check_layers(self, names: Collection[str]) -> None:
        for name in self._named if self._learned is None else ():
            if name == "":
                continue
            if name not in names:
                close = checked.nearest(name, names) or list(names)[:3]
                raise ConfigurationError(
                    f"PredictiveCoding(precision={{{name!r}: ...}}): no layer of that name carries a state, so this"
                    f" precision would be used nowhere. Nearest: {close}; ebm.summary lists the layers."
                )

    def observe(self, errors: Callable[[], Mapping[str, Tensor]]) -> None:
        if self._learned is not None:
            for name, error in errors().items():
                self._learned.observe(name, error)

    def state_dict(self) -> dict[str, Any]:
        """What is learned beside the parameters: the precisions."""
        return {} if self._learned is None else self._learned.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        if self._learned is not None:
            self._learned.load_state_dict(state)
