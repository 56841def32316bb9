"""Runs side by side: seeds are put together, figures are those of the runs, and what a run is called cannot hurt."""

import json
import math
import re
import shutil
import statistics
import subprocess

import pytest

import lightning_ebm as ebm
from lightning_ebm.reports import comparison as comparison_report, html as html_report, interactive, runs
from lightning_ebm_cli import main

pytestmark = pytest.mark.filterwarnings("ignore")


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def write(root, name, seed, accuracies, relaxer="ErrorCoordinates", cosine=0.95, seconds=2.0, folder=None):
    """A run as our callbacks and CSVLogger leave it."""
    where = root / (folder or f"{name}-{seed}")
    where.mkdir(parents=True)
    lines = ["step,val/acc,val/loss", *(f"{10 * k},{a},{1 - a}" for k, a in enumerate(accuracies))]
    (where / "metrics.csv").write_text("\n".join(lines))
    angle = math.degrees(math.acos(cosine))
    records = [
        {"run": {"name": f"{name}-{seed}", "seed": seed, "optimizer": "Adam(lr=0.1)", "date": f"2026-01-0{seed + 1}"}},
        {"settings": {"relaxer": relaxer}},
        {"alignment": {}, "layers": {"net/1": cosine}, "angles": {"net/1": angle}, "dead": {}, "step": 0},
        {"run": {"seconds": seconds, "batch size": "8"}},
    ]
    (where / runs.FILE_NAME).write_text("\n".join(map(json.dumps, records)))
    return where


@pytest.fixture
def three(tmp_path):
    made = [write(tmp_path, "a", 0, [0.5, 0.7, 0.9]), write(tmp_path, "a", 1, [0.3, 0.9, 0.8])]
    return [runs.read(path) for path in [*made, write(tmp_path, "b", 0, [0.1, 0.2, 0.3], "Sweep", 1 - 1e-9)]]


def test_runs_that_differ_by_their_seed_alone_are_one_group(three):
    one, two = comparison_report.groups(three)
    assert [len(one.runs), len(two.runs)] == [2, 1]
    assert (one.label, two.label) == ("a", "b-0")
    assert comparison_report.differences([one, two]) == [("relaxer", ["ErrorCoordinates", "Sweep"])]


def test_the_table_holds_mean_and_spread_of_the_last_values(three):
    table = comparison_report.finals(comparison_report.groups(three))
    row = dict(zip(table.headers, table.rows[0], strict=True))
    mean, deviation = statistics.mean([0.9, 0.8]), statistics.stdev([0.9, 0.8])
    assert row["val/acc"] == f"{mean:.4g} ± {deviation:.2g}"
    assert row["mean angle"] == f"{math.degrees(math.acos(0.95)):.3g}°"
    assert row["seeds"] == "2"
    assert dict(zip(table.headers, table.rows[1], strict=True))["mean angle"] == "0.00256°"


def test_what_no_row_has_takes_no_column(tmp_path):
    """A run that recorded no regime has a table of layers without its columns."""
    run = runs.read(write(tmp_path, "a", 0, [0.5, 0.7]))
    table = html_report.layers(run)
    assert [table.headers[column] for column in table.columns] == ["layer", "cosine, last", "lowest", "mean"]
    page = html_report.page(run)
    assert '<th class="n">mean</th>' in page
    assert "at equilibrium" not in page.partition("<h2>Layers</h2>")[2]


def test_bands_reach_from_the_lowest_seed_to_the_highest(three):
    seeds = [run.metrics["val/acc"] for run in three[:2]]
    steps, mean, low, high = interactive.band(seeds)
    assert steps == [0, 10, 20]
    assert mean == pytest.approx([0.4, 0.8, 0.85])
    assert low == [0.3, 0.7, 0.8]
    assert high == [0.5, 0.9, 0.9]
    area, line = interactive.metric("val/acc", [("a", seeds)]).data
    assert list(area.y) == [0.5, 0.9, 0.9, 0.8, 0.7, 0.3]
    assert list(line.y) == mean


def test_seeds_of_different_length_are_compared_where_both_are():
    steps, mean, *_ = interactive.band([[(0, 1.0), (5, 2.0)], [(0, 3.0)]])
    assert (steps, mean) == ([0], [2.0])


