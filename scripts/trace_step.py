"""Counts what one training step calls in the package: calls, files, and changes from one file to another.

    bash scripts/with-venv python scripts/trace_step.py
    bash scripts/with-venv python scripts/trace_step.py equilibrium-propagation --by file
    bash scripts/with-venv python scripts/trace_step.py predictive-coding --plain --layers 20

A three-layer network on a batch of 32, after some steps have been taken: a step as a long run has them. Comprehensions
and generators are not counted as calls.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import lightning_ebm as ebm

PACKAGE = Path(ebm.__file__).parent
COUNTED = "predictive-coding", "zero-divergence", "error-pc", "equilibrium-propagation", "dual-propagation"


class Trace:
    """What was called, in order: (file, function) within the package."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def of(self, run: Callable[[], Any]) -> "Trace":
        """Runs something once, and notes what it calls."""

        def note(frame: FrameType, event: str, arg: Any) -> None:
            code = frame.f_code
            if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
                self.calls.append((str(Path(code.co_filename).relative_to(PACKAGE)), code.co_qualname))

        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
        return self

    @property
    def files(self) -> list[str]:
        """The file of each call."""
        return [file for file, _ in self.calls]

    @property
    def changes(self) -> int:
        """How often the next call is in another file than the last."""
        return sum(a != b for a, b in itertools.pairwise(self.files))


def step_of(algorithm: str, layers: int, capture: bool) -> Callable[[], Tensor]:
    """A training step in a plain loop, some steps into the run."""
    torch.manual_seed(0)
    widths = [16] + [32] * (layers - 1) + [4]
    modules: list[nn.Module] = []
    for inside, outside in itertools.pairwise(widths):
        modules += [nn.Linear(inside, outside), nn.Tanh()]
    net = nn.Sequential(*modules[:-1])
    x, y = torch.randn(32, 16), torch.randint(0, 4, (32,))
    learner = ebm.Learner(net, algorithm, capture=capture)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = learner.backward(lambda: nn.functional.cross_entropy(net(x), y))
        optimizer.step()
        return loss

    for _ in range(12):  # past the first comparison of relaxers, and every trace of code
        step()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", default=COUNTED, help="presets")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="interpret the record instead of running code")
    parser.add_argument("--by", choices=["file", "function"], help="what to list the calls by")
    given = parser.parse_args()
    print(f"{'algorithm':<28} {'calls':>6} {'files':>6} {'changes':>8}")
    for name in given.algorithms:
        trace = Trace().of(step_of(name, given.layers, not given.plain))
        print(f"{name:<28} {len(trace.calls):>6} {len(set(trace.files)):>6} {trace.changes:>8}")
        if given.by:
            counted = Counter(trace.files if given.by == "file" else [f"{f} {c}" for f, c in trace.calls])
            for what, count in counted.most_common(40):
                print(f"    {count:>5} {what}")


if __name__ == "__main__":
    main()
