"""Several relaxers, and the one of them that gets there for least."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.relaxers.base import Landscape, Relaxation, Relaxer
from lightning_ebm.relaxers.forces import Forces
from lightning_ebm.relaxers.sweeping import SweepingRelaxer

log = logging.getLogger(__name__)

_REDUCTION = 0.1
"""Passes that a sum over all states costs, with the arithmetic around it: measured .08 to .25 on MLPs."""

_FURTHER = 1.5
"""How much more than the cheapest so far a candidate may cost before it is given up."""

Tried = dict[str, list[float]]
"""Cost of each candidate by kind of phase; inf where it did not get there."""


class Cheapest(Relaxer):
    """argmin over candidates of the cost of relaxing to the same tolerance, found on the first batch.

    On the first batch each candidate relaxes the same phase from the same start. One that ends "converged" has got
    there; if none does, one that is "stalled" has. It must not end higher in energy than the best by more than a
    hundredth of that one's fall: what is fast to another stationary point is not fast. The cheapest relaxes from then
    on, exactly as it would by itself. Free phases, nudged ones and negatively nudged ones choose apart. As training
    changes what is cheap, the comparison is made again at the 10th batch, the 100th, the 1000th, and so on.

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

    Example:
        >>> from lightning_ebm.relaxers import Anderson, ErrorCoordinates
        >>> Cheapest(ErrorCoordinates(), Anderson(coordinates="errors"))
        Cheapest(2 candidates, none chosen yet)
    """

    def __init__(self, *candidates: Relaxer) -> None:
        if not candidates:
            raise ConfigurationError(
                'Cheapest() has nothing to choose from. Give it relaxers, or take relaxer="auto", which finds those'
                " that fit the energy."
            )
        for candidate in candidates:
            if not isinstance(candidate, Relaxer) or isinstance(candidate, Cheapest) or candidate.update != "contrast":
                raise ConfigurationError(
                    f"Cheapest({candidate!r}): expected relaxers of which any may stand in for any other. One that is"
                    " read in a way of its own (Sweep, FixedPrediction, AugmentedLagrangian, Dyadic) finds something"
                    " else. Use it by itself."
                )
        tolerances = {getattr(candidate, "tol", 0.0) for candidate in candidates}
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
    def needs_error_coordinates(self) -> bool:  # type: ignore[override]  # each one's own here, its class's elsewhere
        return any(candidate.needs_error_coordinates for candidate in self.candidates)

    @property
    def complex_states(self) -> bool:  # type: ignore[override]
        return all(candidate.complex_states for candidate in self.candidates)

    @property
    def chosen(self) -> Mapping[str, Relaxer]:
        """The relaxer of each kind of phase met so far: "free", "nudged", "negative"."""
        return self._chosen

    def __repr__(self) -> str:
        chosen = "".join(f", {kind}={relaxer!r}" for kind, relaxer in self._chosen.items())
        return f"Cheapest({len(self.candidates)} candidates{chosen or ', none chosen yet'})"

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: complex) -> Relaxation:
        kind = _kind(strength)
        self._counts[kind] = count = self._counts.get(kind, 0) + 1
        if kind not in self._chosen or _is_due(count):
            return self._compared(kind, landscape, start, strength)
        found = None
        with suppress(RelaxationDivergedError):
            found = self._chosen[kind].relax(landscape, start, strength)  # type: ignore[arg-type]  # complex where it can
        kept = self._is_kept(kind, found)
        return found if kept and found is not None else self._compared(kind, landscape, start, strength, failed=True)

    def relax_abreast(
        self, landscape: Landscape, start: Sequence[Tensor], strengths: Sequence[complex]
    ) -> list[Relaxation]:
        """What `relax` gives at each strength; together where all have settled on one relaxer that sweeps."""
        kinds = [_kind(strength) for strength in strengths]
        chosen = [self._chosen.get(kind) for kind in kinds]
        due = any(_is_due(self._counts.get(kind, 0) + 1) for kind in kinds)
        found: list[Relaxation] = []
        if isinstance(chosen[0], SweepingRelaxer) and chosen.count(chosen[0]) == len(chosen) and not due:
            with suppress(RelaxationDivergedError):
                found = chosen[0].relax_abreast(landscape, start, strengths)
        if not found:  # or again, if one ran away: who it was is given to all candidates
            return [self.relax(landscape, start, strength) for strength in strengths]
        for kind in kinds:
            self._counts[kind] = self._counts.get(kind, 0) + 1
        return [
            one if self._is_kept(kind, one) else self._compared(kind, landscape, start, strength, failed=True)
            for kind, strength, one in zip(kinds, strengths, found, strict=True)
        ]

    def _is_kept(self, kind: str, found: Relaxation | None) -> bool:
        """Whether what the chosen relaxer has found will do; keeps count of where it will not."""
        if found is not None and found.status != "max_steps":
            return True
        self._failures[kind] = failures = self._failures.get(kind, 0) + 1
        return found is not None and failures & (failures - 1) != 0  # not a power of 2

    def _compared(
        self, kind: str, landscape: Landscape, start: Sequence[Tensor], strength: complex, failed: bool = False
    ) -> Relaxation:
        """Tries all of them; what the chosen one finds."""
        # Whoever watches is shown the chosen one alone, which therefore goes once more.
        unwatched: Landscape = getattr(landscape, "unwatched", landscape)
        limit, costs, ends = math.inf, [], []
        for candidate in self.candidates:
            counting: Any = _Counting(unwatched, limit)
            end: Relaxation | RelaxationDivergedError | None = None
            try:
                end = candidate.relax(counting, start, strength)  # type: ignore[arg-type]
            except _TooDear:
                pass
            except RelaxationDivergedError as error:
                end = error
            there = isinstance(end, Relaxation) and end.status == "converged"
            limit = min(limit, _FURTHER * counting.cost) if there else limit
            costs.append(counting.cost)
            ends.append(end)
        costs = _of_those_that_arrived(costs, ends)
        index = self._nearest(ends, strength) if min(costs) == math.inf else costs.index(min(costs))
        self.tried[kind] = costs
        self._choose(kind, index, costs, failed)
        found = ends[index]
        if unwatched is not landscape or not isinstance(found, Relaxation):
            return self.candidates[index].relax(landscape, start, strength)  # type: ignore[arg-type]
        return found

    def _nearest(self, ends: Sequence[object], strength: complex) -> int:
        left = [float(end.residual.norm()) if isinstance(end, Relaxation) else math.inf for end in ends]
        if min(left) == math.inf:
            told = "; ".join(f"{c!r}: {end}" for c, end in zip(self.candidates, ends, strict=True))
            raise RelaxationDivergedError(
                f"None of {len(self.candidates)} relaxers finds an equilibrium at nudge {strength:g}: an update read"
                f" anywhere here would be noise. Take a smaller nudge, or smaller weights. {told}"
            )
        return left.index(min(left))

    def _choose(self, kind: str, index: int, costs: Sequence[float], failed: bool = False) -> None:
        before, now = self._chosen.get(kind), self.candidates[index]
        self._chosen[kind] = now
        if now is before:
            return
        told = "; ".join(f"{cost:.1f} {c!r}" for cost, c in zip(costs, self.candidates, strict=True))
        if not failed:
            log.info("The %s phase is relaxed by %r. Passes it would cost: %s.", kind, now, told)
        elif not self._said:
            self._said = True
            log.warning(
                "The %s phase no longer settles by %r, and is relaxed by %r from here on. Passes it would cost: %s."
                " (Said once; the report names the relaxer of every step.)", kind, before, now, told,
            )  # fmt: skip

    def agree(self, told: Sequence[Tried]) -> None:
        """Takes what costs all processes together least.

        Args:
            told: `tried` of each of them, in the same order everywhere.
        """
        self.tried = {}
        for kind in dict.fromkeys(kind for one in told for kind in one):
            costs = [sum(column) for column in zip(*(one[kind] for one in told if kind in one), strict=True)]
            if min(costs) < math.inf:
                self._choose(kind, costs.index(min(costs)), costs)

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


def _of_those_that_arrived(costs: Sequence[float], ends: Sequence[object]) -> list[float]:
    """Their costs, more for those given up on the way, and infinity for the others."""
    arrived = [e for e in ends if isinstance(e, Relaxation) and e.status in ("converged", "stalled")]
    settled = [e for e in arrived if e.status == "converged"] or arrived
    falls = {id(e): float(e.energies[0] - e.energies[-1]) for e in settled if e.energies}
    # Energies are sums over the batch, and round at their own size.
    size = max((abs(float(e.energies[0])) for e in settled if e.energies), default=0.0)
    least = max(falls.values(), default=0.0) - 0.01 * abs(max(falls.values(), default=0.0)) - 1e-5 * size
    lowest = {id(e) for e in settled if falls.get(id(e), math.inf) >= least}
    found = [cost if id(end) in lowest else math.inf for cost, end in zip(costs, ends, strict=True)]
    if min(found) == math.inf:
        return found
    given_up = [max(cost, _FURTHER * min(found)) for cost in costs]
    return [more if end is None else cost for more, cost, end in zip(given_up, found, ends, strict=True)]


class _TooDear(Exception):  # not an error: the end of a trial that has lost already
    pass


class _Counting:
    """A `Landscape` that passes every question on, and counts what the answers cost.

    Args:
        landscape: the one that knows.
        limit: from where on it refuses.
    """

    def __init__(self, landscape: Landscape, limit: float) -> None:
        self._landscape = landscape
        self._limit = limit
        self.cost = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._landscape, name)

    def forces(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.forces`."""
        self._spend(1.5)
        return self._landscape.forces(states, strength)

    def error_forces(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.error_forces`."""
        self._spend(1.0)
        return self._landscape.error_forces(errors, strength)

    def responses(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.responses`."""
        self._spend(1.5)
        return self._landscape.responses(states, strength)

    def answers(self, states: Sequence[Tensor], strength: complex, layers: Sequence[int]) -> list[Tensor]:
        """See `Landscape.answers`."""
        self._spend(len(layers) / len(states))
        return self._landscape.answers(states, strength, layers)

    def energy_of(self, states: Sequence[Tensor], strength: complex) -> Tensor:
        """See `Landscape.energy_of`."""
        self._spend(0.5)
        return self._landscape.energy_of(states, strength)

    def per_sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """See `Landscape.per_sample`."""
        self._spend(_REDUCTION)
        return self._landscape.per_sample(tensors)

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """See `Landscape.squares`."""
        self._spend(_REDUCTION)
        return self._landscape.squares(tensors)

    def products(self, left: Sequence[Tensor], right: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """See `Landscape.products`."""
        self._spend(_REDUCTION * len(layers) / len(self._landscape.names))
        return self._landscape.products(left, right, layers)

    def _spend(self, cost: float) -> None:
        self.cost += cost
        if self.cost > self._limit:
            raise _TooDear
