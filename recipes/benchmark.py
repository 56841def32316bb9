"""What a training step costs, in backprop steps of the same network with the same optimizer.

    python recipes/benchmark.py > docs/benchmarks.md

Some minutes on one CPU core. Every figure is process CPU time of whole training steps (zero_grad, gradients, Adam),
medians over repeats in which all contenders take turns, so that what else the machine does falls on all of them.
"""

import argparse
import copy
import datetime
import itertools
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_ebm as ebm

Step = Callable[[], object]


def mlp(*widths: int) -> nn.Sequential:
    """A chain of linear and tanh layers that ends in a linear one."""
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def conv_net() -> nn.Sequential:
    """Four convolutions on 32 x 32 colour images."""
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "784-256x3-10, batch 64": (lambda: mlp(784, 256, 256, 256, 10), (64, 784)),
    "784-512x4-10, batch 256": (lambda: mlp(784, 512, 512, 512, 512, 10), (256, 784)),
    "20 layers of 128, batch 64": (lambda: mlp(784, *[128] * 20, 10), (64, 784)),
    "conv 32-64-128-128, batch 16": (conv_net, (16, 3, 32, 32)),
}


def euler(steps: int, lr: float = 0.1) -> ebm.Algorithm:
    """Predictive coding as published: so many Euler steps on the states at lambda = 1."""
    return ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr=lr, max_steps=steps))


def equilibrium_propagation(free: int, nudged: int, tol: float = 0.0) -> ebm.Algorithm:
    """Centred, at beta = 1/4: so many sweeps, or as many as a tolerance takes."""
    relaxers = ebm.FixedPoint(nudged, tol=tol), ebm.FixedPoint(free, tol=tol)
    return ebm.Algorithm(ebm.Hopfield(), ebm.Centered(0.25), *relaxers)


def hopfield_net(*widths: int) -> nn.Sequential:
    """Linear and hard-sigmoid layers; the linear output is a state."""
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.Hardsigmoid())]
    return nn.Sequential(*layers[:-1])


