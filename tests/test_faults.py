"""A batch that cannot be trained on: its cause is named, and what the policy says is done with it, exactly."""

import copy
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from since import newer
from test_distributed import launch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import lightning_ebm as ebm

PRESETS = ("predictive-coding", "pc-nudge", "incremental-pc", "fixed-prediction", "equilibrium-propagation")
QUIET = {
    "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3


def net(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Hardtanh(), nn.Linear(6, 6), nn.Hardtanh(), nn.Linear(6, 3))


def with_one(value: float) -> torch.Tensor:
    x = X.clone()
    x[2, 1] = value
    return x


def held(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_nan_and_inf_in_the_batch_are_refused_at_once_and_leave_no_trace(name, norm, value):
    """Without BatchNorm a saturated unit makes the loss of an infinite input finite; its gradient is not."""
    module = net(norm)
    learner, optimizer = ebm.Learner(module, name), torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):  # the second is by traced code
        learner.step(lambda: F.cross_entropy(module(X), Y), optimizer)
    before = held(module)
    for _ in range(2):
        with pytest.raises(ebm.RelaxationDivergedError, match=r"batch.*1 times (nan|inf).*Clean the data"):
            learner.step(lambda: F.cross_entropy(module(with_one(value)), Y), optimizer)
        assert same(held(module), before)
    learner.step(lambda: F.cross_entropy(module(X), Y), optimizer)
    assert all(bool(torch.isfinite(p).all()) for p in module.state_dict().values())


class Graphs:
    """A batch as libraries for graphs have it: an object that keeps its tensors in a mapping."""

    def __init__(self, x, y):
        self._store = {"x": x, "y": y}
        self.source = self  # what it leads to is not looked at

    @property
    def x(self):
        return self._store["x"]

    @property
    def y(self):
        return self._store["y"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["zero-divergence", "predictive-coding"])
@pytest.mark.parametrize(
    ("kind", "where"),
    [(SimpleNamespace, "batch.x"), (Graphs, r"batch._store\['x'\]"), (lambda x, y: [SimpleNamespace(x=x, y=y)], "x")],
)
def test_nan_and_inf_in_a_batch_that_is_an_object_are_refused_as_well(kind, where, name, value):
    """The loss of an infinite input is finite, as units saturate, and stock would make nan of the weights."""

    class Taking(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net(norm=False)

        def training_step(self, batch, batch_idx):
            batch = batch[0] if isinstance(batch, list) else batch
            return F.cross_entropy(self.net(batch.x), batch.y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Taking()
    batches = DataLoader([kind(x=with_one(value), y=Y)], batch_size=None, collate_fn=lambda batch: batch)
    before = held(module)
    with pytest.raises(ebm.RelaxationDivergedError, match=rf"{where}: 1 times (nan|inf).*Clean the data"):
        L.Trainer(strategy=ebm.EBMStrategy(name), **QUIET).fit(module, batches)
    assert same(held(module), before)


def test_an_infinite_number_that_is_meant_is_none_of_our_business():
    """A mask of -inf is added to logits, as in attention: the update is what it is without a mask of that kind."""
    module = net(norm=False)
    mask = torch.zeros(8, 3)
    mask[:, 2] = -math.inf

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = module

        def forward(self, x, mask):
            return self.net(x) + mask

    masked = Masked()
    found = ebm.Learner(masked, "pc-nudge").gradients(lambda: F.cross_entropy(masked(X, mask), Y % 2))
    plain = ebm.Learner(module, "pc-nudge").gradients(lambda: F.cross_entropy(module(X)[:, :2], Y % 2))
    for name, gradient in plain.items():
        torch.testing.assert_close(found[f"net.{name}"], gradient, rtol=1e-4, atol=1e-6)


SLOPELESS = {
    "root of zeros": lambda out: out.square().mean() + (out - out).square().sum(1).sqrt().mean(),
    "power of zeros": lambda out: out.square().mean() + (0 * out).abs().pow(0.5).mean(),
    "left out by where": lambda out: torch.where(torch.ones_like(out) > 0, out.square(), (0 * out).sqrt()).mean(),
    "left out by nanmean": lambda out: (
        out * torch.full_like(out, math.nan).index_fill(1, torch.tensor([0]), 1.0)
    ).nanmean(),
}


@pytest.mark.parametrize("case", SLOPELESS)
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "fixed-prediction"])
def test_a_finite_loss_without_a_slope_is_told_from_one_that_overflows(name, case):
    module = net()
    before = held(module)
    with pytest.raises(
        ebm.RelaxationDivergedError, match=r"loss is finite, and its own gradient is nan in .*fill what"
    ):
        ebm.Learner(module, name).backward(lambda: SLOPELESS[case](module(X)))
    assert same(held(module), before)


@pytest.mark.parametrize("name", PRESETS)
def test_each_cause_has_its_own_remedy(name):
    def message(module, x=X, y=Y, loss=F.cross_entropy):
        with pytest.raises(ebm.RelaxationDivergedError) as caught:
            ebm.Learner(module, name).backward(lambda: loss(module(x), y))
        return str(caught.value)

    weights = net()
    with torch.no_grad():
        weights[3].weight[0, 0] = math.nan
    assert "weights hold nan or inf already: 3.weight" in message(weights)
    assert "lower the learning rate" in message(weights)
    targets = torch.zeros(8, 3)
    targets[1, 1] = math.nan
    said = message(net(), y=targets, loss=F.mse_loss)
    assert "while weights and inputs are finite" in said
    assert "labels" in said
    buffers = net().eval()
    buffers[1].running_mean[2] = math.nan
    assert "Buffers hold nan or inf: 1.running_mean" in message(buffers)


# ------------------------------------------------------------------------------------------- policies

STEEP = 40.0
"""Curvature of the loss below: at nudge -1 the output's states have no minimum, as soon as a batch is this steep."""
NEGATIVE = ebm.Algorithm(nudge=ebm.OneSided(-0.5), relaxer=ebm.ErrorCoordinates(200, tol=1e-4))
HOPFIELD = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(60))


