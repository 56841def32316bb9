"""What the monitor logs equals a computation with explicit states, and reaches any logger and W&B's own file."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning_modules import Template
from since import reads_wandb
from test_recording import by_hand
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm
from lightning_ebm.__main__ import main
from lightning_ebm.reports import runs

pytestmark = pytest.mark.filterwarnings("ignore")


class Regression(L.LightningModule):
    """A tanh network with a known answer; batches of seven, never shuffled, weights that stay."""

    def __init__(self, lr=0.0, depth=3):
        super().__init__()
        torch.manual_seed(0)
        layers = [module for _ in range(depth) for module in (nn.Linear(5, 5), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(5, 3)).double()
        self.lr = lr
        self.x, self.y = torch.randn(28, 5).double(), torch.randn(28, 3).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = 0.5 * (self.net(x) - y).square().sum(1).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.y), 7)


def fit(tmp_path, module, callbacks, algorithm="predictive-coding", **options):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(algorithm), accelerator="cpu", devices=1,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, default_root_dir=tmp_path,
        callbacks=callbacks, **{"logger": False, "max_epochs": 1, "enable_progress_bar": False, **options},
    )  # fmt: skip
    trainer.fit(module)
    return trainer


class Seen(L.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("ebm/")})


@pytest.mark.parametrize("accumulate", [1, 4])
def test_logged_numbers_equal_a_simulation_with_explicit_states(tmp_path, accumulate):
    module, seen = Regression(), Seen()
    euler = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.1, 6))
    monitor = ebm.RelaxationMonitor(every_n_steps=1, regime_every_n_steps=None)
    fit(tmp_path, module, [monitor, seen], euler, accumulate_grad_batches=accumulate)
    for number, logged in enumerate(seen.rows):
        batch = slice(7 * number, 7 * number + 7)
        internal, loss, forces, trajectory = by_hand(module.net, module.x[batch], module.y[batch], 0.1, 6)
        assert logged["ebm/energy_free"] == 0.0  # the forward pass of a divergence energy: nothing was relaxed
        assert logged["ebm/energy_nudged"] == pytest.approx(internal[-1] + loss[-1], rel=1e-6)
        assert logged["ebm/steps"] == 6
        fallen = [internal[0] + loss[0] - a - b for a, b in zip(internal, loss, strict=True)]
        assert logged["ebm/effective_steps"] == next(t for t, part in enumerate(fallen) if part >= 0.99 * fallen[-1])
        per_sample = [torch.stack([f.square().sum(1) for f in point[1]]).sum(0).sqrt() for point in trajectory]
        residual = per_sample[-1] / per_sample[0]
        assert logged["ebm/residual"] == pytest.approx(float(residual.mean()), rel=1e-6)
        assert logged["ebm/residual_max"] == pytest.approx(float(residual.max()), rel=1e-6)
        assert logged["ebm/step_size"] == pytest.approx(0.1, rel=1e-6)
        for layer, force in zip((1, 3, 5), forces[-1], strict=True):
            assert logged[f"ebm/residual/layer/net/{layer}"] == pytest.approx(force / max(forces[0]), rel=1e-6)
    assert monitor.statuses == {"fixed": 4}


def test_relaxing_records_its_course_for_whoever_asks():
    """Against the same simulation; a layer k below the output first moves at step k + 1."""
    module = Regression()
    x, y = module.x[:7], module.y[:7]
    internal, loss, forces, _ = by_hand(module.net, x, y, 0.1, 6)
    learner = ebm.Learner(module.net, "predictive-coding")

    def closure():
        return 0.5 * (module.net(x) - y).square().sum(1).mean()

    settings = {"nudge": 1.0, "relaxer": ebm.GradientDescent(0.1, 6)}
    relaxed = learner.relax(closure, **settings, record=True)
    course = relaxed.course
    assert course["internal"] == pytest.approx(internal, rel=1e-6)
    assert course["loss"] == pytest.approx(loss, rel=1e-6)
    assert len(course["residual"]) == len(forces)
    for seen, force in zip(course["residual"], forces, strict=True):
        assert seen == pytest.approx(force, rel=1e-6, abs=1e-12)
    assert dict(zip(relaxed.states, course["arrived"], strict=True)) == {"1": 3, "3": 2, "5": 1}
    unseen = learner.relax(closure, **settings)
    assert unseen.course is None
    assert all(torch.equal(unseen.states[name], state) for name, state in relaxed.states.items())


def test_the_regime_of_a_training_step_is_that_of_its_batch(tmp_path):
    """Measured inside the Trainer, and by hand on the same batch: the same numbers."""
    module, seen = Regression(), Seen()
    algorithm = ebm.algorithm("error-pc")
    monitor = ebm.RelaxationMonitor(every_n_steps=1, regime_every_n_steps=4)
    fit(tmp_path, module, [monitor, seen], algorithm)
    x, y = module.x[21:], module.y[21:]  # the fourth batch, the last measured
    expected = ebm.regime.of(module.net, lambda: 0.5 * (module.net(x) - y).square().sum(1).mean(), algorithm)
    assert seen.rows[-1]["ebm/relaxed"] == pytest.approx(expected.relaxed, rel=1e-6)
    assert seen.rows[-1]["ebm/toward_equilibrium"] == pytest.approx(expected.toward_equilibrium, rel=1e-5)
    for mine, theirs in zip(monitor.regime.layers, expected.layers, strict=True):
        assert mine.cosine_stop == pytest.approx(theirs.cosine_stop, abs=1e-9)
        assert mine.norm_ratio_equilibrium == pytest.approx(theirs.norm_ratio_equilibrium, rel=1e-6)


def test_only_monitored_steps_are_recorded_and_training_is_the_same(tmp_path):
    """Weights bit for bit, dropout and BatchNorm included."""
    torch.manual_seed(0)
    plain = Template()
    torch.manual_seed(0)
    watched = Template()
    fit(tmp_path, plain, [], max_epochs=2)
    monitor = ebm.RelaxationMonitor(every_n_steps=5, regime_every_n_steps=5)
    fit(tmp_path, watched, [monitor, ebm.GradientAlignment(every_n_steps=3)], max_epochs=2)
    assert sum(monitor.statuses.values()) == 3  # steps 0, 4 and 9
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Bounded(Regression):
    """Small weights and bounded units, which every energy of the family can settle."""

    def __init__(self):
        super().__init__(0.05, depth=2)
        for p in self.parameters():
            p.data *= 0.7


@pytest.mark.parametrize("preset", [name for name in ebm.algorithms() if name != "backprop"])
def test_every_preset_is_seen_and_trains_as_if_nobody_looked(tmp_path, preset):
    plain, watched = Bounded(), Bounded()
    fit(tmp_path, plain, [], preset)
    logger = CSVLogger(tmp_path, name="", version=0)
    monitor = ebm.RelaxationMonitor(every_n_steps=2, regime_every_n_steps=2)
    alignment = ebm.GradientAlignment(every_n_steps=2, warn_below=None)
    fit(tmp_path, watched, [monitor, alignment], preset, logger=logger)
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    run = runs.read(tmp_path / "version_0")
    assert run.relaxations
    for _, relaxation in run.relaxations:
        for phase in relaxation["phases"]:
            assert all(row[0] is not None for row in phase["residual"])
    if preset not in ("incremental-pc", "holomorphic-ep"):
        assert monitor.regime.settled
        assert len(monitor.regime.layers) >= 2
    assert main(["report", str(tmp_path / "version_0")]) == 0


def test_a_csv_run_can_be_read_back(tmp_path):
    monitor = ebm.RelaxationMonitor(every_n_steps=2, regime_every_n_steps=4)
    logger = CSVLogger(tmp_path, name="", version=0)
    fit(tmp_path, Regression(0.1), [monitor], logger=logger, max_epochs=2)
    run = runs.read(tmp_path / "version_0")
    assert [step for step, _ in run.relaxations] == [0, 1, 3, 5, 7]
    assert [step for step, _ in run.regimes] == [0, 3, 7]
    assert "OneSided(strength=1.0)" in run.settings["nudge"]
    with (tmp_path / "version_0" / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row["ebm/energy_nudged"]}
    for step, relaxation in run.relaxations:
        phase = relaxation["phases"][0]
        energy = phase["internal"][-1] + phase["nudge"] * phase["loss"][-1]
        assert float(rows[step]["ebm/energy_nudged"]) == pytest.approx(energy, rel=1e-4)
    assert dict(run.metrics["ebm/steps"]) == {step: float(row["ebm/steps"]) for step, row in rows.items()}


@reads_wandb
def test_the_offline_run_holds_curves_and_comparisons_as_one_table_each(tmp_path):
    """Read back from the file itself, with W&B's own reader."""
    import wandb

    wandb.run = None  # of an earlier test in this process, torn down
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    callbacks = [ebm.RelaxationMonitor(1, regime_every_n_steps=4), ebm.GradientAlignment(every_n_steps=2)]
    fit(tmp_path, Regression(0.1), callbacks, logger=logger, max_epochs=2)
    directory = Path(logger.experiment.dir).parent
    wandb.finish()
    wandb.teardown()
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(directory)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
    records = [json.loads(line) for line in text.splitlines() if line.strip()]
    rows = [r["history"]["item"] for r in records if r.get("type") == "history"]
    defined = {r["metric"]["name"]: r["metric"] for r in records if r.get("type") == "metric" and "name" in r["metric"]}
    scalars = [row for row in rows if "ebm/energy_nudged" in row]
    assert [row["trainer/global_step"] for row in scalars] == list(range(8))
    assert defined["ebm/residual"]["step_metric"] == "trainer/global_step"
    run = runs.read(directory)
    tables = {path.parent.name + "/" + path.name.split("_")[0]: json.loads(path.read_text())
              for path in (directory / "files").rglob("*.table.json")}  # fmt: skip
    assert sorted(tables) == ["alignment/table", "ebm/curves"]
    by_step: dict[int, list[float]] = {}
    for step, phase, number, energy in tables["ebm/curves"]["data"]:
        assert phase == "nudged"
        assert number == len(by_step.setdefault(step, []))
        by_step[step].append(energy)
    assert list(by_step) == [0, 3, 7]
    for step, energies in by_step.items():
        assert energies == pytest.approx(dict(run.relaxations)[step]["phases"][0]["energies"], rel=1e-5)
    compared = [row[0] for row in tables["alignment/table"]["data"]]
    assert sorted(set(compared)) == [0, 1, 3, 5, 7]
    for key in ("alignment/histogram", "ebm/residual_histogram"):
        assert any(name.startswith(key) for row in rows for name in row), key
    images = [row for row in rows if any(key.startswith("alignment/heatmap") for key in row)]
    assert len(images) == 1
    assert any(path.name.startswith("heatmap") for path in (directory / "files").rglob("*.png"))
    assert not any("." in name.removeprefix("trainer/") for name in defined)
    assert run.alignment_by_layer[-1][0] == 7


