"""Predictive coding as it was published: networks, relaxations, weight optimizers, and where each number comes from.

`checked` settings were read in the authors' code, in the file named. The others are written as we remember them.
Everything is trained on the images given here, whatever the original was trained on; what else differs is in `note`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm

Optimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Setting:
    """One published way to relax and to train.

    Attributes:
        name: a handle.
        network: makes it for a number of inputs.
        algorithm: energy, nudge, relaxer.
        optimizer: of the weights.
        batch_size: B.
        loss: of outputs and labels, summed over the batch.
        source: paper, repository and file.
        checked: whether the numbers were read there.
        note: what differs here.
        layers: where states sit; None is at activations, so that states are rates.
        normalize: images in [0, 1] become (image - shift) / scale.
    """

    name: str
    network: Callable[[int], nn.Module]
    algorithm: ebm.Algorithm
    optimizer: Optimizer
    batch_size: int
    loss: Callable[[Tensor, Tensor], Tensor]
    source: str
    checked: bool = True
    note: str = ""
    layers: Any = None
    normalize: tuple[float, float] = (0.0, 1.0)


def mlp(
    *widths: int, act: Callable[[], nn.Module], first: bool = False, bias: bool = True
) -> Callable[[int], nn.Module]:
    """inputs-widths-10; `first` applies the activation to the images as well."""

    def make(inputs: int) -> nn.Module:
        layers: list[nn.Module] = [act()] if first else []
        for fan_in, fan_out in pairwise((inputs, *widths)):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), act()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 10, bias=bias))

    return make


def xavier(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """The same network with Glorot's uniform weights."""

    def initialized(inputs: int) -> nn.Module:
        network = make(inputs)
        for module in network:  # type: ignore[attr-defined]
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        return network

    return initialized


class Residual(nn.Module):
    """x + a W relu(x), with a fixed scale a and W ~ N(0, 1)."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.linear = unit_normal(width, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * F.linear(torch.relu(x), self.linear.weight)


class Scaled(nn.Module):
    """a W rho(x)."""

    def __init__(self, fan_in: int, fan_out: int, scale: float, rectified: bool) -> None:
        super().__init__()
        self.linear = unit_normal(fan_in, fan_out)
        self.scale, self.rectified = scale, rectified

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(torch.relu(x) if self.rectified else x, self.linear.weight)


def unit_normal(fan_in: int, fan_out: int) -> nn.Linear:
    """Weights N(0, 1), no bias."""
    linear = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(linear.weight)
    return linear


def mu_residual(width: int, depth: int) -> Callable[[int], nn.Module]:
    """The residual network of muPC, in its parameterisation."""

    def make(inputs: int) -> nn.Module:
        blocks = [Residual(width, 1 / math.sqrt(width * depth)) for _ in range(depth - 2)]
        return nn.Sequential(
            Scaled(inputs, width, 1 / math.sqrt(inputs), False), *blocks, Scaled(width, 10, 1 / width, True)
        )

    return make


def small_cnn(inputs: int) -> nn.Module:
    """The convolutional network of Torch2PC's example, for square images."""
    side = math.isqrt(inputs)
    end = (side - 2) // 2 - 2
    return nn.Sequential(
        nn.Sequential(nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, 10, 3), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(10, 5, 3), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(5 * end * end, 50), nn.ReLU()),
        nn.Sequential(nn.Linear(50, 30), nn.ReLU()),
        nn.Linear(30, 10),
    )


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    """1/2 |output - one-hot|^2."""
    return 0.5 * (outputs - F.one_hot(labels, 10)).square().sum()


