"""What the callback logs equals a comparison made by hand, reaches any logger, and W&B's own file."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning_modules import Template

import lightning_ebm as ebm

pytestmark = pytest.mark.filterwarnings("ignore")


class Recorder(L.Callback):
    """Keeps .grad, weights and generators around each backward, and what was logged there."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch, self.state = batch, torch.get_rng_state()
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.statistics = {name: b.clone() for name, b in module.named_buffers()}

    def on_before_backward(self, trainer, module, loss):
        self.before = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()
        }

    def on_after_backward(self, trainer, module):
        added = {n: p.grad - self.before[n] for n, p in module.named_parameters()}
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("alignment/")}
        self.rows.append((trainer.global_step, self.batch, self.state, self.weights, self.statistics, added, logged))


def run(tmp_path, callbacks, **options):
    L.seed_everything(0, verbose=False)
    module = Template()
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy("predictive-coding"), max_epochs=2, accelerator="cpu", devices=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        default_root_dir=tmp_path, callbacks=callbacks, **{"logger": False, **options},
    )  # fmt: skip
    trainer.fit(module)
    return module, trainer


@pytest.mark.parametrize("accumulate", [1, 3])
def test_logged_numbers_equal_a_comparison_by_hand(tmp_path, accumulate):
    """Each micro-batch against plain autograd on a stock module at the same weights, masks and statistics."""
    recorder = Recorder()
    clip = {"gradient_clip_val": 1e-3}  # later hooks would see clipped gradients
    run(tmp_path, [ebm.GradientAlignment(every_n_steps=1), recorder], accumulate_grad_batches=accumulate, **clip)
    assert len(recorder.rows) == 12
    first_of_step = {}
    for index, (step, *_) in enumerate(recorder.rows):
        first_of_step.setdefault(step, index)
    for index, (_, (x, y), state, weights, statistics, added, logged) in enumerate(recorder.rows):
        if index not in first_of_step.values():
            continue  # later micro-batches of a step are compared together with the first
        stock = Template()
        stock.load_state_dict({**stock.state_dict(), **weights, **statistics}, strict=False)
        torch.set_rng_state(state)
        loss = torch.nn.functional.cross_entropy(stock.net(x), y) / accumulate
        names, parameters = zip(*stock.named_parameters(), strict=True)
        true = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        expected = ebm.metrics.alignment(added, true)
        for name, value in expected.items():
            assert logged[f"alignment/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5)
        one = ebm.metrics.alignment({"w": added["net.4.weight"]}, {"w": true["net.4.weight"]})
        assert logged["alignment/cosine/net/4/weight"] == pytest.approx(one["cosine"], rel=1e-4, abs=1e-5)
        assert 0 < logged["alignment/cosine"] < 0.999  # predictive coding at lambda = 1 is another direction


def test_the_control_run_reads_one(tmp_path):
    L.seed_everything(0, verbose=False)
    alignment = ebm.GradientAlignment(every_n_steps=1)
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy("backprop"), max_epochs=1, accelerator="cpu", callbacks=[alignment], logger=False,
        enable_progress_bar=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Template())
    found = alignment.run.compute()
    assert float(found["cosine"]) == pytest.approx(1, abs=1e-7)
    assert float(found["relative_error"]) < 1e-6


def test_under_the_stock_strategy_it_is_refused(tmp_path):
    trainer = L.Trainer(callbacks=[ebm.GradientAlignment()], accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ebm.ConfigurationError, match='EBMStrategy\\("backprop"\\)'):
        trainer.fit(Template())


def test_any_logger_gets_the_figures_at_the_steps_asked_for(tmp_path):
    run(tmp_path, [ebm.GradientAlignment(every_n_steps=4)], logger=CSVLogger(tmp_path, name="", version=0))
    with (tmp_path / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("alignment/cosine")]
    assert [int(row["step"]) for row in rows if float(row["alignment/cosine"])][:1] == [0]
    assert all(f"alignment/{name}/net/4/weight" in rows[0] for name in ebm.metrics.NAMES)
    hparams = (tmp_path / "version_0" / "hparams.yaml").read_text()
    assert "OneSided(strength=1.0)" in hparams


def test_the_offline_run_holds_figures_definitions_and_settings(tmp_path):
    """Read back from the file itself, with W&B's own reader."""
    import wandb

    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    run(tmp_path, [ebm.GradientAlignment(every_n_steps=1)], logger=logger)
    directory = Path(logger.experiment.dir).parent
    wandb.teardown()
    text = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(directory)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    records = [json.loads(line) for line in text.splitlines() if line.strip()]
    dump = json.dumps(records)
    history = [r for r in records if r.get("type") == "history" and "alignment" in json.dumps(r)]
    assert len(history) == 12
    assert "alignment/cosine/net/4/weight" in dump
    assert any(r.get("type") == "metric" and "alignment/cosine" in json.dumps(r) for r in records)
    assert "ErrorCoordinates" in dump
