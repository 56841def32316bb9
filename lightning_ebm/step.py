"""One batch: its first pass, its relaxations, and the scalar whose gradient is the update."""

import cmath
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.capture.captures import Captures
from lightning_ebm.capture.products import QUICK_PRODUCTS
from lightning_ebm.capture.remember import Remembered
from lightning_ebm.capture.replay import CapturedNetwork
from lightning_ebm.capture.tape import Tape
from lightning_ebm.closure import Closure, checked_loss
from lightning_ebm.delivery import slopes_of
from lightning_ebm.energies.base import is_divergence, rests_at_prediction
from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.holding import Holding
from lightning_ebm.layers import LayerFinder
from lightning_ebm.linearization import Linearization
from lightning_ebm.network import Network
from lightning_ebm.nudges import Phase
from lightning_ebm.nudges.base import table_of
from lightning_ebm.promotion import Promoted
from lightning_ebm.purity import Snapshot
from lightning_ebm.reduction import sums_over_batch
from lightning_ebm.relaxers import Cheapest, Relaxation
from lightning_ebm.relaxers.base import force_norm
from lightning_ebm.relaxers.forces import total_energy
from lightning_ebm.relaxers.sweeping import SweepingRelaxer
from lightning_ebm.report import PhaseReport
from lightning_ebm.state_memory import StateMemory
from lightning_ebm.substitution import Pass, StateOf, at_prediction, at_states, batch_size_among, substituted
from lightning_ebm.watching import Recording
from lightning_ebm.wiring import Plan, named_gradients, reached_parameters

log = logging.getLogger(__name__)

Remember = Callable[[list[str], list[PhaseReport], Tensor], None]
Observer = Callable[[Network], Network]