def squared_inside(outputs: Tensor, labels: Tensor) -> Tensor:
    """1/2 |output - target|^2, targets 0.03 and 0.97."""
    return 0.5 * (outputs - (0.03 + 0.94 * F.one_hot(labels, 10))).square().sum()


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of the softmax."""
    return F.cross_entropy(outputs, labels, reduction="sum")


def adam(lr: float) -> Optimizer:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def adamw(lr: float, decay: float) -> Optimizer:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)


def sgd(lr: float, momentum: float = 0.0) -> Optimizer:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def relaxed_by(relaxer: ebm.Relaxer, nudge: float = 1.0) -> ebm.Algorithm:
    """Predictive coding with this relaxation."""
    return ebm.Algorithm(ebm.PredictiveCoding(), ebm.OneSided(nudge), relaxer)


def momentum(lr: float, steps: int, momentum: float) -> ebm.Relaxer:
    """Gradient descent with momentum on the states."""
    return ebm.StateOptimizer(torch.optim.SGD, max_steps=steps, lr=lr, momentum=momentum)


euler = ebm.GradientDescent
errors = ebm.ErrorCoordinates
HALF, CANONICAL = (0.5, 0.5), (0.1307, 0.3081)
FOUR = mlp(128, 128, 128, act=nn.GELU)

SETTINGS = [
    Setting(
        "ePC, T=5, 0.001",
        FOUR, relaxed_by(errors(5, lr=0.001, tol=0.0)), adamw(7.787e-4, 1.716e-4), 256, squared,
        "Goemaere et al. 2025, error_based_PC, configs_results/Error_CIFAR10_VGG5_ce.yaml",
        note="their setting for VGG5 on CIFAR-10 with cross-entropy, here on a perceptron with squared error",
    ),
    Setting(
        "PC tutorial, T=20, 0.01",
        mlp(256, 256, act=nn.ReLU), relaxed_by(euler(0.01, 20)), adam(1e-3), 500, squared,
        "Bogacz group, PredictiveCoding, 1_supervised_learning_pc.ipynb",
        layers=nn.Linear,
    ),
    Setting(
        "ePC, T=20, 0.1",
        FOUR, relaxed_by(errors(20, lr=0.1, tol=0.0)), adamw(7.787e-4, 1.716e-4), 256, squared,
        "Goemaere et al. 2025, within the range of their sweeps",
        checked=False,
        note="network as in the first row",
    ),
    Setting(
        "sPC, T=8, 0.0266",
        FOUR, relaxed_by(euler(0.0266221, 8)), adamw(4.209e-4, 2.681e-6), 256, squared,
        "Goemaere et al. 2025, error_based_PC, configs_results/State_CIFAR10_VGG5_mse.yaml",
        note="their setting for VGG5 on CIFAR-10, here on 784-128-128-128-10",
        normalize=HALF,
    ),
    Setting(
        "PCX cross-entropy, T=5",
        FOUR, relaxed_by(momentum(0.01828189, 5, 0.35)), adamw(2.996e-4, 3.314e-3), 128, cross_entropy,
        "Pinchetti et al. 2025, pcx, examples/discriminative_experiments/MLP/mnist/L_PC_CE_mnist.yaml",
        note="without the warm-up and decay of the weights' rate",
        normalize=HALF,
    ),
    Setting(
        "PCX squared error, T=5",
        FOUR, relaxed_by(momentum(0.02607088, 5, 0.1)), adamw(2.972e-4, 1.838e-3), 128, squared,
        "Pinchetti et al. 2025, pcx, examples/discriminative_experiments/MLP/fmnist/L_PC_SE_fmnist.yaml",
        note="their setting for Fashion-MNIST",
        normalize=HALF,
    ),
    Setting(
        "PRECO, T=5, 0.5",
        mlp(32, 16, act=nn.Tanh, first=True), relaxed_by(euler(0.5, 5)), adam(1e-4), 200, squared,
        "van Zwol et al. 2024, PRECO, example_notebooks/PCN_MNIST.ipynb",
        note="gradients not clipped",
        layers=nn.Linear, normalize=CANONICAL,
    ),
    Setting(
        "Torch2PC strict, T=20, 0.1",
        small_cnn, relaxed_by(euler(0.1, 20), 1 / 300), adam(2e-3), 300, cross_entropy,
        "Rosenbaum 2022, Torch2PC, Example1.ipynb",
        note="the loss is a batch mean, so lambda = 1/300; weights read at the feed-forward activities there",
        layers=["0", "1", "2", "3"],
    ),
    Setting(
        "PC-Nudge, T=50, 0.3",
        mlp(128, 64, act=nn.ReLU), relaxed_by(euler(0.3, 50), 1e-4), sgd(1e-4, 0.9), 64, squared,
        "Millidge et al. 2023, infinitesimal_inference_limit, utils.py, train_network",
        normalize=HALF,
    ),
    Setting(
        "lambda = 1, T=50, 0.1",
        mlp(128, 64, act=nn.ReLU), relaxed_by(euler(0.1, 50)), sgd(1e-4, 0.9), 64, squared,
        "Millidge et al. 2023, infinitesimal_inference_limit, utils.py, make_model_data",
        note="a batch of one there; weights trained as in the row above",
        normalize=HALF,
    ),
    Setting(
        "Whittington-Bogacz, T=50, 0.1",
        xavier(mlp(500, 500, act=nn.Sigmoid)), relaxed_by(euler(0.1, 50)), adam(1e-3), 20, squared_inside,
        "Whittington and Bogacz 2017, Supervised-Predictive-Coding, Supervised_run_v3.m",
        note="without their halving of the step where the energy rises; initial weights as we remember them",
        layers=nn.Linear,
    ),
    Setting(
        "prospective, T=64, 0.1",
        xavier(mlp(32, 32, act=nn.Sigmoid, bias=False)), relaxed_by(euler(0.1, 64, tol=1e-9)), sgd(0.01), 32, squared,
        "Song et al. 2024, Prospective-Configuration, nature_none_batch_new_analysis/base-50-b32.yaml",
        note="Fashion-MNIST there; the largest learning rate of their grid that trains here",
        layers=nn.Linear,
    ),
    Setting(
        "prospective, T=64, 1",
        xavier(mlp(32, 32, act=nn.Sigmoid, bias=False)), relaxed_by(euler(1.0, 64, tol=1e-9)), sgd(0.0025), 60, squared,
        "Song et al. 2024, Prospective-Configuration, nature_small-arch-small-data/bp-il.yaml",
        note="Fashion-MNIST there; the largest learning rate of their grid that trains here",
        layers=nn.Linear,
    ),
    Setting(
        "JPC, t=20",
        mlp(300, 300, act=nn.ReLU), relaxed_by(euler(20 * 2 / 64 / 50, 50)), adam(1e-3), 64, squared,
        "Innocenti et al. 2024, jpc, examples/discriminative_pc.ipynb with the defaults of make_pc_step",
        note="their energy is sum |e|^2 divided by the batch, so 20 units of time are 40/64 of ours; 50 Euler steps"
        " for Heun's",
        normalize=CANONICAL,
    ),
    Setting(
        "muPC, 30 layers, T=30, 0.5",
        mu_residual(128, 30), relaxed_by(euler(0.5 * 2 / 64, 30)), adam(0.1), 64, squared,
        "Innocenti et al. 2025, jpc, examples/mupc.ipynb",
        note="their energy is sum |e|^2 divided by the batch, so a step of 0.5 is 1/64 of ours",
        layers=(Scaled, Residual), normalize=CANONICAL,
    ),
]  # fmt: skip
