"""Descent that chooses its step sample by sample.

A user's loss arrives as one number for the whole batch, so a sample's own energy is never known; its own force is.
Steps are therefore chosen from forces: along a step d from force g to force g', the curvature is <g' - g, d> / |d|^2,
and the energy changes by (<g, d> + <g', d>) / 2 up to third order (the trapezoid rule).
"""

import math

import torch
from torch import Tensor

from lightning_ebm.errors import UnsupportedModuleError
from lightning_ebm.evaluations import Slope
from lightning_ebm.relaxers.base import Relaxation, Status, force_norm
from lightning_ebm.relaxers.descent import Descent, Task

_ENDS: tuple[Status, ...] = ("max_steps", "converged", "kink", "stalled")
_NO_SLOPE = (
    "However short a step along the forces is, it raises the energy: some operation between the layers has a backward"
    " that is not the slope of its forward, such as rounding or a sign with a straight-through or surrogate slope, or"
    " torch.fake_quantize. States relax on an energy whose slope is their force. Write it as z + (q(z) - z).detach(),"
    ' take the exact rule "zero-divergence", which only sends errors back, or keep such operations out of the layers.'
)
_LEAST = 1e-3
"""Of a step that went too far, what is tried next at least: where forces grow as exponentials do, one that is far out
tells nothing of the curvature here, and from a step of next to nothing there is no way back."""
_MEMORY = 3
"""Energies that a new one is compared with: steps across a kink may rise for once and lead lower."""


