"""What a strategy needs a callback for: exact resume, and closing W&B runs of processes that just vanish."""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.distributed.checkpoint.stateful import Stateful

from lightning_ebm.learner import Learner
from lightning_ebm.plain_state import RandomState

log = logging.getLogger(__name__)

KEY = "lightning_ebm"
"""Where a checkpoint holds what is below; a stock Trainer looks past it."""


class ExactResume(Callback):
    """Added by every strategy of this library to its Trainer.

    Lightning's checkpoints hold weights, optimizers, schedulers, loops and callbacks. What a run that goes on has
    beyond that are its random generators, on each rank, and its place in the data. With them a run that is stopped and
    resumed on as many ranks ends bit by bit where it would have ended. A loader that saves its own place (one with
    `state_dict`) is left to itself; any other is read again up to where it was.

    Args:
        gather: gives the list of what every rank has, on every rank.
        learner: gives the engine, whose algorithm may carry something from step to step.
    """

    def __init__(self, gather: Callable[[Any], list[Any]], learner: Callable[[], Learner]) -> None:
        self._gather = gather
        self._learner = learner
        self._resume: dict[str, Any] | None = None
        self._epoch_start: dict[str, Any] = {}
        self._before_batch: RandomState | None = None
        self._iterator_is_new = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds this rank's generators, and how many batches of the epoch are done."""
        batch: Any = trainer.fit_loop.epoch_loop.batch_progress  # Lightning declares less than it holds
        epoch: Any = trainer.fit_loop.epoch_progress.current
        done = batch.current.processed  # less than `ready` if this is in the middle of a batch, which is done again
        batches = 0 if batch.is_last_batch and done == batch.current.ready else done
        now = RandomState(pl_module).state_dict()
        if done < batch.current.ready:  # the batch is done again, from the numbers that it began with
            now = self._before_batch.state_dict() if done and self._before_batch is not None else self._epoch_start
        mine = {"batches": batches, "epoch_start": self._epoch_start, "now": now}
        mine["algorithm"] = self._learner().state_dict()
        checkpoint[KEY] = {"ranks": self._gather(mine), "cut_short": batches > 0 and epoch.processed == epoch.ready}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Finds what this rank had."""
        ranks = checkpoint.get(KEY, {}).get("ranks", [])
        if ranks and checkpoint[KEY]["cut_short"]:  # by max_steps or early stopping, which Lightning takes for its end
            for count in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                count["processed"] = count["completed"] = count["ready"] - 1
        self._resume = ranks[trainer.global_rank] if len(ranks) == trainer.world_size else None
        if ranks:
            self._learner().load_state_dict(ranks[min(trainer.global_rank, len(ranks) - 1)]["algorithm"])
        if ranks and self._resume is None:
            log.warning(
                "The checkpoint is of a run on %d ranks, resumed on %d: batches and random draws are not the same.",
                len(ranks),
                trainer.world_size,
            )

    def loader(self, trainer: Trainer, dataloader: Any) -> Any:
        """The training loader, about to be iterated: with the generators as they were when the epoch began."""
        random = RandomState(trainer.lightning_module)
        if self._resume is None:
            self._epoch_start = random.state_dict()
        else:
            batches = self._resume["batches"]
            self._epoch_start = self._resume["epoch_start" if batches else "now"]
            random.load_state_dict(self._epoch_start)
            random.restore()
            if batches and not isinstance(dataloader, Stateful):
                log.info("The first %d batches of the epoch are read again, and skipped.", batches)
                dataloader = _ahead(dataloader, batches, random)
        self._iterator_is_new = True
        return dataloader

    def begin(self, trainer: Trainer) -> None:
        """The first batch is next: generators as they were when the checkpoint was written in mid-epoch."""
        if self._resume is not None and self._resume["batches"]:
            self._go_on(trainer.lightning_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the generators, unless the loader's iterator has been made already."""
        if not self._iterator_is_new:
            if self._resume is not None:  # a checkpoint of after the last batch, whose epoch had to be closed first
                self._go_on(pl_module)
            self._epoch_start = RandomState(pl_module).state_dict()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on the run is its own."""
        self._resume = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the generators as the next batch finds them, if it is the one that is cut off."""
        self._before_batch = RandomState(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same; what validation draws comes between two batches."""
        self._before_batch = RandomState(pl_module)

    def _go_on(self, pl_module: LightningModule) -> None:
        assert self._resume is not None
        random = RandomState(pl_module)
        random.load_state_dict(self._resume["now"])
        random.restore()
        self._resume = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next epoch makes an iterator of its own."""
        self._iterator_is_new = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finishes W&B runs of launched processes, which end without running what Python runs at its exit."""
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish()


def _ahead(loader: Any, batches: int, random: RandomState) -> Any:
    """The loader, whose first pass starts some batches later, drawing nothing from the generators to get there.

    Python looks `__iter__` up in the class, so the loader is of a subclass of its own until that pass begins. What has
    no class to change, as a list, has nothing that anybody asks for either but its batches.

    Args:
        loader: the loader.
        batches: how many to skip.
        random: tells which generators.
    """
    kind = type(loader)

    def ahead(self: Any) -> Iterator[Any]:
        self.__class__ = kind
        return _skipping(iter(self), batches, random.of_now())

    try:
        loader.__class__ = type(kind.__name__, (kind,), {"__iter__": ahead})
    except TypeError:
        return _Plain(loader, batches, random)
    return loader


class _Plain:
    """The same for what cannot be of another class."""

    def __init__(self, loader: Any, batches: int, random: RandomState) -> None:
        self._loader = loader
        self._batches = batches
        self._random = random

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches, self._batches = self._batches, 0
        return _skipping(iter(self._loader), batches, self._random.of_now())


def _skipping(iterator: Iterator[Any], batches: int, at_start: RandomState) -> Iterator[Any]:
    now = at_start.of_now()
    at_start.restore()
    for _ in itertools.islice(iterator, batches):
        """Read, as samplers and augmentations draw in reading."""
    now.restore()
    yield from iterator
