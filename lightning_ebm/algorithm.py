"""An algorithm is a point in energy x nudge x relaxer x update."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from lightning_ebm import notebook
from lightning_ebm.automatic import automatic
from lightning_ebm.energies import Energy, PredictiveCoding
from lightning_ebm.energies.base import QuadraticEnergy, is_divergence, is_quadratic
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges import Nudge, OneSided
from lightning_ebm.nudges.base import table_of, without_draw
from lightning_ebm.relaxers import ErrorCoordinates, Relaxer

Update = Literal[
    "auto", "contrast", "cross-derivative", "first-arrival", "fixed-prediction", "multipliers", "dyadic", "incremental",
    "backprop",
]  # fmt: skip
_UPDATES = get_args(Update)
_DISPLACEMENTS = ("first-arrival", "fixed-prediction", "multipliers", "dyadic")


@dataclass(frozen=True, init=False)
class Algorithm:
    """What to relax, how the loss pulls, how states move, and what is read off.

    E(x, theta) = sum_b I_b(x, theta) + lambda * L(x, theta)

    Args:
        energy: I; `PredictiveCoding()` if not given.
        nudge: the table of phases, {lambda_p: weight_p}; `OneSided()` if not given.
        relaxer: finds x_p for each phase with lambda_p != 0, starting from the free state; `ErrorCoordinates()` if not
            given; "auto": the `Cheapest` of those that fit the energy and the nudge, to a tolerance of 1e-3.
        free_relaxer: finds the free state of energies whose free equilibrium is not the forward pass; None: `relaxer`.
        update: what is read off. "contrast", sum_p weight_p dE/dtheta(x_p) with states held fixed; "cross-derivative",
            dL/dtheta + d2I/dtheta dx (sum_p weight_p x_p) at the free state; "first-arrival", "fixed-prediction",
            "multipliers", "dyadic", what relaxers of those kinds leave at each layer, times the slope of its prediction
            or drive; "incremental", dE/dtheta before every single step of the relaxer, an optimizer step with each;
            "backprop", the loss passes through unchanged and the other parts are not used (the control of every
            experiment); "auto", what the nudge and the relaxer are made for.
        initial_state: where the search for the free state starts: the "forward" pass, "zeros", or "last-visit",
            where the same sample was left when it was last trained on (see `StateMemory`), else the forward pass.

    Raises:
        ConfigurationError: parts of the wrong kind, or parts that do not fit each other.
    """

    energy: Energy
    nudge: Nudge
    relaxer: Relaxer
    free_relaxer: Relaxer | None = None
    update: Update = "auto"
    initial_state: Literal["forward", "zeros", "last-visit"] = "forward"

    # None stands for the default until the object is made: of an instance as default, parsers of command lines and YAML
    # carry the settings over to the class that replaces it, Centered(strength=1.0) where Centered() was written.
    def __init__(
        self,
        energy: Energy | None = None,
        nudge: Nudge | None = None,
        relaxer: Relaxer | Literal["auto"] | None = None,
        free_relaxer: Relaxer | None = None,
        update: Update = "auto",
        initial_state: Literal["forward", "zeros", "last-visit"] = "forward",
    ) -> None:
        energy = PredictiveCoding() if energy is None else energy
        nudge = OneSided() if nudge is None else nudge
        if relaxer == "auto" and isinstance(energy, Energy) and isinstance(nudge, Nudge):
            relaxer = automatic(energy, nudge)
        parts = {
            "energy": energy, "nudge": nudge, "relaxer": ErrorCoordinates() if relaxer is None else relaxer,
            "free_relaxer": free_relaxer, "update": update, "initial_state": initial_state,
        }  # fmt: skip
        for name, part in parts.items():
            object.__setattr__(self, name, part)
        self._check_parts()

    def _check_parts(self) -> None:
        kinds: dict[str, tuple[type, type]] = {
            "energy": (Energy, PredictiveCoding), "nudge": (Nudge, OneSided), "relaxer": (Relaxer, ErrorCoordinates),
        }  # fmt: skip
        for part, (kind, example) in kinds.items():
            value = getattr(self, part)
            if not isinstance(value, kind):
                raise ConfigurationError(
                    f"Algorithm({part}={value!r}): expected an instance of ebm.{kind.__name__}, such as"
                    f" ebm.{example.__name__}(...), not {type(value).__name__}."
                )
        if self.free_relaxer is not None and not isinstance(self.free_relaxer, Relaxer):
            raise ConfigurationError(f"Algorithm(free_relaxer={self.free_relaxer!r}): expected an ebm.Relaxer or None.")
        if self.update not in _UPDATES:
            raise ConfigurationError(f"Algorithm(update={self.update!r}): expected one of {', '.join(_UPDATES)}.")
        if self.initial_state not in ("forward", "zeros", "last-visit"):
            raise ConfigurationError(
                f'Algorithm(initial_state={self.initial_state!r}): expected "forward", "zeros" or "last-visit".'
            )
        self._check_coordinates(self.relaxer)
        if self.free_relaxer is not None and not is_divergence(self.energy):
            self._check_coordinates(self.free_relaxer)
        self._check_fit()
        if self.read_as != "backprop":
            self._check_nudge()

    def _check_coordinates(self, relaxer: Relaxer) -> None:
        if relaxer.needs_error_coordinates and not is_quadratic(self.energy):
            overridden = isinstance(self.energy, QuadraticEnergy)
            why = "overrides layer_energy, so that its energy is another" if overridden else "is no function of those"
            raise ConfigurationError(
                f"{type(relaxer).__name__} moves prediction errors under the energy 1/2 Pi |error|^2, and"
                f" {type(self.energy).__name__} {why}: it would never be looked at. Use ebm.PredictiveCoding(), or a"
                " relaxer of states such as ebm.GradientDescent(...)."
            )

    def _check_fit(self) -> None:
        made_for, read = self.relaxer.update, self.read_as
        if read == "backprop":
            return
        needed = made_for if made_for in _DISPLACEMENTS else None
        if (read in _DISPLACEMENTS or needed) and read != needed:
            raise ConfigurationError(
                f"update={self.update!r} does not fit {type(self.relaxer).__name__}, whose result is to be read as"
                f' {made_for!r}: what it leaves at a layer means nothing read otherwise. Leave update="auto", or take'
                " the relaxer made for that update: Sweep, FixedPrediction, AugmentedLagrangian, Dyadic."
            )
        if needed and not is_divergence(self.energy):
            raise ConfigurationError(
                f"{type(self.relaxer).__name__} starts from the forward pass as the free equilibrium, which it is not"
                f" for {type(self.energy).__name__}. Use ebm.PredictiveCoding() or ebm.FenchelYoung()."
            )
        if read == "incremental" and not (is_divergence(self.energy) and _pulls_once(self.nudge) and self.increments):
            raise ConfigurationError(
                'update="incremental" moves parameters with every step of one nudged phase: it needs a divergence'
                " energy such as ebm.PredictiveCoding(), an ebm.OneSided(...) nudge and a relaxer with a number of"
                " steps, ebm.GradientDescent(lr, max_steps) or ebm.StateOptimizer(..., max_steps=...)."
            )

    def _check_nudge(self) -> None:
        """What the table of phases needs, the update and the relaxer must have."""
        name, read = type(self.nudge).__name__, self.read_as
        if self.nudge.linear_response and read != "cross-derivative":
            raise ConfigurationError(
                f'{name} moves no state, so there is no {read!r} to read: leave update="auto", with a relaxer'
                " of states for the free phase, such as ebm.FixedPoint(...) or ebm.GradientDescent(...)."
            )
        if self.nudge.needs_output_state and self.relaxer.needs_error_coordinates:
            raise ConfigurationError(
                f"{name} holds the output, and {type(self.relaxer).__name__} moves errors, of which the output is a"
                " function. Take ebm.FixedPoint(...) or ebm.GradientDescent(...)."
            )
        if self.nudge.needs_output_state and read != "contrast":
            raise ConfigurationError(
                f"{name} holds the output, and what is read of a held output is a contrast of phases, not {read!r}."
                ' Leave update="auto", with ebm.FixedPoint(...) or ebm.GradientDescent(...).'
            )
        if self.nudge.complex_states and not self.relaxer.complex_states:
            raise ConfigurationError(
                f"{type(self.relaxer).__name__} cannot follow the complex states of a holomorphic nudge, {name}. Take"
                " ebm.FixedPoint(...), ebm.GradientDescent(lr, max_steps) or ebm.ErrorCoordinates(..., tol=0)."
            )

    @property
    def increments(self) -> int:
        """How many optimizer steps an incremental update takes for a batch."""
        return int(getattr(self.relaxer, "max_steps", 0))

    @cached_property
    def read_as(self) -> str:
        """The update with "auto" resolved."""
        if self.update != "auto":
            return self.update
        return "cross-derivative" if self.nudge.linear_response else self.relaxer.update

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

    def _repr_html_(self) -> str:
        return notebook.table("Algorithm", ("part", ""), list(self.describe().items()))


def _pulls_once(nudge: Nudge) -> bool:
    """Whether there is one nudged phase, at a real strength, in which the output is free."""
    nudged = [phase for phase in table_of(without_draw(nudge)) if phase.is_nudged]
    return len(nudged) == 1 and not nudged[0].held and not isinstance(nudged[0].strength, complex)
