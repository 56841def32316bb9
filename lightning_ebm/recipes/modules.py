"""LightningModules of the recipes, as anyone would write them. No training step knows how weights will be trained."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from torch import OutOfMemoryError, Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

import lightning_ebm as ebm
from lightning_ebm.recipes.arrays import ArrayData, Batch

Schedule = Literal["constant", "cosine", "warmup-cosine"]


def warmup_cosine(step: int, total: int, peak: float = 1.1, warmup: float = 0.1, end: float = 0.1) -> float:
    """Factor on the learning rate: 1 to `peak` in the first tenth, then half a cosine down to `end`."""
    rising = warmup * total
    if step < rising:
        return 1 + (peak - 1) * step / rising
    fraction = min(1.0, (step - rising) / max(1.0, total - rising))
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def cosine(step: int, total: int) -> float:
    """Factor on the learning rate: half a cosine from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


SCHEDULES: dict[str, Callable[[int, int], float]] = {"cosine": cosine, "warmup-cosine": warmup_cosine}


class _Trained(L.LightningModule):
    """What both modules share: an optimizer from outside, and a schedule by batches."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        layer_rates: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.optimizer, self.schedule, self.layer_rates = net, optimizer, schedule, layer_rates

    def forward(self, x: Tensor) -> Tensor:
        """The network's output; a batch that does not fit its layers is told in words."""
        try:
            output: Tensor = self.net(x)
        except OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            raise MisconfigurationException(
                f"{type(self.net).__name__} does not take a batch of inputs of shape {tuple(x.shape)}: {error}."
                " Give its first layer, under --model.net, the size that the data have, or take other data."
            ) from error
        return output

    def configure_optimizers(self) -> Any:
        parameters = self.parameters() if self.layer_rates is None else self._groups()
        try:
            optimizer: Optimizer = self.optimizer(parameters)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"The optimizer could not be built: {error}") from error
        if self.schedule == "constant":
            return optimizer
        total, factor = int(self.trainer.estimated_stepping_batches), SCHEDULES[self.schedule]
        scheduler = LambdaLR(optimizer, lambda step: factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _groups(self) -> list[dict[str, Any]]:
        """A group of parameters for each module that has some of its own, in the order of the network."""
        rates = self.layer_rates or ()
        own = [list(module.parameters(recurse=False)) for module in self.modules()]
        layers = [parameters for parameters in own if parameters]
        if len(layers) != len(rates):
            raise MisconfigurationException(
                f"layer_rates has {len(rates)} entries, and {len(layers)} modules have parameters."
            )
        return [{"params": parameters, "lr": rate} for parameters, rate in zip(layers, rates, strict=True)]


class Classifier(_Trained):
    """Classifies with any network from inputs to one number a class.

    Args:
        net: ``(B, ...)`` to ``(B, classes)``.
        loss: "cross-entropy"; or "squared-error", 1/2 |output - one-hot label|^2, the mean over the batch.
        optimizer: of the weights.
        schedule: of its learning rate: constant; "cosine", to 0; "warmup-cosine", up by a tenth for a tenth of the
            batches, then a cosine to a tenth.
        classes: how many.
        layer_rates: a learning rate for each layer with weights, from the input up, instead of one for all.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Literal["cross-entropy", "squared-error"] = "cross-entropy",
        optimizer: OptimizerCallable = lambda p: Adam(p, lr=1e-3),
        schedule: Schedule = "constant",
        classes: int = 10,
        layer_rates: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(net, optimizer, schedule, layer_rates)
        self.loss, self.classes = loss, classes
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)``."""
        output = super().forward(x)
        if output.shape[1:] != (self.classes,):
            raise MisconfigurationException(
                f"{type(self.net).__name__} gives outputs of shape {tuple(output.shape)}, and one number for each of"
                f" {self.classes} classes was expected. Change its last layer, under --model.net, or --model.classes."
            )
        return output

    def on_fit_start(self) -> None:
        """Labels without an output are told before the first batch, which may be on a device that cannot tell."""
        data = getattr(self.trainer, "datamodule", None)
        labels = data.classes if isinstance(data, ArrayData) else self.classes
        if labels > self.classes:
            raise MisconfigurationException(
                f"The data have {labels} classes, and --model.classes is {self.classes}: the others have no output."
                f" Give the network {labels} outputs, under --model.net, and leave --model.classes at {labels}."
            )

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
        super().__init__(net, optimizer, schedule)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log(
            "val/loss", F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten()), prog_bar=True, sync_dist=True
        )


class Generator(_Trained):
    """Predicts images from latents that nobody gives: unsupervised, where states relax.

    The loss is 1/2 |image - net(z)|^2 with z = 0, the mean over the batch. With a state at ``net.0``, an `nn.Identity`,
    predictive coding infers z under a standard normal prior, and hidden states with it; weights follow. Under the stock
    strategy z stays 0 and only the mean image is learned. Validation infers as well, whatever the strategy.

    Logged: ``val/loss``, the same loss at inferred states; ``val/lower_half``, the squared error of a pixel of the
    lower half, inferred from the upper half, and ``val/lower_half_share``, its share of what the mean image leaves.

    Args:
        widths: of the latent, of the hidden layers, and the number of pixels, an even one.
        optimizer: of the weights.
        schedule: as in `Classifier`.
    """

    mean: Tensor

    def __init__(
        self,
        widths: tuple[int, ...] = (8, 64, 64, 64),
        optimizer: OptimizerCallable = lambda p: Adam(p, lr=1e-3),
        schedule: Schedule = "constant",
    ) -> None:
        layers: list[nn.Module] = [nn.Identity()]
        for below, above in pairwise(widths):
            layers += [nn.Linear(below, above), nn.Tanh()]
        super().__init__(nn.Sequential(*layers[:-1], nn.Sigmoid()), optimizer, schedule)
        self.latent, self.upper = widths[0], widths[-1] // 2
        self.register_buffer("mean", torch.zeros(widths[-1]))

    def on_fit_start(self) -> None:
        """The mean training image, to compare with."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ArrayData):
            train = data.parts["train"]
            images = torch.stack([train[k][0] for k in range(len(train))])
            self.mean = images.flatten(1).mean(0).to(self.mean)

    def _loss(self, image: Tensor) -> Tensor:
        output = self(image.new_zeros(len(image), self.latent))
        if output.shape != image.shape:
            raise MisconfigurationException(
                f"The data have {image.shape[1]} pixels, and --model.widths ends in {output.shape[1]}: give it as many."
            )
        loss: Tensor = 0.5 * (output - image).square().sum(1).mean()
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch[0].flatten(1))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        image = batch[0].flatten(1)
        last = len(self.net) - 1  # type: ignore[arg-type]  # a Sequential
        learner = ebm.Learner(self.net, "predictive-coding", layers=[str(k) for k in range(0, last, 2)])
        relaxer = ebm.QuasiNewton(100, 8, tol=1e-3)
        explained = learner.relax(lambda: self._loss(image), nudge=1.0, relaxer=relaxer)
        assert explained.loss is not None
        self.log("val/loss", explained.loss, prog_bar=True, sync_dist=True)
        seen = torch.arange(2 * self.upper, device=image.device) < self.upper
        latent = image.new_zeros(len(image), self.latent)
        filled = learner.relax(lambda: self.net(latent), clamp={str(last): (image, seen)}, relaxer=relaxer)
        error = (filled.states[str(last)] - image)[:, ~seen].square().mean()
        self.log("val/lower_half", error, sync_dist=True)
        self.log("val/lower_half_share", error / (self.mean - image)[:, ~seen].square().mean(), sync_dist=True)
