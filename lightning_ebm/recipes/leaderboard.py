"""Algorithms x networks x data, several seeds each, as one page of accuracy, alignment and cost.

    lightning-ebm leaderboard digits
    lightning-ebm leaderboard small --dir mnist=~/mnist --dir shakespeare=~/text --page docs/leaderboard.md
    lightning-ebm leaderboard my-board.yaml

A file names them: ``algorithms``, a list of presets, or of ``{name: ..., algorithm: ..., nudge: ..., ...}`` with
settings of a fit, stock Lightning without an algorithm, and with ``seeds`` of its own; ``networks``, each
``{class_path, init_args}``, or ``{net: {class_path, init_args}, on: [data sets], without: [algorithms], fit: {...}}``
with settings of its own; ``data``, each ``{class_path, init_args}``; ``seeds``; ``fit``, settings that all of them
share; and ``title`` and ``text`` of the page. A cell whose result is there already is not trained again.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import lightning_ebm as ebm
from lightning_ebm.recipes import leaderboard_page, training
from lightning_ebm.recipes.leaderboard_page import Row
from lightning_ebm.recipes.options import check_kinds, check_names, nearest, read_mapping
from lightning_ebm.recipes.sources import DataNotFoundError

KEYS = (
    "algorithms", "networks", "data", "seeds", "fit", "reference", "monitor", "compare_every", "title", "text",
)  # fmt: skip
KINDS = {
    "algorithms": list, "networks": dict, "data": dict, "seeds": list, "fit": dict, "reference": str, "monitor": str,
    "compare_every": int, "title": str, "text": str,
}  # fmt: skip
OF_NETWORK = ("net", "on", "without", "fit")


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


def read(path: Path, folders: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """The file, checked.

    Args:
        path: of the file.
        folders: where the files of data sets are, by the names that the board gives them.

    Raises:
        ConfigurationError: it lacks a part, has one that nobody reads, or names what is not there.
    """
    board = read_mapping(path, KEYS)
    _check(path, board, KEYS)
    lacking = [key for key in ("algorithms", "networks", "data") if not board.get(key)]
    if lacking:
        raise ebm.ConfigurationError(f"{path}: {' and '.join(lacking)} must name at least one each.")
    check_kinds(f"{path}: ", board, KINDS)
    for group in ("networks", "data"):
        check_kinds(f"{path}: {group}.", board[group], dict.fromkeys(board[group], dict))
    for name, entry in board["networks"].items():
        if "class_path" not in entry:
            _check(path, entry, OF_NETWORK, f"networks.{name}.")
            for data in entry.get("on", ()):
                _named(path, f"networks.{name}.on", data, board["data"])
            for algorithm in entry.get("without", ()):
                _named(path, f"networks.{name}.without", algorithm, [_name_of(one) for one in board["algorithms"]])
    for entry in board["algorithms"]:
        preset = entry if isinstance(entry, str) else entry.get("algorithm")
        if preset is not None:
            _named(path, "algorithms", preset, ebm.algorithms())
    for name, folder in (folders or {}).items():
        _named(path, "--dir", name, board["data"])
        board["data"][name].setdefault("init_args", {})["dir"] = str(folder)
    return board


def _check(path: Path, found: Mapping[str, Any], known: tuple[str, ...], where: str = "") -> None:
    for key in found:
        if key not in known:
            raise ebm.ConfigurationError(
                f"{path}: nobody reads {where + key!r}.{nearest(key, known)} Keys: {', '.join(known)}."
            )


def _named(path: Path, where: str, name: str, known: Any) -> None:
    if name not in known:
        raise ebm.ConfigurationError(
            f"{path}: {where} names {name!r}, which is not there.{nearest(name, known)} There are: {', '.join(known)}."
        )


def cells(board: dict[str, Any]) -> Iterator[Cell]:
    """Every run; all of the first seed before the second, so that a board that is cut short is a smaller board."""
    algorithms = {_name_of(entry): entry for entry in board["algorithms"]}
    for seed in board.get("seeds", [0, 1, 2]):
        for data, of_data in board["data"].items():
            for network, entry in board["networks"].items():
                own = {"net": entry} if "class_path" in entry else entry
                if data not in own.get("on", board["data"]):
                    continue
                for name, chosen in algorithms.items():
                    options = {"algorithm": chosen} if isinstance(chosen, str) else chosen
                    if name in own.get("without", ()) or seed not in options.get("seeds", [seed]):
                        continue
                    settings = {
                        "model": "lightning_ebm.recipes.modules.Classifier",
                        "monitor": board.get("monitor", "val/accuracy"),
                        **board.get("fit", {}), **own.get("fit", {}),
                        **{key: value for key, value in options.items() if key not in ("name", "seeds")},
                        "model.net": own["net"], "data": of_data, "seed_everything": seed,
                    }  # fmt: skip
                    yield Cell(name, network, data, seed, settings)


def _name_of(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else str(entry.get("name", entry.get("algorithm", "stock")))


def kept(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The result that is there, if its settings are those of now; where files lay does not matter."""
    path = folder / "cell.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if _comparable(found["settings"]) == _comparable(cell.settings) else None


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    plain["data"].get("init_args", {}).pop("dir", None)
    return plain


