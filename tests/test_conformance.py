"""The Trainer's features give what they give under its stock strategy: weights, logged metrics, counts, hooks.

"backprop" must equal stock to 1e-6. "zero-divergence" computes the same gradient by local rules, so that it must equal
stock too, to 1e-5, in everything that a relaxation could disturb.
"""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_modules import GAN, Counting, Manual, PartlyFrozen, Penalised, Teacher, Template, TwoOptimizers, data

import lightning_ebm as ebm

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


def fp16_with_scaler():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}


CASES = {
    # name: (module, trainer flags, tolerance for zero-divergence)
    "adam and scheduler": (Template, lambda: {}, 1e-5),
    "sgd": (lambda: Template(optimizer="sgd"), lambda: {}, 1e-5),
    "lbfgs": (lambda: Template(optimizer="lbfgs", dropout=0.0), lambda: {}, 1e-5),
    "no batch norm": (lambda: Template(batch_norm=False), lambda: {}, 1e-5),
    "tied weights": (lambda: Template(tied=True), lambda: {}, 1e-5),
    "frozen layer": (PartlyFrozen, lambda: {}, 1e-5),
    "penalty and auxiliary head": (Penalised, lambda: {}, 1e-5),
    "averaged teacher": (Teacher, lambda: {}, 1e-5),
    "returns a dict": (lambda: Template(returns="dict"), lambda: {}, 1e-5),
    "returns none at times": (lambda: Template(returns="sometimes none"), lambda: {}, 1e-5),
    "accumulation": (Template, lambda: {"accumulate_grad_batches": 4}, 1e-5),
    "accumulation schedule": (Template, lambda: {"callbacks": [GradientAccumulationScheduler({0: 2, 1: 3})]}, 1e-5),
    "clip by norm": (Template, lambda: {"gradient_clip_val": 0.1}, 1e-5),
    "clip by value": (Template, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 1e-5),
    "clip and accumulate": (Template, lambda: {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}, 1e-5),
    "bf16-mixed": (Template, lambda: {"precision": "bf16-mixed"}, 2e-2),
    "16-mixed": (Template, lambda: {"precision": "16-mixed"}, 2e-2),
    "bf16-true": (Template, lambda: {"precision": "bf16-true"}, 2e-2),
    "64-true": (Template, lambda: {"precision": "64-true"}, 1e-10),
    "fp16 and scaler": (Template, fp16_with_scaler, 2e-2),
    "fp16, scaler, clip": (Template, lambda: {**fp16_with_scaler(), "gradient_clip_val": 0.1}, 2e-2),
    "fp16, scaler, accumulation": (Template, lambda: {**fp16_with_scaler(), "accumulate_grad_batches": 2}, 2e-2),
    "stochastic weight averaging": (
        lambda: Template(optimizer="sgd"),
        lambda: {"callbacks": [StochasticWeightAveraging(1e-2, swa_epoch_start=1)]},
        1e-5,
    ),
    "overfit batches": (Template, lambda: {"overfit_batches": 2}, 1e-5),
    "detect anomaly": (Template, lambda: {"detect_anomaly": True}, 1e-5),
    "fast dev run": (Template, lambda: {"fast_dev_run": 3}, 1e-5),
    "hooks and own backward": (Counting, lambda: {}, 1e-5),
    "hooks and accumulation": (Counting, lambda: {"accumulate_grad_batches": 3}, 1e-5),
    "compiled network": (lambda: Template(inner=lambda net: torch.compile(net, backend="eager")), lambda: {}, 1e-5),
    "manual optimization": (Manual, lambda: {}, 1e-5),
    "two optimizers on one update": (TwoOptimizers, lambda: {}, 1e-5),
    "gan": (GAN, lambda: {}, 1e-5),
    "gan with new fakes": (lambda: GAN("new"), lambda: {}, 1e-5),
}
if hasattr(callbacks, "EMAWeightAveraging"):  # of lightning 2.6 and newer
    CASES["exponential averaging"] = Template, lambda: {"callbacks": [callbacks.EMAWeightAveraging()]}, 1e-5


def fitted(make, flags, strategy, tmp_path, epochs=3):
    L.seed_everything(0, verbose=False)
    module = make()
    options = {"max_epochs": epochs, "enable_checkpointing": False, "default_root_dir": tmp_path, **QUIET, **flags()}
    trainer = L.Trainer(strategy=strategy, **options)
    trainer.fit(module)
    return module, trainer


