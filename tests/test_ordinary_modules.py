"""LightningModules of every ordinary kind: the exact rules end where stock Lightning ends, and run a step as often."""

import copy
import itertools
import random
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

import lightning_ebm as ebm

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(24) % 3


def mlp(*widths, act=nn.Tanh):
    parts = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), act())]
    return nn.Sequential(*parts[:-1])


class Base(L.LightningModule):
    options: ClassVar[dict] = {}
    layers = None

    def __init__(self):
        super().__init__()
        self.net = mlp(4, 8, 6, 3)
        self.calls = 0
        self.build()

    def build(self):
        pass

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = self.loss(*batch)
        self.log("loss", loss)
        return loss

    def loss(self, x, y):
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(TensorDataset(X, Y), 8)


class ByHand(Base):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.by_hand(self.optimizers(), *batch)


# ----------------------------------------------------------------------------------------------- adversaries, and GANs


class Gan(ByHand):
    gp = False

    def build(self):
        self.net = None
        self.g, self.d = mlp(3, 8, 4), mlp(4, 8, 1, act=nn.Softplus)

    def configure_optimizers(self):
        return torch.optim.SGD(self.g.parameters(), 0.05), torch.optim.SGD(self.d.parameters(), 0.05)

    def by_hand(self, optimizers, x, y):
        og, od = optimizers
        z = torch.randn(len(x), 3, dtype=x.dtype)
        self.toggle_optimizer(og)
        fake = self.g(z)
        loss = -self.d(fake).mean() if self.gp else F.softplus(-self.d(fake)).mean()
        self.log("g", loss)
        og.zero_grad()
        self.manual_backward(loss)
        og.step()
        self.untoggle_optimizer(og)
        self.toggle_optimizer(od)
        fake = self.g(z).detach()
        if self.gp:
            mixed = torch.lerp(x, fake, torch.rand(len(x), 1, dtype=x.dtype)).requires_grad_()
            (slope,) = torch.autograd.grad(self.d(mixed).sum(), mixed, create_graph=True)
            loss = self.d(fake).mean() - self.d(x).mean() + 2 * (slope.norm(dim=1) - 1).square().mean()
        else:
            loss = F.softplus(-self.d(x)).mean() + F.softplus(self.d(fake)).mean()
        self.log("d", loss)
        od.zero_grad()
        self.manual_backward(loss)
        od.step()
        self.untoggle_optimizer(od)


class WganGp(Gan):
    gp = True


class Fgsm(Base):
    def loss(self, x, y):
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(self.net(z), y), z)
        return 0.5 * super().loss(x, y) + 0.5 * super().loss(x + 0.1 * slope.sign(), y)


class Pgd(Base):
    """By backward() and zero_grad, as most code on the web has it."""

    def loss(self, x, y):
        delta = torch.zeros_like(x)
        for _ in range(3):
            delta = delta.detach().requires_grad_()
            F.cross_entropy(self.net(x + delta), y).backward()
            with torch.no_grad():
                delta += 0.05 * delta.grad.sign()
                delta.clamp_(-0.1, 0.1)
        self.zero_grad()
        return super().loss(x + delta.detach(), y)


class PgdInEval(Base):
    def build(self):
        self.net.insert(1, nn.BatchNorm1d(8))

    def loss(self, x, y):
        self.eval()
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(self.net(z), y), z)
        self.train()
        return super().loss((x + 0.1 * slope.sign()).clamp(-2, 2), y)


class Virtual(Base):
    """Virtual adversarial training: a power iteration on the input."""

    def loss(self, x, y):
        p = F.softmax(self.net(x).detach(), -1)
        d = F.normalize(torch.randn_like(x), dim=1).requires_grad_()
        far = F.kl_div(F.log_softmax(self.net(x + 0.1 * d), -1), p, reduction="batchmean")
        (g,) = torch.autograd.grad(far, d)
        d = F.normalize(g, dim=1)
        far = F.kl_div(F.log_softmax(self.net(x + 0.3 * d), -1), p, reduction="batchmean")
        return super().loss(x, y) + far


# ------------------------------------------------------------------------------------------------ derivatives within


