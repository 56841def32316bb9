"""Weights sharded by FSDP2, over one rank in this process: they come and go around the user's own backward calls."""

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from since import newer
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def _one_rank():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def configure_model(self):
        for layer in (self.net[0], self.net[2], self.net[4]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


class Scales(Net):
    def backward(self, loss, *args, **kwargs):
        (0.5 * loss).backward()


class Weighs(Net):
    def backward(self, loss, *args, **kwargs):
        loss.backward(torch.tensor(0.3, dtype=loss.dtype), retain_graph=True)
        loss.backward()


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class StepsTwice(Manual):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        with torch.no_grad():
            weight = self.loss(batch)  # weights are whole now, and old after the next step of the optimizer
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(weight * self.loss(batch), torch.tensor(0.25, dtype=weight.dtype))
        optimizer.step()
        self.manual_backward(self.net(batch[0]).square().mean())
        optimizer.step()


class Plain(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


@newer
@pytest.mark.parametrize("kind", [Net, Scales, Weighs, Manual, StepsTwice, Plain])
def test_sharded_weights_end_where_backprop_ends(kind):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(18, 4, generator=generator, dtype=torch.float64), torch.arange(18) % 2
    ends = []
    for ours in (False, True):
        torch.manual_seed(0)
        options = {"data_parallel_size": 1, "save_distributed_checkpoint": False}
        strategy = ebm.EBMFSDP2Strategy("zero-divergence", **options) if ours else ModelParallelStrategy(**options)
        module = kind().double()
        trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=2, **QUIET)
        trainer.fit(module, DataLoader(TensorDataset(x, y), 6))
        weights = strategy.lightning_module_state_dict()
        ends.append(torch.cat([weight.flatten() for weight in weights.values()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-12)


@newer
@pytest.mark.parametrize("kind", [Net, Manual])
def test_callbacks_measure_on_whole_weights(kind):
    """Those that look after the backward pass found weights that had been given back."""
    x, y = torch.randn(18, 4, dtype=torch.float64), torch.arange(18) % 2
    strategy = ebm.EBMFSDP2Strategy("pc-nudge", data_parallel_size=1, save_distributed_checkpoint=False)
    callbacks = [ebm.GradientAlignment(every_n_steps=1), ebm.RelaxationMonitor(1, curvature_every_n_steps=1)]
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=1, callbacks=callbacks, **QUIET)
    trainer.fit(kind().double(), DataLoader(TensorDataset(x, y), 6))
    assert trainer.callback_metrics["alignment/cosine"] > 0.99
    assert callbacks[1].regime is not None


def test_an_older_torch_is_refused_by_its_version(monkeypatch):
    monkeypatch.delattr(FSDPModule, "set_reshard_after_forward", raising=False)
    with pytest.raises(ebm.ConfigurationError, match=r"torch 2\.8 or newer"):
        ebm.EBMFSDP2Strategy("pc-nudge")