class Step:
    """Open a step, run the pass inside `first_pass`, and hand its loss to `surrogate`.

    Args:
        module: the user's module.
        algorithm: how to relax and what to read off.
        finder: knows the layers; it must have looked at this closure before.
        closure: reruns the pass and returns its loss.
        quiet: silences what only the caller knows how to silence, in all passes but the first.
        remember: told the names of the states, how the phases went, and the loss.
        loss_reduction: "mean" or "sum".
        leading_sizes: candidates for B, see `batch_size_among`; those of what the module is called with if empty.
        snapshot: what the pass starts from, if it has begun already; None is now.
        batch: what the module is trained on, for nudges that look at it; what it is called with if None.
        memory: of the states that samples were left in; None starts all from the forward pass.
        teaches: whether the energy may learn from this step, and the memory note it: it is taken, not only looked at.
        captures: the steps captured so far; None runs every pass in plain Python.
    """

    def __init__(
        self,
        module: nn.Module,
        algorithm: Algorithm,
        finder: LayerFinder,
        closure: Closure,
        quiet: Callable[[], AbstractContextManager[Any]],
        remember: Remember,
        loss_reduction: Literal["mean", "sum"],
        leading_sizes: list[int],
        snapshot: Snapshot | None = None,
        batch: Any = None,
        captures: Captures | None = None,
        memory: StateMemory | None = None,
        teaches: bool = True,
    ) -> None:
        self._module = module
        self._batch = batch
        self._memory = memory if algorithm.initial_state == "last-visit" else None
        self._teaches = teaches
        self._algorithm = algorithm
        self._finder = finder
        self._closure = closure
        self._quiet = quiet
        self._remember = remember
        self._loss_reduction = loss_reduction
        self._leading_sizes = leading_sizes
        self._plan: Plan | None = None if algorithm.read_as == "backprop" else finder.plan
        self._snapshot = snapshot or Snapshot(module, frozenset() if self._plan is None else self._plan.written)
        self._captures = captures if captures is not None and captures.wanted(algorithm) else None
        self._tape = Tape(QUICK_PRODUCTS)
        self._raw_loss: Tensor | None = None
        self._first: Pass | None = None
        self._free: Relaxation | None = None
        self._is_complex = False
        self.network: Network | None = None
        self.phases: list[tuple[complex, complex, Relaxation]] = []
        """Strength, weight and end of each phase of the last relaxation."""
        self.displaced: tuple[list[Tensor], list[Tensor]] | None = None
        """The free state and the displacement from it, where the update is read from those."""
        self.observer: Observer | None = None
        """Put in the network's place before anything relaxes on it, to watch."""

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """The user's own pass, side effects and all, with every state at its free equilibrium.

        For a divergence energy that is each prediction, at no cost, as it is for others where no layer reads another's
        state; else quiet passes relax to it before.
        """
        if self._plan is None:  # the control: nothing is substituted, but the pass can be replayed for comparison
            with self._snapshot.recording():
                yield
            return
        if self._is_free_forward(self._plan):
            state_of, taped = self._cut(at_prediction(frozenset(self._plan.states))), self._taped()
        else:  # the network, and the tape, are those of the quiet pass at the predictions
            self._settle()
            assert self._free is not None
            state_of = at_states(dict(zip(self._plan.states, self._free.point, strict=True)))
            taped = nullcontext() if self._captures is None else Remembered(self._tape)
        with self._snapshot.recording(), self._substituted(self._plan, state_of) as first, taped, self._derivatives():
            yield
        self._first = first

    def _is_free_forward(self, plan: Plan) -> bool:
        """Whether the free equilibrium is the forward pass, so that a relaxation that begins there stays there."""
        algorithm = self._algorithm
        alone = rests_at_prediction(algorithm.energy) and not any(row.parents for row in plan.rows)
        return is_divergence(algorithm.energy) or (alone and algorithm.initial_state == "forward")

    def returned(self, loss: Any) -> None:
        """Notes the loss as the user's code returned it, where `surrogate` is given a multiple of it."""
        self._raw_loss = loss

    def _settle(self) -> Network:
        """The network, relaxed to the free equilibrium of the energy."""
        assert self._plan is not None
        self.network = self._network_from(self._first_again(self._plan))
        if self._is_free_forward(self._plan):
            return self._resting(self.network)
        start = None
        if self._memory is not None:
            names = self._memory.names(self._batch, self.network.batch_size)
            start = self._memory.recall(names, self.network.free)
        self._free = free_equilibrium(self.network, self._algorithm, start)
        if self._memory is not None and self._teaches:
            self._memory.keep(names, self._free.point)
        return self.network

    def _resting(self, network: Network) -> Network:
        """The network, whose free equilibrium is the pass it was made from; a divergence has nothing to say of it."""
        if not is_divergence(self._algorithm.energy):
            _announce(network, 0.0)
            with torch.no_grad():
                energy = network.energy_of(network.free, 0.0)
            self._free = Relaxation(
                list(network.free), "states", "converged", 0, energy.new_zeros(network.batch_size), [energy]
            )
        return network

    def surrogate(self, loss: Tensor, scale: float = 1.0) -> Tensor:
        """A scalar with the value of `loss` whose gradient with respect to the parameters is the update.

        Args:
            loss: what the first pass returned, in its own graph.
            scale: factor on the loss that is not the user's own, such as 1/N under gradient accumulation by N; the
                relaxation does not see it, the update carries it.
        """
        loss = checked_loss(loss)
        if self._plan is None:
            self._remember([], [], loss.detach() / scale)
            return loss
        network = self._opened(loss, scale)
        del loss  # and with its graph the last state
        update = self._relaxed(network, network.first_loss) * (scale / network.loss_scale)
        self._check_coverage(update)
        # The value is the loss, for hooks and loggers that look at it; the gradient is the update's.
        surrogate: Tensor = network.first_loss * scale + (update - update.detach())
        return surrogate

    def increments(self, loss: Tensor, scale: float = 1.0) -> Iterator[Tensor]:
        """The surrogate before each single step of the relaxer: states and parameters move at once, from one gradient.

        Args:
            loss: as for `surrogate`.
            scale: as for `surrogate`.
        """
        network = self._opened(checked_loss(loss), scale)
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
            self._remember(list(network.names), [PhaseReport.of(strength, found)], network.first_loss)
            self._check_coverage(update)
            yield loss.detach() + (update - update.detach())
            network.parameters_moved()
            point = following

    def _opened(self, loss: Tensor, scale: float) -> Network:
        """The network of this step, after checking what only now is known."""
        assert self._plan is not None
        if not cmath.isfinite(loss.item()):
            raise RelaxationDivergedError(
                f"The loss of the forward pass is {float(loss.detach())}: there is nothing finite to relax towards."
                " The weights or the batch hold nan or inf already; look for it with Trainer(detect_anomaly=True) under"
                " stock training, lower the learning rate of the parameters, or clip."
            )
        first = self._first
        if first is None:  # the pass is not over, as under manual optimization: it is rehearsed up to here
            return self._settle()
        first.loss = self._unscaled(loss, scale)
        if self._is_free_forward(self._plan):
            network = self._network_from(first)
            return self._resting(network) if self._is_free_forward(self._plan) else self._settle()
        if self.network is None or self._free is None:
            return self._settle()
        self.network.adopt(self._free.point, first)
        return self.network

    def _unscaled(self, loss: Tensor, scale: float) -> Tensor:
        if self._raw_loss is not None:
            return self._raw_loss
        return loss / scale if scale != 1.0 else loss

    def _network_from(self, first: Pass) -> Network:
        """The network of a pass at the predictions."""
        assert self._plan is not None
        if first.keys != self._plan.calls:  # the control flow took another way
            self._plan = self._finder.search(self._closure, self._snapshot)
            first = self._first_again(self._plan)
        if self._batch is None:
            self._batch = first.arguments
        shapes = [state.shape for state in first.states]
        size = batch_size_among(self._leading_sizes or first.leading_sizes, shapes)
        loss_scale = size if self._loss_reduction == "mean" else 1
        if self._finder.asked_of_reduction is not self._plan:
            self._finder.asked_of_reduction = self._plan
            self._say_if_summed(first, size)
        parts = self._algorithm.energy, self._plan, first, self._run, size, loss_scale
        captures = self._captures
        network = Network(*parts) if captures is None else CapturedNetwork(*parts, captures=captures, tape=self._tape)
        self.network = network if self.observer is None else self.observer(network)
        return self.network

    def _say_if_summed(self, first: Pass, size: int) -> None:
        """Once for every set of layers."""
        if self._finder.lossless or self._loss_reduction != "mean" or size < 2:
            return
        if sums_over_batch(first.loss, first.states, size):
            log.warning(
                'The loss seems to sum over the %d samples of the batch, while loss_reduction="mean": the nudge is then'
                ' %d times as strong as the algorithm says, and so is its bias. Say loss_reduction="sum", or take the'
                " mean. (Said once; a guess from the operations of the loss.)",
                size,
                size,
            )

    def true_gradients(self) -> dict[str, Tensor]:
        """Backprop's gradient of this very step: same batch, same random draws, same buffers. No side effects."""
        written = None if self._plan is None else self._plan.written
        with self._snapshot.replaying(written), self._quiet(), torch.enable_grad():
            return named_gradients(self._module, checked_loss(self._closure()))

    def unrelaxed(self) -> Tensor:
        """The loss in the graph that backprop would differentiate, for an update that is going to be thrown away."""
        written = None if self._plan is None else self._plan.written
        with self._snapshot.replaying(written), self._quiet(), torch.enable_grad():
            return checked_loss(self._closure())

    def again(self, algorithm: Algorithm, observer: Observer | None = None) -> tuple[dict[str, Tensor], "Step"]:
        """What another algorithm would make of this very step: its update, and the step, not yet released.

        Same batch, same random draws, same buffers, same layers; no side effects, and no report.

        Raises:
            ConfigurationError: this step, or the other, is the control, which has no layers to relax.
        """
        if self._plan is None or algorithm.read_as == "backprop":
            raise ConfigurationError(
                'The algorithm "backprop" relaxes nothing, so there is no other way to take this step.'
            )
        other = Step(
            self._module, algorithm, self._finder, self._closure, self._quiet, _forget, self._loss_reduction,
            self._leading_sizes, self._snapshot, self._batch,
        )  # fmt: skip
        other._plan = self._plan
        other.observer = observer
        network = other._settle()
        update = other._relaxed(network, network.first_loss) / network.loss_scale
        return named_gradients(self._module, update), other

    @property
    def plan(self) -> Plan | None:
        """The layers of this step; None for the control."""
        return self._plan

    def release(self) -> None:
        """Lets go of the graphs; `true_gradients` still works."""
        self._first = self._free = self.network = None
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
        together = self._abreast(network, table)
        last = max((k for k, phase in enumerate(table) if phase.is_nudged), default=-1)
        held, taken = any(phase.held for phase in table), None
        departs = is_divergence(algorithm.energy) and algorithm.read_as == "contrast" and not held
        for k, phase in enumerate(table):
            strength, weight = phase.strength, phase.weight
            if phase in together:
                found = together[phase]
                phases.append(PhaseReport.of(strength, found))
            elif phase.is_nudged:
                _announce(network, strength, phase.held)
                if departs and k == last and isinstance(network, CapturedNetwork):
                    network.returns, self._first = False, None
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
        self._remember(list(network.names), phases, loss)
        if algorithm.read_as == "cross-derivative":
            return self._cross_derivative(network, self._start(network))
        update = network.contrast(self.phases)
        if held:
            update = update + self._direct(network, table)
        if self._teaches and taken is not None and taken.dyad is None:
            algorithm.energy.observe(lambda: dict(zip(network.names, network.errors_at(taken), strict=True)))
        return update

    def _abreast(self, network: Network, table: Sequence[Phase]) -> dict[Phase, Relaxation]:
        """The phases, in real numbers, that one choice is made for, or that sweep as one batch on captured code."""
        relaxer = self._algorithm.relaxer
        phases = [p for p in table if p.strength and not p.held and not isinstance(p.strength, complex)]
        captured = isinstance(getattr(network, "unwatched", network), CapturedNetwork)
        if len(phases) < 2 or not isinstance(relaxer, SweepingRelaxer | Cheapest):
            return {}
        if not captured and not isinstance(relaxer, Cheapest):
            return {}
        strengths = [phase.strength for phase in phases]
        if isinstance(network, Recording):
            network.begin_abreast(strengths)
        with torch.no_grad():
            found = relaxer.relax_abreast(network, self._start(network), strengths)
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
        assert self._plan is not None
        share = sum(phase.weight.real * phase.strength.real for phase in table if phase.held)
        if not self._plan.loss_parameters or not share:
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

    def _first_again(self, plan: Plan) -> Pass:
        self._tape = Tape(QUICK_PRODUCTS)
        with self._taped():
            return self._run(self._cut(at_prediction(frozenset(plan.states))))

    def _cut(self, state_of: StateOf) -> StateOf:
        return state_of if self._captures is None else self._tape.cutting(state_of)

    def _taped(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._captures is None else self._tape

    def _run(self, state_of: StateOf) -> Pass:
        assert self._plan is not None
        with (
            self._snapshot.replaying(self._plan.written),
            self._quiet(),
            torch.enable_grad(),
            self._substituted(self._plan, state_of) as seen,
            self._arithmetic(),
        ):
            returned = self._closure()
            seen.loss = torch.zeros(()) if self._finder.lossless else checked_loss(returned)
        return seen

    def _arithmetic(self) -> AbstractContextManager[Any]:
        """What passes need beyond the user's code: complex numbers, or second derivatives."""
        stack = ExitStack()
        stack.enter_context(self._derivatives())
        if self._is_complex:
            stack.enter_context(Promoted())
        return stack

    def _derivatives(self) -> AbstractContextManager[Any]:
        """Attention in single operations where slopes are differentiated again: fused kernels have no second ones."""
        return sdpa_kernel(SDPBackend.MATH) if self._algorithm.read_as == "cross-derivative" else nullcontext()

    def _substituted(self, plan: Plan, state_of: StateOf) -> AbstractContextManager[Pass]:
        return substituted(self._module, plan.candidates, state_of, plan.copies.__contains__)

    def _check_coverage(self, update: Tensor) -> None:
        """Once for every set of layers: each parameter that backprop would reach must be reached by the energy."""
        plan = self._plan
        assert plan is not None
        if self._finder.covered is plan:
            return
        missing = plan.reached - reached_parameters(self._module, update)
        if missing:
            raise ConfigurationError(
                f"Backprop would train {', '.join(sorted(missing))}, and no term of the energy"
                f" {self._algorithm.energy!r} depends on them: they would silently stay as they are. An energy must"
                " depend on the drive or the prediction of every layer; change the energy, leave the layer out of"
                " layers=[...], or set requires_grad=False on what is meant to stay."
            )
        self._finder.covered = plan


def free_equilibrium(network: Network, algorithm: Algorithm, start: Sequence[Tensor] | None = None) -> Relaxation:
    """argmin_x I, as far as the algorithm's relaxer goes; from the algorithm's initial state if `start` is None."""
    _announce(network, 0.0)
    if start is None:
        start = [torch.zeros_like(x) for x in network.free] if algorithm.initial_state == "zeros" else network.free
    with torch.no_grad():
        return (algorithm.free_relaxer or algorithm.relaxer).relax(network, network.feasible(list(start)), 0.0)


def _announce(network: object, strength: complex, held: bool = False) -> None:
    """Tells whoever records that a phase begins."""
    if isinstance(network, Recording):
        network.begin(strength, held)


def _forget(names: list[str], phases: list[PhaseReport], loss: Tensor) -> None:
    """A step of which no report is kept."""


def _real(tensor: Tensor) -> Tensor:
    return tensor.real if tensor.is_complex() else tensor
