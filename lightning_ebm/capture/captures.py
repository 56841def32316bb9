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
from typing import Any

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.capture.comparison import same_computation
from lightning_ebm.capture.heap import keep_heap
from lightning_ebm.capture.mode import Mode
from lightning_ebm.capture.program import Program
from lightning_ebm.capture.tape import Tape
from lightning_ebm.capture.values import Value
from lightning_ebm.energies.base import is_divergence
from lightning_ebm.substitution import Pass

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
        keep_heap()
        self.refused: str | None = None
        self.missed: dict[Mode, tuple[complex, ...]] = {}
        """Evaluations that a captured step was asked for and had no code of, and the nudges they were asked for at."""
        self._kept: list[Captured] = []
        self._made = self._used = 0

    def wanted(self, algorithm: Algorithm) -> bool:
        """Whether passes are worth recording: repeated ones, of forces or best responses.

        An update read at first arrival needs no further pass; second derivatives are evaluated the plain way (the free
        phase before them is not).
        """
        contrasts = algorithm.read_as in ("contrast", "multipliers", "dyadic", "fixed-prediction")
        frees = algorithm.read_as == "cross-derivative" and not is_divergence(algorithm.energy)
        return self.refused is None and (contrasts or frees)

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

    def forget(self, captured: "Captured", mode: Mode, strengths: tuple[complex, ...]) -> None:
        """Captures such a step anew when it comes again, with what it had no code of."""
        self._kept.remove(captured)
        self.missed[mode] = strengths

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
        self.fronts = True
        self.abreast = True
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
