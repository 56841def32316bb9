"""A LightningModule and its data, as anyone would write them. Nothing here knows how the weights will be trained."""

from itertools import pairwise

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]


class DigitsClassifier(L.LightningModule):
    """A multilayer perceptron for 8 x 8 images: 64, hidden units, 10.

    Args:
        hidden: units of each hidden layer.
        lr: learning rate of Adam.
    """

    def __init__(self, hidden: tuple[int, ...] = (128,), lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = (64, *hidden)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
        self.lr = lr
        self.train_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss)
        self.log("train/accuracy", self.train_accuracy, prog_bar=True)
        return loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test/accuracy", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Digits(L.LightningDataModule):
    """The 1797 handwritten digits that come with scikit-learn, a fifth of them for testing.

    Args:
        batch_size: of training batches.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
        train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in parts)
        self.train = TensorDataset(train_x.float(), train_y)
        self.test = TensorDataset(test_x.float(), test_y)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, 512)
