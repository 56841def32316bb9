"""One batch: its first pass, its relaxations, and the scalar whose gradient is the update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ebm import reference as true
from lightning_ebm.algorithm import Algorithm
from lightning_ebm.closure import Closure, checked_loss
from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.layers import LayerFinder
from lightning_ebm.network import Network
from lightning_ebm.purity import Snapshot
from lightning_ebm.reference import named_gradients
from lightning_ebm.relaxers import Relaxation
from lightning_ebm.report import PhaseReport
from lightning_ebm.substitution import Pass, StateOf, at_prediction, batch_size_among, substituted
from lightning_ebm.wiring import Plan, reached_parameters

Remember = Callable[[list[str], list[PhaseReport], Tensor], None]
Observer = Callable[[Network], Network]
Reference = Literal["backprop", "equilibrium"]


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
    ) -> None:
        self._module = module
        self._algorithm = algorithm
        self._finder = finder
        self._closure = closure
        self._quiet = quiet
        self._remember = remember
        self._loss_reduction = loss_reduction
        self._leading_sizes = leading_sizes
        self._plan: Plan | None = None if algorithm.read_as == "backprop" else finder.plan
        self._snapshot = snapshot or Snapshot(module, frozenset() if self._plan is None else self._plan.written)
        self._first: Pass | None = None
        self.network: Network | None = None
        self.phases: list[tuple[float, float, Relaxation]] = []
        """Strength, weight and end of each phase of the last relaxation."""
        self.observer: Observer | None = None
        """Put in the network's place before anything relaxes on it, to watch."""

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """The user's own pass, side effects and all, with every state at its prediction."""
        if self._plan is None:  # the control: nothing is substituted, but the pass can be replayed for comparison
            with self._snapshot.recording():
                yield
            return
        with (
            self._snapshot.recording(),
            self._substituted(self._plan, at_prediction(frozenset(self._plan.states))) as first,
        ):
            yield
        self._first = first

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
        if not bool(torch.isfinite(loss)):
            raise RelaxationDivergedError(
                f"The loss of the forward pass is {float(loss)}: there is nothing finite to relax towards. The weights"
                " or the batch hold nan or inf already; look for it with Trainer(detect_anomaly=True) under stock"
                " training, lower the learning rate of the parameters, or clip."
            )
        first = self._first
        if first is None:  # the pass is not over, as under manual optimization: it is rehearsed up to here
            first = self._run(at_prediction(frozenset(self._plan.states)))
        else:
            first.loss = loss / scale if scale != 1.0 else loss
        if first.keys != self._plan.calls:  # the control flow took another way
            self._plan = self._finder.search(self._closure, self._snapshot)
            first = self._run(at_prediction(frozenset(self._plan.states)))
        shapes = [state.shape for state in first.states]
        size = batch_size_among(self._leading_sizes or first.leading_sizes, shapes)
        loss_scale = size if self._loss_reduction == "mean" else 1
        network = Network(self._algorithm.energy, self._plan, first, self._run, size, loss_scale)
        if self.observer is not None:
            network = self.observer(network)
        self.network = network
        update = self._relaxed(network, first.loss.detach()) * (scale / loss_scale)
        self._check_coverage(update)
        # The value is the loss, for hooks and loggers that look at it; the gradient is the update's.
        return loss.detach() + (update - update.detach())

    def true_gradients(self, reference: Reference = "backprop") -> dict[str, Tensor]:
        """The true gradient of this very step: same batch, same random draws, same buffers. No side effects.

        Args:
            reference: "backprop", of the feed-forward network; "equilibrium", of the loss at the free equilibrium. For
                a divergence energy that equilibrium is the forward pass, and the two are one.
        """
        written = None if self._plan is None else self._plan.written
        with self._snapshot.replaying(written), self._quiet(), torch.enable_grad():
            if reference == "equilibrium" and self._plan is not None and not self._algorithm.energy.divergence:
                return _at_equilibrium()(self._module, self._closure, self._algorithm)
            return named_gradients(self._module, checked_loss(self._closure()))

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
            self._leading_sizes, self._snapshot,
        )  # fmt: skip
        other._plan = self._plan
        other.observer = observer
        other._first = other._run(at_prediction(frozenset(self._plan.states)))
        return named_gradients(self._module, other.surrogate(other._first.loss)), other

    @property
    def plan(self) -> Plan | None:
        """The layers of this step; None for the control."""
        return self._plan

    def release(self) -> None:
        """Lets go of the graphs; `true_gradients` still works."""
        self._first = self.network = None
        self.phases = []

    def _relaxed(self, network: Network, loss: Tensor) -> Tensor:
        """sum_p weight_p E(x_p, theta), states held fixed."""
        algorithm = self._algorithm
        phases, terms = [], []
        self.phases = []
        start, free = self._free_phase(network)
        if free is not None:
            phases.append(PhaseReport.of(0.0, free))
        for strength, weight in algorithm.nudge.phases():
            if strength:
                with torch.no_grad():
                    found = algorithm.relaxer.relax(network, start, strength)
                phases.append(PhaseReport.of(strength, found))
            elif free is None:
                continue  # dI/dtheta is exactly 0 at the forward pass of a divergence energy
            else:
                found = free
            self.phases.append((strength, weight, found))
            terms.append(weight * network.energy_at(found, strength))
        self._remember(list(network.names), phases, loss)
        return torch.stack(terms).sum()

    def _free_phase(self, network: Network) -> tuple[Sequence[Tensor], Relaxation | None]:
        """The state that nudged phases start from; None where it is the forward pass and nothing had to be done."""
        algorithm = self._algorithm
        if algorithm.energy.divergence:
            return network.free, None
        start = network.free if algorithm.initial_state == "forward" else [torch.zeros_like(x) for x in network.free]
        with torch.no_grad():
            found = (algorithm.free_relaxer or algorithm.relaxer).relax(network, start, 0.0)
        return found.point, found

    def _run(self, state_of: StateOf) -> Pass:
        assert self._plan is not None
        with (
            self._snapshot.replaying(self._plan.written),
            self._quiet(),
            torch.enable_grad(),
            self._substituted(self._plan, state_of) as seen,
        ):
            seen.loss = checked_loss(self._closure())
        return seen

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


def _at_equilibrium() -> Callable[[nn.Module, Closure, Algorithm], dict[str, Tensor]]:
    found: Callable[[nn.Module, Closure, Algorithm], dict[str, Tensor]] | None = getattr(true, "equilibrium", None)
    if found is None:
        raise ConfigurationError(
            'reference="equilibrium": this version cannot differentiate the free equilibrium of an energy whose'
            ' equilibrium is not the forward pass. Use reference="backprop", and read the figures as the distance to'
            " the feed-forward network's gradient."
        )
    return found


def _forget(names: list[str], phases: list[PhaseReport], loss: Tensor) -> None:
    """A step of which no report is kept."""
