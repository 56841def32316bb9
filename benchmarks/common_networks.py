"""Networks that people bring: ReLU, pooling, BatchNorm, residual streams, attention; and something to train them on."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from networks import Block, mlp
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A network, its loss, and batches of a task that can be learned.

    Args:
        make: makes one, freshly initialised.
        batch: of so many samples, drawn from the default generator: inputs and targets.
        loss: of outputs and targets, a mean over the samples.
        size: samples a batch.
        lr: of Adam, for the steps of training before the trained network is measured.
        layers: as in `ebm.Learner`.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    size: int = 64
    lr: float = 1e-3
    layers: type[nn.Module] | None = None


def images(channels: int, side: int) -> Callable[[int], Batch]:
    """Ten smooth patterns, shifted, scaled and under noise; ``(B, C, H, W)`` and labels."""
    drawn = torch.Generator().manual_seed(1)
    coarse = torch.randn(10, channels, max(side // 4, 2), max(side // 4, 2), generator=drawn)
    patterns = F.interpolate(coarse, size=(side, side), mode="bilinear")

    def batch(size: int) -> Batch:
        labels = torch.randint(0, 10, (size,))
        shifts = torch.randint(-2, 3, (size,)).tolist()
        rolled = torch.stack([patterns[c].roll(s, -1) for c, s in zip(labels.tolist(), shifts, strict=True)])
        return rolled * torch.empty(size, 1, 1, 1).uniform_(0.2, 0.6) + torch.randn(rolled.shape), labels

    return batch


def flat(size: int) -> Batch:
    """`images` of 28 x 28 pixels as vectors."""
    x, y = _GRAY(size)
    return x.flatten(1), y


def text(length: int, letters: int = 32) -> Callable[[int], Batch]:
    """A Markov chain of two steps of memory; ``(B, T)`` letters and the ones that follow them."""
    drawn = torch.Generator().manual_seed(2)
    chances = torch.softmax(3 * torch.randn(letters, letters, letters, generator=drawn), -1)

    def batch(size: int) -> Batch:
        line = torch.randint(0, letters, (size, 2))
        for _ in range(length - 2):
            line = torch.cat([line, torch.multinomial(chances[line[:, -2], line[:, -1]], 1)], 1)
        return line[:, :-1], line[:, 1:]

    return batch


def denoising(size: int) -> Batch:
    """Images under noise and the images; ``(B, 1, 16, 16)`` both."""
    x, _ = _SMALL(size)
    return x + 0.5 * torch.randn_like(x), x


class Residual(nn.Module):
    """h <- h + W rho(h) / depth, as depth-mu parametrises it."""

    def __init__(self, depth: int, width: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(784, width), nn.Linear(width, 10)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.activations = nn.ModuleList(nn.ReLU() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 784)`` to ``(B, 10)``."""
        h = self.first(x)
        for layer, activation in zip(self.inner, self.activations, strict=True):
            h = h + layer(activation(h)) / len(self.inner) ** 0.5
        logits: Tensor = self.last(h)
        return logits


class BasicBlock(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        same = a == b and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, a, H, W)`` to ``(B, b, H / stride, W / stride)``."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