def squared_error(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Half a squared error to one-hot targets."""
    loss: Tensor = 0.5 * (net(x) - F.one_hot(y, 10)).square().sum() / len(x)
    return loss


@torch.no_grad()
def sweeps_by_hand(net: nn.Sequential, x: Tensor, y: Tensor, free: int, nudged: int, beta: float = 0.25) -> None:
    """Centred equilibrium propagation as one writes it for a chain of linear layers that one knows, drive hoisted."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    last, target = len(layers) - 1, F.one_hot(y, 10).float()

    def drive(k: int, states: list[Tensor]) -> Tensor:
        return first if k == 0 else F.linear(states[k - 1], layers[k].weight, layers[k].bias)

    def swept(states: list[Tensor], beta: float, count: int) -> list[Tensor]:
        states = list(states)
        for k in [k for _ in range(count) for half in (0, 1) for k in range(half, len(layers), 2)]:
            a = drive(k, states)
            if k < last:
                states[k] = F.hardsigmoid(torch.addmm(a, states[k + 1], layers[k + 1].weight))
            else:
                states[k] = a - beta * (states[k] - target) if beta else a
        return states

    first = layers[0](x)
    states = [F.hardsigmoid(first)]
    for k in range(1, last + 1):
        a = drive(k, states)
        states.append(F.hardsigmoid(a) if k < last else a)
    states = swept(states, 0.0, free)
    plus, minus = swept(states, beta, nudged), swept(states, -beta, nudged)
    scale = 1 / (2 * beta * len(x))
    for k, layer in enumerate(layers):
        moved = scale * (minus[k] - plus[k])
        layer.bias.grad = moved.sum(0)
        if k == 0:
            layer.weight.grad = moved.t() @ x
        else:
            ends = torch.cat([minus[k], -plus[k]]), torch.cat([minus[k - 1], plus[k - 1]])
            layer.weight.grad = scale * ends[0].t() @ ends[1]


def by_hand(net: nn.Sequential, x: Tensor, y: Tensor, steps: int, lr: float = 0.1) -> None:
    """The same update as one writes it in plain torch: energies and their gradients by autograd at every step."""
    blocks: list[nn.Sequential] = [nn.Sequential()]
    for layer in net:
        blocks[-1].append(layer)
        if isinstance(layer, nn.Tanh):
            blocks.append(nn.Sequential())

    def energy(states: list[Tensor]) -> Tensor:
        inputs = [x, *states]
        errors = [state - block(a) for block, a, state in zip(blocks, inputs, states, strict=False)]
        internal: Tensor = torch.stack([0.5 * e.square().sum() for e in errors]).sum()
        return internal + len(x) * F.cross_entropy(blocks[-1](inputs[-1]), y)

    states, hidden = [], x
    with torch.no_grad():
        for block in blocks[:-1]:
            hidden = block(hidden)
            states.append(hidden)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    for _ in range(steps):
        states = [state.detach().requires_grad_() for state in states]
        slopes = torch.autograd.grad(energy(states), states)
        states = [state - lr * slope for state, slope in zip(states, slopes, strict=True)]
    for parameter in net.parameters():
        parameter.requires_grad_(True)
    torch.autograd.backward(energy([state.detach() for state in states]) / len(x))


def contenders(net: nn.Module, shape: tuple[int, ...], algorithms: dict[str, tuple[ebm.Algorithm, dict[str, Any]]],
               hand: int = 0, sweeps: tuple[int, int] | None = None) -> dict[str, Step]:  # fmt: skip
    """One training step of each, on a copy of the net of its own."""
    x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])

    def loss(net: nn.Module) -> Tensor:
        return squared_error(net, x, y) if sweeps else F.cross_entropy(net(x), y)

    def stepping(gradients: Callable[[nn.Module], Step]) -> Step:
        own = copy.deepcopy(net)
        optimizer = torch.optim.Adam(own.parameters(), lr=1e-4)
        fill = gradients(own)

        def step() -> None:
            optimizer.zero_grad()
            fill()
            optimizer.step()

        return step

    def learning(algorithm: ebm.Algorithm, options: dict[str, Any]) -> Callable[[nn.Module], Step]:
        def gradients(own: nn.Module) -> Step:
            learner = ebm.Learner(own, algorithm, **options)
            return lambda: learner.backward(lambda: loss(own))

        return gradients

    steps = {"backprop": stepping(lambda own: lambda: torch.autograd.backward(loss(own)))}
    for name, (algorithm, options) in algorithms.items():
        steps[name] = stepping(learning(algorithm, options))
    if hand:
        assert isinstance(net, nn.Sequential)
        steps["the same by hand, autograd at every step"] = stepping(
            lambda own: lambda: by_hand(own, x, y, hand)  # type: ignore[arg-type]
        )
    if sweeps:
        steps["the same by hand, drive hoisted"] = stepping(
            lambda own: lambda: sweeps_by_hand(own, x, y, *sweeps)  # type: ignore[arg-type]
        )
    return steps


def medians(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time, all taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 4):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn >= 4:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def print_table(title: str, found: dict[str, float]) -> None:
    """Rows of Markdown, with ratios to backprop."""
    for name, value in found.items():
        print(f"| {title} | {name} | {value:.1f} | {value / found['backprop']:.1f} |", flush=True)


