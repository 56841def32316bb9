"""A step that scales its loss itself says by how much: the relaxation does not see it, the update carries it."""

import lightning as L
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class ScalesItself(L.LightningModule):
    def __init__(self, factor):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.factor = factor

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.factor * F.cross_entropy(self.net(batch[0]), batch[1]))
        for p in self.parameters():
            p.grad.div_(self.factor)
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("algorithm", ["pc-nudge", "predictive-coding"])
@pytest.mark.parametrize("factor", [2.0**16, 0.25])
def test_a_factor_that_is_told_changes_nothing(algorithm, factor):
    ends = []
    for own, scale in ((1.0, None), (factor, factor), (factor, lambda: factor)):
        torch.manual_seed(0)
        module, x = ScalesItself(own), torch.randn(12, 4, dtype=torch.float64)
        trainer = Trainer(
            strategy=ebm.EBMStrategy(algorithm, scale=scale), accelerator="cpu", devices=1, max_epochs=1, **QUIET
        )
        trainer.fit(module, DataLoader(TensorDataset(x, torch.arange(12) % 2), 4))
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-11)


def test_a_factor_of_no_use_is_refused():
    for kind in (ebm.EBMStrategy, ebm.EBMDDPStrategy, ebm.EBMFSDP2Strategy):
        with pytest.raises(ebm.ConfigurationError):
            kind("pc-nudge", scale=-1.0)
