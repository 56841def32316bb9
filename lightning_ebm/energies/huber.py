"""Errors that cost little more than their size once they are large."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.energies.base import Energy, LayerView


@dataclass(frozen=True)
class Huber(Energy):
    """`I = sum_l Pi h(x_l - mu_l)`, h(e) = e^2 / 2 up to |e| = delta and delta (|e| - delta / 2) beyond, per unit.

    Robust to outliers: no unit pulls with more than Pi delta. As delta -> 0 with Pi = 1 / (b delta) it becomes the
    Laplace energy |e| / b, whose kink at 0 has no slope to settle by; `laplace` makes one that is smooth within delta.
    It has no best response: under a pull beyond Pi delta nothing holds a unit.

    Args:
        delta: where squares end.
        precision: Pi > 0.

    Raises:
        ConfigurationError: a number that is not positive and finite.
    """

    divergence: ClassVar[bool] = True
    reads_drive: ClassVar[bool] = False

    delta: float = 1.0
    precision: float = 1.0

    def __post_init__(self) -> None:
        wanted = (
            "a positive finite number; at delta = 0 every error is at a kink. Take ebm.Huber.laplace(scale, delta=1e-2)"
        )
        checked.keep(
            self,
            delta=checked.number(self, "delta", self.delta, wanted, above=0),
            precision=checked.number(self, "precision", self.precision, wanted, above=0),
        )

    @classmethod
    def laplace(cls, scale: float = 1.0, delta: float = 1e-2) -> "Huber":
        """|e| / scale, rounded off within delta of 0."""
        scale = checked.number("Huber.laplace", "scale", scale, "a positive number", above=0)
        delta = checked.number("Huber.laplace", "delta", delta, "a positive number", above=0)
        return cls(delta, 1 / (scale * delta))

    def layer_energy(self, state: Tensor, layer: LayerView) -> Tensor:
        error = state - layer.prediction
        inside = error.clamp(-self.delta, self.delta)
        return self.precision * inside * (error - 0.5 * inside)
