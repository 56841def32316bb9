"""Nudges that hold the output instead of pulling at it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.nudges.base import Nudge, Phase

Sides = Literal["both", "positive", "negative"]


@dataclass(frozen=True)
class Coupled(Nudge):
    """Coupled learning: the output is held at o -+ eta dL/do (o the free output), the other states relax.

    Positive: [dI/dtheta(x+) - dI/dtheta(x_bar)] / eta; negative: [dI/dtheta(x_bar) - dI/dtheta(x-)] / eta; both:
    [dI/dtheta(x+) - dI/dtheta(x-)] / 2 eta. The loss is per sample, whatever its reduction.

    The trap: this does *not* converge to the gradient of the loss as eta -> 0. Holding the output exerts whatever force
    it takes, K times the displacement with K the inverse of the output's response, so that another cost is descended;
    only where K is a multiple of the identity are the two alike.

    Args:
        eta: how far towards the target, 1 being all the way for a loss 1/2 |o - y|^2.
        sides: which held phases are run.

    Raises:
        ConfigurationError: an argument that makes no sense; (in use) an output that is no state.

    Source:
        Stern et al. 2021; sides as in Scellier et al. 2023.
    """

    eta: float = 0.1
    sides: Sides = "both"

    def __post_init__(self) -> None:
        wanted = (
            "a positive finite number, the fraction of the way to the target; directions are chosen by"
            ' sides="positive" or "negative"'
        )
        checked.keep(
            self,
            eta=checked.number(self, "eta", self.eta, wanted, above=0),
            sides=checked.choice(self, "sides", self.sides, ("both", "positive", "negative")),
        )

    def phases(self) -> tuple[Phase, ...]:
        free = 1 / self.eta
        if self.sides == "positive":
            return Phase(self.eta, free, True), Phase(0.0, -free)
        if self.sides == "negative":
            return Phase(-self.eta, -free, True), Phase(0.0, free)
        return Phase(self.eta, free / 2, True), Phase(-self.eta, -free / 2, True)


@dataclass(frozen=True)
class Clamped(Nudge):
    """The output held at the target: dI/dtheta(x_clamped) - dI/dtheta(x_bar). `Coupled` at eta = 1, positive.

    Held at o - dL/do, which for a loss 1/2 |o - y|^2 is y and for a cross-entropy moves each logit by its error; or at
    ``target(batch)``. A full clamp is not a weak one: the update is the gradient of I(clamped) - I(free).

    Args:
        target: from the batch to the output's clamped value, ``(B, ...)`` in the shape of the output. The batch is what
            `training_step` was given, or, in loops of your own, what the module was called with.

    Raises:
        ConfigurationError: (in use) an output that is no state, or a target of another shape.

    Source:
        Movellan 1991; Xie and Seung 2003 for its relation to backpropagation.
    """

    target: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.target is not None:
            checked.function(self, "target", self.target, "a function from the batch to the output's value, or None")

    def phases(self) -> tuple[Phase, ...]:
        return Coupled(1.0, "positive").phases()

    def held_output(self, free: Tensor, loss_slope: Tensor, strength: float, batch: Any) -> Tensor:
        if self.target is None:
            return super().held_output(free, loss_slope, strength, batch)
        return self.target(batch)