class Digits(L.LightningModule):
    """As its author wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(784, 256, 256, 256, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, logged."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def epoch(strategy: Callable[[], str | L.pytorch.strategies.Strategy]) -> Step:
    """60 steps under the Trainer, with what it takes to set them up."""
    data = TensorDataset(torch.randn(60 * 64, 784), torch.randint(0, 10, (60 * 64,)))

    def run() -> None:
        torch.manual_seed(0)
        trainer = L.Trainer(
            strategy=strategy(), max_epochs=1, accelerator="cpu", devices=1, enable_checkpointing=False, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Digits(), DataLoader(data, 64))

    return run


def memory(kind: str, steps: int) -> float:
    """MiB that a process grows by over ten training steps of 784-512x4-10 at batch 1024."""
    net = mlp(784, 512, 512, 512, 512, 10)
    algorithms = {} if kind == "backprop" else {kind: (euler(steps, 0.02), {"capture": kind == "captured"})}
    step = contenders(net, (1024, 784), algorithms)[kind]
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _status("VmRSS")
    for _ in range(10):
        step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def memory_elsewhere(kind: str, steps: int = 1) -> float:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--memory", kind, "--steps", str(steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Prints the page as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also through torch.compile, minutes of compiling")
    parser.add_argument("--memory", choices=["backprop", "captured", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_ebm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if given.memory:
        print(memory(given.memory, given.steps))
        return
    print(
        HEAD.format(
            date=datetime.date.today(),
            torch=torch.__version__,
            machine=_machine(),
            repeats=given.repeats,
            load=os.getloadavg()[0],
            cores=os.cpu_count(),
        )
    )
    print("| network | algorithm | ms a step | backprop steps |\n| --- | --- | --- | --- |")
    for title, (make, shape) in NETS.items():
        steps = 8 if title.startswith("conv") else 20
        lr = 0.02 if title.startswith("conv") else 0.1
        named: dict[str, tuple[ebm.Algorithm, dict[str, Any]]] = {
            f"PC, {steps} Euler steps": (euler(steps, lr), {}),
            f"PC, {steps} Euler steps, capture=False": (euler(steps, lr), {"capture": False}),
            "predictive-coding": (ebm.algorithm("predictive-coding"), {}),
            "predictive-coding, capture=False": (ebm.algorithm("predictive-coding"), {"capture": False}),
            "predictive-coding to 1e-4": (
                ebm.algorithm("predictive-coding", relaxer=ebm.ErrorCoordinates(max_steps=64, tol=1e-4)), {},
            ),
            "error-pc": (ebm.algorithm("error-pc"), {}),
            "pc-nudge": (ebm.algorithm("pc-nudge"), {}),
            "pc-nudge, centred": (ebm.algorithm("pc-nudge", nudge=ebm.Centered(1e-2)), {}),
            "zero-divergence": (ebm.algorithm("zero-divergence"), {}),
        }  # fmt: skip
        if given.compile:
            named[f"PC, {steps} Euler steps, compile=True"] = euler(steps, lr), {"compile": True}
        hand = 0 if title.startswith("conv") else steps
        print_table(title, medians(contenders(make(), shape, named, hand), given.repeats))
    for widths in ((784, 512, 10), (784, 512, 512, 10)):
        state = {"output": "state"}
        found = medians(contenders(hopfield_net(*widths), (128, 784), {
            "EP, 20 + 10 + 10 sweeps": (equilibrium_propagation(20, 10), state),
            "EP, 20 + 10 + 10 sweeps, capture=False": (equilibrium_propagation(20, 10), {"capture": False, **state}),
            "EP to 1e-3": (equilibrium_propagation(100, 100, 1e-3), state),
        }, sweeps=(20, 10)), given.repeats)  # fmt: skip
        print_table(f"{'-'.join(map(str, widths))} hard sigmoid, batch 128", found)
    found = medians(contenders(conv_net(), (16, 3, 32, 32), {
        "EP, 60 + 15 + 15 sweeps": (equilibrium_propagation(60, 15), {}),
        "EP to 1e-3": (equilibrium_propagation(200, 200, 1e-3), {}),
    }), max(3, given.repeats // 3))  # fmt: skip
    print_table("conv 32-64-128-128, batch 16", found)
    strategies: dict[str, Callable[[], str | L.pytorch.strategies.Strategy]] = {
        "backprop": lambda: "auto",
        "zero-divergence": lambda: ebm.EBMStrategy("zero-divergence"),
        "PC, 20 Euler steps": lambda: ebm.EBMStrategy(euler(20)),
        "PC, 20 Euler steps, capture=False": lambda: ebm.EBMStrategy(euler(20), capture=False),
    }
    found = medians({name: epoch(s) for name, s in strategies.items()}, max(3, given.repeats // 5))
    print_table("784-256x3-10, epoch of 60 steps under the Trainer", found)
    backprop = memory_elsewhere("backprop")
    print("\n| memory, 784-512x4-10, batch 1024 | MiB | of backprop's |\n| --- | --- | --- |")
    print(f"| backprop | {backprop:.0f} | 1.00 |")
    for kind in ("captured", "plain"):
        for steps in (5, 200):
            used = memory_elsewhere(kind, steps)
            print(f"| PC, {steps} Euler steps, {kind} | {used:.0f} | {used / backprop:.2f} |", flush=True)
    print(FOOT)


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


HEAD = """# Benchmarks

Made by `python recipes/benchmark.py` on {date}: {machine}, one thread, torch {torch}. Process CPU time of whole
training steps with Adam, medians of {repeats} turns in which all contenders alternate; "backprop steps" is the ratio to
backprop on the same network in the same run. "By hand" is the same update written in plain torch. Load when the run
began: {load:.1f} on {cores} cores; a busy machine takes more from small steps, whose tensors others push out of caches.
"""

FOOT = """
Memory is what the process grows by at its peak over ten steps, measured in a process of its own for each row."""


if __name__ == "__main__":
    main()