class Pinn(Base):
    def build(self):
        self.net = mlp(2, 8, 8, 1)

    def loss(self, x, y):
        t = x[:, :2].clone().requires_grad_()
        u = self.net(t) * t[:, :1]
        (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), t, create_graph=True)
        return (ddu[:, 0] - du[:, 1] + u[:, 0]).square().mean()


class Maml(Base):
    def loss(self, x, y):
        names = dict(self.net.named_parameters())
        inner = F.cross_entropy(torch.func.functional_call(self.net, names, (x[:4],)), y[:4])
        slopes = torch.autograd.grad(inner, list(names.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(names.items(), slopes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(self.net, fast, (x[4:],)), y[4:])


class FirstOrderMaml(Base):
    def loss(self, x, y):
        names = dict(self.net.named_parameters())
        inner = F.cross_entropy(self.net(x[:4]), y[:4])
        slopes = torch.autograd.grad(inner, list(names.values()), allow_unused=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(names.items(), slopes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(self.net, fast, (x[4:],)), y[4:])


class FrozenAfterwards(ByHand):
    """A critic that is frozen once its verdict is there, and thawed before its own turn."""

    def build(self):
        self.critic = mlp(3, 6, 1)

    def by_hand(self, optimizer, x, y):
        out = self.net(x)
        loss = F.cross_entropy(out, y) - 0.1 * self.critic(out).mean()
        self.critic.requires_grad_(False)
        optimizer.zero_grad()
        self.manual_backward(loss)
        assert all(p.grad is None or not p.grad.any() for p in self.critic.parameters())
        optimizer.step()
        self.critic.requires_grad_(True)
        optimizer.zero_grad()
        self.manual_backward((self.critic(out.detach()) - 1).square().mean())
        optimizer.step()
        self.log("loss", loss)


class FrozenInClosure(Base):
    """The first layer is frozen after it was used."""

    def training_step(self, batch, batch_idx):
        self.net.requires_grad_(True)
        loss = super().training_step(batch, batch_idx)
        self.net[0].requires_grad_(False)
        return loss


class ClippedByHooks(Base):
    def build(self):
        self.heard = 0

        def clip(gradient):
            self.heard += 1
            return gradient.clamp(-0.05, 0.05)

        for parameter in self.net.parameters():
            parameter.register_hook(clip)

    def on_train_end(self):
        assert self.heard == 6 * self.calls


class Jacobian(Base):
    def loss(self, x, y):
        slope = torch.func.vmap(torch.func.jacrev(self.net))(x[:3])
        return super().loss(x, y) + 0.1 * slope.square().mean()


class Vmapped(Base):
    def loss(self, x, y):
        return F.cross_entropy(torch.func.vmap(self.net)(x), y)


class Dual(Base):
    def loss(self, x, y):
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(self.net(forward_ad.make_dual(x, torch.ones_like(x))))
            return F.cross_entropy(out.primal, y) + 0.1 * out.tangent.square().mean()


class Hutchinson(Base):
    """A score network: the trace of a Jacobian by a random vector."""

    def build(self):
        self.net = mlp(4, 8, 4)

    def loss(self, x, y):
        x = x.clone().requires_grad_()
        s = self.net(x)
        v = torch.randint_like(x, 2) * 2 - 1
        (vj,) = torch.autograd.grad((s * v).sum(), x, create_graph=True)
        return (0.5 * s.square().sum(1) + (vj * v).sum(1)).mean()


# ------------------------------------------------------------------------------------------- optimizers of their own


class Sam(ByHand):
    def by_hand(self, optimizer, x, y):
        optimizer.zero_grad()
        self.manual_backward(self.loss(x, y))
        moved = []
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
            for p in self.parameters():
                e = p.grad * 0.05 / (norm + 1e-12)
                p.add_(e)
                moved.append((p, e))
        optimizer.zero_grad()
        self.manual_backward(self.loss(x, y))
        with torch.no_grad():
            for p, e in moved:
                p.sub_(e)
        optimizer.step()


class PcGrad(ByHand):
    def by_hand(self, optimizer, x, y):
        parameters, found = list(self.parameters()), []
        for kind in range(2):
            optimizer.zero_grad()
            out = self.net(x)
            self.manual_backward(F.cross_entropy(out, y) if kind else out.square().mean())
            found.append(torch.cat([p.grad.flatten() for p in parameters]))
        one, other = found
        if (dot := one @ other) < 0:
            one = one - dot / (other @ other) * other
        total = one + other
        for p in parameters:
            p.grad = total[: p.numel()].view_as(p).clone()
            total = total[p.numel() :]
        optimizer.step()


class GradNorm(ByHand):
    def build(self):
        self.scales = nn.Parameter(torch.ones(2))

    def by_hand(self, optimizer, x, y):
        out = self.net(x)
        losses = torch.stack([F.cross_entropy(out, y), out.square().mean()])
        optimizer.zero_grad()
        self.manual_backward((self.scales.detach() * losses).sum(), retain_graph=True)
        last = self.net[4].weight
        norms = torch.stack(
            [
                torch.autograd.grad(scale * loss, last, create_graph=True)[0].norm()
                for scale, loss in zip(self.scales, losses, strict=True)
            ]
        )
        (slope,) = torch.autograd.grad((norms - norms.mean().detach()).abs().sum(), self.scales)
        self.scales.grad = slope
        optimizer.step()


class Lbfgs(Base):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.3, max_iter=3)


class LbfgsByHand(ByHand):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.3, max_iter=3)

    def by_hand(self, optimizer, x, y):
        def closure():
            optimizer.zero_grad()
            loss = self.loss(x, y)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class Accumulated(Base):
    options: ClassVar[dict] = {"accumulate_grad_batches": 2}


class ClippedNorm(Base):
    options: ClassVar[dict] = {"gradient_clip_val": 0.05}


class ClippedValue(Base):
    options: ClassVar[dict] = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}


