"""What pooling by means gains from being written as sums in code."""

import itertools
from unittest import mock

from contenders import euler
from networks import NETS, Net
from page import Lines, Settings, line, table
from timing import Contest
from torch import nn

import lightning_ebm as ebm
from lightning_ebm.program.decompositions import DECOMPOSITIONS

HEAD = """## Mean pooling

Milliseconds of a training step at 1 thread, beside the same code with torch's own pooling in it (`aten.avg_pool2d` and
its backward), in turn. "backprop" has torch's."""
TRACED = 3
"""Steps by which all code is there."""


def lenet() -> nn.Sequential:
    """LeNet-5 on 28 x 28 images."""
    layers: list[nn.Module] = []
    for a, b in ((1, 6), (6, 16)):
        layers += [nn.Conv2d(a, b, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)]
    layers.append(nn.Flatten())
    for a, b in itertools.pairwise((784, 120, 84, 10)):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


NETWORKS = {
    "conv 32-64-128-128, batch 16": NETS["conv 32-64-128-128, batch 16"],
    "LeNet-5, batch 64": Net(lenet, (64, 1, 28, 28), 8, 0.02),
}
ALGORITHMS = {"PC, 8 Euler steps": euler(8, 0.02), "error-pc": ebm.algorithm("error-pc")}


def mean_pooling(given: Settings) -> Lines:
    """Mean pooling, as sums and as torch has it."""
    yield HEAD
    yield table("network", "algorithm", "as sums", "torch's", "torch's / sums")
    for name, net in NETWORKS.items():
        contest = Contest(net)
        for row, algorithm in ALGORITHMS.items():
            contest.add(row, algorithm)
            contest.add(f"{row}, torch's", algorithm)
            with mock.patch.dict(DECOMPOSITIONS, clear=True):
                for _ in range(TRACED):
                    contest.steps[f"{row}, torch's"]()
        found = contest.medians(given.repeats)
        yield line(name, "backprop", "", found["backprop"], "")
        for row in ALGORITHMS:
            sums, theirs = found[row], found[f"{row}, torch's"]
            yield line(name, row, sums, theirs, f"{theirs / sums:.2f}")
