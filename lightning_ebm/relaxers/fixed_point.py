"""Each layer to its best response, all at once or every other one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.errors import RelaxationDivergedError
from lightning_ebm.evaluations import Energy, Landscape, ResponseForces
from lightning_ebm.evaluations.descent_step import moved
from lightning_ebm.evaluations.of_slope import SlopeEvaluation
from lightning_ebm.questions import Questions
from lightning_ebm.relaxers.base import Relaxation, Relaxer, Status, Stepper, checked_tol, force_norm
from lightning_ebm.relaxers.sweeping import SweepingRelaxer, Sweeps, halves_of

_LOOK_AT = 10
"""Every how many of a fixed number of steps it is asked whether states run away."""


@dataclass(frozen=True)
class FixedPoint(SweepingRelaxer):
    """`x_l <- (1 - damping) argmin_x [e_l(x, a_l) - <pull_l, x>] + damping x_l`, until nothing moves.

    For the Hopfield energy that is x_l <- rho(a_l + W_{l+1}' x_{l+1} - lambda dL/dx_l), for predictive coding
    x_l <- rho(a_l) + pull_l / Pi_l. "synchronous": all layers from the states of before. "odd-even": the layers at odd
    depth (the first hidden one is 1), then those at even depth from what the odd ones have become; both once a step, in
    two passes. In a chain each half then lowers the energy exactly, and nothing oscillates between neighbors.

    A step's residual is how far it moved each sample, |x' - x| / (1 - damping), all layers together. With ``tol=0``
    exactly `max_steps` steps; with ``tol > 0`` until every sample's residual is below `tol` of that of the first step,
    or below rounding. A step count that ends with a residual larger than the first is reported as "max_steps": what was
    found is no equilibrium. Energies are evaluated at the start and the end of a phase: no step needs them.

    Args:
        max_steps: how many steps, or how many at most.
        order: "odd-even" or "synchronous".
        tol: relative residual at which a sample has settled.
        damping: how much of the old state stays, from 0 to below 1.

    Raises:
        ConfigurationError: an argument out of range; (in use) an energy that has no best response.
        RelaxationDivergedError: (in use) states ran away.

    Source:
        Scellier et al. 2023 for the layered asynchronous map; Ernoult et al. 2019 for the synchronous one.
    """

    complex_states: ClassVar[bool] = True

    max_steps: int = 20
    order: Literal["odd-even", "synchronous"] = "odd-even"
    tol: float = 0.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        share = "a number from 0 to below 1; at 1 no state would ever move"
        checked.keep(
            self,
            max_steps=checked.count(self, "max_steps", self.max_steps),
            tol=checked_tol(self, self.tol),
            order=checked.choice(self, "order", self.order, ("odd-even", "synchronous")),
            damping=checked.number(self, "damping", self.damping, share, least=0, below=1),
        )

    @property
    def steps_by(self) -> SlopeEvaluation:
        return ResponseForces()

    @property
    def steps_one_by_one(self) -> int:
        return 0 if self.tol or self.order != "synchronous" else self.max_steps

    def stepper(self, start: Sequence[Tensor]) -> Stepper:
        return lambda states, gradients: moved(states, gradients, 1 - self.damping)

    def groups(self, landscape: Landscape) -> list[list[int]]:
        return halves_of(landscape.depths) if self.order == "odd-even" else [list(range(len(landscape.depths)))]

    def sweeps(self, landscape: Landscape, point: list[Tensor], strength: complex) -> Sweeps:
        questions = landscape.questions
        energies = [landscape.evaluate(Energy(), point, strength)]
        seen: _Seen | None = None
        for steps in range(1, self.max_steps + 1):  # read after the loop
            before, point = point, (yield point)
            last = steps == self.max_steps
            if not self.tol and not last and (questions.rarely or steps % _LOOK_AT) and steps != 1:
                continue
            moved = [y - x for x, y in zip(before, point, strict=True)]
            norm = force_norm(landscape, moved)
            if self.damping:
                norm = norm / (1 - self.damping)
            if seen is None:
                settled_at = (self.tol * norm).maximum(rounding_of(landscape, point))
                seen = _Seen(norm, settled_at, stays=questions.rarely and self.tol > 0)
            else:
                point = seen.note(norm, steps, before, point)
            if last and not self.tol:
                break
            if last or questions.is_due(steps):
                left, away, grew, taken = seen.asked(questions, last)
                if away:
                    raise ran_away(self, landscape, strength, int(taken), [float(m.norm()) for m in moved])
                if self.tol and left <= 0:
                    break
        assert seen is not None
        energies.append(landscape.evaluate(Energy(), point, strength))
        residual = seen.norm / seen.first.clamp_min(torch.finfo(seen.norm.dtype).tiny)
        if self.tol:
            status = _status(left, grew, self.tol)
            return Relaxation(point, "states", status, int(taken), residual, energies)
        found = Relaxation(point, "states", "fixed", steps, residual, energies)

        def check(numbers: list[float]) -> None:
            left, away, grew, _, *sizes = numbers
            if away:
                raise ran_away(self, landscape, strength, steps, sizes)
            found.status = _status(left, grew, self.tol)

        questions.later(torch.cat([seen.numbers(True), torch.stack([m.norm().to(norm) for m in moved])]), check)
        return found


class _Seen:
    """What the sweeps of one relaxation have shown so far, on the device.

    Args:
        norm: how far the first one moved each sample, ``(B,)``.
        settled_at: below which a sample has settled.
        stays: whether nothing is to move any more once all samples have settled, or states ran away.
    """

    def __init__(self, norm: Tensor, settled_at: Tensor, stays: bool) -> None:
        self.first = self.norm = norm
        self._settled_at = settled_at
        self._bound = 1e6 * norm.amax().clamp_min(1.0)
        self._stays = stays
        self._taken: int | Tensor = 1
        self._limit: float | None = None

    def asked(self, questions: Questions, last: bool) -> list[float]:
        """See `numbers`."""
        if questions.rarely:
            return questions.ask(self.numbers(last))
        found = [(self.norm - self._settled_at).amax(), self.norm.amax()]
        if last:
            found.append((self.norm.norm() > self.first.norm()).to(found[0]))
        left, largest, *grew = questions.ask(torch.stack(found))
        if self._limit is None:
            self._limit = 1e6 * max(largest, 1.0)
        return [left, not largest <= self._limit, any(grew), float(self._taken)]

    @property
    def _away(self) -> Tensor:
        return ~(self.norm.amax() <= self._bound)  # nan is not

    def note(self, norm: Tensor, steps: int, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        """One more sweep, which led from one point to another; the point to go on from."""
        if not self._stays:
            self.norm, self._taken = norm, steps
            return after
        over = (self.norm <= self._settled_at).all() | self._away
        self.norm = torch.where(over, self.norm, norm)
        self._taken = torch.where(over, self._taken, steps)
        return [torch.where(over, x, y) for x, y in zip(before, after, strict=True)]

    def numbers(self, last: bool) -> Tensor:
        """What is asked; of a growth only at the end.

        They are how far the last sample is from having settled, whether states ran away, whether the last sweep moved
        more than the first, and how many sweeps there were.
        """
        left = (self.norm - self._settled_at).amax()
        grew = self.norm.norm() > self.first.norm() if last else torch.zeros_like(left)
        taken = torch.as_tensor(self._taken, dtype=left.dtype, device=left.device)
        return torch.stack([left, self._away.to(left), grew.to(left), taken])


def _status(left: float, grew: float, tol: float) -> Status:
    """A last residual above the first is no equilibrium, whatever was asked for."""
    settled = left <= 0
    return "max_steps" if grew and not settled else "fixed" if not tol else "converged" if settled else "max_steps"


def ended(
    point: list[Tensor],
    steps: int,
    norm: Tensor,
    first: Tensor,
    settled: bool,
    tol: float,
    energies: Sequence[Tensor],
) -> Relaxation:
    """What sweeps report; a last residual above the first is no equilibrium, whatever was asked for.

    Args:
        point: where they ended.
        steps: how many there were.
        norm: how far the last one moved each sample.
        first: how far the first one did.
        settled: whether all samples have.
        tol: 0 where a number of sweeps was asked for.
        energies: at the start and at the end.
    """
    residual = norm / first.clamp_min(torch.finfo(first.dtype).tiny)
    grew = not settled and bool(norm.norm() > first.norm())
    status: Status = "fixed" if not tol else "converged" if settled else "max_steps"
    return Relaxation(point, "states", "max_steps" if grew else status, steps, residual, energies)


def rounding_of(landscape: Landscape, point: Sequence[Tensor]) -> Tensor:
    """The residual of states that are one rounding error away from their response, ``(B,)``."""
    size = landscape.norms(point)
    return 4 * max(landscape.rounding, torch.finfo(size.dtype).eps) * size


def ran_away(
    owner: Relaxer, landscape: Landscape, strength: complex, steps: int, sizes: Sequence[float]
) -> RelaxationDivergedError:
    """The error that names the layer that the last sweep moved furthest, given by how much it moved each."""
    worst = landscape.names[max(range(len(sizes)), key=lambda k: sizes[k] if sizes[k] == sizes[k] else float("inf"))]
    return RelaxationDivergedError(
        f"{type(owner).__name__} ran away at nudge {strength:g} after {steps} steps, layer {worst!r} furthest: with"
        " unbounded activations the states only settle while the feedback loop's gain is below 1, and an update read"
        " here would be noise. Use smaller weights, bounded activations, damping=0.5, a smaller nudge, or"
        ' ebm.GradientDescent with a small step; or "predictive-coding", whose free equilibrium is the forward pass. If'
        " states had settled before, the weights have grown: lower the learning rate of the parameters."
    )
