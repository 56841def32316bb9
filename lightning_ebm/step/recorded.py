"""A pass of the user's that is over: its program, what is known of it, and what it computed."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ebm.counted import counted
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.network.network import Network
from lightning_ebm.network.passes import Run, Start
from lightning_ebm.network.traced import TracedNetwork
from lightning_ebm.program.batch_size import batch_size_among, shapes_in
from lightning_ebm.program.interpreter import Program, at_least_float32, at_prediction
from lightning_ebm.program.own_slopes import changing_hook, function_without_slope
from lightning_ebm.program.programs import Found, Known
from lightning_ebm.program.record import Value
from lightning_ebm.program.recorder import Recorder
from lightning_ebm.program.wiring import Plan
from lightning_ebm.step.arithmetic import Arithmetic
from lightning_ebm.step.closure import is_number
from lightning_ebm.step.setup import Setup

log = logging.getLogger(__name__)


class Recorded(NamedTuple):
    """One pass.

    Attributes:
        program: on the tensors of this pass.
        known: what was found out about it.
        binding: its values, by those of the pass that was examined; None where it is that pass.
        held: what its values held, as far as that is still there.
        loss: what it returned, as a tensor of shape (); None where it returned no number.
        shapes: of what the pass was given and has read, see `batch_size_among`.
    """

    program: Program
    known: Known
    binding: dict[Value, Value] | None
    held: Mapping[Value, Tensor]
    loss: Tensor | None
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, found: Found, recorder: Recorder, loss: Any, arguments: Any) -> "Recorded":
        """What a recorder has seen of a pass, given what that was called with: a batch that nobody reads has no say."""
        shapes = shapes_in(arguments, recorder.contents.has_read)
        number = loss.detach().reshape(()) if is_number(loss) else None
        return cls(*found, recorder.contents.held, number, tuple(shapes))

    @property
    def plan(self) -> Plan:
        """The layers."""
        return self.known.plan

    @property
    def is_empty(self) -> bool:
        """Whether the batch holds no sample, or no state lies between the parameters and the loss."""
        return all(not mark.prediction.shape.numel() for mark in self.program.marks)

    def thinned(self, coded: bool, states: bool = True) -> "Recorded":
        """With what code needs of the pass, and nothing of its graph: the rest is as large as a step of backprop.

        Args:
            coded: whether code has been made in a step before; else all that the pass held is kept for it to choose.
            states: whether the states of the pass are kept as well.
        """
        needed, binding = self.known.traced.needed(), self.binding
        values = [value if binding is None else binding[value] for value in needed]
        marked = [mark.state for mark in self.program.marks] if states else []
        kept = (*values, *marked) if coded else self.held
        return self._replace(held={v: self.held[v].detach() for v in kept if v in self.held})

    def not_a_slope(self) -> str | None:
        """What stands between layers and sends back something else than the slope of what it computes, in words."""
        if (hook := changing_hook(self.program)) is not None:
            return hook
        if self.known.other_slope is None:
            self.known.other_slope = function_without_slope(self.program) or ""
        return self.known.other_slope or None

    def runner(self, arithmetic: Arithmetic) -> Run:
        """Runs the program with states in place."""
        return Run(self.program, arithmetic)

    def network(self, setup: Setup, arithmetic: Arithmetic, batch: Any) -> Network:
        """The energy of this pass as a function of its states.

        Args:
            setup: of the learner.
            arithmetic: how passes are run.
            batch: what the samples are counted in, where the user says how.
        """
        fast = self.is_fast(setup)
        run, marks = self.runner(arithmetic), self.program.marks
        if fast and self.loss is not None and all(mark.state in self.held for mark in marks):
            free = [at_least_float32(self.held[mark.state].detach()) for mark in marks]
            start = Start(self.loss, free, self.known.traced.program.rounding, None)
        else:
            start = Start.of(run(at_prediction()))
        size = setup.samples.of(batch)
        if size is None:
            size = self._found_size(setup, [state.shape for state in start.free])
        loss_scale = (size if setup.loss_reduction == "mean" else 1) / setup.samples.scale()
        if setup.algorithm.nudge.per == "element":
            loss_scale *= self.elements_per_sample(setup, size)
        parts = setup.algorithm.energy, self.plan, start, run, size, loss_scale
        if fast:
            network: Network = TracedNetwork(
                *parts,
                program=self.program,
                binding=self.binding,
                traced=self.known.traced,
                compile=setup.code == "compiled",
                arithmetic=arithmetic,
                held=self.held,
            )
        else:
            network = Network(*parts)
        network.known = self.known
        network.conservative = self.program.loss is None or self.not_a_slope() is None
        return network

    def _found_size(self, setup: Setup, states: list[torch.Size]) -> int:
        """B, and once a warning where the batch may as well be read in another way."""
        record = self.program.record
        size, other = batch_size_among(self.shapes or record.shapes, states, self.known.reduced, record.declared)
        why = "both are dimensions of what it holds, and of its layers"
        calls = self.known.calls
        if other is None and calls > 1 and self.known.elements == calls != size:
            other, why = calls, "the module is called as many times, and the loss is a mean over the calls"
        terms = self.known.elements or size
        if other is None and size not in self.known.reduced and 1 < terms < size and size % terms == 0:
            other, why = terms, "the loss is a mean over as many"
        if other is not None and "samples" not in setup.programs.told:
            setup.programs.told.add("samples")
            log.warning(
                "The batch is taken for %s, and could as well be %d: %s. The nudge is multiplied by their"
                " number. Say batch_size=%d, or %d, or a function of the batch. (Said once.)",
                counted(size, "sample"), other, why, size, other,
            )  # fmt: skip
        return size

    def elements_per_sample(self, setup: Setup, size: int) -> float:
        """How many elements of a sample the loss is a mean over.

        Raises:
            ConfigurationError: the record does not tell.
        """
        if self.known.elements is None:
            raise ConfigurationError(
                f"{setup.algorithm.nudge!r}: how many elements of a sample the loss is a mean over cannot be told from"
                " its operations: it divides a sum by hand, adds means over different numbers, or reduces otherwise."
                ' Multiply the strength by that number yourself and leave out per="element", such as'
                " ebm.OneSided(784.0), or write the loss as one .mean()."
            )
        return self.known.elements / (size if setup.loss_reduction == "mean" else 1)

    def is_fast(self, setup: Setup) -> bool:
        """Whether evaluations run as code: where it pays, in steps to come or, as in long relaxations, in this one.

        Inductor takes seconds to make it, which only pays if the program comes again.
        """
        if setup.code is not None and setup.programs.repeats(self.known):
            return True
        algorithm, steps = setup.algorithm, setup.algorithm.relaxer.max_steps
        if not algorithm.rests_at_forward:
            steps += (algorithm.free_relaxer or algorithm.relaxer).max_steps
        return setup.code == "traced" and steps >= _LONG


_LONG = 30
"""Steps of the phases of a batch, at most, for which code is made when its program is seen for the first time."""
