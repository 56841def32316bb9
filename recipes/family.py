"""Every preset on the digits: test accuracy, direction against its own true gradient, and cost, as a Markdown table.

    python recipes/family.py                       # one seed and 10 epochs each
    python recipes/family.py --seeds 5 --only equilibrium-propagation backprop --epochs 20

A plain PyTorch loop: 64-256-10 with hard-sigmoid hidden units and a linear output that is itself a state, half a
squared error to one-hot targets, batches of 32, SGD with learning rate 0.05 and momentum 0.9.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from digits_classifier import Digits
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm

WEAK_FEEDBACK = ebm.algorithm(
    "equilibrium-propagation",
    energy=ebm.Hopfield(feedback=0.3),
    free_relaxer=ebm.FixedPoint(max_steps=5),
    relaxer=ebm.FixedPoint(max_steps=4),
)
"""Equilibrium propagation that settles in a few sweeps, in two hidden layers as in one."""

WEAK = "EP, feedback 0.3, 5 and 4 sweeps"

ADVICE = {
    "backprop": "The control.",
    "predictive-coding": "A finite nudge: another direction than backprop's, on purpose.",
    "pc-nudge": "Backprop's direction from an equilibrium; the default where that is wanted.",
    "zero-divergence": "Backprop exactly, at the least cost; no equilibrium is involved.",
    "fixed-prediction": "Backprop exactly, by local steps; as many as there are layers.",
    "incremental-pc": "Eight optimizer steps a batch; the cosine is of eight with the parameters left alone.",
    "error-pc": "Five steps, not an equilibrium; raise `max_steps` in deep nets.",
    "augmented-lagrangian-pc": "Backprop at a finite nudge, bought with outer steps.",
    "equilibrium-propagation": "Evaluate at the free equilibrium; several hidden layers want weak feedback, see below.",
    "equilibrium-propagation-one-sided": "For hardware that cannot push away from a target; else centered.",
    "holomorphic-ep": "Needs an analytic activation, here tanh; its states are complex.",
    "infinitesimal": "No nudge to choose; costs second derivatives.",
    "contrastive-hebbian": "Full clamp, weak feedback: close to backprop, at a price in sweeps.",
    "coupled-learning": "Descends another cost than the loss: the cosine stays below 1 at any eta.",
    "dual-propagation": "One phase, no free relaxation, backprop's direction.",
    WEAK: "The setting for several hidden layers: a few sweeps settle it.",
    "recurrent-backprop": "EP without a nudge: the true gradient at the free equilibrium.",
}


def network(hidden: Sequence[int] = (256,), activation: Callable[[], nn.Module] | None = None) -> nn.Sequential:
    """64, hidden units, 10, initialized as torch does.

    Args:
        hidden: units of each hidden layer.
        activation: of hidden units; None is the hard sigmoid clamp(a, 0, 1).
    """
    widths = (64, *hidden, 10)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Hardtanh(0.0, 1.0) if activation is None else activation()]
    return nn.Sequential(*layers[:-1])


def half_squared_error(output: Tensor, labels: Tensor) -> Tensor:
    """1/2 |o - onehot|^2, averaged over the batch."""
    return 0.5 * (output - F.one_hot(labels, 10)).square().sum(-1).mean()


@dataclass
class Run:
    """What one training run showed: accuracy in percent by epoch, cosines and CPU seconds of steps."""

    accuracy: dict[int, float] = field(default_factory=dict)
    cosines: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def train(
    net: nn.Sequential,
    algorithm: str | ebm.Algorithm,
    seed: int = 0,
    epochs: int = 10,
    evaluate: Sequence[int] | None = None,
    cosine_every: int | None = None,
    lr: float = 0.05,
) -> Run:
    """Trains in place, evaluates at the free equilibrium.

    Args:
        net: see `network`.
        algorithm: a preset's name or an `Algorithm`.
        seed: of the order of the batches.
        epochs: passes over the 1437 training images.
        evaluate: after which epochs; None is the last.
        cosine_every: every how many steps the true gradient is computed; None never.
        lr: learning rate of SGD with momentum 0.9.
    """
    chosen = ebm.algorithm(algorithm)
    digits = Digits()
    digits.setup("fit")
    images, labels = digits.train.tensors
    learner = ebm.Learner(net, chosen, output="state")
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    run = Run()
    step = 0
    for epoch in range(1, epochs + 1):
        shuffled = torch.randperm(len(images), generator=order)
        for batch in (shuffled[first : first + 32] for first in range(0, len(images), 32)):

            def closure(batch: Tensor = batch) -> Tensor:
                return half_squared_error(net(images[batch]), labels[batch])

            if cosine_every and step % cosine_every == 0:
                run.cosines.append(cosine(net, closure, learner))
            start = time.process_time()
            learner.step(closure, optimizer)
            run.seconds.append(time.process_time() - start)
            step += 1
        if epoch in (evaluate or (epochs,)):
            run.accuracy[epoch] = accuracy_of(net, chosen)
    return run


def accuracy_of(net: nn.Module, algorithm: ebm.Algorithm) -> float:
    """Percent right on the 360 test images, at the algorithm's free equilibrium."""
    digits = Digits()
    digits.setup("test")
    images, labels = digits.test.tensors
    right = ebm.Equilibrium(net, algorithm, output="state")(images).argmax(-1) == labels
    return 100 * float(right.float().mean())


