"""The network of a step whose passes are run as captured code."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_ebm.capture.captures import Captures
from lightning_ebm.capture.compiled import Compiled
from lightning_ebm.capture.lowering import NotRepeatable
from lightning_ebm.capture.mode import Kind, Mode
from lightning_ebm.capture.program import Compiler, Program
from lightning_ebm.capture.recording import RecordingNetwork
from lightning_ebm.capture.tape import Tape, Value
from lightning_ebm.delivery import Delivered
from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import is_bounded
from lightning_ebm.network import Run
from lightning_ebm.relaxers import Forces, Relaxation
from lightning_ebm.relaxers.forces import total_energy
from lightning_ebm.stamps import Stamps, stamps
from lightning_ebm.substitution import Pass
from lightning_ebm.wiring import Plan

log = logging.getLogger(__name__)

_Ready = Callable[[Sequence[Tensor]], Sequence[Sequence[Tensor]]]
"""From a point to what the code of a point gives."""


class CapturedNetwork(RecordingNetwork):
    """`Network` that runs a captured step where it can; what it does not know of, the plain one does.

    Args:
        captures: where captured steps are kept.
        tape: the record of the first pass.
    """

    def __init__(
        self,
        energy: Energy,
        plan: Plan,
        first: Pass,
        run: Run,
        batch_size: int,
        loss_scale: float,
        *,
        captures: Captures,
        tape: Tape,
    ) -> None:
        super().__init__(energy, plan, first, run, batch_size, loss_scale)
        self._captures = captures
        self._tape = tape
        self._key = plan.states, batch_size, loss_scale, repr(energy), _identity(getattr(energy, "__dict__", {}))
        self._found = captures.of(tape, first, self._key)
        if self._found is not None and (captured := self._found[0]).programs:
            # The rest of the pass would only take memory; another kind of evaluation captures the next step anew.
            bound = self._found[1]
            needed = {bound.get(v, v) for program in captured.programs.values() for v in program.bound}
            tape.contents = {v: t for v, t in tape.contents.items() if v in needed}
        else:
            tape.thin_out()
        self._fixed: dict[Any, tuple[Tensor, ...]] = {}
        self._latest_run: _Run | None = None
        self._gliding: dict[tuple[complex, float, str], _Ready] = {}
        self._ready: dict[tuple[Mode, tuple[complex, ...]], _Ready] = {}
        self._energies: list[tuple[Stamps, Tensor, Tensor]] = []
        self.returns = True
        """Whether states may come back to the forward pass: False where the last phase begins there."""

    def _left(self) -> None:
        """No state is any more where the forward pass left it: lets go of that, where nobody is to come back."""
        if self.returns or self._found is None or not self._found[1]:
            return
        self.returns = True
        (captured, bound), zeros = self._found, self.no_errors
        self.free = [zero.view_as(zero) for zero in zeros]  # their kind is still asked for
        self._forward = None
        ahead = [key for key in self._fixed if (key[0] if isinstance(key[0], Mode) else key).moved is not None]
        for key in ahead:
            del self._fixed[key]
        self._ready = {key: ready for key, ready in self._ready.items() if key[0].moved is None}
        programs = [program for mode, program in captured.programs.items() if mode.moved is None]
        needed = {bound[v] for program in programs for v in program.bound if v not in program.fixed}
        self._tape.contents = {v: t for v, t in self._tape.contents.items() if v in needed}

    def _behind_front(self, mode: Mode, states: Sequence[Tensor]) -> Mode:
        """The same evaluation without what is known of states that are still those of the forward pass."""
        return self._with_moved(mode, [k for k, x in enumerate(states) if x is not self.free[k]])

    def _with_moved(self, mode: Mode, moved: Collection[int]) -> Mode:
        known = None
        if self.energy.divergence and not self._moved and self._found is not None and self._found[0].fronts:
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
        self, point: Sequence[Tensor], strength: complex, lr: float, coordinates: Literal["states", "errors"]
    ) -> tuple[list[Tensor], Tensor] | None:
        """x - lr dE/dx, and the energy of the batch at x; None where there is no code for it.

        One piece of code takes the whole step, which keeps nothing for an update: less memory, and more for a compiler
        to put together.
        """
        gliding = self._gliding.get((strength, lr, coordinates))
        if gliding is not None and not isinstance(strength, complex):  # the inner loop, once every layer has moved
            energy, *ahead = gliding(point)[0]
            return ahead, energy
        if is_bounded(self.energy):
            return None
        if coordinates == "errors":
            mode = Mode("error_forces", strength != 0, lr=lr)
        else:
            mode = self._behind_front(Mode("forces", strength != 0, lr=lr), point)
        mode = _continued(mode, point)
        if mode.moved is None and not mode.continued:
            self._left()
        if (ready := self._ready.get((mode, (strength,)))) is not None:
            energy, *ahead = ready(point)[0]
        elif (ran := self._ran(mode, point, strength)) is not None:
            energy, *ahead = ran.outputs
        else:
            return None
        if mode.wanted is not None:
            return _put(point, mode.wanted, ahead), energy
        if mode.continued:
            return ahead, energy.real
        self._gliding[strength, lr, coordinates] = self._ready[mode, (strength,)]
        return ahead, energy

    def prepared(self, strength: complex, lr: float, coordinates: Literal["states", "errors"], steps: int) -> None:
        """Captures what so many steps from the forward pass will ask for, before states elsewhere take memory too."""
        if self._found is None or self._found[1] or isinstance(strength, complex) or is_bounded(self.energy):
            return
        step = Mode("forces" if coordinates == "states" else "error_forces", strength != 0, lr=lr)
        modes, moved = [step._replace(lr=None, norms=True)], self._front.reached(())
        for _ in range(1, steps):
            mode = self._with_moved(step, moved) if coordinates == "states" else step
            modes.append(mode)
            moved |= self._front.reached(mode.moved or moved)
        for mode in dict.fromkeys(modes):
            self._code(mode, (strength,))

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
        (loss, norms), ran.outputs = ran.outputs, ()
        return total_energy(Forces(ran.parts, loss, [], ran.finish), strength), norms

    def responses(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.responses`."""
        ran = self._ran(Mode("responses", strength != 0), states, strength)
        return super().responses(states, strength) if ran is None else ran.forces()

    def answers(self, states: Sequence[Tensor], strength: complex, layers: Sequence[int]) -> list[Tensor]:
        """See `Landscape.answers`."""
        mode = _continued(Mode("answers", strength != 0, tuple(layers)), states)
        ready = self._ready.get((mode, (strength,)))
        if ready is not None and not torch.is_grad_enabled():  # the inner loop of a relaxation
            return list(ready(states)[0])
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
            mode = _continued(Mode("energy", True), states)
            if (ready := self._ready.get((mode, (0.0,)))) is not None and not torch.is_grad_enabled():
                internal, loss = ready(states)[0]
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
        mode, ran = _continued(mode, point), self._latest_run
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
        mode = _continued(Mode("update", any(strengths), phases=len(phases)), found[0].point)
        ran = self._ran(mode, [x for f in found for x in f.point], *strengths)
        if ran is None:
            return super().contrast(phases)
        return self._delivered(ran, weights, 0.0)

    def _delivered(self, ran: "_Run", weights: Sequence[complex], value: complex) -> Tensor:
        """A scalar of this value whose gradient is that of sum_p weight_p E(x_p, theta), of its real part if real."""
        scales = [self.scalar(complex(weight) if ran.mode.continued else weight.real) for weight in weights]

        def update(scale: Tensor) -> tuple[Tensor, ...]:
            return ran.update(tuple(scale.conj() * s for s in scales))

        assert self._found is not None
        captured, bound = self._found
        targets = [self._tape.outside[bound.get(value, value)] for value in captured.targets[ran.mode]]
        return Delivered.apply(self.scalar(value), update, *targets)  # type: ignore[no-any-return, no-untyped-call]

    def _ran(self, mode: Mode, point: Sequence[Tensor], *strengths: complex) -> "_Run | None":
        """The evaluation at a point by captured code, or None where there is none."""
        mode, latest = _continued(mode, point), self._latest_run
        if latest is not None and latest.outputs and latest.repeats(mode, point, strengths):
            return latest
        if self._found is None:
            return None
        self._latest_run = latest = None
        program = self._code(mode, strengths)
        if program is None:
            return None
        run = self._run_of(program, mode, point, strengths)
        if mode.kind in ("answers", "energy") or mode.lr is not None:  # not before the code has passed its check
            once, phase = self._fixed[mode], self._fixed[mode, strengths]
            self._ready[mode, strengths] = partial(program.point, once, phase)
        else:
            self._latest_run = run
        return run

    @torch.no_grad()
    def _run_of(self, program: Program, mode: Mode, point: Sequence[Tensor], strengths: tuple[complex, ...]) -> "_Run":
        assert self._found is not None
        bound = self._found[1]
        if mode not in self._fixed:
            contents = [  # an energy that learns moves its own tensors before the update is computed
                program.fixed[v].clone() if v in program.fixed else self._tape.contents[bound.get(v, v)]
                for v in program.bound
            ]
            self._fixed[mode] = program.once(contents)
        once = self._fixed[mode]
        if (mode, strengths) not in self._fixed:
            given = [complex(s) if mode.continued else s for s in strengths]
            self._fixed[mode, strengths] = program.phase(once, tuple(self.scalar(s) for s in given))
        phase = self._fixed[mode, strengths]
        outputs, kept, parts = program.point(once, phase, point)
        update = partial(program.update, once, phase, kept)
        return _Run(mode, strengths, stamps(point), outputs, parts, program.energy, update)

    # Capturing

    def _code(self, mode: Mode, strengths: tuple[complex, ...]) -> Program | None:
        """The code of an evaluation, captured if it is the first of its kind; None where there is none."""
        try:
            return None if self._found is None else self._program(mode, strengths)
        except Exception as error:  # whatever goes wrong in capturing: the plain way stays right
            self._latest = None
            self._captures.refuse(str(error) if isinstance(error, NotRepeatable) else f"raises in capturing: {error!r}")
            self._found = None
            return None

    def _program(self, mode: Mode, strengths: tuple[complex, ...]) -> Program | None:
        abreast = mode.kind == "answers" and mode.phases > 1
        return self._program_abreast(mode, strengths) if abreast else self._captured_program(mode, strengths)

    def _captured_program(self, mode: Mode, strengths: tuple[complex, ...]) -> Program | None:
        assert self._found is not None
        captured, bound = self._found
        if mode in captured.programs:
            return captured.programs[mode]
        if bound:  # of the record at hand only what the code needs was kept
            self._captures.forget(captured, mode, strengths)
            self._found = None
            return None
        compiler = _compiler(self.free[0].device) if self._captures.compile else None
        first_pass, roots = captured.first_pass, captured.roots
        try:
            program, targets = self.recorded(self._tape, first_pass, roots, mode, compiler)
        except NotRepeatable:
            if mode.moved is None:
                raise
            captured.fronts = False  # what a front needs is not kept by this pass; all else may be
            return None
        try:
            self._check(program, targets, mode, strengths)
        except NotRepeatable as reason:
            if not isinstance(program.point, Compiled):
                raise
            program.point.give_up(f"compiled, it {reason}")  # as where half precision is rounded in fewer places
            self._check(program, targets, mode, strengths)
        captured.programs[mode], captured.targets[mode] = program, targets
        for other, at in self._captures.missed.items():
            self._program(other, at)
        return program

    def _program_abreast(self, mode: Mode, strengths: tuple[complex, ...]) -> Program | None:
        """The same, of phases side by side; where that cannot be, each has code of its own."""
        assert self._found is not None
        captured = self._found[0]
        try:
            return self._captured_program(mode, strengths) if captured.abreast else None
        except Exception as error:
            log.debug("Phases are swept one after the other: %r", error)  # the same, in more calls
            captured.abreast, self._latest = False, None
            return None

    def _check(self, program: Program, targets: Sequence[Value], mode: Mode, strengths: tuple[complex, ...]) -> None:
        """Raises `NotRepeatable` unless the program gives at other points what the plain way gives there."""
        weights = [1.0 + 0.3j, *[-0.5 + 0.2j] * (len(strengths) - 1)]
        if not mode.continued:
            weights = [weight.real for weight in weights]
        points = self.points(mode)
        given = zip(points, strengths, strict=True) if mode.kind == "answers" else [(points[0], strengths[0])]
        expected = [output for point, strength in given for output in self.plain_outputs(mode, point, strength)]
        run = self._run_of(program, mode, [x for p in points for x in p], strengths)
        energy = [run.finish(run.parts)] if mode.has_energy else []
        self.must_equal(expected, [*energy, *run.outputs])
        expected, run.outputs = [], ()
        if mode.updates:  # one after the other: each takes as much memory as all states and more
            updates = run.update(tuple(self.scalar(weight) for weight in weights))
            del run
            slopes = self.plain_slopes(mode, points, strengths, weights)
            self._must_update(slopes, {id(self._tape.outside[v]): s for v, s in zip(targets, updates, strict=True)})

    def _must_update(self, plain: Mapping[int, Tensor], got: Mapping[int, Tensor]) -> None:
        if missing := plain.keys() - got.keys():
            raise NotRepeatable(f"has {len(missing)} parameters whose place in the record is not known")
        self.must_equal([plain.get(t, torch.zeros_like(s)) for t, s in got.items()], list(got.values()))


