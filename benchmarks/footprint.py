"""What training steps add to a process at their peak; each measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import torch
from contenders import euler
from networks import chain
from timing import Contest

import lightning_ebm as ebm

TITLE = "784-512x4-10, batch 1024"


def growth(kind: str, steps: int) -> float:
    """MiB that this process grows by at its peak over three training steps."""
    contest = Contest(chain(1024, 784, 512, 512, 512, 512, 10))
    name = "backprop"
    if kind != name:
        name = kind
        algorithm = ebm.algorithm("predictive-coding") if kind == "equilibrium" else euler(steps)
        contest.add(name, algorithm, capture=kind != "plain")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _status("VmRSS")
    for _ in range(3):
        contest.steps[name]()
    return (_status("VmHWM") - before) / 1024


def growth_elsewhere(kind: str, steps: int = 1) -> float:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__)), kind, str(steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(growth(sys.argv[1], int(sys.argv[2])))