class TwoOptimizers(ByHand):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net[:2].parameters(), 0.1), torch.optim.Adam(self.net[2:].parameters(), 1e-3)

    def by_hand(self, optimizers, x, y):
        loss = self.loss(x, y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


class TwoBackwards(ByHand):
    def by_hand(self, optimizer, x, y):
        h = self.net[:4](x)
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net[4](h), y), retain_graph=True)
        self.manual_backward(0.1 * h.square().mean())
        optimizer.step()


class PlainBackward(ByHand):
    def by_hand(self, optimizer, x, y):
        optimizer.zero_grad()
        self.loss(x, y).backward()
        optimizer.step()


# --------------------------------------------------------------------------------------------- states beside the net


class VqVae(Base):
    def build(self):
        self.net, self.dec = mlp(4, 8, 3), mlp(3, 8, 4)
        self.book = nn.Embedding(6, 3)

    def loss(self, x, y):
        z = self.net(x)
        index = torch.cdist(z.detach(), self.book.weight).argmin(1)
        q = self.book(index)
        out = self.dec(z + (q - z).detach())
        return F.mse_loss(out, x) + F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())


class VqVaeEma(VqVae):
    def build(self):
        super().build()
        self.book.requires_grad_(False)

    def loss(self, x, y):
        z = self.net(x)
        index = torch.cdist(z.detach(), self.book.weight).argmin(1)
        q = self.book(index)
        hot = F.one_hot(index, 6).to(x)
        with torch.no_grad():
            self.book.weight.lerp_((hot.T @ z) / hot.sum(0)[:, None].clamp_min(1), 0.1)
        return F.mse_loss(self.dec(z + (q - z).detach()), x) + 0.25 * F.mse_loss(z, q)


class Dqn(Base):
    def build(self):
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.memory, self.position, self.dice = deque(maxlen=20), np.zeros(4), random.Random(0)

    def act(self):
        with torch.no_grad():
            q = self.net(torch.from_numpy(self.position))
        action = self.dice.randrange(3) if self.dice.random() < 0.3 else int(q.argmax())
        before = self.position.copy()
        self.position += 0.1 * (action - 1)
        self.position *= 0.9
        self.memory.append((before, action, float(self.position.sum()), self.position.copy()))

    def loss(self, x, y):
        for _ in range(6):
            self.act()
        if self.calls % 2:
            self.target.load_state_dict(self.net.state_dict())
        s, a, r, n = zip(*self.dice.sample(list(self.memory), 4), strict=True)
        s, n = torch.as_tensor(np.stack(s)), torch.as_tensor(np.stack(n))
        q = self.net(s).gather(1, torch.tensor(a)[:, None])[:, 0]
        with torch.no_grad():
            aim = torch.tensor(r, dtype=s.dtype) + 0.9 * self.target(n).amax(1)
        return F.smooth_l1_loss(q, aim)


