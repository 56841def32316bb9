"""The landscape at the speed of straight-line code: the step is recorded once, and its record is run instead of it.

What makes that safe, in this order:

1. The first pass of every step is the user's own code, run as ever, under a `Tape`. Only if its record, with all its
   constants, is the one of the captured step is the captured code used; whatever the batch alone decides (masks,
   targets, the input's drive) is taken from that very pass.
2. When a step is captured, one plain pass at other states must give the same energies, forces and update, and must
   read no value computed from states into Python.
3. Where something stands in the way (a custom backward, a hook on a hidden tensor, random numbers drawn from states)
   the step is done the plain way, which is said once.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies import Energy, PredictiveCoding
from lightning_ebm.energies.base import is_bounded
from lightning_ebm.network import Run, Stamps, stamps
from lightning_ebm.nudges import Holomorphic
from lightning_ebm.program import NotRepeatable, Program
from lightning_ebm.recording import Compiler, Coordinates, Mode, RecordingNetwork
from lightning_ebm.relaxers import Anderson, FixedPoint, Forces, Relaxation
from lightning_ebm.substitution import Pass
from lightning_ebm.tape import Tape, Value, same_computation
from lightning_ebm.wiring import Plan

log = logging.getLogger(__name__)

_KEPT = 8
"""Captured steps kept for one network: full and last batches, training modes, branches."""


class Captures:
    """The captured steps of one network, the latest used first.

    Args:
        compile: send their code through `torch.compile`.
    """

    def __init__(self, compile: bool = False) -> None:
        self.compile = compile
        self.refused: str | None = None
        self._kept: list[Captured] = []
        self._made = self._used = 0

    def wanted(self, algorithm: Algorithm) -> bool:
        """Whether passes are worth recording: repeated ones, of forces that are all the energy has to say of a state.

        An update read at first arrival needs no further pass; best responses, bounded domains, complex states and
        precisions that are tensors are evaluated the plain way.
        """
        energy, fixed_points = algorithm.energy, (FixedPoint, Anderson)
        return (
            self.refused is None
            and algorithm.read_as in ("contrast", "multipliers")
            and not is_bounded(energy)
            and not isinstance(algorithm.relaxer, fixed_points)
            and not isinstance(algorithm.nudge, Holomorphic)
            and (not isinstance(energy, PredictiveCoding) or isinstance(energy.precision, float | int))
        )

    def of(self, tape: Tape, first: Pass, key: tuple[Any, ...]) -> "tuple[Captured, Binding] | None":
        """The captured step that the first pass repeats, and its values in it; a new one if it repeats none."""
        if self.refused is not None:
            return None
        hooked = [*first.states, *(call.prediction for call in first.layers), *tape.contents.values()]
        if any(tensor._backward_hooks for tensor in (*hooked, *tape.outside.values())):
            self.refuse("has a backward hook on a tensor, which may do something else every time")
            return None
        if tape.problem is not None:
            self.refuse(f"cannot be recorded ({tape.problem})")
            return None
        difference = ""
        for captured in self._kept:
            found = captured.repeated_by(tape, first, key)
            if not isinstance(found, str):
                self._used += 1
                self._kept.remove(captured)
                self._kept.insert(0, captured)
                return captured, found
            difference = difference or found
        if self._made > 2 * _KEPT and self._used < 4 * self._made:
            self.refuse(f"changes from batch to batch, in numbers that are not tensors or in its flow: {difference}")
            return None
        return self.add(tape, first, key)

    def add(self, tape: Tape, first: Pass, key: tuple[Any, ...]) -> "tuple[Captured, Binding]":
        """Captures this step, and lets go of the one that was not used for longest."""
        self._made += 1
        captured = Captured(tape, first, key)
        self._kept = [captured, *self._kept[: _KEPT - 1]]
        return captured, {}

    def forget(self, captured: "Captured") -> None:
        """Captures such a step anew when it comes again."""
        self._kept.remove(captured)

    def refuse(self, why: str) -> None:
        """Does every step the plain way from now on, and says so."""
        self.refused = why
        self._kept = []
        log.warning(
            "Steps run in plain Python, which gives the same and is several times slower, as they cannot be captured:"
            " the step %s. (Said once; capture=False leaves the attempt out.)",
            why,
        )


Binding = dict[Value, Value]
"""The value of the present pass for each recorded one; empty where the record is that of the present pass."""


class Captured:
    """The record of one first pass and the code made from it; it holds no data of the batch."""

    def __init__(self, tape: Tape, first: Pass, key: tuple[Any, ...]) -> None:
        self.programs: dict[Mode, Program] = {}
        self.targets: dict[Mode, list[Value]] = {}
        self.first_pass = len(tape.nodes)
        self.roots = _roots(tape, first)
        self._key = key
        self._states = [tape.value(state) for state in first.states]

    def repeated_by(self, tape: Tape, first: Pass, key: tuple[Any, ...]) -> Binding | str:
        """The values of another first pass, if it is the same computation; or what is not the same."""
        if key != self._key:
            return "layers, sizes or settings"
        states = [tape.value(state) for state in first.states]
        found = same_computation(self.roots, _roots(tape, first), dict(zip(self._states, states, strict=True)))
        if isinstance(found, str):
            return found
        for program in self.programs.values():
            if any(found[value] not in tape.contents for value in program.bound if value not in program.fixed):
                return "what is written to"
        return found


def _roots(tape: Tape, first: Pass) -> list[Value]:
    tensors = [t for call in first.layers for t in (call.prediction, call.drive)]
    return [tape.value(t) for t in (*tensors, first.loss)]


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
        self._key = (
            plan.states,
            batch_size,
            loss_scale,
            repr(energy),
            tuple(map(str, getattr(energy, "__dict__", {}).items())),
        )
        self._found = captures.of(tape, first, self._key)
        if self._found is not None and (captured := self._found[0]).programs:
            # The rest of the pass would only take memory; another kind of evaluation captures the next step anew.
            bound = self._found[1]
            needed = {bound.get(v, v) for program in captured.programs.values() for v in program.bound}
            tape.contents = {v: t for v, t in tape.contents.items() if v in needed}
        self._fixed: dict[Any, tuple[Tensor, ...]] = {}
        self._latest_run: _Run | None = None

    def forces(self, states: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.forces`."""
        ran = self._ran("states", states, strength)
        return super().forces(states, strength) if ran is None else ran.forces

    def error_forces(self, errors: Sequence[Tensor], strength: complex) -> Forces:
        """See `Landscape.error_forces`."""
        ran = self._ran("errors", errors, strength)
        return super().error_forces(errors, strength) if ran is None else ran.forces

    def energy_at(self, found: Relaxation, strength: complex) -> Tensor:
        """See `Network.energy_at`; the gradients of the parameters are computed when they are asked for."""
        read_plainly = found.displacement is not None or found.dyad is not None
        ran = None if read_plainly else self._ran(found.coordinates, found.point, strength)
        if ran is None or self._found is None:
            return super().energy_at(found, strength)
        captured, bound = self._found
        targets = [self._tape.outside[bound.get(value, value)] for value in captured.targets[ran.mode]]
        value = ran.forces.internal.sum() + strength * ran.forces.loss
        return _Delivered.apply(value, ran.update, *targets)  # type: ignore[no-any-return, no-untyped-call]

    def _ran(self, coordinates: Coordinates, point: Sequence[Tensor], strength: complex) -> "_Run | None":
        """The evaluation at a point by captured code, or None where there is none."""
        if self._found is None or isinstance(strength, complex) or any(x.is_complex() for x in point):
            return None
        latest, mode = self._latest_run, (coordinates, strength != 0)
        if latest is not None and latest.mode == mode and latest.strength == strength and latest.point == stamps(point):
            return latest
        self._latest_run = latest = None
        try:
            program = self._program(mode, strength)
        except Exception as error:  # whatever goes wrong in capturing: the plain way stays right
            self._latest = None
            self._captures.refuse(str(error) if isinstance(error, NotRepeatable) else f"raises in capturing: {error!r}")
            self._found = None
            return None
        if program is None:
            return None
        self._latest_run = self._run_of(program, mode, point, strength)
        return self._latest_run

    @torch.no_grad()
    def _run_of(self, program: Program, mode: Mode, point: Sequence[Tensor], strength: float) -> "_Run":
        assert self._found is not None
        bound = self._found[1]
        if mode not in self._fixed:
            contents = [
                program.fixed[v] if v in program.fixed else self._tape.contents[bound.get(v, v)] for v in program.bound
            ]
            self._fixed[mode] = program.once(contents)
        once = self._fixed[mode]
        if (mode, strength) not in self._fixed:
            self._fixed[mode, strength] = program.phase(once, (self.scalar(strength),))
        phase = self._fixed[mode, strength]
        (loss, *gradients), kept, parts = program.point(once, phase, point)
        forces = Forces(parts, loss, gradients, program.finish)
        return _Run(mode, strength, stamps(point), forces, partial(program.update, once, phase, kept))

    # Capturing

    def _program(self, mode: Mode, strength: float) -> Program | None:
        assert self._found is not None
        captured, bound = self._found
        if mode in captured.programs:
            return captured.programs[mode]
        if bound:  # of the record at hand only what the code needs was kept
            self._captures.forget(captured)
            self._found = None
            return None
        compiler = _compiler(self.free[0].device) if self._captures.compile else None
        program, targets = self.recorded(self._tape, captured.first_pass, captured.roots, mode, compiler)
        for node in self._tape.nodes[captured.first_pass :]:
            for value in node.results:
                self._tape.contents.pop(value, None)  # type: ignore[arg-type]  # None is in no dictionary of values
        point, expected, slopes = self.plainly(mode, strength)
        run = self._run_of(program, mode, point, strength)
        self.must_equal(expected, [run.forces.internal, run.forces.loss, *run.forces.gradients])
        got = {id(self._tape.outside[v]): s for v, s in zip(targets, run.update((self.scalar(1.0),)), strict=True)}
        if missing := slopes.keys() - got.keys():
            raise NotRepeatable(f"has {len(missing)} parameters whose place in the record is not known")
        self.must_equal([slopes.get(t, torch.zeros_like(s)) for t, s in got.items()], list(got.values()))
        captured.programs[mode], captured.targets[mode] = program, targets
        return program


@dataclass
class _Run:
    """One evaluation by captured code."""

    mode: Mode
    strength: float
    point: Stamps
    forces: Forces
    update: Callable[[tuple[Tensor]], tuple[Tensor, ...]]


class _Delivered(torch.autograd.Function):
    """A number whose gradients with respect to given tensors are computed by given code."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, update: Callable[..., tuple[Tensor, ...]], *targets: Tensor) -> Tensor:
        ctx.update = update
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        with torch.no_grad():
            return None, None, *ctx.update((scale,))


def _compiler(device: torch.device) -> Compiler:
    """Inductor; on CUDA with its graphs, whose outputs the next run overwrites: they are copied."""
    if device.type != "cuda":
        return partial(torch.compile, dynamic=False, fullgraph=True)

    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(function, dynamic=False, fullgraph=True, mode="reduce-overhead")

        def run(*args: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return tuple(tuple(t.clone() for t in tensors) for tensors in fast(*args))

        return run

    return compiler
