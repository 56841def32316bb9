"""What a run left behind, read from its directory: of CSVLogger, or of Weights & Biases (offline or not)."""

import csv
import difflib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from lightning_ebm import notebook
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.reports.advice import verdict
from lightning_ebm.reports.records import read_records

FILE_NAME = "ebm.jsonl"
"""Written by this library's callbacks, beside the logger's own files."""

T = TypeVar("T")
Series = list[tuple[int, float]]


@dataclass
class Run:
    """One training run.

    Attributes:
        path: its directory.
        metrics: every logged scalar, ``{name: [(global step, value), ...]}``, in the order of the steps.
        records: of the run's file, in the order of writing; empty where no callback of this library wrote one.
    """

    path: Path
    metrics: dict[str, Series] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, str]:
        """What run it is: name, date, device, seed, optimizer, batch size, versions, git commit, as far as known."""
        found: dict[str, str] = {}
        for record in self.records:
            found |= {name: str(value) for name, value in record.get("run", {}).items() if name != "seconds"}
        return found

    @property
    def seconds(self) -> float | None:
        """How long it trained, all of its fits together; None where that is not known."""
        parts = [record["run"]["seconds"] for record in self.records if "seconds" in record.get("run", {})]
        return float(sum(parts)) if parts else None

    @property
    def name(self) -> str:
        """Its own; where it has none, its directory's."""
        whole = self.path.resolve()
        return self.facts.get("name") or f"{whole.parent.name}/{whole.name}"

    def _repr_html_(self) -> str:
        word, sentence = verdict(self.records)
        last = [(name, f"{series[-1][1]:.4g}") for name, series in self.metrics.items() if name.count("/") < 2]
        return notebook.table(f"{self.name}: {word}, {sentence}", (), [*self.facts.items(), *last])

    @property
    def settings(self) -> dict[str, str]:
        """Of the algorithm, as `EBMStrategy.describe` gives them."""
        found: dict[str, str] = {}
        for record in self.records:
            found |= record.get("settings", {})
        return found

    @property
    def relaxations(self) -> list[tuple[int, dict[str, Any]]]:
        """Recorded relaxations by global step: status, steps, layers, and a `TraceEntry` a phase."""
        return [(record["step"], record["relaxation"]) for record in self.records if "relaxation" in record]

    @property
    def complete_relaxations(self) -> list[tuple[int, dict[str, Any]]]:
        """Those recorded with their whole curves; of those kept thin only the ends are known."""
        return [
            (step, one)
            for step, one in self.relaxations
            if one["phases"] and all(len(phase["step_size"]) + 1 == len(phase["loss"]) for phase in one["phases"])
        ]

    @property
    def curvatures(self) -> list[tuple[int, dict[str, Any]]]:
        """Measured curvatures by global step, see `Curvature.as_dict`."""
        return [(record["step"], record["curvature"]) for record in self.records if "curvature" in record]

    @property
    def regimes(self) -> list[tuple[int, dict[str, Any]]]:
        """Measured regimes by global step, see `Regime.as_dict`."""
        return [(record["step"], record["regime"]) for record in self.records if "regime" in record]

    @property
    def angle_by_layer(self) -> list[tuple[int, dict[str, float | None]]]:
        """Angle of each layer's update to the true gradient in degrees, by global step; None where it is dead.

        As it was recorded, where it was: near 0 the angle resolves what the rounded cosine does not.
        """
        recorded = {record["step"]: record["angles"] for record in self.records if "angles" in record}
        return [
            (step, {name: recorded.get(step, {}).get(name, _angle(cosine)) for name, cosine in row.items()})
            for step, row in self.alignment_by_layer
        ]

    @property
    def alignment_by_layer(self) -> list[tuple[int, dict[str, float | None]]]:
        """Cosine of each layer by global step, None where it is dead; from the logged scalars if there is no file."""
        rows: dict[int, dict[str, float | None]] = {}
        for record in self.records:
            if "alignment" in record:
                rows[record["step"]] = record["layers"]
        if not rows:
            prefix = "alignment/layer/cosine/"
            for name, series in self.metrics.items():
                if name.startswith(prefix):
                    for step, value in series:
                        rows.setdefault(step, {})[name.removeprefix(prefix)] = value
        return sorted(rows.items())


