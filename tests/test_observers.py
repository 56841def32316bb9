"""Who only looks on never ends the run: what fails to be drawn, logged or written is one line in the log."""

import json
import math

import lightning as L
import pytest
import torch
import torch.nn.utils.prune
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning_modules import Template

import lightning_ebm as ebm
from lightning_ebm.callbacks import console, loggers
from lightning_ebm.reports import plots, records, runs

pytestmark = pytest.mark.filterwarnings("ignore")


def observers():
    return [ebm.GradientAlignment(every_n_steps=1), ebm.RelaxationMonitor(1, regime_every_n_steps=2)]


def fit(tmp_path, logger=False, callbacks=(), algorithm="predictive-coding", **options):
    L.seed_everything(0, verbose=False)
    module = Template(dropout=0.0)
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(algorithm), max_epochs=2, accelerator="cpu", devices=1, logger=logger,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, default_root_dir=tmp_path,
        callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(module)
    return module.state_dict()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Broken(Logger):
    """Fails wherever Lightning itself does not call it, and at the metrics of this library."""

    name, version, log_dir = "broken", "0", None

    def log_metrics(self, metrics, step=None):
        if any(name.startswith(("alignment", "ebm")) for name in metrics):
            raise OSError("the disk is full")

    def log_hyperparams(self, params, *args, **kwargs):
        if "ebm" in params:
            raise ConnectionError("no server")


class Mine(Exception):
    """Of the user's own."""


HOOKS = [
    "configure_callbacks", "prepare_data", "setup", "configure_model", "configure_optimizers", "train_dataloader",
    "on_fit_start", "on_train_start", "on_train_batch_start", "training_step", "on_after_backward", "on_fit_end",
]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
def test_what_ended_the_run_is_what_is_said(hook, tmp_path):
    """Wherever it ends, also before there is anything to look at: observers put an error of their own in its place."""

    def fails(self, *args, **kwargs):
        raise Mine(hook)

    module = type("Failing", (Template,), {hook: fails})()
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(), max_epochs=1, accelerator="cpu", devices=1, callbacks=observers(),
        logger=CSVLogger(tmp_path), enable_model_summary=False, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(Mine, match=hook):
        trainer.fit(module)


class LogsInPlaces(Template):
    """Before and between backward calls, and the gradient of a hidden layer after them."""

    def __init__(self, by_hand):
        super().__init__(dropout=0.0)
        self.automatic_optimization = not by_hand
        self.seen = []

    def training_step(self, batch, index):
        x, y = batch
        self.hidden = self.net[0](x)
        self.hidden.retain_grad()
        loss = torch.nn.functional.cross_entropy(self.net[1:](self.hidden), y)
        self.log("first", loss, on_step=True, on_epoch=True)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.log("second", 2 * loss, on_step=True, on_epoch=True)
        optimizer.step()
        return None

    def on_after_backward(self):
        self.seen.append(float(self.hidden.grad.abs().sum()))

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.LBFGS(self.parameters(), lr=0.3, max_iter=3)
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("by_hand", [True, False])
def test_what_a_step_logs_and_retains_is_what_it_is_with_nobody_looking_on(by_hand, tmp_path):
    found = []
    for strategy, callbacks in (("auto", []), (None, []), (None, observers())):
        L.seed_everything(0, verbose=False)
        module = LogsInPlaces(by_hand)
        trainer = L.Trainer(
            strategy=strategy or ebm.EBMStrategy("zero-divergence"), max_epochs=2, accelerator="cpu", devices=1,
            logger=False, callbacks=callbacks, enable_model_summary=False, enable_progress_bar=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module)
        names = [name for name in trainer.callback_metrics if name.startswith(("first", "second"))]
        found.append(module.seen + [float(trainer.callback_metrics[name]) for name in sorted(names)])
        assert not callbacks or "alignment/cosine" in trainer.progress_bar_metrics
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == found[1]


def test_two_devices_are_refused_also_where_observers_look_on():
    trainer = L.Trainer(strategy="ebm", accelerator="cpu", devices=2, callbacks=observers(), logger=False)
    with pytest.raises(ebm.ConfigurationError, match="trains on one device"):
        trainer.fit(Template())


