"""One file a run, beside what its logger writes: what a table of scalars cannot hold, for reports and plots."""

import json
import math
import time
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

from lightning_ebm.callbacks.loggers import observing, run_directory, tell_settings
from lightning_ebm.callbacks.run_facts import batch_size, facts
from lightning_ebm.harmless import harmless
from lightning_ebm.reports.runs import FILE_NAME

_writers: "WeakKeyDictionary[Trainer, RunFile]" = WeakKeyDictionary()


class RunFile:
    """Appends records to ``ebm.jsonl`` in the run's directory; on rank 0, and only where a logger makes one."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._told: dict[str, Any] | None = None
        self._said: set[str] = set()
        self._started, self._first = 0.0, False

    def begin(self, trainer: Trainer) -> None:
        """Finds the directory; writes what run this is, unless another callback of the same fit has done so."""
        directory = run_directory(trainer) if trainer.is_global_zero else None
        self.path = None if directory is None else directory / FILE_NAME
        self._told = None
        self._said = set()
        self._started = time.monotonic()
        self._first = self.path is not None and _writers.setdefault(trainer, self) is self
        if self._first and directory is not None:
            with observing(trainer, "Noting what run this is"):
                self.add({"run": facts(trainer, directory)})

    def end(self, trainer: Trainer) -> None:
        """Writes how long it took, and with batches of which size."""
        if self._first:
            self._first = False
            _writers.pop(trainer, None)
            ended: dict[str, Any] = {"seconds": time.monotonic() - self._started}
            with observing(trainer, "Noting what run this was"):  # loaders are made after a fit has started
                ended |= {"batch size": batch_size(trainer)}
            self.add({"run": ended})

    def tell(self, trainer: Trainer, settings: dict[str, Any]) -> None:
        """The strategy's settings, here and to every logger; again when they have changed, as a relaxer was chosen."""
        if settings != self._told:
            self._told = settings
            tell_settings(trainer, settings)
            self.add({"settings": settings})

    def add(self, record: dict[str, Any]) -> None:
        """One line of JSON, whole: a run that is killed leaves a file that can be read."""
        if self.path is not None:
            with harmless(f"Writing to {self.path}", self._said):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps(_plain(record)) + "\n")


def _plain(value: Any) -> Any:
    """Six significant digits; nan and infinities, which JSON does not know, as None and words."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return float(f"{value:.6g}") if math.isfinite(value) else math.copysign(1e308, value)
    return value
