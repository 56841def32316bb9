"""The programs of one module: a new record is examined once, and recognized when it comes again."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_ebm.program.calls import Calls, Replace, nothing_in_place
from lightning_ebm.program.candidates import Layers
from lightning_ebm.program.check import check_against_autograd
from lightning_ebm.program.code import TracedProgram
from lightning_ebm.program.comparison import Outline
from lightning_ebm.program.interpreter import Program
from lightning_ebm.program.layers import LayerFinder, Output
from lightning_ebm.program.left import Left
from lightning_ebm.program.numbers import OtherNumbers, as_input
from lightning_ebm.program.record import Record, Value, depending
from lightning_ebm.program.recorder import Recorder
from lightning_ebm.program.reduction import averaged_elements, reduced_sizes
from lightning_ebm.program.watch import Watch
from lightning_ebm.program.wiring import Plan, Region

log = logging.getLogger(__name__)

_KEPT = 16
"""Known programs: full and last batches, training modes, branches, losses in turn."""


@dataclass
class Known:
    """A program that has been examined.

    Attributes:
        outline: what it is recognized by.
        plan: its wiring.
        reduced: first dimensions of what its loss reduces to one number.
        elements: how many elements its loss is a mean over; None where that cannot be told.
        traced: its code.
        unchecked: what the comparison with autograd has said too little of so far, see `check_against_autograd`.
        uses: how often it has been seen.
        covered: whether every parameter is known to be reached by the energy.
        interacting: whether its samples see each other, see `Network.samples_interact`; None until that is asked.
        analytic: whether it is known to be an analytic function of complex states.
        other_slope: see `function_without_slope`; None until that is asked, then a name or "".
    """

    outline: Outline
    plan: Plan
    reduced: frozenset[int]
    elements: int | None
    traced: TracedProgram
    unchecked: frozenset[str] = frozenset()
    uses: int = 1
    covered: bool = False
    interacting: bool | None = None
    analytic: bool = False
    other_slope: str | None = None

    @cached_property
    def calls(self) -> int:
        """See `Plan.parallel_calls`."""
        return self.plan.parallel_calls()

    @cached_property
    def operations(self) -> list[str]:
        """The names of the operations between states, for messages."""
        return [str(node.func) for node in self.traced.program.between_states()]


class Found(NamedTuple):
    """The program of a pass.

    Attributes:
        program: on the tensors of this pass.
        known: what was found out about it.
        binding: its values, by those of the pass that was examined; None where it is that pass.
    """

    program: Program
    known: Known
    binding: dict[Value, Value] | None


class Programs:
    """Records passes of a module, and knows the programs that they were.

    Args:
        module: the user's module.
        layers: as in `Learner`.
        output: as in `Learner`.
        also: names of inputs and outputs that carry states besides.
        like: programs of the same module, whose choice of layers is kept where it can be.
        pooled: as in `LayerFinder`.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Layers,
        output: Output,
        also: Collection[str] = (),
        like: "Programs | None" = None,
        pooled: bool = False,
    ) -> None:
        self._module = module
        followed: LayerFinder | None = None if like is None else like._finder
        self._finder: LayerFinder = LayerFinder(module, layers, output, also, followed, pooled)
        self._watch = Watch(module, self._finder.watched, self._finder.suspects)
        self._known: list[Known] = []
        self._said = False
        self._left: Left | None = None
        self.told: set[str] = set()
        """What is said once of a module, whatever its programs."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be found again."""
        return {**self.__dict__, "_known": [], "_left": None}

    @property
    def latest(self) -> Known | None:
        """The program that was seen last."""
        return self._known[0] if self._known else None

    def repeats(self, known: Known) -> bool:
        """Whether a program comes again often enough for code to pay: more often than there are others."""
        return known.uses > len(self._known)

    @contextmanager
    def recording(self, recorder: Recorder, replace: Replace = nothing_in_place) -> Iterator[None]:
        """Records what runs within."""
        if self._known:
            recorder.following.begin([known.outline.trail for known in self._known])
        with Calls(self._module, recorder, self._watch, replace), recorder:
            yield

    def free_left(self) -> None:
        """Another step begins: of the pass before nothing is kept that backprop would have freed."""
        if self._left is not None:
            self._left.free()
            self._left = None

    @contextmanager
    def recording_own(self, recorder: Recorder, replace: Replace = nothing_in_place) -> Iterator[None]:
        """Records the user's own pass, of which something may be left when the next one begins."""
        with self.recording(recorder, replace):
            yield
        self._left = recorder.contents.left()

    def of(self, recorder: Recorder, loss: Tensor, partial: bool = False) -> Found:
        """The program whose loss this is.

        Args:
            recorder: of the pass.
            loss: what the pass returned, in its own graph.
            partial: whether it is one of several of a step.

        Raises:
            LayerDiscoveryError: no call could carry a state.
            UnsupportedModuleError: the record is not of what autograd would differentiate.
        """
        value, record = recorder.contents.value(loss), recorder.settled()
        found, before = self._again(record, value)
        if found is not None:
            program, known, _ = found
            due = known.unchecked and not known.uses & (known.uses - 1)  # ever more rarely
            if due or record.reads_graph or record.has_hooks or record.packs or program.overwritten():
                known.unchecked &= self._check(recorder, program, known.plan, loss)
            self._comes_again(known)
            return found
        self._say_what_is_read(record)
        plan, marks = self._finder.find(record, value, partial, zero=not loss.any())
        program = Program(record, marks, value)
        unchecked = self._check(recorder, program, plan, loss)
        added = self._added(program, plan, value, before)
        added.unchecked = unchecked
        return Found(program, added, None)

    def _again(self, record: Record, value: Value) -> tuple[Found | None, int]:
        """The known program that a record is of, or None; and how often one was seen whose place it is to take."""
        for known in list(self._known):
            found = known.outline.repeated_by(record, value)
            if isinstance(found, OtherNumbers):  # from now on they are inputs of the program
                for site in found.sites:
                    as_input(site, record)
                self._known.remove(known)
                return None, known.uses
            if not isinstance(found, str):
                return Found(Program(record, found[0], value), known, found[1]), 0
        return None, 0

    def _comes_again(self, known: Known) -> None:
        self._known.remove(known)
        self._known.insert(0, known)
        known.uses += 1

    def _check(self, recorder: Recorder, program: Program, plan: Plan, loss: Tensor) -> frozenset[str]:
        with recorder.pausing(), torch.enable_grad():
            return check_against_autograd(self._module, program, plan, loss)

    def _say_what_is_read(self, record: Record) -> None:
        """Once: a branch, or the shape of a mask, may hang on a number that Python read off a layer."""
        moving = depending({mark.state for mark in record.marks}, record.nodes)
        reads = [name for name, value in record.reads if value in moving]
        if reads and not self._said:
            self._said = True
            log.info(
                "The step reads numbers off its layers into Python (%s). If a branch, or the size of a mask, hangs on"
                " one, it is that of the recorded pass at every state: the energy is that of the program that ran."
                " (Said once.)",
                ", ".join(dict.fromkeys(reads)),
            )

    def without_loss(self, recorder: Recorder) -> Found:
        """The program of a pass that returns no loss: it ends in whatever nothing else consumes."""
        record = recorder.settled()
        value = _sum_of_ends(recorder)
        found, before = self._again(record, value)
        if found is not None:
            self._comes_again(found.known)
            return found
        plan, marks = self._finder.find(record, value, partial=None)
        program = Program(record, marks, value)
        return Found(program, self._added(program, plan, value, before), None)

    def _added(self, program: Program, plan: Plan, loss: Value, before: int) -> Known:
        outline = Outline(program.record, program.marks, loss, self._module)
        known = Known(outline, plan, reduced_sizes(program), averaged_elements(program), TracedProgram(program))
        known.uses += before
        self._known = [known, *self._known[: _KEPT - 1]]
        return known


def _sum_of_ends(recorder: Recorder) -> Value:
    """The sum of all that calls returned and no other call was computed from, in place of a loss."""
    record = recorder.record
    used: set[Value] = set()
    states = {mark.state for mark in record.marks}
    for mark in record.marks:
        used |= Region([mark.prediction], states, record.leaves).states
    ends = [mark.state for mark in record.marks if mark.state not in used]
    kinds = [end.meta[2] for end in ends]
    like = torch.zeros((), dtype=reduce(torch.promote_types, kinds) if kinds else None)
    return recorder.made(_summed, tuple(ends), like)


def _summed(*tensors: Tensor) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors]).sum()