@dataclass
class _Run:
    """One evaluation by captured code."""

    mode: Mode
    strengths: tuple[complex, ...]
    point: Stamps
    outputs: tuple[Tensor, ...]
    parts: tuple[Tensor, ...]
    finish: Callable[[Sequence[Tensor]], Tensor]
    update: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

    def forces(self) -> Forces:
        """The outputs, where they are those. They are handed over: all that is kept is what an update needs."""
        (loss, *gradients), self.outputs = self.outputs, ()
        return Forces(self.parts, loss, gradients, self.finish)

    def repeats(self, mode: Mode, point: Sequence[Tensor], strengths: tuple[complex, ...]) -> bool:
        """Whether it is this evaluation."""
        return self.mode == mode and self.strengths == strengths and self.point == stamps(point)

    def updates(self, mode: Mode, point: Sequence[Tensor], strengths: tuple[complex, ...]) -> bool:
        """Whether its update is that of this evaluation, which may have given the forces themselves."""
        return self.repeats(mode._replace(norms=self.mode.norms), point, strengths)


def _mode_at(found: Relaxation, strength: complex) -> Mode:
    """The evaluation whose update is that of the end of a phase."""
    kind: Kind = "error_forces" if found.coordinates == "errors" else "forces"
    return _continued(Mode(kind, strength != 0), found.point)


