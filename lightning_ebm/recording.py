"""From the record of a first pass to code: its energies and gradients are recorded too, and the code is checked.

Network.forces and Network.energy_at say the same in autograd's words; here the quadratic energies are written so that
as little as possible is left to do at every point.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_ebm.energies import Energy
from lightning_ebm.energies.base import QuadraticEnergy
from lightning_ebm.network import Network
from lightning_ebm.products import faster_products
from lightning_ebm.program import NotRepeatable, Program, compiled_program
from lightning_ebm.relaxers import Forces, Relaxation
from lightning_ebm.substitution import Pass, StateOf
from lightning_ebm.tape import PHASE, SEED, STATE, Tape, Value, known_by
from lightning_ebm.wiring import Region

Coordinates = Literal["states", "errors"]
Mode = tuple[Coordinates, bool]
"""The coordinates, and whether there is a nudge."""

Seed = tuple[Tensor, Tensor]
"""What to differentiate, and the weight of each of its elements."""


Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


class RecordingNetwork(Network):
    """`Network` that can write down what it does at one point as a program for all points."""

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
        known = known_by(roots)
        outside = [(v, t) for v, t in tape.outside.items() if v in known and t.requires_grad]
        strength, scale = self.scalar(1.0), self.scalar(1.0)
        inputs = tape.input(strength, PHASE), tape.input(scale, SEED)
        defined: dict[Value, tuple[Value, Value]] = {}
        with tape, torch.enable_grad():
            if mode[0] == "states":
                point = [tape.value(state) for state in first.states]
                energy, outputs, seeds = self._in_states(first, strength if mode[1] else None)
            else:
                errors = [torch.zeros_like(state) for state in self.free]
                point = [tape.input(error, STATE) for error in errors]
                for call, state, error in zip(first.layers, first.states, point, strict=True):
                    defined[tape.value(state)] = tape.value(call.prediction), error
                energy, outputs, seeds = self._in_errors(first, errors, strength)
            tops = [(top, seed * scale) for top, seed in seeds]
            slopes = _gradients(tops, [tensor for _, tensor in outside])
        if tape.problem is not None:
            raise NotRepeatable(f"cannot be recorded ({tape.problem})")
        reached = [(v, slope) for (v, _), slope in zip(outside, slopes, strict=True) if slope is not None]
        program = compiled_program(
            point,
            *inputs,
            tape.value(energy),
            [tape.value(output) for output in outputs],
            [tape.value(slope) for _, slope in reached],
            tape,
            known,
            first_pass,
            defined,
            partial(faster_products, tape, compiler is not None),
            compiler,
        )
        return program, [value for value, _ in reached]

    def _in_states(self, first: Pass, strength: Tensor | None) -> tuple[Tensor, list[Tensor], list[Seed]]:
        """I_b; loss and dE/dx; and what to differentiate, with which weight, for dE/dtheta."""
        loss = self.loss_scale * first.loss.detach()
        nudge = None if strength is None else (first.loss, self.loss_scale * strength)
        half = self.rounding > max(torch.finfo(x.dtype).eps for x in self.free)
        unit = strength if half else None  # see `Network.forces`
        pull = nudge if unit is None else (first.loss, self.loss_scale * self.scalar(1.0))
        states = first.states
        if _is_quadratic(self.energy):
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
            internal = self.internal(first)
            seeds = [(internal.sum(), self.scalar(1.0))]
            own = []
        pulls = seeds if unit is None else [(top, seed / unit) for top, seed in seeds]
        slopes = _gradients(pulls if pull is None else [*pulls, pull], states)
        slopes = [s if s is None or unit is None else unit * s for s in slopes]
        if own:
            gradients = [-o if s is None else s - o for s, o in zip(slopes, own, strict=True)]
        else:
            gradients = [torch.zeros_like(x) if s is None else s for s, x in zip(slopes, self.free, strict=True)]
        return internal.detach(), [loss, *gradients], seeds if nudge is None else [*seeds, nudge]

    def _in_errors(
        self, first: Pass, errors: Sequence[Tensor], strength: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Seed]]:
        loss = self.loss_scale * first.loss
        signals = self._signals(first, loss)
        precisions = self._precisions(first)
        weighted = [e if p == 1 else p * e for e, p in zip(errors, precisions, strict=True)]
        internal = 0.5 * self.squares(
            [e if p == 1 else math.sqrt(p) * e for e, p in zip(errors, precisions, strict=True)]
        )
        pulls = [strength * s if p == 1 else strength * s / p for s, p in zip(signals, precisions, strict=True)]
        gradients = [e + pull for e, pull in zip(errors, pulls, strict=True)]
        seeds = [(call.prediction, -w) for call, w in zip(first.layers, weighted, strict=True)]
        return internal, [loss.detach(), *gradients], [*seeds, (first.loss, self.loss_scale * strength)]

    def _refuse_hidden_gradients(self, first: Pass) -> None:
        """Backward code of the user's own is not part of what the records of two first passes are compared by."""
        region = Region([first.loss, *(call.prediction for call in first.layers)])
        own = [node for node in region.nodes if isinstance(node, BackwardCFunction)]
        if own:
            raise NotRepeatable(f"uses a custom autograd function ({type(own[0]).__name__})")

    def plainly(self, mode: Mode, strength: float) -> tuple[list[Tensor], list[Tensor], dict[int, Tensor]]:
        """The plain way, once, at a point of its own: what a program must give there.

        Returns:
            The point; internal energy, loss and gradients; and dE/dtheta by the identity of each tensor it reaches.

        Raises:
            NotRepeatable: the pass reads values computed from states into Python.
        """
        generator = torch.Generator().manual_seed(0)
        point = []
        for x, like in zip(self.free if mode[0] == "states" else self.no_errors, self.free, strict=True):
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            point.append(x + (0.05 * like.abs().mean() + 0.01) * noise)
        evaluate: Callable[..., Forces] = Network.forces if mode[0] == "states" else Network.error_forces
        with self._watched() as watch:
            found = evaluate(self, point, strength)
        if watch.reads:
            raise NotRepeatable(f"reads numbers that depend on its states into Python ({watch.reads[0]})")
        energy = Network.energy_at(self, Relaxation(point, mode[0], "fixed", 0, found.internal), strength)
        states = self._latest[1].states if self._latest is not None else []
        leaves = Region([energy]).leaves
        targets = [t for t in leaves.values() if t.requires_grad and all(t is not x for x in states)]
        slopes = zip(targets, _gradients([(energy, torch.ones_like(energy))], targets), strict=True)
        self._latest = None
        return point, [found.internal, found.loss, *found.gradients], {id(t): s for t, s in slopes if s is not None}

    def must_equal(self, plain: Sequence[Tensor], got: Sequence[Tensor]) -> None:
        """Raises `NotRepeatable` unless these are equal up to rounding, relative to the largest element of each."""
        rounding = max(self.rounding, torch.finfo(self.free[0].dtype).eps)
        for one, other in zip(plain, got, strict=True):
            largest = float(one.abs().max()) if one.numel() else 0.0
            room = min(1e4 * rounding, 0.1) * max(largest, rounding) if math.isfinite(largest) else 0.0
            if one.shape != other.shape or not torch.allclose(other, one, rtol=0.0, atol=room, equal_nan=True):
                raise NotRepeatable("gives other values when it is repeated")

    def scalar(self, number: float) -> Tensor:
        """A number as a tensor, in the states' arithmetic."""
        return torch.full((), number, dtype=self.free[0].dtype, device=self.free[0].device)

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


def _gradients(seeds: Sequence[Seed], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """sum_k <seed_k, d output_k / d input>; None where nothing leads there."""
    live = [(output, seed) for output, seed in seeds if output.requires_grad]
    if not live or not inputs:
        return [None] * len(inputs)
    outputs, weights = [output for output, _ in live], [seed.to(output.dtype) for output, seed in live]
    return list(torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True))


def _is_quadratic(energy: Energy) -> bool:
    return isinstance(energy, QuadraticEnergy) and type(energy).layer_energy is QuadraticEnergy.layer_energy
