"""One batch: its first pass, its relaxations, and the scalar whose gradient is the update."""

import cmath
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.closure import Closure, checked_loss
from lightning_ebm.delivery import slopes_of
from lightning_ebm.energies.base import is_divergence, rests_at_prediction
from lightning_ebm.errors import ConfigurationError, EBMError, RelaxationDivergedError, UnsupportedModuleError
from lightning_ebm.fast_network import FastNetwork
from lightning_ebm.holding import Holding
from lightning_ebm.linearization import Linearization
from lightning_ebm.network import Network, Start
from lightning_ebm.nudges import Phase
from lightning_ebm.nudges.base import table_of
from lightning_ebm.program.calls import Replace, batch_size_among, in_place, nothing_in_place
from lightning_ebm.program.complex_ops import ComplexOperations
from lightning_ebm.program.interpreter import (
    AtValue,
    Pass,
    Program,
    StateOf,
    at_least_float32,
    at_prediction,
    at_states,
)
from lightning_ebm.program.programs import Found, Known, Programs
from lightning_ebm.program.record import Mark, Value
from lightning_ebm.program.recorder import Recorder, TakesCare
from lightning_ebm.program.reduction import sums_over_batch
from lightning_ebm.program.wiring import Plan, named_gradients, reached_parameters
from lightning_ebm.purity import untouched
from lightning_ebm.relaxers import Cheapest, Relaxation
from lightning_ebm.relaxers.base import force_norm
from lightning_ebm.relaxers.forces import total_energy
from lightning_ebm.report import PhaseReport
from lightning_ebm.samples import FOUND, Samples
from lightning_ebm.state_memory import StateMemory
from lightning_ebm.watching import Recording

log = logging.getLogger(__name__)

Remember = Callable[[list[str], list[PhaseReport], Tensor, str], None]
Code = Literal["traced", "compiled"] | None
Observer = Callable[[Network], Network]


