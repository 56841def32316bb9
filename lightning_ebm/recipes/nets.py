"""Networks of published experiments, as plain modules. Nothing here knows how they will be trained."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, type[nn.Module] | None] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "clip": None,
}


def activation(name: str) -> nn.Module:
    """A nonlinearity by name; "clip" is min(max(a, 0), 1), the hard sigmoid of equilibrium propagation's papers."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}: expected one of {', '.join(ACTIVATIONS)}.")
    made = ACTIVATIONS[name]
    return nn.Hardtanh(0, 1) if made is None else made()


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Refuses what torch makes an empty layer of, or has no words for."""
    for name, given in sizes.items():
        if not all(size >= 1 for size in (given if isinstance(given, Sequence) else [given])):
            raise ValueError(f"{name}={given}: expected whole numbers of at least 1.")


class MLP(nn.Sequential):
    """A multilayer perceptron; inputs are flattened.

    Args:
        widths: inputs, units of each hidden layer, outputs.
        activation: relu, leaky-relu, gelu, tanh, sigmoid, hardsigmoid or clip.
        output_activation: the same for the outputs, which are linear without one.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (784, 128, 128, 128, 10),
        activation: str = "relu",
        output_activation: str | None = None,
    ) -> None:
        check_sizes(widths=widths)
        if len(widths) < 2:
            raise ValueError(f"widths={widths}: expected the inputs, units of each hidden layer, and the outputs.")
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), _activation(activation)]
        layers.pop()
        if output_activation is not None:
            layers.append(_activation(output_activation))
        super().__init__(*layers)


_activation = activation


class MNIST1DConv(nn.Sequential):
    """The convolutional net of the MNIST-1D paper: three layers of 25 channels, stride 2, and a linear read-out.

    Args:
        channels: of every layer.
    """

    def __init__(self, channels: int = 25) -> None:
        check_sizes(channels=channels)
        super().__init__(
            nn.Conv1d(1, channels, 5, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5 * channels, 10),
        )


class ConvNet(nn.Sequential):
    """Blocks of a 3 x 3 convolution, an activation and pooling by two, and a linear read-out into ten classes.

    Args:
        channels: of the images, and of each block.
        side: of the images, in pixels.
        activation: as in `MLP`.
        pool: "max" or "mean".
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (1, 16, 32, 32),
        side: int = 28,
        activation: str = "relu",
        pool: Literal["max", "mean"] = "max",
    ) -> None:
        check_sizes(channels=channels, side=side)
        pooled = nn.MaxPool2d if pool == "max" else nn.AvgPool2d
        blocks = [
            nn.Sequential(nn.Conv2d(c, d, 3, padding=1), _activation(activation), pooled(2))
            for c, d in pairwise(channels)
        ]
        left = side // 2 ** len(blocks)
        if not left:
            raise ValueError(f"side={side}: {len(blocks)} poolings by two leave no pixel. Take fewer channels=...")
        super().__init__(*blocks, nn.Flatten(), nn.Linear(channels[-1] * left * left, 10))


class VGG5(ConvNet):
    """Four blocks of convolution, activation and pooling, and a linear read-out, for 32 x 32 color images.

    Blocks are called "0" to "3": ``layers: [net.0, net.1, net.2, net.3]`` puts the states behind the pooling, as the
    published predictive coding networks have them.

    Args:
        channels: of the four blocks.
        activation: as in `MLP`.
    """

    def __init__(self, channels: tuple[int, ...] = (128, 256, 512, 512), activation: str = "gelu") -> None:
        super().__init__((3, *channels), 32, activation)


class HopfieldConv(nn.Sequential):
    """Four blocks of convolution, pooling and hard sigmoid, and a linear read-out, for 32 x 32 color images.

    Pooling comes before the activation, so that a state sits behind both, as in the convolutional Hopfield networks of
    equilibrium propagation: the energy's term of a block is G(x_l) - <x_l, pool(w * x_{l-1})>. The last convolution has
    no padding, so that one pixel is left to read out.

    Args:
        channels: of the four blocks.
    """

    def __init__(self, channels: tuple[int, ...] = (128, 256, 512, 512)) -> None:
        check_sizes(channels=channels)
        layers: list[nn.Module] = []
        for index, (c, d) in enumerate(pairwise((3, *channels))):
            padding = 1 if index < len(channels) - 1 else 0
            layers += [nn.Conv2d(c, d, 3, padding=padding), nn.MaxPool2d(2), _activation("clip")]
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels[-1], 10))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        same = stride == 1 and inputs == outputs
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu(y + self.shortcut(x))
        return result


class ResNet(nn.Sequential):
    """A stem without pooling, stages of basic blocks with BatchNorm, a linear read-out into ten classes.

    Args:
        inputs: channels of the images.
        width: channels of the first stage; doubled at each of the others.
        blocks: how many each stage has.
    """

    def __init__(self, inputs: int = 1, width: int = 16, blocks: tuple[int, ...] = (1, 1, 1)) -> None:
        check_sizes(inputs=inputs, width=width, blocks=blocks)
        stem = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages, before = [], width
        for stage, count in enumerate(blocks):
            channels = width * 2**stage
            first = BasicBlock(before, channels, 1 if stage == 0 else 2)
            stages.append(nn.Sequential(first, *[BasicBlock(channels, channels, 1) for _ in range(count - 1)]))
            before = channels
        super().__init__(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class ResNet18(ResNet):
    """ResNet-18 for 32 x 32 color images: four stages of two blocks.

    Args:
        width: channels of the first stage; doubled at each of the others.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__(3, width, (2, 2, 2, 2))


