"""Errors driven to zero by multipliers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import Around, Evaluation, Landscape, Slope
from lightning_ebm.evaluations.base import Result
from lightning_ebm.evaluations.with_offsets import PredictionErrors, WithOffsets
from lightning_ebm.relaxers.base import Relaxation, Relaxer
from lightning_ebm.relaxers.error_coordinates import ErrorCoordinates
from lightning_ebm.relaxers.gradient_descent import GradientDescent


@dataclass(frozen=True)
class AugmentedLagrangian(Relaxer):
    """x <- argmin_x [lambda L + sum_l mu_l' e_l + 1/2 Pi_l |e_l|^2], mu_l <- mu_l + alpha Pi_l e_l, again and again.

    The constraint e = x - rho(a) = 0 is what makes a network out of layers; its multipliers are backprop's deltas. The
    first outer step is predictive coding; each further one brings errors closer to 0 and -mu closer to lambda delta, at
    a linear rate, at any precision and without a small nudge. The update is the slope of the bracket in the parameters
    where the last inner steps ended, before the dual step that would follow: `-<mu_l + Pi_l e_l, d rho(a_l)>`, which at
    alpha = 1 are the next multipliers.

    The inner steps move errors, or states: `GradientDescent(lr, k)` takes k steps of the states between two dual steps,
    each one hop, so that credit needs as many as there are layers to arrive at the first; `ErrorCoordinates` sends it
    through all layers at once. The penalty rho is Pi / lambda; the dual step alpha is apart from it.

    The residual is what the last dual step is still off by, |e| over |mu + e|, for each sample.

    The trap: few inner steps with a large dual step are no minimization: multipliers then swing around the deltas, and
    run away beyond alpha of about 2. With one inner step take alpha well below 1.

    Args:
        outer_steps: how many dual steps.
        inner: moves errors, `ErrorCoordinates`, or states, `GradientDescent`, for given multipliers; warm-started from
            the last outer step.
        dual_lr: alpha.

    Raises:
        ConfigurationError: an argument out of range.

    Source:
        The augmented Lagrangian view of predictive coding, arXiv 2605.31022 (2026); the method is Hestenes's and
        Powell's, 1969.
    """

    update: ClassVar[str] = "multipliers"
    needs_error_coordinates: ClassVar[bool] = True

    outer_steps: int = 4
    inner: ErrorCoordinates | GradientDescent = field(default_factory=lambda: ErrorCoordinates(max_steps=64, tol=1e-3))
    dual_lr: float = 1.0

    def __post_init__(self) -> None:
        checked.keep(
            self,
            outer_steps=checked.count(self, "outer_steps", self.outer_steps),
            dual_lr=checked.number(self, "dual_lr", self.dual_lr, "a positive step size, such as 1.0", above=0),
        )
        kinds = (ErrorCoordinates, GradientDescent)
        checked.instance(self, "inner", self.inner, kinds, "ebm.ErrorCoordinates(...) or ebm.GradientDescent(...)")

    @property
    def trusts_energy(self) -> bool:
        return self.inner.trusts_energy

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        none = landscape.no_errors
        multipliers = [torch.zeros_like(error) for error in none]
        point = list(none) if self.inner.needs_error_coordinates else list(start)
        energies: list[Tensor] = []
        steps, statuses = 0, []
        for _ in range(self.outer_steps):
            found, read = self._inner_steps(landscape, point, multipliers, strength)
            if not self.inner.tol:
                landscape.questions.answered()
            point, held = found.point, multipliers
            # e is what the constraint is off by, mu + e the slope of the bracket in the prediction
            multipliers = [m + self.dual_lr * (r - m) for m, r in zip(held, read, strict=True)]
            steps += found.steps
            statuses.append(found.status)
            energies += found.energies
        worst = next(s for s in ("max_steps", "fixed", "stalled", "kink", "converged") if s in statuses)
        size = landscape.norms(read)
        off = landscape.norms([r - m for r, m in zip(read, held, strict=True)])
        residual = off / size.clamp_min(torch.finfo(size.dtype).tiny)
        return Relaxation(point, found.coordinates, worst, steps, residual, energies, local_error=read)

    def _inner_steps(
        self, landscape: Landscape, point: list[Tensor], multipliers: list[Tensor], strength: float
    ) -> tuple[Relaxation, list[Tensor]]:
        """Where the inner steps lead from a point, and mu + e there."""
        if not isinstance(self.inner, ErrorCoordinates):
            in_states = _Shifted(landscape, multipliers)
            found = self.inner.relax(in_states, point, strength)
            return found, in_states.evaluate(PredictionErrors(), found.point, strength)
        # Forces begin as what multipliers and lambda dL/de differ by, and the way back rounds in every layer.
        rounding = 16 * max(landscape.rounding, torch.finfo(multipliers[0].dtype).eps)
        in_errors = _WithMultipliers(landscape, point, multipliers)
        found = self.inner.relax_errors(in_errors, strength, rounding * landscape.norms(multipliers))
        found.point = [base + e for base, e in zip(point, found.point, strict=True)]
        return found, [m + e for m, e in zip(multipliers, found.point, strict=True)]


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


class _Shifted(Around):
    """The same in states: layers predict less by the multipliers, in units of the precision."""

    def __init__(self, landscape: Landscape, multipliers: list[Tensor]) -> None:
        super().__init__(landscape)
        self._multipliers = multipliers

    @property
    def unwatched(self) -> Landscape:
        return _Shifted(self.inner.unwatched, self._multipliers)

    def answer(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        return self.inner.evaluate(WithOffsets(what), [*point, *self._multipliers], strength)
