"""Odd-even sweeps as the slopes of conjugate gradients."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_ebm import checked
from lightning_ebm.evaluations import Energy, Landscape
from lightning_ebm.questions import Questions
from lightning_ebm.relaxers.base import checked_tol, force_norm
from lightning_ebm.relaxers.fixed_point import ended, ran_away, rounding_of
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
        halves, questions = self.groups(landscape), landscape.questions
        search = _Search(landscape, halves[-1], point[0])
        energies = [landscape.evaluate(Energy(), point, strength)]
        going: _Going | None = None
        for steps in range(1, self.max_steps + 1):  # read after the loop
            before, point = point, (yield point)
            if going is not None:
                point = going.stays(before, point)
            moved = [y - x for x, y in zip(before, point, strict=True)]
            del before  # as large as all states, as is each list that is not held through the next sweep
            norm = force_norm(landscape, moved)
            if going is None:
                settled_at = (self.tol * norm).maximum(rounding_of(landscape, point))
                going = _Going(norm, settled_at, stays=questions.rarely and self.tol > 0)
            norm = going.note(norm, steps, search.elsewhere)
            last = steps == self.max_steps
            asked = last or questions.is_due(steps)
            if asked:
                moving, away, failed, taken = going.asked(questions)
                if away:
                    sizes = [float(m.norm()) for m in moved]
                    raise ran_away(self, landscape, strength, int(taken), sizes)
            slope = [moved[k] for k in search.layers]
            del moved
            searching = norm
            # Where nobody was asked, samples that are lost are looked for in vain.
            if going.lost is not None and (failed if asked else True):
                point, slope, norm = search.without(going.lost, point, slope, norm)
                searching = norm.where(~going.lost, 0.0)  # lost ones start anew
            if last or (self.tol and asked and not moving):
                break
            if len(halves) > 1 or steps > _ALONE:
                point = search.onwards(point, slope, norm, ~(searching <= settled_at))
            del slope
        assert going is not None
        settled = not failed and not moving  # of a mixture of two sweeps nobody has measured anything
        first = going.first
        del search, going
        energies.append(landscape.evaluate(Energy(), point, strength))
        return ended(point, int(taken), norm, first, settled, self.tol, energies)


class _Going:
    """How the samples are getting on, on the device.

    Args:
        first: how far the first sweep moved each sample, ``(B,)``.
        settled_at: below which a sample has settled.
        stays: whether nothing is to move any more once all have settled, or states ran away.
    """

    def __init__(self, first: Tensor, settled_at: Tensor, stays: bool) -> None:
        self.first = first
        self.lost: Tensor | None = None
        """Which samples came back with nan, or ten times the first residual; None where none can have."""
        self._settled_at, self._stays = settled_at, stays
        self._bound = 1e6 * first.amax().clamp_min(1.0)
        self._norm = first
        self._moving = self._away = first.new_zeros((), dtype=torch.bool)
        self._taken: int | Tensor = 0

    @property
    def _over(self) -> Tensor:
        return ~self._moving | self._away

    def stays(self, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        """The point to go on from: where all was over before the last sweep, the one that this began at."""
        return [torch.where(self._over, x, y) for x, y in zip(before, after, strict=True)] if self._stays else after

    def note(self, norm: Tensor, steps: int, elsewhere: Tensor | None) -> Tensor:
        """One more sweep; by how much it moved each sample, or the one after which all was over did."""
        if self._stays and steps > 1:
            over = self._over
            norm, self._taken = torch.where(over, self._norm, norm), torch.where(over, self._taken, steps)
        else:
            self._taken = steps
        away = ~(norm <= self._bound)  # nan is not
        if elsewhere is not None:
            self.lost = elsewhere & ~(norm <= 10 * self.first)
            away = away & ~self.lost
        self._norm, self._moving, self._away = norm, (~(norm <= self._settled_at)).any(), away.any()
        return norm

    def asked(self, questions: Questions) -> list[float]:
        """Whether samples are moving, whether states ran away, whether any are lost, and how many sweeps there were."""
        numbers = [self._moving, self._away]
        if self.lost is not None:
            numbers.append(self.lost.any())
        if isinstance(self._taken, Tensor):
            *found, taken = questions.ask(torch.stack([n.to(self.first) for n in (*numbers, self._taken)]))
        else:
            found, taken = questions.ask(torch.stack(numbers)), float(self._taken)
        moving, away, *lost = found
        return [moving, away, any(lost), taken]


class _Search:
    """x, p and r(x) of every sample, written as S(x) = x + r(x), which for odd layers is what they answer to x.

    Args:
        landscape: tells samples apart.
        layers: those that determine the next sweep.
        like: a state.

    Attributes:
        layers: the same.
        elsewhere: which samples were sent elsewhere than the last sweep went; None before any was.
    """

    def __init__(self, landscape: Landscape, layers: list[int], like: Tensor) -> None:
        dtype, device = like.real.dtype, like.device
        self._landscape = landscape
        self.layers = layers
        self._last: tuple[list[Tensor], list[Tensor], Tensor] | None = None
        self.elsewhere: Tensor | None = None
        self._swept: list[Tensor] = []  # S(x)
        self._slope: list[Tensor] = []  # r(x), of `layers`
        self._ahead: list[Tensor] = []  # p, of `layers`
        self._behind: list[Tensor] = []  # the p before
        self._descent = torch.zeros((), dtype=dtype, device=device)  # <r, p> at the x before
        self._longest = torch.full((), _FURTHEST, dtype=dtype, device=device)  # alpha that each sample may take
        self._least = torch.full((), torch.inf, dtype=dtype, device=device)  # residual where a sample started anew

    def onwards(self, swept: list[Tensor], slope: list[Tensor], norm: Tensor, searching: Tensor) -> list[Tensor]:
        """Where the next sweep begins; samples that are not `searching` start anew from where this one ended.

        Args:
            swept: where it ended.
            slope: r(y) where it began.
            norm: how far it moved each sample.
            searching: samples that have not settled.
        """
        self._last = swept, slope, norm
        if not self._swept:
            self._swept, self._slope, self._ahead = swept, slope, slope
            return swept
        alpha, beta = self._steps(slope, norm, searching)
        by_alpha, by_beta, by_both = (
            [c.to(x.dtype) for c, x in zip(self._landscape.spread(coefficient, swept), swept, strict=True)]
            for coefficient in (alpha, beta, alpha + beta)
        )
        point, ends = list(swept), list(zip(self._swept, swept, strict=True))
        for k in set(range(len(point))).difference(self.layers):
            point[k] = torch.lerp(*ends[k], by_both[k])
        # Written over where they are this search's own: fresh memory costs more than the sums.
        own = bool(self._behind)
        self._swept = [(x.lerp_ if own else x.lerp)(y, by_alpha[k]) for k, (x, y) in enumerate(ends)]
        slopes = zip(self.layers, self._slope, slope, strict=True)
        self._slope = [(r_x.lerp_ if own else r_x.lerp)(r, by_alpha[k]) for k, r_x, r in slopes]
        spare = self._behind or [torch.empty_like(p) for p in self._ahead]
        for k, r_x, p, room in zip(self.layers, self._slope, self._ahead, spare, strict=True):
            point[k] = torch.addcmul(self._swept[k], by_beta[k], p)
            torch.addcmul(r_x, by_beta[k], p, out=room)
        self._behind, self._ahead = self._ahead, spare
        return self._landscape.feasible(point)

    def without(
        self, lost: Tensor, swept: list[Tensor], slope: list[Tensor], norm: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The end of the sweep, its slope and how far it went, with those of the one before for these samples."""
        assert self._last is not None  # without which nobody is sent elsewhere
        self._longest = torch.where(lost, self._longest / 4, self._longest)
        marks = [mark > 0 for mark in self._landscape.spread(lost.to(norm.dtype), swept)]
        ended, slope_before, norm_before = self._last
        swept = [torch.where(mark, x, y) for mark, x, y in zip(marks, ended, swept, strict=True)]
        of_layers = zip(self.layers, slope_before, slope, strict=True)
        slope = [torch.where(marks[k], r, r_y) for k, r, r_y in of_layers]
        return swept, slope, torch.where(lost, norm_before, norm)

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
        return self._landscape.products(left, right, self.layers)