def train(cell: Cell, folder: Path, every: int) -> dict[str, Any]:
    """The result of one run, kept in ``cell.json``.

    A relaxation that runs away is a result, and so is the library's refusal of what an algorithm cannot do; a data set
    that is not there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    words = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in cell.settings.items()
    ]
    if "algorithm" in cell.settings:
        options = {"every_n_steps": every}
        callbacks = [
            {"class_path": "lightning_ebm.GradientAlignment", "init_args": options},
            {"class_path": "lightning_ebm.RelaxationMonitor", "init_args": options | {"regime_every_n_steps": None}},
        ]
        words.append(f"--trainer.callbacks={json.dumps(callbacks)}")
    words += [
        f"--trainer.default_root_dir={folder}", "--wandb=off", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    check_names(words)  # a word that is misspelt is no refusal of an algorithm
    try:
        training.main(["fit", *words])
        result = json.loads((folder / "result.json").read_text())
    except DataNotFoundError as error:
        return {"missing": str(error)}
    except ebm.RelaxationDivergedError as error:
        result = {"failed": "diverged", "because": str(error)}
    except ebm.EBMError as error:
        result = {"failed": "refused", "because": str(error)}
    found = {"settings": cell.settings, **result}
    (folder / "cell.json").write_text(json.dumps(found, indent=1))
    return found


def main(
    file: Path,
    root: Path = Path("runs/leaderboards"),
    folders: Mapping[str, Path] | None = None,
    page: Path | None = None,
    trains: bool = True,
) -> list[Row]:
    """Trains what is missing, prints the table, and writes it as a page, with its figure, and as a table.

    Args:
        file: the leaderboard.
        root: folder of results; those of this file go to a folder with its name.
        folders: where the files of data sets are, by the names that the board gives them.
        page: where the page goes, and its figure to ``images/`` beside it; ``leaderboard.md`` among the results if not
            given.
        trains: whether what is missing is trained; else the page tells of what is there.

    Raises:
        ConfigurationError: a file that means nothing; or there is not one result.
    """
    board, folder, console = read(file, folders), root / file.stem, Console()
    if not console.is_terminal:
        console.width = 160
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    results: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    absent: dict[str, str] = {}
    todo = list(cells(board))
    for number, cell in enumerate(todo, 1):
        found = kept(cell, folder / cell.folder)
        if found is None and trains and cell.data not in absent:
            console.print(f"{number} of {len(todo)}: {cell.folder}", highlight=False, soft_wrap=True)
            found = train(cell, folder / cell.folder, board.get("compare_every", 10))
            if "missing" in found:
                absent[cell.data] = found["missing"]
                console.print(f"Left out, as its files are not there: {cell.data}. {found['missing']}")
                found = None
        if found is not None:
            results.setdefault((cell.data, cell.network, cell.algorithm), []).append(found)
    if not results:
        remedy = "no data set of it is there, see --dir" if trains else "leave --no-train out, or say --root"
        raise ebm.ConfigurationError(f"There are no results of {file.name} in {folder}: {remedy}.")
    rows = leaderboard_page.rows(board, results)
    leaderboard_page.show(rows, console, file.stem)
    written = leaderboard_page.write(board, rows, page or folder / "leaderboard.md", file.stem)
    leaderboard_page.as_csv(rows, folder / "leaderboard.csv")
    console.print(f"written to {written}", highlight=False, soft_wrap=True)
    return rows