def read(path: str | Path) -> Run:
    """Reads the directory of a run: the one with metrics.csv, or a W&B one such as ``wandb/offline-run-...``.

    A directory above runs, such as ``runs/digits``, stands for the newest of them.

    Raises:
        ConfigurationError: there is no such directory, or it holds no run.
    """
    directory = _newest(Path(path))
    inside = directory / "files"
    home = inside if (inside / FILE_NAME).exists() else directory
    records = read_records(home / FILE_NAME)
    written = sorted([*directory.glob("run-*.wandb"), *directory.parent.glob("run-*.wandb")])
    if (table := home / "metrics.csv").exists():
        return Run(directory, _by_step(_rows_of_csv(table)), records)
    if written:
        return Run(directory, _by_step(_rows_of_wandb(written[0].parent)), records)
    if records:
        return Run(directory, {}, records)
    if directory.is_file():
        raise ConfigurationError(f"{directory} is a file; expected the directory of a run, such as {directory.parent}.")
    if not directory.is_dir():
        near = difflib.get_close_matches(directory.name, _beside(directory), n=1)
        hint = f" Did you mean {directory.parent / near[0]}?" if near else ""
        raise ConfigurationError(f"There is no directory {directory}.{hint}")
    raise ConfigurationError(
        f"{directory} holds no run: expected metrics.csv (CSVLogger), run-*.wandb (Weights & Biases) or {FILE_NAME}."
        " Give the directory of one run, such as lightning_logs/version_0 or wandb/offline-run-20260101_120000-abcd."
    )


def _newest(directory: Path) -> Path:
    """The run meant by a directory: itself, or the one written last among those below it."""
    if any(_is_run(place) for place in (directory, directory / "files")):
        return directory
    below = [place for pattern in _BELOW for place in directory.glob(pattern) if _is_run(place)]
    return max(below, key=lambda place: place.stat().st_mtime, default=directory)


_BELOW = ("*", "lightning_logs/*", "wandb/*run-*")


def _is_run(place: Path) -> bool:
    return (place / "metrics.csv").exists() or (place / FILE_NAME).exists() or any(place.glob("run-*.wandb"))


def _beside(directory: Path) -> list[str]:
    return [place.name for place in directory.parent.iterdir()] if directory.parent.is_dir() else []


def _angle(cosine: float | None) -> float | None:
    return None if cosine is None else math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def _rows_of_csv(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """Its rows; what was cut off in writing is not told from a whole row, and one without a step is left out."""
    try:
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row.get("step"):
                    yield int(float(row["step"])), {key: value for key, value in row.items() if value and key != "step"}
    except (ValueError, csv.Error) as error:  # also what is no text
        raise ConfigurationError(
            f"{path} is no table of CSVLogger, or damaged: {error}. Without it the page is made of {FILE_NAME}."
        ) from error


def _rows_of_wandb(directory: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """By W&B's own reader, as the format is its own affair."""
    if find_spec("wandb") is None:
        raise ConfigurationError(f"{directory} is a run of Weights & Biases: pip install wandb to read it.")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigurationError(
            f"wandb {version('wandb')} cannot read {directory}. It takes 0.31 or newer, whatever wrote the run (pip"
            f" install 'wandb>=0.31'), and a run that is whole. It said: {done.stderr.strip()}"
        )
    for line in done.stdout.splitlines():
        record = json.loads(line) if line.strip() else {}
        if record.get("type") == "history":
            row = _history(record)
            step = row.get("trainer/global_step")
            if isinstance(step, int | float):
                yield int(step), row


def _history(record: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values of one row, however this version of W&B writes them."""
    body = record.get("history", record.get("data", record))
    items = body.get("item", body.get("items", body)) if isinstance(body, Mapping) else body
    if isinstance(items, Mapping):
        return dict(items)
    found = {}
    for item in items:
        key = item.get("key") or "/".join(item.get("nested_key", []))
        value = item.get("value_json", item.get("value"))
        found[key] = json.loads(value) if isinstance(value, str) else value
    return found


def _by_step(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for step, row in rows:
        for name, value in row.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if not math.isnan(number):
                found.setdefault(name, []).append((step, number))
    return {name: sorted(series, key=lambda pair: pair[0]) for name, series in found.items()}


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly over the whole, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]
