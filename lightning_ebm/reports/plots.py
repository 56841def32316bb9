"""The pictures of a run, as matplotlib figures; each from a `Run`, as `runs.read` gives it, or from plain numbers.

    from lightning_ebm.reports import plots, runs
    plots.alignment_heatmap(runs.read("lightning_logs/version_0").alignment_by_layer).savefig("alignment.png")

Figures are made without pyplot: no window opens and no global state is left; a notebook shows them by themselves.
"""

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_ebm.errors import ConfigurationError
from lightning_ebm.reports.runs import Run, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BACKPROP_BLUE, EQUILIBRIUM_ORANGE, DEAD_GRAY, ASTRAY_RED = "#2b6cb0", "#c05621", "#b8b8b8", "#c53030"


def alignment_heatmap(rows: Sequence[tuple[int, Mapping[str, float | None]]]) -> "Figure":
    """Cosine of each layer's update to the true gradient, layer x global step; gray and hatched where it is dead.

    Args:
        rows: ``[(global step, {layer: cosine or None})]``, as `Run.alignment_by_layer`.
    """
    import numpy as np

    if not rows:
        raise ConfigurationError("There is no alignment to draw: train with callbacks=[ebm.GradientAlignment()].")
    layers = list(dict.fromkeys(layer for _, row in rows for layer in row))
    values = np.array([[_number(row.get(layer)) for _, row in rows] for layer in layers], dtype=float)
    figure, axes = _figure(max(6.0, min(11.0, 3 + 0.12 * len(rows))), 1.6 + 0.34 * len(layers))
    colors = _colormaps()["viridis"].with_extremes(bad=DEAD_GRAY)
    lowest = min(0.0, float(np.nanmin(values))) if np.isfinite(values).any() else 0.0
    image = axes.imshow(values, aspect="auto", cmap=colors, vmin=lowest, vmax=1, interpolation="nearest")
    for row, column in zip(*np.nonzero(np.isnan(values)), strict=True):
        axes.add_patch(_hatched(column - 0.5, row - 0.5))
    ticks = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 7)).astype(int))
    axes.set_xticks(ticks, [str(rows[t][0]) for t in ticks])
    axes.set_yticks(range(len(layers)), [layer.replace("/", ".") for layer in layers])
    for row, value in enumerate(values[:, -1]):
        text = "dead" if math.isnan(value) else f"{value:.4f}"
        axes.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_xlabel("global step")
    axes.set_title("cosine to the true gradient; right: at the last comparison", loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, pad=0.13, label="cosine")
    return figure