def quadratic(module: nn.Module, x: torch.Tensor, steepness: float) -> torch.Tensor:
    return 0.5 * steepness * (module(x) - 1).square().sum(1).mean()


BATCHES = {
    # x and steepness of three batches, of which the second cannot be trained on
    "diverges": (NEGATIVE, [(X, 0.1), (X.flip(0), STEEP), (2 * X, 0.1)]),
    "nan": (NEGATIVE, [(X, 0.1), (with_one(math.nan), 0.1), (2 * X, 0.1)]),
    "inf": ("predictive-coding", [(X, 0.1), (with_one(math.inf), 0.1), (2 * X, 0.1)]),
    "nan before a free phase": (HOPFIELD, [(X, 0.1), (with_one(math.nan), 0.1), (2 * X, 0.1)]),
}


def trained(algorithm, batches, norm=True, step=True, **options):
    module = net(norm)
    learner = ebm.Learner(module, algorithm, **options)
    optimizer = torch.optim.AdamW(module.parameters(), 0.01)
    for x, steepness in batches:
        if step:
            learner.step(lambda x=x, s=steepness: quadratic(module, x, s), optimizer)
        else:
            optimizer.zero_grad()
            learner.backward(lambda x=x, s=steepness: quadratic(module, x, s))
            optimizer.step()
    return module, learner


@pytest.mark.parametrize("step", [True, False])
@pytest.mark.parametrize("case", BATCHES)
def test_a_skipped_batch_leaves_everything_as_if_it_had_not_been(case, step, caplog):
    algorithm, batches = BATCHES[case]
    with pytest.raises(ebm.RelaxationDivergedError):
        trained(algorithm, batches, step=step)
    found, learner = trained(algorithm, [*batches, batches[1]], step=step, on_divergence="skip")
    assert (learner.report["skipped"], learner.report["fallbacks"]) == (2, 0)
    assert learner.report["result"] == "none"
    without, _ = trained(algorithm, [batches[0], batches[2]], step=step)
    assert same(held(found), held(without))
    assert sum("is skipped" in record.message for record in caplog.records) == 1
    another = ebm.Learner(found, algorithm, on_divergence="skip")
    another.load_state_dict(learner.state_dict())
    assert another.policy.counts == {"skipped": 2, "fallbacks": 0}


@pytest.mark.parametrize("fallback", ["backprop", "pc-nudge", ebm.algorithm("zero-divergence")], ids=str)
def test_a_batch_that_falls_back_is_trained_on_by_that_algorithm_alone(fallback):
    """The gradient is the other algorithm's own of that batch, and so are the statistics that its pass leaves."""
    _, batches = BATCHES["diverges"]
    module = net()
    learner = ebm.Learner(module, NEGATIVE, on_divergence=fallback)
    twin = copy.deepcopy(module)
    alone = ebm.Learner(twin, fallback)
    x, steepness = batches[1]
    loss = learner.backward(lambda: quadratic(module, x, steepness))
    assert torch.equal(loss, alone.backward(lambda: quadratic(twin, x, steepness)))
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-6)
    assert same(dict(module.named_buffers()), dict(twin.named_buffers()))
    assert (learner.report["skipped"], learner.report["fallbacks"]) == (0, 1)


