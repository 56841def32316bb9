"""LightningModules as their authors would write them: nothing here knows of this library."""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Template(L.LightningModule):
    """The popular template: metrics updated in training_step and logged as objects; BatchNorm, dropout."""

    def __init__(self, batch_norm=True, tied=False, dropout=0.3, optimizer="adam", returns="tensor", inner=None):
        super().__init__()
        # No bias before BatchNorm: its gradient is 0 but for rounding, which Adam makes a full step of.
        norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        layers = [nn.Linear(6, 8, bias=not batch_norm), norm, nn.ReLU(inplace=True)]
        middle = nn.Linear(8, 8)
        layers += [nn.Dropout(dropout), middle, nn.Tanh()]
        layers += [middle, nn.Tanh()] if tied else []
        self.net = nn.Sequential(*layers, nn.Linear(8, 3))
        if inner is not None:
            self.net = inner(self.net)
        self.optimizer, self.returns = optimizer, returns
        self.train_acc = MulticlassAccuracy(3)
        self.hooks: dict[str, int] = {}
        self.seen = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen += 1
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        if self.returns == "sometimes none" and batch_idx % 2:
            return None
        return {"loss": loss, "logits": logits.detach()} if self.returns == "dict" else loss

    def configure_optimizers(self):
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        adam = torch.optim.Adam(self.parameters(), lr=1e-2)
        return {
            "optimizer": adam,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(adam, 2, 0.5), "interval": "step"},
        }

    def train_dataloader(self):
        return DataLoader(data(), 8)


class Counting(Template):
    """Counts its own hooks."""

    def _count(self, name):
        self.hooks[name] = self.hooks.get(name, 0) + 1

    def on_before_backward(self, loss):
        self._count("on_before_backward")
        self.last_loss = float(loss)

    def on_after_backward(self):
        self._count("on_after_backward")

    def on_before_optimizer_step(self, optimizer):
        self._count("on_before_optimizer_step")

    def on_before_zero_grad(self, optimizer):
        self._count("on_before_zero_grad")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self._count("on_train_batch_end")

    def backward(self, loss, *args, **kwargs):
        self._count("backward")
        loss.backward(*args, **kwargs)


class PartlyFrozen(Template):
    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)


class Penalised(Template):
    """A loss with a weight penalty and an auxiliary head, which both bypass the last layers."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[:4](x)
        loss = F.cross_entropy(self.net[4:](hidden), y) + 0.1 * self.aux(hidden).square().mean()
        return loss + 1e-3 * sum(p.square().sum() for p in self.parameters())


class Teacher(Template):
    """An averaged copy of the network, moved inside training_step, gives the targets."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(6, 3).requires_grad_(False)
        self.student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(0.1 * self.student[2].weight[:, :6])
            target = self.teacher(x)
        return F.mse_loss(self.student(x), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


class Manual(Template):
    """Accumulates over two batches by hand, clips by hand, steps its scheduler by hand."""

    automatic_optimization = False

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx) / 2
        self.manual_backward(loss)
        if batch_idx % 2:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class TwoOptimizers(Template):
    """Two optimizers over all weights, each taking a step on the same gradients."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        for optimizer in self.optimizers():
            optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2), torch.optim.SGD(self.parameters(), lr=0.1)


class GAN(L.LightningModule):
    """Lightning's own example: two optimizers, toggled, two backward calls with an optimizer step between them."""

    def __init__(self, style="plain"):
        super().__init__()
        self.automatic_optimization = False
        self.style = style
        first = nn.Linear(4, 8, bias=False)
        self.generator = nn.Sequential(first, nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 6), nn.Tanh())
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        real, _ = batch
        g_opt, d_opt = self.optimizers()
        z = torch.randn(len(real), 4)
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        bce = F.binary_cross_entropy_with_logits

        self.toggle_optimizer(g_opt)
        fake = self.generator(z)
        g_loss = bce(self.discriminator(fake), ones)
        g_opt.zero_grad()
        self.manual_backward(g_loss)
        g_opt.step()
        self.untoggle_optimizer(g_opt)

        self.toggle_optimizer(d_opt)
        # the old fakes, or new ones from the generator that has just moved
        fake = fake if self.style == "plain" else self.generator(z)
        d_loss = 0.5 * (bce(self.discriminator(real), ones) + bce(self.discriminator(fake.detach()), zeros))
        d_opt.zero_grad()
        self.manual_backward(d_loss)
        d_opt.step()
        self.untoggle_optimizer(d_opt)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss})

    def configure_optimizers(self):
        # Not Adam: where real and fake cancel to rounding, its first step would be a full one of either sign.
        return (
            torch.optim.SGD(self.generator.parameters(), lr=0.1, momentum=0.5),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.1, momentum=0.5),
        )

    def train_dataloader(self):
        return DataLoader(data(), 8)


def data(n: int = 44, seed: int = 0) -> Dataset:
    """Two features decide the class; 44 samples leave a last batch of 4."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())
