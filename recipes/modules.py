"""LightningModules of the recipes, as anyone would write them. Nothing here knows how their weights will be trained."""

import math
from typing import Any, Literal

import lightning as L
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]
Schedule = Literal["constant", "warmup-cosine"]


def warmup_cosine(step: int, total: int, peak: float = 1.1, warmup: float = 0.1, end: float = 0.1) -> float:
    """Factor on the learning rate: 1 to `peak` in the first tenth, then half a cosine down to `end`."""
    rising = warmup * total
    if step < rising:
        return 1 + (peak - 1) * step / rising
    fraction = min(1.0, (step - rising) / max(1.0, total - rising))
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * fraction))


class _Trained(L.LightningModule):
    """What both modules share: an optimizer from outside, and a schedule by optimizer steps."""

    def __init__(self, optimizer: OptimizerCallable, schedule: Schedule) -> None:
        super().__init__()
        self.optimizer, self.schedule = optimizer, schedule

    def configure_optimizers(self) -> Any:
        optimizer: Optimizer = self.optimizer(self.parameters())
        if self.schedule == "constant":
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Classifier(_Trained):
    """Classifies with any network from inputs to one number a class.

    Args:
        net: ``(B, ...)`` to ``(B, classes)``.
        loss: "cross-entropy"; or "squared-error", 1/2 |output - one-hot label|^2, the mean over the batch.
        optimizer: of the weights.
        schedule: of its learning rate: constant, or up by a tenth for a tenth of the steps, then a cosine to a tenth.
        classes: how many.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Literal["cross-entropy", "squared-error"] = "cross-entropy",
        optimizer: OptimizerCallable = lambda p: Adam(p, lr=1e-3),
        schedule: Schedule = "constant",
        classes: int = 10,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.net, self.loss, self.classes = net, loss, classes
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output

    def _loss(self, output: Tensor, y: Tensor) -> Tensor:
        if self.loss == "cross-entropy":
            return F.cross_entropy(output, y)
        target = F.one_hot(y, self.classes).to(output.dtype)
        return 0.5 * (output - target).square().sum(1).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        output = self(x)
        loss = self._loss(output, y)
        self.train_accuracy(output, y)
        self.log("train/loss", loss)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        output = self(batch[0])
        self.val_accuracy(output, batch[1])
        self.log("val/loss", self._loss(output, batch[1]), sync_dist=True)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_accuracy(self(batch[0]), batch[1])
        self.log("test/accuracy", self.test_accuracy)


class NextToken(_Trained):
    """Predicts the next token; losses in nats a token.

    Args:
        net: tokens ``(B, T)`` to logits ``(B, T, V)``.
        optimizer: of the weights.
        schedule: as in `Classifier`.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = lambda p: Adam(p, lr=1e-3),
        schedule: Schedule = "constant",
    ) -> None:
        super().__init__(optimizer, schedule)
        self.net = net

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.net(tokens)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log(
            "val/loss", F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten()), prog_bar=True, sync_dist=True
        )
