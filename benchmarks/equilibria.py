"""How steps settle on networks that people bring, fresh and after training: a table of Markdown.

python benchmarks/equilibria.py [words of names] [--trained 200] [--repeats 5]
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from common_networks import CASES, Case, trained
from page import Lines, Settings, line, table
from timing import machine, medians, timed
from torch import Tensor, nn

import lightning_ebm as ebm

TRAINED, MOMENTUM = 200, 300
HEAD = f"""## Networks that people have

Forward and backward pass, with no optimizer, in backprop steps of the same network in the same run, CPU time at 1
thread; fresh, and after {TRAINED} steps of backprop with Adam. "error" is |update - backprop| / |backprop| of
"pc-nudge". "default" is `ebm.Learner(net)` with no algorithm named; lambda is the strength that it chose,
"evaluations" those after the first. "gap" is the energy that {{momentum}} steps of momentum descent on the same
errors, at that strength, find below its end, over the energy gained; "left" the largest force at the end over the
first. "as layers": states at whole blocks."""


class Momentum(ebm.Relaxer):
    """The least energy that momentum descent on the errors meets, for comparison; relaxes nothing.

    Args:
        steps: how many.
    """

    needs_error_coordinates: ClassVar[bool] = True

    def __init__(self, steps: int) -> None:
        self.steps, self.lowest = steps, math.inf

    def relax(self, landscape: ebm.Landscape, start: Sequence[Tensor], strength: float) -> ebm.Relaxation:
        """See `Relaxer.relax`."""
        point = [torch.zeros_like(e) for e in landscape.no_errors]
        speed = [torch.zeros_like(e) for e in point]
        for _ in range(self.steps):
            slope = landscape.evaluate(ebm.ErrorForces(), point, strength)
            self.lowest = min(self.lowest, float(slope.internal.sum() + strength * slope.loss))
            speed = [v.mul(0.95).sub(g, alpha=0.02) for v, g in zip(speed, slope.gradients, strict=True)]
            point = [x + v for x, v in zip(point, speed, strict=True)]
        still = torch.zeros(landscape.batch_size)
        return ebm.Relaxation(list(landscape.no_errors), "errors", "fixed", 0, still)


PRESETS: dict[str, str | None] = {
    "zero-divergence": "zero-divergence", "error-pc": "error-pc", "pc-nudge": "pc-nudge", "default": None,
}  # fmt: skip
COLUMNS = (
    "network", "weights", "backprop, ms", "zero-divergence", "error-pc", "pc-nudge", "error", "ended", "default",
    "lambda", "evaluations", "ended", "gap", "left",
)  # fmt: skip


def row(name: str, case: Case, steps: int, repeats: int, momentum: int) -> str:
    """One line of the table."""
    net = trained(case, steps)
    torch.manual_seed(5)
    x, y = case.batch(case.size)

    def closure() -> Tensor:
        return case.loss(net(x), y)

    learners = {shown: ebm.Learner(net, preset, layers=case.layers) for shown, preset in PRESETS.items()}
    contenders = {"backprop": timed(lambda: torch.autograd.backward(closure()))}
    contenders |= {shown: timed(partial(own.backward, closure)) for shown, own in learners.items()}
    frozen = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in frozen:  # its running statistics are no part of what is measured
        module.momentum = 0.0
    cost = medians(contenders, repeats)
    net.zero_grad()
    true = ebm.reference.backprop(net, closure)
    error = ebm.metrics.alignment(learners["pc-nudge"].gradients(closure), true)["relative_error"]
    learners["default"].gradients(closure)
    report, weak = learners["default"].report, learners["pc-nudge"].report
    strength = float(report["phases"][0]["nudge"])
    gap = _gap(net, case, report["phases"][0]["energies"], strength, momentum, (x, y))
    ratios = {shown: cost[shown] / cost["backprop"] for shown in PRESETS}
    return line(
        name, "fresh" if not steps else f"{steps} steps", cost["backprop"], ratios["zero-divergence"],
        ratios["error-pc"], ratios["pc-nudge"], f"{error:.1e}", weak["result"], ratios["default"], f"{strength:g}",
        report["steps"], report["result"], f"{gap:.0e}", f"{max(report['residual']):.2g}",
    )  # fmt: skip


def _gap(
    net: nn.Module, case: Case, energies: Sequence[float], strength: float, steps: int, batch: tuple[Tensor, Tensor]
) -> float:
    """What momentum descent finds below the last of the energies, over what was gained since the first."""
    below = Momentum(steps)
    algorithm = ebm.algorithm("predictive-coding", nudge=ebm.OneSided(strength), relaxer=below)
    ebm.Learner(net, algorithm, layers=case.layers).gradients(lambda: case.loss(net(batch[0]), batch[1]))
    start, end = energies[0], energies[-1]
    return max(end - below.lowest, 0.0) / max(start - min(end, below.lowest), 1e-30)


def networks_people_have(given: Settings, names: Sequence[str] = ("",), momentum: int = MOMENTUM) -> Lines:
    """Fresh and trained."""
    yield HEAD.format(momentum=momentum)
    yield table(*COLUMNS)
    for name, case in CASES.items():
        if any(part in name for part in names):
            for steps in (0, TRAINED):
                yield row(name, case, steps, max(1, given.repeats // 3), momentum)


def main() -> None:
    """Prints the table, a line as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[""], help="parts of names; none: all")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--momentum", type=int, default=MOMENTUM, help="steps of momentum descent")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    for text in networks_people_have(Settings(given.repeats, False, []), given.names, given.momentum):
        print(text, flush=True)


if __name__ == "__main__":
    main()
