"""An algorithm is a point in energy x nudge x relaxer x update."""

from dataclasses import dataclass
from typing import Literal

from lightning_ebm.energies import Energy, PredictiveCoding
from lightning_ebm.energies.base import QuadraticEnergy
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges import Nudge, OneSided
from lightning_ebm.relaxers import ErrorCoordinates, Relaxer

Update = Literal["auto", "contrast", "first-arrival", "backprop"]
_UPDATES = ("auto", "contrast", "first-arrival", "backprop")


@dataclass(frozen=True)
class Algorithm:
    """What to relax, how the loss pulls, how states move, and what is read off.

    E(x, theta) = sum_b I_b(x, theta) + lambda * L(x, theta)

    Args:
        energy: I.
        nudge: the table of phases, {lambda_p: weight_p}.
        relaxer: finds x_p for each phase with lambda_p != 0, starting from the free state.
        free_relaxer: finds the free state of energies whose free equilibrium is not the forward pass; None: `relaxer`.
        update: "contrast", sum_p weight_p dE/dtheta(x_p) with states held fixed; "first-arrival", the displacement with
            which the signal reaches each layer, times the slope of its prediction at the free state; "backprop", the
            loss passes through unchanged and the other parts are not used (the control of every experiment); "auto",
            what the relaxer is made for.
        initial_state: where the search for the free state starts, the "forward" pass or "zeros".

    Raises:
        ConfigurationError: parts of the wrong kind, or parts that do not fit each other.
    """

    energy: Energy = PredictiveCoding()
    nudge: Nudge = OneSided()
    relaxer: Relaxer = ErrorCoordinates()
    free_relaxer: Relaxer | None = None
    update: Update = "auto"
    initial_state: Literal["forward", "zeros"] = "forward"

    def __post_init__(self) -> None:
        kinds = {"energy": Energy, "nudge": Nudge, "relaxer": Relaxer}
        for part, kind in kinds.items():
            value = getattr(self, part)
            if not isinstance(value, kind):
                raise ConfigurationError(
                    f"Algorithm({part}={value!r}): expected an instance of ebm.{kind.__name__}, such as"
                    f" ebm.{type(_EXAMPLES[part]).__name__}(...), not {type(value).__name__}."
                )
        if self.free_relaxer is not None and not isinstance(self.free_relaxer, Relaxer):
            raise ConfigurationError(f"Algorithm(free_relaxer={self.free_relaxer!r}): expected an ebm.Relaxer or None.")
        if self.update not in _UPDATES:
            raise ConfigurationError(f"Algorithm(update={self.update!r}): expected one of {', '.join(_UPDATES)}.")
        if self.initial_state not in ("forward", "zeros"):
            raise ConfigurationError(f'Algorithm(initial_state={self.initial_state!r}): expected "forward" or "zeros".')
        if self.relaxer.needs_error_coordinates and not isinstance(self.energy, QuadraticEnergy):
            raise ConfigurationError(
                f"{type(self.relaxer).__name__} moves prediction errors, which {type(self.energy).__name__} is not a"
                " function of. Use ebm.PredictiveCoding(), or a relaxer of states such as ebm.GradientDescent(...)."
            )
        if "first-arrival" in (self.update, self.relaxer.update) and self.read_as not in (
            self.relaxer.update,
            "backprop",
        ):
            raise ConfigurationError(
                f"update={self.update!r} does not fit {type(self.relaxer).__name__}, whose result is to be read as"
                f" {self.relaxer.update!r}: the displacement at first arrival is what ebm.Sweep() finds, an equilibrium"
                ' what the other relaxers find. Leave update="auto".'
            )

    @property
    def read_as(self) -> str:
        """The update with "auto" resolved."""
        return self.relaxer.update if self.update == "auto" else self.update

    def describe(self) -> dict[str, str]:
        """Every part as text, for the configuration of a run."""
        return {
            "energy": repr(self.energy),
            "nudge": repr(self.nudge),
            "relaxer": repr(self.relaxer),
            "free_relaxer": repr(self.free_relaxer or self.relaxer),
            "update": self.read_as,
            "initial_state": self.initial_state,
        }


_EXAMPLES: dict[str, object] = {"energy": PredictiveCoding(), "nudge": OneSided(), "relaxer": ErrorCoordinates()}
