"""What callbacks see of the last training step: true gradients, its regime, the curvatures it rests in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.instruments.curvature import Curvature, of_step as curvature_of_step
from lightning_ebm.reference import Reference, exactly
from lightning_ebm.regime import Regime, of_step as regime_of_step
from lightning_ebm.relaxers import Relaxer
from lightning_ebm.step.step import Step
from lightning_ebm.strategies.evaluation import EvaluatingStrategy


class ObservedStrategy(EvaluatingStrategy):
    """Answers questions about the last step, between `training_step` and the optimizer's; none has side effects."""

    _step: Step | None = None
    _looks = False

    def true_gradients(self, reference: Reference = "backprop") -> dict[str, Tensor]:
        """The true gradient on the micro-batch of the last step, scaled as Lightning scales that step's update.

        Call it between `training_step` and the optimizer's step, as `on_after_backward` does. No side effects.

        Args:
            reference: "backprop", of the feed-forward network; "equilibrium", of the loss at the free equilibrium, as
                `reference.equilibrium`. For a divergence energy that equilibrium is the forward pass: the two are one.
        """
        step = self._last("gradient could be computed")
        exact = reference == "equilibrium" and not self.algorithm.rests_at_forward
        with self._looking():
            if exact:
                found, other = step.again(exactly(self.algorithm))
                other.release()
            else:
                found = step.true_gradients()
        scaler = self._scaler()
        scale = (float(scaler.get_scale()) if scaler is not None else 1.0) / self._accumulated()
        return {name: gradient * scale for name, gradient in found.items()} if scale != 1.0 else found

    def regime(self, equilibrium: Relaxer | None = None) -> Regime:
        """Where between backprop and equilibrium the last step's update was read, see `lightning_ebm.regime`.

        Call it as `true_gradients`. It relaxes twice more, once to equilibrium. No side effects.
        """
        step = self._last("regime could be measured")
        with self._looking():
            return regime_of_step(step, self.algorithm, equilibrium)

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Within it gradients are taken to look at, which nobody steps on."""
        self._looks, before = True, self._looks
        try:
            yield
        finally:
            self._looks = before

    def unseen(self) -> AbstractContextManager[None]:
        """Within it gradients of the last step are taken to look at: what `retain_grad` was called on shows none."""
        return nullcontext() if self._step is None else self._step.unseen()

    def curvature(self, steps: int = 32) -> Curvature:
        """Whether the states of the last step rest in a minimum, see `lightning_ebm.instruments.curvature`.

        Call it as `true_gradients`. It relaxes once more. No side effects.
        """
        step = self._last("curvature could be measured")
        with self._looking():
            return curvature_of_step(step, self.algorithm, steps)

    def _last(self, wanted: str) -> Step:
        if self._step is None:
            raise ConfigurationError(f"There is no training step yet whose {wanted}.")
        return self._step

    def _accumulated(self) -> int:
        """By how much Lightning has divided the loss; read at every step, as a scheduler may change it."""
        module = self._module
        return module.trainer.accumulate_grad_batches if module.automatic_optimization else 1

    def _scaler(self) -> torch.amp.GradScaler | None:
        return getattr(self.precision_plugin, "scaler", None)
