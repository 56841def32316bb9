"""Gradient hooks inside of the network: who only looks is told once, of what stock would tell him; who changes acts."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(20) % 3


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.Hardtanh(), nn.Linear(8, 6), nn.Hardtanh(), nn.Linear(6, 3)
        ).double()
        self.heard = []
        self.build()

    def build(self):
        pass

    def note(self, gradient):
        self.heard.append(gradient.detach().clone())

    def loss(self, x, y):
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OnHidden(Net):
    def loss(self, x, y):
        h = self.net[:3](x)
        h.register_hook(self.note)
        return F.cross_entropy(self.net[3:](h), y)


class OnLayers(Net):
    """On what layers return, by forward hooks, as pictures of what a network looks at are made."""

    def build(self):
        for module in self.net:
            module.register_forward_hook(lambda module, args, out: out.register_hook(self.note) and None)


class OnModules(Net):
    """On every module, the first included, whose input has no gradient."""

    def build(self):
        for module in self.net:
            module.register_full_backward_hook(lambda module, given, taken: self.note(taken[0]))


class BeforeModules(Net):
    def build(self):
        for module in self.net:
            module.register_full_backward_pre_hook(lambda module, taken: self.note(taken[0]))


class GivesItBack(Net):
    """Hooks that return what they were given."""

    def loss(self, x, y):
        h = self.net[:2](x)
        h.register_hook(lambda g: self.note(g) or g)
        return F.cross_entropy(self.net[2:](h), y)


class ByHand(OnHidden):
    """Two losses, each of which tells."""

    def build(self):
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        h = self.net[:3](batch[0])
        h.register_hook(self.note)
        out = self.net[3:](h)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(out, batch[1]), retain_graph=True)
        self.manual_backward(out.square().mean())
        optimizer.step()


class AndRetained(Net):
    """Its gradient is kept by torch as well."""

    def loss(self, x, y):
        self.h = self.net[:2](x)
        self.h.retain_grad()
        self.h.register_hook(self.note)
        return F.cross_entropy(self.net[2:](self.h), y)

    def on_after_backward(self):
        self.note(self.h.grad)


class OnModulesAndRetained(Net):
    """Hooks on modules, about a tensor whose gradient is kept."""

    def build(self):
        self.net[1].register_full_backward_hook(lambda module, into, out: self.note(out[0]))
        self.net[3].register_full_backward_pre_hook(lambda module, out: self.note(out[0]))
        self.net[2].register_full_backward_hook(lambda module, into, out: (0.5 * into[0],))

    def loss(self, x, y):
        self.h = self.net[:2](x) * 1.0
        self.h.retain_grad()
        return F.cross_entropy(self.net[2:](self.h), y)

    def on_after_backward(self):
        self.note(self.h.grad)


class Removed(Net):
    """Hooks that are gone before the backward pass: one that would look, and one that would change."""

    def loss(self, x, y):
        h = self.net[:2](x) * 1.0
        handles = [h.register_hook(self.note), h.register_hook(lambda g: 0 * g)]
        out = self.net[2:](h)
        for handle in handles:
            handle.remove()
        return F.cross_entropy(out, y)


class OwnDerivative(Net):
    """It is told of the derivative that the step takes, and of the loss's."""

    def loss(self, x, y):
        h = self.net[:2](x)
        h.register_hook(self.note)
        out = self.net[2:](h)
        (slope,) = torch.autograd.grad(out.sum(), h, create_graph=True)
        return F.cross_entropy(out, y) + 0.1 * slope.square().mean()


class Penalized(Net):
    """Below a convolution that the loss meets twice, and that is linear: of one of the errors there nothing arrives."""

    def build(self):
        self.conv = nn.Conv1d(1, 1, 3, padding=1).double()

    def hooked(self, h):
        h = h * 1.0
        h.register_hook(lambda g: 0.5 * g)
        return h

    def loss(self, x, y):
        x = x.clone().requires_grad_()
        out = self.net[2:](self.conv(self.hooked(self.net[:2](x))[:, None])[:, 0])
        (slope,) = torch.autograd.grad(out.logsumexp(1).sum(), x, create_graph=True)
        return F.cross_entropy(out, y) + 0.1 * slope.square().mean()


class PenalizedModule(Penalized):
    """The hook is a module's."""

    def build(self):
        super().build()
        self.gate = nn.Identity()
        self.gate.register_full_backward_pre_hook(lambda module, out: (0.5 * out[0],))

    def hooked(self, h):
        return self.gate(h)


class PenalizedAndLooks(Penalized):
    """One looks, the other changes."""

    def hooked(self, h):
        h = super().hooked(h)
        h.register_hook(self.note)
        return h


class AndChanges(Net):
    """One looks, another changes, and below it one looks again."""

    def loss(self, x, y):
        h = self.net[2](self.net[:2](x))
        h.register_hook(self.note)
        low = self.net[3](h)
        low.register_hook(lambda g: 0.3 * g)
        return F.cross_entropy(self.net[4](low), y)


class ChangesLater(Net):
    """It looks for an epoch, and then changes."""

    def loss(self, x, y):
        h = self.net[:3](x) * 1.0
        h.register_hook(lambda g: 0.5 * g if self.current_epoch else None)
        return F.cross_entropy(self.net[3:](h), y)


class Erratic(Net):
    """Its answer hangs on the digits of what it is told."""

    def loss(self, x, y):
        h = self.net[:3](x) * 1.0
        h.register_hook(lambda g: 0.5 * g if int(1e6 * float(g.norm())) % 2 else None)
        return F.cross_entropy(self.net[3:](h), y)


