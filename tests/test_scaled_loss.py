"""A loss that carries a factor which is not its own: it is said once, and `scale` takes it out of the nudge."""

import logging

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

G = torch.Generator().manual_seed(1)
X, Y = torch.randn(8, 4, dtype=torch.float64, generator=G), torch.randint(3, (8,), generator=G)
SCALER = torch.tensor(1024.0)
PC = {"relaxer": ebm.ErrorCoordinates(max_steps=400, tol=1e-10)}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


SCALED = {
    "divided": (lambda o: F.cross_entropy(o, Y) / 4, 0.25),
    "multiplied": (lambda o: 0.125 * F.cross_entropy(o, Y), 0.125),
    "in turn": (lambda o: (F.cross_entropy(o, Y) / 4 * 2).reshape(1) / 8, 0.0625),
    "by a tensor, as a GradScaler does": (lambda o: F.cross_entropy(o, Y) * SCALER, 1024.0),
    "two terms": (lambda o: (F.cross_entropy(o, Y) + 0.1 * o.square().mean()) / 4, 0.25),
}
ITS_OWN = {
    "a mean": lambda o: F.cross_entropy(o, Y),
    "half of it": lambda o: 0.5 * F.mse_loss(o, F.one_hot(Y, 3).to(o)),
    "a mean by hand": lambda o: F.cross_entropy(o, Y, reduction="none").sum() / len(Y),
    "a mean by hand of the sum": lambda o: F.cross_entropy(o, Y, reduction="sum") / len(Y),
    "weights of terms": lambda o: F.cross_entropy(o, Y) + 0.01 * o.square().mean(),
    "weights of elements": lambda o: (0.01 * o.square()).mean() + F.cross_entropy(o, Y),
}


def said(caplog):
    return [record.getMessage() for record in caplog.records if "after all else" in record.getMessage()]


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_it_is_said_once_and_scale_takes_it_out(case, strength, caplog):
    loss, factor = SCALED[case]
    module, algorithm = net(), ebm.algorithm("predictive-coding", nudge=ebm.OneSided(strength), **PC)
    told = ebm.Learner(module, algorithm)
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        # As much as a nudge of another strength of the loss without the factor, whose update is as much smaller.
        found = told.gradients(lambda: loss(module(X)))
        told.gradients(lambda: loss(module(X)))
    (message,) = said(caplog)
    assert f"multiplied by {factor:g} after" in message
    assert f"{strength:g} pulls as {strength * factor:g} would" in message
    assert f"scale={factor:g}" in message

    other = ebm.algorithm("predictive-coding", nudge=ebm.OneSided(strength * factor), **PC)
    alone = ebm.Learner(module, other).gradients(lambda: loss(module(X)) / factor)
    assert ebm.metrics.alignment(found, {k: v * factor for k, v in alone.items()})["relative_error"] < 1e-7

    caplog.clear()
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        scaled = ebm.Learner(module, algorithm, scale=factor).gradients(lambda: loss(module(X)))
    meant = ebm.Learner(module, algorithm).gradients(lambda: loss(module(X)) / factor)
    assert not said(caplog)
    assert ebm.metrics.alignment(scaled, {k: v * factor for k, v in meant.items()})["relative_error"] < 1e-7


@pytest.mark.parametrize("case", ITS_OWN)
def test_nothing_is_said_of_a_factor_of_the_losses_own(case, caplog):
    module = net()
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        ebm.Learner(module, "predictive-coding").gradients(lambda: ITS_OWN[case](module(X)))
    assert not said(caplog)


@pytest.mark.parametrize("algorithm", ["zero-divergence", "pc-nudge", "fixed-prediction", "infinitesimal"])
def test_nothing_is_said_where_it_makes_no_difference(algorithm, caplog):
    module = net()
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        found = ebm.Learner(module, algorithm).gradients(lambda: F.cross_entropy(module(X), Y) / 4)
    assert not said(caplog)
    true = ebm.reference.backprop(module, lambda: F.cross_entropy(module(X), Y) / 4)
    assert ebm.metrics.alignment(found, true)["relative_error"] < 1e-3


class ByHand(L.LightningModule):
    """Accumulates over three batches, as it is written everywhere."""

    def __init__(self):
        super().__init__()
        self.net, self.automatic_optimization = net(), False

    def training_step(self, batch, index):
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]) / 3)
        if index % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("scale", [None, 1 / 3])
def test_accumulation_by_hand_under_a_trainer(scale, caplog):
    strategy = ebm.EBMStrategy("predictive-coding", scale=scale)
    trainer = L.Trainer(
        max_epochs=1, strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "lightning_ebm"):
        trainer.fit(ByHand(), DataLoader(TensorDataset(X, Y), batch_size=2))
    assert len(said(caplog)) == (scale is None)