def test_the_axis_of_alignment_tells_nines_apart():
    """Cosines of 0.95, 0.9999 and 1 - 1e-9 are as far apart as their angles, on a logarithmic axis."""
    cosines = [0.95, 0.9999, 1 - 1e-9]
    angles = [math.degrees(math.acos(c)) for c in cosines]
    figure = interactive.alignment([(k, {"l": angle}) for k, angle in enumerate(angles)])
    assert figure.layout.yaxis.type == "log"
    assert list(figure.data[0].y) == angles
    for shown, cosine in zip(figure.data[0].customdata, cosines, strict=True):
        assert 1 - float(shown) == pytest.approx(1 - cosine, rel=0.05)
    assert list(interactive.alignment([(0, {"l": 0.0}), (1, {"l": None})]).data[0].y) == [1e-3, None]


def test_loss_and_accuracy_have_axes_of_their_own(three):
    assert html_report.curves(three[0]) == ["val/acc", "val/loss"]
    page = html_report.page(three[0])
    assert page.count("Plotly.newPlot(") == 3  # accuracy, loss, alignment
    assert comparison_report.page(three).count("Plotly.newPlot(") == 4  # and cost


HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium to see the page in a browser")
def test_in_a_real_browser_names_of_axes_lie_beside_their_numbers_and_figures_are_whole(three, tmp_path):
    """Numbers such as 0.002 degrees are wide; "0.9 ± 0.05" stays on one line."""
    probe = """<script>onload = () => {
        const page = document.documentElement, figures = [...document.querySelectorAll('.plotly-graph-div')];
        const box = e => e.getBoundingClientRect(), all = (e, s) => [...e.querySelectorAll(s)];
        const apart = (name, tick) => box(name).right + 8 < box(tick).left;
        const clear = f => all(f, '.ytick text').every(t => all(f, '.ytitle').every(y => apart(y, t)));
        page.dataset.clear = figures.filter(clear).length + '/' + figures.length;
        const lines = cell => (r => (r.selectNodeContents(cell), r.getClientRects().length))(new Range());
        page.dataset.lines = Math.max(...all(document, 'td.n').map(lines));
    }</script></body>"""
    page = tmp_path / "page.html"
    page.write_text(comparison_report.page(three).replace("</body>", probe))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000", "--window-size=420,900", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', dom.partition("<head>")[0]))
    clear, whole = map(int, found["clear"].split("/"))
    assert clear == whole >= 4
    assert found["lines"] == "1"


def test_nothing_from_a_run_becomes_markup(tmp_path):
    where = write(tmp_path, HOSTILE, 0, [0.1, 0.2, 0.3], relaxer=HOSTILE, folder="hostile")
    text = (where / runs.FILE_NAME).read_text().replace("net/1", HOSTILE.replace('"', "'"))
    (where / runs.FILE_NAME).write_text(text + "\n" + json.dumps({"advice": HOSTILE, "step": 1}))
    (where / "metrics.csv").write_text(f"step,acc{HOSTILE}\n0,0.1\n1,0.2\n2,0.3\n")
    run = runs.read(where)
    other = runs.read(write(tmp_path, "b", 0, [0.1, 0.2, 0.3]))
    for page in (html_report.page(run), comparison_report.page([run, other])):
        assert "<img" not in page.replace(interactive.script(), "")


def test_a_directory_above_runs_means_the_newest(tmp_path):
    import os

    old, new = write(tmp_path, "a", 0, [0.1]), write(tmp_path, "a", 1, [0.2])
    os.utime(old, (1, 1))
    assert runs.read(tmp_path).path == new


def test_a_directory_that_is_not_there_is_named_with_the_nearest(tmp_path, capsys):
    write(tmp_path, "predictive", 0, [0.1])
    with pytest.raises(ebm.ConfigurationError, match=r"Did you mean .*predictive-0"):
        runs.read(tmp_path / "predctive-0")
    assert main(["compare", str(tmp_path / "none")]) == 1
    assert "There is no directory" in capsys.readouterr().err


def test_runs_of_which_nothing_is_known_are_compared_by_their_scalars(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,val/acc\n0,0.1\n1,0.2\n2,0.25\n")
    assert main(["compare", "x", "y"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("0.25") == 2
    assert "unknown" in shown
