"""What a training step asks its device, and how many operations it gives it: counts, the same on every machine."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from contenders import euler, sweeps
from networks import mlp
from page import Lines, Settings, line, table
from questions import PRODUCTS, RARELY, questions
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

Named = str | ebm.Algorithm | None
Make = Callable[[int], ebm.Algorithm]
STEPS = 20

ASKED: dict[str, tuple[Named, int]] = {
    "zero-divergence": ("zero-divergence", 1),
    "error-pc": ("error-pc", 1),
    f"PC, {STEPS} Euler steps": (euler(STEPS), 1),
    "EP, 20 + 10 + 10 sweeps": (sweeps(20, 10), 2),
    "pc-nudge": ("pc-nudge", 1),
    "default": (None, 1),
    "predictive-coding": ("predictive-coding", 1),
    "predictive-coding to 1e-6": (
        ebm.algorithm("predictive-coding", relaxer=ebm.ErrorCoordinates(max_steps=64, tol=1e-6)), 1,
    ),
    "fixed-prediction": ("fixed-prediction", 1),
    "augmented-lagrangian-pc": ("augmented-lagrangian-pc", 8),
    "equilibrium-propagation": ("equilibrium-propagation", 3),
    "equilibrium-propagation by `FixedPoint(200, tol=1e-4)`": (
        ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(200, tol=1e-4)), 3,
    ),
    "holomorphic-ep": ("holomorphic-ep", 4),
    "contrastive-hebbian": ("contrastive-hebbian", 2),
    "coupled-learning": ("coupled-learning", 3),
    "dual-propagation": ("dual-propagation", 1),
    "infinitesimal": ("infinitesimal", 1),
    "recurrent-backprop": ("recurrent-backprop", 2),
    "incremental-pc": ("incremental-pc", 8),
}  # fmt: skip
"""Algorithms, and the fewest questions that do: a relaxation to a tolerance must learn that it is over."""

HEAD = """## What a step asks its device

Counted by `benchmarks/questions.py`, which tests use as well, on the seventh training step of a 20-32x3-10
perceptron at batch 64 (advice looks closer at the first, second, fourth, ... step that does not settle); the counts
hold on any device. Every number that Python reads (`.item()`, `bool(x)`, `.tolist()`) waits for all that was
computed before. On a device that computes while the host goes on it is asked rarely ("device"); on a CPU, where
questions are free, after every step ("CPU"), and both end with the same states. Least: 1 a relaxation by tolerance,
as somebody must learn that it is over; fixed numbers of steps and exact rules need 1 a step, for non-finite losses.
-: no equilibrium, or an activation that the algorithm does not take."""

OPERATIONS = """
Linear response asks at every step of its conjugate gradients, an incremental update before every step of the
optimizer. `QuasiNewton`, `Anderson`, `Langevin` and batches whose samples see each other, which relax as one with a
line search, ask at every step, too.

Operations of torch that compute, as recorded (`capture=True`, before any compiler): what one more relaxation step
adds, per layer with a state and, for loss, energy and the decision to stop, per step whatever the depth. Found from
counts at two depths and two numbers of steps, on ReLU. Least is what the formula asks of torch for a layer: two
products, forward and back, the activation, its derivative and, with errors, their difference and their step; for a
sweep two products and the activation. A compiler that fuses all but the products is left with the two."""


@dataclass(frozen=True)
class Count:
    """Of one training step."""

    asked: int
    steps: int
    operations: Counter[str]


def counted(algorithm: Named, activation: type[nn.Module], rarely: bool = True, depth: int = 3) -> Count:
    """The seventh training step of a small perceptron."""
    torch.manual_seed(0)
    net = mlp(20, *[32] * depth, 10, activation=activation)
    x, y = torch.randn(64, 20), torch.arange(64) % 10
    learner, optimizer = ebm.Learner(net, algorithm), torch.optim.SGD(net.parameters(), 0.05)
    with patch(*RARELY) if rarely else patch(RARELY[0], lambda device: False):
        for _ in range(6):
            learner.step(lambda: F.cross_entropy(net(x), y), optimizer)
        with questions() as found:
            learner.step(lambda: F.cross_entropy(net(x), y), optimizer)
    return Count(found.count, learner.report["steps"], found.operations)


RULES: dict[str, tuple[Make, int, int]] = {
    "PC, Euler steps": (euler, 1, 6),
    "error-pc": (lambda n: _with_steps("error-pc", n), 1, 6),
    "predictive-coding, to a tolerance": (lambda n: _with_steps("predictive-coding", n, tol=1e-30), 1, 6),
    "EP, sweeps": (lambda n: sweeps(1, n), 2, 3),
}
"""Algorithms by their number of steps, how many phases take as many, and the least number of operations."""


def per_step_and_layer(make: Make, phases: int) -> tuple[Counter[str], float]:
    """What a step adds for a layer, in 24ths and by operation; and operations a step adds whatever the depth."""
    found = {(n, d): counted(make(n), nn.ReLU, depth=d).operations for n in (8, 16) for d in (3, 6)}
    both: Counter[str] = Counter(found[16, 6])
    for less in (found[8, 6], found[16, 3]):
        both.subtract(less)
    both.update(found[8, 3])
    added = found[16, 3].total() - found[8, 3].total()
    return both, added / 8 / phases - both.total() / 8 / phases


def asked(given: Settings) -> Lines:
    """Questions, and operations."""
    yield HEAD
    yield table("algorithm", "tanh: steps", "CPU", "device", "ReLU: steps", "CPU", "device", "least")
    for name, (algorithm, least) in ASKED.items():
        cells: list[object] = []
        for activation in (nn.Tanh, nn.ReLU):
            try:
                often, rarely = (counted(algorithm, activation, rarely=one) for one in (False, True))
                cells += [rarely.steps, often.asked, rarely.asked]
            except ebm.EBMError:
                cells += ["-", "-", "-"]
        yield line(name, *cells, least)
    yield OPERATIONS
    yield table("one more step of", "operations a layer", "products among them", "least", "besides, a step")
    for name, (make, phases, least) in RULES.items():
        layer, besides = per_step_and_layer(make, phases)
        products = sum(layer[product] for product in PRODUCTS)
        yield line(name, layer.total() / 24 / phases, products / 24 / phases, least, besides)


def _with_steps(preset: str, steps: int, **options: float) -> ebm.Algorithm:
    relaxer = ebm.algorithm(preset).relaxer
    assert isinstance(relaxer, ebm.ErrorCoordinates)
    return ebm.algorithm(preset, relaxer=replace(relaxer, max_steps=steps, **options))
