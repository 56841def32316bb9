"""An algorithm is a point in energy x nudge x relaxer x update."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lightning_ebm import checked, notebook
from lightning_ebm.energies import Energy, PredictiveCoding
from lightning_ebm.energies.base import is_divergence
from lightning_ebm.nudges import Nudge, OneSided, Strongest
from lightning_ebm.relaxers import ErrorCoordinates, Relaxer
from lightning_ebm.relaxers.automatic import automatic
from lightning_ebm.updates import Update, named
from lightning_ebm.updates.base import label


@dataclass(frozen=True, init=False)
class Algorithm:
    """What to relax, how the loss pulls, how states move, and what is read off.

    E(x, theta) = sum_b I_b(x, theta) + lambda * L(x, theta)

    Args:
        energy: I; `PredictiveCoding()` if not given.
        nudge: the table of phases, {lambda_p: weight_p}; `OneSided()` if not given; "auto": at the largest strength
            that settles, see `Strongest`.
        relaxer: finds x_p for each phase with lambda_p != 0, starting from the free state; `ErrorCoordinates()` if not
            given; "auto": the `Cheapest` of those that fit the energy and the nudge, to a tolerance of 1e-3.
        free_relaxer: finds the free state of energies whose free equilibrium is not the forward pass; None: `relaxer`.
        update: what is read off: an `Update`, or the name of one that the library ships. "contrast", sum_p weight_p
            dE/dtheta(x_p) with states held fixed; "cross-derivative", dL/dtheta + d2I/dtheta dx (sum_p weight_p x_p) at
            the free state; "first-arrival", "fixed-prediction", "multipliers", "dyadic", what relaxers of those kinds
            leave at each layer, times the slope of its prediction or drive; "incremental", dE/dtheta before every
            single step of the relaxer, an optimizer step with each; "continual", the contrast of phases in parts, one
            with each step; "backprop", the loss passes through unchanged and
            the other parts are not used (the control of every experiment); "auto", what the nudge and the relaxer are
            made for.
        initial_state: where the search for the free state starts: the "forward" pass, "zeros", or "last-visit",
            where the same sample was left when it was last trained on, else the forward pass. A sample is the same
            where all tensors of the batch are; states of up to 1 GiB of samples are kept on the host.

    Raises:
        ConfigurationError: parts of the wrong kind, or parts that do not fit each other.
    """

    energy: Energy
    nudge: Nudge
    relaxer: Relaxer
    free_relaxer: Relaxer | None = None
    update: str | Update = "auto"
    initial_state: Literal["forward", "zeros", "last-visit"] = "forward"

    # None stands for the default until the object is made: of an instance as default, parsers of command lines and YAML
    # carry the settings over to the class that replaces it, Centered(strength=1.0) where Centered() was written.
    def __init__(
        self,
        energy: Energy | None = None,
        nudge: Nudge | Literal["auto"] | None = None,
        relaxer: Relaxer | Literal["auto"] | None = None,
        free_relaxer: Relaxer | None = None,
        update: str | Update = "auto",
        initial_state: Literal["forward", "zeros", "last-visit"] = "forward",
    ) -> None:
        energy = PredictiveCoding() if energy is None else energy
        nudge = OneSided() if nudge is None else Strongest() if checked.is_word(nudge, "auto") else nudge
        if checked.is_word(relaxer, "auto") and isinstance(energy, Energy) and isinstance(nudge, Nudge):
            relaxer = automatic(energy, nudge)
        parts = {
            "energy": energy, "nudge": nudge, "relaxer": ErrorCoordinates() if relaxer is None else relaxer,
            "free_relaxer": free_relaxer, "update": update, "initial_state": initial_state,
        }  # fmt: skip
        for name, part in parts.items():
            object.__setattr__(self, name, part)
        self._check_parts()

    def _check_parts(self) -> None:
        expected: tuple[tuple[str, object, type, type], ...] = (
            ("energy", self.energy, Energy, PredictiveCoding),
            ("nudge", self.nudge, Nudge, OneSided),
            ("relaxer", self.relaxer, Relaxer, ErrorCoordinates),
        )
        for part, value, kind, example in expected:
            wanted = f"an instance of ebm.{kind.__name__}, such as ebm.{example.__name__}(...)"
            checked.instance(self, part, value, kind, wanted)
        if self.free_relaxer is not None:
            checked.instance(self, "free_relaxer", self.free_relaxer, Relaxer, "an ebm.Relaxer or None")
        checked.choice(self, "initial_state", self.initial_state, ("forward", "zeros", "last-visit"))
        if not self.rule.relaxes:
            return
        self.relaxer.check(self.energy, self.nudge)
        if self.free_relaxer is not None and not is_divergence(self.energy):
            self.free_relaxer.check_energy(self.energy)
        self.rule.check(self.energy, self.nudge, self.relaxer)

    @cached_property
    def rule(self) -> Update:
        """The update, with names and "auto" resolved."""
        if not checked.is_word(self.update, "auto"):
            return named(self.update)
        return named("cross-derivative" if self.nudge.linear_response else self.relaxer.update)

    @property
    def rests_at_forward(self) -> bool:
        """Whether the free equilibrium is the forward pass: that of a divergence is, and backprop has no other."""
        return is_divergence(self.energy) or not self.rule.relaxes

    def parts(self) -> dict[str, Energy | Nudge | Relaxer | Update]:
        """The objects that may carry something from one step to the next."""
        found: dict[str, Energy | Nudge | Relaxer | Update] = {
            "energy": self.energy, "nudge": self.nudge, "relaxer": self.relaxer, "update": self.rule,
        }  # fmt: skip
        if self.free_relaxer is not None:
            found["free_relaxer"] = self.free_relaxer
        return found

    def describe(self) -> dict[str, str]:
        """Every part as text, for the configuration of a run."""
        return {
            "energy": repr(self.energy),
            "nudge": repr(self.nudge),
            "relaxer": repr(self.relaxer),
            "free_relaxer": repr(self.free_relaxer or self.relaxer),
            "update": label(self.rule),
            "initial_state": self.initial_state,
        }

    def _repr_html_(self) -> str:
        return notebook.table("Algorithm", ("part", ""), list(self.describe().items()))