def fitted(make, strategy="auto", **options):
    module = make()
    trainer = L.Trainer(
        max_epochs=3, strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 8))
    return module


LOOK = [
    OnHidden, OnLayers, OnModules, BeforeModules, GivesItBack, ByHand, AndChanges, AndRetained, Removed, OwnDerivative,
    OnModulesAndRetained, Penalized, PenalizedModule, PenalizedAndLooks,
]  # fmt: skip


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("make", [*LOOK, ChangesLater])
def test_under_an_exact_rule_hooks_are_told_and_act_as_in_stock(make, capture):
    stock, ours = fitted(make), fitted(make, ebm.EBMStrategy("zero-divergence", capture=capture))
    assert len(ours.heard) == len(stock.heard)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ours.heard, stock.heard, strict=True))
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ours.parameters(), stock.parameters(), strict=True)
    )


def test_one_whose_answer_cannot_be_had_again_is_refused():
    with pytest.raises(ebm.UnsupportedModuleError, match=r"[Hh]ook"):
        fitted(Erratic, ebm.EBMStrategy("zero-divergence"))


@pytest.mark.parametrize("make", [OnHidden, OnModules, AndChanges, AndRetained])
def test_under_accumulation_too(make):
    """Of their share of the gradient, as the loss is divided by the number of batches before it is differentiated."""
    stock = fitted(make, accumulate_grad_batches=3)
    ours = fitted(make, ebm.EBMStrategy("zero-divergence"), accumulate_grad_batches=3)
    assert len(ours.heard) == len(stock.heard)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ours.heard, stock.heard, strict=True))


def test_under_accumulation_where_the_step_runs_twice():
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(10))
    whole, shared = (fitted(OnModules, ebm.EBMStrategy(algorithm), accumulate_grad_batches=n).heard for n in (1, 2))
    assert len(whole) == len(shared)
    assert all(torch.allclose(a, 2 * b) for a, b in zip(whole[: len(whole) // 9], shared, strict=False))


def test_one_that_looks_is_let_in_however_much_of_the_gradient_cancels():
    """A contrastive loss of outputs that are almost the same: what is left of the slopes is rounded at 1e-10 of it."""
    net = Net().net
    net[0].register_full_backward_hook(lambda module, gradients, outputs: None)
    learner = ebm.Learner(net, "zero-divergence")

    def loss():
        out = F.normalize(1e-7 * net(X[:8]) + 1, dim=1)
        return F.cross_entropy(out @ out.T, (torch.arange(8) + 1) % 8)

    assert set(learner.gradients(loss)) == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("algorithm", ["predictive-coding", "pc-nudge", "incremental-pc", "fixed-prediction"])
@pytest.mark.parametrize("make", [make for make in LOOK if make not in (ByHand, AndRetained, OnModulesAndRetained)])
def test_under_any_rule_they_are_told_once_of_what_autograd_has_for_the_pass(make, algorithm):
    stock, ours = fitted(make), fitted(make, ebm.EBMStrategy(algorithm))
    assert len(ours.heard) == len(stock.heard)
    first = len(stock.heard) // 9
    for told, wanted in zip(ours.heard[:first], stock.heard[:first], strict=True):
        assert torch.allclose(told, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [OnHidden, OnLayers, OnModules, ByHand])
def test_where_the_step_runs_twice_they_are_told_once(make):
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(10))
    assert len(fitted(make, ebm.EBMStrategy(algorithm)).heard) == len(fitted(make).heard)


@pytest.mark.parametrize("capture", [True, False])
def test_one_that_begins_to_clip_is_refused_at_that_step(capture):
    """Clipped errors are not in the scale of the loss: found out on every program with hooks, not on new ones alone."""
    module = Net()
    learner = ebm.Learner(module.net, "zero-divergence", capture=capture)
    bound = [1e9]

    def loss():
        h = module.net[:3](X[:8]) * 1.0
        h.register_hook(lambda g: g.clamp(-bound[0], bound[0]) if bound[0] < 1 else None)
        return F.cross_entropy(module.net[3:](h), Y[:8])

    for _ in range(4):
        learner.gradients(loss)
    bound[0] = 1e-3
    with pytest.raises(ebm.UnsupportedModuleError, match="proportional"):
        learner.gradients(loss)


class OnParameters(Net):
    """Hooks that keep what they are told, and scale it."""

    def build(self):
        for parameter in self.net.parameters():
            parameter.register_hook(lambda g: self.note(g) or 0.5 * g)


@pytest.mark.crossed(3)
@pytest.mark.parametrize("make", [OnParameters, OnHidden, OnModules])
@pytest.mark.parametrize("algorithm", ["zero-divergence", "predictive-coding", "equilibrium-propagation"])
@pytest.mark.parametrize("observer", ["alignment", "equilibrium", "monitor"])
def test_observers_tell_them_nothing(make, algorithm, observer):
    made = {
        "alignment": lambda: ebm.GradientAlignment(every_n_steps=1),
        "equilibrium": lambda: ebm.GradientAlignment(every_n_steps=1, reference="equilibrium"),
        "monitor": lambda: ebm.RelaxationMonitor(every_n_steps=1),
    }[observer]
    if algorithm == "equilibrium-propagation":
        algorithm = ebm.algorithm(algorithm, relaxer=ebm.FixedPoint(10))
    alone = fitted(make, ebm.EBMStrategy(algorithm))
    seen = fitted(make, ebm.EBMStrategy(algorithm), callbacks=[made()])
    assert len(seen.heard) == len(alone.heard)
    assert all(torch.equal(a, b) for a, b in zip(seen.heard, alone.heard, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen.parameters(), alone.parameters(), strict=True))
