"""Descent along directions that remember the curvature met before: for equilibria, rather than a few steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import ErrorForces, Forces, Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer, Status, checked_tol
from lightning_ebm.relaxers.descent import Task
from lightning_ebm.relaxers.inverse_hessian import InverseHessian
from lightning_ebm.relaxers.joint_descent import JointDescent

_TRIES = 12
"""Shortenings of one step after which a sample is taken to sit at a kink."""


@dataclass(frozen=True)
class QuasiNewton(Relaxer):
    """x <- x - a H g with H the limited-memory BFGS estimate of the inverse Hessian, for each sample its own.

    What plain descent needs thousands of steps for (inputs without a prior of their own, deep chains, large weights)
    takes some tens. The step length a starts at 1, and is shortened for the samples whose force along it has turned
    round. Samples that see each other (BatchNorm in training, a loss across the batch) have one H.

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

    @property
    def trusts_energy(self) -> bool:
        return True

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        if landscape.samples_interact:
            point = start if self.coordinates == "states" else landscape.no_errors
            task = Task(landscape, self.coordinates, point, strength, 1.0, self.tol)
            return JointDescent(task, self.memory).run(self.max_steps)
        descent = _Descent(self, landscape, start, strength)
        while not descent.ended():
            descent.step()
        return descent.result()


class _Descent:
    """One relaxation; all numbers of a sample are ``(B,)``."""

    def __init__(self, relaxer: QuasiNewton, landscape: Landscape, start: Sequence[Tensor], strength: float) -> None:
        self.relaxer, self.landscape, self.strength = relaxer, landscape, strength
        in_states = relaxer.coordinates == "states"
        self.steps = 0
        self.point = list(start if in_states else landscape.no_errors)
        self.energies: list[Tensor] = []
        self.gradients = self._evaluate(self.point)
        self.first = self.norm = self._norm(self.gradients)
        size = landscape.norms(start)
        self.rounding = (4 * torch.finfo(size.dtype).eps * size) if in_states else torch.zeros_like(size)
        self.inverse = InverseHessian(relaxer.memory, self._dot, lambda f, t: landscape.spread(f, list(t)))
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
            return self.landscape.metric(left, right)
        return self.landscape.products(left, right, range(len(left)))

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
        """Whether nothing is left to do; the energy is then that of the point as a whole."""
        if self.steps < self.relaxer.max_steps and not bool((self.settled | self.stalled).all()):
            return False
        if not self.measured:
            self.gradients, self.measured = self._evaluate(self.point), True
            self.energies.pop(-2)
            self.norm = self._norm(self.gradients)
        return True

    def step(self) -> None:
        """One evaluation: every sample that is still moving is tried a step further on."""
        landscape = self.landscape
        moving = ~(self.settled | self.stalled)
        if not self.direction:
            self._aim()
        reach = torch.where(moving, self.length, 0)
        spread = landscape.spread(reach, self.point)
        ahead = [torch.addcmul(x, f, d) for x, f, d in zip(self.point, spread, self.direction, strict=True)]
        if self.relaxer.coordinates == "states":
            ahead = landscape.feasible(ahead)
        gradients = self._evaluate(ahead)
        self.steps += 1
        slope = self._dot(gradients, self.direction)
        kept = moving & (slope <= 0.9 * self.slope.abs())  # nan is not
        whole = bool(kept.all())
        change = [h - g for g, h in zip(self.gradients, gradients, strict=True)]
        step = [y - x for x, y in zip(self.point, ahead, strict=True)]
        if not whole:
            change = [torch.where(k, c, 0) for k, c in self._rows(kept, change)]
            step = [torch.where(k, s, 0) for k, s in self._rows(kept, step)]
        self.inverse.add(step, change)
        self.point = ahead if whole else [x + s for x, s in zip(self.point, step, strict=True)]
        self.gradients = gradients if whole else [g + c for g, c in zip(self.gradients, change, strict=True)]
        self.norm, self.measured = self._norm(self.gradients), whole
        self._check()
        turned = slope - self.slope
        shorter = (-self.slope / turned.masked_fill(turned == 0, 1)).clamp(0.1, 0.5).nan_to_num(0.1)
        self.tries = torch.where(kept, 0, self.tries + moving)
        self.length = torch.where(kept, 1.0, self.length * shorter)
        self._aim(None if whole else kept)

    def _aim(self, kept: Tensor | None = None) -> None:
        """-H g, for the samples that have moved; -g where that leads uphill or nothing is known."""
        new = [-x for x in self.inverse.times(self.gradients, 1.0)]
        slope = self._dot(self.gradients, new)
        down = slope < 0
        new = [torch.where(d, x, -g) for d, x, g in self._rows(down, new, self.gradients)]
        slope = torch.where(down, slope, -self.norm.square())
        if kept is None or not self.direction:
            self.direction, self.slope = new, slope
        else:  # a sample that was sent back tries the same way again
            self.direction = [torch.where(k, x, d) for k, x, d in self._rows(kept, new, self.direction)]
            self.slope = torch.where(kept, slope, self.slope)

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
