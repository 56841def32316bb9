"""Descent on the errors instead of the states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer, checked_lr, checked_tol
from lightning_ebm.relaxers.descend import descend
from lightning_ebm.relaxers.fixed_steps import fixed_steps


@dataclass(frozen=True)
class ErrorCoordinates(Relaxer):
    """x_l = rho(a_l) + e_l with a_l computed from the displaced parents; e <- e - lr (e + lambda/Pi dL/de), from e = 0.

    The same energy and the same equilibria as descent on the states (x <-> e is a bijection), but the signal reaches
    every layer in one step, the condition number is that of 1 + lambda J' d2L J instead of the chain's, and e itself
    is stored, so tiny nudges lose no digits. With ``lr=1`` it is the fixed-point map e <- -lambda/Pi dL/de. The price,
    to be plain about it: the *relaxation* sends dL/de through all layers, as backprop does; the update stays local.

    With ``tol > 0`` (the default) each sample chooses its step from the curvature it meets, starting at `lr`, and stops
    by itself, at `tol` of the force it started with; where the minimum is a kink (ReLU, max pooling), at which no force
    ever vanishes, once hardly any energy is left to gain: a thousandth of what was gained, or `tol` squared of it.
    Samples that see each other relax as one, by quasi-Newton steps. With ``tol=0`` it is `max_steps` steps of `lr`.

    Args:
        max_steps: how many passes at most, or exactly with ``tol=0``.
        lr: (first) step size; 1 is the fixed-point map.
        tol: relative force at which a sample has settled.

    Raises:
        ConfigurationError: an argument out of range.

    Source:
        Goemaere et al. 2025 (arXiv 2505.20137); measured in the metric of the precision.
    """

    needs_error_coordinates: ClassVar[bool] = True
    complex_states: ClassVar[bool] = True

    max_steps: int = 64
    lr: float = 1.0
    tol: float = 1e-3

    def __post_init__(self) -> None:
        checked.keep(
            self,
            max_steps=checked.count(self, "max_steps", self.max_steps),
            tol=checked_tol(self, self.tol),
            lr=checked_lr(self, self.lr, 1.0),
        )

    @property
    def trusts_energy(self) -> bool:
        return self.tol > 0

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: complex) -> Relaxation:
        del start  # nobody else may have to hold it
        return self.relax_errors(landscape, strength)

    def relax_errors(self, landscape: Landscape, strength: complex, least: Tensor | None = None) -> Relaxation:
        """The relaxation, from e = 0.

        Args:
            landscape: as in `relax`.
            strength: lambda.
            least: force of each sample that may be rounding alone, ``(B,)``, where it is a difference of larger ones.
        """
        errors = list(landscape.no_errors)
        if self.tol and not isinstance(strength, complex):
            longest = max(1.0, self.lr)  # the curvature 1 + lambda J' d2L J is at least 1 where the loss is convex
            return descend(landscape, "errors", errors, strength, self.lr, self.max_steps, self.tol, longest, least)
        return fixed_steps(self, landscape, "errors", None, errors, strength, self.max_steps, self.lr)
