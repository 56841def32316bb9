"""One batch: its first pass, its relaxations, and the scalar whose gradient is the update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.capture import CapturedNetwork, Captures
from lightning_ebm.closure import Closure, checked_loss
from lightning_ebm.errors import ConfigurationError, RelaxationDivergedError
from lightning_ebm.layers import LayerFinder
from lightning_ebm.network import Network
from lightning_ebm.purity import Snapshot
from lightning_ebm.reference import named_gradients
from lightning_ebm.relaxers import Relaxation
from lightning_ebm.report import PhaseReport
from lightning_ebm.substitution import Pass, StateOf, at_prediction, batch_size_among, substituted
from lightning_ebm.tape import Tape
from lightning_ebm.wiring import Plan, reached_parameters

Remember = Callable[[list[str], list[PhaseReport], Tensor], None]


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
        captures: Captures | None = None,
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
        self._captures = captures if captures is not None and captures.wanted(algorithm.read_as) else None
        self._tape = Tape()
        self._raw_loss: Tensor | None = None
        self._first: Pass | None = None
        self.network: Network | None = None
        self.phases: list[tuple[float, float, Relaxation]] = []
        """Strength, weight and end of each phase of the last relaxation."""

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """The user's own pass, side effects and all, with every state at its prediction."""
        if self._plan is None:  # the control: nothing is substituted, but the pass can be replayed for comparison
            with self._snapshot.recording():
                yield
            return
        state_of = at_prediction(frozenset(self._plan.states))
        with (
            self._snapshot.recording(),
            self._substituted(self._plan, self._tape.cutting(state_of)) as first,
            self._taped(),
        ):
            yield
        self._first = first

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
            first = self._first_again(self._plan)
        else:
            first.loss = self._raw_loss if self._raw_loss is not None else loss / scale if scale != 1.0 else loss
        if first.keys != self._plan.calls:  # the control flow took another way
            self._plan = self._finder.search(self._closure, self._snapshot)
            first = self._first_again(self._plan)
        shapes = [state.shape for state in first.states]
        size = batch_size_among(self._leading_sizes or first.leading_sizes, shapes)
        loss_scale = size if self._loss_reduction == "mean" else 1
        parts = self._algorithm.energy, self._plan, first, self._run, size, loss_scale
        captures = self._captures
        network = Network(*parts) if captures is None else CapturedNetwork(*parts, captures=captures, tape=self._tape)
        self.network = network
        update = self._relaxed(network, first.loss.detach()) * (scale / loss_scale)
        self._check_coverage(update)
        # The value is the loss, for hooks and loggers that look at it; the gradient is the update's.
        return loss.detach() + (update - update.detach())

    def true_gradients(self) -> dict[str, Tensor]:
        """Backprop's gradient of this very step: same batch, same random draws, same buffers. No side effects."""
        written = None if self._plan is None else self._plan.written
        with self._snapshot.replaying(written), self._quiet(), torch.enable_grad():
            return named_gradients(self._module, checked_loss(self._closure()))

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

    def _first_again(self, plan: Plan) -> Pass:
        self._tape = Tape()
        with self._taped():
            return self._run(self._tape.cutting(at_prediction(frozenset(plan.states))))

    def _taped(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._captures is None else self._tape

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
