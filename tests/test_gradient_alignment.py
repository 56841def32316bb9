"""What the callback logs equals a comparison made by hand, reaches any logger, and W&B's own file."""

import csv
import json
import subprocess
import sys
from inspect import signature
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning_modules import Template
from since import reads_wandb

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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_logged_numbers_equal_a_comparison_by_hand(tmp_path, accumulate, precision):
    """Each micro-batch against plain autograd on a stock module at the same weights, masks and statistics."""
    recorder = Recorder()
    clip = {"gradient_clip_val": 1e-3}  # later hooks would see clipped gradients
    options = {"accumulate_grad_batches": accumulate, "precision": precision, **clip}
    run(tmp_path, [ebm.GradientAlignment(every_n_steps=1), recorder], **options)
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
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = torch.nn.functional.cross_entropy(stock.net(x), y) / accumulate
        names, parameters = zip(*stock.named_parameters(), strict=True)
        true = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        expected = ebm.metrics.alignment(added, true)
        for name, value in expected.items():
            assert logged[f"alignment/{name}"] == pytest.approx(value, rel=2e-6, abs=1e-6)
        one = ebm.metrics.alignment({"w": added["net.4.weight"]}, {"w": true["net.4.weight"]})
        layer = ["net.4.weight", "net.4.bias"]
        both = ebm.metrics.alignment(*({name: side[name] for name in layer} for side in (added, true)))
        for name in expected:
            assert logged[f"alignment/{name}/net/4/weight"] == pytest.approx(one[name], rel=2e-6, abs=1e-6)
            assert logged[f"alignment/layer/{name}/net/5"] == pytest.approx(both[name], rel=2e-6, abs=1e-6)
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


def fit(tmp_path, module, callbacks, algorithm="predictive-coding", **options):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(algorithm), accelerator="cpu", devices=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, default_root_dir=tmp_path,
        callbacks=callbacks, **{"logger": False, "max_epochs": 2, **options},
    )  # fmt: skip
    trainer.fit(module)
    return trainer


def test_both_references_at_once(tmp_path):
    """The free equilibrium of predictive coding is the forward pass, so its gradient is backprop's."""
    alignment = ebm.GradientAlignment(every_n_steps=1, reference=["backprop", "equilibrium"])
    trainer = fit(tmp_path, Template(), [alignment])
    logged = trainer.callback_metrics
    assert float(logged["alignment/cosine"]) < 0.999
    for name in ebm.metrics.NAMES:
        assert logged[f"alignment/{name}"] == logged[f"alignment_equilibrium/{name}"]


class Bounded(Template):
    """A network that the Hopfield energy can settle, and batches that are kept."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(batch_norm=False, dropout=0.0, optimizer="sgd")
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ).double()
        for p in self.net.parameters():
            p.data *= 0.7

    def training_step(self, batch, batch_idx):
        self.kept = batch[0].double(), batch[1]
        return torch.nn.functional.cross_entropy(self.net(self.kept[0]), self.kept[1])


class ByHand(L.Callback):
    """The figures against both references, each by its own slow function, on the batch of the moment."""

    def __init__(self, algorithm):
        self.algorithm, self.rows = algorithm, []

    def on_after_backward(self, trainer, module):
        def closure():
            return torch.nn.functional.cross_entropy(module.net(module.kept[0]), module.kept[1])

        update = {name: p.grad.clone() for name, p in module.named_parameters()}
        settled = ebm.reference.equilibrium(module, closure, self.algorithm)
        true = ebm.reference.backprop(module, closure)
        logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("alignment")}
        self.rows.append((ebm.metrics.alignment(update, settled), ebm.metrics.alignment(update, true), logged))


def test_where_the_free_equilibrium_is_not_the_forward_pass_the_references_differ(tmp_path):
    """Equilibrium propagation: next to the gradient at its equilibrium, and clearly off backprop's."""
    algorithm = ebm.algorithm("equilibrium-propagation")
    alignment = ebm.GradientAlignment(every_n_steps=1, reference=["equilibrium", "backprop"], warn_below=None)
    by_hand = ByHand(algorithm)
    fit(tmp_path, Bounded(), [alignment, by_hand], algorithm, max_epochs=1)
    assert len(by_hand.rows) == 6
    for settled, true, logged in by_hand.rows:
        assert logged["alignment_equilibrium/cosine"] == pytest.approx(settled["cosine"], abs=1e-6)
        assert logged["alignment_equilibrium/norm_ratio"] == pytest.approx(settled["norm_ratio"], rel=1e-5)
        assert logged["alignment/cosine"] == pytest.approx(true["cosine"], abs=1e-6)
        assert settled["cosine"] > 0.99
        assert settled["relative_error"] < 0.5 * true["relative_error"]


