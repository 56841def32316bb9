"""Four runs, and a reader sees at a glance which is which: in words, in the page, and in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_ebm as ebm
from lightning_ebm.reports import advice, interactive, runs
from lightning_ebm_cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from four_runs import CASES, train

pytestmark = pytest.mark.filterwarnings("ignore")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("four")
    return {case.name: train(case, root, epochs=2) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "word", "found"),
    [
        ("sound", "sound", ()),
        ("five_steps", "cut off", ()),
        ("diverging", "diverged", ("RelaxationDivergedError",)),
        ("dead_layer", "dead", ("net.2.weight",)),
    ],
)
def test_each_run_gets_its_word_and_its_warnings(directories, capsys, name, word, found):
    directory = directories[name]
    run = runs.read(directory)
    assert advice.verdict(run.records)[0] == word
    findings = advice.findings(run.records)
    assert all(any(text in finding for finding in findings) for text in found)
    if not found:
        assert findings == []
    assert main(["report", str(directory)]) == 0
    assert capsys.readouterr().out.startswith(word)
    page = (directory / "report.html").read_text()
    assert f"><b>{word}</b>" in page
    for text in found:
        assert text in page
    # self-contained: nothing is fetched
    assert not re.search(r'<[^>]*(src|href)=["\'](?!data:)', page.replace(interactive.script(), ""))
    for fact in ("device 1 x cpu", "seed 0", "optimizer Adam(lr=0.002", "batch size 64", "trained for", "torch 2."):
        assert fact in page
    for part in ("Alignment", "Relaxation", "Layers", "Settings", "Results"):
        assert f"<h2>{part}</h2>" in page
    assert ">dead<" in page if name == "dead_layer" else ">dead<" not in page


@pytest.mark.slow
def test_the_table_of_layers_holds_what_was_measured(directories):
    directory = directories["sound"]
    run = runs.read(directory)
    main(["report", str(directory), "--output", str(directory / "other.html")])
    page = (directory / "other.html").read_text()
    series = [row["net/1"] for _, row in run.alignment_by_layer]
    row = re.search(r"<tr><td>net\.1</td>(.*?)</tr>", page).group(1)
    cells = re.findall(r">([^<]*)</td>", row)
    assert cells[:3] == [f"{value:.4g}" for value in (series[-1], min(series), sum(series) / len(series))]
    layer = next(layer for layer in run.regimes[-1][1]["layers"] if layer["name"] == "net.1")
    assert cells[3:] == [f"{layer['cosine_equilibrium']:.4g}", f"{layer['norm_ratio_stop']:.4g}", layer["verdict"]]
    accuracy = run.metrics["test/accuracy"][-1][1]
    assert f'<td>test/accuracy</td><td class="n">{accuracy:.4g}</td>' in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium to see the page in a browser")
@pytest.mark.slow
def test_in_a_real_browser_every_figure_is_drawn_without_a_network(directories, tmp_path):
    """A probe is added to a copy of the page; it writes what the browser made of it into the document."""
    directory = directories["dead_layer"]
    assert main(["report", str(directory)]) == 0
    probe = """<script>onload = () => {
        const page = document.documentElement, figures = [...document.querySelectorAll('.plotly-graph-div')];
        const drawn = f => f.querySelector('.main-svg') && f.querySelectorAll('.trace').length > 0;
        page.dataset.drawn = figures.filter(drawn).length + '/' + figures.length;
        page.dataset.inside = figures.every(f => f.getBoundingClientRect().right <= page.clientWidth);
        page.dataset.fits = page.scrollWidth <= page.clientWidth;
        page.dataset.colour = getComputedStyle(document.getElementById('verdict')).backgroundColor;
        page.dataset.bad = getComputedStyle(document.querySelector('tr.bad td')).color;
    }</script></body>"""
    page = tmp_path / "page.html"
    page.write_text((directory / "report.html").read_text().replace("</body>", probe))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1100,900", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', dom.partition("<head>")[0]))
    drawn, whole = map(int, found["drawn"].split("/"))
    assert drawn == whole >= 6
    assert found["inside"] == "true"
    assert found["fits"] == "true"
    assert found["colour"] == "rgb(85, 60, 154)"
    assert found["bad"] == "rgb(197, 48, 48)"


@pytest.mark.slow
def test_from_the_command_line(directories, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_ebm", "report", str(directories["sound"]), "-o", str(tmp_path / "r.html")],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").exists()


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "lightning_logs/version_0" in capsys.readouterr().err
    with pytest.raises(ebm.ConfigurationError, match="holds no run"):
        runs.read(tmp_path)


def test_a_run_without_our_callbacks_still_has_its_scalars(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/acc\n0,0,2.5,\n0,1,2.0,\n0,1,,0.5\n")
    run = runs.read(tmp_path)
    assert run.metrics == {
        "epoch": [(0, 0.0), (1, 0.0), (1, 0.0)],
        "train/loss": [(0, 2.5), (1, 2.0)],
        "val/acc": [(1, 0.5)],
    }
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "unknown" in page
    assert "ebm.RelaxationMonitor()" in page


def test_a_file_cut_off_in_mid_line_is_read_up_to_there(tmp_path):
    (tmp_path / runs.FILE_NAME).write_text('{"settings": {"energy": "E"}}\n{"step": 3, "rel')
    assert runs.read(tmp_path).settings == {"energy": "E"}


WHOLE = {"step": 3, "relaxation": {"status": "fixed", "steps": 1, "layers": [], "residual": 0.0, "phases": []}}
LINES = [
    b"{cut", b"3", b"null", b"[1]", b"\xff\xfe\x00", b'{"run": 3}', b'{"settings": "x"}', b'{"stopped": "x"}',
    b'{"step": 1, "relaxation": {}}', b'{"step": 1, "regime": 3}', b'{"step": "x", "regime": {}}',
    b'{"step": 1, "alignment": {}}',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_lines_that_cannot_be_read_are_left_out_and_counted(line, tmp_path, caplog):
    """Of a run that was killed, a disk that was full, another version: the page is made of the rest."""
    (tmp_path / runs.FILE_NAME).write_bytes(line + b"\n" + json.dumps(WHOLE).encode() + b"\n")
    assert runs.read(tmp_path).records == [WHOLE]
    assert "1 of 2 lines" in caplog.text
    assert main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize("table", [b"\xff\xfe\x00", b"step,loss\nx,1\n"])
def test_a_table_that_is_none_is_one_line(table, tmp_path, capsys):
    (tmp_path / "metrics.csv").write_bytes(table)
    for command in (["report", str(tmp_path)], ["compare", str(tmp_path), "-o", str(tmp_path / "page.html")]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / 'metrics.csv'} is no table of CSVLogger, or damaged")
        assert said.count("\n") == 1


def test_a_run_that_wandb_cannot_read_is_answered_by_its_version_and_the_one_that_can(tmp_path, monkeypatch, capsys):
    """As before 0.31, which has no such command."""
    (tmp_path / "run-abc.wandb").write_bytes(b"no log")
    answered = subprocess.CompletedProcess([], 2, "", "Error: No such command 'leet'.\n")
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: answered)
    assert main(["report", str(tmp_path)]) != 0
    told = capsys.readouterr().err
    assert "pip install 'wandb>=0.31'" in told
    assert "No such command 'leet'" in told
    assert "Traceback" not in told