class Step:
    """Open a step, run the pass inside `first_pass`, and hand its loss to `surrogate`.

    Args:
        module: the user's module.
        algorithm: how to relax and what to read off.
        programs: record the module's passes, and know them.
        closure: runs the pass quietly, for energies whose free equilibrium is not the forward pass.
        quiet: silences what only the caller knows how to silence, in such a pass.
        remember: told the names of the states, how the phases went, and the loss.
        loss_reduction: "mean" or "sum".
        leading_sizes: candidates for B, see `batch_size_among`; those of what the module is called with if empty.
        batch: what the module is trained on, for nudges that look at it; what it is called with if None.
        memory: of the states that samples were left in; None starts all from the forward pass.
        teaches: whether the energy may learn from this step, and the memory note it: it is taken, not only looked at.
        recorder: of a pass that has begun already, as under manual optimization.
        samples: how many there are, and what factor the loss carries.
        code: whether evaluations of programs that come again run as code, "traced" or "compiled".
    """

    def __init__(
        self,
        module: nn.Module,
        algorithm: Algorithm,
        programs: Programs,
        closure: Closure,
        quiet: Callable[[], AbstractContextManager[Any]],
        remember: Remember,
        loss_reduction: Literal["mean", "sum"],
        leading_sizes: list[int],
        batch: Any = None,
        memory: StateMemory | None = None,
        teaches: bool = True,
        recorder: Recorder | None = None,
        code: Code = None,
        samples: Samples = FOUND,
    ) -> None:
        self._module = module
        self._batch = batch
        self._memory = memory if algorithm.initial_state == "last-visit" else None
        self._teaches = teaches
        self._algorithm = algorithm
        self._programs = programs
        self._closure = closure
        self._quiet = quiet
        self._remember = remember
        self._loss_reduction = loss_reduction
        self._leading_sizes = leading_sizes
        self._recorder = recorder
        self._owns_recorder = recorder is None
        self._code = code
        self._samples = samples
        self._program: Program | None = None
        self._known: Known | None = None
        self._binding: dict[Value, Value] | None = None
        self._held: Mapping[Value, Tensor] = {}
        self._loss: Tensor | None = None
        self._raw_loss: Tensor | None = None
        self._graph: tuple[Tensor, float] | None = None
        self._free: Relaxation | None = None
        self._is_complex = False
        self._coded = False
        self.network: Network | None = None
        self.phases: list[tuple[complex, complex, Relaxation]] = []
        """Strength, weight and end of each phase of the last relaxation."""
        self.displaced: tuple[list[Tensor], list[Tensor]] | None = None
        """The free state and the displacement from it, where the update is read from those."""
        self.observer: Observer | None = None
        """Put in the network's place before anything relaxes on it, to watch."""

    @property
    def plan(self) -> Plan | None:
        """The layers of this step, once its pass is over; None for the control."""
        return None if self._known is None else self._known.plan

    @property
    def _is_control(self) -> bool:
        return self._algorithm.read_as == "backprop"

    @contextmanager
    def first_pass(self, on_backward: TakesCare | None = None) -> Iterator[None]:
        """The user's own pass, side effects and all, recorded; `on_backward` is told of `backward` calls within.

        For a divergence energy it is the free equilibrium, as it is for others where no layer reads another's state.
        Else a quiet pass is recorded before, and the user's own has the states that it relaxed to in place.
        """
        if self._is_control:
            yield
            return
        self._recorder = Recorder()
        self._recorder.on_backward = on_backward
        replace = self._states_in_place() if self._relaxes_before() else nothing_in_place
        with self._programs.recording(self._recorder, replace), self._derivatives():
            if replace is nothing_in_place:
                yield
            else:
                with _told_of_states_in_place():
                    yield

    def _relaxes_before(self) -> bool:
        """Whether the user's pass must be run at a free equilibrium that is not the forward pass."""
        if is_divergence(self._algorithm.energy):
            return False
        latest = self._programs.latest
        if latest is not None and self._is_free_forward(latest.plan):
            return False
        self.examine()
        assert self._known is not None
        return not self._is_free_forward(self._known.plan) and not self._is_empty

    @property
    def _is_empty(self) -> bool:
        """Whether the batch holds no sample."""
        assert self._program is not None
        return all(not mark.prediction.shape.numel() for mark in self._program.marks)

    def _quietly(self, find: Callable[[Recorder, Any], Found]) -> None:
        """A pass without side effects, and what it was, found out before they are undone."""
        recorder = Recorder(undoes=True)
        try:
            with (
                untouched(self._module, tensors=False),
                self._quiet(),
                torch.enable_grad(),
            ):
                with self._programs.recording(recorder), self._derivatives():
                    returned = self._closure()
                # While its graph can be differentiated: what that saved has not been written to.
                self._take(find(recorder, returned), recorder, returned)
        finally:
            recorder.undo()

    def _states_in_place(self) -> Replace:
        """Relaxes to the free equilibrium; gives the states that are to stand for what the layers return."""
        network, recorder = self._network_of(self._program), self._recorder
        self._relax_freely(network)
        assert recorder is not None
        assert self._free is not None
        assert self._program is not None
        states = {mark.key: x for mark, x in zip(self._program.marks, self._free.point, strict=True)}

        def state_of(mark: Mark, output: Tensor) -> Tensor | None:
            if (state := states.get(mark.key)) is None:
                return None
            with recorder.pausing():  # whose graph goes on to what the layer returned, for whoever follows it
                return AtValue.apply(output, torch.empty_like(output).copy_(state))  # type: ignore[no-any-return,no-untyped-call]

        return state_of

    def examine(self) -> Plan:
        """Finds the layers by a pass without side effects, which `true_gradients` and `again` then are about."""
        self._quietly(lambda recorder, loss: self._programs.of(recorder, checked_loss(loss)))
        assert self._known is not None
        return self._known.plan

    def _take(self, found: Found, recorder: Recorder, loss: Any) -> None:
        self._program, self._known, self._binding = found
        self._held, self._loss = recorder.held, loss.detach() if isinstance(loss, Tensor) else None

    def _is_free_forward(self, plan: Plan) -> bool:
        """Whether the free equilibrium is the forward pass, so that a relaxation that begins there stays there."""
        algorithm = self._algorithm
        alone = rests_at_prediction(algorithm.energy) and not any(row.parents for row in plan.rows)
        return is_divergence(algorithm.energy) or (alone and algorithm.initial_state == "forward")

    def returned(self, loss: Any) -> None:
        """Notes the loss as the user's code returned it, where `surrogate` is given a multiple of it."""
        self._raw_loss = loss

    def _relax_freely(self, network: Network) -> None:
        start = None
        if self._memory is not None:
            names = self._memory.names(self._batch, network.batch_size)
            start = self._memory.recall(names, network.free)
        self._free = free_equilibrium(network, self._algorithm, start)
        if isinstance(inner := getattr(network, "unwatched", network), FastNetwork):
            inner.departs()
        if self._memory is not None and self._teaches:
            self._memory.keep(names, self._free.point)

    def _rest(self, network: Network) -> None:
        """Notes that the forward pass is the free equilibrium; of a divergence there is nothing to say."""
        if not is_divergence(self._algorithm.energy):
            _announce(network, 0.0)
            with torch.no_grad():
                energy = network.energy_of(network.free, 0.0)
            self._free = Relaxation(
                list(network.free), "states", "converged", 0, energy.new_zeros(network.batch_size), [energy]
            )

    def surrogate(self, loss: Tensor, scale: float = 1.0) -> Tensor:
        """A scalar with the value of `loss` whose gradient with respect to the parameters is the update.

        Args:
            loss: what the first pass returned, in its own graph.
            scale: factor on the loss that is not the user's own, such as 1/N under gradient accumulation by N; the
                relaxation does not see it, the update carries it.
        """
        loss = checked_loss(loss)
        if self._is_control:
            self._remember([], [], loss.detach() / scale, "plain")
            return self.unrelaxed(loss, scale)
        network = self._opened(loss)
        del loss
        if self._is_empty:  # no sample, no state: what is left of the loss depends on parameters alone
            self._remember(list(network.names), [], network.first_loss, "plain")
            assert self._program is not None
            return self._program.uncut() * scale
        update = self._relaxed(network, network.first_loss) * (scale / network.loss_scale)
        self._check_coverage(update, network)
        # The value is the loss, for hooks and loggers that look at it; the gradient is the update's.
        surrogate: Tensor = network.first_loss * scale + (update - update.detach())
        return surrogate

    def increments(self, loss: Tensor, scale: float = 1.0) -> Iterator[Tensor]:
        """The surrogate before each single step of the relaxer: states and parameters move at once, from one gradient.

        Args:
            loss: as for `surrogate`.
            scale: as for `surrogate`.
        """
        network = self._opened(checked_loss(loss))
        relaxer = self._algorithm.relaxer
        nudged = next(phase for phase in table_of(self._algorithm.nudge) if phase.is_nudged)
        strength, weight = nudged.strength.real, nudged.weight
        point, move = list(network.free), relaxer.stepper(network.free)
        energies, norms = [], []
        for taken in range(self._algorithm.increments):
            with torch.no_grad():
                forces = network.forces(point, strength)
                following = network.feasible(move(point, forces.gradients))
            energies.append(total_energy(forces, strength))
            norms.append(force_norm(network, forces.gradients))
            if not bool(torch.isfinite(norms[-1]).all()) or bool(norms[-1].norm() > 1e3 * norms[0].norm()):
                raise RelaxationDivergedError(
                    f"{relaxer!r} ran away at step {taken + 1} of an incremental update: the force grew to"
                    f" {float(norms[-1].norm() / norms[0].norm()):.3g} times its start. States and weights move at once"
                    " here; take a smaller step for either."
                )
            residual = norms[-1] / norms[0].clamp_min(torch.finfo(norms[0].dtype).tiny)
            found = Relaxation(point, "states", "fixed", taken, residual, energies)
            update = weight.real * network.energy_at(found, strength) * (scale / network.loss_scale)
            self._remember(list(network.names), [PhaseReport.of(strength, found)], network.first_loss, way_of(network))
            self._check_coverage(update, network)
            yield loss.detach() + (update - update.detach())
            network.parameters_moved()
            point = following

    def _opened(self, loss: Tensor) -> Network:
        """The network of this step, relaxed to its free equilibrium."""
        if not cmath.isfinite(loss.item()):
            raise RelaxationDivergedError(
                f"The loss of the forward pass is {float(loss.detach())}: there is nothing finite to relax towards."
                " The weights or the batch hold nan or inf already; look for it with Trainer(detect_anomaly=True) under"
                " stock training, lower the learning rate of the parameters, or clip."
            )
        assert self._recorder is not None
        loss = loss if self._raw_loss is None else self._raw_loss
        if self.network is not None and self._free is not None:  # its states are in place in the user's pass
            return self._at_equilibrium(self.network, self._free, loss)
        found = self._programs.of(self._recorder, loss, partial=not self._owns_recorder)
        self._take(found, self._recorder, loss)
        return self._settled(self._program)

    def _settled(self, program: Program | None) -> Network:
        network = self._network_of(program)
        assert self._known is not None
        if self._is_empty:
            return network
        if self._is_free_forward(self._known.plan):
            self._rest(network)
        else:
            self._relax_freely(network)
        return network

    def _at_equilibrium(self, network: Network, free: Relaxation, loss: Tensor) -> Network:
        """The network, given the user's pass with states in place: it must be the program that was relaxed."""
        assert self._recorder is not None
        assert self._known is not None
        value, record = self._recorder.value(loss), self._recorder.settle()
        found = self._known.outline.repeated_by(record, value)
        before, binding = self._program, self._binding
        if not isinstance(found, str):
            self._program = Program(record, found[0], value)
            if not _fix_the_same(before, binding, self._program, found[1]):
                found = "what they were given"
        if isinstance(found, str):
            raise UnsupportedModuleError(
                "For this energy the step runs twice: quietly, to find the free equilibrium, and then with its states"
                f" in place. The two runs differ in {found}: the step depends on values of its layers, or on something"
                " outside of the module that each run changes, so that the states are of another network. Let the flow"
                " depend on the batch alone, or take a divergence energy such as ebm.PredictiveCoding()."
            )
        assert self._program is not None
        self._binding = found[1]
        inner = getattr(network, "unwatched", network)
        if isinstance(inner, FastNetwork):
            self._held = self._recorder.held
            self._held = self._thinned(())
            self._let_go_of_pass()
            inner.run_again(self._program, found[1], self._held, self._run)
            inner.first_loss = loss.detach()
            return network
        states = at_states(dict(zip([mark.key for mark in found[0]], free.point, strict=True)))
        with torch.enable_grad():
            network.adopt(free.point, self._program.run(states), self._run)
        return network

    def _network_of(self, program: Program | None) -> Network:
        """The network of a program."""
        assert program is not None
        assert self._known is not None
        record, start = program.record, None
        fast = self._code is not None and self._programs.repeats(self._known)
        self._coded = fast and bool(self._known.traced.codes)
        held = self._held = self._thinned([mark.state for mark in program.marks]) if fast else {}
        self._let_go_of_pass()
        if fast and self._loss is not None and all(mark.state in held for mark in program.marks):
            free = [at_least_float32(held[mark.state].detach()) for mark in program.marks]
            start = Start(self._loss, free, max(mark.rounding for mark in program.marks), None)
        else:
            start = Start.of(self._run(at_prediction()))
        if self._batch is None:
            self._batch = record.arguments
        size = self._samples.of(self._batch)
        if size is None:
            shapes = [state.shape for state in start.free]
            size = batch_size_among(self._leading_sizes or record.leading_sizes, shapes, self._known.reduced)
        loss_scale = (size if self._loss_reduction == "mean" else 1) / self._samples.scale()
        parts = self._algorithm.energy, self._known.plan, start, self._run, size, loss_scale
        network = Network(*parts)
        if fast:
            network = FastNetwork(
                *parts,
                program=program,
                binding=self._binding,
                traced=self._known.traced,
                compile=self._code == "compiled",
                arithmetic=self._arithmetic,
                held=held,
            )
        self.network = network if self.observer is None else self.observer(network)
        return self.network

    def _thinned(self, besides: Collection[Value]) -> Mapping[Value, Tensor]:
        """What code needs of the user's pass, and nothing of its graph; all it held where code is still to be made.

        The rest is as large as a step of backprop.
        """
        assert self._known is not None
        if not self._coded:
            return {value: tensor.detach() for value, tensor in self._held.items()}
        needed, binding = self._known.traced.needed(), self._binding
        values = [value if binding is None else binding[value] for value in needed]
        return {value: self._held[value].detach() for value in (*values, *besides) if value in self._held}

    def _let_go_of_pass(self) -> None:
        """The user's pass is over, and what is needed of it has been taken."""
        if self._recorder is not None and self._owns_recorder:
            self._recorder.release()

    def _run(self, state_of: StateOf) -> Pass:
        """The program of this step, with states in place."""
        assert self._program is not None
        with torch.enable_grad(), self._arithmetic():
            return self._program.run(state_of)

    def _say_if_summed(self, size: int) -> None:
        assert self._program is not None
        if sums_over_batch(self._program, size):
            log.warning(
                'The loss sums over the %d samples of the batch, while loss_reduction="mean": the nudge is then %d'
                ' times as strong as the algorithm says, and so is its bias. Say loss_reduction="sum", or take the'
                " mean. (Said once for every program of the module.)",
                size,
                size,
            )

    def unrelaxed(self, loss: Tensor, scale: float = 1.0) -> Tensor:
        """The loss in its own graph, for a step without relaxation: the control's, or one that is thrown away."""
        self._graph = loss, scale
        return loss

    def true_gradients(self) -> dict[str, Tensor]:
        """Backprop's gradient of this very step: same batch, same random draws, same buffers. No side effects."""
        if self._graph is not None:
            loss, scale = self._graph
            found = named_gradients(self._module, loss, retain_graph=True)
            return {name: gradient / scale for name, gradient in found.items()}
        assert self._program is not None
        with torch.enable_grad():
            return named_gradients(self._module, self._program.uncut())

    def again(self, algorithm: Algorithm, observer: Observer | None = None) -> tuple[dict[str, Tensor], "Step"]:
        """What another algorithm would make of this very step: its update, and the step, not yet released.

        Same batch, same random draws, same buffers, same layers; no side effects, and no report.

        Raises:
            ConfigurationError: this step, or the other, is the control, which has no layers to relax.
        """
        if self._known is None or algorithm.read_as == "backprop":
            raise ConfigurationError(
                'The algorithm "backprop" relaxes nothing, so there is no other way to take this step.'
            )
        other = Step(
            self._module, algorithm, self._programs, self._closure, self._quiet, _forget, self._loss_reduction,
            self._leading_sizes, self._batch, samples=self._samples,
        )  # fmt: skip
        other._program, other._known, other._binding = self._program, self._known, self._binding
        other.observer = observer
        network = other._settled(other._program)
        update = other._relaxed(network, network.first_loss) / network.loss_scale
        return named_gradients(self._module, update), other

    @contextmanager
    def at_free_equilibrium(self) -> Iterator[None]:
        """Within it the module computes with its states at the free equilibrium, and nothing is recorded."""
        self._quietly(lambda recorder, _: self._programs.without_loss(recorder))
        assert self._program is not None
        assert self._known is not None
        if self._is_free_forward(self._known.plan) or self._is_empty:
            yield
            return
        self._relax_freely(self._network_of(self._program))
        assert self._free is not None
        keys = [mark.key for mark in self._program.marks]
        with in_place(self._module, dict(zip(keys, self._free.point, strict=True))):
            yield

    def release(self) -> None:
        """Lets go of the graphs; `true_gradients` still works."""
        self._free = self.network = self._raw_loss = self._loss = self._graph = None
        self._held = {}
        self._let_go_of_pass()
        self.phases = []

    def _relaxed(self, network: Network, loss: Tensor) -> Tensor:
        """sum_p weight_p E(x_p, theta), states held fixed; or what the algorithm reads instead."""
        algorithm = self._algorithm
        phases = []
        self.phases = []
        free = self._free
        if free is not None:
            phases.append(PhaseReport.of(0.0, free))
        table = () if algorithm.nudge.linear_response else table_of(algorithm.nudge)
        self._is_complex = any(isinstance(phase.strength, complex) for phase in table)
        if algorithm.read_as == "dyadic":  # both ends of the table at once
            span = max(p.strength.real for p in table) - min(p.strength.real for p in table)
            table = (Phase(span, 1 / span),)
        together = self._together(network, table)
        held = any(phase.held for phase in table)
        departs = is_divergence(algorithm.energy) and algorithm.read_as in ("contrast", "dyadic") and not held
        taken = None
        last = next((phase for phase in reversed(table) if phase.is_nudged), None)
        for phase in table:
            strength, weight = phase.strength, phase.weight
            if phase in together:
                found = together[phase]
                phases.append(PhaseReport.of(strength, found))
            elif phase.is_nudged:
                _announce(network, strength, phase.held)
                if departs and phase is last and isinstance(network, FastNetwork):
                    network.returns, self._held = False, {}
                with torch.no_grad():
                    found = self._nudged(network, phase)
                phases.append(PhaseReport.of(strength, found))
            elif free is None:
                continue  # dI/dtheta is exactly 0 at the forward pass of a divergence energy
            else:
                found = free
            if taken is None and phase.is_nudged and not isinstance(strength, complex):
                taken = found
            self.phases.append((0.0 if phase.held else strength, weight, found))
        self._remember(list(network.names), phases, loss, way_of(network))
        if algorithm.read_as == "cross-derivative":
            return self._cross_derivative(network, self._start(network))
        update = network.contrast(self.phases)
        if any(phase.held for phase in table):
            update = update + self._direct(network, table)
        if self._teaches and taken is not None and taken.dyad is None:
            algorithm.energy.observe(lambda: dict(zip(network.names, network.errors_at(taken), strict=True)))
        return update

    def _together(self, network: Network, table: Sequence[Phase]) -> dict[Phase, Relaxation]:
        """The phases, in real numbers, that one choice is made for."""
        relaxer = self._algorithm.relaxer
        phases = [p for p in table if p.strength and not p.held and not isinstance(p.strength, complex)]
        if len(phases) < 2 or not isinstance(relaxer, Cheapest):
            return {}
        strengths = [phase.strength for phase in phases]
        if isinstance(network, Recording):
            network.begin_together(strengths)
        with torch.no_grad():
            found = relaxer.relax_all(network, self._start(network), strengths)
        return dict(zip(phases, found, strict=True))

    def _start(self, network: Network) -> Sequence[Tensor]:
        """The free equilibrium."""
        return network.free if self._free is None else self._free.point

    def _nudged(self, network: Network, phase: Phase) -> Relaxation:
        relaxer = self._algorithm.relaxer
        if not phase.held:  # not held here: the network may let go of it on the way
            return relaxer.relax(network, self._start(network), phase.strength)  # type: ignore[arg-type]
        start = self._start(network)
        slopes = network.loss_slopes(start)
        point = list(start)
        for k in network.outputs:
            point[k] = self._held_output(start[k], slopes[k], phase.strength.real)
        return relaxer.relax(Holding(network, network.outputs), point, 0.0)  # type: ignore[arg-type]  # by delegation

    def _held_output(self, free: Tensor, slope: Tensor, strength: float) -> Tensor:
        nudge = self._algorithm.nudge
        held = nudge.held_output(free, slope, strength, self._batch)
        if not isinstance(held, Tensor) or held.shape != free.shape:
            got = tuple(held.shape) if isinstance(held, Tensor) else type(held).__name__
            raise ConfigurationError(
                f"{type(nudge).__name__}: the output was to be held at {got}; expected a tensor of shape"
                f" {tuple(free.shape)}, that of the output, from held_output(...) or from Clamped(target=...)."
            )
        return held.detach().to(free)

    def _direct(self, network: Network, table: Sequence[Phase]) -> Tensor:
        """A scalar with the gradient of what the loss says of parameters directly, such as a penalty on weights.

        Where the output is held the loss is no part of E, and no contrast of phases would carry that.
        """
        assert self._known is not None
        share = sum(phase.weight.real * phase.strength.real for phase in table if phase.held)
        if not self._known.plan.loss_parameters or not share:
            return torch.zeros_like(network.first_loss)
        seen = network.at_states(self._start(network))
        weight = share * network.loss_scale * torch.ones_like(seen.loss)
        return slopes_of([(seen.loss, weight)], seen.states)

    def _cross_derivative(self, network: Network, start: Sequence[Tensor]) -> Tensor:
        """dL/dtheta + <d2I/dtheta dx, dx>, dx the (weighted) displacement of the states from the free equilibrium."""
        near = Linearization(network, start)
        if self._algorithm.nudge.linear_response:
            moved = near.response()
        else:
            moved = [torch.zeros_like(x) for x in start]
            for strength, weight, found in self.phases:
                if strength:
                    ends = zip(moved, network.held(found).point, start, strict=True)
                    moved = [m + _real(weight * (x - x0)) for m, x, x0 in ends]
        self.displaced = list(start), moved
        return near.loss() + near.cross_derivative(moved)

    def _arithmetic(self) -> AbstractContextManager[Any]:
        """What passes need beyond the user's code: complex numbers, or second derivatives."""
        stack = ExitStack()
        stack.enter_context(self._derivatives())
        if self._is_complex:
            stack.enter_context(ComplexOperations())
        return stack

    def _derivatives(self) -> AbstractContextManager[Any]:
        """Attention in single operations where slopes are differentiated again: fused kernels have no second ones."""
        return sdpa_kernel(SDPBackend.MATH) if self._algorithm.read_as == "cross-derivative" else nullcontext()

    def _check_coverage(self, update: Tensor, network: Network) -> None:
        """Once for every set of layers: each parameter that backprop would reach must be reached by the energy."""
        known = self._known
        assert known is not None
        if known.covered:
            return
        if self._loss_reduction == "mean" and network.batch_size > 1 and self._program is not None:
            self._say_if_summed(network.batch_size)
        missing = known.plan.reached - reached_parameters(self._module, update)
        if missing:
            raise ConfigurationError(
                f"Backprop would train {', '.join(sorted(missing))}, and no term of the energy"
                f" {self._algorithm.energy!r} depends on them: they would silently stay as they are. An energy must"
                " depend on the drive or the prediction of every layer; change the energy, leave the layer out of"
                " layers=[...], or set requires_grad=False on what is meant to stay."
            )
        known.covered = True


