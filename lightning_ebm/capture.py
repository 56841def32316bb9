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
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import QuadraticEnergy
from lightning_ebm.network import Network, Run, _same
from lightning_ebm.packing import packed
from lightning_ebm.program import NotRepeatable, Program, compiled_program
from lightning_ebm.relaxers import Forces, Relaxation
from lightning_ebm.substitution import Pass, StateOf
from lightning_ebm.tape import PHASE, SEED, STATE, Tape, Value, known_by, same_computation
from lightning_ebm.wiring import Plan, Region

log = logging.getLogger(__name__)

Coordinates = Literal["states", "errors"]
Mode = tuple[Coordinates, bool]
"""The coordinates, and whether there is a nudge."""

_PATIENCE = 2
"""After how many points it is worth preparing for more of them."""

_KEPT = 8
"""Captured steps kept for one network: full and last batches, training modes, branches."""


class Captures:
    """The captured steps of one network, the latest used first."""

    def __init__(self) -> None:
        self.refused: str | None = None
        self._kept: list[Captured] = []
        self._made = self._used = 0

    def wanted(self, read_as: str) -> bool:
        """Whether passes are worth recording: an update read at first arrival needs no further pass."""
        return self.refused is None and read_as == "contrast"

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


_Seed = tuple[Tensor, Tensor]
"""What to differentiate, and the weight of each of its elements."""


