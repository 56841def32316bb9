"""Time of whole training steps, all contenders taking turns.

At one thread it is the CPU time of the process, which does not count what else the machine does; at more it is wall
time, as the CPU time of several threads also counts those that wait.
"""

import copy
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from networks import Net
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_ebm as ebm

Timed = Callable[[], float]
"""Takes a step, and tells how many milliseconds that took."""

ByHand = Callable[[nn.Module, Tensor, Tensor], None]
"""Adds its update of a network on a batch to `.grad`."""

WARM_UP = 4


def timed(step: Callable[[], object]) -> Timed:
    """Clocks a step of this process, on as many threads as torch now has."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def run() -> float:
        start = clock()
        step()
        return 1e3 * (clock() - start)

    return run


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cross_entropy(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of all networks here."""
    return F.cross_entropy(net(x), y)


class Contest:
    """One network, and everybody who trains it: each on a copy of its own, with an Adam of its own.

    Args:
        net: which, on which data.
        gain: factor on the freshly drawn weights; above 1 as after some training, where relaxations take longer.
        lr: of Adam; 0 does all its arithmetic on weights that stay as they are.
        fused: Adam in one kernel, as others have it.
    """

    def __init__(self, net: Net, gain: float = 1.0, lr: float = 1e-4, fused: bool = False) -> None:
        torch.manual_seed(0)
        self._adam: dict[str, Any] = {"lr": lr, "fused": fused}
        self.module = net.make()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.mul_(gain if parameter.ndim > 1 else 1.0)
        self.x, self.y = net.batch()
        self.steps: dict[str, Timed] = {}
        self.learners: dict[str, ebm.Learner] = {}
        self._add("backprop", lambda own: lambda: torch.autograd.backward(cross_entropy(own, self.x, self.y)))

    @property
    def resident(self) -> int:
        """Bytes that one of them holds between steps: weights, Adam's two moments, the batch."""
        return 3 * sum(p.nbytes for p in self.module.parameters()) + self.x.nbytes + self.y.nbytes

    def add(self, name: str, algorithm: str | ebm.Algorithm | None, **options: bool) -> None:
        """One of this library."""

        def learning(own: nn.Module) -> Callable[[], object]:
            learner = ebm.Learner(own, algorithm, **options)  # type: ignore[arg-type]
            self.learners[name] = learner
            return lambda: learner.backward(lambda: cross_entropy(own, self.x, self.y))

        self._add(name, learning)

    def add_by_hand(self, name: str, update: ByHand) -> None:
        """An update in plain torch."""
        self._add(name, lambda own: lambda: update(own, self.x, self.y))

    def update(self, algorithm: ebm.Algorithm) -> dict[str, Tensor]:
        """What an algorithm makes of the batch, at the weights that all of them start from."""
        own = copy.deepcopy(self.module)
        return ebm.Learner(own, algorithm).gradients(lambda: cross_entropy(own, self.x, self.y))

    def distance(self, algorithm: ebm.Algorithm, by_hand: ByHand) -> float:
        """|a - b| / |b| of the updates of an algorithm and of what is written by hand, over all parameters."""
        own = copy.deepcopy(self.module)
        by_hand(own, self.x, self.y)
        expected = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
        return ebm.metrics.alignment(self.update(algorithm), expected)["relative_error"]

    def _add(self, name: str, gradients: Callable[[nn.Module], Callable[[], object]]) -> None:
        own = copy.deepcopy(self.module)
        optimizer = torch.optim.Adam(own.parameters(), **self._adam)
        fill = gradients(own)

        def step() -> None:
            optimizer.zero_grad()
            fill()
            optimizer.step()

        self.steps[name] = timed(step)

    def medians(self, repeats: int) -> dict[str, float]:
        """Milliseconds a step."""
        return medians(self.steps, repeats)


def medians(steps: dict[str, Timed], repeats: int) -> dict[str, float]:
    """Milliseconds a step, all taking turns; the first turns are not counted.

    Every turn has an order of its own, the same in every run: who always came after the same one would always find the
    caches as that one leaves them, which is worth a tenth of a step of a small network.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    orders = random.Random(0)
    for turn in range(repeats + WARM_UP):
        for name in orders.sample(list(steps), len(steps)):
            found = steps[name]()
            if turn >= WARM_UP:
                times[name].append(found)
    return {name: statistics.median(found) for name, found in times.items()}


def machine() -> str:
    """The processor, and how busy it is."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