def test_at_chosen_steps_and_epochs(tmp_path):
    """Six steps an epoch: steps 0, 4 and 9 are regular, and all of the third epoch."""
    alignment = ebm.GradientAlignment(every_n_steps=5, epochs=[2])
    fit(tmp_path, Template(), [alignment], max_epochs=4)
    assert [step for step, _ in alignment.history] == [0, 4, 9, 12, 13, 14, 15, 16, 17, 19]
    alignment = ebm.GradientAlignment(every_n_steps=None, epochs=[1])
    fit(tmp_path, Template(), [alignment], max_epochs=2)
    assert [step for step, _ in alignment.history] == list(range(6, 12))
    with pytest.raises(ebm.ConfigurationError, match="name some"):
        ebm.GradientAlignment(every_n_steps=None)


class Dead(Template):
    """Its middle units never fire, so nothing below them learns."""

    def __init__(self):
        super().__init__(batch_norm=False, dropout=0.0)
        self.net[5] = torch.nn.ReLU()
        self.net[4].bias.data.fill_(-100.0)


def test_a_dead_layer_is_called_dead(tmp_path):
    alignment = ebm.GradientAlignment(every_n_steps=1)
    trainer = fit(tmp_path, Dead(), [alignment], "pc-nudge", logger=CSVLogger(tmp_path, name="", version=0))
    dead = {"net.0.weight", "net.0.bias", "net.4.weight", "net.4.bias", "net.6.weight"}
    assert set(alignment.run.dead()) == dead
    assert float(trainer.callback_metrics["alignment/dead"]) == len(dead)
    assert alignment.history[-1][1]["net/2"] is None
    assert alignment.history[-1][1]["readout"] is not None
    assert "nan" not in (tmp_path / "version_0" / "metrics.csv").read_text().lower()


