"""States that keep moving: samples at a temperature instead of one equilibrium."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import ErrorForces, Forces, Landscape
from lightning_ebm.evaluations.descent_step import moved
from lightning_ebm.relaxers.base import Relaxation, Relaxer, checked_lr, force_norm
from lightning_ebm.relaxers.fixed_steps import diverged


@dataclass(frozen=True)
class Langevin(Relaxer):
    """x <- x - lr dE/dx + sqrt(2 T lr) (xi + xi') / 2, xi' the noise of the next step: states distributed as exp(-E/T).

    After `burn_in` steps every `every`-th of the `max_steps` that follow is a sample, and the update is the average of
    dE/dtheta over samples: `<dE/dtheta>`, with E the energy of each of the batch's samples. For a contrast of phases
    that is the gradient of a difference of free energies, F = -T log int exp(-E/T) dx; for predictive coding, whose
    layers are normalized densities, the free phase's average is 0, and the update of the nudged phase that of the
    marginal likelihood, -T log p(data). At T = 0 these are the steps of `GradientDescent`, and of the last one.

    In error coordinates, x_l = mu_l + e_l, the distribution over states is the same, as the map between the two has
    determinant 1, and the noise of a layer is sqrt(2 T lr / Pi_l) xi: what is stiff, precise layers in a deep chain, is
    no longer so, and larger steps forget sooner.

    Averaging the noise of consecutive steps makes the covariance of a quadratic energy T H^-1 exactly at any stable lr,
    where plain noise gives T (H - lr H^2 / 2)^-1. (For one curvature k the variance v of the steps above satisfies
    v = a^2 v + T lr (1 + a) with a = 1 - lr k, so that v = T / k.)

    The trap: the average is off by 1 / sqrt(number of independent samples), and samples fewer steps apart than the
    slowest state takes to forget, 1 / (lr times the smallest curvature), are not independent.

    Args:
        temperature: T, in units of energy per unit, of the energy of each sample; 0 draws nothing.
        lr: step size, below 2 / (largest curvature).
        max_steps: how many steps after the burn-in.
        burn_in: how many steps before the first sample.
        every: how many steps apart samples are.
        coordinates: "states", or "errors" for quadratic energies.
        seed: of the noise; None takes torch's global generator, which follows the run's seed and its checkpoints.

    Raises:
        ConfigurationError: an argument out of range.
        RelaxationDivergedError: (in use) the step size is beyond the stable one.
    """

    @property
    def needs_error_coordinates(self) -> bool:
        return self.coordinates == "errors"

    @property
    def draws_samples(self) -> bool:
        return self.temperature > 0

    temperature: float = 1e-2
    lr: float = 0.1
    max_steps: int = 100
    burn_in: int = 50
    every: int = 5
    coordinates: Literal["states", "errors"] = "states"
    seed: int | None = None

    def __post_init__(self) -> None:
        steps = checked.count(self, "max_steps", self.max_steps)
        why = " (max_steps): with fewer steps there would be no sample to average"
        checked.keep(
            self,
            temperature=checked.number(self, "temperature", self.temperature, "a number of at least 0", least=0),
            lr=checked_lr(self, self.lr, 0.1),
            max_steps=steps,
            burn_in=checked.count(self, "burn_in", self.burn_in, least=0),
            every=checked.count(self, "every", self.every, most=steps, why=why),
            coordinates=checked.choice(self, "coordinates", self.coordinates, ("states", "errors")),
            seed=None if self.seed is None else checked.count(self, "seed", self.seed, least=0),
        )

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: float) -> Relaxation:
        in_states = self.coordinates == "states"
        what = Forces() if in_states else ErrorForces()
        point, generator = list(start if in_states else landscape.no_errors), self._generator(start[0])
        noise = self._noise(landscape, point, generator)
        samples: list[list[Tensor]] = []
        energies, first, norm = [], None, None
        before = point, point
        for step in range(1, self.burn_in + self.max_steps + 1):
            forces = landscape.evaluate(what, point, strength)
            energies.append(forces.total(strength))
            norm = force_norm(landscape, forces.gradients)
            first = norm if first is None else first
            if step % 10 == 1:
                self._check(landscape, before, (point, forces.gradients), strength, energies)
                before = point, forces.gradients
            ahead, following = moved(point, forces.gradients, self.lr), noise
            if self.temperature:
                following = self._noise(landscape, point, generator)
                ahead = [x + a + b for x, a, b in zip(ahead, noise, following, strict=True)]
            point, noise = landscape.feasible(ahead) if in_states else ahead, following
            if step > self.burn_in and (step - self.burn_in) % self.every == 0:
                samples.append(point)
        forces = landscape.evaluate(what, point, strength)
        energies.append(forces.total(strength))
        self._check(landscape, before, (point, forces.gradients), strength, energies)
        norm = force_norm(landscape, forces.gradients)
        assert first is not None
        residual = norm / first.clamp_min(torch.finfo(norm.dtype).tiny)
        steps = self.burn_in + self.max_steps
        drawn = samples if self.temperature else None
        return Relaxation(point, self.coordinates, "fixed", steps, residual, energies, samples=drawn)

    def _generator(self, like: Tensor) -> torch.Generator | None:
        return None if self.seed is None else torch.Generator(like.device).manual_seed(self.seed)

    def _noise(self, landscape: Landscape, point: Sequence[Tensor], generator: torch.Generator | None) -> list[Tensor]:
        """Half of what one step adds: the other half comes with the next."""
        if not self.temperature:
            return []
        size = 0.5 * math.sqrt(2 * self.temperature * self.lr)
        drawn = [size * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) for x in point]
        return drawn if self.coordinates == "states" else landscape.over_root_precision(drawn)

    def _check(
        self,
        landscape: Landscape,
        before: tuple[list[Tensor], list[Tensor]],
        now: tuple[list[Tensor], list[Tensor]],
        strength: float,
        energies: Sequence[Tensor],
    ) -> None:
        """Noise adds energy in proportion to the units; a step that is too large multiplies it."""
        units = sum(x.numel() for x in now[0])
        room = 10 * abs(float(energies[0])) + 100 * units * self.temperature
        if math.isfinite(float(energies[-1])) and abs(float(energies[-1])) <= max(room, 1e3 * units):
            return
        growth = float(energies[-1].abs() / energies[0].abs().clamp_min(1e-30))
        raise diverged(landscape, self, before, now, strength, (float(energies[0]), float(energies[-1])), growth)
