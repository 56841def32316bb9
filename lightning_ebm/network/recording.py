"""What a relaxation went through, seen from outside: a landscape that notes every point it is asked about.

No relaxer knows of it. Whoever asks for forces asks here, and the question is passed on; so relaxers written later are
recorded as those of today, and nothing is paid where nobody records.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from lightning_ebm.evaluations import Around, Coordinates, Evaluation, Landscape, ResponseForces, Slope
from lightning_ebm.evaluations.base import Result
from lightning_ebm.network.tensor_version import Versions, versions
from lightning_ebm.questions import Questions


class TraceEntry(TypedDict):
    """One relaxation in plain numbers; T evaluations of the forces (the start is one), L layers.

    nudge: lambda, its real part where it is complex. held: whether the output was held instead, and the loss is no part
    of the energy. coordinates: what moved, "states" or "errors". internal, loss: I
    and the loss, each summed over the batch, ``(T,)``; the energy is internal + nudge * loss. residual: |dE/dx_l| over
    the batch, ``(T, L)``. residual_per_sample: quantiles (0, 0.1, 0.5, 0.9, 1) of |dE/dx| over the samples, ``(T, 5)``.
    step_size: |x' - x| over |dE/dx| of consecutive evaluations, ``(T - 1,)``. curvature: <g' - g, x' - x> over
    |x' - x|^2, ``(T - 1,)``; the largest is an estimate, from below, of the energy's largest curvature. arrived: first
    evaluation at which a layer had moved, ``(L,)``; -1 is never. For relaxers that ask for responses instead of forces,
    x - response stands for dE/dx.
    """

    nudge: float
    held: bool
    coordinates: str
    internal: list[float]
    loss: list[float]
    residual: list[list[float]]
    residual_per_sample: list[list[float]]
    step_size: list[float]
    curvature: list[float]
    arrived: list[int]


@dataclass
class Trace:
    """One relaxation, as tensors that are still on their device; `read` brings them over at once."""

    nudge: complex
    held: bool
    coordinates: Coordinates
    start: list[Tensor]
    internal: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    residual: list[Tensor] = field(default_factory=list)
    per_sample: list[Tensor] = field(default_factory=list)
    moved: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    """<g, g>, <d, d> and <g' - g, d> of each step d."""

    def read(self) -> TraceEntry:
        """The numbers."""
        quantiles = torch.tensor([0, 0.1, 0.5, 0.9, 1], dtype=torch.float64)
        per_sample = torch.stack(self.per_sample).double().cpu().nan_to_num(torch.inf)
        moved = torch.stack(self.moved).cpu()
        steps = torch.stack(self.steps).double().cpu() if self.steps else torch.zeros(0, 3, dtype=torch.float64)
        forces, lengths, turned = steps.unbind(1)
        still = lengths == 0
        arrived = torch.where(moved.any(0), moved.int().argmax(0), -1)
        return {
            "nudge": self.nudge.real,
            "held": self.held,
            "coordinates": self.coordinates,
            "internal": torch.stack(self.internal).tolist(),
            "loss": torch.stack(self.loss).tolist(),
            "residual": torch.stack(self.residual).tolist(),
            "residual_per_sample": torch.quantile(per_sample, quantiles, dim=1, interpolation="nearest").T.tolist(),
            "step_size": torch.where(forces > 0, lengths / forces.clamp_min(1e-300), 0).sqrt().tolist(),
            "curvature": torch.where(still, 0, turned / lengths.masked_fill(still, 1)).tolist(),
            "arrived": arrived.tolist(),
        }


@dataclass
class _Phase:
    """One that is being recorded: what was announced of it, its trace, and the point and gradients seen last."""

    announced: tuple[complex, bool] | None = None
    trace: Trace | None = None
    before: tuple[list[Tensor], list[Tensor]] | None = None
    looked: Versions = field(default_factory=list)


class Recording(Around):
    """A `Landscape` that hands every question on to another and notes what it saw.

    A new `Trace` begins where `begin` says so, and whenever the strength or the coordinates change.

    Args:
        landscape: the one that knows the answers.

    Attributes:
        traces: one a phase, in order.
    """

    def __init__(self, landscape: Landscape) -> None:
        super().__init__(landscape)
        self._phase = _Phase()
        self._together: dict[complex, _Phase] = {}
        self.traces: list[Trace] = []
        self._questions = Questions()  # nobody is to see steps in vain

    @property
    def questions(self) -> Questions:
        return self._questions

    def begin(self, strengths: Sequence[complex], held: bool = False) -> None:
        """The next questions belong to new phases; those of a held one are asked at strength 0."""
        phases = {strength: _Phase((strength, held)) for strength in strengths}
        self._phase = phases[strengths[0]]
        self._together = phases if len(strengths) > 1 else {}

    @property
    def unwatched(self) -> Landscape:
        """The one that knows the answers, for questions that are to be no part of the record."""
        return self.inner.unwatched

    def answer(self, what: Evaluation[Result], point: Sequence[Tensor], strength: complex) -> Result:
        if what.looks:  # between forces that nobody asks for
            self._look(what.moving(point), strength)
        found = self.inner.evaluate(what.watched, point, strength)
        if (slope := what.slope(found)) is not None:
            self._note(what.coordinates, what.moving(point), strength, slope)
        return found

    def _look(self, states: Sequence[Tensor], strength: complex) -> None:
        phase, here = self._together.get(strength, self._phase), versions(states)
        if phase.announced is not None or phase.looked != here:
            self._note("states", states, strength, self.inner.evaluate(ResponseForces(), states, strength))
        phase.looked = here

    @torch.no_grad()
    def _note(self, coordinates: Coordinates, point: Sequence[Tensor], strength: complex, found: Slope) -> None:
        phase = self._together.get(strength, self._phase)
        last = phase.trace
        asked = last is not None and (0 if last.held else last.nudge) == strength
        if last is None or phase.announced is not None or not asked or last.coordinates != coordinates:
            nudge, held = phase.announced or (strength, False)
            phase.before = phase.announced = None
            last = phase.trace = Trace(nudge, held, coordinates, [x.detach().clone() for x in point])
            self.traces.append(last)
        # Copies: a relaxer may move its states, or reuse its gradients, in place.
        here = [x.detach().clone() for x in point]
        gradients = [g.detach().clone() for g in found.gradients]
        if phase.before is not None:
            steps = [b - a for a, b in zip(phase.before[0], here, strict=True)]
            turns = [h - g for g, h in zip(phase.before[1], gradients, strict=True)]
            force = _total([g.abs().double().square().sum() for g in phase.before[1]])
            length = _total([d.abs().double().square().sum() for d in steps])
            turned = _total([(t * d.conj()).sum().real.double() for t, d in zip(turns, steps, strict=True)])
            last.steps.append(torch.stack([force, length, turned]))
        phase.before = here, gradients
        last.internal.append(found.internal.detach().sum().real.double())
        last.loss.append(found.loss.detach().real.double())
        last.residual.append(torch.stack([g.abs().double().norm() for g in gradients]))
        last.per_sample.append(self.inner.per_sample([g.abs().square() for g in gradients]).sqrt())
        last.moved.append(torch.stack([(a != b).any() for a, b in zip(last.start, here, strict=True)]))


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()
