"""A loss of one number is a loss, whatever its number of dimensions: shape (), (1,) or (1, 1)."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.rand(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def three_steps(algorithm, shape, **options):
    """Updates of three steps, the last of them by code, and their losses."""
    module = net()
    learner = ebm.Learner(module, algorithm, **options)
    found, losses = [], []
    for _ in range(3):
        module.zero_grad()
        losses.append(learner.backward(lambda: F.mse_loss(module(X), Y).reshape(shape)))
        found.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        with torch.no_grad():
            for p in module.parameters():
                p -= 0.1 * p.grad
    return torch.stack(found), losses


@pytest.mark.parametrize("algorithm", [None, *ebm.algorithms()])
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_the_update_does_not_hang_on_it(algorithm, capture, shape):
    expected, numbers = three_steps(algorithm, (), capture=capture)
    found, losses = three_steps(algorithm, shape, capture=capture)
    assert torch.equal(found, expected)
    assert [loss.shape for loss in losses] == [shape] * 3
    assert [loss.item() for loss in losses] == [number.item() for number in numbers]


@pytest.mark.parametrize("nudge", [None, 0.5])
def test_relaxed_states_do_not_hang_on_it(nudge):
    module = net()
    learner = ebm.Learner(module, "predictive-coding")
    expected, found = (
        learner.relax(lambda shape=shape: F.mse_loss(module(X), Y).reshape(shape), nudge=nudge) for shape in ((), (1,))
    )
    for name, states in expected.states.items():
        assert torch.equal(found.states[name], states)
        assert torch.equal(found.energies[name], expected.energies[name])


class Module(L.LightningModule):
    def __init__(self, shape, manual):
        super().__init__()
        self.net, self.shape, self.automatic_optimization = net(), shape, not manual

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self.net(x), y).reshape(self.shape)
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss, gradient=torch.full(self.shape, 2.0, dtype=torch.float64))
        self.optimizers().step()
        return None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.automatic_optimization:
            assert outputs["loss"].shape == self.shape

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("algorithm", "manual"),
    [
        ("predictive-coding", False),
        ("predictive-coding", True),
        ("equilibrium-propagation", False),
        ("equilibrium-propagation", True),
        ("incremental-pc", False),
    ],
)
def test_neither_does_training_with_the_trainer(algorithm, manual):
    ends = []
    for shape in ((), (1,)):
        module = Module(shape, manual)
        trainer = L.Trainer(
            max_epochs=2, strategy=ebm.EBMStrategy(algorithm), accelerator="cpu", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(X, Y), 4))
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)
