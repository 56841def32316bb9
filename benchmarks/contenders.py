"""What is timed on each network. One more row is one more line of `rows`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from networks import Net

import lightning_ebm as ebm
from lightning_ebm.evaluations import ErrorForces, Landscape
from lightning_ebm.relaxers.base import force_norm

Row = tuple[str | ebm.Algorithm | None, dict[str, bool]]
"""An algorithm, and the options of `ebm.Learner`."""


def euler(steps: int, lr: float = 0.1) -> ebm.Algorithm:
    """Predictive coding as published: so many Euler steps on the states at lambda = 1."""
    return ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr=lr, max_steps=steps))


def settled(tol: float, strength: float = 1.0) -> ebm.Algorithm:
    """Predictive coding at equilibrium."""
    relaxer = ebm.ErrorCoordinates(max_steps=100, tol=tol)
    return ebm.algorithm("predictive-coding", nudge=ebm.OneSided(strength), relaxer=relaxer)


def sweeps(free: int, nudged: int, damping: float = 0.0) -> ebm.Algorithm:
    """Centered equilibrium propagation as published: so many odd-even sweeps, free and at each sign of the nudge."""
    relaxers = {name: ebm.FixedPoint(n, damping=damping) for name, n in (("free_relaxer", free), ("relaxer", nudged))}
    return ebm.algorithm("equilibrium-propagation", **relaxers)


DEFAULT, EP = "default", "equilibrium-propagation"
"""No algorithm named, which is `nudge="auto"`; and the preset that not every network has an equilibrium for."""


def rows(net: Net) -> dict[str, Row]:
    """Those of this library, for one network."""
    published = euler(net.steps, net.lr)
    found: dict[str, Row] = {
        "zero-divergence": ("zero-divergence", {}),
        "pc-nudge": ("pc-nudge", {}),
        DEFAULT: (None, {}),
        "predictive-coding": ("predictive-coding", {}),
        "error-pc": ("error-pc", {}),
        f"PC, {net.steps} Euler steps": (published, {}),
        EP: (EP, {}),
    }
    return found


@dataclass(frozen=True)
class HeavyBall(ebm.Relaxer):
    """v <- momentum v - lr g, e <- e + v on the errors: what the library would have if it won anywhere."""

    needs_error_coordinates: ClassVar[bool] = True

    lr: float
    momentum: float
    tol: float
    max_steps: int = 100

    def relax(self, landscape: Landscape, start: object, strength: float) -> ebm.Relaxation:
        """Until every sample has settled, or it runs away."""
        point = list(landscape.no_errors)
        velocity = [torch.zeros_like(error) for error in point]
        norms: list[torch.Tensor] = []
        while True:
            forces = landscape.evaluate(ErrorForces(), point, strength)
            norms.append(force_norm(landscape, forces.gradients))
            there = bool((norms[-1] <= self.tol * norms[0]).all())
            if there or len(norms) > self.max_steps or not bool(norms[-1].max() <= 1e6 * norms[0].max()):
                break
            velocity = [self.momentum * v - self.lr * g for v, g in zip(velocity, forces.gradients, strict=True)]
            point = [e + v for e, v in zip(point, velocity, strict=True)]
        residual = norms[-1] / norms[0].clamp_min(1e-30)
        status = "converged" if there else "max_steps"
        energies = [forces.total(strength)]
        return ebm.Relaxation(point, "errors", status, len(norms) - 1, residual, energies)  # type: ignore[arg-type]