@pytest.mark.slow
def test_loggers_that_raise(tmp_path, caplog):
    """Training ends where it ends with nobody looking on, and the logger beside the broken one has every figure."""
    plain = fit(tmp_path / "plain")
    good = CSVLogger(tmp_path / "observed")
    observed = fit(tmp_path / "observed", [Broken(), good], observers(), enable_progress_bar=False)
    assert same(plain, observed)
    for what in ("Logging metrics to Broken", "Telling Broken the settings"):
        assert caplog.text.count(what) == 1
    assert "the disk is full" in caplog.text
    assert "alignment/cosine" in (tmp_path / "observed" / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def raising(*args, **kwargs):
    raise ValueError("too many bins")


@pytest.mark.parametrize(
    ("owner", "name", "line"),
    [
        (loggers, "histogram", "Drawing 'alignment/histogram'"),
        (loggers, "table", "Drawing 'alignment/table'"),
        (plots, "alignment_heatmap", "Drawing 'alignment/heatmap'"),
        (plots, "energy_curves", "Drawing 'ebm/energy_curves'"),
        (records, "read_records", "Drawing 'ebm/energy_curves'"),
        (loggers, "_log_figure", "Logging 'alignment/heatmap' to WandbLogger"),
        (console, "_print", "Printing the table"),
    ],
)
def test_pictures_and_tables_that_cannot_be_made(tmp_path, monkeypatch, caplog, owner, name, line):
    plain = fit(tmp_path / "plain", enable_progress_bar=False)
    monkeypatch.setattr(owner, name, raising)
    bar = name == "_print"
    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    observed = fit(tmp_path / "observed", logger, observers(), enable_progress_bar=bar)
    logger.experiment.finish()
    assert same(plain, observed)
    assert caplog.text.count(f"{line}") >= 1
    assert "too many bins" in caplog.text
    lines = [record.message for record in caplog.records if "goes on without" in record.message]
    assert len(lines) == len(set(lines))


@pytest.mark.slow
def test_a_run_file_that_cannot_be_written(tmp_path, caplog):
    logger = CSVLogger(tmp_path, version=0)
    (tmp_path / "lightning_logs" / "version_0" / "ebm.jsonl").mkdir(parents=True)  # a directory where the file goes
    plain = fit(tmp_path / "plain", enable_progress_bar=False)
    observed = fit(tmp_path, logger, observers(), enable_progress_bar=False)
    assert same(plain, observed)
    lines = [record.message for record in caplog.records if "Writing to" in record.message]
    assert len(lines) == 2  # once for each of the two callbacks


class Looking(L.LightningModule):
    """Learns gradients that are sparse."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(9, 4, sparse=True)
        self.net = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(self.table(batch[0]).sum(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        tokens = torch.arange(48).reshape(16, 3) % 9
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, torch.arange(16) % 3), 4)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["predictive-coding", "equilibrium-propagation"])
def test_sparse_gradients_are_looked_at(algorithm, tmp_path):
    def learned(callbacks):
        L.seed_everything(0, verbose=False)
        module = Looking()
        trainer = L.Trainer(
            strategy=ebm.EBMStrategy(algorithm), max_epochs=2, accelerator="cpu", devices=1, logger=False,
            enable_model_summary=False, enable_checkpointing=False, enable_progress_bar=False,
            default_root_dir=tmp_path, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module)
        return module.state_dict(), trainer.callback_metrics

    unseen, _ = learned([])
    seen, figures = learned(observers())
    assert same(unseen, seen)
    assert 0 < float(figures["alignment/cosine/table/weight"]) <= 1


class Attending(Looking):
    """Of whose energy torch has no second derivatives: fused attention."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(4, 3))
        encoder = torch.nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)

    def training_step(self, batch, batch_idx):
        attended = self.encoder(self.table(batch[0]).to_dense())
        return torch.nn.functional.cross_entropy(self.net(attended.mean(1)), batch[1])


@pytest.mark.parametrize("algorithm", ["predictive-coding", "equilibrium-propagation"])
def test_what_cannot_be_measured_is_one_line(algorithm, tmp_path, caplog):
    """No curvature without second derivatives, and no true gradient of an equilibrium that is not found."""

    def ended(callbacks):
        L.seed_everything(0, verbose=False)
        module = Attending() if algorithm == "predictive-coding" else Growing()
        relaxer = {} if algorithm == "predictive-coding" else {"relaxer": ebm.FixedPoint(5)}
        trainer = L.Trainer(
            strategy=ebm.EBMStrategy(ebm.algorithm(algorithm, **relaxer)), max_epochs=1, accelerator="cpu", devices=1,
            logger=False, enable_model_summary=False, enable_checkpointing=False, enable_progress_bar=False,
            default_root_dir=tmp_path, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module)
        return module.state_dict()

    unseen = ended([])
    caplog.clear()
    alignment = ebm.GradientAlignment(every_n_steps=1, reference=["backprop", "equilibrium"])
    assert same(unseen, ended([alignment, ebm.RelaxationMonitor(1, curvature_every_n_steps=1)]))
    lines = [record.message for record in caplog.records]
    if algorithm == "predictive-coding":
        assert sum("cannot differentiate twice" in line for line in lines) == 1
    else:
        assert sum("Comparing with the gradient of equilibrium failed" in line for line in lines) == 1
    assert alignment.history


