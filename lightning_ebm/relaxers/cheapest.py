"""Several relaxers, and the one of them that gets there for least."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, cast

from torch import Tensor

from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.evaluations import Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer
from lightning_ebm.relaxers.trials import FURTHER, Trial, Tried, decided, table_of, trials_of

log = logging.getLogger(__name__)


class Cheapest(Relaxer):
    """argmin over candidates of the cost of relaxing to the same tolerance, found on the first batch.

    On the first batch each candidate relaxes the same phase from the same start. One that ends "converged" has got
    there; if none does, one that is "stalled" has. It must not end higher in energy than the best by more than a
    hundredth of that one's fall: what is fast to another stationary point is not fast. The cheapest relaxes from then
    on, exactly as it would by itself. As training changes what is cheap, the comparison is made again at the 10th
    batch, the 100th, the 1000th, and so on.

    Free phases and nudged ones choose apart. Both signs of a centered nudge take one relaxer p, so that they can be
    swept side by side: argmin_p sum_lambda cost(p, lambda), of those that get there at every strength lambda. Where no
    p does, each sign chooses by itself.

    Cost is counted, not timed: passes through the network and back, of which answers of some layers count for their
    share, an energy alone for a half, and forces on states or all responses, with their energies, for one and a half,
    plus a tenth for every sum over all states, which is what a relaxer's own arithmetic comes with. Counts are the same
    in every run of the same program, on a busy machine, and after resuming; clocks are not, and would send the ranks of
    one run different ways. The price is that such weights are right for no network exactly.

    When the chosen one fails (it runs away, or is still moving at its last step) the batch is given to all candidates
    again, and the choice made anew: at the first failure, the second, the fourth, the eighth, so that a network on
    which nothing settles is not relaxed by everybody at every step. That is said once. If all of them ran away, that is
    an error; if none settled, the one with least force left is taken, and says "max_steps".

    Under many devices every rank tries for itself, and after that step all take the one that cost all of them least.
    What was chosen is part of `repr`, of the report, of the run's settings where a callback logs them, and of
    checkpoints.

    Args:
        candidates: relaxers with one positive `tol`, whose result is read as a contrast, such as ErrorCoordinates,
            Anderson, FixedPoint, GradientDescent; of those that cost the same the first is taken, so put what is safest
            first.

    Raises:
        ConfigurationError: no candidates; tolerances that differ, or none; a relaxer with an update of its own.
        RelaxationDivergedError: (in use) every candidate ran away.

    Examples:
        >>> from lightning_ebm.relaxers import Anderson, ErrorCoordinates
        >>> Cheapest(ErrorCoordinates(), Anderson(coordinates="errors"))
        Cheapest(2 candidates, none chosen yet)
    """

    decides_together: ClassVar[bool] = True

    def __init__(self, *candidates: Relaxer) -> None:
        if not candidates:
            raise ConfigurationError(
                'Cheapest() has nothing to choose from. Give it relaxers, or take relaxer="auto", which finds those'
                " that fit the energy."
            )
        for candidate in candidates:
            if not isinstance(candidate, Relaxer) or candidate.decides_together or not candidate.ends_in_states:
                raise ConfigurationError(
                    f"Cheapest({candidate!r}): expected relaxers of which any may stand in for any other. One that is"
                    " read in a way of its own (Sweep, FixedPrediction, AugmentedLagrangian, Dyadic) finds something"
                    " else. Use it by itself."
                )
        tolerances = {candidate.tol for candidate in candidates}
        if len(tolerances) > 1 or not min(tolerances) > 0:
            raise ConfigurationError(
                f"Cheapest: the candidates have tolerances {sorted(tolerances)}; expected one and the same, above 0."
                " What goes less far is cheaper, and a number of steps is no place to arrive at. Give all tol=1e-3."
            )
        self.candidates = candidates
        self.tried: Tried = {}
        """What this process has found out since the ranks last agreed."""
        self._chosen: dict[str, Relaxer] = {}
        self._failures: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._said = False

    @property
    def needs_error_coordinates(self) -> bool:
        return any(candidate.needs_error_coordinates for candidate in self.candidates)

    @property
    def complex_states(self) -> bool:
        return all(candidate.complex_states for candidate in self.candidates)

    @property
    def chosen(self) -> Mapping[str, Relaxer]:
        """The relaxer of each kind of phase met so far: "free", "nudged", "negative"."""
        return self._chosen

    def __repr__(self) -> str:
        chosen = "".join(f", {kind}={relaxer!r}" for kind, relaxer in self._chosen.items())
        return f"Cheapest({len(self.candidates)} candidates{chosen or ', none chosen yet'})"

    @property
    def trusts_energy(self) -> bool:
        return any(candidate.trusts_energy for candidate in self.candidates)

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: complex) -> Relaxation:
        return self.relax_all(landscape, start, [strength])[0]

    def relax_all(
        self, landscape: Landscape, start: Sequence[Tensor], strengths: Sequence[complex]
    ) -> list[Relaxation]:
        """The relaxations at all these strengths, by one relaxer if there is one for all of them.

        Args:
            landscape: the network.
            start: where each begins.
            strengths: the nudges, real if there are several.
        """
        kinds = tuple(map(_kind, strengths))
        due = False
        for kind in kinds:
            self._counts[kind] = count = self._counts.get(kind, 0) + 1
            due = due or kind not in self._chosen or _is_due(count)
        if due:
            return self._compared(kinds, landscape, start, strengths)
        found: list[Relaxation] = []
        with suppress(RelaxationDivergedError):
            found = self._by_choice(kinds, landscape, start, strengths)
        if found and all(one.status != "max_steps" for one in found):
            return found
        again = not found
        for kind in dict.fromkeys(kinds):
            self._failures[kind] = failures = self._failures.get(kind, 0) + 1
            again = again or failures & (failures - 1) == 0  # a power of 2
        return self._compared(kinds, landscape, start, strengths, failed=True) if again else found

    def _by_choice(
        self, kinds: Sequence[str], landscape: Landscape, start: Sequence[Tensor], strengths: Sequence[complex]
    ) -> list[Relaxation]:
        chosen: list[Any] = [self._chosen[kind] for kind in kinds]
        return [one.relax(landscape, start, strength) for one, strength in zip(chosen, strengths, strict=True)]

    def _compared(
        self,
        kinds: tuple[str, ...],
        landscape: Landscape,
        start: Sequence[Tensor],
        strengths: Sequence[complex],
        failed: bool = False,
    ) -> list[Relaxation]:
        """Tries all of them; what the chosen ones find."""
        landscape.questions.answered()  # a batch that is spoiled is no candidate's fault
        # Whoever watches is shown the chosen ones alone, which therefore go once more.
        unwatched = landscape.unwatched
        limit, trials = math.inf, []
        for candidate in self.candidates:
            trials.append(trials_of(candidate, unwatched, start, strengths, limit))
            if all(isinstance(end, Relaxation) and end.status == "converged" for _, end in trials[-1]):
                limit = min(limit, FURTHER * sum(cost for cost, _ in trials[-1]))
        phases = list(zip(*trials, strict=True))
        for strength, phase in zip(strengths, phases, strict=True):
            self._check_some_ended(strength, phase)
        self.tried[kinds] = rows = table_of(phases)
        indices = decided(kinds, rows)
        self._choose(kinds, rows, indices, failed)
        if unwatched is not landscape:
            return self._by_choice(kinds, landscape, start, strengths)
        return [cast(Relaxation, phase[indices[kind]][1]) for kind, phase in zip(kinds, phases, strict=True)]

    def _check_some_ended(self, strength: complex, phase: Sequence[Trial]) -> None:
        if all(isinstance(end, RelaxationDivergedError) for _, end in phase):
            told = "; ".join(f"{c!r}: {end}" for c, (_, end) in zip(self.candidates, phase, strict=True))
            raise RelaxationDivergedError(
                f"None of {len(self.candidates)} relaxers finds an equilibrium at nudge {strength:g}: an update read"
                f" anywhere here would be noise. Take a smaller nudge, or smaller weights. {told}"
            )

    def _choose(
        self, kinds: Sequence[str], rows: Sequence[Sequence[float]], indices: Mapping[str, int], failed: bool = False
    ) -> None:
        for index in dict.fromkeys(indices.values()):
            own, now = [kind for kind in indices if indices[kind] == index], self.candidates[index]
            others = [self._chosen.get(kind) for kind in own if self._chosen.get(kind) is not now]
            self._chosen |= dict.fromkeys(own, now)
            if not others:
                continue
            costs = map(sum, zip(*(row for kind, row in zip(kinds, rows, strict=True) if kind in own), strict=True))
            told = "; ".join(f"{cost:.1f} {c!r}" for cost, c in zip(costs, self.candidates, strict=True))
            what = f"{' and '.join(own)} phase{'s' * (len(own) > 1)}"
            if not failed:
                log.info("Relaxer of the %s: %r. Passes it would cost: %s.", what, now, told)
            elif not self._said:
                self._said = True
                log.warning(
                    "%r no longer settles; relaxer of the %s from here on: %r. Passes it would cost: %s."
                    " (Said once; the report names the relaxer of every step.)", others[0], what, now, told,
                )  # fmt: skip

    def agree(self, told: Sequence[Tried]) -> None:
        """Takes what costs all processes together least.

        Args:
            told: `tried` of each of them, in the same order everywhere.
        """
        self.tried = {}
        for kinds in dict.fromkeys(kinds for one in told for kinds in one):
            tables = [one[kinds] for one in told if kinds in one]
            everywhere, rows = kinds * len(tables), [row for table in tables for row in table]
            self._choose(everywhere, rows, decided(everywhere, rows))

    def state_dict(self) -> dict[str, Any]:
        """What was chosen."""
        chosen = {kind: repr(relaxer) for kind, relaxer in self._chosen.items()}
        return {"chosen": chosen, "failures": dict(self._failures), "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stays with it, as far as it is still among the candidates."""
        by_name = {repr(candidate): candidate for candidate in self.candidates}
        self._chosen = {kind: by_name[name] for kind, name in state["chosen"].items() if name in by_name}
        self._failures, self._counts = dict(state["failures"]), dict(state["counts"])
        self.tried = {}


def _kind(strength: complex) -> str:
    return "free" if strength == 0 else "negative" if complex(strength).real < 0 else "nudged"


def _is_due(count: int) -> bool:
    return str(count).strip("0") == "1"  # a power of 10
