"""A run as one HTML file that needs nothing else: a verdict, what run it is, and figures to point at."""

import re
from typing import Any

from lightning_ebm.reports import advice, interactive, pages
from lightning_ebm.reports.pages import Table, drawn, number
from lightning_ebm.reports.runs import Run, spread

HEAD = ("date", "device", "seed", "optimizer", "batch size", "git commit")


def page(run: Run) -> str:
    """The report: verdict, warnings, results, alignment, relaxation, regime, layers, settings."""
    word, sentence = advice.verdict(run.records)
    facts = run.facts
    headline = [(name, facts[name]) for name in HEAD if name in facts]
    if run.seconds is not None:
        headline.append(("trained for", pages.duration(run.seconds)))
    angles = run.angle_by_layer
    step, regime = run.regimes[-1] if run.regimes else (0, {})
    settings = {**run.settings, **{name: value for name, value in facts.items() if name not in HEAD}}
    return pages.render(
        "report.html",
        title=run.name,
        command="report",
        headline=headline,
        word=word,
        sentence=sentence,
        color=pages.COLORS.get(word, pages.UNKNOWN_COLOR),
        findings=advice.findings(run.records),
        results=results(run),
        curves=[(name, drawn(interactive.metric(name, [(name, [run.metrics[name]])]))) for name in curves(run)],
        alignment=drawn(interactive.alignment(angles)) if angles else "",
        relaxation=relaxation(run),
        relaxation_figures=relaxation_figures(run),
        curvature=curvature_words(*run.curvatures[-1]) if run.curvatures else "",
        regime=drawn(interactive.regime(regime)) if regime else "",
        regime_step=step,
        regime_words=regime_words(regime) if regime else "",
        layers=layers(run),
        settings=Table(["setting", "value"], [*settings.items()], numbers=0),
    )


def figures_of_merit(run: Run) -> list[str]:
    """The logged scalars that are accuracies and losses, whatever they are called."""
    own = ("_", "ebm/", "alignment")
    return [name for name in run.metrics if re.search(r"acc|loss|error_rate|f1", name) and not name.startswith(own)]


def curves(run: Run) -> list[str]:
    """Those of them that have a course; each gets axes of its own."""
    return [name for name in figures_of_merit(run) if len(run.metrics[name]) > 2]


def results(run: Run) -> Table:
    """The last, the highest and the lowest value of each."""
    table = Table(["metric", "last", "highest", "lowest"])
    for name in figures_of_merit(run):
        values = [value for _, value in run.metrics[name]]
        table.rows.append([name, number(values[-1]), number(max(values)), number(min(values))])
    return table


def relaxation(run: Run) -> str:
    """How the recorded relaxations ended, in a sentence; nothing if none was recorded."""
    if not run.relaxations:
        return ""
    counts: dict[str, int] = {}
    for _, one in run.relaxations:
        counts[one["status"]] = counts.get(one["status"], 0) + 1
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    steps = [one["steps"] for _, one in run.relaxations]
    taken = f"{min(steps)} steps each" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)} steps"
    return f"{len(steps)} relaxations were recorded ({words}); they took {taken}."


def relaxation_figures(run: Run) -> list[Any]:
    """Energies of some of them, and the residuals of the first and the last."""
    complete = [(step, one) for step, one in run.complete_relaxations if one["phases"]]
    if not complete:
        return []
    chosen = spread(complete, 6)
    kinds = ("free", "nudged")
    present = [k for k in kinds if any(bool(p["nudge"]) == (k == "nudged") for _, r in chosen for p in r["phases"])]
    drawings = [interactive.energies(chosen, kind) for kind in present]
    ends = [complete[0]] if len(complete) == 1 else [complete[0], complete[-1]]
    return [drawn(figure) for figure in [*drawings, *(interactive.residuals(*end) for end in ends)]]


def curvature_words(step: int, found: dict[str, Any]) -> str:
    """Whether the states rested in a minimum, and by which figures that is known."""
    return (
        f"At step {step} the states were {found['verdict']}: the eigenvalues of the energy's Hessian go from"
        f" {found['smallest']:.4g} to {found['largest']:.4g}, those of lambda times the loss's up to"
        f" {found['loss']:.4g}."
    )


def regime_words(regime: dict[str, Any]) -> str:
    """The verdict of the measurement, and how far the relaxation went."""
    relaxed = regime.get("relaxed")
    went = "" if relaxed is None else f" The relaxation made {100 * relaxed:.4g}% of the energy's fall to its minimum."
    return f"Where the updates are read: {regime['verdict']}.{went}"


def layers(run: Run) -> Table:
    """One row a layer: alignment over the run, and the last regime."""
    cosines: dict[str, list[float | None]] = {}
    for _, row in run.alignment_by_layer:
        for layer, cosine in row.items():
            cosines.setdefault(layer.replace("/", "."), []).append(cosine)
    regime = {layer["name"]: layer for layer in run.regimes[-1][1]["layers"]} if run.regimes else {}
    headers = ["layer", "cosine, last", "lowest", "mean", "at equilibrium", "|g| / |backprop|", "regime"]
    table = Table(headers, numbers=5)
    for index, name in enumerate(dict.fromkeys([*cosines, *regime])):
        series, last = cosines.get(name, []), regime.get(name, {})
        alive = [cosine for cosine in series if cosine is not None]
        dead = bool(series) and series[-1] is None
        table.rows.append(
            [
                name,
                "dead" if dead else number(series[-1] if series else None),
                number(min(alive, default=None)),
                number(sum(alive) / len(alive) if alive else None),
                number(last.get("cosine_equilibrium")),
                number(last.get("norm_ratio_stop")),
                last.get("verdict", ""),
            ]
        )
        if dead or last.get("reach") in ("none", "rounding"):
            table.bad.add(index)
    return table
