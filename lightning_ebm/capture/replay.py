"""The network of a step whose passes are run as captured code."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_ebm.capture.mode import Kind, Mode
from lightning_ebm.capture.running import Evaluation, Ready, RunningNetwork, continued
from lightning_ebm.delivery import Delivered
from lightning_ebm.energies.base import is_bounded, is_divergence
from lightning_ebm.relaxers import Forces, Relaxation
from lightning_ebm.relaxers.forces import total_energy
from lightning_ebm.stamps import stamps


class CapturedNetwork(RunningNetwork):
    """`Network` that runs a captured step where it can; what it does not know of, the plain one does."""

    def _behind_front(self, mode: Mode, states: Sequence[Tensor]) -> Mode:
        """The same evaluation without what is known of states that are still those of the forward pass."""
        return self._with_moved(mode, [k for k, x in enumerate(states) if x is not self.free[k]])

    def _with_moved(self, mode: Mode, moved: Collection[int]) -> Mode:
        known = None
        if is_divergence(self.energy) and not self._moved and self._found is not None and self._found[0].fronts:
            known = self._front.around(moved)
        if known is None:
            return mode
        return mode._replace(moved=known, wanted=tuple(sorted(self._front.reached(known))))

    def forces(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.forces`."""
        mode = self._behind_front(Mode("forces", strength != 0), states)
        ran = self._ran(mode, states, strength)
        if ran is None and mode.moved is not None:
            mode = Mode("forces", strength != 0)
            ran = self._ran(mode, states, strength)
        if ran is None:
            return super().forces(states, strength)
        found = ran.forces()
        if mode.wanted is None:
            return found
        return found.with_gradients(_put(self.no_errors, mode.wanted, found.gradients))

    def error_forces(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.error_forces`."""
        if errors[0] is not self.no_errors[0]:
            self._left()
        ran = self._ran(Mode("error_forces", strength != 0), errors, strength)
        return super().error_forces(errors, strength) if ran is None else ran.forces()

    def descended(
        self,
        point: list[Tensor],
        strength: complex,
        lr: float,
        coordinates: Literal["states", "errors"],
        norms: bool = False,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Moves a point on to x - lr dE/dx; the energy of the batch at x; None, and nothing moved, without code for it.

        One piece of code takes the whole step, which keeps nothing for an update: less memory, and more for a compiler
        to put together.

        Args:
            point: holds the next point afterwards. Of this one each tensor is let go of once it has been read.
            strength: lambda.
            lr: step size.
            coordinates: what the point is written in.
            norms: give |dE/dx| at x of each sample, ``(B,)``, besides.
        """
        gliding = None if norms else self._gliding.get((strength, lr, coordinates))
        if gliding is not None and not isinstance(strength, complex):  # the inner loop, once every layer has moved
            energy, *point[:] = gliding(point)[0]
            return energy, None
        if is_bounded(self.energy) or (norms and isinstance(strength, complex)):
            return None
        if coordinates == "errors":
            mode = Mode("error_forces", strength != 0, lr=lr, norms=norms)
        else:
            mode = self._behind_front(Mode("forces", strength != 0, lr=lr, norms=norms), point)
        mode = continued(mode, point)
        if not mode.continued and (coordinates == "states" or point[0] is not self.no_errors[0]):
            self._left(mode.moved)
        step = self._step(mode, strength)
        if step is None:
            return None
        wanted = range(len(point)) if mode.wanted is None else mode.wanted
        still = [None if k in wanted else x for k, x in enumerate(point)]
        energy, *found = step(point)[0]
        norm = found.pop(0) if norms else None
        point[:] = still  # type: ignore[assignment]  # until the next line
        for k in reversed(wanted):
            point[k] = found.pop()
        if mode.continued:
            return energy.real, norm
        if mode.moved is None and not norms:
            self._gliding[strength, lr, coordinates] = step
        return energy, norm

    def _step(self, mode: Mode, strength: complex) -> Ready | None:
        """The code of a step, None where there is none; no evaluation is noted as the latest, as nobody asks again."""
        if (ready := self._ready.get((mode, (strength,)))) is not None:
            return ready
        self._latest_run = None  # as large as all states
        program = self._code(mode, (strength,))
        if program is None:
            return None
        ready = partial(program.point, *self._before_points(program, mode, (strength,)))
        self._ready[mode, (strength,)] = ready
        return ready

    def prepared(
        self, strength: complex, lr: float, coordinates: Literal["states", "errors"], norms: Sequence[bool]
    ) -> None:
        """Captures what steps from the forward pass will ask for, before states elsewhere take memory too.

        Args:
            strength: lambda.
            lr: step size.
            coordinates: what points are written in.
            norms: of each step, whether it will be asked for them.
        """
        if self._found is None or self._found[1] or isinstance(strength, complex) or is_bounded(self.energy):
            return
        step = Mode("forces" if coordinates == "states" else "error_forces", strength != 0, lr=lr)
        modes, moved = [step._replace(lr=None, norms=True)], frozenset[int]()
        for norm in norms:
            mode = self._with_moved(step, moved) if coordinates == "states" else step
            modes.append(mode._replace(norms=norm))
            moved |= self._front.reached(mode.moved or moved)
        for mode in dict.fromkeys(modes):
            self._code(mode, (strength,))
            self._fixed.clear()  # what its check made: states of the next point, where no other has moved

    def residual(
        self, point: Sequence[Tensor], strength: complex, coordinates: Literal["states", "errors"]
    ) -> tuple[Tensor, Tensor] | None:
        """The energy of the batch, and |dE/dx| of each sample, where an update will be read; None without code for it.

        No force is held longer than it takes to measure it.
        """
        if is_bounded(self.energy) or isinstance(strength, complex):
            return None
        kind: Kind = "forces" if coordinates == "states" else "error_forces"
        ran = self._ran(Mode(kind, strength != 0, norms=True), point, strength)
        if ran is None:
            return None
        (energy, norms), ran.outputs = ran.outputs, ()
        return energy, norms

    def responses(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.responses`."""
        ran = self._ran(Mode("responses", strength != 0), states, strength)
        return super().responses(states, strength) if ran is None else ran.forces()

    def answers(self, states: Sequence[Tensor], strength: complex, layers: Sequence[int]) -> list[Tensor]:
        """See `Landscape.answers`."""
        mode = continued(Mode("answers", strength != 0, tuple(layers)), states)
        ready = self._ready.get((mode, (strength,)))
        if ready is not None and not torch.is_grad_enabled():  # the inner loop of a relaxation
            return list(ready(list(states))[0])
        ran = self._ran(mode, states, strength)
        return super().answers(states, strength, layers) if ran is None else list(ran.outputs)

    def answers_abreast(
        self, points: Sequence[Sequence[Tensor]], strengths: Sequence[float], layers: Sequence[int]
    ) -> list[list[Tensor]]:
        """`answers` at several points, each at a strength of its own, the samples of all of them as one batch."""
        mode, given, count = Mode("answers", True, tuple(layers), phases=len(points)), tuple(strengths), len(layers)
        flat = [x for point in points for x in point]
        found: Sequence[Tensor] | None = None
        if (ready := self._ready.get((mode, given))) is not None:
            found = ready(flat)[0]
        elif (ran := self._ran(mode, flat, *given)) is not None:
            found = ran.outputs
        if found is None:
            return [self.answers(point, strength, layers) for point, strength in zip(points, given, strict=True)]
        return [list(found[k : k + count]) for k in range(0, len(found), count)]

    def hops(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.hops`."""
        ran = self._ran(Mode("hops", True), errors, strength)
        return super().hops(errors, strength) if ran is None else ran.forces()

    def dyads(self, mean: Sequence[Tensor], strength: float) -> tuple[list[Tensor], list[Tensor], Forces]:
        """See `Landscape.dyads`."""
        ran = self._ran(Mode("dyads", True), mean, strength)
        if ran is None:
            return super().dyads(mean, strength)
        loss, *found = ran.outputs
        gradients, ahead, behind = (found[k : k + len(mean)] for k in range(0, len(found), len(mean)))
        return ahead, behind, Forces(mean, loss, gradients, self._internal_at)

    def energy_of(self, states: Sequence[Tensor], strength: complex) -> Tensor:
        """See `Landscape.energy_of`; one phase ends where the next may begin."""
        here = stamps(states)
        known = next(((internal, loss) for at, internal, loss in self._energies if at == here), None)
        if known is None:
            mode = continued(Mode("energy", True), states)
            if (ready := self._ready.get((mode, (0.0,)))) is not None and not torch.is_grad_enabled():
                internal, loss = ready(list(states))[0]
            elif (ran := self._ran(mode, states, 0.0)) is not None:  # I and L apart: no nudge is in them
                internal, loss = ran.outputs
            else:
                return super().energy_of(states, strength)
            known = internal, loss
            self._energies = [*self._energies[-2:], (here, *known)]
        return total_energy(Forces(*known, []), strength)

    def _internal_at(self, states: Sequence[Tensor]) -> Tensor:
        """I_b of states, for whoever looks at it."""
        ran = self._ran(Mode("energy", True), states, 0.0)
        if ran is not None:
            return ran.outputs[0]
        with torch.no_grad():
            return self.internal(self.at_states(states))

    def energy_at(self, found: Relaxation, strength: complex) -> Tensor:
        """See `Network.energy_at`; the gradients of the parameters are computed when they are asked for."""
        mode, point = _mode_at(found, strength), found.point
        if found.dyad is not None:
            mode, point = Mode("dyadic update", strength != 0), [*point, *found.dyad[0], *found.dyad[1]]
        elif self._is_at_forward_pass(found) and found.displacement is not None:
            mode, point = Mode("hops", True), found.displacement
        elif found.displacement is not None:  # multipliers, once a step
            return super().energy_at(found, strength)
        mode, ran = continued(mode, point), self._latest_run
        if ran is None or not ran.updates(mode, point, (strength,)):
            ran = self._ran(mode, point, strength)
        if ran is None:
            return super().energy_at(found, strength)
        return self._delivered(ran, (1.0,), 0j if mode.continued else 0.0)

    def contrast(self, phases: Sequence[tuple[complex, complex, Relaxation]]) -> Tensor:
        """See `Network.contrast`; one program for all phases."""
        strengths, weights, found = zip(*phases, strict=True)
        if all(self._is_at_forward_pass(f) for f in found) and self._found is not None:
            terms = [w.real * self.energy_at(f, s) for s, w, f in phases]
            if self._found is not None:  # all of them are captured
                return torch.stack(terms).sum()
        latest = self._latest_run
        read_here = (
            len(phases) == 1
            and latest is not None
            and latest.updates(_mode_at(found[0], strengths[0]), found[0].point, strengths)
        )
        if read_here or any(
            f.coordinates == "errors" or f.displacement is not None or f.dyad is not None for f in found
        ):
            return super().contrast(phases)
        kinds = [any(x.is_complex() for x in f.point) for f in found]
        if len(set(kinds)) > 1:  # real phases by themselves: complex arithmetic would only cost more
            halves = [[p for p, kind in zip(phases, kinds, strict=True) if kind is wanted] for wanted in (False, True)]
            return self.contrast(halves[0]) + self.contrast(halves[1])
        mode = continued(Mode("update", any(strengths), phases=len(phases)), found[0].point)
        ran = self._ran(mode, [x for f in found for x in f.point], *strengths)
        if ran is None:
            return super().contrast(phases)
        return self._delivered(ran, weights, 0.0)

    def _delivered(self, ran: Evaluation, weights: Sequence[complex], value: complex) -> Tensor:
        """A scalar of this value whose gradient is that of sum_p weight_p E(x_p, theta), of its real part if real."""
        scales = [self.scalar(complex(weight) if ran.mode.continued else weight.real) for weight in weights]
        code, left = ran.update, [list(ran.kept)]
        if ran is self._latest_run:  # what it kept is as large as all states: the update alone holds it, and uses it up
            self._latest_run = None

        def update(scale: Tensor) -> tuple[Tensor, ...]:
            if not left:
                raise RuntimeError("An update can be read twice only if the first time was with retain_graph=True.")
            again: bool = torch._C._autograd._get_current_graph_task_keep_graph()
            return code(list(left[0]) if again else left.pop(), tuple(scale.conj() * s for s in scales))

        assert self._found is not None
        captured, bound = self._found
        targets = [self._tape.outside[bound.get(value, value)] for value in captured.targets[ran.mode]]
        return Delivered.apply(self.scalar(value), update, *targets)  # type: ignore[no-any-return, no-untyped-call]


def _mode_at(found: Relaxation, strength: complex) -> Mode:
    """The evaluation whose update is that of the end of a phase."""
    kind: Kind = "error_forces" if found.coordinates == "errors" else "forces"
    return continued(Mode(kind, strength != 0), found.point)


def _put(values: Sequence[Tensor], places: Sequence[int], others: Sequence[Tensor]) -> list[Tensor]:
    """The values, those at some places replaced by others."""
    found = list(values)
    for k, other in zip(places, others, strict=True):
        found[k] = other
    return found
