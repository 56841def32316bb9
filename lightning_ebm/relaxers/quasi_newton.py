"""Descent along directions that remember the curvature met before: for equilibria, rather than a few steps."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import ErrorForces, Forces, Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer, Status, checked_tol

_TRIES = 12
"""Shortenings of one step after which a sample is taken to sit at a kink."""


class _Pair(NamedTuple):
    """A step s, the change y of the force along it, and 1 / <s, y> of each sample; 0 is nothing to learn from."""

    step: list[Tensor]
    change: list[Tensor]
    inverse: Tensor


@dataclass(frozen=True)
class QuasiNewton(Relaxer):
    """x <- x - a H g with H the limited-memory BFGS estimate of the inverse Hessian, for each sample its own.

    What plain descent needs thousands of steps for (inputs without a prior of their own, deep chains, large weights)
    takes some tens. The step length a starts at 1, and is shortened for the samples whose force along it has turned
    round. Samples that see each other (BatchNorm in training, a loss across the batch) are found out at the end, by a
    force that is not what it was, and go on as one.

    Args:
        max_steps: how many evaluations at most.
        memory: how many pairs of steps and changes of force are remembered, each as large as two points.
        tol: relative force at which a sample has settled.
        coordinates: "errors", x_l = mu_l + e_l, for quadratic energies; "states", for any that is smooth.

    Raises:
        ConfigurationError: an argument out of range.
        RelaxationDivergedError: (in use) states ran away.
    """

    max_steps: int = 500
    memory: int = 10
    tol: float = 1e-6
    coordinates: Literal["states", "errors"] = "errors"

    @property
    def needs_error_coordinates(self) -> bool:
        return self.coordinates == "errors"

    def __post_init__(self) -> None:
        checked.keep(
            self,
            max_steps=checked.count(self, "max_steps", self.max_steps),
            memory=checked.count(self, "memory", self.memory),
            tol=checked_tol(self, self.tol),
            coordinates=checked.choice(self, "coordinates", self.coordinates, ("states", "errors")),
        )

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        descent = _Descent(self, landscape, start, strength)
        while not descent.ended():
            descent.step()
        return descent.result()


class _Descent:
    """One relaxation; all numbers of a sample are ``(B,)``."""

    def __init__(self, relaxer: QuasiNewton, landscape: Landscape, start: Sequence[Tensor], strength: float) -> None:
        self.relaxer, self.landscape, self.strength = relaxer, landscape, strength
        in_states = relaxer.coordinates == "states"
        self.steps, self.as_one = 0, False
        self.point = list(start if in_states else landscape.no_errors)
        self.energies: list[Tensor] = []
        self.gradients = self._evaluate(self.point)
        self.first = self.norm = self._norm(self.gradients)
        size = landscape.norms(start)
        self.rounding = (4 * torch.finfo(size.dtype).eps * size) if in_states else torch.zeros_like(size)
        self.pairs: deque[_Pair] = deque(maxlen=relaxer.memory)
        self.length = torch.ones_like(self.first)
        self.tries = torch.zeros_like(self.first)
        self.direction: list[Tensor] = []
        self.slope = self.first
        self.measured = True

    def _evaluate(self, point: list[Tensor]) -> list[Tensor]:
        what = Forces() if self.relaxer.coordinates == "states" else ErrorForces()
        forces = self.landscape.evaluate(what, point, self.strength)
        self.energies.append(forces.total(self.strength))
        return forces.gradients

    def _dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        if self.relaxer.coordinates == "errors":  # forces are gradients in that metric
            found = self.landscape.metric(left, right)
        else:
            found = self.landscape.products(left, right, range(len(left)))
        return found.sum().expand_as(found) if self.as_one else found

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return self._dot(gradients, gradients).clamp_min(0).sqrt()

    @property
    def settled(self) -> Tensor:
        floor = max(self.relaxer.tol, 4 * self.landscape.rounding)
        return self.norm <= (floor * self.first).maximum(self.rounding)

    @property
    def stalled(self) -> Tensor:
        return self.tries > _TRIES

    def ended(self) -> bool:
        """Whether nothing is left to do; looks at the point as a whole before it says so."""
        if self.steps < self.relaxer.max_steps and not bool((self.settled | self.stalled).all()):
            return False
        if self.measured:
            return True
        before = self.norm
        self.gradients, self.measured = self._evaluate(self.point), True
        self.energies.pop(-2)
        self.norm = self._norm(self.gradients)
        changed = (self.norm - before).abs() > 1e-3 * before + 1e-3 * self.first * self.relaxer.tol
        if self.as_one or self.steps >= self.relaxer.max_steps or not bool((changed & ~self.settled).any()):
            return True
        self.as_one = True
        self.first, self.norm = self._norm_of(self.first), self._norm(self.gradients)
        self.pairs.clear()
        self.direction, self.tries, self.length = [], torch.zeros_like(self.tries), torch.ones_like(self.length)
        return bool(self.settled.all())

    @staticmethod
    def _norm_of(norms: Tensor) -> Tensor:
        return torch.linalg.vector_norm(norms).expand_as(norms)  # type: ignore[no-any-return]

    def step(self) -> None:
        """One evaluation: every sample that is still moving is tried a step further on."""
        landscape = self.landscape
        moving = ~(self.settled | self.stalled)
        if not self.direction:
            self._aim()
        reach = torch.where(moving, self.length, 0)
        ahead = self._added(self.point, reach, self.direction)
        if self.relaxer.coordinates == "states":
            ahead = landscape.feasible(ahead)
        gradients = self._evaluate(ahead)
        self.steps += 1
        slope = self._dot(gradients, self.direction)
        kept = moving & (slope <= 0.9 * self.slope.abs())  # nan is not
        if self.as_one:
            kept = kept.all().expand_as(kept)
        change = [torch.where(k, h - g, 0) for k, g, h in self._rows(kept, self.gradients, gradients)]
        step = [torch.where(k, y - x, 0) for k, x, y in self._rows(kept, self.point, ahead)]
        curved = self._dot(step, change)
        enough = curved > 1e-12 * (self._dot(step, step) * self._dot(change, change)).sqrt()
        self.pairs.append(_Pair(step, change, torch.where(enough, 1 / curved.masked_fill(~enough, 1), 0)))
        whole = bool(kept.all())
        self.point = ahead if whole else [x + s for x, s in zip(self.point, step, strict=True)]
        self.gradients = gradients if whole else [g + c for g, c in zip(self.gradients, change, strict=True)]
        self.norm, self.measured = self._norm(self.gradients), whole
        self._check()
        turned = slope - self.slope
        shorter = (-self.slope / turned.masked_fill(turned == 0, 1)).clamp(0.1, 0.5).nan_to_num(0.1)
        self.tries = torch.where(kept, 0, self.tries + moving)
        self.length = torch.where(kept, 1.0, self.length * shorter)
        self._aim(kept)

    def _aim(self, kept: Tensor | None = None) -> None:
        """-H g, for the samples that have moved; -g where that leads uphill or nothing is known."""
        new = [-g for g in self.gradients]
        shares: list[Tensor] = []
        for pair in reversed(self.pairs):
            shares.append(pair.inverse * self._dot(pair.step, new))
            new = self._added(new, -shares[-1], pair.change)
        scale = torch.zeros_like(self.first)
        for pair in self.pairs:  # <s, y> / <y, y> of the last that there is
            size = self._dot(pair.change, pair.change)
            now = (pair.inverse > 0) & (size > 0)
            scale = torch.where(now, 1 / (pair.inverse * size).masked_fill(~now, 1), scale)
        known = scale > 0
        # The first step is as long as the force, and no longer than 1 a unit would be.
        scale = torch.where(known, scale, 1.0)
        new = [r * x for r, x in zip(self.landscape.spread(scale, new), new, strict=True)]
        for pair, share in zip(self.pairs, reversed(shares), strict=True):
            new = self._added(new, share - pair.inverse * self._dot(pair.change, new), pair.step)
        slope = self._dot(self.gradients, new)
        down = slope < 0
        new = [torch.where(d, x, -g) for d, x, g in self._rows(down, new, self.gradients)]
        slope = torch.where(down, slope, -self.norm.square())
        if kept is None or not self.direction:
            self.direction, self.slope = new, slope
        else:  # a sample that was sent back tries the same way again
            self.direction = [torch.where(k, x, d) for k, x, d in self._rows(kept, new, self.direction)]
            self.slope = torch.where(kept, slope, self.slope)

    def _added(self, point: Sequence[Tensor], factors: Tensor, direction: Sequence[Tensor]) -> list[Tensor]:
        spread = self.landscape.spread(factors, list(point))
        return [torch.addcmul(x, f, d) for x, f, d in zip(point, spread, direction, strict=True)]

    def _rows(self, which: Tensor, *lists: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """A truth value a sample, beside each layer's tensors."""
        spread = self.landscape.spread(which.to(self.first.dtype), list(lists[0]))
        return [(w > 0, *tensors) for w, *tensors in zip(spread, *lists, strict=True)]

    def _check(self) -> None:
        if not bool((self.norm <= 1e6 * self.first.maximum(self.first.mean())).all()):
            raise RelaxationDivergedError(
                f"QuasiNewton ran away at nudge {self.strength:g} after {self.steps} steps: the force grew to"
                f" {float((self.norm / self.first.clamp_min(1e-30)).max()):.3g} times its start, so that the energy has"
                " no minimum nearby. Take a smaller nudge, hold fewer units, or give free inputs a term of their own."
            )

    def result(self) -> Relaxation:
        """What was found."""
        moving = ~(self.settled | self.stalled)
        status: Status = "converged" if bool(self.settled.all()) else "max_steps" if bool(moving.any()) else "stalled"
        residual = self.norm / self.first.clamp_min(torch.finfo(self.first.dtype).tiny)
        return Relaxation(self.point, self.relaxer.coordinates, status, self.steps, residual, self.energies)