def difference(a: L.LightningModule, b: L.LightningModule) -> float:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def side_by_side(case, algorithm, tmp_path):
    """The case under stock and under ours, with as many steps taken and the generators left alike."""
    make, flags, _ = CASES[case]
    stock, stock_trainer = fitted(make, flags, "auto", tmp_path)
    state = torch.get_rng_state()
    ours, trainer = fitted(make, flags, ebm.EBMStrategy(algorithm), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.global_step == stock_trainer.global_step
    return stock, stock_trainer, ours, trainer


@pytest.mark.parametrize("algorithm", ["backprop", "zero-divergence"])
@pytest.mark.parametrize("case", CASES)
def test_equals_stock(case, algorithm, tmp_path):
    tolerance = CASES[case][2]
    stock, stock_trainer, ours, trainer = side_by_side(case, algorithm, tmp_path)
    tolerance = 1e-6 if algorithm == "backprop" else tolerance
    assert difference(stock, ours) <= tolerance
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = {name: float(value) for name, value in stock_trainer.callback_metrics.items()}
    assert logged == pytest.approx(expected, abs=max(tolerance, 1e-5) * 10)
    if isinstance(ours, Template):
        assert ours.seen == stock.seen
        assert ours.hooks == stock.hooks
        assert ours.train_acc._update_count == stock.train_acc._update_count
    if isinstance(ours, Counting):  # hooks that look at the loss see the loss
        assert ours.last_loss == pytest.approx(stock.last_loss, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["pc-nudge", "predictive-coding", "error-pc"])
@pytest.mark.parametrize("case", ["adam and scheduler", "accumulation", "bf16-mixed", "gan", "manual optimization"])
def test_relaxing_leaves_counts_and_generators_as_stock(case, algorithm, tmp_path):
    stock, _, ours, _ = side_by_side(case, algorithm, tmp_path)
    if isinstance(ours, Template):
        assert (ours.seen, ours.train_acc._update_count) == (stock.seen, stock.train_acc._update_count)
    assert all(bool(torch.isfinite(p).all()) for p in ours.parameters())


@pytest.mark.parametrize("make", [GAN, lambda: GAN("new"), Manual], ids=["gan", "gan with new fakes", "manual"])
def test_under_manual_optimization_every_backward_call_is_aligned(make, tmp_path):
    """Two losses, two optimizers, an optimizer step between them: each update against its own true gradient."""
    alignment = ebm.GradientAlignment(every_n_steps=1)
    fitted(make, lambda: {"callbacks": [alignment]}, ebm.EBMStrategy("pc-nudge"), tmp_path)
    assert float(alignment.run.compute()["cosine"]) > 0.9999
    assert float(alignment.run.compute()["relative_error"]) < 5e-3


def test_a_run_stopped_and_resumed_ends_bit_identical(tmp_path):
    make = lambda: Template(dropout=0.0)  # noqa: E731
    whole, _ = fitted(make, dict, ebm.EBMStrategy("predictive-coding"), tmp_path, epochs=4)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="half")
    flags = lambda: {"callbacks": [checkpoint], "enable_checkpointing": True}  # noqa: E731
    fitted(make, flags, ebm.EBMStrategy("predictive-coding"), tmp_path, epochs=2)
    resumed = make()
    trainer = L.Trainer(strategy=ebm.EBMStrategy("predictive-coding"), max_epochs=4, default_root_dir=tmp_path, **QUIET)
    trainer.fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert difference(whole, resumed) == 0
    # and the checkpoint is an ordinary one: stock opens it, and gives its own back
    stock = L.Trainer(max_epochs=4, default_root_dir=tmp_path, **QUIET)
    stock.fit(make(), ckpt_path=tmp_path / "half.ckpt")
    stock.save_checkpoint(tmp_path / "stock.ckpt")
    ours = L.Trainer(strategy="ebm", max_epochs=5, default_root_dir=tmp_path, **QUIET)
    ours.fit(make(), ckpt_path=tmp_path / "stock.ckpt")
    assert ours.current_epoch == 5


