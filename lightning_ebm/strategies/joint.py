"""What strategies for many devices share: ranks relax by themselves and decide together."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from lightning_ebm.errors import ConfigurationError, EBMError, RelaxationDivergedError
from lightning_ebm.network.precomputed_gradient import with_precomputed_gradient
from lightning_ebm.part import Part
from lightning_ebm.purity import shadowed
from lightning_ebm.strategies.base import EnergyStrategy
from lightning_ebm.strategies.preemption import Preemption

log = logging.getLogger(__name__)


_DIVERGED, _FAILED = 1, 2
"""What may come of a batch on a rank: no relaxation, or another error."""


class JointStrategy(EnergyStrategy, ParallelStrategy):
    """Relaxes on every rank by itself, in as many steps as its own batch needs, and decides together.

    No collective runs inside a relaxation, nor in a micro-batch whose gradients are only accumulated. In the one whose
    gradients are reduced, all that ranks decide together rides on one reduction of a few integers, without a barrier:
    whether all of them have an update, whether one has been told to end, how many micro-batches were lost, and whether
    one has found out what relaxer or nudge the others should take. An error on one rank is raised on all of them, where
    otherwise the others would wait in the reduction of the gradients until the process group times out. A rank whose
    micro-batch fails while gradients accumulate remembers the error, goes through the user's steps with the others, and
    tells them at that reduction.
    """

    _failed = False
    _accumulating = False
    """Whether gradients of this micro-batch stay on this rank."""
    _untold: Exception | None = None
    """What this rank has failed with since ranks last decided."""
    _lost = 0
    """Micro-batches that this rank could not relax since then."""
    _gave = False
    """Whether one of them has added to the gradients."""

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
        self._failed, self._untold = False, None
        self._lost, self._gave = 0, False
        super().setup(trainer)

    def on_train_start(self) -> None:
        """Lightning's own; SIGTERM waits from here on until the ranks decide together."""
        super().on_train_start()
        if self._relaxes and self.world_size > 1:
            self._preemption.start()

    def teardown(self) -> None:
        """Lightning's own; after an error the signal is handled as before, too."""
        self._preemption.stop()
        super().teardown()

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """The user's own step; if it fails, the other ranks learn of it where they next decide."""
        try:
            output = super().training_step(*args, **kwargs)
        except Exception as error:
            return self._failed_step(error)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if loss is None and self._module.automatic_optimization:
            refusal = ConfigurationError("training_step returned None, which many devices cannot skip together.")
            if self._defers:
                return self._failed_step(refusal)
            self._fail(refusal)  # and Lightning refuses it
        return output

    def _failed_step(self, error: Exception) -> Tensor:
        """Raises the error, or goes on: Lightning, too, has the ranks meet at every micro-batch."""
        if not self._defers:
            self._fail(error)
            raise error
        self._remember_failure(error)
        return torch.full((), math.nan, device=self.root_device, requires_grad=True)

    def on_train_end(self) -> None:
        """Lightning's own; what failed in micro-batches that no optimizer step came after is told here."""
        self._preemption.stop()
        super().on_train_end()
        if self._untold is not None:
            raise self._untold

    def _surrogate(self, closure_loss: Tensor) -> Tensor | None:
        try:
            if self._untold is not None:
                if self._defers:
                    return None
                raise self._untold
            return super()._surrogate(closure_loss)
        except Exception as error:
            if not self._defers:
                self._fail(error)
                raise
            self._remember_failure(error)
            return None

    @property
    def _defers(self) -> bool:
        """Whether what fails now is told at a later micro-batch."""
        return self._accumulating and self._decides and self._module.automatic_optimization

    def _remember_failure(self, error: Exception) -> None:
        if self._untold is None:
            self._untold = error
            self._tell_log(error)

    def _decided(
        self, surrogate: Tensor | None, error: RelaxationDivergedError | None, closure_loss: Tensor
    ) -> Tensor | None:
        """See `EnergyStrategy._decided`; by itself where gradients only accumulate, else with all ranks."""
        if self._accumulating or not self._decides:
            found = super()._decided(surrogate, error, closure_loss)
            self._lost += error is not None
            self._gave = self._gave or found is not None
            return found
        worst, ends, lost, gave, *tried = self._vote(0 if error is None else _DIVERGED)
        if worst == _FAILED:
            self._raise_together(error)
        if ends:
            self._preemption.act()
        if lost > self._lost:
            for _ in range(lost - self._lost):
                self.learner.policy.count()
            self._log_counts()
        self._lost, self._gave = 0, False
        if worst == _DIVERGED:
            surrogate = self._otherwise(surrogate, error, closure_loss)
            if surrogate is not None:
                if self._vote(0)[0] == _FAILED:  # the other algorithm has no update either
                    self._raise_together(None)
            elif gave:  # the gradients of the other micro-batches are still to be reduced
                surrogate = self._no_update(closure_loss)
        for part, told in zip(self._parts, tried, strict=True):
            if told:
                part.agree(self.gather(part.tried))
        return surrogate

    def _no_update(self, closure_loss: Tensor) -> Tensor:
        """The loss, with gradients of 0."""
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        return with_precomputed_gradient(
            closure_loss.detach(), lambda _: tuple(map(torch.zeros_like, parameters)), parameters
        )

    @property
    def _decides(self) -> bool:
        return self._relaxes and self.world_size > 1 and not self._failed

    @property
    def _parts(self) -> list[Part]:
        return list(self.algorithm.parts().values())

    def _vote(self, status: int) -> list[int]:
        """The largest on all ranks of the status, and of what else is told; a collective.

        That is whether one has been sent SIGTERM, the number of lost micro-batches, whether any has added to the
        gradients, and of each part of the algorithm whether it has found out something.
        """
        own = [status, self._preemption.came, self._lost, self._gave, *(bool(part.tried) for part in self._parts)]
        found = torch.tensor(own, dtype=torch.int64, device=self.root_device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return list(map(int, found.tolist()))

    def _fail(self, error: Exception) -> None:
        """Tells the other ranks, where they next decide, that this one has failed."""
        if not self._decides:
            return
        self._failed = True
        if error is not self._untold:
            self._tell_log(error)
        with suppress(Exception):  # if they are gone, its own error counts
            self._vote(_FAILED)
            self._gathered(error)

    def _tell_log(self, error: Exception) -> None:
        """At once: what follows waits for the others."""
        log.error("Rank %d of %d failed: %s: %s", self.global_rank, self.world_size, type(error).__name__, error)

    def _gathered(self, error: Exception | None) -> list[tuple[str, bool] | None]:
        """Of each rank what it failed with, and whether that is a divergence. A collective."""
        text = f"{type(error).__name__}: {error}"
        return self.gather(None if error is None else (text, isinstance(error, RelaxationDivergedError)))

    def _raise_together(self, error: Exception | None) -> NoReturn:
        """Raises this rank's own error if it has one, else one that names the ranks that failed."""
        self._failed = True
        told = self._gathered(error)
        if error is not None:
            raise error
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