def test_a_stopped_run_goes_on_counting(tmp_path):
    """Three epochs in one go, or one and then two: the same sums, the same history."""

    def module():
        torch.manual_seed(0)
        return Template(dropout=0.0)

    whole = ebm.GradientAlignment(every_n_steps=2)
    fit(tmp_path, module(), [whole], max_epochs=3)
    first = ebm.GradientAlignment(every_n_steps=2)
    trainer = fit(tmp_path, module(), [first], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    second = ebm.GradientAlignment(every_n_steps=2)
    L.seed_everything(0, verbose=False)
    resumed = L.Trainer(
        strategy=ebm.EBMStrategy("predictive-coding"), max_epochs=3, accelerator="cpu", enable_progress_bar=False,
        logger=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        callbacks=[second],
    )  # fmt: skip
    safely = {"weights_only": True} if "weights_only" in signature(resumed.fit).parameters else {}
    resumed.fit(module(), ckpt_path=tmp_path / "one.ckpt", **safely)
    assert [step for step, _ in second.history] == [step for step, _ in whole.history]
    assert torch.allclose(second.run.total, whole.run.total, rtol=1e-6)


def test_an_overflowed_gradient_is_not_compared(tmp_path):
    """As under fp16, where the scaler skips such a step: no figure, no nan, and the sums stay as they were."""
    alignment = ebm.GradientAlignment(every_n_steps=1)

    class Overflows(Template):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 1e38 * 1e38 if self.trainer.global_step == 3 else loss

    class Finite(ebm.EBMStrategy):
        def _scaler(self):
            return torch.amp.GradScaler("cpu")

    class Skips(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 3:
                module.zero_grad()

    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        strategy=Finite("predictive-coding"), max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        callbacks=[alignment, Skips()],
    )  # fmt: skip
    trainer.fit(Overflows())
    assert [step for step, _ in alignment.history] == [0, 1, 2, 4, 5]
    assert bool(torch.isfinite(alignment.run.total).all())


def test_low_alignment_is_said_once_with_a_remedy(tmp_path, caplog):
    alignment = ebm.GradientAlignment(every_n_steps=1, warn_below=1.0, patience=3)
    fit(tmp_path, Template(), [alignment])
    said = [record.getMessage() for record in caplog.records if "has been low" in record.getMessage()]
    assert len(said) == 1
    assert "for 3 comparisons" in said[0]
    assert "OneSided(0.1)" in said[0]


def synchronised(rank, path):
    """Two processes with a pair of gradients each."""
    from test_metrics import pair

    from lightning_ebm.callbacks.gradient_alignment import _synchronised

    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    estimate, reference = pair(rank)
    metric = ebm.metrics.Alignment(list(estimate))
    metric.update(estimate, reference)
    torch.save({"total": _synchronised(metric), "computed": metric.compute()}, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_read_the_figures_of_both(tmp_path):
    from test_metrics import by_numpy, pair

    torch.multiprocessing.spawn(synchronised, (str(tmp_path),), nprocs=2)
    pairs = [pair(rank) for rank in (0, 1)]
    stacked = tuple({f"{i}.{k}": v for i, p in enumerate(pairs) for k, v in p[side].items()} for side in (0, 1))
    expected = by_numpy(*stacked)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        total = {name: float(value) for name, value in ebm.metrics.read(found["total"].sum(0)).items()}
        assert total == pytest.approx(expected, rel=1e-9)
        assert float(found["computed"]["cosine"]) == pytest.approx(expected["cosine"], rel=1e-9)


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


@reads_wandb
def test_the_offline_run_holds_figures_definitions_and_settings(tmp_path):
    """Read back from the file itself, with W&B's own reader."""
    import wandb

    wandb.run = None  # of an earlier test in this process, torn down
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    run(tmp_path, [ebm.GradientAlignment(every_n_steps=1)], logger=logger)
    directory = Path(logger.experiment.dir).parent
    wandb.finish()
    wandb.teardown()
    text = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(directory)],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    ).stdout
    records = [json.loads(line) for line in text.splitlines() if line.strip()]
    dump = json.dumps(records)
    history = [r for r in records if r.get("type") == "history" and '"alignment/cosine"' in json.dumps(r)]
    assert len(history) == 12
    assert "alignment/cosine/net/4/weight" in dump
    # Charts are few: of the whole and of the layers; what parameters have is there, and W&B draws it when asked.
    defined = [r["metric"] for r in records if r.get("type") == "metric" and "name" in r["metric"]]
    ours = {m["name"]: bool(m.get("options", {}).get("hidden")) for m in defined if m["name"].startswith("alignment/")}
    assert ours["alignment/cosine/net/4/weight"]
    charted = {name for name, hidden in ours.items() if not hidden}
    layers = {
        f"alignment/layer/{f}/{layer}" for f in ("cosine", "angle_deg") for layer in ("net/2", "net/5", "readout")
    }
    assert charted == {*(f"alignment/{name}" for name in ebm.metrics.NAMES), "alignment/dead", *layers}, charted
    assert any(r.get("type") == "metric" and "alignment/cosine" in json.dumps(r) for r in records)
    assert "ErrorCoordinates" in dump