def test_bf16_keeps_the_direction_of_the_float32_update(tmp_path):
    """States and energies in float32: the difference of phases is not lost to eight bits."""
    L.seed_everything(0, verbose=False)
    module = Template(dropout=0.0)
    gradients = {}
    for precision in ("32-true", "bf16-mixed"):
        copied = copy.deepcopy(module)
        copied.on_train_batch_end = lambda *args, m=copied, p=precision: gradients.update(  # type: ignore[method-assign]
            {p: {name: q.grad.clone() for name, q in m.named_parameters()}}
        )
        copied.configure_optimizers = lambda m=copied: torch.optim.SGD(m.parameters(), lr=0.0)  # type: ignore[method-assign]
        strategy = ebm.EBMStrategy("pc-nudge")
        L.Trainer(strategy=strategy, max_steps=1, precision=precision, default_root_dir=tmp_path, **QUIET).fit(copied)
    assert ebm.metrics.alignment(gradients["bf16-mixed"], gradients["32-true"])["cosine"] > 0.999


def test_three_ways_in(tmp_path):
    for strategy in ("ebm", "EBM", ebm.EBMStrategy()):
        _, trainer = fitted(Template, lambda: {"fast_dev_run": 1}, strategy, tmp_path)
        assert isinstance(trainer.strategy, ebm.EBMStrategy)
        assert trainer.strategy.root_device == torch.device("cpu")
    with pytest.raises(ebm.ConfigurationError, match="devices=1"):
        L.Trainer(strategy="ebm", **{**QUIET, "devices": 2}).fit(Template())


def test_two_trainers_in_one_process_do_not_meet(tmp_path):
    alone, _ = fitted(Template, dict, ebm.EBMStrategy("pc-nudge"), tmp_path)
    strategy = ebm.EBMStrategy("pc-nudge")
    fitted(GAN, dict, strategy, tmp_path)
    again, _ = fitted(Template, dict, ebm.EBMStrategy("pc-nudge"), tmp_path)
    assert difference(alone, again) == 0


def test_a_loader_iterator_in_training_step_is_drawn_from_once_and_refused_where_the_step_runs_twice(tmp_path):
    class Iterates(Template):
        def training_step(self, dataloader_iter):
            (x, _), _, _ = next(dataloader_iter)
            return self.net(x).square().mean()

    stock, _ = fitted(Iterates, dict, "auto", tmp_path)
    ours, _ = fitted(Iterates, dict, ebm.EBMStrategy("zero-divergence"), tmp_path)
    assert difference(stock, ours) < 1e-6
    with pytest.raises(ebm.ConfigurationError, match="dataloader_iter"):
        fitted(Iterates, dict, ebm.EBMStrategy("equilibrium-propagation"), tmp_path)


def test_a_batch_that_the_step_writes_to_is_written_to_once(tmp_path):
    """In-place augmentation, and targets popped off a dict: every pass gets the batch as it came."""

    class Writes(Template):
        def training_step(self, batch, batch_idx):
            y = batch.pop("y")
            return torch.nn.functional.cross_entropy(self.net(batch["x"].mul_(2.0)), y)

        def train_dataloader(self):
            samples = [{"x": x, "y": y} for x, y in data()]
            return torch.utils.data.DataLoader(samples, 8)

    stock, _ = fitted(Writes, dict, "auto", tmp_path)
    for algorithm, tolerance in (("zero-divergence", 1e-5), ("pc-nudge", 1e-2)):
        ours, _ = fitted(Writes, dict, ebm.EBMStrategy(algorithm), tmp_path)
        assert difference(stock, ours) < tolerance


def test_loggers_used_directly_hear_one_pass_a_step(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    class Direct(Template):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"direct": 1.0}, step=self.global_step)
            return super().training_step(batch, batch_idx)

    heard = []

    class Counting(CSVLogger):
        def log_metrics(self, metrics, step=None):
            heard.extend(key for key in metrics if key == "direct")
            super().log_metrics(metrics, step)

    logger = {"logger": Counting(tmp_path)}
    fitted(Direct, lambda: logger, ebm.EBMStrategy("predictive-coding"), tmp_path, epochs=2)
    assert len(heard) == 12


def test_a_first_step_that_returns_none_is_skipped_as_in_stock(tmp_path):
    class Late(Template):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    stock, _ = fitted(Late, dict, "auto", tmp_path)
    ours, _ = fitted(Late, dict, ebm.EBMStrategy("zero-divergence"), tmp_path)
    assert difference(stock, ours) < 1e-5


