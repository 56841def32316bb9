"""How the default and "pc-nudge" settle on networks that people bring, fresh and after training: a table of Markdown.

python benchmarks/equilibria.py [words of names] [--trained 200] [--repeats 5]

Costs are steps of backprop on the same network in the same run, forward and backward pass, by process CPU time. `gap`
is the energy that momentum descent on the same errors finds below the end, over the energy gained; `left` the largest
force over the first. The error of "pc-nudge" is |update - backprop| over |backprop|.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from common_networks import CASES, Case, trained
from timing import machine, medians, timed
from torch import Tensor, nn

import lightning_ebm as ebm


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


def row(name: str, case: Case, steps: int, repeats: int, momentum: int) -> str:
    """One line of the table."""
    net = trained(case, steps)
    torch.manual_seed(5)
    x, y = case.batch(case.size)

    def closure() -> Tensor:
        return case.loss(net(x), y)

    learners = {preset: ebm.Learner(net, preset, layers=case.layers) for preset in ("pc-nudge", "predictive-coding")}
    contenders = {"backprop": timed(lambda: torch.autograd.backward(closure()))}
    contenders |= {preset: timed(partial(own.backward, closure)) for preset, own in learners.items()}
    frozen = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in frozen:  # its running statistics are no part of what is measured
        module.momentum = 0.0
    cost = medians(contenders, repeats)
    net.zero_grad()
    true = ebm.reference.backprop(net, closure)
    error = ebm.metrics.alignment(learners["pc-nudge"].gradients(closure), true)["relative_error"]
    learners["predictive-coding"].gradients(closure)
    report, weak = learners["predictive-coding"].report, learners["pc-nudge"].report
    start, end = (report["phases"][0]["energies"][k] for k in (0, -1))
    ebm_momentum = Momentum(momentum)
    below = ebm.algorithm("predictive-coding", relaxer=ebm_momentum)
    ebm.Learner(net, below, layers=case.layers).gradients(closure)
    gap = max(end - ebm_momentum.lowest, 0.0) / max(start - min(end, ebm_momentum.lowest), 1e-30)
    cells = (
        name, "fresh" if not steps else f"{steps} steps",
        f"{cost['pc-nudge'] / cost['backprop']:.1f}", f"{error:.1e}", weak["result"],
        f"{cost['predictive-coding'] / cost['backprop']:.1f}", str(report["steps"]), report["result"], f"{gap:.0e}",
        f"{max(report['residual']):.2g}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table, a line as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; none: all")
    parser.add_argument("--trained", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--momentum", type=int, default=300, help="steps of momentum descent")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n")
    print('| network | weights | "pc-nudge" | error | ended | default | evaluations | ended | gap | left |')
    print("| --- " * 10 + "|")
    for name, case in CASES.items():
        if not given.names or any(part in name for part in given.names):
            for steps in (0, given.trained):
                print(row(name, case, steps, given.repeats, given.momentum), flush=True)


if __name__ == "__main__":
    main()
