"""Relaxers that let another one move states, on a network that they stand in front of."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.energies import Energy
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.evaluations import Landscape
from lightning_ebm.evaluations.of_slope import SlopeEvaluation
from lightning_ebm.nudges import Nudge
from lightning_ebm.relaxers.base import Relaxation, Relaxer, Stepper, check_single_steps


class Wrapper(Relaxer):
    """Another relaxer, which sees the network through what `in_front` gives; all else is that relaxer's own.

    A subclass writes `in_front`, which gives an `Around` the network. As that changes forces or states, a relaxer whose
    decisions trust the energy is refused: it would take the difference for the curvature. Wrappers may be nested.

    Args:
        relaxer: moves the states.

    Raises:
        ConfigurationError: it is no relaxer, or one that decides by the energy.
    """

    def __init__(self, relaxer: Relaxer) -> None:
        wanted = "a relaxer such as ebm.GradientDescent(lr, max_steps)"
        self.relaxer: Relaxer = checked.instance(self, "relaxer", relaxer, Relaxer, wanted)
        if relaxer.trusts_energy:
            raise ConfigurationError(
                f"{type(self).__name__}({relaxer!r}): this relaxer finds its steps by the energy, and under"
                f" {type(self).__name__} the forces are not its slope, so that it would stall. Take one that follows"
                " forces: ebm.GradientDescent(lr, max_steps), ebm.ErrorCoordinates(max_steps, lr, tol=0.0),"
                " ebm.FixedPoint(max_steps), ebm.FixedPrediction(), ebm.Sweep()."
            )

    @abstractmethod
    def in_front(self, landscape: Landscape) -> Landscape:
        """What the relaxer is to see in place of the network."""

    def around(self, landscape: Landscape) -> Landscape:
        return self.relaxer.around(self.in_front(landscape))

    @property
    def update(self) -> Any:  # type: ignore[override]  # its own, not its class's
        return self.relaxer.update

    @property
    def tol(self) -> float:  # type: ignore[override]
        return self.relaxer.tol

    @property
    def max_steps(self) -> int:  # type: ignore[override]
        return self.relaxer.max_steps

    @property
    def complex_states(self) -> bool:
        return self.relaxer.complex_states

    @property
    def needs_error_coordinates(self) -> bool:
        return self.relaxer.needs_error_coordinates

    @property
    def draws_samples(self) -> bool:
        return self.relaxer.draws_samples

    @property
    def ends_elsewhere(self) -> bool:
        return True

    @property
    def steps_by(self) -> SlopeEvaluation:
        return self.relaxer.steps_by

    @property
    def steps_one_by_one(self) -> int:
        return self.relaxer.steps_one_by_one

    def check(self, energy: Energy, nudge: Nudge) -> None:
        self.relaxer.check(energy, nudge)

    def check_energy(self, energy: Energy) -> None:
        self.relaxer.check_energy(energy)

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: Any) -> Relaxation:
        return self.relaxer.relax(self.in_front(landscape), start, strength)

    @property
    def kind(self) -> str:
        return f"{type(self).__name__} of {self.relaxer.kind}"

    def state_dict(self) -> dict[str, Any]:
        """What it carries from one step to the next, for a checkpoint."""
        return self.relaxer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.relaxer.load_state_dict(state)

    def stepper(self, start: Sequence[Tensor]) -> Stepper:
        check_single_steps(self.relaxer)
        return self.relaxer.stepper(start)
