"""Validation, test and prediction with the states of the layers where training relaxes them to."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lightning_ebm.algorithm import Algorithm
from lightning_ebm.equilibrium import ordinary
from lightning_ebm.learner import Learner


class EvaluatingStrategy(Strategy):
    """Runs the user's evaluation steps at the free equilibrium, which for divergence energies is the forward pass.

    Attributes:
        algorithm: whose equilibrium.
    """

    algorithm: Algorithm

    @property
    def learner(self) -> Learner:
        """The engine."""
        raise NotImplementedError

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _relaxes(self) -> bool:
        """Whether there are further passes; not for the control."""
        return self.algorithm.rule.relaxes

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step, with every state at the free equilibrium."""
        return self._evaluated(self._module.validation_step, super().validation_step, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step, with every state at the free equilibrium."""
        return self._evaluated(self._module.test_step, super().test_step, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step, with every state at the free equilibrium."""
        return self._evaluated(self._module.predict_step, super().predict_step, args, kwargs)

    def _evaluated(
        self,
        plain: Callable[..., STEP_OUTPUT],
        step: Callable[..., STEP_OUTPUT],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> STEP_OUTPUT:
        def again() -> STEP_OUTPUT:
            # Past any wrapper: passes are local, and devices need different numbers of them.
            with self.precision_plugin.forward_context():
                return plain(*args, **kwargs)

        if self.algorithm.rests_at_forward:
            return step(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = ordinary((args, kwargs))
            with self.learner.free_phase(again):
                return step(*args, **kwargs)
