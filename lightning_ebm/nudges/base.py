"""A nudge is a table of phases."""

import cmath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.part import Part
from lightning_ebm.promises import is_kept


class Phase(NamedTuple):
    """One row of the table: relax on I + strength * loss, and count the result with this weight.

    Attributes:
        strength: lambda, the weight of the loss, per sample; 0 is the free phase; complex in holomorphic tables.
        weight: what this phase's dE/dtheta is multiplied by in the update, of which the real part counts.
        held: the output is held at o - strength dL/do (o the free output) instead, and the loss does not enter E.
    """

    strength: complex
    weight: complex
    held: bool = False

    @property
    def is_complex(self) -> bool:
        """Whether states are complex in it."""
        return isinstance(self.strength, complex)

    @property
    def is_nudged(self) -> bool:
        """Whether something pulls or holds, so that this is not the free phase."""
        return self.held or self.strength != 0


class Nudge(Part, ABC):
    """The update is sum_p weight_p * dE/dtheta(x_p), with x_p the state relaxed at strength_p and then held fixed.

    The weights of a table sum to 0 and weight * strength sums to 1, so that a finite difference in lambda results,
    and whatever part of the loss depends on the parameters directly keeps its own gradient.

    A subclass writes ``phases``. What the table needs of the network and of the relaxer is read off it, by the
    properties below; a subclass may override them where it knows better.

    Attributes:
        per: what the strengths are per: "sample", the loss of a sample being what the user's code makes it, or
            "element", the loss being the sum of what its mean over the elements of a sample runs over.
    """

    per: Literal["sample", "element"] = "sample"

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The table of one batch, one row for each strength, the strongest first. Empty is the limit of no nudge."""

    def held_output(self, free: Tensor, loss_slope: Tensor, strength: float, batch: Any) -> Tensor:
        """Where a held phase holds the output: o - strength dL/do, both ``(B, ...)``, L per sample."""
        return free - strength * loss_slope

    adapts: ClassVar[bool] = False
    """Whether it is told how phases end, see `adapt` and `note`."""

    def adapt(self, relax: Callable[[Phase], str]) -> None:  # most have nothing to do
        """Told before the table of a batch is asked for; for nudges that look before they pull.

        Args:
            relax: relaxes a phase on this batch for trial, without a trace, and says how that ended: a status,
                "diverged", "absorbed" where the loss pulled with less than 3/4 of its first force, or "level" in place
                of "max_steps" where no more than a thousandth of what was gained seems left to gain.
        """

    def note(self, statuses: Sequence[str]) -> None:
        """Told how the nudged phases of a batch ended, as in `adapt`."""

    def deterministic(self) -> "Nudge":
        """A nudge with the same needs whose table may be looked at without a draw: itself, if it draws nothing."""
        return self

    @property
    def needs_output_state(self) -> bool:
        """Whether the output must be a state, because the nudge holds it."""
        return any(phase.held for phase in self._typical)

    @property
    def complex_states(self) -> bool:
        """Whether states become complex, because a strength is."""
        return any(phase.is_complex for phase in self._typical)

    @property
    def linear_response(self) -> bool:
        """Whether the nudge is infinitesimal: no state moves, the free equilibrium is linearized instead."""
        return not self._typical

    @property
    def _typical(self) -> tuple[Phase, ...]:
        """The table of some batch."""
        return table_of(without_draw(self))


def without_draw(nudge: Nudge) -> Nudge:
    """`Nudge.deterministic`; a subclass of one that draws, with a table of its own, is asked itself."""
    return nudge.deterministic() if is_kept(nudge, "deterministic", "phases") else nudge


def table_of(nudge: Nudge) -> tuple[Phase, ...]:
    """`Nudge.phases` for one batch, with numbers that are real where they can be.

    Raises:
        ConfigurationError: rows that are no phases, that are not finite, or that hold the output at a complex strength.
    """
    rows: Any = nudge.phases()
    if not isinstance(rows, Iterable):
        raise ConfigurationError(
            f"{type(nudge).__name__}.phases() gave {checked.shown(rows)}; expected the rows of a table,"
            " (ebm.Phase(strength, weight), ...)."
        )
    return tuple(_checked(nudge, row) for row in rows)


def _checked(nudge: Nudge, row: Any) -> Phase:
    name = type(nudge).__name__
    try:
        phase = Phase(*row)
        strength, weight = complex(phase.strength), complex(phase.weight)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{name}.phases() gave the row {row!r}; expected ebm.Phase(strength, weight, held=False), two numbers and"
            " whether the output is held."
        ) from error
    if not (cmath.isfinite(strength) and cmath.isfinite(weight)):
        raise ConfigurationError(
            f"{name}.phases() gave {phase!r}: strength and weight must be finite, or every update is nan. Is the weight"
            " 1 over a strength that is 0?"
        )
    if strength.imag == 0:  # real arithmetic is exact there, and cheaper; only the real part of the update counts
        return Phase(strength.real, weight.real, bool(phase.held))
    if phase.held:
        raise ConfigurationError(
            f"{name}.phases() gave {phase!r}: a held output lies at a real value, o - strength dL/do, so that the"
            " strength of a held phase must be real. Leave `held` out for a complex nudge."
        )
    return Phase(strength, weight)


def checked_strength(owner: object, strength: Any) -> float:
    """`strength`, if a phase can be divided by it."""
    wanted = (
        "a finite number other than 0: the update divides by the nudge, and at 0 nothing pulls the states and every"
        " update would be 0/0. Try 1.0e-3; for an exact gradient without a small number take ebm.Infinitesimal()"
    )
    found = checked.number(owner, "strength", strength, wanted)
    if not found:
        checked.refuse(owner, "strength", strength, wanted)
    return found
