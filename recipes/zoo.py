"""LightningModules of many shapes, each as its author would write it. Nothing here knows how weights will be trained.

Small enough that a step takes milliseconds on a CPU; the data are made here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos import Transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ebm.recipes.nets import Attention

Batch = list[Tensor]


def loader(*tensors: Tensor, batch_size: int = 32) -> DataLoader[tuple[Tensor, ...]]:
    """Batches in a fixed order."""
    return DataLoader(TensorDataset(*tensors), batch_size)


def images(n: int = 256) -> tuple[Tensor, Tensor]:
    """Images 1 x 8 x 8 with a bright quadrant, which is the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (n,), generator=generator)
    x = 0.5 * torch.randn(n, 1, 8, 8, generator=generator)
    for quadrant in range(4):
        row, column = 4 * (quadrant // 2), 4 * (quadrant % 2)
        x[labels == quadrant, :, row : row + 4, column : column + 4] += 0.7
    return x, labels


def text(n: int = 256, length: int = 12, vocabulary: int = 16) -> Tensor:
    """Sequences that count upwards in steps of 1 to 3."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(vocabulary, (n, 1), generator=generator)
    stride = torch.randint(1, 4, (n, 1), generator=generator)
    return (start + stride * torch.arange(length + 1)) % vocabulary


class Adam(L.LightningModule):
    """The optimizer that most of them share."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class BatchNormMLP(Adam):
    """A perceptron with BatchNorm and dropout, and metric objects updated inside training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)),
        )
        self.accuracy = MulticlassAccuracy(4)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.log("train/accuracy", self.accuracy)
        return F.cross_entropy(logits, y)

    def train_dataloader(self) -> Any:
        return loader(*images())


class Block(nn.Module):
    """A residual block, with the one ReLU of its network."""

    def __init__(self, channels: int, relu: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        result: Tensor = self.relu(out)
        return result


class ResNet(Adam):
    """Residual blocks that share one in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, self.relu), Block(8, self.relu))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.stem(x))))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 2).amax(-1).mean(-1))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        return loader(*images())


class Autoencoder(Adam):
    """Convolutions down and up again, ending in a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        down = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.GELU())
        up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2), nn.GELU(), nn.ConvTranspose2d(8, 1, 2, 2), nn.Sigmoid())
        self.encoder, self.decoder = down, up

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = batch[0].sigmoid()
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def train_dataloader(self) -> Any:
        return loader(*images())


class VisionTransformer(Adam):
    """Patches, a class token, torch's own encoder layers, whose activations are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(0.1 * torch.randn(1, 17, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = self.patches(batch[0]).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return F.cross_entropy(self.head(self.encoder(x)[:, 0]), batch[1])

    def train_dataloader(self) -> Any:
        return loader(*images())


class LanguageModel(Adam):
    """A causal language model on characters, with tied embeddings."""

    def __init__(self, vocabulary: int = 16, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(12, width))
        self.blocks = nn.ModuleList([Attention(width, 4) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens = batch[0]
        x = self.embedding(tokens[:, :-1]) + self.position
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())

    def train_dataloader(self) -> Any:
        return loader(text())


class LSTMClassifier(Adam):
    """Rows of an image as a sequence; the last hidden state decides."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 4)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        _, (hidden, _) = self.lstm(batch[0].squeeze(1))
        return F.cross_entropy(self.head(hidden[-1]), batch[1])

    def train_dataloader(self) -> Any:
        return loader(*images())


class Siamese(Adam):
    """One encoder called twice in a step, and a contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        distance = F.pairwise_distance(self.encoder(x), self.encoder(x.flip(0)))
        same = (y == y.flip(0)).float()
        return (same * distance.square() + (1 - same) * (1 - distance).clamp_min(0).square()).mean()

    def train_dataloader(self) -> Any:
        return loader(*images())


class GAN(L.LightningModule):
    """Two optimizers under manual optimization, a backward call for each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.LeakyReLU(0.2), nn.Linear(32, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        real = batch[0].flatten(1)
        generator, discriminator = self.optimizers()  # type: ignore[attr-defined]
        fake = self.generator(torch.randn(len(real), 8, device=self.device))
        self.toggle_optimizer(discriminator)
        loss = F.softplus(-self.discriminator(real)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        discriminator.zero_grad()
        self.manual_backward(loss)
        discriminator.step()
        self.untoggle_optimizer(discriminator)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(self.generator(torch.randn(len(real), 8)))).mean())
        generator.step()
        self.untoggle_optimizer(generator)
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), 3e-3) for net in (self.generator, self.discriminator)]

    def train_dataloader(self) -> Any:
        return loader(*images())


class DemoTransformer(Adam):
    """Lightning's demo, an encoder-decoder Transformer; only its data are not downloaded."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=16, ninp=16, nhead=2, nhid=32, nlayers=1, dropout=0.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens = batch[0]
        output = self.model(tokens[:, :-1], tokens[:, 1:])
        return F.nll_loss(output, tokens[:, 1:].flatten())

    def train_dataloader(self) -> Any:
        return loader(text())


ZOO: dict[str, Callable[[], L.LightningModule]] = {
    "BatchNorm MLP, metrics in the step": BatchNormMLP,
    "ResNet, one shared in-place ReLU": ResNet,
    "convolutional autoencoder": Autoencoder,
    "Vision Transformer": VisionTransformer,
    "causal language model, tied": LanguageModel,
    "LSTM classifier": LSTMClassifier,
    "Siamese network": Siamese,
    "GAN, manual optimization": GAN,
    "lightning.pytorch.demos Transformer": DemoTransformer,
}


def losses(values: list[float]) -> Iterator[float]:
    """Mean of the first and of the last five."""
    yield sum(values[:5]) / 5
    yield sum(values[-5:]) / 5
