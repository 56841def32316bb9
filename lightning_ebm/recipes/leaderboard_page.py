"""What a leaderboard says of its runs: a table for each network, refusals in words, and accuracy against cost."""

import csv
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from lightning_ebm.reports.pages import degrees

HEADERS = (
    "data", "network", "algorithm", "result", "cosine", "angle", "cost", "CPU s", "relaxations", "seeds",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What an algorithm did on a network, over the seeds.

    Attributes:
        data: name of the data set.
        network: its name.
        algorithm: its name.
        monitor: what a result is: "val/accuracy", or a loss.
        found: results of the seeds, as they were kept.
        unit: milliseconds of a batch by the reference on the same network; None where it has not run.
    """

    data: str
    network: str
    algorithm: str
    monitor: str
    found: tuple[Mapping[str, Any], ...]
    unit: float | None

    @property
    def good(self) -> list[Mapping[str, Any]]:
        """The runs that came to their end."""
        return [result for result in self.found if "last" in result]

    @property
    def values(self) -> list[float]:
        """The last figure of each run."""
        return [result["last"] for result in self.good]

    @property
    def milliseconds(self) -> float:
        """CPU time of a batch, the median."""
        return float(statistics.median(result["step_cpu_ms"] for result in self.good))

    @property
    def cost(self) -> float | None:
        """The same in batches of the reference."""
        return self.milliseconds / self.unit if self.unit and self.good else None

    @property
    def because(self) -> str:
        """Why there is no result, where there is none."""
        return next((" ".join(result["because"].split()) for result in self.found if "failed" in result), "")

    def words(self) -> tuple[str, ...]:
        """The line of the table."""
        good, names = self.good, (self.data, self.network, self.algorithm)
        if not good:
            failed = str(self.found[0]["failed"])
            return *names, failed, "", "", "", "", "", f"0 of {len(self.found)}"
        cosines = [result["cosine"] for result in good if result.get("cosine") is not None]
        angles = [math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) for cosine in cosines]
        aligned = (spread(cosines, "{:.4f}"), degrees(statistics.mean(angles))) if cosines else ("", "")
        seconds = statistics.mean(result["batches"] * result["step_cpu_ms"] / 1000 for result in good)
        cost = f"{self.milliseconds:.1f} ms" if self.cost is None else f"{self.cost:.1f}"
        ended: Counter[str] = Counter()
        for result in good:
            ended.update(result.get("relaxations", {}))
        whole = sum(ended.values())
        ends = ", ".join(f"{name} {count / whole:.0%}" for name, count in ended.most_common() if name != "none")
        seeds = str(len(self.found)) if len(good) == len(self.found) else f"{len(good)} of {len(self.found)}"
        return *names, spread(self.values, "{:.4f}"), *aligned, cost, f"{seconds:.1f}", ends, seeds


def spread(values: Sequence[float], shown: str) -> str:
    """Mean and, of several, the standard deviation."""
    mean = shown.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {shown.format(statistics.stdev(values))}"


def rows(board: Mapping[str, Any], results: Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]]) -> list[Row]:
    """The board's lines, in its order; costs are relative to the reference on the same network and data.

    Args:
        board: as `leaderboard.read` gives it.
        results: of the seeds, by data, network and algorithm.
    """
    units = {}
    for (data, network, algorithm), found in results.items():
        good = [result["step_cpu_ms"] for result in found if "last" in result]
        if algorithm == board.get("reference", "backprop") and good:
            units[data, network] = statistics.median(good)
    return [
        Row(data, network, algorithm, found[0]["settings"]["monitor"], tuple(found), units.get((data, network)))
        for (data, network, algorithm), found in results.items()
    ]


def show(found: Sequence[Row], console: Console, title: str) -> None:
    """The table, on a terminal."""
    table = Table(*HEADERS, title=title)
    for row in found:
        table.add_row(*row.words())
    console.print(table)


def as_csv(found: Sequence[Row], path: Path) -> None:
    """The table as a file of values."""
    with path.open("w", newline="") as out:
        csv.writer(out).writerows([HEADERS, *(row.words() for row in found)])


def write(board: Mapping[str, Any], found: Sequence[Row], path: Path, name: str) -> Path:
    """The page, and the figure in ``images/`` beside it.

    Args:
        board: whose title and text are the page's head.
        found: its lines.
        path: of the page.
        name: of the board.
    """
    picture = path.parent / "images" / f"{path.stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    groups = grouped(found)
    figure(list(groups.values())).savefig(picture, dpi=150)
    lines = [f"# {board.get('title', name)}", "", *str(board.get("text", "")).strip().splitlines(), ""]
    lines += [f"![results against cost](images/{picture.name})", ""]
    for (data, network), group in groups.items():
        monitor = group[0].monitor
        better = "smaller is better" if "loss" in monitor else "larger is better"
        headers = ("algorithm", f"{monitor} ({better})", *HEADERS[4:])
        lines += [f"## {data}, {network}", "", *_table(headers, [row.words()[2:] for row in group]), ""]
        lines += [line for row in _without_result(group) for line in (f"- **{row.algorithm}**: {row.because}", "")]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def grouped(found: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The lines of each network."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row.data, row.network), []).append(row)
    return groups


def _table(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    for line in (headers, ("---",) * len(headers), *lines):
        yield f"| {' | '.join(line)} |"


def _without_result(group: Sequence[Row]) -> list[Row]:
    return [row for row in group if not row.good]


_MARKERS = "oosssDDDvvv^^^PP"
_COLORS = ("#1f4e79", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#c53030", "#0987a0", "#4a5568", "#d53f8c")


def figure(groups: Sequence[Sequence[Row]]) -> Figure:
    """Results against cost, a panel for each network; bars are the standard deviation over seeds."""
    columns = min(3, len(groups)) or 1
    lines = math.ceil(len(groups) / columns) or 1
    names = list(dict.fromkeys(row.algorithm for group in groups for row in group if row.good))
    # So small that its letters are those of the page that it is shown on.
    drawn = Figure(figsize=(3.1 * columns, 2.8 * lines + 0.24 * math.ceil(len(names) / 3)), layout="constrained")
    panels = drawn.subplots(lines, columns, squeeze=False).flatten()
    for panel, group in zip(panels, groups, strict=False):
        for row in group:
            if not row.good or row.cost is None:
                continue
            place = names.index(row.algorithm)
            panel.errorbar(
                row.cost, statistics.mean(row.values), statistics.stdev(row.values) if len(row.values) > 1 else 0.0,
                marker=_MARKERS[place % len(_MARKERS)], color=_COLORS[place % len(_COLORS)], markersize=6,
                linestyle="none", elinewidth=1, alpha=0.9, label=row.algorithm,
            )  # fmt: skip
        panel.set(xscale="log", xlabel="cost, in backprop's", ylabel=group[0].monitor)
        panel.set_title(f"{group[0].data}\n{group[0].network}", fontsize=10)
        if "loss" in group[0].monitor:
            panel.invert_yaxis()  # up is better everywhere
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, which="both")
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    shown = [name for name in names if name in handles]
    drawn.legend(
        [handles[name] for name in shown], shown, loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
    return drawn
