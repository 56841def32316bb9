"""From the record of a first pass to code: its energies and gradients are recorded too, and the code is checked.

Network.forces, .answers and .energy_at say the same in autograd's words; here the quadratic energies are written so
that as little as possible is left to do at every point.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_ebm.comparison import known_by
from lightning_ebm.continuation import continued
from lightning_ebm.dyads import Dyads
from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import QuadraticEnergy, is_bounded
from lightning_ebm.faster import faster
from lightning_ebm.front import Front
from lightning_ebm.lowering import NotRepeatable
from lightning_ebm.network import Network, Run, _holomorphic, _is_one
from lightning_ebm.program import Program, Record, compiled_program
from lightning_ebm.relaxers import Forces, Relaxation
from lightning_ebm.relaxers.fixed_steps import moved
from lightning_ebm.substitution import Pass, StateOf
from lightning_ebm.tape import PHASE, SEED, STATE, Tape, Value
from lightning_ebm.wiring import Plan, Region

Kind = Literal["forces", "error_forces", "responses", "answers", "energy", "update", "dyads", "dyadic update", "hops"]


class Mode(NamedTuple):
    """Which evaluation.

    Attributes:
        kind: the method of the landscape that it stands for; "energy" is I and L, "update" dE/dtheta alone, "dyadic
            update" that of pairs, whose point is their means, then their leading and their trailing states.
        nudged: whether the loss pulls.
        layers: of answers, whose.
        phases: of an update, how many phases it sums over.
        lr: of forces, the step that is taken along them: the next point is given in their place, and no update.
        moved: of forces, the states that may be elsewhere than the forward pass left them, see `Front`; None is all.
        wanted: of those, the layers whose forces, or next states, are given; None is all.
        continued: whether states and nudge are complex.
    """

    kind: Kind
    nudged: bool
    layers: tuple[int, ...] = ()
    phases: int = 1
    lr: float | None = None
    moved: frozenset[int] | None = None
    wanted: tuple[int, ...] | None = None
    continued: bool = False

    @property
    def updates(self) -> bool:
        """Whether it gives dE/dtheta too."""
        kinds = ("forces", "error_forces", "update", "dyadic update", "hops")
        return self.kind in kinds and self.lr is None and self.moved is None

    @property
    def has_energy(self) -> bool:
        """Whether it gives the energy of each sample."""
        return self.kind in ("forces", "error_forces", "responses", "hops") and self.lr is None

    @property
    def in_errors(self) -> bool:
        """Whether the point is one of errors."""
        return self.kind in ("error_forces", "hops")


Seed = tuple[Tensor, Tensor]
"""What to differentiate, and the weight of each of its elements."""


Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


class RecordingNetwork(Dyads):
    """`Network` that can write down what it does at one point as a program for all points."""

    def __init__(self, energy: Energy, plan: Plan, first: Pass, run: Run, batch_size: int, loss_scale: float) -> None:
        super().__init__(energy, plan, first, run, batch_size, loss_scale)
        self._front = Front(plan)

    def recorded(
        self, tape: Tape, first_pass: int, roots: Sequence[Value], mode: Mode, compiler: Compiler | None
    ) -> tuple[Program, list[Value]]:
        """Runs the energies and their gradients once, on the graph of the first pass, and makes code of the record.

        Args:
            tape: holds the first pass.
            first_pass: how many operations that had.
            roots: its loss, its predictions and drives.
            mode: which evaluation.
            compiler: for the code of a point.

        Returns:
            The program, and the tensors from outside whose gradients its update gives.

        Raises:
            NotRepeatable: the reason why there can be none.
        """
        first = self._first
        self._refuse_hidden_gradients(first)
        with torch.no_grad():
            self.internal(first)  # what an energy makes when it is first asked is not to be a part of the record
        known = known_by(roots)
        outside = [(v, t) for v, t in tape.outside.items() if v in known and t.requires_grad]
        one = 1j if mode.continued else 1.0
        strength, scale = self.scalar(one), self.scalar(one)
        inputs = tape.input(strength, PHASE), tape.input(scale, SEED)
        nudge = strength if mode.nudged else None
        defined: dict[Value, tuple[Value, Value]] = {}
        with self._watching(tape, mode), torch.enable_grad():
            if mode.continued:
                leaves = [torch.complex(x, torch.zeros_like(x)).requires_grad_() for x in self.free]
                for leaf in leaves:
                    tape.input(leaf, STATE)
                first = continued(tape, first, leaves)
            point = [tape.value(state) for state in first.states]
            seeds: list[Seed] = []
            energy: Tensor | None = None
            if mode.in_errors:
                errors = [torch.zeros_like(state) for state in first.states]
                point = [tape.input(error, STATE) for error in errors]
            if mode.kind == "hops":
                energy, outputs, seeds = self._frozen(first, errors, strength)
            elif mode.in_errors:
                for call, state, error in zip(first.layers, first.states, point, strict=True):
                    defined[tape.value(state)] = tape.value(call.prediction), error
                energy, outputs, seeds = self._in_errors(first, errors, strength, mode)
            elif mode.kind == "forces":
                energy, outputs, seeds = self._in_states(first, nudge, mode)
            elif mode.kind == "update":
                outputs, seeds = [], self._seeds(first, nudge)
            elif mode.kind == "dyads":
                outputs = self._in_pairs(first, strength)
            elif mode.kind == "dyadic update":
                halves = [[state.detach().clone() for state in first.states] for _ in range(2)]
                point += [tape.input(state, STATE) for half in halves for state in half]
                outputs, seeds = [], self._seeds_of_pairs(first, halves[0], halves[1], nudge)
            elif mode.kind == "energy":
                outputs = [self.internal(first).detach(), self.loss(first).detach()]
            else:
                layers = mode.layers if mode.kind == "answers" else range(len(point))
                outputs = self._answers(first, nudge, layers)
            if mode.kind == "responses":
                gradients = [state.detach() - answer for state, answer in zip(first.states, outputs, strict=True)]
                energy, outputs = self.internal(first).detach(), [self.loss(first).detach(), *gradients]
            if mode.lr is not None and energy is not None:
                total = energy if nudge is None else energy + nudge * outputs[0]
                here = errors if mode.in_errors else [state.detach() for state in first.states]
                energy, outputs = None, [total, *moved(here, outputs[1:], mode.lr)]
            if mode.wanted is not None:
                outputs = [outputs[0], *(outputs[1 + k] for k in mode.wanted)]
            if not mode.updates:
                outside = []
            slopes = _gradients([(top, seed * scale) for top, seed in seeds], [tensor for _, tensor in outside])
        if tape.problem is not None:
            raise NotRepeatable(f"cannot be recorded ({tape.problem})")
        reached = [(v, slope) for (v, _), slope in zip(outside, slopes, strict=True) if slope is not None]
        some_moved: frozenset[int] | None = frozenset() if mode.kind == "hops" else mode.moved
        record = Record(
            tape,
            known,
            first_pass,
            point,
            *inputs,
            energy=None if energy is None else tape.value(energy),
            outputs=[tape.value(output) for output in outputs],
            slopes=[tape.value(slope) for _, slope in reached],
            defined=defined,
            still={} if some_moved is None else self._ahead_of(some_moved, tape),
            phases=mode.phases,
        )
        compiler = None if mode.continued else compiler  # which has no complex numbers
        on_cpu = self.free[0].device.type == "cpu"
        rewrite = partial(faster, compiler is not None) if on_cpu else None
        program = compiled_program(record, rewrite, compiler)
        for node in tape.nodes[first_pass:]:
            for value in node.results:
                tape.contents.pop(value, None)  # type: ignore[arg-type]  # None is in no dictionary of values
        return program, [value for value, _ in reached]

    def _ahead_of(self, moved: Collection[int], tape: Tape) -> dict[Value, Value]:
        """The states that have not moved, and their predictions."""
        layers = enumerate(self._first.layers)
        return {
            tape.value(call.state): tape.value(call.prediction)
            for k, call in layers
            if k not in moved and call.state is not None
        }

    def _seeds(self, first: Pass, strength: Tensor | None) -> list[Seed]:
        """What to differentiate, with which weight, for dE/dtheta; a part of that for dE/dx, see `_in_states`."""
        if _is_quadratic(self.energy):
            states, precisions = first.states, self._precisions(first)
            pairs = [
                (call.prediction, call.prediction.detach() - x) for call, x in zip(first.layers, states, strict=True)
            ]
            seeds = [(mu, d if _is_one(p) else p * d) for (mu, d), p in zip(pairs, precisions, strict=True)]
        else:
            seeds = [(self.internal(first).sum(), self.scalar(1.0))]
        return seeds if strength is None else [*seeds, (first.loss, self.loss_scale * strength)]

    def _in_states(self, first: Pass, strength: Tensor | None, mode: Mode) -> tuple[Tensor, list[Tensor], list[Seed]]:
        """I_b, or their sum; loss and dE/dx; and what to differentiate, with which weight, for dE/dtheta."""
        loss, states = self.loss_scale * first.loss.detach(), first.states
        seeds = self._seeds(first, None)
        slopes = self._pulls(first, seeds, strength, range(len(states)))
        if _is_quadratic(self.energy):
            precisions = self._precisions(first)
            errors = [seed if _is_one(p) else seed / _root(p) for (_, seed), p in zip(seeds, precisions, strict=True)]
            internal = self.internal(first) if loss.is_complex() else self._half_squares(errors, mode)
            gradients = [-own if s is None else s - own for s, (_, own) in zip(slopes, seeds, strict=True)]
        else:
            internal, still = self.internal(first), self._like(first)
            gradients = [torch.zeros_like(x) if s is None else s for s, x in zip(slopes, still, strict=True)]
        if is_bounded(self.energy):
            found = zip(gradients, states, self.views(first), strict=True)
            gradients = [self.energy.tangent(gradient, state.detach(), view) for gradient, state, view in found]
        nudge = [] if strength is None else [(first.loss, self.loss_scale * strength)]
        internal = internal.detach() if mode.lr is None else internal.detach().sum()
        return internal, [loss, *gradients], [*seeds, *nudge]

    def _half_squares(self, errors: Sequence[Tensor], mode: Mode) -> Tensor:
        """sum_l 1/2 |e_l|^2 of each sample, ``(B,)``; of the batch, where a step is taken and nobody asks for more.

        Left out are layers that are known to be where they were predicted.
        """
        layers = range(len(errors)) if mode.moved is None else sorted(self._front.wrong(mode.moved))
        if mode.lr is None:
            return 0.5 * self.squares(errors, layers)
        if not layers:
            return self.scalar(0.0)
        return 0.5 * torch.stack([torch.linalg.vector_norm(errors[k]) for k in layers]).square().sum()

    def _pulls(
        self, first: Pass, seeds: Sequence[Seed], strength: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor | None]:
        """What the seeds and the nudge exert on these layers."""
        half = self.rounding > max(torch.finfo(x.dtype).eps for x in self.free)
        unit = strength if half else None  # see `Network.forces`
        if strength is not None:
            seeds = seeds if unit is None else [(top, seed / unit) for top, seed in seeds]
            seeds = [*seeds, (first.loss, self.loss_scale * (self.scalar(1.0) if unit is not None else strength))]
        slopes = _gradients(seeds, [first.states[k] for k in layers])
        return [s if s is None or unit is None else unit * s for s in slopes]

    def _answers(self, first: Pass, strength: Tensor | None, layers: Sequence[int]) -> list[Tensor]:
        """Best responses of these layers."""
        others = self.internal(first, own=False).sum()
        slopes = self._pulls(first, [(others, self.scalar(1.0))], strength, layers)
        views, answers, still = self.views(first), [], self._like(first)
        for k, slope in zip(layers, slopes, strict=True):
            pull = torch.zeros_like(still[k]) if slope is None else -slope
            answers.append(self.energy.best_response(pull, views[k]).detach())
        return answers

    def _like(self, first: Pass) -> Sequence[Tensor]:
        """Tensors of the states' kind, which in real numbers need not be the states themselves."""
        return first.states if first.states[0].is_complex() else self.free

    def _in_errors(
        self, first: Pass, errors: Sequence[Tensor], strength: Tensor, mode: Mode
    ) -> tuple[Tensor, list[Tensor], list[Seed]]:
        loss = self.loss_scale * first.loss
        signals = [_holomorphic(signal) for signal in self._signals(first, loss)]
        precisions = self._precisions(first)
        weighted = [e if _is_one(p) else p * e for e, p in zip(errors, precisions, strict=True)]
        if loss.is_complex():
            internal = self.per_sample([0.5 * e * w for e, w in zip(errors, weighted, strict=True)])
        else:
            rooted = [e if _is_one(p) else _root(p) * e for e, p in zip(errors, precisions, strict=True)]
            internal = self._half_squares(rooted, mode)
        pulls = [strength * s if _is_one(p) else strength * s / p for s, p in zip(signals, precisions, strict=True)]
        gradients = [e + pull for e, pull in zip(errors, pulls, strict=True)]
        seeds = [(call.prediction, -w) for call, w in zip(first.layers, weighted, strict=True)]
        internal = internal if mode.lr is None else internal.sum()
        return internal, [loss.detach(), *gradients], [*seeds, (first.loss, self.loss_scale * strength)]

    def _frozen(
        self, first: Pass, errors: Sequence[Tensor], strength: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Seed]]:
        """`Network.hops`: I_b; loss and slopes; and what to differentiate, with which weight, for dE/dtheta."""
        precisions = self._precisions(first)
        internal = 0.5 * self.squares(
            [e if _is_one(p) else _root(p) * e for e, p in zip(errors, precisions, strict=True)]
        )
        pairs = zip(first.layers, errors, precisions, strict=True)
        seeds = [(call.prediction, -e if _is_one(p) else -p * e) for call, e, p in pairs]
        slopes = self._pulls(first, seeds, strength, range(len(errors)))
        parts = zip(errors, slopes, precisions, strict=True)
        gradients = [e.clone() if s is None else e + s if _is_one(p) else e + s / p for e, s, p in parts]
        nudge = (first.loss, self.loss_scale * strength)
        return internal, [self.loss_scale * first.loss.detach(), *gradients], [*seeds, nudge]

    def _refuse_hidden_gradients(self, first: Pass) -> None:
        """Backward code of the user's own is not part of what the records of two first passes are compared by."""
        region = Region([first.loss, *(call.prediction for call in first.layers)])
        own = [node for node in region.nodes if isinstance(node, BackwardCFunction)]
        if own:
            raise NotRepeatable(f"uses a custom autograd function ({type(own[0]).__name__})")

    def plainly(
        self, mode: Mode, strengths: Sequence[complex], weights: Sequence[complex]
    ) -> tuple[list[list[Tensor]], list[Tensor], dict[int, Tensor] | None]:
        """The plain way, once, at points of its own: what a program must give there.

        Returns:
            A point for each phase; the outputs; and sum_p weight_p dE/dtheta by the identity of each tensor it
            reaches, None if the mode gives no update.

        Raises:
            NotRepeatable: the pass reads values computed from states into Python.
        """
        points = [self._elsewhere(mode, number) for number in range(mode.phases)]
        if mode.kind == "dyadic update":
            points[0] = [x for number in range(3) for x in self._elsewhere(mode, number)]
        with self._watched() as watch:
            outputs = self._plain_outputs(mode, points[0], strengths[0])
        if watch.reads:
            raise NotRepeatable(f"reads numbers that depend on its states into Python ({watch.reads[0]})")
        if not mode.updates:
            return points, outputs, None
        found: dict[int, Tensor] = {}
        for point, strength, weight in zip(points, strengths, weights, strict=True):
            ended = self._ended(mode, point)
            energy = Network.energy_at(self, ended, strength)
            states = self._latest[1].states if self._latest is not None else []
            leaves = Region([energy]).leaves
            targets = [t for t in leaves.values() if t.requires_grad and all(t is not x for x in states)]
            slopes = _gradients([(energy, torch.full_like(energy, weight))], targets)
            for target, slope in zip(targets, slopes, strict=True):
                if slope is not None:
                    found[id(target)] = found[id(target)] + slope if id(target) in found else slope
        return points, outputs, found

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

    def _plain_outputs(self, mode: Mode, point: Sequence[Tensor], strength: complex) -> list[Tensor]:
        if mode.kind == "answers":
            return Network.answers(self, point, strength, mode.layers)
        if mode.kind == "dyads":
            ahead, behind, forces = Network.dyads(self, point, strength)  # type: ignore[arg-type]  # none is complex
            return [forces.loss, *forces.gradients, *ahead, *behind]
        if mode.kind in ("energy", "update", "dyadic update"):
            seen = self.at_states(point[: len(self.free)])
            return [self.internal(seen).detach(), self.loss(seen).detach()] if mode.kind == "energy" else []
        found: Forces = getattr(Network, mode.kind)(self, point, strength)
        ahead = found.gradients if mode.lr is None else moved(point, found.gradients, mode.lr)
        energies = [found.internal, found.loss]
        if mode.lr is not None:
            energies = [found.internal.sum() + strength * found.loss]
        return [*energies, *(ahead[k] for k in (range(len(ahead)) if mode.wanted is None else mode.wanted))]

    def _elsewhere(self, mode: Mode, number: int) -> list[Tensor]:
        """Points near the forward pass, the same ones for every mode."""
        generator = torch.Generator().manual_seed(number)
        point = []
        for k, like in enumerate(self.free):
            noise = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
            if mode.moved is not None and k not in mode.moved:
                point.append(like)
                continue
            size = 0.05 * like.abs().mean() + 0.01
            here = size * noise if mode.in_errors else like + size * noise
            point.append(torch.complex(here, size * noise.flip(0)) if mode.continued else here)
        return point if mode.in_errors or mode.moved is not None else self.feasible(point)

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

    def scalar(self, number: complex) -> Tensor:
        """A number as a tensor, in the states' arithmetic."""
        dtype = self.free[0].dtype
        if isinstance(number, complex):
            dtype = dtype.to_complex()
        return torch.full((), number, dtype=dtype, device=self.free[0].device)

    @contextmanager
    def _watching(self, tape: Tape, mode: Mode) -> Iterator[None]:
        """Records; what it computes is only held where it will be differentiated in its turn."""
        once = mode.kind in ("forces", "error_forces", "hops", "update") and not mode.continued
        tape.keeps = not (once and _is_quadratic(self.energy))
        try:
            with tape:
                yield
        finally:
            tape.keeps = True

    @contextmanager
    def _watched(self) -> Iterator[Tape]:
        """Records the passes made inside."""
        watch, run = Tape(), self._run
        watch.keeps = False

        def watched(state_of: StateOf) -> Pass:
            with watch:
                return run(watch.cutting(state_of))

        self._run = watched
        try:
            yield watch
        finally:
            self._run = run


def _gradients(seeds: Sequence[Seed], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """sum_k <seed_k, d output_k / d input>, its real part for a real input; None where nothing leads there."""
    live = [(output, seed) for output, seed in seeds if output.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    outputs = [output for output, _ in live]
    weights = [  # autograd conjugates: what it is given, and what it gives
        _holomorphic(seed.real if seed.is_complex() and not output.is_complex() else seed.to(output.dtype))
        for output, seed in live
    ]
    slopes = torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True)
    return [slope if slope is None else _holomorphic(slope) for slope in slopes]


def _is_quadratic(energy: Energy) -> bool:
    return isinstance(energy, QuadraticEnergy) and type(energy).layer_energy is QuadraticEnergy.layer_energy


def _root(precision: float | Tensor) -> float | Tensor:
    return precision.sqrt() if isinstance(precision, Tensor) else math.sqrt(precision)
