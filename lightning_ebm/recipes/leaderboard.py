"""Algorithms x networks x data, several seeds each, as one table of accuracy, alignment and cost.

    lightning-ebm leaderboard digits
    lightning-ebm leaderboard my-board.yaml

A file names them: ``algorithms``, a list of presets, or of ``{name: ..., algorithm: ..., nudge: ..., ...}`` with
settings of a fit; ``networks`` and ``data``, each ``{name: {class_path, init_args}}``; ``seeds``; and ``fit``, settings
that all of them share. A cell whose result is there already is not trained again.
"""

import csv
import json
import logging
import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

import lightning_ebm as ebm
from lightning_ebm.pages import degrees
from lightning_ebm.recipes import training
from lightning_ebm.recipes.options import nearest

KEYS = ("algorithms", "networks", "data", "seeds", "fit", "reference", "monitor", "compare_every")
HEADERS = ("data", "network", "algorithm", "accuracy", "cosine", "angle", "cost of a step", "seeds")


@dataclass(frozen=True)
class Cell:
    """One training run of the board."""

    algorithm: str
    network: str
    data: str
    seed: int
    settings: dict[str, Any]

    @property
    def folder(self) -> str:
        return f"{self.data}/{self.network}/{self.algorithm}/seed-{self.seed}"


def read(path: Path) -> dict[str, Any]:
    """The file, checked.

    Raises:
        ConfigurationError: it lacks a part, or has one that nobody reads.
    """
    board = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(board, dict):
        raise ebm.ConfigurationError(f"{path}: expected a mapping with {', '.join(KEYS)}.")
    for key in board:
        if key not in KEYS:
            raise ebm.ConfigurationError(f"{path}: nobody reads {key!r}.{nearest(key, KEYS)} Keys: {', '.join(KEYS)}.")
    lacking = [key for key in ("algorithms", "networks", "data") if not board.get(key)]
    if lacking:
        raise ebm.ConfigurationError(f"{path}: {' and '.join(lacking)} must name at least one each.")
    return board


def cells(board: dict[str, Any]) -> Iterator[Cell]:
    """Every run, seeds innermost; the settings are those of one fit."""
    for data, of_data in board["data"].items():
        for network, of_network in board["networks"].items():
            for entry in board["algorithms"]:
                own = {"name": entry, "algorithm": entry} if isinstance(entry, str) else dict(entry)
                name = own.pop("name", own.get("algorithm"))
                for seed in board.get("seeds", [0, 1, 2]):
                    settings = {
                        "model": "lightning_ebm.recipes.modules.Classifier", "model.net": of_network,
                        **board.get("fit", {}), **own, "data": of_data, "seed_everything": seed,
                    }  # fmt: skip
                    yield Cell(name, network, data, seed, settings)


def train(cell: Cell, folder: Path, monitor: str, every: int) -> dict[str, Any]:
    """The result of one run, kept in ``cell.json``; a relaxation that runs away is a result too."""
    kept = folder / "cell.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        if found["settings"] == json.loads(json.dumps(cell.settings)):
            return found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    words = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in cell.settings.items()
    ]
    callback = {"class_path": "lightning_ebm.GradientAlignment", "init_args": {"every_n_steps": every}}
    words += [
        f"--trainer.callbacks={json.dumps([callback])}", f"--trainer.default_root_dir={folder}", f"--monitor={monitor}",
        "--wandb=off", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    try:
        training.main(["fit", *words])
        result = json.loads((folder / "result.json").read_text())
    except ebm.RelaxationDivergedError as error:
        result = {"failed": "diverged", "because": str(error)}
    found = {"settings": cell.settings, **result}
    kept.write_text(json.dumps(found, indent=1))
    return found


def spread(values: Sequence[float], shown: str) -> str:
    """Mean and, of several, the standard deviation."""
    mean = shown.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {shown.format(statistics.stdev(values))}"


def rows(board: dict[str, Any], results: Sequence[tuple[Cell, dict[str, Any]]]) -> Iterator[tuple[str, ...]]:
    """The table; costs are relative to the reference on the same network and data."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell, result in results:
        groups.setdefault((cell.data, cell.network, cell.algorithm), []).append(result)
    for (data, network, algorithm), found in groups.items():
        good = [result for result in found if "last" in result]
        if not good:
            yield data, network, algorithm, found[0]["failed"], "", "", "", f"0 of {len(found)}"
            continue
        cosines = [result["cosine"] for result in good if result.get("cosine") is not None]
        unit = [
            r["step_ms"] for r in groups.get((data, network, board.get("reference", "backprop")), ()) if "last" in r
        ]
        own = statistics.median(result["step_ms"] for result in good)
        cost = f"{own / statistics.median(unit):.1f}" if unit else f"{own:.1f} ms"
        seeds = str(len(found)) if len(good) == len(found) else f"{len(good)} of {len(found)}"
        accuracy = spread([result["last"] for result in good], "{:.4f}")
        angles = [math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) for cosine in cosines]
        aligned = (spread(cosines, "{:.4f}"), degrees(statistics.mean(angles))) if cosines else ("", "")
        yield data, network, algorithm, accuracy, *aligned, cost, seeds


def main(file: Path, root: Path = Path("runs/leaderboards")) -> list[tuple[str, ...]]:
    """Trains what is missing, prints the table, and writes it as ``leaderboard.md`` and ``leaderboard.csv``.

    Args:
        file: the leaderboard.
        root: folder of results; those of this file go to a folder with its name.
    """
    board, folder, console = read(file), root / file.stem, Console()
    if not console.is_terminal:
        console.width = 140
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    results: list[tuple[Cell, dict[str, Any]]] = []
    every = board.get("compare_every", 10)
    todo = list(cells(board))
    for number, cell in enumerate(todo, 1):
        console.print(f"{number} of {len(todo)}: {cell.folder}", highlight=False, soft_wrap=True)
        results.append((cell, train(cell, folder / cell.folder, board.get("monitor", "val/accuracy"), every)))
    found = list(rows(board, results))
    table = Table(*HEADERS, title=f"{file.stem}: {len(board.get('seeds', [0, 1, 2]))} seeds, last epoch")
    for row in found:
        table.add_row(*row)
    console.print(table)
    lines = [HEADERS, ("---",) * len(HEADERS), *found]
    (folder / "leaderboard.md").write_text("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    with (folder / "leaderboard.csv").open("w", newline="") as out:
        csv.writer(out).writerows([HEADERS, *found])
    console.print(f"written to {folder / 'leaderboard.md'}", highlight=False, soft_wrap=True)
    return found
