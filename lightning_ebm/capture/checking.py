"""Whether captured code gives what the plain way gives, at points of its own."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from lightning_ebm.capture.formulas import Formulas, slopes_at
from lightning_ebm.capture.lowering import NotRepeatable
from lightning_ebm.capture.mode import Mode
from lightning_ebm.capture.tape import Tape
from lightning_ebm.network import Network
from lightning_ebm.relaxers import Forces, Relaxation
from lightning_ebm.relaxers.base import force_norm
from lightning_ebm.relaxers.fixed_steps import moved
from lightning_ebm.substitution import Pass, StateOf
from lightning_ebm.wiring import Region


class Checking(Formulas):
    """`Network` that knows what a program must give: by the plain way, once, at points of its own."""

    def points(self, mode: Mode) -> list[list[Tensor]]:
        """A point for each phase."""
        points = [self._elsewhere(mode, number) for number in range(mode.phases)]
        if mode.kind == "dyadic update":
            points[0] = [x for number in range(3) for x in self._elsewhere(mode, number)]
        return points

    def plain_outputs(self, mode: Mode, point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        """What the code of a point must give.

        Raises:
            NotRepeatable: the pass reads values computed from states into Python.
        """
        self._differentiated_again = False
        try:
            with self._watched() as watch:
                outputs = self._outputs(mode, point, strength)
        finally:
            self._differentiated_again, self._latest = True, None  # as large as all states
        if watch.reads:
            raise NotRepeatable(f"reads numbers that depend on its states into Python ({watch.reads[0]})")
        return outputs

    def plain_slopes(
        self, mode: Mode, points: Sequence[list[Tensor]], strengths: Sequence[complex], weights: Sequence[complex]
    ) -> dict[int, Tensor]:
        """sum_p weight_p dE/dtheta by the identity of each tensor it reaches."""
        found: dict[int, Tensor] = {}
        for point, strength, weight in zip(points, strengths, weights, strict=True):
            ended = self._ended(mode, point)
            seen = self._pass_of(ended)
            self._latest, frozen = None, seen is self._forward
            terms, states = self._terms_of(seen, ended, strength), {id(x) for x in seen.states}
            del seen  # layer by layer, its graph is let go of
            leaves = Region([top for top, _ in terms]).leaves
            targets = [t for i, t in leaves.items() if t.requires_grad and i not in states]
            while terms:
                top, seed = terms.pop()
                slopes = slopes_at([(top, weight * seed)], targets, kept=frozen or bool(terms))
                for target, slope in zip(targets, slopes, strict=True):
                    if slope is not None:
                        found[id(target)] = found[id(target)] + slope if id(target) in found else slope
        return found

    def _ended(self, mode: Mode, point: list[Tensor]) -> Relaxation:
        """The end of a phase whose update a mode gives."""
        coordinates: Literal["errors", "states"] = "errors" if mode.in_errors else "states"
        ended = Relaxation(point, coordinates, "fixed", 0, self.first_loss)
        if mode.kind == "hops":
            ended.point, ended.displacement = list(self.no_errors), point
        if mode.kind == "dyadic update":
            count = len(self.free)
            ended.point, ahead, behind = (point[k : k + count] for k in (0, count, 2 * count))
            ended.dyad = ahead, behind
        return ended

    def _outputs(self, mode: Mode, point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        if mode.kind == "answers":
            return Network.answers(self, point, strength, mode.layers)
        if mode.kind == "dyads":
            ahead, behind, forces = Network.dyads(self, point, strength)  # type: ignore[arg-type]  # none is complex
            return [forces.loss, *forces.gradients, *ahead, *behind]
        if mode.kind in ("energy", "update", "dyadic update"):
            seen = self.at_states(point[: len(self.free)])
            return [self.internal(seen).detach(), self.loss(seen).detach()] if mode.kind == "energy" else []
        found: Forces = getattr(Network, mode.kind)(self, point, strength)
        numbers, ahead = [found.internal, found.loss], found.gradients
        if mode.summed:
            numbers = [found.internal.sum() + strength * found.loss, *([force_norm(self, ahead)] if mode.norms else [])]
        if mode.lr is not None:
            for k, x in enumerate(point):
                ahead[k] = moved([x], [ahead[k]], mode.lr)[0]
        elif mode.norms:
            return numbers
        return [*numbers, *(ahead[k] for k in (range(len(ahead)) if mode.wanted is None else mode.wanted))]

    def _elsewhere(self, mode: Mode, number: int) -> list[Tensor]:
        """Points near the forward pass, the same ones for every mode."""
        generator = torch.Generator().manual_seed(number)
        point = []
        for k, like in enumerate(self.free):
            noise = torch.randn(like.shape, generator=generator, dtype=like.dtype.to_real()).to(like)
            if mode.moved is not None and k not in mode.moved:
                point.append(like)
                continue
            size = 0.05 * like.abs().mean() + 0.01
            noise *= size
            here = noise if mode.in_errors else like + noise
            point.append(torch.complex(here, noise.flip(0)) if mode.continued else here)
        return point if mode.in_errors else self.feasible(point)

    def must_equal(self, plain: Sequence[Tensor], got: Sequence[Tensor]) -> None:
        """Raises `NotRepeatable` unless these are equal up to rounding.

        That is relative to the largest element of each, or to a thousandth of the largest of all: a slope that is zero
        but for rounding, as that of a bias before a normalisation, has no digits to agree in.
        """
        rounding = max(self.rounding, torch.finfo(self.free[0].dtype).eps)
        sizes = [float(one.abs().max()) if one.numel() else 0.0 for one in plain]
        least = max([rounding, *(1e-3 * size for size in sizes if math.isfinite(size))])
        for one, other, size in zip(plain, got, sizes, strict=True):
            room = min(1e4 * rounding, 0.1) * max(size, least) if math.isfinite(size) else 0.0
            if one.shape != other.shape or not torch.allclose(other, one, rtol=0.0, atol=room, equal_nan=True):
                raise NotRepeatable("gives other values when it is repeated")

    @contextmanager
    def _watched(self) -> Iterator[Tape]:
        """Records the passes made inside."""
        watch, run = Tape(), self._run
        watch.keeps = False

        def watched(state_of: StateOf) -> Pass:
            with watch:
                seen = run(watch.cutting(state_of))
            watch.contents.clear()
            return seen

        self._run = watched
        try:
            yield watch
        finally:
            self._run = run