def energy_curves(run: Run, most: int = 6) -> "Figure":
    """Energy above its lowest, against the relaxation step, for relaxations spread over the training.

    One panel for free phases where there are any, one for nudged ones.
    """
    chosen = spread(run.complete_relaxations, most)
    if not chosen:
        raise ConfigurationError("There is no relaxation to draw: train with callbacks=[ebm.RelaxationMonitor()].")
    kinds: list[str] = [k for k in ("free", "nudged") if any(_is(k, p) for _, r in chosen for p in r["phases"])]
    figure, panels = _figure(5.2 * len(kinds) + 1, 3.6, columns=len(kinds))
    for axes, kind in zip(panels if len(kinds) > 1 else [panels], kinds, strict=True):
        for number, (step, relaxation) in enumerate(chosen):
            color = _shade(number, len(chosen))
            for phase in (p for p in relaxation["phases"] if _is(kind, p)):
                weight = 0.0 if phase.get("held") else phase["nudge"]
                trials = [i + weight * x for i, x in zip(phase["internal"], phase["loss"], strict=True)]
                energies = phase.get("energies") or trials
                scale = abs(energies[0]) or max(map(abs, energies)) or 1.0
                shown = [_bounded(energy / scale) for energy in energies]
                axes.plot(shown, color=color, marker=".", label=f"step {step}")
        rises = any(line.get_ydata().max() > 1.5 for line in axes.lines)
        if rises:
            axes.set_yscale("symlog", linthresh=1)
            axes.axhline(1, color=DEAD_GRAY, linewidth=1, linestyle=":")
        axes.set_xlabel("relaxation step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("energy / energy at the start")
        axes.set_title(f"{kind} phase", loc="left", fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    return figure


def residual_curves(run: Run) -> "Figure":
    """|dE/dx_l| of each layer against the relaxation step, in the first and the last recorded relaxation.

    Of a nudged phase, or of the free one where nothing else relaxes.
    """
    complete = [(s, r) for s, r in run.complete_relaxations if r["phases"]]
    if not complete:
        raise ConfigurationError("There is no relaxation to draw: train with callbacks=[ebm.RelaxationMonitor()].")
    chosen = [complete[0]] if len(complete) == 1 else [complete[0], complete[-1]]
    figure, panels = _figure(5.2 * len(chosen) + 1, 3.6, columns=len(chosen), sharey=True)
    for axes, (step, relaxation) in zip(panels if len(chosen) > 1 else [panels], chosen, strict=True):
        phase = next((p for p in relaxation["phases"] if p["nudge"]), relaxation["phases"][-1])
        for number, layer in enumerate(relaxation["layers"]):
            forces = [_bounded(row[number]) for row in phase["residual"]]
            shown = [force if force > 0 else math.nan for force in forces]  # exactly zero has no place on a log axis
            color = _shade(number, len(relaxation["layers"]))
            axes.plot(shown, color=color, marker=".", label=layer if any(forces) else f"{layer}: no force")
        axes.set_yscale("log")
        axes.set_xlabel("relaxation step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"global step {step}", loc="left", fontsize=10)
        axes.legend(fontsize=8, frameon=False, ncols=1 + len(relaxation["layers"]) // 8)
    (panels[0] if len(chosen) > 1 else panels).set_ylabel("|dE/dx| of the layer")
    return figure


def regime_layers(regime: Mapping[str, Any]) -> "Figure":
    """Angle to backprop and size of each layer's update, where the relaxation stopped and at equilibrium.

    Args:
        regime: as `Regime.as_dict` gives it.
    """
    layers = regime["layers"]
    figure, (left, right) = _figure(10, 1.7 + 0.36 * len(layers), columns=2, sharey=True)
    places = range(len(layers))
    for axes, key in ((left, "cosine"), (right, "norm_ratio")):
        stop, settled = ([_number(layer[f"{key}_{at}"]) for layer in layers] for at in ("stop", "equilibrium"))
        if key == "cosine":
            stop, settled = ([math.degrees(math.acos(max(-1, min(1, c)))) for c in side] for side in (stop, settled))
        axes.hlines(places, stop, settled, color=DEAD_GRAY, linewidth=2)
        axes.plot(settled, places, "D", color=EQUILIBRIUM_ORANGE, markersize=5, label="at equilibrium")
        axes.plot(stop, places, "o", color=BACKPROP_BLUE, markersize=9, fillstyle="none", label="where it stopped")
        axes.grid(axis="x", alpha=0.3)
    left.set_yticks(places, [layer["name"] for layer in layers])
    left.set_xlabel("angle to backprop's gradient, degrees")
    left.set_xlim(left=-1)
    positive = [v for layer in layers for v in (layer["norm_ratio_stop"], layer["norm_ratio_equilibrium"]) if v]
    if positive and min(positive) < 0.1:
        right.set_xscale("symlog", linthresh=max(min(positive), 1e-8))
    right.set_xlabel("|update| / |backprop's gradient|")
    right.axvline(1, color=DEAD_GRAY, linewidth=1, linestyle=":")
    left.legend(fontsize=8, frameon=False, loc="best")
    relaxed = "" if regime["relaxed"] is None else f"; relaxed {regime['relaxed']:.3f} of the way down"
    left.set_title(f"{regime['verdict']}{relaxed}", loc="left", fontsize=10)
    return figure


def regimes_map(regimes: Sequence[tuple[str, Mapping[str, Any]]]) -> "Figure":
    """Settings on the way from backprop to equilibrium: a dot a layer, a bar for the mean, the relaxed fraction beside.

    Args:
        regimes: ``[(name, Regime.as_dict())]``.
    """
    figure, axes = _figure(9.5, 1.6 + 0.42 * len(regimes))
    for place, (_, regime) in enumerate(regimes):
        alive = [layer for layer in regime["layers"] if layer["reach"] in ("signal", "read-out")]
        shares = [share for layer in alive if (share := layer["toward_equilibrium"]) is not None]
        if regime["verdict"].startswith("neither"):
            axes.hlines(place, 0, 1, color=ASTRAY_RED, linewidth=2, linestyle=":")
            axes.annotate("neither: a direction of its own", (0.5, place - 0.2), ha="center", va="bottom", fontsize=8)
        elif shares:
            axes.plot(shares, [place] * len(shares), "o", color=BACKPROP_BLUE, alpha=0.45, markersize=7)
            axes.plot([regime["toward_equilibrium"]], [place], "|", color="black", markersize=18, markeredgewidth=2.5)
        else:
            axes.hlines(place, 0, 1, color=DEAD_GRAY, linewidth=6, alpha=0.6)
            axes.annotate("backprop and equilibrium coincide", (0.5, place), ha="center", va="center", fontsize=8)
        relaxed = "" if regime["relaxed"] is None else f"{regime['relaxed']:.3f}"
        silent = len(regime["unreached"])
        note = f"  {silent} of {len(regime['layers'])} layers without signal" if silent else ""
        axes.annotate(relaxed + note, (1.06, place), va="center", fontsize=8, annotation_clip=False)
    axes.annotate("relaxed", (1.06, -0.85), va="center", fontsize=8, annotation_clip=False, fontstyle="italic")
    axes.axvspan(-0.05, 0.25, color=BACKPROP_BLUE, alpha=0.06)
    axes.axvspan(0.75, 1.05, color=EQUILIBRIUM_ORANGE, alpha=0.08)
    axes.set_xlim(-0.05, 1.05)
    axes.set_ylim(len(regimes) - 0.5, -0.6)
    axes.set_yticks(range(len(regimes)), [name for name, _ in regimes])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nbackprop", "", "in between", "", "1\nequilibrium"])
    axes.set_xlabel("angle(update, backprop) / (angle(update, backprop) + angle(update, equilibrium))")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _figure(width: float, height: float, columns: int = 1, sharey: bool = False) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained", dpi=110)
    figure._repr_png_ = partial(_png, figure)  # a notebook shows it, whatever backend was chosen there
    return figure, figure.subplots(1, columns, sharey=sharey)


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _colormaps() -> Any:
    import matplotlib

    return matplotlib.colormaps


def _shade(number: int, of: int) -> Any:
    return _colormaps()["viridis"](0.05 + 0.8 * number / max(of - 1, 1))


def _hatched(x: float, y: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, fill=False, hatch="///", linewidth=0, edgecolor="white")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _bounded(value: float | None) -> float:
    """A runaway may reach 1e300, which no axis can show."""
    return math.nan if value is None else max(-1e12, min(1e12, value))


def _is(kind: str, phase: Mapping[str, Any]) -> bool:
    return bool(phase["nudge"]) == (kind == "nudged")


def has_curves(run: Run) -> bool:
    """Whether `energy_curves` and `residual_curves` have anything to draw."""
    return any(relaxation["phases"] for _, relaxation in run.complete_relaxations)