class SemiSupervised(Base):
    def build(self):
        self.unlabelled = iter(torch.randn(100, 8, 4).double())

    def loss(self, x, y):
        u = next(self.unlabelled)
        p = F.softmax(self.net(u), -1)
        sure = p.detach().amax(1) > 0.38
        return super().loss(x, y) + (F.cross_entropy(self.net(u), p.detach().argmax(1), reduction="none") * sure).mean()


class MeanTeacher(Base):
    before = True

    def build(self):
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    @torch.no_grad()
    def average(self):
        for p, q in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            p.mul_(0.9).add_(q, alpha=0.1)

    def loss(self, x, y):
        if self.before:
            self.average()
        loss = super().loss(x, y) + F.mse_loss(self.net(x), self.teacher(x))
        if not self.before:
            self.average()
        return loss


class MeanTeacherAfter(MeanTeacher):
    before = False


class MeanTeacherData(MeanTeacherAfter):
    def average(self):
        for p, q in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            p.data = 0.9 * p.data + 0.1 * q.data


class Bank(Base):
    """Negatives from a plain tensor that every step writes to, after it has been read."""

    def build(self):
        self.bank, self.at = torch.randn(12, 3).double(), 0

    def loss(self, x, y):
        z = F.normalize(self.net(x), dim=1)
        logits = torch.cat([(z * z.roll(1, 0)).sum(1, keepdim=True), z @ self.bank.T.clone()], 1)
        rows = [(self.at + k) % 12 for k in range(len(x))]
        self.bank[rows] = z.detach()
        self.at = (self.at + len(x)) % 12
        return F.cross_entropy(logits / 0.5, torch.zeros(len(x), dtype=torch.long))


class ArrayAfter(Base):
    """A NumPy array whose memory the loss reads, and the step then writes to."""

    def build(self):
        self.mean = np.zeros(4)

    def loss(self, x, y):
        loss = super().loss(x - torch.from_numpy(self.mean), y)
        self.mean += 0.1 * x.mean(0).numpy()
        return loss


class ArrayOfBatch(Base):
    """The batch, written to through NumPy after the forward pass."""

    def loss(self, x, y):
        x = x.clone()
        loss = super().loss(x - 0.1, y)
        x.numpy()[:] *= 2
        return loss + 0.1 * self.net(x).square().mean()


class WrittenBatch(Base):
    def loss(self, x, y):
        loss = super().loss(x - 0.1, y)
        x.mul_(0.5)
        return loss + super().loss(x, y)


# ------------------------------------------------------------------------------------------------------------ losses


class Mixup(Base):
    def loss(self, x, y):
        lam, order = float(np.random.default_rng(self.calls).beta(1, 1)), torch.randperm(len(x))
        out = self.net(lam * x + (1 - lam) * x[order])
        return lam * F.cross_entropy(out, y) + (1 - lam) * F.cross_entropy(out, y[order])


class MixupByDirichlet(Base):
    """Draws of custom functions without a slope are constants."""

    def loss(self, x, y):
        how_much = torch.distributions.Beta(torch.tensor(0.4), torch.tensor(0.4)).rsample((len(x), 1)).double()
        weights = torch.distributions.Dirichlet(torch.ones(4)).rsample((len(x),)).double()
        mixed = how_much * x + (1 - how_much) * x.flip(0) * weights
        return (how_much[:, 0] * F.cross_entropy(self.net(mixed), y, reduction="none")).mean()


class Smoothed(Base):
    def loss(self, x, y):
        return F.cross_entropy(self.net(x), y, label_smoothing=0.1 + 0.01 * self.calls)


class Focal(Base):
    def loss(self, x, y):
        ce = F.cross_entropy(self.net(x), y, reduction="none")
        return ((1 - (-ce).exp()) ** (1.0 + 0.2 * self.calls) * ce).mean()


class HardExamples(Base):
    def loss(self, x, y):
        ce = F.cross_entropy(self.net(x), y, reduction="none")
        return ce.topk(3 + self.calls % 2).values.mean() + ce[ce > ce.median()].mean()


