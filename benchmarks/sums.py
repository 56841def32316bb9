"""What sums with products gain from being one operation in code."""

from unittest import mock

from contenders import euler, sweeps
from networks import NETS
from page import Lines, Settings, line, table
from sweeping import bounded
from timing import Contest

from lightning_ebm.program import code

HEAD = """## Sums with products

Milliseconds of a training step at 1 thread, beside the same code with every sum x + A B as two operations, in turn."""
TRACED = 3
"""Steps by which all code is there."""
NETWORKS = {
    "784-512-10, batch 128": (bounded(784, 512, 10), "EP, 20 + 10 + 10 sweeps", sweeps(20, 10)),
    "784-512-512-10, batch 128": (bounded(784, 512, 512, 10), "EP, 20 + 10 + 10 sweeps", sweeps(20, 10)),
    "784-256x3-10, batch 64": (NETS["784-256x3-10, batch 64"], "PC, 20 Euler steps", euler(20)),
}


def sums_with_products(given: Settings) -> Lines:
    """x + A B, as one operation and as two."""
    yield HEAD
    yield table("network", "algorithm", "one operation", "two", "two / one")
    for name, (net, row, algorithm) in NETWORKS.items():
        contest = Contest(net)
        contest.add(row, algorithm)
        contest.add(f"{row}, two", algorithm)
        with mock.patch.object(code, "fuse_sums"):
            for _ in range(TRACED):
                contest.steps[f"{row}, two"]()
        found = contest.medians(given.repeats)
        one, two = found[row], found[f"{row}, two"]
        yield line(name, "backprop", "", found["backprop"], "")
        yield line(name, row, one, two, f"{two / one:.2f}")
