"""Steps under the Trainer's precisions: what torch makes by default, and how much rounding the self-check allows."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(make, precision, strategy="auto"):
    L.seed_everything(0, verbose=False)
    module = make()
    trainer = L.Trainer(
        max_epochs=3, precision=precision, strategy=strategy, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 8))
    return module


def off(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def timed(scale):
    """A step whose network sees a number of each sample, made of integers or where no kind of number is said."""

    class Timed(Net):
        def training_step(self, batch, index):
            steps = torch.arange(len(batch[0])) + index
            return F.cross_entropy(self.net(batch[0] * scale(steps)[:, None]), batch[1])

    return Timed


MADE = {
    "integers divided": timed(lambda steps: steps / 10),
    "a root of integers": timed(lambda steps: torch.sqrt(steps + 1)),
    "a schedule": timed(lambda steps: torch.linspace(0.1, 1, 20)[steps] + torch.tensor(0.3)),
    "frequencies": timed(lambda steps: torch.sin(steps * torch.exp(torch.arange(1) * -0.1))),
}


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(("precision", "bound"), [("64-true", 1e-12), ("bf16-true", 0.1)])
@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_what_torch_makes_by_default_is_what_it_was_in_the_step(make, precision, bound, capture):
    stock = fitted(make, precision)
    assert off(stock, fitted(make, precision, ebm.EBMStrategy("zero-divergence", capture=capture))) < bound
    weak = ebm.algorithm("pc-nudge", nudge=ebm.OneSided(1e-6))
    assert off(stock, fitted(make, precision, ebm.EBMStrategy(weak, capture=capture))) < max(bound, 1e-4)


class Looking(Net):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_before_backward(self, loss):
        self.seen.append(loss.dtype)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("algorithm", ["zero-divergence", "pc-nudge", "incremental-pc"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_hooks_are_handed_the_loss_in_the_kind_of_numbers_it_is(precision, algorithm, capture):
    """In its first step as in those that run as code."""
    seen = fitted(Looking, precision, ebm.EBMStrategy(algorithm, capture=capture)).seen
    assert set(seen) == set(fitted(Looking, precision).seen)


class Redundant(Net):
    """In front of the norm a bias has no slope, but for rounding."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, affine=False)

    def training_step(self, batch, index):
        one, other = self.norm(self.net(batch[0])), self.norm(self.net(batch[0] + 0.2))
        return (one.t() @ other / len(one) - torch.eye(3)).square().sum()


def test_a_slope_of_nothing_but_rounding_is_no_fault_of_the_step():
    L.seed_everything(0, verbose=False)
    module = Redundant()
    with torch.autocast("cpu", torch.bfloat16):
        found = ebm.Learner(module, "zero-divergence").gradients(lambda: module.training_step((X[:8], Y[:8]), 0))
        expected = ebm.reference.backprop(module, lambda: module.training_step((X[:8], Y[:8]), 0))
    assert ebm.metrics.alignment(found, expected)["relative_error"] < 0.05


class Adding(Net):
    def training_step(self, batch, index):
        hidden = self.net[:2](batch[0])
        hidden.register_hook(lambda slope: slope + 0.01 * hidden.detach())
        return F.cross_entropy(self.net[2:](hidden), batch[1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_hooks_that_are_not_proportional_are_refused_in_any_precision(precision):
    with pytest.raises(ebm.UnsupportedModuleError, match="not proportional"):
        fitted(Adding, precision, ebm.EBMStrategy("zero-divergence"))


class To(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return x.to(self.kind)


@pytest.mark.parametrize("first", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("preset", ebm.algorithms())
def test_states_may_be_of_several_kinds(preset, first):
    """An island of other numbers in a network, which an energy sums over."""
    torch.manual_seed(0)
    kinds = [first, torch.float64 if first is torch.float32 else torch.float32]
    wide = [[To(kind), nn.Linear(6, 6).to(kind), nn.Tanh()] for kind in kinds]
    net = nn.Sequential(*wide[0], *wide[1], nn.Linear(6, 3).to(kinds[1]))
    x, y = torch.randn(5, 6), torch.arange(5) % 3
    for capture in (True, False):
        learner = ebm.Learner(net, preset, capture=capture)
        for _ in range(3):
            found = learner.gradients(lambda: F.cross_entropy(net(x), y))
        assert set(found) == {name for name, _ in net.named_parameters()}
        assert all(g.dtype is dict(net.named_parameters())[name].dtype for name, g in found.items())
        assert all(bool(g.isfinite().all()) for g in found.values())


@pytest.mark.parametrize(
    ("algorithm", "precision", "told"),
    [
        ("equilibrium-propagation", "bf16-mixed", 1), ("recurrent-backprop", "bf16-true", 1),
        ("equilibrium-propagation", "32-true", 0), ("predictive-coding", "bf16-mixed", 0),
        ("backprop", "bf16-mixed", 0),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_equilibria_of_few_digits_are_told_of_once(algorithm, precision, told, caplog):
    fitted(Net, precision, ebm.EBMStrategy(algorithm))
    assert sum("numbers of 16 bits" in record.message for record in caplog.records) == told
