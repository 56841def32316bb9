"""Descent on a batch whose samples see each other: one system, whose energy is known."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ebm.evaluations import Slope
from lightning_ebm.relaxers.base import Status, force_norm
from lightning_ebm.relaxers.descent import Descent, Task
from lightning_ebm.relaxers.inverse_hessian import InverseHessian

PAIRS = 3
"""Each is as large as two points, and costs two scalar products and two sums a step; six took a tenth less steps."""
_SUFFICIENT = 1e-4
"""Of what the slope promises, how much a step must gain (Armijo)."""
_TURNED = 0.5
"""Of the slope, how much may push back at the end of a step: beyond lies another valley."""
_FAR = 0.3
"""Of the first force: above, curvatures of some steps ago are those of another place, and only the last is kept."""
_TRIALS = 8
"""On one line; a hundredth of the way is enough to tell a kink from a slope."""


class JointDescent(Descent):
    """x <- x - t H g with all states of the batch at once, H the inverse Hessian as far as the last steps tell.

    Limited-memory BFGS (Nocedal 1980), with a line search on the energy of the batch: the step 1 where it gains enough,
    else the least point of the cubic through both ends. Where the energy only differs by rounding, the slopes decide
    (Hager and Zhang 2005). Tolerance and residual are those of the mean square of the first forces of the batch.

    Args:
        task: what it is about.
        memory: see `InverseHessian`.
    """

    window = 6

    def __init__(self, task: Task, memory: int = PAIRS) -> None:
        super().__init__(task)
        self.first = self.first.square().mean().sqrt().expand_as(self.first)
        self.settled_at = self.tolerance(self.first)
        own = self.landscape.products(self.gradients, self.gradients, range(len(self.gradients)))
        self._weighted = self.coordinates == "errors" and not torch.allclose(
            self.landscape.metric(*[self.gradients] * 2), own
        )
        self._inverse = InverseHessian(memory, self._dot, _beside)
        self._nowhere: Status | None = None

    def status(self, max_steps: int) -> Status | None:
        """See `Descent.status`."""
        return super().status(max_steps) or self._nowhere

    def step(self) -> None:
        """A line search along the quasi-Newton direction; along the force itself where that leads nowhere."""
        direction = [-x for x in self._inverse.times(self.gradients, self.lr)]
        slope = self._dot(self.gradients, direction)
        if self._inverse and not bool(slope < 0):
            self._inverse.forget()
            return self.step()
        length, turned, squares = 1.0, 0, self.norm.square().sum()
        for _ in range(_TRIALS):
            self.steps += 1
            trial = [torch.add(x, d, alpha=length) for x, d in zip(self.point, direction, strict=True)]
            trial = self.landscape.feasible(trial) if self.coordinates == "states" else trial
            forces, reached = self.evaluate(trial)
            ahead, rise = self._dot(forces.gradients, direction), reached - self.energy
            level = (rise.abs() <= self.noise(forces)) | (not self.landscape.conservative)
            level = level & (ahead <= -0.9 * slope)
            gains = (rise <= _SUFFICIENT * length * slope) & (ahead <= -_TURNED * slope)
            if bool(gains | level):
                self.gained = self.gained - 0.5 * length * (slope + ahead)
                self.gain_left.note(-0.5 * length * slope, squares)
                return self._keep(trial, forces, reached)
            self.energies.append(self.energy)
            turned += int(ahead > -0.5 * slope)
            length = _between(length, float(slope), float(ahead), float(rise))
        self.gain_left.note(-0.5 * length * slope, squares)
        if self._inverse:
            self._inverse.forget()
        else:  # however short, the steps led into a force that pushes back, as at a kink; or into none, as in rounding
            self._nowhere = "kink" if turned == _TRIALS else "stalled"
        return None

    def _dot(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """The scalar product in which the gradients are the energy's slope."""
        if self._weighted:
            return self.landscape.metric(a, b).sum()
        return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)]).sum()

    def _keep(self, trial: list[Tensor], forces: Slope, reached: Tensor) -> None:
        move = [y - x for x, y in zip(self.point, trial, strict=True)]
        turn = [h - g for g, h in zip(self.gradients, forces.gradients, strict=True)]
        if bool(self.norm.square().mean() > _FAR**2 * self.first[0].square()):
            self._inverse.forget()
        self._inverse.add(move, turn)
        self.point, self.gradients, self.energy = trial, forces.gradients, reached
        self.norm = force_norm(self.landscape, self.gradients)
        self.energies.append(reached)


def _beside(factor: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """One number of the batch multiplies every layer."""
    return [factor] * len(tensors)


def _between(length: float, slope: float, ahead: float, rise: float) -> float:
    """The least point of the cubic with these slopes at both ends of a step and this rise, a tenth to half of it."""
    bend = slope + ahead - 3 * rise / length
    root = max(bend * bend - slope * ahead, 0.0) ** 0.5
    bottom = ahead - slope + 2 * root
    share = 1 - (ahead + root - bend) / bottom if bottom else 0.5
    return length * (min(max(share, 0.1), 0.5) if share == share else 0.1)
