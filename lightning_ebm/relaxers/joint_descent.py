"""Descent on a batch whose samples see each other: one system, whose energy is known."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ebm.relaxers.base import Relaxation, Status, force_norm
from lightning_ebm.relaxers.descent import Descent, Task
from lightning_ebm.relaxers.inverse_hessian import InverseHessianOfOne

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

    All layers are one vector u, in which the scalar product is the plain one: the states, or sqrt(Pi) times the errors.

    Args:
        task: what it is about.
        memory: see `InverseHessianOfOne`.
    """

    window = 6

    def __init__(self, task: Task, memory: int = PAIRS) -> None:
        super().__init__(task)
        self.first = self.first.square().mean().sqrt().expand_as(self.first)
        self.settled_at = self.tolerance(self.first)
        self._sizes = [x.numel() for x in self.point]
        self._over_root: Tensor | None = None
        if self.coordinates == "errors":
            ones = [torch.ones_like(x) for x in self.point]
            over_root = self.landscape.over_root_precision(ones)
            if any(x is not one for x, one in zip(over_root, ones, strict=True)):
                self._over_root = torch.cat([x.flatten() for x in over_root])
        self._here, self._force = self._vector(self.point), self._vector(self.gradients)
        self._inverse = InverseHessianOfOne(memory)
        self._far = _FAR**2 * float(self.first_squares)
        self._nowhere: Status | None = None
        self._since_wall = math.inf  # line searches
        self._most = 0

    def run(self, max_steps: int) -> Relaxation:
        """See `Descent.run`."""
        self._most = max_steps
        return super().run(max_steps)

    def status(self, max_steps: int) -> Status | None:
        """See `Descent.status`."""
        return super().status(max_steps) or self._nowhere

    @property
    def at_wall(self) -> Tensor:
        """See `Descent.at_wall`."""
        return torch.tensor(self._since_wall <= self.window, device=self.energy.device)

    def step(self) -> None:
        """A line search along the quasi-Newton direction; along the force itself where that leads nowhere."""
        back = self._inverse.times(self._force, self.lr)
        squares, downhill = self.norm.square().sum(), torch.dot(self._force, back)
        (uphill, size), length, turned = torch.stack([downhill, squares]).tolist(), 1.0, 0
        slope = -uphill
        if self._inverse and not slope < 0:
            self._inverse.forget()
            return self.step()
        self._since_wall += 1
        trials = min(_TRIALS, self._most - self.steps)
        for _ in range(trials):
            self.steps += 1
            ahead = torch.sub(self._here, back, alpha=length)
            trial = self._layers(ahead)
            if self.coordinates == "states":
                trial = self.landscape.feasible(trial)
                ahead = self._vector(trial)
            forces, reached = self.evaluate(trial)
            force = self._vector(forces.gradients)
            numbers = torch.stack([torch.dot(force, back).neg(), reached - self.energy, self.noise(forces)])
            slope_ahead, rise, noise = numbers.tolist()
            if not math.isfinite(rise):
                self._since_wall = 0
            level = abs(rise) <= noise or not self.landscape.conservative
            level = level and slope_ahead <= -0.9 * slope
            if level or (rise <= _SUFFICIENT * length * slope and slope_ahead <= -_TURNED * slope):
                self.gained = self.gained - 0.5 * length * (slope + slope_ahead)
                self.gain_left.note(0.5 * length * downhill, squares)
                if size > self._far:
                    self._inverse.forget()
                step = back.mul_(-length) if self.coordinates == "errors" else ahead - self._here
                self._inverse.add(step, torch.sub(force, self._force, out=self._force))
                self._here, self._force = ahead, force
                return self._keep(trial, forces.gradients, reached)
            self.energies.append(self.energy)
            turned += slope_ahead > -0.5 * slope
            length = _between(length, slope, slope_ahead, rise)
        self.gain_left.note(0.5 * length * downhill, squares)
        if self._inverse:
            self._inverse.forget()
        elif trials == _TRIALS:  # however short, steps led into a force that pushes back, as at a kink; or into none
            self._nowhere = "kink" if turned == _TRIALS else "stalled"
        return None

    def _vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """The u of a point, or the energy's slope in u of forces."""
        whole = torch.cat([x.flatten() for x in tensors])
        return whole if self._over_root is None else whole / self._over_root

    def _layers(self, u: Tensor) -> list[Tensor]:
        """The point of a u."""
        whole = u if self._over_root is None else u * self._over_root
        return [x.view(like.shape) for x, like in zip(whole.split(self._sizes), self.point, strict=True)]

    def _keep(self, trial: list[Tensor], gradients: list[Tensor], reached: Tensor) -> None:
        self.point, self.gradients, self.energy = trial, gradients, reached
        self.norm = force_norm(self.landscape, gradients)
        self.energies.append(reached)


def _between(length: float, slope: float, ahead: float, rise: float) -> float:
    """The least point of the cubic with these slopes at both ends of a step and this rise, a tenth to half of it."""
    bend = slope + ahead - 3 * rise / length
    root = max(bend * bend - slope * ahead, 0.0) ** 0.5
    bottom = ahead - slope + 2 * root
    share = 1 - (ahead + root - bend) / bottom if bottom else 0.5
    return length * (min(max(share, 0.1), 0.5) if share == share else 0.1)
