"""A nudge as strong as the network can settle under."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.nudges.base import Nudge, Phase, table_of
from lightning_ebm.nudges.one_sided import OneSided

log = logging.getLogger(__name__)

_STRENGTHS = tuple(2.0**-k for k in range(14))
"""Below, states in float32 lose what an update is read from: their error is about 1e-7 / lambda."""
_WEAKEST = _STRENGTHS[-1]
_FAINTEST = 2.0**-20
"""Below, rounding may take as much of an update as states absorb that ask for a weaker nudge."""


class Strongest(Nudge):
    """`max {lambda = 1, 1/2, 1/4, ... : every phase settles, and 3/4 of its pull is left}`, in the table of a template.

    On the first batch the strengths are tried from the strongest down. The first is kept under which the relaxation
    of each phase ends as "converged", "kink" or "fixed" within the relaxer's budget, and on the way of which the loss
    pulls with three quarters of its first force g or more, 2 (E_start - E_end) / |g|^2: parameters do not learn from
    what states absorb. For a quadratic loss, with k its curvature as the states feel it, that is 1 / (1 + lambda k), by
    which errors are multiplied and the update grows too small; a constant in the loss has no part in it.

    If no strength down to 2^-13 settles, it is the largest at which no more than a thousandth of the energy gained
    seems left to gain when the budget ends ("level"); else the weakest. Of later batches "level" is always enough: at
    kinks a weaker nudge settles no better.

    When training makes states absorb more, the strength is halved, down to 2^-20: weights that grow let states absorb
    all of a loss, and what is left to learn from is none of its gradient. When it leaves more to gain, the strength is
    halved at the first such batch, the second, the fourth, the eighth, down to 2^-13, so that a network on which
    nothing settles is not left without a nudge.
    Each choice is logged; the one of now is part of `repr`, of the report and of checkpoints. Under many devices all
    ranks go by the weakest that one of them needs.

    Args:
        template: which phases there are, a nudge with one real `strength` and without a draw: `OneSided`, `Centered`.

    Raises:
        ConfigurationError: a template of another kind.

    Examples:
        >>> Strongest().phases()[0]
        Phase(strength=1.0, weight=1.0, held=False)
    """

    adapts = True

    def __init__(self, template: Nudge | None = None) -> None:
        template = OneSided() if template is None else template
        wanted = "a nudge with one real strength, such as ebm.OneSided() or ebm.Centered()"
        self.template: Nudge = checked.instance(self, "template", template, Nudge, wanted)
        self.per = self.template.per
        self.strength: float | None = None
        """The choice; None before the first batch."""
        self.tried: list[float] = []
        """What was chosen since ranks last agreed, at most one."""
        self._failures = 0
        self._check()

    def _check(self) -> None:
        template: Any = self.template
        fields = {f.name for f in dataclasses.fields(template)} if dataclasses.is_dataclass(template) else set()
        fits = "strength" in fields and self.template.deterministic() is self.template
        if not fits or self.template.complex_states or self.template.needs_output_state:
            raise ConfigurationError(
                f'nudge="auto" cannot choose the strength of {self.template!r}: expected phases at one real strength,'
                " without a draw, as those of ebm.OneSided(...) and ebm.Centered(...). Give the nudge its own strength."
            )

    def __repr__(self) -> str:
        return f"Strongest({self._at(1.0 if self.strength is None else self.strength)!r})"

    def _at(self, strength: float) -> Nudge:
        template: Any = self.template  # a dataclass with that field, which was checked
        found: Nudge = dataclasses.replace(template, strength=strength)
        return found

    def phases(self) -> tuple[Phase, ...]:
        return self._at(1.0 if self.strength is None else self.strength).phases()

    def adapt(self, relax: Callable[[Phase], str]) -> None:
        """See `Nudge.adapt`."""
        if self.strength is not None:
            return
        level: float | None = None
        for strength in _STRENGTHS:
            ended = self._ended(strength, relax)
            if ended <= _SETTLED:
                why = "the largest under which the first batch settles and 3/4 of its pull is left"
                return self._choose(strength, why)
            if level is None and ended <= _LEVEL:
                level = strength
        if level is None:
            return self._choose(_WEAKEST, "the first batch settles under no larger one, nor under this")
        why = "the first batch settles under none, and this is the largest under which no energy is left to gain"
        return self._choose(level, why)

    def _ended(self, strength: float, relax: Callable[[Phase], str]) -> set[str]:
        """How the phases end, up to the first that says that this strength is none."""
        found = set[str]()
        for phase in table_of(self._at(strength)):
            if phase.is_nudged:
                found.add(relax(phase))
                if not found <= _LEVEL:
                    break
        return found

    def note(self, statuses: Sequence[str]) -> None:
        """See `Nudge.note`."""
        if self.strength is None or _LEVEL.issuperset(statuses):
            return
        if "absorbed" in statuses and self.strength > _FAINTEST:
            self._choose(self.strength / 2, f"states absorb more than a quarter of the pull at {self.strength:g}")
            return
        self._failures += 1
        if self._failures & (self._failures - 1) == 0 and self.strength > _WEAKEST:  # a power of 2
            self._choose(self.strength / 2, f"batches no longer settle at {self.strength:g}")

    def _choose(self, strength: float, why: str) -> None:
        self.strength, self.tried = strength, [strength]
        log.info("Strength of the nudge: %g, as %s.", strength, why)

    def agree(self, told: Sequence[Sequence[float]]) -> None:
        """Takes the weakest that a process has chosen.

        Args:
            told: `tried` of each of them.
        """
        self.strength, self.tried = min(strength for one in told for strength in one), []

    def state_dict(self) -> dict[str, Any]:
        """What was chosen."""
        return {"strength": self.strength, "failures": self._failures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stays with it."""
        self.strength, self._failures, self.tried = state["strength"], state["failures"], []


_SETTLED = frozenset({"converged", "kink", "fixed"})
_LEVEL = _SETTLED | {"level"}