def test_a_second_step_on_gradients_that_no_relaxation_has_given_since_is_refused(tmp_path):
    class Greedy(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            loss = self.net(batch[0]).square().mean()
            self.manual_backward(loss)
            first, second = self.optimizers()
            first.step()
            second.step()
            second.zero_grad()
            weights = list(self.parameters())
            for weight, slope in zip(weights, torch.autograd.grad(self.net(batch[0]).sum(), weights), strict=True):
                weight.grad = slope
            second.step()

    with pytest.raises(ebm.ConfigurationError, match="SGD took a step on gradients that no relaxation has given"):
        fitted(Greedy, dict, ebm.EBMStrategy("zero-divergence"), tmp_path)


def test_a_strategy_is_connected_before_its_module_has_a_trainer(tmp_path):
    """As tools do that look at loaders or at a model without a run: nothing of it may ask for one."""
    trainer = L.Trainer(strategy=ebm.EBMStrategy(), default_root_dir=tmp_path, **QUIET)
    module, loader = Template(), torch.utils.data.DataLoader(data(), 8)
    trainer.strategy.connect(module)
    assert trainer.strategy.learner.module is module
    assert trainer.strategy.process_dataloader(loader) is loader


def test_trainers_that_share_a_list_of_callbacks_resume_each_for_itself(tmp_path):
    shared = [L.Callback()]
    trainers = [
        L.Trainer(strategy=ebm.EBMStrategy(), max_steps=2, callbacks=shared, default_root_dir=tmp_path, **QUIET)
        for _ in range(2)
    ]
    for trainer in trainers:
        trainer.fit(Template())
        mine = [c for c in trainer.callbacks if type(c).__name__ == "ExactResume"]
        assert mine == [trainer.strategy._resume]


def test_learning_rate_finder_suggests_as_under_stock(tmp_path):
    from lightning.pytorch.tuner import Tuner

    def suggestion(strategy):
        L.seed_everything(0, verbose=False)
        module = Template(optimizer="sgd")
        module.lr = 0.1
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=module.lr)  # type: ignore[method-assign]
        trainer = L.Trainer(strategy=strategy, max_epochs=20, default_root_dir=tmp_path, **QUIET)
        return Tuner(trainer).lr_find(module, num_training=30, update_attr=False).suggestion(skip_begin=3, skip_end=3)

    assert suggestion(ebm.EBMStrategy("zero-divergence")) == pytest.approx(suggestion("auto"), rel=1e-3)


def test_batch_size_finder_finds_as_under_stock(tmp_path):
    from lightning.pytorch.tuner import Tuner

    class Sized(Template):
        batch_size = 2

        def train_dataloader(self):
            return torch.utils.data.DataLoader(data(), self.batch_size)

    def found(strategy):
        module = Sized()
        trainer = L.Trainer(strategy=strategy, max_epochs=1, default_root_dir=tmp_path, **QUIET)
        return Tuner(trainer).scale_batch_size(module, mode="power", max_trials=3, steps_per_trial=1)

    assert found(ebm.EBMStrategy("predictive-coding")) == found("auto")


def test_layers_are_printed_once_where_lightning_prints_its_summary(tmp_path, capsys):
    options = {**QUIET, "enable_model_summary": True, "max_epochs": 1, "default_root_dir": tmp_path}
    L.Trainer(strategy="ebm", **options).fit(Template())
    assert capsys.readouterr().out.count("2 layers with states") == 1
    L.Trainer(strategy="ebm", **{**options, "enable_model_summary": False}).fit(Template())
    assert "layers with states" not in capsys.readouterr().out


def test_accumulation_divides_the_update_and_not_the_nudge(tmp_path):
    """Lightning hands over loss / N; at a finite nudge, lambda / N would be another algorithm."""
    kept = {}

    class Keeps(Template):
        def on_before_optimizer_step(self, optimizer):
            kept.setdefault("found", {name: p.grad.clone() for name, p in self.named_parameters()})
            kept.setdefault("weights", {name: p.detach().clone() for name, p in self.named_parameters()})

    options = {"dropout": 0.0, "batch_norm": False}
    fitted(lambda: Keeps(**options), lambda: {"accumulate_grad_batches": 3}, "ebm", tmp_path, epochs=1)
    module = Template(**options)
    module.load_state_dict(kept["weights"], strict=False)
    learner = ebm.Learner(module.net)
    batches = list(module.train_dataloader())[:3]
    expected: dict[str, torch.Tensor] = {}
    for x, y in batches:
        for name, g in learner.gradients(lambda x=x, y=y: torch.nn.functional.cross_entropy(module.net(x), y)).items():
            expected[f"net.{name}"] = expected.get(f"net.{name}", 0) + g / 3
    assert ebm.metrics.alignment(kept["found"], expected)["relative_error"] < 1e-5
