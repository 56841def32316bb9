"""What each of a Trainer's loggers is told and shown.

Everything is for rank 0 alone, and nothing passes `step=` to W&B's own run, which would drop rows that come late: the
step is a column, as in WandbLogger's rows. A logger that fails, or a picture that cannot be drawn, is one line in the
log, see `harmless`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_ebm.harmless import harmless

GLOBAL_STEP = "trainer/global_step"

_said: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()


def observing(trainer: Trainer, what: str) -> AbstractContextManager[None]:
    """`harmless`, once for every Trainer."""
    return harmless(what, _said.setdefault(trainer, set()))


def mean_of(told: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over devices of each figure, over those that have a number for it; nan where none has."""
    found = {}
    for key in dict.fromkeys(key for one in told for key in one):
        numbers = [one[key] for one in told if key in one and not math.isnan(one[key])]
        found[key] = sum(numbers) / len(numbers) if numbers else math.nan
    return found


def log_scalars(
    trainer: Trainer, module: LightningModule, values: Mapping[str, float], in_progress_bar: Sequence[str] = ()
) -> None:
    """To every logger, at the step where they were measured, and into `trainer.callback_metrics`.

    Not by `module.log`: it goes through every key it has ever seen at every later step, and there are five a parameter.
    """
    with _within_the_hook(trainer, module):
        for key in in_progress_bar:
            module.log(key, values[key], prog_bar=True, logger=False, on_step=True, on_epoch=False)
    known = {key: value for key, value in values.items() if not math.isnan(value)}
    trainer.callback_metrics.update({key: torch.tensor(value, dtype=torch.float32) for key, value in known.items()})
    for logger in trainer.loggers:
        with observing(trainer, f"Logging metrics to {type(logger).__name__}"):
            logger.log_metrics(_named_for(logger, known), step=trainer.global_step)


@contextmanager
def _within_the_hook(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Within it `log` is to Lightning no call by another hook, which at the first batch is the beginning of an epoch.

    What a training step has logged before a `manual_backward`, or when an optimizer called it before, would not count
    in the epoch's mean.
    """
    connector = trainer._logger_connector
    before, connector._current_fx = connector._current_fx, module._current_fx_name
    try:
        yield
    finally:
        connector._current_fx = before


def _named_for(logger: Logger, values: Mapping[str, float]) -> dict[str, float]:
    """MLflow keeps metrics as files in folders, and "alignment/cosine" cannot be both: it is "alignment/cosine/all"."""
    if not isinstance(logger, MLFlowLogger):
        return dict(values)
    folders = {parent for key in values for parent in _parents(key)}
    return {f"{key}/all" if key in folders else key: value for key, value in values.items()}


def _parents(key: str) -> list[str]:
    parts = key.split("/")
    return ["/".join(parts[:k]) for k in range(1, len(parts))]


def tell_settings(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Puts the strategy's settings into the configuration of every logger, under "ebm"."""
    for logger in trainer.loggers:
        with observing(trainer, f"Telling {type(logger).__name__} the settings"):
            logger.log_hyperparams({"ebm": dict(settings)})


def define(trainer: Trainer, keys: Iterable[str], summary: str | None = None, hidden: bool = False) -> None:
    """Tells W&B the axis of exact keys, and which figures of them belong in the run's summary.

    Args:
        trainer: whose.
        keys: to be logged.
        summary: such as "min,max,mean,last".
        hidden: they are kept with the others, and W&B draws no chart of them by itself.
    """
    for run in _wandb_runs(trainer):
        with observing(trainer, "Defining the axes of W&B"):
            for key in keys:
                run.define_metric(key, step_metric=GLOBAL_STEP, summary=summary, hidden=hidden or None)


def log_wandb(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """A row that only W&B can show.

    Args:
        trainer: whose.
        values: by name; tables and histograms as functions that make them, None being nothing to show.
    """
    runs = _wandb_runs(trainer)
    row: dict[str, Any] = {}
    for key, value in values.items() if runs else ():
        with observing(trainer, f"Drawing {key!r}"):
            made = value() if callable(value) else value
            row |= {} if made is None else {key: made}
    for run in runs if row else ():
        with observing(trainer, "Logging a row to W&B"):
            run.log({**row, GLOBAL_STEP: trainer.global_step})


def log_figure(trainer: Trainer, key: str, draw: Callable[[], Any]) -> None:
    """A matplotlib figure, to every logger that has a call for one; None is nothing to show."""
    if not trainer.is_global_zero or not trainer.loggers:
        return
    figure = None
    with observing(trainer, f"Drawing {key!r}"):
        figure = draw()
    for logger in trainer.loggers if figure is not None else ():
        with observing(trainer, f"Logging {key!r} to {type(logger).__name__}"):
            _log_figure(trainer, logger, key, figure)


def _log_figure(trainer: Trainer, logger: Logger, key: str, figure: Any) -> None:
    experiment = getattr(logger, "experiment", None)
    if isinstance(logger, WandbLogger):
        import wandb

        logger.experiment.log({key: wandb.Image(figure), GLOBAL_STEP: trainer.global_step})
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(key, figure, trainer.global_step)
    elif hasattr(experiment, "log_figure"):  # MLflow's client, Comet's experiment
        _log_figure_by_name(logger, experiment, key, figure)


def _log_figure_by_name(logger: Logger, experiment: Any, key: str, figure: Any) -> None:
    run_id = getattr(logger, "run_id", None)
    if run_id is not None:
        experiment.log_figure(run_id, figure, f"{key}.png")
    else:
        experiment.log_figure(figure_name=key, figure=figure)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """W&B's, of all rows at once: one file a run; None where there are no rows."""
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows]) if rows else None


def histogram(values: Sequence[float]) -> Any:
    """W&B's, of the finite ones among the values; None where there are none.

    To six digits: between values that differ by rounding alone there is no room for bins.
    """
    import wandb

    finite = [float(f"{value:.6g}") for value in values if math.isfinite(value)]
    return wandb.Histogram(finite) if finite else None


def has_wandb(trainer: Trainer) -> bool:
    """Whether this process writes a W&B run."""
    return bool(_wandb_runs(trainer))


def run_directory(trainer: Trainer) -> Path | None:
    """Where files that belong to this run lie: W&B's files, or the log directory; None without any logger.

    Not `trainer.log_dir`, which is a collective: this is asked on the first rank alone.
    """
    with observing(trainer, "Finding the directory of the run"):
        for run in _wandb_runs(trainer):
            return Path(run.dir)
        for logger in trainer.loggers[:1]:
            own = isinstance(logger, CSVLogger | TensorBoardLogger)
            directory = logger.log_dir if own else logger.save_dir
            return None if directory is None else Path(directory)
    return None


def _wandb_runs(trainer: Trainer) -> list[Any]:
    if not trainer.is_global_zero:
        return []
    found = []
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            with observing(trainer, "Asking for the W&B run"):
                found.append(logger.experiment)
    return found
