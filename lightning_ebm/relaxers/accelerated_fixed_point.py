"""Odd-even sweeps, extrapolated along the last two moves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lightning_ebm.relaxers.base import Landscape, Relaxation, Relaxer, Status, as_complex, checked_steps, force_norm
from lightning_ebm.relaxers.fixed_point import FixedPoint, halves_of, ran_away, rounding_of

_FURTHEST = 1e3
"""Longest extrapolation, in moves: beyond a rate of .999 per sweep, what looks like a slope may be rounding."""

_INDEPENDENT = 1 - 1e-4
"""Squared cosine, in the metric of the curvature, above which two moves are one direction and some rounding."""


@dataclass(frozen=True)
class AcceleratedFixedPoint(Relaxer):
    """x <- S(x) + c_1 d_1 + c_2 d_2: S is a sweep of `FixedPoint`, d_i are how S(x) has changed in the last two steps.

    With r = S(x) - x, and m_i, t_i how x and r have changed in the last two steps, c makes what a sweep would still do
    orthogonal to the last moves, <m_i, r + sum_j c_j t_j> = 0, in each sample by itself. The products are those of the
    layers at even depth alone: in a chain, they are all that the next sweep depends on.

    There r is minus the slope of the energy once the odd layers have answered, in a metric that responses bring with
    them, and -<m_i, t_j> its curvature: the condition is that of conjugate gradients, and the number of sweeps goes as
    the square root of the plain one's. It is used where that curvature is positive: elsewhere the energy is lower
    further out, and least squares on r (`Anderson`), which do not ask, would be drawn to the saddle. What is not
    positive along both moves is tried along the last one, and then left to the plain sweep. A step that leaves
    a sample with a larger residual than it began with is taken back for that sample, to where the plain sweep had brought it.

    The residual is that of `FixedPoint`, how far the sweep moved each sample, as are the meaning of `tol`, the
    statuses and the energies. The last step is a sweep with nothing added. A graph (`Equilibrium.exported`) has plain
    sweeps.

    Args:
        max_steps: how many sweeps, or how many at most.
        tol: relative residual at which a sample has settled; 0 takes exactly `max_steps`.

    Raises:
        ConfigurationError: an argument out of range; (in use) an energy that has no best response.
        RelaxationDivergedError: (in use) states ran away, as they would by plain sweeps.

    Source:
        Type I of Fang and Saad 2009 (Numer. Linear Algebra Appl. 16), with two differences; the condition on the
        curvature is this library's. Over-relaxation (Young 1954) took more sweeps on all networks it was measured on.
    """

    complex_states: ClassVar[bool] = True

    max_steps: int = 100
    tol: float = 1e-3

    def __post_init__(self) -> None:
        checked_steps(self, self.max_steps, self.tol)

    def relax(self, landscape: Landscape, start: Sequence[Tensor], strength: complex) -> Relaxation:
        if get_proxy_mode() is not None:  # a graph is being made
            return FixedPoint(self.max_steps).relax(landscape, start, strength)
        point = as_complex(start, strength)
        halves = halves_of(landscape.depths)
        path = _Path(landscape, halves[-1])
        energies = [landscape.energy_of(point, strength)]
        for steps in range(1, self.max_steps + 1):  # read after the loop
            before = point
            for layers in halves:
                swept = list(point)
                for k, answer in zip(layers, landscape.answers(point, strength, layers), strict=True):
                    swept[k] = answer
                point = swept
            moved = [y - x for x, y in zip(before, point, strict=True)]
            norm = force_norm(landscape, moved)
            if steps == 1:
                first, settled_at = norm, (self.tol * norm).maximum(rounding_of(landscape, point))
                bound = 1e6 * first.max().clamp_min(1)
            lost = path.extrapolated & ~(norm <= first)  # nan is not
            away = ~(norm <= bound) & ~lost
            unsettled = norm > settled_at
            moving, failed, diverged = torch.stack([unsettled, lost, away]).any(1).tolist()  # asked for once
            if diverged:
                raise ran_away(self, landscape, strength, steps, before, point)
            step = _Step(before, moved, point, norm)
            if failed:
                step = path.without(step, lost)
                point, norm = step.swept, step.norm
                unsettled = norm > settled_at
            if steps == self.max_steps or (self.tol and not moving):
                break
            point = path.onwards(step, unsettled)
        settled = bool((norm <= settled_at).all())
        residual = norm / first.clamp_min(torch.finfo(first.dtype).tiny)
        grew = bool(norm.norm() > first.norm()) and not settled
        status: Status = "fixed" if not self.tol else "converged" if settled else "max_steps"
        energies.append(landscape.energy_of(point, strength))
        return Relaxation(point, "states", "max_steps" if grew else status, steps, residual, energies)


@dataclass
class _Step:
    """A sweep: from where, by how much, to where, and how far each sample went."""

    start: list[Tensor]
    moved: list[Tensor]
    swept: list[Tensor]
    norm: Tensor


class _Path:
    """Where the last sweeps began and led.

    Args:
        landscape: tells samples apart.
        layers: those that determine the next sweep.
    """

    def __init__(self, landscape: Landscape, layers: list[int]) -> None:
        self._landscape = landscape
        self._layers = layers
        self._last: _Step | None = None
        self._changes: list[list[Tensor]] = []  # d_1, d_2, of all layers
        self._moves: list[list[Tensor]] = []  # m_1, m_2, as r below of the layers that matter
        self._residuals: list[list[Tensor]] = []  # r of the last step and the one before
        self._slope = self._curvature = torch.zeros(())  # <m_1, r> and -<m_1, t_1> of the last step
        self.extrapolated = torch.zeros((), dtype=torch.bool)
        """Which samples were sent elsewhere than the sweep went."""

    def onwards(self, step: _Step, unsettled: Tensor) -> list[Tensor]:
        """Where the next sweep begins: S(x) + c_1 d_1 + c_2 d_2 for samples that are `unsettled`, S(x) for others."""
        last, self._last = self._last, step
        residual = [step.moved[k] for k in self._layers]
        if last is None:
            self._residuals = [residual]
            return step.swept
        self._moves = [[step.start[k] - last.start[k] for k in self._layers], *self._moves[:1]]
        reach = self._reach(residual, unsettled)
        self._residuals = [residual, *self._residuals[:1]]
        # What is as large as all states is written over what is no longer needed: fresh memory costs more than sums.
        spare: Sequence[Tensor | None] = self._changes[1] if len(self._changes) > 1 else [None] * len(step.swept)
        ends = zip(step.swept, last.swept, spare, strict=True)
        self._changes = [[torch.sub(y, x, out=old) for y, x, old in ends], *self._changes[:1]]
        point = step.swept
        for order, (c, changes) in enumerate(zip(reach, self._changes, strict=True)):
            far = self._landscape.spread(c, point)
            sums = zip(point, far, changes, strict=True)
            point = [x.addcmul_(s, d) if order else torch.addcmul(x, s, d) for x, s, d in sums]
        return self._landscape.feasible(point)

    def without(self, step: _Step, lost: Tensor) -> _Step:
        """The step with these samples back where the last sweep had brought them, as if that had been this one."""
        last = self._last
        assert last is not None  # without which nobody is sent elsewhere

        def back(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
            marks = self._landscape.spread(lost.to(step.norm.dtype), new)
            return [torch.where(mark > 0, x, y) for mark, x, y in zip(marks, old, new, strict=True)]

        return _Step(
            back(last.start, step.start),
            back(last.moved, step.moved),
            back(last.swept, step.swept),
            torch.where(lost, last.norm, step.norm),
        )

    def _reach(self, residual: list[Tensor], unsettled: Tensor) -> list[Tensor]:
        """c_1, and c_2 once there is a d_2, ``(B,)`` each; 0 along what has no positive curvature."""
        move, before = self._moves[0], self._residuals
        slope, before_slope = self._product(move, residual), self._product(move, before[0])
        curvature = before_slope - slope
        self.extrapolated = unsettled & (curvature > 0)
        alone = torch.where(self.extrapolated, slope / curvature, 0.0)
        found = [alone]
        if len(self._moves) > 1:
            other_slope, other_curvature = self._product(self._moves[1], residual), self._curvature
            across = self._product(move, before[1]) - before_slope  # -<m_1, t_2>
            back = self._slope - other_slope  # -<m_2, t_1>
            square = curvature * other_curvature
            both = self.extrapolated & (other_curvature > 0) & ((across + back).square() < 4 * _INDEPENDENT * square)
            room = square - across * back
            first = (other_curvature * slope - across * other_slope) / room
            second = (curvature * other_slope - back * slope) / room
            found = [torch.where(both, first, alone), torch.where(both, second, 0.0)]
        self._slope, self._curvature = slope, curvature
        return [c.clamp(-_FURTHEST, _FURTHEST) for c in found]

    def _product(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        return self._landscape.products(left, right, self._layers)