def free_equilibrium(network: Network, algorithm: Algorithm, start: Sequence[Tensor] | None = None) -> Relaxation:
    """argmin_x I, as far as the algorithm's relaxer goes; from the algorithm's initial state if `start` is None."""
    _announce(network, 0.0)
    if start is None:
        start = [torch.zeros_like(x) for x in network.free] if algorithm.initial_state == "zeros" else network.free
    with torch.no_grad():
        return (algorithm.free_relaxer or algorithm.relaxer).relax(network, network.feasible(list(start)), 0.0)


def _fix_the_same(
    before: Program | None, old: dict[Value, Value] | None, now: Program, new: dict[Value, Value] | None
) -> bool:
    """Whether two passes of one known program were given the same numbers, which parameters need not be compared for.

    Args:
        before: the first pass.
        old: its values by those of the pass that was examined; None where it is that pass.
        now: the second pass.
        new: its values by those of the pass that was examined; None where they are the same.
    """
    assert before is not None
    examined = {mine: known for known, mine in old.items()} if old is not None else None
    for value in before.given():
        known = value if examined is None else examined[value]
        other = known if new is None else new.get(known)
        if value in before.record.leaves or other is None:
            continue
        one, another = before.content(value), now.content(other)
        if one.data_ptr() != another.data_ptr() and not torch.equal(one, another):
            return bool(one.is_floating_point() and one.isnan().any())
    return True


@contextmanager
def _told_of_states_in_place() -> Iterator[None]:
    """Says what is special about a run that fails where the quiet one before did not."""
    try:
        yield
    except EBMError:
        raise
    except Exception as error:
        raise UnsupportedModuleError(
            "For this energy the step runs twice: quietly, to find the free equilibrium, and then with its states in"
            f" place. The second run raised {type(error).__name__}: {error} A derivative that the step takes through"
            " its layers does not exist there, as states are values of their own. Take a divergence energy such as"
            " ebm.PredictiveCoding(), under which the step runs once and uncut."
        ) from error


def _announce(network: object, strength: complex, held: bool = False) -> None:
    """Tells whoever records that a phase begins."""
    if isinstance(network, Recording):
        network.begin(strength, held)


def way_of(network: Network) -> str:
    """Which way a network's evaluations have run: "plain", "traced" or "compiled"."""
    inner = getattr(network, "unwatched", network)
    return inner.way if isinstance(inner, FastNetwork) else "plain"


def _forget(names: list[str], phases: list[PhaseReport], loss: Tensor, way: str) -> None:
    """A step of which no report is kept."""


def _real(tensor: Tensor) -> Tensor:
    return tensor.real if tensor.is_complex() else tensor
