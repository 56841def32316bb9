"""The figures of the pages about runs, by Plotly: curves with seeds and bands, angles, energies, residuals.

Angles to the true gradient stand on a logarithmic axis in degrees, which tells a cosine of 0.95 (18 degrees) from one
of 0.9999 (0.8 degrees). Names from a run are escaped, as Plotly reads tags in its texts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from lightning_ebm.reports.runs import Series

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#0987a0", "#975a16", "#4a5568")
SMALLEST_ANGLE = 1e-3
"""In degrees: what is smaller is drawn here, as a logarithmic axis has no place for 0."""


def color(index: int) -> str:
    """Of the group of runs with this number, the same in all figures of a page."""
    return COLORS[index % len(COLORS)]


def script() -> str:
    """Plotly's own code, which a page needs once; a page with it needs no network."""
    return str(get_plotlyjs())


def html(figure: go.Figure) -> str:
    """The figure for a page that has `script`."""
    text: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True}
    )
    return text


def metric(name: str, groups: Sequence[tuple[str, Sequence[Series]]]) -> go.Figure:
    """One logged scalar against the global step: a line a group, with a band from its lowest to its highest seed.

    Args:
        name: of the scalar.
        groups: ``[(label, [series of each seed])]``.
    """
    figure = _figure("global step", name)
    figure.update_layout(showlegend=False)  # the page has one for all
    for index, (label, seeds) in enumerate(groups):
        ink = color(index)
        steps, mean, low, high = band(seeds)
        if len(seeds) > 1:
            outline = {"x": [*steps, *reversed(steps)], "y": [*high, *reversed(low)], "fill": "toself"}
            figure.add_scatter(
                **outline, mode="lines", line={"width": 0}, fillcolor=_faint(ink), hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        mode = "lines+markers" if len(steps) < 40 else "lines"
        figure.add_scatter(
            x=steps, y=mean, mode=mode, line={"color": ink}, name=escape(label),
            hovertemplate="step %{x}: %{y:.5g}",
        )  # fmt: skip
    return figure


def band(seeds: Sequence[Series]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all seeds have, and the mean, the lowest and the highest value there."""
    tables = [dict(series) for series in seeds]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    columns = [[table[step] for table in tables] for step in steps]
    return steps, [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def alignment(rows: Sequence[tuple[int, Mapping[str, float | None]]]) -> go.Figure:
    """Angle of each layer's update to the true gradient, against the global step.

    Args:
        rows: ``[(global step, {layer: degrees, or None where it is dead})]``, see `Run.angle_by_layer`.
    """
    figure = _figure("global step", "angle to the true gradient, degrees")
    layers = list(dict.fromkeys(name for _, row in rows for name in row))
    for index, layer in enumerate(layers):
        points = [(step, row.get(layer)) for step, row in rows]
        figure.add_scatter(
            x=[step for step, _ in points], y=[_on_log_axis(value) for _, value in points], name=_layer(layer),
            mode="lines+markers", line={"color": _shade(index, layers)}, customdata=[_cosine(v) for _, v in points],
            hovertemplate="step %{x}: %{y:.3g} degrees, cosine %{customdata}",
        )  # fmt: skip
    return _angles(figure)


def alignment_by_depth(groups: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> go.Figure:
    """Mean angle of each layer over the run, from the input to the read-out; a line a group.

    Args:
        groups: ``[(label, [(layer, degrees)])]``.
    """
    figure = _figure("layer, from the input up", "mean angle to the true gradient, degrees")
    for index, (label, layers) in enumerate(groups):
        figure.add_scatter(
            x=list(range(1, len(layers) + 1)), y=[_on_log_axis(angle) for _, angle in layers], name=escape(label),
            mode="lines+markers", line={"color": color(index)},
            text=[_layer(name) for name, _ in layers], customdata=[_cosine(angle) for _, angle in layers],
            hovertemplate="%{text}: %{y:.3g} degrees, cosine %{customdata}",
        )  # fmt: skip
    figure.update_xaxes(dtick=1)
    figure.update_layout(showlegend=False)
    return _angles(figure)


def against_cost(name: str, groups: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> go.Figure:
    """A final figure against what it cost: a dot a run, a color a group.

    Args:
        name: of the figure.
        groups: ``[(label, [(seconds, value)])]``.
    """
    figure = _figure("seconds of training", name)
    figure.update_layout(showlegend=False)
    for index, (label, points) in enumerate(groups):
        figure.add_scatter(
            x=[seconds for seconds, _ in points], y=[value for _, value in points], mode="markers", name=escape(label),
            marker={"size": 11, "color": color(index)}, hovertemplate="%{x:.3g} s: %{y:.5g}",
        )  # fmt: skip
    return figure


def energies(relaxations: Sequence[tuple[int, Mapping[str, Any]]], kind: str) -> go.Figure:
    """Energy over its size at the start, against the relaxation step.

    Args:
        relaxations: ``[(global step, relaxation)]``, see `Run.relaxations`.
        kind: "free" or "nudged" phases.
    """
    figure = _figure("relaxation step", f"energy / energy at the start, {kind} phase")
    for index, (step, relaxation) in enumerate(relaxations):
        for phase in relaxation["phases"]:
            if bool(phase["nudge"]) == (kind == "nudged"):
                values = energies_of(phase)
                scale = abs(values[0]) or max(map(abs, values)) or 1.0
                figure.add_scatter(
                    y=[_bounded(value / scale) for value in values], name=f"step {step}", mode="lines+markers",
                    line={"color": _shade(index, relaxations)},
                )  # fmt: skip
    return figure


def energies_of(phase: Mapping[str, Any]) -> list[float]:
    """Of the accepted points where they were recorded, of every trial where not."""
    weight = 0.0 if phase.get("held") else phase["nudge"]
    recorded: list[float] = phase.get("energies") or []
    return recorded or [i + weight * x for i, x in zip(phase["internal"], phase["loss"], strict=True)]


def residuals(step: int, relaxation: Mapping[str, Any]) -> go.Figure:
    """|dE/dx_l| of each layer against the relaxation step: of a nudged phase, or of the free one where no other is."""
    figure = _figure("relaxation step", f"|dE/dx| of the layer, global step {step}")
    phase = next((p for p in relaxation["phases"] if p["nudge"]), relaxation["phases"][-1])
    for index, name in enumerate(relaxation["layers"]):
        forces = [_bounded(row[index]) for row in phase["residual"]]
        shown = [force if force is not None and force > 0 else None for force in forces]
        label = _layer(name) if any(forces) else f"{_layer(name)}: no force"
        ink = _shade(index, relaxation["layers"])
        figure.add_scatter(y=shown, name=label, mode="lines+markers", line={"color": ink})
    seen = [value for trace in figure.data for value in trace.y if value is not None]
    wide = bool(seen) and max(seen) > 30 * min(seen)  # powers of ten alone leave a narrow axis without a number
    figure.update_yaxes(type="log", exponentformat="power", dtick=1 if wide else None)
    return figure


def regime(measured: Mapping[str, Any]) -> go.Figure:
    """Angle to backprop of each layer's update, where the relaxation stopped and at equilibrium.

    Args:
        measured: as `Regime.as_dict` gives it.
    """
    figure = _figure("angle to backprop's gradient, degrees", "")
    names = [_layer(layer["name"]) for layer in measured["layers"]]
    for key, label, symbol, ink in (
        ("cosine_equilibrium", "at equilibrium", "diamond", COLORS[1]),
        ("cosine_stop", "where it stopped", "circle-open", COLORS[0]),
    ):
        degrees = [_degrees(layer.get(key)) for layer in measured["layers"]]
        marker = {"symbol": symbol, "size": 11, "color": ink}
        figure.add_scatter(x=degrees, y=names, mode="markers", name=label, marker=marker)
    figure.update_yaxes(autorange="reversed", title=None)
    figure.update_xaxes(rangemode="tozero")
    figure.update_layout(height=120 + 38 * len(names))
    return figure


def _figure(x: str, y: str) -> go.Figure:
    """On the page's own background, light or dark."""
    line = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.4)", "automargin": True}
    return go.Figure(
        layout={
            "template": "none", "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "height": 360,
            "font": {"color": "#7a8599", "family": "system-ui, sans-serif"},
            "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
            "xaxis": {"title": {"text": escape(x), "standoff": 12}, **line},
            "yaxis": {"title": {"text": escape(y), "standoff": 12}, **line},  # beside the numbers, not over them
            "hovermode": "closest", "legend": {"itemsizing": "constant"},
        }
    )  # fmt: skip


def _angles(figure: go.Figure) -> go.Figure:
    values = [digit * 10.0**power for power in range(-3, 2) for digit in (1, 2, 5)] + [90, 180]
    figure.update_yaxes(type="log", tickvals=values, ticktext=[f"{value:g}°" for value in values])
    seen = [value for trace in figure.data for value in trace.y if value is not None]
    if seen:  # a decade at least, so that there are numbers to read
        high, low = max(seen), min(*seen, max(seen) / 10)
        figure.update_yaxes(range=[math.log10(low) - 0.05, math.log10(high) + 0.05])
    return figure


def _on_log_axis(angle: float | None) -> float | None:
    return None if angle is None else max(SMALLEST_ANGLE, angle)


def _cosine(angle: float | None) -> str:
    """With as many nines as there are."""
    if angle is None:
        return ""
    off = 2 * math.sin(math.radians(angle) / 2) ** 2  # 1 - cos, without cancellation
    digits = 2 if off > 0.1 else min(12, 1 - math.floor(math.log10(off))) if off else 0
    return f"{1 - off:.{digits}f}"


def _degrees(cosine: float | None) -> float | None:
    return None if cosine is None else math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def _layer(name: str) -> str:
    return escape(name.replace("/", "."))


def _bounded(value: float | None) -> float | None:
    """A runaway may reach 1e300, which no axis can show."""
    return None if value is None else max(-1e12, min(1e12, value))


def _faint(ink: str) -> str:
    red, green, blue = (int(ink[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _shade(index: int, among: Iterable[Any]) -> str:
    """A place between two colors that are seen on light and on dark ground."""
    last = max(len(list(among)) - 1, 1)
    low, high = (43, 108, 176), (221, 107, 32)
    red, green, blue = (round(a + (b - a) * min(1.0, index / last)) for a, b in zip(low, high, strict=True))
    return f"rgb({red},{green},{blue})"