def test_other_loggers_get_the_figures_they_have_a_call_for(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    drawn = []
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(type(logger.experiment), "add_figure", lambda self, key, figure, step: drawn.append(key))
    fit(tmp_path, Regression(0.1), [ebm.RelaxationMonitor(2), ebm.GradientAlignment(2)], logger=logger)
    assert drawn == ["ebm/energy_curves", "alignment/heatmap"]


def test_a_runaway_is_kept_until_the_moment_it_was_stopped(tmp_path):
    """The recording of the relaxation that raised is in the run's file, and so is the error."""
    algorithm = ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(5.0, 30))
    monitor = ebm.RelaxationMonitor(1, regime_every_n_steps=None)
    logger = CSVLogger(tmp_path, name="", version=0)
    with pytest.raises(ebm.RelaxationDivergedError):
        fit(tmp_path, Regression(), [monitor], algorithm, logger=logger)
    run = runs.read(tmp_path / "version_0")
    ((step, relaxation),) = run.relaxations
    assert (step, relaxation["status"]) == (0, "diverged")
    forces = relaxation["phases"][0]["residual"]
    assert max(forces[-1]) > 1e3 * max(forces[0])
    assert any("RelaxationDivergedError" in record.get("stopped", "") for record in run.records)


def test_under_a_stock_strategy_it_is_refused(tmp_path):
    trainer = L.Trainer(callbacks=[ebm.RelaxationMonitor()], accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ebm.ConfigurationError, match="none do"):
        trainer.fit(Template())


def test_the_control_relaxes_nothing_and_is_said_to(tmp_path):
    monitor = ebm.RelaxationMonitor(1)
    fit(tmp_path, Template(), [monitor], "backprop")
    assert not monitor.statuses
    assert monitor.regime is None


def test_the_end_of_a_fit_is_told_on_a_console_and_can_be_silenced(tmp_path, capsys, caplog):
    import logging

    callbacks = [ebm.RelaxationMonitor(2), ebm.GradientAlignment(2)]
    fit(tmp_path, Regression(0.1), callbacks, enable_progress_bar=True)
    told = capsys.readouterr().out
    assert "Cosine to the true gradient" in told
    assert "relaxations monitored" in told
    with caplog.at_level(logging.ERROR, logger="lightning_ebm"):
        fit(tmp_path, Regression(0.1), callbacks, enable_progress_bar=True)
    assert "Cosine" not in capsys.readouterr().out