def _continued(mode: Mode, point: Sequence[Tensor]) -> Mode:
    """The same evaluation at this point, whether its states are complex or not."""
    return mode._replace(continued=True) if any(x.is_complex() for x in point) else mode


def _put(values: Sequence[Tensor], places: Sequence[int], others: Sequence[Tensor]) -> list[Tensor]:
    """The values, those at some places replaced by others."""
    found = list(values)
    for k, other in zip(places, others, strict=True):
        found[k] = other
    return found


class _Same:
    """A tensor, equal to itself alone: what it holds may change."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._tensor is other._tensor

    __hash__ = None  # type: ignore[assignment]


def _identity(settings: Any) -> Any:
    """What settings of an energy are compared by: tensors as objects, all else by its text."""
    if isinstance(settings, Tensor):
        return _Same(settings)
    if isinstance(settings, Mapping):
        return [(str(name), _identity(value)) for name, value in settings.items()]
    return str(settings)


def _compiler(device: torch.device) -> Compiler:
    """Inductor; on CUDA with its graphs, by torch.compile, whose outputs the next run overwrites: they are copied."""
    if device.type != "cuda":
        return Compiled

    def compiler(function: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(function, dynamic=False, fullgraph=True, mode="reduce-overhead")

        def run(*args: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return tuple(tuple(t.clone() for t in tensors) for tensors in fast(*args))

        return run

    return compiler
