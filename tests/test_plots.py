"""Pictures show the numbers they were given."""

import math

import numpy as np
import pytest
from test_advice import relaxation

import lightning_ebm as ebm
from lightning_ebm.reports import plots
from lightning_ebm.reports.runs import Run

ROWS = [(0, {"net/1": 0.5, "net/3": 0.9}), (4, {"net/1": None, "net/3": -0.2})]


def test_the_heatmap_holds_the_cosines_and_marks_the_dead():
    axes, _ = plots.alignment_heatmap(ROWS).axes
    shown = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
    assert np.allclose(shown, [[0.5, math.nan], [0.9, -0.2]], equal_nan=True)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["net.1", "net.3"]
    assert [text.get_text() for text in axes.texts] == ["dead", "-0.2000"]
    assert axes.images[0].norm.vmin == -0.2
    assert len([patch for patch in axes.patches if patch.get_hatch()]) == 1


def run_of(*records):
    for record in records:
        for phase in record["relaxation"]["phases"]:
            phase |= {"internal": [0.0, 0.5], "loss": [4.0, 2.0]}
    return Run(None, {}, list(records))


def test_energy_and_residual_curves():
    run = run_of(relaxation(0, [[1.0, 2.0], [0.1, 0.2]]), relaxation(9, [[1.0, 0.0], [0.3, 0.0]]))
    (axes,) = plots.energy_curves(run).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.0, 0.625]] * 2
    first, last = plots.residual_curves(run).axes
    assert [list(line.get_ydata()) for line in first.lines] == [[1.0, 0.1], [2.0, 0.2]]
    assert list(last.lines[0].get_ydata()) == [1.0, 0.3]
    assert last.get_legend().get_texts()[1].get_text() == "b: no force"


def layer(share, reach="signal", detour=0.0):
    return {
        "name": "a", "toward_equilibrium": share, "reach": reach, "detour": detour,
        "cosine_stop": 1.0, "cosine_equilibrium": 0.5, "norm_ratio_stop": 0.1, "norm_ratio_equilibrium": 1.0,
    }  # fmt: skip


def test_the_map_of_regimes_has_a_dot_a_layer():
    one = {
        "layers": [layer(0.1), layer(0.3), layer(None, "none")],
        "toward_equilibrium": 0.2,
        "relaxed": 0.5,
        "unreached": ["c"],
    }
    two = {"layers": [layer(None)], "toward_equilibrium": None, "relaxed": None, "unreached": []}
    (axes,) = plots.regimes_map([("one", one | {"verdict": "x"}), ("two", two | {"verdict": "both"})]).axes
    dots, mean = axes.lines
    assert list(dots.get_xdata()) == [0.1, 0.3]
    assert list(mean.get_xdata()) == [0.2]
    texts = [text.get_text() for text in axes.texts]
    assert "0.500  1 of 3 layers without signal" in texts
    assert "backprop and equilibrium coincide" in texts


def test_angles_of_a_regime():
    regime = {"layers": [layer(0.1)], "verdict": "x", "relaxed": None}
    left, right = plots.regime_layers(regime).axes
    settled, stop = left.lines
    assert list(stop.get_xdata()) == [0.0]
    assert list(settled.get_xdata()) == pytest.approx([60.0])
    assert [list(line.get_xdata()) for line in right.lines[:2]] == [[1.0], [0.1]]


def test_without_anything_to_draw_the_callback_is_named():
    with pytest.raises(ebm.ConfigurationError, match="GradientAlignment"):
        plots.alignment_heatmap([])
    for draw in (plots.energy_curves, plots.residual_curves):
        with pytest.raises(ebm.ConfigurationError, match="RelaxationMonitor"):
            draw(Run(None))
