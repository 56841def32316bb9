"""The relaxer that chooses itself, against those it chooses from; and what these need."""

import itertools

from contenders import HeavyBall, settled
from networks import NETS, Net, mlp
from page import Lines, Settings, line, table
from sweeping import bounded
from timing import Contest
from torch import nn

import lightning_ebm as ebm

SMALL, LARGE, DEEP, CONV = list(NETS)[:4]
RELU = Net(lambda: mlp(784, 256, 256, 256, 10, activation=nn.ReLU), (64, 784))


def automatic(given: Settings) -> Lines:
    """The relaxer that chooses itself, against the best of those it chooses from."""
    yield (
        '## `relaxer="auto"`\n\nAgainst each of its candidates alone, all in one run on the same weights. "Weights'
        ' x 2" stands for a trained network, where relaxations are longer.'
    )
    yield table("network", "chosen", "auto, ms", "best fixed", "ms", "auto / best")
    cases = {
        f"{SMALL}, lambda 1": (NETS[SMALL], 1.0, settled(1e-3)),
        f"{DEEP}, weights x 2, lambda 0.1": (NETS[DEEP], 2.0, settled(1e-3, 0.1)),
        "784-256x3-10 with ReLU, batch 64, lambda 1": (RELU, 1.0, settled(1e-3)),
        f"{CONV}, lambda 1": (NETS[CONV], 1.0, settled(1e-3)),
        "EP, 784-512-512-10, batch 128": (bounded(784, 512, 512, 10), 1.0, ebm.algorithm("equilibrium-propagation")),
    }
    for title, (net, gain, algorithm) in cases.items():
        contest = Contest(net, gain, lr=0.0)
        free = ebm.algorithm(algorithm, relaxer="auto")
        assert isinstance(free.relaxer, ebm.Cheapest)
        names = {repr(candidate): candidate for candidate in free.relaxer.candidates}
        contest.add("auto", free)
        contest.steps["auto"]()
        affordable = [[sum(costs) for costs in zip(*rows, strict=True)] for rows in free.relaxer.tried.values()]
        least = [min(costs) for costs in affordable]
        repeats = given.repeats if contest.steps["auto"]() < 200 else 3
        for index, (name, candidate) in enumerate(names.items()):
            # Those that did not arrive, or were given up as far too dear, cannot be the best, and would take minutes.
            if all(costs[index] <= 1.5 * low for costs, low in zip(affordable, least, strict=True)):
                # Alone in a `Cheapest` of one, so that the same engine runs it.
                contest.add(name, ebm.algorithm(algorithm, relaxer=ebm.Cheapest(candidate)))
        found = contest.medians(repeats)
        fixed = {name: value for name, value in found.items() if name in names}
        best = min(fixed, key=lambda name: fixed[name])
        by_kind = {kind: _short(relaxer) for kind, relaxer in free.relaxer.chosen.items()}
        alike = len(set(by_kind.values())) == 1
        chosen = (
            next(iter(by_kind.values())) if alike else ", ".join(f"{kind} {name}" for kind, name in by_kind.items())
        )
        ratio = f"{found['auto'] / fixed[best]:.2f}"
        yield line(title, chosen, found["auto"], _short(names[best]), fixed[best], ratio)


def passes(given: Settings) -> Lines:
    """Acceleration and momentum in error coordinates, counted."""
    yield (
        "## Passes to equilibrium\n\nEvaluations of the network, forward and back, until the slowest sample's residual"
        " is below 1e-3; a count is the same on every machine. * ended with forces left, at a kink or stalled; - not"
        " there after 100. Momentum: the better of lr 0.8, momentum 0.2 and lr 0.5, momentum 0.3."
    )
    yield table("network", "lambda", "ErrorCoordinates", "Anderson, memory 1", "4", "8", "momentum", "lr = 1")
    nets = {"784-256x3-10, tanh": NETS[SMALL], "20 layers of 128, tanh": NETS[DEEP], "784-256x3-10, ReLU": RELU}
    for (title, net), gain, strength in itertools.product(nets.items(), (1.0, 2.0), (1.0, 0.1)):
        heavy = [HeavyBall(lr, momentum, 1e-3) for lr, momentum in ((0.8, 0.2), (0.5, 0.3))]
        columns: list[list[ebm.Relaxer]] = [[ebm.ErrorCoordinates(100, tol=1e-3)]]
        columns += [[ebm.Anderson(100, memory, 1e-3, coordinates="errors")] for memory in (1, 4, 8)]
        columns += [list[ebm.Relaxer](heavy), [HeavyBall(1.0, 0.0, 1e-3)]]
        counted = [min(map(shown, (needed(net, gain, strength, r) for r in group))) for group in columns]
        yield line(title if gain == 1 else f"{title}, weights x 2", f"{strength:g}", *(text for *_, text in counted))


def shown(found: tuple[int, str]) -> tuple[bool, int, str]:
    """To compare by, and to print."""
    count, status = found
    mark = "*" if status in ("stalled", "kink") else ""
    return status == "max_steps", count, "-" if status == "max_steps" else f"{count}{mark}"


def needed(net: Net, gain: float, strength: float, relaxer: ebm.Relaxer) -> tuple[int, str]:
    """Evaluations, and how it ended."""
    contest = Contest(net, gain)
    contest.add("counted", ebm.algorithm("predictive-coding", nudge=ebm.OneSided(strength), relaxer=relaxer))
    try:
        contest.steps["counted"]()
    except ebm.RelaxationDivergedError:
        return 0, "max_steps"
    report = contest.learners["counted"].report
    return report["steps"] + 1, report["result"]


def _short(relaxer: ebm.Relaxer) -> str:
    options = {"Anderson": "memory", "FixedPoint": "order", "GradientDescent": "lr"}
    name = type(relaxer).__name__
    return f"{name}({options[name]}={getattr(relaxer, options[name])!r})" if name in options else name