class BarzilaiBorwein(Descent):
    """Gradient descent with a step size for each sample, each step checked for overshoot and shortened where it did.

    A step is kept for the samples whose force along it has not turned round, provided that the energy of the batch is
    not above its last three; the others stay and try a shorter one. The next step of a sample is one over the curvature
    it just met (Barzilai and Borwein 1988), at most `longest`. Samples must not see each other.

    Args:
        task: what it is about.
        longest: the largest step size.
    """

    window = 3
    most_force = 1e3

    def __init__(self, task: Task, longest: float) -> None:
        super().__init__(task)
        self.longest = longest
        self.rarely = self.landscape.questions.rarely
        self.step_size = torch.full_like(self.norm, self.lr)
        self.measured = torch.ones_like(self.energy, dtype=torch.bool)
        """Whether the energy is that of the point, and not of two between which samples were chosen."""
        self.end = torch.zeros_like(self.energy)
        """0 while it goes on, then which of `_ENDS` came first; it stays where it is from then on."""
        self.taken = torch.zeros_like(self.energy)
        """Steps until then."""
        self._since_wall = torch.full_like(self.energy, math.inf)
        """Steps since there was no energy where one led."""
        self._share_left: Tensor | None = None
        """The one of the end, where steps follow that go nowhere."""
        self.against = torch.zeros_like(self.energy)
        """Steps along which every force pulled to the end, and the energy rose."""

    @property
    def active(self) -> Tensor:
        """See `Descent.active`; without those that run away, and none when it is over."""
        active = super().active & (self.norm <= self.most_force * self.first)
        return active & (self.end == 0) if self.rarely else active

    @property
    def at_wall(self) -> Tensor:
        """See `Descent.at_wall`."""
        return self._since_wall <= self.window

    @property
    def share_left(self) -> Tensor | None:
        """See `Descent.share_left`."""
        now, then = super().share_left, self._share_left
        return now if now is None or then is None else torch.where(self.end > 0, then, now)

    def run(self, max_steps: int) -> Relaxation:
        """Steps until it is over, and asks whether it is as often as `Questions` says."""
        questions = self.landscape.questions
        if not questions.rarely:
            while (status := self.status(max_steps)) is None:
                self.step()
            found = self.ended(status)
            if float(self.against) == self.steps > 1:
                raise UnsupportedModuleError(_NO_SLOPE)
            if not bool(self.measured):
                self.energies[-1] = self.evaluate(self.point)[1]
            return found
        while True:
            last = self.steps >= max_steps
            self._judge()
            if last or questions.is_due(self.steps):
                numbers = [self.end, self.taken, self.measured, self.ran_away.any(), self.against]
                end, taken, measured, away, against = questions.ask(torch.stack([n.to(self.energy) for n in numbers]))
                if end or last:
                    break
            self.step()
        if away:
            raise self.diverged()
        if against == taken > 1:
            raise UnsupportedModuleError(_NO_SLOPE)
        if not measured:
            _, self.energy = self.evaluate(self.point)
        self.steps = int(taken)
        energies = [*self.energies[: self.steps], self.energy]
        return self.found(_ENDS[int(end)], energies)

    def _judge(self) -> None:
        """Whether it is over, as `Descent.status` says, decided on the device."""
        self._share_left = self.share_left
        found = self.active.any().logical_not().to(self.energy)
        judged = self.gain_left.judged(self.gained, self.squares, self.first_squares, self.tol)
        if judged is not None:
            kink, stalled = judged[0] & ~self.at_wall, judged.any()
            found = torch.where(found > 0, found, torch.where(kink, 2, torch.where(stalled, 3, 0)).to(found))
        self.end = torch.where(self.end > 0, self.end, found)

    def step(self) -> None:
        """One trial: kept where it went well, and another step size for the next."""
        active, point, gradients = self.active, self.point, self.gradients
        self.steps += 1
        if self.rarely:
            self.taken = self.taken + (self.end == 0)
        reach = torch.where(active, self.step_size, 0)
        trial = self._ahead(point, reach)
        if self.coordinates == "errors" and point[0] is not self.start[0]:
            self.point = point = []  # not held through the evaluation: back from the trial it is as far as there
        forces, reached = self.evaluate(trial)
        self._since_wall = torch.where(reached.isfinite(), self._since_wall + 1, 0)

        slope = -reach * self.norm.square()
        slope_ahead = self._slope_ahead(forces.gradients, gradients, point, trial, reach)
        curvature = (slope_ahead - slope) / (reach * self.norm).square()
        overshot = active & ~(slope_ahead <= 0.9 * slope.abs())  # nan counts
        rose = ~(reached <= torch.stack(self.energies[-_MEMORY:]).amax() + self.noise(forces))
        rose = rose & self.landscape.conservative
        # Over a hump the forces do not tell whose energy it was: all are more careful. Where the energy of the point
        # was put together from gains it may itself have been too low, and is what this step says.
        along = torch.where(active, 0.5 * (slope + slope_ahead), 0).sum()
        here = torch.where(self.measured | ~reached.isfinite(), self.energy, reached - along)
        if self.rarely:
            unseen = rose & ~overshot.any()
            self.energy = torch.where(unseen, here, self.energy)
            overshot = torch.where(unseen, active, overshot)
            self.against = self.against + (unseen & (self.end == 0))
        elif bool(rose) and not bool(overshot.any()):
            self.energy, overshot = here, active
            self.against = self.against + 1
        kept = active & ~overshot
        gained = -torch.where(kept, 0.5 * (slope + slope_ahead), 0).sum()
        self._keep(trial, forces, reached, self.energy - gained, reach, kept)
        del forces, trial, point, gradients  # as large as the states: not held through the next evaluation

        self.energies.append(self.energy)
        self.gained = self.gained + gained
        newton = torch.where(curvature > 0, 1 / curvature, math.inf)
        within = newton.clamp_max(0.5 * self.step_size).maximum(_LEAST * self.step_size)
        shorter = torch.where(curvature > 0, within, 0.1 * self.step_size)
        longer = newton.minimum(4 * self.step_size).clamp_max(self.longest)
        self.step_size = torch.where(overshot, shorter, torch.where(kept, longer, self.step_size))
        squares = torch.where(self.active, self.norm, 0).square()
        self.gain_left.note(0.5 * (self.step_size * squares).sum(), squares.sum())

    def _ahead(self, point: list[Tensor], reach: Tensor) -> list[Tensor]:
        reaches = self.landscape.spread(-reach, point)
        trial = [torch.addcmul(x, s, g) for x, s, g in zip(point, reaches, self.gradients, strict=True)]
        return self.landscape.feasible(trial) if self.coordinates == "states" else trial

    def _slope_ahead(
        self, ahead: list[Tensor], here: list[Tensor], point: list[Tensor], trial: list[Tensor], reach: Tensor
    ) -> Tensor:
        """<g', d> of each sample. One layer at a time: d, as large as all states, is not held."""
        if self.coordinates == "states":
            found = zip(ahead, point, trial, strict=True)
            return self.landscape.per_sample(g * (y - x) for g, x, y in found)
        return -reach * self.landscape.per_sample(map(torch.mul, ahead, here))

    def _keep(
        self, trial: list[Tensor], forces: Slope, reached: Tensor, expected: Tensor, reach: Tensor, kept: Tensor
    ) -> None:
        """Goes where the trial went, for the samples that keep it; the others go back by `reach` times their force."""
        whole = (reach > 0).logical_and(~kept).any().logical_not()
        if not self.rarely and bool(whole):
            # These very tensors: the network still holds their pass.
            self.point, self.gradients, self.energy, self.measured = trial, forces.gradients, reached, whole
        else:
            back = self.landscape.spread(torch.where(kept, 0, reach), trial)
            masks = self.landscape.spread(kept, trial)
            if self.point:
                pairs = zip(masks, trial, self.point, strict=True)
                self.point = [torch.where(m, new, old) for m, new, old in pairs]
            else:
                self.point = [torch.addcmul(y, s, g) for y, s, g in zip(trial, back, self.gradients, strict=True)]
            for k, m in enumerate(masks):
                self.gradients[k] = torch.where(m, forces.gradients[k], self.gradients[k])
            self.energy, self.measured = torch.where(whole, reached, expected), whole
        self.norm = force_norm(self.landscape, self.gradients)