def cosine(net: nn.Module, closure: Callable[[], Tensor], learner: ebm.Learner) -> float:
    """To backprop's gradient for divergence energies, to the gradient at the free equilibrium for others."""
    chosen = learner.algorithm
    if not chosen.rule.relaxes or chosen.energy.divergence:
        true = ebm.reference.backprop(net, closure)
    else:
        true = ebm.reference.equilibrium(net, closure, chosen, output="state")
    return ebm.metrics.alignment(learner.gradients(closure), true)["cosine"]


def row(
    name: str, algorithm: str | ebm.Algorithm, seeds: int, epochs: int, cosine_every: int, unit: float | None
) -> tuple[str, float]:
    """A line of the table, and the median seconds of a step."""
    activation = nn.Tanh if name == "holomorphic-ep" else None
    runs = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = network(activation=activation)
        try:
            runs.append(train(net, algorithm, seed, epochs, cosine_every=cosine_every))
        except ebm.EBMError as error:
            return f"| `{name}` | {type(error).__name__} | | | {ADVICE[name]} |", unit or 1.0
    seconds = statistics.median(s for run in runs for s in run.seconds)
    accuracy = statistics.mean(run.accuracy[epochs] for run in runs)
    found = statistics.median(c for run in runs for c in run.cosines)
    label = f"`{name}`" + (" (tanh)" if activation else "")
    return f"| {label} | {accuracy:.1f} | {found:.4f} | {seconds / (unit or seconds):.1f} | {ADVICE[name]} |", seconds


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="runs a preset, averaged")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cosine-every", type=int, default=45, help="steps between two comparisons")
    parser.add_argument("--only", nargs="+", choices=ebm.algorithms(), default=ebm.algorithms())
    options = parser.parse_args()
    logging.getLogger("lightning_ebm").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # matrices this small are slower on several
    print("| preset | test accuracy, % | cosine | cost of a step | advice |")
    print("| --- | --- | --- | --- | --- |")
    chosen: dict[str, str | ebm.Algorithm] = {name: name for name in ("backprop", *options.only)}
    if "equilibrium-propagation" in chosen:
        chosen[WEAK] = WEAK_FEEDBACK
    unit = None
    for name, algorithm in chosen.items():
        line, seconds = row(name, algorithm, options.seeds, options.epochs, options.cosine_every, unit)
        unit = unit or seconds
        print(line, flush=True)


if __name__ == "__main__":
    main()
