"""The table that the page opens with: a training step, trained networks beside fresh ones, ReLU beside tanh."""

import dataclasses
import itertools
from functools import partial

from common_networks import Case, flat, images, trained
from contenders import DEFAULT, EP, rows
from networks import NETS, Net, conv_net, mlp
from page import Lines, Settings, line, table
from roofline import best_rate, products
from timing import Contest, threads
from torch import nn
from torch.nn import functional as F

import lightning_ebm as ebm

TRAINED = 200
COLUMNS = [(activation, steps) for activation in (nn.Tanh, nn.ReLU) for steps in (0, TRAINED)]
HEAD = f"""## A training step

With the gradients, Adam and all, in backprop steps of the same network in the same run; the row "backprop" is its
own in milliseconds. "fresh" is as initialized, "trained" after {TRAINED} steps of backprop with Adam on ten
patterns under noise; tanh beside ReLU. At 1 thread CPU time of the process, at 2 threads wall time. "{DEFAULT}" is
`ebm.Learner(net)` with no algorithm named: predictive coding at the largest strength that the network bears.
"predictive-coding" is lambda = 1. "equilibrium-propagation", to its own tolerance, is measured on the first network
(the others take it as long or longer; more of it below), and refused, -, where a network has no equilibrium."""

SHARES = """
The share of the machine's best product rate that a step reaches: the time that its products and convolutions would
take at that rate, over the time that it takes, at 1 thread, trained ReLU networks. The rate is that of the fastest
product of two square matrices, {rate:.0f} GFLOP/s in this run. What is missing to 100 % are products of other shapes,
what is computed besides them, and Python."""


def sized(net: Net, activation: type[nn.Module], steps: int) -> Net:
    """The network with that activation, after so many steps of training, on data that can be learned."""
    data = flat if net.widths is not None else images(3, 32)
    widths = net.widths
    make = partial(mlp, *widths, activation=activation) if widths is not None else partial(conv_net, activation)
    case = Case(make, data, F.cross_entropy, net.shape[0])
    return dataclasses.replace(net, make=partial(trained, case, steps), data=data)


def steps(given: Settings) -> Lines:
    """A training step."""
    yield HEAD
    kinds = [f"{'tanh' if a is nn.Tanh else 'ReLU'}, {'trained' if n else 'fresh'}" for a, n in COLUMNS]
    yield table("network", "algorithm", *(f"{kind}, {count}" for count in (1, 2) for kind in kinds))
    ended: list[str] = []
    shares: dict[str, dict[str, float]] = {}
    with threads(1):
        rate = best_rate()
    for title, net in NETS.items():
        found: list[dict[str, float]] = []
        told: list[dict[str, str]] = []
        names: list[str] = []
        for count, (activation, trained_for) in itertools.product((1, 2), COLUMNS):
            with threads(count):
                contest = Contest(sized(net, activation, trained_for), lr=0.0)
                names = ["backprop", *_added(contest, net, with_ep=title == next(iter(NETS)))]
                found.append(contest.medians(_turns(contest, given.repeats)))
                if count == 1 and (activation, trained_for) == COLUMNS[-1]:
                    for name, take in contest.steps.items():
                        share = products(take) / rate / (found[-1][name] / 1e3)
                        shares.setdefault(name, {})[title] = share
            told.append({name: ended_as(learner) for name, learner in contest.learners.items()})
        for name in names:
            yield line(title, name, *(_cell(medians, name) for medians in found))
        to_a_tolerance = [name for name in (DEFAULT, "predictive-coding", EP) if name in names]
        ended += [line(title, name, *(one.get(name, "-") for one in told[:4])) for name in to_a_tolerance]
    yield "\nHow the relaxations of those that go to a tolerance ended: evaluations after the first, status, strength."
    yield table("network", "algorithm", *kinds)
    yield from ended
    yield SHARES.format(rate=rate / 1e9)
    yield table("algorithm", *NETS)
    for name, row in shares.items():
        yield line(name, *(f"{row[title]:.0%}" if title in row else "-" for title in NETS))


def _added(contest: Contest, net: Net, with_ep: bool) -> list[str]:
    """The rows; those that the network is refused by are not in the contest."""
    offered = {name: row for name, row in rows(net).items() if with_ep or name != EP}
    for name, (algorithm, options) in offered.items():
        contest.add(name, algorithm, **options)
        try:
            contest.steps[name]()
        except ebm.EBMError:
            del contest.steps[name], contest.learners[name]
    return list(offered)


def _turns(contest: Contest, repeats: int) -> int:
    """Fewer where backprop alone takes long."""
    return repeats if contest.steps["backprop"]() < 12 else max(1, repeats // 2)


def _cell(medians: dict[str, float], name: str) -> str:
    if name not in medians:
        return "-"
    return f"{medians[name]:.1f} ms" if name == "backprop" else f"{medians[name] / medians['backprop']:.1f}"


def ended_as(learner: ebm.Learner) -> str:
    """How the last step ended: evaluations after the first of each phase, the worst status, lambda."""
    report = learner.report
    strength = max((float(phase["nudge"]) for phase in report["phases"]), default=0.0)
    counts = " + ".join(str(phase["steps"]) for phase in report["phases"])
    return f"{counts}, {report['result']}, {strength:g}"
