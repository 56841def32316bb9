"""Relaxers tried on the same phases: what each costs, and which of them costs least."""

import math
from collections.abc import Sequence

from torch import Tensor

from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import Landscape
from lightning_ebm.relaxers.base import Relaxation, Relaxer
from lightning_ebm.relaxers.counting import Counting, TooDear

FURTHER = 1.5
"""How much more than the cheapest so far a candidate may cost before it is given up."""

Tried = dict[tuple[str, ...], list[list[float]]]
"""By the kinds of the phases decided together: for each of these phases, what each candidate costs.

It is inf where a candidate does not get there; where none does, for all but the one that comes nearest.
"""

Trial = tuple[float, Relaxation | RelaxationDivergedError | None]
"""What one candidate cost in one phase, and where it ended; None if it was given up."""


def trials_of(
    candidate: Relaxer, landscape: Landscape, start: Sequence[Tensor], strengths: Sequence[complex], limit: float
) -> list[Trial]:
    """How it goes at each strength, for no more than the limit in all."""
    trials: list[Trial] = []
    for strength in strengths:
        counting = Counting(landscape, limit - sum(cost for cost, _ in trials))
        end: Relaxation | RelaxationDivergedError | None = None
        try:
            (end,) = candidate.relax_all(counting, start, [strength])
        except TooDear:
            pass
        except RelaxationDivergedError as error:
            end = error
        trials.append((counting.cost, end))
    return trials


def table_of(phases: Sequence[Sequence[Trial]]) -> list[list[float]]:
    """The rows of `Tried`, with more than the least in all for those given up on the way."""
    rows = [_of_those_that_arrived(phase) for phase in phases]
    dear = FURTHER * min(map(sum, zip(*rows, strict=True)))
    return [
        [max(cost, dear) if end is None else found for (cost, end), found in zip(phase, row, strict=True)]
        for phase, row in zip(phases, rows, strict=True)
    ]


def _of_those_that_arrived(phase: Sequence[Trial]) -> list[float]:
    """Their costs, or that of the one that came nearest; infinity for the others."""
    ends = [end for _, end in phase]
    arrived = [e for e in ends if isinstance(e, Relaxation) and e.status in ("converged", "kink", "stalled")]
    settled = [e for e in arrived if e.status == "converged"] or arrived
    falls = {id(e): float(e.energies[0] - e.energies[-1]) for e in settled if e.energies}
    # Energies are sums over the batch, and round at their own size.
    size = max((abs(float(e.energies[0])) for e in settled if e.energies), default=0.0)
    least = max(falls.values(), default=0.0) - 0.01 * abs(max(falls.values(), default=0.0)) - 1e-5 * size
    taken = {id(e) for e in settled if falls.get(id(e), math.inf) >= least}
    if not settled:
        left = [float(end.residual.norm()) if isinstance(end, Relaxation) else math.inf for end in ends]
        taken = {id(ends[left.index(min(left))])}
    return [cost if id(end) in taken else math.inf for cost, end in phase]


def decided(kinds: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, int]:
    """By kind the candidate that costs least: one for all rows if any gets there in all of them."""
    missed, _, index = _least(rows)
    if not missed:
        return dict.fromkeys(kinds, index)
    return {k: _least([row for kind, row in zip(kinds, rows, strict=True) if kind == k])[2] for k in kinds}


def _least(rows: Sequence[Sequence[float]]) -> tuple[int, float, int]:
    """In how many rows it did not get there, what it costs in the others, and which it is: the least such triple.

    Costs are rounded, so that those that are equal are not told apart by the order in which they were added up.
    """
    columns = enumerate(zip(*rows, strict=True))
    return min((c.count(math.inf), round(sum(x for x in c if x < math.inf), 6), index) for index, c in columns)
