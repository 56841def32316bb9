"""The view for Weights & Biases names keys that a run has, and has a place for every key that a run logs."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from since import reads_wandb

import lightning_ebm as ebm
from lightning_ebm.reports import workspace as view
from lightning_ebm_cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
CHARTS = [*view.KEY_FIGURES, *(chart for charts in view.SECTIONS.values() for chart in charts)]
KEYS = {key for chart in CHARTS for key in chart.keys}
PREFIXES = {chart.each for chart in CHARTS if chart.each}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A run of the recipe that is shown first, read back from its own file by W&B's own reader."""
    folder = tmp_path_factory.mktemp("offline")
    every_step = {"every_n_steps": 1, "regime_every_n_steps": 1, "curvature_every_n_steps": 1}
    callbacks = [
        {"class_path": "lightning_ebm.GradientAlignment", "init_args": {"every_n_steps": 1}},
        {"class_path": "lightning_ebm.RelaxationMonitor", "init_args": every_step},
    ]
    (folder / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    words = ["recipes", "run", "digits", "--config", "callbacks.yaml", "--wandb", "offline"]
    words += ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"]
    # In a process of its own: within one, wandb keeps to the folder of its first run.
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    done = [sys.executable, "-m", "lightning_ebm_cli", *words]
    subprocess.run(done, cwd=folder, env=environment, capture_output=True, check=True, timeout=200)
    (directory,) = (path.parent for path in folder.rglob("run-*.wandb"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def logged(records):
    """Numbers by their names; of what is no number W&B writes parts, such as "alignment/heatmap.width"."""
    return {key for record in records if record.get("type") == "history" for key in record["history"]["item"]}


@reads_wandb
@pytest.mark.slow
def test_every_key_that_the_view_names_is_logged(logged):
    pictures = {f"{key}._type" for key in (*view.PICTURES, *view.TABLES)}
    assert {*KEYS, *view.TASK, view.STEP, *pictures} <= logged, sorted(logged)
    for prefix in PREFIXES:
        assert any(key.startswith(prefix) for key in logged), prefix


@reads_wandb
@pytest.mark.slow
def test_every_overall_figure_that_is_logged_has_a_place_in_the_view(logged):
    ours = {key for key in logged if key.startswith(("alignment/", "ebm/"))}
    assert {key for key in ours if len(key.split("/")) == 2 and "." not in key} == KEYS
    media = {key.partition(".")[0] for key in ours if "." in key}
    assert media - {"alignment/histogram", "ebm/residual_histogram"} == {*view.PICTURES, *view.TABLES}
    by_layer = {key.partition("/layer/")[0] for key in ours if "/layer/" in key}
    assert by_layer >= {"alignment", "ebm/residual", "ebm/toward_equilibrium"}


@reads_wandb
@pytest.mark.slow
def test_runs_are_drawn_as_the_groups_that_the_recipes_give_them(records):
    (run,) = (record["run"] for record in records if record.get("type") == "run")
    assert run["run_group"] == "predictive-coding"


def test_the_view_is_what_the_library_would_send():
    pytest.importorskip("wandb_workspaces")
    made = view.workspace("team", "project", ["my/metric"])
    sent = made._to_model().model_dump(by_alias=True)["spec"]["section"]
    sections = sent["panelBankConfig"]["sections"]
    lines = [p["config"] for s in sections for p in s["panels"] if p["viewType"] == "Run History Line Plot"]
    assert {key for line in lines for key in line["metrics"] or ()} == {*KEYS, "my/metric"}
    assert {line["metricRegex"] for line in lines} - {None} == {f"^{prefix}" for prefix in PREFIXES}
    assert {line["xAxis"] for line in lines} == {view.STEP}
    assert [s["name"] for s in sections if s["isOpen"]] == ["Key figures"]
    assert sections[0]["panels"][0]["config"]["metrics"] == ["my/metric"]
    text = json.dumps(sections[-1])
    assert all(key in text for key in (*view.PICTURES, *view.TABLES))
    assert sent["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]


def test_without_the_library_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ebm.ConfigurationError, match=r"lightning-ebm\[workspace\]"):
        view.workspace("team", "project")
    assert main(["workspace", "team/project"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "pip install" in line


def test_without_a_login_one_line_says_so(monkeypatch, capsys):
    """As the server's own client does, whatever is wrong with it."""
    ws = pytest.importorskip("wandb_workspaces.workspaces")
    from wandb.errors import UsageError

    def refuse(self):
        raise UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(ws.Workspace, "save", refuse)
    assert main(["workspace", "team/project", "--metric", "acc"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "wandb login" in line


def test_a_project_without_its_owner_is_answered_in_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["workspace", "project"])
    assert "TEAM/PROJECT" in capsys.readouterr().err.splitlines()[-1]
