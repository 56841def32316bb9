"""The user's step may copy and pickle the modules it trains while they are being watched."""

import copy
import io
import pickle

import lightning as L
import pytest
import torch
from lightning_modules import Template
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """An in-place activation, BatchNorm, and a parameter of the module's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(inplace=True))
        self.head = nn.Linear(5, 1)
        self.shift = nn.Parameter(torch.zeros(1))
        self.double()

    def forward(self, x):
        return self.head(self.body(x)) + self.shift


class OwnWay(Net):
    """Copies itself by hand, hooks and all."""

    def __deepcopy__(self, memo):
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        other.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return other


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved,
    "a part": lambda net: nn.Sequential(copy.deepcopy(net.body), copy.deepcopy(net.head)),
}


def hooks_of(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [hook for m in module.modules() for kind in kinds for hook in getattr(m, kind).items()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("capture", [True, False])
def test_a_copy_made_in_the_step_is_a_plain_module(way, capture):
    """The gradient is plain autograd's, and the copies hold the user's own hooks and no other."""
    net, copies = Net(), []
    heard = []
    net.head.register_forward_hook(Heard(heard))

    def step():
        teacher = WAYS[way](net)
        copies.append(teacher)
        with torch.no_grad():
            target = teacher(X)
        return (net(X) - target.detach() - 1).square().mean()

    true = ebm.reference.backprop(net, step)
    for algorithm, tolerance in (("zero-divergence", 1e-12), ("pc-nudge", 1e-2)):
        found = ebm.Learner(net, algorithm, capture=capture).gradients(step)
        assert ebm.metrics.alignment(found, true)["relative_error"] < tolerance
    assert len(copies) == 3  # one for each run of the step: backprop's and two learners'
    for made in copies:
        assert len(hooks_of(made)) == 1
        assert "__getstate__" not in {name for m in made.modules() for name in vars(m)}
        assert made(X).shape == (6, 1)
    assert len(hooks_of(net)) == 1
    assert all("__getstate__" not in vars(m) for m in net.modules())


class Heard:
    """A hook that can be copied and pickled."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, module, args, output):
        self.calls.append(len(args))


def test_a_copy_made_in_a_way_of_its_own_is_not_taken_for_the_module():
    net = OwnWay()

    def step():
        teacher = copy.deepcopy(net)
        return (net(X) - teacher(X).detach() - 1).square().mean()

    true = ebm.reference.backprop(net, step)
    found = ebm.Learner(net, "zero-divergence").gradients(step)
    assert ebm.metrics.alignment(found, true)["relative_error"] < 1e-12


class CopiesInForward(Net):
    def forward(self, x):
        with torch.no_grad():
            again = copy.deepcopy(self.body)(x)
        return super().forward(x) + again.mean()


def test_a_copy_made_in_forward_changes_nothing():
    net = CopiesInForward()
    step = lambda: (net(X) - 1).square().mean()  # noqa: E731
    true = ebm.reference.backprop(net, step)
    found = ebm.Learner(net, "zero-divergence").gradients(step)
    assert ebm.metrics.alignment(found, true)["relative_error"] < 1e-12


def test_a_shallow_copy_is_another_module():
    """Its parameters are shared, so that its output goes into the loss around the states, with autograd's gradient."""
    net = Net()
    step = lambda: (net(X) - 1).square().mean() + copy.copy(net.head)(torch.ones(1, 5).double()).sum()  # noqa: E731
    true = ebm.reference.backprop(net, step)
    found = ebm.Learner(net, "zero-divergence").gradients(step)
    assert ebm.metrics.alignment(found, true)["relative_error"] < 1e-12


class Teaching(L.LightningModule):
    """Keeps a teacher made of itself, anew every third step."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.teacher = None

    def training_step(self, batch, batch_idx):
        if batch_idx % 3 == 0:
            self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()
        return (self.net(batch[0]) - self.teacher(batch[0]) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05)

    def train_dataloader(self):
        return DataLoader(TensorDataset(X.repeat(4, 1)), 6)


@pytest.mark.filterwarnings("ignore")
def test_a_teacher_kept_as_an_attribute_trains_as_under_stock_lightning():
    trained = []
    for options in ({}, {"strategy": ebm.EBMStrategy("zero-divergence")}):
        module = Teaching()
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip
        trainer.fit(module)
        assert not hooks_of(module)
        trained.append(module.state_dict())
    stock, ours = trained
    assert stock.keys() == ours.keys()
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
@pytest.mark.parametrize("preset", ["predictive-coding", "equilibrium-propagation"])
def test_a_copy_of_a_strategys_learner_works_without_its_trainer(preset, copied):
    trainer = L.Trainer(
        strategy=ebm.EBMStrategy(preset), max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Template(dropout=0.0))
    learner = trainer.strategy.learner
    x, y = next(iter(Template().train_dataloader()))

    def update(one):
        return one.gradients(lambda: nn.functional.cross_entropy(one.module.net(x), y))

    expected, found = update(learner), update(copied(learner))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