class Growing(Looking):
    """Weights so large that its energy has no minimum; a few sweeps are taken all the same."""

    def __init__(self):
        super().__init__()
        widths = ((4, 6), (6, 6), (6, 3))
        parts = [part for pair in widths for part in (torch.nn.Linear(*pair), torch.nn.ReLU())]
        self.net = torch.nn.Sequential(*parts[:-1])
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def test_the_error_that_ended_a_run_is_not_hidden_by_those_who_look_on(tmp_path):
    class Ends(L.Callback):
        def on_train_batch_end(self, *args):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(tmp_path, Broken(), [*observers(), Ends()], enable_progress_bar=False)


@pytest.mark.parametrize("values", [[1.0, 1 - 1e-16, 1.0], [0.5 + 1e-17] * 3, [1e6, 1e6 * (1 + 1e-15)]])
def test_values_that_differ_by_rounding_have_a_histogram(values):
    """All of them in it, as counted by its bins."""
    found = loggers.histogram([*values, math.nan, math.inf])
    assert sum(found.histogram) == len(values)


def test_a_run_file_holds_what_json_cannot(tmp_path):
    """nan is null, infinities are the largest numbers, and an object that is no number costs its own line only."""
    from lightning_ebm.callbacks.run_file import RunFile

    file = RunFile()
    file.path = tmp_path / "ebm.jsonl"
    file.add({"x": [math.nan, math.inf]})
    file.add({"x": object()})
    file.add({"x": 1.0})
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == [{"x": [None, 1e308]}, {"x": 1.0}]


def test_mlflow_keeps_every_figure_and_picture(tmp_path, monkeypatch):
    """Read back from its files, where a metric cannot have the name of a folder; against what CSV was told."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which newer ones ask for
    mlflow = pytest.importorskip("mlflow")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    csv = CSVLogger(tmp_path)
    fit(tmp_path, [logger, csv], observers(), enable_progress_bar=False)
    told = {key: series[-1][1] for key, series in runs.read(csv.log_dir).metrics.items() if "/" in key}
    client = mlflow.tracking.MlflowClient(f"file:{tmp_path / 'mlruns'}")
    kept = client.get_run(logger.run_id).data.metrics
    folders = {key.rpartition("/")[0] for key in told}
    for key in [key for key in told if key.startswith(("alignment/", "ebm/"))]:
        own = f"{key}/all" if key in folders or any(other.startswith(f"{key}/") for other in told) else key
        assert kept[own] == pytest.approx(told[key], rel=1e-5), key
    pictures = [file.path for folder in ("alignment", "ebm") for file in client.list_artifacts(logger.run_id, folder)]
    assert {"alignment/heatmap.png", "ebm/energy_curves.png"} <= set(pictures)


class Pruned(L.Callback):
    """Renames the weight of a layer in the second epoch, as pruning does, which keeps a mask beside it."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            linear = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
            torch.nn.utils.prune.l1_unstructured(linear, "weight", amount=0.3)


class Parametrized(L.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            linear = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
            torch.nn.utils.parametrizations.weight_norm(linear)
            trainer.strategy.setup_optimizers(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("change", [Pruned, Parametrized])
def test_parameters_that_are_made_or_renamed_in_mid_run_are_compared_as_well(change, tmp_path):
    plain = fit(tmp_path / "plain", callbacks=[change()], algorithm="zero-divergence")
    seen = observers()
    observed = fit(tmp_path / "observed", callbacks=[change(), *seen], algorithm="zero-divergence")
    assert same(plain, observed)
    names = [name for name in seen[0].run.names if name not in dict(Template(dropout=0.0).named_parameters())]
    assert names
    figures = seen[0].run.compute()
    for name in names:
        assert float(figures[f"cosine/{name.replace('.', '/')}"]) == pytest.approx(1)
