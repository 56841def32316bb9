"""A run as one HTML file that needs nothing else: pictures inside, no scripts, no network."""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_ebm import advice, plots
from lightning_ebm.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"sound": "#2f855a", "cut off": "#c05621", "diverged": "#c53030", "stopped": "#c53030", "dead": "#553c9a"}

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.35rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .4rem }}
.verdict {{ background: {colour}; color: white; padding: .7rem 1rem; border-radius: .4rem }}
.verdict b {{ font-size: 1.15rem; margin-right: .6rem }}
table {{ border-collapse: collapse; font-size: .9rem }} td, th {{ padding: .2rem .9rem .2rem 0; text-align: left }}
th {{ border-bottom: 1px solid #a0aec0 }} td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums }}
tr.bad td {{ color: #c53030; font-weight: 600 }}
img {{ max-width: 100%; height: auto }} li {{ margin: .3rem 0 }} code {{ overflow-wrap: anywhere }}
</style></head><body>
<h1>{title}</h1>
<p class="verdict" id="verdict"><b>{word}</b>{sentence}</p>
{body}
</body></html>
"""


def page(run: Run) -> str:
    """The report of a run: verdict, warnings, settings, accuracy, alignment, relaxation, regime, layers."""
    word, sentence = advice.verdict(run.records)
    body = "\n".join(part for part in _sections(run) if part)
    title = f"{run.path.resolve().parent.name}/{run.path.resolve().name}"
    return _PAGE.format(
        title=escape(title),
        colour=COLOURS.get(word, "#4a5568"),
        word=escape(word),
        sentence=escape(sentence),
        body=body,
    )


def _sections(run: Run) -> Iterable[str]:
    found = advice.findings(run.records)
    if found:
        yield _section("Warnings", "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in found) + "</ul>")
    yield _results(run)
    rows = run.alignment_by_layer
    if rows:
        yield _section("Alignment", _image(plots.alignment_heatmap(rows), "cosine, layer by step"))
    yield from _relaxation(run)
    if run.regimes:
        step, regime = run.regimes[-1]
        yield _section(f"Regime at step {step}", _image(plots.regime_layers(regime), "angles at stop and equilibrium"))
    yield _layers(run)
    if run.settings:
        cells = [[escape(name), f"<code>{escape(value)}</code>"] for name, value in run.settings.items()]
        yield _section("Settings", _table(["part", "value"], cells, numbers=0))


def _results(run: Run) -> str:
    """Accuracies and losses, whatever they are called."""
    own = ("_", "ebm/", "alignment")
    names = [name for name in run.metrics if re.search(r"acc|loss|error_rate", name) and not name.startswith(own)]
    if not names:
        return ""
    rows = []
    for name in names:
        values = [value for _, value in run.metrics[name]]
        rows.append([escape(name), _figure(values[-1]), _figure(max(values)), _figure(min(values))])
    table = _table(["metric", "last", "highest", "lowest"], rows)
    curves = [name for name in names if len(run.metrics[name]) > 2]
    return _section("Results", table + (_image(plots.metric_curves(run, curves), "curves") if curves else ""))


def _relaxation(run: Run) -> Iterable[str]:
    if not run.relaxations:
        return
    counts: dict[str, int] = {}
    for _, relaxation in run.relaxations:
        counts[relaxation["status"]] = counts.get(relaxation["status"], 0) + 1
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    steps = [relaxation["steps"] for _, relaxation in run.relaxations]
    text = f"<p>{len(steps)} relaxations recorded: {words}; {min(steps)} to {max(steps)} steps.</p>"
    if plots.has_curves(run):
        text += _image(plots.energy_curves(run), "energy against relaxation step")
        text += _image(plots.residual_curves(run), "residual of each layer against relaxation step")
    yield _section("Relaxation", text)


def _layers(run: Run) -> str:
    """One row a layer: alignment over the run, and the last regime."""
    rows = run.alignment_by_layer
    cosines: dict[str, list[float | None]] = {}
    for _, row in rows:
        for layer, cosine in row.items():
            cosines.setdefault(layer.replace("/", "."), []).append(cosine)
    regime = {layer["name"]: layer for layer in run.regimes[-1][1]["layers"]} if run.regimes else {}
    if not cosines and not regime:
        return ""
    cells, bad = [], set()
    for index, name in enumerate(dict.fromkeys([*cosines, *regime])):
        series, last = cosines.get(name, []), regime.get(name, {})
        alive = [cosine for cosine in series if cosine is not None]
        dead = bool(series) and series[-1] is None
        cells.append(
            [
                escape(name),
                "dead" if dead else _figure(series[-1] if series else None),
                _figure(min(alive, default=None)),
                _figure(sum(alive) / len(alive) if alive else None),
                _figure(last.get("cosine_equilibrium")),
                _figure(last.get("norm_ratio_stop")),
                escape(last.get("verdict", "")),
            ]
        )
        if dead or last.get("reach") in ("none", "rounding"):
            bad.add(index)
    headers = ["layer", "cosine, last", "lowest", "mean", "at equilibrium", "|g| / |backprop|", "regime"]
    return _section("Layers", _table(headers, cells, numbers=5, bad=bad))


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 99, bad: Iterable[int] = ()) -> str:
    """Cells are HTML already; the first column is text, the next `numbers` are figures."""
    kinds = ['class="n"' if 0 < column <= numbers else "" for column in range(len(headers))]
    head = "".join(f"<th {kind}>{escape(text)}</th>" for kind, text in zip(kinds, headers, strict=True))
    marked = set(bad)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td {kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        lines.append(f'<tr class="bad">{cells}</tr>' if index in marked else f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _image(figure: "Figure", words: str) -> str:
    file: Any = io.BytesIO()
    figure.savefig(file, format="png")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<p><img alt="{escape(words)}" src="data:image/png;base64,{data}"></p>'
