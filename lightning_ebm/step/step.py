"""One batch: its first pass, its relaxations, and the scalar whose gradient is the update.

Longer than 300 lines, as a batch may be taken, looked at, taken by another algorithm, and refused, and all of these
share one order of events.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.energies.base import is_divergence
from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError, UnsupportedModuleError
from lightning_ebm.network.analytic import is_analytic
from lightning_ebm.network.network import Network
from lightning_ebm.network.precomputed_gradient import average_of, with_precomputed_gradient
from lightning_ebm.nudges import Phase
from lightning_ebm.program.autograd_graph import named_gradients
from lightning_ebm.program.check import OVERWRITTEN
from lightning_ebm.program.interpreter import at_states
from lightning_ebm.program.meanwhile import Meanwhile
from lightning_ebm.program.module_walk import clean
from lightning_ebm.program.programs import Found
from lightning_ebm.program.recorder import Recorder, TakesCare
from lightning_ebm.program.wiring import Plan
from lightning_ebm.questions import Questions
from lightning_ebm.step.arithmetic import Arithmetic
from lightning_ebm.step.blame import spoils
from lightning_ebm.step.closure import Closure, check_closure, checked_loss, is_number
from lightning_ebm.step.coverage import check_coverage
from lightning_ebm.step.handed_over import held_by
from lightning_ebm.step.increments import increments
from lightning_ebm.step.phases import Phases
from lightning_ebm.step.quiet_pass import run_quietly
from lightning_ebm.step.recorded import Recorded
from lightning_ebm.step.report import PhaseReport
from lightning_ebm.step.retained import Retained
from lightning_ebm.step.second_run import in_place_of_layers, repeated, told_of_states_in_place
from lightning_ebm.step.setup import Observer, Setup, unheard
from lightning_ebm.step.user_pass import UserPass
from lightning_ebm.updates import End
from lightning_ebm.updates.base import samples_of


class Step:
    """Open a step, run the pass inside `first_pass`, and hand its loss to `surrogate`.

    Args:
        setup: of the learner.
        closure: runs the pass quietly, for energies whose free equilibrium is not the forward pass.
        arguments: what the training step is called with; what the module is if None. Among the first dimensions of the
            tensors in it that the pass reads B is found, see `batch_size_among`.
        batch: what the module is trained on, for nudges that look at it; what it is called with if None.
        teaches: whether the energy may learn from this step, and the memory note it: it is taken, not only looked at.
        recorder: of a pass that has begun already, as under manual optimization.
    """

    def __init__(
        self,
        setup: Setup,
        closure: Closure,
        arguments: Any = None,
        batch: Any = None,
        teaches: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        check_closure(closure)
        self._setup = setup if teaches else setup.apart()
        self._closure = closure
        self._arguments = arguments
        self._teaches = teaches
        self._pass = UserPass(setup.module, recorder, batch)
        self._arithmetic = Arithmetic(setup.algorithm.rule.second_derivatives)
        self._raw_loss: Tensor | None = None
        self._retained: Retained | None = None
        self.ran = False
        """Whether the user's own pass is over; else what failed was the free phase before it."""
        self._phases: Phases | None = None
        self.held: Sequence[End] = ()
        """What the update is read from."""

    @property
    def plan(self) -> Plan | None:
        """The layers of this step, once its pass is over; None for the control."""
        return None if self._pass.recorded is None else self._pass.recorded.plan

    @property
    def network(self) -> Network | None:
        """The network of this step, until it is released."""
        return None if self._phases is None else self._phases.network

    @property
    def phases(self) -> list[End]:
        """The ends of the phases of the last relaxation."""
        return [] if self._phases is None else self._phases.ends

    @contextmanager
    def first_pass(self, on_backward: TakesCare | None = None) -> Iterator[None]:
        """The user's own pass, side effects and all, recorded; `on_backward` is told of `backward` calls within.

        For a divergence energy it is the free equilibrium, as it is for others where no layer reads another's state.
        Else a quiet pass is recorded before, and the user's own has the states that it relaxed to in place.
        """
        if not self._setup.algorithm.rule.relaxes:
            yield
            return
        recorder = self._pass.begin(on_backward)
        programs = self._setup.programs
        programs.free_left()
        if not self._relaxes_before():
            with programs.recording_own(recorder), self._arithmetic.derivatives():
                yield
            return
        with self._pass.blaming(None):
            phases = self._begun()
            self._pass.check_finite(phases.network.questions, None)
            free = phases.relax_freely(self._teaches)
        replaced = in_place_of_layers(self._pass.known.program, free.point, recorder)
        with programs.recording_own(recorder, replaced), self._arithmetic.derivatives(), told_of_states_in_place():
            yield

    def _relaxes_before(self) -> bool:
        """Whether the user's pass must be run at a free equilibrium that is not the forward pass."""
        setup = self._setup
        if is_divergence(setup.algorithm.energy):
            return False
        latest = setup.programs.latest
        if latest is not None and setup.is_free_forward(latest.plan):
            return False
        plan = self.examine(again=True)
        return not setup.is_free_forward(plan) and not self._pass.known.is_empty

    def examine(self, again: bool = False) -> Plan:
        """Finds the layers by a pass without side effects, which `true_gradients` and `again` then are about.

        Args:
            again: whether the user's own pass is still to come.
        """
        setup = self._setup

        def find(recorder: Recorder, loss: Any) -> Found:
            if setup.clamp is not None and not is_number(loss):
                raise ConfigurationError(
                    f"The closure returned no loss, and {setup.algorithm.energy!r} has no lower bound in the"
                    " parameters: lowering it for what is held would only deepen it there. Return a loss, or take an"
                    " energy that is 0 at the forward pass, such as ebm.PredictiveCoding()."
                )
            return setup.programs.of(recorder, checked_loss(loss, setup.module))

        self._pass.recorded = found = run_quietly(setup, self._closure, self._arithmetic, find, self._arguments, again)
        return found.plan

    def returned(self, loss: Any) -> None:
        """Notes the loss as the user's code returned it, where `surrogate` is given a multiple of it."""
        self._raw_loss = loss

    def surrogate(self, loss: Tensor, scale: float = 1.0) -> Tensor:
        """A scalar with the value of `loss` whose gradient with respect to the parameters is the update.

        Args:
            loss: what the first pass returned, in its own graph.
            scale: factor on the loss that is not the user's own, such as 1/N under gradient accumulation by N; the
                relaxation does not see it, the update carries it.
        """
        self.ran = True
        if self._setup.clamp is not None and not is_number(loss):
            with self._pass.blaming(None):
                return self._without_loss(scale)
        own = checked_loss(loss, self._setup.module).detach()
        if not self._setup.algorithm.rule.relaxes:
            self._setup.remember([], [], loss.detach() / scale, "plain")
            return self.unrelaxed(loss, scale)
        with self._pass.blaming(loss.detach(), loss if torch.is_anomaly_enabled() else None):
            retained = self._note(loss, scale)
            if self._pass.known.is_empty:
                surrogate = self._directly(scale)
            else:
                network = self._opened(loss)
                del loss  # its graph is as large as a step of backprop
                surrogate = self._surrogate(network, scale)
        surrogate = surrogate.reshape(own.shape).to(own.dtype)  # the user's may be (1,), or of half precision
        if not surrogate.requires_grad:  # all that it depends on has been frozen since: as by autograd, none learns
            return surrogate.detach().requires_grad_()
        surrogate.register_hook(partial(_handed_over, retained))
        return surrogate

    def _directly(self, scale: float) -> Tensor:
        """Nothing can relax: the loss depends on parameters directly, or on no sample."""
        recorded = self._pass.known
        assert recorded.loss is not None
        self._pass.check_finite(Questions(), recorded.loss)
        self._setup.remember([str(key) for key in recorded.plan.states], [], recorded.loss, "plain")
        return recorded.program.uncut() * scale

    def _surrogate(self, network: Network, scale: float) -> Tensor:
        update = self._relaxed(network, scale / network.loss_scale)
        check_coverage(self._setup, self._pass.known, update, network.batch_size)
        # The value is the loss, for hooks and loggers that look at it; the gradient is the update's.
        surrogate: Tensor = network.first_loss * scale + (update - update.detach())
        return surrogate

    def _without_loss(self, scale: float) -> Tensor:
        """What held units alone teach: a scalar of the value min_x I, with the gradient dI/dtheta there."""
        setup = self._setup
        recorder = self._pass.recorder
        self._pass.recorded = Recorded.of(setup.programs.without_loss(recorder), recorder, None, self._arguments)
        network, phases = self._settled(), self._phases
        network.questions.answered()
        assert phases is not None
        assert phases.free is not None
        share = scale * (1 if setup.loss_reduction == "sum" else 1 / network.batch_size)
        energy = share * phases.free.energies[-1]
        phases.ends = [End(Phase(0.0, 1.0), phases.free)]
        setup.remember(list(network.names), phases.reports(), energy / scale, network.runs_as)
        update = network.update(setup.algorithm.rule, phases.ends, share)
        check_coverage(setup, self._pass.known, update, network.batch_size)
        return energy + (update - update.detach())

    def increments(self, loss: Tensor, scale: float = 1.0) -> Iterator[Tensor]:
        """The surrogate before each single step of the relaxer: states and parameters move at once, from one gradient.

        Args:
            loss: as for `surrogate`.
            scale: as for `surrogate`.
        """
        setup = self._setup
        with self._pass.blaming(checked_loss(loss, self._setup.module).detach()):
            retained = self._note(loss)
            if self._pass.known.is_empty:
                yield self._directly(scale)
                return
            network = self._opened(loss)
        assert self._phases is not None
        for number, ends in enumerate(increments(self._phases, setup.algorithm)):
            update = network.update(setup.algorithm.rule, ends, scale / network.loss_scale)
            reports = [PhaseReport.of(ends[0].strength, ends[0].found)]
            setup.remember(list(network.names), reports, network.first_loss, network.runs_as)
            check_coverage(setup, self._pass.known, update, network.batch_size)
            surrogate = loss.detach() + (update - update.detach()).to(loss.dtype)
            if not surrogate.requires_grad:
                surrogate.requires_grad_()
            elif number == 0:
                surrogate.register_hook(partial(_handed_over, retained))
            yield surrogate

    def _note(self, loss: Tensor, scale: float = 1.0) -> Retained:
        """The user's pass is over: what it was, unless a quiet one has told."""
        raw, contents = loss if self._raw_loss is None else self._raw_loss, self._pass.recorder.contents
        contents.losses.append(contents.value(raw))
        self._pass.recorder.record.share = scale
        self._retained = retained = Retained(loss, contents.retained)
        with retained.told(self._pass.recorder.record.heard):
            self._find(raw)
        retained.restore()
        return retained

    def _find(self, loss: Tensor) -> None:
        if self._phases is None:
            recorder, partial = self._pass.recorder, not self._pass.owns_recorder
            found = self._setup.programs.of(recorder, loss, partial)
            self._pass.recorded = Recorded.of(found, recorder, loss, self._arguments)

    def _opened(self, loss: Tensor) -> Network:
        """The network of this step, relaxed to its free equilibrium."""
        loss = loss if self._raw_loss is None else self._raw_loss
        if self._phases is None:
            return self._settled(loss)
        network = self._at_equilibrium(self._phases.network, loss)  # its states are in place in the user's pass
        self._pass.check_finite(network.questions, loss)
        return network

    def meanwhile(self) -> Meanwhile:
        """To be active while the user's code runs between the pass and its gradient."""
        recorder = self._pass.recorder
        return Meanwhile(recorder.record, None if self._pass.owns_recorder else recorder.contents)

    def read_again(self) -> None:
        """What the pass has read has been written to since, and is read from copies now.

        Raises:
            UnsupportedModuleError: where autograd does not look, so that its own gradient would be of what is there.
        """
        network, recorded = self.network, self._pass.recorded
        if network is None or recorded is None:
            return
        if recorded.program.overwritten():
            raise UnsupportedModuleError("The gradient of this step is no function's." + OVERWRITTEN)
        network.read_again(recorded.program, recorded.binding)

    def unseen(self) -> AbstractContextManager[None]:
        """Within it gradients are taken that nobody is to see in what `retain_grad` was called on."""
        return nullcontext() if self._retained is None else self._retained.unseen()

    def undo(self) -> None:
        """Puts back what the user's own pass wrote to (running statistics), as this step is refused."""
        self._pass.undo()

    def unrelaxed(self, loss: Tensor, scale: float = 1.0) -> Tensor:
        """The loss in its own graph, for a step without relaxation: the control's, or one that is thrown away."""
        return self._pass.unrelaxed(loss, scale)

    def true_gradients(self) -> dict[str, Tensor]:
        """Backprop's gradient of this very step: same batch, same random draws, same buffers. No side effects."""
        return self._pass.true_gradients()

    def instead(self, algorithm: Algorithm, loss: Tensor, scale: float = 1.0) -> Tensor:
        """`surrogate` by another algorithm, of a pass that is over.

        Args:
            algorithm: which.
            loss: as for `surrogate`.
            scale: as for `surrogate`.

        Raises:
            RelaxationDivergedError: it finds no update either.
        """
        with self._pass.blaming(loss.detach()):
            if algorithm.rule.relaxes:
                found, other = self.again(algorithm)
                other.release()
            else:
                found = self.true_gradients()
            if spoils(found):
                raise RelaxationDivergedError("The update of the algorithm to fall back to is not finite either.")
        held = {clean(name): p for name, p in self._setup.module.named_parameters()}

        def update(factor: Tensor) -> tuple[Tensor, ...]:
            return tuple(gradient * (scale * factor).to(gradient.dtype) for gradient in found.values())

        return with_precomputed_gradient(loss.detach(), update, [held[name] for name in found])

    def _settled(self, loss: Tensor | None = None) -> Network:
        """The network at its free equilibrium; `_relaxed` comes next.

        Args:
            loss: to be checked; None where that has been done.
        """
        phases = self._begun()
        recorded = self._pass.known
        if loss is not None:
            self._pass.check_finite(phases.network.questions, loss)
        if recorded.is_empty:
            return phases.network
        if self._setup.is_free_forward(recorded.plan):
            phases.rest()
        else:
            phases.relax_freely(self._teaches, answered=False)
        return phases.network

    def _begun(self) -> Phases:
        """The phases of this step, before any of them."""
        self._phases = self._pass.phases(self._setup, self._arithmetic)
        return self._phases

    def _at_equilibrium(self, network: Network, loss: Tensor) -> Network:
        """The network, given the user's pass with states in place."""
        second, _ = repeated(self._setup.module, self._pass.known, self._pass.recorder, loss)
        self._pass.recorded = second = second.thinned(self._pass.coded, states=False)
        self._pass.let_go()
        assert second.loss is not None
        network.run_again(second.loss, second.runner(self._arithmetic))
        network.rebind(second.program, second.binding, second.held)
        return network

    def again(self, algorithm: Algorithm, observer: Observer | None = None) -> tuple[dict[str, Tensor], "Step"]:
        """What another algorithm would make of this very step: its update, and the step, not yet released.

        Same batch, same random draws, same buffers, same layers; no side effects, and no report.

        Raises:
            ConfigurationError: this step, or the other, is the control, which has no layers to relax.
        """
        if self._pass.recorded is None or not algorithm.rule.relaxes:
            raise ConfigurationError(
                'The algorithm "backprop" relaxes nothing, so there is no other way to take this step.'
            )
        setup = replace(self._setup, algorithm=algorithm, remember=unheard, code=None, memory=None, observer=observer)
        other = Step(setup, self._closure, self._arguments, self._pass.given, teaches=False)
        other._pass.recorded = self._pass.recorded
        if self._pass.recorded.is_empty:
            return self.true_gradients(), other
        network = other._settled()
        return named_gradients(setup.module, other._relaxed(network, 1 / network.loss_scale)), other

    def release(self) -> None:
        """Frees the graphs and the states; `true_gradients` still works."""
        self._phases = self._raw_loss = self._retained = None
        self._pass.release()
        self.held = ()

    def _relaxed(self, network: Network, scale: float) -> Tensor:
        """Relaxes each phase; a scalar whose gradient is the update times `scale`."""
        with self._arithmetic.explained():
            return self._relaxed_by_rule(network, scale)

    def _relaxed_by_rule(self, network: Network, scale: float) -> Tensor:
        algorithm, setup, phases = self._setup.algorithm, self._setup, self._phases
        assert phases is not None
        phases.adapt()
        table = algorithm.rule.phases(algorithm.nudge)
        self._arithmetic.is_complex = any(phase.is_complex for phase in table)
        phases.relax(table, self._pass.free)
        self._check_analytic(network, phases.ends)
        setup.remember(list(network.names), phases.reports(), network.first_loss, network.runs_as)

        def read(ends: Sequence[End]) -> Tensor:
            self.held = held_by(algorithm.rule, network, ends)
            return network.update(algorithm.rule, self.held, scale)

        drawn = samples_of(phases.ends)
        update = read(phases.ends) if drawn is None else average_of(drawn, read)
        taken = phases.first_nudged
        if self._teaches and taken is not None and taken.dyadic_states is None:
            algorithm.energy.observe(lambda: dict(zip(network.names, network.errors_at(taken), strict=True)))
        return update

    def _check_analytic(self, network: Network, ends: Sequence[End]) -> None:
        """Once of every program, code or not: where states are complex, what is computed from them is analytic."""
        known, end = self._pass.known.known, next((end for end in ends if end.phase.is_complex), None)
        if end is not None and not known.analytic:
            seen = network.with_states(at_states(dict(zip(network.keys, end.found.point, strict=True))))
            known.analytic = is_analytic(seen, network.loss(seen), network.rounding)


def _handed_over(retained: Retained, factor: Tensor) -> None:
    """Autograd asks the surrogate for the update, times a factor."""
    if torch.is_grad_enabled():
        raise ConfigurationError(
            "backward(create_graph=True) asks for gradients with a graph of their own, and an update has none: it is"
            " read off states that stay as they are. Take penalties on gradients inside of the step, by"
            " torch.autograd.grad(..., create_graph=True) of the loss, and an optimizer without second derivatives; or"
            ' the algorithm "backprop".'
        )
    retained.give(factor)
