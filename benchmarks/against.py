"""Another checkout of the library beside this one: time, first step and peak memory of training steps, in one run.

    git worktree add ../before 3cb7db5
    python benchmarks/against.py ../before

Each tree has a process of its own, which imports what both have in common; the two take turns step by step, so that
what else the machine does falls on both. "backprop" is no part of the library, and its ratio tells how far to trust the
others.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from networks import NETS, mlp
from peak import allocated_at_peak
from torch import nn

import lightning_ebm as ebm  # of the tree that a worker is told, by PYTHONPATH

TREE = Path(__file__).parents[1]
NETWORKS = (
    "784-256x3-10, batch 64",
    "784-512x4-10, batch 256",
    "20 layers of 128, batch 64",
    "conv 32-64-128-128, batch 16",
)
BOUNDED = "EP, 20 + 10 + 10 sweeps"
"""Runs on chains alone, with clipped activations."""
EULER = "PC, 20 Euler steps"
ROWS = (
    "backprop", "zero-divergence", "pc-nudge", "predictive-coding", "error-pc", EULER, BOUNDED, "dual-propagation",
)  # fmt: skip
WARM = 6


class Elsewhere:
    """A process that takes steps on a tree of its own.

    Args:
        tree: the checkout.
    """

    def __init__(self, tree: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{tree}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(tree), "--worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment, cwd=tree,
        )  # fmt: skip

    def ask(self, *what: str) -> Any:
        """An answer of `Here`, or in a word why there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Here:
    """What a worker can be asked."""

    def __init__(self) -> None:
        self._step: Any = None

    def begin(self, network: str, row: str) -> float:
        """Makes a network and its learner; milliseconds of the first step."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        shape = NETS[network]
        if row == BOUNDED:
            assert shape.widths is not None
            net: nn.Module = mlp(*shape.widths, activation=nn.ReLU6)
        else:
            net = shape.make()
        x, y = shape.batch()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
        algorithms: dict[str, Any] = {
            EULER: lambda: ebm.algorithm("predictive-coding", relaxer=ebm.GradientDescent(lr=shape.lr, max_steps=20)),
            BOUNDED: lambda: ebm.algorithm(
                "equilibrium-propagation", free_relaxer=ebm.FixedPoint(20), relaxer=ebm.FixedPoint(10)
            ),
        }
        learner = None if row == "backprop" else ebm.Learner(net, algorithms.get(row, lambda: row)())

        def step() -> None:
            optimizer.zero_grad()
            if learner is None:
                nn.functional.cross_entropy(net(x), y).backward()
            else:
                learner.backward(lambda: nn.functional.cross_entropy(net(x), y))
            optimizer.step()

        self._step = step
        return self.step()

    def step(self) -> float:
        """CPU milliseconds of a step."""
        start = time.process_time()
        self._step()
        return 1e3 * (time.process_time() - start)

    def peak(self) -> float:
        """MiB that are allocated at the peak of a step."""
        return allocated_at_peak(self._step)


def work() -> None:
    """Answers until nobody asks."""
    here = Here()
    answers, sys.stdout = sys.stdout, sys.stderr  # what the library prints is no answer
    for line in sys.stdin:
        what, *of = json.loads(line)
        try:
            found = getattr(here, what)(*of)
        except Exception as error:
            found = type(error).__name__
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def compare(before: Elsewhere, now: Elsewhere, network: str, row: str, turns: int) -> str:
    """A line of the table; of the first steps alone where either tree refuses."""
    firsts = [tree.ask("begin", network, row) for tree in (before, now)]
    if not all(type(first) is float for first in firsts):
        return f"| {network} | {row} | {firsts[0]} | {firsts[1]} |"
    for _, tree in itertools.product(range(WARM), (before, now)):
        tree.ask("step")
    pairs = [(before.ask("step"), now.ask("step")) for _ in range(turns)]
    old, new = (statistics.median(times) for times in zip(*pairs, strict=True))
    peaks = [tree.ask("peak") for tree in (before, now)]
    numbers = [
        f"{old:.1f}", f"{new:.1f}", f"{new / old:.2f}", f"{firsts[0]:.0f}", f"{firsts[1]:.0f}",
        f"{firsts[1] / firsts[0]:.2f}", f"{peaks[0]:.1f}", f"{peaks[1]:.1f}", f"{peaks[1] / peaks[0]:.2f}",
    ]  # fmt: skip
    return f"| {network} | {row} | {' | '.join(numbers)} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="algorithms")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work()
    before, now = Elsewhere(given.before.resolve()), Elsewhere(TREE)
    heads = ("network", "algorithm", "before, ms", "now, ms", "ratio", "first, before", "first, now", "ratio")
    print("|", " | ".join((*heads, "peak before, MiB", "now, MiB", "ratio")), "|")
    print("|", " | ".join(["---"] * (len(heads) + 3)), "|")
    for network, row in itertools.product(NETWORKS, given.rows):
        if row == BOUNDED and not network.startswith("784"):
            continue
        print(compare(before, now, network, row, given.turns), flush=True)
    return None


if __name__ == "__main__":
    main()