class Attention(nn.Module):
    """A pre-norm block of attention, causal or not, and a perceptron."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        check_sizes(width=width, heads=heads)
        if width % heads:
            raise ValueError(f"width={width}: expected a multiple of heads={heads}, which share it.")
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class CharTransformer(nn.Module):
    """A causal Transformer over characters: ``(B, T)`` to logits ``(B, T, vocabulary)``.

    Args:
        vocabulary: number of characters.
        context: the longest T.
        width: of the residual stream.
        depth: blocks.
        heads: of attention.
    """

    def __init__(
        self, vocabulary: int = 65, context: int = 64, width: int = 64, depth: int = 2, heads: int = 4
    ) -> None:
        check_sizes(vocabulary=vocabulary, context=context, width=width, depth=depth)
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(nn.init.normal_(self.embedding.weight.new_empty(context, width), std=0.02))
        self.blocks = nn.ModuleList([Attention(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class ViT(nn.Module):
    """A Transformer over patches: ``(B, C, H, W)`` to logits ``(B, 10)``, read off the mean over patches.

    Args:
        inputs: channels C of the images.
        side: H and W, in pixels.
        patch: the same of a patch.
        width: of the residual stream.
        depth: blocks.
        heads: of attention.
    """

    def __init__(
        self, inputs: int = 1, side: int = 28, patch: int = 7, width: int = 32, depth: int = 4, heads: int = 4
    ) -> None:
        check_sizes(inputs=inputs, side=side, patch=patch, width=width, depth=depth)
        super().__init__()
        self.patches = nn.Conv2d(inputs, width, patch, patch)
        self.position = nn.Parameter(
            nn.init.normal_(self.patches.weight.new_empty((side // patch) ** 2, width), 0, 0.02)
        )
        self.blocks = nn.ModuleList([Attention(width, heads, causal=False) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class HopfieldMNIST(nn.Sequential):
    """Two blocks of a 5 x 5 convolution, pooling and hard sigmoid, and a linear read-out, for 28 x 28 gray images.

    Args:
        channels: of the two blocks.
        output_activation: of the read-out, as in `MLP`; with "clip" the output is a state like the others.
    """

    def __init__(self, channels: tuple[int, int] = (32, 64), output_activation: str | None = "clip") -> None:
        check_sizes(channels=channels)
        layers: list[nn.Module] = []
        for c, d in pairwise((1, *channels)):
            layers += [nn.Conv2d(c, d, 5), nn.MaxPool2d(2), _activation("clip")]
        layers += [nn.Flatten(), nn.Linear(16 * channels[-1], 10)]
        super().__init__(*layers, *([] if output_activation is None else [_activation(output_activation)]))
