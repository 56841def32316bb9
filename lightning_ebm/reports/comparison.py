"""Several runs side by side, as one HTML file; runs that differ by their seed alone are one line with a band."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ebm.reports import advice, interactive, pages
from lightning_ebm.reports.html import curves, figures_of_merit
from lightning_ebm.reports.pages import Table, drawn
from lightning_ebm.reports.runs import Run

OWN = ("name", "date", "seed", "git commit")
"""Facts that may differ between the seeds of one group."""


@dataclass
class Group:
    """Runs of the same settings.

    Attributes:
        label: the name of the first, with what tells it from other groups of that name.
        runs: one a seed.
    """

    label: str
    runs: list[Run]

    def finals(self, metric: str) -> list[float]:
        """The last value in each run that has it."""
        return [run.metrics[metric][-1][1] for run in self.runs if metric in run.metrics]

    def angles(self) -> list[tuple[str, float]]:
        """Mean angle to the true gradient over the comparisons of all runs, layer by layer; dead layers left out."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for _, row in run.angle_by_layer:
                for layer, angle in row.items():
                    if angle is not None:
                        found.setdefault(layer, []).append(angle)
        return [(layer, statistics.mean(values)) for layer, values in found.items()]


def settings(run: Run) -> dict[str, str]:
    """All that was recorded of a run, but what every run has of its own."""
    return {name: value for name, value in {**run.settings, **run.facts}.items() if name not in OWN}


def groups(runs: Sequence[Run]) -> list[Group]:
    """Runs with equal settings together, in the order given; a run of which nothing is known is alone."""
    found: dict[Any, list[Run]] = {}
    for index, run in enumerate(runs):
        known = settings(run)
        found.setdefault(tuple(sorted(known.items())) if known else index, []).append(run)
    made = [Group(_common([run.name for run in members]), members) for members in found.values()]
    names = [group.label for group in made]
    varying = [name for name, _ in differences(made)]
    for group in made:
        if names.count(group.label) > 1:
            own = settings(group.runs[0])
            told = next(
                (name for name in varying if len({settings(g.runs[0]).get(name) for g in made}) == len(made)), ""
            )
            group.label += f", {told} {own[told]}" if told in own else f", {group.runs[0].path.name}"
    return made


def _common(names: Sequence[str]) -> str:
    """What the names of the seeds have in common at their beginning; the first name, if that is nothing."""
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    shared = "".join(column[0] for column in letters) if len(names) > 1 else names[0]
    return shared.rstrip("-_/. ").removesuffix("seed").rstrip("-_/. ") or names[0]


def differences(made: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all groups, with the value in each."""
    tables = [settings(group.runs[0]) for group in made]
    names = list(dict.fromkeys(name for table in tables for name in table))
    rows = [(name, [table.get(name, "") for table in tables]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def spread(values: Sequence[float], digits: str = ".4g") -> str:
    """Mean and, of several, the standard deviation."""
    if not values:
        return ""
    mean = format(statistics.mean(values), digits)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), '.2g')}"


def finals(made: Sequence[Group]) -> Table:
    """A row a group: final figures, alignment, cost, verdict."""
    metrics = list(dict.fromkeys(name for group in made for run in group.runs for name in figures_of_merit(run)))
    table = Table(["run", "seeds", *metrics, "mean angle", "training", "verdict"], numbers=len(metrics) + 3)
    for index, group in enumerate(made):
        angles = [angle for _, angle in group.angles()]
        seconds = [run.seconds for run in group.runs if run.seconds is not None]
        words = list(dict.fromkeys(advice.verdict(run.records)[0] for run in group.runs))
        table.rows.append(
            [
                group.label,
                str(len(group.runs)),
                *(spread(group.finals(metric)) for metric in metrics),
                pages.degrees(statistics.mean(angles)) if angles else "",
                pages.duration(statistics.mean(seconds)) if seconds else "",
                ", ".join(words),
            ]
        )
        if {"diverged", "stopped", "dead"} & set(words):
            table.bad.add(index)
    return table


def page(runs: Sequence[Run]) -> str:
    """The comparison: final figures, curves, alignment against depth, accuracy against cost, what differs."""
    made = groups(runs)
    names = list(dict.fromkeys(name for run in runs for name in curves(run)))
    series = {
        name: [(group.label, [run.metrics[name] for run in group.runs if name in run.metrics]) for group in made]
        for name in names
    }
    depths = [(group.label, group.angles()) for group in made]
    costs = {
        name: [
            (group.label, [(r.seconds, r.metrics[name][-1][1]) for r in group.runs if r.seconds and name in r.metrics])
            for group in made
        ]
        for name in dict.fromkeys(name for run in runs for name in figures_of_merit(run))
        if "train" not in name and "loss" not in name
    }
    told = Table(["setting", *(group.label for group in made)], numbers=0)
    told.rows = [[name, *values] for name, values in differences(made)]
    return pages.render(
        "comparison.html",
        title=f"{len(made)} ways to train, {len(runs)} runs" if len(made) < len(runs) else f"{len(runs)} runs compared",
        legend=[(group.label, interactive.color(index)) for index, group in enumerate(made)],
        command="compare",
        finals=finals(made),
        curves=[(name, drawn(interactive.metric(name, by))) for name, by in series.items()],
        depth=drawn(interactive.alignment_by_depth(depths)) if any(layers for _, layers in depths) else "",
        costs=[(name, drawn(interactive.against_cost(name, points))) for name, points in costs.items()],
        differences=told,
    )


def text(runs: Sequence[Run]) -> str:
    """The table of final figures for a terminal."""
    table = finals(groups(runs))
    rows = [list(table.headers), *(list(row) for row in table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
