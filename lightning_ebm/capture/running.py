"""Code of evaluations: captured when it is first asked for, checked, kept, and run on the batch at hand."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.capture.captures import Captures
from lightning_ebm.capture.compiled import Compiled
from lightning_ebm.capture.lowering import NotRepeatable
from lightning_ebm.capture.mode import Mode
from lightning_ebm.capture.program import Compiler, Program
from lightning_ebm.capture.recording import RecordingNetwork
from lightning_ebm.capture.tape import Tape
from lightning_ebm.capture.values import Value
from lightning_ebm.energies import Energy
from lightning_ebm.network import Run
from lightning_ebm.relaxers import Forces
from lightning_ebm.stamps import Stamps, stamps
from lightning_ebm.substitution import Pass
from lightning_ebm.wiring import Plan

log = logging.getLogger(__name__)

Ready = Callable[[list[Tensor]], Sequence[Sequence[Tensor]]]
"""From a point, a list that may be emptied, to what the code of a point gives."""


class RunningNetwork(RecordingNetwork):
    """`Network` that has code of its evaluations, where there can be code.

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
        self._gone: frozenset[int] = frozenset()
        if self._found is not None and (captured := self._found[0]).programs:
            # The rest of the pass would only take memory; another kind of evaluation captures the next step anew.
            bound = self._found[1]
            needed = {bound.get(v, v) for program in captured.programs.values() for v in program.bound}
            tape.contents = {v: t for v, t in tape.contents.items() if v in needed}
        else:
            tape.thin_out()
        self._fixed: dict[Any, tuple[Tensor, ...]] = {}
        self._turned: dict[Value, Tensor] = {}
        self._latest_run: Evaluation | None = None
        self._gliding: dict[tuple[complex, float, str], Ready] = {}
        self._ready: dict[tuple[Mode, tuple[complex, ...]], Ready] = {}
        self._energies: list[tuple[Stamps, Tensor, Tensor]] = []
        self.returns = True
        """Whether states may come back to the forward pass: False where the last phase begins there."""

    def _left(self, moved: frozenset[int] | None = None) -> None:
        """None of these states (None: of all) is where the forward pass left it: lets go of that, if nobody returns."""
        gone = frozenset(range(len(self.free))) if moved is None else moved
        if self.returns or self._found is None or not self._found[1] or gone <= self._gone:
            return
        (captured, bound), zeros = self._found, self.no_errors
        # Their kind is still asked for.
        self.free = [zeros[k].view_as(zeros[k]) if k in gone else x for k, x in enumerate(self.free)]
        self._gone, self._forward = gone, None

        def ahead(mode: Mode) -> bool:
            return mode.moved is None or mode.moved >= gone

        self._fixed = {key: t for key, t in self._fixed.items() if ahead(key[0] if isinstance(key[0], Mode) else key)}
        self._ready = {key: ready for key, ready in self._ready.items() if ahead(key[0])}
        programs = [program for mode, program in captured.programs.items() if ahead(mode)]
        needed = {bound[v] for program in programs for v in program.bound if v not in program.fixed}
        self._tape.contents = {v: t for v, t in self._tape.contents.items() if v in needed}

    def _ran(self, mode: Mode, point: Sequence[Tensor], *strengths: complex) -> "Evaluation | None":
        """The evaluation at a point by captured code, or None where there is none."""
        mode, latest = continued(mode, point), self._latest_run
        if latest is not None and latest.outputs and latest.repeats(mode, point, strengths):
            return latest
        if self._found is None:
            return None
        self._latest_run = latest = None
        program = self._code(mode, strengths)
        if program is None:
            return None
        run = self._run_of(program, mode, point, strengths)
        if mode.kind in ("answers", "energy"):  # not before the code has passed its check
            self._ready[mode, strengths] = partial(program.point, *self._before_points(program, mode, strengths))
        else:
            self._latest_run = run
        return run

    @torch.no_grad()
    def _run_of(
        self, program: Program, mode: Mode, point: Sequence[Tensor], strengths: tuple[complex, ...]
    ) -> "Evaluation":
        once, phase = self._before_points(program, mode, strengths)
        outputs, kept, parts = program.point(once, phase, list(point))
        update = partial(program.update, once, phase)
        return Evaluation(mode, strengths, stamps(point), tuple(outputs), list(kept), parts, program.energy, update)

    @torch.no_grad()
    def _before_points(self, program: Program, mode: Mode, strengths: tuple[complex, ...]) -> tuple[Any, Any]:
        """What code computes once a batch, and once a phase."""
        assert self._found is not None
        bound = self._found[1]
        if mode not in self._fixed:
            contents = [  # an energy that learns moves its own tensors before the update is computed
                program.fixed[v].clone() if v in program.fixed else self._tape.contents[bound.get(v, v)]
                for v in program.bound
            ]
            turned = [self._transposed(bound.get(v, v)) for v in program.turned]
            self._fixed[mode] = program.once([*contents, *turned])
        once = self._fixed[mode]
        if (mode, strengths) not in self._fixed:
            given = [complex(s) if mode.continued else s for s in strengths]
            self._fixed[mode, strengths] = program.phase(once, tuple(self.scalar(s) for s in given))
        return once, self._fixed[mode, strengths]

    def _transposed(self, value: Value) -> Tensor:
        """A matrix of the first pass turned round, in rows: one copy a batch, whatever code reads it."""
        if value not in self._turned:
            self._turned[value] = self._tape.contents[value].t().contiguous()
        return self._turned[value]

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
            with torch.no_grad():
                updates = run.update(run.kept, tuple(self.scalar(weight) for weight in weights))
            del run
            slopes = self.plain_slopes(mode, points, strengths, weights)
            self._must_update(slopes, {id(self._tape.outside[v]): s for v, s in zip(targets, updates, strict=True)})

    def _must_update(self, plain: Mapping[int, Tensor], got: Mapping[int, Tensor]) -> None:
        if missing := plain.keys() - got.keys():
            raise NotRepeatable(f"has {len(missing)} parameters whose place in the record is not known")
        self.must_equal([plain.get(t, torch.zeros_like(s)) for t, s in got.items()], list(got.values()))


@dataclass
class Evaluation:
    """One evaluation by captured code."""

    mode: Mode
    strengths: tuple[complex, ...]
    point: Stamps
    outputs: tuple[Tensor, ...]
    kept: list[Tensor]
    parts: Sequence[Tensor]
    finish: Callable[[Sequence[Tensor]], Tensor]
    update: Callable[[list[Tensor], tuple[Tensor, ...]], tuple[Tensor, ...]]

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


def continued(mode: Mode, point: Sequence[Tensor]) -> Mode:
    """The same evaluation at this point, whether its states are complex or not."""
    return mode._replace(continued=True) if any(x.is_complex() for x in point) else mode


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