def test_a_fallback_before_a_free_phase_is_that_algorithm_alone():
    """Free states of a Hopfield network with large weights run away, before the user's pass."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        module[2].weight *= 30
    runs_away = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(60))
    twin = copy.deepcopy(module)
    with pytest.raises(ebm.RelaxationDivergedError):
        ebm.Learner(twin, runs_away).backward(lambda: F.cross_entropy(twin(X), Y))
    learner = ebm.Learner(module, runs_away, on_divergence="pc-nudge")
    learner.backward(lambda: F.cross_entropy(module(X), Y))
    ebm.Learner(twin, "pc-nudge").backward(lambda: F.cross_entropy(twin(X), Y))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    assert learner.policy.fallbacks == 1


def test_no_algorithm_is_given_a_batch_of_nan():
    module = net()
    learner = ebm.Learner(module, "pc-nudge", on_divergence="backprop")
    with pytest.raises(ebm.RelaxationDivergedError, match="Clean the data"):
        learner.backward(lambda: F.cross_entropy(module(with_one(math.nan)), Y))
    assert all(p.grad is None for p in module.parameters())


@newer
def test_what_cannot_be_undone_is_refused():
    with pytest.raises(ebm.ConfigurationError, match="incremental"):
        ebm.Learner(net(), "incremental-pc", on_divergence="skip")
    with pytest.raises(ebm.ConfigurationError, match="on_divergence"):
        ebm.EBMStrategy(on_divergence="ignore")
    with pytest.raises(ebm.ConfigurationError, match=r"on_divergence.*FSDP2.*EBMDDPStrategy"):
        ebm.EBMFSDP2Strategy(on_divergence="skip")
    assert ebm.EBMFSDP2Strategy(on_divergence="raise").on_divergence == "raise"


class Quadratic(L.LightningModule):
    def __init__(self, batches):
        super().__init__()
        self.net, self.batches = net(), batches

    def training_step(self, batch, batch_idx):
        x, steepness = batch
        loss = 0.5 * (steepness[:, None] * (self.net(x) - 1).square()).sum(1).mean()
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)

    def train_dataloader(self):
        x = torch.cat([x for x, _ in self.batches])
        steepness = torch.cat([torch.full((len(x),), s) for x, s in self.batches])
        return DataLoader(TensorDataset(x, steepness), len(X))


class Kept(L.pytorch.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = []

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, dict(metrics)))


@pytest.mark.parametrize("case", BATCHES)
def test_the_trainer_skips_as_the_learner_does_and_logs_the_count(case):
    algorithm, batches = BATCHES[case]
    logger = Kept()
    strategy = ebm.EBMStrategy(algorithm, on_divergence="skip")
    module = Quadratic(batches)
    trainer = L.Trainer(strategy=strategy, callbacks=[ebm.RelaxationMonitor(1)], **(QUIET | {"logger": logger}))
    trainer.fit(module)
    without = Quadratic([batches[0], batches[2]])
    L.Trainer(strategy=ebm.EBMStrategy(algorithm), **QUIET).fit(without)
    assert same(held(module), held(without))
    assert trainer.global_step == 3  # the optimizer was called, as for a step that returns None
    assert [entry for entry in logger.logged if "ebm/skipped" in entry[1]] == [(1, {"ebm/skipped": 1.0})]
    assert strategy.learner.report["skipped"] == 1


def test_the_trainer_falls_back_as_the_learner_does():
    algorithm, batches = BATCHES["diverges"]
    module, alone = Quadratic(batches[1:2]), Quadratic(batches[1:2])
    strategy = ebm.EBMStrategy(algorithm, on_divergence="backprop")
    L.Trainer(strategy=strategy, **QUIET).fit(module)
    L.Trainer(**QUIET).fit(alone)
    assert strategy.learner.policy.fallbacks == 1
    assert same(held(module), held(alone))


def test_a_skipped_step_leaves_metrics_and_draws_as_stock_leaves_those_of_a_step_without_a_loss():
    """What training_step counted and drew, it has counted and drawn; only what is learned or tracked is put back."""
    algorithm, batches = BATCHES["diverges"]

    class Counting(Quadratic):
        def __init__(self, none):
            super().__init__(batches)
            self.seen, self.none, self.draws = MeanMetric(), none, []

        def training_step(self, batch, batch_idx):
            self.draws.append(float(torch.rand(())))
            self.seen.update(batch[1])
            return None if self.none and batch_idx == 1 else super().training_step(batch, batch_idx)

    found = {}
    for name, strategy in {"ours": ebm.EBMStrategy(algorithm, on_divergence="skip"), "stock": "auto"}.items():
        module = Counting(none=name == "stock")
        torch.manual_seed(0)
        L.Trainer(strategy=strategy, **QUIET).fit(module)
        found[name] = (module.draws, float(module.seen.compute()))
    assert found["ours"] == found["stock"]


@pytest.mark.slow
@pytest.mark.timeout(450)
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_do_the_same_with_a_batch_that_one_of_them_cannot_take(tmp_path):
    left, told = launch(2, tmp_path, ["policies"])
    first, second = left["policies"]
    for case in ("diverges", "nan", "nan before a free phase", "falls back"):
        for rank in (first, second):
            policy, plain = rank[case]
            assert policy["counts"] == {"skipped": int(case != "falls back"), "fallbacks": int(case == "falls back")}
            for name, value in plain["weights"].items():
                torch.testing.assert_close(policy["weights"][name], value, rtol=1e-5, atol=1e-7)
            if case != "falls back":
                assert same(policy["weights"], plain["weights"])
        a, b = (rank[case][0]["weights"] for rank in (first, second))
        assert all(torch.equal(a[name], b[name]) for name in a if "running" not in name)
    assert "broken in the pass" in first["both"]
    assert "no minimum" in second["both"]  # its own error, which it has not waited for the other to tell
    assert "It did not relax on another rank" in told
