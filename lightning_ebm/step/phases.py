"""The relaxations of one step: its free phase, and one for each row of the nudge's table."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.energies.base import is_divergence
from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.evaluations import Energy, Landscape
from lightning_ebm.network.clamp import refuse_unknown, resolved
from lightning_ebm.network.clamped_states import ClampedStates, Hold
from lightning_ebm.network.network import Network
from lightning_ebm.nudges import Phase
from lightning_ebm.promises import is_kept
from lightning_ebm.relaxers import Relaxation, Relaxer
from lightning_ebm.relaxers.base import Status
from lightning_ebm.step.handed_over import Relaxing, unwritten
from lightning_ebm.step.report import PhaseReport, cut_off
from lightning_ebm.step.setup import Setup
from lightning_ebm.updates import End

_LEFT = 0.75
"""Of the first force: on ReLU convolutions a network learns as by backprop where it is left, not where a half is."""


class Phases:
    """Relaxes one network as the algorithm says.

    Args:
        setup: of the learner.
        network: of the step.
        batch: what the module is trained on, for nudges that look at it.

    Attributes:
        landscape: the network, or whoever watches it: what relaxers ask.
        free: the end of the free phase; None where the forward pass of a divergence energy is it.
        ends: of the phases of the table.
    """

    def __init__(self, setup: Setup, network: Network, batch: Any) -> None:
        self._algorithm = setup.algorithm
        self._memory = setup.memory if setup.algorithm.initial_state == "last-visit" else None
        self._unsettled = setup.unsettled
        self._batch = batch
        self.network = network
        self._relaxing = Relaxing(network)
        self.landscape: Landscape = network
        self.clamped: ClampedStates | None = None
        refuse_unknown("free", setup.free, network)
        if setup.clamp is not None:
            self.landscape = self.clamped = ClampedStates(network, resolved(setup.clamp, network))
        if setup.observer is not None:
            self.landscape = setup.observer(self.landscape)
        self.free: Relaxation | None = None
        self.ends: list[End] = []

    def relax_freely(self, teaches: bool, answered: bool = True) -> Relaxation:
        """Finds the free equilibrium, from where the algorithm says.

        Args:
            teaches: whether the memory of states is to note it.
            answered: whether it must be known to be one; else `relax` comes next, and reads what waits.
        """
        start: Sequence[Tensor] = self._held(self.network.free)
        if self._memory is not None:
            names = self._memory.names(self._batch, self.network.batch_size)
            start = self._memory.recall(names, start)
        relaxer = self._algorithm.free_relaxer or self._algorithm.relaxer
        self.landscape.begin([0.0])
        if self._algorithm.initial_state == "zeros":
            start = [torch.zeros_like(x) for x in start]
        start = self.landscape.feasible(list(start))
        self.free = self._in_states(self._relaxing.one(relaxer, self.landscape, 0.0, start))
        self._look_at(self.free, relaxer, 0.0)
        self.network.rest_at(self.free.point)
        if answered or self._memory is not None:
            self.network.questions.answered()
        if self._memory is not None and teaches:
            self._memory.keep(names, self.free.point)
        return self.free

    def rest(self) -> None:
        """Notes that the forward pass is the free equilibrium; of a divergence there is nothing to say."""
        if is_divergence(self._algorithm.energy):
            return
        free = list(self.network.free)
        self.landscape.begin([0.0])
        with torch.no_grad():
            energy = self.landscape.evaluate(Energy(), free, 0.0)
        residual = energy.new_zeros(self.network.batch_size)
        self.free = Relaxation(free, "states", "converged", 0, residual, [energy])

    def adapt(self) -> None:
        """Lets the nudge look at this batch before its table is asked for."""

        def trial(phase: Phase) -> str:
            try:
                found = self._relaxing.one(self._algorithm.relaxer, self.landscape.unwatched, phase.strength)
                self.network.questions.answered()
            except RelaxationDivergedError:
                return "diverged"
            return self._ended([End(phase, found)])[0]

        def looked_at(phase: Phase) -> str:
            self.network.questions.answered()  # a batch that is spoiled says nothing of the nudge
            return trial(phase)

        self._algorithm.nudge.adapt(looked_at)

    def equilibrium(self, strength: float) -> Relaxation:
        """The states of I + strength L, and nothing read off them."""
        free = None
        if not strength or not is_divergence(self._algorithm.energy):
            free = self.relax_freely(teaches=False)
        if not strength:
            assert free is not None
            return free
        start = self._held(self.network.free) if free is None else free.point
        self.landscape.begin([strength])
        found = self._relaxing.one(self._algorithm.relaxer, self.landscape, strength, start)
        with torch.no_grad():
            self.network.questions.answered()
            return self._in_states(found)

    def _held(self, states: Sequence[Tensor]) -> Sequence[Tensor]:
        return states if self.clamped is None else self.clamped.put(states)

    def _in_states(self, found: Relaxation) -> Relaxation:
        if found.coordinates == "errors" or self.clamped is not None:  # then what is given back is another one
            self.network.questions.answered()
        return self.network.held(found) if self.clamped is None else self.clamped.in_states(found)

    def relax(self, table: Sequence[Phase], departing: Callable[[], None]) -> None:
        """Relaxes each phase of the table.

        Args:
            table: the phases.
            departing: told when nobody asks for states of the forward pass any more.
        """
        rule = self._algorithm.rule
        returns = rule.needs_forward_pass or any(phase.held for phase in table)
        departs = is_divergence(self._algorithm.energy) and not returns and self.landscape is self.network
        together = self._together(table)
        last = next((phase for phase in reversed(table) if phase.is_nudged), None)
        self.ends = []
        for phase in table:
            if not phase.is_nudged:
                if self.free is not None:  # else dI/dtheta is exactly 0: the forward pass of a divergence energy
                    self.ends.append(End(phase, self.free))
                continue
            if phase not in together:
                if departs and phase is last:
                    self.network.begin_last_phase()
                    departing()
                self.landscape.begin([phase.strength], phase.held)
                with torch.no_grad():
                    together[phase] = self._nudged(phase)
            self.ends.append(End(phase, together[phase]))
        if self._algorithm.nudge.adapts:
            self._algorithm.nudge.note(self._ended([end for end in self.ends if end.phase.is_nudged]))
        else:
            self.network.questions.answered()

    def _ended(self, ends: Sequence[End]) -> list[str]:
        """How phases ended: their statuses, or "absorbed" where a positive nudge pulls with less than 3/4 of its force.

        In states, whose energy begins at lambda L, that is taken from how much of it is left. "level" stands for
        "max_steps" where hardly any energy is left to gain.
        """
        numbers: list[Tensor] = []
        for end in ends:
            found, left = end.found, end.found.pull_left
            if end.phase.is_complex or end.phase.strength.real < 0:
                left = None
            elif left is None and len(found.energies) > 1 and is_divergence(self._algorithm.energy):
                start, last = found.energies[0], found.energies[-1]
                left = torch.where(start > 0, last / start, 1.0)
            left = torch.ones_like(found.residual[0]) if left is None else left
            numbers += [left, torch.full_like(left, torch.inf) if found.gain_left is None else found.gain_left]
        told: list[float] = []
        self.network.questions.later(torch.stack([n.to(numbers[0]) for n in numbers]), told.extend)
        self.network.questions.answered()
        return [
            _in_a_word(end.found.status, left, to_gain)
            for end, left, to_gain in zip(ends, told[::2], told[1::2], strict=True)
        ]

    def reports(self) -> list[PhaseReport]:
        """How they went, the free phase first."""
        free = [] if self.free is None else [PhaseReport.of(0.0, self.free)]
        return free + [PhaseReport.of(end.phase.strength, end.found) for end in self.ends if end.phase.is_nudged]

    @property
    def first_nudged(self) -> Relaxation | None:
        """The end of the first phase in which real states were moved."""
        real = (e.found for e in self.ends if e.phase.is_nudged and not e.phase.is_complex)
        return next(real, None)

    def _together(self, table: Sequence[Phase]) -> dict[Phase, Relaxation]:
        """The phases, in real numbers, that one choice of a relaxer is made for."""
        phases = [p for p in table if p.strength and not p.held and not p.is_complex]
        relaxer = self._algorithm.relaxer
        if len(phases) < 2 or not relaxer.decides_together or not is_kept(relaxer, "relax_all", "relax"):
            return {}
        strengths = [phase.strength for phase in phases]
        self.landscape.begin(strengths)
        found = self._relaxing.all(relaxer, self.landscape, strengths)
        if self.clamped is not None:
            found = [self.clamped.in_states(one) for one in found]
        return dict(zip(phases, found, strict=True))

    def _nudged(self, phase: Phase) -> Relaxation:
        relaxer = self._algorithm.relaxer
        if not phase.held:  # the start is not held here: the network may let go of it on the way
            found = self._relaxing.one(relaxer, self.landscape, phase.strength)
            if self.landscape is not self.network and found.local_error is not None:
                tuple(found.local_error)  # whoever watches is shown them at once
            if not phase.is_complex:
                self._look_at(found, relaxer, phase.strength.real)
            if self.clamped is None:
                return found
            self.network.questions.answered()
            return self.clamped.in_states(found)
        start = self.network.equilibrium
        slopes, point = self.network.loss_slopes(start), list(start)
        for k in self.network.outputs:
            point[k] = self._held_output(start[k], slopes[k], phase.strength.real)
        holds = {k: Hold(point[k]) for k in self.network.outputs}
        return self._relaxing.one(relaxer, ClampedStates(self.landscape, holds), 0.0, point)

    def _look_at(self, found: Relaxation, relaxer: Relaxer, strength: float) -> None:
        """Whether sweeps that were cut off have an equilibrium to come to; a divergence energy always has one."""
        if is_divergence(self._algorithm.energy) and strength >= 0:
            return
        known = self.network.known
        operations = () if known is None else known.operations
        with torch.no_grad():
            self._unsettled.look(self.landscape.unwatched, relaxer, found, strength, operations)

    def _held_output(self, free: Tensor, slope: Tensor, strength: float) -> Tensor:
        nudge = self._algorithm.nudge
        with unwritten(nudge, "held_output", [free, slope]):
            held = nudge.held_output(free, slope, strength, self._batch)
        if not isinstance(held, Tensor) or held.shape != free.shape:
            got = tuple(held.shape) if isinstance(held, Tensor) else type(held).__name__
            raise ConfigurationError(
                f"{type(nudge).__name__}: the output was to be held at {got}; expected a tensor of shape"
                f" {tuple(free.shape)}, that of the output, from held_output(...) or from Clamped(target=...)."
            )
        return held.detach().to(free)


def _in_a_word(status: Status, left: float, to_gain: float) -> str:
    if left < _LEFT:
        return "absorbed"
    return "level" if status == "max_steps" and not cut_off(status, to_gain) else status
