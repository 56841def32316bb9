"""From the record of a first pass to code: its energies and gradients are recorded too."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_ebm.capture.checking import Checking
from lightning_ebm.capture.comparison import known_by
from lightning_ebm.capture.continuation import continued
from lightning_ebm.capture.faster import faster
from lightning_ebm.capture.formulas import slopes_at
from lightning_ebm.capture.lowering import NotRepeatable
from lightning_ebm.capture.mode import Mode
from lightning_ebm.capture.program import Compiler, Program, Record, compiled_program
from lightning_ebm.capture.tape import Tape
from lightning_ebm.capture.values import PHASE, SEED, STATE, Value
from lightning_ebm.delivery import Seed
from lightning_ebm.energies.base import is_quadratic
from lightning_ebm.relaxers.fixed_steps import moved
from lightning_ebm.substitution import Pass
from lightning_ebm.wiring import Region


class RecordingNetwork(Checking):
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
                errors = [state.new_zeros(()).expand(state.shape) for state in first.states]
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
                outputs = self._answers(first, nudge, mode.layers if mode.kind == "answers" else range(len(point)))
            if mode.kind == "responses":
                gradients = [state.detach() - answer for state, answer in zip(first.states, outputs, strict=True)]
                energy, outputs = self.internal(first).detach(), [self.loss(first).detach(), *gradients]
            layers = range(len(point)) if mode.wanted is None else mode.wanted
            if mode.summed and energy is not None:
                total = energy.sum() if energy.ndim else energy
                total = total if nudge is None else total + nudge * outputs[0]
                here = errors if mode.in_errors else [state.detach() for state in first.states]
                pulls = [outputs[1 + k] for k in layers]
                ahead = [] if mode.lr is None else moved([here[k] for k in layers], pulls, mode.lr)
                energy, outputs = None, [total, *([self.norms(pulls, layers)] if mode.norms else []), *ahead]
                del pulls, ahead
            elif mode.wanted is not None:
                outputs = [outputs[0], *(outputs[1 + k] for k in layers)]
            sums = None if energy is None else tape.value(energy)
            given = [tape.value(output) for output in outputs]
            del energy, outputs  # as large as all states
            slopes: list[Tensor | None] = []
            if mode.updates:
                slopes = slopes_at([(top, seed * scale) for top, seed in seeds], [tensor for _, tensor in outside])
        if tape.problem is not None:
            raise NotRepeatable(f"cannot be recorded ({tape.problem})")
        reached = [(v, slope) for (v, _), slope in zip(outside, slopes, strict=False) if slope is not None]
        some_moved: frozenset[int] | None = frozenset() if mode.kind == "hops" else mode.moved
        record = Record(
            tape,
            known,
            first_pass,
            point,
            *inputs,
            energy=sums,
            outputs=given,
            slopes=[tape.value(slope) for _, slope in reached],
            defined=defined,
            still={} if some_moved is None else self._ahead_of(some_moved, tape),
            phases=mode.phases,
            repeated=mode.repeated,
        )
        compiler = None if mode.continued else compiler  # which has no complex numbers
        program = compiled_program(record, faster if self.free[0].device.type == "cpu" else None, compiler)
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

    def _refuse_hidden_gradients(self, first: Pass) -> None:
        """Backward code of the user's own is not part of what the records of two first passes are compared by."""
        region = Region([first.loss, *(call.prediction for call in first.layers)])
        own = [node for node in region.nodes if isinstance(node, BackwardCFunction)]
        if own:
            raise NotRepeatable(f"uses a custom autograd function ({type(own[0]).__name__})")

    @contextmanager
    def _watching(self, tape: Tape, mode: Mode) -> Iterator[None]:
        """Records; what it computes is only held where it will be differentiated in its turn."""
        once = mode.kind in ("forces", "error_forces", "hops", "update") and not mode.continued
        tape.keeps = not (once and is_quadratic(self.energy))
        try:
            with tape:
                yield
        finally:
            tape.keeps = True
