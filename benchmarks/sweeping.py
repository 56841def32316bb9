"""Equilibrium propagation against twenty lines of plain torch, and to a tolerance."""

from functools import partial

import by_hand
from contenders import sweeps
from networks import NETS, Net, mlp
from page import Lines, Settings, line, table
from timing import Contest, threads
from torch import nn

import lightning_ebm as ebm

CONV = "conv 32-64-128-128, batch 16"
FREE, NUDGED = 20, 10
HEAD = """## Equilibrium propagation, centered

Free sweeps + nudged ones at each sign, odd layers and then even; by hand is `benchmarks/by_hand.py`, plain torch on
the same weights: "apart" is |its update - this library's| / |its|, before anything is timed. Or to a tolerance, by
such sweeps or by as few as `AcceleratedFixedPoint` takes; "default" is the preset as it is, to 1e-4. Activations
min(max(a, 0), 1) in the MLPs, tanh in the convolutional net. At 1 thread CPU time, at 2 threads wall time."""


class Sigmoid(nn.Hardtanh):
    """min(max(a, 0), 1), as equilibrium propagation has it."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)


def bounded(*widths: int) -> Net:
    """An MLP of it, batch 128."""
    return Net(partial(mlp, *widths, activation=Sigmoid), (128, widths[0]))


def equilibrium_propagation(given: Settings) -> Lines:
    """Centered EP."""
    yield HEAD
    yield table("network", "threads", "algorithm", "ms a step", "backprop steps", "how it ended", "apart")
    nets = {"784-512-10, batch 128": bounded(784, 512, 10), "784-512-512-10, batch 128": bounded(784, 512, 512, 10)}
    for title, net in nets.items():
        for count in (1, 2):
            with threads(count):
                contest = _contest(net, given, FREE, NUDGED, settles=count == 1)
                hand = by_hand.swept(FREE, NUDGED)
                apart = f"{contest.distance(sweeps(FREE, NUDGED), hand):.0e}"
                contest.add_by_hand("the same by hand", hand)
                found = contest.medians(given.repeats)
            for name, value in found.items():
                shown = apart if name == "the same by hand" else ""
                yield line(title, count, name, value, value / found["backprop"], _ended(contest, name), shown)
    contest = _contest(NETS[CONV], given, 60, 15, settles=True)
    found = contest.medians(max(1, given.repeats // 3))
    for name, value in found.items():
        yield line(CONV, 1, name, value, value / found["backprop"], _ended(contest, name), "")


def _contest(net: Net, given: Settings, free: int, nudged: int, settles: bool) -> Contest:
    contest = Contest(net)
    published, name = sweeps(free, nudged), f"{free} + {nudged} + {nudged} sweeps"
    contest.add(name, published)
    if given.compile:
        contest.add(f"{name}, compile=True", published, compile=True)
    contest.add("default", "equilibrium-propagation")
    if settles:
        plain = ebm.algorithm("equilibrium-propagation", relaxer=ebm.FixedPoint(200, tol=1e-3))
        contest.add("to 1e-3, plain sweeps", plain)
        contest.add("to 1e-3, accelerated", ebm.algorithm(plain, relaxer=ebm.AcceleratedFixedPoint(200, tol=1e-3)))
    return contest


def _ended(contest: Contest, name: str) -> str:
    if name not in contest.learners:
        return ""
    report = contest.learners[name].report
    return f"{report['result']}, {' + '.join(str(phase['steps']) for phase in report['phases'])}"
