"""Errors driven to zero by multipliers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import Around, Evaluation, Landscape, Slope
from lightning_ebm.evaluations.base import Result
from lightning_ebm.relaxers.base import Relaxation, Relaxer
from lightning_ebm.relaxers.error_coordinates import ErrorCoordinates


@dataclass(frozen=True)
class AugmentedLagrangian(Relaxer):
    """x <- argmin_x [lambda L + sum_l mu_l' e_l + 1/2 Pi_l |e_l|^2], mu_l <- mu_l + Pi_l e_l, `outer_steps` times.

    The constraint e = x - rho(a) = 0 is what makes a network out of layers; its multipliers are backprop's deltas. The
    first outer step is predictive coding; each further one brings errors closer to 0 and -mu closer to lambda delta, at
    a linear rate, at any precision and without a small nudge. The update reads the multipliers: `-<mu_l, d rho(a_l)>`.

    Args:
        outer_steps: how many updates of the multipliers.
        inner: relaxes the states for given multipliers, in error coordinates; warm-started from the last outer step.

    Raises:
        ConfigurationError: an argument out of range.

    Source:
        The augmented Lagrangian view of predictive coding, arXiv 2605.31022 (2026); the method is Hestenes's and
        Powell's, 1969.
    """

    update: ClassVar[str] = "multipliers"
    needs_error_coordinates: ClassVar[bool] = True

    outer_steps: int = 4
    inner: ErrorCoordinates = field(default_factory=lambda: ErrorCoordinates(max_steps=64, tol=1e-3))

    def __post_init__(self) -> None:
        checked.keep(self, outer_steps=checked.count(self, "outer_steps", self.outer_steps))
        checked.instance(self, "inner", self.inner, ErrorCoordinates, "ebm.ErrorCoordinates(...)")

    @property
    def trusts_energy(self) -> bool:
        return self.inner.trusts_energy

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        multipliers = [torch.zeros_like(error) for error in landscape.no_errors]
        point = list(landscape.no_errors)
        energies: list[Tensor] = []
        steps, statuses = 0, []
        for _ in range(self.outer_steps):
            shifted = _WithMultipliers(landscape, point, multipliers)
            found = self.inner.relax(shifted, start, strength)
            point = [base + error for base, error in zip(point, found.point, strict=True)] if steps else found.point
            multipliers = [m + error for m, error in zip(multipliers, point, strict=True)]
            steps += found.steps
            statuses.append(found.status)
            energies += found.energies
        worst = next(s for s in ("max_steps", "fixed", "stalled", "kink", "converged") if s in statuses)
        return Relaxation(point, "errors", worst, steps, found.residual, energies, local_error=multipliers)


class _WithMultipliers(Around):
    """The landscape with mu added, mu in units of the precision, seen from the errors reached so far."""

    def __init__(self, landscape: Landscape, base: list[Tensor], multipliers: list[Tensor]) -> None:
        super().__init__(landscape)
        self._base = base
        self._multipliers = multipliers

    @property
    def unwatched(self) -> Landscape:
        return _WithMultipliers(self.inner.unwatched, self._base, self._multipliers)

    def answer(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        at_base = all(error is none for error, none in zip(point, self.no_errors, strict=True))
        here = self._base if at_base else [b + e for b, e in zip(self._base, point, strict=True)]

        def with_multipliers(slope: Slope) -> Slope:
            gradients = [g + m for g, m in zip(slope.gradients, self._multipliers, strict=True)]
            return Slope(slope.internal + self.inner.metric(self._multipliers, here), slope.loss, gradients)

        return what.with_slope(self.inner.evaluate(what, here, strength), with_multipliers)
