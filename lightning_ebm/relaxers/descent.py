"""Descent on the energy until forces, or the energy that is left to gain, say that it is over."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import Landscape, Slope
from lightning_ebm.evaluations.base import Coordinates
from lightning_ebm.evaluations.descent_step import forces_in
from lightning_ebm.relaxers.base import Relaxation, Status, force_norm
from lightning_ebm.relaxers.gain_left import GainLeft


class Task(NamedTuple):
    """What a descent is about.

    Attributes:
        landscape: the network.
        coordinates: what moves.
        start: where it begins.
        strength: lambda.
        lr: first step size.
        tol: relative force at which a sample has settled.
        least: force of each sample that may be rounding alone, ``(B,)``; None is what states and `tol` say.
    """

    landscape: Landscape
    coordinates: Coordinates
    start: Sequence[Tensor]
    strength: float
    lr: float
    tol: float
    least: Tensor | None = None


class Descent(ABC):
    """A relaxation under way; `step` is what its kinds differ in.

    A sample has settled when its force is below `tol` of the first, or below rounding, and "converged" is when all
    samples have. At a kink, as ReLU and maximum pooling have, no force ever vanishes. There it ends as "kink" when the
    energy still to be gained is below a fraction of what was gained, see `GainLeft`. Where no kink explains the forces
    that are left it goes on; "stalled" is when less than (tol/10)^2 of what was gained seems to be left all the same,
    or where steps are short because no energy lies beyond them, as of log(p) below 0: that is no kink.

    Args:
        task: what it is about.
    """

    window: ClassVar[int]
    """See `GainLeft`."""

    most_force: ClassVar[float] = math.inf
    """Over the first force, what is taken for a runaway at a positive nudge, where the energy is bounded below."""

    def __init__(self, task: Task) -> None:
        self.landscape, self.coordinates, self.start, self.strength, self.lr, tol, self._least = task
        self.tol = max(tol, 4 * self.landscape.rounding)
        self.point = list(self.start)
        forces, self.energy = self.evaluate(self.point)
        self.gradients = forces.gradients
        self.norm = self.first = force_norm(self.landscape, self.gradients)
        self.settled_at = self.tolerance(self.first)
        self.energies = [self.energy]
        self.steps = 0
        self.gain_left = GainLeft(self.window)
        self.gained = torch.zeros_like(self.energy)
        """By the trapezoid rule: under a weak nudge the energy's own differences are lost in rounding."""

    @abstractmethod
    def step(self) -> None:
        """Moves on; every evaluation counts as a step."""

    def run(self, max_steps: int) -> Relaxation:
        """Steps until it is over."""
        while (status := self.status(max_steps)) is None:
            self.step()
        return self.ended(status)

    def evaluate(self, point: list[Tensor]) -> tuple[Slope, Tensor]:
        """Forces at a point, and the energy of the batch there."""
        forces = self.landscape.evaluate(forces_in(self.coordinates), point, self.strength)
        return forces, forces.total(self.strength)

    def noise(self, forces: Slope) -> Tensor:
        """By how much an energy may be off because numbers are rounded."""
        return 16 * self.landscape.rounding * (forces.internal.sum() + (self.strength * forces.loss).abs())

    def tolerance(self, first: Tensor) -> Tensor:
        """The force at which each sample has settled, ``(B,)``."""
        # That of a state one rounding error away from its prediction; 0 in error coordinates, which begin at 0.
        size = self.landscape.per_sample(x.square() for x in self.start).sqrt()
        settled_at = (self.tol * first).maximum(4 * torch.finfo(first.dtype).eps * size)
        return settled_at if self._least is None else settled_at.maximum(self._least)

    @property
    def active(self) -> Tensor:
        """Which samples are to move on, ``(B,)``."""
        return self.norm > self.settled_at

    @cached_property
    def first_squares(self) -> Tensor:
        """|g|^2 of the batch at the start."""
        return self.first.square().sum()

    @property
    def squares(self) -> Tensor:
        """|g|^2 of the batch, of the samples that are to move."""
        return torch.where(self.active, self.norm, 0).square().sum()

    def status(self, max_steps: int) -> Status | None:
        """How it ended; None while there is a step to take."""
        if not bool(self.active.any()):
            return "converged"
        over = self.gain_left.verdict(self.gained, self.squares, self.first_squares, self.tol)
        if over == "kink" and bool(self.at_wall):
            over = "stalled"
        return "max_steps" if over is None and self.steps >= max_steps else over

    def ended(self, status: Status) -> Relaxation:
        """The end, if it is none of a runaway.

        Raises:
            RelaxationDivergedError: forces grew without end.
        """
        if bool(self.ran_away.any()):
            raise self.diverged()
        return self.found(status, self.energies)

    def found(self, status: Status, energies: list[Tensor]) -> Relaxation:
        """What is told of the end."""
        found = Relaxation(self.point, self.coordinates, status, self.steps, self.residual, energies)
        found.gain_left = self.share_left
        if self.coordinates == "errors":
            found.pull_left = torch.where(self.first_squares > 0, 2 * self.gained / self.first_squares, 1.0)
        return found

    @property
    def share_left(self) -> Tensor | None:
        """The energy still to be gained over what was gained, infinite where walls hide it; None before a step."""
        left = self.gain_left.left(self.squares)
        if left is None:
            return None
        return torch.where(self.at_wall, math.inf, torch.where(left > 0, left / self.gained, 0.0))

    @property
    @abstractmethod
    def at_wall(self) -> Tensor:
        """Whether one of the last steps has led to where there is no energy."""

    @property
    def residual(self) -> Tensor:
        """Force over the first force, ``(B,)``."""
        return self.norm / self.first.clamp_min(torch.finfo(self.first.dtype).tiny)

    @property
    def ran_away(self) -> Tensor:
        """Which samples did, ``(B,)``."""
        # At a positive nudge the energy is bounded below, and a kink may push harder than the start did.
        limit = 10.0 if self.strength < 0 else self.most_force
        return ~(self.residual <= limit) & ((self.norm > self.settled_at) | ~self.norm.isfinite())

    def diverged(self) -> RelaxationDivergedError:
        """The error that says so."""
        return self._ran_away(self.residual, int(self.ran_away.sum()))

    def _ran_away(self, residual: Tensor, samples: int) -> RelaxationDivergedError:
        sizes = [float(gradient.norm()) for gradient in self.gradients]
        worst = self.landscape.names[max(range(len(sizes)), key=lambda k: sizes[k])]
        who = f"{samples} of {self.landscape.batch_size} samples"
        if self.strength >= 0:  # there is a minimum, and numbers that do not hold the way to it
            return RelaxationDivergedError(
                f"At nudge {self.strength:g} the states of {who} ran out of the range of {self.gradients[0].dtype}"
                f" after {self.steps} steps, those of layer {worst!r} furthest. An update read there would be noise."
                " The weights have most likely grown too large: lower the learning rate of the parameters, or clip"
                " their gradients. If this is the first step, look for large values in the batch or in the initial"
                " weights."
            )
        return RelaxationDivergedError(
            f"At nudge {self.strength:g} the energy has no minimum that {who} could reach: after {self.steps} steps"
            f" their force is up to {float(residual.max()):.3g} times what it started with, and layer {worst!r} ran"
            " furthest. An update read there would be noise. A negative nudge has a minimum only while |lambda| times"
            " the curvature of the loss, as the states feel it, is below 1: take a smaller nudge, such as"
            " ebm.Centered(0.01), or a one-sided positive one. That curvature grows with the weights: if earlier steps"
            " were fine, the learning rate of the parameters may be too large instead."
        )
