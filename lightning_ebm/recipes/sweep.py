"""Run a Weights & Biases sweep file here, one trial after another, where there is no server.

    lightning-ebm sweep digits-relaxer
    lightning-ebm sweep my-sweep.yaml --count 20

The same file on a server: ``wandb sweep FILE`` and then ``wandb agent ID``. Grid and random search, nested parameters
and the distributions named in `draw` mean here what they mean there; Bayesian search and early termination are the
server's. One file for both is why this is not Optuna, which has a format and a database of its own; a study of Optuna
calls `lightning_ebm.recipes.training.main` in its objective, see docs/recipes.md.
"""

import csv
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_ebm import checked
from lightning_ebm.errors import ConfigurationError
from lightning_ebm.recipes.options import check_kinds, read_mapping

DISTRIBUTIONS = ("uniform", "int_uniform", "log_uniform_values", "q_uniform", "q_log_uniform_values")


class SweepError(ConfigurationError):
    """A sweep file that cannot be run here."""


def flat(parameters: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Nested parameters by their dotted names."""
    found: dict[str, dict[str, Any]] = {}
    for name, spec in parameters.items():
        check_kinds("parameters: ", {name: spec}, {name: dict})
        if "parameters" in spec:
            found |= flat(spec["parameters"], f"{prefix}{name}.")
        else:
            found[prefix + name] = spec
    return found


def draw(name: str, spec: dict[str, Any], generator: random.Random) -> Any:
    """One value: a constant, one of a list (with probabilities or without), or a number from a distribution.

    Raises:
        SweepError: a distribution that is not drawn here.
    """
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return generator.choices(spec["values"], spec.get("probabilities"))[0]
    both_whole = isinstance(spec.get("min"), int) and isinstance(spec.get("max"), int)
    kind = spec.get("distribution", "int_uniform" if both_whole else "uniform")
    if kind == "normal":
        return generator.gauss(spec.get("mu", 0.0), spec.get("sigma", 1.0))
    low, high = float(spec["min"]), float(spec["max"])
    if kind not in DISTRIBUTIONS:
        raise SweepError(
            f"{name}: distribution {kind!r} is not drawn here; there are normal, {', '.join(DISTRIBUTIONS)}."
        )
    if kind == "int_uniform":
        return generator.randint(int(low), int(high))
    logarithmic = "log" in kind
    drawn = math.exp(generator.uniform(math.log(low), math.log(high))) if logarithmic else generator.uniform(low, high)
    return round(drawn / spec.get("q", 1)) * spec.get("q", 1) if kind.startswith("q_") else drawn


def trials(sweep: dict[str, Any], count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """The settings of each trial: the product of all lists for a grid, `count` drawings for a random search.

    Raises:
        SweepError: a method of the server's, a grid over a range, or a random search without a count.
    """
    parameters = flat(sweep["parameters"])
    for name, number in (("--count", count), ("run_cap", sweep.get("run_cap"))):
        if number is not None:
            checked.count("", name, number)
    if sweep["method"] == "grid":
        for name, spec in parameters.items():
            if "value" not in spec and "values" not in spec:
                raise SweepError(f"{name}: a grid needs value or values, and this is a range. Use method: random.")
        axes = [[spec["value"]] if "value" in spec else spec["values"] for spec in parameters.values()]
        for point in itertools.islice(itertools.product(*axes), count):
            yield dict(zip(parameters, point, strict=True))
    elif sweep["method"] == "random":
        count = count if count is not None else sweep.get("run_cap")
        if count is None:
            raise SweepError("A random search goes on for ever: say --count, or run_cap in the file.")
        generator = random.Random(seed)
        for _ in range(count):
            yield {name: draw(name, spec, generator) for name, spec in parameters.items()}
    else:
        raise SweepError(
            f"method: {sweep['method']} needs the server's optimizer. Run `wandb sweep`, or take grid or random here."
        )


def command(sweep: dict[str, Any], settings: dict[str, Any]) -> list[str]:
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


def main(
    file: Path, count: int | None = None, seed: int = 0, wandb: str = "offline", root: Path = Path("runs/sweeps")
) -> list[dict[str, Any]]:
    """Runs every trial, then prints them, best first.

    Args:
        file: a W&B sweep file whose command is lightning-ebm.
        count: at most so many trials.
        seed: of random search; trial i is the same whatever the count.
        wandb: offline, online or off, for every trial.
        root: folder of results; a trial whose result is there already is not run again.
    """
    sweep = read_mapping(file, ("method", "metric", "parameters", "command"))
    check_kinds(f"{file}: ", sweep, {"metric": dict, "parameters": dict, "command": list})
    if "name" not in sweep.get("metric", {}):
        raise SweepError(f"{file}: expected metric: {{name: ...}}, the figure that trials are ranked by.")
    if not sweep.get("parameters"):
        raise SweepError(f"{file}: expected parameters, of which trials are made.")
    metric, goal = sweep["metric"]["name"], sweep["metric"].get("goal", "minimize")
    folder = (root / file.stem).resolve()
    console = Console()
    done = [
        {**_trial(sweep, settings, folder / f"{number:04d}", wandb, console), "trial": number}
        for number, settings in enumerate(trials(sweep, count, seed))
    ]
    sign = -1 if goal == "maximize" else 1
    done.sort(key=lambda trial: sign * trial["last"] if "last" in trial else math.inf)
    names = list(done[0]["settings"]) if done else []
    rows = [
        [t["trial"], *(t["settings"][n] for n in names), t.get("last", "failed"), t.get("best", ""), t["seconds"]]
        for t in done
    ]
    table = Table("trial", *names, "last", "best", "seconds", title=f"{file.stem}: {metric}, {goal}")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "trials.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["trial", *names, "last", "best", "seconds"], *rows])
    return done


def _trial(
    sweep: dict[str, Any], settings: dict[str, Any], where: Path, wandb: str, console: Console
) -> dict[str, Any]:
    """Runs one trial, unless its result is there already; what it ended with."""
    kept, metric = where / "trial.json", sweep["metric"]["name"]
    if kept.exists() and (before := json.loads(kept.read_text())).get("settings") == settings:
        return dict(before)
    console.print(f"trial {int(where.name)}: {settings}", highlight=False, soft_wrap=True)
    where.mkdir(parents=True, exist_ok=True)
    result = where / "result.json"
    result.unlink(missing_ok=True)
    line = [*command(sweep, settings), "--trainer.default_root_dir", str(where), "--monitor", metric, "--wandb", wandb]
    began = time.monotonic()
    with (where / "log.txt").open("w") as log:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    found = json.loads(result.read_text()) if code == 0 and result.exists() else {"failed": f"exit code {code}"}
    found = {"settings": settings, "metric": metric, **found, "seconds": round(time.monotonic() - began, 1)}
    kept.write_text(json.dumps(found, indent=1, default=str))
    if "failed" in found:
        console.print(f"  failed, see {where / 'log.txt'}", style="red", soft_wrap=True)
    return dict(json.loads(kept.read_text()))