class CapturedNetwork(Network):
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
        self._key = (plan.states, batch_size, loss_scale, repr(energy), tuple(map(str, vars(energy).items())))
        self._found = captures.of(tape, first, self._key)
        self._fixed: dict[Any, tuple[Tensor, ...]] = {}
        self._points: dict[Mode, int] = {}
        self._latest_run: _Run | None = None
        self._half = self.rounding > max(torch.finfo(state.dtype).eps for state in self.free)

    def forces(self, states: Sequence[Tensor], strength: float) -> Forces:
        """See `Landscape.forces`."""
        ran = self._ran("states", states, strength)
        return super().forces(states, strength) if ran is None else ran.forces

    def error_forces(self, errors: Sequence[Tensor], strength: float) -> Forces:
        """See `Landscape.error_forces`."""
        ran = self._ran("errors", errors, strength)
        return super().error_forces(errors, strength) if ran is None else ran.forces

    def energy_at(self, found: Relaxation, strength: float) -> Tensor:
        """See `Network.energy_at`; the gradients of the parameters are computed when they are asked for."""
        ran = None if found.coordinates == "arrival" else self._ran(found.coordinates, found.point, strength)
        if ran is None or self._found is None:
            return super().energy_at(found, strength)
        captured, bound = self._found
        targets = [self._tape.outside[bound.get(value, value)] for value in captured.targets[ran.mode]]
        value = ran.forces.internal.sum() + strength * ran.forces.loss
        return _Delivered.apply(value, ran.update, *targets)  # type: ignore[no-any-return, no-untyped-call]

    def _ran(self, coordinates: Coordinates, point: Sequence[Tensor], strength: float) -> "_Run | None":
        """The evaluation at a point by captured code, or None where there is none."""
        if self._found is None or isinstance(strength, complex) or any(x.is_complex() for x in point):
            return None
        latest, mode = self._latest_run, (coordinates, strength != 0)
        if latest is not None and latest.mode == mode and latest.strength == strength and _same(latest.point, point):
            return latest
        self._latest_run = latest = None
        try:
            program = self._program(mode, strength)
        except Exception as error:  # whatever goes wrong in capturing: the plain way stays right
            self._latest = None
            self._captures.refuse(str(error) if isinstance(error, NotRepeatable) else f"raises in capturing: {error!r}")
            self._found = None
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
            self._fixed[mode, strength] = program.phase(once, (self._scalar(strength),))
        phase = self._fixed[mode, strength]
        self._points[mode] = count = self._points.get(mode, 0) + 1
        if program.prepare is not None and count > _PATIENCE:
            if (mode, None) not in self._fixed:
                self._fixed[mode, None] = program.prepare(once)
            (internal, loss, *gradients), kept = program.fast(once, phase, point, self._fixed[mode, None])
        else:
            (internal, loss, *gradients), kept = program.point(once, phase, point)
        forces = Forces(internal, loss, gradients)
        return _Run(mode, strength, point, forces, partial(program.update, once, phase, kept))

    def _scalar(self, number: float) -> Tensor:
        return torch.full((), number, dtype=self.free[0].dtype, device=self.free[0].device)

    # Capturing

    def _program(self, mode: Mode, strength: float) -> Program:
        assert self._found is not None
        captured, bound = self._found
        if mode in captured.programs:
            return captured.programs[mode]
        if bound:  # the record at hand is another one than that of the code
            self._found = captured, bound = self._captures.add(self._tape, self._first, self._key)
            self._fixed = {}
        program, targets = self._recorded(captured, mode)
        captured.programs[mode], captured.targets[mode] = program, targets
        self._check(captured, program, mode, strength)
        return program

    def _recorded(self, captured: Captured, mode: Mode) -> tuple[Program, list[Value]]:
        """Runs the energies and their gradients once, on the graph of the first pass, and makes code of the record."""
        tape, first = self._tape, self._first
        self._refuse_hidden_gradients(captured)
        known = known_by(captured.roots)
        outside = [(v, t) for v, t in tape.outside.items() if v in known and t.requires_grad]
        strength, scale = self._scalar(1.0), self._scalar(1.0)
        inputs = tape.input(strength, PHASE), tape.input(scale, SEED)
        defined: dict[Value, tuple[Value, Value]] = {}
        with tape, torch.enable_grad():
            if mode[0] == "states":
                point = [tape.value(state) for state in first.states]
                outputs, seeds = self._in_states(first, strength if mode[1] else None)
            else:
                errors = [torch.zeros_like(state) for state in self.free]
                point = [tape.input(error, STATE) for error in errors]
                for call, state, error in zip(first.layers, first.states, point, strict=True):
                    defined[tape.value(state)] = tape.value(call.prediction), error
                outputs, seeds = self._in_errors(first, errors, strength)
            tops = [(top, seed * scale) for top, seed in seeds]
            slopes = _gradients(tops, [tensor for _, tensor in outside])
        if tape.problem is not None:
            raise NotRepeatable(f"cannot be recorded ({tape.problem})")
        reached = [(v, slope) for (v, _), slope in zip(outside, slopes, strict=True) if slope is not None]
        program = compiled_program(
            point,
            *inputs,
            [tape.value(output) for output in outputs],
            [tape.value(slope) for _, slope in reached],
            tape,
            known,
            captured.first_pass,
            defined,
            partial(packed, tape),
        )
        return program, [value for value, _ in reached]

    def _in_states(self, first: Pass, strength: Tensor | None) -> tuple[list[Tensor], list[_Seed]]:
        """Energies and dE/dx; and what to differentiate, with which weight, for dE/dtheta."""
        loss = self._loss_scale * first.loss.detach()
        nudge = None if strength is None else (first.loss, self._loss_scale * strength)
        unit = strength if self._half else None  # see `Network.forces`
        pull = nudge if unit is None else (first.loss, self._loss_scale * self._scalar(1.0))
        states = first.states
        if _is_quadratic(self._energy):
            precisions = self._precisions(first)
            pairs = [
                (call.prediction, call.prediction.detach() - x) for call, x in zip(first.layers, states, strict=True)
            ]
            seeds = [(mu, d if p == 1 else p * d) for (mu, d), p in zip(pairs, precisions, strict=True)]
            internal = 0.5 * self.squares(
                [d if p == 1 else math.sqrt(p) * d for (_, d), p in zip(pairs, precisions, strict=True)]
            )
            own = [seed for _, seed in seeds]
        else:
            internal = self._internal(first)
            seeds = [(internal.sum(), self._scalar(1.0))]
            own = []
        pulls = seeds if unit is None else [(top, seed / unit) for top, seed in seeds]
        slopes = _gradients(pulls if pull is None else [*pulls, pull], states)
        slopes = [s if s is None or unit is None else unit * s for s in slopes]
        if own:
            gradients = [-o if s is None else s - o for s, o in zip(slopes, own, strict=True)]
        else:
            gradients = [torch.zeros_like(x) if s is None else s for s, x in zip(slopes, self.free, strict=True)]
        return [internal.detach(), loss, *gradients], seeds if nudge is None else [*seeds, nudge]

    def _in_errors(self, first: Pass, errors: Sequence[Tensor], strength: Tensor) -> tuple[list[Tensor], list[_Seed]]:
        loss = self._loss_scale * first.loss
        signals = self._signals(first, loss)
        precisions = self._precisions(first)
        weighted = [e if p == 1 else p * e for e, p in zip(errors, precisions, strict=True)]
        internal = 0.5 * self.squares(
            [e if p == 1 else math.sqrt(p) * e for e, p in zip(errors, precisions, strict=True)]
        )
        pulls = [strength * s if p == 1 else strength * s / p for s, p in zip(signals, precisions, strict=True)]
        gradients = [e + pull for e, pull in zip(errors, pulls, strict=True)]
        seeds = [(call.prediction, -w) for call, w in zip(first.layers, weighted, strict=True)]
        return [internal, loss.detach(), *gradients], [*seeds, (first.loss, self._loss_scale * strength)]

    def _refuse_hidden_gradients(self, captured: Captured) -> None:
        """Backward code of the user's own is not part of what the records of two first passes are compared by."""
        first = self._first
        region = Region([first.loss, *(call.prediction for call in first.layers)])
        own = [node for node in region.nodes if isinstance(node, BackwardCFunction)]
        if own:
            raise NotRepeatable(f"uses a custom autograd function ({type(own[0]).__name__})")

    def _check(self, captured: Captured, program: Program, mode: Mode, strength: float) -> None:
        """The plain way, once, at another point: energies, forces and update must be the same."""
        generator = torch.Generator().manual_seed(0)
        start = self.free if mode[0] == "states" else self.no_errors
        point = []
        for x, like in zip(start, self.free, strict=True):
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            point.append(x + (0.05 * like.abs().mean() + 0.01) * noise)
        with self._watched() as watch:
            plain = (
                Network.forces(self, point, strength)
                if mode[0] == "states"
                else Network.error_forces(self, point, strength)
            )
        if watch.reads:
            raise NotRepeatable(f"reads numbers that depend on its states into Python ({watch.reads[0]})")
        ran = self._run_of(program, mode, point, strength)
        found = Relaxation(point, mode[0], "fixed", 0, plain.internal)
        tensors = [self._tape.outside[value] for value in captured.targets[mode]]
        every = [t for t in self._tape.outside.values() if t.requires_grad]
        slopes = dict(
            zip(
                map(id, every),
                _gradients([(Network.energy_at(self, found, strength), self._scalar(1.0))], every),
                strict=True,
            )
        )
        updates = dict(zip(map(id, tensors), ran.update((self._scalar(1.0),)), strict=True))
        self._latest = None
        rounding = max(self.rounding, torch.finfo(self.free[0].dtype).eps)
        tolerance = min(1e4 * rounding, 0.1)
        pairs = [("energies", plain.internal, ran.forces.internal), ("the loss", plain.loss, ran.forces.loss)]
        pairs += [("forces", *pair) for pair in zip(plain.gradients, ran.forces.gradients, strict=True)]
        for t in every:
            expected, got = slopes[id(t)], updates.get(id(t))
            if expected is not None or got is not None:
                zero = torch.zeros_like(t)
                pairs.append(("the update", zero if expected is None else expected, zero if got is None else got))
        for what, expected, got in pairs:
            room = tolerance * expected.abs().max().clamp_min(rounding) if expected.numel() else expected.sum()
            if got.shape != expected.shape or not torch.allclose(
                got, expected, rtol=0.0, atol=float(room), equal_nan=True
            ):
                raise NotRepeatable(f"gives other values when it is repeated ({what})")

    @contextmanager
    def _watched(self) -> Iterator[Tape]:
        """Records the passes made inside."""
        watch, run = Tape(), self._run

        def watched(state_of: StateOf) -> Pass:
            with watch:
                return run(watch.cutting(state_of))

        self._run = watched
        try:
            yield watch
        finally:
            self._run = run


@dataclass
class _Run:
    """One evaluation by captured code."""

    mode: Mode
    strength: float
    point: Sequence[Tensor]
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


def _gradients(seeds: Sequence[_Seed], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """sum_k <seed_k, d output_k / d input>; None where nothing leads there."""
    live = [(output, seed) for output, seed in seeds if output.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    outputs, weights = [output for output, _ in live], [seed.to(output.dtype) for output, seed in live]
    return list(torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True))


def _is_quadratic(energy: Energy) -> bool:
    return isinstance(energy, QuadraticEnergy) and type(energy).layer_energy is QuadraticEnergy.layer_energy
