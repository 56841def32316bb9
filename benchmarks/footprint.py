"""What training steps add to a process at their peak; each measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import torch
from contenders import euler
from networks import chain
from page import Lines, Settings, line, table
from peak import allocated_at_peak
from timing import Contest

import lightning_ebm as ebm

TITLE = "784-512x4-10, batch 1024"


HEAD = f"""## Peak memory

{TITLE}: what a process grows by at its peak over three steps, each measured in a process of its own, with the code
that is loaded, the tracing of the first steps and what the allocator keeps; and, exactly, what is allocated at the
peak of a fourth step: alone, with weights, Adam's moments and the batch, and in states of a layer (one of 1024 x
512) beyond backprop's peak."""
ALGORITHMS: dict[str, tuple[str | ebm.Algorithm | None, bool]] = {
    "zero-divergence": ("zero-divergence", True),
    "pc-nudge": ("pc-nudge", True),
    "default": (None, True),
    "error-pc": ("error-pc", True),
    "PC, 5 Euler steps": (euler(5), True),
    "PC, 50 Euler steps": (euler(50), True),
    "PC, 50 Euler steps, capture=False": (euler(50), False),
    "equilibrium-propagation": ("equilibrium-propagation", True),
    "dual-propagation": ("dual-propagation", True),
}


def memory(given: Settings) -> Lines:
    """Peak memory."""
    yield HEAD
    yield table(
        "algorithm", "process, MiB", "of backprop's", "a later step, MiB", "of backprop's", "in all, MiB", "states more"
    )
    found = {name: growth_elsewhere(name) for name in ("backprop", *ALGORITHMS)}
    stock, least, _ = found["backprop"]
    for name, (grown, step, whole) in found.items():
        states = (step - least) / (1024 * 512 * 4 / 2**20)
        yield line(name, f"{grown:.0f}", f"{grown / stock:.2f}", step, f"{step / least:.2f}", whole, f"{states:.1f}")


def growth(name: str) -> tuple[float, float, float]:
    """What training takes, in MiB.

    Returns:
        What this process grows by at its peak over three training steps: what the machine must have, with what the
        allocator keeps and the code itself. Exactly, what is allocated at the peak of a fourth step; and that with the
        weights, Adam's two moments and the batch, which is what a GPU's memory would be asked for.
    """
    contest = Contest(chain(1024, 784, 512, 512, 512, 512, 10))
    if name in ALGORITHMS:
        algorithm, capture = ALGORITHMS[name]
        contest.add(name, algorithm, capture=capture)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _status("VmRSS")
    for _ in range(3):
        contest.steps[name]()
    grown = (_status("VmHWM") - before) / 1024
    peak = allocated_at_peak(contest.steps[name])
    return grown, peak, peak + contest.resident / 2**20


def growth_elsewhere(name: str) -> tuple[float, float, float]:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__)), name]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-3:]
    grown, allocated, whole = map(float, found)
    return grown, allocated, whole


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*growth(sys.argv[1]))
