"""Euler steps on the states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import Landscape
from lightning_ebm.evaluations.descent_step import moved
from lightning_ebm.relaxers.base import Relaxation, Relaxer, Stepper, checked_lr, checked_tol
from lightning_ebm.relaxers.descend import descend
from lightning_ebm.relaxers.fixed_steps import fixed_steps


@dataclass(frozen=True)
class GradientDescent(Relaxer):
    """x <- x - lr dE/dx, all layers at once (Jacobi), from the free point.

    With ``tol=0`` exactly `max_steps` steps of exactly `lr` are taken; a run that diverges raises. With ``tol > 0``
    every sample stops by itself once its force has fallen to `tol` of what it started with, and steps that overshoot
    are shortened, never lengthened beyond `lr`. Samples that see each other relax as one, by quasi-Newton steps of
    which `lr` is the first.

    The trap: float32 keeps x = prediction + error with an error of 1e-7 / lambda in the update. Below lambda = 1e-3
    use `ErrorCoordinates`.

    Args:
        lr: step size, in units of state per force.
        max_steps: how many steps, or how many at most.
        tol: relative force at which a sample has settled.

    Raises:
        ConfigurationError: an argument out of range.

    Source:
        Whittington and Bogacz 2017; simultaneous steps as in Song et al. 2020.
    """

    complex_states: ClassVar[bool] = True

    lr: float = 0.1
    max_steps: int = 20
    tol: float = 0.0

    def __post_init__(self) -> None:
        checked.keep(
            self,
            max_steps=checked.count(self, "max_steps", self.max_steps),
            tol=checked_tol(self, self.tol),
            lr=checked_lr(self, self.lr, 0.1),
        )

    @property
    def trusts_energy(self) -> bool:
        return self.tol > 0

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: complex) -> Relaxation:
        if self.tol and not isinstance(strength, complex):
            return descend(landscape, "states", start, strength, self.lr, self.max_steps, self.tol, longest=self.lr)

        point = list(start)
        del start  # nobody else may have to hold it
        return fixed_steps(self, landscape, "states", None, point, strength, self.max_steps, self.lr)

    @property
    def steps_one_by_one(self) -> int:
        return self.max_steps

    def stepper(self, start: Sequence[Tensor]) -> Stepper:
        return self._euler

    def _euler(self, states: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        return moved(states, gradients, self.lr)
