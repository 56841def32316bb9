"""The trials of a Weights & Biases sweep file, run here by Optuna.

    lightning-ebm sweep digits-relaxer
    lightning-ebm sweep my-sweep.yaml --count 20

The same file on a server: ``wandb sweep FILE`` and then ``wandb agent ID``. Grid, random and Bayesian search are
Optuna's samplers (`GridSampler`, `RandomSampler`, `TPESampler`); what it does not draw is the server's.
"""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.recipes.options import check_kinds, read_mapping
from lightning_ebm.recipes.sweep_page import write

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

DISTRIBUTIONS = ("uniform", "int_uniform", "log_uniform_values", "q_uniform")
METHODS = ("grid", "random", "bayes")
_FAILED = "failed"
"""The attribute of a trial that has run and failed; one that was interrupted has none, and is run again."""


class SweepError(ConfigurationError):
    """A sweep file that cannot be run here."""


class _TrialFailed(Exception):
    """Tells Optuna that a trial has no value."""


def flat(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Nested parameters by their dotted names."""
    found: dict[str, dict[str, Any]] = {}
    for name, spec in parameters.items():
        check_kinds("parameters: ", {name: spec}, {name: dict})
        if "parameters" in spec:
            found |= flat(spec["parameters"], f"{prefix}{name}.")
        else:
            found[prefix + name] = spec
    return found


def suggested(trial: "Trial", name: str, spec: Mapping[str, Any]) -> Any:
    """One value: a constant, one of a list, or a number from a distribution.

    Raises:
        SweepError: a distribution that is not drawn here.
    """
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return trial.suggest_categorical(name, _choices(spec))
    both_whole = isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int)
    kind = spec.get("distribution", "int_uniform" if both_whole else "uniform")
    if kind not in DISTRIBUTIONS or "min" not in spec or "max" not in spec:
        raise SweepError(
            f"{name}: distribution {kind!r} is not drawn here; there are value, values, and with min and max"
            f" {', '.join(DISTRIBUTIONS)}."
        )
    low, high = float(spec["min"]), float(spec["max"])
    if kind == "int_uniform":
        return trial.suggest_int(name, int(low), int(high))
    return trial.suggest_float(name, low, high, log="log" in kind, step=spec.get("q") if kind == "q_uniform" else None)


def _choices(spec: Mapping[str, Any]) -> list[Any]:
    """The values of a list, lists and mappings among them as the JSON that a command line takes."""
    return [json.dumps(value) if isinstance(value, list | dict) else value for value in spec["values"]]


def sampler_of(sweep: Mapping[str, Any], seed: int) -> "BaseSampler":
    """What chooses the settings of a trial.

    Raises:
        SweepError: a grid over a range, or probabilities.
    """
    from optuna.samplers import GridSampler, RandomSampler, TPESampler

    parameters = {name: spec for name, spec in flat(sweep["parameters"]).items() if "value" not in spec}
    for name, spec in parameters.items():
        if "probabilities" in spec:
            raise SweepError(f"{name}: probabilities are not drawn here. Leave them out, or run `wandb sweep`.")
        if sweep["method"] == "grid" and "values" not in spec:
            raise SweepError(f"{name}: a grid needs value or values, and this is a range. Use method: random.")
    if sweep["method"] == "grid":
        return GridSampler({name: _choices(spec) for name, spec in parameters.items()}, seed=seed)
    if sweep["method"] == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed)


def count_of(sweep: Mapping[str, Any], count: int | None) -> int:
    """How many trials there are to be: the whole grid, or as many as were asked for.

    Raises:
        SweepError: a search without an end.
    """
    for name, number in (("--count", count), ("run_cap", sweep.get("run_cap"))):
        if number is not None:
            checked.count("", name, number)
    most = count if count is not None else sweep.get("run_cap")
    if sweep["method"] == "grid":
        whole = math.prod(len(spec["values"]) for spec in flat(sweep["parameters"]).values() if "values" in spec)
        return whole if most is None else min(whole, most)
    if most is None:
        raise SweepError(f"A {sweep['method']} search goes on for ever: say --count, or run_cap in the file.")
    return int(most)


def command(sweep: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The trial's command line, the file's macros filled in as the agent does."""
    pairs = [f"{name}={json.dumps(v) if isinstance(v, list | dict) else v}" for name, v in settings.items()]
    macros: dict[str, list[str]] = {
        "${env}": [],
        "${interpreter}": [sys.executable],
        "${program}": [sweep.get("program", "")],
        "lightning-ebm": [sys.executable, "-m", "lightning_ebm_cli"],
        "${args}": [f"--{pair}" for pair in pairs],
        "${args_no_hyphens}": pairs,
    }
    parts: list[str] = []
    for word in sweep.get("command", ["${interpreter}", "${program}", "${args}"]):
        parts += macros.get(word, [sys.executable if word == "python" else word])
    return parts


def study_of(sweep: Mapping[str, Any], folder: Path, seed: int) -> "Study":
    """The study of this file, with the trials that there have been; kept in the folder, and gone on with from there.

    Raises:
        SweepError: Optuna is not installed, or the folder holds trials of another file.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise SweepError('Trials are run by Optuna: pip install "lightning-ebm[sweep]".') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # of a trial that failed the console tells
    sampler = sampler_of(sweep, seed)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))),
        sampler=sampler,
        study_name=folder.name,
        direction="maximize" if _is_maximized(sweep) else "minimize",
        load_if_exists=True,
    )
    asked = json.dumps([sweep.get(key) for key in ("method", "metric", "parameters", "command", "program")] + [seed])
    before = study.user_attrs.get("asked")
    if before not in (None, asked):
        raise SweepError(f"{folder} holds trials of another version of this file. Say --root, or move them away.")
    study.set_user_attr("asked", asked)
    return study


def _is_maximized(sweep: Mapping[str, Any]) -> bool:
    return bool(sweep["metric"].get("goal") == "maximize")


def main(
    file: Path, count: int | None = None, seed: int = 0, wandb: str = "offline", root: Path = Path("runs/sweeps")
) -> list[dict[str, Any]]:
    """Runs every trial, then prints them, best first, and draws them.

    Args:
        file: a W&B sweep file whose command is lightning-ebm.
        count: at most so many trials.
        seed: of the search; trial i of a random one is the same whatever the count.
        wandb: offline, online or off, for every trial.
        root: folder of results; a trial that has come to its end is not run again.

    Returns:
        settings, "last" and "best", or "failed", of each trial; the best first.
    """
    sweep = read_mapping(file, ("method", "metric", "parameters", "command"))
    check_kinds(f"{file}: ", sweep, {"metric": dict, "parameters": dict, "command": list})
    if "name" not in sweep.get("metric", {}):
        raise SweepError(f"{file}: expected metric: {{name: ...}}, the figure that trials are ranked by.")
    if not sweep.get("parameters"):
        raise SweepError(f"{file}: expected parameters, of which trials are made.")
    flat(sweep["parameters"])  # said here if they are none
    if sweep.get("method") not in METHODS:
        raise SweepError(f"{file}: method: {sweep.get('method')!r} is none of {', '.join(METHODS)}.")
    most, folder, console = count_of(sweep, count), (root / file.stem).resolve(), Console()
    study = study_of(sweep, folder, seed)

    def objective(trial: "Trial") -> float:
        settings = {name: suggested(trial, name, spec) for name, spec in flat(sweep["parameters"]).items()}
        trial.set_user_attr("settings", settings)
        console.print(f"trial {trial.number}: {settings}", highlight=False, soft_wrap=True)
        found = _run(sweep, settings, folder / f"{trial.number:04d}", wandb)
        for name, value in found.items():
            trial.set_user_attr(name, value)
        if _FAILED in found:
            console.print(f"  failed, see {folder / f'{trial.number:04d}' / 'log.txt'}", style="red", soft_wrap=True)
            raise _TrialFailed(found[_FAILED])
        return float(found["last"])

    def reseeded(study: "Study", trial: "FrozenTrial") -> None:
        if sweep["method"] != "grid":  # by number, so that a search that goes on draws what it would have drawn
            study.sampler = sampler_of(sweep, seed + trial.number + 1)

    over, interrupted = _sorted_out(study.trials)
    for trial in interrupted:
        study.enqueue_trial(trial.params)
    if study.trials and sweep["method"] != "grid":
        study.sampler = sampler_of(sweep, seed + len(study.trials) - len(interrupted))
    if len(over) < most:
        study.optimize(objective, most - len(over), catch=(_TrialFailed,), callbacks=[reseeded])
    return _told(study, sweep, file.stem, folder, console)


def _sorted_out(trials: Sequence["FrozenTrial"]) -> tuple[list["FrozenTrial"], list["FrozenTrial"]]:
    """Those that have come to their end, and those that were interrupted and have not been run again since."""
    over = [trial for trial in trials if "last" in trial.user_attrs or _FAILED in trial.user_attrs]
    done = [trial.params for trial in over]
    left = [trial for trial in trials if trial not in over and trial.params and trial.params not in done]
    return over, [trial for k, trial in enumerate(left) if trial.params not in [other.params for other in left[:k]]]


def _run(sweep: Mapping[str, Any], settings: Mapping[str, Any], where: Path, wandb: str) -> dict[str, Any]:
    """Runs one trial; what it ended with."""
    where.mkdir(parents=True, exist_ok=True)
    result = where / "result.json"
    result.unlink(missing_ok=True)
    line = [*command(sweep, settings), "--trainer.default_root_dir", str(where)]
    line += ["--monitor", sweep["metric"]["name"], "--wandb", wandb]
    with (where / "log.txt").open("w") as log:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0 or not result.exists():
        return {_FAILED: f"exit code {code}"}
    found = json.loads(result.read_text())
    return {name: found[name] for name in ("last", "best") if name in found}


def _told(study: "Study", sweep: Mapping[str, Any], name: str, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Every trial, best first: printed, as trials.csv, and as a page."""
    over, _ = _sorted_out(study.trials)
    sign = -1 if _is_maximized(sweep) else 1
    over.sort(key=lambda trial: sign * trial.user_attrs.get("last", sign * math.inf))
    names = list(flat(sweep["parameters"]))
    headers = ["trial", *names, "last", "best", "seconds"]
    rows = [
        [t.number, *(t.user_attrs["settings"][n] for n in names), t.user_attrs.get("last", _FAILED),
         t.user_attrs.get("best", ""), "" if t.duration is None else round(t.duration.total_seconds(), 1)]
        for t in over
    ]  # fmt: skip
    title = f"{name}: {sweep['metric']['name']}, {'maximize' if _is_maximized(sweep) else 'minimize'}"
    table = Table(*headers, title=title)
    shown = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    for row in shown:
        table.add_row(*row)
    console.print(table)
    with (folder / "trials.csv").open("w", newline="") as out:
        csv.writer(out).writerows([headers, *rows])
    console.print(f"{write(study, title, headers, shown, folder / 'study.html')}", soft_wrap=True, highlight=False)
    return [{"trial": t.number, **t.user_attrs} for t in over]
