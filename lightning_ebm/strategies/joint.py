"""What strategies for many devices share: ranks relax by themselves and decide together."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from lightning_ebm.errors import ConfigurationError, EBMError, RelaxationDivergedError
from lightning_ebm.nudges import Strongest
from lightning_ebm.purity import shadowed
from lightning_ebm.relaxers import Cheapest
from lightning_ebm.strategies.base import _FAILED, EnergyStrategy
from lightning_ebm.strategies.preemption import Preemption

log = logging.getLogger(__name__)

_TOLD_TO_END = 1
"""What a rank says that goes on, and has been sent SIGTERM; less than `_FAILED`."""


class JointStrategy(EnergyStrategy, ParallelStrategy):
    """Relaxes on every rank by itself, in as many steps as its own batch needs, and decides together.

    No collective runs inside a relaxation. When it is over, the ranks agree on whether all of them have an update, in
    one reduction of one integer: an error on one rank is raised on all of them, where otherwise the others would wait
    in the reduction of the gradients until the process group times out.
    """

    _failed = False
    _voted = False

    def learn_by(self, *settings: Any, **options: Any) -> None:
        """See `EnergyStrategy.learn_by`."""
        super().learn_by(*settings, **options)
        self._preemption = Preemption()

    def setup(self, trainer: Trainer) -> None:
        """Lightning's own, after refusing what would make a collective of every pass."""
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits and self._relaxes and (self._layer_sync or _holds(self._module, nn.SyncBatchNorm)):
            raise ConfigurationError(
                "sync_batchnorm makes every pass through the network wait for all ranks, and a relaxation makes as many"
                " passes as its own batch needs: the ranks would wait for each other for ever. Normalize over each"
                " rank's batch, sync_batchnorm=False, or over groups or layers instead of batches."
            )
        if fits and self.algorithm.energy.learns:
            raise ConfigurationError(
                "A LearnedPrecision follows the errors of one process, and every rank sees others: the ranks would"
                " relax on different energies, and agree on none. Give fixed precisions here, such as those learned on"
                " one device."
            )
        self._failed = False
        super().setup(trainer)

    def on_train_start(self) -> None:
        """Lightning's own; SIGTERM waits from here on until the ranks decide together."""
        super().on_train_start()
        if self._relaxes and self.world_size > 1:
            self._preemption.start()

    def on_train_end(self) -> None:
        """Lightning's own."""
        self._preemption.stop()
        super().on_train_end()

    def teardown(self) -> None:
        """Lightning's own; after an error the signal is handled as before, too."""
        self._preemption.stop()
        super().teardown()

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step; if it fails, the other ranks learn of it in their `backward`."""
        self._voted = False
        try:
            output = super().training_step(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            skipped = self._diverged is not None  # by all ranks
            if loss is None and not skipped and self._module.automatic_optimization:  # refused by Lightning
                self._agree(ConfigurationError("training_step returned None, which many devices cannot skip together."))
        except Exception as error:
            self._agree(error)
            raise
        return output

    def _surrogate(self, closure_loss: Tensor) -> Tensor | None:
        try:
            found = super()._surrogate(closure_loss)
        except Exception as error:
            self._agree(error)
            raise
        if found is None:  # on all ranks, of which some may have no backward call
            return None
        self._agree(None)
        self._choose_together()
        return found

    def _choose_together(self) -> None:
        """Every rank comes here after a relaxation: what one of them found out, all go by from now."""
        if not self._relaxes or self.world_size == 1:
            return
        for part in self.algorithm.parts().values():
            if isinstance(part, Cheapest | Strongest) and not self.reduce_boolean_decision(not part.tried):
                part.agree(self.gather(part.tried))

    def _worst(self, status: int) -> int:
        """See `EnergyStrategy._worst`; a collective."""
        self._voted = True
        if self.world_size == 1:
            return status
        worst = self.reduce(torch.tensor(status, device=self.root_device), reduce_op="max")
        return int(worst)

    def _agree(self, error: Exception | None) -> None:
        """Every rank comes here once a backward call, with its error if it has one."""
        if not self._relaxes or self._failed or self.world_size == 1:
            return
        self._failed = error is not None
        if error is not None:
            # At once: what follows waits for the others.
            log.error("Rank %d of %d failed: %s: %s", self.global_rank, self.world_size, type(error).__name__, error)
        with suppress(Exception) if error is not None else nullcontext():  # if they are gone, its own error counts
            if error is not None and not self.learner.policy.raises and not self._voted:
                self._worst(_FAILED)  # what the others ask first
            worst = self._worst(_FAILED if error is not None else _TOLD_TO_END if self._preemption.came else 0)
            if worst == _TOLD_TO_END:
                self._preemption.act()
            if worst < _FAILED:
                return
            text = f"{type(error).__name__}: {error}"
            told = self.gather(None if error is None else (text, isinstance(error, RelaxationDivergedError)))
            if error is None:
                self._failed = True
                failed = [f"rank {rank}: {found[0]}" for rank, found in enumerate(told) if found is not None]
                kind = RelaxationDivergedError if any(found[1] for found in told if found is not None) else EBMError
                raise kind(f"No rank takes this step, as {len(failed)} of {len(told)} failed. {'; '.join(failed)}")

    def gather(self, value: Any) -> list[Any]:
        """See `EnergyStrategy.gather`; a collective."""
        if not torch.distributed.is_initialized():
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with super()._quiet(), shadowed(self._module, {"all_gather": _no_gather}):
            yield


def _no_gather(*args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigurationError(
        "training_step calls self.all_gather. Each rank relaxes by itself, in as many passes as its own batch needs, so"
        " that a collective in a pass would wait for ranks that have finished. Compute the loss from this rank's batch"
        ' alone, or use the algorithm "backprop".'
    )


def _holds(module: LightningModule, kind: type[nn.Module]) -> bool:
    return any(isinstance(part, kind) for part in module.modules())
