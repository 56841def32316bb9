"""The networks that are timed. One more is one more line of `NETS`."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Net:
    """A network, and what it is trained on.

    Args:
        make: makes one.
        shape: of the batch, ``(B, ...)``; labels are 10 classes.
        steps: Euler steps of predictive coding.
        lr: their size.
        widths: of a chain of linear and tanh layers, which others can build and which is written out by hand.
        data: so many samples and their labels; noise if not given.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    steps: int = 20
    lr: float = 0.1
    widths: tuple[int, ...] | None = None
    data: Callable[[int], tuple[Tensor, Tensor]] | None = None

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels."""
        if self.data is not None:
            return self.data(self.shape[0])
        return torch.randn(self.shape), torch.randint(0, 10, self.shape[:1])


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """A chain of linear layers and activations that ends in a linear one."""
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def chain(batch: int, *widths: int, steps: int = 20) -> Net:
    """A tanh MLP."""
    return Net(lambda: mlp(*widths), (batch, widths[0]), steps, widths=widths)


def conv_net(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Four convolutions on 32 x 32 color images."""
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(a, b, 3, padding=1), activation(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


class Block(nn.Module):
    """Self-attention and a two-layer MLP, each normalized before and added after."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.activation = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, width)`` to the same."""
        parts = self.project(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim(2, 0).transpose(2, 3)
        x = x + self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        changed: Tensor = x + self.down(self.activation(self.up(self.norms[1](x))))
        return changed


NETS: dict[str, Net] = {
    "784-256x3-10, batch 64": chain(64, 784, 256, 256, 256, 10),
    "784-512x4-10, batch 256": chain(256, 784, 512, 512, 512, 512, 10),
    "20 layers of 128, batch 64": chain(64, 784, *[128] * 20, 10),
    "conv 32-64-128-128, batch 16": Net(conv_net, (16, 3, 32, 32), 8, 0.02),
}