class Hardest(Base):
    """The largest losses of a batch, which others become when these have fallen."""

    def loss(self, x, y):
        return F.cross_entropy(self.net(x), y, reduction="none").topk(3).values.mean()


class Contrastive(Base):
    def loss(self, x, y):
        z = F.normalize(torch.cat([self.net(x + 0.1 * torch.randn_like(x)), self.net(x)]), dim=1)
        logits = (z @ z.T / 0.5).masked_fill_(torch.eye(len(z), dtype=torch.bool), float("-inf"))
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(x)))


class Triplet(Base):
    def loss(self, x, y):
        z = self.net(x)
        far = torch.cdist(z, z)
        same = y[:, None] == y
        hardest = far.masked_fill(~same, 0).amax(1) - far.masked_fill(same, 1e3).amin(1)
        return F.relu(hardest + 1.0).mean()


class Ctc(Base):
    def build(self):
        self.net = None
        self.rnn, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 4)

    layers = nn.GRU

    def loss(self, x, y):
        h, _ = self.rnn(x[:, None] + 0.1 * torch.arange(6.0, dtype=x.dtype)[:, None])
        out = F.log_softmax(self.head(h), -1).transpose(0, 1)
        lengths = torch.full((len(x),), 6)
        return F.ctc_loss(out, y[:, None] + 1, lengths, torch.ones_like(lengths))


class Packed(Base):
    layers = (nn.LSTM, nn.Tanh)

    def build(self):
        self.lstm = nn.LSTM(4, 8, batch_first=True, num_layers=2, dropout=0.2)
        self.net = mlp(8, 6, 3)

    def loss(self, x, y):
        steps = x[:, None] + 0.1 * torch.arange(5.0, dtype=x.dtype)[:, None]
        lengths = torch.arange(len(x)) % 4 + 1 + self.calls % 2
        packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
        _, (h, _) = self.lstm(packed)
        return F.cross_entropy(self.net(h[-1]), y)


class Graphs(Base):
    def build(self):
        self.message = nn.Linear(8, 8)

    def loss(self, x, y):
        h = torch.tanh(self.net[0](x))
        source, target = torch.randint(len(x), (2, 10 + self.calls))
        h = h + torch.zeros_like(h).index_add_(0, target, self.message(h[source]))
        return F.cross_entropy(self.net[1:](h), y)


class Metric(Base):
    def build(self):
        self.metric = MeanSquaredError()

    def loss(self, x, y):
        return self.metric(self.net(x), F.one_hot(y, 3).to(x))


class Variational(Base):
    def build(self):
        self.net, self.dec = mlp(4, 8, 6), mlp(3, 8, 4)

    def loss(self, x, y):
        mean, log = self.net(x).chunk(2, -1)
        q = torch.distributions.Normal(mean, log.mul(0.5).exp())
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean()
        return F.mse_loss(self.dec(q.rsample()), x) + 0.1 * kl


class Gumbel(Base):
    def build(self):
        self.tail = mlp(3, 6, 3)

    def loss(self, x, y):
        return F.cross_entropy(self.tail(F.gumbel_softmax(self.net(x), tau=0.7, hard=self.calls % 2 == 0)), y)


class Reinforce(Base):
    def loss(self, x, y):
        p = torch.distributions.Categorical(logits=self.net(x))
        a = p.sample()
        reward = (a == y).double()
        return -(p.log_prob(a) * (reward - reward.mean())).mean() - 0.01 * p.entropy().mean()


# ------------------------------------------------------------------------------------------------------ architectures


class Tied(Base):
    def build(self):
        self.net = mlp(4, 6, 6, 4)
        self.net[4].weight = nn.Parameter(self.net[0].weight.detach().T.clone())
        self.net[2].weight = self.net[2].weight

    def loss(self, x, y):
        out = F.linear(self.net[:4](x), self.net[0].weight.T) + self.net[4](self.net[:4](x))
        return F.mse_loss(out, x)


class LayerDrop(Base):
    def build(self):
        self.blocks = nn.ModuleList([mlp(8, 8, 8) for _ in range(3)])

    def loss(self, x, y):
        h = self.net[:2](x)
        for block in self.blocks:
            if torch.rand(()) > 0.4:
                h = h + block(h)
        return F.cross_entropy(self.net[2:](h), y)


