"""A torchmetrics object whose forward value is the loss, or a part of it, as forecasting libraries write theirs."""

import lightning as L
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(24, 4, dtype=torch.float64, generator=GENERATOR)
Y = torch.randn(24, 2, dtype=torch.float64, generator=GENERATOR)


class Squares(torchmetrics.Metric):
    """A mean of squares by two sums, which it adds to in place."""

    full_state_update, higher_is_better, is_differentiable = False, False, True

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction, target):
        self.total += (prediction - target).square().sum()
        self.count += target.numel()

    def compute(self):
        return self.total / self.count


class ByLists(Squares):
    """The same, by lists of tensors and two updates a call."""

    full_state_update = True

    def __init__(self):
        super().__init__()
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, prediction, target):
        self.seen.append((prediction - target).square().flatten())

    def compute(self):
        return torch.cat(self.seen).mean()


class InACollection(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torchmetrics.MetricCollection({"squares": Squares(), "lists": ByLists()})

    def forward(self, prediction, target):
        values = self.inner(prediction, target)
        return 0.5 * values["squares"] + 0.5 * values["lists"]


class Module(L.LightningModule):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 2)).double()
        self.error = make()
        self.seen = Squares()

    def training_step(self, batch, batch_idx):
        loss = self.error(self.net(batch[0]), batch[1])
        self.seen(loss.detach().reshape(1), torch.zeros(1, dtype=torch.float64))  # one that is only watched
        self.log("loss", loss.detach(), on_epoch=True)
        self.log("so far", self.seen.compute())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(X, Y), 8)


MAKERS = [Squares, ByLists, InACollection]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("capture", [True, False])
def test_the_update_is_that_of_the_same_loss_written_as_a_function(make, capture):
    """For rules that relax at a finite nudge too; and backprop's, by plain autograd, for the exact one."""
    module = Module(make)
    by_metric = lambda: module.error(module.net(X), Y)  # noqa: E731
    by_function = lambda: F.mse_loss(module.net(X), Y)  # noqa: E731
    for name in ("zero-divergence", "predictive-coding", "pc-nudge"):
        learner = ebm.Learner(module, name, capture=capture)
        for _ in range(2):
            found = learner.gradients(by_metric)
        expected = ebm.Learner(module, name, capture=capture).gradients(by_function)
        assert ebm.metrics.alignment(found, expected)["relative_error"] < 1e-7, name
    true = ebm.reference.backprop(module, by_function)
    assert ebm.metrics.alignment(found, true)["relative_error"] < 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(("name", "tolerance"), [("zero-divergence", 1e-9), ("pc-nudge", 2e-3)])
def test_training_and_what_is_logged_are_those_of_stock_lightning(make, name, tolerance):
    ends = []
    for options in ({}, {"strategy": ebm.EBMStrategy(name)}):
        module = Module(make)
        trainer = L.Trainer(
            max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip
        trainer.fit(module)
        ends.append((module, {key: float(value) for key, value in trainer.callback_metrics.items()}))
    (stock, logged), (ours, ours_logged) = ends
    assert ours_logged == pytest.approx(logged, rel=10 * tolerance)
    for key, value in stock.net.state_dict().items():
        assert float((ours.net.state_dict()[key] - value).norm() / value.norm()) < tolerance
    metrics = [m for m in ours.modules() if isinstance(m, torchmetrics.Metric)]
    for metric, other in zip(metrics, [m for m in stock.modules() if isinstance(m, torchmetrics.Metric)], strict=True):
        assert float(metric.compute()) == pytest.approx(float(other.compute()), rel=10 * tolerance)
        assert metric._update_count == other._update_count
