"""What outlives a fit, or a step: pickles, a strategy that trains again, learners in threads of their own."""

import pickle
import threading

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

QUIET = {"max_epochs": 2, "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(strategy):
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4).double(), torch.randint(2, (32,)))
    trainer = L.Trainer(strategy=strategy, enable_model_summary=False, **QUIET)
    trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=8))
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.lightning_module.parameters()])


@pytest.mark.parametrize("algorithm", ["zero-divergence", "predictive-coding", "equilibrium-propagation"])
def test_what_has_been_fitted_is_pickled_as_under_stock(algorithm):
    trainer = fitted(ebm.EBMStrategy(algorithm))
    again = pickle.loads(pickle.dumps(trainer))
    assert torch.equal(weights(again), weights(trainer))
    pickle.loads(pickle.dumps(trainer.strategy))


@pytest.mark.parametrize("algorithm", ["zero-divergence", "predictive-coding", "equilibrium-propagation"])
def test_a_learner_that_has_taken_steps_is_pickled(algorithm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(2, (6,))
    learner = ebm.Learner(net, algorithm)
    for _ in range(3):
        expected = learner.gradients(lambda: F.cross_entropy(learner.module(x), y))
    again = pickle.loads(pickle.dumps(learner))
    found = again.gradients(lambda: F.cross_entropy(again.module(x), y))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_strategy_trains_twice():
    strategy = ebm.EBMStrategy("predictive-coding")
    first = weights(fitted(strategy))
    assert torch.equal(weights(fitted(strategy)), first)


def test_learners_in_threads_of_their_own_do_not_meet():
    """Recording watches torch for its own thread alone: every thread has plain autograd's gradient at every step."""
    worst, apply = {}, vars(torch.autograd.Function)["apply"]

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        x, y = torch.randn(8, 4, generator=generator).double(), torch.randn(8, 2, generator=generator).double()
        learner = ebm.Learner(net, "zero-divergence")
        off = []
        for _ in range(20):
            found = learner.gradients(lambda: F.mse_loss(Doubled.apply(net(x)), y))
            true = torch.autograd.grad(F.mse_loss(Doubled.apply(net(x)), y), list(net.parameters()))
            off += [
                float((found[name] - g).abs().max()) for (name, _), g in zip(net.named_parameters(), true, strict=True)
            ]
        worst[seed] = max(off)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(worst) == [0, 1, 2]
    assert max(worst.values()) < 1e-12
    assert vars(torch.autograd.Function)["apply"] is apply