class StochasticDepth(LayerDrop):
    def loss(self, x, y):
        h = self.net[:2](x)
        for block in self.blocks:
            h = h + block(h) * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.7).div_(0.7)
        return F.cross_entropy(self.net[2:](h), y)


class Scheduled(Base):
    def build(self):
        self.net = None
        self.cell, self.out = nn.GRUCell(4, 8), nn.Linear(8, 4)

    layers = nn.GRUCell

    def loss(self, x, y):
        h, given, total = x.new_zeros(len(x), 8), x, 0
        for _ in range(3):
            h = self.cell(given, h)
            out = self.out(h)
            total = total + F.mse_loss(out, x)
            given = x if torch.rand(()) < 0.5 else out.detach() if torch.rand(()) < 0.3 else out
        return total


class UserHook(Base):
    def build(self):
        self.net[1].register_forward_hook(lambda module, args, out: out * 1.5 + 0.1 * args[0])
        self.net[2].register_forward_pre_hook(lambda module, args: (args[0] - 0.1,))


class FullBackwardHook(Base):
    def build(self):
        self.seen = []
        self.net[3].register_full_backward_hook(lambda module, gi, go: (gi[0].clamp(-0.01, 0.01),))


class HookedTensor(Base):
    def loss(self, x, y):
        h = self.net[:2](x)
        h.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return F.cross_entropy(self.net[2:](h), y)


class SavedHooks(Base):
    def loss(self, x, y):
        with saved_tensors_hooks(lambda t: t.numpy() if not t.requires_grad else t, lambda t: torch.as_tensor(t)):
            return super().loss(x, y)


class Compiled(Base):
    def build(self):
        self.net[2] = torch.compile(self.net[2], backend="eager")


class Spectral(Base):
    def build(self):
        self.net[0] = nn.utils.parametrizations.spectral_norm(self.net[0])
        self.net[2] = nn.utils.parametrizations.weight_norm(self.net[2])


class Autocast(Base):
    def loss(self, x, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return super().loss(x, y)


class Unfreezing(Base):
    def build(self):
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self):
        if self.current_epoch:
            self.net[0].requires_grad_(True)


class Growing(Base):
    def loss(self, x, y):
        with torch.no_grad():
            self.net[2].weight.mul_(0.99)
        return super().loss(x, y)


class Pruned(Base):
    def build(self):
        nn.utils.prune.random_unstructured(self.net[2], "weight", 0.3)


class ForeachTeacher(MeanTeacher):
    """Averages with gradients on, by operations on lists; the teacher, and then its head again, are read afterwards."""

    def average(self):
        teacher, student = list(self.teacher.parameters()), [p.detach() for p in self.net.parameters()]
        torch._foreach_mul_(teacher, 0.9)
        torch._foreach_add_(teacher, student, alpha=0.1)