def resnet8(width: int = 16) -> nn.Sequential:
    """Three basic blocks behind a stem."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 4 * width, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def vgg(channels: tuple[int, ...], pools: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    """Convolutions with an activation each, maximum pooling behind some, a linear read-out."""
    layers: list[nn.Module] = []
    for index, (a, b) in enumerate(itertools.pairwise((3, *channels))):
        layers += [nn.Conv2d(a, b, 3, padding=1), activation()]
        layers += [nn.MaxPool2d(2)] if index in pools else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * (32 // 2 ** len(pools)) ** 2, 10))


class UNet(nn.Module):
    """Two levels down, two up, BatchNorm, a skip at each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def double(a: int, b: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1),
                nn.BatchNorm2d(b), nn.ReLU(),
            )  # fmt: skip

        self.down1, self.down2, self.middle = double(1, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.join2, self.join1 = double(4 * width, 2 * width), double(2 * width, width)
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 1, H, W)`` to the same."""
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        middle = self.middle(F.max_pool2d(two, 2))
        two = self.join2(torch.cat([self.up2(middle), two], 1))
        out: Tensor = self.last(self.join1(torch.cat([self.up1(two), one], 1)))
        return out


class CausalBlock(Block):
    """`Block` that looks back only."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to the same."""
        q, k, v = self.project(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        changed: Tensor = x + self.down(self.activation(self.up(self.norms[1](x))))
        return changed


class GPT(nn.Module):
    """A character model."""

    def __init__(self, blocks: int = 6, width: int = 64, letters: int = 32, length: int = 32) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(CausalBlock(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T)`` to ``(B, T, letters)``."""
        logits: Tensor = self.head(self.norm(self.blocks(self.letters(x) + self.places[: x.shape[1]])))
        return logits


class ViT(nn.Module):
    """Patches of 4 x 4 of a 32 x 32 image."""

    def __init__(self, blocks: int = 4, width: int = 64) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, 32, 32)`` to ``(B, 10)``."""
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(h)).mean(1))
        return logits


def next_letter(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, a mean over samples and tokens."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def contrast(out: Tensor, y: Tensor) -> Tensor:
    """In-batch contrastive loss of the two halves of a batch, as pairs; the labels are not used."""
    a, b = F.normalize(out, dim=1).chunk(2)
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


def views(size: int) -> Batch:
    """Two noisy views of each image, one half of the batch each."""
    x, y = flat(size // 2)
    return torch.cat([x, x + 0.3 * torch.randn_like(x)]), y


_GRAY, _SMALL, _COLOUR = images(1, 28), images(1, 16), images(3, 32)
_CE = F.cross_entropy

CASES: dict[str, Case] = {
    "tanh MLP 784-256x3-10": Case(lambda: mlp(784, 256, 256, 256, 10), flat, _CE),
    "ReLU MLP 784-256x3-10": Case(lambda: mlp(784, 256, 256, 256, 10, activation=nn.ReLU), flat, _CE),
    "VGG5 ReLU, max pooling": Case(lambda: vgg((16, 32, 64, 64), (0, 1, 2, 3), nn.ReLU), _COLOUR, _CE, 16),
    "VGG7 GELU, max pooling": Case(lambda: vgg((16, 16, 32, 32, 64, 64), (1, 3, 5), nn.GELU), _COLOUR, _CE, 16),
    "ResNet8, BatchNorm": Case(resnet8, _COLOUR, _CE, 16),
    "residual MLP, depth 32": Case(lambda: Residual(32), flat, _CE),
    "residual MLP, depth 128": Case(lambda: Residual(128), flat, _CE),
    "U-Net, BatchNorm": Case(UNet, denoising, F.mse_loss, 16),
    "GPT, 6 blocks": Case(GPT, text(33), next_letter, 8),
    "GPT, 6 blocks as layers": Case(GPT, text(33), next_letter, 8, layers=CausalBlock),
    "ViT, 4 blocks": Case(ViT, _COLOUR, _CE, 8),
    "ViT, 4 blocks as layers": Case(ViT, _COLOUR, _CE, 8, layers=Block),
    "contrastive tanh MLP": Case(lambda: mlp(784, 64, 64, 32), views, contrast, 32),
    "BatchNorm1d MLP, batch 8": Case(
        lambda: nn.Sequential(
            nn.Linear(784, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh(),
            nn.Linear(64, 10),
        ), flat, _CE, 8,
    ),
}  # fmt: skip


def trained(case: Case, steps: int) -> nn.Module:
    """The network after so many steps of backprop with Adam."""
    torch.manual_seed(0)
    net = case.make()
    optimizer = torch.optim.Adam(net.parameters(), case.lr)
    for _ in range(steps):
        x, y = case.batch(case.size)
        optimizer.zero_grad()
        case.loss(net(x), y).backward()
        optimizer.step()
    return net
