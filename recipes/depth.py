"""Accuracy and alignment against depth: residual MLPs of 8 to 128 layers, one update rule a row.

    python recipes/depth.py
    python recipes/depth.py --data mnist --data_dir data/mnist --width 128 --updates 2000 --seeds 3

Blocks are x + W tanh(x). Equilibrium propagation, whose states lie at activations, trains a chain of as many layers
clamp(W x, 0, 1): around a skip its states would have a gain of 2. Backpropagation trains that chain too, as what is
lost by the chain is not lost by the rule. Every row has its learning rate chosen at the
smallest depth, by the training loss after all updates, and keeps it at all others: as it is, or with `ebm.depth` by the
factors of `ebm.depth.parameter_groups`. The cosine is that of the whole update with the gradient of the same batch,
averaged over the last half of the updates; of equilibrium propagation, with the gradient at its free equilibrium. Runs
are kept in runs.json one by one, so that what was interrupted goes on. ``--every_rate true`` trains every row with all
learning rates at every depth instead, and writes losses and accuracies to rates.md: whether the best one is the same.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import torch
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm
from lightning_ebm import reference
from lightning_ebm.recipes.arrays import ArrayData
from lightning_ebm.recipes.data import MNIST, MNIST1D, Digits, FashionMNIST

mpl.use("Agg")


class Block(nn.Module):
    """x + W tanh(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.act, self.linear = nn.Tanh(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.linear(self.act(x))
        return x + branch


class Bounded(nn.Module):
    """clamp(W x, 0, 1), a state at its activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(width, width), nn.Hardtanh(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor = self.act(self.linear(x))
        return state


class Method(NamedTuple):
    """A row of the figure.

    Attributes:
        algorithm: of a network of that many layers.
        scaled: whether weights and learning rates are those of `ebm.depth`.
        bounded: whether blocks are those with states at activations.
    """

    algorithm: Callable[[int], ebm.Algorithm]
    scaled: bool
    bounded: bool = False


def descent() -> ebm.Algorithm:
    """Predictive coding as published: 20 steps on the states."""
    return ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(0.2, 20))


METHODS = {
    "backprop": Method(lambda _: ebm.algorithm("backprop"), True),
    "PC, plain": Method(lambda _: descent(), False),
    "PC, ebm.depth": Method(lambda _: descent(), True),
    "PC-ALM": Method(lambda _: ebm.algorithm("augmented-lagrangian-pc"), True),
    "PC, weak nudge": Method(lambda _: ebm.algorithm("pc-nudge"), True),
    "PC, nudge auto": Method(
        lambda _: ebm.algorithm("predictive-coding", nudge="auto", relaxer=ebm.ErrorCoordinates(max_steps=8, tol=1e-3)),
        True,
    ),
    "PC, errors to 1e-3": Method(lambda _: ebm.algorithm("predictive-coding"), True),
    "error-pc": Method(lambda _: ebm.algorithm("error-pc"), True),
    "EP": Method(
        lambda depth: ebm.algorithm(
            "equilibrium-propagation", free_relaxer=ebm.FixedPoint(2 * depth), relaxer=ebm.FixedPoint(depth)
        ),
        False,
        bounded=True,
    ),
    "backprop, EP's chain": Method(lambda _: ebm.algorithm("backprop"), False, bounded=True),
    "backprop, plain": Method(lambda _: ebm.algorithm("backprop"), False),
}
RATES = (2.5e-4, 1e-3, 4e-3, 1.6e-2)


class Settings(NamedTuple):
    """What all runs have in common.

    Attributes:
        data: inputs and labels, training and test.
        width: of hidden layers.
        updates: of the weights.
        batch: samples of an update.
        base: the depth at which learning rates are chosen.
    """

    data: tuple[Tensor, Tensor, Tensor, Tensor]
    width: int
    updates: int
    batch: int
    base: int


def network(method: Method, settings: Settings, depth: int) -> nn.Sequential:
    """`depth` weighted layers."""
    inputs, classes = settings.data[0].shape[1], int(settings.data[1].max()) + 1
    kind = Bounded if method.bounded else Block
    first: list[nn.Module] = [nn.Linear(inputs, settings.width)]
    first += [nn.Hardtanh(0, 1)] if method.bounded else []
    net = nn.Sequential(*first, *[kind(settings.width) for _ in range(depth - 2)], nn.Linear(settings.width, classes))
    if method.scaled:
        ebm.depth.initialize(net)
    return net


def run(method: Method, settings: Settings, depth: int, lr: float, seed: int) -> dict[str, float]:
    """Trains one network."""
    torch.manual_seed(seed)
    net, algorithm = network(method, settings, depth), method.algorithm(depth)
    groups: Any = net.parameters()
    if method.scaled:
        groups = ebm.depth.parameter_groups(net, lr, base_width=settings.width, base_depth=settings.base)
    optimizer = torch.optim.Adam(groups, lr)
    layers = None if method.bounded else Block
    learner = ebm.Learner(net, algorithm, layers=layers, output="readout")
    x, y, test_x, test_y = settings.data
    cosines, losses, begun = [], [], time.process_time()
    for update in range(settings.updates):
        rows = torch.randint(len(x), (settings.batch,))
        closure = lambda rows=rows: F.cross_entropy(net(x[rows]), y[rows])  # noqa: E731
        try:
            losses.append(float(learner.step(closure, optimizer)))
        except ebm.RelaxationDivergedError:
            return {"accuracy": math.nan, "cosine": math.nan, "loss": math.inf, "diverged": update}
        if update % 25 == 24 and update >= settings.updates // 2:
            try:
                exact = gradient(method, net, closure, algorithm)
            except ebm.RelaxationDivergedError:
                continue  # where its states rest is no minimum, and has no gradient to compare with
            cosines.append(ebm.metrics.alignment(learner.gradients(closure), exact)["cosine"])
    with learner.free_phase(lambda: net(test_x)), torch.no_grad():
        right = (net(test_x).argmax(1) == test_y).float().mean()
    last = losses[-max(1, settings.updates // 10) :]
    cosine = sum(cosines) / len(cosines) if cosines else math.nan
    return {
        "accuracy": float(right), "cosine": cosine, "loss": sum(last) / len(last),
        "seconds": time.process_time() - begun,
    }  # fmt: skip


def gradient(
    method: Method, net: nn.Module, closure: Callable[[], Tensor], algorithm: ebm.Algorithm
) -> dict[str, Tensor]:
    """What the update is compared with."""
    if not algorithm.rests_at_forward:
        return reference.equilibrium(net, closure, algorithm, output="readout")
    return reference.backprop(net, closure)


def loaded(data: ArrayData) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardized inputs, one row a sample, and labels."""
    data.setup("fit")
    train, test = data.parts["train"], data.parts["test"]
    rows = [
        torch.stack([x for x, _ in (part[k] for k in range(len(part)))]).flatten(1).float() for part in (train, test)
    ]
    mean, std = rows[0].mean(), rows[0].std()
    return (rows[0] - mean) / std, train.y, (rows[1] - mean) / std, test.y


def picture(runs: dict[str, dict[str, float]], path: Path) -> None:
    """Accuracy and cosine against depth, each row at the rate that was best at the base depth."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for name in METHODS:
        points = sorted(
            {
                int(key.split("|")[1])
                for key in runs
                if key.startswith(f"{name}|") and key.split("|")[2] == "transferred"
            }
        )
        for axis, what in zip(axes, ("accuracy", "cosine"), strict=True):
            if not points or (name.startswith("backprop") and what == "cosine"):
                continue
            values = [
                [r[what] for k, r in runs.items() if k.startswith(f"{name}|{depth}|transferred|")] for depth in points
            ]
            means = [sum(v) / len(v) for v in values]
            axis.plot(points, means, marker="o", markersize=3, label=name, color=f"C{list(METHODS).index(name)}")
    for axis, what in zip(axes, ("test accuracy", "cosine with the gradient"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
        axis.set_xlabel("layers")
        axis.set_ylabel(what)
        axis.spines[["top", "right"]].set_visible(False)
    names = axes[0].get_legend_handles_labels()
    axes[1].legend(*names, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table_of_rates(runs: dict[str, dict[str, float]], names: Sequence[str], depths: Sequence[int]) -> str:
    """The training loss and the test accuracy of every learning rate at every depth; the least loss is bold."""
    lines = ["| | layers |" + "".join(f" {lr:g} |" for lr in RATES), "| --- | --- |" + " --- |" * len(RATES)]
    for name in names:
        for depth in depths:
            row = [runs[f"{name}|{depth}|{lr:g}|0"] for lr in RATES]
            least = min(run["loss"] for run in row)
            cells = [
                "diverged" if math.isinf(run["loss"]) else f"{run['loss']:.3f}, {100 * run['accuracy']:.1f} %"
                for run in row
            ]
            bold = [f"**{cell}**" if run["loss"] == least else cell for cell, run in zip(cells, row, strict=True)]
            lines.append(f"| {name} | {depth} | {' | '.join(bold)} |")
    return "\n".join(lines) + "\n"


def main(
    data: Literal["digits", "mnist1d", "mnist", "fashion-mnist"] = "digits",
    data_dir: Path = Path("data/mnist"),
    out: Path = Path("runs/depth"),
    depths: Sequence[int] = (8, 16, 32, 64, 128),
    width: int = 32,
    updates: int = 200,
    batch: int = 64,
    seeds: int = 2,
    methods: Sequence[str] = tuple(METHODS),
    every_rate: bool = False,
) -> None:
    """Chooses learning rates at the smallest depth, trains at all, and draws depth.png.

    Args:
        data: which data set.
        data_dir: where MNIST or Fashion-MNIST is, or goes.
        out: for runs.json and the figure.
        depths: weighted layers.
        width: of hidden layers.
        updates: of the weights, in each run.
        batch: samples of an update.
        seeds: runs of each row at each depth.
        methods: which rows.
        every_rate: whether to train with every learning rate at every depth, one seed each, and to write rates.md.
    """
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    kind: Any = {"digits": Digits, "mnist1d": MNIST1D, "mnist": MNIST, "fashion-mnist": FashionMNIST}[data]
    source = kind(data_dir) if issubclass(kind, MNIST) else kind()
    settings = Settings(loaded(source), width, updates, batch, min(depths))
    kept = out / "runs.json"
    runs: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}

    def done(name: str, depth: int, label: str, lr: float, seed: int) -> dict[str, float]:
        key = f"{name}|{depth}|{label}|{seed}"
        if key not in runs:
            runs[key] = {**run(METHODS[name], settings, depth, lr, seed), "lr": lr}
            kept.write_text(json.dumps(runs, indent=1))
            print(key, json.dumps(runs[key]), flush=True)
        return runs[key]

    if every_rate:
        for name in methods:
            for depth in depths:
                for lr in RATES:
                    done(name, depth, f"{lr:g}", lr, 0)
        (out / "rates.md").write_text(table_of_rates(runs, methods, depths))
        return
    for depth in depths:
        for name in methods:
            rate = min(RATES, key=lambda lr, name=name: done(name, settings.base, f"{lr:g}", lr, 0)["loss"])  # type: ignore[misc]
            for seed in range(seeds):
                done(name, depth, "transferred", rate, seed)
    picture(runs, out / "depth.png")


if __name__ == "__main__":
    auto_cli(main)