class SparseEmbedding(Base):
    def build(self):
        self.table = nn.Embedding(5, 4, sparse=True)

    def loss(self, x, y):
        return super().loss(x + self.table(y), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MaxNorm(Base):
    def build(self):
        self.table = nn.Embedding(5, 4, max_norm=0.5)

    def loss(self, x, y):
        return super().loss(x + self.table(y) + self.table(y.flip(0)), y)


class Anomaly(Base):
    options: ClassVar[dict] = {"detect_anomaly": True}


class OutArgument(Base):
    def loss(self, x, y):
        shifted = torch.empty_like(x)
        torch.add(x, 0.1 * self.calls, out=shifted)
        torch.mul(shifted, 0.9, out=shifted)
        return super().loss(shifted, y)


class ComplexNumbers(Base):
    def build(self):
        self.phase = nn.Parameter(torch.randn(8))

    def loss(self, x, y):
        h = self.net[:2](x)
        h = torch.fft.fft(h) * torch.polar(torch.ones_like(self.phase), self.phase).conj()
        h = torch.view_as_real(torch.fft.ifft(h))[..., 0] + h.imag * 0.1
        return F.cross_entropy(self.net[2:](h), y)


class Sorted(Base):
    def loss(self, x, y):
        h, order = self.net[:2](x).sort(1, descending=True)
        h = h.gather(1, order.argsort(1).flip(1)) + h.cummax(1).values
        return F.cross_entropy(self.net[2:](h.unfold(1, 3, 1).mean(-1).repeat(1, 2)[:, :8]), y)


class Truncated(Base):
    """A recurrent state that is kept for the next batch, cut from its graph."""

    layers = nn.GRUCell

    def build(self):
        self.net = None
        self.cell, self.out = nn.GRUCell(4, 8), nn.Linear(8, 3)
        self.state = torch.zeros(8, 8).double()

    def loss(self, x, y):
        h = self.cell(x, self.state)
        h2 = self.cell(x.flip(0), h)
        self.state = h2.detach().clone()
        self.state[self.calls % 8] = 0
        return F.cross_entropy(self.out(h2), y)


class DetachedInPlace(Base):
    def loss(self, x, y):
        aim = self.net(x)
        aim.detach_()
        return super().loss(x, y) + F.mse_loss(self.net(x + 0.1), aim)


class Replaced(Base):
    """A parameter that is made anew between batches."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 1:
            self.net[4].bias = nn.Parameter(self.net[4].bias.detach() + 0.1)


class ManyHeads(Base):
    """Losses in turn."""

    def build(self):
        self.heads = nn.ModuleList([mlp(8, 5, 3) for _ in range(3)])

    def loss(self, x, y):
        return F.cross_entropy(self.heads[self.calls % 3](self.net[:2](x)), y)


class Distilled(Base):
    """A big network, frozen and in evaluation mode, says what to learn."""

    def build(self):
        self.big = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.big.requires_grad_(False)

    def loss(self, x, y):
        self.big.eval()
        soft = F.log_softmax(self.big(x) / 2, -1)
        return super().loss(x, y) + F.kl_div(F.log_softmax(self.net(x) / 2, -1), soft, log_target=True)


class ClosedFormHead(Base):
    """Least squares on features, as in few-shot learning; the shape of what they leave over depends on values."""

    def loss(self, x, y):
        features, wanted = self.net[:4](x), F.one_hot(y, 3).to(x.dtype)
        ridge, zeros = 0.3 * torch.eye(6, dtype=x.dtype), x.new_zeros(6, 3)
        head = torch.linalg.lstsq(torch.cat([features, ridge]), torch.cat([wanted, zeros])).solution
        return F.mse_loss(self.net[:4](x + 0.1) @ head, wanted) + super().loss(x, y)


class Ordinal(Base):
    """A loss with data-dependent loops and numbers read off the network."""

    def loss(self, x, y):
        out = self.net(x)
        total = out.new_zeros(())
        for label in y.unique().tolist():
            total = total + (out[y == label].mean(0) - float(label)).square().sum()
        if float(out.detach().norm()) > 1.0:
            total = total + 0.01 * out.square().mean()
        return total / int((y >= 0).sum())


# ----------------------------------------------------------------------------------------------- shapes of the step


class ReturnsDict(Base):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "more": torch.ones(2)}


class ReturnsNone(Base):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if self.calls % 2 else loss


class DataloaderIter(Base):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        self.calls += 1
        return self.loss(*batch)


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class Dataclass(Base):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)

    def train_dataloader(self):
        def collate(items):
            return Pair(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))

        return DataLoader(TensorDataset(X, Y), 8, collate_fn=collate)


class CallsAgain(Base):
    """Validates on the batch inside of the step, with another mode."""

    def build(self):
        self.net.insert(1, nn.BatchNorm1d(8))

    def loss(self, x, y):
        loss = super().loss(x, y)
        self.net.eval()
        with torch.no_grad():
            self.log("again", F.cross_entropy(self.net(x), y))
        self.net.train()
        return loss


class OwnBackward(Base):
    def backward(self, loss, *args, **kwargs):
        (2 * loss).backward(*args, **kwargs)


def modules():
    found = []

    def collect(base):
        for kind in base.__subclasses__():
            if kind is not ByHand:
                found.append(kind)
            collect(kind)

    collect(Base)
    return [kind for kind in found if kind.__module__ == __name__]


MODULES = modules()


def fitted(kind, strategy="auto"):
    L.seed_everything(5, verbose=False)
    module = kind().double()
    X0, Y0 = X.clone(), Y.clone()
    L.seed_everything(6, verbose=False)
    trainer = L.Trainer(
        max_epochs=3, strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **kind.options,
    )  # fmt: skip
    trainer.fit(module)
    assert torch.equal(X0, X)
    assert torch.equal(Y0, Y)
    return module, trainer


def far(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-3)) for a, b in pairs if a.is_floating_point())


_stock = {}


def stock_of(kind):
    if kind not in _stock:
        _stock[kind] = fitted(kind)
    return _stock[kind]


REFUSED = {
    Vmapped: (ebm.LayerDiscoveryError, "torch.func"),
    FullBackwardHook: (ebm.UnsupportedModuleError, "hook"),
    HookedTensor: (ebm.UnsupportedModuleError, "[Hh]ook"),
}
"""Their layers run inside of a transform, or their errors are changed on the way: no energy says what they learn."""
RIGHT = [kind for kind in MODULES if kind not in REFUSED]


@pytest.mark.crossed(2)
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_the_sweep_trains_as_stock_does(kind, capture):
    stock, trainer = stock_of(kind)
    ours, other = fitted(kind, ebm.EBMStrategy("zero-divergence", layers=kind.layers, capture=capture))
    assert far(stock, ours) < 1e-7
    assert ours.calls == stock.calls
    for name, value in trainer.callback_metrics.items():
        assert torch.isclose(value, other.callback_metrics[name], rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_a_weak_nudge_trains_as_stock_does_to_its_order(kind):
    stock, _ = stock_of(kind)
    ours, _ = fitted(kind, ebm.EBMStrategy("pc-nudge", layers=kind.layers))
    assert far(stock, ours) < (5e-2 if "Lbfgs" in kind.__name__ else 1e-2)
    assert ours.calls == stock.calls


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("algorithm", ["zero-divergence", "pc-nudge"])
def test_what_no_energy_says_is_refused(kind, algorithm):
    fitted(kind)
    error, words = REFUSED[kind]
    with pytest.raises(error, match=words):
        fitted(kind, ebm.EBMStrategy(algorithm, layers=kind.layers))


DIFFERENTIATES = [Pinn, Maml]
REFUSED_TWICE = [Dual, SemiSupervised]  # tangents end at states in place; an iterator cannot be put back
TWICE = [
    *DIFFERENTIATES, *REFUSED_TWICE, Sam, TwoBackwards, Pgd, PgdInEval, Dqn, MeanTeacherData, Bank, ArrayAfter,
    WrittenBatch, StochasticDepth, Spectral, Growing, Dataclass, CallsAgain,
]  # fmt: skip


@pytest.mark.crossed(3)
@pytest.mark.parametrize("kind", TWICE, ids=lambda kind: kind.__name__)
def test_equilibrium_propagation_leaves_side_effects_of_one_step_and_has_one_answer(kind):
    """Its step runs twice, quietly and with the states in place."""
    if kind in REFUSED_TWICE:
        with pytest.raises(ebm.UnsupportedModuleError, match="the step runs twice"):
            fitted(kind, ebm.EBMStrategy("equilibrium-propagation", layers=kind.layers))
        return
    stock, _ = stock_of(kind)
    # A number of sweeps, wherever they end: these networks were not made to have an equilibrium.
    algorithm = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(20))
    ours, _ = fitted(kind, ebm.EBMStrategy(algorithm, layers=kind.layers))
    assert ours.calls == stock.calls
    assert all(p.isfinite().all() for p in ours.parameters())
    plain, _ = fitted(kind, ebm.EBMStrategy(algorithm, layers=kind.layers, capture=False))
    assert far(plain, ours) < 1e-5


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_in_other_precisions_the_sweep_trains_about_as_stock_does(precision):
    def run(strategy):
        L.seed_everything(5, verbose=False)
        module = Base()
        loader = DataLoader(TensorDataset(X.float(), Y), 8)
        trainer = L.Trainer(
            max_epochs=3, strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, precision=precision,
        )  # fmt: skip
        trainer.fit(module, loader)
        return module

    stock = run("auto")
    for algorithm in ("zero-divergence", "pc-nudge"):
        assert far(stock, run(ebm.EBMStrategy(algorithm))) < (1e-2 if precision == "64-true" else 8e-2)
