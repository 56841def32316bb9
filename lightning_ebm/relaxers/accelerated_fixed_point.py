"""Odd-even sweeps as the slopes of conjugate gradients."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import Energy, Landscape
from lightning_ebm.relaxers.base import checked_tol, force_norm
from lightning_ebm.relaxers.fixed_point import ended, looked_at, ran_away, rounding_of
from lightning_ebm.relaxers.sweeping import SweepingRelaxer, Sweeps

_FURTHEST = 1e3
"""Longest step, in sweeps: beyond a rate of 0.999 per sweep, what looks like a slope may be rounding."""

_LEFT = 0.1
"""Share of the slope along the last direction that a later sweep may find there again; in a linear network, none."""

_ALONE = 2
"""Plain sweeps before a search where only the loss comes back to a layer: most settle within them and one more."""


@dataclass(frozen=True)
class AcceleratedFixedPoint(SweepingRelaxer):
    """x <- x + alpha p, p <- r(x) + beta p: conjugate gradients whose slope is how far a sweep goes, r(x) = S(x) - x.

    S is the odd-even sweep of `FixedPoint`. In a chain the even layers are all that S depends on, r is minus the slope
    of the energy of what they leave the odd ones to answer, in the metric of their responses, and conjugate gradients
    need the square root of the plain count: a rate of rho a sweep becomes (1 - s) / (1 + s), s = sqrt(1 - rho).

    One sweep a step, at y = x + p: it is the trial that measures the curvature along p,
    `alpha = <r(x), p> / <p, r(x) - r(y)>`, and where the next step would end. r at the new x follows from those at the
    old one and at y as in a linear network; beta makes the new p conjugate to the old one. Products are those of even
    layers, each sample's own.

    At first x + p = S(x), and again wherever a sample starts anew: where the curvature is not positive (least squares
    on r, as `Anderson` takes them, do not ask, and would be drawn to saddles), where a sweep finds more than a tenth of
    the slope along the last p back, as across kinks, and where nan came back or ten times the first residual: then
    from where the last sweep but one had ended. Starting anew from no smaller a residual than before quarters the
    longest step, and at 1 the sweeps stay plain. They are plain for samples that have settled, and the first ones of a
    network with one hidden layer.

    Links within the odd or the even layers, as in residual networks, make the sweep unsymmetric: what ends is the same,
    but it is hardly sooner.

    The residual is that of `FixedPoint`, how far a sweep moved each sample, as are the meaning of `tol`, statuses and
    energies. The last step is a sweep, with nothing added. A graph (`Equilibrium.exported`) has plain sweeps.

    Args:
        max_steps: how many sweeps, or how many at most.
        tol: relative residual at which a sample has settled; 0 takes exactly `max_steps`.

    Raises:
        ConfigurationError: an argument out of range; (in use) an energy that has no best response.
        RelaxationDivergedError: (in use) states ran away.

    Source:
        Hestenes and Stiefel 1952; with every other block eliminated Hageman and Young, Applied Iterative Methods, 1981.
        Over-relaxation (Young 1954) and the types of Anderson's took more sweeps on almost all that was measured.
    """

    complex_states: ClassVar[bool] = True

    max_steps: int = 100
    tol: float = 1e-3

    def __post_init__(self) -> None:
        checked.keep(
            self,
            max_steps=checked.count(self, "max_steps", self.max_steps),
            tol=checked_tol(self, self.tol),
        )

    @property
    def trusts_energy(self) -> bool:
        return True  # conjugate gradients

    def sweeps(self, landscape: Landscape, point: list[Tensor], strength: complex) -> Sweeps:
        halves = self.groups(landscape)
        search = _Search(landscape, halves[-1])
        energies, bound = [landscape.evaluate(Energy(), point, strength)], math.inf
        for steps in range(1, self.max_steps + 1):  # read after the loop
            before, point = point, (yield point)
            moved = [y - x for x, y in zip(before, point, strict=True)]
            norm = force_norm(landscape, moved)
            if steps == 1:
                first, settled_at = norm, (self.tol * norm).maximum(rounding_of(landscape, point))
            failed = False
            if search.elsewhere is None:
                left, largest = looked_at(norm, settled_at)
                bound = 1e6 * max(largest, 1.0) if steps == 1 else bound
                moving, diverged = not left <= 0, not largest <= bound  # nan is both
            else:
                lost = search.elsewhere & ~(norm <= 10 * first)
                away = ~(norm <= bound) & ~lost
                moving, diverged, failed = torch.stack([~(norm <= settled_at), away, lost]).any(1).tolist()
            if diverged:
                raise ran_away(self, landscape, strength, steps, before, point)
            step, searching = _Sweep(moved, point, norm), norm
            if failed:
                step = search.without(step, lost)
                point, norm = step.ended, step.norm
                searching = norm.where(~lost, 0.0)  # lost ones start anew
            if steps == self.max_steps or (self.tol and not moving):
                break
            if len(halves) > 1 or steps > _ALONE:
                point = search.onwards(step, ~(searching <= settled_at))
        settled = not failed and not moving  # of a mixture of two sweeps nobody has measured anything
        del search, step, moved
        energies.append(landscape.evaluate(Energy(), point, strength))
        return ended(point, steps, norm, first, settled, self.tol, energies)


@dataclass
class _Sweep:
    """By how much it moved each layer, where it ended, and how far each sample went."""

    moved: list[Tensor]
    ended: list[Tensor]
    norm: Tensor


class _Search:
    """x, p and r(x) of every sample, written as S(x) = x + r(x), which for odd layers is what they answer to x.

    Args:
        landscape: tells samples apart.
        layers: those that determine the next sweep.
    """

    def __init__(self, landscape: Landscape, layers: list[int]) -> None:
        self._landscape = landscape
        self._layers = layers
        self._last: _Sweep | None = None
        self._swept: list[Tensor] = []  # S(x)
        self._slope: list[Tensor] = []  # r(x), of `layers`
        self._ahead: list[Tensor] = []  # p, of `layers`
        self._behind: list[Tensor] = []  # the p before
        self._descent = torch.zeros(())  # <r, p> at the x before
        self._longest = torch.full((), _FURTHEST)  # alpha that each sample may take
        self._least = torch.full((), torch.inf)  # residual of each sample where it started anew
        self.elsewhere: Tensor | None = None
        """Which samples were sent elsewhere than the last sweep went; None before any was."""

    def onwards(self, sweep: _Sweep, searching: Tensor) -> list[Tensor]:
        """Where the next sweep begins; samples that are not `searching` start anew from where this one ended."""
        self._last = sweep
        slope = [sweep.moved[k] for k in self._layers]
        if not self._swept:
            self._swept, self._slope, self._ahead = sweep.ended, slope, slope
            return sweep.ended
        alpha, beta = self._steps(slope, sweep.norm, searching)
        dtype = sweep.ended[0].dtype
        by_alpha, by_beta, by_both = (
            self._landscape.spread(c.to(dtype), sweep.ended) for c in (alpha, beta, alpha + beta)
        )
        point, ends = list(sweep.ended), list(zip(self._swept, sweep.ended, strict=True))
        for k in set(range(len(point))).difference(self._layers):
            point[k] = torch.lerp(*ends[k], by_both[k])
        # Written over where they are this search's own: fresh memory costs more than the sums.
        self._swept = [(x.lerp_ if self._behind else x.lerp)(y, by_alpha[k]) for k, (x, y) in enumerate(ends)]
        slopes = zip(self._layers, self._slope, slope, strict=True)
        self._slope = [torch.lerp(r_x, r, by_alpha[k]) for k, r_x, r in slopes]
        self._behind, self._ahead = self._ahead, []
        for k, r_x, p in zip(self._layers, self._slope, self._behind, strict=True):
            point[k] = torch.addcmul(self._swept[k], by_beta[k], p)
            self._ahead.append(torch.addcmul(r_x, by_beta[k], p))
        return self._landscape.feasible(point)

    def without(self, sweep: _Sweep, lost: Tensor) -> _Sweep:
        """The sweep with the last one in its place for these samples."""
        last = self._last
        assert last is not None  # without which nobody is sent elsewhere
        self._longest = torch.where(lost, self._longest / 4, self._longest)
        marks = [mark > 0 for mark in self._landscape.spread(lost.to(sweep.norm.dtype), sweep.ended)]
        moved, ended = (
            [torch.where(mark, x, y) for mark, x, y in zip(marks, old, new, strict=True)]
            for old, new in ((last.moved, sweep.moved), (last.ended, sweep.ended))
        )
        return _Sweep(moved, ended, torch.where(lost, last.norm, sweep.norm))

    def _steps(self, slope: list[Tensor], norm: Tensor, searching: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and beta, ``(B,)``: 1 and 0 where a sample starts anew."""
        turn = [r_x - r for r_x, r in zip(self._slope, slope, strict=True)]  # what the sweep loses along p
        descent, curvature = self._product(self._slope, self._ahead), self._product(self._ahead, turn)
        good = searching & (descent > 0) & (curvature > 0)
        if self.elsewhere is not None:
            found = self._product(self._behind, slope).abs() > _LEFT * self._descent
            bent = searching & self.elsewhere & found
            # Without this a sample could go round and round between the same kinks.
            self._longest = torch.where(bent & (norm > 0.9 * self._least), self._longest / 4, self._longest)
            self._least = torch.where(bent, norm.minimum(self._least), self._least)
            good &= ~bent & (self._longest > 1)
        self.elsewhere, self._descent = good, descent
        alpha = (descent / curvature).minimum(self._longest)
        beta = (alpha * self._product(turn, turn) - self._product(self._slope, turn)) / curvature
        return torch.where(good, alpha, 1.0), torch.where(good, beta.clamp(0, _FURTHEST), 0.0)

    def _product(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        return self._landscape.products(left, right, self._layers)
