"""What a notebook shows: every object's own numbers, as a table, with nothing in it that is markup."""

import json
import pickle
import re
from html import unescape
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lightning_ebm as ebm
from lightning_ebm import notebook
from lightning_ebm.reports.runs import Run


def cells(html):
    return [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", html)]


@pytest.fixture
def step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    closure = lambda: nn.functional.cross_entropy(net(x), y)  # noqa: E731
    learner = ebm.Learner(net, "predictive-coding")
    learner.backward(closure)
    return SimpleNamespace(net=net, x=x, closure=closure, learner=learner)


def test_the_layer_table(step):
    found = ebm.summary(step.net, step.x)
    assert cells(found._repr_html_()) == [cell for row in found._rows() for cell in row]


def test_a_layer_of_many_parameters_names_the_first_and_counts_the_others():
    """Twelve a block, of which a line of a table has room for one; `layers` has them all."""
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)
    found = ebm.summary(net, torch.randn(2, 5, 16), layers=nn.TransformerEncoderLayer)
    names = [name for name, _ in net.named_parameters()]
    for index, layer in enumerate(found.layers):
        assert list(layer.parameters) == [name for name in names if name.startswith(f"layers.{index}.")]
        assert f"{layer.parameters[0]} and 11 more ({layer.num_parameters:,})" in str(found)
    assert list(found.readout) == [name for name in names if name.startswith("layers.2.")]
    assert f"{found.readout[0]} and 11 more" in cells(found._repr_html_())
    assert max(len(line) for line in str(found).splitlines()[:6]) < 140


def test_an_algorithm_shows_its_parts():
    rule = ebm.algorithm("pc-nudge", nudge=ebm.Centered(0.01))
    shown = cells(rule._repr_html_())
    assert dict(zip(shown[::2], shown[1::2], strict=True)) == rule.describe()


def test_a_report_is_the_dictionary_that_it_was_and_a_table(step):
    report = step.learner.report
    assert json.loads(json.dumps(report)) == report
    assert pickle.loads(pickle.dumps(report)) == report
    shown = cells(report._repr_html_())
    table = dict(zip(shown[::2], shown[1::2], strict=True))
    assert table["loss"] == f"{report['loss']:.6g}"
    assert table["phase at nudge 1.0"] == f"{report['result']} after {report['steps']} steps"


def test_a_regime_shows_a_row_a_layer(step):
    regime = ebm.regime.of(step.net, step.closure, "predictive-coding")
    shown = cells(regime._repr_html_())
    rows = [shown[i : i + 6] for i in range(0, len(shown), 6)]
    assert [row[0] for row in rows] == [layer.name for layer in regime.layers]
    assert [row[1] for row in rows] == [f"{layer.cosine_stop:.4f}" for layer in regime.layers]


def test_a_run_shows_its_verdict_and_its_last_figures(tmp_path):
    run = Run(tmp_path, {"val/acc": [(0, 0.5), (1, 0.75)]}, [{"run": {"name": "<b>mine", "seed": "3"}}])
    html = run._repr_html_()
    assert "<b>mine" not in html
    assert "unknown" in html
    assert cells(html) == ["name", "<b>mine", "seed", "3", "val/acc", "0.75"]


def test_a_figure_shows_itself_without_a_magic_word():
    from lightning_ebm.reports import plots

    figure = plots.alignment_heatmap([(0, {"net/1": 0.5}), (4, {"net/1": 0.9})])
    assert figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


def test_texts_are_escaped():
    assert "<script" not in notebook.table("<script>", ["<script>"], [["<script>"]])
